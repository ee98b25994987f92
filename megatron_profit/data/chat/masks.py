"""The fields of several trainers that say whether a message or a whole record is trained.

A turn that its author excluded is never trained: a value that cannot be read leaves the record out.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_profit.data.errors import BrokenRecord, shown

NOTHING_TRAINED = "no part of the record is to be trained"
WEIGHTED = "a message has a weight other than 0 or 1"
UNCLEAR = "it is not clear which part of an answer is trained"

# 1 or true: trained. `weight` as OpenAI, Mistral and Fireworks have it, `loss` ms-swift, XTuner and slime,
# `loss_scale` ms-swift, `loss_mask` verl and slime, `step_loss_mask` slime, `train` and `training` axolotl,
# `trainable` tinker.
FIELDS = (
    "weight",
    "loss",
    "loss_mask",
    "loss_scale",
    "loss_weight",
    "step_loss_mask",
    "train",
    "training",
    "trainable",
)
# torchtune's, where true means that a message is not trained.
_MASKED = "masked"
# Masks that make one trainer keep a message and another leave it out.
_MASK = "mask"
# axolotl's, of characters.
_DETAILS = ("train_detail", "training_detail")
MESSAGE_FIELDS = (*FIELDS, _MASKED, _MASK, *_DETAILS)

# KTO's names, false for an unwanted answer. As a number or another text, `label` is a class of the record.
_UNWANTED = ("label", "kto_tag")
# A name that may say so in the words of yet another trainer.
_LIKE_A_MASK = re.compile(
    rf"loss|mask|train|weight|learn|superv|ignore|exclu|skip|^(?:{'|'.join(_UNWANTED)})$",
    re.IGNORECASE,
)

# Of these names, the ones that exclude where they are true; a mask may in either case.
_EXCLUDES = re.compile(r"mask|ignore|exclu|skip|no_?loss|untrain", re.IGNORECASE)

# Items of a list that a table holds as text: JSON, or as Python and numpy print it.
_ITEM = re.compile(r"[^\s,:'\"\[\]{}]+")

_FALSE, _TRUE = ("0", "0.", "0.0", "false"), ("1", "1.", "1.0", "true")
_WORDS = dict.fromkeys(_FALSE, False) | dict.fromkeys(_TRUE, True)


def trained(answer: Mapping[str, Any], parts: Sequence[Mapping[str, Any]] = ()) -> bool:
    """Return whether an assistant message is trained; without a field about it, it is.

    For example, `"weight": 0` excludes a message, in the message or in all parts of its content.

    Args:
        answer: Fields of the message.
        parts: Fields of each part of its content.

    Raises:
        BrokenRecord: A field has another value than 0 or 1, true or false, two contradict each other, or one
            of an unknown name may be of their kind. Or a part of the content is trained and another is not.
    """
    whole, said = _stated(answer), [_stated(part) for part in parts]
    if False in said and set(said) != {False}:
        raise BrokenRecord(
            UNCLEAR,
            "one part of a message's content is trained, another is not; give all parts the same weight",
        )
    stated = {whole, *said} - {None}
    if len(stated) > 1:
        raise BrokenRecord(UNCLEAR, "the parts of a message's content contradict the message")
    return False not in stated


def _stated(answer: Mapping[str, Any]) -> bool | None:
    """Return whether a message, or a part of one, says that it is trained; None where it says neither."""
    _check_unknown(
        answer.items(), "name it weight, with 1 for an answer that is trained, or remove it"
    )
    for name in (_MASK, *_DETAILS):
        if answer.get(name) or (name == _MASK and name in answer):
            raise BrokenRecord(
                UNCLEAR,
                f"{name} is {shown(answer[name])}; write weight 1 for an answer that is trained, else 0",
            )
    said = {name: _said(name, answer[name]) for name in FIELDS if name in answer}
    if _MASKED in answer:
        said[_MASKED] = not _said(_MASKED, answer[_MASKED])
    if len(set(said.values())) > 1:
        given = {name: answer[name] for name in said}
        raise BrokenRecord(UNCLEAR, f"the fields contradict each other: {shown(given)}")
    return next(iter(said.values()), None)


def unheeded(message: Mapping[str, Any]) -> set[str]:
    """Return the fields by which a message of another role asks to be trained, in vain."""
    excluded = {name for name in FIELDS if name in message and _value(message[name]) is False}
    return (message.keys() & set(MESSAGE_FIELDS)) - excluded - {_MASKED}


def may_mask(name: str) -> bool:
    """Return whether a field of this name may say which part is trained."""
    return name in MESSAGE_FIELDS or bool(_LIKE_A_MASK.search(name))


def check_record(fields: Mapping[str, Any]) -> None:
    """Refuse a record with a field that excludes it from training.

    Other numbers are taken for another fact, such as a measured loss. A list, `true` and `false` may be text,
    as in a cell of a CSV file.

    Args:
        fields: Fields of the record.

    Raises:
        BrokenRecord: A field says so, or is a list, which masks parts of the record; or one of an unknown
            name may do either.
    """
    fields = {name: _read_text(value) for name, value in fields.items() if may_mask(name)}
    remedy = "give each message that is not trained the weight 0, or remove the field"
    _check_unknown([item for item in fields.items() if _may_exclude(*item)], remedy)
    for name in (*FIELDS, _MASKED):
        if _value(fields.get(name)) is (name == _MASKED):
            raise BrokenRecord(NOTHING_TRAINED, f"the record's {name} is {shown(fields[name])}")
        if isinstance(fields.get(name), list | dict):
            raise BrokenRecord(
                UNCLEAR, f"the record's {name} is {shown(fields[name])}; give each message its own"
            )
    if fields.get(_MASK) is not None and not isinstance(fields[_MASK], str):  # NeMo's is a role
        raise BrokenRecord(UNCLEAR, f"the record's mask is {shown(fields[_MASK])}; write weight")


def heeded(fields: Mapping[str, Any]) -> set[str]:
    """Return the fields of a record that `check_record` has read as "it is trained".

    For example, a weight of 1 is one of them, and a weight of 0.5 is none.
    """
    return {name for name in (*FIELDS, _MASKED) if _value(fields.get(name)) is (name != _MASKED)}


def _may_exclude(name: str, value: Any) -> bool:
    """Return whether a field of the record may leave out some of it, if it is a mask at all."""
    if isinstance(value, bool):
        return "mask" in name.lower() or value is bool(_EXCLUDES.search(name))
    return isinstance(value, list)


def _check_unknown(fields: Iterable[tuple[str, Any]], remedy: str) -> None:
    """Refuse fields that are not read and whose name and value look like a mask.

    Other numbers and texts are taken for another fact, such as a measured loss.
    """
    for name, value in fields:
        if name in MESSAGE_FIELDS or not may_mask(name):
            continue
        value = _read_text(value)
        values = value if isinstance(value, list) else [value]
        if values and all(_value(item) is not None or isinstance(item, list) for item in values):
            raise BrokenRecord(UNCLEAR, f"{name} is {shown(value)} and is not read; {remedy}")


def _read_text(value: Any) -> Any:
    """Return a list, true or false that is a text; another value as it is.

    For example, "[0, 1]" gives ["0", "1"].
    """
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith(("[", "{")):
        return _ITEM.findall(value)
    return {"true": True, "false": False}.get(value.strip().lower(), value)


def _said(name: str, value: Any) -> bool:
    said = _value(value)
    if said is None:
        raise BrokenRecord(
            WEIGHTED, f"{name} is {shown(value)}; it has to be 0 or 1, true or false"
        )
    return said


def _value(value: Any) -> bool | None:
    """Return the value of a field as yes or no, None where it is neither."""
    if isinstance(value, str):
        return _WORDS.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None
