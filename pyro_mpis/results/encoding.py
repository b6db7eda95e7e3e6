# SPDX-License-Identifier: Apache-2.0
"""
Tensors and plain data in a file that cannot run code.

Nothing is pickled and nothing unpickled, whatever the version of torch. The file has the layout of
safetensors: eight bytes that give the length of a header, the header in JSON with the dtype, shape
and place of each tensor, and the tensors' bytes. All else is plain data and stands as JSON in the
header's metadata: there, ``{tag: content}`` is what JSON has no notation for, a tuple or a tensor
for example, or a dataclass from a fixed list.

Two checksums stand in the metadata, so that a file is refused if a single bit of it has changed:
first that of the header, taken with zeros in its own place, then that of the tensors' bytes. They
tell of damage. Whoever writes a file with checksums that fit can still write any numbers into it.
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
from pyro_mpis.results._typed import check_fields

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Record = TypeVar("Record")

BEFORE = b'{"__metadata__":{"checksum":"'  # what a header begins with; its checksum follows
NO_CHECKSUM = b"0" * 64  # in the place of the checksum while that is taken

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
    parts = [tensor.view(torch.uint8).numpy().data for tensor in encoder.tensors]
    metadata = {
        "checksum": NO_CHECKSUM.decode(),
        "tensors": _checksum(*parts).decode(),
        "kind": form.kind,
        "layout": form.layout,
        "version": __version__,
        "content": json.dumps(content, separators=(",", ":")),
    }
    header: dict[str, object] = {"__metadata__": metadata}
    start = 0
    for number, tensor in enumerate(encoder.tensors):
        header[str(number)] = _entry(tensor.dtype, tensor.numel(), start)
        start += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text = BEFORE + _checksum(text) + text[len(BEFORE) + len(NO_CHECKSUM) :]
    with open(os.fspath(path), "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            file.write(part)


def read(
    path: str | os.PathLike[str], form: Format, kind: type[Record], device: torch.device
) -> Record:
    """
    Read a file, whoever may have written it.

    :param kind: what the file is to hold.
    :param device: where the tensors are to be.
    :raises ValueError: if the file is not one of :func:`write`, is damaged, or is of another
        layout; names it.
    """
    with open(os.fspath(path), "rb") as file, _explained(path):
        header, signed = _read_header(file)
        metadata = _checked_metadata(header.pop("__metadata__"), form)
        if not signed:
            raise ValueError("its header has no checksum")
        tensors = _read_tensors(file, header, metadata["tensors"])
        tensors = [tensor.to(device) for tensor in tensors]
        content = json.loads(metadata["content"])
        tree = _Decoder(form.by_name, tensors, device).decode(content)
        if not isinstance(tree, kind):
            raise ValueError("it holds something else")
    return tree


class _OtherLayout(Exception):
    """The file is of another layout than that of its reader."""


@contextmanager
def _explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say which file is at fault. A damaged one may fail in any way but for want of memory."""
    try:
        yield
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except _OtherLayout as error:
        raise ValueError(f"'{os.fspath(path)}': {error}") from error
    except Exception as error:
        raise ValueError(
            f"'{os.fspath(path)}': not a posterior that MPImportance.save wrote, or damaged: "
            f"{type(error).__name__}: {error}."
        ) from error


def _checksum(*parts: "bytes | bytearray | memoryview") -> bytes:
    hasher = hashlib.blake2b(digest_size=len(NO_CHECKSUM) // 2)
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest().encode()


def _entry(dtype: torch.dtype, number: int, start: int) -> dict[str, object]:
    """Say what a tensor of one dim is, and where its bytes are."""
    end = start + number * dtype.itemsize
    return {"dtype": _DTYPE_NAMES[dtype], "shape": [number], "data_offsets": [start, end]}


def _read_header(file: BinaryIO) -> tuple[dict[str, object], bool]:
    """
    Read the header.

    :return: that; and whether it has a checksum, which then is right. Older files have none.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > _bytes_left(file):
        raise ValueError("it has no header")
    text = file.read(length)
    signed, end = text.startswith(BEFORE), len(BEFORE) + len(NO_CHECKSUM)
    if signed and text[len(BEFORE) : end] != _checksum(BEFORE, NO_CHECKSUM, text[end:]):
        raise ValueError("its header is not as it was written")
    header = json.loads(text.decode())
    if not isinstance(header, dict):
        raise ValueError("its header is not a table")
    return header, signed


def _checked_metadata(metadata: object, form: Format) -> dict[str, str]:
    """Check that a file is of the kind and the layout that its reader knows."""
    texts = cast(dict[str, str], metadata)
    if not isinstance(metadata, dict) or not all(isinstance(t, str) for t in metadata.values()):
        raise ValueError("its metadata are not all texts")
    if texts["kind"] != form.kind:
        raise ValueError(f"it is of the kind {texts['kind']!r}")
    if texts["layout"] != form.layout:
        raise _OtherLayout(
            f"written by pyro_mpis {texts['version']} in the layout {texts['layout']}, but "
            f"pyro_mpis {__version__}, which is reading, knows the layout {form.layout} alone. "
            "Load it with the pyro_mpis that wrote it, or run again."
        )
    return texts


def _read_tensors(file: BinaryIO, entries: Mapping[str, object], checksum: str) -> list[Tensor]:
    """Read the tensors, which follow each other without a gap up to the end of the file."""
    end, size, buffers = 0, _bytes_left(file), []
    for number, (name, entry) in enumerate(entries.items()):
        dtype, length = _described(entry)
        if name != str(number) or entry != _entry(dtype, length, end):
            raise ValueError(f"tensor {name} is not where it should be")
        end += length * dtype.itemsize
        if end > size:
            raise ValueError(f"tensor {name} is cut short")
        buffers.append((dtype, bytearray(file.read(length * dtype.itemsize))))
    if end != size:
        raise ValueError("it does not end where it should")
    if _checksum(*(data for _, data in buffers)).decode() != checksum:
        raise ValueError("its numbers are not as they were written")
    return [  # torch.frombuffer wants something in the buffer
        torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        for dtype, data in buffers
    ]


def _described(entry: object) -> tuple[torch.dtype, int]:
    """Return the dtype of a tensor and the number of its elements."""
    table = cast(dict[str, object], entry)
    (length,) = cast(list[int], table["shape"])
    start, end = cast(list[int], table["data_offsets"])
    if not all(type(number) is int and number >= 0 for number in (length, start, end)):
        raise ValueError("a size of a tensor is not a number")
    return _DTYPES[cast(str, table["dtype"])], length


def _bytes_left(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size - file.tell()


class _Encoder:
    """Turns a tree of plain data into JSON, and collects its tensors, flattened."""

    def __init__(self, records: Mapping[str, type]) -> None:
        self.records = records
        self.tensors: list[Tensor] = []
        self._numbers: dict[tuple[int, torch.dtype, int], int] = {}

    def encode(self, value: object) -> Json:
        """
        Encode a tree.

        :raises TypeError: if something in it is not plain data. The message names its type.
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
        if key not in self._numbers:
            self._numbers[key] = len(self.tensors)
            self.tensors.append(flat)
        return self._numbers[key]


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
            record = self.records[tag](**{n: self.decode(part) for n, part in named.items()})
            check_fields(record)
            return record
        if tag == "device":
            return self.device
        if tag == "dtype":
            return _DTYPES[cast(str, content)]
        items = cast(list[object], self.decode(content))
        if tag == "tensor":
            number, *shape = cast(list[int], items)
            if not all(type(size) is int and size >= 0 for size in (number, *shape)):
                raise ValueError("a size of a tensor is not a number")
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
