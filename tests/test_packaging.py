# SPDX-License-Identifier: Apache-2.0
"""What the package needs, what it imports, and what is installed with it."""

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_mpis

ROOT = Path(__file__).parents[1]
PACKAGE = Path(pyro_mpis.__file__).parent
OF = {"pyro": "pyro-ppl"}  # distributions that are not called as what they hold

setup = configparser.ConfigParser()
setup.read(ROOT / "setup.cfg")


def names(requirements: str) -> set[str]:
    """Return the distributions that some lines of setup.cfg ask for, extras of ours unfolded."""
    result: set[str] = set()
    for line in requirements.split():
        result.add(re.split(r"[<>=!~;\[]", line)[0])
    return result


CORE = names(setup["options"]["install_requires"]) | {"numpy"}  # which Pyro asks for
EXTRAS = {extra: names(text) for extra, text in setup["options.extras_require"].items()}


def imports(file: Path, *, at_import: bool) -> set[str]:
    """
    Return what else than the standard library a file imports, as the distributions are called.

    :param at_import: whether to look at what runs when the file is imported, or inside functions.
    """
    found: set[str] = set()

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        inside = inside or isinstance(node, ast.FunctionDef | ast.Lambda)
        if inside != at_import:
            if isinstance(node, ast.Import):
                found.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.module is not None
                found.add(node.module.split(".")[0])
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(file.read_text()), False)
    return {OF.get(name, name) for name in found - sys.stdlib_module_names - {"pyro_mpis"}}


def test_imports_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(
        "import os, torch.nn\nfrom pyro.infer import SVI\n"
        "if TYPE_CHECKING:\n    import xarray\n"
        "def f():\n    from matplotlib import pyplot\n"
        "class C:\n    import scipy\n    def g(self):\n        import arviz\n"
    )
    assert imports(tmp_path / "file.py", at_import=True) == {"torch", "pyro-ppl", "scipy"}
    assert imports(tmp_path / "file.py", at_import=False) == {"matplotlib", "arviz"}


@pytest.mark.parametrize(
    "file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE))
)
def test_package_imports_what_it_asks_for(file: Path) -> None:
    assert imports(file, at_import=True) <= CORE
    optional = set[str]().union(
        *(EXTRAS[extra] for extra in EXTRAS if extra not in ("test", "dev"))
    )
    assert imports(file, at_import=False) <= CORE | optional


def modules(source: str) -> set[str]:
    """Return the modules of the package that some source imports, anywhere in it."""
    result: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            result.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            result.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in result if name.split(".")[0] == "pyro_mpis"}


GROUND = {"_text", "_typing", "_progress", "_threads"}
# What each part of the package may import besides itself: the data flow one way.
BELOW = {
    "_text": set[str](),
    "_typing": set[str](),
    "_progress": set[str](),
    "_threads": set[str](),
    "_version": set[str](),
    "_warnings": set[str](),
    "programs": GROUND,
    "factor_graph": GROUND,
    "particles": GROUND | {"programs", "factor_graph"},
    "pieces": {"factor_graph"},
    "workers": GROUND | {"programs"},
    "run_plan": GROUND,
    "costs": GROUND | {"run_plan", "programs", "factor_graph", "particles"},
    "options": GROUND,
    "weaknesses": GROUND | {"programs"},
    "fitting": GROUND | {"options", "programs", "particles"},
    "planning": GROUND | {"run_plan", "programs", "particles", "costs", "options", "fitting"},
    "rendering": GROUND | {"programs"},
}
BELOW["replicate"] = {*BELOW["planning"], "factor_graph", "planning", "pieces", "workers"}
BELOW["blocks"] = {*BELOW["replicate"], "replicate"}
BELOW["queries"] = {*BELOW["blocks"], "blocks"}
BELOW["results"] = {*BELOW["queries"], "queries", "_version", "_warnings"}
BELOW["objectives"] = {*BELOW["queries"], "queries", "_warnings"}
BELOW["adaptation"] = {*BELOW["objectives"], "objectives"}
BELOW["sums"] = {*BELOW["results"], "results"}
BELOW["posterior"] = {*BELOW["sums"], "sums"}
BELOW["importance"] = {*BELOW["posterior"], "posterior", "weaknesses", "rendering", "adaptation"}
BELOW["plots"] = {*BELOW["importance"], "importance"}
BELOW["__init__"] = {*BELOW}


def part(name: str) -> str:
    """Return which part of the package a module is in, or a file by its path in the package."""
    return re.split(r"[./]", name.removeprefix("pyro_mpis."))[0]


def above(file: str, source: str) -> set[str]:
    """Return the modules that a file imports though they stand above its part of the package."""
    own = part(file)
    return {name for name in modules(source) if part(name) not in BELOW[own] | {own}}


@pytest.mark.parametrize("file", sorted(str(f.relative_to(PACKAGE)) for f in PACKAGE.rglob("*.py")))
def test_imports_run_one_way(file: str) -> None:
    assert not above(file, (PACKAGE / file).read_text())


def test_an_import_from_above_is_noticed() -> None:
    inside = "def f():\n    from pyro_mpis import {}\n"
    assert above("factor_graph/graph.py", inside.format("programs"))
    assert above("programs/runs.py", "import pyro_mpis.particles.factors")
    assert above("programs/runs.py", "from pyro_mpis.factor_graph.graph import FactorGraph")
    assert above("particles/memory.py", inside.format("planning"))
    assert above("planning.py", "from pyro_mpis.factor_graph import evidence")
    assert above("blocks.py", inside.format("results"))
    assert above("results/saving.py", inside.format("importance"))
    assert not above("results/saving.py", inside.format("blocks"))
    assert not above("factor_graph/graph.py", inside.format("factor_graph"))
    assert not above("importance.py", inside.format("planning"))


def test_import_loads_nothing_else() -> None:
    """Beside what Pyro loads: so it takes hardly longer than ``import pyro``."""
    code = (
        "import sys, pyro; before = set(sys.modules); import pyro_mpis;"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split()) - sys.stdlib_module_names
    assert "pyro_mpis" in loaded
    assert loaded <= {"pyro_mpis", "opt_einsum", "tqdm"}


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").exists()
    assert setup["options.package_data"]["pyro_mpis"] == "py.typed"


def test_public_names() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", pyro_mpis.__version__)
    for name in pyro_mpis.__all__:
        assert hasattr(pyro_mpis, name)
