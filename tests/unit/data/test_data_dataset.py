"""From files to rows: counts, truncation, the shift by one, and the order of samples."""

import numpy as np
import pytest
import torch

from megatron_profit.data import (
    ChatRenderer,
    DataError,
    DataReport,
    DataSource,
    Examples,
    SFTDataset,
    build_examples,
)
from megatron_profit.data.chat import conversations as chat
from megatron_profit.data.chat import messages
from megatron_profit.data.store import prepare, tasks


def pair(question, answer):
    return {"instruction": question, "output": answer}


def lengths_of(examples):
    return np.diff(examples.offsets).tolist()


@pytest.fixture
def numbered():
    """numbered(n): n examples of 3 ids, whose first id is the example's number."""

    def make(n):
        ids = np.stack([np.arange(n), np.full(n, 7), np.full(n, 8)], axis=1).astype(np.int32)
        supervised = np.tile(np.array([0, 0, 1], dtype=np.uint8), n)
        return Examples(ids.ravel(), supervised, 3 * np.arange(n + 1, dtype=np.int64))

    return make


def numbers(data, indices):
    return [int(data[index]["tokens"][0]) for index in indices]


def test_examples_are_stored_compactly(renderer, write_lines):
    examples, report = build_examples(
        write_lines([pair("q", "a"), pair("hello", "b")]), renderer, 99
    )
    assert len(examples) == report.read == report.kept == 2
    assert (examples.ids.dtype, examples.supervised.dtype) == (np.int32, np.uint8)
    assert report.total_tokens == len(examples.ids) == sum(lengths_of(examples))
    assert report.supervised_tokens == examples.supervised.sum() == 4
    assert report.longest == max(lengths_of(examples))
    assert np.shares_memory(examples[1][0], examples.ids)
    with pytest.raises(IndexError):
        examples[2]


def test_labels_are_the_next_supervised_tokens(renderer, write_lines):
    turns = [("user", "q"), ("assistant", "It is sunny."), ("user", "and"), ("assistant", "that")]
    messages = [{"role": role, "content": content} for role, content in turns]
    file = write_lines([{"messages": messages}])
    examples, report = build_examples(file, renderer, 64)
    ids, supervised = examples[0]
    row = SFTDataset(examples, 64, 1)[0]
    assert {key: (value.dtype, tuple(value.shape)) for key, value in row.items()} == {
        "tokens": (torch.int64, (64,)),
        "labels": (torch.int64, (64,)),
        "position_ids": (torch.int64, (64,)),
        "example_index": (torch.int64, (64,)),
        "draw_index": (torch.int64, (64,)),
    }
    tokens, labels = row["tokens"].tolist(), row["labels"].tolist()
    for t in range(64):
        assert tokens[t] == (ids[t] if t < len(ids) - 1 else 0)
        trained = t + 1 < len(ids) and supervised[t + 1]
        assert labels[t] == (ids[t + 1] if trained else -100)
    assert sum(label != -100 for label in labels) == report.supervised_tokens


def test_a_record_of_one_id_more_than_the_row_fits_and_longer_ones_are_cut(renderer, write_lines):
    file = write_lines([pair("q", "It is sunny in Paris.")])
    whole, _ = build_examples(file, renderer, 1000)
    length = len(whole.ids)
    for seq_length, truncated in [(length, 0), (length - 1, 0), (length - 2, 1), (length - 3, 1)]:
        examples, report = build_examples(file, renderer, seq_length)
        kept = min(length, seq_length + 1)
        assert report.truncated == truncated
        assert report.longest == length
        assert report.total_tokens == kept
        assert examples.ids.tolist() == whole.ids[:kept].tolist()
        assert report.supervised_tokens == whole.supervised[:kept].sum()
        row = SFTDataset(examples, seq_length, 1)[0]
        assert (row["labels"] != -100).sum() == report.supervised_tokens


def test_pad_that_equals_the_end_leaves_the_end_trained(make_tokenizer, templates, write_lines):
    tokenizer = make_tokenizer(templates.chatml, pad_token="<|im_end|>")
    examples, _ = build_examples(write_lines([pair("q", "a")]), ChatRenderer(tokenizer), 32)
    row = SFTDataset(examples, 32, 1)[0]
    end = tokenizer.eos_token_id
    assert (row["labels"] == end).sum() == 1
    assert row["labels"][row["tokens"] == end].eq(-100).all()


def test_fields_that_nothing_reads_are_counted(renderer, write_lines):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "stamp": 1}]
    records = [{"messages": turns, "id": n, f"own {n}": n} for n in range(30)]
    file = write_lines([*records, {"messages": turns[:1], "id": 30}])
    _, report = build_examples(file, renderer, 64)
    assert report.unread["id"] == report.unread["messages.stamp"] == 30
    assert DataReport.from_json(report.as_json()) == report
    assert "records with them: 'id' 30, 'messages.stamp' 30, 'own 0' 1, " in str(report)
    assert str(report).endswith(", 20 more")


def test_records_without_room_for_the_answer_are_skipped(renderer, write_lines):
    file = write_lines([pair("What is the answer? " * 20, "a"), pair("q", "a")])
    examples, report = build_examples(file, renderer, 16)
    assert (report.read, report.kept, report.truncated) == (2, 1, 0)
    assert report.skipped[prepare.NOTHING_SUPERVISED].places == [f"{file}, line 1"]
    assert len(examples) == 1


