"""Serve the built book on this machine: ``python tools/serve.py PORT``."""

import socket
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BOOK = Path(__file__).parents[1] / "_build" / "html"


def main(port: int) -> None:
    """Serve until interrupted, or say which port is free where this one is not."""
    pages = partial(SimpleHTTPRequestHandler, directory=BOOK)
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), pages)
    except (OSError, OverflowError) as error:
        with socket.create_server(("127.0.0.1", 0)) as free:
            other = free.getsockname()[1]
        reason = getattr(error, "strerror", None) or error
        sys.exit(f"Port {port} cannot be used ({reason}): make serve PORT={other} works")
    print(f"Serving the book at http://localhost:{port}/", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
