# SPDX-License-Identifier: Apache-2.0
"""
Keep a result in a file, or take it to another device.

Nothing is pickled and nothing unpickled, so that no file can run code, whatever the version of
torch. The file has the layout of safetensors: eight bytes that give the length of a header, the
header in JSON with the dtype, shape and place of each tensor, and the tensors' bytes. All else that
belongs to a result is plain data (the dataclasses of the other modules) and stands as JSON in the
header's metadata: there, ``{tag: content}`` is what JSON has no notation for, a tuple or a tensor
for example, or a dataclass from a fixed list.

Model and guide are code and are not in the file: they are given again when it is read.
"""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import BinaryIO, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_mpis._version import __version__
from pyro_mpis.blocks import BlockSum, Builder, Environment, Ranges, seeded
from pyro_mpis.dependencies import Index, Plate, Site, Structure
from pyro_mpis.factor_graph.evidence import log_evidence
from pyro_mpis.factor_graph.graph import FactorGraph, LogFactor, RaggedPlate, SiteValue
from pyro_mpis.handlers import Name, Programs, quoted
from pyro_mpis.indexing import ElementReads, SiteReads
from pyro_mpis.proposals import Particles

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Tree = TypeVar("Tree")

KIND = "pyro_mpis posterior"
FORMAT = 1  # to be raised where the same fields come to mean something else


@dataclass(frozen=True)
class Settings:
    """The arguments of ``MPImportance`` that are plain data."""

    num_samples: int
    groups: tuple[tuple[str, ...], ...]
    max_plate_nesting: int | None
    memory_limit: int | None
    num_replicates: int
    disable_progbar: bool


@dataclass(frozen=True)
class Arguments:
    """What model and guide were called with."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object]


@dataclass(frozen=True)
class StoredSum:
    """What a file keeps of a :class:`~pyro_mpis.blocks.BlockSum`, and the weights known of it."""

    particles: Particles
    pieces: Mapping[str, int]
    reads: SiteReads | None
    blocks: tuple[Ranges, ...]
    whole: FactorGraph
    log_evidences: Tensor
    weights: Mapping[str, Tensor]

    def restored(
        self, structure: Structure, programs: Programs, environment: Environment
    ) -> BlockSum:
        """Return the sum, to be evaluated by the given programs."""
        builder = Builder(structure, self.particles, programs, environment, self.pieces, self.reads)
        return BlockSum(builder, self.blocks, self.whole, self.log_evidences)


@dataclass(frozen=True)
class Stored:
    """What a file keeps of a result."""

    settings: Settings
    structure: Structure
    sums: tuple[StoredSum, ...]
    dtype: torch.dtype  # the default one of the run
    validate: bool
    arguments: Arguments | None  # None if not all are tensors and plain data


_RECORDS: dict[str, type] = {
    record.__name__: record
    for record in (
        Arguments,
        RaggedPlate,
        ElementReads,
        FactorGraph,
        Index,
        LogFactor,
        Particles,
        Plate,
        Settings,
        Site,
        SiteValue,
        Stored,
        StoredSum,
        Structure,
    )
}
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def pack(
    settings: Settings, sums: list[BlockSum], weights: list[dict[str, Tensor]]
) -> tuple[Stored, str]:
    """
    Collect what a file is to keep.

    :return: that; and the type of an argument that cannot be kept, empty if all can. The
        arguments are left out then.
    """
    builder = sums[0].builder
    arguments = Arguments(builder.programs.args, builder.programs.kwargs)
    unknown = ""
    try:
        _Encoder().encode(arguments)
    except TypeError as error:
        unknown = str(error)
    stored = Stored(
        settings=settings,
        structure=builder.structure,
        sums=tuple(
            StoredSum(
                particles=total.builder.particles,
                pieces=total.builder.pieces,
                reads=total.builder.reads,
                blocks=total.blocks,
                whole=total.whole,
                log_evidences=total.log_evidences,
                weights=known,
            )
            for total, known in zip(sums, weights, strict=True)
        ),
        dtype=builder.environment.dtype,
        validate=builder.environment.validate,
        arguments=None if unknown else arguments,
    )
    return stored, unknown


def write(path: str | os.PathLike[str], stored: Stored) -> None:
    """Write a file."""
    encoder = _Encoder()
    content = encoder.encode(stored)
    metadata = {
        "kind": KIND,
        "layout": _layout(),
        "version": __version__,
        "content": json.dumps(content, separators=(",", ":")),
    }
    header: dict[str, object] = {"__metadata__": metadata}
    start = 0
    for number, tensor in enumerate(encoder.tensors):
        end = start + tensor.nbytes
        header[str(number)] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": [tensor.numel()],
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(os.fspath(path), "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in encoder.tensors:
            file.write(tensor.view(torch.uint8).numpy().data)


def read(path: str | os.PathLike[str], device: torch.device) -> Stored:
    """
    Read a file, whoever may have written it.

    :param device: where the tensors are to be.
    :raises ValueError: if the file is not one of :func:`write`, or of another layout; names it.
    """
    with open(os.fspath(path), "rb") as file:
        with _explained(path):
            length = int.from_bytes(file.read(8), "little")
            if length > os.fstat(file.fileno()).st_size:
                raise ValueError("it has no header")
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__")
            if metadata["kind"] != KIND:
                raise ValueError(f"it is of the kind {metadata['kind']!r}")
            layout, writer = metadata["layout"], metadata["version"]
        if layout != _layout():
            raise ValueError(
                f"'{os.fspath(path)}': written by pyro_mpis {writer}, whose layout of files "
                f"differs from that of {__version__}, which is reading. Load it with pyro_mpis "
                f"{writer}, or run again."
            )
        with _explained(path):
            tensors = [_read_tensor(file, entry, device) for entry in header.values()]
            if file.read(1):
                raise ValueError("it does not end where it should")
            stored = _Decoder(tensors, device).decode(json.loads(metadata["content"]))
            if not isinstance(stored, Stored):
                raise ValueError("it holds something else")
    return stored


@contextmanager
def _explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say which file is at fault: a damaged one may fail in any way."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"'{os.fspath(path)}': not a posterior that MPImportance.save wrote, or damaged: "
            f"{type(error).__name__}: {error}."
        ) from error


def _layout() -> str:
    """Return what identifies the meaning of a file: it follows the dataclasses' fields."""
    names = {name: [f.name for f in fields(record)] for name, record in _RECORDS.items()}
    digest = hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()
    return f"{FORMAT}-{digest[:16]}"


