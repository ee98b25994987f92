"""Weights are told from others without reading all of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from megatron_profit.training.plan.this_run import digest_of_weights


def weights(folder: Path, seed: int) -> Path:
    folder.mkdir()
    draw = np.random.default_rng(seed)
    save_file({"w": draw.standard_normal((300, 500))}, folder / "model.safetensors")
    return folder


def test_a_copy_is_the_same_and_other_weights_of_the_same_shape_are_not(tmp_path):
    one, other = weights(tmp_path / "one", 1), weights(tmp_path / "other", 2)
    copy = shutil.copytree(one, tmp_path / "copy")
    os.utime(copy / "model.safetensors", (0, 0))
    assert digest_of_weights(one) == digest_of_weights(copy) != digest_of_weights(other)


def test_files_smaller_than_a_block_have_a_digest(tmp_path):
    save_file({"w": np.zeros(3)}, tmp_path / "model.safetensors")
    assert digest_of_weights(tmp_path) != digest_of_weights(tmp_path.parent)
