"""Rows of Arrow tables (parquet, data sets of `datasets`) as the values that JSON lines would give.

`to_pylist` leaves two types with other values than JSON has. Text of the type arrow.json, which the `Json()`
feature of `datasets` writes at any depth, stays text. Maps become lists of pairs: for example, {"a": 1}
becomes [("a", 1)].
"""

import json
from collections.abc import Callable
from typing import Any

import pyarrow
from pyarrow import types

from megatron_profit.data.errors import BrokenRecord
from megatron_profit.data.files.fields import parsed, unambiguous

type _Convert = Callable[[Any], Any]


def converted(
    rows: list[dict[str, Any]], schema: pyarrow.Schema
) -> list[dict[str, Any] | BrokenRecord]:
    """Return the rows of a table with JSON text and maps read; a row that cannot be read becomes its error.

    Args:
        rows: The table's `to_pylist()`.
        schema: The table's schema. Features that `datasets` notes in its metadata count like types.
    """
    features = _features(schema)
    columns = {field.name: _converter(field.type, _field(features, field.name)) for field in schema}
    return [
        _row(row, {name: convert for name, convert in columns.items() if convert}) for row in rows
    ]


def _row(row: dict[str, Any], columns: dict[str, _Convert]) -> dict[str, Any] | BrokenRecord:
    try:
        return row | {name: convert(row[name]) for name, convert in columns.items()}
    except BrokenRecord as error:
        return error


def _features(schema: pyarrow.Schema) -> Any:
    """Return the features that `datasets` notes for the columns; None if another library wrote the table."""
    try:
        return json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return None


def _converter(kind: pyarrow.DataType, feature: Any) -> _Convert | None:
    """Return the function that converts values of this type to JSON's; None where they need no conversion."""
    if getattr(kind, "extension_name", "") == "arrow.json" or _is_json(feature):
        return _json_value
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _converter(kind.storage_type, feature)
    if types.is_struct(kind):
        fields = {field.name: _converter(field.type, _field(feature, field.name)) for field in kind}
        return _of_fields({name: convert for name, convert in fields.items() if convert})
    if types.is_map(kind):
        return _of_pairs(_converter(kind.item_type, None)) if _is_text(kind.key_type) else None
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _converter(kind.value_type, feature)
    if hasattr(kind, "value_type"):  # lists of all kinds
        return _of_items(_converter(kind.value_type, _item(feature)))
    return None


def _is_json(feature: Any) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == "Json"


def _is_text(kind: pyarrow.DataType) -> bool:
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _field(feature: Any, name: str) -> Any:
    """Return the feature of a field of a struct; a list of structs may be noted as the `Sequence` of one."""
    if not isinstance(feature, dict):
        return None
    if isinstance(feature.get("_type"), str) and "feature" in feature:
        return {"_type": "List", "feature": _field(feature["feature"], name)}
    return feature.get(name)


def _item(feature: Any) -> Any:
    """Return the feature of the items of a list."""
    if isinstance(feature, list):
        return feature[0] if feature else None
    return feature.get("feature") if isinstance(feature, dict) else None


def _json_value(text: Any) -> Any:
    return parsed(text) if isinstance(text, str) else text


def _of_fields(fields: dict[str, _Convert]) -> _Convert | None:
    def convert(value: Any) -> Any:
        if value is None:
            return None
        return value | {name: inner(value[name]) for name, inner in fields.items()}

    return convert if fields else None


def _of_items(inner: _Convert | None) -> _Convert | None:
    return inner and (lambda value: None if value is None else [inner(item) for item in value])


def _of_pairs(inner: _Convert | None) -> _Convert:
    def convert(pairs: Any) -> Any:
        if pairs is None:
            return None
        return unambiguous([(key, inner(item) if inner else item) for key, item in pairs])

    return convert
