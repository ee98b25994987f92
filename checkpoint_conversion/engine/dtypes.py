"""The dtypes of weights. Operations on their values are in `values`, which needs numpy."""

from __future__ import annotations

from dataclasses import dataclass

from checkpoint_conversion.errors import ConversionError


@dataclass(frozen=True)
class DType:
    """A dtype of weights.

    Attributes:
        name: The name that safetensors uses.
        torch: The name in torch.
        itemsize: Bytes of an element.
        bits: The name of numpy's unsigned integer of that size.
        largest: The largest finite value.
        infinity: The bits of positive infinity, which are the exponent's bits.
    """

    name: str
    torch: str
    itemsize: int
    bits: str
    largest: float
    infinity: int

    def __str__(self) -> str:
        return self.torch


F32 = DType("F32", "float32", 4, "uint32", 3.4028234663852886e38, 0x7F800000)
BF16 = DType("BF16", "bfloat16", 2, "uint16", 3.3895313892515355e38, 0x7F80)
F16 = DType("F16", "float16", 2, "uint16", 65504.0, 0x7C00)
# By the names that safetensors, torch and the `--dtype` option use.
DTYPES = {dtype.name: dtype for dtype in (F32, BF16, F16)}
TORCH_DTYPES = {dtype.torch: dtype for dtype in DTYPES.values()}
_CHOSEN = {"fp32": F32, "bf16": BF16, "fp16": F16}
CHOICES = ("source", *_CHOSEN)


def chosen_dtype(choice: str) -> DType | None:
    """Return the dtype to write; None for "source", which keeps each tensor's dtype.

    Raises:
        ConversionError: For an unknown choice.
    """
    if choice not in CHOICES:
        raise ConversionError(f"dtype {choice!r} is not one of {', '.join(CHOICES)}")
    return _CHOSEN.get(choice)
