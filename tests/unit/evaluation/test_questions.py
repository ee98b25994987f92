"""Tasks: their files, columns and prompts; IFEval's rules without a network."""

import json

import pytest

from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.evaluation.questions import load_task, task_names, task_of_file
from megatron_profit.evaluation.tasks.sentences import INSTALLED, OWN, sentence_splitter

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
RECORDS = {
    "gsm8k": ({"question": "1 + 1?", "answer": "It is 2.\n#### 2"}, "1 + 1?" + BOXED, "2"),
    "math500": (
        {"problem": "1 + 1?", "answer": "\\frac{4}{2}", "level": 1},
        "1 + 1?" + BOXED,
        "\\frac{4}{2}",
    ),
    "aime24": ({"problem": "1 + 1?", "answer": "025"}, "1 + 1?" + BOXED, "025"),
    "aime25": ({"problem": "1 + 1?", "answer": 25}, "1 + 1?" + BOXED, "25"),
    "amc23": ({"question": "1 + 1?", "answer": 25.0}, "1 + 1?" + BOXED, "25"),
    "svamp": (
        {"Body": "He has 1 pen", "Question": "How many?", "Answer": 1.0, "Type": "x"},
        "He has 1 pen. How many?",
        "1",
    ),
    "mawps": ({"input": "1 + 1 ?", "target": 2.0, "type": "addsub"}, "1 + 1 ?", "2"),
    "gpqa_diamond": (
        {
            "Question": "Which?",
            "Correct Answer": "this",
            **{f"Incorrect Answer {i}": f"not {i}" for i in (1, 2, 3)},
        },
        None,
        None,
    ),
    "ifeval": (
        {
            "key": 1,
            "prompt": "Write no comma.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
        },
        "Write no comma.",
        "Yes",
    ),
}
FILES = {"gsm8k": "gsm8k_test"}


def write(tmp_path, name, *records):
    file = tmp_path / f"{FILES.get(name, name)}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_every_task_has_a_case_here():
    assert task_names() == sorted(RECORDS)


@pytest.mark.parametrize("name", [name for name in RECORDS if RECORDS[name][1]])
def test_the_question_is_asked_in_one_message_and_its_answer_is_right(name, tmp_path):
    record, prompt, answer = RECORDS[name]
    write(tmp_path, name, record)
    (question,) = (task := load_task(name, [tmp_path])).questions
    assert question.messages == ({"role": "user", "content": prompt},)
    assert task.grade(question, f"So it is \\boxed{{{answer}}}")["right"]
    assert not task.grade(question, "So it is \\boxed{77}, you see")["right"]
    assert question.reference in ("", answer, "25.0")
    del record[next(iter(record))]
    write(tmp_path, name, record)
    with pytest.raises(EvaluationError, match=r"line 1: has no '.*'; the record has"):
        load_task(name, [tmp_path])


def test_choices_are_in_an_order_that_follows_from_the_question(tmp_path):
    record = RECORDS["gpqa_diamond"][0]
    records = [record | {"Question": f"Which {i}?"} for i in range(20)]
    write(tmp_path, "gpqa_diamond", *records)
    task = load_task("gpqa_diamond", [tmp_path])
    letters = []
    for question in task.questions:
        prompt = question.messages[0]["content"]
        letter = question.reference
        assert f"\n{letter}) this" in prompt
        assert prompt.count("\nA) ") == prompt.count("\nD) ") == 1
        assert task.grade(question, f"Hm.\nANSWER: {letter}")["right"]
        letters.append(letter)
    assert set(letters) == set("ABCD")
    again = load_task("gpqa_diamond", [tmp_path])
    assert [q.reference for q in again.questions] == letters


def test_a_limit_chooses_the_same_questions_each_time(tmp_path):
    write(tmp_path, "mawps", *({"input": f"{i} + 0 ?", "target": i} for i in range(100)))
    numbers = [q.number for q in load_task("mawps", [tmp_path], 10).questions]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 10
    assert numbers[-1] > 50
    assert [q.number for q in load_task("mawps", [tmp_path], 10).questions] == numbers
    assert len(load_task("mawps", [tmp_path], 1000).questions) == 100
    assert load_task("mawps", [tmp_path]).digest != load_task("mawps", [tmp_path], 10).digest


@pytest.mark.parametrize("answer", ["[-2,7]", "[1, 2]", "(0,1]", "[x]", "['a']", "[", "12", "0.50"])
def test_a_reference_is_the_text_of_the_file(tmp_path, answer):
    """lm-eval reads one that looks like a list of Python as a list."""
    file = tmp_path / "exam.jsonl"
    file.write_text(json.dumps({"question": "?", "answer": answer}) + "\n")
    (question,) = task_of_file(file, {}).questions
    assert question.reference == answer


