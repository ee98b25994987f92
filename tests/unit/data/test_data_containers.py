"""Compressed files, folders, data sets of the `datasets` library, and what breaks in them."""

import gzip
import json
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from megatron_profit.data import DataError, DataSource, build_examples, normalise, read_records
from megatron_profit.data.files import records
from megatron_profit.data.files.splits import VALID_SPLITS

ROWS = [{"instruction": f"question {i}", "output": "a"} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("a.jsonl.zst", zstd(LINES)),
        ("a.JSONL.GZ", gzip.compress(LINES, mtime=0)),
        ("a.ndjson", LINES),
        ("a.ndjson.gz", gzip.compress(LINES, mtime=0)),
        ("a.ndjson.zst", zstd(LINES)),
    ],
)
def test_compressed_files(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    found = list(read_records(tmp_path / name))
    assert [record.value for record in found] == ROWS
    assert [record.number for record in found] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gzip.compress(LINES * 999, mtime=0)[:-40]),
        ("a.jsonl.gz", b"not gzip at all"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:20] + b"xxxxxxxxxxxxxxxx"),
        ("a.jsonl.zst", zstd(LINES * 999)[:-9]),
        ("a.jsonl.zst", b"not zstd at all"),
        ("a.parquet.gz", gzip.compress(LINES, mtime=0)),
        ("a.gz", gzip.compress(LINES, mtime=0)),
        ("a.arrow", b"not arrow at all"),
    ],
)
def test_damaged_containers_are_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=name):
        list(read_records(tmp_path / name))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "arrow", "jsonl.gz"])
def test_a_pointer_of_git_lfs_is_no_data(tmp_path, suffix):
    path = tmp_path / f"train.{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 5\n")
    with pytest.raises(DataError, match=r"a pointer of Git LFS .* run `git lfs pull`"):
        list(read_records(path))


def test_a_folder_of_files_is_read_in_the_order_of_names(tmp_path):
    for name, row in zip(("b.jsonl", "a.json", "README.md"), ROWS, strict=True):
        (tmp_path / name).write_text(json.dumps(row))
    assert [record.value for record in read_records(tmp_path)] == [ROWS[1], ROWS[0]]
    (tmp_path / "repository" / "data").mkdir(parents=True)
    with pytest.raises(DataError, match=r"name one of its folders \['data'\]"):
        list(read_records(tmp_path / "repository"))


def test_of_a_folder_with_splits_one_is_read(tmp_path):
    names = (
        "Test.jsonl",
        "gsm8k_train-test.jsonl",
        "train_1.json",
        "valid.jsonl",
        "dev-0.json",
    )
    for number, name in enumerate(names):
        (tmp_path / name).write_text(json.dumps({"prompt": "q", "completion": str(number)}))

    def answers(path, split="train"):
        return [record.value["completion"] for record in read_records(path, split)]

    assert answers(tmp_path) == ["1", "2"]
    assert answers(tmp_path, "validation") == answers(tmp_path, "dev") == ["4", "3"]
    assert answers(tmp_path, "test") == answers(tmp_path / "Test.jsonl") == ["0"]
    assert DataSource(str(tmp_path), split="test").left_out.endswith(
        "only the split test is read, not ['dev-0.json', 'gsm8k_train-test.jsonl', "
        "'train_1.json', 'valid.jsonl']"
    )
    with pytest.raises(
        DataError, match="no split 'other' but test, train, validation; name the files"
    ):
        answers(tmp_path, "other")
    with pytest.raises(DataError, match=r"train_1\.json: holds no splits, so that 'test'"):
        answers(tmp_path / "train_1.json", "test")
    (tmp_path / "trained.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(
        DataError, match=r"\['trained.jsonl'\] lie beside files named after a split"
    ):
        answers(tmp_path)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train1.jsonl", "test1.jsonl"),
        ("training.jsonl", "testing.jsonl"),
        ("training_set.jsonl", "evaluation_set.jsonl"),
        ("2024train.jsonl", "chats.Evaluation.jsonl"),
    ],
)
def test_splits_have_the_names_that_they_have_on_the_hub(tmp_path, train, test):
    for name in (train, test):
        (tmp_path / name).write_text(json.dumps(ROWS[0]))
    assert DataSource(str(tmp_path)).files() == [tmp_path / train]
    assert DataSource(str(tmp_path), split=VALID_SPLITS).files() == [tmp_path / test]


@pytest.mark.parametrize(
    ("names", "twice"),
    [
        (("chats.json", "chats.jsonl"), True),
        (("train.jsonl", "train.jsonl.gz", "test.jsonl"), True),
        (("train.jsonl", "test.json", "test.jsonl"), False),
        (("a.jsonl", "b.json"), False),
    ],
)
def test_one_name_in_two_formats_is_not_read_twice(tmp_path, names, twice):
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    if not twice:
        assert DataSource(str(tmp_path)).files()
        return
    with pytest.raises(DataError, match="have one name, so they may hold the same records"):
        DataSource(str(tmp_path)).files()


