"""Run the doctests of the package: the shapes that docstrings print are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import hybrid_flex

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(hybrid_flex.__path__, "hybrid_flex.", onerror=lambda name: None)
    # kernels/ needs Triton and a GPU; integrations/ needs optional packages
    if module.name.split(".")[1] not in ("kernels", "integrations")
)


@pytest.mark.parametrize("name", MODULES)
def test_doctest(name: str) -> None:
    module = importlib.import_module(name)
    torch.manual_seed(0)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0
