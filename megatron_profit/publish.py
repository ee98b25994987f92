"""The flags that say how an export is described and where it is published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.model_card.base import HubId
from checkpoint_conversion.model_card.hub import check_named_base
from megatron_profit.flags import ArgumentsError, flag, options_of


@dataclass(frozen=True)
class Publication:
    """The base's name in the model card, and the upload of the export."""

    base_model_id: str | None = flag(
        "Id of the base on the hub for the model card of an export, as ID or ID@REVISION; by default it "
        "follows from the place of --hf-model in the hub's cache.",
        metavar="ID",
    )
    push_to_hub: str | None = flag(
        "Upload the export to this repository of the hub after the last step: the folder of --export-hf, or "
        "without it of --export-adapter. The repository is made before the first step, for you alone.",
        metavar="ID",
    )
    push_public: bool = flag(
        "Let everybody read what --push-to-hub uploads.", default=False, action="store_true"
    )

    def folder(self, values: Mapping[str, Any]) -> Path:
        """Return the folder to upload."""
        return Path(values["export_hf"] or values["export_adapter"])

    def base(self, hf_model: str | Path) -> HubId | None:
        """Return the base on the hub, as it was named or by its place in the hub's cache, if it is known."""
        return (
            HubId.parse(self.base_model_id) if self.base_model_id else HubId.of_path(Path(hf_model))
        )

    def base_of_adapters(self, values: Mapping[str, Any]) -> HubId | None:
        """Return the base that uploaded adapters name; None for a whole model, or without an upload.

        Raises:
            ConversionError: It is not known.
        """
        if self.push_to_hub is None or values["export_hf"]:
            return None
        return check_named_base(self.base(values["hf_model"]), values["hf_model"])


def publication(values: Mapping[str, Any]) -> Publication:
    """Return the checked options of the flags; the hub is not asked.

    Args:
        values: All arguments, by name.

    Raises:
        ArgumentsError: Names the flag, its value and the remedy.
    """
    options = options_of(Publication, values)
    if options.base_model_id is not None:
        try:
            HubId.parse(options.base_model_id)
        except ConversionError as error:
            raise ArgumentsError(f"--base-model-id: {error}") from error
    if options.push_public and options.push_to_hub is None:
        raise ArgumentsError("--push-public is about --push-to-hub, which is missing")
    if options.push_to_hub is not None and not (values["export_hf"] or values["export_adapter"]):
        raise ArgumentsError(
            f"--push-to-hub {options.push_to_hub} uploads the folder of --export-hf or --export-adapter; "
            "give one of them"
        )
    try:
        options.base_of_adapters(values)
    except ConversionError as error:
        raise ArgumentsError(error) from error
    return options
