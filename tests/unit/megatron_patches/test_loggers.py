"""TensorBoard and W&B: they go on where a run was resumed, and end none."""

from __future__ import annotations

import errno
from argparse import Namespace
from types import SimpleNamespace

import pytest
from megatron.training import global_vars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from megatron_profit.megatron_patches import loggers
from megatron_profit.megatron_patches.callbacks import RunFailure


@pytest.fixture
def args(tmp_path) -> Namespace:
    return Namespace(
        tensorboard_dir=str(tmp_path / "curves"),
        tensorboard_queue_size=2,
        rank=0,
        world_size=1,
        wandb_project=None,
        first_step=1,
    )


@pytest.fixture(autouse=True)
def patched(monkeypatch):
    """Megatron's loggers as the patches make them, for one test."""
    for name in ("_set_tensorboard_writer", "_set_wandb_writer"):
        monkeypatch.setattr(global_vars, name, getattr(global_vars, name))
    for name in ("_GLOBAL_TENSORBOARD_WRITER", "_GLOBAL_WANDB_WRITER"):
        monkeypatch.setattr(global_vars, name, None)
    # Files of one second are read in the order of their names, which end in this number of the process.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def writer(args: Namespace, first_step: int = 1):
    global_vars._GLOBAL_TENSORBOARD_WRITER = None
    args.first_step = first_step
    global_vars._set_tensorboard_writer(args)
    return global_vars._GLOBAL_TENSORBOARD_WRITER


def test_steps_that_are_trained_again_are_shown_once(args):
    loggers._write_curves_that_endure()
    for first, last, value in ((1, 8, 1.0), (6, 10, 2.0)):
        curves = writer(args, first)
        for step in range(first, last + 1):
            curves.add_scalar("lm loss", value, step)
        curves.close()
    shown = EventAccumulator(args.tensorboard_dir).Reload().Scalars("train/lm loss")
    assert [event.step for event in shown] == list(range(1, 11))
    assert [event.value for event in shown] == [1.0] * 5 + [2.0] * 5


def test_a_full_disk_ends_the_curves_and_not_the_run(args, capfd, monkeypatch):
    loggers._write_curves_that_endure()
    curves = writer(args)
    curves.add_scalar("lm loss", 1.0, 1)
    curves.flush()
    events = curves.file_writer.event_writer._async_writer

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(events._writer._target, "write", full)
    for step in range(2, 50):
        curves.add_scalar("lm loss", 1.0, step)
    curves.flush()
    curves.close()
    printed = capfd.readouterr()
    assert printed.out.count("cannot be written (OSError 28, No space left on device)") == 1
    assert "Traceback" not in printed.err
    shown = EventAccumulator(args.tensorboard_dir).Reload().Scalars("train/lm loss")
    assert [event.step for event in shown] == [1]


def test_a_folder_that_cannot_be_made_is_told(args, capsys):
    args.tensorboard_dir = "/dev/null/curves"
    loggers._write_curves_that_endure()
    assert writer(args) is None
    assert "--tensorboard-dir /dev/null/curves cannot be written" in capsys.readouterr().out


def test_wandb_is_given_the_values_without_tensorboard_too(args):
    """Megatron logs to it only where there is a TensorBoard writer."""
    args.tensorboard_dir, args.wandb_project = None, "project"
    loggers._write_curves_that_endure()
    nowhere = writer(args)
    assert nowhere
    nowhere.add_scalar("lm loss", 1.0, 1)
    nowhere.flush()
    args.world_size = 2
    assert writer(args) is None, "the last rank logs"


def test_an_error_of_wandb_ends_its_log_and_not_the_run(args, monkeypatch, capsys):
    def log(*_: object) -> None:
        raise ConnectionError("gone")

    def start(_: Namespace) -> None:
        global_vars._GLOBAL_WANDB_WRITER = SimpleNamespace(log=log, run=SimpleNamespace(id="r1"))

    monkeypatch.setattr(global_vars, "_set_wandb_writer", start)
    loggers._log_to_wandb_that_endures()
    global_vars._set_wandb_writer(args)
    wandb = global_vars._GLOBAL_WANDB_WRITER
    assert wandb.run.id == "r1"
    wandb.log({"lm loss": 1.0}, 1)
    wandb.log({"lm loss": 1.0}, 2)
    assert capsys.readouterr().out.count("the log of W&B cannot be written") == 1


def test_wandb_that_cannot_start_is_one_line(args, monkeypatch):
    def start(_: Namespace) -> None:
        raise ValueError("No API key configured.\nlong text")

    monkeypatch.setattr(global_vars, "_set_wandb_writer", start)
    loggers._log_to_wandb_that_endures()
    with pytest.raises(RunFailure, match=r"No API key configured; set WANDB_MODE=offline, or drop"):
        global_vars._set_wandb_writer(args)


@pytest.mark.parametrize(
    ("name", "curve"),
    [
        ("lm loss", "train/lm loss"),
        ("learning-rate", "train/learning-rate"),
        ("lm loss validation", "validation/lm loss"),
        ("lm loss validation ppl", "validation/lm loss ppl"),
        ("kept fraction validation ppl", None),
        ("supervised tokens validation", "validation/supervised tokens"),
        ("supervised tokens", "tokens/supervised tokens"),
        ("tokens per second", "speed/tokens per second"),
        ("seconds per step", "speed/seconds per step"),
        ("peak memory GiB", "speed/peak memory GiB"),
        ("lm loss vs samples", None),
        ("lm loss validation vs samples", None),
        ("iteration-time", None),
    ],
)
def test_curves_are_in_groups_and_none_is_there_twice(name, curve):
    assert loggers.curve_of(name) == curve
