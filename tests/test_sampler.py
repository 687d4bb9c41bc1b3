"""Tests of sampler.py:  python -m pytest tests/test_sampler.py

The model is a tiny random decoder in float32. Its fresh weights are scaled up so that its likeliest
next id depends on the text and probabilities differ: with nearly uniform ones a broken cache would
change too little to be seen.
"""
import copy
import dataclasses
import json
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import sampler
from data.answers import STRATEGIES
from data.files import Question, Rationale
from model import Config, Decoder
from sampler import KVCache, Student, generate, make_generator, sample_next_token

V = 50
SAMPLED = {"temperature": 1.0, "top_p": 0.9}


def make_model(vocab_size, **settings):
    torch.manual_seed(0)
    config = Config("llama", vocab_size=vocab_size, hidden_size=24, intermediate_size=32,
                    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                    max_position_embeddings=128, **settings)
    decoder = Decoder(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 2:
                parameter *= 20
    return decoder


@pytest.fixture(scope="module")
def model():
    return make_model(V)


def ragged_prompts(count, seed=1):
    """Pairs (stem, tail) of 0 to 18 and 2 ids. So only a step feeds a single id per row."""
    rng = random.Random(seed)
    ids = [[rng.randrange(V) for _ in range(rng.randint(2, 20))] for _ in range(count)]
    return [(prompt[:-2], prompt[-2:]) for prompt in ids]


@torch.no_grad()
def continue_without_cache(model, prompt, max_new_tokens, stop_ids):
    """Greedy decoding in its plainest form: the whole text through the model for every token."""
    text = list(prompt)
    for _ in range(max_new_tokens):
        token = int(model(torch.tensor([text]))[0, -1].argmax())
        if token in stop_ids:
            break
        text.append(token)
    return text[len(prompt):]


class CountingModel:
    """Passes everything on to a model and notes the shape (rows, tokens) of every pass."""

    def __init__(self, model):
        self.model = model
        self.shapes = []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def hidden(self, tokens, cache=None):
        self.shapes.append(tuple(tokens.shape))
        return self.model.hidden(tokens, cache)

    def count_steps(self):
        return [rows for rows, tokens in self.shapes if tokens == 1]


def count_needed(samples, max_new_tokens):
    """The draws, and so the fed tokens, that these texts take, with their stop ids."""
    return sum(min(len(text) + 1, max_new_tokens) for texts in samples for text in texts)


def test_example(model):
    """What it is for: several texts per prompt, each ended by a stop id or cut off, whatever else
    is in the batch."""
    prompts = [[5, 6, 7], [9], ([8, 8], [8, 8])]  # the last as a pair: (what is shared, the rest)
    settings = {"n": 4, "max_new_tokens": 20, "temperature": 0.7, "top_p": 0.95, "stop_ids": [3]}
    texts = generate(model, prompts, seed=1, **settings)
    assert [len(of_prompt) for of_prompt in texts] == [4, 4, 4]
    for text in sum(texts, []):
        assert 3 not in text and len(text) <= 20
    finished = [len(text) < 20 for text in sum(texts, [])]
    assert any(finished) and not all(finished)
    assert texts[1:2] == generate(model, prompts[1:2], seed=1, **settings)


# --------------------------------------------------------------------------------------------------
# cache and batches


def test_greedy_with_cache_equals_greedy_without(model):
    """Ragged rows that finish at different times, in half as many rows: neither refills nor smaller
    batches change a text."""
    prompts = ragged_prompts(6)
    wanted = [[continue_without_cache(model, stem + tail, 90, [3])] for stem, tail in prompts]
    lengths = [len(texts[0]) for texts in wanted]
    assert len(set(lengths)) > 3 and min(lengths) < 40 and max(lengths) > 80, (
        "the case should hold texts of many lengths, some of them long")
    settings = {"max_new_tokens": 90, "stop_ids": [3]}
    assert generate(model, prompts, **settings) == wanted
    assert generate(model, prompts, batch_size=3, **settings) == wanted


@pytest.mark.parametrize("how", [{}, SAMPLED])
def test_row_in_a_ragged_batch_equals_the_row_alone(model, how):
    prompts = ragged_prompts(6)
    settings = {"n": 2, "max_new_tokens": 20, "stop_ids": [3, 17], **how}
    together = generate(model, prompts, **settings)
    assert together == [generate(model, [prompt], **settings)[0] for prompt in prompts]


def test_cache_by_hand(model):
    """Two rows of 3 and 1 tokens, the second one padded, then one more token each; then copied."""
    config = dataclasses.replace(model.config, num_hidden_layers=1, layer_types=None,
                                 num_key_value_heads=1, head_dim=1)
    zeros = torch.zeros(1)
    cache = KVCache(config, 2, 5, zeros)
    k = torch.arange(1.0, 7).view(2, 1, 3, 1)  # row 0: 1 2 3, row 1: 4 and the padding 5 6
    keys, values = cache.update(0, k, -k)
    assert torch.equal(keys, k) and torch.equal(values, -k)
    cache.set_lengths(torch.arange(2), torch.tensor([3, 1]))
    assert cache.longest == 3
    new = torch.tensor([[[[7.0]]], [[[8.0]]]])
    keys, values = cache.update(0, new, -new)
    assert keys.flatten(1).tolist() == [[1, 2, 3, 7], [4, 8, 6, 0]] and torch.equal(values, -keys)
    cache.set_lengths(torch.arange(2), torch.tensor([4, 2]))

    other = KVCache(config, 4, 9, zeros)
    other.put([3, 0, 1], cache, [1, 0, 1])
    assert other.lengths.tolist() == [4, 2, 0, 2] and other.longest == 4
    keys, values = other.update(0, torch.full((4, 1, 1, 1), 9.0), torch.full((4, 1, 1, 1), -9.0))
    assert keys.flatten(1).tolist() == [[1, 2, 3, 7, 9], [4, 8, 9, 0, 0], [9, 0, 0, 0, 0],
                                        [4, 8, 9, 0, 0]]
    assert torch.equal(values, -keys)
    other.keep([3, 1])
    assert other.lengths.tolist() == [2, 2] and other.longest == 2
    assert other.update(0, torch.ones(2, 1, 1, 1), torch.ones(2, 1, 1, 1))[0].shape == (2, 1, 3, 1)
    other.set_lengths(1, 0)
    assert other.lengths.tolist() == [2, 0]


def test_stems_are_fed_once(model):
    """Two questions under three tags, 6 samples each: 36 rows, which share 2 stems."""
    prompts = [([question] * length, [tag] * width) for question, length in ((5, 30), (6, 20))
               for tag, width in ((7, 3), (8, 4), (9, 3))]
    counting = CountingModel(model)
    settings = {"n": 6, "max_new_tokens": 5, "stop_ids": [], **SAMPLED}
    samples = generate(counting, prompts, **settings)
    assert counting.shapes == [(2, 30), (36, 4)] + [(36, 1)] * 5
    for prompt, texts in zip(prompts, samples):  # and what was shared is what each prompt needs
        assert generate(model, [prompt], **settings) == [texts]


@pytest.mark.parametrize("rows", [8, 4])
def test_stem_of_several_refills_is_fed_once(model, rows):
    """Prompts with equal stems are drawn one after the other, wherever they stand in the list; and
    the longest first, which tend to get the longest texts: the last ones should be short."""
    counting = CountingModel(model)
    prompts = [([5] * length, [tag, tag]) for tag in range(8) for length in (11, 10, 13, 12)]
    generate(counting, prompts, max_new_tokens=3, stop_ids=[], batch_size=rows)
    stems = [shape for shape in counting.shapes if shape[1] >= 10]
    assert stems == [(1, 13), (1, 12), (1, 11), (1, 10)]


def test_plain_list_is_split_before_its_last_id(model):
    """And gives the same texts as any pair of the same ids."""
    counting = CountingModel(model)
    settings = {"n": 2, "max_new_tokens": 4, "stop_ids": [], **SAMPLED}
    texts = generate(counting, [[5, 6, 7]], **settings)
    assert counting.shapes == [(1, 2), (2, 1)] + [(2, 1)] * 4
    for pair in (([5, 6], [7]), ([5], [6, 7]), ([], [5, 6, 7])):
        assert generate(model, [pair], **settings) == texts
    assert generate(model, [([5], [6, 7]), [5, 6, 7]], **settings) == texts * 2


def test_waiting_rows_take_the_place_of_finished_ones(model):
    """With 80 texts for 16 rows, nearly all rows are in use until nobody waits any more."""
    counting = CountingModel(model)
    prompts = ragged_prompts(40)
    settings = {"n": 2, "max_new_tokens": 60, "stop_ids": [3, 17], **SAMPLED}
    samples = generate(counting, prompts, batch_size=16, **settings)
    needed = count_needed(samples, 60)
    assert needed < 80 * 60 * 0.6, "the case should hold many short texts"
    assert max(counting.count_steps()) == 16
    assert len(counting.count_steps()) < 1.5 * needed / 16  # without refills 2.3
    assert samples == generate(model, prompts, **settings)


def test_finished_rows_leave_the_batch(model):
    """The model runs few rows for which nobody needs a token any more."""
    counting = CountingModel(model)
    samples = generate(counting, ragged_prompts(32), n=2, max_new_tokens=60, stop_ids=[3, 17],
                       **SAMPLED)
    needed = count_needed(samples, 60)
    assert needed < 64 * 60 * 0.6, "the case should hold many short texts"
    assert needed <= sum(counting.count_steps()) < 1.25 * needed


def test_stops_stepping_when_all_rows_have_finished(model):
    counting = CountingModel(model)
    first = continue_without_cache(model, [5, 6], 1, [])[0]
    settings = {"n": 2, "max_new_tokens": 50, "stop_ids": [first]}
    assert generate(counting, [([], [5, 6])] * 3, **settings) == [[[], []]] * 3
    assert counting.shapes == [(6, 2), (6, 1)]


class ScriptedModel(CountingModel):
    """Continues a text by rote: after an id i comes i + 1 up to V - 1, after 9 always 9."""

    def hidden(self, tokens, cache=None):
        hidden = torch.zeros_like(super().hidden(tokens, cache))
        hidden[..., 0] = tokens
        return hidden

    def output(self, hidden):
        last = hidden[:, 0].long()
        following = torch.where(last == 9, last, (last + 1).clamp(max=V - 1))
        return 100.0 * torch.nn.functional.one_hot(following, V)


def test_free_rows_do_not_run_out_of_places(model):
    """One of 16 texts ends at once, the others are cut off. Then 13 wait, so that the first row
    stays free for as long again: longer than any text is."""
    prompts = [[9, 9, 9]] * 15 + [[9, 47]] + [[9]] * 13
    samples = generate(ScriptedModel(model), prompts, max_new_tokens=40, stop_ids=[49],
                       batch_size=16)
    assert samples == [[[9] * 40]] * 15 + [[[48]]] + [[[9] * 40]] * 13


def test_keys_are_seen_in_blocks(model, monkeypatch):
    """As on a GPU: so a step looks at more keys than there are. Also at the last position."""
    settings = {"n": 3, "max_new_tokens": 25, "batch_size": 16, **SAMPLED}

    def write():
        samples = generate(model, ragged_prompts(12), stop_ids=[3, 17], **settings)
        return samples + generate(model, [[5] * (128 - 25)], stop_ids=[], **settings)

    samples = write()
    monkeypatch.setitem(sampler.BLOCK, "cpu", 24)
    assert KVCache(model.config, 1, 3, torch.zeros(1), block=24).keys_seen(1) == 24
    assert write() == samples


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("how", [{}, SAMPLED])
def test_cuda_graphs_change_no_text(model, how):
    """Through refills, shrinking batches, and steps that see a second block of keys."""
    config = dataclasses.replace(model.config, max_position_embeddings=400)
    on_gpu = Decoder(config).cuda()
    on_gpu.load_state_dict(model.state_dict())
    prompts = ragged_prompts(40)
    settings = {"n": 3, "max_new_tokens": 200, "stop_ids": [3], "batch_size": 32, **how}
    samples = generate(on_gpu, prompts, cuda_graphs=True, **settings)
    assert generate(on_gpu, prompts, cuda_graphs=False, **settings) == samples
    lengths = [len(text) for texts in samples for text in texts]
    assert min(lengths) < 20 and max(lengths) > 128, "the case should hold short and long texts"


# --------------------------------------------------------------------------------------------------
# randomness


def test_batches_and_order_do_not_change_a_text(model):
    prompts = ragged_prompts(8)
    settings = {"n": 3, "max_new_tokens": 15, "stop_ids": [3], "seed": 7, **SAMPLED}
    samples = generate(model, prompts, **settings)
    assert len({tuple(text) for texts in samples for text in texts}) > 20, "24 texts should differ"
    for batch_size in (2, 5, 24):
        assert generate(model, prompts, batch_size=batch_size, **settings) == samples
    parts = generate(model, prompts[:3], **settings) + generate(model, prompts[3:], **settings)
    assert parts == samples
    order = random.Random(0).sample(range(8), 8)
    mixed = generate(model, [prompts[i] for i in order], **settings)
    assert mixed == [samples[i] for i in order]
    fewer = generate(model, prompts, **settings | {"n": 2})
    assert fewer == [texts[:2] for texts in samples]


def test_seed_prompt_and_index_each_change_the_numbers():
    """But not where a prompt is split."""
    arguments = [(0, ((5,), (6,)), 0), (1, ((5,), (6,)), 0), (0, ((6,), (5,)), 0),
                 (0, ((), (56,)), 0), (0, ((5,), (6,)), 1), (0, ((), (6,)), 5)]
    numbers = {tuple(make_generator(*each).random(4)) for each in arguments}
    assert len(numbers) == len(arguments)
    numbers = make_generator(0, ((5,), (6,)), 0).random(10_000)
    assert list(make_generator(0, ((), (5, 6)), 0).random(4)) == list(numbers[:4])


def test_equal_prompts_get_equal_samples(model):
    """Samples of one prompt differ: 20 tokens from a spread-out distribution agree by chance with
    odds below 1e-6."""
    settings = {"n": 2, "max_new_tokens": 20, "stop_ids": [], "temperature": 3.0}
    (a, b), (again, _) = generate(model, [[5, 6], [5, 6]], **settings)
    [(other_seed, _)] = generate(model, [[5, 6]], seed=1, **settings)
    assert a == again and len({tuple(text) for text in (a, b, other_seed)}) == 3


def test_global_random_state_is_untouched(model):
    def states():
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()

    before = states()
    generate(model, [[5, 6]], n=3, max_new_tokens=5, stop_ids=[], **SAMPLED)
    assert states() == before


# --------------------------------------------------------------------------------------------------
# one token


def test_frequencies_and_nucleus():
    """Probabilities .5 .2 .15 .1 .05, in a mixed order. At top_p 0.8 the first three stay, 0.85 in
    all. The numbers to draw by are spread evenly, so that no luck is needed."""
    probabilities = torch.tensor([0.1, 0.5, 0.05, 0.15, 0.2])
    count = 1_000
    logits = probabilities.log().expand(count, -1) + 3
    uniforms = (torch.arange(count) + 0.5) / count
    for top_p, kept in ((1.0, [0, 1, 2, 3, 4]), (0.96, [0, 1, 2, 3, 4]), (0.8, [1, 3, 4]),
                        (0.6, [1, 4]), (0.01, [1])):
        drawn = sample_next_token(logits, 1.0, top_p, uniforms)
        frequencies = drawn.bincount(minlength=5) / count
        wanted = torch.zeros(5)
        wanted[kept] = probabilities[kept] / probabilities[kept].sum()
        torch.testing.assert_close(frequencies, wanted, atol=2 / count, rtol=0)
        assert (frequencies > 0).tolist() == [i in kept for i in range(5)], top_p
    halved = sample_next_token(logits, 0.5, 1.0, uniforms).bincount(minlength=5) / count
    wanted = probabilities ** 2 / (probabilities ** 2).sum()
    torch.testing.assert_close(halved, wanted, atol=2 / count, rtol=0)


@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0])
def test_wide_and_narrow_nuclei_against_a_full_sort(spread):
    """More ids than are sorted at first: 1,000, of which the nucleus holds 1 to about 900, mixed
    within a batch."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(8, 1000, generator=generator) * spread
    logits[::2] *= 5
    for top_p in (0.5, 0.9):
        falling, order = logits.softmax(-1).sort(descending=True)
        kept = falling.cumsum(-1) - falling < top_p
        allowed = torch.zeros(8, 1000, dtype=torch.bool).scatter(1, order, kept)
        drawn = set()
        for uniform in torch.linspace(0, 0.9999999, 21):
            tokens = sample_next_token(logits, 1.0, top_p, uniform.expand(8))
            assert allowed.gather(1, tokens[:, None]).all()
            drawn.add(int(tokens[1]))
        assert len(drawn) >= min(21, int(kept[1].sum())) // 2, "the whole nucleus is in use"
        # A number near 1 gives the last id that is kept.
        last = torch.where(allowed, torch.arange(1000), -1).amax(-1)
        tokens = sample_next_token(logits, 1.0, top_p, torch.full((8,), 0.9999999))
        assert (tokens >= last - 9).all()


def test_temperature_zero_is_the_limit():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(64, V, generator=generator) * 5
    uniforms = torch.rand(64, generator=generator)
    greedy = sample_next_token(logits, 0.0, 1.0, uniforms)
    assert torch.equal(greedy, logits.argmax(-1))
    for temperature in (1e-4, 1e-6, 1e-30, 5e-324):
        assert torch.equal(sample_next_token(logits, temperature, 1.0, uniforms), greedy)
        assert torch.equal(sample_next_token(logits * 1e4, temperature, 0.9, uniforms), greedy)
    assert (sample_next_token(logits, 5.0, 1.0, uniforms) != greedy).any()


def test_impossible_ids_are_not_drawn_at_the_ends():
    """Numbers 0 and just below 1, and probability 0 at both ends of the row."""
    logits = torch.tensor([[float("-inf"), 1.0, 2.0, float("-inf")]] * 2)
    uniforms = torch.tensor([0.0, 1 - 2**-24])
    assert sample_next_token(logits, 1.0, 1.0, uniforms).tolist() == [1, 2]


def test_one_number_draws_the_same_id_with_and_without_a_cut(monkeypatch):
    """At top_p 1 nothing is sorted. A top_p a little below, which cuts nothing off here, draws the
    same ids."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 40, generator=generator)
    uniforms = torch.rand(500, generator=generator)
    sorted_ids = sample_next_token(logits, 0.7, 0.999999, uniforms)
    monkeypatch.setattr(torch.Tensor, "topk", None)
    assert torch.equal(sample_next_token(logits, 0.7, 1.0, uniforms), sorted_ids)


