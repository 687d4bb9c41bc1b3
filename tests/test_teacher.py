"""Tests of data/teacher.py:  python -m pytest tests/test_teacher.py

The teacher is a small server of our own, which answers well, badly or not at all.
"""
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from data.answers import STRATEGIES, numeric_answer  # noqa: E402
import data.teacher  # noqa: E402
from data.teacher import (Teacher, ask_checkpoint, query, clean, examples, is_over,  # noqa: E402
                          leave_out_long, parse_args, read_answer)
from data.files import Question  # noqa: E402
from sampler import Student  # noqa: E402

ANSWERS = {"cot": "1 + 1 = 2. Final answer: 2", "l2m": "What is 1 + 1? 2.\nFinal answer: 2", "pot": "```python\nanswer = 1 + 1\n```"}


BODIES = {  # of an answer with status 200 that is none
    "html": "<html>login</html>", "error": '{"error": {"message": "content filtered", "code": 403}}',
    "no choices": '{"choices": null, "error": {"message": "overloaded"}}', "stream": 'data: {"choices": []}\n\n',
    "number": "7", "deep": "[" * 200_000, "endless": '{"choices": [{"text": "18"}], "usage": {"total_tokens": 1e999}}',
}
MESSAGES = {  # an answer without a text -> (message, finish_reason)
    "thoughts": ({"content": None, "reasoning_content": "Let me see"}, "stop"),
    "long thoughts": ({"content": "", "reasoning": "Let me see"}, "length"),
    "thoughts in it": ({"content": "<think>Let me see"}, "length"),
    "refusal": ({"content": None, "refusal": "I cannot"}, "stop"), "filter": ({"content": ""}, "content_filter"),
    "no content": ({"role": "assistant"}, "length"), "no message": (None, "content_filter"),
    "list of thoughts": ({"content": [{"type": "thinking", "thinking": "Let me see"}]}, "length"),
}
TEXTS = {  # an answer with a text -> (message, finish_reason)
    "parts": ({"content": [{"type": "thinking", "thinking": "no"}, {"type": "text", "text": "answer = 1 + 1"}]}, "stop"),
    "half": ({"content": "1 + 1 = 2. Final answer: 2 \ud83d"}, "stop"), "low half": ({"content": "2 \udcb2"}, "eos"),
    "broken": ({"content": "Final answer: 2. So"}, "error"), "no reason": ({"content": "Final answer: 2"}, None),
    "model length": ({"content": "Final answer: 2. So"}, "model_length"), "turn": ({"content": "Final answer: 2"}, "end_turn"),
    "runs on": ({"content": "answer = 1 + 1\n\nQuestion: How"}, "length"),
}
MESSAGES |= TEXTS


class Server(ThreadingHTTPServer):
    """Answers as `moods` say, request by request, then well. Keeps what was asked and the most requests at a time."""
    daemon_threads = True
    request_queue_size = 64  # with 5, as usual, many requests at a time wait for a second

    def __init__(self, moods=(), delay=0.0):
        self.moods, self.delay, self.requests, self.headers, self.running, self.most = list(moods), delay, [], [], 0, 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def reply(self, code, text, **headers):
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(text.encode()))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(body)
            server.headers.append(self.headers)
            server.running += 1
            server.most = max(server.most, server.running)
            mood = server.moods.pop(0) if server.moods else "well"
        try:
            time.sleep(server.delay)
            with server.lock:
                server.running -= 1  # before the answer, or the next request may overtake this line
            chat = "/chat/" in self.path
            prompt = body["messages"][0]["content"] if chat else body["prompt"]
            strategy = "pot" if "Python" in prompt else "l2m" if "smaller questions" in prompt else "cot"
            content = ANSWERS[strategy] if body["seed"] % 2 == 0 else "Final answer: 3\n\nQuestion: another"
            choice = {"message": {"content": content}} if chat else {"text": content}
            answer = {"choices": [choice | {"finish_reason": "stop"}], "usage": {"total_tokens": 7}}
            if mood == "long":
                answer["choices"][0]["finish_reason"] = "length"
            if mood == "uncounted":
                answer["usage"]["total_tokens"] = None
            if mood == "counted in words":
                answer["usage"]["total_tokens"] = "7"
            if mood == "nothing":
                time.sleep(200)
            elif mood in ("cut", "cut error"):
                self.reply(200 if mood == "cut" else 502, "{", **{"Content-Length": "1000"})
            elif mood in BODIES:
                self.reply(200, BODIES[mood])
            elif mood in MESSAGES:
                message, reason = MESSAGES[mood]
                choice = {"message": message} if chat else {"text": message}
                self.reply(200, json.dumps({"choices": [choice | {"finish_reason": reason}]}))
            elif isinstance(mood, int):
                self.reply(mood, "trouble", **({"Retry_After": "3"} if mood == 429 else {}))
            else:
                self.reply(200, json.dumps(answer))
        except ConnectionError:
            pass  # the client has gone


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "question": f"What is 1 + 1, {i}?", "answer": "2"}) + "\n" for i in range(3)))
    return path


SCRIPT = str(ROOT / "data/teacher.py")


def start(questions, *flags, **environment):
    """The command in a process of its own, to kill it."""
    command = [sys.executable, SCRIPT, "--questions", str(questions), *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment)


def run_here(questions, *flags, code=0, **environment):
    """The command in this process, which has loaded torch: a second less. Returns what it prints."""
    arguments = [SCRIPT, "--questions", str(questions), *map(str, flags)]
    printed = io.StringIO()
    returned = 0
    with redirect_stdout(printed), redirect_stderr(printed), mock.patch.dict(os.environ, environment), \
            mock.patch.object(sys, "argv", arguments), mock.patch.object(sys, "path", list(sys.path)):
        try:
            runpy.run_path(SCRIPT, run_name="__main__")
        except SystemExit as stopped:
            returned = stopped.code
    assert returned == code, printed.getvalue()
    return printed.getvalue()


def collect(questions, server, *flags, **how):
    return run_here(questions, "--url", server.url, "--model", "m", "--samples", 2, *flags, **how)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("flags", [(), ("--completions",)])
def test_collects_every_sample_of_every_strategy(questions, tmp_path, flags):
    """What it is for: two texts per question and strategy, in the prompt of the strategy, half of them right here."""
    server = Server()
    printed = collect(questions, server, *flags, OPENAI_API_KEY="secret")
    lines = read_lines(tmp_path / "teacher.jsonl")
    assert Counter((line["id"], line["strategy"]) for line in lines) == {(str(i), s): 2 for i in range(3) for s in STRATEGIES}
    assert {line["text"] for line in lines} == {ANSWERS["cot"], ANSWERS["l2m"], "answer = 1 + 1", "Final answer: 3"}
    assert "126 tokens" in printed and "cot 3 of 6 (50%)" in printed and "pot 3 of 6 (50%)" in printed
    assert server.headers[0]["Authorization"] == "Bearer secret" and server.requests[0]["temperature"] == 0.7


def test_the_worked_examples_are_right_and_the_same_in_all_strategies():
    questions = []
    for strategy in STRATEGIES:
        prompt = examples(strategy) + query(Question("1", "How many?", 1))
        pairs = re.findall(r"Question: (.*?)\nAnswer:\s(.*?)\n\n(?=Question:)", prompt, re.DOTALL)
        assert len(pairs) == 8 and prompt.endswith("Question: How many?\nAnswer:")
        questions.append([(question, numeric_answer(strategy, text)) for question, text in pairs])
    assert questions[0] == questions[1] == questions[2] and None not in dict(questions[0]).values()


PROGRAM = "eggs = 9\nanswer = eggs * 2"
CLEANED = [  # strategy, text, what is kept of it
    # a further question, half a stop string, what follows the answer
    ("cot", "Final answer: 3\n\nQuestion: next", "Final answer: 3"), ("l2m", "  7 ", "7"),
    ("cot", "Final answer: 10\n\nAnother one:\nFinal answer: 5", "Final answer: 10"),
    ("cot", "**Final Answer:**\n\\[\n\\boxed{3}\n\\]\nI hope it helps.", "**Final Answer:**\n\\[\n\\boxed{3}\n\\]"),
    ("cot", "The final answer: see below.\nFinal answer: 3\nBye.", "The final answer: see below.\nFinal answer: 3"),
    ("pot", "answer = 18\nQ", "answer = 18"), ("pot", "answer = 18\n\nQuestion", "answer = 18"),
    # thoughts, control tokens, labels
    ("cot", "<think>\nMaybe 17. Final answer: 17? no.\n</think>\n\n3 * 6 = 18. Final answer: 18", "3 * 6 = 18. Final answer: 18"),
    ("cot", "Maybe 17.\n</think>\n18", "18"), ("cot", "<think>I begin to", ""), ("cot", "<think>a</think>18<think>b", "18"),
    ("cot", "<|im_start|>assistant\nFinal answer: 3<|im_end|>\n<|im_start|>user\nHi", "Final answer: 3"),
    ("pot", "answer = 18\n<end_of_turn>", "answer = 18"), ("pot", "answer = 18<|eot_id|>", "answer = 18"),
    ("pot", "Answer:\n" + PROGRAM, PROGRAM), ("pot", "answer: int = 18", "answer: int = 18"), ("pot", "**Answer:**\n\nanswer = 18", "answer = 18"),
    ("pot", "Answer: answer = 3", "answer = 3"), ("pot", "answer: Fraction = 3", "answer: Fraction = 3"),
    ("cot", "<|channel|>analysis<|message|>Maybe 17.<|end|><|start|>assistant<|channel|>final<|message|>18<|return|>", "18"),
    ("cot", "<|channel|>analysis<|message|>Maybe", ""), ("pot", "[THINK]answer = 17[/THINK]answer = 18", "answer = 18"),
    ("pot", "<think>no</think>\n<answer>\nanswer = 18\n</answer>", "answer = 18"),
    ("pot", "<|start_header_id|>assistant<|end_header_id|>\n\nanswer = 64", "answer = 64"), ("cot", "[cot]: 18", "18"),
    # fences
    ("cot", "```\n1+2\n```\nFinal answer: 3", "```\n1+2\n```\nFinal answer: 3"),
    ("pot", "Here it is:\n```python\nx = 1\nanswer = x\n```\nDone.", "x = 1\nanswer = x"),
    ("pot", "```Python3 \r\nanswer = 1\n```\nDone.", "answer = 1"), ("pot", "```\nanswer = 1", "answer = 1"),
    ("pot", "~~~python\nanswer = 18\n~~~", "answer = 18"), ("pot", "```python answer = 18```", "answer = 18"),
    ("pot", "- Code:\n\t```python\n\teggs = 9\n\tanswer = eggs * 2\n\t```", PROGRAM),
    ("pot", " eggs = 9\n answer = eggs * 2", PROGRAM), ("pot", " " + PROGRAM, PROGRAM),
    ("pot", "```python\nanswer = 17\n```\nBetter:\n```python\nanswer = 18\n```\nIt prints:\n```\n18\n```", "answer = 18"),
    ("pot", "```\nanswer = 17\n```\nBetter: ```python x = 18\nanswer = x\n```", "x = 18\nanswer = x"),
    # the last that sets `answer`, even if it is wrong: what was taken back does not count
    ("pot", "```\nanswer = 56\n```\nNo:\n```\nx = 6; answer: int = 7 * x = 42\n```\nIt is\n```\nThe answer = 42\n```",
     "x = 6; answer: int = 7 * x = 42"),
    ("pot", "Given:\n```\n9 eggs twice\n```\n```python\nanswer = 9 * 2\n```", "answer = 9 * 2"),
    ("pot", "<think>\n```python\nanswer = 17\n```\nno.\n</think>\n\n```python\nanswer = 18\n```", "answer = 18"),
]


@pytest.mark.parametrize("strategy, text, cleaned", CLEANED)
def test_clean(strategy, text, cleaned):
    assert clean(strategy, text) == cleaned


