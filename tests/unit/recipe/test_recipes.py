"""The recipes of examples/: read as command lines, and accepted by the training's own parser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_profit.estimates.published import PUBLISHED, published_config
from megatron_profit.recipe.flags import words_of
from megatron_profit.recipe.request import Request, read_request
from megatron_profit.training.arguments.derive import derive

RECIPES = Path(__file__).resolve().parents[3] / "examples" / "recipes"
MODELS = sorted(RECIPES.glob("*/*.yaml"))
METHODS = sorted(RECIPES.glob("*.yaml"))


def read(*files: Path) -> Request:
    return read_request(["--config", *map(str, files), "--data", "chats.jsonl"])


def test_each_published_model_has_a_recipe():
    assert {path.stem for path in MODELS} == {name.lower() for name in PUBLISHED}
    assert [path.stem for path in METHODS] == ["dft", "lora", "profit", "psft", "sft"]


@pytest.mark.parametrize("file", MODELS, ids=lambda path: path.stem)
def test_a_models_recipe_names_its_model(file):
    request = read(file)
    assert re.sub(r".*/|-Base$", "", request.model).lower() == file.stem
    assert request.front.layout == "auto"
    assert str(file.relative_to(RECIPES.parents[1])) in file.read_text(), "its command names it"


@pytest.mark.parametrize("method", METHODS, ids=lambda path: path.stem)
def test_a_methods_recipe_passes_the_trainings_parser(method):
    others = [RECIPES / "profit.yaml"] if method.stem == "lora" else []
    request = read(RECIPES / "qwen3" / "qwen3-4b.yaml", *others, method)
    flags = words_of(request.given.values())
    flags += ["--hf-model", "model", "--seq-length", "8192", "--micro-batch-size", "1"]
    settings = derive(flags, "cuda", 8, published_config("Qwen3-4B"))
    assert settings.values["objective"] == {"lora": "profit"}.get(method.stem, method.stem)
