"""Packing and the order of rows: every example as often as it should be, whatever the lengths."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_profit.data import Examples, Group, SFTDataset
from megatron_profit.data.sequences.order import RowOrder
from megatron_profit.data.sequences.packing import pack

quick = settings(max_examples=100)
capacities = st.integers(1, 40)


@st.composite
def lengths_and_capacity(draw):
    capacity = draw(capacities)
    return draw(st.lists(st.integers(1, capacity), min_size=1, max_size=60)), capacity


def examples_of(lengths, seed=0):
    """Examples that take `lengths` positions, with random ids and masks."""
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths) + 1)])
    ids = random.integers(1, 1000, offsets[-1]).astype(np.int32)
    return Examples(ids, random.integers(0, 2, offsets[-1]).astype(np.uint8), offsets)


def segments(row):
    """(begin, end) of each segment of a row."""
    begins = [*np.flatnonzero(row["position_ids"].numpy() == 0), len(row["tokens"])]
    return list(pairwise(begins))


@quick
@given(lengths_and_capacity())
def test_every_example_in_one_row_and_no_row_too_full(case):
    lengths, capacity = np.asarray(case[0]), case[1]
    rows = pack(lengths, capacity)
    assert sorted(rows.members) == list(range(len(lengths)))
    used = np.add.reduceat(lengths[rows.members], rows.bounds[:-1])
    assert used.max() <= capacity
    assert (np.diff(rows.bounds) > 0).all()
    # Any two rows of a fit-decreasing packing hold more than one row's worth.
    assert len(used) == 1 or sum(sorted(used)[:2]) > capacity


@quick
@given(lengths_and_capacity())
def test_a_row_holds_each_record_whole_and_alone(case):
    lengths, capacity = case
    examples = examples_of(lengths)
    data = SFTDataset(examples, capacity, 10**6, packing=True, seed=3)
    seen = []
    for index in range(data.order.rows_until(1)):
        row = {key: value.numpy() for key, value in data[index].items()}
        for begin, end in segments(data[index]):
            part = {key: value[begin:end] for key, value in row.items()}
            assert part["position_ids"].tolist() == list(range(end - begin))
            record = int(part["example_index"][0])
            assert (part["example_index"] == record).all()
            if record < 0:
                assert end == capacity
                assert (part["labels"] == -100).all()
                assert (part["tokens"] == 0).all()
                assert (part["draw_index"] == -1).all()
                continue
            seen.append(record)
            ids, supervised = examples[record]
            assert part["tokens"].tolist() == ids[:-1].tolist()
            labels = np.where(supervised[1:], ids[1:], -100)
            assert part["labels"].tolist() == labels.tolist()
    assert sorted(seen) == list(range(len(lengths)))


@quick
@given(lengths_and_capacity(), st.integers(0, 2**64 - 1), st.booleans())
def test_every_epoch_holds_each_example_once(case, seed, packing):
    lengths, capacity = np.asarray(case[0]), case[1]
    order = RowOrder(
        lengths, [Group(np.arange(len(lengths)))], capacity=capacity, packing=packing, seed=seed
    )
    for epoch in range(3):
        rows = [order.row(i) for i in range(order.rows_until(epoch), order.rows_until(epoch + 1))]
        examples, samples = (np.concatenate([row[k] for row in rows]) for k in (0, 1))
        assert sorted(examples) == list(range(len(lengths)))
        assert (samples == epoch * len(lengths) + examples).all()


@quick
@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.sampled_from([0.1, 0.29, 0.5, 1, 1.7, 3])),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
)
def test_weights_are_epochs_of_the_file(files, shuffle):
    bounds = np.cumsum([0, *[size for size, _ in files]])
    groups = [Group(np.arange(bounds[i], bounds[i + 1]), w) for i, (_, w) in enumerate(files)]
    if sum(group.drawn(0)[1] for group in groups) < 1:
        return
    order = RowOrder(
        np.ones(bounds[-1], dtype=int), groups, capacity=4, packing=True, shuffle=shuffle
    )
    epochs = 10
    rows = [order.row(i) for i in range(order.rows_until(epochs))]
    examples, samples = (np.concatenate([row[k] for row in rows]) for k in (0, 1))
    assert len(set(samples)) == len(samples)
    times = np.bincount(examples, minlength=bounds[-1])
    for group in groups:
        drawn = times[group.examples]
        assert drawn.sum() == int(round(epochs * group.weight * len(drawn), 6))
        assert drawn.max() - drawn.min() <= 1


def test_any_row_first_gives_the_same_rows():
    examples = examples_of(np.random.default_rng(1).integers(1, 30, 200))

    def dataset(seed=5):
        return SFTDataset(examples, 32, 500, packing=True, seed=seed)

    whole = dataset()
    straight = [whole[i] for i in range(500)]
    resumed = dataset()
    for i in (499, 0, 250, 123, 124):
        assert all((resumed[i][key] == straight[i][key]).all() for key in straight[i])
    other = dataset(seed=6)
    assert any((other[i]["tokens"] != straight[i]["tokens"]).any() for i in range(20))


def test_rows_behind_the_last_epoch_have_no_label():
    examples = examples_of([4, 4, 4])
    data = SFTDataset(examples, 8, 10, packing=True, epochs=2)
    rows = data.order.rows_until(2)
    assert rows == 4
    used = [bool((data[i]["example_index"] >= 0).any()) for i in range(10)]
    assert used == [True] * 4 + [False] * 6
    assert (data[9]["labels"] == -100).all()


def test_packing_is_nearly_full():
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 20_000), 8, 8192).astype(int)
    rows = pack(lengths, 8192)
    assert lengths.sum() / (len(rows) * 8192) > 0.97


def test_packing_arguments_are_checked():
    with pytest.raises(ValueError, match=r"lengths 3\.\.9 do not fit rows of 8"):
        pack(np.array([3, 9]), 8)
    with pytest.raises(ValueError, match="weight of a file must be positive and finite, got 0"):
        Group(np.arange(3), 0)
    with pytest.raises(ValueError, match="so small that an epoch has no example"):
        RowOrder(np.ones(3, dtype=int), [Group(np.arange(3), 0.1)], capacity=4, packing=True)
