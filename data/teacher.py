"""Collects rationales from a real teacher: step 0 of the README, for questions of your own.

    export OPENAI_API_KEY=...       # only where the server wants one; --key-variable names another variable
    python data/teacher.py --questions FOLDER/train.jsonl --url http://localhost:8000/v1 --model NAME
    python data/teacher.py --questions FOLDER/train.jsonl --model CHECKPOINT_FOLDER      # without a server, slowly

Writes teacher.jsonl beside the questions: for each question and strategy --samples texts, right and wrong alike; train.py
filters them. The prompt is data/prompts/STRATEGY.txt, eight worked examples, and the question. Every answer is appended
as it comes, and the same command goes on where it was stopped: no answer is asked for twice.
"""
import argparse
import json
import os
import re
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, as_completed, wait
from http.client import HTTPException
from pathlib import Path

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from data.answers import STRATEGIES, is_correct  # noqa: E402
from data.files import read_questions, read_rationales  # noqa: E402
from sampler import Student  # noqa: E402

START = b'{"id": '        # of every line that is written
NEXT = "\nQuestion:"  # a teacher that goes on with a question of its own is cut there


def write_prompt(strategy: str, question) -> str:
    examples = (HERE / "prompts" / f"{strategy}.txt").read_text(encoding="utf-8")
    return f"{examples}Question: {question.text}\nAnswer:"


def clean(strategy: str, text: str) -> str:
    """Without what follows the answer, and without the fence that chat models put around a program."""
    text = text.partition(NEXT)[0]
    fenced = re.search(r"```[^\n]*\n(.*?)(?:```|\Z)", text, re.DOTALL) if strategy == "pot" else None
    return (fenced[1] if fenced else text).strip()


# ---------------------------------------------------------------------------------------------------------------------
# a server


class Refused(Exception):
    """The server will not answer, however often it is asked."""


class Skipped(Refused):
    """It will not answer this one request: a content filter, or a question that is too long."""


def post(address: str, body: dict, headers: dict, timeout: float):
    """(status, headers, content) of the answer, whatever its status."""
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        response = error  # which is an answer all the same
    with response:
        return response.status, response.headers, response.read()


def ask(args, prompt: str, strategy: str, seed: int, stopping: threading.Event) -> tuple[str, bool, int]:
    """One request to an OpenAI-compatible server: (text, finished, tokens used).

    Errors of the network, time-outs, 408, 429 and 5xx are tried again after waits that double, or that are as long as
    the server's Retry-After asks; so are answers that are not what the protocol promises. Refused says what the last was.
    """
    body = {"prompt": prompt} if args.completions else {"messages": [{"role": "user", "content": prompt}]}
    body |= {"model": args.model, "temperature": args.temperature, "max_tokens": args.max_new_tokens, "seed": seed,
             "stop": [NEXT]} | args.extra
    body = {name: value for name, value in body.items() if value is not None}
    key = os.environ.get(args.key_variable, "").strip()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    address = args.url.rstrip("/") + ("/completions" if args.completions else "/chat/completions")
    for attempt in range(args.attempts):
        pause = min(60, 2 ** attempt)  # seconds
        try:
            status, answered, content = post(address, body, headers, args.timeout)
            if status == 200:
                answer = json.loads(content)
                choice = answer["choices"][0]
                text = (choice["text"] if args.completions else choice["message"]["content"]) or ""
                used = (answer.get("usage") or {}).get("total_tokens") or 0
                return clean(strategy, text), choice.get("finish_reason") != "length", used
            problem = f"{status}: {content[:300].decode(errors='replace')}"
            if status < 500 and status not in (408, 429):
                raise (Skipped if status in (400, 413, 422) else Refused)(f"{address}: {problem}")
            if (asked := answered.get("Retry-After", "")).isdecimal():
                pause = min(max(pause, int(asked)), 600)
        except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"  # no answer, or none that we know
        if attempt + 1 == args.attempts or stopping.wait(pause):
            break
    raise Refused(f"{address}: {attempt + 1} attempts, the last one: {problem}")


def ask_server(args, jobs):
    """Yields (question, strategy, text, finished, tokens) in the order in which the answers come; those to requests that
    are under way when it is stopped too, since they are paid for."""
    jobs, running, skipped, n_answers, stopping = iter(jobs), {}, [], 0, threading.Event()
    pool = ThreadPoolExecutor(args.in_flight)
    try:
        while True:
            for question, strategy, k in jobs:
                future = pool.submit(ask, args, write_prompt(strategy, question), strategy, args.seed + k, stopping)
                running[future] = question, strategy
                if len(running) >= 2 * args.in_flight:
                    break
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                try:
                    answer = future.result()
                except Skipped as error:
                    skipped.append(error)
                    if len(skipped) == 20 and not n_answers:
                        raise
                else:
                    n_answers += 1
                    yield *job, *answer
        if skipped:
            print(f"{len(skipped)} requests were refused, and are asked again next time; the first: {skipped[0]}")
    except (KeyboardInterrupt, Refused):
        stopping.set()
        under_way = {future: job for future, job in running.items() if not future.cancel()}
        print(f"\nstopping: {len(under_way)} requests are under way (Ctrl-C: without their answers)", file=sys.stderr)
        for future in as_completed(under_way):
            if not future.exception():
                yield *under_way[future], *future.result()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# a checkpoint


