"""The fork server and model processes from inside: `python -m tokendial.serve.workers.worker`.

The fork server must have exactly one thread at all times. A lock that another thread holds at the
moment of a fork (OpenMP's, above all) would stay locked for ever in the new process.
"""

import dataclasses
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
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokendial.serve.workers.messages import (
    BatchLogits,
    Failed,
    ForkProcess,
    LoadModels,
    ModelsLoaded,
    ProcessExited,
    ProcessForked,
    ProcessReady,
    RunBatch,
    TokensViewed,
    ViewTokens,
    WaitForExit,
    receive,
    receive_answer,
    send,
)
from tokendial.serve.workers.model_process import HEARTBEAT_S, shared_images

if TYPE_CHECKING:
    from tokendial.serve.workers.models import LoadedModels


def main(pipe: Connection, memory: int) -> None:
    """Load models, then fork model processes until the server closes the pipe.

    Args:
        pipe: Connection to the server.
        memory: File descriptor of the shared memory for images.
    """
    # A service manager may send SIGTERM to every process of the service. The server obeys it, and
    # needs the models until it has answered its last requests.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    default_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError):  # the server has ended
        order = receive_answer(pipe, LoadModels)
        try:
            models = order.load()
        except Exception as error:
            send(pipe, Failed(_portable_error(error)))
            return
        send(pipe, ModelsLoaded(models.catalog))
        images = shared_images(memory, order.max_batch, models.catalog.input_shape)
        # Frozen objects are not touched by the garbage collector, so their memory stays shared.
        gc.collect()
        gc.freeze()
        while True:
            message = receive(pipe)
            if isinstance(message, WaitForExit):
                send(pipe, ProcessExited(_exit_code(message.pid)))
                continue
            assert isinstance(message, ForkProcess)
            requests, heartbeats = (recv_handle(pipe) for _ in range(2))
            if pid := _fork():
                os.close(requests)
                os.close(heartbeats)
                send(pipe, ProcessForked(pid))
                continue
            try:
                pipe.close()
                torch.set_num_threads(order.threads or default_threads)
                if message.runtime is not None:  # the plain runtime is falsy
                    order = dataclasses.replace(order, runtime=message.runtime)
                run_model_process(Connection(requests), heartbeats, models, order, images)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)  # the cleanup that would follow belongs to the fork server


def run_model_process(
    pipe: Connection, heartbeats: int, models: "LoadedModels", order: LoadModels, images: Tensor
) -> None:
    """Prepare the models, then answer messages until the server closes the pipe.

    Args:
        pipe: Connection to the server.
        heartbeats: File descriptor of the socket for heartbeats.
        models: The loaded models.
        order: How to optimise them.
        images: Shared memory with the images of a batch.
    """
    threading.Thread(target=_send_heartbeats, args=(heartbeats,), daemon=True).start()
    with suppress(EOFError, ConnectionError):  # the server has ended
        try:
            runtime = models.prepare(
                order.runtime, folder=order.runtime_folder, calibration=order.calibration
            )
            # The first pass allocates memory, so it is made before a request waits for it.
            catalog = models.catalog
            models.run(catalog.names[0], catalog.degrees[0], torch.zeros_like(images[:1]))
        except Exception as error:
            send(pipe, Failed(_portable_error(error)))
            return
        send(pipe, ProcessReady(runtime))
        while True:
            message = receive(pipe)
            try:
                answer = _carry_out(message, models, images)
            except Exception as error:
                send(pipe, Failed(_portable_error(error)))
            else:
                send(pipe, answer)


def _carry_out(
    message: object, models: "LoadedModels", images: Tensor
) -> BatchLogits | TokensViewed:
    match message:
        case RunBatch(name, degree, num_images, embeddings=True):
            found = models.run_with_embeddings(name, degree, images[:num_images])
            return BatchLogits(*(each.numpy() for each in found))
        case RunBatch(name, degree, num_images):
            return BatchLogits(models.run(name, degree, images[:num_images]).numpy())
        case ViewTokens(name, degree, image):
            return TokensViewed(*models.view(name, degree, image))
    raise TypeError(f"a model process does not know the message {type(message).__name__}.")


def _fork() -> int:
    with warnings.catch_warnings():
        # Python warns about threads. The only ones are OpenBLAS's for NumPy, which registers
        # fork handlers of its own.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _send_heartbeats(socket: int) -> None:
    os.set_blocking(socket, False)
    while True:
        try:
            os.write(socket, b".")
        except BlockingIOError:  # the server has not read the last ones yet
            pass
        except OSError:  # the server has ended, so the result of the running batch has no receiver
            os._exit(1)
        time.sleep(HEARTBEAT_S)


def _exit_code(pid: int) -> int | None:
    """Exit code of a killed process, as in `subprocess`; None if it has not ended yet."""
    for _ in range(50):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)  # a driver may delay the end of a process for longer than this
    return None


def _portable_error(error: Exception) -> Exception:
    """Convert an error to a type that the server can unpickle."""
    for kind in (ValueError, OSError):
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError("".join(traceback.format_exception(error)))


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), int(sys.argv[2]))
