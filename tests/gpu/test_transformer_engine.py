"""Transformer Engine keeps records apart, and its layers train as the local ones do."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from make_tiny_model import make_tiny_model
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_profit.models import attention
from megatron_profit.models.record_spans import (
    RecordSpans,
    context_parallel_index,
    record_bounds,
)

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
# Rows of 1,024 positions: records of many lengths, of one token, a record that fills the row.
RECORDS = [[5, 1, 1, 500, 517], [1024], [1] * 24 + [1000]]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
    ),
]


def attend(core, tensors, position_ids, upstream, cp_size):
    """The context [S, B, heads * head_dim] and the gradients of query, key and value.

    The ranks of a context-parallel group attend one after another, each with its queries and all keys.
    """
    query, key, value = inputs = [t.detach().requires_grad_() for t in tensors]
    seq_length = position_ids.shape[1]
    places, contexts = [], []
    for cp_rank in range(cp_size):
        rows = RecordSpans.of(
            record_bounds(position_ids), position_ids.shape, query.device, cp_size, cp_rank
        )
        places.append(context_parallel_index(seq_length, cp_size, cp_rank).to(query.device))
        own = query[places[-1]]
        contexts.append(core(own, key, value, None, AttnMaskType.causal, packed_seq_params=rows))
    context = torch.cat(contexts)[torch.cat(places).argsort()]
    return [context, *torch.autograd.grad(context, inputs, upstream.to(context.dtype))]


@pytest.mark.parametrize("cp_size", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_records_of_a_row_do_not_see_each_other(monkeypatch, groups, cp_size):
    """In bf16, as exact as torch's attention in bf16; both against torch's in fp32."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    # Keys and values are those of the whole rows already.
    monkeypatch.setattr(attention, "gather_keys_values", lambda key, value, *_: (key, value))
    monkeypatch.setattr(parallel_state, "get_context_parallel_group", lambda: None)
    sizes = {"num_layers": 1, "hidden_size": 512, "num_attention_heads": 8, "kv_channels": 64}
    config = TransformerConfig(
        **sizes,
        num_query_groups=groups,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in RECORDS])
    torch.manual_seed(0)
    tensors = [
        torch.randn(1024, 3, heads, 64, device="cuda", dtype=torch.bfloat16)
        for heads in (8, groups, groups)
    ]
    upstream = torch.randn(1024, 3, 512, device="cuda")
    settings = (config, 1, AttnMaskType.causal, "self")
    local = attention.ScaledDotProductAttention(*settings)
    exact = attend(local, [t.float() for t in tensors], position_ids, upstream, 1)
    usual = attend(local, tensors, position_ids, upstream, 1)
    engine = attention.with_variable_lengths(TEDotProductAttention)(*settings)
    ours = attend(engine, tensors, position_ids, upstream, cp_size)
    if attention.computes_unfused():
        pytest.skip("Transformer Engine has no variable-length kernel here: flash-attn or cuDNN")
    for got, theirs, truth in zip(ours, usual, exact, strict=True):
        assert (got.float() - truth).norm() <= 2 * (theirs.float() - truth).norm()


@pytest.mark.parametrize("packing", [False, True])
def test_losses_are_those_of_the_local_layers(torchrun, tmp_path, packing):
    model = make_tiny_model(tmp_path / "model", sorted(DATA.glob("*.jsonl")))
    flags = [
        *("--hf-model", model, "--random-init", "--data", DATA / "arithmetic_base.jsonl", "--bf16"),
        *("--objective", "profit", "--prob-threshold", "0.001", "--threshold-direction", "higher"),
        *("--seq-length", 128, "--micro-batch-size", 2, "--global-batch-size", 4, "--lr", 1e-3),
        "--packing" if packing else "--no-packing",
    ]
    entry = ["-m", "megatron_profit.sft", "--device", "cuda", *flags]
    torchrun(1, *entry, "--save", tmp_path / "start", "--train-iters", 1, CUDA_VISIBLE_DEVICES="0")

    def losses(*more: object) -> list[float]:
        resume = ("--pretrained-checkpoint", tmp_path / "start", "--train-iters", 6)
        output = torchrun(1, *entry, *resume, *more, CUDA_VISIBLE_DEVICES="0").stdout
        return [float(value) for value in re.findall(r"\| lm loss: (\S+) \|", output)]

    engine, local = losses(), losses("--transformer-impl", "local")
    assert len(engine) == 6
    assert engine[-1] < engine[0]
    assert engine == [pytest.approx(loss, rel=2e-2) for loss in local]
