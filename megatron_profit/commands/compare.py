"""Train one base with several objectives, learning rates, ranks and seeds, and evaluate all of them.

    megatron-profit compare plan.yaml --out runs/comparison

The plan is one file:

    base: models/Qwen3-0.6B-Base     # or an id of the hub
    train: --data gsm8k_train.jsonl --data-columns prompt=question response=answer --seq-length 1024
      --micro-batch-size 2 --global-batch-size 8 --train-iters 200
    evaluate: --tasks gsm8k,ifeval --data data/eval
    objectives:
      sft: --objective sft
      profit 0.1: --objective profit --prob-threshold 0.1 --threshold-direction higher
    learning_rates: [1e-5, 5e-6]    # optional, --lr
    lora_ranks: [0, 16]             # optional, --lora-rank; 0 trains all weights
    seeds: [1, 2, 3]

Further keys: data (name: {train: flags, evaluate: flags}, for several data sets), stages (parts of the
comparison in the order in which they are made), processes (of a training), jobs (trainings at a time),
keep_models, save_interval (steps between the checkpoints from which an interrupted training goes on).
`evaluate` may be a mapping from names to flags, for several evaluations. Finished parts are kept, so that an
interrupted comparison goes on. It writes results.json, results.md and figure.png, after each run what there
is so far.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint_conversion.cli import FlagHelp
from checkpoint_conversion.engine.lock import lock_file
from checkpoint_conversion.engine.output import whole_file
from checkpoint_conversion.errors import ConversionError, warn
from megatron_profit.evaluation.command_line import check_out
from megatron_profit.evaluation.errors import EvaluationError
from megatron_profit.recipe.errors import LaunchError

if TYPE_CHECKING:
    from megatron_profit.commands.plot_run import Curve
    from megatron_profit.evaluation.comparison.runs import Outcome

LOCK = ".in_use"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=FlagHelp, allow_abbrev=False
    )
    parser.add_argument("plan", type=Path, metavar="PLAN.yaml", help="The comparison to make.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="Folder of results.")
    parser.add_argument("--dry-run", action="store_true", help="Print the commands of the runs.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out a comparison; return 1 for a plan that cannot be used or a run that failed."""
    arguments = build_parser().parse_args(argv)
    try:
        return compare(arguments.plan, arguments.out.absolute(), dry_run=arguments.dry_run)
    except (EvaluationError, LaunchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def compare(plan_file: Path, out: Path, *, dry_run: bool = False) -> int:
    """Carry out the comparison of a plan and write its results.

    Raises:
        EvaluationError: The plan cannot be used, or a run failed.
    """
    import shlex

    from megatron_profit.evaluation.comparison.plan import read_plan
    from megatron_profit.evaluation.comparison.runs import carry_out
    from megatron_profit.evaluation.comparison.tables import report
    from megatron_profit.launch.hub import local_folder

    plan = read_plan(plan_file, partial(local_folder, flag="base"))
    if dry_run:
        for unit in (unit for units in plan.schedule() for unit in units):
            print(shlex.join(plan.train_command(unit.run, Path("HF"), Path("METRICS"))))
            for name in unit.evaluations:
                command = plan.evaluate_command(unit.run.data, name, Path("HF"), Path("OUT"))
                print(shlex.join(command))
        return 0

    def publish(outcomes: Sequence[Outcome], done: int, total: int) -> None:
        write_results(out, outcomes, plan.text, done, total)

    gpus = _visible_gpus() if plan.jobs > 1 else []
    with _held(out):
        outcomes = carry_out(plan, out, read_run, partial(print, flush=True), publish, gpus)
    print(f"\n{report(outcomes)}\nwrote {out}")
    return 0


def _visible_gpus() -> list[str]:
    """Return the names of the visible GPUs, as CUDA_VISIBLE_DEVICES has them.

    Raises:
        LaunchError: There is a driver, but torch cannot ask it.
    """
    from megatron_profit.launch.machine import this_machine

    number = len(this_machine().gpus)
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(gpu) for gpu in range(number)])[:number]


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    """Make the folder of results, and keep other comparisons out of it inside the block.

    Raises:
        EvaluationError: It cannot be made, or another comparison is writing there.
    """
    check_out(out)
    with contextlib.ExitStack() as held:
        try:
            out.mkdir(parents=True, exist_ok=True)
            is_locked = held.enter_context(lock_file(out / LOCK, patience=0))
        except BlockingIOError as error:
            raise EvaluationError(
                f"--out {out}: another comparison is writing there; wait for it, or give another --out"
            ) from error
        except (ConversionError, OSError) as error:
            raise EvaluationError(f"--out {out} cannot be used: {error}") from error
        if not is_locked:
            warn(
                f"{out} is on a file system without locks; a second comparison is not kept out of it"
            )
        yield


def write_results(
    out: Path, outcomes: Sequence[Outcome], plan: str, finished: int, runs: int
) -> None:
    """Write results.json, results.md and the figure of what there is so far.

    Args:
        out: Folder to write them to.
        outcomes: The results so far, the base's included.
        plan: Text of the plan.
        finished, runs: How many parts there are and will be: runs with their evaluations in one stage.
    """
    from megatron_profit.evaluation.comparison.runs import results_text
    from megatron_profit.evaluation.comparison.tables import draw_comparison, report

    out.mkdir(parents=True, exist_ok=True)
    partly = "" if finished == runs else f"{finished} of {runs} parts are finished.\n\n"
    contents = {
        "results.json": results_text(outcomes, plan, finished, runs),
        "results.md": partly + report(outcomes),
    }
    for name, content in contents.items():
        with whole_file(out / name) as stream:
            stream.write(content.encode())
    draw_comparison(outcomes, out / "figure.png")


def read_run(file: Path) -> Mapping[str, Curve]:
    """Return the curves of a metrics file; an evaluation's have "validation" after their names."""
    from megatron_profit.commands.plot_run import read_curves

    return read_curves(file)


if __name__ == "__main__":
    sys.exit(main())
