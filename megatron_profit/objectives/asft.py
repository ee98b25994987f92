"""Anchored SFT: dynamic fine-tuning that is held near a reference model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megatron_profit.objectives.base import (
    Objective,
    ObjectiveOutput,
    TokenStatistics,
    option,
    weighted_nll,
)
from megatron_profit.objectives.checks import number_in
from megatron_profit.objectives.numerics import count_of, log1mexp, log_ratio
from megatron_profit.objectives.registry import register_objective

if TYPE_CHECKING:
    from torch import Tensor

# The least 1 - p, for weights that fit float32 also times the loss scale of float16.
_LEAST = 1e-20


@register_objective("asft")
@dataclass(frozen=True)
class ASFT(Objective):
    """L_t = -sg(p) log p + lambda KL2(p_ref || p); weight p + lambda (p_ref - p) / (1 - p).

    https://arxiv.org/abs/2509.23753, with one difference. The paper's KL runs over the whole
    vocabulary; KL2 is the KL of the two outcomes {target, not the target}:

        KL2 = p_ref log(p_ref / p) + (1 - p_ref) log((1 - p_ref) / (1 - p))

    It needs one number per token from the reference model instead of the vocabulary. It never
    exceeds the full KL (data processing), and its gradient on the target's logit, p - p_ref, equals the full
    KL's. On the other logits it acts in proportion to their p_v, where the full KL pulls each to its own
    reference. The weight is negative where the model has moved far above the reference.

    The weight grows like 1 / (1 - p) towards p = 1. Its product with softmax - onehot stays finite, as
    every entry holds a factor of at most 1 - p: the target is pulled down by lambda (p - p_ref) however
    certain it is. 1 - p counts as 1e-20 where it is less, so that the weight fits float32; the pull fades
    there, and it is 0 at p = 1.

    Attributes:
        kl_weight: lambda, 0 or more; 0 is DFT.
    """

    drops_tokens: ClassVar[bool] = False

    kl_weight: float = option("weight of the KL to the reference model", default=0.1, type=float)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kl_weight", number_in("kl_weight", self.kl_weight, 0))

    @property
    def loss_follows_prob(self) -> bool:
        return False

    @property
    def required_statistics(self) -> frozenset[str]:
        return frozenset({"ref_log_prob"})

    def evaluate(self, statistics: TokenStatistics) -> ObjectiveOutput:
        loss, weight = weighted_nll(statistics.prob, statistics)
        # (p_ref - p) / (1 - p), without the difference of two numbers near 1
        ref_rest, rest = (
            _log_complement(statistics.ref_log_prob),
            _log_complement(statistics.log_prob),
        )
        pull = -(ref_rest - rest).expm1()
        return ObjectiveOutput(
            loss + self.kl_weight * two_outcome_kl(statistics.ref_log_prob, statistics.log_prob),
            weight + self.kl_weight * pull,
        )

    def metrics(self, statistics: TokenStatistics) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return the mean of KL2 as a sum and a count."""
        kl = two_outcome_kl(statistics.ref_log_prob, statistics.log_prob)
        return {"KL to reference": (kl.sum(), count_of(kl))}


def two_outcome_kl(ref_log_prob: Tensor, log_prob: Tensor) -> Tensor:
    """Return [N] KL of {target, not the target} in nats; infinite where p = 0 and p_ref is not."""
    ref_prob = ref_log_prob.exp()
    # Where p_ref = 0 the term is 0, although the logarithm of the ratio is infinite.
    target = (ref_prob * log_ratio(ref_log_prob, log_prob)).masked_fill(ref_prob == 0, 0.0)
    ref_rest, rest = _log_complement(ref_log_prob), _log_complement(log_prob)
    return target + ref_rest.exp() * (ref_rest - rest)


def _log_complement(log_prob: Tensor) -> Tensor:
    """Return log(1 - p), with 1 - p at least ``_LEAST``."""
    return log1mexp(log_prob.clamp(max=-_LEAST))
