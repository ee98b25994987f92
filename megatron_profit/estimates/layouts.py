"""The parallel layout of a run, chosen by the estimates: the fastest one that fits the GPUs.

All layouts that Megatron's rules of divisibility allow are counted (`memory.py`) and timed
(`communication.py`). Among the ones that fit, a layout that leaves the batch as it was asked for comes first,
then the shortest time for a row.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_profit.estimates.communication import Machine, step_time
from megatron_profit.estimates.memory import GIB, estimate
from megatron_profit.estimates.run_shape import RunShape, ShapeError

# Part of a GPU's memory that a layout may fill: the estimate is no measurement.
USABLE = 0.92
# Replicas take a row each, so that many of them make a step larger. Up to this factor that is accepted.
_MOST_GROWTH = 4
# Tokens of a micro-batch above which more rows at one time make no GPU busier.
_MICRO_BATCH_TOKENS = 8192
# Layouts whose estimated times differ by less are alike; the simplest one is taken.
_ALIKE = 0.15
# Part of the computing time under which gradients and parameters are sent (--overlap-grad-reduce).
_HIDING = 0.5
_MOST_STAGES = 16
# Positions of a row below which splitting it further leaves too little work for a GPU.
_LEAST_PART = 8192
# Values of Megatron's arguments that the estimates read and that this choice leaves alone.
_UNCHANGED = {
    "bf16": True,
    "fp16": False,
    "optimizer": "adam",
    "use_precision_aware_optimizer": False,
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
    "spec": None,
    "num_experts": None,
    "moe_shared_expert_intermediate_size": None,
    "experimental_attention_variant": None,
    "deterministic_mode": False,
    "attention_output_gate": False,
    "lora_rank": None,
    "lora_targets": None,
    "lora_dropout": None,
    "moe_router_topk": 0,
}


class NoLayoutError(ShapeError):
    """No layout fits; the message says what would."""


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
        decided: Arguments that were given, by name; a layout with other values is not considered.
    """

    model: Mapping[str, Any]
    seq_length: int
    rows: int
    exact_rows: bool = False
    decided: Mapping[str, Any] | None = None


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
        if self.sequence_parallel:
            parts.append("sequence parallel")
        full = self.recompute_granularity == "full"
        parts.append("full recomputation" if full else "no recomputation")
        parts.append(f"micro-batch {self.micro_batch_size}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Choice:
    """A layout with its estimates.

    Attributes:
        layout: The layout.
        run: The run as the estimates see it.
        bytes: Memory of the fullest GPU.
        row_seconds: Estimated time of a row, on the machine of `communication.Machine`.
        fitting, possible: Number of layouts that fit, and that the model and the batch allow.
    """

    layout: Layout
    run: RunShape
    bytes: int
    row_seconds: float
    fitting: int = 0
    possible: int = 0

    def describe(self, cluster: Cluster) -> str:
        """Return a line that says what was chosen, why, and by how much it fits."""
        used = self.bytes / GIB
        return (
            f"{self.layout}, {self.run.dp} replica{'s' * (self.run.dp > 1)} on {cluster}: needs about "
            f"{used:.1f} GiB, {cluster.memory - used:.1f} GiB stay free; the fastest by the estimates of "
            f"{self.fitting} layouts that fit ({self.possible} possible)"
        )


def choose(wish: Wish, cluster: Cluster) -> Choice:
    """Return the layout to train with.

    Raises:
        NoLayoutError: No layout is possible, or none fits.
    """
    possible = [_estimated(wish, layout, cluster) for layout in layouts(wish, cluster)]
    if not possible:
        raise NoLayoutError(
            f"no layout splits the model and {wish.rows} rows of {wish.seq_length} positions over "
            f"{cluster}{_given(wish)}; give another --global-batch-size or number of GPUs"
        )
    fitting = [choice for choice in possible if choice.bytes <= USABLE * cluster.memory * GIB]
    if not fitting:
        least = min(possible, key=lambda choice: choice.bytes)
        raise NoLayoutError(
            f"the model does not fit {cluster}{_given(wish)}: the smallest layout ({least.layout}) needs "
            f"about {least.bytes / GIB:.0f} GiB a GPU, and {USABLE:.0%} of "
            f"{cluster.memory:.4g} GiB may be filled; {_remedy(wish, cluster)}"
        )
    best = _best(fitting, wish)
    return Choice(best.layout, best.run, best.bytes, best.row_seconds, len(fitting), len(possible))


def layouts(wish: Wish, cluster: Cluster) -> Iterator[Layout]:
    """Yield the layouts that the model, the rows and the decided arguments allow."""
    model, decided = wish.model, wish.decided or {}
    for tp in _tensor_sizes(model, cluster):
        for pp, ends in _stages(model, cluster.gpus // tp):
            for cp in _context_sizes(wish):
                dp, rest = divmod(cluster.gpus, tp * pp * cp)
                if rest or wish.seq_length % (tp * cp * (2 if cp > 1 else 1)):
                    continue
                if any((model.get(name) or 0) % (tp * cp) for name in _STATE_HEADS):
                    continue
                sizes: dict[str, Any] = {
                    "tensor_model_parallel_size": tp,
                    "sequence_parallel": tp > 1,
                    "pipeline_model_parallel_size": pp,
                    "account_for_embedding_in_pipeline_split": ends,
                    "account_for_loss_in_pipeline_split": ends,
                    "context_parallel_size": cp,
                    "use_distributed_optimizer": dp * cp > 1,
                }
                for experts in _expert_sizes(model, cluster.gpus // pp):
                    for batch in _batches(wish, dp):
                        for recompute in _RECOMPUTATIONS:
                            layout = Layout(**sizes, **experts, **batch, **recompute)
                            if all(getattr(layout, k, v) == v for k, v in decided.items()):
                                yield layout


# Sizes of a model that tensor parallelism splits; context parallelism splits a Gated DeltaNet's heads too.
_STATE_HEADS = ("linear_num_key_heads", "linear_num_value_heads")
_SPLIT = ("num_attention_heads", "num_query_groups", "ffn_hidden_size", *_STATE_HEADS)
_RECOMPUTATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
)


def _tensor_sizes(model: Mapping[str, Any], cluster: Cluster) -> list[int]:
    """Return the tensor-parallel sizes that divide the model, and stay within a node."""
    sizes = _divisors(*(model[name] for name in _SPLIT if model.get(name)), cluster.gpus)
    return [size for size in sizes if size <= cluster.per_node]


def _stages(model: Mapping[str, Any], gpus: int) -> Iterator[tuple[int, bool]]:
    """Yield pipeline sizes, and whether embedding and output layer count as layers."""
    layers = model["num_layers"]
    for pp in range(1, min(_MOST_STAGES, gpus) + 1):
        if gpus % pp == 0 and layers % pp == 0:
            yield pp, False
        elif gpus % pp == 0 and (layers + 2) % pp == 0 and pp > 2:
            yield pp, True


def _context_sizes(wish: Wish) -> list[int]:
    """Return the context-parallel sizes that leave each rank a long part of a row, or the one decided."""
    sizes = [2**n for n in range(8) if n == 0 or wish.seq_length >= _LEAST_PART * 2**n]
    given = (wish.decided or {}).get("context_parallel_size")
    return sizes if given is None else [given]


def _expert_sizes(model: Mapping[str, Any], ranks: int) -> list[dict[str, Any]]:
    experts = model.get("num_experts")
    if experts is None:
        return [{}]
    return [
        {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": 1}
        for ep in _divisors(experts, ranks)
    ]


def _batches(wish: Wish, dp: int) -> Iterator[dict[str, Any]]:
    """Yield micro-batch and global batch: the rows of the wish, or the next multiple of the replicas."""
    rows = math.ceil(wish.rows / dp) * dp
    if wish.exact_rows and rows != wish.rows:
        return
    micro = 1
    while rows % (micro * dp) == 0:
        yield {"micro_batch_size": micro, "global_batch_size": rows}
        micro *= 2
        if micro * wish.seq_length > _MICRO_BATCH_TOKENS:
            return


def _divisors(*totals: int) -> list[int]:
    common = math.gcd(*totals)
    return [size for size in range(1, common + 1) if common % size == 0]


def run_shape(wish: Wish, layout: Layout, gpus: int) -> RunShape:
    """Return a layout as the estimates see it."""
    vocabulary, tp = wish.model["vocab_size"], layout.tensor_model_parallel_size
    arguments = {
        **_UNCHANGED,
        **wish.model,
        **(wish.decided or {}),
        **asdict(layout),
        "seq_length": wish.seq_length,
        "padded_vocab_size": math.ceil(vocabulary / tp) * tp,
    }
    return RunShape(Namespace(**arguments), gpus)


def _estimated(wish: Wish, layout: Layout, cluster: Cluster) -> Choice:
    run = run_shape(wish, layout, cluster.gpus)
    time = step_time(run, Machine(gpus_per_node=cluster.per_node))
    seconds = time.total - min(time.data, _HIDING * time.compute)
    return Choice(layout, run, _bytes(run), seconds / layout.global_batch_size)


def _bytes(run: RunShape) -> int:
    """Return the memory of the fullest GPU."""
    return max(memory.total for memory in estimate(run))


def _best(fitting: list[Choice], wish: Wish) -> Choice:
    """Return the choice that keeps the step's size, is fast, and among those that are alike is simple."""

    def growth(choice: Choice) -> float:
        return max(1.0, choice.layout.global_batch_size / (_MOST_GROWTH * wish.rows))

    least = min(map(growth, fitting))
    close = [choice for choice in fitting if growth(choice) == least]
    fastest = min(choice.row_seconds for choice in close)
    alike = [choice for choice in close if choice.row_seconds <= (1 + _ALIKE) * fastest]
    return min(
        alike,
        key=lambda choice: (
            choice.layout.pipeline_model_parallel_size > 1,
            choice.layout.context_parallel_size > 1,
            choice.layout.recompute_granularity is not None,
            choice.layout.model_parallel,
            -choice.layout.micro_batch_size,
            choice.layout.expert_model_parallel_size,
            choice.row_seconds,
        ),
    )


def _given(wish: Wish) -> str:
    """Return the part of a message that names the flags which leave the choice little room."""
    named = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in (wish.decided or {}).items()
        if name in Layout.__dataclass_fields__
    ]
    return f" with {' '.join(named)}" if named else ""


def _remedy(wish: Wish, cluster: Cluster) -> str:
    """Return what would fit: more GPUs, or shorter rows."""
    limit = USABLE * cluster.memory * GIB
    nodes = (cluster.per_node * 2**n for n in range(8))
    for gpus in (*(2**n for n in range(cluster.per_node.bit_length())), *nodes):
        if gpus <= cluster.gpus:
            continue
        more = Cluster(gpus, cluster.memory, cluster.per_node)
        if any(_bytes(run_shape(wish, layout, gpus)) <= limit for layout in layouts(wish, more)):
            return f"{gpus} such GPUs are enough; shorter rows (--seq-length) or LoRA need fewer"
    return "use larger GPUs, shorter rows (--seq-length) or LoRA (--lora-rank)"
