"""Generated tasks: every example is a function of the seed, the split and its number. numpy only."""