def test_a_folder_that_lacks_a_file_is_refused(tmp_path):
    """Half a download, or a link of the hub's cache whose blob is gone, is no smaller data set."""
    for number in (0, 2):
        (tmp_path / f"train-{number:05}-of-00003.jsonl").write_text(json.dumps(ROWS[0]))
    (tmp_path / "test-00000-of-00002.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(
        DataError, match="2 of the 3 pieces of train are here, and train-00001-of-00003 is not"
    ):
        DataSource(str(tmp_path)).files()
    piece = tmp_path / "train-00001-of-00003.jsonl"
    piece.symlink_to("blobs/1")
    with pytest.raises(DataError, match=r"00001-of-00003\.jsonl: is a link that leads nowhere"):
        DataSource(str(tmp_path)).files()
    piece.unlink()
    piece.write_text(json.dumps(ROWS[0]))
    assert len(DataSource(str(tmp_path)).files()) == 3


ULTRACHAT = ("train_sft", "test_sft", "train_gen", "test_gen")


def folder_of_splits(folder, names, saved):
    """Records that name their split, in files as the Hub has them, two a split, or in a `DatasetDict`."""
    if saved:
        splits = {name: datasets.Dataset.from_list([{"split": name}] * 2) for name in names}
        datasets.DatasetDict(splits).save_to_disk(folder)
        return folder
    folder.mkdir()
    for name in names:
        for piece in ("00000-of-00002", "00001-of-00002-a09b74b3ef9c3b56"):
            (folder / f"{name}-{piece}.jsonl").write_text(json.dumps({"split": name}))
    return folder


def split_read(source):
    """The split whose records a source has, by `data_files` and file by file, as the preparation does."""
    found = [record for file in source.files() for record in read_records(file, source.split)]
    assert len(found) == 2
    (name,) = {record.value["split"] for record in found}
    return name


@pytest.mark.parametrize("saved", [False, True])
def test_a_split_is_found_by_its_very_name(tmp_path, saved):
    folder = folder_of_splits(tmp_path / "chat", ULTRACHAT, saved)
    for name in ULTRACHAT:
        source = DataSource(str(folder), split=name)
        assert split_read(source) == name
        assert f"only the split {name} is read, not [" in source.left_out
    for asked in ("train", VALID_SPLITS):
        word = "train" if asked == "train" else "test"
        with pytest.raises(
            DataError,
            match=f"'{word}' may be any of the splits {word}_gen, {word}_sft .*"
            f'dataset_info.json with "split": "{word}_gen"',
        ):
            DataSource(str(folder), split=asked).files()
    with pytest.raises(DataError, match="no split 'train_rl' but test_gen, test_sft, train_gen"):
        DataSource(str(folder), split="train_rl").files()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "not a readable data set"),
        ('{"splits": 3}', "splits is 3, not a list of names"),
        ('{"splits": [1, 2]}', r"splits is \[1, 2\], not a list of names"),
        ('{"splits": ["../train"]}', "not a list of names"),
        ('{"splits": []}', "has no split"),
    ],
)
def test_a_damaged_list_of_splits_is_named(tmp_path, text, said):
    (tmp_path / "dataset_dict.json").write_text(text)
    with pytest.raises(DataError, match=said):
        list(read_records(tmp_path))


@pytest.mark.parametrize("saved", [False, True])
def test_the_very_name_goes_before_a_word_in_it(tmp_path, saved):
    folder = folder_of_splits(tmp_path / "a", ("train", "train_extra", "other"), saved)
    assert split_read(DataSource(str(folder))) == "train"
    folder = folder_of_splits(tmp_path / "b", ("small_train", "test_sft"), saved)
    assert split_read(DataSource(str(folder))) == "small_train", "nothing else can be meant"
    folder = folder_of_splits(tmp_path / "c", ("en", "de"), saved)
    assert split_read(DataSource(str(folder), split="de")) == "de"
    if saved:
        with pytest.raises(DataError, match="no split 'train' but de, en"):
            split_read(DataSource(str(folder)))
    else:
        found = {record.value["split"] for record in read_records(folder)}
        assert found == {"de", "en"}, "no word tells that these are splits"


