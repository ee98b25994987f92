r"""An example of a user's pretrain script, with an objective added in three lines (marked 1, 2 and 3).

The other lines are typical of such scripts. It trains on Megatron's mock data, here on two processes:

    torchrun --standalone --nproc-per-node 2 examples/own_pretrain_script.py \
        --tensor-model-parallel-size 2 --num-layers 2 --hidden-size 64 --num-attention-heads 4 \
        --seq-length 64 --max-position-embeddings 64 --micro-batch-size 2 --train-iters 5 --lr 1e-3 \
        --lr-decay-style constant --log-interval 1 --eval-iters 0 --eval-interval 10 \
        --tokenizer-type NullTokenizer --vocab-size 511 --mock-data --calculate-per-token-loss

On a machine without a GPU add --distributed-backend gloo. Without Transformer Engine add
--transformer-impl local and the --no-…-fusion flags that Megatron then asks for.

The data set gives every token a label and marks in `loss_mask` which tokens count. The objective
accepts this form and labels of -100. `--calculate-per-token-loss` is needed.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Iterator, Sequence

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

# Only needed so that the script also runs without a GPU. It comes before any import of Megatron.
from megatron_profit.megatron_patches import activate

activate()

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from megatron_profit.models.layer_specs import layer_spec
from megatron_profit.objectives import build_objective
from megatron_profit.training.step.objective_loss import ObjectiveLoss

OBJECTIVES = {
    "profit": build_objective("profit", prob_threshold=[0.1], threshold_direction="higher"),
    "sft": build_objective("sft"),
}


@functools.cache
def objective_loss(name: str) -> ObjectiveLoss:
    # 1: the objective. The rows that Megatron adds to the vocabulary stay out of the softmax.
    return ObjectiveLoss(OBJECTIVES[name], vocab_size=get_tokenizer().vocab_size)


def stock_loss(
    output_tensor: torch.Tensor, loss_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss, its token count and the report, as Megatron's scripts do."""
    loss, count = (output_tensor.float() * loss_mask).sum(), loss_mask.sum()
    return loss, count.int(), {"lm loss": torch.stack([loss.detach(), count])}


def forward_step(
    data_iterator: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable]:
    """Run the model on a micro-batch; return its output and the loss function."""
    batch = {key: value.cuda(non_blocking=True) for key, value in next(data_iterator).items()}
    inputs = (batch["tokens"], batch["position_ids"], None)
    targets = {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}
    if get_args().loss == "stock":
        return model(*inputs, **targets), lambda out: stock_loss(out, batch["loss_mask"])
    loss = objective_loss(get_args().loss).micro_batch()  # 2: for each micro-batch
    return model(*inputs, **targets, **loss.model_kwargs), loss.loss_func  # 3: in output and loss


def train_valid_test_datasets_provider(
    num_samples: Sequence[int], vp_stage: int | None = None
) -> list[MockGPTDataset | None]:
    """Build Megatron's mock data sets."""
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split="98,1,1",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=get_tokenizer(),
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, num_samples, lambda: True, config).build()


train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flag that chooses the loss."""
    parser.add_argument("--loss", choices=["profit", "sft", "stock"], default="profit")
    return parser


if __name__ == "__main__":
    args = parse_and_validate_args(extra_args_provider=add_arguments)
    model_config = gpt_config_from_args(args)
    model_config.transformer_layer_spec = layer_spec
    pretrain(
        pretrain_cfg_container_from_args(args, model_config),
        train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )
