"""Adapters without Megatron: PEFT folders in both directions, and the merge, compared with PEFT itself."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_megatron_to_hf import save_run
from tiny_gated_delta_net import make_model as make_delta_net
from tiny_gated_delta_net import pack_experts
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from checkpoint_conversion.adapters.merge import merged
from checkpoint_conversion.adapters.options import (
    ALL_LINEAR,
    LoraOptions,
    adapter_rules,
    projections,
    resolved,
)
from checkpoint_conversion.adapters.peft_folder import open_peft_folder, plan_adapter_output
from checkpoint_conversion.adapters.saved import digest_of_weights, noted_options
from checkpoint_conversion.engine.dtypes import DTYPES, F32
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import family_for
from checkpoint_conversion.hf.folder import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    WEIGHTS,
    list_tensors,
    read_hf_config,
)
from checkpoint_conversion.hf.model import expected_shapes, open_hf_model
from checkpoint_conversion.hf.writer import HFWriter, TensorSpec, write_tensors
from checkpoint_conversion.hf_to_megatron import hf_to_megatron
from checkpoint_conversion.in_transformers import with_adapters

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENS = torch.arange(1, 25)[None]


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Let PEFT write adapters with random A and B."""

    def make(hf: Path, name: str = "adapter", **options: object) -> Path:
        settings = {"r": 5, "lora_alpha": 7, "target_modules": [*ALL], **options}
        model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
        peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in peft.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0.0, 0.2, generator=generator)
        peft.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def write_merged(hf: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    """Merge through the readers and writers of a conversion."""
    model, folder = open_hf_model(hf), open_peft_folder(adapter, read_hf_config(hf))
    weights = merged(model, folder.weights, folder.options.scale, model.rules)
    tensors = {
        name: TensorSpec(shape, DTYPES[model.tensors[name].dtype])
        for name, shape in expected_shapes(model.rules).items()
    }
    out.mkdir()
    with HFWriter(out, tensors, dict.fromkeys(tensors, WEIGHTS)) as writer:
        write_tensors(weights, tensors, writer)
    return load_file(out / WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_merge_is_that_of_peft_bit_for_bit(make_qwen3, make_adapter, tmp_path, dtype):
    hf = make_qwen3(dtype=dtype)
    adapter = make_adapter(hf, use_rslora=True)
    own = write_merged(hf, adapter, tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    assert own.keys() == list_tensors(hf).keys()
    for name, values in own.items():
        assert torch.equal(values, expected[name].to(dtype)), name


def test_a_small_projection_may_have_fewer_rows_than_the_rank(make_adapter, tmp_path):
    hf = make_delta_net(tmp_path / "hf", "qwen3.5")
    targets = ["in_proj_b", "in_proj_z"]  # of 6 and 120 rows
    own = write_merged(hf, make_adapter(hf, r=9, target_modules=targets), tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, values in own.items():
        torch.testing.assert_close(values, expected[name], rtol=0, atol=1e-6)


def test_peft_opens_a_folder_that_was_written_here(make_qwen3, make_adapter, tmp_path):
    hf = make_qwen3()
    config = read_hf_config(hf)
    folder = open_peft_folder(make_adapter(hf), config)
    output = plan_adapter_output(tmp_path / "own", hf, config, folder.options, F32)
    with output.writer() as (_, writer):
        write_tensors(folder.weights, output.tensors, writer)
    base = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    own = PeftModel.from_pretrained(base, tmp_path / "own")
    assert own.peft_config["default"].target_modules == {*ALL}
    with torch.no_grad():
        logits = own(TOKENS).logits
        base = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
        expected = PeftModel.from_pretrained(base, folder.weights.folder)(TOKENS).logits
    assert torch.equal(logits, expected)
    assert open_peft_folder(tmp_path / "own", config).options == folder.options


def test_adapters_of_a_model_with_a_vision_tower_work_on_its_language_model_too(tmp_path):
    """Its folder, and so an exported adapter, has the names of the whole model."""
    hf = make_delta_net(tmp_path / "model", "qwen3.5-vision")
    whole = AutoModelForImageTextToText.from_pretrained(hf, dtype=torch.float32)
    options = LoraConfig(
        r=3,
        target_modules=["q_proj", "in_proj_qkv"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    trained = get_peft_model(whole, options)
    trained.save_pretrained(tmp_path / "adapter")
    opened = open_peft_folder(tmp_path / "adapter", read_hf_config(hf))
    assert all("language_model" in name for name in opened.weights.tensors)

    def language_model() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)

    adapted = with_adapters(language_model(), tmp_path / "adapter")
    with torch.no_grad():
        expected = trained(input_ids=TOKENS).logits
        assert torch.equal(adapted(TOKENS).logits, expected)
        assert not torch.allclose(language_model()(TOKENS).logits, expected, atol=1e-2)

    adapted.save_pretrained(
        tmp_path / "alone"
    )  # as a trainer of the language model alone writes it
    names = load_file(tmp_path / "alone" / ADAPTER_WEIGHTS).keys()
    assert not any("language_model" in name for name in names)
    again = open_peft_folder(tmp_path / "alone", read_hf_config(hf))
    assert again.weights.tensors.keys() == opened.weights.tensors.keys()


def test_adapters_that_would_have_no_effect_are_refused(make_qwen3, make_adapter):
    hf = make_qwen3()
    file = make_adapter(hf) / ADAPTER_WEIGHTS
    save_file({f"base_model.model.other.{k}": v for k, v in load_file(file).items()}, file)
    base = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    with pytest.raises(ConversionError, match="they would have no effect"):
        with_adapters(base, file.parent)


@pytest.mark.parametrize(
    ("targets", "warned", "found"),
    [
        (("gate_proj", "up_proj"), "are on gate_proj, up_proj; PEFT", "have other names"),
        (("gate_proj", "up_proj", "down_proj"), "in silence", "leaves out .*shared_expert"),
    ],
)
def test_adapters_that_peft_leaves_out_are_an_error(tmp_path, run_command, targets, warned, found):
    """It joins the adapters of experts, and then drops the shared expert's, which have the same names."""
    hf = make_delta_net(tmp_path / "hf", "qwen3-next")
    run = checkpoint_of_adapters(tmp_path / "run", hf, hf, targets)
    command = ("megatron_to_hf", "--megatron", run, "--hf-template", hf)
    assert warned in run_command(*command, "--export-adapter", tmp_path / "adapter").out
    with pytest.raises(ConversionError, match=found):
        with_adapters(AutoModelForCausalLM.from_pretrained(hf), tmp_path / "adapter")


def test_an_adapter_of_some_projections_keeps_its_targets(make_qwen3, make_adapter):
    hf = make_qwen3()
    options = open_peft_folder(
        make_adapter(hf, target_modules=r".*\.(up_proj|q_proj)"), read_hf_config(hf)
    ).options
    assert options == LoraOptions(5, 7, ("q_proj", "up_proj"))


def change(folder: Path, **values: object) -> None:
    content = json.loads((folder / ADAPTER).read_text())
    (folder / ADAPTER).write_text(json.dumps({**content, **values}))


BROKEN_CONFIGS = {
    "another kind": ({"peft_type": "IA3"}, "peft_type='IA3'"),
    "dora": ({"use_dora": True}, "use_dora='True', which is not supported"),
    "a rank of some layers": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern="),
    "trained biases": ({"bias": "all"}, "bias='all'"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
    "an option of the future": ({"use_xlora": {"depth": 3}}, "use_xlora="),
    "a changed base": ({"init_lora_weights": "pissa"}, "changes the weights of the base"),
    "a text as rank": ({"r": "5"}, "rank of adapters is '5'"),
    "no alpha": ({"lora_alpha": None}, "alpha of adapters is None"),
    "a dropout of everything": ({"lora_dropout": 1.0}, "dropout of adapters is 1.0"),
    "another rank": ({"r": 4}, r"has shape \[5, 64\]; adapter_config.json \(rank 4\)"),
}


@pytest.mark.parametrize("case", BROKEN_CONFIGS)
def test_options_that_would_be_lost_are_refused(make_qwen3, make_adapter, case):
    hf = make_qwen3()
    folder = make_adapter(hf)
    values, message = BROKEN_CONFIGS[case]
    change(folder, **values)
    with pytest.raises(ConversionError, match=message):
        open_peft_folder(folder, read_hf_config(hf))


def _with_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


NAME = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
BROKEN_TENSORS = {
    "missing": (lambda t: t.pop(NAME), f"no tensor {NAME}"),
    "extra": (
        lambda t: t.update({"base_model.model.lm_head.weight": t[NAME].clone()}),
        "unknown tensor",
    ),
    "misshapen": (lambda t: t.update({NAME: t[NAME][1:].clone()}), f"{NAME} has shape"),
    "of integers": (lambda t: t.update({NAME: t[NAME].int()}), f"{NAME} is I32"),
    "of another projection": (
        lambda t: t.update({NAME.replace("k_proj", "z_proj"): t[NAME].clone()}),
        "'z_proj' is no projection of this model; it has q_proj",
    ),
}


@pytest.mark.parametrize("case", BROKEN_TENSORS)
def test_other_tensors_than_the_options_call_for_are_refused(make_qwen3, make_adapter, case):
    hf = make_qwen3()
    folder = make_adapter(hf)
    edit, message = BROKEN_TENSORS[case]
    _with_tensors(folder, edit)
    with pytest.raises(ConversionError, match=message):
        open_peft_folder(folder, read_hf_config(hf))


def test_a_folder_without_its_parts_is_refused(make_qwen3, make_adapter, tmp_path):
    hf = make_qwen3()
    config = read_hf_config(hf)
    with pytest.raises(ConversionError, match="no such folder"):
        open_peft_folder(tmp_path / "none", config)
    with pytest.raises(ConversionError, match=r"adapter_config\.json: missing"):
        open_peft_folder(hf, config)
    folder = make_adapter(hf)
    (folder / ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(ConversionError, match="pickled adapters"):
        open_peft_folder(folder, config)


def _rules(hf: Path) -> tuple:
    config = read_hf_config(hf)
    return family_for(config).tensor_rules(config)


def test_targets_and_ranks_that_do_not_fit_are_named(qwen3):
    rules = _rules(qwen3)
    every = resolved(rules, LoraOptions(4, 8, (ALL_LINEAR,)))
    assert every.targets == ALL
    with pytest.raises(ConversionError, match="'qkv_proj' is no projection of this model"):
        projections(rules, LoraOptions(4, 8, ("q_proj", "qkv_proj")))
    with pytest.raises(ConversionError, match=r"the rank 65 is above the dimensions of q_proj"):
        projections(rules, LoraOptions(65, 8, ("k_proj", "q_proj")))
    with pytest.raises(ConversionError, match="at least 1"):
        LoraOptions(0, 8, ("q_proj",))


def test_the_scale_is_alpha_over_rank_or_over_its_root():
    assert LoraOptions(16, 32, ("q_proj",)).scale == 2
    assert LoraOptions(16, 32, ("q_proj",), rslora=True).scale == 8


def checkpoint_of_adapters(
    folder: Path, hf: Path, base: Path, targets: tuple[str, ...] = ("q_proj",)
) -> Path:
    """Write the checkpoint of a run that trained adapters of a model on the weights of a folder."""
    options = LoraOptions(2, 4, targets)
    rules = adapter_rules(_rules(hf), options)
    save_run(folder, {rule.megatron: torch.randn(rule.megatron_shape) for rule in rules})
    notes = {"path": str(base), "digest": digest_of_weights(base)}
    run = {"lora": noted_options(options), "base": notes}
    (folder / "iter_0000007" / "megatron_profit.json").write_text(
        json.dumps({"iteration": 7, "run": run})
    )
    return folder


@pytest.mark.parametrize("flags", [(), ("--logits",)])
def test_a_checkpoint_of_adapters_cannot_be_compared(make_qwen3, tmp_path, run_command, flags):
    hf = make_qwen3()
    run = checkpoint_of_adapters(tmp_path / "run", hf, hf)
    result = run_command("verify", "--hf", hf, "--megatron", run, *flags)
    assert (result.code, result.out) == (2, "")
    assert "holds adapters and no weights; merge them with megatron_to_hf" in result.err


def test_a_peft_folder_is_written_for_its_own_base_alone(make_qwen3, tmp_path, run_command):
    """The hash is the one of the weights: a model of the same shapes would give another function."""
    hf, other, out = make_qwen3(), make_qwen3("other"), tmp_path / "adapter"
    run = checkpoint_of_adapters(tmp_path / "run", hf, hf)
    to_adapter = ("megatron_to_hf", "--megatron", run, "--export-adapter", out, "--hf-template")
    refused = run_command(*to_adapter, other)
    assert refused.code == 2
    assert f"{other} is not the base of the adapters in {run / 'iter_0000007'}" in refused.err
    assert not out.exists()
    assert run_command(*to_adapter, other, "--dry-run").code == 2
    assert run_command(*to_adapter, hf).code == 0
    assert run_command(*to_adapter, other, "--any-base", "--overwrite").code == 0


def test_the_base_of_a_peft_folder_may_be_a_megatron_checkpoint(make_qwen3, tmp_path, run_command):
    hf = make_qwen3()
    hf_to_megatron(hf, tmp_path / "base")
    run = checkpoint_of_adapters(tmp_path / "run", hf, tmp_path / "base" / "release")
    command = ("megatron_to_hf", "--megatron", run, "--hf-template", hf)
    command += ("--export-adapter", tmp_path / "adapter")
    assert "is not the base of the adapters" in run_command(*command).err
    assert run_command(*command, "--base", tmp_path / "base").code == 0


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.norm.weight",
    ],
)
def test_a_peft_folder_does_not_name_another_model_than_its_base(
    make_qwen3, tmp_path, run_command, tensor
):
    """The base went on from the template: all tensors but one are still equal."""
    hf, continued = make_qwen3(), make_qwen3("hg")
    weights = load_file(continued / WEIGHTS)
    assert all(torch.equal(w, load_file(hf / WEIGHTS)[n]) for n, w in weights.items())
    weights[tensor] += 0.5
    save_file(weights, continued / WEIGHTS, metadata={"format": "pt"})
    hf_to_megatron(continued, tmp_path / "base")
    run = checkpoint_of_adapters(tmp_path / "run", hf, tmp_path / "base" / "release")
    command = ("megatron_to_hf", "--megatron", run, "--base", tmp_path / "base")
    command += ("--export-adapter", tmp_path / "adapter", "--hf-template")
    refused = run_command(*command, hf)
    assert refused.code == 2
    assert f"would name {hf} as its base" in refused.err
    assert f"another {tensor}; write merged weights (--out)" in refused.err
    assert not (tmp_path / "adapter").exists()
    assert run_command(*command, continued).code == 0
    assert run_command(*command, hf, "--any-base", "--overwrite").code == 0
    assert run_command(*command[:5], "--out", tmp_path / "m", "--hf-template", hf).code == 0


def test_a_base_that_was_converted_in_another_dtype_is_the_templates(
    make_qwen3, tmp_path, run_command
):
    hf = make_qwen3()
    hf_to_megatron(hf, tmp_path / "base", dtype="bf16")
    run = checkpoint_of_adapters(tmp_path / "run", hf, tmp_path / "base" / "release")
    command = (
        "megatron_to_hf",
        "--megatron",
        run,
        "--base",
        tmp_path / "base",
        "--hf-template",
        hf,
    )
    assert run_command(*command, "--export-adapter", tmp_path / "adapter").code == 0


@pytest.mark.parametrize("has_base", [False, True])
def test_adapters_of_experts_are_merged_in_whatever_form_the_template_stores_the_experts(
    tmp_path, run_command, has_base
):
    single = make_delta_net(tmp_path / "single", "qwen3-next")
    packed = make_delta_net(tmp_path / "packed", "qwen3-next-packed")
    hf_to_megatron(single, tmp_path / "base")
    run, found = tmp_path / "run", []
    torch.manual_seed(1)
    for hf in (single, packed):
        base = tmp_path / "base" / "release" if has_base else hf
        checkpoint_of_adapters(run, single, base, ("gate_proj", "down_proj", "q_proj"))
        torch.manual_seed(1)
        command = (
            "megatron_to_hf",
            "--megatron",
            run,
            "--hf-template",
            hf,
            "--max-shard-size",
            "1GB",
        )
        flags = ("--base", tmp_path / "base") if has_base else ()
        assert run_command(*command, "--out", tmp_path / f"{hf.name}-out", *flags).code == 0
        if hf == single:
            pack_experts(tmp_path / "single-out")
        found.append(load_file(tmp_path / f"{hf.name}-out" / WEIGHTS))
        shutil.rmtree(run)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    before = load_file(packed / WEIGHTS)
    name = "model.layers.0.mlp.experts.down_proj"
    assert not torch.equal(before[name], found[1][name])


@pytest.mark.parametrize("flags", [("--dry-run",), (), ("--dtype", "bf16")])
def test_a_base_of_several_dtypes_in_one_megatron_tensor(make_qwen3, tmp_path, run_command, flags):
    hf = make_qwen3(dtype=torch.bfloat16)
    weights = load_file(hf / WEIGHTS)
    name = "model.layers.0.self_attn.v_proj.weight"
    weights[name] = weights[name].float() * (1 + 1e-4)
    save_file(weights, hf / WEIGHTS, metadata={"format": "pt"})
    run = checkpoint_of_adapters(tmp_path / "run", hf, hf)
    command = ("megatron_to_hf", "--megatron", run, "--hf-template", hf, "--out", tmp_path / "out")
    result = run_command(*command, *flags)
    assert result.code == 0, result.err
    if flags != ("--dry-run",):
        written = load_file(tmp_path / "out" / WEIGHTS)[name]
        assert torch.equal(written, weights[name].bfloat16() if flags else weights[name])


def test_both_outputs_are_checked_before_either_is_written(make_qwen3, tmp_path, run_command):
    """Else the same command fails the second time, since one of its outputs is there."""
    hf, out, adapter = make_qwen3(), tmp_path / "out", tmp_path / "adapter"
    run = checkpoint_of_adapters(tmp_path / "run", hf, hf)
    command = ("megatron_to_hf", "--megatron", run, "--hf-template", hf)
    command += ("--out", out, "--export-adapter", adapter)
    for filled, other in ((out, adapter), (adapter, out)):
        filled.mkdir()
        (filled / "notes.txt").write_text("mine")
        refused = run_command(*command)
        assert refused.code == 2
        assert f"{filled} is not empty" in refused.err
        assert not other.exists()
        (filled / "notes.txt").unlink()
        filled.rmdir()
    assert run_command(*command).code == 0
    assert (out / WEIGHTS).exists()
    assert (adapter / ADAPTER_WEIGHTS).exists()


def test_an_adapter_of_another_architecture_is_refused_by_the_saved_arguments(
    make_qwen3, tmp_path, run_command
):
    hf = make_qwen3()
    run = checkpoint_of_adapters(tmp_path / "run", hf, hf)
    arguments = argparse.Namespace(rotary_base=10_000)
    torch.save({"args": arguments, "iteration": 7}, run / "iter_0000007" / "common.pt")
    command = ("megatron_to_hf", "--megatron", run, "--hf-template", hf)
    command += ("--export-adapter", tmp_path / "adapter")
    assert "rotary_base is 10000 in the checkpoint and 500000" in run_command(*command).err
    assert run_command(*command, "--ignore-arguments").code == 0


@pytest.mark.parametrize("flags", [("--max-shard-size", "1MB"), ("--any-carried",)])
def test_flags_of_merged_weights_are_refused_for_adapters_alone(run_command, flags):
    folders = ("--megatron", "m", "--hf-template", "hf", "--export-adapter", "adapter")
    result = run_command("megatron_to_hf", *folders, *flags)
    assert result.code == 2
    assert f"{flags[0]} is about --out, which is missing" in result.err
