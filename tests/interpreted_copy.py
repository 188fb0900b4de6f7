"""The short list of tests/interpreted.py on a copy of the package, in processes that share what they have imported.

Most of such a process would go into importing PyTorch and Triton: a server that has them is forked instead.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

SHARED = ["numpy", "torch", "triton.language", "triton.runtime.interpreter"]  # nothing of ours: that is in the copy


def _main(copy: str, said: str, what: str) -> None:
    with open(said, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.path.insert(0, copy)
    import interpreted

    import fastwrs

    assert str(fastwrs.__file__).startswith(copy), f"{fastwrs.__file__} is not in {copy}"
    interpreted.main(what)


def run(copy: Path, what: str) -> str:
    """What it says, with its exit status; TimeoutError if it hangs.

    The environment must have TRITON_INTERPRET=1 before the first call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SHARED)
    said = copy.with_suffix(".txt")
    process = context.Process(target=_main, args=(str(copy), str(said), what))
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"{copy.name} has not ended: {said.read_text(encoding='utf-8')}")
    return f"{said.read_text(encoding='utf-8')}\nexit status {process.exitcode}"
