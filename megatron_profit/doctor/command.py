"""Examine machine, model and data before a training, and compare Megatron's loss with transformers'.

    megatron-profit doctor
    megatron-profit doctor --model Qwen/Qwen3-0.6B-Base --data chats.jsonl

The flags are the ones of `megatron-profit sft`. The exit code is 1 if there is a fault.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint_conversion.errors import ConversionError, printable
from megatron_profit.doctor import data_checks, machine_checks
from megatron_profit.doctor.findings import Finding, Verdict, examined, note
from megatron_profit.recipe.errors import LaunchError
from megatron_profit.recipe.flags import FlagTable
from megatron_profit.recipe.request import Request, front_parser, read_request

if TYPE_CHECKING:
    from megatron_profit.launch.prepare import Launch

_RUNS = Path("runs")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings; return 1 if one is a fault, 2 for flags that cannot be used."""
    words = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(words):
        print(f"usage: megatron-profit doctor [flags of megatron-profit sft]\n\n{__doc__.strip()}")
        return 0
    verdicts = set()
    try:
        for finding in findings(words):
            print(finding, flush=True)
            verdicts.add(finding.verdict)
    except (LaunchError, ConversionError) as error:
        print(f"megatron-profit doctor: error: {printable(error)}", file=sys.stderr)
        return 2
    faulty = Verdict.FAULT in verdicts
    print("there is a fault" if faulty else "no fault was found", flush=True)
    return int(faulty)


def findings(words: Sequence[str]) -> Iterator[Finding]:
    """Yield the findings on what a command line names.

    Raises:
        LaunchError: The flags cannot be used.
    """
    parser = front_parser()
    front, rest = parser.parse_known_args(list(words))
    given = FlagTable().parse(rest, parser._option_string_actions)
    is_run = front.config is not None or "data" in given
    request = read_request(words) if is_run else None
    yield from examined("software", machine_checks.check_software)
    yield from examined("GPU", machine_checks.check_gpus)
    yield from examined("memory", machine_checks.check_memory)
    if request is not None:
        yield from _of_run(request)
    elif front.model is not None:
        day = given["template_date"].value if "template_date" in given else None
        yield from _of_model(front.model, front.chat_template, day)
        yield note("data", "none were named; --data FILE examines them and the loss")
    else:
        yield from examined("disk", lambda: machine_checks.check_disk(_RUNS, {}, 1))
        yield note("model", "none was named; --model ID --data FILE examines them and the loss")


def _of_model(name: str, template: str | None, day: str | None) -> Iterator[Finding]:
    """Yield the findings on a model, with the chat template and the day that the flags give, if they do."""
    from megatron_profit.launch.chat_template import with_template
    from megatron_profit.launch.hub import find_model

    folder = find_model(name)
    yield from examined("model", lambda: data_checks.check_model(folder))
    with tempfile.TemporaryDirectory() as temporary:

        def tokenizer() -> Iterator[Finding]:
            place = folder
            if template is not None:
                place = with_template(folder, template, Path(temporary))
            yield from data_checks.check_tokenizer(place, day)

        yield from examined("tokenizer", tokenizer)


def _of_run(request: Request) -> Iterator[Finding]:
    """Yield the findings on a run: folder, model, data, and mathematics at its layout."""
    from megatron_profit.launch.prepare import prepare
    from megatron_profit.launch.run_folder import folder_of

    run, nodes = folder_of(request), request.most_nodes
    template, day = request.front.chat_template, request.value("template_date")
    yield from _of_model(request.model, template, day)
    launches: list[Any] = []

    def layout() -> Iterator[Finding]:
        launches.append(prepare(request))
        yield note("layout", "\n".join(launches[0].lines))

    yield from examined("layout", layout)
    if not launches:
        yield from examined("disk", lambda: machine_checks.check_disk(run.path, {}, nodes))
        return
    (launch,) = launches
    values = {request.table.dest(flag.option): flag.value for flag in launch.flags}
    model = Path(values["hf_model"])
    for flag, place, needed in _needed(values, launch):
        check = partial(machine_checks.check_disk, place, needed, nodes, flag)
        yield from examined("disk", check)
    if "load" in values:
        load = Path(values["load"])
        yield from examined("checkpoint", lambda: data_checks.check_checkpoints(load, model))
    train = _training_data({**request.table.defaults, **values}, model)
    yield from examined("data", lambda: data_checks.check_data(train, model))
    if nodes > 1:
        yield note("mathematics", "compared on one node only: give the flags without --nnodes")
        return
    from megatron_profit.doctor.mathematics import check_mathematics

    yield from examined("mathematics", lambda: check_mathematics(launch, train))


def _needed(values: dict[str, Any], launch: Launch) -> Iterator[tuple[str, Path, dict[str, int]]]:
    """Yield the run's folder, and folders outside of it that it writes to.

    Each comes with the flag that names it, and the bytes that are still to be written there: checkpoints, a
    new one next to the kept ones, and the export. For example, a resumed run that keeps two and has one needs
    room for two.
    """
    from megatron_profit.training.checkpoints.folder import saved_in

    weights = 2 if values.get("bf16") or values.get("fp16") else 4
    kept, save = int(values.get("keep_last", 2)), Path(values.get("save") or "")
    there = len(saved_in(save)) if values.get("save") and save.is_dir() else 0
    parts = (
        ("--save", "checkpoints", (max(kept - there, 0) + 1) * launch.checkpoint),
        ("--export-hf", "export", weights * launch.parameters),
    )
    run, own, others = launch.run.path, dict[str, int](), []
    for flag, name, size in parts:
        place = values.get(launch.request.table.dest(flag))
        if place is not None and Path(place).absolute().is_relative_to(run.absolute()):
            own[name] = size
        elif place is not None:
            others.append((flag, Path(place), {name: size}))
    yield "--run", run, own
    yield from others


def _training_data(settings: dict[str, Any], model: Path) -> Any:
    """Return the training data as the run has them, validation records aside."""
    from megatron_profit.data import DataOptions, build_sets

    settings = {**settings, "valid_data": None, "valid_split": None}
    return build_sets(DataOptions.from_flags(settings), model)["train"]
