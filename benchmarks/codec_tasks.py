"""Shared by the scripts on codecs: two training tasks, gradients captured from them, tables and verdicts."""

import concurrent.futures
import functools
import importlib.metadata
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import char_transformer
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vsa_optax import demo

BLOCK = 1024  # The block size of the codecs; smaller leaves are not coded.
TRITS = (1, 2, 3)


class Task(NamedTuple):
    """Something to train.

    Attributes:
        description: one line for a log.
        rates: Adam's learning rates to choose from.
        init: seed -> parameters.
        batches: seed, steps -> array with an axis ``[steps]`` in front.
        loss: parameters, batch -> mean cross-entropy, which is differentiated.
        final: parameters -> mean cross-entropy on data that is the same for every seed.
    """

    description: str
    rates: tuple[float, ...]
    init: Callable[[int], Any]
    batches: Callable[[int, int], np.ndarray]
    loss: Callable[[Any, Any], jax.Array]
    final: Callable[[Any], jax.Array]


def shuffled(seed, steps, size, batch_size):
    """``[steps, batch_size] int32``, numbers below ``size``: shuffled anew every epoch, whose remainder is left out."""
    rng, whole = np.random.default_rng(seed), size // batch_size
    epochs = [rng.permutation(size)[: whole * batch_size] for _ in range(-(-steps // whole))]
    return np.concatenate(epochs).reshape(-1, batch_size)[:steps].astype(np.int32)


@functools.cache
def digits(batch_size):
    """The demo's network; loss over its whole training set at the end. A batch is a list of images' numbers."""
    task = demo.Task(*demo.load_digits(), *demo.make_network(0))
    images, labels = (jnp.asarray(x) for x in task.train)
    size = len(labels)

    def batches(seed, steps):
        if batch_size == size:
            return np.broadcast_to(np.arange(size, dtype=np.int32), (steps, size))
        return shuffled(seed, steps, size, batch_size)

    num = sum(leaf.size for leaf in jax.tree.leaves(task.params))
    return Task(
        f"digits MLP: {num:,} parameters, {size} images, batch {batch_size}; final loss over all of them",
        rates=(3e-3, 1e-2, 3e-2),
        init=lambda seed: demo.make_network(seed)[0],
        batches=batches,
        loss=lambda params, chosen: task.loss(params, images[chosen], labels[chosen]),
        final=lambda params: task.loss(params, images, labels),
    )


@functools.cache
def characters(batch_size=8, num_held_out=256):
    """The transformer of `char_transformer`; loss on held-out text at the end."""
    held_out = jnp.asarray(char_transformer.held_out(num_held_out))
    return Task(
        f"{char_transformer.describe()}; batch {batch_size}; final loss on {num_held_out} windows of held-out text",
        rates=(1e-3, 3e-3, 6e-3),
        init=char_transformer.init,
        batches=lambda seed, steps: char_transformer.batches(seed, steps, batch_size),
        loss=char_transformer.loss,
        final=lambda params: char_transformer.loss(params, held_out),
    )


def trained(task, params, batches):
    """Parameters after a step of Adam on each batch, at the middle one of the rates."""
    opt = optax.adam(task.rates[1])

    def step(carry, batch):
        params, state = carry
        updates, state = opt.update(jax.grad(task.loss)(params, batch), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, opt.init(params)), batches)[0][0]


def captured_gradients(task, num_seeds, after):
    """For each seed the gradient of one batch, behind ``after`` steps of Adam at the middle one of the rates."""

    @jax.jit
    def capture(params, batches):
        return jax.grad(task.loss)(trained(task, params, batches[:-1]), batches[-1])

    return [capture(task.init(seed), task.batches(seed, after + 1)) for seed in range(num_seeds)]


def leaf_names(tree):
    """The path of each leaf, without what Flax adds to it."""
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)]
    return [path.removesuffix("/value") for path in paths]


def bits(state, like):
    """Of a state, for each parameter of the tree ``like``."""
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return 8 * nbytes / optax.tree.size(like)


def in_processes(function, jobs):
    """``function(*job)`` for each job, in processes of one thread, one a core; yields results in the jobs' order.

    They do more work a second than one process whose operations are spread over the cores.
    """
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        for future in [pool.submit(function, *job) for job in jobs]:
            yield future.result()


def run_parts(parts, chosen, options):
    """``part(options)`` for each part whose name is in the list, for all with ``"all"``, and how long it took."""
    for name, part in parts.items():
        if "all" in chosen or name in chosen:
            began = time.perf_counter()
            part(options)
            print(f"\n{name}: {time.perf_counter() - began:.0f} s in all\n", flush=True)


def print_header(*lines):
    """Machine and versions, then the lines."""
    names = ("jax", "jaxlib", "optax", "flax", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}")
    print(f"versions: python {platform.python_version()}, {versions}")
    print(*lines, sep="\n")
    print(flush=True)


def print_row(widths, cells):
    """The first cell to the left, the others to the right, as wide as given."""
    first, *others = (str(cell) for cell in cells)
    text = first.ljust(widths[0]) + "".join(f"  {c:>{w}}" for c, w in zip(others, widths[1:], strict=True))
    print(text.rstrip(), flush=True)


def in_trits(number):
    """A name for a table."""
    return f"{number} trit{'s' * (number > 1)}"


def spread(values, form="{:.4g}"):
    """Mean [smallest, largest]."""
    mean, low, high = (form.format(x) for x in (np.mean(values), np.min(values), np.max(values)))
    return f"{mean} [{low}, {high}]"


def quartiles(values):
    """Median [quartiles]."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def verdict(is_met):
    """For a line that compares a measured number with its target."""
    return "met" if is_met else "NOT MET"
