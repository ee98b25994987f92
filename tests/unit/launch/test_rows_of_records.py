"""The length of rows, where a record is longer than the first ones told; a resumed run; checkpoints."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from make_tiny_model import train_tokenizer

from checkpoint_conversion.families import family_for
from megatron_profit.data.options import DataOptions
from megatron_profit.estimates.published import published_config
from megatron_profit.launch import prepare
from megatron_profit.launch.machine import Machine
from megatron_profit.launch.plan_layout import checkpoint_of, parameters_of
from megatron_profit.launch.records import Lengths, PreparedRows, prepare_rows, sample_lengths
from megatron_profit.launch.run_folder import RunFolder
from megatron_profit.recipe.flags import Given
from megatron_profit.recipe.request import read_request

PARALLEL = ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel")


@pytest.mark.parametrize(("ids", "positions"), [(2049, 2048), (2050, 4096)])
@pytest.mark.parametrize("lost", ["cut", "too_long", "turns"])
def test_rows_grow_to_the_positions_of_the_longest_record(monkeypatch, ids, positions, lost):
    """A record of n ids takes n - 1 positions: its last id is a label alone.

    A longer one loses its end, or all of it where its answer stands there, as with a long document before it.
    """
    asked = []

    def prepare_rows(settings, tokenizer, progress):
        asked.append(settings["seq_length"])
        counts = dict.fromkeys(("cut", "too_long", "turns"), 0)
        counts[lost] = int(ids > asked[-1] + 1)
        return PreparedRows(1, 1000 if counts[lost] else ids, **counts, records=9, summary="")

    def sample_lengths(*_, all_records=False, progress=None):
        return Lengths(100.0, ids - 1 if all_records else 1000)

    def plan_layout(request, wish, machine, may_shorten):
        return SimpleNamespace(seq_length=wish)

    monkeypatch.setattr(prepare, "prepare_rows", prepare_rows)
    monkeypatch.setattr(prepare, "plan_layout", plan_layout)
    monkeypatch.setattr(prepare, "wish_of_flags", lambda given, model, length, rows, exact: length)
    monkeypatch.setattr(prepare, "sample_lengths", sample_lengths)
    monkeypatch.setattr(prepare.DataOptions, "from_flags", lambda settings: None)
    monkeypatch.setattr(RunFolder, "remembered", lambda self, request: {})
    request = SimpleNamespace(given={}, values={}, value=lambda name: True)
    model = SimpleNamespace(positions=40960, architecture={})
    prepare._fit(request, model, {}, Path("tokenizer"), None, RunFolder(Path("run")))
    assert asked == [1024, positions]


def test_records_that_a_row_cannot_take_are_counted(tmp_path):
    """The answer of a long record stands behind the end of a row, so that nothing of it could be trained."""
    texts = ["two plus two", "two plus two " * 60]
    talks = [
        [{"role": "user", "content": x}, {"role": "assistant", "content": "four"}] for x in texts
    ]
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"messages": x}) + "\n" for x in talks)
    )
    train_tokenizer(texts, 272).save_pretrained(tmp_path / "model")
    words = f"--model m --data {tmp_path / 'chats.jsonl'} --data-cache {tmp_path / 'cache'}".split()
    for more in ([], ["--too-long", "drop"]):
        request = read_request([*words, *more])
        settings = {**request.table.defaults, **request.values, "seq_length": 64}
        rows = prepare_rows(settings, tmp_path / "model", print)
        assert (rows.cut, rows.too_long, rows.fit) == (0, 1, False)
        options = DataOptions.from_flags(settings)
        assert sample_lengths(options, tmp_path / "model", 1024, all_records=True).longest > 64


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
