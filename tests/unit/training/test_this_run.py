"""The record of a run: weights are told from others without reading all of them; evaluations of tasks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_profit.evaluation.after_training import EvalTasks
from megatron_profit.training.checkpoints.keep_options import KeepOptions
from megatron_profit.training.checkpoints.run_record import RunRecord
from megatron_profit.training.plan.this_run import (
    _first_weights,
    _start,
    digest_of_weights,
    evaluation_of_tasks,
)

# Flags that name the first weights.
UNSET = dict.fromkeys(("pretrained_checkpoint", "finetune", "load", "random_init", "lora_adapter"))


def weights(folder: Path, seed: int) -> Path:
    folder.mkdir()
    draw = np.random.default_rng(seed)
    save_file({"w": draw.standard_normal((300, 500))}, folder / "model.safetensors")
    return folder


def test_a_copy_is_the_same_and_other_weights_of_the_same_shape_are_not(tmp_path):
    one, other = weights(tmp_path / "one", 1), weights(tmp_path / "other", 2)
    copy = shutil.copytree(one, tmp_path / "copy")
    os.utime(copy / "model.safetensors", (0, 0))
    assert digest_of_weights(one) == digest_of_weights(copy) != digest_of_weights(other)


def test_every_tensor_counts_for_a_digest(tmp_path):
    """Merged adapters of one projection change one tensor in a hundred, and no size."""
    tensors = {f"{i}": np.full((300, 500), i, np.float32) for i in range(99)} | {"w": np.zeros(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    digests = {digest_of_weights(tmp_path)}
    for name in ("7", "w"):
        save_file({**tensors, name: tensors[name] + 1}, tmp_path / "model.safetensors")
        digests.add(digest_of_weights(tmp_path))
    assert len(digests) == 3


def test_a_run_is_told_from_one_of_another_model_in_a_folder_of_the_same_name(tmp_path):
    """For example `runs/a/hf` and `runs/b/hf`, whose second stages would have one run's folder."""
    for name in ("a", "b", "empty"):
        (tmp_path / name).mkdir()
    one, other = (weights(tmp_path / name / "hf", seed) for seed, name in enumerate("ab"))

    def record(folder: Path, **more: Any) -> RunRecord:
        return RunRecord(**_first_weights(SimpleNamespace(hf_model=folder, values=UNSET | more)))

    (difference,) = record(other).differences(record(one))
    assert (difference.part, difference.setting) == ("base", "digest")
    copy = shutil.copytree(one, tmp_path / "copy")
    assert not record(copy).differences(record(one))
    for unknown in (record(tmp_path / "empty"), record(other, random_init=True)):
        assert not unknown.differences(record(one)), "its weights are not there, or not used"


@pytest.mark.parametrize(
    ("flags", "start"),
    [
        ({}, None),
        ({"random_init": True}, "random weights"),
        ({"load": "a/run"}, None),
        ({"load": "a/run", "finetune": True}, "checkpoint run"),
        ({"lora_adapter": "a/lora"}, "adapters lora"),
        ({"lora_adapter": "a/lora", "random_init": True}, "random weights"),
        ({"lora_adapter": "lora", "pretrained_checkpoint": "b"}, "checkpoint b, adapters lora"),
    ],
)
def test_a_run_tells_its_first_weights(flags, start):
    assert _start(UNSET | flags) == start


def settings_of(keep_best: str, limit: int = 50, flags: str = "") -> SimpleNamespace:
    tasks = EvalTasks("gsm8k,mawps", flags, eval_tasks_interval=10, eval_tasks_limit=limit)
    values = {"eval_flags": flags}
    return SimpleNamespace(
        keep=KeepOptions(keep_last=1, keep_best=keep_best), eval_tasks=tasks, values=values
    )


def test_checkpoints_are_not_compared_by_scores_of_different_evaluations():
    def record(keep_best: str, **changes: Any) -> RunRecord:
        return RunRecord(validation=evaluation_of_tasks(settings_of(keep_best, **changes)))

    few, many = record("mawps"), record("mawps", limit=200)
    (difference,) = many.differences(few)
    assert vars(difference) == {
        "part": "validation",
        "setting": "eval_tasks_limit",
        "saved": 50,
        "now": 200,
    }
    draws = record("mawps", flags="--samples 8  --data 'my data'")
    (difference,) = draws.differences(few)
    assert difference.now == ["--samples", "8", "--data", "my data"]
    spaced = record("mawps", flags="--samples 8 --data 'my data'")
    assert draws.differences(spaced) == ()
    assert many.differences(RunRecord()) == (), "a checkpoint of an earlier version"
    assert record("lm loss").validation == {}, "scores of tasks do not decide"
