r"""Run a command on two pretend nodes of one machine: two network namespaces that are linked.

    sudo python tools/pretend_nodes.py env GPUS_PER_NODE=1 MODEL=runs/tiny DATA=chats.jsonl RUN=runs/two \
        examples/multi_node.sh --device cpu

Each node has only an address of its own, like a separate machine. A command that works here does not
secretly use the loopback interface. So a launch script, torchrun's rendezvous and a restart can be
tried before a cluster is there. A test loses a node with it. It needs Linux, root and `ip` (package
iproute2). The namespaces are removed at the end, and hold no addresses but their own.
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
from typing import Any

# From the range reserved for documentation, which no machine has.
_ADDRESSES = ("192.0.2.1", "192.0.2.2")
_INTERFACE = "profit0"
PORT = 29400


@dataclass(frozen=True)
class Node:
    """One of the two nodes.

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
        **options: Any,
    ) -> subprocess.Popen:
        """Start a command on this node, with the node's settings for torchrun and gloo.

        Args:
            command: A program and its arguments.
            environment: Variables besides, or in place of, this process's variables.
            **options: Of subprocess.Popen.
        """
        known = {
            "GLOO_SOCKET_IFNAME": _INTERFACE,
            "RDZV_ENDPOINT": f"{_ADDRESSES[0]}:{PORT}",
            # Both nodes have this machine's name, so torchrun gets the address that it would derive
            # from it.
            "PET_LOCAL_ADDR": self.address,
            "PET_RDZV_CONF": f"is_host={self.is_host},join_timeout=300",
        }
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *command],
            env={**os.environ, **known, **(environment or {})},
            **options,
        )

    def processes(self) -> list[int]:
        """Return the ids of all processes of the node."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True
        )
        return [int(pid) for pid in listed.stdout.split()]

    def lose(self) -> None:
        """End every process of the node at once, as a power cut does."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def why_not() -> str | None:
    """Return the reason why this machine cannot have pretend nodes; None if it can."""
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
    """Yield two nodes; the first has the rendezvous. They are removed at the end with all their processes."""
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
    """Run a command on both nodes; return the larger of the exit codes."""
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
