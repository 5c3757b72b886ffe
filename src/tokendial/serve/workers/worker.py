"""The process that holds the models: `python -m tokendial.serve.workers.worker`.

Those that compute are forked from it. It has one thread at all times: what other threads hold at
the moment of a fork, above all OpenMP's, would be held for ever in the new process.
"""

import gc
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokendial.serve.workers.apart import BEAT_S, Order, receive, send, shared_images

if TYPE_CHECKING:
    from tokendial.serve.workers.models import Models


def main(pipe: Connection, memory: int) -> None:
    """Load what the first message orders, then fork until the pipe ends.

    Args:
        pipe: To the server. After the order comes None for each process to be forked, followed by
            its two sockets, or the number of one that was killed.
        memory: File in which the server puts images.
    """
    # It may be sent to every process of a service; what the server has accepted is computed still.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError):  # the server is gone
        order: Order = receive(pipe)
        try:
            models = order.load()
        except Exception as error:
            send(pipe, (None, _told(error)))
            return
        send(pipe, (models.facts, None))
        images = shared_images(memory, order.most, models.facts.input_shape)
        # What is there is used to the end. Not looked at for garbage, it stays shared.
        gc.collect()
        gc.freeze()
        while True:
            ended: int | None = receive(pipe)
            if ended is not None:
                send(pipe, (_code(ended), None))
                continue
            asks, heart = (recv_handle(pipe) for _ in range(2))
            if pid := _fork():
                os.close(asks)
                os.close(heart)
                send(pipe, (pid, None))
                continue
            try:
                pipe.close()
                torch.set_num_threads(order.threads or usual)
                compute(Connection(asks), heart, models, order, images)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)  # what follows is for the process that was forked


def compute(pipe: Connection, heart: int, models: "Models", order: Order, images: Tensor) -> None:
    """Make models ready, then run what is asked until the pipe ends.

    Args:
        pipe: To the server.
        heart: Socket to show it that this process lives.
        models: As they were loaded.
        order: What else to do.
        images: Those to run.
    """
    threading.Thread(target=_beat, args=(heart,), daemon=True).start()
    with suppress(EOFError, ConnectionError):  # the server is gone
        try:
            models.prepare(order.speed)
            # The first pass allocates, which is better done before somebody waits for it.
            models.run(models.facts.names[0], models.facts.degrees[0], torch.zeros_like(images[:1]))
        except Exception as error:
            send(pipe, (None, _told(error)))
            return
        send(pipe, (None, None))
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


def _fork() -> int:
    with warnings.catch_warnings():
        # Python warns of threads: OpenBLAS has started some for NumPy, and sees to them itself.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _beat(heart: int) -> None:
    os.set_blocking(heart, False)
    while True:
        try:
            os.write(heart, b".")
        except BlockingIOError:  # the server has not looked for a while
            pass
        except OSError:  # it is gone, whatever is computed here
            os._exit(1)
        time.sleep(BEAT_S)


def _code(pid: int) -> int | None:
    """How a process has ended that was killed, as `subprocess` tells it; None: it has not yet."""
    for _ in range(50):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)  # a driver may hold it for longer
    return None


def _told(error: Exception) -> Exception:
    """The same error, such that the server's process knows it."""
    for kind in (ValueError, OSError):
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError("".join(traceback.format_exception(error)))


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), int(sys.argv[2]))
