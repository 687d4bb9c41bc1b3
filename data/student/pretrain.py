"""Pretrains the small student that ships in this folder, on text that practises single skills of the toy world.

    python data/student/pretrain.py --out FOLDER    # writes config.json, model.safetensors, tokenizer.json

Its optimizer, Muon, needs torch 2.9 or newer.

A document is a story of the toy world and some lines of practice on it, or practice alone: listing the numbers, naming
the operation of each change, carrying results on, looking up who was invited by whom, small sums. Only the practice
is trained on. None of it is a rationale: there are no strategy tags, no sub-questions, no programs, no final answers,
though a line such as "Leo needs Ann + 3" or "14 + 5 = 19" is one that a rationale may hold as well.
"""
import argparse
import math
import random
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import toy  # noqa: E402
from model import Config, Decoder  # noqa: E402
from train import IGNORE, collate  # noqa: E402

END = "<|end|>"


# ---------------------------------------------------------------------------------------------------------------------
# practice


FACTS = ("{person} {before} + {n}", "{person}: {before} + {n}", "{person} needs {before} + {n}",
         "{person} comes with {before}", "{before}: {value}, {person}: {value} + {n} = {result}")


def practise(rng: random.Random, progress: float = 1.0) -> tuple[str, str]:
    """One document: (what is only read, what is trained on).

    progress: of the training, 0 to 1. It begins with looking up and nothing else, first among few names.
    """
    if progress < 0.08:
        return practise_recall(rng, rng.randint(2, 4) if progress < 0.04 else rng.randint(3, 8))
    luck = rng.random()
    if luck < 0.2:
        return practise_recall(rng, 8)
    if progress < 0.16:
        story = toy.tell("relations", rng)
        return story.text + "\n", rng.choice([name_pairs, look_up])(story, rng)
    if luck < 0.3:
        return "\n", practise_sums(rng)
    kind = rng.choice(["relations", "tally", "tally", "tally", "shop"])
    story = toy.tell(kind, rng, unseen=rng.random() < 0.3, longer=rng.random() < 0.3)
    told = story.text if rng.random() < 0.5 else story.text.rpartition(" How many ")[0]
    skills = {"relations": [look_up, look_up, name_pairs, list_numbers],
              "tally": [list_changes, carry, carry, narrate, list_numbers], "shop": [list_changes, list_numbers]}[kind]
    return told + "\n", "\n".join(skill(story, rng) for skill in rng.sample(skills, 2))


def practise_sums(rng) -> str:
    """ "37 + 5 = 42, 42 - 20 = 22, ..." : small sums, mostly each from the result before."""
    value, parts = rng.randint(1, 99), []
    while len(parts) < 8:
        op = rng.choice("++--*/")
        n = 2 if op in "*/" else rng.randint(1, 20)
        result = toy.apply(value, op, n)
        if op == "/" and value % 2 or not 1 <= result <= 120:
            continue
        parts.append(f"{value} {op} {n} = {result}")
        value = result if rng.random() < 0.7 else rng.randint(1, 99)
    return ", ".join(parts) + "."


def practise_recall(rng, n_pairs: int) -> tuple[str, str]:
    """ "Ann 12 Leo, Eve 30 Sam, ..." then, asked in another order, "Eve: 30 Sam, Ann: 12 Leo, ..." """
    keys, others = rng.sample(toy.NAMES, n_pairs), rng.sample(toy.NAMES, n_pairs)
    if rng.random() < 0.5:
        others = [f"{rng.randint(2, 99)} {other}" for other in others]
    pairs, link = list(zip(keys, others)), rng.choice([" ", ": ", " needs "])
    return (", ".join(" ".join(pair) for pair in pairs) + "\n",
            ", ".join(link.join(pair) for pair in rng.sample(pairs, n_pairs)) + ".")


def list_numbers(story, rng) -> str:
    return "Numbers: " + ", ".join(re.findall(r"\d+", story.text)) + "."


def list_changes(story, rng) -> str:
    """ "after Ben finds 5 more: + 5, ..." : which words mean which operation."""
    return ", ".join(f"{step.label}: {step.op} {step.n}" for step in story.steps) + "."


def carry(story, rng) -> str:
    """ "14 plus 5 makes 19; 19 minus 7 makes 12" : every change with its result, in one of many notations, so that the
    student learns the skill and not one way of writing it."""
    words = rng.choice([{"+": "+", "-": "-", "*": "*", "/": "/"}, {"+": "plus", "-": "minus", "*": "times", "/": "over"}])
    makes, stop = rng.choice(["=", "makes", "gives", "is"]), rng.choice([", ", "; ", ". ", "\n"])
    repeat, told = rng.random() < 0.6, rng.random() < 0.4
    values, parts = story.values(), []
    for value, step, result in zip(values, story.steps, values[1:]):
        parts.append((f"{step.label}, " if told else "") + (f"{value} " if repeat or not parts else "")
                     + f"{words[step.op]} {step.n} {makes} {result}")
    return stop.join(parts) + "."


