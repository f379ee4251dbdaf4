"""judge.py and winrate.py: alpaca_eval's arithmetic and coin, and a judge behind a real server on loopback
that misbehaves."""

import asyncio
import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import eval as evaluation
from engine.files import InputError, run, write_jsonl
from evals import judge, winrate
from evals.verdict import named_letter, read_verdict

ROOT = Path(__file__).parents[1]
KEY = "sk-do-not-show-this"


def completion(m=0.25, M=0.75, text="M", logprobs=True, ended="stop", **message):
    """A chat completion whose first token is m or M with these probabilities."""
    top = [{"token": letter, "logprob": math.log(p)} for letter, p in (("m", m), ("M", M)) if p]
    choice = {"index": 0, "finish_reason": ended,
              "message": {"role": "assistant", "content": text, **message}}
    if logprobs:
        chosen = math.log(max({"m": m, "M": M}.get(text, 1.0), 1e-30))
        choice["logprobs"] = {"content": [{"token": text, "logprob": chosen, "top_logprobs": top}]}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "the-judge", "choices": [choice],
            "usage": {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}}


def said(text, **options):
    """A completion that is nothing but text."""
    return completion(text=text, logprobs=False, **options)


class Server(ThreadingHTTPServer):
    """Answers request i with script[i], the last entry for ever: a dict (a completion), an HTTP status,
    (status, body), bytes (a body), seconds to hang, or a function from the request to one of these."""
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
            self.server.requests.append((self.path, self.headers, body))
            action = self.server.script[min(len(self.server.requests), len(self.server.script)) - 1]
        if callable(action):
            action = action(body)
        if isinstance(action, float):
            time.sleep(action)
            action = completion()
        status, reply = (action if isinstance(action, tuple) else
                         (action, {"error": {"message": f"no, {KEY}"}}) if isinstance(action, int) else
                         (200, action))
        raw = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Retry-After-Ms", "1")
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


@pytest.fixture
def connect(monkeypatch):
    """connect(server, ...): the judge behind it."""
    pytest.importorskip("openai")

    def connect(server, tokens=1, timeout=5.0, attempts=3):
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        return judge.connect("the-judge", tokens, timeout, attempts)
    return connect


MESSAGES = [{"role": "user", "content": "m or M?"}]


def verdict(asked):
    async def once():
        try:
            return await asked.verdict(MESSAGES)
        finally:
            await asked.client.close()
    return asyncio.run(once())


# ------------------------------------------------------------------------------------------------- arithmetic

def test_win_rate_of_published_annotations_is_the_published_one(shared):
    annotations = json.loads(
        (shared / "benchmarks" / "alpaca_eval" / "text_davinci_003_annotations.json").read_text())
    rate = winrate.win_rate(annotations)
    assert rate["win_rate"] == pytest.approx(1.9621476654161492, abs=1e-13)
    assert rate["standard_error"] == pytest.approx(0.4346747594, abs=1e-9)
    assert rate["n_total"] == 805


def test_win_rate_is_the_mean_of_preferences_with_draws_old_draws_and_gaps():
    values = [1, 2, 1.5, 0, 1.9, None, float("nan"), 1]
    rate = winrate.win_rate([{"preference": value, "output_1": "abc", "output_2": "a"} for value in values])
    wins = [0, 1, 0.5, 0.5, 0.9, 0]
    assert rate["win_rate"] == pytest.approx(100 * statistics.mean(wins))
    assert rate["standard_error"] == pytest.approx(100 * statistics.stdev(wins) / math.sqrt(6))
    assert (rate["n_wins"], rate["n_wins_base"], rate["n_draws"], rate["no_preference"]) == (2, 2, 2, 2)
    assert (rate["discrete_win_rate"] == pytest.approx(50)
            and (rate["avg_length"], rate["avg_length_base"]) == (1, 3))


