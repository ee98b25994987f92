"""The memory estimate against counts of others: checkpoints, Megatron's schedule, Megatron's estimate."""

from __future__ import annotations

import functools
import json
import math
from types import SimpleNamespace

import pytest
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

from checkpoint_conversion.adapters.options import LoraOptions, adapter_rules
from checkpoint_conversion.families import family_for
from checkpoint_conversion.hf.model import expected_shapes
from megatron_profit.commands import estimate_memory
from megatron_profit.commands.run_shape import read_run
from megatron_profit.estimates import memory
from megatron_profit.estimates.memory import (
    GIB,
    chunks_under_way,
    estimate,
    layer_activations,
)
from megatron_profit.estimates.parameter_counts import (
    saved_parameters,
    stage_parameters,
    trained_parameters,
)
from megatron_profit.estimates.published import PUBLISHED, published_config
from megatron_profit.estimates.run_shape import LayerKind, ShapeError
from megatron_profit.flags import ArgumentsError

BASE = "--seq-length 4096 --micro-batch-size 1 --global-batch-size 32 --bf16 --no-packing".split()
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
DISTRIBUTED = "--use-distributed-optimizer"


@functools.cache
def run_of(model: str, gpus: int, *flags: str):
    return read_run([*BASE, *" ".join(flags).split()], gpus, model)


def test_a_flag_is_known_in_either_spelling():
    flags = (
        "--objective=profit --prob-threshold=0.1 --threshold-direction=higher --epochs=2 --lr=3e-5"
    )
    args = run_of("Qwen3-0.6B", 1, flags).args
    assert (args.objective, args.prob_threshold, args.lr) == ("profit", ["0.1"], 3e-5)
    assert (args.epochs, args.train_iters) == (2.0, None)
    with pytest.raises(ShapeError, match="--model and --hf-model contradict each other"):
        read_run([*BASE, "--hf-model=models/a"], 1, "Qwen3-0.6B")


@pytest.mark.parametrize("model", PUBLISHED)
def test_parameters_are_those_of_the_checkpoint(model):
    config = published_config(model)
    shapes = expected_shapes(family_for(config).tensor_rules(config)).values()
    tensors = sum(math.prod(shape) for shape in shapes)
    assert stage_parameters(run_of(model, 1), 0).total == tensors


@pytest.mark.parametrize(
    "layout", ["", "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 2"]
)
def test_a_checkpoint_holds_the_model_once_at_every_layout(layout):
    run = run_of("Qwen3-4B", 8, layout)
    config = published_config("Qwen3-4B")
    shapes = expected_shapes(family_for(config).tensor_rules(config)).values()
    assert saved_parameters(run) == sum(math.prod(shape) for shape in shapes)
    assert "A checkpoint takes about 56.31 GB and 57 s to write at 1.00 GB a second." in (
        estimate_memory.table(run, estimate(run), None)
    )


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("Qwen3-14B", "--pipeline-model-parallel-size 4"),
        (
            "Qwen3-235B-A22B",
            "--pipeline-model-parallel-size 8 --account-for-embedding-in-pipeline-split "
            "--account-for-loss-in-pipeline-split",
        ),
    ],
)
def test_pipeline_ranks_make_the_whole_model(model, layout):
    run = run_of(model, 8, layout)
    layers = [layer for stage in range(run.pp) for layer in run.layers_of(stage)]
    assert sorted(layers) == list(range(run.args.num_layers))
    whole = stage_parameters(run_of(model, 1), 0).total
    assert sum(stage_parameters(run, stage).total for stage in range(run.pp)) == whole


@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("chunks", [1, 5])
@pytest.mark.parametrize("batch", [4, 32])
def test_micro_batches_under_way_are_those_of_the_schedule(pp, chunks, batch):
    virtual = f"--num-virtual-stages-per-pipeline-rank {chunks}" if chunks > 1 else ""
    layout = f"--pipeline-model-parallel-size {pp} {virtual} --global-batch-size {batch}"
    run = run_of("Qwen3-14B", pp, layout)
    for stage in range(pp):
        schedule = SimpleNamespace(
            pp_group=SimpleNamespace(size=lambda: pp, rank=lambda stage=stage: stage),
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        )
        _, _, warmup, remaining = get_pp_rank_microbatches(
            batch, chunks, pp, p2p_communicator=schedule
        )
        assert chunks_under_way(run, stage) == warmup + (remaining > 0)


