"""Sweeps: grids of overrides, models matched in cost, and a runner for one workstation."""
