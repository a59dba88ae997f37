"""The command line: ``python -m fusedres doctor [--json]`` and ``python -m fusedres try MODEL``."""

from __future__ import annotations

import argparse
import json

from . import doctor
from .trial import command as trial


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedres", description="fusedres: residual and dense blocks, fused"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    diagnosis = commands.add_parser("doctor", help="versions, devices, and which backend serves which device and why")
    diagnosis.add_argument("--json", action="store_true", help="print JSON")
    trying = commands.add_parser(
        "try", help="what fusedres makes of a model: what runs fused, parity, speed and memory beside eager"
    )
    trial.add_arguments(trying)
    args = parser.parse_args(arguments)
    if args.command == "try":
        return trial.main(args)
    found = doctor.diagnose()
    print(json.dumps(found, indent=1) if args.json else doctor.render(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
