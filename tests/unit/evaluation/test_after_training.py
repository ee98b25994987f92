"""The evaluation that a training run makes of its export, and the hint on the metric to keep by."""

import json
import sys
from pathlib import Path

import pytest

from megatron_profit.evaluation.after_training import check_task_files, eval_tasks
from megatron_profit.flags import ArgumentsError
from megatron_profit.training.checkpoints.keep_options import (
    KeepOptions,
    keep_options,
    misleading_metric,
)

VALUES = {"eval_tasks": None, "eval_flags": "", "export_hf": "runs/a/hf"}


def test_the_export_is_evaluated_by_the_command_that_users_have():
    options = eval_tasks(VALUES | {"eval_tasks": "mawps, svamp", "eval_flags": "--data 'my data'"})
    command = options.command(Path("/runs/a/hf"))
    assert command == [
        *(sys.executable, "-m", "megatron_profit", "evaluate", "trained=/runs/a/hf"),
        *("--tasks", "mawps, svamp", "--data", "my data", "--out", "/runs/a/hf-evaluation"),
    ]
    assert eval_tasks(VALUES).eval_tasks is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eval_tasks": "mawps", "export_hf": None}, "the folder of --export-hf, which is missing"),
        ({"eval_flags": "--samples 2"}, "--eval-flags is about --eval-tasks, which is missing"),
        ({"eval_tasks": "mawp"}, "--eval-tasks mawp: there is no task 'mawp'; did you mean mawps"),
        (
            {"eval_tasks": "mawps", "eval_flags": "--samples 2 --temperature 0"},
            "--eval-flags '--samples 2 --temperature 0': 2 samples at temperature 0",
        ),
        ({"eval_tasks": "mawps", "eval_flags": "--sampels 2"}, "unrecognized arguments: --sampels"),
        ({"eval_tasks": "mawps", "eval_flags": "--data 'x"}, "No closing quotation"),
    ],
)
def test_flags_that_cannot_be_used_are_refused_before_the_training(values, message):
    with pytest.raises(ArgumentsError, match=message):
        eval_tasks(VALUES | values)


def test_a_missing_file_is_named_before_the_training(tmp_path):
    values = VALUES | {"eval_tasks": "mawps", "eval_flags": f"--data {tmp_path}"}
    with pytest.raises(ArgumentsError, match=r"needs the file mawps\.jsonl"):
        check_task_files(eval_tasks(values))
    (tmp_path / "mawps.jsonl").write_text(json.dumps({"input": "1 + 1 ?", "target": 2}) + "\n")
    check_task_files(eval_tasks(values))
    check_task_files(eval_tasks(VALUES))


def test_a_task_is_no_metric_of_the_training():
    values = {"keep_last": 1, "keep_best": "gsm8k", "early_stop": None, "export_best": False}
    values |= {"save": "runs/a", "save_retain_interval": None, "export_hf": None}
    with pytest.raises(ArgumentsError, match="--keep-best 'gsm8k' is a task, evaluated after the"):
        keep_options(values)


def test_plain_cross_entropy_is_named_where_it_misleads():
    hint = misleading_metric(KeepOptions(keep_best="lm loss"), "profit")
    assert "--keep-best 'lm loss' with --objective profit" in hint
    assert "--keep-best objective follows what is trained" in hint
    assert misleading_metric(KeepOptions(keep_best="lm loss"), "sft") is None
    assert misleading_metric(KeepOptions(keep_best="objective"), "profit") is None
    assert misleading_metric(KeepOptions(), "profit") is None
