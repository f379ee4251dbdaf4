"""hub.py against a hub on the loopback: what is fetched, what is resumed, and one clear line when it
cannot be had."""

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conftest import write_checkpoint
from engine.files import InputError, first_line, write_json
from formats import hub
from formats.weights import adapter_base

ROOT = Path(__file__).parents[1]
CHUNK = 10 * 1024 ** 2         # bytes that huggingface_hub writes at a time
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories in memory ({"owner/name": {file: bytes}}), behind the part of the hub's protocol
    a download uses."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.models, self.datasets, self.gated = {}, {}, set()
        self.cuts = {}              # {file: how many of its responses break off in the middle}
        self.got = []               # (file, Range header or None) of every GET of a file
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def fetched(self):
        return [name for name, _ in self.got]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0].removeprefix("/api").strip("/")
        kind = self.server.datasets if path.startswith("datasets/") else self.server.models
        parts = path.removeprefix("datasets/").removeprefix("models/").split("/")
        repository, verb, rest = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "", parts[3:]
        if repository in self.server.gated:
            return self.refuse(401, "GatedRepo")
        if repository not in kind:
            return self.refuse(404, "RepoNotFound")
        if verb == "resolve":
            name = "/".join(rest[1:])
            return self.send_part(name, kind[repository].get(name))
        listing = [{"type": "file", "path": name, "rfilename": name, "size": len(content),
                    "oid": etag(content)} for name, content in kind[repository].items()]
        body = listing if verb == "tree" else {"id": repository, "sha": COMMIT, "siblings": listing}
        self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def send_part(self, name, content):
        if content is None:
            return self.refuse(404, "EntryNotFound")
        headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked, first, status = self.headers.get("Range"), 0, 200
        if self.command == "GET":
            self.server.got.append((name, asked))
        if asked:
            first, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        cut = None
        if self.command == "GET" and self.server.cuts.get(name):
            self.server.cuts[name] -= 1
            cut = 0 if asked else len(content) // 2
        self.answer(status, content[first:], headers, cut)

    def answer(self, status, body, headers, cut=None):
        """cut: send only so many bytes of the body whose whole length was announced, then hang up."""
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        self.close_connection = True

    def refuse(self, status, code):
        self.answer(status, b"{}", {"X-Error-Code": code})


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict:
    """The files of a tiny model, and others such as real repositories hold beside them."""
    path = write_checkpoint(tmp_path_factory.mktemp("tiny"))
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    return files | {"consolidated.safetensors": b"x" * 999, "pytorch_model.bin": b"x" * 999,
                    "README.md": b"# tiny"}


@pytest.fixture
def server():
    with Hub() as hub_server:
        yield hub_server
        hub_server.shutdown()


def call(server, cache: Path, *command, **environment):
    """Run a command with the server as its hub."""
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HOME": str(cache),
                "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run([sys.executable, *map(str, command)], cwd=cache, env=kept | settings | environment,
                          capture_output=True, text=True, timeout=120)


LOCAL = """
import sys
from engine.files import InputError
from formats import hub
try:
    print(hub.model_directory(sys.argv[1]))
except InputError as error:
    print("error:", error)"""


