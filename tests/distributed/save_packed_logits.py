"""Run under torchrun: the logits of packed rows, whatever the layout, context parallelism included.

torchrun … save_packed_logits.py ROWS LOGITS <flags of megatron_profit.logits>

ROWS is a file of torch.save: `tokens` and `position_ids`, [N, S] int64.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
from megatron_profit.megatron_patches import activate

activate("cpu")

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import unwrap_model

from megatron_profit.commands.logits import build_model
from megatron_profit.models.record_spans import context_parallel_index, rotary_angles
from megatron_profit.training.step.batch import get_batch


def micro_batches(rows):
    for tokens, position_ids in zip(rows["tokens"], rows["position_ids"], strict=True):
        unused = torch.zeros_like(tokens)
        names = ("tokens", "position_ids", "labels", "example_index", "draw_index")
        values = (tokens, position_ids, unused, unused, unused)
        yield {name: value[None] for name, value in zip(names, values, strict=True)}


def forward_step(rows, model):
    batch = get_batch(rows, isolate=True)
    length = batch.spans.shape[1]
    batch.spans.rotary = rotary_angles(unwrap_model(model), batch.position_ids, length)
    output = model(batch.tokens, batch.position_ids, None, packed_seq_params=batch.spans)
    return output, lambda logits, non_loss_data: whole(logits)


def whole(logits):
    """[1, S, vocabulary]: all ranks' vocabulary entries, all ranks' positions in their order."""
    logits = gather_from_tensor_model_parallel_region(logits.float()).contiguous()
    size = mpu.get_context_parallel_world_size()
    parts = [torch.empty_like(logits) for _ in range(size)]
    dist.all_gather(parts, logits, group=mpu.get_context_parallel_group())
    length = size * logits.size(1)
    places = torch.cat([context_parallel_index(length, size, rank) for rank in range(size)])
    return torch.cat(parts, dim=1)[:, places.argsort()]


@torch.no_grad()
def main() -> None:
    rows_file, logits_file, *flags = sys.argv[1:]
    rows = torch.load(rows_file)
    count, length = rows["tokens"].shape
    chunks = build_model([*flags, "--seq-length", str(length)], "cpu")
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[micro_batches(rows) for _ in chunks],
        model=chunks,
        num_microbatches=count,
        seq_length=length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    others = mpu.get_tensor_model_parallel_rank() + mpu.get_context_parallel_rank()
    if any(unwrap_model(chunk).post_process for chunk in chunks) and others == 0:
        torch.save(torch.cat(outputs), logits_file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
