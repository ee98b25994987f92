"""Changes to Megatron's training loop: callbacks before, within and after steps and evaluations.

Everything here calls the callbacks of `callbacks.py`; without them Megatron does what it always does, but for
two defects of its lines.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_profit.megatron_patches.callbacks import LoggedStep, TrainContext, callbacks
from megatron_profit.megatron_patches.patch import Patch, replaced

# The only metric of a language model whose exponential is a perplexity; the name is Megatron's.
CROSS_ENTROPY = "lm loss"


def _call_before_training() -> None:
    from megatron.training import training
    from megatron.training.global_vars import get_args

    original = training.train

    @functools.wraps(original)
    def train(*args: Any, **kwargs: Any) -> Any:
        for callback in callbacks():
            callback.before_training(get_args().iteration)
        return original(*args, **kwargs)

    training.train = train


def _call_around_train_steps() -> None:
    from megatron.training import training

    original = training.train_step
    signature = inspect.signature(original)

    @functools.wraps(original)
    def train_step(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        given = call.arguments
        context = TrainContext(given["model"], given["config"], given["optimizer"])
        for callback in callbacks():
            callback.before_train_step(context, given["iteration"])
        given["forward_backward_func"] = _reducing(given["forward_backward_func"])
        _ask_before_updates(given["optimizer"])
        losses, skipped, should_checkpoint, should_exit, exit_code, *rest = original(
            *call.args, **call.kwargs
        )
        for callback in callbacks():
            code = callback.exit_code(bool(skipped))
            if code is not None and not should_exit:
                should_checkpoint, should_exit, exit_code = False, True, code
        return losses, skipped, should_checkpoint, should_exit, exit_code, *rest

    training.train_step = train_step


def _reducing(forward_backward_func: Callable) -> Callable:
    """Return the same passes, whose reports go through the callbacks."""

    @functools.wraps(forward_backward_func)
    def reduced(*args: Any, **kwargs: Any) -> Any:
        losses = forward_backward_func(*args, **kwargs)
        for callback in callbacks():
            losses = callback.reduce_losses(losses)
        return losses

    return reduced


def _let_callbacks_log() -> None:
    from megatron.training import training
    from megatron.training.global_vars import get_args

    original = training.training_log
    signature = inspect.signature(original)

    @functools.wraps(original)
    def training_log(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        given = call.arguments
        iteration, skipped = given["iteration"], bool(given["skipped_iter"])
        # With True, Megatron keeps its sums and its clock, and the next line shows the mean of two steps.
        given["is_first_iteration"] = bool(
            given.get("is_first_iteration") and iteration % get_args().log_interval
        )
        scalars = [callback.scalars(iteration, skipped) for callback in callbacks()]
        found = [values for values in scalars if values is not None]
        if not found:
            return original(*call.args, **call.kwargs)
        given["loss_dict"] = {name: value for values in found for name, value in values.items()}
        is_due = given["is_first_iteration"] or iteration % get_args().log_interval == 0
        seconds = _interval_seconds() if is_due else None
        reports = _Reports(training.get_moe_metrics_tracker())
        with replaced(
            training,
            print_rank_last=lambda line: None,
            get_moe_metrics_tracker=lambda: reports,
        ):
            result = original(*call.args, **call.kwargs)
        step = _logged_step(given, reports.losses, seconds)
        for callback in callbacks():
            callback.log(step)
        return result

    training.training_log = training_log


def _interval_seconds() -> float:
    """Return the seconds that Megatron's clock shows, without evaluations and saves. A collective."""
    from megatron.training.global_vars import get_timers

    return get_timers()("interval-time").elapsed(reset=False, barrier=True)


class _Reports:
    """Keeps the losses of experts that Megatron's tracker would add to the sums of its own line."""

    def __init__(self, tracker: Any) -> None:
        self.losses: dict[str, Any] = {}
        self._tracker = tracker

    def report(self, **settings: Any) -> str:
        return self._tracker.report(**{**settings, "total_loss_dict": self.losses})


