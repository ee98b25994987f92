"""Numbers of parameters of layers and pipeline stages on one rank."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_profit.commands.run_shape import RunShape


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters on a rank.

    Attributes:
        dense: All parameters except the experts'.
        experts: Parameters of the rank's experts.
    """

    dense: int = 0
    experts: int = 0

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.dense + other.dense, self.experts + other.experts)

    @property
    def total(self) -> int:
        return self.dense + self.experts


def layer_parameters(run: RunShape, has_experts: bool) -> Parameters:
    """Return the parameters of a layer on a rank."""
    args, hidden = run.args, run.args.hidden_size
    qkv = run.query_size + 2 * run.key_value_size
    dense = (hidden * qkv + run.query_size * hidden) // run.tp + 2 * hidden
    if args.add_qkv_bias:
        dense += qkv // run.tp
    if args.qk_layernorm:
        dense += 2 * args.kv_channels
    if not has_experts:
        return Parameters(dense + 3 * hidden * args.ffn_hidden_size // run.tp)
    expert = 3 * hidden * args.moe_ffn_hidden_size // run.etp
    return Parameters(dense + hidden * args.num_experts, args.num_experts // run.ep * expert)


def stage_parameters(run: RunShape, stage: int) -> Parameters:
    """Return the parameters of a pipeline rank: its layers, and embedding, last norm and output layer where
    they are.
    """
    args = run.args
    total = Parameters()
    for layer in run.layers_of(stage):
        total += layer_parameters(run, run.expert_layers[layer])
    vocabulary = args.padded_vocab_size // run.tp * args.hidden_size
    last = stage == run.pp - 1
    if stage == 0:
        total += Parameters(vocabulary)
    if last:
        total += Parameters(args.hidden_size)
    # Tied embeddings are one tensor on one rank, and a copy on the last of several.
    if last and (args.untie_embeddings_and_output_weights or run.pp > 1):
        total += Parameters(vocabulary)
    return total
