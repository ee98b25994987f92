"""Random numbers that depend on the token alone, not on the process.

A generator's state depends on how a batch is split over ranks and micro-batches. A hash of (seed, sample,
position) does not: every layout, and every rank of a tensor-parallel group, draws the same number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
_MASK_64 = (1 << 64) - 1


def _signed(value: int) -> int:
    """Return the int64 with the same 64 bits as ``value`` modulo 2**64."""
    value &= _MASK_64
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FACTOR_1 = _signed(0xBF58476D1CE4E5B9)
_FACTOR_2 = _signed(0x94D049BB133111EB)


def token_uniform(seed: int, draw_index: Tensor, position: Tensor) -> Tensor:
    """Return a random number in [0, 1) for each token, a function of seed, sample and position only.

    SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"),
    nested: the sample selects a stream of the seed, the position a number in that stream.

    Args:
        seed: any integer; taken modulo 2**64.
        draw_index: [...] int64, global index of the sample. For fresh numbers in each epoch,
            change the seed.
        position: [...] int64, position of the token in its sample; broadcasts against
            ``draw_index``.

    Returns:
        [...] float32, multiples of 2**-24, the same on every device.

    Raises:
        ValueError: an index is not int64.
    """
    import torch

    for name, index in (("draw_index", draw_index), ("position", position)):
        if index.dtype != torch.int64:
            raise ValueError(f"{name} is {index.dtype}; pass int64 (.long()).")
    stream = _mix(torch.full_like(draw_index, _signed(seed)) + _GAMMA)
    stream = _mix(stream + (draw_index + 1) * _GAMMA)
    bits = _mix(stream + (position + 1) * _GAMMA)
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def _mix(bits: Tensor) -> Tensor:
    """Apply the SplitMix64 finalizer to int64, whose products wrap around modulo 2**64."""
    bits = (bits ^ _shift_right(bits, 30)) * _FACTOR_1
    bits = (bits ^ _shift_right(bits, 27)) * _FACTOR_2
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Shift right logically.

    torch's own shift is arithmetic, so the copies of the sign bit are masked off.
    """
    return (bits >> count) & (_MASK_64 >> count)
