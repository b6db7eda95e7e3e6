# SPDX-License-Identifier: Apache-2.0
"""A result that was saved, moved, copied or pickled answers as the one that was run."""

import copy
import dataclasses
import math
import pickle
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import CASES, COUNTY, OBSERVED, assert_same, guide, model, ran
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions import constraints

from pyro_mpis import Marginal, MPImportance, MPISWarning
from pyro_mpis.results.same_programs import check_evaluation
from pyro_mpis.results.saving import read, write


def answers(posterior: MPImportance) -> dict[str, object]:
    """Ask everything there is to ask."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MPISWarning)  # few particles
        summary = posterior.summary()
    pyro.set_rng_seed(3)
    result: dict[str, object] = {
        "evidence": posterior.evidence(),
        "summary": [value for row in summary.rows for value in dataclasses.astuple(row)[1:]],
        "means": posterior.moments(),
        "product": posterior.moments(torch.mul, "a", "v"),
        "draws": posterior.sample(20),
    }
    for sites in (("v",), ("a", "b"), ("b", "v")):
        marginal = posterior.marginals(*sites)
        result[str(sites)] = (marginal.samples, marginal.log_weights, marginal.event_shapes)
    return result


@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_loaded_answers_as_saved(case: str, asked_before: bool, tmp_path: Path) -> None:
    posterior = ran(case)
    assert (len(posterior._sums[0].blocks) > 1) == (case == "blocks")
    if asked_before:
        posterior.moments()
        posterior.marginals("a", "b")
    posterior.save(tmp_path / "file")
    expected = answers(posterior)
    pyro.set_rng_seed(7)
    loaded = MPImportance.load(tmp_path / "file", model, guide)
    state = torch.get_rng_state()
    pyro.set_rng_seed(7)
    torch.testing.assert_close(state, torch.get_rng_state())  # loading draws nothing that counts
    assert dict(pyro.get_param_store().items()) == {}  # nor leaves params
    old, new = posterior._sums[0].replicate.plan, loaded._sums[0].replicate.plan
    assert new.cut.pieces == old.cut.pieces  # within the memory of the run
    assert bool(new.cut.pieces) == (case == "blocks")
    assert_same(answers(loaded), expected)
    pyro.set_rng_seed(0)
    again = loaded.run(COUNTY, {"y": OBSERVED}, scale=1.5)  # with the settings of the saved one
    assert_same(answers(again), expected)


@pytest.mark.parametrize("case", CASES)
def test_without_factors(case: str, tmp_path: Path) -> None:
    """A file of the particles alone gives the same answers."""
    posterior = ran(case)
    posterior.save(tmp_path / "all")
    posterior.save(tmp_path / "few", factors=False)
    sizes = [(tmp_path / name).stat().st_size for name in ("all", "few")]
    factors = sum(f.tensor.nbytes for s in posterior._sums for f in s.whole.factors)
    assert sizes[1] + factors * 0.9 < sizes[0] if factors else sizes[1] == sizes[0]
    loaded = MPImportance.load(tmp_path / "few", model, guide)
    assert loaded._sums[0].whole.factors == ()
    assert_same(answers(loaded), answers(posterior))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("when_saved", [torch.float64, torch.float32])
def test_dtype_of_the_run_is_that_of_the_result(when_saved: torch.dtype, tmp_path: Path) -> None:
    for case in ("whole", "blocks"):
        posterior = ran(case)
        expected = answers(posterior)
        torch.set_default_dtype(when_saved)
        posterior.save(tmp_path / case)
        torch.set_default_dtype(torch.float32)
        loaded = MPImportance.load(tmp_path / case, model, guide)
        assert loaded.evidence().dtype == torch.float64
        environments = [p._sums[0].replicate.environment for p in (posterior, loaded)]
        assert [environment.dtype for environment in environments] == [torch.float64] * 2
        assert_same(answers(loaded), expected)
        torch.set_default_dtype(torch.float64)


def test_a_file_without_particles_or_dtype_is_refused(tmp_path: Path) -> None:
    ran("whole").save(tmp_path / "file")
    stored = read(tmp_path / "file", torch.device("cpu"))
    with pytest.raises(ValueError, match="no particles"):
        dataclasses.replace(stored, sums=())
    with pytest.raises(ValueError, match="not a floating one"):
        dataclasses.replace(stored, dtype=torch.int64)


def test_autoguide_that_has_not_run_yet(tmp_path: Path) -> None:
    """Loaded beside its params in the store, as in another process."""

    def autoguide() -> AutoNormal:
        return AutoNormal(pyro.poutine.block(model, hide=["c"]))

    pyro.set_rng_seed(0)
    trained = autoguide()
    trained(COUNTY, {"y": OBSERVED}, scale=1.5)
    for case in ("whole", "blocks", "replicates"):
        posterior = ran(case, trained)
        posterior.save(tmp_path / case)
        loaded = MPImportance.load(tmp_path / case, model, autoguide())
        assert_same(answers(loaded), answers(posterior))
        posterior = ran(case, trained, seed=1)
        assert float(posterior.evidence()) != float(loaded.evidence())


def test_model_without_anything_to_sum(tmp_path: Path) -> None:
    """A single particle, no plates, no arguments."""

    def small() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a, 1.0), obs=torch.tensor(0.5))

    posterior = MPImportance(small, num_samples=1).run()
    posterior.save(str(tmp_path / "file"))
    loaded = MPImportance.load(str(tmp_path / "file"), small)
    assert_same(loaded.evidence(), posterior.evidence())
    assert_same(loaded.moments(), posterior.moments())


def test_how_programs_ran_is_kept(tmp_path: Path) -> None:
    """Rewritten, at some particles one by one, without validation, and with latents that share."""

    def looks() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 2):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            scale = 1.0 if float(a) > 0 else 2.0
            pyro.sample("y", dist.Normal(b, scale), obs=torch.tensor([0.5, 1.0]))

    def writes() -> None:
        z = torch.zeros(2)
        z[0] = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=torch.tensor(0.5))

    def together() -> None:
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(z.sum() ** 2, 1.0), obs=torch.tensor(0.5))

    for program in (looks, writes, together):
        with warnings.catch_warnings(), pyro.validation_enabled(False):
            warnings.simplefilter("ignore", MPISWarning)
            pyro.set_rng_seed(0)
            posterior = MPImportance(program, num_samples=4).run()
        posterior.save(tmp_path / "file", factors=False)
        loaded = MPImportance.load(tmp_path / "file", program)
        old, new = posterior._sums[0].replicate, loaded._sums[0].replicate
        assert (new.programs.patched, new.programs.one_by_one, new.environment.validate) == (
            old.programs.patched,
            old.programs.one_by_one,
            False,
        )
        assert bool(new.programs.one_by_one) == (program is looks)
        assert new.programs.patched or program is together
        assert_same(loaded.moments(), posterior.moments())


def test_a_program_that_reads_less_in_a_plain_run_is_evaluated(tmp_path: Path) -> None:
    """A value that is looked at has lost its origin: factors in the file do not hide a change."""

    def looks(scale: float) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 2):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            y = torch.tensor([0.5, 1.0])
            pyro.sample("y", dist.Normal(b, 1.0 if float(a) > 0 else scale), obs=y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MPISWarning)
        pyro.set_rng_seed(0)
        posterior = MPImportance(looks, num_samples=4).run(2.0)
    posterior.save(tmp_path / "file")
    assert_same(MPImportance.load(tmp_path / "file", looks).moments(), posterior.moments())
    with pytest.raises(ValueError, match=r"file': particles that were weighed at log evidence"):
        MPImportance.load(tmp_path / "file", looks, args=(3.0,))


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("factors", [True, False])
def test_states_that_turned_out_to_be_sampled(marked: bool, factors: bool, tmp_path: Path) -> None:
    """The sums of a plain run are not those of the run, where what is summed is looked at."""
    infer: Any = {"enumerate": "parallel"} if marked else {}

    def one() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Bernoulli(0.3), infer=infer)
        pyro.sample("y", dist.Normal(a, 1.0 if float(c) > 0 else 2.0), obs=torch.tensor(1.0))

    def together() -> None:
        with pyro.plate("n", 2):
            c = pyro.sample("c", dist.Bernoulli(0.3), infer=infer)
        scale = 1.0 if float(c.sum()) > 0 else 2.0
        pyro.sample("y", dist.Normal(c.sum(), scale), obs=torch.tensor(1.0))

    def in_some_runs() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Bernoulli(0.3), infer=infer)
        if float(a) > -1.0:
            pyro.sample("z", dist.Normal(c, 1.0))
        pyro.sample("y", dist.Normal(a, 1.0), obs=torch.tensor(1.0))

    for program in (one, together, in_some_runs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MPISWarning)
            pyro.set_rng_seed(0)
            posterior = MPImportance(program, num_samples=5).run()
        assert posterior._sums[0].replicate.structure.origins["c"] == "prior"
        assert bool(posterior._sums[0].traces) == (program is not one)
        posterior.save(tmp_path / "file", factors=factors)
        loaded = MPImportance.load(tmp_path / "file", program)
        assert_same(loaded.evidence(), posterior.evidence())
        assert_same(loaded.moments(), posterior.moments())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("events", r"'x' of the model .*event shape \(3,\), .* it was .*event shape \(2,\), "),
        ("events in plates", r"'e' of the model .*event shape \(3,\), .*event shape \(2,\), "),
        ("elements", r"'b' of the model .*: batch shape \(4,\), .* it was batch shape \(2,\), "),
        ("plate", r"'b' of the model .*in plates 'other', .* it was .*in plates 'p', "),
        ("reads", r"'b' of the model .*reading 'x', .* it was .*reading 'a', "),
        ("reads more", r"'b' of the model .*reading 'a', 'x', .* it was .*reading 'a', "),
        ("unobserved", r"'y' of the model .*, drawn from the prior; it was .*, not a latent of"),
        ("observed", r"'b' of the model .*, not a latent of .* it was .*, drawn from the prior\."),
        ("support", r"'c' of the model .* of 3 values; it was .*, summed over its support of 2 va"),
        ("sampled", r"'c' of the model .*, drawn from the prior; it was .*, summed over its supp"),
        ("summed", r"'d' of the model .*, summed over its support of 2 .* it was .*, drawn from"),
        ("guide", r"'a' of the guide .*, computed by the guide; it was .*, drawn by the guide"),
    ],
)
def test_every_change_of_a_program_is_named(change: str, message: str, tmp_path: Path) -> None:
    """Not only where its densities are evaluated again: the file holds them."""
    infer: Any = {"enumerate": "parallel"}

    def varied(change: str = "") -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        size = 3 if change == "events" else 2
        x = pyro.sample("x", dist.Normal(torch.zeros(size), 1.0).to_event(1)).sum()
        p = torch.full((3 if change == "support" else 2,), 0.5)
        c = pyro.sample("c", dist.Categorical(p), infer={} if change == "sampled" else infer)
        d = pyro.sample("d", dist.Bernoulli(0.5), infer=infer if change == "summed" else {})
        name, size = "other" if change == "plate" else "p", 4 if change == "elements" else 2
        with pyro.plate("q", 2, dim=-2), pyro.plate("r", 2, dim=-1):
            shape = (2, 2, 3 if change == "events in plates" else 2)
            pyro.sample("e", dist.Normal(torch.zeros(shape), 1.0).to_event(1))
        loc = {"reads": x, "reads more": a + x}.get(change, a)
        with pyro.plate(name, size):
            seen = torch.zeros(size) if change == "observed" else None
            b = pyro.sample("b", dist.Normal(loc, 1.0), obs=seen)
        y = None if change == "unobserved" else torch.tensor(0.5)
        pyro.sample("y", dist.Normal(a + x + b.sum(-1) + c + d, 1.0), obs=y)

    def proposal(change: str = "") -> None:
        pyro.sample(
            "a", dist.Delta(torch.zeros(())) if change == "guide" else dist.Normal(0.0, 1.0)
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MPISWarning)
        MPImportance(varied, proposal, num_samples=3).run().save(tmp_path / "file")
        MPImportance.load(tmp_path / "file", varied, proposal)
        with pytest.raises(ValueError, match=f"file': site {message}"):
            MPImportance.load(tmp_path / "file", varied, proposal, args=(change,))


def test_another_guide_of_a_run_of_all_latents_together(tmp_path: Path) -> None:
    """What it samples may be summed in a plain run, and no more than that."""

    def looks() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(1.0 if float(a) > 0 else 2.0, 1.0), obs=torch.tensor(0.5))

    def draws() -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))

    def computes() -> None:
        pyro.sample("a", dist.Delta(torch.zeros(())))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MPISWarning)
        posterior = MPImportance(looks, draws, num_samples=3).run()
        assert posterior._sums[0].traces
        posterior.save(tmp_path / "file")
        with pytest.raises(ValueError, match=r"'a' of the guide .*, computed by .*, drawn by"):
            MPImportance.load(tmp_path / "file", looks, computes)


def test_a_file_whose_summed_site_has_no_index_is_refused(tmp_path: Path) -> None:
    ran("whole").save(tmp_path / "file")
    stored = read(tmp_path / "file", torch.device("cpu"))
    structure = dataclasses.replace(stored.structure, indices=())
    write(tmp_path / "other", dataclasses.replace(stored, structure=structure))
    with pytest.raises(ValueError, match=r"'c' of the model .* of 2 values; it was .* support\."):
        MPImportance.load(tmp_path / "other", model, guide)


def test_a_program_that_fails_with_the_arguments_given(tmp_path: Path) -> None:
    def positive(scale: float) -> None:
        pyro.sample("a", dist.Normal(0.0, scale))

    MPImportance(positive, num_samples=2).run(1.0).save(tmp_path / "file")
    with pytest.raises(ValueError, match=r"file': model and guide do not fit.*learned proposal"):
        MPImportance.load(tmp_path / "file", positive, args=(-1.0,))


def test_a_file_of_a_learned_guide_says_whose_it_is(tmp_path: Path) -> None:
    """Some of its sites have names that no other guide has."""

    def one() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a, 1.0), obs=torch.tensor(0.5))

    def like_a_learned_one() -> None:
        u = pyro.sample("_mpis_noise_0", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("a", dist.Delta(u))

    MPImportance(one, like_a_learned_one, num_samples=2).run().save(tmp_path / "file")
    with pytest.raises(ValueError, match=r"'_mpis_noise_0' of the guide.*had a learned proposal"):
        MPImportance.load(tmp_path / "file", one)


@pytest.mark.parametrize(
    ("before", "now", "accepted"),
    [
        (-1e5, -1e5 + 0.02, True),  # twice what neighbours in float32 differ by
        (0.0, 1e-4, True),  # what is left of terms of some hundreds
        (-5.0, -5.05, False),
        (0.01, 0.03, False),
        (-1e5, -1e5 + 100.0, False),
    ],
)
def test_evidences_are_the_same_but_for_rounding(before: float, now: float, accepted: bool) -> None:
    block_sum: Any = SimpleNamespace(
        whole=SimpleNamespace(factors=()),
        log_evidences=torch.tensor([before], dtype=torch.double),
        job=lambda *_: lambda: torch.tensor(now, dtype=torch.double),
    )
    with nullcontext() if accepted else pytest.raises(ValueError, match="were weighed at"):
        check_evaluation("file", block_sum)


@pytest.mark.parametrize(("now", "accepted"), [(1.0, True), (1.5, False)])
def test_the_block_with_the_highest_evidence_is_evaluated(now: float, accepted: bool) -> None:
    """Others may have no evidence, and say nothing."""
    kept, found = torch.tensor([-math.inf, 1.0, -8.0]), torch.tensor([-math.inf, now, -8.0])
    for factors in ((), (1,)):
        block_sum: Any = SimpleNamespace(
            whole=SimpleNamespace(factors=factors),
            log_evidences=kept.double(),
            job=lambda block, _: lambda: found[block],
        )
        with nullcontext() if accepted or factors else pytest.raises(ValueError, match=r"1\.5000"):
            check_evaluation("file", block_sum)


def test_another_model_guide_or_data(tmp_path: Path) -> None:
    def renamed(*args: Any, **kwargs: Any) -> None:
        pyro.sample("other", dist.Normal(0.0, 1.0))
        model(*args, **kwargs)

    def sampled(*args: Any, **kwargs: Any) -> None:  # c is sampled, not enumerated
        with pyro.poutine.infer_config(config_fn=lambda site: {"num_samples": 5}):
            model(*args, **kwargs)

    path = tmp_path / "file"
    ran("whole").save(path)
    with pytest.raises(ValueError, match=r"'other' of the model.*nothing, drawn.*; it was absent"):
        MPImportance.load(path, renamed, guide)
    with pytest.raises(ValueError, match=r"site 'a' of the guide.*: absent; it was batch shape"):
        MPImportance.load(path, model)
    with pytest.raises(ValueError, match=r"site 'c' of the model.*drawn from.*it was.*summed"):
        MPImportance.load(path, sampled, guide)
    wide = torch.zeros(2, 3, 1)
    with pytest.raises(ValueError, match=r"site 'y'"):
        MPImportance.load(path, model, guide, args=(COUNTY, {"y": wide}))


@pytest.mark.parametrize("case", ["whole", "blocks", "replicates"])
def test_parameters_that_have_changed(case: str, tmp_path: Path) -> None:
    """Are refused before any answer if they matter: where a result is evaluated again."""

    def learned() -> None:
        model(COUNTY, {"y": OBSERVED}, scale=pyro.param("scale", torch.tensor(1.5)))  # type: ignore[arg-type]

    def learned_guide() -> None:
        guide(COUNTY, {"y": OBSERVED})

    path = tmp_path / case
    pyro.param("loc", torch.tensor(0.3))
    pyro.param("scale", torch.tensor(1.5))
    posterior = MPImportance(learned, learned_guide, num_samples=6, **CASES[case]).run()
    posterior.save(path)
    expected = answers(posterior)
    pyro.get_param_store()["loc"] = torch.tensor(2.0)  # of the guide: densities are in the file
    assert_same(answers(MPImportance.load(path, learned, learned_guide)), expected)
    posterior.save(tmp_path / "few", factors=False)
    pyro.get_param_store()["scale"] = torch.tensor(0.5)
    with pytest.raises(ValueError, match=r"few': particles that were weighed at log evidence"):
        MPImportance.load(tmp_path / "few", learned, learned_guide)
    if case == "whole":
        assert_same(answers(MPImportance.load(path, learned, learned_guide)), expected)
        return
    with pytest.raises(ValueError, match=r"weighed at log evidence .* parameters that they had"):
        MPImportance.load(path, learned, learned_guide)
    pyro.get_param_store()["scale"] = torch.tensor(1.5)
    assert_same(answers(MPImportance.load(path, learned, learned_guide)), expected)


class Table(NamedTuple):
    y: Tensor


def test_arguments_that_are_not_plain_data(tmp_path: Path) -> None:
    table = Table(OBSERVED)

    def of_table(table: Table, *, county: Tensor) -> None:
        model(county, {"y": table.y})

    pyro.set_rng_seed(0)
    posterior = MPImportance(of_table, num_samples=4).run(table, county=COUNTY)
    with pytest.warns(MPISWarning, match=r"file': the arguments .*test_saving\.Table, neither a"):
        posterior.save(tmp_path / "file")
    with pytest.raises(ValueError, match=r"file': it does not hold the arguments.*args="):
        MPImportance.load(tmp_path / "file", of_table)
    loaded = MPImportance.load(
        tmp_path / "file", of_table, args=(table,), kwargs={"county": COUNTY}
    )
    assert_same(loaded.moments(), posterior.moments())


def test_arguments_given_by_name_alone_take_the_place_of_all(tmp_path: Path) -> None:
    def unused(*args: object, **kwargs: object) -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))

    MPImportance(unused, num_samples=2).run(1, scale=2.0).save(tmp_path / "file")
    for given, expected in (
        ({}, ((1,), {"scale": 2.0})),
        ({"kwargs": {"scale": 3.0}}, ((), {"scale": 3.0})),
        ({"args": (4,)}, ((4,), {})),
    ):
        options: Any = given
        loaded = MPImportance.load(tmp_path / "file", unused, **options)
        found = loaded._sums[0].replicate.programs
        assert (found.args, dict(found.kwargs)) == expected


def test_nothing_to_save_before_a_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no particles yet"):
        MPImportance(model, num_samples=2).save(tmp_path / "file")
    assert not (tmp_path / "file").exists()


def tensors(tree: object, seen: set[int]) -> Iterator[Tensor]:
    """Find all tensors that can be reached from an object, but for model and guide."""
    if id(tree) in seen:
        return
    seen.add(id(tree))
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors(value, seen)
    elif isinstance(tree, tuple | list | frozenset):
        for value in tree:
            yield from tensors(value, seen)
    elif hasattr(tree, "__dict__") and not isinstance(tree, type) and not callable(tree):
        yield from tensors(vars(tree), seen)


def test_every_tensor_moves() -> None:
    """To the device without storage, which shows where tensors are, if not what."""
    pyro.param("loc", torch.tensor(0.3))
    for case in CASES:
        posterior = ran(case)
        posterior.moments()
        posterior._sums[0].replicate.environment.params["constraints"]["loc"] = (
            constraints.interval(torch.tensor(-1.0), torch.tensor(1.0))
        )
        before = list(tensors(vars(posterior), set()))
        moved = posterior.to("meta")
        found = list(tensors(vars(moved), set()))
        assert len(found) == len(before) > 8
        assert all(tensor.device.type == "meta" for tensor in found)
        assert all(tensor.device.type == "cpu" for tensor in before)
        assert moved._sums[0].whole.device == torch.device("meta")
        assert [t.shape for t in found] == [t.shape for t in before]
        posterior.sample(2)


def test_arguments_move_along() -> None:
    class Pair(NamedTuple):
        one: Tensor
        other: Tensor

    def unused(*args: object, **kwargs: object) -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))

    data = {"list": [torch.ones(2)], "pair": Pair(torch.ones(1), torch.ones(2)), "word": "x"}
    posterior = MPImportance(unused, num_samples=2).run((torch.ones(3), data), y=torch.ones(4))
    programs = posterior.to("meta")._sums[0].replicate.programs
    found = list(tensors((programs.args, programs.kwargs), set()))
    assert [tensor.device.type for tensor in found] == ["meta"] * 5
    (pair,) = [programs.args[0][1]["pair"]]  # type: ignore[index]
    assert type(pair) is Pair
    assert posterior.model is programs.model


def test_moving_to_where_it_is_changes_nothing() -> None:
    for case in CASES:
        posterior = ran(case)
        same = posterior.to("cpu")
        assert same is not posterior
        before = {id(tensor) for tensor in tensors(vars(posterior), set())}
        assert {id(tensor) for tensor in tensors(vars(same), set())} == before
        assert_same(answers(same), answers(posterior))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: str, tmp_path: Path) -> None:
    posterior = ran(case)
    there = posterior.to("cuda")
    assert there.evidence().device.type == "cuda"
    assert all(mean.device.type == "cuda" for mean in there.moments().values())
    there.save(tmp_path / "file")
    loaded = MPImportance.load(tmp_path / "file", model, guide)
    torch.testing.assert_close(loaded.moments(), posterior.moments())
    torch.testing.assert_close(there.to("cpu").moments(), posterior.moments())


def test_copies_and_pickles_answer_alike() -> None:
    with ThreadPoolExecutor(1) as executor:
        posterior = ran("blocks")
        posterior.executor = executor
        expected = answers(posterior)
        assert copy.copy(posterior).executor is executor
        assert posterior.to("cpu").executor is executor
        copies = [copy.deepcopy(posterior), pickle.loads(pickle.dumps(posterior))]
        for other in (copy.copy(posterior), *copies):
            assert_same(answers(other), expected)
        assert [other.executor for other in copies] == [None, None]


def test_copy_runs_by_itself() -> None:
    posterior = ran("whole")
    expected = answers(posterior)
    pyro.set_rng_seed(5)
    other = copy.copy(posterior).run(COUNTY, {"y": OBSERVED})
    assert float(other.evidence()) != float(posterior.evidence())
    assert_same(answers(posterior), expected)


def test_results_pickle_without_the_model(tmp_path: Path) -> None:
    """Also where the model itself cannot be pickled; the result as a whole can be saved."""
    posterior = MPImportance(lambda: model(COUNTY, {"y": OBSERVED}), num_samples=6).run()
    with pytest.raises(Exception, match="pickle"):
        pickle.dumps(posterior)
    posterior.save(tmp_path / "file")
    loaded = MPImportance.load(tmp_path / "file", lambda: model(COUNTY, {"y": OBSERVED}))
    assert_same(loaded.moments(), posterior.moments())
    with pytest.warns(MPISWarning):
        summary = posterior.summary()
    assert repr(pickle.loads(pickle.dumps(summary))) == repr(summary)
    marginal = posterior.marginals("a", "b")
    others: list[Marginal] = [pickle.loads(pickle.dumps(marginal)), copy.deepcopy(marginal)]
    for other in (*others, copy.copy(marginal)):
        assert_same(other.samples, marginal.samples)
        assert_same(other.log_weights, marginal.log_weights)
        assert_same(other.unpack(other.mean), marginal.unpack(marginal.mean))
        assert_same(other.quantile(0.3), marginal.quantile(0.3))


@pytest.mark.parametrize("case", CASES)
def test_number_of_bytes(case: str) -> None:
    """That of all storages that can be reached, arguments and params aside."""
    posterior = ran(case)
    posterior.moments()
    kept = [
        (total.replicate.particles, total.replicate.reads, total.whole, total.log_evidences)
        for total in posterior._sums
    ]
    found = tensors((kept, posterior._weights), set())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    assert posterior.nbytes == sum(storages.values())
    assert MPImportance(model, num_samples=2).nbytes == 0
    if case == "whole":  # v reads a and b: 6**3 combinations, 2 elements, float32
        assert posterior.nbytes > 6**3 * 2 * 4
    if case == "replicates":
        assert posterior.nbytes < 3 * 6**3 * 2 * 4
