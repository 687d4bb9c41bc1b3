"""Tests of train.py:  python -m pytest tests/test_train.py

The training loop, the flags, and which runs a command makes. The student is the tiny one of
conftest.py, so that all takes seconds. What the command does as a whole is in test_main.py.
"""
import copy
import dataclasses
import math
import random
import re
from argparse import Namespace
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train
from data.answers import STRATEGIES
from data.files import Data, Question, Rationale, read_rationales
from model import Decoder
from sampler import Student
from train import (FLAGS, IGNORE, PRESETS, SETTINGS, add_gradients, collate, fine_tune,
                   leave_out_long, list_folders, list_runs, make_batches, parse_args)

QUESTIONS = []
TEACHER = []
for i in range(12):
    text = f"What is {i} + {2 * i}?" + " Tell me." * (i % 4)
    QUESTIONS.append(Question(f"q{i}", text, Fraction(3 * i)))
    TEACHER += [
        Rationale(f"q{i}", "cot", f"{i} + {2 * i} = {3 * i}. Final answer: {3 * i}"),
        Rationale(f"q{i}", "l2m", f"What is added? {2 * i}. Final answer: {3 * i}"),
        Rationale(f"q{i}", "pot", f"answer = {i} + {2 * i}"),
    ]
BY_ID = {question.id: question for question in QUESTIONS}


@pytest.fixture
def load(tiny_student):
    """A function that loads the student anew and makes its weights `scale` times as large: by the
    usual scale its gradients need no clipping."""
    def load(max_new_tokens=12, scale=0.5):
        student = Student(tiny_student, max_new_tokens)
        with torch.no_grad():
            for parameter in student.model.parameters():
                parameter *= scale
        return student

    return load


def settings(**changed) -> Namespace:
    """What fine_tune and train read of the flags and the SETTINGS. A checkpoint at every step."""
    usual = {"lr": 1e-2, "warmup": 1, "weight_decay": 0.01, "batch_size": 4, "accumulation": 1,
             "device": "cpu", "dtype": "float32", "lora": 0, "lora_alpha": 32,
             "checkpointing": False, "save_minutes": 0, "epochs": 1}
    return Namespace(**usual | changed)


def example_of(student, rationale):
    """What train makes of a rationale: (prompt ids, target ids)."""
    stem, tail = student.prompt(BY_ID[rationale.id])
    return stem + tail, student.target(rationale)


def ragged_examples(count):
    """[(prompt ids, target ids)] of lengths from 2 + 2 to 60 + 120, all different."""
    rng = random.Random(0)

    def draw(shortest, longest):
        return [rng.randrange(1, 200) for _ in range(rng.randint(shortest, longest))]

    return [(draw(2, 60), draw(1, 119) + [0]) for _ in range(count)]


def test_example(load):
    """What it is for: a student learns to answer a question with a given text."""
    student = load(max_new_tokens=60)
    question, rationale = QUESTIONS[3], TEACHER[9]
    stem, tail = student.prompt(question)
    examples = [(stem + tail, student.target(rationale))]
    fine_tune(student, examples, steps=100, args=settings(), seed=0, name="example")
    [[(free, finished)], [(forced, _)]] = student.answer([(question, None), (question, "cot")])
    assert free == "[cot]: 3 + 6 = 9. Final answer: 9" and finished
    assert forced == "3 + 6 = 9. Final answer: 9"


# --------------------------------------------------------------------------------------------------
# batches


def test_every_row_trains_on_its_target_and_nothing_else(load):
    """The trained ids of a row are the answer and one end token, each at the place whose next token
    it is. The end token has id 0, as padding has: told apart by id, it would be lost."""
    student = load()
    examples = [example_of(student, rationale) for rationale in TEACHER]
    tokens, targets = collate(examples)
    assert tokens.shape == targets.shape and len(tokens) == len(TEACHER)
    for row, (prompt, target) in enumerate(examples):
        trained = targets[row][targets[row] != IGNORE].tolist()
        text = student.tokenizer.decode(trained, skip_special_tokens=False)
        assert text == f"[{TEACHER[row].strategy}]: {TEACHER[row].text}<end>"
        places = (targets[row] != IGNORE).nonzero()[:, 0].tolist()
        read = tokens[row, :places[-1] + 1].tolist()  # before it learns to stop
        assert read + trained[-1:] == prompt + target
        assert places == list(range(len(prompt) - 1, len(read)))


