"""Shared by the tests: small modules with known weights, and double precision where exactness is the claim."""

from __future__ import annotations

import pytest
import torch
from torch import nn


def randomize(module: nn.Module, seed: int = 0, std: float = 0.3) -> None:
    """Draw every parameter at random, so that no zero or one at the start (GRN, biases) hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
