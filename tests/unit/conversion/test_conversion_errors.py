"""HuggingFace folders that cannot be converted: what is said, and that nothing is written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import stat

import pytest
import torch
from conversion_helpers import write_config
from hostile_files import Steps
from safetensors.torch import load_file, save_file

from checkpoint_conversion.cli import print_table
from checkpoint_conversion.engine.output import write_file
from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf import folder as hf_folder
from checkpoint_conversion.hf.folder import parse_json_object
from checkpoint_conversion.hf_to_megatron import hf_to_megatron
from checkpoint_conversion.megatron_to_hf import megatron_to_hf

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00009.safetensors", "model-00002-of-00009.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def _tensors(change, file="model.safetensors"):
    """A change to the tensors of a file."""

    def apply(folder):
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return apply


def _index(change):
    """A change to the index of a folder with shards."""

    def apply(folder):
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return apply


def _header(change):
    """A change to the header text of a file, at the same length."""

    def apply(folder):
        file = folder / "model.safetensors"
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        text = change(data[8 : 8 + length].decode()).encode()
        assert len(text) == length
        file.write_bytes(data[:8] + text + data[8 + length :])

    return apply


def _cut(file, count):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:count])


def _shard_of(folder, name):
    return json.loads((folder / INDEX).read_text())["weight_map"][name]


def _move(folder):
    """The tensor lies in another shard than the index says."""
    shard = _shard_of(folder, Q_PROJ)
    other = next(file.name for file in folder.glob("*.safetensors") if file.name != shard)
    tensors = load_file(folder / shard)
    moved = tensors.pop(Q_PROJ)
    save_file(tensors, folder / shard)
    save_file({**load_file(folder / other), Q_PROJ: moved}, folder / other)


def _duplicate(folder):
    """The tensor lies in two shards."""
    shard = _shard_of(folder, Q_PROJ)
    other = max(file.name for file in folder.glob("*.safetensors") if file.name != shard)
    copy = load_file(folder / shard)[Q_PROJ]
    save_file({**load_file(folder / other), Q_PROJ: copy}, folder / other)


def _dangling(file):
    """A download of which a blob is missing."""

    def apply(folder):
        (folder / file).unlink()
        (folder / file).symlink_to("../../blobs/none")

    return apply


def _pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


SINGLE = {
    "no folder": (shutil.rmtree, "hf: no such folder; give a local"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: missing"),
    "broken config": (
        lambda f: (f / "config.json").write_text('{"a": 1'),
        r"config\.json: broken JSON",
    ),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "config says a key twice": (
        lambda f: (f / "config.json").write_text('{"a": 1, "a": 2}'),
        "'a' occurs twice",
    ),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "broken JSON"),
    "other architecture": (
        lambda f: write_config(f, lambda c: c.update(architectures=["GPT2LMHeadModel"])),
        "GPT2LMHeadModel",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "link to no weights": (
        _dangling("model.safetensors"),
        r"model\.safetensors is a link to .*blobs/none, which is missing; download",
    ),
    "pickled weights": (_pickled, r"pytorch_model\.bin.*save_pretrained"),
    "missing tensor": (_tensors(lambda t: t.pop(Q_PROJ)), rf"no tensor {Q_PROJ}"),
    "extra tensor": (
        _tensors(lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(96, 64)})),
        r"unknown tensor model\.layers\.3\.mlp\.up_proj\.weight",
    ),
    "bias": (
        _tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(128)})),
        r"unknown tensor .*q_proj\.bias",
    ),
    "wrong shape": (
        _tensors(lambda t: t.update({Q_PROJ: torch.ones(64, 128)})),
        rf"{Q_PROJ} has shape \[64, 128\]; config.json calls for \[128, 64\]",
    ),
    "vocabulary of another size": (
        lambda f: write_config(f, lambda c: c.update(vocab_size=512)),
        r"embed_tokens\.weight has shape \[507, 64\]; config.json calls for \[512, 64\]",
    ),
    "integers": (
        _tensors(lambda t: t.update({Q_PROJ: torch.ones(128, 64, dtype=torch.int8)})),
        rf"{Q_PROJ} is I8; supported: F32, BF16, F16",
    ),
    "dtypes of q and k differ": (
        _tensors(lambda t: t.update({Q_PROJ: t[Q_PROJ].bfloat16()})),
        rf"{Q_PROJ} is BF16, but .* is F32.*--dtype",
    ),
    "empty file": (_cut("model.safetensors", 0), "truncated, or not a safetensors file"),
    "cut header": (_cut("model.safetensors", 500), "truncated, or not a safetensors file"),
    "cut data": (_cut("model.safetensors", -1), r"model\.safetensors: truncated: .* ends at byte"),
    "extra data": (
        lambda f: (f / "model.safetensors").open("ab").write(b"more"),
        "4 bytes more than its tensors need",
    ),
    "no JSON in the header": (_header(lambda text: "x" * len(text)), "broken JSON"),
    "unknown dtype": (_header(lambda text: text.replace('"F32"', '"Q32"', 1)), "malformed.*Q32"),
    "wrong offsets": (_header(lambda text: text.replace("[507,64]", "[507,65]", 1)), "wrong data"),
    "a tensor twice": (
        _header(
            lambda text: text.replace("layers.1.self_attn.q_proj", "layers.0.self_attn.q_proj")
        ),
        r"'model\.layers\.0\.self_attn\.q_proj\.weight' occurs twice",
    ),
    "stale index": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "b.safetensors"}}'),
        "does not refer to model.safetensors; remove whichever is stale",
    ),
    "stray shard": (
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
        f"neither model.safetensors nor {INDEX}",
    ),
}
SHARDED = {
    "missing shard": (
        lambda f: (f / _shard_of(f, Q_PROJ)).unlink(),
        r"model-0000\d-of-0000\d.safetensors: missing",
    ),
    "link to no shard": (
        lambda f: _dangling(_shard_of(f, Q_PROJ))(f),
        r"safetensors: a link to .*blobs/none, which is missing; download",
    ),
    "truncated shard": (
        lambda f: _cut(_shard_of(f, Q_PROJ), -8)(f),
        r"model-0000\d-of-0000\d.safetensors: truncated",
    ),
    "tensor in another shard": (_move, rf"holds {Q_PROJ}; .* puts it in|{Q_PROJ} is missing"),
    "tensor in two shards": (_duplicate, rf"{Q_PROJ}"),
    "index lacks a tensor": (
        _index(lambda weight_map: weight_map.pop(Q_PROJ)),
        rf"holds {Q_PROJ}; {INDEX} puts it nowhere",
    ),
    "index names too much": (
        _index(lambda weight_map: weight_map.update(ghost=weight_map[Q_PROJ])),
        rf"ghost is missing; {INDEX} puts it there",
    ),
    "index leaves the folder": (
        _index(lambda weight_map: weight_map.update({Q_PROJ: "../other.safetensors"})),
        "not a file of this folder",
    ),
    "broken index": (lambda f: (f / INDEX).write_text("{"), rf"{INDEX}: broken JSON"),
    "empty index": (lambda f: (f / INDEX).write_text("{}"), rf"{INDEX}: no weight_map"),
}


def _assert_refused(folder, message):
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(ConversionError, match=message):
        hf_to_megatron(folder, folder.parent / "out")
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize("case", SINGLE)
def test_a_broken_folder_is_refused(qwen3, case):
    breaks, message = SINGLE[case]
    breaks(qwen3)
    _assert_refused(qwen3, message)


@pytest.mark.parametrize("case", SHARDED)
def test_a_broken_folder_with_shards_is_refused(make_qwen3, case):
    folder = make_qwen3(shard_size="100KB")
    breaks, message = SHARDED[case]
    breaks(folder)
    _assert_refused(folder, message)


def _prefixed(prefix, names=None):
    def rename(tensors):
        for name in list(tensors):
            if names is None or name in names:
                tensors[prefix + name] = tensors.pop(name)

    return _tensors(rename)


def test_a_prefix_that_all_names_have_is_named(qwen3):
    _prefixed("_orig_mod.")(qwen3)
    _assert_refused(
        qwen3,
        "no tensor model.embed_tokens.weight, which config.json calls for; all 36 names begin with "
        "'_orig_mod.', which a wrapper adds",
    )


def test_a_prefix_of_some_names_is_not(qwen3):
    _prefixed("other.", ["model.norm.weight"])(qwen3)
    _assert_refused(qwen3, r"no tensor model\.norm\.weight, which config\.json calls for$")


@pytest.mark.parametrize(
    "part", ["_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module."]
)
def test_a_name_to_which_a_wrapper_has_added_is_named(qwen3, part):
    name = "model.layers.1.mlp.up_proj.weight"
    wrapped = name.replace("mlp", f"{part}mlp")
    _tensors(lambda t: t.update({wrapped: t.pop(name)}))(qwen3)
    _assert_refused(
        qwen3,
        f"no tensor {name}, .*; it is there as {wrapped}, a name to which a wrapper has added",
    )


@pytest.mark.parametrize("with_head", [False, True])
def test_names_without_model_are_found_as_transformers_finds_them(make_qwen3, tmp_path, with_head):
    from transformers import AutoModelForCausalLM

    plain, folder = make_qwen3("plain", tied=not with_head), tmp_path / "bare"
    shutil.copytree(plain, folder)

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    _tensors(strip)(folder)
    hf_to_megatron(folder, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", folder, tmp_path / "back")
    expected = load_file(plain / "model.safetensors")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == expected.keys()
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(tensor, back[name])
        assert torch.equal(tensor, loaded[name])


def test_a_template_with_shards_and_bare_names(make_qwen3, tmp_path):
    plain = make_qwen3("plain", shard_size="100KB")
    hf_to_megatron(plain, tmp_path / "megatron")

    def strip(weight_map):
        for name in list(weight_map):
            weight_map[name.removeprefix("model.")] = weight_map.pop(name)

    content = json.loads((plain / INDEX).read_text())["weight_map"]
    _index(strip)(plain)
    megatron_to_hf(tmp_path / "megatron", plain, tmp_path / "back")
    assert json.loads((tmp_path / "back" / INDEX).read_text())["weight_map"] == content


def test_a_template_whose_weights_are_pointers(make_qwen3, tmp_path):
    plain = make_qwen3("plain")
    hf_to_megatron(plain, tmp_path / "megatron")
    expected = load_file(plain / "model.safetensors")
    (plain / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    megatron_to_hf(tmp_path / "megatron", plain, tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in back.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }


def test_a_tensor_under_two_names_is_refused(qwen3):
    _tensors(lambda t: t.update({"norm.weight": t["model.norm.weight"].clone()}))(qwen3)
    _assert_refused(qwen3, r"norm\.weight is there twice, also as ")


def test_buffers_that_transformers_computes_are_left_out(qwen3, tmp_path):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    _tensors(lambda t: t.update({name: torch.ones(16)}))(qwen3)
    hf_to_megatron(qwen3, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", qwen3, tmp_path / "back")
    assert name not in load_file(tmp_path / "back" / "model.safetensors")


def test_a_tensor_with_a_name_like_that_of_a_buffer_is_not_left_out(qwen3):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq_scale"
    _tensors(lambda t: t.update({name: torch.ones(16)}))(qwen3)
    _assert_refused(qwen3, f"unknown tensor {name}; it would be lost")


def test_an_adapter_is_not_taken_for_a_model(qwen3):
    (qwen3 / "adapter_config.json").write_text("{}")
    _assert_refused(qwen3, r"adapter_config\.json: the folder is an adapter .*merge_and_unload")


HOSTILE = "\x1b[31mred\x1b[0m\nerror: \u202egnp\ud800"


@pytest.mark.parametrize(
    "place",
    ["a tensor", "a shard", "a dtype", "architectures", "rope_scaling", "a key twice"],
)
def test_a_message_is_one_printable_line(make_qwen3, tmp_path, run_command, place):
    folder = make_qwen3(shard_size="100KB" if place == "a shard" else "1GB")
    changes = {
        "architectures": lambda config: config.update(architectures=[HOSTILE]),
        "rope_scaling": lambda config: config.update(rope_scaling={"type": HOSTILE}),
    }
    if place in changes:
        write_config(folder, changes[place])
    elif place == "a shard":
        _index(lambda m: m.update({Q_PROJ: f"{HOSTILE}.safetensors"}))(folder)
    elif place == "a key twice":
        (folder / "config.json").write_text(
            f"{{{json.dumps(HOSTILE)}: 1, {json.dumps(HOSTILE)}: 1}}"
        )
    else:
        is_dtype = place == "a dtype"
        _rewrite_header(folder, Q_PROJ if is_dtype else HOSTILE, HOSTILE if is_dtype else "F32")
    result = run_command("hf_to_megatron", "--hf", folder, "--out", tmp_path / "out")
    assert (result.code, result.out) == (2, "")
    line = result.err.removesuffix("\n")
    assert line.isprintable()
    assert r"\x1b[31mred\x1b[0m" in line


def _rewrite_header(folder, name, dtype):
    """Change the header entry of a tensor, or add an empty one."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.setdefault(name, {"shape": [0], "data_offsets": [0, 0]})["dtype"] = dtype
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def test_a_dry_run_prints_no_character_that_a_terminal_obeys(tmp_path, capsys):
    print_table(("name",), [(HOSTILE,), ("plain",)])
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", INDEX, "tokenizer.json", "generation_config.json"]
)
@pytest.mark.parametrize("kind", ["a pipe", "a device", "a link to a device", "a socket"])
def test_only_regular_files_are_read(qwen3, tmp_path, name, kind):
    hf_to_megatron(qwen3, tmp_path / "megatron")
    (qwen3 / name).unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(qwen3 / name)
    elif kind == "a link to a device":
        (qwen3 / name).symlink_to("/dev/zero")
    elif kind == "a socket":
        _bind(qwen3 / name)
    else:
        pytest.importorskip("os").geteuid() == 0 or pytest.skip("only root makes devices")
        try:
            os.mknod(qwen3 / name, 0o644 | stat.S_IFCHR, os.makedev(1, 5))
        except PermissionError:
            pytest.skip("no devices can be made here")
    message = rf"{name} is a {kind.split()[-1]}; a regular file is needed"
    for convert in (
        lambda: hf_to_megatron(qwen3, tmp_path / "out"),
        lambda: megatron_to_hf(tmp_path / "megatron", qwen3, tmp_path / "out"),
    ):
        with pytest.raises(ConversionError, match=message):
            convert()


