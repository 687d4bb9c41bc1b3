"""Tests data/room.py: what could a choice bring, and can it be learned from the questions' words?"""
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from data.answers import STRATEGIES
from data.files import Question, Rationale, write_lines
from data.room import gain_of_choice, room_to_choose, success_rates, word_features, words_of

ROOT = Path(__file__).resolve().parents[1]
RIGHT = {"cot": "Final answer: 5", "l2m": "Final answer: 5", "pot": "answer = 5"}
WRONG = {"cot": "Final answer: 6", "l2m": "no number", "pot": "answer = 6"}


def make_questions(count, seed=0):
    """One half is about apples, the other about pears; the other words are by chance."""
    rng = random.Random(seed)
    names = [f"name{c}" for c in "abcdefghij"]
    questions = []
    for i in range(count):
        fruit = ("apples", "pears")[i % 2]
        text = f"{rng.choice(names)} gives {rng.randint(2, 99)} {fruit} to {rng.choice(names)}."
        questions.append(Question(str(i), text, 5))
    return questions


def test_a_choice_that_a_word_tells_is_learned():
    """cot is right on apples, pot on pears, l2m on neither: each alone gets half, the choice all."""
    questions = make_questions(100)
    rates = np.array([[1, 0, 0], [0, 0, 1]] * 50, dtype=float)
    assert gain_of_choice(word_features(questions), rates, 1) == pytest.approx(0.5)


def test_chance_is_not_learned():
    """Which strategy is right has nothing to do with the words: there is nothing to gain. Who looked
    at the answers of the questions that are chosen for would know them by heart."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 400)) / 20
    rates = rng.integers(0, 2, (200, 3)).astype(float)
    rates[:, 2] = 1 - (np.arange(200) % 5 == 0)  # pot: 80 %
    assert gain_of_choice(features, rates, 0.1) <= 0.01


def test_success_rates_by_hand():
    questions = make_questions(2)
    texts = [Rationale("1", "cot", RIGHT["cot"]), Rationale("0", "cot", RIGHT["cot"]),
             Rationale("1", "cot", WRONG["cot"]), Rationale("0", "cot", RIGHT["cot"])]
    texts += [Rationale(id, way, WRONG[way]) for id in "01" for way in ("l2m", "pot")]
    assert success_rates(questions, texts).tolist() == [[1, 0, 0], [0.5, 0, 0]]


def test_words_of_any_alphabet_count():
    assert words_of(Question("1", "Café: сколько?", 5)) == {"café", "сколько", ("café", "сколько")}


def test_questions_without_a_common_word_are_refused():
    """No words, no choice: a gain of such features would be one of chance."""
    for texts in (["Who?", "What?"], ["Who?"] * 4):  # a word that all have tells none apart
        questions = [Question(str(i), text, 5) for i, text in enumerate(texts)]
        with pytest.raises(ValueError, match=f"{len(texts)} questions: no word"):
            word_features(questions)


def test_numbers_are_one_word():
    question = Question("1", "She had 3,000 pens, 2.5 of 10.", 5)
    assert words_of(question) == {"she", "had", "0", "pens", "of", ("she", "had"), ("had", "0"),
                                  ("0", "pens"), ("pens", "0"), ("0", "of"), ("of", "0")}


def run(*flags):
    command = [sys.executable, ROOT / "data/room.py", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


def test_the_command_reads_a_run_folder(tmp_path):
    questions = make_questions(60)
    lines = [{"id": q.id, "question": q.text, "answer": "5"} for q in questions]
    write_lines(tmp_path / "train.jsonl", lines + [{"id": "x", "question": "?", "answer": "1"}])
    texts = []
    for i, question in enumerate(questions):
        for way in RIGHT:
            text = RIGHT if way == ("cot", "pot")[i % 2] else WRONG
            texts.append(Rationale(question.id, way, text[way], "student"))
    write_lines(tmp_path / "self-0.jsonl", texts[:90])
    write_lines(tmp_path / "self-30.jsonl", texts[90:])
    done = run(tmp_path, "--data", tmp_path)
    assert done.returncode == 0, done.stderr
    first, *rows = done.stdout.splitlines()
    assert first == "60 questions, 180 own texts; right, in %: cot 50.0, l2m 0.0, pot 50.0"
    assert len(rows) == 4 and "+50.0 points" in rows[0]


def test_a_folder_without_own_texts_is_named(tmp_path):
    done = run(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"room.py: {tmp_path}: there is no self-*.jsonl, the own texts of a round\n"


TWO = [Question("ann", "?", Fraction(7)), Question("bob", "?", Fraction(7))]


def write_verdicts(**verdicts):
    """Texts of two questions: ann_cot="1010" are four, the first and third of them right."""
    texts = []
    for name, digits in verdicts.items():
        id, strategy = name.split("_")
        for digit in digits:
            text = write_answer(strategy, 6 + int(digit))
            texts.append(Rationale(id, strategy, text, "student"))
    return texts


def write_answer(strategy, number):
    return f"answer = {number}" if strategy == "pot" else f"Final answer: {number}"


@pytest.mark.parametrize("ann, bob, room", [
    (("1111", "0000", "0000"), ("0000", "1111", "0000"), 0.5),  # cot suits one, l2m the other
    (("1111", "0000", "0000"), ("1111", "0000", "0000"), 0),  # cot suits both
    # One half chooses cot, by luck, and is wrong in the other. That half, in which none is right,
    # takes l2m, the better for all, and is right once in two: (0 + 0.5 + 1 + 1) / 4.
    (("1010", "0010", "0000"), ("0000", "1111", "0000"), 0.625 - (0.25 + 1) / 2),
    # Each half chooses what is wrong in the other one.
    (("0101", "1010", "0000"), ("1111", "0000", "0000"), 0.5 - 0.75)])
def test_room_by_hand(ann, bob, room):
    names = [f"{id}_{strategy}" for id in ("ann", "bob") for strategy in STRATEGIES]
    texts = write_verdicts(**dict(zip(names, ann + bob)))
    assert room_to_choose(texts, TWO) == pytest.approx(room)
    assert room_to_choose(texts[1:], TWO) is None
    assert room_to_choose([text for text in texts if text.id == "ann"], TWO) is None


def test_room_of_chance_is_none():
    """Texts that are right by chance alone: `any` finds much to choose from, and there is nothing."""
    rng = random.Random(0)
    questions = [Question(str(i), "?", Fraction(7)) for i in range(3000)]
    texts = []
    for question in questions:
        for strategy in STRATEGIES:
            for _ in range(4):
                text = write_answer(strategy, rng.choice((6, 7)))
                texts.append(Rationale(question.id, strategy, text, "student"))
    assert abs(room_to_choose(texts, questions)) < 0.03
