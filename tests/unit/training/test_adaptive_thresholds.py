"""Providers of thresholds: one look-ahead for all bounds of a step, and the quantile of recent steps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_profit.objectives import ScheduledObjective, TokenStatistics, build_objective
from megatron_profit.training.checkpoints.folder import CheckpointError
from megatron_profit.training.statistics import lookahead, running_threshold
from megatron_profit.training.statistics.lookahead import Lookahead
from megatron_profit.training.statistics.running_threshold import (
    FADING,
    RunningMaximum,
    RunningMinimum,
)
from megatron_profit.training.statistics.token_table import TokenTable, token_keys
from megatron_profit.training.step.token_metrics import ProbQuantiles

FILE = "running_min_log_prob.safetensors"
BATCH = SimpleNamespace(labels=torch.zeros(2, 3, dtype=torch.int64))


def profit(direction="higher", quantile=0.5, **options):
    return build_objective(
        "profit", threshold_direction=direction, threshold_quantile=quantile, **options
    )


class Pass:
    """A look-ahead pass of fixed tokens that counts its calls: records 0 and 1, of 4 tokens each."""

    def __init__(self, log_prob):
        self.log_prob, self.calls = log_prob, []

    def of_next_batches(self, context, count, statistics):
        self.calls.append(statistics)
        draw, position = torch.arange(8) // 4, torch.arange(8) % 4
        vectors = {name: self.log_prob for name in statistics}
        return TokenTable(token_keys(draw, position), vectors)

    def of_valid_batch(self, context, number, statistics):
        return self.of_next_batches(context, 1, statistics)

    def of_valid_batches(self, context, statistics):
        return [self.of_valid_batch(context, 0, statistics)]


def loss_of(objective, step=0):
    return SimpleNamespace(objective=objective, current_objective=objective.at(step))


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    monkeypatch.setattr(lookahead, "data_group", lambda: group)
    monkeypatch.setattr(running_threshold, "data_group", lambda: group)
    monkeypatch.setattr(
        running_threshold, "dist", SimpleNamespace(all_reduce=lambda *_, **__: None)
    )
    mpu = SimpleNamespace(
        get_tensor_model_parallel_rank=lambda: 0, is_pipeline_last_stage=lambda **_: True
    )
    monkeypatch.setattr(running_threshold, "mpu", mpu)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)


@pytest.fixture
def start(monkeypatch, tmp_path):
    """start(objective, look-ahead pass, iteration, class): a provider of a run that begins there."""

    def start(objective, lookahead_pass, iteration=0, provider=RunningMinimum):
        args = SimpleNamespace(iteration=iteration, load=str(tmp_path))
        monkeypatch.setattr(running_threshold, "get_args", lambda: args)
        monkeypatch.setattr(running_threshold, "get_checkpoint_name", lambda *_, **__: tmp_path)
        return provider(loss_of(objective), lookahead_pass)

    return start


def test_one_pass_gives_all_bounds_of_a_step():
    log_prob = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]).log()
    tokens = Pass(log_prob)
    objective = profit("middle", (0.25, 0.75), threshold_scope="record")
    providers = Lookahead.of_all(loss_of(objective), tokens)
    for provider in providers:
        provider.before_train_step(None, 0)
        provider.before_evaluation(None)
    assert [p.statistic for p in providers] == ["min_log_prob", "max_log_prob"]
    assert len(tokens.calls) == 2
    draw, position = torch.arange(2)[:, None].expand(2, 4), torch.arange(4).expand(2, 4)
    labels = torch.zeros(2, 4, dtype=torch.int64)
    batch = SimpleNamespace(labels=labels, draw_index=draw, position_ids=position)
    for data in ("train", "valid"):
        low, high = (provider.of(batch, data) for provider in providers)
        kept = (log_prob.view(2, 4) >= low) & (log_prob.view(2, 4) <= high)
        assert kept.tolist() == [[False, True, True, False]] * 2


def test_a_warm_up_looks_at_nothing():
    tokens = Pass(torch.zeros(8))
    objective = ScheduledObjective(profit(), warmup_steps=4)
    (provider,) = Lookahead.of_all(loss_of(objective), tokens)
    provider.before_train_step(None, 0)
    assert tokens.calls == []


def probability(provider):
    values = provider.of(BATCH, "train")
    assert values.shape == (2, 3)
    return float(values.unique().exp())


def test_the_running_quantile_follows_the_steps(start):
    """One pass before the first step; then each step's tokens count, and the earlier ones fade."""
    tokens = Pass(torch.full((8,), 0.2).log())
    provider = start(profit(), tokens)
    provider.before_train_step(None, 0)
    assert probability(provider) == pytest.approx(0.2, rel=0.01)
    for step in range(8):
        provider.observe(TokenStatistics(torch.full((3,), 0.6).log()))
        provider.observe(TokenStatistics(torch.full((5,), 0.6).log()))
        provider.before_train_step(None, step + 1)
        seen = sum(FADING**k for k in range(step + 1))
        majority = 0.6 if seen > FADING ** (step + 1) else 0.2
        assert probability(provider) == pytest.approx(majority, rel=0.01)
    assert len(tokens.calls) == 1
    total = float(provider._counts.sum())
    assert total == pytest.approx(8 * sum(FADING**k for k in range(9)))


