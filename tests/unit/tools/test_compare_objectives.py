"""The comparison: what counts as an answer, what is summarised, what it refuses, and a small real one."""

import json

import compare_objectives
import make_arithmetic_data
import pytest
from compare_objectives import Result, final_answer, read_plan, summarise, table
from make_tiny_model import main as make_tiny_model

RESULTS = [
    Result("clean", "sft", seed, accuracy, cross_entropy, kept=1.0, length=10.0)
    for seed, accuracy, cross_entropy in ((1, 0.5, 1.0), (2, 0.75, 2.0))
] + [Result("clean", "dft", 1, 0.25, 3.0, 1.0, 5.0)]


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


def test_mean_and_spread_are_over_the_seeds():
    sft, dft = summarise(RESULTS)
    assert sft["accuracy"] == 0.625
    assert sft["spread"] == pytest.approx(0.125 * 2**0.5)
    assert sft["cross_entropy"] == 1.5
    assert dft["spread"] is None
    lines = table(RESULTS, {"clean": 0.5}).splitlines()
    assert lines[2] == "| clean | the base | 50.0% | | | |"
    assert lines[3] == "| clean | sft | 62.5% ± 17.7% | 1.500 | 100% | 10 |"
    assert lines[4] == "| clean | dft | 25.0% | 3.000 | 100% | 5 |"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base", "."], "--base and --setting go together"),
        (["--base", ".", "--setting", "a=setup.py,setup.py"], "--base needs --answer-pattern"),
        (["--base", "absent"], "absent does not exist"),
        (["--setting", "a=setup.py"], "are not two files"),
        (["--run", "sft"], "is not of the form NAME=FLAGS"),
    ],
)
def test_what_cannot_be_compared_is_refused(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        read_plan(["--out", str(tmp_path / "out"), *flags])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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


@pytest.mark.slow
def test_a_comparison_runs_continues_and_reports_a_failure(tmp_path, monkeypatch, capsys):
    data = tmp_path / "sums.jsonl"
    records = make_arithmetic_data.generate()["arithmetic_heldout"]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    make_tiny_model(["--out", str(tmp_path / "base"), "--data", str(data)])
    flags = [
        *(
            "--out",
            tmp_path / "out",
            "--base",
            tmp_path / "base",
            "--setting",
            f"sums={data},{data}",
        ),
        *("--answer-pattern", make_arithmetic_data.NUMBER.pattern, "--seeds", "1", "2"),
        *("--train", "--seq-length 40 --micro-batch-size 8 --train-iters 2 --lr 1e-3"),
        *("--run", "sft=--objective sft", "--run", "dft=--objective dft", "--max-new-tokens", "4"),
    ]
    assert compare_objectives.main(list(map(str, flags))) == 0
    report = json.loads((tmp_path / "out/results.json").read_text())
    assert len(report["results"]) == 4
    assert all(result["cross_entropy"] > 0 for result in report["results"])
    assert (tmp_path / "out/figure.png").stat().st_size > 10_000
    first = (tmp_path / "out/results.md").read_text()

    monkeypatch.setattr(
        compare_objectives, "execute", lambda *_: pytest.fail("a run was made twice")
    )
    assert compare_objectives.main(list(map(str, flags))) == 0
    assert (tmp_path / "out/results.md").read_text() == first

    monkeypatch.undo()
    assert compare_objectives.main([*map(str, flags), "--run", "bad=--objective best"]) == 1
    assert "invalid choice" in capsys.readouterr().err
