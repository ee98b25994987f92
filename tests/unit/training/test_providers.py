"""Providers of external statistics: built in, and brought by an objective from outside."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from megatron_profit.data import Examples, SFTDataset
from megatron_profit.objectives import (
    Objective,
    ScheduledObjective,
    build_objective,
    registry,
    weighted_nll,
)
from megatron_profit.training.statistics.external_statistics import (
    ExternalStatistics,
    RunParts,
    StatisticProvider,
)
from megatron_profit.training.statistics.lookahead import Lookahead
from megatron_profit.training.statistics.lookahead_pass import LookaheadPass
from megatron_profit.training.statistics.old_policy import OldPolicy
from megatron_profit.training.statistics.providers import (
    check_providers,
    make_providers,
    provider_classes,
)
from megatron_profit.training.statistics.reference_model import (
    ReferenceLowerMass,
    ReferenceModel,
)
from megatron_profit.training.statistics.running_threshold import RunningMaximum, RunningMinimum
from megatron_profit.training.step import objective_loss
from megatron_profit.training.step.objective_loss import ObjectiveLoss

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
QUANTILES = {"threshold_direction": "middle", "threshold_quantile": (0.2, 0.8)}
RUNNING = {**QUANTILES, "threshold_scope": "running", "objective_signal": "reference"}
OWN = "own_objective:RareTokens"


@pytest.fixture(autouse=True)
def own(monkeypatch):
    """The examples folder on the path, and a registry of its own."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(registry, "_OBJECTIVES", dict(registry._OBJECTIVES))
    for module in ("own_objective", "own_statistic"):
        monkeypatch.delitem(sys.modules, module, raising=False)


def parts(objective, **changes):
    """A run on one example of 6 ids, of which the last 4 are supervised."""
    ids = np.array([7, 5, 1, 1, 2, 1], dtype=np.int32)
    supervised = np.array([0, 0, 1, 1, 1, 1], dtype=np.uint8)
    loss = ObjectiveLoss(objective)
    run = {
        "args": SimpleNamespace(
            vocab_size=9, psft_steps_per_refresh=4, objective_warmup_steps=0, iteration=0
        ),
        "loss": loss,
        "lookahead_pass": LookaheadPass(loss),
        "datasets": {"train": SFTDataset(Examples(ids, supervised, np.array([0, 6])), 8, 1)},
        "data_digest": "digest",
        "reference": (None, Path("folder")),
    }
    return RunParts(**{**run, **changes})


@pytest.mark.parametrize(
    ("name", "options", "classes"),
    [
        ("sft", {}, []),
        ("entropy", {}, []),
        ("gce", {"threshold_direction": "random", "keep_fraction": 0.5}, []),
        ("psft", {}, [OldPolicy]),
        ("asft", {}, [ReferenceModel]),
        ("rho1", {}, [ReferenceModel]),
        ("rho1", {"rank_scope": "global_batch"}, [ReferenceModel, Lookahead]),
        ("entropy", {"rank_scope": "global_batch"}, [Lookahead]),
        ("dft", {"objective_signal": "reference"}, [ReferenceModel]),
        ("prift-mass", {}, [ReferenceLowerMass]),
        ("prift-mass", {"objective_signal": "current"}, []),
        ("talr", {}, [Lookahead]),
        ("profit", {**QUANTILES}, [Lookahead, Lookahead]),
        ("profit", {**QUANTILES, "threshold_scope": "running"}, [RunningMaximum, RunningMinimum]),
        ("profit", RUNNING, [ReferenceModel, RunningMaximum, RunningMinimum]),
    ],
)
def test_what_is_built_in_is_found_by_the_name_of_the_statistic(name, options, classes):
    objective = build_objective(name, **options)
    for run in (parts(objective), parts(ScheduledObjective(objective))):
        providers = make_providers(run)
        assert [type(provider) for provider in providers] == classes
        # A look-ahead reads the others.
        assert run.lookahead_pass.providers == [p for p in providers if type(p) is not Lookahead]


