"""Run the whole job on this machine, without a GPU and without a download: `make quickstart`.

A small Qwen3 learns to add numbers in words; `make quickstart MODEL=qwen3.5` takes another family that
tools/make_tiny_model.py knows. The model needs a base first. A model with random weights gives every token a
small probability, so ProFit, which keeps the tokens above a threshold, would train none.
The answers of the second file open and close with varied phrases, which the base finds improbable.
ProFit drops the phrases and trains the sums. The steps are a real run's, with the same commands (they
are printed):

 1. make a Qwen3 with random weights and a tokenizer of its own, as a HuggingFace folder
 2. plain SFT from random weights, which makes the base model
 3. export the base to HuggingFace
 4. convert HuggingFace -> Megatron, as for a downloaded model
 5. ProFit on two processes with tensor parallelism, interrupted half-way
 6. the same command again: it resumes from its checkpoint
 7. export the result to HuggingFace
 8. for comparison, plain SFT on the same answers, from one HuggingFace folder into another
 9. load the models with transformers and answer questions that were not in the training data
10. draw the curves

The results of each step are kept, so a second start continues where the first ended. If the command of
a step has changed since, this step and all later ones are redone. `steps.json` in the output folder
remembers the commands. Remove the folder to start afresh after a change of code or data.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = Path("examples/data")
BASE_DATA, PROFIT_DATA = DATA / "arithmetic_base.jsonl", DATA / "arithmetic_chatty.jsonl"
HELD_OUT = DATA / "arithmetic_heldout.jsonl"
FAMILY = "qwen3"
# Answers to held-out questions that are printed for each model.
SHOWN = 4

PYTHON = sys.executable
# Lines that a command prints for a reader.
TELLING = ("wrote", "error", "megatron-profit-sft: error", "> train data", "megatron_profit:")
TRAIN = [
    *(PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    *("-m", "megatron_profit.sft", "--device", "cpu"),  # two processes would share one GPU
]
SETTINGS = [
    # Rows of 40 positions hold one sum each, so there are no records to pack.
    *(
        "--seq-length",
        "40",
        "--micro-batch-size",
        "16",
        "--global-batch-size",
        "32",
        "--no-packing",
    ),
    *("--lr-decay-style", "cosine", "--lr-warmup-fraction", "0.1", "--adam-beta2", "0.95"),
    *("--weight-decay", "0.1", "--clip-grad", "1.0", "--valid-data", str(HELD_OUT)),
]


@dataclass(frozen=True)
class Step:
    """A command and its result."""

    title: str
    result: Path
    command: Sequence[str]
    resumes: bool = False  # continues in the result of the step before

    def __str__(self) -> str:
        return shlex.join("python" if part == PYTHON else part for part in self.command)


@dataclass(frozen=True)
class Quickstart:
    """The steps that write files, in order.

    Raises:
        ValueError: A number of steps that cannot be trained, or ProFit steps that have no half.
    """

    out: Path
    base_steps: int
    profit_steps: int
    family: str = FAMILY

    def __post_init__(self) -> None:
        if self.base_steps < 1:
            raise ValueError(f"--base-steps is {self.base_steps}; it must be at least 1")
        if self.profit_steps < 2 or self.profit_steps % 2:
            raise ValueError(
                f"--profit-steps is {self.profit_steps}; it must be even and at least 2, "
                "because the run is interrupted half-way"
            )

    @property
    def tiny(self) -> Path:
        return self.out / "tiny"

    @property
    def base(self) -> Path:
        return self.out / "base"

    @property
    def base_hf(self) -> Path:
        return self.out / "base-hf"

    @property
    def base_megatron(self) -> Path:
        return self.out / "base-megatron"

    @property
    def profit(self) -> Path:
        return self.out / "profit"

    @property
    def profit_hf(self) -> Path:
        return self.out / "profit-hf"

    @property
    def sft_hf(self) -> Path:
        return self.out / "sft-hf"

    @property
    def sft_metrics(self) -> Path:
        return self.out / "sft.jsonl"

    @property
    def figure(self) -> Path:
        return self.out / "curves.png"

    def steps(self) -> list[Step]:
        """Return the steps, from the random model to the exported result."""
        interrupt = ["--exit-interval", str(self.profit_steps // 2)]
        return [
            Step(f"1. a small {self.family} with random weights", self.tiny, self.make_tiny()),
            Step("2. plain SFT makes the base", self.base, self.train_base()),
            Step(
                "3. the base as a HuggingFace folder",
                self.base_hf,
                export(self.base, self.tiny, self.base_hf),
            ),
            Step("4. HuggingFace -> Megatron", self.base_megatron, self.convert_base()),
            Step(
                "5. ProFit with TP 2, interrupted",
                self.profit,
                [*self.train_profit(), *interrupt],
            ),
            Step(
                "6. ProFit, resumed from its checkpoint",
                self.profit,
                self.train_profit(),
                resumes=True,
            ),
            Step(
                "7. the result as a HuggingFace folder",
                self.profit_hf,
                export(self.profit, self.base_hf, self.profit_hf),
            ),
            Step("8. plain SFT on the same answers", self.sft_hf, self.train_sft()),
        ]

    def make_tiny(self) -> list[str]:
        data = sorted(str(file) for file in DATA.glob("*.jsonl"))
        family = [] if self.family == FAMILY else ["--family", self.family]
        make = [PYTHON, "tools/make_tiny_model.py", "--out", str(self.tiny)]
        return [*make, *family, "--data", *data]

    def train_base(self) -> list[str]:
        return [
            *TRAIN,
            *("--hf-model", str(self.tiny), "--random-init", "--data", str(BASE_DATA)),
            *("--objective", "sft", "--lr", "4e-3", "--min-lr", "4e-4"),
            *("--train-iters", str(self.base_steps)),
            *("--eval-interval", str(max(1, self.base_steps // 2))),
            *("--save", str(self.base), "--tensorboard-dir", str(self.base / "tensorboard")),
            *SETTINGS,
        ]

    def convert_base(self) -> list[str]:
        convert = [PYTHON, "-m", "checkpoint_conversion.hf_to_megatron"]
        return [*convert, "--hf", str(self.base_hf), "--out", str(self.base_megatron)]

    def train_profit(self) -> list[str]:
        return [
            *self._train_on_phrases("profit"),
            *("--prob-threshold", "0.1", "--threshold-direction", "higher"),
            *("--pretrained-checkpoint", str(self.base_megatron)),
            *("--save-interval", str(self.profit_steps // 2)),
            *("--load", str(self.profit), "--save", str(self.profit)),
            *("--tensorboard-dir", str(self.profit / "tensorboard")),
        ]

    def train_sft(self) -> list[str]:
        results = ["--export-hf", str(self.sft_hf), "--metrics-file", str(self.sft_metrics)]
        return [*self._train_on_phrases("sft"), *results]

    def _train_on_phrases(self, objective: str) -> list[str]:
        return [
            *TRAIN,
            *("--hf-model", str(self.base_hf), "--data", str(PROFIT_DATA)),
            *("--objective", objective, "--tensor-model-parallel-size", "2", "--sequence-parallel"),
            *("--lr", "5e-4", "--min-lr", "5e-5", "--train-iters", str(self.profit_steps)),
            *("--eval-interval", str(self.profit_steps // 2)),
            *SETTINGS,
        ]

    def draw(self) -> Step:
        runs = {"base (SFT)": self.base, "ProFit": self.profit, "SFT": self.sft_metrics}
        labelled = [f"{label}={run}" for label, run in runs.items()]
        command = [PYTHON, "tools/plot_run.py", "--out", str(self.figure), *labelled]
        return Step("10. the curves", self.figure, command)


def export(run: Path, template: Path, out: Path) -> list[str]:
    """Return the command that exports a run to HuggingFace."""
    command = [PYTHON, "-m", "checkpoint_conversion.megatron_to_hf", "--megatron", str(run)]
    return [*command, "--hf-template", str(template), "--out", str(out)]


@dataclass(frozen=True)
class Finished:
    """The commands of the steps that succeeded, in order, kept in a file of the output folder.

    Raises:
        ValueError: Another program wrote the folder, so its files must not be removed.
    """

    file: Path

    def __post_init__(self) -> None:
        folder = self.file.parent
        folder.mkdir(parents=True, exist_ok=True)
        if not self.file.exists():
            if any(folder.iterdir()):
                raise ValueError(
                    f"{folder} is not empty and has no {self.file.name}, so its files are not known "
                    "to be a quickstart's: remove it, or name another folder with --out"
                )
            self.write([])

    def read(self) -> list[str]:
        """Return the commands of the steps that are done; none if the file was damaged."""
        try:
            commands = json.loads(self.file.read_text(encoding="utf-8"))
        except ValueError:
            return []
        return commands if isinstance(commands, list) else []

    def write(self, commands: Sequence[str]) -> None:
        beside = self.file.with_name(f".{self.file.name}.partial")
        beside.write_text(json.dumps(commands, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.file)

    def count(self, steps: Sequence[Step]) -> int:
        """Return how many of the first steps need not run again.

        Such a step has the same command, and its result is there. A step that resumes is redone
        together with the step before, whose checkpoint may not be the newest any more.
        """
        kept = 0
        for step, command in zip(steps, self.read(), strict=False):
            if str(step) != command or not step.result.exists():
                break
            kept += 1
        return kept - (kept < len(steps) and steps[kept].resumes)


def main() -> None:
    """Parse the command line, run the steps, and ask the models."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for all that is written (default: runs/quickstart, with the name of another family)",
    )
    parser.add_argument(
        "--family", default=FAMILY, help="of tools/make_tiny_model.py; default: %(default)s"
    )
    parser.add_argument("--base-steps", type=int, default=160, help="default: %(default)s")
    parser.add_argument("--profit-steps", type=int, default=150, help="default: %(default)s")
    arguments = parser.parse_args()
    suffix = "" if arguments.family == FAMILY else f"-{arguments.family}"
    out = (arguments.out or REPOSITORY / f"runs/quickstart{suffix}").absolute()
    os.chdir(REPOSITORY)
    if out.is_relative_to(REPOSITORY):
        out = out.relative_to(REPOSITORY)
    try:
        plan = Quickstart(out, arguments.base_steps, arguments.profit_steps, arguments.family)
        finished = Finished(out / "steps.json")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes on two cores
    sys.path.insert(0, "tools")

    start = time.monotonic()
    carry_out(plan.steps(), finished)
    title("9. questions that were not in the training data")
    models = {"base": plan.base_hf, "ProFit": plan.profit_hf, "SFT": plan.sft_hf}
    scores = {name: ask(folder) for name, folder in models.items()}
    execute(plan.draw())
    summary(plan, scores, time.monotonic() - start)


