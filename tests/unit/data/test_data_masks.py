"""Turns that their author excluded, in the spellings of several trainers, are never trained."""

import pytest

from megatron_profit.data import BrokenRecord, ColumnMapping, RawRecord, normalise
from megatron_profit.data.chat import masks

QUESTION = {"role": "user", "content": "1 + 1?"}
WRONG, RIGHT = ({"role": "assistant", "content": text} for text in ("3", "2"))
NO = [0, 0.0, -0.0, False, "0", "0.0", "false", "False", " FALSE "]
YES = [1, 1.0, True, "1", "1.0", "true", "True"]


def read(record, layout=None):
    return normalise(RawRecord(record, "data.jsonl", 1, "line"), layout)


def talk(**fields):
    """Two answers, of which the first has the fields."""
    return {"messages": [QUESTION, {**WRONG, **fields}, QUESTION, RIGHT]}


@pytest.mark.parametrize("name", masks.FIELDS)
def test_an_answer_that_is_excluded_is_context(name):
    for value in NO:
        assert read(talk(**{name: value})).untrained == {1}
    for value in YES:
        conversation = read(talk(**{name: value}))
        assert (conversation.untrained, conversation.unread) == (frozenset(), frozenset())


def test_torchtunes_masked_says_the_opposite():
    assert read(talk(masked=True)).untrained == {1}
    assert read(talk(masked=False)).untrained == frozenset()
    assert read(talk(masked=True, weight=0)).untrained == {1}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"weight": 1, "loss": 0}, masks.UNCLEAR),
        ({"masked": True, "trainable": "true"}, masks.UNCLEAR),
        ({"mask": 0}, masks.UNCLEAR),
        ({"mask": True}, masks.UNCLEAR),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}, masks.UNCLEAR),
        ({"weight": 0.5}, masks.WEIGHTED),
        ({"weight": 2}, masks.WEIGHTED),
        ({"loss": float("nan")}, masks.WEIGHTED),
        ({"loss_mask": [0, 1, 1]}, masks.WEIGHTED),
        ({"train": "no"}, masks.WEIGHTED),
        ({"train": ""}, masks.WEIGHTED),
        ({"masked": {}}, masks.WEIGHTED),
    ],
)
def test_what_cannot_be_read_leaves_the_record_out(fields, reason):
    with pytest.raises(BrokenRecord) as error:
        read(talk(**fields))
    assert error.value.reason == reason
    assert next(iter(fields)) in error.value.detail


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weights", 0),
        ("is_trainable", False),
        ("train_on_turn", "false"),
        ("no_loss", True),
        ("Loss", 0),
        ("lossWeight", 0.0),
        ("response_mask", [0, 0, 1]),
        ("loss_masked", 1),
        ("supervised", False),
        ("skip", True),
        ("exclude", "true"),
        ("ignore_index", [[0, 1]]),
    ],
)
def test_what_looks_like_a_mask_and_is_not_known_leaves_the_record_out(name, value):
    with pytest.raises(BrokenRecord) as error:
        read(talk(**{name: value}))
    assert error.value.reason == masks.UNCLEAR
    assert name in error.value.detail
    assert "weight" in error.value.detail


def test_names_and_values_that_only_resemble_a_mask_are_told():
    for fields in ({"train_loss": 0.83}, {"trainer": "x"}, {"score": 0}, {"weights": []}):
        assert read(talk(**fields)).unread == {f"messages.{name}" for name in fields}


def test_a_field_of_the_record_that_looks_like_a_mask_leaves_it_out():
    for fields in (
        {"weights": [0, 1]},
        {"assistant_masks": [[0], [1]]},
        {"loss_masks": [True]},
        {"is_trainable": False},
        {"skip": True},
        {"loss_masked": True},
        {"assistant_mask": False},
        {"label": False},
        {"label": "False"},
        {"kto_tag": False},
    ):
        with pytest.raises(BrokenRecord) as error:
            read({**talk(), **fields})
        assert error.value.reason == masks.UNCLEAR
    for fields in (
        {"training_topics": ["sums"]},
        {"losses": [0.8, 0.3]},
        {"training_step": 0},
        {"is_train": True},
        {"skip": False},
        {"label": True},
        {"label": "True"},
        {"kto_tag": True},
        {"label": 0},
        {"label": "spam"},
        {"labels": [0, 1]},
    ):
        assert read({**talk(), **fields}).unread == set(fields)


def test_empty_and_null_masks_say_nothing():
    assert read(talk(loss=None, train_detail=[], mask=None)).untrained == frozenset()