def test_broken_records_are_counted_with_their_first_places(renderer, write_lines):
    bad, worse = {"messages": []}, {"messages": [{"role": "critic", "content": "a"}]}
    file = write_lines([pair("q", "a"), *[bad] * 7, worse, {"text": "odd"}])
    _, report = build_examples(file, renderer, 32)
    assert (report.read, report.kept) == (10, 1)
    counts = {reason: skipped.count for reason, skipped in report.skipped.items()}
    assert counts == {chat.NO_ASSISTANT: 7, messages.UNKNOWN_ROLE: 1, chat.UNKNOWN_FORMAT: 1}
    assert report.skipped[chat.NO_ASSISTANT].places == [f"{file}, line {n}" for n in range(2, 9)]
    text = str(report)
    for part in ["10 records read, 1 kept, 9 skipped", "skipped 7", "line 2", "...", "'critic'"]:
        assert part in text


def test_a_file_in_no_known_format_stops(renderer, write_lines):
    good, odd = (
        write_lines([pair("q", "a")], "good.jsonl"),
        write_lines([{"text": "a"}], "odd.jsonl"),
    )
    with pytest.raises(DataError, match=r"odd\.jsonl, line 1: the format is not known.*text"):
        build_examples([good, odd], renderer, 32)


def test_nothing_usable_says_why(renderer, write_lines):
    with pytest.raises(
        DataError, match=r"no record can be used(.|\n)*skipped 3: there is no assist"
    ):
        build_examples(write_lines([{"messages": []}] * 3), renderer, 32)
    good = write_lines([pair("q", "a")], "good.jsonl")
    useless = write_lines([{"messages": []}] * 3, "useless.jsonl")
    with pytest.raises(
        DataError, match=r"no record of .*/useless\.jsonl can be used(.|\n)*3: there"
    ):
        build_examples([good, useless], renderer, 32)
    with pytest.raises(ValueError, match="seq_length must be at least 1, got 0"):
        build_examples(write_lines([pair("q", "a")]), renderer, 0)


def test_progress_is_told_about_every_two_seconds(renderer, write_lines, monkeypatch):
    clock = iter(np.arange(0.0, 100.0, 0.5))
    monkeypatch.setattr(prepare.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(tasks, "CHUNK_RECORDS", 1)
    told = []
    sources = [DataSource(str(write_lines([pair("q", "a")] * 12)))]
    settings, report = prepare.Preparation(32), prepare.DataReport()
    list(prepare.tokenize_records(sources, renderer, settings, report, progress=told.append))
    assert len(told) == 3
    assert "4 records read" in told[0]
    assert "12 records read" in told[-1]


def test_every_epoch_holds_every_example_once_in_another_order(numbered):
    data = SFTDataset(numbered(53), 4, 53 * 3 + 5, seed=3)
    epochs = [numbers(data, range(53 * e, 53 * (e + 1))) for e in range(3)]
    assert all(sorted(epoch) == list(range(53)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len(data) == 164
    drawn = [tuple(int(data[i][key][0]) for key in ("tokens", "draw_index")) for i in range(164)]
    assert drawn == [(record, i // 53 * 53 + record) for i, (record, _) in enumerate(drawn)]


def test_order_is_a_function_of_seed_and_index(numbered):
    straight = SFTDataset(numbered(11), 4, 100, seed=5)
    expected = numbers(straight, range(100))
    resumed = SFTDataset(numbered(11), 4, 100, seed=5)
    assert numbers(resumed, range(70, 100)) == expected[70:]
    assert numbers(resumed, reversed(range(100))) == expected[::-1]
    assert numbers(SFTDataset(numbered(11), 4, 1000, seed=5), range(100)) == expected
    assert numbers(SFTDataset(numbered(11), 4, 100, seed=6), range(100)) != expected


def test_order_stays_the_same_in_every_version(numbered):
    """A resumed run depends on it."""
    orders = SFTDataset(numbered(8), 4, 16, seed=1234)
    assert numbers(orders, range(8)) == [7, 3, 0, 1, 4, 2, 5, 6]
    assert numbers(orders, range(8, 16)) == [0, 5, 6, 4, 2, 1, 7, 3]


def test_without_shuffle_the_order_is_that_of_the_files(numbered):
    data = SFTDataset(numbered(3), 4, 8, shuffle=False)
    assert numbers(data, range(8)) == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_period_is_the_same(numbered, shuffle):
    data = SFTDataset(numbered(3), 4, 15, shuffle=shuffle, period=5)
    rows = [
        [
            (int(data[i]["tokens"][0]), int(data[i]["draw_index"][0]))
            for i in range(start, start + 5)
        ]
        for start in (0, 5, 10)
    ]
    assert rows[0] == rows[1] == rows[2]
    assert sorted(index for _, index in rows[0]) == [-1, -1, 0, 1, 2]
    labelled = [bool((data[i]["labels"] != -100).any()) for i in range(10)]
    assert labelled == [True, True, True, False, False] * 2, "an evaluation counts no example twice"


def test_the_data_set_works_in_a_loader_with_workers(numbered):
    data = SFTDataset(numbered(5), 4, 10)
    batches = list(torch.utils.data.DataLoader(data, batch_size=5, num_workers=1))
    drawn = torch.cat([batch["draw_index"][:, 0] for batch in batches])
    assert sorted(drawn.tolist()) == list(range(10))
    assert batches[0]["tokens"].shape == (5, 4)


def test_arguments_are_checked(numbered):
    with pytest.raises(IndexError):
        SFTDataset(numbered(2), 4, 3)[3]
    with pytest.raises(IndexError):
        SFTDataset(numbered(2), 4, 3)[-1]
    with pytest.raises(ValueError, match="has 3 ids, a row of seq_length 1"):
        SFTDataset(numbered(2), 1, 3)
    with pytest.raises(ValueError, match="no example"):
        SFTDataset(numbered(0), 4, 3)
    for wrong in ({"num_samples": -1}, {"seed": -1}, {"seed": 2**64}, {"period": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SFTDataset(numbered(2), 4, **({"num_samples": 3} | wrong))
