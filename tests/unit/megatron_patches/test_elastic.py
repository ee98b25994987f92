"""What torchrun's restarts find in the store of its agent."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os
from megatron_profit.megatron_patches import activate
activate("cpu")
from torch.distributed import TCPStore, rendezvous

agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
os.environ |= {
    "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "RANK": "0",
    "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port),
}
first, again = (next(rendezvous("env://"))[0] for _ in range(2))
first.set("address", "of a rank")
assert again.get("address") == b"of a rank", "ranks of one attempt share the store"
for change in ({"TORCHELASTIC_RESTART_COUNT": "1"}, {"WORLD_SIZE": "3"}):
    os.environ |= change
    assert not next(rendezvous("env://"))[0].check(["address"]), change
"""


def test_a_new_attempt_does_not_see_what_the_dead_one_has_left():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], text=True, capture_output=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
