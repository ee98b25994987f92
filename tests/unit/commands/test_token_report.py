"""The command: a page from a HuggingFace folder and from a Megatron checkpoint, and its errors."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from make_tiny_model import main as make_tiny_model

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf_to_megatron import hf_to_megatron
from megatron_profit.commands import token_report
from megatron_profit.token_report import slider_start


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("token_report")
    data = root / "chats.jsonl"
    exchange = [
        {"role": "user", "content": "One and two?"},
        {"role": "assistant", "content": "Three."},
    ]
    lines = [
        json.dumps({"messages": exchange}),
        json.dumps({"messages": []}),
        json.dumps({"messages": exchange}),
    ]
    data.write_text("\n".join(lines))
    make_tiny_model(["--out", str(root / "hf"), "--data", str(data)])
    hf_to_megatron(root / "hf", root / "megatron")
    return root


def run(folders, *flags):
    flags = ["--data", str(folders / "chats.jsonl"), "--records", "0,2", *map(str, flags)]
    return token_report.main(flags)


def test_both_kinds_of_checkpoint_give_the_same_page(folders, tmp_path, capsys):
    source = ("--model", folders / "hf")
    assert run(folders, *source, "--out", tmp_path / "a.html", "--title", "t", "--terminal") == 0
    assert "supervised tokens kept by profit" in capsys.readouterr().out
    source = ("--megatron", folders / "megatron", "--hf-template", folders / "hf")
    assert run(folders, *source, "--out", tmp_path / "b.html", "--title", "t") == 0
    assert (tmp_path / "a.html").read_text() == (tmp_path / "b.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', (tmp_path / "a.html").read_text())[1])
    assert [record["name"] for record in data["records"]] == [
        "chats.jsonl, line 1",
        "chats.jsonl, line 3",
    ]
    assert "".join(data["records"][0]["pieces"]).count("Three.") == 1


def test_a_checkpoint_that_needs_flags_of_the_conversion(folders, capsys, monkeypatch):
    def refuse(*_, **__):
        raise ConversionError("not the base of the adapters; give --base, or --any-base")

    monkeypatch.setattr(token_report, "megatron_to_hf", refuse)
    source = ("--megatron", folders / "megatron", "--hf-template", folders / "hf")
    assert run(folders, *source, "--terminal") == 1
    assert "flags of `megatron-profit to-hf`: convert with it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "absent/r.html"], "the folder absent does not exist"),
        (["--out", ".", "--overwrite"], "--out . is a folder; name a file in it"),
        (["--terminal", "--records", "7"], "there are only 3 records"),
        (["--terminal", "--records", "1"], "none of the chosen records can be used"),
        (["--terminal", "--records", "a"], "'a' is neither a number nor a range"),
        (["--terminal", "--records", "3-1"], "chooses no record"),
        (["--terminal", "--records", "7-99999999999"], "there are only 3 records"),
        (["--terminal", "--objective", ""], "unknown objective ''"),
        (["--terminal", "--objective", "best"], "unknown objective 'best'"),
        (["--terminal", "--objective", "profit tau"], "'tau' is not of the form option=value"),
        (["--terminal", "--objective", "sft clip=1"], "has no option clip"),
    ],
)
def test_errors_name_the_remedy(folders, capsys, flags, message):
    assert run(folders, "--model", folders / "hf", *flags) == 1
    assert message in capsys.readouterr().err


def test_what_cannot_be_written_to_is_said_first(folders, tmp_path, capsys, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    flags = ["--model", "absent", "--out", tmp_path / "pipe", "--overwrite"]
    assert run(folders, *flags) == 1
    assert "pipe is a pipe or a device; name a file" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert run(folders, "--model", "absent", "--out", tmp_path / "r.html") == 1
    assert f"{tmp_path} cannot be written to; name another folder" in capsys.readouterr().err


def test_a_range_may_reach_beyond_the_last_record(folders, tmp_path):
    out = tmp_path / "r.html"
    assert run(folders, "--model", folders / "hf", "--records", "0-19", "--out", out) == 0
    assert "chats.jsonl, line 3" in out.read_text()


@pytest.mark.slow
def test_a_reader_who_has_seen_enough_is_no_error(folders, tmp_path):
    out = tmp_path / "r.html"
    tool = [
        sys.executable,
        "-m",
        "megatron_profit",
        "report",
        "--model",
        folders / "hf",
        "--out",
        out,
    ]
    tool += ["--data", folders / "chats.jsonl", "--terminal"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(tool, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert out.exists()


def test_an_existing_page_is_kept(folders, tmp_path, capsys):
    out = tmp_path / "r.html"
    out.write_text("mine")
    assert run(folders, "--model", folders / "hf", "--out", out) == 1
    assert "exists; give --overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_a_folder_without_a_model(folders, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    for file in (folders / "hf").glob("tokenizer*"):
        shutil.copy(file, empty)
    shutil.copy(folders / "hf" / "chat_template.jinja", empty)
    assert run(folders, "--model", empty, "--terminal") == 1
    assert "config.json: missing" in capsys.readouterr().err


def test_models_that_do_not_know_the_tokens(folders, tmp_path, capsys):
    other, data = tmp_path / "other", tmp_path / "other.txt"
    data.write_text("threes and trees " * 9)
    make_tiny_model(["--out", str(other), "--data", str(data)])
    flags = ("--model", folders / "hf", "--terminal", "--ref-model", other)
    assert run(folders, *flags) == 1
    assert "name a reference with the model's tokenizer" in capsys.readouterr().err
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    assert run(folders, "--model", other, "--terminal") == 1
    assert "but the model has only 200 (vocab_size" in capsys.readouterr().err
    (other / "tokenizer.json").unlink()
    assert run(folders, *flags) == 1
    assert f"{other}: the tokenizer has" in capsys.readouterr().err


def test_columns_and_the_choice_of_turns_are_those_of_training(folders, tmp_path):
    data = tmp_path / "qa.jsonl"
    data.write_text(json.dumps({"question": "One and two?", "answer": "Three."}) + "\n")
    flags = [
        "--data",
        data,
        "--data-columns",
        "prompt=question",
        "response=answer",
        "--records",
        "0",
    ]
    out = tmp_path / "r.html"
    assert token_report.main(list(map(str, ["--model", folders / "hf", *flags, "--out", out]))) == 0
    assert "qa.jsonl, line 1" in out.read_text()


def test_each_turn_of_a_record_may_be_shown_by_itself(folders, tmp_path):
    data, out = tmp_path / "talk.jsonl", tmp_path / "r.html"
    exchange = json.loads((folders / "chats.jsonl").read_text().splitlines()[0])["messages"]
    data.write_text(json.dumps({"messages": exchange * 2}))
    flags = ["--model", folders / "hf", "--data", data, "--train-on", "each", "--out", out]
    assert token_report.main(list(map(str, flags))) == 0
    found = json.loads(re.search(r'id="data">(.*?)</script>', out.read_text())[1])
    assert [
        (record["name"], "".join(record["pieces"]).count("Three.")) for record in found["records"]
    ] == [
        ("talk.jsonl, line 1, turn 1", 1),
        ("talk.jsonl, line 1, turn 2", 2),
    ]


def test_a_record_in_no_known_format_is_left_out_unless_it_is_the_first(folders, tmp_path, capsys):
    data, out = tmp_path / "chats.jsonl", tmp_path / "r.html"
    chat = (folders / "chats.jsonl").read_text().splitlines()[0]
    flags = ["--model", folders / "hf", "--data", data, "--records", "0-2", "--out", out]
    data.write_text("\n".join([chat, '{"question": "q"}', chat]))
    assert token_report.main(list(map(str, flags))) == 0
    assert f"left out {data}, line 2: the format is not known" in capsys.readouterr().err
    assert "chats.jsonl, line 3" in out.read_text()
    data.write_text("\n".join(['{"question": "q"}', chat]))
    assert token_report.main([*map(str, flags), "--overwrite"]) == 1
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("objectives", "start"),
    [
        (["dft", "profit keep_fraction=0.7 threshold_direction=random"], {}),
        (
            ["dft", "profit prob_threshold=0.3,0.7 threshold_direction=middle"],
            {
                "threshold": (0.3, 0.7),
                "direction": "middle",
                "scope": "constant",
                "signal": "current",
            },
        ),
        (
            [
                "profit threshold_quantile=0.2 threshold_direction=higher threshold_scope=running "
                "objective_signal=reference"
            ],
            {
                "threshold": (0.2,),
                "direction": "higher",
                "scope": "global_batch",
                "signal": "reference",
            },
        ),
        (
            [
                "gce prob_exponent=1 threshold_quantile=0.5 threshold_direction=lower threshold_scope=record"
            ],
            {"threshold": (0.5,), "direction": "lower", "scope": "record", "signal": "current"},
        ),
    ],
)
def test_the_page_begins_with_the_first_threshold(objectives, start):
    parsed = [token_report.parse_objective(text)[1] for text in objectives]
    assert slider_start(parsed) == start
