"""The folders and files that the flags name: opened or checked before any work is done."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from checkpoint_conversion.engine.output import nearest_existing
from checkpoint_conversion.errors import ConversionError, warning
from checkpoint_conversion.families import CHANGEABLE_ARGUMENTS
from checkpoint_conversion.hf.carried import Notes
from checkpoint_conversion.hf.model import HFModel, open_hf_model
from checkpoint_conversion.hf.output import HFOutput, plan_output
from checkpoint_conversion.hf.stop_tokens import plan_stop_tokens
from checkpoint_conversion.model_card.base import licence_of
from megatron_profit.data import DataOptions
from megatron_profit.flags import ArgumentsError, flag_of
from megatron_profit.training.arguments.derive import RunSettings
from megatron_profit.training.arguments.lora_files import check_whole_weights, open_lora
from megatron_profit.training.arguments.refused import reads_reference, reference_is_base
from megatron_profit.training.checkpoints.adapters import LoraFiles
from megatron_profit.training.checkpoints.folder import holds_checkpoint, same_folder
from megatron_profit.training.checkpoints.save_folder import METRICS


@dataclass(frozen=True)
class RunFiles:
    """The folders and files of a run, opened or checked.

    Attributes:
        hf_weights: The folder's weights if the run starts from them; None if it starts from a checkpoint or
            from random weights, or trains adapters.
        lora: The folders of the adapters, if the run trains any.
        data: The options of the data flags.
        export: The HuggingFace folder to write at the end, if any.
        reference: The reference model and the folder of its log-probabilities, if it is needed.
        metrics: The file for metrics as JSON lines, if any.
    """

    hf_weights: HFModel | None
    lora: LoraFiles | None
    data: DataOptions
    export: HFOutput | None
    reference: tuple[HFModel, Path] | None
    metrics: Path | None

    def with_turn_end(
        self, settings: RunSettings, token: int | None, tell: Callable[[str], None]
    ) -> RunFiles:
        """Return these files with an export whose generation stops at the token that ends a turn in training.

        Args:
            settings: The settings of the run.
            token: Id of the token that ends a turn; None where the chat template ends it in ordinary text.
            tell: Gets a line of text where the files of the model name no such token.

        Raises:
            ConversionError: A file of the model has stop tokens that are not token ids.
        """
        if token is None:
            tell(
                warning(
                    "the chat template ends a turn with ordinary text, so no token stops the trained model; "
                    "give that text as a stop string to the program that generates"
                )
            )
        stops = plan_stop_tokens(settings.hf_model, settings.config, token)
        if stops.added is not None:
            tell(f"> in an export, {stops}")
        return self if self.export is None else replace(self, export=self.export.stopping_at(token))

    def with_carried(self, notes: Notes, start: Path | None) -> RunFiles:
        """Return these files with an export that compares the tensors it copies with notes on them.

        Args:
            notes: The notes.
            start: The checkpoint that the run starts from, which the notes may come from.
        """
        return (
            self if self.export is None else replace(self, export=self.export.noting(notes, start))
        )


def open_files(settings: RunSettings) -> RunFiles:
    """Open or check what the flags name, before any work is done. The checkpoint is chosen already.

    Raises:
        ArgumentsError, ConversionError, DataError: A file or folder is missing, damaged or cannot be written.
    """
    values = settings.values
    check_logs(values)
    check_named_checkpoints(values)
    lora = None
    if settings.lora is not None:
        lora = open_lora(settings.lora, values, settings.config, _replaces_exports(values))
    return RunFiles(
        hf_weights=open_hf_weights(values) if lora is None else None,
        lora=lora,
        data=DataOptions.from_flags(settings.data_flags),
        export=plan_export(values),
        reference=open_reference(settings),
        metrics=metrics_file(values),
    )


def check_named_checkpoints(settings: Mapping[str, Any]) -> None:
    """Refuse a folder that was named as the source of the weights and holds no checkpoint.

    Only an empty --load that is also --save stands for a new run. For example, a mistyped --load would start
    from other weights than were meant. A run that resumes does not read --pretrained-checkpoint again; with
    adapters it does, and `open_lora` opens it.

    Raises:
        ArgumentsError: Names the flag and its folder.
    """
    load = settings["load"]
    for name in ("load", *(["pretrained_checkpoint"] if settings["lora_rank"] is None else [])):
        folder = settings[name]
        if not folder or holds_checkpoint(folder):
            continue
        is_new = same_folder(load, settings["save"]) if name == "load" else holds_checkpoint(load)
        if not is_new:
            raise ArgumentsError(
                f"no checkpoint in {flag_of(name)} {folder}; without the flag, the run starts from the "
                f"weights of --hf-model {settings['hf_model']}, with --random-init from random ones"
            )


def open_hf_weights(settings: Mapping[str, Any]) -> HFModel | None:
    """Return the HuggingFace weights to start from; None to start from a checkpoint or random weights."""
    check_whole_weights(settings)
    if any(map(holds_checkpoint, (settings["load"], settings["pretrained_checkpoint"]))):
        return None
    if settings["random_init"]:
        return None
    try:
        return open_hf_model(settings["hf_model"])
    except ConversionError as error:
        raise ArgumentsError(
            "no checkpoint was given (--pretrained-checkpoint, --load), and the weights of --hf-model "
            f"cannot be used: {error}"
        ) from error


def metrics_file(settings: Mapping[str, Any]) -> Path | None:
    """Return the metrics file, which can be written; None if none was asked for and there is no --save."""
    if settings["metrics_file"] is None and not settings["save"]:
        return None
    path = Path(settings["metrics_file"] or Path(settings["save"]) / METRICS)
    if path.is_dir():
        raise ArgumentsError(f"--metrics-file {path} is a folder; name a file")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ArgumentsError(
            f"--metrics-file {path} is a link, a pipe or a device; name a regular file, or remove it"
        )
    if settings["metrics_file"] is not None:
        _check_place(f"--metrics-file {path}", path.parent)
    return path


def check_logs(settings: Mapping[str, Any]) -> None:
    """Refuse folders for curves that cannot be written."""
    for name in ("tensorboard_dir", "token_report", "wandb_save_dir"):
        if settings[name]:
            _check_place(f"{flag_of(name)} {settings[name]}", Path(settings[name]))


def _check_place(flag: str, folder: Path) -> None:
    """Refuse a folder that can neither be written to nor made."""
    place = nearest_existing(folder)
    if not place.is_dir():
        raise ArgumentsError(f"{flag}: {place} is not a folder; name another place")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ArgumentsError(f"{flag}: {place} cannot be written to; name another place")


def plan_export(settings: Mapping[str, Any]) -> HFOutput | None:
    """Return the HuggingFace folder to write at the end, in the dtype of the model's parameters."""
    if settings["export_hf"] is None:
        return None
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((half[name] for name in half if settings[name]), torch.float32)
    overwrite = _replaces_exports(settings)
    output = plan_output(settings["export_hf"], settings["hf_model"], dtype, overwrite)
    licence_of(output.template)  # the model card names it after the last step
    return output


