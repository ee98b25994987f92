"""Batched decoding with transformers: prompts padded on the left, rows leave when they end, and others join.

Shape suffixes: B rows, T tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from megatron_profit.evaluation.engines.row_cache import RowCache
from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.evaluation.sampling import Sampling


@dataclass(eq=False)
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


class _Batch:
    """Rows that are decoded together.

    Rows with the same prompt share its forward pass.

    Args:
        model: A causal language model.
        rows: Rows without new tokens.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[Row]) -> None:
        prompts = list(dict.fromkeys(tuple(row.prompt) for row in rows))
        self.model, self.rows, self.cache = model, list(rows), RowCache(model)
        ids_BT, self.mask_BT = _padded(prompts, model.device)
        positions_BT = (self.mask_BT.cumsum(1) - 1).clamp(min=0)
        self._forward(ids_BT, positions_BT)
        self.position_B = positions_BT[:, -1]
        if len(prompts) < len(rows):
            self._select([prompts.index(tuple(row.prompt)) for row in rows])

    def _forward(self, ids_BT: Tensor, positions_BT: Tensor) -> None:
        output = self.model(
            input_ids=ids_BT,
            attention_mask=self.mask_BT,
            position_ids=positions_BT,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits_BV = last_logits(output.logits)

    def _select(self, indices: Sequence[int]) -> None:
        kept = torch.tensor(indices, dtype=torch.long, device=self.mask_BT.device)
        self.cache.batch_select_indices(kept)
        self.mask_BT, self.position_B = self.mask_BT[kept], self.position_B[kept]
        self.logits_BV = self.logits_BV[kept]

    def join(self, other: _Batch) -> None:
        """Take the rows of another batch, and drop the columns that no row uses any more."""
        unused = int(self.mask_BT.any(0).int().argmax())
        length = max(self.mask_BT.size(1) - unused, other.mask_BT.size(1))
        self.cache.join(other.cache, length)
        self.mask_BT = torch.cat([_of_length(b.mask_BT, length) for b in (self, other)])
        self.position_B = torch.cat([self.position_B, other.position_B])
        self.logits_BV = torch.cat([self.logits_BV, other.logits_BV])
        self.rows += other.rows

    def draw(self, sampling: Sampling, stop_ids: frozenset[int]) -> list[Row]:
        """Draw a token of each row; return the rows that are finished, which leave."""
        new_B = draw(self.logits_BV, [row.numbers for row in self.rows], sampling)
        for row, token in zip(self.rows, new_B.tolist(), strict=True):
            row.ids.append(token)
            row.stopped = token in stop_ids
        ended = [row for row in self.rows if row.stopped or len(row.ids) >= row.longest]
        if ended:
            going_on = [i for i, row in enumerate(self.rows) if row not in ended]
            self.rows = [self.rows[i] for i in going_on]
            self._select(going_on)
        return ended

    def step(self) -> None:
        """Run the model on the last tokens."""
        last = torch.tensor([[row.ids[-1]] for row in self.rows], device=self.mask_BT.device)
        self.mask_BT = pad(self.mask_BT, (0, 1), value=1)
        self.position_B = self.position_B + 1
        self._forward(last, self.position_B[:, None])


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    rows: Iterable[Row],
    most: int,
    sampling: Sampling,
    stop_ids: frozenset[int],
) -> Iterator[Row]:
    """Fill the rows with new tokens, and yield each one when it is finished.

    The next rows join as soon as a quarter of the batch is free.

    Args:
        model: A causal language model.
        rows: All rows, in the order in which they begin.
        most: Rows at a time.
        sampling: How tokens are drawn.
        stop_ids: Tokens that end an answer.
    """
    waiting = deque(rows)
    while waiting:
        batch = _Batch(model, _first(waiting, most))
        while batch.rows:
            yield from batch.draw(sampling, stop_ids)
            if batch.rows:
                batch.step()
                free = most - len(batch.rows)
                if waiting and batch.cache.joinable and free >= max(most // 4, 1):
                    batch.join(_Batch(model, _first(waiting, free)))


def _first(waiting: deque[Row], most: int) -> list[Row]:
    return [waiting.popleft() for _ in range(min(most, len(waiting)))]


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids [B, T] and mask [B, T] of prompts, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _of_length(mask_BT: Tensor, length: int) -> Tensor:
    """Return the last columns of a mask, with empty ones on the left where it is shorter."""
    return pad(mask_BT[:, -length:], (max(0, length - mask_BT.size(1)), 0))


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
