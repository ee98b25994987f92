"""Nodes that were started with other flags than the first one."""

from __future__ import annotations

import pytest

from megatron_profit.data.errors import DataError
from megatron_profit.flags import ArgumentsError
from megatron_profit.training.plan import same_flags

FLAGS = {"lr": 1e-5, "data": ["/here/chats.jsonl"], "bf16": True, "log_quantiles": [0.1]}


class Store(dict):
    """As torch's store has its values: as bytes."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self[key]


@pytest.fixture
def check(monkeypatch):
    """Return a check on a second rank, after the first one had FLAGS."""
    store = Store()
    monkeypatch.setattr(same_flags, "shared_store", lambda: store)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    same_flags.check_same_flags(FLAGS, "cuda")
    monkeypatch.setenv("RANK", "1")
    return same_flags.check_same_flags


def test_the_same_flags_and_other_places_are_right(check):
    check({**FLAGS, "data": ["/there/chats.jsonl"]}, "cuda")
    check({**FLAGS, "data": ["chats.jsonl"]}, "cuda")


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({**FLAGS, "lr": 2e-5}, "--lr is 2e-05 on this node and 1e-05 on the first one"),
        ({"lr": 1e-5, "log_quantiles": [0.1]}, "--bf16 is not given on this node and True on"),
        ({**FLAGS, "seq_length": 8}, "--seq-length is 8 on this node and not given on the first"),
        ({**FLAGS, "log_quantiles": [0.2]}, r"--log-quantiles is \[0.2\] on this node"),
    ],
)
def test_other_flags_are_refused(check, others, message):
    with pytest.raises(ArgumentsError, match=message):
        check(others, "cuda")


def test_a_node_without_its_gpus_is_refused(check):
    """--device auto chooses the CPU there, and no flag tells."""
    with pytest.raises(ArgumentsError, match="device is cpu on this node and cuda on the first"):
        check(FLAGS, "cpu")
    with pytest.raises(ArgumentsError, match=r"^--device is 'cpu' on this node and not given on"):
        check({**FLAGS, "device": "cpu"}, "cpu")


def test_nodes_whose_files_hold_other_data_are_refused(check, monkeypatch):
    data = {"--data": ("a1", 600), "--valid-data": ("v1", 60)}
    monkeypatch.setenv("RANK", "0")
    same_flags.check_same_data(data)
    monkeypatch.setenv("RANK", "1")
    same_flags.check_same_data(data)
    with pytest.raises(
        DataError,
        match=r"--data has other tokens on this node .*599 examples\) than on the "
        r"first one \(600 examples\); give all nodes the same files",
    ):
        same_flags.check_same_data({**data, "--data": ("a2", 599)})
    with pytest.raises(DataError, match="--valid-data has other tokens"):
        same_flags.check_same_data({**data, "--valid-data": ("v2", 60)})


def test_one_process_has_nobody_to_compare_with(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(same_flags, "shared_store", None)
    same_flags.check_same_flags(FLAGS, "cuda")
