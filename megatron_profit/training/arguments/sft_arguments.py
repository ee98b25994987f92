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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.training.arguments import add_megatron_arguments

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import family_for
from checkpoint_conversion.families.config import ConfigReader
from checkpoint_conversion.hf.folder import read_hf_config
from checkpoint_conversion.hf.model import HFModel, open_hf_model
from checkpoint_conversion.hf.output import HFOutput, plan_output
from checkpoint_conversion.hf.stop_tokens import plan_stop_tokens
from checkpoint_conversion.torch_dist.saved_arguments import check_checkpoint_matches
from checkpoint_conversion.torch_dist.writer import TRACKER
from megatron_profit.data import DataOptions, add_data_flags
from megatron_profit.megatron_patches import DEVICES
from megatron_profit.objectives import Objective, ScheduledObjective
from megatron_profit.training.arguments.native_flags import check_native_flags
from megatron_profit.training.checkpoints.choose import Resumed
from megatron_profit.training.checkpoints.folder import same_folder
from megatron_profit.training.checkpoints.keeping import KeepOptions, add_keep_flags, keep_options
from megatron_profit.training.checkpoints.run_record import GUARDED
from megatron_profit.training.checkpoints.save_folder import METRICS
from megatron_profit.training.monitoring.evaluation_report import DEFAULT_RECORDS
from megatron_profit.training.monitoring.guards import GuardOptions, add_guard_flags
from megatron_profit.training.statistics.given_statistics import needed_statistics
from megatron_profit.training.statistics.old_policy import DEFAULT_STEPS, check_old_policy
from megatron_profit.training.step import experts
from megatron_profit.training.step.objective_flags import (
    add_objective_flags,
    check_objective,
    check_steps,
    flag_of,
    load_outside_objective,
)

