"""A model folder with another chat template: links to the weights, copies of the other files.

Base models have none, or one that they were not trained with. The training, its export and all other commands
then see an ordinary folder that has the template.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
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


def with_template(model: Path, template: str, run: Path) -> Path:
    """Return a folder like the model's with this template.

    It is named after its content, so that another start does not change the folder of a run that goes on. For
    example, `model-5f0c2a9d81e4`. It appears whole; of several nodes that make it one is the first.

    Args:
        model: The model's folder.
        template: A file, or the name of a built-in template: chatml or llama3.
        run: The folder to make it in.

    Raises:
        LaunchError: The template cannot be read, the tokenizer lacks the tokens of a built-in one, or a file
            of the model is too large to be copied.
    """
    copies, links = _parts(model, _text(model, template))
    digest = hashlib.sha256()
    for name, part in sorted((copies | {n: str(f).encode() for n, f in links.items()}).items()):
        digest.update(f"{name}:{len(part)}:".encode() + part)
    folder = run / f"model-{digest.hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    run.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".model-", dir=run) as unfinished:
        made = Path(unfinished, folder.name)
        made.mkdir()
        for name, content in copies.items():
            write_file(made / name, content)
        for name, file in links.items():
            (made / name).symlink_to(file)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another node was faster
                raise
    return folder


def has_template(model: Path) -> bool:
    """Return whether a model's folder has a chat template of its own, which another one replaces."""
    if any((model / name).is_file() for name in (TEMPLATE, *_OTHERS)):
        return True
    settings = model / _SETTINGS
    return settings.is_file() and bool(read_json_object(settings).get("chat_template"))


def _parts(model: Path, text: str) -> tuple[dict[str, bytes], dict[str, Path]]:
    """Return what the folder has by file name: contents of copies, and files of the links' other ends."""
    ours = (TEMPLATE, _SETTINGS, *_OTHERS)
    files = {f.name: f for f in sorted(model.iterdir()) if f.name not in ours and f.is_file()}
    links = {n: f.resolve() for n, f in files.items() if f.suffix in _WEIGHTS}
    copied = {name: file for name, file in files.items() if name not in links}
    for file in copied.values():
        if (size := file.stat().st_size) > MOST_JSON:
            raise LaunchError(
                f"--chat-template: the folder with the template has copies of all files but weights, and "
                f"{file} has {size:,} bytes (at most {MOST_JSON:,}); move it out of the model's folder"
            )
    # An export copies these, and follows no link out of the folder.
    copies = {name: read_regular(file) for name, file in copied.items()}
    settings = model / _SETTINGS
    if settings.is_file():
        content = read_json_object(settings)
        content.pop("chat_template", None)
        copies[_SETTINGS] = json.dumps(content, indent=2, ensure_ascii=False).encode()
    copies[TEMPLATE] = text.encode()
    return copies, links


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