@pytest.mark.parametrize("value", [3, 0.5, "2", True, [], float("inf")])
def test_a_preference_that_is_none_is_refused(value, tmp_path):
    path = tmp_path / "x.jsonl"
    fine = (1, 2, 1.5, 0, None, float("nan"))
    lines = [{"preference": preference, "output_1": "", "output_2": ""} for preference in fine]
    write_jsonl(path, lines)
    assert len(winrate.read_annotations(path)) == len(lines)
    write_jsonl(path, [*lines, lines[0] | {"preference": value}])
    with pytest.raises(InputError, match="x.jsonl:7: the preference is"):
        winrate.read_annotations(path)


def test_a_file_that_holds_a_question_twice_is_of_two_systems(tmp_path):
    line = {"instruction": "i", "preference": 2, "output_1": "", "output_2": "", "generator_2": "a"}
    write_jsonl(tmp_path / "x.jsonl", [line, line | {"generator_2": "b", "preference": 1}])
    with pytest.raises(InputError, match="x.jsonl:2: the same identifier as in .*x.jsonl:1: 'i'"):
        winrate.read_annotations(tmp_path / "x.jsonl")


def test_the_coin_is_alpaca_evals():
    coins = [judge.is_switched(f"instruction {i}", 0) for i in range(200)]
    assert 70 < sum(coins) < 130 and coins == [judge.is_switched(f"instruction {i}", 0) for i in range(200)]
    assert [judge.is_switched(text, 0) for text in (
        "What is the capital of France?", "Write a poem.", "a", "")] == [False, False, True, False]


def test_a_rate_over_some_of_the_pairs_says_how_many_have_no_verdict():
    pairs = [{"preference": value, "output_1": "", "output_2": ""} for value in (2, None, 1, float("nan"))]
    told = winrate.describe_rate(winrate.win_rate(pairs))
    assert "n = 2 of 4 pairs, 2 without a verdict" in told
    assert "without" not in winrate.describe_rate(winrate.win_rate(pairs[::2]))


# ---------------------------------------------------------------------------------------------------- reading

def read(reply):
    """read_verdict of a reply as openai gives it."""
    types = pytest.importorskip("openai.types.chat")
    return read_verdict(types.ChatCompletion.construct(**reply))


def test_a_preference_is_the_share_of_the_two_letters_probabilities():
    for m, M in ((0.2, 0.6), (0.0, 0.9), (0.9, 0.0), (0.3, 0.3), (0.51, 0.001)):
        assert read(completion(m, M, ended="length")) == (pytest.approx(2 - m / (m + M)), "probabilities")
    both = completion()
    both["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = [
        {"token": token, "logprob": math.log(p)} for token, p in ((" M", 0.2), ("M", 0.3), ("m\n", 0.1))]
    assert read(both)[0] == pytest.approx(2 - 0.1 / 0.6)
    both["choices"][0]["logprobs"]["content"] = [{"token": "m", "logprob": -0.1, "top_logprobs": []}]
    assert read(both) == (1.0, "probabilities")


