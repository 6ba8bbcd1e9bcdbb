"""The live explorer in a real JupyterLab, driven by a headless browser."""

import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

CHAPTER = Path(__file__).parents[1] / "book" / "live_widgets.ipynb"
# The chapter's own cells, all but those that compute what its page shows.
NEEDED = ("from pathlib", "moons =", "def trained", "ways =")
PATIENCE = 300_000  # milliseconds; only a test that hangs waits so long


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab that serves the explorer's notebook."""
    chapter = nbformat.read(CHAPTER, as_version=4)
    chapter.cells = [cell for cell in chapter.cells if cell.source.startswith(NEEDED)]
    assert len(chapter.cells) == len(NEEDED)
    nbformat.write(chapter, tmp_path / "explorer.ipynb")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    token, private = secrets.token_hex(16), tmp_path / "private"
    settings = {
        "ServerApp.ip": "127.0.0.1", "ServerApp.port": port, "ServerApp.root_dir": tmp_path,
        "ServerApp.allow_root": True, "IdentityProvider.token": token,
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
    }  # fmt: skip
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    process = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser"]
        + [f"--{name}={value}" for name, value in settings.items()],
        env=os.environ | dict.fromkeys((*folders, "IPYTHONDIR"), str(private)),
        stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}/"
    try:
        while not answers(f"{address}api?token={token}"):
            if process.poll() is not None:
                pytest.fail(f"JupyterLab ended with {process.returncode}")
            time.sleep(0.2)
        yield address, token
    finally:
        process.terminate()
        process.wait()


def answers(address):
    try:
        with urllib.request.urlopen(address):
            return True
    except OSError:
        return False


@pytest.fixture
def page(browser, lab):
    """The notebook, its cells run; nothing may be asked of any other machine."""
    address, token = lab
    context = browser.new_context(viewport={"width": 1300, "height": 1000})
    page, strangers = context.new_page(), []

    def refuse(route):
        strangers.append(route.request.url)
        route.abort()

    page.set_default_timeout(PATIENCE)
    page.route(lambda url: not url.startswith((address, "data:", "blob:")), refuse)
    page.goto(f"{address}lab/tree/explorer.ipynb?token={token}")
    page.get_by_text("| Idle").wait_for()  # else JupyterLab asks which kernel to start
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").click()
    page.locator(".lm-Menu-itemLabel").get_by_text("Run All Cells", exact=True).click()
    yield page
    context.close()
    assert not strangers


def radius(page, unlike=""):
    """What the widget says of the radius, once it says something else."""
    page.wait_for_function(
        """unlike => {
            const said = document.querySelector(".widget-html-content")?.innerText ?? "";
            return said.includes("Certified radius") && !(unlike && said.includes(unlike));
        }""",
        arg=unlike,
    )
    said = page.locator(".widget-html-content").first.inner_text()
    return re.search(r"Certified radius \d+\.\d+", said)[0]


def choose(page, name, option):
    page.locator(".widget-dropdown", has_text=name).locator("select").select_option(option)


def test_the_explorer_answers_in_jupyterlab(page):
    """Move the point by keyboard, choose another certificate, train with another method."""
    first = radius(page)
    page.locator(".widget-slider", has_text="x₁").locator(".noUi-handle").focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    moved = radius(page, unlike=first)
    choose(page, "certificate", "Lipschitz")
    lipschitz = radius(page, unlike=moved)
    choose(page, "training", "adversarial")
    assert radius(page, unlike=lipschitz)
