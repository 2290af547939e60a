"""Checks the English of docstrings, comments, messages and pages.

A sentence has at most 35 words, and certain turns of phrase, which make a reader stumble, are not used. Code,
equations, tables, references and addresses do not count. Each fault is reported with its file and line.
"""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import vsa_optax

_ROOT = Path(__file__).parents[1]
_MOST_WORDS = 35
# Files and folders that are exempt until their text has been rewritten. Delete an entry once that is done.
_NOT_YET = (
    "tests/accumulation",
    "vsa_optax/accumulation",
)
_ITSELF = "tests/test_english.py"  # It quotes what it forbids.
_PATTERNS = ("vsa_optax/**/*.py", "benchmarks/*.py", "tests/**/*.py", "README.md", "CHANGELOG.md", "docs/**/*.md")
_FILES = [path.relative_to(_ROOT).as_posix() for pattern in _PATTERNS for path in sorted(_ROOT.glob(pattern))]

_DONE = "recorded|predicted|sent|lost|left|kept|known|missed|coded|asked|given|measured|meant|said"
# A pattern within a sentence, whose ends are ^ and $, and what to write instead.
_TURNS = {
    r"^Who(ever)? (?!.*\?$)": "a condition: 'If ...'",
    r"^What (?!.*\?$)": "a noun: 'The records', 'The result of ...'",
    r"^(Of|Those|Not|Likewise)\b(?!.*,)(?!.*\?$)": "a sentence with its subject",
    rf"\bwhat (is|was|are|were) ({_DONE})\b": "a noun: 'the record', 'the error'",
    r"\bwhat (leaves|left|enters|entered|came|comes|emits|predicts)\b": "a noun: 'the update', 'the gradient'",
    r"\bwhat (\w+ ){1,3}(makes|made|say|says) of\b": "a noun: 'the result of ...'",
    r"\b(is|was|are|were) worth\b": "the error, or the accuracy",
    r"\b(little|usual|much|more|less) trust\b": "a strict, the default or a loose tolerance",
    r"\b(it|that|optimizer) rests\b": "does not run",
    r"\b(leave|leaves|left) (in (its|their) place|as (it|they) came)\b": "is emitted",
    r"\b(zeros|updates|gradients|predictions) leave\b": "are emitted",
    r"\b(for|no) news\b": "a new value",
    r"\b(to|can|could) be had\b": "available",
    r"\bloses? (the )?least\b": "has the least error",
    r"\ball but (certain|parallel|equal|all)\b": "almost",
    r"\b(is|are) but\b": "only",
    r"\bbut for\b": "except for",
    r"\bdear(er|est)?\b": "expensive",
    r"\bfor ever\b": "forever",
    r"\bhopeless\b": "without a useful prediction",
    r"\bin vain\b": "without a result",
    r"\bof late\b": "recent",
    r"\bspeaks? for\b": "supports",
    r"\bthe doing of\b": "is caused by",
    r"\b(made|done|taken|computed) anew\b": "again",
    r"\bround (it|them|zero|plain)\b": "around",
    r"[(,] ?say[,.;:)]": "for example",
    r"\bbehind (the (last|leap|records?|steps?|update|slash)|an? (leap|step|true step|stroke)|what|it|them)\b": "after",
    r"(?<!there )\bis no (array|number|vector|tree|signature|average|test|module|codec|text|help)\b": "is not a",
}
_COMPILED = {re.compile(turn, 0 if turn[0] == "^" else re.IGNORECASE): text for turn, text in _TURNS.items()}
_CODE = "\N{OBJECT REPLACEMENT CHARACTER}"  # It stands for code, as one word.
_ENTRY = re.compile(r"[-*+] |\d+\. |\**[\w, `=.()\"\[\]|/]{1,60}\**: ")
_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Warns|State cost|Examples?|References|Axes):$")


@dataclasses.dataclass
class Chunk:
    """Consecutive prose: words with their lines. In an entry of a list, a semicolon or a colon ends a sentence."""

    words: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    is_entry: bool = False

    def add(self, line, text):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
        self.words += [(line, word) for word in re.sub(r"https?://\S+", _CODE, text).split()]

    def sentences(self):
        sentence = []
        for word, following in zip(self.words, [*self.words[1:], (0, "")], strict=False):
            sentence.append(word)
            is_stop = re.search(r"[.!?]['\")*\]]*$", word[1]) and not re.search(r"^\W*(e\.g|i\.e|al|vs)\.$", word[1])
            starts = re.match(rf"['\"(*\[]*([A-Z0-9{_CODE}]|$)", following[1])
            if (is_stop and starts) or (self.is_entry and word[1][-1] in ";:"):
                yield sentence
                sentence = []
        if sentence:
            yield sentence


