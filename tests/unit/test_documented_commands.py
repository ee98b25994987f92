"""Every command and flag that README, pages, recipes and heads of scripts show is known to its program.

A program is left when it reaches its parser. Where a tiny model will do, examples of pages run as they stand.
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
import runpy
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import make_tiny_model
import pytest
import yaml

from checkpoint_conversion import hf_to_megatron
from megatron_profit.commands.cli import COMMANDS
from megatron_profit.commands.evaluate import build_parser
from megatron_profit.evaluation.comparison.plan import read_plan
from megatron_profit.launch.slurm import read_words
from megatron_profit.recipe.flags import FlagTable
from megatron_profit.recipe.request import read_request

# Modules that other tests have imported are started here as programs.
pytestmark = pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")

REPOSITORY = Path(__file__).resolve().parents[2]
# The log keeps commands of their day.
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "Dockerfile")),
    *sorted(page for page in (REPOSITORY / "docs").glob("*.md") if page.name != "log.md"),
]
SCRIPTS = [
    file
    for folder in ("examples", "tools", "benchmarks", "megatron_profit", "checkpoint_conversion")
    for file in sorted((REPOSITORY / folder).rglob("*.*"))
    if file.suffix in (".py", ".sh", ".sbatch", ".yaml")
]
COMMAND = r"(?:[A-Z_]+=\S+ )*(?:megatron-profit|python|torchrun) "
ON_A_LINE = re.compile(rf"^[ \t#>]*({COMMAND}.*)", re.MULTILINE)
IN_PROSE = re.compile(rf"`({COMMAND}[^`]*)`")
LEFT_OUT = {"…", "..."}
WITH_TRAINING_FLAGS = {"estimate", "layout", "tools/estimate_communication.py"}


def shown_text(file: Path) -> str:
    """Return what a reader sees of a file, of Python its head, with a long command on one line."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        text = ast.get_docstring(ast.parse(text), clean=False) or ""
    return re.sub(r" \\\n[ #]*", " ", text)


def shown_commands(file: Path) -> list[str]:
    """Return the commands on lines and between backticks, without the variables before them."""
    text = shown_text(file)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    spans = [" ".join(span.split()) for span in IN_PROSE.findall(prose)]
    return [re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line) for line in ON_A_LINE.findall(text) + spans]


