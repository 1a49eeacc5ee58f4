"""A web server that is slow and fails: latency, resets, 503, cut bodies, ranges ignored."""

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("503", "reset", "cut", "cut without a length", "whole file", "slow")


class FlakyServer:
    """Serves the files of a folder; of every two requests one meets a fault, by a seeded draw."""

    def __init__(
        self, folder: Path, *, faults: tuple[str, ...] = FAULTS, share: float = 0.5, most: int = 1 << 30
    ) -> None:
        self.folder, self.faults, self.share, self.most = folder, faults, share, most
        self.met: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.bytes_sent = 0
        self._draw = random.Random(0)
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                server.answer(self, with_body=False)

            def do_GET(self) -> None:
                server.answer(self, with_body=True)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fault(self, path: str) -> str:
        with self._lock:
            self.requests[path] += 1
            wanted = self._draw.random() < self.share and self.met.total() - self.met[""] < self.most
            chosen = self._draw.choice(self.faults) if wanted else ""
            self.met[chosen] += 1
            return chosen

    def answer(self, handler: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        file = self.folder / handler.path.lstrip("/")
        if not file.is_file():
            handler.send_error(404)
            return
        fault = self.fault(handler.path)
        body = file.read_bytes()
        start, stop, status = 0, len(body), 200
        wanted = handler.headers.get("Range")
        if wanted and fault != "whole file":
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop, status = int(first), min(int(last or len(body) - 1) + 1, len(body)), 206
            if start >= len(body):
                handler.send_error(416)
                return
        part = body[start:stop]
        if fault == "slow":
            time.sleep(0.05)
        elif fault == "minutes":
            time.sleep(300)
        elif fault == "503":
            handler.send_error(503)
            return
        elif fault == "reset":
            # Linger 0 makes close() send RST instead of FIN.
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
            handler.connection.close()
            return
        handler.send_response(status)
        if status == 206:
            handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(body)}")
        handler.send_header("Accept-Ranges", "bytes")
        if fault == "cut without a length" and with_body:
            handler.send_header("Connection", "close")
        else:
            handler.send_header("Content-Length", str(len(part)))
        handler.end_headers()
        if not with_body:
            return
        if fault.startswith("cut"):
            part = part[: len(part) // 2]
            handler.close_connection = True
        with self._lock:
            self.bytes_sent += len(part)
        handler.wfile.write(part)


@contextmanager
def flaky_server(folder: Path, **settings: object) -> Iterator[FlakyServer]:
    server = FlakyServer(folder, **settings)  # type: ignore[arg-type]
    try:
        yield server
    finally:
        server.close()