def _bind(path):
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.getcwd()
        os.chdir(path.parent)  # the names of sockets must be short
        try:
            bound.bind(path.name)
        finally:
            os.chdir(here)


def test_a_configuration_of_100_mb_is_not_read(qwen3):
    with (qwen3 / "config.json").open("r+b") as file:
        file.truncate(100_000_001)
    _assert_refused(qwen3, r"config\.json: larger than 100 MB")


@pytest.mark.parametrize("levels", [150, 900, 100_000])
@pytest.mark.parametrize(("before", "after"), [("[", "]"), ('{"a":', "}")], ids=["list", "object"])
def test_deep_values_are_refused_before_anything_walks_through_them(qwen3, levels, before, after):
    inner = before * levels + "1" + after * levels
    text = (qwen3 / "config.json").read_text().rstrip().removesuffix("}")
    (qwen3 / "config.json").write_text(f'{text}, "extra": {inner}}}')
    _assert_refused(qwen3, r"config\.json: (nested deeper than 100 levels|broken JSON: maximum)")


def test_links_in_a_circle_are_named(qwen3, tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    (qwen3 / "model.safetensors").unlink()
    (qwen3 / "model.safetensors").symlink_to("model.safetensors")
    _assert_refused(qwen3, r"model\.safetensors is a link to .*, which is missing")
    for path in (tmp_path / "circle", tmp_path / "circle" / "out"):
        with pytest.raises(ConversionError, match="circle"):
            hf_to_megatron(qwen3, path)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 5000])
