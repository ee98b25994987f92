"""Train one base with several objectives, learning rates, ranks and seeds, and evaluate all of them.

    megatron-profit compare plan.yaml --out runs/comparison

The plan is one file:

    base: models/Qwen3-0.6B-Base
    train: --data gsm8k_train.jsonl --data-columns prompt=question response=answer --seq-length 1024
      --micro-batch-size 2 --global-batch-size 8 --train-iters 200
    evaluate: --tasks gsm8k,ifeval --data data/eval
    objectives:
      sft: --objective sft
      profit 0.1: --objective profit --prob-threshold 0.1 --threshold-direction higher
    learning_rates: [1e-5, 5e-6]    # optional, --lr
    lora_ranks: [0, 16]             # optional, --lora-rank; 0 trains all weights
    seeds: [1, 2, 3]

Further keys: data (name: {train: flags, evaluate: flags}, for several data sets), processes (of a training),
jobs (trainings at a time), keep_models. Finished runs are kept, so that an interrupted comparison goes on. It
writes results.json, results.md and figure.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpoint_conversion.cli import FlagHelp
from checkpoint_conversion.engine.output import whole_file
from megatron_profit.evaluation.errors import EvaluationError


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
    except EvaluationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def compare(plan_file: Path, out: Path, *, dry_run: bool = False) -> int:
    """Carry out the comparison of a plan and write its results.

    Raises:
        EvaluationError: The plan cannot be used, or a run failed.
    """
    import shlex
    from dataclasses import asdict

    from megatron_profit.evaluation.comparison.plan import read_plan
    from megatron_profit.evaluation.comparison.runs import carry_out
    from megatron_profit.evaluation.comparison.tables import draw_comparison, table

    plan = read_plan(plan_file)
    if dry_run:
        for run in plan.runs():
            print(shlex.join(plan.train_command(run, Path("HF"), Path("METRICS"))))
            print(shlex.join(plan.evaluate_command(run.data, Path("HF"), Path("OUT"))))
        return 0
    outcomes = carry_out(plan, out, last_metrics, lambda line: print(line, flush=True))
    report = {"plan": plan_file.read_text(), "results": [asdict(o) for o in outcomes]}
    text = table(outcomes)
    for name, content in (
        ("results.json", json.dumps(report, indent=1) + "\n"),
        ("results.md", text),
    ):
        with whole_file(out / name) as stream:
            stream.write(content.encode())
    draw_comparison(outcomes, out / "figure.png")
    print(f"\n{text}\nwrote {out}")
    return 0


def last_metrics(file: Path) -> dict[str, float]:
    """Return the last values of a metrics file; an evaluation's have "validation" after their names."""
    from megatron_profit.commands.plot_run import read_curves

    return {name: values[-1] for name, (_, values) in read_curves(file).items()}


if __name__ == "__main__":
    sys.exit(main())
