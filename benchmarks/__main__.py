"""`python -m benchmarks [NAME]`: run one benchmark, or all. Each leaves JSON below benchmarks/results/."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
from pathlib import Path

NAMES = (
    "train",
    "kill",
    "tokenise",
    "footprint",
    "search",
    "line_sft_legal",
    "line_classify_finance",
    "artifacts",
)
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run the benchmarks that were asked for and print their figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; all when absent")
    parser.add_argument(
        "--gib", type=float, default=10.0, help="size of the model of `artifacts`; 10 when absent"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="rounds: of `artifacts` the least disturbed counts, of `train` the median; 3 when absent",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    given = parser.parse_args()
    unknown = sorted(set(given.names) - set(NAMES))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    figures = {}
    for name in given.names or NAMES:
        module, _, argument = name.partition("line_")
        benchmark = importlib.import_module(f"benchmarks.{module or 'line'}")
        sizes = {"artifacts": (given.gib, given.rounds), "train": (given.rounds,)}
        # Libraries that log to standard output (DeepSpeed does) have no place in the object on it.
        with contextlib.redirect_stdout(sys.stderr):
            figures[name] = benchmark.run(*([argument] if argument else sizes.get(name, ())))
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(figures[name], indent=1) + "\n")
        if not given.json:
            print(f"\n{name}")
            for key, value in figures[name].items():
                print(f"  {key:44} {value}")
    if given.json:
        json.dump(figures, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
