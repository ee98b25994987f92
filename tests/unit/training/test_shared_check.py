"""The checksums of a checkpoint, compared by several ranks: threads here, over a store in memory."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
from make_tiny_model import TinyShape, make_tiny_model
from torch.distributed import HashStore

from checkpoint_conversion.engine.raw_files import OpenFiles
from checkpoint_conversion.hf_to_megatron import hf_to_megatron
from checkpoint_conversion.torch_dist.metadata import read_metadata
from checkpoint_conversion.torch_dist.reader import open_entry
from megatron_profit.training.checkpoints import shared_check
from megatron_profit.training.checkpoints.folder import CheckpointError
from megatron_profit.training.checkpoints.shared_check import _SharedCheck, wait_until_present

DATA = Path(__file__).resolve().parents[3] / "examples" / "data"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    shape = TinyShape(hidden_size=16, intermediate_size=16, head_dim=8)
    model = make_tiny_model(tmp_path / "hf", [DATA / "arithmetic_heldout.jsonl"], shape)
    hf_to_megatron(model, tmp_path / "megatron")
    return tmp_path / "megatron" / "release"


def inspected(folder: Path, ranks: int, times: int = 1) -> list[str | None]:
    """What the first rank finds; all others help and end."""
    store = HashStore()
    checks = [_SharedCheck(lambda: store, rank, ranks) for rank in range(ranks)]
    helpers = [threading.Thread(target=check.help) for check in checks[1:]]
    for helper in helpers:
        helper.start()
    try:
        return [checks[0].inspect(folder) for _ in range(times)]
    finally:
        checks[0].dismiss()
        for helper in helpers:
            helper.join(timeout=30)
            assert not helper.is_alive()


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_damage_anywhere_is_found_by_the_first_rank(checkpoint, ranks, capsys):
    assert inspected(checkpoint, ranks) == [None]
    assert re.search(rf"compared: 71 kB in \d+ s, by {ranks} process", capsys.readouterr().out)
    metadata = read_metadata(checkpoint)
    for key in ("decoder.final_layernorm.weight", "embedding.word_embeddings.weight"):
        place = metadata.tensors[key].chunks[0].place
        with OpenFiles() as files:
            data = open_entry(files, place, key).records["data/0"]
        content = bytearray(place.file.read_bytes())
        content[place.start + data.offset + data.nbytes // 2] ^= 1
        whole = place.file.read_bytes()
        place.file.write_bytes(content)
        for found in inspected(checkpoint, ranks, times=2):
            assert f"{place.file}: {key} is damaged" in found
        place.file.write_bytes(whole)


def test_a_part_that_is_missing_is_found_without_the_others(checkpoint):
    next(checkpoint.glob("__0_1.distcp")).unlink()
    (found,) = inspected(checkpoint, 2)
    assert "__0_1.distcp: missing" in found


def test_a_machine_that_does_not_see_the_checkpoint_ends_the_run(checkpoint, monkeypatch):
    def unseen(folder: Path) -> None:
        raise CheckpointError("a machine does not see the checkpoint")

    monkeypatch.setattr(shared_check, "wait_until_present", unseen)
    with pytest.raises(CheckpointError, match="a machine does not see"):
        inspected(checkpoint, 2)


def test_a_file_that_appears_late_is_waited_for(checkpoint):
    file = checkpoint / "__0_1.distcp"
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(
        CheckpointError, match=r"does not see .* must be on a file system that all machines"
    ):
        wait_until_present(checkpoint, patience=0)
    late = threading.Timer(0.3, lambda: file.write_bytes(content))
    late.start()
    wait_until_present(checkpoint, patience=60)
    late.join()
