"""Gradients in a few bits: kept, or sent to other devices."""