# What Megatron's local layers need to run without Transformer Engine and Apex.
_LOCAL_LAYERS = {
    "transformer_impl": "local",
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
    "make_vocab_size_divisible_by": 1,
    "log_interval": 1,
    "save_interval": 500,
    "eval_interval": 100,
    "exit_signal_handler": True,
    # Megatron's reruns find broken hardware: they leave out the first step and end a run with a checkpoint
    # that another GPU has to go on from. What is wrong with data or model is a matter of our guards.
    "rerun_mode": "disabled",
}
# Native flags that this entry would have to ignore, with what to do instead.
_REFUSED = {
    "sft": "this entry replaces Megatron's stock SFT; drop the flag",
    **dict.fromkeys(
        (
            *("data_path", "data_args_path", "train_data_path", "per_split_data_args_path"),
            *("split", "mock_data", "fim_data"),
        ),
        "give chat files with --data",
    ),
    **dict.fromkeys(
        ("valid_data_path", "test_data_path", "multiple_validation_sets", "full_validation"),
        "give chat files with --valid-data, all of which is evaluated",
    ),
    **dict.fromkeys(
        ("reset_position_ids", "reset_attention_mask", "dataloader_inter_document_masking"),
        "--packing keeps the records of a row apart",
    ),
    "eod_mask_loss": "what is trained is decided by the roles of the chat",
    **dict.fromkeys(
        (
            *("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "chat_template"),
            *("sft_tokenizer_prompt_format", "use_tokenizer_model_from_checkpoint_args"),
        ),
        "tokenizer and chat template come from --hf-model",
    ),
    **dict.fromkeys(
        ("use_checkpoint_args", "use_mp_args_from_checkpoint_args", "yaml_cfg"),
        "the architecture comes from --hf-model and the layout from the flags",
    ),
    **dict.fromkeys(
        (
            *("cross_entropy_loss_fusion", "fp16_lm_cross_entropy", "logits_load_dir"),
            *("logits_save_dir", "mtp_num_layers"),
        ),
        "the loss is computed by --objective, in fp32",
    ),
    "defer_embedding_wgrad_compute": "the objective computes the output layer's gradient itself",
    "overlap_moe_expert_parallel_comm": "the forward step has no schedule plan",
    "optimizer_cuda_graph": "a guard decides between the gradient and the optimizer's update",
    "perform_rl_step": "this entry trains on data sets",
    "dataloader_type": "the order of the records is drawn from --seed",
    **dict.fromkeys(
        ("non_persistent_save_interval", "non_persistent_ckpt_type"),
        "a shorter --save-interval with --keep-last N does the same, and its checkpoints are found again",
    ),
    **dict.fromkeys(
        ("ckpt_format", "auto_detect_ckpt_format"),
        "checkpoints are written and read in the format torch_dist",
    ),
    "enable_msc": "checkpoints are read from folders; mount the storage",
    "trust_remote_code": "code in a model folder is not run",
    "exit_signal_handler_for_training": "SIGTERM saves a checkpoint and ends the run",
    "hybrid_context_parallel": "--context-parallel-size splits every row alike",
    **dict.fromkeys(
        ("use_torch_fsdp2", "use_megatron_fsdp"),
        "the objective reads the output layer's weight, which FSDP shards; use "
        "--use-distributed-optimizer",
    ),
}
# Flags of an architecture that no family of this project has. The model is what config.json says it is.
_OTHER_ARCHITECTURES = (
    *experts.ARCHITECTURE,
    *("multi_latent_attention", "hybrid_layer_pattern"),
    *("hybrid_override_pattern", "is_hybrid_model", "experimental_attention_variant", "use_mup"),
    *("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"),
    *("encoder_num_layers", "decoder_num_layers", "encoder_seq_length", "decoder_seq_length"),
    *(
        "rotary_interleaved",
        "rotary_seq_len_interpolation_factor",
        "rope_scaling_factor",
        "rope_type",
    ),
    *("no_rope_freq", "mrope_section", "rotary_scaling_factor", "add_position_embedding"),
    *(
        "openai_gelu",
        "squared_relu",
        "quick_geglu",
        "glu_linear_offset",
        "activation_func_clamp_value",
    ),
    *("layernorm_zero_centered_gamma", "apply_residual_connection_post_layernorm", "qk_l2_norm"),
    *("softmax_type", "window_size", "window_attn_skip_freq", "attention_output_gate"),
    *("apply_query_key_layer_scaling", "padded_vocab_size"),
)


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
        data: What the data flags ask for.
        check_steps: Refuses a number of steps in which warm-ups or schedules would not end.
        epochs: Epochs to train, where the flags give no iterations or samples.
        defaults: Values that replace the defaults of Megatron's parser.
        settings: All arguments by name, as far as the flags tell.
        batch_size, eval_batch_size: Rows of one iteration over all ranks.
        eval_iters: Evaluation iterations that were asked for; None for all of the validation data.
        hf_weights: The folder's weights where the run starts from them; None where it starts from a
            checkpoint or from random weights.
        export: The HuggingFace folder to write at the end, if any.
        reference: The reference model and where its log-probabilities are kept, if it is needed.
        save: The folder of checkpoints, if any.
        keep: Which checkpoints stay, and when the run stops early.
        metrics_file: Where the metrics are written as JSON lines, if anywhere.
    """

    hf_model: Path
    data: DataOptions
    check_steps: Callable[[int], None]
    epochs: int | None
    defaults: Mapping[str, Any]
    settings: Mapping[str, Any]
    batch_size: int
    eval_batch_size: int
    eval_iters: int | None
    hf_weights: HFModel | None
    export: HFOutput | None
    reference: tuple[HFModel, Path] | None
    save: Path | None
    keep: KeepOptions
    metrics_file: Path | None

    @property
    def steps(self) -> int | None:
        """Steps of the whole run, from its beginning; None where the batch size changes on the way."""
        derived = self.defaults.get("train_iters")
        if derived is not None:
            return derived
        return _steps_of_flags(self.settings, self.batch_size)

    @property
    def namespace(self) -> argparse.Namespace:
        """All arguments by name, as Megatron will get them."""
        derived = {k: v for k, v in self.defaults.items() if self.settings.get(k) is None}
        return argparse.Namespace(**{**self.settings, **derived})

    def add_to_parser(self, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Megatron's `extra_args_provider`."""
        parser = add_arguments(parser)
        parser.set_defaults(**self.defaults)
        return parser

    def with_rows(
        self, epochs_rows: int | None, valid_rows: int, resumed: Resumed | None = None
    ) -> SFTArguments:
        """These arguments with as many iterations as the rows of all epochs need, where epochs were asked
        for, and evaluations that see each validation row once, unless --eval-iters says otherwise.

        Args:
            epochs_rows: Rows of all epochs; None where the length of the run is not given in epochs.
            valid_rows: Rows of an evaluation.
            resumed: The checkpoint that the run goes on from, if any.

        Raises:
            ArgumentsError: The iterations leave none for what comes after a warm-up, or cannot be counted.
        """
        iters = self.eval_iters
        if iters is None:
            iters = math.ceil(valid_rows / self.eval_batch_size)
        iterations, rows = (0, 0) if resumed is None else resumed.done
        first_step = 1 if resumed is None else resumed.iteration + 1
        defaults = {**self.defaults, "eval_iters": iters, "first_step": first_step}
        if epochs_rows is not None:
            steps = max(iterations + math.ceil((epochs_rows - rows) / self.batch_size), 0)
            defaults["train_iters"] = steps
            self.check_steps(max(steps, iterations))  # `check_length` refuses fewer than are done
        if rows != iterations * self.batch_size and not _batch_size_changes(self.settings):
            defaults |= self._with_another_batch_size(iterations, rows, defaults.get("train_iters"))
        return replace(self, defaults=defaults)

    def with_turn_end(self, token: int | None, tell: Callable[[str], None]) -> SFTArguments:
        """These arguments with an export that stops where training teaches the model to end a turn.

        Args:
            token: Id of the token that ends a turn; None where the chat template ends it in ordinary text.
            tell: Gets a line of text where the files of the model name no such token.

        Raises:
            ConversionError: A file of the model has stop tokens that are not token ids.
        """
        if token is None:
            tell(
                "> warning: the chat template ends a turn with ordinary text, so no token stops the trained "
                "model; give that text as a stop string to the program that generates"
            )
        stops = plan_stop_tokens(self.hf_model, read_hf_config(self.hf_model), token)
        if stops.added is not None:
            tell(f"> in an export, {stops}")
        return self if self.export is None else replace(self, export=self.export.stopping_at(token))

    def _with_another_batch_size(
        self, iterations: int, rows: int, epochs_iters: int | None
    ) -> dict[str, int]:
        """What keeps the end of the learning rate's schedule at the end of a run that goes on with batches of
        another size: Megatron counts the schedule in rows, as if all batches had the size of now."""
        samples, train_iters = self.settings["train_samples"], self.settings["train_iters"]
        if samples is not None:
            more = math.ceil((samples - rows) / self.batch_size)
            raise ArgumentsError(
                f"--train-samples {samples} cannot be counted in batches of two sizes: the checkpoint has "
                f"taken {rows} rows in {iterations} steps, and --global-batch-size is {self.batch_size} now; "
                f"give --train-iters {iterations + more} in place of it"
            )
        if self.settings["lr_decay_iters"] is not None:
            return {}
        steps = train_iters if epochs_iters is None else epochs_iters
        left = max(steps - iterations, 0)
        return {"lr_decay_iters": math.ceil(rows / self.batch_size) + left}


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
        "Its weights are read too, unless --load or --pretrained-checkpoint holds a checkpoint.",
    )
    group.add_argument(
        "--random-init",
        action="store_true",
        help="Start from random weights, not from those of --hf-model, where --load and "
        "--pretrained-checkpoint hold no checkpoint.",
    )
    group.add_argument(
        "--export-hf",
        metavar="DIR",
        help="HuggingFace folder to write after the last step; it must not exist yet, unless a run with a "
        "checkpoint in --save goes on and an export was all that wrote there.",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="Let this run take the place of one in --save, whose checkpoints and metrics are removed when "
        "the new run is ready for its first step, and of an earlier export in --export-hf.",
    )
    group.add_argument(
        "--allow-change",
        nargs="+",
        choices=GUARDED,
        default=(),
        metavar="NAME",
        help="Go on from a checkpoint of a run in which these were others, which is an error without it: "
        f"{', '.join(GUARDED)}.",
    )
    group.add_argument(
        "--skip-checksums",
        action="store_true",
        help="Load a checkpoint without comparing its checksums first, which reads all of it once.",
    )
    add_keep_flags(group)
    add_data_flags(group)
    group.add_argument(
        "--epochs",
        type=int,
        metavar="E",
        help="Train every record this often, in place of --train-iters or --train-samples.",
    )
    add_objective_flags(group)
    add_guard_flags(group)
    group.add_argument(
        "--metrics-file",
        metavar="FILE",
        help="JSON lines with the metrics of each logged step and each evaluation; by default "
        "metrics.jsonl in --save.",
    )
    group.add_argument(
        "--token-report",
        metavar="DIR",
        help="Write a token report of some validation records at each evaluation.",
    )
    group.add_argument(
        "--token-report-records",
        type=int,
        default=DEFAULT_RECORDS,
        metavar="N",
        help="How many records the token report shows.",
    )
    group.add_argument(
        "--psft-steps-per-refresh",
        type=int,
        metavar="K",
        default=DEFAULT_STEPS,
        help="Optimizer steps of an outer batch, before which --objective psft refreshes its old policy.",
    )
    group.add_argument(
        "--ref-hf-model",
        metavar="DIR",
        help="HuggingFace folder with the weights of the reference model, for the objectives that have one; "
        "by default --hf-model.",
    )
    group.add_argument(
        "--ref-cache",
        metavar="DIR",
        help="Where the reference's log-probabilities are kept, to be computed only once; by default "
        "ref_log_prob in --save.",
    )
    return parser


