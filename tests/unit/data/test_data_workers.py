"""The processes that prepare data: what they are sent, and that none outlives the one that started it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_profit.data import ColumnMapping, DataError, DataOptions, RawRecord
from megatron_profit.data.store import tasks

# Prepares with two workers, and says so when their first results have come.
SCRIPT = """
import sys
from pathlib import Path
from megatron_profit.data import (Preparation, DataSource)
from megatron_profit.data.store import cache
from megatron_profit.data.store import prepare, tasks

if __name__ == "__main__":
    data, tokenizer, folder = map(Path, sys.argv[1:])
    prepare.PROGRESS_SECONDS = 0
    tell = lambda line: print(line, flush=True)
    cache.load_or_build(
        [DataSource(str(data))], tokenizer, Preparation(64), folder, workers=2, progress=tell
    )
"""


def children(process):
    """The processes that a process has started, and those that they have."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent == process:
            number = int(stat.parent.name)
            found += [number, *children(number)]
    return found


def test_workers_end_with_the_process_that_prepares(small_tokenizer, tmp_path):
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "script.py").write_text(SCRIPT)
    record = json.dumps({"instruction": "question " * 20, "output": "It is sunny. " * 50}) + "\n"
    (tmp_path / "data.jsonl").write_text(record * 40_000)
    arguments = [tmp_path / name for name in ("script.py", "data.jsonl", "tokenizer", "cache")]
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert "preparing data" in process.stdout.readline()
        started = children(process.pid)
        assert len(started) >= 2, "its workers"
    finally:
        process.kill()
    assert process.wait(60) == -signal.SIGKILL
    end = time.monotonic() + 60
    while alive := [number for number in started if Path(f"/proc/{number}").exists()]:
        assert time.monotonic() < end, f"{alive} outlive their parent"
        time.sleep(0.05)


def test_large_records_go_to_the_workers_a_few_at_a_time():
    def sizes(*records):
        raw = (RawRecord({}, "a", number, "line", size=size) for number, size in enumerate(records))
        return [[record.size for record in batch] for batch in tasks._batches(raw)]

    assert sizes(*[1] * 300) == [[1] * 128, [1] * 128, [1] * 44]
    large = tasks.CHUNK_BYTES
    assert sizes(1, large, large // 2, large // 2, 3) == [[1, large], [large // 2] * 2, [3]]
    assert sizes() == []


def test_conversations_go_to_the_workers_by_the_size_of_their_examples():
    """With `--train-on each`, a conversation of 100 turns gives 100 examples of up to all of its tokens."""
    messages = [{"role": "user"}, {"role": "assistant"}] * 100
    forms = [
        {"messages": messages},
        {"conversations": json.dumps(messages).replace("role", "from"), "tools": []},
        {"talk": json.dumps(messages)},
        {"history": [["a", "b"]] * 200, "output": "x"},
    ]
    size = tasks.CHUNK_BYTES // 400 + 1
    for value in forms:
        raw = [RawRecord(value, "a", number, "line", size=size) for number in range(8)]
        assert [len(batch) for batch in tasks._batches(raw, each_turn=True)] == [2] * 4
        assert [len(batch) for batch in tasks._batches(raw)] == [8]
    short = [RawRecord({"output": "[x"}, "a", number, "line", size=size) for number in range(8)]
    assert [len(batch) for batch in tasks._batches(short, each_turn=True)] == [8]
    task = tasks.Task(0, 0, ColumnMapping(), raw, each_turn=True)
    assert task.size == 8 * 200 * size


@pytest.mark.parametrize("workers", [0, -1, 10**6, 10**40])
def test_a_number_of_workers_that_makes_no_sense_is_refused(tmp_path, workers):
    flags = {"data": ["a.jsonl"], "data_workers": workers, "valid_split": None, "valid_data": None}
    most = max(64, 4 * os.cpu_count())
    with pytest.raises(DataError, match=rf"--data-workers is {workers}; it must be in 1\.\.{most}"):
        DataOptions.from_flags(flags)
