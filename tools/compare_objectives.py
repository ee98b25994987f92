r"""Train the same base with several objectives and seeds, and compare the answers to held-out questions.

    python tools/compare_objectives.py --out runs/comparison          # the quickstart's model and data
    python tools/compare_objectives.py --out runs/gsm8k --base Qwen3-0.6B-Base --seeds 1 2 3 \
        --setting gsm8k=train.jsonl,test.jsonl --data-columns prompt=question response=answer \
        --answer-pattern '-?[0-9][0-9,.]*' \
        --run "sft=--objective sft" --run "dft=--objective dft" \
        --train "--seq-length 1024 --micro-batch-size 2 --global-batch-size 8 --train-iters 200 --lr 1e-5"

A run is one (setting, objective, seed): a training with the real entry, an export, and greedy answers
of the exported model. An answer is right when its last match of the pattern equals the reference
answer's. With --lora-ranks, each objective is trained with adapters of each rank. Finished
runs are kept, so that an interrupted comparison continues. It writes results.json,
results.md and figure.png.

Without --base the quickstart's base is made first, and there are three settings. `phrases` is the
quickstart's data, whose answers are wrapped in chatty phrases. `errors` is the same data with a third
of the sums wrong. `new skill` is differences, which the base has never seen, with the sums as the skill
it should not forget.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from threading import Lock
from typing import Any
from zlib import crc32

import make_arithmetic_data

from megatron_profit.training.monitoring.metrics_file import read_metrics

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
# The name of a run with adapters ends in their rank.
_RANK = ", rank "
SETTING_FORM = "NAME=DATA,HELD_OUT[,KNOWN]"
WRONG_SHARE = 1 / 3
WORDINGS = 6  # of each held-out sum
ANSWERS_AT_A_TIME = 64
TRAIN = (
    "--seq-length 40 --no-packing --micro-batch-size 32 --global-batch-size 32 --train-iters 150 "
    "--lr 5e-4 --min-lr 5e-5 --lr-decay-style cosine --lr-warmup-fraction 0.1 --adam-beta2 0.95 "
    "--weight-decay 0.1 --clip-grad 1.0"
)


# Loading a model sets process-wide defaults for a moment.
_ONE_MODEL_AT_A_TIME = Lock()


class ComparisonError(RuntimeError):
    """The comparison cannot go on; the message says why."""


@dataclass(frozen=True)
class Setting:
    """Chat files: training data, held-out questions like them, and questions that the base already knows."""

    data: Path
    held_out: Path
    known: Path | None = None


@dataclass(frozen=True)
class Result:
    """The results of one run.

    Attributes:
        accuracy: share of the held-out questions that are answered right.
        retained: the same share of the questions that the base already knew; None if the setting has
            none.
        cross_entropy: of the held-out answers, in nats per token, by the training entry.
        kept: share of the supervised tokens that was trained in the last step.
        length: mean characters of an answer to a held-out question.
    """

    setting: str
    run: str
    seed: int
    accuracy: float
    retained: float | None
    cross_entropy: float
    kept: float
    length: float


@dataclass(frozen=True)
class Plan:
    """The comparison to make; the fields are the command's options."""

    out: Path
    base: Path
    settings: dict[str, Setting]
    runs: dict[str, str]
    seeds: tuple[int, ...]
    train: str
    columns: tuple[str, ...]
    answer_pattern: str
    max_new_tokens: int
    processes: int
    jobs: int

    def folder(self, setting: str, run: str, seed: int) -> Path:
        """Return the folder that a run writes to.

        Its name ends in a digest of everything that decides the result, except the code.
        """
        files, place = self.settings[setting], (setting, run, str(seed))
        parts = [*place, self.runs[run], self.train, *self.columns, self.answer_pattern]
        parts += [str(self.max_new_tokens), str(self.processes)]
        for file in (files.data, files.held_out, files.known):
            parts.append("" if file is None else hashlib.sha256(file.read_bytes()).hexdigest())
        for file in sorted(self.base.iterdir()):  # weights may be large: size and time must suffice
            parts.append(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}")
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
        return self.out / "runs" / "-".join(re.sub(r"\W+", "_", part) for part in (*place, digest))

    def command(self, setting: str, run: str, seed: int, export: Path) -> list[str]:
        """Return the training command of one run, which exports its last weights."""
        files = self.settings[setting]
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
        return [
            sys.executable,
            *((*torchrun, str(self.processes)) if self.processes > 1 else ()),
            *("-m", "megatron_profit.sft"),
            *("--hf-model", str(self.base), "--data", str(files.data)),
            *("--valid-data", str(files.held_out), "--eval-interval", "1000000"),
            *(("--data-columns", *self.columns) if self.columns else ()),
            *("--seed", str(seed), "--export-hf", str(export)),
            *shlex.split(self.train),
            *shlex.split(self.runs[run]),
        ]


