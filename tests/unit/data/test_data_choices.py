"""What is trained of a conversation, and what is drawn of the data: the options, end to end."""

import json
import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_profit.commands.prepare_data import main
from megatron_profit.data import (
    BrokenRecord,
    ChatRenderer,
    DataOptions,
    DataReport,
    DataSource,
    Preparation,
    SupervisionPolicy,
    build_sets,
)
from megatron_profit.data.chat import thoughts
from megatron_profit.data.store.prepare import TOO_LONG

TALK = (
    ("user", "q"),
    {"role": "assistant", "content": "Paris"},
    ("user", "and"),
    {"role": "assistant", "content": "sunny"},
)


@pytest.fixture(scope="module")
def trained(small_tokenizer, conversation, supervised_texts):
    """trained(*turns, tokenizer=small_tokenizer, **options of SupervisionPolicy): texts."""

    def run(*turns, tokenizer=small_tokenizer, **options):
        renderer = ChatRenderer(tokenizer, SupervisionPolicy(**options))
        return supervised_texts(tokenizer, renderer.render(conversation(*turns)))

    return run


def test_all_turns_or_the_last(trained):
    assert trained(*TALK) == ["Paris<|im_end|>", "sunny<|im_end|>"]
    assert trained(*TALK, turns="last") == ["sunny<|im_end|>"]
    assert trained(*TALK, ("user", "bye"), turns="last") == ["sunny<|im_end|>"]
    with pytest.raises(ValueError, match="turns is 'first'"):
        SupervisionPolicy("first")


def test_messages_of_weight_0_are_context(trained):
    def weighted(*weights):
        answers = iter(weights)
        return [
            {**turn, "weight": next(answers)} if isinstance(turn, dict) else turn for turn in TALK
        ]

    assert trained(*weighted(0, 1)) == ["sunny<|im_end|>"]
    assert trained(*weighted(1, 0)) == ["Paris<|im_end|>"]
    assert trained(*weighted(1, 0), turns="last") == []
    assert trained(*weighted(0, 0)) == []
    for weight in (0.5, -1, "yes", [1]):
        with pytest.raises(BrokenRecord):
            trained(*weighted(weight, 1))


@pytest.mark.parametrize(
    ("answer", "without"),
    [
        ("<think>\nLet me think.\n</think>\n\nParis", "Paris<|im_end|>"),
        ("\n<think>\n</think>Paris", "Paris<|im_end|>"),
        (
            "A thought ends in </think>, says Paris",
            "A thought ends in </think>, says Paris<|im_end|>",
        ),
        ("</think> <think>a</think>Paris", "</think> <think>a</think>Paris<|im_end|>"),
        ("Paris", "Paris<|im_end|>"),
        ("Paris <think>no</think> it is", "Paris <think>no</think> it is<|im_end|>"),
        ("<think>\nhm\n</think>\n\n  Paris", "  Paris<|im_end|>"),
    ],
)
def test_thoughts_may_be_left_out(trained, answer, without):
    turns = [("user", "q"), ("assistant", answer)]
    assert trained(*turns) == [answer + "<|im_end|>"]
    assert trained(*turns, think=False) == [without]


def test_thoughts_that_the_header_opens(trained, make_tokenizer, templates):
    turns = [("user", "q"), {"role": "assistant", "content": "Paris", "reasoning_content": "hm"}]
    tokenizer = make_tokenizer(templates.thinking)
    assert trained(*turns, tokenizer=tokenizer, think=False) == ["Paris<|im_end|>"]
    opening = templates.chatml.replace(
        "+ message.content",
        "+ ('<think>' if message.role == 'assistant' else '') + message.content",
    ).replace("assistant\\n' }}", "assistant\\n<think>' }}")
    turns = [("user", "q"), ("assistant", "Let me think.</think>\n\nParis")]
    tokenizer = make_tokenizer(opening)
    assert ChatRenderer(tokenizer).markers.prompt.endswith("<think>")
    assert trained(*turns, tokenizer=tokenizer, think=False) == ["Paris<|im_end|>"]


