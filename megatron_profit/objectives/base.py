"""The contract between a kernel and an objective: token statistics in, loss and weight out.

An objective sees only vectors with one entry per supervised token, never logits or process groups. So the
same few lines serve one process, a sharded vocabulary, and a paper's script.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

# Statistics that a kernel computes on demand, and statistics that only the caller can give.
COMPUTED_STATISTICS = ("entropy", "sum_squared_prob", "top20_entropy")
GIVEN_STATISTICS = ("ref_log_prob", "old_log_prob", "uniform", "selected")
OPTIONAL_STATISTICS = (*COMPUTED_STATISTICS, *GIVEN_STATISTICS)

# The divisor of the summed loss: all supervised tokens of the global batch, or the tokens of nonzero weight.
NORMALIZATIONS = ("valid", "kept")


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """Statistics of the model's prediction for each target token; every vector has the shape of ``log_prob``.

    Attributes:
        log_prob: [N] log-probability of the target in nats, float32 or float64.
        entropy: [N] entropy of the predicted distribution in nats.
        sum_squared_prob: [N] sum over the vocabulary of p_v squared.
        top20_entropy: [N] entropy of the 20 most probable tokens, renormalised to sum 1, in nats.
        ref_log_prob: [N] log-probability of the target under a frozen reference model, in nats.
        old_log_prob: [N] log-probability of the target under an earlier state of the model that is
            trained, in nats.
        uniform: [N] one random number in [0, 1) per token, for random selection.
        selected: [N] bool, the tokens that were chosen by a ranking of the whole global batch.
        softmax_prob: [N] probability of the target as the softmax gave it. ``exp(log_prob)`` rounds. For
            example, it turns a float32 0.1 into 0.09999999. So a kernel that has the softmax passes it.

    Raises:
        ValueError: ``log_prob`` is neither float32 nor float64, a vector has another shape, or
            ``selected`` is not bool.
    """

    log_prob: Tensor
    entropy: Tensor | None = None
    sum_squared_prob: Tensor | None = None
    top20_entropy: Tensor | None = None
    ref_log_prob: Tensor | None = None
    old_log_prob: Tensor | None = None
    uniform: Tensor | None = None
    selected: Tensor | None = None
    softmax_prob: Tensor | None = None

    def __post_init__(self) -> None:
        import torch

        if self.log_prob.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"log_prob is {self.log_prob.dtype}; statistics must be float32 or float64: "
                "compute them from logits upcast with .float()."
            )
        for name in (*OPTIONAL_STATISTICS, "softmax_prob"):
            vector = getattr(self, name)
            if vector is not None and vector.shape != self.log_prob.shape:
                raise ValueError(
                    f"{name} has shape {tuple(vector.shape)}, log_prob has "
                    f"{tuple(self.log_prob.shape)}; pass one entry per token in every statistic."
                )
        if self.selected is not None and self.selected.dtype != torch.bool:
            raise ValueError(f"selected is {self.selected.dtype}; pass a mask of torch.bool.")

    @property
    def prob(self) -> Tensor:
        """[N] probability of the target: ``softmax_prob`` where known, else ``exp(log_prob)``."""
        return self.log_prob.exp() if self.softmax_prob is None else self.softmax_prob


class ObjectiveOutput(NamedTuple):
    """Per-token result of an objective.

    Attributes:
        loss: [N] loss L_t of each token; differentiable in ``log_prob`` when that carries a graph.
        weight: [N] -dL_t/dlog p_t with stop-gradient factors held constant; carries no graph. It is
            the factor on the one gradient that every objective shares, (softmax - onehot).
    """

    loss: Tensor
    weight: Tensor


def option(help: str, *, default: Any = None, **argparse: Any) -> Any:
    """Declare an option of an objective: a dataclass field that a command line can be built from.

    For example, ``option("Factor on the KL, 0 or more.", default=0.1, metavar="X")``.

    Args:
        help: the effect of the option, with its unit or range.
        default: value when not given.
        **argparse: further keywords of ``ArgumentParser.add_argument``: ``choices``, ``nargs``, ...

    Returns:
        A dataclass field whose ``metadata`` is the keyword arguments for ``add_argument``.
    """
    return field(default=default, metadata={"help": help, **argparse})


@dataclass(frozen=True)
class Objective(ABC):
    """A per-token training objective: a pure function on ``TokenStatistics``.

    A subclass is a frozen dataclass whose fields are its options (see ``option``); it checks them
    in ``__post_init__``, names the statistics it needs, and implements ``evaluate``.
    """

    name: ClassVar[str]
    normalization: ClassVar[str] = "valid"
    """The divisor of the summed loss that the objective's source uses, from NORMALIZATIONS."""
    drops_tokens: ClassVar[bool] = True
    """Whether a token of positive probability can have the weight 0, so that counts of kept tokens mean
    anything."""

    @property
    def required_statistics(self) -> frozenset[str]:
        """Names from ``OPTIONAL_STATISTICS`` that ``evaluate`` reads, under the current options."""
        return frozenset()

    @abstractmethod
    def evaluate(self, statistics: TokenStatistics) -> ObjectiveOutput:
        """Compute loss and weight; every statistic in ``required_statistics`` is present."""

    def metrics(self, statistics: TokenStatistics) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return metrics of this objective alone: name to (sum, count), both scalars.

        Both are added up over micro-batches and ranks before they are divided.

        Args:
            statistics: [N] vectors of the supervised tokens, ``required_statistics`` among them.
        """
        return {}

    def __call__(self, statistics: TokenStatistics) -> ObjectiveOutput:
        """Compute the per-token loss and weight.

        A missing ``uniform`` is drawn from torch's default generator. Under tensor parallelism pass
        it (see ``token_uniform``), so that all ranks agree; ``ops.linear_objective`` insists on it.

        Args:
            statistics: [N] vectors of the supervised tokens.

        Returns:
            ``loss`` [N] and ``weight`` [N] in the dtype of ``log_prob``.

        Raises:
            ValueError: a required statistic is missing.
        """
        if "uniform" in self.required_statistics and statistics.uniform is None:
            import torch

            statistics = replace(statistics, uniform=torch.rand_like(statistics.log_prob.detach()))
        missing = sorted(n for n in self.required_statistics if getattr(statistics, n) is None)
        if missing:
            raise ValueError(
                f"objective {type(self).__name__} needs the statistic {', '.join(missing)}; "
                f"pass TokenStatistics({missing[0]}=...)."
            )
        loss, weight = self.evaluate(statistics)
        return ObjectiveOutput(loss, weight.detach())


def weighted_nll(weight: Tensor, statistics: TokenStatistics) -> ObjectiveOutput:
    """Return the output of -sg(weight) log p, for an objective whose factor is constant or a mask.

    Args:
        weight: [N], of any dtype.
        statistics: gives log p.

    Returns:
        A loss of exactly 0 where the weight is 0, however improbable the token.
    """
    log_prob = statistics.log_prob
    weight = weight.detach().to(log_prob.dtype)
    loss = -weight * log_prob
    # Fills in zeros, not the product alone: 0 * inf is NaN.
    return ObjectiveOutput(loss.masked_fill(weight == 0, 0.0), weight)
