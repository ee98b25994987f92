"""The estimates of tools/ against what the ranks of real runs hold and send, on the CPU."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from make_tiny_model import TinyShape, make_tiny_model
from plain_training import write_uneven_chats

from megatron_profit.commands.run_shape import read_run
from megatron_profit.estimates.communication import Sent, sent_bytes
from megatron_profit.estimates.memory import (
    chunks_under_way,
    estimate,
    kept_activations,
    layer_activations,
    output_bytes,
)
from megatron_profit.estimates.run_shape import RunShape

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SPLIT = "--tensor-model-parallel-size 2 --sequence-parallel"
# Small beside the least that a formula counts: norms' gradients and the counters of the step.
SMALL = 2e-3


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    shape = TinyShape(num_layers=4)
    shapes = {
        "dense": shape,
        "olmo2": replace(shape, family="olmo2"),
        "states": replace(shape, family="qwen3.5"),
    }
    data = sorted(DATA.glob("*.jsonl"))
    return {name: make_tiny_model(folder / name, data, own) for name, own in shapes.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Records longer than a row: rows that are not full would be cut, and the estimates are of full rows."""
    file = tmp_path_factory.mktemp("data") / "long.jsonl"
    return write_uneven_chats(DATA / "arithmetic_base.jsonl", file, [12] * 16)


@pytest.fixture
def measure(torchrun, models, data, tmp_path):
    """Runs a layout; gives it as the estimates see it, the numbers of its ranks, the supervised share."""

    def run(world_size: int, layout: str, model: str) -> tuple[RunShape, list[dict], float]:
        flags = [
            *("--hf-model", models[model], "--data", data),
            *("--objective", "sft", "--seq-length", 256, "--micro-batch-size", 1, "--no-packing"),
            *("--global-batch-size", 8, "--lr", 1e-3, "--train-iters", 1, *layout.split()),
        ]
        script = Path(__file__).with_name("measure_run.py")
        own = ["--device", "cpu", "--random-init", *flags]
        log = torchrun(world_size, script, tmp_path, *own).stdout
        supervised = float(re.search(r"\| supervised tokens: (\S+) \|", log)[1])
        ranks = [tmp_path / f"rank_{rank}.json" for rank in range(world_size)]
        shape = replace(read_run(list(map(str, flags)), world_size), fused=False)
        return shape, [json.loads(path.read_text()) for path in ranks], supervised / (8 * 256)

    return run


OLMO2 = [
    pytest.param(2, layout, "olmo2", marks=pytest.mark.slow)
    for layout in (SPLIT, f"--tensor-model-parallel-size 2 {FULL}", "--context-parallel-size 2")
]
NORMS = "--recompute-granularity selective --recompute-modules gdn_norm_out"
STATES = [
    pytest.param(world_size, layout, "states", marks=pytest.mark.slow)
    for world_size, layout in ((1, ""), (1, NORMS), (2, SPLIT), (2, f"{SPLIT} {NORMS}"))
]


@pytest.mark.parametrize(
    ("world_size", "layout", "model"),
    [
        (2, SPLIT, "dense"),
        pytest.param(2, "--tensor-model-parallel-size 2", "dense", marks=pytest.mark.slow),
        pytest.param(2, f"{SPLIT} {FULL}", "dense", marks=pytest.mark.slow),
        pytest.param(2, "--pipeline-model-parallel-size 2", "dense", marks=pytest.mark.slow),
        pytest.param(
            2,
            "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
            "dense",
            marks=pytest.mark.slow,
        ),
        pytest.param(2, "--context-parallel-size 2", "dense", marks=pytest.mark.slow),
        pytest.param(2, "--use-distributed-optimizer --bf16", "dense", marks=pytest.mark.slow),
        pytest.param(
            4, f"{SPLIT} --pipeline-model-parallel-size 2", "dense", marks=pytest.mark.slow
        ),
        pytest.param(4, f"{SPLIT} --use-distributed-optimizer", "dense", marks=pytest.mark.slow),
        *OLMO2,
        *STATES,
    ],
)
def test_ranks_hold_and_send_what_is_estimated(measure, world_size, layout, model):
    run, ranks, supervised_share = measure(world_size, layout, model)
    for rank, measured in enumerate(ranks):
        stage = rank * run.pp // world_size
        check_state(run, stage, measured)
        check_activations(run, stage, measured)
        check_sent(sent_bytes(run, stage, supervised_share), measured)


def check_state(run: RunShape, stage: int, measured: dict) -> None:
    """Weights are exact; buffers of the distributed optimizer are padded."""
    memory = estimate(run)[stage]
    assert measured["parameters"] == memory.parameters
    assert measured["weights"] == memory.weights
    padding = 1e-2 if run.args.use_distributed_optimizer else 0
    assert measured["gradients"] == pytest.approx(memory.gradients, rel=padding)
    assert measured["optimizer"] == pytest.approx(memory.optimizer, rel=padding)


def check_activations(run: RunShape, stage: int, measured: dict) -> None:
    """Of a micro-batch, and how many are held; the kernel keeps logits outside of autograd's sight."""
    assert measured["under way"] == chunks_under_way(run, stage)
    chunk = run.chunks_of(stage)[-1]
    kinds = [run.kinds[layer] for layer in chunk]
    expected = sum(kept_activations(run, kind, 1.0) for kind in kinds)
    if run.args.recompute_granularity == "full":
        expected = sum(layer_activations(run, kind, 1.0).entry for kind in kinds)
    if stage == run.pp - 1:
        args = Namespace(**{**vars(run.args), "objective_backward": "recompute"})
        expected += output_bytes(replace(run, args=args), 1.0)[0]
    # On a CPU, norms in bf16 keep copies in fp32, and queries behind another chunk their masks.
    if run.args.bf16 or run.cp > 1:
        return
    # Row statistics of norms, labels, masks and the kernel's vectors are not counted.
    assert 0 <= measured["saved"][-1] - expected < 0.02 * expected + 600 * run.tokens


def check_sent(expected: Sent, measured: dict) -> None:
    sent = measured["sent"]
    for name in ("tensor", "context", "data"):
        assert sent[name] == pytest.approx(getattr(expected, name), rel=SMALL, abs=1e3), name
    pipeline = sent["pipeline"] + sent["embedding"] + measured["sent from rank to rank"]
    assert pipeline == pytest.approx(expected.pipeline, rel=SMALL, abs=1e3)
