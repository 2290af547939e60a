"""Pure functions on arrays: arrays in, arrays out, one equation each.

Nothing here depends on pytrees, phases or Optax.
"""
