"""Pure functions on arrays: arrays in, arrays out, one equation each.

Nothing here knows of pytrees, phases or Optax.
"""
