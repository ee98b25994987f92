"""Changes to Megatron's training loop that let a run see, judge and log the results of each step.

Everything here calls the observer and the evaluation listeners of `hooks.py`. Without them Megatron behaves
as before, except that two defects of its log lines are repaired.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from megatron_profit.megatron_patches.hooks import LoggedStep, evaluation_listeners, observer
from megatron_profit.megatron_patches.patch import MEGATRON_CORE_VERSION, Patch, replaced

_MEGATRON = f"megatron-core {MEGATRON_CORE_VERSION}"
_TRAINING = "megatron/training/training.py"
# The only metric of a language model whose exponential is a perplexity; the name is Megatron's.
_CROSS_ENTROPY = "lm loss"


def _log_the_first_step_like_any_other() -> None:
    from megatron.training import training
    from megatron.training.global_vars import get_args

    original = training.training_log

    @functools.wraps(original)
    def training_log(
        loss_dict: Any,
        total_loss_dict: dict,
        learning_rate: Any,
        iteration: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        kwargs["is_first_iteration"] = bool(
            kwargs.get("is_first_iteration") and iteration % get_args().log_interval
        )
        return original(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)

    training.training_log = training_log


def _let_the_observer_log() -> None:
    from megatron.training import training
    from megatron.training.global_vars import get_args

    original = training.training_log

    @functools.wraps(original)
    def training_log(
        loss_dict: Any,
        total_loss_dict: dict,
        learning_rate: Any,
        iteration: int,
        loss_scale: float,
        report_memory_flag: bool,
        skipped_iter: int,
        grad_norm: Any,
        params_norm: Any,
        num_zeros_in_grad: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        positional = (
            *(learning_rate, iteration, loss_scale, report_memory_flag, skipped_iter, grad_norm),
            *(params_norm, num_zeros_in_grad, *args),
        )
        here = observer()
        if here is None:
            return original(loss_dict, total_loss_dict, *positional, **kwargs)
        lines: list[str] = []
        scalars = here.scalars(iteration, bool(skipped_iter))
        with replaced(training, print_rank_last=lines.append):
            result = original(scalars, total_loss_dict, *positional, **kwargs)
        # As in the loop, because all ranks agree on these.
        settings = get_args()
        tokens = kwargs.get("total_real_tokens_in_batch")
        squares = kwargs.get("seqlen_squared_sum_in_batch")
        batch_size = training.get_current_global_batch_size()
        values = {
            "learning rate": learning_rate,
            "loss scale": loss_scale,
            "grad norm": grad_norm,
            "params norm": params_norm,
            "num zeros": num_zeros_in_grad,
        }
        here.log(
            LoggedStep(
                iteration=iteration,
                skipped=bool(skipped_iter),
                values={name: float(v) for name, v in values.items() if v is not None},
                tokens=batch_size * settings.seq_length if tokens is None else tokens,
                floating_point_operations=training.num_floating_point_operations(
                    settings,
                    batch_size,
                    seqlen_squared_sum_in_batch=squares,
                    total_real_tokens_in_batch=tokens,
                ),
                line=fields_of_line(lines[0]) if lines else None,
            )
        )
        return result

    training.training_log = training_log


def fields_of_line(line: str) -> dict[str, float]:
    """Return the numbers of a console line of Megatron by name: some appear in no other place."""
    pairs = re.findall(r"([^|\]]+): +([-+.\deE]+|nan|inf|-inf) *(?=\|)", line)
    return {name.strip(): float(value) for name, value in pairs}


def _print_negative_averages() -> None:
    from megatron.training import training

    original_log = training.training_log

    @functools.wraps(original_log)
    def training_log(loss_dict: Any, total_loss_dict: dict, *args: Any, **kwargs: Any) -> Any:
        def total(name: str) -> Any:
            return original_totals.get(name, 0) + (0 if skipped else loss_dict.get(name, 0))

        def print_rank_last(message: str) -> None:
            steps = max(1, original_totals.get("advanced iterations", 0) + (not skipped))
            averages = {name: float(total(name)) / steps for name in loss_dict}
            negative = (f" {name}: {x:.6E} |" for name, x in averages.items() if x < 0)
            original_print(message + "".join(negative))

        original_print = training.print_rank_last
        original_totals, skipped = dict(total_loss_dict), args[4]
        with replaced(training, print_rank_last=print_rank_last):
            return original_log(loss_dict, total_loss_dict, *args, **kwargs)

    training.training_log = training_log


def _judge_steps() -> None:
    from megatron.training import training

    original = training.train_step

    @functools.wraps(original)
    def train_step(
        forward_step_func: Any,
        data_iterator: Any,
        model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        config: Any,
        forward_backward_func: Callable,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        here = observer()
        if here is not None:
            passes = forward_backward_func

            @functools.wraps(passes)
            def forward_backward_func(*args: Any, **kwargs: Any) -> Any:
                return here.reduce_losses(passes(*args, **kwargs))

            _ask_before_updates(optimizer)
        result = original(
            forward_step_func,
            data_iterator,
            model,
            optimizer,
            opt_param_scheduler,
            config,
            forward_backward_func,
            *args,
            **kwargs,
        )
        if here is None:
            return result
        losses, skipped, should_checkpoint, should_exit, exit_code, *rest = result
        code = here.exit_code(bool(skipped))
        if code is not None and not should_exit:
            should_checkpoint, should_exit, exit_code = False, True, code
        return losses, skipped, should_checkpoint, should_exit, exit_code, *rest

    training.train_step = train_step


def _ask_before_updates(optimizer: Any) -> None:
    """Let the observer decide between norm and update, the point at which the fp16 loss scaler skips too."""
    if getattr(optimizer, "asks_observer", False):
        return
    norm, update = optimizer.get_grad_norm, optimizer.step_with_ready_grads
    latest = 0.0

    def get_grad_norm() -> Any:
        nonlocal latest
        latest = norm()
        return latest

    def step_with_ready_grads() -> bool:
        here = observer()
        return (here is None or here.allows_update(float(latest))) and update()

    optimizer.get_grad_norm = get_grad_norm
    optimizer.step_with_ready_grads = step_with_ready_grads
    optimizer.asks_observer = True


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
        here = observer()
        if here is None or self.mode != RerunMode.DISABLED:
            original(self, result, rejection_func, message, comparison_func, tolerance, fatal)
        elif rejection_func(result):
            here.rejected(message, fatal)

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


def _tell_of_evaluations() -> None:
    import torch
    from megatron.training import training

    original = training.evaluate_and_print_results

    @functools.wraps(original)
    def evaluate_and_print_results(
        prefix: str,
        forward_step_func: Any,
        data_iterator: Any,
        model: Any,
        iteration: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        found: dict[str, float] | None = None
        evaluate, print_rank_last = training.evaluate, training.print_rank_last
        get_tensorboard_writer = training.get_tensorboard_writer

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

        def writer() -> Any:
            real = get_tensorboard_writer()
            return real and _WithoutPerplexities(real)

        with replaced(
            training,
            evaluate=watched,
            print_rank_last=lambda message: print_rank_last(without_perplexities(message)),
            get_tensorboard_writer=writer,
        ):
            original(prefix, forward_step_func, data_iterator, model, iteration, *args, **kwargs)
        if evaluation_listeners() and found is not None:
            # The last rank is on the last pipeline stage, which alone has metrics.
            everyone = [found]
            torch.distributed.broadcast_object_list(
                everyone, torch.distributed.get_world_size() - 1
            )
            for listener in evaluation_listeners():
                listener(iteration, everyone[0])

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


def without_perplexities(message: str) -> str:
    """Return a line of an evaluation, or the rule around it, with the perplexity of the
    cross-entropy only.
    """
    if set(message) == {"-"}:
        return "-" * 80
    return re.sub(rf"(?<=\| )(?!{_CROSS_ENTROPY} )[^|]+ PPL: \S+ \| ", "", message)


class _WithoutPerplexities:
    """A TensorBoard writer that leaves out perplexities of metrics other than the cross-entropy."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def add_scalar(self, tag: str, *args: Any, **kwargs: Any) -> None:
        is_perplexity = tag.removesuffix(" vs samples").endswith(" ppl")
        if not is_perplexity or tag.startswith(f"{_CROSS_ENTROPY} "):
            self._writer.add_scalar(tag, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)