def without_code(text):
    """The lines of a text, with one character in the place of each code span."""
    return re.sub(r"(``?)[^`]+?\1", lambda span: _CODE + "\n" * span[0].count("\n"), text).splitlines()


def chunks_of_docstring(text, first_line):
    chunk, section, base, is_code, is_example = Chunk(), "", 0, False, False
    for number, line in enumerate(without_code(inspect.cleandoc(text)), first_line):
        said, depth = line.strip(), len(line) - len(line.lstrip())
        section = section if depth >= base or not said else ""
        base = base if section else 0
        if not said:
            yield chunk
            chunk, is_example = Chunk(), False
        elif _SECTION.match(said):
            yield chunk
            chunk, section, base, is_code = Chunk(), said, depth + 4, False
        elif _ENTRY.match(said) and depth == base and not said.endswith("::"):
            yield chunk
            chunk, is_code = Chunk(is_entry=True), False
            chunk.add(number, re.sub(r"^\w+: ", f"{_CODE}: ", said))
        else:
            # A paragraph that begins deeper than the others is an equation or a table.
            is_code, is_example = depth > base and (is_code or not chunk.words), is_example or said.startswith(">>>")
            if (
                not (is_code or is_example)
                and section != "References:"
                and not re.search(r"\S {3,}\S|^[=|+-]{3,}", said)
            ):
                chunk.add(number, said)
    yield chunk


