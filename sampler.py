"""Samples texts from a Decoder with a KV cache. `generate` knows ids alone; `Student`, at the end,
is a model with its tokenizer.

    texts = generate(model, prompts, n=10, max_new_tokens=512, temperature=0.7, top_p=0.95,
                     stop_ids=[2])
    texts[0][3]    # sample 3 of prompt 0: a list of ids, without the stop id

A prompt is a pair (stem, tail). The stem is the question in its template, without the last id. The
tail is that id, then the tag if a strategy is forced. So no tail is empty: the model's state at the
end of the tail gives the text's first token. All prompts of a question have one stem.

Texts differ in length, so the batch is kept full. `stream` does, in this order:
    refill  The next samples take the free rows. Each of their stems is fed once. Its cache is
            copied for each of its samples, and one pass feeds the tails of all samples.
    shrink  When no sample waits any more, the running rows move to a smaller batch now and then.
    step    One token per row is drawn and fed. Each row writes to the cache at its own length.
    leave   A row that drew a stop id, or max_new_tokens ids, is free.

Dimension letters as in model.py: B rows, T tokens fed per row, S keys seen, H_kv key and value
heads, D width of a head, C width of the hidden states, V vocabulary size; N some of the rows.
Read siked.py before, and Attention in model.py after: there the cache is read.
"""
import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data.files import read_json, write_text
from model import Decoder

REFILL_SHARE = 1 / 8  # of the rows: so many are free before a refill, which costs a pass of its own
SHRINK_SHARE = 1 / 4  # of the rows: so many are free before the others move to a smaller batch
BLOCK = {"cpu": 1, "cuda": 128}  # S is a multiple of it: few CUDA graphs serve all, see `decode`


class KVCache:
    """The keys and values of every layer, for the tokens that each row has fed.

    Key j of a row is at its place j, whatever the other rows' lengths are. From `lengths` on there
    are zeros or leftovers, which the mask hides: they are multiplied by 0. So they must be numbers,
    for 0 * NaN is NaN.
    """

    def __init__(self, config, rows, capacity, like, block=1):
        """capacity: tokens per row. like: a tensor of the dtype and device. S is a multiple of
        block."""
        self.block = block
        room = capacity + block  # S is rounded up
        shape = (2, rows, config.num_key_value_heads, room, config.head_dim)
        self.layers = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=like.device)     # (B,)
        self.longest = 0  # max(lengths), kept here: to read it from a GPU would make the host wait

    def keys_seen(self, T):
        """S, the number of keys that a pass over T tokens per row looks at."""
        return math.ceil((self.longest + T) / self.block) * self.block

    def update(self, index, k, v):
        """Writes a layer's k and v (B, H_kv, T, D) behind each row's tokens.
        Returns all its keys and values, (B, H_kv, S, D) each."""
        T = k.shape[2]
        S = self.keys_seen(T)
        keys, values = self.layers[index]                                           # views
        rows = torch.arange(len(k), device=k.device)[:, None]                       # (B, 1)
        places = self.lengths[:, None] + torch.arange(T, device=k.device)           # (B, T)
        # Indices around a slice: their dimensions, (B, T), come first.
        keys[rows, :, places] = k.transpose(1, 2)                               # (B, T, H_kv, D)
        values[rows, :, places] = v.transpose(1, 2)
        return keys[:, :, :S], values[:, :, :S]

    def set_lengths(self, rows, lengths):
        self.lengths[rows] = lengths
        self.longest = int(self.lengths.max())

    def put(self, rows, other, other_rows):
        """Overwrites N rows with N rows of another cache. One of these may go to many of ours."""
        S = other.longest
        for mine, theirs in zip(self.layers, other.layers):
            mine[:, rows, :, :S] = theirs[:, other_rows, :, :S]
        self.set_lengths(rows, other.lengths[other_rows])

    def keep(self, rows):
        """Drops all other rows."""
        for i, layer in enumerate(self.layers):  # one by one: no second cache beside this one
            self.layers[i] = layer[:, rows]
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max())


# --------------------------------------------------------------------------------------------------
# one token


