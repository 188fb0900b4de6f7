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
from forked import PASSED, Server, Servers
from mutants import FEW, MUTANTS, OUT_OF_BOUNDS, Mutant

pytestmark = pytest.mark.negative_control
UNBROKEN = Mutant("unbroken", "", "", "", triples=len(FEW))
SANITIZE = {"FASTWRS_SANITIZE": "address"}
SCRIPT = Path(mutants.__file__)


class Control:
    """Builds mutants and puts them to the tests, several at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool = ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0))))
        self.servers = Servers(SCRIPT)
        self.verdicts: dict[Mutant, Future[str]] = {}

    def submit(self, asked: list[Mutant]) -> None:
        self.bases = {n: self.pool.submit(self.build_base, n) for n in {mutant.triples for mutant in asked}}
        for mutant in asked:
            self.verdicts[mutant] = self.pool.submit(self.verdict, mutant, len(self.verdicts))

    def build_base(self, triples: int) -> Path:
        """A build without a fault; one with a fault compiles only what the fault changes."""
        base = mutants.copy_of_the_package(self.folder / f"base{triples}", triples)
        why = mutants.build(base)
        assert why is None, why
        return base

    def verdict(self, mutant: Mutant, number: int) -> str:
        """What is said where the mutant is put to the tests."""
        folder = self.folder / f"mutant{number}"
        base = self.bases[mutant.triples].result()
        sanitize = SANITIZE if mutant in OUT_OF_BOUNDS else {}
        if sanitize:
            mutants.copy_of_the_package(folder, mutant.triples)
        else:
            shutil.copytree(base, folder)
        why = mutants.build(folder, None if mutant == UNBROKEN else mutant, **sanitize)
        assert why is None, why
        if sanitize:
            server = Server(SCRIPT, folder / "lib", **run_lanes.sanitizer_environment())
            said = server.test(folder / "lib", mutant.triples)
            server.close()
        else:
            said = self.servers.test(base / "lib", folder / "lib", mutant.triples)
        shutil.rmtree(folder)
        return said

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.servers.close()


@pytest.fixture(scope="module")
def control(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Control]:
    assert mutants.setup_module(mutants.ROOT).find_compiler() is not None, "needs a C++ compiler"
    control = Control(tmp_path_factory.mktemp("mutants").resolve())
    selected = [getattr(item, "callspec", None) for item in request.session.items]
    control.submit([spec.params["mutant"] for spec in selected if spec and "mutant" in spec.params])
    yield control
    control.close()
    shutil.rmtree(control.folder)


by_name = partial(pytest.mark.parametrize, "mutant", ids=lambda mutant: mutant.name.replace(" ", "_"))


@by_name([UNBROKEN])
def test_the_unbroken_build_passes(control: Control, mutant: Mutant) -> None:
    said = control.verdicts[mutant].result()
    assert PASSED in said, said


@by_name(MUTANTS)
def test_caught(control: Control, mutant: Mutant) -> None:
    said = control.verdicts[mutant].result()
    print("\n".join(said.splitlines()[-40:]))
    assert PASSED not in said, "this mutant survives: the suite has a hole"


@by_name(OUT_OF_BOUNDS)
def test_caught_by_the_sanitizer(control: Control, mutant: Mutant) -> None:
    said = control.verdicts[mutant].result()
    assert "AddressSanitizer: heap-buffer-overflow" in said, said
