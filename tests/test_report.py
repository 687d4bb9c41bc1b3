"""Tests of data/report.py:  python -m pytest tests/test_report.py

They take seconds: the run folder is written here. It has two rounds, and the lines of its models
are made as train.py makes them.
"""
import builtins
import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from data.files import Question, Rationale, write_lines, write_text
from data.report import (count_programs, draw_accuracy, draw_shares, find_rounds, format_table,
                         print_round, table_of_differences, update_metrics, write_report)
from siked import Round, measure

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = [Question(f"q{i}", f"What is {i} + 1?", Fraction(i + 1)) for i in range(6)]
TEACHER = [Rationale("q0", "cot", "taught. Final answer: 1")]
OWN = Rationale("q0", "cot", "Final answer: 1", "student")
SELF = [
    OWN,
    OWN,  # once more
    Rationale("q0", "l2m", "Final answer: 1", "student", finished=False),
    Rationale("q0", "l2m", f"Final answer: 1{'0' * 299}e99", "student"),
    Rationale("q0", "pot", "import os", "student"),
    Rationale("q0", "pot", "answer = 15 / 2", "student"),
]


def record(id, strategy, correct, forced, kind=""):
    """A record of siked.evaluate. forced: the strategies that are right when they are forced."""
    forced = {s: s in forced for s in ("cot", "l2m", "pot")}
    return {"id": id, "kind": kind, "strategy": strategy, "correct": correct, "text": "",
            "forced": forced}


# Of the four test questions two change from cot to pot, which makes one of them right, and one
# changes the other way, which makes it wrong.
BEFORE = [record("t0", "cot", False, ("pot",), "shop"), record("t1", "pot", True, (), "shop"),
          record("t2", None, False, ("l2m", "pot")), record("t3", "cot", True, ("cot",))]
AFTER = [record("t0", "pot", True, ("pot",), "shop"), record("t1", "cot", False, (), "shop"),
         record("t2", None, False, ("l2m", "pot")), record("t3", "pot", True, ("cot",))]
HELD_OUT = [record("h0", "pot", True, ("cot",))]
ROUND_0 = Round(0, [], [], TEACHER, {"held-out": HELD_OUT, "test": BEFORE})
ROUND_1 = Round(1, SELF, [OWN], [*TEACHER, OWN], {"held-out": HELD_OUT, "test": AFTER})


def model(run, result, seed=0, **changed):
    """The lines of metrics.jsonl of a model."""
    labels = {"seed": seed, "run": run, "iteration": result.number, "steps": 3, "seconds": 1.0}
    lines = measure(result, QUESTIONS, labels)
    return [line | changed for line in lines]


def write_answers(out, name, result):
    write_text(out / name / "answers-test.json", json.dumps(result.results["test"]))


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "out"
    lines = [{"id": q.id, "question": q.text, "answer": str(q.answer)} for q in QUESTIONS]
    write_lines(tmp_path / "data/train.jsonl", lines)
    write_lines(out / "metrics.jsonl", model("combined", ROUND_0) + model("all", ROUND_1))
    settings = {"mix": "all", "lr": 0.25, "data": str(tmp_path / "data"), "command": "train.py -x"}
    (out / "args.json").write_text(json.dumps(settings))
    for name, result in (("combined", ROUND_0), ("all-1", ROUND_1)):
        write_lines(out / "seed-0" / name / "mix.jsonl", result.training_mix)
        write_answers(out, f"seed-0/{name}", result)
    others = [Rationale(f"q{i}", "cot", "no idea", "student") for i in range(1, 6)]
    write_lines(out / "seed-0/all-1/self-0.jsonl", SELF)
    write_lines(out / "seed-0/all-1/self-2.jsonl", others[:3])
    write_lines(out / "seed-0/all-1/self-10.jsonl", others[3:])
    return out


