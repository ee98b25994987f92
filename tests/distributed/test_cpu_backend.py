"""Megatron's own training loop on the CPU, at every kind of layout that the backend promises."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_collectives_take_uneven_sizes(ranks):
    ranks(2, HERE / "uneven_collectives.py")


# A small mixture-of-experts model in native Megatron flags, on Megatron's mock data.
OWN_SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "own_pretrain_script.py"
MODEL = """
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --kv-channels 32
    --group-query-attention --num-query-groups 2 --qk-layernorm --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0 --seq-length 64 --max-position-embeddings 64
    --tokenizer-type NullTokenizer --vocab-size 512 --mock-data
""".split()
EXPERTS = """
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 --moe-router-load-balancing-type none
    --moe-token-dispatcher-type alltoall
""".split()
TRAINING = """
    --micro-batch-size 2 --global-batch-size 8 --train-iters 2 --lr 1e-3 --lr-decay-style constant
    --log-interval 1 --eval-iters 0 --eval-interval 10 --calculate-per-token-loss --num-workers 0
    --save-interval 100 --distributed-backend gloo --transformer-impl local
    --no-gradient-accumulation-fusion --no-persist-layer-norm --no-masked-softmax-fusion
    --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion
""".split()


def steps(output: str) -> list[tuple[float, float]]:
    """The plain cross-entropy and the gradient norm of each step that a run logged."""
    found = re.findall(r"lm loss: (\S+) .*grad norm: (\S+) ", output)
    return [(float(loss), float(norm)) for loss, norm in found]


@pytest.fixture(scope="module")
def expert_checkpoint(ranks, tmp_path_factory) -> tuple[Path, list[tuple[float, float]]]:
    """A checkpoint on one process, and the steps that one process then makes from it."""
    folder = tmp_path_factory.mktemp("experts")
    flags = [*MODEL, *EXPERTS, *TRAINING]
    ranks(1, OWN_SCRIPT, *flags, "--save", folder)
    result = ranks(1, OWN_SCRIPT, *flags, "--load", folder, "--finetune", "--loss", "stock")
    assert len(steps(result.stdout)) == 2
    return folder, steps(result.stdout)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, "--expert-model-parallel-size 2"),
        (4, "--expert-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel"),
        pytest.param(
            4,
            "--expert-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel "
            "--expert-tensor-parallel-size 1",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            4,
            "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2, "--tensor-model-parallel-size 2 --sequence-parallel", marks=pytest.mark.slow
        ),
    ],
)
def test_experts_train_alike_at_every_layout(ranks, expert_checkpoint, world_size, layout):
    folder, expected = expert_checkpoint
    flags = [*MODEL, *EXPERTS, *TRAINING, "--load", folder, "--finetune", "--loss", "stock"]
    result = ranks(world_size, OWN_SCRIPT, *flags, *layout.split())
    assert steps(result.stdout) == [pytest.approx(step, rel=2e-4) for step in expected]


@pytest.mark.parametrize(
    "layout",
    [
        "--tensor-model-parallel-size 2 --sequence-parallel",
        pytest.param("", marks=pytest.mark.slow),
    ],
)
def test_an_objective_in_a_script_of_ones_own(ranks, layout):
    """With the three lines, plain SFT trains exactly as the script does without them."""
    flags = [*MODEL, *TRAINING, *layout.split()]
    with_objective, stock = (
        steps(ranks(2, OWN_SCRIPT, *flags, "--loss", loss).stdout) for loss in ("sft", "stock")
    )
    assert len(stock) == 2
    assert with_objective == [pytest.approx(step, rel=1e-5) for step in stock]


@pytest.mark.slow
def test_padding_of_the_vocabulary_stays_out_of_the_softmax_of_ones_own_script(ranks):
    """Random weights give every entry nearly the same probability, so the loss tells how many there are."""
    flags = [*MODEL, *TRAINING, "--vocab-size", 260, "--make-vocab-size-divisible-by", 512]
    (objective, _), _ = steps(ranks(1, OWN_SCRIPT, *flags, "--loss", "sft").stdout)
    (stock, _), _ = steps(ranks(1, OWN_SCRIPT, *flags, "--loss", "stock").stdout)
    assert objective == pytest.approx(math.log(260), abs=0.05)
    assert stock == pytest.approx(math.log(512), abs=0.05)


def test_an_objective_needs_the_loss_per_token(ranks):
    flags = [flag for flag in [*MODEL, *TRAINING] if flag != "--calculate-per-token-loss"]
    result = ranks(1, OWN_SCRIPT, *flags, check=False)
    assert result.returncode != 0
    assert "the objective needs --calculate-per-token-loss" in result.stdout
