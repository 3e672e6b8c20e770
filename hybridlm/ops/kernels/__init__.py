"""Compiled kernels of other packages behind our operators: rules of when, calls, and probes. Nothing else imports these
packages."""