@pytest.mark.parametrize("how", [{}, SAMPLED, {"temperature": 5.0}])
def test_ids_without_a_token_are_never_drawn(model, how):
    class PaddedVocabulary(CountingModel):
        def output(self, hidden):
            logits = self.model.output(hidden)
            logits[..., 40:] = 1e4  # ids 40 .. 49 have no token
            return logits

    padded = PaddedVocabulary(model)
    settings = {"max_new_tokens": 20, "stop_ids": [], **how}
    samples = generate(padded, ragged_prompts(5), n=4, n_ids=40, **settings)
    assert max(token for texts in samples for text in texts for token in text) < 40
    [[text]] = generate(padded, [[5]], **settings)
    assert min(text) >= 40, "without the limit these logits win"


# --------------------------------------------------------------------------------------------------
# stopping


def test_every_stop_id_finishes_a_row_and_is_left_off(model):
    text = continue_without_cache(model, [5], 12, [])
    absent = [i for i in range(V) if i not in text]
    for stop_ids in ([text[4]], [text[8], text[4]], [absent[0], text[8]], [text[8], absent[-1]]):
        cut = min(text.index(i) for i in stop_ids if i in text)
        counting = CountingModel(model)
        assert generate(counting, [[5]], max_new_tokens=12, stop_ids=stop_ids) == [[text[:cut]]]
        assert len(counting.shapes) == 1 + cut + 1, "the prompt, and a step per id and for the stop"


