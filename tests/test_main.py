"""Tests of the command:  python -m pytest tests/test_main.py

They run the real train.py and look at what it leaves, in a minute or so: once with the embedded
student and data, else with the tiny student of conftest.py and six sums, which it learns by heart.
So its own texts enter the mix, and something can be expected of it.

To start Python and import torch takes longer than such a run. So most runs are made in this process
(`run_here`: the whole file all the same, as `python train.py` runs it), and tests share them.
"""
import contextlib
import io
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.files import write_lines

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "train.py"
TOY = ROOT / "data/toy"
STRATEGIES = ["cot", "l2m", "pot"]
SETS = ["held-out", "test", "ood_longer"]
FLAGS = ["--iters", "1", "--mix", "all", "--samples", "2", "--max-new-tokens", "40", "--epochs",
         "40", "--batch-size", "15", "--accumulation", "1", "--lr", "1e-2", "--device", "cpu"]


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six training questions, of which one is held out, each with a right text in every strategy
    and a wrong one. They are the test set, too, so that it is known what a student says that has
    learned them by heart."""
    folder = tmp_path_factory.mktemp("data") / "sums"
    questions = []
    teacher = []
    for i in range(1, 7):
        id, total = f"train-{i}", 3 * i
        questions.append({"id": id, "question": f"What is {i} + {2 * i}?", "answer": str(total),
                          "kind": "sum"})
        for strategy, text in (
                ("cot", f"{i} + {2 * i} = {total}. Final answer: {total}"),
                ("l2m", f"What is added? {2 * i}. Final answer: {total}"),
                ("pot", f"answer = {i} - {2 * i}"),
                ("pot", f"answer = {i} + {2 * i}")):
            teacher.append({"id": id, "strategy": strategy, "text": text})
    longer = {"id": "longer-1", "question": "What is 1 + 2 + 3?", "answer": "6", "kind": "sum"}
    write_lines(folder / "train.jsonl", questions)
    write_lines(folder / "teacher.jsonl", teacher)
    write_lines(folder / "test.jsonl", questions)
    write_lines(folder / "ood_longer.jsonl", [longer])
    return folder


@pytest.fixture(scope="module")
def flags(tiny_student, data):
    return ["--model", str(tiny_student), "--data", str(data), *FLAGS]


@pytest.fixture(scope="module")
def changed_train(tmp_path_factory):
    """A function that writes a train.py which differs from the real one in its SETTINGS, or runs
    some code of the test's own `first`, or `then`, just before main()."""
    def write(first="", then="", **settings) -> Path:
        start = 'if __name__ == "__main__":\n'
        text = TRAIN.read_text(encoding="utf-8")
        assert text.count(start) == 1
        text = text.replace(start, f"SETTINGS.update({settings})\n{then}\n{start}")
        path = tmp_path_factory.mktemp("changed") / "train.py"
        path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{first}\n{text}")
        return path

    return write


def start(out, *flags, program=TRAIN, launcher=(sys.executable,), **how) -> subprocess.Popen:
    """The command, from another folder than the repository's, as a user may."""
    command = [*launcher, str(program), "--out", str(out), *flags]
    return subprocess.Popen(command, cwd=out.parent, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **how)


def finish(process) -> str:
    """What the command printed, if all went well."""
    try:
        out, err = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its processes
        raise
    assert process.returncode == 0, err
    assert "Traceback" not in err
    return out


def run_here(out, *flags, program=TRAIN):
    """The command in this process. Returns its exit code, what it printed, and what it said on
    stderr."""
    printed, said = io.StringIO(), io.StringIO()
    argv = sys.argv
    sys.argv = ["train.py", "--out", str(out), *map(str, flags)]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            runpy.run_path(str(program), run_name="__main__")
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    finally:
        sys.argv = argv
    return code, printed.getvalue(), said.getvalue()


def succeed(out, *flags, program=TRAIN) -> str:
    """What it printed, if all went well."""
    code, printed, said = run_here(out, *flags, program=program)
    assert (code, said) == (0, "")
    return printed


@pytest.fixture(scope="module")
def run(flags, tmp_path_factory):
    """(run folder, what was printed) of an undisturbed run. Not to be changed."""
    out = tmp_path_factory.mktemp("run") / "out"
    process = start(out, *flags)
    printed, said = process.communicate(timeout=300)
    assert (process.returncode, said) == (0, "")
    return out, printed