pieces = st.lists(st.sampled_from(["Paris", " ", "\n", "é", "🌧", "e\u0301", "<think>", "</think>"]))


@settings(max_examples=150)
@given(pieces, pieces, st.booleans(), st.sampled_from(["all", "last"]))
def test_the_mask_agrees_with_the_offsets_of_every_token(
    small_tokenizer, conversation, first, second, think, turns
):
    """The bisection against the definition: a token is trained if it begins inside a span."""
    answers = ["".join(first) + ".", "".join(second) + "."]
    assume(not any(map(thoughts.never_end, answers)))  # such records are left out
    talk = conversation(
        ("user", "q"), ("assistant", answers[0]), ("user", "r"), ("assistant", answers[1])
    )
    renderer = ChatRenderer(small_tokenizer, SupervisionPolicy(turns, think))
    rendered, text = renderer.render(talk), renderer.text(talk)
    offsets = small_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [
        found.span(1)
        for found in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text, re.DOTALL)
    ]
    if turns == "last":
        del spans[0]
    if not think:
        block = re.compile(r"\s*<think>.*?</think>[\r\n]*", re.DOTALL)
        blocks = [block.match(text, *span) for span in spans]
        spans = [
            (found.end() if found else begin, end)
            for found, (begin, end) in zip(blocks, spans, strict=True)
        ]
    expected = [
        any(begin <= first < end and last > begin for begin, end in spans)
        for first, last in offsets["offset_mapping"]
    ]
    assert rendered.supervised.tolist() == expected
    assert renderer.render_all([talk, talk])[1].ids.tolist() == rendered.ids.tolist()


@pytest.fixture
def tool(small_tokenizer, tmp_path, capsys, monkeypatch):
    """tool(*flags): exit code, what prepare_data printed, and its JSON."""
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setenv("MEGATRON_PROFIT_CACHE", str(tmp_path / "cache"))

    def run(*flags, seq_length=64):
        out = tmp_path / "report.json"
        command = ["--hf-model", tmp_path / "tokenizer", "--seq-length", seq_length]
        code = main([str(part) for part in [*command, "--report", out, *flags]])
        printed = capsys.readouterr()
        found = json.loads(out.read_text()) if out.exists() else None
        return code, printed.out + printed.err, found

    return run


def rows(count, name="q"):
    return [
        {"instruction": f"{name} {i}", "output": "It is sunny." * (i % 3 + 1)} for i in range(count)
    ]


def test_the_tool_reports_what_is_in_the_data(tool, write_lines):
    file = write_lines([*rows(50), {"messages": []}])
    code, printed, found = tool("--data", file, "--show", 1)
    assert code == 0
    assert "51 records read, 50 kept, 1 skipped" in printed
    assert "⟦It is sunny.<|im_end|>⟧" in printed
    assert "tokens         50 ####" in printed or "#" * 40 in printed
    records, packed = found["train"]["records"], found["train"]["rows"]
    assert DataReport.from_json(records).kept == sum(records["lengths"]) == 50
    assert packed["examples"] == 50
    assert packed["rows"] < 50
    assert packed["efficiency"] == pytest.approx(packed["tokens"] / packed["rows"] / 64)
    assert "warning" not in printed
    _, printed, alone = tool("--data", file, "--no-packing", seq_length=128)
    assert alone["train"]["rows"]["rows"] == 50
    assert "WARNING: records fill" in printed


def test_long_records_may_be_dropped(tool, write_lines):
    file = write_lines(rows(6))
    _, printed, found = tool("--data", file, "--too-long", "drop", seq_length=20)
    skipped = found["train"]["records"]["skipped"][TOO_LONG]
    assert skipped["count"] == 4
    assert "line 2" in skipped["places"][0]
    assert TOO_LONG in printed
    assert found["train"]["records"]["truncated"] == 0
    _, _, found = tool("--data", file, seq_length=20)
    places = [f"{file}, line {line}" for line in (2, 3, 5, 6)]
    assert found["train"]["records"]["truncated_places"] == places
    assert found["train"]["records"]["truncated"] == 4


