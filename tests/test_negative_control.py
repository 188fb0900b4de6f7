"""The suite fails on kernels that are broken on purpose, each in another way, and passes on the same build unbroken."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import mutants
import pytest
import run_lanes
from mutants import LOADED, MUTANTS, OUT_OF_BOUNDS, PASSED, Mutant

pytestmark = pytest.mark.negative_control
UNBROKEN = Mutant("unbroken", "", "", "")


class Builds:
    """Two builds, plain and with sanitizers, of which mutants are made; several at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool = ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0))))
        self.bases: dict[bool, Future[Path]] = {}
        self.verdicts: dict[Mutant, Future[str]] = {}

    def base(self, sanitize: bool) -> Path:
        base = mutants.copy_of_the_package(self.folder / f"base{sanitize:d}")
        why = mutants.build(base, **({"FASTWRS_SANITIZE": "1"} if sanitize else {}))
        assert why is None, why
        return base

    def submit(self, asked: list[Mutant]) -> None:
        for sanitize in {mutant in OUT_OF_BOUNDS for mutant in asked}:
            self.bases[sanitize] = self.pool.submit(self.base, sanitize)
        for mutant in asked:
            self.verdicts[mutant] = self.pool.submit(self.verdict, mutant, len(self.verdicts))

    def verdict(self, mutant: Mutant, number: int) -> str:
        """What the process prints that tests the mutant; ends with PASSED where it survives."""
        sanitize = mutant in OUT_OF_BOUNDS
        folder = self.folder / f"mutant{number}"
        shutil.copytree(self.bases[sanitize].result(), folder)
        environment = {"FASTWRS_SANITIZE": "1"} if sanitize else {}
        why = mutants.build(folder, None if mutant == UNBROKEN else mutant, **environment)
        assert why is None, why
        done = mutants.run(folder, **(run_lanes.sanitizer_environment() if sanitize else {}))
        # another extension than the broken one would prove nothing
        assert f"{LOADED} {folder / 'lib/fastwrs/_C.abi3.so'}" in done.stdout, done.stdout + done.stderr
        assert (done.returncode == 0) == (PASSED in done.stdout), done.stdout + done.stderr
        shutil.rmtree(folder)
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def builds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builds]:
    folder = tmp_path_factory.mktemp("mutants")
    if mutants.setup_module(mutants.ROOT).find_compiler() is None:
        pytest.skip("needs a C++ compiler")
    builds = Builds(folder.resolve())
    found = [getattr(item, "callspec", None) for item in request.session.items]
    builds.submit([spec.params["mutant"] for spec in found if spec and "mutant" in spec.params])
    yield builds
    builds.pool.shutdown(cancel_futures=True)
    shutil.rmtree(folder)


by_name = partial(pytest.mark.parametrize, "mutant", ids=lambda mutant: mutant.name.replace(" ", "_"))


@by_name([UNBROKEN])
def test_the_unbroken_build_passes(builds: Builds, mutant: Mutant) -> None:
    said = builds.verdicts[mutant].result()
    assert PASSED in said, said


@by_name(MUTANTS)
def test_caught(builds: Builds, mutant: Mutant) -> None:
    said = builds.verdicts[mutant].result()
    assert PASSED not in said, "this mutant survives: the suite has a hole"


@by_name(OUT_OF_BOUNDS)
def test_caught_by_the_sanitizer(builds: Builds, mutant: Mutant) -> None:
    said = builds.verdicts[mutant].result()
    assert "AddressSanitizer: heap-buffer-overflow" in said, said
