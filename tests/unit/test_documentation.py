"""What the documentation says is true: commands parse, code runs, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from checkpoint_conversion.families import FAMILIES
from megatron_profit.commands.cli import COMMANDS
from megatron_profit.data import DataOptions
from megatron_profit.estimates.published import published_config
from megatron_profit.objectives import objective_names, objective_options
from megatron_profit.training.arguments.derive import derive

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[list[str]]:
    text = "\n".join(block for page in PAGES for block in blocks(page, "bash"))
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_training_commands_are_accepted():
    found = [command for command in commands() if "megatron_profit.sft" in command]
    assert found
    for command in found:
        world_size = int(command[command.index("--nproc-per-node") + 1])
        flags = command[command.index("megatron_profit.sft") + 1 :]
        settings = derive(flags, "cuda", world_size, published_config("Qwen3-14B"))
        DataOptions.from_flags(settings.values)
        assert settings.values["padded_vocab_size"] == 151936, "no padding is needed"


def test_every_command_names_something_that_exists():
    makefile = (REPOSITORY / "Makefile").read_text()
    for command in commands():
        if command[0] == "make":
            assert f"\n{command[1]}:" in makefile, command
        elif command[0] == "megatron-profit":
            assert command[1] in COMMANDS, command
        elif command[0] == "python" and command[1] != "-m":
            assert (REPOSITORY / command[1]).is_file(), command
        elif "-m" in command:
            module = command[command.index("-m") + 1].replace(".", "/")
            files = (REPOSITORY / f"{module}.py", REPOSITORY / module / "__main__.py")
            assert any(file.is_file() for file in files), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("name", objective_names())
def test_every_objective_has_a_row_with_its_options(name):
    page = (REPOSITORY / "docs" / "objectives.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
    # The row of ProFit describes the threshold that others share.
    described = row + (page if "threshold" in row else "")
    for option in objective_options(name):
        assert "--" + option.name.replace("_", "-") in described, option.name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_family_has_a_row(family):
    """The row names the module that the family's name table is in."""
    page = (REPOSITORY / "docs" / "conversion.md").read_text(encoding="utf-8")
    table = getattr(family.tensor_rules, "func", family.tensor_rules)
    assert f"[`{table.__module__.rsplit('.', 1)[-1]}.py`](" in page


def test_the_example_without_megatron_runs():
    (code,) = (b for b in blocks(REPOSITORY / "docs" / "objectives.md", "python") if "linear" in b)
    names: dict = {}
    exec(code, names)
    assert names["output"].weight.tolist() == [1.0, 0.0]
    assert names["hidden"].grad.shape == (6, 16)
    assert (names["hidden"].grad[1] == 0).all(), "an unsupervised row gets no gradient"
