"""Finds the checkpoint that --model names: a folder, or a model on the Hugging Face hub."""
import os
import re
import sys
from functools import cache
from pathlib import Path

FILES = ["config.json", "generation_config.json", "tokenizer.json", "model*.safetensors",
         "model.safetensors.index.json"]


@cache  # all runs of a command begin with the same weights, even if the hub gets newer ones
def find_model(name) -> Path:
    """The folder `name`. If there is none, and `name` looks like owner/name: the folder where the
    hub's files of that name are kept, which are fetched if they are new. Token, cache and offline
    mode are as the user set them up for huggingface_hub, which takes what is in its cache where it
    does not reach the hub. Several processes may fetch at once: it locks each file.

    OSError says why the hub's files cannot be had. Whether another folder exists is left to those
    who read it.
    """
    path = Path(name)
    name = path.as_posix()
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
        return path
    # Imported here, since it takes longer than a folder is worth.
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars, logging
    logging.set_verbosity_error()  # what went wrong is said below, in one line
    if int(os.environ.get("RANK", 0)) > 0 or not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = Path(snapshot_download(name, allow_patterns=FILES, ignore_patterns="*/*"))
    except Exception as error:  # also those of its HTTP library, which changes with its version
        reason = " ".join(str(error).split())
        raise OSError(f"--model {name}: no such folder here, and not fetched from the Hugging Face "
                      f"hub: {type(error).__name__}: {reason}") from error
    if not any(folder.glob("model*.safetensors")):
        raise OSError(f"--model {name}: no model*.safetensors among its files on the Hugging Face "
                      f"hub, as far as they are in {folder}")
    return folder
