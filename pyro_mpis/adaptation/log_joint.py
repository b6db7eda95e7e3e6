# SPDX-License-Identifier: Apache-2.0
r"""
The model's log joint density as a function of a learned guide's numbers, and its derivatives.

The model runs at single values, mapped over S points (:mod:`pyro_mpis.programs.mapped`); masks and
scales count, as do the Jacobians of the maps from numbers to values. Sites that are summed over
their support have a level each, and are summed by the package's own contraction, where the points
are a plate around everything.

The Hessian is the **structured** one: the rows of a block in each of its plate elements, and how
they depend on the blocks around it. A product with a vector that has ones at coordinate d of every
element of a block gives row d of the block, and of the blocks inside of it, for all elements at
once: given the blocks around them, elements are independent.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyro
import torch
from pyro import poutine
from pyro.ops.contract import contract_to_tensor
from torch import Tensor

from pyro_mpis._typing import Ordinal, SampleMessage
from pyro_mpis.adaptation.layout import Block
from pyro_mpis.adaptation.parametrisation import Place
from pyro_mpis.factor_graph.evidence import LogSpaceRing
from pyro_mpis.factor_graph.graph import FactorGraph
from pyro_mpis.factor_graph.packed import aligned, dims_of, packed, union
from pyro_mpis.particles.evaluation import Evaluated, summed_over
from pyro_mpis.particles.factors import build_graph
from pyro_mpis.particles.proposals import Particles
from pyro_mpis.programs.densities import density_of
from pyro_mpis.programs.mapped import log_prob_of, run_mapped
from pyro_mpis.programs.messages import counted, is_silent, statements
from pyro_mpis.programs.not_mappable import NotMappableError
from pyro_mpis.programs.runs import Programs
from pyro_mpis.programs.structure import Index, Structure, levels_of
from pyro_mpis.programs.tensors import Mapped, unwrapped

Pair = tuple[int, int]  # a block, and itself or one around it

ROWS = 16  # rows of the Hessian that are computed together


@dataclass(frozen=True)
class Derivatives:
    """The log joint at some points, and means of its derivatives over them."""

    log_joints: Tensor  # (S,)
    gradient: list[Tensor]  # of each block: (*batch dims, D)
    hessian: dict[Pair, Tensor]  # (*batch dims, D of the first, D of the second)


@dataclass(frozen=True)
class LogJoint:
    """
    The log joint density of data and latents at points of the blocks' numbers.

    :param structure: of the model without a guide.
    :param supports: of the sites that are summed over their support: ``(values, *shape)``.
    :param others: values of the latents that have no numbers and are not summed.
    :param coupled: pairs of blocks of which the Hessian is wanted; all if None.
    """

    programs: Programs
    structure: Structure
    blocks: tuple[Block, ...]
    non_centred: frozenset[str] = frozenset()
    supports: Mapping[str, Tensor] = field(default_factory=dict)
    others: Mapping[str, Tensor] = field(default_factory=dict)
    coupled: frozenset[Pair] | None = None

    def __call__(self, numbers: Sequence[Tensor]) -> Tensor:
        """
        Evaluate the log joint; differentiable.

        :param numbers: of each block: ``(S, *batch dims, D)``.
        :return: ``(S,)``, float64.
        :raises NotMappableError: if torch cannot map the model.
        """
        points = {_name(block): z for block, z in zip(self.blocks, numbers, strict=True)}
        return self._summed(points) if self.supports else self._plain(points)

    def _plain(self, points: dict[str, Tensor]) -> Tensor:
        results: list[Mapped] = []

        def at_single_values(values: dict[str, Tensor]) -> None:
            place, sites = self._run(values)
            total = sum((d.sum().double() for d in place.log_derivatives.values()), torch.zeros(()))
            for site in sites.values():
                if not is_silent(site):
                    total = total + _density(site).sum(dtype=torch.double)
            results[:] = [unwrapped(total)]  # it may run again, for what it writes into

        self._mapped(at_single_values, [points])
        (result,) = results
        num_points = len(next(iter(points.values())))
        return result.tensor if result.levels else result.tensor.expand(num_points)

    def _run(self, values: Mapping[str, Tensor]) -> tuple[Place, dict[str, SampleMessage]]:
        """Run the model at single values of the blocks' numbers and of summed sites."""
        numbers: dict[str, Tensor] = {}
        for block in self.blocks:
            numbers |= block.split(values[_name(block)])
        given = {**self.others, **{name: values[name] for name in self.supports}}
        place = Place(numbers, self.non_centred, given)
        with place, poutine.trace() as tracer:
            self.programs.call("model")
        return place, statements(tracer.trace)

    def _mapped(self, function: object, levels: list[dict[str, Tensor]]) -> None:
        try:
            with pyro.validation_enabled(False):
                run_mapped(function, levels, patched=self.programs.patched)  # type: ignore[arg-type]
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            raise NotMappableError(str(error).splitlines()[0] if str(error) else "") from error

    def _summed(self, points: dict[str, Tensor]) -> Tensor:
        """Evaluate where some sites are summed over their support."""
        structure, points_symbol = self._structure_of_points
        num_points = len(next(iter(points.values())))
        sizes = {i.symbol: i.support or num_points for i in structure.indices}
        by_level = [
            {
                name: value
                for symbol in level
                for name, value in (
                    points if symbol == points_symbol else self._values_of(structure, symbol)
                ).items()
            }
            for level in levels_of(structure, sizes)
        ]
        said: dict[str, dict[str, Mapped]] = {}

        def at_single_values(values: dict[str, Tensor]) -> None:
            place, sites = self._run(values)
            for name, site in sites.items():
                parts = {"value": unwrapped(site["value"])} if name in structure.origins else {}
                if not is_silent(site):
                    log_prob = _density(site)
                    if name in place.log_derivatives:
                        log_prob = log_prob + place.log_derivatives[name]
                    dims = structure.summed_dims(structure.model[name])
                    parts["log_prob"] = unwrapped(summed_over(log_prob, dims))
                said[name] = parts

        self._mapped(at_single_values, by_level)
        evaluated = Evaluated({}, said, levels_of(structure, sizes))
        ones = (1,) * structure.max_plate_nesting
        nothing = {points_symbol: torch.zeros((num_points, *ones))}
        particles = Particles({points_symbol: 1}, sizes, self.supports, nothing)
        graph = build_graph(structure, particles, evaluated)
        return _at_each_point(graph, points_symbol)

    def _values_of(self, structure: Structure, symbol: str) -> dict[str, Tensor]:
        return {name: self.supports[name] for name in structure.by_symbol[symbol].sites}

    @property
    def _structure_of_points(self) -> tuple[Structure, str]:
        """Return the structure in which all sites with numbers share one index, and its symbol."""
        names = tuple(part.name for block in self.blocks for part in block.parts)
        summed = [i for i in self.structure.indices if set(i.sites) <= set(self.supports)]
        symbol = next(i.symbol for i in self.structure.indices if i.sites[0] in names)
        points = Index(symbol, names, frozenset())
        return replace(self.structure, indices=(points, *summed)), symbol

    def derivatives(self, numbers: Sequence[Tensor]) -> Derivatives:
        """Evaluate the log joint, its gradient and its structured Hessian."""
        with torch.enable_grad():
            at = [z.detach().requires_grad_() for z in numbers]
            log_joints = self(at)
            gradients = torch.autograd.grad(
                log_joints.sum(), at, create_graph=True, materialize_grads=True
            )
            hessian: dict[Pair, Tensor] = {}
            for block in self.blocks:
                for pair, rows in self._rows(block, at, gradients[block.number]).items():
                    hessian[pair] = rows
        return Derivatives(log_joints.detach(), [g.detach().mean(0) for g in gradients], hessian)

    def _rows(self, block: Block, at: list[Tensor], gradient: Tensor) -> dict[Pair, Tensor]:
        """Return the rows of a block, and its part of those of the blocks inside of it."""
        inside = [
            other
            for other in self.blocks
            if block.number in other.parents
            if self.coupled is None or (other.number, block.number) in self.coupled
        ]
        wanted = [block, *inside]
        size = block.size
        parts: dict[Pair, list[Tensor]] = {(b.number, block.number): [] for b in wanted}
        if gradient.requires_grad:
            for start in range(0, size, ROWS):
                number = min(ROWS, size - start)
                seeds = gradient.new_zeros((number, *gradient.shape))
                for row in range(number):
                    seeds[row, ..., start + row] = 1.0
                products = torch.autograd.grad(
                    gradient,
                    [at[b.number] for b in wanted],
                    seeds,
                    retain_graph=True,
                    is_grads_batched=True,
                    allow_unused=True,
                )
                for b, product in zip(wanted, products, strict=True):
                    if product is None:  # as where the other depends on none of these
                        product = gradient.new_zeros((number, *at[b.number].shape))
                    parts[b.number, block.number].append(product.mean(1).movedim(0, -1))
        result = {}
        for b in wanted:
            rows = parts[b.number, block.number]
            shape = (*b.shape, b.size, size)
            result[b.number, block.number] = (
                torch.cat(rows, -1) if rows else gradient.new_zeros(shape)
            )
        return result


