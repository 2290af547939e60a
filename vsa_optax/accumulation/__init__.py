"""Micro-batch gradients summed in a few bits."""
