r"""Compare objectives on the quickstart's model and data: the plan of docs/comparison.md, carried out.

    python tools/compare_objectives.py --out runs/comparison

It makes the quickstart's base, writes the data of three settings and `plan.yaml`, and calls
`megatron-profit compare`, which compares other models and data by a plan of your own.

`phrases` is the quickstart's data, whose answers are wrapped in chatty phrases. `errors` is the same data
with a third of the sums wrong. `new skill` is differences, which the base has never seen, with the sums as
the skill that it should not forget.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import make_arithmetic_data
import yaml

from checkpoint_conversion.engine.output import whole_file
from megatron_profit.commands import compare

REPOSITORY = Path(__file__).resolve().parents[1]
RUNS = {
    "sft": "--objective sft",
    "profit 0.1": "--objective profit --prob-threshold 0.1 --threshold-direction higher",
    "profit 0.5": "--objective profit --prob-threshold 0.5 --threshold-direction higher",
    "profit < 0.5": "--objective profit --prob-threshold 0.5 --threshold-direction lower",
    "dft": "--objective dft",
    "eaft": "--objective eaft",
    "entropy 20 %": "--objective entropy --keep-fraction 0.2",
    "sft, then profit 0.1": "--objective profit --prob-threshold 0.1 --threshold-direction higher "
    "--objective-warmup-steps 75",
    "psft": "--objective psft",
}
SETTINGS = ("phrases", "errors", "new skill")
WRONG_SHARE = 1 / 3
WORDINGS = 6  # of each held-out sum
TRAIN = (
    "--seq-length 40 --no-packing --micro-batch-size 32 --global-batch-size 32 --train-iters 150 "
    "--min-lr 5e-5 --lr-decay-style cosine --lr-warmup-fraction 0.1 --adam-beta2 0.95 "
    "--weight-decay 0.1 --clip-grad 1.0 --eval-interval 1000000"
)
_RATE = " --lr 5e-4"
EVALUATE = "--engine transformers --batch 64 --dtype float32 --max-new-tokens 40"


def quickstart_base(out: Path) -> Path:
    """Return the HuggingFace folder of the quickstart's base model, which is trained if it is missing."""
    sys.path.append(str(REPOSITORY / "examples"))
    import quickstart

    plan = quickstart.Quickstart(out / "base", base_steps=160, profit_steps=2)
    quickstart.carry_out(plan.steps()[:3], quickstart.Finished(plan.out / "steps.json"))
    return plan.base_hf


def write_data(folder: Path) -> dict[str, dict[str, str]]:
    """Write the files of the three settings; return their entries in the plan."""
    base, chatty, held_out = (
        make_arithmetic_data.generate()[f"arithmetic_{name}"]
        for name in ("base", "chatty", "heldout")
    )
    sums = make_arithmetic_data.in_other_words(held_out, WORDINGS)
    turned = make_arithmetic_data.as_differences
    contents = {
        "phrases": (chatty, {"sums": sums}),
        "errors": (make_arithmetic_data.with_wrong_sums(chatty, WRONG_SHARE), {"sums": sums}),
        "new skill": (
            turned(base + chatty),
            {"differences": distinct(turned(sums)), "what it knew": sums},
        ),
    }
    return {
        name: _entry(folder / name.replace(" ", "_"), data, asked)
        for name, (data, asked) in contents.items()
    }


def _entry(folder: Path, data: Sequence[Any], asked: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    """Write the files of one setting; return its flags."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "train.jsonl", data)
    held_out = next(iter(asked.values()))
    write_lines(folder / "valid.jsonl", held_out)
    tasks = []
    for name, records in asked.items():
        file = folder / f"{name.replace(' ', '_')}.jsonl"
        contents = [[message["content"] for message in record["messages"]] for record in records]
        write_lines(file, [{"question": text[0], "answer": text[-1]} for text in contents])
        tasks.append(f"--task-file '{file}'")
    return {
        "train": f"--data '{folder}/train.jsonl' --valid-data '{folder}/valid.jsonl'",
        "evaluate": " ".join(tasks),
    }


def write_lines(file: Path, records: Sequence[Any]) -> None:
    """Write records as JSON lines; an unchanged file keeps its time, so that its runs stay valid."""
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    if not file.exists() or file.read_bytes() != content:
        with whole_file(file) as stream:
            stream.write(content)


def distinct(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records, the last one of each question."""
    return list({record["messages"][0]["content"]: record for record in records}.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Write the plan and carry it out; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time (default: 2)")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="objectives")
    parser.add_argument(
        "--lora-ranks", type=int, nargs="+", default=[0], help="0 trains all weights (default: 0)"
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=SETTINGS,
        default=list(SETTINGS),
        help="data (default: all)",
    )
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", default=[], help="in place of 5e-4"
    )
    arguments = parser.parse_args(argv)
    os.chdir(REPOSITORY)
    out = arguments.out.absolute()
    data = write_data(out / "data")
    plan = {
        "base": str(quickstart_base(out)),
        "train": TRAIN + ("" if arguments.learning_rates else _RATE),
        "evaluate": f"{EVALUATE} --answer-pattern '{make_arithmetic_data.NUMBER.pattern}'",
        "objectives": {name: RUNS[name] for name in arguments.only},
        "data": {name: data[name] for name in arguments.settings},
        **({"learning_rates": arguments.learning_rates} if arguments.learning_rates else {}),
        "lora_ranks": arguments.lora_ranks,
        "seeds": arguments.seeds,
        "jobs": arguments.jobs,
    }
    with whole_file(out / "plan.yaml") as stream:
        stream.write(yaml.safe_dump(plan, sort_keys=False, width=100).encode())
    return compare.main([str(out / "plan.yaml"), "--out", str(out)])


if __name__ == "__main__":
    sys.exit(main())
