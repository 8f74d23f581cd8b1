"""Ends the helper process that the worker pools of these tests start in pytest itself."""

import gc
from collections.abc import Iterator
from multiprocessing import resource_tracker

import pytest


@pytest.fixture(scope="session", autouse=True)
def _no_resource_tracker_left() -> Iterator[None]:
    yield
    # Python keeps it until the interpreter exits; the session's check for processes left behind
    # looks before that. Semaphores unregister with it when collected, so they go first.
    gc.collect()
    resource_tracker._resource_tracker._stop()  # pyright: ignore[reportAttributeAccessIssue]
