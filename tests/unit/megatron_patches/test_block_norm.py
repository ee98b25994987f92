"""The norm of gradients and parameters on devices without a kernel for it, against fp64."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.optimizer import clip_grads
from megatron.training.utils import common_utils

from megatron_profit.megatron_patches.megatron import MEGATRON_PATCHES
from megatron_profit.megatron_patches.optimizer import block_norm as module
from megatron_profit.megatron_patches.optimizer.block_norm import block_norm


def exact(*tensors: torch.Tensor) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


@pytest.fixture(scope="module")
def embedding() -> torch.Tensor:
    """As many elements as the embedding of a small model with Qwen3's vocabulary."""
    torch.manual_seed(0)
    return torch.randn(28_000_003).mul_(1e-3)


def test_the_norm_of_a_large_tensor_is_right_to_fp32(embedding):
    assert float(block_norm([embedding])) == pytest.approx(exact(embedding), rel=1e-7)


@pytest.mark.parametrize("parts", [2, 8, 1000])
def test_it_does_not_depend_on_how_a_tensor_is_split_over_ranks(embedding, parts):
    """As a layout sees it: each rank has the norm of its part, and the squares are added up."""
    squares = [float(block_norm([part])) ** 2 for part in embedding.chunk(parts)]
    assert math.sqrt(sum(squares)) == pytest.approx(exact(embedding), rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_any_shape_and_dtype_count_once(dtype):
    torch.manual_seed(1)
    block = module._BLOCK
    shapes = [(), (0,), (1,), (block,), (block + 1,), (3, block - 1), (2, 0, 5)]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    tensors.append(torch.randn(70, 90).to(dtype).t())  # not contiguous
    assert block_norm(tensors).tolist() == pytest.approx([exact(*tensors)], rel=1e-6)
    assert block_norm(tensors).dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, -1])
def test_what_is_not_finite_shows_in_the_norm(bad, place):
    tensor = torch.ones(3 * module._BLOCK + 5)
    tensor[place] = bad
    assert not math.isfinite(float(block_norm([torch.ones(7), tensor])))


def test_megatron_clips_and_logs_by_this_norm():
    """Its own fallback is in neither place any more."""
    (norm_patch,) = [patch for patch in MEGATRON_PATCHES if patch.name == "norm-in-blocks"]
    norm_patch.apply()
    tensors = [torch.full((3,), 2.0), torch.full((13,), 1.0)]
    for function in (clip_grads.l2_norm_impl, common_utils.multi_tensor_l2norm):
        norm, _ = function(65536, None, [tensors], False)
        assert norm.tolist() == [5.0]
        assert function.__module__ == "megatron_profit.megatron_patches.megatron"