@pytest.mark.parametrize("text, letter", [
    ("m", 1), (" M.", 2), ("**M**", 2), ("`m`", 1), ('"M"', 2), ("\nM", 2), ("Answer: M", 2), ("(m)", 1),
    ("<think>m is good, m is fine, but</think>M", 2), ("<think>M? no.</think>\n\n**m**", 1),
    ("<seed:think>M</seed:think>m", 1), ("<reasoning>M M</reasoning> m", 1), ("[THINK]M[/THINK]m", 1),
    ("<think>a</think>M<think>b</think>m", 1),
    ("<|channel|>analysis<|message|>M is longer<|end|><|start|>assistant<|channel|>final<|message|>m", 1),
    ("m answers in English, M in Swahili.\nFinal answer: M", 2),
    ("I weighed m and M. Final verdict: **m**.", 1),
    ("M\n\nm mixes two languages.", 2), ("**m**. M is in the wrong language.", 1), ("The answer is M", 2),
    ("Both are fine. Answer: answer_M", 2), ("answer_m", 1), ("I'm sure: m's text is fine. Verdict: M", 2),
    ("The bridge is 300 m long, so M", 2), ('{"reason": "m is short", "answer": "M"}', 2),
    ('{"answer": "M"}', 2), ("\\boxed{M}", 2), ("答案是M。", 2), ("答案：m", 1),
    ("M is better than m", None), ("Either m or M.", None), ("both are fine", None), ("", None),
    ("I'm", None), ("'M'", 2), ("The better answer is _m_.", 1), ("M is right. It is not short.", 2),
    ("Not M.", None), ("M is worse.", None), ("The worse answer is M.", None), ("It's not m.", None),
    ("m is wrong, mixes languages.", None), ("M loses", None), ("m isn't in Swahili", None),
    ("anything but M", None), ("Avoid M.", None), ("Answer: not M", None),
    ("m does not answer in Swahili, so the answer is M.", 2), ("Answer: M, since it isn't mixing languages.", 2),
    ('{"reason": "m is not in Swahili", "answer": "M"}', 2), ("Answer: M (no errors)", 2), ("m is wrong: M", 2),
    ("Since m is incorrect, the best output is M", 2), ("A resposta no idioma certo é M.", 2),
    ("M is better because the other one does not answer the question.", 2), ("M, no doubt.", 2),
    ("Neither is perfect, but the better one is M.", 2),
    ("<think>m is", None), ("[THINK]M", None), ("<|channel|>analysis<|message|>m", None),
    ("m/M", None), ("more", None), ("Mm", None), ("M&M's", None), ("em tudo ém", None)])
def test_a_text_names_a_letter_after_its_reasoning_or_none(text, letter):
    named = named_letter(text)
    assert named == (None if letter is None else " mM"[letter])
    if letter:
        assert read(said(text)) == (letter, "text")


@pytest.mark.parametrize("token", ["<think>", "\n", " ", '"', "Answer", "**", "Okay", "M1", "mm"])
def test_a_first_token_that_is_no_letter_is_no_verdict_whatever_the_rest_of_the_probability(token):
    reply = completion(0.0, 1e-6, token, ended="length")
    reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"].append({"token": token, "logprob": -0.001})
    with pytest.raises(judge.NoVerdict, match="reply cut"):
        read(reply)


def test_a_letter_of_less_than_half_the_probability_is_read_only_from_a_whole_reply():
    with pytest.raises(judge.NoVerdict, match="reply cut"):
        read(completion(0.1, 0.3, "M", ended="length"))
    assert read(completion(0.1, 0.3, "M")) == (2.0, "text")
    assert read(said("M", ended="length")) == (2.0, "text")                 # all that some servers give
    with pytest.raises(judge.NoVerdict, match="reply cut"):
        read(said("I think that m", ended="length"))


@pytest.mark.parametrize("reply", [
    {}, {"choices": []}, {"choices": "m"}, {"choices": [{}]}, {"choices": [{"message": {}}]},
    {"choices": [{"message": {"content": 5}}]}, said("both are fine"), said(None), said("more"),
    {"choices": [{"message": {"content": "x"},
                  "logprobs": {"content": [{"top_logprobs": [{"token": 5}]}]}}]}])
def test_a_reply_without_a_verdict_is_none(reply):
    with pytest.raises(judge.NoVerdict):
        read(reply)


def test_refusals_parts_and_thoughts_beside_the_reply():
    for reply in (said(None, refusal="I won't"), said("", ended="content_filter")):
        with pytest.raises(judge.NoVerdict, match="refusal"):
            read(reply)
    assert read(said("m", reasoning_content="M, surely M")) == (1.0, "text")
    assert read(said([{"type": "thinking", "thinking": "M"}, {"type": "text", "text": "m"}])) == (1.0, "text")
    odd = completion(0.3, 0.3)
    odd["choices"][0]["logprobs"]["content"][0]["top_logprobs"].append({"token": "M ", "logprob": None})
    assert read(odd)[0] == pytest.approx(1.5)


