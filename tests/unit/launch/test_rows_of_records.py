"""The length of rows, where a record is longer than the first ones told; a resumed run; checkpoints."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from checkpoint_conversion.families import family_for
from megatron_profit.estimates.published import published_config
from megatron_profit.launch import prepare
from megatron_profit.launch.machine import Machine
from megatron_profit.launch.plan_layout import checkpoint_of, parameters_of
from megatron_profit.launch.records import Lengths, PreparedRows
from megatron_profit.launch.run_folder import RunFolder
from megatron_profit.recipe.flags import Given
from megatron_profit.recipe.request import read_request

PARALLEL = ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel")


@pytest.mark.parametrize(("ids", "positions"), [(2049, 2048), (2050, 4096)])
def test_rows_grow_to_the_positions_of_the_longest_record(monkeypatch, ids, positions):
    """A record of n ids takes n - 1 positions: its last id is a label alone."""
    asked = []

    def prepare_rows(settings, tokenizer, progress):
        asked.append(settings["seq_length"])
        return PreparedRows(1, ids, int(ids > asked[-1] + 1), 9, "")

    def plan_layout(request, wish, machine, may_shorten):
        return SimpleNamespace(seq_length=wish)

    monkeypatch.setattr(prepare, "prepare_rows", prepare_rows)
    monkeypatch.setattr(prepare, "plan_layout", plan_layout)
    monkeypatch.setattr(prepare, "wish_of_flags", lambda given, model, length, rows, exact: length)
    monkeypatch.setattr(prepare, "sample_lengths", lambda *_: Lengths(100.0, 1000))
    monkeypatch.setattr(prepare.DataOptions, "from_flags", lambda settings: None)
    monkeypatch.setattr(RunFolder, "remembered", lambda self, request: {})
    request = SimpleNamespace(given={}, values={}, value=lambda name: True)
    model = SimpleNamespace(positions=40960, architecture={})
    prepare._fit(request, model, {}, Path("tokenizer"), None, RunFolder(Path("run")))
    assert asked == [1024, positions]


def test_a_resumed_run_has_the_layout_of_its_start_on_the_same_gpus():
    """A step of 4 rows was made larger for the replicas. For exactly so many rows, others would be faster."""
    config = published_config("Qwen3-8B")
    model = SimpleNamespace(architecture=family_for(config).megatron_arguments(config))

    def plan(gpus, remembered):
        flags = f"--model m --data d.jsonl --dry-run --gpu-memory 79.6 --gpus {gpus}"
        request = read_request(flags.split())
        some = (Lengths(843.0, 2637), 8192, Machine((), "", 2, 20))
        return prepare.planned_rows(request, remembered, model, *some)

    first = plan(16, {})
    assert first.rows > 4
    kept = [("--global-batch-size", first.rows), ("--use-distributed-optimizer", True)]
    remembered = {flag[2:].replace("-", "_"): Given.of(flag, value) for flag, value in kept}
    assert plan(16, remembered).flags == first.flags
    assert plan(64, remembered).rows == first.rows


@pytest.mark.parametrize(
    ("schedule", "rows"), [("0:8", 8), ("0:16 10K:24", 8), ("0:16,1000:16", 16)]
)
def test_a_batch_of_each_size_of_a_schedule_is_whole_steps_of_the_replicas(schedule, rows):
    """The derived micro-batch divides all of them; a batch that it does not divide ends the training."""
    config = published_config("Qwen3-0.6B")
    model = SimpleNamespace(architecture=family_for(config).megatron_arguments(config))
    words = "--model m --data d.jsonl --dry-run --no-packing --gpus 8 --gpu-memory 79.6".split()
    request = read_request([*words, "--step-batch-size-schedule", schedule])
    some = (Lengths(100.0, 200), 1024, Machine((), "", 2, 20))
    planned = prepare.planned_rows(request, {}, model, *some)
    assert planned.rows == rows
    sizes = [planned.flags.get(f"{name}_size", 1) for name in PARALLEL]
    assert rows % (planned.flags["micro_batch_size"] * 8 // math.prod(sizes)) == 0


@pytest.mark.parametrize(
    ("flags", "bytes_of_a_parameter"),
    [
        ("", 14),
        ("--optimizer sgd --layout given", 10),
        ("--fp8-format hybrid --layout given", 14),
        ("--decoder-first-pipeline-num-layers 1 --layout given", 14),
        ("--without=--bf16", 12),
    ],
)
def test_a_checkpoint_is_counted_also_where_the_layout_is_not(flags, bytes_of_a_parameter):
    config = published_config("Qwen3-0.6B")
    architecture = family_for(config).megatron_arguments(config)
    request = read_request(["--model", "m", "--data", "d.jsonl", *flags.split()])
    size = checkpoint_of(request, architecture)
    assert size == bytes_of_a_parameter * parameters_of(architecture)
