"""Documents out of files, data sets and other places."""
