"""All verbs, in the order of --help."""

# isort: off
from hybridlm.cli import before, trained, serving, outward, laboratory  # noqa: F401  # each adds its verbs
from hybridlm.cli.app import app, run_app

# isort: on

__all__ = ["app", "run_app"]
