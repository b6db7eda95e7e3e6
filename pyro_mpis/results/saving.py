# SPDX-License-Identifier: Apache-2.0
"""
Keep a result in a file, or take it to another device.

What a file holds of a result is plain data and tensors: the dataclasses of the other modules. Model
and guide are code and are not in the file: they are given again when it is read, and then checked
against what the file says of them. How the file is written stands in
:mod:`~pyro_mpis.results.encoding`.
"""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_mpis._warnings import warn
from pyro_mpis.factor_graph.graph import FactorGraph, LogFactor, RaggedPlate, SiteValue
from pyro_mpis.options import Options
from pyro_mpis.particles.memory import Cut
from pyro_mpis.particles.probes import ElementReads, SiteReads
from pyro_mpis.particles.proposals import Particles
from pyro_mpis.pieces import Ranges
from pyro_mpis.planning import Plan, analysed
from pyro_mpis.programs.environment import Environment, seeded
from pyro_mpis.programs.runs import Programs
from pyro_mpis.programs.structure import Index, Obstacle, Plate, Site, Structure
from pyro_mpis.replicate import BlockSum, Replicate
from pyro_mpis.results import encoding
from pyro_mpis.results.encoding import Format, parts_of, what_cannot_be_kept
from pyro_mpis.results.same_programs import MADE_BY_ADAPT, check_evaluation, check_structure

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class Settings:
    """The arguments of ``MPImportance`` that are plain data."""

    num_samples: int | Mapping[str | None, int]
    groups: tuple[tuple[str, ...], ...]
    shared_plates: tuple[str, ...]
    max_plate_nesting: int | None
    memory_limit: int | None
    stratified: bool
    num_replicates: int
    disable_progbar: bool


