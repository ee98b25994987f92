"""The signal of an objective: whose probabilities decide how much a token is trained.

An objective of p gates itself with the model that it trains. The same rule on a frozen reference model is
another objective. It needs no formula of its own, so one class makes it for all.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_profit.objectives.base import (
    Objective,
    ObjectiveOutput,
    TokenStatistics,
    option,
    weighted_nll,
)
from megatron_profit.objectives.checks import one_of

OBJECTIVE_SIGNALS = ("current", "reference")


def signal_option(default: str) -> Any:
    """Return the dataclass field ``objective_signal`` with a default."""
    return option(
        "whose probability of the target sets its weight: the model in training (current), or a frozen "
        "reference model (reference), whose weights never change",
        default=default,
        choices=OBJECTIVE_SIGNALS,
    )


@dataclass(frozen=True, kw_only=True)
class SignalObjective(Objective):
    """An objective whose weight w follows from the model's probabilities, on either signal.

    ========= =====================================================================
    signal    loss
    ========= =====================================================================
    current   the objective's own L_t of p
    reference -sg(w(q)) log p, where w(q) is its weight with q in the place of p
    ========= =====================================================================

    q is the probability of the target under the reference model. For example, ``DFT`` weights by p, and on
    the reference by q. Statistics that are not in ``signal_statistics`` stay the current model's.

    Attributes:
        objective_signal: current or reference.

    Raises:
        ValueError: an unknown signal.
    """

    signal_statistics: ClassVar[tuple[str, ...]] = ("log_prob",)
    """The statistics that the signal gives; the reference's are ``ref_log_prob`` and so on."""

    objective_signal: str = signal_option("current")

    def __post_init__(self) -> None:
        one_of("objective_signal", self.objective_signal, OBJECTIVE_SIGNALS)

    @property
    def loss_follows_prob(self) -> bool:
        # A weight of the current model falls with p, and the loss with it.
        return self.objective_signal == "reference"

    @property
    def own_statistics(self) -> frozenset[str]:
        """Names of the statistics that ``evaluate_signal`` reads, besides the target's probability."""
        return frozenset()

    @abstractmethod
    def evaluate_signal(self, statistics: TokenStatistics) -> ObjectiveOutput:
        """Compute loss and weight as if the signal were the model in training."""

    @property
    def signal_reads(self) -> frozenset[str]:
        """Names of the statistics that ``seen`` replaces others by."""
        if self.objective_signal == "current":
            return frozenset()
        return frozenset(f"ref_{name}" for name in self.signal_statistics)

    @property
    def required_statistics(self) -> frozenset[str]:
        reads = self.signal_reads
        return (
            (self.own_statistics - set(self.signal_statistics)) | reads
            if reads
            else self.own_statistics
        )

    def seen(self, statistics: TokenStatistics) -> TokenStatistics:
        """Return the statistics with the signal's in the place of the model's."""
        if self.objective_signal == "current":
            return statistics
        dtype = statistics.log_prob.dtype
        signal = {n: getattr(statistics, f"ref_{n}").to(dtype) for n in self.signal_statistics}
        # The softmax of the model in training is not the reference's.
        known = {"softmax_prob": None} if "log_prob" in signal else {}
        return statistics.replaced(**signal, **known)

    def evaluate(self, statistics: TokenStatistics) -> ObjectiveOutput:
        output = self.evaluate_signal(self.seen(statistics))
        if self.objective_signal == "current":
            return output
        return weighted_nll(output.weight, statistics)
