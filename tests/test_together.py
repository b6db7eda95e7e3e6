# SPDX-License-Identifier: Apache-2.0
"""How much is shared where elements are read together, or plates cross: no more than is needed."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from compare import compare
from counties import OCCASIONS
from pyro.ops.indexing import Vindex

from pyro_mpis import MPImportance, MPISWarning

pytestmark = pytest.mark.usefixtures("float64")

Model = Callable[[], None]
Sharing = dict[str, list[str]]
COLUMNS = OCCASIONS[:, :2]


def schools() -> pyro.plate:
    return pyro.plate("school", 2, dim=-2)


def sum_over_pupils() -> None:
    """Each school reads all of its pupils."""
    with schools():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("pupil", 2, dim=-1):
            x = pyro.sample("x", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(x.sum(-1, keepdim=True), 0.5), obs=COLUMNS[:, :1])


def centred_pupils() -> None:
    """Each pupil reads all of its school, in the plates of its own."""
    with schools(), pyro.plate("pupil", 2, dim=-1):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x - x.mean(-1, keepdim=True), 0.5), obs=COLUMNS)


def walk_of_each_school() -> None:
    """Sums along one of a latent's plates, in a plate of another name for it."""
    with schools():
        with pyro.plate("step", 2, dim=-1):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("time", 2, dim=-1):
            pyro.sample("y", dist.Normal(x.cumsum(-1), 0.5), obs=COLUMNS)


def mixture_of_each_school() -> None:
    """A mixture in each school: its pupils read any of its components."""
    with schools():
        with pyro.plate("component", 2, dim=-1):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("pupil", 2, dim=-1):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
            loc = Vindex(x)[torch.arange(2)[:, None], z]
            pyro.sample("y", dist.Normal(loc, 0.5), obs=COLUMNS)


def sum_by_index() -> None:
    """All pupils of the school that an index array selects."""
    with schools(), pyro.plate("pupil", 2, dim=-1):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("visit", 3, dim=-1):
        loc = x[torch.tensor([1, 0, 1])].sum(-1)
        pyro.sample("y", dist.Normal(loc, 0.5), obs=OCCASIONS[0])


def crossed_in_schools() -> None:
    """Pupils and tasks of each school cross."""
    with pyro.plate("school", 2, dim=-3):
        with pyro.plate("pupil", 2, dim=-2):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("task", 3, dim=-1):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("pupil ", 2, dim=-2), pyro.plate("task ", 3, dim=-1):
            data = torch.stack([OCCASIONS, OCCASIONS + 0.5])
            pyro.sample("y", dist.Normal(x + w, 0.5), obs=data)


@pytest.mark.parametrize(
    ("model", "plate"),
    [
        (sum_over_pupils, "pupil"),
        (centred_pupils, "pupil"),
        (walk_of_each_school, "step"),
        (mixture_of_each_school, "component"),
        (sum_by_index, "pupil"),
    ],
)
def test_plates_around_keep_their_elements(model: Model, plate: str) -> None:
    warning = f"elements of plate '{plate}'.*'x' has one particle index for all of plate '{plate}'"
    compare(model, num_samples=2, shared={"x": [plate]}, warning=warning)


def test_plates_that_cross_inside_of_a_plate() -> None:
    """Each school has indices of its own: the pupils of a school share one, not all pupils."""
    warning = "which cross: 'x' has one particle index for all of plate 'pupil'"
    compare(crossed_in_schools, num_samples=2, shared={"x": ["pupil"]}, warning=warning)


def school_effects() -> None:
    """Pupils in schools cross with tasks, and a density reads the school's effect as well."""
    school, task = schools(), pyro.plate("task", 3, dim=-3)
    with school:
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        with pyro.plate("pupil", 2, dim=-1):
            x = pyro.sample("x", dist.Normal(s, 1.0))
    with task:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with task, school, pyro.plate("pupil ", 2, dim=-1):
        pyro.sample("y", dist.Normal(s + x + w, 0.5), obs=torch.stack([COLUMNS] * 3))


def test_what_is_cheapest_counts_all_that_would_share() -> None:
    """Of 2 schools, 4 pupils and 3 tasks, the tasks: to share the schools would not be enough."""
    warning = "which cross: 'w' has one particle index for all of plate 'task'"
    compare(school_effects, num_samples=2, shared={"w": ["task"]}, warning=warning)


def test_many_schools() -> None:
    """As exact as one school, where one index for all of them has few effective particles."""
    size = 30
    y = torch.linspace(-2.0, 2.0, size).unsqueeze(-1)

    def sums() -> None:
        with pyro.plate("school", size, dim=-2):
            with pyro.plate("pupil", 3, dim=-1):
                x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x.sum(-1, keepdim=True), 1.0), obs=y)

    pyro.set_rng_seed(0)
    exact = dist.Normal(0.0, 2.0).log_prob(y).sum()
    with pytest.warns(MPISWarning, match="for all of plate .pupil."):
        posterior = MPImportance(sums, num_samples=1000).run()
    assert abs(posterior.evidence() - exact) < 0.5
    assert posterior["x"].ess.min() > 100.0


