"""The flags of the model card and the upload: refused before anything is asked or opened."""

from __future__ import annotations

import pytest

from checkpoint_conversion.model_card.base import HubId
from megatron_profit.flags import ArgumentsError
from megatron_profit.publish import publication

VALUES = {
    "base_model_id": None,
    "push_to_hub": None,
    "push_public": False,
    "export_hf": "hf",
    "export_adapter": None,
    "hf_model": "models/base",
}
ADAPTERS = {"push_to_hub": "me/x", "export_hf": None, "export_adapter": "adapter"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"base_model_id": "a b"}, "--base-model-id: 'a b' is no id of the hub"),
        ({"push_public": True}, "--push-public is about --push-to-hub, which is missing"),
        (
            {"push_to_hub": "me/x", "export_hf": None},
            "--push-to-hub me/x uploads the folder of --export-hf",
        ),
        (ADAPTERS, "base is models/base, a folder of this machine; .* --base-model-id OWNER/NAME"),
    ],
)
def test_flags_that_cannot_be_used_are_refused(given, message):
    with pytest.raises(ArgumentsError, match=message):
        publication({**VALUES, **given})


def test_the_model_is_uploaded_else_the_adapters():
    both = {**VALUES, **ADAPTERS, "export_hf": "hf"}
    assert publication(both).folder(both).name == "hf"
    assert publication(both).base_of_adapters(both) is None
    alone = {**both, "export_hf": None, "base_model_id": "me/base@v1"}
    assert publication(alone).folder(alone).name == "adapter"
    assert publication(alone).base_of_adapters(alone) == HubId("me/base", "v1")


def test_uploaded_adapters_name_the_place_of_their_base_in_the_hubs_cache():
    cached = {**VALUES, **ADAPTERS, "hf_model": "/hub/models--Qwen--Qwen3-4B/snapshots/1cf"}
    assert publication(cached).base_of_adapters(cached) == HubId("Qwen/Qwen3-4B", "1cf")