def chunks_of_page(text):
    chunk, is_code = Chunk(), False
    text = re.sub(
        r"^```.*?^```|<!--.*?-->", lambda code: "\n" * code[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE
    )
    for number, line in enumerate(without_code(text), 1):
        said = line.strip().lstrip("> ")
        is_code = not said or said.startswith(("|", "#", "![", "[!", ":::"))
        if is_code or _ENTRY.match(said):
            yield chunk
            chunk = Chunk(is_entry=not is_code)
        if not is_code:
            chunk.add(number, said)
    yield chunk


def chunks_of_comments(source):
    chunk, last = Chunk(), (0, 0)
    for number, line in enumerate(source.splitlines(), 1):
        if match := re.search(r"(^\s*|\S  )#\W*((?:noqa|type: ignore)[^#]*)?[#\s]*(.*)", line):
            is_alone, place = not match[1].strip(), len(match[1])
            if not (is_alone and last == (number - 1, place)):
                yield chunk
                chunk = Chunk()
            last = (number, place)
            chunk.add(number, " ".join(without_code(match[3])))
    yield chunk


def chunk_of_message(statement):
    """The message of an error or a warning."""
    call = statement.exc if isinstance(statement, ast.Raise) else statement.value
    chunk = Chunk(is_entry=True)
    if isinstance(call, ast.Call) and call.args:
        said = call.args[0]
        parts = said.values if isinstance(said, ast.JoinedStr) else [said]
        chunk.add(statement.lineno, "".join(str(x.value) if isinstance(x, ast.Constant) else _CODE for x in parts))
    return chunk


def statements_in(node):
    """All statements, without a look at their expressions, which takes long."""
    for name in ("body", "orelse", "finalbody", "handlers"):
        for statement in getattr(node, name, []):
            yield statement
            yield from statements_in(statement)


def chunks_of(path, text):
    if path.endswith(".md"):
        yield from chunks_of_page(text)
        return
    tree = ast.parse(text)
    for node in [tree, *statements_in(tree)]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            yield from chunks_of_docstring(node.body[0].value.value, node.body[0].lineno)
        is_warning = isinstance(node, ast.Expr) and ast.unparse(node.value).startswith("warnings.warn(")
        if isinstance(node, ast.Raise) or is_warning:
            yield chunk_of_message(node)
    yield from chunks_of_comments(text)


def faults(path, text):
    """The faults in a file's text, each as ``path:line: fault``."""
    found = []
    for chunk in chunks_of(path, text):
        for sentence in chunk.sentences():
            said = " ".join(word for _, word in sentence)
            num = sum(bool(re.search(rf"[^\W\d_]|{_CODE}", word)) for _, word in sentence)
            if num > _MOST_WORDS:
                found.append(f"{path}:{sentence[0][0]}: a sentence of {num} words: {said[:90]} ...")
            for turn, instead in _COMPILED.items():
                if match := turn.search(said):
                    line = sentence[said[: match.start()].count(" ")][0]
                    found.append(f"{path}:{line}: {match[0].strip()!r}; write instead: {instead}")
    return found


def is_covered(path):
    return path != _ITSELF and not any(path == entry or path.startswith(f"{entry}/") for entry in _NOT_YET)


def test_sentences_are_short_and_plain():
    found = [fault for path in _FILES if is_covered(path) for fault in faults(path, (_ROOT / path).read_text())]
    assert not found, "\n" + "\n".join(found)


def test_what_is_exempt_exists():
    assert [entry for entry in _NOT_YET if not (_ROOT / entry).exists()] == []


_LONG = f"A sentence {'goes on and on ' * 9}to its end."
_BAD = [
    _LONG,
    "Who has the memory takes int8.",
    "What is left of it, is sent.",
    "Three ready-made optimizers, of little, usual and much trust.",
    "Secants are dear.",
    "The share stands behind a stroke.",
    "It is looking in vain.",
    "It sleeps after 32 hopeless steps.",
    "The update then leaves as it came, and it rests.",
]


@pytest.mark.parametrize("sentence", _BAD)
def test_a_bad_sentence_is_found_wherever_it_stands(sentence):
    """With its line; in code, an equation, a table, an example or an address it is none."""
    module = f'"""A module.\n\nA first sentence. {sentence}\n"""\n\nx = 1  # {sentence}\n'
    assert {fault.split(":")[1] for fault in faults("a.py", module)} == {"3", "6"}
    function = f'def f(x):\n    """Returns x.\n\n    Args:\n        x: a number. {sentence}\n    """\n'
    assert {fault.split(":")[1] for fault in faults("a.py", function)} == {"5"}
    message = f'raise ValueError(\n    f"x must be {{y}}. "\n    "{sentence}"\n)\n'
    assert {fault.split(":")[1] for fault in faults("a.py", message)} == {"1"}
    assert {fault.split(":")[1] for fault in faults("a.md", f"# Title\n\nA page.\n{sentence}\n")} == {"4"}
    assert faults("a.md", f"```python\n{sentence}\n```\n\n| {sentence} |\n|---|\n\n<!-- {sentence} -->\n") == []
    assert (
        faults("a.py", f'"""A module.\n\n    {sentence}\n\nIt has `{sentence}`.\n\n>>> {sentence}\n{sentence}\n"""')
        == []
    )


def test_good_sentences_pass():
    good = (
        "If memory allows, use int8 or bfloat16: neither measurably changes the loss. The wrapped optimizer does not "
        "run. Which one? What is a secant? There is no number behind the comma, e.g. in 1 or `a.b`. It is not a test."
    )
    assert faults("a.md", f"{good} {'Short ones follow each other. ' * 20}") == []


def documented():
    """Public functions and settings, with the names of the section that explains their arguments."""
    for name in vsa_optax.__all__:
        value = getattr(vsa_optax, name)
        members = vars(value).items() if inspect.ismodule(value) else [(name, value)]
        for inner, part in members:
            is_own = not inspect.ismodule(value) or getattr(part, "__module__", "") == value.__name__
            if inner.startswith("_") or not is_own or not (inspect.isfunction(part) or dataclasses.is_dataclass(part)):
                continue
            if is_covered(Path(inspect.getsourcefile(part)).relative_to(_ROOT).as_posix()):
                yield pytest.param(part, id=inner)


@pytest.mark.parametrize("part", list(documented()))
def test_every_argument_is_explained_in_place(part):
    """By its name, in words: not by a pointer to another docstring."""
    lines = inspect.getdoc(part).splitlines()
    entries = {name: said for line in lines for name, said in re.findall(r"^    \**(\w+): (.*)", line)}
    arguments = [name for name in inspect.signature(part).parameters if name != "_"]
    assert [name for name in arguments if name not in entries] == []
    pointing = r"^(see|as in|as for|likewise|the same)\b|\bsee `"
    assert [name for name in arguments if re.search(pointing, entries[name], re.IGNORECASE)] == []
