"""What a run tells: the lines of a round, metrics.jsonl, report.md, and report.png with matplotlib.

    python data/report.py out          # makes report.md and report.png of the run folder again

It reads args.json, metrics.jsonl and, of each model, self-*.jsonl (what the student wrote),
mix.jsonl (what it was trained on) and answers-*.json (its answers). No model computes here.
"""
import json
import statistics
import sys
from collections import Counter
from decimal import Decimal
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.answers import STRATEGIES, is_correct, numeric_answer  # noqa: E402
from data.files import read_lines, read_questions, read_rationales  # noqa: E402
from data.files import write_lines, write_text, write_whole  # noqa: E402
from data.program import evaluate_program  # noqa: E402

N_QUESTIONS = 5  # shown with all the student's texts
RESAMPLES = 2000  # of the bootstrap

LEGEND = """
- model: its --mix and round; "combined" is round 0 of all mixes. With --compare: "teacher" and the
  single strategies are controls on the teacher's texts alone, with as many steps as the run of --mix
- loss: mean of -log p over a step's trained tokens: strategy tag, rationale, end token
- programs: how they ended. ok: with a number, right or wrong; no answer: without one; error: Python
  fails, too; refused: unknown to the evaluator, or too long; budget: too many steps or too much
  memory; bug: a fault of the evaluator, please report it
- generated: the student's texts for the training questions, in a strategy that the tag forces
- cut off: of the generated, those that met the limit of tokens; they are never trained on
- correct: of the generated, those that give the gold answer
- kept: of the correct, the finished and distinct ones, at most `keep` per question and strategy
- from teacher: the teacher's rationales in the mix
- share of mix: the strategy's share of the mix, teacher's and own texts together
- share, share of answers: of the test questions, those that the student answers in the strategy,
  left free to choose; an answer without a known tag is in none, and wrong
- accuracy of these, right: of those answers, the share that is right
- accuracy if forced: on all test questions, with the strategy's tag given
- relations 99.0, forced cot 33.0: accuracy on a kind of question, free and forced
- held-out, test and other sets: accuracy of the free answers. held-out: training questions that are
  never trained on, to choose settings on. Sets other than these two are out of distribution
- any: the share of test questions that some forced strategy gets right; no choice can bring more
- alpha: the teacher's share of the mix; it falls as the student solves more
- KL: KL(mix || own kept texts), in nats: how far the mix's shares of the strategies are from those
  of the kept texts (Figure 2 of the paper). Half a text is added to every count
- KL free: KL(mix || free choice on the held-out questions), after training on the mix
- room: at least so much more a choice per training question would get right than the best strategy
  for all, for the student before this round: one half of a question's own texts chooses, the other
  half counts. A choice that knows more may bring more. A dash: fewer than four texts (K < 4)
- steps: of the optimizer, all rounds together
- seconds: of this round alone; of a round that was stopped, since it went on
"""


def format_table(rows: list[dict]) -> str:
    """A Markdown table with aligned columns: floats as per cent, None as a dash."""
    lines = [list(rows[0])]
    for row in rows:
        lines.append([format_cell(value) for value in row.values()])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    shown = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths)]
        shown.append(f"| {' | '.join(cells)} |")
    return "\n".join(shown)


def format_cell(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{100 * value:.1f}"
    return str(value)


def format_mean(values: list, form: str) -> str:
    """Mean ± standard deviation over the seeds."""
    if None in values:
        return "-"
    mean = format(statistics.mean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):{form}}"


# --------------------------------------------------------------------------------------------------
# what is printed during a run


def count_programs(rationales) -> str:
    """How the programs among these ended: "programs: ok 704, error 376"."""
    reasons = Counter()
    for rationale in rationales:
        if rationale.strategy == "pot":
            reason = evaluate_program(rationale.text)[1]
            reasons[reason] += 1
    counts = [f"{reason} {count:,}" for reason, count in reasons.most_common()]
    return f"programs: {', '.join(counts) or 'none'}"


