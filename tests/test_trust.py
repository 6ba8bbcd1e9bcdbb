"""The page of what has to be trusted counts its lines right."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "book" / "what_you_have_to_trust.md").read_text("utf-8")
ROW = re.compile(r"^\| `([\w/.]+)` \|.*\| (\d+) \|$", re.M)
CORE, REST = PAGE.split("| together |")
ROWS, OTHERS = ({name: int(lines) for name, lines in ROW.findall(part)} for part in (CORE, REST))
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef


def lines_of_code(path):
    """Lines without docstrings, comments and blank ones."""
    source = path.read_text("utf-8")
    left_out = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            left_out |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(re.match(r"\s*[^\s#]", line)) for i, line in lines if i not in left_out)


def test_the_page_says_how_long_the_core_is():
    assert len(ROWS) == 9
    for rows in (ROWS, OTHERS):
        assert {name: lines_of_code(ROOT / "crcbook" / name) for name in rows} == rows
    assert re.search(r"^\| together \| \| (\d+) \|$", PAGE, re.M)[1] == str(sum(ROWS.values()))


def test_the_page_begins_with_the_same_numbers():
    [said] = re.findall(
        r"nine\s+files prove \(([\d,]+) lines\), four more carry the numbers \((\d+)\), "
        r"and local curvature adds (\d+)", PAGE,
    )  # fmt: skip
    lines = list(OTHERS.values())
    local = [OTHERS[f"proof/{name}.py"] for name in ("slabs", "paths", "shells")]
    found = [sum(ROWS.values()), sum(lines[:4]), sum(local)]
    assert [int(number.replace(",", "")) for number in said] == found


def test_every_file_that_proves_is_on_the_page():
    proofs = {f"proof/{path.name}" for path in (ROOT / "crcbook" / "proof").glob("*.py")}
    assert proofs - {"proof/__init__.py"} == {
        name for name in ROWS | OTHERS if name.startswith("proof/")
    }


def test_the_core_imports_nothing_that_need_not_be_trusted():
    allowed = {
        "arithmetic",
        "rounding",
        "eigenvalues",
        "intervals",
        "curvature",
        "box",
        "quadratic",
    }
    for name in ROWS:
        for line in re.findall(
            r"^from (crcbook[\w.]*)", (ROOT / "crcbook" / name).read_text(), re.M
        ):
            part = line.removeprefix("crcbook.proof.")
            assert part in allowed or line in ("crcbook.activations", "crcbook.networks"), (
                name,
                line,
            )