def sample_next_token(logits, temperature, top_p, uniforms, looked_at=32):
    """Draws one id per row, (B,), from logits (B, V), with one number of [0, 1) per row (B,).

    Temperature 0 is greedy. top_p (arXiv 1904.09751) keeps the nucleus: the fewest ids with a total
    probability of at least top_p. The nucleus is mostly small, and to sort all V takes long. So a
    CPU looks at the M = `looked_at` likeliest first. A GPU sorts all: to check whether M were
    enough would make the host wait.
    """
    if temperature < 1e-6:
        return logits.max(-1).indices  # argmax is three times slower in bfloat16 on a CPU
    if top_p == 1:  # all ids, so there is nothing to sort
        return draw_places((logits.float() / temperature).softmax(-1), uniforms)
    V = logits.shape[1]
    M = V if logits.is_cuda else min(looked_at, V)
    top, ids = logits.topk(M)                                               # (B, M), falling
    highest = top[:, :1].float()                                                    # (B, 1)

    def weigh(values):
        """In proportion to their probabilities; 1 for the highest logit, so nothing overflows."""
        return ((values.float() - highest) / temperature).exp()

    pieces = logits.split(V if logits.is_cuda else 4096, dim=1)  # they stay in a CPU's cache
    total = sum(weigh(piece).sum(-1, keepdim=True) for piece in pieces)             # (B, 1)
    probabilities = weigh(top) / total                                              # (B, M)
    before = probabilities.cumsum(-1) - probabilities     # (B, M): probability of all likelier ids
    inside = before < top_p                                                         # (B, M)
    ids, order = ids.sort()  # topk's order of equally likely ids depends on M; the draw must not
    weights = probabilities.where(inside, 0).gather(1, order)                       # (B, M)
    places = draw_places(weights, uniforms)                                         # (B,)
    tokens = ids.gather(1, places[:, None])[:, 0]                                   # (B,)
    wide = inside[:, -1]  # (B,): the nucleus may reach beyond these M
    if M < V and wide.any():
        tokens[wide] = sample_next_token(logits[wide], temperature, top_p, uniforms[wide], 16 * M)
    return tokens


def draw_places(weights, uniforms):
    """Draws one place per row of weights (B, M) in proportion to them: (B,). It is the first where
    their cumulative sum exceeds the row's number of [0, 1) times the total."""
    cumulative = weights.cumsum(-1)                                                 # (B, M)
    wanted = uniforms[:, None] * cumulative[:, -1:]                                 # (B, 1)
    places = torch.searchsorted(cumulative, wanted, right=True)                     # (B, 1)
    return places[:, 0].clamp(max=weights.shape[1] - 1)


def make_generator(seed: int, prompt, sample: int):
    """A text's own generator, which depends on these arguments alone. So a text does not depend on
    the batch that it happens to be in."""
    stem, tail = prompt
    key = f"{seed} {sample} {' '.join(map(str, stem + tail))}"
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


# --------------------------------------------------------------------------------------------------
# a batch


def feed(model, cache, texts):
    """One text per row goes through the model, padded on the right. Returns the state of each
    text's last token, (B, C); that of an empty text means nothing."""
    device = cache.lengths.device
    tensors = [torch.tensor(text, dtype=torch.int64) for text in texts]
    tokens = pad_sequence(tensors, batch_first=True).to(device)                     # (B, T)
    counts = torch.tensor([len(text) for text in texts], device=device)             # (B,)
    hidden = model.hidden(tokens, cache)                                            # (B, T, C)
    rows = torch.arange(len(texts), device=device)
    cache.set_lengths(rows, cache.lengths + counts)
    return hidden[rows, counts - 1]