def print_round(lines: list[dict], result, questions) -> None:
    """What a round did. lines: its lines of metrics.jsonl. result: a siked.Round."""
    [test] = find(lines, set="test")
    print(f"\n{test['run']}, round {result.number}: the mix, and the student on the test set (%)")
    print(table_of_strategies(test, result, questions))
    if result.generated:
        print(f"generated {count_programs(result.generated)}")
    for kind, summary in test["kinds"].items():
        forced = [f"{s} {100 * accuracy:.1f}" for s, accuracy in summary["forced"].items()]
        print(f"{kind}: {100 * summary['accuracy']:.1f}, forced {', '.join(forced)}")
    accuracies = [f"{line['set']} {100 * line['accuracy']:.1f}" for line in lines]
    print(f"accuracy: {', '.join(accuracies)}; any test {100 * test['any']:.1f}")
    kl_own = format_mean([test["KL"]], ".2g")
    kl_free = format_mean([test["KL_free"]], ".2g")
    print(f"alpha {test['alpha']:.3f}, KL(mix || own kept texts) {kl_own}, "
          f"KL(mix || free choice on the held-out questions) {kl_free}")
    if test["room"] is not None:
        print(f"room to choose, before this round: at least {100 * test['room']:.1f} points")
    if result.generated:
        print(find_example(result, questions))
    print(flush=True)


def table_of_strategies(test: dict, result, questions) -> str:
    gold = {question.id: question.answer for question in questions}
    rows = []
    for strategy in STRATEGIES:
        generated = [text for text in result.generated if text.strategy == strategy]
        mixed = [text for text in result.training_mix if text.strategy == strategy]
        rows.append({
            "strategy": strategy,
            "generated": len(generated),
            "cut off": sum(not text.finished for text in generated),
            "correct": sum(is_correct(strategy, text.text, gold[text.id]) for text in generated),
            "kept": sum(text.strategy == strategy for text in result.own),
            "from teacher": sum(text.source == "teacher" for text in mixed),
            "share of mix": len(mixed) / max(1, len(result.training_mix)),
            "share of answers": test["share"][strategy],
            "accuracy of these": test["accuracy_within"][strategy],
            "accuracy if forced": test["forced"][strategy],
        })
    return format_table(rows)


def find_example(result, questions) -> str:
    """A question that the student solved in one strategy and not in another, with its texts."""
    first = {}  # (id, strategy) -> the first text
    for text in result.generated:
        first.setdefault((text.id, text.strategy), text.text)
    for question in questions:
        lines = [f"{question.text} ({question.answer})"]
        verdicts = set()
        for strategy in STRATEGIES:
            text = first[question.id, strategy]
            verdict = "right" if is_correct(strategy, text, question.answer) else "wrong"
            verdicts.add(verdict)
            indented = text.replace("\n", "\n" + " " * 15)
            lines.append(f"  {verdict} [{strategy}]: {indented}")
        if len(verdicts) == 2:
            return "\n".join(lines)
    return "no question is solved in one strategy and not in another"


# --------------------------------------------------------------------------------------------------
# metrics.jsonl: one line for each model and evaluation set


def update_metrics(path: Path, lines: list[dict]) -> None:
    """Puts the lines of one model where its old ones are, or at the end."""
    metrics = []
    if path.exists():
        metrics = [line for _, line in read_lines(path)]
    model = {name: lines[0][name] for name in ("seed", "run", "iteration")}
    old = find(metrics, **model)
    place = metrics.index(old[0]) if old else len(metrics)
    others = [line for line in metrics if line not in old]
    write_lines(path, others[:place] + lines + others[place:])


def find(lines: list[dict], **wanted) -> list[dict]:
    """The lines with these values: find(lines, set="test", seed=0)."""
    return [line for line in lines if line | wanted == line]


def find_rounds(metrics: list[dict], run: str) -> list[list[dict]]:
    """For each round of a run its lines on the test set, one a seed.

    Round 0 is "combined" for all runs that begin with all of the teacher's rationales.
    """
    test = find(metrics, set="test")
    lines = find(test, run=run)
    if lines and not find(lines, iteration=0):
        lines += find(test, run="combined")
    numbers = sorted({line["iteration"] for line in lines})
    return [find(lines, iteration=number) for number in numbers]


