"""Model folder and data: weights, tokenizer, template, the trained part of records, the fill of the rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpoint_conversion.families import family_for
from checkpoint_conversion.hf.carried import description
from checkpoint_conversion.hf.folder import read_hf_config
from checkpoint_conversion.hf.model import open_hf_model
from checkpoint_conversion.hf.stop_tokens import plan_stop_tokens
from checkpoint_conversion.torch_dist.saved_arguments import check_checkpoint_matches
from megatron_profit.doctor.findings import Finding, fault, note, ok, warning

_RECORDS = 3
# Characters of a record that are shown.
_SHOWN = 600
_FULL = 0.5


def check_model(folder: Path) -> Iterator[Finding]:
    """Yield architecture and weights of a model folder."""
    config = read_hf_config(folder)
    family = family_for(config)
    model = family.megatron_arguments(config)
    yield ok(
        "model",
        f"{folder}: {family.architectures[0]}, {model['num_layers']} layers, hidden size "
        f"{model['hidden_size']}, rotary base {model['rotary_base']:,}, {model['max_position_embeddings']:,} "
        "positions",
    )
    opened = open_hf_model(folder)
    yield ok(
        "weights", f"all {len(opened.tensors)} tensors are there, in the shapes of config.json"
    )
    if opened.carried:
        yield note("other weights", description(opened.carried))


def check_checkpoints(checkpoints: Path, model: Path) -> Iterator[Finding]:
    """Yield whether the checkpoints of a run are of this model."""
    if not (checkpoints / "latest_checkpointed_iteration.txt").is_file():
        yield note(
            "checkpoint", f"{checkpoints} holds none; the run starts from the model's weights"
        )
        return
    check_checkpoint_matches(checkpoints, read_hf_config(model), model)
    yield ok("checkpoint", f"{checkpoints} is of this model; the run goes on from there")


def check_tokenizer(folder: Path, day: str | None = None) -> Iterator[Finding]:
    """Yield whether tokenizer and chat template can be used, and which token ends an answer.

    Args:
        folder: Folder of the model.
        day: The day that the template writes, as --template-date gives it.
    """
    from megatron_profit.data import ChatRenderer, load_tokenizer
    from megatron_profit.data.errors import DataError
    from megatron_profit.data.render.template_date import parse_day

    tokenizer = load_tokenizer(folder)
    yield ok("tokenizer", f"{type(tokenizer).__name__} with {len(tokenizer):,} tokens")
    try:
        end = ChatRenderer(tokenizer, day=parse_day(day)).markers.end_id
    except DataError as error:
        yield fault("template", f"{error}; or give one with --chat-template FILE")
        return
    if end is None:
        yield warning(
            "template",
            "the chat template ends a turn with ordinary text, so no token stops the trained model; end a "
            "turn with one of the tokenizer's special tokens (--chat-template FILE)",
        )
        return
    token = tokenizer.convert_ids_to_tokens(end)
    stops = plan_stop_tokens(folder, read_hf_config(folder), end)
    if stops.added is None:
        yield ok("template", f"a turn ends with {token} ({end}), at which generation stops")
    else:
        yield note(
            "template",
            f"a turn ends with {token} ({end}), which the model's files do not name as a stop; the export "
            "will",
        )


def check_data(train: Any, tokenizer_folder: Path) -> Iterator[Finding]:
    """Yield the report on the records, the fill of the rows, and the trained part of three records.

    Args:
        train: The `BuiltSet` of the training data.
        tokenizer_folder: Folder of the tokenizer.
    """
    report, packing = train.prepared.report, train.packing
    left_out = report.read - report.kept
    share = report.supervised_tokens / max(report.total_tokens, 1)
    text = (
        f"{report.kept:,} records, {left_out:,} left out, {report.truncated:,} cut; "
        f"{report.supervised_tokens:,} of {report.total_tokens:,} tokens are supervised ({share:.0%})"
    )
    lines = [text, *report.histogram()]
    for reason, skipped in report.skipped.items():
        lines.append(f"left out {skipped.count:,}: {reason} ({skipped.detail})")
    found = [(name, of) for name, of in report.found.items() if of.count]
    lines += [f"{name}: {of.count:,} of {of.of:,} {of.unit}" for name, of in found]
    many = left_out + report.truncated > report.read / 10
    yield (warning if many or found else ok)("data", "\n".join(lines))
    rows = f"{packing.rows:,} rows of {packing.seq_length:,} positions, {packing.efficiency:.0%} filled"
    poor = packing.efficiency < _FULL
    yield (warning if poor else ok)(
        "rows", rows + ("; use shorter rows or packing" if poor else "")
    )
    yield from _examples(train, tokenizer_folder)


def _examples(train: Any, tokenizer_folder: Path) -> Iterator[Finding]:
    from megatron_profit.commands.prepare_data import marked_text
    from megatron_profit.data import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    for index in range(min(_RECORDS, len(train.prepared.examples))):
        text = marked_text(train, tokenizer, index)
        if len(text) > _SHOWN:
            text = f"{text[: _SHOWN // 2]} […] {text[-_SHOWN // 2 :]}"
        yield note("record", f"{train.prepared.name(index)}; trained is what stands in ⟦⟧:\n{text}")
