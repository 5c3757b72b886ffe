"""Errors as one line, which is what users are told."""


def error_message(error: Exception) -> str:
    """What an error says, in one line."""
    text = str(error).strip() or type(error).__name__
    last = text.splitlines()[-1]
    # A loading process wraps its error in a traceback, which ends with "Type: message".
    return last.partition(": ")[2] if "Original Traceback" in text else last
