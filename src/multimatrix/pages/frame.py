"""The frame of a page: one HTML document that needs no network, no scripts and no other file."""

from __future__ import annotations

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template


def page_template(package: str, name: str) -> Template:
    """The template `name` of `package`, which can extend `frame.html.jinja` and import from `tables.html.jinja`."""
    loader = ChoiceLoader([PackageLoader(package, "."), PackageLoader("multimatrix.pages", ".")])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)
