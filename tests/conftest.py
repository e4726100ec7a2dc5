"""What all tests share. One CPU thread: faster on tiny models, and the same sums in every run; and the same examples, too."""

from __future__ import annotations

import copy
import gc
import os
import signal
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import PreTrainedModel

import wsd_hf
from families import tiny_model, tiny_pilot

torch.set_num_threads(1)
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")

# Servers of the tests have no keys of the user's, and no proxy leads to them.
for key in [name for name in os.environ if name.startswith("WSD_HF_")]:
    del os.environ[key]
for name in ("NO_PROXY", "no_proxy"):
    os.environ[name] = ",".join([*filter(None, [os.environ.get(name)]), "127.0.0.1", "localhost"])


def pytest_collection_finish() -> None:
    """Leaves all that the modules hold out of garbage collections, of which the tests of memory call for many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def base() -> PreTrainedModel:
    """A tiny Llama that takes `strategy=`; no test changes it."""
    return wsd_hf.enable_wsd(copy.deepcopy(tiny_model("llama")))


@pytest.fixture(scope="session")
def pilot() -> PreTrainedModel:
    """Its pilot; no test changes it."""
    return tiny_pilot("llama")


@pytest.fixture
def own_base() -> PreTrainedModel:
    """A base that the test may change."""
    return wsd_hf.enable_wsd(copy.deepcopy(tiny_model("llama")))


@pytest.fixture
def own_pilot() -> PreTrainedModel:
    """A pilot that the test may change."""
    return copy.deepcopy(tiny_pilot("llama"))


@pytest.fixture
def tried(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Counts what a test tries, for the table of docs/reliability.md: a kind, and how many of it (one)."""

    def count(kind: str, number: int = 1) -> None:
        record_property("tried", (kind, number))

    return count


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_raises() -> None:
    """A shell that starts the tests in the background makes them ignore Ctrl-C, which some of them send."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
