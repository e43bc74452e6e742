"""Distillation: what 06_distill cannot show in a cell."""
import importlib.util
import json
import logging
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from tiny_reason.lib import journal, teachers
from tiny_reason.data import build_prompt, load_problems, prepare, to_messages
from tiny_reason.distill import (Teacher, completion_logits, distil_logits,
                                 diverse, endpoint_teacher, filter_traces,
                                 generate_traces, random_selection, soft_loss,
                                 split_trace, trace_of)
from tiny_reason.lib.journal import SETTINGS, read_traces
from tiny_reason.lib.teachers import LARGEST
from tiny_reason.lib.decode import end_ids, generate_ids, text_of
from tiny_reason.lib.folders import find_base, load_tokenizer
from tiny_reason.lib.answers import is_correct
from tiny_reason.lib.arithmetic import check_steps
from tiny_reason.model import add_lora, load_base, merge

torch.set_num_threads(1)
often = settings(max_examples=150, deadline=None, derandomize=True,
                 database=None)
KEY = "sk-sentinel-0451"
GOOD = "2+2=4\n#### 4"


def ask_for(*names, **more): return [dict(question=q, **more) for q in names]


def lines_of(path):
    "The traces of a file; every line whole, none twice."
    data = path.read_bytes()
    assert data == b"" or data.endswith(b"\n")
    traces = [json.loads(line) for line in data.splitlines()]
    pairs = [(t["question"], t["sample"]) for t in traces]
    assert len(set(pairs)) == len(pairs)
    assert read_traces(path) == traces
    return traces


# A teacher behind a URL. The server is real, its behaviour is each test's.

def reply(text="", finish="stop", **message):
    return json.dumps(dict(choices=[dict(
        message=dict(content=text) | message, finish_reason=finish)])).encode()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def pour(self, piece, pause=0.0, times=80):
        "Send the piece again and again, until the other side hangs up."
        try:
            for _ in range(times):
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(pause)
        except OSError: self.server.hung_up.set()

    def do_POST(self):
        s = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.request_json = json.loads(body)
        question = self.request_json["messages"][-1]["content"]
        with s.guard:
            s.seen.append(question)
            s.keys.add(self.headers["Authorization"])
            self.turn = s.seen.count(question)
            s.busy += 1
            s.busiest = max(s.busiest, s.busy)
        try: s.act(self, question)
        finally:
            with s.guard: s.busy -= 1


class Server(ThreadingHTTPServer):
    request_queue_size = 64
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.guard, self.hung_up = threading.Lock(), threading.Event()
        self.seen, self.keys, self.busy, self.busiest = [], set(), 0, 0
        self.act = lambda h, q: h.answer(reply(GOOD))
    def handle_error(self, *args): pass # the other side hung up


