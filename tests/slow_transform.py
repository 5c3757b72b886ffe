"""Transforms for decoders, which load this file: it imports next to nothing."""

import os
import time


def after(seconds, transform, image):
    """Take some time, but not that of a processor."""
    time.sleep(seconds)
    return transform(image)


def wait_if_large(path, transform, image):
    """Hold a large image until a file exists; another file says that it is held."""
    if image.width * image.height > 1_000_000:
        held = path.with_name(f"held-{os.getpid()}")
        held.touch()
        while not path.exists():
            time.sleep(0.01)
    return transform(image)
