"""Megatron -> HuggingFace: round trips, foreign chunk grids, and the files beside the weights."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conversion_helpers import VOCABULARY, expected_megatron, read_hf, write_config
from hostile_files import Steps
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from checkpoint_conversion.errors import ConversionError
from checkpoint_conversion.hf.folder import WEIGHTS
from checkpoint_conversion.hf_to_megatron import hf_to_megatron
from checkpoint_conversion.megatron_to_hf import megatron_to_hf, plan_export
from checkpoint_conversion.torch_dist import reader as megatron_reader
from checkpoint_conversion.torch_dist.metadata import Place, Saved


class _GridPlanner(dcp.DefaultSavePlanner):
    """Saves each tensor in a grid of chunks, as the ranks of a parallel run would."""

    def __init__(self, step):
        super().__init__()
        self._step = step

    def create_local_plan(self):
        plan = super().create_local_plan()
        items = [part for item in plan.items for part in self._cut(item)]
        self.plan = self._cached = dcp.SavePlan(items, planner_data=plan.planner_data)
        return self.plan

    def _cut(self, item):
        if item.type == WriteItemType.BYTE_IO:
            return [item]
        size = item.tensor_data.size
        step = self._step(item.index.fqn, size) if len(size) > 1 else size
        counts = [math.ceil(length / width) for length, width in zip(size, step, strict=True)]
        items = []
        for position in torch.cartesian_prod(*map(torch.arange, counts)).view(-1, len(size)):
            offsets = [int(p) * width for p, width in zip(position, step, strict=True)]
            sizes = [
                min(width, length - offset)
                for width, length, offset in zip(step, size, offsets, strict=True)
            ]
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            data = TensorWriteData(chunk, item.tensor_data.properties, size)
            index = MetadataIndex(item.index.fqn, offsets, len(items))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return items

    def resolve_data(self, write_item):
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        chunk = write_item.tensor_data.chunk
        part = self.state_dict[write_item.index.fqn]
        for axis, (offset, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            part = part.narrow(axis, offset, length)
        return part.contiguous()


def save_run(folder, tensors, iteration=7, step=lambda _key, size: size):
    """A save folder as a training run leaves it, written without the converter."""
    checkpoint = folder / f"iter_{iteration:07d}"
    dcp.save(
        dict(tensors),
        storage_writer=dcp.FileSystemWriter(checkpoint, single_file_per_rank=False),
        planner=_GridPlanner(step),
        no_dist=True,
    )
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return checkpoint


def trained(hf, tied=False):
    """Tensors of a run that padded the vocabulary and kept its optimizer."""
    tensors = expected_megatron(read_hf(hf), tied)
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if key in tensors:
            tensors[key] = torch.cat([tensors[key], torch.full((5, 64), 7.0)])
    state = "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight"
    bucket = "chained_0.optimizer.distributed.dp_group_idx_0.param"
    return {**tensors, state: torch.randn(3, 192, 64), bucket: torch.randn(1000)}


def assert_same_tensors(one, other):
    one, other = read_hf(one), read_hf(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_size", ["1GB", "100KB"])
def test_round_trip_gives_the_same_files(make_qwen3, tmp_path, tied, dtype, shard_size):
    hf = make_qwen3(tied=tied, dtype=dtype, shard_size=shard_size)
    hf_to_megatron(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back")
    written = {file.name for file in (tmp_path / "back").iterdir()}
    assert written == {".checkpoint_conversion.json", *(file.name for file in hf.iterdir())}
    for file in hf.iterdir():
        copy = tmp_path / "back" / file.name
        if file.name == "model.safetensors.index.json":
            maps = [json.loads(f.read_text())["weight_map"] for f in (file, copy)]
            assert maps[0] == maps[1]
        elif file.name == "config.json":
            config = json.loads(file.read_text())
            older = {"rope_theta": config["rope_parameters"]["rope_theta"]}
            assert json.loads(copy.read_text()) == config | older
        else:
            assert file.read_bytes() == copy.read_bytes(), file.name


def _halves(key, size):
    return [1, *(length // 2 for length in size[1:])] if "layers" in key else [128, size[1]]


GRIDS = {
    "whole tensors": lambda _, size: size,
    "one layer": lambda key, size: [1, *size[1:]] if "layers" in key else size,
    "halves of a layer": _halves,
    "across layers": lambda _, size: [(length + 1) // 2 for length in size],
    "columns": lambda _, size: [*size[:-1], size[-1] // 4],
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("tied", [False, True])
def test_any_chunk_grid_with_padding_and_optimizer(make_qwen3, tmp_path, grid, tied):
    hf = make_qwen3(tied=tied)
    save_run(tmp_path / "run", trained(hf, tied), step=GRIDS[grid])
    megatron_to_hf(tmp_path / "run", hf, tmp_path / "back")
    assert_same_tensors(hf, tmp_path / "back")


def test_a_template_of_several_dtypes_in_one_megatron_tensor(make_qwen3, tmp_path):
    """Some programs save in fp32 what they trained, for example the keys and not the queries."""
    hf = make_qwen3(dtype=torch.bfloat16)
    tensors = load_file(hf / WEIGHTS)
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.2.mlp.gate_proj.weight"):
        tensors[name] = tensors[name].float()
    save_file(tensors, hf / WEIGHTS, metadata={"format": "pt"})
    hf_to_megatron(hf, tmp_path / "megatron", dtype="bf16")
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back")
    assert_same_tensors(hf, tmp_path / "back")


def test_transformers_reads_the_result(make_qwen3, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = make_qwen3(shard_size="100KB")
    save_run(tmp_path / "run", trained(hf))
    megatron_to_hf(tmp_path / "run", hf, tmp_path / "back", max_shard_size="200KB")
    tokens = torch.randint(VOCABULARY, (2, 11))
    one, other = (AutoModelForCausalLM.from_pretrained(f) for f in (hf, tmp_path / "back"))
    assert torch.equal(one(tokens).logits, other(tokens).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer("one three")["input_ids"] == [2, 4]
    assert tokenizer.chat_template == "{{ bos }}"


def test_iterations(make_qwen3, tmp_path):
    first, second, run = make_qwen3("a"), make_qwen3("bb"), tmp_path / "run"
    hf_to_megatron(first, run)
    save_run(run, trained(second), iteration=20)
    for iteration, expected in ((None, second), (20, second), ("20", second), ("release", first)):
        megatron_to_hf(run, first, tmp_path / "out", iteration=iteration, overwrite=True)
        assert_same_tensors(expected, tmp_path / "out")
    megatron_to_hf(run / "iter_0000020", first, tmp_path / "out", overwrite=True)
    assert_same_tensors(second, tmp_path / "out")
    with pytest.raises(ConversionError, match=r"iter_0000003.*iter_0000020, release"):
        megatron_to_hf(run, first, tmp_path / "none", iteration=3)


def test_a_part_of_the_language_model_that_is_null_is_none(qwen3, tmp_path):
    save_run(tmp_path / "run", trained(qwen3))
    write_config(qwen3, lambda config: config.update(text_config=None))
    megatron_to_hf(tmp_path / "run", qwen3, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["text_config"] is None
    write_config(qwen3, lambda config: config.update(text_config=5))
    with pytest.raises(ConversionError, match="text_config='5'; an object is needed"):
        megatron_to_hf(tmp_path / "run", qwen3, tmp_path / "again")


@pytest.mark.parametrize("old_style", [False, True])
def test_the_configuration_names_the_written_dtype(make_qwen3, tmp_path, old_style):
    hf = make_qwen3(old_style=old_style)
    save_run(tmp_path / "run", trained(hf))
    megatron_to_hf(tmp_path / "run", hf, tmp_path / "back", dtype="bf16")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    original = json.loads((hf / "config.json").read_text())
    key = "torch_dtype" if old_style else "dtype"
    assert config == {**original, "rope_theta": 500000.0, key: "bfloat16"}
    for name, tensor in read_hf(hf).items():
        assert torch.equal(read_hf(tmp_path / "back")[name], tensor.bfloat16()), name


def test_shards_have_the_size_asked_for(qwen3, tmp_path):
    save_run(tmp_path / "run", trained(qwen3))
    megatron_to_hf(tmp_path / "run", qwen3, tmp_path / "back", max_shard_size="150KB")
    shards = sorted((tmp_path / "back").glob("model-*.safetensors"))
    assert len(shards) > 5
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 778240
    for shard in shards:
        with safe_open(shard, "pt") as content:
            assert content.metadata() == {"format": "pt"}
            assert {index["weight_map"][name] for name in content.keys()} == {shard.name}  # noqa: SIM118
        assert shard.stat().st_size < 160_000
    assert_same_tensors(qwen3, tmp_path / "back")


def test_every_artifact_is_copied_but_weights_code_hidden_files_data_and_the_model_card(
    qwen3, tmp_path
):
    kept = ["vocab.json", "merges.txt", "special_tokens_map.json", "LICENSE", "NOTICE", "x.model"]
    dropped = ["modeling.py", "pytorch_model.bin", "original.pth", ".gitattributes", "q4.gguf"]
    dropped += ["README.md", "readme_zh.md", "eval_results.json", "trainer_state.json"]
    dropped += ["train.jsonl", "mergekit_config.yml"]
    for name in kept + dropped:
        (qwen3 / name).write_text(name)
    (qwen3 / "additional_chat_templates").mkdir()
    (qwen3 / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (qwen3 / "figures").mkdir()
    save_run(tmp_path / "run", trained(qwen3))
    megatron_to_hf(tmp_path / "run", qwen3, tmp_path / "back")
    for name in (*kept, "additional_chat_templates/tools.jinja", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (qwen3 / name).read_bytes()
    for name in (*dropped, "figures"):
        assert not (tmp_path / "back" / name).exists()
    megatron_to_hf(tmp_path / "run", qwen3, tmp_path / "back", overwrite=True)


def test_overwrite_replaces_only_what_the_command_wrote(qwen3, tmp_path):
    save_run(tmp_path / "run", trained(qwen3))
    download, back, other = tmp_path / "download", tmp_path / "back", tmp_path / "other"
    shutil.copytree(qwen3, download)

    def refused(out, reason):
        before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
        with pytest.raises(ConversionError, match=reason):
            megatron_to_hf(tmp_path / "run", qwen3, out, overwrite=True)
        assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}

    refused(download, r"it has no \.checkpoint_conversion\.json")
    hf_to_megatron(qwen3, other)
    refused(other, "hf_to_megatron wrote it")
    megatron_to_hf(tmp_path / "run", qwen3, back)
    megatron_to_hf(tmp_path / "run", qwen3, back, overwrite=True)
    (back / "notes").mkdir()
    refused(back, "it holds notes")
    (back / "notes").rmdir()
    (back / "config.json").write_text("{}")
    refused(back, r"its config\.json was changed")
    (back / ".checkpoint_conversion.json").write_text("[]")
    refused(back, r"its \.checkpoint_conversion\.json was changed")


def test_the_mark_of_an_output_is_not_copied_from_a_template(qwen3, tmp_path):
    save_run(tmp_path / "run", trained(qwen3))
    megatron_to_hf(tmp_path / "run", qwen3, tmp_path / "back")
    megatron_to_hf(tmp_path / "run", tmp_path / "back", tmp_path / "again", max_shard_size="150KB")
    mark = json.loads((tmp_path / "again" / ".checkpoint_conversion.json").read_text())
    files = {file for file in (tmp_path / "again").iterdir() if not file.name.startswith(".")}
    assert mark["sizes"] == {file.name: file.stat().st_size for file in files}


def test_a_template_needs_no_weights(qwen3, tmp_path):
    save_run(tmp_path / "run", trained(qwen3))
    template = tmp_path / "template"
    shutil.copytree(qwen3, template, ignore=shutil.ignore_patterns("*.safetensors"))
    megatron_to_hf(tmp_path / "run", template, tmp_path / "back")
    assert_same_tensors(qwen3, tmp_path / "back")


def test_links_of_the_hub_cache_are_followed_and_others_refused(qwen3, tmp_path):
    save_run(tmp_path / "run", trained(qwen3))
    snapshot, blobs = tmp_path / "models--q" / "snapshots" / "abc", tmp_path / "models--q" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(qwen3.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    megatron_to_hf(tmp_path / "run", snapshot, tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    assert not (tmp_path / "back" / "tokenizer.json").is_symlink()

    secret = tmp_path / "secret"
    secret.write_text("secret")
    (qwen3 / "notes.txt").symlink_to(secret)
    with pytest.raises(ConversionError, match=r"notes\.txt is a link to .*secret, outside"):
        megatron_to_hf(tmp_path / "run", qwen3, tmp_path / "other")
    secret.unlink()
    with pytest.raises(ConversionError, match=r"notes\.txt is a link to .*missing; download"):
        megatron_to_hf(tmp_path / "run", qwen3, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def _drop(key):
    return lambda tensors: tensors.pop(key)


def _put(key, shape, dtype=torch.float32):
    return lambda tensors: tensors.update({key: torch.ones(shape, dtype=dtype)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("decoder.final_layernorm.weight"), r"no tensor decoder\.final_layernorm\.weight"),
        (
            _put("decoder.layers.mlp.linear_fc1.bias", (3, 192)),
            r"linear_fc1\.bias \[3, 192\] has no",
        ),
        (
            _put("decoder.layers.mlp.linear_fc2.weight", (4, 64, 96)),
            r"\[4, 64, 96\]; .*\[3, 64, 96\]",
        ),
        (_put("embedding.word_embeddings.weight", (500, 64)), r"\[500, 64\]; .*\[507, 64\]"),
        (_put("output_layer.weight", (507, 64), torch.float64), "float64"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(qwen3, tmp_path, change, message):
    tensors = trained(qwen3)
    change(tensors)
    save_run(tmp_path / "run", tensors)
    with pytest.raises(ConversionError, match=message):
        megatron_to_hf(tmp_path / "run", qwen3, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_an_untied_checkpoint_does_not_fit_a_tied_template(make_qwen3, tmp_path):
    save_run(tmp_path / "run", trained(make_qwen3("untied")))
    with pytest.raises(ConversionError, match=r"output_layer\.weight .* has no place"):
        megatron_to_hf(tmp_path / "run", make_qwen3("tied", tied=True), tmp_path / "back")


def _largest_file(checkpoint):
    return max(checkpoint.glob("*.distcp"), key=lambda file: file.stat().st_size)


def _truncate(checkpoint):
    file = _largest_file(checkpoint)
    file.write_bytes(file.read_bytes()[:-100])


def _corrupt(checkpoint):
    file = _largest_file(checkpoint)
    file.write_bytes(bytes(file.stat().st_size))


def _flip(checkpoint):
    """One bit in the middle of the largest tensor."""
    file = _largest_file(checkpoint)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _flip_padding(checkpoint):
    """One bit in the rows that pad the vocabulary, which are not converted."""
    rows = torch.full((64,), 7.0).numpy().tobytes()
    (file,) = [file for file in checkpoint.glob("*.distcp") if rows in file.read_bytes()]
    data = bytearray(file.read_bytes())
    data[data.index(rows) + 5] ^= 1
    file.write_bytes(data)


def _double(checkpoint):
    """A chunk in the place of another one."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata()
    chunks = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks
    chunks[1] = chunks[0]
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


