"""Trains a student by SIKeD: the command line, the SFT loop and the run folder. The method itself is in siked.py, which is
to be read before; here begin with `fine_tune` and the two functions above it. How a student writes is in sampler.py.

    python train.py --iters 3                               # the embedded student and word problems, minutes on a laptop
    python train.py --iters 3 --compare --seeds 3           # and everything that SIKeD is compared with, three times
    python train.py --preset paper --model FOLDER --data FOLDER --out FOLDER --iters 3      # real checkpoint, real data
    torchrun --nproc-per-node 4 train.py ...                # the same by four processes, one per GPU or CPU share

--data holds train.jsonl, teacher.jsonl, test.jsonl; every further *.jsonl file is an out-of-distribution set.
The run folder (--out) gets args.json, metrics.jsonl (one line per model and set), report.md, and a folder per model.
The same command goes on where it was stopped, in the middle of a model too, and ends with the same numbers. On several
machines (torchrun --nnodes ...) all have to see the run folder.
"""
import argparse
import ctypes
import hashlib
import json
import math
import os
import random
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import siked
from data.program import evaluate_program
from data.report import format_table, write_report
from model import Decoder, project, write_beside
from siked import MODES, STRATEGIES, Student

HERE = Path(__file__).resolve().parent
RANK, WORLD = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))  # of torchrun
IGNORE = -100  # the target at positions that the loss leaves out
LOGITS_AT_ONCE = 2 ** 26  # numbers: 256 MiB in float32
PAPER = {"samples": 10, "max_new_tokens": 512, "epochs": 3, "batch_size": 2, "accumulation": 4, "lr": 2e-4, "warmup": 5,
         "weight_decay": 0.01, "lora": 16, "lora_alpha": 32, "max_length": 1024, "seed": 42}  # Qwen2: 3e-4 and a cosine


def number(kind, low, high=math.inf):
    """An argparse type: an int or float in a range; the error names the flag, the value and the range."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value" by it
    return parse


def device(text):
    """An argparse type: a device that this machine has."""
    try:
        return str(torch.zeros(1, device=text).device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {str(error).splitlines()[0]}") from None


def parse_args(argv=None) -> argparse.Namespace:
    class Help(argparse.RawDescriptionHelpFormatter):
        """The docstring as it stands, and each flag with the type of its value and its [default]."""
        def _get_default_metavar_for_optional(self, action):
            return getattr(action.type, "__name__", "")

        def _get_help_string(self, action):
            return action.help + ("" if action.default in (None, argparse.SUPPRESS) or action.nargs == 0 else " [%(default)s]")

    parser = argparse.ArgumentParser(usage="python train.py [flags]", description=__doc__,
                                     formatter_class=lambda prog: Help(prog, max_help_position=27, width=120))
    group = parser.add_argument_group("what to run").add_argument
    group("--model", type=Path, default=HERE / "data/student", help="student: a Hugging Face folder (the embedded one)")
    group("--data", type=Path, default=HERE / "data/toy", help="folder with {train,teacher,test}.jsonl (the embedded one)")
    group("--out", type=Path, default=Path("out"), help="run folder")
    group("--preset", choices=("paper",), help="defaults as in the paper: " + ", ".join(
        f"--{name.replace('_', '-')} {value}" for name, value in PAPER.items()))
    group("--iters", type=number(int, 0), default=3, help="SIKeD iterations after the first distillation")
    group("--seed", type=number(int, 0), default=0, help="seed of everything random")
    group("--seeds", type=number(int, 1), default=1, help="repeat the run with so many seeds, from --seed on")
    group("--compare", action="store_true",
          help="also run the other mixes and, for as many steps as --mix takes in all, Combined and the single strategies")
    group = parser.add_argument_group("the method").add_argument
    group("--mix", choices=MODES, default="adaptive", help="step 4: which rationales are trained on")
    group("--adaptive-per", choices=("question", "strategy"), default="question",
          help="step 4, adaptive: teacher data where the student failed in a whole question, or in a strategy of it")
    group("--samples", type=number(int, 1), default=1,
          help="step 3: self-generated texts per question and strategy, K (paper 10)")
    group("--keep", type=number(int, 1), default=1, help="step 3: correct distinct texts kept per question and strategy")
    group("--temperature", type=number(float, 0), default=0.7, help="of self-generation")
    group("--top-p", type=number(float, 1e-6, 1), default=0.95, help="of self-generation")
    group("--max-new-tokens", type=number(int, 1), default=200,
          help="of a generated text, the end token included (paper 512)")
    group("--held-out", type=number(float, 0, 0.9), default=0.1, help="share of training questions kept to choose settings on")
    group = parser.add_argument_group("training").add_argument
    group("--epochs", type=number(float, 1e-6), default=2, help="passes over the mix per iteration")
    group("--batch-size", type=number(int, 1), default=4, help="examples in one forward pass (paper 2)")
    group("--accumulation", type=number(int, 1), default=4, help="forward passes per optimizer step (paper 4)")
    group("--lr", type=number(float, 0), default=2e-3,
          help="peak learning rate, after a linear warm-up; this suits the embedded student, real ones need 1e-5 or so")
    group("--warmup", type=number(int, 1), default=20, help="optimizer steps")
    group("--weight-decay", type=number(float, 0), default=0.01, help="of AdamW")
    group("--lora", type=number(int, 0), default=0,
          help="rank of LoRA adapters, which are merged into the weights after each iteration (paper 16); 0: train all weights")
    group("--lora-alpha", type=number(float, 0), default=32, help="LoRA: the adapters count alpha / rank times")
    group("--cosine", action="store_true", help="let the learning rate decay by a cosine instead of a line")
    group("--checkpointing", action="store_true", help="less memory: compute activations twice instead of keeping them")
    group("--max-length", type=number(int, 2), default=512, help="longer examples are left out and counted (paper 1024)")
    group("--dtype", choices=("float32", "bfloat16"), default="float32",
          help="of the arithmetic; weights stay float32")
    group("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group("--rows", type=number(int, 1), default=256, help="texts generated at once; fewer need less memory")
    group("--save-minutes", type=number(float, 0), default=10,
          help="between two checkpoints of a model in training, from which a stopped run goes on")
    if parser.parse_known_args(argv)[0].preset:
        parser.set_defaults(**PAPER)
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# several processes: each does the whole run, but writes a share of the texts and computes a share of each step's batches


def agree(value):
    """Process 0's value, in all processes."""
    box = [value]
    if WORLD > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


