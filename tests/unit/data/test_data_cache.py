"""The cache: prepared once, found again by content, whole or not there, shared by processes."""

import functools
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_profit.data import DataError, DataSource, Preparation, SupervisionPolicy
from megatron_profit.data.files import records
from megatron_profit.data.store import cache, tasks
from megatron_profit.data.store.checksums import machine_name

ROWS = [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(400)]


@pytest.fixture(scope="module")
def tokenizer(small_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    small_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def sources(write_lines):
    return [DataSource(str(write_lines([*ROWS, {"messages": []}])))]


@pytest.fixture
def prepared(tokenizer, sources, tmp_path):
    """prepared(**what differs): from the cache in tmp_path."""

    def run(sources=sources, preparation=None, folder=tmp_path / "cache", **options):
        preparation = preparation or Preparation(64)
        return cache.load_or_build(sources, tokenizer, preparation, folder, **options)

    return run


def folders(tmp_path):
    return sorted(path.parent.name for path in (tmp_path / "cache").glob(f"*/{cache.ABOUT}"))


def same(left, right):
    names = ("ids", "supervised", "offsets")
    return all(
        np.array_equal(getattr(left.examples, name), getattr(right.examples, name))
        for name in names
    ) and all(
        np.array_equal(getattr(left, name), getattr(right, name))
        for name in ("sources", "files", "numbers", "digests")
    )


def test_data_are_prepared_once_and_mapped(prepared, small_tokenizer, monkeypatch):
    first = prepared()
    assert isinstance(first.examples.ids, np.memmap)
    assert first.report.kept == 400
    assert first.numbers.tolist() == list(range(1, 401))
    monkeypatch.setattr(cache, "_fill", None)
    second = prepared()
    assert same(first, second)
    assert second.report == first.report
    assert second.report.turn_end_id == small_tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_records_are_named_by_the_file_of_a_folder_and_the_line(prepared, write_lines, tmp_path):
    (tmp_path / "data").mkdir()
    write_lines([{"messages": []}, *ROWS[:2]], "data/a.jsonl")
    write_lines(ROWS[:1], "data/b.jsonl")
    alone = write_lines(ROWS[:1], "alone.jsonl")
    found = prepared([DataSource(str(tmp_path / "data")), DataSource(str(alone))])
    assert [found.name(i) for i in range(4)] == [
        "a.jsonl:2",
        "a.jsonl:3",
        "b.jsonl:1",
        "alone.jsonl:1",
    ]
    assert found.sources.tolist() == [0, 0, 0, 1]
    (tmp_path / "data").rename(tmp_path / "moved")
    (tmp_path / "moved" / "b.jsonl").rename(tmp_path / "b.jsonl")
    write_lines(ROWS[:1], "moved/b.jsonl")
    twice = prepared([DataSource(str(tmp_path / "moved")), DataSource(str(tmp_path / "b.jsonl"))])
    same_name = [twice.name(i) for i in (2, 3)]
    assert same_name == ["moved/b.jsonl:1", f"{tmp_path.name}/b.jsonl:1"]


def test_a_folder_of_which_one_split_is_read_is_told_each_time(prepared, write_lines, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_lines(ROWS[:2], "data/train.jsonl")
    write_lines(ROWS, "data/test.jsonl")
    for _ in range(2):
        told = []
        found = prepared([DataSource(str(folder))], progress=told.append)
        assert found.report.read == 2
        assert told[0] == f"{folder}: only the split train is read, not ['test.jsonl']"


def test_whatever_changes_the_result_is_prepared_anew(prepared, sources, tokenizer, tmp_path):
    prepared()
    file = Path(sources[0].path)
    for number, changed in enumerate(
        [
            {"preparation": Preparation(32)},
            {"preparation": Preparation(64, "drop")},
            {"preparation": Preparation(64, training=SupervisionPolicy("last"))},
            {"preparation": Preparation(64, training=SupervisionPolicy(think=False))},
            {"sources": [*sources, *sources]},
        ],
        start=2,
    ):
        prepared(**changed)
        assert len(folders(tmp_path)) == number
    os.utime(file)
    prepared()
    assert len(folders(tmp_path)) == 6, "the content counts"
    file.write_text(file.read_text().replace("answer 7", "answer 8"))
    prepared()
    assert len(folders(tmp_path)) == 7
    about = json.loads((tmp_path / "cache" / folders(tmp_path)[0] / cache.ABOUT).read_text())
    assert about["report"]["read"] in (401, 802)


def test_several_processes_give_the_same_examples(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "CHUNK_RECORDS", 50)
    alone = prepared()
    together = prepared(folder=tmp_path / "other", workers=2)
    assert same(alone, together)
    assert alone.report == together.report


def test_a_broken_line_goes_to_another_process(prepared, sources, tmp_path):
    with Path(sources[0].path).open("a") as file:
        file.write("not JSON\n")
    skipped = [
        prepared(folder=tmp_path / str(workers), workers=workers).report.skipped
        for workers in (1, 2)
    ]
    assert skipped[0] == skipped[1]
    assert records.NOT_JSON in skipped[0]


def test_deep_records_are_left_out_however_many_processes_there_are(
    prepared, write_lines, tmp_path
):
    deep = [functools.reduce(lambda inner, _: {"x": inner}, range(n), ROWS[0]) for n in (198, 900)]
    sources = [DataSource(str(write_lines([ROWS[0], *({**ROWS[1], "x": x} for x in deep)])))]
    for workers in (1, 2):
        report = prepared(sources, folder=tmp_path / str(workers), workers=workers).report
        assert report.kept == 2
        assert list(report.skipped) == [records.TOO_DEEP]


def _prepare_and_count(log, arguments, barrier):
    fill = cache._fill

    def counting(*args):
        with log.open("a") as file:
            file.write("filled\n")
        fill(*args)

    cache._fill = counting
    barrier.wait()
    kept = cache.load_or_build(*arguments).report.kept
    with log.open("a") as file:
        file.write(f"{kept}\n")


def test_two_jobs_share_the_work(sources, tokenizer, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, log = context.Barrier(3), tmp_path / "log"
    arguments = (sources, tokenizer, Preparation(64), tmp_path / "cache")
    jobs = [
        context.Process(target=_prepare_and_count, args=(log, arguments, barrier)) for _ in range(3)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert sorted(log.read_text().split()) == ["400", "400", "400", "filled"]
    left = [path.name for path in (tmp_path / "cache").iterdir()]
    assert sorted(left) == sorted([*folders(tmp_path), "files"]), "no lock, nothing half made"


def test_others_wait_for_the_leader(prepared, tmp_path):
    context, log = multiprocessing.get_context("fork"), tmp_path / "log"
    follower = context.Process(
        target=lambda: log.write_text(str(prepared(leader=False).report.kept))
    )
    follower.start()
    time.sleep(0.5)
    assert follower.is_alive()
    prepared()
    follower.join(60)
    assert log.read_text() == "400"


def _begin_and_die(folder):
    """Begin to prepare data, as a process that is killed."""
    with cache._lock(folder):
        folder.with_suffix(f".tmp-{machine_name()}-1").mkdir()
        os._exit(1)


def _dead_process(folder):
    context = multiprocessing.get_context("fork")
    holder = context.Process(target=_begin_and_die, args=(folder,))
    holder.start()
    holder.join()
    assert folder.with_suffix(".lock").exists()


def test_the_lock_and_the_remains_of_a_dead_process_are_taken_over_at_once(tmp_path):
    folder, others = tmp_path / "a", tmp_path / "b"
    for dead in (folder, others):
        _dead_process(dead)
    told = []
    with cache._lock(folder, told.append) as is_locked:
        assert is_locked
        assert folder.with_suffix(".lock").exists()
        cache._remove_left_overs(folder)
    assert list(tmp_path.iterdir()) == []
    assert told == []


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    folder, others = tmp_path / "a", tmp_path / "b"
    elsewhere = tmp_path / "c.tmp-another_machine-1"
    own = others.with_suffix(f".tmp-{machine_name()}-1")
    context = multiprocessing.get_context("fork")
    begun, ended = context.Event(), context.Event()

    def live():
        with cache._lock(others):
            own.mkdir()
            begun.set()
            ended.wait(60)

    living = context.Process(target=live)
    living.start()
    assert begun.wait(60)
    elsewhere.mkdir()
    (elsewhere / "tokens.bin").touch()
    with cache._lock(folder):
        cache._remove_left_overs(folder)
        assert own.exists()
        assert elsewhere.exists(), "it may be locked where this machine does not see it"
        past = time.time() - 2 * cache.STALE_SECONDS
        for path in (elsewhere / "tokens.bin", elsewhere):
            os.utime(path, (past, past))
        cache._remove_left_overs(folder)
        assert not elsewhere.exists()
    ended.set()
    living.join()


def test_a_process_whose_files_another_machine_has_removed_starts_again(
    prepared, tmp_path, monkeypatch
):
    write, calls = cache.write, []

    def cleaned_up(chunks, report, folder, about):
        write(chunks, report, folder, about)
        calls.append(folder)
        if len(calls) == 1:
            shutil.rmtree(folder)

    monkeypatch.setattr(cache, "write", cleaned_up)
    assert prepared().report.kept == 400
    assert len(calls) == 2


def test_only_the_files_of_the_tokenizer_tell_it_from_another(tokenizer):
    before = cache.tokenizer_files(tokenizer)
    for name in ("config.json", "trainer_state.json", "LICENSE.txt", "model.bin.index.json"):
        (tokenizer / name).write_text("{}")
    assert cache.tokenizer_files(tokenizer) == before
    for name in ("special_tokens_map.json", "vocab.txt", "merges.txt", "spiece.model", "a.jinja"):
        (tokenizer / name).write_text("{}")
        names = [file for file, _ in cache.tokenizer_files(tokenizer)]
        assert name in names


def test_the_tokenizers_other_templates_and_our_code_count(
    prepared, sources, tokenizer, tmp_path, monkeypatch
):
    prepared()
    copy = tmp_path / "tokenizer"
    shutil.copytree(tokenizer, copy)
    cache.load_or_build(sources, copy, Preparation(64), tmp_path / "cache")
    assert len(folders(tmp_path)) == 1
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    cache.load_or_build(sources, copy, Preparation(64), tmp_path / "cache")
    assert len(folders(tmp_path)) == 2
    monkeypatch.setattr(cache, "_code", lambda: "another version")
    prepared()
    assert len(folders(tmp_path)) == 3


def test_a_change_of_any_code_of_the_data_is_another_version(tmp_path):
    """How a record is read, rendered and masked decides the ids as much as how they are written."""
    package = tmp_path / "data"
    shutil.copytree(Path(cache.__file__).parents[1], package)
    assert cache._hash_code(package) == cache._code()
    found = {cache._code()}
    for name in ("chat/masks.py", "render/renderer.py", "files/fields.py", "store/prepare.py"):
        (package / name).write_text((package / name).read_text() + "# changed\n")
        found.add(cache._hash_code(package))
    (package / "files" / "fields.py").rename(package / "chat" / "fields.py")
    found.add(cache._hash_code(package))
    assert len(found) == 6


def test_the_same_files_under_another_path_are_not_prepared_again(
    prepared, sources, tmp_path, monkeypatch
):
    first = prepared()
    (tmp_path / "mount").mkdir()
    other = tmp_path / "mount" / "data.jsonl"
    shutil.copy(sources[0].path, other)
    moved = prepared([DataSource(str(other))])
    assert len(folders(tmp_path)) == 1
    (there,), (here,) = (list(found.report.skipped.values()) for found in (first, moved))
    assert there.places == [f"{sources[0].path}, line 401"]
    assert here.places == [f"{other}, line 401"]
    monkeypatch.chdir(tmp_path)
    relative = prepared([DataSource("data.jsonl")])
    assert len(folders(tmp_path)) == 1
    assert next(iter(relative.report.skipped.values())).places == ["data.jsonl, line 401"]


def test_a_data_file_that_cannot_be_read_is_named(prepared, sources, monkeypatch):
    opened = Path.open

    def refusing(self, *args, **options):
        if str(self) == sources[0].path:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(DataError, match=r"data\.jsonl: cannot be read") as found:
        prepared()
    assert "--data-cache" not in str(found.value)


def test_a_failure_leaves_nothing_behind(prepared, tmp_path, write_lines):
    broken = write_lines([{"messages": []}] * 3, "broken.jsonl")
    with pytest.raises(DataError, match="no record can be used"):
        prepared([DataSource(str(broken))])
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["files"]


def test_damaged_data_are_prepared_again_before_they_are_trained_on(prepared, tmp_path, capsys):
    first = prepared()
    whole = np.array(first.examples.ids)
    (name,) = folders(tmp_path)
    with (tmp_path / "cache" / name / "ids").open("r+b") as file:
        file.write(b"\x01")
    assert first.examples.ids[0] != whole[0], "as a run that has mapped them sees them"
    second = prepared()
    assert np.array_equal(second.examples.ids, whole)
    warning, *_ = capsys.readouterr().err.splitlines()
    assert f"{name} is damaged (ids has the CRC-32" in warning
    (aside,) = (tmp_path / "cache").glob(f"{name}.damaged-*")
    assert first.examples.ids[1] == whole[1], "what is mapped stays"
    assert np.fromfile(aside / "ids", dtype=np.int32)[0] == first.examples.ids[0]


def test_a_damaged_folder_on_a_read_only_disk_is_named(prepared, tmp_path, monkeypatch):
    prepared()
    (name,) = folders(tmp_path)
    (tmp_path / "cache" / name / "ids").write_bytes(b"")

    def refused(self, target):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(DataError, match=r"is damaged \(ids has 0 bytes.*--data-cache"):
        prepared()


def test_who_waits_for_the_leader_gets_what_is_made_again(prepared, tmp_path):
    kept = len(prepared().examples)
    (name,) = folders(tmp_path)
    (tmp_path / "cache" / name / "offsets").unlink()
    context, log = multiprocessing.get_context("fork"), tmp_path / "log"
    follower = context.Process(
        target=lambda: log.write_text(str(len(prepared(leader=False).examples)))
    )
    follower.start()
    time.sleep(0.5)
    assert follower.is_alive(), "the first process of the machine prepares"
    prepared()
    follower.join(60)
    assert log.read_text() == str(kept)


@pytest.mark.parametrize("way", ["in place", "by another file"])
def test_a_file_of_the_same_size_and_time_with_other_content_is_noticed(tmp_path, way):
    file, notes = tmp_path / "a.jsonl", tmp_path / "notes"
    file.write_text("one")
    digest, time_of_change = cache.content_digest(file, notes), file.stat().st_mtime_ns
    new = file if way == "in place" else tmp_path / "new"
    new.write_text("two")
    os.utime(new, ns=(time_of_change, time_of_change))
    new.rename(file)
    assert cache.content_digest(file, notes) != digest
    file.write_text("one")
    assert cache.content_digest(file, notes) == digest, "the content alone counts"


def test_a_file_that_seems_the_same_is_read_once_and_a_damaged_note_is_written_anew(
    tmp_path, monkeypatch
):
    file, notes, hashed = tmp_path / "a.jsonl", tmp_path / "notes", []
    file.write_text("one")
    hash_file = cache._hash_file
    monkeypatch.setattr(cache, "_hash_file", lambda path: hashed.append(path) or hash_file(path))
    digest = cache.content_digest(file, notes)
    assert cache.content_digest(file, notes) == digest
    assert hashed == [file]
    (note,) = (notes / "files").iterdir()
    whole, name = note.read_bytes(), note.name.encode()
    of_another = b"f" + whole[1:] if whole[:1] != b"f" else b"e" + whole[1:]
    for damaged in (b"", whole[:-1], name + b" " + b"g" * 64, b"\xff" * 64, of_another):
        note.write_bytes(damaged)
        assert cache.content_digest(file, notes) == digest
    assert len(hashed) == 6


def test_a_file_that_changes_while_it_is_read_is_named(prepared, sources, tmp_path, monkeypatch):
    write = cache.write

    def meanwhile(chunks, *args):
        write(chunks, *args)
        with Path(sources[0].path).open("a") as file:
            file.write("\n")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "write", meanwhile)
        with pytest.raises(DataError, match=r"data\.jsonl: changed while it was read"):
            prepared()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["files"]
    assert prepared().report.kept == 400


def test_a_cache_that_cannot_be_written_is_named(prepared, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="--data-cache"):
        prepared(folder=tmp_path / "file" / "cache")


def test_the_default_place(monkeypatch):
    for name in ("MEGATRON_PROFIT_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache.default_cache() == Path.home() / ".cache" / "megatron_profit"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.default_cache() == Path("/x/megatron_profit")
    monkeypatch.setenv("HF_HOME", "/hf")
    assert cache.default_cache() == Path("/hf/megatron_profit")
    monkeypatch.setenv("MEGATRON_PROFIT_CACHE", "/own")
    assert cache.default_cache() == Path("/own")


def test_a_user_without_a_home_is_told_to_name_a_folder(monkeypatch):
    for name in ("MEGATRON_PROFIT_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(DataError, match=r"HOME is not set.*--data-cache"):
        cache.default_cache()


def test_files_in_a_folder_that_a_link_leads_to_belong_to_the_key(tmp_path):
    for name in ("v1", "v2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text(name)
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "dataset_dict.json").write_text("{}")
    (folder / "train").symlink_to(tmp_path / "v1")
    (folder / "circle").symlink_to(folder)
    (tmp_path / "v1" / "up").symlink_to(folder)
    (folder / "everything").symlink_to(tmp_path)
    assert cache._inner(folder) == [
        folder / "dataset_dict.json",
        folder / "train" / "state.json",
    ]
    first = cache.content_digest(folder, tmp_path / "cache")
    (folder / "train").unlink()
    (folder / "train").symlink_to(tmp_path / "v2")
    assert cache.content_digest(folder, tmp_path / "cache") != first
