"""A transform for decoders, which load this file: it imports next to nothing."""

import time


def after(seconds, transform, image):
    """Take some time, but not that of a processor."""
    time.sleep(seconds)
    return transform(image)
