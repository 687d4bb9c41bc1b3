"""SIKeD, Self-guided Iterative Knowledge Distillation: the method, without a single tensor.

A large teacher solves word problems in three strategies. A small student learns all three, but not
which one suits a question: it falls back on a favourite. SIKeD lets the student's own correct
answers decide that. The README and the comments below use the same numbers:

    0 teacher data  1 filter  2 distil  3 self-generate  4 mix  5 retrain  6 evaluate  7 repeat

One question in the three strategies, as the student is trained to answer it. Least-to-Most (l2m)
goes from the goal back to what is known, then answers forwards:

    prompt    Every guest brings 3 more cards than who invited them. Sam brings 21. Eve was invited
              by Sam. Hugo was invited by Eve. ... How many cards does Hugo bring?
    target    [cot]: Sam: 21. Eve: 21 + 3 = 24. Hugo: 24 + 3 = 27. Final answer: 27<end>
    target    [l2m]: Hugo needs Eve + 3. Eve needs Sam + 3. Sam: 21. 21 + 3 = 24. 24 + 3 = 27.
              Final answer: 27<end>
    target    [pot]: answer = (21 + 3) + 3<end>

Source: Adarsh, Shridhar, Gulcehre, Monath, Sachan, Findings of ACL 2025,
doi 10.18653/v1/2025.findings-acl.513.

Begin with `siked()`. Then read data/answers.py (what is correct?), train.py (steps 2 and 5),
sampler.py (how the student writes) and model.py.
"""
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from statistics import fmean as mean

from data.answers import STRATEGIES, is_correct
from data.files import Data, Rationale, saved, saved_rationales
from data.room import room_to_choose

# A Question has id, text, answer and kind. A Rationale has id (its question's), strategy, text,
# source ("teacher" or "student") and finished (False: cut off). Data has questions, teacher, sets.
# saved(file, function, ...) is what the file holds; if there is none, function(...) fills it first.

MIXES = ("adaptive", "adaptive-per-strategy", "all", "self", "teacher")
SAMPLING = {"temperature": 0.7, "top_p": 0.95}  # of own texts
TEXTS_IN_A_PART = 8192  # own texts in one file: a kill loses at most one file


@dataclass(frozen=True)
class Round:
    """What one round did. Round 0 is plain distillation: the teacher's rationales alone."""
    number: int
    generated: list[Rationale]      # what the student wrote
    own: list[Rationale]            # the part of it that was kept
    training_mix: list[Rationale]   # what it was then trained on
    results: dict[str, list[dict]]  # evaluation set -> what `evaluate` returns


def siked(student, data: Data, train, folders, mode="adaptive", samples=1, keep=1, seed=0):
    """The method. Yields a Round when it is done, round 0 first.

    student  answers questions (sampler.Student); it is trained in place
    data     questions to train on, the teacher's rationales (step 0), sets to evaluate on
    train    function(student, rationales, folder, seed): trains the student, saves it in the folder
    folders  one for each round. What a step computes is a file there, and is not computed again: a
             killed run goes on where it was, and on a CPU its result is the same.
    mode     one of MIXES, see `mix`
    samples  K, the texts that the student writes per question and strategy; 0 in a control, which
             trains on the teacher's alone
    keep     at most so many correct own texts per question and strategy enter the mix
    """
    questions = data.questions
    teacher_texts = filter_correct(data.teacher, questions)         # step 1: filter
    train(student, teacher_texts, folders[0], 1000 * seed)          # step 2: distil
    results = evaluate_sets(student, data.sets, folders[0])         # step 6: evaluate
    yield Round(0, [], [], teacher_texts, results)

    for number, folder in enumerate(folders[1:], start=1):          # step 7: repeat
        round_seed = 1000 * seed + number
        generated = self_generate(student, questions, samples, round_seed, folder)      # step 3
        own_texts = filter_correct(generated, questions, keep)      # step 1 again: filter
        training_mix = mix(teacher_texts, own_texts, mode)          # step 4: mix
        train(student, training_mix, folder, round_seed)            # step 5: retrain
        results = evaluate_sets(student, data.sets, folder)         # step 6: evaluate
        yield Round(number, generated, own_texts, training_mix, results)


# --------------------------------------------------------------------------------------------------
# step 1: filter


