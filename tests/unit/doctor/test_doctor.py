"""The doctor finds planted faults, and says what to do about each."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from make_tiny_model import make_tiny_model
from peft import LoraConfig, get_peft_model

from megatron_profit.data.report import DataReport, Found, SourceCounts
from megatron_profit.doctor import command, data_checks, machine_checks, mathematics
from megatron_profit.doctor.findings import Verdict, examined, fault, ok
from megatron_profit.doctor.mathematics import Result, check_rotary_base, compared
from megatron_profit.estimates.published import published_config
from megatron_profit.launch.run_folder import RunFolder
from megatron_profit.recipe.check import check_command_line
from megatron_profit.recipe.flags import Given
from megatron_profit.recipe.request import read_request

DATA = Path(__file__).resolve().parents[3] / "examples" / "data" / "arithmetic_chatty.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny_model(folder, [DATA])
    return folder


@pytest.fixture
def copy(model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    return tmp_path / "copy"


def of_model(folder: Path):
    checks = (data_checks.check_model, data_checks.check_tokenizer)
    return [f for check in checks for f in examined("check", lambda check=check: check(folder))]


def faults(findings) -> str:
    return "\n".join(f.text for f in findings if f.verdict is Verdict.FAULT)


def test_a_sound_model_has_no_fault(model):
    found = of_model(model)
    assert not faults(found)
    assert {finding.subject for finding in found} == {"model", "weights", "tokenizer", "template"}


def test_a_tokenizer_without_tokenizer_json_is_a_fault(copy):
    (copy / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in faults(of_model(copy))


def with_template(copy: Path, end: str) -> list:
    """Return the findings on a model whose template ends each turn with this text."""
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '" + end + "\\n' }}{% endfor %}"
    )
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    (copy / "chat_template.jinja").write_text(template)
    return of_model(copy)


def test_a_template_without_an_end_of_turn_is_a_fault(copy):
    assert "writes no end of turn" in faults(with_template(copy, ""))


def test_a_template_that_ends_a_turn_with_ordinary_text_is_a_warning(copy):
    found = with_template(copy, " over.")
    assert not faults(found)
    assert [f.verdict for f in found if "no token stops the trained model" in f.text] == [
        Verdict.WARNING
    ]


def test_warnings_about_records_are_no_ok(monkeypatch):
    monkeypatch.setattr(data_checks, "_examples", lambda *_: iter(()))
    rows = SimpleNamespace(rows=1, seq_length=8, efficiency=0.9)
    for count, verdict in ((0, Verdict.OK), (2, Verdict.WARNING)):
        found = {"thoughts left out": Found("turns", count, 4)}
        report = DataReport([SourceCounts("a.jsonl", 3, 3, 3, 30, 10)], found=found)
        built = SimpleNamespace(prepared=SimpleNamespace(report=report), packing=rows)
        data, _ = data_checks.check_data(built, Path())
        assert data.verdict is verdict
        assert ("thoughts left out: 2 of 4 turns" in data.text) == (count > 0)


@pytest.fixture
def examined_model(copy, tmp_path, monkeypatch, capsys):
    """Runs the command with a model alone, and returns the lines on its template."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine_checks, "_PROBE_BYTES", 8 << 20)

    def run(*flags: str) -> tuple[int, str]:
        code = command.main(["--model", str(copy), *flags])
        lines = capsys.readouterr().out.splitlines()
        return code, "\n".join(x for x in lines if x.split()[1] in ("template", "tokenizer"))

    return run


def test_a_given_template_is_the_one_that_is_examined(copy, examined_model):
    (copy / "chat_template.jinja").unlink()
    code, lines = examined_model()
    assert code == 1
    assert "FAULT   template" in lines
    code, lines = examined_model("--chat-template", "chatml")
    assert code == 0, lines
    assert "a turn ends with <|im_end|>" in lines
    assert "FAULT" in examined_model("--chat-template", "llama3")[1], "its tokens are missing"


def test_a_given_day_is_written_into_the_template(copy, examined_model):
    template = copy / "chat_template.jinja"
    template.write_text("{{- strftime_now('%d %B %Y') }}" + template.read_text())
    assert "FAULT   template" in examined_model()[1]
    code, lines = examined_model("--template-date", "2026-11-28")
    assert code == 0, lines


