"""Typical mistakes of a command line: one line that says what to do, exit code 2, and no traceback."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from megatron_profit.estimates.published import published_config
from megatron_profit.launch import front, slurm

# Command line -> a part of the message. M is a folder with a config.json, D a data file, Y a YAML file.
MISTAKES = {
    "": "--model and --data are missing; for example: megatron-profit sft --model",
    "--data D": "--model is missing",
    "--model M": "--data is missing",
    "--modle M --data D": "there is no flag --modle; did you mean --model?",
    "--model M --dta D": "there is no flag --dta; did you mean --data?",
    "--model M --data D --epoch 3": "there is no flag --epoch; did you mean --epochs?",
    "--model M --data D --learning-rate 3": "there is no flag --learning-rate",
    "--model M --data D --tensor-paralel-size 2": "did you mean --tensor-model-parallel-size?",
    "--model M --data D --epoch 3 --batchsize 4": "there are no flags --epoch (did you mean --epochs?)",
    "--model M --data D --lr": "--lr: expected one argument",
    "--model M --data D --lr fast": "--lr is 'fast'; it must be a number",
    "--model M --data D --lr -1": "--lr is -1; it must be above 0",
    "--model M --data D --lr nan": "--lr is nan; it must be above 0",
    "--model M --data D --epochs 1.5": "--epochs is '1.5'; it must be a whole number",
    "--model M --data D --epochs 0": "--epochs is 0; it must be above 0",
    "--model M --data D --epochs 1 --train-iters 5": "--epochs and --train-iters contradict each other",
    "--model M --data D --bf16 --fp16": "--bf16 and --fp16 contradict each other",
    "--model M --data D --bf16 yes": "'yes' stands where a flag is expected",
    "--model M --hf-model M --data D": "name the same thing; drop --hf-model",
    "--model M --data D --layout fast": "--layout: invalid choice: 'fast'",
    "--model M --data D --gpus 0": "--gpus is 0; it must be at least 1",
    "--model M --data D --gpus two": "--gpus: invalid int value: 'two'",
    "--model M --data D --gpu-memory 0": "--gpu-memory is 0; it must be at least 1",
    "--model M --data D --gpus 8 --nproc-per-node 4": "contradict each other; drop one",
    "--model M --data D --nnodes two": "--nnodes is 'two'; it must be a number such as 2",
    "--model M --data D --nnodes 2": "give --rdzv-endpoint HOST:PORT",
    "--model M --data D --nnodes 2 --rdzv-endpoint a:1 --gpus 3": "give a multiple",
    "--model M --data D --device gpu": "--device is 'gpu'; it can be auto, cpu, cuda",
    "--model M --data D --on-spike stop-it": "--on-spike is 'stop-it'; it can be",
    "--model M --data D --chat-template nowhere.jinja": "there is no such file, and the built-in templates",
    "--model M --data D --chat-template chatlm": "did you mean chatml?",
    "--model M --data D --without=--epoch": "--without=--epoch names no flag",
    "--model M --data nowhere.jsonl": "nowhere.jsonl: does not exist",
    "--model M --data M/chats.csv": "model/chats.csv: does not exist",
    "--model M --data X": "unknown suffix '.xml'",
    "--model D --data D": "is a file; name a HuggingFace folder",
    "--model ./nowhere --data D": "there is no such folder, and it is no id of the hub",
    "--model a/b/c --data D": "it is no id of the hub",
    "--model E --data D": "config.json: missing",
    "--model P --data D": "supported: Qwen3ForCausalLM",
    "--model Qwen/Qwen3-0.6B-Bass --data D": "the hub cannot be reached (HF_HUB_OFFLINE is set)",
    "--model Qwen/Qwen3-0.6B@v9 --data D": "`hf download Qwen/Qwen3-0.6B --revision v9`",
    "--model M --data someone/some-data/main": "`hf download someone/some-data --repo-type dataset`",
    "--config nowhere.yaml": "--config nowhere.yaml: cannot be read",
    "--config Y": "there is no section 'modell'; did you mean model?",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(published_config("Qwen3-0.6B")))
    (tmp_path / "phi").mkdir()
    (tmp_path / "phi" / "config.json").write_text('{"architectures": ["PhiForCausalLM"]}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "chats.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "chats.xml").write_text("<a/>")
    (tmp_path / "run.yaml").write_text("modell: x\n")
    return tmp_path


NAMES = {
    "M": "model",
    "D": "chats.jsonl",
    "Y": "run.yaml",
    "X": "chats.xml",
    "E": "empty",
    "P": "phi",
    "M/chats.csv": "model/chats.csv",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(mistake, folder, capsys):
    words = [NAMES.get(word, word) for word in mistake.split()]
    assert front.main(words) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith("megatron-profit sft: error: ")
    assert MISTAKES[mistake] in line
    assert not output.out
    assert not (folder / "runs").exists(), "nothing is written"


def test_an_error_needs_neither_torch_nor_transformers(folder):
    words = ["sft", "--model", "model", "--data", "nowhere.jsonl", "--prob-threshold", "0.2"]
    command = [sys.executable, "-X", "importtime", "-m", "megatron_profit", *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "megatron.core", "megatron.training"}


@pytest.mark.parametrize("words", [["--hf-model", "x"], ["--hf-model=x", "--lr", "1"]])
def test_a_command_with_hf_model_is_the_training_entry(words, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert front.is_plain(words)
    assert not front.is_plain([*words, "--model", "y"])
    monkeypatch.setenv("RANK", "0")
    assert front.is_plain(["--model", "y"])


SLURM_MISTAKES = {
    "--nodes 2": "the command of each node is missing",
    "--nodes 2 -- data --data D": "the command of each node is missing",
    "-- sft --model M --data D": "the following arguments are required: --nodes",
    "--nodes 0 -- sft --model M --data D": "--nodes is 0; it must be at least 1",
    "--nodes 2 --time soon -- sft --model M --data D": "--time is 'soon'",
    "--nodes 2 --partition a;b -- sft --model M --data D": "must be a name of Slurm's",
    "--nodes 2 --sbatch qos -- sft --model M --data D": "--sbatch is 'qos'",
    "--nodes 2 -- sft --model M --data D --nnodes 2": "--nnodes follows from the job; drop it",
    "--nodes 2 -- sft --model M --data D --epoch 1": "did you mean --epochs?",
}


@pytest.mark.parametrize("mistake", SLURM_MISTAKES)
def test_a_mistake_in_a_job_is_one_line(mistake, folder, capsys):
    words = [NAMES.get(word, word) for word in mistake.split()]
    assert slurm.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert SLURM_MISTAKES[mistake] in line
    assert not (folder / "runs").exists()