HOME, AWAY = torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1])


def teams() -> tuple[torch.Tensor, torch.Tensor]:
    with pyro.plate("team", 2):
        attack = pyro.sample("attack", dist.Normal(0.0, 1.0))
        defence = pyro.sample("defence", dist.Normal(0.0, 1.0))
    return attack, defence


def goals_of_both() -> None:
    """One team's attack and the other's defence: one element of each."""
    attack, defence = teams()
    with pyro.plate("game", 3):
        pyro.sample("home", dist.Normal(attack[HOME] - defence[AWAY], 1.0), obs=OCCASIONS[0])
        pyro.sample("away", dist.Normal(attack[AWAY] - defence[HOME], 1.0), obs=OCCASIONS[1])


def defence_of_all() -> None:
    """One element of a latent, and all of another."""
    attack, defence = teams()
    with pyro.plate("game", 3):
        pyro.sample("y", dist.Normal(attack[HOME] - defence.mean(), 1.0), obs=OCCASIONS[0])


def own_and_all() -> None:
    """The same within the plate of the latents."""
    with pyro.plate("team", 2):
        attack = pyro.sample("attack", dist.Normal(0.0, 1.0))
        defence = pyro.sample("defence", dist.Normal(attack, 1.0))
        loc = attack - defence.flip(0)
        pyro.sample("y", dist.Normal(loc, 1.0), obs=OCCASIONS[0, :2])


def games_of_a_league() -> None:
    """Teams of the same league: leagues keep their elements."""
    with pyro.plate("league", 2, dim=-2), pyro.plate("team", 2, dim=-1):
        attack = pyro.sample("attack", dist.Normal(0.0, 1.0))
        defence = pyro.sample("defence", dist.Normal(0.0, 1.0))
    league = torch.tensor([0, 0, 1])
    with pyro.plate("game", 3, dim=-1):
        loc = attack[league, HOME] - defence[league, AWAY]
        pyro.sample("y", dist.Normal(loc, 1.0), obs=OCCASIONS[0])


@pytest.mark.parametrize("model", [goals_of_both, defence_of_all, own_and_all, games_of_a_league])
def test_one_of_two_latents_keeps_its_elements(model: Model) -> None:
    warning = "of plate 'team'.*: 'defence' has one particle index for all of plate 'team'"
    compare(model, num_samples=2, shared={"defence": ["team"]}, warning=warning)


def test_different_elements_of_a_plate_around() -> None:
    """The plate that is named is the one of which a site reads several elements."""

    def leagues() -> None:
        with pyro.plate("league", 2, dim=-2):
            money = pyro.sample("money", dist.Normal(0.0, 1.0))
            with pyro.plate("team", 2, dim=-1):
                attack = pyro.sample("attack", dist.Normal(0.0, 1.0))
        league = torch.tensor([0, 0, 1])
        with pyro.plate("game", 3, dim=-1):
            loc = attack[league, HOME] - money[:, 0][1 - league]
            pyro.sample("y", dist.Normal(loc, 1.0), obs=OCCASIONS[0])

    warning = "several elements of plate 'league' together: 'money' has one .* plate 'league'"
    compare(leagues, num_samples=2, shared={"money": ["league"]}, warning=warning)


def test_site_that_is_named_where_plates_cross() -> None:
    """That which reads both, and not its proposal."""

    def interaction() -> None:
        rows, columns = pyro.plate("row", 2, dim=-2), pyro.plate("column", 3, dim=-1)
        with rows:
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with columns:
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with rows, columns:
            z = pyro.sample("z", dist.Normal(x * w, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=OCCASIONS)

    warning = "site 'z' reads latents of plate 'row' and of plate 'column', which cross: 'x' has"
    compare(interaction, num_samples=2, shared={"x": ["row"]}, warning=warning)


def test_differences_of_discrete_elements_that_share() -> None:
    """Particles that tell what is read are not alike in all elements of a plate that shares."""

    def model() -> None:
        with schools(), pyro.plate("pupil", 2, dim=-1):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            loc = (z - z.mean(-2, keepdim=True)).flip(-1)
            pyro.sample("y", dist.Normal(loc, 0.5), obs=COLUMNS)

    warning = "other elements of plate '(pupil|school)' than its own: 'z' has"
    compare(model, num_samples=2, shared={"z": ["pupil", "school"]}, warning=warning)


def test_what_is_shared_makes_no_other_share() -> None:
    """All elements of one latent, and always the same element of another of the same plate."""

    def model() -> None:
        with pyro.plate("year", 2, dim=-2):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("task", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("year ", 2, dim=-2):
                pyro.sample("y", dist.Normal(w[0] + x.sum() + z, 1.0), obs=OCCASIONS)

    warning = "plate 'year' together: 'x' has one particle index for all of plate 'year'"
    compare(model, num_samples=2, shared={"x": ["year"]}, warning=warning)
