"""Columns, tags and dataset_info.json: other people's names for what a record holds."""

import contextlib
import json

import pyarrow
import pyarrow.parquet
import pytest

from megatron_profit.data import (
    BrokenRecord,
    ColumnMapping,
    DataError,
    RawRecord,
    normalise,
    read_records,
    read_sources,
)
from megatron_profit.data.files.sources import refuse_unused
from megatron_profit.data.files.splits import VALID_SPLITS

# As the official ProFit repository and LLaMA-Factory have them.
ENTRIES = {
    "shadow_2k": {
        "file_name": "Shadow_2k.parquet",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations"},
    },
    "s1k_gptoss20b_low": {
        "file_name": "s1k.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    },
    "s1k_openai": {"file_name": "s1k.json", "formatting": "openai"},
    "openorca": {
        "file_name": "orca.jsonl",
        "columns": {"prompt": "question", "response": "response", "system": "system_prompt"},
    },
    "alpaca_en_demo": {"file_name": "alpaca.json", "file_sha1": "not compared"},
    "alpaca_en": {"hf_hub_url": "llamafactory/alpaca_en"},
    "pairs": {"file_name": "a.json", "ranking": True},
    "pictures": {"file_name": "a.json", "columns": {"images": "images"}},
    "odd_tag": {"file_name": "a.json", "formatting": "sharegpt", "tags": {"role": "x"}},
    "odd_format": {"file_name": "a.json", "formatting": "chatml"},
    "odd_key": {"file_name": "a.json", "folder": "x"},
    "odd_samples": {"file_name": "a.json", "num_samples": "all"},
    "yes_samples": {"file_name": "a.json", "num_samples": True},
    "no_samples": {"file_name": "a.json", "num_samples": 0},
    "odd_column": {"file_name": "a.json", "columns": {"prompt": ["q"], "response": "a"}},
    "odd_tags": {"file_name": "a.json", "formatting": "sharegpt", "tags": {"user_tag": ["u"]}},
    "no_file": {"file_name": ""},
    "nul_in_name": {"file_name": "a\0b.json"},
    "half_a_character": {"file_name": "a\ud800.json"},
    "escapes\x1b[2J\n": {"file_name": "a.json", "\x1b[31m\n": 1},
    "nothing_given": {
        "file_name": "orca.jsonl",
        "folder": None,
        "subset": None,
        "split": "",
        "ranking": None,
        "columns": {"prompt": "question", "query": None, "response": "response", "history": ""},
        "formatting": None,
        "tags": None,
        "num_samples": None,
    },
}


@pytest.fixture
def info(tmp_path):
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"id": "0", "conversations": talk}]),
        tmp_path / "Shadow_2k.parquet",
    )
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "s1k.json").write_text(json.dumps([{"messages": chat}]))
    orca = {"question": "q", "response": "a", "system_prompt": "s", "id": 1}
    (tmp_path / "orca.jsonl").write_text(json.dumps(orca) + "\n")
    alpaca = {"instruction": "q", "input": "", "output": "a", "messages": "not looked at"}
    (tmp_path / "alpaca.json").write_text(json.dumps([alpaca]))
    (tmp_path / "dataset_info.json").write_text(json.dumps(ENTRIES))
    return tmp_path


