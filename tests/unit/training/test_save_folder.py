"""A run writes into a folder with checkpoints only if it goes on from them or may replace them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_profit.training.checkpoints import choose as resume
from megatron_profit.training.checkpoints.choose import CheckpointFlags, choose_checkpoints
from megatron_profit.training.checkpoints.folder import MARKER, CheckpointError
from megatron_profit.training.checkpoints.save_folder import check_save_folder, clear_save_folder


def checkpoint(save: Path, name: str, *, own: bool = True, whole: bool = True) -> Path:
    folder = save / name
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(b"weights")
    if own:
        (folder / MARKER).write_text("{}")
    if whole:
        (folder / ".metadata").write_bytes(b"")
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    """A folder as a run leaves it."""
    save = tmp_path / "run"
    checkpoint(save, "iter_0000004")
    checkpoint(save, "iter_0000006")
    (save / "latest_checkpointed_iteration.txt").write_text("6")
    (save / "metrics.jsonl").write_text("{}\n")
    return save


def test_a_folder_with_a_run_is_neither_written_nor_changed(run):
    before = sorted(run.rglob("*"))
    with pytest.raises(CheckpointError) as error:
        check_save_folder(run, None, overwrite=False)
    for part in (str(run), "iter_0000006, iter_0000004", f"--load {run}", "--overwrite", "another"):
        assert part in str(error.value)
    assert sorted(run.rglob("*")) == before


def test_another_folder_to_load_from_is_no_permission(run, tmp_path):
    checkpoint(tmp_path / "other", "iter_0000002")
    with pytest.raises(CheckpointError, match=f"give --load {run}"):
        check_save_folder(run, tmp_path / "other", overwrite=False)


def test_a_run_may_go_on_also_through_a_link(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    check_save_folder(run, tmp_path / "link", overwrite=False)
    with pytest.raises(CheckpointError, match="drop one of the two"):
        check_save_folder(run, run, overwrite=True)


def test_a_run_does_not_remove_the_checkpoint_that_it_starts_from(run):
    with pytest.raises(CheckpointError, match="--overwrite would remove the checkpoint that the"):
        check_save_folder(run, None, overwrite=True, start=run)


@pytest.mark.parametrize("name", ["iter_0000003", "release"])
def test_checkpoints_of_other_programs_are_never_overwritten(tmp_path, name):
    save = tmp_path / "foreign"
    checkpoint(save, name, own=False)
    with pytest.raises(CheckpointError, match="holds a run already"):
        check_save_folder(save, None, overwrite=False)
    with pytest.raises(CheckpointError, match=f"has not written \\({name}\\)"):
        check_save_folder(save, None, overwrite=True)


def test_a_checkpoint_of_megatrons_older_format_counts(tmp_path):
    (tmp_path / "old" / "iter_0000003" / "mp_rank_00").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="iter_0000003"):
        check_save_folder(tmp_path / "old", None, overwrite=False)


def test_a_run_that_died_before_its_first_checkpoint_is_simply_started_again(tmp_path):
    save = tmp_path / "died"
    check_save_folder(save, None, overwrite=False)
    checkpoint(save, "iter_0000002", whole=False)
    (save / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    (save / ".in_use").write_text("")
    (save / "tensorboard").mkdir()
    check_save_folder(save, None, overwrite=False)


def test_a_restart_by_torchrun_does_not_overwrite_what_its_own_job_has_written(run, monkeypatch):
    check_save_folder(run, None, overwrite=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(CheckpointError, match=f"give --load {run} in place"):
        check_save_folder(run, None, overwrite=True)


def test_a_restart_that_torchrun_does_not_count_is_known_by_the_id_of_the_job(run, monkeypatch):
    """A node starts its ranks again, with a count of 0, when another node of the job has come back."""
    (run / "iter_0000006" / MARKER).write_text('{"torchrun_id": "4711"}')
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "4711")
    with pytest.raises(CheckpointError) as error:
        check_save_folder(run, None, overwrite=True)
    for part in ("(iter_0000006) with the --rdzv-id", "4711", f"--load {run}", "another --rdzv-id"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("wrote", "runs"),
    [("4711", "4712"), ("4711", None), (None, "4711"), ("none", "none"), (None, None), ("", "")],
)
def test_another_job_or_one_without_an_id_overwrites(run, monkeypatch, wrote, runs):
    (run / "iter_0000006" / MARKER).write_text(json.dumps({"torchrun_id": wrote}))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if runs is not None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", runs)
    check_save_folder(run, None, overwrite=True)


def test_a_broken_marker_is_overwritten(run, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "4711")
    (run / "iter_0000006" / MARKER).write_text("{")
    check_save_folder(run, None, overwrite=True)


def test_nothing_of_a_replaced_run_is_left_and_nothing_else_is_touched(run, tmp_path):
    checkpoint(run, "iter_0000006.replaced")
    elsewhere = checkpoint(tmp_path / "elsewhere", "iter_0000005")
    (run / "iter_0000005").symlink_to(elsewhere)
    (run / "notes.txt").write_text("mine")
    (run / "ref_log_prob").mkdir()
    removed = clear_save_folder(run)
    left = {"iter_0000005", "notes.txt", "ref_log_prob"}
    assert {path.name for path in run.iterdir()} == left
    assert len(removed) == 5
    assert (elsewhere / MARKER).exists()


def test_many_checkpoints_are_named_in_short(tmp_path):
    for iteration in range(1, 8):
        checkpoint(tmp_path / "run", f"iter_{iteration:07d}")
    with pytest.raises(CheckpointError, match=r"\(iter_0000007, iter_0000006, ..., iter_0000001\)"):
        check_save_folder(tmp_path / "run", None, overwrite=False)


@pytest.mark.parametrize("name", ["a" * 300, "circle"])
def test_a_folder_that_cannot_be_is_named(tmp_path, name):
    (tmp_path / "circle").symlink_to("circle")
    folder = tmp_path / name
    flags = CheckpointFlags(folder, folder, None, None, False, False, False)
    with pytest.raises(CheckpointError, match=rf"^--save {folder} cannot be used: "):
        choose_checkpoints(flags, lambda saved: None)


@pytest.mark.parametrize(
    ("said", "message"),
    [(6, "iteration 6; rename the folder to iter_0000006$"), ("6", "iteration '6'$")],
)
def test_a_checkpoint_in_the_folder_of_another_iteration_is_refused(tmp_path, said, message):
    """A copied or renamed folder: Megatron would go on, and count, from the number inside."""
    folder = tmp_path / "iter_0000004"
    with pytest.raises(CheckpointError, match=message):
        resume._check_iteration(folder, 4, said)
    resume._check_iteration(folder, 4, 4)
    resume._check_iteration(folder, 4, None)
