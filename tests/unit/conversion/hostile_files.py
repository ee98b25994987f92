"""Pickles that would run something, and checkpoints to put them into."""

from __future__ import annotations

import io
import pickle
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

MEGATRON = "megatron.core.dist_checkpointing.strategies.filesystem_async"


class Creates:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


class Executes(Creates):
    def __reduce__(self):
        return exec, (f"open({str(self.canary)!r}, 'w')",)


class WithState(Creates):
    """Calls a function of an allowed module with a state."""

    def __reduce__(self):
        return pickle.loads, (pickle.dumps(Creates(self.canary)),)


def text(value: str) -> bytes:
    """A text as a pickle of protocol 4 has it."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


def _dotted(canary: Path, module: str, name: str) -> bytes:
    """Protocol 4 resolves dots in a name as attributes: a harmless module leads to another one."""
    command = f"touch {canary}"
    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(command) + b"\x85R."


def _memoised(canary: Path) -> bytes:
    call = b"cos\nsystem\nq\x00" + b"0" + b"h\x00" + text(f"touch {canary}") + b"\x85R."
    return b"\x80\x02" + call


def _built(canary: Path) -> bytes:
    """Gives a list, which an allowed class takes, a function in place of a method."""
    state = text("__setstate__") + b"cos\nsystem\n"
    made = b"cargparse\nNamespace\n)\x81}" + state + b"sb"
    return b"\x80\x04" + made + text(f"touch {canary}") + b"b."


PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    **{
        f"protocol {number}": lambda canary, number=number: pickle.dumps(Creates(canary), number)
        for number in range(6)
    },
    "exec": lambda canary: pickle.dumps(Executes(canary)),
    "nested pickle": lambda canary: pickle.dumps(WithState(canary)),
    "in a list": lambda canary: pickle.dumps([1, {"a": (Creates(canary),)}], 2),
    "dotted name of a megatron module": lambda canary: _dotted(canary, MEGATRON, "os.system"),
    "dotted name of torch": lambda canary: _dotted(canary, "torch", "os.system"),
    "dotted name of argparse": lambda canary: _dotted(canary, "argparse", "_os.system"),
    "module os": lambda canary: _dotted(canary, "os", "system"),
    "memoised function": _memoised,
    "a method as a state": _built,
    "INST": lambda canary: f"(S'touch {canary}'\nios\nsystem\n.".encode(),
    "OBJ": lambda canary: f"(cos\nsystem\nS'touch {canary}'\no.".encode(),
    "NEWOBJ_EX": lambda canary: b"\x80\x04" + text("os") + text("system") + b"\x93)}" + b"\x92.",
    "EXT": lambda canary: b"\x80\x02\x82\x01.",
}
# Those that do what they are meant to do when Python's unpickler gets them.
WORKING = [name for name in PAYLOADS if name not in ("a method as a state", "NEWOBJ_EX", "EXT")]


def archive(content: bytes, data: bytes | None = None, name: str = "archive") -> bytes:
    """What torch.save writes around a pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr(zipfile.ZipInfo(f"{name}/data.pkl"), content)
        file.writestr(zipfile.ZipInfo(f"{name}/byteorder"), b"little")
        if data is not None:
            file.writestr(zipfile.ZipInfo(f"{name}/data/0"), data)
        file.writestr(zipfile.ZipInfo(f"{name}/version"), b"3\n")
    return stream.getvalue()


def saved(value: object) -> bytes:
    """What torch.save writes of a value."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def build(
    folder: Path,
    tensors: dict[str, torch.Tensor | bytes],
    objects: dict[str, bytes],
    planner_data: object = None,
) -> Path:
    """A checkpoint of entries, as torch.distributed.checkpoint lays it out; bytes stand for themselves."""
    folder.mkdir(parents=True, exist_ok=True)
    entries, storage, content = {}, {}, b""

    def add(index: MetadataIndex, entry: bytes) -> None:
        nonlocal content
        storage[index] = _StorageInfo("__0_0.distcp", len(content), len(entry))
        content += entry

    for key, tensor in tensors.items():
        shape = tensor.shape if isinstance(tensor, torch.Tensor) else torch.Size([4])
        dtype = tensor.dtype if isinstance(tensor, torch.Tensor) else torch.float32
        start = torch.Size([0] * len(shape))
        chunk = ChunkStorageMetadata(start, shape)
        entries[key] = TensorStorageMetadata(TensorProperties(dtype), shape, [chunk])
        entry = saved(tensor) if isinstance(tensor, torch.Tensor) else tensor
        add(MetadataIndex(key, start, 0), entry)
    for key, entry in objects.items():
        entries[key] = BytesStorageMetadata()
        add(MetadataIndex(key), entry)
    (folder / "__0_0.distcp").write_bytes(content)
    metadata = Metadata(entries, planner_data, storage)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return folder


def byte_tensor(content: bytes) -> torch.Tensor:
    """Bytes as Transformer Engine keeps them."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


class Steps:
    """Counts the lines that run in some modules inside a `with` block: work, whatever the machine does."""

    def __init__(self, *modules: types.ModuleType) -> None:
        self._files = {module.__file__ for module in modules}
        self.count = 0

    def __enter__(self) -> Steps:
        def trace(frame, event, _):
            if frame.f_code.co_filename in self._files:
                self.count += event == "line"
                return trace
            return None

        self._before = sys.gettrace()
        sys.settrace(trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