def filter_correct(rationales, questions, keep: int = 1) -> list[Rationale]:
    """The first `keep` correct, finished, distinct rationales of each question and strategy.

    Unfinished ones go, even with a right answer: they would teach the student not to stop.
    Texts that differ only in white space are duplicates.
    """
    by_id = {question.id: question for question in questions}
    kept_texts = defaultdict(set)  # (id, strategy) -> those that are kept, with single spaces
    kept = []
    for rationale in rationales:
        texts = kept_texts[rationale.id, rationale.strategy]
        text = " ".join(rationale.text.split())
        if not rationale.finished or text in texts or len(texts) == keep:
            continue
        if is_correct(rationale.strategy, rationale.text, by_id[rationale.id].answer):
            texts.add(text)
            kept.append(rationale)
    return kept


# --------------------------------------------------------------------------------------------------
# step 3: self-generate


def self_generate(student, questions, samples: int, seed: int, folder) -> list[Rationale]:
    """`samples` texts for every question in every strategy, not yet checked. They are saved in
    parts, a file for each part, and a question's texts are never split."""
    if samples == 0:
        return []
    size = max(1, TEXTS_IN_A_PART // (samples * len(STRATEGIES)))  # questions in a part
    generated = []
    for start in range(0, len(questions), size):
        part = questions[start:start + size]
        # One seed serves all parts: a text's draws depend on its prompt, too (make_generator in
        # sampler.py), so no part repeats another.
        path = folder / f"self-{start}.jsonl"
        generated += saved_rationales(path, force_strategies, student, part, samples, seed)
    return generated


def force_strategies(student, questions, samples: int, seed: int) -> list[Rationale]:
    """Asks the student every question in every strategy: the prompt ends in the strategy's tag,
    "[cot]:" say."""
    asked = [(question, strategy) for question in questions for strategy in STRATEGIES]
    answers = student.answer(asked, n=samples, seed=seed, progress="self-generate", **SAMPLING)
    rationales = []
    for (question, strategy), texts in zip(asked, answers):
        for text, finished in texts:
            rationales.append(Rationale(question.id, strategy, text, "student", finished))
    return rationales


# --------------------------------------------------------------------------------------------------
# step 4: mix


def mix(teacher: list[Rationale], own: list[Rationale], mode: str) -> list[Rationale]:
    """What to train on next, from the teacher's kept rationales and the student's own.

    adaptive               all own ones; the teacher's for questions that the student solved in no
                           strategy
    adaptive-per-strategy  all own ones; the teacher's for questions and strategies where the
                           student failed
    all                    both
    self                   the own ones
    teacher                the teacher's
    """
    if mode == "adaptive":
        solved = {r.id for r in own}
        teacher = [r for r in teacher if r.id not in solved]
    elif mode == "adaptive-per-strategy":
        solved = {(r.id, r.strategy) for r in own}
        teacher = [r for r in teacher if (r.id, r.strategy) not in solved]
    elif mode == "self":
        teacher = []
    elif mode == "teacher":
        own = []
    elif mode != "all":
        raise ValueError(f"mode = {mode!r} is not one of {', '.join(MIXES)}")
    return teacher + own


# --------------------------------------------------------------------------------------------------
# step 6: evaluate


def split_tag(text: str) -> tuple[str | None, str]:
    """ "[cot]: 3 + 4 = 7." -> ("cot", "3 + 4 = 7."); without a known tag -> (None, text)."""
    for strategy in STRATEGIES:
        tag = f"[{strategy}]:"
        if text.startswith(tag):
            return strategy, text.removeprefix(tag).lstrip()
    return None, text


def evaluate_sets(student, sets, folder) -> dict[str, list[dict]]:
    results = {}
    for name, questions in sets.items():
        path = folder / f"answers-{name}.json"
        results[name] = saved(path, evaluate, student, questions, name)
    return results


def evaluate(student, questions, name="") -> list[dict]:
    """Greedy answers to each question: a free one, where the student chooses the strategy, and one
    in each strategy, forced. An answer that is cut off counts by what it says. A record for each
    question:

    id, kind   of the question
    strategy   that the student chose (None: it named no known one, and is wrong)
    text       of the free answer, without the tag
    correct    is the free answer correct?
    forced     strategy -> is the forced answer correct?
    """
    asked = [(question, way) for question in questions for way in (None, *STRATEGIES)]
    answers = student.answer(asked, progress=f"evaluate {name}")
    texts = {}  # (question, strategy or None: free) -> the answer
    for pair, [(text, _)] in zip(asked, answers):  # one text each
        texts[pair] = text

    records = []
    for question in questions:
        strategy, text = split_tag(texts[question, None])
        forced = {}
        for way in STRATEGIES:
            forced[way] = is_correct(way, texts[question, way], question.answer)
        records.append({
            "id": question.id,
            "kind": question.kind,
            "strategy": strategy,
            "text": text,
            "correct": is_correct(strategy, text, question.answer),
            "forced": forced,
        })
    return records


def summarise(records) -> dict:
    """The records of `evaluate` in numbers.

    accuracy         of the free answers
    any              share of questions that some forced strategy gets right: no choice of strategy
                     can bring more
    share            of each strategy among the free answers
    accuracy_within  of the free answers in a strategy (None: there are none)
    forced           accuracy with a strategy forced
    """
    summary = {
        "accuracy": mean(record["correct"] for record in records),
        "any": mean(any(record["forced"].values()) for record in records),
        "share": {},
        "accuracy_within": {},
        "forced": {},
    }
    for strategy in STRATEGIES:
        chosen = [record["correct"] for record in records if record["strategy"] == strategy]
        summary["share"][strategy] = len(chosen) / len(records)
        summary["accuracy_within"][strategy] = mean(chosen) if chosen else None
        summary["forced"][strategy] = mean(record["forced"][strategy] for record in records)
    return summary


# --------------------------------------------------------------------------------------------------
# measures of the paper's Figure 2. With `adaptive` the teacher's share of the mix, alpha, falls
# from round to round: the student solves more questions, and fewer need the teacher. The student is
# compared with a round's mix twice. KL compares the mix with the kept forced texts that the student
# wrote before the training: what it CAN do. With `adaptive` KL is small, since most of the mix is
# these texts. KL_free compares the mix with the student's free answers after the training: what it
# CHOOSES. KL_free falls if the student learns to choose as the mix does.


def measure(result: Round, questions, labels: dict) -> list[dict]:
    """All measures of a round: a line for each set, with the labels in front, then the fields of
    `summarise` (also by kind of question), then these:

    alpha      the teacher's share of the mix, n_teacher / (n_teacher + n_own)
    P_mix      shares in the mix
    P_student  shares in the student's own kept texts. Each strategy was forced equally often, so
               they say what the student can do
    P_free     shares in its free answers to the held-out questions, after training on the mix: what
               it chooses
    KL         KL(P_mix || P_student)
    KL_free    KL(P_mix || P_free)
    room       what a choice per question could bring before this training, see data/room.py
    """
    held_out = result.results.get("held-out", [])
    mixed = shares(rationale.strategy for rationale in result.training_mix)
    own = shares(rationale.strategy for rationale in result.own)
    free = shares(record["strategy"] for record in held_out)
    n_teacher = sum(rationale.source == "teacher" for rationale in result.training_mix)
    figures = {
        "alpha": n_teacher / max(1, len(result.training_mix)),
        "P_mix": mixed,
        "P_student": own,
        "P_free": free,
        "KL": divergence(mixed, own),
        "KL_free": divergence(mixed, free),
        "room": room_to_choose(result.generated, questions),
    }
    lines = []
    for name, records in result.results.items():
        kinds = {}
        for kind in sorted({record["kind"] for record in records} - {""}):
            kinds[kind] = summarise([record for record in records if record["kind"] == kind])
        lines.append({**labels, "set": name, **summarise(records), "kinds": kinds, **figures})
    return lines


def shares(strategies) -> dict[str, float] | None:
    """The distribution over strategies of a list of their names. Names of no strategy do not count;
    None if no name counts.

    Half a text is added to every count, so that no share is 0 and no divergence infinite.
    """
    counts = Counter(strategy for strategy in strategies if strategy in STRATEGIES)
    if not counts:
        return None
    total = counts.total() + 0.5 * len(STRATEGIES)
    return {strategy: (counts[strategy] + 0.5) / total for strategy in STRATEGIES}


def divergence(p, q) -> float | None:
    """The Kullback-Leibler divergence KL(p || q) of two distributions over strategies, in nats.
    None if one of them is not known."""
    if p is None or q is None:
        return None
    return sum(p[strategy] * math.log(p[strategy] / q[strategy]) for strategy in STRATEGIES)
