"""Strategies of the backward pass, accumulation into main_grad, and what surrounds the operation."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_options import every_objective
from torch.utils.flop_counter import FlopCounterMode

from megatron_profit.objectives import build_objective
from megatron_profit.ops import linear_objective, reference_linear_objective
from megatron_profit.ops.tiling import Tiling

SFT = build_objective("sft")
STRATEGIES = ["recompute", "save", "some kept"]


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(60, 24, generator=generator, dtype=torch.float64)
    weight = torch.randn(300, 24, generator=generator, dtype=torch.float64) / 3
    labels = torch.randint(300, (60,), generator=generator)
    labels[::5] = -100
    return hidden, weight, labels, torch.randn(60, generator=generator, dtype=torch.float64)


@pytest.fixture
def strategy(request, monkeypatch):
    """The argument; "some kept" keeps the logits of 20 rows only."""
    if request.param != "some kept":
        return request.param
    cut = Tiling.of
    monkeypatch.setattr(
        Tiling, "of", lambda *args: Tiling(cut(*args).columns, min(20, cut(*args).kept_rows))
    )
    return "save"


def gradients(problem, objective=SFT, dtype=torch.float64, **options):
    hidden, weight, labels, upstream = problem
    hidden = hidden.detach().to(dtype, copy=True).requires_grad_()
    weight = weight.detach().to(dtype, copy=True).requires_grad_()
    output = linear_objective(hidden, weight, labels, objective, chunk_vocab=70, **options)
    output.loss.backward(upstream.to(output.loss.dtype))
    return hidden.grad, weight.grad


@pytest.mark.parametrize("strategy", STRATEGIES, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tau", [0.0, 3e-4, 1.0])
def test_strategies_give_the_same_gradient(problem, strategy, dtype, tau):
    """Bit for bit, as the logits are: with all rows kept, some dropped, and all dropped."""
    objective = build_objective("profit", threshold_direction="higher", prob_threshold=tau)
    ours = gradients(problem, objective, dtype, backward=strategy)
    expected = gradients(problem, objective, dtype, backward="recompute")
    for tensor, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(
            tensor, other, rtol=1e-9 if dtype == torch.float64 else 0, atol=0
        )


@pytest.mark.parametrize("strategy", STRATEGIES, indirect=True)
def test_a_second_backward_pass_gives_the_same(problem, strategy):
    """The first one uses up what was kept."""
    hidden, weight, labels, upstream = problem
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_objective(hidden, weight, labels, SFT, backward=strategy, chunk_vocab=70).loss
    first = torch.autograd.grad(loss, (hidden, weight), upstream, retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight), upstream, retain_graph=True)
    thrice = torch.autograd.grad(loss, (hidden, weight), 3 * upstream)
    for a, b, c in zip(first, second, thrice, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(3 * a, c, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("strategy", STRATEGIES, indirect=True)
def test_a_loss_scale_reaches_small_float16_gradients(problem, strategy):
    """Gradients that are 0 in float16 survive with a scale, whatever the forward pass kept."""
    hidden, weight, labels, upstream = problem
    tiny = (hidden, weight, labels, upstream * 1e-8)
    scaled = (hidden, weight, labels, upstream * 1e-8 * 2.0**20)
    unscaled = gradients(tiny, dtype=torch.float16, backward=strategy)[1]
    assert unscaled.count_nonzero() < 0.5 * unscaled.numel()
    ours = gradients(scaled, dtype=torch.float16, backward=strategy)[1].double() * 2.0**-20
    exact = gradients(tiny)[1]
    assert (ours - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("strategy", STRATEGIES, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_accumulation_into_main_grad_as_megatron_does(problem, strategy, dtype, tied):
    """Two micro-batches through hooks like those of Megatron's DistributedDataParallel; a tied
    weight gets a second gradient, from the embedding."""
    hidden, weight, labels, upstream = problem
    hidden = hidden.to(dtype)
    parameter = torch.nn.Parameter(weight.to(dtype))
    parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    parameter.grad_added_to_main_grad = False
    if tied:
        parameter.zero_out_wgrad = True
    fired = []

    def hook(_):
        fired.append(True)
        if not parameter.grad_added_to_main_grad or getattr(parameter, "zero_out_wgrad", False):
            parameter.main_grad.add_(parameter.grad)
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(hook)
    for _ in range(2):
        parameter.grad_added_to_main_grad = False
        output = linear_objective(
            hidden,
            parameter,
            labels,
            SFT,
            backward=strategy,
            gradient_accumulation_fusion=True,
            chunk_vocab=70,
        )
        loss = (output.loss * upstream).sum()
        if tied:
            loss = loss + (parameter[3].double() * 7).sum()
        loss.backward()
    assert fired == [True, True]
    expected = 2 * gradients(problem, dtype=torch.float64)[1]
    if tied:
        expected[3] += 14
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert (parameter.main_grad - expected).norm() < tolerance * expected.norm()


def test_accumulation_into_a_buffer_of_half_precision(problem):
    """What Megatron makes without --accumulate-allreduce-grads-in-fp32."""
    hidden, weight, labels, upstream = problem
    weight = weight.bfloat16().requires_grad_()
    weight.main_grad = torch.zeros_like(weight)
    options = {"gradient_accumulation_fusion": True, "chunk_vocab": 70}
    for _ in range(2):
        output = linear_objective(hidden.bfloat16(), weight, labels, SFT, **options)
        output.loss.backward(upstream.float())
    expected = 2 * gradients(problem)[1]
    assert (weight.main_grad - expected).norm() < 1e-2 * expected.norm()


def test_main_grad_alone_is_enough(problem):
    """Without Megatron's flag there are no hooks to satisfy, and autograd gets nothing."""
    hidden, weight, labels, upstream = problem
    weight.requires_grad_().main_grad = torch.ones_like(weight)
    options = {"gradient_accumulation_fusion": True}
    linear_objective(hidden, weight, labels, SFT, **options).loss.backward(upstream)
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad - 1, gradients(problem)[1])


