"""Runs that are killed go on as if they never had been: losses, counts and weights, bit for bit."""

from __future__ import annotations

import functools
import json
import re
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from killable_runs import (
    Chain,
    Job,
    assert_same_tensors,
    is_half_written,
    killed_in_save,
    random_kills,
    steps,
    tensors,
)
from make_tiny_model import TinyShape, make_tiny_model
from safetensors.torch import load_file, save_file

from checkpoint_conversion.megatron_to_hf import megatron_to_hf
from checkpoint_conversion.verify import verify

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
INTERVAL = 3
# A learning rate and a threshold that change, and an old policy that lives for five steps.
PROFIT = (
    "--objective profit --prob-threshold 0.001 --threshold-direction higher --tensor-model-parallel-size 2 "
    "--objective-warmup-steps 2 --objective-schedule prob_threshold cosine 0.005 9"
).split()
PSFT = (
    "--objective psft --psft-steps-per-refresh 5 --clip-high 0.28 --use-distributed-optimizer"
).split()

STATES = "--objective sft --tensor-model-parallel-size 2 --sequence-parallel --bf16".split()
STATES += "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable".split()
IN_FP32 = ("A_log", "linear_attn.norm.weight")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """With dropout, so that the state of the random generators matters."""
    shape = TinyShape(hidden_size=32, intermediate_size=64, head_dim=16)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny_model(folder, sorted(DATA.glob("*.jsonl")), shape)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    return folder


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> Path:
    """Gated DeltaNets and a vision tower; in bf16, with decays and the heads' norms in fp32, as published."""
    shape = TinyShape(hidden_size=32, intermediate_size=64, head_dim=16, family="qwen3.5-vision")
    folder = tmp_path_factory.mktemp("states") / "tiny"
    make_tiny_model(folder, sorted(DATA.glob("*.jsonl")), shape)
    weights = {
        name: weight if name.endswith(IN_FP32) else weight.bfloat16()
        for name, weight in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def command(tiny, tmp_path):
    """The flags of a run that saves into a folder of a name, and goes on from there."""

    def make(name: str, train_iters: int, *flags: object, model: Path = tiny) -> list[object]:
        return [
            *("--hf-model", model, "--random-init", "--data", DATA / "arithmetic_base.jsonl"),
            *("--seq-length", 48, "--micro-batch-size", 2, "--global-batch-size", 4),
            *("--lr", 1e-3, "--lr-decay-style", "cosine", "--lr-warmup-iters", 3),
            *("--train-iters", train_iters, "--save-interval", INTERVAL, *flags),
            *("--save", tmp_path / name, "--load", tmp_path / name),
        ]

    return make


@pytest.fixture
def chain(command, tmp_path):
    """An uninterrupted run, and the means to live through the same one in several lives."""

    def make(train_iters: int, *flags: object, **model: Path) -> tuple[Chain, dict, Path]:
        whole = Job(2, command("whole", train_iters, *flags, **model), tmp_path / "whole.log")
        assert whole.end() == 0, whole.output[-6000:]
        expected = steps(whole.output)
        assert list(expected) == list(range(1, train_iters + 1))
        start = functools.partial(Job, 2, command("killed", train_iters, *flags, **model))
        return Chain(start, tmp_path / "killed", tmp_path), expected, tmp_path / "whole"

    return make


def assert_exact(chain: Chain, expected: dict, whole: Path, train_iters: int) -> None:
    assert chain.seen == expected
    assert max(chain.lost) <= INTERVAL, (
        "more is lost than what was trained since the last checkpoint"
    )
    last = f"iter_{train_iters:07d}"
    assert_same_tensors(chain.save / last, whole / last)


def test_a_killed_run_goes_on_exactly(chain):
    """Once inside a save, once after a warning."""
    lives, expected, whole = chain(16, *PROFIT)
    lives.live(expected, killed_in_save(6, "torchrun", 0.01))

    def warned(job: Job) -> None:
        job.wait_for(lambda output: len(steps(output)) > 1)
        job.send(signal.SIGTERM, "torchrun")
        assert job.end() == 1
        assert re.search(
            r"> stopped by SIGTERM after iteration \d+ of 16; checkpoint in .*143", job.output
        )

    lives.live(expected, warned)
    output = lives.live(expected, lambda job: job.end())
    assert lives.lost[-1] == 0, "what was saved upon the signal is not lost"
    assert "successfully loaded checkpoint" in output
    assert_exact(lives, expected, whole, 16)


@pytest.mark.slow
def test_a_killed_run_of_states_in_bf16_goes_on_exactly_and_is_exported_as_published(
    chain, states, tmp_path
):
    """The optimizer has fp32 copies of the decays, which bf16 alone would not let move by small steps."""
    lives, expected, whole = chain(8, *STATES, model=states)
    lives.live(expected, killed_in_save(6, "machine", 0.01))
    lives.live(expected, lambda job: job.end())
    assert_exact(lives, expected, whole, 8)
    saved = tensors(whole / "iter_0000008")
    for weight in ("A_log", "dt_bias", "out_norm.plain_weight"):
        name = f"decoder.layers.0.self_attention.{weight}"
        copy = saved[f"optimizer.state.param.{name}"]
        assert (saved[name].dtype, copy.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(copy.bfloat16(), saved[name])
        assert not torch.equal(copy, saved[name].float())
    for run in ("whole", "killed"):
        megatron_to_hf(tmp_path / run, states, tmp_path / f"{run}-hf")
    assert not verify(tmp_path / "whole-hf", tmp_path / "killed-hf").differences
    before, after = (
        load_file(folder / "model.safetensors") for folder in (states, tmp_path / "killed-hf")
    )
    assert {name: w.dtype for name, w in after.items()} == {n: w.dtype for n, w in before.items()}
    carried = [name for name in before if name.startswith("model.visual.")]
    assert carried
    assert all(torch.equal(after[name], before[name]) for name in carried)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "seed"), [(PROFIT, 1), (PSFT, 2)], ids=["profit-tp2", "psft-dp2"]
)
def test_fifty_kills_lose_nothing(chain, flags, seed, record_property):
    """25 at each of two layouts; at random moments, many of them inside saves."""
    train_iters = 200
    lives, expected, whole = chain(train_iters, *flags)
    for kill in random_kills(25, train_iters, seed):
        lives.live(expected, kill)
    lives.live(expected, lambda job: job.end())
    assert_exact(lives, expected, whole, train_iters)
    assert lives.inside_saves >= 5
    result = {
        "kills": len(lives.seconds) - 1,
        "inside saves": lives.inside_saves,
        "steps lost": sum(lives.lost),
        "most lost at once": max(lives.lost),
        "seconds": round(sum(lives.seconds)),
    }
    print(json.dumps(result))
    record_property("faults", json.dumps(result))


