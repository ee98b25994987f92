"""Megatron's Gated DeltaNet for rows of several records, with flash-linear-attention and without it.

State and convolution begin anew at each record. The kernels of flash-linear-attention get the borders of the
records as `cu_seqlens`. Without them, records of similar length go through plain torch as one batch.

Megatron's own forward pass takes borders only with "thd" rows: one row for a micro-batch, records whose
lengths the context-parallel size divides, and flash-linear-attention. Here rows are whole on each rank
between projection and output, because tensor and context parallelism both split the heads.

Shapes: hidden states [L, B, H]; L positions of a row on this rank, S of the whole row, B rows.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, common
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megatron_profit.models.gated_delta_net.delta_rule import delta_net, gated_delta_rule
from megatron_profit.models.record_spans import RecordSpans


class HeadNorm(torch.nn.Module):
    """The RMSNorm of each value head's output.

    Its weight is plain also where the model's other norms are zero-centred, and has a name that says so: a
    program that takes all norms for zero-centred does not find it. Each tensor-parallel rank has other heads
    and the same weight, so the ranks' gradients are summed.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> None:
        super().__init__()
        self.eps = eps
        self.plain_weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of [..., V], computed in fp32."""
        weight = copy_to_tensor_model_parallel_region(self.plain_weight)
        return F.rms_norm(x.float(), weight.shape, weight.float(), self.eps).type_as(x)


class PackedGatedDeltaNet(GatedDeltaNet):
    """Megatron's Gated DeltaNet, its parameters and their places in a checkpoint, for packed rows."""

    gated_delta_rule: Any  # of flash-linear-attention

    def _setup_variant_attrs(self) -> None:
        super()._setup_variant_attrs()
        # Without flash-linear-attention there is no kernel here, and Megatron asks for one at construction.
        if common.chunk_gated_delta_rule is None:
            self.gated_delta_rule = gated_delta_rule

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        sequence_len_offset: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix the tokens of each record.

        Args:
            hidden_states: [L, B, H], under sequence parallelism this rank's part of L.
            attention_mask: Not needed: a state holds earlier tokens of its record alone.
            packed_seq_params: `RecordSpans` for rows of several records; None for rows of one record each.

        Returns:
            The output, like `hidden_states`, and the bias of the output projection.

        Raises:
            ValueError: Packed rows in another form, or inference with a cache.
        """
        if packed_seq_params is not None and not isinstance(packed_seq_params, RecordSpans):
            raise ValueError(
                "Gated DeltaNet takes packed rows as RecordSpans, not as "
                f"{type(packed_seq_params).__name__}"
            )
        if inference_context is not None:
            raise ValueError("Gated DeltaNet has no cache for inference here")
        rows = None if packed_seq_params is None else packed_seq_params.whole
        projected = self._whole_rows(self.in_proj(hidden_states)[0])
        qkv, gate, beta, alpha = projected.split(self.feat_dim_split, dim=-1)
        rate = self._own_heads(self.A_log).float().exp()
        decay = -rate * F.softplus(alpha.float() + self._own_heads(self.dt_bias).float())
        beta = beta.sigmoid()
        mix = self._mix_with_kernels if self._has_kernels(qkv) else self._mix_plainly
        mixed_BS = mix(qkv, decay, beta, rows)
        gate_BS = gate.transpose(0, 1).unflatten(-1, (-1, self.value_head_dim))
        return self._project(mixed_BS, gate_BS)

    def _has_kernels(self, x: Tensor) -> bool:
        """Whether flash-linear-attention computes `x`.

        It takes no fp32, and its results are not the same in each run.
        """
        if common.chunk_gated_delta_rule is None or self.config.deterministic_mode:
            return False
        return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)

    def _whole_rows(self, projected: Tensor) -> Tensor:
        """Return [S, B, features of this context-parallel rank's heads] of [L, B, features]."""
        group = self.pg_collection.cp
        if self.cp_size > 1:
            order = common._build_head_perm_for_split_sections(
                self.in_proj_split_sections, self.cp_size, projected.device
            )
            projected = projected.index_select(-1, order)
        return common.tensor_a2a_cp2hp(projected, seq_dim=0, head_dim=-1, cp_group=group)

    def _own_heads(self, parameter: Tensor, sections: list[int] | None = None) -> Tensor:
        """Return the part of a parameter for this context-parallel rank's heads, in each of its sections."""
        return common.get_parameter_local_cp(
            parameter, dim=0, cp_group=self.pg_collection.cp, split_sections=sections
        )

    @property
    def _convolution(self) -> Tensor:
        """The weights of the convolution [D, W] of this rank's heads."""
        sections = [self.qk_dim_local_tp, self.qk_dim_local_tp, self.v_dim_local_tp]
        return self._own_heads(self.conv1d.weight, sections).squeeze(1)

    def _mix_plainly(
        self, qkv: Tensor, decay: Tensor, beta: Tensor, rows: RecordSpans | None
    ) -> Tensor:
        """Return [B, S, heads, V] of qkv, decay and beta [S, B, ...]."""
        mix = functools.partial(
            delta_net,
            key_heads=self.num_k_heads_local_tp // self.cp_size,
            key_size=self.key_head_dim,
        )
        weight, tensors = self._convolution, (qkv, decay, beta)
        if rows is None:
            qkv, decay, beta = (t.transpose(0, 1) for t in tensors)
            return mix(qkv, weight, decay, beta)
        outputs = []
        for bucket in rows.plan.buckets:
            qkv, decay, beta = (
                t.flatten(0, 1).index_select(0, bucket.query_index).unflatten(0, (bucket.count, -1))
                for t in tensors
            )
            outputs.append(mix(qkv, weight, decay, beta).flatten(0, 1))
        # Gathered in both directions, because every token has one place.
        mixed = torch.cat(outputs).index_select(0, rows.plan.order)
        return mixed.unflatten(0, tensors[0].shape[:2]).transpose(0, 1)

    def _mix_with_kernels(
        self, qkv: Tensor, decay: Tensor, beta: Tensor, rows: RecordSpans | None
    ) -> Tensor:
        """Return [B, S, heads, V] of qkv, decay and beta [S, B, ...]."""
        length, batch, _ = qkv.shape
        tensors = [t.transpose(0, 1) for t in (qkv, decay, beta)]
        borders = None
        if rows is not None:  # all rows one after another, as one
            tensors = [t.flatten(0, 1).unsqueeze(0) for t in tensors]
            borders = rows.variable_lengths.cu_queries
        qkv, decay, beta = (t.contiguous() for t in tensors)
        qkv, _ = common.causal_conv1d(
            x=qkv, weight=self._convolution, activation=self.activation, cu_seqlens=borders
        )
        keys = self.qk_dim_local_tp // self.cp_size
        *both, value = qkv.split([keys, keys, qkv.size(-1) - 2 * keys], dim=-1)
        repeats = self.num_value_heads // self.num_key_heads
        query, key = (
            common.l2norm(part.unflatten(-1, (-1, self.key_head_dim)).contiguous())
            .repeat_interleave(repeats, dim=2)
            .contiguous()
            for part in both
        )
        value = value.unflatten(-1, (-1, self.value_head_dim)).contiguous()
        mixed, _ = self.gated_delta_rule(
            query, key, value, g=decay, beta=beta, use_qk_l2norm_in_kernel=False, cu_seqlens=borders
        )
        return mixed.reshape(batch, length, *mixed.shape[2:])

    def _project(self, mixed_BS: Tensor, gate_BS: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the output [L, B, H], under sequence parallelism a part of it, of [B, S, heads, V]."""
        batch, length = mixed_BS.shape[:2]
        gated = functools.partial(
            self._gated_norm_and_a2a, thd_cp_a2a_inv=None, batch=batch, seq_len=length
        )
        if not self.recompute_norm_out:
            return self.out_proj(gated(mixed_BS, gate_BS))
        checkpoint = tensor_parallel.CheckpointWithoutOutput(fp8=self.config.fp8)
        out, bias = self.out_proj(checkpoint.checkpoint(gated, mixed_BS, gate_BS))
        checkpoint.discard_output_and_register_recompute(out)
        return out, bias