def test_a_stopped_collection_asks_only_for_what_is_missing(questions, tmp_path):
    """Killed in the middle, with a line half written: the same command pays for no answer twice."""
    server, out = Server(delay=0.1), tmp_path / "teacher.jsonl"
    process = start(questions, "--url", server.url, "--model", "m", "--samples", 2, "--in-flight", 1)
    while not out.exists() or out.read_bytes().count(b"\n") < 5:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(0.3)
    there = out.read_text()
    n_there = there.count("\n")
    out.write_text(there + '{"id": "2", "strate')
    again = Server()
    assert f"{n_there} texts are there" in collect(questions, again)
    assert len(again.requests) == 18 - n_there and out.read_text().startswith(there)
    assert set(Counter((line["id"], line["strategy"]) for line in read_lines(out)).values()) == {2}
    collect(questions, done := Server())
    assert not done.requests


def test_bad_weather_is_survived(questions, tmp_path):
    """500, 429 with Retry-After, silence, answers that break off: asked again, nothing is lost."""
    server = Server([500, 429, "nothing", "cut", "cut error", 408, "uncounted", "counted in words"])
    started = time.time()
    collect(questions, server, "--timeout", 1)
    assert len(server.requests) == 18 + 6 and len(read_lines(tmp_path / "teacher.jsonl")) == 18
    assert 3 < time.time() - started < 150  # Retry-After asks for 3 s; the silence would last 200


def test_a_server_that_stays_broken_is_reported(questions, tmp_path):
    """One line with the address and what it said last; what was collected before is there and valid."""
    server = Server(["well"] * 4 + [503] * 100)
    printed = collect(questions, server, "--attempts", 2, "--in-flight", 1, code=2)
    last = printed.strip().splitlines()[-1]
    assert server.url in last and "503" in last and "2 attempts" in last and "Traceback" not in printed
    assert 1 <= len(read_lines(tmp_path / "teacher.jsonl")) <= 4


def test_a_server_that_is_asked_for_long_is_named(questions):
    """Once for each text, and not for a short trouble."""
    printed = collect(questions, server := Server([503, 503, "well", 503, 503, 503]), "--in-flight", 1)
    assert printed.count(f"{server.url}/chat/completions: 503: trouble; it is asked again") == 1


def test_a_refusal_is_not_asked_again(questions):
    server = Server([401] * 100)
    printed = collect(questions, server, "--in-flight", 1, code=2)
    assert "401" in printed and len(server.requests) <= 2


NO_TEXT = {"trouble": 400} | {name: name for name in [*BODIES, *MESSAGES] if name not in TEXTS}


@pytest.mark.parametrize("mood", NO_TEXT.values(), ids=str)
def test_one_request_without_a_text_does_not_stop_the_others(questions, tmp_path, mood):
    """It is not written, but named with the beginning of what the server said. The next start asks for it alone."""
    server = Server(["well", mood])
    printed = collect(questions, server)
    assert "1 requests were refused" in printed and len(server.requests) == 18
    for part in ({400: ["400: trouble"], "html": ["login"], "error": ["content filtered"], "no choices": ["overloaded"],
                  "stream": ["data: {"], "thoughts": ["'stop'", "reasoning_content"], "refusal": ["I cannot"],
                  "long thoughts": ["'length'", "there is reasoning", "--max-new-tokens"]}.get(mood, [])):
        assert part in printed
    assert len(read_lines(tmp_path / "teacher.jsonl")) == 17
    collect(questions, again := Server())
    assert len(again.requests) == 1 and len(read_lines(tmp_path / "teacher.jsonl")) == 18


@pytest.mark.parametrize("mood, text, finished", [
    ("parts", "answer = 1 + 1", True), ("half", "1 + 1 = 2. Final answer: 2 \ufffd", True), ("low half", "2 \ufffd", True),
    ("broken", "Final answer: 2. So", False), ("no reason", "Final answer: 2", False),
    ("model length", "Final answer: 2. So", False), ("turn", "Final answer: 2", True), ("runs on", "answer = 1 + 1", True)])
