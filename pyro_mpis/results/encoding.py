# SPDX-License-Identifier: Apache-2.0
"""
Tensors and plain data in a file that cannot run code.

Nothing is pickled and nothing unpickled, whatever the version of torch. The file has the layout of
safetensors: eight bytes that give the length of a header, the header in JSON with the dtype, shape
and place of each tensor, and the tensors' bytes. All else is plain data and stands as JSON in the
header's metadata: there, ``{tag: content}`` is what JSON has no notation for, a tuple or a tensor
for example, or a dataclass from a fixed list.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import BinaryIO, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from pyro_mpis._version import __version__

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Record = TypeVar("Record")

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


@dataclass(frozen=True)
class Format:
    """
    What the files of one kind hold.

    :param kind: the name of the kind, which stands in the file.
    :param number: to be raised where the same fields come to mean something else.
    :param records: the dataclasses that may be in a file.
    """

    kind: str
    number: int
    records: tuple[type, ...]

    @property
    def by_name(self) -> dict[str, type]:
        """The dataclasses by their names."""
        return {record.__name__: record for record in self.records}

    @property
    def layout(self) -> str:
        """What identifies the meaning of a file: it follows the dataclasses' fields."""
        names = {name: [f.name for f in fields(record)] for name, record in self.by_name.items()}
        digest = hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()
        return f"{self.number}-{digest[:16]}"


def what_cannot_be_kept(tree: object, form: Format) -> str:
    """Return the type of something in a tree that is not plain data; empty if all is."""
    try:
        _Encoder(form.by_name).encode(tree)
    except TypeError as error:
        return str(error)
    return ""


def write(path: str | os.PathLike[str], tree: object, form: Format) -> None:
    """Write a file; a tree with anything but tensors and plain data is a TypeError."""
    encoder = _Encoder(form.by_name)
    content = encoder.encode(tree)
    metadata = {
        "kind": form.kind,
        "layout": form.layout,
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


def read(
    path: str | os.PathLike[str], form: Format, kind: type[Record], device: torch.device
) -> Record:
    """
    Read a file, whoever may have written it.

    :param kind: what the file is to hold.
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
            if metadata["kind"] != form.kind:
                raise ValueError(f"it is of the kind {metadata['kind']!r}")
            layout, writer = metadata["layout"], metadata["version"]
        if layout != form.layout:
            raise ValueError(
                f"'{os.fspath(path)}': written by pyro_mpis {writer}, whose layout of files "
                f"differs from that of {__version__}, which is reading. Load it with pyro_mpis "
                f"{writer}, or run again."
            )
        with _explained(path):
            tensors = [_read_tensor(file, entry, device) for entry in header.values()]
            if file.read(1):
                raise ValueError("it does not end where it should")
            content = json.loads(metadata["content"])
            tree = _Decoder(form.by_name, tensors, device).decode(content)
            if not isinstance(tree, kind):
                raise ValueError("it holds something else")
    return tree


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

    def __init__(self, records: Mapping[str, type]) -> None:
        self.records = records
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
        if self.records.get(kind.__name__) is kind:
            return {kind.__name__: {name: self.encode(part) for name, part in parts_of(value)}}
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

    def __init__(
        self, records: Mapping[str, type], tensors: list[Tensor], device: torch.device
    ) -> None:
        self.records = records
        self.tensors = tensors
        self.device = device

    def decode(self, value: Json) -> object:
        """Decode a tree."""
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((tag, content),) = value.items()
        if tag in self.records:
            named = cast(dict[str, Json], content)
            return self.records[tag](**{name: self.decode(part) for name, part in named.items()})
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


def parts_of(record: object) -> list[tuple[str, object]]:
    """Return the fields of a dataclass, by name."""
    assert is_dataclass(record)
    return [(part.name, getattr(record, part.name)) for part in fields(record)]
