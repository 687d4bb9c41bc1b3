"""Tests of siked.py:  python -m pytest tests/test_siked.py

The student of most tests is a tiny decoder that has learned a handful of texts by heart (two seconds of training), with a
tokenizer trained here. So it is known what it answers, and nothing of the code under test is replaced.
"""
import copy
import dataclasses
import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from model import Config, Decoder
from siked import (MODES, STRATEGIES, Question, Rationale, Student, check, evaluate, filter_correct, measure_mix, mix,
                   read_questions, read_rationales, self_generate, siked, split_tag)

TOY = Path(__file__).resolve().parents[1] / "data/toy"
END = "<end>"

ANN = Question("ann", "Ann has 3 cards and finds 4. How many cards has Ann?", Fraction(7), "more")
BEN = Question("ben", "Ben has 9 cards and loses 4. How many cards has Ben?", Fraction(5), "less")
EVE = Question("eve", "Eve has 6 cards and doubles them. How many cards has Eve?", Fraction(12), "more")
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
PREFERRED = {"ann": "cot", "ben": "pot", "eve": "l2m"}  # the strategy that the student names of itself


def train_tokenizer(texts) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return tokenizer


def fresh_student(**settings) -> Student:
    tokenizer = train_tokenizer([q.text for q in (ANN, BEN, EVE)] + [f"[{r.strategy}]: {r.text}" for r in LEARNED])
    torch.manual_seed(0)
    config = Config("llama", vocab_size=tokenizer.get_vocab_size(), hidden_size=48, intermediate_size=96,
                    num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, tie_word_embeddings=True)
    return Student(Decoder(config), tokenizer, [tokenizer.token_to_id(END)], **({"max_new_tokens": 60} | settings))


