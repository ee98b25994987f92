"""The Triton kernels: what they compute, in the interpreter, and that they compile for a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_kernels_equal_the_torch_functions_in_the_interpreter():
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("triton_checks.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("every_statistic", [False, True])
def test_statistics_kernel_compiles_for_an_h100(dtype, every_statistic, tmp_path, monkeypatch):
    from megatron_profit.ops.triton import statistics

    signature = {
        "logits_ptr": f"*{dtype}",
        "column_ptr": "*i64",
        "target_ptr": "*fp32",
        "parts_ptr": "*fp32",
        "num_rows": "i32",
        "width": "i32",
        "row_stride": "i32",
    }
    constants = {
        "NUM_FIELDS": 7 if every_statistic else 3,
        "ENTROPY": 3 if every_statistic else -1,
        "SQUARES": 4 if every_statistic else -1,
        "ABOVE": 5 if every_statistic else -1,
        "LOWER": 6 if every_statistic else -1,
        "PART_COLUMNS": 32768,
        "STEP": 2048,
    }
    if not every_statistic:
        del signature["target_ptr"]
        constants["target_ptr"] = None
    assert_compiles(statistics._statistics_kernel, signature, constants, tmp_path, monkeypatch)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("some_rows", [False, True])
def test_gradient_kernel_compiles_for_an_h100(dtype, some_rows, tmp_path, monkeypatch):
    from megatron_profit.ops.triton import gradient

    signature = {
        "logits_ptr": f"*{dtype}",
        "rows_ptr": "*i64",
        "grad_ptr": f"*{dtype}",
        "column_ptr": "*i64",
        "coefficient_ptr": "*fp32",
        "at_target_ptr": "*fp32",
        "max_ptr": "*fp32",
        "sum_ptr": "*fp32",
        "width": "i32",
        "logits_stride": "i32",
        "grad_stride": "i32",
    }
    constants = {"STEP": 4096}
    if not some_rows:
        del signature["rows_ptr"]
        constants["rows_ptr"] = None
    assert_compiles(gradient._gradient_kernel, signature, constants, tmp_path, monkeypatch)


def assert_compiles(kernel, signature, constants, tmp_path, monkeypatch):
    """To machine code: triton brings the assembler, no GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
