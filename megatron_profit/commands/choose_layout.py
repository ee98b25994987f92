"""Print the flags of the fastest parallel layout that fits the GPUs, by the estimates; for scripts, too.

    megatron-profit layout --model Qwen3-14B --gpus 8
    megatron-profit layout --hf-model Qwen3-32B --gpus 16 --gpu-memory 140 --seq-length 32768

It is the layout that `megatron-profit sft` takes on such GPUs. The flags go to standard output, and their
reasons, with the size of a checkpoint, to standard error.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpoint_conversion.cli import FlagHelp
from checkpoint_conversion.errors import ConversionError, printable
from checkpoint_conversion.hf.folder import read_hf_config
from megatron_profit.estimates.layouts import NoLayoutError, choose
from megatron_profit.estimates.parameter_counts import saved_parameters
from megatron_profit.estimates.possible_layouts import Cluster
from megatron_profit.estimates.published import PUBLISHED, published_config
from megatron_profit.estimates.run_shape import ShapeError, model_arguments
from megatron_profit.estimates.saving import checkpoint_bytes, describe_save
from megatron_profit.flags import flag_of
from megatron_profit.launch.plan_layout import (
    flags_of_choice,
    wish_of_flags,
)
from megatron_profit.recipe.errors import LaunchError
from megatron_profit.recipe.flags import FlagTable, Given, words_of

# GiB of a GPU of "80 GB", as torch gives it.
_USUAL_MEMORY = 79.6
# Rows of a step, and positions of a row (or all that the model has), where no flag gives them.
_ROWS, _POSITIONS = 4, 8192


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="megatron-profit layout --gpus N (--model NAME | --hf-model DIR) [options] [training flags]",
        formatter_class=FlagHelp,
        allow_abbrev=False,
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="NAME", help=f"one of {', '.join(PUBLISHED)}")
    model.add_argument("--hf-model", metavar="DIR", help="HuggingFace folder")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs over all nodes")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a node")
    parser.add_argument(
        "--gpu-memory", type=float, default=_USUAL_MEMORY, metavar="GIB", help="memory of a GPU"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the flags; 1 if no layout fits, 2 for bad input."""
    options, training = _parser().parse_known_args(sys.argv[1:] if argv is None else argv)
    try:
        _check(options)
        return _print(options, FlagTable().parse(training))
    except NoLayoutError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 1
    except (ConversionError, LaunchError, ShapeError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2


def _check(options: argparse.Namespace) -> None:
    for name in ("gpus", "gpus_per_node", "gpu_memory"):
        if not getattr(options, name) >= 1:
            raise LaunchError(
                f"{flag_of(name)} is {getattr(options, name):g}; it must be at least 1"
            )


def _print(options: argparse.Namespace, given: dict[str, Given]) -> int:
    """Choose the layout, and print its flags and its reasons."""
    config = (
        published_config(options.model)
        if options.model is not None
        else read_hf_config(Path(options.hf_model))
    )
    model = model_arguments(config)
    rows = given["global_batch_size"].value if "global_batch_size" in given else _ROWS
    limit = model["max_position_embeddings"]
    positions = given["seq_length"].value if "seq_length" in given else min(_POSITIONS, limit)
    if positions > limit:
        raise LaunchError(f"--seq-length {positions} is above the {limit} positions of the model")
    wish = wish_of_flags(given, model, positions, rows, "global_batch_size" in given)
    cluster = Cluster(options.gpus, options.gpu_memory, min(options.gpus_per_node, options.gpus))
    choice = choose(wish, cluster)
    flags = [Given.of(flag_of(name), value) for name, value in flags_of_choice(choice).items()]
    print(shlex.join(words_of(flags)))
    settings = {"bf16": not given.get("fp16"), **vars(choice.run.args)}
    size = checkpoint_bytes(settings, saved_parameters(choice.run))
    print(
        f"> layout: {choice.describe(cluster)}\n> a checkpoint takes {describe_save(size)}",
        file=sys.stderr,
    )
    return 0
