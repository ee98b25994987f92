"""The files of a tokenizer's folder."""

from __future__ import annotations

from pathlib import Path

from megatron_profit.data.errors import DataError
from megatron_profit.data.files.bounded import check_json, check_regular

# Files that a tokenizer's ids and its chat template depend on.
_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*")
# JSON files that the transformers library reads, among others that may lie there.
_READ = (
    "added_tokens.json",
    "chat_template.json",
    "config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
# Words in the names of JSON and text files that belong to a tokenizer; a model's folder holds others, such as
# trainer_state.json or LICENSE.txt.
_WORDS = ("token", "vocab", "merges", "template", "tekken")


def decides_ids(path: Path) -> bool:
    """Return whether token ids or the chat template may depend on a file, judged by its name."""
    return path.suffix not in (".json", ".txt") or any(word in path.name for word in _WORDS)


def tokenizer_paths(folder: Path) -> list[Path]:
    """Return the files that a tokenizer's ids and its chat template may depend on."""
    found = {path for pattern in _PATTERNS for path in folder.glob(pattern)}
    return sorted(path for path in found if path.exists() and not path.is_dir())


def check_tokenizer_files(folder: Path) -> None:
    """Check the files for which the transformers library would wait, or which it reads whole into memory.

    Raises:
        DataError: A file is no regular file, or a JSON file is too large.
    """
    try:
        for path in tokenizer_paths(folder):
            check = check_json if path.name in _READ else check_regular
            check(path)
    except OSError as error:
        raise DataError(f"{folder}: its tokenizer cannot be read ({error})") from error
