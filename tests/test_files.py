"""Tests of data/files.py:  python -m pytest tests/test_files.py

All files are written here. Nothing is trained, so that they take no second in all.
"""
import json
import subprocess
import sys
from argparse import Namespace
from fractions import Fraction
from pathlib import Path

import pytest
from safetensors import SafetensorError

from data import files
from data.files import (Question, Rationale, open_run_folder, read_data, read_json, read_questions,
                        read_rationales, saved, saved_rationales, write_lines, write_text,
                        write_whole)

ROOT = Path(__file__).resolve().parents[1]
ANN = Question("ann", "What is 3 + 4?", Fraction(7))
RATIONALES = [Rationale("ann", "pot", "# Äpfel\u2028\u0000\nanswer = 7", "student", False),
              Rationale("ann", "cot", "")]


def write_data(folder):
    """12 questions, 3 rationales for each, and two sets to evaluate on."""
    questions = [{"id": f"q{i}", "question": f"What is {i} + 1?", "answer": str(i + 1)}
                 for i in range(12)]
    write_lines(folder / "train.jsonl", questions)
    write_lines(folder / "test.jsonl", questions[:2])
    write_lines(folder / "other.jsonl", questions[2:5])
    write_lines(folder / "teacher.jsonl", [
        {"id": question["id"], "strategy": strategy, "text": "Final answer: 1"}
        for question in questions for strategy in ("cot", "l2m", "pot")])
    return folder


def test_example(tmp_path):
    """What it is for: the data of a run, and a result that is computed once."""
    data = read_data(write_data(tmp_path / "data"), held_out=0.25, seed=0)
    assert [len(data.questions), len(data.teacher)] == [9, 27]
    assert {name: len(asked) for name, asked in data.sets.items()} == {
        "held-out": 3, "test": 2, "other": 3}
    path = tmp_path / "out/sum.json"
    assert saved(path, sum, [3, 4]) == 7
    assert saved(path, pytest.fail) == 7  # read from the file


# --------------------------------------------------------------------------------------------------
# writing


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    """A full disk must not cost the metrics of the models before. No part file is left behind."""
    path = tmp_path / "metrics.jsonl"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half of the new text " * 1000 + "\ud800")
    assert path.read_text() == "old" and names_in(tmp_path) == ["metrics.jsonl"]

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match=f"{path} cannot be written: no space"):
        write_text(path, "new")
    assert path.read_text() == "old" and names_in(tmp_path) == ["metrics.jsonl"]
    monkeypatch.undo()
    write_text(path, "new")
    assert path.read_text() == "new" and names_in(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("error", [RuntimeError, SafetensorError])
def test_failure_of_other_writers_is_an_os_error(tmp_path, error):
    """torch.save and safetensors have errors of their own, of several lines. train.py prints one
    line, with the file's name."""
    def write(part):
        part.write_text("half")
        raise error("no space\n  left")

    with pytest.raises(OSError, match=f"{tmp_path / 'a'} cannot be written: no space left$"):
        write_whole(tmp_path / "a", write)
    assert names_in(tmp_path) == []


def test_a_kill_in_a_write_leaves_the_old_file(tmp_path):
    """SIGKILL leaves no time to clean up: the part file stays, and is in nobody's way."""
    path = tmp_path / "a.json"
    write_text(path, "old")
    code = ("import os, sys\nfrom pathlib import Path\nfrom data.files import write_whole\n"
            "def write(part):\n    part.write_text('half')\n    os.kill(os.getpid(), 9)\n"
            "write_whole(Path(sys.argv[1]), write)")
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT)
    assert done.returncode == -9 and len(names_in(tmp_path)) == 2
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new" and names_in(tmp_path) == ["a.json"]


def test_processes_do_not_share_a_part_file(tmp_path, monkeypatch):
    """Under torchrun two may write the same file at the same time."""
    parts = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        write_whole(tmp_path / "a", lambda part: (parts.append(part), part.write_text("a")))
    assert len(set(parts)) == 2 and names_in(tmp_path) == ["a"]


