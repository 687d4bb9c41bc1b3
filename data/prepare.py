"""Turns the raw files of four public data sets into the files that train.py reads.

    python data/prepare.py gsm8k --out FOLDER          # fetches the files: train.jsonl, test.jsonl
    python data/prepare.py svamp --source SVAMP.json --out FOLDER   # from a file here: svamp.jsonl
    python data/prepare.py svamp --train 700 --out data/svamp       # split: train.jsonl, test.jsonl
    python data/prepare.py asdiv --draw 200 --out data/svamp        # a part of it: asdiv.jsonl

gsm8k is what the paper trains on; svamp, asdiv and multiarith are its out-of-distribution sets. A
question is left out, with the reason, where its answer is not one number. data.files.read_questions
reads the result.
"""
import argparse
import hashlib
import json
import random
import re
import sys
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.answers import parse_number  # noqa: E402
from data.files import read_questions, run_command, write_lines  # noqa: E402

# Raw files by their public address, at a fixed commit, with their SHA-256.
GITHUB = "https://raw.githubusercontent.com"
GSM8K = (f"{GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c"
         "/grade_school_math/data")
SVAMP = f"{GITHUB}/arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53"
ASDIV = f"{GITHUB}/chaochun/nlu-asdiv-dataset/883f90a9a65bf00304ba8f37423910fe743abc47"
MULTIARITH = (f"{GITHUB}/wangxr14/Algebraic-Word-Problem-Solver"
              "/d5d430d334b2be3c91aed5699b70b06b9a0c97ec")
