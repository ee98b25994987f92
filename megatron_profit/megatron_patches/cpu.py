"""The CPU backend: makes `torch.cuda` mean the CPU, so that Megatron's own training loop runs under gloo.

It is for learning, debugging and tests on machines without a GPU; it never runs together with CUDA.
`torch.cuda` functions are replaced one by one, and a global TorchFunctionMode rewrites CUDA devices in
calls such as `torch.zeros(..., device="cuda")`, which are written all over Megatron.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megatron_profit.megatron_patches.patch import Patch

_CPU = torch.device("cpu")


def _is_cuda(value: Any) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites CUDA devices to the CPU in every torch call of this thread."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _TENSOR_METHODS:
            return _TENSOR_METHODS[func](*args, **kwargs)
        if "device" in kwargs:
            device = kwargs["device"]
            # A bare integer is a CUDA ordinal wherever torch accepts it.
            if _is_cuda(device) or isinstance(device, int):
                kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.device and args[:1] == ("cuda:cpu",):
            # Megatron writes f"cuda:{torch.cuda.current_device()}".
            args = ("cpu",)
        if func is torch.Tensor.to:
            args = tuple(_CPU if _is_cuda(a) or type(a) is int else a for a in args)
        return func(*args, **kwargs)


def _tensor_type(tensor: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    # Megatron's optimizer and clip_grads compare the name with 'torch.cuda.FloatTensor'.
    if dtype is None:
        return str(_original_type(tensor)).replace("torch.", "torch.cuda.", 1)
    return _original_type(tensor, dtype, *args, **kwargs)


_original_type = torch.Tensor.type
_TENSOR_METHODS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.cuda: lambda tensor, *args, **kwargs: tensor,
    torch.Tensor.pin_memory: lambda tensor, *args, **kwargs: tensor,
    torch.Tensor.record_stream: lambda tensor, stream: None,
    torch.Tensor.type: _tensor_type,
}


class _Stream:
    """Stands in for torch.cuda.Stream: the CPU runs everything in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = _CPU
        self.cuda_stream = 0

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()


