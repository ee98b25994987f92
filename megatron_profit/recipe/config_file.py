"""The YAML file of a run: its entries are flags, read into words of a command line and written back.

An entry that is not known is an error with the nearest name. The flags of the command line come after the
file's, so they win. `megatron:` takes native flags by their names.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from checkpoint_conversion.engine.regular_files import open_regular
from checkpoint_conversion.errors import ConversionError, printable
from megatron_profit.flags import flag_of, nearest
from megatron_profit.objectives.registry import is_from_outside
from megatron_profit.recipe.errors import LaunchError
from megatron_profit.recipe.evaluate_section import evaluation_words
from megatron_profit.recipe.flags import FlagTable, Given, words_with
from megatron_profit.yaml_names import NamesOnceLoader, RepeatedNameError

_LARGEST = 2**20  # bytes
_RECIPES = Path(__file__).resolve().parents[1] / "recipes"
# Entry of a section -> flag. An entry whose flag is spelt like it needs no line in `_ALIKE`.
_SHORT: dict[str, dict[str, str]] = {
    "data": {
        "train": "--data",
        "weights": "--data-weights",
        "valid": "--valid-data",
        "columns": "--data-columns",
        "workers": "--data-workers",
        "cache": "--data-cache",
    },
    "objective": {
        "name": "--objective",
        "schedule": "--objective-schedule",
        "warmup_steps": "--objective-warmup-steps",
        "normalization": "--objective-normalization",
        "implementation": "--objective-implementation",
        "backward": "--objective-backward",
    },
    "training": {
        "steps": "--train-iters",
        "warmup_fraction": "--lr-warmup-fraction",
        "warmup_steps": "--lr-warmup-iters",
        "schedule": "--lr-decay-style",
    },
    "layout": {
        "mode": "--layout",
        "tensor": "--tensor-model-parallel-size",
        "pipeline": "--pipeline-model-parallel-size",
        "context": "--context-parallel-size",
        "expert": "--expert-model-parallel-size",
        "expert_tensor": "--expert-tensor-parallel-size",
        "sequence": "--sequence-parallel",
        "recompute": "--recompute-granularity",
        "recompute_method": "--recompute-method",
        "recompute_layers": "--recompute-num-layers",
        "distributed_optimizer": "--use-distributed-optimizer",
    },
    "lora": {
        "rank": "--lora-rank",
        "alpha": "--lora-alpha",
        "dropout": "--lora-dropout",
        "targets": "--lora-targets",
        "rslora": "--lora-rslora",
        "adapter": "--lora-adapter",
        "export": "--export-adapter",
    },
    "run": {
        "folder": "--run",
        "export": "--export-hf",
        "tensorboard": "--tensorboard-dir",
        "start": "--pretrained-checkpoint",
    },
}
_ALIKE: dict[str, tuple[str, ...]] = {
    "data": (
        *("valid_split", "packing", "too_long", "train_on", "train_think", "dataset_info"),
        *("template_date", "allow_special_tokens"),
    ),
    "objective": (
        *("log_entropy", "log_reference", "log_quantiles", "psft_steps_per_refresh"),
        *("ref_hf_model", "ref_cache", "ref_mode"),
    ),
    "training": (
        *("epochs", "train_samples", "seq_length", "global_batch_size", "lr", "min_lr", "seed"),
        *("weight_decay", "clip_grad", "bf16", "fp16", "eval_interval", "eval_iters"),
    ),
    "layout": (
        *("micro_batch_size", "gpus", "gpu_memory", "nproc_per_node", "nnodes"),
        *("rdzv_endpoint", "rdzv_id", "max_restarts"),
    ),
    "lora": (),
    "run": (
        *("save_interval", "load", "save"),
        *("wandb_project", "wandb_exp_name", "wandb_entity", "without", "verbose", "rank_logs"),
    ),
}
# Entries at the top that are no sections.
_TOP = {"model": "--model", "chat_template": "--chat-template"}
SECTIONS = (*_TOP, *_SHORT, "evaluate", "megatron")
# Sections that may be one value: the entry that it stands for.
_ONE_VALUE = {"data": "train", "objective": "name", "layout": "mode"}
# Values that stand for false.
_NONE = {"recompute": ("none",)}
# Flags with a value that is derived: true asks for it, false for none.
DERIVED_VALUES = ("--export-hf", "--tensorboard-dir")
# The flag that keeps others from being derived.
WITHOUT = "--without"
# Switches of the command itself.
_FRONT_SWITCHES = ("--verbose", "--rank-logs")


class _Loader(NamesOnceLoader):
    """Reads values as they are written: YAML 1.1 would read `1:4` as 64, `010` as 8 and `no` as false."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}


