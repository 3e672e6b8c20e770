"""Layers: the mixer and FFN contracts and their implementations. They read their own spec and nothing else of the
configuration."""
