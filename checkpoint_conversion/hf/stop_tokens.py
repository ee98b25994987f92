"""The token ids at which generation stops, in the two files of a model folder that hold them.

A base model stops at the end of a text (`<|endoftext|>`). Chat training teaches it to end a turn with
the chat template's token (`<|im_end|>`), which the base's files do not name. Without it, the trained
model would generate until the length limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families import Config
from checkpoint_conversion.families.config import TEXT, text_config, text_part
from checkpoint_conversion.hf.folder import CONFIG, read_json_object

GENERATION_CONFIG = "generation_config.json"
# The file of a run in each of its checkpoints.
RUN_FILE = "megatron_profit.json"
_KEY = "eos_token_id"
# transformers takes these from config.json where a folder has no generation_config.json.
_TOKEN_IDS = ("bos_token_id", _KEY, "pad_token_id")


@dataclass(frozen=True)
class StopTokens:
    """The two files as an exported folder gets them.

    Attributes:
        config: Content of config.json.
        generation: Content of generation_config.json; None where the template's file, if any, is
            copied.
        ids: The ids at which generation stops; empty if training has taught none.
        added: The id among them that the template does not name; None where it names all.
    """

    config: Config
    generation: Config | None
    ids: tuple[int, ...]
    added: int | None

    def __str__(self) -> str:
        ids = ", ".join(map(str, self.ids))
        return (
            f"{_KEY} in {CONFIG} and {GENERATION_CONFIG} names {self.added}, the token that ends a turn in "
            f"training; generation stops at [{ids}]"
        )


def plan_stop_tokens(template: Path, config: Config, turn_end: int | None) -> StopTokens:
    """Add the token that ends a turn to the stop tokens of a template.

    The new id comes first; known ids stay. For example, 151643 and the new 151645 give [151645,
    151643].

    Args:
        template: HuggingFace folder that training started from.
        config: Content of the config.json to write.
        turn_end: Id of the token that training has taught; None changes no file.

    Raises:
        ConversionError: A file cannot be read, or its stop tokens are not token ids.
    """
    if turn_end is None:
        return StopTokens(config, None, (), None)
    file = template / GENERATION_CONFIG
    part = config if _KEY in config else text_config(config)
    in_config = _stop_ids(part, template / CONFIG)
    from_config = {name: part[name] for name in _TOKEN_IDS if part.get(name) is not None}
    there = read_json_object(file) if file.exists() else from_config
    known = _stop_ids(there, file) or in_config
    written = _with_stop_ids(config, _with(turn_end, in_config, part.get(_KEY)))
    generation = {**there, _KEY: _with(turn_end, known, there.get(_KEY))}
    is_known = written == config and generation == there
    return StopTokens(
        written,
        None if generation == there else generation,
        _stop_ids(generation, file),
        None if is_known else turn_end,
    )


def trained_turn_end(checkpoint: Path) -> int | None:
    """Return the id of the token that ends a turn, as a run of this project noted it in its checkpoint.

    Args:
        checkpoint: Folder of one checkpoint.

    Returns:
        The id; None for a checkpoint that was never trained, or a template without such a token.

    Raises:
        ConversionError: The file that should hold it is damaged.
    """
    file = checkpoint / RUN_FILE
    if not file.exists():
        return None
    run = read_json_object(file).get("run")
    return turn_end_in(run if isinstance(run, Mapping) else {}, str(file))


def turn_end_in(run: Mapping[str, Any], origin: str) -> int | None:
    """Return the id of the token that ends a turn from the record of a run; None if it names none.

    Args:
        run: The record: parts by name.
        origin: The place of the record, for messages.

    Raises:
        ConversionError: It is no token id.
    """
    part = run.get("tokenizer")
    value = part.get("turn_end_id") if isinstance(part, Mapping) else None
    if value is not None and not _is_id(value):
        raise ConversionError(
            f"{origin}: run.tokenizer.turn_end_id is {str(value)[:40]!r}, not a token id; the file is damaged"
        )
    return value


def _with_stop_ids(config: Config, ids: Any) -> Config:
    """Put stop tokens where a config.json has them: at the top, or in the part of the language model."""
    text = text_part(config)
    if _KEY in config or text is None or _KEY not in text:
        return {**config, _KEY: ids}
    return {**config, TEXT: {**text, _KEY: ids}}


def _with(new: int, known: tuple[int, ...], value: Any) -> Any:
    """Add a new id to a file's value, which stays as it is if it names the id."""
    return value if new in known and value is not None else list(dict.fromkeys((new, *known)))


def _stop_ids(content: Config, file: Path) -> tuple[int, ...]:
    value = content.get(_KEY)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if not _is_id(token):
            raise ConversionError(
                f"{file}: {_KEY} holds {str(token)[:40]!r}, which is not a token id; correct the file"
            )
    return tuple(ids)


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0