def test_an_entry_without_a_split_has_the_usual_one(info):
    for split in ("train", ("validation", "test")):
        (source,) = read_sources(["nothing_given"], dataset_info=str(info), split=split)
        assert source.split == split


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("shadow_2k", ["user", "assistant"]),
        ("s1k_gptoss20b_low", ["user", "assistant"]),
        ("s1k_openai", ["user", "assistant"]),
        ("openorca", ["system", "user", "assistant"]),
        ("alpaca_en_demo", ["user", "assistant"]),
        ("nothing_given", ["user", "assistant"]),
    ],
)
def test_entries_of_dataset_info(info, name, roles):
    for path in (info, info / "dataset_info.json"):
        (source,) = read_sources([name], dataset_info=str(path))
        (record,) = read_records(source.path, source.split)
        messages = normalise(record, source.layout).messages
        assert [message["role"] for message in messages] == roles
        assert messages[-1]["content"] == "a"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alpaca_en", "names no file_name"),
        ("pairs", "preference pairs"),
        ("pictures", "images is not supported"),
        ("odd_tag", "tag 'role' is not known"),
        ("odd_format", "'chatml' is not one of"),
        ("odd_key", "folder is not supported"),
        ("odd_samples", "num_samples is 'all', not int"),
        ("yes_samples", "num_samples is True, not int"),
        ("no_samples", "num_samples is 0; it must be at least 1"),
        ("odd_column", r"prompt in columns is \['q'\], not str"),
        ("odd_tags", r"user_tag in tags is \['u'\], not str"),
        ("no_file", "names no file_name"),
        ("nothing", "neither a file nor an entry"),
        ("Shadow_2K", r"neither a file nor an entry.*which has \['shadow_2k', "),
    ],
)
def test_what_cannot_be_honoured_is_refused(info, name, message):
    with pytest.raises(DataError, match=message):
        read_sources([name], dataset_info=str(info))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("nul_in_name", r"a\\x00b\.json: does not exist"),
        ("half_a_character", r"a\\ud800\.json: does not exist"),
    ],
)
def test_names_that_no_file_can_have_are_shown_with_escapes(info, name, shown):
    (source,) = read_sources([name], dataset_info=str(info))
    with pytest.raises(DataError, match=shown):
        source.files()


def test_what_a_terminal_would_obey_is_shown_with_escapes(info):
    with pytest.raises(DataError) as error:
        read_sources(["escapes\x1b[2J\n"], dataset_info=str(info))
    assert r"the entry escapes\x1b[2J\n of dataset_info.json: \x1b[31m\n is not" in str(error.value)
    folder = info / "new\nline\x1b[31m"
    folder.mkdir()
    for file in ("train.jsonl", "test-\x07.jsonl", "odd\r.txt"):
        (folder / file).write_text('{"x": 1}\n')
    (source,) = read_sources([str(folder)])
    (record, *_) = read_records(source.path)
    for text in (source.left_out, str(DataError(record.where))):
        assert text.isprintable()
        assert r"new\nline\x1b[31m" in text


def test_a_broken_dataset_info_is_named(tmp_path):
    for text in ("{", "[]"):
        (tmp_path / "dataset_info.json").write_text(text)
        with pytest.raises(DataError, match=r"dataset_info\.json: "):
            read_sources(["a"], dataset_info=str(tmp_path))


def test_files_and_entries_have_weights(info):
    file = str(info / "alpaca.json")
    sources = read_sources([file, "shadow_2k"], weights=[1, 0.5], dataset_info=str(info))
    assert [source.weight for source in sources] == [1, 0.5]
    assert [source.layout.sharegpt for source in sources] == [False, True]


def test_the_split_of_an_entry_goes_before_that_of_the_flag(info):
    entries = {"asked": {"file_name": "x", "split": "train"}, "open": {"file_name": "x"}}
    (info / "dataset_info.json").write_text(json.dumps(entries))
    names = ["asked", "open", str(info / "alpaca.json")]
    sources = read_sources(names, dataset_info=str(info), split=VALID_SPLITS)
    assert [source.split for source in sources] == ["train", VALID_SPLITS, VALID_SPLITS]
    assert [source.split for source in read_sources(names, dataset_info=str(info))] == ["train"] * 3


def record(**value):
    return RawRecord(value, "test", 1, "line")


