"""Run under torchrun: loads a checkpoint through Megatron and saves the logits of given tokens; then
fills the model from the HuggingFace folder and compares every parameter bit by bit.

torchrun … save_logits.py TOKENS LOGITS <flags of megatron_profit.logits>
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
from megatron_profit.megatron_patches import activate

activate("cpu")

import torch
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from checkpoint_conversion.hf.model import open_hf_model
from megatron_profit.commands.logits import build_model, logits
from megatron_profit.training.checkpoints.hf_weights import load, model_shards


@torch.no_grad()
def compare_with_huggingface(chunks, hf_model, vocab_size):
    """Check that both ways of loading give the same bits; rows that pad the vocabulary are random
    after the one and 0 after the other."""
    shards = [shard for shard, _ in model_shards(chunks)]
    from_checkpoint = [shard.values.clone() for shard in shards]
    for shard in shards:
        shard.values.fill_(float("nan"))
    load(open_hf_model(hf_model), chunks)
    for shard, expected in zip(shards, from_checkpoint, strict=True):
        rows = len(expected)
        if shard.key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            rows = min(rows, max(0, vocab_size - shard.offsets[0]))
            assert not shard.values[rows:].any(), shard.key
        assert torch.equal(shard.values[:rows], expected[:rows]), shard.key


def main() -> None:
    tokens_file, logits_file, *flags = sys.argv[1:]
    tokens = torch.load(tokens_file)
    chunks = build_model([*flags, "--seq-length", str(tokens.size(1))], "cpu")
    result = logits(chunks, tokens)
    first = (
        mpu.get_tensor_model_parallel_rank() == 0
        and mpu.get_data_parallel_rank(with_context_parallel=True) == 0
    )
    if result is not None and first:
        torch.save(result, logits_file)
    args = get_args()
    compare_with_huggingface(unwrap_model(chunks), args.hf_model, args.vocab_size)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
