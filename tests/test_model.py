"""Tests of model.py:  python -m pytest tests/test_model.py

tests/fixtures/ holds a tiny random checkpoint per family with the logits that transformers computed (make_fixtures.py).
"""
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import FAMILIES as TABLE
from model import (Config, Decoder, attend, attend_fused, rope_cos_sin,  # noqa: E402
                   rope_frequencies, visible_keys)

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = ["llama", "llama3", "qwen2", "qwen3", "gemma", "gemma_untied", "gemma3_text"]  # llama3: in three shards
TINY = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def expected(family):
    """The fixture's tokens (2, 12) and transformers' logits (2, 12, 40)."""
    return load_file(FIXTURES / family / "expected.safetensors").values()


def copy_checkpoint(family, folder, change_config=None, change_weights=None):
    """A copy of a fixture in `folder`, with its config.json or its tensors (dicts) changed by the given functions."""
    shutil.copytree(FIXTURES / family, folder, dirs_exist_ok=True)
    if change_config:
        config = json.loads((folder / "config.json").read_text())
        change_config(config)
        (folder / "config.json").write_text(json.dumps(config))
    if change_weights:
        weights = load_file(folder / "model.safetensors")
        change_weights(weights)
        save_file(weights, folder / "model.safetensors")
    return folder


class ListCache:
    """The plainest cache that keeps the contract of Decoder.hidden: Python lists, one token at a time."""

    def __init__(self, rows):
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        self.layers = {}  # layer: (keys, values), each a list over rows of lists of (H_kv, D)

    def keys_seen(self, T):
        return int(self.lengths.max()) + T

    def update(self, layer_index, k, v):
        B, H_kv, T, D = k.shape
        returned, S = [], self.keys_seen(T)
        if layer_index not in self.layers:
            self.layers[layer_index] = [[] for _ in range(B)], [[] for _ in range(B)]
        for stored, new in zip(self.layers[layer_index], (k, v)):
            everything = torch.full((B, H_kv, S, D), 1e4)  # a huge number where nothing is held
            for row in range(B):
                del stored[row][int(self.lengths[row]):]  # leftovers of padding
                stored[row] += new[row].unbind(1)
                everything[row, :, :len(stored[row])] = torch.stack(stored[row], dim=1)
            returned.append(everything)
        return returned


def test_example(tmp_path):
    """What it is for: a checkpoint of the Hugging Face layout is read, used, changed and written."""
    model = Decoder.from_pretrained(FIXTURES / "llama")
    tokens = torch.tensor([[5, 17, 3], [8, 2, 30]])           # (B, T)
    logits = model(tokens)                                    # (B, T, V)
    assert logits.shape == (2, 3, model.config.vocab_size)
    model.model.layers[0].mlp.down_proj.weight *= 1.5
    model.save_pretrained(tmp_path)
    changed = Decoder.from_pretrained(tmp_path)(tokens)
    assert torch.equal(changed, model(tokens)) and not torch.allclose(changed, logits)


# ----------------------------------------------------------------------------------------------------------------------
# Logits


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family):
    tokens, logits = expected(family)
    ours = Decoder.from_pretrained(FIXTURES / family)(tokens)
    assert ours.shape == logits.shape == (2, 12, 40)
    assert (ours - logits).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_logits_equal_uncached_with_rows_of_different_lengths(family):
    tokens, logits = expected(family)
    model, lengths, cache = Decoder.from_pretrained(FIXTURES / family), torch.tensor([7, 3]), ListCache(2)
    prompts = tokens[:, :7].clone()
    prompts[1, 3:] = 0  # padding on the right
    prefill = model(prompts, cache)
    assert torch.equal(cache.lengths, torch.zeros(2, dtype=torch.int64))  # the caller advances, not the model
    cache.lengths = lengths
    assert (prefill[0] - logits[0, :7]).abs().max() < 1e-4
    assert (prefill[1, :3] - logits[1, :3]).abs().max() < 1e-4
    for T in (1, 1, 2, 1):  # two tokens in one call: queries of one call must not see each other's future
        step = model(torch.stack([row[n:n + T] for row, n in zip(tokens, cache.lengths)]), cache)
        for row in range(2):
            n = cache.lengths[row]
            assert (step[row] - logits[row, n:n + T]).abs().max() < 1e-4
        cache.lengths = cache.lengths + T