def test_state_is_what_megatron_estimates_where_it_knows_the_case():
    """It leaves out the norms of queries and keys, and counts the same bytes in bf16."""
    for layout in ("", DISTRIBUTED, f"{DISTRIBUTED} --tensor-model-parallel-size 2"):
        run = run_of("Qwen3-8B", 8, layout)
        (memory,) = estimate(run)
        ours = memory.weights + memory.gradients + memory.optimizer
        assert ours == pytest.approx(estimate_memory.megatron_estimate(run)["state"], rel=1e-4)


@pytest.mark.parametrize("model", ["Qwen3-8B", "Qwen3-30B-A3B"])
@pytest.mark.parametrize("targets", ["all-linear", "q_proj v_proj down_proj"])
def test_adapters_are_those_of_the_checkpoint_and_alone_have_state(model, targets):
    config = published_config(model)
    rules = family_for(config).tensor_rules(config)
    options = LoraOptions(16, 32, tuple(targets.split()))
    shapes = expected_shapes(adapter_rules(rules, options)).values()
    adapters = sum(math.prod(shape) for shape in shapes)
    run = run_of(model, 1, f"--lora-rank 16 --lora-targets {targets}")
    assert trained_parameters(run, 0).total == adapters
    (memory,) = estimate(run)
    assert memory.parameters == stage_parameters(run, 0).total + adapters
    assert memory.weights == 2 * memory.parameters
    assert memory.gradients == 4 * adapters
    assert memory.optimizer == 12 * adapters


def test_a_dropout_keeps_an_input_and_a_mask_of_each_projection():
    """Counted by hand for Qwen3-8B: 36 layers, 4096 wide, MLP 12288, bf16 and a byte of the mask."""
    flags = "--lora-rank 16 --lora-targets q_proj up_proj down_proj"
    plain, dropped = (
        estimate(run_of("Qwen3-8B", 1, f"{flags} {more}"))[0].activations
        for more in ("", "--lora-dropout 0.1")
    )
    tokens = run_of("Qwen3-8B", 1, flags).tokens
    assert dropped - plain == 36 * tokens * (4096 + 4096 + 12288) * 3


def test_a_token_meets_the_adapters_of_its_own_experts():
    args = run_of("Qwen3-30B-A3B", 1, "--lora-rank 16").args
    attention = 48 * 16 * (2 * (2048 + 4096) + 2 * (2048 + 512))
    assert args.lora_active_parameters == attention + 48 * 8 * 16 * 3 * (2048 + 768)


@pytest.mark.parametrize(
    ("flags", "gradient", "optimizer"),
    [
        ("", 4, 12),
        ("--grad-reduce-in-bf16", 2, 16),
        (f"--use-precision-aware-optimizer {DISTRIBUTED}", 4, 10),
        (
            f"--use-precision-aware-optimizer {DISTRIBUTED} --main-grads-dtype bf16 "
            "--exp-avg-dtype bf16 --exp-avg-sq-dtype bf16",
            2,
            6,
        ),
    ],
)
def test_bytes_of_a_parameter(flags, gradient, optimizer):
    args = run_of("Qwen3-0.6B", 1, flags).args
    assert memory.gradient_bytes(args) == gradient
    assert memory.optimizer_bytes(args) == optimizer


def test_the_distributed_optimizer_splits_dense_and_expert_state_over_their_own_groups():
    layout = "--expert-model-parallel-size 8"
    whole, split = (
        estimate(run_of("Qwen3-30B-A3B", 16, layout, extra))[0] for extra in ("", DISTRIBUTED)
    )
    parameters = stage_parameters(run_of("Qwen3-30B-A3B", 16, layout), 0)
    assert whole.optimizer == 12 * parameters.total
    assert split.optimizer == 12 * (parameters.dense / 16 + parameters.experts / 2)


