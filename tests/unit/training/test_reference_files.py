"""The files of a reference model's numbers: one for each set of examples, and never a damaged one."""

import itertools
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_profit.data import Examples, SFTDataset
from megatron_profit.training.process import ranks
from megatron_profit.training.statistics import reference_model
from megatron_profit.training.statistics.reference_model import ReferenceModel


def examples(*ids):
    flat = np.array(ids, dtype=np.int32)
    return Examples(flat, np.ones(len(ids), dtype=np.uint8), np.array([0, len(ids)]))


@pytest.fixture
def computed(monkeypatch, tmp_path):
    """computed(FP8, its recipe, **data sets): the names of those whose numbers are computed."""
    args = SimpleNamespace(
        params_dtype="torch.float32", vocab_size=9, fp8=None, fp4=None, fp4_recipe="nvfp4"
    )
    monkeypatch.setattr(reference_model, "get_args", lambda: args)
    monkeypatch.setattr(reference_model, "_identity", lambda model, notes: ["a model"])
    monkeypatch.setattr(reference_model, "_common", set)
    for name in ("from_first_rank", "from_first_rank_in_time"):
        monkeypatch.setattr(reference_model, name, lambda function: function())
    monkeypatch.setattr(reference_model, "_weights_of", lambda *_: nullcontext())

    def run(precision=None, recipe="delayed", **datasets):
        args.fp8, args.fp8_recipe = precision, recipe
        reference = ReferenceModel(None, tmp_path, None, datasets)
        names = []

        def compute(trained, name, folder):
            names.append(name)
            reference_model._write(
                folder, reference._file, np.full(3, len(names), dtype=np.float32)
            )

        reference._compute = compute
        reference.before_evaluation(None)
        assert set(reference._values) == set(datasets)
        return names

    return run


def test_records_set_aside_of_the_training_data_are_scored_once(computed, tmp_path):
    train, other = examples(1, 2, 3), examples(1, 2, 4)
    both = {"train": SFTDataset(train, 4, 1), "valid": SFTDataset(train, 4, 1, seed=7)}
    assert computed(**both) == ["train"]
    assert computed(**both) == []
    assert computed(train=SFTDataset(train, 4, 1), valid=SFTDataset(other, 4, 1)) == ["valid"]
    assert len(list(tmp_path.iterdir())) == 2


def test_another_precision_has_numbers_of_its_own(computed):
    data = SFTDataset(examples(1, 2, 3), 4, 1)
    for precision in (None, "e4m3", "hybrid"):
        assert computed(precision, train=data) == ["train"]
        assert computed(precision, train=data) == []
    assert computed("hybrid", "blockwise", train=data) == ["train"]


def test_damaged_numbers_are_computed_again(computed, tmp_path, capsys):
    data = SFTDataset(examples(1, 2, 3), 4, 1)
    assert computed(train=data) == ["train"]
    (file,) = tmp_path.glob("*/ref_log_prob.float32")
    file.write_bytes(b"\1" + file.read_bytes()[1:])
    assert computed(train=data) == ["train"]
    assert "ref_log_prob.float32 has the CRC-32" in capsys.readouterr().err
    assert computed(train=data) == []


def test_numbers_that_another_machine_misses_are_computed_again(computed, tmp_path, monkeypatch):
    data = SFTDataset(examples(1, 2, 3), 4, 1)
    assert computed(train=data) == ["train"]
    monkeypatch.setattr(reference_model, "_common", lambda found: set())
    assert computed(train=data) == ["train"]
    assert len(list(tmp_path.glob("*/ref_log_prob.float32"))) == 1


def test_a_machine_waits_for_what_another_one_has_written(computed, monkeypatch, capsys):
    """A network file system shows it late; with a disk of its own the machine never sees it."""
    write, unseen = reference_model._write, []
    monkeypatch.setattr(reference_model, "_write", lambda *values: unseen.append(values))
    seconds = itertools.count(0, 60)
    clock = SimpleNamespace(monotonic=seconds.__next__, sleep=lambda _: write(*unseen.pop()))
    monkeypatch.setattr(ranks, "time", clock)
    assert computed(train=SFTDataset(examples(1, 2, 3), 4, 1)) == ["train"]
    clock.sleep = lambda _: None
    with pytest.raises(SystemExit):
        computed(train=SFTDataset(examples(1, 2, 4), 4, 1))
    assert "ref_log_prob.float32, which another one has made" in capsys.readouterr().err


def test_another_run_may_have_written_the_same(tmp_path, monkeypatch):
    """Which a network file system does not show yet."""
    monkeypatch.setattr(Path, "exists", lambda path: False)
    for value in (1, 2):
        reference_model._write(tmp_path / "a", "b", np.full(3, value, dtype=np.float32))
    assert [folder.name for folder in tmp_path.iterdir()] == ["a"]
    assert np.fromfile(tmp_path / "a" / "b", dtype=np.float32).tolist() == [1, 1, 1]


def test_a_model_is_known_by_the_content_of_its_files(tmp_path):
    folder, notes = tmp_path / "model", tmp_path / "notes"
    folder.mkdir()
    weights = folder / "model.safetensors"
    for file, content in ((folder / "config.json", "{}"), (weights, "weights")):
        file.write_text(content)
    model = SimpleNamespace(folder=folder, tensors={"a": SimpleNamespace(file=weights)})
    identity = reference_model._identity(model, notes)
    times = weights.stat()
    os.utime(weights)
    assert reference_model._identity(model, notes) == identity, "as after a copy"
    weights.write_text("WEIGHTS")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert reference_model._identity(model, notes) != identity


def test_what_does_not_fit_on_the_disk_is_not_begun(computed, tmp_path, monkeypatch, capsys):
    usage = SimpleNamespace(free=11)
    monkeypatch.setattr(reference_model.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(SystemExit):
        computed(train=SFTDataset(examples(1, 2, 3), 4, 1))
    assert "take 12 bytes" in capsys.readouterr().err
    usage.free = 12
    assert computed(train=SFTDataset(examples(1, 2, 3), 4, 1)) == ["train"]


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 127, 129, 641])
@pytest.mark.parametrize(
    ("stride", "group"), [(1, 1), (4, 1), (1, 2), (4, 2), (2, 3), (1, 8), (1, 96)]
)
def test_each_pass_has_whole_groups_of_micro_batches_and_all_together_all_rows(rows, stride, group):
    """As the interleaved schedule wants them; without it a group is one micro-batch."""
    unit = stride * group
    parts = list(reference_model._parts(rows, unit, 64 * stride))
    assert all(start < end and (end - start) % unit == 0 for start, end in parts)
    assert [start for start, _ in parts[1:]] == [end for _, end in parts[:-1]]
    assert (parts[0][0], rows <= parts[-1][1] < rows + unit) == (0, True)
    assert all(end - start <= max(64 * stride, unit) for start, end in parts)
