"""Reads a training command as the training entry would, for commands whose model and folders are not here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from megatron_profit.training.arguments.sft_arguments import SFTArguments

from megatron_profit.training.arguments import sft_arguments as training_arguments


def read_command(
    flags: Sequence[str],
    world_size: int,
    config: Mapping[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> SFTArguments:
    """Read the flags of a training command on a GPU machine.

    Relative paths are those of the working folder, which is written to.

    Args:
        flags: What follows `-m megatron_profit.sft`.
        world_size: Processes of the run.
        config: config.json of the model that --hf-model names.
        monkeypatch: Stands in for weights and for checks of the disk.
    """
    monkeypatch.setattr(training_arguments, "open_hf_weights", lambda *_: None)
    monkeypatch.setattr(training_arguments, "plan_export", lambda *_: None)
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    folder = Path(flags[flags.index("--hf-model") + 1])
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return training_arguments.read_arguments(list(flags), "cuda")
