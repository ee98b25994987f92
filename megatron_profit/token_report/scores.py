"""Records -> the statistics of every token under a model -> the weight that each objective gives it.

Shape suffixes: T tokens of one record, N supervised tokens of all records, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise, takewhile
from operator import eq
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_profit.data import RenderedConversation
from megatron_profit.objectives import (
    COMPUTED_STATISTICS,
    EXTERNAL_STATISTICS,
    Objective,
    StatisticsOnly,
    TokenStatistics,
    token_uniform,
)
from megatron_profit.objectives.base import KERNEL_STATISTICS
from megatron_profit.ops import linear_objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The character that a decoder writes for bytes that form no whole character.
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# A group of tokens of at least this length may be cut between whole sequences of bytes.
_LONG_GROUP = 8


@dataclass(frozen=True, eq=False)
class TokenRecord:
    """One record as a model sees it.

    Attributes:
        name: the record's place, for example "chats.jsonl:17".
        pieces: [T] text of each token, joined the record's text (see ``token_texts``).
        supervised: [T] bool, tokens that the model is trained to produce.
        statistics: [T] vectors of each token, given the tokens before it. The first token has none: its
            log-probability is NaN.
        weights: objective -> [T] float32 weight -dL/dlog p; 0 where the token is not supervised.
    """

    name: str
    pieces: tuple[str, ...]
    supervised: Tensor
    statistics: TokenStatistics
    weights: Mapping[str, Tensor]


def score_records(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Iterable[tuple[str, RenderedConversation]],
    objectives: Mapping[str, Objective],
    *,
    ref_model: PreTrainedModel | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[TokenRecord]:
    """Run a transformers model over the records, one at a time.

    Args:
        model: a causal language model with an ``lm_head``.
        tokenizer: the tokenizer of the ids, for their text.
        conversations: (name, rendered conversation) of each record.
        objectives: name -> objective.
        ref_model: frozen reference, for objectives that compare with one.
        seed: seed of objectives that draw.
        progress: called with a line of text after each record.

    Returns:
        The records, with the weights of each objective (see ``evaluate_objectives``).

    Raises:
        ValueError: an objective needs a reference and there is none, or a statistic of its own, or a
            model's logits are more than a product of hidden states and output weight.
    """
    needed = frozenset().union(*(o.needed_statistics for o in objectives.values()))
    _check_statistics(objectives, ref_model is not None)
    wanted = needed.intersection(COMPUTED_STATISTICS)
    ref_wanted = frozenset({"lower_mass"} if "ref_lower_mass" in needed else ())
    for each in (model, ref_model):
        if each is not None:
            _check_output_layer(each)
    records = []
    for number, (name, rendered) in enumerate(conversations, 1):
        ids = torch.from_numpy(rendered.ids).long()
        statistics = token_statistics(model, ids, wanted)
        if ref_model is not None:
            of_reference = token_statistics(ref_model, ids, ref_wanted)
            statistics = statistics.replaced(
                ref_log_prob=of_reference.log_prob, ref_lower_mass=of_reference.lower_mass
            )
        records.append(
            TokenRecord(
                name,
                token_texts(tokenizer, ids.tolist()),
                _with_first(torch.from_numpy(rendered.supervised)[1:], False),
                statistics,
                {},
            )
        )
        if progress is not None:
            progress(f"record {number}, {name}: {len(ids):,} tokens")
    return evaluate_objectives(records, objectives, seed=seed)


def evaluate_objectives(
    records: Sequence[TokenRecord], objectives: Mapping[str, Objective], *, seed: int = 0
) -> list[TokenRecord]:
    """Give every record the weights of the objectives.

    The supervised tokens of all records are one batch, so an objective that ranks tokens does so over all of
    them. The model serves as its own older state: the ratio of a proximal objective is 1.

    Args:
        records: records whose statistics include the ones that the objectives need.
        objectives: name -> objective.
        seed: seed of objectives that draw.
    """
    batch = _joined(records, seed)
    per_objective = {
        name: objective(batch.replaced(**objective.look_ahead(batch))).weight.float()
        for name, objective in objectives.items()
    }
    counts = [int(record.supervised.sum()) for record in records]
    parts = {name: weight.split(counts) for name, weight in per_objective.items()}
    return [
        replace(
            record,
            weights={
                name: torch.zeros(len(record.pieces)).masked_scatter(record.supervised, part[i])
                for name, part in parts.items()
            },
        )
        for i, record in enumerate(records)
    ]


def token_statistics(
    model: PreTrainedModel, ids: Tensor, wanted: frozenset[str]
) -> TokenStatistics:
    """Return the statistics [T] of the tokens ``ids`` [T] int64 of one sequence, on the CPU in fp32.

    The output layer's statistics come from ``ops.linear_objective``, as in training.
    """
    with torch.no_grad():
        ids = ids.to(model.device)
        hidden_TH = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        output = linear_objective(
            hidden_TH[:-1], model.get_output_embeddings().weight, ids[1:], StatisticsOnly(wanted)
        )
    names = ("log_prob", "softmax_prob", *sorted(wanted))
    return TokenStatistics(
        **{n: _with_first(getattr(output.statistics, n).cpu(), torch.nan) for n in names}
    )


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    """Return the text of each token, such that the joined texts are the text of all tokens.

    A character that several tokens form stands with the first of them. A token that only continues it has an
    empty text. For example, an emoji of three tokens gives the emoji and two empty texts. Bytes that never
    become a character, as where a record was cut, are shown as U+FFFD.

    Args:
        tokenizer: any kind: its decoder alone tells where a character ends.
        ids: [T] ids of one record.
    """
    if not ids:
        return ()
    decode = partial(tokenizer.batch_decode, clean_up_tokenization_spaces=False)
    texts = _texts_alone(decode, ids)
    start = 0
    while start < len(ids):
        prefixes = _group_prefixes(decode, ids, texts, start)
        texts[start : start + len(prefixes)] = _texts_of_group(prefixes)
        start += len(prefixes)
    return tuple(texts)


def _texts_alone(decode: Callable[..., list[str]], ids: Sequence[int]) -> list[str]:
    """Return [T] the text of each token alone.

    It has the space before the token that some decoders drop at the start.
    """
    distinct = list(dict.fromkeys(ids))
    alone = dict(zip(distinct, decode([[i] for i in distinct]), strict=True))
    first = alone[ids[0]]
    if not first.endswith(_UNFINISHED):
        behind = zip(distinct, decode([[ids[0], i] for i in distinct]), strict=True)
        alone |= {i: text[len(first) :] for i, text in behind if text.startswith(first)}
    return [first, *(alone[i] for i in ids[1:])]


def _group_prefixes(
    decode: Callable[..., list[str]], ids: Sequence[int], texts: Sequence[str], start: int
) -> list[str]:
    """Return the texts of the first, first two, ... tokens of the group that begins at ``start``.

    A group is the fewest tokens that end with a whole character: for most, one.
    """
    prefixes = [texts[start]]
    for end in range(start + 1, len(ids)):
        # A token that continues a character is none by itself.
        if not (prefixes[-1].endswith(_UNFINISHED) and texts[end].startswith(_UNFINISHED)):
            break
        text = decode([ids[start : end + 1]])[0]
        # A U+FFFD of the record itself never ends: a long row of them must not be one group.
        if len(prefixes) >= _LONG_GROUP and text == prefixes[-1] + texts[end]:
            break
        prefixes.append(text)
    return prefixes


def _texts_of_group(prefixes: Sequence[str]) -> list[str]:
    """Return the text of each token of a group: the characters that begin in it."""
    begun = [0]
    for prefix in prefixes:
        settled = sum(takewhile(bool, map(eq, prefix, prefixes[-1])))
        begun.append(settled + (settled < len(prefix)))
    return [prefixes[-1][a:b] for a, b in pairwise(accumulate(begun, max))]


def _check_statistics(objectives: Mapping[str, Objective], has_reference: bool) -> None:
    lacking = [n for n, o in objectives.items() if o.needs_reference]
    if lacking and not has_reference:
        raise ValueError(
            f"{', '.join(lacking)} compares with a reference model, and none was given; "
            "give one or leave the objective out"
        )
    for name, objective in objectives.items():
        known = {*KERNEL_STATISTICS, *EXTERNAL_STATISTICS, *objective.lookahead}
        if unknown := sorted(objective.needed_statistics - known):
            raise ValueError(
                f"{name} needs the statistic {', '.join(unknown)}, which only a training run provides; leave "
                "the objective out"
            )


def _check_output_layer(model: PreTrainedModel) -> None:
    """Refuse a model that scales, caps or shifts its logits, whose probabilities would be wrong."""
    with torch.no_grad():
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        hidden = model.base_model(input_ids=token, use_cache=False).last_hidden_state
        product = (hidden @ model.get_output_embeddings().weight.t()).float()
        logits = model(input_ids=token, use_cache=False).logits.float()
    if not torch.allclose(product, logits, rtol=1e-2, atol=1e-2):
        raise ValueError(
            f"the logits of {type(model).__name__} are not hidden states times output weight (they are "
            "scaled, capped or shifted), which this report cannot show"
        )


def _with_first(vector: Tensor, first: Any) -> Tensor:
    """Put `first` in front of a vector: [T - 1] to [T]."""
    return torch.cat([vector.new_full((1,), first), vector])


def _joined(records: Sequence[TokenRecord], seed: int) -> TokenStatistics:
    """Return the statistics [N] of the supervised tokens of all records."""
    joined = {
        name: torch.cat([vars(r.statistics)[name][r.supervised] for r in records])
        for name in vars(records[0].statistics)
    }
    uniform = [
        token_uniform(seed, torch.tensor(i), r.supervised.nonzero().squeeze(1))
        for i, r in enumerate(records)
    ]
    record = [torch.full_like(r.supervised.nonzero()[:, 0], i) for i, r in enumerate(records)]
    return TokenStatistics(
        **joined,
        uniform=torch.cat(uniform),
        old_log_prob=joined["log_prob"],
        record=torch.cat(record),
    )
