"""Nothing is fetched in tests; diffusers and transformers say nothing of their own on import."""

import os
import warnings
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers.utils.logging as diffusers_logging
    import transformers

diffusers_logging.set_verbosity_error()
transformers.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def untrained() -> Any:
    """The digits pipeline before training: real parts, pictures of noise. Not to be changed."""
    from diffusion_unlearn.digits import build_pipeline

    return build_pipeline(generator=0)
