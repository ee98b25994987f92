"""Two agents of torchrun with addresses of their own, one of which is lost: the run goes on as if nothing
was."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pretend_nodes
import pytest
from make_tiny_model import TinyShape, make_tiny_model

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY / "examples" / "data"
STEPS, BATCH, INTERVAL = 12, 8, 3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(pretend_nodes.why_not() is not None, reason=str(pretend_nodes.why_not())),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """What the launch script is told of a tiny run, but not where it is kept."""
    folder = tmp_path_factory.mktemp("run")
    shape = TinyShape(hidden_size=32, intermediate_size=64, head_dim=16)
    model = make_tiny_model(folder / "tiny", sorted(DATA.glob("*.jsonl")), shape)
    records = (DATA / "arithmetic_base.jsonl").read_text().splitlines()[: STEPS * BATCH]
    (folder / "chats.jsonl").write_text("\n".join(records))
    return {
        "MODEL": str(model),
        "DATA": str(folder / "chats.jsonl"),
        "SEQ_LENGTH": "48",
        "GLOBAL_BATCH": str(BATCH),
        "TRAIN_ITERS": str(STEPS),
        "SAVE_INTERVAL": str(INTERVAL),
        "TAU": "0.001",
        "GPUS_PER_NODE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "LAYOUT": "--tensor-model-parallel-size 1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


@pytest.fixture(scope="module")
def uninterrupted(environment, tmp_path_factory) -> dict[int, str]:
    """The objective of each step, as one agent with two processes logs it."""
    with pretend_nodes.pretend_nodes() as (node, _):
        one = {**environment, "NNODES": "1", "GPUS_PER_NODE": "2"}
        agents = Agents(one, tmp_path_factory.mktemp("uninterrupted"))
        assert agents.start(node).wait(timeout=600) == 0, agents.log()[-8000:]
    return dict(steps(agents.log()))


def steps(log: str) -> list[tuple[int, str]]:
    """Number and objective of each step that was logged."""
    found = re.findall(r"iteration +(\d+)/ .*?\| objective: (\S+) ", log)
    return [(int(step), value) for step, value in found]


class Agents:
    """The launch script on pretend nodes, with their logs."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self._environment, self._folder = environment, folder
        self._started = 0

    def start(self, node: pretend_nodes.Node) -> subprocess.Popen:
        self._started += 1
        with (self._folder / f"log.{self._started}").open("w") as log:
            return node.start(
                ["examples/multi_node.sh", "--device", "cpu"],
                {**self._environment, "RUN": str(self._folder / "run")},
                cwd=REPOSITORY,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self._folder.glob("log.*")))

    def wait_for_step(self, step: int, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not any(found == step for found, _ in steps(self.log())):
            assert time.monotonic() < end, f"no step {step}:\n{self.log()[-8000:]}"
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("nodes_wanted", "comes_back"), [("2", True), ("1:2", False)], ids=["returns", "stays away"]
)
def test_a_lost_node_loses_nothing_but_the_steps_since_the_checkpoint(
    environment, uninterrupted, tmp_path, nodes_wanted, comes_back
):
    assert sorted(uninterrupted) == list(range(1, STEPS + 1))
    with pretend_nodes.pretend_nodes() as (first, second):
        agents = Agents({**environment, "NNODES": nodes_wanted}, tmp_path)
        running = [agents.start(first), agents.start(second)]
        agents.wait_for_step(INTERVAL + 1)
        second.lose()
        assert running.pop().wait(timeout=60) != 0
        if comes_back:
            running.append(agents.start(second))
        for process in running:
            assert process.wait(timeout=600) == 0, agents.log()[-8000:]
    logged = steps(agents.log())
    assert {step for step, _ in logged} == set(uninterrupted)
    assert re.search(rf"loaded checkpoint .* at iteration {INTERVAL}\b", agents.log())
    for step, objective in logged:
        if comes_back:  # the same layout: the same numbers, those of repeated steps included
            assert objective == uninterrupted[step], step
        else:
            assert float(objective) == pytest.approx(float(uninterrupted[step]), rel=1e-2), step
    assert (tmp_path / "run" / "hf" / "config.json").is_file()


def sft_on(node: pretend_nodes.Node, environment: dict[str, str], folder: Path, *flags: str):
    """Start the two-flag command on a node; its output goes to a file named after the node's address."""
    known = {name: environment[name] for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
    with (folder / f"{node.address}.log").open("w") as log:
        return node.start(
            [
                *(sys.executable, "-m", "megatron_profit", "sft", "--model", environment["MODEL"]),
                *(
                    "--data",
                    environment["DATA"],
                    "--run",
                    str(folder / "run"),
                    "--train-iters",
                    "2",
                ),
                *("--nnodes", "2", "--rdzv-endpoint", f"192.0.2.1:{pretend_nodes.PORT}", *flags),
            ],
            {**known, "PYTHONPATH": str(REPOSITORY)},
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def test_the_two_flag_command_runs_on_two_nodes(environment, tmp_path):
    with pretend_nodes.pretend_nodes() as nodes:
        running = [sft_on(node, environment, tmp_path) for node in nodes]
        codes = [process.wait(timeout=600) for process in running]
        first, second = ((tmp_path / f"{node.address}.log").read_text() for node in nodes)
    assert codes == [0, 0], first + second
    assert "1 CPU process (there is no GPU)" in first
    assert len(re.findall(r"^step \d/2 ", first + second, flags=re.MULTILINE)) == 2
    assert (tmp_path / "run" / "hf" / "config.json").is_file()


def test_a_node_with_another_flag_is_named(environment, tmp_path):
    with pretend_nodes.pretend_nodes() as nodes:
        sft_on(nodes[0], environment, tmp_path)
        other = sft_on(nodes[1], environment, tmp_path, "--lr", "2e-5")
        assert other.wait(timeout=600) == 2
        log = (tmp_path / f"{nodes[1].address}.log").read_text()
    assert "--lr is 2e-05 on this node and 1e-05 on the first one" in log
