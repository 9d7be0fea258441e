"""Docstrings for the site, which reads Markdown and knows ``Examples:`` alone."""

from __future__ import annotations

import re
from typing import Any

import griffe

CHANGES = {
    r"^( *)Example:$": r"\1Examples:",
    r"::$": ":",
    r":(?:class|func|meth|mod):`~?(?:[\w.]*\.)?(\w+)`": r"``\1``",
}


class AsMarkdown(griffe.Extension):
    """Write docstrings of Google's style the way that Markdown shows them right."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            for old, new in CHANGES.items():
                text = obj.docstring.value
                obj.docstring.value = re.sub(old, new, text, flags=re.MULTILINE)