@pytest.fixture
def serve(monkeypatch):
    "Starts servers; the key is set, and the rest of the environment is not."
    for name in [*os.environ]:
        if name.startswith("OPENAI_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    running = []
    def start():
        running.append(Server())
        threading.Thread(target=running[-1].serve_forever, args=(0.02,),
                         daemon=True).start()
        return running[-1]
    yield start
    for server in running: server.shutdown(); server.server_close()


@pytest.fixture
def server(serve): return serve()


def ask(server, out, problems, k=1, **how):
    how = dict(timeout=20, retries=0, concurrency=2) | how
    return generate_traces(endpoint_teacher(server.url, "m", **how), problems,
                           k=k, out=out)


def plain(error):
    "One sentence or two in our words."
    text = str(error)
    for word in ("httpx", "openai", "Traceback", "object at", "TaskGroup",
                 "Error code", "sys.", KEY):
        assert word not in text, text
    assert "\n" not in text and len(text) < 400
    assert error.__suppress_context__ or error.__context__ is None
    return text


def drop(h, q):
    h.send_response(200)
    h.send_header("Content-Length", "1000")
    h.end_headers()
    h.wfile.write(reply(GOOD))


def hang_up(h, q): h.connection.shutdown(socket.SHUT_RDWR)


def endless(status, piece=b" " * 1_000_000, pause=0.0):
    def act(h, q):
        h.answer(b"{", status)
        h.pour(piece, pause)
    return act


def endless_headers(h, q):
    h.send_response(200)
    h.flush_headers()
    h.pour(b"X-More: 1\r\n", 0.05)


def says(body, status=200): return lambda h, q: h.answer(body, status)


FAULTS = {
    "slow": (lambda h, q: time.sleep(1.5), "no answer within"),
    "500": (says(b"", 500), "500 Internal Server Error"),
    "529": (says(b"", 529), "status 529"),
    "429": (says(b"", 429), "429 Too Many Requests"),
    "400": (says(b'{"error": {"message": "too long"}}', 400),
            "400 Bad Request"),
    "endless": (endless(200), f"a reply of over {LARGEST:,} bytes"),
    "endless error": (endless(400), "400 Bad Request"),
    "drips": (endless(200, b" ", 0.05), "no answer within"),
    "drips an error": (endless(400, b" ", 0.05), "400 Bad Request|no answer"),
    "drips headers": (endless_headers, "no answer within"),
    "drops the line": (drop, "no connection|broke"),
    "hangs up": (hang_up, "no connection"),
    "no HTTP": (lambda h, q: h.wfile.write(b"220 mail ready\r\n"),
                "no connection"),
    "HTML": (says(b"<!doctype html><p>Welcome</p>"), "no chat completion"),
    "nothing": (says(b""), "no chat completion"),
    "echo": (lambda h, q: h.answer(h.headers["Authorization"].encode()),
             "no chat completion"),
    "half a reply": (says(reply(GOOD)[:-9]), "no chat completion"),
    "deep": (says(b"[" * 100_000), "no chat completion"),
} | {f"shape {i}": (says(body), "no chat completion") for i, body in enumerate(
    (b"[]", b"null", b'{"choices": []}', b'{"choices": {}}',
     b'{"choices": [{}]}', b'{"choices": [{"message": null}]}',
     reply(7), reply(["a", "b"]), reply({"a": "b"}),
     reply(None, reasoning_content=["a"]), b'{"error": {"message": "no"}}'))}


@pytest.fixture
def impatient(monkeypatch):
    "The question `bad` is given half a second; the others have their time."
    usual = teachers.ask_one
    def ask_one(client, request, timeout):
        bad = request["messages"][-1]["content"] == "bad"
        return usual(client, request, 0.5 if bad else timeout)
    monkeypatch.setattr(teachers, "ask_one", ask_one)


@pytest.mark.parametrize("act, why", FAULTS.values(), ids=FAULTS)
def test_a_fault_of_one_question_leaves_the_others(tmp_path, server, act, why,
                                                   caplog, impatient):
    caplog.set_level(logging.DEBUG)
    out, good = tmp_path / "out.jsonl", server.act
    server.act = lambda h, q: (act if q == "bad" else good)(h, q)
    problems = ask_for("a", "bad", "b", "c")
    report = ask(server, out, problems)
    (said, n), = report["missing"].items()
    assert (pytest.approx(n), report["written"]) == (1, 3)
    assert any(part in said for part in why.split("|")), said
    assert {t["question"] for t in lines_of(out)} == {"a", "b", "c"}
    if act.__qualname__.startswith("endless"): assert server.hung_up.wait(8)
    server.act, server.seen = good, []
    report = ask(server, out, problems)
    assert (report["written"], report["held"], report["missing"]) == (1, 3, {})
    assert server.seen == ["bad"] and len(lines_of(out)) == 4
    assert server.keys == {f"Bearer {KEY}"}
    for text in (out.read_text(), said, caplog.text): assert KEY not in text


ODD_USAGE = [json.dumps(json.loads(reply(GOOD)) | dict(usage=u)).encode()
             for u in ("many", 7, [], {"completion_tokens": "x"}, None)]


@pytest.mark.parametrize("body", ODD_USAGE)
def test_odd_token_counts_cost_no_answer(tmp_path, server, body):
    server.act = says(body)
    assert ask(server, tmp_path / "o", ask_for("a"))["written"] == 1
    assert isinstance(lines_of(tmp_path / "o")[0]["tokens"], int)


def test_what_one_question_is_to_blame_for_is_no_outage(tmp_path, server):
    "The last question left, refused for ever: the run still ends well."
    good = server.act
    server.act = lambda h, q: (says(b"", 400) if q == "bad" else good)(h, q)
    for _ in range(2):
        report = ask(server, tmp_path / "o", ask_for("a", "bad"))
        assert report["missing"] == {"400 Bad Request": 1}
    assert sorted(server.seen) == ["a", "bad", "bad"]


@pytest.mark.parametrize("act", [
    lambda h, q: h.answer(b"", 429, Retry_After="0.1"), says(b"", 500),
    says(b"", 503), hang_up], ids=["429", "500", "503", "hangs up"])
def test_a_passing_fault_is_tried_again(tmp_path, server, act):
    good = server.act
    server.act = lambda h, q: (act if h.turn == 1 else good)(h, q)
    report = ask(server, tmp_path / "o", ask_for("a", "b"), retries=1)
    assert (report["written"], report["missing"]) == (2, {})
    assert Counter(server.seen) == {"a": 2, "b": 2}
    assert len(lines_of(tmp_path / "o")) == 2


@pytest.mark.parametrize("act, hint, most", [
    (says(KEY.encode(), 401), "401 Unauthorized; set OPENAI_API_KEY", 10),
    (says(b"", 403), "403 Forbidden; may this key", 10),
    (says(b"", 404), "404 Not Found; is that the model's name", 10),
    (says(b"", 500), "500 Internal Server Error; is it up?", 20),
    (says(b"<html>"), "no chat completion", 20),
    (hang_up, "no connection; is it up?", 20)],
    ids=["401", "403", "404", "500", "HTML", "down"])
def test_a_teacher_out_of_reach_ends_the_run(tmp_path, server, act, hint,
                                             most):
    "After some answers, which are kept, and asked for no second time."
    out, good, questions = tmp_path / "o", server.act, [*map(str, range(60))]
    def faulty(h, q): # once the five are kept, so that none is under way
        while out.read_bytes().count(b"\n") < 5: time.sleep(0.01)
        act(h, q)
    server.act = lambda h, q: (good if int(q) < 5 else faulty)(h, q)
    with pytest.raises(ConnectionError) as caught:
        ask(server, out, ask_for(*questions))
    assert hint in plain(caught.value) and "run again" in str(caught.value)
    assert len(server.seen) <= most and len(lines_of(out)) == 5
    server.act, server.seen = good, []
    assert ask(server, out, ask_for(*questions))["written"] == 55
    assert sorted({*server.seen}, key=int) == questions[5:]
    assert len(server.seen) <= 57 # two of before may arrive after it ended
    assert len(lines_of(out)) == 60


def test_a_teacher_that_refuses_every_question(tmp_path, server):
    "Not one question's fault: a wrong name, say. One question may be."
    out, good = tmp_path / "o", server.act
    server.act = says(b"", 400)
    with pytest.raises(ConnectionError, match="400.*does it know this model"):
        ask(server, out, ask_for(*map(str, range(60))))
    assert len(server.seen) <= 20
    assert ask(server, out, ask_for("a"))["missing"] == {"400 Bad Request": 1}
    server.act = good
    assert ask(server, out, ask_for("a"))["written"] == 1


def test_a_closed_port(tmp_path, serve):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}/v1"
    for problems in (ask_for("a"), ask_for(*"abcdefghijkl")):
        with pytest.raises(ConnectionError, match="no connection; is it up"
                           ) as caught:
            generate_traces(endpoint_teacher(url, "m", retries=1), problems,
                            out=tmp_path / "o")
        plain(caught.value)
    assert lines_of(tmp_path / "o") == []


