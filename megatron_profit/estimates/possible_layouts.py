"""The parallel layouts that a model, its rows and the flags of a command line leave open.

They follow Megatron's rules of divisibility. `layouts.py` chooses among them.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_profit.estimates.run_shape import RunShape

# Tokens of a micro-batch above which more rows at one time make no GPU busier.
_MICRO_BATCH_TOKENS = 8192
_MOST_STAGES = 16
# Positions of a row below which splitting it further leaves too little work for a GPU.
_LEAST_PART = 8192
# Megatron's arguments of a training that the estimates read and no layout changes, with their usual values.
ASSUMED: dict[str, Any] = {
    "bf16": True,
    "fp16": False,
    "optimizer": "adam",
    "use_precision_aware_optimizer": False,
    **dict.fromkeys(("exp_avg_dtype", "exp_avg_sq_dtype", "main_params_dtype"), "fp32"),
    "accumulate_allreduce_grads_in_fp32": False,
    "main_grads_dtype": "fp32",
    "grad_reduce_in_bf16": False,
    "num_distributed_optimizer_instances": 1,
    "recompute_modules": None,
    "distribute_saved_activations": False,
    "num_virtual_stages_per_pipeline_rank": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "microbatch_group_size_per_vp_stage": None,
    "objective_backward": "auto",
    "deterministic_mode": False,
    "lora_rank": None,
    "lora_targets": None,
    "lora_dropout": None,
}
# Arguments of architectures that not every model has.
_ABSENT = {
    "spec": None,
    "num_experts": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_router_topk": 0,
    "experimental_attention_variant": None,
    "attention_output_gate": False,
}


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a run.

    Attributes:
        gpus: Their number over all nodes.
        memory: GiB of each.
        per_node: GPUs of a node.
    """

    gpus: int
    memory: float
    per_node: int = 8

    def __str__(self) -> str:
        return f"{self.gpus} GPU{'s' * (self.gpus > 1)} of {self.memory:.4g} GiB"


@dataclass(frozen=True)
class Wish:
    """The request for a layout: a model, its rows, and the values that are decided already.

    Attributes:
        model: Megatron's arguments of the architecture.
        seq_length: Positions of a row.
        rows: Rows of a step.
        exact_rows: Whether the rows were asked for, so that a layout must not change them.
        decided: Arguments that were given, by name. Each layout that is considered has these values. For
            example, 3 rows in a micro-batch are considered if they are decided, and only then.
        state_kernels: Whether the kernels of Gated DeltaNets are installed.
    """

    model: Mapping[str, Any]
    seq_length: int
    rows: int
    exact_rows: bool = False
    decided: Mapping[str, Any] = field(default_factory=dict)
    state_kernels: bool = True


@dataclass(frozen=True)
class Layout:
    """A layout in Megatron's arguments."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    sequence_parallel: bool = False
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    use_distributed_optimizer: bool = False
    micro_batch_size: int = 1
    global_batch_size: int = 1

    @property
    def model_parallel(self) -> int:
        """GPUs that hold one replica."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    def flags(self) -> dict[str, Any]:
        """Return the arguments that differ from Megatron's defaults, and the batch; by name."""
        defaults = asdict(Layout())
        batch = ("micro_batch_size", "global_batch_size")
        return {
            name: value
            for name, value in asdict(self).items()
            if name in batch or value != defaults[name]
        }

    def __str__(self) -> str:
        sizes = {
            "tensor": self.tensor_model_parallel_size,
            "pipeline": self.pipeline_model_parallel_size,
            "context": self.context_parallel_size,
            "expert": self.expert_model_parallel_size,
        }
        parts = [f"{name} {size}" for name, size in sizes.items() if size > 1]
        if self.sequence_parallel and self.tensor_model_parallel_size > 1:
            parts.append("sequence parallel")
        parts.append(f"{self.recompute_granularity or 'no'} recomputation")
        parts.append(f"micro-batch {self.micro_batch_size}")
        return ", ".join(parts)


