"""The doctor's look at Transformer Engine, with a stand-in for it and for the GPU."""

from __future__ import annotations

import pytest

from megatron_profit.doctor import machine_checks

# Takes the arguments of Transformer Engine's attention by name, and says which kernel it chose.
ATTENTION = """
import torch
_attention_backends = {}
class DotProductAttention:
    def __init__(self, heads, channels, *, num_gqa_groups, attention_dropout, qkv_format):
        assert (heads, channels, num_gqa_groups, qkv_format) == (4, 64, 2, "thd")
    def __call__(self, query, key, value, *, attn_mask_type, cu_seqlens_q, cu_seqlens_kv,
                 max_seqlen_q, max_seqlen_kv):
        lengths = cu_seqlens_q.diff().tolist()
        assert max(lengths) == max_seqlen_q == max_seqlen_kv
        assert query.shape[0] == key.shape[0] == sum(lengths)
        assert attn_mask_type == "padding_causal"
        CHOICE
        both = (t.repeat_interleave(2, dim=1) for t in (key, value))
        return sum((query, *both)).flatten(1)
"""


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """Install a stand-in whose attention runs a statement; its tensors stay on the CPU."""

    def install(choice: str) -> None:
        package = tmp_path / "transformer_engine" / "pytorch" / "attention"
        package.mkdir(parents=True)
        for folder in (package.parents[1], package):
            (folder / "__init__.py").touch()
        module = package / "dot_product_attention.py"
        module.write_text(ATTENTION.replace("CHOICE", choice))
        line = "from transformer_engine.pytorch.attention.dot_product_attention import *\n"
        (package.parent / "__init__.py").write_text(line)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
        monkeypatch.syspath_prepend(tmp_path)
        code = machine_checks._ATTEND.replace('device="cuda"', 'device="cpu"')
        monkeypatch.setattr(machine_checks, "_ATTEND", code)

    return install


@pytest.mark.parametrize(
    ("choice", "verdict", "text"),
    [
        ("pass", "ok", "a kernel keeps the records of a row apart"),
        pytest.param(
            "_attention_backends['use_unfused_attention'] = True",
            "WARNING",
            "which is slow",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "raise RuntimeError('no cuDNN')",
            "WARNING",
            "of two records fails: RuntimeError: no cuDNN",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_kernel_for_packed_rows_is_tried(engine, choice, verdict, text):
    engine(choice)
    (finding,) = machine_checks._transformer_engine()
    assert (finding.verdict.value, finding.subject) == (verdict, "kernels")
    assert text in finding.text
