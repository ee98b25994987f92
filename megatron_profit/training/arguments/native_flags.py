"""Checks of native flags: values that Megatron accepts and then fails on, or trains nonsense with.

All checks need the flags alone. So a wrong value is refused in one line, before anything starts.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_profit.flags import ArgumentsError

_AT_LEAST_ONE = (
    *("micro_batch_size", "global_batch_size", "eval_micro_batch_size", "eval_global_batch_size"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size", "make_vocab_size_divisible_by"),
    *("epochs", "train_iters", "train_samples", "save_interval", "eval_interval", "log_interval"),
    *("tensorboard_log_interval", "tensorboard_queue_size", "save_retain_interval"),
    *("lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_iters", "lr_wsd_decay_samples"),
    *("exit_interval", "exit_duration_in_mins", "distributed_timeout_minutes"),
    *("check_weight_hash_across_dp_replicas_interval", "hysteresis", "loss_scale_window"),
)
_NOT_NEGATIVE = (
    *("seed", "eval_iters", "num_workers", "lr_warmup_iters", "lr_warmup_samples"),
    *("lr", "min_lr", "lr_warmup_init", "decoupled_lr", "decoupled_min_lr"),
    *("weight_decay", "start_weight_decay", "end_weight_decay", "clip_grad"),
    *("adam_eps", "sgd_momentum", "initial_loss_scale", "min_loss_scale"),
)
_BELOW_ONE = ("adam_beta1", "adam_beta2", "lr_warmup_fraction")
# numpy takes 32 bits, and Megatron adds some hundreds for each pipeline stage.
_LARGEST_SEED = 2**32 - 1 - 2**20
# Iterations have at most 15 digits (`checkpoint_conversion.torch_dist.folder.is_iteration`).
_ITERATIONS = 10**15
# The package that an optimizer needs and Megatron does not bring.
_EMERGING = "emerging_optimizers"


def check_native_flags(settings: Mapping[str, Any], option: Callable[[str], str]) -> None:
    """Refuse values that cannot be trained with.

    Args:
        settings: All arguments by name.
        option: Gives the flag of an argument. For example, `lr` gives `--lr`.

    Raises:
        ArgumentsError: Names the flag, its value, the limit and what to do.
    """

    def check(names: tuple[str, ...], limit: str, holds: Callable[[float], bool]) -> None:
        for name in names:
            value = settings[name]
            if value is not None and not (abs(value) < math.inf and holds(value)):
                raise ArgumentsError(f"{option(name)} is {value}; it must be {limit}")

    check(_AT_LEAST_ONE, "at least 1", lambda value: value >= 1)
    check(_NOT_NEGATIVE, "a number that is not negative", lambda value: value >= 0)
    check(_BELOW_ONE, "in [0, 1)", lambda value: 0 <= value < 1)
    check(
        ("ckpt_step",), f"at least 1 and below {_ITERATIONS}", lambda value: 0 < value < _ITERATIONS
    )
    check(("seed",), f"at most {_LARGEST_SEED}", lambda value: value <= _LARGEST_SEED)
    _check_schedule(settings)
    _check_optimizer(settings)
    _check_wandb(settings)


def _check_schedule(settings: Mapping[str, Any]) -> None:
    rate = settings["lr"]
    for name, limit in (("min-lr", rate), ("lr-warmup-init", rate)):
        value = settings[name.replace("-", "_")]
        if value is not None and value > limit:
            raise ArgumentsError(f"--{name} {value} is above --lr {limit}; give at most that")
    given = [f"--lr-wsd-decay-{unit}" for unit in ("iters", "samples")]
    if settings["lr_decay_style"] == "WSD" and not any(
        settings[flag[2:].replace("-", "_")] for flag in given
    ):
        raise ArgumentsError(
            "--lr-decay-style WSD decays in the end, and it is not said for how long; give "
            f"{given[bool(settings['train_samples'])]}"
        )


def _check_optimizer(settings: Mapping[str, Any]) -> None:
    optimizer = settings["optimizer"]
    if optimizer == "sgd" and settings["use_distributed_optimizer"]:
        raise ArgumentsError(
            "--use-distributed-optimizer cannot be used with --optimizer sgd; drop it, or use --optimizer "
            "adam"
        )
    if optimizer not in ("adam", "sgd") and importlib.util.find_spec(_EMERGING) is None:
        raise ArgumentsError(
            f"--optimizer {optimizer} needs the package emerging-optimizers, which is not installed; install "
            "it, or use --optimizer adam"
        )
    if settings["bf16"] and settings["fp16"]:
        raise ArgumentsError("--bf16 and --fp16 contradict each other; drop one")


def _check_wandb(settings: Mapping[str, Any]) -> None:
    """Refuse a W&B setup with a missing part."""
    if not settings["wandb_project"]:
        return
    if not settings["wandb_exp_name"]:
        raise ArgumentsError("--wandb-project needs the name of the run; give --wandb-exp-name")
    if not (settings["wandb_save_dir"] or settings["save"]):
        raise ArgumentsError(
            "--wandb-project needs a place for its files; give --wandb-save-dir DIR or --save DIR"
        )
    if importlib.util.find_spec("wandb") is None:
        raise ArgumentsError(
            "--wandb-project needs the package wandb, which is not installed; install it (pip install "
            "wandb), or drop the flag"
        )