def name_of(line: dict) -> str:
    """A model in words: "combined", "adaptive 2"."""
    if line["iteration"] == 0:
        return line["run"]
    return f"{line['run']} {line['iteration']}"


def folder_of(folder: Path, line: dict) -> Path:
    """Where train.py keeps this model."""
    return folder / f"seed-{line['seed']}" / name_of(line).replace(" ", "-")


# --------------------------------------------------------------------------------------------------
# report.md


def write_report(folder: Path) -> str:
    """Writes report.md and report.png; returns the table of all models."""
    settings = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    command = settings.pop("command")
    metrics = [line for _, line in read_lines(folder / "metrics.jsonl")]
    run = settings["mix"]
    if not find(metrics, run=run):
        run = "combined"
    seed = metrics[0]["seed"]
    models = [line for [line] in find_rounds(find(metrics, seed=seed), run)]
    table = table_of_models(metrics)
    sections = [
        "# SIKeD run",
        f"`{command}`",
        draw(folder, metrics, run),
        "Mean ± standard deviation over the seeds; accuracies and shares in %.",
        table,
        "## What each number means",
        LEGEND.strip(),
        "## What the student chose",
        f"On the test set, seed {seed}, in %.",
        describe_choices(folder, models),
    ]
    if len(models) > 1:
        sections += [
            f"## {name_of(models[-1])} beside the others",
            "Points of accuracy that it is ahead, on the same questions of all seeds. In brackets: "
            "95 % of a bootstrap over the questions. It says how sure the difference is for these "
            "students; other seeds may give others.",
            table_of_differences(folder, metrics, models[-1]),
        ]
    last = folder_of(folder, models[-1])
    if any(last.glob("self-*.jsonl")):
        path = Path(settings["data"]) / "train.jsonl"
        sections += [
            f"## {N_QUESTIONS} training questions",
            f"What the student wrote for the mix of {name_of(models[-1])} (seed {seed}), and what "
            "became of it:",
            show_questions(last, path),
        ]
    lines = [f"- {name}: {value}" for name, value in settings.items()]
    sections += ["## Settings", "\n".join(lines)]
    write_text(folder / "report.md", "\n\n".join(sections) + "\n")
    return table


def table_of_models(metrics: list[dict]) -> str:
    rows = []
    measures_room = any(line.get("room") is not None for line in metrics)  # with K of 4 or more
    for name in dict.fromkeys(map(name_of, metrics)):
        lines = [line for line in metrics if name_of(line) == name]
        test = find(lines, set="test")
        row = {"model": name}
        for set_name in dict.fromkeys(line["set"] for line in lines):
            accuracies = [100 * line["accuracy"] for line in find(lines, set=set_name)]
            row[set_name] = format_mean(accuracies, ".1f")
        row["any"] = format_mean([100 * line["any"] for line in test], ".1f")
        for strategy in STRATEGIES:
            shares = [100 * line["share"][strategy] for line in test]
            row[f"{strategy} share"] = format_mean(shares, ".0f")
        row["alpha"] = format_mean([line["alpha"] for line in test], ".2f")
        row["KL"] = format_mean([line["KL"] for line in test], ".2g")
        row["KL free"] = format_mean([line["KL_free"] for line in test], ".2g")
        if measures_room:
            rooms = [line["room"] and 100 * line["room"] for line in test]  # None: round 0
            row["room"] = format_mean(rooms, ".1f")
        row["steps"] = format_mean([line["steps"] for line in test], ".0f")
        row["seconds"] = format_mean([line["seconds"] for line in test], ".0f")
        rows.append(row)
    return format_table(rows)


def describe_choices(folder: Path, models: list[dict]) -> str:
    """What the student chose after each round, and where it changed its mind in between."""
    rows = []
    for line in models:
        row = {"model": name_of(line)}
        for strategy in STRATEGIES:
            row[f"{strategy}: share"] = line["share"][strategy]
        for strategy in STRATEGIES:
            row[f"{strategy}: right"] = line["accuracy_within"][strategy]
        rows.append(row)
    parts = [format_table(rows)]
    for before, after in zip(models, models[1:]):
        earlier = read_answers(folder, before)
        later = read_answers(folder, after)
        parts.append(f"From {name_of(before)} to {name_of(after)}, "
                     f"{describe_changes(earlier, later)}")
    return "\n\n".join(parts)


