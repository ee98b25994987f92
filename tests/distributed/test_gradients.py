"""One real training step at any layout moves every parameter by the gradient of an fp64 reference.

Adam with an epsilon far above any gradient g moves a weight by lr * g / (|g| + eps): by the gradient times
lr / eps, which makes the gradient visible also with the distributed optimizer. The weights are read through
the export to HuggingFace, so the whole path is in the test: flags, data, pipeline schedule, objective,
reductions, optimizer, checkpoint, conversion.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import EXAMPLES, TinyModel, make_family
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint_conversion.megatron_to_hf import megatron_to_hf
from megatron_profit.data import ChatRenderer, SFTDataset, build_examples
from megatron_profit.objectives import token_uniform

DATA = EXAMPLES / "arithmetic_chatty.jsonl"
SEQ_LENGTH, BATCH, SEED = 100, 8, 5
PACKED_LENGTH, PACKED_BATCH = 120, 4
EPSILON, RATE = 1e4, 100.0
DECAYS = ("A_log", "dt_bias", "in_proj_a.weight")


@dataclass(frozen=True)
class Tokens:
    """The supervised tokens of the step's global batch, as the fp64 reference sees them."""

    model: torch.nn.Module
    log_prob: torch.Tensor
    entropy: torch.Tensor
    sum_squared_prob: torch.Tensor
    uniform: torch.Tensor

    @property
    def prob(self) -> torch.Tensor:
        return self.log_prob.detach().exp()

    def threshold(self, share: float) -> float:
        """A probability with about `share` of the tokens below it, far from any token's own."""
        values = self.prob.sort().values
        middle = int(share * len(values))
        window = values[middle - 10 : middle + 10]
        widest = int(window.diff().argmax())
        return float(window[widest : widest + 2].mean())

    def gradients(self, weight: torch.Tensor, divisor: int) -> dict[str, torch.Tensor]:
        """d/dweights of the cross-entropy of the tokens, times a constant of each, over `divisor`."""
        self.model.zero_grad()
        ((-self.log_prob * weight).sum() / divisor).backward(retain_graph=True)
        return {name: p.grad.clone() for name, p in self.model.named_parameters()}


def reference(model: TinyModel, seq_length: int = SEQ_LENGTH, batch: int = BATCH) -> Tokens:
    """Each record of the step's rows alone through the HuggingFace model, packed or not."""
    renderer = ChatRenderer(AutoTokenizer.from_pretrained(model.hf))
    examples, _ = build_examples([DATA], renderer, seq_length)
    packing = seq_length != SEQ_LENGTH
    rows = SFTDataset(examples, seq_length, batch, seed=SEED, packing=packing)
    hf = AutoModelForCausalLM.from_pretrained(model.hf, dtype=torch.float64)
    log_probs, targets, uniform = [], [], []
    for row in (rows[i] for i in range(batch)):
        for record in row["draw_index"].unique():
            tokens, labels, position_ids, draw_index = (
                row[name][(row["draw_index"] == record) & (record >= 0)]
                for name in ("tokens", "labels", "position_ids", "draw_index")
            )
            if len(tokens):
                supervised = labels != -100
                log_probs.append(hf(tokens[None]).logits[0, supervised].log_softmax(-1))
                targets.append(labels[supervised])
                uniform.append(token_uniform(SEED, draw_index, position_ids)[supervised])
    log_probs_NV = torch.cat(log_probs)
    probs_NV = log_probs_NV.detach().exp()
    return Tokens(
        hf,
        log_probs_NV.gather(-1, torch.cat(targets)[:, None])[:, 0],
        torch.special.entr(probs_NV).sum(-1),
        probs_NV.square().sum(-1),
        torch.cat(uniform),
    )


@pytest.fixture(scope="session")
def tied_reference(tied_model) -> Tokens:
    return reference(tied_model)


@pytest.fixture(scope="session")
def untied_reference(untied_model) -> Tokens:
    return reference(untied_model)


@pytest.fixture(scope="session")
def packed_reference(tied_model) -> Tokens:
    return reference(tied_model, PACKED_LENGTH, PACKED_BATCH)


