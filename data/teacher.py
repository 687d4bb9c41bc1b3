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
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from siked import STRATEGIES, Student, is_correct, read_questions, read_rationales  # noqa: E402

NEXT = "\nQuestion:"  # a teacher that goes on with a question of its own is cut there


def write_prompt(strategy: str, question) -> str:
    examples = (HERE / "prompts" / f"{strategy}.txt").read_text(encoding="utf-8")
    return f"{examples}Question: {question.text}\nAnswer:"


def clean(text: str) -> str:
    """Without what follows the answer, and without the fence that chat models put around a program."""
    text = text.partition(NEXT)[0]
    fenced = re.search(r"```(?:python)?\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return (fenced[1] if fenced else text).strip()


# ---------------------------------------------------------------------------------------------------------------------
# a server


class Refused(Exception):
    """The server will not answer this request, however often it is asked."""


def ask(args, prompt: str, seed: int) -> tuple[str, bool, int]:
    """One request to an OpenAI-compatible server: (text, finished, tokens used).

    Errors of the network, time-outs, 429 and 5xx are tried again after waits that double, or after what the server's
    Retry-After asks for; so are answers that are not what the protocol promises. Refused says what the last one was.
    """
    body = {"prompt": prompt} if args.completions else {"messages": [{"role": "user", "content": prompt}]}
    body |= {"model": args.model, "temperature": args.temperature, "max_tokens": args.max_new_tokens, "seed": seed,
             "stop": [NEXT]}
    headers = {"Content-Type": "application/json"}
    if os.environ.get(args.key_variable):
        headers["Authorization"] = f"Bearer {os.environ[args.key_variable]}"
    address = args.url.rstrip("/") + ("/completions" if args.completions else "/chat/completions")
    for attempt in range(args.attempts):
        pause = min(60, 2 ** attempt)  # seconds
        try:
            request = urllib.request.Request(address, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=args.timeout) as response:
                answer = json.load(response)
            choice = answer["choices"][0]
            text = (choice["text"] if args.completions else choice["message"]["content"]) or ""
            return clean(text), choice.get("finish_reason") != "length", (answer.get("usage") or {}).get("total_tokens", 0)
        except urllib.error.HTTPError as error:
            problem = f"{error.code} {error.reason}: {error.read(300).decode(errors='replace')}"
            if error.code != 429 and error.code < 500:
                raise Refused(f"{address}: {problem}") from None
            asked = error.headers.get("Retry-After", "")
            pause = float(asked) if asked.isdecimal() else pause
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # no answer, or none that we know
            problem = f"{type(error).__name__}: {error}"
        if attempt + 1 < args.attempts:
            time.sleep(pause)
    raise Refused(f"{address}: {args.attempts} attempts, the last one: {problem}")


def ask_server(args, jobs):
    """Yields (question, strategy, text, finished, tokens) in the order in which the answers come."""
    jobs, running = iter(jobs), {}
    with ThreadPoolExecutor(args.in_flight) as pool:
        try:
            while True:
                for question, strategy, k in jobs:
                    running[pool.submit(ask, args, write_prompt(strategy, question), args.seed + k)] = question, strategy
                    if len(running) >= 2 * args.in_flight:
                        break
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield *running.pop(future), *future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# ---------------------------------------------------------------------------------------------------------------------
# a checkpoint


def ask_checkpoint(args, jobs, seed: int):
    """The same from a local model: some questions at a time, so that a stop loses little.

    seed: another one for every start, or a question would get the texts again that it got before a stop.
    """
    teacher = Student.load(args.model, args.max_new_tokens, args.rows, device=args.device)
    jobs = list(jobs)
    for start in tqdm(range(0, len(jobs), args.rows), desc="batches", disable=None, leave=False):
        part = jobs[start:start + args.rows]
        prompts = [teacher.tokenizer.encode(write_prompt(strategy, question)).ids for question, strategy, _ in part]
        texts = teacher.answer(prompts, seed=seed + start, temperature=args.temperature)
        for (question, strategy, _), [(text, finished)] in zip(part, texts):
            yield question, strategy, clean(text), finished or NEXT in text, len(teacher.encode(text))


# ---------------------------------------------------------------------------------------------------------------------


def mend(path: Path) -> None:
    """Cuts off a last line that a kill has left half written."""
    if path.is_file():
        with open(path, "rb+") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--questions", type=Path, required=True, help="JSON lines of id, question, answer")
    add("--out", type=Path, help="where to append (teacher.jsonl beside the questions)")
    add("--url", help="of an OpenAI-compatible server, up to /v1; without it --model is a local checkpoint folder")
    add("--model", required=True, help="its name on the server, or a folder")
    add("--completions", action="store_true", help="ask for completions, not chat: a base model without a chat template")
    add("--key-variable", default="OPENAI_API_KEY", help="environment variable with the server's key (OPENAI_API_KEY)")
    add("--samples", type=int, default=10, help="texts per question and strategy (10, as in the paper)")
    add("--temperature", type=float, default=0.7, help="(0.7, as in the paper)")
    add("--max-new-tokens", type=int, default=512, help="of a text (512)")
    add("--in-flight", type=int, default=8, help="requests at a time (8)")
    add("--timeout", type=float, default=120, help="seconds to wait for an answer (120)")
    add("--attempts", type=int, default=6, help="per request, with growing waits between them (6)")
    add("--rows", type=int, default=32, help="local checkpoint: texts generated at once (32)")
    add("--device", default="cpu", help="local checkpoint: cpu or cuda (cpu)")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    questions = read_questions(args.questions)
    out = args.out or args.questions.with_name("teacher.jsonl")
    mend(out)
    there = read_rationales(out, questions) if out.exists() else []
    n_there, by_id = Counter((r.id, r.strategy) for r in there), {question.id: question for question in questions}
    written, correct = Counter(r.strategy for r in there), Counter(
        r.strategy for r in there if is_correct(by_id[r.id], r.strategy, r.text))
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
            correct[strategy] += is_correct(question, strategy, text)
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
        print("\nteacher.py: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
