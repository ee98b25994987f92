"""A run that goes on from a checkpoint: when it is refused, and which lines it prints."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_profit.training.checkpoints.choose import Resumed
from megatron_profit.training.checkpoints.folder import MARKER, CheckpointError
from megatron_profit.training.checkpoints.run_record import RunRecord
from megatron_profit.training.plan.compare import (
    check_length,
    check_optimizer_state,
    check_resume,
    schedule_line,
)

RECORD = RunRecord(
    objective={
        "name": "profit",
        "options": {"prob_threshold": [0.1]},
        "normalization": "supervised",
    },
    data={
        "digest": "a1",
        "examples": 600,
        "supervised_tokens": 9000,
        "sources": ["a.jsonl"],
        "seq_length": 64,
        "packing": True,
    },
    validation={"digest": "v1", "examples": 60, "sources": ["v.jsonl"]},
    tokenizer={"digest": "t1"},
    seed={"seed": 1234},
    model={"digest": "m1"},
    base={"path": "a/hf", "digest": "w1"},
    schedule={"lr": 0.001, "min_lr": 0.0},
    length={"train_iters": 10, "epochs": 1},
    batch={"global_batch_size": 4},
    versions={"torch": "2.15.0"},
)
ARGS = {
    **dict(no_load_optim=None, keep_best=None, allow_change=(), train_iters=10, train_samples=None),
    **dict(lr=0.001, min_lr=0.0, lr_decay_style="cosine", lr_warmup_iters=2, lr_decay_iters=None),
    **dict(lr_warmup_fraction=None, use_checkpoint_opt_param_scheduler=False),
    **dict(optimizer="adam", use_distributed_optimizer=False, bf16=False, fp16=False),
    **dict(decoupled_lr=None, dist_ckpt_optim_fully_reshardable=False, global_batch_size=4),
    **dict(tensor_model_parallel_size=1, pipeline_model_parallel_size=1),
}


def changed(**parts: dict) -> RunRecord:
    values = RECORD.to_json()
    return RunRecord.from_json(
        {**values, **{name: {**values[name], **new} for name, new in parts.items()}}
    )


@pytest.fixture
def resume(tmp_path):
    """Compares a run with a checkpoint of `RECORD` at step 6; returns what is told."""

    def run(
        now: RunRecord,
        *,
        rows: int = 24,
        record: object = "record",
        is_finished: bool = False,
        **flags: object,
    ) -> list:
        folder = tmp_path / "iter_0000006"
        folder.mkdir(exist_ok=True)
        content = {"format": 1, "iteration": 6, "run": RECORD.to_json(), "progress": None}
        if record != "record":
            content["run"] = record
        if record is None:
            del content["run"]
        (folder / MARKER).write_text(json.dumps(content))
        told: list[str] = []
        resumed = Resumed(folder, 6, {**ARGS, "consumed_train_samples": rows})
        arguments = Namespace(**{**ARGS, **flags})
        check_resume(*(resumed, now, arguments, lambda epoch: 22 * epoch, told.append), is_finished)
        return told

    return run


def test_the_same_run_goes_on_without_a_word(resume):
    assert resume(RECORD) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"objective": {"name": "sft"}}, "--objective sft (was profit)"),
        (
            {"objective": {"options": {"prob_threshold": [0.2]}}},
            "--prob-threshold 0.2 (was 0.1)",
        ),
        (
            {"data": {"digest": "b2", "examples": 70, "sources": ["b.jsonl"]}},
            "--data has other records (70 examples of b.jsonl; was 600 examples of a.jsonl)",
        ),
        (
            {"data": {"digest": "b2"}},
            "--data has other records (600 examples of a.jsonl, of the same names)",
        ),
        (
            {"data": {"digest": "b2", "seq_length": 32, "packing": False}},
            "--seq-length 32 (was 64), --packing off (was on)",
        ),
        ({"tokenizer": {"digest": "t2"}}, "--hf-model has another tokenizer or chat template"),
        (
            {"base": {"path": "b/hf", "digest": "w2"}},
            "--hf-model has other weights: b/hf (was a/hf)",
        ),
        ({"seed": {"seed": 99}}, "--seed 99 (was 1234)"),
    ],
)
def test_what_makes_another_run_is_refused_unless_it_is_allowed(resume, change, told):
    (part,) = change
    with pytest.raises(CheckpointError) as error:
        resume(changed(**change))
    assert told in str(error.value)
    assert f"--allow-change {part}," in str(error.value)
    (line,) = resume(changed(**change), allow_change=[part])
    assert line.startswith("> other than in ")
    assert told in line


def test_all_that_is_refused_is_named_at_once(resume):
    now = changed(seed={"seed": 99}, tokenizer={"digest": "t2"}, schedule={"lr": 1.0})
    with pytest.raises(CheckpointError, match="--allow-change tokenizer seed, or") as error:
        resume(now)
    assert "--lr" not in str(error.value)


def test_a_name_that_has_not_changed_is_told(resume):
    """And is no error: a run that is restarted by the same command finds its own checkpoint."""
    (line,) = resume(RECORD, allow_change=["data"])
    assert line == "> --allow-change data: it is as it was; the name can be left out"


def test_validation_data_may_change_unless_checkpoints_are_compared_by_them(resume):
    now = changed(validation={"digest": "w", "examples": 5, "sources": ["w.jsonl"]})
    (line,) = resume(now)
    assert "--valid-data has other records (5 examples of w.jsonl; was 60 of" not in line
    assert "--valid-data has other records (5 examples of w.jsonl; was 60 examples" in line
    with pytest.raises(CheckpointError, match="--allow-change validation"):
        resume(now, keep_best="lm loss")


def test_other_questions_are_named_where_checkpoints_are_compared_by_a_task(resume):
    then, now = (
        changed(validation={"eval_tasks_limit": limit, "eval_flags": flags})
        for limit, flags in ((50, []), (200, ["--samples", "8"]))
    )
    told = "--eval-tasks-limit 200 (was 50), --eval-flags --samples 8 (was none)"
    with pytest.raises(CheckpointError) as error:
        resume(now, record=then.to_json(), keep_best="mawps")
    assert f"{told}. Give the old ones, accept the change with --allow-change validation" in str(
        error.value
    )
    (line,) = resume(now, record=then.to_json(), keep_best="mawps", allow_change=["validation"])
    assert line.endswith(told)
    assert resume(now, keep_best="mawps") == [], "a checkpoint of an earlier version"


def test_the_rest_is_one_line_with_old_and_new_values(resume):
    now = changed(model={"digest": "m2"}, versions={"torch": "2.16.0"})
    (line,) = resume(now)
    assert line.endswith(
        "iter_0000006: --hf-model has another config.json; torch 2.16.0 (was 2.15.0)"
    )


def test_another_schedule_is_told_in_words(resume):
    lines = resume(changed(schedule={"lr": 0.0005}), lr=0.0005)
    assert "--lr 0.0005 (was 0.001)" in lines[0]
    assert lines[1] == (
        "> learning rate from step 7 on: cosine from 0.0005 to 0.0 over 10 steps, 2 of warm-up"
    )


def test_another_batch_size_keeps_the_order_of_the_rows(resume):
    lines = resume(changed(batch={"global_batch_size": 8}))
    assert "--global-batch-size 8 (was 4)" in lines[0]
    assert lines[1] == "> the order of the rows stays as it is; the next row is number 24"


def test_rows_that_the_last_batch_of_an_epoch_passed_over_are_told(resume):
    lines = resume(changed(length={"epochs": 2}), rows=24)
    assert lines[-1].startswith("> rows of epoch 2 that are not trained: 2; they had")
    assert not any(
        "that are not trained" in line for line in resume(changed(length={"epochs": 2}), rows=20)
    )


def test_a_checkpoint_of_an_earlier_version_is_loaded_with_a_line(resume):
    (line,) = resume(changed(seed={"seed": 99}), record=None)
    assert "cannot be compared" in line


def test_a_damaged_record_is_named(resume):
    with pytest.raises(CheckpointError, match=f"{MARKER} is damaged: .*list"):
        resume(RECORD, record=[])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"optimizer": "sgd"}, "--optimizer sgd (was adam)"),
        ({"use_distributed_optimizer": True}, "--use-distributed-optimizer on (was off)"),
        ({"bf16": True}, "precision bf16 (was fp32)"),
        ({"decoupled_lr": 1e-4}, "--decoupled-lr on (was off)"),
    ],
)
def test_an_optimizer_that_cannot_take_over_the_state_is_refused(tmp_path, flags, told):
    """Megatron would end with an error from the depths of its checkpoint loader."""
    resumed = Resumed(tmp_path, 6, ARGS)
    with pytest.raises(CheckpointError) as error:
        check_optimizer_state(resumed, Namespace(**{**ARGS, **flags}), print)
    assert told in str(error.value)
    assert "--no-load-optim" in str(error.value)
    check_optimizer_state(resumed, Namespace(**{**ARGS, **flags, "no_load_optim": True}), print)


def test_a_sharded_optimizer_state_fits_its_layout_only(tmp_path):
    saved = {**ARGS, "use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": False}
    now = Namespace(**{**saved, "tensor_model_parallel_size": 2})
    with pytest.raises(CheckpointError, match=r"--tensor-model-parallel-size 2 \(was 1\).*fully"):
        check_optimizer_state(Resumed(tmp_path, 6, saved), now, print)
    saved["dist_ckpt_optim_fully_reshardable"] = True
    check_optimizer_state(Resumed(tmp_path, 6, saved), now, print)


def test_a_sharded_optimizer_state_of_experts_fits_their_layout_only(tmp_path):
    """At EP 2 x ETP 2 and at EP 4 the state of a rank has the same size, and other experts in it."""
    saved = {**ARGS, "use_distributed_optimizer": True, "tensor_model_parallel_size": 2}
    saved |= {"num_experts": 4, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
    told: list[str] = []
    same = Namespace(**{**saved, "expert_tensor_parallel_size": None})
    check_optimizer_state(Resumed(tmp_path, 6, saved), same, told.append)
    now = {**saved, "expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1}
    with pytest.raises(
        CheckpointError, match=r"--expert-model-parallel-size 4 \(was 2\), --expert-t"
    ):
        check_optimizer_state(Resumed(tmp_path, 6, saved), Namespace(**now), told.append)
    without = {**saved, "num_experts": None}
    check_optimizer_state(
        Resumed(tmp_path, 6, without), Namespace(**{**now, "num_experts": None}), told.append
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"transformer_impl": "transformer_engine"},
            "--transformer-impl transformer_engine (was local)",
        ),
        ({"moe_grouped_gemm": True}, "--moe-grouped-gemm on (was off)"),
    ],
)
def test_a_sharded_optimizer_state_fits_the_order_of_the_parameters_only(tmp_path, change, told):
    """Transformer Engine has a layer's norms within its linear layers, and experts as one module."""
    saved = {**ARGS, "use_distributed_optimizer": True, "num_experts": 4}
    saved |= {"transformer_impl": "local", "moe_grouped_gemm": False}
    with pytest.raises(CheckpointError) as error:
        check_optimizer_state(Resumed(tmp_path, 6, saved), Namespace(**{**saved, **change}), print)
    assert told in str(error.value)
    named = {**saved, "dist_ckpt_optim_fully_reshardable": True}
    check_optimizer_state(Resumed(tmp_path, 6, named), Namespace(**{**named, **change}), print)


