"""The objective as a Megatron loss: output processor, loss function and metrics.

`ObjectiveLoss` is all that your own pretrain script needs; `megatron_profit.sft` uses the same. Megatron
calls the output processor in place of output layer and loss (GPTModel.forward), and the loss function
afterwards on the last pipeline stage. Both see one micro-batch, through one `MicroBatchLoss`.

Shape suffixes: B micro-batch, S sequence, H hidden, N = S * B tokens in sequence-first order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_sequence_parallel_region,
)
from megatron.training import get_args

from megatron_profit.objectives import NORMALIZATIONS, Objective, token_uniform
from megatron_profit.ops.linear_objective import LinearObjectiveStatistics, linear_objective
from megatron_profit.training.step.kept_fraction import KeptFractionMonitor
from megatron_profit.training.step.kernel_flags import (
    BACKWARDS,
    IMPLEMENTATIONS,
    check_implementation,
)
from megatron_profit.training.step.token_metrics import (
    ProbQuantiles,
    as_pairs,
    share_of_total,
    token_sums,
)

if TYPE_CHECKING:
    from megatron_profit.ops.tiling import Backward

# The factor of pretrain_gpt.py: a loss of this many times the largest of the first losses is a spike.
_SPIKY_LOSS_FACTOR = 10


@dataclass(frozen=True)
class ObjectiveLoss:
    """Makes Megatron train `objective` in place of the plain cross-entropy.

    Needs `--calculate-per-token-loss`: the loss is a sum with a count. So the gradient of a global batch does
    not depend on its split into micro-batches and over data-parallel ranks.

    Attributes:
        objective: From `megatron_profit.objectives.build_objective`, or a `ScheduledObjective`.
        normalization: "supervised" divides the summed loss by the supervised tokens of the global batch,
            "kept" by the tokens whose weight is not zero; None follows the objective's source.
        vocab_size: Size of the vocabulary without Megatron's padding; None when it is not padded.
        seed: For objectives that select at random.
        log_entropy: Whether to compute and log the mean entropy of the predicted distributions, which
            objectives that need it log anyway.
        log_reference: Whether to log the mean probability under the reference model, whose log-probabilities
            come as `ref_log_prob` with each micro-batch; objectives that read them log it anyway.
        prob_quantiles: Quantiles of p to log.
        implementation: "fused" is the kernel (`megatron_profit.ops`), on NVIDIA GPUs in Triton;
            "reference" dense logits of all tokens and plain autograd, for comparison; "auto" is fused.
        backward: The kernel's strategy for its backward pass, see `ops.linear_objective`.

    Raises:
        ValueError: For an unknown name, or a strategy of the kernel without the kernel.
    """

    objective: Objective
    normalization: str | None = None
    vocab_size: int | None = None
    seed: int = 0
    log_entropy: bool = False
    log_reference: bool = False
    prob_quantiles: ProbQuantiles | None = None
    implementation: str = "auto"
    backward: Backward = "auto"
    monitor: KeptFractionMonitor = field(default_factory=KeptFractionMonitor, repr=False)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("normalization", self.normalization, (None, *NORMALIZATIONS)),
            ("implementation", self.implementation, IMPLEMENTATIONS),
            ("backward", self.backward, BACKWARDS),
        ):
            if value not in known:
                choices = ", ".join(filter(None, known))
                raise ValueError(f"{name} {value!r} is unknown; choose one of {choices}")
        check_implementation(self.implementation, self.backward)

    @property
    def logged_statistics(self) -> frozenset[str]:
        """External statistics that are read to be logged, besides the objective's own."""
        return frozenset({"ref_log_prob"} if self.log_reference else ())

    @property
    def current_objective(self) -> Objective:
        """The objective of the step that is trained; in an evaluation, of the step that was trained last."""
        objective = self.objective.at(current_step())
        return objective if torch.is_grad_enabled() else objective.for_evaluation()

    def micro_batch(
        self,
        draw_index: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        external: Mapping[str, torch.Tensor] | None = None,
        observe: Callable[[MicroBatchLoss], None] = lambda loss: None,
    ) -> MicroBatchLoss:
        """Begin a micro-batch.

        Args:
            draw_index: [B, S] int64, distinct for each time that an example is drawn; only objectives
                that select at random need it.
            position_ids: [B, S] int64, position in the example; needed with `draw_index`.
            external: [B, S] each, statistics that the objective needs and only the caller can know.
            observe: Gets the micro-batch when Megatron asks for its loss; the statistics are known then.

        Raises:
            ValueError: Without `--calculate-per-token-loss`.
        """
        if not get_args().calculate_per_token_loss:
            raise ValueError(
                "the objective needs --calculate-per-token-loss: without it Megatron averages over "
                "micro-batches, and a token's weight would depend on which one it is in"
            )
        return MicroBatchLoss(self, draw_index, position_ids, external or {}, observe)


