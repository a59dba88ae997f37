"""``python -m fusedres.testing.fuzz``: draw cases and sessions, compare, shrink what differs, and say what was found."""

from __future__ import annotations

import argparse
import sys

import torch

from .campaign import Campaign, explain
from .description import parse


def arguments() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser("python -m fusedres.testing.fuzz", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="how long; three quarters of it networks (default: 60)"
    )
    parser.add_argument("--networks", type=int, help="that many random networks, however long it takes")
    parser.add_argument("--actions", type=int, help="that many random sequences of actions, however long it takes")
    parser.add_argument("--seed", type=int, default=0, help="case number i is drawn from seed and i (default: 0)")
    parser.add_argument("--faults", type=int, default=30, help="stop after that many different faults (default: 30)")
    parser.add_argument("--backend", default=None, help="the backend of the converted models (default: automatic)")
    parser.add_argument(
        "--without", action="append", default=[], metavar="FEATURE", help="leave out, such as Effect.kind=store"
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="WHAT",
        help="differences that do not count, such as layout",
    )
    parser.add_argument("--case", help="the repr of one case or session: run it and say what differs")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; 1 where a fault was found."""
    options = arguments().parse_args(argv)
    torch.set_num_threads(1)
    if options.case is not None:
        text, failed = explain(parse(options.case))
        print(text)
        return int(failed)
    campaign = Campaign(
        seed=options.seed,
        most_faults=options.faults,
        backend=options.backend,
        without=tuple(options.without),
        ignored=tuple(options.ignore),
    )
    if options.networks is None and options.actions is None:
        campaign.run_networks(seconds=0.75 * options.seconds)
        campaign.run_sessions(seconds=0.25 * options.seconds)
    else:
        campaign.run_networks(count=options.networks or 0)
        campaign.run_sessions(count=options.actions or 0)
    print(campaign.summary())
    return int(bool(campaign.faults))


if __name__ == "__main__":
    sys.exit(main())
