"""Tests of data/hub.py:  python -m pytest tests/test_hub.py

The hub is a small server of our own, which has one model: the embedded student. The commands run in
processes of their own, since huggingface_hub reads its environment once, at its import.
"""
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data.files import write_lines  # noqa: E402
from data.hub import find_model  # noqa: E402

STUDENT = ROOT / "data/student"
TOY = ROOT / "data/toy"
NAME = "siked/toy-student"
SHA = "0123456789" * 4
WANTED = ["config.json", "model.safetensors", "tokenizer.json"]
FLAGS = ["--iters", "0", "--epochs", "1", "--max-new-tokens", "20", "--device", "cpu"]


class Hub(ThreadingHTTPServer):
    """What the hub says to the requests for the list of a model's files and for a file.

    files: name -> content. refusals: the beginning of a path -> (status, the hub's error code).
    """
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, files, refusals=(), delay=0.0):
        self.files = files
        self.refusals = dict(refusals)
        self.delay = delay       # seconds before the content of a file
        self.fetched = Counter()
        self.tokens = []         # of the requests for the model
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, content=b"", **headers):
        self.send_response(status)
        headers["Content-Length"] = str(len(content))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self):
        hub = self.server
        path = self.path.partition("?")[0]
        if NAME in path:
            hub.tokens.append(self.headers["Authorization"])
        for start, (status, code) in hub.refusals.items():
            if path.startswith(start):
                return self.reply(status, b"", X_Error_Code=code, X_Error_Message="so says the hub")
        sizes = {name: len(content) for name, content in hub.files.items()}
        name = path.removeprefix(f"/{NAME}/resolve/{SHA}/")
        if path in (f"/api/models/{NAME}", f"/api/models/{NAME}/revision/main"):
            siblings = [{"rfilename": name} for name in sizes]
            value = {"id": NAME, "modelId": NAME, "sha": SHA, "siblings": siblings}
        elif path == f"/api/models/{NAME}/tree/{SHA}":
            value = [{"type": "file", "path": name, "size": size, "oid": f"oid-{name}"}
                     for name, size in sizes.items()]
        elif name in hub.files:
            if self.command == "GET":
                hub.fetched[name] += 1
                time.sleep(hub.delay)
            etag = '"' + name.replace("/", "-") + '"'
            return self.reply(200, hub.files[name], ETag=etag, X_Repo_Commit=SHA)
        else:
            return self.reply(404, b"", X_Error_Code="RepoNotFound")
        return self.reply(200, json.dumps(value).encode(), Content_Type="application/json")

    do_HEAD = do_GET


def student_files() -> dict:
    return {name: (STUDENT / name).read_bytes() for name in WANTED}


