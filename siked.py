"""SIKeD, Self-guided Iterative Knowledge Distillation: the method itself. `siked()` is the whole loop.

A large teacher solves word problems in three strategies. A small student that is trained on all of them has no reason to
prefer one for a question: it falls back on a favourite, also where that one fails. SIKeD lets the student's own correct
answers decide which strategy suits which question. The README and the comments below use the same numbers:

    0 teacher data   1 filter   2 distil   3 self-generate   4 mix   5 retrain   6 evaluate   7 repeat

One question in the three strategies, as the student is trained to answer it. <end> is the end token:

    prompt    Ben has 14 cards. Ben buys 5, then doubles the pile. How many cards does Ben have now?\\n
    target    [cot]: at the start: 14. 14 + 5 = 19. 19 * 2 = 38. Final answer: 38<end>
    target    [l2m]: step 2: step 1 * 2? step 1: at the start + 5? at the start: 14. ... Final answer: 38<end>
    target    [pot]: answer = (14 + 5) * 2<end>

Source: Adarsh, Shridhar, Gulcehre, Monath, Sachan, Findings of ACL 2025, doi 10.18653/v1/2025.findings-acl.513.
Begin here, with `siked()`. Then data/answers.py (what is "correct"?), train.py (steps 2 and 5), sampler.py (step 3), model.py.
"""
import json
import math
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path

import torch
from tokenizers import Tokenizer

from data.answers import STRATEGIES, numeric_answer, parse_number, same_number
from model import Decoder, write_beside
from sampler import generate, is_finished

MODES = ("all", "adaptive", "self", "teacher")
TEXTS_AT_ONCE = 8192  # a part of self-generation: many batches, so that the last one, which empties, is a small share
LONGEST_LINE = 10_000_000  # bytes of a data file; a longer one is no question


@dataclass(frozen=True)
class Question:
    id: str
    text: str
    answer: Fraction                # the gold answer
    kind: str = ""                  # results are also given by kind, where the file names one


@dataclass(frozen=True)
class Rationale:
    id: str                         # of its question
    strategy: str                   # one of STRATEGIES
    text: str
    source: str = "teacher"         # or "student"
    finished: bool = True           # False: cut off by the token limit; such a text is never trained on, even if right
    correct: bool | None = None     # None: not checked yet


@dataclass(frozen=True)
class Iteration:
    """What one round did. Round 0 is plain distillation ("Combined"): nothing self-generated, the teacher's mix."""
    number: int
    generated: list[Rationale]
    own: list[Rationale]            # of the generated: correct, finished, distinct
    training_mix: list[Rationale]
    steps: int                      # optimizer updates
    measures: dict[str, dict]       # evaluation set -> what `evaluate` returns
    figure_2: dict                  # what `measure_mix` returns


@contextmanager
def no_progress(total: int, what: str):
    """Stands for a progress bar: yields the function that is told how many more texts are finished, here none."""
    yield None


def compute_now(name: str, compute):
    """Stands for a store of finished work."""
    return compute()


# ---------------------------------------------------------------------------------------------------------------------
# the loop


def siked(student, questions, teacher, fine_tune, sets, *, mode="adaptive", adaptive_per="question", iterations=3,
          samples=1, keep=1, temperature=0.7, top_p=0.95, seed=0, first=0, progress=no_progress, stage=compute_now):
    """The numbered steps of the method. Yields an Iteration after each round, round 0 first.

    student     a Student, trained in place
    questions   list[Question] to train on
    teacher     list[Rationale] to these questions, right and wrong alike: step 0, done by data/toy.py or a real teacher
    fine_tune   function(student, rationales, round, size) -> optimizer steps, as many as a mix of `size` texts takes;
                train.py passes one that makes examples of the rationales and calls train.fine_tune with them
    sets        dict name -> list[Question] to evaluate on
    first       the round to go on with, if `student` has the weights of the round before it
    stage       function(name, compute) -> compute(), or what it gave under this name before a run was stopped
    """
    teacher = filter_correct(check(teacher, questions))                                     # step 1: filter
    for number in range(first, iterations + 1):
        generated, own, training_mix = [], [], teacher
        if number > 0:
            generated = self_generate(student, questions, samples, seed=seed + number,      # step 3: self-generate
                                      temperature=temperature, top_p=top_p, progress=progress, stage=stage)
            generated = check(generated, questions)
            own = filter_correct(generated, keep)                                           #         and filter
            training_mix = mix(teacher, own, mode, adaptive_per)                            # step 4: mix
        # The control trains for as long as "all" would.
        size = len(teacher) + len(own) if mode == "teacher" else len(training_mix)
        steps = fine_tune(student, training_mix, number, size)                              # step 2: distil, step 5: retrain
        measures = {name: stage(f"{number}: evaluate {name}", lambda: evaluate(student, asked, name, progress))
                    for name, asked in sets.items()}                                        # step 6: evaluate
        yield Iteration(number, generated, own, training_mix, steps, measures,              # step 7: repeat
                        measure_mix(teacher, own, training_mix))


