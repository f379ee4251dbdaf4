"""The user's files: one error, reader, writer that never leaves half a file, journal, lock and hash."""

import contextlib
import fcntl
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

SAMPLES = 256                         # blocks of a large file that its hash is made from
SAMPLE_BYTES = 1 << 14
LFS = b"version https://git-lfs"       # how a pointer of Git LFS begins
HALF_A_CHARACTER = "[\ud800-\udfff]"  # JSON can spell a surrogate on its own


class InputError(ValueError):
    """Bad input, in one line: what, where (file:line), how to fix it."""


class HeldByAnother(InputError):
    """Another process writes this file or directory."""


def run(main):
    """Run a command line: bad input becomes one line on stderr and exit code 2, Ctrl-C exit code 130. What it
    prints goes out line by line, into a redirected log too."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    try:
        main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:            # whoever reads what is printed has read enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (OSError, ValueError) as error:
        if type(error) is ValueError:  # ours are subclasses; a plain one is a bug and keeps its traceback
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@functools.cache
def say_once(line: str) -> None:
    """Print a line, the first time it is said: a run opens most of what it reads several times."""
    print(line)


def refuse_pointer(path, raw: bytes) -> None:
    """InputError for what `git clone` leaves of a large file without Git LFS. raw: the file, or its start."""
    if raw.startswith(LFS):
        raise InputError(f"{path} only tells Git LFS where the file is: run `git lfs pull` there")


def read_text(path) -> str:
    """The text of a UTF-8 file, plain or gzip (told by its first bytes)."""
    try:
        raw = Path(path).read_bytes()
        refuse_pointer(path, raw)
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        return raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: damaged gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = raw[:error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8 text; JSON or JSONL in UTF-8 is wanted") from None


def parse_json(text, path, wanted, line=1):
    """The value of JSON text that begins in this line of a file. wanted: what belongs there, for errors."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        why = f"{error.msg} (column {error.colno})"
    except RecursionError:
        why = "lists or objects nested too deeply"
    except ValueError as error:  # a number of thousands of digits
        why = str(error)
    raise InputError(f"{path}:{line}: not valid JSON: {why}; {wanted}")


def read_records(path):
    """[(where, object)] of a JSONL file ("file:line") or of a file holding one JSON list ("file[item]")."""
    wanted = "one object a line is wanted, or one list"
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        records = parse_json(text, path, wanted)
        return [(f"{path}[{item}]", record) for item, record in enumerate(records)]
    lines = enumerate(text.split("\n"), 1)                # splitlines() also cuts at U+2028
    return [(f"{path}:{number}", parse_json(line, path, wanted, number))
            for number, line in lines if line.strip()]


def as_kind(value, kind, where):
    """The value, or an error if it is not of that kind (dict, list, str)."""
    if not isinstance(value, kind):
        raise InputError(f"{where}: {kind.__name__} expected, found {type(value).__name__}")
    return value


def first_line(error: Exception) -> str:
    """Of what an error says; its name where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def need(record, key, where):
    """record[key], or an error that names the place and the keys that are there."""
    if key not in as_kind(record, dict, where):
        raise InputError(f'{where}: "{key}" is missing (found: {", ".join(record)})')
    return record[key]


def is_unicode(value) -> bool:
    """Whether no string anywhere in it holds half of a character, which no file can hold."""
    return not re.search(HALF_A_CHARACTER, json.dumps(value, ensure_ascii=False))


def check_unicode(value, where):
    """The value, or an error where it is not."""
    if not is_unicode(value):
        raise InputError(f"{where}: broken Unicode (half of a character): "
                         f"write the whole one, or take it out")
    return value


def read_json(path, missing: dict | None = None) -> dict:
    """The object in a JSON file; `missing`, if given, without the file.
    InputError when it is missing, not JSON, or not an object."""
    if missing is not None and not Path(path).exists():
        return missing
    return as_kind(parse_json(read_text(path), path, "one object is wanted"), dict, path)


def json_line(record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """To a temporary name first, so there is never half a file."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path, records) -> None:
    """One JSON object a line."""
    write_text(Path(path), "".join(map(json_line, records)))


def fill_directory(path: Path, fill) -> None:
    """Call fill(temporary directory), then put it in the place of `path`."""
    with writing(path):
        temporary = empty_directory(path.with_name(path.name + ".tmp"))
        fill(temporary)
        put_in_place(temporary, path)


