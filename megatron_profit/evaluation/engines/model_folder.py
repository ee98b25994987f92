"""A HuggingFace folder, or an adapter of PEFT on top of one: checked, identified and loaded."""

from __future__ import annotations

import hashlib
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from isal.isal_zlib import crc32

from checkpoint_conversion.engine.regular_files import check_model_folder, open_regular
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.families.config import text_config
from checkpoint_conversion.hf.folder import read_hf_config, read_json_object
from checkpoint_conversion.hf.stop_tokens import GENERATION_CONFIG
from checkpoint_conversion.in_transformers import load_language_model, with_adapters
from megatron_profit.data.errors import DataError
from megatron_profit.data.render.template import check_vocabulary
from megatron_profit.evaluation.errors import EvaluationError, require

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from megatron_profit.data.render.template import ChatTemplate

ADAPTER = "adapter_config.json"
_BLOCK_BYTES = 1 << 24
_CONTENT = (".safetensors", ".json", ".jinja", ".model", ".txt")


def base_of(folder: Path) -> Path:
    """Return the folder of the whole model: an adapter's base, or the folder itself.

    The base is a local folder, also relative to the adapter's, or an id of the hub that its cache holds.

    Raises:
        EvaluationError: The adapter names no such base.
    """
    if not (folder / ADAPTER).is_file():
        return folder
    try:
        config = read_json_object(folder / ADAPTER)
    except ConversionError as error:
        raise EvaluationError(error) from error
    base = config.get("base_model_name_or_path")
    for place in (Path(str(base)), folder / str(base)):
        if base and place.is_dir():
            return place
    return _cached_base(folder, base, config.get("revision"))


def _cached_base(adapter: Path, base: object, revision: object) -> Path:
    """Return the folder of an adapter's base in the hub's cache."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    start = f"{adapter / ADAPTER}: base_model_name_or_path is {base!r}, which is no folder here"
    remedy = "write the path of the adapter's base model there"
    if not isinstance(base, str) or not isinstance(revision, str | None):
        raise EvaluationError(f"{start}; {remedy}")
    try:
        found = snapshot_download(base, revision=revision, local_files_only=True)
    except HFValidationError as error:
        raise EvaluationError(f"{start}; {remedy}") from error
    except LocalEntryNotFoundError as error:
        download = f"hf download {base}" + (f" --revision {revision}" if revision else "")
        raise EvaluationError(
            f"{start}, and the hub's cache ({constants.HF_HUB_CACHE}) does not hold it; run `{download}`, "
            f"or {remedy}"
        ) from error
    return Path(found)


def check_model(model: str, day: date | None = None) -> date | None:
    """Check a model's folder before anything is loaded.

    Args:
        model: The folder.
        day: Day for a chat template that asks for today's.

    Returns:
        The day that its chat template writes; None if it asks for none.

    Raises:
        EvaluationError: It is no HuggingFace folder, has no chat template, one that needs a day, or a
            tokenizer with more tokens than the model.
    """
    folder = Path(model)
    base = base_of(folder)
    if base != folder:
        require("peft", for_what=f"the adapter {folder}", install="peft")
    try:
        config = read_hf_config(base)
        for place in dict.fromkeys((folder, base)):
            check_model_folder(place)
        if not any(base.glob("*.safetensors")):
            raise EvaluationError(f"{base}: holds no *.safetensors file; give a model with weights")
        template = load_chat_template(folder, day)
        entries = text_config(config).get("vocab_size")
        if base == folder and isinstance(entries, int):
            check_vocabulary(folder, len(template.tokenizer), entries)
        return template.day
    except (ConversionError, DataError, OSError) as error:
        raise EvaluationError(error) from error


def load_chat_template(folder: Path, day: date | None) -> ChatTemplate:
    """Return the chat template of a folder with its tokenizer, an adapter's own or its base's.

    Args:
        folder: The folder.
        day: Day for a template that asks for today's; other templates ignore it.

    Raises:
        EvaluationError: There is no chat template.
        DataError: The tokenizer cannot be loaded, or its template asks for a day and there is none.
    """
    from megatron_profit.data.render.template import ChatTemplate, load_tokenizer
    from megatron_profit.data.render.template_date import writes_date

    own = (folder / "tokenizer_config.json").exists() or (folder / "tokenizer.json").exists()
    place = folder if own else base_of(folder)
    tokenizer = load_tokenizer(place)
    if tokenizer.chat_template is None:
        raise EvaluationError(
            f"{place}: its tokenizer has no chat template, and the questions are asked through it; add "
            "chat_template.jinja (an --export-hf of a run has it), or copy the one of the chat model"
        )
    return ChatTemplate(tokenizer, day if writes_date(tokenizer) else None)


def load_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model for evaluation, on the GPU if there is one; an adapter is merged into its base.

    Raises:
        EvaluationError: transformers or PEFT cannot load it, its state is in no cache, or the GPU has no room
            for it.
    """
    import torch
    from transformers import GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    base = base_of(folder)
    try:
        model = load_language_model(base, dtype)
        if base != folder:
            model = with_adapters(model, folder).merge_and_unload()
            if (folder / GENERATION_CONFIG).is_file():
                model.generation_config = GenerationConfig.from_pretrained(folder)
    except Exception as error:  # whatever the libraries raise for a folder that they cannot use
        raise EvaluationError(f"{folder} cannot be loaded: {error}") from error
    from megatron_profit.evaluation.engines.row_cache import keeps_its_state

    if not keeps_its_state(model):
        raise EvaluationError(
            f"{folder}: {type(model).__name__} keeps its state outside of transformers' usual cache, so it "
            "cannot answer in this process; start a server with it, for example `vllm serve`, and give "
            "--server of megatron-profit evaluate"
        )
    try:
        return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    except torch.OutOfMemoryError as error:
        size = model.get_memory_footprint() / 2**30
        raise EvaluationError(
            f"{folder} needs {size:.1f} GiB in {str(dtype).removeprefix('torch.')}, more than the GPU "
            "has left; give --dtype bfloat16, or hide the GPU with CUDA_VISIBLE_DEVICES="
        ) from error


def fingerprint(model: str) -> str:
    """Return a digest of a model's content, all weights included: a training may change any of them.

    Raises:
        EvaluationError: A file is missing where a link leads, cannot be read, or is a pipe or the like.
    """
    digest = hashlib.sha256()
    folder = Path(model)
    for place in dict.fromkeys((folder, base_of(folder))):
        for file in sorted(place.iterdir()):
            if file.suffix in _CONTENT and not file.is_dir():
                digest.update(f"{file.name} {_size_and_checksum(file)}\0".encode())
    return digest.hexdigest()[:16]


def _size_and_checksum(file: Path) -> str:
    size = checksum = 0
    try:
        with open(open_regular(file), "rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                size, checksum = size + len(block), crc32(block, checksum)
    except ConversionError as error:
        raise EvaluationError(error) from error
    except OSError as error:
        raise EvaluationError(
            f"{file}: {error.strerror}; fetch the model again, or remove this file"
        ) from error
    return f"{size} {checksum}"