def _name(block: Block) -> str:
    return f"numbers of block {block.number}"


def _density(site: SampleMessage) -> Tensor:
    """Return a site's density as the model counts it."""
    if site["is_observed"]:
        log_prob = density_of(site["fn"], site["value"], validate=True)
    else:
        log_prob = log_prob_of(site["fn"], site["value"])
    return counted(site, log_prob)


def _at_each_point(graph: FactorGraph, points: str) -> Tensor:
    """
    Contract a graph for each particle of an index, as if that were a plate around everything.

    :return: the log evidence at each particle: ``(S,)``.
    """
    plate = frozenset(points)
    index_plates = {s: p | plate for s, p in graph.index_plates.items() if s != points}
    graph = replace(
        graph,
        index_plates=index_plates,
        plate_dims={**graph.plate_dims, points: -graph.max_plate_nesting - 1},
        plate_names={**graph.plate_names, points: "points"},
    )
    tree: OrderedDict[Ordinal, list[Tensor]] = OrderedDict()
    for factor in graph.factors:
        tensor, dims = factor.tensor, factor.dims
        if points not in dims:
            tensor = tensor.expand((graph.sizes[points], *tensor.shape))
            dims = points + dims
        ordinal = graph.with_enclosing(factor.plates) | plate
        tree.setdefault(ordinal, []).append(packed(tensor.view_as(tensor), dims))
    used = {symbol for terms in tree.values() for t in terms for symbol in dims_of(t)}
    result: Tensor = contract_to_tensor(
        tree, used & set(index_plates), target_ordinal=plate, ring=_SmoothRing(graph)
    )
    return result.double()


class _SmoothRing(LogSpaceRing):
    """The same sums with kernels that are differentiable twice, of moderate range alone."""

    def _sum_product(self, terms: Sequence[Tensor], dims: str) -> Tensor:
        layout = "".join(s for s in union(*(dims_of(term) for term in terms)) if s not in dims)
        total = sum(aligned(term, layout + dims).clamp(min=IMPOSSIBLE) for term in terms)
        assert isinstance(total, Tensor)
        summed = list(range(-len(dims), 0))
        return packed(total.logsumexp(summed) if dims else total, layout)


IMPOSSIBLE = -1e30  # in nats, for -inf: the derivative of a sum of nothing but -inf is nan