def test_all_places_are_in_the_json_and_five_in_the_text(tool, write_lines):
    file = write_lines([*rows(1), *[{"messages": []}] * 30])
    _, printed, found = tool("--data", file)
    (skipped,) = found["train"]["records"]["skipped"].values()
    assert skipped["places"] == [f"{file}, line {line}" for line in range(2, 32)]
    assert "line 6, ...)" in printed
    assert "line 7" not in printed


def test_a_first_record_without_a_value_is_left_out(tool, write_lines):
    records = [{"q": None, "a": "b"}, *[{"q": "c", "a": "d"}] * 2]
    code, _, found = tool(
        "--data", write_lines(records), "--data-columns", "prompt=q", "response=a"
    )
    assert code == 0
    assert found["train"]["records"]["kept"] == 2


def test_validation_on_a_folder_with_splits_does_not_read_the_training_records(
    tool, write_lines, tmp_path
):
    (tmp_path / "data").mkdir()
    write_lines(rows(5), "data/train.jsonl")
    flags = ("--data", tmp_path / "data", "--valid-data", tmp_path / "data")
    code, printed, _ = tool(*flags)
    assert code == 2
    assert "has no split 'validation' or 'test' but train; name the file" in printed
    write_lines(rows(3), "data/test.jsonl")
    code, printed, found = tool(*flags)
    assert code == 0
    assert [found[name]["records"]["read"] for name in ("train", "valid")] == [5, 3]
    assert "only the split test is read, not ['train.jsonl']" in printed


