"""All verbs, in the order of --help."""

# isort: off
from hybridlm.commands import before, trained, laboratory  # noqa: F401  # each adds its verbs
from hybridlm.commands.app import app, run_app

# isort: on

__all__ = ["app", "run_app"]
