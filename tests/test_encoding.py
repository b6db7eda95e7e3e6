# SPDX-License-Identifier: Apache-2.0
"""Files hold what they were given, cannot run code, and are refused if anything is damaged."""

import dataclasses
import hashlib
import json
import pickle
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import COUNTY, OBSERVED, assert_same, guide, model, ran
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning
from pyro_mpis.results import encoding, saving
from pyro_mpis.results.encoding import Format


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
    assert end < posterior.nbytes + 4 * OBSERVED.numel() + 8 * COUNTY.numel() + 64


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


def parts(data: bytes) -> tuple[str, bytes]:
    """Cut a file into its header and its numbers."""
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length].decode(), data[8 + length :]


def signed(header: str, numbers: bytes) -> bytes:
    """Make a file of a header and numbers, with the checksums that they should have."""
    header = re.sub('"tensors":"[0-9a-f]{64}"', f'"tensors":"{blake(numbers)}"', header)
    start = len('{"__metadata__":{"checksum":"')
    blank = header[:start] + "0" * 64 + header[start + 64 :]
    text = (header[:start] + blake(blank.encode()) + header[start + 64 :]).encode()
    return len(text).to_bytes(8, "little") + text + numbers


def blake(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def tampered(data: bytes, old: str, new: str) -> bytes:
    """Change the header of a file, and its length and checksum with it."""
    header, numbers = parts(data)
    assert old in header
    return signed(header.replace(old, new, 1), numbers)


@dataclass(frozen=True)
class Leaf:
    """A record with some of everything."""

    numbers: Tensor
    flags: Tensor
    names: Mapping[str, tuple[int, ...]]
    size: torch.Size
    cut: slice
    inner: "Leaf | None" = None


FORM = Format("leaves", 7, (Leaf,))
CPU = torch.device("cpu")


@pytest.fixture
def leaf(tmp_path: Path) -> bytes:
    """A small file."""
    numbers, flags = torch.tensor([1.5, -2.0]), torch.tensor([[True], [False], [True]])
    inner = Leaf(torch.zeros(0, 3), flags, {}, torch.Size([]), slice(None))
    tree = Leaf(numbers, flags, {"a": (1, 2)}, torch.Size([3, 1]), slice(1, 2), inner)
    encoding.write(tmp_path / "leaf", tree, FORM)
    found = encoding.read(tmp_path / "leaf", FORM, Leaf, CPU)
    assert (found.names, found.size, found.cut) == (tree.names, tree.size, tree.cut)
    assert found.inner is not None
    assert_same((found.numbers, found.flags), (numbers, flags))
    assert_same(found.inner.numbers, inner.numbers)
    return (tmp_path / "leaf").read_bytes()


def refused(path: Path, data: bytes, match: str = "") -> None:
    """Reading fails with a ValueError that names the file."""
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{path.name}': (not a posterior|written by).*{match}"):
        encoding.read(path, FORM, Leaf, CPU)


def test_every_bit_counts(leaf: bytes, tmp_path: Path) -> None:
    """One that is flipped anywhere, in the length, the header, the checksums or the numbers."""
    for place in range(len(leaf)):
        for bit in range(8):
            data = bytearray(leaf)
            data[place] ^= 1 << bit
            refused(tmp_path / "flipped", bytes(data))


def test_every_byte_counts(leaf: bytes, tmp_path: Path) -> None:
    """A file cut short anywhere, with a byte more, or with two exchanged."""
    for place in range(len(leaf)):
        refused(tmp_path / "cut", leaf[:place])
        refused(tmp_path / "more", leaf[:place] + b"0" + leaf[place:])
    refused(tmp_path / "more", leaf + b"0", "does not end where it should")
    for place in range(len(leaf) - 1):
        if leaf[place] != leaf[place + 1]:
            pair = leaf[place : place + 2][::-1]
            refused(tmp_path / "swapped", leaf[:place] + pair + leaf[place + 2 :])


def test_bits_of_a_posterior_count(tmp_path: Path) -> None:
    ran("whole").save(tmp_path / "file")
    saved = (tmp_path / "file").read_bytes()
    generator = random.Random(0)
    for _ in range(200):
        data = bytearray(saved)
        data[generator.randrange(len(saved))] ^= 1 << generator.randrange(8)
        (tmp_path / "flipped").write_bytes(data)
        with pytest.raises(ValueError, match=r"flipped': "):
            MPImportance.load(tmp_path / "flipped", model, guide)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"data_offsets":[0,', '"data_offsets":[-8,', "not a number"),
        ('"data_offsets":[0,', '"data_offsets":[8,', "not where it should be"),
        ('"data_offsets":[8,11]', '"data_offsets":[5,8]', "tensor 1 is not where"),  # overlaps
        ('"data_offsets":[8,11]', '"data_offsets":[0,3]', "tensor 1 is not where"),
        ('"data_offsets":[8,11]', '"data_offsets":[8,11,11]', "ValueError"),
        ('"data_offsets":[8,11]', '"data_offsets":"8,"', "not a number"),
        ('"data_offsets":[8,11]', '"data_offsets":null', "TypeError"),
        ('"data_offsets":[8,11]', '"offsets":[8,11]', "KeyError"),
        ('"shape":[2],"data_offsets":[0,8]', '"shape":[2.0],"data_offsets":[0,8]', "not a number"),
        (
            '"shape":[3],"data_offsets":[8,11]',
            '"shape":[true],"data_offsets":[8,9]',
            "not a number",
        ),
        (
            '"shape":[3],"data_offsets":[8,11]',
            f'"shape":[{2**62}],"data_offsets":[8,{2**62 + 8}]',
            "tensor 1 is cut short",
        ),
        (
            '"shape":[3],"data_offsets":[8,11]',
            '"shape":[2],"data_offsets":[8,10]',
            "tensor 2 is not",
        ),
        ('"shape":[3]', '"shape":[1,3]', "ValueError"),
        ('"dtype":"F32"', '"dtype":"F64"', "not where"),
        ('"dtype":"F32"', '"dtype":"OBJECT"', "KeyError"),
        ('"dtype":"F32"', '"dtype":["F32"]', "TypeError"),
        ('"1":{', '"7":{', "tensor 7 is not where"),
        ('"1":{', '"0":{', "not where"),  # two of a name
        ('"1":{', '"1":[],"2":{', "TypeError"),
        ('"kind":"leaves"', '"kind":"trees"', "of the kind 'trees'"),
        ('"kind":"leaves"', '"kind":7', "not all texts"),
        ('"kind":"leaves"', '"sort":"leaves"', "KeyError"),
        ('"version":', '"extra":[],"version":', "not all texts"),
        ('"tensors":"', '"tensors":"0', "not as they were"),
        ('"tensors":', '"numbers":', "KeyError"),
        ('"content":"{', '"content":"', "JSONDecodeError"),
        ('"content":"{', '"content":"[]","was":"{', "holds something else"),
        ('{\\"tensor\\":[0,2]}', '{\\"tensor\\":[0,3]}', "RuntimeError"),
        ('{\\"tensor\\":[0,2]}', f'{{\\"tensor\\":[0,2,{2**40},{2**40}]}}', "Error"),  # huge
        ('{\\"tensor\\":[0,2]}', f'{{\\"tensor\\":[0,{2**200}]}}', "Error"),
        ('{\\"tensor\\":[0,2]}', '{\\"tensor\\":[0,-1]}', "not a number"),
        ('{\\"tensor\\":[0,2]}', '{\\"tensor\\":[-3,2]}', "not a number"),
        ('{\\"tensor\\":[0,2]}', '{\\"tensor\\":[9,2]}', "IndexError"),
        ('{\\"tensor\\":[0,2]}', '{\\"tensor\\":[true,2]}', "not a number"),
        ('{\\"tensor\\":[0,2]}', '{\\"tensor\\":[]}', "ValueError"),
        ('{\\"tensor\\":[0,2]}', '{\\"tensor\\":7}', "TypeError"),
        ('{\\"tensor\\":[0,2]}', "null", r"Leaf\.numbers is not of the type"),
        ('{\\"tensor\\":[0,2]}', "[1.5,-2]", r"Leaf\.numbers"),
        ('{\\"tuple\\":[1,2]}', '{\\"tuple\\":[1,\\"2\\"]}', r"Leaf\.names"),
        ('{\\"tuple\\":[1,2]}', "[1,2]", r"Leaf\.names"),
        ('{\\"tuple\\":[1,2]}', '{\\"set\\":[1,2]}', "KeyError"),
        ('{\\"tuple\\":[1,2]}', '{\\"tuple\\":[1],\\"list\\":[2]}', "ValueError"),
        ('{\\"Size\\":[3,1]}', '{\\"Size\\":[3,\\"1\\"]}', "TypeError"),
        ('{\\"Size\\":[3,1]}', '{\\"tuple\\":[3,1]}', r"Leaf\.size"),
        ('{\\"slice\\":[1,2,null]}', '{\\"slice\\":[1,2,null,3]}', "TypeError"),
        ('\\"inner\\":', '\\"outer\\":', "TypeError"),
        ('\\"inner\\":{\\"Leaf\\":', '\\"inner\\":{\\"dict\\":', "Error"),
    ],
)
def test_mangled_headers(leaf: bytes, old: str, new: str, message: str, tmp_path: Path) -> None:
    """With checksums that fit: numbers out of place, wrong types, more than there is."""
    refused(tmp_path / "mangled", tampered(leaf, old, new), message)


@pytest.mark.parametrize("depth", [500, 5_000, 200_000])
def test_deep_nesting(depth: int, leaf: bytes, tmp_path: Path) -> None:
    """Of the header, and of what stands in it."""
    brackets, text = "[" * depth + "]" * depth, '\\"inner\\":{'
    refused(tmp_path / "deep", tampered(leaf, '"0":{', f'"0":{brackets},"1":{{'))
    refused(tmp_path / "deep", tampered(leaf, text, f'\\"inner\\":{brackets},\\"more\\":{{'))
    refused(tmp_path / "deep", len(brackets).to_bytes(8, "little") + brackets.encode())


def test_other_files(tmp_path: Path) -> None:
    """Headers that are none, texts in another encoding, lengths beyond the file."""
    for data in (
        b"",
        b"{}",
        b"\x02\0\0\0\0\0\0\0{}",
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x02\0\0\0\0\0\0\0\xff\xff",
        b"\x02\0\0\0\0\0\0\x80{}",
        b"\xff" * 100,
        b"\0" * 100,
        len(header := '{"__metadata__":{"kind":"leaves"}}'.encode("utf-16")).to_bytes(8, "little")
        + header,
    ):
        refused(tmp_path / "other", data)
    with pytest.raises(FileNotFoundError):
        encoding.read(tmp_path / "absent", FORM, Leaf, CPU)


def test_a_file_without_checksums_is_refused(leaf: bytes, tmp_path: Path) -> None:
    """An older one by its layout; one that says to be of this layout as damaged."""
    header, numbers = parts(leaf)
    bare = re.sub(r'"(checksum|tensors)":"[0-9a-f]{64}",', "", header)
    elsewhere = bare.replace('"kind"', f'"tensors":"{blake(numbers)}","checksum":"","kind"')
    for text in (bare, elsewhere):
        data = len(text).to_bytes(8, "little") + text.encode() + numbers
        refused(tmp_path / "bare", data, "its header has no checksum")
    old = bare.replace(FORM.layout, "6-0123456789abcdef")
    data = len(old).to_bytes(8, "little") + old.encode() + numbers
    (tmp_path / "old").write_bytes(data)
    message = (
        r"old': written by pyro_mpis \d\S+ in the layout 6-0123456789abcdef, but pyro_mpis \d\S+, "
        rf"which is reading, knows the layout {FORM.layout} alone\. .*, or run again\."
    )
    with pytest.raises(ValueError, match=message):
        encoding.read(tmp_path / "old", FORM, Leaf, CPU)


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    """With checksums that fit: what the records of a posterior do not hold."""
    ran("whole").save(tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    for old, new in (
        ("pyro_mpis posterior", "pyro_mpis prior"),
        ('\\"blocks\\"', '\\"blocs\\"'),
        ('\\"num_samples\\":6', '\\"num_samples\\":\\"6\\"'),
        ('\\"num_samples\\":6', '\\"num_samples\\":-6'),
        ('\\"dtype\\":{\\"dtype\\":\\"F32\\"},\\"v', '\\"dtype\\":{\\"dtype\\":\\"I64\\"},\\"v'),
        ('\\"sums\\":{\\"tuple\\":[', '\\"sums\\":{\\"tuple\\":[1,'),
    ):
        (tmp_path / "wrong").write_bytes(tampered(data, old, new))
        with pytest.raises(ValueError, match=r"wrong': not a posterior|num_samples: expected a po"):
            MPImportance.load(tmp_path / "wrong", model, guide)


def test_file_of_another_version(tmp_path: Path) -> None:
    ran("whole").save(tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    (tmp_path / "new").write_bytes(tampered(data, '"layout":"2', '"layout":"3'))
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
    with pytest.warns(MPISWarning, match=r"a tensor of torch.sparse_coo and torch.float32"):
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
    (found,) = MPImportance.load(tmp_path / "file", anything)._sums[0].replicate.programs.args
    if isinstance(data, Tensor):
        assert_same(found, data)
    else:
        assert found == data
        assert type(found) is type(data)


def test_a_tensor_and_a_view_of_its_beginning(tmp_path: Path) -> None:
    def anything(*data: Tensor) -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))

    whole = torch.arange(6)
    MPImportance(anything, num_samples=2).run(whole, whole[:2]).save(tmp_path / "file")
    found = MPImportance.load(tmp_path / "file", anything)._sums[0].replicate.programs.args
    assert_same(found[0], whole)
    assert_same(found[1], whole[:2])


def test_a_tensor_and_its_bits_as_integers(tmp_path: Path) -> None:
    """Are the same bytes, and two tensors."""

    def anything(*data: Tensor) -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))

    number = torch.tensor([1.0, 2.0])
    MPImportance(anything, num_samples=2).run(number, number.view(torch.int32)).save(tmp_path / "f")
    one, other = MPImportance.load(tmp_path / "f", anything)._sums[0].replicate.programs.args
    assert isinstance(one, Tensor)
    assert isinstance(other, Tensor)
    assert (one.dtype, other.dtype) == (torch.float32, torch.int32)
    assert torch.equal(one.view(torch.int32), other)


def test_want_of_memory_is_not_taken_for_damage(
    leaf: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    (tmp_path / "file").write_bytes(leaf)
    monkeypatch.setattr(encoding, "_read_header", full)
    with pytest.raises(MemoryError):
        MPImportance.load(tmp_path / "file", model, guide)
