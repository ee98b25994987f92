"""The W&B run, which continues when the training resumes: the save folder holds its id."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.training import get_args, get_wandb_writer

from checkpoint_conversion.errors import warn
from megatron_profit.megatron_patches.callbacks import Callback
from megatron_profit.megatron_patches.enduring import reason
from megatron_profit.training.checkpoints.choose import Resumed
from megatron_profit.training.checkpoints.folder import read_json, same_folder, write_json
from megatron_profit.training.checkpoints.save_folder import WANDB_RUN


def resume_wandb_run(settings: Mapping[str, Any], resumed: Resumed | None) -> None:
    """Let W&B go on with the run of the save folder, unless the environment names another one.

    Args:
        settings: All arguments by name.
        resumed: The checkpoint that the run goes on from, if any.

    Raises:
        CheckpointError: The file with the id is broken.
    """
    load, save, project = (settings[name] for name in ("load", "save", "wandb_project"))
    if resumed is None or not project or not same_folder(load, save):
        return
    saved = read_json(Path(save) / WANDB_RUN)
    if saved.get("project") == project and isinstance(saved.get("id"), str):
        os.environ.setdefault("WANDB_RUN_ID", saved["id"])
        os.environ.setdefault("WANDB_RESUME", "allow")


class WandbRun(Callback):
    """Notes the id of the run, on the rank that logs to W&B."""

    def before_training(self, iteration: int) -> None:
        args, writer = get_args(), get_wandb_writer()
        if writer is None or args.save is None or writer.run is None:
            return
        file = Path(args.save) / WANDB_RUN
        try:
            write_json(file, {"project": args.wandb_project, "id": writer.run.id})
        except OSError as error:
            warn(f"{file} cannot be written ({reason(error)}); a resume begins a new run of W&B")
