"""Errors as the one line that users read."""

from tokendial.extras import EXTRAS, install_hint


def error_message(error: Exception) -> str:
    """Return an error's message in one line.

    A missing optional package is named together with the extra that brings it.
    """
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        if module in EXTRAS:
            return f"this needs {install_hint(module)}"
    text = str(error).strip() or type(error).__name__
    last = text.splitlines()[-1]
    # A data loading process wraps its error in a traceback, which ends with "Type: message".
    return last.partition(": ")[2] if "Original Traceback" in text else last
