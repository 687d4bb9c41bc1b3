"""The report of a run folder: report.md, and report.png if matplotlib is installed.

    python data/report.py out          # makes them again from the files that train.py left there

It reads args.json, metrics.jsonl and, of each model, self.jsonl (what the student wrote), mix.jsonl (what it was trained
on) and answers.jsonl (its free answers to the evaluation sets); nothing is computed by a model.
"""
import json
import statistics
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.answers import STRATEGIES, numeric_answer  # noqa: E402
from data.program import evaluate_program  # noqa: E402

N_QUESTIONS = 5  # that are shown with all their rationales


def format_table(rows: list[dict]) -> str:
    """A Markdown table with aligned columns: floats as per cent, None as a dash."""
    def cell(value):
        return "-" if value is None else f"{100 * value:.1f}" if isinstance(value, float) else str(value)

    columns = [[name, *(cell(row[name]) for row in rows)] for name in rows[0]]
    widths = [max(map(len, column)) for column in columns]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |" for line in zip(*columns)]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.is_file() else []


def find(metrics: list[dict], **wanted) -> list[dict]:
    return [line for line in metrics if all(line[name] == value for name, value in wanted.items())]


def name_of(line: dict) -> str:
    """A model in words: "combined", "siked-adaptive 2"."""
    return f"{line['run']} {line['iteration']}" if line["iteration"] else line["run"]


def folder_of(folder: Path, line: dict) -> Path:
    """Where train.py keeps this model."""
    return folder / f"seed-{line['seed']}" / name_of(line).replace(" ", "-")


def models_of(metrics: list[dict], run: str, seed: int) -> list[dict]:
    """The test lines of a run's models in order, that of "combined" first, which the rounds of SIKeD go on from."""
    lines = find(metrics, seed=seed, run=run, set="test")
    return (find(metrics, seed=seed, run="combined", set="test") if lines and lines[0]["iteration"] else []) + lines


def main_run(metrics: list[dict], settings: dict) -> str:
    """The run of --mix, or "combined" if there were no iterations."""
    mix = settings["mix"]
    run = f"siked-{mix}" if mix in ("all", "adaptive") else f"{mix}-only"
    return run if find(metrics, run=run) else "combined"


# ---------------------------------------------------------------------------------------------------------------------
# the sections


def table_of_models(metrics: list[dict]) -> str:
    """All models, mean and standard deviation over the seeds; accuracy and share of answers in %."""
    def mean(values, scale=100, form=".1f"):
        if None in values:
            return "-"
        spread = f" ± {scale * statistics.stdev(values):{form}}" if len(values) > 1 else ""
        return f"{scale * statistics.mean(values):{form}}{spread}"

    rows = []
    for name in dict.fromkeys(map(name_of, metrics)):
        lines = [line for line in metrics if name_of(line) == name]
        test = find(lines, set="test")
        rows.append({
            "model": name, **{s: mean([line["accuracy"] for line in find(lines, set=s)]) for s in dict.fromkeys(
                line["set"] for line in lines)},
            **{f"{s} share": mean([line["share"][s] for line in test], form=".0f") for s in STRATEGIES},
            "alpha": mean([line["alpha"] for line in test], 1, ".2f"), "KL": mean([line["KL"] for line in test], 1, ".1e"),
            "steps": mean([line["steps"] for line in test], 1, ".0f"),
            "seconds": mean([line["seconds"] for line in test], 1, ".0f")})
    return format_table(rows)


def describe_choices(folder: Path, metrics: list[dict], run: str, seed: int) -> str:
    """What the student chose on the test set after each round, and where it changed its mind in between."""
    models = models_of(metrics, run, seed)
    parts = [format_table([{
        "model": name_of(line), **{f"{s}: share": line["share"][s] for s in STRATEGIES},
        **{f"{s}: right": line["accuracy_within"][s] for s in STRATEGIES}} for line in models])]
    answers = [{a["id"]: a for a in read(folder_of(folder, line) / "answers.jsonl") if a["set"] == "test"} for line in models]
    for before, after, earlier, later in zip(models, models[1:], answers, answers[1:]):
        changes, gained, lost = Counter(), Counter(), Counter()
        for id in earlier.keys() & later.keys():
            change = tuple(a[id]["strategy"] or "none" for a in (earlier, later))
            changes[change] += change[0] != change[1]
            gained[change] += later[id]["correct"] > earlier[id]["correct"]
            lost[change] += later[id]["correct"] < earlier[id]["correct"]
        total = sum(changes.values())
        parts.append(f"From {name_of(before)} to {name_of(after)}, {total} of {len(later)} questions got another strategy"
                     + (":" if total else "."))
        parts += ["\n".join(f"- {a} -> {b}: {count}, of which {gained[a, b]} became right and {lost[a, b]} wrong"
                            for (a, b), count in changes.most_common() if count)]
    return "\n\n".join(filter(None, parts))


def verdict(rationale: dict, mixed: bool) -> str:
    """Why one of the student's texts was kept or not."""
    if mixed:
        return "kept"
    if not rationale["finished"]:
        return "rejected: cut off by the token limit"
    if rationale["correct"]:
        return "left out: right, but another one of this strategy is kept"
    value = numeric_answer(rationale["strategy"], rationale["text"])
    if value is not None:
        return f"rejected: gives {float(value):g}"
    reason = f", program: {evaluate_program(rationale['text'])[1]}" if rationale["strategy"] == "pot" else ""
    return f"rejected: gives no number{reason}"


