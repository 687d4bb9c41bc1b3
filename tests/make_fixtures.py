"""Writes tests/fixtures/: per family a tiny random checkpoint and the logits that transformers computes with it.

A development script: the fixtures are committed, and only a new family needs it again. It needs transformers, which the
tests do not:

    pip install transformers==5.23.0 peft==0.21.2 && python tests/make_fixtures.py     # seconds, 7 x 30 kB

Each family's folder holds config.json and model.safetensors as transformers saves them, and expected.safetensors:
`tokens` (2, 12) and `logits` (2, 12, 40), float32, computed on the CPU with transformers' plain ("eager") attention.
lora.safetensors holds adapters for the fixture "qwen2", and the loss of its tokens and the gradients that peft computes.
"""
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

FIXTURES = Path(__file__).parent / "fixtures"
# Sizes differ from each other and settings from every default, so that none can be swapped or left out unnoticed.
COMMON = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=0.01, bos_token_id=1, eos_token_id=2,
              pad_token_id=0)
ROPE = {"rope_type": "default", "rope_theta": 100.0}
FAMILIES = {  # folder: settings, with a model_type where that is not the folder's name
    "llama": dict(rope_parameters=ROPE, tie_word_embeddings=False),
    "qwen2": dict(rope_parameters=ROPE, tie_word_embeddings=True),
    "qwen3": dict(rope_parameters=ROPE, tie_word_embeddings=False, head_dim=6),
    "gemma": dict(rope_parameters=ROPE, head_dim=6),
    # 12 tokens, three times the window of the sliding layer.
    "gemma3_text": dict(rope_parameters={"full_attention": ROPE, "sliding_attention": ROPE | {"rope_theta": 30.0}},
                        layer_types=["sliding_attention", "full_attention"], sliding_window=4, head_dim=6,
                        query_pre_attn_scalar=11),
    # Of the three pairs of a head one keeps its speed, one is blended, one is stretched; and in several files.
    "llama3": dict(model_type="llama", max_position_embeddings=512, tie_word_embeddings=True, head_dim=6, rope_parameters={
        "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}),
    "gemma_untied": dict(model_type="gemma", rope_parameters=ROPE, head_dim=6, tie_word_embeddings=False),
}
SHARDED = {"llama3"}


def main() -> None:
    for seed, (family, settings) in enumerate(FAMILIES.items()):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(**{"model_type": family} | COMMON | settings)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Norm weights and biases start as ones and zeros, with which a forgotten term would not show.
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 2 else 0.5))
            tokens = torch.randint(0, config.vocab_size, (2, 12))
            logits = model(tokens).logits
        folder = FIXTURES / family
        model.save_pretrained(folder, max_shard_size="8KB" if family in SHARDED else "1GB")
        (folder / "generation_config.json").unlink(missing_ok=True)
        save_file({"tokens": tokens, "logits": logits.contiguous()}, folder / "expected.safetensors")
        print(f"{folder.name}: logits from {logits.min():.2f} to {logits.max():.2f}")


def write_lora() -> None:
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / "qwen2", attn_implementation="eager")
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=7, lora_dropout=0.0, target_modules=projections))
    adapters = {name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
                for name, parameter in model.named_parameters() if parameter.requires_grad}
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.normal_(std=0.3)
    tokens = load_file(FIXTURES / "qwen2/expected.safetensors")["tokens"]
    output = model(tokens, labels=tokens)
    output.loss.backward()
    save_file({"loss": output.loss.detach(), "logits": output.logits.detach()}
              | {name: parameter.detach() for name, parameter in adapters.items()}
              | {f"{name}.grad": parameter.grad for name, parameter in adapters.items()}, FIXTURES / "lora.safetensors")
    print(f"LoRA: loss {output.loss:.3f}, {len(adapters)} adapters")


if __name__ == "__main__":
    main()
    write_lora()
