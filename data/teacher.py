"""Collects rationales from a real teacher: step 0 of the README, for questions of your own.

    export OPENAI_API_KEY=...       # only where the server wants one; or name it by --key-variable
    python data/teacher.py --questions FOLDER/train.jsonl --url http://localhost:8000/v1 --model M
    python data/teacher.py --questions FOLDER/train.jsonl --model CHECKPOINT    # without a server

Writes teacher.jsonl beside the questions: for each question and strategy --samples texts, right and
wrong alike; train.py filters them. The prompt is data/prompts/STRATEGY.txt, eight worked examples,
and the question. Every text is appended as it comes, and the same command goes on where it was
stopped: no text that is there is asked for again.
"""
import argparse
import json
import math
import os
import re
import sys
import threading
import time
from collections import Counter
from http.client import HTTPException, InvalidURL
from itertools import islice, product
from multiprocessing.pool import ThreadPool
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from data.answers import MARKER, STRATEGIES, is_correct, number_behind  # noqa: E402
from data.files import Question, read_json, read_questions, read_rationales  # noqa: E402
from data.files import run_command  # noqa: E402
from data.hub import find_model  # noqa: E402
from sampler import KVCache, Student, generate, stream, use_device  # noqa: E402

START = b'{"id": '    # of every line that is written
NEXT = "\nQuestion:"  # a teacher that goes on with a question of its own is cut there
# What may close a display or a fence with the final answer in it.
CLOSING = re.compile(r"(?:\s*(?:\\\]|\$\$|```|~~~))?")
MOST_MARKERS = 20   # of a text that says "Final answer:" all the time, and never a number
LOOK_EVERY = 16     # ids of a text: then it is read to see whether it is over
TRIAL_STEPS = 4
MOST_SKIPPED = 20   # first requests without one text: then all would be refused
FINISHED = ("stop", "eos", "eos_token", "end_turn", "stop_sequence")  # finish_reason: a whole text

THOUGHTS = re.compile(  # in tags; or in a channel, as gpt-oss has it
    r"\A.*(?:</think(?:ing)?>|\[/THINK\]|<\|channel\|>final<\|message\|>)"
    r"|(?:<think(?:ing)?>|\[THINK\]|<\|channel\|>analysis).*", re.DOTALL)
CONTROL = r"<[|｜][^<>\n]{1,40}[|｜]>|</?s>|<(?:bos|eos|pad|start_of_turn|end_of_turn|/answer)>"
ROLE = r"(?:assistant|model)(?=\n|<)"
# "**Answer:**", "[cot]:"; but not "answer: int = 3", which is Python
LABEL = r"[#*_]*answer[*_]*:(?! *(?:int|float|Fraction) *=)[*_]*|<answer>|\[\w+\]:"
START_OF_TEXT = re.compile(rf"(?:\s*(?:{CONTROL}|{ROLE}|{LABEL}))*", re.IGNORECASE)
# A program in a fence. Before it may stand the name of a language.
FENCED = re.compile(r"(`{3,9}|~{3,9}) *(?:py\w*|\w*(?=\s*\n))?(.*?)(?:\1|\Z)", re.DOTALL | re.I)
SETS_ANSWER = re.compile(r"(?:^|;)[ \t]*answer *(?::[^=\n]{1,40})?=(?!=)", re.MULTILINE)


class Answer(NamedTuple):
    """What server and checkpoint give for each text that is asked for."""
    question: Question
    strategy: str
    text: str = ""
    finished: bool = True
    tokens: int = 0    # used
    problem: str = ""  # why there is no text


def examples(strategy: str) -> str:
    return (HERE / "prompts" / f"{strategy}.txt").read_text(encoding="utf-8")


def query(question) -> str:
    return f"Question: {question.text}\nAnswer:"


def end_of_answer(strategy: str, text: str) -> int:
    """The place behind the first line that gives a final answer; without one, the text's end."""
    if strategy != "pot":  # a program's answer is its last value
        for marker in islice(MARKER.finditer(text), MOST_MARKERS):
            number, end = number_behind(text, marker)
            if number is not None:
                return CLOSING.match(text, end).end()  # a later one may be of another question
    return len(text)


