"""Which tokens are in which batch, and the loaders that yield them."""