def test_columns_name_question_and_answer():
    layout = ColumnMapping.of_columns(["prompt=question", "response=answer", "query=context"])
    talk = normalise(record(question="q", answer="a", context="c", messages=3), layout)
    assert talk.messages == [
        {"role": "user", "content": "q\nc"},
        {"role": "assistant", "content": "a"},
    ]
    assert talk.unread == {"messages"}
    assert normalise(record(question="q", answer="a"), layout).messages[0]["content"] == "q"
    with pytest.raises(BrokenRecord, match="no 'answer'"):
        normalise(record(question="q", context="c"), layout)


@pytest.mark.parametrize(
    ("names", "columns", "message"),
    [
        (
            ["orca.jsonl"],
            [],
            r"--dataset-info .* describes none of the data; name entries of it, of \[",
        ),
        (["orca"], ["prompt=q", "response=a"], "--data-columns applies to none of the data"),
        (["orca", "orca.jsonl"], ["prompt=q", "response=a"], None),
        (["orca"], [], None),
    ],
)
def test_flags_that_apply_to_no_data_are_refused(info, names, columns, message):
    (info / "dataset_info.json").write_text(json.dumps({"orca": ENTRIES["nothing_given"]}))
    refused = pytest.raises(DataError, match=message) if message else contextlib.nullcontext()
    with refused:
        refuse_unused(names, columns, str(info))


def test_tags_rename_fields_and_roles():
    layout = ColumnMapping(
        {"messages": "talk"},
        sharegpt=True,
        tags={"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "it"},
    )
    turns = [{"who": "me", "what": "q"}, {"who": "it", "what": "a", "when": 1}]
    talk = normalise(record(talk=turns, tools=[]), layout)
    assert talk.unread == {"tools", "messages.when"}
    assert talk.messages == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    with pytest.raises(BrokenRecord):
        normalise(record(talk=[{"who": "you", "what": "q"}, 3]), layout)


def test_prompt_and_completion():
    talk = normalise(record(prompt="q", completion="a"))
    assert [message["content"] for message in talk.messages] == ["q", "a"]
    assert talk.untrained == frozenset()
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    talk = normalise(record(prompt=[*turns, turns[0]], completion=[turns[1]]))
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert talk.untrained == {0, 1, 2}, "what leads to the completion is context"


def test_a_completion_of_an_answer_that_the_prompt_begins_is_left_out():
    prompt = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "It is"}]
    with pytest.raises(BrokenRecord, match="write the whole answer"):
        normalise(record(prompt=prompt, completion=[{"role": "assistant", "content": " 2."}]))


def test_a_column_of_the_wrong_type_has_the_users_name():
    layout = ColumnMapping.of_columns(["prompt=question", "response=answer"])
    with pytest.raises(BrokenRecord, match=r"column 'answer' \(for response\) is 42, not str"):
        normalise(record(question="q", answer=42), layout)


@pytest.mark.parametrize("form", [list, json.dumps])
def test_named_columns_may_hold_messages(form):
    layout = ColumnMapping.of_columns(["prompt=input", "response=output"])
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    answer = {"role": "assistant", "content": "a"}
    for output in ("a", form([answer])):
        talk = normalise(record(input=form(turns), output=output), layout)
        assert talk.messages == [*turns, answer]
    with pytest.raises(BrokenRecord, match="write both as lists of messages"):
        normalise(record(input="q", output=json.dumps([answer])), layout)
    with pytest.raises(BrokenRecord, match="neither a text nor a list of messages"):
        normalise(record(input=["q", "r"], output="a"), layout)


def test_a_column_that_is_mapped_twice_is_refused():
    with pytest.raises(DataError, match="maps prompt twice, to 'q' and to 'question'; drop one"):
        ColumnMapping.of_columns(["prompt=q", "response=a", "prompt=question"])


def test_a_path_that_cannot_be_looked_up_is_named(info):
    path = info / ("a" * 300 + ".jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read \(File name too long\); check"):
        list(read_records(path))
    for options in ({"dataset_info": str(info)}, {"dataset_info": str(path)}):
        with pytest.raises(DataError, match=r"a\.jsonl"):
            read_sources([str(path)], **options)
