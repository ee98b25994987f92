"""The page on the real model says what its results say."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import report_real_model as report
from report_real_model import (
    CORE,
    PAGE,
    PLAN,
    README,
    REPOSITORY,
    STUDY,
    blocks,
    newest,
    read_study,
    readme_blocks,
    with_blocks,
)

from megatron_profit.commands.evaluate import build_parser
from megatron_profit.estimates.published import published_config
from megatron_profit.evaluation.command_line import sampling_of
from megatron_profit.evaluation.comparison.plan import Run, read_plan
from megatron_profit.evaluation.comparison.runs import Outcome, results_text
from megatron_profit.training.arguments.derive import derive


def committed():
    study, outcomes = read_study(newest(STUDY))
    return blocks(study, outcomes, json.loads(newest(CORE).read_text()))


def test_the_tables_of_the_page_follow_from_the_results():
    page = PAGE.read_text(encoding="utf-8")
    assert with_blocks(page, committed()) == page, "run python benchmarks/report_real_model.py"
    text, (_, outcomes) = README.read_text(encoding="utf-8"), read_study(newest(STUDY))
    assert with_blocks(text, readme_blocks(outcomes)) == text, "run the same command"


def test_every_figure_of_the_findings_is_in_a_table():
    page = PAGE.read_text(encoding="utf-8")
    findings = page.split("## Findings\n")[1].split("\n## ")[0]
    numbers = set(re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", findings))
    assert numbers
    known = set(re.findall(r"\d+\.\d+", "".join(committed().values())))
    # The paper's own figure, and thresholds, are no results of this study.
    assert numbers - known <= {"0.768", "0.485", "0.1", "0.3", "0.5"}


def test_the_parts_that_are_finished_are_counted_by_the_plan():
    study, _ = read_study(newest(STUDY))
    again = json.loads(report.joined([newest(STUDY)]))
    assert {name: again[name] for name in ("plan", "finished", "runs")} == {
        name: study[name] for name in ("plan", "finished", "runs")
    }


def outcome(objective, score, right, **more):
    run = Run("gsm8k", objective, 1e-4, 0, 1) if objective else None
    return Outcome(
        run, "gsm8k", {"MAWPS": score}, more.pop("metrics", {}), {"MAWPS": right}, **more
    )


@pytest.fixture
def outcomes():
    curves = {"kept fraction": [1.0, 0.5], "mean p kept": [0.25, 0.75], "lm loss": [2.0, 1.0]}
    metrics = {"lm loss validation": 1.5}
    return [
        outcome(None, 0.5, [1.0, 0.0], seconds={"MAWPS": [3600.0, 7200.0]}),
        outcome(
            "sft",
            1.0,
            [1.0, 1.0],
            curves=curves,
            metrics=metrics,
            seconds={"train": [1800.0, 3600.0]},
        ),
        outcome("dft", 0.0, [0.0, 0.0], curves=curves, metrics=metrics),
    ]


def test_results_of_several_places_are_joined_if_their_base_answers_alike(outcomes, tmp_path):
    base, sft, dft = outcomes
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    files[0].write_text(results_text([base, sft], "a part", 1, 5))
    files[1].write_text(results_text([base, dft], "a part", 1, 1))
    plan = read_plan(PLAN, find_base=lambda _: str(tmp_path))
    parts = sum(map(len, plan.schedule()))
    text = report.joined(files)
    assert text == results_text([base, sft, dft], PLAN.read_text(), 0, parts)
    files[1].write_text(results_text([outcome(None, 0.5, [0.0, 1.0]), dft], "a part", 1, 1))
    with pytest.raises(ValueError, match="the base has other answers to MAWPS"):
        report.joined(files)


def test_blocks_hold_scores_differences_trainings_and_times(outcomes):
    group = {
        "tokens": 1000,
        "mean p": 0.75,
        "interval": [0.7, 0.8],
        "median p": 0.9,
        "kept": {"0.1": 0.875, "0.3": 0.8, "0.5": 0.5},
    }
    core = {
        "groups": dict.fromkeys(
            ("core", "rest", "number", "operator", "name", "end of the turn"), group
        )
    }
    found = blocks({"finished": 2, "runs": 9}, outcomes, core)
    assert found["state"].startswith("**The study is not finished: 2 of 9 parts")
    assert report.state({"finished": 9, "runs": 9}) == "All runs of the plan are finished.\n"
    assert "| model | MAWPS (2) |" in found["scores"]
    assert "| sft, lr 0.0001 | 100.0 % (" in found["scores"]
    assert "| sft, lr 0.0001 | +50.0 (+0.0 to +100.0), p 1 |" in found["differences"]
    assert "| dft, lr 0.0001 | -100.0 (-100.0 to +68.4), p 0.5 |" in found["differences"]
    row = "| gsm8k | sft, lr 0.0001 | 1 | 1.500 | 1.000 to 0.500 | 0.250 to 0.750 | not logged |"
    assert row in found["trainings"], "its q was not logged"
    assert "| core | 1,000 | 0.750 | 0.700 to 0.800 | 0.900 | 87.5 % | 50.0 % |" in found["core"]
    assert "the trainings took 0.5 hours of CPU time and the evaluations 1.0" in found["time"]
    assert "within 3.0 hours" in found["time"]


def test_a_seed_that_was_asked_more_has_a_table_of_its_own(outcomes):
    base, second = (
        replace(o, scores={**o.scores, "SVAMP": 0.5}, right={**o.right, "SVAMP": [1.0]})
        for o in outcomes[:2]
    )
    all_of_them = [base, *outcomes[1:], replace(second, run=replace(second.run, seed=2))]
    tables = report.in_tables(all_of_them)
    assert [o.data for o in tables] == ["gsm8k"] * 3 + ["gsm8k, seed 2"] * 2
    assert list(tables[0].scores) == ["MAWPS"], "the others were not asked SVAMP"
    assert list(tables[3].scores) == ["MAWPS", "SVAMP"]


def test_questions_of_some_models_alone_have_a_table_of_their_own(outcomes):
    more = {"scores": {"MAWPS": 0.5, "SVAMP": 0.5}, "right": {"MAWPS": [1.0, 0.0], "SVAMP": [1.0]}}
    base, sft = (replace(o, **more) for o in outcomes[:2])
    tables = report.in_tables([base, sft, outcomes[2]])
    assert [(o.data, o.setting, list(o.scores)) for o in tables] == [
        ("gsm8k", None, ["MAWPS"]),
        ("gsm8k", "sft, lr 0.0001", ["MAWPS"]),
        ("gsm8k", "dft, lr 0.0001", ["MAWPS"]),
        ("gsm8k, more questions", None, ["SVAMP"]),
        ("gsm8k, more questions", "sft, lr 0.0001", ["SVAMP"]),
    ]
    assert report.trainings([base, sft, outcomes[2]]).count("| gsm8k | sft") == 1


def test_a_learning_rate_has_a_table_of_its_own_and_columns_in_readme(outcomes):
    """So objectives are compared at one rate. A rate of a single objective has no columns."""
    _, sft, dft = outcomes
    later = [
        replace(sft, run=replace(sft.run, learning_rate=1e-5)),
        replace(sft, run=replace(sft.run, data="alpaca"), data="alpaca"),
        replace(outcomes[0], data="alpaca"),
        replace(dft, run=replace(dft.run, learning_rate=3e-5)),
        replace(sft, run=replace(sft.run, learning_rate=3e-5)),
        replace(sft, run=replace(sft.run, objective="psft", learning_rate=3e-5)),
    ]
    names = list(dict.fromkeys(o.data for o in report.in_tables([*outcomes, *later])))
    assert names == ["gsm8k", "gsm8k, lr 1e-05", "gsm8k, lr 3e-05", "alpaca"]
    title, _, *rows = readme_blocks([*outcomes, *later])["scores"].splitlines()
    assert title == "| model | MAWPS (2), lr 0.0001 | MAWPS (2), lr 3e-05 |"
    assert [line.split(" |")[0] for line in rows] == ["| the base", "| sft", "| dft", "| psft"]
    assert rows[2].split(" | ")[2].startswith("0.0 %")
    assert rows[3].startswith("| psft |  | 100.0 %"), "it has no training at the first rate"
    gained = report.differences(report.in_tables([*outcomes, *later]))
    assert "| minus sft, lr 3e-05, points |" in gained


def test_settings_with_several_seeds_have_a_table_of_means(outcomes):
    """It has the seeds and the questions that all of them have; a setting with one seed is not in it."""
    base, sft, dft = outcomes
    seed_2 = [replace(each, run=replace(each.run, seed=2)) for each in (dft, sft)]
    more = {"scores": {"MAWPS": 0.0, "SVAMP": 1.0}, "right": {"MAWPS": [0.0, 0.0]}}
    seed_3 = replace(sft, run=replace(sft.run, seed=3))
    alone = replace(sft, run=replace(sft.run, objective="psft"))
    asked_more = replace(seed_2[0], **more)
    found = report.over_seeds([base, sft, dft, alone, asked_more, seed_2[1], seed_3])
    assert {o.data for o in found} == {"gsm8k, lr 0.0001, mean over 2 seeds"}
    assert [(o.run.objective, o.run.seed) for o in found[1:]] == [
        ("sft", 1),
        ("sft", 2),
        ("dft", 1),
        ("dft", 2),
    ]
    assert all(list(o.scores) == ["MAWPS"] for o in found)
    table = report.scores(found)
    assert "| sft, lr 0.0001 | 100.0 ± 0.0 % (" in table
    assert report.over_seeds(outcomes) == []


def test_data_that_no_model_was_trained_on_yet_have_no_table(outcomes):
    later = Outcome(None, "later", {"MAWPS": 0.5}, {}, {"MAWPS": [1.0, 0.0]})
    assert report.in_tables([*outcomes, later]) == outcomes
    assert report.in_tables([later]) == [later]


def test_the_base_alone_has_no_differences(outcomes):
    group = json.loads(newest(CORE).read_text())
    found = blocks({"finished": 0, "runs": 9}, outcomes[:1], group)
    assert "| the base | 50.0 % (" in found["scores"]
    assert found["differences"] == ""
    assert "png" not in "".join(found.values())


def test_the_plan_of_the_study_can_be_carried_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "SmolLM2-135M-Instruct").mkdir(parents=True)
    plan = read_plan(REPOSITORY / "benchmarks" / "real_model.yaml")
    stages = plan.schedule()
    assert [unit.run.objective for unit in stages[0]] == ["sft", "profit 0.1", "dft"]
    runs = set(plan.runs())
    assert {run.objective for run in runs} == set(plan.objectives)
    assert {run.data for run in runs} == set(plan.data)
    for run in {run.objective: run for run in runs}.values():
        command = plan.train_command(run, Path("hf"), Path("metrics"))
        derive(command[3:], "cpu", 1, published_config("Qwen3-0.6B"))
    asked = {name for units in stages for unit in units for name in unit.evaluations}
    assert asked == set(plan.evaluate)
    for name in asked:
        command = plan.evaluate_command("gsm8k", name, Path("hf"), Path("out"))
        arguments = build_parser().parse_args(command[4:])
        assert sampling_of(arguments, arguments.tasks).max_new_tokens


def test_curves_are_drawn(outcomes, tmp_path):
    """Of the rate at which all of them were logged."""
    base, sft, _ = outcomes
    later = {**sft.curves, "mean q kept": [0.25, 0.25]}
    later = replace(sft, run=replace(sft.run, learning_rate=3e-5), curves=later)
    report.draw_curves([base, sft, later], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_a_page_without_a_part_is_refused():
    assert with_blocks("<!-- a -->\nold\n<!-- end of a -->", {"a": "new"}).split("\n")[2] == "new"
    with pytest.raises(ValueError, match="no part 'b'"):
        with_blocks("<!-- a -->\n<!-- end of a -->", {"b": ""})
