"""The course: pages show what they print, notebooks are their pages, exercises are open and can be solved."""

import ast
import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from docs.lessons import build

ROOT = build.ROOT
PAGES = build.pages()
CHANGES = build.changes()
LESSONS = [page for page in PAGES if page.parent.name == "lessons"]
QUICK = ROOT / "docs/lessons/3-forks.md"
SLOW = [pytest.param(page, marks=pytest.mark.slow, id=page.stem) for page in PAGES + CHANGES if page != QUICK]
EXERCISES = ROOT / "docs/lessons/exercises"
SOLUTIONS = ROOT / "docs/lessons/solutions"
every_page = pytest.mark.parametrize("page", PAGES + CHANGES, ids=lambda page: page.stem)
every_notebook = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
every_change = pytest.mark.parametrize("page", CHANGES, ids=lambda page: page.stem)
every_lesson = pytest.mark.parametrize("page", LESSONS, ids=lambda page: page.stem)


@pytest.fixture
def one_thread():
    """Matrices this small only wait for one another, the more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check_page(page: Path, folder: Path) -> None:
    """Runs a page. Its pictures go to a folder of their own, and each is more than white paper."""
    text = page.read_text(encoding="utf-8")
    if "import triton" in text and not find_spec("triton"):
        pytest.skip("Triton is not installed")
    if "changed_copy" in text and not shutil.which("git"):
        pytest.skip("git is not installed")
    shown = build.parse(text)
    for name in ("pictures", "page/pictures"):           # beside the lessons, below the walkthrough
        (folder / name).mkdir(parents=True)
    assert build.differences(shown, build.run(shown, folder / "page")) == []
    if find_spec("matplotlib"):
        from matplotlib.image import imread
        for part in shown:
            if isinstance(part, build.Block) and part.file:
                assert imread(folder / "page" / part.file)[..., :3].std() > 0.01
                assert (page.parent / part.file).is_file(), f"{part.file} is not committed"


@pytest.mark.parametrize("page", [QUICK, *SLOW], ids=lambda page: getattr(page, "stem", ""))
def test_a_page_prints_what_it_shows(page, tmp_path, one_thread):
    check_page(page, tmp_path)


@every_notebook
def test_a_notebook_is_its_page(page):
    text = page.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert text == build.notebook(build.parse(page.read_text(encoding="utf-8")))


@every_notebook
def test_a_notebook_is_valid(page):
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(json.loads(page.with_suffix(".ipynb").read_text(encoding="utf-8")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["walkthrough.ipynb", "lessons/4-logsoftmax.ipynb"])
def test_a_notebook_runs_from_its_own_folder(name):
    """One in each folder; Triton has to find the kernel of the second. The others equal their pages."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    path = ROOT / "docs" / name
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": path.parent}}).execute()


@every_lesson
def test_a_lesson_has_a_picture_exercises_and_what_to_change_next(page):
    text = page.read_text(encoding="utf-8")
    number = page.name[0]
    assert "](../pictures/" in text and "## What to change next" in text
    assert 2 <= len(set(re.findall(rf"\*\*Exercise {number}\.\d", text))) <= 3
    assert f"docs/lessons/exercises/test_lesson_{number}.py" in text
    assert f"(solutions/lesson_{number}.py)" in text


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/**/*.md")), ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
        assert "://" in link or (page.parent / link).exists(), link


def test_the_contents_name_every_page():
    contents = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert all(f"({page.relative_to(ROOT / 'docs')})" in contents for page in PAGES + CHANGES)


@every_page
def test_what_a_page_names_in_a_file_is_there(page):
    named = re.findall(r"`(\w+)`\s+in\s+`([\w/]+\.py)`", page.read_text(encoding="utf-8"))
    assert named
    for name, file in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^((def|class) {name}\b|{name} = )", source, re.M), f"{name} in {file}"


def names_of(blocks: list[build.Block]) -> tuple[set[str], set[str]]:
    """The names that blocks set, and those that they read."""
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block.code))]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    arguments = {node.arg for node in nodes if isinstance(node, ast.arg)}
    stored = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    return stored | arguments, {node.id for node in names if isinstance(node.ctx, ast.Load)}


@every_page
def test_no_block_needs_one_that_draws(page):
    blocks = [part for part in build.parse(page.read_text(encoding="utf-8")) if isinstance(part, build.Block)]
    drawn, _ = names_of([block for block in blocks if block.file])
    stored, read = names_of([block for block in blocks if not block.file])
    assert drawn & read - stored == set()


# ---- the script that holds them together ----

def test_a_wrong_number_is_noticed_and_a_last_digit_forgiven():
    assert build.agree("loss 0.6931 of 8\n", "loss  0.6932 of 8\n")
    for other in ("loss 0.6933 of 8\n", "loss 0.6931 of 9\n", "nll 0.6931 of 8\n", "loss 0.693 of 8\n"):
        assert not build.agree("loss 0.6931 of 8\n", other)


def test_a_page_is_its_parts_put_together():
    for page in PAGES + CHANGES:
        text = page.read_text(encoding="utf-8")
        parts = build.parse(text)
        assert "".join(part if isinstance(part, str) else part.markdown() for part in parts) == text
        assert not any("```python" in part for part in parts if isinstance(part, str))


def test_blocks_share_their_names_and_a_page_that_shows_something_else_is_told(tmp_path):
    page = "```python\nx = 2\n```\n\n```python\nprint(x + 1)\n```\n\n```text\n4\n```\n"
    shown = build.parse(page)
    assert build.differences(shown, build.run(shown, tmp_path)) == ["print(x + 1)\nshows:\n4\nprints:\n3\n"]


