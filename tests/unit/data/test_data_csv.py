"""CSV files: the same records as JSON lines, and what is wrong with one is said."""

from __future__ import annotations

import gzip
import json

import pytest

from megatron_profit.data.chat.conversations import normalise
from megatron_profit.data.errors import BrokenRecord, DataError
from megatron_profit.data.files import bounded, csv_rows
from megatron_profit.data.files.fields import MISSING_FIELD
from megatron_profit.data.files.records import read_records


def values(path):
    return [record.value for record in read_records(path)]


def test_a_csv_file_gives_the_records_of_json_lines(tmp_path):
    rows = [
        {"prompt": 'Say "hi", please', "completion": "hi\nthere"},
        {"prompt": "1 + 1 =", "completion": "2, of course"},
    ]
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = 'prompt,completion\n"Say ""hi"", please","hi\nthere"\n1 + 1 =,"2, of course"\n\n'
    (tmp_path / "a.csv").write_text("\ufeff" + text, encoding="utf-8")
    with gzip.open(tmp_path / "b.csv.gz", "wt") as stream:
        stream.write(text.replace("\n", "\r\n"))
    assert values(tmp_path / "a.csv") == rows == values(lines)
    packed = values(tmp_path / "b.csv.gz")
    assert [row["prompt"] for row in packed] == [row["prompt"] for row in rows]


def test_an_empty_cell_is_null_and_a_short_row_is_left_out(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("instruction,input,output\nAdd.,,2\nAdd.,1\nAdd.,1 + 1,2\n")
    records = list(read_records(file))
    assert records[0].value == {"instruction": "Add.", "input": None, "output": "2"}
    assert records[1].broken is not None
    assert records[1].broken.detail == "2 cells, the header has 3"
    assert records[2].where.endswith("a.csv, record 3")


@pytest.mark.parametrize("row", ["a,", ",b", ","])
def test_an_empty_cell_in_the_first_row_is_no_unknown_format(tmp_path, row):
    (tmp_path / "a.csv").write_text(f"prompt,completion\n{row}\na,b\n")
    first, second = read_records(tmp_path / "a.csv")
    with pytest.raises(BrokenRecord, match=MISSING_FIELD):
        normalise(first)
    assert len(normalise(second).messages) == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds no record"),
        (b"prompt,completion\n", "holds no record"),
        (b"prompt,,completion\na,b,c\n", "must name each column once.*; correct it"),
        (b",prompt,completion\n0,a,b\n", "must name each column once.*in pandas with index=False"),
        (b"prompt,prompt\na,b\n", "must name each column once"),
        (b'prompt,completion\n"a,b\n', "not a CSV file"),
        (b'prompt,completion\n"a"x,b\n', "not a CSV file"),
        (b"prompt,completion\na,\xff\n", "not UTF-8"),
    ],
)
def test_a_file_that_is_no_csv_is_refused(tmp_path, data, message):
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(DataError, match=message):
        values(tmp_path / "a.csv")


def test_plain_text_is_refused_with_what_to_do(tmp_path):
    from megatron_profit.data.chat.conversations import normalise

    (tmp_path / "a.txt").write_text("Once upon a time.\n")
    with pytest.raises(DataError, match="what the model should write as completion"):
        values(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_text('{"text": "Once upon a time."}\n')
    (record,) = read_records(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="what the model should write as completion"):
        normalise(record)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_each_end_of_a_line_ends_a_row_outside_of_quotes_and_stays_inside(tmp_path, end):
    rows = ["prompt,completion", f'"a{end}b",c', 'd,"e,""f"""', f"g,h{end}"]
    (tmp_path / "a.csv").write_bytes(end.join(rows).encode())
    assert values(tmp_path / "a.csv") == [
        {"prompt": f"a{end}b", "completion": "c"},
        {"prompt": "d", "completion": 'e,"f"'},
        {"prompt": "g", "completion": "h"},
    ]


def test_a_file_in_another_encoding_is_named_with_the_line(tmp_path):
    (tmp_path / "a.csv").write_bytes("prompt,completion\na,b\nc,é\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.csv, line 3: not UTF-8"):
        values(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes("prompt,completion\na,b\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"b\.csv, line 1: .*iconv -f utf-16"):
        values(tmp_path / "b.csv")


@pytest.mark.parametrize(
    "row",
    [
        b"a," + b"x" * 5000 + b"\n",
        b'a,"' + b"x\n" * 2500 + b'"\n',
        b"".join(b'"' + b"x" * 900 + b'\n",' for _ in range(5)) + b"b\n",
    ],
)
def test_no_more_of_a_row_is_read_than_a_record_may_have(tmp_path, monkeypatch, row):
    """A small packed file may hold a line of any length."""
    for module in (bounded, csv_rows):
        monkeypatch.setattr(module, "LARGEST_RECORD", 3000)
    monkeypatch.setattr(bounded, "BLOCK", 100)
    longest = []
    read = bounded.bounded_lines_of_any_end
    monkeypatch.setattr(
        csv_rows,
        "bounded_lines_of_any_end",
        lambda file: (longest.append(len(x)) or x for x in read(file)),
    )
    with gzip.open(tmp_path / "a.csv.gz", "wb") as stream:
        stream.write(b"prompt,completion\nq,a\n" + row)
    with pytest.raises(DataError, match=r"line \d+: its row has more than 3,000 bytes; correct"):
        values(tmp_path / "a.csv.gz")
    assert max(longest) <= 3001
    assert sum(longest) <= 2 * 3001
    with gzip.open(tmp_path / "a.csv.gz", "wb") as stream:
        stream.write(b"prompt,completion\n" + b"q,a\n" * 2000)
    assert len(values(tmp_path / "a.csv.gz")) == 2000, "the limit is a row's"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_the_limit_is_a_rows_whatever_ends_it(tmp_path, monkeypatch, end, block):
    for module in (bounded, csv_rows):
        monkeypatch.setattr(module, "LARGEST_RECORD", 50)
    monkeypatch.setattr(bounded, "BLOCK", block)
    cells = [f'"{number}{end}x"' for number in range(20)]
    rows = ["prompt,completion", *(f"{cell},answer" for cell in cells)]
    (tmp_path / "a.csv").write_bytes(end.join(rows).encode())
    expected = [{"prompt": f"{n}{end}x", "completion": "answer"} for n in range(20)]
    assert values(tmp_path / "a.csv") == expected
    (tmp_path / "a.csv").write_bytes(end.join([*rows, "x" * 60, "y"]).encode())
    with pytest.raises(DataError, match=r"line 42: its row has more than 50 bytes"):
        values(tmp_path / "a.csv")


def test_only_the_first_line_loses_a_byte_order_mark(tmp_path):
    text = '\ufeffprompt,completion\n"a\n\ufeffb",\ufeffc\n\ufeffd,e\n'
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    assert values(tmp_path / "a.csv") == [
        {"prompt": "a\n\ufeffb", "completion": "\ufeffc"},
        {"prompt": "\ufeffd", "completion": "e"},
    ]
