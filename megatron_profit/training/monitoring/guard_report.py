"""The report of a guard's event: the micro-batches that may have caused it, and their records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_profit.training.monitoring.guards import EXIT_CODE, Event

# Records and micro-batches that an event names; the first ones say where to look.
_RECORDS, _MICRO_BATCHES = 8, 4


@dataclass(frozen=True)
class Suspect:
    """A micro-batch that an event may come from.

    Attributes:
        rank: Rank of the process.
        micro_batch: Its number in the step on this rank, from 1.
        loss: Its cross-entropy, NaN where it is not finite.
        finite: Whether its loss is finite.
        records: Examples in it.
        rejections: Messages of Megatron's checks on this rank.
    """

    rank: int
    micro_batch: int
    loss: float
    finite: bool
    records: tuple[int, ...]
    rejections: tuple[str, ...] = ()


def chosen_suspects(event: Event, suspects: Sequence[Suspect]) -> list[Suspect]:
    """Return the micro-batches that an event may come from, the likeliest first; for a stall
    the latest ones.
    """
    if event.kind == "non-finite loss":
        return [s for s in suspects if not s.finite]
    if event.kind == "non-finite gradient":
        return [s for s in suspects if s.rejections] or list(suspects)
    if event.kind == "spike":
        return sorted(suspects, key=lambda s: -s.loss)
    return list(suspects)


def event_text(
    event: Event, step: int, suspects: Sequence[Suspect], names: Callable[[int], str]
) -> str:
    """Return the text that is printed for an event."""
    lines = [f"megatron_profit: guard: {event.kind} at step {step}: {event.text}."]
    for suspect in suspects[:_MICRO_BATCHES]:
        named = ", ".join(names(record) for record in suspect.records[:_RECORDS])
        more = len(suspect.records) - _RECORDS
        where = f"  rank {suspect.rank}"
        if suspect.micro_batch:
            loss = f"lm loss {suspect.loss:.4g}" if suspect.finite else "loss not finite"
            where += f", micro-batch {suspect.micro_batch}, {loss}: {named or 'padding only'}"
        lines.append(where + (f" and {more} more" if more > 0 else ""))
        lines += [f"    {message}" for message in suspect.rejections]
    if len(suspects) > _MICRO_BATCHES:
        lines.append(f"  and {len(suspects) - _MICRO_BATCHES} more micro-batches")
    lines.append("  " + _consequence(event, step))
    return "\n".join(lines)


def _consequence(event: Event, step: int) -> str:
    if event.kind == "stall":
        return "The run ends." if event.policy == "stop" else "The run goes on."
    if event.policy == "warn":
        return "The step is made all the same."
    if event.policy == "skip":
        return "No optimizer step is taken; the run goes on."
    return (
        f"No optimizer step is taken and the run ends with code {EXIT_CODE}; its checkpoints are as they "
        f"were. To pass over this step, give the same command again with --iterations-to-skip {step}, and "
        "with --load of the --save folder."
    )