def test_value_is_computed_once(tmp_path):
    """It is what the file gives, also the first time: a resumed run must not see another value. A
    failed computation leaves no file."""
    path = tmp_path / "folder/a.json"
    with pytest.raises(ZeroDivisionError):
        saved(path, lambda: 1 / 0)
    assert not path.exists()
    value = {"texts": ["a\n\u2028\x00Ä", None], "share": 0.1}
    assert saved(path, lambda *arguments: value | {"pair": arguments}, 1, 2) == (
        value | {"pair": [1, 2]})
    assert saved(path, pytest.fail, 1, 2) == value | {"pair": [1, 2]}


def test_rationales_are_computed_once(tmp_path):
    """One a line, with all that is known of them, whatever characters they hold."""
    path = tmp_path / "folder/self-0.jsonl"
    assert saved_rationales(path, list, RATIONALES) == RATIONALES
    assert saved_rationales(path, pytest.fail) == RATIONALES
    assert read_rationales(path, [ANN]) == RATIONALES
    assert path.read_bytes().count(b"\n") == 2


def test_json_that_is_no_object_is_named(tmp_path):
    path = tmp_path / "config.json"
    for text, message in (("{", "not JSON"), ("[1]", "not a JSON object")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path}: {message}"):
            read_json(path)
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}


# --------------------------------------------------------------------------------------------------
# reading


GOOD = '{"id": "a", "question": "1 + 1?", "answer": "2"}\n'


