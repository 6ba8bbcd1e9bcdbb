"""Time the book's figures in a browser, from a key press to the next painted frame.

``make answers``. The explorer and the sliders of the plotly figures must answer within 100 ms.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from browser import CHAPTERS, launch, serve

_MOVES = 40
_ANSWER = """async (slider, moves) => {
  const times = [];
  for (let move = 0; move < moves; move++) {
    const started = performance.now();
    slider.value = move % (slider.max - slider.min + 1);
    slider.dispatchEvent(new Event("input"));
    await new Promise((painted) => requestAnimationFrame(() => setTimeout(painted)));
    times.push(performance.now() - started);
  }
  return times;
}"""


def main() -> int:
    """Time every slider of every chapter and print a table.

    Returns:
        The exit status: 1 where a figure takes longer than 100 ms.
    """
    slow = False
    print(f"{'ms from input to paint':44}{'median':>8}{'worst':>8}")
    with serve() as address, launch() as browser:
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        for name in CHAPTERS:
            page.goto(f"{address}{name}.html")
            page.wait_for_load_state("networkidle")
            for slider in page.locator("input[type=range]").all():
                slider.scroll_into_view_if_needed()
                times = sorted(slider.evaluate(_ANSWER, _MOVES))
                median, worst = times[len(times) // 2], times[-1]
                label = f"{name.removeprefix('book/')}, {slider.get_attribute('aria-label')}"
                print(f"{label:44}{median:8.1f}{worst:8.1f}")
                slow |= median > 100
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
