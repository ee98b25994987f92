"""What `pip install .` gives: the two packages, nothing else, and a command that works from anywhere."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = {"megatron_profit", "checkpoint_conversion"}

pytestmark = pytest.mark.slow


def pip(*arguments: object) -> None:
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", *map(str, arguments), *quiet]
    result = subprocess.run(command, text=True, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a clone, so that the build leaves nothing in the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, source], check=True, timeout=60)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--target", folder, wheel)
    return folder


def test_the_wheel_holds_the_two_packages_whole_and_nothing_else(wheel):
    files = set(zipfile.ZipFile(wheel).namelist())
    [metadata] = {name.split("/")[0] for name in files if ".dist-info/" in name}
    assert {name.split("/")[0] for name in files} == PACKAGES | {metadata}
    tracked = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", "HEAD", *PACKAGES],
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        check=True,
    ).stdout.split()
    assert {name for name in files if not name.startswith(metadata)} == set(tracked)
    assert any(name.endswith("/LICENSE") for name in files)


def test_recipes_and_tasks_are_in_the_wheel(wheel):
    files = set(zipfile.ZipFile(wheel).namelist())
    assert "megatron_profit/recipes/qwen3/qwen3-14b.yaml" in files
    assert "megatron_profit/recipes/profit.yaml" in files
    assert "megatron_profit/evaluation/tasks/gsm8k.yaml" in files


def test_the_wheel_says_what_it_needs(wheel):
    archive = zipfile.ZipFile(wheel)
    [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Name"] == "megatron-profit"
    assert metadata["Requires-Python"] == ">=3.12"
    needs = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    for package in ("megatron-core", "matplotlib", "lm-eval", "math-verify"):
        assert any(need.startswith(package) for need in needs), "all commands come with the package"


def test_the_description_has_no_link_into_the_repository(wheel):
    """On an index there is neither a figure nor a page next to it."""
    archive = zipfile.ZipFile(wheel)
    [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = metadata.get_payload()
    assert "megatron-profit sft --model" in description
    assert "docs/training.md describes" in description
    assert "![" not in description
    assert all(link.startswith("https:") for link in re.findall(r"\]\(([^)]*)\)", description))


def run_elsewhere(installed: Path, folder: Path, *command: object) -> str:
    """Run with only the installed wheel on the path, beside the packages that it needs."""
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed)},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_installed_command_shows_its_help_from_another_folder(installed, tmp_path):
    script = installed / "bin" / "megatron-profit-sft"
    assert os.access(script, os.X_OK)
    help_text = run_elsewhere(installed, tmp_path, script, "--help")
    for flag in ("--hf-model", "--objective", "--prob-threshold", "--tensor-model-parallel-size"):
        assert flag in help_text


def test_the_installed_console_command_lists_its_commands(installed, tmp_path):
    listed = run_elsewhere(installed, tmp_path, installed / "bin" / "megatron-profit")
    assert "to-hf" in listed
    command = (installed / "bin" / "megatron-profit", "to-hf", "--help")
    assert "--hf-template" in run_elsewhere(installed, tmp_path, *command)


@pytest.mark.parametrize("name", ["hf_to_megatron", "megatron_to_hf"])
def test_the_installed_converters_show_their_help_from_another_folder(installed, tmp_path, name):
    module = f"checkpoint_conversion.{name}"
    assert "--out" in run_elsewhere(installed, tmp_path, "-m", module, "--help")


def test_it_is_the_installed_copy_that_runs(installed, tmp_path):
    code = "import megatron_profit, checkpoint_conversion as c; print(megatron_profit.__file__, c.__file__)"
    for file in run_elsewhere(installed, tmp_path, "-c", code).split():
        assert Path(file).is_relative_to(installed)
