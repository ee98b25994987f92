"""Tables: only what is read is converted, and no offset, index or size is trusted."""

import datetime
import json
import struct

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_profit.data import (
    BrokenRecord,
    ColumnMapping,
    DataError,
    build_examples,
    normalise,
    read_records,
)
from megatron_profit.data.chat.conversations import is_read
from megatron_profit.data.files import records, tables
from megatron_profit.data.files.bounded import LARGEST_RECORD
from megatron_profit.data.files.tables import portions

# A day after the last one that Python knows, as exports of databases have it.
FAR = pyarrow.array([0, 2**31 - 1, 1], pyarrow.int32()).view(pyarrow.date32())


def far_table(**columns):
    return pyarrow.table({"instruction": ["q", "r", "s"], "output": ["a", "b", "c"], **columns})


@pytest.fixture
def write(tmp_path):
    """write(table, kind): a file or folder with a table."""

    def make(table, kind):
        path = tmp_path / f"a.{kind}"
        if kind == "parquet":
            pyarrow.parquet.write_table(table, path)
        elif kind == "arrow":
            with pyarrow.ipc.new_stream(path, table.schema) as file:
                file.write_table(table)
        else:
            datasets.Dataset(table).save_to_disk(path)
        return path

    return make


every_kind = pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])


@every_kind
def test_a_value_that_python_cannot_hold_stops_nothing_where_it_is_not_read(write, renderer, kind):
    zone = pyarrow.array([1, 2, None], pyarrow.timestamp("us", tz="Nowhere/Here"))
    path = write(far_table(day=FAR, zone=zone), kind)
    _, report = build_examples(path, renderer, 64)
    assert (report.read, report.kept) == (3, 3)
    assert report.unread == {"day": 3, "zone": 2}


@every_kind
def test_where_it_is_read_the_record_is_left_out_with_column_and_place(write, kind):
    path = write(far_table(system=FAR), kind)
    found = list(read_records(path))
    assert [record.broken is None for record in found] == [True, False, True]
    assert found[0].value["system"] == datetime.date(1970, 1, 1)
    assert (found[1].broken.reason, found[1].number) == (records.NOT_HELD, 2)
    assert "in the column 'system': days=2147483647" in found[1].broken.detail


@every_kind
def test_of_other_columns_only_is_said_where_they_hold_something(write, kind):
    nested = [{"x": 1}, None, {"x": None}]
    table = far_table(all=[1, 2, 3], some=["", None, "x"], none=[None] * 3, nested=nested)
    found = list(read_records(write(table, kind), wanted=["instruction", "output"].__contains__))
    filled = [{k: v for k, v in record.value.items() if v is not None} for record in found]
    assert filled == [
        {"instruction": "q", "output": "a", "all": True, "some": True, "nested": True},
        {"instruction": "r", "output": "b", "all": True},
        {"instruction": "s", "output": "c", "all": True, "some": True, "nested": True},
    ]


def test_the_fields_that_are_read_follow_the_layout():
    assert all(map(is_read(ColumnMapping()), ("messages", "instruction", "prompt", "tools")))
    named = is_read(ColumnMapping.of_columns(["prompt=question", "response=answer"]))
    assert all(map(named, ("question", "answer", "weight", "masked", "assistant_masks")))
    assert not any(map(named, ("instruction", "messages")))


@every_kind
def test_a_column_that_may_mask_is_read_as_in_json_lines(write, kind):
    table = pyarrow.table(
        {
            "prompt": ["q"] * 3,
            "completion": ["a"] * 3,
            "weights": [[0, 1], None, []],
            "mask": [None, "User", None],
        }
    )
    broken, *kept = list(read_records(write(table, kind), wanted=is_read(ColumnMapping())))
    with pytest.raises(BrokenRecord, match=r"weights is \[0, 1\] and is not read"):
        normalise(broken)
    assert [normalise(record).unread for record in kept] == [{"mask"}, {"weights"}]


