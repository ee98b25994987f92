"""The dtypes of weights, and changes from one to another, on raw bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from checkpoint_conversion.errors import ConversionError


@dataclass(frozen=True)
class DType:
    """A dtype of weights.

    Attributes:
        name: The name that safetensors uses.
        torch: The name in torch.
        itemsize: Bytes of an element.
        bits: numpy's unsigned integer of that size.
        largest: The largest finite value.
        infinity: The bits of positive infinity: those of the exponent.
    """

    name: str
    torch: str
    itemsize: int
    bits: type[np.unsignedinteger]
    largest: float
    infinity: int

    def __str__(self) -> str:
        return self.torch


F32 = DType("F32", "float32", 4, np.uint32, 3.4028234663852886e38, 0x7F800000)
BF16 = DType("BF16", "bfloat16", 2, np.uint16, 3.3895313892515355e38, 0x7F80)
F16 = DType("F16", "float16", 2, np.uint16, 65504.0, 0x7C00)
# By the names that safetensors, torch and the `--dtype` option use.
DTYPES = {dtype.name: dtype for dtype in (F32, BF16, F16)}
TORCH_DTYPES = {dtype.torch: dtype for dtype in DTYPES.values()}
_CHOSEN = {"fp32": F32, "bf16": BF16, "fp16": F16}
CHOICES = ("source", *_CHOSEN)


def chosen_dtype(choice: str) -> DType | None:
    """The dtype to write; None for "source", the dtype that each tensor has.

    Raises:
        ConversionError: For an unknown choice.
    """
    if choice not in CHOICES:
        raise ConversionError(f"dtype {choice!r} is not one of {', '.join(CHOICES)}")
    return _CHOSEN.get(choice)


def converted(data: memoryview, source: DType, target: DType, name: str) -> memoryview:
    """The values in another dtype, rounded to the nearest, ties to even; `data` itself when it has
    that dtype already.

    Raises:
        ConversionError: When a finite value is outside the range of the dtype; names the tensor.
    """
    if source == target:
        return data
    values = _as_float32(data, source)
    with np.errstate(over="ignore", invalid="ignore"):
        bits = _from_float32(values, target)
    if target.largest < source.largest:
        overflown = np.isfinite(values) & ((bits & target.infinity) == target.infinity)
        if overflown.any():
            largest = np.abs(values[np.isfinite(values)]).max()
            raise ConversionError(
                f"{name} holds {largest:g}, more than {target} can ({target.largest:g}); "
                "choose another --dtype"
            )
    return memoryview(bits).cast("B")


def check_finite(data: memoryview, dtype: DType, name: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        ConversionError: Naming the tensor and how many of its values are affected.
    """
    bits = np.frombuffer(data, dtype.bits)
    count = int(np.count_nonzero((bits & dtype.bits(dtype.infinity)) == dtype.infinity))
    if count:
        raise ConversionError(
            f"{name} holds NaN or infinity ({count} or more values); the weights are broken. Convert "
            "without --check-finite to keep them as they are"
        )


def _as_float32(data: memoryview, source: DType) -> np.ndarray:
    bits = np.frombuffer(data, source.bits)
    if source == BF16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float32 if source == F32 else np.float16).astype(np.float32)


def _from_float32(values: np.ndarray, target: DType) -> np.ndarray:
    if target == F32:
        return np.ascontiguousarray(values).view(np.uint32)
    if target == F16:
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    # Adding half of what is cut off, or just less where the result is even, rounds ties to even.
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    # A NaN stays a NaN, whichever bits of it are cut off.
    return np.where(np.isnan(values), (bits >> 16) | np.uint32(0x40), rounded).astype(np.uint16)
