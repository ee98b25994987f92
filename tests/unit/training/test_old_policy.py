"""What an outer batch of PSFT cannot be formed with is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_profit.training.checkpoints.folder import CheckpointError
from megatron_profit.training.statistics import old_policy
from megatron_profit.training.statistics.old_policy import FILE_NAME, OldPolicy, check_old_policy
from megatron_profit.training.statistics.token_table import TokenTable


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"psft_steps_per_refresh": 1}, "exactly SFT; give 2 or more"),
        ({"psft_steps_per_refresh": 0}, "is 0; it must be at least 2"),
        (
            {"step_batch_size_schedule": "0:8 1K:16"},
            "--step-batch-size-schedule changes the global batch",
        ),
        ({"decrease_batch_size_if_needed": True}, "--decrease-batch-size-if-needed changes"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_old_policy({"psft_steps_per_refresh": 8, **settings})


def test_plain_flags_are_accepted():
    check_old_policy({"psft_steps_per_refresh": 2})


@pytest.fixture
def resumable(monkeypatch, tmp_path):
    """A run of one process, at iteration 2 of outer batches of 4 steps."""
    arguments = SimpleNamespace(global_batch_size=8, iteration=2, load=str(tmp_path))
    mpu = SimpleNamespace(
        get_tensor_model_parallel_rank=lambda: 0, is_pipeline_last_stage=lambda **_: True
    )
    monkeypatch.setattr(old_policy, "get_args", lambda: arguments)
    monkeypatch.setattr(old_policy, "get_checkpoint_name", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(old_policy, "mpu", mpu)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    table = TokenTable(torch.arange(5), {"old_log_prob": -torch.arange(5.0)})
    form = {"version": "1", "psft_steps_per_refresh": "4", "objective_warmup_steps": "0"}
    form |= {"global_batch_size": "8", "data": "digest", "until": "4"}
    old_policy._write(tmp_path / FILE_NAME, table, form)
    return tmp_path


def test_a_checkpoint_after_a_resume_holds_each_token_once(resumable, monkeypatch):
    """What was read holds the tokens of all ranks already: three of them would write it three times."""
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 3)
    monkeypatch.setattr(old_policy, "data_group", lambda: group)
    again = resumable / "again"
    again.mkdir()
    OldPolicy(None, 4, data="digest").with_checkpoint(again, 3)
    assert load_file(again / FILE_NAME)["keys"].tolist() == [0, 1, 2, 3, 4]


def test_other_data_cannot_continue_an_outer_batch(resumable):
    with pytest.raises(ValueError, match="resume with the same flags and data"):
        OldPolicy(None, 4, data="another").with_checkpoint(resumable, 3)


KEYS, VALUES = torch.arange(5), -torch.arange(5.0)
FORM = {"until": "4"}


@pytest.mark.parametrize(
    ("tensors", "form", "message"),
    [
        ({"keys": KEYS, "old_log_prob": VALUES}, None, "it does not say 'until'"),
        ({"keys": KEYS, "old_log_prob": VALUES}, {"until": "4e0"}, "invalid literal"),
        ({"keys": KEYS, "old_log_prob": VALUES}, {"until": "9" * 5000}, "5000 digits"),
        ({"keys": KEYS, "old_log_prob": VALUES}, {"until": "600"}, "steps up to 600"),
        ({"keys": KEYS, "old_log_prob": VALUES}, {"until": "0"}, "steps up to 0"),
        ({"old_log_prob": VALUES}, FORM, "does not contain tensor keys"),
        ({"keys": KEYS}, FORM, "does not contain tensor old_log_prob"),
        (
            {"keys": KEYS, "old_log_prob": VALUES[:3]},
            FORM,
            r"has 5 keys, and values of shape \[3\]",
        ),
        ({"keys": KEYS.float(), "old_log_prob": VALUES}, FORM, r"its keys are torch.float32 \[5\]"),
        ({"keys": KEYS[None], "old_log_prob": VALUES[None]}, FORM, r"torch.int64 \[1, 5\]"),
        ({"keys": KEYS, "old_log_prob": VALUES.long()}, FORM, "its values torch.int64"),
        ({"keys": KEYS.flip(0), "old_log_prob": VALUES}, FORM, "not in ascending order"),
        ({}, FORM, "does not contain tensor keys"),
    ],
)
def test_a_damaged_file_is_named(resumable, tensors, form, message):
    save_file({n: t.contiguous() for n, t in tensors.items()}, resumable / FILE_NAME, form)
    with pytest.raises(CheckpointError, match=rf"{FILE_NAME} is damaged: .*{message}"):
        OldPolicy(None, 4, data="digest").with_checkpoint(resumable, 3)


@pytest.mark.parametrize("content", [b"", b"text", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{"])
def test_a_file_that_holds_no_tensors_is_named(resumable, content):
    (resumable / FILE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{FILE_NAME} is damaged: .*--ckpt-step"):
        OldPolicy(None, 4, data="digest").with_checkpoint(resumable, 3)
