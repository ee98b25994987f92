"""The gated delta rule in plain torch, against its definition token by token and against transformers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from megatron_profit.models.gated_delta_net.delta_rule import (
    causal_convolution,
    delta_net,
    gated_delta_rule,
    unit_length,
)

# One key head serves three value heads; keys and values have different sizes.
KEY_HEADS, HEADS, K, V = 2, 6, 5, 7
NAMES = ("query", "key", "value", "decay", "beta")


def inputs(records: int, length: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Random arguments of the rule, with states that last for some tokens."""
    generator = torch.Generator().manual_seed(length)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(records, length, *shape, generator=generator, dtype=torch.float64)

    query, key = (F.normalize(random(KEY_HEADS, K), dim=-1) for _ in range(2))
    decay, beta = -0.3 * F.softplus(random(HEADS)), random(HEADS).sigmoid()
    tensors = (query, key, random(HEADS, V), decay, beta)
    return [t.to(dtype).requires_grad_() for t in tensors]


def token_by_token(query, key, value, decay, beta):
    """The definition: one token after the other, the state [N, H, K, V] in fp64."""
    query, key, value, decay, beta = (t.double() for t in (query, key, value, decay, beta))
    query, key = (t.repeat_interleave(HEADS // KEY_HEADS, dim=2) for t in (query, key))
    state = torch.zeros(len(value), HEADS, K, V, dtype=torch.float64)
    outputs = []
    for t in range(value.size(1)):
        state = decay[:, t, :, None, None].exp() * state
        old = torch.einsum("nhkv,nhk->nhv", state, key[:, t])
        new = beta[:, t, :, None] * (value[:, t] - old)
        state = state + torch.einsum("nhk,nhv->nhkv", key[:, t], new)
        outputs.append(torch.einsum("nhkv,nhk->nhv", state, query[:, t]) / K**0.5)
    return torch.stack(outputs, dim=1)


def gradients(output: torch.Tensor, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(output, tensors, upstream.to(output.dtype))


@pytest.mark.parametrize("length", [1, 2, 17, 63, 64, 65, 150])
def test_chunks_give_what_one_token_after_the_other_gives(length):
    tensors = inputs(2, length)
    actual, expected = gated_delta_rule(*tensors), token_by_token(*tensors)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    pairs = zip(gradients(actual, tensors), gradients(expected, tensors), NAMES, strict=True)
    for ours, exact, name in pairs:
        torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: n + m)


def test_a_state_that_is_forgotten_at_once_overflows_nowhere():
    tensors = inputs(1, 130, torch.float32)
    with torch.no_grad():
        tensors[3].fill_(-90.0)  # exp(90) is 1e39
        tensors[3][:, ::7] = 0.0
    actual = gated_delta_rule(*tensors)
    torch.testing.assert_close(actual.double(), token_by_token(*tensors), rtol=1e-4, atol=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients(actual, tensors))


def test_the_state_is_fp32_where_the_model_is_bf16():
    tensors = inputs(1, 200, torch.bfloat16)
    actual = gated_delta_rule(*tensors)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), token_by_token(*tensors), rtol=1e-2, atol=1e-3)


def test_padding_after_a_record_does_not_change_it():
    short, long = (inputs(1, length) for length in (70, 100))
    padded = [torch.cat([a, b[:, 70:]], dim=1) for a, b in zip(short, long, strict=True)]
    torch.testing.assert_close(gated_delta_rule(*padded)[:, :70], gated_delta_rule(*short))


@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_convolution_sees_the_token_and_the_ones_before(width):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 9, 6), torch.randn(6, width)
    expected = F.conv1d(x.mT, weight[:, None], padding=width - 1, groups=6)[..., :9].mT
    torch.testing.assert_close(causal_convolution(x, weight), F.silu(expected))


def test_all_of_it_is_transformers():
    """Grouped heads, the norm of keys and queries, and the convolution, in fp32."""
    torch.manual_seed(0)
    query, key, value, decay, beta = inputs(3, 77, torch.float32)
    qkv = torch.cat([t.detach().flatten(2) * 3 for t in (query, key, value)], dim=-1)
    weight = torch.randn(qkv.size(-1), 4)
    ours = delta_net(qkv, weight, decay, beta, KEY_HEADS, K)

    mixed = qwen.causal_conv1d_fn(qkv.mT, weight, activation="silu").mT
    parts = mixed.split([KEY_HEADS * K, KEY_HEADS * K, HEADS * V], dim=-1)
    heads = [part.unflatten(-1, (-1, size)) for part, size in zip(parts, (K, K, V), strict=True)]
    theirs, _ = qwen.torch_chunk_gated_delta_rule(
        *heads, g=decay, beta=beta, use_qk_l2norm_in_kernel=True
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unit_length(heads[0]), qwen.l2norm(heads[0]))


@pytest.mark.parametrize(
    ("dtype", "is_cuda", "deterministic", "taken"),
    [
        (torch.bfloat16, True, False, True),
        (torch.float16, True, False, True),
        (torch.float32, True, False, False),  # flash-linear-attention refuses it
        (torch.bfloat16, False, False, False),
        (torch.bfloat16, True, True, False),
    ],
)
def test_the_kernels_get_only_what_they_take(monkeypatch, dtype, is_cuda, deterministic, taken):
    from megatron.core.ssm.gated_delta_net import common

    from megatron_profit.models.gated_delta_net.layer import PackedGatedDeltaNet

    layer = SimpleNamespace(config=SimpleNamespace(deterministic_mode=deterministic))
    tensor = SimpleNamespace(is_cuda=is_cuda, dtype=dtype)
    monkeypatch.setattr(common, "chunk_gated_delta_rule", object())
    assert PackedGatedDeltaNet._has_kernels(layer, tensor) is taken
    monkeypatch.setattr(common, "chunk_gated_delta_rule", None)
    assert not PackedGatedDeltaNet._has_kernels(layer, tensor)
