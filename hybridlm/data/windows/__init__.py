"""Which tokens stand in which batch, and the loaders that hand them out."""