ANSWERS = {
    "plain": (reply(GOOD), GOOD, True, "4"),
    "cut off": (reply(GOOD, "length"), GOOD, False, "4"),
    "empty": (reply(""), "", True, None),
    "null": (reply(None), "", True, None),
    "parted": (reply("It is 4.", reasoning_content=" 2+2=4 "),
               "<think>\n2+2=4\n</think>\n\nIt is 4.", True, "4"),
    "by another name": (reply("4", reasoning="2+2=4"),
                        "<think>\n2+2=4\n</think>\n\n4", True, "4"),
    "unicode": (reply("２＋２＝４\u2028é🙂\0\r\n#### ４"),
                "２＋２＝４\u2028é🙂\0\r\n#### ４", True, "4"),
    "huge": (reply("2+2=4 " * 100_000 + "\n#### 4"),
             "2+2=4 " * 100_000 + "\n#### 4", True, "4"),
    "beyond numbers": (reply("It is 1e9999."), "It is 1e9999.", True, None)}


@pytest.mark.parametrize("body, text, finished, number", ANSWERS.values(),
                         ids=ANSWERS)
def test_an_answer_arrives_whole(tmp_path, server, body, text, finished,
                                 number):
    server.act = says(body)
    assert ask(server, tmp_path / "o", ask_for("a"))["written"] == 1
    t, = lines_of(tmp_path / "o")
    assert (t["completion"], t["finished"], t["prediction"]) == (
        text, finished, number)
    assert filter_traces([t])[1]["kept"] == 0 # one voice is no majority


def test_half_a_character_does_not_spoil_the_lessons(tmp_path, server):
    server.act = says(reply("\ud800 2+2=4\n#### 4"))
    out, lessons = tmp_path / "o", tmp_path / "kept.jsonl"
    ask(server, out, ask_for("a", "b", answer="4"))
    lessons.write_text("".join(json.dumps(t) + "\n" for t in filter_traces(
        lines_of(out))[0]) + json.dumps(dict(question="c", answer=GOOD)))
    assert load_problems(str(lessons))["question"][-1] == "c"


def test_never_more_at_once_than_allowed_and_in_any_order(tmp_path, server):
    together = threading.Barrier(3)
    def act(h, q):
        together.wait(20) # fails unless three are there at once
        time.sleep(0.03 * (2 - int(q) % 3))
        h.answer(reply(f"{q}+0={q}\n#### {q}"))
    server.act = act
    ask(server, tmp_path / "o", ask_for(*map(str, range(12))), concurrency=3)
    traces = lines_of(tmp_path / "o")
    assert server.busiest == 3 and len(traces) == 12
    assert all(t["prediction"] == t["question"] for t in traces)
    assert [t["question"] for t in traces] != sorted(
        (t["question"] for t in traces), key=int)


def test_each_sample_has_a_seed_and_the_settings_arrive(tmp_path, server):
    asked = []
    def act(h, q): asked.append(h.request_json); h.answer(reply(GOOD))
    server.act = act
    ask(server, tmp_path / "o", ask_for("a"), k=3)
    assert len({r["seed"] for r in asked}) == 3
    assert {(r["model"], r["temperature"], r["max_tokens"])
            for r in asked} == {("m", 0.7, 512)}


def test_another_system_prompt_is_another_teacher(server):
    one, two = (endpoint_teacher(server.url, "m", system_prompt=p)
                for p in ("Think.", "Do not."))
    assert one.name != two.name


def test_the_key_goes_to_no_other_server(tmp_path, serve):
    first, second = serve(), serve()
    first.act = lambda h, q: h.answer(
        b"", 307, Location=second.url + "/chat/completions")
    try: ask(first, tmp_path / "o", ask_for("a", "b"))
    except ConnectionError as e: plain(e)
    assert second.keys <= {None}


