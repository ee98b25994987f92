"""Which checkpoints are kept, and when a run stops early: flags, and counting."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

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
    Retention,
    _prepare,
)
from megatron_profit.training.checkpoints.run_record import RunRecord
from megatron_profit.training.monitoring.run_totals import RunTotals

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


@pytest.fixture
def keeper(save, monkeypatch):
    """keeper(iteration, **options): of the first rank of a run that goes on in `save`."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(retention, "from_first_rank", lambda function: function())
    args = SimpleNamespace(overwrite=False, save=str(save), load=str(save), train_iters=99)
    monkeypatch.setattr(retention, "get_args", lambda: args)

    def make(iteration: int, **options: object) -> Retention:
        made = Retention(KeepOptions(**options), RunRecord(), RunTotals())
        made.before_training(iteration)
        return made

    return make


def written(keeper: Retention, save: Path, iteration: int, loss: float) -> None:
    """Write a checkpoint as Megatron's loop lets the run write it, after the evaluation of its step."""
    folder = save / f"iter_{iteration:07d}"
    keeper.after_evaluation(iteration, {"lm loss": loss})
    folder.mkdir(exist_ok=True)
    keeper.with_checkpoint(folder, iteration)
    for name in (".metadata", "metadata.json"):
        (folder / name).write_bytes(b"")
    keeper.after_checkpoint(iteration)


def iterations(save: Path) -> list[int]:
    return sorted(int(folder.name[5:]) for folder in save.glob("iter_*"))


def test_a_run_that_went_back_forgets_the_checkpoints_after_that_until_it_writes_them_again(
    keeper, save, capsys
):
    (save / "iter_0000003" / VALIDATION).write_text('{"lm loss": 0.5}')
    (save / "iter_0000002" / VALIDATION).unlink()
    flags = {"keep_last": 1, "keep_best": "lm loss"}
    first = keeper(1, **flags)
    told = "that this run does not go on from: 2, 3; until it writes them again, they stay"
    assert told in capsys.readouterr().out
    assert first.best().iteration == 1
    first.after_evaluation(2, {"lm loss": 9.0})
    assert not (save / "iter_0000002" / VALIDATION).exists(), "it is of other weights"
    written(first, save, 4, 0.75)
    assert first.best().iteration == 4
    assert iterations(save) == [1, 2, 3, 4], "1 is the one that the run resumed from"

    again = keeper(4, **flags)
    assert "does not go on from: 2, 3;" in capsys.readouterr().out
    written(again, save, 3, 2.0)
    assert again.best().iteration == 4
    written(again, save, 5, 0.9)
    assert iterations(save) == [2, 4, 5], "3 is the run's own now"


def test_a_run_that_went_back_and_forth_counts_what_led_to_its_checkpoint(keeper, save):
    written(keeper(3, keep_last=9), save, 4, 1.0)
    written(keeper(1, keep_last=9), save, 5, 0.5)
    for resumed, course in ((4, [1, 2, 3, 4]), (5, [1, 5])):
        assert retention._saved_course(save, resumed) == set(course)
    assert keeper(4, keep_last=9, keep_best="lm loss").best().iteration == 1


@pytest.mark.parametrize("course", [{}, [1, "2"], 3])
def test_a_damaged_course_of_a_checkpoint_is_named(save, course):
    write_json(save / "iter_0000003" / MARKER, {"course": course})
    with pytest.raises(CheckpointError, match=f"{MARKER} is damaged: its course is"):
        retention._saved_course(save, 3)


@pytest.mark.parametrize("text", ['{"lm loss": ', "[1.0]", "\xff", "[" * 100_000])
def test_nothing_is_removed_while_it_cannot_be_told_which_checkpoint_is_the_best(save, text):
    broken = save / "iter_0000001" / VALIDATION
    broken.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=f"{VALIDATION}: .*; correct it or remove it"):
        list(prune(save, 3, 1, "lm loss", (), {1, 2, 3}))
    assert len(list(save.glob("iter_*"))) == 3
    broken.unlink()
    assert [folder.name for folder in prune(save, 3, 1, "lm loss", (), {1, 2, 3})] == [
        "iter_0000001"
    ]
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


def test_a_checkpoint_notes_the_job_that_wrote_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "4711")
    Retention(KeepOptions(), RunRecord(), RunTotals()).with_checkpoint(tmp_path, 3)
    assert json.loads((tmp_path / MARKER).read_text())["torchrun_id"] == "4711"