def test_longest_row_has_no_padding():
    """A batch is one place narrower than its longest example: the last id is only a target."""
    tokens, targets = collate([([5, 6, 7], [8, 9, 0]), ([5], [9, 0])])
    _ = IGNORE
    assert tokens.tolist()[0] == [5, 6, 7, 8, 9]
    assert tokens.tolist()[1][:2] == [5, 9]
    assert targets.tolist() == [[_, _, 8, 9, 0], [9, 0, _, _, _]]


def epoch_of(examples, batch_size, seed, epoch=0):
    count = math.ceil(len(examples) / batch_size)
    return list(islice(make_batches(examples, batch_size, seed), epoch * count,
                       (epoch + 1) * count))


@pytest.mark.parametrize("count, batch_size", [(1, 4), (7, 4), (64, 4), (600, 4), (100, 32)])
def test_every_example_comes_once_an_epoch(count, batch_size):
    """Also if the last batch is smaller than the others; in the second epoch as in the first."""
    examples = ragged_examples(count)
    for epoch in (0, 1):
        batches = epoch_of(examples, batch_size, 7, epoch)
        assert sorted(e for batch in batches for e in batch) == sorted(examples)
        assert all(len(batch) <= batch_size for batch in batches)


def test_order_depends_on_the_seed_and_the_epoch_alone():
    """Not on whatever else draws random numbers. The examples stay as they were."""
    examples = ragged_examples(100)
    before = copy.deepcopy(examples)
    random.seed(1)
    first = epoch_of(examples, 8, 7)
    random.seed(2)
    torch.manual_seed(2)
    assert epoch_of(examples, 8, 7) == first
    assert epoch_of(examples, 8, 8) != first
    assert epoch_of(examples, 8, 7, epoch=1) != first
    assert examples == before


def test_batches_hold_little_padding_and_come_in_mixed_lengths():
    """At least 80 % of the tokens are real, though lengths spread from 4 to 180. And training does
    not go from short examples to long ones: its last steps would be about long texts only."""
    batches = epoch_of(ragged_examples(1000), 32, 7)
    real = sum(len(prompt) + len(target) - 1 for batch in batches for prompt, target in batch)
    tokens = [collate(batch)[0] for batch in batches]
    assert real / sum(ids.numel() for ids in tokens) >= 0.8
    widths = [ids.shape[1] for ids in tokens]
    assert sum(a > b for a, b in zip(widths, widths[1:])) > len(widths) / 4


# --------------------------------------------------------------------------------------------------
# gradients


class Recorder:
    """Notes, before every optimizer step, the gradients, the weights and the settings that the
    optimizer works with."""

    def __enter__(self):
        self.steps = []
        self.hook = register_optimizer_step_pre_hook(self.note)
        return self

    def __exit__(self, *_):
        self.hook.remove()

    def note(self, optimizer, *_):
        [group] = optimizer.param_groups
        self.steps.append(SimpleNamespace(
            gradients=[p.grad.clone() for p in group["params"]],
            weights=[p.detach().clone() for p in group["params"]],
            kind=type(optimizer), **{k: group[k] for k in ("lr", "weight_decay", "betas")}))


def gradients_of(model, examples, scale=None):
    """The plain way: every logit, every example alone, no batch. Of the mean loss over all trained
    tokens; or of `scale` times the sum."""
    model = copy.deepcopy(model)
    total = 0
    for prompt, target in examples:
        logits = model(torch.tensor([prompt + target]))[0, len(prompt) - 1:-1]
        total += F.cross_entropy(logits, torch.tensor(target), reduction="sum")
    loss = total * (scale or 1 / sum(len(target) for _, target in examples))
    loss.backward()
    return [p.grad for p in model.parameters()], loss.detach()


def norm(gradients):
    return torch.cat([g.flatten() for g in gradients]).norm().item()


def difference(ours, theirs):
    """Relative to the size of theirs."""
    return norm([a - b for a, b in zip(ours, theirs, strict=True)]) / norm(theirs)


