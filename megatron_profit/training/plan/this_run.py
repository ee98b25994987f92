"""The record of the run that the flags ask for."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import fields
from hashlib import file_digest
from pathlib import Path
from typing import Any

from checkpoint_conversion.adapters.saved import BASE, LORA, digest_of_weights, noted_options
from checkpoint_conversion.engine.regular_files import open_regular
from checkpoint_conversion.hf.folder import has_weights
from checkpoint_conversion.model_card.base import HubId
from checkpoint_conversion.model_card.facts import RANDOM
from megatron_profit.data import DataOptions, DataSource, TokenizedData
from megatron_profit.data.store.cache import tokenizer_files
from megatron_profit.objectives import Objective, ScheduledObjective
from megatron_profit.training.arguments.derive import RunSettings, recorded_names
from megatron_profit.training.arguments.disk import RunFiles
from megatron_profit.training.checkpoints.adapters import LoraFiles
from megatron_profit.training.checkpoints.run_record import (
    RunRecord,
    digest_of_arrays,
    digest_of_config,
    digest_of_json,
    package_versions,
)
from megatron_profit.training.plan.compare import precision
from megatron_profit.training.plan.datasets import SFTData

_SCHEDULE = (
    *("lr", "min_lr", "lr_decay_style", "lr_decay_samples"),
    *("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction", "lr_warmup_init"),
    *("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples"),
    *("decoupled_lr", "decoupled_min_lr"),
    *("weight_decay", "start_weight_decay", "end_weight_decay", "weight_decay_incr_style"),
)
_LENGTH = ("train_iters", "train_samples", "epochs")
_OPTIMIZER = ("optimizer", "adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum", "clip_grad")


def describe_run(settings: RunSettings, files: RunFiles, data: SFTData) -> RunRecord:
    """Return the record of a run.

    Args:
        settings: The settings of the run.
        files: Its files.
        data: The rows.
    """
    values, options = settings.values, files.data
    return RunRecord(
        objective={
            "name": values["objective"],
            **_objective(settings),
            **_statistics(settings, files),
        },
        data={
            **_content(data.train_prepared, options.train),
            "files": [_file(file) for source in options.train for file in source.files()],
            **_rows(values),
            "valid_split": options.valid_split,
            "weights": [source.weight for source in options.train],
            "num_samples": [source.num_samples for source in options.train],
        },
        validation={**_validation(values, options, data), **evaluation_of_tasks(settings)},
        tokenizer={
            "digest": digest_of_json(tokenizer_files(settings.hf_model)),
            "turn_end_id": data.turn_end,
        },
        seed={"seed": values["seed"]},
        model={"digest": digest_of_config(settings.config), **_base(settings)},
        **(_first_weights(settings) if files.lora is None else _adapters(files.lora)),
        schedule={
            **_chosen(values, _SCHEDULE),
            # The flag as it was given: Megatron's value may be derived from the length of the run.
            "lr_decay_iters": settings.given.get("lr_decay_iters"),
        },
        length=_chosen(values, _LENGTH),
        batch={"global_batch_size": settings.batch_size},
        optimizer={**_chosen(values, _OPTIMIZER), "precision": precision(values)},
        versions=package_versions(),
    )


def _chosen(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: values[name] for name in names}


def _objective(settings: RunSettings) -> dict[str, Any]:
    scheduled = settings.objective
    if not isinstance(scheduled, ScheduledObjective):
        scheduled = ScheduledObjective(scheduled)
    final: Objective = scheduled.final
    return {
        "options": {option.name: getattr(final, option.name) for option in fields(final)},
        "normalization": settings.values["objective_normalization"] or final.normalization,
        "warmup_steps": scheduled.warmup_steps,
        "schedules": [
            [schedule.option, schedule.shape, list(schedule.start), schedule.steps]
            for schedule in scheduled.schedules
        ],
    }


def _statistics(settings: RunSettings, files: RunFiles) -> dict[str, Any]:
    """Return the settings of an objective that compares the model with another one."""
    names = recorded_names(settings.objective)
    found: dict[str, Any] = {name: settings.values[name] for name in names}
    if (reference := _reference(settings, files)) is not None:
        found["reference"] = digest_of_weights(reference)
    return found


def _reference(settings: RunSettings, files: RunFiles) -> Path | None:
    """Return the folder of the objective's reference model, maybe the frozen base of adapters."""
    if not settings.objective.needs_reference:
        return None
    if files.reference is not None:
        return files.reference[0].folder
    return files.lora.base_folder if files.lora else None