def metrics_of(out) -> list[dict]:
    """All but the time."""
    return [line | {"seconds": 0} for line in read_lines(out / "metrics.jsonl")]


def rounds_of(out) -> list[dict]:
    """A line for each model."""
    return [line for line in read_lines(out / "metrics.jsonl") if line["set"] == "test"]


def files_of(out) -> dict:
    """What the models' folders hold, the time aside: path -> bytes. The parts of a round's own
    texts are joined."""
    files = {}
    for path in (out / "seed-0").rglob("*"):
        if path.is_file() and not path.name.startswith("self-"):
            content = path.read_bytes()
            if path.name == "metrics.json":
                content = re.sub(rb'"seconds": [\d.]+', b"", content)
            files[str(path.relative_to(out))] = content
    for folder in (out / "seed-0").iterdir():
        parts = sorted(folder.glob("self-?.jsonl"))
        files[f"seed-0/{folder.name}/self"] = b"".join(path.read_bytes() for path in parts)
    return files


def assert_same_result(out, other):
    """The same weights, texts and metrics to the bit, and nothing unfinished is left."""
    ours, theirs = files_of(out), files_of(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert metrics_of(out) == metrics_of(other)


def table_of(text) -> list[list[str]]:
    """The cells of the last Markdown table of a text, without its last column, the seconds."""
    table = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)[-1].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert rows[0][-1] == "seconds"
    return [row[:-1] for row in rows if set(row[0]) != {"-"}]


# --------------------------------------------------------------------------------------------------
# a run


def test_embedded_student_and_data(tmp_path):
    """What a newcomer runs, cut short: an exit code of 0, two models, and a table."""
    data, out = tmp_path / "data", tmp_path / "out"
    for name, count in {"train": 11, "test": 6, "ood_longer": 1, "ood_wording": 1}.items():
        write_lines(data / f"{name}.jsonl", read_lines(TOY / f"{name}.jsonl")[:count])
    ids = {question["id"] for question in read_lines(data / "train.jsonl")}
    teacher = [line for line in read_lines(TOY / "teacher.jsonl") if line["id"] in ids]
    write_lines(data / "teacher.jsonl", teacher)
    printed = finish(start(out, "--data", str(data), "--iters", "1", "--epochs", "1",
                           "--max-new-tokens", "30"))
    assert sorted(path.name for path in (out / "seed-0").iterdir()) == ["adaptive-1", "combined"]
    header, *rows = table_of(printed)
    assert [row[0] for row in rows] == ["combined", "adaptive 1"]
    assert header[1:5] == ["held-out", "test", "ood_longer", "ood_wording"]
    metrics = read_lines(out / "metrics.jsonl")
    assert [line["set"] for line in metrics] == 2 * ["held-out", "test", "ood_longer", "ood_wording"]
    kinds = {line["set"]: line["kinds"].keys() for line in metrics}
    assert kinds["test"] == {"shop", "tally", "relations"}
    assert len(read_lines(out / "seed-0/adaptive-1/self-0.jsonl")) == 10 * 3


def test_run_folder_holds_what_is_promised(run, tiny_student):
    """args.json, metrics.jsonl, report.md, and a folder per model, complete and in the student's
    format."""
    out, _ = run
    names = {path.name for path in out.iterdir()} - {"report.png"}  # which needs matplotlib
    assert names == {"args.json", "metrics.jsonl", "report.md", "seed-0", "lock"}
    args = json.loads((out / "args.json").read_text())
    assert (args["iters"], args["lr"], args["mix"], args["seed"]) == (1, 1e-2, "all", 0)
    folders = sorted((out / "seed-0").iterdir())
    assert [folder.name for folder in folders] == ["all-1", "combined"]
    tensors = load_file(tiny_student / "model.safetensors").keys()
    for folder in folders:
        files = {path.name for path in folder.iterdir()}
        assert files - {"self-0.jsonl"} == {
            "model.safetensors", "config.json", "tokenizer.json", "generation_config.json",
            "mix.jsonl", "steps.json", "metrics.json", *(f"answers-{name}.json" for name in SETS)}
        assert load_file(folder / "model.safetensors").keys() == tensors
        assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 0