def begin_gradients(model):
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("positions", [1, 7, 10_000])
def test_loss_in_pieces_is_the_whole_one(load, monkeypatch, positions, tied):
    """With room for the logits of a few positions at a time, the loss and all gradients are those
    of the plain formula. And there never are more logits than that. Gradients are added to what is
    there."""
    student = load()
    examples = ragged_examples(2)
    if not tied:
        torch.manual_seed(1)
        student.model = Decoder(dataclasses.replace(student.model.config,
                                                    tie_word_embeddings=False))
    model = student.model
    wanted, wanted_loss = gradients_of(model, examples, scale=0.3)
    room = positions * model.config.vocab_size
    monkeypatch.setattr(train, "LOGITS_AT_ONCE", room)
    sizes = []
    log_softmax = torch.Tensor.log_softmax

    def counted(logits, dim):
        sizes.append(logits.numel())
        return log_softmax(logits, dim)

    monkeypatch.setattr(torch.Tensor, "log_softmax", counted)
    tokens, targets = collate(examples)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        begin_gradients(model)
        for times in (1, 2):
            loss = add_gradients(model, tokens, targets, 0.3, dtype)
            assert loss.item() == pytest.approx(wanted_loss.item(), rel=tolerance)
            gradients = [p.grad for p in model.parameters()]
            assert difference(gradients, [times * g for g in wanted]) < tolerance
            assert {g.dtype for g in gradients} == {torch.float32}
    assert max(sizes) <= room
    n_trained = int((targets != IGNORE).sum())
    assert sum(sizes) == 4 * n_trained * model.config.vocab_size, "no logits of other positions"


def test_loss_of_a_vocabulary_larger_than_the_room(load, monkeypatch):
    """Then one position at a time, not none."""
    model = load().model
    monkeypatch.setattr(train, "LOGITS_AT_ONCE", 10)
    begin_gradients(model)
    loss = add_gradients(model, *collate([([5, 6], [7, 0])]), 1.0, torch.float32)
    assert loss > 0 and norm([p.grad for p in model.parameters()]) > 0


