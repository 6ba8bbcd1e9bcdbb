"""The built book in a headless browser: what its tests, pictures and PDF share."""

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

import yaml
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).parents[1]
HTML = ROOT / "_build" / "html"
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
CHAPTERS = [TOC["root"]]
CHAPTERS += [chapter["file"] for part in TOC["parts"] for chapter in part["chapters"]]
# The folder of the host that the public pages lie in.
PREFIX = urlparse(CONFIG["html"]["baseurl"]).path

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class _Handler(http.server.SimpleHTTPRequestHandler):
    def translate_path(self, path: str) -> str:
        return super().translate_path("/" + path.removeprefix(PREFIX))

    def log_message(self, *_):
        pass


@contextmanager
def serve() -> Iterator[str]:
    """Serve the built book on localhost, in the folder it is published in.

    Yields:
        Its address, which ends in a slash.

    Raises:
        RuntimeError: where it is not built.
    """
    if not (ROOT / "_build" / ".built").exists():
        raise RuntimeError("the book is not built: make book")
    handler = functools.partial(_Handler, directory=HTML)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}{PREFIX}"
        server.shutdown()


@contextmanager
def launch() -> Iterator[Browser]:
    """Start the browser.

    Yields:
        It.

    Raises:
        RuntimeError: where there is none.
    """
    if CHROMIUM is None:
        raise RuntimeError("no Chromium found; on Debian: apt install chromium")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