def test_own_tasks_grade_numbers_expressions_and_patterns(tmp_path):
    file = tmp_path / "exam.v2.jsonl"
    rows = [("1,000", "999 + 1"), ("so 2.\n#### 2", "1 + 1"), ("\\boxed{x^2}", "x x"), (3, "1 + 2")]
    file.write_text("".join(json.dumps({"A": a, "Q": q}) + "\n" for a, q in rows))
    task = task_of_file(file, {"question": "Q", "answer": "A"})
    assert task.name == "exam"
    grades = [
        task.grade(question, text)["right"]
        for question, text in zip(
            task.questions, ("It is 1000.", "2", "\\boxed{x \\cdot x}", "4"), strict=True
        )
    ]
    assert grades == [True, True, True, False]
    file.write_text(json.dumps({"question": "2 + 2?", "answer": "That is Four."}) + "\n")
    task = task_of_file(file, {}, pattern="one|two|four")
    assert task.questions[0].reference == "four"
    assert task.grade(task.questions[0], "Not two but FOUR") == {
        "right": True,
        "parsed": True,
        "extracted": "four",
    }
    file.write_text(json.dumps({"question": "2 + 2?", "answer": "It is 4, say I."}) + "\n")
    task = task_of_file(file, {}, pattern="[0-9.]*")
    assert task.questions[0].reference == "4"
    graded = [
        task.grade(task.questions[0], text) for text in ("It is 4 I say.", "5 say I", "None.")
    ]
    assert [grade["right"] for grade in graded] == [True, False, False]
    assert [grade["parsed"] for grade in graded] == [True, True, False]
    with pytest.raises(EvaluationError, match="record 1: --answer-pattern 'nine' matches no part"):
        task_of_file(file, {}, pattern="nine")
    with pytest.raises(EvaluationError, match="is no regular expression"):
        task_of_file(file, {}, pattern="(")


def test_sentences_are_counted_without_a_network():
    assert sentence_splitter() in (INSTALLED, OWN)
    from lm_eval.tasks.ifeval.instructions_util import count_sentences

    text = "Dr. Smith paid $3.50, e.g. for tea. Was it good? Yes! He left at 5 p.m. and slept."
    assert count_sentences(text) == 4
    assert count_sentences("One sentence") == 1


def test_a_model_that_repeats_brackets_writes_no_json(tmp_path):
    names = ["detectable_format:json_format"]
    record = {"key": 1, "prompt": "JSON.", "instruction_id_list": names, "kwargs": [{}]}
    write(tmp_path, "ifeval", record)
    (question,) = (task := load_task("ifeval", [tmp_path])).questions
    assert task.grade(question, '{"a": [1]}')["right"]
    assert not task.grade(question, '{"a":' * 3000)["right"]


def test_an_answer_in_no_language_is_not_logged(tmp_path, caplog):
    record = {
        "key": 1,
        "prompt": "In Hindi.",
        "instruction_id_list": ["language:response_language"],
        "kwargs": [{"language": "hi"}],
    }
    write(tmp_path, "ifeval", record)
    (question,) = (task := load_task("ifeval", [tmp_path])).questions
    task.grade(question, "123 \x1b 456")
    assert caplog.text == ""


def test_instructions_that_count_sentences_and_capitals_are_judged(tmp_path):
    instructions = [
        ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 3}),
        (
            "change_case:capital_word_frequency",
            {"capital_relation": "less than", "capital_frequency": 2},
        ),
    ]
    record = {
        "key": 1,
        "prompt": "Three sentences.",
        "instruction_id_list": [name for name, _ in instructions],
        "kwargs": [kwargs for _, kwargs in instructions],
    }
    write(tmp_path, "ifeval", record)
    (question,) = (task := load_task("ifeval", [tmp_path])).questions
    followed = task.grade(question, "It is. It was. It will be.")
    assert followed["inst_level_strict_acc"] == [True, True]
    assert followed["right"]
    followed = task.grade(question, "IT IS so.")
    assert followed["inst_level_strict_acc"] == [False, False]
    assert followed["prompt_level_loose_acc"] is False
    thinking = task.grade(question, "<think>HM HM HM</think>It is. It was. It will be.")
    assert thinking["right"]


def test_real_files_are_read_where_they_are(shared_folder):
    counts = {
        "ifeval": 541,
        "math500": 500,
        "aime24": 30,
        "svamp": 1000,
        "mawps": 2065,
        "gsm8k": 1319,
    }
    folders = [shared_folder / "data" / "eval", shared_folder / "data"]
    if not folders[0].is_dir():
        pytest.skip(f"{folders[0]} does not exist")
    for name, count in counts.items():
        task = load_task(name, folders, 20)
        assert len(task.inner.test_docs()) == count
        for question in task.questions:
            if question.reference:
                assert task.grade(question, f"\\boxed{{{question.reference}}}")["right"], question
