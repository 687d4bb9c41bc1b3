"""Tests of siked.py:  python -m pytest tests/test_siked.py

The student of most tests is a tiny decoder that has learned nine texts by heart, which takes two
seconds. So it is known what it answers, and nothing of the code under test is replaced.
"""
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import siked as method
from data.answers import STRATEGIES, is_correct
from data.files import Data, Question, Rationale, read_questions
from model import Config, Decoder
from sampler import Student
from siked import (MIXES, Round, evaluate, filter_correct, measure, mix, self_generate, siked,
                   split_tag, summarise)

TOY = Path(__file__).resolve().parents[1] / "data/toy"

ANN = Question("ann", "Ann has 3 cards and finds 4. How many cards has Ann?", Fraction(7), "more")
BEN = Question("ben", "Ben has 9 cards and loses 4. How many cards has Ben?", Fraction(5), "less")
EVE = Question("eve", "Eve has 6 cards and doubles them. How many has Eve?", Fraction(12), "more")
LEARNED = [  # right, but for Ben's program
    Rationale("ann", "cot", "3 + 4 = 7. Final answer: 7"),
    Rationale("ann", "l2m", "What does Ann find? 4. 3 + 4 = 7. Final answer: 7"),
    Rationale("ann", "pot", "start = 3\nanswer = start + 4"),
    Rationale("ben", "cot", "9 - 4 = 5. Final answer: 5"),
    Rationale("ben", "l2m", "What does Ben lose? 4. 9 - 4 = 5. Final answer: 5"),
    Rationale("ben", "pot", "start = 9\nanswer = start + 4"),
    Rationale("eve", "cot", "6 * 2 = 12. Final answer: 12"),
    Rationale("eve", "l2m", "What does Eve do? * 2. 6 * 2 = 12. Final answer: 12"),
    Rationale("eve", "pot", "start = 6\nanswer = start * 2"),
]
PREFERRED = [LEARNED[0], LEARNED[5], LEARNED[7]]  # what the student answers of itself