def test_a_damaged_column_that_nothing_reads_stops_nothing(tmp_path):
    path = tmp_path / "a.parquet"
    noise = np.random.default_rng(0).bytes(9000)
    table = far_table(other=[noise[:3000], noise[3000:6000], noise[6000:]])
    pyarrow.parquet.write_table(table, path, compression="none")
    data = bytearray(path.read_bytes())
    length = data.index(noise[:3000]) - 4
    data[length : length + 4] = b"\xff" * 4
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet"):
        list(read_records(path))
    wanted = read_records(path, wanted=["instruction", "output"].__contains__)
    assert [record.value["output"] for record in wanted] == ["a", "b", "c"]


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
def test_an_encoding_that_is_not_read_is_named_with_the_remedy(tmp_path, encoding):
    path = tmp_path / "a.parquet"
    table = far_table(other=["x", "y", "z"])
    for column in ("output", "other"):
        options = {"use_dictionary": False, "column_encoding": {column: encoding}}
        pyarrow.parquet.write_table(table, path, **options)
        wanted = read_records(path, wanted=["instruction", "output"].__contains__)
        if column == "other":  # its statistics tell that it has values
            assert [record.value["output"] for record in wanted] == ["a", "b", "c"]
        else:
            with pytest.raises(DataError, match=rf"'output' has the encoding {encoding}.*write"):
                list(wanted)


@every_kind
def test_fields_that_are_null_throughout_are_read(write, kind):
    talk = [{"role": "user", "content": "q", "name": None, "parts": [{"a": [None, None]}, None]}]
    rows = [talk * count for count in (3, 0, 2)]
    table = pyarrow.table({"messages": rows, "all": [[None] * 2, [], None], "none": [None] * 3})
    found = [record.value for record in read_records(write(table, kind))]
    (message,) = {json.dumps(m, sort_keys=True) for row in found for m in row["messages"]}
    assert json.loads(message) == {
        "role": "user",
        "content": "q",
        "parts": [{"a": [None, None]}, None],
    }
    assert [len(row["messages"]) for row in found] == [3, 0, 2]
    assert [row["all"] for row in found] == [[None, None], [], None]


def test_two_columns_of_one_name_are_refused(tmp_path):
    schema = pyarrow.schema([("output", pyarrow.string())] * 2)
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, schema=schema)
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", schema) as file:
        file.write_table(table)
    with pytest.raises(DataError, match="two columns are called 'output'"):
        list(read_records(tmp_path / "a.arrow"))


VALUES = [
    ["abc", None, "é" * 5],
    [b"abc", None, b""],
    [1, None, 3],
    [["a", "bc"], None, []],
    [{"x": "a", "y": [{"z": "bc"}]}, None, {"x": None, "y": None}],
    [[[1, 2], [3]], [[]], None],
]


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("form", ["plain", "large", "sliced", "dictionary"])
def test_the_size_of_a_row_grows_with_what_it_holds(values, form):
    array = pyarrow.array([*values, *values])
    if form == "large" and pyarrow.types.is_string(array.type):
        array = array.cast(pyarrow.large_string())
    if form == "large" and pyarrow.types.is_list(array.type):
        array = array.cast(pyarrow.large_list(array.type.value_type))
    if form == "dictionary" and not pyarrow.types.is_nested(array.type):
        array = array.dictionary_encode()
    batch = pyarrow.RecordBatch.from_arrays([array], ["x"])
    batch = batch.slice(3) if form == "sliced" else batch
    ((part, sizes),) = portions(batch)
    assert part.to_pylist() == batch.to_pylist()
    expected = [len(json.dumps(row, default=bytes.decode)) for row in batch.to_pylist()]
    assert len(sizes) == len(batch)
    for size, text in zip(sizes, expected, strict=True):
        assert text / 10 <= size <= 100 * text
    assert sizes[0] >= sizes[1]


def test_views_maps_and_lists_of_a_fixed_size_are_measured():
    text = "a text of more than twelve characters"
    arrays = {
        "view": pyarrow.array([text, None], pyarrow.string_view()),
        "map": pyarrow.array(
            [[("k", text)], None], pyarrow.map_(pyarrow.string(), pyarrow.string())
        ),
        "fixed": pyarrow.array([[text], None], pyarrow.list_(pyarrow.string(), 1)),
    }
    for name, array in arrays.items():
        batch = pyarrow.RecordBatch.from_arrays([array], [name])
        ((_, (first, second)),) = portions(batch)
        assert first >= second + len(text)
        ((_, (alone,)),) = portions(batch.slice(0, 1))
        assert alone == first


