"""The whole job on this machine, without a GPU and without a download: `make quickstart`.

A small Qwen3 learns to add numbers in words. It needs a base first: a model with random weights gives
every token a small probability, so ProFit, which keeps the tokens above a threshold, would train nothing.
The answers of the second file open and close with varied phrases, which the base finds improbable: ProFit
drops them and trains the sums. The steps are those of a real run, with the same commands (they are printed):

 1. make a Qwen3 with random weights and a tokenizer of its own, as a HuggingFace folder
 2. plain SFT from random weights, which makes the base model
 3. export the base to HuggingFace
 4. convert HuggingFace -> Megatron, as one does with a downloaded model
 5. ProFit on two processes with tensor parallelism, interrupted half-way
 6. the same command again: it resumes from its checkpoint
 7. export the result to HuggingFace
 8. load it with transformers and answer questions that were not in the training data
 9. draw the curves

What a step has written is kept, so a second start continues where the first ended.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = Path("examples/data")
RUNS = Path("runs/quickstart")
TINY, BASE_RUN, BASE_HF = RUNS / "tiny", RUNS / "base", RUNS / "base-hf"
BASE_MEGATRON, PROFIT_RUN, PROFIT_HF = RUNS / "base-megatron", RUNS / "profit", RUNS / "profit-hf"
FIGURE = RUNS / "curves.png"

BASE_STEPS, PROFIT_STEPS = 160, 150
BASE_DATA, PROFIT_DATA = DATA / "arithmetic_base.jsonl", DATA / "arithmetic_chatty.jsonl"
HELD_OUT = DATA / "arithmetic_heldout.jsonl"

TRAINING = [
    *("--seq-length", "40", "--micro-batch-size", "16", "--global-batch-size", "32"),
    *("--lr-decay-style", "cosine", "--lr-warmup-fraction", "0.1", "--adam-beta2", "0.95"),
    *("--weight-decay", "0.1", "--clip-grad", "1.0", "--valid-data", str(HELD_OUT)),
]


def torchrun(processes: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(processes), "-m", "megatron_profit.sft"]


def module(name: str) -> list[str]:
    return [sys.executable, "-m", name]


def base_command() -> list[str]:
    return [
        *torchrun(2),
        *("--hf-model", str(TINY), "--random-init", "--data", str(BASE_DATA)),
        *("--objective", "sft", "--lr", "4e-3", "--min-lr", "4e-4"),
        *("--train-iters", str(BASE_STEPS), "--eval-interval", str(BASE_STEPS // 2)),
        *("--save", str(BASE_RUN), "--tensorboard-dir", str(BASE_RUN / "tensorboard")),
        *TRAINING,
    ]


def profit_command() -> list[str]:
    return [
        *torchrun(2),
        *("--hf-model", str(BASE_HF), "--pretrained-checkpoint", str(BASE_MEGATRON)),
        *("--data", str(PROFIT_DATA), "--objective", "profit"),
        *("--prob-threshold", "0.1", "--threshold-direction", "higher"),
        *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
        *("--lr", "5e-4", "--min-lr", "5e-5"),
        *("--train-iters", str(PROFIT_STEPS), "--eval-interval", str(PROFIT_STEPS // 2)),
        *("--save-interval", str(PROFIT_STEPS // 2)),
        *("--load", str(PROFIT_RUN), "--save", str(PROFIT_RUN)),
        *("--tensorboard-dir", str(PROFIT_RUN / "tensorboard")),
        *TRAINING,
    ]


def main() -> None:
    os.chdir(REPOSITORY)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes on two cores
    sys.path.insert(0, "tools")
    start = time.monotonic()
    RUNS.mkdir(parents=True, exist_ok=True)
    tool = [sys.executable, "tools/make_tiny_model.py"]
    data = sorted(str(file) for file in DATA.glob("*.jsonl"))
    step("1. a small Qwen3 with random weights", TINY, [*tool, "--out", str(TINY), "--data", *data])
    train("2. plain SFT makes the base", BASE_RUN, BASE_STEPS, base_command())
    step("3. the base as a HuggingFace folder", BASE_HF, export_command(BASE_RUN, TINY, BASE_HF))
    convert = [*module("checkpoint_conversion.hf_to_megatron"), "--hf", str(BASE_HF)]
    step("4. HuggingFace -> Megatron", BASE_MEGATRON, [*convert, "--out", str(BASE_MEGATRON)])
    interrupted = [*profit_command(), "--exit-interval", str(PROFIT_STEPS // 2)]
    train("5. ProFit with TP 2, interrupted", PROFIT_RUN, PROFIT_STEPS // 2, interrupted)
    train("6. ProFit, resumed from its checkpoint", PROFIT_RUN, PROFIT_STEPS, profit_command())
    step(
        "7. the result as a HuggingFace folder",
        PROFIT_HF,
        export_command(PROFIT_RUN, BASE_HF, PROFIT_HF),
    )
    title("8. questions that were not in the training data")
    scores = {name: ask(folder) for name, folder in (("base", BASE_HF), ("ProFit", PROFIT_HF))}
    draw = [sys.executable, "tools/plot_run.py", "--out", str(FIGURE)]
    runs = [f"base (SFT)={BASE_RUN / 'tensorboard'}", f"ProFit={PROFIT_RUN / 'tensorboard'}"]
    step("9. the curves", FIGURE, [*draw, *runs])
    summary(scores, time.monotonic() - start)


def export_command(run: Path, template: Path, out: Path) -> list[str]:
    command = [*module("checkpoint_conversion.megatron_to_hf"), "--megatron", str(run)]
    return [*command, "--hf-template", str(template), "--out", str(out)]


def title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def show(command: Sequence[str]) -> None:
    python = os.path.relpath(sys.executable)
    print(
        "   $ " + " ".join(python if part == sys.executable else part for part in command),
        flush=True,
    )


def step(text: str, result: Path, command: Sequence[str]) -> None:
    """Run a command unless its result is there already."""
    title(text)
    if result.exists():
        print(f"   kept from an earlier start: {result}")
        return
    show(command)
    for line in run(command, RUNS / f"{result.name}.log"):
        if line.startswith(("error", "wrote")):
            print(f"   {line}")


def train(text: str, folder: Path, steps: int, command: Sequence[str]) -> None:
    """Train until the checkpoint of `steps`, showing one line of progress in twenty."""
    title(text)
    if saved_steps(folder) >= steps:
        print(f"   kept from an earlier start: {folder}")
        return
    show(command)
    every = max(1, steps // 10)
    for line in run(command, RUNS / f"{folder.name}.log"):
        if found := re.search(r"iteration +(\d+)/ *(\d+) \|", line):
            if int(found[1]) % every == 0 or int(found[1]) == 1:
                print(f"   step {found[1]:>4}/{found[2]}  {metrics(line)}", flush=True)
        elif "validation loss at iteration" in line:
            print(f"   held out        {metrics(line)}", flush=True)
        elif line.startswith(
            ("error", "megatron-profit-sft: error", "> train data", "megatron_profit:")
        ):
            print(f"   {line}", flush=True)


def saved_steps(folder: Path) -> int:
    """The step of the newest checkpoint in `folder`, 0 without one."""
    tracker = folder / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.is_file() else 0


def metrics(line: str) -> str:
    shown = {"objective": "objective", "lm loss": "cross-entropy", "kept fraction": "kept"}
    shown |= {"mean p kept": "p kept", "mean p dropped": "p dropped"}
    parts = []
    for name, label in shown.items():
        if found := re.search(rf"\| {name}(?: value)?: (\S+) ", line):
            parts.append(f"{label} {float(found[1]):.3f}")
    return "  ".join(parts)


def run(command: Sequence[str], log: Path) -> Iterator[str]:
    """Yield what a command prints, which also goes to `log`; end this process where it fails."""
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for line in process.stdout:
            file.write(line)
            yield line.rstrip()
    if process.wait():
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-30:])
        sys.exit(f"{tail}\nthe command failed; all that it printed is in {log}")


def ask(folder: Path, shown: int = 4) -> tuple[int, int, int]:
    """Answer the held-out questions with transformers, print a few, and count.

    Returns:
        How many answers give the right sum, how many open with a phrase, and how many there are.
    """
    import torch
    from make_arithmetic_data import OPENINGS, numbers_in
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder)
    records = [json.loads(line)["messages"] for line in HELD_OUT.read_text().splitlines()]
    inputs = tokenizer.apply_chat_template(
        [record[:-1] for record in records],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    answers = tokenizer.batch_decode(
        output[:, inputs.input_ids.size(1) :], skip_special_tokens=True
    )
    right = [
        numbers_in(answer)[-1:] == numbers_in(record[-1]["content"])[-1:]
        for record, answer in zip(records, answers, strict=True)
    ]
    print(f"   {folder.name}:")
    for record, answer, is_right in list(zip(records, answers, right, strict=True))[:shown]:
        print(f"     {record[0]['content']}  ->  {answer}  [{'right' if is_right else 'wrong'}]")
    return sum(right), sum(answer.startswith(OPENINGS) for answer in answers), len(records)


def summary(scores: dict[str, tuple[int, int, int]], seconds: float) -> None:
    title(f"done in {seconds:.0f} s")
    for name, (right, opened, total) in scores.items():
        print(
            f"   {name:<7} {right} of {total} right, {opened} open with a phrase before the answer"
        )
    for what, where in (
        ("HuggingFace model after ProFit", PROFIT_HF),
        ("its Megatron checkpoints and TensorBoard", PROFIT_RUN),
        ("the base, HuggingFace and Megatron", f"{BASE_HF}, {BASE_MEGATRON}"),
        ("curves", FIGURE),
        ("everything that the steps printed", RUNS / "*.log"),
    ):
        print(f"   {what + ':':<42} {where}")
    print(f"   start afresh with: rm -rf {RUNS} && make quickstart")


if __name__ == "__main__":
    main()
