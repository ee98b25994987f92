"""Graders against answers whose grade a person would give."""

import signal
import time
from contextlib import suppress

import math_verify
import pytest

from megatron_profit.evaluation import graders
from megatron_profit.evaluation.graders import (
    answer_part,
    find_letter,
    find_number,
    find_pattern,
    grade_expression,
    grade_letter,
    grade_number,
    last_boxed,
)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        (r"It is \boxed{0.5}.", "1/2"),
        (r"It is \boxed{1/2}.", "0.5"),
        (r"It is \boxed{\frac{1}{2}}.", "0.5"),
        (r"It is \boxed{\dfrac12}.", r"\frac{1}{2}"),
        (r"\boxed{1,000}", "1000"),
        ("She has 1,000 apples.", "1000"),
        ("#### 1,234", "1234"),
        (r"\boxed{5 \text{ apples}}", "5"),
        (r"\boxed{5\text{ km}}", "5"),
        (r"\boxed{\text{1,000 apples}}", "1000"),
        (r"\boxed{\textbf{\$5}}", "5"),
        (r"\boxed{\$18}", "18"),
        ("So she makes $18.", "18"),
        ("She makes $18.00 every day.", "18"),
        (r"First \boxed{3}, no: \boxed{4}", "4"),
        ("<think>It could be 3 or 5.</think>The answer is 4.", "4"),
        ("so 3 of them.</think> The answer is 4", "4"),
        ("The answer is 7, since 3 + 4 makes 7 and not 8.", "7"),
        ("The answer is: **12** apples, from 3 and 9", "12"),
        ("the temperature is -3", "-3"),
        ("It is 43.0", "43"),
        ("In total 12.", "12"),
        (r"\boxed{x = 3}", "3"),
        (r"\boxed{025}", "25"),
        ("#### 70%", "70"),
        ("The answer is 48 + 24 = 72 clips.", "72"),
        ("Answer: $5 + $7 = $12.", "12"),
        ("Answer: 5 apples + 3 apples = 8 apples", "8"),
        ("The answer is 4 rows x 6 seats each = 24 seats.", "24"),
        ("The answer is x = 5, as y = 3.", "5"),
        ("#### Step 1\n8 of them.\n#### Step 2: Subtract\n8 - 3\n\nSo Tom has **5** apples.", "5"),
        ("#### 1. Add\n2 + 3 makes 5.\n#### **2. Subtract**\nThis leaves 4.", "4"),
        ("#### Tom has 5 apples", "5"),
        ("It is \N{MINUS SIGN}3 degrees.", "-3"),
        ("It takes 10-12 minutes", "12"),
        ("So:\n- 12 apples", "12"),
        ("It costs \N{EURO SIGN}18.", "18"),
        ("-$3", "-3"),
        ("It takes 2 1/2 hours.", "2.5"),
        ("It takes 2½ hours.", "5/2"),
        (r"It takes $2\frac{1}{2}$ hours.", "2.5"),
        (r"\boxed{2\frac{1}{2}}", "2.5"),
        ("It is 3 x 10^5 m.", "300000"),
        (r"It is $3 \times 10^{-2}$.", "0.03"),
        ("It is 1.5e3", "1500"),
        (r"It is 1{,}000 m", "1000"),
        (r"It is $1\,000$", "1000"),
        ("\N{FULLWIDTH DIGIT ONE}\N{FULLWIDTH DIGIT TWO}", "12"),
        (r"\boxed{18.}", "18"),
        (r"\boxed{18 pears}", "18"),
        (r"\boxed{10 cm^2}", "10"),
        (r"\boxed{5cm}", "5"),
        ("\\boxed{\N{EURO SIGN}18}", "18"),
        (r"\boxed{1.5e3}", "1500"),
        (r"\boxed{2 1/2}", "2 1/2"),
        (r"\boxed{2.5}", "2 1/2"),
        (r"\boxed{50\%}", "0.5"),
        ("One may think the answer is 5. No.\n\n**Final Answer:**\n42", "42"),
        ("**Answer:**\n\n42 apples, since 12 of 54 are gone.", "42"),
        ("The **answer** is **42**, of 54", "42"),
        ("__Answer__: 42, of 54", "42"),
        ("The answer is 5? No.\n### Final Answer\n\n42, of 54", "42"),
        ("**Answer**\n42, of 54", "42"),
        ("Answer:\n$$\n42\n$$\nThere were 54.", "42"),
        ("Answer:\n\\[\n42\n\\]\nThere were 54.", "42"),
        ("Answer:\n- 42 apples of 54", "42"),
        (r"The answer is \frac34, of 5", "0.75"),
        (r"The answer is -\dfrac{3}4, of 5", "-0.75"),
        (r"It is 2\frac 12", "2.5"),
        ("Answer: 2^3 = 8", "8"),
        ("Answer: $2^{3} + 1 = 9$", "9"),
        (r"Answer: \(2 \times 3 = 6\), of 7", "6"),
        ("It costs 1'234.50 francs.", "1234.5"),
        ("It costs 1\N{NARROW NO-BREAK SPACE}234\N{THIN SPACE}567 euros.", "1234567"),
        ("It costs Rs.500", "500"),
        ("\\boxed{18\N{EURO SIGN}}", "18"),
        ("\\boxed{18 \N{EURO SIGN}}", "18"),
        ("\\boxed{90\N{DEGREE SIGN}}", "90"),
        (r"\boxed{-5\%}", "-5"),
        ("It changed by -5%.", "-0.05"),
    ],
)
def test_right_numbers_in_another_form_are_right(text, reference):
    assert grade_number(text, reference).right, grade_number(text, reference)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        (r"\boxed{0.51}", "1/2"),
        (r"First \boxed{4}, no: \boxed{3}", "4"),
        ("<think>It is 4.</think>The answer is 5.", "4"),
        ("The answer is 10,000", "1000"),
        (r"\boxed{-3}", "3"),
        ("12 apples and 3 pears", "12"),
        (r"\boxed{4}\boxed{", "5"),
        ("It is \N{MINUS SIGN}3 degrees.", "3"),
        ("It takes 2 1/2 hours.", "10.5"),
        (r"\boxed{1, 2, 3, 18}", "18"),
        (r"\boxed{18 or 20}", "18"),
        (r"\boxed{12 apples and 18 pears}", "18"),
        (r"\boxed{2x}", "2"),
        (r"\boxed{" + "1 " * 2000 + "18}", "18"),
    ],
)
def test_other_numbers_are_wrong(text, reference):
    grade = grade_number(text, reference)
    assert not grade.right
    assert grade.extracted is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I do not know.",
        "<think>It is 4, or 5",
        r"\boxed{}",
        "<think>4</think>",
        "no digits here",
    ],
)
def test_an_answer_without_a_number_has_none(text):
    grade = grade_number(text, "4")
    assert grade.extracted is None
    assert not grade.right


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"(3, \pi/2)"),
        (r"\boxed{\frac{\sqrt{2}}{2}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{x^2+2x+1}", "(x+1)^2"),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
        (r"\boxed{evelyn}", r"\text{Evelyn}"),
        (r"\boxed{90^\circ}", "90"),
        (r"\boxed{[0,1)}", "[0,1)"),
        (r"\boxed{10\%}", r"10\%"),
        (r"\boxed{p - q}", "p - q"),
        (r"Hence $x = \frac{3}{4}$.", "3/4"),
        (r"\boxed{1{,}000}", "1000"),
        (r"\boxed{2 1/2}", "2.5"),
        ("\\boxed{90\N{DEGREE SIGN}}", r"90^\circ"),
        (r"\boxed{\text{C}}", r"\text{(C)}"),
        (r"\boxed{C}", r"\text{(C)}"),
        ("The answer is (3, 4).", "(3,4)"),
        ("**Answer:** [1, 2]", "[1,2]"),
        ("The answer is 1/2.", r"\frac{1}{2}"),
        (r"The answer is $\frac{1}{2}$, or half of it.", r"\frac{1}{2}"),
        ("The answer is x + 1.", "x+1"),
        ("The answer is **Paris**.", "Paris"),
        ("The answer is Paris, the capital of France.", "Paris"),
        ("**New York City**", r"\text{New York City}"),
        ("#### no", "No"),
        ("#### Paris", "Paris"),
        (r"\boxed{Yes.}", "Yes"),
        ("No.", "No"),
        ("The answer is No, because it is odd.", "No"),
        ("The answer is 3 in.", "3"),
        ("#### 9 in^2", "9"),
        ("The answer is 12 ft/s", "12"),
        ("The answer is 7, so it is odd", "7"),
        ("The answer is 5 or so", "5"),
        ("The answer is 4 or 5", "4, 5"),
        ("The answer is (B) 5 km.", "B"),
        (r"\boxed{B) 5 km}", "B"),
        (r"\boxed{A. Paris}", "A"),
        (r"The answer is $\text{(C)}$.", r"\text{(C)}"),
        (
            "Answer: Z\N{LATIN SMALL LETTER U WITH DIAERESIS}rich",
            "Z\N{LATIN SMALL LETTER U WITH DIAERESIS}rich",
        ),
    ],
)
def test_right_expressions_are_right(text, reference):
    assert grade_expression(text, reference).right, grade_expression(text, reference)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        (r"\boxed{(0,1)}", "[0,1]"),
        (r"\boxed{q - p}", "p - q"),
        (r"\boxed{\text{Ann}}", r"\text{Evelyn}"),
        (r"\boxed{B}", "C"),
        (r"\boxed{\text{(B)}}", r"\text{(C)}"),
        (r"\boxed{2n}", "2k"),
        (r"\boxed{2 1/2}", "21/2"),
        ("The answer is Berlin.", "Paris"),
        ("No, it is not.", "Yes"),
        ("The answer is Nora.", "No"),
        ("The answer is 4 or 5", "4"),
        (r"The answer is Paris, or \boxed{5}.", "Paris"),
        ("The answer is (B), not (C).", "C"),
    ],
)
def test_other_expressions_are_wrong(text, reference):
    assert not grade_expression(text, reference).right


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("ANSWER: C", "C"),
        ("Thus the answer is (B).", "B"),
        (r"\boxed{D}", "D"),
        (r"\boxed{\text{A}}", "A"),
        ("**Answer:** **B**", "B"),
        ("A is wrong, so\nC", "C"),
        ("Answer: A\nWait.\nAnswer: D", "D"),
        ("A molecule is small.", None),
        ("Answer: I think B", "B"),
        ("**Answer:**\n\nC) Paris is the capital", "C"),
        ("## Answer\n\n(B), since A is too small", "B"),
        ("**Answer**: **D**, not A", "D"),
        ("<think>ANSWER: A", None),
        (r"\boxed{\textbf{(C) } 5}", "C"),
        (r"\boxed{Option B}", "B"),
        (r"\boxed{\bf C}", "C"),
        (r"It is \boxed{25\,^\circ \mathrm{C}}.\nANSWER: B", "B"),
        (r"It is \boxed{C_6H_6}.\nANSWER: D", "D"),
        ("The answer is 25 \N{DEGREE SIGN}C, so D", "D"),
        ("The answer is C2H4 (choice B)", "B"),
    ],
)
def test_letters_of_choices(text, letter):
    assert find_letter(text) == letter
    assert grade_letter(text, letter or "A").right == (letter is not None)


