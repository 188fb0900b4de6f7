"""Extensions put to tests, each in a process of its own: forked from a server, which saves them importing torch.

A script that says ``serve(tests)`` is a server; ``Server(script, lib)`` runs it, with the package of ``lib``.
"""

from __future__ import annotations

import importlib
import os
import queue
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

LOADED, PASSED = "the extension under test is loaded:", "all tests passed"
LONGEST = 300
"""Seconds, after which the tests have failed: a fault may be that they hang."""


class Server:
    """The process that forks; ``lib`` is a folder with the package."""

    def __init__(self, script: Path, lib: Path, **environment: str) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("FASTWRS_")}
        # One thread, so that a child may be forked and have threads of its own.
        env |= {"PYTHONPATH": str(lib), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        env |= {"PYTHONDONTWRITEBYTECODE": "1"} | environment
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, str(script)], env=env, stdin=pipe, stdout=pipe, text=True)

    def test(self, lib: Path, *arguments: object) -> str:
        """What the tests said of the extension in another folder with the package; PASSED at its end if all is well."""
        asked, answered = self.process.stdin, self.process.stdout
        assert asked is not None
        assert answered is not None
        print(lib, *arguments, sep="\t", file=asked, flush=True)
        code = answered.readline().strip()
        assert code, f"the server has died: {self.process.wait()}"
        said = (lib / "said.txt").read_text(encoding="utf-8")
        assert f"{LOADED} {lib}/" in said, said  # another extension would prove nothing
        assert (code == "0") == said.endswith(f"{PASSED}\n"), f"{said}\nexit status {code}"
        return said

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()


class Servers:
    """As many servers of a script as are asked at a time: one that has answered is asked again."""

    def __init__(self, script: Path) -> None:
        self.script = script
        self.resting: queue.SimpleQueue[Server] = queue.SimpleQueue()

    def test(self, package: Path, lib: Path, *arguments: object, **environment: str) -> str:
        """``Server.test``; ``package`` and ``environment`` are for a server that begins."""
        try:
            server = self.resting.get_nowait()
        except queue.Empty:
            server = Server(self.script, package, **environment)
        said = server.test(lib, *arguments)
        self.resting.put(server)
        return said

    def close(self) -> None:
        """Ends the processes."""
        while not self.resting.empty():
            self.resting.get().close()


def serve(tests: Callable[..., None]) -> None:
    """Reads folders and the arguments of ``tests``, and answers with exit codes. What is slow has been imported."""
    package, library = map(importlib.import_module, ("fastwrs", "fastwrs.library"))
    for line in sys.stdin:
        lib, *arguments = line.rstrip("\n").split("\t")
        child = os.fork()
        if child == 0:
            signal.alarm(LONGEST)
            said = os.open(f"{lib}/said.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            package.__path__[:] = [f"{lib}/fastwrs"]
            code = 1
            try:
                library.load()
                print(LOADED, sys.modules["fastwrs._C"].__file__, flush=True)
                tests(*arguments)
                print(PASSED)
                code = 0
            except BaseException:
                sys.stdout.flush()
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
