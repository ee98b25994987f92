"""`megatron-profit COMMAND …`: its help, its errors, and what is imported for them."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib import metadata

import pytest

from megatron_profit.commands import cli

# Packages that take long to import. Help does without them.
_SLOW = {"torch", "transformers", "megatron.core", "megatron.training", "matplotlib", "tensorboard"}


def run(*arguments: str, module: str = "megatron_profit") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", module, *arguments],
        text=True,
        capture_output=True,
        timeout=100,
    )


@pytest.mark.parametrize("arguments", [(), ("--help",), ("help",)])
def test_help_lists_every_command(arguments):
    result = run(*arguments)
    assert result.returncode == 0
    listed = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ")]
    assert listed == list(cli.COMMANDS)


def test_the_version_is_told(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"megatron-profit {metadata.version('megatron-profit')}\n"


def test_help_is_printed_in_an_encoding_without_its_characters(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    result = run("--help")
    assert result.returncode == 0, result.stderr
    assert "usage: megatron-profit COMMAND" in result.stdout


def imported(result: subprocess.CompletedProcess) -> set[str]:
    return {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command_needs_neither_torch_nor_megatron(command):
    result = run(command, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: megatron-profit {command} ")
    assert not imported(result) & _SLOW


def test_the_package_is_imported_without_torch_and_megatron():
    result = run("-h", module="megatron_profit")
    assert not imported(result) & _SLOW


def test_a_name_that_is_nearly_a_command_is_corrected(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["to_hf", "--out", "x"])
    assert "error: there is no command 'to_hf'; did you mean to-hf?" in capsys.readouterr().err


def test_arguments_go_to_the_command(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["verify", "--hf", "nowhere", "--hf", "nowhere else"])
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_every_command_can_be_imported():
    for command in cli.COMMANDS.values():
        assert callable(importlib.import_module(command.module).main)
