"""The packing benchmark reads what a run logs."""

from __future__ import annotations

import json

import bench_packing
import pytest
from bench_packing import PACKED, STOCK, UNPACKED, Run, Shape, _read, _table

LINE = " iteration {0}/ 4 | elapsed time per iteration (ms): {1} | supervised tokens: {2} |\n"


def log(*steps: tuple[float, float]) -> str:
    return "".join(LINE.format(i, ms, n) for i, (ms, n) in enumerate(steps, 1))


def test_the_rounds_are_read_without_their_warm_up():
    rounds = [log((9e3, 5), (2e3, 30)), log((8e3, 5), (4e3, 50))]
    run = _read(rounds, 2, None)
    assert run == Run((2.0, 4.0), 40.0)
    assert run.tokens_per_second == pytest.approx(40 / 3)


def test_the_tokens_of_single_records_are_those_of_the_file():
    lines = "".join(f"| elapsed time per iteration (ms): {ms} |\n" for ms in (9.0, 2000.0))
    assert _read([lines], 2, tokens_per_step=7) == Run((2.0,), 7)


def test_a_run_that_ended_early_is_no_result():
    with pytest.raises(SystemExit, match="1 of 5 steps"):
        _read([log((5.0, 3))], 5, 7)


def test_everything_is_compared_with_stock_sft():
    runs = {
        name: {"seconds_per_step": 1.0, "tokens_per_step": n, "tokens_per_second": n}
        for name, n in ((STOCK, 10.0), (UNPACKED, 20.0), (PACKED, 85.0))
    }
    table = _table({"a.json": {"tokens of a record": 50.0, "seq_length": 512, "runs": runs}})
    assert "| 8.5x |" in table


def test_the_shape_is_that_of_a_qwen3():
    config = Shape(hidden_size=512, num_layers=8).config()
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (8, 4)


def test_a_run_that_is_cut_off_leaves_a_result(shared_folder, tmp_path, monkeypatch):
    """Everything but the trainings themselves, on the real tokenizer."""
    commands = []

    def run(command):
        commands.append(list(map(str, command)))
        if len(commands) == 6:
            raise KeyboardInterrupt
        return log((9e3, 5), (1e3, 100))

    version = tmp_path / "megatron" / "core" / "package_info.py"
    version.parent.mkdir(parents=True)
    version.write_text("MAJOR = 0\nMINOR = 19\nPATCH = 1\nPRE_RELEASE = ''\n")
    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps({"instruction": "Count.", "output": "one " * 40}) + "\n")
    argv = ["bench_packing.py", "--megatron-lm", tmp_path, "--data", data, "--steps", 1]
    argv += ["--tokenizer", shared_folder / "qwen3-tokenizer", "--out", tmp_path / "out"]
    monkeypatch.setattr("sys.argv", list(map(str, argv)))
    monkeypatch.setattr(bench_packing, "_run", run)
    with pytest.raises(KeyboardInterrupt):
        bench_packing.main()
    (result,) = (json.loads(file.read_text()) for file in (tmp_path / "out").glob("*.json"))
    assert result["environment"]["Megatron-LM"] == "0.19.1"
    found = result["files"]["chats.jsonl"]
    assert (found["rounds"], found["seq_length"], found["records that lost their end"]) == (
        1,
        64,
        0,
    )
    assert found["runs"][PACKED]["tokens_per_second"] == 100
    supervised = found["supervised tokens of a record"]
    assert found["runs"][STOCK]["tokens_per_second"] == supervised > 40
    assert [command[-1] for command in commands] == ["1"] * 3 + ["2"] * 3, "seeds"