def test_a_key_from_a_file_may_end_in_a_line_break(tmp_path, server,
                                                   monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\r\n")
    assert ask(server, tmp_path / "o", ask_for("a"))["written"] == 1
    assert server.keys == {f"Bearer {KEY}"}


@pytest.mark.parametrize("url", [
    "http://127.0.0.1:99999/v1", "http://127.0.0.1:port/v1",
    "http://[::1/v1", "//x/v1", "127.0.0.1:80/v1"])
def test_what_is_no_url_is_refused_at_once(url):
    with pytest.raises(ValueError) as caught: endpoint_teacher(url, "m")
    assert repr(url) in plain(caught.value)


@pytest.mark.parametrize("how", [dict(concurrency=0), dict(concurrency=-1),
                                 dict(timeout=0), dict(retries=-1)])
def test_impossible_ways_to_ask_are_refused_at_once(server, how):
    with pytest.raises(ValueError, match=next(iter(how))):
        endpoint_teacher(server.url, "m", **how)


def test_ctrl_c_ends_a_run_that_waits_for_its_teacher(tmp_path, server):
    out, good, waits = tmp_path / "o", server.act, threading.Event()
    def act(h, q):
        if int(q) < 5: return good(h, q)
        if q == "6": signal.pthread_kill(threading.main_thread().ident,
                                         signal.SIGINT)
        waits.wait(30)
    server.act = act
    with pytest.raises(KeyboardInterrupt):
        ask(server, out, ask_for(*map(str, range(40))))
    waits.set()
    assert len(lines_of(out)) == 5 and len(server.seen) == 7
    server.act = good
    assert ask(server, out, ask_for(*map(str, range(40))))["held"] == 5


# The file.

def teacher(seen=None, stop=None, name="t", style="think"):
    "A function that answers at once; told to, it is interrupted."
    def ask(jobs, done, *settings):
        for i, job in enumerate(jobs):
            if i == stop: raise KeyboardInterrupt
            if seen is not None: seen.append(job)
            done(i, GOOD, True, 5)
        return {}
    return Teacher(name, style, ask)


def nobody(*args): raise AssertionError("the teacher was asked")


SILENT = Teacher("t", "think", nobody)


def wait_for(happened, child):
    for _ in range(1200):
        if happened(): return
        assert child.poll() is None
        time.sleep(0.05)
    raise AssertionError("it never happened")


CHILD = """
import sys, time
from tiny_reason.distill import Teacher, generate_traces
def ask(jobs, done, *settings):
    for i in range(len(jobs)):
        time.sleep(0.01)
        done(i, "2+2=4 " * (1 if i % 2 else 20_000), True, 5)
        print(i, flush=True)
generate_traces(Teacher("t", "think", ask), out=sys.argv[1], temperature=1,
                problems=[dict(question=str(i)) for i in range(1000)], k=2)
"""


def test_kill_9_and_a_second_writer(tmp_path):
    "In one test, as a process that can be killed takes seconds to start."
    out, seen = tmp_path / "new" / "folder" / "out.jsonl", []
    def again(who): return generate_traces(
        who, ask_for(*map(str, range(1000))), k=2, out=out, temperature=1)
    child = subprocess.Popen([sys.executable, "-c", CHILD, out],
                             stdout=subprocess.PIPE)
    wait_for(lambda: out.is_file() and b"\n" in out.read_bytes(), child)
    with pytest.raises(BlockingIOError, match="another process") as caught:
        again(SILENT)
    plain(caught.value)
    child.kill()
    paid_for = child.communicate()[0].split()
    kept, whole = read_traces(out), out.read_bytes().rpartition(b"\n")[0]
    assert len(kept) >= len(paid_for)
    report = again(teacher(seen))
    assert out.read_bytes().startswith(whole)
    assert 0 < report["held"] == len(kept) < 2000
    assert len(lines_of(out)) == 2000 == len(kept) + len(seen)


def test_a_line_torn_at_any_byte_is_asked_for_again(tmp_path):
    out, seen = tmp_path / "out.jsonl", []
    generate_traces(teacher(), ask_for("a", 'é"\n'), out=out)
    whole = out.read_bytes()
    for cut in range(whole.index(b"\n") + 1, len(whole) + 1):
        out.write_bytes(whole[:cut])
        there = len(read_traces(out))
        assert there == (1 if cut < len(whole) - 1 else 2)
        seen.clear()
        generate_traces(teacher(seen), ask_for("a", 'é"\n'), out=out)
        assert out.read_bytes() == whole and len(seen) == 2 - there


@pytest.mark.parametrize("content", [
    b"hello", b"hello\n", b"\n", b"{}", b"{}\n", b"[1]", b"null\n", b"\xff\xfe",
    b'{"a": 1}', b'{"question": "q", "answer": "#### 2"}',
    b'{"question": "q", "answer": "#### 2"}\n', b"question,answer\nq,2"])
def test_a_file_of_something_else_is_left_as_it_is(tmp_path, content):
    out = tmp_path / "out.jsonl"
    out.write_bytes(content)
    with pytest.raises(ValueError, match="not a trace") as caught:
        generate_traces(SILENT, ask_for("a"), out=out)
    assert str(out) in plain(caught.value) and out.read_bytes() == content
    with pytest.raises(ValueError, match="not a trace"): read_traces(out)
    assert [*tmp_path.iterdir()] == [out]


def test_a_refused_line_of_other_types(tmp_path):
    out = tmp_path / "out.jsonl"
    generate_traces(teacher(), ask_for("a"), out=out)
    trace, = read_traces(out)
    for spoilt in (trace | dict(question=["a"]), trace | dict(sample={}),
                   {k: v for k, v in trace.items() if k != "gold"}):
        out.write_text(json.dumps(spoilt) + "\n")
        with pytest.raises(ValueError, match="line 1: not a trace"):
            filter_traces(read_traces(out))


@pytest.mark.parametrize("name", SETTINGS)
def test_output_of_other_settings_is_refused(tmp_path, name):
    def run(who, teacher="t", style="think", **how):
        return generate_traces(who._replace(name=teacher, style=style),
                               ask_for("a"), out=tmp_path / "o", **how)
    now = dict(teacher="t", style="think", temperature=0.5,
               max_new_tokens=512, seed=3407)
    other = now | {name: dict(teacher="u", style="question", temperature=0.6,
                              max_new_tokens=511, seed=1)[name]}
    run(teacher(), **now)
    before = (tmp_path / "o").read_bytes()
    with pytest.raises(ValueError) as caught: run(SILENT, **other)
    for word in (name, repr(now[name]), repr(other[name])):
        assert word in plain(caught.value)
    assert (tmp_path / "o").read_bytes() == before
    assert run(SILENT, **now)["held"] == 1


def test_more_samples_are_asked_for_alone_and_questions_once(tmp_path):
    seen, out = [], tmp_path / "o"
    how = dict(temperature=0.7, out=out)
    report = generate_traces(teacher(seen), ask_for(*"abba"), k=2, **how)
    assert sorted(seen) == [(q, s) for q in "ab" for s in (0, 1)]
    assert report == dict(questions=2, repeated=2, held=0, missing={},
                          written=4)
    seen.clear()
    generate_traces(teacher(seen), ask_for(*"ab"), k=4, **how)
    assert sorted(seen) == [(q, s) for q in "ab" for s in (2, 3)]
    assert len(lines_of(out)) == 8


def test_nothing_to_ask_asks_nobody(tmp_path):
    assert generate_traces(SILENT, [], out=tmp_path / "o") == dict(
        questions=0, repeated=0, held=0, missing={}, written=0)
    assert filter_traces([]) == ([], dict(
        read=0, kept=0, dropped={}, questions=0, judged={}, solved=0))


@pytest.mark.parametrize("problems, how, match", [
    (ask_for("a", "b", answer="#### many"), {}, "many.*belongs to 'a'"),
    (ask_for("a") + ask_for("a", answer="3 or 4"), {}, "3 or 4"),
    (ask_for("a", answer="1e9999"), {}, "belongs to 'a'"),
    ([dict(answer="4")], {}, "question"),
    (ask_for("a"), dict(k=0), "0 samples"),
    (ask_for("a"), dict(k=2, temperature=0), "temperature above 0"),
    (ask_for("a"), dict(temperature=-1), "temperature"),
    (ask_for("a"), dict(max_new_tokens=0), "max_new_tokens"),
    (ask_for("a"), dict(out="."), "folder")])
def test_what_cannot_be_asked_is_refused_first(tmp_path, problems, how, match,
                                               monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, IsADirectoryError), match=match) as caught:
        generate_traces(SILENT, problems, **how)
    plain(caught.value)
    assert [*tmp_path.iterdir()] == []


