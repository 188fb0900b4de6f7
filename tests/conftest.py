"""The fixture that runs a test on every backend."""

from __future__ import annotations

import pytest

from fastwrs import dispatch


@pytest.fixture(params=("cpu", "reference"))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend's name; meanwhile ``backend="auto"`` means it. One that cannot run fails the test.

    C++ keeps the shortest of lists from step to step, for what users do to a tensor to be done to one that is kept.
    """
    monkeypatch.setenv("FASTWRS_BACKEND", request.param)
    monkeypatch.setattr(dispatch.cpu.kept, "FEWEST", 1)
    return request.param
