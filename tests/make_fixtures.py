"""Writes tests/fixtures/: per family a tiny random checkpoint and the logits that transformers computes with it.

A development script: the fixtures are committed, and only a new family needs it again. It needs transformers, which the
tests do not:

    pip install transformers==5.23.0 && python tests/make_fixtures.py     # seconds, 5 x 30 kB

Each family's folder holds config.json and model.safetensors as transformers saves them, and expected.safetensors:
`tokens` (2, 12) and `logits` (2, 12, 40), float32, computed on the CPU with transformers' plain ("eager") attention.
"""
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

FIXTURES = Path(__file__).parent / "fixtures"
# Sizes differ from each other and settings from every default, so that none can be swapped or left out unnoticed.
COMMON = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=0.01, bos_token_id=1, eos_token_id=2,
              pad_token_id=0)
ROPE = {"rope_type": "default", "rope_theta": 100.0}
FAMILIES = {
    "llama": dict(rope_parameters=ROPE, tie_word_embeddings=False),
    "qwen2": dict(rope_parameters=ROPE, tie_word_embeddings=True),
    "qwen3": dict(rope_parameters=ROPE, tie_word_embeddings=False, head_dim=6),
    "gemma": dict(rope_parameters=ROPE, head_dim=6),
    # 12 tokens, three times the window of the sliding layer.
    "gemma3_text": dict(rope_parameters={"full_attention": ROPE, "sliding_attention": ROPE | {"rope_theta": 30.0}},
                        layer_types=["sliding_attention", "full_attention"], sliding_window=4, head_dim=6,
                        query_pre_attn_scalar=11),
}


def main() -> None:
    for seed, (model_type, settings) in enumerate(FAMILIES.items()):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(model_type, **COMMON, **settings)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Norm weights and biases start as ones and zeros, with which a forgotten term would not show.
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 2 else 0.5))
            tokens = torch.randint(0, config.vocab_size, (2, 12))
            logits = model(tokens).logits
        folder = FIXTURES / model_type
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        save_file({"tokens": tokens, "logits": logits.contiguous()}, folder / "expected.safetensors")
        print(f"{folder.name}: logits from {logits.min():.2f} to {logits.max():.2f}")


if __name__ == "__main__":
    main()