# ----------------------------------------------------------------------------------------------------- server

def test_the_request_is_a_chat_completion_with_log_probs(serve, connect):
    server = serve(completion())
    assert verdict(connect(server)) == (
        pytest.approx(1.75), "probabilities", {"prompt_tokens": 100, "completion_tokens": 1})
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body == {"model": "the-judge", "messages": MESSAGES, "max_tokens": 1, "temperature": 0,
                    "logprobs": True, "top_logprobs": 5}


def test_a_server_of_ones_own_needs_no_key(serve, connect, monkeypatch):
    asked = connect(serve(completion()))
    monkeypatch.delenv("OPENAI_API_KEY")
    assert verdict(judge.connect("the-judge", 1, 5.0, 1))[0] == pytest.approx(1.75)
    assert KEY not in repr(asked)


@pytest.mark.parametrize("fault", [429, 500, 503])
def test_a_passing_fault_is_tried_again(serve, connect, fault):
    server = serve(fault, fault, completion())
    assert verdict(connect(server))[0] == pytest.approx(1.75) and len(server.requests) == 3


@pytest.mark.parametrize("fault, told", [
    (500, "HTTP 500"), (400, "HTTP 400"), (401, "HTTP 401"), (b"", "no chat"),
    (b"<html>busy</html>", "no chat"),
    (b"[1]", "no chat"), (b"\xff\xfe", "no chat"), (b"null", "no chat"), ({"choices": []}, "no chat"),
    (b"[" * 100_000, "no chat"), ({"error": {"message": f"no credit: {KEY}"}}, "no chat"),
    (said(f"I see {KEY}, \ud83d"), "no verdict"), (0.6, "no connection")])
def test_a_lasting_fault_gives_no_verdict_and_shows_no_key(serve, connect, fault, told):
    with pytest.raises(judge.NoVerdict, match=told) as error:
        verdict(connect(serve(fault), timeout=0.2 if fault == 0.6 else 30.0, attempts=1))
    message = error.value.message
    assert KEY not in message and "127.0.0.1" not in message and message.encode() and "\n" not in message


def test_an_error_inside_a_good_status_is_shown_in_the_servers_words(serve, connect):
    with pytest.raises(judge.NoVerdict) as error:
        verdict(connect(serve({"error": {"message": "insufficient credits", "code": 402}})))
    assert error.value.message == "{'message': 'insufficient credits', 'code': 402}"


@pytest.mark.parametrize("text", ["Many thanks, both are fine.", "may be equal", "M1 and M2"])
def test_a_first_token_that_begins_another_word_is_no_verdict(text):
    with pytest.raises(judge.NoVerdict):
        reply = completion(0.0, 0.0, text)
        reply["choices"][0]["logprobs"]["content"][0] = {"token": text[0], "logprob": -0.01, "top_logprobs": []}
        read(reply)


@pytest.mark.parametrize("body, told", [
    ({"error": {"message": "flagged\n by policy", "code": "content_filter"}}, "flagged by policy"),
    ({"error": "flagged by policy"}, "flagged by policy"),
    ({"message": "flagged by policy"}, "flagged by policy"),
    ({"detail": [{"msg": "flagged by policy"}]}, "flagged by policy"),
    (b"flagged by policy", "flagged by policy"),
    ({"object": "error", "message": "flagged by policy", "code": 400}, "flagged by policy")])
def test_a_refused_pair_keeps_the_servers_own_words(serve, connect, body, told):
    with pytest.raises(judge.NoVerdict, match="^HTTP 400") as error:
        verdict(connect(serve((400, body))))
    assert told in error.value.message and error.value.about_one_pair