def carry_out(steps: Sequence[Step], finished: Finished) -> None:
    """Run the steps from the first that is not done yet, or was done with another command."""
    kept = finished.count(steps)
    for step in steps[:kept]:
        title(step.title)
        print(f"   kept from an earlier start: {step.result}")
    finished.write([str(step) for step in steps[:kept]])
    results = dict.fromkeys(step.result for step in steps[kept:])
    remove([result for result in results if result.exists()])
    for number, step in enumerate(steps[kept:], kept + 1):
        execute(step)
        finished.write([str(step) for step in steps[:number]])


def remove(results: Sequence[Path]) -> None:
    """Remove the results of an earlier start, with their logs."""
    if results:
        title("left by an earlier start that was other than this one, or did not end")
    for result in results:
        print(f"   removing {result}", flush=True)
        shutil.rmtree(result)
        log_of(result).unlink(missing_ok=True)


def execute(step: Step) -> None:
    """Run a step's command; show its progress, and of its output only the lines with results and errors."""
    title(step.title)
    print(f"   $ {step}".replace("python", os.path.relpath(PYTHON), 1), flush=True)
    progress = Progress(step)
    for line in run(step.command, log_of(step.result)):
        progress.show()
        if line.startswith(TELLING):
            print(f"   {line}", flush=True)
    progress.show()


