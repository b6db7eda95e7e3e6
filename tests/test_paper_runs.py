# SPDX-License-Identifier: Apache-2.0
"""The command that runs the paper's experiments: cells, methods, what is kept, what is written."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import check_mean
from torch import Tensor

from benchmarks.paper import __main__, bias, figures, methods, published, report, runs
from benchmarks.paper.experiment import Experiment
from benchmarks.paper.methods import METHODS, Cell, Point
from benchmarks.paper.report import Estimate
from benchmarks.paper.runs import SIZES, Result, Store, plan, run_cells

GIB = 2**30


def effects_model(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("i", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def effects_guide(y: Tensor) -> None:
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("i", len(y)):
        pyro.sample("z", dist.Normal(0.0, 1.5))


Y = torch.tensor([1.2, 0.4, 2.0])


def effects(name: str = "chimpanzees") -> Experiment:
    """A model with a closed form under a name of the paper's, so that all methods are run on it."""
    return Experiment(name, effects_model, effects_guide, {"y": Y}, {"y": Y - 1}, 1, ("z",))


def log_evidence(y: Tensor) -> float:
    covariance = torch.ones(len(y), len(y)) + 2 * torch.eye(len(y))
    normal = torch.distributions.MultivariateNormal(torch.zeros(len(y)), covariance)
    return float(normal.log_prob(y))