def test_zero_is_an_answer(tmp_path):
    out = tmp_path / "o"
    generate_traces(teacher(), ask_for("a", answer=0) + ask_for(
        "b", answer="0") + ask_for("c", answer=""), out=out)
    assert [t["gold"] for t in read_traces(out)] == ["0", "0", None]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "o")
    for place, why in (("file/o", "file.*not a (folder|directory)"),
                       ("link", "o such file")):
        for _ in range(2): # the first refusal must not be the next's reason
            with pytest.raises(OSError, match=why) as caught:
                generate_traces(SILENT, ask_for("a"), out=tmp_path / place)
            assert place in plain(caught.value)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_places(tmp_path):
    (tmp_path / "o").write_text("")
    (tmp_path / "o").chmod(0o400)
    with pytest.raises(PermissionError, match="cannot write"):
        generate_traces(SILENT, ask_for("a"), out=tmp_path / "o")
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot write"):
        generate_traces(SILENT, ask_for("a"), out=tmp_path / "p")
    tmp_path.chmod(0o700)


def test_a_full_disk_loses_nothing_that_was_written(tmp_path, server):
    "The sixth trace does not fit."
    out, real, n = tmp_path / "o", json.dumps, []
    class Full(str):
        def encode(self): raise OSError(28, "No space left on device")
    def dumps(trace):
        n.append(1)
        return Full() if len(n) == 6 else real(trace)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(journal, "json", type("J", (), dict(
            dumps=staticmethod(dumps), loads=json.loads)))
        with pytest.raises(OSError, match="No space"):
            ask(server, out, ask_for(*map(str, range(9))), concurrency=1)
    assert len(lines_of(out)) == 5
    assert ask(server, out, ask_for(*map(str, range(9))))["written"] == 4


