"""`make quickstart` with few steps: every artefact, the resume, and what a second start does again."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import forked_torchrun
import matplotlib.image
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "examples" / "quickstart.py"


def start(out: Path, **steps: int) -> subprocess.CompletedProcess:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in steps.items()]
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out), *flags],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1800,
    )


def start_here(quickstart: ModuleType, out: Path) -> str:
    """Start it in this process, with few steps, and return what it prints."""
    printed = io.StringIO()
    argv = ["quickstart.py", f"--out={out}", "--base-steps=4", "--profit-steps=4"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(REPOSITORY)
        patch.setattr(sys, "argv", argv)
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(quickstart, "run", forking(quickstart.TRAIN, quickstart.run))
        quickstart.main()
    return printed.getvalue()


def forking(launch, run):
    """Return the quickstart's `run`; the ranks of a `launch` are forks of a process that knows Megatron."""

    def forking_run(command: Sequence[str], log: Path) -> Iterator[str]:
        if list(command[: len(launch)]) != launch:
            yield from run(command, log)
            return
        flags = [*launch, *command[len(launch) :]][launch.index("megatron_profit.sft") + 1 :]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        torchrun = forked_torchrun.context().Process(
            target=forked_torchrun.launch, args=(2, flags, log, 0, env)
        )
        torchrun.start()
        torchrun.join(300)
        assert torchrun.exitcode == 0, log.read_text()[-8000:]
        yield from log.read_text().splitlines()

    return forking_run


@pytest.fixture(scope="module")
def first(quickstart, tmp_path_factory) -> tuple[Path, str]:
    """The output folder of a whole quickstart, and what it printed."""
    out = tmp_path_factory.mktemp("quickstart") / "run"
    return out, start_here(quickstart, out)


