"""A training run that evaluates what it exports."""

import json
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
pytest.importorskip("lm_eval", reason="lm-eval and math-verify are not installed")
pytest.importorskip("math_verify", reason="lm-eval and math-verify are not installed")


@pytest.mark.slow
def test_a_run_evaluates_its_export_and_says_what_misleads(sft, tiny, tmp_path):
    questions = [{"input": f"{n} + 1 ?", "target": n + 1} for n in range(3)]
    (tmp_path / "mawps.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    flags = ["--hf-model", tiny, "--data", DATA / "arithmetic_chatty.jsonl"]
    flags += "--seq-length 64 --micro-batch-size 2 --global-batch-size 4 --train-iters 2 --lr 1e-4".split()
    flags += "--objective profit --prob-threshold 0.1 --threshold-direction higher".split()
    flags += ["--valid-data", DATA / "arithmetic_heldout.jsonl", "--eval-iters", "1"]
    flags += ["--eval-interval", "2", "--save", tmp_path / "save", "--save-interval", "2"]
    flags += ["--keep-best", "lm loss", "--keep-last", "1", "--export-hf", tmp_path / "hf"]
    flags += ["--eval-tasks", "mawps", "--eval-flags"]
    flags += [f"--data {tmp_path} --max-new-tokens 4 --dtype float32"]
    printed = sft(2, *flags).stdout
    assert "--keep-best 'lm loss' with --objective profit" in printed
    assert "| mawps (3) | trained |" in printed
    results = json.loads((tmp_path / "hf-evaluation" / "results.json").read_text())
    assert results["results"][0]["questions"] == 3

    refused = sft(1, *flags[:-1], f"--data {tmp_path}/absent", check=False)
    assert refused.returncode != 0
    assert "needs the file mawps.jsonl" in refused.stdout