@pytest.fixture
def step(sft, tmp_path):
    """Trains one step and returns (gradient by HuggingFace name, console output)."""

    def run(model: TinyModel, world_size: int, *flags: object):
        result = sft(
            world_size,
            *("--hf-model", model.hf, "--pretrained-checkpoint", model.megatron),
            *("--data", DATA, "--no-packing", "--seq-length", SEQ_LENGTH, "--seed", SEED),
            *(
                "--global-batch-size",
                BATCH,
                "--train-iters",
                1,
                "--weight-decay",
                0,
                "--clip-grad",
                0,
            ),
            *("--lr", RATE * EPSILON, "--min-lr", RATE * EPSILON, "--adam-eps", EPSILON),
            *("--save", tmp_path / "save", "--no-save-optim", *flags),
        )
        megatron_to_hf(tmp_path / "save", model.hf, tmp_path / "after")
        before = load_file(model.hf / "model.safetensors")
        after = load_file(tmp_path / "after" / "model.safetensors")
        assert before.keys() == after.keys()
        moved = {name: (before[name].double() - after[name].double()) / RATE for name in before}
        return moved, result.stdout

    return run


def assert_same_gradients(moved, expected):
    assert moved.keys() == expected.keys()
    for name, gradient in expected.items():
        # fp32 rounding of the weight that moves, of which RATE makes light, and of the computation.
        # A decay's gradient is a small difference of large sums, where transformers in fp32 is off by 5e-5.
        scale = gradient.abs().max().item() * (10 if name.endswith(DECAYS) else 1)
        torch.testing.assert_close(
            moved[name],
            gradient,
            rtol=2e-4,
            atol=2e-5 * scale + 1e-8,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def logged(output: str, name: str) -> float:
    return float(re.search(rf"\| {name}: +(\S+) \|", output).group(1))


SELECTIONS = {
    "higher": lambda t, tau: (["--prob-threshold", tau], t.prob >= tau),
    "lower": lambda t, tau: (["--prob-threshold", tau], t.prob <= tau),
    "middle": lambda t, tau: (
        ["--prob-threshold", tau, t.threshold(0.9)],
        (t.prob >= tau) & (t.prob <= t.threshold(0.9)),
    ),
    "random": lambda t, tau: (["--keep-fraction", 0.6], t.uniform < 0.6),
}


@pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=pytest.mark.slow), 2], ids=["tp1", "tp2"]
)
@pytest.mark.parametrize("direction", SELECTIONS)
def test_every_selection_equals_the_reference(
    step, untied_model, untied_reference, direction, world_size
):
    tokens = untied_reference
    options, kept = SELECTIONS[direction](tokens, tokens.threshold(0.4))
    moved, output = step(
        untied_model,
        world_size,
        *("--objective", "profit", "--threshold-direction", direction, *options),
        *("--micro-batch-size", 4, "--tensor-model-parallel-size", world_size),
    )
    assert 0.1 < kept.double().mean() < 0.9, "a selection that selects nothing tests nothing"
    assert_same_gradients(moved, tokens.gradients(kept, len(kept)))

    log_prob, p = tokens.log_prob.detach(), tokens.prob
    assert logged(output, "objective") == pytest.approx(float(-(log_prob * kept).mean()), rel=1e-5)
    assert logged(output, "lm loss") == pytest.approx(float(-log_prob.mean()), rel=1e-5)
    assert logged(output, "kept fraction") == pytest.approx(float(kept.double().mean()), rel=1e-5)
    assert logged(output, "mean p kept") == pytest.approx(float(p[kept].mean()), rel=1e-4)
    assert logged(output, "mean p dropped") == pytest.approx(float(p[~kept].mean()), rel=1e-4)
    assert logged(output, "supervised tokens") == len(kept)