def narrate(story, rng) -> str:
    """ "Start 14. after Ben finds 5 more: 19." """
    values = story.values()
    return f"Start {values[0]}. " + " ".join(f"{step.label}: {v}." for step, v in zip(story.steps, values[1:]))


def known_pairs(story, rng) -> list[tuple]:
    """Of all branches of a relations story: (by whom, who was invited, n, values of both), in any order."""
    pairs = []
    for branch in (story.steps, *story.branches):
        before, value = story.start_label, story.start
        for step in branch:
            result = toy.apply(value, step.op, step.n)
            pairs.append((before, step.label, step.n, value, result))
            before, value = step.label, result
    return rng.sample(pairs, len(pairs))


def look_up(story, rng) -> str:
    """Single facts in one of several notations: "Ann needs Leo + 3. Tess needs Ann + 6. ..." """
    notation = rng.choice(FACTS)
    return ". ".join(notation.format(before=before, person=person, n=n, value=value, result=result)
                     for before, person, n, value, result in known_pairs(story, rng)) + "."


def name_pairs(story, rng) -> str:
    """ "Ann Leo, Sam Eve, ..." : who was invited by whom."""
    return ", ".join(f"{person} {before}" for before, person, *_ in known_pairs(story, rng)) + "."


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer and training


def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE on words of the toy world. Every digit is a token of its own, with or without a space before it."""
    rng, texts = random.Random(seed), []
    for _ in range(4000):
        story = toy.tell(rng.choice(toy.KINDS), rng, unseen=rng.random() < 0.5, longer=rng.random() < 0.5)
        texts += [story.text, *practise(rng), *(f"[{s}]: {toy.teach(story, s, rng)}" for s in toy.STRATEGIES)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\d| ?[^\s\p{L}\d]+|\s"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=768, special_tokens=[END], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def make_batches(tokenizer, rng, size: int, steps: int):
    """Yields (tokens, targets), both (B, T) with B * T <= size, until `steps` are done.

    A row is one document, since a name means something else in the next one; a batch has documents of alike length.
    """
    end, done = tokenizer.token_to_id(END), 0
    while done < steps:
        documents = []
        for _ in range(256):
            read, trained = (tokenizer.encode(text).ids for text in practise(rng, done / steps))
            documents.append((read, trained + [end]))
        batches = [[]]
        for document in sorted(documents, key=lambda d: len(d[0]) + len(d[1])):
            if (len(batches[-1]) + 1) * (len(document[0]) + len(document[1])) > size:
                batches.append([])
            batches[-1].append(document)
        rng.shuffle(batches)
        yield from map(collate, batches[:steps - done])
        done += len(batches)


@torch.no_grad()
def spread_unseen(model, seen, seed: int) -> None:
    """Draws the embeddings of tokens that have not occurred, such as the strategy tags, anew.

    The loss has pushed them all the same way, away from every state, until they are one vector: a student
    that starts like that takes "[cot]" for "[pot]" for hundreds of steps.
    """
    rows = model.model.embed_tokens.weight  # (V, C)
    fresh = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed)) * rows[seen].std()
    rows[~seen] = fresh[~seen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out-student"),
                        help="folder (out-student); what ships is in data/student")
    parser.add_argument("--tokens", type=float, default=15e6, help="to train on, in all, padding included (15e6)")
    parser.add_argument("--batch-size", type=int, default=2048, help="tokens per step, padding included (2048)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (3e-3)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(args.seed)
    tokenizer.save(str(args.out / "tokenizer.json"))
    torch.manual_seed(args.seed)
    model = Decoder(Config(
        model_type="llama", vocab_size=tokenizer.get_vocab_size(), hidden_size=128, intermediate_size=512,
        num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        extra={"eos_token_id": tokenizer.token_to_id(END)}))
    # Muon for the matrices inside the layers, AdamW for the rest; with "match_rms_adamw" one learning rate serves both.
    inside = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [torch.optim.Muon(inside, lr=args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0)]
    steps = round(args.tokens / args.batch_size)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {tokenizer.get_vocab_size()}, {steps:,} steps")
    seen, n_tokens, started = torch.zeros(model.config.vocab_size, dtype=torch.bool), 0, time.time()
    batches = make_batches(tokenizer, random.Random(args.seed), args.batch_size, steps)
    for step, (tokens, targets) in zip(tqdm(range(1, steps + 1), disable=None), batches):
        seen[tokens] = True
        n_tokens += tokens.numel()
        scale = min(1, step / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))  # cosine, down to 2 %
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = args.lr * scale
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 500 == 0 or step == steps:
            spread_unseen(model, seen, args.seed)
            model.save_pretrained(args.out)
            seconds = time.time() - started
            tqdm.write(f"step {step}/{steps}, loss {loss.item():.3f}, {n_tokens / seconds:,.0f} tokens/s, "
                       f"{seconds / 60:.0f} min")


if __name__ == "__main__":
    main()