def test_metrics_have_the_named_fields(run):
    """One line per model and set, with every figure of the method; what belongs together agrees."""
    lines = read_lines(run[0] / "metrics.jsonl")
    assert [(line["run"], line["iteration"], line["set"]) for line in lines] == [
        (name, number, asked) for name, number in (("combined", 0), ("all", 1)) for asked in SETS]
    for line in lines:
        total = {"held-out": 1, "test": 6, "ood_longer": 1}[line["set"]]
        assert line["accuracy"] * total == pytest.approx(round(line["accuracy"] * total))
        for name in ("share", "accuracy_within", "forced", "P_mix", "P_free"):
            assert list(line[name]) == STRATEGIES
        assert max(line["forced"].values()) <= line["any"] <= 1
        assert 0 <= sum(line["share"].values()) <= 1 + 1e-9
        assert sum(line["P_mix"].values()) == pytest.approx(1)
        assert line["kinds"]["sum"]["accuracy"] == line["accuracy"]
        assert line["KL_free"] >= 0
        assert line["seconds"] > 0 and line["seed"] == 0
    combined, last = lines[0], lines[-1]
    assert (combined["alpha"], combined["KL"], combined["P_student"]) == (1, None, None)
    assert 0 < last["alpha"] < 1 and last["KL"] >= 0 and list(last["P_student"]) == STRATEGIES
    assert combined["steps"] == 40  # 15 texts, 40 epochs, batches of 15


def test_student_learns_by_heart(run):
    """The whole chain from teacher.jsonl to the answer: of the six test questions five were trained
    on. After round 0 some of them are answered right, after round 1 nearly all, free and with each
    strategy forced. A lost end token, a shifted loss or another prompt leaves 0."""
    combined, last = rounds_of(run[0])
    assert combined["accuracy"] > 1.9 / 6 and last["accuracy"] > 3.9 / 6
    assert sum(last["share"].values()) == pytest.approx(1)
    assert all(accuracy > 0.6 for accuracy in last["forced"].values())


