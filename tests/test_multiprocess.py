"""Two processes that train together: the same bits in both, an end to both if one dies, and a run that is resumed."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import multiprocess_worker
import numpy as np
import pytest
from jax.sharding import Mesh

from vsa_optax import checkpoint

WORKER = Path(__file__).with_name("multiprocess_worker.py")
STEPS, SAVED_AT = 20, 7  # It is saved in the middle of a PREDICT phase.
PATIENCE = 120  # Seconds, on a busy machine; alone, a run takes five.
# JAX's errors for a lost process: a collective has failed; or it has not been heard of, or was the coordinator.
LOST = r"RuntimeError: .*Gloo .* failed|JAX distributed service detected fatal errors"


class Process:
    """One of the two, its output in files: nobody has to read a pipe."""

    def __init__(self, folder, number, port, *arguments):
        self._out, self._err = (folder / f"{number}.{kind}" for kind in ("out", "err"))
        # One device each. With more, Gloo may wait for the process's own other device when the other process is lost,
        # until JAX gives that up, which with the oldest release takes 100 s.
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, str(WORKER), str(number), str(port), *map(str, arguments)]
        with self._out.open("w") as out, self._err.open("w") as err:
            self.popen = subprocess.Popen(command, stdout=out, stderr=err, env=environment)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.popen.kill()
        self.popen.wait()

    @property
    def said(self):
        return self._out.read_text() + self._err.read_text()

    def after(self, word):
        """The words after ``word`` at the beginning of a line of its output."""
        [line] = [line for line in self._out.read_text().splitlines() if line.startswith(f"{word} ")]
        return line.split()[1:]

    def wait_for(self, line):
        deadline = time.monotonic() + PATIENCE
        while line not in self._out.read_text().splitlines():
            assert self.popen.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.01)

    def ends(self, timeout=PATIENCE):
        """How it ends."""
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.said}") from None


@contextlib.contextmanager
def two_processes(folder, *arguments):
    """Starts them; none is left in the end."""
    folder.mkdir()
    with socket.socket() as reserved:
        # Bound but not listening, the port is given to nobody who does not ask for it by number.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        with Process(folder, 0, port, *arguments) as first, Process(folder, 1, port, *arguments) as second:
            yield first, second


def held(processes):
    """The hashes of the devices' arrays after all steps: first of the replicated ones, then of the others."""
    of_devices = [device.split(":") for process in processes for device in process.after("end")]
    return list(zip(*of_devices, strict=True))


class Killed(NamedTuple):
    """A run that was killed some steps after its last one, when it had said everything."""

    folder: Path
    first: Process
    second: Process
    code: int | None  # With which the other process ended.


def killed_run(folder, victim):
    run = folder / "run"
    with two_processes(folder / "killed", run, STEPS, SAVED_AT) as processes:
        for process in processes:
            process.wait_for(f"step {STEPS + 5}")
        processes[victim].popen.send_signal(signal.SIGKILL)
        return Killed(run, *processes, processes[1 - victim].ends(30))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    return killed_run(tmp_path_factory.mktemp("first"), victim=1)


def both(run, word):
    return [process.after(word) for process in (run.first, run.second)]


def test_every_process_holds_the_same_bits(killed):
    shared, own = held((killed.first, killed.second))
    assert shared[0] == shared[1]
    assert own[0] != own[1]  # The residuals.
    first, second = both(killed, "predicted")
    assert first == second
    assert int(first[0]) > 4


def test_a_nan_in_one_process_leaves_the_windows_of_both_in_step(killed):
    """Each process sums micro-batches, and one of them skips one; without agreement the other would wait forever."""
    (first, *walked), (second, *other) = both(killed, "accumulated")
    assert walked == other == ["1", "0", "0", "1", "0", "1"]
    (shared, own), (same, other) = first.split(":"), second.split(":")
    assert shared == same
    assert own != other  # The sums.


def test_a_save_that_cannot_be_is_refused_in_every_process(killed):
    alone, unwritable = ([" ".join(words) for words in both(killed, word)] for word in ("alone", "unwritable"))
    assert alone[0] == alone[1]
    assert alone[0].startswith("ValueError leaf (the tree is one leaf) is an array of this process alone")
    assert unwritable[0].startswith("FileExistsError")
    assert unwritable[1] == "OSError process 0 could not write the checkpoint; its own error says why"


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_run_and_the_checkpoint_resumes(victim, killed, tmp_path):
    """The resumed run comes to what the first one had come to by itself, before it was killed."""
    run = killed if victim == 1 else killed_run(tmp_path, victim)
    survivor = (run.first, run.second)[1 - victim]
    assert run.code not in (0, None)
    assert re.search(LOST, survivor.said), survivor.said

    # One process alone can read it, on as many devices.
    devices = jax.devices()[:2]
    template = multiprocess_worker.first_state(Mesh(np.array(devices), ("data",)))
    step, state = checkpoint.restore(run.folder, template, config=multiprocess_worker.SETTINGS)
    assert step == SAVED_AT
    assert list(multiprocess_worker.digests(state, devices)) == [device for [device] in both(run, "saved")]

    with two_processes(tmp_path / "resumed", run.folder, STEPS, 0) as processes:
        for process in processes:
            assert process.ends() == 0, process.said
    assert [process.after("from") for process in processes] == [[str(SAVED_AT)]] * 2
    assert held(processes) == held((killed.first, killed.second))