def _logged_step(
    given: Mapping[str, Any], module_losses: Mapping[str, Any], seconds: float | None
) -> LoggedStep:
    """Return the values of a step from the arguments of `training_log`; all ranks agree on them."""
    from megatron.training import training
    from megatron.training.global_vars import get_args

    settings = get_args()
    tokens = given.get("total_real_tokens_in_batch")
    batch_size = training.get_current_global_batch_size()
    names = {
        "learning rate": "learning_rate",
        "loss scale": "loss_scale",
        "grad norm": "grad_norm",
        "params norm": "params_norm",
        "num zeros": "num_zeros_in_grad",
    }
    values = {name: given[argument] for name, argument in names.items()}
    return LoggedStep(
        iteration=given["iteration"],
        skipped=bool(given["skipped_iter"]),
        values={name: float(value) for name, value in values.items() if value is not None},
        tokens=batch_size * settings.seq_length if tokens is None else tokens,
        floating_point_operations=training.num_floating_point_operations(
            settings,
            batch_size,
            seqlen_squared_sum_in_batch=given.get("seqlen_squared_sum_in_batch"),
            total_real_tokens_in_batch=tokens,
        ),
        module_losses=module_losses,
        seconds=seconds,
    )


def _ask_before_updates(optimizer: Any) -> None:
    """Let the callbacks decide between norm and update, where the fp16 loss scaler skips as well."""
    if getattr(optimizer, "asks_callbacks", False):
        return
    norm, update = optimizer.get_grad_norm, optimizer.step_with_ready_grads
    latest = 0.0

    def get_grad_norm() -> Any:
        nonlocal latest
        latest = norm()
        return latest

    def step_with_ready_grads() -> bool:
        answers = [callback.allows_update(float(latest)) for callback in callbacks()]
        return all(answers) and update()

    optimizer.get_grad_norm = get_grad_norm
    optimizer.step_with_ready_grads = step_with_ready_grads
    optimizer.asks_callbacks = True


def _hand_over_rejections() -> None:
    from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine

    original = RerunStateMachine.validate_result

    @functools.wraps(original)
    def validate_result(
        self: Any,
        result: Any,
        rejection_func: Callable,
        message: str,
        comparison_func: Any = None,
        tolerance: float = 0.0,
        fatal: bool = True,
    ) -> None:
        disabled = self.mode == RerunMode.DISABLED
        if disabled and callbacks() and not rejection_func(result):
            return
        if disabled and any([callback.rejected(message, fatal) for callback in callbacks()]):
            return
        original(self, result, rejection_func, message, comparison_func, tolerance, fatal)

    RerunStateMachine.validate_result = validate_result


def _skip_batches_on_every_rank() -> None:
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training import training

    def dummy_train_step(data_iterator: Any) -> None:
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        machine = training.get_rerun_state_machine()
        while machine.should_run_forward_backward(data_iterator):
            samples = training.get_args().consumed_train_samples
            training.print_rank_0(f"passing over the global batch behind {samples} samples")
            for iterator in filter(None, iterators):
                for _ in range(get_num_microbatches()):
                    next(iterator)

    training.dummy_train_step = dummy_train_step


def _call_before_evaluations() -> None:
    from megatron.training import training

    original = training.evaluate
    signature = inspect.signature(original)

    @functools.wraps(original)
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        for callback in callbacks():
            callback.before_evaluation(TrainContext(given["model"], given["config"]))
        return original(*args, **kwargs)

    training.evaluate = evaluate