@dataclass(frozen=True)
class Arguments:
    """What model and guide were called with."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object]


@dataclass(frozen=True)
class StoredSum:
    """What a file keeps of a :class:`~pyro_mpis.replicate.BlockSum`, and its weights so far."""

    particles: Particles
    pieces: Mapping[str, int]
    reads: SiteReads | None
    blocks: tuple[Ranges, ...]
    whole: FactorGraph
    log_evidences: Tensor
    weights: Mapping[str, Tensor]

    def restored(
        self, stored: "Stored", programs: Programs, environment: Environment, options: Options
    ) -> BlockSum:
        """Return the sum, to be evaluated by the given programs."""
        programs = replace(programs, patched=stored.patched, one_by_one=stored.one_by_one)
        cut = Cut({}, self.pieces)
        plan = Plan(stored.structure, programs, options, cut, environment=environment)
        replicate = Replicate(plan, self.particles, self.reads)
        return BlockSum(replicate, self.blocks, self.whole, self.log_evidences)


@dataclass(frozen=True)
class Stored:
    """What a file keeps of a result."""

    settings: Settings
    structure: Structure
    sums: tuple[StoredSum, ...]
    dtype: torch.dtype  # the default one of the run
    validate: bool
    patched: bool  # see Programs
    one_by_one: frozenset[str]  # likewise
    arguments: Arguments | None  # None if not all are tensors and plain data

    def __post_init__(self) -> None:
        """Refuse what no result is."""
        if not self.sums or not self.dtype.is_floating_point:
            raise ValueError("it has no particles, or its default dtype is not a floating one")


FORMAT = Format(
    kind="pyro_mpis posterior",
    number=2,
    records=(
        Arguments,
        RaggedPlate,
        ElementReads,
        FactorGraph,
        Index,
        LogFactor,
        Obstacle,
        Particles,
        Plate,
        Settings,
        Site,
        SiteValue,
        Stored,
        StoredSum,
        Structure,
    ),
)


def save(
    path: str | os.PathLike[str],
    settings: Settings,
    sums: list[BlockSum],
    weights: list[dict[str, Tensor]],
    *,
    factors: bool,
) -> None:
    """Write a result to a file; see :meth:`pyro_mpis.MPImportance.save`."""
    if sums[0].replicate.programs.subsamples is not None:
        raise NotImplementedError(
            "a plate selects a subsample, which a file does not keep: run on all of the data, or "
            "keep the numbers that moments() and marginals() give."
        )
    if not factors and not sums[0].traces:
        sums = [replace(total, whole=replace(total.whole, factors=())) for total in sums]
    stored, unknown = pack(settings, sums, weights)
    if unknown:
        warn(
            f"'{os.fspath(path)}': the arguments of .run are not kept, because one of them is "
            f"{unknown}, neither a tensor nor plain data. Give them again: .load(path, model, "
            "guide, args=..., kwargs=...)."
        )
    write(path, stored)


def arguments(
    path: str | os.PathLike[str],
    stored: "Stored",
    args: Sequence[object] | None,
    kwargs: Mapping[str, object] | None,
) -> Arguments:
    """Return the arguments that were given, or those of the file where none were."""
    if args is not None or kwargs is not None:
        return Arguments(tuple(args or ()), dict(kwargs or {}))
    if stored.arguments is None:
        raise ValueError(
            f"'{os.fspath(path)}': it does not hold the arguments of the run, because not all of "
            "them were tensors and plain data. Give them: .load(path, model, guide, args=..., "
            "kwargs=...)."
        )
    return stored.arguments


def sums_of(
    path: str | os.PathLike[str], stored: "Stored", programs: Programs, options: Options
) -> list[BlockSum]:
    """
    Return the sums of a file's replicates.

    :raises ValueError: if the programs are not those of the run.
    """
    environment = replace(Environment(), dtype=stored.dtype, validate=stored.validate)
    try:
        with seeded(0), environment.entered():
            programs, structure, *_ = analysed(programs, options)
    except ValueError as error:
        raise ValueError(
            f"'{os.fspath(path)}': model and guide do not fit the saved run. {error} If the run "
            f"had a learned proposal, give {MADE_BY_ADAPT}."
        ) from error
    reads_more = check_structure(
        path,
        stored.structure,
        structure,
        sampled=stored.one_by_one,
        together=any(f.name == "number of particles" for f in stored.sums[0].whole.factors),
    )
    sums = [kept.restored(stored, programs, environment, options) for kept in stored.sums]
    first = sums[0]
    if reads_more:  # whether that is so here is seen where it is evaluated, factors or not
        first = replace(first, whole=replace(first.whole, factors=()))
    check_evaluation(path, first)
    return sums


def pack(
    settings: Settings, sums: list[BlockSum], weights: list[dict[str, Tensor]]
) -> tuple[Stored, str]:
    """
    Collect what a file is to keep.

    :return: the content of the file, and the type of an argument that cannot be kept (empty if all
        can). If one cannot, the file is without arguments.
    """
    replicate = sums[0].replicate
    arguments = Arguments(replicate.programs.args, replicate.programs.kwargs)
    obstacle = what_cannot_be_kept(arguments, FORMAT)
    stored = Stored(
        settings=settings,
        structure=replicate.structure,
        sums=tuple(
            StoredSum(
                particles=block_sum.replicate.particles,
                pieces=block_sum.replicate.plan.cut.pieces,
                reads=block_sum.replicate.reads,
                blocks=block_sum.blocks,
                whole=block_sum.whole,
                log_evidences=block_sum.log_evidences,
                weights=weights_of_sum,
            )
            for block_sum, weights_of_sum in zip(sums, weights, strict=True)
        ),
        dtype=replicate.environment.dtype,
        validate=replicate.environment.validate,
        patched=replicate.programs.patched,
        one_by_one=replicate.programs.one_by_one,
        arguments=None if obstacle else arguments,
    )
    return stored, obstacle


def write(path: str | os.PathLike[str], stored: Stored) -> None:
    """Write a file."""
    encoding.write(path, stored, FORMAT)


def read(path: str | os.PathLike[str], device: torch.device) -> Stored:
    """
    Read a file, whoever may have written it.

    :param device: where the tensors are to be.
    :raises ValueError: if the file is not one of :func:`write`, or of another layout; names it.
    """
    return encoding.read(path, FORMAT, Stored, device)


def resolved(device: torch.device | str) -> torch.device:
    """Return a device with its number: "cuda:0" for "cuda"."""
    return torch.empty(0, device=device).device


def moved(tree: Tree, device: torch.device) -> Tree:
    """
    Take all tensors of a result to a device. Tensors that are there already are shared.

    Model and guide stay as they are. So do their arguments, except tensors, tuples, lists and
    dictionaries.
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
    if isinstance(tree, tuple | list):
        items = [_mapped(item, function) for item in tree]
        make: Callable[[list[object]], object] = getattr(type(tree), "_make", type(tree))
        return make(items)  # a named tuple has its own way
    if isinstance(tree, Constraint):  # of a param; its bounds may be tensors
        moved = copy.copy(tree)
        vars(moved).update({key: _mapped(value, function) for key, value in vars(tree).items()})
        return moved
    if type(tree).__module__.startswith("pyro_mpis.") and is_dataclass(tree):
        skipped = ("model", "guide") if isinstance(tree, Programs) else ()
        parts = {n: _mapped(part, function) for n, part in parts_of(tree) if n not in skipped}
        return replace(tree, **parts)  # type: ignore[type-var]
    return tree