class Teacher(Student):
    def prompt(self, question, strategy=None):
        ids = self.tokenizer.encode(write_prompt(strategy, question)).ids
        return ids[:-1], ids[-1:]


def ask_checkpoint(args, jobs, seed: int):
    """The same from a local model: some questions at a time, so that a stop loses little.

    seed: another one for every start, or a question would get the texts again that it got before a stop.
    """
    teacher = Teacher(args.model, args.max_new_tokens, args.rows, device=args.device)
    while jobs:  # a batch does not reach into the next round: there stand the same prompts, which would get equal texts
        part = [job for job in jobs[:args.rows] if job[2] == jobs[0][2]]
        asked = [(question, strategy) for question, strategy, _ in part]
        texts = teacher.answer(asked, seed=seed, temperature=args.temperature)
        for (question, strategy, _), [(text, finished)] in zip(part, texts):
            yield question, strategy, clean(strategy, text), finished or NEXT in text, len(teacher.encode(text))
        jobs, seed = jobs[len(part):], seed + len(part)


# ---------------------------------------------------------------------------------------------------------------------


def mend(path: Path) -> None:
    """Cuts off a last line that a kill has left half written; ends one that is whole."""
    with open(path, "rb+") as file:
        content = file.read()
        last = content[content.rfind(b"\n") + 1:]
        try:
            file.write(b"\n" if last and json.loads(last) else b"")
        except ValueError:
            if not last.startswith(START[:len(last)]):
                raise ValueError(f"{path}: the last line is not one that this program began; is it another file?") from None
            file.truncate(len(content) - len(last))
            print(f"{path}: the last line was not whole, and is cut off: {last[:80]!r}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--questions", type=Path, required=True, help="JSON lines of id, question, answer")
    add("--out", type=Path, help="where to append (teacher.jsonl beside the questions)")
    add("--url", help="of an OpenAI-compatible server, up to /v1; without it --model is a local checkpoint folder")
    add("--model", required=True, help="its name on the server, or a folder")
    add("--completions", action="store_true", help="ask for completions, not chat: a base model without a chat template")
    add("--key-variable", default="OPENAI_API_KEY", help="environment variable with the server's key (OPENAI_API_KEY)")
    add("--extra", type=json.loads, default={}, metavar="JSON", help="further fields of a request; null leaves one out: "
        """'{"max_tokens": null, "max_completion_tokens": 512}'""")
    add("--samples", type=int, default=10, help="texts per question and strategy (10, as in the paper)")
    add("--temperature", type=float, default=0.7, help="(0.7, as in the paper)")
    add("--max-new-tokens", type=int, default=512, help="of a text (512)")
    add("--in-flight", type=int, default=8, help="requests at a time (8)")
    add("--timeout", type=float, default=120, help="seconds to wait for an answer (120)")
    add("--attempts", type=int, default=8, help="per request, with growing waits between them: two minutes in all (8)")
    add("--rows", type=int, default=32, help="local checkpoint: texts generated at once (32)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="local checkpoint: cpu or cuda")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.url and not args.url.startswith(("http://", "https://")):
        parser.error(f"--url {args.url}: it does not begin with http:// or https://")
    if not isinstance(args.extra, dict):
        parser.error(f"--extra {args.extra}: it is not a JSON object")
    if low := [f"--{name.replace('_', '-')}" for name in ("samples", "max_new_tokens", "in_flight", "attempts", "rows")
               if getattr(args, name) < 1]:
        parser.error(f"{', '.join(low)}: must be at least 1")
    return args


def main() -> None:
    args = parse_args()
    questions = read_questions(args.questions)
    out = args.out or args.questions.with_name("teacher.jsonl")
    if out.exists():
        mend(out)
    there = read_rationales(out, questions) if out.exists() else []
    n_there, by_id = Counter((r.id, r.strategy) for r in there), {question.id: question for question in questions}
    written, correct = Counter(r.strategy for r in there), Counter(
        r.strategy for r in there if is_correct(r.strategy, r.text, by_id[r.id].answer))
    jobs = [(question, strategy, k) for k in range(args.samples) for question in questions for strategy in STRATEGIES
            if k >= n_there[question.id, strategy]]
    print(f"{out}: {len(there)} texts are there, {len(jobs)} to come")
    answers = ask_server(args, jobs) if args.url else ask_checkpoint(args, jobs, args.seed + len(there))
    n_tokens = 0
    with open(out, "a", encoding="utf-8") as file, tqdm(total=len(jobs), unit="text", disable=None) as bar:
        for question, strategy, text, finished, used in answers:
            record = {"id": question.id, "strategy": strategy, "text": text} | ({} if finished else {"finished": False})
            file.write(json.dumps(record) + "\n")
            file.flush()
            n_tokens += used
            written[strategy] += 1
            correct[strategy] += is_correct(strategy, text, question.answer)
            bar.update()
            bar.set_postfix_str(f"{n_tokens:,} tokens")
    print(f"{n_tokens:,} tokens used; correct: " + ", ".join(
        f"{s} {correct[s]} of {written[s]} ({correct[s] / max(written[s], 1):.0%})" for s in STRATEGIES))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, Refused) as error:
        print(f"teacher.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nteacher.py: stopped; the same command goes on from here", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for requests that are still under way
