"""From a command line to a run that is ready to start: model, data, layout, flags."""

from __future__ import annotations

import contextlib
import datetime
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpoint_conversion.hf.folder import read_hf_config
from checkpoint_conversion.model_card.base import HubId
from megatron_profit.data.options import DataOptions, check_first_records
from megatron_profit.estimates.run_shape import model_arguments
from megatron_profit.estimates.saving import describe_save
from megatron_profit.flags import ArgumentsError, flag_of
from megatron_profit.launch import hub
from megatron_profit.launch.chat_template import has_template, with_template
from megatron_profit.launch.derive import (
    Intervals,
    Model,
    derived_flags,
    objective_defaults,
    save_interval,
)
from megatron_profit.launch.machine import Machine, this_machine
from megatron_profit.launch.plan_layout import (
    PlannedLayout,
    check_processes,
    checkpoint_of,
    parameters_of,
    plan_layout,
    slow_warning,
    wish_of_flags,
)
from megatron_profit.launch.processes import launcher, tell
from megatron_profit.launch.records import (
    Lengths,
    PreparedRows,
    prepare_rows,
    row_length,
    rows_of_step,
    sample_lengths,
)
from megatron_profit.launch.run_folder import RunFolder, folder_of
from megatron_profit.recipe.check import check_command_line
from megatron_profit.recipe.config_file import as_config
from megatron_profit.recipe.errors import LaunchError
from megatron_profit.recipe.flags import Given, words_of
from megatron_profit.recipe.request import Request
from megatron_profit.training.step.objective_flags import objective_of

# Flags whose values follow from --model and --run, and are left out of a file for --config.
_FOLLOWING = (
    *("hf_model", "base_model_id", "load", "save", "export_hf", "tensorboard_dir", "metrics_file"),
    "quiet",
)
# Flags that are about one start. A file for --config that repeats them would replace the run, or go back.
_OF_ONE_START = ("overwrite", "ckpt_step")


@dataclass(frozen=True)
class Launch:
    """A run that is ready to start.

    Attributes:
        request: The command line.
        machine: The machine here.
        run: The run's folder.
        flags: All flags of the training.
        torchrun: Torchrun's words before them.
        processes: Processes of this node.
        rows: Rows of a step.
        parameters: Parameters of the model.
        checkpoint: Bytes of a checkpoint.
        lines: What to tell about it.
    """

    request: Request
    machine: Machine
    run: RunFolder
    flags: Sequence[Given]
    torchrun: Sequence[str]
    processes: int
    rows: int
    parameters: int
    checkpoint: int
    lines: Sequence[str]

    @property
    def words(self) -> list[str]:
        """The words of the torchrun command, without its name."""
        return [*self.torchrun, *words_of(self.flags)]

    @property
    def config(self) -> str:
        """The run as the text of a file for --config."""
        given, table = self.request.given, self.request.table
        flags = []
        for flag in self.flags:
            dest = table.dest(flag.option) if flag.option in table.options else flag.option
            if dest not in _OF_ONE_START and (dest not in _FOLLOWING or dest in given):
                flags.append(given.get(dest, flag))
        unset: tuple[Any, ...] = (None, [], "1", "auto", False, 0)
        front = {
            flag_of(name): value
            for name, value in vars(self.request.front).items()
            if name not in ("model", "config", "dry_run", "run") and value not in unset
        }
        return as_config(self.request.model, flags, {"--run": str(self.run.path), **front}, table)