class MicroBatchLoss:
    """The objective on one micro-batch: the model's arguments, then the loss for Megatron.

    Attributes:
        objective: The objective of the step.
    """

    def __init__(
        self,
        loss: ObjectiveLoss,
        draw_index: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        external: Mapping[str, torch.Tensor],
        observe: Callable[[MicroBatchLoss], None],
    ) -> None:
        self._loss = loss
        self.objective = loss.current_objective
        self._draw_index, self._position_ids = draw_index, position_ids
        self._external, self._observe = external, observe
        self._statistics: LinearObjectiveStatistics | None = None

    @property
    def statistics(self) -> LinearObjectiveStatistics:
        """The statistics of the micro-batch, known once the model has run on the last pipeline stage."""
        assert self._statistics is not None, "the model has not run"
        return self._statistics

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `GPTModel.forward`, besides `labels` (and `loss_mask` where used)."""
        return {"output_processor": self._process_output}

    def _process_output(
        self,
        *,
        hidden_states: torch.Tensor,
        output_layer: ColumnParallelLinear,
        output_weight: torch.Tensor | None,
        labels: torch.Tensor,
        loss_mask: torch.Tensor | None,
        scale_logits: Callable[[torch.Tensor], torch.Tensor],
        **_: Any,
    ) -> torch.Tensor:
        """Compute the loss of each token [B, S] in fp32.

        Inputs are hidden states [S, B, H] and labels [B, S]. Under sequence parallelism S is split over the
        group. A loss mask [B, S] of zeros and ones is optional. `scale_logits` multiplies by the constant of
        `--use-mup`.
        """
        if (parts := getattr(output_layer, "gtp_remat_size", 1)) > 1:
            raise ValueError(
                f"--tensor-parallel-num-weight-shards splits the output layer's weight into {parts} parts, "
                "and the objective would take one for the whole vocabulary; drop the flag"
            )
        # A factor on the logits is the same factor on the hidden states.
        hidden_states = scale_logits(hidden_states)
        # The weight is used without a call of its module, whose hooks wait for the all-gather of
        # parameters under --overlap-param-gather.
        for hook in output_layer._forward_pre_hooks.values():
            hook(output_layer, ())
        group = output_layer.tp_group
        if output_layer.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=group
            )
        labels_N = _masked(labels, loss_mask).transpose(0, 1).flatten()
        weight = output_layer.weight if output_weight is None else output_weight
        fused = self._loss.implementation != "reference"
        loss_N, statistics = linear_objective(
            hidden_states.flatten(0, 1),
            weight,
            labels_N,
            self.objective,
            group=group if group.size() > 1 else None,
            vocab_size=self._loss.vocab_size,
            external={
                name: values.transpose(0, 1).flatten()
                for name, values in {**self._external, **self._drawn()}.items()
            },
            extra_statistics=frozenset({"entropy"} if self._loss.log_entropy else ()),
            reduce_hidden_grad=not output_layer.sequence_parallel,
            implementation="auto" if fused else "reference",
            backward=self._loss.backward,
            # Megatron's data parallelism has a buffer for every parameter and keeps the gradient that is
            # already in it. --gradient-accumulation-fusion does not change that; it is about Megatron's own
            # linear layers.
            gradient_accumulation_fusion=fused and hasattr(weight, "grad_added_to_main_grad"),
        )
        self._statistics = statistics
        return loss_N.view(labels.size(1), labels.size(0)).transpose(0, 1)

    def _drawn(self) -> dict[str, torch.Tensor]:
        """Return the random numbers [B, S] of an objective that draws."""
        if "uniform" not in self.objective.required_statistics:
            return {}
        if self._draw_index is None or self._position_ids is None:
            return {}
        return {"uniform": token_uniform(self._loss.seed, self._draw_index, self._position_ids)}

    def loss_func(
        self, output_tensor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the loss as Megatron's loss function: (summed loss, token count, metrics as [sum, count]
        pairs).
        """
        statistics = self.statistics
        self._observe(self)
        loss = output_tensor.float().sum()
        sums = token_sums(statistics, self.objective)
        num_kept, num_supervised = sums["kept fraction"]
        if torch.is_grad_enabled() and mpu.get_tensor_model_parallel_rank() == 0:
            self._loss.monitor.add(num_kept, num_supervised)
        normalization = self._loss.normalization or self.objective.normalization
        num_tokens = num_supervised if normalization == "supervised" else num_kept
        _validate(loss, num_tokens)
        report = as_pairs({"objective": (loss, num_tokens), **sums})
        report["supervised tokens"] = share_of_total(num_supervised, _parts_of_step())
        if self._loss.prob_quantiles is not None:
            report |= self._loss.prob_quantiles.add(
                statistics.tokens.log_prob,
                micro_batches_of_window(),
                mpu.get_data_parallel_group(with_context_parallel=True),
            )
        return loss, num_tokens.to(torch.int), report