ADDRESSES = {
    "gsm8k": {
        "train.jsonl": (f"{GSM8K}/train.jsonl",
                        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
        "test.jsonl": (f"{GSM8K}/test.jsonl",
                       "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14")},
    "svamp": {
        "svamp.jsonl": (f"{SVAMP}/SVAMP.json",
                        "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e")},
    "asdiv": {
        "asdiv.jsonl": (f"{ASDIV}/dataset/ASDiv.xml",
                        "ef8904068482919ac48c8eeaaf6df344b8a308ba66d048c2d4d87eab82dc4929")},
    "multiarith": {
        "multiarith.jsonl": (f"{MULTIARITH}/data/MultiArith.json",
                             "dc9db1b6cc68b1ecc2dec830d15aaf8c9a0932aa31d5ffce88ef3628179d36f4")},
}


# --------------------------------------------------------------------------------------------------
# one reader per format: the raw text -> (id, question, answer), all as texts, the answer as it is


def read_gsm8k(raw: str):
    lines = [line for line in raw.split("\n") if line.strip()]  # splitlines() also cuts at U+2028
    for number, line in enumerate(lines):
        record = json.loads(line)
        yield f"gsm8k-{number:04d}", record["question"], record["answer"].rpartition("####")[2]


def read_svamp(raw: str):
    for record in json.loads(raw):
        question = f"{record['Body'].strip()} {record['Question'].strip()}"
        yield str(record["ID"]), question, str(record["Answer"])


def read_asdiv(raw: str):
    for problem in ElementTree.fromstring(raw.encode()).iter("Problem"):
        answer = problem.findtext("Answer")
        answer = re.sub(r"\s*\([^()]*[^()\d/][^()]*\)$", "", answer)  # "9 (apples)" -> "9"
        question = f"{problem.findtext('Body').strip()} {problem.findtext('Question').strip()}"
        yield problem.attrib["ID"], question, answer


def read_multiarith(raw: str):
    for record in json.loads(raw):
        answer = "; ".join(map(str, record["lSolutions"]))
        yield f"multiarith-{record['iIndex']}", record["sQuestion"], answer


READERS = {"gsm8k": read_gsm8k, "svamp": read_svamp, "asdiv": read_asdiv,
           "multiarith": read_multiarith}


def prepare(name: str, raw: str, place: str) -> list[dict]:
    """The questions of one raw file whose answer is one number; prints what was left out.
    ValueError: a broken file."""
    questions = []
    left_out = defaultdict(list)  # reason -> answers
    count = 0
    try:
        for id, question, answer in READERS[name](raw):
            f"{id} {question}".encode()  # ValueError: half of a surrogate pair cannot be written
            answer = answer.strip().removesuffix(".0")
            if parse_number(answer) is not None:
                question = " ".join(question.split())
                questions.append({"id": id, "question": question, "answer": answer})
            elif ";" in answer:
                left_out["several numbers"].append(answer)
            elif ":" in answer:
                left_out["a time or a ratio"].append(answer)
            else:
                left_out["no number"].append(answer)
            count += 1
    except (ValueError, KeyError, TypeError, AttributeError, ElementTree.ParseError) as error:
        raise ValueError(f"{place}: not a raw file of {name}: record {count + 1}: "
                         f"{type(error).__name__}: {error}") from None
    if not questions:
        raise ValueError(f"{place}: no questions in it")
    print(f"{place}: {count} read, {len(questions)} kept, {count - len(questions)} left out")
    for reason, answers in left_out.items():
        print(f"  {len(answers)} {reason}, such as {', '.join(map(repr, answers[:5]))}")
    return questions


# --------------------------------------------------------------------------------------------------
# files


def fetch(address: str, digest: str) -> bytes:
    """Downloads a file with a progress bar. OSError: no answer; ValueError: it is not the file that
    we know."""
    with urllib.request.urlopen(address, timeout=60) as response:
        total = int(response.headers.get("Content-Length") or 0) or None
        parts = []
        file = address.rpartition("/")[2]
        with tqdm(total=total, desc=file, unit="B", unit_scale=True, disable=None) as bar:
            while part := response.read(1 << 16):
                parts.append(part)
                bar.update(len(part))
    content = b"".join(parts)
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise ValueError(f"{address}: the SHA-256 is {found}, not {digest}: the file has changed, "
                         "or the download is broken")
    return content


def parse_args():
    raw = argparse.RawDescriptionHelpFormatter  # shows the docstring as it is
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("name", choices=READERS)
    add("--source", type=Path,
        help="raw file; for gsm8k the folder with train.jsonl and test.jsonl")
    add("--train", type=int, metavar="N",
        help="svamp: the first N questions become train.jsonl, the others test.jsonl. "
             "(gsm8k is split; the other two are ordered by kind)")
    add("--draw", type=int, metavar="N",
        help="keep N questions of each file, drawn by random.Random(0).sample")
    add("--out", type=Path, required=True, help="folder to write to")
    args = parser.parse_args()
    if args.train is not None and args.name != "svamp":
        parser.error(f"--train {args.train}: only svamp can be cut, not {args.name}")
    if args.train is not None and args.draw is not None:
        parser.error(f"--draw {args.draw}: not with --train")
    return args


def check_no_leak(folder: Path, results: dict) -> None:
    """ValueError if a set to evaluate on would hold questions that this folder trains on."""
    path = folder / "train.jsonl"
    if "train.jsonl" in results or not path.exists():
        return
    trained = {question.text for question in read_questions(path)}
    for file, questions in results.items():
        if trained & {question["question"] for question in questions}:
            raise ValueError(f"{folder / file}: it would hold questions of {path}, which are "
                             "trained on; take another --out")


def main() -> None:
    args = parse_args()
    whole = args.out / "svamp.jsonl"
    if args.train is not None and whole.exists():
        raise ValueError(f"{whole}: it holds the questions to train on, and would be evaluated: "
                         "move it")
    results = {}  # file to write -> its questions
    for file, (address, digest) in ADDRESSES[args.name].items():
        place = args.source or address
        if args.source and args.name == "gsm8k":
            place = args.source / file
        raw = place.read_bytes() if args.source else fetch(address, digest)
        try:
            questions = prepare(args.name, raw.decode("utf-8-sig"), str(place))
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: not UTF-8: {error}") from None
        if args.draw is not None:
            if not 0 < args.draw <= len(questions):
                raise ValueError(f"--draw {args.draw}: must be between 1 and {len(questions)}, all "
                                 f"questions of {place}")
            questions = random.Random(0).sample(questions, args.draw)
        results[file] = questions
    if args.train is not None:
        [questions] = results.values()
        if not 0 < args.train < len(questions):
            raise ValueError(f"--train {args.train}: must be at least 1 and less than "
                             f"{len(questions)}, all questions")
        results = {"train.jsonl": questions[:args.train], "test.jsonl": questions[args.train:]}
    check_no_leak(args.out, results)
    for file, questions in results.items():  # only now, when all of the raw files have proved whole
        write_lines(args.out / file, questions)
        print(f"{args.out / file}: {len(questions)} questions")


if __name__ == "__main__":
    run_command(main)