def test_a_text_is_over_where_the_caller_says_so(model):
    """is_over is told the prompt's index, whatever row and batch the text is in."""
    prompts = ragged_prompts(5)
    texts = generate(model, prompts, n=2, max_new_tokens=30, stop_ids=[], batch_size=3, **SAMPLED,
                     is_over=lambda i, ids: len(ids) == 3 + i)
    assert [[len(ids) for ids in row] for row in texts] == [[3 + i] * 2 for i in range(5)]


def test_texts_that_are_cut_off_are_longer_than_finished_ones(model):
    """A text of `length` ids and a stop id fits into one new token more. With `length` it is the
    same text, but cut off."""
    text = continue_without_cache(model, [5], 12, [])
    stop = next(token for i, token in enumerate(text) if token not in text[:i] and i >= 3)
    length = text.index(stop)
    for max_new_tokens in (length + 2, length + 1, length, length - 1):
        [[sample]] = generate(model, [[5]], max_new_tokens=max_new_tokens, stop_ids=[stop])
        assert sample == text[:min(length, max_new_tokens)]
        assert (len(sample) < max_new_tokens) == (max_new_tokens > length)


# --------------------------------------------------------------------------------------------------
# the caller's model and arguments


def test_progress_adds_up_to_all_samples(model, monkeypatch):
    """Only where it was asked for."""
    bars = []

    class Bar(sampler.tqdm):
        def __init__(self, **settings):
            bars.append(settings)
            super().__init__(**settings | {"disable": True})

        def update(self, n=1):
            bars[-1]["finished"] = bars[-1].get("finished", 0) + n

    monkeypatch.setattr(sampler, "tqdm", Bar)
    settings = {"n": 3, "max_new_tokens": 9, "stop_ids": [3, 17], "batch_size": 8}
    generate(model, ragged_prompts(5), progress="self-generate", **settings)
    generate(model, ragged_prompts(5), **settings)
    assert [bar["desc"] for bar in bars] == ["self-generate", None]
    assert [bar["disable"] for bar in bars] == [None, True]
    assert [bar["total"] for bar in bars] == [bar["finished"] for bar in bars] == [15, 15]


