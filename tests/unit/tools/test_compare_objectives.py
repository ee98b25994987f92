"""The comparison on the quickstart's model: its data, and the plan that it makes of them."""

import shlex

import compare_objectives
import make_arithmetic_data
import yaml

from megatron_profit.commands.evaluate import build_parser
from megatron_profit.evaluation.comparison.plan import read_plan
from megatron_profit.evaluation.questions import task_of_file


def test_wrong_sums_and_differences():
    records = make_arithmetic_data.generate()["arithmetic_chatty"]
    wrong = make_arithmetic_data.with_wrong_sums(records, 0.5)
    numbers = make_arithmetic_data.numbers_in
    changed = 0
    for before, after in zip(records, wrong, strict=True):
        right, given = (numbers(r["messages"][1]["content"])[-1] for r in (before, after))
        assert before["messages"][0] == after["messages"][0]
        assert right // 10 == given // 10
        changed += right != given
    assert 0.4 < changed / len(records) < 0.6
    for record in make_arithmetic_data.as_differences(records):
        question, answer = (message["content"] for message in record["messages"])
        minuend, subtrahend = numbers(question)
        assert numbers(answer) == [minuend - subtrahend]


def test_held_out_sums_in_other_words():
    records = make_arithmetic_data.generate()["arithmetic_heldout"]
    asked = make_arithmetic_data.in_other_words(records, 6)
    questions = [record["messages"][0]["content"] for record in asked]
    assert len(set(questions)) == len(questions) > 4 * len(records)
    pairs = [
        {frozenset(make_arithmetic_data.numbers_in(r["messages"][0]["content"])) for r in some}
        for some in (records, asked)
    ]
    assert pairs[0] == pairs[1]


def test_the_plan_names_data_that_can_be_asked(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    monkeypatch.setattr(compare_objectives, "quickstart_base", lambda out: tmp_path / "base")
    plans = []
    monkeypatch.setattr(compare_objectives.compare, "main", lambda argv: plans.append(argv) or 0)
    assert compare_objectives.main(["--out", str(tmp_path / "out"), "--seeds", "4"]) == 0
    assert plans == [[str(tmp_path / "out/plan.yaml"), "--out", str(tmp_path / "out")]]
    plan = read_plan(tmp_path / "out" / "plan.yaml")
    runs = plan.runs()
    assert len(runs) == 27
    assert {run.seed for run in runs} == {4}
    assert {run.lora_rank for run in runs} == {0}
    counts = {}
    for data in plan.data:
        command = plan.evaluate_command(data, "", tmp_path / "hf", tmp_path / "results")
        flags = build_parser().parse_args(command[command.index("evaluate") + 1 :])
        for file in flags.task_file:
            task = task_of_file(file, {}, pattern=flags.answer_pattern)
            counts[data, task.name] = len(task.questions)
            question = task.questions[0]
            assert task.grade(question, f"It is {question.reference.title()}!")["right"]
    assert counts == {
        ("phrases", "sums"): 319,
        ("errors", "sums"): 319,
        ("new skill", "differences"): counts["new skill", "differences"],
        ("new skill", "what_it_knew"): 319,
    }
    assert "--valid-data" in shlex.split(plan.data["errors"]["train"])
    before = yaml.safe_load((tmp_path / "out" / "plan.yaml").read_text())
    assert list(before["objectives"]) == list(compare_objectives.RUNS)


def test_ranks_and_rates_of_some_settings(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    monkeypatch.setattr(compare_objectives, "quickstart_base", lambda out: tmp_path / "base")
    monkeypatch.setattr(compare_objectives.compare, "main", lambda argv: 0)
    axes = "--only sft dft --settings errors --lora-ranks 4 128 --learning-rates 1e-3 --seeds 1 2"
    assert compare_objectives.main(["--out", str(tmp_path / "out"), *axes.split()]) == 0
    runs = read_plan(tmp_path / "out" / "plan.yaml").runs()
    assert len(runs) == 8
    assert {(run.data, run.learning_rate, run.lora_rank) for run in runs} == {
        ("errors", 1e-3, 4),
        ("errors", 1e-3, 128),
    }
