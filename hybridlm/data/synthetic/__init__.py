"""Tasks that are generated: every example a function of the seed, the split and its number. numpy only."""
