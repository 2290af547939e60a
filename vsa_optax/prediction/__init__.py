"""Fewer backward passes: gradients, or an optimizer's updates, predicted in closed form."""
