# SPDX-License-Identifier: Apache-2.0
"""The benchmark that says how often proposals are called narrow: ``benchmarks/narrowness.py``."""

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine

ROOT = Path(__file__).parents[1]


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


@pytest.mark.parametrize(
    ("found", "number", "low", "high"),
    [
        (0, 10, 0.0, 1 - 0.025**0.1),
        (10, 10, 0.025**0.1, 1.0),
        (5, 10, 0.187086, 0.812914),  # Clopper and Pearson's, from tables
        (1, 20, 0.001265, 0.248733),
    ],
)
def test_interval_of_a_rate(
    found: int, number: int, low: float, high: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = module("narrowness", monkeypatch)
    assert rates.interval(found, number) == pytest.approx((low, high), abs=1e-6)


def test_only_what_is_between_the_comments_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = module("narrowness", monkeypatch)
    page = f"before\n{rates.BEGIN}\nold\n{rates.END}\nafter\n"
    once = rates.replaced(page, "new\n")
    assert once == f"before\n{rates.BEGIN}\n\nnew\n\n{rates.END}\nafter\n"
    assert rates.replaced(once, "new\n") == once
    for wrong in ("before\n", f"{rates.END}\n{rates.BEGIN}\n"):
        with pytest.raises(ValueError, match="the page has no"):
            rates.replaced(wrong, "new\n")
    assert rates.replaced(rates.PAGE.read_text(), "new\n").count("new\n") == 1


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("size", [1, 3])
def test_posteriors_in_closed_form(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joint density over that of the posterior is the evidence, at any values."""
    gaussians = module("_gaussians", monkeypatch)
    hierarchy = gaussians.Hierarchy(gaussians.correlated(0.6, size))

    def log_ratio(guide: Callable[[], None]) -> float:
        guided = poutine.trace(guide).get_trace()
        joint = poutine.trace(poutine.replay(hierarchy.model, trace=guided)).get_trace()
        return float(joint.log_prob_sum() - guided.log_prob_sum())

    pyro.set_rng_seed(0)
    truth = hierarchy.log_evidence()
    for _ in range(3):
        assert log_ratio(hierarchy.exact) == pytest.approx(truth)
        assert abs(log_ratio(hierarchy.marginals()) - truth) > 1e-3  # does not depend on the mean
    means, multiples = hierarchy.posterior()
    torch.testing.assert_close(means[1:], (means[0] + hierarchy.data) / 2)  # of z given the mean
    elements = multiples.diagonal()[1:]
    torch.testing.assert_close(elements, 0.5 + multiples[0, 0].expand(6) / 4)
    given = torch.linalg.inv(gaussians.correlated(0.6, size)).diagonal()
    found = gaussians.mean_field(gaussians.correlated(0.6, size))
    torch.testing.assert_close(found, (1 / given).diag())


def test_smallest_setting(tmp_path: Path) -> None:
    """Calls what is half as wide narrow, and the posterior not; keeps the rest of a page."""
    output = tmp_path / "rates.md"
    output.write_text(
        "kept\n<!-- begin: benchmarks/narrowness.py --><!-- end: benchmarks/narrowness.py -->\n"
    )
    command = [sys.executable, str(ROOT / "benchmarks" / "narrowness.py"), "--quick"]
    subprocess.run([*command, "--output", str(output)], check=True, capture_output=True, cwd=ROOT)
    page = output.read_text()
    rows = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if "|" in line}
    assert page.startswith("kept\n")
    assert page.count("####") == 4
    for name, found in {
        "hierarchy of 1 scalar: 0.5 times as wide": 2,
        "hierarchy of 1 scalar: the posterior": 0,
        "hierarchy of 1 scalar: the prior": 0,
    }.items():
        assert re.findall(r"(\d)/2 ", rows[name]) == [str(found)] * 2
    assert "adapt of eight_schools" in rows
    assert "AutoNormal of eight_schools" in rows