def _masked(labels: torch.Tensor, loss_mask: torch.Tensor | None) -> torch.Tensor:
    """Return labels [B, S] with -100 where the mask [B, S] is 0."""
    if loss_mask is None:
        return labels
    if ((loss_mask != 0) & (loss_mask != 1)).any():
        raise ValueError(
            "loss_mask holds values other than 0 and 1; the tokens of an objective are weighted by the "
            "objective itself"
        )
    return labels.masked_fill(loss_mask == 0, -100)


def current_step() -> int:
    """Return the step that is trained, counted from 0, or the step that was trained last."""
    args = get_args()
    # A run that was already finished when it started evaluates without a step of its own.
    return max(getattr(args, "curr_iteration", 0), args.iteration - 1)


def _parts_of_step() -> int:
    """Return the number of micro-batches of a step over all data-parallel ranks."""
    ranks = mpu.get_data_parallel_world_size(with_context_parallel=True)
    return _micro_batches_of_step() * ranks


def _micro_batches_of_step() -> int:
    """Return the number of micro-batches that this rank runs per training step, or per
    evaluation iteration.
    """
    args = get_args()
    if torch.is_grad_enabled():  # evaluation runs without
        return get_num_microbatches()
    return args.eval_global_batch_size // (args.eval_micro_batch_size * args.data_parallel_size)


def micro_batches_of_window() -> int:
    """Return the number of micro-batches that this rank runs per training step, or per whole evaluation."""
    return _micro_batches_of_step() * (1 if torch.is_grad_enabled() else get_args().eval_iters)


def _validate(loss: torch.Tensor, num_tokens: torch.Tensor) -> None:
    """Show the loss to Megatron's checks, as pretrain_gpt.py does."""
    args, machine = get_args(), get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for name, is_bad in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            machine.validate_result(
                result=loss,
                rejection_func=is_bad,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    if args.check_for_spiky_loss and torch.is_grad_enabled():
        machine.validate_result(
            # Compared per token, because micro-batches differ in how many they train.
            result=loss.detach() / num_tokens.clamp(min=1),
            rejection_func=functools.partial(
                machine.is_unexpectedly_large, threshold=_SPIKY_LOSS_FACTOR, context="loss"
            ),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )
