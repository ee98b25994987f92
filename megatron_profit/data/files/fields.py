"""Values of a record's fields: JSON text read, types checked, texts joined.

Some tools write a field as an object, others as its JSON in a string; both are read. A value that cannot be
read raises `BrokenRecord`.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from megatron_profit.data.errors import BrokenRecord, shown

WRONG_TYPE = "a field has the wrong type"
MISSING_FIELD = "a field is missing"
NAMED_TWICE = "a field is named twice"
NOT_FINITE = "a number of a tool call or tool is not JSON (NaN or infinite)"
NO_JSON_TYPE = "a value of a tool call or tool has a type that JSON does not have"


def parsed(text: str) -> Any:
    """Return the value of JSON text. For example, '{"a": 1}' gives {"a": 1}.

    As in the rest of a record, `NaN`, `Infinity` and 1e400 are read as floats that are not finite.

    Raises:
        BrokenRecord: It is not JSON, or one of its objects names a field twice.
    """
    try:
        return json.loads(text, object_pairs_hook=unambiguous)
    except BrokenRecord:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
        raise BrokenRecord(WRONG_TYPE, f"{shown(text)} is not JSON ({error})") from error


def unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these fields.

    Raises:
        BrokenRecord: Two of them have one name, so their meaning is ambiguous.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        name = most_common(name for name, _ in pairs)
        raise BrokenRecord(NAMED_TWICE, f"{shown(name)} stands twice in one object")
    return value


def most_common(names: Iterable[str]) -> str:
    """Return the name that occurs most often."""
    return Counter(names).most_common(1)[0][0]


def read(value: Any) -> Any:
    """Return the value, or the value of its JSON text; None where the text is empty."""
    if not isinstance(value, str):
        return value
    return parsed(value) if value.strip() else None


def listed(value: Any) -> list[Any]:
    """Return the entries of a list, each of which may be JSON text like the list itself.

    One object gives a list of it. Null, an empty object or an empty text gives an empty list.
    """
    value = read(value)
    if value is None or value == {}:
        return []
    return [read(entry) for entry in value] if isinstance(value, list) else [value]


def without_nulls(value: Any) -> Any:
    """Return `value` without its null fields: tools that write tables give every record all fields."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def check_json(value: Any) -> None:
    """Refuse values that JSON does not have.

    Templates would write numbers as `NaN` or `Infinity`, and dates of a table in another form than the model
    is to write them.

    Raises:
        BrokenRecord: There is one inside `value`.
    """
    for item in _leaves(value):
        if isinstance(item, float) and not math.isfinite(item):
            raise BrokenRecord(NOT_FINITE, f"{item} in {shown(value)}")
        if item is not None and not isinstance(item, str | int | float):
            raise BrokenRecord(
                NO_JSON_TYPE,
                f"{_place(item, value)} is the {type(item).__name__} {shown(str(item))}; write the arguments "
                "or the tools as JSON text",
            )


def _place(item: object, value: object) -> str:
    """Return the way to an item inside lists and objects, for example "0.function.arguments.date"."""
    stack: list[tuple[str, object]] = [("", value)]
    while stack:
        path, found = stack.pop()
        if found is item:
            return path.removeprefix(".")
        if isinstance(found, dict):
            stack.extend((f"{path}.{key}", inner) for key, inner in found.items())
        elif isinstance(found, list | tuple):
            stack.extend((f"{path}.{number}", inner) for number, inner in enumerate(found))
    return ""


def strings(value: object) -> list[str]:
    """Return every string inside lists and dicts, keys included."""
    return [item for item in _leaves(value) if isinstance(item, str)]


def _leaves(value: object) -> list[Any]:
    """Return all values that are neither list nor dict (no recursion: data may nest deeply)."""
    stack, leaves = [value], []
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)
        else:
            leaves.append(item)
    return leaves


def text(content: Any) -> str:
    """Return content as one string; a list of text parts is joined.

    For example, [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}] gives "ab".

    Raises:
        BrokenRecord: The content has another form, or a part is no text.
    """
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part_text(part) for part in content)
    raise BrokenRecord(WRONG_TYPE, f"a message's content is {shown(content)}, not text")


def _part_text(part: Any) -> str:
    found = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
    if not isinstance(found, str):
        raise BrokenRecord(WRONG_TYPE, f"a part of a message's content is {shown(part)}, not text")
    return found


def either(entry: dict[str, Any], key: str, other: str) -> Any:
    """Return `entry[key]`, or `entry[other]` where that is absent.

    Raises:
        BrokenRecord: Both are absent.
    """
    if key not in entry and other not in entry:
        raise BrokenRecord(MISSING_FIELD, f"neither {key} nor {other} in {shown(entry)}")
    return entry[key] if key in entry else entry[other]


def typed(value: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """Return `value[key]`, checked to be of type `kind`; `default` if it is absent and one is given.

    Raises:
        BrokenRecord: It is absent without a default, or of another type.
    """
    found = value.get(key, default)
    if found is None:
        raise BrokenRecord(MISSING_FIELD, f"no {key} in {shown(value)}")
    if not isinstance(found, kind):
        raise BrokenRecord(WRONG_TYPE, f"{key} is {shown(found)}, not {kind.__name__}")
    return found
