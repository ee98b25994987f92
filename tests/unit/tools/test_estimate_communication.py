"""The model of communication: its formulas at sizes that can be worked out by hand, and the page's table."""

from __future__ import annotations

from pathlib import Path

import estimate_communication
import pytest
from estimate_communication import RECOMMENDED, recommended_run

from megatron_profit.commands.run_shape import read_run
from megatron_profit.estimates.communication import Machine, sent_bytes, step_flops, step_time
from megatron_profit.estimates.memory import GIB, estimate

PAGE = Path(__file__).resolve().parents[3] / "docs" / "scaling.md"
BASE = "--seq-length 4096 --micro-batch-size 1 --global-batch-size 32 --bf16 --no-packing".split()
STREAM = 4096 * 5120 * 2  # bytes of the residual stream of a row of 14B


def run_of(gpus: int, flags: str, model: str = "Qwen3-14B"):
    return read_run([*BASE, *flags.split()], gpus, model)


def test_tensor_parallelism():
    """40 layers of two pairs with 5 gathers or scatters each, 2 at each end, of which a rank sends 3/4."""
    run = run_of(4, "--tensor-model-parallel-size 4 --sequence-parallel")
    assert sent_bytes(run, 0).tensor == 32 * (40 * 10 + 4) * STREAM * 3 / 4
    full = run_of(
        4,
        "--tensor-model-parallel-size 4 --sequence-parallel --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1",
    )
    assert sent_bytes(full, 0).tensor == 32 * (40 * 14 + 4) * STREAM * 3 / 4


def test_pipeline_parallelism():
    run = run_of(4, "--pipeline-model-parallel-size 4")
    assert [sent_bytes(run, stage).pipeline for stage in range(4)] == [
        32 * STREAM * sends for sends in (1, 2, 2, 1)
    ]
    both = run_of(
        8, "--pipeline-model-parallel-size 4 --tensor-model-parallel-size 2 --sequence-parallel"
    )
    assert sent_bytes(both, 1).pipeline == 32 * STREAM


def test_data_parallelism():
    parameters = 14768307200
    assert sent_bytes(run_of(8, ""), 0).data == parameters * 2 * 4 * 7 / 8
    assert sent_bytes(run_of(8, "--use-distributed-optimizer"), 0).data == parameters * 6 * 7 / 8


def test_context_and_expert_parallelism():
    run = run_of(2, "--context-parallel-size 2")
    assert sent_bytes(run, 0).context == 32 * 40 * (4096 * 2 * 8 * 128 * 2) / 2 * 2
    moe = run_of(8, "--expert-model-parallel-size 8", "Qwen3-30B-A3B")
    tokens = 4 * 48 * 4096 * 8
    assert sent_bytes(moe, 0).expert == 4 * tokens * 2048 * 2 * 7 / 8


def test_operations_are_six_for_each_parameter_and_token_and_those_of_attention():
    tokens, parameters = 32 * 4096, 14768307200 - 151936 * 5120  # the embedding multiplies nothing
    attention = 12 * 40 * 5120 * 4096 / 2
    assert step_flops(run_of(1, "")) == pytest.approx(
        tokens * (6 * parameters + attention), rel=1e-3
    )


def test_frozen_weights_have_no_gradient_to_compute_or_to_send():
    """Adapters are 40 layers of four projections of attention and three of the MLP."""
    inner = 2 * (5120 + 5120) + 2 * (5120 + 1024) + 3 * (5120 + 17408)
    adapters, frozen = 40 * 16 * inner, 14768307200 - 151936 * 5120
    attention = 12 * 40 * 5120 * 4096 / 2
    operations = 32 * 4096 * (4 * frozen + attention + 6 * adapters)
    assert step_flops(run_of(1, "--lora-rank 16")) == pytest.approx(operations, rel=1e-3)
    replicas = run_of(8, "--lora-rank 16 --use-distributed-optimizer")
    assert sent_bytes(replicas, 0).data == adapters * 6 * 7 / 8
    split = run_of(4, "--lora-rank 16 --tensor-model-parallel-size 4 --sequence-parallel")
    assert sent_bytes(split, 0).tensor == 32 * (40 * 8 + 4) * STREAM * 3 / 4


def test_of_the_adapters_of_experts_a_token_meets_its_own():
    few, many = (
        step_flops(run_of(1, f"--lora-rank {rank} --lora-targets down_proj", "Qwen3-30B-A3B"))
        for rank in (16, 32)
    )
    assert many - few == 32 * 4096 * 6 * 48 * 8 * 16 * (2048 + 768)


def test_groups_that_leave_the_node_take_the_network():
    machine = Machine(node_bandwidth=100.0, network_bandwidth=10.0)
    assert machine.seconds(1000, reach=8) == 10
    assert machine.seconds(1000, reach=16) == 100


def test_a_step_is_the_sum_of_its_parts():
    run = run_of(
        16, "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 --sequence-parallel"
    )
    time = step_time(run, Machine())
    layers = time.compute + time.tensor
    assert time.bubble == pytest.approx(layers / run.micro_batches)
    assert time.total == pytest.approx(layers + time.bubble + time.pipeline + time.data)


def test_the_page_shows_what_the_tool_prints(capsys):
    assert estimate_communication.main(["--table"]) == 0
    assert capsys.readouterr().out.strip() in PAGE.read_text()


def test_the_recommended_layouts_fit_a_gpu_of_80_gib():
    for case in RECOMMENDED:
        memory = max(memory.total for memory in estimate(recommended_run(*case)))
        assert memory < 72 * GIB, case


def test_the_tool_describes_a_run(capsys):
    flags = ["--model", "Qwen3-14B", "--gpus", "8", "--tensor-model-parallel-size", "4"]
    assert estimate_communication.main([*flags, "--sequence-parallel", *BASE]) == 0
    shown = capsys.readouterr().out
    for name in ("compute", "bubble", "tensor", "data", "if nothing overlaps"):
        assert name in shown
    assert estimate_communication.main([*flags[:-1], "3", *BASE]) == 2
