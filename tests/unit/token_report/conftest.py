"""Records with known numbers, and a real browser."""

from __future__ import annotations

import html
import json
import re
import subprocess

import pytest
import torch
from chromium import Tab, find_chromium

from megatron_profit.objectives import TokenStatistics, build_objective
from megatron_profit.token_report import TokenRecord, evaluate_objectives

OBJECTIVES = {
    "profit": build_objective("profit", prob_threshold=0.5, threshold_direction="higher"),
    "entropy": build_objective("entropy", keep_fraction=0.25, rank_scope="global_batch"),
}


def record(name, pieces, supervised, prob):
    prob = torch.tensor([float("nan"), *prob])
    return TokenRecord(
        name,
        tuple(pieces),
        torch.tensor(supervised, dtype=torch.bool),
        TokenStatistics(prob.log(), entropy=1 - prob, softmax_prob=prob),
        {},
    )


@pytest.fixture
def records():
    """Supervised probabilities 0.05, 0.5, 0.95 and 0.2, 0.99."""
    return evaluate_objectives(
        [
            record(
                "a.jsonl, line 1",
                ["<s>", "two ", "is", " ev", "en"],
                [0, 0, 1, 1, 1],
                [0.3, 0.05, 0.5, 0.95],
            ),
            record("a.jsonl, line 2", ["<s>", "</script><b>", "x\n"], [0, 1, 1], [0.2, 0.99]),
        ],
        OBJECTIVES,
    )


@pytest.fixture
def split_character():
    """A record with two characters that two tokens form."""
    return evaluate_objectives(
        [
            record(
                "a.jsonl, line 1",
                ["<s>", " 汉", "", "字", "🎉", ""],
                [0, 0, 1, 1, 1, 1],
                [0.3, 0.05, 0.6, 0.95, 0.1],
            )
        ],
        OBJECTIVES,
    )[0]


@pytest.fixture
def chromium():
    found = find_chromium()
    if found is None:
        pytest.skip("no Chromium on this machine: the page's behaviour needs a browser")
    return found


@pytest.fixture
def open_page(chromium, tmp_path):
    """open_page(text): the page in a browser whose keys can be pressed."""
    tabs = []

    def open_page(text):
        file = tmp_path / "page.html"
        file.write_text(text, encoding="utf-8")
        tabs.append(Tab(chromium, file, tmp_path / "profile"))
        return tabs[-1]

    yield open_page
    for tab in tabs:
        tab.close()


@pytest.fixture
def browse(chromium, tmp_path):
    """Opens a page in headless Chromium, runs a script in it, and returns what `result` then holds."""

    def browse(page, script, *flags):
        harness = (
            "<script>const result = {};"
            "const set = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event('input')); };"
            "const marks = r => data.records[r].nodes.map(n => n.classList.item(1));"
            f"{script};document.body.dataset.result = JSON.stringify(result);</script></body>"
        )
        file = tmp_path / "page.html"
        file.write_text(page.replace("</body>", harness), encoding="utf-8")
        command = [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}/profile",
        ]
        done = subprocess.run(
            [*command, *flags, "--dump-dom", file.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
        )
        found = re.search(r'<body data-result="([^"]*)"', done.stdout)
        assert found, f"the page's script failed:\n{done.stderr[-3000:]}"
        return json.loads(html.unescape(found[1]))

    return browse
