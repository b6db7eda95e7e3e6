# SPDX-License-Identifier: Apache-2.0
"""What all tests share."""

from collections.abc import Iterator

import pyro
import pytest
import torch

from pyro_mpis.results import arviz_export

torch.set_num_threads(1)  # the tensors are small: threads only wait for each other


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tensors are made, as cuda")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("device") != "cpu":
        torch.set_default_device(config.getoption("device"))


@pytest.fixture
def float64() -> Iterator[None]:
    """Make float64 the default dtype for the time of a test."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(previous)


@pytest.fixture(autouse=True)
def _empty_param_store() -> None:
    """Start every test without the params of the one before."""
    pyro.clear_param_store()


@pytest.fixture
def data_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the export believe in a new ArviZ: the same data without its conversion."""
    monkeypatch.setattr(arviz_export, "version", lambda name: "1.3.0")
