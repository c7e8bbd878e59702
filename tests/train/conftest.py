"""A model that several of these tests train."""

from __future__ import annotations

import pytest

from tests.support.training_shards import saved_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model with the shards' vocabulary, smaller than the presets."""
    return saved_model(tmp_path_factory.mktemp("model") / "small")