def test_a_dripping_server_is_left(serve, connect):
    asked = connect(serve(5.0))
    asked.deadline, began = 0.2, time.monotonic()
    with pytest.raises(judge.NoVerdict, match="no connection"):
        verdict(asked)
    assert time.monotonic() - began < 3


def test_a_dead_server_is_a_connection_fault(serve, connect):
    server = serve(completion())
    server.shutdown()
    server.server_close()
    with pytest.raises(judge.NoVerdict, match="no connection") as error:
        verdict(connect(server, attempts=1))
    assert not error.value.about_one_pair and error.value.message


def test_a_judge_that_reasons_is_asked_again_with_room(serve, connect):
    def reasons(body):
        if body["max_tokens"] == 1:
            return completion(0.0, 1e-6, "<think>", ended="length")
        return completion(0.0, 1e-6, "<think>M is longer, yet m is right.</think>\n\nm")
    server = serve(reasons)
    assert verdict(connect(server)) == (1.0, "text", {"prompt_tokens": 200, "completion_tokens": 2})
    assert [body["max_tokens"] for _, _, body in server.requests] == [1, judge.ROOM]
    verdict(connect(server, tokens=judge.ROOM))
    assert len(server.requests) == 3


@pytest.mark.parametrize("thought", ["reasoning_content", "reasoning"])
def test_thoughts_in_a_field_of_their_own_are_ignored(serve, connect, thought):
    server = serve(said(None, ended="length", **{thought: "M"}), said("m", **{thought: "M. M!"}))
    assert verdict(connect(server))[:2] == (1.0, "text")


def refuse(*names, status=400, word="Unsupported parameter: '{}' is not supported with this model."):
    """A server that takes none of these options."""
    def answer(body):
        for name in names:
            if name in body:
                return status, {"error": {"message": word.format(name), "param": None}}
        return completion() if "logprobs" in body else said("m")
    return answer


@pytest.mark.parametrize("names, left", [
    (("logprobs",), {"max_tokens", "temperature"}), (("top_logprobs",), {"max_tokens", "temperature"}),
    (("max_tokens",), {"max_completion_tokens", "temperature", "logprobs", "top_logprobs"}),
    (("temperature",), {"max_tokens", "logprobs", "top_logprobs"}),
    (("max_tokens", "max_completion_tokens", "logprobs", "temperature"), set())])
def test_an_option_that_the_server_refuses_is_left_out_once_and_for_all(serve, connect, names, left):
    server = serve(refuse(*names))
    asked = connect(server)

    async def thrice():
        return [(await asked.verdict(MESSAGES))[0] for _ in range(3)]
    found = asyncio.run(thrice())
    assert found == [pytest.approx(1.75 if "logprobs" in left else 1.0)] * 3
    assert set(server.requests[-1][2]) == left | {"model", "messages"} and asked.refused == set(names)
    assert len(server.requests) == 3 + len(names)