class _Evil:
    def __reduce__(self):
        return print, ("code of the checkpoint ran",)


BROKEN = {
    "no tracker": (lambda c: (c.parent / "latest_checkpointed_iteration.txt").unlink(), "neither"),
    "bad tracker": (
        lambda c: (c.parent / "latest_checkpointed_iteration.txt").write_text("soon"),
        "iteration 'soon'",
    ),
    "no iteration": (shutil.rmtree, "no such checkpoint"),
    "no metadata": (lambda c: (c / ".metadata").unlink(), r"\.metadata: missing"),
    "other metadata": (lambda c: (c / ".metadata").write_bytes(b"no"), r"\.metadata: not readable"),
    "code in metadata": (
        lambda c: (c / ".metadata").write_bytes(pickle.dumps(_Evil())),
        r"\.metadata: not readable: it refers to builtins\.print, which has no place in it",
    ),
    "no metadata.json": (lambda c: (c / "metadata.json").unlink(), r"metadata\.json: missing"),
    "other format": (
        lambda c: (c / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "'zarr'",
    ),
    "missing file": (
        lambda c: _largest_file(c).unlink(),
        r"distcp: missing, or no regular file; .* is in it",
    ),
    "truncated file": (_truncate, r"distcp: truncated"),
    "broken file": (_corrupt, "cannot read"),
    "flipped bit": (
        _flip,
        r"distcp: embedding.word_embeddings.weight is corrupt: the checksum",
    ),
    "flipped bit in the padding": (_flip_padding, r"word_embeddings.weight is corrupt"),
    "part stored twice": (_double, r"two chunks of .*linear_fc2.weight hold the same rows, from 0"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused(make_qwen3, tmp_path, capsys, case):
    qwen3 = make_qwen3(tied=True)
    breaks, message = BROKEN[case]
    breaks(save_run(tmp_path / "run", trained(qwen3, tied=True), step=GRIDS["one layer"]))
    with pytest.raises(ConversionError, match=message):
        megatron_to_hf(tmp_path / "run", qwen3, tmp_path / "back")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hf", "run"]
    assert "code of the checkpoint ran" not in capsys.readouterr().out


def test_a_checkpoint_without_checksums(qwen3, tmp_path):
    """torch writes 0 in their place when it is told to make none."""
    torch.serialization.set_crc32_options(False)
    try:
        save_run(tmp_path / "run", trained(qwen3), step=GRIDS["columns"])
    finally:
        torch.serialization.set_crc32_options(True)
    megatron_to_hf(tmp_path / "run", qwen3, tmp_path / "back")
    assert_same_tensors(qwen3, tmp_path / "back")


def test_values_beyond_the_dtype_are_refused(qwen3, tmp_path):
    tensors = trained(qwen3)
    tensors["decoder.final_layernorm.weight"][5] = 1e5
    save_run(tmp_path / "run", tensors)
    with pytest.raises(ConversionError, match=r"100000.*float16"):
        megatron_to_hf(tmp_path / "run", qwen3, tmp_path / "back", dtype="fp16")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hf", "run"]


def test_command(qwen3, tmp_path, run_command):
    save_run(tmp_path / "run", trained(qwen3))
    arguments = ("--megatron", tmp_path / "run", "--hf-template", qwen3, "--out", tmp_path / "back")
    result = run_command("megatron_to_hf", *arguments)
    assert result.code == 0
    assert "36/36 tensors" in result.err
    assert "iter_0000007" in result.out
    assert "left out: 5 rows that pad the vocabulary" in result.out
    assert str(tmp_path / "back") in result.out
    again = run_command("megatron_to_hf", *arguments)
    assert again.code == 2
    assert "--overwrite" in again.err
    wrong = run_command("megatron_to_hf", *arguments, "--overwrite", "--max-shard-size", "much")
    assert wrong.code == 2
    assert "'much'" in wrong.err


def test_the_template_decides_what_fits(make_qwen3, tmp_path):
    hf = make_qwen3()
    save_run(tmp_path / "run", trained(hf))
    write_config(hf, lambda config: config.update(num_hidden_layers=2))
    with pytest.raises(ConversionError, match=r"config\.json calls for \[2, "):
        megatron_to_hf(tmp_path / "run", hf, tmp_path / "back")


def _chunked(folder, key, shape, chunks):
    """Describe a tensor by other chunks in `.metadata`; they all lie where the first one does."""
    metadata = FileSystemReader(folder).read_metadata()
    entry = metadata.state_dict_metadata[key]
    first = next(info for index, info in metadata.storage_data.items() if index.fqn == key)
    for index in [index for index in metadata.storage_data if index.fqn == key]:
        del metadata.storage_data[index]
    entry.size, entry.chunks = torch.Size(shape), []
    for offsets, sizes in chunks:
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        metadata.storage_data[MetadataIndex(key, torch.Size(offsets))] = first
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


CHUNKS = {
    "chunks that lie outside of it": (
        [((0, 0, 0), (3, 64, 97))],
        "a chunk of .* lies outside of it",
    ),
    "empty chunks with many layers": ([((0, 0, 0), (10**12, 0, 96))], "lies outside of it"),
    "a negative size": ([((0, 0, 0), (-1, 64, 96))], "not readable"),
    "missing chunks": ([((0, 0, 0), (3, 32, 96))], "do not cover it"),
}


@pytest.mark.parametrize("case", CHUNKS)
def test_chunks_that_cannot_be_are_refused(qwen3, tmp_path, case):
    chunks, message = CHUNKS[case]
    run = save_run(tmp_path / "run", trained(qwen3))
    _chunked(run, "decoder.layers.mlp.linear_fc2.weight", (3, 64, 96), chunks)
    with pytest.raises(ConversionError, match=message):
        plan_export(tmp_path / "run", qwen3)


def test_chunks_next_to_each_other_are_compared_in_bounded_work(tmp_path, monkeypatch):
    """Columns of one element: each of them has all rows, and is compared with all others."""
    monkeypatch.setattr(megatron_reader, "_MOST_SIDE_BY_SIDE", 16)
    saved = [Saved((0, 0, i), (1, 4, 1), Place(Path("x"), 0, 0)) for i in range(400)]
    megatron_reader._check_disjoint(tmp_path, "key", saved[:32], 1)
    with (
        Steps(megatron_reader) as steps,
        pytest.raises(ConversionError, match="more than 16 chunks with the same rows"),
    ):
        megatron_reader._check_disjoint(tmp_path, "key", saved, 1)
    assert steps.count < 20 * 16 * len(saved)