def read_arguments(argv: list[str], device: str) -> SFTArguments:
    """Check the flags of a command line and derive what Megatron needs.

    Args:
        argv: The flags, without the program's name.
        device: "cuda" or "cpu", as `megatron_profit.megatron_patches.activate` chose it.

    Raises:
        ArgumentsError: For flags that are missing, contradict each other or would be ignored.
        ConversionError: For a HuggingFace folder that is missing, broken or of an unknown
            architecture, or a checkpoint of another architecture.
    """
    flags = _parse(argv)
    _check_given(flags)
    explicit, hf_model = flags.explicit, Path(flags.explicit["hf_model"])
    config = read_hf_config(hf_model)
    fixed, soft = platform_settings(device, local=explicit.get("transformer_impl") == "local")
    flags.refuse_contradictions(fixed, "this machine needs")
    soft = {**_DEFAULTS, **soft, **_scheduler_of_flags(explicit)}
    if config.get("initializer_range") is not None:
        read = ConfigReader(config, "every family")
        soft["init_method_std"] = read.number("initializer_range", at_least=0.0)
    model = _model_settings(flags, config, hf_model / "config.json")

    settings = {**flags.defaults, **model, **soft, **fixed, **explicit}
    soft |= experts.expert_defaults(settings)
    settings = {**settings, **soft, **fixed, **explicit}
    try:
        check_native_flags(settings, flags.option)
        GuardOptions.from_settings(settings)
    except ValueError as error:
        raise ArgumentsError(str(error)) from error
    _check_logs(settings)
    data_parallel = _check_layout(settings, int(os.environ.get("WORLD_SIZE", "1")))
    hf_weights = _hf_weights(settings, config)
    multiple = settings["tensor_model_parallel_size"] * settings["make_vocab_size_divisible_by"]
    options, objective = _objective(settings, explicit)
    batch_size = settings["global_batch_size"] or settings["micro_batch_size"] * data_parallel
    check_steps = partial(_check_steps, settings, objective)
    steps = _steps_of_flags(settings, batch_size)
    if steps is not None:
        check_steps(steps)
    derived = {
        "padded_vocab_size": math.ceil(settings["vocab_size"] / multiple) * multiple,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str(hf_model),
        "dataloader_type": "single",
        "calculate_per_token_loss": True,
        "objective_options": options,
    }
    eval_iters = explicit.get("eval_iters")
    return SFTArguments(
        hf_model=hf_model,
        data=DataOptions.from_flags(
            {**settings, "valid_data": None} if eval_iters == 0 else settings
        ),
        check_steps=check_steps,
        epochs=settings["epochs"],
        defaults={**model, **soft, **fixed, **derived},
        settings=settings,
        batch_size=batch_size,
        eval_batch_size=settings["eval_global_batch_size"] or batch_size,
        eval_iters=eval_iters,
        hf_weights=hf_weights,
        export=_export(settings),
        reference=_reference(settings, objective, config),
        save=Path(settings["save"]) if settings["save"] else None,
        keep=_keep(settings),
        metrics_file=_metrics_file(settings),
    )


