"""Sphinx extension: pages need no network, and no button leads nowhere."""

import os
from pathlib import Path

import plotly
from sphinx.util.fileutil import copy_asset

PLOTLY = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"


def add_plotly(app, pagename, templatename, context, doctree):
    """Load plotly.js, 4 MB of it, only on the pages that draw with it."""
    if "Plotly.newPlot" in context.get("body", ""):
        app.add_js_file(PLOTLY.name)


def drop_dead_launch_buttons(app, pagename, templatename, context, doctree):
    """Colab and Binder open notebooks; a page in Markdown is an error there."""
    if context.get("page_source_suffix") == ".md":
        buttons = context.get("header_buttons", [])
        buttons[:] = [
            button
            for button in buttons
            if button.get("label") != "launch-buttons"
        ]


def drop_thebe(app, pagename, templatename, context, doctree):
    """Thebe, even switched off, leaves scripts that fetch it from a CDN."""
    context["script_files"] = [
        script
        for script in context.get("script_files", [])
        if "thebe" not in f"{script.filename} {script.attributes}".lower()
    ]


def copy_plotly(app, error):
    """Copy plotly.js out of the installed wheel: it fits the Python side."""
    if error is None:
        copy_asset(PLOTLY, Path(app.outdir) / "_static")


def setup(app):
    """Register the hooks; tell ``crcbook.plots.show`` where it draws."""
    # The kernels that execute the chapters inherit it.
    os.environ["CRCBOOK_BUILD"] = "1"
    app.connect("html-page-context", add_plotly)
    app.connect("html-page-context", drop_dead_launch_buttons, priority=900)
    app.connect("html-page-context", drop_thebe)
    app.connect("build-finished", copy_plotly)
    return {
        "version": "1",
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