@pytest.mark.parametrize("text, named", [
    (GOOD + '{"id": "b", "question": \n', "line 2: not JSON"),
    (GOOD + "[" * 100_000 + "\n", "line 2: not JSON"),
    (GOOD + "\n\n[1]\n", "line 4: the field 'id'"),
    (GOOD + '{"id": "b", "answer": "2"}\n', "line 2: the field 'question'"),
    (GOOD + '{"id": "b", "question": "1 + 1?"}\n', "line 2: the field 'answer'"),
    (GOOD + '{"id": 3.5, "question": "1 + 1?", "answer": "2"}\n', "line 2: the field 'id'"),
    (GOOD + '{"id": true, "question": "1 + 1?", "answer": "2"}\n', "line 2: the field 'id'"),
    (GOOD + '{"id": "\\ud83d", "question": "?", "answer": "1"}\n', "line 2: the field 'id' holds"),
    (GOOD + '{"id": "b", "question": "\\ud800", "answer": "1"}\n', "line 2: the field 'question'"),
    (GOOD + '{"id": "b", "question": "", "answer": "1", "kind": "\\udfff"}\n',
     "line 2: the field 'kind' holds a lone surrogate"),
    (GOOD + '{"id": "b", "question": "2?", "answer": "two"}\n', "line 2: the gold answer 'two'"),
    (GOOD + '{"id": "b", "question": "1 + 1?", "answer": ""}\n', "line 2: the gold answer ''"),
    (GOOD + '{"id": "b", "question": "", "answer": "1", "kind": 3}\n', "line 2: the field 'kind'"),
    (GOOD + '{"id": "b", "question": " ", "answer": "1"}\n', "line 2: the question is empty"),
    (GOOD + GOOD, "line 2: the id 'a'"),
    (GOOD.encode() + b'{"id": "\xff"}\n', "line 2: not JSON"),
    ("", "no questions"),
    ("\n\n", "no questions"),
])
def test_broken_questions_are_refused_by_file_and_line(tmp_path, text, named):
    """One line that says where to look and what for, also for a file in which nothing stands."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:
        read_questions(path)
    message = str(error.value)
    assert message.startswith(str(path)) and named in message and "\n" not in message


@pytest.mark.parametrize("line, named", [
    ('{"id": "ann", "strategy": "cot", "text": }', "JSON"),
    ('{"id": "ann", "strategy": "cot"}', "text"),
    ('{"strategy": "cot", "text": "7"}', "id"),
    ('{"id": "ann", "strategy": "tot", "text": "7"}', "'tot'"),
    ('{"id": "zoe", "strategy": "cot", "text": "7"}', "'zoe'"),
    ('{"id": "ann", "strategy": "cot", "text": "7\\ud800"}', "'text' holds a lone surrogate"),
    ('{"id": "ann", "strategy": "cot", "text": "7", "source": "gpt-4"}', "'source'"),
    ('{"id": "ann", "strategy": "cot", "text": "7", "finished": "no"}', "'finished'"),
])
def test_broken_rationales_are_refused_by_file_and_line(tmp_path, line, named):
    """Blank lines are passed over and counted: the number is the one that an editor shows."""
    path = tmp_path / "teacher.jsonl"
    path.write_text('{"id": "ann", "strategy": "cot", "text": "7"}\n\n' + line + "\n")
    with pytest.raises(ValueError) as error:
        read_rationales(path, [ANN])
    for words in (str(path), "line 3", named):
        assert words in str(error.value)


def test_endless_lines_are_refused(tmp_path, monkeypatch):
    """The wrong file, of gigabytes without a line break, is not read as a whole."""
    monkeypatch.setattr(files, "LONGEST_LINE", len(GOOD))
    path = tmp_path / "train.jsonl"
    path.write_text(GOOD)
    assert len(read_questions(path)) == 1
    path.write_text(GOOD + GOOD.replace('"a"', '"ab"'))
    with pytest.raises(ValueError, match=f"line 2: longer than {len(GOOD)} bytes"):
        read_questions(path)


def test_missing_files_are_named(tmp_path):
    """By their path, and as the error that missing files have everywhere."""
    for read in (read_questions, lambda path: read_rationales(path, [ANN])):
        with pytest.raises(FileNotFoundError, match="absent.jsonl"):
            read(tmp_path / "absent.jsonl")


def test_what_is_read_is_what_was_written(tmp_path):
    """Numbers as people write them, any letters, line breaks inside a text (also Unicode's), blank
    lines, and files with the mark that Windows editors put first."""
    questions = [{"id": "1", "question": "Äpfel?\u2028Kinds: 5", "answer": "1,234.50",
                  "kind": "fruit", "source": "x"},
                 {"id": "2", "question": "1/2?", "answer": "$0.5"}]
    lines = [json.dumps(question, ensure_ascii=False) for question in questions]
    path = tmp_path / "train.jsonl"  # without a line break at its end
    path.write_text("\ufeff" + "\n\n".join(lines), encoding="utf-8", newline="\n")
    read = read_questions(path)
    assert read == [Question("1", questions[0]["question"], Fraction(2469, 2), "fruit"),
                    Question("2", "1/2?", Fraction(1, 2))]

    lines = [{"id": "1", "strategy": "pot", "text": "a = 1\nanswer = a", "note": "passed over"},
             {"id": "2", "strategy": "cot", "text": "", "source": "student", "finished": False}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_rationales(path, read) == [Rationale("1", "pot", "a = 1\nanswer = a"),
                                           Rationale("2", "cot", "", "student", False)]


INSIDE = ["\r\n", "\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


@pytest.mark.parametrize("ascii", [True, False], ids=["escaped", "raw"])
@pytest.mark.parametrize("mark", INSIDE, ids=[ascii(mark) for mark in INSIDE])
def test_only_a_line_feed_ends_a_line(tmp_path, mark, ascii):
    """Python's str.splitlines also cuts at these, which may stand inside of a text. (JSON escapes
    those below U+0020 in any case.) open() also cuts at the carriage returns, which here stand
    between fields. Blank lines, also of Windows, are no lines."""
    text = f"a{mark}b"
    question = {"id": text, "question": text, "answer": "1", "kind": text}
    rationale = {"id": text, "strategy": "cot", "text": text}
    for name, record in (("train.jsonl", question), ("teacher.jsonl", rationale)):
        line = json.dumps(record, ensure_ascii=ascii, separators=(",\r", ":"))
        (tmp_path / name).write_bytes(f"\n{line}\r\n \t\r\n\n".encode())
    [read] = read_questions(tmp_path / "train.jsonl")
    assert read == Question(text, text, Fraction(1), text)
    assert read_rationales(tmp_path / "teacher.jsonl", [read]) == [Rationale(text, "cot", text)]


def test_ids_that_are_integers_become_texts(tmp_path):
    """Many sets number their questions. Other programs may write the same number as a text."""
    write_lines(tmp_path / "train.jsonl", [
        {"id": id, "question": "?", "answer": "1"} for id in (7, -1, 10 ** 20, "8")])
    questions = read_questions(tmp_path / "train.jsonl")
    assert [question.id for question in questions] == ["7", "-1", "1" + 20 * "0", "8"]
    write_lines(tmp_path / "teacher.jsonl", [
        {"id": id, "strategy": "cot", "text": ""} for id in (7, "7", 8)])
    read = read_rationales(tmp_path / "teacher.jsonl", questions)
    assert [rationale.id for rationale in read] == ["7", "7", "8"]
    write_lines(tmp_path / "train.jsonl", [
        {"id": id, "question": "?", "answer": "1"} for id in (7, "7")])
    with pytest.raises(ValueError, match="line 2: the id '7' is there twice"):
        read_questions(tmp_path / "train.jsonl")


def test_hidden_files_are_no_data(tmp_path):
    """macOS puts ._train.jsonl, which holds no JSON, beside train.jsonl on a foreign disk, and does
    so again: neither a set to evaluate on, nor a change of a run's data."""
    folder = write_data(tmp_path / "data")
    data = read_data(folder, 0.25, 0)
    open_run_folder(settings(tmp_path))
    write_text(tmp_path / "out/seed-0/combined/training.pt", "")
    for name in ("._train.jsonl", "._other.jsonl", ".jsonl"):
        (folder / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    assert read_data(folder, 0.25, 0) == data
    open_run_folder(settings(tmp_path))
    assert "._train.jsonl" not in (tmp_path / "out/args.json").read_text()


def test_held_out_questions_are_not_trained_on(tmp_path):
    """Neither they nor the teacher's texts for them. Which they are depends on the seed."""
    folder = write_data(tmp_path / "data")
    data = read_data(folder, 0.25, 0)
    held_out = {question.id for question in data.sets["held-out"]}
    assert len(held_out) == 3
    assert held_out.isdisjoint(question.id for question in data.questions)
    assert held_out.isdisjoint(rationale.id for rationale in data.teacher)
    assert len(data.questions) == 9 and len(data.teacher) == 27
    assert read_data(folder, 0.25, 0) == data
    others = [read_data(folder, 0.25, seed).sets["held-out"] for seed in range(1, 5)]
    assert any(other != data.sets["held-out"] for other in others)
    assert list(read_data(folder, 0, 0).sets) == ["test", "other"]


def test_set_cannot_be_named_held_out(tmp_path):
    """Its results would stand where those of the held-out questions belong."""
    folder = write_data(tmp_path / "data")
    (folder / "other.jsonl").rename(folder / "held-out.jsonl")
    with pytest.raises(ValueError, match="held-out.jsonl: this name is taken"):
        read_data(folder, 0.25, 0)


@pytest.mark.parametrize("name", ["train", "teacher", "test"])
def test_data_without_one_of_its_files_is_refused(tmp_path, name):
    """Also where the file is empty: without teacher texts nothing would be trained."""
    path = write_data(tmp_path / "data") / f"{name}.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match=f"{path}: no "):
        read_data(path.parent, 0.25, 0)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=str(path)):
        read_data(path.parent, 0.25, 0)


