"""Weights as torch tensors, for training and for `verify`. A conversion does not import torch."""

from __future__ import annotations

import torch

from checkpoint_conversion.engine.dtypes import DTYPES, TORCH_DTYPES, DType
from checkpoint_conversion.engine.raw_files import OpenFiles
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf.chunks import TensorChunk
from checkpoint_conversion.hf.source import Weights

TORCH = {name: getattr(torch, dtype.torch) for name, dtype in DTYPES.items()}


def read_chunk(
    source: Weights, chunk: TensorChunk, dtype: torch.dtype, files: OpenFiles
) -> torch.Tensor:
    """Read the values of a chunk in a dtype; shape `chunk.sizes`.

    Raises:
        ConversionError: When a value is outside the range of the dtype, or a file was truncated.
    """
    result = torch.empty(chunk.sizes, dtype=dtype)
    source.read_into(chunk, from_torch(dtype), tensor_bytes(result), files)
    return result


def from_torch(dtype: torch.dtype) -> DType:
    """Return the dtype of this package.

    Raises:
        ConversionError: For a dtype that weights do not have.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in TORCH_DTYPES:
        raise ConversionError(f"{dtype} is not supported; {', '.join(TORCH_DTYPES)} are")
    return TORCH_DTYPES[name]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Return the tensor in another dtype; the same object when it has that dtype already.

    Raises:
        ConversionError: When a finite value is outside the range of the dtype.
    """
    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    wider = torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max
    if not (wider or result.isfinite().all() or torch.equal(result.isfinite(), tensor.isfinite())):
        largest = tensor[tensor.isfinite()].abs().max().item()
        raise ConversionError(
            f"{name} holds {largest:g}, more than {dtype} can ({torch.finfo(dtype).max:g}); "
            "choose another --dtype"
        )
    return result
