"""Reading both formats without the converter, and the mapping between them by formula."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

# 4 heads of 32 are wider than the hidden size of 64.
VOCABULARY, LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 507, 3, 64, 96, 4, 2, 32


def read_hf(folder):
    """All tensors of a HuggingFace folder."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def read_megatron(folder):
    """All tensors of a checkpoint, each as a whole, and the names of its other entries."""
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    objects = {key for key, entry in entries.items() if isinstance(entry, BytesStorageMetadata)}
    return tensors, objects


def read_object(folder, key):
    """A non-tensor entry, as Megatron-Core reads it."""
    content = {key: io.BytesIO()}
    dcp.load(content, checkpoint_id=folder, no_dist=True)
    value = content[key]
    if isinstance(value, io.BytesIO):
        with torch.serialization.safe_globals([argparse.Namespace]):
            value = torch.load(value, weights_only=True)
    return value


def expected_megatron(hf, tied=False):
    """The Megatron tensors of the HuggingFace ones, by formula."""

    def layers(name):
        return torch.stack([hf[f"model.layers.{i}.{name}.weight"] for i in range(LAYERS)])

    qkv = [
        layers(f"self_attn.{part}_proj").view(LAYERS, KV_HEADS, -1, HEAD_DIM, HIDDEN)
        for part in "qkv"
    ]
    expected = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        "decoder.layers.self_attention.linear_qkv.weight": torch.cat(qkv, dim=2).reshape(
            LAYERS, (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN
        ),
        "decoder.layers.mlp.linear_fc1.weight": torch.cat(
            [layers("mlp.gate_proj"), layers("mlp.up_proj")], dim=1
        ),
    }
    for megatron, name in {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm",
        "self_attention.q_layernorm.weight": "self_attn.q_norm",
        "self_attention.k_layernorm.weight": "self_attn.k_norm",
        "self_attention.linear_proj.weight": "self_attn.o_proj",
        "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm",
        "mlp.linear_fc2.weight": "mlp.down_proj",
    }.items():
        expected[f"decoder.layers.{megatron}"] = layers(name)
    if not tied:
        expected["output_layer.weight"] = hf["lm_head.weight"]
    return expected


def assert_equal(tensors, expected):
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        assert tensor.dtype == expected[key].dtype, key
        assert torch.equal(tensor, expected[key]), key


def write_config(folder: Path, change: Callable[[dict], object]) -> None:
    """Rewrite config.json after a change to its content."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config, indent=2))
