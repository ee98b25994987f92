"""Training as one would write it: the HuggingFace model, one record at a time, fp64, one process.

Runs of Megatron at any layout are compared with it step by step. It shares with them the order of the rows
and nothing else.

Shape suffixes: L tokens of one record, M supervised tokens of a global batch, V vocabulary, T tokens of a
row, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from plain_lora import adapted_model, factors_of
from plain_objectives import Case, Outcome, Tokens
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_profit.data import ChatRenderer, Examples, SFTDataset, build_examples

ADAM_EPSILON, WEIGHT_DECAY = 1e-3, 0.1
Z_LOSS = 0.01


@dataclass(frozen=True)
class Plan:
    """What is trained and how, for the plain loop and as flags of a run.

    Attributes:
        data, valid: Chat files; after the last step, one batch of `valid` is evaluated.
        steps, batch: Optimizer steps, and rows of each.
        seq_length, packing: Of the rows.
        rate: Learning rate.
        clip_grad: The norm that gradients are scaled down to, 0 for none.
        seed: Of the order.
        balancing: Coefficient of the loss that balances the router of a model with experts, of which every
            row is a micro-batch; a z-loss is then added, too.
    """

    data: Path
    steps: int
    batch: int
    seq_length: int = 96
    packing: bool = False
    rate: float = 1e-3
    clip_grad: float = 0.0
    seed: int = 5
    balancing: float = 0.0
    valid: Path | None = None

    @property
    def flags(self) -> list[object]:
        """Of `megatron_profit.sft`, without the model, the objective and the layout."""
        more = [] if self.valid is None else ["--valid-data", self.valid, "--eval-iters", 1]
        if self.balancing:
            more += ["--moe-aux-loss-coeff", self.balancing, "--moe-z-loss-coeff", Z_LOSS]
        return [
            *("--data", self.data, "--packing" if self.packing else "--no-packing"),
            *("--seq-length", self.seq_length, "--seed", self.seed),
            *("--global-batch-size", self.batch, "--train-iters", self.steps),
            *("--lr", self.rate, "--min-lr", self.rate, "--clip-grad", self.clip_grad),
            *("--adam-eps", ADAM_EPSILON, "--weight-decay", WEIGHT_DECAY),
            *more,
        ]


@dataclass(frozen=True)
class Trained:
    """What a training leaves.

    Attributes:
        metrics: One line for each step, by the name that is logged.
        valid: The objective on the validation batch; NaN where there is none.
        weights: By HuggingFace name, without experts, which transformers joins; of an adapter, its factors
            by PEFT's names.
        gradients: Of an adapter's factors in the last step, before they are clipped, by the same names.
    """

    metrics: list[dict[str, float]]
    valid: float
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Record:
    """One record of a row: inputs and labels [L], -100 where unsupervised."""

    tokens: Tensor
    labels: Tensor


Rows = list[list[Record]]


def train(
    hf: Path, plan: Plan, case: Case, reference: Path | None = None, adapter: Path | None = None
) -> Trained:
    """Train the HuggingFace folder `hf`, or an adapter on it alone; `reference` is the folder of a
    reference model.
    """
    model = _model(hf) if adapter is None else adapted_model(hf, adapter)
    ref = None if reference is None else _model(reference)
    examples = _examples(hf, plan.data, plan)
    steps = _batches(examples, plan, plan.steps)
    balance = _Balancing(model, plan, examples) if plan.balancing else None
    optimizer = _optimizer(model, plan.rate)
    metrics = []
    for number, rows in enumerate(steps):
        place = number % case.steps_per_refresh
        if place == 0:
            outer = steps[number : number + case.steps_per_refresh]
            old = [_log_prob(model, later) for later in outer]
        outcome, tokens = _outcome(model, rows, case, old[place], ref)
        loss = outcome.loss.sum() / outcome.divisor
        optimizer.zero_grad()
        extra = {} if balance is None else balance.loss_and_metrics(rows, len(tokens.targets))
        (loss + extra.pop("loss", 0.0)).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        gradients = {} if adapter is None else _gradients(factors_of(model))
        if plan.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(trained, plan.clip_grad, norm)
        optimizer.step()
        metrics.append(
            {
                "objective": float(loss.detach()),
                "lm loss": float(-tokens.log_prob.detach().mean()),
                "kept fraction": float(outcome.kept.double().mean()),
                "supervised tokens": len(tokens.targets),
                "grad-norm": float(norm),
                **outcome.metrics,
                **extra,
            }
        )
    evaluated = _evaluated(model, hf, plan, case, ref)
    return Trained(metrics, evaluated, _weights(model, hf, adapter), gradients)


def _gradients(factors: Mapping[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    return {name: factor.grad.clone() for name, factor in factors.items()}


def _weights(model: torch.nn.Module, hf: Path, adapter: Path | None) -> dict[str, Tensor]:
    if adapter is not None:
        return {name: factor.detach() for name, factor in factors_of(model).items()}
    names = load_file(hf / "model.safetensors").keys()
    return {name: value for name, value in model.state_dict().items() if name in names}


def _evaluated(
    model: torch.nn.Module, hf: Path, plan: Plan, case: Case, ref: torch.nn.Module | None
) -> float:
    if plan.valid is None:
        return float("nan")
    # The order of validation rows is the same whatever the run's seed.
    (rows,) = _batches(_examples(hf, plan.valid, plan), replace(plan, seed=0), 1)
    with torch.no_grad():
        outcome, _ = _outcome(model, rows, case, None, ref)
    return float(outcome.loss.sum() / outcome.divisor)


def _model(folder: Path) -> torch.nn.Module:
    # The other implementations of experts have no fp64.
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )


def _examples(hf: Path, data: Path, plan: Plan) -> Examples:
    renderer = ChatRenderer(AutoTokenizer.from_pretrained(hf))
    return build_examples([data], renderer, plan.seq_length)[0]


def _optimizer(model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    # Megatron decays matrices only.
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.999), eps=ADAM_EPSILON)


def _batches(examples: Examples, plan: Plan, count: int) -> list[Rows]:
    dataset = SFTDataset(
        examples, plan.seq_length, count * plan.batch, seed=plan.seed, packing=plan.packing
    )
    rows = [_records(dataset[i]) for i in range(count * plan.batch)]
    return [rows[i : i + plan.batch] for i in range(0, len(rows), plan.batch)]


def _records(row: Mapping[str, Tensor]) -> list[Record]:
    own = [row["draw_index"] == sample for sample in row["draw_index"].unique() if sample >= 0]
    return [Record(row["tokens"][part], row["labels"][part]) for part in own]


def _outcome(
    model: torch.nn.Module,
    rows: Rows,
    case: Case,
    old: Tensor | None,
    ref: torch.nn.Module | None,
) -> tuple[Outcome, Tokens]:
    log_probs, targets = _forward(model, rows)
    with torch.no_grad():
        of_ref = None if ref is None else _forward(ref, rows)[0]
    sizes = tuple(int((r.labels != -100).sum()) for row in rows for r in row)
    tokens = Tokens(log_probs, targets, old, of_ref, sizes)
    return case.evaluate(tokens), tokens


def _forward(model: torch.nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
    """[M, V] and [M], each record alone."""
    records = [record for row in rows for record in row]
    supervised = [record.labels != -100 for record in records]
    log_probs = [
        model(record.tokens[None]).logits[0, trained].log_softmax(-1)
        for record, trained in zip(records, supervised, strict=True)
    ]
    targets = [record.labels[s] for record, s in zip(records, supervised, strict=True)]
    return torch.cat(log_probs), torch.cat(targets)


@torch.no_grad()
def _log_prob(model: torch.nn.Module, rows: Rows) -> Tensor:
    return Tokens(*_forward(model, rows)).log_prob


class _Balancing:
    """The losses of the routers: Switch Transformer's (eq. 4) over each row's tokens, and ST-MoE's z-loss.

    Their weight beside the objective is what the mean over rows would have, were all tokens supervised.
    """

    def __init__(self, model: torch.nn.Module, plan: Plan, examples: Examples) -> None:
        self._coefficient, self._top_k = plan.balancing, model.config.num_experts_per_tok
        predicted = len(examples.ids) - len(examples)
        self._share = int(examples.supervised.sum()) / predicted
        self._logits: list[list[Tensor]] = []
        gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
        for gate in gates:
            seen: list[Tensor] = []
            self._logits.append(seen)
            gate.register_forward_hook(
                lambda gate, inputs, _, seen=seen: seen.append(
                    torch.nn.functional.linear(inputs[0].flatten(0, -2), gate.weight)
                )
            )

    def loss_and_metrics(self, rows: Rows, supervised: int) -> dict[str, Any]:
        records = sum(len(row) for row in rows)
        losses, sums = [], []
        for seen in self._logits:
            # Passes that looked ahead came before.
            logits = iter(seen[-records:])
            for row in rows:
                logits_TE = torch.cat([next(logits) for _ in row])
                losses.append(self._imbalance(logits_TE.softmax(-1)))
                sums.append(self._coefficient * losses[-1] * len(logits_TE))
                sums.append(Z_LOSS * logits_TE.logsumexp(-1).square().sum())
            seen.clear()
        loss = self._share * torch.stack(sums).sum() / supervised
        return {"loss": loss, "load_balancing_loss": float(torch.stack(losses).detach().mean())}

    def _imbalance(self, probs_TE: Tensor) -> Tensor:
        """1 where all experts get as much."""
        chosen = torch.zeros_like(probs_TE).scatter(1, probs_TE.topk(self._top_k).indices, 1)
        return probs_TE.shape[1] * (chosen.mean(0) / self._top_k * probs_TE.mean(0)).sum()


def write_uneven_chats(source: Path, out: Path, turns: list[int]) -> Path:
    """Chats of as many turns as `turns` says, made from those of one turn in `source`."""
    lines = (json.loads(line) for line in source.read_text().splitlines())
    chats = [
        {"messages": [message for _ in range(count) for message in next(lines)["messages"]]}
        for count in turns
    ]
    out.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return out