# --------------------------------------------------------------------------------------------------
# the run folder


def settings(tmp_path, **changed):
    """What argparse makes of the flags of train.py, or of some of them."""
    args = {"data": tmp_path / "data", "model": tmp_path / "model", "out": tmp_path / "out",
            "lr": 0.002, "mix": "all",
            "samples": 1, "iters": 1, "seeds": 1, "compare": False, "device": "cpu", "rows": 256,
            "save_minutes": 10}
    return Namespace(**args | changed)


@pytest.fixture
def begun(tmp_path):
    """A run folder in which something has been trained."""
    write_data(tmp_path / "data")
    write_text(tmp_path / "model/model.safetensors", "w" * 600_000)
    open_run_folder(settings(tmp_path))
    write_text(tmp_path / "out/seed-0/combined/training.pt", "")
    return tmp_path


def test_run_folder_says_how_it_was_made(begun):
    written = json.loads((begun / "out/args.json").read_text())
    assert (written["lr"], written["data"]) == (0.002, str(begun / "data"))
    assert written["command"] == " ".join(sys.argv)


def test_run_folder_refuses_other_settings_by_name(begun):
    """It must not hold models of two settings. The message names each flag that differs, with both
    values; and the old settings stay."""
    with pytest.raises(ValueError) as error:
        open_run_folder(settings(begun, lr=0.5, mix="self", max_length=9))
    for words in (str(begun / "out"), "lr was 0.002, is 0.5", "mix was all, is self",
                  "max_length was None, is 9"):
        assert words in str(error.value)
    assert "samples" not in str(error.value)
    assert json.loads((begun / "out/args.json").read_text())["lr"] == 0.002


