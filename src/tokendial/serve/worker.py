"""The process that computes: `python -m tokendial.serve.worker`, started by `apart`."""

import signal
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from tokendial.serve.apart import receive, send, shared_images


def main(pipe: Connection, memory: int) -> None:
    """Load what the first message orders, then do what the next ones ask, until the pipe ends.

    Args:
        pipe: To the server.
        memory: File in which it puts images.
    """
    # It may be sent to every process of a service; what the server has accepted is computed still.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with suppress(EOFError, ConnectionError):  # the server is gone
        (order,) = receive(pipe)
        if order.threads is not None:
            torch.set_num_threads(order.threads)
        try:
            models = order.load()
        except Exception as error:
            send(pipe, (None, _told(error)))
            return
        send(pipe, (models.facts, None))
        images = shared_images(memory, order.most, models.facts.input_shape)
        while True:
            what, name, degree, argument = receive(pipe)
            answer: Any = None
            failed: Exception | None = None
            try:
                if what == "run":
                    answer = models.run(name, degree, images[:argument]).numpy()
                else:
                    answer = models.view(name, degree, argument)
            except Exception as error:
                failed = _told(error)
            send(pipe, (answer, failed))


def _told(error: Exception) -> Exception:
    """The same error, such that the server's process knows it."""
    for kind in (ValueError, OSError):
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError("".join(traceback.format_exception(error)))


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), int(sys.argv[2]))