def _read_tensor(file: BinaryIO, entry: Mapping[str, object], device: torch.device) -> Tensor:
    """Read the tensor that comes next."""
    dtype = _DTYPES[cast(str, entry["dtype"])]
    start, end = cast(list[int], entry["data_offsets"])
    data = bytearray(file.read(end - start))  # a negative number reads all: too much, see below
    (number,) = cast(list[int], entry["shape"])
    if len(data) != number * dtype.itemsize:
        raise ValueError("a tensor is cut short")
    if not number:  # torch.frombuffer wants something in the buffer
        return torch.empty(0, dtype=dtype, device=device)
    return torch.frombuffer(data, dtype=dtype).to(device)


class _Encoder:
    """Turns a tree of plain data into JSON, and collects its tensors, flattened."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._known: dict[tuple[int, torch.dtype, int], int] = {}

    def encode(self, value: object) -> Json:
        """
        Encode a tree.

        :raises TypeError: if there is something in it that is not plain data: the message is
            what.
        """
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return cast(Json, value)
        if isinstance(value, Tensor):
            return {"tensor": [self._add(value), *value.shape]}
        if kind is list:
            return self._all(cast(list[object], value))
        if kind in (tuple, frozenset, torch.Size):
            items = cast(tuple[object, ...], value)
            ordered = sorted(items, key=repr) if kind is frozenset else items
            return {kind.__name__: self._all(ordered)}
        if kind is dict:
            pairs = cast(dict[object, object], value).items()
            return {"dict": [self._all(pair) for pair in pairs]}
        if kind is slice:
            part = cast(slice, value)
            return {"slice": self._all((part.start, part.stop, part.step))}
        if isinstance(value, torch.dtype) and value in _DTYPE_NAMES:
            return {"dtype": _DTYPE_NAMES[value]}
        if isinstance(value, torch.device):
            return {"device": None}
        if _RECORDS.get(kind.__name__) is kind:
            return {kind.__name__: {name: self.encode(part) for name, part in _parts(value)}}
        raise TypeError(f"{kind.__module__}.{kind.__qualname__}")

    def _all(self, items: "tuple[object, ...] | list[object]") -> list[Json]:
        return [self.encode(item) for item in items]

    def _add(self, tensor: Tensor) -> int:
        """Note a tensor, and views of the same numbers once; return its number."""
        if tensor.layout is not torch.strided or tensor.dtype not in _DTYPE_NAMES:
            raise TypeError(f"a tensor of {tensor.layout} and {tensor.dtype}")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        key = (flat.data_ptr(), flat.dtype, flat.numel())
        if key not in self._known:
            self._known[key] = len(self.tensors)
            self.tensors.append(flat)
        return self._known[key]


class _Decoder:
    """The inverse of :class:`_Encoder`; calls nothing but the constructors listed here."""

    def __init__(self, tensors: list[Tensor], device: torch.device) -> None:
        self.tensors = tensors
        self.device = device

    def decode(self, value: Json) -> object:
        """Decode a tree."""
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((tag, content),) = value.items()
        if tag in _RECORDS:
            named = cast(dict[str, Json], content)
            return _RECORDS[tag](**{name: self.decode(part) for name, part in named.items()})
        if tag == "device":
            return self.device
        if tag == "dtype":
            return _DTYPES[cast(str, content)]
        items = cast(list[object], self.decode(content))
        if tag == "tensor":
            number, *shape = cast(list[int], items)
            return self.tensors[number].reshape(shape)
        if tag == "dict":
            return dict(cast(list[tuple[object, object]], items))
        if tag == "slice":
            return slice(*items)
        makers: dict[str, Callable[[list[object]], object]] = {
            "tuple": tuple,
            "frozenset": frozenset,
            "Size": lambda sizes: torch.Size(cast(list[int], sizes)),
        }
        return makers[tag](items)


def _parts(record: object) -> list[tuple[str, object]]:
    assert is_dataclass(record)
    return [(part.name, getattr(record, part.name)) for part in fields(record)]


def check_structure(path: str | os.PathLike[str], stored: Structure, found: Structure) -> None:
    """
    Check that the model and guide given are those of the file.

    :raises ValueError: if not; names a site that differs.
    """
    advice = "Load it with the model, the guide, and, if given, the arguments of that run."
    where = f"'{os.fspath(path)}'"
    programs: tuple[Name, ...] = ("guide", "model")
    for program in programs:
        old, new = _described(stored, program), _described(found, program)
        for name in {**old, **new}:
            if old.get(name) != new.get(name):
                raise ValueError(
                    f"{where}: site '{name}' of the {program} is not as it was in the run: "
                    f"{new.get(name, 'absent')}; it was {old.get(name, 'absent')}. {advice}"
                )
    if stored != found:
        raise ValueError(
            f"{where}: the same sites as in the run, {quoted(set(stored.origins))}, but in another "
            f"order, or not the same of them enumerated. {advice}"
        )


def _described(structure: Structure, program: Name) -> dict[str, str]:
    """Describe the sites of a program in words; symbols would depend on how many there are."""
    sites: Mapping[str, Site] = getattr(structure, program)
    result = {}
    for name, site in sites.items():
        plates = quoted({structure.plates[symbol].name for symbol in site.plates})
        result[name] = (
            f"batch shape {tuple(site.batch_shape)}, {site.event_dim} event dims, "
            f"in plates {plates or 'none'}, reading {quoted(set(site.reads)) or 'nothing'}"
        )
    return result


def check_evaluation(path: str | os.PathLike[str], total: BlockSum) -> None:
    """
    Check that a sum whose factors are not kept is evaluated as it was.

    :raises ValueError: if a block's evidence is another than in the file.
    """
    if total.whole.factors:
        return
    block = int(total.log_evidences.argmax())
    with seeded(0):
        found = total.job(block, log_evidence)().double()
    if not torch.allclose(found, total.log_evidences[block], rtol=1e-4, atol=1e-3):
        raise ValueError(
            f"'{os.fspath(path)}': particles that were weighed at log evidence "
            f"{float(total.log_evidences[block]):.4f} in the run are at {float(found):.4f} now. A "
            "result of several blocks or replicates, or saved without factors, is evaluated again "
            "by model and guide: give them the parameters that they had (the param store's, a "
            "module's state_dict), and the arguments of that run."
        )


def resolved(device: torch.device | str) -> torch.device:
    """Return a device with its number: "cuda:0" for "cuda"."""
    return torch.empty(0, device=device).device


def moved(tree: Tree, device: torch.device) -> Tree:
    """
    Take all tensors of a result to a device; those that are there already are shared.

    Model and guide are left as they are, and so are objects among their arguments that are neither
    tensors nor tuples, lists or dictionaries.
    """

    def move(tensor: Tensor) -> Tensor:  # a param that is there stays the very same object
        return tensor if tensor.device == device else tensor.detach().to(device)

    return cast(Tree, _mapped(tree, move))


def num_bytes(tree: object) -> int:
    """Return the memory that the tensors of a result take, views of the same memory once."""
    storages: dict[tuple[torch.device, int], int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
        return tensor

    _mapped(tree, count)
    return sum(storages.values())


def _mapped(tree: object, function: Callable[[Tensor], Tensor]) -> object:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, torch.device):
        return function(torch.empty(0, device=tree)).device
    if isinstance(tree, dict):
        pairs = [(key, _mapped(value, function)) for key, value in tree.items()]
        same = copy.copy(tree)  # an OrderedDict, say
        same.update(pairs)
        return same
    if isinstance(tree, tuple | list) and not isinstance(tree, torch.Size):
        items = [_mapped(item, function) for item in tree]
        make: Callable[[list[object]], object] = getattr(type(tree), "_make", type(tree))
        return make(items)  # a named tuple has its own way
    if isinstance(tree, Constraint):  # of a param; its bounds may be tensors
        moved = copy.copy(tree)
        vars(moved).update({key: _mapped(value, function) for key, value in vars(tree).items()})
        return moved
    if type(tree).__module__.startswith("pyro_mpis.") and is_dataclass(tree):
        skipped = ("model", "guide") if isinstance(tree, Programs) else ()
        parts = {n: _mapped(part, function) for n, part in _parts(tree) if n not in skipped}
        return replace(tree, **parts)  # type: ignore[type-var]
    return tree
