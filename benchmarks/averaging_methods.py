"""Ways to average gradients over eight devices, the library's and others, shared by the scripts on collectives.

The devices are eight XLA host devices in one process, inside `jax.shard_map`; this module must be imported before JAX
looks for devices. Replication is checked for all methods except top-k, whose all-gather is not marked as replicated.
"""

import functools
import os

import collective_rivals as rivals
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from wire_model import sent_by_codec

import vsa_optax
from vsa_optax import HypervectorCodec, TritCodec

# XLA reads the flag when JAX first looks for devices, here and in the processes to come.
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}".strip()
jax.config.update("jax_platforms", "cpu")

NUM = 8
BATCH = 16  # The batch of all devices together.
ROWS = PartitionSpec("data")
# Name: codec, and whether with error feedback.
OURS = {
    "two trits": (TritCodec(2), False),
    "two trits, unbiased": (TritCodec(2, unbiased=True), False),
    "one trit": (TritCodec(1), False),
    "one trit, error feedback": (TritCodec(1), True),
    "HypervectorCodec(0.1)": (HypervectorCodec(0.1), False),
}
RIVALS = {
    "f32 pmean": lambda: rivals.pmean("data"),
    "bf16 pmean": lambda: rivals.pmean("data", jnp.bfloat16),
    "PowerSGD, rank 4, error feedback": lambda: rivals.power_sgd("data", rank=4),
    "top 1 %, error feedback": lambda: rivals.top_k("data", share=0.01),
}
METHODS = [*RIVALS, *OURS]


def mesh():
    return Mesh(np.array(jax.devices()), ("data",))


def on_devices(function, in_specs, out_specs, checked=True):
    return jax.jit(
        jax.shard_map(function, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=checked),
    )


@functools.cache
def averaging(name):
    """How to average, whoever wrote it: a `collective_rivals.Rival`, whose specs are a function of the parameters."""
    if name in RIVALS:
        rival = RIVALS[name]()
        return rival._replace(specs=lambda params: rival.specs)
    codec, error_feedback = OURS[name]
    opt = vsa_optax.compressed_pmean("data", codec, error_feedback=error_feedback)
    return rivals.Rival(
        opt,
        lambda params: vsa_optax.state_specs(jax.eval_shape(opt.init, params), "data"),
        lambda shapes, num: sent_by_codec(codec, shapes, num),
    )


def is_checked(name):
    return not name.startswith("top")
