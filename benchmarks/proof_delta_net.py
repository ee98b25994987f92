"""Gated DeltaNet in a proof: kernels and plain form of the rule against one token after the other in fp64.

Both are the layer's own functions on packed rows of several records, after the projection and before the
norm: convolution, unit length, delta rule.

Shape suffixes: B rows, S positions of a row, D features of queries, keys and values, H value heads, K size of
a head.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import benchmarking
import torch
from torch import Tensor
from torch.nn import functional as F

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Largest error relative to the norm of the exact result. The kernels round products inside a chunk to bf16.
BOUNDS = {"bf16": 2e-2, "fp32": 1e-4}
GRADIENTS = ("qkv", "decay", "beta", "convolution")
_ROUNDS = 10


@dataclass(frozen=True)
class DeltaNetSizes:
    """The sizes of the check on a device.

    Attributes:
        hidden: Size of the model's hidden states.
        key_heads, value_heads: Of the layer.
        head: Size of a key and of a value.
        records: Lengths of the records of each row that is compared.
        timed: The same of the rows that are timed.
    """

    hidden: int
    key_heads: int
    value_heads: int
    head: int
    records: tuple[tuple[int, ...], ...]
    timed: tuple[tuple[int, ...], ...]


SIZES = {
    # Qwen3.5-4B's layer.
    "cuda": DeltaNetSizes(
        *(2560, 16, 32, 128),
        records=((5, 1, 1, 64, 200, 241), (383, 129)),
        timed=((1500, 700, 60, 1836), (4096,)),
    ),
    "cpu": DeltaNetSizes(
        *(32, 2, 4, 8), records=((5, 1, 1, 64, 25), (70, 26)), timed=((60, 36), (96,))
    ),
}


def check_delta_net(device: str, rendezvous: str) -> dict[str, Any]:
    """Compare the layer's forms with the exact result, and time them.

    Args:
        device: "cuda" or "cpu".
        rendezvous: Path of a file that does not exist yet, for a process group of this process.

    Returns:
        "errors": for each form and dtype, the relative errors by name. "milliseconds": of forward and
        backward in bf16, by form. The form "kernels" is there where the layer takes them.
    """
    found: dict[str, Any] = {"errors": {}}
    with benchmarking.group_of_one(device, rendezvous):
        layers = {name: _layer(SIZES[device], dtype) for name, dtype in DTYPES.items()}
        for dtype, layer in layers.items():
            inputs = _inputs(SIZES[device], SIZES[device].records, device, DTYPES[dtype])
            definition = functools.partial(token_by_token, layer)
            exact = _run(definition, layer, inputs, torch.float64)
            for form, mix in _forms(layer, inputs["qkv"]).items():
                outcome = _run(mix, layer, inputs, DTYPES[dtype])
                found["errors"][f"{form}, {dtype}"] = {
                    name: float((outcome[name] - truth).norm() / truth.norm())
                    for name, truth in exact.items()
                }
        inputs = _inputs(SIZES[device], SIZES[device].timed, device, torch.bfloat16)
        found["milliseconds"] = {
            form: 1e3
            * _seconds(functools.partial(_run, mix, layers["bf16"], inputs, torch.bfloat16))
            for form, mix in _forms(layers["bf16"], inputs["qkv"]).items()
        }
    return found


def _layer(sizes: DeltaNetSizes, dtype: torch.dtype) -> Any:
    """Return a layer with random weights on this process's device."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_profit.models.layer_specs import _local_block_spec

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.key_heads,
        normalization="RMSNorm",
        activation_func=F.silu,
        add_bias_linear=False,
        transformer_impl="local",
        experimental_attention_variant="gated_delta_net",
        linear_attention_freq=[1],
        linear_num_key_heads=sizes.key_heads,
        linear_num_value_heads=sizes.value_heads,
        linear_key_head_dim=sizes.head,
        linear_value_head_dim=sizes.head,
        linear_conv_kernel_dim=4,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )
    (layer,) = _local_block_spec(config, None).layer_specs
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return build_module(
        layer.submodules.self_attention, config=config, layer_number=1, pg_collection=groups
    )


def _forms(layer: Any, qkv: Tensor) -> dict[str, Callable[..., Tensor]]:
    """Return the layer's forms of the rule that take this tensor."""
    forms = {"plain": layer._mix_plainly}
    if layer._has_kernels(qkv):
        forms["kernels"] = layer._mix_with_kernels
    return forms


