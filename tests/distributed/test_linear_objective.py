"""The fused operation on a vocabulary split over 2 and 4 processes equals the same on one process.

All checks of a world run inside one spawn, since starting processes takes longer than checking.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from objective_options import every_objective
from spawned_ranks import spawn_ranks

from megatron_profit.objectives import (
    Objective,
    ObjectiveOutput,
    build_objective,
    token_uniform,
)
from megatron_profit.objectives.base import OPTIONAL_STATISTICS
from megatron_profit.ops import linear_objective

N, H, ROWS = 41, 12, 32  # ROWS: of the weight over all ranks, padding included


@dataclass(frozen=True)
class EveryStatistic(Objective):
    """w = sg(H * sum p^2 + H_20 + u / R + p / p_ref + p_old + selected)."""

    @property
    def required_statistics(self):
        return frozenset(OPTIONAL_STATISTICS) - {"uniform"}

    def evaluate(self, statistics):
        weight = statistics.entropy * statistics.sum_squared_prob + statistics.top20_entropy
        weight = weight + statistics.selected + statistics.old_log_prob.exp()
        weight = weight + statistics.lower_mass / statistics.rank
        weight = weight + (statistics.log_prob.detach() - statistics.ref_log_prob).exp()
        return ObjectiveOutput(-weight * statistics.log_prob, weight)


OBJECTIVES = [
    build_objective("sft"),
    build_objective("profit", threshold_direction="higher", prob_threshold=0.02),
    build_objective("profit", threshold_direction="lower", prob_threshold=0.02),
    build_objective("profit", threshold_direction="middle", prob_threshold=(0.01, 0.05)),
    build_objective("profit", threshold_direction="random", keep_fraction=0.5),
    EveryStatistic(),
    *every_objective(),
]
SFT, RANDOM = OBJECTIVES[0], OBJECTIVES[4]


class Problem:
    """The same random inputs on every rank; rows 0, 5, ... have no label, rows 2, 8, ... no weight."""

    def __init__(self, vocab_size, dtype=torch.float64):
        generator = torch.Generator().manual_seed(vocab_size)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.vocab_size = vocab_size
        self.hidden, self.weight = random(N, H).to(dtype), random(ROWS, H).to(dtype) / 2
        self.weight[vocab_size:] = torch.nan  # padding must never be read
        self.labels = torch.randint(vocab_size, (N,), generator=generator)
        self.labels[::5] = -100
        self.upstream = random(N)
        self.vectors = {
            "loss_weight": random(N).abs(),
            "ref_log_prob": -random(N).abs() - 2,
            "ref_lower_mass": random(N).sigmoid(),
            "old_log_prob": -random(N).abs(),
            "min_log_prob": -4 - random(N).abs(),
            "max_log_prob": -2 - random(N).abs(),
            "median_loss": 1 + random(N).abs(),
            "uniform": token_uniform(3, torch.zeros(N, dtype=torch.int64), torch.arange(N)),
        }
        self.vectors["selected"] = self.vectors["uniform"] > 0.3
        self.vectors["loss_weight"][2::6] = 0

    def run(self, objective, group=None, **options):
        """Returns (output, gradient of hidden, gradient of this rank's weight)."""
        hidden = self.hidden.clone().requires_grad_()
        weight = shard(self.weight, group).clone().requires_grad_()
        options = {"vocab_size": self.vocab_size, **self.vectors, **options}
        output = linear_objective(hidden, weight, self.labels, objective, group=group, **options)
        output.loss.backward(self.upstream.to(output.loss.dtype))
        return output, hidden.grad, weight.grad


def shard(weight, group):
    return weight if group is None else weight.chunk(group.size())[group.rank()]


def assert_equal_results(result, expected, group, **tolerance):
    (output, *grads), (expected_output, expected_hidden, expected_weight) = result, expected
    pairs = [
        (output.loss, expected_output.loss),
        (grads[0], expected_hidden),
        (grads[1], shard(expected_weight, group)),
    ]
    vectors, expected_vectors = (o.statistics.all_rows() for o in (output, expected_output))
    assert vectors.keys() == expected_vectors.keys()
    pairs += [(vectors[name], expected_vectors[name]) for name in vectors]
    for ours, one_process in pairs:
        torch.testing.assert_close(ours, one_process, **tolerance)


def check_every_objective(group):
    """Uneven vocabularies: the last rank, or all but the first, may hold nothing but padding."""
    for vocab_size in (ROWS, 23, ROWS // group.size() - 1):
        problem = Problem(vocab_size)
        for objective in OBJECTIVES:
            result = problem.run(objective, group, chunk_vocab=15)
            expected = problem.run(objective)
            assert_equal_results(result, expected, group, rtol=1e-10, atol=1e-12)
            trained = bool(expected[0].statistics.weight.any())
            assert trained == bool(expected[1].abs().sum() > 0)
            assert trained or objective not in OBJECTIVES[:6], "a test of nothing"


def check_lower_precision(group):
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        problem = Problem(23, dtype)
        for objective in (SFT, RANDOM, EveryStatistic()):
            result, expected = problem.run(objective, group), problem.run(objective)
            assert_equal_results(result, expected, group, rtol=tolerance, atol=tolerance)


def check_dense_implementation(group):
    """The reference gathers the logits; strategies and cuts of the fused path equal it."""
    problem = Problem(23)
    expected = problem.run(EveryStatistic(), group, implementation="reference")
    assert_equal_results(expected, problem.run(EveryStatistic()), group, rtol=1e-9, atol=1e-12)
    for backward in ("save", "recompute"):
        result = problem.run(EveryStatistic(), group, backward=backward, chunk_vocab=5)
        assert_equal_results(result, problem.run(EveryStatistic()), group, rtol=1e-9, atol=1e-12)


def check_one_collective_for_all_rows(group):
    """Forward one gather, and one sum of the targets' logits; backward one sum; whatever the blocks."""
    calls = []
    originals = {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}

    def counted(name):
        def call(*args, **kwargs):
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, counted(name))
    try:
        for objective in (SFT, EveryStatistic()):
            Problem(23).run(objective, group, chunk_vocab=3)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    assert calls == ["all_gather", "all_reduce", "all_reduce", "all_gather", "all_reduce"]


def check_ranks_agree_to_the_bit(group):
    """Else a token at the threshold would be kept on one rank and dropped on another."""
    output, grad_hidden, _ = Problem(23, torch.float32).run(EveryStatistic(), group)
    for tensor in (output.loss.detach(), output.statistics.weight, grad_hidden):
        gathered = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(gathered, tensor.contiguous(), group=group)
        assert all(torch.equal(tensor, other) for other in gathered)


def check_partial_hidden_gradient(group):
    problem = Problem(23)
    _, partial, grad_weight = problem.run(EveryStatistic(), group, reduce_hidden_grad=False)
    _, complete, complete_weight = problem.run(EveryStatistic())
    assert not torch.allclose(partial, complete)
    dist.all_reduce(partial, group=group)
    torch.testing.assert_close(partial, complete)
    torch.testing.assert_close(grad_weight, shard(complete_weight, group))


def check_nothing_supervised(group):
    for vectors in ({}, {"loss_weight": torch.zeros(N)}):
        problem = Problem(23)
        if not vectors:
            problem.labels[:] = -100
        for objective in OBJECTIVES:
            output, *grads = problem.run(objective, group, **vectors)
            assert output.loss.requires_grad
            assert all(tensor.eq(0).all() for tensor in (output.loss, *grads))


def check_everything_dropped(group):
    """Labels but no weight: the forward collectives run, and the gradient is zero on every rank."""
    objective = build_objective("profit", threshold_direction="higher", prob_threshold=1)
    output, *grads = Problem(23).run(objective, group)
    assert output.statistics.supervised.any()
    assert all(tensor.eq(0).all() for tensor in (output.loss, *grads))


def check_frozen_weight(group):
    problem = Problem(23)
    hidden = problem.hidden.clone().requires_grad_()
    weight = shard(problem.weight, group)
    loss = linear_objective(
        hidden, weight, problem.labels, SFT, group=group, vocab_size=23, chunk_vocab=7
    ).loss
    loss.backward(problem.upstream)
    problem.vectors = {}
    torch.testing.assert_close(hidden.grad, problem.run(SFT)[1])


def check_refusals(group):
    """Every rank raises, before any collective: the checks after this one would hang otherwise."""
    problem = Problem(23)
    with pytest.raises(ValueError, match=r"must agree over the group; pass uniform=\[N\]"):
        problem.run(RANDOM, group, uniform=None)
    with pytest.raises(ValueError, match=f"vocab_size 99 is outside 1..{ROWS}"):
        problem.run(SFT, group, vocab_size=99)
    problem.labels[3] = 23
    with pytest.raises(ValueError, match=r"label 23 in row 3 .* 0\.\.22"):
        problem.run(SFT, group)


CHECKS = [
    check_every_objective,
    check_refusals,
    check_lower_precision,
    check_dense_implementation,
    check_one_collective_for_all_rows,
    check_ranks_agree_to_the_bit,
    check_partial_hidden_gradient,
    check_nothing_supervised,
    check_everything_dropped,
    check_frozen_weight,
]


def run_checks(world):
    for check in CHECKS:
        check(world)
    if world.size() == 4:  # a rank's number in the group is not its number in the world
        pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        check_lower_precision(pairs[world.rank() % 2])
        check_partial_hidden_gradient(pairs[world.rank() % 2])


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_split_vocabulary_equals_one_process(world_size, tmp_path):
    spawn_ranks(run_checks, world_size, tmp_path)
