"""The gated delta rule in plain torch, for machines without the kernels of flash-linear-attention.

A head keeps a state S [K, V], which is 0 before the first token (Gated Delta Networks, arXiv:2412.06464):

    u_t = beta_t (v_t - exp(g_t) S_{t-1}' k_t)
    S_t = exp(g_t) S_{t-1} + k_t u_t'
    o_t = S_t' q_t / sqrt(K)

Tokens are taken in chunks. In a chunk that begins with the state S, with G the running sum of g, all u
follow from one triangular system, so that a loop over the chunks is left:

    u_i + beta_i sum_{j<i} exp(G_i - G_j) (k_i . k_j) u_j = beta_i (v_i - exp(G_i) S' k_i)

Shape suffixes: N records, L tokens of each, C tokens of a chunk, H value heads, K and V sizes of a key and a
value.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# The chunk of flash-linear-attention and of transformers.
_CHUNK = 64
# Under the root of a key's length, as there.
_EPSILON = 1e-6


def delta_net(
    qkv: Tensor, weight: Tensor, decay: Tensor, beta: Tensor, key_heads: int, key_size: int
) -> Tensor:
    """Return what a layer's heads read from their states: convolution, norm and delta rule of whole records.

    Args:
        qkv: [N, L, D], queries and keys of the key heads, then values of the value heads. Padding after a
            record does not change the record.
        weight: [D, W], the causal convolution of each channel.
        decay: [N, L, H] fp32, g: the logarithm of what a token leaves of the state; at most 0.
        beta: [N, L, H], the share of the old value that a token replaces.
        key_heads: Heads of queries and keys; each serves as many value heads, one after another.
        key_size: K.

    Returns:
        [N, L, H, V] in the dtype of `qkv`.
    """
    keys = key_heads * key_size
    mixed = causal_convolution(qkv, weight)
    query, key, value = mixed.split([keys, keys, mixed.size(-1) - 2 * keys], dim=-1)
    query, key = (unit_length(t.unflatten(-1, (key_heads, key_size))) for t in (query, key))
    value = value.unflatten(-1, (decay.size(-1), -1))
    return gated_delta_rule(query, key, value, decay, beta)


def causal_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Return SiLU of the causal convolution of each channel, like `x`; computed in fp32 or better.

    Args:
        x: [N, L, D].
        weight: [D, W]; the last column is for the token itself.
    """
    length, width = x.size(1), weight.size(1)
    exact = torch.promote_types(x.dtype, torch.float32)
    padded, weight = F.pad(x, (0, 0, width - 1, 0)).to(exact), weight.to(exact)
    total = padded[:, :length] * weight[:, 0]
    for i in range(1, width):
        total = torch.addcmul(total, padded[:, i : i + length], weight[:, i])
    return F.silu(total).to(x.dtype)


def unit_length(x: Tensor) -> Tensor:
    """Return vectors [..., K] divided by their length, in fp32 or better."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (x.square().sum(-1, keepdim=True) + _EPSILON).rsqrt()


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor
) -> Tensor:
    """Return the outputs of the rule at the top of this file; the state is in fp32 or better.

    Args:
        query, key: [N, L, key heads, K].
        value: [N, L, H, V], with H a multiple of the key heads.
        decay: [N, L, H], g.
        beta: [N, L, H].

    Returns:
        [N, L, H, V] in the dtype of `value`.
    """
    length, heads = value.shape[1:3]
    size = min(_CHUNK, length)
    dtype = torch.promote_types(value.dtype, torch.float32)

    def chunks(x: Tensor) -> Tensor:
        """Return [N, H, chunks, C, ...] of [N, L, heads, ...]."""
        x = x.to(dtype).repeat_interleave(heads // x.size(2), dim=2)
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, -length % size))
        return x.unflatten(1, (-1, size)).movedim(3, 1)

    query, key, value_, decay, beta = map(chunks, (query, key, value, decay, beta))
    outputs = _chunked(query * query.size(-1) ** -0.5, key, value_, decay, beta[..., None])
    return outputs.movedim(1, 3).flatten(1, 2)[:, :length].to(value.dtype)


def _chunked(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """Return [N, H, chunks, C, V]; all inputs [N, H, chunks, C, ...]."""
    total = decay.cumsum(-1)
    later = torch.ones(total.size(-1), total.size(-1), dtype=torch.bool, device=key.device).triu(1)
    # exp(G_i - G_j) where j comes before i or is i; above the diagonal it would overflow.
    between = total[..., :, None] - total[..., None, :]
    between = between.masked_fill(later, -torch.inf).exp()
    since_start = total.exp()[..., None]
    until_end = (total[..., -1:] - total).exp()[..., None]

    # The diagonal is taken as 1.
    system = beta * (key @ key.mT) * between
    both = torch.cat([beta * value, beta * since_start * key], dim=-1)
    both = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True)
    own, of_state = both.split([value.size(-1), key.size(-1)], dim=-1)

    attention = (query @ key.mT) * between
    query, key = query * since_start, key * until_end
    kept = since_start[..., -1, :, None]
    state = value.new_zeros(*key.shape[:2], key.size(-1), value.size(-1))
    outputs = []
    for i in range(key.size(2)):
        update = own[:, :, i] - of_state[:, :, i] @ state
        outputs.append(query[:, :, i] @ state + attention[:, :, i] @ update)
        state = kept[:, :, i] * state + key[:, :, i].mT @ update
    return torch.stack(outputs, dim=2)