def test_rows_come_in_portions_of_a_bounded_size_and_large_ones_alone():
    third = "x" * (LARGEST_RECORD // 3)
    texts = [third, third, third, "a", "b", third * 4, "c"]
    batch = pyarrow.RecordBatch.from_arrays([pyarrow.array(texts)], ["x"])
    parts = list(portions(batch))
    assert [len(part) for part, _ in parts] == [2, 3, 1, 1]
    assert parts[2][1][0] > LARGEST_RECORD
    assert [text for part, _ in parts for text in part.column("x").to_pylist()] == texts


def test_types_that_are_not_read_are_named_where_they_are_wanted(tmp_path):
    path = tmp_path / "a.arrow"
    union = pyarrow.UnionArray.from_sparse(pyarrow.array([0], pyarrow.int8()), [pyarrow.array([1])])
    nested = pyarrow.ListArray.from_arrays([0, 1], union)
    stream(path, [pyarrow.RecordBatch.from_arrays([pyarrow.array(["a"]), nested], ["output", "x"])])
    with pytest.raises(DataError, match=r"a\.arrow: the column 'x' has the type .*union.*not read"):
        list(read_records(path))
    (record,) = read_records(path, wanted=["output"].__contains__)
    assert record.value == {"output": "a", "x": True}


def test_lists_of_billions_of_entries_are_measured_without_a_look_at_each():
    entries = 2**31 - 1
    array = pyarrow.ListArray.from_arrays([0, 0, entries], pyarrow.nulls(entries))
    batch = pyarrow.RecordBatch.from_arrays([array], ["messages"])
    (empty, _), (full, (size,)) = portions(batch)
    assert empty.to_pylist() == [{"messages": []}]
    assert len(full) == 1
    assert size > 8 * entries


def stream(path, batches, **options):
    with pyarrow.ipc.new_stream(path, batches[0].schema, **options) as file:
        for batch in batches:
            file.write_batch(batch)
    return path.read_bytes()


def test_an_offset_that_points_elsewhere_is_found(tmp_path):
    path = tmp_path / "a.arrow"
    batch = pyarrow.RecordBatch.from_pylist([{"output": "abc"}, {"output": "defgh"}])
    data = stream(path, [batch])
    offsets = struct.pack("<3i", 0, 3, 8)
    assert data.count(offsets) == 1
    for lie in ((0, 2**30, 8), (0, 3, 2**30), (-(2**30), 3, 8), (0, 9, 8)):
        path.write_bytes(data.replace(offsets, struct.pack("<3i", *lie)))
        with pytest.raises(DataError, match="not an arrow file"):
            list(read_records(path))


def test_an_index_that_points_elsewhere_is_found(tmp_path):
    path = tmp_path / "a.arrow"
    array = pyarrow.array(["abc", "defgh", "abc"]).dictionary_encode()
    data = stream(path, [pyarrow.RecordBatch.from_arrays([array], ["output"])])
    indices = struct.pack("<3i", 0, 1, 0)
    assert data.count(indices) == 1
    path.write_bytes(data.replace(indices, struct.pack("<3i", 0, 2**30, 0)))
    with pytest.raises(DataError, match="not an arrow file"):
        list(read_records(path))


def test_a_stream_that_was_not_ended_is_no_shorter_data_set(tmp_path):
    path = tmp_path / "a.arrow"
    batch = pyarrow.RecordBatch.from_pylist([{"output": "abc"}])
    data = stream(path, [batch, batch])
    assert len(list(read_records(path))) == 2
    one = stream(path, [batch])[:-8]  # what a writer leaves that is killed between two batches
    assert data.startswith(one)
    for part in (one, data[:-8], data[:-1]):
        path.write_bytes(part)
        with pytest.raises(DataError):
            list(read_records(path))


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_compressed_streams_are_read_up_to_a_size(tmp_path, monkeypatch, compression):
    path = tmp_path / "a.arrow"
    rows = [{"output": "abc" * 100, "x": [1, 2]}] * 10
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    batch = pyarrow.RecordBatch.from_pylist(rows)
    packed = pyarrow.array(["abc" * 1000] * 10).dictionary_encode()
    for changed in (batch, batch.set_column(0, "output", packed)):
        monkeypatch.undo()
        stream(path, [changed], options=options)
        assert [record.value for record in read_records(path)] == changed.to_pylist()
        monkeypatch.setattr(tables, "_UNPACKED", 2900)
        with pytest.raises(DataError, match=r"says that it unpacks to 3,\d\d\d bytes"):
            list(read_records(path))


GOOD = [{"messages": [{"role": "user", "content": "q"}], "x": number} for number in range(30)]


@settings(max_examples=100)
@given(st.data(), st.sampled_from([None, "zstd"]))
def test_damaged_arrow(tmp_path_factory, data, compression):
    path = tmp_path_factory.getbasetemp() / "damaged.arrow"
    batch = pyarrow.RecordBatch.from_pylist(GOOD)
    content = bytearray(
        stream(path, [batch], options=pyarrow.ipc.IpcWriteOptions(compression=compression))
    )
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        for number, record in enumerate(read_records(path)):
            str(record.broken)
            if number > 1000:  # a length without a buffer
                break
    except DataError as error:
        str(error).encode()