def compare(plan: Plan) -> list[Result]:
    """Carry out all runs, `plan.jobs` at a time; those that are finished are read."""
    wanted = [(s, r, seed) for seed in plan.seeds for s in plan.settings for r in plan.runs]
    start, done = time.monotonic(), 0

    def one(place: tuple[str, str, int]) -> Result:
        nonlocal done
        result = read_or_make(plan, *place)
        done += 1
        minutes = (time.monotonic() - start) / 60
        print(
            f"{done:>3} of {len(wanted)}  {minutes:5.1f} min  {result.setting:<9} {result.run:<20} "
            f"seed {result.seed}  accuracy {result.accuracy:.3f}",
            flush=True,
        )
        return result

    with ThreadPoolExecutor(plan.jobs) as pool:
        return list(pool.map(one, wanted))


def read_or_make(plan: Plan, setting: str, run: str, seed: int) -> Result:
    """Return a run's result, which is read if the same run has finished before.

    Raises:
        ComparisonError: a command failed.
    """
    folder = plan.folder(setting, run, seed)
    finished = folder / "result.json"
    if finished.exists():
        return read_result(finished)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = plan.command(setting, run, seed, folder / "hf")
    execute([*command, "--metrics-file", str(folder / "metrics.jsonl")], folder / "train.log")
    with _ONE_MODEL_AT_A_TIME:
        accuracy, retained, length = examine(plan, setting, folder / "hf")
    result = Result(
        setting=setting,
        run=run,
        seed=seed,
        accuracy=accuracy,
        retained=retained,
        cross_entropy=last_metric(folder / "metrics.jsonl", "evaluation", "lm loss"),
        kept=last_metric(folder / "metrics.jsonl", "train", "kept fraction"),
        length=length,
    )
    shutil.rmtree(folder / "hf")
    write_result(finished, result)
    return result


def write_result(file: Path, result: Result) -> None:
    """Write a result to a file, with a checksum."""
    values = json.dumps(asdict(result))
    write_whole(file, json.dumps({"crc32": f"{crc32(values.encode()):08x}", "result": values}))