def test_one_step_neither_exports_nor_uploads_nor_balances_experts_nor_drops(tmp_path):
    """A family's default adds the balancing loss, also where no flag of experts is given."""
    words = ["--model", "m", "--data", str(DATA), "--lr", "1e-5", "--epochs", "1"]
    words += ["--seq-length", "64", "--micro-batch-size", "1", "--expert-tensor-parallel-size", "1"]
    words += [*("--export-hf", "x", "--push-to-hub", "me/x", "--push-public"), "--save", "y"]
    words += ["--lora-rank", "2", "--lora-dropout", "0.1", "--attention-dropout", "0.1"]
    balanced = ["--moe-aux-loss-coeff", "0.1", "--moe-z-loss-coeff", "0.1"]
    for name, more in (("Qwen3-0.6B", []), ("Qwen3-30B-A3B", []), ("Qwen3-30B-A3B", balanced)):
        config = published_config(name)
        (tmp_path / "config.json").write_text(json.dumps(config))
        request = read_request([*words, *more])
        flags = [*request.given.values(), Given.of("--hf-model", str(tmp_path))]
        step = mathematics.one_step(SimpleNamespace(request=request, flags=flags, rows=1))
        check_command_line(step, 1, "cpu", config)
        text = " ".join(step)
        assert not re.findall(r"--(export-hf|push\S*|save|moe-z\S*)", text)
        assert ("--moe-aux-loss-coeff 0" in text) == ("num_experts" in config)
        assert "0.1" not in text


@pytest.mark.parametrize(
    "more",
    [
        "--step-batch-size-schedule 0:8,1000:24 --epochs 1",
        "--train-samples 800 --lr-decay-samples 800 --lr-warmup-samples 80",
        "--lr-decay-style WSD --lr-wsd-decay-iters 10 --train-iters 100",
    ],
)
def test_one_step_has_all_rows_of_a_step_and_no_schedule(tmp_path, more):
    """The first batch of a schedule is smaller, and schedules in samples need --train-samples."""
    config = published_config("Qwen3-0.6B")
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["--model", "m", "--data", str(DATA), "--lr", "1e-5", "--seq-length", "64"]
    request = read_request([*words, "--micro-batch-size", "1", *more.split()])
    flags = [*request.given.values(), Given.of("--hf-model", str(tmp_path))]
    step = mathematics.one_step(SimpleNamespace(request=request, flags=flags, rows=8))
    check_command_line(step, 1, "cpu", config)
    text = " ".join(step)
    assert text.count("--global-batch-size 8") == 1
    assert not re.findall(r"--(lr-\S+|step-batch\S+|train-samples)", text)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("--save R/checkpoints --export-hf R/hf", {"--run": {"checkpoints": 300, "export": 80}}),
        ("", {"--run": {}}),
        ("--save /c", {"--run": {}, "--save": {"checkpoints": 300}}),
    ],
)
def test_the_disk_needs_what_the_run_writes_there(more, expected):
    """A run without --save or --export-hf needs no room for them, and other folders may be on other disks."""
    request = read_request(["--model", "m", "--data", "d", *more.split()])
    run = SimpleNamespace(path=Path("R"))
    launch = SimpleNamespace(request=request, run=run, checkpoint=100, parameters=20)
    assert {f: n for f, _, n in command._needed(request.values, launch)} == expected


@pytest.mark.parametrize(("there", "copies"), [(1, 2), (3, 1)])
def test_checkpoints_that_are_there_need_no_room_again(tmp_path, there, copies):
    """A run that keeps two and has three leaves one more than it keeps only while it saves."""
    for step in range(there):
        (tmp_path / f"iter_000000{step}").mkdir()
    request = read_request(["--model", "m", "--data", "d", "--save", str(tmp_path)])
    run = SimpleNamespace(path=Path("R"))
    launch = SimpleNamespace(request=request, run=run, checkpoint=100, parameters=20)
    needed = {flag: parts for flag, _, parts in command._needed(request.values, launch)}
    assert needed["--save"] == {"checkpoints": copies * 100}


def test_one_step_is_tried_once_and_leaves_no_log_in_the_folder_of_the_run(tmp_path):
    words = "--model m --data d.jsonl --rank-logs --max-restarts 3 --nproc-per-node 2".split()
    launch = SimpleNamespace(request=read_request(words), processes=2, run=RunFolder(tmp_path))
    text = " ".join(mathematics.torchrun_words(launch))
    assert text.startswith("--nproc-per-node 2 --standalone --signals-to-handle")


def test_missing_weights_are_a_fault(copy):
    (copy / "model.safetensors").unlink()
    assert "no weights" in faults(of_model(copy))


Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda _: Usage(100, 99, 1))
    found = list(machine_checks.check_disk(tmp_path, {"checkpoints": 2**30}, 1))
    assert "the run needs 1 GiB (checkpoints 1 GiB)" in faults(found)