def test_a_checkpoint_without_optimizer_state_is_told(tmp_path):
    told: list[str] = []
    resumed = Resumed(tmp_path, 6, {**ARGS, "no_save_optim": True})
    check_optimizer_state(resumed, Namespace(**ARGS), told.append)
    assert "--no-save-optim" in told[0]


@pytest.mark.parametrize(
    ("change", "allowed", "told"),
    [
        ({"schedule": {"lr": 0.002}}, [], "--lr 0.002 (was 0.001)"),
        ({"batch": {"global_batch_size": 8}}, [], "--global-batch-size 8 (was 4)"),
        ({"data": {"seq_length": 32}}, ["data"], "--seq-length 32 (was 64)"),
    ],
)
def test_a_run_without_a_step_left_takes_no_other_settings(resume, change, allowed, told):
    assert resume(changed(**change), allow_change=allowed)
    with pytest.raises(CheckpointError) as error:
        resume(changed(**change), allow_change=allowed, is_finished=True)
    message = str(error.value)
    assert message.partition("so no step would be made with other settings: ")[2].startswith(told)
    assert "--run of megatron-profit sft, else --save" in message


def test_a_run_without_a_step_left_ends_again_as_it_is(resume):
    assert resume(RECORD, is_finished=True) == []
    (line,) = resume(changed(versions={"torch": "2.16.0"}), is_finished=True)
    assert "torch 2.16.0 (was 2.15.0)" in line