for _tag, _form, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", "<<", "<"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form})$"), list(_first)
    )


def find_config(name: str) -> Path:
    """Return the file that --config names: one that is here, else a recipe of the package.

    For example, `qwen3-14b` and `profit` are recipes.

    Raises:
        LaunchError: There is no such file, and no recipe has the name.
    """
    path = Path(name).expanduser()
    if path.is_file() or "/" in name or path.suffix in (".yaml", ".yml"):
        return path
    recipes = {file.stem: file for file in _RECIPES.rglob("*.yaml")}
    if name not in recipes:
        raise LaunchError(
            f"--config {printable(name)}: there is no such file and no recipe of this name"
            f"{nearest(name, recipes)}; recipes are {', '.join(sorted(recipes))}"
        )
    return recipes[name]


def read_config(path: Path, table: FlagTable, front: frozenset[str]) -> list[str]:
    """Return the words of the command line that a file stands for.

    Args:
        path: The YAML file.
        table: The training's flags.
        front: Flags of this command, besides the training's, that take a value or are switches.

    Raises:
        LaunchError: The file is missing, not YAML, or has an entry that is unknown or has a wrong kind.
    """
    content = _load(path)
    words: list[str] = []
    outside = _outside_options(content.get("objective"), table)
    for section, value in content.items():
        if section not in SECTIONS:
            raise LaunchError(
                f"--config {path}: there is no section {section!r}{nearest(str(section), SECTIONS)}; "
                f"sections are {', '.join(SECTIONS)}"
            )
        try:
            if section == "evaluate":
                words += evaluation_words(value)
                continue
            for option, item in _entries(section, value, table, outside):
                is_switch = option in outside and item is True
                words += [option] if is_switch else _words(option, item, table, front, outside)
        except LaunchError as error:
            raise LaunchError(f"--config {path}, {section}: {error}") from error
    return words


