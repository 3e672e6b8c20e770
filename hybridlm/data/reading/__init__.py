"""Documents from files, data sets and other sources."""
