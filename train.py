"""Trains a student by SIKeD: the command, and the supervised fine-tuning (SFT) that it calls.

    python train.py --iters 3                       # embedded student and data: some minutes
    python train.py --iters 3 --compare --seeds 3   # other mixes and the controls, too
    python train.py --preset paper --model FOLDER --data FOLDER --out FOLDER    # a real student
    torchrun --nproc-per-node 4 train.py ...        # the same by several processes or GPUs

--data holds train.jsonl, teacher.jsonl and test.jsonl; any further *.jsonl is evaluated, too.
--out gets args.json, metrics.jsonl, report.md, and a folder for each trained model.
Stopped or killed? Type the same command again: it goes on where it was, to the same result (on a
CPU to the same bits).

Read siked.py before: it calls `train`. Sampling is in sampler.py.
"""
import argparse
import ctypes
import math
import os
import random
import sys
import time
from datetime import timedelta
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data.answers import STRATEGIES
from data.files import (load_training, open_run_folder, read_data, run_command, saved, write_lines,
                        write_text, write_whole)
from data.hub import find_model
from data.report import count_programs, print_round, update_metrics, write_report
from model import Decoder
from sampler import Student, use_device
from siked import MIXES, measure, siked

HERE = Path(__file__).resolve().parent
RANK = int(os.environ.get("RANK", 0))         # under torchrun: the number of this process
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # the number of processes
IGNORE = -100             # the target where there is nothing to learn: questions and padding
LOGITS_AT_ONCE = 2 ** 25  # float32 numbers, 128 MiB

FLAGS = (  # name, default, least value, meaning
    ("--model", HERE / "data/student", None, "the student: a Hugging Face folder or owner/name"),
    ("--data", HERE / "data/toy", None, "folder with the data"),
    ("--out", Path("out"), None, "run folder"),
    ("--iters", 3, 0, "SIKeD rounds after the distillation"),
    ("--seed", 0, 0, "of everything random"),
    ("--seeds", 1, 1, "repeat the run with so many seeds, from --seed on"),
    ("--samples", 1, 1, "step 3: own texts per question and strategy, K"),
    ("--max-new-tokens", 200, 1, "of a text, the end token included"),
    ("--epochs", 2.0, 1e-6, "passes over the mix per round"),
    ("--batch-size", 4, 1, "examples in one forward pass"),
    ("--accumulation", 4, 1, "forward passes per optimizer step"),
    ("--lr", 2e-3, 0, "learning rate; give 2e-4 or so with LoRA, 1e-5 for all weights of billions"),
    ("--lora", 0, 0, "rank of LoRA adapters; 0: train all weights"),
    ("--prompt", r"{question}\n", None, r"what the student reads; \n is a line break"),
    ("--rows", 256, 1, "texts written at once; fewer need less memory"),
)
# What is seldom changed has no flag. A preset sets it, or you here.
SETTINGS = {
    "warmup": 20,          # optimizer steps
    "weight_decay": 0.01,
    "lora_alpha": 32,      # the adapters' output is multiplied by lora_alpha / rank
    "max_length": 512,     # tokens, with the question; longer texts of the teacher are left out
    "keep": 1,             # own texts per question and strategy in a mix
    "held_out": 0.1,       # share of the training questions, to choose settings on
    "save_minutes": 10,    # between two checkpoints of a training
    "checkpointing": False,  # True: training takes less memory and more time
}
PRESETS = {
    "paper": {"samples": 10, "max_new_tokens": 512, "epochs": 3, "batch_size": 2, "lr": 2e-4,
              "lora": 16, "seed": 42, "warmup": 5, "max_length": 1024},
    "svamp": {"samples": 4, "max_new_tokens": 256, "batch_size": 8, "accumulation": 2, "lr": 3e-4,
              "dtype": "bfloat16", "rows": 192},
}
COMPARED = ("adaptive", "all", "self", "teacher", *STRATEGIES)  # see list_runs


