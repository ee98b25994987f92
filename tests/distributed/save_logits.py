"""Run under torchrun: loads a checkpoint through Megatron and saves the logits of given tokens; then
fills the model from the HuggingFace folder and compares every parameter bit by bit.

torchrun … save_logits.py --tokens tokens.pt --logits logits.pt <flags of megatron_profit.sft>
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
from megatron_profit.backends import activate

activate("cpu")

import torch
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import unwrap_model
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.initialize import initialize_megatron
from megatron.training.training import setup_model_and_optimizer

from checkpoint_conversion.hf_model import open_hf_model
from megatron_profit.models.layer_specs import layer_spec
from megatron_profit.training.arguments import read_arguments
from megatron_profit.training.hf_weights import load, model_shards


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
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens")
    parser.add_argument("--logits")
    own, sys.argv[1:] = parser.parse_known_args()
    arguments = read_arguments(sys.argv[1:], "cpu")
    args = parse_and_validate_args(extra_args_provider=arguments.add_to_parser)
    initialize_megatron()
    config = gpt_config_from_args(args)
    config.transformer_layer_spec = layer_spec
    model, _, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        model_provider_func=None,
        checkpointing_context={},
        cfg_container=pretrain_cfg_container_from_args(args, config),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    tokens = torch.load(own.tokens)

    def forward_step(data_iterator, model):
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        return model(tokens, positions, None), lambda output, non_loss_data: output

    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=model,
            num_microbatches=1,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if mpu.is_pipeline_last_stage():
        logits = gather_from_tensor_model_parallel_region(outputs[0])
        if mpu.get_tensor_model_parallel_rank() == 0:
            torch.save(logits[..., : args.vocab_size].clone(), own.logits)
    with torch.no_grad():
        compare_with_huggingface(unwrap_model(model), args.hf_model, args.vocab_size)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