def test_what_is_written(questions, tmp_path, mood, text, finished):
    """Finished is what the server calls finished, and what was cut at a further question. What is written can be read."""
    collect(questions, Server([mood] * 18))
    lines = read_lines(tmp_path / "teacher.jsonl")
    assert {line["text"] for line in lines} == {text} and {line.get("finished", True) for line in lines} == {finished}
    collect(questions, done := Server())
    assert not done.requests


@pytest.mark.parametrize("mood, part", [("thoughts", "reasoning_content"), ("html", "login"), ("error", "content filtered")])
def test_a_server_without_one_text_is_reported(questions, tmp_path, mood, part):
    server = Server([mood] * 100)
    last = collect(questions, server, "--samples", 20, code=2).strip().splitlines()[-1]
    assert part in last and server.url in last and "20 requests and no text" in last
    assert 20 <= len(server.requests) < 40 and read_lines(tmp_path / "teacher.jsonl") == []  # of 180


def test_the_client_has_a_name(questions):
    """Some servers turn away what calls itself Python-urllib."""
    collect(questions, server := Server())
    assert server.headers[0]["User-Agent"].startswith("siked-teacher/")


def test_a_server_that_refuses_everything_is_reported(questions):
    server = Server([400] * 100)
    assert "400: trouble" in collect(questions, server, "--samples", 20, code=2)
    assert 20 <= len(server.requests) < 40  # of 180


def test_a_first_trial_without_one_text_fails(questions):
    """A few questions do not reach MOST_SKIPPED. The code tells a script all the same; but not if
    texts are there, and only some requests are refused again and again."""
    printed = collect(questions, Server([400] * 100), code=2)
    assert "18 requests were refused" in printed and "400: trouble" in printed
    last = printed.strip().splitlines()[-1]
    assert "teacher.jsonl: not one text" in last and "Traceback" not in printed
    collect(questions, Server(["well"] * 17 + [400]))
    collect(questions, Server([400]))


def test_many_refused_requests_do_not_end_a_collection_that_has_texts(questions, tmp_path):
    """A content filter refuses the same questions at every start, and they are asked for first."""
    collect(questions, Server(["well"] * 10 + [400] * 8))
    collect(questions, Server([400] * 25 + ["well"] * 100), "--samples", 5)
    assert len(read_lines(tmp_path / "teacher.jsonl")) == 20  # of 45; 10 were there


def test_ctrl_c_writes_the_answers_under_way_and_does_not_wait_for_more(questions, tmp_path):
    server, out = Server(["well", 500, "well"], delay=1), tmp_path / "teacher.jsonl"  # after the 500 it would wait
    process = start(questions, "--url", server.url, "--model", "m", "--samples", 2, "--in-flight", 3)
    while len(server.requests) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    started = time.time()
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "under way" in printed and time.time() - started < 5
    assert len(server.requests) == 3 and len(read_lines(out)) == 2


def test_an_address_that_cannot_be_one_is_not_tried_again(questions):
    """There would be two minutes of waits before the last attempt."""
    started = time.time()
    process = start(questions, "--url", "http://[bad", "--model", "m")
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and time.time() - started < 30
    assert "teacher.py: " in printed and "Traceback" not in printed


def test_fields_of_a_request_can_be_changed(questions):
    """null takes one out. The key is sent without a line break behind it."""
    server = Server()
    collect(questions, server, "--extra", '{"max_tokens": null, "top_k": 3}', OPENAI_API_KEY="secret\r\n")
    assert "max_tokens" not in server.requests[0] and server.requests[0]["top_k"] == 3
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_only_a_half_written_line_is_cut_off(questions, tmp_path):
    out, line = tmp_path / "teacher.jsonl", json.dumps({"id": "0", "strategy": "cot", "text": "Final answer: 2"})
    out.write_text(line)  # whole, but without a line break: it counts
    collect(questions, server := Server(), "--samples", 1)
    assert len(server.requests) == 8 and out.read_text().startswith(line + "\n")
    out.write_text("my notes")
    assert "another file" in collect(questions, server, code=2)
    assert out.read_text() == "my notes" and len(server.requests) == 8


