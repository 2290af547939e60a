"""BFGS and Levenberg-Marquardt of Optimistix, for few parameters; this module is empty unless Optimistix is installed.

Each step of BFGS evaluates one point. A point that its search rejects needs no backward pass, but counts like the
others. Each step of Levenberg-Marquardt evaluates a point's residuals and their Jacobian, and solves a least-squares
problem by QR. Optimistix takes as many backward passes as there are residuals. A hand-written Jacobian costs about one
if each residual belongs to another point of the data. Both counts are shown.
"""

import importlib.util

import jax
import jax.numpy as jnp
from noiseless_rivals import Method
from noiseless_task import num_params

MOST_PARAMS = 2000
MOST_JACOBIANS = 150


def iterated(solver, function, measured, options):
    """A step of the solver for each count, written as `noiseless_rivals` does."""
    import equinox as eqx

    def run(params, budget, losses):
        shape = jax.eval_shape(lambda: function(params, None)[0])
        init = solver.init(function, params, None, options, shape, None, frozenset())
        # A state holds functions too, which stay the same.
        arrays, others = eqx.partition(init, eqx.is_array)

        def step(carry):
            params, arrays, count, losses = carry
            state = eqx.combine(arrays, others)
            params, state, _ = solver.step(function, params, None, options, state, frozenset())
            losses = losses.at[count].set(measured(state))
            return params, eqx.filter(state, eqx.is_array), count + 1, losses

        carry = (params, arrays, jnp.int32(0), losses)
        _, _, count, losses = jax.lax.while_loop(lambda carry: carry[2] < budget, step, carry)
        return losses, count

    return run


def bfgs(task, own, most):
    import optimistix

    def run(params, data, budget, steps, rate, betas):
        del steps, rate, betas
        solver = optimistix.BFGS(rtol=0.0, atol=0.0)
        solve = iterated(solver, lambda y, _: (task.loss(y, data), None), lambda state: state.f_info.f, {})
        return solve(params, budget, jnp.full(most, jnp.inf))

    return jax.jit(run)


def levenberg_marquardt(task, own, most):
    import optimistix

    def run(params, data, budget, steps, rate, betas):
        del data, steps, rate, betas
        solver = optimistix.LevenbergMarquardt(rtol=0.0, atol=0.0)

        def function(y, _):
            return task.residuals(y), None

        solve = iterated(solver, function, lambda state: jnp.sum(state.f_info.residual**2), {"jac": "bwd"})
        return solve(params, budget, jnp.full(most, jnp.inf))

    return jax.jit(run)


def num_residuals(task):
    return jax.eval_shape(lambda: task.residuals(task.init(0))).size


METHODS = {}
if importlib.util.find_spec("optimistix"):
    METHODS = {
        "BFGS (Optimistix)": Method(bfgs, has_rate=False, suits=lambda task: num_params(task.init) <= MOST_PARAMS),
        "Levenberg-Marquardt (Optimistix)": Method(
            levenberg_marquardt,
            has_rate=False,
            costs=lambda task: {"a Jacobian as one": 1, "its passes": num_residuals(task)},
            suits=lambda task: task.residuals is not None,
            most=MOST_JACOBIANS,
        ),
    }
