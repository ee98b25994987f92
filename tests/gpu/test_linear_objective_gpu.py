"""The fused operation on a GPU equals the dense oracle, and its memory does not grow with the tokens."""

import pytest
import torch

from megatron_profit.objectives import build_objective
from megatron_profit.ops import linear_objective, reference_linear_objective

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

N, H, V = 1023, 252, 5007
PROFIT = build_objective("profit", threshold_direction="higher", prob_threshold=1e-4)


def run(function, dtype, device="cuda", **options):
    generator = torch.Generator(device).manual_seed(0)
    settings = {"generator": generator, "device": device, "dtype": torch.float64}
    hidden = torch.randn(N, H, **settings).bfloat16().to(dtype).requires_grad_()
    weight = (torch.randn(V, H, **settings) / 8).bfloat16().to(dtype).requires_grad_()
    labels = torch.randint(V, (N,), generator=generator, device=device)
    labels[::7] = -100
    output = function(hidden, weight, labels, PROFIT, **options)
    output.loss.backward(torch.randn(N, **settings).to(output.loss.dtype))
    return output.loss.double(), hidden.grad.double(), weight.grad.double()


@pytest.mark.parametrize("backward", ["save", "recompute"])
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        ("torch", torch.float64),
        *(
            (implementation, dtype)
            for implementation in ("torch", "triton")
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        ),
    ],
)
def test_error_is_bounded_by_the_dense_loss_of_the_same_precision(implementation, dtype, backward):
    exact = run(reference_linear_objective, torch.float64)
    dense = run(reference_linear_objective, dtype)
    chunked = run(
        linear_objective, dtype, chunk_vocab=999, implementation=implementation, backward=backward
    )
    # In float32 the sum over the blocks is rounded as often as there are blocks.
    bound = 2 if dtype == torch.float32 else 1.05
    for ours, usual, truth in zip(chunked, dense, exact, strict=True):
        assert (ours - truth).norm() <= bound * (usual - truth).norm() + 1e-12 * truth.norm()


@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_weight_is_added_to_main_grad(main_dtype):
    """In float32 without a rounding of the products, which no CPU can show."""
    *_, exact = run(reference_linear_objective, torch.float64)
    *_, dense = run(reference_linear_objective, torch.bfloat16)
    buffers = []

    def accumulating(hidden, weight, *inputs, **options):
        if not buffers:
            buffers.append(torch.zeros_like(weight, dtype=main_dtype))
        weight.main_grad = buffers[0]
        weight.grad = torch.zeros_like(weight)  # nothing arrives here
        return linear_objective(
            hidden, weight, *inputs, gradient_accumulation_fusion=True, **options
        )

    for _ in range(2):
        *_, through_autograd = run(accumulating, torch.bfloat16, chunk_vocab=999)
    assert not through_autograd.any()
    error = (buffers[0].double() / 2 - exact).norm()
    assert error <= (1.05 if main_dtype == torch.float32 else 2) * (dense - exact).norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_may_be_on_another_than_the_current_device():
    options = {"implementation": "triton", "chunk_vocab": 999}
    here = run(linear_objective, torch.bfloat16, **options)
    there = run(linear_objective, torch.bfloat16, device="cuda:1", **options)
    for ours, others in zip(here, there, strict=True):
        assert torch.equal(ours.cpu(), others.cpu())


def test_peak_memory_is_chunks_and_not_tokens_times_vocabulary():
    num_rows, num_hidden, vocabulary = 16_384, 64, 32_768
    hidden = torch.randn(num_rows, num_hidden, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(vocabulary, num_hidden, device="cuda").bfloat16().requires_grad_()
    labels = torch.randint(vocabulary, (num_rows,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_objective(hidden, weight, labels, build_objective("sft")).loss.sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < num_rows * vocabulary * 4 / 3  # dense float32 logits, of which several are kept