def is_over(strategy: str, text: str) -> bool:
    """Does the text go on behind its final answer, or to a question of its own? Then it was whole
    before."""
    text = THOUGHTS.sub("", text)
    behind = text[end_of_answer(strategy, text):].strip()
    return NEXT in text or len(behind) > 3  # not just the beginning of what closes a display


def clean(strategy: str, text: str) -> str:
    """A teacher's text without thoughts, a repeated "Answer:", all from a control token or further
    question on, all behind the final answer; of several programs the last that sets `answer`."""
    text = THOUGHTS.sub("", text)
    text = text[START_OF_TEXT.match(text).end():]
    text = re.split(CONTROL, text, maxsplit=1)[0].partition(NEXT)[0].rstrip()
    for length in range(2, len(NEXT)):  # a server may leave half of its stop string
        text = text.removesuffix(NEXT[:length])
    if strategy != "pot":
        return text[:end_of_answer(strategy, text)].strip()
    programs = [match[2] for match in FENCED.finditer(text)] or [text]
    programs = [dedent(program).strip() for program in programs]
    complete = [program for program in programs if SETS_ANSWER.search(program)]
    return (complete or programs)[-1]


# --------------------------------------------------------------------------------------------------
# a server


def make_request(args, prompt: str, seed: int) -> Request:
    address = args.url.rstrip("/") + "/chat/completions"
    body = {"messages": [{"role": "user", "content": prompt}]}
    if args.completions:
        address = args.url.rstrip("/") + "/completions"
        body = {"prompt": prompt}
    body |= {"model": args.model, "temperature": args.temperature, "seed": seed,
             "max_tokens": args.max_new_tokens, "stop": [NEXT]} | args.extra
    body = {name: value for name, value in body.items() if value is not None}
    headers = {"Content-Type": "application/json", "User-Agent": "siked-teacher/1.0"}
    key = os.environ.get(args.key_variable, "").strip()
    if key:
        headers["Authorization"] = f"Bearer {key}"
    return Request(address, json.dumps(body).encode(), headers)


def post(request: Request, timeout: float):
    """(status, headers, content) of the answer, whatever its status."""
    try:
        response = urlopen(request, timeout=timeout)
    except HTTPError as error:
        response = error  # which is an answer all the same
    with response:
        return response.status, response.headers, response.read()


def ask(args, question, strategy: str, seed: int, stopping: threading.Event) -> Answer:
    """One text, by up to --attempts requests. OSError ends the whole collection.

    Errors of the network, time-outs, 408, 429 and 5xx are tried again after waits that double, up
    to a minute; Retry-After may make one longer, up to ten. After 400, 413, 422 there is no text.
    """
    request = make_request(args, examples(strategy) + query(question), seed)
    address = request.full_url
    for attempt in range(args.attempts):
        pause = min(60, 2 ** attempt)  # seconds
        try:
            status, headers, content = post(request, args.timeout)
        except (InvalidURL, ValueError) as error:  # of the address or the key: it stays
            raise OSError(f"{address}: {error}") from None
        except (OSError, HTTPException) as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            if status == 200:
                return Answer(question, strategy, *read_answer(content, strategy))
            problem = f"{status}: {beginning(content)}"
            if status in (400, 413, 422):  # of this question: filtered, or too long
                return Answer(question, strategy, problem=problem)
            if status < 500 and status not in (408, 429):
                raise OSError(f"{address}: {problem}")
            asked = headers.get("Retry-After", "")
            if asked.isdecimal():
                pause = min(max(pause, int(asked)), 600)
        if attempt + 1 == args.attempts:
            break
        if attempt == 2:  # it lasts; a full queue would have been short
            tqdm.write(f"{address}: {problem}; it is asked again", file=sys.stderr)
        if stopping.wait(pause):
            break
    raise OSError(f"{address}: {attempt + 1} attempts, the last one: {problem}")


