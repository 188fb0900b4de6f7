"""``python -m fastwrs info``: what is installed and what can run here. ``... bench``: what a step costs here."""

from __future__ import annotations

import argparse
import platform
import sys

import torch

from fastwrs import __version__, backends, library
from fastwrs.benchmark import command


def info() -> str:
    """The version, how it was built, the backends with their reasons, the processor, torch and Python."""
    reason = library.why_not()
    lines = [
        f"fastwrs   {__version__}",
        f"build     {'with the C++ extension' if reason is None else f'without the C++ extension: {reason}'}",
    ]
    for name, why in backends().items():
        lines.append(f"backend   {name:<10}{'can run' if why is None else f'cannot run: {why}'}")
    if reason is None:
        lines.append(f"CPU       {', '.join(library.cpu_features())} (in use: {library.cpu_isa()})")
    lines.append(f"threads   {torch.get_num_threads()}")
    lines.append(f"torch     {torch.__version__}")
    lines.append(f"Python    {platform.python_version()} on {platform.system()} {platform.machine()}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fastwrs", description="Fused optimizers with weight rescaling.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is installed and what can run here")
    command.add_arguments(commands.add_parser("bench", help="what a step costs here, against torch's optimizers"))
    options = parser.parse_args(arguments)
    if options.command == "bench":
        return command.run(options)
    try:
        print(info())
    except ValueError as error:  # of a variable in the environment
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