def test_a_question_is_never_trained_and_that_is_told():
    def unread(**fields):
        return read({"messages": [{**QUESTION, **fields}, RIGHT]}).unread

    assert unread(weight=0, loss=False, masked=True) == frozenset()
    assert unread(train=True, loss_mask=1) == {"messages.train", "messages.loss_mask"}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [QUESTION, RIGHT]},
        {"instruction": "1 + 1?", "output": "2"},
        {"prompt": "1 + 1?", "completion": "2"},
    ],
)
def test_a_whole_record_may_be_excluded(record):
    for name, value in (("weight", 0), ("train", "false"), ("loss_mask", False), ("masked", 1)):
        with pytest.raises(BrokenRecord) as error:
            read({**record, name: value})
        assert error.value.reason == masks.NOTHING_TRAINED
    for fields in ({"loss_mask": [0, 1]}, {"mask": 1}):
        with pytest.raises(BrokenRecord) as error:
            read({**record, **fields})
        assert error.value.reason == masks.UNCLEAR
    measured = read({**record, "loss": 0.83, "mask": "User"})
    assert measured.unread == {"loss", "mask"}, "another thing by that name"
    assert read({**record, "weight": 1.0, "train": "true", "masked": False}).unread == frozenset()


def test_a_column_that_is_named_for_something_else_is_no_mask():
    layout = ColumnMapping.of_columns(["prompt=train", "response=loss"])
    assert len(read({"train": "0", "loss": "0"}, layout).messages) == 2
    with pytest.raises(BrokenRecord):
        read({"train": "0", "loss": "0", "weight": 0}, layout)


def test_parts_of_one_turn_are_trained_alike():
    call = {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'}
    parts = [QUESTION, {**WRONG, "weight": 0}, {**call, "loss": 0}, RIGHT]
    assert read({"messages": parts}).untrained == {1}
    with pytest.raises(BrokenRecord) as error:
        read({"messages": [QUESTION, {**WRONG, "weight": 0}, call]})
    assert error.value.reason == masks.UNCLEAR


def in_parts(*parts, **fields):
    """Two answers, of which the first is written in parts with these fields."""
    content = [{"type": "text", "text": "3", **part} for part in parts]
    return talk(content=content, **fields)


def test_an_answer_of_which_all_parts_are_excluded_is_context():
    for field in ({"train": False}, {"weight": 0}, {"loss": "0"}, {"masked": True}):
        assert read(in_parts(field, field)).untrained == {1}
    assert read(in_parts({"train": False}, {"train": False}, weight=0)).untrained == {1}
    for parts in ([{}, {}], [{"train": True}, {}], [{"weight": None}, {"weight": 1}]):
        conversation = read(in_parts(*parts))
        assert (conversation.untrained, conversation.unread) == (frozenset(), frozenset())


@pytest.mark.parametrize(
    ("parts", "fields", "reason"),
    [
        ([{"train": False}, {}], {}, masks.UNCLEAR),
        ([{"weight": 0}, {"weight": 1}], {}, masks.UNCLEAR),
        ([{"train": False}], {"weight": 1}, masks.UNCLEAR),
        ([{"train": True}], {"weight": 0}, masks.UNCLEAR),
        ([{"is_trainable": False}], {}, masks.UNCLEAR),
        ([{"train_detail": [[0, 1]]}], {}, masks.UNCLEAR),
        ([{"weight": 0.5}], {}, masks.WEIGHTED),
    ],
)
def test_parts_that_do_not_agree_leave_the_record_out(parts, fields, reason):
    with pytest.raises(BrokenRecord) as error:
        read(in_parts(*parts, **fields))
    assert error.value.reason == reason


def test_other_fields_of_a_part_count_as_unread():
    cached = {"cache_control": {"type": "ephemeral"}, "empty": None}
    assert read(in_parts(cached, {})).unread == {"messages.content.cache_control"}
    asked = {"role": "user", "content": [{"type": "text", "text": "q", "train": True}]}
    assert read({"messages": [asked, RIGHT]}).unread == {"messages.content.train"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *[("loss_mask", text) for text in ("[0, 1]", "[0 1]", "[[0], [1]]", "[]", '{"a": 0}')],
        ("train", "[false, true]"),
        ("train", "[False, True]"),
        ("weight", ' ["0", "1"]'),
        ("mask", "[0, 1]"),
        ("mask", "true"),
        ("assistant_mask", "[0,1]"),
        ("response_mask", "[0. 1.]"),
        ("is_trainable", "False"),
        ("skip", "true"),
    ],
)
def test_a_mask_of_the_record_may_be_text(name, text):
    """As in a cell of a CSV file."""
    with pytest.raises(BrokenRecord) as error:
        read({**talk(), name: text})
    assert error.value.reason == masks.UNCLEAR
    assert name in error.value.detail


def test_a_text_that_only_resembles_a_mask_counts_as_unread():
    for fields in (
        {"training_topics": '["sums"]'},
        {"losses": "[0.8, 0.3]"},
        {"train_note": "[1] Smith et al."},
        {"is_trainable": "True"},
        {"skip": "false"},
        {"training_step": "0"},
    ):
        assert read({**talk(), **fields}).unread == set(fields)


def test_a_mask_of_an_unknown_name_may_be_text_in_a_message():
    with pytest.raises(BrokenRecord, match="response_mask"):
        read(talk(response_mask="[0, 1]"))
