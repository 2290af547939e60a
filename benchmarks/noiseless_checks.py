"""Measures the cost of an evaluation of each task, and checks that tasks and counts are as described."""

import functools
import time

import codec_tasks
import jax
import jax.numpy as jnp
import noiseless_rivals
import numpy as np
import optax
from noiseless_rivals import lowest
from noiseless_task import FullBatch, make, num_params


def times(tasks, rounds=5):
    """Seconds of loss and gradient; the processor's own seconds are those that other programs do not disturb."""
    codec_tasks.print_header(f"Loss and gradient, seconds: medians of {rounds}")
    widths = [28, 12, 12, 12, 12]
    codec_tasks.print_row(widths, ["", "parameters", "seconds", "processor", "compile"])
    for name, task in tasks.items():
        params, loss = make(task, 0)
        began = time.perf_counter()
        evaluate = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        compile_seconds, walls, processor = time.perf_counter() - began, [], []
        for _ in range(rounds + 1):
            wall, own = time.perf_counter(), time.process_time()
            jax.block_until_ready(evaluate(params))
            walls.append(time.perf_counter() - wall)
            processor.append(time.process_time() - own)
        cells = [f"{np.median(values[1:]):.4f}" for values in (walls, processor)]
        codec_tasks.print_row(widths, [name, f"{num_params(task.init):,}", *cells, f"{compile_seconds:.1f}"])


def check(tasks, steps=12):
    """Each gradient against a difference of losses along it; Adam; and what L-BFGS counts."""
    for name, task in tasks.items():
        params, loss = make(task, 0)
        value, grads = jax.jit(jax.value_and_grad(loss))(params)
        size = optax.tree.norm(grads)
        length = 0.006 * value / size  # Of a move along the gradient, by which the loss changes by about 0.6 %.
        moved = functools.partial(optax.tree.add_scale, params)
        ends = [moved(way * length / size, grads) for way in (-1, 1)]
        before, after = (jax.jit(loss)(end) for end in ends)
        ratio = float((after - before) / (2 * length * size))
        setting = noiseless_rivals.Setting(rate=task.rates[1])
        adam = noiseless_rivals.METHODS["Adam"].compiled(task, (), steps)
        losses, _ = adam(params, task.data(0), steps, steps, noiseless_rivals.rate_of(setting), setting.betas)
        print(
            f"{name}: loss {float(value):.5g}; difference over gradient {ratio:.4f}; "
            f"lowest of {steps} evaluations of Adam {lowest(losses)[-1]:.5g}",
            flush=True,
        )
        assert abs(ratio - 1) < 0.1
        assert lowest(losses)[-1] < value
    check_count()


def check_count(budget=60):
    """A function that counts on the host how often it is differentiated."""
    calls = []

    @jax.custom_vjp
    def counted(x):
        return x

    def forward(x):
        jax.debug.callback(lambda: calls.append(1))
        return x, None

    counted.defvjp(forward, lambda _, cotangent: (cotangent,))

    def loss(params, data):
        del data
        x = counted(params)
        return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)  # Rosenbrock's.

    task = FullBatch("Rosenbrock's function", lambda seed: jnp.zeros(10), loss, (budget,), (), 0.0)
    _, used = noiseless_rivals.lbfgs(task, (("memory", 10),), budget)(task.init(0), (), budget, budget, 0.0, (0.0, 0.0))
    jax.effects_barrier()
    print(f"L-BFGS on Rosenbrock's function: {int(used)} evaluations counted, {len(calls)} made")
    assert int(used) == len(calls)
