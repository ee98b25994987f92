"""Inputs of benchmarks that train: models of published sizes with random weights, chats of random words."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / "tools"))

from make_tiny_model import TinyShape, make_tiny_model

# Entries of the published config.json.
QWEN3_06B = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
QWEN3_8B = QWEN3_06B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}


def write_model(folder: Path, sizes: Mapping[str, Any], with_weights: bool = False) -> Path:
    """Write a HuggingFace folder of other sizes than a tiny model's, with the tiny model's tokenizer.

    Args:
        folder: Is replaced if it is a model's.
        sizes: Entries of config.json in place of the tiny model's.
        with_weights: Whether to write random weights in bf16.

    Returns:
        `folder`.
    """
    texts = sorted((REPOSITORY / "examples" / "data").glob("*.jsonl"))
    make_tiny_model(folder, texts, overwrite=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {"layer_types": None, "max_position_embeddings": 40960, "dtype": "bfloat16", **sizes}
    config["max_window_layers"] = config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    if with_weights:
        _write_weights(folder)
    return folder


def write_tiny_model(folder: Path, family: str) -> Path:
    """Write a tiny model of a family, such as "qwen3.5", with random weights; return `folder`."""
    texts = sorted((REPOSITORY / "examples" / "data").glob("*.jsonl"))
    return make_tiny_model(folder, texts, TinyShape(family=family), overwrite=True)


def _write_weights(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
        )
    weights = folder.with_name(folder.name + "-weights")
    model.save_pretrained(weights)
    for file in weights.glob("model*"):
        file.replace(folder / file.name)
    shutil.rmtree(weights)


def write_chats(path: Path, tokenizer_folder: Path, lengths: Sequence[tuple[int, int]]) -> Path:
    """Write chats of random words; each has about as many tokens of prompt and of answer as are given."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    generator = torch.Generator().manual_seed(0)
    ordinary = torch.tensor(
        [i for i in range(256, len(tokenizer)) if i not in tokenizer.all_special_ids]
    )

    def text(length: int) -> str:
        chosen = torch.randint(len(ordinary), (length,), generator=generator)
        return tokenizer.decode(ordinary[chosen])

    with path.open("w") as file:
        for prompt, answer in lengths:
            messages = [
                {"role": "user", "content": text(prompt)},
                {"role": "assistant", "content": text(answer)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
