"""Run under torchrun: one Gated DeltaNet layer on rows of several records, against transformers' on each
record alone; outputs, and gradients of the inputs and of every parameter.

torchrun … delta_net_layer.py TP CP [sp] [recompute] [kernels]

With "kernels", functions with the documented meaning stand in for the ones of flash-linear-attention.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
from megatron_profit.megatron_patches import activate

activate("cpu")

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ranks
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.gated_delta_net import common, gdn
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from megatron_profit.models.gated_delta_net.layer import PackedGatedDeltaNet
from megatron_profit.models.layer_specs import _local_block_spec
from megatron_profit.models.record_spans import RecordSpans, context_parallel_index, record_bounds

SIZES = {
    "hidden_size": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "linear_conv_kernel_dim": 4,
}
QK, V, HEADS, LENGTH = 10, 42, 6, 96
# Records that end on the borders of chunks and next to them.
RECORDS = [[5, 1, 1, 64, 20, 5], [96], [70, 2, 3, 21]]


def megatron_layer(tp: int, cp: int, words: list[str]) -> torch.nn.Module:
    config = TransformerConfig(
        num_layers=1,
        num_attention_heads=2,
        normalization="RMSNorm",
        activation_func=F.silu,
        add_bias_linear=False,
        layernorm_epsilon=1e-6,
        layernorm_zero_centered_gamma=True,
        transformer_impl="local",
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        sequence_parallel="sp" in words,
        experimental_attention_variant="gated_delta_net",
        linear_attention_freq=[1],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        recompute_granularity="selective" if "recompute" in words else None,
        recompute_modules=["gdn_norm_out"] if "recompute" in words else None,
        **SIZES,
    )
    (layer,) = _local_block_spec(config, None).layer_specs
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return build_module(
        layer.submodules.self_attention, config=config, layer_number=1, pg_collection=groups
    )


def convolution(x, weight, activation, cu_seqlens):
    assert (len(x), cu_seqlens.dtype) == (1, torch.int32)
    parts = x.mT.split(cu_seqlens.diff().tolist(), dim=-1)
    parts = [qwen.causal_conv1d_fn(part, weight, activation=activation) for part in parts]
    return torch.cat(parts, dim=-1).mT, None


def delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel, cu_seqlens):
    assert not use_qk_l2norm_in_kernel
    assert all(len(t) == 1 and t.is_contiguous() for t in (q, k, v, g, beta))
    lengths = cu_seqlens.diff().tolist()
    records = zip(*(t.split(lengths, dim=1) for t in (q, k, v, g, beta)), strict=True)
    outputs = [qwen.torch_chunk_gated_delta_rule(*record)[0] for record in records]
    return torch.cat(outputs, dim=1), None


def take_kernels() -> None:
    common.causal_conv1d, common.l2norm = convolution, qwen.l2norm
    common.chunk_gated_delta_rule = gdn.chunk_gated_delta_rule = delta_rule
    PackedGatedDeltaNet._has_kernels = lambda layer, x: True


def transformers_layer() -> qwen.Qwen3_5GatedDeltaNet:
    layer = qwen.Qwen3_5GatedDeltaNet(
        Qwen3_5TextConfig(**SIZES, num_hidden_layers=1, layer_types=["linear_attention"]), 0
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def of_rank(parts: list[torch.Tensor], tp: int) -> torch.Tensor:
    """This tensor-parallel rank's rows of each part, one part after another."""
    rank = ranks.get_tensor_model_parallel_rank()
    return torch.cat([part.chunk(tp)[rank] for part in parts])


def by_name(tensors: dict[str, torch.Tensor], tp: int) -> dict[str, torch.Tensor]:
    """Transformers' weights, or their gradients, in the form of this rank's parameters."""
    q, k, v = tensors["in_proj_qkv.weight"].split([QK, QK, V])
    rest = [tensors[f"in_proj_{name}.weight"] for name in "zba"]
    rank = ranks.get_tensor_model_parallel_rank()
    return {
        "in_proj.weight": of_rank([q, k, v, *rest], tp),
        "conv1d.weight": of_rank(list(tensors["conv1d.weight"].split([QK, QK, V])), tp),
        "A_log": of_rank([tensors["A_log"]], tp),
        "dt_bias": of_rank([tensors["dt_bias"]], tp),
        "out_norm.plain_weight": tensors["norm.weight"],
        "out_proj.weight": tensors["out_proj.weight"].chunk(tp, dim=1)[rank],
    }


def main() -> None:
    tp, cp, *words = sys.argv[1:]
    tp, cp = int(tp), int(cp)
    dist.init_process_group("gloo")
    ranks.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp)
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(0)
    theirs = transformers_layer()
    hidden = torch.randn(LENGTH, len(RECORDS), SIZES["hidden_size"], requires_grad=True)
    upstream = torch.randn(LENGTH, len(RECORDS), SIZES["hidden_size"])
    alone = [
        torch.cat([theirs(part[None])[0] for part in hidden[:, row].split(lengths)])
        for row, lengths in enumerate(RECORDS)
    ]
    expected = torch.stack(alone, dim=1)
    expected.backward(upstream)

    if "kernels" in words:
        take_kernels()
    ours = megatron_layer(tp, cp, words)
    parameters = dict(ours.named_parameters())
    weights = by_name({n: p.detach() for n, p in theirs.named_parameters()}, tp)
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in RECORDS])
    index = context_parallel_index(LENGTH, cp, ranks.get_context_parallel_rank())
    if "sp" in words:
        index = index.chunk(tp)[ranks.get_tensor_model_parallel_rank()]
    rows = RecordSpans.of(
        record_bounds(positions),
        tuple(positions.shape),
        torch.device("cpu"),
        cp,
        ranks.get_context_parallel_rank(),
    )
    mine = hidden.detach()[index].requires_grad_()
    output, _ = ours(mine, None, packed_seq_params=rows)
    output.backward(upstream[index])

    def compare(actual: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
        close = {"rtol": 1e-4, "atol": 2e-5 * float(wanted.abs().max())}
        torch.testing.assert_close(actual, wanted, **close, msg=lambda m: f"{name}: {m}")

    compare(output, expected[index], "output")
    compare(mine.grad, hidden.grad[index], "gradient of the input")
    gradients = by_name({n: p.grad for n, p in theirs.named_parameters()}, tp)
    for name, parameter in parameters.items():
        # What Megatron sums over context-parallel ranks, which have other tokens or other heads.
        dist.all_reduce(parameter.grad, group=ranks.get_context_parallel_group())
        compare(parameter.grad, gradients[name], name)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