@pytest.mark.parametrize("status, word", [
    (400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead. ({})"),
    (403, "You are not allowed to request {} from this model."), (422, "body.{}: extra fields not permitted"),
    (400, "Could not finish the message because {} or model output limit was reached.")])
def test_servers_refuse_options_in_their_own_words(serve, connect, status, word):
    name = "max_tokens" if "max" in word or "output" in word else "logprobs"
    assert verdict(connect(serve(refuse(name, status=status, word=word))))[0] in (1.0, pytest.approx(1.75))


def test_a_filter_that_speaks_of_the_options_changes_nothing_for_other_pairs(serve, connect):
    server = serve((400, {"error": {"message": "we filter temperature and logprobs of max_tokens"}}))
    asked = connect(server)
    with pytest.raises(judge.NoVerdict, match="HTTP 400"):
        verdict(asked)
    assert not asked.refused and len(server.requests) <= 4


# ------------------------------------------------------------------------------------------------- annotating

def fair_judge(body):
    """Prefers the answer that contains 'good', wherever it is shown."""
    first, second = (body["messages"][1]["content"].split(f"<answer_{letter}>\n")[1]
                     .split(f"\n</answer_{letter}>")[0] for letter in "mM")
    return completion(0.9 if "good" in first else 0.1, 0.9 if "good" in second else 0.1, "m")


def make_pairs(n):
    return [{"instruction": f"instruction {i}", "dataset": None, "output_1": "bad", "generator_1": "sft",
             "output_2": "good" if i % 4 else "bad", "generator_2": "clo"} for i in range(n)]


def annotate(pairs, asked, order="random", parallel=3, known=False):
    asked = replace(asked, order=order, language="sw", parallel=parallel)

    async def collect():
        return {pair["instruction"]: found async for pair, found in judge.annotate_all(pairs, asked, known)}
    return asyncio.run(collect())


def test_the_order_shown_does_not_change_whose_win_it_is(serve, connect):
    server = serve(fair_judge)
    for order, requests in (("random", 1), ("both", 2)):
        pairs, before = make_pairs(8), len(server.requests)
        found = annotate(pairs, connect(server), order)
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


@pytest.mark.parametrize("status", [400, 401, 404, 500])
def test_the_run_stops_when_the_first_pairs_all_fail_with_the_servers_message(serve, connect, status):
    server = serve(status)
    with pytest.raises(InputError, match=f"no verdict on the first 5 pairs: HTTP {status}: no, ") as error:
        annotate(make_pairs(40), connect(server, attempts=1), parallel=2)
    assert KEY not in str(error.value) and "\n" not in str(error.value) and len(server.requests) <= 12


def test_a_pair_that_is_refused_does_not_stop_the_others(serve, connect):
    def filter(body):
        number = int(re.search(r"instruction (\d+)", body["messages"][1]["content"])[1])
        return (400, {"error": {"message": "content management policy"}}) if number % 3 else fair_judge(body)
    pairs = make_pairs(12)
    found = annotate(pairs, connect(serve(filter)), parallel=1)
    assert Counter(isinstance(line, judge.NoVerdict) for line in found.values()) == {True: 6, False: 6}
    assert {line.message for line in found.values() if isinstance(line, judge.NoVerdict)} == {
        "content management policy"}


def test_fast_refusals_do_not_outrun_the_first_pairs(serve, connect):
    def filter(body):
        if "instruction 1\n" in body["messages"][1]["content"]:
            return 0.5                                       # seconds; then a verdict
        return 400
    found = annotate(make_pairs(16), connect(serve(filter)), parallel=2)
    assert sum(isinstance(line, judge.NoVerdict) for line in found.values()) == 11


def test_pairs_refused_in_an_earlier_run_are_refused_again_and_a_dead_server_still_stops(serve, connect):
    found = annotate(make_pairs(12), connect(serve(400)), known=True)
    assert sum(isinstance(line, judge.NoVerdict) for line in found.values()) == 9
    with pytest.raises(InputError, match="HTTP 401"):
        annotate(make_pairs(12), connect(serve(401)), known=True)


# ------------------------------------------------------------------------------------------------------ files

def write_outputs(path, answers, generator):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{"instruction": key, "output": value, "generator": generator}
                                for key, value in answers.items()]))
    return path


def test_answers_are_joined_on_the_exact_instruction(tmp_path, capsys):
    model = write_outputs(tmp_path / "a.json", {"x": "1", "y ": "2", "z": "3"}, "clo")
    reference = write_outputs(tmp_path / "b.json", {"z": "4", "y": "5", "x": "6"}, "sft")
    pairs = winrate.pair_outputs(model, reference)
    assert [(pair["instruction"], pair["output_1"], pair["output_2"]) for pair in pairs] == [
        ("x", "6", "1"), ("z", "4", "3")]
    assert "2 instructions are in both files" in capsys.readouterr().out


