"""Beside other work: what passive waiting costs a lone training, and what two trainings at once take.

    python -m benchmarks.waiting                 # a made folder of 432 training videos: 1.1 GiB of scratch space
    python -m benchmarks.waiting --spin 10000    # another length of the short spin
    OMP_WAIT_POLICY=active python -m benchmarks.waiting     # the two trainings with another setting

The threads of OpenMP spin while they wait for each other, or sleep (`cmran.hardware.openmp_waits_passively`). The rows
`step_spinning`, `step_passive` and `step_short_spin` are the training step of benchmarks.training with each, in turn,
each in a process of its own that finds the setting in its environment; "spinning" is what libgomp does when nothing is
set: 300000 turns. (OMP_WAIT_POLICY=active spins for minutes, which the other processes would feel.)

`two_trainings`: seconds of an epoch while two processes train at once on the same folder, the slower one of the two,
against one that trains alone (`one_training`). Starts are left out, and so are the first and the last epoch, in which
the other one may not be training.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from benchmarks.floor import step_seconds
from benchmarks.report import Row, finish, in_turn, median, parser, run_program, timed, versus
from benchmarks.training import BATCH, CPU, STEPS, TINY, elsewhere, epochs_of, made, our_step, synced
from cmran.config import ModelConfig, Precision
from cmran.data.features import open_folder
from cmran.hardware import pick_precision

VIDEOS = 432
SPIN = 2000
"""Turns of the short spin: some 50 us, longer than the threads of a product wait for each other."""
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def main(argv: Sequence[str] | None = None) -> int:
    """Run and report."""
    found = parser("step_spinning, step_passive, step_short_spin, one_training, two_trainings")
    found.add_argument("--scratch", type=Path, metavar="DIR", help="for the made folder and the pack [default: TMPDIR]")
    found.add_argument("--spin", type=int, default=SPIN, metavar="N", help=f"turns of the short spin [default: {SPIN}]")
    options = found.parse_args(argv)
    config = TINY if options.tiny else ModelConfig()
    repeats = 1 if options.tiny else options.repeats
    with tempfile.TemporaryDirectory(prefix="cmran-bench-", dir=options.scratch) as name:
        scratch = Path(name)
        # A cache of our own: what the user has packed is left alone.
        os.environ["XDG_CACHE_HOME"] = name
        rows = waiting(config, repeats, options.spin, 1 if options.tiny else STEPS)
        return finish(rows + trainings(config, scratch, 40 if options.tiny else VIDEOS, repeats), options)


def waiting(config: ModelConfig, repeats: int, spin: int, steps: int) -> list[Row]:
    """The rows `step_spinning`, `step_passive` and `step_short_spin`, each reading of so many steps."""
    precision = pick_precision("auto", CPU)
    plain = {name: value for name, value in os.environ.items() if name not in NAMES}
    settings = {
        "spinning": {"GOMP_SPINCOUNT": "300000"},
        "passive": {"OMP_WAIT_POLICY": "passive"},
        "short_spin": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": str(spin)},
    }
    with ExitStack() as stack:
        actions: dict[str, Callable[[], float]] = {
            name: stack.enter_context(elsewhere(_steps, (config, precision, steps), plain | setting))
            for name, setting in settings.items()
        }
        readings = in_turn(actions, repeats, warm_up=2)
    spinning = readings.pop("spinning")
    rows = [timed("step_spinning", spinning, floor=step_seconds(config, precision, BATCH, CPU))]
    for name, values in readings.items():
        rows.append(versus(f"step_{name}", values, spinning, "step_spinning", target="<= 1.02x"))
    return rows


def _steps(connection: Connection, given: tuple[ModelConfig, Precision, int]) -> None:
    """Serves the seconds of a training step."""
    config, precision, steps = given
    action = synced(our_step(config, precision), steps, CPU)
    while connection.recv() is not None:
        connection.send(action())


def trainings(config: ModelConfig, scratch: Path, videos: int, repeats: int) -> list[Row]:
    """The rows `one_training` and `two_trainings`."""
    data = made(scratch / "data", config, videos)
    with open_folder(data, features="float16") as folder:
        folder.use_pack(make=True, progress=False)
    precision = pick_precision("auto", CPU)
    floor = step_seconds(config, precision, BATCH, CPU) * videos / BATCH

    def at_once(count: int) -> list[float]:
        """Seconds of each epoch of the slowest of `count` trainings."""
        with ExitStack() as stack:
            context = multiprocessing.get_context("spawn")
            pools = [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in range(count)]
            running = [
                pool.submit(epochs_of, config, data, scratch / f"run-{count}-{number}", repeats + 2)
                for number, pool in enumerate(pools)
            ]
            told = [future.result()[1] for future in running]
        return max((np.diff(times)[:-1].tolist() for times in told), key=median)

    alone = at_once(1)
    return [
        timed("one_training", alone, floor=floor),
        versus("two_trainings", at_once(2), alone, "one_training", target="<= 1.9x"),
    ]


if __name__ == "__main__":
    run_program(main)
