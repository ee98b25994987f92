"""Activations of a Gated DeltaNet, with the kernels of flash-linear-attention and in plain torch.

Counted tensor by tensor. Sizes are of a position: keys is the size of all keys, values of all values, and a
head is a value head. Chunks have 64 positions.
"""

from __future__ import annotations

from megatron_profit.estimates.run_shape import RunShape

_CHUNK = 64
_FP32 = 4


def kept_bytes(run: RunShape) -> int:
    """Return the bytes that the layer keeps of a micro-batch, without its input."""
    heads, keys, values = _sizes(run)
    repeated = heads * run.args.linear_key_head_dim
    per_head = _state_of_chunk(run) // _CHUNK
    if run.has_state_kernels:
        # The convolution's input, the keys and queries that have unit length, their copies for each value
        # head, values, the triangular system of a chunk, outputs, the whole projection with the gate, and
        # the gated outputs.
        numbers = (2 * keys + values) + 2 * keys + 2 * repeated + values + _CHUNK * heads
        numbers += values + _projection(run) + values + heads
        exact = 2 * heads + 2 * run.args.linear_num_key_heads // run.tp
        return run.tokens * (numbers * run.bytes_per_number + exact * _FP32)
    # The state, its parts and the norm are in fp32: input and output of the convolution, nine tensors like
    # the repeated keys, eight like the values, six matrices and a state of each chunk.
    exact = 6 * keys + 9 * repeated + 8 * values + heads * (6 * _CHUNK + 8) + heads * per_head
    return run.tokens * (exact * _FP32 + 4 * values * run.bytes_per_number)


def norm_bytes(run: RunShape) -> int:
    """Return the bytes that `--recompute-modules gdn_norm_out` saves of a micro-batch."""
    heads, _, values = _sizes(run)
    if run.has_state_kernels:
        return run.tokens * (values * run.bytes_per_number + heads * _FP32)
    # The whole projection is kept for its gate.
    kept = (_projection(run) - values) * run.bytes_per_number
    return run.tokens * ((4 * values + heads) * _FP32 - kept)


def working_bytes(run: RunShape) -> int:
    """Return the bytes of the rule's backward pass: the states of all chunks, and the gradients."""
    heads, _, values = _sizes(run)
    repeated = heads * run.args.linear_key_head_dim
    number = run.bytes_per_number if run.has_state_kernels else _FP32
    states = 2 * heads * _state_of_chunk(run) // _CHUNK
    return run.tokens * (5 * (repeated + values) + states) * number


def _sizes(run: RunShape) -> tuple[int, int, int]:
    """Return value heads, keys and values on this rank."""
    heads = run.args.linear_num_value_heads // run.tp
    return heads, run.state_keys // run.tp, run.state_values // run.tp


def _projection(run: RunShape) -> int:
    """Return the size of the input projection's output: queries, keys, values, gate, beta and alpha."""
    heads, keys, values = _sizes(run)
    return 2 * keys + 2 * values + 2 * heads


def _state_of_chunk(run: RunShape) -> int:
    """Return the numbers of a head's state, which is kept for each chunk."""
    return run.args.linear_key_head_dim * run.args.linear_value_head_dim