def test_each_trained_token_of_a_step_counts_the_same(load):
    """Also those of a long example next to a short one. And what moves the weights is AdamW with
    the settings."""
    student = load()
    examples = [([5, 6], [7, 0]), ([8] * 9, list(range(10, 90)) + [0]), ([9, 4, 3], [3, 2, 0])]
    wanted, _ = gradients_of(student.model, examples)
    assert norm(wanted) < 1, "the case should not need clipping"
    plain = copy.deepcopy(student.model)
    with Recorder() as record:
        fine_tune(student, examples, 1, settings(lr=3e-3, weight_decay=0.1), 0, "test")
    [step] = record.steps
    assert difference(step.gradients, wanted) < 1e-5
    assert step.kind == torch.optim.AdamW
    assert (step.weight_decay, step.betas) == (0.1, (0.9, 0.95))

    for p, gradient in zip(plain.parameters(), step.gradients):
        p.grad = gradient
    torch.optim.AdamW(plain.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1).step()
    for ours, theirs in zip(student.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("batch_size, accumulation", [(2, 4), (1, 8), (3, 3)])
def test_accumulation_changes_nothing_but_the_memory(load, batch_size, accumulation):
    """Eight ragged examples give the same gradients in one pass and in many, the last of them
    smaller or not. Averaged pass by pass, a pass with little text would count more."""
    student = load()
    examples = ragged_examples(8)
    wanted, _ = gradients_of(student.model, examples)
    assert norm(wanted) < 1, "the case should not need clipping"
    with Recorder() as record:
        args = settings(batch_size=batch_size, accumulation=accumulation)
        fine_tune(student, examples, 1, args, 0, "test")
    assert difference(record.steps[0].gradients, wanted) < 1e-5


def test_short_texts_do_not_draw_the_choice_to_them(load):
    """One prompt, answered as often by a short text as by a long one: their first tokens, the
    "tags", must come out about equally likely. With one batch a step, sorted by length, the short
    text's tag counts several times as much."""
    examples = [([5, 6], [10, 12, 0]), ([5, 6], [11] + [13] * 14 + [0])] * 64

    def choice(accumulation):
        student = load()
        fine_tune(student, examples, 60, settings(accumulation=accumulation), 0, "test")
        with torch.no_grad():
            logits = student.model(torch.tensor([[5, 6]]))[0, -1]
        return logits.softmax(-1)[[10, 11]].tolist()

    short, long = choice(parse_args([]).accumulation)
    assert 0.85 < short + long and short / long < 2.5
    short, long = choice(accumulation=1)
    assert short / long > 5, "the case should show the fault where it is"


def test_gradients_are_clipped_to_norm_1(load):
    """One odd batch must not throw the student off: its gradient keeps its direction alone."""
    student = load(scale=2)
    examples = ragged_examples(4)
    wanted, _ = gradients_of(student.model, examples)
    assert norm(wanted) > 5, "the case should need clipping"
    with Recorder() as record:
        fine_tune(student, examples, 1, settings(), 0, "test")
    [step] = record.steps
    assert norm(step.gradients) == pytest.approx(1, abs=1e-3)
    assert difference([norm(wanted) * g for g in step.gradients], wanted) < 1e-4


def test_gradients_do_not_pile_up(load):
    """Each step sees its own batch only: the gradients of the one before are gone."""
    examples = ragged_examples(4)
    with Recorder() as record:
        fine_tune(load(), examples, 3, settings(lr=1e-4), 0, "test")
    model = load().model
    assert len(record.steps) == 3
    for step in record.steps:
        for p, weight in zip(model.parameters(), step.weights):
            p.data = weight
        wanted, _ = gradients_of(model, examples)
        assert norm(step.gradients) == pytest.approx(min(1, norm(wanted)), rel=1e-3)


@pytest.mark.parametrize("lora", [0, 2])
def test_bfloat16_gradients_are_those_of_float32_but_for_rounding(load, lora):
    gradients = []
    for dtype in ("float32", "bfloat16"):
        with Recorder() as record:
            fine_tune(load(), ragged_examples(8), 1, settings(dtype=dtype, lora=lora), 0, "test")
        gradients.append(record.steps[0].gradients)
    assert 0 < difference(gradients[1], gradients[0]) < 0.05


# --------------------------------------------------------------------------------------------------
# the training loop


def test_learning_rate_warms_up_and_falls_to_nearly_0(load):
    """Up in a line, down in a line. The last step still moves something."""
    with Recorder() as record:
        fine_tune(load(), ragged_examples(8), 20, settings(lr=1e-2, warmup=4), 0, "test")
    rates = [step.lr for step in record.steps]
    assert len(rates) == 20
    assert rates[0] == pytest.approx(1e-2 / 4) and rates[:4] == sorted(rates[:4])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[5] == pytest.approx(1e-2 * 0.75)  # a quarter of the way
    assert 0 < rates[-1] < 1e-3
    with Recorder() as record:
        fine_tune(load(), ragged_examples(8), 2, settings(lr=1e-2, warmup=0), 0, "test")
    assert record.steps[0].lr == 1e-2


def test_lora_moves_the_seven_projections_by_a_matrix_of_its_rank(load):
    """And the optimizer holds nothing else: embeddings and norms stay as they were, to the bit."""
    student = load()
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    with Recorder() as record:
        fine_tune(student, ragged_examples(8), 3, settings(lora=2, checkpointing=True), 0, "test")
    after = student.model.state_dict()
    assert after.keys() == before.keys()
    projections = [name for name in after if "_proj.weight" in name]
    assert len(projections) == 7
    for name, tensor in after.items():
        if name in projections:
            change = tensor - before[name]
            assert torch.linalg.matrix_rank(change, rtol=1e-3) == 2, name
        else:
            assert torch.equal(tensor, before[name]), name
    weights = record.steps[0].weights
    assert len(weights) == 2 * 7 and all(2 in weight.shape for weight in weights)


def test_training_lowers_the_loss(load, capsys):
    """A tiny set is learned in 60 steps: the loss that is printed falls, and so does the one
    measured here."""
    student = load()
    examples = [example_of(student, rationale) for rationale in TEACHER[:12]]

    def loss():
        tokens, targets = collate(examples)
        with torch.no_grad():
            logits = student.model(tokens).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE).item()

    before = loss()
    fine_tune(student, examples, 60, settings(batch_size=12, lr=2e-2), 0, "learn")
    assert loss() < before / 3
    printed = re.findall(r"learn: step \d+/60, loss ([\d.]+)", capsys.readouterr().out)
    assert len(printed) == 4 and float(printed[0]) > float(printed[-1])
    assert float(printed[-1]) == pytest.approx(loss(), abs=0.2)


def weights_after(student, *arguments):
    """All weights in one tensor, after fine_tune with these arguments."""
    fine_tune(student, *arguments)
    return torch.cat([p.detach().flatten().cpu() for p in student.model.parameters()])


