"""The text of a model card: metadata that the hub reads, then the facts of the training as tables.

It depends on the facts and the base's folder alone, so equal runs have equal cards. It names no folder of the
machine: paths may tell what a published model should not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint_conversion.errors import ConversionError, printable
from checkpoint_conversion.hf.folder import CONFIG, read_json_object
from checkpoint_conversion.hf.stop_tokens import (
    GENERATION_CONFIG,
    RUN_FILE,
    plan_stop_tokens,
    turn_end_in,
)
from checkpoint_conversion.hf.writer import json_text, tokenizer_files
from checkpoint_conversion.model_card.base import CARD, HubId, Licence, licence_of
from checkpoint_conversion.model_card.facts import RANDOM, Facts

_PROGRAM = "megatron_profit"
_UNKNOWN = "not recorded"
# The class of transformers that loads an export: of a model with a vision tower, its language model alone.
_TEXT_CLASS = "AutoModelForCausalLM"
# The one of the training, which splits text as tokenizer.json says; AutoTokenizer may choose another.
_TOKENIZER_CLASS = "PreTrainedTokenizerFast"
# Licences whose ids say it all.
_COMMON = ("apache-2.0", "mit", "unknown")


def card_files(
    facts: Facts | None, base: Path, *, is_adapter: bool = False, base_id: HubId | None = None
) -> dict[str, bytes]:
    """Return the files that an export gets besides its model.

    They are the card and, for adapters, the licence of the base, the tokenizer with the chat template of the
    training, and the stop tokens that training has taught. A whole model has these among its other files.

    Args:
        facts: The facts of the training; None for weights that no run has trained: they get no card.
        base: HuggingFace folder of the base.
        is_adapter: Whether the export holds adapters alone.
        base_id: The base on the hub; None for the one that the facts or the folder tell.

    Raises:
        ConversionError: A licence file is too large, leaves the folder or cannot be read. Or there is
            a `base_id`, and no facts.
    """
    if facts is None and base_id is not None:
        raise ConversionError(
            f"--base-model-id {base_id} is for the model card, and weights that no run has trained get none; "
            "drop the flag"
        )
    if facts is None:
        return {}
    licence = licence_of(base)
    known = base_id or base_on_hub(facts, base)
    files: dict[str, bytes] = {}
    use = _use(_WHOLE)
    noted = facts.part("model").get("folder")
    name = known.id if known else printable(noted or base.absolute().name)
    if is_adapter:
        config, tokenizer = read_json_object(base / CONFIG), tokenizer_files(base)
        files = licence.texts() | tokenizer
        # The token that ends a turn, where the base's own file does not name it.
        token = turn_end_in(facts.run, RUN_FILE)
        stops = plan_stop_tokens(base, config, token).generation
        if stops is not None:
            files[GENERATION_CONFIG] = json_text(stops)
        use = _use_adapters(name, config, bool(tokenizer), stops is not None)
    return {CARD: _card(facts, known, name, licence, is_adapter, use).encode(), **files}


def _card(
    facts: Facts, base: HubId | None, name: str, licence: Licence, is_adapter: bool, use: str
) -> str:
    objective = printable(facts.part("objective").get("name", "sft"))
    trained = _code(name)
    if is_adapter:
        trained = f"Low-rank adapters for {trained}, trained"
    elif _is_derived(facts):
        trained += ", trained further"
    else:
        trained = f"The architecture of {trained}, trained from random weights"
    sections = [
        _metadata(facts, base, licence, objective, is_adapter),
        f"# {_plain(name.rpartition('/')[2])} trained with {_plain(objective)}",
        f"{trained} on chats with the objective {_code(objective)} of {_PROGRAM}, on Megatron-Core. The "
        "program that trained it wrote this card.",
        "## Use",
        use,
        "## Training",
        _table(("", ""), _training(facts, base, name)),
        "## Data",
        *_data(facts),
        "## Results",
        _results(facts),
        "## Software",
        _table(
            ("package", "version"),
            ((_plain(k), _plain(v)) for k, v in facts.part("versions").items()),
        ),
        "## Licence",
        _licence(licence, name, _is_derived(facts)),
    ]
    return "\n\n".join(sections) + "\n"


def base_on_hub(facts: Facts | None, folder: Path) -> HubId | None:
    """Return the base on the hub, as the facts note it or by the place of its folder, if it is known."""
    model = {} if facts is None else facts.part("model")
    return HubId.noted(model.get("base"), model.get("revision")) or HubId.of_path(folder)


def _is_derived(facts: Facts) -> bool:
    """Return whether the weights go back to the base's, and not to random ones."""
    return facts.part("model").get("start") != RANDOM


