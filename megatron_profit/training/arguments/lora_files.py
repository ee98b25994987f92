"""The folders of adapters that the flags name: the frozen base, a start, and a PEFT folder to write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint_conversion.adapters.export import first_difference
from checkpoint_conversion.adapters.options import LoraOptions
from checkpoint_conversion.adapters.peft_folder import (
    PeftFolder,
    open_peft_folder,
    plan_adapter_output,
)
from checkpoint_conversion.adapters.saved import (
    SavedAdapters,
    digest_of_weights,
    saved_adapters,
)
from checkpoint_conversion.engine.dtypes import chosen_dtype
from checkpoint_conversion.engine.output import check_apart
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import Config, family_for
from checkpoint_conversion.hf.model import HFModel, open_hf_model
from checkpoint_conversion.model_card.base import licence_of
from checkpoint_conversion.torch_dist.folder import find_checkpoint
from megatron_profit.flags import ArgumentsError, flag_of
from megatron_profit.training.checkpoints.adapters import LoraFiles
from megatron_profit.training.checkpoints.folder import holds_checkpoint

# Options that a folder to start from and the flags must share.
_SHARED = ("rank", "alpha", "targets", "rslora")


def open_lora(
    options: LoraOptions, values: Mapping[str, Any], config: Config, overwrite: bool
) -> LoraFiles:
    """Open or check the folders of a run that trains adapters.

    Args:
        options: Options of the adapters.
        values: All arguments by name.
        config: The content of config.json.
        overwrite: Whether an earlier PEFT folder may be replaced.

    Raises:
        ArgumentsError: A folder holds something else than its flag says.
        ConversionError: A folder cannot be used.
    """
    output = None
    if values["export_adapter"] is not None:
        if values["export_hf"] is not None:
            check_apart(Path(values["export_adapter"]), Path(values["export_hf"]))
        dtype = chosen_dtype(next((d for d in ("bf16", "fp16") if values[d]), "fp32"))
        assert dtype is not None
        output = plan_adapter_output(
            values["export_adapter"], values["hf_model"], config, options, dtype, overwrite
        )
        licence_of(Path(values["hf_model"])).texts()  # copied after the last step
    rules = family_for(config).tensor_rules(config)
    start = _open_start(values, options, config)
    files = LoraFiles(options, rules, _open_base(values), start, output)
    if output is not None and isinstance(files.base, Path):
        _check_named_base(files.base, output.base, config)
    if values["finetune"]:
        _check_finetuned(files, values["load"])
    return files


def check_whole_weights(values: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of adapters where a run without adapters would load weights.

    Raises:
        ArgumentsError: Names the flag and the remedy.
    """
    for name in ("load", "pretrained_checkpoint"):
        saved = _saved(values[name])
        if saved is not None:
            rank = saved.options.rank
            raise ArgumentsError(
                f"{flag_of(name)} {values[name]} holds adapters of rank {rank} and no weights; go on with "
                f"them by --lora-rank {rank}, or merge them first with checkpoint_conversion.megatron_to_hf"
            )


def _open_start(
    values: Mapping[str, Any], options: LoraOptions, config: Config
) -> PeftFolder | None:
    """Return the PEFT folder that a new run starts from, if any; a run that resumes does not read it."""
    folder, load = values["lora_adapter"], values["load"]
    if folder is None:
        return None
    if holds_checkpoint(load):
        if values["finetune"]:
            raise ArgumentsError(
                f"--lora-adapter {folder} and --load {load} with --finetune are two starts; drop one of them"
            )
        return None
    start = open_peft_folder(folder, config)
    _check_same(f"--lora-adapter {folder}", start.options, options)
    return start


def _check_same(place: str, there: LoraOptions, options: LoraOptions) -> None:
    if any(getattr(there, name) != getattr(options, name) for name in _SHARED):
        rslora = " --lora-rslora" if there.rslora else ""
        raise ArgumentsError(
            f"the adapters in {place} have other options than the flags; give "
            f"--lora-rank {there.rank} --lora-alpha {there.alpha} --lora-targets {' '.join(there.targets)}"
            f"{rslora}"
        )


def _check_finetuned(files: LoraFiles, load: str | None) -> None:
    """Refuse adapters that a new run starts from by --finetune on another base, or of other options.

    A run that resumes compares its whole record instead (`training/plan/compare.py`).
    """
    saved = _saved(load)
    if saved is None:
        return
    _check_same(f"--load {load}", saved.options, files.options)
    folder = files.base_folder
    if folder is not None and digest_of_weights(folder) != saved.digest:
        raise ArgumentsError(
            f"the adapters in --load {load} were trained on {saved.base}, and the frozen weights here are "
            f"the ones in {folder}; give the old base, or export the adapters and start from --lora-adapter"
        )


def _open_base(values: Mapping[str, Any]) -> HFModel | Path | None:
    """Return the frozen weights; they are read at every start, also at a resume."""
    load, pretrained = values["load"], values["pretrained_checkpoint"]
    if holds_checkpoint(load) and _saved(load) is None:
        raise ArgumentsError(
            f"--load {load} holds whole weights and no adapters; start from them with "
            "--pretrained-checkpoint"
        )
    if pretrained:
        if _saved(pretrained) is not None:
            raise ArgumentsError(
                f"--pretrained-checkpoint {pretrained} holds adapters; it must hold the weights that they "
                "are added to"
            )
        return find_checkpoint(pretrained)
    if not values["random_init"]:
        return open_hf_model(values["hf_model"])
    if values["save"] or load:
        raise ArgumentsError(
            "--random-init makes weights that a checkpoint of adapters does not hold; drop it, or --save and "
            "--load"
        )
    return None


def _check_named_base(base: Path, named: Path, config: Config) -> None:
    """Refuse a PEFT folder that would name another model than its adapters are for.

    Args:
        base: The Megatron checkpoint with the frozen weights.
        named: The HuggingFace folder that the PEFT folder names.
        config: The content of its config.json.
    """
    remedy = (
        "leave --export-adapter out and write merged weights with --export-hf, or convert that checkpoint "
        "with checkpoint_conversion.megatron_to_hf and give the result as --hf-model"
    )
    try:
        name = first_difference(named, config, base)
    except ConversionError as error:
        raise ArgumentsError(
            f"--export-adapter would name --hf-model {named} as the base, and its weights cannot be compared "
            f"with --pretrained-checkpoint {base}: {error}; {remedy}"
        ) from error
    if name is not None:
        raise ArgumentsError(
            f"--export-adapter would name --hf-model {named} as the base, and the frozen weights of "
            f"--pretrained-checkpoint {base} have another {name}; {remedy}"
        )


def _saved(folder: str | Path | None) -> SavedAdapters | None:
    """Return the notes of the adapters in the latest checkpoint of a folder, if there are any."""
    if folder is None or not holds_checkpoint(folder):
        return None
    return saved_adapters(find_checkpoint(folder))
