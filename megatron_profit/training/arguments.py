"""The command line: our flags beside every native Megatron flag, and what follows from them.

`read_arguments` looks at the flags before Megatron starts. It derives the architecture from the HuggingFace
folder, refuses what contradicts it or would be ignored, and leaves Megatron a parser with new defaults:
Megatron then parses the same command line itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.training.arguments import add_megatron_arguments

from checkpoint_conversion.families import family_for
from checkpoint_conversion.hf_folder import read_hf_config
from megatron_profit.backends import DEVICES, active_device
from megatron_profit.objectives import build_objective, objective_names, objective_options
from megatron_profit.training.objective_loss import NORMALIZATIONS

# What Megatron's local layers need to run without Transformer Engine and Apex.
_LOCAL_LAYERS = {
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "no_persist_layer_norm": True,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
}
_CPU = {
    "distributed_backend": "gloo",
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
}
# Conventions of this entry that a flag may still change.
_DEFAULTS = {
    "tokenizer_type": "HuggingFaceTokenizer",
    "dataloader_type": "single",
    "make_vocab_size_divisible_by": 1,
    "log_interval": 1,
    "save_interval": 500,
    "eval_interval": 100,
}
# Loading rows is next to nothing beside training on the CPU, and its processes share the cores.
_CPU_DEFAULTS = {"num_workers": 0}
# Native flags that this entry would have to ignore, with what to do instead.
_REFUSED = {
    "sft": "this entry replaces Megatron's stock SFT; drop the flag",
    "data_path": "give chat files with --data",
    "data_args_path": "give chat files with --data",
    "train_data_path": "give chat files with --data",
    "valid_data_path": "give chat files with --valid-data",
    "test_data_path": "give chat files with --valid-data",
    "per_split_data_args_path": "give chat files with --data and --valid-data",
    "mock_data": "give chat files with --data",
    "cross_entropy_loss_fusion": "the loss is computed by --objective",
    "fp16_lm_cross_entropy": "the loss is computed by --objective, in fp32",
    "defer_embedding_wgrad_compute": "the objective computes the output layer's gradient itself",
    "mtp_num_layers": "multi-token prediction has no objective",
    "use_mup": "the objective does not scale logits",
    "logits_load_dir": "distillation has no objective",
    "logits_save_dir": "distillation has no objective",
    "overlap_moe_expert_parallel_comm": "the forward step has no schedule plan",
    "perform_rl_step": "this entry trains on data sets",
    "yaml_cfg": "give the flags on the command line",
    "reset_position_ids": "each row of a batch holds one record",
    "reset_attention_mask": "each row of a batch holds one record",
    "eod_mask_loss": "what is trained is decided by the roles of the chat",
    "multiple_validation_sets": "give all files to --valid-data",
    "full_validation": "it is the default of --valid-data",
}


class ArgumentsError(ValueError):
    """The flags cannot be used; the message names the value, the limit and the remedy."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ArgumentsError(message)


class _HelpFormatter(argparse.HelpFormatter):
    """Shows the help of Megatron's flags, some of which hold a percent sign that argparse trips over."""

    def _expand_help(self, action: argparse.Action) -> str:
        try:
            return super()._expand_help(action)
        except ValueError:
            return action.help or ""


