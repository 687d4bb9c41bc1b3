"""Tests of sampler.py:  python -m pytest tests/test_sampler.py

The model is a tiny random decoder in float32. Its fresh weights are scaled up so that its likeliest next id depends on
the text and probabilities differ: with nearly uniform ones a broken cache would change too little to be seen.
"""
import dataclasses
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import sampler  # noqa: E402
from model import Config, Decoder  # noqa: E402
from sampler import KVCache, draw_uniforms, generate, is_finished, sample_next_token  # noqa: E402

V = 50
SAMPLED = dict(temperature=1.0, top_p=0.9)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Config("llama", vocab_size=V, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    decoder = Decoder(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 2:
                parameter *= 20
    return decoder


def ragged_prompts(count, seed=1):
    rng = random.Random(seed)
    return [[rng.randrange(V) for _ in range(rng.randint(1, 20))] for _ in range(count)]


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
    """Passes everything on to a model and notes the shape (rows, tokens) of every forward pass."""

    def __init__(self, model):
        self.model, self.shapes = model, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def hidden(self, tokens, cache=None):
        self.shapes.append(tuple(tokens.shape))
        return self.model.hidden(tokens, cache)


def test_example(model):
    """What it is for: several texts per prompt, each ended by a stop id or cut off, whatever else is in the batch."""
    prompts, how = [[5, 6, 7], [9], [8, 8, 8, 8]], dict(max_new_tokens=20, temperature=0.7, top_p=0.95, stop_ids=[3], seed=1)
    texts = generate(model, prompts, n=4, **how)
    assert [len(of_prompt) for of_prompt in texts] == [4, 4, 4]
    for text in sum(texts, []):
        assert 3 not in text and len(text) <= 20 and is_finished(text, 20) == (len(text) < 20)
    assert texts[1:2] == generate(model, prompts[1:2], n=4, **how)


# ----------------------------------------------------------------------------------------------------------------------
# Cache and batching


def test_greedy_with_cache_equals_greedy_without(model):
    """Ragged rows that finish at different times: also compaction and a growing cache must not change a text."""
    prompts, stop_ids = ragged_prompts(8), [3]
    wanted = [[continue_without_cache(model, prompt, 90, stop_ids)] for prompt in prompts]
    lengths = [len(texts[0]) for texts in wanted]
    assert len(set(lengths)) > 4 and max(lengths) > 80, "the case should hold texts of many lengths, some of them long"
    assert generate(model, prompts, max_new_tokens=90, stop_ids=stop_ids) == wanted


@pytest.mark.parametrize("how", [{}, SAMPLED])
def test_row_in_a_ragged_batch_equals_the_row_alone(model, how):
    prompts = ragged_prompts(10)
    together = generate(model, prompts, n=2, max_new_tokens=20, stop_ids=[3, 17], **how)
    alone = [generate(model, [prompt], n=2, max_new_tokens=20, stop_ids=[3, 17], **how)[0] for prompt in prompts]
    assert together == alone


def test_cache_update_and_select():
    """Two rows of 3 and 1 tokens, the second one padded, then one more token each; then rows 1, 0, 1."""
    cache = KVCache(rows=2, capacity=3)
    k = torch.arange(1.0, 7).view(2, 1, 3, 1)  # row 0: 1 2 3, row 1: 4 and the padding 5 6
    keys, values = cache.update(0, k, -k)
    assert torch.equal(keys, k) and torch.equal(values, -k)
    cache.advance(torch.tensor([3, 1]))
    new = torch.tensor([[[[7.0]]], [[[8.0]]]])
    keys, values = cache.update(0, new, -new)  # S = 4: the capacity has to grow
    assert keys.flatten(1).tolist() == [[1, 2, 3, 7], [4, 8, 6, 0]] and torch.equal(values, -keys)
    cache.advance(1)
    chosen = cache.select(torch.tensor([1, 0, 1]))
    assert chosen.lengths.tolist() == [2, 4, 2] and chosen.longest == 4
    keys, _ = chosen.update(0, torch.full((3, 1, 1, 1), 9.0), torch.zeros(3, 1, 1, 1))
    assert keys.flatten(1).tolist() == [[4, 8, 9, 0, 0], [1, 2, 3, 7, 9], [4, 8, 9, 0, 0]]
    assert cache.buffers[0][0].flatten(1)[:, :4].tolist() == [[1, 2, 3, 7], [4, 8, 6, 0]], "a copy, not a view"
    assert cache.select(torch.tensor([1])).longest == 2


@pytest.mark.parametrize("batch_size, times", [(256, 1), (80, 1), (40, 2)])  # a group holds at most batch_size / 4 rows
def test_what_prompts_share_is_fed_once(model, batch_size, times):
    """Two questions of 30 and 20 tokens under three tags of 3, 4 and 3 tokens, 6 samples each: 18 rows a question."""
    counting = CountingModel(model)
    prompts = [[question] * length + [tag] * width for question, length in ((5, 30), (6, 20))
               for tag, width in ((7, 3), (8, 4), (9, 3))]
    samples = generate(counting, prompts, n=6, max_new_tokens=5, stop_ids=[], batch_size=batch_size, **SAMPLED)
    prefills = [shape for shape in counting.shapes if shape[1] > 1]
    stems, tags = [s for s in prefills if s[1] >= 20], [s for s in prefills if s[1] <= 4]
    assert sum(rows for rows, _ in stems) == 2 * times and len(stems) + len(tags) == len(prefills)
    steps = [shape for shape in counting.shapes if shape[1] == 1]
    assert sum(rows for rows, _ in steps) == 36 * 4 and max(rows for rows, _ in steps) <= batch_size
    for prompt, texts in zip(prompts, samples):  # and what was shared is what each prompt needs
        assert generate(model, [prompt], n=6, max_new_tokens=5, stop_ids=[], **SAMPLED) == [texts]


def test_waiting_rows_take_the_place_of_finished_ones(model):
    """With 64 prompts for 16 rows, nearly all rows of the batch are in use until nobody waits any more."""
    counting, prompts = CountingModel(model), ragged_prompts(64)
    samples = generate(counting, prompts, n=2, max_new_tokens=60, stop_ids=[3, 17], batch_size=16, **SAMPLED)
    needed = sum(len(text) for texts in samples for text in texts)
    assert needed < 128 * 60 * 0.6, "the case should hold many short texts"
    assert sum(tokens == 1 for _, tokens in counting.shapes) < 1.5 * needed / 16  # steps; 2.2 with no refill
    assert samples == generate(model, prompts, n=2, max_new_tokens=60, stop_ids=[3, 17], **SAMPLED)


def test_finished_rows_leave_the_batch(model):
    """The model runs fewer rows than rows * steps, by about the tokens that finished rows did not need."""
    counting, prompts = CountingModel(model), ragged_prompts(32)
    samples = generate(counting, prompts, n=2, max_new_tokens=60, stop_ids=[3, 17], **SAMPLED)
    needed = sum(len(text) for texts in samples for text in texts)
    assert needed < 64 * 60 * 0.6, "the case should hold many short texts"
    fed = sum(rows for rows, tokens in counting.shapes if tokens == 1)
    assert fed < 1.25 * needed


def test_stops_stepping_when_all_rows_have_finished(model):
    counting = CountingModel(model)
    first = continue_without_cache(model, [5], 1, [])[0]
    assert generate(counting, [[5]] * 3, n=2, max_new_tokens=50, stop_ids=[first]) == [[[], []]] * 3
    assert counting.shapes == [(3, 1)]


@pytest.mark.parametrize("how", [{}, SAMPLED])
def test_looking_seldom_who_has_finished_changes_no_text(model, how, monkeypatch):
    """As on a GPU, where a look makes the host wait: rows go on behind their end, by up to 6 steps, unseen. And a step
    looks at whole blocks of keys."""
    prompts = ragged_prompts(20)
    samples = generate(model, prompts, n=3, max_new_tokens=25, stop_ids=[3, 17], batch_size=16, **how)
    monkeypatch.setitem(sampler.LOOK_AFTER, "cpu", 7)
    monkeypatch.setitem(sampler.BLOCK, "cpu", 16)
    assert generate(model, prompts, n=3, max_new_tokens=25, stop_ids=[3, 17], batch_size=16, **how) == samples
    longest_prompt = [[5] * (128 - 25)]  # here they go on beyond the model's last position
    assert len(generate(model, longest_prompt, max_new_tokens=25, stop_ids=[], **how)[0][0]) == 25


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("how", [{}, SAMPLED])
def test_cuda_graphs_change_no_text(model, how):
    """Through refills, shrinking batches, and steps that see a second block of keys."""
    on_gpu = Decoder(dataclasses.replace(model.config, max_position_embeddings=400)).cuda()
    on_gpu.load_state_dict(model.state_dict())
    prompts = ragged_prompts(40)
    settings = dict(n=3, max_new_tokens=200, stop_ids=[3], batch_size=32, **how)
    samples = generate(on_gpu, prompts, cuda_graphs=True, **settings)
    assert generate(on_gpu, prompts, cuda_graphs=False, **settings) == samples
    lengths = [len(text) for texts in samples for text in texts]
    assert min(lengths) < 20 and max(lengths) > 128, "the case should hold short and long texts"


# ----------------------------------------------------------------------------------------------------------------------
# Randomness


def test_batches_and_order_do_not_change_a_text(model):
    prompts, how = ragged_prompts(8), dict(n=3, max_new_tokens=15, stop_ids=[3], seed=7, **SAMPLED)
    samples = generate(model, prompts, **how)
    assert len({tuple(text) for texts in samples for text in texts}) > 20, "24 samples should differ"
    for batch_size in (2, 5, 24):
        assert generate(model, prompts, batch_size=batch_size, **how) == samples
    assert generate(model, prompts[:3], **how) + generate(model, prompts[3:], **how) == samples
    order = random.Random(0).sample(range(8), 8)
    assert generate(model, [prompts[i] for i in order], **how) == [samples[i] for i in order]
    assert [texts[:2] for texts in samples] == generate(model, prompts, **how | {"n": 2})


def test_seed_prompt_and_index_each_change_the_numbers():
    arguments = [(0, [5, 6], 0), (1, [5, 6], 0), (0, [6, 5], 0), (0, [56], 0), (0, [5, 6], 1), (0, [6], 5)]
    numbers = {tuple(draw_uniforms(*a, count=4).tolist()) for a in arguments}
    assert len(numbers) == len(arguments)
    assert draw_uniforms(0, [5, 6], 0, 4).tolist() == draw_uniforms(0, [5, 6], 0, 9)[:4].tolist()
    many = draw_uniforms(0, [5, 6], 0, 10_000)
    assert 0 <= many.min() and many.max() < 1 and abs(many.mean() - 0.5) < 0.02  # 0.02 = 7 standard deviations


def test_equal_prompts_get_equal_samples(model):
    """Samples of one prompt differ: 20 tokens from a spread-out distribution agree by chance with odds below 1e-6."""
    how = dict(n=2, max_new_tokens=20, stop_ids=[], temperature=3.0)
    (a, b), (again, _) = generate(model, [[5, 6], [5, 6]], **how)
    (other_seed, _), = generate(model, [[5, 6]], seed=1, **how)
    assert a == again and len({tuple(text) for text in (a, b, other_seed)}) == 3


def test_global_random_state_is_untouched(model):
    def states():
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()

    before = states()
    generate(model, [[5, 6]], n=3, max_new_tokens=5, stop_ids=[], **SAMPLED)
    assert states() == before


# ----------------------------------------------------------------------------------------------------------------------
# One token


def test_frequencies_and_nucleus():
    """Probabilities .5 .2 .15 .1 .05, in a mixed order. At top_p 0.8 the first three stay, 0.85 in all."""
    probabilities = torch.tensor([0.1, 0.5, 0.05, 0.15, 0.2])
    count = 4_000
    logits, uniforms = probabilities.log().expand(count, -1) + 3, (torch.arange(count) + 0.5) / count
    for top_p, kept in ((1.0, [0, 1, 2, 3, 4]), (0.96, [0, 1, 2, 3, 4]), (0.8, [1, 3, 4]), (0.6, [1, 4]), (0.01, [1])):
        frequencies = sample_next_token(logits, 1.0, top_p, uniforms).bincount(minlength=5) / count
        wanted = torch.zeros(5)
        wanted[kept] = probabilities[kept] / probabilities[kept].sum()
        torch.testing.assert_close(frequencies, wanted, atol=2 / count, rtol=0)  # even uniforms: no luck needed
        assert (frequencies > 0).tolist() == [i in kept for i in range(5)], top_p
    halved = sample_next_token(logits, 0.5, 1.0, uniforms).bincount(minlength=5) / count
    torch.testing.assert_close(halved, probabilities ** 2 / (probabilities ** 2).sum(), atol=2 / count, rtol=0)


@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0])
def test_wide_and_narrow_nuclei_against_a_full_sort(spread):
    """More ids than are sorted at first: 3,000, of which the nucleus holds 1 to about 2,700, mixed within a batch."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(40, 3000, generator=generator) * spread
    logits[::2] *= 5
    for top_p in (0.5, 0.9):
        falling, order = logits.softmax(-1).sort(descending=True)
        kept = falling.cumsum(-1) - falling < top_p
        allowed = torch.zeros(40, 3000, dtype=torch.bool).scatter(1, order, kept)
        drawn = set()
        for uniform in torch.linspace(0, 0.9999999, 21):
            tokens = sample_next_token(logits, 1.0, top_p, uniform.expand(40))
            assert allowed.gather(1, tokens[:, None]).all()
            drawn.add(int(tokens[1]))
        assert len(drawn) >= min(21, int(kept[1].sum())) // 2, "the whole nucleus is in use"
        last = torch.where(allowed, torch.arange(3000), -1).amax(-1)  # a uniform near 1 gives the last id that is kept
        assert (sample_next_token(logits, 1.0, top_p, torch.full((40,), 0.9999999)) >= last - 30).all()


def test_temperature_zero_is_the_limit():
    generator = torch.Generator().manual_seed(3)
    logits, uniforms = torch.randn(64, V, generator=generator) * 5, torch.rand(64, generator=generator)
    greedy = sample_next_token(logits, 0.0, 1.0, uniforms)
    assert torch.equal(greedy, logits.argmax(-1))
    for temperature in (1e-4, 1e-6, 1e-30, 5e-324):
        assert torch.equal(sample_next_token(logits, temperature, 1.0, uniforms), greedy)
        assert torch.equal(sample_next_token(logits * 1e36, temperature, 0.9, uniforms), greedy)  # float32 ends at 3e38
    assert (sample_next_token(logits, 5.0, 1.0, uniforms) != greedy).any()


def test_impossible_ids_are_not_drawn_at_the_ends():
    """Uniforms 0 and just below 1, and probability 0 at both ends of the row."""
    logits = torch.tensor([[float("-inf"), 1.0, 2.0, float("-inf")]] * 2)
    assert sample_next_token(logits, 1.0, 1.0, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 2]


@pytest.mark.parametrize("how", [{}, SAMPLED, dict(temperature=5.0)])
def test_ids_without_a_token_are_never_sampled(model, how):
    class PaddedVocabulary(CountingModel):
        def output(self, hidden):
            logits = self.model.output(hidden)
            logits[..., 40:] = 1e4  # ids 40 .. 49 have no token
            return logits

    how = dict(max_new_tokens=20, stop_ids=[], **how)
    samples = generate(PaddedVocabulary(model), ragged_prompts(5), n=4, n_ids=40, **how)
    assert max(token for texts in samples for text in texts for token in text) < 40
    samples = generate(PaddedVocabulary(model), [[5]], **how)
    assert min(samples[0][0]) >= 40, "without the limit these logits win"


# ----------------------------------------------------------------------------------------------------------------------
# Stopping


def test_every_stop_id_finishes_a_row_and_is_left_off(model):
    text = continue_without_cache(model, [5], 12, [])
    absent = [i for i in range(V) if i not in text]
    for stop_ids in ([text[4]], [text[8], text[4]], [absent[0], text[8]], [text[8], absent[-1]]):
        cut, counting = min(text.index(i) for i in stop_ids if i in text), CountingModel(model)
        assert generate(counting, [[5]], max_new_tokens=12, stop_ids=stop_ids) == [[text[:cut]]]
        assert len(counting.shapes) == 1 + cut, "one prefill and a step per token: the row ends there, not at 12 tokens"


def test_samples_cut_off_by_length_are_marked(model):
    """A text of 8 tokens and a stop id fits into 9 new tokens; with 8 it is the same text, but cut off."""
    text = continue_without_cache(model, [5], 12, [])
    stop = next(token for i, token in enumerate(text) if token not in text[:i] and i >= 3)
    length = text.index(stop)
    for max_new_tokens, finished in ((length + 2, True), (length + 1, True), (length, False), (length - 1, False)):
        (sample,), = generate(model, [[5]], max_new_tokens=max_new_tokens, stop_ids=[stop])
        assert sample == text[:min(length, max_new_tokens)]
        assert is_finished(sample, max_new_tokens) == finished


def test_progress_adds_up_to_all_samples(model):
    counts = []
    generate(model, ragged_prompts(9), n=3, max_new_tokens=15, stop_ids=[3, 17], batch_size=8, progress=counts.append,
             **SAMPLED)
    assert sum(counts) == 27 and len(counts) > 3 and min(counts) > 0


# ----------------------------------------------------------------------------------------------------------------------
# The caller's model and arguments


@pytest.mark.parametrize("training", [True, False])
def test_model_mode_is_restored(model, training):
    modes = []

    def progress(count):
        modes.append(model.training)
        if len(modes) == 2:
            raise KeyboardInterrupt

    model.train(training)
    generate(model, [[5]], max_new_tokens=2, stop_ids=[], progress=progress)
    assert model.training == training
    with pytest.raises(KeyboardInterrupt):
        generate(model, [[5]], max_new_tokens=2, stop_ids=[], progress=progress)
    assert model.training == training and modes == [False, False]
    model.eval()


def test_no_gradients_and_the_model_can_be_trained_afterwards(model):
    recording = []
    progress = lambda count: recording.append(torch.is_grad_enabled())  # noqa: E731
    generate(model, [[5, 6]], max_new_tokens=3, stop_ids=[], progress=progress)
    assert recording == [False]
    model(torch.tensor([[5, 6]])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad(set_to_none=True)


def test_no_prompts(model):
    assert generate(model, [], max_new_tokens=5, stop_ids=[3]) == []


@pytest.mark.parametrize("change, message", [
    (dict(n=0), "n = 0"),
    (dict(max_new_tokens=0), "max_new_tokens = 0"),
    (dict(batch_size=0), "batch_size = 0"),
    (dict(temperature=-0.5), "temperature = -0.5"),
    (dict(temperature=float("nan")), "temperature = nan"),
    (dict(top_p=0.0), "top_p = 0.0"),
    (dict(top_p=1.5), "top_p = 1.5"),
    (dict(n_ids=51), "n_ids = 51"),
    (dict(n_ids=0), "n_ids = 0"),
    (dict(stop_ids=[3, 50]), "stop id 50"),
    (dict(stop_ids=[45], n_ids=40), "stop id 45"),
    (dict(prompts=[[5], []]), "prompt 1 is empty"),
    (dict(prompts=[[5, 50]]), "prompt 0 holds the ids [50]"),
    (dict(prompts=[[5], [5, -1]]), "prompt 1 holds the ids [-1]"),
    (dict(prompts=[[5], [5] * 119]), "prompt 1 has 119 tokens, at most 118 fit"),
])
def test_unusable_arguments_are_named(model, change, message):
    arguments = dict(prompts=[[5]], max_new_tokens=10, stop_ids=[3]) | change
    with pytest.raises(ValueError) as error:
        generate(model, **arguments)
    assert message in str(error.value)


def test_longest_prompt_that_fits(model):
    assert len(generate(model, [[5] * 118], max_new_tokens=10, stop_ids=[])[0][0]) == 10


def test_broken_weights_are_reported(model):
    class Broken(CountingModel):
        def output(self, hidden):
            return self.model.output(hidden) * float("nan")

    with pytest.raises(ValueError, match="nan"):
        generate(Broken(model), [[5]], max_new_tokens=2, stop_ids=[])
