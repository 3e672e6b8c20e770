"""A stand-in for mamba-ssm 2.3.2: the parameters and checks of the functions that are called, each recurrence token by
token."""

calls: list[str] = []
