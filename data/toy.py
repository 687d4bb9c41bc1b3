"""The embedded word problems and their stand-in teacher: everything in data/toy/ comes from this file.

    python data/toy.py                  # rewrites data/toy/*.jsonl, the same bytes for the same --seed

Three kinds of question, each hard in its own way for a small student (data/README.md says why):

    shop       "A box holds 34 cards. Ben buys 27 boxes. ..."                    34 * 27: too big to do in the head
    tally      "Ben has 14 cards. Ben finds 5 more, then doubles the pile. ..."  many small steps, told in order
    relations  "Ann was invited by Leo. Leo was invited by Eve. ..."             how many steps from Ann to the known number?

A question is a chain: a start value and steps that change it. The teacher renders the chain in three strategies. It is
a rule, not a language model: it varies wording, order and length, and now and then misreads a fact.
"""
import argparse
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

STRATEGIES = ("cot", "l2m", "pot")  # that this teacher can write; those of the method are in answers.py
KINDS = ("shop", "tally", "relations")
NAMES = "Ann Ben Cora Dan Eve Finn Gail Hugo Iris Jack Kate Leo Mia Nick Olga Pete Rosa Sam Tess Vera".split()
ITEMS = "cards coins stamps beads shells pins".split()

# Wordings: the first list is used in train and test, the second only out of distribution (and in pretraining).
EVENTS = {
    "+": (["finds {n} more", "buys {n}", "wins {n}", "gets {n}", "earns {n}"], ["is given {n}", "picks up {n}"]),
    "-": (["loses {n}", "gives away {n}", "sells {n}", "drops {n}", "uses up {n}"], ["breaks {n}", "hands over {n}"]),
    "*": (["doubles the pile", "makes it twice as many"], ["ends up with twice as many"]),
    "/": (["gives away half", "loses half", "sells half"], ["hands over half"]),
}
RELATIONS = (["{a} was invited by {b}."], ["{a} is a guest of {b}."])
SHOPS = (
    [("One of the {item} costs {a} cents. {name} buys {b} of them.", "for one", "for {b}"),
     ("A box holds {a} {item}. {name} buys {b} boxes.", "in one box", "in {b} boxes"),
     ("There are {a} {item} on a page. {name} fills {b} pages.", "on one page", "on {b} pages")],
    [("Each row has {a} {item}. {name} counts {b} rows.", "in one row", "in {b} rows")],
)
EXTRAS = {
    "+": (["{name} adds {n}.", "{name} gets {n} more.", "{n} more are found."], ["Then {n} are put on top."]),
    "-": (["{name} takes off {n}.", "{name} gives back {n}.", "{n} are lost."], ["Then {n} are taken away."]),
}


@dataclass(frozen=True)
class Step:
    op: str             # one of + - * /
    n: int
    label: str          # what is known after the step: "Leo", "after Ben finds 5 more", "in 27 boxes"
    place: str = ""     # the same by its place in the story, where it has no name of its own: "step 3"


@dataclass(frozen=True)
class Story:
    """One question as a chain. `branches` are the steps of the paths that lead elsewhere (relations only)."""
    kind: str
    text: str
    start: int
    start_label: str
    steps: tuple[Step, ...]
    branches: tuple[tuple[Step, ...], ...] = ()

    def values(self) -> list[int]:
        """The value at the start and after each step."""
        values = [self.start]
        for step in self.steps:
            values.append(apply(values[-1], step.op, step.n))
        return values