def _base(settings: RunSettings) -> dict[str, Any]:
    """Return the names of the run's base, and the first weights if they are not the base's."""
    folder = settings.hf_model
    base = settings.publication.base(folder)
    return {
        "base": base and base.id,
        "revision": base and base.revision,
        "folder": _home(folder).name,
        "start": _start(settings.values),
    }


def _home(folder: Path) -> Path:
    """Return the folder of a model's weights: a run with another chat template has links to them."""
    links = (file for file in folder.glob("*.safetensors") if file.is_symlink())
    link = next(links, None)
    return folder.resolve() if link is None else link.resolve().parent


def _start(values: Mapping[str, Any]) -> str | None:
    checkpoint = values["pretrained_checkpoint"] or (values["finetune"] and values["load"])
    if values["random_init"] and not checkpoint:
        return RANDOM
    named = (("checkpoint", checkpoint), ("adapters", values["lora_adapter"]))
    return ", ".join(f"{kind} {Path(at).resolve().name}" for kind, at in named if at) or None


def _file(file: Path) -> dict[str, Any]:
    """Return the name and the digest of a data file, and the data set of the hub that it belongs to.

    A data set of the `datasets` library is a folder, whose tokens alone have a digest.
    """
    hub = HubId.of_path(file)
    found: dict[str, Any] = {"name": file.name, "dataset": hub and hub.id}
    if file.is_file():
        with open(open_regular(file), "rb") as content:
            found["sha256"] = file_digest(content, "sha256").hexdigest()
            found["bytes"] = content.tell()
    return found


def _first_weights(settings: RunSettings) -> dict[str, Any]:
    """Return the weights that the run starts from, where they are the ones of --hf-model and are there."""
    folder = settings.hf_model
    if _start(settings.values) is not None or not has_weights(folder):
        return {}
    return {BASE: _weights(folder)}


def _adapters(lora: LoraFiles) -> dict[str, Any]:
    folder = lora.base_folder
    return {LORA: noted_options(lora.options), BASE: {} if folder is None else _weights(folder)}


def _weights(folder: Path) -> dict[str, str]:
    return {"path": str(folder), "digest": digest_of_weights(folder)}


def _content(prepared: TokenizedData, sources: Iterable[DataSource]) -> dict[str, Any]:
    """Return a summary of the examples' tokens and of how many are trained."""
    return {
        "digest": digest_of_arrays(prepared.digests, prepared.labels, prepared.sources),
        "examples": len(prepared.digests),
        "supervised_tokens": prepared.report.supervised_tokens,
        "sources": [source.path for source in sources],
    }


def _rows(values: Mapping[str, Any]) -> Mapping[str, Any]:
    names = ("seq_length", "packing", "too_long", "train_on", "train_think", "template_date")
    return _chosen(values, names)


def evaluation_of_tasks(settings: RunSettings) -> dict[str, Any]:
    """Return the settings that decide a task's score, if checkpoints are compared by one; else {}.

    Other tasks, which are evaluated too, do not change it.
    """
    tasks = settings.eval_tasks
    if settings.keep.keep_best not in tasks.metrics:
        return {}
    return {
        "eval_tasks_limit": tasks.eval_tasks_limit,
        "eval_flags": shlex.split(settings.values["eval_flags"]),
    }


def _validation(values: Mapping[str, Any], options: DataOptions, data: SFTData) -> dict[str, Any]:
    if data.valid_prepared is None:
        return {}
    if options.valid_split:
        return {"valid_split": options.valid_split}
    return {**_content(data.valid_prepared, options.valid), **_rows(values)}
