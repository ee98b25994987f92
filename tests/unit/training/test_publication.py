"""The flags of the model card and the upload: refused before anything is asked or opened."""

from __future__ import annotations

import pytest

from megatron_profit.flags import ArgumentsError
from megatron_profit.publish import publication

VALUES = {
    "base_model_id": None,
    "push_to_hub": None,
    "push_public": False,
    "export_hf": "hf",
    "export_adapter": None,
}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"base_model_id": "a b"}, "--base-model-id: 'a b' is no id of the hub"),
        ({"push_public": True}, "--push-public is about --push-to-hub, which is missing"),
        (
            {"push_to_hub": "me/x", "export_hf": None},
            "--push-to-hub me/x uploads the folder of --export-hf",
        ),
    ],
)
def test_flags_that_cannot_be_used_are_refused(given, message):
    with pytest.raises(ArgumentsError, match=message):
        publication({**VALUES, **given})


def test_the_model_is_uploaded_else_the_adapters():
    both = {**VALUES, "push_to_hub": "me/x", "export_adapter": "adapter"}
    assert publication(both).folder(both).name == "hf"
    alone = {**both, "export_hf": None}
    assert publication(alone).folder(alone).name == "adapter"