def test_a_shard_that_no_file_can_be_is_named(make_qwen3, name):
    folder = make_qwen3(shard_size="100KB")
    _index(lambda m: m.update(dict.fromkeys(m, f"{name}.safetensors")))(folder)
    _assert_refused(folder, r"no file can have this name|File name too long")


@pytest.mark.parametrize("shard", ["config.json", INDEX, ".hidden.safetensors", "..", ""])
def test_a_shard_that_is_something_else_is_refused(make_qwen3, tmp_path, shard):
    """As a template's, it would be written in the place of that file."""
    folder = make_qwen3(shard_size="100KB")
    hf_to_megatron(folder, tmp_path / "megatron")
    _index(lambda m: m.update({Q_PROJ: shard}))(folder)
    for convert in (
        lambda: hf_to_megatron(folder, tmp_path / "out"),
        lambda: megatron_to_hf(tmp_path / "megatron", folder, tmp_path / "out"),
    ):
        with pytest.raises(ConversionError, match=f"{INDEX}: .* is put in"):
            convert()


@pytest.mark.parametrize("count", [1000, 60_000])
def test_a_name_that_occurs_twice_is_found_in_one_pass(count):
    text = ",".join(f'"k{i}":1' for i in (*range(count), count - 1))
    with (
        Steps(hf_folder) as steps,
        pytest.raises(ConversionError, match=f"header: 'k{count - 1}' occurs twice"),
    ):
        parse_json_object(f"{{{text}}}".encode(), "header")
    assert steps.count < 5 * count + 100


