"""Marks, and tests/ on the path so that tests can share `graphs.py`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: more than a minute; left out by -m 'not slow'")
