"""How fast a model reads and writes, and what it holds in memory, by context length and batch."""
