"""Batched decoding with transformers: prompts padded on the left, rows that end leave the batch.

Shape suffixes: B rows, T tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.evaluation.sampling import Sampling

_BLOCK = 128


@dataclass
class Row:
    """One answer in the making.

    Attributes:
        prompt: Token ids of the prompt.
        longest: Most new tokens.
        numbers: Random numbers of its draws.
        ids: New token ids.
        stopped: Whether the model ended it.
    """

    prompt: Sequence[int]
    longest: int
    numbers: random.Random
    ids: list[int] = field(default_factory=list)
    stopped: bool = False


class _BlockLayer(DynamicLayer):
    """Keys and values of a layer in a buffer that grows by blocks: no copy of all tokens at every step."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple:
        """Append keys and values [B, heads, new, size]; return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.length, self.buffers = 0, [key_states[:, :, :0], value_states[:, :, :0]]
        end = self.length + key_states.size(2)
        for i, new in enumerate((key_states, value_states)):
            if end > self.buffers[i].size(2):
                shape = (*new.shape[:2], end + _BLOCK, new.size(3))
                larger = new.new_empty(shape)
                larger[:, :, : self.length] = self.buffers[i][:, :, : self.length]
                self.buffers[i] = larger
            self.buffers[i][:, :, self.length : end] = new
        self.length = end
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)


def _cache(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [
        _BlockLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


@torch.no_grad()
def decode(
    model: PreTrainedModel, rows: Sequence[Row], sampling: Sampling, stop_ids: frozenset[int]
) -> Iterator[Row]:
    """Fill the rows with new tokens, and yield each one when it is finished.

    Rows with the same prompt share its forward pass.

    Args:
        model: A causal language model.
        rows: The batch.
        sampling: How tokens are drawn.
        stop_ids: Tokens that end an answer.
    """
    prompts = list(dict.fromkeys(tuple(row.prompt) for row in rows))
    which = torch.tensor([prompts.index(tuple(row.prompt)) for row in rows], device=model.device)
    ids_BT, mask_BT = _padded(prompts, model.device)
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    cache = _cache(model)
    logits_BV = _next_logits(model, ids_BT, mask_BT, positions_BT, cache)
    if len(prompts) < len(rows):
        cache.batch_select_indices(which)
        logits_BV, mask_BT, positions_BT = logits_BV[which], mask_BT[which], positions_BT[which]
    active, position_B = list(rows), positions_BT[:, -1]
    while True:
        new_B = draw(logits_BV, [row.numbers for row in active], sampling)
        for row, token in zip(active, new_B.tolist(), strict=True):
            row.ids.append(token)
            row.stopped = token in stop_ids
        going_on = [
            i for i, row in enumerate(active) if not row.stopped and len(row.ids) < row.longest
        ]
        if len(going_on) < len(active):
            yield from (row for i, row in enumerate(active) if i not in going_on)
            if not going_on:
                return
            kept = torch.tensor(going_on, device=model.device)
            cache.batch_select_indices(kept)
            new_B, mask_BT, position_B = new_B[kept], mask_BT[kept], position_B[kept]
            active = [active[i] for i in going_on]
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(active), 1)], dim=1)
        position_B = position_B + 1
        logits_BV = _next_logits(model, new_B[:, None], mask_BT, position_B[:, None], cache)


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids [B, T] and mask [B, T] of prompts, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _next_logits(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache
) -> Tensor:
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return last_logits(output.logits)


def last_logits(logits: Tensor) -> Tensor:
    """Return the logits [B, V] of the last position of [B, T, V] in float32.

    Raises:
        EvaluationError: One is NaN.
    """
    logits = logits[:, -1].float()
    if logits.isnan().any():
        raise EvaluationError(
            "the model's logits are NaN, so it cannot answer; check its weights, or give --dtype float32"
        )
    return logits


def probabilities(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return probabilities and token ids [..., V or top-k] in falling order, as the settings cut them.

    Temperature comes first, then top-k, then top-p, as in transformers and vLLM.
    """
    scaled = logits / sampling.temperature
    if sampling.top_k:
        top, ids = scaled.topk(min(sampling.top_k, scaled.size(-1)), dim=-1)
    else:
        top, ids = scaled.sort(dim=-1, descending=True)
    prob = top.softmax(dim=-1)
    before = prob.cumsum(-1) - prob
    prob = prob.masked_fill(before >= sampling.top_p, 0.0)
    return prob / prob.sum(-1, keepdim=True), ids


def draw(logits_BV: Tensor, numbers: Sequence[random.Random], sampling: Sampling) -> Tensor:
    """Return the next tokens [B] of logits [B, V]; each row has its own random numbers."""
    if sampling.is_greedy:
        return logits_BV.argmax(dim=-1)
    prob, ids = probabilities(logits_BV, sampling)
    uniform = torch.tensor([row.random() for row in numbers], device=prob.device)
    chosen = torch.searchsorted(prob.cumsum(-1), uniform[:, None].to(prob.dtype), right=True)
    # A sum of probabilities may fall short of 1 by rounding.
    last = (prob > 0).sum(-1, keepdim=True) - 1
    return ids.gather(-1, chosen.minimum(last)).squeeze(-1)
