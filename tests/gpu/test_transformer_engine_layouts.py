"""Transformer Engine's layers take the same steps at any layout: those of a plain loop in fp64.

The ranks of a layout share one GPU, which NCCL refuses: they talk through gloo. Pipeline parallelism is not
here, since gloo sends from the host's memory only; what a stage computes is the same without it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layouts import parse
from plain_objectives import CASES, psft
from plain_training import Plan, Trained, train, write_uneven_chats
from plot_run import read_curves
from tiny_models import EXAMPLES, make_family, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
    ),
]

TURNS = [2, 1, 3, 1, 3, 1, 2, 3, 1, 2, 1, 3, 1, 2, 3, 2]
WORDS = {
    "packed": "--packing --seq-length 128 --global-batch-size 8",
    "gathered": "--cp-comm-type all_gather",
}
OBJECTIVES = {"sft": CASES["sft"], "profit": CASES["profit"], "psft": psft(2)}
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
]
# Each rank is the first of its node, and takes the first GPU.
ENTRY = ["--no-python", "env", "LOCAL_RANK=0", sys.executable, "-m", "megatron_profit.sft"]
ENTRY += "--device cuda --distributed-backend gloo --bf16 --lr-decay-style constant".split()
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "0", "GLOO_SOCKET_IFNAME": "lo"}
# bf16 beside fp64, relative: what is logged at each step.
TOLERANCE = {"lm loss": 5e-3, "objective": 4e-2, "kept fraction": 4e-2, "grad-norm": 6e-2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[[str, str], tuple[Path, Plan, Trained]]:
    """A HuggingFace folder, what it is trained with, and what the plain loop makes of it."""
    folder = tmp_path_factory.mktemp("engine")
    data = write_uneven_chats(EXAMPLES / "arithmetic_chatty.jsonl", folder / "chats.jsonl", TURNS)
    plan = Plan(data, steps=3, batch=16, seq_length=96, clip_grad=1.0)
    models = {
        "dense": lambda: (make_model(folder / "dense", tied=True).hf, plan),
        "experts": lambda: (
            make_family(folder / "experts", "qwen3-moe").hf,
            replace(plan, balancing=1.0),
        ),
    }
    made, results = {}, {}

    def get(model: str, objective: str) -> tuple[Path, Plan, Trained]:
        if model not in made:
            made[model] = models[model]()
        hf, own_plan = made[model]
        if (model, objective) not in results:
            results[model, objective] = train(hf, own_plan, OBJECTIVES[objective])
        return hf, own_plan, results[model, objective]

    return get


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("model", "layout"), LAYOUTS)
def test_any_layout_takes_the_same_steps(torchrun, trained, tmp_path, model, layout, objective):
    hf, plan, expected = trained(model, objective)
    ranks, flags = parse(layout, **WORDS)
    case = OBJECTIVES[objective]
    torchrun(
        *(ranks, *ENTRY, "--hf-model", hf, *plan.flags, *case.flags, *flags),
        *("--tensorboard-dir", tmp_path),
        **ENVIRONMENT,
    )
    curves = read_curves(tmp_path)
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