def test_no_gradients_and_the_model_can_be_trained_afterwards(model):
    class Watched(CountingModel):
        def output(self, hidden):
            assert not torch.is_grad_enabled()
            return self.model.output(hidden)

    generate(Watched(model), [[5, 6]], max_new_tokens=3, stop_ids=[])
    model(torch.tensor([[5, 6]])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad(set_to_none=True)


def test_no_prompts(model):
    assert generate(model, [], max_new_tokens=5, stop_ids=[3]) == []


@pytest.mark.parametrize("change, message", [
    ({"n": 0}, "n = 0 must be between 1 and inf"),
    ({"max_new_tokens": 0}, "max_new_tokens = 0 must be"),
    ({"batch_size": 0}, "batch_size = 0 must be"),
    ({"temperature": -0.5}, "temperature = -0.5 must be"),
    ({"temperature": float("nan")}, "temperature = nan must be"),
    ({"top_p": 0.0}, "top_p = 0.0 must be"),
    ({"top_p": 1.5}, "top_p = 1.5 must be"),
    ({"stop_ids": [3, 50]}, "stop id = 50 must be between 0 and 49"),
    ({"prompts": [[5], []]}, "length of prompt 1 = 0 must be between 1 and 118"),
    ({"prompts": [[5], ([5, 6], [])]}, "tail of prompt 1 = 0 must be between 1 and 118"),
    ({"prompts": [[5, 50]]}, "id of prompt 0 = 50 must be between 0 and 49"),
    ({"prompts": [[5], ([-1], [5])]}, "id of prompt 1 = -1 must be"),
    ({"prompts": [[5], [5] * 119]}, "length of prompt 1 = 119 must be between 1 and 118"),
])
def test_unusable_arguments_are_named(model, change, message):
    arguments = {"prompts": [[5]], "max_new_tokens": 10, "stop_ids": [3]} | change
    with pytest.raises(ValueError) as error:
        generate(model, **arguments)
    assert message in str(error.value)


def test_longest_prompt_that_fits(model):
    [[text]] = generate(model, [[5] * 118], max_new_tokens=10, stop_ids=[])
    assert len(text) == 10


def test_broken_weights_are_reported(model):
    class Broken(CountingModel):
        def hidden(self, tokens, cache=None):
            return super().hidden(tokens, cache) * float("nan")

    with pytest.raises(ValueError, match="nan"):
        generate(Broken(model), [[5]], max_new_tokens=2, stop_ids=[])


# --------------------------------------------------------------------------------------------------
# the student


ANN = Question("ann", "Ann has 3 cards and finds 4.", Fraction(7))
RATIONALES = [Rationale("ann", "cot", "3 + 4 = 7. Final answer: 7"),
              Rationale("ann", "l2m", "What does Ann find? 4. Final answer: 7"),
              Rationale("ann", "pot", "start = 3\nanswer = start + 4")]
END = "<end>"  # its id is 0


def make_tokenizer():
    """One token per byte, and one for the end."""
    vocabulary = {END: 0}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens([END])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_checkpoint(folder, eos_token_id=0, tokenizer=None, **settings):
    """A student as another program would have saved it."""
    tokenizer = tokenizer or make_tokenizer()
    decoder = make_model(tokenizer.get_vocab_size(), extra={"eos_token_id": eos_token_id},
                         **settings)
    decoder.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("student"))


