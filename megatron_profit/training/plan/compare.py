"""Comparison of a run with the checkpoint that it resumes: which differences are refused, which are printed.

A difference that Megatron cannot load is refused here, before Megatron starts. A difference that makes it
another run is refused unless `--allow-change` names it. For example, `--allow-change data` allows other
training data. All other differences are printed, one line each.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from checkpoint_conversion.errors import printable
from checkpoint_conversion.model_card.facts import RUN
from megatron_profit.flags import flag_of
from megatron_profit.training.arguments.derive import RunSettings
from megatron_profit.training.checkpoints.choose import Resumed
from megatron_profit.training.checkpoints.folder import MARKER, CheckpointError, read_json
from megatron_profit.training.checkpoints.run_record import GUARDED, Difference, RunRecord

# Settings of the data that follow from the records themselves.
_CONTENT = ("digest", "examples", "supervised_tokens")
# Settings of the record that have another name than their flags.
_NAMES = {
    "name": "--objective",
    "normalization": "--objective-normalization",
    "warmup_steps": "--objective-warmup-steps",
    "schedules": "--objective-schedule",
    "weights": "--data-weights",
    "num_samples": "num_samples in --dataset-info",
    "precision": "precision",
}
# Parts of the record that act in the steps that are made.
_OF_THE_STEPS = ("objective", "data", "seed", "schedule", "batch", "optimizer")
# Only an optimizer state that is not reshardable depends on these (of the distributed optimizer): it has the
# parameters of a rank in their order in the model, without names.
_EXPERTS = ("--expert-model-parallel-size", "--expert-tensor-parallel-size")
_SIZES = ("--tensor-model-parallel-size", "--pipeline-model-parallel-size", *_EXPERTS)
_LAYOUT = (*_SIZES, "--transformer-impl", "--moe-grouped-gemm")

# Options of adapters that cannot change, because checkpoints of them would mean another model.
_FIXED_ADAPTERS = ("rank", "alpha", "targets", "rslora")

Tell = Callable[[str], None]


def check_resume(
    resumed: Resumed,
    now: RunRecord,
    args: Namespace,
    rows_until: Callable[[int], int],
    tell: Tell,
    is_finished: bool = False,
) -> None:
    """Refuse a run that cannot resume from its checkpoint as it is, and print the differences.

    Args:
        resumed: The checkpoint that the run resumes.
        now: The record of the run.
        args: Megatron's arguments.
        rows_until: Rows of the training data before an epoch.
        tell: Gets lines of text.
        is_finished: Whether the run has no step left.

    Raises:
        CheckpointError: Names both values and the flag that helps. A run without a step left has to have
            the checkpoint's settings.
    """
    check_optimizer_state(resumed, args, tell)
    saved = saved_record(resumed.folder)
    if saved is None:
        tell(
            f"> {resumed.folder} does not say which data, objective, tokenizer and seed it was trained with, "
            "so they cannot be compared"
        )
        return
    check_adapters(resumed.folder, now, saved)
    guarded = [part for part in GUARDED if part != "validation" or args.keep_best]
    changed = compare(resumed.folder, now, saved, args.allow_change, guarded, tell)
    if is_finished and (unused := [part for part in _OF_THE_STEPS if part in changed]):
        refuse_unused(resumed.folder, unused, now, saved)
    if "batch" in changed:
        tell(f"> the order of the rows stays as it is; the next row is number {resumed.done[1]}")
    if changed & {"schedule", "length", "batch"} and not is_finished:
        tell(schedule_line(args, resumed))
    if "length" in changed and not changed & {"data", "seed"}:
        _tell_of_passed_rows(resumed, saved.length.get("epochs"), rows_until, tell)


def refuse_unused(
    checkpoint: Path, parts: Iterable[str], now: RunRecord, saved: RunRecord
) -> NoReturn:
    """Refuse other settings of a run that has no step left: they would be in the export's model card alone.

    Raises:
        CheckpointError: Names each setting with both values, and the remedies.
    """
    found = now.differences(saved)
    told = "; ".join(_described(part, found, now, saved) for part in parts)
    raise CheckpointError(
        f"{checkpoint} has made all steps of the run, so no step would be made with other settings: {told}. "
        "Begin a new run in another folder (--run of megatron-profit sft, else --save), give the old values, "
        "or train on with more --epochs or --train-iters"
    )


def _tell_of_passed_rows(
    resumed: Resumed, epochs: Any, rows_until: Callable[[int], int], tell: Tell
) -> None:
    """Tell that rows are passed over: a run of whole epochs fills its last batch with empty rows.

    They stand in the place of the next rows of the data.
    """
    rows = resumed.done[1]
    if type(epochs) is not int or not 0 < epochs * rows_until(1) < 2 * rows:
        return
    passed = rows - rows_until(epochs)
    if passed > 0:
        tell(
            f"> rows of epoch {epochs + 1} that are not trained: {passed}; they had their place in the last "
            f"batch of epoch {epochs}, where they were left empty"
        )


def schedule_line(args: Namespace, resumed: Resumed) -> str:
    """Return a line on the learning rate from the next step on.

    It counts in rows where earlier steps had more or fewer of them.
    """
    if args.use_checkpoint_opt_param_scheduler:
        return (
            "> learning rate and weight decay follow the checkpoint's schedule, whatever the flags say "
            "(--use-checkpoint-opt_param-scheduler)"
        )
    unit = "steps" if args.train_iters else "samples"
    kind = "iters" if args.train_iters else "samples"
    length = getattr(args, f"lr_decay_{kind}") or args.train_iters or args.train_samples
    warmup = getattr(args, f"lr_warmup_{kind}")
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * length
    steps, rows = resumed.done
    if args.train_iters and rows != steps * args.global_batch_size:
        unit = f"rows ({rows} are taken)"
        length, warmup = length * args.global_batch_size, warmup * args.global_batch_size
    if args.lr_decay_style == "constant":
        course = f"constant at {args.lr}"
    else:
        course = f"{args.lr_decay_style} from {args.lr} to {args.min_lr} over {length} {unit}"
    return f"> learning rate from step {resumed.iteration + 1} on: {course}, {warmup:g} of warm-up"


def check_length(resumed: Resumed, settings: RunSettings, tell: Tell) -> None:
    """Refuse a run that has already made more steps than asked for; tell of one that has made them all.

    Args:
        resumed: The checkpoint that the run resumes.
        settings: The settings of the run, with the steps of all epochs.
        tell: Gets a line of text.

    Raises:
        CheckpointError: Names both numbers and the flags that help.
    """
    steps, values = settings.steps, settings.values
    if steps is None or resumed.iteration < steps:
        return
    flag = next(
        flag_of(name) for name in ("epochs", "train_iters", "train_samples") if values[name]
    )
    asked = f"{flag} {values[flag[2:].replace('-', '_')]}"
    if flag != "--train-iters":
        asked += f" ({steps} steps)"
    if resumed.iteration > steps:
        raise CheckpointError(
            f"{resumed.folder} has made {resumed.iteration} steps, more than {asked}; to train on, give a "
            f"larger {flag}; to go back to an earlier checkpoint, name it with --ckpt-step"
        )
    tell(
        f"> there is nothing left to train: {resumed.folder} has made all steps of {asked}; to train on, "
        f"give a larger {flag}"
    )


def check_optimizer_state(resumed: Resumed, args: Namespace, tell: Tell) -> None:
    """Refuse an optimizer that cannot take over the state in a checkpoint.

    Args:
        resumed: The checkpoint that the run resumes.
        args: Megatron's arguments.
        tell: Gets a line of text where there is no state to take over.

    Raises:
        CheckpointError: Names both values and the flag that helps.
    """
    checkpoint, saved = resumed.folder, resumed.saved
    if args.no_load_optim or not saved:
        return
    if saved.get("no_save_optim"):
        tell(
            f"> {checkpoint} was written with --no-save-optim: the state of the optimizer and the schedule "
            "of the learning rate start again"
        )
        return
    then, now = _form_of_optimizer(saved), _form_of_optimizer(vars(args))
    moved = then["--use-distributed-optimizer"] and not saved.get(
        "dist_ckpt_optim_fully_reshardable"
    )
    changed = [
        f"{name} {_value(now[name])} (was {_value(then[name])})"
        for name in now
        if now[name] != then[name] and (moved or name not in _LAYOUT)
    ]
    if changed:
        raise CheckpointError(
            f"the state of the optimizer in {checkpoint} does not fit {', '.join(changed)}. Give the old "
            "value, or let state and learning rate start again with --no-load-optim"
            + "; --dist-ckpt-optim-fully-reshardable makes checkpoints that fit every layout"
            * moved
        )


def _form_of_optimizer(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide which tensors an optimizer's state has, and where they are."""
    sizes = {flag: arguments.get(flag[2:].replace("-", "_")) or 1 for flag in _SIZES}
    has_experts = arguments.get("num_experts") is not None
    if not has_experts:
        sizes |= dict.fromkeys(_EXPERTS, 1)
    elif arguments.get("expert_tensor_parallel_size") is None:
        sizes["--expert-tensor-parallel-size"] = sizes["--tensor-model-parallel-size"]
    return {
        "--optimizer": arguments.get("optimizer", "adam"),
        "--use-distributed-optimizer": bool(arguments.get("use_distributed_optimizer")),
        "precision": precision(arguments),
        "--decoupled-lr": arguments.get("decoupled_lr") is not None,
        **sizes,
        "--transformer-impl": arguments.get("transformer_impl"),
        "--moe-grouped-gemm": has_experts and bool(arguments.get("moe_grouped_gemm")),
    }


