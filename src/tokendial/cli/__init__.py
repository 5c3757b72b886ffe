"""The command line: `tokendial COMMAND`. Each command parses, calls the library, and reports."""

import sys

try:
    from tokendial.cli import training, sweeping, using, serving, fitting, inspecting  # noqa: F401, I001  # the order of --help
    from tokendial.cli.app import app, main
except KeyboardInterrupt:  # before there is a `main` that could tell it
    print("stopped", file=sys.stderr)
    sys.exit(130)

__all__ = ["app", "main"]
