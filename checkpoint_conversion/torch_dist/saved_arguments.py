"""The arguments that a checkpoint keeps, and their comparison with a HuggingFace model.

Tensors show most of an architecture by their shapes, but some of it no shape shows, for example the
rotary base. Without this comparison, such a value could change unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import CHANGEABLE_ARGUMENTS, Config, family_for
from checkpoint_conversion.pickles.uses import arguments as argument_uses
from checkpoint_conversion.pickles.values import Instance, PickleError
from checkpoint_conversion.torch_dist.folder import find_checkpoint
from checkpoint_conversion.torch_dist.reader import (
    COMMON_ENTRY,
    COMMON_FILE,
    read_common_file,
    read_object,
)

_PLAIN = (bool, int, float, str, type(None))
# Names that Megatron-Core had for arguments before 0.19.
_OLDER_NAMES = {
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
}
# Arguments that change what the layers compute, and the shape of no tensor. A model has them only where its
# family gives them.
_OF_OTHER_MODELS = (
    *("layernorm_zero_centered_gamma", "apply_residual_connection_post_layernorm", "qk_l2_norm"),
    *("rotary_interleaved", "rotary_seq_len_interpolation_factor", "no_rope_freq", "mrope_section"),
    *("window_size", "softmax_type", "squared_relu", "quick_geglu", "glu_linear_offset"),
    *("activation_func_clamp_value", "use_mup", "moe_mlp_glu_interleave_size"),
    *("moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_scaling_factor"),
    "moe_apply_probs_on_input",
)
_UNSET = (None, False, 0, "vanilla")
# Further values without an effect.
_NEUTRAL = {
    "moe_router_topk_scaling_factor": 1,
    "rotary_seq_len_interpolation_factor": 1,
    "window_size": [-1, -1],
}


def check_checkpoint_matches(
    folder: Path, config: Config, hf_folder: Path, iteration: str | int | None = None
) -> None:
    """Check the arguments that a checkpoint keeps against a HuggingFace configuration.

    Args:
        folder: Megatron's save folder, or a checkpoint in it.
        config: The content of config.json (see `hf.folder.read_hf_config`).
        hf_folder: The folder it is from; for the message.
        iteration: A number or "release"; None for the latest.

    Raises:
        ConversionError: When there is no such checkpoint, it cannot be read, or an argument differs.
    """
    saved = read_saved_run(folder, iteration)
    expected = family_for(config).megatron_arguments(config)
    check_architecture(saved.arguments, expected, saved.folder, hf_folder)


class SavedRun(NamedTuple):
    """What a checkpoint records of the run that wrote it.

    Attributes:
        folder: The checkpoint.
        iteration: Its number of steps, as it is recorded; None where there is none.
        arguments: The plain arguments by name: numbers, texts, truth values, None, and lists and tuples of
            these. Empty for a checkpoint without arguments.
    """

    folder: Path
    iteration: Any
    arguments: dict[str, Any]


def read_saved_run(folder: Path, iteration: str | int | None = None) -> SavedRun:
    """Return the number of steps and the arguments that a checkpoint records.

    They are in a pickle; no object that it refers to is imported or called.

    Args:
        folder: Megatron's save folder, or a checkpoint in it.
        iteration: A number or "release"; None for the latest.

    Raises:
        ConversionError: When there is no such checkpoint, or it cannot be read.
    """
    checkpoint = find_checkpoint(folder, iteration)
    common = _common_state(checkpoint)
    steps = common.get("iteration") if isinstance(common, dict) else None
    return SavedRun(checkpoint, steps, _arguments(common))


def check_architecture(
    saved: Mapping[str, Any], expected: Mapping[str, Any], checkpoint: Path, hf_folder: Path
) -> None:
    """Check the arguments of a checkpoint against a model's.

    An argument of the model that the checkpoint does not have is no difference. An argument of other models,
    such as a window of attention, must not be set.

    Args:
        saved: The arguments in the checkpoint.
        expected: The arguments that the family derives from config.json.
        checkpoint: Its folder; for the message.
        hf_folder: The folder of config.json; for the message.

    Raises:
        ConversionError: Names each argument that differs, with both values.
    """
    found = [*_differences(saved, expected), *_vocabulary_differences(saved, expected)]
    if found:
        raise ConversionError(
            f"{checkpoint}: not a checkpoint of the model in {hf_folder}: {'; '.join(found)}. Give "
            "the HuggingFace folder that the checkpoint comes from, or a checkpoint of this model"
        )


def stock_flags(arguments: Mapping[str, Any]) -> str | None:
    """Return the architecture flags that Megatron's `--use-checkpoint-args` does not take from a checkpoint.

    See load_args_from_checkpoint in megatron/training/checkpointing.py.

    Args:
        arguments: The arguments that the family derives from config.json.

    Returns:
        The flags; None for a model that only this project's layers compute.
    """
    if arguments.get("experimental_attention_variant") is not None:
        return None
    flags = [f"--norm-epsilon {arguments['layernorm_epsilon']}"]
    if arguments["qk_layernorm"]:
        flags.append("--qk-layernorm")
    if arguments["use_rope_scaling"]:
        factor = arguments["rope_scaling_factor"]
        flags.append(f"--use-rope-scaling --rope-scaling-factor {factor}")
    if "num_experts" in arguments:
        flags.append(f"--moe-router-dtype {arguments['moe_router_dtype']}")
        flags.append(f"--moe-aux-loss-coeff {arguments['moe_aux_loss_coeff']}")
    return " ".join(flags)


def _arguments(common: Any) -> dict[str, Any]:
    arguments = common.get("args") if isinstance(common, dict) else None
    values = arguments.state if isinstance(arguments, Instance) else None
    if not isinstance(values, dict):
        return {}
    return {
        name: value for name, value in values.items() if isinstance(name, str) and _is_plain(value)
    }


def _common_state(checkpoint: Path) -> Any:
    try:
        if (checkpoint / COMMON_FILE).exists():
            return read_common_file(checkpoint, argument_uses)
        entry = read_object(checkpoint, COMMON_ENTRY, argument_uses)
    except ConversionError as error:
        if not isinstance(error.__cause__, PickleError):
            raise
        raise ConversionError(
            f"{error}. A conversion with --ignore-arguments does not read it"
        ) from error
    return entry[0] if isinstance(entry, list) and len(entry) == 1 else None


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN or (
        isinstance(value, list | tuple) and all(type(item) in _PLAIN for item in value)
    )


def _differences(saved: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    layers = expected["num_layers"]
    ours, theirs = _comparable(saved, layers), _comparable(expected, layers)
    for name in theirs:
        if name in ours and ours[name] != theirs[name]:
            yield _difference(name, ours[name], theirs[name])
    for name in _OF_OTHER_MODELS:
        if name not in theirs and not _is_unset(name, ours.get(name)):
            yield _difference(name, ours[name], "not set")


def _is_unset(name: str, value: Any) -> bool:
    value = list(value) if isinstance(value, tuple) else value
    if name == "no_rope_freq" and isinstance(value, list):  # a mark for each layer
        return not any(value)
    return value in _UNSET or value == _NEUTRAL.get(name)


def _comparable(arguments: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return the arguments that decide the model, in one form for all versions and spellings.

    Without grouped queries, Megatron gives every head a group. Experts in every N-th layer can be given as N
    or as a mark for each layer. Where all layers have experts, there is no dense one with a size.
    """
    kept = {
        name: value
        for name, value in arguments.items()
        if name not in CHANGEABLE_ARGUMENTS and value is not None
    }
    if not kept.pop("group_query_attention", True) and "num_attention_heads" in kept:
        kept["num_query_groups"] = kept["num_attention_heads"]
    for older, name in _OLDER_NAMES.items():
        if older in kept:
            kept.setdefault(name, kept.pop(older))
    every = kept.get("moe_layer_freq")
    if type(every) is int and every > 0:
        kept["moe_layer_freq"] = [int(layer % every == 0) for layer in range(layers)]
    if "num_experts" in kept and kept.get("moe_layer_freq") == [1] * layers:
        kept.pop("ffn_hidden_size", None)
    return kept


def _vocabulary_differences(saved: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    """Compare the vocabularies: a smaller vocabulary than the model's or a larger padding is no difference.

    Megatron takes `vocab_size` from a flag or a tokenizer, which may have fewer tokens than the model
    has rows. It leaves `vocab_size` None where only the padded size is known. `padded_vocab_size` is
    the number of rows, and depends on the tensor-parallel size.
    """
    vocabulary = expected.get("vocab_size")
    tokens, rows = saved.get("vocab_size"), saved.get("padded_vocab_size")
    if vocabulary is None:
        return
    if isinstance(tokens, int) and tokens > vocabulary:
        yield _difference("vocab_size", tokens, vocabulary)
    elif isinstance(rows, int) and rows < vocabulary:
        yield _difference("padded_vocab_size", rows, f"at least {vocabulary}")


def _difference(name: str, saved: Any, expected: Any) -> str:
    return f"{name} is {saved} in the checkpoint and {expected} by config.json"