@pytest.mark.parametrize("flags, message", [
    (("--url", "localhost:8000/v1"), "--url localhost:8000/v1"), (("--extra", "[1]"), "--extra [1]"),
    (("--in-flight", "0"), "--in-flight 0: must be at least 1"),
    (("--temperature", "nan"), "--temperature nan: must be at least 0"),
    (("--timeout", "-1"), "--timeout -1.0")])
def test_unusable_flags_are_named(questions, flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--questions", str(questions), "--model", "m", *flags])
    assert message in capsys.readouterr().err


def test_missing_examples_are_named_before_anything_is_asked(questions):
    with mock.patch("data.answers.STRATEGIES", ("cot", "equation")):
        printed = collect(questions, server := Server(), code=2)
    assert "equation.txt" in printed and not server.requests


def test_requests_run_at_the_same_time(questions):
    server = Server(delay=0.3)
    collect(questions, server, "--in-flight", 6)
    assert 4 <= server.most <= 6


def test_texts_that_the_limit_cut_off_are_marked(questions, tmp_path):
    """But not those that went on to a further question: they were whole before."""
    collect(questions, Server(["long"] * 18))
    for line in read_lines(tmp_path / "teacher.jsonl"):
        assert line.get("finished", True) is (line["text"] == "Final answer: 3")


@pytest.mark.parametrize("strategy, text, written", [
    ("cot", "The Question: how many? 18. Final answer: 18 eggs.\n\nSo it is 18, and then", 1),
    ("l2m", "How many? 18. **Final answer:**\n\\[ 18 \\]\nThis is the answer.", 1),
    ("cot", "<think>Final answer: 3\nNo.</think>9 + 9 = 18\nFinal answer: 18\nOr is it 19?", 1),
    ("pot", "answer = 18\n\nQuestion: How many", 1),
    ("pot", "# Final answer: 18\nanswer = 9 + 9", 0),
    ("cot", "Final answer: that of 9 + 9\nFinal answer: 18", 0),
])
def test_a_text_is_over_behind_its_final_answer(strategy, text, written):
    """Read a character at a time, it ends there once, and what is kept is what the whole would be
    cut to."""
    ends = [end for end in range(len(text) + 1) if is_over(strategy, text[:end])]
    assert bool(ends) is bool(written)
    if ends:
        assert ends == list(range(ends[0], len(text) + 1))
        assert clean(strategy, text[:ends[0]]) == clean(strategy, text) != ""


@pytest.mark.parametrize("reason, behind, finished", [
    ("length", "\nWait, let me check", False), ("stop", "", True),
    ("length", "\n\nQuestion: How", True)])
def test_a_thought_that_was_cut_off_is_no_whole_text(reason, behind, finished):
    """It may hold a final answer, and a server may leave its opening tag out."""
    text = f"9 + 9 = 18. Final answer: 18{behind}"
    content = {"choices": [{"message": {"content": text}, "finish_reason": reason}]}
    assert read_answer(json.dumps(content).encode(), "cot")[:2] == (
        "9 + 9 = 18. Final answer: 18", finished)


def test_a_checkpoint_can_be_the_teacher(questions, tmp_path):
    """The embedded student will do, told that it has more positions: the eight examples are long
    for its tokenizer. A second start brings new texts, not those of the first again."""
    questions.write_text(questions.read_text().partition("\n")[0] + "\n")
    model = tmp_path / "model"
    shutil.copytree(ROOT / "data/student", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))

    def collect(samples):
        printed = run_here(questions, "--model", model, "--samples", samples, "--max-new-tokens",
                           12, "--rows", 32)
        assert "GB of weights" in printed and "minutes" in printed  # beforehand
        return read_lines(tmp_path / "teacher.jsonl")

    first = collect(1)
    assert Counter((line["id"], line["strategy"]) for line in first) == {("0", s): 1 for s in STRATEGIES}
    both = collect(3)
    assert both[:3] == first and len(both) == 9
    assert "0 to come" in run_here(questions, "--model", model, "--samples", 3)
    texts = {(line["id"], line["strategy"], line["text"]) for line in both}
    assert len(texts) > 7  # of 9, if no text came twice; with the seeds of the first start 3 fewer


