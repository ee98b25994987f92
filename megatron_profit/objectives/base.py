"""The contract between a kernel and an objective: token statistics in, loss and weight out.

An objective sees only vectors with one entry per supervised token, never logits or process groups. So the
same few lines serve one process, a sharded vocabulary, and a paper's script.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn

if TYPE_CHECKING:
    from torch import Tensor

# Statistics that a kernel computes on demand.
COMPUTED_STATISTICS = ("entropy", "sum_squared_prob", "top20_entropy", "rank", "lower_mass")
# External statistics of the frozen reference model, each named after the statistic that it is.
REFERENCE_STATISTICS = ("ref_log_prob", "ref_lower_mass")
# External statistics, which only the caller can give. These are the ones of this package's objectives; an
# objective may name others.
EXTERNAL_STATISTICS = (
    *REFERENCE_STATISTICS,
    *("old_log_prob", "uniform", "selected", "min_log_prob", "max_log_prob", "median_loss"),
)
OPTIONAL_STATISTICS = (*COMPUTED_STATISTICS, *EXTERNAL_STATISTICS)
# The names that an external statistic cannot have.
KERNEL_STATISTICS = ("log_prob", "softmax_prob", *COMPUTED_STATISTICS)

# The divisor of the summed loss: all supervised tokens of the global batch, or the tokens of nonzero weight.
NORMALIZATIONS = ("supervised", "kept")


class TokenStatistics:
    """Statistics of the model's prediction for each target token; every vector has the shape of ``log_prob``.

    A kernel's statistic that is not known is None. An external statistic is an attribute if it is known. For
    example, ``TokenStatistics(log_prob, margin=m).margin`` is m. ``vars`` gives all known vectors by name.

    Attributes:
        log_prob: [N] log-probability of the target in nats, float32 or float64.
        softmax_prob: [N] probability of the target as the softmax gave it. ``exp(log_prob)`` rounds. For
            example, it turns a float32 0.1 into 0.09999999. So a kernel that has the softmax passes it.
        entropy: [N] entropy of the predicted distribution in nats.
        sum_squared_prob: [N] sum over the vocabulary of p_v squared.
        top20_entropy: [N] entropy of the 20 most probable tokens, renormalised to sum 1, in nats.
        rank: [N] 1 + the number of tokens that are more probable than the target, as floats.
        lower_mass: [N] sum of the probabilities that are not above the target's, its own included.

    This package's external statistics are:

    ============== =============================================================================
    ref_log_prob   [N] log-probability of the target under a frozen reference model, in nats
    ref_lower_mass [N] lower_mass under the reference model
    old_log_prob   [N] log-probability of the target under an earlier state of the model
    uniform        [N] one random number in [0, 1) per token, for random selection
    selected       [N] bool, tokens that were chosen by a ranking of the whole global batch
    min_log_prob   [N] log of the probability that a token must reach, from a quantile
    max_log_prob   [N] log of the probability that a token must not exceed, from a quantile
    median_loss    [N] median over the records of the global batch of their mean -log p
    ============== =============================================================================
    """

    log_prob: Tensor
    softmax_prob: Tensor | None = None
    entropy: Tensor | None = None
    sum_squared_prob: Tensor | None = None
    top20_entropy: Tensor | None = None
    rank: Tensor | None = None
    lower_mass: Tensor | None = None

    def __init__(self, log_prob: Tensor, **statistics: Tensor | None) -> None:
        """Keep the vectors; one that is None counts as unknown.

        Raises:
            ValueError: ``log_prob`` is neither float32 nor float64, a vector has another shape, or an
                external statistic has the name of another attribute.
        """
        import torch

        if log_prob.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"log_prob is {log_prob.dtype}; statistics must be float32 or float64: "
                "compute them from logits upcast with .float()."
            )
        known = {name: vector for name, vector in statistics.items() if vector is not None}
        for name, vector in known.items():
            if name not in KERNEL_STATISTICS:
                check_external_name(name)
            if vector.shape != log_prob.shape:
                raise ValueError(
                    f"{name} has shape {tuple(vector.shape)}, log_prob has "
                    f"{tuple(log_prob.shape)}; pass one entry per token in every statistic."
                )
        vars(self).update(log_prob=log_prob, **known)

    def __getattr__(self, name: str) -> Tensor:
        """Refuse an external statistic that is not known."""
        raise AttributeError(f"no statistic {name} is known; pass TokenStatistics({name}=...)")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        """Refuse to change a vector."""
        raise AttributeError(f"{name} cannot be set; see TokenStatistics.replaced")

    def replaced(self, **statistics: Tensor | None) -> TokenStatistics:
        """Return these statistics with others added or in their place."""
        return TokenStatistics(**{**vars(self), **statistics})

    @property
    def external(self) -> Mapping[str, Tensor]:
        """[N] each, the external statistics by name."""
        return {name: v for name, v in vars(self).items() if name not in KERNEL_STATISTICS}

    @property
    def prob(self) -> Tensor:
        """[N] probability of the target: ``softmax_prob`` where known, else ``exp(log_prob)``."""
        return self.log_prob.exp() if self.softmax_prob is None else self.softmax_prob


def check_external_name(name: str) -> None:
    """Refuse a name that no external statistic can have.

    Raises:
        ValueError: the kernel has a statistic of the name, or ``TokenStatistics`` another attribute.
    """
    if name in KERNEL_STATISTICS or hasattr(TokenStatistics, name) or not name.isidentifier():
        raise ValueError(f"an external statistic cannot be called {name!r}; choose another name.")


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
    normalization: ClassVar[str] = "supervised"
    """The divisor of the summed loss that the objective's source uses, from NORMALIZATIONS."""
    drops_tokens: ClassVar[bool] = True
    """Whether a token of positive probability can have the weight 0, so that counts of kept tokens mean
    anything."""

    reference_must_differ: ClassVar[str] = ""
    """Why the weights that a run starts from are no sensible reference model; empty where they are one."""
    providers: ClassVar[Mapping[str, str]] = {}
    """The classes that provide external statistics of this objective's own in a training run:
    ``{"margin": "package.module:Class"}``. They are imported in training only."""

    @property
    def loss_follows_prob(self) -> bool:
        """Whether a token's loss falls only where the model gives the token more probability.

        If it does, a better model has the lower mean loss. For example, ``dft`` has a small loss for an
        improbable token too, so it does not.
        """
        return True

    @property
    def required_statistics(self) -> frozenset[str]:
        """Names of the statistics that ``evaluate`` reads, under the current options.

        Besides ``COMPUTED_STATISTICS`` these are external ones, which may have any name.
        """
        return frozenset()

    @property
    def lookahead(self) -> Mapping[str, frozenset[str]]:
        """External statistics that follow from all tokens of a global batch.

        Each comes with the names of the statistics that ``look_ahead`` reads for it.
        """
        return {}

    @property
    def needed_statistics(self) -> frozenset[str]:
        """Names of the statistics that ``evaluate`` or ``look_ahead`` reads."""
        return self.required_statistics.union(*self.lookahead.values())

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with a frozen reference model."""
        return not self.needed_statistics.isdisjoint(REFERENCE_STATISTICS)

    @property
    def final(self) -> Objective:
        """The objective that a run ends with."""
        return self

    def at(self, step: int) -> Objective:
        """Return the objective of a step, counted from 0."""
        return self

    def for_evaluation(self) -> Objective:
        """Return the objective that an evaluation reports."""
        return self

    def look_ahead(self, statistics: TokenStatistics) -> Mapping[str, Tensor]:
        """Compute the statistics of ``lookahead`` for all N supervised tokens of a global batch.

        Args:
            statistics: [N] vectors, the ones that ``lookahead`` names among them, and ``record`` [N] int64,
                the number of each token's record. The tokens of a record stand together.
        """
        return {}

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
        if "uniform" in self.required_statistics - vars(statistics).keys():
            import torch

            statistics = statistics.replaced(uniform=torch.rand_like(statistics.log_prob.detach()))
        missing = sorted(self.required_statistics - vars(statistics).keys())
        if missing:
            raise ValueError(
                f"objective {type(self).__name__} needs the statistic {', '.join(missing)}; "
                f"pass TokenStatistics({missing[0]}=...)."
            )
        loss, weight = self.evaluate(statistics)
        return ObjectiveOutput(loss, weight.detach())


@dataclass(frozen=True)
class StatisticsOnly(Objective):
    """Not an objective: it makes a kernel compute statistics and trains no token."""

    names: frozenset[str] = frozenset()

    @property
    def required_statistics(self) -> frozenset[str]:
        return self.names

    def evaluate(self, statistics: TokenStatistics) -> ObjectiveOutput:
        zeros = statistics.log_prob.new_zeros(statistics.log_prob.shape)
        return ObjectiveOutput(zeros, zeros)


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
