"""The mutants fit the source; run at length, every one of them is noticed."""

import ast
import functools
import pathlib
import subprocess
import sys

import mutations
import pytest


@functools.cache
def names_of_tests(file):
    text = (mutations.ROOT / "tests" / file).read_text()
    return [
        node.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


@functools.cache
def dumped(file):
    return ast.dump(ast.parse(file.read_text()))


@pytest.mark.parametrize("mutant", mutations.MUTANTS, ids=range(len(mutations.MUTANTS)))
def test_mutants_fit_the_source(mutant):
    tree = ast.parse(mutations.mutated(mutant))
    file = mutations.PACKAGE / mutations.file_of(mutant.place)
    assert ast.dump(tree) != dumped(file)
    compile(tree, str(file), "exec")


@pytest.mark.parametrize("tests", dict.fromkeys(mutant.tests for mutant in mutations.MUTANTS))
def test_the_tests_beside_a_mutant_exist(tests):
    """Each file has a test of such a name, and each alternative of ``-k`` is in the name of some test."""
    files, _, chosen = tests.partition(" -k ")
    names = {file: names_of_tests(file) for file in files.split()}
    alternatives = [words.split(" and ") for words in chosen.split(" or ")]
    for file, of_file in names.items():
        assert any(word in name for words in alternatives for word in words for name in of_file), file
    for words in alternatives:
        assert any(word in name for word in words for of_file in names.values() for name in of_file), words


def test_no_mutant_is_listed_twice():
    changes = [mutant[:3] for mutant in mutations.MUTANTS]
    assert len(set(changes)) == len(changes)


@pytest.mark.slow
def test_every_mutant_is_killed():
    script = pathlib.Path(mutations.__file__)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
