"""Transformer Engine's layers take the same steps at any layout: those of a plain loop in fp64.

The ranks of a layout share one GPU, which NCCL refuses: they talk through gloo. Pipeline parallelism is not
here, since gloo sends from the host's memory only; what a stage computes is the same without it.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layouts import OBJECTIVES, PACKED, Model, parse, trained_models
from plain_lora import write_adapter, write_expert_adapter
from plain_training import Trained, train
from tiny_models import make_model

from megatron_profit.commands.plot_run import read_curves

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
    ),
]

needs_fla = pytest.mark.skipif(
    importlib.util.find_spec("fla") is None, reason="needs flash-linear-attention"
)
WORDS = {"packed": PACKED, "gathered": "--cp-comm-type all_gather"}
LAYOUTS = [
    ("dense", "1 mb1"),
    ("dense", "1 mb8 packed"),
    ("dense", "2 mb2 packed sharded"),
    ("dense", "2 tp2 sp mb2 packed"),
    ("dense", "2 cp2 mb2 packed"),
    ("dense", "2 cp2 mb2 gathered"),
    ("dense", "4 tp2 cp2 sp mb2 packed full"),
    ("experts", "1 mb1"),
    ("experts", "2 tp2 sp mb1"),
    ("experts", "2 ep2 mb1 allgather"),
    pytest.param("states", "1 mb4 packed", marks=needs_fla),
    pytest.param("states", "1 mb1", marks=needs_fla),
    pytest.param("states", "2 tp2 sp mb2 packed full", marks=needs_fla),
    pytest.param("states", "2 cp2 mb2 packed", marks=needs_fla),
    ("olmo2", "1 mb8 packed"),
    ("olmo2", "2 tp2 sp mb2 packed"),
    ("olmo2", "3 tp3 mb2 packed full"),
]
# Each rank is the first of its node, and takes the first GPU.
ENTRY = ["--no-python", "env", "LOCAL_RANK=0", sys.executable, "-m", "megatron_profit.sft"]
ENTRY += "--device cuda --distributed-backend gloo --bf16 --lr-decay-style constant".split()
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "0", "GLOO_SOCKET_IFNAME": "lo"}
# bf16 beside fp64, relative: what is logged at each step.
TOLERANCE = {"lm loss": 5e-3, "objective": 4e-2, "kept fraction": 4e-2, "grad-norm": 6e-2}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("engine")
    return trained_models(make_model(folder / "dense", tied=True).hf, folder)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("model", "layout"), LAYOUTS)
def test_any_layout_takes_the_same_steps(torchrun, models, tmp_path, model, layout, objective):
    hf, plan = models[model].hf, models[model].plan
    expected = models[model].expected(objective)
    ranks, flags = parse(layout, **WORDS)
    case = OBJECTIVES[objective]
    torchrun(
        *(ranks, *ENTRY, "--hf-model", hf, *plan.flags, *case.flags, *flags),
        *("--tensorboard-dir", tmp_path),
        **ENVIRONMENT,
    )
    assert_close_steps(tmp_path, expected)


ADAPTED = [
    ("dense", "1 mb8 packed"),
    ("dense", "1 mb1 full"),
    ("dense", "2 tp2 sp mb2 packed"),
    ("dense", "2 tp2 mb2 packed"),
    ("dense", "2 cp2 mb2 packed"),
    ("experts", "1 mb1"),
    ("experts", "2 tp2 sp mb1"),
    ("experts", "2 ep2 mb1 allgather"),
    ("olmo2", "2 tp2 sp mb2 packed"),
]


@pytest.mark.parametrize(("model", "layout"), ADAPTED)
def test_adapters_take_the_same_steps(torchrun, models, tmp_path, model, layout):
    """The norm is inside the layer whose input the adapters share, and experts are one grouped layer."""
    hf, plan = models[model].hf, replace(models[model].plan, rate=1e-2)
    write = write_expert_adapter if model == "experts" else write_adapter
    adapter = write(hf, tmp_path / "adapter")
    ranks, flags = parse(layout, **WORDS)
    case = OBJECTIVES["sft"]
    lora = ("--lora-rank", 4, "--lora-alpha", 6, "--lora-adapter", adapter)
    torchrun(
        *(ranks, *ENTRY, "--hf-model", hf, *lora, *plan.flags, *case.flags, *flags),
        *("--tensorboard-dir", tmp_path / "curves"),
        **ENVIRONMENT,
    )
    assert_close_steps(tmp_path / "curves", train(hf, plan, case, adapter=adapter))


def assert_close_steps(tensorboard: Path, expected: Trained) -> None:
    """What a run in bf16 logged, next to the metrics of a plain training in fp64."""
    curves = read_curves(tensorboard)
    assert curves["supervised tokens"][1] == [
        step["supervised tokens"] for step in expected.metrics
    ]
    errors = {
        name: max(
            abs(value / step[name] - 1)
            for value, step in zip(curves[name][1], expected.metrics, strict=True)
        )
        for name in TOLERANCE
    }
    print(errors)
    assert all(errors[name] <= TOLERANCE[name] for name in TOLERANCE), errors
