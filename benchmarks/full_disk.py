"""A study on a disk that fills up, again and again: one line each time, and nothing is lost.

    mount -t tmpfs -o size=16m tmpfs /mnt/small
    python benchmarks/full_disk.py --disk /mnt/small --faults 20

A file takes up the disk but for some room, drawn anew for each start of the study of `soak.py`, so
that it is full at another write each time: a record, a checkpoint, an event file, a network, a
figure. Each start that does not end must exit with 1 and say so in one line that begins with
`error:`. What ends is compared with a run on a disk with room, as in `soak.py`.
The exit code is 1 if anything of that is not so.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import soak

_BLOCK = 4096


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the check. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Starts a study on a disk that fills up.")
    parser.add_argument("--disk", type=Path, required=True, help="a small file system of its own")
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--study", choices=sorted(soak.STUDIES), default="ntt")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.faults < 1:
        parser.error("expected at least 1 fault")
    if not options.disk.is_mount():
        parser.error(f"{options.disk} is no file system of its own: it is filled up")
    study, rng = soak.STUDIES[options.study], random.Random(options.seed)
    out = Path(tempfile.mkdtemp(prefix="full-disk-"))
    soak.unbroken(study, out / "unbroken")
    faults, wrong, runs = 0, [], 0
    while faults < options.faults:
        workdir = options.disk / f"run{runs}"
        log, code = out / f"run{runs}.log", 1
        while code:
            # Without faults left, all the room there is.
            leave(options.disk, rng.uniform(0, 2e6) if faults < options.faults else None)
            code = soak.start(study, workdir, log).wait(timeout=soak.LONGEST_SECONDS)
            said = soak.said(log)
            last = said.strip().splitlines()[-1:]
            if code:
                faults += 1
                print(f"{workdir.name} {code}: {''.join(last)}", flush=True)
            in_one_line = last and last[0].startswith("error: ") and "Traceback" not in said
            if code and (code != 1 or not in_one_line):
                wrong.append(f"{workdir.name}: {code} {last}")
                if code == 2 or faults > 3 * options.faults:
                    break
        leave(options.disk, None)
        wrong += soak.differences(out / "unbroken", workdir, study.stages)
        wrong += [f"{path} is left" for path in soak.leftovers(workdir)]
        shutil.rmtree(workdir)
        runs += 1
    print(f"\n{faults} full disks in {runs} runs; wrong: {len(wrong)}", *wrong, sep="\n    ")
    return int(bool(wrong))


def leave(disk: Path, room: float | None) -> None:
    """Fills a disk but for so many bytes; not at all for `None`."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    if room is None:
        return
    found = os.statvfs(disk)
    size = int(found.f_bavail * found.f_frsize - room) // _BLOCK
    with ballast.open("wb") as file:
        for _ in range(max(size, 0)):
            file.write(bytes(_BLOCK))


if __name__ == "__main__":
    sys.exit(main())