def train(student, rationales, steps) -> None:
    """A plain training loop: all texts in every step, the loss on their targets."""
    by_id = {question.id: question for question in (ANN, BEN, EVE)}
    pairs = [(student.prompt(by_id[r.id]), student.target(r)) for r in rationales]
    T = max(len(prompt) + len(target) for prompt, target in pairs)
    ids, wanted = torch.zeros(len(pairs), T, dtype=torch.int64), torch.full((len(pairs), T), -100)
    for row, (prompt, target) in enumerate(pairs):
        ids[row, :len(prompt) + len(target)] = torch.tensor(prompt + target)
        wanted[row, len(prompt):len(prompt) + len(target)] = torch.tensor(target)
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=5e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        F.cross_entropy(student.model(ids)[:, :-1].flatten(0, 1), wanted[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def student():
    """Has learned LEARNED by heart, the preferred strategy of each question twice as often. Not to be trained further."""
    student = fresh_student()
    train(student, LEARNED + [r for r in LEARNED if PREFERRED[r.id] == r.strategy], 100)
    return student


def texts_of(rationales) -> dict:
    """(question, strategy) -> its (text, finished), in order."""
    places = {}
    for r in rationales:
        places.setdefault((r.id, r.strategy), []).append((r.text, r.finished))
    return places


def right(id, strategy, text="", **settings) -> Rationale:
    return Rationale(id, strategy, text or f"{id} {strategy}", correct=True, **settings)


def test_example():
    """What it is for: the whole loop, two rounds, with a training loop of ten lines."""
    def fine_tune(student, rationales, number, size):
        train(student, rationales, steps=60)
        return 60

    questions, teacher = [ANN, BEN, EVE], LEARNED + [Rationale("ann", "cot", "3 - 4 = 1. Final answer: 1")]
    combined, after = siked(fresh_student(), questions, teacher, fine_tune, {"test": questions}, iterations=1, samples=4)
    assert not combined.generated and len(combined.training_mix) == 8   # of the teacher's 10 texts, 8 are right
    assert len(after.generated) == 3 * 3 * 4                            # questions, strategies, samples
    assert all(r.correct and r.finished for r in after.own) and after.own
    assert after.figure_2["alpha"] < combined.figure_2["alpha"] == 1
    assert after.measures["test"]["total"] == 3


# ---------------------------------------------------------------------------------------------------------------------
# step 1: filter


def test_every_gold_answer_passes_and_a_constant_wrong_one_never():
    """All shipped questions, in all strategies: the filter neither loses a right answer nor lets a wrong one in."""
    questions = read_questions(TOY / "train.jsonl") + read_questions(TOY / "test.jsonl")
    forms = {"cot": "So it is {}. Final answer: {}", "l2m": "How many? {}. Final answer: {}.", "pot": "x = {}\nanswer = {}"}

    def answer_all(value):
        return [Rationale(q.id, s, form.replace("{}", str(value(q)))) for q in questions for s, form in forms.items()]

    gold = check(answer_all(lambda q: q.answer), questions)
    assert len(filter_correct(gold)) == len(gold) == 3 * len(questions) and all(r.correct for r in gold)
    assert filter_correct(check(answer_all(lambda q: q.answer + 1), questions)) == []
    assert filter_correct(check(answer_all(lambda q: -987654), questions)) == []


def test_what_gives_no_number_is_wrong():
    """No answer is never right: neither a text without one, nor a broken program, nor an answer in another strategy."""
    texts = [("cot", ""), ("cot", "7"), ("l2m", "Final answer: seven"), ("pot", "answer = 7 +"), ("pot", "Final answer: 7")]
    assert [r.correct for r in check([Rationale("ann", *text) for text in texts], [ANN])] == [False] * 5


@pytest.mark.parametrize("keep, kept", [(1, "a"), (2, "ac"), (3, "acd"), (9, "acd")])
def test_first_correct_distinct_ones_are_kept(keep, kept):
    """The first `keep` of a question and strategy, in their order: not the wrong one, not the copy."""
    wrong = Rationale("ann", "cot", "b", correct=False)
    a, c, d = (right("ann", "cot", text) for text in "acd")
    candidates = [a, wrong, a, c, d]
    assert "".join(r.text for r in filter_correct(candidates, keep)) == kept


def test_unfinished_texts_never_enter_even_if_right():
    """Pitfall 3: what the token limit cut off is not trained on, and does not take the place of a finished one."""
    cut_off, whole = right("ann", "cot", "cut off", finished=False), right("ann", "cot", "whole")
    assert filter_correct([cut_off]) == []
    assert filter_correct([cut_off, whole]) == [whole]


def test_duplicates_in_all_but_white_space_go():
    """Pitfall 22: ten samples of one solution are one; the first is kept as it was written."""
    texts = ["a =  1\nanswer = a", "a = 1\n\nanswer = a", " a = 1 answer = a ", "b = 1\nanswer = b"]
    assert [r.text for r in filter_correct([right("ann", "pot", t) for t in texts], keep=10)] == [texts[0], texts[3]]


def test_questions_and_strategies_do_not_share_their_places():
    """`keep` counts per question and strategy; the same text may be kept in two strategies; the order stays."""
    candidates = [right(id, s, "same") for id in ("eve", "ann") for s in ("pot", "cot")] + [right("eve", "pot", "other")]
    assert filter_correct(candidates) == candidates[:4]


# ---------------------------------------------------------------------------------------------------------------------
# step 4: mix


# The teacher is right everywhere; the student solves Ann's question in two strategies, Ben's in one, Eve's in none.
TEACHER = [right(id, s) for id in ("ann", "ben", "eve") for s in STRATEGIES]
OWN = [right(id, s, f"my {id} {s}", source="student") for id, s in [("ann", "cot"), ("ann", "pot"), ("ben", "pot")]]


@pytest.mark.parametrize("mode, per, from_teacher", [
    ("all", "question", "ann-cot ann-l2m ann-pot ben-cot ben-l2m ben-pot eve-cot eve-l2m eve-pot"),
    ("adaptive", "question", "eve-cot eve-l2m eve-pot"),
    ("adaptive", "strategy", "ann-l2m ben-cot ben-l2m eve-cot eve-l2m eve-pot"),
    ("self", "question", ""),
    ("teacher", "question", "ann-cot ann-l2m ann-pot ben-cot ben-l2m ben-pot eve-cot eve-l2m eve-pot"),
])
def test_mix_by_hand(mode, per, from_teacher):
    """Each mode, and both meanings of "the student failed"."""
    mixed = mix(TEACHER, OWN, mode, per)
    assert " ".join(f"{r.id}-{r.strategy}" for r in mixed if r.source == "teacher") == from_teacher
    assert [r for r in mixed if r.source == "student"] == ([] if mode == "teacher" else OWN)


def test_mix_names_the_unknown_mode():
    """A mistyped mode is told by its value, before anything is mixed."""
    with pytest.raises(ValueError, match="bothways"):
        mix(TEACHER, OWN, "bothways")
    with pytest.raises(ValueError, match="weekday"):
        mix(TEACHER, OWN, "adaptive", "weekday")


@pytest.mark.parametrize("mode", MODES)
def test_mix_changes_no_input(mode):
    """The lists stay as they were, also when the caller goes on to change the mix."""
    teacher, own = list(TEACHER), list(OWN)
    mixed = mix(teacher, own, mode)
    mixed.append(right("zoe", "cot"))
    assert (teacher, own) == (TEACHER, OWN)


def test_measures_of_the_mix_by_hand():
    """Own: 3 cot. Mix: these and one program of the teacher. With half a text added to each count,
    P_student = (3.5, 0.5, 0.5) / 4.5 and P_mix = (3.5, 0.5, 1.5) / 5.5, so KL = ln(4.5 / 5.5) + 1.5 / 5.5 * ln 3."""
    own = [right(str(i), "cot", source="student") for i in range(3)]
    measured = measure_mix([right("a", "pot"), right("b", "l2m")], own, [right("a", "pot"), *own])
    assert measured["alpha"] == pytest.approx(1 / 4)
    assert measured["P_teacher"] == pytest.approx({"cot": 0.5 / 3.5, "l2m": 1.5 / 3.5, "pot": 1.5 / 3.5})
    assert measured["P_student"] == pytest.approx({"cot": 3.5 / 4.5, "l2m": 0.5 / 4.5, "pot": 0.5 / 4.5})
    assert measured["P_mix"] == pytest.approx({"cot": 3.5 / 5.5, "l2m": 0.5 / 5.5, "pot": 1.5 / 5.5})
    assert measured["KL"] == pytest.approx(math.log(4.5 / 5.5) + 1.5 / 5.5 * math.log(3))


def test_divergence_falls_with_alpha_and_ends_at_0():
    """Figure 2: the fewer teacher texts in the mix, the nearer it is to the student; no teacher at all: KL = 0."""
    own = [right(str(i), "pot", source="student") for i in range(10)]
    series = [measure_mix(TEACHER, own, TEACHER[:n] + own) for n in (9, 6, 3, 0)]
    assert [m["alpha"] for m in series] == [pytest.approx(n / (n + 10)) for n in (9, 6, 3, 0)]
    assert series[0]["KL"] > series[1]["KL"] > series[2]["KL"] > series[3]["KL"] == pytest.approx(0, abs=1e-12)


def test_without_own_texts_there_is_no_divergence():
    """None, not 0 and not infinity: nothing was measured. An empty mix is no division by zero either."""
    measured = measure_mix(TEACHER, [], TEACHER)
    assert measured["alpha"] == 1 and measured["KL"] is None and measured["P_student"] is None
    assert measure_mix(TEACHER, [], [])["alpha"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# the student: text to ids and back


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
    """The tag is what the text opens with, nothing else; a text without a known one belongs to no strategy."""
    assert split_tag(text) == wanted


@pytest.mark.parametrize("rationale", LEARNED, ids=lambda r: f"{r.id}-{r.strategy}")
def test_forced_prompt_is_a_prefix_of_what_is_trained(student, rationale):
    """Pitfall 5: sampling continues exactly the ids that training began with, and no prompt ends in a space."""
    question = {q.id: q for q in (ANN, BEN, EVE)}[rationale.id]
    free, forced = student.prompt(question), student.prompt(question, rationale.strategy)
    trained = free + student.target(rationale)
    assert trained[:len(forced)] == forced and len(free) < len(forced) < len(trained)
    for prompt in (free, forced):
        assert not student.tokenizer.decode(prompt).endswith(" ")
    assert student.tokenizer.decode(trained) == f"{question.text}\n[{rationale.strategy}]: {rationale.text}"


def test_target_has_one_end_token_at_its_end(student):
    """Pitfall 2: the student learns to stop, and to do so once."""
    for rationale in LEARNED:
        target = student.target(rationale)
        assert target[-1] == student.stop_ids[0] and target.count(student.stop_ids[0]) == 1


def test_bos_is_added_exactly_once():
    """Pitfall 16: a tokenizer that opens texts with a special token does so before the question and nowhere else."""
    student = fresh_student()
    student.tokenizer.add_special_tokens(["<bos>"])
    bos = student.tokenizer.token_to_id("<bos>")
    student.tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", bos)])
    for strategy in (None, *STRATEGIES):
        prompt = student.prompt(ANN, strategy)
        assert prompt[0] == bos and prompt.count(bos) == 1
    assert bos not in student.target(LEARNED[0])


def write_checkpoint(folder, eos_token_id) -> None:
    """A fresh student as another program would have saved it."""
    student = fresh_student()
    student.model.config.extra["eos_token_id"] = eos_token_id
    student.model.save_pretrained(folder)
    student.tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("config, generation_config, wanted", [
    (0, None, [0]), ([0, 7], None, [0, 7]), (None, 5, [5]), (None, [5, 0], [5, 0]), (0, [5, 0, 9], [0, 5, 9])])
def test_stop_ids_of_both_config_files(tmp_path, config, generation_config, wanted):
    """Pitfall 15: every end token ends a text; the first one is trained; a file may give one id or a list, or none."""
    write_checkpoint(tmp_path, config)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_config}))
    loaded = Student.load(tmp_path)
    assert loaded.stop_ids == wanted
    assert loaded.target(LEARNED[0])[-1] == wanted[0]