def cells_of(table):
    """The rows of a table as dicts, column -> cell."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_report_reads_by_itself(folder):
    """The command, the settings, and where the student changed its mind."""
    write_report(folder)
    report = (folder / "report.md").read_text()
    assert "`train.py -x`" in report
    assert "- lr: 0.25" in report
    assert "From combined to all 1, 3 of 4 questions got another strategy" in report
    assert "- cot -> pot: 2, of which 1 became right and 0 wrong" in report
    assert "- pot -> cot: 1, of which 0 became right and 1 wrong" in report


def test_every_column_has_its_line_in_the_legend(folder):
    table = write_report(folder)
    legend = (folder / "report.md").read_text().partition("## What each number means")[2]
    legend = legend.partition("\n## ")[0]
    for column in cells_of(table)[0]:
        name = column.removeprefix("cot ").removeprefix("l2m ").removeprefix("pot ")
        assert re.search(rf"\n- ([^:]*, )?{name}(:|,| and)", legend), column


def test_why_each_text_was_kept_or_not(folder):
    """In the order of writing: self-10.jsonl comes after self-2.jsonl."""
    write_report(folder)
    report = (folder / "report.md").read_text()
    assert "**What is 0 + 1?** (gold answer 1; teacher's texts in the mix: 1)" in report
    tags = ("cot, ", "l2m, ", "pot, ")
    verdicts = [line for line in report.splitlines() if line.startswith(tags)]
    assert verdicts == [
        "cot, kept",
        "cot, left out: right, but the mix has enough of this strategy",
        "l2m, rejected: cut off by the token limit",
        "l2m, rejected: gives 1.00000e+398",
        "pot, rejected: gives no number, program: refused",
        "pot, rejected: gives 7.5",
        *["cot, rejected: gives no number"] * 4]
    shown = [line[2:11] for line in report.splitlines() if line.startswith("**What is")]
    assert shown == [f"What is {i}" for i in range(5)]


def test_questions_are_gone(folder):
    """The report can be made again when the data is somewhere else."""
    (folder.parent / "data/train.jsonl").unlink()
    write_report(folder)
    assert "train.jsonl is not there any more" in (folder / "report.md").read_text()


def test_questions_have_changed(folder):
    """Made anew with fewer questions, say: all but the examples is reported."""
    path = folder.parent / "data/train.jsonl"
    path.write_text(path.read_text().splitlines()[0])
    write_report(folder)
    assert "train.jsonl has changed since: " in (folder / "report.md").read_text()


def test_picture_where_matplotlib_is_and_one_line_where_not(folder, monkeypatch):
    host_import = builtins.__import__

    def without_matplotlib(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return host_import(name, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "__import__", without_matplotlib)
        write_report(folder)
    assert "pip install matplotlib" in (folder / "report.md").read_text()
    assert not (folder / "report.png").exists()
    pytest.importorskip("matplotlib")
    write_report(folder)
    assert (folder / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert "(report.png)" in (folder / "report.md").read_text()


def test_curves_and_bars_by_hand():
    """Two seeds: the curve is their mean with its spread, a control has round 0 of "combined", and
    the bars are Teacher and Answers in round 0, Mix, Student and Answers after it."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    metrics = model("combined", ROUND_0, accuracy=0.5) + model("all", ROUND_1, accuracy=0.5)
    metrics += model("combined", ROUND_0, seed=1, accuracy=0.7)
    metrics += model("all", ROUND_1, seed=1, accuracy=0.5)
    metrics += model("teacher", ROUND_1, accuracy=0.1)
    metrics += model("cot", ROUND_0, accuracy=0.2)
    figure, (left, right) = pyplot.subplots(1, 2)
    for run in ("all", "teacher", "cot"):
        draw_accuracy(left, find_rounds(metrics, run))
    draw_shares(right, find_rounds(metrics, "all"))
    curves = [container[0].get_ydata().tolist() for container in left.containers]
    assert curves == [pytest.approx([60, 50]), pytest.approx([60, 10]), pytest.approx([20])]
    error_bar = left.containers[0][2][0].get_segments()[0]
    assert error_bar[:, 1] == pytest.approx([60 - 14.142, 60 + 14.142], abs=0.01)
    labels = [label.get_text() for label in right.get_xticklabels()]
    assert labels == ["T\n0", "A\n0", "M\n1", "S\n1", "A\n1"]
    pot = right.containers[2]  # stacked on cot and l2m
    assert [bar.get_height() for bar in pot] == pytest.approx([20, 25, 100 / 7, 20, 50])
    assert [bar.get_y() for bar in pot] == pytest.approx([80, 50, 600 / 7, 80, 25])
    pyplot.close(figure)


def test_report_of_plain_distillation(folder):
    """--iters 0: one model, which has nothing to be compared with and wrote no texts."""
    write_lines(folder / "metrics.jsonl", model("combined", ROUND_0))
    [row] = cells_of(write_report(folder))
    assert row["model"] == "combined"
    assert "What the student wrote" not in (folder / "report.md").read_text()


def test_picture_has_the_control_unless_it_is_the_run_itself(folder, monkeypatch):
    """--mix teacher: its rounds are drawn once. With another --mix they are the control."""
    pytest.importorskip("matplotlib")
    labels = []

    def draw_label(axes, rounds, label, **style):
        axes.plot([0], label=label)
        labels.append(label)

    monkeypatch.setattr("data.report.draw_accuracy", draw_label)
    update_metrics(folder / "metrics.jsonl", model("teacher", ROUND_1))
    write_answers(folder, "seed-0/teacher-1", ROUND_1)
    write_report(folder)
    assert labels == ["all", "teacher's texts alone, as many steps"]
    settings = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(settings | {"mix": "teacher"}))
    write_lines(folder / "seed-0/teacher-1/mix.jsonl", ROUND_1.training_mix)
    write_report(folder)
    assert labels[2:] == ["teacher"]
    assert "From combined to teacher 1, 3 of 4" in (folder / "report.md").read_text()