LAYOUTS = {
    "one-by-one": (1, "--micro-batch-size 1"),
    "dp2-distributed-optimizer": (
        2,
        "--micro-batch-size 1 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "pp2": (2, "--micro-batch-size 2 --pipeline-model-parallel-size 2"),
    "pp2-virtual": (
        2,
        "--micro-batch-size 1 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "tp2-sp-recompute": (
        2,
        "--micro-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
        "--objective-backward recompute",
    ),
    "tp2-sp-reference": (
        2,
        "--micro-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel "
        "--objective-implementation reference --log-entropy",
    ),
    "cp2": (2, "--micro-batch-size 4 --context-parallel-size 2"),
    "tp2-pp2-sp": (
        4,
        "--micro-batch-size 2 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
        "--sequence-parallel",
    ),
    "tp2-dp2": (
        4,
        "--micro-batch-size 2 --tensor-model-parallel-size 2 --use-distributed-optimizer "
        "--objective-backward save",
    ),
}
# The table of test_layouts.py and the other layouts here have the same parts.
SLOW_LAYOUTS = ("pp2", "tp2-sp-reference", "tp2-dp2")


@pytest.mark.parametrize(
    "layout",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW_LAYOUTS)) for n in LAYOUTS],
)
def test_any_layout_gives_the_same_gradient(step, tied_model, tied_reference, layout):
    tokens = tied_reference
    tau = tokens.threshold(0.4)
    kept = tokens.prob >= tau
    world_size, flags = LAYOUTS[layout]
    moved, output = step(
        tied_model,
        world_size,
        *("--objective", "profit", "--threshold-direction", "higher", "--prob-threshold", tau),
        *flags.split(),
    )
    assert_same_gradients(moved, tokens.gradients(kept, len(kept)))
    assert logged(output, "supervised tokens") == len(kept)
    assert "rows are cut after the longest record of their micro-batch" in output


PACKED_LAYOUTS = {
    "tp2-sp-recompute": "--micro-batch-size 2 --tensor-model-parallel-size 2 --sequence-parallel "
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "pp2": "--micro-batch-size 2 --pipeline-model-parallel-size 2",
    "cp2": "--micro-batch-size 2 --context-parallel-size 2",
}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(n, marks=[pytest.mark.slow] * n.startswith("tp2")) for n in PACKED_LAYOUTS],
)
def test_packed_rows_give_the_gradient_of_their_records_alone(
    step, tied_model, packed_reference, layout
):
    # A selection at random is keyed by the token, so that it is the same at every layout too.
    tokens = packed_reference
    kept = tokens.uniform < 0.6
    moved, output = step(
        tied_model,
        2,
        *("--packing", "--seq-length", PACKED_LENGTH, "--global-batch-size", PACKED_BATCH),
        *("--objective", "profit", "--threshold-direction", "random", "--keep-fraction", 0.6),
        *PACKED_LAYOUTS[layout].split(),
    )
    assert_same_gradients(moved, tokens.gradients(kept, len(kept)))
    assert logged(output, "supervised tokens") == len(kept)
    assert logged(output, "kept fraction") == pytest.approx(float(kept.double().mean()), rel=1e-5)


FAMILY_LAYOUTS = {
    "tp2-sp-recompute": (2, PACKED_LAYOUTS["tp2-sp-recompute"]),
    "tp2": (2, "--micro-batch-size 2 --tensor-model-parallel-size 2"),
    "tp3-sp": (3, "--micro-batch-size 4 --tensor-model-parallel-size 3 --sequence-parallel"),
    "pp2": (2, PACKED_LAYOUTS["pp2"]),
    "cp2": (2, PACKED_LAYOUTS["cp2"]),
    "dp2": (2, "--micro-batch-size 1 --use-distributed-optimizer"),
}
# Norms of all queries and of all keys, and after each block; recurrent states.
FAMILIES = {"olmo2": [*FAMILY_LAYOUTS], "qwen3.5": [n for n in FAMILY_LAYOUTS if n != "tp3-sp"]}
DEFAULT = {("olmo2", "tp2-sp-recompute"), ("olmo2", "tp2")}


@pytest.fixture(scope="session")
def families(tmp_path_factory) -> Callable[[str], tuple[TinyModel, Tokens]]:
    """A function that returns the model of a family and its reference, each made once."""

    @functools.cache
    def make(family: str) -> tuple[TinyModel, Tokens]:
        model = make_family(tmp_path_factory.mktemp(family), family)
        return model, reference(model, PACKED_LENGTH, PACKED_BATCH)

    return make


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        pytest.param(family, layout, marks=[pytest.mark.slow] * ((family, layout) not in DEFAULT))
        for family, layouts in FAMILIES.items()
        for layout in layouts
    ],
)
def test_packed_rows_of_every_kind_of_layer_give_the_gradient(step, families, family, layout):
    model, tokens = families(family)
    kept = tokens.uniform < 0.6
    world_size, flags = FAMILY_LAYOUTS[layout]
    moved, _ = step(
        *(model, world_size, "--packing", "--seq-length", PACKED_LENGTH),
        *("--global-batch-size", PACKED_BATCH, "--objective", "profit"),
        *("--threshold-direction", "random", "--keep-fraction", 0.6, *flags.split()),
    )
    assert_same_gradients(moved, tokens.gradients(kept, len(kept)))


