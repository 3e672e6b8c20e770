"""Training: Lightning runs the loop, the files here wire our parts into it."""
