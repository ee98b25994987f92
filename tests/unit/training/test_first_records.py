"""The token report of an evaluation: which records it shows, and what its page begins with."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import torch

from megatron_profit.data import Examples, SFTDataset
from megatron_profit.objectives import build_objective
from megatron_profit.training.monitoring.evaluation_report import EvaluationReport, first_records


def test_only_records_that_are_evaluated_are_shown():
    count = 20
    ids = np.arange(3 * count, dtype=np.int32)
    examples = Examples(ids, np.ones(3 * count, dtype=np.uint8), np.arange(0, 3 * count + 1, 3))
    data = SFTDataset(examples, 4, count, seed=3, packing=False)
    met = [int(data[row]["example_index"][0]) for row in range(count)]
    assert first_records(data, count, 4) == tuple(sorted(met[:4]))
    assert first_records(data, 3, 4) == tuple(sorted(met[:3]))
    assert first_records(data, 99, 10 * count) == tuple(range(count))


def test_a_page_begins_with_the_objectives_threshold_and_has_the_references_probabilities(tmp_path):
    def batch_decode(rows, **_):
        return ["".join(map(chr, ids)) for ids in rows]

    prepared = SimpleNamespace(examples=[(np.array([97, 98, 99]), None)], name=lambda i: "a:1")
    tokenizer = SimpleNamespace(batch_decode=batch_decode)
    report = EvaluationReport(tmp_path, [0], prepared, tokenizer)
    objective = build_objective(
        "profit",
        threshold_direction="higher",
        threshold_quantile=0.3,
        threshold_scope="record",
        objective_signal="reference",
    )
    # Example, position, log p, p, weight, log q.
    token = [0, 1, math.log(0.5), 0.5, 1, math.log(0.25)]
    report._write(torch.tensor([token], dtype=torch.float64), objective, 7)
    text = (tmp_path / "step_0000007.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert (data["threshold"], data["direction"]) == ([0.3, 1.0], "higher")
    assert (data["scope"], data["signal"]) == ("record", "reference")
    (record,) = data["records"]
    assert (record["p"], record["weights"]) == ([None, None, 0.5], {"profit": [0, 0, 1]})
    assert record["q"] == [None, None, 0.25]
