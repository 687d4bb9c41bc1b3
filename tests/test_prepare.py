"""Tests of data/prepare.py on small raw files of each format:  python -m pytest tests/test_prepare.py"""
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from data import prepare  # noqa: E402
from data.files import read_questions  # noqa: E402

GSM8K = ('{"question": "How many?\\nTell.", "answer": "1000 + 234 = <<1000+234=1234>>1,234\\n#### 1,234"}\n'
         '{"question": "And “now”?", "answer": "It is -2.\\n#### -2"}\n')
SVAMP = json.dumps([{"ID": "chal-1", "Body": "A pack costs 76 dollars ", "Question": "What is half?", "Answer": 38.0},
                    {"ID": "chal-2", "Body": "B.", "Question": "And 5 / 2?", "Answer": 2.5}])
MULTIARITH = json.dumps([{"iIndex": 7, "lSolutions": [39.0], "sQuestion": " For Halloween ? "}])


NUMBERED = json.dumps([{"ID": 1, "Body": "B.", "Question": "1?", "Answer": 1}])


def asdiv(*answers):
    return "<C><ProblemSet>" + "".join(
        f'<Problem ID="n{i}"><Body>Body {i} &amp; more.</Body><Question>What?</Question><Answer>{answer}</Answer></Problem>'
        for i, answer in enumerate(answers)) + "</ProblemSet></C>"


