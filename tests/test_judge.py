"""judge.py: alpaca_eval's arithmetic and coin, and a judge behind a real server on loopback
that misbehaves."""

import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import eval as evaluation
from engine.files import InputError, run
from evals import judge

ROOT = Path(__file__).parents[1]
KEY = "sk-do-not-show-this"


def completion(m=0.25, M=0.75, text="M", logprobs=True):
    """A chat completion whose first token is m or M with these probabilities."""
    top = [{"token": letter, "logprob": math.log(p)} for letter, p in (("m", m), ("M", M)) if p]
    choice = {"message": {"role": "assistant", "content": text}}
    if logprobs:
        choice["logprobs"] = {"content": [{"token": text, "logprob": -0.1, "top_logprobs": top}]}
    return {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 1}}


class Server(ThreadingHTTPServer):
    """Answers request i with script[i], the last entry for ever: a dict (a completion), an HTTP status,
    (status, headers), bytes (a body), or seconds to hang."""
    daemon_threads = True

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.lock = script, [], threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers), body))
            action = self.server.script[min(len(self.server.requests), len(self.server.script)) - 1]
        if callable(action):
            action = action(body)
        if isinstance(action, float):
            time.sleep(action)
            action = completion()
        status, headers = (action if isinstance(action, tuple) else
                           (action, {}) if isinstance(action, int) else (200, {}))
        raw = (action if isinstance(action, bytes) else
               json.dumps(action if isinstance(action, dict) else {"error": KEY}).encode())
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(*script):
        servers.append(Server(list(script)))
        return servers[-1]
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def endpoint(server, **options):
    return judge.Endpoint(server.url, KEY, "the-judge", **{"pause": 0.001, "timeout": 5.0} | options)


MESSAGES = [{"role": "user", "content": "m or M?"}]


# ------------------------------------------------------------------------------------------------- arithmetic

def test_win_rate_of_published_annotations_is_the_published_one(shared):
    annotations = json.loads(
        (shared / "benchmarks" / "alpaca_eval" / "text_davinci_003_annotations.json").read_text())
    rate = judge.win_rate(annotations)
    assert rate["win_rate"] == pytest.approx(1.9621476654161492, abs=1e-13)
    assert rate["standard_error"] == pytest.approx(0.4346747594, abs=1e-9)
    assert rate["n_total"] == 805


def test_win_rate_is_the_mean_of_preferences_with_draws_old_draws_and_gaps():
    values = [1, 2, 1.5, 0, 1.9, None, float("nan"), 1]
    rate = judge.win_rate([{"preference": value, "output_1": "abc", "output_2": "a"} for value in values])
    wins = [0, 1, 0.5, 0.5, 0.9, 0]
    assert rate["win_rate"] == pytest.approx(100 * statistics.mean(wins))
    assert rate["standard_error"] == pytest.approx(100 * statistics.stdev(wins) / math.sqrt(6))
    assert (rate["n_wins"], rate["n_wins_base"], rate["n_draws"], rate["no_preference"]) == (2, 2, 2, 2)
    assert (rate["discrete_win_rate"] == pytest.approx(50)
            and (rate["avg_length"], rate["avg_length_base"]) == (1, 3))


@pytest.mark.parametrize("value", [3, 0.5, "2", True, [], float("inf")])
def test_a_preference_that_is_none_is_refused(value):
    for fine in (1, 2, 1.5, 0, None, float("nan")):
        judge.check_preference(fine, "x:1")
    with pytest.raises(InputError, match="^x:1: the preference is"):
        judge.check_preference(value, "x:1")


def test_the_coin_is_alpaca_evals():
    coins = [judge.is_switched(f"instruction {i}", 0) for i in range(200)]
    assert 70 < sum(coins) < 130 and coins == [judge.is_switched(f"instruction {i}", 0) for i in range(200)]
    assert [judge.is_switched(text, 0) for text in (
        "What is the capital of France?", "Write a poem.", "a", "")] == [False, False, True, False]


def test_preference_is_from_probabilities_or_else_from_the_letter():
    assert judge.preference(completion(0.2, 0.6)) == pytest.approx(1.75)
    assert judge.preference(completion(0.0, 0.9)) == 2 and judge.preference(completion(0.9, 0.0)) == 1
    assert (judge.preference(completion(text="m", logprobs=False)) == 1
            and judge.preference(completion(text=" M.", logprobs=False)) == 2)


@pytest.mark.parametrize("reply", [
    {}, {"choices": []}, {"choices": [{"message": {"content": "both are fine"}}]}, {"choices": "m"},
    {"choices": [{"message": {"content": None}}]}, {"choices": [{"message": {"content": "more"}}]},
    {"choices": [{"message": {"content": "x"},
                  "logprobs": {"content": [{"top_logprobs": [{"token": 5}]}]}}]}])
def test_a_reply_without_a_verdict_is_no_verdict(reply):
    with pytest.raises(judge.Unreadable):
        judge.preference(reply)


