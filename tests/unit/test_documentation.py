"""What the documentation says is true: commands parse, code runs, links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")])
# config.json of Qwen/Qwen3-14B-Base, the keys that matter.
QWEN3_14B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "max_position_embeddings": 32768,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[list[str]]:
    text = "\n".join(block for page in PAGES for block in blocks(page, "bash"))
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_training_commands_are_accepted(tmp_path, monkeypatch):
    from megatron_profit.training import arguments as training_arguments

    read_arguments = training_arguments.read_arguments
    monkeypatch.setattr(training_arguments, "check_checkpoint_matches", lambda *_: None)
    monkeypatch.setattr(training_arguments, "_hf_weights", lambda *_: None)
    monkeypatch.setattr(training_arguments, "_export", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    found = [command for command in commands() if "megatron_profit.sft" in command]
    assert found
    for command in found:
        folder = Path(command[command.index("--hf-model") + 1])
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(QWEN3_14B))
        if "--pretrained-checkpoint" in command:
            start = Path(command[command.index("--pretrained-checkpoint") + 1])
            start.mkdir(exist_ok=True)
            (start / "latest_checkpointed_iteration.txt").write_text("release")
        monkeypatch.setenv("WORLD_SIZE", command[command.index("--nproc-per-node") + 1])
        arguments = read_arguments(command[command.index("megatron_profit.sft") + 1 :], "cuda")
        assert arguments.defaults["padded_vocab_size"] == 151936, "no padding is needed"


def test_every_command_names_something_that_exists():
    makefile = (REPOSITORY / "Makefile").read_text()
    for command in commands():
        if command[0] == "make":
            assert f"\n{command[1]}:" in makefile, command
        elif command[0] == "python" and command[1] != "-m":
            assert (REPOSITORY / command[1]).is_file(), command
        elif "-m" in command:
            module = command[command.index("-m") + 1].replace(".", "/")
            assert (REPOSITORY / f"{module}.py").is_file(), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_example_without_megatron_runs():
    (code,) = (b for b in blocks(REPOSITORY / "docs" / "objectives.md", "python") if "linear" in b)
    names: dict = {}
    exec(code, names)
    assert names["output"].weight.tolist() == [1.0, 0.0]
    assert names["hidden"].grad.shape == (6, 16)
    assert (names["hidden"].grad[1] == 0).all(), "an unsupervised row gets no gradient"
