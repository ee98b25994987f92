"""Numbers in README and docs are the ones of the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
KERNEL = (REPOSITORY / "docs" / "kernel.md").read_text(encoding="utf-8")
README = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
# Rows of the page's table, and the names of their computations.
ROWS = {
    "kernel (`auto`": "ours",
    "kernel, `recompute`": "ours backward=recompute",
    "the three matrix products alone, on": "matmuls",
    "official code: fp32": "official",
    "the same under torch.compile": "official-compiled",
    "Megatron's cross-entropy, mask": "megatron",
    "Megatron's fused native one, mask": "megatron-native",
}
MASKS = ((0.0, 0.0), (0.5, 0.2), (0.8, 0.5))


def configurations(name: str) -> dict[tuple[float, float], dict[str, Any]]:
    """The configurations of a results file by prompt and dropped share."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    return {(c["prompt"], c["dropped"]): c for c in record["configurations"]}


def numbers(cell: str) -> list[float]:
    return [float(text.replace(",", "")) for text in re.findall(r"[\d,]+(?:\.\d+)?", cell)]


@pytest.mark.parametrize("row", ROWS, ids=ROWS.values())
def test_the_kernels_table_is_that_of_its_results(row):
    measured = configurations("2026-11-26-objective-bf16-1024-cpu")
    line = next(line for line in KERNEL.splitlines() if line.startswith(f"| {row}"))
    cells = line.strip("|").split(" | ")[1:]
    for mask, cell in zip(MASKS, cells, strict=False):
        results = measured[mask]["results"]
        median = results[ROWS[row]]["median"]
        milliseconds, *ratio = numbers(cell)
        assert milliseconds == pytest.approx(1e3 * median, abs=1)
        if ratio:
            assert ratio[0] == pytest.approx(median / results["ours"]["median"], rel=0.01)
    masked = measured[(0.5, 0.2)]
    beyond = masked["results"][ROWS[row]]["peak_bytes"] - masked["gradient_bytes"]
    assert numbers(cells[-1])[0] == pytest.approx(beyond / 2**20, abs=1)


def test_what_is_said_of_the_larger_vocabulary():
    (measured,) = configurations("2026-11-28-objective-fp32-248320-cpu").values()
    ours, *others = (
        measured["results"][name]
        for name in ("ours", "ours backward=recompute", "official", "megatron-native")
    )
    text = KERNEL.split("**Qwen3.5's vocabulary**")[1]
    stated = re.search(r"(\d+) MiB beyond the\s+gradients, (\d+) with .*? against (\d+) of", text)
    beyond = [(r["peak_bytes"] - measured["gradient_bytes"]) / 2**20 for r in (ours, *others)]
    assert [float(n) for n in stated.groups()] == pytest.approx(beyond[:3], abs=0.5)
    ratios = re.search(r"are ([\d.]+) times .*? and ([\d.]+) for the better", text).groups()
    expected = [r["median"] / ours["median"] for r in others[1:]]
    assert [float(n) for n in ratios] == pytest.approx(expected, abs=0.005)


def test_the_readmes_ratios_of_the_operation():
    results = configurations("2026-11-26-objective-bf16-1024-cpu")[(0.5, 0.2)]["results"]
    median = {name: result["median"] for name, result in results.items() if "median" in result}
    official, fastest = re.search(
        r"it is ([\d.]+) times as fast as the official code .*? It is ([\d.]+) times as fast as Megatron's",
        README,
    ).groups()
    assert float(official) == pytest.approx(median["official"] / median["ours"], abs=0.05)
    megatron = min(median["megatron"], median["megatron-native"])
    assert float(fastest) == pytest.approx(megatron / median["ours"], abs=0.05)


def test_the_readmes_gain_of_a_whole_step():
    record = json.loads((RESULTS / "2026-11-26-training-step-cpu.json").read_text())
    median = {name: result["median"] for name, result in record["results"].items()}
    gain = float(re.search(r"A whole step gains less: ([\d.]+) times", README)[1])
    assert gain == pytest.approx(median["stock"] / median["ours"], abs=0.05)
    assert gain == pytest.approx(median["masked"] / median["ours"], abs=0.05)


def test_the_gain_of_packed_rows():
    record = json.loads((RESULTS / "2026-11-26-packing.json").read_text())
    page = (RESULTS / "2026-11-26-packing.md").read_text()
    gains = [float(text) for text in re.findall(r"ours, --packing .*\| ([\d.]+)x \|", page)]
    assert record["environment"]["date"] == "2026-11-26"
    stated = float(re.search(r"\[(\d+) times as many supervised tokens a second\]", README)[1])
    assert all(gain == pytest.approx(stated, abs=0.5) for gain in gains)
    data = (REPOSITORY / "docs" / "data.md").read_text()
    assert all(f"{gain} times |" in data for gain in gains)


def test_the_table_of_ranks_is_that_of_its_results():
    page = (REPOSITORY / "docs" / "lora.md").read_text(encoding="utf-8")
    results = json.loads((RESULTS / "2026-11-28-lora-ranks.json").read_text())["results"]
    base, *trained = results
    assert f"the base has {100 * base['scores']['sums']:.1f}" in page
    for rank in (4, 16, 64, 128):
        line = next(line for line in page.splitlines() if line.startswith(f"| {rank} |"))
        cells = line.strip("|").split("|")[1:]
        for objective, cell in zip(("sft", "profit 0.1", "profit < 0.5"), cells, strict=True):
            found = [
                100 * result["scores"]["sums"]
                for result in trained
                if (result["run"]["objective"], result["run"]["lora_rank"]) == (objective, rank)
            ]
            assert numbers(cell) == [pytest.approx(score, abs=0.051) for score in found]
