"""Whole runs of the training entry, started as a user starts them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from make_tiny_model import TinyShape, make_tiny_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, Qwen3Config

from megatron_profit.megatron_patches.loggers import curve_of

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
PROFIT = ("--objective", "profit", "--prob-threshold", "0.001", "--threshold-direction", "higher")
METRICS = (
    "objective",
    "lm loss",
    "kept fraction",
    "mean p",
    "mean p kept",
    "mean p dropped",
    "supervised tokens",
)


@pytest.fixture
def flags(tiny) -> list[object]:
    return [
        *("--hf-model", tiny, "--random-init", "--data", DATA / "arithmetic_base.jsonl"),
        *("--seq-length", 48, "--micro-batch-size", 4, "--global-batch-size", 8, "--lr", 1e-3),
    ]


def logged(output: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf"\| {name}: (\S+) \|", output)]


def evaluations(output: str) -> list[tuple[str, ...]]:
    """The values of each evaluation, as printed."""
    lines = re.findall(r"validation loss at .*", output)
    return [tuple(re.findall(r"value: (\S+)", line)) for line in lines]


def test_metrics_reach_console_and_tensorboard_and_evaluation_runs(sft, flags, tmp_path):
    result = sft(
        2,
        *flags,
        *PROFIT,
        *("--train-iters", 4, "--valid-data", DATA / "arithmetic_heldout.jsonl"),
        *("--eval-interval", 2, "--tensorboard-dir", tmp_path, "--tensor-model-parallel-size", 2),
        *("--log-entropy", "--log-quantiles", 0.1, 0.9),
    )
    assert re.search(r"([\d,]+) records read, \1 kept, 0 skipped", result.stdout)
    assert re.search(
        r"a step of 8 rows holds \d+\.\d records on average, [\d,]+ tokens", result.stdout
    )
    assert "WARNING: records fill" not in result.stdout
    events = EventAccumulator(str(tmp_path)).Reload()
    for name in (*METRICS, "entropy", "p quantile 0.1", "p quantile 0.9"):
        assert len(logged(result.stdout, name)) == 4
        assert [event.step for event in events.Scalars(curve_of(name))] == [1, 2, 3, 4]
        assert [event.step for event in events.Scalars(f"validation/{name}")] == [2, 4, 4]
    for group in ("train", "validation"):
        low, high = (events.Scalars(f"{group}/p quantile {q}")[-1].value for q in (0.1, 0.9))
        assert 0 < low < events.Scalars(f"{group}/mean p")[-1].value < high < 1
    # One evaluation sees each record once; what is left of the last batch of 8 is empty.
    batches = -(-len((DATA / "arithmetic_heldout.jsonl").read_text().splitlines()) // 8)
    assert f"Evaluating on {8 * batches} samples" in result.stdout
    per_batch = events.Scalars("validation/supervised tokens")[0].value
    assert per_batch * batches == pytest.approx(supervised_tokens(flags[1], "arithmetic_heldout"))


def supervised_tokens(hf_model: Path, name: str) -> int:
    from megatron_profit.data import ChatRenderer, build_examples

    renderer = ChatRenderer(AutoTokenizer.from_pretrained(hf_model))
    return build_examples([DATA / f"{name}.jsonl"], renderer, 48)[1].supervised_tokens


@pytest.mark.parametrize(
    "precision",
    ["--bf16 --use-distributed-optimizer", "--fp16 --initial-loss-scale 1024"],
    ids=["bf16", "fp16"],
)
def test_half_precision_trains(sft, flags, precision):
    result = sft(2, *flags, "--objective", "sft", "--train-iters", 12, *precision.split())
    losses = logged(result.stdout, "lm loss")
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.2
    assert logged(result.stdout, "kept fraction") == [1.0] * 12


def test_a_resumed_run_continues_like_the_uninterrupted_one(sft, flags, tmp_path):
    command = [*flags, *PROFIT, "--train-iters", 6, "--tensor-model-parallel-size", 2]
    command += ["--objective-warmup-steps", 1, "--log-quantiles", 0.5]
    command += ["--objective-schedule", "prob_threshold", "cosine", 0.005, 4]
    command += ["--valid-data", DATA / "arithmetic_heldout.jsonl", "--eval-interval", 4]
    whole = sft(2, *command).stdout
    kept = logged(whole, "kept fraction")
    assert kept[0] == 1, "plain SFT first"
    assert kept[1] < kept[-1], "then a threshold that falls"
    saving = [*command, "--save", tmp_path, "--load", tmp_path, "--save-interval", 3]
    first = sft(2, *saving, "--exit-interval", 3).stdout
    second = sft(2, *saving).stdout
    for name in (*METRICS, "p quantile 0.5"):
        assert logged(first, name) + logged(second, name) == logged(whole, name), name
    # Started once more, a finished run evaluates and ends.
    third = sft(2, *saving).stdout
    assert logged(third, "lm loss") == []
    assert evaluations(second) == evaluations(whole), (
        "after step 4, on the schedule, and at the end"
    )
    assert evaluations(third) == evaluations(whole)[-1:]


@pytest.mark.slow
def test_a_run_may_resume_at_another_layout(sft, flags, tmp_path):
    command = [*flags, *PROFIT, "--train-iters", 6]
    at_tp, at_pp = ("--tensor-model-parallel-size", 2), ("--pipeline-model-parallel-size", 2)
    whole = sft(2, *command, *at_tp).stdout
    saving = [*command, "--save", tmp_path, "--load", tmp_path, "--save-interval", 3]
    sft(2, *saving, *at_tp, "--exit-interval", 3)
    second = sft(2, *saving, *at_pp).stdout
    assert logged(second, "supervised tokens") == logged(whole, "supervised tokens")[3:]
    expected = logged(whole, "lm loss")[3:]
    assert logged(second, "lm loss") == [pytest.approx(loss, rel=1e-4) for loss in expected]


@pytest.mark.parametrize(
    ("tied", "layout"),
    [
        (False, ""),
        pytest.param(True, "--pipeline-model-parallel-size 2", marks=pytest.mark.slow),
    ],
)
def test_parameters_may_be_gathered_during_the_forward_pass(sft, tmp_path, tied, layout):
    """The output layer waits for its own parameters, although its module is never called."""
    shape = TinyShape(hidden_size=32, intermediate_size=64, head_dim=16, tied=tied)
    model = make_tiny_model(tmp_path / "model", sorted(DATA.glob("*.jsonl")), shape)
    command = [
        *("--hf-model", model, "--random-init", "--data", DATA / "arithmetic_base.jsonl"),
        *("--objective", "sft", "--seq-length", 40, "--micro-batch-size", 2, "--lr", 1e-2),
        *("--global-batch-size", 8, "--train-iters", 4, *layout.split()),
    ]
    sharded = [*command, "--use-distributed-optimizer", "--overlap-grad-reduce"]
    plain, overlapped = (
        logged(sft(4 if layout else 2, *flags).stdout, "lm loss")
        for flags in (command, [*sharded, "--overlap-param-gather", "--ddp-num-buckets", 8])
    )
    assert overlapped == [pytest.approx(loss, rel=1e-5) for loss in plain]


def test_a_run_that_keeps_nothing_warns(sft, flags):
    result = sft(
        1,
        *flags,
        *("--objective", "profit", "--prob-threshold", "0.9", "--threshold-direction", "higher"),
        *("--train-iters", 3),
    )
    assert re.search(r"kept 0 of the last \d+ supervised tokens", result.stdout)
    assert "--objective sft" in result.stdout


def test_real_chat_files_with_the_real_tokenizer_train(sft, shared_folder, tmp_path):
    """Both files in one run: its start and steps with a vocabulary of 151,936 take long."""
    files = ("alpaca_en_demo.json", "s1k_gptoss20b_sharegpt_low.json")
    model = tmp_path / "model"
    shutil.copytree(shared_folder / "qwen3-tokenizer", model)
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
    )
    (model / "config.json").write_text(json.dumps(config.to_dict()))
    result = sft(
        2,
        *("--hf-model", model, "--random-init"),
        *("--data", *(shared_folder / "data" / file for file in files)),
        *("--objective", "profit", "--prob-threshold", "1e-7", "--threshold-direction", "higher"),
        *("--seq-length", 256, "--micro-batch-size", 1, "--global-batch-size", 2, "--lr", 1e-3),
        *("--train-iters", 3, "--tensor-model-parallel-size", 2, "--sequence-parallel"),
    )
    assert re.search(rf"{999 + 976:,} records read, [\d,]+ kept", result.stdout)
    assert not re.search(r" 0 truncated", result.stdout)
    losses = logged(result.stdout, "lm loss")
    assert len(losses) == 3
    assert all(11 < loss < 13 for loss in losses)
    assert all(count > 0 for count in logged(result.stdout, "supervised tokens"))