class SharingStudent(Student):
    """A Student whose texts are written by all processes, a stretch of the prompts each. A text does not depend on the
    others (see sampler.generate), so it is the one that a single process writes."""

    def answer(self, prompts, n=1, **kwargs):
        mine = super().answer(prompts[len(prompts) * RANK // WORLD:len(prompts) * (RANK + 1) // WORLD], n, **kwargs)
        stretches = [mine]
        if WORLD > 1:
            stretches = [None] * WORLD
            dist.all_gather_object(stretches, mine)
        return [texts for stretch in stretches for texts in stretch]


# ---------------------------------------------------------------------------------------------------------------------
# the SFT loop


def make_batches(examples, batch_size: int, seed: int):
    """Endless epochs of batches; the order depends on the seed alone.

    An epoch is shuffled, cut into stretches of 64 batches, and each stretch sorted by length, so that a batch holds
    examples of alike length and little padding; then the batches are shuffled.
    """
    rng = random.Random(seed)
    while True:
        order = rng.sample(examples, len(examples))
        batches = []
        for start in range(0, len(order), 64 * batch_size):
            stretch = sorted(order[start:start + 64 * batch_size], key=lambda e: len(e[0]) + len(e[1]))
            batches += [stretch[i:i + batch_size] for i in range(0, len(stretch), batch_size)]
        rng.shuffle(batches)
        yield from batches


def collate(batch):
    """[(prompt ids, target ids)] -> tokens (B, T) and targets (B, T), padded on the right.

    targets[b, t] is the id that should follow tokens[b, t]: the target's ids and its end token, IGNORE elsewhere. Padding
    is told by position, never by id, so that an end token that is also the padding id is trained all the same.
    """
    length = max(len(prompt) + len(target) for prompt, target in batch) - 1
    tokens = torch.zeros(len(batch), length, dtype=torch.int64)
    targets = torch.full((len(batch), length), IGNORE)
    for row, (prompt, target) in enumerate(batch):
        ids = torch.tensor(prompt + target)
        tokens[row, :len(ids) - 1] = ids[:-1]
        targets[row, len(prompt) - 1:len(ids) - 1] = ids[len(prompt):]
    return tokens, targets


@torch.no_grad()
def output_loss(states, targets, weight, weight_grad, room, scale: float):
    """scale * the sum of -log p(target), over states (N, C) and targets (N,); and its gradient, (N, C), by the states.

    weight (V, C): the output layer's; the gradient by it is added to weight_grad, unless that is None. With a large
    vocabulary the logits (N, V) would take more memory than all else. So they exist for n positions at a time, in `room`
    (n, V) float32, and the gradient is computed along with them: probabilities, less 1 at the target.
    """
    loss, grads = torch.zeros((), device=states.device), torch.empty_like(states)
    for state, target, grad in zip(*(whole.split(len(room)) for whole in (states.to(weight.dtype), targets, grads))):
        # state (n, C), target (n,), grad (n, C), the last a view: what is copied to it is in grads
        logits, each = room[:len(state)], torch.arange(len(state), device=state.device)  # (n, V) float32, and (n,)
        project(state, weight, logits)
        wanted, highest = logits[each, target], logits.amax(-1)    # (n,)
        # In place, the logits become exponentials, then probabilities times scale, then the gradient by the logits.
        total = logits.sub_(highest[:, None]).exp_().sum(-1)       # (n,)
        loss += (total.log() + highest - wanted).sum()
        logits *= scale / total[:, None]
        logits[each, target] -= scale
        slopes = logits.to(weight.dtype)                           # (n, V)
        grad.copy_(slopes @ weight)                                # (n, C)
        if weight_grad is not None:
            for part, slope in zip(weight_grad.split(8192), slopes.T.split(8192)):  # in parts: no second matrix as large
                part += slope @ state                              # (8192, C)
    return scale * loss, grads


def add_gradients(model, parts, dtype, device, room):
    """Adds the gradients of a step's batches [(tokens, targets)] to the .grad of the parameters; returns its loss: the
    mean over all of its trained tokens, so that each counts alike. Only trained positions go through the output layer."""
    n_trained, total = sum((targets != IGNORE).sum().item() for _, targets in parts), torch.zeros((), device=device)
    weight = model.output_weight()
    cast_weight = weight.detach().to(dtype)  # (V, C), once for all batches
    for tokens, targets in parts[RANK::WORLD]:
        tokens, targets = tokens.to(device), targets.to(device)  # (B, T)
        counted = targets != IGNORE                              # (B, T)
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            states = model.hidden(tokens)[counted]               # (trained tokens, C)
        loss, grads = output_loss(states.detach(), targets[counted], cast_weight, weight.grad, room, 1 / n_trained)
        states.backward(grads)
        total += loss
    if WORLD > 1:
        for tensor in (total, *(p.grad for p in model.parameters() if p.grad is not None)):
            dist.all_reduce(tensor)
    return total


def fine_tune(student: Student, examples, steps: int, args, seed: int, name: str, checkpoint: Path | None = None) -> None:
    """Trains the student's model in place for `steps` optimizer updates on examples [(prompt ids, target ids)].

    checkpoint: a file that gets what a stopped training needs to go on, every --save-minutes. If it is there and is of a
    training with the same name, seed, steps and examples, this one goes on from it: the result is the same to the bit.
    ValueError if the loss is not finite.

    A step takes several batches, each of texts of alike length, because of what one alone would do: see number 3 of "What we
    found on the way" in the README.
    """
    model, dtype = student.model.train(), getattr(torch, args.dtype)
    model.checkpointing = args.checkpointing
    if args.lora:
        model.add_lora(args.lora, args.lora_alpha, seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = {parameter: parameter.data for parameter in model.parameters() if not parameter.requires_grad}
    for parameter in frozen:  # cast for the passes; the float32 originals come back at the end, to merge the adapters into
        parameter.data = parameter.data.to(dtype)
    # The gradients exist from the start: output_loss adds the output layer's in place, and the embedding's, which is sparse,
    # is added to the same matrix where the two are tied. So there is never a second one of that size.
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    model.model.embed_tokens.sparse = not args.lora
    V = model.config.vocab_size
    room = torch.empty(max(1, LOGITS_AT_ONCE // V), V, device=args.device)
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)

    def share_of_peak(step):
        decay = (1 + math.cos(math.pi * step / steps)) / 2 if args.cosine else 1 - step / steps
        return min(1, (step + 1) / args.warmup) * decay

    training = hashlib.sha256(repr((name, seed, steps, examples)).encode()).hexdigest()
    done = load_checkpoint(checkpoint, training, trained, optimizer) if agree(checkpoint and checkpoint.is_file()) else 0
    batches = islice(make_batches(examples, args.batch_size, seed), done * args.accumulation, None)
    started, saved, n_tokens = time.time(), time.time(), 0
    try:
        with tqdm(total=steps, initial=done, desc=name, unit="step", disable=True if RANK else None, leave=False) as bar:
            for step in range(done + 1, steps + 1):
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * share_of_peak(step - 1)
                chosen = list(islice(batches, args.accumulation))
                parts = [collate(batch) for batch in chosen]
                loss = add_gradients(model, parts, dtype, args.device, room)
                if not loss.isfinite():
                    raise ValueError(f"{name}: the loss of step {step} of {steps} is {loss.item()}, at a learning rate of "
                                     f"{group['lr']:.1e}; its batches begin with "
                                     + ", ".join(repr(student.tokenizer.decode(batch[0][0])[:50]) for batch in chosen))
                n_tokens += sum(tokens.numel() for tokens, _ in parts)
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
                bar.update()
                if checkpoint and RANK == 0 and step < steps and time.time() - saved >= 60 * args.save_minutes:
                    state = {"training": training, "step": step, "weights": trained, "optimizer": optimizer.state_dict()}
                    write_beside(checkpoint, lambda path: torch.save(state, path))
                    saved = time.time()
                if step % max(1, steps // 4) == 0:
                    seconds = time.time() - started
                    tqdm.write(f"{name}: step {step}/{steps}, loss {loss.item():.3f}, "
                               f"{n_tokens / seconds:,.0f} tokens/s, {seconds:.0f} s")
    finally:  # also after Ctrl-C: a notebook goes on with this model
        model.checkpointing = model.model.embed_tokens.sparse = False
        for parameter, data in frozen.items():
            parameter.data = data
        model.merge_lora()
        model.zero_grad()


def load_checkpoint(path: Path, training: str, trained, optimizer) -> int:
    """Puts the state of a stopped training in place; returns the steps it has done, 0 if it was another training."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["training"] != training:
        return 0
    with torch.no_grad():
        for parameter, weight in zip(trained, state["weights"], strict=True):
            parameter.copy_(weight)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# ---------------------------------------------------------------------------------------------------------------------
# the run folder


@contextmanager
def progress(total: int, name: str):
    """A bar on a terminal, one plain line elsewhere; yields the function that moves it."""
    started = time.time()
    with tqdm(total=total, desc=name, unit="text", disable=True if RANK else None, leave=False) as bar:
        yield lambda count: bar.update(count * WORLD)  # the others are about as far
    tqdm.write(f"{name}: {total:,} texts, {time.time() - started:.0f} s")


def write_file(path: Path, text: str) -> None:
    if RANK == 0:
        write_beside(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_lines(path: Path, records) -> None:
    write_file(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


class RunFolder:
    """args.json, metrics.jsonl, and a folder per trained model. Opening the folder of an earlier run goes on with it.

    While a model is made, two more files hold what is finished of it, seed-S/RUN.stages.jsonl and seed-S/RUN.pt.
    """

    def __init__(self, args):
        self.path = args.out
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.path / "lock") if RANK == 0 else None
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        for path in sorted(args.data.glob("*.jsonl")):  # data that changed gives other numbers, as a changed flag does
            settings[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        file = self.path / "args.json"
        self.metrics = []
        if (self.path / "metrics.jsonl").is_file():
            self.metrics = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        if self.metrics or any(file for kind in ("pt", "stages.jsonl") for file in self.path.glob(f"seed-*/*.{kind}")):
            # These may change from one start to the next:
            free = ("iters", "seeds", "compare", "out", "device", "rows", "save_minutes", "command")
            before = json.loads(file.read_text())
            changed = [name for name in before | settings if name not in free and settings.get(name) != before.get(name)]
            if changed:
                raise ValueError(f"{self.path} holds a run of other settings: " + ", ".join(
                    f"{args.data / name} was another file" if name.endswith(".jsonl") else
                    f"--{name.replace('_', '-')} was {before.get(name)}, is {settings.get(name)}" for name in changed)
                    + ". Choose another --out, or delete the folder.")
        write_file(file, json.dumps(settings | {"command": " ".join(sys.argv)}, indent=1) + "\n")

    def model_folder(self, seed: int, run: str, iteration: int) -> Path:
        return self.path / f"seed-{seed}" / (f"{run}-{iteration}" if iteration else run)

    def find(self, **wanted) -> list[dict]:
        return [line for line in self.metrics if all(line[name] == value for name, value in wanted.items())]

    def unfinished(self, seed: int, run: str, kind: str) -> Path:
        """The file with what is finished of the model that is being made: kind "stages.jsonl" or "pt"."""
        return self.path / f"seed-{seed}" / f"{run}.{kind}"

    def stages(self, seed: int, run: str):
        """The `stage` of siked.siked: keeps what each stage of the work gave, as a line of JSON, until the model is done."""
        path, kept = self.unfinished(seed, run, "stages.jsonl"), {}
        path.parent.mkdir(exist_ok=True)
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                kept |= json.loads(line)
            except ValueError:  # a kill left half of it
                pass

        def stage(name, compute):
            value = agree(kept.get(name))
            if value is None:
                value = compute()
                if RANK == 0:
                    with path.open("a", encoding="utf-8") as file:
                        file.write("\n" + json.dumps({name: value}))  # not behind half a line
            return value

        return stage

    def add(self, seed: int, run: str, result: siked.Iteration, steps: int, seconds: float):
        """Writes a trained model's texts, then its metrics: a model whose metrics are there is complete.

        steps: optimizer updates since --model, those of the models that this one comes from included.
        """
        folder, answers = self.model_folder(seed, run, result.number), []
        for name, measures in result.measures.items():
            answers += [{"set": name, **answer} for answer in measures.pop("answers")]
        write_lines(folder / "answers.jsonl", answers)
        write_lines(folder / "self.jsonl", map(asdict, result.generated))
        write_lines(folder / "mix.jsonl", map(asdict, result.training_mix))
        replaced = self.find(seed=seed, run=run, iteration=result.number)
        self.metrics = [line for line in self.metrics if line not in replaced]
        self.metrics += [{"seed": seed, "run": run, "iteration": result.number, "set": name, **measures, **result.figure_2,
                          "steps": steps, "seconds": round(seconds, 1)} for name, measures in result.measures.items()]
        write_lines(self.path / "metrics.jsonl", self.metrics)
        if RANK == 0:
            for kind in ("stages.jsonl", "pt"):
                self.unfinished(seed, run, kind).unlink(missing_ok=True)


def lock(path: Path):
    """Opens and locks a file, until this process ends. ValueError if another process has it."""
    file = path.open("w")
    try:
        import fcntl  # not on Windows, where nothing is locked
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError as error:
        raise ValueError(f"--out {path.parent}: another train.py is at work there ({error.strerror})") from None
    return file


# ---------------------------------------------------------------------------------------------------------------------
# runs


def read_data(folder: Path, share_held_out: float, seed: int):
    """(training questions, teacher rationales of these, dict of evaluation sets) from a data folder."""
    questions = siked.read_questions(folder / "train.jsonl")
    teacher = siked.read_rationales(folder / "teacher.jsonl", questions)
    if not teacher:
        raise ValueError(f"{folder / 'teacher.jsonl'}: no rationales in it")
    n_held_out = round(share_held_out * len(questions))
    held_out = random.Random(seed).sample(questions, n_held_out)
    out = {question.id for question in held_out}
    others = sorted(set(folder.glob("*.jsonl")) - {folder / f"{name}.jsonl" for name in ("train", "teacher", "test")})
    sets = {"held-out": held_out} if held_out else {}
    sets |= {path.stem: siked.read_questions(path) for path in (folder / "test.jsonl", *others)}
    return [q for q in questions if q.id not in out], [r for r in teacher if r.id not in out], sets


def check_lengths(student: Student, questions) -> None:
    """Before hours of training: does an answer to the longest question fit?"""
    longest = max(len(student.prompt(question, strategy)) for question in questions for strategy in STRATEGIES)
    positions = student.model.config.max_position_embeddings
    if longest + student.max_new_tokens > positions:
        raise ValueError(f"--max-new-tokens {student.max_new_tokens} and the {longest} tokens of the longest question are "
                         f"more than the student's {positions} positions")


def train_run(run: str, args, data, folder: RunFolder, seed: int, *, mode: str, iterations: int, start: str = "",
           strategy: str = "", total_steps: int = 0) -> int:
    """Trains the models of one run, without those that an earlier call has finished.

    Returns the optimizer steps that led to the last of them, counted from --model.

    start           the run whose model this one goes on from, as its iteration 0; otherwise it begins with --model
    strategy        only the teacher rationales of this strategy
    total_steps     optimizer steps, instead of --epochs
    """
    questions, teacher, sets = data
    teacher = [r for r in teacher if strategy in ("", r.strategy)]
    by_id = {question.id: question for question in questions}
    # A control that should take another number of steps is another model, and is made anew. Otherwise this run goes on after
    # the last of its models, or after `start`'s.
    done = folder.find(seed=seed, run=run, **({"steps": total_steps} if total_steps else {}))
    done = done or folder.find(seed=seed, run=start)
    first, steps, previous = 0, 0, args.model
    if done:
        first, steps = done[-1]["iteration"] + 1, done[-1]["steps"]
        previous = folder.model_folder(seed, done[-1]["run"], done[-1]["iteration"])

    stage = folder.stages(seed, run)

    def train_on(student, rationales, iteration, size):
        """Trains the student and saves it, unless that was done before the run was stopped; in any case reads it back, so
        that all processes, and a run that goes on, have the same bits."""
        path = folder.model_folder(seed, run, iteration)
        steps = stage(f"{iteration}: train", lambda: train_and_save(student, rationales, iteration, size, path))
        student.model = Decoder.from_pretrained(path, device=args.device)
        return steps

    def train_and_save(student, rationales, iteration, size, path):
        examples = [(student.prompt(by_id[r.id]), student.target(r)) for r in rationales]
        fitting = [e for e in examples if len(e[0]) + len(e[1]) <= args.max_length]
        if len(fitting) < len(examples):
            print(f"{run} {iteration}: {len(examples) - len(fitting)} of {len(examples)} examples are longer than "
                  f"--max-length {args.max_length} and left out")
        count = 0
        if fitting:
            size *= len(fitting) / len(examples)
            count = total_steps or math.ceil(size * args.epochs / (args.batch_size * args.accumulation))
            fine_tune(student, fitting, count, args, seed + iteration, f"{run} {iteration}",
                      folder.unfinished(seed, run, "pt"))
        elif run == "combined":
            raise ValueError(f"{args.data / 'teacher.jsonl'}: of {len(teacher)} rationales none is right, finished "
                             f"and within --max-length {args.max_length}: there is nothing to train on")
        else:
            print(f"{run} {iteration}: nothing to train on, the weights stay as they are")
        if RANK == 0:
            student.save(path)
        agree(None)  # the others wait until it is there
        return count

    if first <= iterations:
        student = SharingStudent.load(previous, args.max_new_tokens, args.rows, getattr(torch, args.dtype), args.device)
        check_lengths(student, [question for asked in (questions, *sets.values()) for question in asked])
        started = time.time()
        # 1000: siked adds the round to its seed, and no two seeds should draw the same samples.
        for result in siked.siked(student, questions, teacher, train_on, sets, mode=mode, adaptive_per=args.adaptive_per,
                                  iterations=iterations, samples=args.samples, keep=args.keep, first=first, seed=1000 * seed,
                                  temperature=args.temperature, top_p=args.top_p, progress=progress, stage=stage):
            steps += result.steps
            folder.add(seed, run, result, steps, time.time() - started)
            print_iteration(run, result, questions)
            started = time.time()
    return steps


# ---------------------------------------------------------------------------------------------------------------------
# what is printed


def count_reasons(rationales) -> str:
    """How the programs among these ended, in evaluate_program's words; "ok": with a number, right or wrong."""
    reasons = Counter(evaluate_program(r.text)[1] for r in rationales if r.strategy == "pot")
    return "programs: " + ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())


def print_iteration(run: str, result: siked.Iteration, questions) -> None:
    """The table row per strategy, and one question that the student solved in one strategy and not in another."""
    test, mixed = result.measures["test"], siked.count_strategies(result.training_mix)
    generated, own = siked.count_strategies(result.generated), siked.count_strategies(result.own)
    correct = siked.count_strategies(r for r in result.generated if r.correct)
    from_teacher = siked.count_strategies(r for r in result.training_mix if r.source == "teacher")
    cut_off = siked.count_strategies(r for r in result.generated if not r.finished)
    print(f"\n{run}, iteration {result.number}: the mix, and the student on the test set (%)")
    print(format_table([{
        "strategy": s, "generated": generated[s], "cut off": cut_off[s], "correct": correct[s], "kept": own[s],
        "from teacher": from_teacher[s], "share of mix": mixed[s] / max(len(result.training_mix), 1),
        "share of answers": test["share"][s], "accuracy of these": test["accuracy_within"][s],
        "accuracy if forced": test["forced"][s]} for s in STRATEGIES]))
    if result.generated:
        print(f"generated {count_reasons(result.generated)}")
    for kind, measures in test["kinds"].items():
        print(f"{kind}: {100 * measures['accuracy']:.1f}, forced " + ", ".join(
            f"{s} {100 * accuracy:.1f}" for s, accuracy in measures["forced"].items()))
    print("accuracy: " + ", ".join(f"{name} {100 * m['accuracy']:.1f}" for name, m in result.measures.items()))
    if result.number == 0:
        return print(flush=True)
    print(f"alpha {result.figure_2['alpha']:.3f}, KL(mix || student) "
          + (f"{result.figure_2['KL']:.1e}" if result.own else "-: no correct text of the student's own"))
    first = {}
    for r in result.generated:
        first.setdefault(r.id, {}).setdefault(r.strategy, r)
    for question in questions:
        texts = first[question.id].values()
        if len({r.correct for r in texts}) == 2:
            print(f"{question.text} ({question.answer})")
            for r in texts:
                print(f"  {'right' if r.correct else 'wrong'} [{r.strategy}]: " + r.text.replace("\n", "\n" + " " * 15))
            break
    print(flush=True)


def keep_freed_memory() -> None:
    """Makes glibc's malloc keep what is freed. Otherwise it returns large tensors to the system, and the next one of the same
    size begins with pages that the system fills with zeros one by one: up to a fifth of a step's time on a CPU. The price
    is memory that lies in pieces: the peak is up to four tenths higher."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):  # musl has none
        mallopt(-4, 0)   # M_MMAP_MAX: no tensor gets a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is never cut


def main() -> None:
    args = parse_args()
    keep_freed_memory()
    if WORLD > 1:
        if args.device.startswith("cuda"):
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        # A long wait is no fault: one process may write longer texts than another. A dead one ends the others at once.
        dist.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in args.device else "gloo", timeout=timedelta(days=1))
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
        if WORLD > args.accumulation:
            print(f"--accumulation {args.accumulation}: all {WORLD} processes generate, but only so many train")
    folder = RunFolder(args)
    if args.preset:
        print(f"--preset {args.preset}: " + ", ".join(f"{name} {getattr(args, name)}" for name in PAPER))
    for seed in range(args.seed, args.seed + args.seeds):
        data = read_data(args.data, args.held_out, seed)
        questions, teacher, sets = data
        print(f"seed {seed}: {len(questions)} training questions, {len(teacher)} teacher rationales ({count_reasons(teacher)}); "
              "to evaluate on: " + ", ".join(f"{name} {len(asked)}" for name, asked in sets.items()))
        train_run("combined", args, data, folder, seed, mode="all", iterations=0)
        modes = dict.fromkeys(("all", "adaptive", "self", args.mix) if args.compare else (args.mix,))
        steps = {mode: train_run(f"siked-{mode}" if mode in ("all", "adaptive") else f"{mode}-only", args, data, folder, seed,
                              mode=mode, iterations=args.iters, start="combined") for mode in modes}[args.mix]
        if args.compare:  # the controls train for as many steps as the run of --mix did in all
            train_run("combined-same-steps", args, data, folder, seed, mode="all", iterations=0, total_steps=steps)
            for strategy in STRATEGIES:
                train_run(f"{strategy}-only", args, data, folder, seed, mode="all", iterations=0, strategy=strategy,
                       total_steps=steps)
    if RANK == 0:
        print(f"\nAll models: accuracy and share of answers in %\n{write_report(args.out)}")
        print(f"More is in {args.out / 'report.md'}, everything measured in {args.out / 'metrics.jsonl'}.")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("train.py: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
