"""Tests of the command:  python -m pytest tests/test_main.py

They run the real train.py and look at what it leaves: about half a minute. Once with the embedded student on a cut of the
embedded data; and several times with a tiny student and three of the questions, which it learns by heart in seconds, so
that its own texts enter the mix and something can be expected of it. The runs are shared by the tests.

What must be refused is tried in this process (still the whole file, as `python train.py` runs it): starting Python anew
for each bad flag would take longer than all the rest.
"""
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data.answers import numeric_answer, parse_number, same_number
from model import Config, Decoder

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "data/toy"
STRATEGIES = {"cot", "l2m", "pot"}
SETS = ["held-out", "test", "ood_longer"]
FLAGS = ["--iters", "1", "--mix", "all", "--samples", "2", "--max-new-tokens", "60", "--held-out", "0.34", "--epochs", "60",
         "--batch-size", "6", "--accumulation", "1", "--lr", "1e-2", "--warmup", "4", "--device", "cpu"]  # of the tiny student


def cut_data(folder: Path, **counts) -> Path:
    """A data folder with the first questions of each embedded set, and the teacher rationales of the training questions."""
    folder.mkdir()
    for name, count in counts.items():
        lines = (TOY / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ids = {line["id"] for line in read_lines(folder / "train.jsonl")}
    teacher = (TOY / "teacher.jsonl").read_text(encoding="utf-8").splitlines()
    teacher = [line for line in teacher if json.loads(line)["id"] in ids]
    (folder / "teacher.jsonl").write_text("\n".join(teacher) + "\n", encoding="utf-8")
    return folder


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three short training questions that the teacher solves in every strategy. They are the test set, too, so that it is
    known what a student says that has learned them by heart."""
    folder = cut_data(tmp_path_factory.mktemp("data") / "three", train=900, test=0, ood_longer=1)
    questions = {q["id"]: q for q in read_lines(folder / "train.jsonl")}
    solved = {(r["id"], r["strategy"]) for r in read_lines(folder / "teacher.jsonl") if same_number(
        numeric_answer(r["strategy"], r["text"]), parse_number(questions[r["id"]]["answer"]))}
    usable = [q for id, q in questions.items() if q["kind"] == "shop" and all((id, s) in solved for s in STRATEGIES)]
    chosen = sorted(usable, key=lambda q: len(q["question"]))[:3]
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(q) + "\n" for q in chosen))
    teacher = [r for r in read_lines(folder / "teacher.jsonl") if r["id"] in {q["id"] for q in chosen}]
    (folder / "teacher.jsonl").write_text("".join(json.dumps(r) + "\n" for r in teacher))
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory, data):
    """A tiny untrained decoder with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("student") / "tiny"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [q["question"] for q in read_lines(data / "train.jsonl")]
    texts += [r["text"] for r in read_lines(data / "teacher.jsonl")]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    torch.manual_seed(0)
    Decoder(Config("llama", vocab_size=tokenizer.get_vocab_size(), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                   num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.05,
                   extra={"eos_token_id": tokenizer.token_to_id("<end>")})).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def start(out, *flags, launcher=(sys.executable,), **how) -> subprocess.Popen:
    """The command, from another folder than the repository's, as a user may."""
    command = [*launcher, str(ROOT / "train.py"), "--out", str(out), *map(str, flags)]
    return subprocess.Popen(command, cwd=out.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


def finish(process) -> str:
    """What the command printed, if all went well."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err == ""
    return out


@pytest.fixture(scope="module")
def run(student, data, tmp_path_factory):
    """(run folder, what was printed) of an undisturbed run of the tiny student."""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, finish(start(out, "--model", student, "--data", data, *FLAGS))


def metrics_without_seconds(out) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in read_lines(out / "metrics.jsonl")]


def table_of(text) -> list[list[str]]:
    """The cells of the last Markdown table of a text, without the column of seconds, which differs from run to run."""
    table = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)[-1].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if set(line) - set("|-")]
    return [row[:rows[0].index("seconds")] for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# a run


def test_embedded_student_and_data(tmp_path):
    """What a newcomer runs, cut short: nothing but an exit code of 0, two models, and a table."""
    data, out = cut_data(tmp_path / "data", train=15, test=6, ood_longer=3, ood_wording=3), tmp_path / "out"
    printed = finish(start(out, "--data", data, "--iters", "1", "--epochs", "1", "--samples", "1", "--max-new-tokens", "40"))
    assert [path.name for path in sorted((out / "seed-0").iterdir())] == ["combined", "siked-adaptive-1"]
    header, *rows = table_of(printed)
    assert [row[0] for row in rows] == ["combined", "siked-adaptive 1"]
    assert header[1:5] == ["held-out", "test", "ood_longer", "ood_wording"]
    assert [line["total"] for line in read_lines(out / "metrics.jsonl")] == 2 * [2, 6, 3, 3]
    kinds = {line["set"]: line["kinds"].keys() for line in read_lines(out / "metrics.jsonl")}
    assert kinds["test"] == {"shop", "tally", "relations"}
    assert len(read_lines(out / "seed-0/siked-adaptive-1/self.jsonl")) == 13 * 3


def test_run_folder_holds_what_is_promised(run, student):
    """args.json, metrics.jsonl, report.md, and a folder per trained model, complete and in the student's format."""
    out, _ = run
    assert {path.name for path in out.iterdir()} - {"report.png"} == {"args.json", "metrics.jsonl", "report.md", "seed-0", "lock"}
    args = json.loads((out / "args.json").read_text())
    assert args["iters"] == 1 and args["lr"] == 1e-2 and args["mix"] == "all" and args["seed"] == 0
    folders = sorted((out / "seed-0").iterdir())
    assert [folder.name for folder in folders] == ["combined", "siked-all-1"]
    for folder in folders:
        files = {path.name for path in folder.iterdir()}
        assert {"model.safetensors", "config.json", "tokenizer.json", "self.jsonl", "mix.jsonl",
                "answers.jsonl"} <= files
        assert not [name for name in files if name.endswith((".part", ".tmp"))]
        assert load_file(folder / "model.safetensors").keys() == load_file(student / "model.safetensors").keys()
        assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 0


def test_metrics_have_the_named_fields(run):
    """One line per model and set, with every figure of the method; what belongs together agrees."""
    out, _ = run
    lines = read_lines(out / "metrics.jsonl")
    assert [(line["run"], line["iteration"], line["set"]) for line in lines] == [
        (name, number, asked) for name, number in [("combined", 0), ("siked-all", 1)] for asked in SETS]
    for line in lines:
        assert line["total"] == {"held-out": 1, "test": 3, "ood_longer": 1}[line["set"]]
        assert line["accuracy"] == line["correct"] / line["total"]
        assert line["share"].keys() == line["accuracy_within"].keys() == line["forced"].keys() == STRATEGIES
        assert 0 <= sum(line["share"].values()) <= 1 + 1e-9
        assert line["P_teacher"].keys() == STRATEGIES and sum(line["P_mix"].values()) == pytest.approx(1)
        assert line["seconds"] > 0 and line["seed"] == 0
    combined, siked = lines[0], lines[-1]
    assert combined["alpha"] == 1 and combined["KL"] is None and combined["P_student"] is None
    assert 0 < siked["alpha"] < 1 and siked["KL"] >= 0
    assert combined["steps"] == 60  # 6 texts, 60 epochs, batches of 6


def test_student_learns_by_heart(run):
    """The whole chain from teacher.jsonl to the answer: of the three test questions two were trained on, and both are
    answered right, free and with each strategy forced. A lost end token, a shifted loss or another prompt leaves 0."""
    out, _ = run
    for line in read_lines(out / "metrics.jsonl"):
        if line["set"] == "test":
            assert line["correct"] >= 2 and sum(line["share"].values()) == pytest.approx(1)
            assert all(accuracy > 0.6 for accuracy in line["forced"].values())


def test_texts_of_the_rounds_are_kept(run):
    """self.jsonl: all that the student wrote; mix.jsonl: what it was trained on, each text right and finished."""
    out, _ = run
    combined, siked = out / "seed-0/combined", out / "seed-0/siked-all-1"
    assert (combined / "self.jsonl").read_text() == ""
    taught = read_lines(combined / "mix.jsonl")
    assert {(r["id"], r["strategy"]) for r in taught} == {(id, s) for id in {r["id"] for r in taught} for s in STRATEGIES}
    assert len(taught) == 6 and {(r["source"], r["correct"]) for r in taught} == {("teacher", True)}
    generated, mixed = read_lines(siked / "self.jsonl"), read_lines(siked / "mix.jsonl")
    assert len(generated) == 2 * 3 * 2  # questions, strategies, samples
    own = [r for r in mixed if r["source"] == "student"]
    assert own and all(r in generated and r["correct"] and r["finished"] for r in own)
    assert [r for r in mixed if r["source"] == "teacher"] == taught
    line = read_lines(out / "metrics.jsonl")[-1]
    assert line["alpha"] == pytest.approx(6 / (6 + len(own)))
    assert line["steps"] == 60 + 60 * (6 + len(own)) / 6  # those of the model that it goes on from included


def test_fourth_strategy_is_one_name_in_one_place(student, data, tmp_path):
    """With "equation" among data/answers.py's STRATEGIES, and texts of it among the teacher's, the student is trained on it,
    generates in it and is measured in it."""
    shutil.copytree(data, tmp_path / "data")
    with (tmp_path / "data/teacher.jsonl").open("a") as file:
        for q in read_lines(data / "train.jsonl"):
            text = f"x = {q['answer']}. Final answer: {q['answer']}"
            file.write(json.dumps({"id": q["id"], "strategy": "equation", "text": text}) + "\n")
    code = f"""import runpy, sys; sys.argv.pop(0); sys.path.insert(0, {str(ROOT)!r}); import data.answers
data.answers.STRATEGIES += ("equation",); runpy.run_path(sys.argv[0], run_name="__main__")"""
    out, launcher = tmp_path / "out", (sys.executable, "-c", code)
    printed = finish(start(out, "--model", student, "--data", tmp_path / "data", *FLAGS, launcher=launcher))
    assert "equation share" in table_of(printed)[0] and "equation: right" in (out / "report.md").read_text()
    assert {"equation"} < {r["strategy"] for r in read_lines(out / "seed-0/siked-all-1/self.jsonl")}
    assert any(r["strategy"] == "equation" and r["source"] == "student" for r in read_lines(out / "seed-0/siked-all-1/mix.jsonl"))
    assert read_lines(out / "metrics.jsonl")[-2]["forced"]["equation"] > 0.6


def test_table_is_printed_and_reported(run):
    """A row per model with its accuracy on every set; report.md shows the same, and the command it comes from."""
    out, printed = run
    report = (out / "report.md").read_text()
    header, *rows = table_of(printed)
    first_table = re.search(r"(?:^\|.*\|\n)+", report, re.MULTILINE)[0]
    assert table_of(first_table) == [header, *rows] and "train.py" in report and "--epochs 60" in report
    assert {"alpha", "KL", "steps"} <= set(header)
    lines = read_lines(out / "metrics.jsonl")
    for row, (name, lines) in zip(rows, [("combined", lines[:3]), ("siked-all 1", lines[3:])], strict=True):
        cells = dict(zip(header, row))
        assert row[0] == name and {asked: cells[asked] for asked in SETS} == {
            line["set"]: f"{100 * line['accuracy']:.1f}" for line in lines}


def test_running_again_trains_nothing(run, student, data):
    """The same command finds its models finished: no file of theirs changes, the same table comes out."""
    out, printed = run
    before = {path: path.stat().st_mtime_ns for path in (out / "seed-0").rglob("*")}
    metrics = (out / "metrics.jsonl").read_bytes()
    again = finish(start(out, "--model", student, "--data", data, *FLAGS))
    assert {path: path.stat().st_mtime_ns for path in (out / "seed-0").rglob("*")} == before
    assert (out / "metrics.jsonl").read_bytes() == metrics
    assert "loss" not in again and table_of(again) == table_of(printed)


def same_result(out, other) -> bool:
    """The same weights, texts and metrics, the time aside; and nothing unfinished is left."""
    names = [{path.relative_to(folder) for path in (folder / "seed-0").rglob("*") if path.is_file()} for folder in (out, other)]
    return (names[0] == names[1] and metrics_without_seconds(out) == metrics_without_seconds(other)
            and all((out / name).read_bytes() == (other / name).read_bytes() for name in names[0]))


def test_killed_run_goes_on_to_the_same_result(run, student, data, tmp_path):
    """Pitfall 17: killed three times without warning, at any moment, and started again, the run ends as the undisturbed one
    did. Here it keeps a checkpoint after every step."""
    undisturbed, printed = run
    out, flags = tmp_path / "out", ["--model", student, "--data", data, *FLAGS, "--save-minutes", "0"]
    started = time.time()
    finish(start(tmp_path / "whole", *flags))
    seconds, rng, n_killed = time.time() - started, random.Random(), 0
    while n_killed < 3:
        process = start(out, *flags)
        time.sleep(rng.uniform(0.3, 0.9) * seconds)
        n_killed += process.poll() is None
        process.kill()
        process.communicate()
        if process.returncode == 0:  # it came to its end before
            shutil.rmtree(out)
    assert table_of(finish(start(out, *flags))) == table_of(printed)
    assert same_result(out, undisturbed)


@pytest.mark.parametrize("stage", ["train", "self-generate", "evaluate"])
def test_killed_in_every_stage(run, student, data, tmp_path, stage):
    """As above, at the moments that a random one may miss: just after each stage has been written down."""
    out, flags = tmp_path / "out", ["--model", student, "--data", data, *FLAGS, "--save-minutes", "0"]
    process = start(out, *flags)
    while not any(stage in path.read_text() for path in out.glob("seed-0/siked-all.stages.jsonl")):
        assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    resumed = finish(start(out, *flags))
    assert same_result(out, run[0])
    assert ("loss" not in resumed) == (stage != "self-generate"), "what is trained is not trained again"


def test_interrupted_run_says_how_to_go_on(student, data, tmp_path):
    """Ctrl-C: one line, and exit code 130, as shells have it."""
    out = tmp_path / "out"
    process = start(out, "--model", student, "--data", data, *FLAGS, "--save-minutes", "0")
    while not (out / "seed-0/combined.pt").exists():
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == "train.py: stopped; the same command goes on from here\n"


# ---------------------------------------------------------------------------------------------------------------------
# several processes

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SHARED = ["--batch-size", "3", "--accumulation", "2", "--samples", "3"]  # so that there is something to share


@pytest.fixture(scope="module")
def alone(student, data, tmp_path_factory):
    """The run folder of one process that does the work which is shared below."""
    out = tmp_path_factory.mktemp("alone") / "out"
    finish(start(out, "--model", student, "--data", data, *FLAGS, *SHARED))
    return out


def test_two_processes_do_the_work_of_one(alone, student, data, tmp_path):
    """The same texts token by token, and the same metrics, though gradients are summed in another order."""
    out = tmp_path / "out"
    process = start(out, "--model", student, "--data", data, *FLAGS, *SHARED, launcher=TORCHRUN)
    printed, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert printed.count("All models") == 1, "one of them speaks"
    assert "only so many train" not in printed
    assert (out / "seed-0/siked-all-1/self.jsonl").read_bytes() == (alone / "seed-0/siked-all-1/self.jsonl").read_bytes()
    assert metrics_without_seconds(out) == metrics_without_seconds(alone)


def test_losses_of_two_processes_are_those_of_one(student, data, tmp_path):
    """Each step's loss, within 1e-5; and the two processes keep the same weights to the bit."""
    script = tmp_path / "losses.py"
    script.write_text(f"""import sys, torch
sys.path.insert(0, {str(ROOT)!r})
import train
losses, add_gradients = [], train.add_gradients
train.add_gradients = lambda *args: losses.append(add_gradients(*args)) or losses[-1]
sys.argv += ["--out", "out-" + str(train.WORLD)]
train.main()
weights = torch.cat([p.flatten() for p in train.Decoder.from_pretrained(f"out-{{train.WORLD}}/seed-0/combined").parameters()])
torch.save(([float(loss) for loss in losses], weights), f"losses-{{train.WORLD}}-{{train.RANK}}.pt")
""")
    flags = ["--model", student, "--data", data, *FLAGS, *SHARED, "--iters", "0", "--lr", "1e-3"]
    for launcher in ((sys.executable,), TORCHRUN):
        subprocess.run([*launcher, str(script), *map(str, flags)], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    (one, _), (first, weights), (second, others) = (torch.load(tmp_path / f"losses-{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert len(one) == 60 and first == second and one[0] > 2 * one[-1]
    assert max(abs(a - b) for a, b in zip(one, first, strict=True)) < 1e-5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes in /proc")
def test_death_of_one_process_ends_the_other_and_the_run_resumes(alone, student, data, tmp_path):
    out, flags = tmp_path / "out", ["--model", student, "--data", data, *FLAGS, *SHARED, "--save-minutes", "0"]
    process = start(out, *flags, launcher=TORCHRUN, start_new_session=True)
    while not (out / "seed-0/combined.pt").exists():
        assert process.poll() is None, process.communicate()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in map(int, children) if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    process = start(out, *flags, launcher=TORCHRUN)
    printed, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert metrics_without_seconds(out) == metrics_without_seconds(alone)


def test_compare_runs_everything_that_siked_is_compared_with(run, student, data, tmp_path):
    """From the same student and data: three single strategies, Combined, Combined with as many steps as SIKeD took in all,
    self only, and both mixes of SIKeD. What a run without --compare has finished is not done again."""
    out = tmp_path / "out"
    shutil.copytree(run[0], out)
    printed = finish(start(out, "--model", student, "--data", data, *FLAGS, "--compare"))
    metrics = metrics_without_seconds(out)
    assert metrics[:2 * len(SETS)] == metrics_without_seconds(run[0])
    steps = {(line["run"], line["iteration"]): line["steps"] for line in metrics if line["set"] == "test"}
    assert steps.keys() == {("combined", 0), ("siked-all", 1), ("siked-adaptive", 1), ("self-only", 1),
                            ("combined-same-steps", 0), ("cot-only", 0), ("l2m-only", 0), ("pot-only", 0)}
    equal = {steps.pop((name, 0)) for name in ("combined-same-steps", "cot-only", "l2m-only", "pot-only")}
    assert equal == {steps["siked-all", 1]}  # FLAGS say --mix all

    def mix_of(model):
        return read_lines(out / "seed-0" / model / "mix.jsonl")

    for strategy in STRATEGIES:
        mixed = mix_of(f"{strategy}-only")
        assert {(r["strategy"], r["source"]) for r in mixed} == {(strategy, "teacher")} and len(mixed) == 2
    assert {r["source"] for r in mix_of("self-only-1")} == {"student"}
    solved = {r["id"] for r in mix_of("siked-adaptive-1") if r["source"] == "student"}
    assert solved.isdisjoint(r["id"] for r in mix_of("siked-adaptive-1") if r["source"] == "teacher")
    assert mix_of("combined-same-steps") == mix_of("combined")
    assert len(table_of(printed)) == 1 + 8


# ---------------------------------------------------------------------------------------------------------------------
# what is refused: exit code 2, one line that says what is wrong


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Runs train.py as `python train.py` does, expects it to stop with code 2 before it trains, and returns what it says."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        printed, said = capsys.readouterr()
        assert stopped.value.code == 2, said
        assert "loss" not in printed, "refused, but only after some training"
        lines = [line for line in said.splitlines() if not line.startswith("usage: ")]  # which argparse puts before
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
        path.write_text("\n".join(change(path.read_text(encoding="utf-8").splitlines())) + "\n", encoding="utf-8")
        return folder

    return copy


def test_refusal_of_the_real_command(data, tmp_path):
    """Once from outside, as the tests below are not: exit code, one line, no traceback."""
    process = start(tmp_path / "out", "--model", tmp_path / "absent", "--data", data, *FLAGS)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and len(err.splitlines()) == 1 and "Traceback" not in err
    assert str(tmp_path / "absent") in err


@pytest.mark.parametrize("flag, value", [
    ("--iters", "-1"), ("--iters", "two"), ("--seeds", "0"), ("--mix", "both"), ("--adaptive-per", "word"),
    ("--samples", "0"), ("--keep", "0"), ("--temperature", "-0.5"), ("--temperature", "inf"), ("--top-p", "0"),
    ("--top-p", "1.5"), ("--max-new-tokens", "0"), ("--held-out", "1.5"), ("--held-out", "-0.1"), ("--epochs", "0"),
    ("--epochs", "inf"), ("--batch-size", "0"), ("--accumulation", "0"), ("--lr", "-1"), ("--lr", "nan"), ("--warmup", "-1"), ("--weight-decay", "-1"),
    ("--max-length", "0"), ("--dtype", "float16"), ("--device", "abacus"), ("--rows", "0")])
def test_impossible_flags_are_refused_at_once(refused, student, data, tmp_path, flag, value):
    """By the flag's name, before anything is read or written: not after an hour of training."""
    assert flag in refused("--model", student, "--data", data, "--out", tmp_path / "out", *FLAGS, flag, value)
    assert not (tmp_path / "out").exists()


def test_device_that_is_not_there_is_refused(refused, student, data, tmp_path):
    """cuda on a machine without it."""
    if torch.cuda.is_available():
        pytest.skip("this machine has cuda")
    assert "--device" in refused("--model", student, "--data", data, "--out", tmp_path / "out", *FLAGS, "--device", "cuda")


def test_missing_data_is_named(refused, student, tmp_path):
    """A mistyped --data."""
    assert str(tmp_path / "absent") in refused("--model", student, "--data", tmp_path / "absent", *FLAGS)


@pytest.mark.parametrize("name", ["train", "teacher", "test"])
def test_missing_file_is_named(refused, student, data, tmp_path, name):
    """A data folder that lacks one of the three files that it must have."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    (folder / f"{name}.jsonl").unlink()
    assert f"{name}.jsonl" in refused("--model", student, "--data", folder, *FLAGS)


@pytest.mark.parametrize("name, line, named", [
    ("train", '{"id": "x", "question": "1 + 1?", "answer": "2"', "JSON"),
    ("train", '{"id": "x", "question": "1 + 1?", "answer": "many"}', "many"),
    ("test", '{"id": "x", "question": "1 + 1?"}', "answer"),
    ("ood_longer", '["x"]', "id"),
    ("teacher", '{"id": "x", "strategy": "guess", "text": "3"}', "guess"),
])
def test_bad_line_is_named(refused, student, copy_of, name, line, named):
    """Whatever the file: which file, which line, and what about it."""
    said = refused("--model", student, "--data", copy_of(name, lambda lines: [lines[0], line, *lines[1:]]), *FLAGS)
    assert f"{name}.jsonl" in said and re.search(r"line 2\b", said) and named in said


def test_teacher_of_other_questions_is_named(refused, student, copy_of):
    """The most likely mix-up of files: rationales of one data set beside the questions of another."""
    folder = copy_of("teacher", lambda lines: [lines[0].replace("train-", "gsm-"), *lines[1:]])
    said = refused("--model", student, "--data", folder, *FLAGS)
    assert "teacher.jsonl" in said and re.search(r"line 1\b", said) and "gsm-" in said


def change_config(folder, **changed):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def drop_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items() if name != "model.norm.weight"}
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("break_it, named", [
    (lambda folder: change_config(folder, model_type="bert"), "bert"),
    (lambda folder: change_config(folder, eos_token_id=None), "eos_token_id"),
    (drop_a_tensor, "model.norm.weight"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"cut off"), "model.safetensors"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    (shutil.rmtree, "student"),
], ids=["family", "end token", "tensor", "weights", "config", "tokenizer", "no tokenizer", "no folder"])
def test_unusable_student_is_named(refused, student, data, tmp_path, break_it, named):
    """What is wrong with a checkpoint, by file, field or tensor."""
    folder = tmp_path / "student"
    shutil.copytree(student, folder)
    break_it(folder)
    said = refused("--model", folder, "--data", data, *FLAGS)
    assert named in said and str(folder) in said


def test_nan_in_a_checkpoint_is_named(refused, student, data, tmp_path):
    """One number is enough to spoil every text."""
    folder = tmp_path / "student"
    shutil.copytree(student, folder)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    for value in (torch.nan, torch.inf):
        tensors["model.norm.weight"][3] = value
        save_file(tensors, folder / "model.safetensors")
        said = refused("--model", folder, "--data", data, *FLAGS)
        assert "model.norm.weight" in said and str(folder) in said


def test_questions_longer_than_the_context_are_refused_at_once(refused, student, copy_of):
    line = json.dumps({"id": "x", "question": "long " * 1000, "answer": "2"})
    said = refused("--model", student, "--data", copy_of("train", lambda lines: [*lines, line]), *FLAGS)
    assert "longest question" in said and "512 positions" in said


def test_endless_line_is_named(refused, student, data, tmp_path):
    """A file without line breaks, 200 MB of it: refused without being read whole."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    with (folder / "train.jsonl").open("r+b") as file:
        file.seek(0, 2)
        file.write(b'{"id": "x", "question": "')
        file.seek(200_000_000, 1)  # a hole, which reads as NUL bytes
        file.write(b'", "answer": "2"}\n')
    said = refused("--model", student, "--data", folder, *FLAGS)
    assert "train.jsonl" in said and re.search(r"line 4\b", said) and "longer than" in said


def test_half_of_a_character_is_named(refused, student, copy_of):
    """A surrogate without the other can neither be tokenized nor written."""
    line = r'{"id": "x", "question": "1 + 1\ud83d?", "answer": "2"}'
    said = refused("--model", student, "--data", copy_of("train", lambda lines: [lines[0], line, *lines[1:]]), *FLAGS)
    assert "train.jsonl" in said and re.search(r"line 2\b", said) and "surrogate" in said


def test_nul_in_a_text_is_a_character_like_others(student, copy_of, tmp_path):
    """And so is one of four bytes."""
    folder = copy_of("train", lambda lines: [lines[0].replace('"question": "', r'"question": "\u0000\ud83d\ude00 '), *lines[1:]])
    out = tmp_path / "out"
    finish(start(out, "--model", student, "--data", folder, *FLAGS, "--epochs", "1"))
    assert len(read_lines(out / "seed-0/siked-all-1/self.jsonl")) == 2 * 3 * 2


def test_read_only_folder_is_named(refused, student, data):
    """/sys takes no folders, not even of the administrator."""
    if not Path("/sys").is_dir():
        pytest.skip("needs /sys")
    assert "/sys/siked-out" in refused("--model", student, "--data", data, "--out", "/sys/siked-out", *FLAGS)


@pytest.mark.parametrize("name, kilobytes, more", [
    ("siked-all.pt", 500, ["--save-minutes", "0"]), ("siked-all-1/model.safetensors", 100, []), ("args.json", 0, [])])
def test_full_disk(run, student, data, tmp_path, name, kilobytes, more):
    """Stood for by a limit on the size of files: one line names the file that could not be written, what was there before
    stays as it was, and with room again the run goes on."""
    resource = pytest.importorskip("resource")
    out, flags = tmp_path / "out", ["--model", student, "--data", data, *FLAGS, *more]
    finish(start(out, *flags, "--iters", "0"))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    process = start(out, *flags, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kilobytes, -1)))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and len(said.splitlines()) == 1
    assert f"{name} cannot be written" in said
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed <= {"args.json"} and not list(out.rglob("*.part"))  # its --iters was raised
    finish(start(out, *flags))
    assert same_result(out, run[0])


def test_out_that_is_a_file_is_named(refused, student, data, tmp_path):
    """A run folder cannot be made where a file stands."""
    (tmp_path / "out").write_text("a file")
    assert str(tmp_path / "out") in refused("--model", student, "--data", data, "--out", tmp_path / "out", *FLAGS)


def test_run_folder_of_other_settings_is_named(refused, run, student, data):
    """A second run with another learning rate must not be mixed into the first."""
    before = (run[0] / "metrics.jsonl").read_bytes()
    said = refused("--model", student, "--data", data, "--out", run[0], *FLAGS, "--lr", "0.5")
    assert "--lr" in said and "0.01" in said and "0.5" in said
    assert (run[0] / "metrics.jsonl").read_bytes() == before


def test_texts_that_do_not_fit_the_student_are_refused_at_once(refused, student, data, tmp_path):
    """More new tokens than the student has positions: said before the first training, not in the evaluation after it."""
    said = refused("--model", student, "--data", data, "--out", tmp_path / "out", *FLAGS, "--max-new-tokens", "100000")
    assert "max-new-tokens" in said or "max_new_tokens" in said
