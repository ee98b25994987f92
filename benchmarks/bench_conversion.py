"""Measure conversion both ways against `cp` of the same files: time, bytes a second, CPU time, peak memory.

    python benchmarks/bench_conversion.py --sizes 0.6B 4B --scratch FOLDER

It makes models of published Qwen3 shapes with random weights. Each command runs in a process of its
own. Before it, the outputs of earlier commands are removed, and its input is brought into the page
cache as far as it fits. Each way is compared with `cp` of the folder that it reads. The disk needs
twice the size of the model. It writes benchmarks/results/<date>-conversion.json and .md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from benchmarking import RESULTS, environment, markdown_table, write_results

from checkpoint_conversion.engine.dtypes import BF16
from checkpoint_conversion.families import family_for
from checkpoint_conversion.hf.model import expected_shapes
from checkpoint_conversion.hf.writer import HFWriter, TensorSpec, parse_size, split_by_size
from checkpoint_conversion.torch_dist.writer import RELEASE
from megatron_profit.estimates.published import published_config

NAME = "conversion"
# config.json of each size.
SIZES = {size: published_config(f"Qwen3-{size}") for size in ("0.6B", "1.7B", "4B", "8B", "14B")}


@dataclass(frozen=True)
class Run:
    """The cost of one command.

    Attributes:
        seconds: Wall time, from the start of the process to its end.
        cpu: User and system seconds of all its threads.
        peak: Largest resident set in bytes, as last read while it ran.
    """

    seconds: float
    cpu: float
    peak: int


def measured(command: list[str]) -> Run:
    """Run a command to its end."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=messages)
        sampler = _PeakSampler(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        peak = sampler.finish()
        messages.seek(0)
        if status:
            raise SystemExit(f"{' '.join(command)}: {messages.read().decode()}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, peak)


class _PeakSampler(threading.Thread):
    """Reader of the high-water mark of a process's resident memory, until the process ends.

    wait4 would give another mark, which begins with the memory of the process that started it.
    """

    def __init__(self, pid: int) -> None:
        super().__init__()
        self._status = Path(f"/proc/{pid}/status")
        self._peak, self._ended = 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._ended.wait(0.02):
            try:
                lines = self._status.read_text().splitlines()
            except OSError:
                return
            marks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
            self._peak = max([self._peak, *marks])

    def finish(self) -> int:
        """Return the mark in bytes."""
        self._ended.set()
        self.join()
        return self._peak * 1024


def make_model(folder: Path, size: str) -> int:
    """Make a bf16 model of random weights; return the bytes of its tensors."""
    config = {**SIZES[size], "torch_dtype": "bfloat16"}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shapes = expected_shapes(family_for(config).tensor_rules(config))
    tensors = {name: TensorSpec(shape, BF16) for name, shape in shapes.items()}
    random = np.random.default_rng(0)
    block = (random.integers(0, 2**16, 1 << 22, dtype=np.uint16) & 0xBFFF).tobytes()
    with HFWriter(folder, tensors, split_by_size(tensors, parse_size("4GB"))) as writer:
        for name, tensor in tensors.items():
            row = tensor.nbytes // tensor.shape[0]
            step = max(1, len(block) // row)
            for start in range(0, tensor.shape[0], step):
                rows = min(step, tensor.shape[0] - start)
                writer.write_at(name, start * row, memoryview(block)[: rows * row])
        writer.flush()
    return sum(tensor.nbytes for tensor in tensors.values())


def warm(folder: Path) -> None:
    """Bring the files of a folder into the page cache."""
    buffer = bytearray(8 << 20)
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass


def bench(scratch: Path, size: str, repeats: int) -> dict:
    """Measure everything for one size, each way together with `cp` of the folder that it reads.

    The disk holds two copies of the model at a time: its weights are deleted before the way back.
    """
    hf, megatron, back = (scratch / name for name in ("hf", "megatron", "back"))
    shutil.rmtree(scratch, ignore_errors=True)
    nbytes = make_model(hf, size)
    weights = digests(hf)
    python = [sys.executable, "-m"]
    there = [*python, "checkpoint_conversion.hf_to_megatron"]
    runs = measured_beside_cp(
        "hf_to_megatron", [*there, "--hf", str(hf), "--out", str(megatron)], hf, megatron, repeats
    )
    assert (megatron / RELEASE / ".metadata").exists()
    for name in weights:
        (hf / name).unlink()
    return_trip = [*python, "checkpoint_conversion.megatron_to_hf", "--megatron", str(megatron)]
    runs |= measured_beside_cp(
        "megatron_to_hf",
        [*return_trip, "--hf-template", str(hf), "--out", str(back)],
        megatron,
        back,
        repeats,
    )
    if digests(back) != weights:
        raise SystemExit(f"{size}: the round trip changed the weights")
    shutil.rmtree(scratch)
    return {
        "size": size,
        "bytes": nbytes,
        "repeats": repeats,
        "runs": {name: [asdict(run) for run in done] for name, done in runs.items()},
    }


def measured_beside_cp(
    name: str, command: list[str], source: Path, out: Path, repeats: int
) -> dict[str, list[Run]]:
    """Measure in turn a conversion of a folder, `cp` of the same folder, and `cp` with sync."""
    copy = out.with_name("copy")
    commands = {
        f"cp before {name}": ["cp", "-r", str(source), str(copy)],
        f"cp and sync before {name}": [
            *("sh", "-c", f"cp -r {source} {copy} && find {copy} -type f -exec sync {{}} +"),
        ],
        name: command,
    }
    runs: dict[str, list[Run]] = {each: [] for each in commands}
    for _ in range(repeats):
        for each, arguments in commands.items():
            for other in (out, copy):
                shutil.rmtree(other, ignore_errors=True)
            os.sync()
            warm(source)
            runs[each].append(measured(arguments))
            print(f"{source.parent.name} {each}: {runs[each][-1].seconds:.2f} s", file=sys.stderr)
    return runs


def digests(folder: Path) -> dict[str, str]:
    """Return a digest of each file of weights."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            found[file.name] = hashlib.file_digest(stream, "blake2b").hexdigest()
    return found


def start_time() -> float:
    """Return the seconds that the interpreter needs to import the converter."""
    command = [sys.executable, "-c", "import checkpoint_conversion.hf_to_megatron"]
    return statistics.median(measured(command).seconds for _ in range(5))


def rows(results: list[dict], start: float) -> list[list[str]]:
    """Return the lines of the table: medians.

    Args:
        start: Seconds until the interpreter has imported a converter.
    """
    return [_row(name, result, start) for result in results for name in result["runs"]]


def _row(name: str, result: dict, start: float) -> list[str]:
    runs, size = result["runs"], result["bytes"] / 1e9
    conversion = name.rpartition(" ")[2]
    base = statistics.median(run["seconds"] for run in runs[f"cp before {conversion}"])
    own_start = start if name == conversion else 0
    seconds, cpu, peak = (
        statistics.median(run[key] for run in runs[name]) for key in ("seconds", "cpu", "peak")
    )
    fastest, slowest = (f([run["seconds"] for run in runs[name]]) for f in (min, max))
    return [
        *(f"{result['size']}, {size:.2f} GB: {name}", str(len(runs[name]))),
        *(f"{seconds:.2f} ({fastest:.2f}-{slowest:.2f})", f"{size / seconds:.2f}"),
        f"{seconds / base:.2f}",
        *(f"{(seconds - own_start) / base:.2f}", f"{cpu:.2f}", f"{peak / 1e6:.0f}"),
    ]


def main() -> None:
    """Measure all sizes that are asked for, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.6B", "4B"])
    parser.add_argument("--scratch", type=Path, required=True, help="folder to work in; is removed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    start = start_time()
    results = [bench(options.scratch / size, size, options.repeats) for size in options.sizes]
    facts = environment(torch.device("cpu"), ("numpy", "safetensors"))
    file = options.out / f"{facts['date']}-{NAME}.json"
    if file.exists():  # other sizes, measured on the same day
        earlier = json.loads(file.read_text())["results"]
        results += [result for result in earlier if result["size"] not in options.sizes]
    results.sort(key=lambda result: result["bytes"])
    header = ("command", "runs", "seconds", "GB/s", "x cp", "x cp after start", "CPU s", "peak MB")
    body = (
        "bf16, random weights, what is read in the page cache as far as it fits, medians. Conversions end "
        f"with fsync, `cp` alone does not. The interpreter's start and the imports ({start:.2f} s) are part "
        "of a conversion's seconds, and left out under `x cp after start`.\n\n"
        f"{markdown_table(header, rows(results, start))}"
    )
    record = {
        "environment": facts,
        "command": "python benchmarks/bench_conversion.py --scratch FOLDER --sizes "
        + " ".join(result["size"] for result in results),
        "start": start,
        "results": results,
    }
    page = write_results(options.out, NAME, record, "Conversion beside cp", body)
    print(page.read_text())


if __name__ == "__main__":
    main()