@pytest.fixture
def student(checkpoint):
    return Student(checkpoint, max_new_tokens=12)


def test_student_answers_questions(student):
    """What it is for: texts for each question and strategy, and whether they are finished."""
    answers = student.answer([(ANN, None), (ANN, "cot")], n=3, temperature=0.7, top_p=0.95, seed=1)
    assert [len(texts) for texts in answers] == [3, 3]
    text, finished = answers[1][0]
    assert isinstance(text, str) and isinstance(finished, bool)
    assert answers[1:] == student.answer([(ANN, "cot")], n=3, temperature=0.7, top_p=0.95, seed=1)


@pytest.mark.parametrize("rationale", RATIONALES, ids=STRATEGIES)
def test_forced_prompt_is_a_prefix_of_what_is_trained(student, rationale):
    """Sampling continues exactly the ids that training began with; all prompts of a question have
    one stem; and none ends in a space, which would belong to the next word's token."""
    stem, free_tail = student.prompt(ANN)
    forced_stem, forced_tail = student.prompt(ANN, rationale.strategy)
    trained = stem + free_tail + student.target(rationale)
    forced = forced_stem + forced_tail
    assert stem == forced_stem and len(free_tail) > 0
    assert trained[:len(forced)] == forced
    assert len(stem + free_tail) < len(forced) < len(trained)
    for prompt in (stem + free_tail, forced):
        assert not student.tokenizer.decode(prompt).endswith(" ")
    text = student.tokenizer.decode(trained)
    assert text == f"{ANN.text}\n[{rationale.strategy}]: {rationale.text}"