@pytest.mark.parametrize("shape", [[1] * 100_000, [2**62] * 60, [2**63], [-1], [True], [1.0]])
def test_shapes_that_no_tensor_has_are_refused(qwen3, shape):
    file = qwen3 / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[Q_PROJ]["shape"] = shape
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    _assert_refused(
        qwen3, rf"{Q_PROJ} (has a malformed header entry|\(F32 .* has wrong data offsets)"
    )


def test_mixed_dtypes_are_accepted_with_a_choice(qwen3, tmp_path):
    _tensors(lambda t: t.update({Q_PROJ: t[Q_PROJ].bfloat16()}))(qwen3)
    hf_to_megatron(qwen3, tmp_path / "out", dtype="fp32")


def test_values_beyond_the_dtype_are_refused(qwen3):
    _tensors(lambda t: t[Q_PROJ][0].fill_(1e5))(qwen3)
    before = sorted(qwen3.parent.rglob("*"))
    with pytest.raises(
        ConversionError, match=rf"model.safetensors: {Q_PROJ} holds 100000, .*--dtype"
    ):
        hf_to_megatron(qwen3, qwen3.parent / "out", dtype="fp16")
    assert sorted(qwen3.parent.rglob("*")) == before


def test_an_unknown_dtype_is_refused(qwen3, tmp_path):
    with pytest.raises(ConversionError, match="'fp8' is not one of source, fp32, bf16, fp16"):
        hf_to_megatron(qwen3, tmp_path / "out", dtype="fp8")


