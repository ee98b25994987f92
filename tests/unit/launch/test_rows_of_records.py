"""The length of rows, where a record is longer than the first ones told."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_profit.launch import prepare
from megatron_profit.launch.records import Lengths, PreparedRows
from megatron_profit.launch.run_folder import RunFolder


@pytest.mark.parametrize(("ids", "positions"), [(2049, 2048), (2050, 4096)])
def test_rows_grow_to_the_positions_of_the_longest_record(monkeypatch, ids, positions):
    """A record of n ids takes n - 1 positions: its last id is a label alone."""
    asked = []

    def prepare_rows(settings, tokenizer, progress):
        asked.append(settings["seq_length"])
        return PreparedRows(1, ids, int(ids > asked[-1] + 1), 9, "")

    def plan_layout(request, wish, machine, may_shorten):
        return SimpleNamespace(seq_length=wish)

    monkeypatch.setattr(prepare, "prepare_rows", prepare_rows)
    monkeypatch.setattr(prepare, "plan_layout", plan_layout)
    monkeypatch.setattr(prepare, "wish_of_flags", lambda given, model, length, rows, exact: length)
    monkeypatch.setattr(prepare, "sample_lengths", lambda *_: Lengths(100.0, 1000))
    monkeypatch.setattr(prepare.DataOptions, "from_flags", lambda settings: None)
    monkeypatch.setattr(RunFolder, "remembered", lambda self, request: {})
    request = SimpleNamespace(given={}, values={}, value=lambda name: True)
    model = SimpleNamespace(positions=40960, architecture={})
    prepare._fit(request, model, {}, Path("tokenizer"), None, RunFolder(Path("run")))
    assert asked == [1024, positions]
