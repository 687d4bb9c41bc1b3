"""Tests of data/report.py:  python -m pytest tests/test_report.py

On a run folder that is written here, of two rounds: seconds. That train.py writes such folders is tested in test_main.py.
"""
import builtins
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.report import format_table, write_report

ROOT = Path(__file__).resolve().parents[1]
SHARE = {"cot": 0.5, "l2m": 0.25, "pot": 0.25}


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def metrics(**changed):
    """A line of metrics.jsonl."""
    return {"seed": 0, "run": "siked-all", "iteration": 1, "set": "test", "accuracy": 0.5, "share": SHARE, "steps": 3,
            "accuracy_within": SHARE, "alpha": 0.25, "KL": 0.5, "seconds": 1.0, "P_teacher": SHARE, "P_mix": SHARE,
            "P_student": SHARE} | changed


@pytest.fixture
def folder(tmp_path):
    """Six training questions; of the two test questions, one changes from cot, wrong, to pot, right."""
    questions = [{"id": f"q{i}", "question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(6)]
    write_lines(tmp_path / "data/train.jsonl", questions)
    out = tmp_path / "out"
    write_lines(out / "metrics.jsonl", [
        metrics(set=name, **model) for model in ({"run": "combined", "iteration": 0, "KL": None, "P_student": None},
                                                 {"accuracy": 0.75}) for name in ("held-out", "test")])
    (out / "args.json").write_text(json.dumps({"mix": "all", "lr": 0.25, "data": str(tmp_path / "data"),
                                               "command": "train.py --mix all"}))
    for model, strategy in (("combined", "cot"), ("siked-all-1", "pot")):
        write_lines(out / "seed-0" / model / "answers.jsonl", [
            {"set": "test", "id": "t0", "strategy": strategy, "correct": strategy == "pot", "text": "answer = 3"},
            {"set": "test", "id": "t1", "strategy": "l2m", "correct": True, "text": "Final answer: 4"},
            {"set": "other", "id": "t0", "strategy": strategy, "correct": True, "text": ""}])
    texts = [("cot", "Final answer: 1", True, True), ("cot", "So: Final answer: 1", True, True),
             ("cot", "Final answer: 7.5", True, False), ("cot", "no idea", True, False),
             ("l2m", "Final answer: 1", False, True), ("pot", "import os", True, False)]
    texts = [{"id": "q0", "strategy": s, "text": text, "source": "student", "finished": finished, "correct": correct}
             for s, text, finished, correct in texts]
    texts += [texts[0] | {"id": f"q{i}"} for i in range(1, 6)]
    write_lines(out / "seed-0/siked-all-1/self.jsonl", texts)
    write_lines(out / "seed-0/siked-all-1/mix.jsonl", [texts[0], texts[0] | {"source": "teacher", "text": "taught"}])
    return out


def test_report_reads_by_itself(folder):
    """The command, the settings, where the student changed its mind, and why each text was kept or not."""
    write_report(folder)
    report = (folder / "report.md").read_text()
    assert "`train.py --mix all`" in report and "- lr: 0.25" in report
    assert "From combined to siked-all 1, 1 of 2 questions got another strategy" in report
    assert "- cot -> pot: 1, of which 1 became right and 0 wrong" in report
    assert "**What is 0 + 1?** (gold answer 1; teacher's texts in the mix: 1)" in report
    for verdict in ("cot, kept", "cot, left out: right, but another", "cot, rejected: gives 7.5", "cot, rejected: gives no number\n",
                    "l2m, rejected: cut off", "pot, rejected: gives no number, program: refused"):
        assert verdict in report, verdict
    assert report.count("gold answer") == 5


def test_picture_where_matplotlib_is_and_one_line_where_not(folder, monkeypatch):
    host_import = builtins.__import__

    def without_matplotlib(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return host_import(name, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "__import__", without_matplotlib)
        write_report(folder)
    assert "pip install matplotlib" in (folder / "report.md").read_text() and not (folder / "report.png").exists()
    pytest.importorskip("matplotlib")
    write_report(folder)
    assert (folder / "report.png").read_bytes()[:4] == b"\x89PNG" and "(report.png)" in (folder / "report.md").read_text()


def test_report_of_plain_distillation(folder):
    """--iters 0: one model, which has nothing to be compared with and wrote no texts."""
    write_lines(folder / "metrics.jsonl", [metrics(run="combined", iteration=0, KL=None, P_student=None)])
    assert "combined" in write_report(folder)
    assert "training questions" not in (folder / "report.md").read_text()


def test_command(folder, tmp_path):
    """It can be called again, later; and says what it needs."""
    command = [sys.executable, str(ROOT / "data/report.py")]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=True)
    assert "siked-all 1" in done.stdout and (folder / "report.md").is_file()
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("usage: ")


def test_table_by_hand():
    """Floats as per cent, None as a dash, the rest as it is; all lines equally wide, as Markdown."""
    rows = [{"model": "combined", "test": 0.5, "alpha": None, "steps": 12},
            {"model": "b", "test": 1.0, "alpha": 0.25, "steps": 7}]
    lines = format_table(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["model", "test", "alpha", "steps"]
    assert all(set(cell) == {"-"} for cell in cells[1])
    assert cells[2:] == [["combined", "50.0", "-", "12"], ["b", "100.0", "25.0", "7"]]
    assert len({len(line) for line in lines}) == 1 and all(line[0] == line[-1] == "|" for line in lines)


def test_table_gives_mean_and_spread_over_seeds(folder):
    """Accuracies 0.5 and 0.7: mean 60, standard deviation 14.1 (of a sample: n - 1); one None makes the mean unknown."""
    write_lines(folder / "metrics.jsonl", [metrics(seed=seed, set=name, accuracy=accuracy, KL=None if seed else 0.5)
                                           for seed, accuracy in enumerate([0.5, 0.7]) for name in ("held-out", "test")])
    shown = write_report(folder)
    header, _, row = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines()]
    cells = dict(zip(header, row, strict=True))
    assert cells["test"] == cells["held-out"] == "60.0 ± 14.1"
    assert cells["model"] == "siked-all 1" and cells["KL"] == "-" and cells["cot share"].startswith("50")
    assert shown in (folder / "report.md").read_text()
