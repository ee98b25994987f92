"""`megatron-profit slurm --nodes 2 --partition P -- sft …`: a job that starts the same command on each node.

    megatron-profit slurm --nodes 2 --partition gpu -- sft --model Qwen/Qwen3-32B --data chats.jsonl

It writes the job's script and submits it; `--dry-run` prints it. Before the time limit Slurm signals the job:
the run writes a checkpoint, and the job queues again. The model, the data and the run's folder must be in
places that all nodes see. With --container the command runs in an image (pyxis), which sees these places too.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from checkpoint_conversion.engine.output import write_file
from checkpoint_conversion.errors import ConversionError, printable
from checkpoint_conversion.hf.folder import read_hf_config
from checkpoint_conversion.progress import duration
from megatron_profit.estimates.published import PUBLISHED, published_config
from megatron_profit.estimates.run_shape import ShapeError, model_arguments
from megatron_profit.estimates.saving import seconds_to_end
from megatron_profit.flags import flag_of
from megatron_profit.launch.hub import is_hub_name
from megatron_profit.launch.processes import exports
from megatron_profit.launch.run_folder import RunFolder, folder_of, short_name
from megatron_profit.recipe.errors import LaunchError, LaunchParser
from megatron_profit.recipe.request import Request, read_request

_TIME = re.compile(r"\d+(-\d+(:\d+(:\d+)?)?)?|\d+:\d+(:\d+)?")
# Slurm signals the job this many seconds before the ones that its processes get to end.
_BEFORE_THE_END = 300
# Cores of a GPU's process: its own threads, the optimizer's and the data's.
_CPUS_PER_GPU = 8
# Variables that name the hub's cache where it is not in HF_HOME.
_HUB_CACHES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
# Signs that would end a value in pyxis's list of mounts.
_NOT_MOUNTED = re.compile(r"[,:\s]")
# A node that has ended must not take the others with it while they write their parts of a checkpoint. Slurm
# signals the script alone (B:), so that it knows of the limit and hands the signal to the job's steps.
# Flags that a job cannot repeat, with the remedy.
_ONCE = {
    "overwrite": "remove the old run's folder yourself, or give another --run",
    "ckpt_step": "begin a new run from that checkpoint with --pretrained-checkpoint and another --run",
}
_SCRIPT = """\
#!/usr/bin/env bash
# Written by `megatron-profit slurm`. Submit it with: sbatch {file}
{directives}
set -euo pipefail
cd {folder}

{exports}
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it from the job by itself

# torchrun puts rank 0 on the node whose name sorts first as text; the rendezvous must live as long as rank 0.
read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST" | LC_ALL=C sort)
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
    add = parser.add_argument
    add("--nodes", type=int, required=True, metavar="N", help="nodes of the job")
    add("--partition", metavar="P", help="Slurm's partition")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a node (default 8)")
    add(
        "--cpus-per-task",
        type=int,
        metavar="N",
        help=f"cores of a node for the job (default {_CPUS_PER_GPU} for each GPU)",
    )
    add("--time", default="08:00:00", metavar="TIME", help="time limit of a job (default 08:00:00)")
    add("--account", metavar="NAME", help="Slurm's account")
    add(
        "--container",
        metavar="IMAGE",
        help="image with this project, in which the command runs (pyxis), for example profit.sqsh",
    )
    add(
        "--mount",
        action="append",
        default=[],
        metavar="DIR",
        help="a further folder that the container sees, under its own name; may be given again. The folders "
        "of model, data and run are mounted in any case",
    )
    add(
        "--max-restarts",
        type=int,
        default=3,
        metavar="N",
        help="restarts from the newest checkpoint after a process or node was lost (default 3)",
    )
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="a further option of sbatch, for example --sbatch=--qos=high; may be given again",
    )
    add("--dry-run", action="store_true", help="print the script; write and submit nothing")
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
    options, flags = read_words(words)
    file, text = job(options, flags, Path.cwd())
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


