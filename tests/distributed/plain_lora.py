"""Adapters as PEFT makes them, and as one would write them where PEFT trains another model.

transformers holds the experts of a layer in two tensors, for which PEFT trains a dense matrix of all experts'
ranks. The judge of experts therefore adds B A to the weights themselves.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The projections of a Gated DeltaNet.
STATE_TARGETS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
_PREFIX = "base_model.model."
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write_adapter(
    hf: Path,
    folder: Path,
    *,
    rank: int = 4,
    alpha: float = 6.0,
    targets: tuple[str, ...] = TARGETS,
    rslora: bool = False,
) -> Path:
    """Let PEFT write adapters of linear layers, with random A and B."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets),
        use_rslora=rslora,
        task_type="CAUSAL_LM",
    )
    base = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    get_peft_model(base, config).save_pretrained(folder)
    _fill(folder, {name: list(value.shape) for name, value in _tensors(folder).items()})
    return folder


def write_expert_adapter(hf: Path, folder: Path, *, rank: int = 4, alpha: float = 6.0) -> Path:
    """Write adapters of a model with experts, under the names of each expert's projections."""
    shapes = {}
    for name, weight in load_file(hf / "model.safetensors").items():
        module, target = name.removesuffix(".weight"), name.split(".")[-2]
        if target in TARGETS:
            shapes[f"{_PREFIX}{module}.lora_A.weight"] = [rank, weight.shape[1]]
            shapes[f"{_PREFIX}{module}.lora_B.weight"] = [weight.shape[0], rank]
    folder.mkdir()
    _fill(folder, shapes)
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": [*TARGETS]}
    (folder / _CONFIG).write_text(json.dumps(content))
    return folder


def _fill(folder: Path, shapes: dict[str, list[int]]) -> None:
    generator = torch.Generator().manual_seed(17)
    values = {
        name: torch.randn(shape, generator=generator) * (0.5 / shape[1] ** 0.5)
        for name, shape in sorted(shapes.items())
    }
    save_file(values, folder / _WEIGHTS, metadata={"format": "pt"})


def _tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / _WEIGHTS)


def adapted_model(
    hf: Path, adapter: Path, dtype: torch.dtype = torch.float64
) -> PeftModel | AddedFactors:
    """A model with trainable adapters: PEFT's own, or `AddedFactors` for experts."""
    base = AutoModelForCausalLM.from_pretrained(hf, dtype=dtype, experts_implementation="eager")
    if any(".experts." in name for name in _tensors(adapter)):
        return AddedFactors(base, adapter, dtype)
    return PeftModel.from_pretrained(base, adapter, is_trainable=True).to(dtype)


def factors_of(model: PeftModel | AddedFactors) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters, by the names that a PEFT folder has."""
    if isinstance(model, AddedFactors):
        return model.factors
    named = model.named_parameters()
    return {name.replace(".default.", "."): p for name, p in named if p.requires_grad}


class AddedFactors(torch.nn.Module):
    """A model whose weights are W + alpha / rank * B A, of each expert too."""

    def __init__(self, base: torch.nn.Module, adapter: Path, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.config = base.config
        content = json.loads((adapter / _CONFIG).read_text())
        self._scale = content["lora_alpha"] / content["r"]
        self.factors = {
            name: torch.nn.Parameter(value.to(dtype)) for name, value in _tensors(adapter).items()
        }
        for number, factor in enumerate(self.factors.values()):
            self.register_parameter(f"factor{number}", factor)

    def forward(self, tokens: Tensor) -> object:
        """As the base."""
        return torch.func.functional_call(self.base, self._weights(), (tokens,))

    def _weights(self) -> dict[str, Tensor]:
        found = {}
        for name, weight in self.base.named_parameters():
            if name.endswith("experts.gate_up_proj"):
                prefix = name.removesuffix(".gate_up_proj")
                both = [
                    torch.cat([self._delta(f"{prefix}.{e}.{part}_proj") for part in ("gate", "up")])
                    for e in range(len(weight))
                ]
                found[name] = weight + torch.stack(both)
            elif name.endswith("experts.down_proj"):
                prefix = name.removesuffix(".down_proj")
                each = [self._delta(f"{prefix}.{e}.down_proj") for e in range(len(weight))]
                found[name] = weight + torch.stack(each)
            elif f"{_PREFIX}{name.removesuffix('.weight')}.lora_A.weight" in self.factors:
                found[name] = weight + self._delta(name.removesuffix(".weight"))
        return found

    def _delta(self, module: str) -> Tensor:
        a, b = (self.factors[f"{_PREFIX}{module}.lora_{part}.weight"] for part in "AB")
        return self._scale * (b @ a)
