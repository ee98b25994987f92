"""The benchmark of attention over packed rows."""

from __future__ import annotations

import json

import bench_attention


def test_rows_are_filled_by_records():
    rows = bench_attention.packed_rows(5, 300)
    assert [row.shape for row in rows] == [(1, 300)] * 5
    begins = [tuple((row[0] == 0).nonzero()[:, 0].tolist()) for row in rows]
    assert all(begin[0] == 0 for begin in begins)
    assert len(set(begins)) > 1


def test_it_measures_what_runs_here(tmp_path, capsys):
    sizes = "--device cpu --seq-length 64 --rows 2 --heads 4 --groups 2 --head-dim 8"
    bench_attention.main([*sizes.split(), "--out", str(tmp_path)])
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert list(record["milliseconds"]) == ["torch"]
    assert [len(values) for values in record["milliseconds"]["torch"].values()] == [2, 2, 2]
    assert "rows of 64 positions, 4 heads of 8, 2 of keys" in capsys.readouterr().out
