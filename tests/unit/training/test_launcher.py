"""What torchrun has told its ranks."""

from __future__ import annotations

import pytest

from megatron_profit.flags import ArgumentsError
from megatron_profit.training.arguments.platform import check_restarts
from megatron_profit.training.process.launcher import job_id

TWO_NODES = {
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_MAX_RESTARTS": "3",
    "LOCAL_WORLD_SIZE": "8",
    "WORLD_SIZE": "16",
}


@pytest.fixture
def torchrun(monkeypatch):
    """Set the variables of a rank."""

    def set_variables(variables):
        for name in (*TWO_NODES, "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


def test_restarts_on_several_nodes_need_a_store_of_their_own(torchrun):
    torchrun(TWO_NODES)
    with pytest.raises(ArgumentsError, match=r"restarts 3 .* TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        check_restarts()


@pytest.mark.parametrize(
    "change",
    [
        {"TORCHELASTIC_USE_AGENT_STORE": "False"},
        {"TORCHELASTIC_MAX_RESTARTS": "0"},
        {"LOCAL_WORLD_SIZE": "16"},
    ],
)
def test_other_starts_are_right(torchrun, change):
    torchrun({**TWO_NODES, **change})
    check_restarts()
    torchrun({})
    check_restarts()


def test_an_id_that_torchrun_gives_to_all_jobs_is_none(torchrun):
    for given, expected in (("4711", "4711"), ("none", None), ("", None)):
        torchrun({"TORCHELASTIC_RUN_ID": given})
        assert job_id() == expected
    torchrun({})
    assert job_id() is None