def write_fresh_student(folder) -> None:
    """A student that has learned nothing, as a Hugging Face folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [question.text for question in (ANN, BEN, EVE)]
    texts += [f"[{rationale.strategy}]: {rationale.text}" for rationale in LEARNED]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    torch.manual_seed(0)
    config = Config("llama", vocab_size=tokenizer.get_vocab_size(), hidden_size=48,
                    intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                    max_position_embeddings=128, tie_word_embeddings=True,
                    extra={"eos_token_id": tokenizer.token_to_id("<end>")})
    Decoder(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


def learn(student, rationales, steps, lr=5e-3) -> None:
    """A plain training loop: all texts in every step, the loss on their targets."""
    by_id = {question.id: question for question in (ANN, BEN, EVE)}
    texts = []
    wanted = []
    for rationale in rationales:
        stem, tail = student.prompt(by_id[rationale.id])
        target = student.target(rationale)
        texts.append(torch.tensor(stem + tail + target))
        wanted.append(torch.tensor([-100] * len(stem + tail) + target))
    texts = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    wanted = torch.nn.utils.rnn.pad_sequence(wanted, batch_first=True, padding_value=-100)
    optimizer = torch.optim.AdamW(student.model.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        logits = student.model(texts)[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), wanted[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def train(student, rationales, folder, seed) -> None:
    """What siked() wants of a training: the student that is in the folder, now or from before."""
    if not (folder / "model.safetensors").exists():
        learn(student, rationales, steps=3, lr=5e-4)
        student.save(folder)
    student.model = Decoder.from_pretrained(folder)


@pytest.fixture(scope="session")
def fresh(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fresh")
    write_fresh_student(folder)
    return folder


@pytest.fixture(scope="session")
def taught(fresh, tmp_path_factory):
    """The folder of a student that has learned LEARNED by heart, what it prefers twice as often."""
    folder = tmp_path_factory.mktemp("taught")
    student = Student(fresh)
    learn(student, LEARNED + PREFERRED, 100)
    student.save(folder)
    return folder


@pytest.fixture
def student(taught):
    return Student(taught, max_new_tokens=60)


def list_folders(path, rounds):
    return [path / str(number) for number in range(rounds + 1)]


def texts_of(rationales) -> dict:
    """(question, strategy) -> its texts, in order."""
    places = {}
    for rationale in rationales:
        place = (rationale.id, rationale.strategy)
        places.setdefault(place, []).append((rationale.text, rationale.finished))
    return places


class Scripted:
    """A student without a model: writes right texts for Ann in cot and l2m, all different."""

    def __init__(self):
        self.settings = []

    def answer(self, asked, n=1, **settings):
        self.settings.append(settings)
        texts = [(f"{i} more. Final answer: 7", True) for i in range(n)]
        return [texts for _ in asked]


def test_example(student, tmp_path):
    """What it is for: one round of SIKeD, with the training loop of ten lines above."""
    questions = [ANN, BEN, EVE]
    teacher = LEARNED + [Rationale("ann", "cot", "3 - 4 = 1. Final answer: 1")]
    data = Data(questions, teacher, {"test": questions})
    combined, result = siked(student, data, train, list_folders(tmp_path, 1), samples=2)
    assert len(combined.training_mix) == 8      # of the teacher's 10 texts, 8 are right
    assert len(result.generated) == 3 * 3 * 2   # questions, strategies, samples
    assert len(result.own) == 8                 # Ben's program is wrong in all samples
    assert result.training_mix == result.own    # each question is solved in some strategy
    assert summarise(result.results["test"])["any"] == 1
    assert (tmp_path / "1/model.safetensors").is_file()


# --------------------------------------------------------------------------------------------------
# step 1: filter


def test_every_gold_answer_passes_and_a_constant_wrong_one_never():
    """Shipped questions, in all strategies: no right answer is lost and no wrong one let in."""
    questions = read_questions(TOY / "train.jsonl")[::20] + read_questions(TOY / "test.jsonl")[::20]
    forms = {"cot": "So it is {}. Final answer: {}", "l2m": "How many? {}. Final answer: {}.",
             "pot": "x = {}\nanswer = {}"}

    def answer_all(find_value):
        rationales = []
        for question in questions:
            for strategy, form in forms.items():
                text = form.replace("{}", str(find_value(question)))
                rationales.append(Rationale(question.id, strategy, text))
        return rationales

    right = answer_all(lambda question: question.answer)
    assert filter_correct(right, questions) == right
    assert filter_correct(answer_all(lambda question: question.answer + 1), questions) == []
    assert filter_correct(answer_all(lambda question: -987654), questions) == []


def test_what_gives_no_number_is_wrong():
    """Neither a text without an answer is right, nor a broken program, nor a text that is none."""
    texts = [("cot", ""), ("cot", "7"), ("l2m", "Final answer: seven"), ("pot", "answer = 7 +"),
             ("pot", "Final answer: 7")]
    assert filter_correct([Rationale("ann", *text) for text in texts], [ANN]) == []


@pytest.mark.parametrize("keep, kept", [(1, "a"), (2, "ac"), (3, "acd"), (9, "acd")])
def test_first_correct_distinct_ones_are_kept(keep, kept):
    """Of a question and strategy, in their order: not the wrong one, b, and not the copy of a."""
    texts = ["a. Final answer: 7", "b. Final answer: 8", "a. Final answer: 7", "c. Final answer: 7",
             "d. Final answer: 7"]
    candidates = [Rationale("ann", "cot", text) for text in texts]
    assert "".join(r.text[0] for r in filter_correct(candidates, [ANN], keep)) == kept


def test_unfinished_texts_never_enter_even_if_right():
    """They would teach the student not to stop. And they take no finished text's place."""
    cut_off = Rationale("ann", "cot", "Final answer: 7", finished=False)
    whole = Rationale("ann", "cot", "Final answer: 7")
    assert filter_correct([cut_off], [ANN]) == []
    assert filter_correct([cut_off, whole], [ANN]) == [whole]


