"""Containers: what is read, where each record says it comes from, and what stops the reading."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from megatron_profit.data import DataError, normalise, read_records

ROWS = [{"instruction": "a", "output": "b"}, {"instruction": "\u2028 é", "output": "c\r\nd"}]


def test_json_list_numbers_records(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8")
    records = list(read_records(path))
    assert [record.value for record in records] == ROWS
    assert [record.where for record in records] == [f"{path}, record 1", f"{path}, record 2"]


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "DATA.JSONL"])
def test_json_lines_number_lines_in_either_suffix(tmp_path, name):
    path = tmp_path / name
    lines = [json.dumps(ROWS[0]), "", json.dumps(ROWS[1], ensure_ascii=False)]
    path.write_bytes("\r\n".join(["\ufeff" + lines[0], *lines[1:]]).encode())
    records = list(read_records(str(path)))
    assert [record.value for record in records] == ROWS
    assert [(record.number, record.unit) for record in records] == [(1, "line"), (3, "line")]


def test_one_object_over_several_lines_is_one_record(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(ROWS[0], indent=2))
    assert [record.value for record in read_records(path)] == ROWS[:1]


def test_files_come_in_the_order_given(write_lines):
    second, first = write_lines(ROWS[1:], "a.jsonl"), write_lines(ROWS[:1], "b.jsonl")
    assert [record.value for record in read_records([first, second])] == ROWS


def test_an_empty_list_in_parquet_is_no_value(tmp_path):
    """A column that is not read tells only whether a row has a value; a list of no picture is none."""
    rows = [{**ROWS[0], "images": images} for images in ([], ["a.jpg"], None)]
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    records = read_records(path, wanted=lambda name: name != "images")
    assert [bool(record.value.get("images")) for record in records] == [False, True, False]


def test_parquet_drops_the_fields_that_a_row_does_not_have(tmp_path):
    call = {"function": {"name": "f", "arguments": '{"x": null}'}}
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "assistant", "tool_calls": [call]}]},
    ]
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    records = list(read_records(path))
    assert [record.value for record in records] == rows
    assert records[1].where == f"{path}, record 2"
    assert "tool_calls" not in normalise(records[0]).messages[1]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("data.txt", b"{}", [".txt", ".jsonl"]),
        ("data.jsonl", b"", ["holds no record"]),
        ("data.json", b"[]", ["holds no record"]),
        ("data.json", b" \n", ["holds no record"]),
        ("data.jsonl", b'{"a": \n{"a": 1}\n', ["line 1", "not valid JSON", "end of the text"]),
        ("data.jsonl", b'{"a": 1}\n{"a": ', ["line 2", "not valid JSON", "end of the text"]),
        ("data.jsonl", b"[1]\n", ["line 1", "begins with '['", "must be an object"]),
        ("data.json", b'[{"a": 1},\n{"a" 2}]', ["line 2, column 6", "found '2}]'"]),
        ("data.json", b'{"a": 1}\n{"a" 2}', ["line 2, column 6"]),
        ("data.json", b"3", ["record 1", "int 3"]),
        ("data.jsonl", b'{"a": 1}\n{"a": "\xff"}', ["line 2", "UTF-8", "0xff"]),
        ("data.jsonl", b"[" * 200_000, ["line 1", "JSON"]),
        ("data.jsonl", b"9" * 5000, ["line 1", "JSON"]),
        ("data.parquet", b"PAR1 but not really", ["parquet"]),
        ("data.parquet", b"", ["parquet"]),
    ],
)
def test_damage_is_named_with_its_place(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        list(read_records(path))
    for part in [str(path), *said]:
        assert part in str(error.value)


def test_paths_are_checked_before_anything_is_read(tmp_path, write_lines):
    good = write_lines(ROWS)
    with pytest.raises(DataError, match=r"missing\.jsonl: does not exist"):
        next(read_records([good, tmp_path / "missing.jsonl"]))
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match="neither data files"):
        next(read_records([good, tmp_path / "folder.json"]))
    with pytest.raises(DataError, match="no data file"):
        next(read_records([]))


@pytest.mark.parametrize(("line", "said"), [("[1]", "must be an object"), ("x", "not valid JSON")])
def test_a_first_record_that_is_none_puts_the_file_in_doubt(tmp_path, line, said):
    """Also behind empty lines."""
    file = tmp_path / "a.jsonl"
    file.write_text(f'\n\n{line}\n{{"a": 1}}\n')
    with pytest.raises(DataError, match=f"line 3.*{said}"):
        list(read_records(file))
    file.write_text(f'\n{{"a": 1}}\n{line}\n')
    assert [record.broken is None for record in read_records(file)] == [True, False]


def test_the_first_record_of_each_file_is_marked(tmp_path):
    """Also behind empty lines."""
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).write_text('\n\n{"a": 1}\n{"a": 2}\n')
    records = read_records([tmp_path / "one.jsonl", tmp_path / "two.jsonl"])
    assert [(record.number, record.first) for record in records] == [(3, True), (4, False)] * 2
