"""Figures that read well on a light page and on a dark one, in the book and in a live notebook."""

import html
import io
import os
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import plotly.graph_objects as go
from IPython.display import HTML, display
from matplotlib.figure import Figure

# Okabe & Ito's palette, which colour-blind readers tell apart; its black would vanish on a dark
# page, and the two mid-light hues that stand out on both pages come first.
PALETTE = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#0072b2", "#999933")

# Legible on white and on black. In inline SVG it gives way to the page's own text colour.
_INK = "#777777"

_MATPLOTLIB = {
    "figure.figsize": (6.4, 4.0),
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.prop_cycle": plt.cycler(color=PALETTE),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "font.size": 11,
}

_AXIS = {"gridcolor": "rgba(128,128,128,0.25)", "zerolinecolor": "rgba(128,128,128,0.5)"}
_SCENE_AXIS = {**_AXIS, "showbackground": False}
_PLOTLY = go.layout.Template(
    layout={
        "colorway": PALETTE,
        "font": {"color": _INK, "size": 14},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 50, "r": 20, "t": 40, "b": 50},
        # Above the plot, where a narrow page has room for it; beside it, it squeezes the plot.
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "title": {
            "automargin": True,
            "yref": "container",
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 2},
            "font": {"size": 16},
        },
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "scene": {"xaxis": _SCENE_AXIS, "yaxis": _SCENE_AXIS, "zaxis": _SCENE_AXIS},
        # The padding keeps the slider clear of the axis title.
        "sliderdefaults": {
            "bgcolor": "rgba(128,128,128,0.5)",
            "activebgcolor": PALETTE[0],
            "pad": {"t": 50},
        },
        "updatemenudefaults": {"bgcolor": "rgba(128,128,128,0.15)"},
    }
)

# The book's theme puts HTML outputs on a light ground even on a dark page, and plotly writes the
# ink into every text; the page's own colours must win over both.
_FOLLOW_THE_PAGE = (
    "<style>.crc-figure{margin:1rem 0}"
    ".text_html:has(>.crc-figure){background:none!important;color:inherit!important;"
    "padding:0!important}"
    ".crc-figure .main-svg>g:not(.hoverlayer) text{fill:currentColor!important}"
    ".crc-slider{display:block;max-width:40rem;padding:0 20px 0 50px}"
    ".crc-slider input{display:block;width:100%;height:1.5rem;accent-color:#0072b2}</style>"
)

# What plotly's slider would do; a browser's own answers to the keyboard and has a name.
_SLIDER = """<div class="crc-slider">{prefix}<output>{label}</output>
<input type="range" min="0" max="{last}" value="{active}" aria-label="{name}" \
aria-valuetext="{label}"></div>
<script>((box) => {{
  const plot = box.closest("figure").querySelector(".plotly-graph-div");
  const [text, input] = ["output", "input"].map((name) => box.querySelector(name));
  input.addEventListener("input", () => {{
    const step = plot.layout.sliders[0].steps[+input.value];
    text.textContent = step.label;
    input.setAttribute("aria-valuetext", step.label);
    Plotly.update(plot, ...step.args);
  }});
}})(document.currentScript.previousElementSibling);</script>"""


def use_style() -> None:
    """Draw matplotlib figures in the book's style from here on: transparent, in its colours."""
    plt.rcParams.update(_MATPLOTLIB)  # type: ignore[arg-type]


def show(figure: go.Figure | Figure, alt: str) -> None:
    """Display a figure wherever this runs: on a page of the book, or in a live notebook.

    Args:
        figure: a plotly or a matplotlib figure; plotly's is shown in the book's style,
            matplotlib's wants :func:`use_style` before it is drawn. It is not changed.
        alt: what the figure shows, for readers who do not see it.

    Raises:
        TypeError: for any other kind of figure.
        ValueError: where ``alt`` is empty.
    """
    if not alt.strip():
        raise ValueError("alt must say what the figure shows; got nothing")
    if isinstance(figure, Figure):
        display(HTML(svg(figure, alt)))
        plt.close(figure)  # or a notebook would draw it a second time
    elif isinstance(figure, go.Figure):
        styled = go.Figure(figure).update_layout(template=_PLOTLY)
        # Live notebooks know how to draw a plotly figure; the book's builder skips it.
        display(HTML(_plotly_html(styled, alt)) if building_the_book() else styled)
    else:
        raise TypeError(
            f"figure must be a plotly or a matplotlib figure; got {type(figure).__name__}"
        )


