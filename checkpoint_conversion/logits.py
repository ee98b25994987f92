"""Comparison of two models by their logits for some prompts, in fp32 on the CPU.

The tensors of a conversion can be right and the model wrong. For example, no tensor shows a rotary
base, a norm's epsilon or the order of heads. So one side is transformers, and the other is Megatron's
own forward pass. Megatron runs in a process of its own (`megatron_profit.logits`); this module does not
import it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint_conversion.adapters.saved import check_comparable
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import family_for
from checkpoint_conversion.hf.folder import read_hf_config
from checkpoint_conversion.in_transformers import load_language_model
from checkpoint_conversion.torch_dist.folder import find_checkpoint
from checkpoint_conversion.torch_dist.writer import RELEASE, TRACKER

# Prose, code, numbers and other scripts, so that many rows of the vocabulary are read.
PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Question: A train covers 120 km in 1.5 hours. What is its speed?\nAnswer: 120 / 1.5 =",
    "光合作用是植物利用阳光把二氧化碳和水转化为",
    "Die Würde des Menschen ist unantastbar. Sie zu achten und zu",
    '{"name": "Ada", "born": 1815, "languages": ["English", "French"], "field":',
)


@dataclass(frozen=True)
class LogitsReport:
    """The distance between two models.

    Attributes:
        prompts: Number of prompts.
        positions: Number of positions at which logits were compared.
        max_difference: Largest absolute difference of two logits.
        top1_agreement: Share of positions with the same most probable token.
        mean_kl, max_kl: KL divergence of the second model's distribution from the first's, in nats.
    """

    prompts: int
    positions: int
    max_difference: float
    top1_agreement: float
    mean_kl: float
    max_kl: float

    def __str__(self) -> str:
        return (
            f"logits of {self.prompts} prompts, {self.positions} positions: largest difference "
            f"{self.max_difference:.2e}, top-1 agreement {self.top1_agreement:.2%}, KL "
            f"{self.mean_kl:.2e} on average, {self.max_kl:.2e} at most"
        )


def compare_logits(
    hf: str | Path,
    other_hf: str | Path | None = None,
    *,
    megatron: str | Path | None = None,
    iteration: str | int | None = None,
    prompts: Sequence[str] = PROMPTS,
) -> LogitsReport:
    """Compare a HuggingFace model, computed by transformers, with another computation.

    Args:
        hf: HuggingFace folder with a tokenizer.
        other_hf: Second HuggingFace folder, which transformers computes too; or
        megatron: Megatron's save folder, or a checkpoint in it, which Megatron computes. With neither,
            Megatron computes the weights of `hf`, as a run does that starts from them.
        iteration: A number or "release"; None for the latest.
        prompts: Texts to compute logits for.

    Raises:
        ConversionError: When a side cannot be computed.
    """
    entries = min(map(_vocabulary, [hf] if other_hf is None else [hf, other_hf]))
    checkpoint = None if megatron is None else find_checkpoint(megatron, iteration)
    if checkpoint is not None:
        check_comparable(checkpoint)
    tokens, lengths = _tokenise(hf, prompts, entries)
    if other_hf is not None:
        right = _by_transformers(other_hf, tokens, lengths)
    else:
        right = _by_megatron(hf, checkpoint, tokens, lengths)
    return _compare(zip(_by_transformers(hf, tokens, lengths), right, strict=True))


def read_prompts(file: str | Path) -> list[str]:
    """Return the prompts in a text file, one to a line.

    Raises:
        ConversionError: For a file that cannot be read or holds none.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{file}: {error}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ConversionError(f"{file}: no prompt; give one to a line")
    return prompts