def _load(path: Path) -> dict[Any, Any]:
    try:
        with open(open_regular(path), "rb") as stream:
            data = stream.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise LaunchError(f"--config {path}: has more than {_LARGEST:,} bytes")
        content = yaml.load(data, _Loader)  # a safe loader: it makes no objects but data
    except (OSError, ConversionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise LaunchError(f"--config {path}: cannot be read ({reason})") from error
    except (LaunchError, RepeatedNameError) as error:
        raise LaunchError(f"--config {path}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise LaunchError(f"--config {path}: not YAML: {printable(_one_line(error))}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise LaunchError(f"--config {path}: must hold sections, found {type(content).__name__}")
    return content


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
    return (
        problem if mark is None else f"{problem} in line {mark.line + 1}, column {mark.column + 1}"
    )


def _outside_options(section: Any, table: FlagTable) -> frozenset[str]:
    """Return the flags of the entries of an objective from outside, which no table knows."""
    if not isinstance(section, dict) or not is_from_outside(str(section.get("name"))):
        return frozenset()
    names = map(str, section.keys() - _known("objective", table).keys())
    return frozenset(flag_of(name) for name in names)


def _entries(
    section: str, value: Any, table: FlagTable, outside: Iterable[str]
) -> Iterator[tuple[str, Any]]:
    """Yield the flag and the value of each entry of a section."""
    if section in _TOP:
        yield _TOP[section], value
        return
    if not isinstance(value, dict):
        entry = _ONE_VALUE.get(section)
        if entry is None or value is None:
            raise LaunchError(f"must hold entries, found {_shown(value)}")
        value = {entry: value}
    known = dict(_known(section, table))
    if section == "objective":
        known |= {_entry_of(flag): flag for flag in outside}
    for name, item in value.items():
        if name not in known:
            raise LaunchError(f"there is no entry {name!r}{nearest(str(name), known)}")
        if item is None:
            raise LaunchError(f"{name} has no value; give one, or drop the line")
        yield known[name], False if item in _NONE.get(name, ()) else item


def _known(section: str, table: FlagTable) -> Mapping[str, str]:
    """Return the entries of a section with their flags."""
    if section == "megatron":
        return {name: o for o in table.native for name in (o[2:], o[2:].replace("-", "_"))}
    known = {_entry_of(flag): flag for flag in _flags_of(section)} | _SHORT[section]
    if section == "objective":
        known |= {_entry_of(flag): flag for flag in table.of_objectives}
    if section == "run":  # this project's other flags
        known |= {_entry_of(flag): flag for flag in table.own if _section_of(flag, table) == "run"}
    return known


def _section_of(flag: str, table: FlagTable) -> str:
    """Return the section of a flag that stands in none of the tables above, too."""
    for section in _SHORT:
        if flag in _flags_of(section):
            return section
    if flag in table.own and flag not in table.of_objectives:
        return "run"
    return "megatron" if flag in table.native else "objective"


def _entry_of(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _flags_of(section: str) -> Iterable[str]:
    return (
        *_SHORT[section].values(),
        *(flag_of(name) for name in _ALIKE[section]),
    )


def _words(
    option: str,
    value: Any,
    table: FlagTable,
    front: frozenset[str],
    outside: frozenset[str],
) -> list[str]:
    if not any(option in flags for flags in (table.options, front, outside)):
        raise LaunchError(f"this version has no flag {option}")
    is_switch = option in _FRONT_SWITCHES or table.is_switch(option)
    if isinstance(value, bool):
        return _switch(option, value, table.options | front, is_switch)
    if is_switch:
        raise LaunchError(f"{option} is {_shown(value)}; it must be true or false")
    values = value if isinstance(value, list) else [value]
    if not values:
        raise LaunchError(f"{option} has an empty list; give a value, or drop the line")
    if len(values) > 1 and not (table.takes_several(option) or option in (WITHOUT, *outside)):
        raise LaunchError(f"{option} has {_shown(value)}; it takes one value")
    # A list of lists is a flag that is given several times.
    several = values if values and all(isinstance(item, list) for item in values) else [values]
    if option == WITHOUT and several == [values]:
        several = [[item] for item in values]
    for item in (item for one in several for item in one):
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise LaunchError(
                f"{option} has {_shown(value)}; it must be a value or a list of values"
            )
    return [word for one in several for word in words_with(option, tuple(map(str, one)))]


def _shown(value: Any) -> str:
    """Return a value for a message; one that YAML's aliases make endless is cut."""
    return reprlib.repr(value)


def _switch(option: str, value: bool, options: frozenset[str], is_switch: bool) -> list[str]:
    """Return the words of an entry that is true or false; false keeps a flag from being derived."""
    negative = f"--no-{option[2:]}"
    if not value:
        return [negative] if negative in options else [f"{WITHOUT}={option}"]
    if is_switch:
        return [option]
    if option in DERIVED_VALUES:
        return []
    raise LaunchError(f"{option} is true; it must have a value")


def as_config(
    model: str, flags: Iterable[Given], front: Mapping[str, Any], table: FlagTable
) -> str:
    """Return the YAML text of a run: what `read_config` reads as the same command.

    Args:
        model: The model as it was named.
        flags: All flags of the training.
        front: Values of this command's own flags, by flag, without the model.
        table: The training's flags.
    """
    content: dict[str, Any] = {"model": model}
    for option, value in front.items():
        _put(content, option, value, table)
    for given in flags:
        _put(content, given.option, _value_of(given), table)
    ordered = {name: content[name] for name in SECTIONS if name in content}
    return yaml.safe_dump(ordered, sort_keys=False, width=100, allow_unicode=True)


def _value_of(given: Given) -> Any:
    if not given.texts:
        return given.value
    if given.option in given.texts:  # given several times
        words = " ".join(given.words).split(given.option)
        return [[_plain(text) for text in part.split()] for part in words[1:]]
    texts = [_plain(text) for text in given.texts]
    return texts if isinstance(given.value, list | tuple) else texts[0]


def _put(content: dict[str, Any], option: str, value: Any, table: FlagTable) -> None:
    if option in _TOP.values():
        content[_entry_of(option)] = value
        return
    flag = option
    if table.is_switch(option):  # its name alone says what it does, as of --no-load-optim
        positive = f"--{option.removeprefix('--no-')}"
        is_negative = option.startswith("--no-") and positive in table.options
        flag, value = (positive, False) if is_negative else (option, True)
    section = _section_of(flag, table)
    names = {o: name for name, o in _SHORT.get(section, {}).items()}
    native = section == "megatron"
    name = flag[2:] if native else names.get(flag, _entry_of(flag))
    content.setdefault(section, {})[name] = value


def _plain(text: str) -> Any:
    """Return a value as YAML may write it: a number where it is read as the same text."""
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if str(number) == text and math.isfinite(number):
            return number
    return text