def read_answer(content: bytes, strategy: str):
    """(text, finished, tokens, problem) of an Answer."""
    try:
        answer = json.loads(content)
        choice = answer["choices"][0]
        message = choice.get("message") or {}
        text = choice.get("text") or message.get("content") or ""
        if isinstance(text, list):  # of parts: thoughts and text
            text = "".join(part.get("text", "") for part in text if part.get("type") == "text")
        # Half of a surrogate pair cannot be written as UTF-8.
        text = re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)
        reason = choice.get("finish_reason")
        used = int((answer.get("usage") or {}).get("total_tokens") or 0)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return "", False, 0, f"not an answer: {beginning(content)}"
    cleaned = clean(strategy, text)
    if not cleaned:
        others = [name for name in message if message[name] and name not in ("role", "content")]
        found = " and ".join(others) or "nothing else"
        problem = (f"no text, finish_reason {reason!r}, there is {found}. A teacher that thinks "
                   f"before it answers needs a larger --max-new-tokens: {beginning(content)}")
        return "", False, used, problem
    # Not is_over: a thought that was cut off, its opening tag left out, may hold a final answer.
    finished = reason in FINISHED or NEXT in THOUGHTS.sub("", text)
    return cleaned, finished, used, ""


def beginning(content: bytes) -> str:
    return " ".join(content[:300].decode(errors="replace").split())


def ask_server(args, jobs, n_there: int):
    """Yields an Answer for each job, in the order in which they come. Stopped, it also yields those
    to requests that are under way, since they are paid for.

    n_there: texts that are there already. Each start has another seed, or a question would get the
    texts again that it got before a stop.
    """
    seed = args.seed + n_there
    stopping = threading.Event()

    def work(job):
        question, strategy, k = job
        if stopping.is_set():
            return None
        try:
            return ask(args, question, strategy, seed + k, stopping)
        except Exception as error:
            return error

    n_texts = n_there
    with ThreadPool(args.in_flight) as pool:  # of daemons: a second Ctrl-C need not wait for them
        answers = pool.imap_unordered(work, jobs)
        try:
            for number, answer in enumerate(answers, start=1):
                if isinstance(answer, Exception):
                    raise answer
                yield answer
                n_texts += bool(answer.text)
                if number == MOST_SKIPPED and n_texts == 0:
                    raise OSError(f"{args.url}: {number} requests and no text; the last: "
                                  f"{answer.problem}")
        except (Exception, KeyboardInterrupt):
            stopping.set()
            print("\nstopping after the requests under way (Ctrl-C: at once)", file=sys.stderr)
            yield from (answer for answer in answers if isinstance(answer, Answer))
            raise


# --------------------------------------------------------------------------------------------------
# a checkpoint


class Teacher(Student):
    """A checkpoint that goes on with the worked examples. They are the stem of a prompt: `stream`
    feeds them once for all questions of a strategy, or twice where two strategies meet."""

    def __init__(self, *settings):
        super().__init__(*settings)
        first = self.first_ids()
        self.stems = {name: first + self.encode(examples(name)) for name in STRATEGIES}
        # Any control token ends a text: a chat model closes this one not with its <|im_end|>, but
        # with its <|endoftext|>, which its eos_token_id may leave out.
        V = self.model.config.vocab_size  # some tokenizers know more: Gemma 3's, of a picture
        self.stop_ids += [id for id in self.specials.values() if id < V]

    def prompt(self, question, strategy=None):
        return self.stems[strategy], self.encode(query(question))


def ask_checkpoint(args, jobs, n_there: int):
    """The same from a local model, --rows texts at a time. A stop loses only those."""
    seed = args.seed + n_there
    folder = find_model(args.model)
    fields = read_json(folder / "config.json")
    stored = fields.get("dtype") or fields.get("torch_dtype")
    dtype = getattr(torch, args.dtype or ("bfloat16" if stored == "bfloat16" else "float32"))
    teacher = Teacher(folder, args.max_new_tokens, args.rows, dtype, args.device, dtype)
    jobs = leave_out_long(teacher, jobs)
    if jobs:
        announce(teacher, args, jobs)
    for k in sorted({k for *_, k in jobs}):  # apart: equal prompts would get equal texts
        group = [job for job in jobs if job[2] == k]
        prompts = [teacher.prompt(question, strategy) for question, strategy, _ in group]

        def ends(i, ids):
            strategy = group[i][1]
            return len(ids) % LOOK_EVERY == 0 and is_over(strategy, teacher.tokenizer.decode(ids))

        texts = stream(teacher.model, prompts, max_new_tokens=args.max_new_tokens,
                       temperature=args.temperature, stop_ids=teacher.stop_ids, seed=seed + k,
                       batch_size=args.rows, n_ids=teacher.n_ids, is_over=ends)
        for i, _, ids in texts:
            question, strategy, _ = group[i]
            text = teacher.tokenizer.decode(ids)
            cleaned = clean(strategy, text)
            finished = len(ids) < args.max_new_tokens or is_over(strategy, text)
            problem = "" if cleaned else f"no text in {text[:80]!r}"
            yield Answer(question, strategy, cleaned, finished, len(ids), problem)


