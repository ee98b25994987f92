"""HuggingFace weights straight into the ranks' parameters, and back, without a checkpoint on disk.

Every model of Megatron-Core can say which block of which global tensor each of its parameters is
(`sharded_state_dict`, made for torch_dist checkpoints). So a rank knows which blocks to read, whatever the
layout of tensor, pipeline and expert parallelism. `checkpoint_conversion` gives the names and the arrangement
of rows.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.transformer.module import MegatronModule
from megatron.training import get_args

from checkpoint_conversion.adapters.peft_folder import AdapterOutput
from checkpoint_conversion.engine.output import sync_file
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf.model import HFModel
from checkpoint_conversion.hf.output import HFOutput
from checkpoint_conversion.hf.shards import Rules, Shard, read_shard, write_shard
from checkpoint_conversion.progress import human
from megatron_profit.models.lora.placement import sharded_tensors
from megatron_profit.models.lora.transform import base_parameters, base_state
from megatron_profit.training.checkpoints.shared_check import check_together
from megatron_profit.training.process.console import fail, print_rank_0
from megatron_profit.training.process.ranks import from_first_rank, is_first_rank

Hook = Callable[[list[MegatronModule]], list[MegatronModule]]


def load_hook(model: HFModel) -> Hook:
    """Return a `ModelConfig.pre_wrap_hooks` entry that fills the model with the weights of a folder.

    It runs before the model is wrapped. So data-parallel copies, the optimizer's fp32 weights and all later
    copies start from these values.
    """

    def hook(chunks: list[MegatronModule]) -> list[MegatronModule]:
        try:
            load(model, chunks)
        except ConversionError as error:
            fail(error)
        return chunks

    return hook


def keep_in(kept: list[MegatronModule]) -> Hook:
    """Return a `ModelConfig.pre_wrap_hooks` entry that puts the rank's pipeline stages into a list."""

    def hook(chunks: list[MegatronModule]) -> list[MegatronModule]:
        kept.extend(chunks)
        return chunks

    return hook


@torch.no_grad()
def load(model: HFModel, chunks: Sequence[MegatronModule]) -> None:
    """Fill this rank's part of a model.

    All ranks call this together.

    Args:
        model: The HuggingFace folder.
        chunks: The rank's pipeline stages, before they are wrapped.

    Raises:
        ConversionError: The folder lacks a parameter, a file is truncated, or a value does not fit the
            parameter's dtype. Or a second copy of tied embeddings differs.
    """
    start = time.monotonic()
    _check_alias(model)
    rules = Rules(model.rules)
    nbytes = 0
    for shard, _ in model_shards(chunks):
        read_shard(model, rules, shard)
        nbytes += shard.values.nbytes
    seconds = time.monotonic() - start
    print_rank_0(
        f"> weights from {model.folder}: {human(nbytes)} on the first rank in {seconds:.1f} s"
    )


def _check_alias(model: HFModel) -> None:
    """Let the first rank alone compare both copies of tied embeddings in full, and let all ranks fail
    together.
    """

    def problem() -> ConversionError | None:
        try:
            model.check_alias()
        except ConversionError as error:
            return error
        return None

    if model.alias is not None and (found := from_first_rank(problem)) is not None:
        raise found


@torch.no_grad()
def load_checkpoint_into(
    chunks: Sequence[MegatronModule], folder: Path, notice: str = "> exporting the weights of"
) -> None:
    """Replace this rank's part of a model by the weights of a checkpoint.

    All ranks call this together.

    Args:
        chunks: The rank's pipeline stages.
        folder: The checkpoint of an iteration, in the format torch_dist.
        notice: The beginning of the line that is printed.

    Raises:
        ConversionError: A part of it is missing or damaged.
    """
    if not get_args().skip_checksums:
        check_together(folder)
    print_rank_0(f"{notice} {folder}")
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    sharded = {name: c.sharded_state_dict() for name, c in zip(names, chunks, strict=True)}
    content = dist_checkpointing.load(sharded, str(folder))
    for name, chunk in zip(names, chunks, strict=True):
        chunk.load_state_dict(content[name])


@torch.no_grad()
def export(output: HFOutput | AdapterOutput, shards: Iterable[tuple[Shard, bool]]) -> None:
    """Write the model to a HuggingFace folder. Every rank writes its part at the same time.

    All ranks call this together. The folder appears whole or not at all.

    Args:
        output: The folder to write.
        shards: The rank's part, each shard with whether this rank writes it: `model_shards` of its pipeline
            stages, or a transform of them.

    Raises:
        ConversionError: The folder must not be written any more, or the disk is full or fails. Or a value is
            outside the range of the dtype, or the ranks do not hold the whole model.
    """
    start = time.monotonic()
    rules = Rules(output.rules)
    with output.create() if is_first_rank() else nullcontext() as created:
        place = from_first_rank(lambda: created)
        assert place is not None, "the first rank creates the folder"
        tensors = output.tensors_in(place)
        elements = sum(
            write_shard(tensors, rules, shard) for shard, is_saved_here in shards if is_saved_here
        )
        for file in {tensor.file for tensor in tensors.values()}:
            sync_file(file)
        _check_all_written(output, elements)
    seconds = time.monotonic() - start
    print_rank_0(
        f"> exported {len(output.all_tensors)} tensors, {human(output.nbytes)}, to {output.folder} "
        f"in {seconds:.1f} s"
    )
    if isinstance(output, HFOutput) and output.stops.added is not None:
        print_rank_0(f"> {output.stops}")


def _check_all_written(output: HFOutput | AdapterOutput, elements: int) -> None:
    """Wait for all ranks, and check that each element was written exactly once."""
    device = "cpu" if torch.distributed.get_backend() == "gloo" else "cuda"
    total = torch.tensor(elements, device=device)
    torch.distributed.all_reduce(total)
    if total.item() != output.elements:
        raise ConversionError(
            f"{output.folder}: the ranks hold {total.item()} elements to save, the model has "
            f"{output.elements}"
        )


def model_shards(chunks: Sequence[MegatronModule]) -> Iterator[tuple[Shard, bool]]:
    """Yield the shards whose values are this rank's parameters, each with whether this rank saves it.

    Raises:
        ConversionError: The shards do not cover all of the model's parameters.
    """
    for chunk in chunks:
        sharded = sharded_tensors(base_state(chunk))
        _check_complete(chunk, sharded)
        for item in sharded:
            shard = Shard(item.key, item.global_shape, item.global_offset, item.data)
            yield shard, is_main_replica(item.replica_id)


def _check_complete(chunk: MegatronModule, sharded: Sequence[ShardedTensor]) -> None:
    """Check that the shards cover each parameter, and are views of them and not copies."""
    covered: Counter[int] = Counter()
    for item in sharded:
        covered[item.data.untyped_storage().data_ptr()] += item.data.numel()
    for name, parameter in base_parameters(chunk):
        if parameter.is_meta:
            raise ConversionError(f"{name} has no values yet: drop --init-model-with-meta-device")
        if covered[parameter.untyped_storage().data_ptr()] < parameter.numel():
            raise ConversionError(
                f"the layers keep {name} {list(parameter.shape)} in a form that HuggingFace weights "
                "cannot be put into; convert them with checkpoint_conversion.hf_to_megatron and give "
                "--pretrained-checkpoint"
            )
