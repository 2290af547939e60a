"""The description that a package index shows: README.md enters, its text without relative links and pictures leaves."""

import pathlib
import re
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_ELSEWHERE = r"(?!https?://)[^)\s]+"


class ReadmeHook(MetadataHookInterface):
    """Fills in the dynamic field ``readme`` of pyproject.toml."""

    def update(self, metadata: dict[str, Any]) -> None:
        """As Hatchling asks for."""
        text = (pathlib.Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": without_relative_links(text)}


def without_relative_links(text: str) -> str:
    """Markdown in which only links with an address of their own are left.

    A relative link leads to a file of the repository, which an index does not have: of it the text is left, of a
    picture nothing.
    """
    text = re.sub(rf"!\[[^\]]*\]\({_ELSEWHERE}\)\n?", "", text)
    return re.sub(rf"\[([^\]]*)\]\({_ELSEWHERE}\)", r"\1", text)
