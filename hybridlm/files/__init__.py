"""Durable writes, and safe reading of untrusted files. Independent of runs and models."""
