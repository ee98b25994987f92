"""`megatron-profit slurm --nodes 2 --partition P -- sft …`: a job that starts the same command on each node.

    megatron-profit slurm --nodes 2 --partition gpu -- sft --model Qwen/Qwen3-32B --data chats.jsonl

It writes the job's script and submits it; `--dry-run` prints it. Before the time limit Slurm signals the job:
the run writes a checkpoint, and the job queues again. The model, the data and the run's folder must be in
places that all nodes see.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpoint_conversion.engine.output import write_file
from checkpoint_conversion.errors import printable
from megatron_profit.launch.run_folder import folder_of
from megatron_profit.recipe.errors import LaunchError, LaunchParser
from megatron_profit.recipe.request import read_request

_TIME = re.compile(r"\d+(-\d+(:\d+(:\d+)?)?)?|\d+:\d+(:\d+)?")
# Seconds before the limit at which Slurm signals the job.
_WARNING_SECONDS = 600
# A node that has ended must not take the others with it while they write their parts of a checkpoint. Slurm
# signals the script alone (B:), so that it knows of the limit and hands the signal to the job's steps.
_SCRIPT = """\
#!/usr/bin/env bash
# Written by `megatron-profit slurm`. Submit it again with: sbatch {file}
{directives}
set -euo pipefail
cd {folder}

read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
out_of_time=false
trap 'out_of_time=true; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1

srun --kill-on-bad-exit=0 {command} \\
    --nnodes "$SLURM_JOB_NUM_NODES" --rdzv-id "$SLURM_JOB_ID" \\
    --rdzv-endpoint "$first_node:$((20000 + SLURM_JOB_ID % 10000))" &
status=0
wait $! || status=$?
if $out_of_time; then
    status=0
    wait $! || status=$? # the first wait ended with the signal; the checkpoint is being written
    if ((status)); then scontrol requeue "$SLURM_JOB_ID"; fi # else the last step had come
fi
exit "$status"
"""


def _parser() -> LaunchParser:
    parser = LaunchParser(
        prog="megatron-profit slurm",
        usage="megatron-profit slurm --nodes N [options] -- sft --model ID --data FILE [flags]",
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes of the job")
    parser.add_argument("--partition", metavar="P", help="Slurm's partition")
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a node (default 8)"
    )
    parser.add_argument(
        "--time", default="08:00:00", metavar="TIME", help="time limit of a job (default 08:00:00)"
    )
    parser.add_argument("--account", metavar="NAME", help="Slurm's account")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="a further option of sbatch, for example --sbatch=--qos=high; may be given again",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the script; write and submit nothing"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write and submit the job; return 2 for bad input, else sbatch's exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        return _submit(words)
    except (LaunchError, OSError) as error:
        print(f"megatron-profit slurm: error: {printable(error)}", file=sys.stderr)
        return 2


def _submit(words: Sequence[str]) -> int:
    before, after = list(words), []
    if "--" in before:
        at = before.index("--")
        before, after = before[:at], before[at + 1 :]
    options = _parser().parse_args(before)
    if after[:1] != ["sft"]:
        raise LaunchError(
            "the command of each node is missing; write it after two dashes, for example: megatron-profit "
            "slurm --nodes 2 -- sft --model Qwen/Qwen3-32B --data chats.jsonl"
        )
    _check(options)
    file, text = job(options, after[1:])
    if options.dry_run:
        print(text, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise LaunchError(
            "sbatch is not found here; run this on a login node of the cluster, or print the script with "
            "--dry-run"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, text.encode())
    print(f"> wrote {file}", flush=True)
    return subprocess.run(["sbatch", str(file)], check=False).returncode


def _check(options: argparse.Namespace) -> None:
    for name in ("nodes", "gpus_per_node"):
        if getattr(options, name) < 1:
            raise LaunchError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1"
            )
    if not _TIME.fullmatch(options.time):
        raise LaunchError(
            f"--time is {options.time!r}; write it as Slurm does, for example 08:00:00 or 2-12"
        )
    for name in ("partition", "account"):
        value = getattr(options, name)
        if value is not None and not re.fullmatch(r"[\w.,+-]+", value):
            raise LaunchError(f"--{name} is {value!r}; it must be a name of Slurm's")
    for option in options.sbatch:
        if not re.fullmatch(r"--?[\w-]+([= ][^\n]+)?", option):
            raise LaunchError(f"--sbatch is {option!r}; write --sbatch=--OPTION=VALUE")


def job(options: argparse.Namespace, flags: Sequence[str]) -> tuple[Path, str]:
    """Return the file and the text of a job's script.

    Args:
        options: This command's options.
        flags: The flags of `megatron-profit sft`, which are read and checked.

    Raises:
        LaunchError: A flag cannot be used.
    """
    nodes = [str(options.nodes), "--rdzv-endpoint", "node:1"] if options.nodes > 1 else ["1"]
    for flag in ("--nnodes", "--rdzv-endpoint", "--rdzv-id"):
        if any(word.partition("=")[0] == flag for word in flags):
            raise LaunchError(f"{flag} follows from the job; drop it")
    run = folder_of(read_request([*flags, "--nnodes", *nodes]))
    file = run.path / "job.sbatch"
    directives = {
        "--job-name": run.path.name,
        "--nodes": options.nodes,
        "--ntasks-per-node": 1,
        "--gpus-per-node": options.gpus_per_node,
        "--partition": options.partition,
        "--account": options.account,
        "--time": options.time,
        "--signal": f"B:USR1@{_WARNING_SECONDS}",
        "--output": run.path / "job-%j.log",
        "--open-mode": "append",
    }
    lines = [f"#SBATCH {name}={value}" for name, value in directives.items() if value is not None]
    lines += ["#SBATCH --exclusive", "#SBATCH --requeue"]
    lines += [f"#SBATCH {option}" for option in options.sbatch]
    command = [sys.executable, "-m", "megatron_profit", "sft", *flags]
    text = _SCRIPT.format(
        file=file,
        directives="\n".join(lines),
        folder=shlex.quote(str(Path.cwd())),
        command=shlex.join(command),
    )
    return file, text