@pytest.mark.parametrize(
    ("direction", "quantile", "provider"),
    [("higher", 0.0, RunningMinimum), ("lower", 1.0, RunningMaximum)],
)
def test_a_quantile_that_keeps_everything_keeps_everything(start, direction, quantile, provider):
    objective = profit(direction, quantile, threshold_scope="running")
    running = start(objective, Pass(torch.full((8,), 0.2).log()), provider=provider)
    running.before_train_step(None, 0)
    bound = running.of(BATCH, "train")[0, 0].expand(3)
    edge = torch.tensor([0.0, 1e-30, 1.0]).log()
    seen = TokenStatistics(edge, **{running.statistic: bound})
    assert objective(seen).weight.tolist() == [1, 1, 1]


def test_a_resumed_run_has_the_threshold_of_the_uninterrupted_one(start, tmp_path):
    torch.manual_seed(0)
    tokens = Pass(torch.rand(8).log())
    objective = profit(quantile=0.3, threshold_scope="running")
    first = start(objective, tokens)
    first.before_train_step(None, 0)
    first.observe(TokenStatistics(torch.rand(50).log()))
    first.with_checkpoint(tmp_path, 1)
    again = start(objective, tokens, iteration=1)
    for provider in (first, again):
        provider.before_train_step(None, 1)
        provider.observe(TokenStatistics(torch.linspace(0.1, 0.9, 20).log()))
        provider.before_evaluation(None)
    assert torch.equal(first.of(BATCH, "train"), again.of(BATCH, "train"))
    assert torch.equal(first._counts, again._counts)
    assert len(tokens.calls) == 1


@pytest.mark.parametrize("stored", [None, "reference"])
def test_a_checkpoint_without_the_counts_begins_anew_and_says_so(start, tmp_path, capsys, stored):
    if stored:
        counts = torch.zeros(ProbQuantiles.BINS, dtype=torch.float64)
        save_file({"counts": counts}, tmp_path / FILE, {"signal": stored})
    tokens = Pass(torch.full((8,), 0.2).log())
    provider = start(profit(threshold_scope="running"), tokens, iteration=3)
    for step in (3, 4):
        provider.before_train_step(None, step)
    assert len(tokens.calls) == 1
    assert probability(provider) == pytest.approx(0.2, rel=0.01)
    printed = capsys.readouterr().out
    assert printed.count(f"holds no {FILE} of the current model: the running threshold begins") == 1


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.zeros(ProbQuantiles.BINS), "its counts are torch.float32"),
        (torch.zeros(7, dtype=torch.float64), r"its counts are torch.float64 \[7\]"),
        (-torch.ones(ProbQuantiles.BINS, dtype=torch.float64), "a count is negative"),
        (None, "header"),
    ],
)
def test_damaged_counts_are_named(start, tmp_path, counts, message):
    if counts is None:
        (tmp_path / FILE).write_bytes(b"\xff" * 20)
    else:
        save_file({"counts": counts}, tmp_path / FILE, {"signal": "current"})
    provider = start(profit(threshold_scope="running"), Pass(torch.zeros(8)), iteration=3)
    with pytest.raises(CheckpointError, match=f"(?i){FILE} is damaged: .*{message}.*--ckpt-step"):
        provider.before_train_step(None, 3)


def test_a_run_that_only_evaluates_counts_a_batch_of_the_evaluation(start, tmp_path):
    tokens = Pass(torch.full((8,), 0.2).log())
    provider = start(profit(threshold_scope="running"), tokens)
    provider.before_evaluation(None)
    assert probability(provider) == pytest.approx(0.2, rel=0.01)
    provider.with_checkpoint(tmp_path, 0)
    assert not (tmp_path / FILE).exists()


def test_a_warm_up_counts_nothing(start, tmp_path):
    objective = ScheduledObjective(profit(threshold_scope="running"), warmup_steps=4)
    provider = start(objective, Pass(torch.zeros(8)))
    provider.before_train_step(None, 0)
    provider.observe(TokenStatistics(torch.zeros(4)))
    assert provider.of(BATCH, "train") is None
    provider.with_checkpoint(tmp_path, 1)
    assert not (tmp_path / FILE).exists()


def test_the_file_holds_the_counts_alone(start, tmp_path):
    provider = start(profit(threshold_scope="running"), Pass(torch.full((8,), 0.2).log()))
    provider.before_train_step(None, 0)
    provider.with_checkpoint(tmp_path, 1)
    (counts,) = load_file(tmp_path / FILE).values()
    assert counts.sum() == 8
