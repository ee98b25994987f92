"""The flags that say which data are trained and how. Help reads them without torch or transformers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from megatron_profit.data.files.sources import COLUMNS

# Flags of a list of values.
LIST_FLAGS = (
    "--data",
    "--data-weights",
    "--valid-data",
    "--data-columns",
    "--allow-special-tokens",
)


def add_data_flags(group: argparse._ActionsContainer, *, required: bool = False) -> None:
    """Add the data flags, besides --seq-length and --seed.

    Args:
        group: A parser, or a group of one.
        required: Whether the parser refuses a command line without --data.
    """
    group.add_argument(
        "--data",
        nargs="+",
        required=required,
        metavar="FILE",
        help="Chat files or folders to train on, or names of entries of --dataset-info.",
    )
    group.add_argument(
        "--data-weights",
        nargs="+",
        type=float,
        metavar="W",
        help="For each of --data how often an epoch holds each of its records, on average; 1 by default.",
    )
    add_rendering_flags(group)
    group.add_argument(
        "--valid-data",
        nargs="+",
        metavar="FILE",
        help="Chat files to evaluate on every --eval-interval steps; all records, or --eval-iters batches.",
    )
    group.add_argument(
        "--valid-split",
        type=float,
        metavar="SHARE",
        help="Set this share of the records of --data aside to evaluate on, in place of --valid-data.",
    )
    group.add_argument(
        "--too-long",
        choices=("truncate", "drop"),
        default="truncate",
        help="What happens to a record that is longer than --seq-length.",
    )
    group.add_argument(
        "--packing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Put as many records into a row of --seq-length positions as fit, isolated from each other; "
        "else one.",
    )
    group.add_argument(
        "--data-workers",
        type=int,
        metavar="N",
        help="Processes that prepare the data; by default as many as they are worth, up to the cores.",
    )
    group.add_argument(
        "--data-cache",
        metavar="DIR",
        help="Folder for prepared data; by default $MEGATRON_PROFIT_CACHE or one in the user's cache.",
    )


def add_rendering_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags that decide which fields of a record are read and which of its tokens are trained."""
    group.add_argument(
        "--data-columns",
        nargs="+",
        metavar="NAME=COLUMN",
        help=f"Where the keys do not tell: which column is which of {', '.join(COLUMNS)}.",
    )
    group.add_argument(
        "--dataset-info",
        metavar="FILE",
        help="A dataset_info.json in LLaMA-Factory's form, whose entries --data may name.",
    )
    group.add_argument(
        "--train-on",
        choices=("all", "last", "each"),
        default="all",
        help="Train all turns of the assistant, the last one, or each of them as the last one of an example "
        "of its own, so that a template which drops earlier reasoning keeps it in every turn.",
    )
    group.add_argument(
        "--train-think",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Train what stands in <think> blocks, too.",
    )
    group.add_argument(
        "--template-date",
        metavar="YYYY-MM-DD",
        help="The day that a chat template writes which asks for today's.",
    )
    group.add_argument(
        "--allow-special-tokens",
        nargs="+",
        metavar="TOKEN",
        help="Special tokens of the tokenizer that texts of records may hold, as tokens; a record with "
        "another one is left out.",
    )


def rendering_words(values: Mapping[str, Any]) -> list[str]:
    """Return the flags of `add_rendering_flags` that have another value than their default, as words.

    Args:
        values: The arguments by name. For example, `data_columns` ["prompt=question"] gives `--data-columns
            prompt=question`.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_rendering_flags(parser)
    words: list[str] = []
    for action in parser._actions:
        value = values[action.dest]
        if value == action.default:
            continue
        if isinstance(action, argparse.BooleanOptionalAction):
            words.append(action.option_strings[not value])
        else:
            items = value if isinstance(value, list) else [value]
            words += [action.option_strings[0], *map(str, items)]
    return words