def test_differences_by_hand(folder):
    """Over two seeds: "all 1" is ahead of "combined" on one question of both, and behind on one; of
    "teacher 1" it is ahead on the two questions that it gets right in the first seed only."""
    nothing = [record(f"t{i}", "cot", False, ()) for i in range(4)]
    failed = Round(1, SELF, [OWN], TEACHER, {"held-out": HELD_OUT, "test": nothing})
    for run, seed, result in (("combined", 1, ROUND_0), ("all", 1, ROUND_1),
                              ("teacher", 0, failed), ("teacher", 1, ROUND_1)):
        name = run if result is ROUND_0 else f"{run}-1"
        update_metrics(folder / "metrics.jsonl", model(run, result, seed))
        write_answers(folder, f"seed-{seed}/{name}", result)
    write_report(folder)
    section = (folder / "report.md").read_text().partition("## all 1 beside the others\n")[2]
    table = "\n".join(line for line in section.split("\n## ")[0].splitlines() if line[:1] == "|")
    first, second = cells_of(table)
    assert first["ahead of"] == "combined" and second["ahead of"] == "teacher 1"
    assert first["test"] == "+0.0 (-75.0 to +75.0)"
    assert second["test"] == "+25.0 (+0.0 to +50.0)"
    assert [row["mean of the sets"] for row in (first, second)] == [first["test"], second["test"]]


def test_differences_of_runs_of_other_rounds_and_seeds(folder):
    """A run of fewer rounds is compared by its last one; a seed that only one side has is left out;
    and a second set of equal size is drawn anew, or the mean of a set and its opposite would look
    certain."""
    opposite = Round(1, SELF, [OWN], TEACHER, {"test": BEFORE, "other": AFTER})
    ours = Round(2, SELF, [OWN], TEACHER, {"test": AFTER, "other": BEFORE})
    lines = model("all", ours) + model("self", opposite) + model("self", opposite, 1)
    write_lines(folder / "metrics.jsonl", lines)
    for name, result in (("all-2", ours), ("self-1", opposite)):
        for set_name, records in result.results.items():
            path = folder / f"seed-0/{name}/answers-{set_name}.json"
            write_text(path, json.dumps(records))
    [row] = cells_of(table_of_differences(folder, lines, lines[0]))
    assert row["ahead of"] == "self 1"
    assert (row["test"], row["other"]) == ("+0.0 (-75.0 to +75.0)",) * 2
    mean, low, high = map(float, re.findall(r"[-+][0-9.]+", row["mean of the sets"]))
    assert mean == 0 and -75 < low < -25 and 25 < high < 75
    assert table_of_differences(folder, lines[:1], lines[0]) == "No other run has these seeds."


def test_command(folder, tmp_path):
    """It can be called again, later; and says what it needs."""
    command = [sys.executable, str(ROOT / "data/report.py")]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=True)
    assert "all 1" in done.stdout
    assert (folder / "report.md").is_file()
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("usage: ")


def test_table_by_hand():
    """Floats as per cent, None as a dash, the rest as it is; equally wide lines, as Markdown."""
    rows = [{"model": "combined", "test": 0.5, "alpha": None, "steps": 12},
            {"model": "b", "test": 1.0, "alpha": 0.25, "steps": 7}]
    assert format_table(rows).splitlines() == [
        "| model    | test  | alpha | steps |",
        "| -------- | ----- | ----- | ----- |",
        "| combined | 50.0  | -     | 12    |",
        "| b        | 100.0 | 25.0  | 7     |"]


def test_table_gives_mean_and_spread_over_seeds(folder):
    """Accuracies 0.5 and 0.7: mean 60, standard deviation 14.1 (of a sample: n - 1). One None makes
    the mean unknown."""
    write_lines(folder / "metrics.jsonl",
                model("combined", ROUND_0, accuracy=0.5, KL_free=0.25)
                + model("combined", ROUND_0, seed=1, accuracy=0.7, KL=0.5, KL_free=0.25))
    table = write_report(folder)
    [cells] = cells_of(table)
    assert cells["test"] == "60.0 ± 14.1"
    assert cells["held-out"] == "60.0 ± 14.1"
    assert cells["any"] == "75.0 ± 0.0"
    assert cells["pot share"] == "25 ± 0"
    assert cells["alpha"] == "1.00 ± 0.00"
    assert cells["KL"] == "-"
    assert cells["KL free"] == "0.25 ± 0"
    assert table in (folder / "report.md").read_text()