@pytest.mark.parametrize("lora", [0, 2])
def test_same_seed_gives_the_same_weights_to_the_bit(load, lora):
    """Nobody else's random numbers matter. Another seed gives others: it decides on the order."""
    def trained(seed):
        torch.manual_seed(random.randrange(10 ** 6))
        return weights_after(load(), ragged_examples(20), 6, settings(lora=lora), seed, "test")

    first = trained(3)
    assert torch.equal(first, trained(3))
    assert not torch.equal(first, trained(4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-3), ("bfloat16", 0.05)])
def test_cuda_trains_as_the_cpu_does(load, dtype, lora, tolerance):
    moves = []
    for device, dtype in (("cpu", "float32"), ("cuda", dtype)):
        student = load()
        before = torch.cat([p.detach().flatten() for p in student.model.parameters()])
        student.model.to(device)
        args = settings(device=device, dtype=dtype, lora=lora, lr=1e-3)
        moves.append(weights_after(student, ragged_examples(20), 8, args, 3, "test") - before)
    assert torch.cosine_similarity(*moves, dim=0) > 1 - tolerance


@pytest.mark.parametrize("lora", [0, 2])
def test_bfloat16_arithmetic_keeps_float32_weights(load, lora):
    """With --dtype bfloat16 the weights are updated in float32, where a small step is not rounded
    away. So are those that LoRA is merged into: what is added to them is at most as large as B
    (about 1e-5) times A (at most 1 / sqrt(32)), twice. bfloat16 would lose some 5e-5."""
    student = load()
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    args = settings(dtype="bfloat16", lr=1e-5, lora=lora, lora_alpha=2)
    fine_tune(student, ragged_examples(4), 1, args, 0, "test")
    for name, tensor in student.model.state_dict().items():
        assert tensor.dtype == torch.float32
        change = (tensor - before[name]).abs().max()
        if lora and "_proj" in name:
            assert 0 < change < 6e-6
        elif lora:
            assert change == 0, name
        else:
            assert 0 < change < 1e-4, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_weights_are_there_once(load, tiny_student, monkeypatch, dtype):
    """In the dtype of the arithmetic. The result is the same to the bit as with those of float32."""
    dtypes = set()

    def note_dtypes(model, *args, add_gradients=add_gradients):
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                dtypes.add(("lora" in name, str(parameter.dtype)))
        return add_gradients(model, *args)

    monkeypatch.setattr(train, "add_gradients", note_dtypes)
    results = []
    for folder in (None, tiny_student):
        student = load(scale=1)
        dtypes.clear()
        args = settings(dtype=dtype, lora=2)
        fine_tune(student, ragged_examples(8), 3, args, 0, "test", None, folder)
        results.append(student.model.state_dict())
    assert dtypes == {(True, "torch.float32"), (False, f"torch.{dtype}")}
    for name, tensor in results[0].items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, results[1][name])


@pytest.mark.parametrize("lora, tied", [(0, True), (2, True), (0, False)])
def test_model_can_be_used_by_others_afterwards(load, lora, tied):
    """Float32 weights, adapters merged, no gradients left; whatever else trains it can do so."""
    model = load().model
    if not tied:
        model = Decoder(dataclasses.replace(model.config, tie_word_embeddings=False))
    names = model.state_dict().keys()
    student = SimpleNamespace(model=model)
    fine_tune(student, ragged_examples(8), 2, settings(dtype="bfloat16", lora=lora), 0, "test")
    assert model.state_dict().keys() == names
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[5, 6]])).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_the_training(load, value, tmp_path):
    """By its step, before it gets into the weights or the checkpoint."""
    student = load()
    examples = ragged_examples(4)
    with torch.no_grad():
        student.model.model.embed_tokens.weight[examples[0][0][0]] = value
    with pytest.raises(ValueError, match="test: the loss of step 1 of 3 is nan.* rate of 1.0e-02"):
        fine_tune(student, examples, 3, settings(), 0, "test", tmp_path / "training.pt")
    assert not (tmp_path / "training.pt").exists()
    assert student.model.model.norm.weight.isfinite().all()


# --------------------------------------------------------------------------------------------------
# checkpoints within a training


