r"""Find the final answer in a text, and compare it with the reference.

An answer is looked for after the model's thoughts (`</think>`): in the last `\boxed{…}`, after the last
"####" or "answer is", and else, for tasks with numbers, in the last number. math-verify decides
whether two answers are equal: 1/2, 0.5 and \frac{1}{2} are, and so are 1,000 and 1000.
"""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# math-verify warns that it has no time limit; it has the one of this file.
logging.getLogger("math_verify").setLevel(logging.ERROR)

THINK, _END_OF_THINK = "<think>", "</think>"
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"[{}]")
# A dash is a sign unless it subtracts (5 - 3), spans (10-12), or begins an item of a list.
_SIGN = r"(?:(?<![\d)}])(?<![\d)}]\s)-|(?<==\s)-\s)?"
_CURRENCY = r"\\?[$€£¥₹]\s?"
# Thousands may be separated: 1,000, and in other countries 1'000 or a space that breaks no line.
_GROUP = (
    "(?:,|\\{,\\}|\\\\,|['\N{RIGHT SINGLE QUOTATION MARK}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}])"
)
_DIGITS = rf"(?:(?:\d{{1,3}}(?:{_GROUP}\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|(?<![A-Za-z])\.\d+)"
# TeX needs no braces around one digit: \frac34.
_FRACTION = r"\\[cdt]?frac\s?(?:\{-?\d+\}|\d)\s?(?:\{\d+\}|\d)"
# An integer and a fraction: 2 1/2.
_MIXED = rf"\d+(?:\s\d+\s?/\s?\d+|\s?{_FRACTION})"
_POWER_OF_TEN = r"(?:[eE]|\s?(?:\\times|\\cdot|[*x])\s?10\s?\^\s?\{?)([+-]?\d+)\}?"
_NUMBER = re.compile(
    rf"{_SIGN}(?:{_CURRENCY}-?)?"
    rf"(?:{_MIXED}|{_FRACTION}|{_DIGITS}(?:\s?/\s?\d+|{_POWER_OF_TEN})?)(?:\s?\\?%)?"
)
_WITH_UNIT = re.compile(
    rf"({_NUMBER.pattern})\.?(?:(?:\s[A-Za-z]|[A-Za-z]{{2}})[A-Za-z\s./]*(?:\^\{{?[23]\}}?|[²³])?|\s?[€£¥₹])?"
)
# A text in a box, which may hold a number with its unit.
_IN_TEXT = re.compile(r"\\(?:text[a-z]*|mathrm|mathbf)\s*\{([^{}]*)\}")
# Words that an answer follows, or a heading of them. Markdown may stand around the words. Four hashes may
# also be a heading of Markdown: "#### Step 2" or "#### 2. Subtract" above more text states no answer.
_STATED = re.compile(
    r"^[ \t]*[#*_]+[ \t]*(?:(?:the|my|final)[ \t]+)*answer[*_ \t]*$"
    r"|(?:####(?![ \t*_]*(?:[A-Za-z]{2}|\d+[.)][ \t]+[*_]*[A-Za-z])[^\n]*\n\s*\S)|answer[\s*_]*(?:is|:))"
    r"[*_]*\s*:?",
    re.IGNORECASE | re.MULTILINE,
)
# A calculation before its result: "48 + 24 = ", "5 apples + 3 apples = ".
_UNIT = r"(?<=[\d%])\s[A-Za-z]{2,}+(?:\s[A-Za-z]{2,}+)?+(?=\s*[+\-*/÷x=])"
_CALCULATION = re.compile(
    rf"\A(?:(?:{_UNIT}|[\s\d.,$()\[\]{{}}^+\-*/÷x%]|\\(?:[a-z]++|[,;!()\[\]]))*+=)+"
)
# The letter of a choice, not the one of degrees (25 °C) or of a formula (C2H4).
_LETTER = re.compile(r"(?<![A-Za-z°])\(?\**([A-D])\**\)?(?![A-Za-z\d_])")
# What may stand before it in a box.
_BEFORE_LETTER = re.compile(
    r"\A(?:[^A-Za-z\d\\]|\\(?:text|math|bf)[a-z]*|option|choice|answer|is)*", re.IGNORECASE
)
# Characters that mean the same as others.
_PLAIN = str.maketrans(
    {"\N{MINUS SIGN}": "-", "\N{MULTIPLICATION SIGN}": "*", "\N{NO-BREAK SPACE}": " "}
    | {"¼": " 1/4", "½": " 1/2", "¾": " 3/4", "°": r"^\circ"}
    | {chr(ord("\N{FULLWIDTH DIGIT ZERO}") + digit): str(digit) for digit in range(10)}
)
# An answer that is words, or the letter of a choice, and no formula.
_WORDS = re.compile(
    r"\\(?:text|textbf|mathrm)\s*\{\s*\(?([^\W\d_](?:[^\W\d_]|\s)*)\)?\s*\}"
    r"|\(?([^\W\d_])\)?|((?:[Nn][Oo](?![^\W\d_])|[^\W\d_]{3})(?:[^\W\d_]|\s)*)"
)
# Of a text that is more than a formula: a word, or where a formula begins or ends.
_NO_FORMULA = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3}|\$|\\[()\[\]]")
# A number and words after it, as "9 in^2" or "7, so": math-verify finds the number. In "4 or 5" it does not.
_NUMBER_IN_TEXT = re.compile(rf"{_NUMBER.pattern}\.?,?\s\(?(?!or\s\S*\d)[A-Za-z]{{2}}")
_LONGEST_ANSWER = 1000
# Computing time of one comparison.
_MOST_SECONDS = 5.0
_LONGEST_STATEMENT, _MOST_STATEMENTS = 200, 50


