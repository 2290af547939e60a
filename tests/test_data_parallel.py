"""The complete data-parallel program in ``docs/``: it trains, goes on from a checkpoint, and runs as two processes."""

import contextlib
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "data_parallel.py"


def run(folder, steps, save_every):
    return runpy.run_path(str(SCRIPT))["main"](
        ["--folder", str(folder), "--steps", str(steps), "--save-every", str(save_every)]
    )


def losses_in(said):
    return [float(number) for number in re.findall(r"loss ([\d.]+)", said)]


def test_it_trains_and_goes_on_where_it_was_ended(tmp_path, capsys):
    """To the bits that it would have come to, each device with the residual that was its own."""
    whole = run(tmp_path, 30, 10)
    losses = losses_in(capsys.readouterr().out)
    assert len(losses) == 3
    assert losses[-1] < 0.9 * losses[0]
    for step in (20, 30):  # As if it had been ended between 10 and 20.
        shutil.rmtree(tmp_path / f"step_{step:08d}")
    resumed = run(tmp_path, 30, 10)
    assert losses_in(capsys.readouterr().out) == losses[1:]
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    residual = np.asarray(whole[1][0].residual["hidden"]["kernel"])
    assert residual.shape[0] == len(jax.devices())
    assert len({own.tobytes() for own in residual}) == len(residual)


@pytest.mark.slow
def test_two_processes(tmp_path):
    folder = tmp_path / "run"
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    command = [sys.executable, str(SCRIPT), "--folder", str(folder), "--steps", "20", "--save-every", "10"]
    command += ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process"]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, text=True)
            )
            for i in range(2)
        ]
        said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(losses_in(said[0])) == 2
    assert not losses_in(said[1])
