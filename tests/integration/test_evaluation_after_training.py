"""A training run that evaluates what it exports, at its end and on the way."""

import json
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
pytest.importorskip("lm_eval", reason="lm-eval and math-verify are not installed")
pytest.importorskip("math_verify", reason="lm-eval and math-verify are not installed")


@pytest.fixture
def questions(tmp_path):
    """A folder with three questions of MAWPS."""
    records = [{"input": f"{n} + 1 ?", "target": n + 1} for n in range(3)]
    (tmp_path / "mawps.jsonl").write_text("".join(json.dumps(q) + "\n" for q in records))
    return tmp_path


@pytest.mark.slow
def test_a_run_evaluates_its_export_and_says_what_misleads(sft, tiny, questions, tmp_path):
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


@pytest.mark.slow
def test_a_task_of_every_second_evaluation_chooses_the_best_checkpoint(
    sft, tiny, questions, tmp_path
):
    flags = ["--hf-model", tiny, "--data", DATA / "arithmetic_chatty.jsonl"]
    flags += "--seq-length 64 --micro-batch-size 2 --global-batch-size 4 --train-iters 4 --lr 1e-4".split()
    flags += ["--valid-data", DATA / "arithmetic_heldout.jsonl", "--eval-iters", "1"]
    flags += ["--eval-interval", "1", "--save", tmp_path / "save", "--save-interval", "2"]
    flags += ["--keep-best", "mawps", "--keep-last", "1", "--export-hf", tmp_path / "hf"]
    flags += [
        "--objective",
        "sft",
        "--eval-tasks",
        "mawps",
        "--eval-tasks-interval",
        "2",
        "--eval-tasks-limit",
        "2",
    ]
    flags += ["--eval-flags", f"--data {questions} --max-new-tokens 4 --dtype float32"]
    printed = sft(2, *flags).stdout
    assert printed.count("mawps value: 0.0") >= 2
    lines = [json.loads(line) for line in (tmp_path / "save" / "metrics.jsonl").open()]
    found = {e["step"]: e.get("mawps") for e in lines if e["kind"] == "evaluation"}
    assert found == {1: None, 2: 0.0, 3: None, 4: 0.0}
    results = tmp_path / "hf-evaluation"
    for step in ("step_0000002", "step_0000004"):
        assert (
            json.loads((results / step / "results.json").read_text())["results"][0]["questions"]
            == 2
        )
        assert not (results / step / "model").exists()
    assert json.loads((results / "results.json").read_text())["results"][0]["questions"] == 3
    # Of equals the earliest is the best, and the newest stays as well.
    assert sorted(p.name for p in (tmp_path / "save").glob("iter_*")) == [
        "iter_0000002",
        "iter_0000004",
    ]
