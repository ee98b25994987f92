"""PEFT folders: `adapter_config.json` and `adapter_model.safetensors`, read and written without PEFT.

PEFT has many options that change what an adapter computes. A folder that uses one which is not known here
is refused: it would be loaded as something else.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint_conversion.adapters.options import (
    A_END,
    ALL_LINEAR,
    B_END,
    PREFIX,
    LoraOptions,
    adapter_rules,
    resolved,
    target_of,
    weight_of,
)
from checkpoint_conversion.engine.dtypes import DType
from checkpoint_conversion.engine.output import check_output, whole_folder, write_files
from checkpoint_conversion.errors import ConversionError, warn
from checkpoint_conversion.families import Config, TensorRule, family_for
from checkpoint_conversion.hf.folder import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    HFTensor,
    read_header,
    read_json_object,
)
from checkpoint_conversion.hf.model import HFModel, check_tensors, expected_shapes
from checkpoint_conversion.hf.plan import COMMAND
from checkpoint_conversion.hf.writer import HFWriter, TensorSizes, TensorSpec
from checkpoint_conversion.in_transformers import ALONE, LANGUAGE_MODEL

if TYPE_CHECKING:
    from checkpoint_conversion.adapters.joined_experts import JoinedExperts

# Keys that PEFT writes for joined experts, with the names that they may be about. A name may have others, or
# a pattern such as `.*`, and a dot before it.
_OF_JOINED = {
    "target_parameters": ("gate_up_proj", "down_proj"),
    "rank_pattern": ("gate_up_proj",),
    "alpha_pattern": ("gate_up_proj",),
}
# Keys of adapter_config.json that do not change what the adapters compute, or that are read here.
_WITHOUT_EFFECT = frozenset(
    (
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
        *("revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha"),
        *("lora_dropout", "use_rslora", "layers_pattern", "megatron_config", "megatron_core"),
        *("qalora_group_size", "runtime_config", "init_lora_weights", "eva_config"),
        *_OF_JOINED,
    )
)
# Projections of experts whose adapters PEFT opens where it joins them.
_OPENED_OF_EXPERTS: tuple[set[str], ...] = (
    set(),
    {"down_proj"},
    {"gate_proj", "up_proj", "down_proj"},
)
# Starts that leave the weights of the base as they are.
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class PeftFolder:
    """The adapters in a folder.

    Attributes:
        options: Their options, with the targets that the tensors show.
        weights: Their tensors, with their name table.
        base: The model that they were trained on, as the folder names it.
    """

    options: LoraOptions
    weights: HFModel
    base: str


def open_peft_folder(folder: str | Path, config: Config) -> PeftFolder:
    """Read the options and the header of a PEFT folder, and check them against a model.

    Args:
        folder: The folder.
        config: The content of the model's config.json.

    Raises:
        ConversionError: A file is missing or broken, an option is not supported, or a tensor is missing,
            unknown or of another shape than model and rank call for.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConversionError(f"{folder}: no such folder; give a folder that PEFT has written")
    content = read_json_object(folder / ADAPTER)
    _check_options(folder / ADAPTER, content)
    if not (folder / ADAPTER_WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise ConversionError(
            f"{folder}: pickled adapters (adapter_model.bin); write safetensors with save_pretrained of PEFT"
        )
    from checkpoint_conversion.adapters.joined_experts import joined_experts  # needs numpy

    family = family_for(config)
    rules = family.tensor_rules(config)
    tensors = _named_as_in(rules, read_header(folder / ADAPTER_WEIGHTS))
    joined = joined_experts(folder, tensors, rules)
    separate = (name for name in tensors.keys() - joined.names if name.endswith((A_END, B_END)))
    found = {target_of(weight_of(name)) for name in separate}
    options = _options(folder / ADAPTER, content, found | joined.projections, rules)
    _check_joined(folder / ADAPTER, content, options, joined)
    if joined:
        tensors = joined.separate(tensors, options.rank)
    own = adapter_rules(rules, options)
    source = f"{ADAPTER} (rank {options.rank}) with the model's config.json"
    check_tensors(folder, tensors, expected_shapes(own), source)
    base = str(content.get("base_model_name_or_path") or "an unnamed model")
    return PeftFolder(options, HFModel(folder, config, family, own, tensors, None), base)


def _named_as_in(
    rules: Iterable[TensorRule], tensors: Mapping[str, HFTensor]
) -> Mapping[str, HFTensor]:
    """Return the tensors by the names of the model's folder.

    They were trained on transformers' language model alone, and the folder has a vision tower, or the other
    way round.
    """
    ours = any(name.startswith(LANGUAGE_MODEL) for rule in rules for name in rule.hf)
    theirs = any(name.startswith(PREFIX + LANGUAGE_MODEL) for name in tensors)
    if ours == theirs:
        return tensors
    old, new = (LANGUAGE_MODEL, ALONE) if theirs else (ALONE, LANGUAGE_MODEL)
    named = {
        name: f"{PREFIX}{new}{name.removeprefix(PREFIX + old)}"
        if name.startswith(PREFIX + old)
        else name
        for name in tensors
    }
    return {named[name]: replace(tensor, name=named[name]) for name, tensor in tensors.items()}


def _check_options(file: Path, content: Mapping[str, Any]) -> None:
    kind = content.get("peft_type")
    if kind != "LORA":
        raise ConversionError(f"{file} has peft_type={kind!r}; only 'LORA' is supported")
    start = content.get("init_lora_weights")
    if start not in _STARTS:
        raise ConversionError(
            f"{file} has init_lora_weights={start!r}, which changes the weights of the base as well; save "
            "the adapters with path_initial_model_for_weight_conversion of PEFT"
        )
    for key, value in content.items():
        if key not in _WITHOUT_EFFECT and value not in (None, False, "none", [], {}):
            raise ConversionError(
                f"{file} has {key}={str(value)[:60]!r}, which is not supported; merge the adapters with PEFT"
            )


def _check_joined(
    file: Path, content: Mapping[str, Any], options: LoraOptions, joined: JoinedExperts
) -> None:
    """Refuse parameters, ranks and scales other than the ones that joined experts may have."""
    for key, names in _OF_JOINED.items():
        value = content.get(key) or {}
        own = {str(name).rpartition(".")[2] for name in value} if _is_collection(value) else {None}
        if not own <= set(names if joined else ()):
            raise ConversionError(
                f"{file} has {key}={str(value)[:60]!r}, which is not supported; merge the adapters with PEFT"
            )
    if joined.gate_up_rank is None:
        return
    rank = _of_gate_up(content.get("rank_pattern"), options.rank)
    alpha = _of_gate_up(content.get("alpha_pattern"), options.alpha)
    if rank != joined.gate_up_rank:
        raise ConversionError(
            f"{file} calls for rank {rank} of gate_up_proj, and the tensors have {joined.gate_up_rank}"
        )
    scale = replace(options, rank=rank, alpha=alpha).scale
    if not math.isclose(scale, options.scale, rel_tol=1e-9):
        raise ConversionError(
            f"{file}: the scale of gate_up_proj is {scale:g}, and the other adapters have {options.scale:g}; "
            "all need the same: merge the adapters with PEFT"
        )


def _is_collection(value: object) -> bool:
    return isinstance(value, list | dict)


def _of_gate_up(pattern: object, default: float) -> Any:
    """Return the value that a pattern of PEFT has for gate_up_proj, its only key."""
    return next(iter(pattern.values())) if pattern and isinstance(pattern, dict) else default


def _options(
    file: Path,
    content: Mapping[str, Any],
    found: Iterable[str],
    rules: Sequence[TensorRule],
) -> LoraOptions:
    use_rslora = content.get("use_rslora")
    if use_rslora not in (None, True, False):
        raise ConversionError(
            f"{file} has use_rslora={str(use_rslora)[:40]!r}; true or false is needed"
        )
    dropout = content.get("lora_dropout")
    try:
        options = LoraOptions(
            rank=content.get("r", 0),
            alpha=content.get("lora_alpha", 0),
            targets=tuple(sorted(found)),
            dropout=0.0 if dropout is None else dropout,
            rslora=bool(use_rslora),
        )
        return resolved(rules, options)
    except ConversionError as error:
        raise ConversionError(f"{file}: {error}") from error


@dataclass(frozen=True)
class AdapterOutput(TensorSizes):
    """A PEFT folder to write, and everything about it except the values.

    Attributes:
        folder: The folder to write; missing or empty.
        base: Folder of the model that the adapters belong to.
        options: Options of the adapters.
        rules: Their name table.
        tensors: The tensors by name.
        overwrite: Whether an earlier output in its place is replaced.
        notes: Further small files by name, for example a model card.
    """

    folder: Path
    base: Path
    options: LoraOptions
    rules: tuple[TensorRule, ...]
    tensors: Mapping[str, TensorSpec]
    overwrite: bool = False
    notes: Mapping[str, bytes] = field(default_factory=dict)

    @contextlib.contextmanager
    def writer(self) -> Iterator[tuple[Path, HFWriter]]:
        """Yield a temporary folder and the writer of its tensors; it becomes the output at the end.

        Raises:
            ConversionError: When the folder must not be written, or there is too little space.
        """
        place = whole_folder(self.folder, [self.base], self.overwrite, COMMAND, self.nbytes)
        with place as partial:
            with HFWriter(
                partial, self.tensors, dict.fromkeys(self.tensors, ADAPTER_WEIGHTS)
            ) as writer:
                yield partial, writer
                writer.flush()
            of_experts, of_others = _targets(self.rules, True), _targets(self.rules, False)
            options = for_peft_with_experts(self.options) if of_experts else self.options
            write_files(partial, {**self.notes, ADAPTER: _config_text(options, self.base)})
        if of_experts not in _OPENED_OF_EXPERTS:
            warn(
                f"{self.folder}: its adapters of experts are on {', '.join(sorted(of_experts))}; PEFT with "
                "transformers 5 opens only those on down_proj alone, or on gate_proj, up_proj and down_proj: "
                "there, use merged weights"
            )
        if both := sorted(of_experts & of_others):
            warn(
                f"{self.folder}: {', '.join(both)} have adapters in layers with experts and in others, and "
                "PEFT with transformers 5 leaves out the others in silence; there, use merged weights"
            )

    @contextlib.contextmanager
    def create(self) -> Iterator[Path]:
        """Yield a temporary folder with the header of all tensors, to be filled in the block."""
        with self.writer() as (partial, _):
            yield partial

    def tensors_in(self, folder: Path) -> dict[str, HFTensor]:
        """Return the places of the tensors in the temporary folder of `create`."""
        return read_header(folder / ADAPTER_WEIGHTS)


def plan_adapter_output(
    folder: str | Path,
    base: str | Path,
    config: Config,
    options: LoraOptions,
    dtype: DType,
    overwrite: bool = False,
) -> AdapterOutput:
    """Check that a PEFT folder can be written; no file is written yet.

    Args:
        folder: The folder to write.
        base: Folder of the model that the adapters belong to.
        config: The content of its config.json.
        options: Options of the adapters.
        dtype: The dtype of all tensors.
        overwrite: Whether an earlier output in this place may be replaced, if it was not changed since.

    Raises:
        ConversionError: When the folder is not empty, its place is not writable, or there is too little
            space.
    """
    folder, base = Path(folder), Path(base)
    rules = family_for(config).tensor_rules(config)
    options = resolved(rules, options)
    own = adapter_rules(rules, options)
    tensors = {name: TensorSpec(shape, dtype) for name, shape in expected_shapes(own).items()}
    output = AdapterOutput(folder, base, options, own, tensors, overwrite)
    check_output(folder, [base], overwrite, COMMAND, output.nbytes)
    return output


def _targets(rules: Iterable[TensorRule], of_experts: bool) -> set[str]:
    """Return the projections of experts, or of other modules, that have adapters."""
    chosen = (rule for rule in rules if ("expert" in rule.axes) == of_experts)
    return {target_of(weight_of(name)) for rule in chosen for name in rule.hf}


def for_peft_with_experts(options: LoraOptions) -> LoraOptions:
    """Return options that PEFT reads as the same function where it joins the adapters of experts.

    With transformers 5 it puts gate and up into one adapter of twice the rank and twice alpha, whose scale is
    only right without rsLoRA, and it refuses to open such adapters with a dropout.
    """
    alpha = options.alpha * math.sqrt(options.rank) if options.rslora else options.alpha
    return replace(options, alpha=alpha, dropout=0.0, rslora=False)


def _config_text(options: LoraOptions, base: Path) -> bytes:
    content = {
        "base_model_name_or_path": str(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": options.rank,
        "target_modules": [target for target in options.targets if target != ALL_LINEAR],
        "task_type": "CAUSAL_LM",
        "use_rslora": options.rslora,
    }
    return (json.dumps(content, indent=2) + "\n").encode()