class Batch:
    """The tensors of the rows that are decoded together, on the model's device."""

    def __init__(self, model, rows, capacity, draw):
        """capacity: tokens per row. draw: function(logits (B, V), uniforms (B,)) -> ids (B,)"""
        weight = model.output_weight()
        self.model = model
        self.draw = draw
        block = BLOCK.get(weight.device.type, 1)
        self.cache = KVCache(model.config, rows, capacity, weight, block)
        self.hidden = weight.new_zeros(rows, model.config.hidden_size)              # (B, C)
        self.tokens = torch.zeros_like(self.cache.lengths)                          # (B,)
        self.uniforms = torch.zeros(rows, device=weight.device)                     # (B,)
        self.stems = []         # those that were fed last
        self.stem_cache = None  # a row for each of them
        self.graphs = {}  # S -> a recorded step
        self.pool = torch.cuda.graph_pool_handle() if weight.is_cuda else None

    def new_cache(self, rows, capacity):
        return KVCache(self.model.config, rows, capacity, self.hidden)

    def put(self, rows, prompts):
        """Begins N prompts (stem, tail) in these rows. Each distinct stem is fed once; if all of
        them were among the last ones fed, none is."""
        stems, tails = zip(*prompts)
        if not set(stems) <= set(self.stems):
            self.stems = list(dict.fromkeys(stems))
            self.stem_cache = None  # the old one goes before the new one comes
            self.stem_cache = self.new_cache(len(self.stems), max(map(len, stems)))
            if any(stems):  # the stem of a prompt of one id is empty
                feed(self.model, self.stem_cache, self.stems)
        cache = self.new_cache(len(tails), self.stem_cache.longest + max(map(len, tails)))
        stem_rows = [self.stems.index(stem) for stem in stems]
        all_rows = slice(None)
        cache.put(all_rows, self.stem_cache, stem_rows)
        states = feed(self.model, cache, tails)                                     # (N, C)
        if states.isnan().any():
            raise ValueError("the model computes nan: its weights are broken")
        self.cache.put(rows, cache, all_rows)
        self.hidden[rows] = states

    def free(self, rows):
        """Free rows decode on, to no purpose, from place 0, so that they do not make S larger.

        They cannot run past the cache's end. Within max_new_tokens steps every row in use ends.
        Before that a refill sets the free ones back to place 0; or no sample waits, and the loop
        ends."""
        self.cache.set_lengths(rows, 0)

    def keep(self, rows):
        """Drops all other rows."""
        self.cache.keep(rows)
        self.hidden = self.hidden[rows]
        self.tokens = self.tokens[rows]
        self.uniforms = self.uniforms[rows]
        self.graphs = {}

    def step(self):
        """Draws the next token of each row from its last state, and feeds it. All in place, so that
        it can be recorded."""
        self.tokens.copy_(self.draw(self.model.output(self.hidden), self.uniforms)) # (B,)
        hidden = self.model.hidden(self.tokens[:, None], self.cache)                # (B, 1, C)
        self.hidden.copy_(hidden[:, 0])
        self.cache.lengths += 1

    def decode(self, uniforms, cuda_graphs):
        """Takes a step, with a number of [0, 1) per row. Returns the id that each row has drawn.

        With a CUDA graph its hundreds of small kernels start as one. The first step with S keys is
        taken as usual. Then it is recorded for the next ones; recording computes nothing.
        """
        self.uniforms.copy_(torch.tensor(uniforms))
        S = self.cache.keys_seen(1)
        if S in self.graphs:
            self.graphs[S].replay()
        else:
            self.step()
            if cuda_graphs and self.tokens.is_cuda:
                self.graphs[S] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graphs[S], pool=self.pool):  # one memory for all graphs
                    self.step()  # noted down, not done: no tensor changes
        self.cache.longest += 1  # a number of Python, which a recorded step leaves as it is
        return self.tokens.tolist()


def generate(model, prompts, *, n=1, **settings):
    """Samples n texts for each prompt: [prompt][sample] -> list of ids, the stop id left off. The
    settings are those of `stream`."""
    samples = [[None] * n for _ in prompts]
    for i, sample, text in stream(model, prompts, n=n, **settings):
        samples[i][sample] = text
    return samples