# ----------------------------------------------------------------------------------------------------- server

def test_the_request_is_a_chat_completion_with_log_probs(serve):
    server = serve(completion())
    assert endpoint(server).verdict(MESSAGES) == (
        pytest.approx(1.75), {"prompt_tokens": 100, "completion_tokens": 1})
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body == {"model": "the-judge", "messages": MESSAGES, "max_tokens": 1, "temperature": 0,
                    "logprobs": True, "top_logprobs": 5}


@pytest.mark.parametrize("fault", [429, 500, 503, b"", b"<html>busy</html>", b"[1]", {"choices": []},
                                   b"\xff\xfe", 0.6, (429, {"Retry-After": "soon"})])
def test_a_passing_fault_is_tried_again(serve, fault):
    server = serve(fault, fault, completion())
    assert endpoint(server, timeout=0.2).verdict(MESSAGES)[0] == pytest.approx(1.75)
    assert len(server.requests) == 3


def test_a_server_may_say_how_long_to_wait(serve):
    server, began = serve((429, {"Retry-After": "1"}), completion()), time.monotonic()
    endpoint(server).verdict(MESSAGES)
    assert time.monotonic() - began >= 1


def test_waits_double_and_stay_bounded(serve):
    server = endpoint(serve(completion()), pause=1.0)
    for attempt in range(1, 12):
        assert (min(60, 0.75 * 2 ** (attempt - 1)) <= server.wait(attempt, "")
                <= min(60, 1.25 * 2 ** (attempt - 1)))


def test_a_lasting_fault_gives_no_verdict_after_the_attempts(serve):
    server = serve(500)
    with pytest.raises(judge.NoVerdict, match="^HTTP 500$"):
        endpoint(server, attempts=4).verdict(MESSAGES)
    assert len(server.requests) == 4


@pytest.mark.parametrize("status", [400, 401, 404, (302, {"Location": "http://127.0.0.1:1/elsewhere"})])
def test_a_refusal_ends_the_run_at_once_and_shows_no_key(serve, status):
    server = serve(status)
    with pytest.raises(InputError) as error:
        endpoint(server).verdict(MESSAGES)
    assert len(server.requests) == 1 and KEY not in str(error.value) and "127.0.0.1" not in str(error.value)


def test_a_dripping_server_and_an_endless_reply_are_left(serve):
    with pytest.raises(judge.NoVerdict, match="endless reply"):
        endpoint(serve(b" " * (judge.LONGEST_REPLY + 1)), attempts=1).verdict(MESSAGES)

    class Drip:
        def read1(self, _):
            time.sleep(0.02)
            return b" "
    with pytest.raises(TimeoutError):
        judge.read_until(Drip(), time.monotonic() + 0.1)


def test_a_dead_server_is_a_connection_fault(serve):
    server = serve(completion())
    server.shutdown()
    server.server_close()
    with pytest.raises(judge.NoVerdict, match="ConnectionRefusedError"):
        endpoint(server, attempts=2).verdict(MESSAGES)


# ------------------------------------------------------------------------------------------------- annotating

def fair_judge(body):
    """Prefers the answer that contains 'good', wherever it is shown."""
    first, second = (body["messages"][1]["content"].split(f"<answer_{letter}>\n")[1]
                     .split(f"\n</answer_{letter}>")[0] for letter in "mM")
    return completion(0.9 if "good" in first else 0.1, 0.9 if "good" in second else 0.1, "m")


def make_pairs(n):
    return [{"instruction": f"instruction {i}", "dataset": None, "output_1": "bad", "generator_1": "sft",
             "output_2": "good" if i % 4 else "bad", "generator_2": "clo"} for i in range(n)]


def test_the_order_shown_does_not_change_whose_win_it_is(serve):
    server = serve(fair_judge)
    for order, requests in (("random", 1), ("both", 2)):
        pairs, before = make_pairs(8), len(server.requests)
        found = {annotation["instruction"]: annotation
                 for _, annotation, _ in judge.annotate_all(pairs, endpoint(server), order, 0, "sw", 3)}
        assert len(server.requests) - before == 6 * requests
        for i, pair in enumerate(pairs):
            line = found[pair["instruction"]]
            assert line["preference"] == (pytest.approx(1.9) if i % 4 else 1.5)
            assert line["prompt_tokens"] == (100 * requests if i % 4 else 0)
    shown_first = ["<answer_m>\ngood" in body["messages"][1]["content"] for _, _, body in server.requests[:6]]
    assert 0 < sum(shown_first) < 6


def test_the_prompt_names_the_language_and_calls_a_wrong_one_a_fault():
    text = judge.messages("Swali?", "jibu", "answer", "sw")[1]["content"]
    assert "(sw)" in text and "wrong language" in text and "mixing languages" in text
    assert text.index("jibu") < text.index("answer\n")


def test_braces_in_answers_are_text():
    assert "{first} {x}" in judge.messages("{second}", "{first} {x}", "b", "")[1]["content"]


