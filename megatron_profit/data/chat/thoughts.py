"""The <think> block that an answer begins with."""

import re

OPEN, CLOSE = "<think>", "</think>"
# Models whose prompt opens the block write only the closing tag, on a line of its own. In running text the
# tag is a mention, as it is in a block of code.
_CLOSING_LINE = re.compile(rf"^[ \t]*{CLOSE}[ \t]*$", re.MULTILINE)
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)


def split(content: str) -> tuple[str, str]:
    """Return an answer's thoughts and the text after them; ("", content) where it begins with no block.

    For example, "<think>a</think>b" gives the thoughts "a" and the text "b".
    """
    begin = content.lstrip()
    if begin.startswith(OPEN):
        thoughts, close, answer = begin.removeprefix(OPEN).partition(CLOSE)
        return (thoughts, answer) if close else ("", content)
    closing = _CLOSING_LINE.search(content)
    if closing is None:
        return "", content
    before = content[: closing.start()]
    if OPEN in before or len(_FENCE.findall(before)) % 2:
        return "", content
    return before, content[closing.end() :]


def never_end(content: str) -> bool:
    """Return whether an answer begins with a block that is not closed, as in one that was cut off."""
    return content.lstrip().startswith(OPEN) and CLOSE not in content


def without_tags(header: str) -> str:
    """Return the text before the first tag; all of the header where that is blank."""
    before = re.split(f"{OPEN}|{CLOSE}", header, maxsplit=1)[0]
    return before if before.strip() else header