def table_of_differences(folder: Path, metrics: list[dict], ours: dict) -> str:
    """How far a model is ahead of round 0, and of the last round of each other run, on the seeds
    that both have."""
    runs = dict.fromkeys(line["run"] for line in metrics if line["run"] != ours["run"])
    # Held-out questions are others for each seed.
    sets = dict.fromkeys(line["set"] for line in metrics if line["set"] != "held-out")
    rows = []
    for run in runs:
        theirs = max(find(metrics, run=run), key=lambda line: line["iteration"])
        seeds = sorted(seeds_of(metrics, ours) & seeds_of(metrics, theirs))
        if not seeds:
            continue
        row = {"ahead of": name_of(theirs)}
        rng = np.random.default_rng(0)
        means = []  # for each set: the mean, then those of the bootstrap
        for name in sets:
            ahead = right_of(folder, ours, seeds, name) - right_of(folder, theirs, seeds, name)
            means.append([ahead.mean(), *bootstrap(ahead, rng)])
            row[name] = format_interval(means[-1])
        row["mean of the sets"] = format_interval(np.mean(means, axis=0))
        rows.append(row)
    if not rows:
        return "No other run has these seeds."
    return format_table(rows)


def right_of(folder: Path, model: dict, seeds, set_name: str) -> np.ndarray:
    """For each question, on how many of the seeds the model is right, in %."""
    right = []  # a list for each seed
    for seed in seeds:
        records = read_answers(folder, model | {"seed": seed}, set_name)
        right.append([record["correct"] for record in records])
    return 100 * np.mean(right, axis=0)


def seeds_of(metrics: list[dict], model: dict) -> set[int]:
    lines = find(metrics, run=model["run"], iteration=model["iteration"])
    return {line["seed"] for line in lines}


def bootstrap(values, rng) -> np.ndarray:
    """Means of as many values, drawn with replacement (Efron 1979), RESAMPLES times."""
    means = [rng.choice(values, len(values)).mean() for _ in range(RESAMPLES)]
    return np.array(means)


def format_interval(means) -> str:
    """The mean, and 95 % of those of the bootstrap, which stand behind it."""
    low, high = np.percentile(means[1:], [2.5, 97.5])
    return f"{means[0]:+.1f} ({low:+.1f} to {high:+.1f})"


def read_answers(folder: Path, line: dict, set_name="test") -> list[dict]:
    path = folder_of(folder, line) / f"answers-{set_name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def describe_changes(earlier: list[dict], later: list[dict]) -> str:
    """Which questions got another strategy between two models, and what came of it."""
    changes = Counter()
    gained = Counter()
    lost = Counter()
    for old, new in zip(earlier, later):
        change = f"{old['strategy'] or 'none'} -> {new['strategy'] or 'none'}"
        if old["strategy"] != new["strategy"]:
            changes[change] += 1
            gained[change] += new["correct"] and not old["correct"]
            lost[change] += old["correct"] and not new["correct"]
    lines = [f"{changes.total()} of {len(later)} questions got another strategy."]
    for change, count in changes.most_common():
        lines.append(f"- {change}: {count}, of which {gained[change]} became right "
                     f"and {lost[change]} wrong")
    return "\n".join(lines)


