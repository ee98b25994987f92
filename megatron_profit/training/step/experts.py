"""Models with experts: padding that the router leaves out, and the weight of the loss that balances it.

The router sees every token of a row, whatever the objective trains on; only padding is kept from its
auxiliary losses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core import mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig


def router_padding(example_index: torch.Tensor, model: GPTModel) -> torch.Tensor | None:
    """Return Megatron's `padding_mask`: the tokens that the router's auxiliary losses leave out.

    Args:
        example_index: [B, L], negative in padding; with context parallelism the rank's part of the rows.
        model: The pipeline stage.

    Returns:
        [B, L] bool, after the first stage only the sequence-parallel rank's part; the first stage splits it
        itself. None for a model without experts.
    """
    if model.config.num_moe_experts is None:
        return None
    padding_BL = example_index < 0
    if mpu.get_context_parallel_rank() == 0:
        # Only a row without a record begins with padding. Megatron would divide by its 0 tokens. The
        # other ranks' parts may begin anywhere in the row.
        padding_BL[:, 0] = False
    if model.config.sequence_parallel and not model.pre_process:
        padding_BL = scatter_to_sequence_parallel_region(padding_BL.T.contiguous()).T
    return padding_BL.contiguous()


def scale_balancing(config: TransformerConfig, supervised_share: float) -> None:
    """Give the auxiliary losses of the router the weight that their coefficients say.

    Megatron multiplies them by the number of tokens that the router sees, and divides all gradients by the
    divisor of the loss (megatron/core/transformer/moe/router.py, attach_and_log_load_balancing_loss). It
    takes the two for the same number. Here prompts are routed and not supervised. So without this function
    the coefficient would grow with the length of the prompts: for example, to 4 times its value where a
    quarter of the tokens is supervised.

    Args:
        config: Its `moe_grad_scale_func` is set.
        supervised_share: Supervised tokens over all tokens but padding, in the training data: a
            constant, so that a resumed run is the same as an uninterrupted one.
    """

    def scale() -> torch.Tensor:
        scale_loss: Callable | None = config.grad_scale_func  # of fp16
        share = torch.tensor(supervised_share)
        return share if scale_loss is None else scale_loss(share)

    config.moe_grad_scale_func = scale
