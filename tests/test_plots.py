"""One ``show`` for the book and for live notebooks, readable on light and on dark pages."""

import re
import subprocess
import sys

import matplotlib.pyplot as plt
import plotly.graph_objects as go
import pytest

from crcbook.book import plots


@pytest.fixture
def displayed(monkeypatch):
    """What ``show`` hands to the notebook."""
    objects = []
    monkeypatch.setattr(plots, "display", objects.append)
    return objects


@pytest.fixture
def line():
    """A matplotlib figure in the book's style, restored to the default afterwards."""
    with plt.rc_context():
        plots.use_style()
        figure, axes = plt.subplots()
        axes.plot([0, 1], [1, 0], label="a line")
        axes.set_title("title")
        axes.legend()
        yield figure
        plt.close(figure)


def contrast(first, second):
    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_plotly_in_the_book_is_html_that_relies_on_the_page_for_plotly(displayed, monkeypatch):
    monkeypatch.setenv("CRCBOOK_BUILD", "1")
    plots.show(go.Figure(go.Scatter(y=[1, 2])), alt="a <rising> line")
    html = displayed[0].data
    assert "Plotly.newPlot" in html
    assert 'aria-label="a &lt;rising&gt; line"' in html
    assert "<script src" not in html and "cdn" not in html
    assert len(html) < 50_000


def test_plotly_in_a_live_notebook_is_the_figure_itself(displayed, monkeypatch):
    monkeypatch.delenv("CRCBOOK_BUILD", raising=False)
    figure = go.Figure(go.Scatter(y=[1, 2]), layout={"title": "kept"})
    plots.show(figure, alt="a line")
    assert isinstance(displayed[0], go.Figure)
    assert displayed[0].data == figure.data
    assert displayed[0].layout.title.text == "kept"
    assert displayed[0].layout.template.layout.paper_bgcolor == "rgba(0,0,0,0)"


def test_show_leaves_the_callers_figure_alone(displayed):
    figure = go.Figure(go.Scatter(y=[1, 2]))
    before = figure.to_json()
    plots.show(figure, alt="a line")
    assert figure.to_json() == before


def test_matplotlib_is_inline_svg_in_the_pages_colour(displayed, line):
    plots.show(line, alt='a "falling" line')
    html = displayed[0].data
    assert 'role="img" aria-label="a &quot;falling&quot; line"' in html
    assert "currentColor" in html
    assert not re.search("#(777777|000000|ffffff)", html)
    assert "<?xml" not in html and "DOCTYPE" not in html
    assert not plt.fignum_exists(line.number)


def test_two_drawings_on_a_page_share_no_names(line):
    first, second = plots.svg(line, "one"), plots.svg(line, "two")
    names = [set(re.findall(r'<clipPath id="(\w+)"', drawing)) for drawing in (first, second)]
    assert names[0] and not names[0] & names[1]
    assert plots.svg(line, "one") == first


def test_the_ink_is_legible_on_white_and_on_black():
    assert contrast(plots._INK, "#ffffff") > 4.4
    assert contrast(plots._INK, "#000000") > 4.4


def test_the_first_colours_stand_out_on_both_pages_and_from_each_other():
    for colour in plots.PALETTE[:4]:
        assert min(contrast(colour, page) for page in ("#ffffff", "#121212")) > 2
    assert len(set(plots.PALETTE)) == 7


@pytest.mark.parametrize("alt", ["", "  "])
def test_a_figure_without_alternative_text_is_refused(alt):
    with pytest.raises(ValueError, match="alt must say"):
        plots.show(go.Figure(), alt=alt)


def test_another_kind_of_figure_is_refused():
    with pytest.raises(TypeError, match="plotly or a matplotlib figure; got list"):
        plots.show([1, 2], alt="a list")


def test_importing_the_package_draws_nothing():
    """A script that only certifies should not wait for plotly, matplotlib and widgets."""
    code = "import sys, crcbook; print({'plotly', 'matplotlib', 'ipywidgets'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.stdout.strip() == "set()", loaded.stderr


@pytest.fixture
def sliding():
    """A figure whose slider moves its second trace."""
    figure = go.Figure([go.Scatter(y=[0, 0]), go.Scatter(y=[])])
    frames = [{"x": [[0, i]], "y": [[i, i]]} for i in range(3)]
    plots.add_slider(
        figure, "i = ", dict(zip("012", frames, strict=True)), [1], titles=["a", "b", "c"], start=1
    )
    return figure


def test_a_slider_starts_at_its_frame_and_leaves_other_traces_alone(sliding):
    assert list(sliding.data[1].x) == [0, 1] and list(sliding.data[1].y) == [1, 1]
    assert list(sliding.data[0].y) == [0, 0]
    assert sliding.layout.title.text == "b"
    assert sliding.layout.sliders[0].active == 1


def test_a_slider_carries_every_frame(sliding):
    steps = sliding.layout.sliders[0].steps
    assert [step.label for step in steps] == ["0", "1", "2"]
    frame, layout, traces = steps[2].args
    assert frame["y"] == [[2, 2]] and layout["title.text"] == "c" and list(traces) == [1]


def test_in_the_book_the_browsers_own_slider_moves_the_figure(sliding, displayed, monkeypatch):
    monkeypatch.setenv("CRCBOOK_BUILD", "1")
    plots.show(sliding, alt="a line")
    html = displayed[0].data
    assert 'max="2" value="1" aria-label="i" aria-valuetext="1"' in html
    assert "i = <output>1</output>" in html
    assert '"visible":false' in html and sliding.layout.sliders[0].visible is None


@pytest.mark.parametrize("change", [{"titles": ["a"]}, {"traces": [0, 1]}], ids=str)
def test_a_slider_with_missing_frames_is_refused(change):
    frames = {str(i): {"y": [[i]]} for i in range(3)}
    options = {"frames": frames, "traces": [0], **change}
    with pytest.raises(ValueError, match="frame"):
        plots.add_slider(go.Figure(go.Scatter()), "i = ", **options)


def test_a_table_escapes_its_values_and_refuses_ragged_rows(monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "display", lambda value: shown.append(value.data))
    plots.show_table(["a", "b < c"], [[1, "<i>"], ["x", 2.5]], "numbers")
    [text] = shown
    assert "b &lt; c" in text and "&lt;i&gt;" in text and "<i>" not in text
    assert text.count("<tr>") == 3 and 'aria-label="numbers"' in text
    assert ">numbers</caption>" in text
    with pytest.raises(ValueError, match="2 values; got 1"):
        plots.show_table(["a", "b"], [[1]], "ragged")
