"""`megatron-profit COMMAND …`: its help, its errors, and what is imported for them."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from megatron_profit.commands import cli

# Commands whose help names options of objectives or of Megatron, which are read from the code itself.
_READ_FROM_CODE = ("sft", "data", "report")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "megatron_profit", *arguments],
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


@pytest.mark.parametrize("command", sorted(cli.COMMANDS.keys() - set(_READ_FROM_CODE)))
def test_help_of_a_command_needs_neither_torch_nor_megatron(command):
    result = run(command, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage:")
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert not imported & {"torch", "megatron.core", "transformers", "matplotlib", "tensorboard"}


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
