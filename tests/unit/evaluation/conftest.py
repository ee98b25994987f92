"""A tiny model that answers, and a small file of questions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from make_tiny_model import make_tiny_model

REPOSITORY = Path(__file__).resolve().parents[3]

pytest.importorskip("lm_eval", reason="lm-eval and math-verify are not installed")
pytest.importorskip("math_verify", reason="lm-eval and math-verify are not installed")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The HuggingFace folder of a tiny model with random weights and a chat template."""
    data = sorted((REPOSITORY / "examples" / "data").glob("*.jsonl"))
    return make_tiny_model(tmp_path_factory.mktemp("evaluation") / "tiny", data)


@pytest.fixture(scope="session")
def dated_model(tiny_model, tmp_path_factory):
    """The same model with a chat template that writes today's date, as Llama 3.2's does."""
    folder = tmp_path_factory.mktemp("dated") / "dated"
    shutil.copytree(tiny_model, folder)
    template = folder / "chat_template.jinja"
    begin = "{{- '<|im_start|>system\\nToday: ' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}"
    template.write_text(begin + template.read_text())
    return folder


@pytest.fixture
def write_questions(tmp_path):
    """write_questions(records, name): a JSON Lines file with the records."""

    def write(records, name="sums.jsonl"):
        file = tmp_path / name
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return file

    return write


@pytest.fixture
def sums(write_questions):
    """Five questions of different lengths."""
    return write_questions(
        [
            {
                "question": "What is " + " plus ".join("two" for _ in range(n + 1)) + "?",
                "answer": 2 * n + 2,
            }
            for n in range(5)
        ]
    )
