"""The fused operation on one process: values, gradients, edges and refusals.

Every comparison is against the dense float64 oracle or against a formula written out here.
"""

from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from objective_options import every_objective
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_profit.objectives import Objective, ObjectiveOutput, build_objective, weighted_nll
from megatron_profit.objectives.base import COMPUTED_STATISTICS, OPTIONAL_STATISTICS
from megatron_profit.ops import linear_objective, reference_linear_objective
from megatron_profit.ops.tiling import Tiling

N, H, V = 123, 252, 507
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class EveryStatistic(Objective):
    """w = sg(H * sum p^2 + H_20 + u + R / 1000 + p / p_ref + ...): wrong as soon as one is."""

    @property
    def required_statistics(self):
        return frozenset(OPTIONAL_STATISTICS) - {"uniform"}

    def evaluate(self, statistics):
        weight = statistics.entropy * statistics.sum_squared_prob + statistics.top20_entropy
        weight = weight + statistics.selected + statistics.old_log_prob.exp()
        weight = weight + statistics.lower_mass + statistics.rank / 1000
        weight = weight + statistics.ref_lower_mass * statistics.median_loss
        weight = weight + statistics.max_log_prob - statistics.min_log_prob
        weight = weight + (statistics.log_prob.detach() - statistics.ref_log_prob).exp()
        return ObjectiveOutput(-weight * statistics.log_prob, weight)


@dataclass(frozen=True)
class TopEntropy(Objective):
    """Trains the half of the tokens of highest entropy: needs all tokens at once."""

    @property
    def required_statistics(self):
        return frozenset({"entropy"})

    def evaluate(self, statistics):
        kept = statistics.entropy >= statistics.entropy.median()
        return ObjectiveOutput(-statistics.log_prob * kept, kept.to(statistics.log_prob.dtype))


OBJECTIVES = [
    build_objective("sft"),
    build_objective("profit", threshold_direction="higher", prob_threshold=1e-3),
    build_objective("profit", threshold_direction="lower", prob_threshold=1e-3),
    build_objective("profit", threshold_direction="middle", prob_threshold=(3e-4, 3e-3)),
    build_objective("profit", threshold_direction="random", keep_fraction=0.6),
    EveryStatistic(),
    TopEntropy(),
]
SFT = OBJECTIVES[0]


def label_of(objective):
    direction = getattr(objective, "threshold_direction", "")
    return f"{type(objective).__name__} {direction}".strip()


@dataclass
class Problem:
    """Inputs and upstream gradients in float64; rows 0, 7, 14, ... have no label."""

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    upstream: torch.Tensor
    vectors: dict[str, torch.Tensor]

    @classmethod
    def random(cls, num_rows=N, num_hidden=H, vocabulary=V, seed=0):
        generator = torch.Generator().manual_seed(seed)
        options = {"generator": generator, "dtype": torch.float64}
        labels = torch.randint(vocabulary, (num_rows,), generator=generator)
        labels[::7] = -100
        loss_weight = torch.rand(num_rows, **options) * 2
        loss_weight[3::11] = 0
        # Rounded once, so that every precision starts from the same numbers.
        return cls(
            torch.randn(num_rows, num_hidden, **options).bfloat16().double(),
            (torch.randn(vocabulary, num_hidden, **options) * 0.15).bfloat16().double(),
            labels,
            torch.randn(num_rows, **options),
            {
                "loss_weight": loss_weight,
                "ref_log_prob": -6 - torch.rand(num_rows, **options),
                "ref_lower_mass": torch.rand(num_rows, **options),
                "old_log_prob": -torch.rand(num_rows, **options),
                "min_log_prob": -6 - torch.rand(num_rows, **options),
                "max_log_prob": -1 - torch.rand(num_rows, **options),
                "median_loss": 1 + torch.rand(num_rows, **options),
                "uniform": torch.rand(num_rows, **options),
                "selected": torch.rand(num_rows, generator=generator) < 0.5,
            },
        )

    def run(self, function, objective, dtype=torch.float64, **options):
        """Returns (output, gradient of hidden, gradient of weight)."""
        hidden = self.hidden.to(dtype, copy=True).requires_grad_()
        weight = self.weight.to(dtype, copy=True).requires_grad_()
        output = function(hidden, weight, self.labels, objective, **self.vectors, **options)
        output.loss.backward(self.upstream.to(output.loss.dtype))
        return output, hidden.grad, weight.grad