class ReachedParserError(BaseException):
    """Leaves a program at its parser, which was given some words."""

    def __init__(self, parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
        self.parser, self.words = parser, words


def parser_of(
    program: Sequence[str], words: Sequence[str]
) -> tuple[argparse.ArgumentParser, Sequence[str]]:
    """Start a module (`-m NAME`) or a script, and return its parser with the words that it gets."""

    def leave(
        parser: argparse.ArgumentParser, given: Sequence[str] | None = None, *_: object
    ) -> None:
        raise ReachedParserError(parser, sys.argv[1:] if given is None else given)

    run = runpy.run_module if program[0] == "-m" else runpy.run_path
    place = program[1] if program[0] == "-m" else str(REPOSITORY / program[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program[-1], *words])
        patch.setattr(argparse.ArgumentParser, "parse_known_args", leave)
        with pytest.raises(ReachedParserError) as left:
            run(place, run_name="__main__")
    return left.value.parser, left.value.words


@functools.cache
def training_flags() -> FlagTable:
    return FlagTable()


def read_flags(words: Sequence[str]) -> None:
    """Read the flags of a command as its program does."""
    program, *rest = words
    if "megatron_profit.sft" in rest:
        training_flags().parse(rest[rest.index("megatron_profit.sft") + 1 :])
    elif program == "torchrun" or "megatron_profit.logits" in rest:
        pass  # Megatron's own parser reads its flags, and another test runs it
    elif program == "megatron-profit" and rest[0] in ("sft", "doctor"):
        read_request(rest[1:])
    elif program == "megatron-profit" and rest[0] == "slurm":
        read_request(read_words(rest[1:])[1])
    else:
        parts = ["-m", "megatron_profit", *rest] if program == "megatron-profit" else rest
        end = 2 if parts[0] == "-m" else 1
        parser, given = parser_of(parts[:end], parts[end:])
        unread = parser.parse_known_args(given)[1]
        if not WITH_TRAINING_FLAGS & {*rest[:1]}:
            assert not unread
        training_flags().parse(unread)


def is_named_only(words: Sequence[str]) -> bool:
    """Return whether the text names a program, and shows no flags or only a part of them."""
    least = 3 if "-m" in words[1:2] else 2
    return len(words) <= least or bool(LEFT_OUT & {*words}) or "--help" in words


SHOWN = sorted({command for file in (*PAGES, *SCRIPTS) for command in shown_commands(file)})


@pytest.mark.parametrize("command", SHOWN)
def test_a_shown_command_can_be_read(command):
    words = shlex.split(re.split(r" (?:&&|\|) ", command)[0], comments=True)
    if words[0] == "megatron-profit":
        assert words[1] in (*COMMANDS, "COMMAND")
    elif words[0] == "python":
        place = words[2].replace(".", "/") if words[1] == "-m" else words[1].removesuffix(".py")
        found = [REPOSITORY / f"{place}.py", REPOSITORY / place / "__main__.py"]
        assert any(file.is_file() for file in found)
    if not is_named_only(words):
        read_flags(words)


# Flags that stand in no code here: of docker, pip, Slurm, lm-eval, vLLM, hf and W&B; options of the
# example objectives; and a flag that a benchmark makes from a name.
OF_OTHERS = {
    *(
        "--build-arg",
        "--ipc",
        "--no-cache-dir",
        "--rm",
        "--tag",
        "--ulimit",
        "--volume",
        "--workdir",
    ),
    *("--find-links", "--index-url", "--no-build-isolation", "--no-deps", "--no-index"),
    *("--qos", "--requeue", "--include_path", "--append", "--repo-type", "--local-dir"),
    "--tensor-parallel-size",
    *("--focal-gamma", "--frequency-threshold", "--full"),
}


@functools.cache
def known_flags() -> frozenset[str]:
    """Return the flags of the training, and the ones that code names."""
    code = " ".join(file.read_text(encoding="utf-8") for file in SCRIPTS if file.suffix == ".py")
    return training_flags().options | {*re.findall(r"[\"'](--[a-z][\w-]*)", code)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_on_a_page_exists(page):
    named = re.findall(r"(?<![\w-])--[a-z][\w-]*\w", page.read_text(encoding="utf-8"))
    assert sorted({*named} - known_flags() - OF_OTHERS) == []


def yaml_blocks(page: Path) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


YAML = [(page.stem, text) for page in PAGES for text in yaml_blocks(page)]


@pytest.mark.parametrize("text", [text for _, text in YAML], ids=[name for name, _ in YAML])
def test_a_shown_yaml_file_can_be_read(text, tmp_path, monkeypatch):
    """A plan of `compare`, whose commands then can be read, or the file of a training."""
    file = tmp_path / "shown.yaml"
    file.write_text(text)
    if "objectives" not in yaml.safe_load(text):
        read_request(["--config", str(file)])
        return
    monkeypatch.chdir(tmp_path)
    (tmp_path / yaml.safe_load(text)["base"]).mkdir(parents=True)
    check_plan(file)


def check_plan(file: Path) -> None:
    """Read the flags of each training and each evaluation of a plan."""
    plan = read_plan(file)
    for unit in (unit for units in plan.schedule() for unit in units):
        read_flags(["python", *plan.train_command(unit.run, Path("HF"), Path("METRICS"))[1:]])
        for name in unit.evaluations:
            command = plan.evaluate_command(unit.run.data, name, Path("HF"), Path("OUT"))
            build_parser().parse_args(command[command.index("evaluate") + 1 :])


def test_the_plan_of_the_study_can_be_read(tmp_path, monkeypatch):
    text = (REPOSITORY / "benchmarks" / "real_model.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / yaml.safe_load(text)["base"]).mkdir(parents=True)
    (tmp_path / "plan.yaml").write_text(text)
    check_plan(Path("plan.yaml"))


@pytest.fixture(scope="module")
def folder_of_a_user(tmp_path_factory) -> Path:
    """Return a folder in which a tiny model, its checkpoint and a chat file have the names that pages use."""
    folder = tmp_path_factory.mktemp("user")
    model, chats = folder / "Qwen3-14B-Base", REPOSITORY / "examples/data/arithmetic_chatty.jsonl"
    assert make_tiny_model.main(["--out", str(model), "--data", str(chats)]) == 0
    (folder / "Qwen3-0.6B").symlink_to(model)
    (folder / "chats.jsonl").symlink_to(chats)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["hf_to_megatron", "--hf", str(model), "--out", str(folder / "runs/14b")]
        )
        assert hf_to_megatron.main() == 0
    return folder


def run_shown(line: str) -> object:
    """Run a command of this project in this process, and return its exit code."""
    _, *words = shlex.split(line)
    module, *flags = words[1:] if words[0] == "-m" else ["megatron_profit", *words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *flags])
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            return end.code or 0
    return 0


@pytest.mark.parametrize(
    ("page", "start"),
    [
        ("choosing_tau", "megatron-profit report"),
        ("cluster", "megatron-profit layout"),
        ("compatibility", "python -m megatron_profit.megatron_patches --check"),
        ("conversion", "python -m checkpoint_conversion"),
        ("data", "megatron-profit data"),
        ("scaling", "megatron-profit estimate"),
    ],
)
def test_the_example_of_a_page_runs_as_it_is_shown(
    page, start, folder_of_a_user, monkeypatch, capsys
):
    monkeypatch.chdir(folder_of_a_user)
    text = shown_text(REPOSITORY / "docs" / f"{page}.md")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith(start)]
    assert lines
    for line in lines:
        if "--logits" not in line:  # tests/integration/test_verify_logits.py has these
            assert run_shown(line) == 0, line
    if page == "compatibility":
        assert capsys.readouterr().out.splitlines()[0] in text, "the output that the page shows"
