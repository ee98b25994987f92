"""The layout of a run on the GPUs that there are, on the GPUs to plan for, or on a laptop without any."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_profit.estimates.communication import step_flops
from megatron_profit.estimates.layouts import Choice, NoFitError, NoLayoutError, choose
from megatron_profit.estimates.memory import GIB, estimate
from megatron_profit.estimates.parameter_counts import saved_parameters, stage_parameters
from megatron_profit.estimates.possible_layouts import ASSUMED, Cluster, Layout, Wish, run_shape
from megatron_profit.estimates.run_shape import UNKNOWN, RunShape, ShapeError
from megatron_profit.estimates.saving import checkpoint_bytes
from megatron_profit.flags import flag_of
from megatron_profit.launch.machine import Machine
from megatron_profit.recipe.errors import LaunchError
from megatron_profit.recipe.flags import Given
from megatron_profit.recipe.request import Request

# Arguments that the estimates of memory and time read, if they are given.
_ESTIMATED = (*Layout.__dataclass_fields__, *ASSUMED, *UNKNOWN, "recompute_activations")
_MODEL_PARALLEL = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
)
# The ones among them that say what a replica keeps in memory, whatever number of processes share it.
_OF_A_REPLICA = (
    *("bf16", "fp16", "accumulate_allreduce_grads_in_fp32", "main_grads_dtype"),
    *("grad_reduce_in_bf16", "objective_backward", "recompute_modules"),
    *("lora_rank", "lora_targets", "lora_dropout"),
)
_LAYOUT_OF_A_REPLICA = (
    *("recompute_granularity", "recompute_method", "recompute_num_layers"),
    "use_distributed_optimizer",
)
# Shortest rows that are tried where longer ones do not fit the GPUs.
_SHORTEST_TRIED = 1024
# Operations a second of a CPU core in the products of fp32; a rough figure for a warning.
_CORE_FLOPS = 20e9
_LONG_HOURS = 24


@dataclass(frozen=True)
class PlannedLayout:
    """The layout of a run.

    Attributes:
        flags: Arguments by name.
        seq_length, rows: Positions of a row, rows of a step.
        processes: Processes of each node.
        row_seconds: Estimated time of a row; 0 where there is no estimate.
        on_gpus: Whether the run is for GPUs.
        lines: What to tell about it.
    """

    flags: Mapping[str, Any]
    seq_length: int
    rows: int
    processes: int
    row_seconds: float
    on_gpus: bool
    lines: tuple[str, ...]


def parameters_of(model: Mapping[str, Any]) -> int:
    """Return the number of parameters of a model."""
    wish = Wish(model, seq_length=1, rows=1)
    return stage_parameters(run_shape(wish, Layout(), 1), 0).total


def checkpoint_of(
    request: Request,
    model: Mapping[str, Any],
    on_gpus: bool = True,
    derived: Mapping[str, Any] | None = None,
) -> int:
    """Return the bytes of a run's checkpoint, of the adapters alone where it trains adapters.

    Args:
        request: The command line.
        model: Megatron's arguments of the model.
        on_gpus: Whether the run trains on GPUs.
        derived: Flags that follow from the layout, by argument.
    """
    given = request.values
    half = on_gpus and not given.get("fp16") and "--bf16" not in request.front.without
    names = ("lora_rank", "lora_targets")
    adapters: dict[str, Any] = {name: given[name] for name in names if name in given}
    shape = run_shape(Wish(model, seq_length=1, rows=1, decided=adapters), Layout(), 1)
    return checkpoint_bytes({"bf16": half, **(derived or {}), **given}, saved_parameters(shape))


def wish_of_flags(
    given: Mapping[str, Given],
    model: Mapping[str, Any],
    seq_length: int,
    rows: int,
    exact_rows: bool,
) -> Wish:
    """Return the request for a layout that the training's flags make."""
    decided = {name: given[name].value for name in _ESTIMATED if name in given}
    decided.pop("global_batch_size", None)
    if decided.get("fp16"):
        decided["bf16"] = False
    return Wish(model, seq_length, rows, exact_rows, decided)


