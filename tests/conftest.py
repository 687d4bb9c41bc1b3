"""Lets the tests import the files at the top of the repository, whether run as `pytest` or `python -m pytest`."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
