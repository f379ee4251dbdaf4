"""engine/files.py: the lock that a kill releases, the hash of a model, and the pipe that closes."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.files import InputError, Journal, directory_fingerprint, first_difference, locked, write_json
from formats.hub import MODEL_FILES

ROOT = Path(__file__).parents[1]
HOLDER = """import sys, time
from engine.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(path):
    """Another process that has the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_process_is_refused_and_told_who_holds_the_file_by_any_of_its_names(tmp_path):
    path, link = tmp_path / "out.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(path)
    process = holder(path)
    for name in (path, link, tmp_path / "." / "out.jsonl"):
        with pytest.raises(InputError, match=f"out.jsonl is being written by process {process.pid} .*: wait"):
            with locked(name):
                raise AssertionError("the lock was given twice")
    process.send_signal(signal.SIGKILL)
    process.wait()
    with locked(path):
        assert (tmp_path / "out.jsonl.lock").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["link.jsonl"], "no lock is left behind"


def test_a_place_where_nothing_can_be_written_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/run cannot be written .*choose another --out"):
        with locked(tmp_path / "file" / "run"):
            raise AssertionError("there is no such place")


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, full_disk):
    path = tmp_path / "result.json"
    write_json(path, {"whole": True})
    with full_disk(5), pytest.raises(InputError, match="result.json cannot be written .*: make room"):
        write_json(path, {"whole": False})
    assert path.read_text() == '{\n  "whole": true\n}\n'


def test_a_lock_that_finds_no_room_is_one_line_and_leaves_nothing(tmp_path, full_disk):
    with full_disk(0), pytest.raises(InputError, match="run cannot be written .*: make room"):
        with locked(tmp_path / "run"):
            raise AssertionError("nobody could be told who holds it")
    assert not any(tmp_path.iterdir())


def test_answers_that_find_no_room_are_one_line_and_those_before_are_kept(tmp_path, full_disk):
    path = tmp_path / "answers.jsonl"
    with Journal(path, {}, ("question",)) as journal:
        journal.add({"question": "1"})
        with full_disk(path.stat().st_size + 5):
            with pytest.raises(InputError, match="answers.jsonl cannot be written .*: make room"):
                journal.add({"question": "2"})
    with Journal(path, {}, ("question",)) as again:
        assert again.done == [{"question": "1"}]


def test_a_lock_is_let_go_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locked(tmp_path / "run" / "sw"):
            1 / 0


def test_a_copied_model_is_the_same_one_and_a_changed_weight_makes_another(tmp_path):
    model, copy = tmp_path / "model", tmp_path / "copy"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(1000))
    shutil.copytree(model, copy)
    os.utime(copy / "model.safetensors", (0, 0))
    (copy / "another program's.json").write_text("{}")
    assert directory_fingerprint(copy, *MODEL_FILES) == directory_fingerprint(model, *MODEL_FILES)
    (copy / "model.safetensors").write_bytes(bytes(999) + b"1")
    assert directory_fingerprint(copy, *MODEL_FILES) != directory_fingerprint(model, *MODEL_FILES)


def test_a_reader_who_has_read_enough_ends_the_program_without_a_word():
    program = "from engine.files import run; run(lambda: [print('line') for _ in range(100_000)])"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               cwd=ROOT)
    assert process.stdout.readline() == b"line\n"
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 128 + signal.SIGPIPE


def test_answers_begun_with_other_files_are_refused_by_the_file_and_not_by_all_of_them(tmp_path):
    before = {"benchmark": "mmlu", "files": {f"{i}.csv": "a" * 16 for i in range(57)}}
    now = before | {"files": before["files"] | {"3.csv": "b" * 16}}
    with Journal(tmp_path / "answers.jsonl", before, ("question",)) as journal:
        journal.add({"question": "1"})
    with pytest.raises(InputError) as error:
        Journal(tmp_path / "answers.jsonl", now, ("question",))
    assert "begun with files 3.csv = 'aaaaaaaaaaaaaaaa', now it is 'bbbbbbbbbbbbbbbb': choose" in str(error.value)
    assert len(str(error.value)) < 300 and first_difference(before, dict(before)) is None


def test_a_fresh_start_keeps_the_old_answers_and_their_result_under_other_names(tmp_path):
    path = tmp_path / "answers.jsonl"
    with Journal(path, {"shots": 0}, ("question",)) as journal:
        journal.add({"question": "1"})
    (tmp_path / "result.json").write_text("{}")
    old = path.read_bytes()
    with Journal(path, {"shots": 5}, ("question",), fresh=True) as journal:
        assert journal.done == []
    assert (tmp_path / "answers.jsonl.old-1").read_bytes() == old
    assert not (tmp_path / "result.json").exists() and (tmp_path / "result.json.old-1").exists()


def test_answers_are_written_by_one_process_at_a_time(tmp_path):
    with Journal(tmp_path / "answers.jsonl", {}, ("question",)):
        with pytest.raises(InputError, match="is being written by process"):
            Journal(tmp_path / "answers.jsonl", {}, ("question",))
    with Journal(tmp_path / "answers.jsonl", {}, ("question",)) as again:
        assert again.done == []
