"""The private methods of transformers' Trainer that we override are listed, and their signatures are the known ones."""

from __future__ import annotations

import inspect

import pytest
from transformers import Trainer

from ismdata.train.trainer import PRIVATE_OVERRIDES, PackedTrainer

#: As in transformers 5.18 to 5.23. If a release changes one, read its Trainer before changing this.
SIGNATURES = {
    "_get_grad_norm": "(self, model, grad_norm=None)",
    "_issue_warnings_after_load": "(self, load_result: Any) -> None",
    "_save_checkpoint": "(self, model: torch.nn.modules.module.Module, trial: 'optuna.Trial | dict[str, Any] | None') "
    "-> None",
}


def test_every_private_override_is_listed() -> None:
    overridden = {
        name
        for name in vars(PackedTrainer)
        if name.startswith("_") and not name.startswith("__") and hasattr(Trainer, name)
    }
    assert overridden == set(PRIVATE_OVERRIDES) == set(SIGNATURES)


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_release_that_changes_one_fails_here(name: str) -> None:
    assert str(inspect.signature(getattr(Trainer, name))) == SIGNATURES[name]