def test_logits_with_the_cache_of_the_sampler():
    sampler = pytest.importorskip("sampler")
    tokens, logits = expected("gemma3_text")
    model = Decoder.from_pretrained(FIXTURES / "gemma3_text")
    cache = sampler.KVCache(model.config, 2, 9, logits)
    assert (model(tokens[:, :6], cache) - logits[:, :6]).abs().max() < 1e-4
    cache.set_lengths(torch.arange(2), torch.tensor([6, 2]))
    step = model(torch.stack([tokens[0, 6:7], tokens[1, 2:3]]), cache)
    assert (step[0, 0] - logits[0, 6]).abs().max() < 1e-4
    assert (step[1, 0] - logits[1, 2]).abs().max() < 1e-4


def test_hidden_and_output_give_the_logits():
    tokens, logits = expected("llama")
    model = Decoder.from_pretrained(FIXTURES / "llama")
    hidden = model.hidden(tokens)
    assert hidden.shape == (2, 12, 16)
    assert (model.output(hidden[1, 5]) - logits[1, 5]).abs().max() < 1e-4


def test_output_in_pieces_of_a_large_vocabulary():
    torch.manual_seed(0)
    model = Decoder(Config("llama", **TINY | {"vocab_size": 2500}))
    hidden = torch.randn(3, 16)
    assert torch.allclose(model.output(hidden), hidden @ model.lm_head.weight.T, atol=1e-6)
    low = model.cast(torch.bfloat16).output(hidden.bfloat16())
    assert low.dtype == torch.bfloat16 and torch.allclose(low.float(), model.output(hidden), atol=0.02)


def test_padding_on_the_right_changes_no_earlier_logit():
    tokens, logits = expected("gemma3_text")
    model = Decoder.from_pretrained(FIXTURES / "gemma3_text")
    padded = torch.cat([tokens, torch.full((2, 5), 3)], dim=1)
    assert (model(padded)[:, :12] - logits).abs().max() < 1e-4


def test_visible_keys_by_hand():
    positions = torch.tensor([[2, 3], [0, 1]])
    full = visible_keys(positions, 4)
    assert full.shape == (2, 1, 2, 4)
    assert full[:, 0].int().tolist() == [[[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 0, 0, 0], [1, 1, 0, 0]]]
    sliding = visible_keys(positions, 4, window=2)
    assert sliding[:, 0].int().tolist() == [[[0, 1, 1, 0], [0, 0, 1, 1]], [[1, 0, 0, 0], [1, 1, 0, 0]]]


def test_bfloat16_is_near_float32():
    tokens, logits = expected("gemma3_text")
    ours = Decoder.from_pretrained(FIXTURES / "gemma3_text", dtype=torch.bfloat16)(tokens)
    assert ours.dtype == torch.bfloat16
    assert 0 < (ours - logits).abs().max() < 0.25  # bfloat16 keeps 8 bits: steps of 1/64 at a logit of 4


def test_rope_is_computed_in_float32_for_every_dtype():
    positions = torch.tensor([[255, 256, 257, 1001]])  # bfloat16 has no number between 256 and 258
    cos, sin = rope_cos_sin(positions, rope_frequencies(100.0, 4, None), torch.bfloat16)
    angles = torch.tensor([[p, p / 10, p, p / 10] for p in (255, 256, 257, 1001)], dtype=torch.float64)
    assert (cos[0, 0] - angles.cos()).abs().max() < 1 / 256  # half a step of bfloat16 just below 1
    assert (sin[0, 0] - angles.sin()).abs().max() < 1 / 256