def test_run_folder_goes_on_with_free_settings(begun):
    """What does not change the results of a model may be asked for later."""
    changed = {"iters": 2, "seeds": 3, "compare": True, "device": "cuda", "rows": 7,
               "save_minutes": 1, "preset": "svamp"}
    open_run_folder(settings(begun, **changed))
    assert json.loads((begun / "out/args.json").read_text()).items() >= changed.items()
    for folder in ("out", "data", "model"):
        (begun / folder).rename(begun / f"moved-{folder}")
    open_run_folder(settings(begun, **{name: begun / f"moved-{name}"
                                       for name in ("out", "data", "model")}))


@pytest.mark.parametrize("name, change", [
    ("test.jsonl", lambda path: path.write_bytes(path.read_bytes() + b"\n")),
    ("new.jsonl", lambda path: path.write_text("")),
    ("other.jsonl", lambda path: path.unlink()),
])
def test_run_folder_refuses_data_that_changed(begun, name, change):
    """The same path with other files: half of a table would be about the one set of questions, half
    about the other."""
    change(begun / "data" / name)
    with pytest.raises(ValueError, match=f"{name} was another file"):
        open_run_folder(settings(begun))


@pytest.mark.parametrize("place", [0, 300_000, 599_999])
def test_run_folder_refuses_weights_that_changed(begun, place):
    """A round would go on from other weights than the one before. Training changes all of a
    file, so its two ends and its middle are looked at."""
    path = begun / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:place] + b"!" + path.read_bytes()[place + 1:])
    with pytest.raises(ValueError, match="model.safetensors was another file"):
        open_run_folder(settings(begun))


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "generation_config.json"])
def test_run_folder_refuses_a_model_that_reads_otherwise(begun, name):
    """Tokens and end of text come from --model in each round."""
    (begun / "model" / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{name} was another file"):
        open_run_folder(settings(begun))


def test_run_folder_is_not_the_data_folder(begun):
    """metrics.jsonl would be a set of questions there."""
    with pytest.raises(ValueError, match="it is the folder of --data"):
        open_run_folder(settings(begun, out=begun / "out/../data"))


def test_mistyped_first_try_does_not_block_the_run_folder(tmp_path):
    """Nothing was trained with the wrong flag, so that the right one is no other setting."""
    write_data(tmp_path / "data")
    open_run_folder(settings(tmp_path, lr=2))
    open_run_folder(settings(tmp_path, lr=0.2))
    assert json.loads((tmp_path / "out/args.json").read_text())["lr"] == 0.2


def test_two_runs_in_one_folder_are_refused(begun):
    """They would write over each other's models. A run that is over, or was killed, blocks none."""
    locked = open_run_folder(settings(begun))
    code = ("import sys\nfrom argparse import Namespace\nfrom pathlib import Path\n"
            "from data.files import open_run_folder\n"
            "open_run_folder(Namespace(data=Path('data'), model='model', out=Path(sys.argv[1])))")
    command = [sys.executable, "-c", code, str(begun / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode
    assert f"--out {begun / 'out'}: another train.py is at work there" in done.stderr
    locked.close()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "holds a run of other settings" in done.stderr  # it came as far as these
