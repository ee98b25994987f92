"""Which checkpoints are kept, and when a run stops early: flags, and counting."""

from __future__ import annotations

import json
import math

import pytest

from megatron_profit.training.checkpoints import folder as checkpoints
from megatron_profit.training.checkpoints import retention
from megatron_profit.training.checkpoints.folder import (
    MARKER,
    VALIDATION,
    CheckpointError,
    Saved,
    prune,
    write_json,
)
from megatron_profit.training.checkpoints.keep_options import KeepOptions, keep_options
from megatron_profit.training.checkpoints.retention import (
    EarlyStopState,
    _prepare,
)

SETTINGS = {
    "keep_last": None,
    "keep_best": None,
    "early_stop": None,
    "export_best": False,
    "export_hf": None,
    "export_adapter": None,
    "save": "run",
    "save_interval": 20,
    "eval_interval": 10,
    "save_retain_interval": None,
    "valid_data": ["a.jsonl"],
    "valid_split": None,
    "eval_iters": 10,
}


def test_flags_become_options():
    assert keep_options(SETTINGS) == KeepOptions()
    flags = {"keep_last": 2, "keep_best": "lm loss", "early_stop": 3}
    assert keep_options(SETTINGS | flags) == KeepOptions(2, "lm loss", 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"keep_last": 0}, "--keep-last is 0; it must be at least 1"),
        (
            {"keep_last": 2, "save": None},
            "--keep-last 2 removes checkpoints of --save, which is missing",
        ),
        ({"keep_last": 2, "save_retain_interval": 100}, "--save-retain-interval 100 removes"),
        ({"early_stop": 0}, "--early-stop is 0"),
        ({"early_stop": 2}, "--early-stop 2 needs the metric to watch"),
        ({"keep_best": "loss", "keep_last": 1}, "'loss' is not known .* 'lm loss', 'objective'"),
        ({"keep_best": "lm loss"}, "does nothing where all checkpoints are kept"),
        ({"keep_best": "lm loss", "early_stop": 2, "save": None}, "needs checkpoints; give --save"),
        (
            {"keep_best": "lm loss", "keep_last": 1, "valid_data": None},
            "there are none; give --valid",
        ),
        ({"keep_best": "lm loss", "keep_last": 1, "eval_iters": 0}, "there are none; give --valid"),
        (
            {"keep_best": "lm loss", "keep_last": 1, "eval_interval": 15},
            "--save-interval 20 must be a multiple of --eval-interval 15",
        ),
        ({"export_best": True}, "--export-best needs the metric"),
        ({"export_best": True, "keep_best": "lm loss"}, "--export-hf writes, which is missing"),
    ],
)
def test_flags_that_mean_nothing_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        keep_options(SETTINGS | flags)


def test_evaluations_without_a_new_best_are_counted():
    progress = EarlyStopState("lm loss")
    counts = []
    for iteration, loss in enumerate((3.0, 2.0, 2.0, math.nan, 2.5, 1.0), start=1):
        progress = progress.after(iteration, loss)
        counts.append(progress.without_best)
    assert counts == [0, 0, 1, 2, 3, 0]
    assert (progress.best, progress.best_iteration) == (1.0, 6)
    assert progress.after(6, 0.5) is progress, "the same evaluation again"


def test_of_some_metrics_more_is_better():
    progress = EarlyStopState("mean p").after(1, 0.5).after(2, 0.6).after(3, 0.55)
    assert (progress.best_iteration, progress.without_best) == (2, 1)


@pytest.mark.parametrize(
    "progress",
    [
        [],
        {"metric": "lm loss", "best": "low"},
        {"metric": "lm loss", "iteration": "3"},
        {"metric": "lm loss", "without_best": True},
        {"weather": "fine"},
    ],
)
def test_a_damaged_state_of_an_early_stop_is_named(tmp_path, progress):
    file = tmp_path / MARKER
    write_json(file, {"progress": progress})
    with pytest.raises(CheckpointError, match=f"{MARKER} is damaged"):
        retention._saved_progress(file)


def test_the_state_of_an_early_stop_comes_back(tmp_path):
    file = tmp_path / MARKER
    assert retention._saved_progress(file) is None
    progress = EarlyStopState("lm loss").after(1, 2.5).after(2, 3.0)
    write_json(file, {"progress": json.loads(json.dumps(vars(progress)))})
    assert retention._saved_progress(file) == progress


@pytest.fixture
def save(tmp_path):
    """Checkpoints of the iterations 1 to 3, each whole."""
    for iteration in (1, 2, 3):
        folder = tmp_path / f"iter_{iteration:07d}"
        folder.mkdir()
        write_json(folder / MARKER, {})
        write_json(folder / VALIDATION, {"lm loss": float(iteration)})
        for name in (".metadata", "metadata.json"):
            (folder / name).write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("text", ['{"lm loss": ', "[1.0]", "\xff", "[" * 100_000])
def test_nothing_is_removed_while_it_cannot_be_told_which_checkpoint_is_the_best(save, text):
    broken = save / "iter_0000001" / VALIDATION
    broken.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=f"{VALIDATION}: .*; correct it or remove it"):
        list(prune(save, 3, 1, "lm loss", ()))
    assert len(list(save.glob("iter_*"))) == 3
    broken.unlink()
    assert [folder.name for folder in prune(save, 3, 1, "lm loss", ())] == ["iter_0000001"]
    assert math.isnan(Saved(1, save / "iter_0000001").validation("lm loss"))


def test_without_space_a_checkpoint_that_was_to_be_replaced_is_as_it_was(save, monkeypatch):
    def half_written(folder):
        return None if (folder / ".metadata").exists() else "half"

    monkeypatch.setattr(retention, "hold_still", lambda _: None)
    monkeypatch.setattr(checkpoints, "problem_of", half_written)
    place, new = save / "iter_0000003", save / "iter_0000004"
    assert "it takes" in _prepare(place, 2**60)
    assert (place / ".metadata").exists()
    assert sorted(path.name for path in save.iterdir()) == [f"iter_000000{i}" for i in (1, 2, 3)]
    new.mkdir()
    assert _prepare(new, 2**60) is not None
    assert not new.exists(), "an empty folder is no checkpoint"
    assert _prepare(new, 10) is None
