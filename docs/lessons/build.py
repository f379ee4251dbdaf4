"""Runs the pages of the course: every ```python block of a page in order, in one process.

    python -m docs.lessons.build                    # does every page show what it prints? and its notebook?
    python -m docs.lessons.build 3 walkthrough      # do these two?
    python -m docs.lessons.build change/1           # and the first one of docs/change?
    python -m docs.lessons.build 3 --write          # after a change: output, pictures and notebook anew

A ```text block that follows a ```python block is what that one prints; an image that follows, what it draws.
They agree if the words are the same and no number differs by more than one in its last decimal: another
processor adds in another order. Without matplotlib, blocks that draw are left out; none may need them.
"""

import argparse
import contextlib
import io
import json
import linecache
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n"
                   r"(?:\n```text\n(?P<printed>.*?)^```\n)?"
                   r"(?:\n(?P<picture>!\[[^]]*\]\((?P<file>[^)]*)\))\n)?", re.M | re.S)
NUMBER = re.compile(r"-?\d+(?:\.(\d+))?")
TO_THE_TOP = 'import os\n\nwhile not os.path.exists("clo.py"):\n    os.chdir("..")\n'


@dataclass
class Block:
    """Code, what it prints, and the picture it draws: as the page links it, and its file."""
    code: str
    printed: str = ""
    picture: str = ""
    file: str = ""

    def markdown(self) -> str:
        printed = f"\n```text\n{self.printed}```\n" if self.printed else ""
        picture = f"\n{self.picture}\n" if self.picture else ""
        return f"```python\n{self.code}```\n" + printed + picture


def pages() -> list[Path]:
    return [ROOT / "docs/walkthrough.md", *sorted((ROOT / "docs/lessons").glob("[1-9]-*.md"))]


def changes() -> list[Path]:
    """The pages that change the program. They have no notebook: their work is done in the files."""
    return sorted((ROOT / "docs/change").glob("[1-9]-*.md"))


def changed_copy(patch: str | Path, folder: str | Path) -> Path:
    """A new folder, which becomes a copy of the program with a patch. patch: below the top folder, a .diff
    or a page with diffs, whose prose git skips. Needs git. ValueError where it does not fit the program."""
    folder = Path(folder).resolve()
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.suffix == ".py":
            shutil.copy(path, folder)
        elif (path / "__init__.py").is_file():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "demo").symlink_to(ROOT / "demo")
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}       # of no repository around it
    command = ["git", "apply", ROOT / patch]
    done = subprocess.run(command, cwd=folder, env=alone, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{patch} does not fit the program: {done.stderr}")
    return folder


def parse(text: str) -> list[str | Block]:
    """A page as its prose and its blocks, in order."""
    parts, end = [], 0
    for match in BLOCK.finditer(text):
        found = {name: value or "" for name, value in match.groupdict().items()}
        parts += [text[end:match.start()], Block(**found)]
        end = match.end()
    return [*parts, text[end:]]


def run(parts: list[str | Block], folder: Path) -> list[str | Block]:
    """The page with what it prints, where that is not what it shows. folder: its own, for pictures."""
    done, names = [], {"__name__": "__main__"}
    for number, part in enumerate(parts):
        if isinstance(part, Block) and part.file and not find_spec("matplotlib"):
            print(f"{part.file}: not drawn, for want of matplotlib", file=sys.stderr)
        elif isinstance(part, Block):
            printed = run_block(part.code, f"<block {number}>", names)
            part = part if agree(part.printed, printed) else replace(part, printed=printed)
            if part.file:
                draw((folder / part.file).resolve())
        done.append(part)
    return done


def run_block(code: str, name: str, names: dict) -> str:
    """What code prints. linecache shows its lines to tracebacks, and to Triton, which reads its kernels."""
    linecache.cache[name] = len(code), None, code.splitlines(keepends=True), name
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, name, "exec"), names)
    return "".join(line.rstrip() + "\n" for line in printed.getvalue().splitlines())


def draw(path: Path) -> None:
    """Write the figure that a block drew."""
    from matplotlib import pyplot
    path.parent.mkdir(parents=True, exist_ok=True)
    pyplot.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close("all")


def agree(shown: str, printed: str) -> bool:
    if NUMBER.sub("0", shown).split() != NUMBER.sub("0", printed).split():
        return False
    for a, b in zip(NUMBER.finditer(shown), NUMBER.finditer(printed)):
        last = 10.0 ** -len(a[1]) if a[1] else 0.0                     # whole numbers are counts: exact
        if len(a[1] or "") != len(b[1] or "") or abs(float(a[0]) - float(b[0])) > 1.01 * last:
            return False
    return True


def differences(shown: list[str | Block], printed: list[str | Block]) -> list[str]:
    """Each block that prints something else than its page shows, in words."""
    return [f"{old.code}shows:\n{old.printed}prints:\n{new.printed}"
            for old, new in zip(shown, printed) if old != new]


def notebook(parts: list[str | Block]) -> str:
    """The page as a Jupyter notebook (format 4.5). It starts in its own folder, and imports from the top."""
    cells = []
    for part in [Block(TO_THE_TOP), *parts]:
        if isinstance(part, Block):
            stream = {"output_type": "stream", "name": "stdout", "text": part.printed}
            cells.append({"cell_type": "code", "source": part.code.strip("\n"), "execution_count": None,
                          "outputs": [stream] if part.printed else []})
            part = part.picture
        if part.strip():
            cells.append({"cell_type": "markdown", "source": part.strip("\n")})
    cells = [cell | {"id": f"cell-{number}", "metadata": {}} for number, cell in enumerate(cells)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def named(names: list[str]) -> list[Path]:
    """Pages by how their file begins, those of docs/change after change/; without names all of them."""
    found = [page for page in pages() if not names or page.name.startswith(tuple(names))]
    return found + [page for page in changes() if not names or f"change/{page.name}".startswith(tuple(names))]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.lessons.build", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="PAGE", help="how its file begins; without, all pages")
    parser.add_argument("--write", action="store_true", help="bring pages, pictures and notebooks up to date")
    args, wrong = parser.parse_args(argv), 0
    torch.set_num_threads(1)                           # matrices this small only wait for one another
    os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))   # before a page imports Triton
    for page in named(args.names):
        shown, found = parse(page.read_text(encoding="utf-8")), []
        with tempfile.TemporaryDirectory() as spare:   # to look at a page changes no file
            printed = run(shown, page.parent if args.write else Path(spare) / "page")
        if args.write:
            text = "".join(part.markdown() if isinstance(part, Block) else part for part in printed)
            page.write_text(text, encoding="utf-8")
            if page in pages():
                page.with_suffix(".ipynb").write_text(notebook(printed), encoding="utf-8")
        else:
            found = differences(shown, printed)
            if page in pages() and page.with_suffix(".ipynb").read_text(encoding="utf-8") != notebook(shown):
                found.append("its notebook has another text: --write brings it up to date")
        print(f"{page.relative_to(ROOT)}: " + ("\n".join(found) or "page and program agree"))
        wrong += len(found)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
