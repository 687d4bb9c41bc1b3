"""Files: questions and rationales, one JSON object a line; and results that are computed once.

Every file is written beside its place and then renamed, so that a kill leaves all of it or nothing.
A file that is there is complete. That is all the bookkeeping of a run: see `saved`, and the folders
that siked.siked gets.
"""
import hashlib
import json
import os
import random
import re
import sys
import zipfile
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from data.answers import STRATEGIES, parse_number
from data.hub import find_model

LONGEST_LINE = 10_000_000  # bytes of a data file; a longer line is no question


@dataclass(frozen=True)
class Question:
    id: str
    text: str
    answer: Fraction         # the gold answer
    kind: str = ""           # accuracy is also given by kind, where the data names one


@dataclass(frozen=True)
class Rationale:
    id: str                  # of its question
    strategy: str            # one of STRATEGIES
    text: str
    source: str = "teacher"  # or "student"
    finished: bool = True    # False: cut off by the token limit; never trained on, right or wrong


class Data(NamedTuple):
    questions: list[Question]         # to train on
    teacher: list[Rationale]          # for these questions, right and wrong alike (step 0)
    sets: dict[str, list[Question]]   # to evaluate on, by name


# --------------------------------------------------------------------------------------------------
# writing


def write_whole(path: Path, write) -> None:
    """Calls write(path of a part file), then renames that file to `path`. OSError names the file.

    Under torchrun several processes may write the same content to the same place. Each has a part
    file of its own.
    """
    part = path.with_name(f"{path.name}.{os.environ.get('RANK', 0)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # of Python, torch.save, safetensors
        reason = " ".join(str(error).split())
        raise OSError(f"{path} cannot be written: {reason}") from error
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_lines(path: Path, records) -> None:
    """JSON lines of dicts or dataclasses."""
    lines = []
    for record in records:
        if not isinstance(record, dict):
            record = asdict(record)
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def saved(path: Path, compute, *arguments):
    """The JSON value in this file. If there is none yet, compute(*arguments) is written first."""
    if not path.exists():
        write_text(path, json.dumps(compute(*arguments)))
    return json.loads(path.read_text(encoding="utf-8"))


def saved_rationales(path: Path, compute, *arguments) -> list[Rationale]:
    """The same for a list of rationales, one a line."""
    if not path.exists():
        write_lines(path, compute(*arguments))
    return [Rationale(**record) for _, record in read_lines(path)]


# --------------------------------------------------------------------------------------------------
# reading


def read_json(path: Path) -> dict:
    """ValueError if the file does not hold a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def read_lines(path: Path, required: tuple[str, ...] = ()):
    """Yields (place, dict) for every line. An error names the file, the line and what is wrong."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            place = f"{path}, line {number}"
            if len(line) > LONGEST_LINE:
                raise ValueError(f"{place}: longer than {LONGEST_LINE:,} bytes")
            if line.strip():
                yield place, read_record(line, place, required)


def read_record(line: bytes, place: str, required) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # bad JSON or bad UTF-8
        raise ValueError(f"{place}: not JSON: {error}") from None
    if isinstance(record, dict) and type(record.get("id")) is int:
        record["id"] = str(record["id"])
    for name in required:
        check_text(record, name, place)
    return record


def check_text(record, name: str, place: str) -> None:
    if not isinstance(record, dict) or not isinstance(record.get(name), str):
        raise ValueError(f"{place}: the field {name!r} is missing or not a text")
    if re.search("[\ud800-\udfff]", record[name]):  # no file of results could hold it
        raise ValueError(f"{place}: the field {name!r} holds a lone surrogate, half of a character")


def read_questions(path: Path) -> list[Question]:
    questions = {}
    for place, record in read_lines(Path(path), ("id", "question", "answer")):
        answer = parse_number(record["answer"])
        record.setdefault("kind", "")
        check_text(record, "kind", place)
        if answer is None:
            raise ValueError(f"{place}: the gold answer {record['answer']!r} is not a number")
        if not record["question"].strip():
            raise ValueError(f"{place}: the question is empty")
        if record["id"] in questions:
            raise ValueError(f"{place}: the id {record['id']!r} is there twice")
        questions[record["id"]] = Question(record["id"], record["question"], answer,
                                           record["kind"])
    if not questions:
        raise ValueError(f"{path}: no questions in it")
    return list(questions.values())


def read_rationales(path: Path, questions) -> list[Rationale]:
    """The rationales of a teacher.jsonl, self*.jsonl or mix.jsonl. Other fields are passed over."""
    known = {question.id for question in questions}
    names = [field.name for field in fields(Rationale)]
    rationales = []
    for place, record in read_lines(Path(path), ("id", "strategy", "text")):
        if record["strategy"] not in STRATEGIES:
            raise ValueError(f"{place}: the strategy {record['strategy']!r} is not one of "
                             f"{', '.join(STRATEGIES)}")
        if record["id"] not in known:
            raise ValueError(f"{place}: no question has the id {record['id']!r}; are these "
                             "rationales of another file?")
        if record.get("source", "teacher") not in ("teacher", "student"):
            raise ValueError(f"{place}: the field 'source' is neither 'teacher' nor 'student'")
        if record.get("finished", True) not in (True, False):
            raise ValueError(f"{place}: the field 'finished' is neither true nor false")
        rationales.append(Rationale(**{name: record[name] for name in names if name in record}))
    return rationales


def list_sets(folder: Path) -> list[Path]:
    """The data files of a folder. macOS may put a hidden ._train.jsonl beside train.jsonl, which
    holds no data."""
    return [path for path in sorted(folder.glob("*.jsonl")) if not path.name.startswith(".")]


def read_data(folder: Path, held_out: float, seed: int) -> Data:
    """Reads train.jsonl, teacher.jsonl, test.jsonl and any further set of a data folder.

    A share `held_out` of the training questions is never trained on: settings are chosen on it.
    """
    questions = read_questions(folder / "train.jsonl")
    teacher = read_rationales(folder / "teacher.jsonl", questions)
    if not teacher:
        raise ValueError(f"{folder / 'teacher.jsonl'}: no rationales in it")
    sets = {}
    if n_held_out := round(held_out * len(questions)):
        sets["held-out"] = random.Random(seed).sample(questions, n_held_out)
    sets["test"] = read_questions(folder / "test.jsonl")
    for path in list_sets(folder):  # out of distribution
        if path.stem == "held-out":
            raise ValueError(f"{path}: this name is taken by the held-out part of train.jsonl")
        if path.stem not in ("train", "teacher", "test"):
            sets[path.stem] = read_questions(path)
    out = {question.id for question in sets.get("held-out", [])}
    questions = [question for question in questions if question.id not in out]
    teacher = [rationale for rationale in teacher if rationale.id not in out]
    return Data(questions, teacher, sets)


# --------------------------------------------------------------------------------------------------
# the run folder


# These may change from one start of a run to the next. Of data and model the files are compared.
FREE = ("iters", "seeds", "compare", "out", "device", "rows", "save_minutes", "checkpointing",
        "data", "model", "preset", "command")


def open_run_folder(args):
    """Locks --out until this process ends, and writes args.json. ValueError if another process is
    at work there, or if the folder holds a run of other settings, data or weights."""
    if args.out.resolve() == args.data.resolve():
        raise ValueError(f"--out {args.out}: it is the folder of --data; take another")
    settings = {}
    for name, value in vars(args).items():
        settings[name] = str(value) if isinstance(value, Path) else value
    for path in list_sets(args.data):
        settings[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    settings["data"] = str(args.data.resolve())  # for a report that is made elsewhere
    model = find_model(args.model)
    for name in ("model*.safetensors", "tokenizer.json", "config.json", "generation_config.json"):
        for path in model.glob(name):
            settings[path.name] = fingerprint(path)
    args.out.mkdir(parents=True, exist_ok=True)
    locked = lock(args.out)
    if any(args.out.glob("seed-*/*/*")):
        check_settings(args.out, settings)
    settings["command"] = " ".join(sys.argv)
    write_text(args.out / "args.json", json.dumps(settings, indent=1) + "\n")
    return locked


def fingerprint(path: Path) -> str:
    """Of the size and three pieces of a file: to read all of some GB takes long, and other weights
    differ everywhere."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for place in (0, size // 2, size - 2 ** 16):
            file.seek(max(0, place))
            digest.update(file.read(2 ** 16))
    return digest.hexdigest()[:16]


def lock(folder: Path):
    file = (folder / "lock").open("w")
    try:
        import fcntl  # not on Windows, where nothing is locked
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError as error:
        raise ValueError(f"--out {folder}: another train.py is at work there "
                         f"({error.strerror})") from None
    return file


def check_settings(folder: Path, settings: dict) -> None:
    before = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    changed = []
    for name in before | settings:
        old = before.get(name)
        new = settings.get(name)
        if name in FREE or old == new:
            continue
        if name.endswith((".jsonl", ".json", ".safetensors")):
            changed.append(f"{name} was another file")
        else:
            changed.append(f"{name} was {old}, is {new}")
    if changed:
        raise ValueError(f"{folder} holds a run of other settings: {', '.join(changed)}. "
                         "Choose another --out, or delete the folder.")


def run_command(main) -> None:
    """Calls main(). A fault of its input ends it with one line and exit code 2, Ctrl-C with 130."""
    name = Path(sys.argv[0]).name
    if hasattr(sys.stdout, "reconfigure"):  # a pipe on Windows knows few characters
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: stopped; to go on, type the same command again", file=sys.stderr)
        sys.exit(130)


def load_training(path: Path, parameters: dict, optimizer) -> int:
    """Takes the weights and the optimizer's state of a killed training; returns the step to go on
    from. A file that is torn, or of another model, changes nothing: a line says so, and it is
    step 0. A kill tears none, but a copy that broke off or a power cut may."""
    import torch  # here, because data/report.py needs none
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load does not compare check sums
                raise ValueError
        state = torch.load(path, map_location="cpu")
        step = int(state["step"])
        weights = state["parameters"]
        for name, parameter in parameters.items():
            if weights[name].shape != parameter.shape:
                raise ValueError
        optimizer.load_state_dict(state["optimizer"])
    except MemoryError:
        raise
    except Exception:  # what is in such a file may raise anything
        print(f"{path}: torn, or of another model; this training begins again")
        return 0
    for name, parameter in parameters.items():
        parameter.data.copy_(weights[name])
    return step
