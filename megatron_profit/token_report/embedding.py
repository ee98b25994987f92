"""A page that needs no other file: its data, style and script stand in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

_DATA = "@DATA@"
# Parts in files of their own; the first two are in all pages.
_COMMON = {"@STYLE@": "common.css", "@SCRIPT@": "common.js", "@THRESHOLDS@": "thresholds.js"}


def with_data(template: str, data: Mapping[str, Any]) -> str:
    """Return a page with its data in place of `@DATA@`, and the parts in files of their own.

    The data are escaped, so that no text in them can end the script element. A lone surrogate, which has no
    UTF-8 form, becomes "?".
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    for place, name in _COMMON.items():
        part = files("megatron_profit.token_report").joinpath(name).read_text(encoding="utf-8")
        template = template.replace(place, part)
    before, after = template.split(_DATA)
    return before + text.encode("utf-8", "replace").decode("utf-8") + after
