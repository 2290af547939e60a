"""The mutants fit the source; run at length, every one of them is noticed."""

import ast
import pathlib
import subprocess
import sys

import mutations
import pytest


@pytest.mark.parametrize("mutant", mutations.MUTANTS, ids=range(len(mutations.MUTANTS)))
def test_mutants_fit_the_source(mutant):
    text = mutations.mutated(mutant)
    file = mutations.PACKAGE / mutations.file_of(mutant.place)
    assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(file.read_text()))
    compile(text, str(file), "exec")
    files, _, _ = mutant.tests.partition(" -k ")
    assert all((mutations.ROOT / "tests" / name).is_file() for name in files.split())


def test_no_mutant_is_listed_twice():
    changes = [mutant[:3] for mutant in mutations.MUTANTS]
    assert len(set(changes)) == len(changes)


@pytest.mark.slow
def test_every_mutant_is_killed():
    script = pathlib.Path(mutations.__file__)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