def _scheduler_of_flags(explicit: Mapping[str, Any]) -> dict[str, Any]:
    """Let the flags decide the schedule of the learning rate after a resume too, unless they name the
    checkpoint's."""
    checkpoint, flags = "use_checkpoint_opt_param_scheduler", "override_opt_param_scheduler"
    if explicit.get(checkpoint) and explicit.get(flags):
        raise ArgumentsError(
            "--use-checkpoint-opt_param-scheduler and --override-opt_param-scheduler contradict each other; "
            "drop one"
        )
    return {} if explicit.get(checkpoint) else {flags: True}


def _check_given(flags: _Flags) -> None:
    """Refuse flags that would be ignored, and miss those that are needed."""
    explicit = flags.explicit
    for name, remedy in _REFUSED.items():
        if flags.changes(name):
            raise ArgumentsError(f"{flags.option(name)} cannot be used here: {remedy}")
    for name in ("hf_model", "data", "seq_length", "micro_batch_size", "lr"):
        if explicit.get(name) is None:
            raise ArgumentsError(f"{flags.option(name)} is missing")
    spans = ("train_iters", "train_samples", "epochs")
    given = [flags.option(name) for name in spans if explicit.get(name) is not None]
    if not given:
        raise ArgumentsError("--train-iters (or --epochs, or --train-samples) is missing")
    if len(given) > 1:
        raise ArgumentsError(f"{' and '.join(given)} contradict each other; give one of them")
    if explicit.get("eval_iters") and not (
        explicit.get("valid_data") or explicit.get("valid_split")
    ):
        raise ArgumentsError(
            f"--eval-iters {explicit['eval_iters']} needs data to evaluate on; give --valid-data or "
            "--valid-split"
        )
    if explicit.get("eval_iters") == 0 and explicit.get("valid_split"):
        raise ArgumentsError(
            f"--valid-split {explicit['valid_split']} sets records aside to evaluate on, and --eval-iters 0 "
            "evaluates on none; drop one"
        )
    if explicit.get("overwrite") and not (explicit.get("save") or explicit.get("export_hf")):
        raise ArgumentsError(
            "--overwrite is about what --save and --export-hf hold, and neither is given; drop it"
        )
    _check_token_report(explicit)


