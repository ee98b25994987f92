"""The files of a reference model's numbers: one for each set of examples, whoever draws from it."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_profit.data import Examples, SFTDataset
from megatron_profit.training import reference_model
from megatron_profit.training.reference_model import ReferenceModel


def examples(*ids):
    flat = np.array(ids, dtype=np.int32)
    return Examples(flat, np.ones(len(ids), dtype=np.uint8), np.array([0, len(ids)]))


@pytest.fixture
def computed(monkeypatch, tmp_path):
    """computed(**data sets): the names of those whose numbers are computed, and the reference."""
    args = SimpleNamespace(params_dtype="torch.float32", vocab_size=9)
    monkeypatch.setattr(reference_model, "get_args", lambda: args)
    monkeypatch.setattr(reference_model, "_identity", lambda model, notes: ["a model"])
    monkeypatch.setattr(reference_model, "_common", set)
    monkeypatch.setattr(reference_model, "_from_first_rank", lambda function: function())
    monkeypatch.setattr(reference_model, "_weights_of", lambda *_: nullcontext())

    def run(**datasets):
        reference = ReferenceModel(None, tmp_path, None, datasets)
        names = []

        def compute(trained, name, folder):
            names.append(name)
            reference_model._write(folder, np.full(3, len(names), dtype=np.float32))

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
