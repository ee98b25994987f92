"""Data inside a page that needs no other file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_DATA = "@DATA@"


def with_data(template: str, data: Mapping[str, Any]) -> str:
    """Return a page with its data in place of `@DATA@`.

    The data are escaped, so that no text in them can end the script element. A lone surrogate, which has no
    UTF-8 form, becomes "?".
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    before, after = template.split(_DATA)
    return before + text.encode("utf-8", "replace").decode("utf-8") + after
