"""Lets the tests import the files at the top of the repository, whether run as `pytest` or `python -m pytest`."""
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# A background job of a shell ignores Ctrl-C, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