def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter  # shows the docstring as it is
    parser = argparse.ArgumentParser(usage="python train.py [flags]", description=__doc__,
                                     formatter_class=raw)
    add = parser.add_argument
    for name, default, _, meaning in FLAGS:
        add(name, type=type(default), default=default, help=f"{meaning} [%(default)s]")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help=f"cpu or cuda [{device}]")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="computes in [float32]")
    add("--mix", choices=MIXES, default="adaptive", help="step 4: what is trained on [adaptive]")
    add("--compare", nargs="*", choices=COMPARED, metavar="RUN",
        help=f"also run these other mixes and controls; without names all: {', '.join(COMPARED)}")
    add("--preset", choices=PRESETS, help=f"other defaults: {PRESETS}")
    preset = parser.parse_known_args(argv)[0].preset  # read first: it changes the defaults
    parser.set_defaults(**(SETTINGS | PRESETS.get(preset, {})))
    args = parser.parse_args(argv)
    for name, _, least, _ in FLAGS:
        value = getattr(args, name[2:].replace("-", "_"))
        if least is not None and not least <= value < math.inf:
            parser.error(f"{name} {value}: must be at least {least}, and finite")
    args.prompt = args.prompt.replace(r"\n", "\n")
    if "{question}" not in args.prompt:
        parser.error(f"--prompt {args.prompt!r}: there must be {{question}} in it")
    if WORLD > 1 and args.device.startswith("cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"  # of torchrun: a GPU for each process
    return args


# --------------------------------------------------------------------------------------------------
# the SFT loop


def make_batches(examples, batch_size: int, seed: int):
    """Endless epochs of batches of examples. Their order depends on the seed alone.

    An epoch is shuffled and cut into stretches of 64 batches. Each stretch is sorted by length, so
    that a batch holds little padding. Then the batches are shuffled.
    """
    rng = random.Random(seed)
    size = 64 * batch_size
    while True:
        order = rng.sample(examples, len(examples))
        batches = []
        for start in range(0, len(order), size):
            stretch = order[start:start + size]
            stretch.sort(key=lambda example: len(example[0]) + len(example[1]))
            batches += [stretch[i:i + batch_size] for i in range(0, len(stretch), batch_size)]
        rng.shuffle(batches)
        yield from batches


def collate(batch):
    """[(prompt ids, target ids)] -> tokens (B, T) and targets (B, T), padded on the right.

    targets[b, t] is the id that should follow tokens[b, t], or IGNORE:

        prompt p q, target x y z    tokens   p q x y
                                    targets  - x y z

    Padding is recognised by its place, never by its id: an end token may have the same id, and must
    be learned.
    """
    tokens = []
    targets = []
    for prompt, target in batch:
        ids = prompt + target
        tokens.append(torch.tensor(ids[:-1]))
        targets.append(torch.tensor([IGNORE] * (len(prompt) - 1) + target))
    tokens = pad_sequence(tokens, batch_first=True)
    targets = pad_sequence(targets, batch_first=True, padding_value=IGNORE)
    return tokens, targets


def add_gradients(model, tokens, targets, scale: float, dtype):
    """Adds the gradient of scale * (sum of -log p(target)) to the parameters' .grad, which must
    exist. Returns that loss. N: trained positions; C: width of the hidden states.

    The logits of a large vocabulary V would need more memory than all the rest. So the output layer
    sees the trained positions only, a piece of them at a time, and its backward pass is written
    out: the derivative of -log p(target) by the logit of token v is p(v), less 1 if v is the
    target. Then autograd goes back through the layers, once.
    """
    trained = targets != IGNORE                                             # (B, T)
    wanted = targets[trained]                                               # (N,)
    with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
        states = model.hidden(tokens)[trained]                              # (N, C)
    loss = 0
    state_slopes = []  # d loss / d states, a tensor for each piece
    with torch.no_grad():
        parameter = model.output_weight()                                   # (V, C)
        weight = parameter.to(states.dtype)
        size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
        for piece, ids in zip(states.split(size), wanted.split(size)):
            target = ids[:, None]
            log_p = (piece @ weight.T).float().log_softmax(dim=-1)          # (size or less, V)
            loss -= scale * log_p.gather(1, target).sum()
            slope = log_p.exp_().mul_(scale)                                # d loss / d logits
            slope.scatter_(1, target, -scale, reduce="add")
            slope = slope.to(piece.dtype)
            state_slopes.append(slope @ weight)
            if parameter.requires_grad:  # some rows at a time: no second gradient of (V, C)
                for rows, part in zip(parameter.grad.split(8192), slope.T.split(8192)):
                    rows += part @ piece  # in place: they are a view of .grad
    states.backward(torch.cat(state_slopes))
    return loss


def fine_tune(student, examples, steps, args, seed, name, checkpoint=None, weights_folder=None):
    """Trains the student's model in place on examples [(prompt ids, target ids)].

    A step takes several batches; its loss is the mean over all their trained tokens. Why several?
    Texts of a batch have similar lengths. In a step of short ones alone their tags would weigh
    more: a student would learn to choose short texts. ValueError if the loss is not finite.
    checkpoint: a file from which a killed training goes on, to the same weights.
    weights_folder: holds the student's weights as they are now. With it LoRA in bfloat16 keeps the
    frozen ones in bfloat16 alone, to save memory, and reads them in float32 at the end.
    """
    model = student.model
    dtype = getattr(torch, args.dtype)
    model.checkpointing = args.checkpointing
    if dtype == torch.float32:
        weights_folder = None  # the frozen weights stay float32: there is nothing to read again
    if args.lora:
        model.add_lora(args.lora, args.lora_alpha, seed, dtype if weights_folder else None)
    # The gradient of the lookup holds the batch's tokens alone, not a second (V, C) beside .grad.
    model.model.embed_tokens.sparse = True
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)  # each batch adds to it
    optimizer = torch.optim.AdamW(parameters.values(), betas=(0.9, 0.95), fused=True,
                                  weight_decay=args.weight_decay)
    done = 0
    if checkpoint and checkpoint.exists():
        done = load_training(checkpoint, parameters, optimizer)
    batches = islice(make_batches(examples, args.batch_size, seed), done * args.accumulation, None)
    saved_at = time.time()
    disable = None if RANK == 0 else True  # None: no bar where there is no terminal
    for step in tqdm(range(done + 1, steps + 1), name, leave=False, unit="step", disable=disable):
        warmup = min(1, step / max(1, args.warmup))
        rate = args.lr * warmup * (1 - (step - 1) / steps)  # the decay is linear, too
        optimizer.param_groups[0]["lr"] = rate
        parts = list(islice(batches, args.accumulation))
        n_trained = sum(len(target) for _, target in chain(*parts))
        loss = torch.zeros((), device=args.device)
        for batch in parts[RANK::WORLD]:
            tokens, targets = collate(batch)
            loss += add_gradients(model, tokens.to(args.device), targets.to(args.device),
                                  1 / n_trained, dtype)
        if WORLD > 1:
            for tensor in [loss] + [parameter.grad for parameter in parameters.values()]:
                dist.all_reduce(tensor)
        if not loss.isfinite():
            raise ValueError(f"{name}: the loss of step {step} of {steps} is {loss.item()}, "
                             f"at a learning rate of {rate:.1e}")
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if step % max(1, steps // 4) == 0:
            tqdm.write(f"{name}: step {step}/{steps}, loss {loss.item():.3f}")
        if checkpoint and RANK == 0 and time.time() - saved_at >= 60 * args.save_minutes:
            state = {"parameters": parameters, "optimizer": optimizer.state_dict(), "step": step}
            write_whole(checkpoint, partial(torch.save, state))
            saved_at = time.time()
    if args.lora:
        model.merge_lora(weights_folder)
    model.model.embed_tokens.sparse = False
    model.zero_grad()


def train(student, rationales, folder, seed, questions, args, control_steps):
    """Trains the student on rationales and saves it in the folder, unless it is there already.

    control_steps: folder -> optimizer steps, for a control. Others take as many as --epochs needs.
    """
    if not (folder / "model.safetensors").exists():
        examples = list(make_examples(student, questions, rationales))
        if not examples and folder.name == "combined":  # later mixes and controls may be empty
            raise ValueError("teacher.jsonl: no rationale is right, finished and short enough")
        write_lines(folder / "mix.jsonl", rationales)
        steps = math.ceil(len(examples) * args.epochs / (args.batch_size * args.accumulation))
        if examples:
            steps = control_steps.get(folder, steps)
            fine_tune(student, examples, steps, args, seed, folder.name,
                      checkpoint=folder / "training.pt", weights_folder=student.folder)
        print(f"{folder.name}: trained for {steps} steps on {len(examples)} rationales")
        if RANK == 0:
            write_text(folder / "steps.json", str(steps))
            student.save(folder)
    if WORLD > 1:
        dist.barrier()
    if RANK == 0:
        for path in folder.glob("training.pt*"):  # also a part that a kill has left
            path.unlink()
    # Read back also if it was just trained: a run without a stop does the same as a resumed one.
    student.model = None  # before the other is read: two may be more than the memory holds
    student.model = Decoder.from_pretrained(folder, device=args.device)
    student.folder = folder
    return_freed_memory()


def make_examples(student, questions, rationales):
    """Yields (prompt ids, target ids) of each rationale."""
    by_id = {question.id: question for question in questions}
    for rationale in rationales:
        stem, tail = student.prompt(by_id[rationale.id])  # two parts of a prompt, see sampler.py
        yield stem + tail, student.target(rationale)


def return_freed_memory():
    """To the system: glibc keeps what a training has freed, 2.5 GB for a model of 135M weights."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # other C libraries have none
            libc.malloc_trim(0)


# --------------------------------------------------------------------------------------------------
# torchrun: each process writes a share of the texts and computes a share of a step's batches


class SharingStudent(Student):
    def answer(self, asked, **settings):
        """Each process writes a stretch of the texts. No text depends on the others, so all are as
        a single process writes them, but for rounding."""
        if RANK > 0:
            settings["progress"] = None
        stretch = slice(len(asked) * RANK // WORLD, len(asked) * (RANK + 1) // WORLD)
        answers = super().answer(asked[stretch], **settings)
        if WORLD == 1:
            return answers
        stretches = [None] * WORLD
        dist.all_gather_object(stretches, answers)
        return list(chain(*stretches))


def join_processes(args):
    backend = "gloo"
    if args.device.startswith("cuda"):
        backend = "cpu:gloo,cuda:nccl"
    # A long wait is no fault: one process may write longer texts than another.
    dist.init_process_group(backend, timeout=timedelta(days=1))
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")


# --------------------------------------------------------------------------------------------------
# the command


def list_runs(args):
    """The names of this command's runs. A run is named after its mix, or after its only strategy.

    --compare adds other mixes and the controls: "teacher", and one for each strategy. A control
    sees the teacher's rationales alone, in the same rounds with as many optimizer steps as the run
    of --mix: only the data differs. That run comes first, so its steps are known.
    """
    names = [args.mix]
    if args.compare is not None:
        names += args.compare or COMPARED
    return list(dict.fromkeys(names))  # each once


def list_folders(name, args, seed):
    """The folders of a run, one for each round. Runs that begin alike share round 0."""
    first = name if name in STRATEGIES else "combined"
    names = [first] + [f"{name}-{number}" for number in range(1, args.iters + 1)]
    return [args.out / f"seed-{seed}" / name for name in names]


def train_run(name, data, args, seed):
    """Trains the models of a run, and adds their lines to metrics.jsonl."""
    mode = name
    if name in STRATEGIES:  # a control on the teacher's texts in this strategy alone
        mode = "teacher"
        teacher = [rationale for rationale in data.teacher if rationale.strategy == name]
        data = data._replace(teacher=teacher)
    dtype = getattr(torch, args.dtype)
    student = SharingStudent(find_model(args.model), args.max_new_tokens, args.rows, dtype,
                             args.device, template=args.prompt)
    check_lengths(student, data)
    data = leave_out_long(student, data, args.max_length)
    folders = list_folders(name, args, seed)
    control_steps = {}
    if mode == "teacher" and name != args.mix:  # a control takes the steps of --mix's rounds
        for folder, followed in zip(folders, list_folders(args.mix, args, seed)):
            control_steps[folder] = read_steps(followed)
    train_round = partial(train, questions=data.questions, args=args, control_steps=control_steps)
    samples = 0 if mode == "teacher" else args.samples
    started = time.time()
    for result in siked(student, data, train_round, folders, mode, samples, args.keep, seed):
        folder = folders[result.number]
        labels = {
            "seed": seed,
            "run": name if result.number else folder.name,
            "iteration": result.number,
            "steps": sum(map(read_steps, folders[:result.number + 1])),
            "seconds": round(time.time() - started, 1),
        }
        if RANK == 0:
            path = folder / "metrics.json"
            is_new = not path.exists()
            lines = saved(path, measure, result, data.questions, labels)
            update_metrics(args.out / "metrics.jsonl", lines)
            if is_new:
                print_round(lines, result, data.questions)
        started = time.time()


def read_steps(folder):
    return int((folder / "steps.json").read_text())


def check_lengths(student, data):
    """Before hours of training: does an answer to the longest question fit?"""
    longest = 0
    for question in chain(data.questions, *data.sets.values()):
        for strategy in STRATEGIES:
            stem, tail = student.prompt(question, strategy)
            longest = max(longest, len(stem + tail))
    positions = student.model.config.max_position_embeddings
    if longest + student.max_new_tokens > positions:
        raise ValueError(f"--max-new-tokens {student.max_new_tokens} and the {longest} tokens of "
                         f"the longest question are more than the student's {positions} positions")


def leave_out_long(student, data, max_length):
    """The data without the teacher's texts that are too long to train on. They go before the
    filter, which may find a shorter one. Own texts all stay: check_lengths has made sure that the
    student has positions enough for them."""
    max_length = min(max_length, student.model.config.max_position_embeddings)
    examples = make_examples(student, data.questions, data.teacher)
    kept = []
    for rationale, (prompt, target) in zip(data.teacher, examples):
        if len(prompt + target) <= max_length:
            kept.append(rationale)
    if len(kept) < len(data.teacher):
        print(f"{len(data.teacher) - len(kept)} of the teacher's texts are left out: with their "
              f"questions they are longer than {max_length} tokens")
    return data._replace(teacher=kept)


def main():
    args = parse_args()
    use_device(args.device)
    if WORLD > 1:
        join_processes(args)
    if RANK == 0:
        locked = open_run_folder(args)  # the folder is locked while this file object lives
    if WORLD > 1:
        dist.barrier()  # no process writes before that one has checked the folder
    for seed in range(args.seed, args.seed + args.seeds):
        data = read_data(args.data, args.held_out, seed)
        sizes = ", ".join(f"{name} {len(questions)}" for name, questions in data.sets.items())
        print(f"seed {seed}: {len(data.questions)} training questions, {len(data.teacher)} teacher "
              f"rationales ({count_programs(data.teacher)}); to evaluate on: {sizes}")
        for name in list_runs(args):
            train_run(name, data, args, seed)
    if RANK == 0:
        print(f"\nAll models: accuracy and share of answers in %\n{write_report(args.out)}")
        print(f"More is in {args.out / 'report.md'}, all measures in {args.out / 'metrics.jsonl'}.")


if __name__ == "__main__":
    run_command(main)
