"""The recipes of examples/: read as command lines, and accepted by the training's own parser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from checkpoint_conversion.families import family_for
from checkpoint_conversion.progress import human
from megatron_profit.estimates.layouts import Choice, Cluster, NoLayoutError, Wish, choose
from megatron_profit.estimates.parameter_counts import saved_parameters
from megatron_profit.estimates.published import PUBLISHED, published_config
from megatron_profit.estimates.saving import checkpoint_bytes
from megatron_profit.recipe.config_file import find_config
from megatron_profit.recipe.errors import LaunchError
from megatron_profit.recipe.flags import words_of
from megatron_profit.recipe.request import Request, read_request
from megatron_profit.training.arguments.derive import derive

RECIPES = Path(__file__).resolve().parents[3] / "megatron_profit" / "recipes"
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
    assert f"--config {file.stem} profit " in file.read_text(), "its command names it"
    assert find_config(file.stem) == file


@pytest.mark.parametrize("file", MODELS, ids=lambda path: path.stem)
def test_a_models_recipe_says_what_the_estimates_say(file):
    name = next(name for name in PUBLISHED if name.lower() == file.stem)
    config = published_config(name)
    length = min(8192, config["max_position_embeddings"])
    wish = Wish(family_for(config).megatron_arguments(config), length, 4)
    gpus, choice = next((n, found) for n in GPUS if (found := fitting(wish, n)) is not None)
    recomputed = ", with full recomputation" if choice.layout.recompute_granularity else ""
    size = human(checkpoint_bytes({"bf16": True}, saved_parameters(choice.run)))
    assert file.read_text().startswith(
        f"# {read(file).model} on {gpus} GPU{'s' * (gpus > 1)} of 80 GB or more{recomputed}, in rows of "
        f"{length:,} positions.\n# A checkpoint takes {size}.\n"
    )


GPUS = (1, 2, 4, 8, 16, 32, 64, 128)


def fitting(wish: Wish, gpus: int) -> Choice | None:
    try:
        return choose(wish, Cluster(gpus, 79.6, min(gpus, 8)))
    except NoLayoutError:
        return None


def test_a_recipe_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        read_request(["--config", "qwen3-4b", "dft", "--data", "x"]).model == "Qwen/Qwen3-4B-Base"
    )
    with pytest.raises(LaunchError, match="no recipe of this name; did you mean qwen3-4b"):
        read_request(["--config", "qwen3-4bb", "--data", "x"])
    (tmp_path / "qwen3-4b").mkdir()  # of its model, for example
    assert find_config("qwen3-4b") == RECIPES / "qwen3" / "qwen3-4b.yaml"
    (tmp_path / "dft").write_text("objective: sft\n")  # a file that is here comes first
    request = read_request(["--config", "qwen3-4b", "dft", "--data", "x"])
    assert request.value("objective") == "sft"


@pytest.mark.parametrize("method", METHODS, ids=lambda path: path.stem)
def test_a_methods_recipe_passes_the_trainings_parser(method):
    others = [RECIPES / "profit.yaml"] if method.stem == "lora" else []
    request = read(RECIPES / "qwen3" / "qwen3-4b.yaml", *others, method)
    flags = words_of(request.given.values())
    flags += ["--hf-model", "model", "--seq-length", "8192", "--micro-batch-size", "1"]
    settings = derive(flags, "cuda", 8, published_config("Qwen3-4B"))
    assert settings.values["objective"] == {"lora": "profit"}.get(method.stem, method.stem)