class Progress:
    """What a training writes into its metrics file: one training step in ten per cent, and evaluations."""

    def __init__(self, step: Step) -> None:
        flags = dict(zip(step.command, step.command[1:], strict=False))
        self.steps = int(flags.get("--train-iters", 0))
        self.file = Path(flags.get("--metrics-file", step.result / "metrics.jsonl"))
        self.at = self.file.stat().st_size if self.file.exists() else 0

    def show(self) -> None:
        """Print what was written since the last call."""
        if not self.file.exists():
            return
        with self.file.open("rb") as file:
            file.seek(self.at)
            lines = file.read().splitlines(keepends=True)
        for line in lines:
            if line.endswith(b"\n"):
                self.at += len(line)
                self._show(json.loads(line))

    def _show(self, record: dict) -> None:
        step = record["step"]
        if record["kind"] == "evaluation":
            print(f"   held out        {metrics(record)}", flush=True)
        elif record["kind"] == "train" and (step == 1 or step % max(1, self.steps // 10) == 0):
            print(f"   step {step:>4}/{self.steps}  {metrics(record)}", flush=True)


def log_of(result: Path) -> Path:
    """Return the log file of a result."""
    return result.with_name(f"{result.name}.log")


def title(text: str) -> None:
    """Print the title of a step."""
    print(f"\n== {text}", flush=True)


def metrics(record: dict) -> str:
    """Return the metrics of a training step or an evaluation, in short form."""
    shown = {"objective": "objective", "lm loss": "cross-entropy", "kept fraction": "kept"}
    shown |= {"mean p kept": "p kept", "mean p dropped": "p dropped"}
    found = {label: record.get(name) for name, label in shown.items()}
    return "  ".join(f"{label} {value:.3f}" for label, value in found.items() if value is not None)


def run(command: Sequence[str], log: Path) -> Iterator[str]:
    """Yield the output of a command, which also goes to `log`; end this process if the command fails."""
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            yield line.rstrip()
    if process.wait():
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-30:])
        sys.exit(f"{tail}\nthe command failed; all that it printed is in {log}")


