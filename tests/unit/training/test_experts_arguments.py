"""A model with experts on the command line: its layout, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core import mpu

from megatron_profit.flags import ArgumentsError
from megatron_profit.training.arguments.derive import derive
from megatron_profit.training.step.experts import router_padding, scale_balancing

DENSE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 508,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
}
MOE = {
    **DENSE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.02,
}
PROFIT = "--objective profit --prob-threshold 0.1 --threshold-direction higher"
TP = "--tensor-model-parallel-size 2 --sequence-parallel"


def parse(flags: str, world_size: int = 1, config=MOE):
    rest = "--hf-model x --data a.jsonl --seq-length 64 --micro-batch-size 2 --lr 1 --train-iters 9"
    return derive(f"{rest} {PROFIT} {flags}".split(), "cpu", world_size, config)


def test_the_experts_come_from_the_folder():
    values = parse("").values
    assert values["num_experts"] == 8
    assert values["moe_aux_loss_coeff"] == 0.02
    assert values["moe_token_dispatcher_type"] == "alltoall"
    assert values["moe_grouped_gemm"] is False
    assert parse("", config=DENSE).values["moe_grouped_gemm"] is False


@pytest.mark.parametrize(
    ("flags", "world_size"),
    [
        ("--expert-model-parallel-size 8", 8),
        (TP, 2),
        (f"{TP} --expert-model-parallel-size 4 --expert-tensor-parallel-size 1", 4),
        ("--moe-aux-loss-coeff 0.5 --moe-router-load-balancing-type global_aux_loss", 1),
        ("--moe-aux-loss-coeff 0 --objective-normalization kept", 1),
        ("--moe-router-load-balancing-type none --objective-normalization kept", 1),
    ],
)
def test_layouts_and_choices_of_training_are_accepted(flags, world_size):
    parse(flags, world_size)


@pytest.mark.parametrize(
    ("flags", "world_size", "named"),
    [
        ("--expert-model-parallel-size 3", 3, ("--expert-model-parallel-size 3", "8")),
        ("--expert-model-parallel-size 4", 2, ("size 4", "ranks, 2")),
        ("--expert-tensor-parallel-size 3", 3, ("--expert-tensor-parallel-size 3", "40")),
        ("--tensor-model-parallel-size 2", 2, ("--sequence-parallel",)),
        ("--num-experts 4", 1, ("--num-experts", "4", "8")),
        ("--moe-router-topk 1", 1, ("--moe-router-topk", "1", "2")),
        ("--moe-shared-expert-intermediate-size 8", 1, ("--moe-shared-expert-intermediate-size",)),
        ("--moe-router-load-balancing-type sinkhorn", 1, ("sinkhorn", "aux_loss")),
        ("--moe-grouped-gemm", 1, ("--moe-grouped-gemm", "Transformer Engine")),
        ("--objective-normalization kept", 1, ("0.02", "--moe-aux-loss-coeff 0")),
        (
            "--objective-normalization kept --moe-aux-loss-coeff 0 --moe-z-loss-coeff 0.001",
            1,
            ("0.001", "--moe-z-loss-coeff 0"),
        ),
    ],
)
def test_what_cannot_work_is_refused(flags, world_size, named):
    with pytest.raises(ArgumentsError) as error:
        parse(flags, world_size)
    assert all(part in str(error.value) for part in named), error.value


@pytest.mark.parametrize(
    "flags",
    ["--expert-model-parallel-size 2", "--expert-tensor-parallel-size 2", "--num-experts 2"],
)
def test_a_dense_model_has_no_experts(flags):
    with pytest.raises(ArgumentsError, match=flags.split()[0]):
        parse(flags, 2, DENSE)


EXPERTS_ALONE = "--lora-rank 4 --lora-targets gate_proj up_proj down_proj"


@pytest.mark.parametrize(
    ("layout", "world_size", "flag"),
    [
        ("--expert-model-parallel-size 2", 2, "--expert-model-parallel-size 2"),
        (f"{TP} --expert-tensor-parallel-size 1", 2, "--expert-tensor-parallel-size 1"),
    ],
)
def test_adapters_of_experts_alone_need_experts_without_groups_of_their_own(
    layout, world_size, flag
):
    """Megatron would train, and end at the first checkpoint: its optimizer of the rest has no parameters."""
    remedy = f"with {flag} .* add a projection of the attention, .* or drop {flag[:-2]}"
    with pytest.raises(ArgumentsError, match=remedy):
        parse(f"{EXPERTS_ALONE} {layout} --save run", world_size)
    parse(f"{EXPERTS_ALONE} {layout}", world_size)
    parse(f"{EXPERTS_ALONE} q_proj {layout} --save run", world_size)
    some_dense = {**MOE, "mlp_only_layers": [0]}
    parse(f"{EXPERTS_ALONE} {layout} --save run", world_size, some_dense)


def test_adapters_of_experts_alone_train_in_the_groups_of_the_model():
    parse(f"{EXPERTS_ALONE} --save run")
    parse(f"{EXPERTS_ALONE} {TP} --expert-tensor-parallel-size 2 --save run", 2)


def test_the_balancing_weighs_what_its_coefficient_says():
    config = SimpleNamespace(grad_scale_func=None)
    scale_balancing(config, 0.25)
    assert config.moe_grad_scale_func().item() == 0.25
    config.grad_scale_func = lambda loss: 8 * loss
    assert config.moe_grad_scale_func().item() == 2.0


def test_padding_is_kept_from_the_router(monkeypatch):
    model = SimpleNamespace(
        config=SimpleNamespace(num_moe_experts=4, sequence_parallel=True), pre_process=True
    )
    record = torch.tensor([[3, 3, 5, -1], [-1, -1, -1, -1]])
    expected = [[False, False, False, True], [False, True, True, True]]
    assert router_padding(record, model).tolist() == expected
    # The part of another context-parallel rank may begin in the padding behind a record.
    monkeypatch.setattr(mpu, "get_context_parallel_rank", lambda: 1)
    expected[1] = [True] * 4
    assert router_padding(record, model).tolist() == expected
    model.config.num_moe_experts = None
    assert router_padding(record, model) is None
