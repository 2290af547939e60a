"""Skip backward passes by predicting gradients, or an optimizer's updates, in closed form."""
