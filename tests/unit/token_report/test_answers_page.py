"""The page of answers in a real browser: two models next to each other, filtered by who is right."""

import json
import re
from types import SimpleNamespace

import pytest

from megatron_profit.evaluation.presentation.page import answers_page
from megatron_profit.evaluation.questions import Question
from megatron_profit.evaluation.records import Sample

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028\ud800"


def sample(number, right, text, *, stopped=True):
    return Sample(number, text, len(text), stopped, right, True, str(right))


@pytest.fixture
def answers():
    """Four questions: only base right, only tuned right, both, none; and a task with two samples."""
    outcomes = {"base": (1, 0, 1, 0), "tuned": (0, 1, 1, 0)}
    sums = [Question(i, ({"role": "user", "content": f"sum {i}"},), str(i), {}) for i in range(4)]
    essays = [Question(7, ({"role": "user", "content": HOSTILE},), "", {})]
    tasks = [
        SimpleNamespace(name="sums", questions=sums),
        SimpleNamespace(name="essays", questions=essays),
    ]
    found = {
        model: {
            "sums": {i: {0: sample(0, bool(r), f"{model} says {i}")} for i, r in enumerate(right)},
            "essays": {
                7: {0: sample(0, True, HOSTILE), 1: sample(1, model == "tuned", "b", stopped=False)}
            },
        }
        for model, right in outcomes.items()
    }
    return tasks, found


def test_page_holds_the_answers_and_loads_from_nowhere(answers):
    text = answers_page(*answers, subtitle="greedy")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["models"] == ["base", "tuned"]
    assert data["tasks"]["sums"][1]["answers"]["tuned"] == [[1, 1, "True", 12, "tuned says 1"]]
    assert data["tasks"]["essays"][0]["question"] == HOSTILE.replace("\ud800", "?")
    outside = text.replace(re.search(r'id="data">.*?</script>', text, re.DOTALL)[0], "")
    assert not re.search(r"(src|href)=|url\(|https?://", outside.replace('href="#questions"', ""))
    with pytest.raises(ValueError, match="compares two models"):
        answers_page(answers[0], {"base": answers[1]["base"]})


def test_filters_show_where_the_models_differ(answers, browse):
    result = browse(
        answers_page(*answers, subtitle="greedy"),
        """
        const texts = () => [...document.querySelectorAll("#questions h2")].map(n => n.textContent);
        const counts = () => [...document.querySelectorAll("#counts td")].map(n => +n.textContent);
        result.all = texts();
        result.counts = counts();
        for (const value of ["a", "b", "both", "none"]) { set("filter", value); result[value] = texts(); }
        set("filter", "a");
        result.sides = [...document.querySelectorAll(".sides section")].map(n => n.textContent);
        result.status = $("status").textContent;
        set("filter", "all");
        set("search", "TUNED SAYS 2");
        result.found = texts();
        result.marked = document.querySelector("mark").textContent;
        set("search", "${k} (2");
        result.literal = marked("İİ 1 ${K} (2", "${k} (2").querySelector("mark").textContent;
        set("search", "");
        set("task", "essays");
        result.essays = document.querySelector("article .question").textContent;
        result.images = document.images.length;
        result.outcome = outcome(data.tasks.essays[0]);
        result.facts = [...document.querySelectorAll(".answer .quiet")].map(n => n.textContent);
        set("a", "tuned");
        set("b", "base");
        result.swapped = outcome(data.tasks.essays[0]);
        """,
    )
    names = [f"Question {i}" for i in range(4)]
    assert result["all"] == names
    assert result["counts"] == [1, 1, 1, 1]
    assert [result[key] for key in ("a", "b", "both", "none")] == [[name] for name in names]
    assert result["sides"][0].startswith("A: base✓ right answer True, 11 tokens")
    assert result["sides"][1].startswith("B: tuned✗ wrong answer False")
    assert result["status"] == "1 of 1 questions shown, 4 in the task"
    assert (result["found"], result["marked"]) == (["Question 2"], "tuned says 2")
    assert result["literal"] == "${K} (2"
    assert result["essays"] == HOSTILE.replace("\ud800", "?")
    assert result["images"] == 0
    assert (result["outcome"], result["swapped"]) == ("b", "a")
    assert result["facts"][1].endswith("cut at the length limit")
