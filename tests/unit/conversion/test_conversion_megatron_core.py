"""Megatron-Core itself loads the result, the vocabulary padded for tensor parallelism."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conversion_helpers import HEAD_DIM, HIDDEN, KV_HEADS, LAYERS, expected_megatron, read_hf

from checkpoint_conversion.hf_to_megatron import hf_to_megatron

# Asks for every layer, and for rank 1 of 2's part of a vocabulary padded to 512.
LOAD = """
import os, sys
import torch
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

folder, layers, vocabulary, hidden, qkv, result = sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6]
request = {
    name: ShardedTensor.from_rank_offsets(
        name, torch.empty(vocabulary // 2, hidden), (0, 1, 2), allow_shape_mismatch=True
    )
    for name in ("embedding.word_embeddings.weight", "output_layer.weight")
}
for layer in range(layers):
    name = "decoder.layers.self_attention.linear_qkv.weight"
    request[f"qkv {layer}"] = ShardedTensor.from_rank_offsets(
        name, torch.empty(qkv, hidden), (0, layer, layers), prepend_axis_num=1
    )
    for module in ("self_attention.linear_qkv", "self_attention.q_layernorm", "mlp.linear_fc2"):
        name = f"decoder.layers.{module}._extra_state"
        request[f"{name} {layer}"] = ShardedObject(name, None, (layers,), (layer,))
name = "decoder.final_layernorm._extra_state"
request[name] = ShardedObject(name, None, (1,), (0,))
loaded = dist_checkpointing.load(request, folder, validate_access_integrity=False)
loaded["args"] = vars(loaded["args"])
torch.save(loaded, result)
"""


@pytest.mark.slow
def test_megatron_core_loads_the_result(qwen3, tmp_path):
    hf_to_megatron(qwen3, tmp_path / "out")
    qkv, padded = 4 * KV_HEADS * HEAD_DIM, 512
    sizes = map(str, (LAYERS, padded, HIDDEN, qkv))
    result = tmp_path / "loaded.pt"
    command = [sys.executable, "-c", LOAD, tmp_path / "out" / "release", *sizes, result]
    subprocess.run(list(map(str, command)), check=True)

    loaded, expected = torch.load(result), expected_megatron(read_hf(qwen3))
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        whole = torch.cat([expected[key], torch.zeros(padded - len(expected[key]), HIDDEN)])
        assert torch.equal(loaded[key], whole[padded // 2 :])
    for layer, weight in enumerate(expected["decoder.layers.self_attention.linear_qkv.weight"]):
        assert torch.equal(loaded[f"qkv {layer}"], weight)
    states = [value for key, value in loaded.items() if "_extra_state" in key]
    assert states == [None] * (3 * LAYERS + 1)
    assert loaded["iteration"] == 0
    assert loaded["args"]["num_layers"] == LAYERS
