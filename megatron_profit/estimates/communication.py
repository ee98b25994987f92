"""Bytes that each GPU sends in a training step, and the time of a step on a machine.

Bytes are counted from the collectives of Megatron and of this project, as a ring sends them. A test compares
them with the collectives of a real run. Times are bytes over an assumed bandwidth: a model, not a
measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_profit.estimates.memory import gradient_bytes
from megatron_profit.estimates.parameter_counts import trained_parameters, whole_model
from megatron_profit.estimates.run_shape import LayerKind, RunShape


@dataclass(frozen=True)
class Machine:
    """The assumed speed of a GPU and its links.

    Attributes:
        gpus_per_node: GPUs that share the fast links.
        flops: Operations a second of the model's products, attention included.
        node_bandwidth: Bytes a second that a GPU sends within the node.
        network_bandwidth: Bytes a second that a GPU sends to other nodes.
    """

    gpus_per_node: int = 8
    flops: float = 450e12
    node_bandwidth: float = 300e9
    network_bandwidth: float = 40e9

    def seconds(self, sent: float, reach: int) -> float:
        """Return the time to send bytes in groups that span `reach` consecutive ranks."""
        near = reach <= self.gpus_per_node
        return sent / (self.node_bandwidth if near else self.network_bandwidth)


@dataclass(frozen=True)
class Sent:
    """Bytes that the busiest GPU of a pipeline rank sends in a step."""

    tensor: float
    pipeline: float
    context: float
    expert: float
    data: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step if nothing overlaps.

    Attributes:
        compute: Products of the model, recomputation included.
        bubble: Waiting in the pipeline.
        tensor, pipeline, context, expert, data: Sending.
    """

    compute: float
    bubble: float
    tensor: float
    pipeline: float
    context: float
    expert: float
    data: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def sent_bytes(run: RunShape, stage: int, supervised_share: float = 1.0) -> Sent:
    """Return the bytes that a GPU of a pipeline rank sends in a step.

    Args:
        run: The run.
        stage: The pipeline rank.
        supervised_share: Supervised tokens over all. Without sequence parallelism the output layer
            sends no others.
    """
    layers = [run.kinds[layer] for layer in run.layers_of(stage)]
    return Sent(
        tensor=run.micro_batches * _tensor(run, layers, stage, supervised_share),
        pipeline=_pipeline(run, stage),
        context=run.micro_batches * sum(_context(run, kind) for kind in layers),
        expert=run.micro_batches * sum(kind.experts for kind in layers) * _expert(run),
        data=_data(run, stage),
    )


def _forwards(run: RunShape) -> int:
    """Return how often a layer's forward pass runs for a backward pass."""
    return 2 if run.args.recompute_granularity == "full" else 1


def _is_frozen(run: RunShape) -> bool:
    """Return whether adapters are trained in place of the weights."""
    return run.args.lora_rank is not None


def _ring(ranks: int) -> float:
    """Return the part of a gathered tensor that each rank sends."""
    return (ranks - 1) / ranks


def _tensor(
    run: RunShape, layers: Sequence[LayerKind], stage: int, supervised_share: float
) -> float:
    """Return the bytes of tensor parallelism for a micro-batch.

    A unit is an all-gather or a reduce-scatter of the residual stream; an all-reduce is two units. With
    sequence parallelism, each pair of products gathers and scatters in the forward pass. In the
    backward pass it gathers its input again, scatters the input's gradient and gathers the output's.
    Without it, there is one all-reduce in each pass.
    """
    unit = run.tokens * run.args.hidden_size * run.bytes_per_number * _ring(run.tp)
    if run.args.sequence_parallel:
        forward, backward, entry, output = 2, 3 - _is_frozen(run), 2, 2.0
    else:
        forward, backward, entry, output = 2, 2, 2, 2 * supervised_share
    pair = forward * _forwards(run) + backward
    # The experts of a layer take the place of its second pair; they count under expert parallelism.
    pairs = sum(1 if kind.experts else 2 for kind in layers)
    ends = entry * (stage == 0) + output * (stage == run.pp - 1)
    return unit * (pair * pairs + ends) + len(layers) * _squares(run)


def _squares(run: RunShape) -> float:
    """Return the bytes of a layer's norms of all queries and all keys: an all-reduce of a number in fp32 for
    each position, in each pass.
    """
    if not run.normalizes_projections:
        return 0
    return 2 * 2 * 4 * run.tokens * _ring(run.tp) * (_forwards(run) + 1)


def _pipeline(run: RunShape, stage: int) -> float:
    """Return the bytes of pipeline parallelism.

    Activations go to the next chunk of the model and their gradients to the one before. The gradient of
    tied embeddings is sent too, unless they are frozen.
    """
    if run.pp == 1:
        return 0
    unit = run.tokens * run.args.hidden_size * run.bytes_per_number / run.sequence_split
    sends = 2 * run.virtual_stages - (stage == 0) - (stage == run.pp - 1)
    sent = run.micro_batches * sends * unit
    is_tied = not (run.args.untie_embeddings_and_output_weights or _is_frozen(run))
    if is_tied and stage in (0, run.pp - 1):
        sent += (
            run.args.padded_vocab_size / run.tp * run.args.hidden_size * gradient_bytes(run.args)
        )
    return sent


