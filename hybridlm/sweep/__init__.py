"""Many runs that belong together: grids of overrides, models brought to equal cost, and a runner for one
workstation."""