def prepare(request: Request) -> Launch:
    """Return what a command line starts.

    Raises:
        LaunchError, ConversionError, DataError: Something cannot be used; the message says what to do.
    """
    run = folder_of(request)
    if not request.front.dry_run:
        run.check_place()
    _check_objective(request)
    folder = hub.find_model(request.model, weights=not request.front.dry_run)
    config = read_hf_config(folder)
    architecture = model_arguments(config)
    model = Model(folder, architecture, parameters_of(architecture))
    data = _find_data(request)
    settings = _data_settings(request, data, model.positions)
    check_first_records(DataOptions.from_flags(settings))  # before imports that take long
    machine = this_machine(look_for_gpus=request.value("device") != "cpu")
    check_processes(request, machine)
    with _with_template(request, model, run) as tokenizer:
        planned, rows = _fit(request, model, settings, tokenizer, machine, run)
    template = _template_line(request, folder)
    if request.front.chat_template is not None:
        known = HubId.of_path(folder)
        base_id = None if known is None else str(known)
        model = replace(model, folder=run.path / tokenizer.name, base_id=base_id)
    steps = _steps(request, rows.rows, planned.rows)
    step_seconds = planned.row_seconds * planned.rows
    checkpoint = checkpoint_of(request, model.architecture, planned.on_gpus, planned.flags)
    saved_every = save_interval(step_seconds, steps, checkpoint)
    intervals = Intervals.of(request, steps, saved_every)
    flags = derived_flags(request, model, data, planned, run, intervals)
    ranks = planned.processes * request.nodes
    check_command_line(words_of(flags), ranks, "cuda" if planned.on_gpus else "cpu", config)
    return Launch(
        request=request,
        machine=machine,
        run=run,
        flags=flags,
        torchrun=launcher(request, planned.processes, run),
        processes=planned.processes,
        rows=planned.rows,
        parameters=model.parameters,
        checkpoint=checkpoint,
        lines=[
            *template,
            *_lines(model, planned, rows, steps),
            *_saves(request, intervals.save, checkpoint),
        ],
    )


def _find_data(request: Request) -> dict[str, list[str]]:
    """Return the paths of the data. The hub's files are downloaded; names of dataset_info.json stay."""
    named = {n: list(request.value(n)) for n in ("data", "valid_data") if n in request.given}
    if "dataset_info" in request.given:
        return named
    return {name: list(map(hub.find_data, paths)) for name, paths in named.items()}


def _check_objective(request: Request) -> None:
    """Refuse options of the objective before anything that takes long."""
    table, given = request.table, dict(request.given)
    if table.has_outside_objective(given):
        return
    for option, value in objective_defaults(request).items():
        given.setdefault(table.dest(option), Given.of(option, value))
    flags = table.command_line(given)
    try:
        objective_of({**flags.defaults, **flags.given}, flags.given)
    except ArgumentsError as error:
        raise LaunchError(str(error)) from error


def _data_settings(
    request: Request, data: Mapping[str, list[str]], seq_length: int
) -> dict[str, Any]:
    """Return the arguments for `DataOptions.from_flags`."""
    return {**request.table.defaults, **request.values, **data, "seq_length": seq_length}


@contextlib.contextmanager
def _with_template(request: Request, model: Model, run: RunFolder) -> Iterator[Path]:
    """Give the folder of a model with its chat template to the block; a dry run leaves none."""
    template = request.front.chat_template
    if template is None:
        yield model.folder
    elif request.front.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            yield with_template(model.folder, template, Path(folder))
    else:
        yield with_template(model.folder, template, run.path)


def _template_line(request: Request, folder: Path) -> list[str]:
    """Return a line where --chat-template takes the place of a model's own template.

    For example, the recipes of Llama's bases name one, and the instruct model of the same size has its own.
    """
    template = request.front.chat_template
    if template is None or not has_template(folder):
        return []
    return [
        f"chat template: {template} takes the place of the model's own, also in the export; without "
        "--chat-template (chat_template in a file) the model keeps it"
    ]


def _fit(
    request: Request,
    model: Model,
    settings: Mapping[str, Any],
    tokenizer: Path,
    machine: Machine,
    run: RunFolder,
) -> tuple[PlannedLayout, PreparedRows]:
    """Return layout and prepared data, for rows in which the records and the GPUs' memory fit."""
    limit, packing = model.positions, request.value("packing")
    remembered = run.remembered(request)
    given = {**remembered, **request.given}
    told = given["seq_length"].value if "seq_length" in given else None
    options = DataOptions.from_flags(settings)

    def rows_for(lengths: Lengths, seq_length: int) -> tuple[PlannedLayout, PreparedRows]:
        planned = planned_rows(request, remembered, model, lengths, seq_length, machine)
        prepared = prepare_rows({**settings, "seq_length": planned.seq_length}, tokenizer, tell)
        return planned, prepared

    lengths = sample_lengths(options, tokenizer, limit)
    seq_length = told or row_length(lengths, limit, packing)
    planned, prepared = rows_for(lengths, seq_length)
    if told or planned.seq_length < seq_length or prepared.fit or seq_length >= limit:
        return planned, prepared
    # A record that the first ones did not tell of is longer.
    lengths = sample_lengths(options, tokenizer, limit, all_records=True, progress=tell)
    longer = row_length(lengths, limit, packing)
    return rows_for(lengths, longer) if longer > seq_length else (planned, prepared)


