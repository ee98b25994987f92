"""The machine: GPUs and their software, memory, and the disk of the run's folder."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from checkpoint_conversion.engine.output import nearest_existing
from megatron_profit.doctor.findings import Finding, fault, note, ok, warning
from megatron_profit.launch.machine import GIB, this_machine

# Shared memory that data loaders and NCCL need.
_SHARED_MEMORY = 1 * GIB
# Bytes of the file that measures the disk's speed.
_PROBE_BYTES = 256 << 20
_BLOCK = bytes(8 << 20)
# Below this, a checkpoint takes long.
_SLOW_DISK = 200e6
# File systems that several machines may share.
_SHARED_SYSTEMS = (
    *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cephfs", "fuse.juicefs", "wekafs"),
    *("9p", "fuse.glusterfs", "fuse.s3fs", "fuse.gcsfuse", "panfs", "pvfs2", "cifs", "virtiofs"),
)
# Seconds that a process may take to import and compile what it is asked about.
_PATIENCE_SECONDS = 600
# Libraries with their places in torch.
_ASK = """
import torch
found = {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
if torch.distributed.is_nccl_available():
    found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
for name, version in found.items():
    print(name, version)
for number in range(torch.cuda.device_count()):
    a = torch.randn(256, 256, device=number, dtype=torch.bfloat16)
    wrong = (a @ a - (a.float() @ a.float())).abs().max().item()
    print("product", number, wrong)
"""
# A row of two records through Transformer Engine's attention, forward and backward.
_ATTEND = """
import torch
from transformer_engine.pytorch import DotProductAttention
from megatron_profit.models.engine_kernels import computes_unfused
borders = torch.tensor([0, 48, 128], dtype=torch.int32, device="cuda")
query, key, value = (
    torch.randn(128, heads, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    for heads in (4, 2, 2)
)
attend = DotProductAttention(4, 64, num_gqa_groups=2, attention_dropout=0.0, qkv_format="thd")
context = attend(
    query, key, value, attn_mask_type="padding_causal",
    cu_seqlens_q=borders, cu_seqlens_kv=borders, max_seqlen_q=80, max_seqlen_kv=80,
)
context.float().sum().backward()
print("unfused" if computes_unfused() else "fused")
"""
_LARGEST_ERROR = 1.0  # of products of 256 normal numbers in bf16, which are about 16


def check_software() -> Iterator[Finding]:
    """Yield the versions of Python and of the packages."""
    names = ("torch", "megatron-core", "transformers", "transformer-engine")
    found = {name: _version(name) for name in names}
    shown = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    yield ok("software", f"Python {sys.version.split()[0]}, {shown}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_gpus() -> Iterator[Finding]:
    """Yield the GPUs, the driver, torch's libraries, and Transformer Engine."""
    machine = this_machine()
    if not machine.gpus:
        yield note("GPU", f"{machine}: runs use the CPU backend, for small models and tests")
        return
    yield ok("GPU", f"{machine}, driver {_driver()}")
    printed, failure = _run_python(_ASK)
    if failure is not None:
        yield fault("GPU", f"a product on the GPUs fails: {failure}")
        return
    lines = [line.split() for line in printed.splitlines()]
    versions = (f"{name} {version}" for name, version in (w for w in lines if len(w) == 2))
    yield ok("libraries", ", ".join(versions))
    for _, number, wrong in (words for words in lines if words[0] == "product"):
        if not float(wrong) < _LARGEST_ERROR:
            yield fault("GPU", f"GPU {number} computes a wrong product (error {wrong}); replace it")
    yield from _transformer_engine()


def _run_python(code: str) -> tuple[str, str | None]:
    """Run code in a process of its own; return its output, and the last line of its error if it fails."""
    command = [sys.executable, "-c", code]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_PATIENCE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return "", f"there was no answer in {_PATIENCE_SECONDS} seconds"
    failure = answer.stderr.strip().rpartition("\n")[2] if answer.returncode else None
    return answer.stdout, failure


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown (no nvidia-smi)"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        return "unknown (nvidia-smi does not answer)"
    return answer.stdout.strip().partition("\n")[0] or "unknown"


def _transformer_engine() -> Iterator[Finding]:
    if importlib.util.find_spec("transformer_engine") is None:
        yield note(
            "kernels",
            "Transformer Engine is not installed; Megatron's local layers are used, which are slower "
            "(pip install --no-build-isolation 'megatron-profit[gpu]')",
        )
        return
    _, failure = _run_python("import transformer_engine.pytorch")
    if failure is not None:
        yield fault(
            "kernels", f"Transformer Engine cannot be imported: {failure}; install it again"
        )
        return
    flash = _version("flash-attn") or _version("flash-attn-3")
    engine = f"Transformer Engine, flash-attn {flash or 'is not installed (cuDNN then)'}"
    printed, failure = _run_python(_ATTEND)
    if failure is not None:
        yield warning("kernels", f"{engine}; attention on a row of two records fails: {failure}")
    elif printed.split()[-1:] == ["unfused"]:
        yield warning(
            "kernels",
            f"{engine}; no kernel keeps the records of a row apart, so packed rows compute all scores, which "
            "is slow; install flash-attn or a newer cuDNN (NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 prints why)",
        )
    else:
        yield ok("kernels", f"{engine}; a kernel keeps the records of a row apart")


def check_memory() -> Iterator[Finding]:
    """Yield the machine's memory, and its shared memory."""
    machine = this_machine(look_for_gpus=False)
    yield ok("memory", f"{machine.memory:.0f} GiB available, {machine.cores} CPU cores")
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        text = f"/dev/shm has {size / GIB:.2g} GiB"
        if size < _SHARED_MEMORY:
            yield warning(
                "memory", f"{text}; NCCL and data loaders need 1 GiB (docker run --shm-size=8g)"
            )
        else:
            yield ok("memory", text)


def check_disk(
    folder: Path, needed: Mapping[str, int], nodes: int, flag: str = "--run"
) -> Iterator[Finding]:
    """Yield space, speed and kind of the disk of a run's folder.

    Args:
        folder: The folder; it need not exist.
        needed: Bytes of the parts of a run, for example of its checkpoints.
        nodes: Nodes of the run.
        flag: The flag that names the folder.
    """
    place = nearest_existing(folder.absolute())
    if not os.access(place, os.W_OK | os.X_OK):
        yield fault("disk", f"{place} cannot be written to; name another folder with {flag}")
        return
    yield _space(place, needed, flag)
    kind = file_system(place)
    if kind in _SHARED_SYSTEMS:
        yield ok("disk", f"{place} is on {kind}, which machines can share")
    elif nodes > 1:
        yield fault(
            "disk",
            f"{place} is on {kind}, a disk of this machine, and {nodes} nodes need one folder; name one on "
            f"a shared file system with {flag}",
        )
    else:
        yield note("disk", f"{place} is on {kind}, a disk of this machine: fine for one node")
    yield _speed(place)


def _space(place: Path, needed: Mapping[str, int], flag: str) -> Finding:
    free, total = shutil.disk_usage(place).free, sum(needed.values())
    parts = ", ".join(f"{name} {size / GIB:.2g} GiB" for name, size in needed.items())
    if total > free:
        return fault(
            "disk",
            f"{place} has {free / GIB:.2g} GiB left, and the run needs {total / GIB:.2g} GiB ({parts}); "
            f"free some, or name another folder with {flag}",
        )
    of = f"; the run needs about {total / GIB:.2g} GiB ({parts})" if parts else ""
    return ok("disk", f"{place} has {free / GIB:.4g} GiB left{of}")


def file_system(place: Path) -> str:
    """Return the kind of the file system that holds a folder, as /proc/mounts names it."""
    best, kind = Path(), "an unknown file system"
    for line in Path("/proc/mounts").read_text(errors="replace").splitlines():
        mounted, name = line.split()[1:3]
        mount = Path(mounted.replace("\\040", " "))
        if place.resolve().is_relative_to(mount) and len(mount.parts) >= len(best.parts):
            best, kind = mount, name
    return kind


def _speed(place: Path) -> Finding:
    """Write a file and flush it to the disk."""
    probe = place / f".megatron_profit_probe_{os.getpid()}"
    begun = time.monotonic()
    try:
        with probe.open("wb", buffering=0) as stream:
            for _ in range(_PROBE_BYTES // len(_BLOCK)):
                if stream.write(_BLOCK) < len(_BLOCK):
                    raise OSError("the disk takes no more")
            os.fsync(stream.fileno())
    except OSError as error:
        return fault(
            "disk", f"{place} cannot be written ({error.strerror or error}); free some space"
        )
    finally:
        probe.unlink(missing_ok=True)
    speed = _PROBE_BYTES / max(time.monotonic() - begun, 1e-6)
    if speed < _SLOW_DISK:
        return warning(
            "disk", f"{place} writes {speed / 1e6:.0f} MB/s; checkpoints take long, so save seldom"
        )
    return ok("disk", f"{place} writes {speed / 1e6:,.0f} MB/s")
