"""Checkpoints of adapters: resumed at another layout, refused on another base, exported in both forms."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from killable_runs import Job, killed_in_save, tensors
from layouts import assert_same_steps, parse
from peft import PeftModel
from plain_lora import TARGETS, write_adapter
from plain_objectives import CASES
from plain_training import Plan, train
from safetensors.torch import load_file, save_file
from tiny_models import EXAMPLES
from transformers import AutoModelForCausalLM

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.megatron_to_hf import export_adapter, megatron_to_hf

PLAN = Plan(EXAMPLES / "arithmetic_chatty.jsonl", steps=4, batch=8, clip_grad=1.0, rate=1e-2)
LAYOUTS = ("2 tp2 sp mb4 sharded reshardable", "2 pp2 mb2 sharded")


@dataclass(frozen=True)
class Run:
    """A run that was interrupted at iteration 2 and went on at another layout to iteration 4."""

    hf: Path
    adapter: Path
    folder: Path

    def flags(self, layout: str) -> tuple[object, ...]:
        ranks, flags = parse(layout)
        lora = ("--lora-rank", 4, "--lora-alpha", 6, "--lora-adapter", self.adapter)
        return (ranks, "--hf-model", self.hf, *lora, *PLAN.flags, *CASES["sft"].flags, *flags)

    @property
    def save(self) -> Path:
        return self.folder / "save"


@pytest.fixture(scope="module")
def resumed(sft, tied_model, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("resumed")
    run = Run(tied_model.hf, write_adapter(tied_model.hf, folder / "adapter"), folder)
    curves = ("--tensorboard-dir", folder / "curves")
    first = ("--save", run.save, "--save-interval", 2, "--exit-interval", 2)
    sft(*run.flags(LAYOUTS[0]), *first, *curves)
    exports = ("--export-hf", folder / "merged", "--export-adapter", folder / "own")
    second = ("--save", run.save, "--load", run.save, "--save-interval", 2)
    sft(*run.flags(LAYOUTS[1]), *second, *exports, *curves)
    return run


def test_adapters_continue_at_another_layout(resumed):
    expected = train(resumed.hf, PLAN, CASES["sft"], adapter=resumed.adapter)
    assert_same_steps(resumed.folder / "curves", expected)


def test_a_checkpoint_holds_adapters_alone(resumed):
    names = tensors(resumed.save / "iter_0000004")
    weights = [name for name in names if not name.startswith(("optimizer", "rng", "rerun"))]
    assert weights
    assert all(name.endswith(("lora_A", "lora_B")) for name in weights)
    assert {name.split(".")[-2] for name in weights} == set(TARGETS)


def test_both_exports_are_those_of_peft_and_of_the_conversion(resumed, tmp_path):
    own = load_file(resumed.folder / "own" / "adapter_model.safetensors")
    merged = load_file(resumed.folder / "merged" / "model.safetensors")
    export_adapter(resumed.save, resumed.hf, tmp_path / "adapter")
    megatron_to_hf(resumed.save, resumed.hf, tmp_path / "hf")
    base = AutoModelForCausalLM.from_pretrained(resumed.hf, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, resumed.folder / "own").merge_and_unload().state_dict()
    for here, there in (
        (own, load_file(tmp_path / "adapter" / "adapter_model.safetensors")),
        (merged, load_file(tmp_path / "hf" / "model.safetensors")),
        (merged, {name: peft[name] for name in merged}),
    ):
        assert here.keys() == there.keys()
        assert not [name for name in here if not torch.equal(here[name], there[name])]


def written(folder: Path) -> dict[Path, int]:
    """When each file of a save folder was written; a lock is taken at every start."""
    files = (file for file in folder.rglob("*") if file.name != ".in_use")
    return {file: file.stat().st_mtime_ns for file in files}


def test_another_base_is_refused_before_anything_is_written(sft, resumed, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(resumed.hf, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    files = written(resumed.save)
    ranks, *flags = resumed.flags(LAYOUTS[1])
    flags[flags.index("--hf-model") + 1] = other
    result = sft(ranks, *flags, "--load", resumed.save, "--save", resumed.save, check=False)
    assert result.returncode
    assert f"the frozen weights are others: {other} (was {resumed.hf})" in result.stdout
    assert "--allow-change base" in result.stdout
    assert written(resumed.save) == files
    with pytest.raises(ConversionError, match="is not the base of the adapters in"):
        megatron_to_hf(resumed.save, other, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    megatron_to_hf(resumed.save, other, tmp_path / "hf", any_base=True)


@pytest.mark.slow
def test_a_run_that_was_killed_in_a_save_continues_at_another_layout(sft, resumed, tmp_path):
    expected = train(resumed.hf, PLAN, CASES["sft"], adapter=resumed.adapter)
    curves, save = ("--tensorboard-dir", tmp_path / "curves"), ("--save", tmp_path / "save")
    every = ("--save-interval", 1, *curves)
    ranks, *flags = resumed.flags(LAYOUTS[0])
    job = Job(ranks, [*flags, *save, *every, "--lr-decay-style", "constant"], tmp_path / "log")
    killed_in_save(3, "machine", 0.02)(job)
    sft(*resumed.flags(LAYOUTS[1]), *save, "--load", tmp_path / "save", *every)
    assert_same_steps(tmp_path / "curves", expected)


@pytest.mark.slow
def test_the_best_checkpoint_is_exported(sft, resumed, tmp_path):
    best = ("--keep-best", "lm loss", "--export-best", "--eval-interval", 1, "--save-interval", 1)
    folders = ("--save", tmp_path / "save", "--export-adapter", tmp_path / "own")
    flags = resumed.flags("1 mb8")
    valid = ("--valid-data", PLAN.data, "--eval-iters", 1, "--export-hf", tmp_path / "merged")
    rate = ("--lr", 3.0, "--min-lr", 3.0)  # which only makes it worse after the first step
    result = sft(*flags, *valid, *best, *folders, *rate)
    (iteration,) = re.findall(r"exporting the weights of .*iter_0*(\d+)", result.stdout)
    export_adapter(tmp_path / "save", resumed.hf, tmp_path / "adapter", iteration=int(iteration))
    own, there = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("own", "adapter")
    )
    assert not [name for name in own if not torch.equal(own[name], there[name])]


@pytest.mark.slow
def test_in_bf16_the_base_has_no_state_and_merging_rounds_once(sft, resumed, tmp_path):
    hf = tmp_path / "hf"
    shutil.copytree(resumed.hf, hf)
    weights = load_file(hf / "model.safetensors")
    save_file(
        {n: w.bfloat16() for n, w in weights.items()}, hf / "model.safetensors", {"format": "pt"}
    )
    ranks, *flags = resumed.flags("2 tp2 sp mb4 sharded reshardable")
    flags[flags.index("--hf-model") + 1] = hf
    exports = ("--export-hf", tmp_path / "merged", "--export-adapter", tmp_path / "own")
    sft(ranks, *flags, "--bf16", "--save", tmp_path / "save", *exports)
    names = tensors(tmp_path / "save" / "iter_0000004")
    state = [name for name in names if name.startswith("optimizer.state")]
    assert {name.split(".")[2] for name in state} == {"exp_avg", "exp_avg_sq", "param"}
    assert all(name.endswith(("lora_A", "lora_B")) for name in state)
    base = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, tmp_path / "own", autocast_adapter_dtype=False)
    expected = peft.merge_and_unload().state_dict()
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    megatron_to_hf(tmp_path / "save", hf, tmp_path / "converted")
    converted = load_file(tmp_path / "converted" / "model.safetensors")
    for name, values in merged.items():
        assert torch.equal(values, expected[name].bfloat16()), name
        assert torch.equal(values, converted[name]), name


@pytest.mark.slow
def test_a_converted_checkpoint_is_a_base(sft, tied_model, tmp_path):
    """Without --lora-adapter: B is 0, so that the first step is the base's."""
    start = ("--hf-model", tied_model.hf, "--lora-rank", 4, "--lora-targets", "o_proj", "up_proj")
    base = ("--pretrained-checkpoint", tied_model.megatron)
    folders = ("--save", tmp_path / "save", "--export-hf", tmp_path / "merged")
    ranks, flags = parse("2 tp2 sp mb4")
    sft(ranks, *start, *base, *PLAN.flags, *CASES["sft"].flags, *flags, *folders)
    megatron_to_hf(tmp_path / "save", tied_model.hf, tmp_path / "hf", base=tied_model.megatron)
    here, there = (load_file(tmp_path / n / "model.safetensors") for n in ("merged", "hf"))
    assert not [name for name in here if not torch.equal(here[name], there[name])]
    before = load_file(tied_model.hf / "model.safetensors")
    moved = {name.split(".")[-2] for name in here if not torch.equal(here[name], before[name])}
    assert moved == {"o_proj", "up_proj"}
    with pytest.raises(ConversionError, match="is not the base of the adapters"):
        megatron_to_hf(tmp_path / "save", tied_model.hf, tmp_path / "other")