@pytest.mark.parametrize(
    ("main_grad", "message"),
    [(None, "needs a buffer weight.main_grad"), ((3, 4), r"shape \(3, 4\)")],
)
def test_fused_accumulation_without_a_fitting_buffer_is_refused(problem, main_grad, message):
    hidden, weight, labels, _ = problem
    weight.requires_grad_()
    if main_grad:
        weight.main_grad = torch.zeros(main_grad)
    with pytest.raises(ValueError, match=message):
        linear_objective(hidden, weight, labels, SFT, gradient_accumulation_fusion=True)
    with torch.no_grad():  # evaluation accumulates nothing
        linear_objective(hidden, weight, labels, SFT, gradient_accumulation_fusion=True)


def test_the_dense_implementation_is_the_reference(problem):
    hidden, weight, labels, upstream = problem
    results = []
    for function, options in (
        (linear_objective, {"implementation": "reference"}),
        (reference_linear_objective, {}),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        output = function(h, w, labels, SFT, **options)
        output.loss.backward(upstream)
        results.append((output.loss, h.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES, indirect=True)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_a_checkpoint_that_is_recomputed(problem, strategy, use_reentrant):
    """Activation checkpointing runs the forward pass twice."""
    hidden, weight, labels, upstream = problem
    objective = build_objective("profit", threshold_direction="random", keep_fraction=0.5)

    def loss(hidden, weight):
        return linear_objective(
            hidden.tanh(), weight, labels, objective, backward=strategy, chunk_vocab=70
        ).loss

    def checkpointed(*inputs):
        return torch.utils.checkpoint.checkpoint(loss, *inputs, use_reentrant=use_reentrant)

    results = []
    for function in (loss, checkpointed):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        torch.manual_seed(3)  # of the random selection
        output = function(h, w)
        output.backward(upstream)
        results.append((output.detach(), h.grad, w.grad))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_inside_a_compiled_function(problem, backend):
    """Graph breaks, and the same numbers."""
    hidden, weight, labels, upstream = problem
    layer = torch.nn.Linear(24, 24, dtype=torch.float64)

    def loss(hidden, weight):
        output = linear_objective(layer(hidden).relu(), weight, labels, SFT, chunk_vocab=70)
        return (output.loss * upstream).sum()

    results = []
    for function in (loss, torch.compile(loss, backend=backend)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        results.append((function(h, w), *torch.autograd.grad(function(h, w), (h, w))))
    torch.testing.assert_close(*results)


@st.composite
def cases(draw):
    """Sizes, mask, scale of the logits, precision, cut and strategy of a random problem."""
    return {
        "num_rows": draw(st.integers(1, 40)),
        "num_hidden": draw(st.integers(1, 30)),
        "vocab": draw(st.integers(1, 90)),
        "padding": draw(st.integers(0, 5)),
        "supervised": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "repeated": draw(st.booleans()),
        "scale": draw(st.sampled_from([0.0, 0.3, 30.0, 1000.0])),
        "seed": draw(st.integers(0, 2**31)),
        "chunk_vocab": draw(st.sampled_from([None, 1, 7, 32])),
        "backward": draw(st.sampled_from(["auto", "save", "recompute"])),
    }


@pytest.mark.parametrize("objective", every_objective(), ids=repr)
@settings(max_examples=25)
@given(case=cases())
def test_any_problem_equals_the_oracle(objective, case):
    assert_equals_the_oracle(objective, case)


@pytest.mark.parametrize("name", ["sft", "profit", "entropy"])
@settings(max_examples=4)
@given(case=cases(), chunk_vocab=st.sampled_from([None, 99_999, 248_319]))
def test_the_vocabulary_of_qwen3_5_equals_the_oracle(name, case, chunk_vocab):
    objective = next(one for one in every_objective() if one.name == name)
    sizes = {"vocab": 248_320, "num_hidden": min(case["num_hidden"], 3)}
    sizes["num_rows"] = min(case["num_rows"], 4)
    assert_equals_the_oracle(objective, {**case, **sizes, "chunk_vocab": chunk_vocab})


def assert_equals_the_oracle(objective, case):
    """Loss, weight and both gradients in float64, with random upstream gradients."""
    generator = torch.Generator().manual_seed(case["seed"])
    num_rows, vocab, scale = case["num_rows"], case["vocab"], case["scale"]
    if objective.name not in ("sft", "profit"):
        # Some weights are ill-conditioned where p is nearly 1: roots of an entropy, 1 / (1 - p).
        scale = min(scale, 0.3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = normal(num_rows, case["num_hidden"]) * scale
    weight = normal(vocab + case["padding"], case["num_hidden"])
    labels = torch.randint(1 if case["repeated"] else vocab, (num_rows,), generator=generator)
    labels[torch.rand(num_rows, generator=generator) >= case["supervised"]] = -100
    vectors = {
        "loss_weight": normal(num_rows).relu(),
        "ref_log_prob": -normal(num_rows).abs(),
        "ref_lower_mass": torch.rand(num_rows, generator=generator, dtype=torch.float64),
        "old_log_prob": -normal(num_rows).abs(),
        "min_log_prob": -3 - normal(num_rows).abs(),
        "max_log_prob": -1 - normal(num_rows).abs(),
        "median_loss": 1 + normal(num_rows).abs(),
        "uniform": torch.rand(num_rows, generator=generator, dtype=torch.float64),
        "selected": torch.rand(num_rows, generator=generator) < 0.5,
    }
    upstream = normal(num_rows)
    results = []
    for function, options in (
        (linear_objective, {name: case[name] for name in ("chunk_vocab", "backward")}),
        (reference_linear_objective, {}),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        output = function(h, w, labels, objective, vocab_size=vocab, **vectors, **options)
        output.loss.backward(upstream)
        results.append((output.loss.detach(), output.statistics.weight, h.grad, w.grad))
    for ours, expected in zip(*results, strict=True):
        size = expected.nan_to_num(0, 0, 0).abs().max().item()
        torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-9 * max(1.0, size, scale))


@pytest.mark.parametrize("backward", ["recompute", "save"])
def test_a_frozen_weight_costs_no_product(problem, backward):
    """As under adapters: the products of the weight's gradient do not run, the others give the same bits."""
    hidden, weight, labels, upstream = problem
    counted, found = [], []
    for is_trained in (True, False):
        rows = hidden.clone().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            output = linear_objective(
                rows, weight.clone().requires_grad_(is_trained), labels, SFT, backward=backward
            )
            output.loss.backward(upstream)
        counted.append(counter.get_total_flops())
        found.append(rows.grad)
    supervised = int((labels != -100).sum())
    assert counted[0] - counted[1] == 2 * supervised * weight.numel()
    assert torch.equal(*found)