def show_questions(folder: Path, data: Path, line: dict) -> str:
    """Some training questions with the texts that the student wrote for the mix of this model."""
    texts, mixed = (read(folder_of(folder, line) / name) for name in ("self.jsonl", "mix.jsonl"))
    questions = {q["id"]: q for q in read(data / "train.jsonl")}
    ids = [id for id in dict.fromkeys(text["id"] for text in texts) if id in questions]
    parts = []
    for id in ids[::max(1, len(ids) // N_QUESTIONS)][:N_QUESTIONS]:
        n_teacher = sum(text["id"] == id and text["source"] == "teacher" for text in mixed)
        parts.append(f"**{questions[id]['question']}** (gold answer {questions[id]['answer']}; "
                     f"teacher's texts in the mix: {n_teacher})")
        parts += [f"{text['strategy']}, {verdict(text, text in mixed)}\n```\n{text['text'].replace('```', '` ` `')}\n```"
                  for text in texts if text["id"] == id]
    return "\n\n".join(parts)


def draw(folder: Path, metrics: list[dict], run: str) -> str:
    """report.png: accuracy by round beside the control, and the shares of the strategies. Returns its line in report.md."""
    try:
        import matplotlib
    except ImportError:
        return "For the picture report.png: `pip install matplotlib`, then `python data/report.py " + str(folder) + "`."
    matplotlib.use("Agg")
    from matplotlib import pyplot

    seeds = sorted({line["seed"] for line in metrics})
    by_seed = [models_of(metrics, run, seed) for seed in seeds]
    rounds = range(min(map(len, by_seed)))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.8), width_ratios=(2, 3), layout="constrained")

    values = [[100 * lines[i]["accuracy"] for lines in by_seed] for i in rounds]
    left.errorbar(rounds, [statistics.mean(v) for v in values], [statistics.stdev(v) if len(v) > 1 else 0 for v in values],
                  capsize=3, marker="o", label=run)
    if control := find(metrics, run="combined-same-steps", set="test"):
        values = [100 * line["accuracy"] for line in control]
        mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0
        left.axhline(mean, color="tab:gray", linestyle="--", label="teacher's texts alone, as many steps in all")
        left.axhspan(mean - spread, mean + spread, color="tab:gray", alpha=0.15, linewidth=0)
    left.set(xlabel="round (0: distilled from the teacher)", ylabel="accuracy on the test set, %", xticks=list(rounds),
             ylim=(0, 100))
    left.legend(loc="lower right", fontsize=8)

    # Figure 2 of the paper: teacher, mix and student; and what the student then answers with.
    bars = []
    for i in rounds:
        lines = [models[i] for models in by_seed]
        for name, field in (("T", "P_teacher"), ("M", "P_mix"), ("S", "P_student"), ("A", "share")):
            if all(line[field] for line in lines):
                bars.append((i, name, {s: statistics.mean(line[field][s] for line in lines) for s in STRATEGIES}))
    places = [place + 0.8 * i for place, (i, *_) in enumerate(bars)]
    bottom = [0.0] * len(bars)
    for strategy in STRATEGIES:
        heights = [100 * shares[strategy] for *_, shares in bars]
        right.bar(places, heights, bottom=bottom, label=strategy)
        bottom = [a + b for a, b in zip(bottom, heights)]
    right.set(xticks=places, xticklabels=[f"{name}\n{i}" for i, name, _ in bars], ylabel="share of strategies, %", ylim=(0, 100),
              xlabel="by round: Teacher, Mix, Student's kept texts, and its Answers to the test set")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=len(STRATEGIES), fontsize=8)
    figure.savefig(folder / "report.png.part", format="png", dpi=110)
    pyplot.close(figure)
    (folder / "report.png.part").replace(folder / "report.png")
    return "![accuracy and shares of strategies by round](report.png)"


def write_report(folder: Path) -> str:
    """Writes report.md and report.png; returns the table of all models."""
    metrics, settings = read(folder / "metrics.jsonl"), json.loads((folder / "args.json").read_text(encoding="utf-8"))
    run, seed = main_run(metrics, settings), metrics[0]["seed"]
    last, table = models_of(metrics, run, seed)[-1], table_of_models(metrics)
    sections = [
        "# SIKeD run", f"`{settings.get('command', 'train.py')}`", draw(folder, metrics, run),
        "Accuracy and share of answers in %, mean ± standard deviation over the seeds. alpha: share of the teacher in the mix. "
        "KL: how far the mix's distribution over strategies is from that of the student's own kept texts, in nats. "
        "steps: of the optimizer, all rounds together. seconds: of this round.", table,
        "## What the student chose", f"On the test set, seed {seed}, in %. \"right\": of its answers in this strategy.",
        describe_choices(folder, metrics, run, seed)]
    if last["iteration"]:
        sections += [f"## {N_QUESTIONS} training questions", f"What the student wrote for the mix of {name_of(last)} (seed "
                     f"{seed}), and what became of it:", show_questions(folder, Path(settings["data"]), last)]
    sections += ["## Settings", "\n".join(f"- {name}: {value}" for name, value in settings.items() if name != "command")]
    beside = folder / "report.md.part"
    beside.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    beside.replace(folder / "report.md")
    return table


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "metrics.jsonl").is_file():
        sys.exit("usage: python data/report.py RUN_FOLDER: a folder with metrics.jsonl, which train.py writes")
    print(write_report(Path(sys.argv[1])))