def _metadata(
    facts: Facts, base: HubId | None, licence: Licence, objective: str, is_adapter: bool
) -> str:
    """Return the front matter, with values that the hub accepts: ids of the hub, or none."""
    import yaml

    content: dict[str, Any] = {}
    if base is not None and _is_derived(facts):
        content["base_model"] = base.id
        content["base_model_relation"] = "adapter" if is_adapter else "finetune"
    found = (HubId.noted(file.get("dataset")) for file in _files(facts))
    datasets = list(dict.fromkeys(dataset.id for dataset in found if dataset))
    if datasets:
        content["datasets"] = datasets
    content["library_name"] = "peft" if is_adapter else "transformers"
    if _is_derived(facts):
        content |= _licence_metadata(licence)
    content["pipeline_tag"] = "text-generation"
    tags = ["megatron-core", _PROGRAM, "sft", *["lora"] * is_adapter]
    if re.fullmatch(r"[a-z0-9-]+", objective):  # one from outside may be called anything
        tags.append(objective)
    content["tags"] = list(dict.fromkeys(tags))
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---"


def _licence_metadata(licence: Licence) -> dict[str, str]:
    found = {"license": licence.id}
    if licence.id == "other":
        found["license_name"] = licence.name or "of-the-base"
    if licence.link and licence.id not in _COMMON:
        found["license_link"] = licence.link
    return found


def _use_adapters(
    base: str, config: Mapping[str, Any], has_tokenizer: bool, has_stops: bool
) -> str:
    """Return lines of Python that load adapters on their base, and stop where their training ended a turn."""
    # The class whose modules have the names of the adapters.
    is_part = config.get("text_config") is not None
    kind = "AutoModelForImageTextToText" if is_part else _TEXT_CLASS
    classes, stops = [kind, _TOKENIZER_CLASS], []
    tokenizer = "FOLDER" if has_tokenizer else base
    if has_stops:
        classes.append("GenerationConfig")
        stops = ['base.generation_config = GenerationConfig.from_pretrained("FOLDER")']
    return _use(
        (
            "from peft import PeftModel",
            f"from transformers import {', '.join(sorted(classes))}",
            "",
            f"tokenizer = {_TOKENIZER_CLASS}.from_pretrained({tokenizer!r})",
            f'base = {kind}.from_pretrained({base!r}, dtype="auto")',
            *stops,
            'model = PeftModel.from_pretrained(base, "FOLDER")',
        )
    )


_WHOLE = (
    f"from transformers import {_TEXT_CLASS}, {_TOKENIZER_CLASS}",
    "",
    f'tokenizer = {_TOKENIZER_CLASS}.from_pretrained("FOLDER")',
    f'model = {_TEXT_CLASS}.from_pretrained("FOLDER", dtype="auto")',
)


def _use(loading: Iterable[str]) -> str:
    """Return lines of Python that use the model; FOLDER is this folder or its id on the hub."""
    lines = [
        *loading,
        'chat = [{"role": "user", "content": "Hello"}]',
        "inputs = tokenizer.apply_chat_template(",
        '    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt",',
        '    tokenizer_kwargs={"return_token_type_ids": False},',
        ")",
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0]))",
    ]
    code = "\n".join(lines)
    return f"FOLDER is this folder, or its id on the hub.\n\n```python\n{code}\n```"


def _training(facts: Facts, base: HubId | None, name: str) -> Iterator[tuple[str, str]]:
    """Yield the rows of the table of settings."""
    model, objective = facts.part("model"), facts.part("objective")
    yield "base", _code(name)
    if base is not None and base.revision:
        yield "revision of the base", _code(base.revision)
    if model.get("start"):
        yield "first weights", _value(model["start"])
    yield "objective", _code(objective.get("name", _UNKNOWN))
    yield from _objective(objective)
    if lora := facts.part("lora"):
        yield "adapters", ", ".join(f"{key} {_value(value)}" for key, value in lora.items())
    data, batch = facts.part("data"), facts.part("batch")
    yield "steps", f"{facts.step:,}"
    if batch.get("global_batch_size"):
        packed = "packed rows" if data.get("packing") else "rows of one record"
        yield (
            "step",
            f"{_value(batch['global_batch_size'])} {packed} of {_value(data.get('seq_length'))} tokens",
        )
    yield from _tokens(facts.totals)
    yield from _schedule(facts)
    yield from _optimizer(facts.part("optimizer"))
    yield "seed", _code(facts.part("seed").get("seed", _UNKNOWN))