def _context(run: RunShape, kind: LayerKind) -> float:
    """Return the bytes of context parallelism for a layer and a micro-batch.

    Keys and values of whole rows are gathered, and their gradients scattered. In a Gated DeltaNet each rank
    sends the inputs of the others' heads, and gets the outputs of its own rows back.
    """
    if run.cp == 1:
        return 0
    if kind.state:
        features = 2 * run.state_keys + 3 * run.state_values + 2 * run.args.linear_num_value_heads
        sent = run.tokens * features / run.tp * run.bytes_per_number * _ring(run.cp)
        return sent * (_forwards(run) + 1)
    keys_values = run.args.seq_length * run.args.micro_batch_size * 2 * run.key_value_size / run.tp
    return keys_values * run.bytes_per_number * _ring(run.cp) * (_forwards(run) + 1)


def _expert(run: RunShape) -> float:
    """Return the bytes of expert parallelism for a layer and a micro-batch.

    Tokens go to their experts and back. Ranks that share an expert gather and scatter among them. The
    gradients do the same.
    """
    tokens = run.tokens / run.sequence_split * run.args.moe_router_topk
    unit = tokens * run.args.hidden_size * run.bytes_per_number
    passes = _forwards(run) + 1
    return 2 * passes * unit * (_ring(run.ep) + run.etp * _ring(run.etp))


def _data(run: RunShape, stage: int) -> float:
    """Return the bytes of data parallelism.

    Gradients are scattered and parameters gathered. Without the distributed optimizer, gradients are
    all-reduced.
    """
    parameters = trained_parameters(run, stage)
    gradient = gradient_bytes(run.args)
    distributed = run.args.use_distributed_optimizer
    each = gradient + run.bytes_per_number if distributed else 2 * gradient
    dense = parameters.dense * _ring(run.dp * run.cp)
    return each * (dense + parameters.experts * _ring(max(1, run.expert_dp)))


def step_flops(run: RunShape) -> float:
    """Return the operations of a step over all GPUs, recomputation included.

    Every row is taken as one record without padding. Frozen weights have no gradient; the products between
    the tokens of a row have both of theirs.
    """
    args, hidden, is_frozen = run.args, run.args.hidden_size, _is_frozen(run)
    passes = _forwards(run) + 2
    projections, others = 0.0, 0.0
    for kind in run.kinds:
        mlp = 3 * hidden * args.ffn_hidden_size
        if kind.experts:
            inner = args.moe_ffn_hidden_size * args.moe_router_topk
            inner += args.moe_shared_expert_intermediate_size or 0
            mlp = 3 * hidden * inner + hidden * args.num_experts
        of_mixer, between = _state_flops(run) if kind.state else _attention_flops(run)
        projections += 2 * mlp + of_mixer
        others += between
    if is_frozen:
        adapters = trained_parameters(whole_model(run), 0)
        share = args.moe_router_topk / args.num_experts if args.num_experts else 0
        others += 2 * (adapters.dense + share * adapters.experts)
    # The linear objective computes the logits of kept tokens twice if it does not keep them.
    products = (4 if args.objective_backward == "recompute" else 3) - is_frozen
    output = 2 * hidden * args.padded_vocab_size * products
    tokens = args.seq_length * args.micro_batch_size * run.dp * run.micro_batches
    return tokens * (projections * (passes - is_frozen) + others * passes + output)


def _attention_flops(run: RunShape) -> tuple[float, float]:
    """Return the operations of attention for a token, forward: of its projections, and between tokens."""
    queries = run.query_size * (3 if run.args.attention_output_gate else 2)
    projections = run.args.hidden_size * (queries + 2 * run.key_value_size)
    # Causal attention: queries meet half of the row's keys, in two products.
    return 2 * projections, 4 * run.query_size * run.args.seq_length / 2


def _state_flops(run: RunShape) -> tuple[float, float]:
    """Return the operations of a Gated DeltaNet for a token, forward: of its projections, and of the
    convolution and the rule, as Megatron counts it.
    """
    args, keys, values = run.args, run.state_keys, run.state_values
    projections = args.hidden_size * (2 * keys + 3 * values + 2 * args.linear_num_value_heads)
    convolution = args.linear_conv_kernel_dim * (2 * keys + values)
    return 2 * projections, 2 * (convolution + 4 * values * args.linear_value_head_dim)


def step_time(run: RunShape, machine: Machine) -> StepTime:
    """Return the time of a step on the machine's busiest GPU, if nothing overlaps."""
    sent = [sent_bytes(run, stage) for stage in range(run.pp)]
    most = Sent(*(max(getattr(s, name) for s in sent) for name in Sent.__dataclass_fields__))
    stride = run.tp * run.cp
    compute = step_flops(run) / run.gpus / machine.flops
    tensor = machine.seconds(most.tensor, run.tp)
    context = machine.seconds(most.context, stride)
    expert = machine.seconds(most.expert, run.ep * run.etp)
    bubble = (compute + tensor + context + expert) * (run.pp - 1)
    return StepTime(
        compute=compute,
        bubble=bubble / (run.micro_batches * run.virtual_stages),
        tensor=tensor,
        pipeline=machine.seconds(most.pipeline, run.gpus),
        context=context,
        expert=expert,
        data=machine.seconds(most.data, run.gpus // run.pp),
    )
