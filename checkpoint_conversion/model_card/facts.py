"""The facts of a training that a model card tells, as each checkpoint of a run holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf.folder import read_json_object
from checkpoint_conversion.hf.stop_tokens import RUN_FILE

# Keys of the run's file in a checkpoint, and the file of the evaluation at its iteration.
STEP, RUN, TOTALS = "iteration", "run", "totals"
EVALUATION_FILE = "validation.json"
# The first weights of a run, in its record, where they are not the base's.
RANDOM = "random weights"


@dataclass(frozen=True)
class Facts:
    """The facts of a training.

    Attributes:
        step: Steps that the weights have had.
        run: The record of the run: parts by name, each a mapping of settings.
        totals: Tokens of all steps, and the metrics of the last log line.
        evaluation: Metrics of the validation data, of these weights; empty without an evaluation.
    """

    step: int
    run: Mapping[str, Mapping[str, Any]]
    totals: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def day(self) -> str | None:
        """The day that the chat template wrote in training, if one was given."""
        day = self.part("data").get("template_date")
        return day if isinstance(day, str) else None

    def part(self, name: str) -> Mapping[str, Any]:
        """Return a part of the record; empty where the run did not note it."""
        return self.run.get(name, {})


def read_facts(checkpoint: Path) -> Facts | None:
    """Return the facts in a checkpoint; None for one that no run of this project has written.

    Args:
        checkpoint: Folder of one checkpoint.

    Raises:
        ConversionError: A file of it is damaged.
    """
    file = checkpoint / RUN_FILE
    if not file.exists():
        return None
    content = read_json_object(file)
    step, run, totals = content.get(STEP), content.get(RUN), content.get(TOTALS, {})
    if run is None:
        return None
    parts = run.values() if isinstance(run, Mapping) else [None]
    if type(step) is not int or not all(isinstance(part, Mapping) for part in (totals, *parts)):
        raise ConversionError(
            f"{file}: the notes on the run are damaged; take another checkpoint, or remove the file to "
            "convert without a model card"
        )
    evaluation = checkpoint / EVALUATION_FILE
    return Facts(step, run, totals, read_json_object(evaluation) if evaluation.exists() else {})