OBSERVATION_PATCHES = (
    Patch(
        name="observed-log",
        upstream=_MEGATRON,
        file=_TRAINING,
        reason="training_log averages the means of the steps of an interval, shares no value with anybody "
        "but its own long line, and knows no other logger than TensorBoard and W&B.",
        apply=_let_the_observer_log,
    ),
    Patch(
        name="first-log-line",
        upstream=_MEGATRON,
        file=_TRAINING,
        reason="After the first step of a process, training_log keeps its sums and its clock, so that with "
        "--log-interval 1 the second line shows the mean of the first two steps.",
        apply=_log_the_first_step_like_any_other,
    ),
    Patch(
        name="negative-averages",
        upstream=_MEGATRON,
        file=_TRAINING,
        reason="training_log leaves out of the console line every average below 0, which the loss of "
        "PSFT always is.",
        apply=_print_negative_averages,
    ),
    Patch(
        name="judged-step",
        upstream=_MEGATRON,
        file=_TRAINING,
        reason="Nobody is asked between the gradient and the optimizer's update, where a step that would "
        "do harm can still be left out, and sums over micro-batches and ranks are divided and thrown away.",
        apply=_judge_steps,
    ),
    Patch(
        name="rejected-results",
        upstream=_MEGATRON,
        file="megatron/core/rerun_state_machine.py",
        reason="With reruns disabled, a NaN in a loss or gradient raises on the rank that has it, without "
        "a word on the data, and leaves the others waiting.",
        apply=_hand_over_rejections,
    ),
    Patch(
        name="skipped-iterations",
        upstream=_MEGATRON,
        file=_TRAINING,
        reason="To pass over an iteration of --iterations-to-skip, the first tensor-parallel rank alone "
        "takes micro-batches, and looks for tensors in them that pretrain_gpt.py has. Here every rank reads "
        "its own.",
        apply=_skip_batches_on_every_rank,
    ),
    Patch(
        name="after-evaluation",
        upstream=_MEGATRON,
        file=_TRAINING,
        reason="The metrics of an evaluation are added up in fp32, where counts above 2^24 lose digits, "
        "printed and thrown away, each with a perplexity, which only the cross-entropy has.",
        apply=_tell_of_evaluations,
    ),
)