def run(*arguments, code=0):
    done = subprocess.run([sys.executable, str(ROOT / "data/prepare.py"), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_gsm8k_becomes_what_train_reads(tmp_path):
    """Both files of the folder; the answer is what stands behind ####."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        (raw / name).write_text(GSM8K, encoding="utf-8")
    assert "2 read, 2 kept, 0 left out" in run("gsm8k", "--source", raw, "--out", out)
    assert sorted(path.name for path in out.iterdir()) == ["test.jsonl", "train.jsonl"]
    questions = read_questions(out / "train.jsonl")
    assert [(q.text, q.answer) for q in questions] == [("How many? Tell.", 1234), ("And “now”?", -2)]


@pytest.mark.parametrize("name, raw, expected", [
    ("svamp", SVAMP, [("chal-1", "A pack costs 76 dollars What is half?", "38"), ("chal-2", "B. And 5 / 2?", "2.5")]),
    ("svamp", NUMBERED, [("1", "B. 1?", "1")]),
    ("multiarith", MULTIARITH, [("multiarith-7", "For Halloween ?", "39")]),
    ("asdiv", asdiv("9 (apples)", "3.5", "5/2", "1,000 (km)"),
     [(f"n{i}", f"Body {i} & more. What?", answer) for i, answer in enumerate(["9", "3.5", "5/2", "1,000"])])])
def test_each_format(name, raw, expected, tmp_path):
    (tmp_path / "raw").write_text(raw, encoding="utf-8-sig")  # with a mark in front, as some editors write it
    run(name, "--source", tmp_path / "raw", "--out", tmp_path / "out")
    lines = (tmp_path / "out" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    assert [tuple(json.loads(line).values()) for line in lines] == expected
    read_questions(tmp_path / "out" / f"{name}.jsonl")


def test_only_a_line_feed_ends_a_line(tmp_path):
    """Each of these may stand in a text, and Python's str.splitlines cuts there. Blank lines are
    passed over."""
    lines = []
    for mark in "\x85\u2028\u2029\r\v\f\x1c":
        record = {"question": f"How{mark}many?", "answer": f"It{mark}is\n#### 3"}
        lines.append(json.dumps(record, ensure_ascii=False, separators=(",\r", ":")))
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_bytes("\r\n\n".join(["", *lines, " \n\n"]).encode())
    printed = run("gsm8k", "--source", tmp_path, "--out", tmp_path / "out")
    assert "7 read, 7 kept, 0 left out" in printed
    questions = read_questions(tmp_path / "out/train.jsonl")
    assert [question.id for question in questions] == [f"gsm8k-{i:04d}" for i in range(7)]
    assert {(question.text, question.answer) for question in questions} == {("How many?", 3)}


def test_a_broken_record_is_named_by_its_number(tmp_path):
    """Whether its form or one of its texts is at fault."""
    good = '{"question": "?", "answer": "#### 1"}\n'
    lone = '{"question": "\\ud800", "answer": "#### 1"}\n'
    cases = [("[]\n", "TypeError"), (lone, "surrogates"), ('{"question": 1}', "KeyError")]
    for bad, named in cases:
        for name in ("train.jsonl", "test.jsonl"):
            (tmp_path / name).write_text(good + good + bad)
        printed = run("gsm8k", "--source", tmp_path, "--out", tmp_path / "out", code=2)
        assert f"{tmp_path / 'train.jsonl'}: not a raw file of gsm8k: record 3: " in printed
        assert named in printed


def test_a_set_can_be_split(tmp_path):
    """The first questions to train on, the others to test: no question is in both."""
    raw = tmp_path / "raw"
    raw.write_text(SVAMP)
    run("svamp", "--source", raw, "--train", 1, "--out", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test.jsonl", "train.jsonl"]
    assert [q.id for q in read_questions(tmp_path / "out/train.jsonl")] == ["chal-1"]
    assert [q.id for q in read_questions(tmp_path / "out/test.jsonl")] == ["chal-2"]
    for n in (0, 2):
        assert f"--train {n}" in run("svamp", "--source", raw, "--train", n, "--out", tmp_path / "no", code=2)
    for name in ("gsm8k", "asdiv", "multiarith"):  # of which the last two are not in a mixed order
        assert "--train" in run(name, "--train", 1, "--out", tmp_path / "no", code=2)
    assert not (tmp_path / "no").exists()
    run("svamp", "--source", raw, "--out", tmp_path / "whole")
    again = run("svamp", "--source", raw, "--train", 1, "--out", tmp_path / "whole", code=2)
    assert "svamp.jsonl: it holds the questions to train on" in again
    other = run("svamp", "--source", raw, "--out", tmp_path / "out", code=2)  # the other order
    assert "it would hold questions of" in other and not (tmp_path / "out/svamp.jsonl").exists()


def test_a_part_can_be_drawn(tmp_path):
    """Always the same one: the numbers in the README are of it."""
    raw = tmp_path / "raw"
    raw.write_text(asdiv(*map(str, range(30))))
    run("asdiv", "--source", raw, "--out", tmp_path / "all")
    run("asdiv", "--source", raw, "--draw", 7, "--out", tmp_path / "drawn")
    lines = (tmp_path / "all/asdiv.jsonl").read_text().splitlines()
    drawn = (tmp_path / "drawn/asdiv.jsonl").read_text().splitlines()
    assert drawn == random.Random(0).sample(lines, 7)
    for n in (0, 31):
        named = run("asdiv", "--source", raw, "--draw", n, "--out", tmp_path / "no", code=2)
        assert f"--draw {n}: must be between 1 and 30" in named
    both = ("--draw", 1, "--train", 1)
    assert "not with --train" in run("svamp", "--source", raw, *both, "--out", tmp_path, code=2)
    assert not (tmp_path / "no").exists()


def test_what_has_not_one_numeric_answer_is_left_out_and_named(tmp_path):
    (tmp_path / "raw").write_text(asdiv("9 (apples)", "17; 8", "blue", "3:45", "3:30 p.m.", "5 (years old); 15 (years old)"))
    printed = run("asdiv", "--source", tmp_path / "raw", "--out", tmp_path / "out")
    assert "6 read, 1 kept, 5 left out" in printed
    assert "2 several numbers" in printed and "1 no number, such as 'blue'" in printed and "2 a time or a ratio" in printed


@pytest.mark.parametrize("name, raw", [
    ("svamp", SVAMP[:-9]), ("svamp", "<html>404</html>"), ("svamp", MULTIARITH), ("svamp", "[]"), ("svamp", "{}"),
    ("svamp", '[{"ID": "1", "Body": null, "Question": "?", "Answer": 1}]'), ("multiarith", '[7]'), ("multiarith", ""),
    ("asdiv", asdiv("9")[:-20]), ("asdiv", "<html>404</html>"), ("asdiv", SVAMP), ("asdiv", "<C><Problem ID='1'/></C>"),
    ("asdiv", asdiv("9").replace('ID="n0"', "")), ("svamp", NUMBERED.replace("B.", r"\ud800")),
    ("gsm8k", '{"question": "\\ud800", "answer": "#### 1"}'),
    ("gsm8k", GSM8K[:-9]), ("gsm8k", "<html>404</html>"), ("gsm8k", '{"question": "?"}'), ("gsm8k", "\ud800")])
def test_broken_raw_files_give_one_line_and_leave_nothing(name, raw, tmp_path):
    """Cut in the middle, another format, HTML in place of data, nothing: what was prepared before is still there."""
    source, out = tmp_path / "raw", tmp_path / "out"
    if name == "gsm8k":
        source.mkdir()
        (source / "train.jsonl").write_text(GSM8K)
    file = source / "test.jsonl" if name == "gsm8k" else source
    file.write_bytes(raw.encode("utf-8", "surrogatepass"))
    out.mkdir()
    (out / f"{name}.jsonl").write_text("before")
    printed = run(name, "--source", source, "--out", out, code=2)
    assert printed.count("\n") == 1 and str(file) in printed and printed.startswith("prepare.py: ")
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(f"{name}.jsonl", "before")]


def test_a_download_is_checked(tmp_path):
    """fetch() takes what has the known SHA-256 and refuses anything else, by address."""
    (tmp_path / "raw").write_text("content")
    digest = hashlib.sha256(b"content").hexdigest()
    address = (tmp_path / "raw").as_uri()
    assert prepare.fetch(address, digest) == b"content"
    (tmp_path / "raw").write_text("content, changed")
    with pytest.raises(ValueError, match="SHA-256") as error:
        prepare.fetch(address, digest)
    assert address in str(error.value)