def show_questions(model: Path, path: Path) -> str:
    """Some training questions, with the texts that the student wrote for the mix of a model."""
    if not path.is_file():
        return f"{path} is not there any more."
    starts = [int(part.stem.removeprefix("self-")) for part in model.glob("self-*.jsonl")]
    texts = []
    try:
        questions = read_questions(path)
        mixed = read_rationales(model / "mix.jsonl", questions)
        for start in sorted(starts):
            texts += read_rationales(model / f"self-{start}.jsonl", questions)
    except ValueError as error:
        return f"{path} has changed since: {error}"
    by_id = {question.id: question for question in questions}
    ids = list(dict.fromkeys(text.id for text in texts))
    step = max(1, len(ids) // N_QUESTIONS)
    parts = []
    for id in ids[::step][:N_QUESTIONS]:
        n_teacher = sum(text.id == id and text.source == "teacher" for text in mixed)
        parts.append(f"**{by_id[id].text}** (gold answer {by_id[id].answer}; "
                     f"teacher's texts in the mix: {n_teacher})")
        for text in texts:
            if text.id == id:
                reason = explain(text, by_id[id].answer, mixed)
                shown = text.text.replace("```", "` ` `")
                parts.append(f"{text.strategy}, {reason}\n```\n{shown}\n```")
                if text in mixed:
                    mixed.remove(text)  # the same text once more was not kept
    return "\n\n".join(parts)


def explain(text, gold, mixed) -> str:
    """Why one of the student's texts was kept or not."""
    if text in mixed:
        return "kept"
    if not text.finished:
        return "rejected: cut off by the token limit"
    if is_correct(text.strategy, text.text, gold):
        return "left out: right, but the mix has enough of this strategy"
    value = numeric_answer(text.strategy, text.text)
    if value is not None:
        decimal = Decimal(value.numerator) / value.denominator  # too large for a float, perhaps
        return f"rejected: gives {decimal:.6g}"
    if text.strategy == "pot":
        return f"rejected: gives no number, program: {evaluate_program(text.text)[1]}"
    return "rejected: gives no number"


# --------------------------------------------------------------------------------------------------
# report.png


def draw(folder: Path, metrics: list[dict], run: str) -> str:
    """Accuracy by round, and the shares of the strategies. Returns the line for report.md."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return ("For the picture report.png: `pip install matplotlib`, then "
                f"`python data/report.py {folder}`.")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.8), width_ratios=(2, 3), dpi=110,
                                            layout="constrained")
    rounds = find_rounds(metrics, run)
    draw_accuracy(left, rounds, label=run)
    control = find_rounds(metrics, "teacher")
    if control and run != "teacher":
        draw_accuracy(left, control, label="teacher's texts alone, as many steps",
                      color="tab:gray", linestyle="--")
    left.set(xlabel="round (0: distilled from the teacher)", ylabel="accuracy on the test set, %",
             xticks=range(len(rounds)), ylim=(0, 100))
    left.legend(fontsize=8)
    draw_shares(right, rounds)
    write_whole(folder / "report.png", partial(figure.savefig, format="png"))
    pyplot.close(figure)
    return "![accuracy and shares of strategies by round](report.png)"


def draw_accuracy(axes, rounds, **style) -> None:
    """Mean and standard deviation over the seeds."""
    means = []
    deviations = []
    for lines in rounds:
        values = [100 * line["accuracy"] for line in lines]
        means.append(statistics.mean(values))
        deviations.append(statistics.stdev(values) if len(values) > 1 else 0)
    axes.errorbar(range(len(rounds)), means, deviations, capsize=3, marker="o", **style)


def draw_shares(axes, rounds) -> None:
    """Figure 2 of the paper, mix and student; and what the student then answers with."""
    places = []
    labels = []
    bars = []  # the lines that a bar is the mean of, and their field
    for number, lines in enumerate(rounds):
        mix_label = "M" if number > 0 else "T"
        for label, field in ((mix_label, "P_mix"), ("S", "P_student"), ("A", "share")):
            if all(line[field] for line in lines):
                places.append(len(places) + 0.8 * number)
                labels.append(f"{label}\n{number}")
                bars.append((lines, field))
    bottom = [0.0] * len(bars)
    for strategy in STRATEGIES:
        heights = []
        for lines, field in bars:
            heights.append(statistics.mean(100 * line[field][strategy] for line in lines))
        axes.bar(places, heights, bottom=bottom, label=strategy)
        bottom = [a + b for a, b in zip(bottom, heights)]
    axes.set_xticks(places, labels)
    axes.set(xlabel="by round: Mix (T: of the Teacher), Student's own kept texts, free Answers",
             ylabel="share of strategies, %", ylim=(0, 100))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=len(STRATEGIES), fontsize=8)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "metrics.jsonl").is_file():
        sys.exit("usage: python data/report.py RUN_FOLDER: a folder that train.py made")
    try:
        print(write_report(Path(sys.argv[1])))
    except (ValueError, OSError) as error:
        sys.exit(f"report.py: {error}")