def read_words(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return this command's options, and the flags of `megatron-profit sft` after the two dashes.

    Raises:
        LaunchError: An option cannot be used, or the command of the nodes is missing.
    """
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
    return options, after[1:]


def _check(options: argparse.Namespace) -> None:
    if options.cpus_per_task is None:
        options.cpus_per_task = _CPUS_PER_GPU * options.gpus_per_node
    limits = {"nodes": 1, "gpus_per_node": 1, "cpus_per_task": 1, "max_restarts": 0}
    for name, least in limits.items():
        if getattr(options, name) < least:
            raise LaunchError(
                f"{flag_of(name)} is {getattr(options, name)}; it must be at least {least}"
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
    if options.mount and options.container is None:
        raise LaunchError("--mount is about --container, which is missing")


def job(options: argparse.Namespace, flags: Sequence[str], folder: Path) -> tuple[Path, str]:
    """Return the file and the text of a job's script.

    Args:
        options: This command's options.
        flags: The flags of `megatron-profit sft`, which are read and checked.
        folder: The folder that the job runs in.

    Raises:
        LaunchError: A flag cannot be used.
    """
    meeting = ("--rdzv-endpoint", "node:1", "--rdzv-id", "job")
    nodes = [str(options.nodes), *(meeting if options.nodes > 1 else ())]
    for flag in ("--nnodes", "--rdzv-endpoint", "--rdzv-id", "--max-restarts"):
        if any(word.partition("=")[0] == flag for word in flags):
            raise LaunchError(f"{flag} follows from the job; drop it")
    request = read_request([*flags, "--nnodes", *nodes])
    if request.front.dry_run:
        raise LaunchError(
            "--dry-run after the two dashes would make a job that trains nothing; write it before them"
        )
    for name, remedy in _ONCE.items():
        if name in request.given:
            raise LaunchError(
                f"{flag_of(name)} would act again each time that the job is started again; {remedy}"
            )
    run = folder_of(request)
    has_own = "--save" not in request.front.without
    if has_own and "--load" in request.front.without:
        raise LaunchError(
            "--without=--load: the job has checkpoints of its own when it is started again, and could not go "
            "on with them; drop it"
        )
    if has_own and "load" in request.given and not run.loads_own(request):
        load = request.value("load")
        raise LaunchError(
            f"--load {load} would be refused when the job is started again, because the run then has "
            f"checkpoints of its own; start from there with --pretrained-checkpoint {load}, and from "
            "adapters with --lora-adapter and a PEFT folder of them"
        )
    if not str(run.path).isprintable():
        raise LaunchError(f"--run is {str(run.path)!r}; a job's script cannot name such a folder")
    file = run.path / "job.sbatch"
    checkpoint = _checkpoint_bytes(request)
    python, container, setup = [sys.executable], list[str](), exports(checkpoint)
    if options.container is not None:
        # A hook of enroot sets RANK in images with PyTorch, as if Slurm had started each process of the run.
        python = ["env", "--unset=RANK", "python"]
        container = _container(options, request, run, folder)
        setup += f"\n{_homes(request, run, folder)}"
    own = ["--rank-logs", "--max-restarts", str(options.max_restarts)]
    command = [*container, shlex.join([*python, "-m", "megatron_profit", "sft", *flags, *own])]
    text = _SCRIPT.format(
        file=shlex.quote(str(file)),
        directives="\n".join(_directives(options, run, _warning(options, checkpoint))),
        folder=shlex.quote(str(folder)),
        exports=setup,
        command=" \\\n    ".join(command),
    )
    return file, text


def _directives(options: argparse.Namespace, run: RunFolder, warning: int) -> Iterator[str]:
    values = {
        "--job-name": run.path.name,
        "--nodes": options.nodes,
        "--ntasks-per-node": 1,
        "--gpus-per-node": options.gpus_per_node,
        "--cpus-per-task": options.cpus_per_task,
        "--partition": options.partition,
        "--account": options.account,
        "--time": options.time,
        "--signal": f"B:USR1@{warning}",
        # Slurm replaces signs after a percent sign; two stand for one.
        "--output": f"{str(run.path).replace('%', '%%')}/job-%j.log",
        "--open-mode": "append",
    }
    for name, value in values.items():
        if value is not None:
            yield f"#SBATCH {name}={shlex.quote(str(value))}"  # sbatch reads quotes as a shell does
    yield from ("#SBATCH --exclusive", "#SBATCH --requeue")
    yield from (f"#SBATCH {option}" for option in options.sbatch)


def _warning(options: argparse.Namespace, checkpoint: int) -> int:
    """Return the seconds before the limit at which Slurm signals the job, at most half of its time.

    Raises:
        LaunchError: The last checkpoint would not fit.
    """
    to_end, limit = seconds_to_end(checkpoint), _seconds(options.time)
    warning = _BEFORE_THE_END + to_end
    if limit:  # Slurm has none for 0
        warning = min(warning, limit // 2)
    if warning < to_end:
        raise LaunchError(
            f"--time {options.time} is too short: the last checkpoint gets {duration(to_end)}, and the "
            f"training as long; give at least {duration(2 * to_end)}"
        )
    return warning


def _seconds(time: str) -> int:
    """Return the seconds of a time as Slurm writes it: 90 (minutes), 90:00, 1:30:00, 1-2, 1-2:30."""
    days, has_days, rest = time.rpartition("-")
    units = (3600, 60, 1) if has_days or rest.count(":") == 2 else (60, 1)
    clock = sum(int(part) * unit for part, unit in zip(rest.split(":"), units, strict=False))
    return 86400 * int(days or 0) + clock


def _checkpoint_bytes(request: Request) -> int:
    """Return the bytes of a checkpoint, by the model's folder or else by its name; 0 if neither is known.

    A login node may have no network, so none is asked.
    """
    from megatron_profit.launch.plan_layout import checkpoint_of

    folder = Path(request.model).expanduser()
    name = short_name(request.model).removesuffix("-Base").removesuffix("-Instruct")
    try:
        if folder.is_dir():
            config = read_hf_config(folder)
        elif name in PUBLISHED:
            config = published_config(name)
        else:
            return 0
        return checkpoint_of(request, model_arguments(config))
    except (ConversionError, ShapeError):  # the job itself will say so
        return 0


def _container(
    options: argparse.Namespace, request: Request, run: RunFolder, folder: Path
) -> list[str]:
    """Return pyxis's options for srun, quoted for the shell, with the folders that the command names."""
    named = [folder, run.path, *map(Path, options.mount), *_places(request)]
    places = sorted({Path(os.path.abspath(folder / place.expanduser())) for place in named})
    outer = [p for p in places if not any(p != o and p.is_relative_to(o) for o in places)]
    for place in outer:
        if _NOT_MOUNTED.search(str(place)) or place == Path("/"):
            raise LaunchError(
                f"the container cannot see {str(place)!r}: a mounted folder is not / and has neither comma, "
                "colon nor space in its name; put model, data and run into other folders"
            )
    mounts = ",".join(f"{place}:{place}" for place in outer)
    return [
        f"--container-image={shlex.quote(options.container)}",
        f"--container-mounts={shlex.quote(mounts)}",
        f"--container-workdir={shlex.quote(str(folder))}",
    ]


def _places(request: Request) -> Iterator[Path]:
    """Yield the folders outside of the run that a command line reads or writes."""
    if _from_hub(request):
        yield _hub_home()
        yield from map(Path, filter(None, map(os.environ.get, _HUB_CACHES)))
    if not is_hub_name(request.model, "model"):
        yield from _with_links(Path(request.model))
    yield from (Path(file).parent for file in request.front.config or ())
    texts = [text for flag in request.given.values() for text in flag.texts]
    if flags := request.given.get("eval_flags"):
        try:
            words = shlex.split(flags.value)
        except ValueError as error:
            raise LaunchError(f"--eval-flags {flags.value!r}: {error}") from error
        texts += [word.rpartition("=")[2] for word in words]
    for text in (*texts, *filter(None, [request.front.chat_template])):
        path = Path(text).expanduser()
        if path.is_absolute() or path.exists():
            yield from _with_links(path)


def _with_links(path: Path) -> Iterator[Path]:
    """Yield a folder, or a file's, and the folders to which links lead, as the ones of the hub's cache do."""
    path = path.expanduser()
    yield _folder(path)
    entries = path.iterdir() if path.is_dir() else [path]
    yield from {_folder(entry.resolve()) for entry in entries if entry.is_symlink()}


def _folder(path: Path) -> Path:
    """Return a folder itself, or the folder of a file."""
    return path if path.is_dir() else path.parent


def _homes(request: Request, run: RunFolder, folder: Path) -> str:
    """Return lines of shell that keep caches out of the container, which ends with the job."""
    caches = {"MEGATRON_PROFIT_CACHE": folder / run.path / "data-cache"}
    if _from_hub(request):
        caches["HF_HOME"] = folder / _hub_home()
    return "\n".join(f"export {name}={shlex.quote(str(p))}" for name, p in caches.items())


def _from_hub(request: Request) -> bool:
    """Return whether the model or a data set is one of the hub."""
    flags = [request.given[name] for name in ("data", "valid_data") if name in request.given]
    data = any(is_hub_name(text, "dataset") for flag in flags for text in flag.texts)
    return data or is_hub_name(request.model, "model")


def _hub_home() -> Path:
    usual = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(os.environ.get("HF_HOME", usual)).expanduser()
