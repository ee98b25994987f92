"""The proof on a GPU: its processes, limits and results; its steps run small in a slow test."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time

import gpu_proof
import proof
import pytest
from proof_steps import dropping_threshold


def no_imports(device):
    os.environ["PROOF_DEVICE"] = device


def device_of_this_process():
    return os.environ["PROOF_DEVICE"], os.getpid()


def fail():
    print("a last word", flush=True)
    raise ValueError("7 is too large")


def leave():
    raise SystemExit(3)


def die():
    os._exit(9)


@pytest.fixture(params=["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def children(request, tmp_path):
    return proof.Children("cpu", no_imports, tmp_path / "logs", request.param)


def test_a_function_runs_in_a_prepared_process_of_its_own(children):
    device, pid = children.run("one", 300, device_of_this_process)
    assert device == "cpu"
    assert pid != os.getpid()


@pytest.mark.parametrize(
    ("function", "reason"),
    [(fail, "7 is too large"), (leave, "exit code 3"), (die, "exit code 9")],
)
def test_a_failure_is_told_with_the_end_of_its_log(tmp_path, function, reason):
    children = proof.Children("cpu", no_imports, tmp_path)
    with pytest.raises(proof.StepFailure) as failure:
        children.run("one", 300, function)
    assert reason in str(failure.value).splitlines()[0]
    if function is fail:
        assert "a last word" in str(failure.value)


def test_a_process_that_takes_too_long_is_killed(tmp_path):
    children = proof.Children("cpu", no_imports, tmp_path)
    with pytest.raises(proof.StepFailure, match="cut off after 0 s"):
        children.run("one", 0.3, time.sleep, 600)


def test_a_process_without_a_group_of_its_own_is_killed_as_well():
    """It has just been forked, where the time is used up from the start."""
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    process.start()
    proof._kill(process)
    assert process.exitcode == -signal.SIGKILL


def test_no_process_outlives_the_deadline_of_the_proof(tmp_path):
    deadline = time.monotonic() + 0.5
    children = proof.Children("cpu", no_imports, tmp_path, deadline=deadline)
    with pytest.raises(proof.StepFailure, match="cut off after 0 s"):
        children.run("one", 600, time.sleep, 600)
    assert time.monotonic() < deadline + 60


def test_results_are_written_after_each_step_and_a_late_step_is_not_run(tmp_path):
    def good(result):
        result.check("one is one", True)
        result.data["count"] = 1

    def bad(result):
        raise proof.StepFailure("no memory\nlast line")

    seen = []
    steps = [proof.Step("a", "A", good), proof.Step("b", "B", bad)]
    results = proof.prove(steps, time.monotonic() + 60, lambda done: seen.append(len(done)))
    assert seen == [1, 2]
    assert [result.verdict for result in results] == ["passed", "failed"]
    results += proof.prove([steps[0]], time.monotonic() - 1, lambda done: None)
    assert results[-1].verdict == "not run"
    about = {"date": "2026-01-02", "hardware": "card"}
    page = proof.write_page(tmp_path, "gpu-proof-card", results, about, "python tools/gpu_proof.py")
    assert page.name == "2026-01-02-gpu-proof-card.md"
    assert "**no memory**" in page.read_text()
    steps = json.loads(page.with_suffix(".json").read_text())["steps"]
    assert [step["verdict"] for step in steps] == ["passed", "failed", "not run"]
    assert steps[0]["count"] == 1


def test_a_wrong_fact_fails_the_step():
    result = proof.Result("a", "A")
    result.check("one is two", False)
    result.check("one is one", True)
    assert result.verdict == "failed"


def test_the_threshold_drops_the_wanted_share_of_random_targets():
    import torch

    config = {"vocab_size": 2000, "hidden_size": 256, "initializer_range": 0.05}
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(500, 256, generator=generator)
    weight = torch.randn(2000, 256, generator=generator) * 0.05
    probs = (hidden @ weight.t()).softmax(1)
    assert (probs < dropping_threshold(config, 0.2)).float().mean() == pytest.approx(0.2, abs=0.02)
    assert dropping_threshold(config, 0.0) == 0


def test_a_machine_without_a_gpu_is_told_of_the_small_steps(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_proof.parse_arguments([])
    assert "--device cpu runs the same steps small" in capsys.readouterr().err


def check_with_stand_ins(rendezvous):
    """The check of Gated DeltaNet where functions of the same meaning stand in for the kernels."""
    from delta_net_layer import take_kernels
    from proof_delta_net import check_delta_net

    take_kernels()
    return check_delta_net("cpu", rendezvous)


@pytest.mark.slow
def test_kernels_of_gated_delta_net_are_compared_where_the_layer_takes_them(tmp_path):
    children = proof.Children("cpu", no_imports, tmp_path, "spawn")
    found = children.run("delta-net", 200, check_with_stand_ins, str(tmp_path / "rendezvous"))
    cases = {f"{form}, {dtype}" for form in ("plain", "kernels") for dtype in ("bf16", "fp32")}
    assert found["errors"].keys() == cases
    assert found["milliseconds"].keys() == {"plain", "kernels"}
    for case, errors in found["errors"].items():
        assert max(errors.values()) < (1e-2 if "bf16" in case else 1e-5), case


@pytest.mark.slow
def test_all_steps_pass_small(tmp_path):
    import subprocess
    import sys

    from training_inputs import REPOSITORY

    command = [sys.executable, REPOSITORY / "tools" / "gpu_proof.py", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--minutes", "30", "--out", tmp_path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*-gpu-proof-cpu.json")
    steps = json.loads(path.read_text())["steps"]
    assert [step["name"] for step in steps] == list(gpu_proof.STEPS)
    assert {step["verdict"] for step in steps} == {"passed", "measured"}
