"""The attention kernel that Transformer Engine chose. It imports neither torch nor Megatron."""

from __future__ import annotations

import sys


def computes_unfused() -> bool:
    """Return whether Transformer Engine had no kernel for records when it last chose how to attend."""
    engine = sys.modules.get("transformer_engine.pytorch.attention.dot_product_attention")
    return bool(getattr(engine, "_attention_backends", {}).get("use_unfused_attention"))
