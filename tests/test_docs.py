"""The documentation's programs: each section's Python runs as it stands, behind that of the page's introduction."""

import ast
import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_PAGES = sorted((_ROOT / "docs").glob("*.md"))


def _python_in(text: str) -> str:
    return "".join(re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))


def _programs():
    for page in _PAGES:
        introduction, *sections = re.split(r"^## ", page.read_text(), flags=re.MULTILINE)
        shared = _python_in(introduction)
        for section in sections:
            if own := _python_in(section):
                yield pytest.param(shared + own, id=f"{page.stem}: {section.splitlines()[0]}")


@pytest.mark.parametrize("program", list(_programs()))
def test_a_program_runs(program):
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})


def _said_by_the_package() -> str:
    """All of its strings, with `{…}` for what is put in."""

    def text(node: ast.expr) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) for part in node.values)
        return str(node.value) if isinstance(node, ast.Constant) else "{…}"

    nodes = (
        node
        for path in (_ROOT / "vsa_optax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.JoinedStr | ast.Constant)
    )
    return "\n".join(map(text, nodes))


def test_the_messages_that_are_explained_are_those_that_are_said():
    page = (_ROOT / "docs" / "troubleshooting.md").read_text()
    rows = re.findall(r"^\| (.*?) \|", page, flags=re.MULTILINE)
    # A symptom is told in words; what is in backticks alone is a message of ours.
    messages = [row.strip("`") for row in rows if re.fullmatch(r"`[^`]+`", row)]
    assert len(messages) > 20
    said = _said_by_the_package()
    assert [message for message in messages if message not in said] == []
