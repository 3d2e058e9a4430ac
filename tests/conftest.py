"""What several test files share: the directory of the real test model."""

from pathlib import Path

import pytest

from paged_kv import models


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct in bfloat16, from the user's cache (made there on first use, 20 s)."""
    return models.smollm2()