def _optimizer(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    kind = settings.get("optimizer")
    others = "adam" if kind == "sgd" else "sgd"  # settings of the optimizer that was not used
    named = {k: v for k, v in settings.items() if v is not None and not k.startswith(others)}
    if kind is not None:
        yield "optimizer", ", ".join(f"{_plain(k)} {_value(v)}" for k, v in named.items())


def _objective(objective: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the options of the objective, and what else shapes it."""
    options = objective.get("options")
    if isinstance(options, Mapping):
        named = {key: value for key, value in options.items() if value is not None}
        if named:
            yield "options", ", ".join(f"{_code(k)} {_value(v)}" for k, v in named.items())
    if objective.get("normalization"):
        yield "divided by the tokens that are", _value(objective["normalization"])
    if objective.get("warmup_steps"):
        yield "steps of plain SFT before it", _value(objective["warmup_steps"])
    if objective.get("schedules"):
        yield "schedules of options", _value(objective["schedules"])
    if objective.get("reference"):
        yield "digest of the reference model", _code(objective["reference"])


def _tokens(totals: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    names = {
        "tokens": "tokens",
        "supervised_tokens": "supervised tokens",
        "kept_tokens": "supervised tokens that the objective kept",
    }
    since = totals.get("since", 0)
    after = f" (after step {_value(since)})" if since else ""
    for key, name in names.items():
        if key in totals:
            yield f"{name}{after}", _value(totals[key])


def _schedule(facts: Facts) -> Iterator[tuple[str, str]]:
    schedule = facts.part("schedule")
    if "lr" not in schedule:
        return
    style = schedule.get("lr_decay_style")
    course = "" if style == "constant" else f" to {_value(schedule.get('min_lr'))}"
    yield "learning rate", f"{_value(schedule['lr'])}{course}, {_value(style)}"
    for key in ("lr_warmup_fraction", "lr_warmup_iters", "lr_warmup_samples"):
        if schedule.get(key):
            yield key.replace("lr_", "").replace("_", " "), _value(schedule[key])
    if schedule.get("weight_decay") is not None:
        yield "weight decay", _value(schedule["weight_decay"])


def _files(facts: Facts) -> list[Mapping[str, Any]]:
    files = facts.part("data").get("files")
    return [f for f in files if isinstance(f, Mapping)] if isinstance(files, list) else []


def _data(facts: Facts) -> Iterator[str]:
    data, validation = facts.part("data"), facts.part("validation")
    if files := _files(facts):
        rows = (
            (
                _code(file.get("name", _UNKNOWN)),
                _code(file["dataset"]) if file.get("dataset") else "",
                _value(file.get("bytes")),
                _code(file.get("sha256", _UNKNOWN)),
            )
            for file in files
        )
        yield _table(("file", "data set", "bytes", "SHA-256"), rows)
    counts = {
        "records": data.get("examples"),
        "supervised tokens of an epoch": data.get("supervised_tokens"),
        "digest of the tokens": data.get("digest"),
        "validation records": validation.get("examples"),
        "share set aside for validation": validation.get("valid_split"),
    }
    yield _table(("", ""), ((k, _value(v)) for k, v in counts.items() if v is not None))


def _results(facts: Facts) -> str:
    last = facts.totals.get("last")
    last = last if isinstance(last, Mapping) else {}
    names = list(dict.fromkeys([*last, *facts.evaluation]))
    if not names:
        return "No metrics were recorded."
    steps = facts.totals.get("last_steps")
    span = " to ".join(dict.fromkeys(map(_value, steps if isinstance(steps, list) else [])))
    columns = {
        f"training, step {span}": last,
        f"validation, after step {facts.step:,}": facts.evaluation,
    }
    columns = {header: found for header, found in columns.items() if found}
    rows = (
        (_plain(n), *(_value(found[n]) if n in found else "" for found in columns.values()))
        for n in names
    )
    return _table(("metric", *columns), rows)


def _licence(licence: Licence, base: str, is_derived: bool) -> str:
    """Return the licence of the base, its consequence, and where its text is."""
    if not is_derived:
        return f"The first weights were random. Tokenizer and configuration are from {_code(base)}."
    known = f"The base {_code(base)} has the licence {_code(licence.name or licence.id)}"
    if licence.id == "unknown":
        known = f"The folder of the base {_code(base)} names no licence"
    texts = ", ".join(_code(file.name) for file in licence.files)
    where = f"; its text is in {texts}." if texts else "; see the base's page for its text."
    built = " Built with Llama." if licence.id.startswith("llama") else ""
    return f"{known}{where} These weights are derived from it, and the same terms apply.{built}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)


def _value(value: Any) -> str:
    """Return a value for people: counts with separators, other numbers with six digits."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: _UNKNOWN}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else "not finite"
    if isinstance(value, list | tuple):
        return " ".join(map(_value, value))
    return _plain(value)


def _plain(value: Any) -> str:
    """Return a text in which Markdown and HTML see no mark."""
    return "".join(f"\\{c}" if c in "\\`*_[]|<>#" else c for c in printable(value))


def _code(value: Any) -> str:
    """Return a text as code, which cannot end the code or the cell of a table."""
    return f"`{printable(value).replace('`', chr(39)).replace('|', '/')}`"
