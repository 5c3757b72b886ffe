"""The command line: `tokendial COMMAND`. Each command parses, calls the library, and reports."""

import sys

from tokendial.errors import error_message

# Importing the commands takes a moment. Ctrl-C and a missing package are reported in one line here,
# as `main` does it once it exists.
try:
    from tokendial.cli import training, noah, sweeping  # noqa: F401, I001  # the order of --help
    from tokendial.cli import evaluating, predicting, exporting, segmenting  # noqa: F401
    from tokendial.cli import serving, fit, cascading, tuning, embedding, attaching, inspecting  # noqa: F401
    from tokendial.cli.app import app, main
except KeyboardInterrupt:
    print("stopped", file=sys.stderr)
    sys.exit(130)
except ModuleNotFoundError as error:
    print(f"error: {error_message(error)}", file=sys.stderr)
    sys.exit(2)

__all__ = ["app", "main"]
