"""The benchmark of the objective: small runs, and what their files say."""

import json

import bench_objective
import pytest


def run(folder, *flags):
    """Returns (results by name, the page's text)."""
    size = ("--vocab", "508", "--hidden", "24", "--tokens", "123", "--dtype", "fp32")
    bench_objective.main([*size, "--rounds", "2", "--device", "cpu", "--out", str(folder), *flags])
    (page,) = folder.glob("*-objective-cpu.md")
    record = json.loads(page.with_suffix(".json").read_text())
    assert record["environment"]["liger-kernel"]
    (configuration,) = record["configurations"]
    return configuration["results"], page.read_text()


def assert_measured(result):
    assert len(result["seconds"]) == 2
    assert result["gradient_difference"] < 1e-5, "all drop the same tokens"
    assert result["peak_bytes"] >= 0


@pytest.mark.slow
def test_a_run_writes_what_was_measured_and_what_was_not(tmp_path):
    only = ("--only", "ours", "matmuls", "official", "verl")
    results, text = run(tmp_path, "--ours", "chunk_vocab=7", *only)
    assert list(results) == ["ours", "ours chunk_vocab=7", "matmuls", "official", "verl"]
    for name in ("ours", "ours chunk_vocab=7"):
        assert_measured(results[name])
    assert results["verl"] == {"absent": "needs a GPU"}
    assert "50% prompt, 20% dropped, fp32, TP 1" in text
    assert "| verl | absent: needs a GPU |" in text


def test_flags_replace_parts_of_a_preset():
    options = bench_objective.parse_arguments(
        ["--full", "--device", "cpu", "--hidden", "64", "--masks", "0/0", "0.5/0.2", "--tp", "1"]
    )
    sizes = {(c.hidden, c.prompt, c.dropped, c.tp) for c in bench_objective.configurations(options)}
    assert sizes == {(64, 0.0, 0.0, 1), (64, 0.5, 0.2, 1)}
    assert options.tokens == [1024, 8192]
    assert options.vocab == [151_936, 248_320], "Qwen3's and Qwen3.5's"
    assert options.ours == ["backward=recompute"]


@pytest.mark.slow
def test_a_vocabulary_over_two_ranks(tmp_path):
    results, _ = run(tmp_path, "--tp", "2", "--only", "ours", "official", "megatron")
    assert_measured(results["ours"])
    assert results["official"] == {"absent": "knows no tensor parallelism"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab", "507", "--tp", "2"], "--vocab 507 cannot be split evenly over --tp 2"),
        (["--masks", "1/0"], "1/0 has a share that is not in [0, 1)"),
        (["--masks", "0.5"], "invalid shares value: '0.5'"),
        (["--ours", "speed=9"], "linear_objective takes no 'speed'"),
    ],
)
def test_bad_flags_are_named(flags, message, capsys):
    with pytest.raises(SystemExit) as raised:
        bench_objective.parse_arguments(["--device", "cpu", *flags])
    assert message in capsys.readouterr().err + str(raised.value)
