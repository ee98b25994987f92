"""How large a checkpoint is, and what happens where there is too little space for it."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest

from megatron_profit.estimates.saving import checkpoint_bytes
from megatron_profit.training.checkpoints import size as checkpoint_size
from megatron_profit.training.checkpoints.folder import CheckpointError
from megatron_profit.training.checkpoints.size import (
    check_space,
    check_space_at_start,
)

SETTINGS = {
    "bf16": False,
    "fp16": False,
    "use_distributed_optimizer": False,
    "optimizer": "adam",
    "no_save_optim": None,
    "overwrite": False,
}


@pytest.mark.parametrize(
    ("flags", "bytes_of_a_parameter"),
    [
        ({}, 4 + 8),
        ({"bf16": True}, 2 + 4 + 8),
        ({"use_distributed_optimizer": True}, 4 + 4 + 8),
        ({"fp16": True, "use_distributed_optimizer": True}, 2 + 4 + 8),
        ({"optimizer": "sgd"}, 4 + 4),
        ({"bf16": True, "no_save_optim": True}, 2),
    ],
)
def test_weights_copies_in_fp32_and_moments(flags, bytes_of_a_parameter):
    assert checkpoint_bytes({**SETTINGS, **flags}, 1000) == 1000 * bytes_of_a_parameter


@pytest.fixture
def free(monkeypatch):
    """Pretends that a disk has so many bytes left."""
    usage = namedtuple("usage", "total used free")

    def pretend(nbytes: int) -> None:
        monkeypatch.setattr(
            checkpoint_size.shutil, "disk_usage", lambda _: usage(10**12, 10**12 - nbytes, nbytes)
        )

    return pretend


@pytest.fixture
def model(tmp_path):
    """A Qwen3, and its number of parameters."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "head_dim": 32,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    layer = 64 * 32 * (8 + 4 + 4) + 8 * 32 * 64 + 3 * 64 * 96 + 2 * 32 + 2 * 64
    return tmp_path, 2 * 100 * 64 + 2 * layer + 64


def test_the_size_is_told_at_the_start_and_compared_with_the_space(model, free, tmp_path, capsys):
    folder, parameters = model
    size = 12 * parameters
    free(size)
    check_space_at_start(tmp_path / "not yet" / "run", folder, SETTINGS)
    told = capsys.readouterr().out
    assert (
        f"a checkpoint takes about {size / 1e6:.0f} MB and 1 s to write at 1.00 GB a second" in told
    )
    free(size - 1)
    with pytest.raises(CheckpointError, match=r"--save .*run has .* left.*--no-save-optim"):
        check_space_at_start(tmp_path / "run", folder, SETTINGS)
    check_space_at_start(tmp_path / "run", folder, {**SETTINGS, "overwrite": True})


def test_no_checkpoint_is_begun_without_space_for_all_of_it(free, tmp_path):
    free(2 * 10**9)
    check_space(tmp_path, 10**9)
    with pytest.raises(CheckpointError, match=r"it takes 2.00 GB, and .* has 2.00 GB left"):
        check_space(tmp_path, 2 * 10**9)


def test_the_space_is_that_of_the_disk_of_the_folder(tmp_path):
    assert checkpoint_size._free(tmp_path / "a" / "b") == pytest.approx(
        shutil.disk_usage(tmp_path).free, rel=0.2
    )