# ---------------------------------------------------------------------------------------------------------------------
# step 1: filter


def is_correct(question: Question, strategy: str | None, text: str) -> bool:
    """The one rule for "correct": teacher filter, student filter and evaluation all call it."""
    return strategy is not None and same_number(numeric_answer(strategy, text), question.answer)


def check(rationales, questions) -> list[Rationale]:
    """The same rationales with `correct` filled in."""
    by_id = {question.id: question for question in questions}
    return [replace(r, correct=is_correct(by_id[r.id], r.strategy, r.text)) for r in rationales]


def filter_correct(checked, keep: int = 1) -> list[Rationale]:
    """The first `keep` correct, finished, distinct rationales of every question and strategy, in the order given.

    Texts that differ only in white space are duplicates.
    """
    kept, seen, chosen = Counter(), set(), []
    for rationale in checked:
        place = (rationale.id, rationale.strategy)
        text = (place, " ".join(rationale.text.split()))
        if rationale.correct and rationale.finished and text not in seen and kept[place] < keep:
            seen.add(text)
            kept[place] += 1
            chosen.append(rationale)
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# step 3: self-generate


@dataclass
class Student:
    """A model with its tokenizer: knows how questions, strategy tags and rationales become token ids.

    Prompt and target are encoded separately and joined as ids, in training and in sampling alike, so that a forced
    "[cot]:" is a prefix of what was trained. No prompt ends in a space: that belongs to the next word's token.
    """
    model: Decoder
    tokenizer: Tokenizer
    stop_ids: list[int]             # each of these ends a text; the first is the end token that is trained
    max_new_tokens: int = 512       # of a text, the end token included
    rows: int = 256                 # texts generated at once
    dtype: torch.dtype = torch.float32  # of the arithmetic in sampling; the model's weights stay as they are

    @classmethod
    def load(cls, folder, max_new_tokens: int = 512, rows: int = 256, dtype=torch.float32, device="cpu") -> "Student":
        """Reads a Hugging Face folder, as float32 weights; the errors are those of Decoder.from_pretrained."""
        folder, stop_ids = Path(folder), []
        model = Decoder.from_pretrained(folder, device=device)
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{folder / 'tokenizer.json'}: no such file")
        try:
            for name in ("config.json", "generation_config.json"):
                if (folder / name).is_file():
                    ids = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
                    stop_ids += ids if isinstance(ids, list) else [] if ids is None else [ids]
            name = "tokenizer.json"
            tokenizer = Tokenizer.from_file(str(folder / name))
        except Exception as error:  # tokenizers raises nothing more special
            raise ValueError(f"{folder / name} cannot be read: {error}") from None
        if not stop_ids:
            raise ValueError(f"{folder}: neither config.json nor generation_config.json names an eos_token_id")
        tokenizer.no_truncation()  # some files hold the settings of the training that they come from
        tokenizer.no_padding()
        return cls(model, tokenizer, list(dict.fromkeys(stop_ids)), max_new_tokens, rows, dtype)

    def save(self, folder) -> None:
        self.model.save_pretrained(folder)
        for name, text in (("tokenizer.json", self.tokenizer.to_str(pretty=True)),
                           ("generation_config.json", json.dumps({"eos_token_id": self.stop_ids}) + "\n")):
            write_beside(Path(folder) / name, lambda path: path.write_text(text, "utf-8"))

    def prompt(self, question: Question, strategy: str | None = None) -> list[int]:
        """The question and, if the strategy is forced, its tag. A tokenizer that opens texts with a special token
        (Gemma's <bos>) does so here and nowhere else."""
        ids = self.tokenizer.encode(question.text + "\n").ids
        return ids if strategy is None else ids + self.encode(f"[{strategy}]:")

    def target(self, rationale: Rationale) -> list[int]:
        """The tag, the rationale and the end token: what the loss is computed on."""
        return self.encode(f"[{rationale.strategy}]:") + self.encode(" " + rationale.text) + self.stop_ids[:1]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def answer(self, prompts: list[list[int]], n: int = 1, **kwargs) -> list[list[tuple[str, bool]]]:
        """Samples n texts per prompt: [prompt][sample] -> (text, finished). kwargs go to sampler.generate."""
        highest_id = max(self.tokenizer.get_vocab().values())  # a padded vocabulary has ids without a token behind it
        samples = generate(self.model.cast(self.dtype), prompts, n=n, max_new_tokens=self.max_new_tokens,
                           stop_ids=self.stop_ids, batch_size=self.rows,
                           n_ids=min(highest_id + 1, self.model.config.vocab_size), **kwargs)
        return [[(self.tokenizer.decode(ids).strip(), is_finished(ids, self.max_new_tokens)) for ids in row]
                for row in samples]


