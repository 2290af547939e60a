"""Makes the description for a package index: the text of README.md without relative links and pictures."""

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
    """Markdown in which all links have an address.

    A relative link leads to a file of the repository, which an index does not have. Its text is kept, and a picture is
    dropped.
    """
    text = re.sub(rf"!\[[^\]]*\]\({_ELSEWHERE}\)\n?", "", text)
    return re.sub(rf"\[([^\]]*)\]\({_ELSEWHERE}\)", r"\1", text)
