"""One table of what the guarantee costs: ``python benchmarks/run.py [ROW ...] [--quick]``.

Each line is one comparison, measured in turns in this process: the median time of a call, and the median and quartiles
over the rounds of the ratio. Memory is the peak of PyTorch's own allocations during a call.
"""

import argparse
import os
import sys
import time
import warnings

import decoders
import graphs
import growth
import importing
import inverse
import measures
import mixture
import pyro
import sequential
import timing
import torch
import training

MODULES = (decoders, training, graphs, mixture, sequential, inverse, measures, importing, growth)
ROWS = {name: row for module in MODULES for name, row in module.ROWS.items()}


def keep_memory() -> None:
    """Start again with a C allocator that keeps freed memory.

    By default glibc returns a freed tensor of some megabytes to the system and pays for fresh pages the next time, up
    to half of a step here and not the same from run to run. Other allocators ignore these names.
    """
    wanted = {"MALLOC_TRIM_THRESHOLD_": "8000000000", "MALLOC_MMAP_MAX_": "0"}
    if any(name not in os.environ for name in wanted):
        os.execve(sys.executable, [sys.executable, *sys.argv], wanted | dict(os.environ))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all if none")
    parser.add_argument("--quick", action="store_true", help="a check that every row runs; the numbers mean little")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=6.0, help="how long each comparison is repeated")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu counts processor time, for a machine shared with others; then use one thread",
    )
    arguments = parser.parse_args()
    unknown = set(arguments.rows) - set(ROWS)
    if unknown:
        parser.error(f"Expected rows of {list(ROWS)}, got {sorted(unknown)}")
    keep_memory()
    torch.set_num_threads(arguments.threads)
    if arguments.device != "cpu":  # a default device takes time in each operation
        torch.set_default_device(arguments.device)
    timing.settings["clock"] = time.process_time if arguments.clock == "cpu" else time.perf_counter
    timing.settings["seconds"] = 0.0 if arguments.quick else arguments.seconds
    timing.settings["quick"] = arguments.quick
    # Validation reads every value of every site; a user who measures turns it off, in Pyro and in PyTorch.
    pyro.enable_validation(False)
    # The reference's activations are piecewise, which our networks warn about.
    warnings.filterwarnings("ignore", message="The activation")

    print(f"{timing.machine_line()}, freed memory kept by the allocator")
    print()
    print("| row | measured | against | ratio [quartiles] | target | met |")
    print("|---|---|---|---|---|---|")
    for row in arguments.rows or ROWS:
        torch.manual_seed(0)
        for line in ROWS[row](row):
            met = {True: "yes", False: "no", None: ""}[line.met]
            print("| " + " | ".join([*line[:5], met]) + " |", flush=True)


if __name__ == "__main__":
    main()
