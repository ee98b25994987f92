"""The SFT run: Megatron's own `pretrain()` with our model config, data provider and forward step.

This is the counterpart of Megatron-LM's pretrain_gpt.py, and about as long.
"""

from __future__ import annotations

import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator

import torch
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from megatron.training import get_args, get_timers, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.training import update_seqlen_stats_from_cu_seqlens

from checkpoint_conversion.errors import ConversionError
from megatron_profit.data import DataError
from megatron_profit.models.layer_specs import layer_spec
from megatron_profit.models.record_spans import rotary_angles
from megatron_profit.training.arguments import ArgumentsError, SFTArguments, read_arguments
from megatron_profit.training.batch import get_batch
from megatron_profit.training.console import fail
from megatron_profit.training.datasets import SFTData, prepare_data
from megatron_profit.training.hf_weights import export, keep_in, load_hook
from megatron_profit.training.objective_flags import objective_from_args
from megatron_profit.training.objective_loss import MicroBatchLoss, ObjectiveLoss
from megatron_profit.training.token_metrics import ProbQuantiles


def run(device: str) -> None:
    """Train with the flags of the command line; bad input ends the process before Megatron starts.

    Args:
        device: What `megatron_profit.backends.activate` chose.
    """
    try:
        arguments = read_arguments(sys.argv[1:], device)
        data = prepare_data(arguments)
    except (ArgumentsError, ConversionError, DataError) as error:
        fail(error)
    train(arguments.with_rows(data.train.labelled_rows, data.valid_rows), data)


def train(arguments: SFTArguments, data: SFTData) -> None:
    """Hand everything to Megatron's `pretrain()`."""
    try:
        args = parse_and_validate_args(extra_args_provider=arguments.add_to_parser)
    except AssertionError as error:
        fail(f"Megatron refuses the flags: {error or traceback.format_exc()}")
    model_config = gpt_config_from_args(args)
    if args.spec is None:
        model_config.transformer_layer_spec = layer_spec
    if arguments.hf_weights is not None:
        model_config.pre_wrap_hooks.append(load_hook(arguments.hf_weights))
    chunks: list[MegatronModule] = []
    model_config.pre_wrap_hooks.append(keep_in(chunks))
    pretrain(
        pretrain_cfg_container_from_args(args, model_config),
        data.provider(args),
        ModelType.encoder_or_decoder,
        make_forward_step(objective_loss_from_args(args)),
    )
    if arguments.export is not None:
        _export(arguments, chunks)
    torch.distributed.destroy_process_group()


def _export(arguments: SFTArguments, chunks: list[MegatronModule]) -> None:
    try:
        export(arguments.export, chunks)
    except (ConversionError, OSError) as error:
        fail(
            f"--export-hf: {error}; a checkpoint that --save has written can still be exported: python "
            f"-m checkpoint_conversion.megatron_to_hf --megatron DIR --hf-template {arguments.hf_model} "
            "--out DIR"
        )


def objective_loss_from_args(args: Namespace) -> ObjectiveLoss:
    """The loss that the flags ask for."""
    return ObjectiveLoss(
        objective_from_args(args),
        normalization=args.objective_normalization,
        vocab_size=args.vocab_size,
        seed=args.seed,
        log_entropy=args.log_entropy,
        prob_quantiles=ProbQuantiles(tuple(args.log_quantiles)) if args.log_quantiles else None,
    )


def make_forward_step(objective_loss: ObjectiveLoss) -> Callable:
    """Megatron's forward step: a micro-batch through the model, and how to get its loss."""

    def forward_step(
        data_iterator: Iterator, model: GPTModel
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple]]:
        args, timers = get_args(), get_timers()
        gpt: GPTModel = unwrap_model(model)
        timers("batch-generator", log_level=2).start()
        batch = get_batch(data_iterator, isolate=needs_record_spans(args))
        timers("batch-generator").stop()
        if batch.spans is not None:
            batch.spans.rotary = rotary_angles(gpt, batch.position_ids, args.seq_length)
            if torch.is_grad_enabled() and not gpt.vp_stage:
                # For Megatron's count of FLOP/s; attention works on records, not on rows.
                update_seqlen_stats_from_cu_seqlens(batch.spans.cu_seqlens_q)
        loss: MicroBatchLoss = objective_loss.micro_batch(batch.sample_index, batch.position_ids)
        output = model(
            batch.tokens,
            batch.position_ids,
            None,
            labels=batch.labels,
            packed_seq_params=batch.spans,
            **loss.model_kwargs,
        )
        return output, loss.loss_func

    return forward_step


def needs_record_spans(args: Namespace) -> bool:
    """Whether attention has to know where the records of a row lie.

    Without packing, what follows a record is padding, which causal attention does not see. Under context
    parallelism our own attention goes by records in any case, Transformer Engine's does not.
    """
    return args.packing or (args.context_parallel_size > 1 and args.transformer_impl == "local")
