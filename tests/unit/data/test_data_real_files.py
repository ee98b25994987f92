"""Real data, real Qwen3 tokenizer: each record's ids and mask against independent references."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from megatron_profit.data import (
    ChatRenderer,
    ColumnMapping,
    PackingReport,
    SFTDataset,
    SupervisionPolicy,
    build_examples,
    normalise,
    read_records,
)

REPOSITORY = Path(__file__).resolve().parents[3]
# The tokenizer's prompt opens the think block, and a token that begins there ends after it.
THINK, END = "</think>\n\n", "<|im_end|>"


@pytest.fixture(scope="module")
def qwen3_renderer(qwen3):
    return ChatRenderer(qwen3)


def write_as_messages(source, target):
    with target.open("w") as out:
        for line in source.read_text().splitlines():
            row = json.loads(line)
            turns = [("user", row["question"]), ("assistant", row["answer"])]
            messages = [{"role": role, "content": content} for role, content in turns]
            out.write(json.dumps({"messages": messages}) + "\n")


def check_every_record(files, tokenizer, renderer):
    """Ids against apply_chat_template, supervised text against the answer; returns the count."""
    count = 0
    for record in read_records(files):
        conversation = normalise(record)
        rendered = renderer.render(conversation)
        ids = tokenizer.apply_chat_template(conversation.messages, return_dict=False)
        assert rendered.ids.tolist() == ids, record.where
        answer = THINK + conversation.messages[-1]["content"].lstrip("\n") + END
        trained = tokenizer.decode(rendered.ids[rendered.supervised])
        assert trained == unicodedata.normalize("NFC", answer), record.where
        (first, *_), last = rendered.supervised.nonzero()[0], len(rendered.ids) - 1
        assert rendered.supervised[first:last].all()
        assert not rendered.supervised[last]
        count += 1
    return count


@pytest.mark.parametrize(
    ("name", "records"), [("alpaca_en_demo.json", 999), ("s1k_gptoss20b_sharegpt_low.json", 976)]
)
def test_shared_files(shared, qwen3, qwen3_renderer, name, records):
    file = shared / "data" / name
    assert check_every_record(file, qwen3, qwen3_renderer) == records
    examples, report = build_examples(file, qwen3_renderer, 4096)
    assert (len(examples), report.truncated, report.skipped) == (records, 0, {})


@pytest.mark.parametrize(
    ("name", "records"),
    [("gsm8k_test.jsonl", 1319), pytest.param("gsm8k_train.jsonl", 7473, marks=pytest.mark.slow)],
)
def test_gsm8k(shared, tmp_path, qwen3, qwen3_renderer, name, records):
    write_as_messages(shared / "data" / name, tmp_path / name)
    assert check_every_record(tmp_path / name, qwen3, qwen3_renderer) == records


def test_thoughts_and_tools_under_qwen3(qwen3, qwen3_renderer, conversation, supervised_texts):
    """Thoughts before the last question are dropped by the template; those after it are trained."""
    call = {"name": "weather", "arguments": {"city": "Zürich"}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    talk = conversation(
        ("system", "Be brief."),
        ("user", "Hello."),
        ("assistant", "<think>\nA greeting.\n</think>\n\nHi!"),
        ("user", "Weather?"),
        {"role": "assistant", "reasoning_content": "I must look.", "tool_calls": [call]},
        ("tool", "sunny"),
        {"role": "assistant", "reasoning_content": "Now I know.", "content": "Sunny."},
        tools=[tool],
    )
    rendered = qwen3_renderer.render(talk)
    ids = qwen3.apply_chat_template(talk.messages, tools=talk.tools, return_dict=False)
    assert rendered.ids.tolist() == ids
    written = '{"name": "weather", "arguments": {"city": "Zürich"}}'
    assert supervised_texts(qwen3, rendered) == [
        "Hi!<|im_end|>",
        f"I must look.\n</think>\n\n<tool_call>\n{written}\n</tool_call><|im_end|>",
        "Now I know.\n</think>\n\nSunny.<|im_end|>",
    ]


def test_question_and_answer_columns(shared, qwen3_renderer, qwen3):
    layout = ColumnMapping.of_columns(["prompt=question", "response=answer"])
    for record in read_records(shared / "data" / "gsm8k_test.jsonl"):
        conversation = normalise(record, layout)
        assert [m["content"] for m in conversation.messages] == list(record.value.values())
        if record.number % 40 == 1:
            ids = qwen3.apply_chat_template(conversation.messages, return_dict=False)
            assert qwen3_renderer.render(conversation).ids.tolist() == ids


def test_real_rows_are_packed_nearly_full(shared, qwen3_renderer):
    file = shared / "data" / "s1k_gptoss20b_sharegpt_low.json"
    examples, report = build_examples(file, qwen3_renderer, 8192)
    data = SFTDataset(examples, 8192, 10**6, packing=True)
    count = data.order.rows_until(1)
    rows = [data[i] for i in range(count)]
    assert sum(int((row["labels"] != -100).sum()) for row in rows) == report.supervised_tokens
    filled = sum(int((row["example_index"] >= 0).sum()) for row in rows) / (8192 * count)
    assert filled > 0.97
    labels = np.add.reduceat(examples.supervised, examples.offsets[:-1], dtype=np.int64)
    rows = PackingReport.of(data.order, examples.positions, labels, 8192)
    page = (REPOSITORY / "docs" / "training.md").read_text()
    assert f"{rows}\n{rows.of_step(4)}\n" in page


def test_qwen3_drops_earlier_reasoning_and_adds_an_empty_block(
    qwen3, supervised_texts, conversation
):
    thought = {"role": "assistant", "content": "One.", "reasoning_content": "Hm."}
    talk = conversation(("user", "q"), thought, ("user", "q"), ("assistant", "Two."))

    def trained(**choice):
        rendered = ChatRenderer(qwen3, SupervisionPolicy(**choice)).render(talk)
        return supervised_texts(qwen3, rendered)

    assert trained() == ["One." + END, THINK + "Two." + END]
    assert trained(turns="last") == [THINK + "Two." + END]
    assert trained(think=False) == ["One." + END, "Two." + END]