@settings(often, max_examples=40)
@given(st.integers(0, 6), st.integers(1, 3), st.lists(st.integers(0, 18)))
def test_interrupted_anywhere_ends_with_the_same_jobs(tmp_path_factory, n, k,
                                                      stops):
    out, problems = tmp_path_factory.mktemp("i") / "o", ask_for(
        *map(str, range(n)))
    how, seen, errors = dict(k=k, out=out, temperature=1), [], []
    for stop in stops:
        try: generate_traces(teacher(seen, stop), problems, **how)
        except KeyboardInterrupt as e: errors.append(e) # as Jupyter does
        lines_of(out)
    generate_traces(teacher(seen), problems, **how)
    pairs = [(t["question"], t["sample"]) for t in lines_of(out)]
    assert Counter(pairs) == Counter(seen) == Counter(
        (str(q), s) for q in range(n) for s in range(k))


# What a trace says.

SUMS = "48/2=24, 48+24=72"
SPLITS = [(f"<think>\n{SUMS}\n</think>\n\n**Final Answer:** 72", SUMS, "72"),
          (f"{SUMS}\n</think>\n\n**Final Answer:** 72", SUMS, "72"),
          (f"Hm.<think>{SUMS}</think>72", SUMS, "72"),
          (f"{SUMS}\n#### 72", SUMS, "72"),
          (f"{SUMS}\n**Final Answer:** $72.00", SUMS, "72"),
          (f"{SUMS}\n\\boxed{{72}}", f"{SUMS}\n\\boxed{{72}}", "72"),
          (f"{SUMS}\nSo 72 in all.", f"{SUMS}\nSo 72 in all.", "72"),
          ("2-7=-5\n#### -5", "2-7=-5", "-5"),
          ("3/2=1.5\n#### 1.50", "3/2=1.5", "1.5"),
          ("6/4\n#### 3/2", "6/4", "1.5"), ("2/6\n#### 1/3", "2/6", "1/3"),
          ("3*400=1,200\n#### 1,200", "3*400=1,200", "1200"),
          (f"{SUMS}\n#### 72 or 73", SUMS, None),
          (f"<think>\n{SUMS}", SUMS, None),
          (f"<think>\n{SUMS}\n</think>", SUMS, None),
          ("I do not know.", "I do not know.", None),
          ("", "", None), ("<think></think>", "", None),
          ("0*5=0\n#### 0", "0*5=0", "0"), ("0*5=0\n#### -0", "0*5=0", "0"),
          ("a lot\n#### 1e9999", "a lot", None),
          # What a model makes up after its answer is no part of it.
          (f"{SUMS}, so 72.\nQuestion: What is 5+5?\nIt is 10.",
           f"{SUMS}, so 72.", "72"),
          (f"{SUMS}\n#### 72\n### Question:\n5+5?\n#### 10", SUMS, "72"),
          ] + [(bare, "", "72") for bare in (
              "72", "72.", "$72", "**72**", "\\boxed{72}", "#### 72",
              "**Final Answer:** 72", "<think>\n</think>\n\n72")]


@pytest.mark.parametrize("text, cot, number", SPLITS)
def test_layouts(text, cot, number): assert split_trace(text) == (cot, number)


@pytest.mark.parametrize("text", [
    f"Let us see.\n#### Step 1\n{SUMS}\n#### Step 2\nDone\n#### 72",
    f"#### Step 1: {SUMS}\n#### 72", f"#### Plan\nAdd.\n{SUMS}\nSo 72 in all.",
    f"I put it after </think>.</think>{SUMS}\n#### 72"])
def test_headings_do_not_cut_the_reasoning_short(text):
    "Kept with its sums, or not at all."
    t = trace_of(dict(question="a", answer="72"), 0, text, True, 9, {})
    assert all(SUMS in t["cot"] for t in filter_traces([t])[0])


# What survives.

def make(question, text, finished, gold, sample=0):
    return trace_of(dict(question=question, answer=gold), sample, text,
                    finished, 9, dict.fromkeys(SETTINGS))


PIECES = ["2+2=4", "2 + 2 = 5", " so it is 4", "10/3=3.33", "<|im_end|>",
          "\n####", "</think>", "<think>", "\nQuestion: what is 5+5?", " é ",
          "\n**Final Answer:** ", "\\boxed{5}", "\n", " 5", "the answer is 5",
          "Wait, no. ", "9" * 20]
ENDS = ["\n#### 4", "\n</think>\n\n**Final Answer:** 4", " The answer is 5.",
        " \\boxed{4}", "\n#### 1,200", "", "\n#### 4 or 5", "\n#### 1/3"]
texts = st.builds(lambda body, end: "".join(body) + end, st.lists(
    st.sampled_from(PIECES), max_size=5), st.sampled_from(ENDS))
samples = st.dictionaries(st.sampled_from("abc"), st.tuples(
    st.sampled_from(["4", "5", "1/3", None]), st.lists(st.tuples(
        texts, st.sampled_from([True, True, False])), max_size=5)))


def traces_of(samples):
    return [make(q, text, finished, gold, i)
            for q, (gold, told) in samples.items()
            for i, (text, finished) in enumerate(told)]


