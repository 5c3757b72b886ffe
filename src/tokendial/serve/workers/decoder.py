"""Processes that decode what clients send: `python -m tokendial.serve.workers.decoder`.

The first process loads the libraries and never reads a byte of a client. It forks those that
decode, and another one for each that ends: the system ends them at their limits of time and memory,
whatever library they are in at that moment.
"""

import gc
import json
import os
import pickle
import resource
import select
import signal
import socket
import sys
import time
import traceback
from base64 import b64encode
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tokendial.serve.http.problems import ProblemError
from tokendial.serve.http.uploads import file_of, pixels_of, to_image
from tokendial.serve.workers.decoding import QUICK_PIXELS, Order
from tokendial.serve.workers.facts import TaskOf, mask_of

_STDIN = 0


def main(listener: socket.socket, count: int, memory: int) -> None:
    """Keep some decoders running until the server, which holds the other end of stdin, is gone.

    Args:
        listener: Where each decoder takes a connection of the server.
        count: How many decoders.
        memory: Bytes that each may take more than it begins with.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it may be sent to all processes of a service
    torch.set_num_threads(1)
    gc.freeze()  # what all of them share stays shared
    running = {_forked(listener, memory) for _ in range(count)}
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if status:
            running.add(_forked(listener, memory))


def _forked(listener: socket.socket, memory: int) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        _limit_memory(memory)
        _serve(listener)
        code = 0
    finally:
        os._exit(code)


def _limit_memory(more: int) -> None:
    with suppress(OSError, ValueError):  # where the system does not tell, pixels alone are bounded
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _serve(listener: socket.socket) -> None:
    """Take one connection, and do what is ordered there until it ends."""
    ready, _, _ = select.select([listener.fileno(), _STDIN], [], [])
    if _STDIN in ready:
        return
    taken, _ = listener.accept()
    connection, tasks = Connection(taken.detach()), dict[str, TaskOf]()
    with suppress(EOFError, ConnectionError):  # the server is gone
        while True:
            order: Order = pickle.loads(connection.recv_bytes())
            payload = connection.recv_bytes()
            if order.of is not None:
                tasks[order.name] = order.of
            signal.setitimer(signal.ITIMER_PROF, order.seconds)  # its signal ends the process
            head, body = _answer(order, tasks[order.name], payload)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send_bytes(json.dumps(head).encode())
            connection.send_bytes(body)


def _answer(order: Order, of: TaskOf, payload: bytes) -> tuple[dict[str, Any], bytes]:
    """What is told, in JSON, and the bytes that belong to it."""
    began = time.monotonic()
    try:
        if order.logits is not None:
            logits = torch.frombuffer(bytearray(payload), dtype=torch.float32).view(order.logits)
            mask = mask_of(of, logits, order.size)
            return {"share": mask.share}, b64encode(mask.png)
        file = file_of(payload, order.called) if order.base64 else payload
        if order.quick and (pixels := pixels_of(file)) > QUICK_PIXELS:
            return {"pixels": min(pixels, order.max_pixels)}, b""
        image = to_image(file, order.called, order.max_pixels, of.value_range)
        tensor = of.transform(image).contiguous()
        if tensor.shape != order.shape:
            raise ValueError(f"images must become {order.shape}, got {tuple(tensor.shape)}.")
    except ProblemError as error:
        return {"status": error.status, "problem": error.problem.model_dump()}, b""
    except Exception:
        return {"failed": traceback.format_exc()}, b""
    told = {
        "shape": list(tensor.shape),
        "size": [image.height, image.width],
        "seconds": time.monotonic() - began,
    }
    return told, tensor.numpy().tobytes()


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]))
