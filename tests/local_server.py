"""A small HTTP server in a thread, for tests of HTTP clients."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LocalServer(ThreadingHTTPServer):
    """Answers each request with what `behave(path, body)` returns: a status and a body."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, behave: Callable[[str, bytes], tuple[int, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behave = behave
        self.connections = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalServer

    def setup(self) -> None:
        with self.server.lock:
            self.server.connections += 1
        super().setup()

    def do_POST(self) -> None:
        status, body = self.server.behave(
            self.path, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        )
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 307:
            self.send_header("Location", "http://127.0.0.1:1/")
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def local_server(behave: Callable[[str, bytes], tuple[int, bytes]]) -> Iterator[LocalServer]:
    """Run a `LocalServer` while the block runs."""
    server = LocalServer(behave)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
