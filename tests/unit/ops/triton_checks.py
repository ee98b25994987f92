"""Triton kernels against the torch functions and the oracle, in Triton's interpreter.

Run as a script: the interpreter is chosen when triton is imported, so it needs a process of its own.
"""

import mmap
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from megatron_profit.objectives import build_objective
from megatron_profit.objectives.base import COMPUTED_STATISTICS
from megatron_profit.ops import linear_objective, reference_linear_objective
from megatron_profit.ops.kernels import TORCH, choose_kernels
from megatron_profit.ops.partial_statistics import PartialStatistics, sum_of_exp
from megatron_profit.ops.tiling import Workspace
from megatron_profit.ops.triton import statistics

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WANTED = (
    *((), ("entropy",), ("sum_squared_prob",), ("rank",), ("lower_mass",)),
    COMPUTED_STATISTICS,
)


def random_block(num_rows, width, dtype, seed):
    """Logits with infinite and huge ones, some targets in other blocks."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, width, generator=generator) * 5
    logits[0, ::2] = -torch.inf
    if num_rows > 2:
        logits[1, :] = -torch.inf
        logits[2, 0] = 6e4
    column = torch.randint(-width // 2, width + width // 2, (num_rows,), generator=generator)
    return logits.to(dtype), column


def check_functions_on_a_block(triton):
    statistics._PART_COLUMNS = 256  # several parts, with a tail, at a size for the interpreter
    statistics._STEP = 128
    for seed, (num_rows, width) in enumerate(((1, 1), (3, 17), (5, 256), (4, 507), (7, 1023))):
        for dtype in DTYPES:
            logits, column = random_block(num_rows, width, dtype, seed)
            padded = torch.full((num_rows, width + 3), torch.nan, dtype=dtype)
            padded[:, :width] = logits  # what is behind the block must not be read
            # Some targets are in other blocks; several entries may equal a target's logit.
            target = logits[:, width // 2].float().contiguous()
            for wanted in WANTED if dtype == torch.float32 else (WANTED[0], WANTED[-1]):
                fields = PartialStatistics.of(set(wanted))
                known = target if fields.compares else None
                inputs = (padded[:, :width], column, known, fields, Workspace(logits.device))
                ours = fields.combined(triton.statistics(*inputs))
                expected = fields.combined(TORCH.statistics(*inputs))
                if fields.top is not None:
                    for total in (ours, expected):
                        total[fields.top] = total[fields.top].sort(0).values
                torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
            check_gradient(triton, logits, column, padded)


def check_gradient(triton, logits, column, padded):
    """Of some rows, into another tensor, and of all rows in place."""
    fields, workspace, width = PartialStatistics.of(set()), Workspace("cpu"), logits.size(1)
    total = fields.combined(TORCH.statistics(logits, column, None, fields, workspace))
    max_logit = total[0].masked_fill(total[0] == -torch.inf, 0)
    sum_exp = sum_of_exp(total) + 0.5  # as if another block had more
    coefficient, at_target = torch.randn(2, len(logits))
    vectors = (column, coefficient, at_target, max_logit, sum_exp)
    expected = logits.double() - max_logit[:, None]
    expected = expected.exp() * (coefficient / sum_exp)[:, None]
    for row, target in enumerate(column.tolist()):
        if 0 <= target < width:
            expected[row, target] = at_target[row]
    rows = torch.arange(0, len(logits), 2)
    for kernels in (TORCH, triton):
        block, out = padded.clone(), torch.full_like(padded[rows], torch.nan)
        source = block[:, :width]
        some = [vector[rows] for vector in vectors]
        kernels.gradient_(out[:, :width], (source, rows), *some, workspace)
        assert source.equal(logits), "the source must not be written"
        kernels.gradient_(source, None, *vectors, workspace)
        for result, truth in ((out, expected[rows]), (block, expected)):
            torch.testing.assert_close(result[:, :width].double(), truth, rtol=1e-2, atol=1e-6)
            assert result[:, width:].isnan().all(), "what is behind the block must not be written"


def check_nan_shows(triton):
    logits = torch.zeros(2, 300)
    logits[1, 299] = torch.nan
    fields = PartialStatistics.of(set())
    column = torch.zeros(2, dtype=torch.int64)
    total = fields.combined(triton.statistics(logits, column, None, fields, Workspace("cpu")))
    assert total[1].isnan().tolist() == [False, True]


def check_offsets_beyond_2_to_the_31(triton):
    """The last of three rows that are 2**30 entries apart, in memory that is mapped but not used."""
    apart, width, no_reserve = 2**30, 300, 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, 2 * (2 * apart + width), flags=flags)
    logits = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((3, width), (apart, 1))
    values = torch.randn(3, width, generator=torch.Generator().manual_seed(5)).bfloat16()
    logits.copy_(values)
    column, fields, workspace = (
        torch.tensor([7, 0, 299]),
        PartialStatistics.of(set()),
        Workspace("cpu"),
    )
    total = fields.combined(triton.statistics(logits, column, None, fields, workspace))
    torch.testing.assert_close(
        total, fields.combined(TORCH.statistics(values, column, None, fields, workspace))
    )
    vectors = (column, torch.ones(3), -torch.ones(3), total[0], sum_of_exp(total))
    rows, last = torch.tensor([2]), torch.empty(1, width, dtype=torch.bfloat16)
    triton.gradient_(last, (logits, rows), *(v[rows] for v in vectors), workspace)
    triton.gradient_(logits, None, *vectors, workspace)
    TORCH.gradient_(values, None, *vectors, workspace)
    for result in (last, logits[2:]):
        torch.testing.assert_close(result, values[2:], rtol=1e-2, atol=1e-6)


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
    check_offsets_beyond_2_to_the_31(triton)
    check_the_whole_operation()


if __name__ == "__main__":
    main()
