# SPDX-License-Identifier: Apache-2.0
r"""
Predictive log-likelihood of held-out data, from posterior samples of any kind.

With posterior samples :math:`z^s` of what training data x tell, and held-out data x',

.. math:: \log p(x' \mid x) \approx \log \frac{1}{S} \sum_s p(x' \mid z^s), \qquad
          p(x' \mid z) = p(x, x' \mid z) / p(x \mid z) .

The likelihood is the joint one of all held-out data, not its terms one by one. Latents that only
held-out data have (those of new plate elements) are drawn from the prior given :math:`z^s`, which
leaves each term of the mean unbiased. Given :math:`z^s` the elements of a plate are independent, so
that with several draws :math:`u^m` of these latents each element has a mean of its own,

.. math:: p(x' \mid z^s) \approx \prod_i \frac{1}{M} \sum_m p(x'_i \mid u_i^m, z^s),

over the elements i of the plates that all new latents are in.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from pyro_mpis._text import quoted
from pyro_mpis._typing import Program, SampleMessage
from pyro_mpis.planning import no_guide
from pyro_mpis.programs.agreement import refuse_subsampling
from pyro_mpis.programs.environment import Environment
from pyro_mpis.programs.messages import (
    is_delta,
    is_latent,
    statements,
)
from pyro_mpis.programs.runs import Programs, run_at
from pyro_mpis.programs.turns import in_turn
from pyro_mpis.results.at_samples import is_data, said_at

# What a program is called with: positional arguments, or keyword arguments by their names.
Arguments: TypeAlias = Sequence[object] | Mapping[str, object]

ELEMENTS = 2**22  # of the largest tensor that one chunk of samples makes


@in_turn
def log_predictive(
    model: Program,
    posterior_samples: Mapping[str, Tensor],
    test: Arguments,
    *,
    train: Arguments | None = None,
    num_local_samples: int = 1,
) -> Tensor:
    """
    Estimate the log predictive density of held-out data: log mean exp over posterior samples.

    >>> import pyro, pyro.distributions as dist
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(y)):
    ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> samples = {"mu": torch.tensor([0.2, 0.4])}
    >>> log_predictive(model, samples, (torch.tensor([0.3]),)).item()
    -0.92

    There are two ways to give held-out data::

        # call the model with the held-out data alone
        log_predictive(model, samples, (x_test, y_test))
        # call the model with all data; the training data come first in their plates
        log_predictive(model, samples, {"x": x_all, "y": y_all}, train={"x": x, "y": y})

    The second is log p(all | z) - log p(train | z) in each sample. Use it for data that need the
    training data beside them, such as the next steps of a series or more elements of a plate.

    The values of latent sites are those of the posterior samples, matched **by position**. If
    ``test`` makes a plate larger, its first elements have the values of the sample. The further
    elements are drawn from the prior, given the rest of the sample. If the elements of a plate in
    ``test`` are all others than in the training data, leave the sites of this plate out of
    ``posterior_samples``: then they are all drawn from the prior.

    The model sees single values, as in a run of :class:`MPImportance`. It is mapped over the
    samples, or runs once for each sample if torch cannot map it. Draws random numbers. Samples may
    come from :meth:`MPImportance.sample`, ``MCMC.get_samples()`` or ``Predictive(guide, ...)``.

    :param model: the model, with its observations made from the arguments.
    :param posterior_samples: ``{site: (num_samples, *shape)}``, the shape that of an ordinary run.
        Values for observed sites are ignored.
    :param test: the arguments that the model is called with for held-out data: a tuple of
        positional ones or a dictionary of keyword ones.
    :param train: likewise for training data, where ``test`` contains them too.
    :param num_local_samples: draws of each new latent for each posterior sample. With many new
        latents, give several. With one, the best of the draws dominates the mean over posterior
        samples, and its logarithm is far too low.
    :return: a scalar, float64, in nats; ``-inf`` if every sample rules the data out.
    :raises ValueError: if samples, plates and arguments do not fit; the message names the site.
    """
    num_samples = _num_samples(posterior_samples)
    if num_local_samples < 1:
        raise ValueError(
            f"num_local_samples: expected a positive integer, but found {num_local_samples!r}."
        )
    with Environment().entered():
        call = _called(test, "test", with_train=train is not None)
        log_likelihood = _log_likelihood(model, posterior_samples, call, num_local_samples)
        if train is not None:
            log_likelihood -= _log_likelihood(model, posterior_samples, _called(train, "train"))
    if bool(log_likelihood.isnan().any()):  # infinite in training data, which is no posterior
        raise ValueError(
            "posterior_samples: some give the training data probability zero, so they are no "
            "samples of the posterior given these data. Check that they were drawn given train=."
        )
    return log_likelihood.logsumexp(0) - math.log(num_samples)


@dataclass(frozen=True)
class _Call:
    """What the model is called with, and the name of the argument that says so."""

    name: str  # "test" or "train"
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    with_train: bool = False  # whether training data come beside these

    @property
    def train(self) -> bool:
        return self.name == "train"

    def programs(self, model: Program) -> Programs:
        return Programs(model, no_guide, self.args, self.kwargs)


def _called(arguments: Arguments, name: str, *, with_train: bool = False) -> _Call:
    if isinstance(arguments, Mapping):
        return _Call(name, (), arguments, with_train)
    if isinstance(arguments, (tuple, list)):
        return _Call(name, tuple(arguments), {}, with_train)
    raise ValueError(
        f"{name}: expected the model's arguments as a tuple, or as a dictionary by their names, "
        f"but found {type(arguments).__name__}. For a single argument x write (x,)."
    )


def _num_samples(posterior_samples: Mapping[str, Tensor]) -> int:
    """Return the number of samples, the same of all sites."""
    if not posterior_samples:
        raise ValueError("posterior_samples: there are none.")
    for name, sample in posterior_samples.items():
        if not isinstance(sample, Tensor) or sample.dim() == 0 or len(sample) == 0:
            found = tuple(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
            raise ValueError(
                f"posterior_samples['{name}']: expected a tensor (num_samples, *shape of the site) "
                f"with at least one sample, but found {found}."
            )
    sizes = {name: len(sample) for name, sample in posterior_samples.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"posterior_samples: the numbers of samples differ: {sizes}.")
    return next(iter(sizes.values()))


def _log_likelihood(
    model: Program,
    posterior_samples: Mapping[str, Tensor],
    call: _Call,
    num_local_samples: int = 1,
) -> Tensor:
    """Return the log-likelihood of the data of one call for each sample: (S,), float64."""
    programs = call.programs(model)
    plain = run_at(programs, "model", {})
    refuse_subsampling([plain])
    sites = statements(plain)
    observed = [name for name, site in sites.items() if is_data(site)]
    if not observed:
        raise ValueError(
            f"{call.name}: the model observes nothing when called so; its latents are "
            f"{quoted({name for name, site in sites.items() if is_latent(site)})}. Pass the data "
            "that make it observe (obs=)."
        )
    _check_sites(sites, posterior_samples, call)
    placed = {
        name: _place(site, posterior_samples[name], call)
        for name, site in sites.items()
        if is_latent(site) and name in posterior_samples
    }
    _check_plates(sites, placed)
    new = _new_latents(sites, placed)
    around = [set(_plates(sites[name]).items()) for name in new]
    shared = set.intersection(*around) if around else set()
    draws = num_local_samples if new else 1
    largest = draws * max(site["value"].numel() for site in sites.values())
    size = max(1, ELEMENTS // largest)
    num_samples = len(next(iter(posterior_samples.values())))
    parts = []
    for start in range(0, num_samples, size):
        number = min(size, num_samples - start)
        chunk = {
            name: sample[start : start + size].repeat((draws,) + (1,) * (sample.dim() - 1))
            for name, sample in placed.items()
        }
        said = said_at(programs, sites, chunk, new, draws * number)
        log_probs = {
            name: log_prob.reshape((draws, number, *log_prob.shape[1:]))
            for name, log_prob in said.items()
        }
        parts.append(_averaged(log_probs, sites, shared))
    return torch.cat(parts)


def _new_latents(sites: Mapping[str, SampleMessage], placed: Mapping[str, Tensor]) -> list[str]:
    """Return the sites that are drawn from the prior, in some plate elements or in all."""
    return [
        name
        for name, site in sites.items()
        if is_latent(site)
        and not (name not in placed and is_delta(site["fn"]))
        and (name not in placed or placed[name][0].numel() < site["value"].numel())
    ]


def _averaged(
    log_probs: Mapping[str, Tensor],
    sites: Mapping[str, SampleMessage],
    shared: set[tuple[int, str]],
) -> Tensor:
    """
    Sum over plates, and average over draws of new latents in each element of some plates.

    :param log_probs: ``(M, S, *plates)`` of each observed site.
    :param shared: dims and names of the plates that all new latents are in.
    :return: the log-likelihood for each sample, ``(S,)``, float64.
    """
    outside: list[Tensor] = []
    inside: list[Tensor] = []
    kept = sorted(dim for dim, _ in shared)
    for name, log_prob in log_probs.items():
        log_prob = log_prob.double()
        own = set(_plates(sites[name]).items()) if name in sites else set()
        if shared <= own and len(log_prob) > 1:
            log_prob = log_prob.reshape(_padded(log_prob.shape, 2, -min(kept, default=0)))
            order = [log_prob.dim() + dim for dim in kept]
            log_prob = log_prob.permute((0, 1, *order, *_others(log_prob.dim(), order)))
            inside.append(_summed(log_prob, 2 + len(kept)))
        elif bool((log_prob == log_prob[:1]).all()):  # reads no new latent
            outside.append(_summed(log_prob)[0])
        else:
            raise ValueError(
                f"site '{name}': reads latents of new plate elements from outside of their plate, "
                "so that these are not independent. Use num_local_samples=1."
            )
    if inside:
        total = torch.stack(torch.broadcast_tensors(*inside)).sum(0)
        mean = total.logsumexp(0) - math.log(len(total))
        outside.append(mean.reshape(len(mean), -1).sum(-1))
    return torch.stack(outside).sum(0)


def _summed(log_prob: Tensor, left: int = 2) -> Tensor:
    """Sum over all dims but the first ones."""
    return log_prob.reshape((*log_prob.shape[:left], -1)).sum(-1)


def _padded(shape: torch.Size, left: int, batch: int) -> tuple[int, ...]:
    """Return a shape with dims of size one after the first ones, for so many batch dims."""
    return (*shape[:left], *(1,) * (batch - len(shape) + left), *shape[left:])


def _others(dims: int, order: Sequence[int]) -> list[int]:
    """Return the batch dims that are not in an order."""
    return [dim for dim in range(2, dims) if dim not in order]


def _check_sites(
    sites: Mapping[str, SampleMessage],
    posterior_samples: Mapping[str, Tensor],
    call: _Call,
) -> None:
    """Refuse samples that lack what only they can tell."""
    missing = {
        name
        for name, site in sites.items()
        if is_latent(site) and not is_delta(site["fn"]) and name not in posterior_samples
    }
    unknown = set(posterior_samples) - set(sites)
    if missing and unknown:
        raise ValueError(
            f"posterior_samples: {quoted(unknown)}: no such site in the model, which has "
            f"{quoted(missing)}, without samples. Rename the one to the other, or leave it out."
        )
    if missing and call.train:
        raise ValueError(
            f"site {quoted(missing)}: not in posterior_samples, so its value in the training data "
            "is not known. Add its samples; or call the model with held-out data alone, without "
            "train=, so that it is drawn from the prior."
        )
    without_plate = {name for name in missing if not sites[name]["cond_indep_stack"]}
    if call.with_train:  # the run with train= refuses those of its sites that have no samples
        without_plate = set()
    if without_plate:
        raise ValueError(
            f"site {quoted(without_plate)}: not in posterior_samples, and in no plate, so it "
            "cannot be a latent of the held-out data alone. Add its posterior samples; found "
            f"those of {quoted(set(posterior_samples))}."
        )


def _plates(site: SampleMessage) -> dict[int, str]:
    """Return the names of the vectorised plates around a site, by their dims."""
    return {f.dim: f.name for f in site["cond_indep_stack"] if f.dim is not None}


def _place(site: SampleMessage, sample: Tensor, call: _Call) -> Tensor:
    """
    Bring a site's samples to the shape of an ordinary run.

    :return: ``(S, *batch shape of the sample, *event)``, where some plates of the sample may be
        smaller than those of the model's run.
    """
    name, expected, found = site["name"], tuple(site["value"].shape), tuple(sample.shape[1:])
    if bool(sample.isnan().any()):
        raise ValueError(f"site '{name}': posterior_samples have nan among them.")
    while len(found) > len(expected) and found[0] == 1:  # as Predictive(parallel=True) leaves them
        found = found[1:]
    batch = len(expected) - site["fn"].event_dim
    fits = len(found) == len(expected) and found[batch:] == expected[batch:]
    plates = {batch + dim: plate for dim, plate in _plates(site).items()}
    for position in range(batch if fits else 0):
        old, new = found[position], expected[position]
        if old == new:
            continue
        if call.train or position not in plates:
            fits = False
        elif old > new:
            raise ValueError(
                f"site '{name}': plate '{plates[position]}' has {new} elements in {call.name}, but "
                f"posterior_samples have {old}. It is not known which of them these are: select "
                f"them from the samples; or leave '{name}' out, if the elements are new."
            )
    if not fits:
        raise ValueError(
            f"site '{name}': posterior_samples have shape {found} for each sample, but the model "
            f"called with {call.name} has {expected}. Only plates may be larger in test."
        )
    return sample.reshape(len(sample), *found)


def _check_plates(sites: Mapping[str, SampleMessage], placed: Mapping[str, Tensor]) -> None:
    """Refuse samples in which a plate has several sizes."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, sample in placed.items():
        for dim, plate in _plates(sites[name]).items():
            size = sample.shape[dim - sites[name]["fn"].event_dim]
            other_size, other = sizes.setdefault(plate, (size, name))
            if size != other_size:
                raise ValueError(
                    f"plate '{plate}': {other_size} elements in the samples of '{other}', but "
                    f"{size} in those of '{name}'. Both must be from the same data."
                )
