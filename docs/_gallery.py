# SPDX-License-Identifier: Apache-2.0
"""
The directive ``gallery``: every picture of the tutorials, linked to the section that makes it.

The pictures are those of the executed notebooks. A site that is made without running them has none.
"""

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Place(nodes.General, nodes.Element):
    """Where the pictures go once all pages have been read."""


class Gallery(SphinxDirective):
    """The directive."""

    def run(self) -> list[nodes.Node]:
        """Leave a place for the pictures."""
        return [Place()]


def pictures(app: Sphinx, page: str, tutorial: str) -> list[nodes.figure]:
    """Return the pictures of a tutorial, as figures for a page."""
    tree = app.env.get_doctree(tutorial)
    title = app.env.titles[tutorial].astext()
    found = []
    for image in tree.findall(nodes.image):
        section = image.parent
        while not isinstance(section, nodes.section):
            section = section.parent
        heading = section[0].astext()
        caption = title if heading == title else f"{title}: {heading}"
        target = app.builder.get_relative_uri(page, tutorial) + f"#{section['ids'][0]}"
        link = nodes.reference("", "", refuri=target, internal=True)
        link += nodes.image(uri=image["uri"], candidates=image["candidates"], alt=caption)
        figure = nodes.figure("", link, ids=[f"picture-{len(found)}-{section['ids'][0]}"])
        text = nodes.reference("", caption, refuri=target, internal=True)
        figure += nodes.caption("", "", text)
        found.append(figure)
    return found


def filled(app: Sphinx, tree: nodes.document, page: str) -> None:
    """Put the pictures into their place."""
    for place in list(tree.findall(Place)):
        tutorials = sorted(name for name in app.env.found_docs if name.startswith("tutorials/"))
        grid = nodes.container(classes=["gallery"])
        for tutorial in tutorials:
            grid += pictures(app, page, tutorial)
        place.replace_self(grid if len(grid) else [])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_node(Place)
    app.add_directive("gallery", Gallery)
    app.connect("doctree-resolved", filled)
    return {"parallel_read_safe": True}
