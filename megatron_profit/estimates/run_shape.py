"""The shape of a training run in numbers: model, layout, batch and precision. It imports no Megatron.

The estimates of memory and of communication start from it, and so does the choice of a layout.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from checkpoint_conversion.families import Config, family_for
from checkpoint_conversion.families.olmo2 import LAYER_SPEC
from megatron_profit.flags import flag_of

# Arguments that the estimates do not know.
UNKNOWN = (
    *("pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers"),
    *("decoder_last_pipeline_num_layers", "fp8", "fp4", "optimizer_cpu_offload"),
    *("cpu_offloading", "fine_grained_activation_offloading"),
)


# An argument besides Megatron's: whether the model is Qwen3-Next.
_IS_NEXT = "is_qwen3_next"


class ShapeError(ValueError):
    """The estimates do not cover this setting; the message names it and the remedy."""


class LayerKind(NamedTuple):
    """The kind of a layer.

    Attributes:
        experts: Whether it has experts in place of a dense MLP.
        state: Whether it has a Gated DeltaNet in place of attention.
    """

    experts: bool = False
    state: bool = False


def model_arguments(config: Config) -> dict[str, Any]:
    """Return Megatron's arguments of a model, and the one that the estimates need besides.

    Args:
        config: The content of config.json.
    """
    family = family_for(config)
    return {**family.megatron_arguments(config), _IS_NEXT: family.model_type == "qwen3_next"}


@dataclass(frozen=True)
class RunShape:
    """A training run as the estimates see it.

    Attributes:
        args: All arguments by name, as Megatron gets them.
        gpus: Number of processes.
        fused: Whether norms and gated products are single kernels, as on a GPU; on a CPU they are not.
        state_kernels: Whether the kernels of Gated DeltaNets are installed.
    """

    args: Namespace
    gpus: int
    fused: bool = True
    state_kernels: bool = True

    def __post_init__(self) -> None:
        for name in UNKNOWN:
            if getattr(self.args, name, None):
                flag = f"--{name}-format" if name in ("fp8", "fp4") else flag_of(name)
                raise ShapeError(
                    f"{flag} is not known to the estimate; leave it out for an upper bound"
                )
        if self.args.optimizer != "adam":
            raise ShapeError(
                f"--optimizer {self.args.optimizer} is not known to the estimate, only adam"
            )

    # The layout.
    @property
    def tp(self) -> int:
        return self.args.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        return self.args.pipeline_model_parallel_size

    @property
    def cp(self) -> int:
        return self.args.context_parallel_size

    @property
    def dp(self) -> int:
        """Data-parallel replicas, context parallelism aside."""
        return self.gpus // (self.tp * self.pp * self.cp)

    @property
    def ep(self) -> int:
        return self.args.expert_model_parallel_size

    @property
    def etp(self) -> int:
        """Ranks that share an expert."""
        return self.args.expert_tensor_parallel_size or self.tp

    @property
    def expert_dp(self) -> int:
        """Ranks with the same experts."""
        return self.gpus // (self.pp * self.ep * self.etp)

    @property
    def sequence_split(self) -> int:
        """Number of tensor-parallel ranks over which the residual stream is split."""
        return self.tp if self.args.sequence_parallel else 1

    @cached_property
    def virtual_stages(self) -> int:
        """Model chunks of a pipeline rank."""
        args = self.args
        counted = (
            args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
        )
        layers = (args.num_layers + counted) // self.pp
        if self.args.num_virtual_stages_per_pipeline_rank:
            return self.args.num_virtual_stages_per_pipeline_rank
        return layers // (self.args.num_layers_per_virtual_pipeline_stage or layers)

    # The batch.
    @property
    def micro_batches(self) -> int:
        """Micro-batches of one data-parallel rank in a step."""
        global_batch = self.args.global_batch_size or self.args.micro_batch_size * self.dp
        return global_batch // (self.args.micro_batch_size * self.dp)

    @property
    def tokens(self) -> int:
        """Positions of a micro-batch on one context-parallel rank, padding included."""
        return self.args.seq_length * self.args.micro_batch_size // self.cp

    # The model.
    @property
    def bytes_per_number(self) -> int:
        """Bytes of one parameter or one activation."""
        return 2 if self.args.bf16 or self.args.fp16 else 4

    @property
    def query_size(self) -> int:
        return self.args.num_attention_heads * self.args.kv_channels

    @property
    def key_value_size(self) -> int:
        """Size of all keys, or of all values, of a position."""
        groups = self.args.num_query_groups if self.args.group_query_attention else None
        return (groups or self.args.num_attention_heads) * self.args.kv_channels

    @property
    def state_keys(self) -> int:
        """Size of all keys, or of all queries, of a position in a Gated DeltaNet."""
        return self.args.linear_num_key_heads * self.args.linear_key_head_dim

    @property
    def state_values(self) -> int:
        """Size of all values of a position in a Gated DeltaNet."""
        return self.args.linear_num_value_heads * self.args.linear_value_head_dim

    @property
    def has_state_kernels(self) -> bool:
        """Whether kernels compute the Gated DeltaNets; else they are single operations of torch.

        The kernels take no fp32, and their results are not the same in each run.
        """
        can = self.fused and self.state_kernels and self.bytes_per_number == 2
        return can and not self.args.deterministic_mode

    @property
    def is_qwen3_next(self) -> bool:
        """Whether a Gated DeltaNet has two input projections, and each expert tensors of its own.

        In Qwen3.5 it has four of them, and the experts of a layer are one tensor, which gets no adapters.
        """
        return getattr(self.args, _IS_NEXT, False)

    @property
    def normalizes_projections(self) -> bool:
        """Whether one norm sees the queries of all heads, and one the keys, as in OLMo-2."""
        return self.args.spec is not None and tuple(self.args.spec) == LAYER_SPEC

    @property
    def query_key_norms(self) -> int:
        """Parameters of a layer's norms of queries and keys, on one rank."""
        if self.normalizes_projections:
            return (self.query_size + self.key_value_size) // self.tp
        return 2 * self.args.kv_channels if self.args.qk_layernorm else 0

    @cached_property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of the layers."""
        return tuple(map(LayerKind, self._expert_layers(), self._state_layers()))

    def _expert_layers(self) -> list[bool]:
        args = self.args
        if args.num_experts is None:
            return [False] * args.num_layers
        if isinstance(args.moe_layer_freq, int):
            return [i % args.moe_layer_freq == 0 for i in range(args.num_layers)]
        return [bool(has) for has in args.moe_layer_freq]

    def _state_layers(self) -> list[bool]:
        args = self.args
        if args.experimental_attention_variant != "gated_delta_net":
            return [False] * args.num_layers
        if isinstance(args.linear_attention_freq, int):
            return [(i + 1) % args.linear_attention_freq != 0 for i in range(args.num_layers)]
        return [bool(has) for has in args.linear_attention_freq]

    def layers_of(self, stage: int) -> list[int]:
        """Return the layers of a pipeline rank, chunk after chunk."""
        return [layer for chunk in self.chunks_of(stage) for layer in chunk]

    def chunks_of(self, stage: int) -> list[list[int]]:
        """Return the layers of each model chunk of a pipeline rank.

        Embedding and output layer may count as layers, so that the first and the last chunk have one less.
        """
        args, chunks = self.args, self.pp * self.virtual_stages
        before = int(args.account_for_embedding_in_pipeline_split)
        behind = int(args.account_for_loss_in_pipeline_split)
        size = (before + args.num_layers + behind) // chunks
        found = []
        for number in range(stage, chunks, self.pp):
            begin, end = number * size - before, (number + 1) * size - before
            found.append(list(range(max(0, begin), min(end, args.num_layers))))
        return found
