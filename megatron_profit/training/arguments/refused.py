"""Flags that this entry would have to ignore, or that contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_profit.flags import ArgumentsError, flag_of
from megatron_profit.objectives import Objective
from megatron_profit.training.arguments.command_line import REQUIRED, CommandLine
from megatron_profit.training.step import expert_flags

# Native flags that this entry would have to ignore, each with a remedy.
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
    "fp8_output_proj": "the objective multiplies with the output layer's weight itself, in the dtype of the "
    "parameters",
    "defer_embedding_wgrad_compute": "the objective computes the output layer's gradient itself",
    "overlap_moe_expert_parallel_comm": "the forward step has no schedule plan",
    "enable_cuda_graph": "give --cuda-graph-impl local",
    "external_cuda_graph": "give --cuda-graph-impl transformer_engine",
    "cuda_graph_scope_deprecated": "give --cuda-graph-modules",
    "rampup_batch_size": "Megatron ignores it; give --step-batch-size-schedule",
    "optimizer_cuda_graph": "a guard decides between the gradient and the optimizer's update",
    "perform_rl_step": "this entry trains on data sets",
    "phase_transition_iterations": "each phase would begin with the first record again; give --exit-interval "
    "to end a run early",
    "freeze_all_layers": "no weight would be trained",
    "inprocess_restart": "a process trains once; torchrun's --max-restarts starts the processes again",
    "dataloader_type": "the order of the records is drawn from --seed",
    **dict.fromkeys(
        ("non_persistent_save_interval", "non_persistent_ckpt_type"),
        "a shorter --save-interval with --keep-last N does the same, and its checkpoints are found again",
    ),
    **dict.fromkeys(
        (
            *("ckpt_format", "auto_detect_ckpt_format"),
            *("ckpt_convert_format", "ckpt_convert_save"),
        ),
        "checkpoints are written and read in the format torch_dist",
    ),
    "override_ckpt_iteration": "old policy, thresholds and totals in a checkpoint belong to its own step; "
    "--ckpt-step goes back to an earlier checkpoint",
    "enable_msc": "checkpoints are read from folders; mount the storage",
    "trust_remote_code": "code in a model folder is not run",
    "exit_signal_handler_for_training": "SIGTERM saves a checkpoint and ends the run",
    "hybrid_context_parallel": "--context-parallel-size splits every row alike",
    "tensor_parallel_num_weight_shards": "the objective reads the output layer's weight, of which each rank "
    "would hold a part; use --tensor-model-parallel-size or --use-distributed-optimizer",
    **dict.fromkeys(
        ("use_torch_fsdp2", "use_megatron_fsdp"),
        "the objective reads the output layer's weight, which FSDP shards; use "
        "--use-distributed-optimizer",
    ),
}
# Modules with which Megatron's graph of a layer holds attention. Without any it holds the whole layer.
_WITH_ATTENTION = {"transformer_engine": {"attn"}, "local": {"attn", "mlp", "moe"}}
# Flags of an architecture that no family of this project has. config.json decides the model.
OTHER_ARCHITECTURES = (
    *expert_flags.ARCHITECTURE,
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
    # Layers that do not know `RecordSpans` would let the records of a row see each other.
    *("apply_query_key_layer_scaling", "padded_vocab_size", "spec"),
)


def refuse_ignored(flags: CommandLine) -> None:
    """Refuse native flags that this entry would have to ignore."""
    for name, remedy in _REFUSED.items():
        if flags.changes(name):
            raise ArgumentsError(f"{flags.option(name)} cannot be used here: {remedy}")


def check_given(flags: CommandLine) -> None:
    """Refuse flags that would be ignored, and require the flags that are needed."""
    refuse_ignored(flags)
    given = flags.given
    spans = ("train_iters", "train_samples", "epochs")
    lengths = [flags.option(name) for name in spans if given.get(name) is not None]
    missing = [flags.option(name) for name in REQUIRED if given.get(name) is None]
    missing += ["--train-iters (or --epochs, or --train-samples)"] * (not lengths)
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ArgumentsError(
            f"{', '.join(missing)} {verb} missing; `megatron-profit sft --model ID --data FILE` derives "
            "the flags that are not given"
        )
    if len(lengths) > 1:
        raise ArgumentsError(f"{' and '.join(lengths)} contradict each other; give one of them")
    if given.get("step_batch_size_schedule") and given.get("train_iters"):
        raise ArgumentsError(
            f"--train-iters {given['train_iters']} cannot be used with --step-batch-size-schedule: Megatron "
            "would decay the learning rate as if all steps had the size of the micro-batches of all ranks; "
            "give --epochs or --train-samples"
        )
    if given.get("eval_iters") and not (given.get("valid_data") or given.get("valid_split")):
        raise ArgumentsError(
            f"--eval-iters {given['eval_iters']} needs data to evaluate on; give --valid-data or "
            "--valid-split"
        )
    if given.get("eval_iters") == 0 and given.get("valid_split"):
        raise ArgumentsError(
            f"--valid-split {given['valid_split']} sets records aside to evaluate on, and --eval-iters 0 "
            "evaluates on none; drop one"
        )
    if given.get("overwrite") and not any(map(given.get, ("save", "export_hf", "export_adapter"))):
        raise ArgumentsError(
            "--overwrite is about what --save and --export-hf hold, and neither is given; drop it"
        )
    exports = [name for name in ("export_hf", "export_adapter") if given.get(name)]
    if given.get("skip_train") and exports:
        raise ArgumentsError(
            f"--skip-train makes no step, so {flag_of(exports[0])} {given[exports[0]]} would describe a "
            "training that was not made; convert the checkpoint with checkpoint_conversion.megatron_to_hf, "
            "or drop one of the two"
        )
    _check_token_report(given)


def _check_token_report(given: Mapping[str, Any]) -> None:
    count, folder = given.get("token_report_records"), given.get("token_report")
    if count is not None and folder is None:
        raise ArgumentsError("--token-report-records is for --token-report, which is missing")
    if count is not None and count < 1:
        raise ArgumentsError(f"--token-report-records is {count}; it must be at least 1")
    evaluates = given.get("valid_data") or given.get("valid_split")
    if folder is not None and (not evaluates or given.get("eval_iters") == 0):
        raise ArgumentsError(
            f"--token-report {folder} is written at evaluations, and there are none; give --valid-data "
            "or --valid-split"
        )


def check_cuda_graphs(values: Mapping[str, Any]) -> None:
    """Refuse CUDA graphs of parts that do not compute the same in each micro-batch.

    Raises:
        ArgumentsError: The graph holds the objective, or an attention that goes by the records of its rows.
    """
    graphs = values["cuda_graph_impl"]
    modules = {getattr(module, "name", module) for module in values["cuda_graph_modules"]}
    if "full_iteration" in {graphs, *modules}:
        raise ArgumentsError(
            "a CUDA graph of the full iteration cannot be recorded: the objective waits for the number of "
            "supervised tokens; give --cuda-graph-impl local or transformer_engine"
        )
    if graphs == "none":
        return
    by_records = "--packing" if values["packing"] else ""
    if values["context_parallel_size"] > 1 and values["transformer_impl"] == "local":
        by_records = by_records or "--context-parallel-size without Transformer Engine"
    if by_records and (modules <= {"full"} or modules & _WITH_ATTENTION[graphs]):
        other = "moe_router" if values["num_experts"] else "mlp"
        choice = (
            "" if other in _WITH_ATTENTION[graphs] else f", or give --cuda-graph-modules {other}"
        )
        raise ArgumentsError(
            f"--cuda-graph-impl {graphs} would record attention, and with {by_records} attention goes by the "
            f"records of each row; drop one of the two{choice}"
        )


def reference_is_base(values: Mapping[str, Any]) -> bool:
    """Return whether the reference model is the frozen base of adapters, which are turned off to see it.

    Raises:
        ArgumentsError: `--ref-mode adapter-off` is given without adapters, or with another reference.
    """
    named = [name for name in ("ref_hf_model", "ref_cache") if values[name]]
    if values["ref_mode"] is None:
        return values["lora_rank"] is not None and not named
    if values["ref_mode"] == "cache":
        return False
    if values["lora_rank"] is None:
        raise ArgumentsError("--ref-mode adapter-off is for adapters; give --lora-rank, or drop it")
    if named:
        raise ArgumentsError(
            f"{flag_of(named[0])} {values[named[0]]} is for --ref-mode cache; with adapter-off the reference "
            "is the frozen base: drop one of the two"
        )
    return True


def reads_reference(values: Mapping[str, Any], objective: Objective) -> bool:
    """Return whether a run needs the reference model: for its objective, or to log its probabilities."""
    return objective.needs_reference or values["log_reference"]


def check_reference(values: Mapping[str, Any], objective: Objective) -> None:
    """Refuse flags of a reference model that are missing, or that the objective would ignore."""
    is_base = reference_is_base(values)
    if not reads_reference(values, objective):
        return
    asking = (
        f"--objective {values['objective']}" if objective.needs_reference else "--log-reference"
    )
    why = "" if values["ref_hf_model"] else objective.final.reference_must_differ
    if is_base and (values["ref_mode"] is not None or not why):
        graphs = values["cuda_graph_impl"]
        if graphs != "none":
            raise ArgumentsError(
                f"--cuda-graph-impl {graphs} records the model with its adapters on, so they cannot be "
                "turned off for the reference; drop it, or give --ref-mode cache"
            )
        return
    if why:
        frozen = "; to compare with the frozen base all the same, give --ref-mode adapter-off"
        raise ArgumentsError(
            f"--objective {values['objective']} {why}. Name a better model with --ref-hf-model DIR"
            + frozen * (values["lora_rank"] is not None)
        )
    if not (values["ref_cache"] or values["save"]):
        raise ArgumentsError(
            f"{asking} needs a place for the log-probabilities of the reference model; give --ref-cache DIR "
            "or --save DIR"
        )
    finetuned = "--load with --finetune" if values["finetune"] and values["load"] else ""
    start = "--pretrained-checkpoint" if values["pretrained_checkpoint"] else finetuned
    if start and not values["ref_hf_model"]:
        raise ArgumentsError(
            f"{asking} compares with a reference model, which is --hf-model by default, but this run "
            f"starts from {start}; name the reference with --ref-hf-model DIR"
        )