def _compare(pairs: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> LogitsReport:
    differences, agreements, divergences = [], [], []
    for left, right in pairs:
        if left.shape != right.shape:
            raise ConversionError(
                f"logits {list(left.shape)} and {list(right.shape)} cannot be compared"
            )
        differences.append((left - right).abs().max())
        agreements.append(left.argmax(-1) == right.argmax(-1))
        log_p, log_q = left.double().log_softmax(-1), right.double().log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
    agree, kl = torch.cat(agreements), torch.cat(divergences)
    return LogitsReport(
        prompts=len(differences),
        positions=len(kl),
        max_difference=float(torch.stack(differences).max()),
        top1_agreement=float(agree.double().mean()),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
    )


def _vocabulary(hf: str | Path) -> int:
    """Return the number of tokens of a model."""
    config = read_hf_config(hf)
    return family_for(config).megatron_arguments(config)["vocab_size"]


def _tokenise(
    hf: str | Path, prompts: Sequence[str], entries: int
) -> tuple[torch.Tensor, list[int]]:
    """Return ids [N, S] below `entries`, padded on the right with 0, and the length of each prompt."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            hf, local_files_only=True, trust_remote_code=False
        )
        rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ConversionError(f"{hf}: its tokenizer cannot be loaded: {error}") from error
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise ConversionError(
                f"{hf}: its tokenizer makes no token of {prompt[:40]!r}; tokenizer.json is missing or "
                "incomplete, or give other --prompts"
            )
        if max(row) >= entries:
            raise ConversionError(
                f"{hf}: its tokenizer makes token {max(row)} of {prompt[:40]!r}, and the model has {entries} "
                "tokens; give the tokenizer of this model, or other --prompts"
            )
    tokens = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
    for target, row in zip(tokens, rows, strict=True):
        target[: len(row)] = torch.tensor(row)
    return tokens, [len(row) for row in rows]


def _by_transformers(
    hf: str | Path, tokens: torch.Tensor, lengths: Sequence[int]
) -> Iterator[torch.Tensor]:
    """Yield the logits [length, vocabulary] of each prompt, fp32."""
    try:
        model = load_language_model(hf, torch.float32)
    except Exception as error:  # a bad config.json can raise any class of error
        raise ConversionError(f"{hf}: transformers cannot load it: {error}") from error
    for row, length in zip(tokens, lengths, strict=True):
        with torch.no_grad():
            yield model(row[None, :length]).logits[0]


def _by_megatron(
    hf: str | Path,
    checkpoint: Path | None,
    tokens: torch.Tensor,
    lengths: Sequence[int],
) -> Iterator[torch.Tensor]:
    """Yield the logits [length, vocabulary] of each prompt, fp32."""
    if importlib.util.find_spec("megatron") is None:
        raise ConversionError(
            "--logits needs Megatron: pip install 'megatron-core[training]', or install this project "
            "with all that it depends on"
        )
    with tempfile.TemporaryDirectory() as folder:
        torch.save(tokens, f"{folder}/tokens.pt")
        command = [sys.executable, "-m", "megatron_profit.logits", "--device", "cpu"]
        command += ["--tokens", f"{folder}/tokens.pt", "--logits", f"{folder}/logits.pt"]
        command += ["--hf-model", str(hf)]
        if checkpoint is not None:
            command += ["--load", str(_save_folder(Path(folder), checkpoint))]
        # If this is run under torchrun, the new process must not take itself for one of several.
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        done = subprocess.run(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if done.returncode:
            raise ConversionError(
                f"Megatron computed no logits of {checkpoint or hf}:", done.stdout[-3000:].strip()
            )
        result = torch.load(f"{folder}/logits.pt", weights_only=True)
    for logits, length in zip(result, lengths, strict=True):
        yield logits[:length]


def _save_folder(folder: Path, checkpoint: Path) -> Path:
    """Make a save folder, as Megatron defines it, whose latest checkpoint is the given one.

    The name of the checkpoint and other checkpoints next to it do not matter.
    """
    (folder / RELEASE).symlink_to(checkpoint.resolve())
    (folder / TRACKER).write_text(RELEASE)
    return folder
