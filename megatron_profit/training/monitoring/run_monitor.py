"""Watches a run: guards its steps, and logs their metrics and the evaluations' metrics.

`RunMonitor` brings the facts of a step to all ranks, asks the guards before the optimizer's update, and names
the records of a step that they object to. It logs sums over counts of all steps of the interval, on the
console, in TensorBoard, W&B and the metrics file.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer

from checkpoint_conversion.errors import ConversionError, warn
from megatron_profit.megatron_patches import active_device
from megatron_profit.megatron_patches.callbacks import Callback, LoggedStep, TrainContext
from megatron_profit.megatron_patches.enduring import reason
from megatron_profit.training.monitoring.guard_report import Suspect, chosen_suspects, event_text
from megatron_profit.training.monitoring.guards import EXIT_CODE, Event, Guards, StepFacts
from megatron_profit.training.monitoring.metrics_file import MetricsFile
from megatron_profit.training.monitoring.run_totals import RunTotals
from megatron_profit.training.monitoring.step_metrics import Interval, StepMetrics
from megatron_profit.training.process.console import (
    StepReport,
    lines_to_print,
    print_evaluation,
    print_step,
)
from megatron_profit.training.step.batch import Batch
from megatron_profit.training.step.objective_loss import MicroBatchLoss


@dataclass
class RunMonitor(Callback):
    """One for each process.

    Attributes:
        guards: Judge the steps.
        names: Names of the training records.
        metrics_file: File for the JSON lines, if any.
        totals: Sums over all steps.
    """

    guards: Guards
    names: Callable[[int], str]
    metrics_file: Path | None = None
    totals: RunTotals = field(default_factory=RunTotals)
    _file: MetricsFile | None = None
    _file_failed: bool = False
    _trace: list[torch.Tensor] = field(default_factory=list)
    _rejections: list[tuple[str, bool]] = field(default_factory=list)
    _step: StepMetrics | None = None
    _pairs: dict[str, tuple[float, float]] = field(default_factory=dict)
    _facts: StepFacts | None = None
    _events: list[Event] | None = None
    _logged: Interval = field(default_factory=Interval)
    _scalars: Interval = field(default_factory=Interval)

    # What the monitor sees of a step.

    def observe(self, batch: Batch, loss: MicroBatchLoss) -> None:
        """Remember the records of a training micro-batch."""
        if torch.is_grad_enabled():
            self._trace.append(batch.records)

    def before_train_step(self, context: TrainContext, iteration: int) -> None:
        """Forget the step before, and what an evaluation was told."""
        self._trace.clear()
        self._rejections.clear()

    def rejected(self, message: str, fatal: bool) -> bool:
        """See `Callback`."""
        # With --overlap-grad-reduce, gradients are checked in hooks of the backward pass, without grad mode.
        self._rejections.append((message, fatal))
        return True

    def reduce_losses(self, losses: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """See `Callback`."""
        self._step, self._pairs = None, {}
        if losses:
            group = mpu.get_data_parallel_group(with_context_parallel=True)
            self._step = StepMetrics.reduce(losses, group)
            self._pairs = self._step.pairs()
            if _COUNT in self._pairs:
                # The micro-batches' shares of the step add up to 1, except for rounding.
                self._pairs[_COUNT] = (round(self._pairs[_COUNT][0]), 1.0)
        self._facts, self._events = self._agreed_facts(), None
        return [self._step.means()] if self._step is not None else losses

    def _agreed_facts(self) -> StepFacts:
        """Return the facts of the step after its backward pass, the same on all ranks."""
        kept, supervised = self._pairs.get("kept fraction", (0.0, 0.0))
        total, count = self._pairs.get("lm loss", (0.0, 1.0))
        objective = self._pairs.get("objective", (0.0, 1.0))[0]
        finite = math.isfinite(total) and math.isfinite(objective)
        fatal = any(is_fatal for _, is_fatal in self._rejections)
        local = [
            *(not finite, fatal, bool(self._rejections)),
            *(supervised, kept, total / count if finite else 0.0),
        ]
        bad, any_fatal, rejected, supervised, kept, loss = _largest(local)
        return StepFacts(
            loss=loss,
            finite_loss=not bad,
            # Counts that are zero carry a tiny value, so that no division is by zero.
            supervised=round(supervised),
            kept=round(kept),
            grad_norm=None,
            rejected_fatal=bool(any_fatal),
            rejected=bool(rejected),
        )

    # What the monitor does about a step.

    def allows_update(self, grad_norm: float) -> bool:
        """See `Callback`."""
        assert self._facts is not None, "the step has had no forward pass"
        finite = math.isfinite(grad_norm)
        bad, norm = _largest([not finite, grad_norm if finite else 0.0])
        self._judge(math.nan if bad else norm)
        assert self._events is not None
        return all(event.policy == "warn" for event in self._events)

    def _judge(self, grad_norm: float | None) -> None:
        assert self._facts is not None
        self._facts = StepFacts(**{**vars(self._facts), "grad_norm": grad_norm})
        self._events = self.guards.judge(self._facts)

    def exit_code(self, skipped: bool) -> int | None:
        """See `Callback`."""
        if self._events is None:
            # The loss scaler has already skipped the step, or Megatron ends the run.
            self._judge(None)
        assert self._facts is not None
        assert self._events is not None
        events = [*self._events, *self.guards.finish(self._facts, updated=not skipped)]
        if events:
            self._report(events)
        return EXIT_CODE if any(event.policy == "stop" for event in events) else None

    def _report(self, events: Sequence[Event]) -> None:
        """Print and log the events, with the records of all ranks. A collective."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self._suspects())
        if not _logs():
            return
        suspects = [suspect for of_rank in everyone for suspect in of_rank]
        step = get_args().curr_iteration + 1
        for event in events:
            chosen = chosen_suspects(event, suspects)
            print(lines_to_print(event_text(event, step, chosen, self.names)), flush=True)
            self._write(
                "guard",
                step,
                {
                    "event": event.kind,
                    "policy": event.policy,
                    "text": event.text,
                    "suspects": [
                        {**vars(s), "records": [self.names(record) for record in s.records]}
                        for s in chosen
                    ],
                },
            )

    def _suspects(self) -> list[Suspect]:
        """Return the micro-batches of this rank. A collective on the last pipeline stage.

        Of the ranks that share a micro-batch, by tensor or context parallelism, only the first returns them.
        """
        messages = tuple(dict.fromkeys(message for message, _ in self._rejections))
        step = self._step and self._step.over_rows(mpu.get_context_parallel_group())
        shared_by = mpu.get_tensor_model_parallel_rank(), mpu.get_context_parallel_rank()
        if step is None or any(shared_by):
            return [Suspect(dist.get_rank(), 0, 0.0, True, (), messages)] if messages else []
        losses = step.local_values("lm loss")
        finite = step.local.isfinite().all(-1).all(-1).tolist()
        records = self._trace[-len(losses) :]
        return [
            Suspect(dist.get_rank(), i, loss, ok, tuple(batch.tolist()), messages)
            for i, (loss, ok, batch) in enumerate(zip(losses, finite, records, strict=True), 1)
        ]

    # What the monitor logs.

    def scalars(self, iteration: int, skipped: bool) -> dict[str, Any]:
        """See `Callback`."""
        self.totals.step = iteration
        for interval in (self._scalars, self._logged):
            interval.add(self._pairs, skipped=skipped)
        if iteration % get_args().tensorboard_log_interval:
            return {}
        means, self._scalars = self._scalars.means(), Interval()
        return {name: torch.tensor(value, device="cuda") for name, value in means.items()}

    def log(self, step: LoggedStep) -> None:
        """See `Callback`."""
        interval, args = self._logged, get_args()
        if not step.skipped and self._facts is not None:
            self.totals.add(
                tokens=step.tokens, supervised=self._facts.supervised, kept=self._facts.kept
            )
        interval.tokens += step.tokens
        interval.floating_point_operations += step.floating_point_operations
        interval.add_module_losses(step.module_losses, skipped=step.skipped)
        if step.seconds is None:
            return
        seconds = step.seconds / interval.steps
        speed = throughput(interval, step.seconds, args.world_size)
        speed["peak memory GiB"] = _largest([_peak_memory() / 2**30])[0]
        metrics = {**interval.means(), **interval.module_means()}
        if _COUNT in metrics and metrics[_COUNT].is_integer():
            metrics[_COUNT] = int(metrics[_COUNT])
        if _logs():
            print_step(StepReport(step, args.train_iters, metrics, speed, seconds))
        if step.iteration % args.log_interval:
            # A line after the first step of a process; the interval goes on.
            return
        self.totals.note_line(
            {name: value for name, value in metrics.items() if name != _COUNT},
            step.iteration - interval.steps + 1,
            step.iteration,
        )
        self._log_speed(step.iteration, {**speed, "seconds per step": seconds})
        record = {
            "steps": interval.steps,
            "skipped": interval.skipped,
            "samples": args.consumed_train_samples,
            "time": time.time(),
            **metrics,
            **step.values,
            "seconds per step": seconds,
            **speed,
        }
        self._write("train", step.iteration, record)
        self._logged = Interval()

    def _log_speed(self, iteration: int, values: Mapping[str, float]) -> None:
        if (writer := get_tensorboard_writer()) is not None:
            for name, value in values.items():
                writer.add_scalar(name, value, iteration)
        if (wandb := get_wandb_writer()) is not None:
            wandb.log(dict(values), iteration)

    def after_evaluation(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """See `Callback`."""
        if _logs():
            print_evaluation(iteration, metrics)
        self._write("evaluation", iteration, {"time": time.time(), **metrics})

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self.metrics_file is None or not _logs():
            return
        try:
            self._opened(self.metrics_file).write(kind, step, values)
        except (ConversionError, OSError) as error:  # the disk is full, or a link is in the way
            if not self._file_failed:
                warn(f"{self.metrics_file} cannot be written ({reason(error)}); the run goes on")
            self._file_failed = True

    def _opened(self, path: Path) -> MetricsFile:
        if self._file is None:
            args = get_args()
            self._file = MetricsFile(path, args.iteration)
            about = {
                "time": time.time(),
                "objective": args.objective,
                "world size": args.world_size,
            }
            self._file.write("start", args.iteration, about)
        return self._file


# The metric that is a number of tokens.
_COUNT = "supervised tokens"


def throughput(interval: Interval, seconds: float, devices: int) -> dict[str, float]:
    """Return the tokens and floating-point operations per second of an interval.

    For example, 10,000 tokens in 2 seconds are 5,000 tokens per second. Padding does not count.
    """
    kept, supervised = interval.total("kept fraction")
    return {
        "tokens per second": interval.tokens / seconds,
        "supervised tokens per second": supervised / seconds,
        "kept tokens per second": kept / seconds,
        "model TFLOP/s per GPU": interval.floating_point_operations / seconds / devices / 1e12,
    }


def _largest(values: Sequence[float]) -> list[float]:
    """Return the largest over all ranks of each value. A collective."""
    tensor = torch.tensor([float(v) for v in values], dtype=torch.float64, device="cuda")
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def _logs() -> bool:
    """Return whether this rank logs: the last one, as in Megatron."""
    return dist.get_rank() == dist.get_world_size() - 1


def _peak_memory() -> float:
    """Return the peak memory in bytes: the GPU's, or the process's on the CPU backend."""
    if active_device() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()