def test_pieces_of_one_name_without_a_word_are_no_splits(tmp_path):
    folder = folder_of_splits(tmp_path / "a", ("data",), saved=False)
    for split in ("train", VALID_SPLITS, "data"):
        assert split_read(DataSource(str(folder), split=split)) == "data"
    with pytest.raises(DataError, match="holds no splits, so that 'test' is none"):
        DataSource(str(folder), split="test").files()


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("train", "validation", "test"), "validation"),
        (("train", "dev", "test"), "dev"),
        (("train", "valid_sft"), "valid_sft"),
        (("validation", "validation_mismatched"), "validation"),
        (("train", "test"), "test"),
        (("train", "eval"), "eval"),
    ],
)
def test_validation_reads_what_is_for_it(tmp_path, names, expected, saved):
    source = DataSource(str(folder_of_splits(tmp_path / "a", names, saved)), split=VALID_SPLITS)
    assert split_read(source) == expected
    assert f"only the split {expected} is read, not [" in source.left_out


@pytest.mark.parametrize("saved", [False, True])
def test_validation_never_reads_what_is_for_training(tmp_path, saved):
    folder = folder_of_splits(tmp_path / "a", ("train", "other"), saved)
    with pytest.raises(
        DataError,
        match=r"no split 'validation' or 'test' but other, train; name the file .* --valid-split",
    ):
        DataSource(str(folder), split=VALID_SPLITS).files()
    only = folder_of_splits(tmp_path / "b", ("test",), saved)
    assert DataSource(str(only), split=VALID_SPLITS).left_out == f"{only}: the split test is read"


def test_validation_reads_what_shows_no_splits_whole(tmp_path, write_lines):
    (tmp_path / "files").mkdir()
    write_lines(ROWS, "files/a.jsonl")
    write_lines(ROWS, "train.jsonl")
    datasets.Dataset.from_list(ROWS, split="train").save_to_disk(tmp_path / "saved")
    for name in ("files", "train.jsonl", "saved"):
        source = DataSource(str(tmp_path / name), split=VALID_SPLITS)
        (file,) = source.files()
        assert len(list(read_records(file, source.split))) == 3
        assert source.left_out == ""


