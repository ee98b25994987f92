"""The token report of a run in training, against transformers on the exported weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from make_tiny_model import TinyShape, make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_profit.data import ChatRenderer, normalise, read_records
from megatron_profit.objectives import build_objective
from megatron_profit.token_report import score_records

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
HELD_OUT = DATA / "arithmetic_heldout.jsonl"
RECORDS = 5


def test_each_evaluation_writes_a_page(sft, tmp_path):
    shape = TinyShape(hidden_size=32, intermediate_size=64, head_dim=16)
    tiny = make_tiny_model(tmp_path / "tiny", sorted(DATA.glob("*.jsonl")), shape)
    sft(
        2,
        *("--hf-model", tiny, "--data", DATA / "arithmetic_base.jsonl", "--valid-data", HELD_OUT),
        *("--objective", "profit", "--prob-threshold", "0.002", "--threshold-direction", "higher"),
        *("--seq-length", 96, "--micro-batch-size", 2, "--global-batch-size", 4, "--lr", 1e-2),
        *("--train-iters", 4, "--eval-interval", 2, "--context-parallel-size", 2),
        *("--token-report", tmp_path / "pages", "--token-report-records", RECORDS),
        *("--export-hf", tmp_path / "trained"),
    )
    pages = sorted(file.name for file in (tmp_path / "pages").iterdir())
    assert pages == ["step_0000002.html", "step_0000004.html"]
    text = (tmp_path / "pages" / pages[-1]).read_text()
    shown = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])["records"]
    assert len(shown) == RECORDS

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "trained")
    renderer = ChatRenderer(tokenizer)
    lines = [int(record["name"].removeprefix("arithmetic_heldout.jsonl:")) for record in shown]
    chosen = [record for record in read_records(HELD_OUT) if record.number in lines]
    objective = build_objective("profit", prob_threshold=0.002, threshold_direction="higher")
    expected = score_records(
        AutoModelForCausalLM.from_pretrained(tmp_path / "trained"),
        tokenizer,
        [(record.where, renderer.render(normalise(record))) for record in chosen],
        {"profit": objective},
    )
    for record, reference in zip(shown, expected, strict=True):
        assert tuple(record["pieces"]) == reference.pieces
        assert record["supervised"] == reference.supervised.int().tolist()
        for p, p_reference, is_supervised in zip(
            record["p"], reference.statistics.prob.tolist(), record["supervised"], strict=True
        ):
            assert p == (pytest.approx(p_reference, rel=1e-4) if is_supervised else None)
        assert torch.equal(torch.tensor(record["weights"]["profit"]), reference.weights["profit"])
