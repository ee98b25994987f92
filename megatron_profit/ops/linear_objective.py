"""Output layer and objective in one operation: hidden states in, per-token loss out.

The forward pass turns logits into a few numbers per token, one block of the vocabulary at a time. It then
asks the objective once for loss and weight. The backward pass makes gradients from logits that were kept, as
many as memory allows, and from logits that it computes again. So no tensor grows with tokens x vocabulary.
Work follows the mask: rows that are not supervised never meet the output layer, and rows of weight 0 skip the
backward products.

Shapes: N tokens, M supervised rows, H hidden, V vocabulary rows of this rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_profit.objectives import Objective, ObjectiveOutput, TokenStatistics
from megatron_profit.objectives.base import COMPUTED_STATISTICS
from megatron_profit.ops.autograd import BackwardInputs, LinearObjectiveFunction
from megatron_profit.ops.collectives import VocabShard
from megatron_profit.ops.kernels import Implementation, choose_kernels
from megatron_profit.ops.reference import reference_linear_objective
from megatron_profit.ops.rows import SupervisedTokens, input_precision
from megatron_profit.ops.statistics import (
    LinearObjectiveOutput,
    LinearObjectiveStatistics,
    linear_token_statistics,
)
from megatron_profit.ops.tiling import Backward, Tiling
from megatron_profit.ops.validation import (
    check_extra_statistics,
    check_inputs,
    check_labels,
    check_main_grad,
    check_options,
    join_external,
)


def linear_objective(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    objective: Objective,
    *,
    group: dist.ProcessGroup | None = None,
    loss_weight: Tensor | None = None,
    vocab_size: int | None = None,
    external: Mapping[str, Tensor] | None = None,
    extra_statistics: Set[str] = frozenset(),
    reduce_hidden_grad: bool = True,
    gradient_accumulation_fusion: bool = False,
    implementation: Implementation = "auto",
    backward: Backward = "auto",
    chunk_vocab: int | None = None,
    **named: Tensor | None,
) -> LinearObjectiveOutput:
    """Compute an objective's per-token loss on logits ``hidden @ weight.T`` that are never kept.

    Logits are rounded to the input dtype and upcast to float32, as HuggingFace and Megatron do. The
    gradient honours any per-token upstream gradient. When no row is supervised the loss is an exact
    zero that is part of the graph: its gradients are zeros, not None.

    With a group, all of its ranks pass the same tensors except for weight, of which each passes its
    own rows. Which collectives run depends on the labels and on which inputs require a gradient, so
    these must agree.

    Args:
        hidden: [N, H] float16, bfloat16, float32 or float64.
        weight: [V, H] of the same dtype; rank r holds the vocabulary ids r * V .. (r + 1) * V - 1.
        labels: [N] int64 global vocabulary ids; -100 is unsupervised.
        objective: gives loss and weight; sees only the supervised rows, all at once.
        group: process group that the vocabulary is split over; None for one process.
        loss_weight: [N] floating, a factor on each loss; 0 is unsupervised. None means 1.
        vocab_size: vocabulary without padding. Rows after it stay out of the softmax and get a zero gradient.
            None means that no row is padding.
        external: [N] each, statistics that the objective reads and only the caller can know, by name:
            floating, or a mask of bool. ``TokenStatistics`` lists this package's own. ``uniform``
            (``objectives.token_uniform`` makes it) may be left to torch's default generator without a group.
        extra_statistics: names from ``COMPUTED_STATISTICS`` to compute although the objective does
            not ask for them.
        reduce_hidden_grad: sums the gradient of hidden over the group, so that it is complete on
            every rank. False leaves this rank's part, for a caller that reduces it, as a
            sequence-parallel gather does in its own backward pass.
        gradient_accumulation_fusion: adds the gradient of weight to ``weight.main_grad`` and says
            so in ``weight.grad_added_to_main_grad``, as Megatron-Core's linear layers do.
        implementation: the functions on a block of logits: ``torch`` anywhere, ``triton`` on NVIDIA GPUs;
            ``auto`` takes Triton where it can. ``reference`` is the dense loss of
            ``reference_linear_objective``, for comparison: it holds several [N, V] tensors.
        backward: ``recompute`` computes the logits of the rows of nonzero gradient again: 4
            products for a kept token, 1 for a dropped one, and no memory besides a block.
            ``save`` keeps logits from the forward pass, in the input dtype: 3 products, and memory of
            supervised rows * V, at most 4 times the weight's; rows beyond are recomputed. ``auto`` is the
            same with at most the memory of weight (H rows). Both may keep 256 MB on
            a CPU and 1.25 GiB on a GPU where that is more. Logits are kept, not gradients, so every strategy
            honours every upstream gradient and every loss scale. Without gradients no logits are kept.
        chunk_vocab: vocabulary entries of a block, whose logits exist at one time for all
            supervised rows; by default 1024, and more where all of them are below 32 MB on a CPU,
            256 MB on a GPU, in float32.
        **named: external statistics of this package's objectives as keywords, such as ``uniform=``.

    Returns:
        The loss [N] with a graph to hidden and weight, and statistics without one.

    Raises:
        ValueError: shapes, dtypes, devices, labels or options that do not fit, or a missing
            statistic that only the caller can give. Raised before any collective.
        TypeError: an unknown keyword.
    """
    external = join_external(external, named)
    check_inputs(hidden, weight, labels, loss_weight, external, objective, group)
    check_extra_statistics(extra_statistics)
    check_options(implementation, backward, chunk_vocab, gradient_accumulation_fusion)
    shard = VocabShard.of_this_rank(weight.size(0), vocab_size, group)
    check_labels(labels, shard.vocab_size)
    if implementation == "reference":
        return reference_linear_objective(
            *(hidden, weight, labels, objective),
            group=group,
            loss_weight=loss_weight,
            vocab_size=vocab_size,
            external=external,
            reduce_hidden_grad=reduce_hidden_grad,
        )
    kernels = choose_kernels(implementation, hidden)
    main_grad = None
    if gradient_accumulation_fusion and torch.is_grad_enabled() and weight.requires_grad:
        main_grad = check_main_grad(weight)
    rows = SupervisedTokens.of(labels, loss_weight)
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        backward = "recompute"  # there is none, so that no logits need to be kept
    tiling = Tiling.of(weight, len(rows), chunk_vocab, backward)
    with torch.no_grad(), input_precision(hidden):
        wanted = objective.required_statistics.intersection(COMPUTED_STATISTICS) | extra_statistics
        normalizer, computed, kept = linear_token_statistics(
            hidden, weight, rows, shard, tiling, kernels, wanted
        )
        taken = {name: rows.take(vector) for name, vector in external.items()}
        tokens = TokenStatistics(**computed, **taken)
        token_loss, token_weight = _evaluate(objective, tokens)
        scale = 1.0 if loss_weight is None else rows.take(loss_weight).to(token_loss.dtype)
    work = BackwardInputs(rows, shard, tiling, kernels, reduce_hidden_grad, kept, main_grad)
    loss = LinearObjectiveFunction.apply(
        hidden, weight, token_loss * scale, token_weight * scale, normalizer, work
    )
    return LinearObjectiveOutput(loss, LinearObjectiveStatistics(tokens, token_weight, rows))


def _evaluate(objective: Objective, statistics: TokenStatistics) -> ObjectiveOutput:
    """Ask the objective for loss and weight, unless there is no token.

    A ranking of no tokens is undefined.
    """
    log_prob = statistics.log_prob
    if not log_prob.numel():
        return ObjectiveOutput(log_prob, log_prob)
    loss, weight = objective(statistics)
    # A float64 ref_log_prob makes them wider than the kernel's vectors.
    return ObjectiveOutput(loss.to(log_prob.dtype), weight.to(log_prob.dtype))
