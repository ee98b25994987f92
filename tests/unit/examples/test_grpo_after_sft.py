"""The step from an export to reinforcement learning: reward, verl's data, and a few steps of GRPO."""

import json
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
sys.path.append(str(REPOSITORY / "examples"))
pytest.importorskip("math_verify", reason="the extra eval is not installed")
import grpo_after_sft  # noqa: E402
from make_tiny_model import make_tiny_model  # noqa: E402

RECORDS = [
    {"question": f"What is {n} plus 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"}
    for n in range(5)
] + [{"question": "What is 1,079 plus 1?", "answer": "#### 1,080"}]


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "gsm8k.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return file


def test_the_reward_is_the_grade():
    texts = ["\\boxed{4}", "<think>4</think>5", "It is 4.0", "no"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    assert grpo_after_sft.reward(completions, ["4"] * 4, prompts=None) == [1, 0, 1, 0]


def test_verl_gets_parquet_and_a_launch_line(data, tmp_path, capsys):
    from datasets import Dataset

    file = tmp_path / "train.parquet"
    flags = [
        "--model",
        "runs/hf",
        "--data",
        str(data),
        "--out",
        "runs/rl",
        "--verl-data",
        str(file),
    ]
    assert grpo_after_sft.main(flags) == 0
    rows = Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    assert rows[2]["reward_model"] == {"style": "rule", "ground_truth": "3"}
    asked = rows[2]["prompt"][0]["content"]
    assert asked.startswith("What is 2 plus 1?\nPlease reason")
    # verl's reward of GSM8K reads "#### 3" alone, and compares texts without commas.
    assert "####" in asked
    assert "boxed" not in asked
    assert rows[5]["reward_model"]["ground_truth"] == "1080"
    printed = capsys.readouterr().out
    assert "verl.trainer.main_ppo algorithm.adv_estimator=grpo" in printed
    assert "actor_rollout_ref.model.path=runs/hf" in printed


def test_data_that_cannot_be_used_are_named(data, tmp_path, capsys):
    flags = ["--model", "m", "--out", str(tmp_path / "out"), "--data"]
    assert grpo_after_sft.main([*flags, str(tmp_path / "absent.jsonl")]) == 1
    data.write_text('{"question": "?"}\n')
    assert grpo_after_sft.main([*flags, str(data)]) == 1
    assert "line 1: must be an object with question and answer" in capsys.readouterr().err


def test_separators_within_a_text_do_not_end_a_record(data):
    """JSON allows U+2028, U+2029 and U+0085 in a text as they are."""
    question = "one\u2028two\u2029three\u0085four"
    record = {"question": question, "answer": "1\n#### 1"}
    text = json.dumps(record, ensure_ascii=False)
    data.write_text(f"{text}\n{text}\n", encoding="utf-8")
    questions = grpo_after_sft.read_questions(data)
    assert [q["prompt"][0]["content"].startswith(question) for q in questions] == [True, True]


@pytest.fixture(params=["tiny", "real"])
def model(request, tmp_path):
    """A tiny random model, and the small real one where its package is installed."""
    if request.param == "real":
        return request.getfixturevalue("real_model")
    files = sorted((REPOSITORY / "examples" / "data").glob("*.jsonl"))
    return make_tiny_model(tmp_path / "tiny", files)


@pytest.mark.slow
def test_grpo_runs_a_few_steps_on_the_cpu(model, data, tmp_path, capsys):
    pytest.importorskip("trl", reason="TRL, a dependency of the example only, is not installed")
    flags = ["--model", str(model), "--data", str(data), "--out", str(tmp_path / "out")]
    flags += "--steps 2 --prompts 1 --generations 2 --max-new-tokens 4 --lr 1e-5".split()
    assert grpo_after_sft.main(flags) == 0
    printed = capsys.readouterr().out
    assert printed.count("mean reward") == 2
    assert (tmp_path / "out" / "model.safetensors").exists()
