"""The shape of the program: five pages, rooms below them, every line with one thought, and a true map in README."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("clo.py", "model.py", "data.py", "translate.py", "eval.py")
ROOMS = ("kernels", "formats", "engine", "m2m100", "evals")
PROGRAM = [ROOT / page for page in PAGES] + [path for room in ROOMS for path in sorted((ROOT / room).glob("*.py"))]
NAMES = [str(path.relative_to(ROOT)) for path in PROGRAM]
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
          tokenize.ENDMARKER}


def docstring_lines(tree: ast.Module) -> set[int]:
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def code_tokens(path: Path) -> int:
    text = path.read_text(encoding="utf-8")
    documented = docstring_lines(ast.parse(text))
    found = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type not in LAYOUT and token.start[0] not in documented for token in found)


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def filled_lines(path: Path) -> int:
    return sum(bool(line.strip()) for line in lines_of(path))


def functions_of(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def test_the_top_level_has_five_pages_and_none_besides():
    assert sorted(path.name for path in ROOT.glob("*.py")) == sorted(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_at_most_600_lines_and_no_nested_comprehension(page):
    assert len(lines_of(ROOT / page)) <= 600
    for node in ast.walk(ast.parse((ROOT / page).read_text())):
        if isinstance(node, COMPREHENSIONS):
            inner = [other for other in ast.walk(node) if isinstance(other, COMPREHENSIONS) and other is not node]
            assert not inner, f"{page}, line {node.lineno}: a comprehension in another"


@pytest.mark.parametrize("name", NAMES)
def test_lines_are_at_most_110_wide_and_carry_one_thought(name):
    path = ROOT / name
    wide = [number for number, line in enumerate(lines_of(path), 1) if len(line) > 110]
    assert not wide, f"{name}: lines {wide} are wider than 110"
    if filled_lines(path) > 20:
        assert code_tokens(path) <= 10 * filled_lines(path), f"{name} has more than 10 tokens a line"


def test_the_program_has_nine_tokens_a_line_on_average():
    assert sum(map(code_tokens, PROGRAM)) <= 9 * sum(map(filled_lines, PROGRAM))


def test_the_step_and_the_loop_stand_within_the_first_250_lines():
    ends = {function.name: function.end_lineno for function in functions_of(ROOT / "clo.py")}
    assert max(ends["clo_loss"], ends["train_step"], ends["train"]) <= 250


TAKE_ARGS = {"clo.py": {"main", "run_method", "dry_run"}, "engine/job.py": {"make_job", "plan_of", "ending_lines"},
             "eval.py": {"ask", "mc", "perplexity", "alpaca", "judge_outputs", "count_wins", "compare"}}      # commands


@pytest.mark.parametrize("name", NAMES)
def test_the_flags_end_at_the_job(name):
    found = {function.name for function in functions_of(ROOT / name)
             if "args" in [argument.arg for argument in function.args.args]}
    assert found <= TAKE_ARGS.get(name, set())


def imports_of(path: Path) -> set[str]:
    """The program's own modules that a file imports, as paths from the root; those met at run time too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(ROOT).parts[:-1]) if node.level else ""
            module = ".".join(filter(None, (package, node.module)))
            names = [module] + [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            file = name.replace(".", "/")
            found |= {f"{file}.py", f"{file}/__init__.py"} & set(NAMES)
    return found


def test_nothing_of_the_program_imports_the_page_on_top():
    assert [name for name in NAMES if "clo.py" in imports_of(ROOT / name)] == []


def test_no_module_imports_what_imports_it():
    below = {name: imports_of(ROOT / name) - {name} for name in NAMES if not name.endswith("__init__.py")}
    while below:
        lowest = [name for name, needed in below.items() if not needed & below.keys()]
        assert lowest, f"these import each other: {sorted(below)}"
        for name in lowest:
            del below[name]


# From the ground up: a file may import its own floor and those below. The job of a run stands in the engine's room
# because the page has no space for it, and on the page's floor.
FLOORS = [
    {"kernels", "formats", "engine/files.py", "engine/flags.py", "engine/progress.py", "engine/adamw.py"},
    {"data.py", "model.py"},
    {"formats/checkpoints.py", "engine", "m2m100", "evals"},
    {"translate.py", "eval.py"},
    {"engine/job.py", "clo.py"},
]


def floor_of(name: str) -> int:
    """A file that is named stands where it is named, any other with its room."""
    room = name.split("/")[0]
    named = [number for number, floor in enumerate(FLOORS) if name in floor]
    return named[0] if named else next(number for number, floor in enumerate(FLOORS) if room in floor)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_imports_its_own_floor_and_those_below(name):
    above = {other for other in imports_of(ROOT / name) if floor_of(other) > floor_of(name)}
    assert above - {"engine/__init__.py", "evals/__init__.py", "m2m100/__init__.py"} == set()


def test_the_map_in_the_readme_gives_true_line_counts():
    """`place` (N lines): nearly, so that a reader may try something without counting."""
    told = re.findall(r"`([\w./]+)` \((\d[\d,]*) lines\)", (ROOT / "README.md").read_text())
    assert {place.rstrip("/") for place, _ in told} >= {*PAGES, *ROOMS}
    for place, number in told:
        path = ROOT / place
        files = [path] if path.is_file() else sorted(path.glob("*.py"))
        count = sum(len(lines_of(file)) for file in files)
        assert int(number.replace(",", "")) == pytest.approx(count, rel=0.03), f"{place} has {count} lines"