def show_table(header: Sequence[object], rows: Sequence[Sequence[object]], label: str) -> None:
    """Display a table that follows the page's colours and scrolls where a page is narrow.

    Args:
        header: the columns' names.
        rows: as many values each.
        label: what the table holds, which stands above it.

    Raises:
        ValueError: where a row is longer or shorter than the header.
    """
    lines = []
    for tag, row in [("th", header), *(("td", row) for row in rows)]:
        if len(row) != len(header):
            raise ValueError(f"a row must have {len(header)} values; got {len(row)}")
        lines.append("".join(f"<{tag}>{html.escape(str(value))}</{tag}>" for value in row))
    body = "".join(f"<tr>{line}</tr>" for line in lines[1:])
    display(
        HTML(
            f'{_FOLLOW_THE_PAGE}<div class="crc-figure" style="overflow-x:auto" tabindex="0" '
            f'role="region" aria-label="{html.escape(label)}"><table class="table">'
            '<caption style="caption-side:top;color:inherit;font-style:italic">'
            f"{html.escape(label)}</caption>"
            f"<thead><tr>{lines[0]}</tr></thead><tbody>{body}</tbody></table></div>"
        )
    )


def svg(figure: Figure, alt: str) -> str:
    """A matplotlib figure as inline SVG whose lines and text take the page's text colour.

    Args:
        figure: the figure, drawn after :func:`use_style`.
        alt: what it shows, for readers who do not see it.

    Returns:
        An HTML ``figure`` that is never wider than its page.
    """
    buffer = io.StringIO()
    # The salt names the drawing's parts; two figures of a page must not share names.
    with plt.rc_context({"svg.hashsalt": alt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(_INK, "currentColor")
    drawing = drawing.replace("<svg", '<svg style="max-width:100%;height:auto"', 1)
    return (
        f'{_FOLLOW_THE_PAGE}<figure class="crc-figure" role="img" '
        f'aria-label="{html.escape(alt)}">{drawing}</figure>'
    )


def building_the_book() -> bool:
    """Whether a page of the book is being made, on which nothing can recompute a figure.

    Returns:
        Whether it is.
    """
    return os.environ.get("CRCBOOK_BUILD") == "1"


def _plotly_html(figure: go.Figure, alt: str) -> str:
    """A plotly figure for a page that has loaded plotly.js already."""
    sliders = "".join(map(_slider_html, figure.layout.sliders))
    figure.update_layout(sliders=[{"visible": False}] * len(figure.layout.sliders))
    drawing = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        include_mathjax=False,
        config={"responsive": True, "displayModeBar": False},
    )
    return (
        f'{_FOLLOW_THE_PAGE}<figure class="crc-figure" aria-label="{html.escape(alt)}">'
        f"{drawing}{sliders}</figure>"
    )


def _slider_html(slider: go.layout.Slider) -> str:
    """A browser's slider in the place of plotly's, for the first slider of a figure."""
    prefix, active = slider.currentvalue.prefix or "", slider.active or 0
    return _SLIDER.format(
        prefix=html.escape(prefix),
        name=html.escape(prefix.strip(" :=") or "frame"),
        label=html.escape(slider.steps[active].label),
        last=len(slider.steps) - 1,
        active=active,
    )


def add_slider(
    figure: go.Figure,
    prefix: str,
    frames: Mapping[str, Mapping[str, Sequence]],
    traces: Sequence[int],
    titles: Sequence[str] | None = None,
    start: int = 0,
) -> None:
    """Give a plotly figure a slider over precomputed frames; it answers without a kernel.

    Args:
        figure: the figure; it is changed, and shows the frame at ``start``.
        prefix: what stands before the current label, such as ``"c = "``.
        frames: by its label, each frame's properties of the traces: a name, such as ``"y"``, and a
            value a trace.
        traces: the positions in ``figure.data`` of the traces that change.
        titles: a title of the figure for each frame; None for none.
        start: the position of the frame shown first.

    Raises:
        ValueError: where the numbers of frames and titles differ, or those of values and traces.
    """
    if titles is not None and len(titles) != len(frames):
        raise ValueError(f"expected a title for each of {len(frames)} frames; got {len(titles)}")
    for frame in frames.values():
        if any(len(values) != len(traces) for values in frame.values()):
            raise ValueError(f"each property of a frame needs {len(traces)} values, one a trace")
    steps = []
    for i, (label, frame) in enumerate(frames.items()):
        layout = {} if titles is None else {"title.text": titles[i]}
        steps.append({"method": "update", "label": label, "args": [frame, layout, list(traces)]})
    for name, values in list(frames.values())[start].items():
        for trace, value in zip(traces, values, strict=True):
            figure.data[trace].update({name: value})
    slider = {"steps": steps, "active": start, "currentvalue": {"prefix": prefix}}
    figure.update_layout(
        sliders=[slider | {"pad": {"t": 70}}],  # clear of the axis title on a narrow page
        title_text=None if titles is None else titles[start],
    )