@contextmanager
def stopped_in_step(number):
    """Ctrl-C before the weights move in this step, counted from here."""
    steps = []

    def count(*_):
        steps.append(1)
        if len(steps) == number:
            raise KeyboardInterrupt

    hook = register_optimizer_step_pre_hook(count)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        hook.remove()


@pytest.mark.parametrize("lora", [0, 2])
def test_stopped_training_goes_on_to_the_same_weights(load, lora, tmp_path):
    """Stopped in step 6 of 9 and again in the third after that, it ends as if nothing had happened:
    the same bits, with the learning rates and the batches of the steps that were left."""
    arguments = ragged_examples(20), 9, settings(lora=lora, accumulation=2), 3, "test"
    wanted = weights_after(load(), *arguments)
    with Recorder() as record:
        for number in (6, 3):
            with stopped_in_step(number):
                fine_tune(load(), *arguments, tmp_path / "training.pt")
        resumed = weights_after(load(), *arguments, tmp_path / "training.pt")
    assert len(record.steps) == 6 + 3 + 2, "steps 6 and 8 are taken twice, no other"
    assert torch.equal(resumed, wanted)


def change_state(change):
    """A function that rewrites a training.pt whose content `change` has changed."""
    def rewrite(path):
        state = torch.load(path)
        torch.save(change(state) or state, path)

    return rewrite


def turn_a_bit(path):
    """Of a weight: torch.load would not notice."""
    content = bytearray(path.read_bytes())
    weights = torch.load(path)["parameters"]["model.embed_tokens.weight"]
    place = content.index(weights.detach().numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(content)


def add_dimension(state):
    weight = state["parameters"]["model.norm.weight"]
    state["parameters"]["model.norm.weight"] = weight[None]  # which copy_ would accept



SPOILT = {
    "nothing in it": lambda path: path.write_bytes(b""),
    "one byte": lambda path: path.write_bytes(b"P"),
    "half of it": lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]),
    "a byte less": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "noise": lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
    "a text": lambda path: path.write_text("{}"),
    "a bit": turn_a_bit,
    "another value": change_state(lambda state: [1]),
    "no step": change_state(lambda state: state.pop("step") and None),
    "no parameters": change_state(lambda state: {"step": 3, "optimizer": state["optimizer"]}),
    "no optimizer": change_state(lambda state: state.pop("optimizer") and None),
    "no group": change_state(lambda state: state["optimizer"]["param_groups"].clear()),
    "one parameter less": change_state(lambda state: state["parameters"].popitem() and None),
    "another shape": change_state(add_dimension),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_training_with_a_spoilt_checkpoint_begins_again(load, tmp_path, capsys, spoil):
    """A kill cannot tear training.pt, but a copy that broke off or a power cut can. Nothing of it
    is used: the weights are those of a training from the start. One line names the file."""
    arguments = ragged_examples(8), 4, settings(save_minutes=0), 3, "test"
    wanted = weights_after(load(), *arguments)
    path = tmp_path / "training.pt"
    with stopped_in_step(3):
        fine_tune(load(), *arguments, path)
    spoil(path)
    capsys.readouterr()
    with Recorder() as record:
        assert torch.equal(weights_after(load(), *arguments, path), wanted)
    assert len(record.steps) == 4
    said = [line for line in capsys.readouterr().out.splitlines() if not "loss" in line]
    assert said == [f"{path}: torn, or of another model; this training begins again"]


@pytest.mark.parametrize("lora", [0, 2])
def test_checkpoint_of_another_kind_of_training_is_not_used(load, tmp_path, capsys, lora):
    """Of all weights where adapters are trained, or of adapters where all weights are."""
    def arguments(lora):
        return ragged_examples(8), 4, settings(lora=lora), 3, "test"

    path = tmp_path / "training.pt"
    with stopped_in_step(3):
        fine_tune(load(), *arguments(2 - lora), path)
    resumed = weights_after(load(), *arguments(lora), path)
    assert f"{path}: torn, or of another model" in capsys.readouterr().out
    assert torch.equal(resumed, weights_after(load(), *arguments(lora)))


def test_checkpoint_is_written_every_so_many_minutes(load, monkeypatch, tmp_path):
    """Here a step takes 4 minutes, and there is a checkpoint every 10: after steps 3 and 6 of 8."""
    path = tmp_path / "training.pt"
    minutes = [0]
    monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: 60 * minutes[0]))
    found = []

    def pass_time(*_):
        found.append(torch.load(path)["step"] if path.exists() else 0)
        minutes[0] += 4

    hook = register_optimizer_step_pre_hook(pass_time)
    fine_tune(load(), ragged_examples(8), 8, settings(save_minutes=10), 0, "test", path)
    hook.remove()
    assert found == [0, 0, 0, 3, 3, 3, 6, 6]


