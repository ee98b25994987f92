"""Where adapters lie on a rank, and how their start is drawn."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from checkpoint_conversion.adapters.options import ALL_LINEAR, LoraOptions, resolved
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import TensorRule
from megatron_profit.models.lora import linear
from megatron_profit.models.lora.linear import start_of_a
from megatron_profit.models.lora.placement import (
    LocalWeight,
    Run,
    Span,
    arrangement,
    local_weights,
)
from megatron_profit.models.lora.transform import adapt

Q, K, V = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")


def joined(*runs: Run) -> LocalWeight:
    """Return a rank's joined query, key and value weight: the second of two ranks, with one KV head."""
    rows = {(Q, ""): 16, (K, ""): 8, (V, ""): 8}
    columns = Span(0, 12, 12)
    return LocalWeight(
        "linear_qkv", torch.nn.Parameter(torch.zeros(16, 12)), "key", (), (0, 0, 0), runs, columns,
        rows, False,
    )  # fmt: skip


def test_the_rows_of_a_projection_go_where_megatron_has_them():
    weight = joined(Run(Q, 8, 8, 0), Run(K, 4, 4, 8), Run(V, 4, 4, 12))
    assert weight.spans_of(Q) == {"": Span(8, 8, 16)}
    assert weight.spans_of(V) == {"": Span(4, 4, 8)}
    assert arrangement(weight, [(Q, ""), (K, ""), (V, "")]) == ((0, 0, 8), (1, 0, 4), (2, 0, 4))
    assert arrangement(weight, [(V, "")]) == ((None, 0, 8), (None, 0, 4), (0, 0, 4))


def test_several_kv_heads_of_a_rank_alternate():
    weight = joined(Run(Q, 0, 4, 0), Run(K, 0, 2, 4), Run(Q, 4, 4, 6), Run(K, 2, 2, 10))
    assert weight.spans_of(Q) == {"": Span(0, 8, 16)}
    assert arrangement(weight, [(Q, ""), (K, "")]) == ((0, 0, 4), (1, 0, 2), (0, 4, 4), (1, 2, 2))


def test_parts_of_a_projection_have_rows_of_their_own():
    """As the query, key and value of Gated DeltaNet's fused projection, on the second of two ranks."""
    qkv, z = (f"model.layers.0.linear_attn.in_proj_{name}.weight" for name in ("qkv", "z"))
    runs = [Run(qkv, 4, 4, 0, ".query"), Run(qkv, 4, 4, 4, ".key"), Run(qkv, 6, 6, 8, ".value")]
    weight = joined(*runs, Run(z, 6, 6, 14, ".z"))
    rows = {(qkv, ".query"): 8, (qkv, ".key"): 8, (qkv, ".value"): 12, (z, ".z"): 12}
    weight = replace(weight, rows=rows)
    assert weight.spans_of(qkv)[".value"] == Span(6, 6, 12)
    chosen = [(qkv, part) for part in weight.spans_of(qkv)]
    assert arrangement(weight, chosen) == ((0, 0, 4), (1, 0, 4), (2, 0, 6), (None, 0, 6))


def test_rows_that_are_no_neighbours_cannot_have_an_adapter():
    weight = joined(Run(Q, 0, 4, 0), Run(Q, 8, 4, 4))
    with pytest.raises(ConversionError, match="are not neighbours"):
        weight.spans_of(Q)


def test_the_start_of_a_does_not_depend_on_the_layout():
    whole = start_of_a(5, Q, 4, Span(0, 12, 12))
    parts = [start_of_a(5, Q, 4, Span(first, 4, 12)) for first in (0, 4, 8)]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert all(part.is_contiguous() for part in parts)
    assert whole.abs().max() <= 12**-0.5
    assert whole.std() == pytest.approx(12**-0.5 / 3**0.5, rel=0.2)
    assert not torch.equal(whole, start_of_a(5, K, 4, Span(0, 12, 12)))
    assert not torch.equal(whole, start_of_a(6, Q, 4, Span(0, 12, 12)))


class Stage(torch.nn.Module):
    """A pipeline stage with one matrix, kept in some shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(shape))

    def sharded_state_dict(self) -> dict[str, ShardedTensor]:
        place = ShardedTensor.from_rank_offsets(
            "fc.weight", self.weight.detach(), replica_id=(0, 0, 0)
        )
        return {"weight": place}


def test_a_matrix_that_is_kept_in_another_form_is_named():
    """For example, all experts in one tensor: adapters would silently be left out."""
    rules = [TensorRule("fc.weight", {"model.fc.weight": (4, 3)})]
    assert [weight.key for weight in local_weights(Stage(4, 3), rules)] == ["fc.weight"]
    with pytest.raises(ConversionError, match=r"keep fc\.weight in a form that cannot have"):
        local_weights(Stage(2, 4, 3), rules)


class Experts(torch.nn.Module):
    """A stage with an expert of two and a shared one."""

    def __init__(self) -> None:
        super().__init__()
        self.expert, self.shared = (torch.nn.Linear(3, 4, bias=False) for _ in range(2))
        self.config = SimpleNamespace(sequence_parallel=False)

    def sharded_state_dict(self) -> dict[str, ShardedTensor]:
        expert, shared = self.expert.weight.detach(), self.shared.weight.detach()
        place, replica = ShardedTensor.from_rank_offsets, (0, 0, 0)
        return {
            "expert.weight": place(
                "expert.weight", expert, (0, 1, 2), replica_id=replica, prepend_axis_num=1
            ),
            "shared.weight": place("shared.weight", shared, replica_id=replica),
        }


def test_experts_that_a_folder_holds_as_one_tensor_get_no_adapters(monkeypatch):
    """Their tensor in Qwen3.5's models is called down_proj, as the shared expert's projection."""
    monkeypatch.setattr(
        linear.mpu, "get_tensor_model_parallel_group", lambda: SimpleNamespace(size=lambda: 1)
    )
    rules = [
        TensorRule("expert.weight", {"mlp.experts.down_proj": (2, 4, 3)}, axes={"expert": 2}),
        TensorRule("shared.weight", {"mlp.shared_expert.down_proj.weight": (4, 3)}),
    ]
    stage = Experts()
    adapt([stage], rules, resolved(rules, LoraOptions(2, 4, (ALL_LINEAR,))), seed=1)
    trained = [name for name, p in stage.named_parameters() if p.requires_grad]
    assert trained == ["lora.layers.shared.down_proj_A", "lora.layers.shared.down_proj_B"]
