"""What a small or odd file could do: block for ever, fill the memory, end the process."""

import gzip
import json
import os
import socket
import struct
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from megatron_profit.data import DataError, read_records, read_sources
from megatron_profit.data.files import bounded as files
from megatron_profit.data.files import records
from megatron_profit.data.store.prepare import load_tokenizer

LINE = json.dumps({"instruction": "q", "output": "a"}).encode() + b"\n"
TOO_LONG = b'{"instruction": "' + b"x" * files.LARGEST_RECORD + b'", "output": "a"}\n'


def odd(path, kind):
    """Put something at a path that is no regular file."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(str(path))
    return path


@pytest.fixture
def short(tmp_path_factory):
    """A folder whose name is short enough for a socket."""
    return tmp_path_factory.mktemp("s")


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a device", "socket", "link to itself"])
def test_descriptions_of_data_must_be_regular_files(short, kind):
    named = "leads nowhere|symbolic links" if kind == "link to itself" else kind.split()[-1]
    info = odd(short / "info.json", kind)
    if kind != "folder":
        with pytest.raises(DataError, match=rf"--dataset-info .*info\.json: .*{named}"):
            read_sources(["a"], dataset_info=str(info))
    saved = short / "saved"
    saved.mkdir()
    (saved / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (saved / "train").mkdir()
    odd(saved / "train" / "state.json", kind)
    with pytest.raises(DataError, match=r"state\.json: "):
        list(read_records(saved))


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "socket", "link to itself"])
def test_data_must_be_regular_files(short, kind):
    said = (
        "leads nowhere" if "itself" in kind else "neither a file nor a folder.*write them to a file"
    )
    with pytest.raises(DataError, match=said):
        list(read_records(odd(short / "data.jsonl", kind)))
    folder = short / "folder"
    folder.mkdir()
    odd(folder / "a.jsonl", kind)
    said = "leads nowhere" if "itself" in kind else "holds neither data files"
    with pytest.raises(DataError, match=said):
        list(read_records(folder))
    (folder / "a.jsonl").unlink()
    arrow = pyarrow.ipc.new_stream(folder / "data.arrow", pyarrow.schema([("a", pyarrow.int8())]))
    arrow.close()
    saved = folder / "saved"
    saved.mkdir()
    (saved / "state.json").write_text(
        '{"_data_files": [{"filename": "a.arrow"}], "_split": "train"}'
    )
    odd(saved / "a.arrow", kind)
    with pytest.raises(DataError, match=r"a\.arrow|cannot be read"):
        list(read_records(saved))


@pytest.mark.parametrize("name", ["-", "/dev/stdin", "/dev/fd/0"])
def test_standard_input_is_refused_with_what_to_do(name):
    with pytest.raises(
        DataError, match=r"write them to a file, e\.g\. zcat chats\.gz > chats\.jsonl"
    ):
        list(read_records(name))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("kind", ["pipe", "link to a device"])
def test_files_of_a_tokenizer_must_be_regular(small_tokenizer, tmp_path, name, kind):
    small_tokenizer.save_pretrained(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    odd(tmp_path / name, kind)
    with pytest.raises(DataError, match=rf"{name}: a (pipe|device); a regular file"):
        load_tokenizer(tmp_path)


def test_descriptions_are_read_up_to_a_size(small_tokenizer, tmp_path):
    def grown(path):
        with path.open("ab") as file:
            file.truncate(files.MOST_JSON + 1)

    (tmp_path / "dataset_info.json").write_text("{}")
    grown(tmp_path / "dataset_info.json")
    with pytest.raises(DataError, match="has 100,000,001 bytes"):
        read_sources(["a"], dataset_info=str(tmp_path))
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    grown(tmp_path / "tokenizer" / "tokenizer_config.json")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: has 100,000,001 bytes"):
        load_tokenizer(tmp_path / "tokenizer")


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
def test_a_line_that_is_too_long_is_left_out(tmp_path, renderer, pack):
    path = tmp_path / ("a.jsonl" if pack is bytes else "a.jsonl.gz")
    path.write_bytes(pack(LINE + TOO_LONG + LINE))
    first, broken, last = read_records(path)
    assert (first.number, broken.number, last.number) == (1, 2, 3)
    assert (first.broken, last.broken, last.value["output"]) == (None, None, "a")
    assert broken.broken.reason == records.TOO_LARGE
    path.write_bytes(pack(TOO_LONG + LINE))
    with pytest.raises(DataError, match=r"line 1: longer than 33,554,432 bytes"):
        list(read_records(path))


def test_json_lines_that_do_not_fit_into_memory_may_be_called_json(tmp_path):
    path = tmp_path / "a.json"
    long = TOO_LONG.replace(b"x" * 2**24, b"x")  # half of what a line may have
    path.write_bytes(LINE + long * 3 + LINE)
    found = list(read_records(path))
    assert [(record.number, record.broken) for record in found] == [(n, None) for n in range(1, 6)]
    path.write_bytes(b'{"data": [\n' + LINE.strip() + TOO_LONG)
    with pytest.raises(DataError, match="its first line is no record, and a value of more than"):
        list(read_records(path))


def test_an_item_of_a_list_that_is_too_long_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + LINE + b",\n" + TOO_LONG.strip() + b"]")
    with pytest.raises(DataError, match=r"line 3: .*does not end within 33,554,432 characters"):
        list(read_records(path))


# Read in a process of its own, of which the memory is measured.
MEASURED = """
import resource, sys
from megatron_profit.data import DataError, read_records

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
for path in sys.argv[1:]:
    try:
        found = [record.broken is None for record in read_records(path)]
        print(len(found), sum(found))
    except DataError as error:
        print(error)
