"""The command line: `tokendial COMMAND`. Each command parses, calls the library, and reports."""

from tokendial.cli import training, sweeping, using, serving, fitting, inspecting  # noqa: F401, I001  # the order of --help
from tokendial.cli.app import app, main

__all__ = ["app", "main"]