@pytest.mark.slow
def test_to_look_at_a_page_changes_no_file(monkeypatch, one_thread):
    monkeypatch.setenv("TRITON_INTERPRET", "1")                       # main sets it: put back afterwards
    files = [QUICK, QUICK.with_suffix(".ipynb"), ROOT / "docs/pictures/3-packing.png"]
    before = [file.stat().st_mtime_ns for file in files]
    assert build.main(["3"]) == 0
    assert [file.stat().st_mtime_ns for file in files] == before


# ---- exercises ----

def results(tests: Path, report: Path, program: Path = ROOT) -> dict[str, bool]:
    """{test: whether it passed} of exercises, a folder or a file of tests, with the program in its folder."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", tests]
    subprocess.run(command, cwd=program, capture_output=True, timeout=300)
    cases = ElementTree.parse(report).iter("testcase")
    return {f"{case.get('classname')}.{case.get('name')}": len(case) == 0 for case in cases}


@pytest.mark.slow
def test_every_exercise_is_open_and_its_solution_passes(tmp_path):
    solved = tmp_path / "exercises"
    shutil.copytree(EXERCISES, solved, ignore=shutil.ignore_patterns("__pycache__"))
    for solution in SOLUTIONS.glob("*.py"):
        assert (EXERCISES / solution.name).is_file()
        shutil.copy(solution, solved)
    before, after = results(EXERCISES, tmp_path / "open.xml"), results(solved, tmp_path / "solved.xml")
    names = {name.rpartition(".")[2] for name in before}
    assert names and names == {name.rpartition(".")[2] for name in after}
    assert [name for name, passed in before.items() if passed] == []
    assert [name for name, passed in after.items() if not passed] == []


@every_lesson
def test_every_exercise_of_a_page_has_a_test(page):
    number = page.name[0]
    wanted = set(re.findall(rf"\*\*Exercise {number}\.(\d)", page.read_text(encoding="utf-8")))
    tests = (EXERCISES / f"test_lesson_{number}.py").read_text(encoding="utf-8")
    assert set(re.findall(r"^def test_(\d)_", tests, re.M)) == wanted


# ---- pages that change the program ----

def patches(page: Path) -> list[Path]:
    """The page itself, and the solution of its exercises."""
    return [page, page.parent / f"solutions/change_{page.name[0]}.diff"]


@every_change
def test_the_patches_of_a_page_fit_the_program(page, tmp_path):
    """When one does not, the program has moved on: change a copy by hand, and paste its `git diff -U2`."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    for number, patch in enumerate(patches(page)):
        changed = build.changed_copy(patch.relative_to(ROOT), tmp_path / str(number))
        text = patch.read_text(encoding="utf-8")
        files = re.findall(r"^\+\+\+ b/(.*)$", text, re.M)
        assert files and all((changed / file).read_text() != (ROOT / file).read_text() for file in files)
        assert re.findall(r"^\+.{111,}$", text, re.M) == []       # as tests/test_structure.py wants it


def test_a_patch_that_does_not_fit_is_told(tmp_path):
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    (tmp_path / "odd.diff").write_text("--- a/clo.py\n+++ b/clo.py\n@@ -1 +1 @@\n-not there\n+new\n")
    with pytest.raises(ValueError, match="odd.diff does not fit the program: error: patch failed: clo.py:1"):
        build.changed_copy(tmp_path / "odd.diff", tmp_path / "copy")


@pytest.mark.slow
@every_change
def test_the_exercises_of_a_change_are_open_and_its_solution_passes(page, tmp_path):
    tests = page.parent / f"exercises/test_change_{page.name[0]}.py"
    solved = build.changed_copy(patches(page)[1].relative_to(ROOT), tmp_path / "solved")
    before, after = results(tests, tmp_path / "open.xml"), results(tests, tmp_path / "solved.xml", solved)
    assert before and before.keys() == after.keys()
    assert [name for name, passed in before.items() if passed] == []
    assert [name for name, passed in after.items() if not passed] == []


@pytest.mark.slow
def test_a_granite_in_the_changed_program_has_the_logits_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GraniteConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2, embedding_multiplier=12.0,
        attention_multiplier=0.125, residual_multiplier=0.22, logits_scaling=8.0)
    theirs = transformers.GraniteForCausalLM(config)
    theirs.save_pretrained(tmp_path / "granite")
    tokens = torch.arange(40)[None]
    torch.save((tokens, theirs(tokens).logits), tmp_path / "logits.pt")
    code = """if True:
        import sys, torch, model
        granite = model.load(sys.argv[1])
        tokens, logits = torch.load(sys.argv[2])
        assert logits.std() > 0.1
        torch.testing.assert_close(granite(tokens) @ granite.head.T, logits, rtol=0, atol=1e-4)"""
    program = build.changed_copy("docs/change/3-model-family.md", tmp_path / "program")
    command = [sys.executable, "-c", code, tmp_path / "granite", tmp_path / "logits.pt"]
    done = subprocess.run(command, cwd=program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@every_change
def test_every_exercise_of_a_change_has_a_test_and_a_solution(page):
    text, number = page.read_text(encoding="utf-8"), page.name[0]
    wanted = set(re.findall(rf"\*\*Exercise {number}\.(\d)", text))
    tests = (page.parent / f"exercises/test_change_{number}.py").read_text(encoding="utf-8")
    assert wanted and set(re.findall(r"^def test_(\d)_", tests, re.M)) == wanted
    assert f"docs/change/exercises/test_change_{number}.py" in text
    assert f"(solutions/change_{number}.diff)" in text and "## What to change next" in text


def test_the_default_run_collects_no_exercise(request):
    assert request.config.getini("testpaths") == ["tests"]
    assert not list((ROOT / "tests").glob("**/*lesson_*"))
