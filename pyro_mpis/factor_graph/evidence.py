# SPDX-License-Identifier: Apache-2.0
r"""
Evidence by plated sum-product.

Eq. (18) of [1], with :math:`r_k` of (19) split into a small tensor per site as in (20)-(22):

.. math:: P(z) = K^{-n} \sum_{k_1 \dots k_n} \prod_i f_i(k_i, k_{\mathrm{pa}(i)}). \quad (23)

Plates are Pyro's: :func:`pyro.ops.contract.contract_to_tensor` (Obermeyer et al. 2019) eliminates
the indices of the innermost plates, multiplies over the plate and goes outwards. It takes a ring;
ours is :class:`LogSpaceRing`, which takes its order from :mod:`~pyro_mpis.factor_graph.order`, its
sums from :mod:`~pyro_mpis.factor_graph.logspace` and its products over plates from
:mod:`~pyro_mpis.factor_graph.ragged`. Products over plates, and messages after them, are in
float64, as is a step whose result is so large that single precision would lose small terms
beside it.

[1] Bowyer, Heap and Aitchison (2024), UAI, PMLR 244:394-417.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import Ring
from torch import Tensor

from pyro_mpis._typing import Ordinal
from pyro_mpis.factor_graph import order
from pyro_mpis.factor_graph.graph import FactorGraph, LogFactor
from pyro_mpis.factor_graph.logspace import log_matmul, logsumexp, sum_in_double
from pyro_mpis.factor_graph.order import Step
from pyro_mpis.factor_graph.packed import aligned, dims_of, packed, renaming, union
from pyro_mpis.factor_graph.ragged import product_over

# In nats. Above, numbers of single precision are 1/2048 and more apart: a term is lost beside them.
LARGE = 2.0**12
STACK_ELEMENTS = 2**16  # of a term, above which stacking copies more than it saves
STACK = "\0"  # the dim of stacked terms: no symbol of an index or a plate


def log_evidence(graph: FactorGraph, factors: Sequence[LogFactor] | None = None) -> Tensor:
    """
    Estimate the log evidence (18): sum over every index, multiply over every plate.

    The exponential of the result is unbiased; the result itself is biased low. Pure: draws
    nothing, changes nothing.

    :param factors: in place of the graph's own, for example with source terms added.
    :return: a scalar in nats, differentiable in every factor.
    :raises NotImplementedError: if plates cross: the cost would be exponential in their size.
    """
    return contract(graph, graph.factors if factors is None else factors, LogSpaceRing(graph))


def contract(graph: FactorGraph, factors: Sequence[LogFactor], ring: "LogSpaceRing") -> Tensor:
    """Contract log factors to a scalar with the given ring."""
    tree: OrderedDict[Ordinal, list[Tensor]] = OrderedDict()
    used: set[str] = set()
    for factor in factors:
        tensor = packed(factor.tensor.view_as(factor.tensor), factor.dims)
        tree.setdefault(graph.with_enclosing(factor.plates), []).append(tensor)
        used |= set(factor.dims)
    sum_dims = used & set(graph.index_plates)
    _check_crossing(graph, factors)
    result: Tensor = contract_to_tensor(tree, sum_dims, ring=ring)  # (23)
    return result


def reduced(graph: FactorGraph) -> FactorGraph:
    """Sum the log factors over the plates that hold no index: so are those of observations."""
    occupied = frozenset[str]().union(*map(graph.with_enclosing, graph.index_plates.values()))
    for inner, plate in graph.ragged.items():
        occupied |= inner | frozenset(plate.outer)
    factors = tuple(
        over_plates(graph, factor, factor.plates - occupied) for factor in graph.factors
    )
    return replace(graph, factors=factors)


def over_plates(graph: FactorGraph, factor: LogFactor, plates: Ordinal) -> LogFactor:
    """Multiply a factor over plates that hold none of its indices: sum its log, in float64."""
    positions = [place for place, symbol in enumerate(factor.dims) if symbol in plates]
    if not positions:
        return factor
    dims = "".join(symbol for symbol in factor.dims if symbol not in plates)
    tensor = sum_in_double(factor.tensor, positions)
    scale = graph.scale_of(plates & factor.plates)
    if scale != 1.0:
        tensor = tensor * scale
    return LogFactor(factor.name, tensor, dims, factor.plates - plates)


@dataclass(frozen=True)
class Elimination:
    """One step of a contraction: sum the product of ``terms`` over some dims."""

    terms: tuple[Tensor, ...]  # packed
    summed: str  # the dims


class Record:
    """
    The eliminations of a contraction, in order; all are let go where they hold too much memory.

    :param factors: what is in memory anyhow.
    :param most: how many bytes of messages to hold.
    """

    def __init__(self, factors: Iterable[LogFactor], most: float) -> None:
        self.steps: list[Elimination] | None = []
        self._most = most
        self._bytes = 0
        self._known = {factor.tensor.untyped_storage().data_ptr() for factor in factors}

    def add(self, terms: Sequence[Tensor], summed: str) -> None:
        """Note a step."""
        if self.steps is None:
            return
        for term in terms:
            storage = term.untyped_storage()
            if storage.data_ptr() not in self._known:
                self._known.add(storage.data_ptr())
                self._bytes += storage.nbytes()
        self.steps.append(Elimination(tuple(terms), summed))
        if self._bytes > self._most:
            self.steps = None


class LogSpaceRing(Ring):
    """
    Sums and products of packed tensors in log space.

    :param graph: for the sizes of the dims and the ragged plates.
    :param record: where to note each elimination, for sampling.
    """

    def __init__(
        self,
        graph: FactorGraph,
        record: Record | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = graph
        self._dim_to_size = dict(graph.sizes)
        self._record = record

    def sumproduct(self, terms: Sequence[Tensor], dims: Iterable[str]) -> Tensor:
        """Multiply packed tensors and sum over ``dims``, pair by pair."""
        if not terms:
            return packed(torch.zeros((), dtype=self._graph.dtype, device=self._graph.device), "")
        on_cpu = self._graph.device.type == "cpu"
        steps = order.all_steps(
            [dims_of(term) for term in terms], set(dims), self._dim_to_size, on_cpu
        )
        tensors = dict(enumerate(terms))
        for step in steps:
            for number in step.operands[:-1] if not step.summed else ():
                if number < len(terms) and self._is_large(tensors[number]):
                    tensors[number] = _in_double(tensors[number])
        for wave in order.in_waves(steps):
            for group in _alike(wave, tensors):
                operands = [[tensors.pop(number) for number in step.operands] for step in group]
                tensors |= self._eliminate_all(group, operands)
        (result,) = tensors.values()
        return result

    def _eliminate_all(
        self, steps: Sequence[Step], terms: Sequence[Sequence[Tensor]]
    ) -> dict[int, Tensor]:
        """
        Take steps that are alike: as one on stacked terms, if they are several.

        :param terms: the operands of each step.
        :return: the results, by their numbers.
        """
        if self._record is not None:
            terms = [
                self._noted(operands, step.summed)
                for step, operands in zip(steps, terms, strict=True)
            ]
        first = steps[0]
        if len(steps) == 1:
            return {first.result: self._sum_product(terms[0], first.summed)}
        stacked = [
            packed(torch.stack(operands), STACK + dims_of(operands[0]))
            for operands in zip(*terms, strict=True)
        ]
        result = self._sum_product(stacked, first.summed)
        layout = dims_of(result).replace(STACK, "")
        result = aligned(result, STACK + layout)
        canonical = renaming([dims_of(term) for term in terms[0]])
        results = {}
        for step, operands, part in zip(steps, terms, result.unbind(), strict=True):
            back = {v: k for k, v in renaming([dims_of(term) for term in operands]).items()}
            results[step.result] = packed(part, "".join(back[canonical[s]] for s in layout))
        return results

    def _noted(self, terms: Sequence[Tensor], dims: str) -> list[Tensor]:
        """
        Note a step, and sum each dim that only one of its terms has.

        These are eliminations of their own: together with the dims that terms share, they would
        have more combinations than any of the terms has entries.
        """
        assert self._record is not None
        uses = Counter(symbol for term in terms for symbol in dims_of(term))
        alone = "".join(symbol for symbol in dims if uses[symbol] == 1)
        left = []
        for term in terms:
            own = "".join(symbol for symbol in dims_of(term) if symbol in alone)
            if own:
                self._record.add([term], own)
            left.append(_sum_alone(term, own))
        shared = "".join(symbol for symbol in dims if uses[symbol] > 1)
        if shared:
            self._record.add(left, shared)
        return left

    def _sum_product(self, terms: Sequence[Tensor], dims: str) -> Tensor:
        """Multiply and sum, in float64 if the result is large."""
        result = sum_product(terms, dims)
        if self._is_large(result):
            result = sum_product([_in_double(term) for term in terms], dims)
        return result

    def _is_large(self, term: Tensor) -> bool:
        """
        Whether single precision is too coarse to add something to a term.

        What counts are its largest entries at each plate element. The others are those of particles
        without weight.
        """
        if term.dtype == torch.float64 or term.numel() == 0:
            return False
        # As in memory, and the outermost dim first: maxima in another order take ten times as long.
        order_in_memory = sorted(range(term.dim()), key=lambda dim: -term.stride()[dim])
        highest = term.detach().permute(order_in_memory)
        if max(abs(float(end)) for end in highest.aminmax()) <= LARGE:
            return False
        for place, dim in enumerate(order_in_memory):
            if dims_of(term)[dim] in self._graph.index_plates:
                highest = highest.amax(place, keepdim=True)
        return bool((highest.abs() > LARGE).any())

    def product(self, term: Tensor, ordinal: Ordinal) -> Tensor:
        """
        Multiply a packed tensor over the plates of ``ordinal``.

        That of a minibatch stands for that of all elements: its log is scaled.
        """
        result = product_over(self._graph, term, ordinal)
        scale = self._graph.scale_of(ordinal)
        return result if scale == 1.0 else packed(result * scale, dims_of(result))

    def inv(self, term: Tensor) -> Tensor:
        """Refuse: nothing is divided here."""
        raise NotImplementedError


def _in_double(term: Tensor) -> Tensor:
    return packed(term.double(), dims_of(term))


def _alike(steps: Sequence[Step], tensors: Mapping[int, Tensor]) -> list[list[Step]]:
    """Group steps that are the same but for the names of their dims, as those of a chain are."""
    if len(steps) == 1:
        return [list(steps)]
    groups: dict[object, list[Step]] = {}
    for step in steps:
        terms = [tensors[operand] for operand in step.operands]
        if max(term.numel() for term in terms) > STACK_ELEMENTS:
            groups[step.result] = [step]
            continue
        names = renaming([dims_of(term) for term in terms])
        shape = tuple(
            (tuple(names[s] for s in dims_of(term)), term.shape, term.dtype) for term in terms
        )
        groups.setdefault((shape, tuple(sorted(names[s] for s in step.summed))), []).append(step)
    return list(groups.values())


def sum_product(terms: Sequence[Tensor], dims: str) -> Tensor:
    """
    Multiply packed tensors in log space and sum over ``dims``.

    A genuine matrix product goes through :func:`~pyro_mpis.factor_graph.logspace.log_matmul`; where
    one tensor has every dim, add and log-sum-exp.
    """
    uses = Counter(symbol for term in terms for symbol in dims_of(term))
    terms = [_sum_alone(term, "".join(s for s in dims if uses[s] == 1)) for term in terms]
    dims = "".join(symbol for symbol in dims if uses[symbol] > 1)
    result_dims = "".join(s for s in union(*(dims_of(term) for term in terms)) if s not in dims)
    if len(terms) == 2 and dims:
        a, b = terms
        only_a = "".join(s for s in dims_of(a) if s not in dims_of(b) and s not in dims)
        only_b = "".join(s for s in dims_of(b) if s not in dims_of(a) and s not in dims)
        if only_a and only_b and set(dims) <= set(dims_of(a)) & set(dims_of(b)):
            return _matmul(a, b, only_a, only_b, dims)
    layout = result_dims + dims
    log_product = aligned(terms[0], layout)
    for term in terms[1:]:
        log_product = log_product + aligned(term, layout)
    return packed(logsumexp(log_product, len(dims)), result_dims)


def _sum_alone(term: Tensor, dims: str) -> Tensor:
    """Sum a term over those of ``dims`` that it has: dims of no other term."""
    summed = [symbol for symbol in dims if symbol in dims_of(term)]
    if not summed:
        return term
    result_dims = "".join(symbol for symbol in dims_of(term) if symbol not in summed)
    return packed(logsumexp(aligned(term, result_dims + "".join(summed)), len(summed)), result_dims)


def _matmul(a: Tensor, b: Tensor, only_a: str, only_b: str, dims: str) -> Tensor:
    batch = "".join(s for s in dims_of(a) if s in dims_of(b) and s not in dims)
    if a.numel() < b.numel():  # the larger one's rows can be worked on in parts
        a, b, only_a, only_b = b, a, only_b, only_a
    left = aligned(a, batch + only_a + dims)
    right = aligned(b, batch + dims + only_b)
    shape = left.shape[: len(batch + only_a)] + right.shape[len(batch + dims) :]
    left = left.flatten(len(batch + only_a)).flatten(len(batch), -2)
    right = right.flatten(len(batch + dims)).flatten(len(batch), -2)
    return packed(log_matmul(left, right).reshape(shape), batch + only_a + only_b)


def _check_crossing(graph: FactorGraph, factors: Sequence[LogFactor]) -> None:
    """Refuse a factor that reads two latents of plates of which neither contains the other."""
    for factor in factors:
        inside = {
            s: graph.with_enclosing(graph.index_plates[s])
            for s in factor.dims
            if s in graph.index_plates
        }
        for a, plates_a in inside.items():
            for b, plates_b in inside.items():
                if plates_a <= plates_b or plates_b <= plates_a:
                    continue
                one, other = (
                    ", ".join(sorted(repr(graph.plate_names[p]) for p in plates))
                    for plates in (plates_a - plates_b, plates_b - plates_a)
                )
                raise NotImplementedError(
                    f"site '{factor.name}': it reads {graph.index_sites[a]} of plate {one} and "
                    f"{graph.index_sites[b]} of plate {other}. These plates cross: every element "
                    "of one meets every element of the other, and the exact sum is exponential in "
                    "their size. Give one of the sites a single particle index: draw it with "
                    ".to_event(1) outside its plate, in guide and model, or put it into a group "
                    "with a site outside the plate."
                )
