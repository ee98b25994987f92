"""Whatever a file holds, preparation ends in examples, a counted skip or a DataError."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_profit.data import ChatRenderer, DataError, build_examples

# Every code point, surrogates and control characters included.
texts = st.text(st.characters(exclude_categories=()), max_size=12) | st.sampled_from(
    [
        *["q", "answer", "<|im_start|>assistant\n", "<|im_end|>", "[]", '{"name": "f"}', "user"],
        *["</think>", "<think>a</think>", "<think>", "null", '{"role": "gpt", "value": "a"}'],
    ]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3), max_leaves=8
)
roles = st.sampled_from(
    ["user", "assistant", "system", "tool", "function_call", "tool_call", "gpt", "human"]
)


def mostly(strategy):
    return st.one_of(strategy, strategy, strategy, values)


calls = st.fixed_dictionaries({"name": texts, "arguments": values})
as_text = values.map(json.dumps)
messages = st.fixed_dictionaries(
    {},
    optional={
        "role": mostly(roles),
        "content": mostly(texts),
        "from": mostly(roles),
        "value": mostly(texts),
        "reasoning_content": mostly(texts),
        "tool_calls": mostly(st.lists(calls, max_size=2)),
        "weight": mostly(st.sampled_from([0, 1])),
        "loss": mostly(st.sampled_from([1, True, "true"])),
        "function_call": mostly(calls),
    },
)
records = st.fixed_dictionaries(
    {},
    optional={
        "messages": mostly(st.lists(mostly(messages) | messages.map(json.dumps), max_size=4)),
        "conversations": mostly(st.lists(mostly(messages), max_size=4)),
        "instruction": mostly(texts),
        "input": mostly(texts),
        "output": mostly(texts),
        "history": mostly(st.lists(st.lists(texts, max_size=3), max_size=3)),
        "system": mostly(texts),
        "tools": mostly(st.lists(values | as_text, max_size=2)),
    },
)
GOOD = {"instruction": "q", "output": "a"}
quick = settings(max_examples=150)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def thinking(make_tokenizer, templates):
    return ChatRenderer(make_tokenizer(templates.thinking))


def prepare(path, renderer):
    """None after a DataError, else the report, whose counts must add up."""
    try:
        examples, report = build_examples(path, renderer, 24)
    except DataError as error:
        str(error).encode()
        return None
    skipped = sum(skipped.count for skipped in report.skipped.values())
    assert report.read == report.kept + skipped
    assert report.kept == len(examples)
    str(report).encode()
    return report


@quick
@given(st.lists(records, max_size=3))
@example([{"messages": [{"role": "assistant", "content": "\ud800"}]}])
def test_broken_records_after_a_good_one_are_skipped(folder, thinking, broken):
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [GOOD, *broken]))
    report = prepare(path, thinking)
    assert report is not None
    assert report.read == 1 + len(broken)


@quick
@given(values)
def test_any_json(folder, thinking, value):
    path = folder / "value.json"
    path.write_text(json.dumps(value))
    prepare(path, thinking)


@quick
@given(st.binary(max_size=60), st.integers(0, 60), st.sampled_from([".json", ".jsonl"]))
def test_any_bytes_within_good_lines(folder, thinking, noise, place, suffix):
    path = folder / f"bytes{suffix}"
    good = (json.dumps(GOOD) + "\n").encode() * 2
    path.write_bytes(good[:place] + noise + good[place:])
    prepare(path, thinking)


@settings(quick, max_examples=60)
@given(st.integers(0, 2000), st.binary(min_size=1, max_size=8))
def test_damaged_parquet(folder, thinking, place, noise):
    path = folder / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD] * 50), path)
    data = path.read_bytes()
    place %= len(data)
    path.write_bytes(data[:place] + noise + data[place + len(noise) :])
    prepare(path, thinking)


def test_deep_nesting(folder, thinking):
    path = folder / "deep.jsonl"
    for depth in (50, 900, 5000):
        deep = "[" * depth + "]" * depth
        call = f'{{"name": "f", "arguments": {{"x": {deep}}}}}'
        odd = f'{{"messages": [{{"role": "assistant", "tool_calls": [{call}]}}]}}'
        tools = f'{{"instruction": "q", "output": "a", "tools": {deep}}}'
        path.write_text("\n".join([json.dumps(GOOD), odd, tools]))
        prepare(path, thinking)