# ----------------------------------------------------------------------------------------------------------------------
# Saving


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_keep_the_logits_and_the_config(family, tmp_path):
    tokens, logits = expected(family)
    model = Decoder.from_pretrained(FIXTURES / family)
    model.save_pretrained(tmp_path / "new" / "folder")
    again = Decoder.from_pretrained(tmp_path / "new" / "folder")
    assert torch.equal(again(tokens), model(tokens))
    assert again.config == model.config
    written = json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    original = json.loads((FIXTURES / family / "config.json").read_text())
    del original["rope_parameters"]  # written as rope_theta, the spelling that old and new transformers read
    assert {k: v for k, v in written.items() if k in original} == original
    assert not {"qk_norm", "norm_adds_one", "extra"} & written.keys()  # no fields of our own
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("family, tied", [("llama", False), ("qwen2", True), ("gemma", True)])
def test_tied_checkpoints_hold_the_matrix_once(family, tied, tmp_path):
    model = Decoder.from_pretrained(FIXTURES / family)
    assert model.config.tie_word_embeddings == tied
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in stored) == (not tied)
    assert stored.keys() == load_file(FIXTURES / family / "model.safetensors").keys()
    # A step of an optimizer reaches both ends of a tied matrix.
    before = model.output(torch.ones(16))
    model.model.embed_tokens.weight.mul_(2)
    assert torch.equal(model.output(torch.ones(16)), before * 2 if tied else before)


