"""Tests of train.py:  python -m pytest tests/test_train.py

The training loop, the run folder and what is printed, on tiny random decoders with a tokenizer trained here: seconds in
all. What the command does as a whole is in test_main.py.
"""
import copy
import dataclasses
import json
import math
import random
import re
import subprocess
import sys
from argparse import Namespace
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train
from model import Config, Decoder
from siked import STRATEGIES, Question, Rationale, Student, read_rationales
from train import (IGNORE, RunFolder, collate, fine_tune, make_batches, output_loss, parse_args, read_data,
                   write_file)

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = [Question(f"q{i}", f"What is {i} + {2 * i}?" + " Tell me." * (i % 4), Fraction(3 * i)) for i in range(12)]
TEACHER = [Rationale(q.id, strategy, text) for i, q in enumerate(QUESTIONS) for strategy, text in [
    ("cot", f"{i} + {2 * i} = {3 * i}. Final answer: {3 * i}"), ("l2m", f"What is added? {2 * i}. Final answer: {3 * i}"),
    ("pot", f"answer = {i} + {2 * i}")]]


def tiny_student(seed=0, max_new_tokens=12, tied=True) -> Student:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator([q.text for q in QUESTIONS] + [r.text for r in TEACHER], trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    torch.manual_seed(seed)
    config = Config("llama", vocab_size=tokenizer.get_vocab_size(), hidden_size=16, intermediate_size=32,
                    num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=256, tie_word_embeddings=tied,
                    extra={"eos_token_id": 0})
    return Student(Decoder(config), tokenizer, [0], max_new_tokens)


def ragged_examples(count, seed=0):
    """[(prompt ids, target ids)] of lengths from 2 + 2 to 60 + 120, all different."""
    rng = random.Random(seed)

    def draw(shortest, longest):
        return [rng.randrange(1, 200) for _ in range(rng.randint(shortest, longest))]

    return [(draw(2, 60), draw(1, 119) + [0]) for _ in range(count)]


def settings(**changed) -> Namespace:
    return Namespace(**({"lr": 1e-2, "warmup": 1, "weight_decay": 0.01, "batch_size": 4, "accumulation": 1,
                         "device": "cpu", "dtype": "float32", "lora": 0, "lora_alpha": 32, "cosine": False,
                         "checkpointing": False, "save_minutes": 0} | changed))


def test_example():
    """What it is for: a student learns to answer a question with a given text."""
    student, question, rationale = tiny_student(max_new_tokens=60), QUESTIONS[3], TEACHER[9]
    example = student.prompt(question), student.target(rationale)
    fine_tune(student, [example], steps=150, args=settings(batch_size=1), seed=0, name="example")
    [[(text, finished)]] = student.answer([student.prompt(question)])
    assert text == "[cot]: 3 + 6 = 9. Final answer: 9" and finished
    [[(text, finished)]] = student.answer([student.prompt(question, "cot")])  # with the strategy forced
    assert text == "3 + 6 = 9. Final answer: 9"


# ---------------------------------------------------------------------------------------------------------------------
# batches


def test_every_row_trains_on_its_target_and_nothing_else():
    """Pitfalls 1 and 2, on a ragged batch: the trained ids of a row are the response and one end token, each at the place
    whose next token it is. The end token has id 0, as the padding has: told apart by id, it would be lost."""
    student = tiny_student()
    by_id = {q.id: q for q in QUESTIONS}
    tokens, targets = collate([(student.prompt(by_id[r.id]), student.target(r)) for r in TEACHER])
    assert tokens.shape == targets.shape and len(tokens) == len(TEACHER)
    for row, r in enumerate(TEACHER):
        trained = targets[row][targets[row] != IGNORE].tolist()
        assert student.tokenizer.decode(trained, skip_special_tokens=False) == f"[{r.strategy}]: {r.text}<end>"
        assert trained.count(0) == 1
        places = (targets[row] != IGNORE).nonzero()[:, 0].tolist()
        read = tokens[row, :places[-1] + 1].tolist()  # what the model has read where it learns to stop
        assert read + trained[-1:] == student.prompt(by_id[r.id]) + student.target(r)
        assert places == list(range(len(student.prompt(by_id[r.id])) - 1, len(read)))


def test_longest_row_has_no_padding():
    """The batch is as wide as its longest example needs, no wider: one place less than ids, as the last is only a target."""
    tokens, targets = collate([([5, 6, 7], [8, 9, 0]), ([5], [9, 0])])
    assert tokens.tolist()[0] == [5, 6, 7, 8, 9] and targets.tolist()[0] == [IGNORE, IGNORE, 8, 9, 0]
    assert tokens.tolist()[1][:2] == [5, 9] and targets.tolist()[1] == [9, 0, IGNORE, IGNORE, IGNORE]


def epoch_of(examples, batch_size, seed, epoch=0):
    per_epoch = math.ceil(len(examples) / batch_size)
    return list(islice(make_batches(examples, batch_size, seed), epoch * per_epoch, (epoch + 1) * per_epoch))


@pytest.mark.parametrize("count, batch_size", [(1, 4), (7, 4), (64, 4), (150, 4), (100, 32)])
def test_every_example_comes_once_an_epoch(count, batch_size):
    """Also if the last batch is smaller than the others; in the second epoch as in the first."""
    examples = ragged_examples(count)
    for epoch in (0, 1):
        batches = epoch_of(examples, batch_size, 7, epoch)
        assert sorted(e for batch in batches for e in batch) == sorted(examples)
        assert all(len(batch) <= batch_size for batch in batches)


def test_order_depends_on_the_seed_and_the_epoch_alone():
    """Pitfall 17: the same seed, the same order, whatever else draws random numbers; the examples stay as they were."""
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
    """At least 80 % of the tokens are real, though lengths spread from 4 to 180; and training does not go from the short
    examples to the long ones, where the last steps would be about long texts only."""
    batches = epoch_of(ragged_examples(1000), 32, 7)
    real = sum(len(prompt) + len(target) - 1 for batch in batches for prompt, target in batch)
    assert real / sum(collate(batch)[0].numel() for batch in batches) >= 0.8
    widths = [collate(batch)[0].shape[1] for batch in batches]
    assert sum(a > b for a, b in zip(widths, widths[1:])) > len(widths) / 4


# ---------------------------------------------------------------------------------------------------------------------
# the training loop


class Recorder:
    """Notes, before every optimizer step, the gradients, the weights and the settings that the optimizer works with."""

    def __enter__(self):
        self.steps = []
        self.hook = register_optimizer_step_pre_hook(lambda optimizer, *_: self.steps.append(SimpleNamespace(
            gradients=[p.grad.clone() for p in self.parameters(optimizer)],
            weights=[p.detach().clone() for p in self.parameters(optimizer)],
            **{name: optimizer.param_groups[0][name] for name in ("lr", "weight_decay", "betas")}, kind=type(optimizer))))
        return self

    @staticmethod
    def parameters(optimizer):
        return [p for group in optimizer.param_groups for p in group["params"]]

    def __exit__(self, *_):
        self.hook.remove()


def gradients_of(model, examples):
    """Of the mean loss over all trained tokens, the plain way: every logit, every example alone, no batch."""
    model = copy.deepcopy(model).train()
    losses = []
    for prompt, target in examples:
        logits = model(torch.tensor([prompt + target]))[0, len(prompt) - 1:-1]
        losses.append(F.cross_entropy(logits, torch.tensor(target), reduction="none"))
    torch.cat(losses).mean().backward()
    return [p.grad for p in model.parameters()]


def norm(gradients):
    return torch.cat([g.flatten() for g in gradients]).norm().item()


@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_the_mean_over_the_trained_tokens(tied):
    """Pitfall 9: each trained token of a step counts the same, also those of a long example next to a short one. And what
    moves the weights is AdamW with the flags' settings."""
    student, examples = tiny_student(tied=tied), [([5, 6], [7, 0]), ([8] * 9, list(range(10, 90)) + [0]), ([9, 4, 3], [3, 2, 0])]
    wanted = gradients_of(student.model, examples)
    assert norm(wanted) < 1, "the case should not need clipping"
    plain = copy.deepcopy(student.model)
    with Recorder() as record:
        fine_tune(student, examples, 1, settings(lr=3e-3, weight_decay=0.1), 0, "test")
    [step] = record.steps
    for ours, theirs in zip(step.gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    assert (step.kind, step.weight_decay, step.betas) == (torch.optim.AdamW, 0.1, (0.9, 0.95))

    for p, gradient in zip(plain.parameters(), step.gradients):
        p.grad = gradient
    torch.optim.AdamW(plain.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1).step()
    for ours, theirs in zip(student.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("batch_size, accumulation", [(2, 4), (1, 8), (3, 3)])
def test_accumulation_changes_nothing_but_the_memory(batch_size, accumulation):
    """Pitfall 9: eight ragged examples give the same gradients in one pass and in many, the last of them smaller or not.
    Averaged pass by pass, the examples of a pass with little text would count more."""
    student, examples = tiny_student(), ragged_examples(8)
    wanted = gradients_of(student.model, examples)
    assert norm(wanted) < 1, "the case should not need clipping"
    with Recorder() as record:
        fine_tune(student, examples, 1, settings(batch_size=batch_size, accumulation=accumulation), 0, "test")
    for ours, theirs in zip(record.steps[0].gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_output_loss_in_pieces_is_the_whole_one(rows):
    """Pitfall 19: with room for a few positions at a time, and a vocabulary that is passed through in parts, the loss and
    both gradients are those of the plain formula."""
    generator = torch.Generator().manual_seed(1)
    states, weight = (torch.randn(n, 6, generator=generator).requires_grad_() for n in (7, 20_000))
    targets = torch.randint(20_000, (7,), generator=generator)
    wanted = 0.3 * F.cross_entropy(states @ weight.T, targets, reduction="sum")
    wanted.backward()
    added = torch.ones_like(weight)
    room = torch.empty(rows, 20_000)
    loss, grads = output_loss(states.detach(), targets, weight.detach(), added, room, 0.3)
    torch.testing.assert_close(loss, wanted.detach())
    torch.testing.assert_close(grads, states.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(added - 1, weight.grad, atol=1e-6, rtol=1e-4)
    assert torch.equal(output_loss(states.detach(), targets, weight.detach(), None, room, 0.3)[1], grads)
    loss, grads = output_loss(states.detach(), targets, weight.detach().bfloat16(), added.zero_(), room, 0.3)
    torch.testing.assert_close(loss, wanted.detach(), atol=0.05, rtol=0.01)
    for ours, plain in ((grads, states.grad), (added, weight.grad)):
        assert ours.dtype == torch.float32 and (ours - plain).norm() < 0.02 * plain.norm()


def test_short_texts_do_not_draw_the_choice_to_them():
    """One prompt, answered as often by a short text as by a long one: their first tokens, the "tags", must come out about
    equally likely. With one batch a step, sorted by length, the short text's tag counts several times as much."""
    examples = [([5, 6], [10, 12, 0]), ([5, 6], [11] + [13] * 14 + [0])] * 64

    def choice(accumulation):
        student = tiny_student()
        fine_tune(student, examples, 60, settings(accumulation=accumulation, lr=2e-2), 0, "test")
        with torch.no_grad():
            return student.model(torch.tensor([[5, 6]]))[0, -1].softmax(-1)[[10, 11]].tolist()

    short, long = choice(accumulation=parse_args([]).accumulation)
    assert 0.85 < short + long and short / long < 2.5
    short, long = choice(accumulation=1)
    assert short / long > 5, "the case should show the fault where it is"


def test_gradients_are_clipped_to_norm_1():
    """One odd batch must not throw the student off: its gradient keeps its direction and loses its length."""
    student, examples = tiny_student(), ragged_examples(4)
    with torch.no_grad():
        for p in student.model.parameters():
            p *= 8
    wanted = gradients_of(student.model, examples)
    assert norm(wanted) > 5, "the case should need clipping"
    with Recorder() as record:
        fine_tune(student, examples, 1, settings(), 0, "test")
    assert norm(record.steps[0].gradients) == pytest.approx(1, abs=1e-3)
    for ours, theirs in zip(record.steps[0].gradients, wanted, strict=True):
        torch.testing.assert_close(ours * norm(wanted), theirs, atol=1e-3, rtol=1e-2)


def test_gradients_do_not_pile_up():
    """Each step sees its own batch only: the gradients of the one before are gone."""
    student, examples = tiny_student(), ragged_examples(4)
    with Recorder() as record:
        fine_tune(student, examples, 3, settings(lr=1e-4), 0, "test")
    model = tiny_student().model
    for step in record.steps:
        for p, weight in zip(model.parameters(), step.weights):
            p.data = weight
        assert norm(step.gradients) == pytest.approx(min(1, norm(gradients_of(model, examples))), rel=1e-3)


@pytest.mark.parametrize("cosine", [False, True])
def test_learning_rate_warms_up_and_falls_to_nearly_0(cosine):
    """Up in a line, down in a line or a cosine, which is higher at first; the last step still moves something."""
    with Recorder() as record:
        fine_tune(tiny_student(), ragged_examples(8), 20, settings(lr=1e-2, warmup=4, cosine=cosine), 0, "test")
    rates = [step.lr for step in record.steps]
    assert len(rates) == 20
    assert rates[0] == pytest.approx(1e-2 / 4) and rates[:4] == sorted(rates[:4])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert max(rates) > 7e-3 and 0 < rates[-1] < 1e-3
    assert rates[5] == pytest.approx(1e-2 * ((1 + 0.5 ** 0.5) / 2 if cosine else 0.75))  # a quarter of the way


def test_lora_moves_the_seven_projections_by_a_matrix_of_its_rank():
    """And the optimizer holds nothing else: embeddings and norms stay as they were, bit by bit."""
    student, examples = tiny_student(), ragged_examples(8)
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    with Recorder() as record:
        fine_tune(student, examples, 3, settings(lora=2, checkpointing=True), 0, "test")
    after = student.model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert ("_proj.weight" in name) == (not torch.equal(tensor, before[name])), name
        if "_proj.weight" in name:
            assert torch.linalg.matrix_rank(tensor - before[name], rtol=1e-3) == 2, name
    n_projections = sum("_proj.weight" in name for name in after)
    assert len(record.steps[0].weights) == 2 * n_projections and all(2 in w.shape for w in record.steps[0].weights)


def test_training_lowers_the_loss(capsys):
    """A tiny set is learned in 60 steps: the loss that the log shows falls, and so does the one measured here."""
    student, by_id = tiny_student(), {q.id: q for q in QUESTIONS}
    examples = [(student.prompt(by_id[r.id]), student.target(r)) for r in TEACHER[:12]]

    def loss():
        tokens, targets = collate(examples)
        with torch.no_grad():
            return F.cross_entropy(student.model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE).item()

    before = loss()
    fine_tune(student, examples, 60, settings(batch_size=12, lr=2e-2), 0, "learn")
    assert loss() < before / 3
    logged = [float(loss) for loss in re.findall(r"learn: step \d+/60, loss ([\d.]+)", capsys.readouterr().out)]
    assert len(logged) >= 3 and logged[-1] < logged[0] and logged[-1] == pytest.approx(loss(), abs=0.2)


def test_freed_memory_is_kept():
    """Page faults of ten steps of 240 MB in tensors of 40 MB, after three others, in a process of its own: the setting stays."""
    count = ("import resource, sys, torch, train\n"
             "if len(sys.argv) > 1: train.keep_freed_memory()\n"
             "def step(): [torch.ones(10_000_000) for _ in range(6)]\n"
             "for _ in range(3): step()\n"
             "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
             "for _ in range(10): step()\n"
             "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)")
    with_setting, without = (int(subprocess.run([sys.executable, "-c", count, *more], cwd=train.HERE, check=True,
                                                capture_output=True, text=True).stdout) for more in (["keep"], []))
    if without < 10_000:
        pytest.skip(f"{without} page faults without the setting, too: another allocator, or huge pages")
    assert with_setting < without / 2


def test_same_seed_gives_the_same_weights_to_the_bit():
    """And another seed gives others: the order of the examples is what it decides."""
    def trained(seed):
        student = tiny_student()
        torch.manual_seed(random.randrange(10 ** 6))  # nobody else's random numbers may matter
        fine_tune(student, ragged_examples(20), 8, settings(), seed, "test")
        return [p.detach() for p in student.model.parameters()]

    first = trained(3)
    assert all(torch.equal(a, b) for a, b in zip(first, trained(3), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, trained(4)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype, lora, tolerance", [("float32", 0, 1e-3), ("float32", 2, 1e-3), ("bfloat16", 0, 0.05),
                                                    ("bfloat16", 2, 0.05)])
def test_cuda_trains_as_the_cpu_does(dtype, lora, tolerance):
    def trained(device, dtype):
        student = tiny_student()
        start = [p.detach().clone() for p in student.model.parameters()]
        student.model.to(device)
        fine_tune(student, ragged_examples(20), 8, settings(device=device, dtype=dtype, lora=lora, lr=1e-3), 3, "test")
        return torch.cat([(p.detach().cpu() - before).flatten() for p, before in zip(student.model.parameters(), start)])

    ours, wanted = trained("cuda", dtype), trained("cpu", "float32")
    assert torch.cosine_similarity(ours, wanted, dim=0) > 1 - tolerance


@pytest.mark.parametrize("lora", [0, 2])
def test_bfloat16_arithmetic_keeps_float32_weights(lora):
    """--dtype bfloat16: the weights are updated in float32, where a small step is not rounded away. With LoRA, bfloat16
    copies are computed with, but what is added to the float32 weights is a matrix of its rank and nothing else."""
    student = tiny_student()
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    fine_tune(student, ragged_examples(4), 1, settings(dtype="bfloat16", lr=1e-5, lora=lora, lora_alpha=2), 0, "test")
    for name, tensor in student.model.state_dict().items():
        assert tensor.dtype == torch.float32
        difference = tensor - before[name]
        if lora and "_proj" in name:  # B is about 1e-5, A at most 1/4, and the rank 2; bfloat16 would lose some 5e-5
            assert 0 < difference.abs().max() < 6e-6
        elif lora:
            assert not difference.any(), name
        else:
            assert 0 < difference.abs().max() < 1e-4, name


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("interrupted", [True, False])
def test_model_can_be_used_by_others_afterwards(lora, interrupted, monkeypatch):
    """Also after Ctrl-C in a notebook: float32 weights, adapters merged, and whatever else trains the model can do so."""
    student, steps = tiny_student(), []

    def count(optimizer, *_):
        steps.append(1)
        if interrupted and len(steps) == 2:
            raise KeyboardInterrupt

    hook = register_optimizer_step_pre_hook(count)
    try:
        fine_tune(student, ragged_examples(8), 3, settings(dtype="bfloat16", lora=lora, checkpointing=True), 0, "test")
    except KeyboardInterrupt:
        assert interrupted
    finally:
        hook.remove()
    assert len(steps) == 2 + (not interrupted)
    assert {p.dtype for p in student.model.parameters()} == {torch.float32} and not student.model.checkpointing
    assert not any("lora" in name for name in student.model.state_dict())
    assert all(p.requires_grad and p.grad is None for p in student.model.parameters())
    optimizer = torch.optim.AdamW(student.model.parameters())
    student.model(torch.tensor([[5, 6]])).sum().backward()
    optimizer.step()


@contextmanager
def stopped_in_step(number):
    """Ctrl-C in the middle of the optimizer step of this number."""
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
def test_stopped_training_goes_on_to_the_same_weights(lora, tmp_path):
    """Pitfall 17: stopped in step 6 of 9 and again in the fourth after that, it ends as if nothing had happened."""
    def trained(name, *stops):
        for number in stops:
            with stopped_in_step(number):
                trained(name)
        student = tiny_student()
        fine_tune(student, ragged_examples(20), 9, settings(lora=lora, accumulation=2, lr=1e-2), 3, "test", tmp_path / name)
        return [p.detach() for p in student.model.parameters()]

    wanted = trained("undisturbed")
    with Recorder() as record:
        resumed = trained("stopped", 6, 3)
    assert len(record.steps) == 6 + 3 + 2, "no step is taken twice, but those that were not finished"
    assert all(torch.equal(a, b) for a, b in zip(wanted, resumed, strict=True))


def test_checkpoint_of_another_training_is_ignored(tmp_path):
    path = tmp_path / "checkpoint"
    with stopped_in_step(6):
        fine_tune(tiny_student(), ragged_examples(20), 9, settings(), 3, "test", path)
    for seed, examples, steps in ((4, 20, 9), (3, 19, 9), (3, 20, 8)):
        with Recorder() as record:
            fine_tune(tiny_student(), ragged_examples(examples), steps, settings(save_minutes=9), seed, "test", path)
        assert len(record.steps) == steps


def test_failed_checkpoint_names_its_file(tmp_path):
    with pytest.raises(OSError, match="absent"):
        fine_tune(tiny_student(), ragged_examples(20), 3, settings(), 0, "test", tmp_path / "absent/checkpoint")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_the_training(value, tmp_path):
    """By step and batch, before it gets into the weights or the checkpoint."""
    student, examples = tiny_student(), ragged_examples(4)
    with torch.no_grad():
        student.model.model.embed_tokens.weight[examples[0][0][0]] = value
    with pytest.raises(ValueError, match="test: the loss of step 1 of 3 is nan.*begin with '"):
        fine_tune(student, examples, 3, settings(), 0, "test", tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
    assert student.model.model.norm.weight.isfinite().all()


@pytest.mark.parametrize("lora", [0, 2])
def test_bfloat16_gradients_are_those_of_float32_but_for_rounding(lora):
    examples, gradients = ragged_examples(8), []
    for dtype in ("float32", "bfloat16"):
        with Recorder() as record:
            fine_tune(tiny_student(), examples, 1, settings(dtype=dtype, lora=lora), 0, "test")
        gradients.append(torch.cat([g.flatten() for g in record.steps[0].gradients]))
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[0].norm()


# ---------------------------------------------------------------------------------------------------------------------
# flags


def test_help_gives_every_flag_with_its_default(capsys):
    """And each with a word on what it is."""
    with pytest.raises(SystemExit) as stopped:
        parse_args(["--help"])
    assert stopped.value.code == 0
    entries = {entry.split()[0]: entry for entry in re.split(r"\n  (?=-)", capsys.readouterr().out)[1:]}
    defaults = vars(parse_args([]))
    defaults["device"] = defaults["device"].split(":")[0]  # cuda has become cuda:0
    for name, default in defaults.items():
        flag = "--" + name.replace("_", "-")
        entry = re.sub(r"\s+", " ", entries[flag])
        assert len(entry.split()) > 3, f"{entry}: says nothing"
        assert default is False or default is None or f" [{default}]" in entry, entry


def test_defaults_run_the_embedded_example():
    """`python train.py --iters 3` needs no other flag, from any folder."""
    args = parse_args([])
    assert (args.data / "train.jsonl").is_file() and (args.data / "teacher.jsonl").is_file()
    assert args.model.is_absolute() and args.data.is_absolute()


# ---------------------------------------------------------------------------------------------------------------------
# data and run folder


def write_data(folder):
    folder.mkdir()
    for name, questions in {"train": QUESTIONS, "test": QUESTIONS[:2], "other": QUESTIONS[2:5]}.items():
        (folder / f"{name}.jsonl").write_text("".join(
            json.dumps({"id": q.id, "question": q.text, "answer": str(q.answer)}) + "\n" for q in questions))
    train.write_lines(folder / "teacher.jsonl", map(dataclasses.asdict, TEACHER))
    return folder


def test_held_out_questions_are_not_trained_on(tmp_path):
    """Neither they nor the teacher's texts about them; which they are depends on the seed."""
    folder = write_data(tmp_path / "data")
    questions, teacher, sets = read_data(folder, 0.25, 0)
    assert {name: len(asked) for name, asked in sets.items()} == {"held-out": 3, "test": 2, "other": 3}
    held_out = {q.id for q in sets["held-out"]}
    assert len(held_out) == 3 and held_out.isdisjoint(q.id for q in questions) and held_out.isdisjoint(r.id for r in teacher)
    assert len(questions) == 9 and len(teacher) == 27
    assert read_data(folder, 0.25, 0) == (questions, teacher, sets)
    assert any(read_data(folder, 0.25, seed)[2]["held-out"] != sets["held-out"] for seed in range(1, 5))
    assert list(read_data(folder, 0, 0)[2]) == ["test", "other"]


def test_rationales_are_read_as_they_were_written(tmp_path):
    """self.jsonl and mix.jsonl say all that is known of a text, whatever characters it holds."""
    rationales = [Rationale("q1", "pot", "# Äpfel\u2028\u0000\nanswer = 1", "student", False, True), *TEACHER]
    train.write_lines(tmp_path / "mix.jsonl", map(dataclasses.asdict, rationales))
    assert read_rationales(tmp_path / "mix.jsonl", QUESTIONS) == rationales


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    """A full disk or a kill in the middle must not cost the metrics of the models before."""
    path = tmp_path / "metrics.jsonl"
    write_file(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_file(path, "half of the new text " * 1000 + "\ud800")
    assert path.read_text() == "old"

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("model.os.replace", fail)
    with pytest.raises(OSError, match=f"{path} cannot be written: no space"):
        write_file(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    monkeypatch.undo()
    write_file(path, "new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def flags(tmp_path, *more):
    """Flags of a run of milliseconds, with a student and data in tmp_path."""
    if not (tmp_path / "data").exists():
        write_data(tmp_path / "data")
        tiny_student().save(tmp_path / "model")
    return ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"),
            "--iters", "1", "--samples", "1", "--max-new-tokens", "8", "--held-out", "0.1", "--epochs", "1",
            "--batch-size", "8", "--accumulation", "1", "--device", "cpu", *more]


def run_main(monkeypatch, arguments):
    """The command in this process; returns the lines of metrics.jsonl."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    train.main()
    return [json.loads(line) for line in (parse_args(arguments).out / "metrics.jsonl").read_text().splitlines()]


def train_combined(tmp_path, *more, **how):
    args = parse_args(flags(tmp_path, *more))
    folder = RunFolder(args)
    steps = train.train_run("combined", args, read_data(args.data, args.held_out, 0), folder, 0,
                         **({"mode": "all", "iterations": 0} | how))
    return folder, steps


def test_over_long_examples_are_left_out_and_counted(tmp_path, capsys):
    """Pitfall 3: cut to size they would teach to stop in the middle; left out in silence, nobody would know."""
    student, by_id = tiny_student(), {q.id: q for q in QUESTIONS}
    lengths = sorted(len(student.prompt(by_id[r.id])) + len(student.target(r)) for r in TEACHER)
    with Recorder() as record:
        folder, steps = train_combined(tmp_path, "--held-out", "0", "--max-length", str(lengths[20]), "--batch-size", "64")
    out = capsys.readouterr().out
    n_long = sum(length > lengths[20] for length in lengths)
    assert 0 < n_long < len(TEACHER) and re.search(rf"\b{n_long} of {len(TEACHER)}\b.*--max-length {lengths[20]}\b", out)
    kept = [(student.prompt(by_id[r.id]), student.target(r)) for r in TEACHER]
    kept = [e for e in kept if len(e[0]) + len(e[1]) <= lengths[20]]
    assert len(record.steps) == steps == 1
    assert norm(record.steps[0].gradients) == pytest.approx(min(1, norm(gradients_of(student.model, kept))), rel=1e-3)


def test_preset_is_printed_and_gives_way_to_flags(tmp_path, monkeypatch, capsys):
    """--preset changes the defaults of the flags that it names: the authors' settings, method.md."""
    assert vars(parse_args(["--preset", "paper"])) == vars(parse_args([])) | train.PAPER | {"preset": "paper"}
    run_main(monkeypatch, flags(tmp_path, "--preset", "paper", "--lora-alpha", "7"))
    printed = capsys.readouterr().out
    assert "lora 16" in printed and "lora_alpha 7" in printed and "samples 1," in printed and "seed 42" in printed
    assert (tmp_path / "out/seed-42/siked-adaptive-1").is_dir()


def test_what_is_left_out_takes_no_steps(tmp_path):
    """--epochs counts passes over what is trained on, not over what was meant to be."""
    student, by_id = tiny_student(), {q.id: q for q in QUESTIONS}
    lengths = sorted(len(student.prompt(by_id[r.id])) + len(student.target(r)) for r in TEACHER)
    flags = "--held-out", "0", "--max-length", str(lengths[20]), "--batch-size", "1", "--epochs", "2"
    assert train_combined(tmp_path, *flags)[1] == 2 * sum(length <= lengths[20] for length in lengths) < 2 * len(TEACHER)


def test_run_folder_refuses_data_that_changed(tmp_path, monkeypatch):
    """The same path with other files: half of the table would be about the one set of questions, half about the other."""
    run_main(monkeypatch, flags(tmp_path))
    data = tmp_path / "data"
    before = {path: path.read_bytes() for path in data.iterdir()}
    for change, name in [(lambda: (data / "test.jsonl").write_bytes(before[data / "test.jsonl"] + b"\n"), "test.jsonl"),
                         (lambda: (data / "new.jsonl").write_bytes(before[data / "test.jsonl"]), "new.jsonl"),
                         (lambda: (data / "other.jsonl").unlink(), "other.jsonl")]:
        change()
        with pytest.raises(ValueError, match=name):
            RunFolder(parse_args(flags(tmp_path)))
        for path in data.iterdir():
            path.unlink()
        for path, content in before.items():
            path.write_bytes(content)
    RunFolder(parse_args(flags(tmp_path)))


def test_no_warning_if_everything_fits(tmp_path, capsys):
    """The count is shown only where there is something to count."""
    train_combined(tmp_path)
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("more, how, steps", [
    (["--epochs", "1"], {}, 5), (["--epochs", "2.5"], {}, 12), (["--batch-size", "36"], {}, 1), ([], {"total_steps": 3}, 3),
    (["--accumulation", "3"], {}, 2),
    ([], {"strategy": "pot"}, 2)])
def test_steps_by_hand(tmp_path, more, how, steps):
    """36 texts in batches of 8 are 5 steps an epoch, 2 of 3 batches each; a single strategy has 12 texts; or as many steps
    as demanded."""
    with Recorder() as record:
        folder, counted = train_combined(tmp_path, "--held-out", "0", *more, **how)
    assert len(record.steps) == counted == steps
    assert folder.find(set="test")[0]["steps"] == steps
    mixed = read_rationales(folder.model_folder(0, "combined", 0) / "mix.jsonl", QUESTIONS)
    assert {r.strategy for r in mixed} == ({how["strategy"]} if "strategy" in how else set(STRATEGIES))


def test_run_folder_refuses_other_settings_by_name(tmp_path):
    """A folder must not hold models of two settings: the message names each flag that differs, with both values."""
    RunFolder(parse_args(flags(tmp_path, "--lr", "0.25", "--mix", "all")))
    (tmp_path / "out/metrics.jsonl").write_text('{"run": "combined"}\n')  # something has been trained
    with pytest.raises(ValueError) as error:
        RunFolder(parse_args(flags(tmp_path, "--lr", "0.5", "--mix", "self")))
    for words in ("--lr", "0.25", "0.5", "--mix", "all", "self", str(tmp_path / "out")):
        assert words in str(error.value)
    assert "--samples" not in str(error.value)


def test_run_folder_goes_on_with_the_same_settings(tmp_path):
    """More iterations, seeds or comparisons, and whatever does not change the results, may be asked for later."""
    RunFolder(parse_args(flags(tmp_path)))
    (tmp_path / "out/metrics.jsonl").write_text('{"run": "combined"}\n')
    folder = RunFolder(parse_args(flags(tmp_path, "--iters", "2", "--seeds", "3", "--compare", "--rows", "7")))
    assert folder.metrics == [{"run": "combined"}]
    assert json.loads((tmp_path / "out/args.json").read_text())["iters"] == 2


def test_unfinished_work_is_of_the_same_settings_too(tmp_path):
    """Before the first model is finished there are no metrics, but perhaps a day's training."""
    folder = RunFolder(parse_args(flags(tmp_path)))
    folder.stages(0, "combined")("1: train", lambda: 5)
    with pytest.raises(ValueError, match="--lr was 0.002, is 0.5"):
        RunFolder(parse_args(flags(tmp_path, "--lr", "0.5")))


def test_stages_are_computed_once(tmp_path):
    """Whatever a kill has left of the file, what was written whole is not computed again."""
    folder = RunFolder(parse_args(flags(tmp_path)))
    value, path = {"texts": [["a\n\u2028\x00", True]], "share": 0.1}, folder.unfinished(0, "combined", "stages.jsonl")
    assert folder.stages(0, "combined")("one", lambda: value) == value
    with path.open("a") as file:
        file.write('\n{"two": [1, 2')  # half a line
    assert folder.stages(0, "combined")("two", lambda: [3]) == [3]
    stage = folder.stages(0, "combined")
    assert [stage(name, lambda: pytest.fail(name)) for name in ("one", "two")] == [value, [3]]
    assert folder.stages(1, "combined")("one", lambda: 7) == folder.stages(0, "other")("one", lambda: 7) == 7


def test_two_runs_in_one_folder_are_refused(tmp_path):
    """They would write over each other's models."""
    folder = RunFolder(parse_args(flags(tmp_path)))
    code = "import sys, train; train.RunFolder(train.parse_args(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *flags(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and f"--out {tmp_path / 'out'}: another train.py is at work there" in done.stderr
    folder.lock.close()
    subprocess.run(command, cwd=ROOT, check=True)


def test_teacher_without_a_right_text_is_refused(tmp_path, monkeypatch):
    arguments = flags(tmp_path)
    train.write_lines(tmp_path / "data/teacher.jsonl", [
        dataclasses.asdict(r) | {"text": "Final answer: 1e9"} for r in TEACHER])
    with pytest.raises(ValueError, match="teacher.jsonl: of 33 rationales none is right"):
        run_main(monkeypatch, arguments)


def test_round_without_a_right_text_goes_on_with_the_teacher(tmp_path, monkeypatch, capsys):
    """This student solves nothing: it says so, and the next round trains on the teacher's texts alone."""
    lines = run_main(monkeypatch, flags(tmp_path))
    assert "no correct text of the student's own" in capsys.readouterr().out
    assert lines[-1]["iteration"] == 1 and lines[-1]["alpha"] == 1 and lines[-1]["steps"] == 2 * lines[0]["steps"]


def test_mistyped_first_try_does_not_block_the_run_folder(tmp_path, monkeypatch):
    """Nothing was trained with the wrong flag, so the right one is no "other setting"."""
    mistyped = flags(tmp_path)
    mistyped[mistyped.index("--model") + 1] = str(tmp_path / "modle")
    with pytest.raises(FileNotFoundError):
        run_main(monkeypatch, mistyped)
    assert run_main(monkeypatch, flags(tmp_path))


def test_iterations_added_later_are_those_of_one_run(tmp_path, monkeypatch):
    """Pitfall 17: --iters 1 and then --iters 2 end as --iters 2 at once: the same random texts, weights and metrics. So the
    second round starts from the weights of the first, and draws from its seed alone."""
    run_main(monkeypatch, flags(tmp_path))
    twice = run_main(monkeypatch, flags(tmp_path, "--iters", "2"))
    once = run_main(monkeypatch, flags(tmp_path, "--iters", "2", "--out", str(tmp_path / "once")))
    assert [line | {"seconds": 0} for line in twice] == [line | {"seconds": 0} for line in once]
    assert [line["iteration"] for line in once if line["set"] == "test"] == [0, 1, 2]
    files = [path for name in ("self.jsonl", "model.safetensors") for path in (tmp_path / "once").rglob(name)]
    assert len(files) == 6
    for path in files:
        assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "once")).read_bytes(), path
    assert len({path.read_bytes() for path in files if path.name == "model.safetensors"}) == 3


@pytest.mark.parametrize("mode, run", [("adaptive", "siked-adaptive"), ("self", "self-only")])
def test_comparison_stays_fair_when_iterations_are_added(tmp_path, monkeypatch, mode, run):
    """The rows of equal compute have as many steps as the run of --mix, also if that grew after their training. (This
    student solves nothing: self-only adds no steps, the other mixes do.)"""
    for iters in ("1", "2"):
        lines = run_main(monkeypatch, flags(tmp_path, "--compare", "--mix", mode, "--iters", iters))
        steps = {line["run"]: line["steps"] for line in lines if line["set"] == "test"}  # of each run's last model
        equal = {run: steps.pop(run) for run in ("combined-same-steps", "cot-only", "l2m-only", "pot-only")}
        assert set(equal.values()) == {steps[run]}, (equal, steps)


@pytest.mark.parametrize("mode", ["adaptive", "teacher"])
def test_comparison_includes_the_mix_that_was_asked_for(tmp_path, monkeypatch, mode):
    """--compare adds runs to the one of --mix, also if that is none of the usual ones."""
    lines = run_main(monkeypatch, flags(tmp_path, "--compare", "--mix", mode))
    assert any(mode in line["run"] for line in lines)


def test_run_without_teacher_texts_is_refused(tmp_path, monkeypatch):
    """An empty teacher.jsonl would give a "trained" student that was never trained."""
    arguments = flags(tmp_path)
    (tmp_path / "data/teacher.jsonl").write_text("")
    with pytest.raises(ValueError, match="teacher.jsonl"):
        run_main(monkeypatch, arguments)
