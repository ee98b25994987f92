"""Runs with steps that go wrong: what the guards do and say, and what the logs hold of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from megatron_profit.data import ChatRenderer, SFTDataset, build_examples
from megatron_profit.training.monitoring.metrics_file import read_metrics

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
BASE = DATA / "arithmetic_base.jsonl"
ENTRY = Path(__file__).with_name("faulty_run.py")
SEQ_LENGTH, MICRO_BATCH, BATCH, SEED = 48, 2, 8, 3
EXIT_CODE = 17


@pytest.fixture
def faulty(ranks, tiny):
    def run(*flags: object, **options: object):
        return ranks(
            2,
            *(ENTRY, "--device", "cpu", "--hf-model", tiny, "--random-init", "--data", BASE),
            *("--objective", "faulty", "--lr-decay-style", "constant", "--lr", 1e-3),
            *("--seq-length", SEQ_LENGTH, "--micro-batch-size", MICRO_BATCH, "--seed", SEED),
            *("--global-batch-size", BATCH, *flags),
            **options,
        )

    return run


def records(tiny: Path, step: int, data_parallel: int) -> list[list[str]]:
    """The names of the records in each micro-batch of a step (from 1) on the last data-parallel rank."""
    renderer = ChatRenderer(AutoTokenizer.from_pretrained(tiny))
    examples, _ = build_examples([BASE], renderer, SEQ_LENGTH)
    dataset = SFTDataset(examples, SEQ_LENGTH, step * BATCH, seed=SEED, packing=True)
    found = []
    stride = MICRO_BATCH * data_parallel
    first = (step - 1) * BATCH + (data_parallel - 1) * MICRO_BATCH
    for begin in range(first, step * BATCH, stride):
        rows = [dataset[row]["example_index"].tolist() for row in range(begin, begin + MICRO_BATCH)]
        indices = [i for row in rows for i in dict.fromkeys(row) if i >= 0]
        found.append([f"{BASE.name}:{i + 1}" for i in indices])
    return found


@pytest.mark.parametrize(
    ("layout", "data_parallel"),
    [
        pytest.param("", 2, id="dp2"),
        pytest.param("--pipeline-model-parallel-size 2", 1, id="pp2", marks=pytest.mark.slow),
    ],
)
def test_bad_steps_are_skipped_and_everything_is_logged(
    faulty, tiny, tmp_path, layout, data_parallel
):
    tensorboard, file = tmp_path / "tensorboard", tmp_path / "metrics.jsonl"
    printed = faulty(
        *("--train-iters", 8, "--log-interval", 2, "--tensorboard-dir", tensorboard),
        *("--valid-data", DATA / "arithmetic_heldout.jsonl", "--eval-interval", 6),
        *("--nan-loss", 3, "--nan-gradient", 4, "--keep-nothing", 7, "--stall-steps", 2),
        *("--on-nonfinite", "skip", "--metrics-file", file, *layout.split()),
    ).stdout
    logged = list(read_metrics(file))
    by_kind = {kind: [r for r in logged if r["kind"] == kind] for kind in ("train", "evaluation")}
    train = {record["step"]: record for record in by_kind["train"]}
    assert list(train) == [2, 4, 6, 8]

    # An interval is the sum of its steps over their count, in which they differ.
    events = EventAccumulator(str(tensorboard)).Reload()
    values = {
        name: {event.step: event.value for event in events.Scalars(f"{group}/{name}")}
        for group, name in (
            *(("train", "lm loss"), ("tokens", "supervised tokens"), ("train", "kept fraction")),
        )
    }
    assert list(values["lm loss"]) == [1, 2, 5, 6, 7, 8]
    tokens = values["supervised tokens"]
    assert tokens[1] != tokens[2]
    for last in (2, 6, 8):
        here = (last - 1, last)
        mean = sum(values["lm loss"][s] * tokens[s] for s in here) / sum(tokens[s] for s in here)
        assert train[last]["lm loss"] == pytest.approx(mean, rel=1e-6)
        assert train[last]["supervised tokens"] == sum(tokens[s] for s in here) / 2
        shown = re.search(rf"iteration +{last}/ +8 \|.* lm loss: (\S+) \|", printed)
        assert float(shown[1]) == pytest.approx(mean, rel=1e-6)
        assert train[last]["supervised tokens per second"] * 2 * train[last][
            "seconds per step"
        ] == pytest.approx(sum(tokens[s] for s in here))
        assert train[last]["tokens per second"] > train[last]["supervised tokens per second"]
        assert train[last]["model TFLOP/s per GPU"] > 0
        assert train[last]["peak memory GiB"] > 0.1
    for name in ("tokens per second", "model TFLOP/s per GPU", "seconds per step"):
        assert [event.step for event in events.Scalars(f"speed/{name}")] == [2, 4, 6, 8]

    # Of steps that were skipped nothing is averaged.
    assert train[4]["skipped"] == train[4]["steps"] == 2
    assert "lm loss" not in train[4]
    assert train[6]["skipped"] == 0

    guards = [record for record in logged if record["kind"] == "guard"]
    assert [(g["step"], g["event"], g["policy"]) for g in guards] == [
        (3, "non-finite loss", "skip"),
        (4, "non-finite gradient", "skip"),
        (4, "stall", "warn"),
        (8, "stall", "warn"),
    ]
    for guard in guards[:2]:
        # A NaN gradient reaches the earlier pipeline stages too, which know no micro-batches.
        suspects = [suspect for suspect in guard["suspects"] if suspect["micro_batch"]]
        assert {suspect["rank"] for suspect in suspects} == {1}
        named = [suspect["records"] for suspect in suspects]
        assert named == records(tiny, guard["step"], data_parallel)
    first = guards[0]["suspects"][0]["records"][0]
    assert re.search(
        rf"guard: non-finite loss at step 3: .*\n  rank 1, micro-batch 1, .*: {first}", printed
    )
    assert "nothing was trained for 2 steps in a row: the objective keeps no token" in printed

    # Each evaluation once, although Megatron evaluates twice behind the last step.
    assert [record["step"] for record in by_kind["evaluation"]] == [6, 8]
    validation = {event.step: event.value for event in events.Scalars("validation/lm loss")}
    for record in by_kind["evaluation"]:
        assert record["lm loss"] == pytest.approx(validation[record["step"]], rel=1e-6)
    lines = re.findall(r"validation loss at .*", printed)
    assert lines
    assert all(line.count("PPL") == line.count("lm loss PPL") == 1 for line in lines)


@pytest.mark.slow
def test_a_stopped_run_goes_on_behind_the_step(faulty, tmp_path):
    """The stop leaves the checkpoints alone; the same command and --iterations-to-skip trains the rest."""
    save = tmp_path / "run"
    command = ["--train-iters", 6, "--nan-loss", 5, "--load", save, "--save", save]
    command += ["--save-interval", 2]
    stopped = faulty(*command, check=False)
    assert stopped.returncode == EXIT_CODE
    assert "ends with code 17" in stopped.stdout
    assert "--iterations-to-skip 5" in stopped.stdout
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert sorted(folder.name for folder in save.glob("iter_*")) == ["iter_0000002", "iter_0000004"]

    at_another_layout = ("--iterations-to-skip", 5, "--tensor-model-parallel-size", 2)
    resumed = faulty(*command, *at_another_layout).stdout
    assert f"passing over the global batch behind {4 * BATCH} samples" in resumed
    file = save / "metrics.jsonl"
    train = {r["step"]: r["lm loss"] for r in read_metrics(file) if r["kind"] == "train"}
    assert list(train) == [1, 2, 3, 4, 6]

    skipped = tmp_path / "skipped.jsonl"
    faulty(*command[:4], "--on-nonfinite", "skip", "--metrics-file", skipped)
    expected = {r["step"]: r.get("lm loss") for r in read_metrics(skipped) if r["kind"] == "train"}
    assert expected.pop(5) is None
    assert train == pytest.approx(expected, rel=1e-5)
    kinds = [(r["kind"], r["step"]) for r in read_metrics(file) if r["kind"] != "train"]
    assert kinds == [("start", 0), ("guard", 5), ("start", 4)]


@pytest.mark.slow
def test_an_overflow_of_fp16_loss_scaling_is_left_to_megatron(faulty, tmp_path):
    """Also beside a loss that is NaN, which is an event and no overflow."""
    file = tmp_path / "metrics.jsonl"
    printed = faulty(
        *("--train-iters", 12, "--fp16", "--initial-loss-scale", 2**14, "--metrics-file", file),
        *("--nan-loss", 9, "--on-nonfinite", "skip"),
    ).stdout
    logged = list(read_metrics(file))
    skipped = [r["step"] for r in logged if r["kind"] == "train" and r["skipped"]]
    assert {1, 2} <= set(skipped) <= set(range(1, 10))
    assert [(r["step"], r["event"]) for r in logged if r["kind"] == "guard"] == [
        (9, "non-finite loss")
    ]
    assert printed.count("guard:") == 1
    assert logged[-1]["lm loss"] < 7