def ask(folder: Path) -> tuple[int, int, int, int]:
    """Answer the held-out questions with transformers, print a few, and count.

    Returns:
        Four numbers: the answers with the right sum, those that open with a phrase, those that stop by
        themselves, and all answers.
    """
    import torch
    from make_arithmetic_data import OPENINGS, numbers_in
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()  # it would advise to install kernels of GPUs
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with HELD_OUT.open(encoding="utf-8") as lines:
        records = [json.loads(line)["messages"] for line in lines]
    inputs = tokenizer.apply_chat_template(
        [record[:-1] for record in records],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    written = output[:, inputs.input_ids.size(1) :]
    stops = torch.tensor(model.generation_config.eos_token_id)
    stopped = int(torch.isin(written, stops).any(dim=1).sum())
    answers = tokenizer.batch_decode(written, skip_special_tokens=True)
    right = [
        numbers_in(answer)[-1:] == numbers_in(record[-1]["content"])[-1:]
        for record, answer in zip(records, answers, strict=True)
    ]
    print(f"   {folder.name}:")
    for record, answer, is_right in list(zip(records, answers, right, strict=True))[:SHOWN]:
        print(f"     {record[0]['content']}  ->  {answer}  [{'right' if is_right else 'wrong'}]")
    opened = sum(answer.startswith(OPENINGS) for answer in answers)
    return sum(right), opened, stopped, len(records)


def summary(plan: Quickstart, scores: dict[str, tuple[int, int, int, int]], seconds: float) -> None:
    """Print the scores, and where the results are."""
    title(f"done in {seconds:.0f} s")
    for name, (right, opened, stopped, total) in scores.items():
        print(
            f"   {name:<7} {right} of {total} right, {opened} open with a phrase before the answer, "
            f"{stopped} stop by themselves"
        )
    for what, where in (
        ("HuggingFace model after ProFit", plan.profit_hf),
        ("its Megatron checkpoints and TensorBoard", plan.profit),
        ("HuggingFace model after plain SFT", plan.sft_hf),
        ("the base, HuggingFace and Megatron", f"{plan.base_hf}, {plan.base_megatron}"),
        ("curves", plan.figure),
        ("everything that the steps printed", plan.out / "*.log"),
    ):
        print(f"   {what + ':':<42} {where}")
    print(f"   start afresh with: rm -rf {plan.out}")


if __name__ == "__main__":
    main()
