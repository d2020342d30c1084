"""Turns the reStructuredText of the docstrings into Markdown, with links to what the API page documents."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

_API_PAGE = Path(__file__).parents[1] / "api.md"
_DOCUMENTED = frozenset(re.findall(r"^::: (\S+)$", _API_PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE))

_ROLE = re.compile(r":(?:mod|class|func|meth|attr|exc|data):`(~?)([\w.]+)`")
_MATH = re.compile(r"^(?P<indent> *)\.\. math:: *(?P<formula>.+)$", flags=re.MULTILINE)
_LITERAL = re.compile(r"``([^`]+)``")


def _link(role: re.Match[str]) -> str:
    tilde, name = role.groups()
    text = name.rpartition(".")[2] if tilde else name
    parts = name.split(".")
    # The longest documented prefix: a method is found at the page of its class.
    for end in range(len(parts), 1, -1):
        if ".".join(parts[:end]) in _DOCUMENTED:
            return f"[`{text}`][{name}]"
    # A class of the same page, named without its module.
    for package in ("heatopt", "heatopt.comm", "heatopt.lr_scheduler"):
        if f"{package}.{parts[0]}" in _DOCUMENTED:
            return f"[`{text}`][{package}.{name}]"
    return f"`{text}`"


def to_markdown(text: str) -> str:
    """Translate what the docstrings use of reStructuredText."""
    text = _ROLE.sub(_link, text)
    text = _MATH.sub(r"\g<indent>\\[ \g<formula> \\]", text)
    return _LITERAL.sub(r"`\1`", text)


class RestDocstrings(griffe.Extension):
    """Translates each docstring as soon as its object has been read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