def layouts(wish: Wish, cluster: Cluster) -> Iterator[Layout]:
    """Yield the layouts that the model, the rows and the decided arguments allow."""
    model, decided = wish.model, wish.decided
    for tp in _tensor_sizes(wish, cluster):
        sequence = decided.get("sequence_parallel", _sequence_helps(wish, tp))
        if model.get("num_experts") and tp > 1 and not sequence:
            continue  # every rank would route all tokens
        for stages in _stages(wish, cluster.gpus // tp):
            pp = stages["pipeline_model_parallel_size"]
            for cp in _context_sizes(wish):
                dp, rest = divmod(cluster.gpus, tp * pp * cp)
                parts = cp * math.lcm(2 if cp > 1 else 1, tp if sequence else 1)
                if rest or wish.seq_length % parts:
                    continue
                if any((model.get(name) or 0) % (tp * cp) for name in _STATE_HEADS):
                    continue
                sizes: dict[str, Any] = {
                    "tensor_model_parallel_size": tp,
                    "sequence_parallel": sequence,
                    **stages,
                    "context_parallel_size": cp,
                    "use_distributed_optimizer": decided.get(
                        "use_distributed_optimizer", dp * cp > 1
                    ),
                }
                for experts in _expert_sizes(wish, cluster.gpus // pp, tp):
                    for batch in _batches(wish, dp, pp):
                        for recompute in _recomputations(wish, pp):
                            layout = Layout(**sizes, **experts, **batch, **recompute)
                            if all(getattr(layout, k, v) == v for k, v in decided.items()):
                                yield layout


# Sizes of a model that tensor parallelism splits; context parallelism splits a Gated DeltaNet's heads too.
_STATE_HEADS = ("linear_num_key_heads", "linear_num_value_heads")
_SPLIT = ("num_attention_heads", "num_query_groups", "ffn_hidden_size", *_STATE_HEADS)
_ENDS = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
_VIRTUAL = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
_RECOMPUTATION = ("recompute_granularity", "recompute_method", "recompute_num_layers")
# Arguments that ask for a kind of recomputation without naming it.
_ASKS_FOR = {
    **dict.fromkeys(("recompute_activations", "recompute_modules"), "selective"),
    **dict.fromkeys(
        ("recompute_method", "recompute_num_layers", "distribute_saved_activations"), "full"
    ),
}


def _sizes(wish: Wish, name: str, usual: Iterable[int]) -> list[int]:
    """Return the sizes of an argument to consider: the decided one, else the usual ones."""
    return [wish.decided[name]] if name in wish.decided else list(usual)


def _tensor_sizes(wish: Wish, cluster: Cluster) -> list[int]:
    """Return the tensor-parallel sizes that divide the model; within a node, unless one is decided."""
    common = math.gcd(*(wish.model[n] for n in _SPLIT if wish.model.get(n)), cluster.gpus)
    usual = range(1, cluster.per_node + 1)
    sizes = _sizes(wish, "tensor_model_parallel_size", usual)
    return [size for size in sizes if common % size == 0]


def _sequence_helps(wish: Wish, tp: int) -> bool:
    """Return whether tensor-parallel ranks should split the residual stream between the products."""
    return tp > 1 and not wish.decided.get("distribute_saved_activations")


def _stages(wish: Wish, gpus: int) -> Iterator[dict[str, Any]]:
    """Yield pipeline sizes, and whether embedding and output layer count as layers."""
    decided = wish.decided
    given = tuple(decided.get(name, False) for name in _ENDS)
    layers_of_chunk = next((decided[n] for n in _VIRTUAL if decided.get(n)), 1)
    for pp in _sizes(wish, "pipeline_model_parallel_size", range(1, _MOST_STAGES + 1)):
        if gpus % pp or (pp == 1 and _is_interleaved(wish)):
            continue
        is_free = pp > 2 and not any(name in decided for name in _ENDS)
        for ends in (given, (True, True)) if is_free else (given,):
            layers, rest = divmod(wish.model["num_layers"] + sum(ends), pp)
            if not rest and layers % layers_of_chunk == 0:
                yield {"pipeline_model_parallel_size": pp, **dict(zip(_ENDS, ends, strict=True))}
                break


def _is_interleaved(wish: Wish) -> bool:
    """Return whether each pipeline rank holds several parts of the model."""
    return any(wish.decided.get(name) for name in _VIRTUAL)


def _context_sizes(wish: Wish) -> list[int]:
    """Return the context-parallel sizes that leave each rank a long part of a row, or the decided one."""
    usual = (2**n for n in range(8) if n == 0 or wish.seq_length >= _LEAST_PART * 2**n)
    return _sizes(wish, "context_parallel_size", usual)


def _expert_sizes(wish: Wish, ranks: int, tp: int) -> Iterator[dict[str, Any]]:
    """Yield the ways to split the experts over the ranks of a stage; usually no single one is split."""
    experts = wish.model.get("num_experts")
    if experts is None:
        etp = wish.decided.get("expert_tensor_parallel_size")
        yield {"expert_tensor_parallel_size": etp if etp == 1 else None}
        return
    for etp in _sizes(wish, "expert_tensor_parallel_size", [1]):
        ranks_of_expert = etp or tp  # as Megatron takes it
        if wish.model["moe_ffn_hidden_size"] % ranks_of_expert or ranks % ranks_of_expert:
            continue
        for ep in _divisors(experts, ranks // ranks_of_expert):
            yield {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp}


def _batches(wish: Wish, dp: int, pp: int) -> Iterator[dict[str, Any]]:
    """Yield micro-batch and global batch: the rows of the wish, or the next number that can be shared.

    An interleaved pipeline takes as many micro-batches as it has ranks, or a multiple.
    """
    decided = wish.decided.get("micro_batch_size")
    least = dp * (pp if _is_interleaved(wish) else 1)
    rows = math.ceil(wish.rows / (least * (decided or 1))) * least * (decided or 1)
    if wish.exact_rows and rows != wish.rows:
        return
    micro = decided or 1
    while rows % (micro * least) == 0:
        yield {"micro_batch_size": micro, "global_batch_size": rows}
        micro *= 2
        if decided or micro * wish.seq_length > _MICRO_BATCH_TOKENS:
            return


def _recomputations(wish: Wish, pp: int) -> list[dict[str, Any]]:
    """Return the ways of recomputation: without and with it, or as the decided arguments ask for.

    With the method "block", fewer layers come first: they are the faster ones, and more are taken where the
    memory asks for it.
    """
    decided = wish.decided
    if any(decided.get(name, "") is None for name in _RECOMPUTATION):  # of --without
        return [{}]
    asked = next((kind for name, kind in _ASKS_FOR.items() if decided.get(name)), None)
    granularity = decided.get("recompute_granularity", asked)
    if granularity == "selective":
        return [{"recompute_granularity": granularity}]
    method = decided.get("recompute_method", "uniform")
    layers = math.ceil(wish.model["num_layers"] / pp)
    fewer = (2**n for n in range(layers.bit_length()) if 2**n < layers)
    counts = _sizes(wish, "recompute_num_layers", [1] if method == "uniform" else [*fewer, layers])
    full = [dict(zip(_RECOMPUTATION, ("full", method, count), strict=True)) for count in counts]
    return [{}, *full] if granularity is None else full


def _divisors(*totals: int) -> list[int]:
    common = math.gcd(*totals)
    return [size for size in range(1, common + 1) if common % size == 0]


def run_shape(wish: Wish, layout: Layout, gpus: int) -> RunShape:
    """Return a layout as the estimates see it."""
    vocabulary, tp = wish.model["vocab_size"], layout.tensor_model_parallel_size
    arguments = {
        **ASSUMED,
        **_ABSENT,
        **wish.model,
        **wish.decided,
        **asdict(layout),
        "seq_length": wish.seq_length,
        "padded_vocab_size": math.ceil(vocabulary / tp) * tp,
    }
    return RunShape(Namespace(**arguments), gpus, state_kernels=wish.state_kernels)
