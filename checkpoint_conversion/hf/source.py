"""A model that is written to a HuggingFace folder, from any source of values.

A Megatron checkpoint is one. A transform of weights on export is another: it wraps a source, changes the
values of each chunk as it is read, and so streams like the source itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from checkpoint_conversion.engine.dtypes import DType
from checkpoint_conversion.engine.raw_files import OpenFiles
from checkpoint_conversion.families import TensorRule
from checkpoint_conversion.hf.chunks import TensorChunk


class Weights(Protocol):
    """A reader of chunks: a HuggingFace model, a PEFT folder or a Megatron checkpoint."""

    def read_into(
        self,
        chunk: TensorChunk,
        dtype: DType,
        into: memoryview,
        files: OpenFiles,
        finite: bool = False,
    ) -> None:
        """Read the values of a chunk in a dtype, as bytes, into a buffer of its size."""


class ModelSource(Weights, Protocol):
    """The tensors of a whole model."""

    @property
    def folder(self) -> Path:
        """The folder that they are read from."""

    @property
    def rules(self) -> tuple[TensorRule, ...]:
        """The name table."""

    @property
    def dtypes(self) -> Mapping[str, DType]:
        """The dtype of each tensor, by key."""

    @property
    def padding(self) -> int:
        """Rows that pad the vocabulary; they are not read."""

    def chunks(self, rule: TensorRule) -> Iterator[TensorChunk]:
        """Return the chunks in which to read a tensor."""

    def check_rest(self, files: OpenFiles) -> None:
        """Check the parts of the files that no chunk has read."""
