"""Prefill and decode speed, and memory, by context length and batch size."""
