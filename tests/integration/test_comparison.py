"""A small comparison for real: trainings, exports, evaluations, table."""

import json
from pathlib import Path

import pytest
import yaml

from megatron_profit.commands import compare

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
pytest.importorskip("lm_eval", reason="the extra eval is not installed")
pytest.importorskip("math_verify", reason="the extra eval is not installed")


@pytest.mark.slow
def test_a_comparison_trains_evaluates_and_reports_a_failure(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    questions = tmp_path / "sums.jsonl"
    questions.write_text(json.dumps({"question": "What is two plus two?", "answer": "four"}) + "\n")
    plan = {
        "base": str(tiny),
        "train": f"--data {DATA}/arithmetic_chatty.jsonl --valid-data {DATA}/arithmetic_heldout.jsonl "
        "--eval-interval 2 --eval-iters 1 --seq-length 64 --micro-batch-size 2 --train-iters 2",
        "evaluate": f"--task-file {questions} --answer-pattern four|five --max-new-tokens 4 "
        "--dtype float32",
        "objectives": {"sft": "--objective sft", "dft": "--objective dft"},
        "learning_rates": [1e-3],
        "seeds": [1],
    }
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(plan))
    assert compare.main([str(file), "--out", str(tmp_path / "out")]) == 0
    assert "| sft, lr 0.001 | 0.0 % (0.0 to 97.5) |" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [result["scores"] for result in results] == [{"sums": 0.0}] * 3
    for result in results[1:]:
        assert result["metrics"]["lm loss validation"] > 0
        assert result["metrics"]["kept fraction"] == 1

    file.write_text(yaml.safe_dump(plan | {"objectives": {"bad": "--objective best"}}))
    assert compare.main([str(file), "--out", str(tmp_path / "out")]) == 1
    assert "unknown objective 'best'" in capsys.readouterr().err