@torch.inference_mode()
def stream(model, prompts, *, n=1, max_new_tokens, temperature=0.0, top_p=1.0, stop_ids, seed=0,
           batch_size=256, n_ids=None, is_over=None, cuda_graphs=True, progress=None):
    """The same, a text at a time: yields (prompt's index, sample, ids) as they come to an end.

    prompts         lists of ids, or pairs (stem, tail): a refill feeds equal stems once
    max_new_tokens  ids per text, the stop id included. The stop id is left off: a text that still
                    has max_new_tokens ids was cut off
    batch_size      rows decoded together
    n_ids           ids from here on have no token (a padded vocabulary) and are never drawn
    is_over         function(prompt's index, ids of a text) -> does it end here? The stop ids end it
                    anyway
    progress        name of a progress bar

    A text depends only on the seed, its prompt and its index among the n. But another batch may
    change the last bits of the logits. ValueError names an unusable argument.
    """
    prompts = [split_prompt(prompt) for prompt in prompts]
    check_arguments(model, prompts, n, max_new_tokens, temperature, top_p, stop_ids, batch_size)

    def draw(logits, uniforms):
        return sample_next_token(logits[:, :n_ids], temperature, top_p, uniforms)

    waiting = line_up(prompts, n)
    running = {}  # row -> (index of the prompt, sample, text, generator)
    B = min(batch_size, len(waiting))
    longest = max((len(stem + tail) for stem, tail in prompts), default=0)
    batch = Batch(model, B, longest + max_new_tokens, draw)
    disable = None if progress else True  # None: no bar where there is no terminal
    bar = tqdm(total=len(waiting), desc=progress, unit="text", leave=False, disable=disable)
    while waiting or running:
        free = [row for row in range(B) if row not in running]
        if waiting and len(free) >= REFILL_SHARE * B:
            batch.free(free)  # back to place 0, also those that no sample takes
            rows = free[:len(waiting)]
            begun = []
            for row in rows:
                i, sample = waiting.pop()
                running[row] = (i, sample, [], make_generator(seed, prompts[i], sample))
                begun.append(prompts[i])
            batch.put(rows, begun)
        elif not waiting and len(free) > SHRINK_SHARE * B:
            batch.keep(list(running))
            running = dict(enumerate(running.values()))
            B = len(running)
        uniforms = [0.0] * B  # free rows draw, too, to no purpose
        for row, (*_, generator) in running.items():
            uniforms[row] = generator.random(dtype=np.float32)
        for row, token in enumerate(batch.decode(uniforms, cuda_graphs)):
            if row not in running:
                continue
            i, sample, text, _ = running[row]
            if token not in stop_ids:
                text.append(token)
            over = token in stop_ids or len(text) == max_new_tokens
            if over or is_over is not None and is_over(i, text):
                del running[row]
                batch.free(row)
                bar.update()
                yield i, sample, text
    bar.close()


def line_up(prompts, n):
    """All (prompt, sample). They are taken from the end, so the longest prompts stand there: these
    tend to get long texts, and the batch should not end on one. Equal stems stand together, and so
    do, behind one stem, tails of equal length."""
    def key(i):
        stem, tail = prompts[i]
        return len(stem), stem, len(tail), tail

    order = sorted(range(len(prompts)), key=key)
    return [(i, sample) for i in order for sample in range(n)]


def split_prompt(prompt):
    """A prompt as a pair (stem, tail) of tuples. The tail of a plain list is its last id."""
    if isinstance(prompt, tuple):
        stem, tail = prompt
        return tuple(stem), tuple(tail)
    return tuple(prompt[:-1]), tuple(prompt[-1:])


def check_arguments(model, prompts, n, max_new_tokens, temperature, top_p, stop_ids, batch_size):
    """Raises a ValueError that names the first unusable argument and its value."""
    last_id = model.config.vocab_size - 1
    room = model.config.max_position_embeddings - max_new_tokens
    check_range("n", n, 1, math.inf)
    check_range("max_new_tokens", max_new_tokens, 1, math.inf)
    check_range("batch_size", batch_size, 1, math.inf)
    check_range("temperature", temperature, 0, 1e9)
    check_range("top_p", top_p, 1e-9, 1)
    for id in stop_ids:
        check_range("stop id", id, 0, last_id)
    for i, (stem, tail) in enumerate(prompts):
        ids = stem + tail
        check_range(f"the length of prompt {i}", len(ids), 1, room)
        check_range(f"the length of the tail of prompt {i}", len(tail), 1, room)
        check_range(f"an id of prompt {i}", min(ids), 0, last_id)
        check_range(f"an id of prompt {i}", max(ids), 0, last_id)


def check_range(name, value, least, greatest):
    if not least <= value <= greatest:
        raise ValueError(f"{name} = {value} must be between {least} and {greatest}")


# --------------------------------------------------------------------------------------------------
# a student


def use_device(name):
    """Makes a GPU the current one, as CUDA graphs need. ValueError if there is no such device."""
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)


