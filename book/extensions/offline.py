"""Sphinx extension: the built pages need no network, and no button leads nowhere."""

import os
from pathlib import Path

import plotly
from sphinx.util.fileutil import copy_asset

PLOTLY = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"


def add_plotly(app, pagename, templatename, context, doctree):
    """Load plotly.js, 4 MB of it, on the pages that draw with it and on no other."""
    if "Plotly.newPlot" in context.get("body", ""):
        app.add_js_file(PLOTLY.name)


def drop_dead_launch_buttons(app, pagename, templatename, context, doctree):
    """Colab and Binder open notebooks, and answer a page written in Markdown with an error."""
    if context.get("page_source_suffix") == ".md":
        buttons = context.get("header_buttons", [])
        buttons[:] = [button for button in buttons if button.get("label") != "launch-buttons"]


def drop_thebe(app, pagename, templatename, context, doctree):
    """Thebe would fetch itself from a CDN; even switched off, it leaves its scripts on the page."""
    context["script_files"] = [
        script
        for script in context.get("script_files", [])
        if "thebe" not in f"{script.filename} {script.attributes}".lower()
    ]


def copy_plotly(app, error):
    """Copy plotly.js out of the installed wheel, so that it fits the Python side."""
    if error is None:
        copy_asset(PLOTLY, Path(app.outdir) / "_static")


def setup(app):
    """Register the hooks; tell ``crcbook.plots.show`` that it draws for the book."""
    os.environ["CRCBOOK_BUILD"] = "1"  # the kernels that execute the chapters inherit it
    app.connect("html-page-context", add_plotly)
    app.connect("html-page-context", drop_dead_launch_buttons, priority=900)
    app.connect("html-page-context", drop_thebe)
    app.connect("build-finished", copy_plotly)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