def test_boxes_may_hold_braces_and_be_cut_off():
    assert last_boxed(r"\boxed{\frac{1}{2}} then \boxed{\frac{3}") == r"\frac{1}{2}"
    assert last_boxed("none") is None


def test_braces_without_a_partner_end_no_box():
    assert last_boxed(r"} \boxed{1}} { \boxed{\boxed{3}}") == "3"
    assert last_boxed(r"\boxed{5} \boxed{}") == "5"


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 20_000,
        r"\boxed{a" + "*" * 50_000 + "b}",
        "answer is " * 10_000,
        "answer " + "* " * 50_000,
        "#" * 100_000,
        r"answer is \xx" + r"\xx" * 20_000,
        "1/" * 20_000,
    ],
)
def test_a_model_that_repeats_itself_is_graded(text):
    assert not grade_number(text, "7").right
    assert not grade_letter(text, "A").right
    assert not grade_expression(text, "Paris").right


@pytest.mark.parametrize(
    "text",
    [r"\boxed{9^{9^{9^9}}}", pytest.param(r"\boxed{100000000!}", marks=pytest.mark.slow)],
)
def test_a_tower_of_powers_is_a_wrong_answer(text):
    assert not grade_expression(text, "9").right
    assert grade_expression(text, last_boxed(text)).right


