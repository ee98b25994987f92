"""Tiny Qwen3 models, saved by transformers as a user's model would be."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conversion_helpers import (
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    VOCABULARY,
    write_config,
)

from checkpoint_conversion import cli


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(("<unk>", "<eos>", "one", "two", "three"))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", chat_template="{{ bos }}"
    )
    fast.save_pretrained(folder)


def _old_style(config: dict) -> None:
    """config.json as transformers 4 wrote it."""
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = None
    config["torch_dtype"] = config.pop("dtype")


@pytest.fixture
def make_qwen3(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder with a tiny random Qwen3; norms are random too, or a swap would go unseen."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    def make(
        name: str = "hf",
        *,
        tied: bool = False,
        dtype: torch.dtype = torch.float32,
        shard_size: str = "1GB",
        old_style: bool = False,
        layers: int = LAYERS,
    ) -> Path:
        folder = tmp_path / name
        config = Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            max_position_embeddings=128,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            tie_word_embeddings=tied,
        )
        generator = torch.Generator().manual_seed(len(name))
        model = Qwen3ForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.05, generator=generator)
        model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
        _save_tokenizer(folder)
        if old_style:
            write_config(folder, _old_style)
        return folder

    return make


@pytest.fixture
def qwen3(make_qwen3: Callable[..., Path]) -> Path:
    """An untied Qwen3 in one file."""
    return make_qwen3()


@dataclass
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def run_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """Runs `python -m checkpoint_conversion.<name>` in this process."""

    def run(name: str, *arguments: object) -> Result:
        module = importlib.import_module(f"checkpoint_conversion.{name}")
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.run(module.main)
        captured = capsys.readouterr()
        return Result(int(stopped.value.code or 0), captured.out, captured.err)

    return run