@pytest.mark.parametrize(
    ("settings", "steps", "asked"),
    [
        ({"epochs": 2}, 10, "--epochs 2 (10 steps)"),
        ({"train_iters": 10}, 10, "--train-iters 10"),
        ({"train_samples": 40}, 10, "--train-samples 40 (10 steps)"),
    ],
)
def test_a_run_that_has_made_its_steps_is_told_so_and_one_that_has_made_more_is_refused(
    tmp_path, settings, steps, asked
):
    none = {"epochs": None, "train_iters": None, "train_samples": None}
    arguments = SimpleNamespace(steps=steps, values={**none, **settings})
    told: list[str] = []
    check_length(Resumed(tmp_path, 9, {}), arguments, told.append)
    assert told == []
    check_length(Resumed(tmp_path, 10, {}), arguments, told.append)
    assert "there is nothing left to train" in told[0]
    assert asked in told[0]
    with pytest.raises(CheckpointError) as error:
        check_length(Resumed(tmp_path, 11, {}), arguments, told.append)
    assert f"has made 11 steps, more than {asked}" in str(error.value)
    assert "--ckpt-step" in str(error.value)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            {"lr_decay_style": "constant", "lr_warmup_iters": 0},
            "constant at 0.001, 0 of warm-up",
        ),
        (
            {"lr_decay_style": "linear", "lr_warmup_fraction": 0.1, "lr_decay_iters": 50},
            "linear from 0.001 to 0.0 over 50 steps, 5 of warm-up",
        ),
        ({"use_checkpoint_opt_param_scheduler": True}, "follow the checkpoint's schedule"),
        (
            {"global_batch_size": 2, "lr_decay_iters": 16, "lr_warmup_iters": 3},
            "cosine from 0.001 to 0.0 over 32 rows (24 are taken), 6 of warm-up",
        ),
    ],
)
def test_the_schedule_in_words(flags, line):
    resumed = Resumed(Path("iter_0000006"), 6, {"consumed_train_samples": 24})
    told = schedule_line(Namespace(**{**ARGS, **flags}), resumed)
    assert line in told
    assert told.startswith("> learning rate")
