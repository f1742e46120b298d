"""Options of the benchmarks.

pytest benchmarks/ --benchmark-only                  what this machine can do in ten minutes
pytest benchmarks/ --benchmark-only --all-peers      compiled peers at every size, too
"""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-peers", action="store_true", help="also what takes minutes to start on a CPU: compiled peers, everywhere"
    )
