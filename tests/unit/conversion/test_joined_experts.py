"""Adapters of experts as PEFT writes them with transformers 5: read exactly, or refused with a remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_families import EXPERTS, make_family
from transformers import AutoModelForCausalLM

from checkpoint_conversion.adapters.options import LoraOptions
from checkpoint_conversion.adapters.peft_folder import (
    PeftFolder,
    open_peft_folder,
    plan_adapter_output,
)
from checkpoint_conversion.engine.dtypes import F32
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf.folder import ADAPTER, ADAPTER_WEIGHTS, read_hf_config
from checkpoint_conversion.hf.model import expected_shapes
from checkpoint_conversion.hf.writer import write_tensors

JOINED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
EACH = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENS = torch.arange(1, 33)[None]


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return make_family(tmp_path_factory.mktemp("experts"), "qwen3-moe")


def load(hf: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        hf, dtype=torch.float32, experts_implementation="eager"
    )


def randomize(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.2, generator=generator)


@pytest.fixture
def train_in_peft(hf: Path, tmp_path: Path) -> Callable[..., Path]:
    """Let PEFT make and save adapters with random A and B."""

    def make(**options: object) -> Path:
        settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "o_proj"], **options}
        model = get_peft_model(load(hf), LoraConfig(task_type="CAUSAL_LM", **settings))
        randomize(model)
        model.save_pretrained(tmp_path / "peft")
        return tmp_path / "peft"

    return make


def write_for_each_expert(hf: Path, folder: Path, options: LoraOptions) -> Path:
    """Write a folder as this project does, with random A and B for each expert."""
    config = read_hf_config(hf)
    output = plan_adapter_output(folder, hf, config, options, F32)
    generator = torch.Generator().manual_seed(4)
    with output.create():
        pass
    values = {
        name: torch.randn(shape, generator=generator) * 0.2
        for name, shape in expected_shapes(output.rules).items()
    }
    save_file(values, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    return folder


def read(folder: PeftFolder, out: Path, hf: Path) -> dict[str, torch.Tensor]:
    """Return all factors, as this project writes them."""
    output = plan_adapter_output(out, hf, read_hf_config(hf), folder.options, F32)
    with output.writer() as (_, writer):
        write_tensors(folder.weights, output.tensors, writer)
    return load_file(out / ADAPTER_WEIGHTS)


def merged_experts(folder: PeftFolder, factors: dict[str, torch.Tensor], hf: Path) -> dict:
    """Return the weights of transformers 5 with the factors of each expert added to them."""
    weights = {name: value.clone() for name, value in load(hf).state_dict().items()}
    places = {"gate_proj": 0, "up_proj": 1}
    for name, a in factors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        delta = folder.options.scale * factors[name.replace("lora_A", "lora_B")] @ a
        module, target = (
            name.removeprefix("base_model.model.").removesuffix(".lora_A.weight").rsplit(".", 1)
        )
        if ".experts." not in module:
            weights[f"{module}.{target}.weight"] += delta
            continue
        experts, number = module.rsplit(".", 1)
        if target == "down_proj":
            weights[f"{experts}.down_proj"][int(number)] += delta
        else:
            rows = len(delta)
            first = places[target] * rows
            weights[f"{experts}.gate_up_proj"][int(number), first : first + rows] += delta
    return weights


@pytest.mark.parametrize("targets", [JOINED, JOINED[:1], JOINED[1:]], ids=["both", "up", "down"])
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
def test_joined_adapters_of_one_rank_are_read_as_the_same_function(
    hf, train_in_peft, tmp_path, targets, rslora
):
    adapter = train_in_peft(target_parameters=[*targets], use_rslora=rslora)
    names = load_file(adapter / ADAPTER_WEIGHTS)
    assert any(name.endswith("mlp.experts.lora_A.weight") for name in names)
    folder = open_peft_folder(adapter, read_hf_config(hf))
    assert folder.options.rank == 3
    own = merged_experts(folder, read(folder, tmp_path / "own", hf), hf)
    expected = PeftModel.from_pretrained(load(hf), adapter).merge_and_unload().state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(own[name], value, rtol=0, atol=1e-6, msg=name)


def test_adapters_that_peft_joined_and_saved_come_back_bit_for_bit(hf, tmp_path):
    """Each expert's adapters, opened by PEFT, which joins them, and saved by it."""
    own = write_for_each_expert(hf, tmp_path / "own", LoraOptions(4, 6, EACH))
    model = PeftModel.from_pretrained(load(hf), own)
    model.save_pretrained(tmp_path / "joined")
    content = json.loads((tmp_path / "joined" / ADAPTER).read_text())
    assert content["rank_pattern"] == {r".*\.gate_up_proj": 8}
    folder = open_peft_folder(tmp_path / "joined", read_hf_config(hf))
    assert folder.options == LoraOptions(4, 6, EACH)
    before, after = load_file(own / ADAPTER_WEIGHTS), read(folder, tmp_path / "again", hf)
    assert before.keys() == after.keys()
    assert len(before) == 2 * 3 * (4 + 3 * EXPERTS)
    assert not [name for name in before if not torch.equal(before[name], after[name])]