def read_stop_ids(folder, config):
    """Each of these ends a text; the first is the end token that is trained."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    stop_ids = []
    for fields in (config, generation):
        ids = fields.get("eos_token_id")
        if isinstance(ids, int):
            ids = [ids]
        stop_ids += ids or []
    return list(dict.fromkeys(stop_ids))  # each once


class Student:
    """A model with its tokenizer: questions in, texts out.

    Prompt and target are encoded separately and joined as ids, in training and in sampling alike:
    so a forced "[cot]:" is a prefix of what was trained. No tag ends in a space: a space belongs to
    the next word's token.
    """

    def __init__(self, folder, max_new_tokens=512, rows=256, dtype=torch.float32, device="cpu",
                 weights_dtype=torch.float32, template="{question}\n"):
        """Reads a Hugging Face folder. FileNotFoundError or ValueError names what is wrong.

        rows: texts written at once. dtype: what sampling computes in. weights_dtype: to be trained
        they must be float32. template: of a prompt; a chat model's has tags.
        """
        folder = Path(folder)
        self.folder = folder
        self.max_new_tokens = max_new_tokens
        self.rows = rows
        self.dtype = dtype
        self.model = Decoder.from_pretrained(folder, weights_dtype, device)
        path = folder / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_buffer(path.read_bytes())
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        self.tokenizer.no_truncation()  # some files hold the settings of another training
        self.tokenizer.no_padding()
        # "<end>" in a question or rationale is encoded like other characters: that is what True
        # means. Only in the template it is the end token.
        self.tokenizer.encode_special_tokens = True
        added = self.tokenizer.get_added_tokens_decoder()
        self.specials = {token.content: id for id, token in added.items() if token.special}
        either = "|".join(map(re.escape, self.specials)) or "$."  # which matches nothing
        self.template = re.split(f"({either})", template)
        self.stop_ids = read_stop_ids(folder, self.model.config.extra)
        self.n_ids = max(self.tokenizer.get_vocab().values()) + 1
        known = min(self.n_ids, self.model.config.vocab_size)
        if not self.stop_ids or min(self.stop_ids) < 0 or max(self.stop_ids) >= known:
            raise ValueError(f"{folder}: eos_token_id in config.json and generation_config.json is "
                             f"{self.stop_ids}; model and tokenizer know {known} ids")

    def save(self, folder):
        """The weights come last: where model.safetensors is, the rest is too."""
        write_text(folder / "tokenizer.json", self.tokenizer.to_str(pretty=True))
        write_text(folder / "generation_config.json", json.dumps({"eos_token_id": self.stop_ids}))
        self.model.save_pretrained(folder)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt(self, question, strategy=None):
        """The template with the question and, if the strategy is forced, its tag, as a pair of
        lists of ids (stem, tail). The tail is the template's last id, then the tag. Gemma's <bos>
        comes in front, also if the template leaves it out."""
        ids = []
        for part in self.template:
            if part in self.specials:
                ids.append(self.specials[part])
            else:
                ids += self.encode(part.replace("{question}", question.text))
        first = self.first_ids()
        if ids[:len(first)] != first:
            ids = first + ids
        tail = ids[-1:]
        if strategy is not None:
            tail += self.encode(f"[{strategy}]:")
        return ids[:-1], tail

    def first_ids(self):
        """What comes before every text, <bos> or nothing; some tokenizers also add an end token."""
        return [id for id in self.tokenizer.encode("").ids if id not in self.stop_ids]

    def target(self, rationale):
        """The tag, the rationale and the end token: what the loss is computed on."""
        tag = self.encode(f"[{rationale.strategy}]:")
        return tag + self.encode(" " + rationale.text) + self.stop_ids[:1]

    def answer(self, asked, **settings):
        """Texts for each (question, strategy or None): [asked][sample] -> (text, finished). The
        settings go to `generate`."""
        prompts = [self.prompt(question, strategy) for question, strategy in asked]
        samples = generate(
            self.model.cast(self.dtype),
            prompts,
            max_new_tokens=self.max_new_tokens,
            stop_ids=self.stop_ids,
            batch_size=self.rows,
            n_ids=self.n_ids,
            **settings,
        )
        answers = []
        for row in samples:
            pairs = []
            for ids in row:
                text = self.tokenizer.decode(ids).strip()
                finished = len(ids) < self.max_new_tokens
                pairs.append((text, finished))
            answers.append(pairs)
        return answers
