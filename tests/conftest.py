"""The fixture that runs a test on every backend."""

from __future__ import annotations

import pytest


@pytest.fixture(params=("cpu", "reference"))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend's name; meanwhile ``backend="auto"`` means it. One that cannot run fails the test."""
    monkeypatch.setenv("FASTWRS_BACKEND", request.param)
    return request.param