def _inputs(
    sizes: DeltaNetSizes,
    records: tuple[tuple[int, ...], ...],
    device: str,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return qkv, decay and beta [S, B, ...], the upstream gradient, the positions and the records."""
    from megatron_profit.models.record_spans import RecordSpans, record_bounds

    generator = torch.Generator(device).manual_seed(0)
    shape = sum(records[0]), len(records)

    def random(*features: int) -> Tensor:
        return torch.randn(*shape, *features, generator=generator, device=device)

    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in records])
    features = (2 * sizes.key_heads + sizes.value_heads) * sizes.head
    return {
        "qkv": random(features).to(dtype),
        "decay": -0.3 * F.softplus(random(sizes.value_heads)),  # states that last for some tokens
        "beta": random(sizes.value_heads).sigmoid().to(dtype),
        "upstream": random(sizes.value_heads, sizes.head).transpose(0, 1).to(dtype),
        "positions": positions.to(device),
        "rows": RecordSpans.of(
            record_bounds(positions), (len(records), shape[0]), torch.device(device), 1, 0
        ),
    }


def _run(
    mix: Callable[..., Tensor], layer: Any, inputs: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return a form's output and gradients in fp64; its floating inputs are in `dtype`, or fp64's own."""
    exact = dtype == torch.float64
    given = [
        inputs[name].detach().to(dtype if exact else inputs[name].dtype, copy=True).requires_grad_()
        for name in ("qkv", "decay", "beta")
    ]
    layer.zero_grad(set_to_none=True)
    last = inputs["positions"] if exact else inputs["rows"]
    output = mix(*given, last)
    output.backward(inputs["upstream"].to(output.dtype))
    gradients = [*(tensor.grad for tensor in given), layer.conv1d.weight.grad]
    return {"output": output.detach().double()} | {
        f"gradient of {name}": gradient.double()
        for name, gradient in zip(GRADIENTS, gradients, strict=True)
    }


def token_by_token(
    layer: Any, qkv: Tensor, decay: Tensor, beta: Tensor, positions: Tensor
) -> Tensor:
    """Return [B, S, H, K]: the definition, one token after the other, in the dtype of `qkv`.

    Args:
        layer: Gives the convolution's weights and the numbers of heads.
        qkv: [S, B, D].
        decay: [S, B, H], the logarithm of what a token leaves of the state.
        beta: [S, B, H].
        positions: [B, S], of each token in its record.
    """
    length, weight = len(qkv), layer.conv1d.weight.squeeze(1).to(qkv.dtype)
    heads, size = layer.num_value_heads, layer.key_head_dim
    mixed = torch.zeros_like(qkv)
    for back in range(weight.size(1)):
        earlier = F.pad(qkv, (0, 0, 0, 0, back, 0))[:length]
        own = (positions.t() >= back)[..., None]
        mixed = mixed + torch.where(own, earlier, 0.0) * weight[:, -1 - back]
    keys = layer.num_key_heads * size
    query, key, value = F.silu(mixed).split([keys, keys, heads * size], dim=-1)
    query, key = (_unit_heads(part, heads, size) for part in (query, key))
    value = value.unflatten(-1, (heads, size))
    state = qkv.new_zeros(qkv.size(1), heads, size, size)
    outputs = []
    for t in range(length):
        # A record begins with an empty state.
        left = torch.where(positions[:, t, None] == 0, 0.0, decay[t].exp())
        state = left[..., None, None] * state
        new = beta[t, ..., None] * (value[t] - torch.einsum("bhkv,bhk->bhv", state, key[t]))
        state = state + key[t, ..., None] * new[..., None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[t]) * size**-0.5)
    return torch.stack(outputs, dim=1)


def _unit_heads(x: Tensor, heads: int, size: int) -> Tensor:
    """Return [S, B, heads, size] of the key heads [S, B, …], each repeated for its value heads."""
    x = x.unflatten(-1, (-1, size))
    x = x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    return x.repeat_interleave(heads // x.size(2), dim=2)


def _seconds(run: Callable[[], Any]) -> float:
    """Return the median seconds of a run, after one that compiles and tunes."""
    seconds = []
    for _ in range(_ROUNDS + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return median(seconds[1:])
