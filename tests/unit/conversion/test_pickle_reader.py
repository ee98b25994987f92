"""The reader of pickles: what it reads, what it refuses, and how long it may take."""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from hostile_files import PAYLOADS, WORKING, Steps, text

from checkpoint_conversion.pickles import reader as pickle_reader
from checkpoint_conversion.pickles.reader import read_first_pickle, read_pickle
from checkpoint_conversion.pickles.uses import (
    EXTRA_STATE,
    METADATA,
    OBJECTS,
    TENSORS,
    arguments,
    within,
)
from checkpoint_conversion.pickles.values import Instance, Named, OrderedMap, PickleError

PLAIN = [
    None,
    True,
    [0, 1, 255, 256, 65535, 65536, -1, 2**31, -(2**31), 2**400, -(2**400)],
    [0.5, float("inf"), -1e300],
    ["", "a" * 300, "ünï 光", "x" * 70_000, "\ud800"],
    (1, (2, (3, ()))),
    {"a": [1], "b": {"c": ()}, 3: 4, (1, "x"): None},
    [[]] * 3,
]
TABLES = {"metadata": METADATA, "tensors": TENSORS, "objects": OBJECTS, "extra state": EXTRA_STATE}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", PLAIN, ids=range(len(PLAIN)))
def test_plain_values_are_read(value, protocol):
    assert read_pickle(pickle.dumps(value, protocol), within({})) == value


@pytest.mark.parametrize("protocol", [4, 5])
def test_bytes_and_sets_are_read(protocol):
    value = [b"", b"ab\xff" * 200, {1, 2}, frozenset(["x"])]
    assert read_pickle(pickle.dumps(value, protocol), within({})) == value


def test_many_values_in_frames_and_with_many_references():
    value = [{"key": i, "text": str(i), "same": "same"} for i in range(2000)]
    assert read_pickle(pickle.dumps(value, 4), within({})) == value


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("table", TABLES)
def test_a_pickle_that_runs_something_is_refused(tmp_path, payload, table):
    canary = tmp_path / "canary"
    with pytest.raises(PickleError):
        read_pickle(PAYLOADS[payload](canary), within(TABLES[table]))
    assert not canary.exists()


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_reader_of_arguments_refuses_it_too(tmp_path, payload):
    canary = tmp_path / "canary"
    with pytest.raises(PickleError):
        read_pickle(PAYLOADS[payload](canary), arguments)
    assert not canary.exists()


@pytest.mark.parametrize("payload", WORKING)
def test_the_payloads_work(tmp_path, payload):
    canary = tmp_path / "canary"
    pytest.importorskip("megatron.core")
    import megatron.core.dist_checkpointing.strategies.filesystem_async  # noqa: F401

    value = pickle.loads(PAYLOADS[payload](canary))
    for stream in (value, value[1]["a"][0] if isinstance(value, list) else None):
        if isinstance(stream, io.IOBase):
            stream.close()
    assert canary.exists()


@pytest.mark.parametrize("table", TABLES)
def test_no_list_names_anything_that_runs_text_or_opens_files(table):
    harmful = {
        "os",
        "posix",
        "sys",
        "subprocess",
        "builtins",
        "importlib",
        "shutil",
        "runpy",
        "codeop",
    }
    for module, name in TABLES[table]:
        assert module not in harmful
        assert "." not in name
        assert name not in ("getattr", "eval", "exec", "open", "load", "loads", "import_module")


def test_names_are_taken_as_module_and_name_and_not_joined():
    uses = within(
        {("torch._utils", "_rebuild_tensor_v2"): TENSORS["torch._utils", "_rebuild_tensor_v2"]}
    )
    split = b"\x80\x04" + text("torch") + text("_utils._rebuild_tensor_v2") + b"\x93)R."
    with pytest.raises(PickleError, match=r"refers to torch\._utils\._rebuild_tensor_v2"):
        read_pickle(split, uses)


def test_a_function_must_be_called_and_not_kept():
    reference = b"\x80\x02]ctorch._utils\n_rebuild_tensor_v2\na."
    with pytest.raises(PickleError, match="keeps a function as a value"):
        read_pickle(reference, within(OBJECTS))


def _namespace(state: bytes) -> bytes:
    return b"\x80\x04cargparse\nNamespace\n)\x81" + state + b"b."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_namespace(b"}" + text("a") + b"K\x05s"), None),
        (_namespace(b"]"), "state that it cannot have"),
        (_namespace(b"}K\x05K\x05s"), "state that it cannot have"),
        (_namespace(b"}" + text("a") + b"K\x05sb}"), "gives a state to"),
        (b"\x80\x02]}b.", "gives a state to a list"),
        (b"\x80\x02cargparse\nNamespace\n}b.", "gives a state to"),
        (b"\x80\x02ccollections\nOrderedDict\n)R}" + text("items") + b"Nsb.", "attributes"),
        (b"\x80\x02ccollections\nOrderedDict\n)R}" + text("_metadata") + b"Nsb.", None),
        (b"\x80\x02ccollections\nOrderedDict\n]R.", "calls collections.OrderedDict"),
        (b"\x80\x02cargparse\nNamespace\nK\x01\x85R.", "calls argparse.Namespace"),
        (b"\x80\x02cargparse\nNamespace\nK\x01\x85\x81.", "other arguments than it takes"),
        (b"\x80\x02K\x01)R.", "calls int"),
        (b"\x80\x02K\x01K\x02a.", "fills a int"),
        (b"\x80\x02K\x01Q.", "outside of it"),
        (b"\x80\x02]2.", "no plain data"),
        (b"\x80\x00I5\n.", "another protocol"),
        (b"\x80\x02I5\n.", "no plain data"),
        (b"\x80\x02K\x05.K", "1 bytes follow its end"),
        (b"\x80\x02K\x05." + pickle.dumps(1), "bytes follow its end"),
        (b"", "broken"),
        (b".", "broken"),
        (b"\x80\x02.", "broken"),
        (b"\x80\x02K\x05K\x06.", "broken"),
        (b"\x80\x02(K\x05.", "broken"),
        (b"\x80\x02X\xff\xff\x00\x00abc.", "broken"),
        (b"\x80\x04\x8e" + b"\xff" * 8 + b"a.", "broken"),
        (b"\x80\x04\x95" + b"\xff" * 8 + b"K\x05.", "broken"),
        (b"\x80\x02h\x05.", "broken"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f\x01.", "number of 2147483647 bytes"),
        (b"\x80\x02X\x02\x00\x00\x00\xff\xfe.", "no UTF-8"),
        (b"\x80\x02}]Ns.", "list as a key"),
        (b"\x80\x02}}Ns.", "dict as a key"),
    ],
)
def test_what_a_pickle_may_do(content, message):
    if message is None:
        read_pickle(content, within(OBJECTS))
        return
    with pytest.raises(PickleError, match=message):
        read_pickle(content, within(OBJECTS))


