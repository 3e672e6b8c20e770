"""Evaluating a trained model (`hybridlm eval`), and checking any architecture for correctness (`hybridlm check`)."""