def self_generate(student: Student, questions, samples: int, *, seed: int, temperature: float = 0.7,
                  top_p: float = 0.95, progress=no_progress, stage=compute_now) -> list[Rationale]:
    """`samples` rationales of the student for every question in every strategy, forced by its tag; not yet checked.

    They are written in parts, so that a run that is stopped loses one part at most.
    """
    jobs, texts = [(question, strategy) for question in questions for strategy in STRATEGIES], []
    prompts = [student.prompt(*job) for job in jobs]
    at_once = len(STRATEGIES) * max(1, TEXTS_AT_ONCE // (len(STRATEGIES) * samples))  # prompts; whole questions
    with progress(len(jobs) * samples, "self-generate") as update:
        for start in range(0, len(jobs), at_once):
            texts += stage(f"self-generate, seed {seed}, from {start}", lambda: student.answer(
                prompts[start:start + at_once], samples, seed=seed, temperature=temperature, top_p=top_p, progress=update))
    return [Rationale(question.id, strategy, text, "student", finished)
            for (question, strategy), row in zip(jobs, texts) for text, finished in row]


# ---------------------------------------------------------------------------------------------------------------------
# step 4: mix


def mix(teacher: list[Rationale], own: list[Rationale], mode: str, adaptive_per: str = "question") -> list[Rationale]:
    """What to train on, of the teacher's kept rationales and the student's own kept ones:

        all        both
        adaptive   the own ones, and the teacher's where the student failed: on questions that it solved in no strategy,
                   or (adaptive_per = "strategy") on questions and strategies that it did not solve
        self       the own ones
        teacher    the teacher's: a control, trained for as many steps as "all" would take
    """
    if mode not in MODES:
        raise ValueError(f"mode = {mode!r} is not one of {', '.join(MODES)}")
    if adaptive_per not in ("question", "strategy"):
        raise ValueError(f"adaptive_per = {adaptive_per!r} is neither 'question' nor 'strategy'")
    if mode == "adaptive":
        def place(r):
            return r.id if adaptive_per == "question" else (r.id, r.strategy)
        solved = {place(rationale) for rationale in own}
        return [rationale for rationale in teacher if place(rationale) not in solved] + own
    return {"all": teacher + own, "self": list(own), "teacher": list(teacher)}[mode]


def count_strategies(rationales) -> dict[str, int]:
    counts = Counter(rationale.strategy for rationale in rationales)
    return {strategy: counts[strategy] for strategy in STRATEGIES}


def measure_mix(teacher, own, training_mix) -> dict:
    """Figure 2 of the paper: alpha, the share of the teacher in the mix; the distributions over strategies of teacher,
    mix and student (its kept own rationales); and the divergence KL(P_mix || P_student), in nats.

    Half a text is added to every count, so that a strategy which the student never solves gives a large divergence, not
    an infinite one.
    """
    def distribution(rationales):
        counts = {strategy: count + 0.5 for strategy, count in count_strategies(rationales).items()}
        return {strategy: count / sum(counts.values()) for strategy, count in counts.items()}

    p_mix, p_student = distribution(training_mix), distribution(own) if own else None
    return {"alpha": sum(r.source == "teacher" for r in training_mix) / max(len(training_mix), 1),
            "P_teacher": distribution(teacher), "P_mix": p_mix, "P_student": p_student,
            "KL": sum(p * math.log(p / p_student[s]) for s, p in p_mix.items()) if own else None}


# ---------------------------------------------------------------------------------------------------------------------
# step 6: evaluate


def split_tag(text: str) -> tuple[str | None, str]:
    """ "[cot]: 3 + 4 = 7. Final answer: 7" -> ("cot", "3 + 4 = 7. Final answer: 7"); no known tag -> (None, text)."""
    match = re.match(r"\[(\w+)\]:\s*", text)
    return (match[1], text[match.end():]) if match and match[1] in STRATEGIES else (None, text)


def evaluate(student: Student, questions, name: str = "", progress=no_progress) -> dict:
    """Greedy answers with the free prompt, where the student chooses the strategy, and with each strategy forced:

    accuracy, correct, total    of the free answers
    share                       of each strategy among the free answers
    accuracy_within             of the free answers in a strategy, the share that is right (None: there are none)
    forced                      accuracy with a strategy forced
    kinds                       all of this for each kind of question, where the questions have kinds
    answers                     the free answers themselves
    """
    ways = (None, *STRATEGIES)  # None: free
    prompts = [student.prompt(question, way) for question in questions for way in ways]
    with progress(len(prompts), f"evaluate {name}") as update:
        texts = iter(student.answer(prompts, progress=update))
    answers, judged = [], []  # judged: (kind, strategy of the free answer, {way: is its answer right?})
    for question in questions:
        strategy, text = split_tag(next(texts)[0][0])
        right = {None: is_correct(question, strategy, text)}
        right |= {way: is_correct(question, way, next(texts)[0][0]) for way in STRATEGIES}
        judged.append((question.kind, strategy, right))
        answers.append({"id": question.id, "strategy": strategy, "correct": right[None], "text": text})

    def summarise(judged):
        total, chosen = len(judged), {way: [right[None] for _, s, right in judged if s == way] for way in STRATEGIES}
        return {"accuracy": sum(right[None] for *_, right in judged) / total,
                "correct": sum(right[None] for *_, right in judged), "total": total,
                "share": {way: len(of) / total for way, of in chosen.items()},
                "accuracy_within": {way: sum(of) / len(of) if of else None for way, of in chosen.items()},
                "forced": {way: sum(right[way] for *_, right in judged) / total for way in STRATEGIES}}

    kinds = sorted({kind for kind, *_ in judged} - {""})
    by_kind = {kind: summarise([one for one in judged if one[0] == kind]) for kind in kinds}
    return summarise(judged) | {"kinds": by_kind, "answers": answers}


# ---------------------------------------------------------------------------------------------------------------------
# files: JSON lines, one question or rationale a line


def read_lines(path, required: tuple[str, ...]):
    """Yields (place, dict) for every line; an error names the file, the line and what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
            place = f"{path}, line {number}"
            if len(line) > LONGEST_LINE:
                raise ValueError(f"{place}: longer than {LONGEST_LINE:,} bytes")
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # bad JSON or bad UTF-8
                raise ValueError(f"{place}: not JSON: {error}") from None
            for name in required:
                if not isinstance(record, dict) or not isinstance(record.get(name), str):
                    raise ValueError(f"{place}: the field {name!r} is missing or not a text")
                if re.search("[\ud800-\udfff]", record[name]):
                    raise ValueError(f"{place}: the field {name!r} holds half of a character, a lone surrogate")
            yield place, record


def read_questions(path) -> list[Question]:
    questions = {}
    for place, record in read_lines(path, ("id", "question", "answer")):
        answer = parse_number(record["answer"])
        if answer is None:
            raise ValueError(f"{place}: the gold answer {record['answer']!r} is not a number")
        if not isinstance(record.get("kind", ""), str):
            raise ValueError(f"{place}: the field 'kind' is not a text")
        if record["id"] in questions:
            raise ValueError(f"{place}: the id {record['id']!r} stands there a second time")
        questions[record["id"]] = Question(record["id"], record["question"], answer, record.get("kind", ""))
    if not questions:
        raise ValueError(f"{path}: no questions in it")
    return list(questions.values())


def read_rationales(path, questions) -> list[Rationale]:
    """The rationales of a teacher.jsonl, or of a self.jsonl or mix.jsonl, which have more of the fields."""
    known = {question.id for question in questions}
    rationales = []
    for place, record in read_lines(path, ("id", "strategy", "text")):
        if record["strategy"] not in STRATEGIES:
            raise ValueError(f"{place}: the strategy {record['strategy']!r} is not one of {', '.join(STRATEGIES)}")
        if record["id"] not in known:
            raise ValueError(f"{place}: no question has the id {record['id']!r}; are these rationales of another file?")
        for name, allowed in (("source", ("teacher", "student")), ("finished", (True, False))):
            if record.get(name, allowed[0]) not in allowed:
                raise ValueError(f"{place}: the field {name!r} is neither {allowed[0]!r} nor {allowed[1]!r}")
        rationales.append(Rationale(**{f.name: record[f.name] for f in fields(Rationale) if f.name in record}))
    return rationales