def _replaces_exports(settings: Mapping[str, Any]) -> bool:
    return _goes_on(settings) or settings["overwrite"]


def _goes_on(settings: Mapping[str, Any]) -> bool:
    """Return whether the run resumes from its own checkpoint.

    Then the folder that it exported before holds an earlier state of the same run.
    """
    load = settings["load"]
    return same_folder(load, settings["save"]) and holds_checkpoint(load)


def open_reference(settings: RunSettings) -> tuple[HFModel, Path] | None:
    """Return the reference model and the folder of its log-probabilities, where the run reads them.

    None where the reference is the frozen base of adapters.
    """
    values = settings.values
    if not reads_reference(values, settings.objective) or reference_is_base(values):
        return None
    folder = values["ref_hf_model"] or values["hf_model"]
    try:
        model = open_hf_model(folder)
        arguments = model.family.megatron_arguments(model.config)
    except ConversionError as error:
        raise ArgumentsError(
            f"the weights of the reference model {folder} cannot be used: {error}; give another folder "
            "with --ref-hf-model"
        ) from error
    # An instruction-tuned model may be made for more positions than its base, for example.
    free = CHANGEABLE_ARGUMENTS - {"vocab_size"}
    own = settings.architecture
    differing = [
        f"{name} is {arguments.get(name)} and not {own.get(name)}"
        for name in sorted({*own, *arguments} - free)
        if arguments.get(name) != own.get(name)
    ]
    if differing:
        raise ArgumentsError(
            f"--ref-hf-model {folder} has another architecture than --hf-model {values['hf_model']}: "
            f"{'; '.join(differing)}. The reference is computed with the model that is trained, so both must "
            "be alike; name another model"
        )
    return model, Path(values["ref_cache"] or Path(values["save"]) / "ref_log_prob")