def test_the_first_validation_rows_are_a_sample_of_all(small_tokenizer, tmp_path, write_lines):
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    file = write_lines([{"instruction": "q", "output": "a" * (i % 60 + 1)} for i in range(600)])

    def valid(seed):
        options = DataOptions(
            train=(DataSource(str(file)),),
            valid=(DataSource(str(file)),),
            valid_split=0.0,
            preparation=Preparation(128),
            packing=True,
            seed=seed,
            workers=1,
            cache=tmp_path / "cache",
        )
        found = build_sets(options, tmp_path / "tokenizer")["valid"]
        period = found.packing.rows + 3
        return found.dataset.with_samples(2 * period, period), found.packing.rows

    data, count = valid(seed=1)
    members = [
        sorted(set(data[row]["example_index"].tolist()) - {-1}) for row in range(data.num_samples)
    ]
    assert sorted(index for row in members[:count] for index in row) == list(range(600)), (
        "each record once"
    )
    assert members[count : count + 3] == [[], [], []]
    assert members[count + 3 :] == members[: count + 3], "every evaluation sees the same"
    longest = [max(index % 60 for index in row) for row in members[:count]]
    assert longest != sorted(longest, reverse=True)
    assert abs(np.mean(longest[: count // 3]) - np.mean(longest)) < 10
    other, _ = valid(seed=2)
    assert all((data[row]["tokens"] == other[row]["tokens"]).all() for row in range(count))


def test_weights_and_split_are_drawn(tool, write_lines):
    one, two = write_lines(rows(40), "one.jsonl"), write_lines(rows(30, "other"), "two.jsonl")
    _, _, found = tool("--data", one, two, "--data-weights", 2, 0.5)
    assert found["train"]["rows"]["examples"] == 80 + 15
    _, printed, found = tool("--data", one, two, "--valid-split", 0.1)
    assert found["train"]["rows"]["examples"] == 63
    assert found["valid"]["rows"]["examples"] == 7
    assert "valid data, set aside" in printed
    assert "records" not in found["valid"]
    code, printed, _ = tool("--data", write_lines(rows(1), "single.jsonl"), "--valid-split", 0.5)
    assert code == 2
    assert "leaves none to train on" in printed


def test_the_split_keeps_equal_records_together_and_forgets_the_order(renderer, write_lines):
    from megatron_profit.data.options import _set_aside

    digests = np.random.default_rng(0).integers(0, 2**63, 60).astype(np.uint64)
    twice = np.concatenate([digests, digests[::-1]])
    aside = _set_aside(twice, np.arange(120), 0.2)
    assert (aside[:60] == aside[60:][::-1]).all()
    assert aside.sum() == 24
    only = _set_aside(twice, np.arange(60), 0.2)
    assert (only[:60] == aside[:60]).all()
    assert not only[60:].any()


def test_a_text_that_is_there_too_often_is_not_set_aside(tool, write_lines):
    often = [{"instruction": "often", "output": "It."}] * 40
    for name in ("a", "b", "c"):  # other hashes
        file = write_lines([*rows(160, name), *often])
        _, _, found = tool("--data", file, "--valid-split", 0.05)
        assert found["valid"]["rows"]["examples"] == 10
        assert found["train"]["rows"]["examples"] == 190
    file = write_lines(often + [{"instruction": "rare", "output": "It."}] * 20)
    assert tool("--data", file, "--valid-split", 0.05)[2]["valid"]["rows"]["examples"] == 20


def unpacked(source, cache, valid_split=0.0):
    """Options of one source, a record to a row."""
    return DataOptions(
        train=(source,),
        valid=(),
        valid_split=valid_split,
        preparation=Preparation(128),
        packing=False,
        seed=1,
        workers=1,
        cache=cache,
    )


def test_more_samples_than_there_are_come_again(small_tokenizer, tmp_path, write_lines):
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = unpacked(DataSource(str(write_lines(rows(7))), num_samples=11), tmp_path / "cache")
    order = build_sets(options, tmp_path / "tokenizer")["train"].dataset.order
    times = np.bincount(order.first_epoch()[0], minlength=7)
    assert sorted(times) == [1, 1, 1, 2, 2, 2, 2]


def test_what_is_supervised_is_counted_as_it_is_drawn(tool, write_lines):
    asks = [{"instruction": "sunny " * 30 + str(i), "output": "It."} for i in range(20)]
    answers = [{"instruction": "q", "output": "It is sunny." * 9 + str(i)} for i in range(20)]
    files = [write_lines(records, f"{i}.jsonl") for i, records in enumerate((asks, answers))]
    _, printed, alike = tool("--data", *files, seq_length=256)
    _, _, weighted = tool("--data", *files, "--data-weights", 0.05, 1, seq_length=256)
    assert weighted["train"]["records"] == alike["train"]["records"]
    (few, many) = alike["train"]["records"]["sources"]
    assert (few["read"], few["kept"], many["read"], many["kept"]) == (20, 20, 20, 20)
    total = alike["train"]["records"]["supervised_tokens"]
    assert few["supervised_tokens"] + many["supervised_tokens"] == total
    rows_of = {name: found["train"]["rows"] for name, found in (("all", alike), ("few", weighted))}
    assert rows_of["all"]["supervised"] == total
    drawn = few["supervised_tokens"] / 20 + many["supervised_tokens"]
    assert rows_of["few"]["supervised"] == pytest.approx(drawn)
    assert rows_of["few"]["supervised_share"] > 1.5 * rows_of["all"]["supervised_share"]
    assert f"{files[1]}: 20 read, 20 kept, {many['total_tokens']:,} tokens" in printed


def test_a_split_is_of_the_samples_that_were_asked_for(small_tokenizer, tmp_path, write_lines):
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = DataSource(str(write_lines(rows(50))), num_samples=20)
    options = unpacked(source, tmp_path / "cache", valid_split=0.25)
    sets = build_sets(options, tmp_path / "tokenizer", epochs=1)
    shown = {
        name: {
            int(part.dataset.with_samples(count)[row]["example_index"][0]) for row in range(count)
        }
        for (name, part), count in zip(sets.items(), (15, 5), strict=True)
    }
    assert (len(shown["train"]), len(shown["valid"])) == (15, 5)
    assert not shown["train"] & shown["valid"]
    assert {part.packing.rows for part in sets.values()} == {15, 5}


HOSTILE = "\x1b[2J\nerror: all is well\r\x9b\u202e"


def test_nothing_of_the_data_steers_the_terminal(tool, write_lines):
    record = {"instruction": HOSTILE, "output": f"It{HOSTILE}.\tIs", HOSTILE: 1}
    broken = {"messages": [{"role": HOSTILE, "content": "q"}]}
    file = write_lines([record, broken], f"a{HOSTILE.replace('/', '')}.jsonl")
    code, printed, _ = tool("--data", file, "--show", 1, seq_length=256)
    assert code == 0
    assert set(printed) <= {"\n", "\t"} | {c for c in printed if c.isprintable()}
    assert "It\\x1b[2J\nerror: all is well\\r\\x9b\\u202e.\tIs<|im_end|>⟧" in printed
    lines = [line for line in printed.splitlines() if line.startswith("error:")]
    assert len(lines) == 2, "the texts of the example have lines, the report has none of them"
    for wrong in (
        ["--data", str(file), "--data-columns", "prompt=x", "response=y"],
        ["--data", HOSTILE],
    ):
        code, printed, _ = tool(*wrong)
        assert code == 2
        assert all(c.isprintable() or c == "\n" for c in printed)
        assert "error: all is well" not in printed.splitlines()


def test_a_template_that_fails_does_not_steer_the_terminal(tool, write_lines, tmp_path):
    file = write_lines(rows(1))
    tool("--data", file)
    template = "{{- raise_exception('\x1b[2J\\nerror: all is well') }}"
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(template)
    code, printed, _ = tool("--data", file)
    assert code == 2
    assert printed.endswith("\\x1b[2J\\nerror: all is well); correct the template\n")


def test_special_tokens_may_be_allowed(tool, write_lines):
    file = write_lines([{"instruction": "End </s>?", "output": "It."}, *rows(2)])
    _, printed, found = tool("--data", file)
    assert found["train"]["records"]["kept"] == 2
    assert "skipped 1: a text holds a special token of the tokenizer" in printed
    assert (
        tool("--data", file, "--allow-special-tokens", "</s>")[2]["train"]["records"]["kept"] == 3
    )
    code, printed, _ = tool("--data", file, "--allow-special-tokens", "<s>")
    assert (code, "--allow-special-tokens <s>: no special token" in printed) == (2, True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "none.jsonl"], r"none.jsonl: does not exist"),
        (
            ["--data", "{file}", "--data-columns", "prompt=question", "response=output"],
            "no record has the column question",
        ),
        (
            [
                "--data",
                "{file}",
                "--data-columns",
                *"prompt=instruction response=output query=contxt".split(),
            ],
            "contxt",
        ),
        (["--data", "{file}", "--data-columns", "prompt=instruction"], "named for response"),
        (["--data", "{file}", "--seq-length", "0"], "--seq-length is 0"),
        (["--data", "{file}", "--seed", "-1"], "--seed is -1"),
        (["--data", "{file}", "--show", "-1"], "--show is -1"),
        (["--data", "{file}", "--report", "none/r.json"], "the folder none does not exist"),
        (["--data", "{file}", "--report", "/"], "--report / cannot be written"),
        (["--data", "{file}", "--data-weights", "1e-9"], "would hold no example"),
        (
            ["--data", "{file}", "--data-weights", "1e12"],
            "3000000000000 examples an epoch, more than",
        ),
        (["--data", "{file}", "--data-weights", "1e300"], "examples an epoch, more than"),
        (["--data", "{file}", "--data-workers", "1000000"], "--data-workers is 1000000"),
        (["--data", "{file}", "--hf-model", "none"], "none: no such folder"),
    ],
)
def test_the_tool_names_what_is_wrong(tool, write_lines, flags, message):
    file = write_lines(rows(3))
    code, printed, _ = tool(*[flag.format(file=file) for flag in flags])
    assert code == 2
    assert message in printed
    assert "Traceback" not in printed
