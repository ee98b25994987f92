"""The objectives as their sources write them, on dense log-probabilities that autograd differentiates.

Nothing here comes from `megatron_profit.objectives`, of which this is the independent counterpart.

Shape suffixes: M supervised tokens of a global batch, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """The supervised tokens of a global batch.

    Attributes:
        log_probs: [M, V], with their graph.
        targets: [M].
        old: [M], log-probabilities of the targets under the old policy.
        ref_log_probs: [M, V], under the reference model.
        sizes: Supervised tokens of each record, in their order.
    """

    log_probs: Tensor
    targets: Tensor
    old: Tensor | None = None
    ref_log_probs: Tensor | None = None
    sizes: tuple[int, ...] = ()

    @property
    def log_prob(self) -> Tensor:
        return self.log_probs.gather(-1, self.targets[:, None])[:, 0]

    @property
    def ref(self) -> Tensor:
        return self.ref_log_probs.gather(-1, self.targets[:, None])[:, 0]

    @property
    def prob(self) -> Tensor:
        return self.log_prob.detach().exp()

    @property
    def all_probs(self) -> Tensor:
        return self.log_probs.detach().exp()


@dataclass(frozen=True)
class Outcome:
    """An objective on M tokens.

    Attributes:
        loss: [M].
        kept: [M] bool, what is trained.
        divisor: Of the summed loss.
        metrics: What the objective logs of its own.
    """

    loss: Tensor
    kept: Tensor
    divisor: int
    metrics: Mapping[str, float] = field(default_factory=dict)


def _all(loss: Tensor) -> Outcome:
    return Outcome(loss, torch.ones_like(loss, dtype=torch.bool), len(loss))


def _of_kept(tokens: Tokens, kept: Tensor) -> Outcome:
    """The cross-entropy of some tokens, over their number."""
    return Outcome(-tokens.log_prob * kept, kept, int(kept.sum()))


def _clear_of(values: Tensor, limit: float) -> Tensor:
    """Which values reach a limit, none of them so near to it that fp32 could see it on the other side."""
    assert ((values - limit).abs() > 1e-5 * abs(limit)).all(), f"a token lies at {limit}"
    return values >= limit


def _top(scores: Tensor, share: float) -> Tensor:
    """Which are among the highest ceil(share * M)."""
    ranked = scores.sort(descending=True).values
    count = -int(-share * len(scores) // 1)
    limit = (ranked[count - 1] + ranked[count]) / 2
    return _clear_of(scores, float(limit))


def _above_quantile(values: Tensor, quantile: float) -> Tensor:
    """Which are not among the floor(quantile * M) lowest."""
    ranked = values.sort().values
    count = int(quantile * len(values))
    return (
        _clear_of(values, float((ranked[count - 1] + ranked[count]) / 2)) if count else values > 0
    )


def _infosft(t: Tokens, known: float) -> Outcome:
    relative = (t.prob / (1 - t.prob)).log() / math.log(known / (1 - known))
    weight = t.prob * (1 - relative).relu()
    return Outcome(-weight * t.log_prob, _clear_of(-t.prob, -known), len(weight))


def _prift_mass(t: Tokens) -> Outcome:
    q = t.ref_log_probs.exp()
    mass = (q * (q <= t.ref.exp()[:, None])).sum(-1)
    return replace(_of_kept(t, _clear_of(mass, 0.5)), divisor=len(mass))


def _talr(t: Tokens) -> Outcome:
    means = [float(-part.mean()) for part in t.log_prob.detach().split(t.sizes)]
    middle = statistics.median(means)
    weight = (t.prob ** (1 / middle)).clamp(min=0.01)
    return replace(_all(-weight * t.log_prob), metrics={"median loss": middle})


def _of_quantile(t: Tokens, sizes: tuple[int, ...], values: Tensor, quantile: float) -> Outcome:
    kept = torch.cat([_above_quantile(part, quantile) for part in values.split(sizes)])
    return replace(_of_kept(t, kept), divisor=len(kept))


def _gce(t: Tokens, q: float) -> Outcome:
    return _all((1 - t.log_prob.exp() ** q) / q)


def _deft(t: Tokens) -> Outcome:
    exponent = t.all_probs.square().sum(-1)
    return _all((1 - t.log_prob.exp() ** exponent) / exponent)


def _eaft(t: Tokens) -> Outcome:
    top = t.all_probs.topk(20).values
    top = top / top.sum(-1, keepdim=True)
    return _all(-(-(top * top.log()).sum(-1) / 3) * t.log_prob)


def _asft(t: Tokens, kl_weight: float) -> Outcome:
    p, ref = t.log_prob.exp(), t.ref.exp()
    kl = ref * (ref / p).log() + (1 - ref) * ((1 - ref) / (1 - p)).log()
    kl_mean = float(kl.detach().mean())
    outcome = _all(-t.prob * t.log_prob + kl_weight * kl)
    return replace(outcome, metrics={"KL to reference": kl_mean})


def _psft(t: Tokens, clip: float) -> Outcome:
    ratio = (t.log_prob - t.old).exp()
    clipped = ~_clear_of(-ratio.detach(), -(1 + clip))
    metrics = {
        "mean ratio": float(ratio.detach().mean()),
        "clip fraction": float(clipped.double().mean()),
    }
    return Outcome(-ratio.clamp(max=1 + clip), ~clipped, len(ratio), metrics)


def _entropy_of(t: Tokens) -> Tensor:
    return -(t.all_probs * t.log_probs.detach()).sum(-1)


@dataclass(frozen=True)
class Case:
    """An objective as flags and as its formula.

    `steps_per_refresh` optimizer steps share an old policy.
    """

    options: str
    evaluate: Callable[[Tokens], Outcome]
    steps_per_refresh: int = 1

    @property
    def flags(self) -> list[str]:
        return f"--objective {self.options}".split()


def profit(tau: float) -> Case:
    """ProFit, which keeps p >= tau."""

    def evaluate(t: Tokens) -> Outcome:
        return replace(_of_kept(t, _clear_of(t.prob, tau)), divisor=len(t.prob))

    options = f"profit --threshold-direction higher --prob-threshold {tau}"
    return Case(options, evaluate)


def psft(steps_per_refresh: int, clip: float = 0.28) -> Case:
    """PSFT, whose lower clip never binds."""
    options = f"psft --psft-steps-per-refresh {steps_per_refresh} --clip-high {clip}"
    return Case(options, lambda t: _psft(t, clip), steps_per_refresh)


_QUANTILE = "profit --threshold-direction higher --threshold-quantile"

CASES = {
    "sft": Case("sft", lambda t: _all(-t.log_prob)),
    "profit": profit(0.001),
    "dft": Case("dft", lambda t: _all(-t.prob * t.log_prob)),
    "gce": Case("gce --prob-exponent 0.5", lambda t: _gce(t, 0.5)),
    "deft": Case("deft", _deft),
    "eaft": Case("eaft", _eaft),
    "chord-phi": Case("chord-phi", lambda t: _all(-t.prob * (1 - t.prob) * t.log_prob)),
    "infosft": Case("infosft --known-prob 0.6", lambda t: _infosft(t, 0.6)),
    "prift-prob": Case("prift-prob", lambda t: _all(-t.ref.exp() * t.log_prob)),
    "prift-mass": Case("prift-mass", _prift_mass),
    "talr": Case("talr", _talr),
    "profit quantile": Case(
        f"{_QUANTILE} 0.3",
        lambda t: _of_quantile(t, (len(t.prob),), t.prob, 0.3),
    ),
    "profit record": Case(
        f"{_QUANTILE} 0.3 --threshold-scope record --objective-signal reference",
        lambda t: _of_quantile(t, t.sizes, t.ref.exp(), 0.3),
    ),
    "entropy": Case(
        "entropy --rank-scope global_batch --keep-fraction 0.3",
        lambda t: _of_kept(t, _top(_entropy_of(t), 0.3)),
    ),
    "psft": psft(4),
    "iw-sft": Case(
        "iw-sft",
        lambda t: _all(-(t.prob / t.ref.exp()).clamp(0.2, 1.8) * t.log_prob),
    ),
    "asft": Case("asft --kl-weight 0.5", lambda t: _asft(t, 0.5)),
    "stm": Case(
        "stm --ref-prob-threshold 0.001",
        lambda t: _of_kept(t, _clear_of(t.ref.exp(), 0.001)),
    ),
    "rho1": Case(
        "rho1 --rank-scope global_batch --keep-fraction 0.4",
        lambda t: _of_kept(t, _top(t.ref - t.log_prob.detach(), 0.4)),
    ),
}