def test_target_has_one_end_token_at_its_end(student):
    """The student learns to stop, and to do so once."""
    for rationale in RATIONALES:
        target = student.target(rationale)
        assert target[-1] == 0 and target.count(0) == 1


def test_end_token_in_a_text_is_text(student):
    """A teacher's leaked "<end>" neither ends the target in its middle nor comes twice at its end.
    The same in a question. What is saved is the tokenizer as it was read."""
    leaked = Rationale("ann", "cot", "First<end> then 3 + 4 = 7. Final answer: 7<end>")
    target = student.target(leaked)
    assert target.count(0) == 1 and target[-1] == 0
    assert student.tokenizer.decode(target) == f"[cot]: {leaked.text}"
    stem, tail = student.prompt(Question("ann", "Who<end>?", Fraction(7)), "cot")
    assert 0 not in stem + tail and student.tokenizer.decode(stem + tail) == "Who<end>?\n[cot]:"
    assert student.tokenizer.to_str() == make_tokenizer().to_str()


def test_special_tokens_of_the_template_are_tokens(tmp_path):
    """Its tags are, but not the same words in a question. What stands beside the question is
    encoded with it, as in a chat template that is filled in first."""
    write_checkpoint(tmp_path, 0)
    template = "<end>User: {question}, please<end>\nAnswer:"
    student = Student(tmp_path, template=template)
    plain = make_tokenizer()
    filled = template.replace("{question}", ANN.text)
    stem, tail = student.prompt(ANN, "cot")
    assert stem + tail == plain.encode(filled).ids + plain.encode("[cot]:").ids
    assert len(tail) == 1 + len(plain.encode("[cot]:").ids) and (stem + tail).count(0) == 2
    stem, tail = student.prompt(Question("ann", "Who<end>{question}?", Fraction(7)))
    assert (stem + tail).count(0) == 2 and "Who<end>{question}?" in student.tokenizer.decode(stem)