@pytest.mark.parametrize("text, wanted", [
    ('[{"instruction": "x"}]', r'a.json\[0\]: "output" is missing'),
    ("[]", "holds no answers"), ("{", "a.json:1: not valid JSON"),
    ('[{"instruction": "x", "output": "1"}, {"instruction": "x", "output": "2"}]',
     r"a.json\[1\]: the same identifier as in .*a.json\[0\]"),
    (r'[{"instruction": "x", "output": "\ud800"}]', r"a.json\[0\]: broken Unicode"),
    ('[{"instruction": "x", "output": null}]', r"a.json\[0\]: output: str expected")])
def test_a_bad_file_of_answers_is_one_clear_line(tmp_path, text, wanted):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=wanted):
        winrate.read_outputs(tmp_path / "a.json")


def test_settings_beside_the_answers_that_are_none_are_one_clear_line(tmp_path):
    path = write_outputs(tmp_path / "a.json", {"x": "1"}, "clo")
    (tmp_path / "result.json").write_text('{"settings": 5}')
    with pytest.raises(InputError, match="result.json: settings: dict expected, found int"):
        winrate.answer_settings(path, path)


def call(server, tmp_path, *arguments):
    environment = os.environ | {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": KEY}
    return subprocess.run([sys.executable, str(ROOT / "eval.py"), "judge",
                           str(tmp_path / "clo" / "model_outputs.json"),
                           str(tmp_path / "sft" / "model_outputs.json"), *arguments],
                          env=environment, cwd=tmp_path, capture_output=True, text=True)


@pytest.mark.slow
def test_judging_from_the_command_line_resumes_counts_tokens_and_writes_alpaca_evals_format(serve, tmp_path):
    pytest.importorskip("openai")
    answers = {f"instruction {i}": "good" if i % 4 else "bad" for i in range(8)}
    write_outputs(tmp_path / "clo" / "model_outputs.json", answers, "clo")
    write_outputs(tmp_path / "sft" / "model_outputs.json", dict.fromkeys(answers, "bad"), "sft")
    out = tmp_path / "clo" / "against-sft"
    broken = serve(fair_judge, fair_judge, 500)
    first = call(broken, tmp_path, "--attempts", "2", "--parallel", "1", "--lang", "sw")
    assert first.returncode == 0, first.stderr
    assert "4 of 8 pairs have no verdict" in first.stdout and "  4 HTTP 500: no, ***" in first.stdout
    assert "n = 4 of 8 pairs, 4 without a verdict" in first.stdout
    annotations = json.loads((out / "annotations.json").read_text())
    assert sum(line["preference"] is None for line in annotations) == 4
    healthy = serve(fair_judge)
    second = call(healthy, tmp_path, "--lang", "sw", "--price-in", "10", "--price-out", "30")
    assert second.returncode == 0, second.stderr
    assert len(healthy.requests) == 4                                # 6 need asking, 2 were done before
    error = statistics.stdev([90] * 6 + [50] * 2) / math.sqrt(8)
    assert f"win rate 80.00 ± {error:.2f} %" in second.stdout
    annotations = json.loads((out / "annotations.json").read_text())
    assert [line["instruction"] for line in annotations] == list(answers)
    assert set(annotations[0]) == {"dataset", "instruction", "output_1", "generator_1", "output_2",
                                   "generator_2", "annotator", "preference"}
    result = json.loads((out / "result.json").read_text())
    assert (result["tokens"] == {"read": 600, "written": 6}
            and result["cost_usd"] == pytest.approx((6000 + 180) / 1e6))
    assert result["settings"]["order"] == "random" and result["settings"]["judge"] == "gpt-4o"
    assert result["readings"] == {"probabilities": 6, "equal answers": 2}
    for told in (first.stdout, first.stderr, second.stdout, second.stderr,
                 *(path.read_text() for path in out.iterdir())):
        assert KEY not in told and "127.0.0.1" not in told


def judged(server, tmp_path, monkeypatch, n=8, **options):
    """The judge command, in this process, over n pairs of which a quarter are equal."""
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    answers = {f"instruction {i}": "good" if i % 4 else "bad" for i in range(n)}
    paths = [write_outputs(tmp_path / name / "model_outputs.json", found, name) for name, found in (
        ("clo", answers), ("sft", dict.fromkeys(answers, "bad")))]
    evaluation.main(["judge", *map(str, paths), "--parallel", "1"])
    return json.loads((tmp_path / "clo" / "against-sft" / "result.json").read_text())


def test_refused_pairs_are_counted_again_in_every_rerun_and_the_win_rate_stands(
        serve, tmp_path, monkeypatch, capsys):
    def filter(body):
        return fair_judge(body) if "instruction 3" in body["messages"][1]["content"] else 400
    first, second = (judged(serve(filter), tmp_path, monkeypatch) for _ in range(2))
    assert first == second and first["failed"] == {"HTTP 400": 5}
    assert first["win_rate"]["n_total"] == 3 and first["win_rate"]["no_preference"] == 5
    assert capsys.readouterr().out.count("5 of 8 pairs have no verdict") == 2


@pytest.mark.parametrize("arguments, wanted", [
    (["clo/model_outputs.json", "sft/model_outputs.json"], "clo/against-sft"),
    (["clo/model_outputs.json", "results/davinci.json"], "clo/against-davinci"),
    (["results/a.json", "results/b.json"], "results/a-against-b"),
    (["results/a.json", "results/c.json", "--limit", "5", "--seed", "2"], "results/a-against-c-seed-2-first-5"),
    (["a.json", "b.json", "--order", "both", "--judge-model", "x/y"], "a-against-b-x-y-both")])
def test_every_pair_of_files_and_every_setting_has_a_directory_of_its_own(
        arguments, wanted, serve, tmp_path, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", serve(completion()).url)
    for path in arguments[:2]:
        write_outputs(tmp_path / path, {"instruction": path}, "x")
    evaluation.main(["judge", *arguments])
    assert (tmp_path / wanted / "result.json").is_file()


def test_draws_of_equal_answers_do_not_prove_that_the_judge_answers(serve, tmp_path, monkeypatch):
    for _ in range(2):
        with pytest.raises(InputError, match="no verdict on the first 5 pairs: HTTP 400"):
            judged(serve(400), tmp_path, monkeypatch)


def test_options_the_server_refused_are_said_and_recorded(serve, tmp_path, monkeypatch, capsys):
    result = judged(serve(refuse("logprobs", "max_tokens")), tmp_path, monkeypatch)
    assert result["refused options"] == ["logprobs", "max_tokens", "top_logprobs"][:2]
    assert "does not take logprobs, max_tokens: asked without" in capsys.readouterr().out
    assert result["readings"]["text"] == 6


def test_judging_without_openai_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(SystemExit) as ended:
        run(lambda: evaluation.main(["judge", "none.json", "none.json"]))
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "pip install openai" in told and told.count("\n") == 1


@pytest.mark.parametrize("key", ["sk-a\nb", "sk-\u00e4", "sk-\x7f"])
def test_a_key_no_header_can_hold_is_refused_unshown_and_spaces_around_one_do_not_count(key, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    asked = judge.connect("m", 1, 1.0, 1)
    assert asked.client.api_key == KEY and KEY not in repr(asked)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="OPENAI_API_KEY holds") as error:
        judge.connect("m", 1, 1.0, 1)
    assert "sk-" not in str(error.value)


def test_without_key_or_server_the_judge_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("openai")
    paths = [str(write_outputs(tmp_path / name / "model_outputs.json", {"x": name}, name))
             for name in ("clo", "sft")]
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as ended:
        run(lambda: evaluation.main(["judge", *paths]))
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("error: OPENAI_API_KEY") and told.count("\n") == 1
