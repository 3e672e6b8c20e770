"""The language model: blocks of layers, the head and its loss, the cache, and what it costs."""