def leave_out_long(teacher, jobs):
    """The jobs whose prompt and text fit the teacher; names some of the others."""
    room = teacher.model.config.max_position_embeddings - teacher.max_new_tokens
    kept = []
    long = []
    for question, strategy, k in jobs:
        length = sum(map(len, teacher.prompt(question, strategy)))
        if length <= room:
            kept.append((question, strategy, k))
        else:
            long.append(f"{question.id} [{strategy}]: its prompt has {length} tokens")
    name_some(long, f"texts are left out; with --max-new-tokens {teacher.max_new_tokens} there is "
                    f"room for prompts of {room}")
    return kept


def announce(teacher, args, jobs):
    """Says what the texts will need: memory computed, time from a trial of some steps."""
    model = teacher.model
    question, strategy, _ = jobs[0]
    stem, tail = teacher.prompt(question, strategy)
    rows = min(args.rows, len(jobs))
    length = 2 * len(stem + tail) + args.max_new_tokens  # prompts have a cache of their own
    like = model.output_weight().to("meta")  # shapes without memory
    caches = sum(layer.nbytes for layer in KVCache(model.config, rows, length, like).layers)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    print(f"{args.model}, {str(like.dtype).removeprefix('torch.')}: {weights / 1e9:.1f} GB of "
          f"weights, {caches / 1e9:.1f} GB of keys and values")
    started = time.time()
    generate(model, [[0]] * rows, max_new_tokens=TRIAL_STEPS, stop_ids=[], batch_size=rows)
    step = (time.time() - started) / (TRIAL_STEPS + 1)  # the prompts take one, too
    steps = len(stem) / rows + len(tail) + args.max_new_tokens
    minutes = math.ceil(len(jobs) / rows) * steps * step / 60
    print(f"{len(jobs)} texts of at most {args.max_new_tokens} tokens, {rows} at once: about "
          f"{minutes:.0f} minutes")


def mend(path: Path) -> None:
    """Cuts off a last line that a kill has left half written; ends one that is whole."""
    with open(path, "rb+") as file:
        last = file.read().rpartition(b"\n")[2]
        try:
            if last:
                json.loads(last)
                file.write(b"\n")
        except ValueError:
            if not last.startswith(START[:len(last)]):
                raise ValueError(f"{path}: the last line is not one that this program began; is it "
                                 "another file?") from None
            file.truncate(file.tell() - len(last))
            print(f"{path}: the last line was not whole, and is cut off: {last[:80]!r}")


FLAGS = (  # name, default, least value, meaning
    ("--samples", 10, 1, "texts per question and strategy"),
    ("--temperature", 0.7, 0, "0: always the likeliest token"),
    ("--max-new-tokens", 512, 1, "of a text; a teacher that thinks first needs thousands"),
    ("--in-flight", 8, 1, "server: requests at a time"),
    ("--timeout", 120.0, 1e-3, "server: seconds to wait for an answer"),
    ("--attempts", 8, 1, "server: per text; the waits between them grow, two minutes for 8"),
    ("--rows", 48, 1, "checkpoint: texts written at once"),
    ("--seed", 0, 0, "of the texts"),
)


