"""Which records the token report of an evaluation shows."""

import numpy as np

from megatron_profit.data import Examples, SFTDataset
from megatron_profit.training.monitoring.evaluation_report import first_records


def test_only_records_that_are_evaluated_are_shown():
    count = 20
    ids = np.arange(3 * count, dtype=np.int32)
    examples = Examples(ids, np.ones(3 * count, dtype=np.uint8), np.arange(0, 3 * count + 1, 3))
    data = SFTDataset(examples, 4, count, seed=3, packing=False)
    met = [int(data[row]["example_index"][0]) for row in range(count)]
    assert first_records(data, count, 4) == tuple(sorted(met[:4]))
    assert first_records(data, 3, 4) == tuple(sorted(met[:3]))
    assert first_records(data, 99, 10 * count) == tuple(range(count))
