"""The conversion benchmark runs both directions and checks that they change nothing."""

from __future__ import annotations

import json
import sys

import bench_conversion

from megatron_profit.estimates.published import published_config


def test_a_tiny_size(tmp_path, monkeypatch):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    tiny = {**published_config("Qwen3-0.6B"), **sizes}
    monkeypatch.setitem(bench_conversion.SIZES, "tiny", tiny)
    arguments = ["--sizes", "tiny", "--scratch", str(tmp_path / "scratch"), "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--out", str(tmp_path / "results")])
    bench_conversion.main()
    (file,) = (tmp_path / "results").glob("*-conversion.json")
    (result,) = json.loads(file.read_text())["results"]
    assert result["size"] == "tiny"
    ways = ("hf_to_megatron", "megatron_to_hf")
    expected = [(f"cp before {way}", f"cp and sync before {way}", way) for way in ways]
    assert list(result["runs"]) == [*expected[0], *expected[1]]
    assert all(run["seconds"] > 0 for runs in result["runs"].values() for run in runs)
    page = file.with_suffix(".md").read_text()
    assert page.count("| tiny, 0.02 GB: ") == 6
    assert not (tmp_path / "scratch" / "tiny").exists()