@pytest.mark.slow
def test_a_new_run_from_adapters_of_another_base_is_refused(sft, resumed, tied_model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(resumed.hf, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    ranks, *flags = resumed.flags("1 mb8")
    first = flags.index("--lora-adapter")
    del flags[first : first + 2]
    start = ("--load", resumed.save, "--finetune")
    moved = sft(ranks, *flags, *start, "--hf-model", other, check=False)
    assert moved.returncode
    assert f"were trained on {resumed.hf}" in moved.stdout
    again = sft(ranks, *flags, *start, "--train-iters", 1)
    assert "adapters of rank 4" in again.stdout


OTHER_ADAPTERS = {
    "rank": (("--lora-rank", 8, "--lora-alpha", 6), "--lora-rank 8 (was 4)"),
    "scale": (("--lora-rank", 4, "--lora-alpha", 8), "--lora-alpha 8 (was 6)"),
    "none": ((), "holds adapters of rank 4 and no weights"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHER_ADAPTERS)
def test_other_adapters_than_the_checkpoint_holds_are_refused(sft, resumed, case):
    options, message = OTHER_ADAPTERS[case]
    ranks, layout = parse(LAYOUTS[1])
    model = ("--hf-model", resumed.hf, *options, "--load", resumed.save)
    result = sft(ranks, *model, *PLAN.flags, *CASES["sft"].flags, *layout, check=False)
    assert result.returncode
    assert message in result.stdout


@pytest.mark.slow
def test_a_pipeline_rank_without_adapters_trains_or_is_refused_at_the_start(sft, resumed, tmp_path):
    """The first rank has the embedding alone; Megatron could not load the checkpoint again."""
    ranks, *flags = resumed.flags("2 pp2 mb2")
    layout = ("--pipeline-model-parallel-layout", "E|ttttL")
    refused = sft(ranks, *flags, *layout, "--save", tmp_path / "save", check=False)
    assert refused.returncode
    assert "a pipeline rank has no layer with adapters" in refused.stdout
    sft(ranks, *flags, *layout, "--export-adapter", tmp_path / "own")
    expected = train(resumed.hf, PLAN, CASES["sft"], adapter=resumed.adapter).weights
    for name, value in load_file(tmp_path / "own" / "adapter_model.safetensors").items():
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-4)