def test_thoughts_are_no_answer():
    assert answer_part("<think>a</think>b<think>c</think>d") == "d"
    assert answer_part("a") == "a"
    assert answer_part("<think>a</think>b<think>c") == "b"
    assert find_number("<think>1</think>2") == "2"


def test_a_comparison_is_limited_by_its_computing_and_not_by_the_clock(monkeypatch):
    monkeypatch.setattr(graders, "_MOST_SECONDS", 0.2)

    def slow(*_, **__):
        time.sleep(1.0)  # other programs have the machine
        return True

    def endless(*_, **__):
        while True:
            with suppress(Exception):  # as math-verify does
                sum(range(10_000))

    monkeypatch.setattr(math_verify, "verify", slow)
    assert grade_expression(r"\boxed{x + 1}", "1 + x").right
    monkeypatch.setattr(math_verify, "verify", endless)
    assert not grade_expression(r"\boxed{x + 1}", "1 + x").right
    monkeypatch.setattr(math_verify, "parse", endless)
    assert grade_expression("x + 1", "1 + x").extracted is None
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_the_time_limit_of_this_package_is_no_warning(monkeypatch, caplog):
    for module in (math_verify.parser, math_verify.grader):
        monkeypatch.setattr(module, "TIMEOUT_WARNING_SHOWN", False)
    assert grade_expression(r"\boxed{x + 1}", "1 + x").right
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        ("-?[0-9][0-9,.]*", "So it is 1,234.", "1234"),
        ("[0-9]*", "it is 7, I think", "7"),
        ("x|", "no match", None),
        ("[,.]+", "a, b.", None),
        (r"answer: \(([a-d])\)|none", "Answer: (B), none else", "b"),
        (r"answer: \(([a-d])\)|none", "none", None),
        (r"answer: ([a-d]?)", "answer: a. answer: ?", "a"),
        ("(a)(b)?", "A", "a"),
    ],
)
def test_a_match_without_an_answer_in_it_does_not_count(pattern, text, found):
    assert find_pattern(text, pattern) == found
