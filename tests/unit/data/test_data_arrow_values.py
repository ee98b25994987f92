"""Parquet and arrow rows hold what JSON lines of the same data hold."""

import json
from datetime import datetime

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Json, List, Value

from megatron_profit.data import ChatRenderer, build_examples, read_records
from megatron_profit.data.files import fields
from megatron_profit.data.files.arrow_values import converted
from megatron_profit.data.store import prepare

PAIRS = pyarrow.map_(pyarrow.string(), pyarrow.string())


def read(array, feature=None):
    """One column's values; `feature` is what datasets notes about it in the table's metadata."""
    table = pyarrow.table({"x": array})
    if feature is not None:
        noted = {"info": {"features": {"x": feature}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(noted)})
    return [
        row["x"] if isinstance(row, dict) else row.reason
        for row in converted(table.to_pylist(), table.schema)
    ]


TEXTS = ['{"a": 1}', '"high"', "3", "null", None, "[1, null]"]
VALUES = [{"a": 1}, "high", 3, None, None, [1, None]]


def test_json_text_is_read_at_any_depth():
    flat = pyarrow.array(TEXTS, pyarrow.json_())
    assert read(flat) == VALUES
    assert read(pyarrow.ListArray.from_arrays([0, len(TEXTS)], flat)) == [VALUES]
    others = pyarrow.array(["3"] * len(TEXTS))
    inner = pyarrow.StructArray.from_arrays([flat, others], ["x", "y"])
    expected = [{"x": value, "y": "3"} for value in VALUES]
    assert read(inner) == expected
    deeper = pyarrow.LargeListArray.from_arrays([0, 2, len(TEXTS)], inner)
    assert read(deeper) == [expected[:2], expected[2:]]
    kept = pyarrow.StructArray.from_arrays([flat], ["x"], mask=pyarrow.array([True] * len(TEXTS)))
    assert read(kept) == [None] * len(TEXTS)


def test_json_that_is_noted_in_the_metadata_alone_is_read():
    text = {"dtype": "string", "_type": "Value"}
    plain = pyarrow.array(TEXTS)
    assert read(plain) == TEXTS
    assert read(plain, text) == TEXTS
    assert read(plain, {"_type": "Json"}) == VALUES
    listed = pyarrow.array([TEXTS])
    for feature in ({"feature": {"_type": "Json"}, "_type": "List"}, [{"_type": "Json"}]):
        assert read(listed, feature) == [VALUES]
    rows = pyarrow.array([{"a": {"b": '{"c": 1}', "d": "1"}}])
    assert read(rows, {"a": {"b": {"_type": "Json"}, "d": text}}) == [
        {"a": {"b": {"c": 1}, "d": "1"}}
    ]
    lists = pyarrow.array([{"b": ["1", "2"]}])  # a Sequence of structs, as older versions store it
    feature = {"feature": {"b": {"_type": "Json"}}, "_type": "Sequence"}
    assert read(lists, feature) == [{"b": [1, 2]}]


def test_metadata_of_another_kind_are_no_features():
    for text in ("{", "[]", '{"info": null}', '{"info": {"features": [1]}}'):
        table = pyarrow.table({"x": ["1"]}).replace_schema_metadata({"huggingface": text})
        assert converted(table.to_pylist(), table.schema) == [{"x": "1"}]


def test_json_text_that_cannot_be_read_is_a_broken_row():
    texts = ["{", '{"a": 1, "a": 2}', "1"]
    expected = [fields.WRONG_TYPE, fields.NAMED_TWICE, 1]
    assert read(pyarrow.array(texts, pyarrow.json_())) == expected