def test_tensor_and_sequence_parallelism_split_all_that_a_layer_keeps():
    sizes = [
        layer_activations(run_of("Qwen3-32B", 8, layout), LayerKind(), 1.0).total
        for layout in ("", "--tensor-model-parallel-size 8 --sequence-parallel")
    ]
    assert sizes[0] == 8 * sizes[1]


@pytest.mark.parametrize(
    ("smaller", "larger"),
    [
        (" ".join(FULL), ""),
        ("--recompute-granularity selective --recompute-modules core_attn layernorm", ""),
        ("--recompute-granularity selective --recompute-modules mlp", ""),
        (
            "--recompute-granularity full --recompute-method block --recompute-num-layers 20",
            "--recompute-granularity full --recompute-method block --recompute-num-layers 5",
        ),
        (
            "--tensor-model-parallel-size 4 --sequence-parallel",
            "--tensor-model-parallel-size 4",
        ),
        ("--context-parallel-size 4", "--context-parallel-size 2"),
    ],
)
def test_what_saves_activations(smaller, larger):
    less, more = (estimate(run_of("Qwen3-14B", 8, flags))[0] for flags in (smaller, larger))
    assert less.activations < more.activations


def test_the_output_layer_follows_the_strategy_of_the_kernel_and_the_prompts():
    def kept(share, strategy):
        run = run_of("Qwen3-14B", 1, f"--objective-backward {strategy}")
        return memory.output_bytes(run, share)[0]

    assert kept(1.0, "recompute") == kept(0.1, "recompute") < kept(0.1, "auto") < kept(1.0, "save")
    # 4,096 supervised rows are fewer than the hidden size: their logits are kept, in two bytes.
    assert kept(1.0, "auto") - kept(1.0, "recompute") == 4096 * 151936 * 2


def test_a_command_line_is_estimated_as_it_is(capsys, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(published_config("Qwen3-14B")))
    paths = ["--hf-model", str(folder), "--save", "runs/x", "--load", "runs/x", "--export-hf", "y"]
    layout = "--tensor-model-parallel-size 4 --sequence-parallel --use-distributed-optimizer"
    flags = [*BASE, *layout.split(), *paths, "--data", "a.jsonl", "--lr", "1e-5", "--epochs", "1"]
    tool = ["--gpus", "8", "--gpu-memory", "80"]
    assert estimate_memory.main([*tool, *flags]) == 0
    shown = capsys.readouterr().out
    assert "fits a GPU of 80 GiB" in shown
    assert "Megatron's own estimate" in shown
    assert estimate_memory.main([*tool[:3], "40", "--json", *flags]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["fits"] is False
    assert 40 * GIB < result["largest"] == result["ranks"][0]["total"] < 80 * GIB
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (("--model", "Qwen9"), ("Qwen9", "Qwen3-14B")),
        (("--model", "Qwen3-14B", "--hf-model", "x"), ("--model", "--hf-model")),
        (("--model", "Qwen3-14B", "--tensor-model-parallel-size", "3"), ("3", "40")),
        (("--model", "Qwen3-14B", "--fp8-format", "hybrid"), ("--fp8-format", "leave it out")),
        (("--model", "Qwen3-14B", "--optimizer", "sgd"), ("sgd", "adam")),
        (("--hf-model", "nowhere"), ("nowhere",)),
    ],
)
def test_bad_input_is_named(capsys, argv, named):
    assert estimate_memory.main(["--gpus", "8", *BASE, *argv]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in named), message


def test_what_the_training_refuses_is_refused():
    with pytest.raises(ArgumentsError, match="number of processes"):
        run_of("Qwen3-14B", 3, "--tensor-model-parallel-size 2")
    with pytest.raises(ShapeError, match="--decoder-first-pipeline-num-layers"):
        run_of(
            "Qwen3-14B", 2, "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 9"
        )