@pytest.mark.slow
def test_only_needed_files_are_fetched_and_the_cache_answers_offline(server, tmp_path, tiny):
    server.models["some/tiny"] = tiny
    first = call(server, tmp_path, "-c", LOCAL, "some/tiny")
    directory = Path(first.stdout.strip())
    assert sorted(server.fetched()) == sorted(path.name for path in directory.iterdir())
    assert set(server.fetched()) == {"config.json", "generation_config.json", "tokenizer.json",
                                     "tokenizer_config.json", "model.safetensors"}
    assert "100%" in first.stderr                                                          # progress is shown
    for name in server.fetched():
        assert (directory / name).read_bytes() == tiny[name]
    server.got.clear()
    assert call(server, tmp_path, "-c", LOCAL, "some/tiny").stdout == first.stdout and not server.got
    offline = call(server, tmp_path, "-c", LOCAL, "some/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert offline.stdout == first.stdout
    assert call(server, tmp_path, "-c", LOCAL, "some/tiny", HF_HUB_OFFLINE="1").stdout == first.stdout


@pytest.mark.slow
def test_a_model_that_is_not_read_here_is_refused_before_its_weights_are_fetched(server, tmp_path, tiny):
    server.models["some/gemma"] = tiny | {"config.json": b'{"model_type": "gemma2"}'}
    told = call(server, tmp_path, "-c", LOCAL, "some/gemma").stdout
    assert told.startswith("error: ") and "gemma2" in told and "model.safetensors" not in server.fetched()


@pytest.mark.slow
def test_shards_are_those_the_index_names(server, tmp_path, tiny):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    shards = {name: name.encode() for name in index["weight_map"].values()}
    large = tiny | shards | {hub.INDEX: json.dumps(index).encode()}
    del large["model.safetensors"]
    server.models["some/large"], server.models["some/both"] = large, tiny | large
    call(server, tmp_path, "-c", LOCAL, "some/large")
    assert {name for name in server.fetched() if name.endswith("safetensors")} == set(shards)
    server.got.clear()                                   # with a whole file, that one, as transformers does
    call(server, tmp_path, "-c", LOCAL, "some/both")
    assert {name for name in server.fetched() if "model" in name} == {"model.safetensors"}


@pytest.mark.slow
def test_every_chat_template_comes_along(server, tmp_path, tiny):
    server.models["some/tiny"] = tiny | {"additional_chat_templates/tool_use.jinja": b"T"}
    directory = Path(call(server, tmp_path, "-c", LOCAL, "some/tiny").stdout.strip())
    assert (directory / "additional_chat_templates" / "tool_use.jinja").read_bytes() == b"T"


@pytest.mark.slow
def test_an_adapter_may_lie_on_the_hub(server, tmp_path):
    server.models["some/adapter"] = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x",
                                     "README.md": b"y"}
    result = call(server, tmp_path, "-c", LOCAL.replace("hub.model_directory", "hub.adapter_directory"), "some/adapter")
    names = {path.name for path in Path(result.stdout.strip()).iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("repository, environment, told", [
    ("some/gated", {}, "for a gated one accept its licence at https://huggingface.co/some/gated, then log in"),
    ("some/tinny", {}, "neither a directory here nor a model that the hub gives to you: check the spelling"),
    ("some/a..b", {}, "check the spelling"),
    ("some/tiny", {"HF_ENDPOINT": "http://127.0.0.1:9"},
     "the hub cannot be reached (ConnectError): connect, or give a directory"),
    ("some/tiny", {"HF_HUB_OFFLINE": "1"}, "the hub cannot be reached (OfflineModeIsEnabled)")])
def test_what_cannot_be_had_is_told_in_one_line(server, tmp_path, repository, environment, told):
    server.gated.add("some/gated")
    result = call(server, tmp_path, "-c", LOCAL, repository, **environment)
    assert (result.stdout.startswith("error: ") and told in result.stdout
            and result.stdout.count("\n") == 1), result.stderr


def test_an_error_without_words_is_told_by_its_name():
    assert first_line(ConnectionError()) == "ConnectionError" and first_line(ValueError("a\nb")) == "a"


@pytest.mark.slow
def test_a_download_cut_in_the_middle_goes_on_where_it_broke_off(server, tmp_path, tiny):
    weights = os.urandom(3 * CHUNK)
    server.models["some/tiny"], server.cuts = tiny | {"model.safetensors": weights}, {"model.safetensors": 1}
    directory = Path(call(server, tmp_path, "-c", LOCAL, "some/tiny").stdout.strip())
    assert [asked for name, asked in server.got if name == "model.safetensors"] == [None, f"bytes={CHUNK}-"]
    assert (directory / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_a_download_that_keeps_breaking_is_told_and_leaves_no_half_file(server, tmp_path, tiny):
    server.models["some/tiny"], server.cuts = tiny, {"model.safetensors": 99}
    result = call(server, tmp_path, "-c", LOCAL, "some/tiny")
    assert "error: the download of some/tiny broke off" in result.stdout and result.stdout.count("\n") == 1
    assert not list(tmp_path.rglob("model.safetensors"))
    server.cuts, done = {}, set(server.fetched()) - {"model.safetensors"}
    server.got.clear()
    directory = Path(call(server, tmp_path, "-c", LOCAL, "some/tiny").stdout.strip())
    assert (directory / "model.safetensors").read_bytes() == tiny["model.safetensors"]
    assert done and not done & set(server.fetched())                               # finished files are kept


@pytest.mark.slow
def test_ask_talks_to_a_model_of_the_hub(server, tmp_path, tiny):
    server.models["some/tiny"] = tiny
    result = call(server, tmp_path, ROOT / "eval.py", "ask", "--model", "some/tiny", "--max-tokens", "3",
                  "Where is the lion?")
    assert result.returncode == 0 and result.stdout.strip()
    refused = call(server, tmp_path, ROOT / "eval.py", "ask", "--model", "some/other", "hello")
    assert (refused.returncode == 2 and refused.stderr.startswith("error: some/other")
            and refused.stderr.count("\n") == 1)


def oasst_tree(number: str, prompt: str, response: str) -> dict:
    """A ready tree of one question and its only reply."""
    reply = {"message_id": "r" + number, "parent_id": number, "text": response, "role": "assistant",
             "lang": "en", "replies": []}
    return {"message_tree_id": number, "tree_state": "ready_for_export", "prompt": {
        "message_id": number, "text": prompt, "role": "prompter", "lang": "en", "review_result": True,
        "replies": [reply]}}


@pytest.mark.slow
def test_oasst1_is_a_data_file(server, tmp_path):
    name = hub.DATASETS["oasst1"][1]
    server.datasets["OpenAssistant/oasst1"] = {
        name: gzip.compress(json.dumps(oasst_tree("1", "Which?", "That.")).encode()), "other.gz": b""}
    result = call(server, tmp_path, ROOT / "data.py", "oasst1")
    assert "1 read, 1 kept" in result.stdout and server.fetched() == [name], result.stderr


@pytest.mark.slow
def test_a_whole_run_needs_nothing_but_names_of_the_hub(server, tmp_path):
    """Model, translator and data by their ids; the adapter names its base by the id, and PEFT's users find
    it there."""
    demo = ROOT / "demo"
    if not (demo / "m2m100").is_dir():
        pytest.skip("the demo's checkpoints are not built")
    for name in ("llama", "m2m100"):
        server.models[f"demo-owner/{name}"] = {path.name: path.read_bytes()
                                               for path in (demo / name).iterdir()}
    lines = (demo / "english.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    trees = [oasst_tree(str(i), **json.loads(line)["en"]) for i, line in enumerate(lines)]
    name = hub.DATASETS["oasst1"][1]
    server.datasets["OpenAssistant/oasst1"] = {
        name: gzip.compress("\n".join(map(json.dumps, trees)).encode())}
    result = call(server, tmp_path, ROOT / "clo.py", "--lang", "sw", "--model", "demo-owner/llama",
                  "--translator", "demo-owner/m2m100", "--data", "oasst1", "--turns", "all", "--out", "run",
                  "--beams", "1", "--epochs", "1", "--baseline", "none", "--max-new-tokens", "2",
                  "--keep-failed", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    adapter = json.loads((tmp_path / "run/clo/adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "demo-owner/llama"
    reply = call(server, tmp_path, ROOT / "eval.py", "ask", "--adapter", "run/clo/adapter",
                 "--max-tokens", "3", "Who?")
    assert reply.returncode == 0, reply.stderr


# ---- paths

@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """Another working directory, and a project of whose files some lie beside clo.py alone."""
    project = tmp_path / "project"
    write_checkpoint(project / "demo" / "llama")
    (project / "demo" / "english.jsonl").write_text("{}")
    (tmp_path / "cwd").mkdir()
    monkeypatch.setattr(hub, "ROOT", project)
    monkeypatch.chdir(tmp_path / "cwd")
    return project


def test_what_lies_here_comes_before_what_lies_beside_the_program(elsewhere):
    assert hub.model_directory("demo/llama") == elsewhere / "demo" / "llama"
    assert hub.data_file("demo/english.jsonl") == elsewhere / "demo" / "english.jsonl"
    write_checkpoint(Path("demo/llama"))
    assert hub.model_directory("demo/llama") == Path("demo/llama")
    assert hub.model_directory(elsewhere / "demo" / "llama") == elsewhere / "demo" / "llama"


def test_a_path_found_beside_the_program_is_said_unless_it_is_a_default(elsewhere, capsys):
    write_checkpoint(elsewhere / "runs" / "base")
    assert hub.model_directory("runs/base") == elsewhere / "runs" / "base"
    assert capsys.readouterr().out == f"runs/base: {elsewhere}/runs/base is taken, here there is none\n"
    hub.model_directory("demo/llama")
    assert not capsys.readouterr().out


@pytest.mark.parametrize("name", ["demo/lama", "llama", "/a/b", "./a/b", "../a", "a/b/c", "a/", "~/a",
                                  "demo/m2m100"])
def test_a_path_that_is_not_there_is_no_hub_id(elsewhere, name):
    assert not hub.is_id(name)
    with pytest.raises(InputError, match=f"^{re.escape(name)}: no such directory"):
        hub.model_directory(name)


def test_owner_and_name_are_a_hub_id_unless_there_is_such_a_directory(elsewhere):
    assert hub.is_id("Qwen/Qwen2.5-0.5B") and hub.is_id("meta-llama/Llama-3.2-1B")
    Path("Qwen").mkdir()
    assert not hub.is_id("Qwen/Qwen2.5-0.5B")
    Path("oasst1").write_text("{}")
    assert hub.data_file("oasst1") == Path("oasst1")


def write_run(directory: Path, methods=("clo", "sft")) -> None:
    """What a run with --merge leaves, as far as it matters for finding things."""
    write_json(directory / "config.json", {"flags": {}, "inputs": {}, "versions": {}})
    for method in methods:
        write_json(directory / method / "adapter" / "adapter_config.json", {"peft_type": "LORA"})
        write_json(directory / method / "model" / "config.json", {"model_type": "llama"})


def test_the_adapter_of_a_method_is_taken_and_that_is_said(elsewhere, capsys):
    write_run(Path("runs/sw"))
    assert hub.adapter_directory("runs/sw/clo") == hub.adapter_directory("runs/sw/clo/adapter")
    assert capsys.readouterr().out == "runs/sw/clo is no adapter, runs/sw/clo/adapter is one and is taken\n"


@pytest.mark.parametrize("find, name, told", [
    (hub.adapter_directory, "runs/sw", "no adapter: there is no adapter_config.json; did you mean "
     "--adapter runs/sw/clo/adapter or --adapter runs/sw/sft/adapter or --model"),
    (hub.adapter_directory, "runs/sw/clo/model", "no adapter: .*; did you mean --model runs/sw/clo/model[?]"),
    (hub.adapter_directory, "runs/sw/clo/adaptr", "no such directory.*; did you mean runs/sw/clo/adapter[?]"),
    (hub.model_directory, "runs/sw", "no model: there is no config.json with a model_type; did you mean --adapter"),
    (hub.model_directory, "runs/sw/clo/adapter", "no model: .*; did you mean --adapter runs/sw/clo/adapter[?]"),
    (hub.model_directory, "demo/lama", "no such directory.*; did you mean .*demo/llama[?]"),
    (hub.model_directory, "file", "is a file, a directory was expected"),
    (hub.adapter_directory, "nothing", "no such directory")])
def test_a_near_miss_gets_a_hint(elsewhere, find, name, told):
    write_run(Path("runs/sw"))
    write_checkpoint(Path("demo/llama"))
    Path("file").write_text("x")
    with pytest.raises(InputError, match=told) as error:
        find(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("recorded, where", [
    ("base", "cwd/base"), ("runs/base", "project/runs/base"), ("demo/llama", "project/demo/llama")])
def test_the_base_an_adapter_records_is_found_here_then_beside_the_program(elsewhere, recorded, where):
    directory = write_checkpoint(elsewhere.parent / where)
    write_json(Path("adapter/adapter_config.json"),
               {"peft_type": "LORA", "base_model_name_or_path": recorded})
    assert hub.model_directory(adapter_base(hub.adapter_directory("adapter"))).resolve() == directory


def test_the_program_runs_from_any_directory(tmp_path):
    """Its defaults lie beside it; eval.jsonl beside the data is found there too."""
    if not (ROOT / "demo" / "m2m100").is_dir():
        pytest.skip("the demo's checkpoints are not built")
    kept = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "clo.py"), "--lang", "sw"]
    result = subprocess.run([*command, "--dry-run", "--gpus", "1"], cwd=tmp_path, env=kept,
                            capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "demo/english.jsonl: " in result.stdout, result.stderr
    assert "demo/eval.jsonl: " in result.stdout and not list(tmp_path.iterdir())
    refused = subprocess.run([*command, "--model", "demo/lama"], cwd=tmp_path, env=kept, capture_output=True,
                             text=True, timeout=120)
    assert refused.returncode == 2 and refused.stderr.startswith("error: demo/lama: no such directory")