@often
@given(samples, st.integers(1, 3))
def test_what_is_kept_is_right_sound_and_teachable(samples, most):
    traces = traces_of(samples)
    kept, report = filter_traces(traces, most)
    assert report["read"] == len(traces)
    assert report["read"] == report["kept"] + sum(report["dropped"].values())
    assert (report["kept"], report["questions"]) == (
        len(kept), len({t["question"] for t in traces}))
    assert sum(report["judged"].values()) == report["questions"]
    assert max(Counter(t["question"] for t in kept).values(), default=0
               ) <= most
    assert len({(t["question"], " ".join(t["cot"].lower().split()))
                for t in kept}) == len(kept)
    for t in kept:
        votes = Counter(s["prediction"] for s in traces if s["prediction"]
                        and s["question"] == t["question"])
        if t["gold"] is None:
            n = votes.pop(t["prediction"])
            assert n > 1 and n > max(votes.values(), default=0)
        answer = t["gold"] or t["prediction"]
        assert t["finished"] and is_correct(t["completion"], answer)
        assert all(ok is not False for _, ok in check_steps(t["cot"]))
        for style in ("think", "question"): # as training will read it
            written = to_messages(t, style)["completion"]
            if style == "think": written = written[0]["content"]
            assert is_correct(written, answer), written


@often
@given(samples, st.randoms(use_true_random=False))
def test_a_verdict_does_not_depend_on_the_order(samples, rng):
    traces = traces_of(samples)
    mixed = rng.sample(traces, len(traces))
    def told(traces):
        kept, report = filter_traces(traces, most=99)
        return report, {(t["question"], " ".join(t["cot"].lower().split()))
                        for t in kept}
    assert told(traces) == told(mixed)
    known = [t for t in traces if t["gold"]]
    kept, _ = filter_traces(known, most=2)
    again, report = filter_traces(kept, most=2)
    assert again == kept and report["dropped"] == {}


@often
@given(st.lists(st.sampled_from("456"), max_size=7))
def test_a_vote_needs_two_voices_and_no_tie(said):
    kept, report = filter_traces([make(
        "a", f"Try {i}: 1*{n}={n}\n#### {n}", True, None, i)
        for i, n in enumerate(said)], most=9)
    votes = Counter(said)
    elected = [n for n in said if votes[n] > 1 and votes[n] > max(
        (votes[m] for m in votes if m != n), default=0)]
    assert [*Counter(t["prediction"] for t in kept).items()] == [
        *Counter(elected).items()]
    assert report["judged"] == ({"vote": 1} if said else {})


def test_a_late_mistake_is_a_mistake():
    text = "Well. " * 3000 + "2+2=5. It is 4.\n#### 4"
    assert filter_traces([make("a", text, True, "4")])[0] == []


@often
@given(st.lists(texts, max_size=8), st.integers(1, 9))
def test_varied_chooses_distinct_traces(texts, most):
    traces = [make("a", text, True, "4", i) for i, text in enumerate(texts)]
    chosen = [t["sample"] for t in diverse(traces, most)]
    assert len(set(chosen)) == len(chosen) == min(most, len(traces))


def test_varied_takes_the_odd_one_out():
    cots = ["2+2=4 apples in all", "2+2=4 apples in all.", "Twice two: 2*2=4"]
    for seed in range(6):
        mixed = random.Random(seed).sample(cots, 3)
        chosen = [t["cot"] for t in diverse([dict(cot=c) for c in mixed], 2)]
        assert cots[2] in chosen and len(set(chosen)) == 2


@pytest.mark.parametrize("unit", [
    "2+2=4 ", "<think>", "</think>", "####", "#### 5 ", "<|im_end|>", "1,",
    "(", "=", "<<", "**Final Answer:** ", "\\boxed{", "Wait, no. ", "-", "\n",
    "9", "the answer is 5 ", "\\frac"])