@pytest.fixture
def start_hub():
    """Starts hubs, which end with the test."""
    hubs = []

    def start(*arguments, **how):
        hubs.append(Hub(*arguments, **how))
        return hubs[-1]

    yield start
    for hub in hubs:
        hub.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small part of the toy."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in {"train": 11, "test": 2}.items():
        lines = (TOY / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        write_lines(folder / f"{name}.jsonl", map(json.loads, lines))
    ids = {json.loads(line)["id"] for line in (folder / "train.jsonl").open(encoding="utf-8")}
    teacher = map(json.loads, (TOY / "teacher.jsonl").open(encoding="utf-8"))
    write_lines(folder / "teacher.jsonl", [line for line in teacher if line["id"] in ids])
    return folder


def start(cache, hub, *command, **environment) -> subprocess.Popen:
    """A command with this cache and hub, and none of the user's settings."""
    mine = {name: value for name, value in os.environ.items()
            if not name.startswith("HF_") and not name.lower().endswith("_proxy")}
    address = hub if isinstance(hub, str) else f"http://127.0.0.1:{hub.server_port}"
    mine |= {"HF_HOME": str(cache), "HF_ENDPOINT": address, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=cache.parent, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=mine | environment)


def finish(process):
    """(exit code, what it printed, what it said on stderr)"""
    printed, said = process.communicate(timeout=200)
    return process.returncode, printed, said


def train(tmp_path, hub, data, *flags, **environment):
    command = [ROOT / "train.py", "--data", data, *FLAGS, *flags]
    return finish(start(tmp_path / "cache", hub, *command, **environment))


def test_student_of_the_hub(start_hub, data, tmp_path):
    """It is fetched by its name, by the user's token, and trained as the same student in a folder
    is. Only what is read is fetched. Without the hub the same command goes on from the cache."""
    others = ["README.md", "pytorch_model.bin", "consolidated.safetensors", "vocab.json",
              "other/model.safetensors", "model/model.safetensors", "other/config.json"]
    hub = start_hub(student_files() | {name: b"not wanted" for name in others})
    out = tmp_path / "out"
    flags = ["--model", NAME, "--out", out]
    code, printed, said = train(tmp_path, hub, data, *flags, HF_TOKEN="hf_secret")
    assert (code, said) == (0, "")
    assert hub.fetched == Counter(WANTED)
    assert set(hub.tokens) == {"Bearer hf_secret"}
    assert json.loads((out / "args.json").read_text())["model"] == NAME
    hub.close()

    code, _, said = train(tmp_path, hub, data, *flags, "--iters", "1")
    assert (code, said) == (0, "")
    assert (out / "seed-0/adaptive-1/model.safetensors").exists()
    code, _, said = train(tmp_path, hub, data, *flags, "--iters", "1", HF_HUB_OFFLINE="1")
    assert (code, said) == (0, "")

    code, _, said = train(tmp_path, hub, data, "--model", STUDENT, "--out", tmp_path / "local")
    assert (code, said) == (0, "")
    weights = "seed-0/combined/model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "local" / weights).read_bytes()


API = f"/api/models/{NAME}"
RESOLVE = f"/{NAME}/resolve"
NO_WEIGHTS = {name: b"{}" for name in ("config.json", "tokenizer.json")}


@pytest.mark.parametrize("files, refusals, environment, named", [
    ({}, {API: (404, "RepoNotFound")}, {}, "RepositoryNotFoundError: 404"),
    (student_files(), {API: (401, "RepoNotFound")}, {}, "RepositoryNotFoundError: 401"),
    (student_files(), {RESOLVE: (401, "GatedRepo")}, {}, "GatedRepoError: 401"),
    (student_files(), {RESOLVE: (403, "GatedRepo")}, {"HF_TOKEN": "hf_x"}, "GatedRepoError: 403"),
    (student_files(), {API: (500, "")}, {}, "LocalEntryNotFoundError"),
    (student_files(), {}, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
    (student_files(), {}, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "LocalEntry"),
    (student_files(), {}, {"HF_HOME": "/dev/null"}, "/dev/null"),
    (NO_WEIGHTS, {}, {}, "no model*.safetensors"),
    ({"pytorch_model.bin": b""}, {}, {}, "no model*.safetensors"),
], ids=["not found", "private", "gated", "gated to this token", "broken", "offline", "no network",
        "no cache", "no weights", "only others"])
def test_refusal_names_model_and_reason(start_hub, data, tmp_path, files, refusals, environment,
                                        named):
    """One line and exit code 2, whatever the hub says."""
    hub = start_hub(files, refusals)
    flags = ["--model", NAME, "--out", tmp_path / "out"]
    code, _, said = train(tmp_path, hub, data, *flags, **environment)
    assert code == 2 and len(said.splitlines()) == 1, said
    assert said.startswith(f"train.py: --model {NAME}: ") and named in said


def test_teacher_of_the_hub(start_hub, tmp_path):
    """The same for data/teacher.py without --url. With it, the name is the server's."""
    questions = tmp_path / "train.jsonl"
    write_lines(questions, [{"id": "1", "question": "What is 1 + 1?", "answer": "2"}])
    hub = start_hub(student_files())
    command = [ROOT / "data/teacher.py", "--questions", questions, "--model", NAME, "--device",
               "cpu", "--samples", "1", "--max-new-tokens", "10"]
    url = ["--url", "http://127.0.0.1:9", "--attempts", "1"]
    code, _, said = finish(start(tmp_path / "cache", hub, *command, *url))
    assert code == 2 and "hub" not in said and not hub.tokens
    # The worked examples are longer than this student's context, which is only known once it has
    # been read.
    code, printed, said = finish(start(tmp_path / "cache", hub, *command))
    assert code == 2 and "1 [cot]: its prompt has" in printed + said
    assert hub.fetched == Counter(WANTED)
    command = [*command, "--model", "siked/absent"]
    code, _, said = finish(start(tmp_path / "cache", hub, *command))
    assert code == 2 and len(said.splitlines()) == 1
    assert said.startswith("teacher.py: --model siked/absent: ")


def test_processes_fetch_at_once(start_hub, tmp_path):
    """As torchrun's do. Each gets all files, of which none is fetched twice."""
    hub = start_hub(student_files(), delay=0.5)
    code = f"from data.hub import find_model; print(find_model({NAME!r}), end='')"
    processes = []
    for rank in range(4):
        processes.append(start(tmp_path / "cache", hub, "-c", code, RANK=str(rank)))
    results = [finish(process) for process in processes]
    assert len(set(results)) == 1 and results[0][::2] == (0, ""), results
    folder = Path(results[0][1])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == student_files()
    assert hub.fetched == Counter(WANTED)


@pytest.mark.parametrize("name", [
    "folder", "owner/folder", "owner/file", "absent", "../absent", ".absent/name", "owner/name/x",
    "/absent/name", "owner/with space"])
def test_folders_are_no_names(monkeypatch, tmp_path, name):
    """What exists here wins over the hub; what cannot be a name is not asked for."""
    def refuse(*arguments, **how):
        raise AssertionError("the hub is asked")

    (tmp_path / "folder").mkdir()
    (tmp_path / "owner/folder").mkdir(parents=True)
    (tmp_path / "owner/file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert find_model(Path(name)) == find_model(name) == Path(name)
    with pytest.raises(OSError, match="the hub is asked"):
        find_model("owner/absent")
