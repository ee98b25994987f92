"""The flags that follow from model, data and machine, next to the given ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_profit.launch.derive import Intervals, Model, derived_flags
from megatron_profit.launch.plan_layout import PlannedLayout
from megatron_profit.launch.run_folder import RunFolder
from megatron_profit.objectives import build_objective
from megatron_profit.recipe.flags import words_of
from megatron_profit.recipe.request import read_request

SPLIT = {"micro_batch_size": 1, "global_batch_size": 4, "overlap_grad_reduce": True}
LAYOUT = PlannedLayout({**SPLIT, "overlap_param_gather": True}, 256, 4, 1, 0.0, False, ())


def flags(given: str) -> dict:
    request = read_request(["--model", "m", "--data", "d.jsonl", *given.split()])
    data = {"data": ["d.jsonl"]}
    model = Model(Path("m"), {}, 1)
    intervals = Intervals.of(request, 10, 5)
    found = derived_flags(request, model, data, LAYOUT, RunFolder(Path("runs/x")), intervals)
    return request.table.parse(words_of(found))


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ("", {"prob_threshold": "0.1", "threshold_direction": "higher"}),
        ("--threshold-direction lower", {"prob_threshold": "0.1", "threshold_direction": "lower"}),
        ("--prob-threshold 0.3", {"prob_threshold": "0.3", "threshold_direction": "higher"}),
        (
            "--threshold-quantile 0.2",
            {"threshold_quantile": "0.2", "threshold_direction": "higher"},
        ),
        (
            "--threshold-direction random --keep-fraction 0.7",
            {"threshold_direction": "random", "keep_fraction": 0.7},
        ),
        ("--keep-fraction 0.7", {"threshold_direction": "random", "keep_fraction": 0.7}),
        (
            "--threshold-direction middle --prob-threshold 0.1 0.5",
            {"threshold_direction": "middle", "prob_threshold": ("0.1", "0.5")},
        ),
    ],
)
def test_another_threshold_takes_the_place_of_the_derived_one(given, options):
    found = flags(given)
    names = ("prob_threshold", "threshold_direction", "threshold_quantile", "keep_fraction")
    built = build_objective("profit", **{n: found[n].value for n in names if n in found})
    assert built == build_objective("profit", **options)


def test_another_objective_has_no_options_of_profit():
    found = flags("--objective dft")
    assert found["objective"].value == "dft"
    assert not {"prob_threshold", "threshold_direction"} & found.keys()


def test_a_run_of_wandb_is_named_after_the_folder():
    assert flags("--wandb-project p")["wandb_exp_name"].value == "x"
    assert "wandb_exp_name" not in flags("")


def test_what_is_not_wanted_is_not_derived():
    found = flags("--without=--export-hf --without=--save")
    assert not {"export_hf", "save", "keep_last"} & found.keys()


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ("--save-retain-interval 100", "keep_last"),
        ("--step-batch-size-schedule 0:8", "global_batch_size"),
        ("--save-params-interval 5", "overlap_param_gather"),
        ("--without=--overlap-grad-reduce", "overlap_param_gather"),
    ],
)
def test_what_the_training_refuses_next_to_a_given_flag_is_not_derived(given, refused):
    assert refused in flags("")
    assert refused not in flags(given)


@pytest.mark.parametrize(
    ("given", "load"),
    [
        ("", "runs/x/checkpoints"),
        ("--save other", "other"),
        ("--save other --load third", "third"),
        ("--overwrite", None),
        ("--without=--save", None),
    ],
)
def test_a_run_loads_the_checkpoints_that_it_writes(given, load):
    found = flags(given)
    assert (found["load"].value if "load" in found else None) == load


@pytest.mark.parametrize(
    ("given", "steps", "saved_every", "expected"),
    [
        ("", 103, 103, (20, 103)),
        ("--keep-best objective", 103, 103, (20, 100)),
        ("--keep-best objective", 103, 7, (20, 20)),
        ("--keep-best objective --save-interval 100", 1000, 50, (100, 100)),
        ("--keep-best objective --save-interval 30", 103, 50, (15, 30)),
        ("--save-interval 30", 103, 50, (20, 30)),
        ("--save-retain-interval 100", 103, 67, (20, 50)),
        ("--save-retain-interval 120 --keep-best objective", 103, 67, (20, 60)),
        ("--save-retain-interval 626", 1000, 90, (200, 313)),
        ("--save-retain-interval 1009", 1000, 90, (200, 1009)),
        ("--save-retain-interval 500 --keep-best objective", 1030, 300, (125, 250)),
        ("--eval-tasks-interval 10", 103, 103, (10, 103)),
        ("--eval-tasks-interval 10 --keep-best gsm8k", 103, 37, (10, 30)),
        ("--eval-interval 7 --keep-best objective", 103, 50, (7, 49)),
    ],
)
def test_derived_intervals_divide_as_the_training_wants(given, steps, saved_every, expected):
    request = read_request(["--model", "m", "--data", "d.jsonl", *given.split()])
    found = Intervals.of(request, steps, saved_every)
    assert (found.evaluation, found.save) == expected