def test_a_million_hostile_characters(unit):
    "They return; what is quadratic would take hours."
    text = unit * (1_000_000 // len(unit)) + "\n#### 4"
    kept, report = filter_traces([make("a", text, True, "4")])
    assert report["read"] == len(kept) + sum(report["dropped"].values()) == 1
    assert all(t["answer"].endswith("\n#### 4") for t in kept)


def test_what_is_kept_can_be_taught(tmp_path):
    "Every kept trace, in both styles, whatever number its answer is."
    tokenizer = load_tokenizer(find_base("student")[0])
    traces = [make(f"What is {n}?", text, True, str(n), i)
              for n in ("72", "-5", "1.5", "0", "1,200", "-0.125", "1/3")
              for i, text in enumerate((
                  f"It is {n} in all.\n#### {n}",
                  f"<think>\nSo {n}<|im_end|>.\n</think>\n\n{n}",
                  f"Say:\r\n\u2028 <<1+1=2>>2 \\boxed{{{n}}}"))]
    kept, report = filter_traces(traces)
    assert report["solved"] >= 6 and report["kept"] >= 12
    path = tmp_path / "kept.jsonl"
    path.write_text("".join(json.dumps(t) + "\n" for t in kept))
    for style in ("think", "question"):
        rows, held, told = prepare(str(path), None, tokenizer=tokenizer,
                                   style=style)
        assert told == dict(read=len(kept), kept=len(kept), dropped={})
        assert {*rows["question"], *held["question"]} == {
            t["question"] for t in kept}


@often
@given(samples, st.integers(1, 3), st.integers(0, 9))
def test_chance_chooses_as_many_of_the_same_problems(samples, most, seed):
    traces = traces_of(samples)
    kept, _ = filter_traces(traces, most)
    chosen = random_selection(traces, kept, seed)
    def counts(rows): return Counter(t["question"] for t in rows)
    assert counts(chosen) == counts(kept)
    assert all(t["answer"] and t in traces for t in chosen)
    assert len({(t["question"], t["answer"]) for t in chosen}) == len(chosen)


def test_a_soft_lesson_has_dropout_and_keeps_the_best_look():
    "The teacher is the student, twice as sure; the rate is far too high."
    base, tokenizer = load_base("student", four_bit=False, device="cpu")
    teacher = merge(base, torch.float32)
    teacher.model.norm.weight.data *= 2
    rows, held, _ = prepare("arithmetic", 40, tokenizer=tokenizer,
                            style="question")
    def taught(dropout):
        student = add_lora(load_base("student", four_bit=False,
                                     device="cpu")[0], 4, 8, dropout)
        return student, *distil_logits(student, teacher, rows.select(range(32)),
                                       held, rate=0.1, warmup=0)
    (_, without, _), (student, losses, lowest) = taught(0.0), taught(0.5)
    assert losses[0] == pytest.approx(without[0], abs=1e-6) # B starts at 0
    assert losses[1:] != pytest.approx(without[1:], abs=1e-3)
    with torch.no_grad():
        now = soft_loss(*(completion_logits(m, held)
                          for m in (student.eval(), teacher)))
    assert now.item() == pytest.approx(lowest, rel=1e-4)


# The ladder.

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ladder():
    return runpy.run_path(str(ROOT / "benchmarks" / "ladder.py"))


def test_the_ladders_page_is_in_step_with_its_verdicts(ladder):
    result = json.loads((ROOT / "benchmarks" / "ladder.json").read_text())
    assert (ROOT / "benchmarks" / "ladder.md").read_text() == "\n".join(
        ladder["page"](result))


def results(folder, seed, right, **other):
    place = folder / f"seed-{seed}"
    place.mkdir()
    (place / "settings.json").write_text(json.dumps(
        dict(student="a" * 64, n=2, budget=9, pool=3) | other))
    for name in ("teacher, soft", "teacher, unfiltered"):
        (place / f"{name}.json").write_text(json.dumps(dict(
            rung=name, seed=seed, right=dict(taught=right[name[9:]]),
            answering=5, before=4, minutes=30, command="c", machine="m")))


def test_gathered_runs_are_compared_seed_by_seed(ladder, tmp_path):
    for seed, soft in enumerate(("11", "10", "11")):
        results(tmp_path, seed, dict(soft=soft, unfiltered="00"))
    result = ladder["gathered"](tmp_path)
    assert (result["seeds"], result["minutes"]) == ([0, 1, 2], 180)
    row, = ladder["compared"](result, "taught")
    assert "| +100 +50 +100 | +83.3 [" in row
    text = "\n".join(ladder["page"](result))
    assert text.count("| teacher, soft | ") == 3 and row in text


@pytest.mark.parametrize("other", [dict(student="b" * 64), dict(n=3)])
def test_results_of_two_students_or_sizes_are_never_mixed(ladder, tmp_path,
                                                          other):
    right = dict(soft="11", unfiltered="00")
    results(tmp_path, 0, right)
    results(tmp_path, 1, right, **other)
    with pytest.raises(ValueError, match="choose another --folder"):
        ladder["gathered"](tmp_path)
    with pytest.raises(ValueError, match="holds no results"):
        ladder["gathered"](tmp_path / "seed-0")


# A server that is not ours.

@pytest.fixture(scope="module")
def real_server():
    "`transformers serve` with the bundled student: its URL."
    missing = [name for name in ("fastapi", "uvicorn", "openai")
               if not importlib.util.find_spec(name)]
    if missing: pytest.skip("needs " + ", ".join(missing))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen(
        [Path(sys.executable).with_name("transformers"), "serve",
         find_base("student")[0], "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True)
    def up():
        try: return urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
        except OSError: return False
    try:
        wait_for(up, process)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)
    with pytest.raises(ProcessLookupError): os.killpg(process.pid, 0)


def test_transformers_serve_says_what_the_model_says(tmp_path, real_server):
    "Greedy, from the prompt that a chat template makes, which is not primed."
    base, tokenizer = load_base("student", four_bit=False, device="cpu")
    model, problems = merge(base), load_problems(
        "arithmetic", split="validation", n=4)
    far = endpoint_teacher(real_server, str(find_base("student")[0]))
    report = generate_traces(far, problems, out=tmp_path / "o",
                             max_new_tokens=60)
    assert (report["written"], report["missing"]) == (4, {})
    ids = generate_ids(model, tokenizer, [
        build_prompt(q, tokenizer, prime=False) for q in problems["question"]],
        max_new_tokens=60)
    stops = end_ids(model, tokenizer)
    near = {q: (text_of(row, tokenizer, stops), row[-1] in stops)
            for q, row in zip(problems["question"], ids)}
    assert {t["question"]: (t["completion"], t["finished"])
            for t in lines_of(tmp_path / "o")} == near