class _Event:
    """Stands in for torch.cuda.Event: always complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _properties(device: Any = None) -> types.SimpleNamespace:
    # The compute capability of an A100: the lowest for which Megatron takes its ordinary paths.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return types.SimpleNamespace(
        name="cpu", major=8, minor=0, multi_processor_count=os.cpu_count(), total_memory=memory
    )


def _returning(value: Any) -> Callable[..., Any]:
    """Return a new function at every call: torch._dynamo refuses one function under two names."""
    return lambda *args, **kwargs: value


def _replace_torch_cuda() -> None:
    """Replace the functions of torch.cuda that Megatron calls."""
    stream = _Stream()
    replacements = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": _returning(None),
        "_lazy_call": lambda call, **kwargs: call(),
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "current_device": lambda: _CPU,
        "set_device": _returning(None),
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": _returning(None),
        "empty_cache": _returning(None),
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda stream: contextlib.nullcontext(),
        "set_stream": _returning(None),
        "current_stream": lambda *args: stream,
        "default_stream": lambda *args: stream,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda *args: torch.get_rng_state(),
        "set_rng_state": lambda state, *args: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": lambda seed: torch.default_generator.manual_seed(seed),
        "get_device_properties": _properties,
        "get_device_capability": lambda *args: (8, 0),
        "get_device_name": lambda *args: "cpu",
        "memory_stats": lambda *args: dict.fromkeys(
            (
                "reserved_bytes.all.current",
                "allocated_bytes.all.current",
                "allocated_bytes.all.peak",
                "allocation.all.current",
            ),
            0,
        ),
        "memory_allocated": _returning(0),
        "memory_reserved": _returning(0),
        "max_memory_allocated": _returning(0),
        "max_memory_reserved": _returning(0),
        "reset_peak_memory_stats": _returning(None),
        "mem_get_info": lambda *args: (0, 0),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]
    # The DataLoader's pinning and torch.utils.checkpoint ask torch.accelerator, which must see none.
    torch.accelerator.is_available = lambda: False
    torch.accelerator.current_accelerator = lambda *args, **kwargs: None


def _rewrite_devices() -> None:
    _CudaMeansCpu().__enter__()


def _disable_dynamo() -> None:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if "torch._dynamo" in sys.modules:
        torch._dynamo.config.disable = True


def _hide_gpu_libraries() -> None:
    for name in ("transformer_engine", "apex", "amp_C"):
        # Python's own mark of a module that cannot be imported; typeshed does not know it.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def _use_cpu_generator() -> None:
    from megatron.core.tensor_parallel import random

    def get_state(
        device: Any = "cuda", clone: bool = False, graph_safe: bool = False
    ) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state


def _split_sizes_as_lists() -> None:
    original = dist.all_to_all_single

    def as_list(sizes: torch.Tensor | list[int] | None) -> list[int] | None:
        return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes

    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: torch.Tensor | list[int] | None = None,
        input_split_sizes: torch.Tensor | list[int] | None = None,
        group: dist.ProcessGroup | None = None,
        async_op: bool = False,
    ) -> dist.Work | None:
        sizes = as_list(output_split_sizes), as_list(input_split_sizes)
        return original(output, input, *sizes, group, async_op)

    dist.all_to_all_single = all_to_all_single


def _allow_uneven_sizes() -> None:
    """Let all_gather and reduce_scatter take first dimensions that differ between ranks."""
    all_gather, reduce_scatter = dist.all_gather, dist.reduce_scatter

    def is_even(tensors: Sequence[torch.Tensor]) -> bool:
        return len({len(tensor) for tensor in tensors if tensor.dim()}) <= 1

    def gather(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: dist.ProcessGroup | None = None,
        async_op: bool = False,
    ) -> dist.Work | None:
        if is_even(tensor_list):
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        longest = max(map(len, tensor_list))
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in tensor_list]
        all_gather(gathered, padded, group=group)
        for target, source in zip(tensor_list, gathered, strict=True):
            target.copy_(source[: len(target)])
        return None

    def scatter(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: dist.ProcessGroup | None = None,
        async_op: bool = False,
    ) -> dist.Work | None:
        if is_even(input_list):
            return reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
        joined = torch.cat(input_list)
        dist.all_reduce(joined, op=op, group=group)
        parts = joined.split([len(tensor) for tensor in input_list])
        output.copy_(parts[dist.get_rank(group)])
        return None

    # torch declares each of the two as a pair of overloads.
    dist.all_gather = gather  # type: ignore[assignment]
    dist.reduce_scatter = scatter  # type: ignore[assignment]


def _build_data_iterators_without_drawing() -> None:
    from megatron.training import training

    original = training.build_train_valid_test_data_iterators

    @functools.wraps(original)
    def build(*args: Any, **kwargs: Any) -> Any:
        state = torch.get_rng_state()
        iterators = original(*args, **kwargs)
        torch.set_rng_state(state)
        return iterators

    training.build_train_valid_test_data_iterators = build


TORCH_PATCHES = (
    Patch(
        name="cpu-no-dynamo",
        functions=("torch/_dynamo/config.py:disable",),
        reason="Megatron compiles small fusions with torch.compile at import; on the CPU that costs "
        "minutes of compilation for nothing.",
        apply=_disable_dynamo,
    ),
    Patch(
        name="cpu-torch-cuda",
        functions=(
            "torch/cuda/__init__.py:is_available",
            "torch/cuda/__init__.py:current_stream",
            "torch/cuda/__init__.py:synchronize",
            "torch/nn/modules/module.py:Module.cuda",
        ),
        reason="Megatron calls torch.cuda without asking whether there is a GPU.",
        apply=_replace_torch_cuda,
    ),
    Patch(
        name="cpu-devices",
        functions=("torch/overrides.py:TorchFunctionMode",),
        reason="Megatron writes device='cuda', Tensor.cuda() and Tensor.type() comparisons in place.",
        apply=_rewrite_devices,
    ),
    Patch(
        name="cpu-all-to-all",
        functions=("torch/distributed/distributed_c10d.py:all_to_all_single",),
        reason="Megatron's expert parallelism passes split sizes as CPU tensors; gloo wants lists.",
        apply=_split_sizes_as_lists,
    ),
    Patch(
        name="cpu-uneven-collectives",
        functions=(
            "torch/distributed/distributed_c10d.py:all_gather",
            "torch/distributed/distributed_c10d.py:reduce_scatter",
        ),
        reason="Tensor-parallel experts gather and scatter as many tokens as were routed to each rank; "
        "NCCL takes sizes that differ, gloo does not.",
        apply=_allow_uneven_sizes,
    ),
)

MEGATRON_PATCHES = (
    Patch(
        name="cpu-no-gpu-libraries",
        functions=("megatron/core/optimizer/distrib_optimizer.py:HAVE_APEX_OR_TE",),
        reason="Megatron takes the optimizers and norms of Transformer Engine or Apex as soon as they can "
        "be imported, and their kernels run on GPUs only.",
        apply=_hide_gpu_libraries,
    ),
    Patch(
        name="cpu-rng",
        functions=(
            "megatron/core/tensor_parallel/random.py:_get_cuda_rng_state",
            "megatron/core/tensor_parallel/random.py:_set_cuda_rng_state",
        ),
        reason="The RNG tracker reads torch.cuda.default_generators, which is empty without a GPU.",
        apply=_use_cpu_generator,
    ),
    Patch(
        name="cpu-data-iterators",
        functions=("megatron/training/training.py:build_train_valid_test_data_iterators",),
        reason="A data loader draws a seed for its workers from the CPU's generator, which here is that of "
        "dropout too: after the state of a checkpoint was restored, a resumed run would draw once more.",
        apply=_build_data_iterators_without_drawing,
    ),
)
