"""Every family: contents by formula, bit-exact round trips, and Megatron-Core's own model loads the result
and computes HuggingFace's logits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversion_helpers import assert_equal, read_hf, read_megatron
from test_megatron_to_hf import assert_same_tensors, save_run
from tiny_families import FAMILIES, LAYERS, make_family, megatron_tensors
from tiny_gated_delta_net import pack_experts
from transformers import AutoModelForCausalLM

from checkpoint_conversion.families import family_for
from checkpoint_conversion.hf.folder import read_hf_config
from checkpoint_conversion.hf_to_megatron import hf_to_megatron
from checkpoint_conversion.megatron_to_hf import megatron_to_hf
from checkpoint_conversion.verify import verify

FORMS = ("single", "packed")
SCRIPT = Path(__file__).parent / "megatron_core_logits.py"


@pytest.mark.parametrize("name", FAMILIES)
def test_contents_and_round_trip(tmp_path, name):
    hf = make_family(tmp_path / "hf", name, torch.bfloat16)
    hf_to_megatron(hf, tmp_path / "megatron")
    tensors, _ = read_megatron(tmp_path / "megatron" / "release")
    assert_equal(tensors, megatron_tensors(read_hf(hf)))
    assert not verify(hf, megatron=tmp_path / "megatron").differences
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back")
    assert_same_tensors(hf, tmp_path / "back")


@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3-moe-mixed"])
def test_experts_of_a_layer_in_two_tensors(tmp_path, name):
    """As a program writes them that saves the state dict of transformers 5 by itself."""
    single, packed = (make_family(tmp_path / form, name) for form in FORMS)
    pack_experts(packed)
    assert "model.layers.0.mlp.experts.gate_up_proj" in read_hf(packed)
    for hf in (single, packed):
        hf_to_megatron(hf, tmp_path / f"{hf.name}-megatron")
    one, other = (read_megatron(tmp_path / f"{f}-megatron" / "release")[0] for f in FORMS)
    assert_equal(one, other)
    for source, template in (FORMS, FORMS[::-1]):
        back = tmp_path / f"{template}-back"
        megatron_to_hf(tmp_path / f"{source}-megatron", tmp_path / template, back)
        assert_same_tensors(tmp_path / template, back)
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        models = map(AutoModelForCausalLM.from_pretrained, (single, packed))
        assert torch.equal(*(model(tokens).logits for model in models))


@pytest.mark.parametrize("form", FORMS)
def test_a_template_of_experts_needs_no_weights(tmp_path, form):
    """Small files alone were downloaded, or Git LFS has left a pointer in the weights' place."""
    template = make_family(tmp_path / "hf", "qwen3-moe")
    if form == "packed":
        pack_experts(template)
    names = dict.fromkeys(read_hf(template), "model-00001-of-00001.safetensors")
    hf_to_megatron(template, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", template, tmp_path / "expected")
    weights = template / "model.safetensors"
    weights.unlink()
    index = template / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    megatron_to_hf(tmp_path / "megatron", template, tmp_path / "back")
    assert_equal(read_hf(tmp_path / "back"), read_hf(tmp_path / "expected"))
    index.unlink()
    weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    megatron_to_hf(tmp_path / "megatron", template, tmp_path / "usual")
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in read_hf(tmp_path / "usual")


# Two of three layers in a chunk, an odd number of rows, a part of the columns.
GRIDS = {
    "layers": lambda key, size: [2, *size[1:]] if "layers" in key else size,
    "experts": lambda _, size: [1, 3, *size[2:]] if len(size) == 4 else size,
    "rows": lambda _, size: [*size[:-2], 7, size[-1]],
    "columns": lambda _, size: [*size[:-1], 13],
    "all": lambda key, size: [2 for _ in size[:-2]] + [11, 17],
}


def _one_expert_per_chunk(key, size):
    return [1, 1, *size[2:]] if len(size) == 4 else size


@pytest.mark.parametrize("absent", ["pre_mlp_layernorm", "mlp.linear_fc1.layer_norm_weight"])
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3-moe-mixed"])
def test_the_way_back_knows_the_names_of_both_layer_implementations(
    tmp_path, name, absent, per_layer
):
    hf = make_family(tmp_path / "hf", name)
    tensors = megatron_tensors(read_hf(hf))
    if per_layer and name == "qwen3-moe":
        stacked = {key: value for key, value in tensors.items() if "layers." in key}
        tensors = {key: value for key, value in tensors.items() if key not in stacked} | {
            key.replace("layers.", f"layers.{layer}."): value[layer]
            for key, value in stacked.items()
            for layer in range(LAYERS)
        }
    sparse = {key.split("mlp.router")[0] for key in tensors if "mlp.router" in key}
    tensors = {k: v for k, v in tensors.items() if k.split(absent)[0] not in sparse}
    save_run(tmp_path / "run", tensors, step=_one_expert_per_chunk)
    megatron_to_hf(tmp_path / "run", hf, tmp_path / "back")
    assert_same_tensors(hf, tmp_path / "back")


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["qwen3-moe", "qwen2"])
def test_any_chunk_grid(tmp_path, name, grid):
    """Experts and biases too, as tensor, expert-tensor, expert and uneven pipeline parallelism cut
    them."""
    hf = make_family(tmp_path / "hf", name, torch.bfloat16)
    save_run(tmp_path / "run", megatron_tensors(read_hf(hf)), step=GRIDS[grid])
    megatron_to_hf(tmp_path / "run", hf, tmp_path / "back")
    assert_same_tensors(hf, tmp_path / "back")


@pytest.mark.slow  # tests/distributed computes the logits of each family at one layout
def test_megatron_core_computes_the_logits_of_huggingface(tmp_path):
    """All families in one process: Megatron's own layers, loaded with its default strictness."""
    jobs = {}
    tokens = torch.randint(507, (2, 48), generator=torch.Generator().manual_seed(0))
    torch.save(tokens, tmp_path / "tokens.pt")
    for name in FAMILIES:
        hf = make_family(tmp_path / name, name)
        hf_to_megatron(hf, tmp_path / f"{name}-megatron")
        config = read_hf_config(hf)
        jobs[name] = family_for(config).megatron_arguments(config)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], check=True)
    for name in FAMILIES:
        reference = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        with torch.no_grad():
            expected = reference(tokens).logits
        assert expected.std() > 0.5, name
        logits = torch.load(tmp_path / f"{name}.pt")
        torch.testing.assert_close(
            logits, expected, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
        # Loaded as grouped experts and saved as such; the script tells how far that is Megatron's own.
        if "moe" in name:
            megatron_to_hf(tmp_path / f"{name}-grouped", tmp_path / name, tmp_path / f"{name}-back")
            assert_same_tensors(tmp_path / name, tmp_path / f"{name}-back")