@pytest.mark.slow
def test_it_starts_from_a_shell(tmp_path):
    result = start(tmp_path / "run", base_steps=2, profit_steps=2)
    assert result.returncode == 0, result.stdout
    assert re.search(r"ProFit +\d+ of 64 right", result.stdout)


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_artefact_is_there(first):
    out, printed = first
    for folder in ("tiny", "base-hf", "profit-hf", "sft-hf"):
        for file in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
            assert (out / folder / file).stat().st_size > 0
    for folder, step in (("base", "4"), ("base-megatron", "release"), ("profit", "4")):
        assert (out / folder / "latest_checkpointed_iteration.txt").read_text().strip() == step
    for folder in ("base/iter_0000004", "profit/iter_0000002", "profit/iter_0000004"):
        assert any((out / folder).glob("*.distcp"))
    for run in ("base", "profit"):
        assert any((out / run / "tensorboard").glob("events.out.tfevents.*"))
    assert matplotlib.image.imread(out / "curves.png").shape[1] > 1000
    for model in ("base", "ProFit", "SFT"):
        assert re.search(rf"{model} +\d+ of 64 right, \d+ open with a phrase", printed)
    lines = [json.loads(line) for line in (out / "sft.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4]


def test_the_result_answers(first):
    folder = first[0] / "profit-hf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is eleven plus twenty-two?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    length = inputs.input_ids.size(1)
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert output[0, :length].tolist() == inputs.input_ids[0].tolist()
    assert 1 <= output.size(1) - length <= 4


class EndsItsTurn(LogitsProcessor):
    """Stands for a trained model: it says one word and ends the turn."""

    def __init__(self, prompt: int, turn_end: int) -> None:
        self.prompt, self.turn_end = prompt, turn_end

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.size(1) > self.prompt:
            scores[:, self.turn_end] = scores.max() + 1
        return scores


@pytest.mark.parametrize(("folder", "written"), [("tiny", 6), ("base-hf", 2), ("profit-hf", 2)])
def test_a_trained_model_stops_where_its_turn_ends(first, folder, written):
    """The random base has the stop token of a published base alone; the others are converted from runs."""
    tokenizer = AutoTokenizer.from_pretrained(first[0] / folder)
    model = AutoModelForCausalLM.from_pretrained(first[0] / folder)
    prompt = tokenizer("two", return_tensors="pt")
    length = prompt.input_ids.size(1)
    ends = EndsItsTurn(length, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    output = model.generate(**prompt, max_new_tokens=6, logits_processor=[ends])
    assert output.size(1) - length == written
    config = json.loads((first[0] / folder / "config.json").read_text())
    assert model.generation_config.eos_token_id == config["eos_token_id"]


def test_the_second_profit_launch_resumed_where_the_first_was_interrupted(first):
    out, _ = first
    log = (out / "profit.log").read_text()
    loaded = re.findall(r"successfully loaded checkpoint from (\S+) .* at iteration (\d+)", log)
    assert loaded == [(str(out / "base-megatron"), "0"), (str(out / "profit"), "2")]
    assert re.findall(r"iteration +(\d+)/ +4 \|", log) == ["1", "2", "3", "4"]


def test_a_second_start_keeps_all_and_draws_the_figure_again(quickstart, first):
    out, _ = first
    drawn = (out / "curves.png").stat().st_mtime_ns
    logs = {log: log.read_bytes() for log in out.glob("*.log") if log.name != "curves.png.log"}
    printed = start_here(quickstart, out)
    assert printed.count("kept from an earlier start") == 8
    assert "torch.distributed.run" not in printed
    assert "removing" not in printed
    assert {log: log.read_bytes() for log in logs} == logs
    assert (out / "curves.png").stat().st_mtime_ns > drawn


@pytest.fixture
def plan(quickstart, tmp_path):
    return quickstart.Quickstart(tmp_path / "run", base_steps=4, profit_steps=4)


@pytest.fixture
def carry_out(quickstart, monkeypatch):
    """Starts a plan without its commands; gives the numbers of the steps that would have run."""

    def carry_out(plan, fail_at=None):
        ran = []

        def execute(step):
            ran.append(int(step.title.partition(".")[0]))
            step.result.mkdir(exist_ok=True)
            if ran[-1] == fail_at:
                raise KeyboardInterrupt
            (step.result / f"step {ran[-1]}").touch()

        monkeypatch.setattr(quickstart, "execute", execute)
        try:
            quickstart.carry_out(plan.steps(), quickstart.Finished(plan.out / "steps.json"))
        except KeyboardInterrupt:
            assert fail_at
        return ran

    return carry_out


def test_a_changed_number_of_profit_steps_redoes_profit_and_what_follows(
    quickstart, plan, carry_out, capsys
):
    assert carry_out(plan) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert carry_out(plan) == []
    log = plan.out / "profit.log"
    log.touch()
    capsys.readouterr()
    longer = quickstart.Quickstart(plan.out, base_steps=4, profit_steps=6)
    assert carry_out(longer) == [5, 6, 7, 8]
    printed = capsys.readouterr().out
    assert re.findall(r"removing (.*)", printed) == [
        str(folder) for folder in (plan.profit, plan.profit_hf, plan.sft_hf)
    ]
    assert not log.exists()


def test_a_changed_number_of_base_steps_redoes_all_but_the_random_weights(
    quickstart, plan, carry_out
):
    carry_out(plan)
    longer = quickstart.Quickstart(plan.out, base_steps=6, profit_steps=4)
    assert carry_out(longer) == [2, 3, 4, 5, 6, 7, 8]


def test_a_step_that_did_not_end_is_redone(plan, carry_out):
    assert carry_out(plan, fail_at=3) == [1, 2, 3]
    assert carry_out(plan) == [3, 4, 5, 6, 7, 8]


def test_a_resumed_step_that_did_not_end_is_redone_with_the_step_before(plan, carry_out):
    assert carry_out(plan, fail_at=6) == [1, 2, 3, 4, 5, 6]
    (plan.profit / "left behind").touch()
    assert carry_out(plan) == [5, 6, 7, 8]
    assert sorted(file.name for file in plan.profit.iterdir()) == ["step 5", "step 6"]


def test_a_result_that_was_removed_is_made_again(quickstart, plan, carry_out):
    carry_out(plan)
    quickstart.shutil.rmtree(plan.base_hf)
    assert carry_out(plan) == [3, 4, 5, 6, 7, 8]


def test_the_remembered_commands_hold_no_path_of_the_interpreter(plan, carry_out):
    carry_out(plan)
    commands = json.loads((plan.out / "steps.json").read_text())
    assert all(command.startswith("python ") for command in commands)
    assert all("--device cpu" in commands[step - 1] for step in (2, 5, 6, 8))


def test_another_family_is_made_by_the_first_step(quickstart, tmp_path):
    plan = quickstart.Quickstart(tmp_path, 4, 4, "qwen3.5")
    assert plan.make_tiny()[4:6] == ["--family", "qwen3.5"]
    assert "--family" not in quickstart.Quickstart(tmp_path, 4, 4).make_tiny()


def test_the_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "base").mkdir()
    result = start(tmp_path)
    assert result.returncode == 2
    assert "is not empty and has no steps.json" in result.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        ({"profit_steps": 5}, "--profit-steps is 5; it must be even"),
        ({"profit_steps": 0}, "--profit-steps is 0; it must be even and at least 2"),
        ({"base_steps": 0}, "--base-steps is 0; it must be at least 1"),
    ],
)
def test_a_number_of_steps_that_cannot_be_trained_is_an_error(tmp_path, steps, problem):
    result = start(tmp_path / "run", **steps)
    assert result.returncode == 2
    assert problem in result.stdout
    assert not (tmp_path / "run").exists()
