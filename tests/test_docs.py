# SPDX-License-Identifier: Apache-2.0
"""What the build of the site does not see: links of files beside it, tutorials as notebooks."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = sorted(ROOT.glob("*.md"))
TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9]*.py"))


def links(text: str) -> list[str]:
    """Return the targets of links to files, code left out."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if not re.match(r"https?:|mailto:|#", target)]


def test_links_are_found() -> None:
    assert links("[a](b.md), [c](https://d.e), `[f](g.md)`, [`h`](i/j.py#k)") == [
        "b.md",
        "i/j.py#k",
    ]


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.name)
def test_links_have_targets(file: Path) -> None:
    missing = [name for name in links(file.read_text()) if not (ROOT / name.split("#")[0]).exists()]
    assert not missing


@pytest.mark.parametrize("file", TUTORIALS, ids=lambda file: file.name)
def test_tutorials_run_as_notebooks(file: Path) -> None:
    """The first cell has the title; nothing needs a command line, or a picture without a screen."""
    source = file.read_text()
    first = source.split("# %%")[1]
    assert first.startswith(" [markdown]\n# # ")
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    assert not names & {"argparse", "__file__"}
    assert "matplotlib.use" not in source
    assert "import _" not in source.replace("from __future__", "")
