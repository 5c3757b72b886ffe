"""Transforms for decoders, which load this file: it imports few modules."""

import os
import time


def after(seconds, transform, image):
    """Sleep for some seconds, then transform: slow, but without processor time."""
    time.sleep(seconds)
    return transform(image)


def wait_if_large(path, transform, image):
    """Wait with a large image until a file exists; another file shows that this waits."""
    if image.width * image.height > 1_000_000:
        held = path.with_name(f"held-{os.getpid()}")
        held.touch()
        while not path.exists():
            time.sleep(0.01)
    return transform(image)
