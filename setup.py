"""Everything is in pyproject.toml but the long description: README.md without what an index cannot show.

An index has neither the figures nor the pages next to README.md. So a figure is left out, and a link to a
file of this repository becomes its text.
"""

import re
from pathlib import Path

from setuptools import setup

readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
figures, links = r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n+", r"\[([^\]]*)\]\((?!https?:)[^)]*\)"
setup(
    long_description=re.sub(links, r"\1", re.sub(figures, "", readme)),
    long_description_content_type="text/markdown",
)
