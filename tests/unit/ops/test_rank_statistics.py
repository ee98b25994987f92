"""The rank of the target and the mass that is not above it, against Python's own counting."""

import math
from dataclasses import dataclass

import pytest
import torch

from megatron_profit.objectives import StatisticsOnly
from megatron_profit.ops import linear_objective, reference_linear_objective

BOTH = StatisticsOnly(frozenset({"rank", "lower_mass"}))


@dataclass
class Counted:
    """Logits of whole numbers, which every precision holds exactly: many are equal."""

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    rank: list
    lower_mass: list

    @classmethod
    def make(cls, vocab, padding=3, rows=40):
        generator = torch.Generator().manual_seed(vocab)
        hidden = torch.randint(-2, 3, (rows, 4), generator=generator).double()
        weight = torch.randint(-1, 2, (vocab + padding, 4), generator=generator).double()
        weight[vocab:] = torch.nan
        labels = torch.randint(vocab, (rows,), generator=generator)
        labels[::6] = -100
        rank, mass = [], []
        for logits, label in zip(
            (hidden @ weight[:vocab].t()).tolist(), labels.tolist(), strict=True
        ):
            if label == -100:
                continue
            exps = [math.exp(logit) for logit in logits]
            rank.append(1 + sum(logit > logits[label] for logit in logits))
            lower = [e for e, logit in zip(exps, logits, strict=True) if logit <= logits[label]]
            mass.append(sum(lower) / sum(exps))
        return cls(hidden, weight, labels, rank, mass)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_vocab", [None, 1, 7])
@pytest.mark.parametrize("vocab", [1, 2, 31])
def test_equal_logits_share_a_rank_and_count_as_not_above(vocab, chunk_vocab, dtype):
    problem = Counted.make(vocab)
    inputs = (problem.hidden.to(dtype), problem.weight.to(dtype), problem.labels, BOTH)
    for function, options in (
        (linear_objective, {"chunk_vocab": chunk_vocab}),
        (reference_linear_objective, {}),
    ):
        tokens = function(*inputs, vocab_size=vocab, **options).statistics.tokens
        assert tokens.rank.tolist() == problem.rank
        expected = torch.tensor(problem.lower_mass, dtype=tokens.lower_mass.dtype)
        torch.testing.assert_close(tokens.lower_mass, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["rank", "lower_mass"])
def test_one_of_them_alone_is_the_same(name):
    problem = Counted.make(31)
    inputs = (problem.hidden, problem.weight, problem.labels)
    both = linear_objective(*inputs, BOTH, vocab_size=31, chunk_vocab=8).statistics.tokens
    alone = linear_objective(
        *inputs, StatisticsOnly(frozenset({name})), vocab_size=31, chunk_vocab=8
    ).statistics.tokens
    assert torch.equal(vars(alone)[name], vars(both)[name])
    assert {"rank", "lower_mass"} - vars(alone).keys() == {"rank", "lower_mass"} - {name}


def test_a_small_mass_keeps_its_digits():
    """1 minus the mass above would be rounded to 0 in float32."""
    hidden = torch.tensor([[1.0, 0.0]])
    weight = torch.tensor([[0.0, 1.0], [40.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    tokens = linear_objective(hidden, weight, torch.tensor([2]), BOTH).statistics.tokens
    expected = (math.e + 1 + 1 / math.e) / (math.exp(40) + math.e + 1 + 1 / math.e)
    assert tokens.lower_mass.item() == pytest.approx(expected, rel=1e-5)
    assert tokens.rank.item() == 2


def test_the_most_probable_target_has_rank_1_and_all_of_the_mass():
    hidden, weight = torch.eye(3), torch.diag(torch.tensor([2.0, 3.0, 1e4]))
    tokens = linear_objective(hidden, weight, torch.arange(3), BOTH).statistics.tokens
    assert tokens.rank.tolist() == [1, 1, 1]
    torch.testing.assert_close(tokens.lower_mass, torch.ones(3))
