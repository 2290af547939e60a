"""Pytrees of gradients to compact payloads and back."""
