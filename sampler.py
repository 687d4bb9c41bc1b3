"""Samples text from a decoder: token ids in, token ids out. It knows nothing of tokenizers or strategies.

    texts = generate(model, prompts, n=10, max_new_tokens=512, temperature=0.7, top_p=0.95, stop_ids=[2])
    texts[0][3]                           # sample 3 of prompt 0: a list of ids, without the stop id
    is_finished(texts[0][3], 512)         # False: it was cut off at 512 tokens and must not be trained on

How a batch is decoded:
    prefill     The prompts, padded on the right, go through the model once each. That fills a KV cache and gives the
                logits of every prompt's first new token.
    share       Each prompt's line of the cache is copied to its n samples: one prefill, n rows.
    step        One token per row is drawn from the logits and fed to the model, which returns the next logits. Rows
                have different lengths: each writes to the cache at its own length, so no row is ever padded inside.
    compaction  A row that drew a stop id is finished. It still takes part in the steps until enough rows have finished
                to make it worth copying the others into a smaller cache.

Dimension letters as in model.py: B rows, T tokens fed per row, S keys seen, H key and value heads, D width of a head,
V vocabulary size.
"""
import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

COMPACT_BELOW = 3 / 4  # running rows / rows in the cache at which a copy pays: one costs about as much as two steps
ROOM = 64              # tokens; a cache starts with room for so many new ones and grows from there


class KVCache:
    """The keys and values of every layer for the tokens that each row has passed through the model.

    Key j of a row sits at its place j, whatever the other rows' lengths are. Places from `lengths` on hold zeros or
    leftovers of padding: no query sees them before they are overwritten. They are never uninitialised memory, because
    attention multiplies hidden values by 0, and 0 * NaN is NaN.
    """

    def __init__(self, rows: int, capacity: int, device="cpu"):
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # (B,) tokens held per row
        self.longest = 0          # max(lengths), kept on the host: reading it from a device would make every step wait
        self.capacity = capacity  # tokens per row that the buffers have room for
        self.buffers = []         # one [keys, values] per layer, (B, H, capacity, D) each

    def update(self, layer_index: int, k, v):
        """Writes the new k and v (B, H, T, D) behind each row's tokens; returns all keys and values (B, H, S, D).

        S = max(lengths) + T. The layers of a forward pass are updated in order, from 0.
        """
        B, H, T, D = k.shape
        S = self.longest + T
        if layer_index == 0:  # the places are the same in all layers
            self.rows = torch.arange(B, device=k.device)[:, None]                   # (B, 1)
            self.places = self.lengths[:, None] + torch.arange(T, device=k.device)  # (B, T)
            if S > self.capacity:
                self.capacity = max(S, self.capacity * 3 // 2)
        if layer_index == len(self.buffers):  # the first forward pass
            self.buffers.append([k.new_zeros(B, H, 0, D), v.new_zeros(B, H, 0, D)])
        pair = self.buffers[layer_index]
        for i, new in enumerate((k, v)):
            if pair[i].shape[2] < self.capacity:
                pair[i] = F.pad(pair[i], (0, 0, 0, self.capacity - pair[i].shape[2]))  # a copy with zeros behind
            pair[i][self.rows, :, self.places] = new.transpose(1, 2)  # (B, T, H, D): the indexed dimensions come first
        return pair[0][:, :, :S], pair[1][:, :, :S]  # views

    def advance(self, counts):
        """Counts the tokens of the last forward pass as held: an int, or (B,) if some rows were padded."""
        self.lengths = self.lengths + counts
        self.longest = self.longest + counts if isinstance(counts, int) else int(self.lengths.max())

    def select(self, rows) -> "KVCache":
        """A new cache with copies of these rows: indices (any number,), some of them left out or repeated."""
        chosen = KVCache(len(rows), self.capacity)
        chosen.lengths = self.lengths[rows]
        chosen.longest = int(chosen.lengths.max())
        chosen.buffers = [[buffer.index_select(0, rows) for buffer in pair] for pair in self.buffers]
        return chosen


def nucleus_threshold(probabilities, top_p: float, looked_at: int = 16):
    """(B, V) -> (B, 1): the smallest probability in each row's nucleus, the fewest ids that together reach top_p.

    The nucleus of a trained model rarely has more than a few ids, while sorting all V would take a good part of a step.
    So only the likeliest `looked_at` ids are sorted at first, and more of them for the rows where these do not suffice.
    """
    top = probabilities.topk(min(looked_at, probabilities.shape[1])).values  # (B, K), in falling order
    place = (top.cumsum(-1) < top_p).sum(-1, keepdim=True)  # (B, 1): where the sum reaches top_p; K if it does not
    threshold = top.gather(1, place.clamp(max=top.shape[1] - 1))  # (B, 1)
    wider = place[:, 0] == top.shape[1]                           # (B,)
    if looked_at < probabilities.shape[1] and wider.any():
        threshold[wider] = nucleus_threshold(probabilities[wider], top_p, 16 * looked_at)
    return threshold


def sample_next_token(logits, temperature: float, top_p: float, uniforms):
    """Draws one id per row, (B,) int64, from logits (B, V), with one number of [0, 1) per row: uniforms (B,).

    Temperature 0 (or below 1e-6, where only rounding would differ) is greedy and ignores `uniforms`. top_p (arXiv
    1904.09751) keeps the fewest ids with a total probability of at least top_p; ids exactly as likely as the last one
    kept stay too, so that the result does not depend on how a sort orders equals.
    """
    if temperature < 1e-6:
        return logits.argmax(-1)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the maximum is 0: nothing overflows
    probabilities = torch.softmax(logits, dim=-1)  # (B, V)
    if top_p < 1:
        probabilities = probabilities.where(probabilities >= nucleus_threshold(probabilities, top_p), 0)
    # Inverse of the distribution function: the first id whose cumulative sum exceeds uniform * total. An id of
    # probability 0 does not raise the sum, so it is never the first.
    cumulative = probabilities.cumsum(-1)                 # (B, V)
    wanted = uniforms[:, None] * cumulative[:, -1:]       # (B, 1); the kept ids' total need not be 1
    found = torch.searchsorted(cumulative, wanted, right=True)[:, 0]  # (B,)
    return found.clamp(max=logits.shape[-1] - 1)  # a guard: a parallel sum on a GPU need not rise evenly


def draw_uniforms(seed: int, prompt: list[int], sample: int, count: int):
    """Numbers of [0, 1), (count,) float32, that depend on these arguments only: no global random state is used."""
    text = f"{seed} {sample} {' '.join(map(str, prompt))}"
    key = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(key, "little")).random(count, dtype=np.float32)


