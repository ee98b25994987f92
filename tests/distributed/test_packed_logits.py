"""Packed rows at any layout: the logits of each record are HuggingFace's of the record alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layouts import parse
from tiny_models import make_family
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).parent / "save_packed_logits.py"
# Rows of 48 positions: records of many lengths, of one token, a record that fills the row.
RECORDS = [[5, 1, 1, 20, 21], [48], [1, 2, 3, 4, 5, 33], [30, 18]]
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        pytest.param("olmo2", "1", marks=slow),
        pytest.param("olmo2", "2 tp2", marks=slow),
        pytest.param("olmo2", "2 tp2 sp"),
        pytest.param("olmo2", "3 tp3", marks=slow),
        pytest.param("olmo2", "2 pp2", marks=slow),
        pytest.param("olmo2", "2 pp2 vpp2", marks=slow),
        pytest.param("olmo2", "2 cp2", marks=slow),
        pytest.param("olmo2", "4 tp2 cp2 sp", marks=slow),
    ],
)
def test_a_packed_record_has_the_logits_that_it_has_alone(ranks, tmp_path, family, layout):
    model = make_family(tmp_path, family)
    tokens = torch.randint(0, 508, (len(RECORDS), 48), generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in RECORDS])
    torch.save({"tokens": tokens, "position_ids": positions}, tmp_path / "rows.pt")
    world_size, flags = parse(layout)
    ranks(
        *(world_size, SCRIPT, tmp_path / "rows.pt", tmp_path / "logits.pt"),
        *("--hf-model", model.hf, *flags),
    )
    logits = torch.load(tmp_path / "logits.pt")[..., :508]
    reference = AutoModelForCausalLM.from_pretrained(model.hf, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.stack(
            [
                torch.cat([reference(record[None]).logits[0] for record in row.split(lengths)])
                for row, lengths in zip(tokens, RECORDS, strict=True)
            ]
        )
    assert expected.std() > 0.5, "logits too flat to show a mistake"
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