@pytest.mark.parametrize(
    "options",
    [
        LoraOptions(4, 6, EACH, dropout=0.1),
        LoraOptions(4, 6, EACH, rslora=True),
        LoraOptions(3, 6, ("q_proj", "down_proj"), rslora=True),
    ],
    ids=["dropout", "rslora", "rslora down"],
)
def test_peft_opens_what_is_written_here_as_the_same_function(hf, tmp_path, options):
    own = write_for_each_expert(hf, tmp_path / "own", options)
    folder = open_peft_folder(own, read_hf_config(hf))
    assert folder.options.scale == pytest.approx(options.scale)
    expected = load(hf)
    expected.load_state_dict(merged_experts(folder, load_file(own / ADAPTER_WEIGHTS), hf))
    opened = PeftModel.from_pretrained(load(hf), own)
    with torch.no_grad():
        torch.testing.assert_close(
            opened(TOKENS).logits, expected(TOKENS).logits, rtol=0, atol=1e-4
        )


def test_adapters_that_peft_would_leave_out_are_told(tmp_path, capsys):
    mixed = make_family(tmp_path / "mixed", "qwen3-moe-mixed")
    write_for_each_expert(mixed, tmp_path / "attention", LoraOptions(4, 6, ("q_proj", "v_proj")))
    assert "WARNING" not in capsys.readouterr().out
    write_for_each_expert(mixed, tmp_path / "all", LoraOptions(4, 6, EACH))
    told = capsys.readouterr().out
    assert (
        "down_proj, gate_proj, up_proj have adapters in layers with experts and in others" in told
    )
    assert "use merged weights" in told


REFUSED = {
    "a joined rank of its own": (
        {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
        r"has rank 6 in each expert, and the other adapters have rank 3; .*merge_and_unload",
    ),
    "the router": (
        {"target_parameters": ["mlp.gate.weight", *JOINED]},
        r"the target 'gate' is no projection of this model; it has q_proj",
    ),
    "another scale": (
        {"target_parameters": [*JOINED], "alpha_pattern": {"gate_up_proj": 9}},
        r"the scale of gate_up_proj is 3, and the other adapters have 1\.66",
    ),
    "another rank of a layer": (
        {"target_parameters": [*JOINED], "rank_pattern": {"q_proj": 2}},
        r"has rank_pattern=.*which is not supported",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_joined_adapters_are_refused(hf, train_in_peft, case):
    options, message = REFUSED[case]
    with pytest.raises(ConversionError, match=message):
        open_peft_folder(train_in_peft(**options), read_hf_config(hf))


INNER = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight"
BROKEN = {
    "misshapen": (lambda t: t.update({INNER: t[INNER][:-1].clone()}), f"{INNER} has shape"),
    "missing": (lambda t: t.pop(INNER), r"base_layer.lora_A.weight .* needs .* its other factor"),
    "flat": (lambda t: t.update({INNER: t[INNER].flatten()}), f"{INNER} .* needs two axes"),
    "of one layer": (
        lambda t: [t.pop(n) for n in list(t) if ".layers.2.mlp" in n],
        r"no tensor .*layers\.2\.mlp\.experts\.0\.gate_proj",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_joined_tensors_are_named(hf, train_in_peft, case):
    edit, message = BROKEN[case]
    adapter = train_in_peft(target_parameters=[*JOINED])
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    edit(tensors)
    save_file(tensors, adapter / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=message):
        open_peft_folder(adapter, read_hf_config(hf))


@pytest.mark.parametrize("value", ["gate_up_proj", 5, [5], {"up": 3}, [["a"]]])
@pytest.mark.parametrize("key", ["target_parameters", "rank_pattern", "alpha_pattern"])
def test_nonsense_in_the_options_of_joined_experts_is_an_error(hf, train_in_peft, key, value):
    adapter = train_in_peft(target_parameters=[*JOINED])
    content = json.loads((adapter / ADAPTER).read_text())
    (adapter / ADAPTER).write_text(json.dumps({**content, key: value}))
    with pytest.raises(ConversionError, match=f"adapter_config\\.json has {key}="):
        open_peft_folder(adapter, read_hf_config(hf))
