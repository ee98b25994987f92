"""Flags of the reference model: what is missing, ignored or of another architecture is refused."""

from __future__ import annotations

import json
import shutil

import pytest
from make_tiny_model import TinyShape, make_tiny_model

from megatron_profit.flags import ArgumentsError
from megatron_profit.training.arguments.derive import derive
from megatron_profit.training.arguments.disk import open_reference


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    data = folder / "data.jsonl"
    data.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    for name, layers in (("model", 2), ("deeper", 4)):
        make_tiny_model(folder / name, [data], TinyShape(num_layers=layers))
    return folder


def read(models, *flags):
    needed = "--seq-length 16 --micro-batch-size 1 --lr 1e-3 --train-iters 2".split()
    files = ["--hf-model", str(models / "model"), "--data", str(models / "data.jsonl")]
    return open_reference(derive([*files, *needed, *map(str, flags)], "cpu", 1))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--objective", "iw-sft"], "iw-sft needs a place .* give --ref-cache DIR or --save DIR"),
        (["--objective", "sft", "--log-reference"], "--log-reference needs a place .*--ref-cache"),
        (
            ["--objective", "sft", "--ref-cache", "x"],
            "--ref-cache is for objectives with a reference",
        ),
        (
            ["--objective", "iw-sft", "--ref-cache", "x", "--ref-hf-model", "gone"],
            "gone cannot be used",
        ),
        (["--objective", "sft", "--psft-steps-per-refresh", 4], "is for --objective psft"),
        (["--objective", "psft", "--psft-steps-per-refresh", 1], "exactly SFT"),
    ],
)
def test_refused(models, flags, message):
    with pytest.raises(ArgumentsError, match=message):
        read(models, *flags)


def test_another_architecture_is_refused(models):
    flags = ["--objective", "stm", "--ref-cache", "x", "--ref-hf-model", models / "deeper"]
    with pytest.raises(ArgumentsError, match=r"another architecture .*: num_layers is 4 and not 2"):
        read(models, *flags)


def test_a_reference_for_more_positions_is_the_same_architecture(models, tmp_path):
    """As Qwen3-0.6B and Qwen3-0.6B-Base; another rotary base is another function of the same weights."""
    folder = shutil.copytree(models / "model", tmp_path / "tuned")
    flags = ["--objective", "stm", "--ref-cache", "x", "--ref-hf-model", folder]
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] *= 2
    (folder / "config.json").write_text(json.dumps(config))
    assert read(models, *flags)[0].folder == folder
    config["rope_parameters"]["rope_theta"] *= 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArgumentsError, match=r"another architecture .*: rotary_base is "):
        read(models, *flags)


def test_a_reference_may_be_opened_to_be_logged(models):
    flags = ["--objective", "sft", "--log-reference", "--ref-cache", "x"]
    model, folder = read(models, *flags)
    assert (model.folder, str(folder)) == (models / "model", "x")


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
def test_a_ranking_by_excess_loss_needs_another_model(models, scope):
    flags = ["--objective", "rho1", "--rank-scope", scope, "--save", models / "out"]
    with pytest.raises(ArgumentsError, match="rho1 ranks by what the reference knows"):
        read(models, *flags)
    model, _ = read(models, *flags, "--ref-hf-model", models / "model")
    assert model.folder == models / "model"


def test_the_default_reference_is_not_another_checkpoint(models, tmp_path):
    flags = ["--objective", "stm", "--ref-cache", "x", "--pretrained-checkpoint", tmp_path]
    with pytest.raises(ArgumentsError, match="name the reference with --ref-hf-model"):
        read(models, *flags)
    flags[-2:] = ["--load", tmp_path, "--finetune"]
    with pytest.raises(ArgumentsError, match=r"starts from --load with --finetune; name the ref"):
        read(models, *flags)


def test_the_model_itself_is_the_default(models):
    flags = ["--objective", "stm", "--save", models / "out"]
    model, folder = read(models, *flags)
    assert model.folder == models / "model"
    assert folder == models / "out" / "ref_log_prob"