def test_a_disk_that_takes_no_more_is_a_fault(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(machine_checks, "_PROBE_BYTES", 8 << 20)
    monkeypatch.setattr(machine_checks.os, "fsync", full)
    assert "No space left on device" in faults(machine_checks.check_disk(tmp_path, {}, 1))
    assert not list(tmp_path.iterdir()), "the file of the measurement is gone"


def test_a_local_disk_is_a_fault_for_several_nodes(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_checks, "_PROBE_BYTES", 8 << 20)
    monkeypatch.setattr(machine_checks, "file_system", lambda _: "ext4")
    assert "shared file system" in faults(machine_checks.check_disk(tmp_path, {}, 2))
    monkeypatch.setattr(machine_checks, "file_system", lambda _: "lustre")
    assert not faults(machine_checks.check_disk(tmp_path, {}, 2))


@pytest.mark.parametrize(
    ("megatron", "found", "precision", "verdict"),
    [
        (Result(3.5, 2.0), Result(3.50001, 2.0005), "fp32", Verdict.OK),
        (Result(3.5, 2.0), Result(3.51, 2.0), "fp32", Verdict.FAULT),
        (Result(3.5, 2.0), Result(3.5, 2.1), "fp32", Verdict.FAULT),
        (Result(3.5, 2.0), Result(3.51, 2.05), "half", Verdict.OK),
        (Result(3.5, 2.0), Result(3.5, None), "half", Verdict.OK),
        (Result(3.5, 2.0), Result(3.6, None), "half", Verdict.FAULT),
    ],
)
def test_a_difference_beyond_rounding_is_a_fault(megatron, found, precision, verdict):
    assert compared(megatron, found, precision, "2").verdict is verdict


def loss_at(least: float):
    """Return a loss that is smallest with one rotary base."""

    def loss(network, records, gradient):
        used = mathematics.rotary_base(network.model.rotary_emb.config)
        return Result(3.0 if used == least else 3.3, None)

    return loss


def test_a_wrong_rotary_base_is_a_fault(model, monkeypatch):
    """Random weights prefer no base, so the losses are given: a minimum at 1,000,000."""
    loaded = mathematics.load_model(model, "cpu")
    base = mathematics.rotary_base(loaded.config)
    text = mathematics.plain_text(model)
    monkeypatch.setattr(mathematics, "transformers_result", loss_at(base))
    assert not faults(check_rotary_base(loaded, text))
    monkeypatch.setattr(mathematics, "transformers_result", loss_at(100_000))
    assert "with 100,000 it is 3." in faults(check_rotary_base(loaded, text))
    assert mathematics.rotary_base(loaded.model.rotary_emb.config) == base, "the model is as before"


def test_the_loss_is_the_one_with_the_adapters_that_a_run_starts_from(model, tmp_path):
    """Judged by the merged weights."""
    peft = get_peft_model(
        mathematics.load_model(model, "cpu"),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    peft.save_pretrained(tmp_path / "adapter")
    merged, loaded = peft.merge_and_unload(), mathematics.load_model(model, "cpu")
    records = [(np.arange(1, 20, dtype=np.int32), np.ones(19, np.uint8))]
    plain = mathematics.transformers_result(loaded, records, False).loss
    mathematics.with_adapters(loaded, str(tmp_path / "adapter"))
    found = mathematics.transformers_result(loaded, records, False).loss
    assert found == pytest.approx(mathematics.transformers_result(merged, records, False).loss)
    assert found != pytest.approx(plain, rel=1e-4)


def test_the_command_finds_a_wrong_rotary_base(model, tmp_path, monkeypatch, capsys):
    """The losses are given, as above; all other parts are the command's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine_checks, "_PROBE_BYTES", 8 << 20)
    monkeypatch.setattr(mathematics, "transformers_result", loss_at(100_000))
    monkeypatch.setattr(mathematics, "megatron_result", lambda _: Result(3.3, None))
    lines = DATA.read_text().splitlines()[:40]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    words = ["--model", str(model), "--data", "chats.jsonl", "--device", "cpu"]
    assert command.main(words) == 1
    printed = capsys.readouterr().out
    faults = [line for line in printed.splitlines() if line.startswith("FAULT")]
    assert [line.split()[:3] for line in faults] == [["FAULT", "rotary", "base"]]
    assert "Correct rope_theta" in faults[0]
    assert printed.rstrip().endswith("there is a fault")


def test_an_error_in_a_check_is_a_fault_and_the_next_check_runs():
    def broken():
        raise RuntimeError("no driver\nmore")

    assert [f.text for f in examined("GPU", broken)] == ["RuntimeError: no driver"]
    assert [f.verdict for f in examined("a", lambda: [ok("a", ""), fault("a", "")])] == [
        *(Verdict.OK, Verdict.FAULT)
    ]


def test_the_command_without_a_model_examines_the_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine_checks, "_PROBE_BYTES", 8 << 20)
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    for subject in ("software", "GPU", "memory", "disk", "model"):
        assert subject in printed
    assert printed.rstrip().endswith("no fault was found")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model x --data y --epoch 1", "did you mean --epochs?"),
        ("--modle x", "there is no flag --modle; did you mean --model?"),
        ("--data y", "--model is missing"),
        ("--model", "--model: expected one argument"),
    ],
)
def test_flags_that_cannot_be_used_are_one_line(words, message, capsys):
    assert command.main(words.split()) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert message in line
    assert not output.out


def test_a_config_with_both_spellings_of_the_base_contradicting_is_a_fault(copy):
    config = json.loads((copy / "config.json").read_text())
    config["rope_theta"] = 5.0
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    (copy / "config.json").write_text(json.dumps(config))
    assert "rope_theta" in faults(of_model(copy))
