"""The data of the study on a real model, and its rule for tokens that carry an answer."""

import json
import random

import core_tokens
import make_study_data
import numpy as np
import pytest
from core_tokens import kinds, names_of, summary
from make_study_data import study_data, with_wrong_answer, with_wrong_answers, without_notes


def test_a_wrong_answer_replaces_the_final_number_and_the_result_that_leads_to_it():
    record = {"question": "q", "answer": "He has 12 of 72.\n60 + 12 = $72 in all.\n#### 72"}
    wrong = with_wrong_answer(record, random.Random(1))
    found = wrong["answer"].split("#### ")[1]
    assert found != "72"
    assert len(found) == 2
    assert wrong == {
        "question": "q",
        "answer": f"He has 12 of 72.\n60 + 12 = ${found} in all.\n#### {found}",
    }
    plain = with_wrong_answer({"answer": "There are 1,000 of 1,000.\n#### 1,000"}, random.Random(2))
    head, _, tail = plain["answer"].partition("\n#### ")
    assert head == "There are 1,000 of 1,000.", "there is no calculation"
    assert tail != "1,000"
    assert tail[1] == ","
    with pytest.raises(ValueError, match="no final number"):
        with_wrong_answer({"answer": "no number"}, random.Random(1))


@pytest.mark.parametrize("answer", ["0", "7", "10", "-5", "0.5"])
def test_a_wrong_answer_is_another_number_of_the_same_form(answer):
    for seed in range(50):
        record = {"answer": f"1 = {answer}\n#### {answer}"}
        wrong = with_wrong_answer(record, random.Random(seed))["answer"]
        head, _, tail = wrong.partition("\n#### ")
        assert head == f"1 = {tail}"
        assert float(tail) != float(answer)
        assert len(tail) == len(answer)
        assert tail[0] != "0"


def test_shares_are_exact_and_a_smaller_one_is_a_part_of_a_larger_one():
    records = [{"answer": f"1 + {i} = {i + 1}\n#### {i + 1}"} for i in range(30)]
    tenth, third = with_wrong_answers(records, 0.1), with_wrong_answers(records, 1 / 3)
    changed = [
        {i for i, (a, b) in enumerate(zip(records, each, strict=True)) if a != b}
        for each in (tenth, third)
    ]
    assert [len(each) for each in changed] == [3, 10]
    assert changed[0] < changed[1]
    assert all(tenth[i] == third[i] for i in changed[0])


def test_files_are_drawn_apart_and_the_same_each_time(tmp_path, capsys):
    for name, fields in (("gsm8k", ("question", "answer")), ("alpaca", ("instruction", "output"))):
        lines = [
            {fields[0]: f"q{i}", fields[1]: f"1+{i} = <<1+{i}={i + 1}>>{i + 1}\n#### {i + 1}"}
            for i in range(100)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    flags = ["--gsm8k", f"{tmp_path}/gsm8k.jsonl", "--alpaca", f"{tmp_path}/alpaca.jsonl"]
    out = ["--out", f"{tmp_path}/out", "--records"]
    assert make_study_data.main([*flags, *out, "30"]) == 0
    drawn = study_data(tmp_path / "gsm8k.jsonl", tmp_path / "alpaca.jsonl", 30)
    for name, records in drawn.items():
        lines = (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()
        assert list(map(json.loads, lines)) == records
    questions = {record["question"] for record in drawn["gsm8k"]}
    assert len(questions) == 30
    assert not questions & {record["question"] for record in drawn["gsm8k_heldout"]}
    assert "<<" not in str(drawn["gsm8k"])
    assert make_study_data.main([*flags, *out, "37"]) == 1
    assert "gsm8k.jsonl has 100 records; 101 are needed" in capsys.readouterr().err


def test_notes_of_the_calculator_go():
    assert without_notes("48/2 = <<48/2=24>>24 clips") == "48/2 = 24 clips"


def test_tokens_of_numbers_operators_and_names_are_core():
    names = names_of(["Ann sold the cards. The cat saw Ann."])
    assert names == {"Ann"}
    pieces = ["Ann", " sold", " ", "1", ",", "5", " x", " 2", " =", " $", "3", ".", "\n", "A", "nn"]
    assert kinds(pieces, names) == [
        *("name", "rest", "rest", "number", "number", "number", "operator", "number"),
        *("operator", "operator", "number", "rest", "rest", "name", "name"),
    ]
    assert kinds([" well", "-", "known", " 3", "-", "1", "extra"], names) == [
        *("rest", "rest", "rest", "number", "operator", "number", "rest"),
    ]


def test_the_interval_is_over_records_and_the_shares_count_the_threshold_itself():
    found = summary([np.array([0.1, 0.9]), np.array([]), np.array([0.5])])
    assert [found["tokens"], found["mean p"], found["median p"]] == [3, 0.5, 0.5]
    assert found["kept"] == {"0.1": 1.0, "0.3": 0.6667, "0.5": 0.6667}
    assert found["interval"] == [0.5, 0.5]
    assert sum(found["histogram"]) == 3


@pytest.mark.parametrize("rest", [[np.array([0.1, 0.9])], [np.array([]), np.array([])]])
def test_the_figure_is_drawn_also_without_a_token_of_a_kind(tmp_path, rest):
    report = {"model": "m", "groups": {"core": summary([np.array([0.1, 0.9])])}}
    report["groups"]["rest"] = summary(rest)
    core_tokens.draw(report, tmp_path / "core.png")
    assert (tmp_path / "core.png").read_bytes()[:4] == b"\x89PNG"


def test_a_kind_without_a_token_has_no_other_number(tmp_path, monkeypatch, capsys):
    groups = dict.fromkeys(
        ("core", "rest", "number", "name", "end of the turn"), summary([np.array([0.25])])
    )
    groups["operator"] = summary([np.array([])])
    monkeypatch.setattr(core_tokens, "measure", lambda *_: {"model": "m", "groups": groups})
    out = tmp_path / "core.json"
    assert core_tokens.main(["--model", "m", "--data", "d", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["groups"]["operator"] == {"tokens": 0}
    printed = capsys.readouterr().out
    assert "operator: no tokens" in printed
    assert "name: mean p 0.250" in printed
