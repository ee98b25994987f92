"""Prove on one GPU what the tests prove on a CPU, and measure it: at most 8 minutes on an H100 or H200.

    python tools/gpu_proof.py
    python tools/gpu_proof.py --only operation run      # some of the steps
    python tools/gpu_proof.py --device cpu              # the same steps, small

The steps come in the order of their worth, each within a time limit. The results are written after each
one to benchmarks/results, so a run that is cut off leaves the steps before. The exit code is 1 if a step
failed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / "benchmarks"))

import proof
import torch
from proof_steps import Proof, prepare, touch_gpu

RESULTS = REPOSITORY / "benchmarks" / "results"
STEPS = ("environment", "operation", "run", "step", "kernel", "delta-net", "lora")


def start_children(device: str, scratch: Path, deadline: float) -> tuple[proof.Children, str]:
    """Return the starter of processes, forks if they can use the device, and the device's name."""
    prepare(device)
    logs = scratch / "logs"
    forks = proof.Children(device, prepare, logs, "fork", deadline)
    if device == "cpu":
        return forks, "cpu"
    try:
        return forks, forks.run("trial", 30, touch_gpu)
    except proof.StepFailure:
        fresh = proof.Children(device, prepare, logs, "spawn", deadline)
        return fresh, fresh.run("trial", 120, touch_gpu)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP", default=list(STEPS))
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="all of it ends after them (default 8)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results files")
    parser.add_argument("--scratch", type=Path, help="folder of models and logs, which stays")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu runs the same steps small")
    return options


def main(argv: Sequence[str]) -> int:
    """Run the steps, print the page's path, and return 1 if one failed."""
    begin = time.monotonic()
    # This process must see whether there is a GPU without touching it, or its forks could not use it.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    options = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.scratch or Path(temporary)
        deadline = begin + 60 * options.minutes
        children, card = start_children(options.device, scratch, deadline)
        name = "-".join(["gpu-proof", *card.lower().replace("nvidia ", "").split()])
        command = shlex.join(["python", "tools/gpu_proof.py", *argv])
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "hardware": card,
            "processes": children.start_method,
            "seconds of imports": round(time.monotonic() - begin, 1),
        }

        def write(results: Sequence[proof.Result]) -> None:
            page = proof.write_page(options.out, name, results, about, command)
            if len(results) == 1:
                print(f"> results: {page}", flush=True)

        steps = [step for step in Proof(children, scratch).steps() if step.name in options.only]
        results = proof.prove(steps, deadline, write)
    failed = [result.name for result in results if result.verdict == "failed"]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
