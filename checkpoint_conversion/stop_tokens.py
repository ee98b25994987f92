"""The token ids at which generation stops, in the two files of a model folder that hold them.

A base model stops at the end of a text (`<|endoftext|>`). Chat training teaches it to end a turn with the
token of the chat template (`<|im_end|>`), which the files of the base do not name: without it, the trained
model would talk on until the length limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf_folder import CONFIG, read_json_object

GENERATION_CONFIG = "generation_config.json"
_KEY = "eos_token_id"
# What transformers takes from config.json where a folder has no generation_config.json.
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_generation_config(template: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of generation of a model folder.

    Args:
        template: The folder.
        config: Content of its config.json, which gives the token ids where the folder has no
            generation_config.json, or one without stop tokens.

    Raises:
        ConversionError: A file cannot be read, or its stop tokens are not token ids.
    """
    file = template / GENERATION_CONFIG
    from_config = {name: config[name] for name in _TOKEN_IDS if config.get(name) is not None}
    stop_token_ids(config, template / CONFIG)
    if not file.exists():
        return from_config
    generation = read_json_object(file)
    if not stop_token_ids(generation, file) and _KEY in from_config:
        generation[_KEY] = from_config[_KEY]
    return generation


def stop_token_ids(content: Mapping[str, Any], file: Path) -> tuple[int, ...]:
    """The ids of `eos_token_id`, which holds one id, a list of them, or none.

    Args:
        content: Content of config.json or generation_config.json.
        file: Named in the error.

    Raises:
        ConversionError: It holds something else.
    """
    value = content.get(_KEY)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if type(token) is not int or token < 0:
            raise ConversionError(
                f"{file}: {_KEY} holds {str(token)[:40]!r}, which is not a token id; correct the file"
            )
    return tuple(ids)


def with_stop_tokens(content: Mapping[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    """Content of config.json or generation_config.json in which generation stops at `ids` too.

    The new ids come first and the known ones stay: 151643 and the new id 151645 give [151645, 151643].
    Content that holds all of `ids` is returned unchanged.
    """
    known = stop_token_ids(content, Path(CONFIG))
    if set(ids) <= set(known):
        return dict(content)
    return {**content, _KEY: list(dict.fromkeys([*ids, *known]))}