def precision(arguments: Mapping[str, Any]) -> str:
    """Return the precision of the parameters: "bf16", "fp16" or "fp32"."""
    return next((name for name in ("bf16", "fp16") if arguments.get(name)), "fp32")


def compare(
    checkpoint: Path,
    now: RunRecord,
    saved: RunRecord,
    allowed: Sequence[str],
    guarded: Sequence[str],
    tell: Tell,
) -> set[str]:
    """Compare a run with the run that wrote a checkpoint.

    Args:
        checkpoint: The checkpoint that the run resumes.
        now, saved: The records of the two.
        allowed: Parts of the record that may differ.
        guarded: Parts that may not differ, unless they are allowed.
        tell: Gets lines of text.

    Returns:
        The parts that differ.

    Raises:
        CheckpointError: Names each difference, with both values, and the flag that allows it.
    """
    found = now.differences(saved)
    changed = list(dict.fromkeys(difference.part for difference in found))
    refused = [part for part in changed if part in guarded and part not in allowed]
    if refused:
        told = "; ".join(_described(part, found, now, saved) for part in refused)
        raise CheckpointError(
            f"{checkpoint} is of a run with other settings: {told}. Give the old ones, accept the change "
            f"with --allow-change {' '.join(refused)}, or begin a new run in another --save folder"
        )
    for part in allowed:
        if part not in changed:
            tell(f"> --allow-change {part}: it is as it was; the name can be left out")
    if changed:
        told = "; ".join(_described(part, found, now, saved) for part in changed)
        tell(f"> other than in {checkpoint}: {told}")
    return set(changed)


