"""PEFT folders: `adapter_config.json` and `adapter_model.safetensors`, read and written without PEFT.

PEFT has many options that change what an adapter computes. A folder that uses one which is not known here
is refused: it would be loaded as something else.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint_conversion.adapters.options import (
    A_END,
    ALL_LINEAR,
    B_END,
    LoraOptions,
    adapter_rules,
    resolved,
    target_of,
    weight_of,
)
from checkpoint_conversion.engine.dtypes import DType
from checkpoint_conversion.engine.output import check_output, whole_folder, write_files
from checkpoint_conversion.errors import ConversionError
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

# Keys of adapter_config.json that do not change what the adapters compute, or that are read here.
_WITHOUT_EFFECT = frozenset(
    (
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
        *("revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha"),
        *("lora_dropout", "use_rslora", "layers_pattern", "megatron_config", "megatron_core"),
        *("qalora_group_size", "runtime_config", "init_lora_weights", "eva_config"),
    )
)
# Starts that leave the weights of the base as they are.
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class PeftFolder:
    """The adapters in a folder.

    Attributes:
        options: Their options, with the targets that the tensors show.
        weights: Their tensors, with their name table.
    """

    options: LoraOptions
    weights: HFModel


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
    tensors = read_header(folder / ADAPTER_WEIGHTS)
    family = family_for(config)
    rules = family.tensor_rules(config)
    options = _options(folder / ADAPTER, content, tensors, rules)
    own = adapter_rules(rules, options)
    source = f"{ADAPTER} (rank {options.rank}) with the model's config.json"
    check_tensors(folder, tensors, expected_shapes(own), source)
    return PeftFolder(options, HFModel(folder, config, family, own, tensors, None))


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


def _options(
    file: Path,
    content: Mapping[str, Any],
    tensors: Mapping[str, HFTensor],
    rules: Sequence[TensorRule],
) -> LoraOptions:
    found = {target_of(weight_of(name)) for name in tensors if name.endswith((A_END, B_END))}
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
            write_files(partial, {**self.notes, ADAPTER: _config_text(self.options, self.base)})

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
