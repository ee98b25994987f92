"""What is done with weights as numpy arrays: NaN and infinity, other dtypes, columns, strides.

A module of its own, imported where it is needed, because numpy takes longer to import than everything
else; a conversion that keeps the dtype and moves whole rows does not need it.
"""

from __future__ import annotations

import numpy as np

from checkpoint_conversion.engine.dtypes import BF16, F16, F32, DType
from checkpoint_conversion.errors import ConversionError


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
    count = int(np.count_nonzero((bits & bits.dtype.type(dtype.infinity)) == dtype.infinity))
    if count:
        raise ConversionError(
            f"{name} holds NaN or infinity ({count} or more values); the weights are broken. Convert "
            "without --check-finite to keep them as they are"
        )


def deliver(
    data: memoryview,
    source: DType,
    into: memoryview,
    target: DType,
    name: str,
    finite: bool,
) -> None:
    """Put values into a buffer in another dtype, after a look at them.

    Args:
        data: The values; `into` itself where the dtype stays.
        name: File and tensor, for messages.
        finite: Refuse NaN and infinity.

    Raises:
        ConversionError: As `check_finite` and `converted`.
    """
    if finite:
        check_finite(data, source, name)
    if source != target:
        into[:] = converted(data, source, target, name)


def put_columns(data: memoryview, into: memoryview, rows: int, left: int, dtype: DType) -> None:
    """Put a matrix into a wider one of as many rows, from column `left` on."""
    part = np.frombuffer(data, dtype.bits).reshape(rows, -1)
    whole = np.frombuffer(into, dtype.bits).reshape(rows, -1)
    whole[:, left : left + part.shape[1]] = part


def put_strided(
    storage: memoryview,
    first: int,
    strides: tuple[int, int],
    into: memoryview,
    rows: int,
    dtype: DType,
) -> None:
    """Put a matrix together from element `first` of a storage on, with strides in elements."""
    elements = np.frombuffer(storage, dtype.bits)[first:]
    whole = np.frombuffer(into, dtype.bits).reshape(rows, -1)
    row, column = (stride * dtype.itemsize for stride in strides)
    whole[...] = np.lib.stride_tricks.as_strided(elements, whole.shape, (row, column))


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