def is_finished(sample: list[int], max_new_tokens: int) -> bool:
    """True if a sample of `generate` ended with a stop id, False if it was cut off at max_new_tokens.

    The stop id counts as one of the new tokens, so exactly the samples without one are max_new_tokens long.
    """
    return len(sample) < max_new_tokens


def prefill(model, prompts: list[list[int]], n_tokens: int):
    """Feeds the prompts; returns their cache and the logits (B, n_tokens) of each prompt's next token."""
    device = next(model.parameters()).device
    tokens = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)  # (B, T)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)                        # (B,)
    cache = KVCache(len(prompts), tokens.shape[1] + ROOM, device)
    hidden = model.hidden(tokens, cache)  # (B, T, C)
    cache.advance(lengths)
    last = hidden[torch.arange(len(prompts), device=device), lengths - 1]  # (B, C): padding comes after it
    logits = model.output(last)[:, :n_tokens]  # (B, n_tokens)
    if logits.isnan().any():
        raise ValueError("the model's logits are nan: its weights are broken")
    return cache, logits


def decode(model, cache, logits, uniforms, stop_ids, temperature: float, top_p: float, progress) -> list[list[int]]:
    """Continues every row of the cache from its logits (B, n_tokens), by up to uniforms.shape[1] tokens."""
    (B, max_new_tokens), device = uniforms.shape, logits.device
    n_tokens = logits.shape[1]
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)  # (number of stop ids,)
    drawn = torch.zeros(B, max_new_tokens, dtype=torch.int64, device=device)  # of all rows, also those that have left
    rows = torch.arange(B, device=device)  # (B,), shrinks: which line of `drawn` each row in the cache belongs to
    running = torch.ones(B, dtype=torch.bool, device=device)  # (B,), shrinks: not finished
    n_running = B
    for step in range(max_new_tokens):
        tokens = sample_next_token(logits, temperature, top_p, uniforms[rows, step])  # (B,)
        drawn[rows, step] = tokens  # a finished row goes on writing behind its stop id, where nobody reads
        running = running & ~torch.isin(tokens, stops)
        before, n_running = n_running, int(running.sum())
        if progress and n_running < before:
            progress(before - n_running)
        if n_running == 0 or step == max_new_tokens - 1:
            break
        if n_running <= COMPACT_BELOW * len(rows):
            kept = running.nonzero()[:, 0]  # (n_running,)
            cache, rows, tokens, running = cache.select(kept), rows[kept], tokens[kept], running[kept]
        hidden = model.hidden(tokens[:, None], cache)  # (B, 1, C)
        cache.advance(1)
        logits = model.output(hidden[:, 0])[:, :n_tokens]  # (B, n_tokens)
    if progress and n_running:
        progress(n_running)  # cut off
    lines = drawn.tolist()
    ends = [next((i for i, token in enumerate(line) if token in stop_ids), max_new_tokens) for line in lines]
    return [line[:end] for line, end in zip(lines, ends)]