# --------------------------------------------------------------------------------------------------
# a round's training


def train_round(student, folder, rationales=TEACHER, control_steps={}, **changed):
    """train() as siked calls it. Returns the number of steps that were taken."""
    with Recorder() as record:
        train.train(student, rationales, folder, 0, QUESTIONS, settings(**changed), control_steps)
    return len(record.steps)


def test_folder_holds_the_trained_student(load, tmp_path):
    """Complete, in the student's format, with what it was trained on; nothing unfinished. A second
    call finds it and trains nothing."""
    student, folder = load(), tmp_path / "adaptive-1"
    assert train_round(student, folder) == 9
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors", "config.json", "tokenizer.json", "generation_config.json",
        "mix.jsonl", "steps.json"}
    assert read_rationales(folder / "mix.jsonl", QUESTIONS) == TEACHER
    assert (folder / "steps.json").read_text() == "9"
    trained = student.model.state_dict()
    for name, tensor in Student(folder).model.state_dict().items():
        assert torch.equal(tensor, trained[name])
        assert not torch.equal(tensor, load().model.state_dict()[name])

    (folder / "training.pt").write_text("left by a kill after the last step")
    (folder / "training.pt.0.part").write_text("left by a kill in the middle of writing")
    again = load()
    assert train_round(again, folder) == 0
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, trained[name])
    assert not list(folder.glob("training.pt*"))


def test_teacher_texts_that_are_too_long_are_left_out_before_the_filter_and_counted(load, capsys):
    """Cut to size they would teach to stop in the middle; left out in silence, nobody would know.
    If they went after the filter, a question whose first right text is long would have none."""
    student = load()
    question = QUESTIONS[0]
    texts = ["so " * 30 + "Final answer: 5", "Final answer: 5"]
    long, short = [Rationale(question.id, "cot", text) for text in texts]
    data = Data(QUESTIONS, [long, short], {})
    prompt, target = example_of(student, short)
    limit = len(prompt + target)
    assert leave_out_long(student, data, limit).teacher == [short]
    assert ("1 of the teacher's texts are left out: with their questions they are longer than "
            f"{limit} tokens") in capsys.readouterr().out
    assert leave_out_long(student, data, limit - 1).teacher == []
    assert leave_out_long(student, data, 1000).teacher == [long, short]
    student.model.config.max_position_embeddings = limit
    assert leave_out_long(student, data, 1000).teacher == [short]


@pytest.mark.parametrize("changed, steps", [
    ({"epochs": 1}, 5),
    ({"epochs": 2.5}, 12),
    ({"batch_size": 36}, 1),
    ({"accumulation": 3}, 2),
    ({"rationales": TEACHER[:3]}, 1),
    ({"control_steps": {"all-1": 3, "all-2": 7}}, 3),
    ({"control_steps": {"all-2": 7}}, 5),
])
def test_steps_by_hand(load, tmp_path, changed, steps):
    """36 texts in batches of 8 are 5 steps an epoch, 2 of 3 batches each; or as many steps as are
    demanded for this folder."""
    if "control_steps" in changed:
        forced = {tmp_path / name: n for name, n in changed["control_steps"].items()}
        changed = {"control_steps": forced}
    assert train_round(load(), tmp_path / "all-1", **{"batch_size": 8} | changed) == steps
    assert (tmp_path / "all-1/steps.json").read_text() == str(steps)


@pytest.mark.parametrize("name", ["self-1", "cot"])
def test_round_without_anything_to_train_on_leaves_the_student_as_it_is(load, tmp_path, name):
    """As a round of --mix self may be, before the student solves anything, or the control of a
    strategy that the teacher never gets right. Also if steps are demanded."""
    student = load()
    folder = tmp_path / name
    assert train_round(student, folder, [], {folder: 5}) == 0
    assert (folder / "steps.json").read_text() == "0"
    for name, tensor in Student(folder).model.state_dict().items():
        assert torch.equal(tensor, load().model.state_dict()[name])