def read_result(file: Path) -> Result:
    """Read a result that was kept.

    Raises:
        ComparisonError: the file was changed since it was written.
    """
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["crc32"] != f"{crc32(kept['result'].encode()):08x}":
            raise ValueError("its checksum differs")
        return Result(**json.loads(kept["result"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ComparisonError(
            f"{file} is damaged ({error}); remove it, and its run is trained again"
        ) from error


def execute(command: Sequence[str], log: Path) -> None:
    """Run a command, whose output goes to `log`.

    Raises:
        ComparisonError: the command failed.
    """
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(
            command, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    if code:
        lines = log.read_text(encoding="utf-8").splitlines()
        tail = "\n".join([x for x in lines if "error: " in x] or lines[-15:])
        raise ComparisonError(f"{shlex.join(command)}\nfailed ({log}):\n{tail}")


def last_metric(file: Path, kind: str, name: str) -> float:
    """Return the last value of a metric in a run's metrics file; NaN if there is none."""
    records = [record for record in read_metrics(file) if record["kind"] == kind]
    values = [record[name] for record in records if record.get(name) is not None]
    return values[-1] if values else math.nan


def examine(plan: Plan, setting: str, folder: Path) -> tuple[float, float | None, float]:
    """Return a model's accuracy on held-out and on known questions, and the mean length of its answers."""
    files = plan.settings[setting]
    accuracy, length = answer(plan, files.held_out, folder)
    retained = None if files.known is None else answer(plan, files.known, folder)[0]
    return accuracy, retained, length


def answer(plan: Plan, file: Path, folder: Path) -> tuple[float, float]:
    """Return a model's share of right answers to the questions, and their mean length in characters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **local)
    # Its config.json comes from the base, and may name kernels of somebody's repository.
    model = AutoModelForCausalLM.from_pretrained(
        folder, use_safetensors=True, attn_implementation="sdpa", **local
    ).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    questions, _ = questions_in(file, plan.columns, plan.answer_pattern)
    texts: list[str] = []
    for start in range(0, len(questions), ANSWERS_AT_A_TIME):
        inputs = tokenizer.apply_chat_template(
            [question.messages for question in questions[start : start + ANSWERS_AT_A_TIME]],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=plan.max_new_tokens, do_sample=False)
        new = output[:, inputs.input_ids.size(1) :]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    right = [
        final_answer(text, plan.answer_pattern) == question.expected
        for text, question in zip(texts, questions, strict=True)
    ]
    return mean(right), mean(map(len, texts))


@dataclass(frozen=True)
class Question:
    """Messages that ask, and the final answer of the reference."""

    messages: list[dict[str, Any]]
    expected: str


def questions_in(file: Path, columns: Sequence[str], pattern: str) -> tuple[list[Question], int]:
    """Return the records as questions, and how many are broken or end without an answer.

    Raises:
        ComparisonError: a reference answer has no match of the pattern, or no record can be used.
        DataError: the file cannot be read, or its first record is in no known format.
    """
    from megatron_profit.data import BrokenRecord, ColumnMapping, normalise, read_records
    from megatron_profit.data.chat.conversations import is_read

    layout, questions, unusable = ColumnMapping.of_columns(columns), [], 0
    for record in read_records(file, wanted=is_read(layout)):
        try:
            *asked, reference = normalise(record, layout).messages
        except BrokenRecord:
            unusable += 1
            continue
        if reference["role"] != "assistant":
            unusable += 1
            continue
        expected = final_answer(reference["content"], pattern)
        if expected is None:
            raise ComparisonError(
                f"{record.where}: --answer-pattern {pattern!r} matches nothing in the reference answer "
                f"{reference['content'][-100:]!r}; correct the pattern or remove the record"
            )
        questions.append(Question(asked, expected))
    if not questions:
        raise ComparisonError(f"{file}: none of {unusable} records can be used as a question")
    return questions, unusable


def check_questions(plan: Plan) -> None:
    """Read all questions before the first model is loaded, and report which records are not asked."""
    for setting in plan.settings.values():
        for file in filter(None, (setting.held_out, setting.known)):
            questions, unusable = questions_in(file, plan.columns, plan.answer_pattern)
            if unusable:
                total = len(questions) + unusable
                print(f"{file}: {unusable} of {total} records cannot be used", file=sys.stderr)


def final_answer(text: str, pattern: str) -> str | None:
    """Return the last match of the pattern (its group if it has a single one), without case and commas.

    For example, the pattern `-?[0-9][0-9,.]*` finds "1234" in "So it is 1,234.".
    """
    found = list(re.finditer(pattern, text, re.IGNORECASE))
    if not found:
        return None
    return (
        found[-1].group(1 if found[-1].re.groups == 1 else 0).lower().replace(",", "").rstrip(".")
    )


def quickstart_base(out: Path) -> Path:
    """Return the HuggingFace folder of the quickstart's base model, which is trained if it is missing."""
    sys.path.append(str(REPOSITORY / "examples"))
    import quickstart

    plan = quickstart.Quickstart(out / "base", base_steps=160, profit_steps=2)
    quickstart.carry_out(plan.steps()[:3], quickstart.Finished(plan.out / "steps.json"))
    return plan.base_hf


def quickstart_settings(folder: Path) -> dict[str, Setting]:
    """Write the files of the three settings of the quickstart's base, and return the settings."""
    base, chatty, held_out = (
        make_arithmetic_data.generate()[f"arithmetic_{name}"]
        for name in ("base", "chatty", "heldout")
    )
    sums = make_arithmetic_data.in_other_words(held_out, WORDINGS)
    turned = make_arithmetic_data.as_differences
    contents = {
        "phrases": (chatty, sums, None),
        "errors": (make_arithmetic_data.with_wrong_sums(chatty, WRONG_SHARE), sums, None),
        "new skill": (turned(base + chatty), distinct(turned(sums)), sums),
    }
    folder.mkdir(parents=True, exist_ok=True)
    settings = {}
    for name, (data, questions, known) in contents.items():
        stem = name.replace(" ", "_")
        parts = {"train": data, "heldout": questions, "known": known}
        files = {
            part: folder / f"{stem}_{part}.jsonl" for part, records in parts.items() if records
        }
        for part, file in files.items():
            write_whole(file, "".join(json.dumps(record) + "\n" for record in parts[part] or ()))
        settings[name] = Setting(files["train"], files["heldout"], files.get("known"))
    return settings


def distinct(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records, the last one of each question."""
    return list({record["messages"][0]["content"]: record for record in records}.values())


@dataclass(frozen=True)
class Measure:
    """A column of the table and a panel of the figure: one share of right answers in one setting."""

    setting: str
    field: str  # of Result: accuracy or retained

    def __str__(self) -> str:
        return self.setting if self.field == "accuracy" else f"{self.setting}: what it knew"

    def of(self, results: Sequence[Result], run: str) -> list[float]:
        """Return one value for each seed."""
        return [
            getattr(r, self.field) for r in results if (r.setting, r.run) == (self.setting, run)
        ]


def measures_of(results: Sequence[Result]) -> list[Measure]:
    """Return the measures that the results hold, in their order."""
    return list(
        dict.fromkeys(
            Measure(result.setting, name)
            for result in results
            for name in ("accuracy", "retained")
            if getattr(result, name) is not None
        )
    )


def names_of_runs(results: Sequence[Result]) -> list[str]:
    """Return the names of the runs, in their order."""
    return list(dict.fromkeys(result.run for result in results))


def with_ranks(runs: Mapping[str, str], ranks: Sequence[int]) -> dict[str, str]:
    """Return each run with adapters of each rank; the runs themselves without ranks."""
    if not ranks:
        return dict(runs)
    return {
        f"{name}{_RANK}{rank}": f"{flags} --lora-rank {rank}"
        for name, flags in runs.items()
        for rank in ranks
    }


def ranks_of(results: Sequence[Result]) -> dict[str, dict[int, str]]:
    """Return the run of each objective and rank; empty unless all runs have adapters."""
    found: dict[str, dict[int, str]] = {}
    for run in names_of_runs(results):
        name, separator, rank = run.rpartition(_RANK)
        if not (separator and rank.isdecimal()):
            return {}
        found.setdefault(name, {})[int(rank)] = run
    return found


def table(results: Sequence[Result], base: Mapping[Measure, float]) -> str:
    """Return the results as Markdown: right answers of each objective in each setting, then other numbers."""
    measures = measures_of(results)
    lines = [row("objective", *measures), "|---" * (1 + len(measures)) + "|"]
    lines.append(row("the base", *(mean_and_spread([base[measure]]) for measure in measures)))
    lines += [
        row(run, *(mean_and_spread(measure.of(results, run)) for measure in measures))
        for run in names_of_runs(results)
    ]
    lines += [
        "",
        row("data", "objective", "held-out cross-entropy", "kept at the end", "characters"),
    ]
    lines.append("|---" * 5 + "|")
    for setting in dict.fromkeys(result.setting for result in results):
        for run in names_of_runs(results):
            group = [r for r in results if (r.setting, r.run) == (setting, run)]
            cross_entropy = mean(r.cross_entropy for r in group)
            kept, length = mean(r.kept for r in group), mean(r.length for r in group)
            lines.append(
                row(setting, run, f"{cross_entropy:.3f}", f"{100 * kept:.0f} %", f"{length:.0f}")
            )
    return "\n".join(lines) + "\n"


def row(*cells: object) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def mean_and_spread(values: Sequence[float]) -> str:
    """Return the mean, and the standard deviation of a sample if there are several."""
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread} %"


def draw_figure(results: Sequence[Result], base: Mapping[Measure, float], file: Path) -> None:
    """Draw a panel for each measure: a dot for each seed, a bar at the mean, a line at the base."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measures, runs = measures_of(results), names_of_runs(results)
    figure, axes = plt.subplots(
        1,
        len(measures),
        figsize=(1.6 + 2.8 * len(measures), 1.2 + 0.36 * len(runs)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axis, measure in zip(axes[0], measures, strict=True):
        for y, run in enumerate(reversed(runs)):
            values = [100 * value for value in measure.of(results, run)]
            axis.plot([mean(values)] * 2, [y - 0.3, y + 0.3], color="#b3261e", lw=2, zorder=3)
            axis.scatter(values, [y] * len(values), s=22, color="#0550ae", alpha=0.65, zorder=4)
        axis.axvline(100 * base[measure], color="#57606a", ls="--", lw=1)
        axis.set_yticks(range(len(runs)), list(reversed(runs)))
        axis.set_xlim(-4, 104)
        axis.set_title(str(measure), fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    figure.supxlabel("answers right, % (a dot a seed, bar: mean, dashed: the base)", fontsize=10)
    figure.tight_layout()
    beside = file.with_name(f".{file.name}")
    figure.savefig(beside, dpi=150, format="png")
    plt.close(figure)
    beside.replace(file)


def draw_ranks(results: Sequence[Result], base: Mapping[Measure, float], file: Path) -> None:
    """Draw a panel for each measure: a line for each objective over the ranks of its adapters."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measures, ranks = measures_of(results), ranks_of(results)
    figure, axes = plt.subplots(
        1, len(measures), figsize=(1.6 + 3.4 * len(measures), 3.4), sharey=True, squeeze=False
    )
    for axis, measure in zip(axes[0], measures, strict=True):
        for name, runs in ranks.items():
            means = [100 * mean(measure.of(results, run)) for run in runs.values()]
            axis.plot(list(runs), means, marker="o", label=name)
        axis.axhline(100 * base[measure], color="#57606a", ls="--", lw=1)
        axis.set_xscale("log", base=2)
        axis.set_title(str(measure), fontsize=10)
        axis.set_xlabel("rank of the adapters", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("answers right, % (dashed: the base)", fontsize=9)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    unfinished = file.with_name(f".{file.name}")
    figure.savefig(unfinished, dpi=150, format="png")
    plt.close(figure)
    unfinished.replace(file)


def write_whole(path: Path, text: str) -> None:
    """Write a temporary file in the same folder, then rename it."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def named(kind: str, read: Callable[[str], Any]) -> Callable[[str], tuple[str, Any]]:
    """Return an argparse type for NAME=VALUE."""

    def parse(text: str) -> tuple[str, Any]:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise argparse.ArgumentTypeError(f"{text!r} is not of the form {kind}")
        return name, read(value)

    return parse


def flags(text: str) -> str:
    """Check a text of flags that a shell could read; an argparse type."""
    shlex.split(text)
    return text


def chat_files(text: str) -> Setting:
    """Parse two or three existing files; an argparse type."""
    files = [existing(part).absolute() for part in text.split(",")]
    if len(files) not in (2, 3):
        raise argparse.ArgumentTypeError(f"{text!r} are not two or three files with commas between")
    return Setting(*files)


def existing(text: str) -> Path:
    """Parse a path that has to be there; an argparse type."""
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return Path(text)


def read_plan(argv: Sequence[str] | None) -> Plan:
    """Parse the command line; without --base, make the quickstart's base."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder for all that is written")
    add(
        "--base",
        type=existing,
        metavar="DIR",
        help="HuggingFace folder (default: the quickstart's base)",
    )
    add(
        "--setting",
        action="append",
        type=named(SETTING_FORM, chat_files),
        metavar=SETTING_FORM,
        help="chat files to train on, to ask from, and to ask what the base knows already; may be repeated",
    )
    add(
        "--run",
        action="append",
        type=named("NAME=FLAGS", flags),
        metavar="NAME=FLAGS",
        help="an objective as flags of the training entry; may be repeated (default: "
        f"{', '.join(RUNS)})".replace("%", "%%"),
    )
    add(
        "--lora-ranks",
        type=int,
        nargs="+",
        default=[],
        metavar="R",
        help="train adapters of each of these ranks in place of all weights",
    )
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    add(
        "--train",
        default=TRAIN,
        metavar="FLAGS",
        help="flags that all runs share (default: the quickstart's)",
    )
    add(
        "--data-columns",
        nargs="+",
        default=[],
        metavar="NAME=COLUMN",
        help="which column of the files is which, as in training, e.g. prompt=question response=answer",
    )
    add(
        "--answer-pattern",
        metavar="REGEX",
        help="its last match is the answer (default: a number in words)",
    )
    add("--max-new-tokens", type=int, default=40)
    add("--processes", type=int, default=1, help="processes of one training (default: 1)")
    add("--jobs", type=int, default=2, help="trainings at a time (default: 2)")
    arguments = parser.parse_args(argv)
    if bool(arguments.base) != bool(arguments.setting):
        parser.error(
            "--base and --setting go together: the quickstart's base knows only its own data"
        )
    if arguments.base and not arguments.answer_pattern:
        parser.error("--base needs --answer-pattern, which finds the answer in a text")
    out = arguments.out.absolute()
    return Plan(
        out=out,
        base=arguments.base.absolute() if arguments.base else quickstart_base(out),
        settings=dict(arguments.setting or quickstart_settings(out / "data").items()),
        runs=with_ranks(dict(arguments.run or RUNS.items()), arguments.lora_ranks),
        seeds=tuple(arguments.seeds),
        train=arguments.train,
        columns=tuple(arguments.data_columns),
        answer_pattern=arguments.answer_pattern or make_arithmetic_data.NUMBER.pattern,
        max_new_tokens=arguments.max_new_tokens,
        processes=arguments.processes,
        jobs=arguments.jobs,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out the comparison and write its results; return the exit code."""
    from transformers.utils.logging import disable_progress_bar

    from megatron_profit.data import DataError

    disable_progress_bar()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # several trainings share the cores
    os.chdir(REPOSITORY)
    plan = read_plan(argv)
    base: dict[Measure, float] = {}
    try:
        check_questions(plan)
        for setting in plan.settings:
            accuracy, retained, _ = examine(plan, setting, plan.base)
            base[Measure(setting, "accuracy")] = accuracy
            if retained is not None:
                base[Measure(setting, "retained")] = retained
        results = compare(plan)
    except (ComparisonError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = table(results, base)
    report: dict[str, Any] = {"base": {str(measure): share for measure, share in base.items()}}
    report |= {"train": plan.train, "runs": plan.runs, "results": [asdict(r) for r in results]}
    write_whole(plan.out / "results.json", json.dumps(report, indent=1) + "\n")
    write_whole(plan.out / "results.md", text)
    draw = draw_ranks if ranks_of(results) else draw_figure
    draw(results, base, plan.out / "figure.png")
    print(f"\n{text}\nwrote {plan.out}/results.json, results.md and figure.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