# --- methods --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mpis", "mpis_even", "mpis_grouped", "global"])
def test_importance_sampling_finds_both_figures(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many samples all of them agree with the closed forms to two decimals or so."""
    monkeypatch.setattr(methods, "GROUPS", {"chimpanzees": [("mu", "z")]})
    monkeypatch.setattr(methods, "POSTERIOR_SAMPLES", 20_000)
    k = 300 if method in ("mpis", "mpis_even") else 30_000
    cell = Cell("published", "chimpanzees", method, k, seed=1)
    (point,) = methods.run(effects(), cell, GIB)
    assert point.elbo == pytest.approx(log_evidence(Y), abs=0.1)
    test = log_evidence(torch.cat([Y, Y - 1])) - log_evidence(Y)
    assert point.p_ll == pytest.approx(test, abs=0.1)
    assert 0 < point.elbo_seconds < point.p_ll_seconds


def test_a_learned_proposal_finds_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "POSTERIOR_SAMPLES", 20_000)
    cell = Cell("published", "chimpanzees", "adapt", methods.CHOSEN, seed=0)
    (point,) = methods.run(effects(), cell, GIB)
    assert point.elbo == pytest.approx(log_evidence(Y), abs=0.1)
    test = log_evidence(torch.cat([Y, Y - 1])) - log_evidence(Y)
    assert point.p_ll == pytest.approx(test, abs=0.1)
    assert 0 < point.elbo_seconds < point.p_ll_seconds


def test_samples_in_parts_are_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Global importance sampling of a million samples takes the memory of a part of them."""
    assert methods._parts(effects(), 10**6) == 1
    monkeypatch.setattr(methods, "ENTRIES", 10_000)
    assert methods._parts(effects(), 30_000) == 10  # 9 would do, but do not divide it
    assert methods._parts(effects(), 7) == 1
    cell = Cell("published", "chimpanzees", "global", 30_000, seed=1)
    (point,) = methods.run(effects(), cell, GIB)
    assert point.elbo == pytest.approx(log_evidence(Y), abs=0.1)


def test_one_sample_is_the_same_for_all_importance_sampling() -> None:
    points = [
        methods.run(effects(), Cell("published", "chimpanzees", method, 1, seed=3), GIB)
        for method in ("mpis", "global")
    ]
    assert points[0][0].elbo == points[1][0].elbo


@pytest.mark.parametrize("method", methods.ITERATIVE)
def test_training_improves_the_bound(method: str) -> None:
    k = 1 if method == "vi" else 10
    cell = Cell("published", "chimpanzees", method, k, seed=0, lr=0.1, iterations=60)
    far = {"y": Y + 5}  # where the proposal starts out poor
    points = methods.run(replace(effects(), train=far), cell, GIB)
    assert [point.iteration for point in points] == methods.checkpoints(60)
    assert points[-1].iteration == 60
    seconds = [point.elbo_seconds for point in points]
    assert 0 < seconds[0] < seconds[-1]
    # means of late points: one of VI is a single draw
    early, late = (sum(point.elbo for point in part) / 3 for part in (points[:3], points[-3:]))
    assert late > early + 2
    assert late < log_evidence(far["y"]) + 0.5


def test_every_proposal_is_trainable_in_all_of_its_elements() -> None:
    cell = Cell("published", "chimpanzees", "vi", 1, seed=0, lr=0.1, iterations=3)
    methods.run(effects(), cell, GIB)
    params = {name: tuple(value.shape) for name, value in pyro.get_param_store().items()}
    assert params == {"mu.loc": (), "mu.scale": (), "z.loc": (3,), "z.scale": (3,)}


def test_half_cauchy_proposals_keep_positive_scales() -> None:
    def model(y: Tensor) -> None:
        sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
        pyro.sample("y", dist.Normal(0.0, sigma), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("sigma", dist.HalfCauchy(1.0))

    experiment = Experiment("chimpanzees", model, guide, {"y": Y[0]}, {"y": Y[0]}, 0)
    cell = Cell("published", "chimpanzees", "iwae", 5, seed=0, lr=0.5, iterations=20)
    assert all(math.isfinite(point.elbo) for point in methods.run(experiment, cell, GIB))
    assert float(pyro.param("sigma.scale").detach()) > 0


# --- cells and the file of finished ones ----------------------------------------------------


def test_plans_cover_the_table_that_is_to_be_reproduced() -> None:
    for name in published.NAMES:
        cells = plan(replace(effects(), name=name), "published", SIZES["default"], METHODS)
        assert len(set(cells)) == len(cells)
        seeds = {k: sum(c.k == k and c.method == "mpis" for c in cells) for k in (3, 5, 10)}
        assert min(seeds.values()) >= 30
        trained = {cell.method for cell in cells if cell.method in methods.ITERATIVE}
        assert trained == {"occupancy": {"rws"}, "occupancy_summed": set()}.get(
            name, set(methods.ITERATIVE)
        )
        adapted = [cell for cell in cells if cell.method == "adapt"]
        assert len(adapted) == (0 if name == "occupancy_summed" else 5)
        grouped = [cell for cell in cells if cell.method == "mpis_grouped"]
        assert bool(grouped) == (name == "chimpanzees")
    full = plan(effects(), "published", SIZES["full"], ["mpis", "global"])
    assert max(cell.k for cell in full if cell.method == "mpis") == 20
    assert max(cell.k for cell in full if cell.method == "global") == 10**6


def test_finished_cells_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also after an interruption in the middle of a cell, or of a line of the file."""
    calls: list[Cell] = []

    def fake(experiment: Experiment, cell: Cell, memory_limit: int) -> list[Point]:
        calls.append(cell)
        if cell.seed == 2 and len(calls) < 10:
            raise KeyboardInterrupt
        return [Point(-float(cell.seed), -1.0, 0.1, 0.2)]

    monkeypatch.setattr(runs, "run", fake)
    store = Store(tmp_path / "results.jsonl")
    cells = [Cell("published", "chimpanzees", "mpis", 3, seed) for seed in range(4)]
    with pytest.raises(KeyboardInterrupt):
        run_cells(effects(), cells, store, GIB)
    assert [cell.seed for cell in calls] == [0, 0, 1, 2]  # the first one warms up
    with store.path.open("a") as file:
        file.write('{"cell": {"variant": "publi')  # cut off
    assert list(store.read()) == cells[:2]
    calls.extend(calls * 2)
    del calls[:2]
    number = len(calls)
    run_cells(effects(), cells, store, GIB)
    assert [cell.seed for cell in calls[number:]] == [2, 2, 3]
    assert list(store.read()) == cells
    number = len(calls)
    run_cells(effects(), cells, store, GIB)
    assert len(calls) == number
    assert "ELBO -1.5 +- 0.6" in capsys.readouterr().out


def test_a_failed_cell_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(experiment: Experiment, cell: Cell, memory_limit: int) -> list[Point]:
        raise MemoryError("too large")

    monkeypatch.setattr(runs, "run", fail)
    store = Store(tmp_path / "results.jsonl")
    cell = Cell("published", "chimpanzees", "mpis", 3, 0)
    run_cells(effects(), [cell], store, GIB)
    assert store.read() == {cell: Result(cell, (), "MemoryError: too large")}
    assert report.summarise(store.read().values()) == []


# --- tables and figures ---------------------------------------------------------------------


def results() -> list[Result]:
    """Two seeds of importance sampling and of training, of two variants."""
    entries = []
    for variant in ("published", "intended"):
        for name in ("chimpanzees", "occupancy", "occupancy_summed"):
            for method in ("mpis", "global"):
                for k in (3, 10):
                    for seed in range(2):
                        cell = Cell(variant, name, method, k, seed)
                        entries.append(Result(cell, (Point(-300.0 - 2 * seed, -50.0, 0.1, 0.2),)))
        cell = Cell(variant, "chimpanzees", "adapt", methods.CHOSEN, 0)
        entries.append(Result(cell, (Point(-240.0, -40.0, 5.0, 6.0),)))
        cell = Cell(variant, "chimpanzees", "iwae", 10, 0, 0.3, 100)
        points = tuple(Point(-400.0 + i, -60.0, 0.1 * i, 0.1 * i + 0.01, i) for i in (1, 100))
        entries.append(Result(cell, points))
    return entries


def test_means_and_errors_over_seeds() -> None:
    mean, error = methods.mean_and_error([1.0, 2.0, 6.0])
    assert mean == 3.0
    assert error == pytest.approx(math.sqrt(7.0 / 3))
    assert math.isnan(methods.mean_and_error([1.0])[1])
    assert Estimate(-10.0, 3.0).z(Estimate(0.0, 4.0)) == "-2.0"
    cell = Cell("published", "chimpanzees", "mpis", 3, 0)
    broken = Result(replace(cell, seed=5), (Point(math.nan, -1.0, 0.1, 0.1),))
    short = replace(cell, method="iwae", k=10, lr=0.3, iterations=5)  # there are longer ones
    rows = report.summarise([*results(), broken, Result(short, (Point(-1.0, -1.0, 1.0, 1.0, 5),))])
    assert not [row for row in rows if row.iteration == 5]
    row = next(r for r in rows if (r.variant, r.experiment, r.method) == _first(cell) and r.k == 3)
    assert row.seeds == 2
    assert row.elbo == Estimate(-301.0, 1.0)


def _first(cell: Cell) -> tuple[str, str, str]:
    return cell.variant, cell.experiment, cell.method


def test_tables_hold_the_authors_figures(tmp_path: Path) -> None:
    rows = report.summarise(results())
    report.write(rows, tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert "| chimpanzees | 3 | 2 | -301.0 ± 1.0 | -657 ± 32 | +10.9 |" in text
    assert "| occupancy | 3 | 2 | -301.0 ± 1.0 | -110,507 ± 1,673 |" in text
    assert "| published | chimpanzees | 1 | -240.0 | 5 | -40.0 | 6 |" in text
    assert "| chimpanzees | iwae | 1 | 0.3 | -300.0 | -277.7 ± 1.3 |" in text
    assert "| chimpanzees | iwae | 1 | 0.3 | -300.0 | - |" in text
    assert len(json.loads((tmp_path / "summary.json").read_text())) == len(rows)
    assert report.table("a,b", []) == ""


@pytest.mark.slow
def test_figures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = figures.draw(report.summarise(results()), tmp_path)
    assert sorted(path.name for path in paths) == sorted(
        f"figure{number}_{variant}.png"
        for number in (1, 2, 3)
        for variant in ("published", "intended")
    )
    assert all(path.stat().st_size > 10_000 for path in paths)
    assert figures.draw([], tmp_path) == []


def test_the_command_num_runswhat_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(published, "load", lambda name: effects(name))
    monkeypatch.delenv("PYRO_MPIS_DATA", raising=False)
    command = ["--quick", "--models", "chimpanzees", "--methods", "mpis", "global", "--no-bias"]
    command += ["--ks", "3", "--output", str(tmp_path)]
    __main__.main([*command, "--seeds", "3"])
    output = capsys.readouterr().out
    assert "intended chimpanzees: left out. chimpanzees: PYRO_MPIS_DATA is not set" in output
    assert "published chimpanzees mpis K=3: ELBO" in output
    store = Store(tmp_path / "results.jsonl")
    assert {(c.method, c.k, c.seed) for c in store.read()} == {
        (method, 3, seed) for method in ("mpis", "global") for seed in range(3)
    }
    names = {"machine.json", "summary.json", "tables.md", "results.jsonl"}
    assert names <= {path.name for path in tmp_path.iterdir()}


# --- the biased scheme ----------------------------------------------------------------------


def test_one_pairing_for_a_plate_is_biased_and_one_for_each_element_is_not() -> None:
    """False-alarm probability 1e-6 of the correct scheme."""
    pyro.set_rng_seed(0)
    truth = bias.exact()
    check_mean(bias.estimates(100_000, anew=True) / truth, 1.0)
    shared = bias.estimates(100_000) / truth
    with pytest.raises(AssertionError):
        check_mean(shared, 1.0)
    assert float(shared.mean()) > 3


def test_the_truth_of_the_toy_by_simulation() -> None:
    """Simulate the model: the fraction of data sets that equal the observed one."""
    pyro.set_rng_seed(0)
    num_runs = 500_000
    a, b = 2 * torch.rand(2, num_runs, 1) - 1
    z = torch.bernoulli(torch.sigmoid(3 * a * b).expand(-1, len(bias.OBSERVED)))
    x = torch.bernoulli(0.9 * z + 0.1 * (1 - z))
    check_mean((x == bias.OBSERVED).all(-1).double() / bias.exact(), 1.0)


def check_against_the_biased_scheme(mean: float, error: float) -> None:
    """A z-test at 4.9 standard errors, which the mean of the biased scheme fails."""
    assert abs(mean - bias.exact()) < 4.9 * error
    assert abs(mean - float(bias.estimates(100_000).mean())) > 4.9 * error


def test_one_pairing_with_the_mixture_over_its_pairs_is_unbiased() -> None:
    pyro.set_rng_seed(0)
    drawn = bias.estimates(100_000, all_pairs=False)
    check_against_the_biased_scheme(float(drawn.mean()), float(drawn.std()) / len(drawn) ** 0.5)
    assert bias.table(1000, our_runs=2).count("\n") == 6


@pytest.mark.slow
def test_the_package_is_unbiased_on_the_toy() -> None:
    pyro.set_rng_seed(0)
    check_against_the_biased_scheme(*bias.ours(1000))
