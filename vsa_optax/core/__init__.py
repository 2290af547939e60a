"""Code that accumulation, compression and prediction share: errors, conditionals, meshes and trees."""
