"""The classes and functions that a checkpoint's pickles may name, and how they may use them.

Each list is exact: module and name, the arguments and the state. Its entries do no harm when torch
calls them. No list has an entry that looks up names, opens files or runs text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from checkpoint_conversion.pickles.reader import read_first_pickle
from checkpoint_conversion.pickles.values import (
    Call,
    Instance,
    Named,
    OrderedMap,
    PersistentId,
    Use,
    Uses,
)

# Bytes of an element, by the class that torch names for a storage; the last one is of any dtype.
STORAGES = {
    Named("torch", "DoubleStorage"): 8,
    Named("torch", "FloatStorage"): 4,
    Named("torch", "HalfStorage"): 2,
    Named("torch", "BFloat16Storage"): 2,
    Named("torch", "LongStorage"): 8,
    Named("torch", "IntStorage"): 4,
    Named("torch", "ShortStorage"): 2,
    Named("torch", "CharStorage"): 1,
    Named("torch", "ByteStorage"): 1,
    Named("torch", "BoolStorage"): 1,
    Named("torch.storage", "UntypedStorage"): 1,
}
_DTYPES = re.compile(r"b?float\d{1,2}|float8_e\dm\d\w{0,4}|complex\d{2,3}|u?int\d{1,2}|bool")
# More than torch's tensors can have.
_MOST_AXES = 64
_LIMIT = 2**63
_PLAIN = (bool, int, float, str, bytes, type(None))

Table = Mapping[tuple[str, str], Use]


def is_size(value: Any) -> bool:
    """Return whether a value is a number of bytes, elements or rows, at most as large as a file can be."""
    return type(value) is int and 0 <= value < _LIMIT


def is_sizes(value: Any) -> bool:
    """Return whether a value is a tuple of sizes for the axes of a tensor."""
    return (
        type(value) is tuple
        and len(value) <= _MOST_AXES
        and set(map(type, value)) <= {int}
        and (not value or 0 <= min(value) <= max(value) < _LIMIT)
    )


def within(table: Table) -> Uses:
    """Return the uses of a table, and of dtypes, which every table includes."""

    def uses(module: str, name: str) -> Use | None:
        if module == "torch" and _DTYPES.fullmatch(name):
            return _VALUE
        return table.get((module, name))

    return uses


# Makers. Each raises ValueError, which names the arguments it expects.


def _blank(named: Named, arguments: tuple[Any, ...]) -> Instance:
    if arguments:
        raise ValueError("none")
    return Instance(named)


def _of_scalars(named: Named, arguments: tuple[Any, ...]) -> Call:
    """Make a path, a device or a member of an enumeration."""
    if not all(type(argument) in _PLAIN for argument in arguments):
        raise ValueError("plain values")
    return Call(named, arguments)


def _of_parts(named: Named, arguments: tuple[Any, ...]) -> Call:
    """Make a named tuple, which may hold another one."""
    if not all(type(argument) in (*_PLAIN, Call) for argument in arguments):
        raise ValueError("plain values")
    return Call(named, arguments)


def _size(_: Named, arguments: tuple[Any, ...]) -> tuple[int, ...]:
    if len(arguments) != 1 or not is_sizes(arguments[0]):
        raise ValueError("sizes")
    return arguments[0]


def _ordered(_: Named, arguments: tuple[Any, ...]) -> OrderedMap:
    if arguments:
        raise ValueError("none")
    return OrderedMap()


def _bytes(_: Named, arguments: tuple[Any, ...]) -> bytes:
    """Make bytes from protocol 2's form, a text with a character for each byte, or a `bytearray` of them."""
    if not arguments:
        return b""
    if len(arguments) == 1 and type(arguments[0]) is bytes:
        return arguments[0]
    text, encoding = arguments
    if encoding not in ("latin1", "latin-1"):
        raise ValueError("latin1")
    return text.encode("latin1")


def _collection(named: Named, arguments: tuple[Any, ...]) -> Call:
    (items,) = arguments
    if type(items) is not list or not all(type(item) in _PLAIN for item in items):
        raise ValueError("a list of plain values")
    return Call(named, arguments)