def test_bos_is_added_exactly_once(student):
    """A tokenizer that opens texts with a special token does so before the question, and nowhere
    else."""
    student.tokenizer.add_special_tokens(["<bos>"])
    bos = student.tokenizer.token_to_id("<bos>")
    student.tokenizer.post_processor = processors.TemplateProcessing(
        "<bos> $A", special_tokens=[("<bos>", bos)])
    for strategy in (None, *STRATEGIES):
        stem, tail = student.prompt(ANN, strategy)
        assert stem[0] == bos and (stem + tail).count(bos) == 1
    student.specials["<bos>"] = bos
    student.template = ["", "<bos>", "{question}"]  # a template that begins with it
    stem, tail = student.prompt(ANN)
    assert stem[0] == bos and (stem + tail).count(bos) == 1
    assert bos not in student.target(RATIONALES[0])


def test_end_token_of_a_tokenizer_is_not_put_before_the_question(student):
    """Some append it to every text, also to the empty one."""
    end = student.stop_ids[0]
    student.tokenizer.post_processor = processors.TemplateProcessing(
        "$A <end>", special_tokens=[("<end>", end)])
    stem, tail = student.prompt(ANN)
    assert end not in stem + tail


@pytest.mark.parametrize("config, generation_config, wanted", [
    (0, None, [0]), ([0, 7], None, [0, 7]), (None, 5, [5]), (None, [5, 0], [5, 0]),
    (0, [5, 0, 9], [0, 5, 9])])
def test_stop_ids_of_both_config_files(tmp_path, config, generation_config, wanted):
    """Every end token ends a text, and the first one is trained. A file gives one, a list or
    none."""
    write_checkpoint(tmp_path, config)
    fields = {"eos_token_id": generation_config}
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    student = Student(tmp_path)
    assert student.stop_ids == wanted
    assert student.target(RATIONALES[0])[-1] == wanted[0]