print(peak() - before)
"""


def write_bombs(folder):
    """Files of under a megabyte that stand for gigabytes; yield each with a part of the message."""
    line = folder / "line.jsonl.gz"
    with gzip.open(line, "wb", compresslevel=1) as file:
        file.write(LINE + b'{"instruction": "')
        for _ in range(40):
            file.write(b"x" * 2**24)
        file.write(b'"}\n' + LINE)
    yield line, "3 2"
    item = folder / "list.json.zst"
    with pyarrow.output_stream(str(item), compression="zstd") as file:
        file.write(b'["')
        for _ in range(40):
            file.write(b"x" * 2**24)
    yield item, "does not end within"
    rows = 2_000  # that refer to one text of 64 MB
    texts = pyarrow.DictionaryArray.from_arrays([0] * (rows - 1) + [1], ["x" * 2**26, "q"])
    table = pyarrow.table({"instruction": texts, "output": ["a"] * rows})
    pyarrow.parquet.write_table(
        table,
        folder / "dictionary.parquet",
        compression="zstd",
        dictionary_pagesize_limit=2**30,
        store_schema=False,
    )
    yield folder / "dictionary.parquet", f"{rows} 1"
    nulls = pyarrow.nulls(70_000_000, pyarrow.int8())
    table = pyarrow.table({"messages": pyarrow.ListArray.from_arrays([0, len(nulls)], nulls)})
    pyarrow.parquet.write_table(table, folder / "nulls.parquet", compression="zstd")
    yield folder / "nulls.parquet", "has 70,000,000 entries in one row group"
    table = pyarrow.table({"instruction": ["x" * 54_321], "output": ["a"]})
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    packed = folder / "packed.arrow"
    with pyarrow.ipc.new_stream(packed, table.schema, options=options) as file:
        file.write_table(table)
    before, size, compressed = packed.read_bytes().rpartition(struct.pack("<q", 54_321))
    assert size
    packed.write_bytes(before + struct.pack("<q", 2**40) + compressed)
    yield packed, "says that it unpacks to 1,099,511,6"


def test_small_files_that_stand_for_gigabytes_take_little_memory(tmp_path):
    bombs = dict(write_bombs(tmp_path))
    assert all(path.stat().st_size < 5_000_000 for path in bombs)
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, *bombs], capture_output=True, text=True, check=True
    )
    *said, megabytes = result.stdout.splitlines()
    for line, expected in zip(said, bombs.values(), strict=True):
        assert expected in line
    assert int(megabytes) < 700