def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--questions", type=Path, required=True, help="JSON lines of id, question, answer")
    add("--out", type=Path, help="where to append [teacher.jsonl beside the questions]")
    add("--url", help="of an OpenAI-compatible server, up to /v1 [none: --model is a checkpoint]")
    add("--model", required=True, help="name on the server; or a folder, or owner/name on the hub")
    for name, default, _, meaning in FLAGS:
        add(name, type=type(default), default=default, help=f"{meaning} [{default}]")
    add("--completions", action="store_true", help="no chat: for a base model without a template")
    add("--key-variable", default="OPENAI_API_KEY", help="variable with the key [OPENAI_API_KEY]")
    add("--extra", type=json.loads, default={}, metavar="JSON",
        help="further fields of a request; null leaves one out: "
             """'{"max_tokens": null, "max_completion_tokens": 512}'""")
    add("--device", default=device, help=f"checkpoint: cpu or cuda [{device}]")
    add("--dtype", choices=("float32", "bfloat16"), help="checkpoint: bfloat16 if stored so")
    args = parser.parse_args(argv)
    if args.url and not args.url.startswith(("http://", "https://")):
        parser.error(f"--url {args.url}: it does not begin with http:// or https://")
    if not isinstance(args.extra, dict):
        parser.error(f"--extra {args.extra}: it is not a JSON object")
    for name, _, least, _ in FLAGS:
        value = getattr(args, name[2:].replace("-", "_"))
        if not least <= value < math.inf:
            parser.error(f"{name} {value}: must be at least {least}, and finite")
    return args


def list_jobs(args, questions, rationales):
    """(question, strategy, k) for each text that is missing. Those with equal worked examples are
    neighbours: a server, too, may feed these once."""
    n_there = Counter((rationale.id, rationale.strategy) for rationale in rationales)
    jobs = []
    for k, strategy, question in product(range(args.samples), STRATEGIES, questions):
        if k >= n_there[question.id, strategy]:
            jobs.append((question, strategy, k))
    return jobs


def name_some(problems: list[str], what: str):
    if problems:
        print("\n".join([f"{len(problems)} {what}", *problems[:5]]))


def collect(args, jobs, n_there: int, out: Path) -> int:
    """Appends each text as it comes, and names some of those that do not. Returns the tokens."""
    ask_teacher = ask_server if args.url else ask_checkpoint
    n_tokens = 0
    problems = []
    bar = tqdm(total=len(jobs), unit="text", disable=None)
    try:
        with open(out, "a", encoding="utf-8") as file, bar:
            for answer in ask_teacher(args, jobs, n_there):
                question, strategy, text, finished, used, problem = answer
                n_tokens += used
                if problem:
                    problems.append(f"{question.id} [{strategy}]: {problem}")
                    continue
                record = {"id": question.id, "strategy": strategy, "text": text}
                if not finished:
                    record["finished"] = False
                file.write(json.dumps(record) + "\n")
                file.flush()
                bar.update()
                bar.set_postfix_str(f"{n_tokens:,} tokens")
    finally:  # also if it is stopped
        name_some(problems, "requests were refused or brought no text. The same command asks for "
                            "them again; where it wrote nothing else, it needs another --seed:")
    return n_tokens


def main() -> None:
    args = parse_args()
    if not args.url:
        use_device(args.device)
    for strategy in STRATEGIES:
        examples(strategy)  # a file that is missing is named now, not after hours
    questions = read_questions(args.questions)
    out = args.out or args.questions.with_name("teacher.jsonl")
    there = []
    if out.exists():
        mend(out)
        there = read_rationales(out, questions)
    jobs = list_jobs(args, questions, there)
    print(f"{out}: {len(there)} texts are there, {len(jobs)} to come")
    n_tokens = collect(args, jobs, len(there), out) if jobs else 0  # else: read no weights
    there = read_rationales(out, questions)
    if jobs and not there:
        raise ValueError(f"{out}: not one text was collected")
    gold = {question.id: question.answer for question in questions}
    figures = []
    for strategy in STRATEGIES:
        right = [is_correct(strategy, rationale.text, gold[rationale.id])
                 for rationale in there if rationale.strategy == strategy]
        share = sum(right) / max(len(right), 1)
        figures.append(f"{strategy} {sum(right)} of {len(right)} ({share:.0%})")
    print(f"{n_tokens:,} tokens used; correct: {', '.join(figures)}")


if __name__ == "__main__":
    run_command(main)
