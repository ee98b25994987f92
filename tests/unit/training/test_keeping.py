"""Which checkpoints are kept, and when a run stops early: flags, and counting."""

from __future__ import annotations

import math

import pytest

from megatron_profit.training.keeping import KeepOptions, Progress, keep_options

SETTINGS = {
    "keep_last": None,
    "keep_best": None,
    "early_stop": None,
    "export_best": False,
    "export_hf": None,
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
    progress = Progress("lm loss")
    counts = []
    for iteration, loss in enumerate((3.0, 2.0, 2.0, math.nan, 2.5, 1.0), start=1):
        progress = progress.after(iteration, loss)
        counts.append(progress.without_best)
    assert counts == [0, 0, 1, 2, 3, 0]
    assert (progress.best, progress.best_iteration) == (1.0, 6)
    assert progress.after(6, 0.5) is progress, "the same evaluation again"


def test_of_some_metrics_more_is_better():
    progress = Progress("mean p").after(1, 0.5).after(2, 0.6).after(3, 0.55)
    assert (progress.best_iteration, progress.without_best) == (2, 1)
