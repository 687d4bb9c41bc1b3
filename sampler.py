"""Samples texts from a Decoder with a KV cache: `generate` is the whole interface. Knows nothing of text or strategies.
Read siked.self_generate before, which calls it, and model.py's Attention after: there the cache is read.

    texts = generate(model, prompts, n=10, max_new_tokens=512, temperature=0.7, top_p=0.95, stop_ids=[2])
    texts[0][3]                           # sample 3 of prompt 0: a list of ids, without the stop id
    is_finished(texts[0][3], 512)         # False: it was cut off at 512 tokens and must not be trained on

How the batch is kept full: `plan` is called before, the others are comments in the loop of `decode`:
    plan        The samples to draw are put in groups whose prompts begin alike: most often a question under several tags.
    leave       Rows that drew a stop id, or all the tokens that they may, are finished: their texts go out.
    refill      The next groups take the free rows. `prefill` passes what the prompts of a group share through the model
                once, then the few tokens in which they differ; each such line of its cache is copied to the rows that
                draw a sample of the prompt. From then on no memory is shared: each row has keys and values of its own.
    shrink      When no group waits any more, the running rows are copied to a smaller cache now and then.
    step        One token per row is fed to the model and the next one drawn from the logits. Rows have different
                lengths: each writes to the cache at its own length, so no row is ever padded inside. On a GPU a step is
                recorded once as a CUDA graph and then replayed: its hundreds of small kernels start as one.

Dimension letters as in model.py: B rows, T tokens fed per row, S keys seen, H_kv key and value heads, D width of a head,
C width of the hidden states, V vocabulary size; and N for some of the rows.
"""
import hashlib
from collections import deque

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

FREE_SHARE = 1 / 8  # of the rows: so many must be free before a refill, which costs a small forward pass of its own
KEEP_SHARE = 3 / 4  # running rows / rows at which a copy to a smaller cache pays: it costs about as much as two steps
LOOK_AFTER = {"cpu": 1, "cuda": 16}  # steps; to look who has finished, the host waits for the device
BLOCK = {"cpu": 1, "cuda": 128}  # keys; a step looks at whole blocks of them, so that on a GPU few graphs serve all steps


