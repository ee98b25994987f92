"""Tool calls and tools of a record, in their various forms, as chat templates take them."""

from typing import Any

from megatron_profit.data.errors import BrokenRecord, shown
from megatron_profit.data.files.fields import (
    MISSING_FIELD,
    WRONG_TYPE,
    check_json,
    listed,
    read,
    typed,
    without_nulls,
)

# Names of a call's arguments; Llama 3's templates write the latter.
_ARGUMENTS = ("arguments", "parameters")
_OF_A_CALL = {*_ARGUMENTS, "name", "id", "type", "index"}


def read_calls(value: Any) -> tuple[list[dict[str, Any]], bool]:
    """Return calls as {"type", "function": {"name", "arguments"}}, with an "id" where they have one.

    Null arguments are left out: tools that write tables give every call the arguments of all calls. JSON text
    keeps them, since no tool adds any there. For example, {"city": "Rome", "day": null} becomes {"city":
    "Rome"}, and '{"day": null}' becomes {"day": null}.

    Args:
        value: One call or a list of them; each of them, and the arguments, may be JSON text.

    Returns:
        The calls, and whether null arguments were left out.

    Raises:
        BrokenRecord: A part of it is no call, or the arguments hold a value that JSON does not have.
    """
    given, calls = (
        [_call(call) for call in listed(v)] for v in (_trimmed(value), without_nulls(value))
    )
    check_json(calls)
    return calls, calls != given


def read_tools(value: Any) -> tuple[list[dict[str, Any]] | None, bool]:
    """Return the JSON schemas of tools, None where there is none, and whether null fields were left out.

    Nulls are left out as in `read_calls`.

    Args:
        value: One tool or a list of them; each of them, its function and the function's parameters may be
            JSON text.

    Raises:
        BrokenRecord: A tool is no object, or a function has no name, or holds a value that JSON does not
            have.
    """
    sparse = without_nulls(value)
    tools = [_tool(tool) for tool in listed(sparse)]
    check_json(tools)
    return tools or None, sparse != value


def _trimmed(value: Any) -> Any:
    """Return calls without null fields of their own or of their function; the arguments keep theirs."""
    if isinstance(value, list):
        return [_trimmed(call) for call in value]
    if not isinstance(value, dict):
        return value
    return {
        name: _trimmed(item) if name == "function" else item
        for name, item in value.items()
        if item is not None
    }


def _tool(tool: Any) -> dict[str, Any]:
    """Return the tool with its outer object, which some data sets leave out; models were trained with it."""
    if not isinstance(tool, dict):
        raise BrokenRecord(WRONG_TYPE, f"a tool is {shown(tool)}, not an object")
    is_flat = "function" not in tool
    if is_flat and (tool.get("type") or "function") != "function":  # one of another kind
        return tool
    # OpenAI's Responses API has the type next to the name.
    flat = {key: value for key, value in tool.items() if key != "type"}
    function = flat if is_flat else read(tool["function"])
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BrokenRecord(MISSING_FIELD, f"a tool has no name: {shown(tool)}")
    if isinstance(function.get("parameters"), str):
        function = {**function, "parameters": read(function["parameters"]) or {}}
    outer = {} if is_flat else tool
    return {"type": "function", **outer, "function": function}


def _call(call: Any) -> dict[str, Any]:
    function = read(call.get("function", call)) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        raise BrokenRecord(WRONG_TYPE, f"a tool call is {shown(call)}, not an object")
    identifier = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    named = {"name": typed(function, "name", str), "arguments": _arguments(function)}
    return {**identifier, "type": "function", "function": named}


def _arguments(function: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call; none where it has a name only."""
    named = (function.get(name) for name in _ARGUMENTS)
    given = next((value for value in named if value is not None), None)
    if given is None and (others := function.keys() - _OF_A_CALL):
        raise BrokenRecord(
            MISSING_FIELD, f"a tool call has {shown(sorted(others))} and no arguments"
        )
    arguments = read(given)
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        raise BrokenRecord(WRONG_TYPE, f"the arguments of a tool call are {shown(arguments)}")
    return arguments