@pytest.mark.slow
def test_torchrun_restarts_what_a_signal_or_a_kill_ended(command, tmp_path):
    """With --max-restarts, in the same job: a rank that is killed, then one that is told to stop."""
    whole = Job(2, command("whole", 40, *PSFT), tmp_path / "whole.log")
    assert whole.end() == 0
    expected = steps(whole.output)
    job = Job(2, command("restarted", 40, *PSFT), tmp_path / "log", max_restarts=2)
    job.wait_for(lambda output: 5 in steps(output))
    job.kill_rank()
    job.wait_for(lambda output: "successfully loaded checkpoint" in output and 9 in steps(output))
    job.send(signal.SIGUSR1, "rank")
    assert job.end() == 0, job.output[-6000:]
    assert "> stopped by SIGUSR1" in job.output
    assert steps(job.output) == expected
    assert_same_tensors(tmp_path / "restarted/iter_0000040", tmp_path / "whole/iter_0000040")


@pytest.mark.slow
def test_a_full_disk_on_one_rank_ends_the_run(command, tmp_path):
    """Without waiting for a time-out."""
    job = Job(2, command("run", 4000, *PSFT), tmp_path / "log")
    job.wait_for(lambda output: 4 in steps(output))
    last = job.ranks[-1]
    # A limit on the size of a file that it writes: as for a full disk, write() fails.
    resource.prlimit(last, resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))
    begun = time.monotonic()
    assert job.end(timeout=120) == 1
    assert time.monotonic() - begun < 60
    failed = re.search(
        r"^megatron-profit-sft: error: the checkpoint of step \d+ was not written: rank 1: OSError 27, "
        rf"File too large.*; those before it are as they were in {tmp_path / 'run'}$",
        job.output,
        re.MULTILINE,
    )
    assert failed, f"all ranks learn which one failed, and why:\n{job.output[-6000:]}"
    assert "Traceback" not in job.output[: failed.start()]
    assert is_half_written(tmp_path / "run")
