"""What a checkpoint remembers of its run, and which differences from another run it shows."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_profit.training.checkpoints.run_record import (
    Difference,
    RunRecord,
    digest_of_arrays,
    digest_of_config,
    package_versions,
)

RECORD = RunRecord(
    objective={"name": "profit", "options": {"prob_threshold": (0.1,), "keep_fraction": None}},
    data={"digest": "a1", "examples": 70, "sources": ["a.jsonl"]},
    seed={"seed": 1234},
)


def test_a_record_is_plain_json_and_comes_back_from_it():
    text = json.dumps(RECORD.to_json())
    assert json.loads(text)["objective"]["options"]["prob_threshold"] == [0.1]
    assert RunRecord.from_json(json.loads(text)).to_json() == RECORD.to_json()
    assert RECORD.differences(RunRecord.from_json(json.loads(text))) == ()


def test_differences_name_the_part_the_setting_and_both_values():
    other = RunRecord.from_json(
        {
            "objective": {"name": "profit", "options": {"prob_threshold": [0.2]}},
            "data": {"digest": "b2", "examples": 70, "sources": ["b.jsonl"]},
            "seed": {"seed": 1234},
        }
    )
    assert RECORD.differences(other) == (
        Difference("objective", "options.prob_threshold", [0.2], [0.1]),
        Difference("data", "digest", "b2", "a1"),
    )


def test_what_one_of_two_records_does_not_know_is_no_difference():
    """An older version of the program has written fewer settings, a later one may have written more."""
    older = RunRecord.from_json({"seed": {"seed": 1234}})
    later = RunRecord.from_json({**RECORD.to_json(), "weather": {"sun": True}, "seed": {"x": 1}})
    assert RECORD.differences(older) == RECORD.differences(later) == ()
    assert older.differences(RECORD) == ()


@pytest.mark.parametrize("value", [None, [], "x", {"seed": 1}, {"data": ["digest"]}])
def test_a_record_that_is_no_object_of_objects_is_refused(value):
    with pytest.raises(ValueError, match="must be an object"):
        RunRecord.from_json(value)


def test_digests_tell_values_orders_and_types_apart():
    one, two = np.array([1, 2], np.uint64), np.array([2, 1], np.uint64)
    digests = {
        digest_of_arrays(one),
        digest_of_arrays(two),
        digest_of_arrays(one, two),
        digest_of_arrays(np.concatenate([one, two])),
        digest_of_arrays(one.astype(np.int64)),
    }
    assert len(digests) == 5
    assert digest_of_arrays(one[::1]) == digest_of_arrays(one.copy())


def test_the_digest_of_a_model_ignores_who_wrote_its_config():
    config = {"hidden_size": 64, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    rewritten = {**dict(reversed(config.items())), "transformers_version": "5.0"}
    assert digest_of_config(config) == digest_of_config(rewritten)
    assert digest_of_config(config) != digest_of_config({**config, "hidden_size": 65})


def test_versions_are_those_that_are_installed():
    import torch
    from megatron.core.package_info import __version__ as of_megatron

    found = package_versions()
    assert found["megatron-core"] == of_megatron.partition("+")[0]
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(found) == {"megatron_profit", "megatron-core", "torch", "transformers"}


def test_a_record_with_earlier_names_is_compared_under_the_names_of_today():
    saved = {"name": "entropy", "options": {"keep_share": 0.2}, "normalization": "valid"}
    record = RunRecord.from_json({"objective": saved})
    now = {"name": "entropy", "options": {"keep_fraction": 0.3}, "normalization": "supervised"}
    (difference,) = RunRecord(objective=now).differences(record)
    assert (difference.setting, difference.saved, difference.now) == (
        *("options.keep_fraction", 0.2, 0.3),
    )
