"""The parallel layout of a run, chosen by the estimates: the fastest one that fits the GPUs.

All layouts of `possible_layouts.py` are counted (`memory.py`) and timed (`communication.py`). Among the ones
that fit, a layout that leaves the batch as it was asked for comes first, then the shortest time for a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_profit.estimates.communication import Machine, step_time
from megatron_profit.estimates.memory import GIB, estimate
from megatron_profit.estimates.possible_layouts import Cluster, Layout, Wish, layouts, run_shape
from megatron_profit.estimates.run_shape import RunShape, ShapeError
from megatron_profit.flags import flag_of

# Part of a GPU's memory that a layout may fill: the estimate is no measurement.
USABLE = 0.92
# Replicas take a row each, so that many of them make a step larger. Up to this factor that is accepted.
_MOST_GROWTH = 4
# Layouts whose estimated times differ by less are alike; the simplest one is taken.
_ALIKE = 0.15
# Part of the computing time under which gradients and parameters are sent (--overlap-grad-reduce).
_HIDING = 0.5
# Arguments that are numbers from 1 on.
_COUNTS = (
    *("seq_length", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"),
    *("micro_batch_size", "global_batch_size", "recompute_num_layers"),
    *("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"),
)


class NoLayoutError(ShapeError):
    """No layout can be taken; the message says what to change."""


class NoFitError(NoLayoutError):
    """There are layouts, and each needs more memory than the GPUs have; the message says what would fit."""


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
        NoLayoutError: No layout has the decided values, or splits model and rows.
        NoFitError: No layout fits.
        ShapeError: A decided value is not known to the estimates.
    """
    _check(wish)
    possible = [_estimated(wish, layout, cluster) for layout in layouts(wish, cluster)]
    if not possible:
        raise NoLayoutError(
            f"no layout splits the model and {wish.rows} rows of {wish.seq_length} positions over "
            f"{cluster}{_given(wish)}; give another --global-batch-size or number of GPUs"
            f"{', or drop one of these flags' if _given(wish) else ''}"
        )
    fitting = [choice for choice in possible if choice.bytes <= USABLE * cluster.memory * GIB]
    if not fitting:
        least = min(possible, key=lambda choice: choice.bytes)
        raise NoFitError(
            f"the model does not fit {cluster}{_given(wish)}: the smallest layout ({least.layout}) needs "
            f"about {least.bytes / GIB:.0f} GiB a GPU, and {USABLE:.0%} of "
            f"{cluster.memory:.4g} GiB may be filled; {_remedy(wish, cluster)}"
        )
    best = _best(fitting, wish)
    return Choice(best.layout, best.run, best.bytes, best.row_seconds, len(fitting), len(possible))


def _check(wish: Wish) -> None:
    """Refuse decided values that no layout can have, and flags that the estimates do not know."""
    numbers = {"seq_length": wish.seq_length, "global_batch_size": wish.rows, **wish.decided}
    for name, value in numbers.items():
        if type(value) is int and value < 1 and name in _COUNTS:
            raise NoLayoutError(f"{flag_of(name)} is {value}; it must be at least 1")
    run_shape(wish, Layout(), 1)


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
        f"--without={flag_of(name)}"
        if value in (None, False)
        else flag_of(name)
        if value is True
        else f"{flag_of(name)} {value}"
        for name, value in wish.decided.items()
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