def test_saved_student_loads_as_it_was(tmp_path, student):
    """The next iteration, or a resumed run, starts from this folder: weights, tokenizer and all stop ids come back."""
    student = copy.deepcopy(student)
    student.stop_ids += [9, 11]  # such as generation_config.json of an instruction-tuned model lists
    student.save(tmp_path)
    loaded = Student.load(tmp_path, max_new_tokens=60)
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), student.model.parameters(), strict=True))
    assert loaded.tokenizer.to_str() == student.tokenizer.to_str()
    assert loaded.stop_ids == student.stop_ids


def test_answers_are_computed_in_the_dtype_that_was_asked_for(student):
    """In bfloat16 other texts come out here and there; they are those of a bfloat16 model, and the student keeps its own."""
    low, how = copy.deepcopy(student), dict(n=20, temperature=2.0, seed=3)
    low.dtype = torch.bfloat16
    prompts = [student.prompt(question) for question in (ANN, BEN, EVE)]
    texts = low.answer(prompts, **how)
    assert texts != student.answer(prompts, **how)
    low.model, low.dtype = low.model.cast(torch.bfloat16), torch.bfloat16
    assert texts == low.answer(prompts, **how)


@pytest.mark.parametrize("text", [None, "{"], ids=["missing", "broken"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_loading_names_what_is_wrong(tmp_path, name, text):
    """A file that is missing or broken is named, by one of the errors that train.py turns into a line. Only
    generation_config.json may be missing."""
    write_checkpoint(tmp_path, eos_token_id=0)
    if text is None:
        (tmp_path / name).unlink(missing_ok=True)
    else:
        (tmp_path / name).write_text(text)
    if (name, text) == ("generation_config.json", None):
        Student.load(tmp_path)
        return
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        Student.load(tmp_path)


def test_tokenizer_neither_cuts_nor_pads(tmp_path):
    """Some tokenizer.json files hold the truncation and padding of the training they come from: a cut text would be
    trained on as if it were whole."""
    write_checkpoint(tmp_path, eos_token_id=0)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    student, whole = Student.load(tmp_path), fresh_student()
    assert student.prompt(ANN, "cot") == whole.prompt(ANN, "cot")
    assert student.target(LEARNED[0]) == whole.target(LEARNED[0])


def test_loading_without_an_end_token_is_refused(tmp_path):
    """Without one every text would run into the token limit, and none would ever be kept."""
    write_checkpoint(tmp_path, eos_token_id=None)
    with pytest.raises(ValueError, match="eos_token_id"):
        Student.load(tmp_path)


def test_ids_without_a_token_are_never_sampled(student):
    """Pitfall 14: a vocabulary padded beyond the tokenizer's; the padded id would win the first draw, were it let in."""
    old, (V, C), prompt = student.model, student.model.model.embed_tokens.weight.shape, student.prompt(ANN, "cot")
    wide = Decoder(dataclasses.replace(old.config, vocab_size=V + 1, tie_word_embeddings=False))
    with torch.no_grad():
        embedding = torch.cat([old.model.embed_tokens.weight, torch.zeros(1, C)])
        output = torch.cat([old.model.embed_tokens.weight, 100 * old.hidden(torch.tensor([prompt]))[0, -1:]])
    wide.load_state_dict({**old.state_dict(), "model.embed_tokens.weight": embedding, "lm_head.weight": output})
    padded = dataclasses.replace(student, model=wide)
    assert wide(torch.tensor([prompt]))[0, -1].argmax() == V
    assert padded.answer([prompt]) == student.answer([prompt])


def test_cut_off_texts_are_told_from_finished_ones(student):
    """A text is finished if its end token came within max_new_tokens: one token less and it is not."""
    cot = LEARNED[0]
    student, length = copy.copy(student), len(student.target(cot)) - len(student.encode("[cot]:"))
    student.max_new_tokens = length
    assert student.answer([student.prompt(ANN, "cot")]) == [[(cot.text, True)]]
    student.max_new_tokens = length - 1
    assert student.answer([student.prompt(ANN, "cot")]) == [[(cot.text, False)]]


# ---------------------------------------------------------------------------------------------------------------------
# step 3: self-generate


def test_self_generation_forces_every_strategy(student):
    """`samples` texts for each question and strategy, by the student, without the tag, not yet checked."""
    generated = self_generate(student, [ANN, EVE], 3, seed=1)
    assert [(r.id, r.strategy) for r in generated] == [(id, s) for id in ("ann", "eve") for s in STRATEGIES for _ in "123"]
    assert {(r.source, r.correct) for r in generated} == {("student", None)}
    learned = {(r.id, r.strategy): (r.text, True) for r in LEARNED}
    for place, texts in texts_of(generated).items():
        assert learned[place] in texts  # almost all are, at temperature 0.7


def test_self_generation_depends_on_the_seed_alone(student):
    """Pitfall 18: not on the order of the questions, their spread over calls, or the rows generated at once."""
    how = dict(samples=2, temperature=2.0, top_p=1.0)  # hot: the texts differ
    whole = self_generate(student, [ANN, BEN, EVE], seed=1, **how)
    assert len({r.text for r in whole}) > len(whole) // 2
    assert self_generate(student, [ANN, BEN, EVE], seed=1, **how) == whole
    assert texts_of(self_generate(student, [EVE, ANN, BEN], seed=1, **how)) == texts_of(whole)
    assert [r for q in (ANN, BEN, EVE) for r in self_generate(student, [q], seed=1, **how)] == whole
    few_rows = copy.copy(student)
    few_rows.rows = 3
    assert self_generate(few_rows, [ANN, BEN, EVE], seed=1, **how) == whole
    assert self_generate(student, [ANN, BEN, EVE], seed=2, **how) != whole


def test_self_generation_is_kept_in_parts(student, monkeypatch):
    """Stopped in the second of three parts, it does not write the first one again, and the texts are the same."""
    how = dict(samples=2, seed=5, temperature=2.0)
    whole = self_generate(student, [ANN, BEN, EVE], **how)
    monkeypatch.setattr("siked.TEXTS_AT_ONCE", 6)  # one question: three strategies, two samples
    kept, computed = {}, []

    def stage(name, compute):
        if name not in kept:
            if len(computed) == 1 and not kept.pop("go on", False):
                raise KeyboardInterrupt
            computed.append(name)
            kept[name] = json.loads(json.dumps(compute()))
        return kept[name]

    with pytest.raises(KeyboardInterrupt):
        self_generate(student, [ANN, BEN, EVE], stage=stage, **how)
    kept["go on"] = True
    assert self_generate(student, [ANN, BEN, EVE], stage=stage, **how) == whole
    assert len(computed) == len(set(computed)) == 3


def test_right_but_unfinished_text_is_not_kept(student):
    """Pitfall 3, from the model to the filter: with one token too few every text is right and none is kept."""
    student = copy.copy(student)
    student.max_new_tokens = len(student.target(LEARNED[0])) - len(student.encode("[cot]:")) - 1
    generated = [r for r in check(self_generate(student, [ANN], 4, seed=1), [ANN]) if r.strategy == "cot"]
    assert any(r.correct for r in generated)
    assert filter_correct(generated) == []


# ---------------------------------------------------------------------------------------------------------------------
# step 6: evaluate


def test_evaluation_of_what_is_known_by_heart(student):
    """Everything right is 1.0, free and forced; with other gold answers the same texts are all wrong."""
    measures = evaluate(student, [ANN, EVE])
    assert (measures["accuracy"], measures["correct"], measures["total"]) == (1.0, 2, 2)
    assert measures["forced"] == {"cot": 1.0, "l2m": 1.0, "pot": 1.0}
    wrong = [Question(q.id, q.text, q.answer + 1) for q in (ANN, EVE)]
    measures = evaluate(student, wrong)
    assert (measures["accuracy"], measures["correct"]) == (0.0, 0)
    assert measures["forced"] == {"cot": 0.0, "l2m": 0.0, "pot": 0.0}


def test_evaluation_by_hand(student):
    """Free: Ann in cot (right), Ben in pot (wrong), Eve in l2m (right). Forced: only Ben's program is wrong."""
    measures = evaluate(student, [ANN, BEN, EVE])
    third = pytest.approx(1 / 3)
    assert (measures["accuracy"], measures["correct"], measures["total"]) == (pytest.approx(2 / 3), 2, 3)
    assert measures["share"] == {"cot": third, "l2m": third, "pot": third}
    assert measures["accuracy_within"] == {"cot": 1.0, "l2m": 1.0, "pot": 0.0}
    assert measures["forced"] == {"cot": 1.0, "l2m": 1.0, "pot": pytest.approx(2 / 3)}
    assert measures["kinds"].keys() == {"more", "less"}
    assert measures["kinds"]["more"]["accuracy"] == 1.0 and measures["kinds"]["more"]["total"] == 2
    assert measures["kinds"]["more"]["accuracy_within"] == {"cot": 1.0, "l2m": 1.0, "pot": None}
    assert measures["kinds"]["less"]["forced"] == {"cot": 1.0, "l2m": 1.0, "pot": 0.0}


def test_answer_without_a_tag_is_wrong(student):
    """A student that names no strategy is not credited, whatever its text ends in; the shares say so by their sum."""
    untaught = fresh_student(max_new_tokens=8)
    measures = evaluate(untaught, [ANN])
    assert measures["accuracy"] == 0 and sum(measures["share"].values()) == 0
    assert set(measures["accuracy_within"].values()) == {None}
    assert measures["kinds"].keys() == {"more"} and evaluate(untaught, [Question("a", "1 + 1?", Fraction(2))])["kinds"] == {}


# ---------------------------------------------------------------------------------------------------------------------
# the loop


# To the student that knows LEARNED by heart: Ann's question is solved, Ben's in two strategies, and Eve's, with this
# gold answer, in none. The teacher's first text to each place is wrong, the second right, the third superfluous.
HARD_EVE = Question("eve", EVE.text, Fraction(99), "more")
ASKED = [ANN, BEN, HARD_EVE]
LESSONS = [Rationale(q.id, s, ("answer = " if s == "pot" else "Final answer: ") + str(value)) for q in ASKED
           for s in STRATEGIES for value in (q.answer + 1, q.answer, f" {q.answer}")]


def run_loop(student, **settings):
    """siked() with a fine_tune that trains nothing: (the iterations, the (mix, round, size) that it was given)."""
    calls = []

    def note(student, rationales, round, size):
        calls.append((rationales, round, size))
        return 10 + round

    return list(siked(student, ASKED, LESSONS, note, {"test": [ANN]}, **({"iterations": 1, "samples": 4} | settings))), calls


@pytest.mark.parametrize("mode, per, n_teacher, n_own, size", [
    ("all", "question", 9, 5, 14), ("adaptive", "question", 3, 5, 8), ("adaptive", "strategy", 4, 5, 9),
    ("self", "question", 0, 5, 5), ("teacher", "question", 9, 0, 14)])
def test_loop_trains_on_the_right_mix(student, mode, per, n_teacher, n_own, size):
    """Round 0 on the teacher's 9 kept texts; round 1 on the mode's mix. The control "teacher" takes the size of "all"."""
    (start, result), calls = run_loop(student, mode=mode, adaptive_per=per)
    assert (start.number, start.generated, start.own, start.figure_2["alpha"]) == (0, [], [], 1)
    assert len(start.training_mix) == 9 and all(r.correct and r.source == "teacher" for r in start.training_mix)
    assert result.number == 1 and len(result.generated) == 3 * 3 * 4 and len(result.own) == 5
    assert [r.source for r in result.training_mix].count("teacher") == n_teacher
    assert [r.source for r in result.training_mix].count("student") == n_own
    assert calls == [(start.training_mix, 0, 9), (result.training_mix, 1, size)]
    assert (start.steps, result.steps) == (10, 11)
    assert start.measures.keys() == {"test"} and start.measures["test"]["accuracy"] == 1.0


def test_loop_samples_anew_in_every_round(student):
    """The same student must not see the same random numbers in two rounds; a run is the same for the same seed."""
    (_, first, second), _ = run_loop(student, iterations=2, temperature=2.0, samples=2)
    assert first.generated != second.generated
    (_, again, _), _ = run_loop(student, iterations=2, temperature=2.0, samples=2)
    assert first.generated == again.generated
    (_, other), _ = run_loop(student, seed=100, temperature=2.0, samples=2)
    assert first.generated != other.generated


def test_loop_runs_no_round_before_it_is_asked_for(student):
    """A generator: what a round did is saved before the next one starts."""
    rounds = []
    iterations = siked(student, ASKED, LESSONS, lambda *call: rounds.append(call[2]) or 1, {}, iterations=3)
    next(iterations)
    assert rounds == [0]


def test_loop_goes_on_where_it_stopped(tmp_path):
    """Pitfall 17, with real training: round 2 after a stop, from the saved student, is the one without a stop."""
    def teach(student, rationales, round, size):
        train(student, rationales, 25)
        return 25

    lessons = [r for r in LEARNED if (r.id, r.strategy) != ("ben", "pot")]
    how = dict(iterations=2, samples=2, mode="all", seed=5, temperature=1.0)
    student = fresh_student(max_new_tokens=30)
    student.model.config.extra["eos_token_id"] = 0
    undisturbed = []
    for result in siked(student, [ANN, BEN, EVE], lessons, teach, {"test": [ANN, BEN, EVE]}, **how):
        undisturbed.append(result)
        if result.number == 1:
            student.save(tmp_path)
    assert [r.number for r in undisturbed] == [0, 1, 2]
    assert undisturbed[2].own, "the case should have texts of the student's own in the mix"
    loaded = Student.load(tmp_path, max_new_tokens=30)
    assert list(siked(loaded, [ANN, BEN, EVE], lessons, teach, {"test": [ANN, BEN, EVE]}, first=2, **how)) == undisturbed[2:]
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), student.model.parameters(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# files


GOOD = '{"id": "a", "question": "1 + 1?", "answer": "2"}\n'


@pytest.mark.parametrize("text, named", [
    (GOOD + '{"id": "b", "question": \n', ["line 2", "JSON"]),
    (GOOD + "\n\n[1]\n", ["line 4", "id"]),
    (GOOD + '{"id": "b", "answer": "2"}\n', ["line 2", "question"]),
    (GOOD + '{"id": "b", "question": "1 + 1?"}\n', ["line 2", "answer"]),
    (GOOD + '{"id": 3, "question": "1 + 1?", "answer": "2"}\n', ["line 2", "id"]),
    (GOOD + '{"id": "b", "question": "1 + 1?", "answer": "two"}\n', ["line 2", "two"]),
    (GOOD + '{"id": "b", "question": "1 + 1?", "answer": ""}\n', ["line 2", "answer"]),
    (GOOD + '{"id": "b", "question": "1 + 1?", "answer": "2", "kind": 3}\n', ["line 2", "kind"]),
    (GOOD + GOOD, ["line 2", "'a'"]),
    (GOOD.encode() + b'{"id": "\xff"}\n', ["line 2"]),
    ("", ["no questions"]),
    ("\n\n", ["no questions"]),
])
def test_broken_questions_are_refused_by_file_and_line(tmp_path, text, named):
    """One line that says where to look and what for, also for a file in which nothing stands."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:
        read_questions(path)
    for words in (str(path), *named):
        assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line, named", [
    ('{"id": "ann", "strategy": "cot", "text": }', "JSON"),
    ('{"id": "ann", "strategy": "cot"}', "text"),
    ('{"strategy": "cot", "text": "7"}', "id"),
    ('{"id": "ann", "strategy": "tot", "text": "7"}', "'tot'"),
    ('{"id": "zoe", "strategy": "cot", "text": "7"}', "'zoe'"),
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


def test_missing_files_are_named(tmp_path):
    """By their path, and as the error that missing files have everywhere."""
    for read in (read_questions, lambda path: read_rationales(path, [ANN])):
        with pytest.raises(FileNotFoundError, match="absent.jsonl"):
            read(tmp_path / "absent.jsonl")


def test_what_is_read_is_what_was_written(tmp_path):
    """Numbers as people write them, any letters, line breaks inside a text (also Unicode's), blank lines, and files with
    the mark that Windows editors put first."""
    questions = [{"id": "1", "question": "Äpfel?\u2028Kinds: 5", "answer": "1,234.50", "kind": "fruit", "source": "x"},
                 {"id": "2", "question": "1/2?", "answer": "$0.5"}]
    text = "\ufeff" + "\n\n".join(json.dumps(q, ensure_ascii=False) for q in questions)  # no line break at the end
    (tmp_path / "train.jsonl").write_text(text, encoding="utf-8", newline="\n")
    read = read_questions(tmp_path / "train.jsonl")
    assert read == [Question("1", questions[0]["question"], Fraction(2469, 2), "fruit"),
                    Question("2", "1/2?", Fraction(1, 2))]

    lines = [{"id": "1", "strategy": "pot", "text": "a = 1\nanswer = a"},
             {"id": "2", "strategy": "cot", "text": "", "source": "student", "finished": False, "correct": True}]
    (tmp_path / "self.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_rationales(tmp_path / "self.jsonl", read) == [
        Rationale("1", "pot", "a = 1\nanswer = a"), Rationale("2", "cot", "", "student", False, True)]
