"""What could a choice of strategy per question bring, and can it be learned at all?

    python data/room.py out/seed-0/adaptive-1 --data data/toy

`room_to_choose`, a column of the report, answers the first. To learn the choice the student must
see in a question which strategy suits it; the command above asks how much of it can be seen. A
ridge regression learns, from the words of nine tenths of the questions, how often each strategy is
right (own texts: self-*.jsonl of the folder), and chooses for the other tenth; ten times, until all
are chosen for. Its gain over the best single strategy for all questions says how much a simple
reader can learn. Where that is about 0, do not expect a small student to learn more than its best
strategy.
"""
import argparse
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from data.answers import STRATEGIES, is_correct  # noqa: E402
from data.files import read_questions, read_rationales, run_command  # noqa: E402

PENALTIES = (1, 3, 10, 30)  # of the ridge regression: the larger, the closer to the mean
FOLDS = 10
LEAST = 3  # questions with a word: rarer words are left out


def room_to_choose(generated, questions) -> float | None:
    """How much more a choice per question gets right than the best one strategy for all questions.

    For each question, one half of its texts picks a strategy: the one that is right most often in
    this half. The other half says how often that strategy is right. Then the halves change places.
    So a lucky hit is no gain unless the other half repeats it. With few texts the pick is poor:
    then the figure is too low, even below 0. None if a question has fewer than four texts in a
    strategy (K < 4).

    A student that knew which strategy works on which question would gain so much.
    """
    gold = {question.id: question.answer for question in questions}
    verdicts = defaultdict(list)  # (id, strategy) -> is each text correct?
    for text in generated:
        verdicts[text.id, text.strategy].append(is_correct(text.strategy, text.text, gold[text.id]))
    counts = [len(verdicts[id, strategy]) for id in gold for strategy in STRATEGIES]
    if not generated or min(counts) < 4:
        return None
    accuracy = {}
    for strategy in STRATEGIES:
        accuracy[strategy] = fmean(fmean(verdicts[id, strategy]) for id in gold)
    ranked = sorted(STRATEGIES, key=accuracy.get, reverse=True)  # the best over all texts first
    scores = []
    for id in gold:
        for half in (0, 1):  # every other text
            rates = {strategy: fmean(verdicts[id, strategy][half::2]) for strategy in ranked}
            chosen = max(rates, key=rates.get)  # of equally good ones the first
            other_half = 1 - half
            scores.append(fmean(verdicts[id, chosen][other_half::2]))
    return fmean(scores) - max(accuracy.values())


def success_rates(questions, texts):
    """The share of right texts, (Q, 3): a row for each question, a column for each strategy."""
    row = {question.id: i for i, question in enumerate(questions)}
    right = np.zeros((len(questions), len(STRATEGIES)))
    total = np.zeros_like(right)
    for text in texts:
        place = row[text.id], STRATEGIES.index(text.strategy)
        right[place] += is_correct(text.strategy, text.text, questions[place[0]].answer)
        total[place] += 1
    return right / total


def words_of(question):
    """Its words and pairs of neighbours, each once. Numbers are all one word."""
    words = re.findall(r"[^\W\d_]+|0", re.sub(r"[0-9.,]*[0-9]", "0", question.text.lower()))
    return {*words, *zip(words, words[1:])}


def word_features(questions):
    """Which words stand in a question, (Q, words), less the mean of each column; and scaled, so
    that the mean length of a row is 1."""
    bags = [words_of(question) for question in questions]
    counts = Counter(word for bag in bags for word in bag)
    vocabulary = [word for word in counts if LEAST <= counts[word] < len(questions)]
    if not vocabulary:
        raise ValueError(f"{len(questions)} questions: no word stands in {LEAST} of them, not in all")
    features = np.array([[float(word in bag) for word in vocabulary] for bag in bags])
    features -= features.mean(axis=0)
    return features / np.sqrt((features ** 2).sum(axis=1).mean())


def gain_of_choice(features, rates, penalty, seed=0):
    """How much more the chosen strategies are right than the best single one, as a share."""
    n = len(features)
    similarity = features @ features.T                                              # (Q, Q)
    order = np.random.default_rng(seed).permutation(n)
    predicted = np.zeros_like(rates)                                                # (Q, 3)
    for fold in range(FOLDS):
        asked = order[fold::FOLDS]
        known = np.setdiff1d(order, asked)
        mean = rates[known].mean(axis=0)
        matrix = similarity[np.ix_(known, known)] + penalty * np.eye(len(known))
        weights = np.linalg.solve(matrix, rates[known] - mean)
        predicted[asked] = mean + similarity[np.ix_(asked, known)] @ weights
    chosen = rates[np.arange(n), predicted.argmax(axis=1)]
    return chosen.mean() - rates.mean(axis=0).max()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a round, with self-*.jsonl")
    parser.add_argument("--data", type=Path, default=HERE / "toy",
                        help="with train.jsonl [the toy]")
    args = parser.parse_args()
    questions = read_questions(args.data / "train.jsonl")
    texts = []
    for path in args.folder.glob("self-*.jsonl"):
        texts += read_rationales(path, questions)
    if not texts:
        raise ValueError(f"{args.folder}: there is no self-*.jsonl, the own texts of a round")
    ids = {text.id for text in texts}
    questions = [question for question in questions if question.id in ids]  # not the held-out ones
    rates = success_rates(questions, texts)
    shares = ", ".join(f"{s} {100 * rate:.1f}" for s, rate in zip(STRATEGIES, rates.mean(axis=0)))
    print(f"{len(questions)} questions, {len(texts)} own texts; right, in %: {shares}")
    features = word_features(questions)
    for penalty in PENALTIES:
        gains = [100 * gain_of_choice(features, rates, penalty, seed) for seed in range(5)]
        print(f"penalty {penalty:2}: {np.mean(gains):+.1f} points over the best single strategy "
              f"({min(gains):+.1f} to {max(gains):+.1f} over 5 divisions)")


if __name__ == "__main__":
    run_command(main)
