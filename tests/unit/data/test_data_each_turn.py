"""`--train-on each`: a record gives as many examples as it has answers, which stay together."""

import numpy as np
import pytest

from megatron_profit.data import (
    ChatRenderer,
    DataSource,
    Preparation,
    SupervisionPolicy,
    build_examples,
    build_sets,
)
from megatron_profit.data.options import DataOptions
from megatron_profit.data.render.renderer import ENDS_BEFORE_ANSWER
from megatron_profit.data.store import cache, prepare


def talk(*answers, key=""):
    """A conversation of these answers."""
    turns = [
        turn
        for answer in answers
        for turn in (
            {"role": "user", "content": f"q{key}"},
            {"role": "assistant", "content": answer},
        )
    ]
    return {"messages": turns}


@pytest.fixture(scope="module")
def each(make_tokenizer, templates):
    return ChatRenderer(make_tokenizer(templates.thinking), SupervisionPolicy("each"))


def test_each_answer_is_the_last_one_of_an_example(each, write_lines):
    path = write_lines([talk("one", "two", "three"), talk("four"), {"messages": []}])
    examples, report = build_examples(path, each, 256)
    assert (report.read, report.kept, report.examples, len(examples)) == (3, 2, 4, 4)
    assert report.sources[0].examples == 4
    assert "3 records read, 2 kept as 4 examples, 1 skipped" in str(report)
    tokenizer = each.template.tokenizer
    texts = [tokenizer.decode(ids[supervised.astype(bool)]) for ids, supervised in examples]
    assert texts == [f"\n</think>\n\n{a}<|im_end|>" for a in ("one", "two", "three", "four")]
    starts = [tokenizer.decode(ids).count("<|im_start|>") for ids, _ in examples]
    assert starts == [2, 4, 6, 2]


def test_turns_that_do_not_fit_are_counted(each, write_lines):
    path = write_lines([talk("It is sunny. " * 30, "two"), talk("short")])
    for name, renderer in (("some", each), ("none", ChatRenderer(each.template.tokenizer))):
        _, report = build_examples(path, renderer, 100)
        found = report.found[prepare.TURNS_LEFT_OUT]
        assert (report.kept, report.truncated) == (2, 1)
        assert found.count == (1 if name == "some" else 0)
        if found.count:
            assert (report.examples, found.of, found.places) == (2, 3, [f"{path}, line 1"])
    path = write_lines(
        [{"messages": [{"role": "user", "content": "q " * 400}, *talk("a")["messages"]]}] * 2
        + [talk("b")]
    )
    _, report = build_examples(path, each, 100)
    assert report.skipped[prepare.NOTHING_SUPERVISED].count == 2


def test_a_record_whose_answers_are_all_context_is_left_out(each, write_lines):
    excluded = talk("a")
    excluded["messages"][1]["weight"] = 0
    _, report = build_examples(write_lines([excluded, talk("b")]), each, 100)
    assert list(report.skipped) == [prepare.NOTHING_TRAINED]


@pytest.fixture
def folder(each, tmp_path):
    each.template.tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_answers_of_one_record_are_set_aside_together(folder, tmp_path, write_lines):
    source = DataSource(str(write_lines([talk("a", "b", "c", key=str(i)) for i in range(40)])))
    preparation = Preparation(256, training=SupervisionPolicy("each"))
    options = DataOptions((source,), (), 0.2, preparation, False, 1, 1, tmp_path / "cache")
    sets = build_sets(options, folder, epochs=1)
    lines = {
        name: found.prepared.numbers[found.dataset.order.first_epoch()[0]]
        for name, found in sets.items()
    }
    assert {name: len(numbers) for name, numbers in lines.items()} == {"train": 96, "valid": 24}
    for numbers in lines.values():
        assert set(np.unique(numbers, return_counts=True)[1]) == {3}
    assert not set(lines["train"]) & set(lines["valid"])


def test_the_choice_and_the_allowed_tokens_belong_to_the_key(folder, tmp_path, write_lines):
    sources = [DataSource(str(write_lines([talk("one", "two")])))]
    found = {}
    for name, preparation in (
        ("all", Preparation(64)),
        ("each", Preparation(64, training=SupervisionPolicy("each"))),
        ("allowed", Preparation(64, allowed_tokens=("</s>",))),
    ):
        found[name] = cache.load_or_build(sources, folder, preparation, tmp_path / "cache")
    assert {name: len(data.examples) for name, data in found.items()} == {
        "all": 1,
        "each": 2,
        "allowed": 1,
    }
    assert len(list((tmp_path / "cache").glob(f"*/{cache.ABOUT}"))) == 3
    assert found["each"].digests[0] == found["each"].digests[1]


def test_an_answer_that_another_one_follows_is_counted(each, write_lines):
    twice = talk("one", "two", "three")
    del twice["messages"][2]
    plain = ChatRenderer(each.template.tokenizer)
    for renderer in (plain, each):
        _, report = build_examples(write_lines([twice]), renderer, 256)
        found = report.found[ENDS_BEFORE_ANSWER]
        assert (found.count, found.of) == (1, 3)
