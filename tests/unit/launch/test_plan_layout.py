"""`--layout auto` keeps the given flags of a layout, and shortens rows only where they do not fit."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint_conversion.families import family_for
from megatron_profit.estimates.memory import GIB, estimate
from megatron_profit.estimates.possible_layouts import Layout, run_shape
from megatron_profit.estimates.published import published_config
from megatron_profit.launch.machine import Machine
from megatron_profit.launch.plan_layout import plan_layout, wish_of_flags
from megatron_profit.launch.processes import launcher
from megatron_profit.launch.run_folder import RunFolder
from megatron_profit.recipe.check import check_command_line
from megatron_profit.recipe.errors import LaunchError
from megatron_profit.recipe.flags import Given, words_of
from megatron_profit.recipe.request import read_request

DATA = Path(__file__).resolve().parents[3] / "examples" / "data" / "arithmetic_chatty.jsonl"


def plan(flags: str, model: str = "Qwen3-4B", gpus: int = 8, rows: int = 32, positions: int = 8192):
    """Return the planned layout, whose flags the training's checks have accepted."""
    config = published_config(model)
    words = ["--model", "m", "--data", "d.jsonl", "--gpus", str(gpus), "--gpu-memory", "79.6"]
    request = read_request([*words, "--dry-run", *flags.split()])
    architecture = family_for(config).megatron_arguments(config)
    exact = "global_batch_size" in request.given
    wish = wish_of_flags(request.given, architecture, positions, rows, exact)
    planned = plan_layout(request, wish, Machine((), "", 2, 20), may_shorten=True)
    table, given = request.table, dict(request.given)
    for name, value in {**planned.flags, "seq_length": planned.seq_length}.items():
        given.setdefault(name, Given.of(f"--{name.replace('_', '-')}", value))
    left_out = {table.dest(option) for option in request.front.without}
    words = words_of(flag for name, flag in given.items() if name not in left_out | {"data"})
    words += [*("--hf-model", "m", "--data", str(DATA), "--objective", "sft", "--lr", "1e-5")]
    check_command_line([*words, "--train-iters", "1"], gpus, "cuda", config)
    return planned


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--micro-batch-size 2", {"micro_batch_size": 2}),
        ("--micro-batch-size 3", {"micro_batch_size": 3, "global_batch_size": 36}),
        ("--recompute-granularity selective", {"recompute_granularity": "selective"}),
        ("--recompute-activations", {"recompute_granularity": "selective"}),
        ("--recompute-modules mlp", {"recompute_granularity": "selective"}),
        ("--recompute-method block", {"recompute_granularity": "full", "recompute_num_layers": 1}),
        ("--recompute-num-layers 2", {"recompute_method": "uniform", "recompute_num_layers": 2}),
        ("--tensor-model-parallel-size 8 --sequence-parallel", {"sequence_parallel": True}),
        ("--tensor-model-parallel-size 4 --distribute-saved-activations", {}),
        ("--expert-model-parallel-size 1 --expert-tensor-parallel-size 1", {}),
        (
            "--account-for-loss-in-pipeline-split --pipeline-model-parallel-size 1",
            {"account_for_loss_in_pipeline_split": True},
        ),
        (
            "--num-virtual-stages-per-pipeline-rank 3 --pipeline-model-parallel-size 2",
            {"pipeline_model_parallel_size": 2},
        ),
        ("--use-precision-aware-optimizer --exp-avg-dtype bf16", {}),
    ],
)
def test_a_given_flag_of_a_layout_is_kept_and_rows_stay_as_long_as_they_are(flags, expected):
    planned = plan(flags)
    assert planned.seq_length == 8192
    assert expected.items() <= planned.flags.items()


@pytest.mark.parametrize("flag", ["--use-distributed-optimizer", "--sequence-parallel"])
def test_one_gpu_takes_switches_that_need_several_to_matter(flag):
    planned = plan(flag, "Qwen3-0.6B", gpus=1)
    assert planned.seq_length == 8192
    assert "overlap_grad_reduce" not in planned.flags, "there is no other GPU to send to"


def test_experts_may_be_split_themselves():
    planned = plan("--expert-tensor-parallel-size 2", "Qwen3-30B-A3B", gpus=16)
    assert planned.flags["expert_tensor_parallel_size"] == 2


def test_tensor_parallelism_over_nodes_is_taken_where_it_is_given():
    assert (
        "tensor 16"
        in plan("--tensor-model-parallel-size 16", "OLMo-2-1124-7B", 16, positions=4096).lines[0]
    )