class KVCache:
    """The keys and values of every layer for the tokens that each row has passed through the model.

    Key j of a row sits at its place j, whatever the other rows' lengths are. Places from `lengths` on hold zeros or
    leftovers, of padding or of a row's former text: no query sees them before they are overwritten. They are never
    uninitialised memory, because attention multiplies hidden values by 0, and 0 * NaN is NaN.
    """

    def __init__(self, rows: int, capacity: int, device="cpu", block: int = 1):
        self.block = block        # S, the number of keys that a pass looks at, is a multiple of it
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # (B,) tokens held per row
        self.longest = 0          # max(lengths), kept on the host: reading it from a device would make every step wait
        self.capacity = capacity  # tokens per row that the buffers have room for
        self.buffers = []         # one [keys, values] per layer, (B, H_kv, capacity, D) each

    def reserve(self, layer_index: int, k, v) -> list:
        """The layer's [keys, values], with room for `capacity` tokens; made on first use, like k and v (any, H_kv, any, D)."""
        if layer_index == len(self.buffers):
            self.buffers.append([new.new_zeros(len(self.lengths), new.shape[1], 0, new.shape[3]) for new in (k, v)])
        pair = self.buffers[layer_index]
        missing = self.capacity - pair[0].shape[2]
        if missing > 0:
            pair[:] = [F.pad(buffer, (0, 0, 0, missing)) for buffer in pair]  # copies with zeros behind
        return pair

    def keys_seen(self, T: int) -> int:
        """S, the number of keys that a pass over T tokens per row looks at: max(lengths) + T, in whole blocks."""
        return -(-(self.longest + T) // self.block) * self.block

    def update(self, layer_index: int, k, v):
        """Writes the new k and v (B, H, T, D) behind each row's tokens; returns all keys and values (B, H, S, D).

        The layers of a forward pass are updated in order, from 0.
        """
        T, S = k.shape[2], self.keys_seen(k.shape[2])
        if layer_index == 0:  # the places are the same in all layers
            self.rows = torch.arange(len(k), device=k.device)[:, None]              # (B, 1)
            self.places = self.lengths[:, None] + torch.arange(T, device=k.device)  # (B, T)
            if S > self.capacity:
                self.capacity = max(S, self.capacity * 3 // 2)
        pair = self.reserve(layer_index, k, v)
        for buffer, new in zip(pair, (k, v)):
            buffer[self.rows, :, self.places] = new.transpose(1, 2)  # (B, T, H_kv, D): the indexed dimensions come first
        return pair[0][:, :, :S], pair[1][:, :, :S]  # views

    def advance(self, counts):
        """Counts the tokens of the last forward pass as held: an int, or (B,) if some rows were padded."""
        self.lengths += counts  # in place: a CUDA graph knows this tensor
        self.longest = self.longest + counts if isinstance(counts, int) else int(self.lengths.max())

    def put(self, rows, other: "KVCache", lines) -> None:
        """Overwrites these rows with lines of another cache: indices (N,) and (N,). A line may go to many rows."""
        self.capacity, S = max(self.capacity, other.longest), other.longest
        for layer_index, theirs in enumerate(other.buffers):
            for mine, buffer in zip(self.reserve(layer_index, *theirs), theirs):
                mine[rows, :, :S] = buffer[lines, :, :S]
        self.lengths[rows] = other.lengths[lines]
        self.longest = int(self.lengths.max())

    def select(self, lines) -> "KVCache":
        """A new cache with copies of these lines: indices (any number,), some of them left out or repeated."""
        chosen = KVCache(len(lines), self.capacity, self.lengths.device, self.block)
        chosen.put(torch.arange(len(lines), device=lines.device), self, lines)
        return chosen


def sample_next_token(logits, temperature: float, top_p: float, uniforms):
    """Draws one id per row, (B,) int64, from logits (B, V), with one number of [0, 1) per row: uniforms (B,).

    Temperature 0 (or below 1e-6, where only rounding would differ) is greedy and ignores `uniforms`. top_p (arXiv
    1904.09751) keeps the fewest ids with a total probability of at least top_p; ids exactly as likely as the last one
    kept stay too, so that the result does not depend on how a sort orders equals.
    """
    if temperature < 1e-6:
        return logits.max(-1).indices  # argmax is three times slower in bfloat16 on a CPU
    if top_p == 1:
        return invert(weigh(logits, logits.amax(-1, keepdim=True), temperature), uniforms)
    # Sorting all V would take a good part of a step on a CPU; on a GPU, asking which rows need more would stop it.
    return sample_nucleus(logits, temperature, top_p, uniforms, 32 if logits.device.type == "cpu" else logits.shape[1])


def weigh(logits, highest, temperature: float):
    """exp((logits - highest) / temperature) in float32: proportional to the probabilities of logits (B, any number), and
    1 for `highest` (B, 1), the greatest of a row, so that nothing overflows."""
    return (logits.float() - highest.float()).div_(temperature).exp_()


def sample_nucleus(logits, temperature: float, top_p: float, uniforms, looked_at: int):
    """Draws one id per row, (B,), from the nucleus of logits (B, V): the likeliest ids that reach top_p together.

    The nucleus of a trained model rarely has more than a few ids. So only the likeliest `looked_at` are sorted at first,
    and more of them for the rows where these do not suffice.
    """
    K = min(looked_at, logits.shape[1])
    everything = K == logits.shape[1]
    top, ids = logits.sort(descending=True) if everything else logits.topk(K)  # (B, K), in falling order
    highest = top[:, :1]                                                       # (B, 1)
    weights = weigh(top, highest, temperature)                                 # (B, K)
    # The sum over all ids, (B, 1): in pieces, whose weights stay in a CPU's cache, it takes half the time.
    total = weights.sum(-1, keepdim=True) if everything else sum(
        weigh(piece, highest, temperature).sum(-1, keepdim=True) for piece in logits.split(4096, dim=1))
    place = (weights.cumsum(-1) < top_p * total).sum(-1, keepdim=True)  # (B, 1): where top_p is reached; K if it is not
    lowest = top.gather(1, place.clamp(max=K - 1))                      # (B, 1): the least logit in the nucleus
    if everything:
        return invert(weigh(logits, highest, temperature).where(logits >= lowest, 0), uniforms)
    ids, order = ids.sort()  # (B, K), by id: so a uniform picks the same id, however many were looked at
    kept = weights.where(top >= lowest, 0).gather(1, order)
    tokens = ids.gather(1, invert(kept, uniforms)[:, None])[:, 0]  # (B,)
    wider = (top[:, -1:] >= lowest)[:, 0]  # (B,): top_p is not reached, or there may be more of the last one's equals
    if wider.any():
        tokens[wider] = sample_nucleus(logits[wider], temperature, top_p, uniforms[wider], 16 * K)
    return tokens


def invert(probabilities, uniforms):
    """The inverse of the distribution function: for each row the first place whose cumulative sum exceeds its uniform
    times the total, which need not be 1. A place of probability 0 does not raise the sum, so it is never the first."""
    cumulative = probabilities.cumsum(-1)                             # (B, V)
    wanted = uniforms[:, None] * cumulative[:, -1:]                   # (B, 1)
    found = torch.searchsorted(cumulative, wanted, right=True)[:, 0]  # (B,)
    return found.clamp(max=probabilities.shape[1] - 1)  # a guard: a parallel sum on a GPU need not rise evenly


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


def count_shared(prompts: list[list[int]]) -> int:
    """How many ids all of the prompts begin with."""
    return next((i for i, ids in enumerate(zip(*prompts)) if len(set(ids)) > 1), min(map(len, prompts)))


def plan(prompts: list[list[int]], n: int, batch_size: int) -> deque[list[tuple[int, int]]]:
    """Groups of samples to draw, as (prompt, sample), the longest prompts first: the last to finish should be short.

    Each prompt of a group shares at least half of its ids with the first. A group holds at most a quarter of the batch,
    so that it need not wait until the whole batch is free; a question with more samples is several groups, each of which
    feeds it anew.
    """
    alike, groups, limit = [], deque(), max(1, batch_size // 4)
    for i in sorted(range(len(prompts)), key=prompts.__getitem__):  # what begins alike becomes neighbours
        first = prompts[alike[-1][0]] if alike else []
        if not alike or 2 * count_shared([first, prompts[i]]) < max(len(first), len(prompts[i])):
            alike.append([])
        alike[-1].append(i)
    for chosen in sorted(alike, key=lambda chosen: -max(len(prompts[i]) for i in chosen)):
        jobs = [(i, sample) for i in chosen for sample in range(n)]
        groups += [jobs[start:start + limit] for start in range(0, len(jobs), limit)]
    return groups


def feed(model, cache: KVCache, texts: list[list[int]]):
    """One text per row goes through the model, padded on the right; returns the states of their last tokens (B, C),
    which for an empty text mean nothing."""
    device = cache.lengths.device
    tokens = pad_sequence([torch.tensor(text, dtype=torch.int64) for text in texts], batch_first=True).to(device)  # (B, T)
    counts = torch.tensor([len(text) for text in texts], device=device)  # (B,)
    hidden = model.hidden(tokens, cache)  # (B, T, C)
    cache.advance(counts)
    return hidden[torch.arange(len(texts), device=device), counts - 1]  # (B, C): padding comes after it


def prefill(model, prompts, groups, n_ids: int, device):
    """Feeds the prompts of these groups. Returns a cache with a line per prompt, the logits (lines, n_ids) of each
    line's next token, and the line of every sample of the groups (N,)."""
    stems, rests, stem_of, line_of = [], [], [], []
    for group in groups:
        chosen = list(dict.fromkeys(i for i, _ in group))
        texts = [prompts[i] for i in chosen]
        shared = min(count_shared(texts), min(map(len, texts)) - 1)  # at least one token is left to get logits from
        line_of += [len(rests) + chosen.index(i) for i, _ in group]
        stem_of += [len(stems)] * len(texts)
        stems.append(texts[0][:shared])
        rests += [text[shared:] for text in texts]
    cache = KVCache(len(stems), 0, device)
    if any(stems):
        feed(model, cache, stems)
    cache = cache.select(torch.tensor(stem_of, device=device))
    logits = model.output(feed(model, cache, rests))[:, :n_ids]  # (lines, n_ids)
    if logits.isnan().any():
        raise ValueError("the model's logits are nan: its weights are broken")
    return cache, logits, torch.tensor(line_of, device=device)


def decode(model, prompts, groups, B: int, max_new_tokens: int, temperature: float, top_p: float, stop_ids, seed: int,
           n_ids: int, cuda_graphs: bool):
    """Draws the samples of the groups in B rows and yields (prompt, sample, text) of each that is finished."""
    device = next(model.parameters()).device
    look_after, block = LOOK_AFTER.get(device.type, 1), BLOCK.get(device.type, 1)
    cuda_graphs = cuda_graphs and device.type == "cuda"
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)  # (number of stop ids,)
    # All the room at once, since a graph also knows the buffers; finished rows go on for up to look_after steps.
    capacity = max(map(len, prompts), default=0) + max_new_tokens + look_after + block if cuda_graphs else 0
    cache, graphs = KVCache(B, capacity, device, block), {}  # graphs: by keys seen, for the present cache
    jobs = [None] * B  # the (prompt, sample) of each row; None: the row is free
    running = torch.zeros(B, dtype=torch.bool, device=device)  # (B,)
    tokens = torch.zeros(B, dtype=torch.int64, device=device)  # (B,) the last ones drawn, which are not in the cache yet
    counts = torch.zeros(B, dtype=torch.int64, device=device)  # (B,) how many were drawn
    # One place more than needed: there a row writes that is finished and goes on until it leaves.
    drawn = torch.zeros(B, max_new_tokens + 1, dtype=torch.int64, device=device)
    uniforms = torch.zeros(B, max_new_tokens + 1, device=device)

    def draw(rows, logits):
        """The next token of these rows (N,), from logits (N, n_ids)."""
        places = counts[rows].clamp(max=max_new_tokens)                              # (N,)
        new = sample_next_token(logits, temperature, top_p, uniforms[rows, places])  # (N,)
        tokens[rows] = drawn[rows, places] = new
        counts[rows] = places + 1
        running[rows] &= ~(new[:, None] == stops).any(-1) & (places + 1 < max_new_tokens)

    def step():
        """Feeds each row's last token and draws the next."""
        hidden = model.hidden(tokens[:, None], cache)  # (B, 1, C)
        cache.advance(1)
        draw(torch.arange(B, device=device), model.output(hidden[:, 0])[:, :n_ids])

    def replay_step():
        """A step by a CUDA graph. One that sees so many keys for the first time is taken as usual, and then recorded."""
        S = cache.keys_seen(1)
        if S in graphs:
            graphs[S].replay()
            cache.longest += 1
        else:
            step()
            cache.longest -= 1  # a recording changes nothing on the device
            graph, others = torch.cuda.CUDAGraph(), list(graphs.values())
            with torch.cuda.graph(graph, pool=others[0].pool() if others else None):  # one after the other, in one memory
                step()
            graphs[S] = graph

    while True:
        # Rows do not leave one by one: only when all are done, or when the next group fits and enough rows are free for it
        # to pay, or, once no group waits, when so few run that a smaller cache pays.
        n_free = B - int(running.sum())  # free or finished
        if n_free == B or (n_free >= max(len(groups[0]), FREE_SHARE * B) if groups else n_free > (1 - KEEP_SHARE) * B):
            # leave
            free = (~running).nonzero()[:, 0]  # (n_free,)
            finished = [row for row in free.tolist() if jobs[row]]
            for row, text in zip(finished, drawn[finished].tolist()):
                end = next((i for i, token in enumerate(text[:max_new_tokens]) if token in stop_ids), max_new_tokens)
                yield *jobs[row], text[:end]
                jobs[row] = None
            cache.lengths[free] = 0  # or a free row would be the longest one, whose length all pay for
            # refill
            taken = []
            while groups and len(groups[0]) <= n_free - sum(map(len, taken)):
                taken.append(groups.popleft())
            if taken:
                begun = [job for group in taken for job in group]
                rows = free[:len(begun)]  # (N,)
                lines, logits, line_of = prefill(model, prompts, taken, n_ids, device)
                cache.put(rows, lines, line_of)
                for row, job in zip(rows.tolist(), begun):
                    jobs[row] = job
                numbers = np.stack([draw_uniforms(seed, prompts[prompt], sample, max_new_tokens) for prompt, sample in begun])
                uniforms[rows, :-1] = torch.from_numpy(numbers).to(device)  # (N, max_new_tokens)
                counts[rows], running[rows] = 0, True
                draw(rows, logits[line_of])
                continue
            if n_free == B:
                return
            # shrink
            kept = running.nonzero()[:, 0]  # (B - n_free,)
            B, cache, jobs = len(kept), cache.select(kept), [jobs[row] for row in kept.tolist()]
            running, tokens, counts, drawn, uniforms = (x[kept] for x in (running, tokens, counts, drawn, uniforms))
            graphs.clear()
        # step
        for _ in range(look_after):
            replay_step() if cuda_graphs else step()


def check_arguments(config, prompts, n, max_new_tokens, temperature, top_p, stop_ids, batch_size, n_ids):
    """Raises a ValueError that names the first unusable argument and its value."""
    V, limit = config.vocab_size, config.max_position_embeddings - max_new_tokens
    checks = [(value >= 1, f"{name} = {value} must be at least 1") for name, value in
              (("n", n), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size))]
    checks += [(0 <= temperature < float("inf"), f"temperature = {temperature} must be 0 (greedy) or positive"),
               (0 < top_p <= 1, f"top_p = {top_p} must be above 0 and at most 1 (1 = off)"),
               (1 <= n_ids <= V, f"n_ids = {n_ids} must be between 1 and the model's vocab_size = {V}")]
    checks += [(0 <= i < n_ids, f"stop id {i} can never be sampled: ids are 0 to {n_ids - 1}") for i in stop_ids]
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
             top_p: float = 1.0, stop_ids, seed: int = 0, batch_size: int = 256, n_ids: int | None = None,
             cuda_graphs: bool = True, progress=None) -> list[list[list[int]]]:
    """Samples n continuations of each prompt: [prompt][sample][token], in the caller's order, the stop id left off.

    stop_ids        every one of these ids ends a row; if there are none, every sample is max_new_tokens long
    max_new_tokens  tokens per sample, the stop id included: `is_finished` tells the samples that were cut off
    batch_size      rows (prompts x samples) decoded at once
    n_ids           ids from here on have no token and are never sampled: the tokenizer's highest id + 1, which can be
                    less than the model's padded vocabulary; None = all of the model's ids
    cuda_graphs     on a GPU, replay recorded steps: several times as fast as starting each kernel from Python
    progress        called with 1 for each sample when it leaves the batch (tqdm's `update`, say)

    A sample depends on the seed, its prompt's ids and its index among the n, not on the other prompts, their order or
    batch_size; so equal prompts in one call get equal samples. This holds on one device and in one dtype, up to
    rounding: a batch of another shape may change the last bits of the logits, which shows only if a choice between two
    ids is as close as that (in float32 about never, in bfloat16 now and then).

    The model samples in eval mode and gets its own mode back. ValueError names an argument that cannot be used.
    """
    n_ids = model.config.vocab_size if n_ids is None else n_ids
    stop_ids = set(stop_ids)
    check_arguments(model.config, prompts, n, max_new_tokens, temperature, top_p, stop_ids, batch_size, n_ids)
    samples = [[None] * n for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        for prompt, sample, text in decode(model, prompts, plan(prompts, n, batch_size), min(batch_size, n * len(prompts)),
                                           max_new_tokens, temperature, top_p, stop_ids, seed, n_ids, cuda_graphs):
            samples[prompt][sample] = text
            if progress:
                progress(1)
    finally:
        model.train(was_training)
    return samples
