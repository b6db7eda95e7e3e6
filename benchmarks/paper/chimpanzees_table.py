# SPDX-License-Identifier: Apache-2.0
"""The table of the chimpanzees: in the folder that PYRO_MPIS_DATA names, else downloaded once."""

import csv
import os
from pathlib import Path

import torch
from torch import Tensor

CHIMPANZEES_URL = (
    "https://raw.githubusercontent.com/rmcelreath/rethinking/master/data/chimpanzees.csv"
)


def data_dir() -> Path | None:
    """Return the folder that PYRO_MPIS_DATA names; None where it is not set."""
    folder = os.environ.get("PYRO_MPIS_DATA")
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise SystemExit(f"PYRO_MPIS_DATA is set to {folder!r}, which is not a folder.")
    return Path(folder)


def chimpanzees_csv() -> Path:
    """Return the path of the table of the experiment, downloaded where there is no local copy."""
    folder = data_dir()
    if folder is not None:
        return folder / "chimpanzees" / "chimpanzees.csv"
    import pooch  # only a download needs it

    try:
        path = pooch.retrieve(
            CHIMPANZEES_URL,
            known_hash=None,  # read_chimpanzees checks the content, whatever the separator
            fname="chimpanzees.csv",
            path=pooch.os_cache("pyro_mpis"),
        )
    except OSError as error:  # no connection, or no such page
        raise SystemExit(
            f"{CHIMPANZEES_URL} cannot be downloaded ({type(error).__name__}). Set "
            "PYRO_MPIS_DATA to a folder with chimpanzees/chimpanzees.csv."
        ) from None
    return Path(path)


def read_table(path: Path) -> list[dict[str, str]]:
    """Read a CSV file with a header, separated by commas or semicolons."""
    with path.open(newline="") as file:
        header = file.readline()
        file.seek(0)
        return list(csv.DictReader(file, delimiter=";" if ";" in header else ","))


def read_chimpanzees(path: Path) -> dict[str, Tensor]:
    """
    Arrange the trials by actor and block, each block's in the order they were held.

    The file is sorted by condition first, so its rows must not be reshaped as they come.

    :return: ``pulled_left``, ``prosocial_left`` and ``condition``, each (7 actors, 6 blocks, 12
        trials), float.
    :raises ValueError: if the table is not 7 actors by 6 blocks by 12 trials, each held once.
    """
    rows = read_table(path)
    keys = [tuple(int(row[name]) for name in ("actor", "block", "trial")) for row in rows]
    in_order = sorted(range(len(rows)), key=keys.__getitem__)
    cells = [keys[i][:2] for i in in_order]
    expected = [(actor, block) for actor in range(1, 8) for block in range(1, 7) for _ in range(12)]
    if cells != expected or len(set(keys)) != len(keys):
        raise ValueError(
            f"{path}: expected 504 different trials, 12 in each of 6 blocks for each of 7 actors; "
            f"found {len(rows)} rows, {len(set(keys))} different, in {len(set(cells))} blocks."
        )

    def column(name: str) -> Tensor:
        return torch.tensor([float(rows[i][name]) for i in in_order]).reshape(7, 6, 12)

    return {
        "pulled_left": column("pulled_left"),
        "prosocial_left": column("prosoc_left"),
        "condition": column("condition"),
    }
