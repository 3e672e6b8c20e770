"""Functions on tensors, torch only: nothing here knows about configs, layers or models."""
