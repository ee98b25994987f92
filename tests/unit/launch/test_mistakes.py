"""Typical mistakes of a command line: one line that says what to do, exit code 2, and no traceback."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from megatron_profit import sft
from megatron_profit.estimates.published import published_config
from megatron_profit.launch import front, slurm
from megatron_profit.recipe.request import read_request

# Command line -> a part of the message. M is a folder with a config.json, D, T and C are data, Y is YAML.
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
    "--model M --data D --nnodes 4:2 --rdzv-endpoint a:1": "--nnodes is '4:2'; it must be a number",
    "--model M --data D --nnodes 2 --rdzv-endpoint a:b": "write HOST:PORT, for example node0:29400",
    "--model M --data D --run=": "--run is empty",
    "--model M --data D --run D": "is a file; name a folder",
    "--model M --data D --overwrite --nnodes 2 --rdzv-endpoint a:1": "give --rdzv-id NAME",
    "--model M --data D --overwrite --nnodes 1:2 --rdzv-endpoint a:1": "give --rdzv-id NAME",
    "--model M --data D --overwrite --max-restarts 3": "act again at each of --max-restarts 3",
    "--model M --data D --nnodes 2": "give --rdzv-endpoint HOST:PORT",
    "--model M --data D --nnodes 1:4": "give --rdzv-endpoint HOST:PORT",
    "--model M --data D --nnodes 2 --rdzv-endpoint a:1 --gpus 3": "give a multiple",
    "--model M --data D --device gpu": "--device is 'gpu'; it can be auto, cpu, cuda",
    "--model M --data D --lr-decay-style cosin": "it can be constant, linear, cosine",
    "--model M --data D --objective proft": "unknown objective 'proft'",
    "--model M --data D --objective dft --prob-threshold 0.3": "not of dft; drop it",
    "--model M --data D --prob-threshold 2": "prob_threshold",
    "--model M --data D --threshold-direction middle": "prob_threshold is missing",
    "--model M --data D --device cpu --tensor-model-parallel-size 2": "for example with --nproc-per-node 2",
    "--model M --data D --valid-split 2": "--valid-split is 2.0; it must be at least 0 and below 1",
    "--model M --data D --data D": "--data is given twice, and the second list would replace the first",
    "--model M --data D --data-columns prompt=q --data-columns response=a": "after one --data-columns",
    "--model M --data T": "found the keys ['text']",
    "--model M --data C": "found the keys ['question', 'answer']",
    "--model M --data D --optimizer adan": "did you mean adam?",
    "--model M --data D --valid-data nowhere.jsonl": "nowhere.jsonl: does not exist",
    "--model M --data D --data-path X": "--data-path cannot be used here: give chat files with --data",
    "--model M --data D --on-spike stop-it": "--on-spike is 'stop-it'; it can be",
    "--model M --data D --chat-template nowhere.jinja": "there is no such file, and the built-in templates",
    "--model M --data D --chat-template chatlm": "did you mean chatml?",
    "--model M --data D --without=--epoch": "--without=--epoch names no flag",
    "--model M --data D --bf16 --without=--bf16": "--bf16 is given, and --without=--bf16 leaves it out",
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
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "pairs.csv").write_text("question,answer\na,b\n")
    (tmp_path / "run.yaml").write_text("modell: x\n")
    return tmp_path


NAMES = {
    "M": "model",
    "D": "chats.jsonl",
    "Y": "run.yaml",
    "X": "chats.xml",
    "E": "empty",
    "P": "phi",
    "T": "text.jsonl",
    "C": "pairs.csv",
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


# The ordinary flags of the training entry, without a mistake.
PLAIN = (
    "--hf-model model --data chats.jsonl --seq-length 64 --micro-batch-size 1 --lr 1e-5 "
    "--train-iters 2 --device cpu --objective sft"
)
# Flags after them -> a part of the message.
PLAIN_MISTAKES = {
    "--epoch 3": "there is no flag --epoch; did you mean --epochs?",
    "--lr fast": "--lr is 'fast'; it must be a number",
    "--lr -1": "--lr is -1.0; it must be a number that is not negative",
    "--epochs 1": "--train-iters and --epochs contradict each other",
    "--hf-model nowhere": "nowhere",
    "--hf-model phi": "supported: Qwen3ForCausalLM",
    "--data nowhere.jsonl": "nowhere.jsonl: does not exist",
    "--valid-data nowhere.jsonl": "nowhere.jsonl: does not exist",
    "--objective proft": "unknown objective 'proft'",
    "--prob-threshold 0.1": "is an option of --objective",
    "--objective profit": "threshold_direction is None; set it to one of higher",
    "--log-quantiles 2": "--log-quantiles has 2.0",
    "--tensor-model-parallel-size 2": "start 2 of them with torchrun: torchrun --nproc-per-node 2",
    "--tensor-model-parallel-size 3": "does not divide the model's num_attention_heads",
    "--seq-length 999999": "--seq-length 999999 is outside 1..",
    "--num-layers 3": "--num-layers gives num_layers=3",
    "--transformer-impl transformer_engine": "this machine needs",
    "--bf16 --fp16": "--bf16 and --fp16 contradict each other",
    "--keep-last 2": "--keep-last 2 removes checkpoints of --save, which is missing",
    "--eval-tasks gsm8k": "--eval-tasks evaluates the folder of --export-hf, which is missing",
    "--expert-model-parallel-size 2": "the model has no experts",
}
TAKES_LONG = {"torch", "transformers", "megatron.core", "megatron.training"}


def imports_of(*words: str) -> tuple[set[str], subprocess.CompletedProcess]:
    """Return the modules that a Python command imports, and its result."""
    command = [sys.executable, "-X", "importtime", *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    return imported, result


def test_an_error_needs_neither_torch_nor_transformers(folder):
    words = ["sft", "--model", "model", "--data", "nowhere.jsonl", "--prob-threshold", "0.2"]
    imported, result = imports_of("-m", "megatron_profit", *words)
    assert result.returncode == 2
    assert not imported & TAKES_LONG


@pytest.mark.parametrize("mistake", PLAIN_MISTAKES)
def test_the_training_entry_refuses_a_mistake_before_its_imports(mistake, folder, capsys):
    with pytest.raises(SystemExit) as end:
        sft.refuse_early([*PLAIN.split(), *mistake.split()])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megatron-profit-sft: error: ")
    assert PLAIN_MISTAKES[mistake] in line


def test_the_training_entrys_error_is_its_only_line(folder):
    imported, result = imports_of("-m", "megatron_profit.sft", *PLAIN.split(), "--epoch", "1")
    assert result.returncode == 2
    assert not imported & TAKES_LONG
    (line,) = (x for x in result.stderr.splitlines() if not x.startswith("import time:"))
    assert line == "megatron-profit-sft: error: there is no flag --epoch; did you mean --epochs?"
    assert not result.stdout


def test_flags_without_a_mistake_are_judged_without_long_imports(folder):
    check = "import sys; from megatron_profit.recipe.check import check_command_line as c; c(sys.argv[1:], 1)"
    imported, result = imports_of("-c", check, *PLAIN.split())
    assert result.returncode == 0, result.stderr[-2000:]
    assert not imported & TAKES_LONG


@pytest.mark.parametrize(
    "flags",
    [
        "--objective nowhere.module:Class --my-option 3",  # only its import tells the options
        "--exit-signal SIGUSR1 --attention-backend local",  # types of Megatron's own
        "--no-load-optim --no-save-optim --save runs/x --load runs/x",
        "--no-bias-swiglu-fusion --no-masked-softmax-fusion",
    ],
)
def test_what_only_megatrons_parser_knows_is_left_to_it(flags, folder):
    sft.refuse_early([*PLAIN.split(), *flags.split()])


def test_flags_of_another_version_of_megatron_are_left_to_its_parser(folder, monkeypatch):
    monkeypatch.setattr("megatron_profit.recipe.flags.is_listed_version", lambda: False)
    monkeypatch.setattr("megatron_profit.recipe.check.is_listed_version", lambda: False)
    sft.refuse_early([*PLAIN.split(), "--new-flag", "3"])
    request = read_request(["--model", "model", "--data", "chats.jsonl", "--new-flag", "3"])
    assert request.given["new_flag"].words == ("--new-flag", "3")
    assert "--seq-length" in request.table.options, "the known flags are derived all the same"


@pytest.mark.parametrize("words", [["--hf-model", "x"], ["--hf-model=x", "--lr", "1"]])
def test_a_command_with_hf_model_is_the_training_entry(words, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert front.is_plain(words)
    assert not front.is_plain([*words, "--model", "y"])
    monkeypatch.setenv("RANK", "0")
    assert front.is_plain(["--model", "y"])


def test_a_command_for_all_processes_is_refused_in_one_of_them(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert front.main(["--model", "m", "--data", "d.jsonl"]) == 2
    assert "unset RANK" in capsys.readouterr().err


def test_one_process_does_not_wait_for_others_that_the_environment_names(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit):
        sft.start(["--device", "cpu"])
    assert "WORLD_SIZE is 4 in the environment, and RANK is missing" in capsys.readouterr().err


SLURM_MISTAKES = {
    "--nodes 2": "the command of each node is missing",
    "--nodes 2 -- data --data D": "the command of each node is missing",
    "-- sft --model M --data D": "the following arguments are required: --nodes",
    "--nodes 0 -- sft --model M --data D": "--nodes is 0; it must be at least 1",
    "--nodes 2 --time soon -- sft --model M --data D": "--time is 'soon'",
    "--nodes 2 --partition a;b -- sft --model M --data D": "must be a name of Slurm's",
    "--nodes 2 --sbatch qos -- sft --model M --data D": "--sbatch is 'qos'",
    "--nodes 2 -- sft --model M --data D --nnodes 2": "--nnodes follows from the job; drop it",
    "--nodes 2 -- sft --model M --data D --dry-run": "write it before them",
    "--nodes 2 -- sft --model M --data D --epoch 1": "did you mean --epochs?",
}


@pytest.mark.parametrize("mistake", SLURM_MISTAKES)
def test_a_mistake_in_a_job_is_one_line(mistake, folder, capsys):
    words = [NAMES.get(word, word) for word in mistake.split()]
    assert slurm.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert SLURM_MISTAKES[mistake] in line
    assert not (folder / "runs").exists()