def test_room_has_a_column_where_it_was_measured(folder):
    """In points. Round 0 has none."""
    assert "room" not in cells_of(write_report(folder))[0]
    write_lines(folder / "metrics.jsonl",
                model("combined", ROUND_0) + model("all", ROUND_1, room=-0.0125))
    assert [cells["room"] for cells in cells_of(write_report(folder))] == ["-", "-1.2"]


def test_metrics_of_a_resumed_run_are_those_of_an_undisturbed_one(tmp_path):
    """Two runs share "combined"; a resumed run brings its finished models once more."""
    path = tmp_path / "metrics.jsonl"
    combined = model("combined", ROUND_0)
    models = [combined, model("all", ROUND_1), combined, model("self", ROUND_1),
              model("combined", ROUND_0, seed=1)]
    for lines in models:
        update_metrics(path, lines)
    undisturbed = path.read_bytes()
    lines = [json.loads(line) for line in undisturbed.splitlines()]
    assert lines == models[0] + models[1] + models[3] + models[4]
    path.unlink()
    for lines in models[:4] + models:
        update_metrics(path, lines)
    assert path.read_bytes() == undisturbed


def test_a_model_that_was_made_again_replaces_its_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for lines in (model("combined", ROUND_0), model("all", ROUND_1)):
        update_metrics(path, lines)
    update_metrics(path, model("combined", ROUND_0, steps=9))
    steps = [json.loads(line)["steps"] for line in path.read_text().splitlines()]
    assert steps == [9, 9, 3, 3]


def test_what_a_round_prints(capsys):
    print_round(model("all", ROUND_1), ROUND_1, QUESTIONS[:1])
    output = capsys.readouterr().out
    table, _, rest = output.partition("generated programs: ")
    cot, l2m, pot = cells_of(table.strip().partition("\n")[2])
    assert cot == {
        "strategy": "cot", "generated": "2", "cut off": "0", "correct": "2", "kept": "1",
        "from teacher": "1", "share of mix": "100.0", "share of answers": "25.0",
        "accuracy of these": "0.0", "accuracy if forced": "25.0"}
    assert (l2m["cut off"], l2m["correct"], l2m["accuracy of these"]) == ("1", "1", "-")
    assert (pot["generated"], pot["correct"], pot["accuracy if forced"]) == ("2", "0", "50.0")
    assert rest == (
        "refused 1, ok 1\n"
        "shop: 50.0, forced cot 0.0, l2m 0.0, pot 50.0\n"
        "accuracy: held-out 100.0, test 50.0; any test 75.0\n"
        "alpha 0.500, KL(mix || own kept texts) 0.028, "
        "KL(mix || free choice on the held-out questions) 0.66\n"
        "What is 0 + 1? (1)\n"
        "  right [cot]: Final answer: 1\n"
        "  right [l2m]: Final answer: 1\n"
        "  wrong [pot]: import os\n\n")


def test_what_round_0_prints(capsys):
    """No texts of the student's own, and without a held-out set no choice to compare with."""
    result = Round(0, [], [], TEACHER, {"test": BEFORE})
    print_round(model("combined", result), result, QUESTIONS)
    output = capsys.readouterr().out
    assert "combined, round 0" in output
    assert "generated programs" not in output
    assert output.endswith("accuracy: test 50.0; any test 75.0\n"
                           "alpha 1.000, KL(mix || own kept texts) -, "
                           "KL(mix || free choice on the held-out questions) -\n\n")


def test_example_of_a_question_solved_in_one_strategy_only(capsys):
    """The first is solved in all three, the second in one. Of several texts the first is shown."""
    texts = [Rationale(q.id, s, "Final answer: 1\nor so", "student") for q in QUESTIONS[:2]
             for s in ("cot", "l2m")]
    texts += [Rationale("q0", "pot", "answer = 1"), Rationale("q1", "pot", "answer = 2"),
              Rationale("q1", "pot", "answer = 1")]
    result = Round(1, texts, [], TEACHER, {"test": AFTER})
    print_round(model("all", result), result, QUESTIONS)
    assert capsys.readouterr().out.endswith(
        "What is 1 + 1? (2)\n"
        "  wrong [cot]: Final answer: 1\n               or so\n"
        "  wrong [l2m]: Final answer: 1\n               or so\n"
        "  right [pot]: answer = 2\n\n")


def test_programs_are_counted_by_their_end():
    texts = ["answer = 1", "answer = 2", "answer = 1 / 0", "import os", "other = 1"]
    rationales = [Rationale("q0", "pot", text) for text in texts] + TEACHER
    assert count_programs(rationales) == "programs: ok 2, error 1, refused 1, no answer 1"
    assert count_programs(TEACHER) == "programs: none"