def test_maps_are_objects():
    rows = [[("city", "Oslo"), ("day", None)], [], None, [("a", "1"), ("a", "2")]]
    expected = [{"city": "Oslo", "day": None}, {}, None, fields.NAMED_TWICE]
    assert read(pyarrow.array(rows, PAIRS)) == expected
    nested = pyarrow.map_(pyarrow.large_string(), pyarrow.list_(PAIRS))
    assert read(pyarrow.array([[("x", [[("y", "1")]])]], nested)) == [{"x": [{"y": "1"}]}]
    numbered = pyarrow.map_(pyarrow.int64(), pyarrow.string())
    assert read(pyarrow.array([[(1, "a")]], numbered)) == [[(1, "a")]]


def call(**arguments):
    return {"type": "function", "function": {"name": "volume", "arguments": arguments}}


def talk(level):
    tool = {"name": "volume", "parameters": {"level": {"enum": [level, 7]}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call(level=level)]}
    return {
        "messages": [{"role": "user", "content": "Volume?"}, calling],
        "tools": [{"type": "function", "function": tool}],
    }


LEVELS = [3, "high", "3", None, 2.5]
TALKS = [talk(level) for level in LEVELS]


@pytest.fixture
def features():
    function = {"name": Value("string"), "arguments": {"level": Json()}}
    message = {
        "role": Value("string"),
        "content": Value("string"),
        "tool_calls": List({"type": Value("string"), "function": function}),
    }
    schema = {"name": Value("string"), "parameters": {"level": {"enum": List(Json())}}}
    tools = List({"type": Value("string"), "function": schema})
    return datasets.Features({"messages": List(message), "tools": tools})


@pytest.mark.parametrize("whole", [False, True])
def test_the_same_data_give_the_same_ids_in_every_container(
    tmp_path, write_lines, make_tokenizer, templates, features, whole
):
    """Fields of several types as columns of JSON, or whole messages."""
    template = templates.chatml.replace(
        "+ message.content +",
        "+ message.content + (message.tool_calls | tojson if message.tool_calls else '') +",
    )
    template = "{%- if tools %}{{- tools | tojson }}{%- endif %}" + template
    renderer = ChatRenderer(make_tokenizer(template))
    if whole:
        features = datasets.Features({"messages": List(Json()), "tools": Json()})
    # datasets stores a text that is JSON as that JSON, so the text "3" has to be quoted first.
    quoted = [talk('"3"' if level == "3" else level) for level in LEVELS]
    data = datasets.Dataset.from_list(TALKS if whole else quoted, features=features)
    data.to_parquet(tmp_path / "data.parquet")
    data.save_to_disk(tmp_path / "saved")
    expected, report = build_examples(write_lines(TALKS), renderer, 512)
    assert (report.kept, report.found[prepare.NULLS_LEFT_OUT].count) == (5, 1)
    for name in ("data.parquet", "saved", "saved/data-00000-of-00001.arrow"):
        found, _ = build_examples(tmp_path / name, renderer, 512)
        assert found.ids.tolist() == expected.ids.tolist()


def test_a_first_row_of_nulls_is_a_broken_record(tmp_path, renderer):
    rows = [{"instruction": None, "output": None}, {"instruction": "q", "output": "a"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    _, report = build_examples(tmp_path / "a.parquet", renderer, 64)
    assert (report.read, report.kept, list(report.skipped)) == (2, 1, [fields.MISSING_FIELD])


def test_json_that_nests_without_end_is_a_broken_record(tmp_path):
    texts = ["1", '{"a":' * 500 + "1" + "}" * 500, '{"a":' * 5000 + "1" + "}" * 5000]
    table = pyarrow.table({"x": pyarrow.array(texts, pyarrow.json_())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [record.broken is None for record in read_records(tmp_path / "a.parquet")] == [
        True,
        False,
        False,
    ]


def test_a_text_that_arrow_made_a_date_leaves_the_record_out(tmp_path, renderer):
    """`load_dataset("json")` makes timestamps of such texts."""
    record = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [call(date=datetime(2024, 5, 1))]},
        ]
    }
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [record, {"messages": good}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    _, report = build_examples(tmp_path / "a.parquet", renderer, 64)
    assert (report.read, report.kept, list(report.skipped)) == (2, 1, [fields.NO_JSON_TYPE])
