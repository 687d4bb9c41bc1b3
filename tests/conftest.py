"""What the tests of train.py share: a tiny student. Also lets all tests import the files at the top
of the repository, whether they are run as `pytest` or as `python -m pytest`.
"""
import os
import signal
import sys
from pathlib import Path

# One thread, here and in the commands that tests start: the models are so small that threads would
# wait for each other, and only runs with equally many threads have equal bits.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import Config, Decoder  # noqa: E402

# A background job of a shell ignores Ctrl-C, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

TEXTS = ["What is 1 + 2? Tell me.", "[cot]: 3 + 4 = 7. Final answer: 5",
         "[l2m]: What is added? 6. Final answer: 8", "[pot]: answer = 9 + 0"]


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory):
    """The folder of an untrained decoder, with a tokenizer that knows the words of TEXTS. Its end
    token has id 0, as padding has: who tells them apart by id is found out."""
    folder = tmp_path_factory.mktemp("student") / "tiny"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<end>"],
                                  initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    torch.manual_seed(0)
    config = Config("llama", vocab_size=tokenizer.get_vocab_size(), hidden_size=48,
                    intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
                    max_position_embeddings=256, tie_word_embeddings=True,
                    initializer_range=0.1, extra={"eos_token_id": 0})
    Decoder(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