def plan_layout(request: Request, wish: Wish, machine: Machine, may_shorten: bool) -> PlannedLayout:
    """Return the layout of a run.

    Args:
        request: The command line.
        wish: Model, rows and what is decided.
        machine: The machine here.
        may_shorten: Whether rows may become shorter where long ones do not fit.

    Raises:
        LaunchError: No layout is possible, or none fits.
    """
    processes = _processes(request, machine)
    cluster = _cluster(request, machine, processes)
    if cluster is None:
        return _without_gpus(request, wish, machine, processes)
    if request.front.layout == "given":
        line = f"layout: as the flags say, on {cluster}"
        return replace(_given(wish, processes, cluster.gpus), on_gpus=True, lines=(line,))
    if machine.gpus and importlib.util.find_spec("fla") is None:
        wish = replace(wish, state_kernels=False)
    try:
        choice, wish = _fitting(_without(wish, request), cluster, may_shorten)
    except NoLayoutError as error:
        raise LaunchError(str(error)) from error
    except ShapeError as error:
        raise LaunchError(
            f"--layout auto: {error}; or give the whole layout and --layout given"
        ) from error
    lines = [f"layout: {choice.describe(cluster)}"]
    rows = choice.layout.global_batch_size
    if rows > wish.rows:
        lines.append(
            f"a step has {rows} rows, not {wish.rows}: as many for each replica. --global-batch-size sets it"
        )
    return PlannedLayout(
        flags=flags_of_choice(choice),
        seq_length=wish.seq_length,
        rows=rows,
        processes=processes,
        row_seconds=choice.row_seconds,
        on_gpus=True,
        lines=tuple(lines),
    )


def check_processes(request: Request, machine: Machine) -> None:
    """Refuse a number of processes that the given sizes do not divide, where no layout is searched.

    Raises:
        LaunchError: Names the sizes and the remedy.
    """
    processes = _processes(request, machine)
    if _cluster(request, machine, processes) is None or request.front.layout == "given":
        sizes = {name: request.value(name) or 1 for name in _MODEL_PARALLEL}
        _check_world(sizes, processes * request.nodes)


def _processes(request: Request, machine: Machine) -> int:
    """Return the processes of each node."""
    front, nodes = request.front, request.nodes
    if front.nproc_per_node is not None:
        if front.nproc_per_node > len(machine.gpus) > 0:
            raise LaunchError(
                f"--nproc-per-node is {front.nproc_per_node}, and {len(machine.gpus)} GPUs are visible here; "
                "give at most that"
            )
        return front.nproc_per_node
    if front.gpus is None:
        return len(machine.gpus) or 1
    here = front.gpus // nodes
    if here > len(machine.gpus) and not front.dry_run:
        raise LaunchError(
            f"--gpus {front.gpus} need {here} on this node, and {len(machine.gpus)} are visible; --dry-run "
            "prints the command for such a machine"
        )
    return here


def _cluster(request: Request, machine: Machine, processes: int) -> Cluster | None:
    """Return the GPUs to train on, or to plan for; None for a CPU."""
    front = request.front
    if not machine.gpus and front.gpus is None:
        return None
    memory = front.gpu_memory or min(machine.gpus, default=0)
    if not memory:
        raise LaunchError(
            "--gpus needs the memory of a GPU where there is none; give --gpu-memory GIB"
        )
    gpus = front.gpus or processes * request.nodes
    return Cluster(gpus, memory, min(processes, gpus))


def _without(wish: Wish, request: Request) -> Wish:
    """Return a request whose layouts leave out the flags of --without, as the run does."""
    defaults = {flag_of(name): (name, value) for name, value in asdict(Layout()).items()}
    defaults["--bf16"] = ("bf16", False)
    del defaults["--global-batch-size"]  # the wish has its rows
    left_out = dict(defaults[flag] for flag in request.front.without if flag in defaults)
    return replace(wish, decided={**left_out, **wish.decided})


