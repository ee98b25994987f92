"""Operations on weights as numpy arrays: NaN and infinity, other dtypes, columns, strides.

This is a module of its own and imported only where it is needed, because numpy takes longer to import
than all other modules. A conversion that keeps the dtype and moves whole rows does not need it.
"""

from __future__ import annotations

import numpy as np

from checkpoint_conversion.engine.dtypes import BF16, F16, F32, DType
from checkpoint_conversion.errors import ConversionError


def converted(data: memoryview, source: DType, target: DType, name: str) -> memoryview:
    """Return the values in another dtype, rounded to the nearest, ties to even.

    Returns `data` itself if it has that dtype already.

    Raises:
        ConversionError: When a finite value is outside the range of the dtype; the message names the
            tensor.
    """
    if source == target:
        return data
    values = as_float32(data, source)
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
        ConversionError: Names the tensor, and how many of its values are affected.
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
    """Put values into a buffer in another dtype, after the checks that are asked for.

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
    """Put a matrix into a wider one with the same number of rows, from column `left` on."""
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
    """Assemble a matrix from a storage, from element `first` on, with strides in elements."""
    elements = np.frombuffer(storage, dtype.bits)[first:]
    whole = np.frombuffer(into, dtype.bits).reshape(rows, -1)
    row, column = (stride * dtype.itemsize for stride in strides)
    whole[...] = np.lib.stride_tricks.as_strided(elements, whole.shape, (row, column))


def as_float32(data: memoryview, source: DType) -> np.ndarray:
    """Return values as a flat float32 array, which may be a view of the bytes."""
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
    # Ties round to even: add half of the part that is cut off, or just less if the result is even.
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    # A NaN stays a NaN, whichever of its bits are cut off.
    return np.where(np.isnan(values), (bits >> 16) | np.uint32(0x40), rounded).astype(np.uint16)