def test_the_command_prints_the_error_and_exits_with_2(qwen3, tmp_path, run_command):
    (qwen3 / "config.json").unlink()
    result = run_command("hf_to_megatron", "--hf", qwen3, "--out", tmp_path / "out")
    assert (result.code, result.out) == (2, "")
    assert result.err == f"error: {qwen3 / 'config.json'}: missing\n"


def test_an_output_that_is_a_file_is_refused(qwen3, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ConversionError, match="out is a file"):
        hf_to_megatron(qwen3, tmp_path / "out", overwrite=True)


def _full_after(monkeypatch, calls):
    """The disk is full at that write."""
    write = os.pwrite

    def pwrite(*arguments):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("calls", [0, 2])
def test_a_disk_that_fills_up_is_named_and_nothing_is_left(qwen3, tmp_path, monkeypatch, calls):
    hf_to_megatron(qwen3, tmp_path / "megatron")
    before = sorted(tmp_path.rglob("*"))
    full = "No space left on device while writing; make room"
    with monkeypatch.context() as patch:
        _full_after(patch, calls)
        with pytest.raises(ConversionError, match=rf"release/__0_\d\.distcp: {full}"):
            hf_to_megatron(qwen3, tmp_path / "out")
    with monkeypatch.context() as patch:
        _full_after(patch, calls)
        with pytest.raises(ConversionError, match=rf"model\.safetensors: {full}"):
            megatron_to_hf(tmp_path / "megatron", qwen3, tmp_path / "back")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_in_the_place_of_a_small_file_is_named(tmp_path):
    (tmp_path / "notes").mkdir()
    with pytest.raises(ConversionError, match=r"notes is a (folder|directory); name a file"):
        write_file(tmp_path / "notes", b"")


def test_an_error_of_the_disk_in_the_flush_is_named(qwen3, tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ConversionError, match=r"distcp: Input/output error while writing"):
        hf_to_megatron(qwen3, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [qwen3]


def test_a_place_that_cannot_hold_the_output_is_named(qwen3, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="file is a file; choose another folder"):
        hf_to_megatron(qwen3, tmp_path / "file" / "deep" / "out")
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: path.name == "out")
        with pytest.raises(ConversionError, match=r"out is a mount point.*give a folder in it"):
            hf_to_megatron(qwen3, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(ConversionError, match="is not writable; choose another folder"):
            hf_to_megatron(qwen3, tmp_path / "out")


def test_a_file_that_cannot_be_read_is_named(qwen3, tmp_path, monkeypatch):
    def preadv(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(
        ConversionError, match=r"model\.safetensors: Input/output error while reading"
    ):
        hf_to_megatron(qwen3, tmp_path / "out")