def test_a_reference_that_is_logged_has_a_provider_and_its_flags():
    objective = build_objective("profit", prob_threshold=0.1, threshold_direction="higher")
    loss = ObjectiveLoss(objective, log_reference=True)
    assert [type(provider) for provider in make_providers(parts(objective, loss=loss))] == [
        ReferenceModel
    ]
    settings = {"objective": "profit", "log_reference": True}
    check_providers(objective, settings, {"ref_cache": "folder"})


def test_an_objective_from_outside_brings_its_provider(monkeypatch):
    args = SimpleNamespace(calculate_per_token_loss=True, iteration=0)
    monkeypatch.setattr(objective_loss, "get_args", lambda: args)
    objective = build_objective(OWN)
    run = parts(objective)
    (provider,) = make_providers(run)
    assert isinstance(provider, StatisticProvider)
    labels = torch.tensor([[-100, 1, 1, 2, 1, -100], [8, -100, -100, -100, -100, -100]])
    batch = SimpleNamespace(labels=labels, draw_index=None, position_ids=None)
    micro_batch = ExternalStatistics(run.loss, [provider]).begin(batch)
    values = micro_batch._external["target_frequency"]
    assert values[0, 1:5].tolist() == [0.75, 0.75, 0.25, 0.75]
    assert values[1, 0] == 0


@dataclass(frozen=True)
class Lacking(Objective):
    """Reads a statistic that it names a provider for, or not."""

    providers: ClassVar[dict[str, str]] = {}

    @property
    def required_statistics(self):
        return frozenset({"margin"})

    def evaluate(self, statistics):
        return weighted_nll(statistics.margin, statistics)


def test_the_reference_is_ready_before_a_provider_from_outside(monkeypatch):
    """The provider may make a pass that reads it."""

    class Margin(StatisticProvider):
        statistic = "margin"

        @classmethod
        def from_run(cls, run):
            return cls()

        def of(self, batch, data):
            return None

    monkeypatch.setitem(sys.modules, "margins", SimpleNamespace(Margin=Margin))
    monkeypatch.setattr(Lacking, "providers", {"margin": "margins:Margin"})
    loss = ObjectiveLoss(Lacking(), log_reference=True)
    providers = make_providers(parts(Lacking(), loss=loss))
    assert [type(provider) for provider in providers] == [ReferenceModel, Margin]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            None,
            "no class provides the statistic margin .*`providers`, or choose from log_prob, .*ref",
        ),
        (
            "no_such_module:X",
            "'no_such_module:X' of the statistic margin cannot be loaded: No module",
        ),
        ("own_statistic:X", "cannot be loaded: module 'own_statistic' has no attribute 'X'"),
        ("own_statistic", "cannot be loaded"),
        ("pathlib:Path", "a provider extends StatisticProvider"),
        ("own_statistic:TargetFrequency", "is named for margin, but its statistic is 'target_freq"),
    ],
)
def test_a_statistic_without_a_provider_is_named(monkeypatch, place, message):
    monkeypatch.setattr(Lacking, "providers", {} if place is None else {"margin": place})
    with pytest.raises(ValueError, match=message):
        check_providers(Lacking(), {"objective": "lacking", "log_reference": False}, {})


def test_what_an_evaluation_cannot_know_is_refused(monkeypatch):
    psft = build_objective("psft")
    assert list(provider_classes(psft)) == ["old_log_prob"]
    monkeypatch.setattr(type(psft), "for_evaluation", Objective.for_evaluation)
    with pytest.raises(ValueError, match="an evaluation cannot know the statistic old_log_prob"):
        provider_classes(psft)


@pytest.mark.parametrize(
    ("name", "flag", "message"),
    [
        (
            "sft",
            "psft_steps_per_refresh",
            "-refresh is for --objective psft, not for --objective sft",
        ),
        ("psft", "ref_cache", "--ref-cache is for objectives with a reference model, not for"),
        (OWN, "ref_hf_model", "--ref-hf-model is for objectives with a reference model"),
    ],
)
def test_flags_that_no_provider_reads_are_refused(name, flag, message):
    settings = {"objective": name, "psft_steps_per_refresh": 8, "log_reference": False}
    with pytest.raises(ValueError, match=message):
        check_providers(build_objective(name), settings, {flag: 1})
    check_providers(build_objective(name), settings, {"lr": 1})
