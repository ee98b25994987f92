"""Two nodes on one machine: a command runs in two network namespaces that are linked.

    sudo python tools/pretend_nodes.py env GPUS_PER_NODE=1 MODEL=runs/tiny DATA=chats.jsonl RUN=runs/two \
        examples/multi_node.sh --device cpu

Each node has an address of its own and nothing else, as two machines have: what works here does not
secretly use the loopback interface. It shows that a launch script, torchrun's rendezvous and a restart work
before a cluster is there; a test loses a node with it. Needs Linux, root and `ip` (package iproute2). The
namespaces are removed at the end, and hold no addresses but their own.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

# Of the range reserved for documentation: no machine has them.
_ADDRESSES = ("192.0.2.1", "192.0.2.2")
_INTERFACE = "profit0"
PORT = 29400


@dataclass(frozen=True)
class Node:
    """One of the two.

    Attributes:
        namespace: Its name for `ip netns`.
        address: Its address.
        is_host: Whether the rendezvous lives here.
    """

    namespace: str
    address: str
    is_host: bool

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        **options: object,
    ) -> subprocess.Popen:
        """Start a command on this node, with what torchrun and gloo have to know of it.

        Args:
            command: A program and its arguments.
            environment: Variables beside, or in place of, those of this process.
            **options: Of subprocess.Popen.
        """
        known = {
            "GLOO_SOCKET_IFNAME": _INTERFACE,
            "RDZV_ENDPOINT": f"{_ADDRESSES[0]}:{PORT}",
            # Both nodes have this machine's name: torchrun is told what it would read from it.
            "PET_LOCAL_ADDR": self.address,
            "PET_RDZV_CONF": f"is_host={self.is_host},join_timeout=300",
        }
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *command],
            env={**os.environ, **known, **(environment or {})},
            **options,
        )

    def processes(self) -> list[int]:
        """The ids of all processes of the node."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True
        )
        return [int(pid) for pid in listed.stdout.split()]

    def lose(self) -> None:
        """What a power cut does: every process of the node ends at once."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def why_not() -> str | None:
    """The reason why this machine cannot have pretend nodes, if there is one."""
    if shutil.which("ip") is None:
        return "`ip` is missing (package iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    trial = f"profit-trial-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", trial], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespace can be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", trial], check=True)
    return None


@contextmanager
def pretend_nodes() -> Iterator[tuple[Node, Node]]:
    """Two nodes, of which the first has the rendezvous; removed with all their processes at the end."""
    names = [f"profit-{os.getpid()}-{letter}" for letter in "ab"]
    nodes = [
        Node(name, address, is_host=i == 0)
        for i, (name, address) in enumerate(zip(names, _ADDRESSES, strict=True))
    ]
    made: list[Node] = []
    try:
        for node in nodes:
            _ip("netns", "add", node.namespace)
            made.append(node)
        peer = ("peer", "name", _INTERFACE, "netns", names[1])
        _ip("link", "add", _INTERFACE, "netns", names[0], "type", "veth", *peer)
        for node in nodes:
            inside = ("-n", node.namespace)
            _ip(*inside, "address", "add", f"{node.address}/24", "dev", _INTERFACE)
            for interface in (_INTERFACE, "lo"):
                _ip(*inside, "link", "set", interface, "up")
        yield nodes[0], nodes[1]
    finally:
        for node in made:
            node.lose()
            _ip("netns", "delete", node.namespace)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def main(command: Sequence[str]) -> int:
    """Run a command on both nodes; the larger of the exit codes."""
    if not command or command[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if command else 2
    reason = why_not()
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    with pretend_nodes() as nodes:
        running = [node.start(command) for node in nodes]
        try:
            return max(process.wait() for process in running)
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
