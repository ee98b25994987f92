"""Adapters in a run: the model gets them before Megatron wraps it, and its checkpoints hold them alone."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.transformer.module import MegatronModule

from checkpoint_conversion.adapters.options import LoraOptions
from checkpoint_conversion.adapters.peft_folder import AdapterOutput, PeftFolder
from checkpoint_conversion.errors import ConversionError, printable
from checkpoint_conversion.families import TensorRule
from checkpoint_conversion.hf.model import HFModel
from checkpoint_conversion.hf.shards import Rules, read_shard
from megatron_profit.flags import flag_of
from megatron_profit.models.lora.transform import adapt, adapter_shards
from megatron_profit.training.checkpoints.hf_weights import Hook, load, load_checkpoint_into
from megatron_profit.training.process.console import fail, print_rank_0


@dataclass(frozen=True)
class LoraFiles:
    """The adapters of a run, and the weights that they are for.

    Attributes:
        options: Options of the adapters.
        rules: The name table of the model.
        base: The frozen weights: a HuggingFace model, or the folder of a Megatron checkpoint; None for
            random ones.
        start: The PEFT folder that a new run starts from, if any.
        output: The PEFT folder to write at the end, if any.
    """

    options: LoraOptions
    rules: tuple[TensorRule, ...]
    base: HFModel | Path | None
    start: PeftFolder | None
    output: AdapterOutput | None

    @property
    def base_folder(self) -> Path | None:
        """Folder of the frozen weights; None for random ones."""
        return self.base.folder if isinstance(self.base, HFModel) else self.base


def adapter_hook(plan: LoraFiles, args: Namespace) -> Hook:
    """Return a `ModelConfig.pre_wrap_hooks` entry that loads the base and adds the adapters.

    It takes `--pretrained-checkpoint` over from Megatron, which would look for the adapters there.

    Args:
        plan: The adapters.
        args: Megatron's arguments.
    """
    args.pretrained_checkpoint = None

    def hook(chunks: list[MegatronModule]) -> list[MegatronModule]:
        try:
            _load_base(plan.base, chunks)
            adapt(chunks, plan.rules, plan.options, args.seed)
            _check_each_rank_trains(chunks, args)
            if plan.start is not None:
                load_adapters(plan.start, chunks)
        except ConversionError as error:
            fail(error)
        _tell(plan, chunks)
        return chunks

    return hook


def _check_each_rank_trains(chunks: Sequence[MegatronModule], args: Namespace) -> None:
    """Refuse a rank without adapters, or without adapters for one of Megatron's two optimizers. A collective.

    Experts that have process groups of their own have an optimizer of their own, too. Megatron loads no
    checkpoint into a rank without parameters to train.
    """
    trained = (p for chunk in chunks for p in chunk.parameters() if p.requires_grad)
    own = {getattr(parameter, "allreduce", True) for parameter in trained}
    of_all: list[set[bool]] = [set()] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_all, own)
    missing = set().union(*of_all) - own
    used = [name for name in ("save", "load", "use_distributed_optimizer") if getattr(args, name)]
    if missing and not own and used:
        raise ConversionError(
            "a pipeline rank has no layer with adapters, and Megatron cannot resume a rank that trains none; "
            "give each rank such a layer with more --lora-targets or fewer pipeline ranks, or drop "
            f"{' and '.join(map(flag_of, used))}"
        )
    if missing and own and args.use_distributed_optimizer:
        where = "outside of experts" if True in missing else "of experts"
        raise ConversionError(
            f"a pipeline rank has no layer with adapters {where}, and the distributed optimizer cannot save "
            "a rank that trains none; give each rank such a layer, or drop --use-distributed-optimizer"
        )


def _load_base(base: HFModel | Path | None, chunks: Sequence[MegatronModule]) -> None:
    if isinstance(base, Path):
        load_checkpoint_into(chunks, base, "> the frozen weights are the ones in")
    elif base is not None:
        load(base, chunks)


@torch.no_grad()
def load_adapters(folder: PeftFolder, chunks: Sequence[MegatronModule]) -> None:
    """Fill this rank's adapters from a PEFT folder.

    Raises:
        ConversionError: A file is truncated, or a value does not fit the parameter's dtype.
    """
    start = time.monotonic()
    rules = Rules(folder.weights.rules)
    for shard, _ in adapter_shards(chunks):
        read_shard(folder.weights, rules, shard)
    seconds = time.monotonic() - start
    base = printable(folder.base)
    print_rank_0(f"> adapters from {folder.weights.folder}, made for {base}, in {seconds:.1f} s")


def _tell(plan: LoraFiles, chunks: Sequence[MegatronModule]) -> None:
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in parameters) - trained
    print_rank_0(
        f"> adapters of rank {plan.options.rank}, scale {plan.options.scale:g}, on "
        f"{', '.join(plan.options.targets)}: {trained:,} parameters on the first rank are trained, "
        f"{frozen:,} are frozen"
    )
