# SPDX-License-Identifier: Apache-2.0
"""Files hold what they were given, cannot run code, and are refused if anything is damaged."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import COUNTY, OBSERVED, assert_same, guide, model, ran
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning
from pyro_mpis.results import saving


class Evil:
    """Pickled, it is code that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


def test_layout_is_that_of_safetensors(tmp_path: Path) -> None:
    """Header, offsets without holes, and no byte that any unpickler would read."""
    posterior = ran("whole")
    posterior.save(tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert all(isinstance(value, str) for value in metadata.values())
    end = 0
    for entry in header.values():
        dtype = {"F32": torch.float32, "F64": torch.float64, "I64": torch.int64}[entry["dtype"]]
        assert entry["data_offsets"] == [end, end + entry["shape"][0] * dtype.itemsize]
        end = entry["data_offsets"][1]
    assert len(data) == 8 + length + end
    assert end < posterior.nbytes + 4 * OBSERVED.numel() + 8 * COUNTY.numel() + 1


def test_file_cannot_run_code(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    pickle.loads(pickle.dumps(Evil(victim))).close()
    assert victim.exists()  # such a pickle does what it says
    victim.unlink()
    files = {"pickle": pickle.dumps(Evil(victim)), "zip": b"", "legacy": b""}
    torch.save({"a": torch.ones(2), "b": Evil(victim)}, tmp_path / "zip")
    torch.save(
        {"a": torch.ones(2), "b": Evil(victim)},
        tmp_path / "legacy",
        _use_new_zipfile_serialization=False,
    )
    (tmp_path / "pickle").write_bytes(files["pickle"])
    for name in files:
        with pytest.raises(ValueError, match=rf"{name}': not a posterior that MPImportance.save"):
            MPImportance.load(tmp_path / name, model, guide)
    ran("whole").save(tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    for old, new in (
        ('{\\"dtype\\":\\"F32\\"}', f'{{\\"open\\":[\\"{victim}\\",\\"w\\"]}}'),
        ('{\\"tuple\\":[]}', f'{{\\"builtins.open\\":[\\"{victim}\\",\\"w\\"]}}'),
        ('{\\"Plate\\":', '{\\"Path\\":'),
        ('{\\"Plate\\":', '{\\"__import__\\":'),
        ('{\\"Site\\":', '{\\"BlockSum\\":'),
    ):
        (tmp_path / "tampered").write_bytes(tampered(data, old, new))
        with pytest.raises(ValueError, match=r"tampered': not a posterior that MPImportance.save"):
            MPImportance.load(tmp_path / "tampered", model, guide)
    assert not victim.exists()


def tampered(data: bytes, old: str, new: str) -> bytes:
    """Change the header of a file, and its length with it."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length].decode(), data[8 + length :]
    assert old in header
    changed = header.replace(old, new, 1).encode()
    return len(changed).to_bytes(8, "little") + changed + rest


def test_damaged_files(tmp_path: Path) -> None:
    """Cut anywhere, with something appended, of another kind, empty."""
    ran("whole").save(tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    length = int.from_bytes(data[:8], "little")
    cuts = [0, 1, 7, 8, 9, 8 + length // 2, 8 + length, 8 + length + 1, len(data) - 1]
    wrong = [data[:cut] for cut in cuts]
    wrong += [
        data + b"0",
        b"{}",
        b"\x02\0\0\0\0\0\0\0{}",
        b"\x02\0\0\0\0\0\0\0[]",
        b"\xff" * 100,
        (200_000).to_bytes(8, "little") + b"[" * 200_000,  # deeper than any stack
        tampered(data, "pyro_mpis posterior", "pyro_mpis prior"),
        tampered(data, '\\"blocks\\"', '\\"blocs\\"'),
        tampered(data, '\\"tensor\\":[0', '\\"tensor\\":[9999'),
        tampered(data, '"data_offsets":[0,', '"data_offsets":[-9,'),
        tampered(data, '"content":"', '"content":"[],'),
        tampered(data, '"content":"{', '"content":"null","was":"{'),
    ]
    for content in wrong:
        (tmp_path / "wrong").write_bytes(content)
        with pytest.raises(ValueError, match=r"wrong': not a posterior that MPImportance.save wro"):
            MPImportance.load(tmp_path / "wrong", model, guide)
    with pytest.raises(FileNotFoundError):
        MPImportance.load(tmp_path / "absent", model, guide)


def test_file_of_another_version(tmp_path: Path) -> None:
    ran("whole").save(tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    (tmp_path / "new").write_bytes(tampered(data, '"layout":"1', '"layout":"2'))
    with pytest.raises(ValueError, match=r"new': written by pyro_mpis \d.*layout.*run again"):
        MPImportance.load(tmp_path / "new", model, guide)


@pytest.mark.parametrize("record", saving.FORMAT.records, ids=lambda record: record.__name__)
def test_the_layout_follows_the_fields(
    record: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A field more, one fewer or one renamed, and a record renamed: each is another layout."""
    names, form = [field.name for field in dataclasses.fields(record)], saving.FORMAT
    changed = [
        dataclasses.make_dataclass(record.__name__, fields)
        for fields in ([*names, "more"], names[:-1], [*names[:-1], "other"])
    ]
    changed.append(dataclasses.make_dataclass("Other", names))
    same = dataclasses.make_dataclass(record.__name__, names)
    layouts = set()
    for other in (*changed, same):
        records = tuple(other if known is record else known for known in form.records)
        layouts.add(dataclasses.replace(form, records=records).layout)
    assert form.layout in layouts  # of the same fields
    assert len(layouts) == len(changed) + 1
    ran("whole").save(tmp_path / "file")
    records = tuple(changed[0] if known is record else known for known in form.records)
    monkeypatch.setattr(saving, "FORMAT", dataclasses.replace(form, records=records))
    with pytest.raises(ValueError, match=r"file': written by pyro_mpis \d.*layout.*run again"):
        MPImportance.load(tmp_path / "file", model, guide)


def test_tensors_that_cannot_be_kept(tmp_path: Path) -> None:
    def unused(data: Tensor) -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))

    posterior = MPImportance(unused, num_samples=4).run(torch.eye(2).to_sparse())
    with pytest.warns(MPISWarning, match=r"one is a tensor of torch.sparse_coo and torch.float32"):
        posterior.save(tmp_path / "file")


@pytest.mark.parametrize(
    "data",
    [
        {"i": [1, (2.5, None)], (1, 2): float("inf"), 3: slice(None, 4)},
        (torch.Size([2, 3]), frozenset({"b", "a"}), torch.float16, True, "é\0"),
        torch.zeros(0, 3),
        torch.tensor([True, False]),
        torch.arange(12, dtype=torch.int8).reshape(3, 4).T,
        torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        torch.tensor(2**62),
    ],
)
def test_plain_data_come_back_as_they_were(data: Any, tmp_path: Path) -> None:
    def anything(data: Any) -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))

    MPImportance(anything, num_samples=2).run(data).save(tmp_path / "file")
    (found,) = MPImportance.load(tmp_path / "file", anything)._sums[0].builder.programs.args
    if isinstance(data, Tensor):
        assert_same(found, data)
    else:
        assert found == data
        assert type(found) is type(data)