@pytest.mark.parametrize("text, finished", [
    ("1 + 1 = 2. Final answer: 2\nAnd a further", True), ("Final answer: 2\n\nQuestion: How", True),
    ("1 + 1 = 2. Final answer: 2", False), ("1 + 1 = 2. And so", False)])
def test_a_text_of_a_checkpoint_that_goes_on_behind_its_answer_is_whole(monkeypatch, text, finished):
    """It met the limit, but is cut where it was whole before. A number at the limit may be half."""
    ids = Teacher(ROOT / "data/student", 40).encode(text)

    def stream(*_, is_over, **__):
        for count in range(len(ids) + 1):
            looked = count % data.teacher.LOOK_EVERY == 0 and finished
            assert not is_over(0, ids[:count]) or looked
        padded = ids + ids[:1] * (-len(ids) % data.teacher.LOOK_EVERY)
        assert is_over(0, padded) is finished
        yield 0, 0, ids

    monkeypatch.setattr(data.teacher, "stream", stream)
    monkeypatch.setattr(data.teacher, "leave_out_long", lambda teacher, jobs: jobs)
    monkeypatch.setattr(data.teacher, "announce", lambda *_: None)
    args = parse_args(["--questions", "q", "--model", str(ROOT / "data/student"),
                       "--device", "cpu", "--max-new-tokens", str(len(ids))])
    [answer] = ask_checkpoint(args, [(Question("1", "How many?", 2), "cot", 0)], 0)
    assert answer[3] is finished


def test_a_question_that_is_too_long_for_a_checkpoint_is_left_out(capsys):
    """It is named. The others do not wait for it."""
    teacher = Teacher(ROOT / "data/student", 40)
    teacher.stems = {"cot": [5]}
    room = teacher.model.config.max_position_embeddings - 40
    jobs = [(Question("long", "how " * room, 1), "cot", 0), (Question("short", "How?", 1), "cot", 0)]
    assert leave_out_long(teacher, jobs) == jobs[1:]
    said = capsys.readouterr().out
    assert said.startswith("1 texts are left out") and "\nlong [cot]: its prompt has" in said
    assert leave_out_long(teacher, jobs[:1] * 1000) == []
    assert capsys.readouterr().out.count("\n") == 6


def test_any_control_token_ends_the_text_of_a_checkpoint(tmp_path):
    """But for those that the model does not have."""
    model = tmp_path / "model"
    shutil.copytree(ROOT / "data/student", model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    known = tokenizer.id_to_token(40)
    tokenizer.add_special_tokens([known, "<picture>"])
    tokenizer.save(str(model / "tokenizer.json"))
    teacher = Teacher(model, 40)
    assert 40 in teacher.stop_ids and set(Student(model).stop_ids) < set(teacher.stop_ids)
    assert tokenizer.token_to_id("<picture>") not in teacher.stop_ids


def test_the_examples_end_in_no_end_token(tmp_path):
    """Some tokenizers append one to every text. The question comes behind it."""
    model = tmp_path / "model"
    shutil.copytree(ROOT / "data/student", model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    end = Student(model).stop_ids[0]
    name = tokenizer.id_to_token(end)
    tokenizer.post_processor = TemplateProcessing(single=f"$A {name}", special_tokens=[(name, end)])
    tokenizer.save(str(model / "tokenizer.json"))
    stem, _ = Teacher(model, 40).prompt(Question("1", "How many?", 1), "cot")
    assert end not in stem and len(stem) > 100


def test_a_checkpoint_feeds_the_examples_once():
    """The worked examples are the stem of every prompt of a strategy. The weights are there once."""
    teacher = Teacher(ROOT / "data/student", 40, 8, torch.bfloat16, "cpu", torch.bfloat16)
    prompts = [teacher.prompt(Question(str(i), f"How many, {i}?", 1), "pot") for i in range(2)]
    assert prompts[0][0] == prompts[1][0] and prompts[0][1] != prompts[1][1]
    assert teacher.tokenizer.decode(prompts[0][0]).count("Question:") == 8
    assert teacher.model.cast(teacher.dtype) is teacher.model
