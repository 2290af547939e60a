"""Least squares on small tables of inner products: arrays in, arrays out."""