def test_saved_student_loads_as_it_was(tmp_path, student):
    """The next round starts from this folder: weights, tokenizer and all stop ids come back."""
    student.stop_ids += [9, 11]  # as in generation_config.json of a chat model
    student.save(tmp_path)
    loaded = Student(tmp_path)
    assert loaded.stop_ids == student.stop_ids == [0, 9, 11]
    assert loaded.tokenizer.to_str() == student.tokenizer.to_str()
    weights = zip(loaded.model.parameters(), student.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_weights_are_saved_last(tmp_path, student, monkeypatch):
    """A folder with model.safetensors is complete: a resumed run goes by that."""
    written = []

    def note(path, text):
        assert not (tmp_path / "model.safetensors").exists()
        written.append(path.name)

    monkeypatch.setattr(sampler, "write_text", note)
    student.save(tmp_path)
    assert written == ["tokenizer.json", "generation_config.json"]
    assert (tmp_path / "model.safetensors").exists()


def test_texts_are_computed_in_the_dtype_that_was_asked_for(student):
    """In bfloat16 other texts come out here and there: those of a bfloat16 model. The student keeps
    its own weights."""
    asked = [(ANN, None), (ANN, "cot")]
    settings = {"n": 8, "temperature": 1.0, "seed": 3}
    texts = student.answer(asked, **settings)
    student.dtype = torch.bfloat16
    low_texts = student.answer(asked, **settings)
    assert low_texts != texts
    assert student.model.output_weight().dtype == torch.float32
    student.model = student.model.cast(torch.bfloat16)
    assert student.answer(asked, **settings) == low_texts


@pytest.mark.parametrize("text", [None, "{", "[1]"], ids=["missing", "broken", "list"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json",
                                  "generation_config.json"])
def test_loading_names_what_is_wrong(tmp_path, name, text):
    """A file that is missing or broken is named, by an error that train.py turns into one line.
    Only generation_config.json may be missing."""
    write_checkpoint(tmp_path)
    if text is None:
        (tmp_path / name).unlink(missing_ok=True)
    else:
        (tmp_path / name).write_text(text)
    if (name, text) == ("generation_config.json", None):
        Student(tmp_path)
        return
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        Student(tmp_path)


def test_tokenizer_neither_cuts_nor_pads(tmp_path, student):
    """Some tokenizer.json files hold the truncation and padding of the training they come from: a
    cut text would be trained on as if it were whole."""
    tokenizer = make_tokenizer()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=40)
    other = Student(write_checkpoint(tmp_path, tokenizer=tokenizer))
    assert other.prompt(ANN, "cot") == student.prompt(ANN, "cot")
    assert other.target(RATIONALES[0]) == student.target(RATIONALES[0])


def test_loading_without_an_end_token_is_refused(tmp_path):
    """Without one every text would run into the token limit, and none would ever be kept."""
    write_checkpoint(tmp_path, eos_token_id=None)
    with pytest.raises(ValueError, match="eos_token_id"):
        Student(tmp_path)


@pytest.mark.parametrize("id", [-1, 256, 10 ** 6])
def test_end_token_that_is_unknown_to_the_model_is_refused(tmp_path, id):
    """As where a tokenizer got a token more, and the embeddings were not resized."""
    tokenizer = make_tokenizer()
    assert tokenizer.get_vocab_size() > 256
    write_checkpoint(tmp_path)
    make_model(256, extra={"eos_token_id": id}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="eos_token_id .* model and tokenizer know 256 ids"):
        Student(tmp_path)


def test_student_draws_no_id_without_a_token(student):
    """A vocabulary that is padded beyond the tokenizer's: the id would win the first draw, were it
    let in."""
    stem, tail = student.prompt(ANN, "cot")
    prompt = torch.tensor([stem + tail])
    old = student.model
    V, C = old.output_weight().shape
    wanted = student.answer([(ANN, "cot")])
    student.model = Decoder(dataclasses.replace(old.config, vocab_size=V + 1))
    with torch.no_grad():
        weights = old.state_dict()
        embedding = weights["model.embed_tokens.weight"]
        weights["model.embed_tokens.weight"] = torch.cat([embedding, torch.zeros(1, C)])
        row = 100 * old.hidden(prompt)[0, -1:]
        weights["lm_head.weight"] = torch.cat([weights["lm_head.weight"], row])
    student.model.load_state_dict(weights)
    assert student.model(prompt)[0, -1].argmax() == V
    assert student.answer([(ANN, "cot")]) == wanted


def test_cut_off_texts_are_told_from_finished_ones(student):
    """A text is finished if its end token came within max_new_tokens: one token less and it is
    not."""
    student = copy.copy(student)
    stem, tail = student.prompt(ANN, "cot")
    ids = continue_without_cache(student.model, stem + tail, 12, [])
    stop = next(id for i, id in enumerate(ids) if id not in ids[:i] and i >= 3)
    length = ids.index(stop)
    student.stop_ids = [stop]
    text = student.tokenizer.decode(ids[:length]).strip()
    student.max_new_tokens = length + 1
    assert student.answer([(ANN, "cot")]) == [[(text, True)]]
    student.max_new_tokens = length
    assert student.answer([(ANN, "cot")]) == [[(text, False)]]
