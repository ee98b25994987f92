"""Which checkpoint of a folder is resumed from, and which are removed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from make_tiny_model import TinyShape, make_tiny_model

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf_to_megatron import hf_to_megatron
from checkpoint_conversion.torch_dist.integrity import check_content
from megatron_profit.training.checkpoints.folder import (
    MARKER,
    VALIDATION,
    CheckpointError,
    best,
    check_named,
    drop_replaced,
    make_room,
    problem_of,
    prune,
    read_tracker,
    settle,
    write_json,
)

TRACKER = "latest_checkpointed_iteration.txt"
DATA = Path(__file__).resolve().parents[3] / "examples" / "data"


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """A small whole checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    shape = TinyShape(hidden_size=16, intermediate_size=16, head_dim=8)
    model = make_tiny_model(folder / "hf", [DATA / "arithmetic_heldout.jsonl"], shape)
    hf_to_megatron(model, folder / "megatron")
    return folder / "megatron" / "release"


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A run with whole checkpoints of iterations 2, 4 and 6."""
    for iteration in (2, 4, 6):
        add(whole, tmp_path, iteration)
    (tmp_path / TRACKER).write_text("6")
    return tmp_path


def add(whole: Path, save: Path, iteration: int, **metrics: float) -> Path:
    folder = save / f"iter_{iteration:07d}"
    shutil.copytree(whole, folder)
    write_json(folder / MARKER, {"iteration": iteration})
    if metrics:
        write_json(folder / VALIDATION, {name.replace("_", " "): v for name, v in metrics.items()})
    return folder


# All iterations are of one run.
ALL = range(100)


def iterations(save: Path) -> list[int]:
    return sorted(int(folder.name[5:]) for folder in save.glob("iter_*"))


def _shorten(folder: Path) -> None:
    file = max(folder.glob("*.distcp"), key=lambda f: f.stat().st_size)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)


DAMAGE = {
    "missing": shutil.rmtree,
    "without .metadata": lambda folder: (folder / ".metadata").unlink(),
    "with half of .metadata": lambda folder: (folder / ".metadata").write_bytes(
        (folder / ".metadata").read_bytes()[:100]
    ),
    "with an empty .metadata": lambda folder: (folder / ".metadata").write_bytes(b""),
    "without metadata.json": lambda folder: (folder / "metadata.json").unlink(),
    "with half of metadata.json": lambda folder: (folder / "metadata.json").write_text(
        '{"sharded_'
    ),
    "without a file": lambda folder: next(iter(sorted(folder.glob("*.distcp")))).unlink(),
    "with a file that is too short": _shorten,
    "without the common state": lambda folder: (folder / ".metadata").write_bytes(
        (folder / ".metadata").read_bytes().replace(b"common_state", b"common_stats")
    ),
    "empty": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


def test_a_whole_checkpoint_that_the_tracker_names_is_taken_without_a_word(run):
    said = []
    assert settle(run, said.append) == "6"
    assert said == []
    (run / TRACKER).write_text("2\n")
    assert settle(run, said.append) == "2", "somebody has chosen an older one"
    assert said == []


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_half_written_checkpoint_is_never_named(run, damage):
    DAMAGE[damage](run / "iter_0000006")
    said = []
    assert settle(run, said.append) == "4"
    assert read_tracker(run) == "4"
    assert any("iter_0000006" in message for message in said)
    assert problem_of(run / "iter_0000006") is not None
    assert settle(run, lambda _: None) == "4"


@pytest.mark.parametrize("content", ["", "x", "-1", "6.0", "\x00\x00", None])
def test_a_broken_tracker_file_is_mended(run, content):
    if content is None:
        (run / TRACKER).unlink()
    else:
        (run / TRACKER).write_text(content)
    DAMAGE["without .metadata"](run / "iter_0000006")
    said = []
    assert settle(run, said.append) == "4"
    assert (run / TRACKER).read_text() == "4"
    assert len(said) == 2, "what is skipped, and what is taken"


def flip(folder: Path) -> Path:
    """Flip a bit of a tensor; nothing but its checksum shows it."""
    file = max(folder.glob("*.distcp"), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file


def inspect(folder: Path) -> str | None:
    """As a run looks at a checkpoint."""
    try:
        return problem_of(folder) or check_content(folder)
    except ConversionError as error:
        return str(error)


def test_a_flipped_bit_is_found_in_the_checkpoint_that_would_be_taken(run):
    file = flip(run / "iter_0000006")
    said = []
    assert settle(run, said.append, inspect=inspect) == "4"
    assert read_tracker(run) == "4"
    assert said[0].startswith(f"{run / 'iter_0000006'} is skipped, it is not whole: {file}: ")
    assert " is damaged: the checksum of data/0 is " in said[0]
    assert "iter_0000004 is the newest whole checkpoint" in said[1]
    flip(run / "iter_0000004")
    flip(run / "iter_0000002")
    with pytest.raises(CheckpointError, match=r"iter_0000004.* is damaged.*no other checkpoint"):
        settle(run, said.append, inspect=inspect)


def test_only_the_checkpoint_that_is_taken_is_read_in_full(run):
    read = []
    settle(run, lambda _: None, inspect=lambda folder: read.append(folder.name))
    assert read == ["iter_0000006"]


def test_a_damaged_checkpoint_asked_for_by_number_is_refused(run):
    file = flip(run / "iter_0000004")
    with pytest.raises(CheckpointError, match=f"{file.name}: .* is damaged.*iterations: 6, 4, 2"):
        check_named(run, 4, inspect)
    check_named(run, 6, inspect)


def test_a_tracker_that_is_no_regular_file_is_named(run):
    (run / TRACKER).unlink()
    os.mkfifo(run / TRACKER)
    with pytest.raises(CheckpointError, match=f"{TRACKER} cannot be read: .* is a pipe"):
        settle(run, lambda _: None)


@pytest.mark.parametrize("content", ["9" * 5000, "٣", "1" * 16])
def test_a_tracker_with_a_number_that_is_no_iteration(run, content):
    (run / TRACKER).write_text(content)
    said = []
    assert settle(run, said.append) == "6"
    assert "which is no iteration" in said[0]
    assert len(said[0]) < 500


def test_links_are_replaced_and_not_written_through(run, tmp_path):
    other = tmp_path / "other"
    other.write_text("mine")
    DAMAGE["without .metadata"](run / "iter_0000006")
    for name in (TRACKER, f".{TRACKER}.unfinished"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(other)
    assert settle(run, lambda _: None) == "4"
    assert not (run / TRACKER).is_symlink()
    (run / "iter_0000004" / VALIDATION).symlink_to(other)
    write_json(run / "iter_0000004" / VALIDATION, {"lm loss": 1.0})
    assert other.read_text() == "mine"


def test_links_in_the_way_of_a_checkpoint_are_removed(whole, run, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "tracker").write_text("mine")
    (run / TRACKER).unlink()
    (run / TRACKER).symlink_to(elsewhere / "tracker")
    for number, target in ((8, elsewhere), (10, elsewhere / "missing")):
        (run / f"iter_{number:07}").symlink_to(target)
        make_room(run / f"iter_{number:07}")
        assert not (run / f"iter_{number:07}").is_symlink()
    assert not (run / TRACKER).is_symlink()
    assert [file.name for file in elsewhere.iterdir()] == ["tracker"]
    shutil.copytree(whole, elsewhere / "whole")
    (run / "iter_0000008").symlink_to(elsewhere / "whole")
    make_room(run / "iter_0000008")
    drop_replaced(run / "iter_0000008")
    assert problem_of(elsewhere / "whole") is None, "only the link to it is gone"


def test_a_broken_evaluation_is_named(whole, tmp_path):
    folder = add(whole, tmp_path, 2, lm_loss=1.0)
    (folder / VALIDATION).write_text('{"lm loss": 1.')
    with pytest.raises(CheckpointError, match=rf"{VALIDATION}: broken JSON"):
        best(tmp_path, "lm loss", ALL)


def test_what_a_dead_save_left_is_skipped_with_a_warning(run):
    (run / "iter_0000008").mkdir()
    (run / "iter_0000008" / "__0_0.distcp").write_bytes(b"half")
    said = []
    assert settle(run, said.append) == "6"
    assert len(said) == 1
    assert "iter_0000008 is skipped" in said[0]


def test_a_run_that_died_in_its_first_save_begins_anew(tmp_path):
    (tmp_path / "iter_0000002").mkdir()
    said = []
    assert settle(tmp_path, said.append) == ""
    assert "iter_0000002 is skipped" in said[0]
    assert settle(tmp_path / "nowhere", said.append) == ""


def test_a_run_whose_checkpoints_are_all_broken_does_not_begin_anew(run):
    for folder in run.glob("iter_*"):
        DAMAGE["without .metadata"](folder)
    with pytest.raises(CheckpointError, match=r"no other checkpoint in .* is whole; to begin anew"):
        settle(run, lambda _: None)


def test_a_tracker_that_cannot_be_mended_is_an_error(run, monkeypatch):
    (run / TRACKER).write_text("x")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(PermissionError("no")))
    with pytest.raises(CheckpointError, match="write that number into it"):
        settle(run, lambda _: None)


def test_a_checkpoint_asked_for_by_number_must_be_whole(run):
    check_named(run, 4)
    DAMAGE["without .metadata"](run / "iter_0000004")
    with pytest.raises(CheckpointError, match=r"whole checkpoints in .* are of iterations: 6, 2"):
        check_named(run, 4)
    check_named(run, None)


def test_a_checkpoint_of_pickles_for_each_rank_is_never_named(run):
    shutil.rmtree(run / "iter_0000006")
    (run / "iter_0000006" / "mp_rank_00").mkdir(parents=True)
    warnings = []
    assert settle(run, warnings.append) == "4"
    assert "iter_0000006 is in Megatron's older format (mp_rank_…)" in warnings[0]


def test_left_overs_make_room(run):
    DAMAGE["without .metadata"](run / "iter_0000006")
    make_room(run / "iter_0000006")
    assert list((run / "iter_0000006").iterdir()) == []
    make_room(run / "iter_0000008")
    assert not (run / "iter_0000008").exists(), "nothing to do"


def test_a_whole_checkpoint_is_replaced_only_by_a_whole_one(whole, run):
    make_room(run / "iter_0000006")
    (run / "iter_0000006" / "__0_0.distcp").write_bytes(b"half")
    (run / TRACKER).write_text("6")
    shutil.copytree(run, run.with_name("elsewhere"))
    assert settle(run.with_name("elsewhere"), lambda _: None, is_own=False) == "4"
    assert settle(run, lambda _: None) == "6"
    assert problem_of(run / "iter_0000006") is None, "the old one is back"

    make_room(run / "iter_0000006")
    shutil.copytree(whole, run / "iter_0000006", dirs_exist_ok=True)
    drop_replaced(run / "iter_0000004")
    assert len(list(run.glob("iter_*6*"))) == 2, "another one is being replaced"
    drop_replaced(run / "iter_0000006")
    assert [folder.name for folder in sorted(run.glob("iter_*6*"))] == ["iter_0000006"]
    assert problem_of(run / "iter_0000006") is None


def test_the_newest_the_best_and_the_protected_stay(whole, tmp_path):
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0, 10: float("nan"), 12: 5.0}
    for iteration, loss in losses.items():
        add(whole, tmp_path, iteration, lm_loss=loss, mean_p=loss / 10)
    assert best(tmp_path, "lm loss", ALL).iteration == 4, "the earlier of two equals"
    assert best(tmp_path, "mean p", ALL).iteration == 12
    removed = list(prune(tmp_path, 12, 2, "lm loss", {2}, ALL))
    assert iterations(tmp_path) == [2, 4, 10, 12]
    assert [folder.name for folder in removed] == ["iter_0000008", "iter_0000006"]


def test_checkpoints_of_a_run_that_went_back_neither_count_nor_go(whole, run):
    """The run made 2, 4, 6, went back to 2 and made 3 and 5."""
    for iteration in (2, 4, 6):
        write_json(run / f"iter_{iteration:07}" / VALIDATION, {"lm loss": 1 / iteration})
    for iteration in (3, 5):
        add(whole, run, iteration, lm_loss=iteration)
    course = {2, 3, 5}
    assert best(run, "lm loss", course).iteration == 2
    list(prune(run, 5, 2, None, (), course))
    assert iterations(run) == [3, 4, 5, 6]
    list(prune(run, 6, 1, None, (), ALL))
    assert iterations(run) == [6]


def test_only_what_this_entry_wrote_is_removed(whole, run, tmp_path_factory):
    (run / "iter_0000002" / MARKER).unlink()
    elsewhere = add(whole, tmp_path_factory.mktemp("elsewhere"), 1)
    (run / "iter_0000001").symlink_to(elsewhere)
    list(prune(run, 6, 1, None, (), ALL))
    assert iterations(run) == [1, 2, 6]
    assert elsewhere.is_dir()


def test_what_may_be_being_written_stays_and_what_died_goes(run):
    for iteration in (5, 8):
        folder = run / f"iter_{iteration:07d}"
        folder.mkdir()
        write_json(folder / MARKER, {"iteration": iteration})
    list(prune(run, 6, 1, None, (), ALL))
    assert iterations(run) == [6, 8]


def test_a_removal_that_is_interrupted_leaves_nothing_that_looks_whole(run, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        list(prune(run, 6, 1, None, (), ALL))
    assert problem_of(run / "iter_0000004") is not None


def test_a_file_is_whole_or_not_there(tmp_path):
    write_json(tmp_path / MARKER, {"iteration": 3})
    assert json.loads((tmp_path / MARKER).read_text()) == {"iteration": 3}
    assert [file.name for file in tmp_path.iterdir()] == [MARKER]
