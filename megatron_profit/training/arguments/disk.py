"""The folders and files that the flags name: opened or checked before any work is done."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import family_for
from checkpoint_conversion.hf.model import HFModel, open_hf_model
from checkpoint_conversion.hf.output import HFOutput, plan_output
from checkpoint_conversion.torch_dist.saved_arguments import check_checkpoint_matches
from checkpoint_conversion.torch_dist.writer import TRACKER
from megatron_profit.objectives import Objective, ScheduledObjective
from megatron_profit.training.arguments.errors import ArgumentsError
from megatron_profit.training.checkpoints.folder import same_folder
from megatron_profit.training.checkpoints.save_folder import METRICS
from megatron_profit.training.statistics.given_statistics import needed_statistics
from megatron_profit.training.step.objective_flags import (
    flag_of,
)


def open_hf_weights(settings: Mapping[str, Any], config: Mapping[str, Any]) -> HFModel | None:
    """Return the HuggingFace weights to start from; None to start from a checkpoint or random weights.

    A checkpoint of another architecture is refused. So is a folder that was named as the source of the
    weights and holds none: only an empty --load that is also --save stands for a new run.
    """
    for name in ("load", "pretrained_checkpoint"):
        folder = settings[name]
        if folder and (Path(folder) / TRACKER).is_file():
            check_checkpoint_matches(Path(folder), config, Path(settings["hf_model"]))
            return None
    started = settings["pretrained_checkpoint"]
    if settings["random_init"] and not started:
        return None
    for name in ("load", "pretrained_checkpoint"):
        folder = settings[name]
        if folder and not (name == "load" and same_folder(folder, settings["save"])):
            raise ArgumentsError(
                f"no checkpoint in {flag_of(name)} {folder}; without the flag, the run starts from the "
                f"weights of --hf-model {settings['hf_model']}, with --random-init from random ones"
            )
    try:
        model = open_hf_model(settings["hf_model"])
    except ConversionError as error:
        raise ArgumentsError(
            "no checkpoint was given (--pretrained-checkpoint, --load), and the weights of --hf-model "
            f"cannot be used: {error}"
        ) from error
    return model


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
    """Refuse folders for curves that cannot be written, and a W&B setup with a missing part."""
    for name in ("tensorboard_dir", "token_report", "wandb_save_dir"):
        if settings[name]:
            _check_place(f"{flag_of(name)} {settings[name]}", Path(settings[name]))
    if settings["wandb_project"] and not settings["wandb_exp_name"]:
        raise ArgumentsError("--wandb-project needs the name of the run; give --wandb-exp-name")
    if settings["wandb_project"] and not (settings["wandb_save_dir"] or settings["save"]):
        raise ArgumentsError(
            "--wandb-project needs a place for its files; give --wandb-save-dir DIR or --save DIR"
        )


def _check_place(flag: str, folder: Path) -> None:
    """Refuse a folder that can neither be written to nor made."""
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
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
    overwrite = _goes_on(settings) or settings["overwrite"]
    return plan_output(settings["export_hf"], settings["hf_model"], dtype, overwrite)


def _goes_on(settings: Mapping[str, Any]) -> bool:
    """Return whether the run resumes from its own checkpoint.

    Then the folder that it exported before holds an earlier state of the same run.
    """
    load = settings["load"]
    return same_folder(load, settings["save"]) and (Path(load) / TRACKER).is_file()


def open_reference(
    settings: Mapping[str, Any],
    objective: Objective | ScheduledObjective,
    config: Mapping[str, Any],
) -> tuple[HFModel, Path] | None:
    """Return the reference model and the folder of its log-probabilities, where the objective needs them."""
    if "ref_log_prob" not in needed_statistics(objective):
        for name in ("ref_hf_model", "ref_cache"):
            if settings[name]:
                raise ArgumentsError(
                    f"{flag_of(name)} is for objectives with a reference model, which "
                    f"{settings['objective']} is not with these options; drop it"
                )
        return None
    if not (settings["ref_cache"] or settings["save"]):
        raise ArgumentsError(
            f"--objective {settings['objective']} needs a place for the log-probabilities of its "
            "reference model; give --ref-cache DIR or --save DIR"
        )
    if settings["pretrained_checkpoint"] and not settings["ref_hf_model"]:
        raise ArgumentsError(
            f"--objective {settings['objective']} compares with a reference model, which is --hf-model by "
            "default, but this run starts from --pretrained-checkpoint; name the reference with "
            "--ref-hf-model DIR"
        )
    if settings["objective"] == "rho1" and not settings["ref_hf_model"]:
        raise ArgumentsError(
            "--objective rho1 ranks by what the reference knows and the model does not; against the weights "
            "that it starts from that is noise. Name a better model with --ref-hf-model DIR"
        )
    folder = settings["ref_hf_model"] or settings["hf_model"]
    try:
        model = open_hf_model(folder)
        same = model.family.megatron_arguments(model.config) == family_for(
            config
        ).megatron_arguments(config)
    except ConversionError as error:
        raise ArgumentsError(
            f"the weights of the reference model {folder} cannot be used: {error}; give another folder "
            "with --ref-hf-model"
        ) from error
    if not same:
        raise ArgumentsError(
            f"--ref-hf-model {folder} has another architecture than --hf-model {settings['hf_model']}; "
            "the reference is computed with the model that is trained, so both must be alike"
        )
    return model, Path(settings["ref_cache"] or Path(settings["save"]) / "ref_log_prob")