def empty_directory(path: Path) -> Path:
    remove(path)
    path.mkdir(parents=True)
    return path


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a directory, over another one if need be;
    a kill in between leaves the new one or none, never half of one."""
    old = path.with_name(path.name + ".old")
    remove(old)
    if path.exists():
        os.replace(path, old)
    os.replace(temporary, path)
    remove(old)


def remove(path: Path) -> None:
    """A file, a link, or a directory with all that is in it; nothing when nothing is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path):
    """What keeps `path` from being written, mostly a full disk, becomes one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be written ({error}): make room on its disk, or choose another "
                         f"--out; the same command goes on where it stopped") from None


@contextlib.contextmanager
def locked(path: Path, wait: bool = False):
    """Nobody else writes this file or directory meanwhile; HeldByAnother says who does, unless we wait for
    its end. The lock is a file beside it that the system lets go when its process ends, however it ends."""
    path = Path(path).resolve()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = claim(path, wait)
    with lock as file:
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        since = time.strftime("%d %b %H:%M:%S")
        holder = f"process {os.getpid()} on {socket.gethostname()} since {since}: {command}"
        try:
            with writing(path):
                file.truncate(0)
                os.write(file.fileno(), holder.encode(errors="replace"))   # unbuffered: closing tries no more
            yield
        finally:
            os.unlink(file.name)


def claim(path: Path, wait: bool):
    """The open lock file of a path, which is ours alone."""
    way = fcntl.LOCK_EX
    if not wait:
        way |= fcntl.LOCK_NB
    while True:
        file = open(path.parent / f"{path.name}.lock", "a+", encoding="utf-8")
        try:
            fcntl.flock(file, way)
        except BlockingIOError:
            file.seek(0)
            raise HeldByAnother(f"{path} is being written by {file.read()[:300]}: wait until it has ended, "
                                f"or give another --out") from None
        except OSError as error:
            print(f"{path} cannot be locked ({error}): let no other process write it")
            return file
        # Who held it before may have deleted it between our opening and our locking it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
                return file
        file.close()


def append_jsonl(path: Path, records) -> None:
    with writing(path), open(path, "a", encoding="utf-8", newline="\n") as file:
        file.writelines(map(json_line, records))


def read_journal(path: Path, remedy: str) -> Iterator[tuple[str, dict]]:
    """Yields ("file:line", object) of each line of a file that is appended to, but for the half one that a
    kill leaves. InputError, with the remedy, when it comes to a damaged line."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            record = as_kind(parse_json(line, path, remedy, number), dict, where)
        except InputError:
            raise InputError(f"{where}: damaged: {remedy}") from None
        yield where, record


def check_overwrite(flag: str, out, data) -> None:
    """InputError if writing `out`, or what lies beside it meanwhile, would overwrite the data."""
    out, data = Path(out), Path(data)
    for suffix in ("", ".tmp", ".lock"):
        name = out.with_name(out.name + suffix)
        if name.exists() and data.exists() and name.samefile(data):
            raise InputError(f"{flag} {out} would overwrite {data}, which is read: choose another name")


def free_name(path: Path) -> Path:
    """A name beside it that nothing has yet, for what is kept when the path is written anew."""
    names = (path.with_name(f"{path.name}.old-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def directory_fingerprint(path: Path, *patterns: str) -> str:
    """Hash of the files of a checkpoint whose names match: names, sizes, and SAMPLES blocks spread evenly,
    all of a small file (to read gigabytes would take a minute; training changes a tensor all over)."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if not any(map(file.match, patterns)):           # other programs put files of theirs beside
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as stream:
            for i in range(SAMPLES):
                stream.seek(max(i * SAMPLE_BYTES, i * size // SAMPLES))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def fingerprint(*parts) -> str:
    """Short hash of JSON-able values and of the contents of files (Path)."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                for block in iter(lambda: file.read(1 << 20), b""):
                    digest.update(block)
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


class Journal:
    """A file of answers, one JSON line each behind one line of settings, of one process at a time. `done`
    holds the answers of an earlier, perhaps killed, run with the same settings; other settings are refused,
    and so are lines without the `keys` of an answer. fresh: what is there is kept under other names."""

    def __init__(self, path: Path, settings: dict, keys: tuple[str, ...], fresh: bool = False):
        self.path, self.keys = path, keys
        with contextlib.ExitStack() as held:
            held.enter_context(locked(path))
            if fresh:
                self.move_aside()
            self.done = self.read(json.loads(json.dumps(settings))) if path.exists() else []
            write_jsonl(path, [{"settings": settings}, *self.done])
            self.held = held.pop_all()

    def move_aside(self) -> None:
        for old in (self.path, self.path.with_name("result.json")):
            if old.exists():
                aside = free_name(old)
                old.rename(aside)
                print(f"{old} is now {aside}: delete it when nobody needs it")

    def read(self, settings: dict) -> list[dict]:
        lines = [*read_journal(self.path, "delete the file, or start over with --fresh")]
        if not lines:
            return []
        (where, first), *answers = lines
        before = as_kind(need(first, "settings", where), dict, where)
        for where, answer in answers:
            for key in self.keys:
                need(answer, key, where)
        if difference := first_difference(before, settings):
            raise InputError(f"{self.path} was begun with {difference}: choose another --out, or start over "
                             f"with --fresh")
        if answers:
            print(f"{self.path} holds {len(answers)} answers: going on behind them")
        return [answer for _, answer in answers]

    def add(self, line: dict) -> None:
        append_jsonl(self.path, [line])
        self.done.append(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.held.close()


@dataclass(frozen=True)
class Difference:
    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} = {self.before!r}, now it is {self.now!r}"


def first_difference(before: dict, now: dict) -> Difference | None:
    """The first key under which two dictionaries differ, in a dictionary in them too: "files anatomy.csv"."""
    for key in [*before, *now]:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            if inner := first_difference(old, new):
                return replace(inner, key=f"{key} {inner.key}")
        elif old != new:
            return Difference(key, old, new)
    return None
