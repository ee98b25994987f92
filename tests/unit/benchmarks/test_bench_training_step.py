"""The benchmark of a training step: its flags and its table; a real run of it is slow."""

import json
from pathlib import Path

import bench_objective
import bench_training_step
import pytest
import torch


def test_what_follows_the_dashes_goes_to_megatron():
    options = bench_training_step.parse_arguments(
        ["--quick", "--layers", "3", "--steps", "9", "--", "--tensor-model-parallel-size", "2"]
    )
    assert (options.layers, options.steps, options.rounds) == (3, 9, 2)
    assert options.megatron == ["--tensor-model-parallel-size", "2"]


def test_ours_is_needed(capsys):
    with pytest.raises(SystemExit):
        bench_training_step.parse_arguments(["--losses", "stock"])
    assert "must name ours" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_measures_every_loss(tmp_path, monkeypatch):
    monkeypatch.setitem(bench_training_step.QWEN3_06B, "vocab_size", 508)
    bench_training_step.main(
        [
            *("--layers", "1", "--seq-length", "32", "--steps", "1", "--rounds", "1"),
            *("--tau", "0.0015", "--device", "cpu", "--out", str(tmp_path)),
        ]
    )
    (page,) = tmp_path.glob("*-training-step-cpu.md")
    results = json.loads(page.with_suffix(".json").read_text())["results"]
    assert set(results) == set(bench_training_step.LOSSES)
    assert results["ours"]["kept"] == pytest.approx(results["official"]["kept"], abs=0.05)
    assert results["stock"]["kept"] == 1
    assert all(result["median"] > 0 for result in results.values())


@pytest.mark.parametrize(("native", "dtype"), [(True, "bf16"), (False, "fp32")])
def test_a_cpu_that_emulates_bf16_is_measured_in_fp32(monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    options = bench_training_step.parse_arguments(["--device", "cpu"])
    assert options.dtype == dtype
    assert ("--bf16" in bench_training_step.training_flags(Path(), options)) == native
    (config,) = bench_objective.configurations(bench_objective.parse_arguments(["--device", "cpu"]))
    assert config.dtype == dtype


def test_a_dtype_that_is_given_stays():
    options = bench_training_step.parse_arguments(["--device", "cpu", "--dtype", "bf16"])
    assert options.dtype == "bf16"
    options = bench_objective.parse_arguments(["--full", "--device", "cpu", "--tp", "1"])
    assert options.dtype == ["fp32", "bf16"]