def check_adapters(checkpoint: Path, now: RunRecord, saved: RunRecord) -> None:
    """Refuse adapters of other shapes, targets or scale than the checkpoint's.

    Raises:
        CheckpointError: Names each option with both values.
    """
    if bool(now.lora) != bool(saved.lora):
        kinds = {True: "adapters", False: "whole weights"}
        raise CheckpointError(
            f"{checkpoint} holds {kinds[bool(saved.lora)]}, and this run trains {kinds[bool(now.lora)]}: "
            "--lora-rank must be given as it was, or begin a new run in another --save folder"
        )
    changed = [name for name in _FIXED_ADAPTERS if now.lora.get(name) != saved.lora.get(name)]
    if changed:
        told = ", ".join(
            f"--lora-{name} {_value(now.lora[name])} (was {_value(saved.lora.get(name))})"
            for name in changed
        )
        raise CheckpointError(
            f"the adapters in {checkpoint} are others: {told}. Give the old values, or begin a new run in "
            "another --save folder"
        )


def saved_record(checkpoint: Path) -> RunRecord | None:
    """Return the record in a checkpoint; None where there is none, for example in one of an earlier version.

    Raises:
        CheckpointError: The record is damaged.
    """
    content = read_json(checkpoint / MARKER)
    if RUN not in content:
        return None
    try:
        return RunRecord.from_json(content[RUN])
    except ValueError as error:
        raise CheckpointError(f"{checkpoint / MARKER} is damaged: {error}") from error


def _described(part: str, found: Iterable[Difference], now: RunRecord, saved: RunRecord) -> str:
    """Describe the differences of a part by the names of their flags."""
    changed = [difference for difference in found if difference.part == part]
    settings = [_change(difference) for difference in changed if difference.setting not in _CONTENT]
    if settings:
        return ", ".join(settings)
    if part == "base":
        told = "the frozen weights are others:" if now.lora else "--hf-model has other weights:"
        return f"{told} {_value(now.base['path'])} (was {_value(saved.base['path'])})"
    if part in ("data", "validation"):
        flag = "--data" if part == "data" else "--valid-data"
        here, there = _amount(now, part), _amount(saved, part)
        told = f"{here}, of the same names" if here == there else f"{here}; was {there}"
        return f"{flag} has other records ({told})"
    return f"--hf-model has another {'config.json' if part == 'model' else 'tokenizer or chat template'}"


def _amount(record: RunRecord, part: str) -> str:
    settings = getattr(record, part)
    return f"{_value(settings.get('examples'))} examples of {_value(settings.get('sources'))}"


def _change(difference: Difference) -> str:
    if difference.setting == "reference":
        return "another reference model (--ref-hf-model)"
    name = difference.setting.rpartition(".")[2]
    name = difference.setting if difference.part == "versions" else _NAMES.get(name, flag_of(name))
    return f"{name} {_value(difference.now)} (was {_value(difference.saved)})"


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_value, value)) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else printable(value)