def _fitting(wish: Wish, cluster: Cluster, may_shorten: bool) -> tuple[Choice, Wish]:
    """Return the layout for the longest rows that fit."""
    try:
        return choose(wish, cluster), wish
    except NoFitError:
        shorter = wish.seq_length // 2
        while may_shorten and shorter >= _SHORTEST_TRIED:
            rows = wish.rows if wish.exact_rows else wish.rows * (wish.seq_length // shorter)
            less = replace(wish, seq_length=shorter, rows=rows)
            try:
                return choose(less, cluster), less
            except NoLayoutError:
                shorter //= 2
        raise


def flags_of_choice(choice: Choice) -> dict[str, Any]:
    """Return the arguments of a layout by name.

    With the distributed optimizer, checkpoints fit every layout. With replicas as well, gradients and
    parameters are sent while the GPUs compute.
    """
    flags = choice.layout.flags()
    if choice.layout.use_distributed_optimizer:
        flags["dist_ckpt_optim_fully_reshardable"] = True
        if choice.run.dp * choice.run.cp > 1:
            flags |= {"overlap_grad_reduce": True, "overlap_param_gather": True}
    return flags


def _check_world(sizes: Mapping[str, int], world: int) -> int:
    """Return the processes of a replica, of which there must be a whole number."""
    replica = math.prod(sizes.values())
    if world % replica:
        verb = "are" if world > 1 else "is"
        raise LaunchError(
            f"tensor x pipeline x context parallel size is {replica}, and there {verb} {world} "
            f"process{'es' * (world > 1)}; start a multiple of {replica}, for example with "
            f"--nproc-per-node {replica}"
        )
    return replica


def _given(wish: Wish, processes: int, world: int) -> PlannedLayout:
    """Return the layout that the flags give, without an estimate."""
    replica = _check_world({name: wish.decided.get(name, 1) for name in _MODEL_PARALLEL}, world)
    micro = wish.decided.get("micro_batch_size", 1)
    step = world // replica * micro
    rows = wish.rows if wish.exact_rows else math.ceil(wish.rows / step) * step
    flags = {"micro_batch_size": micro, "global_batch_size": rows}
    return PlannedLayout(flags, wish.seq_length, rows, processes, 0.0, False, ())


def _without_gpus(request: Request, wish: Wish, machine: Machine, processes: int) -> PlannedLayout:
    """Return the layout of a run on the CPU backend.

    Raises:
        LaunchError: The model does not fit the memory.
    """
    world = processes * request.nodes
    planned = _given(wish, processes, world)
    run = _whole_replicas(wish, planned, world)
    (memory,) = estimate(run)
    # Ranks of context parallelism hold all weights, as replicas do.
    holders = run.dp * wish.decided.get("context_parallel_size", 1)
    needed = (memory.total - memory.runtime) * holders / request.nodes / GIB
    if needed > machine.memory:
        raise LaunchError(
            f"there is no GPU here, and a training of this model takes about {needed:.0f} GiB of memory, of "
            f"which {machine.memory:.0f} GiB are available; take a smaller model, or a machine with GPUs "
            "(--gpus N --gpu-memory GIB --dry-run shows its layout)"
        )
    seconds = step_flops(run) / planned.rows / (_CORE_FLOPS * machine.cores)
    precision = next((name for name in ("bf16", "fp16") if getattr(run.args, name)), "fp32")
    line = (
        f"layout: {processes} CPU process{'es' * (processes > 1)} (there is no GPU), in {precision}; needs "
        f"about {needed:.1f} of {machine.memory:.0f} GiB"
    )
    return replace(planned, row_seconds=seconds, lines=(line,))


def _whole_replicas(wish: Wish, planned: PlannedLayout, world: int) -> RunShape:
    """Return the run with each replica in one process.

    Processes that share a replica by tensor or pipeline parallelism hold as much in all. Replicas share
    experts.
    """
    decided = wish.decided
    layout = {name: decided[name] for name in _LAYOUT_OF_A_REPLICA if name in decided}
    if decided.get("recompute_activations"):
        layout["recompute_granularity"] = "selective"
    own = {"bf16": False, **{name: decided[name] for name in _OF_A_REPLICA if name in decided}}
    replicas = world // math.prod(decided.get(name, 1) for name in _MODEL_PARALLEL)
    layout["expert_model_parallel_size"] = math.gcd(
        decided.get("expert_model_parallel_size", 1), replicas
    )
    run = run_shape(replace(wish, decided=own), Layout(**planned.flags, **layout), replicas)
    return replace(run, fused=False)


def slow_warning(planned: PlannedLayout, steps: int) -> list[str]:
    """Return a warning where the run takes days on a CPU, else an empty list."""
    hours = steps * planned.rows * planned.row_seconds / 3600
    if planned.on_gpus or hours < _LONG_HOURS:
        return []
    return [
        f"warning: {steps:,} steps take about {hours / 24:,.0f} days on this CPU; it is for small models, "
        "short tests (--train-iters 10) and debugging"
    ]