def test_every_cut_of_a_pickle_is_refused():
    whole = pickle.dumps({"a": [1, 2.5, "text", (None, True)], "b": {"c": b"bytes"}}, 4)
    for length in range(len(whole)):
        with pytest.raises(PickleError):
            read_pickle(whole[:length], within({}))


def _nested_tuples(depth: int) -> bytes:
    """A key whose hash takes 2^depth steps: each tuple holds the one before twice."""
    return b"\x80\x02}K\x01" + b"\x85" + b"q\x00h\x00\x86" * depth + b"Ns."


BOMBS = {
    "a place in the memo that takes 34 GB": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "nested lists": b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
    "nested tuples": b"\x80\x02)" + b"\x85" * 50_000 + b".",
    "lists of lists of lists, ten times each": b"\x80\x02]"
    + b"".join(
        b"q" + bytes([i]) + b"](" + b"h" + bytes([i]) * 1 + (b"h" + bytes([i])) * 9 + b"e"
        for i in range(9)
    )
    + b".",
    "a key that is a tree of tuples": _nested_tuples(60),
    "numbers as keys that collide": b"\x80\x02}("
    + b"".join(
        b"\x8a\x0a" + ((2**61 - 1) * i).to_bytes(10, "little", signed=True) + b"N"
        for i in range(1, 20_000)
    )
    + b"u.",
    "a text of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
    "bytes of 2^63": b"\x80\x04\x8e" + struct.pack("<Q", 2**63 - 1) + b".",
    "a frame of 2^63": b"\x80\x04\x95" + struct.pack("<Q", 2**63 - 1) + b".",
    "a number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_the_work_grows_with_the_length_of_the_pickle_only(bomb):
    content = BOMBS[bomb]
    with Steps(pickle_reader) as steps, contextlib.suppress(PickleError):
        read_pickle(content, within(OBJECTS))
    assert steps.count < 40 * len(content) + 200


def test_keys_that_can_collide_are_few():
    keys = {float(i): None for i in range(10_001)}
    with pytest.raises(PickleError, match="10001 keys, some of them numbers"):
        read_pickle(pickle.dumps(keys, 4), within({}))
    assert len(read_pickle(pickle.dumps({str(i): None for i in keys}, 4), within({}))) == 10_001


def test_deep_nesting_of_records_is_freed():
    record = b"cargparse\nNamespace\n)\x81}" + text("a")
    depth = 20_000
    content = b"\x80\x04" + record * depth + b"N" + b"sb" * depth + b"."
    value = read_pickle(content, within(OBJECTS))
    assert isinstance(value, Instance)
    del value


def test_classes_of_a_training_are_read_and_others_are_not():
    args = argparse.Namespace(
        lr=1e-3, dtype=torch.bfloat16, names=["a"], state=np.random.get_state()
    )
    stream = io.BytesIO()
    torch.save({"args": args, "order": collections.OrderedDict(a=1)}, stream)
    content = zipfile.ZipFile(stream).read("archive/data.pkl")
    found = read_pickle(content, within(OBJECTS))
    assert type(found["order"]) is OrderedMap
    state = found["args"].state
    assert (state["lr"], state["dtype"]) == (1e-3, Named("torch", "bfloat16"))
    assert state["state"][0] == "MT19937"
    stream = io.BytesIO()
    torch.save(collections.Counter("aab"), stream)
    with pytest.raises(PickleError, match=r"refers to collections\.Counter"):
        read_pickle(zipfile.ZipFile(stream).read("archive/data.pkl"), within(OBJECTS))


@pytest.mark.parametrize(
    "array",
    [np.array([{}], dtype=object), np.zeros(2, dtype=[("a", "i4")]), np.array(["text"])],
    ids=["objects", "records", "texts"],
)
def test_arrays_of_numbers_only(array):
    with pytest.raises(PickleError):
        read_pickle(pickle.dumps(array, 4), within(OBJECTS))
    numbers = pickle.dumps(np.arange(5), 4)
    assert isinstance(read_pickle(numbers, within(OBJECTS)), Instance)


def test_several_pickles_in_a_row():
    content = pickle.dumps(1, 2) + pickle.dumps("two", 4)
    value, end = read_first_pickle(content, within({}))
    assert (value, read_first_pickle(content, within({}), start=end)[0]) == (1, "two")
