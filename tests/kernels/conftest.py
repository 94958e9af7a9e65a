from __future__ import annotations

import pytest
import torch

CARD = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def seed() -> None:
    """For a card that is not there torch would write down, at every call, the stack that it was called from."""
    (torch.manual_seed if CARD else torch.default_generator.manual_seed)(0)