def apply(value: int, op: str, n: int) -> int:
    return {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[op]


# ---------------------------------------------------------------------------------------------------------------------
# questions


def tell_shop(rng: random.Random, unseen: bool, longer: bool) -> Story:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    a, b = rng.randint(12, 99), rng.randint(12, 99)
    text, start_label, label = (part.format(a=a, b=b, name=name, item=item) for part in rng.choice(SHOPS[unseen]))
    value, steps = a * b, [Step("*", b, label)]
    for _ in range(rng.randint(3, 4) if longer else rng.randint(0, 2)):
        op, n = rng.choice("+-"), rng.randint(12, 45)
        op = op if value >= n else "+"  # nobody has fewer than none
        value = apply(value, op, n)
        told = rng.choice(EXTRAS[op][unseen]).format(name=name, n=n)
        text += " " + told
        steps.append(Step(op, n, f"after {n} {'more' if op == '+' else 'less'}"))
    unit = "cents" if "cents" in text else item
    return Story("shop", f"{text} How many {unit} is that in all?", a, start_label, tuple(steps))


def tell_tally(rng: random.Random, unseen: bool, longer: bool) -> Story:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    start = value = rng.randint(10, 60)
    text, steps = f"{name} has {start} {item}.", []
    length = rng.randint(9, 10) if longer else rng.randint(4, 8)
    while len(steps) < length:
        op = rng.choice("+-*/")
        n = 2 if op in "*/" else rng.randint(2, 20)
        if op == "/" and value % 2 or not 1 <= apply(value, op, n) <= 99 or steps and steps[-1].op in "*/" and op in "*/":
            continue
        value = apply(value, op, n)
        told = rng.choice(EVENTS[op][unseen]).format(n=n)
        joined = steps and len(steps) % 2 and rng.random() < 0.7
        text = text[:-1] + f", then {told}." if joined else text + f" {name} {told}."
        steps.append(Step(op, n, f"after {name} {told}", f"step {len(steps) + 1}"))
    return Story("tally", f"{text} How many {item} does {name} have now?", start, "at the start", tuple(steps))


def tell_relations(rng: random.Random, unseen: bool, longer: bool) -> Story:
    """A star: of one person the number is known, three branches of guests lead away from it, one ends at the goal. The
    branches differ in length, so whoever does not follow the right one takes the wrong number of steps."""
    item, start, n = rng.choice(ITEMS), rng.randint(10, 60), rng.randint(2, 9)
    lengths = rng.sample([2, 3, 4], 3)
    if longer:
        lengths[0] = rng.randint(5, 6)
    root, *people = rng.sample(NAMES, 1 + sum(lengths))
    told, branches = [], []
    for length in lengths:
        branch, people = people[:length], people[length:]
        told += [rng.choice(RELATIONS[unseen]).format(a=a, b=b) for a, b in zip(branch, [root, *branch])]
        branches.append(tuple(Step("+", n, person) for person in branch))
    rng.shuffle(told)
    steps, *others = branches
    text = (f"Every guest brings {n} more {item} than who invited them. {root} brings {start}. {' '.join(told)} "
            f"How many {item} does {steps[-1].label} bring?")
    return Story("relations", text, start, root, steps, tuple(others))


def tell(kind: str, rng: random.Random, unseen: bool = False, longer: bool = False) -> Story:
    """A new question; `unseen` takes the second list of wordings, `longer` takes longer chains."""
    return {"shop": tell_shop, "tally": tell_tally, "relations": tell_relations}[kind](rng, unseen, longer)


# ---------------------------------------------------------------------------------------------------------------------
# the stand-in teacher


def write_cot(story: Story, rng: random.Random) -> str:
    """Steps in the order of the chain: plain equations, equations that say what they are, or two steps at once."""
    style = rng.choices(["plain", "label", "two at once"], [4, 4, 1])[0]
    values, lines = story.values(), [f"{story.start_label}: {story.start}."]
    i = 0
    while i < len(story.steps):
        step, value = story.steps[i], values[i]
        equation = f"{value} {step.op} {step.n}"
        following = story.steps[i + 1:i + 2]
        if style == "two at once" and step.op in "+-" and following and following[0].op in "+-":
            i += 1
            equation += f" {following[0].op} {following[0].n}"
        i += 1
        prefix = f"{story.steps[i - 1].label}: " if style == "label" else ""
        lines.append(f"{prefix}{equation} = {values[i]}.")
    return " ".join([*lines, f"Final answer: {values[-1]}"])


def write_l2m(story: Story, rng: random.Random) -> str:
    """Sub-questions from the goal back to what is known, each with what it comes from, then their answers forward."""
    values, labels = story.values(), [story.start_label, *(step.place or step.label for step in story.steps)]
    asked, named = rng.choice(["{}: {} {} {}?", "{} needs {} {} {}."]), rng.random() < 0.5
    lines = []
    for before, step, label in reversed(list(zip(labels, story.steps, labels[1:]))):
        lines.append(asked.format(label, before, step.op, step.n))
    lines.append(f"{labels[0]}: {story.start}.")
    for value, step, result, label in zip(values, story.steps, values[1:], labels[1:]):
        lines.append((f"{label}: " if named else "") + f"{value} {step.op} {step.n} = {result}.")
    return " ".join([*lines, f"Final answer: {values[-1]}"])


def write_pot(story: Story, rng: random.Random) -> str:
    """A program of one expression, with the brackets that Python needs or one pair a step, or with named values."""
    style = rng.choice(["needed", "every step", "named"])
    lines, expression, additive = [], str(story.start), False
    if style == "named":
        expression = story.start_label if story.kind == "relations" else "start"
        lines.append(f"{expression} = {story.start}")
    for step in story.steps:
        if style == "every step" and additive or additive and step.op in "*/":
            expression = f"({expression})"
        expression, additive = f"{expression} {step.op} {step.n}", step.op in "+-" or style == "every step"
        if style == "named" and story.kind == "relations":
            lines.append(f"{step.label} = {expression}")
            expression, additive = step.label, False
    return "\n".join([*lines, f"answer = {expression}"])


def misread(story: Story, rng: random.Random) -> Story:
    """The same story with one fact taken wrongly: another branch, a step left out, or a wrong number."""
    if story.branches and rng.random() < 0.5:
        return replace(story, steps=rng.choice(story.branches))
    i = rng.randrange(len(story.steps))
    before, step, after = story.steps[:i], story.steps[i], story.steps[i + 1:]
    if len(story.steps) > 1 and rng.random() < 0.5:
        return replace(story, steps=before + after)
    return replace(story, steps=(*before, replace(step, n=step.n + rng.choice([-1, 1, 10])), *after))


def teach(story: Story, strategy: str, rng: random.Random) -> str:
    """One rationale of the stand-in teacher; about a fifth are wrong or unfinished."""
    luck = rng.random()
    if luck < 0.15:
        story = misread(story, rng)
    text = {"cot": write_cot, "l2m": write_l2m, "pot": write_pot}[strategy](story, rng)
    return text[:len(text) * 2 // 3] if luck > 0.95 else text


# ---------------------------------------------------------------------------------------------------------------------
# files


def write_lines(path: Path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    print(f"{path}: {len(records)} lines")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "toy", help="folder (data/toy)")
    parser.add_argument("--train", type=int, default=1200, help="training questions (1200)")
    parser.add_argument("--test", type=int, default=300, help="test questions (300), half as many in each out-of-distribution set")
    parser.add_argument("--rationales", type=int, default=3, help="teacher texts per question and strategy (3)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sets = {"train": (args.train, {}), "test": (args.test, {}), "ood_wording": (args.test // 2, {"unseen": True}),
            "ood_longer": (args.test // 2, {"longer": True})}
    for name, (count, how) in sets.items():
        rng = random.Random(f"{args.seed} {name}")
        stories = {f"{name}-{i:04d}": tell(KINDS[i % len(KINDS)], rng, **how) for i in range(count)}
        write_lines(args.out / f"{name}.jsonl", [
            {"id": id, "kind": story.kind, "question": story.text, "answer": str(story.values()[-1])}
            for id, story in stories.items()])
        if name == "train":
            write_lines(args.out / "teacher.jsonl", [
                {"id": id, "strategy": strategy, "text": teach(story, strategy, rng)} for id, story in stories.items()
                for strategy in STRATEGIES for _ in range(args.rationales)])


if __name__ == "__main__":
    main()
