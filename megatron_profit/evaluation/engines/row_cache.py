"""A cache of transformers whose rows may leave and join while the others go on.

The tokens of all rows end in the same column. Columns before a shorter row are empty; a mask hides them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

_BLOCK = 128
# The class of layers that have states alone. transformers 4.57 has no such layers.
_STATES_ALONE = "LinearAttentionLayer"
_STATES_IN_MODULES = "recurrent_gemma"


class _Block(DynamicLayer):
    """Keys and values of a layer in a buffer that grows by blocks: no copy of all tokens at every step."""

    is_initialized: bool
    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple:
        """Append keys and values [B, heads, new, size]; return all of them."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
            self.length, self.buffers = 0, [key_states[:, :, :0], value_states[:, :, :0]]
        end = self.length + key_states.size(2)
        if end > self.buffers[0].size(2):
            longer = (0, 0, 0, end - self.length + _BLOCK)
            self.buffers = [pad(buffer[:, :, : self.length], longer) for buffer in self.buffers]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = new
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self._show(self.length)

    def join(self, other: _Block, length: int) -> None:
        """Append the rows of another layer; both keep their last columns, `length` of them."""
        pairs = zip(self._aligned(length), other._aligned(length), strict=True)
        self.buffers = [torch.cat(pair) for pair in pairs]
        self._show(length)

    def _aligned(self, length: int) -> list[Tensor]:
        used = min(self.length, length)
        room = (0, 0, length - used, _BLOCK)
        return [pad(b[:, :, self.length - used : self.length], room) for b in self.buffers]

    def _show(self, length: int) -> None:
        self.length = length
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)


class RowCache(DynamicCache):
    """The cache of a batch.

    Args:
        model: A causal language model.

    Attributes:
        joinable: Whether rows may join. Not so for layers of other kinds, for example with a sliding window.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(config=model.config)
        self.layers: list[Any] = [
            _Block() if type(layer) is DynamicLayer else layer for layer in self.layers
        ]
        kinds = {type(layer).__name__ for layer in self.layers}
        self.joinable = kinds <= {_Block.__name__, _STATES_ALONE}

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        for layer in self.layers:
            # `batch_select_indices` is of attention alone: it would leave the states as they are.
            has_states = hasattr(layer, "recurrent_states")
            (layer.reorder_cache if has_states else layer.batch_select_indices)(indices)

    def join(self, other: RowCache, length: int) -> None:
        """Append the rows of another cache; all keep their last columns, `length` of them."""
        for own, further in zip(self.layers, other.layers, strict=True):
            if isinstance(own, _Block):
                own.join(further, length)
            else:
                _join_states(own, further)


def _join_states(layer: Any, other: Any) -> None:
    """Append the rows of another layer to the states of one, whose size does not depend on the tokens."""
    for name in ("conv_states", "recurrent_states"):
        states, further = getattr(layer, name), getattr(other, name)
        states.update((i, torch.cat([s, further[i]])) for i, s in states.items() if s is not None)


def keeps_its_state(model: Any) -> bool:
    """Return whether all that a model remembers is in the cache that it is given.

    Mamba ignores `past_key_values`, RecurrentGemma has states in its modules, and MiniMax-Text a cache of its
    own. Their answers would follow from a part of the text, or from another row's.
    """
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return False
    return model._supports_default_dynamic_cache() and model.config.model_type != _STATES_IN_MODULES