def test_texts_of_the_rounds_are_kept(run):
    """self-*.jsonl: all that the student wrote. mix.jsonl: what it was trained on: of the teacher's
    texts the right ones, of its own some of those that it wrote."""
    seed = run[0] / "seed-0"
    assert not list((seed / "combined").glob("self-*"))
    taught = read_lines(seed / "combined/mix.jsonl")
    ids = {text["id"] for text in taught}
    assert [(text["id"], text["strategy"], text["source"]) for text in taught] == [
        (id, strategy, "teacher") for id in sorted(ids) for strategy in STRATEGIES]
    assert len(ids) == 5 and all(" - " not in text["text"] for text in taught)
    generated = read_lines(seed / "all-1/self-0.jsonl")
    assert len(generated) == 5 * 3 * 2  # questions, strategies, samples
    mixed = read_lines(seed / "all-1/mix.jsonl")
    own = [text for text in mixed if text["source"] == "student"]
    assert own and all(text in generated and text["finished"] for text in own)
    assert len(own) == len({(text["id"], text["strategy"]) for text in own})
    assert [text for text in mixed if text["source"] == "teacher"] == taught
    line = read_lines(run[0] / "metrics.jsonl")[-1]
    assert line["alpha"] == pytest.approx(15 / (15 + len(own)))
    assert line["steps"] == 40 + -(-(15 + len(own)) * 40 // 15)  # those of round 0 included


def test_fourth_strategy_is_one_name_in_one_place(tiny_student, data, changed_train, tmp_path):
    """With "equation" among data/answers.py's STRATEGIES, and texts of it among the teacher's, the
    student is trained on it, generates in it and is measured in it."""
    shutil.copytree(data, tmp_path / "data")
    with (tmp_path / "data/teacher.jsonl").open("a") as file:
        for question in read_lines(data / "train.jsonl"):
            text = f"x = {question['answer']}. Final answer: {question['answer']}"
            line = {"id": question["id"], "strategy": "equation", "text": text}
            file.write(json.dumps(line) + "\n")
    program = changed_train("import data.answers; data.answers.STRATEGIES += ('equation',)")
    out = tmp_path / "out"
    printed = finish(start(out, "--model", str(tiny_student), "--data", str(tmp_path / "data"),
                           *FLAGS, program=program))
    assert "equation share" in table_of(printed)[0]
    assert "equation: right" in (out / "report.md").read_text()
    folder = out / "seed-0/all-1"
    generated = read_lines(folder / "self-0.jsonl")
    assert {text["strategy"] for text in generated} == {*STRATEGIES, "equation"}
    mixed = read_lines(folder / "mix.jsonl")
    assert {"student", "teacher"} == {text["source"] for text in mixed
                                      if text["strategy"] == "equation"}
    assert read_lines(out / "metrics.jsonl")[-2]["forced"]["equation"] > 0.6


def test_table_is_printed_and_reported(run):
    """A row per model with its accuracy on every set. report.md shows the same, and the command
    that it comes from."""
    out, printed = run
    report = (out / "report.md").read_text()
    header, *rows = table_of(printed)
    first_table = re.search(r"(?:^\|.*\|\n)+", report, re.MULTILINE)[0]
    assert table_of(first_table) == [header, *rows]
    assert "train.py" in report and "--epochs 40" in report
    assert {"any", "alpha", "KL", "KL free", "steps"} <= set(header)
    lines = read_lines(out / "metrics.jsonl")
    models = [("combined", lines[:3]), ("all 1", lines[3:])]
    for row, (name, lines) in zip(rows, models, strict=True):
        accuracies = [f"{100 * line['accuracy']:.1f}" for line in lines]
        assert row[:4] == [name, *accuracies] and header[1:4] == SETS


def test_running_again_trains_nothing(run, flags):
    """The same command finds its models finished: no file of theirs changes, and the same table
    comes out."""
    out, printed = run
    before = {path: path.stat().st_mtime_ns for path in (out / "seed-0").rglob("*")}
    metrics = (out / "metrics.jsonl").read_bytes()
    again = succeed(out, *flags)
    assert {path: path.stat().st_mtime_ns for path in (out / "seed-0").rglob("*")} == before
    assert (out / "metrics.jsonl").read_bytes() == metrics
    assert "loss" not in again and table_of(again) == table_of(printed)


@pytest.mark.parametrize("mix, alpha, steps", [("adaptive", 1, 80), ("self", 0, 40)])
def test_round_without_a_right_text_goes_on(flags, tmp_path, mix, alpha, steps):
    """This student learns nothing and solves nothing. So the next round trains on the teacher's
    texts alone; and --mix self on none."""
    succeed(tmp_path / "out", *flags, "--mix", mix, "--lr", "0")
    last = read_lines(tmp_path / "out/metrics.jsonl")[-1]
    assert last["iteration"] == 1 and last["KL"] is None
    assert (last["alpha"], last["steps"]) == (alpha, steps)


def test_mistyped_first_try_does_not_block_the_run_folder(flags, tmp_path):
    """Nothing was trained with the wrong flag, so the right one is no "other setting"."""
    out = tmp_path / "out"
    assert run_here(out, *flags, "--model", tmp_path / "modle")[0] == 2
    succeed(out, *flags, "--iters", "0", "--epochs", "1")


def test_nul_in_a_text_is_a_character_like_others(flags, copy_of, tmp_path):
    """And so is one of four bytes."""
    folder = copy_of("train", lambda lines: [lines[0].replace("What", r"\u0000\ud83d\ude00 What"),
                                             *lines[1:]])
    succeed(tmp_path / "out", *flags, "--data", folder, "--epochs", "1")
    assert len(read_lines(tmp_path / "out/seed-0/all-1/self-0.jsonl")) == 5 * 3 * 2


# --------------------------------------------------------------------------------------------------
# a run that is stopped


# Before main(): the process divides once for each of STOPS. One half is the run. The other half
# waits for so many seconds, or until a file of that name is there, and kills it. After the last
# kill it goes on as the run itself. So all runs share the seconds of importing torch.
KILLS = """
import json, signal, torch._dynamo  # the optimizer imports the last
out = Path(sys.argv[sys.argv.index("--out") + 1])
for stop in STOPS:
    child = os.fork()
    if child == 0:
        break
    if isinstance(stop, float):
        time.sleep(stop)
    while isinstance(stop, str) and not any(out.glob(stop)):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), f"it ended without {stop}"
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    print("\\nkilled with", json.dumps(files), flush=True)  # it may be killed within a line
"""


def run_with_kills(out, flags, changed_train, stops):
    """Keeps a checkpoint after every step, and writes the own texts in five parts. Returns for each
    kill the files that were there."""
    small_parts = "sys.modules['siked'].TEXTS_IN_A_PART = 6\n"  # one question
    kills = KILLS.replace("STOPS", repr(stops))
    program = changed_train(then=small_parts + kills, save_minutes=0)
    printed = finish(start(out, *flags, program=program))
    return [json.loads(line) for line in re.findall("^killed with (.*)$", printed, re.MULTILINE)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_run_goes_on_to_the_same_result(run, flags, changed_train, tmp_path):
    """Killed without warning, again and again, at any moment, it ends as the undisturbed one did,
    whose texts were not even written in parts."""
    seconds = sum(line["seconds"] for line in rounds_of(run[0]))
    stops = [random.uniform(0.02, 0.5) * seconds for _ in range(6)]
    assert len(run_with_kills(tmp_path / "out", flags, changed_train, stops)) == 6
    assert_same_result(tmp_path / "out", run[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_in_every_step(run, flags, changed_train, tmp_path):
    """As above, at the moments that a random one may miss: within a training, within the texts of
    its own, between two evaluations, and before the last lines are in metrics.jsonl."""
    out = tmp_path / "out"
    stops = ["seed-0/combined/training.pt", "seed-0/combined/answers-held-out.json",
             "seed-0/all-1/self-0.jsonl", "seed-0/all-1/training.pt", "seed-0/all-1/metrics.json"]
    killed = run_with_kills(out, flags, changed_train, stops)
    for stop, files in zip(stops, killed, strict=True):
        assert stop in files, "it was past that before the kill"
    assert "seed-0/combined/model.safetensors" not in killed[0]
    assert "seed-0/all-1/self-4.jsonl" not in killed[2]
    assert "seed-0/all-1/model.safetensors" not in killed[3]
    assert len(list(out.glob("seed-0/all-1/self-*.jsonl"))) == 5
    assert_same_result(out, run[0])


def test_interrupted_run_says_how_to_go_on(run, flags, changed_train, tmp_path):
    """Ctrl-C: one line, and exit code 130, as shells have it. And what it says is true."""
    out = tmp_path / "out"
    process = start(out, *flags, program=changed_train(save_minutes=0))
    while not (out / "seed-0/combined/training.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "train.py: stopped; to go on, type the same command again\n"
    assert not (out / "seed-0/combined/model.safetensors").exists()
    succeed(out, *flags)
    assert_same_result(out, run[0])


# --------------------------------------------------------------------------------------------------
# several processes

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SHARED = ["--batch-size", "8", "--accumulation", "2", "--samples", "3"]
# Each process writes down its number, and its share of every loss.
NOTES = """
out = sys.argv[sys.argv.index("--out") + 1]
Path(f"{out}-process-{RANK}").write_text(str(os.getpid()))
losses = open(f"{out}-losses-{RANK}", "w", buffering=1)
def add_gradients(*args, add_gradients=add_gradients):
    loss = add_gradients(*args)
    print(loss.item(), file=losses)
    return loss
"""


def losses_of(out, rank) -> list[float]:
    return [float(line) for line in open(f"{out}-losses-{rank}")]


def is_alive(pid) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_two_processes_do_the_work_of_one(flags, changed_train, tmp_path):
    """Also after a death: where one is killed the other ends, and the same command goes on. The
    texts are those of one process token by token, the metrics are the same, and so are the losses
    but for rounding: gradients are summed in another order."""
    alone, out = tmp_path / "alone", tmp_path / "out"
    program = changed_train(then=NOTES, save_minutes=0)
    succeed(alone, *flags, *SHARED, program=program)
    both = losses_of(alone, 0)  # a step has two parts
    losses = [a + b for a, b in zip(both[::2], both[1::2], strict=True)]
    assert len(losses) == rounds_of(alone)[-1]["steps"] and losses[0] > 2 * losses[30]

    process = start(out, *flags, *SHARED, program=program, launcher=TORCHRUN)
    while not (out / "seed-0/combined/training.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    pids = [int(Path(f"{out}-process-{rank}").read_text()) for rank in (0, 1)]
    assert is_alive(pids[0])
    os.kill(pids[1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0 and not is_alive(pids[0])
    assert not (out / "seed-0/combined/model.safetensors").exists()

    printed = finish(start(out, *flags, *SHARED, program=program, launcher=TORCHRUN))
    assert printed.count("seed 0: ") == printed.count("All models") == 1, "one of them speaks"
    name = "seed-0/all-1/self"
    assert files_of(out)[name] == files_of(alone)[name] != b""
    assert metrics_of(out) == metrics_of(alone)
    shares = zip(losses_of(out, 0), losses_of(out, 1), strict=True)
    shared = [a + b for a, b in shares]  # from the step of the death on
    assert 50 < len(shared) < len(losses)
    for a, b in zip(losses[-len(shared):], shared):
        assert a == pytest.approx(b, abs=1e-5)


# --------------------------------------------------------------------------------------------------
# a comparison


@pytest.fixture(scope="module")
def compared(run, flags, tmp_path_factory):
    """(run folder, what was printed): the run goes on to two rounds and a comparison."""
    out = tmp_path_factory.mktemp("compared") / "out"
    shutil.copytree(run[0], out)
    return out, succeed(out, *flags, "--iters", "2", "--compare")


def mix_of(out, model):
    return read_lines(out / "seed-0" / model / "mix.jsonl")


def test_compare_runs_everything_that_siked_is_compared_with(compared):
    """From the same student and data: all mixes, and the teacher's texts alone, of all strategies
    and of each. Controls take as many steps in each round as the run of --mix."""
    out, printed = compared
    steps = {}
    for line in rounds_of(out):
        steps[line["run"], line["iteration"]] = line["steps"]
    runs = ["all", "adaptive", "self", "teacher", *STRATEGIES]
    assert steps.keys() == {("combined", 0), ("cot", 0), ("l2m", 0), ("pot", 0),
                            *((name, number) for name in runs for number in (1, 2))}
    assert 40 == steps["combined", 0] < steps["all", 1] - 40  # own texts are more to train on
    for name in ("teacher", *STRATEGIES):
        for number in (1, 2):
            assert steps[name, number] == steps["all", number]  # FLAGS say --mix all
        assert steps[name if name in STRATEGIES else "combined", 0] == 40
    assert len({steps[name, 2] for name in ("all", "adaptive", "self")}) > 1
    header, *rows = table_of(printed)
    assert [row[0] for row in rows] == [
        "combined", "all 1", "all 2", "adaptive 1", "adaptive 2", "self 1", "self 2",
        "teacher 1", "teacher 2", "cot", "cot 1", "cot 2", "l2m", "l2m 1", "l2m 2", "pot", "pot 1",
        "pot 2"]


def test_compared_runs_train_on_what_they_are_named_after(compared):
    out, _ = compared
    taught = mix_of(out, "combined")
    for name in STRATEGIES:
        for model in (name, f"{name}-1", f"{name}-2"):
            assert mix_of(out, model) == [text for text in taught if text["strategy"] == name]
    assert mix_of(out, "teacher-1") == mix_of(out, "teacher-2") == taught
    assert not list(out.glob("seed-0/teacher-*/self-*")), "it needs no texts of its own"
    assert {text["source"] for text in mix_of(out, "self-1")} == {"student"}
    mixed = mix_of(out, "adaptive-1")
    solved = {text["id"] for text in mixed if text["source"] == "student"}
    assert solved and solved.isdisjoint(t["id"] for t in mixed if t["source"] == "teacher")
    assert [text for text in mix_of(out, "all-1") if text["source"] == "teacher"] == taught


def test_what_is_added_later_is_that_of_one_run(run, compared, flags, tmp_path):
    """--iters 1 and then --iters 2 end as --iters 2 at once: the same weights, texts and metrics.
    So the second round starts from the weights of the first, and draws from its own seed alone.
    What was finished before is not done again."""
    out = tmp_path / "out"
    succeed(out, *flags, "--iters", "2")
    ours, theirs, first = files_of(out), files_of(compared[0]), files_of(run[0])
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert [name for name in first if first[name] != ours[name]] == []
    weights = [ours[f"seed-0/{name}/model.safetensors"] for name in ("combined", "all-1", "all-2")]
    assert len(set(weights)) == 3
    assert ours["seed-0/all-1/self"] != ours["seed-0/all-2/self"]
    assert metrics_of(out) == [line for line in metrics_of(compared[0])
                               if line["run"] in ("combined", "all")]


# --------------------------------------------------------------------------------------------------
# what is refused: exit code 2, one line that says what is wrong


@pytest.fixture
def refused(tmp_path):
    """Runs the command, expects it to stop with code 2 before it trains; returns what it says."""
    def run(*flags, out=tmp_path / "out"):
        code, printed, said = run_here(out, *flags)
        assert code == 2, said
        assert "loss" not in printed, "refused, but only after some training"
        lines = [line for line in said.splitlines() if not line.startswith("usage: ")]
        assert len(lines) == 1 and "Traceback" not in said, said
        return lines[0]

    return run


@pytest.fixture
def copy_of(data, tmp_path):
    """A copy of the data whose file `name` has been changed by a function of its lines."""
    def copy(name, change):
        folder = tmp_path / "data"
        shutil.copytree(data, folder)
        path = folder / f"{name}.jsonl"
        lines = change(path.read_text(encoding="utf-8").splitlines())
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    return copy


def test_refusal_of_the_real_command(flags, tmp_path):
    """Once from outside, as the tests below are not: exit code, one line, no traceback."""
    process = start(tmp_path / "out", *flags, "--model", str(tmp_path / "absent"))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and len(said.splitlines()) == 1
    assert said.startswith("train.py: ") and str(tmp_path / "absent") in said


@pytest.mark.parametrize("flag, value", [
    ("--iters", "-1"), ("--iters", "two"), ("--seeds", "0"), ("--mix", "both"), ("--samples", "0"),
    ("--max-new-tokens", "0"), ("--epochs", "0"), ("--epochs", "inf"), ("--batch-size", "0"),
    ("--accumulation", "0"), ("--lr", "-1"), ("--lr", "nan"), ("--lora", "-1"), ("--rows", "0"),
    ("--dtype", "float16"), ("--device", "abacus"), ("--preset", "mine"), ("--prompt", "Q:"),
    ("--held-out", "0.1"), ("--temperature", "0.5")])  # these two are no flags (any more)
def test_impossible_flags_are_refused_at_once(refused, flags, tmp_path, flag, value):
    """By the flag's name, before anything is read or written: not after an hour of training."""
    assert flag in refused(*flags, flag, value)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without cuda")
def test_device_that_is_not_there_is_refused(refused, flags):
    assert "--device" in refused(*flags, "--device", "cuda")


def test_missing_data_is_named(refused, flags, tmp_path):
    """A mistyped --data."""
    said = refused(*flags, "--data", tmp_path / "absent")
    assert f"{tmp_path / 'absent' / 'train.jsonl'}: no such file" in said


@pytest.mark.parametrize("name", ["train", "teacher", "test"])
def test_missing_file_is_named(refused, flags, data, tmp_path, name):
    """A data folder that lacks one of the three files that it must have."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    (folder / f"{name}.jsonl").unlink()
    assert f"{folder / name}.jsonl: no such file" in refused(*flags, "--data", folder)


@pytest.mark.parametrize("name, line, named", [
    ("train", '{"id": "x", "question": "1 + 1?", "answer": "2"', "JSON"),
    ("train", '{"id": "x", "question": "1 + 1?", "answer": "many"}', "many"),
    ("train", r'{"id": "x", "question": "1 + 1\ud83d?", "answer": "2"}', "surrogate"),
    ("test", '{"id": "x", "question": "1 + 1?"}', "the field 'answer' is missing"),
    ("test", r'{"id": "x", "question": "?", "answer": "2", "kind": "\ud83d"}', "surrogate"),
    ("ood_longer", '["x"]', "the field 'id' is missing"),
    ("teacher", '{"id": "x", "strategy": "guess", "text": "3"}', "guess"),
    ("teacher", '{"id": "gsm-1", "strategy": "cot", "text": "3"}', "gsm-1"),  # of other questions
])
def test_bad_line_is_named(refused, flags, copy_of, name, line, named):
    """Whatever the file: which file, which line, and what about it."""
    folder = copy_of(name, lambda lines: [lines[0], line, *lines[1:]])
    said = refused(*flags, "--data", folder)
    assert f"{name}.jsonl, line 2: " in said and named in said


def test_endless_line_is_named(refused, flags, copy_of):
    """A file without line breaks, 200 MB of it: refused without being read whole."""
    folder = copy_of("train", lambda lines: lines)
    with (folder / "train.jsonl").open("r+b") as file:
        file.seek(0, 2)
        file.write(b'{"id": "x", "question": "')
        file.seek(200_000_000, 1)  # a hole, which reads as NUL bytes
        file.write(b'", "answer": "2"}\n')
    said = refused(*flags, "--data", folder)
    assert "train.jsonl, line 7: longer than" in said


@pytest.mark.parametrize("lines, named", [
    ([], "teacher.jsonl: no rationales in it"),
    (['{"id": "train-1", "strategy": "cot", "text": "Final answer: 1e9"}'],
     "teacher.jsonl: no rationale is right"),
    ([json.dumps({"id": "train-1", "strategy": "cot", "text": 600 * "so " + "Final answer: 3"})],
     "teacher.jsonl: no rationale is right, finished and short enough"),
])
def test_teacher_without_a_right_text_is_refused(refused, flags, copy_of, lines, named):
    """A student of such a teacher would be called trained, and was never trained."""
    assert named in refused(*flags, "--data", copy_of("teacher", lambda _: lines))


def change_config(folder, **changed):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def change_weights(folder, drop=(), spoil=None):
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items() if name not in drop}
    if spoil is not None:
        tensors["model.norm.weight"][3] = spoil
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("break_it, named", [
    (lambda folder: change_config(folder, model_type="bert"), "bert"),
    (lambda folder: change_config(folder, eos_token_id=None), "eos_token_id"),
    (lambda folder: change_weights(folder, drop=["model.norm.weight"]), "model.norm.weight"),
    (lambda folder: change_weights(folder, spoil=torch.nan), "model.norm.weight"),
    (lambda folder: change_weights(folder, spoil=torch.inf), "model.norm.weight"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"cut off"), "model.safetensors"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    (shutil.rmtree, "student"),
], ids=["family", "end token", "tensor", "nan", "infinity", "weights", "config", "tokenizer",
        "no tokenizer", "no folder"])
def test_unusable_student_is_named(refused, flags, tiny_student, tmp_path, break_it, named):
    """What is wrong with a checkpoint, by file, field or tensor."""
    folder = tmp_path / "student"
    shutil.copytree(tiny_student, folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    break_it(folder)
    said = refused(*flags, "--model", folder)
    assert named in said and str(folder) in said


def test_questions_longer_than_the_context_are_refused_at_once(refused, flags, copy_of):
    line = json.dumps({"id": "x", "question": "long " * 1000, "answer": "2"})
    said = refused(*flags, "--data", copy_of("train", lambda lines: [*lines, line]))
    assert "longest question" in said and "256 positions" in said


def test_prompt_is_what_the_student_reads(refused, flags):
    """Told by a frame that is longer than its context."""
    assert "256 positions" in refused(*flags, "--prompt", "word " * 300 + "{question}")


def test_texts_that_do_not_fit_the_student_are_refused_at_once(refused, flags):
    """More new tokens than the student has positions: said before the first training, not in the
    evaluation after it."""
    assert "--max-new-tokens 100000" in refused(*flags, "--max-new-tokens", "100000")


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs /sys")
def test_read_only_folder_is_named(refused, flags):
    """/sys takes no folders, not even of the administrator."""
    assert "/sys/siked-out" in refused(*flags, out="/sys/siked-out")


def test_out_that_is_a_file_is_named(refused, flags, tmp_path):
    """A run folder cannot be made where a file stands."""
    (tmp_path / "out").write_text("a file")
    assert str(tmp_path / "out") in refused(*flags)


def test_run_folder_of_other_settings_is_named(refused, run, flags):
    """A second run with another learning rate must not be mixed into the first."""
    before = {path: path.read_bytes() for path in run[0].rglob("*") if path.is_file()}
    said = refused(*flags, "--lr", "0.5", out=run[0])
    assert "lr was 0.01, is 0.5" in said
    assert {path: path.read_bytes() for path in run[0].rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name, kilobytes, minutes", [
    ("args.json", 0, 10), ("all-1/training.pt", 150, 0), ("all-1/model.safetensors", 60, 10)])
def test_full_disk(run, flags, changed_train, tmp_path, name, kilobytes, minutes):
    """Stood for by a limit on the size of files: one line names the file that could not be written,
    what was there before stays as it was, and with room again the run goes on."""
    resource = pytest.importorskip("resource")
    out = tmp_path / "out"
    shutil.copytree(run[0], out)
    shutil.rmtree(out / "seed-0/all-1")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    program = changed_train(save_minutes=minutes)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kilobytes, limits[1]))
    try:
        code, _, said = run_here(out, *flags, program=program)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and len(said.splitlines()) == 1
    assert f"{name} cannot be written" in said
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed <= {"args.json"}  # it names the command
    assert not list(out.rglob("*.part"))
    succeed(out, *flags, program=program)
    assert_same_result(out, run[0])