@dataclass(frozen=True)
class Grade:
    """An answer's judgement.

    Attributes:
        right: Whether the answer is right.
        extracted: The final answer that was found; None where there is none that can be parsed.
    """

    right: bool
    extracted: str | None


def answer_part(text: str) -> str:
    """Return the text after the model's thoughts, without further ones that have no end."""
    return text.rpartition(_END_OF_THINK)[2].partition(THINK)[0]


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{…}` that is closed and not empty, None without one.

    For example, `\boxed{1} so \boxed{\frac{1}{2}}` gives `\frac{1}{2}`.
    """
    boxes = {match.end() for match in _BOXED.finditer(text)}
    opened: list[int] = []
    last, found = -1, None
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.end())
            continue
        start = opened.pop() if opened else -1
        content = text[start : brace.start()].strip() if start in boxes and start > last else ""
        if content:
            last, found = start, content
    return found


def find_number(text: str) -> str | None:
    """Return the final number of an answer: boxed, after "####" or "answer is", or the last of all."""
    part = answer_part(text).translate(_PLAIN)
    if boxed := last_boxed(part):
        return _bare(boxed)
    for stated in _statements(part):
        if found := _NUMBER.search(_CALCULATION.sub("", stated)):
            return _plain(found[0])
    numbers = [match[0] for match in _NUMBER.finditer(part)]
    return _plain(numbers[-1]) if numbers else None


def is_number(text: str) -> bool:
    """Return whether a text is one number. For example, "-1,000.50", "$3", "2 1/2" and "7 %" are."""
    return _NUMBER.fullmatch(text.translate(_PLAIN).strip()) is not None


def _statements(text: str) -> list[str]:
    """Return the text after each "####" or "answer is", up to the end of its line, the last one first."""
    # A model that repeats itself may write thousands.
    ends = [match.end() for match in _STATED.finditer(text)][-_MOST_STATEMENTS:]
    return [_first_line(text[end : end + _LONGEST_STATEMENT]) for end in reversed(ends)]


def _first_line(text: str) -> str:
    """Return the first line with a letter or a digit; a line before it may hold marks alone, as "$$"."""
    return next((line for line in text.split("\n") if any(map(str.isalnum, line))), "")


def _bare(text: str) -> str:
    """Return the number of a text that is a number with or without a unit, any other text as it is."""
    plain = text.translate(_PLAIN).strip()
    inner = _IN_TEXT.fullmatch(plain)
    found = _WITH_UNIT.fullmatch(inner[1].strip() if inner else plain)
    return _plain(found[1]) if found else text


def _plain(number: str) -> str:
    """Return a number without currency, and in the form that math-verify reads."""
    number = re.sub(rf"{_CURRENCY}|(?<=\d){_GROUP}(?=\d{{3}})", "", number)
    number = re.sub(_POWER_OF_TEN, r"\\times10^{\1}", number)
    if mixed := re.fullmatch(r"(.*?)(\d+)\s(\d+\s?/\s?\d+)", number):
        return f"{mixed[1]}({mixed[2]}+{mixed[3]})"
    return re.sub(r"-\s", "-", number).strip()


def find_expression(text: str) -> str | None:
    """Return the final expression of an answer: boxed, after "answer is", or as math-verify finds it."""
    part = answer_part(text).translate(_PLAIN)
    if boxed := last_boxed(part):
        return boxed
    for stated in map(_without_marks, _statements(part)):
        is_formula = not (_NO_FORMULA.search(stated) or _NUMBER_IN_TEXT.match(stated))
        if stated and is_formula and stated.count("(") == stated.count(")"):
            return stated
    found = _parsed(part)
    return str(found[-1]) if found else None


def find_words(text: str) -> str | None:
    """Return the words of an answer up to the first mark: boxed, after "answer is", or the last line."""
    part = answer_part(text)
    boxed = last_boxed(part)
    last_line = part.strip().rpartition("\n")[2][: _LONGEST_STATEMENT + 1]
    places = [boxed] if boxed else [*_statements(part), last_line]
    starts = [
        re.split(r"[.,;:]|\)(?!\s*\})|\s\(", place.strip()[:_LONGEST_ANSWER])[0] for place in places
    ]
    found = (_without_marks(start).removeprefix("(") for start in starts)
    return next(filter(_words_of, found), boxed)


def _without_marks(text: str) -> str:
    """Return a text without Markdown and TeX's signs around it, and without the sentence's end."""
    return re.sub(r"^(?:[*_$\s]|\\[(\[])+|(?:[*_$\s.]|\\[)\]])+$", "", text)


def find_letter(text: str) -> str | None:
    """Return the letter of a choice: boxed, after "answer is" or "ANSWER:", or alone on the last line."""
    part = answer_part(text)
    boxed = last_boxed(part) or ""
    if found := _LETTER.match(_BEFORE_LETTER.sub("", boxed, count=1)):
        return found[1]
    last_line = part.strip().rpartition("\n")[2]
    for place in (*_statements(part), last_line if len(last_line) < 8 else ""):
        if found := _LETTER.search(re.sub(r"\\text\s*\{?", " ", place)):
            return found[1]
    return None


def find_pattern(text: str, pattern: str) -> str | None:
    """Return the last match of a regular expression (its group if it has a single one), in lower case.

    For example, the pattern `-?[0-9][0-9,.]*` finds "1234" in "So it is 1,234.". A match that holds no
    character of an answer does not count, as the ones of `[0-9]*` between letters.
    """
    last = None
    for match in re.finditer(pattern, answer_part(text), re.IGNORECASE):
        found = match.group(1 if match.re.groups == 1 else 0) or ""
        last = found.lower().replace(",", "").rstrip(".") or last
    return last


def equal(extracted: str, reference: str) -> bool:
    """Return whether two answers are equal in mathematics.

    For example, "0.5" and "\\frac{1}{2}" are. Units and a percent sign may stand after a number.
    """
    extracted, reference = extracted.translate(_PLAIN), reference.translate(_PLAIN)
    if is_number(extracted) and is_number(reference):
        extracted, reference = _plain(extracted), _plain(reference)
        if extracted[0] == reference[0] == "-":  # math-verify does not read -5 % as a percentage
            extracted, reference = extracted[1:], reference[1:]
    if _same_text(extracted, reference):
        return True
    if len(extracted) > _LONGEST_ANSWER:
        return False
    words = _words_of(extracted), _words_of(reference)
    if all(words):  # math-verify takes them for products of letters
        return words[0] == words[1]
    from math_verify import verify

    gold = _parsed(f"\\boxed{{{reference}}}")
    found = _parsed(f"\\boxed{{{extracted}}}")
    with _limited():
        return bool(gold and found and verify(gold, found, timeout_seconds=None, strict=True))
    return False


def _words_of(answer: str) -> str | None:
    r"""Return the words of an answer such as `\text{Evelyn}`, "Evelyn", `\text{(C)}` or "C", or None."""
    found = _WORDS.fullmatch(_without_marks(answer))
    return " ".join((found[1] or found[2] or found[3]).casefold().split()) if found else None


def _same_text(first: str, second: str) -> bool:
    return re.sub(r"\s|\\[,;!]|\$", "", first) == re.sub(r"\s|\\[,;!]|\$", "", second)


def _parsed(text: str) -> list[object]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    configs = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    with _limited():
        return parse(text[-2 * _LONGEST_ANSWER :], configs, parsing_timeout=0)
    return []


class _OutOfTime(BaseException):
    """Not an Exception, because math-verify catches every one and goes on."""


@contextmanager
def _limited() -> Iterator[None]:
    """Leave the block after some seconds of computing.

    Unlike math-verify's own limit, it does not depend on other work of the machine. Python delivers
    signals to the main thread only; elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGVTALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, _MOST_SECONDS)
        yield
        # Here as well, so that the limit cannot come after the block.
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except _OutOfTime:
        pass
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def grade_number(text: str, reference: str) -> Grade:
    """Grade a word problem whose answer is a number."""
    return _graded(find_number(text), _bare(reference), equal)


def grade_expression(text: str, reference: str) -> Grade:
    """Grade a problem whose answer is an expression, as in MATH, or words."""
    find = find_words if _words_of(reference) else find_expression
    return _graded(find(text), reference, equal)


def grade_letter(text: str, reference: str) -> Grade:
    """Grade a choice between lettered answers."""
    return _graded(find_letter(text), reference, str.__eq__)


def grade_pattern(text: str, reference: str, pattern: str) -> Grade:
    """Grade an answer that a regular expression finds; `reference` is what it finds in the right answer."""
    return _graded(find_pattern(text, pattern), reference, str.__eq__)


def _graded(found: str | None, reference: str, same: Callable[[str, str], bool]) -> Grade:
    return Grade(found is not None and bool(same(found, reference)), found)
