"""Models that the distributed tests share, converted once."""

from __future__ import annotations

import pytest
from tiny_models import TinyModel, make_model


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def untied_model(tmp_path_factory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("untied"), tied=False)