def _call_after_evaluations() -> None:
    import torch
    from megatron.training import training

    original = training.evaluate_and_print_results
    signature = inspect.signature(original)

    @functools.wraps(original)
    def evaluate_and_print_results(*args: Any, **kwargs: Any) -> None:
        found: dict[str, float] | None = None
        evaluate = training.evaluate

        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal found
            sums = _Sums()
            passes = training.get_forward_backward_func
            with replaced(training, get_forward_backward_func=sums.watching(passes)):
                metrics, *rest = evaluate(*args, **kwargs)
            if metrics is not None:
                metrics = {**metrics, **sums.means()}
                found = {name: float(value) for name, value in metrics.items()}
            return metrics, *rest

        if not callbacks():
            with replaced(training, evaluate=watched):
                return original(*args, **kwargs)
        with replaced(training, evaluate=watched, print_rank_last=lambda line: None):
            original(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        # The last rank is on the last pipeline stage, which alone has metrics.
        everyone = [found]
        torch.distributed.broadcast_object_list(everyone, torch.distributed.get_world_size() - 1)
        if everyone[0] is not None:
            metrics = dict(everyone[0])
            for callback in callbacks():
                metrics |= callback.evaluation_metrics(given["iteration"])
            training.print_rank_last(evaluation_line(given["prefix"], metrics))
            for callback in callbacks():
                callback.after_evaluation(given["iteration"], metrics)
        return None

    training.evaluate_and_print_results = evaluate_and_print_results


class _Sums:
    """Sums and counts of an evaluation over its micro-batches and ranks, in fp64."""

    def __init__(self) -> None:
        self._pairs: dict[str, Any] = {}

    def watching(self, get_forward_backward_func: Callable) -> Callable:
        """Wrap the function so that its passes add their losses to these sums."""

        def get(*args: Any, **kwargs: Any) -> Callable:
            passes = get_forward_backward_func(*args, **kwargs)

            @functools.wraps(passes)
            def watched(*args: Any, **kwargs: Any) -> Any:
                losses = passes(*args, **kwargs)
                for name in losses[0] if losses else ():
                    pairs = (loss[name].detach().double() for loss in losses)
                    self._pairs[name] = sum(pairs, self._pairs.get(name, 0.0))
                return losses

            return watched

        return get

    def means(self) -> dict[str, Any]:
        """Return the means. A collective of the ranks that share the data, on the last pipeline stage."""
        import torch
        from megatron.core import mpu

        pairs = {name: pair for name, pair in self._pairs.items() if pair.numel() == 2}
        if not pairs:
            return {}
        total = torch.stack(list(pairs.values()))
        group = mpu.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(total, group=group)
        return dict(zip(pairs, total[:, 0] / total[:, 1], strict=True))


def evaluation_line(where: str, metrics: Mapping[str, float]) -> str:
    """Return Megatron's line of an evaluation, with the perplexity of the cross-entropy only.

    Args:
        where: The step, and after the last one the data set, as "iteration 20 on test set".
        metrics: The value of each metric by name.
    """
    line = f" validation loss at {where} | "
    for name, value in metrics.items():
        line += f"{name} value: {value:.6E} | "
        if name == CROSS_ENTROPY:
            line += f"{name} PPL: {math.exp(min(20, value)):.6E} | "
    return line


LOOP_PATCHES = (
    Patch(
        name="before-training",
        functions=("megatron/training/training.py:train",),
        reason="Nothing of a program is called between the load of a checkpoint and the first step.",
        apply=_call_before_training,
    ),
    Patch(
        name="train-step",
        functions=(
            "megatron/training/training.py:train_step",
            "megatron/core/optimizer/optimizer.py:ChainedOptimizer.step",
        ),
        reason="Nobody is asked before a step, nor between the gradient and the optimizer's update, where a "
        "step that would do harm can still be left out; sums over micro-batches and ranks are divided and "
        "thrown away.",
        apply=_call_around_train_steps,
    ),
    Patch(
        name="training-log",
        functions=("megatron/training/training.py:training_log",),
        reason="training_log averages the means of the steps of an interval, shares no value with anybody "
        "but its own long line, and knows no other logger than TensorBoard and W&B. After the first step of "
        "a process it keeps its sums and its clock, so that with --log-interval 1 the second line shows the "
        "mean of the first two steps.",
        apply=_let_callbacks_log,
    ),
    Patch(
        name="rejected-results",
        functions=("megatron/core/rerun_state_machine.py:RerunStateMachine.validate_result",),
        reason="With reruns disabled, a NaN in a loss or gradient raises on the rank that has it, without "
        "a word on the data, and leaves the others waiting.",
        apply=_hand_over_rejections,
    ),
    Patch(
        name="skipped-iterations",
        functions=("megatron/training/training.py:dummy_train_step",),
        reason="To pass over an iteration of --iterations-to-skip, the first tensor-parallel rank alone "
        "takes micro-batches, and looks for tensors in them that pretrain_gpt.py has. Here every rank reads "
        "its own.",
        apply=_skip_batches_on_every_rank,
    ),
    Patch(
        name="before-evaluation",
        functions=("megatron/training/training.py:evaluate",),
        reason="An objective that compares with another model needs its statistics before the iterations of "
        "an evaluation.",
        apply=_call_before_evaluations,
    ),
    Patch(
        name="after-evaluation",
        functions=("megatron/training/training.py:evaluate_and_print_results",),
        reason="The metrics of an evaluation are added up in fp32, where counts above 2^24 lose digits, "
        "printed and thrown away, each with a perplexity, which only the cross-entropy has.",
        apply=_call_after_evaluations,
    ),
)