def test_duplicates_in_all_but_white_space_go():
    """Ten samples of one solution are one; the first is kept as it was written."""
    texts = ["a =  7\nanswer = a", "a = 7\n\nanswer = a", "a = 7\nanswer = a ", "b = 7\nanswer = b"]
    kept = filter_correct([Rationale("ann", "pot", text) for text in texts], [ANN], keep=10)
    assert [rationale.text for rationale in kept] == [texts[0], texts[3]]


def test_questions_and_strategies_do_not_share_their_places():
    """`keep` and "distinct" hold for one question and strategy; the order stays."""
    other = Question("zoe", "What is 3 + 4?", Fraction(7))
    candidates = [Rationale(id, strategy, "Final answer: 7")
                  for id in ("zoe", "ann") for strategy in ("l2m", "cot")]
    superfluous = Rationale("zoe", "l2m", "So it is. Final answer: 7")
    assert filter_correct(candidates + [superfluous], [ANN, other]) == candidates


# --------------------------------------------------------------------------------------------------
# step 3: self-generate


def test_self_generation_forces_every_strategy(student, tmp_path):
    """`samples` texts for each question and strategy, without the tag, not yet checked."""
    generated = self_generate(student, [ANN, EVE], 3, 1, tmp_path)
    places = [(id, strategy) for id in ("ann", "eve") for strategy in STRATEGIES]
    assert [(r.id, r.strategy) for r in generated] == [place for place in places for _ in range(3)]
    assert {rationale.source for rationale in generated} == {"student"}
    learned = {(r.id, r.strategy): (r.text, True) for r in LEARNED}
    for place, texts in texts_of(generated).items():
        assert learned[place] in texts  # almost all are, at this temperature


def test_self_generation_depends_on_the_seed_alone(student, tmp_path, monkeypatch):
    """Not on the order of the questions, how they are spread over calls, or the rows of a batch."""
    monkeypatch.setitem(method.SAMPLING, "temperature", 2.0)  # hot: the texts differ
    student.max_new_tokens = 20
    numbers = iter(range(100))

    def write(questions, seed=1):  # each time in a new folder, or the texts would be read
        return self_generate(student, questions, 2, seed, tmp_path / str(next(numbers)))

    whole = write([ANN, BEN, EVE])
    assert len({rationale.text for rationale in whole}) > len(whole) // 2
    assert write([ANN, BEN, EVE], seed=2) != whole
    assert texts_of(write([EVE, ANN, BEN])) == texts_of(whole)
    assert write([ANN]) + write([BEN, EVE]) == whole
    student.rows = 3
    assert write([ANN, BEN, EVE]) == whole


def test_self_generation_is_saved_in_parts_of_whole_questions(tmp_path, monkeypatch):
    """Room for eight texts is room for one question, which has six, also for less than one."""
    whole = self_generate(Scripted(), [ANN, BEN, EVE], 2, 1, tmp_path / "whole")
    for room in (8, 5):
        folder = tmp_path / str(room)
        monkeypatch.setattr(method, "TEXTS_IN_A_PART", room)
        student = Scripted()
        assert self_generate(student, [ANN, BEN, EVE], 2, 1, folder) == whole
        files = sorted(path.name for path in folder.iterdir())
        assert files == ["self-0.jsonl", "self-1.jsonl", "self-2.jsonl"]
        (folder / "self-1.jsonl").unlink()
        assert self_generate(student, [ANN, BEN, EVE], 2, 1, folder) == whole
        assert len(student.settings) == 3 + 1  # the lost part alone was written again


