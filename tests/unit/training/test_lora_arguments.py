"""The flags of adapters: what they ask for, and what is refused before the run begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_arguments import CONFIG
from transformers import Qwen3Config, Qwen3ForCausalLM

from checkpoint_conversion.adapters.saved import digest_of_weights
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf_to_megatron import hf_to_megatron
from megatron_profit.flags import ArgumentsError
from megatron_profit.training.arguments.derive import RunSettings, derive
from megatron_profit.training.arguments.disk import RunFiles, open_files

REQUIRED = "--data a.jsonl --seq-length 64 --micro-batch-size 2 --lr 1e-5 --train-iters 9"
SFT = ("--objective", "sft")
RANDOM = "--random-init"


@pytest.fixture
def parse(tmp_path: Path):
    """Parse flags on top of the required ones, and open what they name."""
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))

    def run(flags: str, objective: tuple[str, ...] = SFT) -> tuple[RunSettings, RunFiles]:
        rest = [*REQUIRED.split(), *objective, *flags.split()]
        settings = derive(["--hf-model", str(folder), *rest], "cpu", 1)
        return settings, open_files(settings)

    return run


def test_a_rank_alone_gives_adapters_to_every_projection(parse):
    settings, files = parse(f"--lora-rank 8 {RANDOM}")
    options = files.lora.options
    assert options == settings.lora
    assert (options.rank, options.alpha, options.dropout, options.scale) == (8, 16, 0.0, 2)
    assert " ".join(options.targets) == "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    sizes = 64 * 4 + 2 * (256 + 128) + 3 * (64 + 96)
    assert settings.values["lora_active_parameters"] == 4 * 8 * sizes
    settings, files = parse(RANDOM)
    assert (settings.lora, files.lora, settings.values["lora_active_parameters"]) == (None,) * 3


def test_every_option_reaches_the_adapters(parse):
    flags = (
        "--lora-rank 4 --lora-alpha 3 --lora-dropout 0.1 --lora-rslora --lora-targets v_proj q_proj"
    )
    options = parse(f"{flags} {RANDOM}")[0].lora
    assert (options.alpha, options.dropout, options.rslora) == (3, 0.1, True)
    assert options.targets == ("q_proj", "v_proj")
    assert options.scale == 1.5


REFUSED = {
    "--lora-alpha 3": "--lora-alpha is for adapters; give --lora-rank too",
    "--lora-rslora": "--lora-rslora is for adapters; give --lora-rank too",
    "--lora-targets q_proj": "--lora-targets is for adapters",
    "--lora-dropout 0.1": "--lora-dropout is for adapters",
    "--lora-adapter x": "--lora-adapter is for adapters",
    "--export-adapter x": "--export-adapter is for adapters",
    "--lora-rank 0": "--lora-rank 0: the rank of adapters is 0; it must be at least 1",
    "--lora-rank 65": "above the dimensions of q_proj [256, 64], the largest of the targets; give at most 64",
    "--lora-rank 4 --lora-targets q_proj w_proj": "the target 'w_proj' is no projection of this model",
    "--lora-rank 4 --lora-dropout 1": "the dropout of adapters is 1.0",
    "--lora-rank 4 --lora-alpha nan": "the alpha of adapters is nan",
    "--lora-rank 4 --save s": "drop it, or --save and --load",
    "--lora-rank 4 --ref-mode cache": "--ref-mode is for objectives with a reference model",
    "--lora-rank 4 --use-transformer-engine-op-fuser": "leaves adapters out",
    "--lora-rank 4 --tp-comm-overlap": "give --disable-tp-comm-bulk-wgrad, or drop it",
    "--lora-alpha 0": "--lora-alpha is for adapters",
    "--lora-dropout 0": "--lora-dropout is for adapters",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_flags_that_would_be_ignored_or_cannot_be_met_are_refused(parse, flags):
    with pytest.raises((ArgumentsError, ConversionError)) as error:
        parse(f"{flags} {RANDOM}")
    assert REFUSED[flags] in str(error.value)


def test_the_flag_that_an_error_names_is_accepted(parse):
    more = "--tp-comm-overlap --disable-tp-comm-bulk-wgrad --tensor-model-parallel-size 1"
    assert parse(f"--lora-rank 4 {more} {RANDOM}")[0].lora is not None


def test_weights_are_needed_that_the_adapters_belong_to(parse, tmp_path):
    with pytest.raises(ConversionError, match="no weights"):
        parse("--lora-rank 4")
    with pytest.raises(ConversionError, match="no such folder"):
        parse(f"--lora-rank 4 --pretrained-checkpoint {tmp_path / 'none'}")


def test_the_frozen_base_is_the_reference_unless_another_one_is_named(parse, tmp_path):
    asft = ("--objective", "asft")
    assert parse(f"--lora-rank 4 {RANDOM}", asft)[1].reference is None
    with pytest.raises(ArgumentsError, match="needs a place for the log-probabilities"):
        parse(f"--lora-rank 4 --ref-mode cache {RANDOM}", asft)
    with pytest.raises(ArgumentsError, match="is for --ref-mode cache"):
        parse(f"--lora-rank 4 --ref-mode adapter-off --ref-cache {tmp_path} {RANDOM}", asft)
    with pytest.raises(ArgumentsError, match="--ref-mode adapter-off is for adapters"):
        parse(f"--ref-mode adapter-off {RANDOM}", asft)
    with pytest.raises(ArgumentsError, match="--cuda-graph-impl local records the model"):
        parse(f"--lora-rank 4 --cuda-graph-impl local {RANDOM}", asft)
    rho1 = ("--objective", "rho1", "--keep-fraction", "0.5")
    with pytest.raises(ArgumentsError, match="give --ref-mode adapter-off"):
        parse(f"--lora-rank 4 --ref-cache {tmp_path} {RANDOM}", rho1)
    assert parse(f"--lora-rank 4 --ref-mode adapter-off {RANDOM}", rho1)[1].reference is None


def test_operations_leave_out_gradients_of_frozen_weights(parse):
    """Counted by hand: twice the weights that a token meets, forward and backward; adapters three times."""
    from megatron.training import training

    from megatron_profit.megatron_patches import megatron as patches

    whole = training.num_floating_point_operations
    settings = parse(f"--lora-rank 4 {RANDOM}")[0].namespace
    try:
        patches._count_operations_of_adapters()
        counted = training.num_floating_point_operations(settings, 2)
    finally:
        training.num_floating_point_operations = whole
    tokens = 2 * 64
    layer = 64 * (256 + 2 * 128) + 256 * 64 + 3 * 64 * 96
    weights = 4 * layer + 64 * settings.padded_vocab_size
    attention = whole(settings, 2) - whole(settings, 2, 0, tokens)
    expected = 4 * weights * tokens + attention + 6 * settings.lora_active_parameters * tokens
    assert counted == pytest.approx(expected, rel=1e-9)


def test_an_adapter_names_the_model_of_its_frozen_weights(parse, tmp_path):
    """A converted checkpoint of the folder is the same model; one that was trained further is not."""
    hf = tmp_path / "hf"
    (hf / "config.json").unlink()
    hf.rmdir()
    Qwen3ForCausalLM(Qwen3Config(**CONFIG)).save_pretrained(hf)
    hf_to_megatron(hf, tmp_path / "base")
    flags = f"--lora-rank 4 --export-adapter {tmp_path / 'own'} --pretrained-checkpoint "
    flags += str(tmp_path / "base")
    assert parse(flags)[1].lora.output is not None
    weights = load_file(hf / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"] += 1
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ArgumentsError, match=r"have another model\.layers\.3\.mlp\.down_proj\.weight"
    ):
        parse(flags)
    (hf / "model.safetensors").unlink()
    with pytest.raises(ArgumentsError, match=r"cannot be compared .* leave --export-adapter out"):
        parse(flags)


def test_a_run_has_one_start(parse, tmp_path):
    """A resume does not read --lora-adapter again; with --finetune, --load would take its place unsaid."""
    hf, save = tmp_path / "hf", tmp_path / "save" / "iter_0000007"
    Qwen3ForCausalLM(Qwen3Config(**CONFIG)).save_pretrained(hf)
    save.mkdir(parents=True)
    (save.parent / "latest_checkpointed_iteration.txt").write_text("7")
    notes = {"rank": 4, "alpha": 8, "targets": ["q_proj"]}
    base = {"path": str(hf), "digest": digest_of_weights(hf)}
    (save / "megatron_profit.json").write_text(json.dumps({"run": {"lora": notes, "base": base}}))
    flags = (
        f"--lora-rank 4 --lora-targets q_proj --load {save.parent} --lora-adapter {tmp_path}/gone"
    )
    assert parse(flags)[1].lora.start is None
    with pytest.raises(ArgumentsError, match="with --finetune are two starts; drop one"):
        parse(f"{flags} --finetune")


def test_a_licence_that_cannot_be_copied_is_named_before_the_training(parse, tmp_path):
    (tmp_path / "elsewhere").write_text("terms")
    (tmp_path / "hf" / "tokens.txt").symlink_to(tmp_path / "elsewhere")
    export = f"--lora-rank 4 --export-adapter {tmp_path / 'own'} {RANDOM}"
    assert parse(export)[1].lora.output is not None, "adapters take no other file of the base"
    (tmp_path / "hf" / "LICENSE").symlink_to(tmp_path / "elsewhere")
    for flags in (export, f"--export-hf {tmp_path / 'merged'} {RANDOM}"):
        with pytest.raises(ConversionError, match=r"LICENSE is a link to .*elsewhere, outside"):
            parse(flags)


def test_exports_of_adapters_count_where_exports_are_asked_for(parse, tmp_path):
    adapter, hf = tmp_path / "own", tmp_path / "own" / "hf"
    settings, files = parse(f"--lora-rank 4 --export-adapter {adapter} --overwrite {RANDOM}")
    assert files.lora.output.folder == adapter
    assert files.lora.output.options == settings.lora
    with pytest.raises(ConversionError, match="are two outputs in one place"):
        parse(f"--lora-rank 4 --export-adapter {adapter} --export-hf {hf} {RANDOM}")