def test_what_of_a_folder_is_no_data_is_told(tmp_path, write_lines):
    write_lines(ROWS)
    (file,) = tmp_path.glob("*.jsonl")
    for name in (".gitattributes", "README.txt", "card.md", "LICENSE", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    source = DataSource(str(tmp_path))
    assert (source.files(), source.left_out) == ([file], "")
    for number in range(5):
        (tmp_path / f"{number}.tsv").write_text("q\ta")
    (tmp_path / "3.parquet").mkdir()
    assert source.left_out == (
        f"{tmp_path}: folders and files of unknown suffix are not read: "
        "6 ('0.tsv', '1.tsv', '2.tsv', '3.parquet', '3.tsv', ...)"
    )


@pytest.mark.parametrize(
    "text", [json.dumps(ROWS), json.dumps(ROWS, indent=2), "\ufeff[\n{}]", "\n[]"]
)
def test_a_list_that_is_called_lines_is_told(tmp_path, text):
    for name, data in (("a.jsonl", text.encode()), ("a.ndjson.gz", gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(
            DataError, match=r"line \d: begins with '\['.*one JSON list, end its name in \.json in"
        ):
            list(read_records(tmp_path / name))


def test_a_split_of_what_holds_none_is_refused(tmp_path, write_lines):
    (tmp_path / "files").mkdir()
    write_lines(ROWS, "files/a.jsonl")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    datasets.Dataset.from_list(ROWS, split="test").save_to_disk(tmp_path / "tested")
    for path in ("files", "files/a.jsonl", "saved"):
        assert len(list(read_records(tmp_path / path))) == 3
        with pytest.raises(DataError, match="holds no splits, so that 'test' is none"):
            list(read_records(tmp_path / path, "test"))
    assert len(list(read_records(tmp_path / "tested", "test"))) == 3


def test_folders_of_the_datasets_library(tmp_path):
    data = datasets.Dataset.from_list([{**row, "system": None} for row in ROWS])
    data.save_to_disk(tmp_path / "one")
    rows = [{**row, "system": None} for row in ROWS]
    assert [record.value for record in read_records(tmp_path / "one")] == rows
    splits = datasets.DatasetDict({"train": data, "test": data.select([2])})
    splits.save_to_disk(tmp_path / "splits")
    assert len(list(read_records(tmp_path / "splits"))) == 3
    (record,) = read_records(tmp_path / "splits", "test")
    assert (record.value, record.number, record.unit) == (rows[2], 1, "record")
    with pytest.raises(DataError, match="no split 'dev' but test, train; name the folder of one"):
        list(read_records(tmp_path / "splits", "dev"))
    (arrow,) = (tmp_path / "one").glob("*.arrow")
    assert [record.value for record in read_records(arrow)] == rows
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(DataError):
        list(read_records(tmp_path / "one"))


BROKEN_LINES = [
    (b'{"instruction": "q", "output": ', records.NOT_JSON),
    (b'{"instruction": "q\0", "output": "a"}', records.NOT_JSON),
    (b"\0\0\0", records.NOT_JSON),
    (b'{"instruction": "\xff\xfe", "output": "a"}', records.NOT_UTF8),
    ('{"instruction": "ä", "output": "a"}'.encode("latin-1"), records.NOT_UTF8),
    (b"3", records.NOT_AN_OBJECT),
    (b'["q", "a"]', records.NOT_AN_OBJECT),
    (b'"' + b"x" * 10_000_000 + b'"', records.NOT_AN_OBJECT),
    (b"[" * 100_000, records.NOT_JSON),
    (
        b'{"instruction": "q", "output": "a", "x": ' + b"[" * 200 + b"]" * 200 + b"}",
        records.TOO_DEEP,
    ),
    (b'{"instruction": "q", "output": "a", "output": "b"}', records.NAMED_TWICE),
    (b'{"messages": [{"role": "user", "content": "q", "role": "x"}]}', records.NAMED_TWICE),
    (b'{"instruction": "q", "output": "a", "": 1, "": 2}', records.NAMED_TWICE),
]


def test_broken_lines_are_counted_with_their_numbers(tmp_path, renderer):
    path = tmp_path / "a.jsonl"
    good = json.dumps(ROWS[0]).encode()
    path.write_bytes(b"\n".join([good, *(line for line, _ in BROKEN_LINES), good, b""]))
    examples, report = build_examples(path, renderer, 64)
    assert (report.read, len(examples)) == (len(BROKEN_LINES) + 2, 2)
    for reason in {reason for _, reason in BROKEN_LINES}:
        lines = [i for i, (_, found) in enumerate(BROKEN_LINES, 2) if found == reason]
        assert report.skipped[reason].places == [f"{path}, line {line}" for line in lines]
    assert len(str(report)) < 3000, "a long line is not shown whole"


@pytest.mark.parametrize(
    "line",
    [line for line, why in BROKEN_LINES if why not in (records.NAMED_TWICE, records.TOO_DEEP)],
)
def test_a_file_that_begins_or_ends_broken_is_refused(tmp_path, renderer, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b"\n" + LINES)
    with pytest.raises(DataError, match=r"a\.jsonl, line 1"):
        build_examples(path, renderer, 64)
    path.write_bytes(LINES + line)
    if line.startswith((b"[", b"{", b"\0")) and line != b'["q", "a"]':
        with pytest.raises(DataError, match=r"a\.jsonl, line 4"):
            build_examples(path, renderer, 64)


def test_a_record_of_a_list_that_names_a_field_twice_is_left_out(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(
        '[{"instruction": "q", "output": "a"}, {"instruction": "r", "x": [{"y": 1, "y": 2}]}]'
    )
    good, broken = read_records(path)
    assert (good.broken, good.value) == (None, {"instruction": "q", "output": "a"})
    assert (broken.broken.reason, broken.number) == (records.NAMED_TWICE, 2)
    path.write_text('{"instruction": "q",\n"instruction": "r"}')
    (broken,) = read_records(path)
    assert "'instruction'" in broken.broken.detail


def test_what_is_neither_file_nor_folder_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path / "pipe.jsonl", "/dev/null"):
        with pytest.raises(DataError, match="neither a file nor a folder"):
            list(read_records(path))


@pytest.mark.parametrize("copies", [10_000, pytest.param(800_000, marks=pytest.mark.slow)])
def test_long_strings_are_cut_and_counted(tmp_path, renderer, copies):
    path = tmp_path / "a.jsonl"
    long = {"instruction": "q", "output": "It is sunny. " * copies}
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(long) + "\n")
    examples, report = build_examples(path, renderer, 64)
    assert (report.kept, report.truncated) == (2, 1)
    assert len(examples[1][0]) == 65
    assert report.longest > 2 * copies


def test_a_broken_record_is_broken_when_it_is_normalised(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES + b"3\n")
    *_, last = read_records(path)
    with pytest.raises(records.BrokenRecord, match="int 3"):
        normalise(last)


def test_a_text_that_is_not_utf8_is_one_broken_record(tmp_path):
    texts = pyarrow.array([b"q", b"\xff\xfe", b"r"]).view(pyarrow.string())
    table = pyarrow.table({"instruction": texts, "output": ["a", "b", "c"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    data = datasets.Dataset(table)
    data.save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    for path in (tmp_path / "a.parquet", tmp_path / "saved", arrow):
        found = list(read_records(path))
        assert [record.value.get("output") for record in found] == ["a", None, "c"]
        assert [record.number for record in found] == [1, 2, 3]
        assert found[1].broken.reason == records.ROW_NOT_UTF8