def test_saving_in_bfloat16_says_so_in_the_config(tmp_path):
    Decoder.from_pretrained(FIXTURES / "llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    tokens, logits = expected("llama")
    model = Decoder.from_pretrained(copy_checkpoint("llama", tmp_path))
    model.model.norm.weight.add_(1)

    def killed_half_way(weights, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("model.save_file", killed_half_way)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    assert (Decoder.from_pretrained(tmp_path)(tokens) - logits).abs().max() < 1e-4


def test_saving_over_the_folder_that_was_loaded(tmp_path):
    """The loaded tensors may be views of the file: replacing it must not change them, nor the model that is saved."""
    model = Decoder.from_pretrained(copy_checkpoint("llama", tmp_path))
    model.model.norm.weight.add_(1)
    tokens, _ = expected("llama")
    before = model(tokens)
    model.save_pretrained(tmp_path)
    assert torch.equal(model(tokens), before)
    assert torch.equal(Decoder.from_pretrained(tmp_path)(tokens), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_we_save(family, tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    tokens, _ = expected(family)
    model = Decoder.from_pretrained(FIXTURES / family)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-4
    assert theirs.config.eos_token_id == 2


def test_transformers_loads_a_fresh_model_that_we_save(tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    tokens, _ = expected("llama")
    torch.manual_seed(0)
    model = Decoder(Config("llama", **TINY, tie_word_embeddings=True, initializer_range=0.5))
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-4


@pytest.mark.parametrize("family, name, value", [
    ("llama", "head_dim", 4), ("llama", "num_key_value_heads", 4), ("llama", "rope_theta", 10_000),
    ("llama", "tie_word_embeddings", False), ("llama", "hidden_act", "silu"), ("llama", "layer_types", 7 * ["full_attention"]),
    ("qwen2", "tie_word_embeddings", False), ("qwen3", "head_dim", 128), ("gemma", "head_dim", 256),
    ("gemma", "tie_word_embeddings", True), ("gemma", "hidden_act", "gelu_pytorch_tanh"),
    ("gemma", "rope_theta", 10_000), ("gemma3_text", "rope_theta", 1_000_000),
    ("gemma3_text", "rope_local_base_freq", 10_000), ("gemma3_text", "sliding_window", 4096),
    ("gemma3_text", "query_pre_attn_scalar", 256),
    ("gemma3_text", "layer_types", 5 * ["sliding_attention"] + ["full_attention", "sliding_attention"]),
])
def test_fields_that_are_left_out(family, name, value):
    """The values are those of transformers 5.23; the next test compares with the version that is installed."""
    assert getattr(Config(family, **TINY | dict(num_hidden_layers=7)), name) == value


@pytest.mark.parametrize("family", TABLE)
def test_fields_that_are_left_out_have_the_defaults_of_transformers(family, tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    sizes = {**TINY, "hidden_size": 32, "num_hidden_layers": 8, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **sizes}))
    ours, theirs = Config.from_json(tmp_path / "config.json"), transformers.AutoConfig.for_model(family, **sizes)
    ropes = theirs.rope_parameters
    if family == "gemma3_text":
        for name in ("query_pre_attn_scalar", "sliding_window", "layer_types"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.rope_local_base_freq == ropes["sliding_attention"]["rope_theta"]
        ropes = ropes["full_attention"]
    assert ours.rope_theta == ropes["rope_theta"]
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 32 // 4)
    assert ours.hidden_act == (theirs.hidden_activation if family == "gemma3_text" else theirs.hidden_act)
    for name in ("tie_word_embeddings", "rms_norm_eps", "initializer_range"):
        assert getattr(ours, name) == getattr(theirs, name)


# ----------------------------------------------------------------------------------------------------------------------
# Fresh models


def test_fresh_weights_follow_the_seed_and_the_range():
    config = Config(model_type="qwen2", **TINY | dict(vocab_size=1000), num_key_value_heads=2, tie_word_embeddings=True)
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(Decoder(config).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0]["model.embed_tokens.weight"], models[2]["model.embed_tokens.weight"])
    assert models[0]["model.embed_tokens.weight"].std() == pytest.approx(0.02, rel=0.05)  # 16,000 numbers: +- 0.6 %
    assert models[0]["model.layers.0.self_attn.q_proj.bias"].abs().max() == 0
    assert models[0]["model.norm.weight"].tolist() == [1] * 16


def test_fresh_config_is_written_with_its_extra_fields(tmp_path):
    Decoder(Config("llama", **TINY, extra={"eos_token_id": 7})).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["eos_token_id"], written["model_type"], written["head_dim"]) == (7, "llama", 4)
    assert written["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma_untied"])
def test_cast_gives_a_copy_and_leaves_the_model_alone(family):
    model = Decoder.from_pretrained(FIXTURES / family)
    tokens, before = torch.arange(12)[None], model(torch.arange(12)[None])
    assert model.cast(torch.float32) is model
    low = model.cast(torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16} and {p.dtype for p in model.parameters()} == {torch.float32}
    assert low(tokens).dtype == torch.bfloat16
    wanted = Decoder.from_pretrained(FIXTURES / family, dtype=torch.bfloat16)(tokens)
    assert torch.equal(low(tokens), wanted) and torch.equal(model(tokens), before)


# ----------------------------------------------------------------------------------------------------------------------
# LoRA and activation checkpointing


def with_adapters():
    """The fixture "qwen2" with the adapters of lora.safetensors, and what peft computes with them."""
    stored = load_file(FIXTURES / "lora.safetensors")
    model = Decoder.from_pretrained(FIXTURES / "qwen2")
    model.add_lora(rank=3, alpha=7)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.copy_(stored[name])
    return model, stored


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_gives_the_loss_and_gradients_of_peft(checkpointing):
    """Only the adapters are trained; also with activations computed twice, which must change nothing."""
    model, stored = with_adapters()
    model.checkpointing = checkpointing
    tokens, _ = expected("qwen2")
    with torch.enable_grad():
        logits = model(tokens)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
    assert (logits - stored["logits"]).abs().max() < 1e-4 and (loss - stored["loss"]).abs() < 1e-5
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.keys() == {name for name in stored if "lora" in name and not name.endswith("grad")}
    for name, parameter in trained.items():
        assert (parameter.grad - stored[f"{name}.grad"]).abs().max() < 1e-5, name


def test_fresh_adapters_change_nothing_and_follow_the_seed():
    tokens, logits = expected("qwen2")
    models = [Decoder.from_pretrained(FIXTURES / "qwen2") for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2)):
        model.add_lora(seed=seed)
        assert (model(tokens) - logits).abs().max() < 1e-4
    first, again, other = (model.model.layers[1].mlp.up_proj.lora_A for model in models)
    assert first.shape == (16, 16) and torch.equal(first, again) and not torch.equal(first, other)
    assert 0.2 < first.abs().max() <= 0.25  # 1 / sqrt(16)


def test_merged_adapters_give_the_same_logits(tmp_path):
    """And leave a plain model: every parameter trainable again, a checkpoint with the names of any other."""
    model, stored = with_adapters()
    model.merge_lora()
    tokens, _ = expected("qwen2")
    assert (model(tokens) - stored["logits"]).abs().max() < 1e-4
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    assert (Decoder.from_pretrained(tmp_path)(tokens) - stored["logits"]).abs().max() < 1e-4
    model.merge_lora()  # nothing left to merge
    assert (model(tokens) - stored["logits"]).abs().max() < 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# config.json


def spell_rope_as_transformers_4(config):
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    scaling = rope if rope["rope_type"] != "default" else None  # an extra rope_theta inside does no harm
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_of_rope_settings(family, tmp_path):
    tokens, logits = expected(family)
    old = Decoder.from_pretrained(copy_checkpoint(family, tmp_path, spell_rope_as_transformers_4))
    assert old.config.rope_theta == 100
    assert (old(tokens) - logits).abs().max() < 1e-4


def test_other_spellings_of_gemma_configs(tmp_path):
    def as_first_released(config):
        config |= {"hidden_act": "gelu", "hidden_activation": None, "torch_dtype": "bfloat16"}
        config.pop("tie_word_embeddings", None)

    tokens, logits = expected("gemma")
    first = Decoder.from_pretrained(copy_checkpoint("gemma", tmp_path / "1", as_first_released))
    assert first.config.tie_word_embeddings
    assert (first(tokens) - logits).abs().max() < 1e-4

    def with_a_pattern(config):
        del config["layer_types"], config["hidden_activation"], config["tie_word_embeddings"]
        config["sliding_window_pattern"] = 2

    tokens, logits = expected("gemma3_text")
    pattern = Decoder.from_pretrained(copy_checkpoint("gemma3_text", tmp_path / "2", with_a_pattern))
    assert (pattern(tokens) - logits).abs().max() < 1e-4


@pytest.mark.parametrize("family, field, value", [
    ("llama", "model_type", "mixtral"),
    ("llama", "model_type", None),
    ("llama", "hidden_act", "relu"),
    ("llama", "attention_bias", True),
    ("llama", "mlp_bias", True),
    ("llama", "quantization_config", {"quant_method": "gptq"}),
    ("llama", "num_local_experts", 8),
    ("llama", "rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
    ("qwen2", "rope_scaling", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                               "original_max_position_embeddings": 64}),
    ("llama", "rope_scaling", {"type": "linear", "factor": 2.0}),
    ("llama", "rope_parameters", {"rope_type": "yarn", "rope_theta": 100.0}),
    ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}),
    ("qwen2", "use_sliding_window", True),
    ("qwen2", "layer_types", ["full_attention", "sliding_attention"]),
    ("gemma3_text", "layer_types", ["full_attention", "chunked_attention"]),
    ("gemma3_text", "layer_types", ["full_attention"]),
    ("gemma3_text", "hidden_activation", "gelu"),
    ("gemma3_text", "attn_logit_softcapping", 50.0),
    ("gemma3_text", "final_logit_softcapping", 30.0),
    ("gemma3_text", "use_bidirectional_attention", True),
    ("gemma3_text", "rope_parameters", {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100.0}}),
])
def test_what_is_not_implemented_is_refused(family, field, value, tmp_path):
    folder = copy_checkpoint(family, tmp_path, lambda config: config.update({field: value}))
    with pytest.raises(ValueError) as error:
        Decoder.from_pretrained(folder)
    shown = "hidden_act" if field == "hidden_activation" else field
    assert shown in str(error.value) and str(folder / "config.json") in str(error.value)
    assert value is None or repr(value) in str(error.value)


