"""The comparison: what counts as an answer, its tables, what it refuses and keeps, and a small real one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import compare_objectives
import make_arithmetic_data
import pytest
from compare_objectives import (
    ComparisonError,
    Question,
    Result,
    draw_ranks,
    final_answer,
    measures_of,
    questions_in,
    ranks_of,
    read_plan,
    read_result,
    table,
    with_ranks,
    write_result,
)
from make_tiny_model import main as make_tiny_model

RESULTS = [
    Result("clean", "sft", 1, accuracy=0.5, retained=None, cross_entropy=1.0, kept=1.0, length=10),
    Result("clean", "sft", 2, accuracy=0.75, retained=None, cross_entropy=2.0, kept=0.5, length=20),
    Result("clean", "dft", 1, accuracy=0.25, retained=None, cross_entropy=3.0, kept=1.0, length=5),
    Result("new", "sft", 1, accuracy=0.5, retained=0.1, cross_entropy=1.0, kept=1.0, length=10),
    Result("new", "dft", 1, accuracy=0.0, retained=0.9, cross_entropy=3.0, kept=1.0, length=5),
]
BASE = dict(zip(measures_of(RESULTS), (0.5, 0.0, 0.95), strict=True))
TRAIN = "--seq-length 40 --micro-batch-size 8 --train-iters 2 --lr 1e-3"


@pytest.mark.parametrize(
    ("text", "pattern", "expected"),
    [
        (
            "So twenty-one plus Thirty-Two is fifty-three.",
            make_arithmetic_data.NUMBER.pattern,
            "fifty-three",
        ),
        ("It costs 3 times 1,200, so 3,600.", r"-?[0-9][0-9,.]*", "3600"),
        ("#### 12 and more\n#### 42", r"#### (\S+)", "42"),
        ("I do not know.", r"\d+", None),
    ],
)
def test_the_last_match_is_the_answer(text, pattern, expected):
    assert final_answer(text, pattern) == expected


ASKED = {"question": "What is six times seven?", "answer": "It is #### 42"}
COLUMNS = ("prompt=question", "response=answer")


@pytest.fixture
def questions(tmp_path):
    """questions(*records): those of a file with these lines."""

    def read(*records, columns=COLUMNS):
        file = tmp_path / "questions.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return questions_in(file, columns, r"#### (\S+)")

    return read


def test_questions_are_read_by_their_columns_and_broken_records_counted(questions):
    user = {"role": "user", "content": ASKED["question"]}
    assert questions(ASKED, {"question": "?"}, ASKED) == ([Question([user], "42")] * 2, 1)
    chat = {"messages": [user, {"role": "assistant", "content": ASKED["answer"]}]}
    broken = ({"messages": []}, {"x": 1}, {"messages": [*chat["messages"], user]})
    assert questions(chat, *broken, columns=()) == ([Question([user], "42")], 3)


def test_a_reference_without_an_answer_is_an_error(questions):
    with pytest.raises(ComparisonError, match=r"line 2: --answer-pattern '#### .*'It is 42'"):
        questions(ASKED, {**ASKED, "answer": "It is 42"})
    with pytest.raises(ComparisonError, match="none of 1 records can be used"):
        questions({"question": "?"})


def test_mean_and_spread_are_over_the_seeds():
    assert table(RESULTS, BASE).splitlines() == [
        "| objective | clean | new | new: what it knew |",
        "|---|---|---|---|",
        "| the base | 50.0 % | 0.0 % | 95.0 % |",
        "| sft | 62.5 ± 17.7 % | 50.0 % | 10.0 % |",
        "| dft | 25.0 % | 0.0 % | 90.0 % |",
        "",
        "| data | objective | held-out cross-entropy | kept at the end | characters |",
        "|---|---|---|---|---|",
        "| clean | sft | 1.500 | 75 % | 15 |",
        "| clean | dft | 3.000 | 100 % | 5 |",
        "| new | sft | 1.000 | 100 % | 10 |",
        "| new | dft | 3.000 | 100 % | 5 |",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base", "."], "--base and --setting go together"),
        (["--base", ".", "--setting", "a=setup.py,setup.py"], "--base needs --answer-pattern"),
        (["--base", "absent"], "absent does not exist"),
        (["--setting", "a=setup.py"], "are not two or three files"),
        (["--run", "sft"], "is not of the form NAME=FLAGS"),
    ],
)
def test_what_cannot_be_compared_is_refused(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        read_plan(["--out", str(tmp_path / "out"), *flags])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("result", RESULTS)
def test_a_result_that_was_kept_is_read_as_it_was_written_or_refused(tmp_path, result):
    file = tmp_path / "result.json"
    write_result(file, result)
    assert read_result(file) == result
    text = file.read_text()
    for damaged in ("", "5", text[:-3], text.replace("0.5", "0.9"), text.replace("sft", "dft")):
        file.write_text(damaged)
        if damaged != text:
            with pytest.raises(ComparisonError, match=r"result\.json is damaged .*remove it"):
                read_result(file)


def test_ranks_are_an_axis_of_their_own(tmp_path):
    runs = with_ranks({"sft": "--objective sft", "dft": "--objective dft"}, [4, 16])
    assert runs["dft, rank 16"] == "--objective dft --lora-rank 16"
    assert list(runs) == ["sft, rank 4", "sft, rank 16", "dft, rank 4", "dft, rank 16"]
    assert with_ranks({"sft": "--objective sft"}, []) == {"sft": "--objective sft"}
    results = [replace(RESULTS[0], run=run) for run in runs]
    assert ranks_of(results)["sft"] == {4: "sft, rank 4", 16: "sft, rank 16"}
    assert ranks_of([*results, RESULTS[0]]) == {}, "a run of all weights has no rank"
    draw_ranks(results, BASE, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


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


@pytest.fixture
def flags(tmp_path):
    """Of a comparison of two objectives and two seeds on a model that has learnt nothing."""
    data = tmp_path / "sums.jsonl"
    records = make_arithmetic_data.generate()["arithmetic_heldout"]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    make_tiny_model(["--out", str(tmp_path / "base"), "--data", str(data)])
    return [
        *("--out", str(tmp_path / "out"), "--base", str(tmp_path / "base")),
        *("--setting", f"sums={data},{data},{data}", "--seeds", "1", "2", "--train", TRAIN),
        *("--answer-pattern", make_arithmetic_data.NUMBER.pattern, "--max-new-tokens", "4"),
        *("--run", "profit 0.5=--objective sft", "--run", "profit < 0.5=--objective dft"),
    ]


@pytest.fixture
def trainings(monkeypatch, tmp_path):
    """The commands of the runs that are made, each of which leaves the base as it is."""
    commands = []

    def execute(command, log):
        commands.append(command)
        shutil.copytree(tmp_path / "base", command[command.index("--export-hf") + 1])
        records = [
            {"kind": "train", "step": 1, "kept fraction": 0.9},
            {"kind": "train", "step": 2, "kept fraction": 0.5},
            {"kind": "evaluation", "step": 2, "lm loss": 4.0},
            {"kind": "train", "step": 3, "lm loss": None},
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        Path(command[command.index("--metrics-file") + 1]).write_text(text)

    monkeypatch.setattr(compare_objectives, "execute", execute)
    return commands


def test_runs_are_made_once_and_again_when_something_they_follow_from_has_changed(
    flags, trainings, tmp_path
):
    assert compare_objectives.main(flags) == 0
    assert len(trainings) == 4
    report = json.loads((tmp_path / "out/results.json").read_text())
    assert [(r["run"], r["seed"]) for r in report["results"]] == [
        (name, seed) for seed in (1, 2) for name in ("profit 0.5", "profit < 0.5")
    ]
    assert all(r["kept"] == 0.5 and r["cross_entropy"] == 4.0 for r in report["results"])
    assert report["base"] == {"sums": 0.0, "sums: what it knew": 0.0}
    assert (tmp_path / "out/figure.png").stat().st_size > 10_000

    assert compare_objectives.main([*flags, "--run", "third=--objective eaft"]) == 0
    assert len(trainings) == 6, "only the third is new"
    with (tmp_path / "sums.jsonl").open("a") as data:
        data.write(json.dumps(make_arithmetic_data.generate()["arithmetic_base"][0]) + "\n")
    assert compare_objectives.main(flags) == 0
    assert len(trainings) == 10


def test_data_that_cannot_be_read_are_an_error_and_columns_go_to_the_training(
    flags, trainings, tmp_path, capsys
):
    data = tmp_path / "sums.jsonl"
    data.write_text(json.dumps({"question": "One and two?", "answer": "twenty-three"}) + "\n")
    assert compare_objectives.main(flags) == 1
    assert "error: " in (said := capsys.readouterr().err)
    assert "the format is not known" in said
    assert compare_objectives.main([*flags, "--data-columns", *COLUMNS]) == 0
    at = trainings[0].index("--data-columns")
    assert trainings[0][at + 1 : at + 3] == list(COLUMNS)


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


@pytest.mark.slow
def test_a_comparison_runs_and_reports_a_failure(flags, tmp_path, capsys):
    assert compare_objectives.main(flags) == 0
    report = json.loads((tmp_path / "out/results.json").read_text())
    assert len(report["results"]) == 4
    assert all(result["cross_entropy"] > 0 for result in report["results"])
    assert all(result["kept"] == 1 for result in report["results"])

    assert compare_objectives.main([*flags, "--run", "bad=--objective best"]) == 1
    assert "unknown objective 'best'" in capsys.readouterr().err