def test_teacher_without_a_usable_text_is_refused(load, tmp_path):
    """In round 0: what comes out would be called a distilled student, and was never trained.
    Nothing that looks finished is left."""
    folder = tmp_path / "combined"
    with pytest.raises(ValueError, match="teacher.jsonl: no rationale is right, finished and"):
        train_round(load(), folder, [])
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------
# flags


def test_help_gives_every_flag_with_its_default(capsys, monkeypatch):
    """And each with a word on what it is."""
    monkeypatch.setenv("COLUMNS", "1000")  # or a long path is divided
    with pytest.raises(SystemExit) as stopped:
        parse_args(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert train.__doc__ in shown
    entries = {entry.split()[0]: entry for entry in re.split(r"\n  (?=-)", shown)[1:]}
    for name, default in vars(parse_args([])).items():
        if name in SETTINGS:
            continue
        entry = re.sub(r"\s+", " ", entries["--" + name.replace("_", "-")])
        assert len(entry.split()) > 3, f"{entry}: says nothing"
        if default not in (False, None):
            shown = str(default).replace("\n", r"\n")
            assert f" [{shown}]" in entry, entry


def test_help_where_the_path_of_the_repository_holds_a_percent_sign(capsys, monkeypatch):
    monkeypatch.setattr(train, "FLAGS", (("--model", Path("50%/student"), None, "it"), *train.FLAGS[1:]))
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    assert "[50%/student]" in capsys.readouterr().out


def test_defaults_run_the_embedded_example():
    """`python train.py --iters 3` needs no other flag, from any folder."""
    args = parse_args([])
    assert (args.data / "train.jsonl").is_file() and (args.data / "teacher.jsonl").is_file()
    assert (args.model / "config.json").is_file()
    assert args.model.is_absolute() and args.data.is_absolute()
    assert vars(args) == vars(args) | SETTINGS, "settings without a flag are there, too"


def test_preset_gives_way_to_flags():
    """--preset changes the defaults that it names, the settings without a flag among them."""
    usual, preset = vars(parse_args([])), PRESETS["paper"]
    assert preset.keys() <= usual.keys()
    assert vars(parse_args(["--preset", "paper"])) == usual | preset | {"preset": "paper"}
    args = parse_args(["--preset", "paper", "--lora", "7", "--lr", "1"])
    assert (args.lora, args.lr, args.samples, args.warmup) == (7, 1.0, 10, 5)


@pytest.mark.parametrize("name, least", [(name, least) for name, _, least, _ in FLAGS
                                         if least is not None])
def test_least_value_is_allowed_and_a_smaller_one_is_not(name, least, capsys):
    """The message names the flag, the value and the least one."""
    smaller = least - 1 if type(least) is int else least / 2
    assert getattr(parse_args([name, str(least)]), name[2:].replace("-", "_")) == least
    with pytest.raises(SystemExit) as stopped:
        parse_args([name, str(smaller)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert re.search(rf"error: {name} {smaller}\S*: must be at least {least}, and finite", said)


# --------------------------------------------------------------------------------------------------
# the runs of a command


def test_runs_of_a_command():
    """The one of --mix first: the controls take as many steps as it does. A mix comes once."""
    assert list_runs(parse_args(["--mix", "all"])) == ["all"]
    for mode in train.MIXES:
        runs = list_runs(parse_args(["--mix", mode, "--compare"]))
        others = [name for name in ("adaptive", "all", "self", "teacher") if name != mode]
        assert runs == [mode, *others, *STRATEGIES]


def test_some_runs_to_compare_with(capsys):
    args = parse_args(["--compare", "pot", "teacher", "--seeds", "2"])
    assert list_runs(args) == ["adaptive", "pot", "teacher"]
    with pytest.raises(SystemExit):
        parse_args(["--compare", "pit"])
    assert "'pit'" in capsys.readouterr().err


def test_folders_of_a_run():
    """A round has a folder. All that is distilled from the whole teacher begins in the same one."""
    args = parse_args(["--iters", "2", "--out", "out"])
    seed = Path("out/seed-3")
    for name in ("adaptive", "self", "teacher"):
        assert list_folders(name, args, 3) == [seed / "combined", seed / f"{name}-1",
                                               seed / f"{name}-2"]
    assert list_folders("cot", args, 3) == [seed / "cot", seed / "cot-1", seed / "cot-2"]