def _tensor(named: Named, arguments: tuple[Any, ...]) -> Call:
    """Make a tensor that is a part of a storage.

    The call is `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`. Newer dtypes
    have `_rebuild_tensor_v3`, which takes the dtype after these arguments.
    """
    storage, first, shape, strides, requires_grad, hooks, *rest = arguments
    itemsize = 1
    if named.name == "_rebuild_tensor_v3":
        dtype, *rest = rest
        bits = re.search(r"\d+", dtype.name)
        itemsize = 1 if bits is None else max(1, int(bits[0]) // 8)
    is_part = (
        is_size(first) and is_sizes(shape) and is_sizes(strides) and len(shape) == len(strides)
    )
    if not (is_part and type(requires_grad) is bool and hooks == {} and rest in ([], [None], [{}])):
        raise ValueError("a storage, sizes and strides")
    end = 1 + first + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and end * itemsize > _elements(storage):
        raise ValueError("a tensor that lies within its storage")
    return Call(named, arguments)


def _elements(storage: Any) -> int | float:
    """Return the number of elements of a storage; infinite, as unknown, for a pickle within the pickle."""
    if type(storage) is Call and storage.function in _NESTED_STORAGES:
        return math.inf
    if type(storage) is not PersistentId:
        raise ValueError("a storage")
    return storage.identity[-1]


def _parameter(named: Named, arguments: tuple[Any, ...]) -> Call:
    tensor, requires_grad, hooks = arguments
    is_tensor = type(tensor) is Call and tensor.function.name.startswith("_rebuild_tensor_v")
    if not (is_tensor and type(requires_grad) is bool and hooks == {}):
        raise ValueError("a tensor")
    return Call(named, arguments)


def _array(named: Named, arguments: tuple[Any, ...]) -> Instance:
    """Make an array of numpy, which is then given a state."""
    cls, shape, _ = arguments
    if cls != Named("numpy", "ndarray") or not is_sizes(shape):
        raise ValueError("ndarray")
    return Instance(named)


def _array_dtype(named: Named, arguments: tuple[Any, ...]) -> Instance:
    """Make a numeric dtype of numpy: neither objects nor records."""
    code, *flags = arguments
    if not re.fullmatch(r"[biufc]\d{1,2}", code) or not all(type(flag) is bool for flag in flags):
        raise ValueError("a numeric dtype")
    return Instance(named)


def _scalar(named: Named, arguments: tuple[Any, ...]) -> Call:
    dtype, data = arguments
    if not _is_array_dtype(dtype) or type(data) is not bytes:
        raise ValueError("a numeric dtype and bytes")
    return Call(named, arguments)


# Accepted states.


def _has_attributes(state: Any) -> bool:
    return type(state) is dict and set(map(type, state)) <= {str}


def _is_plain_tuple(state: Any) -> bool:
    return type(state) is tuple and all(type(item) in _PLAIN for item in state)


def _is_array_dtype(value: Any) -> bool:
    return type(value) is Instance and value.cls == Named("numpy", "dtype")


def _is_array_state(state: Any) -> bool:
    match state:
        case (int(), shape, dtype, bool(), bytes()):
            return is_sizes(shape) and _is_array_dtype(dtype)
    return False


def _is_generator_state(state: Any) -> bool:
    match state:
        case (int(), int() | None, Call(function=Named("torch._utils", "_rebuild_tensor_v2"))):
            return True
    return False


_VALUE = Use(is_value=True)
_RECORD = Use(new=_blank, state=_has_attributes)
_SCALARS = Use(call=_of_scalars)
_ORDERED = {("collections", "OrderedDict"): Use(call=_ordered)}
_SIZE = {("torch", "Size"): Use(call=_size)}
_PATHS = {
    (module, name): _SCALARS
    for module, name in (
        ("pathlib", "Path"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
    )
}


def _is_properties(state: Any) -> bool:
    """Accept the state of TensorProperties, whose dtype comes first.

    torch 2.15 has six values, older versions five.
    """
    return type(state) is tuple and len(state) in (5, 6) and type(state[0]) is Named


_CHECKPOINT = "torch.distributed.checkpoint"
_STRATEGIES = "megatron.core.dist_checkpointing.strategies.torch"
# `.metadata`.
METADATA: Table = {
    **_ORDERED,
    **_SIZE,
    **_PATHS,
    ("torch.serialization", "_get_layout"): _SCALARS,
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"): _SCALARS,
    (f"{_CHECKPOINT}.metadata", "TensorProperties"): Use(new=_blank, state=_is_properties),
    (f"{_CHECKPOINT}.planner", "WriteItemType"): _SCALARS,
    **{
        (f"{_CHECKPOINT}.{module}", name): _RECORD
        for module, names in {
            "filesystem": ("_StorageInfo", "_StoragePrefix"),
            "metadata": (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorStorageMetadata",
            ),
            "planner": ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem"),
        }.items()
        for name in names
    },
    # Megatron-Core before 0.16.
    (_STRATEGIES, "MCoreMetadata"): _RECORD,
    (_STRATEGIES, "MCoreSavePlan"): _RECORD,
}

STORAGE_TYPES: Table = {(named.module, named.name): _VALUE for named in STORAGES}
# A storage as a pickle within a pickle; Megatron replaces torch's function by its own.
_NESTED_STORAGES = (
    Named("torch.storage", "_load_from_bytes"),
    Named("megatron.core.safe_globals", "safe_load_from_bytes"),
)
# The archive of a tensor, and a state dict in pytorch_model.bin.
TENSORS: Table = {
    **_ORDERED,
    **_SIZE,
    ("torch._utils", "_rebuild_tensor_v2"): Use(call=_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Use(call=_tensor),
    ("torch._utils", "_rebuild_parameter"): Use(call=_parameter),
    **STORAGE_TYPES,
}

_ENUMERATIONS = {
    "megatron.core.enums": ("ModelType",),
    "megatron.core.rerun_state_machine": ("RerunDiagnostic", "RerunMode", "RerunState"),
    "megatron.core.transformer.enums": (
        "AttnBackend",
        "CudaGraphModule",
        "CudaGraphScope",
        "InferenceCudaGraphScope",
    ),
    "signal": ("Signals",),
}
_NUMPY = {
    ("numpy", "dtype"): Use(call=_array_dtype, state=_is_plain_tuple),
    ("numpy", "ndarray"): _VALUE,
    **{
        (module, name): use
        for module in ("numpy._core.multiarray", "numpy.core.multiarray")  # numpy 2 and 1
        for name, use in (
            ("_reconstruct", Use(call=_array, state=_is_array_state)),
            ("scalar", Use(call=_scalar)),
        )
    },
}
# Entries that are not tensors, for example arguments, and the states of optimizer, scheduler and random
# numbers (as in megatron/core/safe_globals.py, and as torch.load knows).
OBJECTS: Table = {
    **TENSORS,
    **_PATHS,
    **_NUMPY,
    ("_codecs", "encode"): Use(call=_bytes),
    ("__builtin__", "bytes"): Use(call=_bytes),
    ("__builtin__", "bytearray"): Use(call=_bytes),
    ("__builtin__", "set"): Use(call=_collection),
    ("__builtin__", "frozenset"): Use(call=_collection),
    ("__builtin__", "complex"): _SCALARS,
    ("argparse", "Namespace"): _RECORD,
    ("types", "SimpleNamespace"): Use(call=_blank, new=_blank, state=_has_attributes),
    ("megatron.core.optimizer.optimizer_config", "OptimizerConfig"): _RECORD,
    ("megatron.core.rerun_state_machine", "Call"): Use(new=_of_parts),
    ("megatron.core.rerun_state_machine", "Caller"): Use(new=_of_parts),
    ("_io", "BytesIO"): Use(new=_blank, state=_is_plain_tuple),
    ("torch", "device"): _SCALARS,
    ("torch._C", "Generator"): Use(
        call=lambda named, _: Instance(named), state=_is_generator_state
    ),
    **{(module, name): _SCALARS for module, names in _ENUMERATIONS.items() for name in names},
}


def _nested_storage(named: Named, arguments: tuple[Any, ...]) -> Call:
    (content,) = arguments
    if type(content) is not bytes:
        raise ValueError("bytes")
    check_old_storage(content)
    return Call(named, arguments)


def check_old_storage(content: bytes) -> None:
    """Check a storage in torch.save's format before zip archives.

    Five pickles come before the bytes: a magic number, a version, sizes of numbers, the storage, and a
    list with its key.

    Raises:
        PickleError: The bytes have another form.
    """
    end, uses = 0, within(STORAGE_TYPES)
    for _ in range(5):
        _, end = read_first_pickle(content, uses, _old_reference, end)


def _old_reference(identity: Any) -> PersistentId:
    match identity:
        case ("storage", Named() as kind, str(), str(), int(), None) if kind in STORAGES:
            return PersistentId(identity)
    raise ValueError("a storage")


def _format(named: Named, arguments: tuple[Any, ...]) -> Call:
    (value,) = arguments
    if type(value) is not Call or value.function.name != "_FormatHelper":
        raise ValueError("a _FormatHelper")
    return Call(named, arguments)


_RECIPES = "transformer_engine.common.recipe"
# Transformer Engine's state of an FP8 recipe, a pickle in a tensor of bytes (get_extra_state in
# transformer_engine/pytorch/module/base.py and ops/op.py).
EXTRA_STATE: Table = {
    **_ORDERED,
    **_SIZE,
    ("torch._utils", "_rebuild_tensor_v2"): Use(call=_tensor),
    **{(named.module, named.name): Use(call=_nested_storage) for named in _NESTED_STORAGES},
    (_RECIPES, "Format"): Use(call=_format),
    (_RECIPES, "_FormatHelper"): Use(new=_of_scalars),
    ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"): _RECORD,
    **{
        (_RECIPES, name): _RECORD
        for name in (
            "DelayedScaling",
            "Float8BlockScaling",
            "Float8CurrentScaling",
            "MMParams",
            "MXFP8BlockScaling",
            "NVFP4BlockScaling",
            "QParams",
        )
    },
}


def _anything(named: Named, _: tuple[Any, ...]) -> Instance:
    return Instance(named)


_INERT = Use(call=_anything, new=_anything, state=lambda _: True, is_value=True)


# Packages whose classes and functions may occur in the arguments. Plain values hold the architecture.
_PASSED_OVER = ("megatron", "numpy", "torch", "transformer_engine")


def arguments(module: str, name: str) -> Use | None:
    """Return uses for a reader that wants the plain values of the arguments and passes over the others.

    Objects of Megatron and torch are accepted in any version, because this reader does not make them.
    """
    found = within(OBJECTS)(module, name)
    return _INERT if found is None and module.partition(".")[0] in _PASSED_OVER else found
