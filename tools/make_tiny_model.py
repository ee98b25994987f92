"""Make a tiny model with random weights, and a tokenizer of its own, as a HuggingFace folder.

    python tools/make_tiny_model.py --out runs/tiny --data examples/data/arithmetic_*.jsonl

It is a Qwen3, or of the family that --family names. The folder has the files of a published checkpoint:
config, generation config, safetensors in fp32, tokenizer, chat template. A laptop trains a model of this
size in seconds, so the quickstart and the tests need no download. The model keeps the features that tend to
break a conversion:

- a head_dim that is not hidden_size / heads,
- grouped key/value heads,
- q and k norms, and
- a vocabulary with more rows than the tokenizer has tokens.

The shape splits over two tensor- and two pipeline-parallel ranks.

The folder is written under a temporary name next to its destination, and renamed when it is complete.
The same arguments give the same files.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2TokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from checkpoint_conversion.cli import FlagHelp

# As in a published Qwen3 base: <|endoftext|> pads and stops generation. <|im_end|> ends a turn, which
# training has yet to teach.
PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD, TURN_START, TURN_END)
BYTES = 256
# Dimensions that two ranks can share.
SHARED = (
    *("hidden_size", "intermediate_size", "num_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
# The end of a family whose language model comes with a vision tower.
VISION = "-vision"
# The beginning of the classes' names in transformers.
FAMILIES = {
    "qwen3": "Qwen3",
    "qwen3.5": "Qwen3_5",
    "qwen3.5-vision": "Qwen3_5",
    "qwen3.5-moe": "Qwen3_5Moe",
    "qwen3.5-moe-vision": "Qwen3_5Moe",
    "qwen3-next": "Qwen3Next",
    "olmo2": "Olmo2",
}

CHAT_TEMPLATE = (
    "{%- for message in messages -%}\n"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "{{- '<|im_start|>assistant\\n' -}}\n"
    "{%- endif -%}\n"
)


@dataclass(frozen=True)
class TinyShape:
    """Dimensions of the model; the defaults are the quickstart's.

    Raises:
        ValueError: a dimension cannot be built, or not split over two ranks; it is named.
    """

    vocab_size: int = 512
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    # Standard deviation of the random weights. Qwen3's 0.02 suits widths of 1,024 and more. At a width
    # of 128, twice as much learns the quickstart's data in two thirds of the steps.
    initializer_range: float = 0.04
    tied: bool = True
    family: str = "qwen3"

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family is {self.family!r}; it can be {', '.join(FAMILIES)}")
        for name in SHARED:
            self._require_multiple(name, 2, "so that two ranks can share it")
        self._require_multiple("vocab_size", 4, "so that four ranks can share it")
        if not self.initializer_range > 0:
            raise ValueError(f"initializer_range is {self.initializer_range}; it must be positive")
        smallest = BYTES + len(SPECIAL_TOKENS)
        if self.vocab_size < smallest:
            raise ValueError(
                f"vocab_size is {self.vocab_size}; a byte-level tokenizer needs at least {smallest} "
                f"({BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens)"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}; it must be a multiple of "
                f"num_key_value_heads, which is {self.num_key_value_heads}"
            )

    def _require_multiple(self, name: str, divisor: int, reason: str) -> None:
        value = getattr(self, name)
        if value <= 0 or value % divisor:
            raise ValueError(
                f"{name} is {value}; it must be a positive multiple of {divisor} {reason}"
            )


def read_texts(paths: Iterable[Path]) -> list[str]:
    """Read texts to train the tokenizer on: message contents of .jsonl files, other files as they are.

    Raises:
        FileNotFoundError: a path is no file.
        ValueError: a .jsonl line is not `{"messages": [{"role": ..., "content": ...}, ...]}`, or the
            files hold no text at all.
    """
    texts: list[str] = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"--data: {path} is not a file")
        content = path.read_text(encoding="utf-8")
        texts += _message_texts(content, path) if path.suffix == ".jsonl" else [content]
    if not any(text.strip() for text in texts):
        raise ValueError("--data: the files hold no text to train a tokenizer on")
    return texts


def _message_texts(content: str, path: Path) -> list[str]:
    texts = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            for message in json.loads(line)["messages"]:
                role, text = message["role"], message["content"]
                if not (isinstance(role, str) and isinstance(text, str)):
                    raise TypeError(f"role and content are {type(role)} and {type(text)}")
                # The role is text of the prompt too, so the merges should know it.
                texts += [role + "\n", text]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: expected a JSON object with `messages`, each with a text "
                f"`role` and `content` ({type(error).__name__}: {error})"
            ) from error
    return texts


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Qwen2TokenizerFast:
    """Train byte-level BPE of at most `vocab_size` tokens, special tokens last, as in Qwen3.

    Short texts run out of pairs to merge before `vocab_size` is reached. The model then has rows that
    no token uses. Qwen3 has such rows too: 151,936 rows for 151,669 tokens.
    """
    # Qwen has rules for cutting text before the merges; for example, one token per digit. The loaded
    # folder will apply them, so the merges are learned under them.
    qwen = qwen_tokenizer({PAD: 0}, []).backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = qwen.normalizer
    bpe.pre_tokenizer = qwen.pre_tokenizer
    bpe.decoder = qwen.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = qwen_tokenizer(
        learned["vocab"],
        learned["merges"],
        unk_token=PAD,
        eos_token=PAD,
        pad_token=PAD,
        additional_special_tokens=[TURN_START, TURN_END],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def qwen_tokenizer(
    vocab: Mapping[str, int], merges: Iterable[Sequence[str]], **options: object
) -> Qwen2TokenizerFast:
    """Return Qwen's tokenizer with another vocabulary.

    It is loaded from the files of a published tokenizer, which transformers 4 and 5 both read.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
        Path(folder, "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        tokenizer = Qwen2TokenizerFast.from_pretrained(folder, **options)
    for name in (
        "is_local",
        "local_files_only",
    ):  # the way it was loaded is not saved with a model
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def build_config(shape: TinyShape, tokenizer: Qwen2TokenizerFast) -> PretrainedConfig:
    """Return the configuration of a shape, with the tokenizer's special ids."""
    kind = FAMILIES[shape.family]
    whole = getattr(transformers, f"{kind}Config")
    text = _language_model(getattr(transformers, f"{kind}TextConfig", whole), shape, tokenizer)
    if not shape.family.endswith(VISION):
        return text
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 32)
    vision = {**sizes, "depth": 1, "num_heads": 2, "patch_size": 4, "num_position_embeddings": 16}
    return whole(
        text_config=text.to_dict(),
        vision_config={**vision, "out_hidden_size": shape.hidden_size},
        tie_word_embeddings=shape.tied,
        dtype="float32",
    )