def test_the_kept_tokens_as_the_divisor(step, tied_model, tied_reference):
    tokens = tied_reference
    tau = tokens.threshold(0.4)
    kept = tokens.prob >= tau
    moved, output = step(
        tied_model,
        2,
        *("--objective", "profit", "--threshold-direction", "higher", "--prob-threshold", tau),
        *("--objective-normalization", "kept", "--micro-batch-size", 2),
    )
    assert_same_gradients(moved, tokens.gradients(kept, int(kept.sum())))
    loss = -(tokens.log_prob.detach() * kept).sum() / kept.sum()
    assert logged(output, "objective") == pytest.approx(float(loss), rel=1e-5)


def test_a_weight_between_0_and_1_and_every_metric(step, tied_model, tied_reference):
    tokens = tied_reference
    exponent = tokens.sum_squared_prob
    world_size, layout = LAYOUTS["tp2-dp2"]
    moved, output = step(
        tied_model,
        world_size,
        *("--objective", "deft", "--log-entropy", "--log-quantiles", 0.1, 0.5, 0.9),
        *layout.split(),
    )
    assert_same_gradients(moved, tokens.gradients(tokens.prob**exponent, len(exponent)))
    loss = ((1 - tokens.prob**exponent) / exponent).mean()
    assert logged(output, "objective") == pytest.approx(float(loss), rel=1e-4)
    assert logged(output, "mean p") == pytest.approx(float(tokens.prob.mean()), rel=1e-4)
    assert logged(output, "entropy") == pytest.approx(float(tokens.entropy.mean()), rel=1e-4)
    # Between which tokens a quantile lies decides, not how it is interpolated there.
    values = tokens.prob.sort().values
    for quantile in (0.1, 0.5, 0.9):
        rank = quantile * len(values)
        below, above = values[int(rank) - 1], values[int(rank) + 1]
        assert 0.99 * below < logged(output, f"p quantile {quantile}") < 1.01 * above


def test_a_ranking_within_the_micro_batch(step, tied_model, tied_reference):
    """Here the micro-batch is the whole batch; its divisor is the kept tokens."""
    tokens = tied_reference
    values = tokens.entropy.sort(descending=True).values
    quarter = len(values) // 4
    count = quarter + int(values[quarter : quarter + 20].diff().argmin()) + 1  # at a wide gap
    kept = tokens.entropy >= values[count - 1]
    moved, output = step(
        tied_model,
        2,
        *("--objective", "entropy", "--keep-fraction", (count - 0.5) / len(values)),
        *("--micro-batch-size", BATCH, "--tensor-model-parallel-size", 2, "--sequence-parallel"),
    )
    assert_same_gradients(moved, tokens.gradients(kept, count))
    loss = -tokens.log_prob.detach()[kept].mean()
    assert logged(output, "objective") == pytest.approx(float(loss), rel=1e-5)
    assert logged(output, "kept fraction") == pytest.approx(count / len(values), rel=1e-5)


@pytest.mark.parametrize(
    "normalization", [pytest.param("supervised", marks=pytest.mark.slow), "kept"]
)
def test_a_global_batch_of_which_nothing_is_kept_moves_nothing(step, tied_model, normalization):
    moved, output = step(
        tied_model,
        2,
        *("--objective", "profit", "--threshold-direction", "higher", "--prob-threshold", 1),
        *("--objective-normalization", normalization, "--micro-batch-size", 4),
        *("--tensor-model-parallel-size", 2),
    )
    assert all((gradient == 0).all() for gradient in moved.values())
    assert logged(output, "objective") == logged(output, "kept fraction") == 0.0
    assert "guard: non-finite" not in output