def assert_same_result(result, expected, **tolerance):
    (output, *grads), (expected_output, *expected_grads) = result, expected
    for ours, theirs in zip(
        [output.loss, output.statistics.weight, *grads],
        [expected_output.loss, expected_output.statistics.weight, *expected_grads],
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, check_dtype=False, **tolerance)
    expected_vectors = expected_output.statistics.all_rows()
    for name, vector in output.statistics.all_rows().items():
        torch.testing.assert_close(vector, expected_vectors[name], check_dtype=False, **tolerance)


@pytest.mark.parametrize("objective", every_objective(), ids=repr)
def test_every_objective_in_float64_equals_the_reference(objective):
    problem = Problem.random()
    problem.vectors["old_log_prob"] -= 7  # near log p, so that the ratio is clipped here and there
    result = problem.run(linear_objective, objective, chunk_vocab=99)
    expected = problem.run(reference_linear_objective, objective)
    assert_same_result(result, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=label_of)
@pytest.mark.parametrize("chunk_vocab", [None, 50, 499])
def test_equals_the_oracle_in_float64(objective, chunk_vocab):
    problem = Problem.random()
    result = problem.run(linear_objective, objective, chunk_vocab=chunk_vocab)
    expected = problem.run(reference_linear_objective, objective)
    assert_same_result(result, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("objective", [*OBJECTIVES, *every_objective()], ids=repr)
def test_equals_the_oracle_in_float32(objective):
    problem = Problem.random()
    result = problem.run(linear_objective, objective, torch.float32, chunk_vocab=50)
    expected = problem.run(reference_linear_objective, objective)
    assert_same_result(result, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("objective", [*OBJECTIVES, *every_objective()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_dense_half_precision(objective, dtype):
    """The error against float64 is bounded by that of the usual loss in the same precision."""
    problem = Problem.random()
    if dtype == torch.float16:
        problem.upstream *= 1024  # a loss scale, without which small gradients have no digits
    exact = problem.run(reference_linear_objective, objective)
    dense = problem.run(reference_linear_objective, objective, dtype)
    chunked = problem.run(linear_objective, objective, dtype, chunk_vocab=40)
    assert chunked[0].loss.dtype == torch.float32
    assert chunked[1].dtype == chunked[2].dtype == dtype
    for ours, usual, truth in zip(
        (chunked[0].loss, *chunked[1:]),
        (dense[0].loss, *dense[1:]),
        (exact[0].loss, *exact[1:]),
        strict=True,
    ):
        # Behind it, float32 itself: (1 - p^10) / 10 and its autograd forget most p altogether.
        bound = 1.05 * (usual.double() - truth).norm() + 1e-6 * truth.norm() + 1e-15
        assert (ours.double() - truth).norm() <= bound


@pytest.mark.parametrize("objective", OBJECTIVES, ids=label_of)
def test_gradient_is_coefficient_times_softmax_minus_onehot(objective):
    """The formula itself, without autograd: catches a kernel that scales by one upstream gradient."""
    problem = Problem.random()
    output, grad_hidden, grad_weight = problem.run(linear_objective, objective)
    softmax = (problem.hidden @ problem.weight.t()).softmax(-1)
    onehot = torch.nn.functional.one_hot(problem.labels.clamp(min=0), V)
    scale = problem.upstream * problem.vectors["loss_weight"] * output.statistics.weight
    grad_logits = scale[:, None] * (softmax - onehot)
    torch.testing.assert_close(grad_hidden, grad_logits @ problem.weight)
    torch.testing.assert_close(grad_weight, grad_logits.t() @ problem.hidden)


@pytest.mark.parametrize(
    "objective",
    [o for o in every_objective() if o.name in ("sft", "profit", "psft", "gce")],
    ids=repr,
)
def test_gradcheck(objective):
    """Of the objectives that hold no factor constant, whose gradient is that of their loss."""
    problem = Problem.random(num_rows=12, num_hidden=4, vocabulary=5)
    problem.vectors["loss_weight"] += 0.1
    problem.vectors["ref_log_prob"] += 5  # some are above the thresholds

    def loss(hidden, weight):
        return linear_objective(
            hidden, weight, problem.labels, objective, chunk_vocab=2, **problem.vectors
        ).loss

    inputs = (problem.hidden.requires_grad_(), problem.weight.requires_grad_())
    assert loss(*inputs).count_nonzero() > 0
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("vocab_size", [1, 300, 506, 507])
def test_padding_stays_out_of_the_softmax(vocab_size):
    problem = Problem.random()
    problem.labels.clamp_(max=vocab_size - 1)
    problem.weight[vocab_size:] = torch.inf  # would make everything NaN
    objective = EveryStatistic()
    result = problem.run(linear_objective, objective, vocab_size=vocab_size)
    assert result[2][vocab_size:].eq(0).all()

    problem.weight = problem.weight[:vocab_size]
    expected = problem.run(reference_linear_objective, objective)
    assert_same_result((*result[:2], result[2][:vocab_size]), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("vocabulary", [1, 3, 20, 21])
def test_entropy_of_the_largest_logits_where_there_are_few(vocabulary):
    problem = Problem.random(vocabulary=vocabulary)
    result = problem.run(linear_objective, EveryStatistic())
    expected = problem.run(reference_linear_objective, EveryStatistic())
    assert_same_result(result, expected, rtol=1e-9, atol=1e-12)
    if vocabulary <= 20:
        statistics = result[0].statistics
        torch.testing.assert_close(statistics.top20_entropy, statistics.entropy)


def test_repeated_targets_add_up():
    problem = Problem.random()
    problem.labels[:] = 3
    result = problem.run(linear_objective, SFT, chunk_vocab=10)
    expected = problem.run(reference_linear_objective, SFT)
    assert_same_result(result, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=label_of)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["labels", "loss_weight", "no rows"])
def test_nothing_supervised_is_a_zero_with_a_graph(objective, dtype, how):
    problem = Problem.random(num_rows=0 if how == "no rows" else N)
    if how == "labels":
        problem.labels[:] = -100
    elif how == "loss_weight":
        problem.vectors["loss_weight"][:] = 0
    output, grad_hidden, grad_weight = problem.run(linear_objective, objective, dtype)
    assert output.loss.requires_grad
    for tensor in (output.loss, grad_hidden, grad_weight, output.statistics.weight):
        assert tensor.eq(0).all()
    assert grad_hidden.shape == problem.hidden.shape
    assert grad_weight.shape == problem.weight.shape


def test_one_row():
    problem = Problem.random(num_rows=2, num_hidden=1, vocabulary=1)
    output, grad_hidden, grad_weight = problem.run(linear_objective, SFT)
    for tensor in (output.loss, grad_hidden, grad_weight):
        assert tensor.eq(0).all()  # a vocabulary of one is certain


def test_unsupervised_rows_are_never_read():
    problem = Problem.random()
    supervised = (problem.labels != -100) & (problem.vectors["loss_weight"] != 0)
    problem.hidden[~supervised] = torch.nan
    output, grad_hidden, grad_weight = problem.run(linear_objective, EveryStatistic())
    assert torch.equal(output.statistics.supervised, supervised)
    for tensor in (output.loss, grad_hidden, *output.statistics.all_rows().values()):
        assert tensor[~supervised].eq(0).all()
    assert grad_weight.isfinite().all()


class Watch(TorchDispatchMode):
    """The largest tensor that was made, and the factors of every matrix product."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        packet = func.overloadpacket
        if packet in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.products.append(tuple(tensor.shape for tensor in args[-2:]))
        return result

    def products_with(self, *inner):
        """Products [a, inner] @ [inner, b] as (a, b) for one of these inner dimensions."""
        return [(a[0], b[1]) for a, b in self.products if a[1] in inner]


@pytest.mark.parametrize("backward", ["recompute", "save"])
def test_work_follows_the_mask(backward):
    """Each supervised row meets the weight once in the forward pass, each counted one again in the
    backward pass: twice with kept logits, three times without."""
    problem = Problem.random()
    problem.upstream[60:70] = 0
    with Watch() as watch:
        output, *_ = problem.run(
            linear_objective, OBJECTIVES[1], chunk_vocab=100, backward=backward
        )
    supervised = int(output.statistics.supervised.sum())
    counted = int(((output.statistics.weight != 0) & (problem.upstream != 0)).sum())
    assert 0 < counted < supervised
    logits = watch.products_with(H)
    assert max(columns for _, columns in logits) <= 100
    forward = supervised * V
    again = counted * V if backward == "recompute" else 0
    assert sum(rows * columns for rows, columns in logits) == forward + again
    to_hidden = [(a, b) for a, b in watch.products if b == (a[1], H) and a[1] in (100, V % 100)]
    assert sum(a[0] * a[1] for a, _ in to_hidden) == counted * V


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e4, 1e30])
@pytest.mark.parametrize("chunk_vocab", [None, 1, 3])
def test_huge_logits(dtype, size, chunk_vocab):
    """Targets of probability 1, of 1/2 beside a huge equal, and of 0."""
    weight = torch.tensor([[1.0], [1.0], [-1.0], [0.0]], dtype=dtype)
    hidden = torch.tensor([[size], [size], [-size], [size]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([0, 2, 2, 3])
    output = linear_objective(hidden, weight, labels, OnEntropy(), chunk_vocab=chunk_vocab)
    ln2 = 0.6931471805599453
    expected = torch.tensor([-ln2, -2 * size - ln2, 0.0, -size - ln2], dtype=dtype)
    torch.testing.assert_close(output.statistics.log_prob, expected)
    torch.testing.assert_close(
        output.statistics.entropy, torch.tensor([ln2, ln2, 0.0, ln2], dtype=dtype)
    )
    output.loss.sum().backward()
    # Weight 1 + H, times sum_v softmax_v w_v - w_target.
    by_hand = torch.tensor([[0.0], [2.0], [0.0], [1.0]], dtype=dtype) * (1 + ln2)
    torch.testing.assert_close(hidden.grad, by_hand)


@dataclass(frozen=True)
class OnEntropy(Objective):
    """w = 1 + sg(H)."""

    @property
    def required_statistics(self):
        return frozenset({"entropy"})

    def evaluate(self, statistics):
        weight = 1 + statistics.entropy
        return ObjectiveOutput(-weight * statistics.log_prob, weight)


def test_large_logits_lose_no_precision_in_the_backward_pass():
    """Logits around 1e4 differ by little; a single log-sum-exp in float32 would be off by 5e-4."""
    problem = Problem.random(num_hidden=8)
    problem.hidden[:, 0], problem.weight[:, 0] = 128, 80
    result = problem.run(linear_objective, SFT, torch.float32)
    expected = problem.run(reference_linear_objective, SFT)
    dense = problem.run(reference_linear_objective, SFT, torch.float32)
    for ours, usual, truth in zip(result[1:], dense[1:], expected[1:], strict=True):
        assert (ours - truth).norm() <= 1.05 * (usual - truth).norm()


LOGITS = torch.tensor([0.0, -0.5, torch.nan, 0.25, -1.0], dtype=torch.float64)


def of_one_token(objective, gap, dtype, **options):
    """A token whose target, the third entry, has the logit `gap`: its output and gradient by logit [V]."""
    weight = LOGITS.nan_to_num(gap).to(dtype)[:, None].requires_grad_()
    options = {n: v.to(dtype) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    hidden = torch.ones(1, 1, dtype=dtype)
    output = linear_objective(hidden, weight, torch.tensor([2]), objective, **options)
    output.loss.sum().backward()
    return output, weight.grad[:, 0].double()


def softmax_minus_onehot(gap):
    """[V] of that token in float64: at the target minus the sum of the others, without cancellation."""
    gradient = LOGITS.nan_to_num(gap).softmax(-1)
    gradient[2] = 0
    gradient[2] = -gradient.sum()
    return gradient


@pytest.mark.parametrize(
    "objective",
    [o for o in every_objective() if "selected" not in o.required_statistics],
    ids=repr,
)
@pytest.mark.parametrize("chunk_vocab", [None, 2])
def test_no_digit_is_lost_where_the_model_is_nearly_certain(objective, chunk_vocab):
    """In float32 a softmax within 6e-8 of 1 is 1; loss, weight and gradient go on to tell it from 1."""
    given = {"ref_log_prob": torch.tensor([-1.2]), "uniform": torch.tensor([0.1])}
    given |= {"ref_lower_mass": torch.tensor([0.7]), "median_loss": torch.tensor([1.3])}
    given |= {"min_log_prob": torch.tensor([-7.7]), "max_log_prob": torch.tensor([-0.7])}
    for gap in (-60.0, -20.0, -3.0, 0.0, 3.0, 8.0, 12.0, 15.0, 16.0, 17.0, 18.0, 20.0, 30.0):
        given["old_log_prob"] = torch.tensor([min(-0.1, gap)])
        exact, _ = of_one_token(objective, gap, torch.float64, **given)
        output, gradient = of_one_token(
            objective, gap, torch.float32, chunk_vocab=chunk_vocab, **given
        )
        for ours, truth in (
            (output.loss, exact.loss),
            (output.statistics.weight, exact.statistics.weight),
            (gradient, exact.statistics.weight * softmax_minus_onehot(gap)),
        ):
            torch.testing.assert_close(ours.double(), truth, rtol=2e-5, atol=1e-37)


@pytest.mark.parametrize("gap", [5.0, 17.0, 25.0, 40.0])
@pytest.mark.parametrize("ref", [0.3, 1e-6])
def test_the_anchor_of_asft_pulls_at_a_certain_target(gap, ref):
    """Down by lambda (p - p_ref) at the target, up by as much at all others together, by their p_v."""
    strength = 0.5
    objective = build_objective("asft", kl_weight=strength)
    given = {"ref_log_prob": torch.tensor([ref]).log()}
    _, gradient = of_one_token(objective, gap, torch.float32, **given)
    rest = -softmax_minus_onehot(gap)[2]
    pull = strength * (1 - rest - ref) - rest * (1 - rest)
    assert gradient[2] == pytest.approx(float(pull), rel=1e-5)
    others = [0, 1, 3, 4]
    torch.testing.assert_close(
        gradient[others], -pull * LOGITS[others].softmax(-1), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("chunk_vocab", [None, 1, 2])
def test_minus_infinite_logits(chunk_vocab):
    """A float16 logit below -65504 is -inf: probability 0, no part in the entropy."""
    hidden = torch.tensor([[300.0]], dtype=torch.float16, requires_grad=True)
    weight = torch.tensor([[-300.0], [0.0], [0.0]], dtype=torch.float16)
    output = linear_objective(
        hidden, weight, torch.tensor([1]), OnEntropy(), chunk_vocab=chunk_vocab
    )
    torch.testing.assert_close(output.statistics.entropy, torch.tensor([2.0]).log())
    output.loss.sum().backward()
    assert hidden.grad.isfinite().all()

    dropped = build_objective("profit", threshold_direction="higher", prob_threshold=0.1)
    output = linear_objective(hidden, weight, torch.tensor([0]), dropped, chunk_vocab=chunk_vocab)
    assert output.statistics.log_prob.item() == -torch.inf
    assert output.loss.item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [2, 3, 7, 10, 14, 20])
@pytest.mark.parametrize("direction", ["higher", "lower"])
def test_probability_exactly_at_the_threshold_is_kept(direction, vocabulary, dtype):
    objective = build_objective(
        "profit", threshold_direction=direction, prob_threshold=1 / vocabulary
    )
    output = linear_objective(
        torch.ones(3, 4, dtype=dtype),
        torch.ones(vocabulary, 4, dtype=dtype),
        torch.tensor([0, 1, -100]),
        objective,
    )
    assert output.statistics.weight.tolist() == [1, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward", ["save", "recompute"])
def test_callers_tensors_are_left_alone(dtype, backward):
    problem = Problem.random()
    hidden, weight = (tensor.to(dtype) for tensor in (problem.hidden, problem.weight))
    upstream = problem.upstream.to(torch.promote_types(dtype, torch.float32))
    tensors = [hidden, weight, problem.labels, upstream, *problem.vectors.values()]
    copies = [tensor.clone() for tensor in tensors]
    hidden.requires_grad_()
    weight.requires_grad_()
    output = linear_objective(
        hidden, weight, problem.labels, EveryStatistic(), backward=backward, **problem.vectors
    )
    output.loss.backward(upstream, retain_graph=True)
    first = hidden.grad.clone()
    output.loss.backward(upstream)  # nothing that was saved has been overwritten either
    torch.testing.assert_close(hidden.grad, 2 * first)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor.detach(), copy)


def test_memory_in_another_order():
    """Views such as a transposed weight give what their copies give."""
    problem = Problem.random()
    expected = problem.run(linear_objective, EveryStatistic())
    wide = torch.zeros(N, 2 * H, dtype=torch.float64)
    wide[:, ::2] = problem.hidden
    hidden = wide[:, ::2].detach().requires_grad_()
    weight = problem.weight.t().contiguous().t().detach().requires_grad_()
    assert not hidden.is_contiguous()
    assert not weight.is_contiguous()
    output = linear_objective(
        hidden, weight, problem.labels, EveryStatistic(), chunk_vocab=99, **problem.vectors
    )
    output.loss.backward(torch.stack([problem.upstream] * 2, 1)[:, 0])
    assert_same_result((output, hidden.grad, weight.grad), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backward", ["save", "recompute"])
@pytest.mark.parametrize("upstream", [torch.inf, torch.nan])
def test_an_overflow_from_upstream_shows(upstream, backward):
    """A loss scale that is too large must end in a gradient that fp16 training refuses."""
    problem = Problem.random()
    problem.upstream[1] = upstream
    _, grad_hidden, grad_weight = problem.run(
        linear_objective, SFT, torch.float16, backward=backward
    )
    assert not grad_hidden[1].isfinite().any()
    assert grad_hidden[2:].isfinite().all()
    assert not grad_weight.isfinite().all()


def test_only_what_is_asked_for_is_computed():
    problem = Problem.random()
    inputs = (problem.hidden, problem.weight, problem.labels)
    statistics = linear_objective(*inputs, SFT).statistics
    for name in COMPUTED_STATISTICS:
        assert getattr(statistics, name) is None
    assert vars(statistics.tokens).keys() == {"log_prob", "softmax_prob"}
    assert linear_objective(*inputs, TopEntropy()).statistics.sum_squared_prob is None
    wanted = linear_objective(*inputs, SFT, extra_statistics={"entropy"}).statistics
    assert wanted.entropy is not None
    assert wanted.sum_squared_prob is None
    with pytest.raises(
        ValueError, match="extra_statistics names uniform; the kernel computes entr"
    ):
        linear_objective(*inputs, SFT, extra_statistics={"uniform"})


def test_statistics_carry_no_graph_and_no_grad_works():
    problem = Problem.random()
    output, *_ = problem.run(linear_objective, EveryStatistic())
    assert not any(vector.requires_grad for vector in output.statistics.all_rows().values())
    with torch.no_grad():
        evaluated = linear_objective(
            problem.hidden.requires_grad_(),
            problem.weight,
            problem.labels,
            EveryStatistic(),
            **problem.vectors,
        )
    assert not evaluated.loss.requires_grad
    assert torch.equal(evaluated.loss, output.loss)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_costs_no_product(frozen):
    problem = Problem.random()
    inputs = {"hidden": problem.hidden.clone(), "weight": problem.weight.clone()}
    trained = "weight" if frozen == "hidden" else "hidden"
    inputs[trained].requires_grad_()
    output = linear_objective(
        inputs["hidden"], inputs["weight"], problem.labels, SFT, **problem.vectors
    )
    output.loss.backward(problem.upstream)
    assert inputs[frozen].grad is None
    _, grad_hidden, grad_weight = problem.run(linear_objective, SFT)
    expected = grad_weight if frozen == "hidden" else grad_hidden
    torch.testing.assert_close(inputs[trained].grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    """Forward and backward must round logits alike, wherever each of them runs."""
    problem = Problem.random()
    plain = problem.run(linear_objective, SFT, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = problem.run(linear_objective, SFT, dtype)
    assert_same_result(cast, plain, rtol=0, atol=0)


def test_a_statistic_is_the_same_whatever_the_chunk():
    problem = Problem.random()
    outputs = [
        problem.run(linear_objective, EveryStatistic(), torch.float32, chunk_vocab=rows)[0]
        for rows in (None, 5)
    ]
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("num_rows", "columns"), [(0, 2**23), (512, 16384), (10**5, 1024)])
def test_default_block_is_32_megabytes_on_a_cpu(num_rows, columns):
    weight = torch.empty(1, 1, dtype=torch.bfloat16)
    assert Tiling.of(weight, num_rows, None, "auto").columns == columns


@pytest.mark.parametrize(
    ("device", "backward", "vocabulary", "hidden", "kept"),
    [
        ("cpu", "recompute", 151_936, 1024, 0),
        ("cpu", "auto", 151_936, 1024, 1024),
        ("cpu", "save", 151_936, 1024, 4096),
        ("cpu", "auto", 151_936, 64, 883),
        ("meta", "recompute", 151_936, 1024, 0),
        ("meta", "auto", 151_936, 1024, 4416),
        ("meta", "auto", 151_936, 5120, 5120),
        ("cpu", "auto", 248_320, 1024, 1024),
        ("meta", "auto", 248_320, 1024, 2702),
        ("meta", "auto", 248_320, 5120, 5120),
    ],
)
def test_memory_of_kept_logits(device, backward, vocabulary, hidden, kept):
    """A multiple of the weight's, or for a small one 256 MB on a CPU and 1.25 GiB elsewhere."""
    weight = torch.empty(1, dtype=torch.bfloat16, device=device).expand(vocabulary, hidden)
    assert Tiling.of(weight, 10_000, None, backward).kept_rows == kept
    assert Tiling.of(weight, 100, None, backward).kept_rows == min(kept, 100)


@pytest.mark.parametrize("num_rows", [500, 2000])
def test_no_tensor_grows_with_the_tokens_times_the_vocabulary(num_rows):
    problem = Problem.random(num_rows, num_hidden=8, vocabulary=300)
    with Watch() as watch:
        problem.run(linear_objective, EveryStatistic(), chunk_vocab=100, backward="recompute")
    assert watch.largest <= num_rows * 100


@pytest.mark.parametrize("function", [linear_objective, reference_linear_objective])
def test_statistics_of_supervised_rows_and_of_all_rows(function):
    problem = Problem.random()
    statistics = problem.run(function, EveryStatistic())[0].statistics
    supervised = (problem.labels != -100) & (problem.vectors["loss_weight"] != 0)
    assert torch.equal(statistics.rows.index, supervised.nonzero()[:, 0])
    assert torch.equal(statistics.tokens.ref_log_prob, problem.vectors["ref_log_prob"][supervised])
    for name, vector in statistics.all_rows().items():
        assert torch.equal(getattr(statistics, name), vector)
        assert vector.shape == (N,)
        assert vector[~supervised].eq(0).all()
    assert torch.equal(statistics.prob[supervised], statistics.tokens.prob)
    assert torch.equal(statistics.weight[supervised], statistics.token_weight)
    with pytest.raises(AttributeError, match="no statistic margin is known"):
        _ = statistics.margin
    assert torch.equal(deepcopy(statistics).log_prob, statistics.log_prob)


@dataclass(frozen=True)
class Margin(Objective):
    """An objective of a user, with a statistic that this package does not know."""

    @property
    def required_statistics(self):
        return frozenset({"margin"})

    def evaluate(self, statistics):
        return ObjectiveOutput(-statistics.margin * statistics.log_prob, statistics.margin)


@pytest.mark.parametrize("options", [{}, {"implementation": "reference"}])
def test_an_external_statistic_of_any_name(options):
    problem = Problem.random()
    inputs = (problem.hidden, problem.weight, problem.labels, Margin())
    margin = torch.arange(N, dtype=torch.float64)
    output = linear_objective(*inputs, external={"margin": margin}, **options)
    assert torch.equal(output.statistics.weight, margin.where(problem.labels != -100, 0))
    assert torch.equal(output.statistics.margin, output.statistics.weight)
    with pytest.raises(
        ValueError, match=r'needs margin, which .*; pass external={"margin": \[N\]}'
    ):
        linear_objective(*inputs, **options)
    with pytest.raises(TypeError, match=r'no argument .margin.; .* external={"margin": \[N\]}'):
        linear_objective(*inputs, margin=margin, **options)
    with pytest.raises(ValueError, match="uniform is given twice"):
        linear_objective(*inputs, external={"uniform": margin}, uniform=margin, **options)
    for name in ("entropy", "log_prob", "prob"):
        with pytest.raises(ValueError, match=f"external statistic cannot be called '{name}'"):
            linear_objective(*inputs, external={"margin": margin, name: margin}, **options)


@dataclass(frozen=True)
class Named(Objective):
    """DFT that names the statistics which are always computed, too."""

    @property
    def required_statistics(self):
        return frozenset({"log_prob", "softmax_prob"})

    def evaluate(self, statistics):
        return weighted_nll(statistics.softmax_prob, statistics)


@pytest.mark.parametrize("options", [{}, {"implementation": "reference"}])
def test_an_objective_may_name_what_is_always_computed(options):
    problem = Problem.random()
    inputs = (problem.hidden, problem.weight, problem.labels)
    named = linear_objective(*inputs, Named(), **options)
    assert torch.equal(
        named.loss, linear_objective(*inputs, build_objective("dft"), **options).loss
    )


VALID = {
    "hidden": torch.zeros(4, 3),
    "weight": torch.zeros(5, 3),
    "labels": torch.tensor([0, 4, -100, 2]),
    "objective": SFT,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 1, 3)}, r"hidden has shape \(4, 1, 3\).*hidden \[N, H\]"),
        ({"hidden": torch.zeros(4, 2)}, r"hidden has shape \(4, 2\) and weight \(5, 3\)"),
        ({"weight": torch.zeros(3)}, r"weight \(3,\)"),
        (
            {"weight": torch.zeros(5, 3).half()},
            r"hidden is torch\.float32 and weight torch.float16",
        ),
        ({"weight": torch.zeros(5, 3, device="meta")}, "hidden is on cpu and weight on meta"),
        ({"labels": torch.tensor([0, 1, 2])}, r"labels has shape \(3,\).*4 rows"),
        ({"labels": torch.tensor([0, 1, 2, 3]).int()}, r"labels are torch\.int32; pass int64"),
        ({"labels": torch.tensor([0, -1, 2, 3])}, "label -1 in row 1 is neither -100"),
        ({"labels": torch.tensor([0, 1, 2, 5])}, r"label 5 in row 3 .* in 0\.\.4"),
        ({"vocab_size": 4}, r"label 4 in row 1 .* in 0\.\.3"),
        ({"vocab_size": 6}, r"vocab_size 6 is outside 1\.\.5"),
        ({"vocab_size": 0}, "vocab_size 0 is outside"),
        ({"chunk_vocab": 0}, "chunk_vocab is 0; pass at least 1"),
        ({"backward": "fast"}, "backward is 'fast'; choose one of auto, save, recompute"),
        ({"implementation": "cuda"}, "implementation is 'cuda'; choose one of auto, torch, triton"),
        ({"implementation": "triton"}, "triton' cannot run here: the inputs are on cpu"),
        ({"implementation": "reference", "backward": "save"}, "backward has no meaning for"),
        ({"loss_weight": torch.ones(3)}, r"loss_weight has shape \(3,\)"),
        ({"loss_weight": torch.ones(4).long()}, r"loss_weight is torch\.int64; pass a floating"),
        ({"uniform": torch.ones(4, 1)}, r"uniform has shape \(4, 1\)"),
        ({"selected": torch.ones(3) > 0}, r"selected has shape \(3,\)"),
        ({"selected": torch.ones(4).long()}, r"selected is torch\.int64; pass a mask"),
        ({"ref_log_prob": torch.ones(4, requires_grad=True)}, "ref_log_prob requires a gradient"),
        ({"objective": EveryStatistic()}, "EveryStatistic needs max_log_prob; pass max_log_prob="),
    ],
)
def test_refused_inputs(change, message):
    linear_objective(**VALID)
    with pytest.raises(ValueError, match=message):
        linear_objective(**{**VALID, **change})


def test_integer_matrices_are_refused():
    with pytest.raises(ValueError, match="pass both in one of float16, bfloat16"):
        linear_objective(torch.zeros(4, 3).long(), torch.zeros(5, 3).long(), VALID["labels"], SFT)


def test_random_selection_without_a_group_draws_for_itself():
    objective = build_objective("profit", threshold_direction="random", keep_fraction=0.5)
    hidden = torch.zeros(2000, 3)
    output = linear_objective(hidden, VALID["weight"], torch.ones(2000).long(), objective)
    assert abs(output.statistics.weight.mean() - 0.5) < 0.05