def planned_rows(
    request: Request,
    remembered: Mapping[str, Given],
    model: Model,
    lengths: Lengths,
    seq_length: int,
    machine: Machine,
) -> PlannedLayout:
    """Return the layout of a run, and the rows of its step.

    A run to be resumed is planned as at its start, so that it has the same layout on the same GPUs. On
    others, it keeps what is remembered of it, and the layout follows.

    Args:
        request: The command line.
        remembered: Flags that a run to be resumed was started with; none for a new run.
        model: The model.
        lengths: Lengths of the records.
        seq_length: Positions of a row.
        machine: The machine here.
    """
    may_shorten = "seq_length" not in {**remembered, **request.given}
    usual = rows_of_step(lengths, seq_length, request.value("packing"))

    def plan(given: Mapping[str, Given]) -> PlannedLayout:
        batch = given.get("global_batch_size")
        rows = batch.value if batch is not None else _divisor_of_batches(given)
        exact = rows is not None
        wish = wish_of_flags(given, model.architecture, seq_length, rows or usual, exact)
        return plan_layout(request, wish, machine, may_shorten)

    planned = plan(request.given)
    is_as_before = all(
        planned.flags.get(name, False) == flag.value
        for name, flag in remembered.items()
        if name != "seq_length"
    )
    return planned if is_as_before else plan({**remembered, **request.given})


def _divisor_of_batches(given: Mapping[str, Given]) -> int | None:
    """Return the largest number that divides all batch sizes of a schedule; None without one.

    For example, it is 8 for `--step-batch-size-schedule "0:8 1000:24"`.
    """
    if "step_batch_size_schedule" not in given:
        return None
    entries = given["step_batch_size_schedule"].value.replace(",", " ").split()
    sizes = [entry.rpartition(":")[2] for entry in entries]
    if not all(map(str.isdecimal, sizes)):  # Megatron reads 1K too, and refuses other texts
        return None
    return math.gcd(*map(int, sizes)) or None


def _saves(request: Request, steps: int, nbytes: int) -> list[str]:
    """Return a line about the run's checkpoints, if it writes any."""
    if "--save" in request.front.without:
        return []
    return [f"checkpoints: every {steps:,} steps; one takes {describe_save(nbytes)}"]


def _steps(request: Request, rows: int, rows_of_a_step: int) -> int:
    """Return the steps of the run, near enough for intervals."""
    if "train_iters" in request.given:
        return request.value("train_iters")
    if "train_samples" in request.given:
        return max(1, request.value("train_samples") // rows_of_a_step)
    return max(1, math.ceil(rows * (request.value("epochs") or 1) / rows_of_a_step))


def _lines(model: Model, planned: PlannedLayout, rows: PreparedRows, steps: int) -> list[str]:
    """Return what to tell about the run."""
    seconds = steps * planned.rows * planned.row_seconds
    records = rows.records * planned.rows / max(rows.rows, 1)
    lines = [f"model: {model}", f"data: {rows.summary}", *planned.lines]
    about = datetime.timedelta(seconds=60 * math.ceil(seconds / 60))
    length = f"length: {steps:,} steps of {planned.rows} rows, about {records:.0f} records each"
    if planned.on_gpus and seconds:
        length += f"; about {about} by the estimates, on GPUs like the H100"
    lines.append(length)
    if rows.cut:
        lines.append(
            f"warning: {rows.cut:,} records are longer than a row of {planned.seq_length:,} positions and "
            f"lose their end (the longest has {rows.longest:,} tokens); --seq-length sets the positions"
        )
    if rows.too_long:
        lines.append(
            f"warning: {rows.too_long:,} records are left out, as a row of {planned.seq_length:,} positions "
            "is too short for them; --seq-length sets the positions"
        )
    return [*lines, *slow_warning(planned, steps)]
