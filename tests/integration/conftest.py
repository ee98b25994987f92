"""A model that is small enough for whole runs of many steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from make_tiny_model import TinyShape, make_tiny_model

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    shape = TinyShape(hidden_size=32, intermediate_size=64, head_dim=16)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return make_tiny_model(folder, sorted(DATA.glob("*.jsonl")), shape)
