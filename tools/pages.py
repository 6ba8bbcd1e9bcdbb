"""Sphinx extension: what a page of the book has, beyond its theme.

It needs no network, has no button that leads nowhere, prints well, and says
what it is about to search engines and to whoever previews a link to it.
"""

import html
import os
import re
from functools import partialmethod
from pathlib import Path

import plotly
from docutils import nodes
from nbclient import NotebookClient
from sphinx.util.fileutil import copy_asset

from crcbook import load_model
from crcbook.book import draw

HERE = Path(__file__).parent
ASSETS = [HERE / "pages.css", HERE.parent / "book" / "social.png"]
PLOTLY = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"


def add_plotly(app, pagename, templatename, context, doctree):
    """Load plotly.js, 4 MB of it, only on the pages that draw with it."""
    if "Plotly.newPlot" in context.get("body", ""):
        app.add_js_file(PLOTLY.name)


def drop_dead_launch_buttons(app, pagename, templatename, context, doctree):
    """Colab and Binder open notebooks; a page in Markdown is an error there."""
    if context.get("page_source_suffix") == ".md":
        buttons = context.get("header_buttons", [])
        buttons[:] = [button for button in buttons if button.get("label") != "launch-buttons"]


def drop_thebe(app, pagename, templatename, context, doctree):
    """Thebe, even switched off, leaves scripts that fetch it from a CDN."""
    context["script_files"] = [
        script
        for script in context.get("script_files", [])
        if "thebe" not in f"{script.filename} {script.attributes}".lower()
    ]


def describe(app, pagename, templatename, context, doctree):
    """Describe the page by its first paragraph: in a chapter, what to do."""
    if doctree is None:
        return
    first = next(doctree.findall(nodes.paragraph), None)
    text = "" if first is None else " ".join(first.astext().split())
    base = app.config.html_baseurl
    tags = {
        "description": text if len(text) < 300 else f"{text[:299]}…",
        "og:type": "article",
        "og:site_name": app.config.html_title,
        "og:title": doctree.next_node(nodes.title).astext(),
        "og:url": f"{base}{pagename}.html",
        "og:image": f"{base}_static/social.png",
    }
    tags["og:description"] = tags["description"]
    for name, content in tags.items():
        kind = "property" if name.startswith("og:") else "name"
        context["metatags"] += f'<meta {kind}="{name}" content="{html.escape(content)}">\n'


def mend_bibliography(app, pagename, templatename, context, doctree):
    """Drop roles that what docutils puts inside them does not fit."""
    for role in (' role="list"', ' role="doc-biblioentry"'):
        context["body"] = context.get("body", "").replace(role, "")


def keep_together(app, pagename, templatename, context, doctree):
    """Tie what touches a formula, and percent signs: a browser would break the line."""
    body = context.get("body", "")
    body = re.sub(r"\((<span class=\"math[^>]*>\\\()", r"\1\\text{(}", body)
    body = re.sub(r"\\\)</span>([.,;:!?)]+)", r"\\text{\1}\\)</span>", body)
    printed = re.compile(r"(<pre.*?</pre>)", re.DOTALL)
    context["body"] = "".join(
        part if printed.match(part) else re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", part)
        for part in printed.split(body)
    )


def copy_assets(app, error):
    """Copy plotly.js out of the installed wheel: it fits the Python side."""
    if error is None:
        for path in (PLOTLY, *ASSETS):
            copy_asset(path, Path(app.outdir) / "_static")


def write_network(app, error):
    """Write the weights that digits are drawn for: 4 MB, which their page alone loads."""
    if error is None:
        model = load_model(HERE.parent / "book" / draw.NETWORK)
        script = Path(app.outdir) / "_static" / draw.SCRIPT
        script.write_text(draw.network_script(model))


def setup(app):
    """Register the hooks; tell ``crcbook.book.plots.show`` where it draws."""
    # The kernels that execute the chapters inherit it.
    os.environ["CRCBOOK_BUILD"] = "1"
    # What a cell prints may arrive in pieces, and the builder would begin a line with each.
    NotebookClient.__init__ = partialmethod(NotebookClient.__init__, coalesce_streams=True)
    app.connect("html-page-context", add_plotly)
    app.connect("html-page-context", drop_dead_launch_buttons, priority=900)
    app.connect("html-page-context", drop_thebe)
    app.connect("html-page-context", describe)
    app.connect("html-page-context", mend_bibliography)
    app.connect("html-page-context", keep_together)
    app.connect("build-finished", copy_assets)
    app.connect("build-finished", write_network)
    app.add_css_file("pages.css")
    return {
        "version": "1",
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
