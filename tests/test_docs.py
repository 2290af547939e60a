"""The README and the documentation: programs run as they stand, links lead somewhere, no public name is missing."""

import ast
import json
import re
import types
from pathlib import Path

import pytest

import vsa_optax

_ROOT = Path(__file__).parents[1]
_PAGES = sorted((_ROOT / "docs").glob("*.md"))
_README = _ROOT / "README.md"


def _python_in(text: str) -> str:
    return "".join(re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))


def _programs():
    """Each section's Python behind that of the introduction, or the introduction's alone if no section has any."""
    for page in _PAGES:
        introduction, *sections = re.split(r"^## ", page.read_text(), flags=re.MULTILINE)
        shared = _python_in(introduction)
        with_python = [section for section in sections if _python_in(section)]
        for section in with_python:
            yield pytest.param(shared + _python_in(section), id=f"{page.stem}: {section.splitlines()[0]}")
        if shared and not with_python:
            yield pytest.param(shared, id=page.stem)


@pytest.mark.parametrize("program", list(_programs()))
def test_a_program_runs(program):
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})


def test_the_program_in_the_readme_trains(capsys):
    exec(compile(_python_in(_README.read_text()), "README", "exec"), {"__name__": "__main__"})
    first, last = re.search(r"loss (\S+) -> (\S+) after 60 gradients", capsys.readouterr().out).groups()
    assert float(last) < 1e-3 * float(first)


def test_the_readme_is_short_and_has_the_commands():
    text = _README.read_text()
    assert len(text.splitlines()) <= 140
    for name, last in (("main", "vsa_optax.demo"), ("test", "pytest -n 2")):
        (block,) = re.findall(rf"^<!-- run: {name} -->\n```bash\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
        assert block.splitlines()[-1].endswith(last)


def test_the_demos_table_is_that_of_its_log():
    log = (_ROOT / "benchmarks" / "demo.log").read_text()
    for page in (_README, _ROOT / "docs" / "benchmarks.md"):
        (table,) = re.findall(r"^```text\n(method .*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        assert table in log


def _linked_from(path: Path) -> list[str]:
    """The targets of the links and pictures of a page."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "\n".join(
            "".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"
        )
    text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def _anchors(path: Path) -> set[str]:
    """The anchors of the headings, as code hosting sites and the documentation make them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "path",
    [_README, _ROOT / "CHANGELOG.md", *_PAGES, *sorted((_ROOT / "docs" / "api").glob("*.md"))],
    ids=lambda path: str(path.relative_to(_ROOT)),
)
def test_links_within_the_repository_lead_somewhere(path):
    wrong = []
    for link in _linked_from(path):
        target, _, anchor = link.partition("#")
        if re.match(r"https?:", link):
            continue
        to = (path.parent / target).resolve() if target else path
        if not to.exists() or (anchor and anchor not in _anchors(to)):
            wrong.append(link)
    assert wrong == []


def test_links_in_notebooks_lead_somewhere():
    notebooks = sorted((_ROOT / "notebooks").glob("*.ipynb"))
    links = [(path, link) for path in notebooks for link in _linked_from(path) if not re.match(r"https?:", link)]
    assert [link for path, link in links if not (path.parent / link.partition("#")[0]).exists()] == []


def _public_names():
    """As the API pages write them: without the package, and with the module if there is one."""
    for name in vsa_optax.__all__:
        value = getattr(vsa_optax, name)
        if not isinstance(value, types.ModuleType):
            yield name
            continue
        for inner, part in vars(value).items():
            if not inner.startswith("_") and getattr(part, "__module__", None) == value.__name__:
                yield f"{name}.{inner}"


def _documented_names():
    for page in (_ROOT / "docs" / "api").glob("*.md"):
        module = ""
        for directive, name in re.findall(r"^\.\. (\w+):: (\S+)$", page.read_text(), flags=re.MULTILINE):
            if directive in ("currentmodule", "automodule"):
                module = name.removeprefix("vsa_optax").removeprefix(".")
            elif directive in ("autofunction", "autoclass"):
                yield name if name.startswith("vsa_optax.") or not module else f"{module}.{name}"


def test_the_api_pages_have_every_public_name_once():
    documented = [name for name in _documented_names() if not name.startswith("vsa_optax.")]
    assert sorted(documented) == sorted(_public_names())


def test_every_page_is_in_the_table_of_contents():
    index = (_ROOT / "docs" / "index.md").read_text()
    contents = "".join(re.findall(r"```{toctree}(.*?)```", index, flags=re.DOTALL))
    assert {page.stem for page in _PAGES} - {"index"} <= set(
        re.findall(r"(?:^|<)([\w/]+)(?:>|$)", contents, re.MULTILINE)
    )


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