def test_control_writes_no_texts(tmp_path):
    """samples = 0: the student is not asked, and no file is there that says so."""
    assert self_generate(None, [ANN], 0, 1, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_right_but_unfinished_text_is_not_kept(student, tmp_path):
    """From the model to the filter: with one token too few, all is there but the end token."""
    student.max_new_tokens = len(student.target(LEARNED[0])) - len(student.encode("[cot]:")) - 1
    generated = self_generate(student, [ANN], 2, 1, tmp_path)
    assert is_correct("cot", generated[0].text, ANN.answer)
    assert [r for r in filter_correct(generated, [ANN]) if r.strategy == "cot"] == []


# --------------------------------------------------------------------------------------------------
# step 4: mix


def write_texts(source, places):
    """One text for each place, "ann-cot" say."""
    return [Rationale(*place.split("-"), f"{source} {place}", source) for place in places.split()]


# The teacher is right everywhere; the student solves Ann's question in two strategies, Ben's in
# one, Eve's in none.
TAUGHT = "ann-cot ann-l2m ann-pot ben-cot ben-l2m ben-pot eve-cot eve-l2m eve-pot"
TEACHER = write_texts("teacher", TAUGHT)
OWN = write_texts("student", "ann-cot ann-pot ben-pot")


@pytest.mark.parametrize("mode, from_teacher", [
    ("all", TAUGHT),
    ("adaptive", "eve-cot eve-l2m eve-pot"),
    ("adaptive-per-strategy", "ann-l2m ben-cot ben-l2m eve-cot eve-l2m eve-pot"),
    ("self", ""),
    ("teacher", TAUGHT),
])
def test_mix_by_hand(mode, from_teacher):
    mixed = mix(TEACHER, OWN, mode)
    assert [r for r in mixed if r.source == "teacher"] == write_texts("teacher", from_teacher)
    assert [r for r in mixed if r.source == "student"] == ([] if mode == "teacher" else OWN)


def test_mix_names_the_unknown_mode():
    with pytest.raises(ValueError, match="bothways"):
        mix(TEACHER, OWN, "bothways")


@pytest.mark.parametrize("mode", MIXES)
def test_mix_changes_no_input(mode):
    """The lists stay as they were, also when the caller goes on to change the mix."""
    teacher, own = list(TEACHER), list(OWN)
    mix(teacher, own, mode).append(Rationale("zoe", "cot", "7"))
    assert (teacher, own) == (TEACHER, OWN)


# --------------------------------------------------------------------------------------------------
# step 6: evaluate


@pytest.mark.parametrize("text, wanted", [
    ("[cot]: 3 + 4 = 7.", ("cot", "3 + 4 = 7.")),
    ("[l2m]:How many?", ("l2m", "How many?")),
    ("[pot]: a = 1\nanswer = a", ("pot", "a = 1\nanswer = a")),
    ("[pot]:", ("pot", "")),
    ("[cot]: [pot]: 7", ("cot", "[pot]: 7")),
    ("[xyz]: 7", (None, "[xyz]: 7")),
    ("3 + 4 = 7", (None, "3 + 4 = 7")),
    ("So [cot]: 7", (None, "So [cot]: 7")),
    ("[cot] 7", (None, "[cot] 7")),
    ("", (None, "")),
])
def test_split_tag(text, wanted):
    """The tag is what the text opens with; one without a known tag belongs to no strategy."""
    assert split_tag(text) == wanted


def test_evaluation_of_what_is_known_by_heart(student):
    """Free: Ann in cot (right), Ben in pot (wrong), Eve in l2m. Forced: only Ben's program is
    wrong. With another gold answer, all of Eve's texts are."""
    right = {"cot": True, "l2m": True, "pot": True}
    wrong = {"cot": False, "l2m": False, "pot": False}
    strange = Question("odd", EVE.text, Fraction(99))
    assert evaluate(student, [ANN, BEN, EVE, strange], "test") == [
        {"id": "ann", "kind": "more", "strategy": "cot", "correct": True, "text": LEARNED[0].text,
         "forced": right},
        {"id": "ben", "kind": "less", "strategy": "pot", "correct": False, "text": LEARNED[5].text,
         "forced": right | {"pot": False}},
        {"id": "eve", "kind": "more", "strategy": "l2m", "correct": True, "text": LEARNED[7].text,
         "forced": right},
        {"id": "odd", "kind": "", "strategy": "l2m", "correct": False, "text": LEARNED[7].text,
         "forced": wrong}]


def test_answer_without_a_tag_is_wrong():
    """A student that names no strategy is not credited, whatever its text ends in. Forced, the same
    text counts."""
    [record] = evaluate(Scripted(), [ANN])
    assert (record["strategy"], record["correct"]) == (None, False)
    assert record["forced"] == {"cot": True, "l2m": True, "pot": False}


def make_record(strategy, correct, forced="", kind=""):
    """forced: the strategies that are right when they are forced."""
    return {"id": "ann", "kind": kind, "strategy": strategy, "correct": correct, "text": "",
            "forced": {strategy: strategy in forced.split() for strategy in STRATEGIES}}


RECORDS = [make_record("cot", True, "cot", "more"), make_record("cot", False, "l2m pot", "less"),
           make_record("pot", True, "l2m pot", "more"), make_record(None, False, "", "less")]


def test_summary_by_hand():
    """Any: three of four questions are right in some forced strategy; the free answers, in two."""
    assert summarise(RECORDS) == {
        "accuracy": 0.5, "any": 0.75,
        "share": {"cot": 0.5, "l2m": 0, "pot": 0.25},
        "accuracy_within": {"cot": 0.5, "l2m": None, "pot": 1},
        "forced": {"cot": 0.25, "l2m": 0.5, "pot": 0.5}}


# --------------------------------------------------------------------------------------------------
# Figure 2


def measure_mix(own, training_mix, **results):
    """The measures of a round that was evaluated on one set."""
    [line] = measure(Round(1, [], own, training_mix, results or {"test": RECORDS}), [], {})
    return line


def test_measures_by_hand():
    """Own: 3 cot. Mix: these and one program of the teacher. With half a text added to each count,
    P_student = (3.5, 0.5, 0.5) / 4.5 and P_mix = (3.5, 0.5, 1.5) / 5.5, so that
    KL = ln(4.5 / 5.5) + 1.5 / 5.5 * ln 3. Free on the held-out questions: 2 cot, 1 pot, and one in
    no strategy, so P_free = (2.5, 0.5, 1.5) / 4.5."""
    own = write_texts("student", "a-cot b-cot c-cot")
    result = Round(1, [], own, write_texts("teacher", "a-pot") + own,
                   {"held-out": RECORDS, "test": RECORDS[:1]})
    held_out, test = measure(result, [], {"run": "siked-all", "seed": 7})
    assert held_out["alpha"] == 1 / 4
    assert held_out["P_student"] == pytest.approx({"cot": 7 / 9, "l2m": 1 / 9, "pot": 1 / 9})
    assert held_out["P_mix"] == pytest.approx({"cot": 7 / 11, "l2m": 1 / 11, "pot": 3 / 11})
    assert held_out["KL"] == pytest.approx(math.log(9 / 11) + 3 / 11 * math.log(3))
    assert held_out["P_free"] == pytest.approx({"cot": 5 / 9, "l2m": 1 / 9, "pot": 3 / 9})
    assert held_out["KL_free"] == pytest.approx(math.log(9 / 11) + 7 / 11 * math.log(7 / 5))
    figures = ("alpha", "P_mix", "P_student", "P_free", "KL", "KL_free")
    assert [test[name] for name in figures] == [held_out[name] for name in figures]


def test_measures_have_a_line_for_each_set():
    """With what names the model, and the summary of the set, as a whole and by kind."""
    result = Round(1, [], [], TEACHER, {"held-out": RECORDS, "test": RECORDS[:1]})
    held_out, test = measure(result, [], {"run": "siked-all", "seed": 7})
    assert [held_out[name] for name in ("run", "seed", "set")] == ["siked-all", 7, "held-out"]
    assert [test[name] for name in ("run", "seed", "set")] == ["siked-all", 7, "test"]
    assert held_out | summarise(RECORDS) == held_out
    assert test | summarise(RECORDS[:1]) == test
    assert held_out["kinds"] == {"less": summarise([RECORDS[1], RECORDS[3]]),
                                 "more": summarise([RECORDS[0], RECORDS[2]])}
    assert measure_mix([], TEACHER, test=[make_record("cot", True)])["kinds"] == {}


def test_divergence_falls_with_alpha_and_ends_at_0():
    """The fewer teacher texts in the mix, the nearer it is to the student; without any, KL = 0."""
    own = write_texts("student", " ".join(f"{i}-pot" for i in range(10)))
    series = [measure_mix(own, TEACHER[:n] + own) for n in (9, 6, 3, 0)]
    assert [line["alpha"] for line in series] == [9 / 19, 6 / 16, 3 / 13, 0]
    divergences = [line["KL"] for line in series]
    assert divergences == sorted(divergences, reverse=True) and divergences[2] > 1e-3
    assert divergences[3] == pytest.approx(0, abs=1e-12)


def test_what_was_not_measured_is_none():
    """Not 0 and not infinity. An empty mix is no division by zero either. A student that names no
    strategy has chosen none: it does not choose as an even mix does."""
    line = measure_mix([], TEACHER)
    assert line["alpha"] == 1
    assert [line[name] for name in ("P_student", "P_free", "KL", "KL_free", "room")] == [None] * 5
    nothing = measure_mix([], [])
    assert nothing["alpha"] == 0 and nothing["P_mix"] is None and nothing["KL"] is None
    own = write_texts("student", "a-cot")
    result = Round(1, [], own, own, {"held-out": [make_record(None, False)]})
    [line] = measure(result, [], {})
    assert line["P_free"] is None and line["KL_free"] is None and line["KL"] == 0


# --------------------------------------------------------------------------------------------------
# the loop


# To the student that knows LEARNED by heart: Ann's question is solved, Ben's in two strategies, and
# Eve's, with this gold answer, in none. The teacher's first text to each place is wrong, the second
# right, the third superfluous.
HARD_EVE = Question("eve", EVE.text, Fraction(99))
LESSONS = []
for question in (ANN, BEN, HARD_EVE):
    for value in (question.answer + 1, question.answer, f" {question.answer}"):
        LESSONS.append(Rationale(question.id, "cot", f"Final answer: {value}"))
        LESSONS.append(Rationale(question.id, "l2m", f"Final answer: {value}"))
        LESSONS.append(Rationale(question.id, "pot", f"answer = {value}"))
HARD = Data([ANN, BEN, HARD_EVE], LESSONS, {"test": [ANN]})


@pytest.mark.parametrize("mode, n_teacher, n_own", [
    ("adaptive", 3, 5), ("adaptive-per-strategy", 4, 5), ("all", 9, 5), ("self", 0, 5),
    ("teacher", 9, 0)])
def test_loop_trains_on_the_right_mix(student, tmp_path, mode, n_teacher, n_own):
    """Round 0 on the teacher's 9 kept texts, round 1 on the mode's mix; each in its folder."""
    calls = []

    def note(student, rationales, folder, seed):
        calls.append((rationales, folder))

    folders = list_folders(tmp_path, 1)
    first, second = siked(student, HARD, note, folders, mode, samples=2)
    assert (first.number, first.generated, first.own) == (0, [], [])
    assert first.training_mix == LESSONS[3:6] + LESSONS[12:15] + LESSONS[21:24]
    assert second.number == 1 and len(second.generated) == 3 * 3 * 2 and len(second.own) == 5
    assert [r.source for r in second.training_mix].count("teacher") == n_teacher
    assert [r.source for r in second.training_mix].count("student") == n_own
    assert calls == [(first.training_mix, folders[0]), (second.training_mix, folders[1])]
    assert first.results == {"test": evaluate(student, [ANN])}


def test_loop_passes_keep_on(tmp_path):
    """Three distinct texts each, right in two strategies, and two of them may enter."""
    data = Data([ANN], [], {})
    _, result = siked(Scripted(), data, lambda *_: None, list_folders(tmp_path, 1), samples=3,
                      keep=2)
    assert [r.text[0] for r in result.own] == ["0", "1", "0", "1"]


def test_every_round_of_every_seed_has_a_seed_of_its_own(tmp_path):
    """Or a student that hardly changes would write the same texts again. Evaluation is greedy."""
    seeds = []
    trained_with = []
    for seed in range(3):
        student = Scripted()
        data = Data([ANN], [], {"test": [ANN]})
        folders = list_folders(tmp_path / str(seed), 3)
        list(siked(student, data, lambda *call: trained_with.append(call[3]), folders, seed=seed))
        for settings in student.settings:
            if settings["progress"] == "self-generate":
                assert settings["temperature"] == 0.7 and settings["top_p"] == 0.95
                seeds.append(settings["seed"])
            else:
                assert settings == {"progress": "evaluate test"}
    assert len(seeds) == len(set(seeds)) == 3 * 3
    assert len(trained_with) == len(set(trained_with)) == 3 * 4


def test_loop_runs_no_round_before_it_is_asked_for(tmp_path):
    """A generator: what a round did is reported before the next one starts."""
    folders = list_folders(tmp_path, 3)
    trained = []
    rounds = siked(Scripted(), HARD, lambda *call: trained.append(call[2]), folders)
    assert trained == []
    next(rounds)
    assert trained == folders[:1]
    next(rounds)
    assert trained == folders[:2]


class Mortal(Student):
    """Does one piece of work, a training or a set of answers, and dies in the next."""
    tired = False

    def work(self):
        if self.tired:
            raise KeyboardInterrupt
        self.tired = True

    def answer(self, *args, **settings):
        self.work()
        return super().answer(*args, **settings)


def test_run_that_is_killed_at_every_step_ends_as_one_that_is_not(taught, tmp_path, monkeypatch):
    """With real training: the same rounds, and the same weights to the bit. Nothing that was
    finished is done again. So what is read back from a file is what had been computed."""
    monkeypatch.setattr(method, "TEXTS_IN_A_PART", 12)  # own texts in two parts
    monkeypatch.setitem(method.SAMPLING, "temperature", 1.3)  # some of them are wrong
    teacher = [rationale for rationale in LEARNED if rationale != LEARNED[5]]
    data = Data([ANN, BEN, EVE], teacher, {"test": [ANN, BEN, EVE]})
    settings = {"mode": "all", "samples": 2, "seed": 5}
    student = Student(taught, max_new_tokens=30)
    undisturbed = list(siked(student, data, train, list_folders(tmp_path / "a", 2), **settings))
    assert [result.number for result in undisturbed] == [0, 1, 2]
    first, second = undisturbed[1:]
    assert 0 < len(first.own) < 9 and first.generated != second.generated

    def train_mortal(student, rationales, folder, seed):
        if not (folder / "model.safetensors").exists():
            student.work()
        train(student, rationales, folder, seed)

    folders = list_folders(tmp_path / "b", 2)
    starts = 0
    rounds = None
    while rounds is None and starts < 20:
        starts += 1
        student = Mortal(taught, max_new_tokens=30)
        try:
            rounds = list(siked(student, data, train_mortal, folders, **settings))
        except KeyboardInterrupt:
            pass
    assert starts == 3 + 3 + 2 * 2  # trainings, evaluations, parts of own texts
    assert rounds == undisturbed
    weights = [(tmp_path / run / "2/model.safetensors").read_bytes() for run in "ab"]
    assert weights[0] == weights[1]
    assert weights[0] != (tmp_path / "a/1/model.safetensors").read_bytes()
