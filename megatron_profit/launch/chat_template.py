"""A model folder with another chat template: links to the weights, copies of the other files.

Base models have none, or one that they were not trained with. The training, its export and all other commands
then see an ordinary folder that has the template.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

from checkpoint_conversion.engine.output import write_file
from checkpoint_conversion.engine.regular_files import MOST_JSON, read_regular
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf.folder import read_json_object
from megatron_profit.recipe.errors import LaunchError
from megatron_profit.recipe.request import BUILT_IN_TEMPLATES

TEMPLATE = "chat_template.jinja"
_SETTINGS = "tokenizer_config.json"
# Other places of a template, which the new one replaces.
_OTHERS = ("chat_template.json",)
_LARGEST = 2**20  # bytes
# Weights, in formats that an export does not copy either.
_WEIGHTS = ".safetensors .bin .pt .pth .ckpt .gguf .onnx .h5 .msgpack .pkl".split()
# End of the name of a link that a node is about to put in its place.
_UNFINISHED = ".unfinished"

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + (message.content or '') + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
BUILT_IN = dict(zip(BUILT_IN_TEMPLATES, (CHATML, LLAMA3), strict=True))
_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|eot_id|>"),
}


def with_template(model: Path, template: str, folder: Path) -> Path:
    """Return a folder like the model's with this template.

    Args:
        model: The model's folder.
        template: A file, or the name of a built-in template: chatml or llama3.
        folder: The folder to make.

    Raises:
        LaunchError: The template cannot be read, the tokenizer lacks the tokens of a built-in one, or a file
            of the model is too large to be copied.
    """
    text = _text(model, template)
    ours = (TEMPLATE, _SETTINGS, *_OTHERS)
    files = {f.name: f for f in model.iterdir() if f.name not in ours and f.is_file()}
    for file in files.values():
        if file.suffix not in _WEIGHTS and (size := file.stat().st_size) > MOST_JSON:
            raise LaunchError(
                f"--chat-template: the folder with the template has copies of all files but weights, and "
                f"{file} has {size:,} bytes (at most {MOST_JSON:,}); move it out of the model's folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        is_old = entry.name not in files and not entry.name.endswith(_UNFINISHED)
        if entry.is_symlink() and is_old:  # of another model
            entry.unlink(missing_ok=True)
    for name, file in sorted(files.items()):
        if file.suffix in _WEIGHTS:
            _link(folder / name, file.resolve())
        else:  # an export copies these, and follows no link out of the folder
            write_file(folder / name, read_regular(file))
    settings = model / _SETTINGS
    if settings.is_file():
        content = read_json_object(settings)
        content.pop("chat_template", None)
        text_of_settings = json.dumps(content, indent=2, ensure_ascii=False)
        write_file(folder / _SETTINGS, text_of_settings.encode())
    write_file(folder / TEMPLATE, text.encode())
    return folder


def _link(link: Path, file: Path) -> None:
    """Make a link, in the place of another one. Other nodes may be reading through it."""
    if link.is_symlink() and os.readlink(link) == str(file):
        return
    new = link.with_name(f".{link.name}.{uuid.uuid4().hex[:8]}{_UNFINISHED}")
    new.symlink_to(file)
    new.replace(link)


def _text(model: Path, template: str) -> str:
    if template in BUILT_IN:
        tokenizer = model / "tokenizer.json"
        words = read_regular(tokenizer) if tokenizer.is_file() else b""
        missing = [t for t in _TOKENS[template] if json.dumps(t).encode() not in words]
        if missing:
            raise LaunchError(
                f"--chat-template {template}: the tokenizer of {model} has no token {' or '.join(missing)}, "
                "so that no token would end an answer; give --chat-template FILE with a template that ends "
                "a turn with one of the tokenizer's special tokens"
            )
        return BUILT_IN[template]
    file = Path(template).expanduser()
    try:
        # A byte order mark would stand before each conversation.
        return read_regular(file, _LARGEST).decode("utf-8-sig")
    except (OSError, ConversionError, UnicodeDecodeError) as error:
        raise LaunchError(f"--chat-template {file}: cannot be read ({error})") from error
