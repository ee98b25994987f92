"""The forward pass alone: the logits of given tokens, at any layout."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_model_config, unwrap_model
from megatron.training import get_args
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.initialize import initialize_megatron
from megatron.training.training import setup_model_and_optimizer

from checkpoint_conversion.engine.output import whole_file
from checkpoint_conversion.errors import ConversionError
from megatron_profit.flags import ArgumentsError
from megatron_profit.megatron_patches.callbacks import TrainContext
from megatron_profit.models.layer_specs import layer_spec
from megatron_profit.models.record_spans import context_parallel_index, rotary_angles
from megatron_profit.training.arguments.command_line import provider_of
from megatron_profit.training.arguments.derive import derive
from megatron_profit.training.arguments.disk import open_hf_weights
from megatron_profit.training.arguments.lora_files import open_lora
from megatron_profit.training.checkpoints.adapters import adapter_hook
from megatron_profit.training.checkpoints.choose import CheckpointFlags, check_checkpoints
from megatron_profit.training.checkpoints.folder import CheckpointError
from megatron_profit.training.checkpoints.hf_weights import load_hook
from megatron_profit.training.process.console import fail
from megatron_profit.training.process.ranks import world_size
from megatron_profit.training.process.shutdown import end_communication
from megatron_profit.training.statistics.lookahead_pass import micro_batch_multiple
from megatron_profit.training.step.batch import get_batch

# Settings of a training run of no steps: no optimizer is built, and none is loaded.
_NO_TRAINING = (
    "--data unread --objective sft --lr 1 --train-iters 1 --micro-batch-size 1 --skip-train"
)
_WEIGHTS_ONLY = "--no-load-optim --no-load-rng"


def run(argv: Sequence[str], device: str) -> None:
    """Read the flags, load the model, save the logits.

    Args:
        argv: The flags, without the program's name.
        device: The device that `megatron_profit.megatron_patches.activate` chose.
    """
    parser = argparse.ArgumentParser("python -m megatron_profit.logits", allow_abbrev=False)
    parser.add_argument("--tokens", required=True, help="file of torch.save: token ids [N, S]")
    parser.add_argument(
        "--logits", required=True, type=Path, help="file to write: fp32 [N, S, vocabulary]"
    )
    own, flags = parser.parse_known_args(argv)
    if not own.logits.parent.is_dir() or own.logits.is_dir():
        parser.error(f"--logits {own.logits}: name a file in a folder that exists")
    try:
        tokens = read_tokens(own.tokens)
    except ValueError as error:
        parser.error(str(error))
    chunks = build_model([*flags, "--seq-length", str(tokens.size(1))], device)
    if int(tokens.max()) >= (entries := get_args().vocab_size):
        fail(
            f"--tokens {own.tokens} has the id {int(tokens.max())}; the model has ids below {entries}"
        )
    result = logits(chunks, tokens)
    if result is not None and _is_first_with_output():
        with whole_file(own.logits) as stream:
            torch.save(result, stream)
    torch.distributed.barrier()
    end_communication()


def read_tokens(file: str) -> torch.Tensor:
    """Return the token ids [N, S] int64 in a file that `torch.save` wrote.

    Raises:
        ValueError: The file cannot be read, or holds something else.
    """
    expected = "give a file of torch.save with token ids, an int64 tensor [N, S]"
    try:
        tokens = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"--tokens {file} cannot be read; {expected}") from error
    if not isinstance(tokens, torch.Tensor):
        raise ValueError(f"--tokens {file} holds {type(tokens).__name__}; {expected}")
    if tokens.dtype != torch.int64 or tokens.ndim != 2 or not tokens.numel() or tokens.min() < 0:
        raise ValueError(
            f"--tokens {file} holds {tokens.dtype} of shape {list(tokens.shape)}, or an id below 0; "
            f"{expected}"
        )
    return tokens


def build_model(flags: Sequence[str], device: str) -> list[MegatronModule]:
    """Return Megatron's model with the weights that the flags name, ready for `logits`.

    Args:
        flags: The flags of `megatron_profit.sft`, without the flags of training.
        device: "cuda" or "cpu".
    """
    argv = [*_NO_TRAINING.split(), *_WEIGHTS_ONLY.split(), *flags]
    try:
        settings = derive(argv, device, world_size())
        check_checkpoints(CheckpointFlags.of(settings.values), settings.check_checkpoint)
        lora = None
        if settings.lora is not None:
            lora = open_lora(settings.lora, settings.values, settings.config, overwrite=False)
        hf_weights = open_hf_weights(settings.values) if lora is None else None
    except (ArgumentsError, CheckpointError, ConversionError) as error:
        fail(error)
    args = parse_and_validate_args(extra_args_provider=provider_of(settings.values))
    initialize_megatron()
    config = gpt_config_from_args(args)
    if args.spec is None:
        config.transformer_layer_spec = layer_spec
    if hf_weights is not None:
        config.pre_wrap_hooks.append(load_hook(hf_weights))
    if lora is not None:
        config.pre_wrap_hooks.append(adapter_hook(lora, args))
    chunks, _, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        checkpointing_context={},
        cfg_container=pretrain_cfg_container_from_args(args, config),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    for chunk in chunks:
        chunk.eval()
    return chunks


@torch.no_grad()
def logits(chunks: Sequence[MegatronModule], tokens: torch.Tensor) -> torch.Tensor | None:
    """Make one forward pass per row.

    Args:
        chunks: The rank's pipeline stages.
        tokens: [N, S] int64, the same on all ranks.

    Returns:
        [N, S, vocabulary] fp32 on the CPU, the same on all ranks that share the rows; None on a rank without
        the output layer.
    """
    args = get_args()
    # A row is one record, so only this project's own context-parallel attention asks where it lies.
    isolate = args.context_parallel_size > 1 and args.transformer_impl == "local"

    def forward_step(
        rows: Iterator[torch.Tensor], model: GPTModel
    ) -> tuple[torch.Tensor, Callable]:
        batch = get_batch(_records(rows), isolate=isolate)
        if batch.spans is not None:
            gpt = unwrap_model(model)
            batch.spans.rotary = rotary_angles(gpt, batch.position_ids, args.seq_length)
        output = model(batch.tokens, batch.position_ids, None, packed_seq_params=batch.spans)
        return output, lambda output, non_loss_data: _whole(output, args.vocab_size)

    # The last row comes again until the schedule takes the number of rows.
    multiple = micro_batch_multiple(TrainContext(list(chunks), get_model_config(chunks[0])))
    rows = torch.cat([tokens, tokens[-1:].expand(-len(tokens) % multiple, -1)])
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(rows) for _ in chunks] if len(chunks) > 1 else iter(rows),
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(rows),
        seq_length=args.seq_length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    has_output = any(unwrap_model(chunk).post_process for chunk in chunks)
    return torch.cat(outputs)[: len(tokens)] if has_output else None


def _is_first_with_output() -> bool:
    """Return whether this rank writes the logits, which all ranks of the last pipeline stage hold."""
    data = mpu.get_data_parallel_rank(with_context_parallel=True)
    return mpu.get_tensor_model_parallel_rank() == 0 and data == 0


def _records(rows: Iterator[torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield rows of token ids [S] as micro-batches [1, S] of one record each."""
    for row in rows:
        tokens = row[None]
        yield {
            "tokens": tokens,
            "labels": torch.full_like(tokens, -100),
            "position_ids": torch.arange(row.numel())[None],
            "example_index": torch.zeros_like(tokens),
            "draw_index": torch.zeros_like(tokens),
        }


def _whole(output: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return [1, S, vocabulary] fp32 on the CPU, from this rank's part of a row and of the vocabulary."""
    own = gather_from_tensor_model_parallel_region(output.float())[..., :vocab_size].contiguous()
    size, group = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_group()
    parts = [torch.empty_like(own) for _ in range(size)]
    torch.distributed.all_gather(parts, own, group=group)
    row = torch.empty(1, size * own.size(1), own.size(2), dtype=own.dtype)
    for rank, part in enumerate(parts):
        row[:, context_parallel_index(row.size(1), size, rank)] = part.cpu()
    return row
