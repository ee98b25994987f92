"""The quickstart's data: reproducible, correct, and held out for real."""

import json
from pathlib import Path

import make_arithmetic_data
import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def tool():
    return make_arithmetic_data


@pytest.fixture(scope="module")
def shipped():
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (ROOT / "examples" / "data").glob("arithmetic_*.jsonl")
    }


def operands(tool, record):
    """The unordered pair that the question asks for; the only operation is the sum."""
    return tuple(sorted(tool.numbers_in(record["messages"][0]["content"])))


def test_the_shipped_files_are_what_the_script_writes(tool, shipped, capsys):
    assert shipped == tool.generate(seed=0)
    assert tool.main(["--check"]) == 0
    assert capsys.readouterr().err == ""


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tool, tmp_path):
    first = {path.name: path.read_bytes() for path in tool.write_files(tmp_path / "a", seed=3)}
    again = {path.name: path.read_bytes() for path in tool.write_files(tmp_path / "b", seed=3)}
    other = {path.name: path.read_bytes() for path in tool.write_files(tmp_path / "c", seed=4)}
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


def test_check_names_a_file_that_was_changed_or_is_missing(tool, tmp_path, capsys):
    changed, missing, _ = tool.write_files(tmp_path, seed=0)
    changed.write_text(changed.read_text().replace("ninety", "eighty", 1))
    missing.unlink()
    assert tool.main(["--out-dir", str(tmp_path), "--check"]) == 1
    errors = capsys.readouterr().err
    assert changed.name in errors
    assert missing.name in errors
    assert "heldout" not in errors


def test_no_pair_of_numbers_is_in_two_files(tool, shipped):
    pairs = {stem: {operands(tool, record) for record in shipped[stem]} for stem in shipped}
    assert {stem: len(pairs[stem]) for stem in pairs} == {
        stem: split.pairs for stem, split in tool.SPLITS.items()
    }
    union = set().union(*pairs.values())
    assert sum(map(len, pairs.values())) == len(union)
    assert union == set(tool.carry_free_pairs())


def test_every_digit_pair_of_a_heldout_sum_occurs_in_training(tool, shipped):
    def columns(stems):
        pairs = [operands(tool, record) for stem in stems for record in shipped[stem]]
        tens = {frozenset((a // 10, b // 10)) for a, b in pairs}
        units = {frozenset((a % 10, b % 10)) for a, b in pairs}
        return tens, units

    seen, held_out = columns(["arithmetic_base"]), columns(["arithmetic_heldout"])
    assert held_out[0] <= seen[0]
    assert held_out[1] <= seen[1]


@pytest.mark.parametrize("stem", ["arithmetic_base", "arithmetic_chatty", "arithmetic_heldout"])
def test_answers_end_with_the_right_sum(tool, shipped, stem):
    for record in shipped[stem]:
        assert [message["role"] for message in record["messages"]] == ["user", "assistant"]
        a, b = operands(tool, record)
        answer = tool.numbers_in(record["messages"][1]["content"])
        assert answer[-1] == a + b
        assert answer[:-1] in ([], [a, b], [b, a])
        assert a % 10 + b % 10 <= 9
        assert a // 10 + b // 10 <= 9


def test_manners_differ_as_the_split_says(tool, shipped):
    for stem, split in tool.SPLITS.items():
        answers = [record["messages"][1]["content"] for record in shipped[stem]]
        opened = sum(answer.startswith(tool.OPENINGS) for answer in answers) / len(answers)
        closed = sum(answer.endswith(tool.CLOSINGS) for answer in answers) / len(answers)
        assert opened == pytest.approx(split.opening_share, abs=0.15)
        assert closed == pytest.approx(split.closing_share, abs=0.15)


def test_number_words_round_trip_and_refuse_what_they_cannot_write(tool):
    for number in (21, 34, 99):
        assert tool.numbers_in(f"So {tool.number_words(number)}.") == [number]
    assert tool.numbers_in("Forty-two or forty-three") == [42, 43]
    assert tool.numbers_in("no number at all") == []
    for number in (7, 19, 40, 100):
        with pytest.raises(ValueError, match=str(number)):
            tool.number_words(number)


def test_the_files_stay_small():
    files = list((ROOT / "examples" / "data").glob("arithmetic_*.jsonl"))
    assert sum(path.stat().st_size for path in files) < 200_000