def _check_token_report(explicit: Mapping[str, Any]) -> None:
    count, folder = explicit.get("token_report_records"), explicit.get("token_report")
    if count is not None and folder is None:
        raise ArgumentsError("--token-report-records is for --token-report, which is missing")
    if count is not None and count < 1:
        raise ArgumentsError(f"--token-report-records is {count}; it must be at least 1")
    evaluates = explicit.get("valid_data") or explicit.get("valid_split")
    if folder is not None and (not evaluates or explicit.get("eval_iters") == 0):
        raise ArgumentsError(
            f"--token-report {folder} is written at evaluations, and there are none; give --valid-data "
            "or --valid-split"
        )


def _model_settings(flags: _Flags, config: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Megatron arguments of the architecture; a flag that says otherwise is refused."""
    model = family_for(config).megatron_arguments(config)
    # Padding of the vocabulary is a matter of the layout, not of the model.
    del model["make_vocab_size_divisible_by"]
    unchanged = {name: flags.defaults[name] for name in _OTHER_ARCHITECTURES}
    settled = {name: value for name, value in model.items() if name not in experts.CHOICES}
    flags.refuse_contradictions({**unchanged, **settled}, f"{source} says")
    return model


def platform_settings(device: str, local: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Megatron arguments that the device and the installed libraries decide.

    Args:
        device: "cuda" or "cpu".
        local: Whether the local layers were asked for although Transformer Engine may be there.

    Returns:
        What has to be so, and what a flag may change.
    """
    if device == "cpu":
        # Loading rows is next to nothing beside training, and its processes would share the cores.
        return {**_LOCAL_LAYERS, **_CPU, "gradient_accumulation_fusion": False}, {"num_workers": 0}
    # The output layer is Megatron's own in any case, and its fusion comes from Apex.
    fusion = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    soft = {"gradient_accumulation_fusion": fusion}
    if local or importlib.util.find_spec("transformer_engine") is None:
        return dict(_LOCAL_LAYERS), soft
    return {}, soft


@dataclass(frozen=True)
class _Flags:
    """A parsed command line.

    Attributes:
        explicit: The flags that were given, by argument name.
        defaults: The defaults of all flags.
        options: How each flag is written.
    """

    explicit: Mapping[str, Any]
    defaults: Mapping[str, Any]
    options: Mapping[str, str]

    def option(self, name: str) -> str:
        """How the flag of an argument is written."""
        return self.options.get(name, flag_of(name))

    def changes(self, name: str) -> bool:
        """Whether the flag was given with another value than its default."""
        return name in self.explicit and self.explicit[name] != self.defaults[name]

    def refuse_contradictions(self, derived: Mapping[str, Any], source: str) -> None:
        for name, value in derived.items():
            if name in self.explicit and self.explicit[name] != value:
                raise ArgumentsError(
                    f"{self.option(name)} gives {name}={self.explicit[name]!r}, but {source} {value!r}; "
                    "drop the flag"
                )


def _parse(argv: list[str]) -> _Flags:
    parser = _Parser(
        prog="megatron-profit-sft",
        usage="torchrun … -m megatron_profit.sft --hf-model DIR --data FILE… [flags]",
        description="Supervised fine-tuning on Megatron-Core. Every native Megatron flag works too.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    try:
        load_outside_objective(argv)
        parser = add_megatron_arguments(add_arguments(parser))
    except ValueError as error:
        raise ArgumentsError(f"--objective: {error}") from error
    except argparse.ArgumentError as error:
        raise ArgumentsError(
            f"an option of an objective has the name of a native flag ({error}); rename it"
        ) from error
    defaults = {action.dest: action.default for action in parser._actions}
    options = {action.dest: action.option_strings[0] for action in reversed(parser._actions)}
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return _Flags(vars(parser.parse_args(argv)), defaults, options)


def _check_layout(settings: Mapping[str, Any], world_size: int) -> int:
    """Refuse a parallel layout that the model or the number of processes cannot be split into.

    Returns:
        The data-parallel size.
    """
    tp, pp, cp = (
        settings[f"{kind}_parallel_size"] for kind in ("tensor_model", "pipeline_model", "context")
    )
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        _check_divides("--tensor-model-parallel-size", tp, f"the model's {name}", settings[name])
    _check_pipeline(settings, pp)
    _check_divides(
        "tensor x pipeline x context parallel size"
        if cp > 1
        else "tensor x pipeline parallel size",
        tp * pp * cp,
        "the number of processes",
        world_size,
    )
    data_parallel = world_size // (tp * pp * cp)
    for batch, micro in (
        ("global_batch_size", "micro_batch_size"),
        ("eval_global_batch_size", "eval_micro_batch_size"),
    ):
        if settings[batch] is not None:
            micro_size = settings[micro] or settings["micro_batch_size"]
            _check_divides(
                f"{flag_of(micro)} x data-parallel size",
                micro_size * data_parallel,
                flag_of(batch),
                settings[batch],
            )
    _check_split_of_rows(settings, tp, cp)
    limit = settings["max_position_embeddings"]
    if not 0 < settings["seq_length"] <= limit:
        raise ArgumentsError(
            f"--seq-length {settings['seq_length']} is outside 1..{limit}, the model's positions "
            "(max_position_embeddings)"
        )
    return data_parallel


def _check_split_of_rows(settings: Mapping[str, Any], tp: int, cp: int) -> None:
    """Refuse rows that sequence and context parallelism cannot split evenly."""
    seq_length = settings["seq_length"]
    parts = 2 * cp if cp > 1 else 1
    if seq_length % parts:
        raise ArgumentsError(
            f"--seq-length {seq_length} is not a multiple of {parts}: with --context-parallel-size {cp} each "
            "rank holds two equal chunks of a row"
        )
    if settings["sequence_parallel"]:
        _check_divides(
            "--sequence-parallel with tensor parallel size",
            tp,
            "--seq-length" if cp == 1 else f"the positions of one of {cp} context-parallel ranks",
            seq_length // cp,
        )
    gathers = settings["packing"] or settings["transformer_impl"] == "local"
    if cp > 1 and gathers and settings["cp_comm_type"] not in (["p2p"], ["all_gather"]):
        raise ArgumentsError(
            f"--cp-comm-type {' '.join(settings['cp_comm_type'])} needs Transformer Engine and rows that "
            "are not packed; otherwise keys and values are gathered: drop the flag"
        )


def _check_pipeline(settings: Mapping[str, Any], pp: int) -> None:
    """Refuse layers that do not split evenly, where the flags do not say how they split."""
    given = (
        "pipeline_model_parallel_layout",
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
    )
    if any(settings[name] for name in given):
        return
    ends = [
        end for end in ("embedding", "loss") if settings[f"account_for_{end}_in_pipeline_split"]
    ]
    layers = settings["num_layers"] + len(ends)
    what = " and ".join(["the model's num_layers", *ends])
    _check_divides("--pipeline-model-parallel-size", pp, what, layers)
    for name in ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"):
        if settings[name]:
            of = "the layers of a pipeline rank"
            _check_divides(flag_of(name), settings[name], of, layers // pp)


def _check_divides(what: str, size: int, of: str, total: int) -> None:
    if size < 1 or total % size:
        allowed = [d for d in range(1, total + 1) if total % d == 0]
        raise ArgumentsError(
            f"{what} {size} does not divide {of} {total}; it can be {_listed(allowed)}"
        )


def _listed(values: list[int]) -> str:
    shown = values if len(values) <= 12 else [*values[:11], "...", values[-1]]
    return ", ".join(map(str, shown))


def _hf_weights(settings: Mapping[str, Any], config: Mapping[str, Any]) -> HFModel | None:
    """The HuggingFace weights to start from; None where there is a checkpoint, or for random ones.

    A checkpoint of another architecture is refused, and so is a folder that was named as the source
    of the weights and holds none: only an empty --load that is also --save is a run that begins.
    """
    for name in ("load", "pretrained_checkpoint"):
        folder = settings[name]
        if folder and (Path(folder) / TRACKER).is_file():
            check_checkpoint_matches(Path(folder), config, Path(settings["hf_model"]))
            return None
    started = settings["pretrained_checkpoint"]
    if settings["random_init"] and not started:
        return None
    for name in ("load", "pretrained_checkpoint"):
        folder = settings[name]
        if folder and not (name == "load" and same_folder(folder, settings["save"])):
            raise ArgumentsError(
                f"no checkpoint in {flag_of(name)} {folder}; without the flag, the run starts from the "
                f"weights of --hf-model {settings['hf_model']}, with --random-init from random ones"
            )
    try:
        model = open_hf_model(settings["hf_model"])
    except ConversionError as error:
        raise ArgumentsError(
            "no checkpoint was given (--pretrained-checkpoint, --load), and the weights of --hf-model "
            f"cannot be used: {error}"
        ) from error
    return model


def _metrics_file(settings: Mapping[str, Any]) -> Path | None:
    """Where the metrics go: a file that can be written, if any was asked for or there is a --save."""
    if settings["metrics_file"] is None and not settings["save"]:
        return None
    path = Path(settings["metrics_file"] or Path(settings["save"]) / METRICS)
    if path.is_dir():
        raise ArgumentsError(f"--metrics-file {path} is a folder; name a file")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ArgumentsError(
            f"--metrics-file {path} is a link, a pipe or a device; name a regular file, or remove it"
        )
    if settings["metrics_file"] is not None:
        _check_place(f"--metrics-file {path}", path.parent)
    return path


def _check_logs(settings: Mapping[str, Any]) -> None:
    """Refuse places for curves that cannot be written to, and what W&B would miss."""
    for name in ("tensorboard_dir", "token_report", "wandb_save_dir"):
        if settings[name]:
            _check_place(f"{flag_of(name)} {settings[name]}", Path(settings[name]))
    if settings["wandb_project"] and not settings["wandb_exp_name"]:
        raise ArgumentsError("--wandb-project needs the name of the run; give --wandb-exp-name")
    if settings["wandb_project"] and not (settings["wandb_save_dir"] or settings["save"]):
        raise ArgumentsError(
            "--wandb-project needs a place for its files; give --wandb-save-dir DIR or --save DIR"
        )


def _check_place(flag: str, folder: Path) -> None:
    """Refuse a folder that neither can be written to nor made."""
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not place.is_dir():
        raise ArgumentsError(f"{flag}: {place} is not a folder; name another place")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ArgumentsError(f"{flag}: {place} cannot be written to; name another place")


def _export(settings: Mapping[str, Any]) -> HFOutput | None:
    """The HuggingFace folder to write at the end, in the dtype of the model's parameters."""
    if settings["export_hf"] is None:
        return None
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((half[name] for name in half if settings[name]), torch.float32)
    overwrite = _goes_on(settings) or settings["overwrite"]
    return plan_output(settings["export_hf"], settings["hf_model"], dtype, overwrite)


def _goes_on(settings: Mapping[str, Any]) -> bool:
    """Whether the run has a checkpoint of its own: what it exported before is an earlier state of it."""
    load = settings["load"]
    return same_folder(load, settings["save"]) and (Path(load) / TRACKER).is_file()


def _keep(settings: Mapping[str, Any]) -> KeepOptions:
    try:
        return keep_options(settings)
    except ValueError as error:
        raise ArgumentsError(str(error)) from error


def _reference(
    settings: Mapping[str, Any],
    objective: Objective | ScheduledObjective,
    config: Mapping[str, Any],
) -> tuple[HFModel, Path] | None:
    """The reference model and the folder of its log-probabilities, where the objective needs them."""
    if "ref_log_prob" not in needed_statistics(objective):
        for name in ("ref_hf_model", "ref_cache"):
            if settings[name]:
                raise ArgumentsError(
                    f"{flag_of(name)} is for objectives with a reference model, which "
                    f"{settings['objective']} is not with these options; drop it"
                )
        return None
    if not (settings["ref_cache"] or settings["save"]):
        raise ArgumentsError(
            f"--objective {settings['objective']} needs a place for the log-probabilities of its "
            "reference model; give --ref-cache DIR or --save DIR"
        )
    if settings["pretrained_checkpoint"] and not settings["ref_hf_model"]:
        raise ArgumentsError(
            f"--objective {settings['objective']} compares with a reference model, which is --hf-model by "
            "default, but this run starts from --pretrained-checkpoint; name the reference with "
            "--ref-hf-model DIR"
        )
    if settings["objective"] == "rho1" and not settings["ref_hf_model"]:
        raise ArgumentsError(
            "--objective rho1 ranks by what the reference knows and the model does not; against the weights "
            "that it starts from that is noise. Name a better model with --ref-hf-model DIR"
        )
    folder = settings["ref_hf_model"] or settings["hf_model"]
    try:
        model = open_hf_model(folder)
        same = model.family.megatron_arguments(model.config) == family_for(
            config
        ).megatron_arguments(config)
    except ConversionError as error:
        raise ArgumentsError(
            f"the weights of the reference model {folder} cannot be used: {error}; give another folder "
            "with --ref-hf-model"
        ) from error
    if not same:
        raise ArgumentsError(
            f"--ref-hf-model {folder} has another architecture than --hf-model {settings['hf_model']}; "
            "the reference is computed with the model that is trained, so both must be alike"
        )
    return model, Path(settings["ref_cache"] or Path(settings["save"]) / "ref_log_prob")


def _objective(
    settings: Mapping[str, Any], explicit: Mapping[str, Any]
) -> tuple[dict[str, Any], Objective | ScheduledObjective]:
    """The options of the objective and itself, checked with the experts that it must leave alone."""
    try:
        options, objective = check_objective(settings, explicit)
        if "old_log_prob" in objective.required_statistics:
            check_old_policy(settings)
        elif "psft_steps_per_refresh" in explicit:
            raise ValueError(
                f"--psft-steps-per-refresh is for --objective psft, not for {settings['objective']}; "
                "drop it"
            )
        final = objective.objective if isinstance(objective, ScheduledObjective) else objective
        normalization = settings["objective_normalization"] or final.normalization
        experts.check_experts(settings, normalization, int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError as error:
        raise ArgumentsError(str(error)) from error
    return options, objective


def _steps_of_flags(settings: Mapping[str, Any], batch_size: int) -> int | None:
    """Steps of the run where flags alone say it: not with epochs, nor where the batch size changes."""
    if settings["train_samples"] is None:
        return settings["train_iters"]
    return None if _batch_size_changes(settings) else settings["train_samples"] // batch_size


def _batch_size_changes(settings: Mapping[str, Any]) -> bool:
    """Whether the batch size changes during the run, so that Megatron itself counts rows."""
    return bool(settings["rampup_batch_size"] or settings["step_batch_size_schedule"])


def _check_steps(
    settings: Mapping[str, Any], objective: Objective | ScheduledObjective, steps: int
) -> None:
    if steps < 1:
        raise ArgumentsError(
            f"--train-samples {settings['train_samples']} is less than a global batch; there is no step"
        )
    unit = "iters" if settings["train_samples"] is None else "samples"
    length = settings["train_samples"] or steps
    warmup, decay = settings[f"lr_warmup_{unit}"], settings[f"lr_decay_{unit}"] or length
    if warmup >= decay:
        raise ArgumentsError(
            f"--lr-warmup-{unit} {warmup} leaves none of the {decay} {unit} for the decay of the learning "
            f"rate; give fewer than {decay}"
        )
    try:
        check_steps(objective, steps)
    except ValueError as error:
        raise ArgumentsError(str(error)) from error
