"""Keep gradients in a few bits, or send them to other devices."""