def test_an_endpoint_that_is_gone_stops_the_run_with_one_line(serve):
    with pytest.raises(InputError, match="in a row .HTTP 500."):
        list(judge.annotate_all(make_pairs(40), endpoint(serve(500), attempts=1), "random", 0, "", 2))


# ------------------------------------------------------------------------------------------------------ files

def write_outputs(path, answers, generator):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{"instruction": key, "output": value, "generator": generator}
                                for key, value in answers.items()]))
    return path


def test_answers_are_joined_on_the_exact_instruction(tmp_path, capsys):
    model = write_outputs(tmp_path / "a.json", {"x": "1", "y ": "2", "z": "3"}, "clo")
    reference = write_outputs(tmp_path / "b.json", {"z": "4", "y": "5", "x": "6"}, "sft")
    pairs = judge.pair_outputs(model, reference)
    assert [(pair["instruction"], pair["output_1"], pair["output_2"]) for pair in pairs] == [
        ("x", "6", "1"), ("z", "4", "3")]
    assert "2 instructions are in both files" in capsys.readouterr().out


@pytest.mark.parametrize("text, wanted", [
    ('[{"instruction": "x"}]', r'a.json\[0\]: "output" is missing'),
    ("[]", "holds no answers"), ("{", "a.json:1: not valid JSON"),
    ('[{"instruction": "x", "output": "1"}, {"instruction": "x", "output": "2"}]',
     r"a.json\[1\]: the same instruction as in .*a.json\[0\]"),
    ('[{"instruction": "x", "output": null}]', r"a.json\[0\]: str expected")])
def test_a_bad_file_of_answers_is_one_clear_line(tmp_path, text, wanted):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=wanted):
        judge.read_outputs(tmp_path / "a.json")


def call(server, tmp_path, *arguments):
    environment = os.environ | {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": KEY}
    return subprocess.run([sys.executable, str(ROOT / "eval.py"), "judge",
                           str(tmp_path / "clo" / "model_outputs.json"),
                           str(tmp_path / "sft" / "model_outputs.json"), "--pause", "0.001", *arguments],
                          env=environment, cwd=tmp_path, capture_output=True, text=True)


@pytest.mark.slow
def test_judging_from_the_command_line_resumes_counts_tokens_and_writes_alpaca_evals_format(serve, tmp_path):
    answers = {f"instruction {i}": "good" if i % 4 else "bad" for i in range(8)}
    write_outputs(tmp_path / "clo" / "model_outputs.json", answers, "clo")
    write_outputs(tmp_path / "sft" / "model_outputs.json", dict.fromkeys(answers, "bad"), "sft")
    broken = serve(fair_judge, fair_judge, 500)
    first = call(broken, tmp_path, "--attempts", "2", "--parallel", "1", "--lang", "sw")
    assert first.returncode == 0 and "4 pairs have no verdict (4 HTTP 500)" in first.stdout
    healthy = serve(fair_judge)
    second = call(healthy, tmp_path, "--lang", "sw", "--price-in", "10", "--price-out", "30")
    assert second.returncode == 0, second.stderr
    assert len(healthy.requests) == 4                                # 6 need asking, 2 were done before
    error = statistics.stdev([90] * 6 + [50] * 2) / math.sqrt(8)
    assert f"win rate 80.00 ± {error:.2f} %" in second.stdout
    out = tmp_path / "clo" / "against-sft"
    annotations = json.loads((out / "annotations.json").read_text())
    assert [line["instruction"] for line in annotations] == list(answers)
    assert set(annotations[0]) == {"dataset", "instruction", "output_1", "generator_1", "output_2",
                                   "generator_2", "annotator", "preference"}
    result = json.loads((out / "result.json").read_text())
    assert (result["tokens"] == {"read": 600, "written": 6}
            and result["cost_usd"] == pytest.approx((6000 + 180) / 1e6))
    assert result["settings"]["order"] == "random" and result["settings"]["judge"] == "gpt-4o"
    for told in (first.stdout, first.stderr, second.stdout, second.stderr,
                 *(path.read_text() for path in out.iterdir())):
        assert KEY not in told and "127.0.0.1" not in told


@pytest.mark.parametrize("key", ["sk-a\nb", "sk-\u00e4", "sk-\x7f"])
def test_a_key_no_header_can_hold_is_refused_unshown_and_spaces_around_one_do_not_count(key, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert (judge.endpoint_from_environment("m").key == KEY
            and KEY not in repr(judge.endpoint_from_environment("m")))
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="OPENAI_API_KEY holds") as error:
        judge.endpoint_from_environment("m")
    assert "sk-" not in str(error.value)


def test_without_key_or_server_the_judge_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    paths = [str(write_outputs(tmp_path / name / "model_outputs.json", {"x": name}, name))
             for name in ("clo", "sft")]
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as ended:
        run(lambda: evaluation.main(["judge", *paths]))
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("error: OPENAI_API_KEY") and told.count("\n") == 1