def _own_sizes(shape: TinyShape) -> dict[str, Any]:
    """Return the sizes that only a shape's family has."""
    if shape.family == "qwen3":
        return {"max_window_layers": shape.num_layers}
    if not shape.family.startswith(("qwen3.5", "qwen3-next")):
        return {}
    half = shape.intermediate_size // 2
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": half,
        "shared_expert_intermediate_size": half,
    }
    return {
        "full_attention_interval": min(4, shape.num_layers),
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": shape.head_dim // 2,
        "linear_value_head_dim": shape.head_dim // 2,
        **(experts if "moe" in shape.family or "next" in shape.family else {}),
    }


def _language_model(
    kind: type[PretrainedConfig], shape: TinyShape, tokenizer: Qwen2TokenizerFast
) -> PretrainedConfig:
    return kind(
        **_own_sizes(shape),
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        initializer_range=shape.initializer_range,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=shape.tied,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def build_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """Return a randomly initialised model; the caller's random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (
            AutoModelForImageTextToText
            if hasattr(config, "vision_config")
            else AutoModelForCausalLM
        ).from_config(config)
    text = config.get_text_config()
    # Greedy: people read the answers of so small a model, so it does not sample.
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )
    return model


def make_tiny_model(
    out: Path,
    data: Sequence[Path],
    shape: TinyShape | None = None,
    *,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Train the tokenizer, initialise the model, and write both to the folder `out`.

    Args:
        out: destination; it appears only when it is complete.
        data: chat records (.jsonl) or plain text files that the tokenizer learns from.
        shape: dimensions; None takes the defaults.
        seed: seed of the random weights.
        overwrite: replace an existing model folder.

    Returns:
        `out`.

    Raises:
        FileExistsError: `out` exists and `overwrite` is not set, or it is not a model folder.
        FileNotFoundError, ValueError: see `read_texts` and `TinyShape`.
    """
    shape = shape or TinyShape()
    _check_destination(out, overwrite)
    tokenizer = train_tokenizer(read_texts(data), shape.vocab_size)
    model = build_model(build_config(shape, tokenizer), seed)

    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        _make_readable(staging)
        if out.exists():
            shutil.rmtree(out)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out


def _make_readable(folder: Path) -> None:
    """Give the user's usual permissions to files that temporary-file functions made private."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)


def _check_destination(out: Path, overwrite: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise FileExistsError(f"--out: {out} exists; choose another folder or pass --overwrite")
    # --overwrite deletes a folder. A mistyped path must not delete a folder that this script never
    # wrote.
    is_model = out.is_dir() and not out.is_symlink() and (out / "config.json").is_file()
    if not is_model and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"--out: {out} is not a model folder; refusing to overwrite it")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    defaults = TinyShape()
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=FlagHelp,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="chat .jsonl or plain text that the tokenizer learns from",
    )
    parser.add_argument(
        "--family", choices=FAMILIES, default=defaults.family, help="the model's architecture"
    )
    for name in ("vocab_size", *SHARED):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            default=getattr(defaults, name),
            help=name.replace("_", " "),
        )
    parser.add_argument(
        "--initializer-range",
        type=float,
        default=defaults.initializer_range,
        help="standard deviation of the random weights",
    )
    output_layer = parser.add_mutually_exclusive_group()
    output_layer.add_argument(
        "--tied",
        dest="tied",
        action="store_true",
        default=defaults.tied,
        help="share the embedding with the output layer, as the small Qwen3 do (default)",
    )
    output_layer.add_argument(
        "--untied",
        dest="tied",
        action="store_false",
        default=argparse.SUPPRESS,
        help="give the output layer weights of its own",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the model; return the exit code."""
    arguments = parse_arguments(argv)
    try:
        shape = TinyShape(
            **{name: getattr(arguments, name) for name in TinyShape.__dataclass_fields__}
        )
        disable_progress_bar()
        out = make_tiny_model(
            arguments.out,
            arguments.data,
            shape,
            seed=arguments.seed,
            overwrite=arguments.overwrite,
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
