"""The `--dtype` option."""

from __future__ import annotations

import torch

from checkpoint_conversion.errors import ConversionError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHOICES = ("source", *DTYPES)


def chosen_dtype(choice: str) -> torch.dtype | None:
    """The dtype to write; None for "source", the dtype that each tensor has.

    Raises:
        ConversionError: For an unknown choice.
    """
    if choice not in CHOICES:
        raise ConversionError(f"dtype {choice!r} is not one of {', '.join(CHOICES)}")
    return DTYPES.get(choice)


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The tensor in another dtype; the same object when it has that dtype already.

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