@dataclass(frozen=True)
class SFTArguments:
    """What has to be known before Megatron starts.

    Attributes:
        hf_model: HuggingFace folder that gives the architecture and the tokenizer.
        data, valid_data: Chat files.
        seq_length: Tokens of a row.
        defaults: Values that replace the defaults of Megatron's parser.
        eval_batch_size: Records of one evaluation iteration over all ranks.
        eval_iters: Evaluation iterations that were asked for; None for all of the validation data.
    """

    hf_model: Path
    data: tuple[str, ...]
    valid_data: tuple[str, ...]
    seq_length: int
    defaults: Mapping[str, Any]
    eval_batch_size: int
    eval_iters: int | None

    def add_to_parser(self, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Megatron's `extra_args_provider`."""
        parser = add_arguments(parser)
        parser.set_defaults(**self.defaults)
        return parser

    def with_valid_examples(self, count: int) -> SFTArguments:
        """These arguments with evaluations that see each of `count` validation examples once,
        unless --eval-iters says otherwise."""
        iters = self.eval_iters
        if iters is None:
            iters = math.ceil(count / self.eval_batch_size)
        return replace(self, defaults={**self.defaults, "eval_iters": iters})


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of this project to a parser, among them one for each option of an objective."""
    group = parser.add_argument_group(title="megatron_profit")
    group.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="Where to train; auto is CUDA where there is a GPU, else the CPU backend.",
    )
    group.add_argument(
        "--hf-model",
        metavar="DIR",
        help="HuggingFace folder: its config.json gives the architecture, and its tokenizer is used. "
        "Weights come from --load or --pretrained-checkpoint.",
    )
    group.add_argument(
        "--random-init",
        action="store_true",
        help="Start from random weights where --load and --pretrained-checkpoint hold no checkpoint.",
    )
    group.add_argument("--data", nargs="+", metavar="FILE", help="Chat files to train on.")
    group.add_argument(
        "--valid-data",
        nargs="+",
        metavar="FILE",
        help="Chat files to evaluate on every --eval-interval steps; all records, or --eval-iters batches.",
    )
    group.add_argument(
        "--objective", choices=objective_names(), default="profit", help="What is trained."
    )
    group.add_argument(
        "--objective-normalization",
        choices=NORMALIZATIONS,
        default="valid",
        help="Divide the summed loss by all supervised tokens of the global batch (valid) or by those "
        "that the objective keeps (kept).",
    )
    for name in objective_names():
        for option in objective_options(name):
            group.add_argument(_flag(option.name), default=option.default, **option.metadata)
    return parser


def read_arguments(argv: list[str]) -> SFTArguments:
    """Check the flags of a command line and derive what Megatron needs.

    Raises:
        ArgumentsError: For flags that are missing, contradict each other or would be ignored.
        ConversionError: For a HuggingFace folder that is missing, broken or of an unknown architecture.
    """
    explicit, native = _parse(argv)
    for name, remedy in _REFUSED.items():
        if explicit.get(name):
            raise ArgumentsError(f"{_flag(name)} cannot be used here: {remedy}")
    for name in ("hf_model", "data", "seq_length", "micro_batch_size"):
        if explicit.get(name) is None:
            raise ArgumentsError(f"{_flag(name)} is missing")

    hf_model = Path(explicit["hf_model"])
    config = read_hf_config(hf_model)
    model = family_for(config).megatron_arguments(config)
    device = active_device() or "cpu"
    soft = {**_DEFAULTS, **(_CPU_DEFAULTS if device == "cpu" else {})}
    if "initializer_range" in config:
        soft["init_method_std"] = config["initializer_range"]
    # Padding of the vocabulary is a matter of the layout, not of the model.
    model = {name: value for name, value in model.items() if name not in soft}
    _refuse_contradictions(explicit, model, f"{hf_model / 'config.json'} says")
    platform = platform_settings(device)
    _refuse_contradictions(explicit, platform, "this machine needs")

    settings = {**native, **soft, **model, **platform, **explicit}
    data_parallel = _check_layout(settings, int(os.environ.get("WORLD_SIZE", "1")))
    _check_weights(settings)
    if explicit.get("eval_iters") and not explicit.get("valid_data"):
        raise ArgumentsError(
            f"--eval-iters {explicit['eval_iters']} needs data to evaluate on; give --valid-data"
        )
    multiple = settings["tensor_model_parallel_size"] * settings["make_vocab_size_divisible_by"]
    derived = {
        "padded_vocab_size": math.ceil(settings["vocab_size"] / multiple) * multiple,
        "tokenizer_model": str(hf_model),
        "calculate_per_token_loss": True,
        "objective_options": _objective_options(settings, explicit),
    }
    return SFTArguments(
        hf_model=hf_model,
        data=tuple(explicit["data"]),
        valid_data=tuple(explicit.get("valid_data") or ()),
        seq_length=explicit["seq_length"],
        defaults={**soft, **model, **platform, **derived},
        eval_batch_size=settings["eval_global_batch_size"]
        or settings["global_batch_size"]
        or settings["micro_batch_size"] * data_parallel,
        eval_iters=explicit.get("eval_iters"),
    )


def platform_settings(device: str) -> dict[str, Any]:
    """Megatron arguments that the device and the installed libraries decide."""
    if device == "cpu":
        return {**_LOCAL_LAYERS, **_CPU}
    if importlib.util.find_spec("transformer_engine") is not None:
        return {}
    fusion = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None  # from Apex
    return {**_LOCAL_LAYERS, "gradient_accumulation_fusion": fusion}


def _parse(argv: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flags that `argv` gives, and the defaults of all flags, by argument name."""
    parser = _Parser(
        prog="megatron-profit-sft",
        usage="torchrun … -m megatron_profit.sft --hf-model DIR --data FILE… [flags]",
        description="Supervised fine-tuning on Megatron-Core. Every native Megatron flag works too.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser = add_megatron_arguments(add_arguments(parser))
    native = {action.dest: action.default for action in parser._actions}
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(argv)), native


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _refuse_contradictions(
    explicit: Mapping[str, Any], derived: Mapping[str, Any], source: str
) -> None:
    for name, value in derived.items():
        if name in explicit and explicit[name] != value:
            raise ArgumentsError(
                f"{_flag(name)} gives {name}={explicit[name]!r}, but {source} {value!r}; drop the flag"
            )


def _check_layout(settings: Mapping[str, Any], world_size: int) -> int:
    """Refuse a parallel layout that the model or the number of processes cannot be split into.

    Returns:
        The data-parallel size.
    """
    tp, pp, cp = (
        settings[f"{kind}_parallel_size"] for kind in ("tensor_model", "pipeline_model", "context")
    )
    if cp > 1:
        raise ArgumentsError(
            f"--context-parallel-size {cp} is not supported: each rank computes the loss of whole "
            "sequences. Use --tensor-model-parallel-size with --sequence-parallel for long sequences"
        )
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        _check_divides("--tensor-model-parallel-size", tp, f"the model's {name}", settings[name])
    uneven = (
        "pipeline_model_parallel_layout",
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
    )
    if not any(settings[name] for name in uneven):
        _check_divides(
            "--pipeline-model-parallel-size", pp, "the model's num_layers", settings["num_layers"]
        )
    _check_divides(
        "tensor x pipeline parallel size", tp * pp, "the number of processes", world_size
    )
    data_parallel = world_size // (tp * pp)
    for batch, micro in (
        ("global_batch_size", "micro_batch_size"),
        ("eval_global_batch_size", "eval_micro_batch_size"),
    ):
        if settings[batch] is not None:
            micro_size = settings[micro] or settings["micro_batch_size"]
            _check_divides(
                f"{_flag(micro)} x data-parallel size",
                micro_size * data_parallel,
                _flag(batch),
                settings[batch],
            )
    limit = settings["max_position_embeddings"]
    if not 0 < settings["seq_length"] <= limit:
        raise ArgumentsError(
            f"--seq-length {settings['seq_length']} is outside 1..{limit}, the model's positions "
            "(max_position_embeddings)"
        )
    return data_parallel


def _check_divides(what: str, size: int, of: str, total: int) -> None:
    if size < 1 or total % size:
        allowed = [d for d in range(1, total + 1) if total % d == 0]
        raise ArgumentsError(
            f"{what} {size} does not divide {of} {total}; it can be {_listed(allowed)}"
        )


def _listed(values: list[int]) -> str:
    shown = values if len(values) <= 12 else [*values[:11], "...", values[-1]]
    return ", ".join(map(str, shown))


def _check_weights(settings: Mapping[str, Any]) -> None:
    """Refuse to train random weights unless that was asked for."""
    for name in ("load", "pretrained_checkpoint"):
        folder = settings[name]
        if folder and (Path(folder) / "latest_checkpointed_iteration.txt").is_file():
            return
    if settings["random_init"]:
        return
    given = [f"{_flag(n)} {settings[n]}" for n in ("load", "pretrained_checkpoint") if settings[n]]
    found = f"no checkpoint in {' or '.join(given)}" if given else "no weights were given"
    raise ArgumentsError(
        f"{found}; convert the HuggingFace model with `python -m checkpoint_conversion.hf_to_megatron "
        f"--hf {settings['hf_model']} --out DIR` and give --pretrained-checkpoint DIR, or ask for "
        "random weights with --random-init"
    )


def _objective_options(settings: Mapping[str, Any], explicit: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the chosen objective; building it here checks them before anything is loaded."""
    chosen = settings["objective"]
    own = {option.name for option in objective_options(chosen)}
    for name in objective_names():
        for option in objective_options(name):
            if option.name in explicit and option.name not in own:
                raise ArgumentsError(
                    f"{_flag(option.name)} is an option of --objective {name}, not of {chosen}; drop it"
                )
    options = {name: explicit[name] for name in own if name in explicit}
    try:
        build_objective(chosen, **options)
    except ValueError as error:
        raise ArgumentsError(f"--objective {chosen}: {error}") from error
    return options


def print_rank_0(message: str) -> None:
    """Print on the first process only; works before the process group exists."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)