@pytest.mark.parametrize("fields, named", [
    ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
      "text_config": {"model_type": "gemma3_text"}, "vision_config": {}},
     "['Gemma3ForConditionalGeneration']"),
    ({"model_type": "llama4", "text_config": {"hidden_size": 16}}, "'llama4'"),
    ({"model_type": "qwen2_vl", **TINY, "vision_config": {}}, "'qwen2_vl'"),
    ({"model_type": "qwen2_audio", "audio_config": {}}, "'qwen2_audio'"),
    ({"model_type": "mistral", "architectures": ["MistralForCausalLM"], **TINY}, "['Mistral"),
    ({"model_type": "phi3", **TINY, "attention_bias": True}, "'phi3'"),
    ({"model_type": "gpt2", "n_embd": 768}, "'gpt2'"),
    ({"model_type": "gemma2", **TINY}, "'gemma2'"),
    ({"model_type": ["llama"], **TINY}, "['llama']"),
    ({"architectures": ["LlamaForCausalLM"]}, "['LlamaForCausalLM']"),
    ({}, "None"),
])
def test_other_families_are_refused_by_name(fields, named, tmp_path):
    """Whatever their fields are called: file, family and the known families, in one line."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError) as error:
        Config.from_json(path)
    message = str(error.value)
    start = f"{path}: model_type = {fields.get('model_type')!r} is not implemented, only "
    assert message.startswith(start + ", ".join(TABLE))
    assert named in message and "\n" not in message and "argument" not in message


def test_a_missing_field_is_named(tmp_path):
    folder = copy_checkpoint("llama", tmp_path, lambda config: config.pop("hidden_size"))
    with pytest.raises(ValueError, match="config.json.*'hidden_size'"):
        Decoder.from_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Strict loading


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.bias", "lm_head.weight", "model.norm.weight"])
def test_a_missing_tensor_is_named(name, tmp_path):
    family = "qwen2" if name.endswith("bias") else "llama"
    folder = copy_checkpoint(family, tmp_path, change_weights=lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))}: .*Missing.*{name}"):
        Decoder.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_an_extra_tensor_is_named(name, tmp_path):
    folder = copy_checkpoint("llama", tmp_path, change_weights=lambda weights: weights.update({name: torch.ones(2)}))
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))}: .*Unexpected.*{name}"):
        Decoder.from_pretrained(folder)


def test_rope_frequencies_in_a_file_are_passed_over(tmp_path):
    """The first Llama checkpoints hold them, one tensor a layer."""
    name, (tokens, logits) = "model.layers.0.self_attn.rotary_emb.inv_freq", expected("llama")
    copy_checkpoint("llama", tmp_path, change_weights=lambda weights: weights.update({name: torch.ones(2)}))
    assert (Decoder.from_pretrained(tmp_path)(tokens) - logits).abs().max() < 1e-4


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path):
    def reshape(weights):
        weights["model.norm.weight"] = torch.ones(1, 16)  # would broadcast to (16,) if it were copied

    folder = copy_checkpoint("llama", tmp_path, change_weights=reshape)
    with pytest.raises(ValueError, match=r"model.norm.weight.*\[1, 16\].*\[16\]"):
        Decoder.from_pretrained(folder)


def test_weights_that_are_no_floats_are_refused(tmp_path):
    def quantise(weights):
        weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].to(torch.int8)

    with pytest.raises(ValueError, match="model.layers.0.mlp.up_proj.weight holds .*int8"):
        Decoder.from_pretrained(copy_checkpoint("llama", tmp_path, change_weights=quantise))

    def spoil(weights):
        weights["model.norm.weight"][3] = math.nan

    with pytest.raises(ValueError, match="model.norm.weight holds nan or infinity"):
        Decoder.from_pretrained(copy_checkpoint("llama", tmp_path, change_weights=spoil))


def test_a_tied_checkpoint_may_repeat_its_matrix_but_not_change_it(tmp_path):
    def repeat(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    def repeat_and_change(weights):
        repeat(weights)
        weights["lm_head.weight"][3, 5] += 1e-3

    tokens, logits = expected("qwen2")
    model = Decoder.from_pretrained(copy_checkpoint("qwen2", tmp_path / "1", change_weights=repeat))
    assert (model(tokens) - logits).abs().max() < 1e-4
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        Decoder.from_pretrained(copy_checkpoint("qwen2", tmp_path / "2", change_weights=repeat_and_change))


def test_files_that_are_missing_or_broken_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere/config.json"):
        Decoder.from_pretrained(tmp_path / "nowhere")
    for name in ("config.json", "model.safetensors"):
        folder = copy_checkpoint("llama", tmp_path / f"no {name}")
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            Decoder.from_pretrained(folder)
        for size in (0, 5, 300):  # bytes: nothing, inside the length of the header, inside the header or the text
            folder = copy_checkpoint("llama", tmp_path / f"{size} bytes of {name}")
            (folder / name).write_bytes((folder / name).read_bytes()[:size])
            with pytest.raises(ValueError, match=name):
                Decoder.from_pretrained(folder)
    folder = copy_checkpoint("llama", tmp_path / "one byte less")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match="model.safetensors"):
        Decoder.from_pretrained(folder)


def shards(folder):
    return sorted(folder.glob("model-*-of-00003.safetensors"))


FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


def cut_in_two(folder, weights):
    """Puts two shards in the place of model.safetensors. Returns the weight_map of their index."""
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for file, part in ((FIRST, names[:9]), (SECOND, names[9:])):
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= {name: file for name in part}
    return weight_map


def read_weight_map(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def write_index(folder, weight_map):
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def old_index(folder):
    shutil.copy(FIXTURES / "llama3/model.safetensors.index.json", folder)


def old_index_and_shards(folder):
    for path in (FIXTURES / "llama3").glob("model*"):
        shutil.copy(path, folder)


def stray_shard(folder):
    shutil.copy(shards(folder)[0], folder / "model-00004-of-00004.safetensors")


def unnamed_tensor(folder):
    weight_map = read_weight_map(folder)
    del weight_map["model.norm.weight"]
    write_index(folder, weight_map)


def tensor_of_another_shard(folder):
    weight_map = read_weight_map(folder)
    wrong = shards(folder)[0].name
    assert weight_map["model.norm.weight"] != wrong
    write_index(folder, weight_map | {"model.norm.weight": wrong})


def named_head_that_is_nowhere(folder):
    weight_map = cut_in_two(folder, load_file(folder / "model.safetensors"))
    write_index(folder, weight_map | {"lm_head.weight": FIRST})


def head_of_another_shard(folder):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weight_map = cut_in_two(folder, weights)
    assert weight_map["lm_head.weight"] == FIRST
    write_index(folder, weight_map | {"lm_head.weight": SECOND})


def rename_embedding(folder):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def head_alone_in_shards(folder):
    rename_embedding(folder)
    write_index(folder, cut_in_two(folder, load_file(folder / "model.safetensors")))


ODD_FOLDERS = [
    ("llama", old_index), ("llama", old_index_and_shards), ("llama3", stray_shard),
    ("llama3", unnamed_tensor), ("llama3", tensor_of_another_shard),
    ("qwen2", named_head_that_is_nowhere), ("qwen2", head_of_another_shard),
    ("qwen2", rename_embedding), ("gemma", rename_embedding), ("qwen2", head_alone_in_shards)]


@pytest.mark.parametrize("family, change", ODD_FOLDERS)
def test_odd_folders_load_as_in_transformers(family, change, tmp_path):
    """A whole file comes before shards. Of an index only the names of the files count. A tied
    matrix may stand under either of its names."""
    tokens, logits = expected(family)
    folder = copy_checkpoint(family, tmp_path)
    change(folder)
    assert (Decoder.from_pretrained(folder)(tokens) - logits).abs().max() < 1e-4


@pytest.mark.parametrize("family, change", ODD_FOLDERS)
def test_transformers_loads_odd_folders(family, change, tmp_path):
    """The test above asks for nothing else than transformers does."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokens, logits = expected(family)
    folder = copy_checkpoint(family, tmp_path)
    change(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert (theirs(tokens).logits - logits).abs().max() < 1e-4


def test_an_untied_head_is_no_embedding(tmp_path):
    """Only in a tied model is lm_head.weight the embedding as well."""
    def drop(weights):
        del weights["model.embed_tokens.weight"]

    folder = copy_checkpoint("llama", tmp_path, change_weights=drop)
    with pytest.raises(ValueError, match="Missing.*model.embed_tokens.weight"):
        Decoder.from_pretrained(folder)


def test_saving_over_a_sharded_checkpoint(tmp_path):
    """What is loaded afterwards is what was saved, not the shards that lie there still."""
    model = Decoder.from_pretrained(copy_checkpoint("llama3", tmp_path))
    model.model.norm.weight += 1
    model.save_pretrained(tmp_path)
    assert torch.equal(Decoder.from_pretrained(tmp_path).model.norm.weight, model.model.norm.weight)


def drop_shard(folder):
    shards(folder)[1].unlink()
    return FileNotFoundError, shards(FIXTURES / "llama3")[1].name


def drop_tensor(folder):
    weights = load_file(shards(folder)[0])
    name, _ = weights.popitem()
    save_file(weights, shards(folder)[0])
    return ValueError, name


def add_tensor(folder):
    save_file(load_file(shards(folder)[2]) | {"one.more": torch.zeros(1)}, shards(folder)[2])
    return ValueError, "one.more"


def cut_shard(folder):
    shards(folder)[1].write_bytes(shards(folder)[1].read_bytes()[:-7])
    return ValueError, shards(folder)[1].name


def replace_index(content):
    def break_it(folder):
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        return ValueError, "model.safetensors.index.json"
    return break_it


def number_for_a_shard(folder):
    write_index(folder, {"model.norm.weight": 3})
    return FileNotFoundError, "3"


@pytest.mark.parametrize("break_it", [
    drop_shard, drop_tensor, add_tensor, cut_shard, number_for_a_shard,
    replace_index({}), replace_index([]), replace_index({"weight_map": []})])
def test_a_broken_sharded_checkpoint_is_named(break_it, tmp_path):
    """A missing shard, a missing or extra tensor, a cut file, an index that is none."""
    folder = copy_checkpoint("llama3", tmp_path)
    error, named = break_it(folder)
    with pytest.raises(error) as raised:
        Decoder.from_pretrained(folder)
    assert named in str(raised.value) and str(folder) in str(raised.value)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_loading_needs_the_memory_of_one_copy(tmp_path):
    """64 MiB of bfloat16 weights. With a model of fresh float32 weights beside them it would be 192 MiB or more."""
    config = Config("llama", **TINY | dict(vocab_size=2 ** 21, tie_word_embeddings=True))
    torch.set_default_dtype(torch.bfloat16)
    try:
        Decoder(config).save_pretrained(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    # VmHWM is the peak of this program; ru_maxrss would start with that of the process which started it.
    program = ("import sys, torch; from model import Decoder\n"
               "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024  # MiB\n"
               "Decoder.from_pretrained('tests/fixtures/llama'); before = peak()\n"
               "model = Decoder.from_pretrained(sys.argv[1], dtype=torch.bfloat16)\n"
               "assert model.model.embed_tokens.weight.sum() != 0\n"
               "print(peak() - before)")
    ran = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=Path(__file__).parent.parent,
                         capture_output=True, text=True, check=True)
    assert 60 < float(ran.stdout) < 64 * 1.5


@torch.enable_grad()
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("H_kv", [1, 2, 6])
def test_attention_written_out_is_the_fused_one(H_kv, window):
    """Its values and its gradients, for heads that share keys and for sliding layers."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = [torch.randn(2, heads, 7, 4, generator=generator) for heads in (6, H_kv, H_kv)]
    mask = None if window is None else visible_keys(torch.arange(7)[None], 7, window)
    results = []
    for function in (attend, attend_fused):
        leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        y = function(*leaves, mask, 0.3)
        y.square().sum().backward()
        results.append([y, *[leaf.grad for leaf in leaves]])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
