"""What two of the three ideas need: errors, conditionals, meshes and trees."""