def check_arguments(config, prompts, n, max_new_tokens, temperature, top_p, stop_ids, batch_size, n_tokens):
    """Raises a ValueError that names the first unusable argument and its value."""
    V, limit = config.vocab_size, config.max_position_embeddings - max_new_tokens
    checks = [(value >= 1, f"{name} = {value} must be at least 1") for name, value in
              (("n", n), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size))]
    checks += [(0 <= temperature < float("inf"), f"temperature = {temperature} must be 0 (greedy) or positive"),
               (0 < top_p <= 1, f"top_p = {top_p} must be above 0 and at most 1 (1 = off)"),
               (1 <= n_tokens <= V, f"n_tokens = {n_tokens} must be between 1 and the model's vocab_size = {V}")]
    checks += [(0 <= i < n_tokens, f"stop id {i} can never be sampled: ids are 0 to {n_tokens - 1}") for i in stop_ids]
    for i, prompt in enumerate(prompts):
        wrong = [token for token in prompt if not 0 <= token < V]
        checks += [(len(prompt) > 0, f"prompt {i} is empty: there is nothing to continue"),
                   (not wrong, f"prompt {i} holds the ids {wrong[:3]}: the model's are 0 to {V - 1}"),
                   (len(prompt) <= limit, f"prompt {i} has {len(prompt)} tokens, at most {limit} fit: "
                    f"max_position_embeddings = {limit + max_new_tokens} less max_new_tokens = {max_new_tokens}")]
    for is_met, message in checks:
        if not is_met:
            raise ValueError(message)


@torch.inference_mode()
def generate(model, prompts: list[list[int]], *, n: int = 1, max_new_tokens: int, temperature: float = 0.0,
             top_p: float = 1.0, stop_ids, seed: int = 0, batch_size: int = 256, n_tokens: int | None = None,
             progress=None) -> list[list[list[int]]]:
    """Samples n continuations of each prompt: [prompt][sample][token], in the caller's order, the stop id left off.

    stop_ids        every one of these ids ends a row; if there are none, every sample is max_new_tokens long
    max_new_tokens  tokens per sample, the stop id included: `is_finished` tells the samples that were cut off
    batch_size      rows (prompts x samples) decoded at once
    n_tokens        ids from here on have no token and are never sampled: the tokenizer's highest id + 1, which can be
                    less than the model's padded vocabulary; None = all of the model's ids
    progress        called with the number of samples that finished since its last call (tqdm's `update`, say)

    A sample depends on the seed, its prompt's ids and its index among the n, not on the other prompts, their order or
    batch_size; so equal prompts in one call get equal samples. This holds on one device and in one dtype, up to
    rounding: a batch of another shape may change the last bits of the logits, which shows only if a choice between two
    ids is as close as that (in float32 about never, in bfloat16 now and then).

    The model samples in eval mode and gets its own mode back. ValueError names an argument that cannot be used.
    """
    n_tokens = model.config.vocab_size if n_tokens is None else n_tokens
    stop_ids = set(stop_ids)
    check_arguments(model.config, prompts, n, max_new_tokens, temperature, top_p, stop_ids, batch_size, n_tokens)
    samples = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # alike lengths together, the largest first
    prompts_at_once = max(1, batch_size // n)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), prompts_at_once):
            chosen = order[start:start + prompts_at_once]
            prompt_cache, prompt_logits = prefill(model, [prompts[i] for i in chosen], n_tokens)
            jobs = [(line, sample) for line in range(len(chosen)) for sample in range(n)]
            for first in range(0, len(jobs), batch_size):  # more than one round only if n > batch_size
                batch = jobs[first:first + batch_size]
                lines = torch.tensor([line for line, _ in batch], device=prompt_logits.device)  # (B,)
                uniforms = np.stack([draw_uniforms(seed, prompts[chosen[line]], sample, max_new_tokens)
                                     for line, sample in batch])  # (B, max_new_tokens)
                texts = decode(model, prompt_cache.select(lines), prompt_logits[lines],
                               torch.from_numpy(uniforms).to(lines.device), stop_ids, temperature, top_p, progress)
                for (line, _), text in zip(batch, texts):
                    samples[chosen[line]].append(text)
    finally:
        model.train(was_training)
    return samples
