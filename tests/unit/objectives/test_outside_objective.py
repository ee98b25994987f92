"""Objectives that a user adds from outside: by entry point, and as package.module:Class."""

import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_profit.objectives import (
    TokenStatistics,
    build_objective,
    load_objective,
    objective_names,
    objective_options,
    option,
    registry,
)
from megatron_profit.objectives.sft import SFT

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
OWN = "own_objective:FocalLoss"


@pytest.fixture(autouse=True)
def own(monkeypatch):
    """The examples folder on the path, a registry of its own, and one installed entry point."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(registry, "_OBJECTIVES", dict(registry._OBJECTIVES))
    monkeypatch.delitem(sys.modules, "own_objective", raising=False)
    group = registry.ENTRY_POINT_GROUP
    points = [EntryPoint("focal", OWN, group), EntryPoint("broken", "no_such_module:X", group)]
    monkeypatch.setattr(registry, "entry_points", lambda group: EntryPoints(points))


@pytest.mark.parametrize("name", [OWN, "focal"])
def test_it_is_built_like_any_other(name):
    objective = build_objective(name, focal_gamma=3.0)
    assert objective.name == name
    assert name in objective_names()
    assert [option.name for option in objective_options(name)] == ["focal_gamma"]
    assert build_objective(name, focal_gamma=3.0) == objective
    with pytest.raises(ValueError, match="no option gamma; its options are focal_gamma"):
        build_objective(name, gamma=3.0)


def test_the_example_keeps_the_contract():
    log_prob = torch.rand(64, dtype=torch.float64).log().requires_grad_()
    loss, weight = build_objective(OWN)(TokenStatistics(log_prob))
    (slope,) = torch.autograd.grad(loss.sum(), log_prob)
    torch.testing.assert_close(weight, -slope)
    assert build_objective(OWN)(TokenStatistics(torch.tensor([0.0]))).loss == 0


def test_an_objective_with_a_statistic_of_its_own():
    objective = build_objective("own_objective:RareTokens", frequency_threshold=0.01)
    log_prob = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    with pytest.raises(ValueError, match="RareTokens needs the statistic target_frequency"):
        objective(TokenStatistics(log_prob))
    frequency = torch.tensor([0.0, 0.01, 0.04, 0.25])
    loss, weight = objective(TokenStatistics(log_prob, target_frequency=frequency))
    torch.testing.assert_close(weight, torch.tensor([1.0, 1.0, 0.5, 0.2]))
    torch.testing.assert_close(loss, -weight * log_prob)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nonsense",
            r"unknown objective 'nonsense'; choose from asft, broken, .*focal.* or name one",
        ),
        ("broken", "'broken' cannot be loaded: No module named 'no_such_module'. Is the folder of"),
        (
            "own_objective:Missing",
            "cannot be loaded: module 'own_objective' has no attribute 'Miss",
        ),
        ("undecorated:Loss", "has the option gamma and is no dataclass by itself"),
        ("pathlib:Path", "must be a dataclass that extends megatron_profit.objectives.Objective"),
    ],
)
def test_what_cannot_be_loaded_is_named(name, message, monkeypatch):
    undecorated = SimpleNamespace(Loss=type("Loss", (SFT,), {"gamma": option("a factor")}))
    monkeypatch.setitem(sys.modules, "undecorated", undecorated)
    with pytest.raises(ValueError, match=message):
        load_objective(name)