def test_flags_that_are_left_out_are_left_out_of_the_estimate_too():
    shared = "--tensor-model-parallel-size 8 --micro-batch-size 1"
    assert "sequence parallel" in plan(shared).lines[0]
    planned = plan(f"{shared} --without=--sequence-parallel --without=--recompute-granularity")
    assert "sequence parallel" not in planned.lines[0]
    assert "no recomputation" in planned.lines[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--micro-batch-size 3 --global-batch-size 32", "with --micro-batch-size 3; give another"),
        ("--recompute-granularity selective --recompute-method block", "drop one of these flags"),
        ("--recompute-num-layers 0", "--recompute-num-layers is 0; it must be at least 1"),
        (
            "--pipeline-model-parallel-size 5 --decoder-first-pipeline-num-layers 8",
            "--decoder-first-pipeline-num-layers is not known to the estimate",
        ),
    ],
)
def test_flags_that_no_layout_can_have_are_named_and_no_row_is_shortened(flags, message):
    with pytest.raises(LaunchError, match=message):
        plan(flags)


def test_rows_that_do_not_fit_become_shorter():
    planned = plan("--micro-batch-size 1", "Qwen3-14B", gpus=4, positions=32768)
    assert planned.seq_length == 8192


def gib_on_a_cpu(flags: str, model: str = "Qwen3-0.6B") -> tuple[float, str]:
    """Return the memory that a plan for a CPU names, and its line."""
    config = published_config(model)
    architecture = family_for(config).megatron_arguments(config)
    request = read_request(["--model", "m", "--data", "d.jsonl", *flags.split()])
    wish = wish_of_flags(request.given, architecture, 512, 4, exact_rows=False)
    (line,) = plan_layout(request, wish, Machine((), "", 2, 1000), may_shorten=False).lines
    return float(re.search(r"needs about (\S+) of 1000 GiB", line)[1]), line


def test_a_laptop_needs_what_the_flags_leave_in_memory():
    whole, line = gib_on_a_cpu("")
    assert "in fp32" in line
    assert gib_on_a_cpu("--lora-rank 16")[0] < whole / 2, "the base has neither gradients nor state"
    assert gib_on_a_cpu("--recompute-granularity full --recompute-method uniform")[0] < whole
    assert "in bf16" in gib_on_a_cpu("--bf16")[1]
    assert gib_on_a_cpu("--optimizer sgd")[0] == whole, "an upper bound"


def test_replicas_on_a_laptop_hold_a_model_each():
    whole, _ = gib_on_a_cpu("")
    assert gib_on_a_cpu("--nproc-per-node 2")[0] == pytest.approx(2 * whole, rel=0.02)
    shared, _ = gib_on_a_cpu("--nproc-per-node 2 --tensor-model-parallel-size 2")
    assert shared == whole
    assert whole < gib_on_a_cpu("--nproc-per-node 2 --use-distributed-optimizer")[0] < 2 * whole


def test_a_dry_run_plans_for_nodes_of_eight_gpus(tmp_path):
    planned = plan("--tensor-model-parallel-size 8 --pipeline-model-parallel-size 2", gpus=64)
    assert planned.processes == 8
    words = "--model m --data d.jsonl --gpus 64 --gpu-memory 80 --dry-run --run r".split()
    request = read_request(words)
    command = shlex.join(launcher(request, planned.processes, RunFolder(tmp_path)))
    assert "--nproc-per-node 8 --nnodes 8 --rdzv-backend c10d --rdzv-endpoint HOST:PORT" in command
    with pytest.raises(LaunchError, match="--gpus 12 are no whole nodes of 8; give a multiple"):
        read_request([*words, "--gpus", "12"])


def test_ranks_of_context_parallelism_hold_all_weights_on_a_cpu_and_experts_are_shared():
    one, _ = gib_on_a_cpu("")
    context, _ = gib_on_a_cpu("--context-parallel-size 2 --nproc-per-node 2")
    assert 1.6 * one < context < 2.1 * one
    assert gib_on_a_cpu("--tensor-model-parallel-size 2 --nproc-per-node 2")[0] < 1.2 * one
    flags = "--expert-model-parallel-size 2 --nproc-per-node 2"
    experts, alone = (gib_on_a_cpu(f, "Qwen3-30B-A3B")[0] for f in (flags, ""))
    assert experts < 1.2 * alone


@pytest.mark.parametrize("more", ["", "--without=--bf16"])
def test_gated_delta_nets_without_their_kernels_keep_more(monkeypatch, more):
    """In plain torch, which also computes fp32, the layout with kernels would overflow the GPUs' memory."""
    config = published_config("Qwen3.5-4B")
    architecture = family_for(config).megatron_arguments(config)
    request = read_request(["--model", "m", "--data", "d.jsonl", *more.split()])

    def needed(found: object) -> float:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
        wish = wish_of_flags(request.given, architecture, 8192, 4, exact_rows=True)
        machine = Machine((79.6,) * 8, "GPU", 16, 100)
        planned = plan_layout(request, wish, machine, may_shorten=False)
        layout = {n: v for n, v in planned.flags.items() if n in Layout.__dataclass_fields__}
        precision = {"bf16": not more}
        wish = replace(wish, decided=precision, state_kernels=False)
        return max(m.total for m in estimate(run_shape(wish, Layout(**layout), 8))) / GIB

    assert needed(None) < 79.6
    assert (needed("fla") > 75) == (not more), "bf16 has kernels, fp32 has not"
