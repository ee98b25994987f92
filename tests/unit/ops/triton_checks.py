"""Triton kernels against the torch functions and the oracle, in Triton's interpreter.

Run as a script: the interpreter is chosen when triton is imported, so it needs a process of its own.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from megatron_profit.objectives import build_objective
from megatron_profit.objectives.base import COMPUTED_STATISTICS
from megatron_profit.ops import linear_objective, reference_linear_objective
from megatron_profit.ops.fields import Fields
from megatron_profit.ops.kernels import TORCH, choose_kernels
from megatron_profit.ops.tiling import Workspace
from megatron_profit.ops.triton import statistics

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WANTED = ((), ("entropy",), ("sum_squared_prob",), COMPUTED_STATISTICS)


def random_block(num_rows, width, dtype, seed):
    """Logits with infinite and huge ones, some targets in other blocks."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, width, generator=generator) * 5
    logits[0, ::2] = -torch.inf
    if num_rows > 2:
        logits[1, :] = -torch.inf
        logits[2, 0] = 6e4
    column = torch.randint(width, (num_rows,), generator=generator)
    here = torch.rand(num_rows, generator=generator) < 0.7
    return logits.to(dtype), column.masked_fill(~here, 0), here


def check_functions_on_a_block(triton):
    statistics._PART_COLUMNS = 256  # several parts, with a tail, at a size for the interpreter
    statistics._STEP = 128
    for seed, (num_rows, width) in enumerate(((1, 1), (3, 17), (5, 256), (4, 507), (7, 1023))):
        for dtype in DTYPES:
            logits, column, here = random_block(num_rows, width, dtype, seed)
            padded = torch.full((num_rows, width + 3), torch.nan, dtype=dtype)
            padded[:, :width] = logits  # what is behind the block must not be read
            for wanted in WANTED:
                fields = Fields.of(set(wanted))
                inputs = (padded[:, :width], column, here, fields, Workspace(logits.device))
                ours = fields.combined(triton.statistics(*inputs))
                expected = fields.combined(TORCH.statistics(*inputs))
                if fields.top is not None:
                    for total in (ours, expected):
                        total[fields.top] = total[fields.top].sort(0).values
                torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
            check_gradient(triton, logits, column, here, padded)


def check_gradient(triton, logits, column, here, padded):
    coefficient = torch.randn(len(logits))
    fields = Fields.of(set())
    total = fields.combined(TORCH.statistics(logits, column, here, fields, Workspace("cpu")))
    max_logit = total[0].masked_fill(total[0] == -torch.inf, 0)
    sum_exp = total[1] + 0.5  # as if another block had more
    expected = logits.clone()
    vectors = (column, here, coefficient, max_logit, sum_exp, Workspace("cpu"))
    TORCH.gradient_(expected, *vectors)
    width = logits.size(1)
    triton.gradient_(padded[:, :width], *vectors)
    torch.testing.assert_close(padded[:, :width], expected, rtol=1e-2, atol=1e-6)
    assert padded[:, width:].isnan().all(), "what is behind the block must not be written"


def check_nan_shows(triton):
    logits = torch.zeros(2, 300)
    logits[1, 299] = torch.nan
    column, here = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool)
    fields = Fields.of(set())
    total = fields.combined(triton.statistics(logits, column, here, fields, Workspace("cpu")))
    assert total[1].isnan().tolist() == [False, True]


def check_the_whole_operation():
    generator = torch.Generator().manual_seed(0)
    num_rows, num_hidden, vocab = 31, 20, 507
    objective = build_objective("profit", threshold_direction="higher", prob_threshold=1e-3)
    hidden = torch.randn(num_rows, num_hidden, generator=generator)
    weight = torch.randn(vocab, num_hidden, generator=generator) / 3
    labels = torch.randint(500, (num_rows,), generator=generator)
    labels[::4] = -100
    upstream = torch.randn(num_rows, generator=generator)
    for backward in ("save", "recompute"):
        results = []
        for function, options in (
            (
                linear_objective,
                {"implementation": "triton", "backward": backward, "chunk_vocab": 99},
            ),
            (reference_linear_objective, {}),
        ):
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            output = function(h, w, labels, objective, vocab_size=500, **options)
            output.loss.backward(upstream)
            results.append((output.loss, h.grad, w.grad))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def main():
    triton = choose_kernels("triton", torch.zeros(1))
    check_functions_on_a_block(triton)
    check_nan_shows(triton)
    check_the_whole_operation()


if __name__ == "__main__":
    main()
