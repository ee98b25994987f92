"""JSON lists that are read item by item: the items and the places of errors are those of the whole text."""

import gzip
import io
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_profit.data import DataError, read_records
from megatron_profit.data.files import json_text

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=8) | st.sampled_from(
    [
        "\u2028",
        "\\",
        '"',
        "]",
        ",",
        "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    ]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3), max_leaves=6
)


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Blocks of which several make an item."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "BLOCK", 5)
        yield


def read(data: bytes):
    """The items of a list, and how many characters each has."""
    decoder = json.JSONDecoder()
    return list(json_text.JsonText(io.BytesIO(data), "a.json").items(decoder.raw_decode))


@given(st.lists(values, max_size=5), st.sampled_from([None, 0, 2]), st.booleans())
@example([123456789012, -1.5e300, "x" * 100, 1], None, True)
@example([1e300, 1.25e-7, {"a": -1e22}], 0, True)
def test_any_list_is_read_as_the_json_library_reads_it(items, indent, ascii_only):
    text = json.dumps(items, indent=indent, ensure_ascii=ascii_only)
    for data in (text.encode(), b"\xef\xbb\xbf \n" + text.encode() + b"\r\n "):
        found = read(data)
        assert [item for item, _ in found] == items
        assert all(size > 0 for _, size in found)


@given(st.lists(values, max_size=4), st.data())
@example([{"a": [1, 2]}, "b"], None)
def test_a_list_that_is_cut_off_anywhere_is_an_error(items, data):
    text = json.dumps(items, ensure_ascii=False).encode()
    for end in range(len(text)) if data is None else [data.draw(st.integers(0, len(text) - 1))]:
        with pytest.raises(DataError):
            read(text[:end])


@pytest.mark.parametrize(
    "text",
    [
        "[1,]",
        "[1 2]",
        "[,1]",
        "[1]]",
        '[{"a": 1}, {"b" 2}]',
        '[\n  "one",\n  "two,\n  3]',
        "[\n\n  tru]",
        "[" + "1,\n" * 40 + "x]",
        '[{"a":\n\n\n [1, 2, }]',
        "[1] 2",
    ],
)
def test_an_error_is_at_the_place_that_the_json_library_names(text):
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(DataError) as found:
        read(text.encode())
    place = f"a.json, line {expected.value.lineno}, column {expected.value.colno}:"
    assert str(found.value).startswith(place)


def test_text_that_is_not_utf8_is_named_with_its_place():
    with pytest.raises(DataError, match=r"a\.json: not UTF-8 \(byte 0xff at 14\)"):
        read(b'["abcdefgh",\n"\xff"]')
    with pytest.raises(DataError, match="not UTF-8"):
        read('["é'.encode()[:-1])


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_other_encodings_are_named_with_the_command_that_converts_them(tmp_path, name, encoding):
    path = tmp_path / name
    path.write_bytes('[{"output": "ä"}]'.encode(encoding))
    how = r"iconv -f utf-16 -t utf-8" if encoding == "utf-16" else "JSON"
    with pytest.raises(DataError, match=how):
        list(read_records(path))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_packed_file_under_another_name_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(b'{"output": "a"}'))
    with pytest.raises(DataError, match=r"packed with gzip: end its name in \.gz"):
        list(read_records(path))


def test_numbers_and_nesting_without_end_are_refused():
    for text in ("[" + "9" * 5000 + "]", "[" * 100_000):
        with pytest.raises(DataError, match="JSON that cannot be read"):
            read(text.encode())
