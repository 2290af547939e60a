"""Encode pytrees of gradients as compact payloads, and decode them."""
