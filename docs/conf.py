"""The documentation: ``python -m sphinx -W docs docs/_build`` builds it, and needs no network."""

import ast
import inspect
import re
import shutil
import textwrap
from pathlib import Path

from docutils import nodes
from docutils.nodes import Element
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.writers.html5 import HTML5Translator

import vsa_optax

_HERE = Path(__file__).parent
_NOTEBOOKS = _HERE.parent / "notebooks"

project = "vsa_optax"
author = "the authors of vsa_optax"
release = vsa_optax.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
nitpicky = True

html_theme = "furo"
pygments_style = "default"  # Furo's own shows no added lines of a diff.
pygments_dark_style = "github-dark"
html_title = f"vsa_optax {release}"
html_copy_source = False
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = ">>> |\\.\\.\\. "
copybutton_prompt_is_regexp = True

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # The notebooks hold the outputs of their last run; a test runs them.

# Docstrings name things of the library in single backticks, and types of others by the module that they are in.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # Signatures show annotations as they are written: see `_written_signature`.
napoleon_custom_sections = ["State cost"]
napoleon_use_ivar = True
nitpick_ignore_regex = [
    ("py:class", r"(?!vsa_optax\b).*"),  # Types of other libraries.
    ("py:.*", r"(vsa_optax\.)?(accumulation|codecs|compression|core|kernels|prediction)\..*"),  # Private modules.
    ("py:obj", r"[A-Z]\w+\.\w+"),  # Fields: the class lists them.
]


def _copy_notebooks(app: Sphinx) -> None:
    """Copies the notebooks into the sources, with links to pages and logs as they are from there."""
    target = _HERE / "notebooks"
    target.mkdir(exist_ok=True)
    for old in target.glob("*.ipynb"):
        if not (_NOTEBOOKS / old.name).exists():
            old.unlink()
    for notebook in _NOTEBOOKS.glob("*.ipynb"):
        text = notebook.read_text().replace("](../docs/", "](../").replace("](../benchmarks/", "](../../benchmarks/")
        copy = target / notebook.name
        if not copy.exists() or copy.read_text() != text:
            copy.write_text(text)
            shutil.copystat(notebook, copy)


def _link_to_copies(app: Sphinx, docname: str, source: list[str]) -> None:
    """Links of a page to notebooks lead to the copies, which are pages."""
    if "/" not in docname:
        source[0] = re.sub(r"\]\(\.\./notebooks/", "](notebooks/", source[0])


def _name_in_package(app: Sphinx, env: BuildEnvironment, node: Element, shown: Element) -> Element | None:
    """A public name without its package, wherever it is written."""
    python = env.get_domain("py")
    target = f"vsa_optax.{node.get('reftarget')}"
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, shown)


def _mark_equations(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """An indented block after a paragraph is shown as it is written: equations, mostly."""
    for i in range(len(lines) - 1, 1, -1):
        before = lines[i - 2]
        starts = lines[i].startswith("    ") and not lines[i].lstrip().startswith(">>>")
        if (
            starts
            and not lines[i - 1].strip()
            and before.strip()
            and not before.startswith(" ")
            and before[-2:] != "::"
        ):
            lines[i - 1 : i] = ["", ".. code-block:: text", ""]


def _keep_short_cells_whole(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """A number in a table, such as 1e-9, is not broken after its hyphen."""
    for cell in doctree.findall(nodes.entry):
        if len(cell.astext()) <= 16:
            cell["classes"].append("short")


def _written_signature(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returned: str | None
) -> tuple[str, str] | None:
    """A function's arguments and result as its source has them: an alias of a type is not taken apart."""
    if what not in ("function", "method") or not inspect.isroutine(obj):
        return None
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(obj))).body
    if not isinstance(node, ast.FunctionDef):
        return None
    if what == "method":
        del node.args.args[0]
    return f"({ast.unparse(node.args)})", ast.unparse(node.returns) if node.returns else ""


def _write_math(writer: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Writes an equation as MathML, which browsers show without a script from another site."""
    is_block = isinstance(node, nodes.math_block)
    writer.body.append(latex2mathml.tex2mathml(node.astext(), as_block=is_block))
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", _copy_notebooks)
    app.connect("source-read", _link_to_copies)
    app.connect("doctree-resolved", _keep_short_cells_whole)
    app.connect("missing-reference", _name_in_package)
    app.connect("autodoc-process-docstring", _mark_equations, priority=400)  # Before Napoleon reads the sections.
    app.connect("autodoc-process-signature", _written_signature)
    app.add_html_math_renderer("mathml", (_write_math, None), (_write_math, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


html_math_renderer = "mathml"
