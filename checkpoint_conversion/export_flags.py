"""The flags of `megatron_to_hf`."""

from __future__ import annotations

import argparse

from checkpoint_conversion import cli
from checkpoint_conversion.hf.writer import DEFAULT_SHARD_SIZE
from checkpoint_conversion.model_card.base import HubId
from checkpoint_conversion.model_card.hub import FLAG


def export_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    parser = argparse.ArgumentParser(
        prog=cli.program("checkpoint_conversion.megatron_to_hf"), formatter_class=cli.FlagHelp
    )
    add = parser.add_argument
    add("--megatron", required=True, metavar="DIR", help="Megatron save folder")
    add(
        "--hf-template", required=True, metavar="DIR", help="HuggingFace folder to take the rest of"
    )
    cli.add_output_options(parser, required=False)
    add("--iteration", metavar="N", help="a number or 'release' (default: latest)")
    add("--dry-run", action="store_true", help=cli.DRY_RUN)
    add(
        "--max-shard-size",
        metavar="SIZE",
        help=f"such as 5GB (default: as the template's index, else {DEFAULT_SHARD_SIZE})",
    )
    add("--ignore-arguments", action="store_true", help=cli.IGNORE_ARGUMENTS)
    add(
        "--base",
        metavar="DIR",
        help="Megatron checkpoint that the adapters of the checkpoint were trained on and are merged into "
        "(default: the weights of --hf-template)",
    )
    add(
        "--any-base",
        action="store_true",
        help="take a base that is not the one that the adapters were trained on",
    )
    add(
        "--export-adapter", metavar="DIR", help="PEFT folder to write from a checkpoint of adapters"
    )
    add(
        "--any-carried",
        action="store_true",
        help="take the vision tower and other untrained tensors of --hf-template, even if the checkpoint "
        "notes other ones",
    )
    add(
        "--base-model-id",
        type=HubId.parse,
        metavar="ID",
        help="id of the base on the hub, as ID or ID@REVISION, for the model card and uploaded adapters "
        "(default: the one that the run noted, or the place of --hf-template in the hub's cache)",
    )
    add(
        FLAG,
        metavar="ID",
        help="upload the output to this repository of the hub (--out; without it --export-adapter); a new "
        "repository is for you alone",
    )
    add("--push-public", action="store_true", help="let everybody read what is uploaded")
    return parser
