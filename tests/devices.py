"""Marks of tests for machines with a CUDA device, and for those without."""

from collections.abc import Callable
from typing import Any

import pytest
import torch


def on_cuda(test: Callable[..., Any]) -> Callable[..., Any]:
    """The test needs a CUDA device."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


def without_cuda(test: Callable[..., Any]) -> Callable[..., Any]:
    """The test is of what happens where there is no CUDA device."""
    return pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")(test)
