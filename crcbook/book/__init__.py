"""What only the chapters need: figures, explorers, widgets."""

from importlib.util import find_spec

_NEEDED = ("contourpy", "IPython", "ipywidgets", "matplotlib", "plotly", "sklearn")
_MISSING = [name for name in _NEEDED if find_spec(name) is None]
if _MISSING:
    raise ImportError(
        f"the chapters need {', '.join(_MISSING)}, of the extras of crcbook[book]: "
        'pip install "crcbook[book] @ git+https://github.com/crcbook/crcbook"'
    )
