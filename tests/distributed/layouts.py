"""Parallel layouts in short, and the comparison of a run at one of them with a plain training."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from plain_objectives import CASES, psft
from plain_training import Plan, Trained, train, write_uneven_chats
from tiny_models import EXAMPLES, make_family

from megatron_profit.commands.plot_run import read_curves

# Relative, of everything that is logged, at every step: fp32 beside fp64.
TOLERANCE = 1e-5
OBJECTIVES = {"sft": CASES["sft"], "profit": CASES["profit"], "psft": psft(2)}
# The same 16 records of so many turns, which are 16 rows alone and 8 packed.
TURNS = [2, 1, 3, 1, 3, 1, 2, 3, 1, 2, 1, 3, 1, 2, 3, 2]
PACKED = "--packing --seq-length 128 --global-batch-size 8"
_FLAGS = {
    "tp2": "--tensor-model-parallel-size 2",
    "tp3": "--tensor-model-parallel-size 3",
    "sp": "--sequence-parallel",
    "pp2": "--pipeline-model-parallel-size 2",
    "pp4": "--pipeline-model-parallel-size 4",
    "uneven": "--decoder-first-pipeline-num-layers 1",
    "vpp2": "--num-layers-per-virtual-pipeline-stage 1",
    "group3": "--microbatch-group-size-per-virtual-pipeline-stage 3",
    "cp2": "--context-parallel-size 2",
    "cp4": "--context-parallel-size 4",
    "ep2": "--expert-model-parallel-size 2",
    "ep4": "--expert-model-parallel-size 4",
    "allgather": "--moe-token-dispatcher-type allgather",
    "etp1": "--expert-tensor-parallel-size 1",
    "mb1": "--micro-batch-size 1",
    "mb2": "--micro-batch-size 2",
    "mb4": "--micro-batch-size 4",
    "mb8": "--micro-batch-size 8",
    "padded": "--make-vocab-size-divisible-by 16",
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "selective": "--recompute-granularity selective",
    "norms": "--recompute-modules core_attn gdn_norm_out",
    "sharded": "--use-distributed-optimizer",
    "overlap": "--overlap-grad-reduce --overlap-param-gather",
    "reshardable": "--dist-ckpt-optim-fully-reshardable",
}


def parse(layout: str, **more: str) -> tuple[int, list[str]]:
    """The number of ranks and the flags of a layout.

    Args:
        layout: The ranks, then what is not 1 and not off, "4 tp2 sp mb2". The ranks that are left are
            data parallelism.
        more: Further words and their flags.
    """
    ranks, *words = layout.split()
    flags = {**_FLAGS, **more}
    return int(ranks), [flag for word in words for flag in flags[word].split()]


@dataclass
class Model:
    """A HuggingFace folder, what it is trained with, and what the plain loop makes of it."""

    hf: Path
    plan: Plan
    trained: dict[str, Trained] = field(default_factory=dict)

    def expected(self, objective: str) -> Trained:
        if objective not in self.trained:
            self.trained[objective] = train(self.hf, self.plan, OBJECTIVES[objective])
        return self.trained[objective]


def trained_models(dense: Path, folder: Path) -> dict[str, Model]:
    """The "dense" model of a HuggingFace folder, and models of other kinds, which are written into `folder`:
    with "experts", with "states" of Gated DeltaNet layers, with both, and "olmo2", whose layers Megatron-Core
    does not have.
    """
    data = write_uneven_chats(EXAMPLES / "arithmetic_chatty.jsonl", folder / "chats.jsonl", TURNS)
    plan = Plan(data, steps=3, batch=16, seq_length=160, clip_grad=1.0)
    balanced = replace(plan, balancing=1.0)
    return {
        "dense": Model(dense, plan),
        "experts": Model(make_family(folder / "experts", "qwen3-moe").hf, balanced),
        "states": Model(make_family(folder / "states", "qwen3.5").hf, plan),
        "states-experts": Model(make_family(folder / "both", "qwen3.5-moe").hf, balanced),
        "olmo2": Model(make_family(folder / "olmo2", "olmo2").hf, plan),
    }


def assert_same_steps(tensorboard: Path, expected: Trained) -> None:
    """What a run logged, in the full precision of fp32, against the metrics of a plain training."""
    curves = read_curves(tensorboard)
    for name in expected.metrics[0]:
        steps, values = curves[name]
        assert steps == [*range(1, len(expected.metrics) + 1)]
        wanted = [line[name] for line in expected.metrics]
        assert values == pytest.approx(wanted, rel=TOLERANCE), name
