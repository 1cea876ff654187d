"""`make chaos ARGS="ray_data kills=12"`: encoding to Parquet under kills, by aepipe and by Ray Data with its checkpoint of rows.

The same images, the same model, two Ray workers on this machine, small write tasks (four images) on both sides. Ray Data is used as the
documentation of `ray.data.checkpoint.CheckpointConfig` (2.60) writes it: a read, a map, a write, and `DataContext.checkpoint_config` set
before the dataset is made. Its checkpoint is deleted on success by default; a third side keeps it, for the kill where that matters.

Four kinds of kills, each at a random moment: of the driver and all that it started, as the loss of a machine, before the last Parquet file
of the output is there; the same when it is there and before the command has ended; of the driver alone, whose workers may go on while the
same command runs again; of one worker of a job that goes on (the last two before the last file is seen). Then the same command runs to its
end, and the rows are counted: of aepipe those of the table, of Ray Data those of all files in its output folder. A command that ended
before its kill is not run again. Latents count as equal to 1e-5, since batches are cut anew after a restart. `kill=worker` tries one kind
only.
"""

import contextlib
import io
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aecore.data.dataset import open_dataset
from aecore.table.table import open_table
from tests.chaos.places import Local
from tests.chaos.rounds import HANG_S, Bench
from tests.chaos.work import WORKS, Difference, difference
from tests.processes import Started, below, started

Latents = list[tuple[str, Any]]  # key, mu
ROWS_PER_FILE = 4  # 96 images: 24 tasks that write
NO_WORKER = re.compile("IDLE|Agent")  # without its agents a node of Ray ends, which is another kill than that of a worker


def job(images: str, out: str, checkpoint: str, run: str, delete: str) -> None:
    """Encode with Ray Data, as its documentation writes it."""
    import ray
    from ray.data.checkpoint import CheckpointConfig

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig(
        id_column="key", checkpoint_path=checkpoint, delete_checkpoint_on_success=delete == "True"
    )
    rows = ray.data.read_parquet(images, override_num_blocks=len(os.listdir(images)))
    options: dict[str, Any] = {"fn_constructor_args": (run,), "batch_size": ROWS_PER_FILE, "compute": ray.data.ActorPoolStrategy(size=2)}
    rows.map_batches(_Encode, **options).write_parquet(out)


class _Encode:
    def __init__(self, run: str) -> None:
        from aecore.checkpoint import load_model
        from aecore.encoding.encoder import Encoder, EncodeSpec

        self._encoder = Encoder(load_model(run), EncodeSpec(), "cpu")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import torch

        from aecore._base.batch import Batch

        x = torch.from_numpy(np.stack([np.frombuffer(pixels, np.uint8).reshape(1, 32, 32) for pixels in batch["pixels"]]))
        numbers = torch.arange(len(x))
        return {"key": batch["key"], "mu": self._encoder.columns(Batch(x, numbers, numbers, len(x)), None)["mu"].numpy()}


@dataclass(frozen=True)
class Kill:
    """Who dies, and when. `whom` kills; it returns whether anybody was there."""

    name: str
    whom: Callable[[Started, random.Random], bool]
    last: bool = False  # after the last Parquet file
    ends: bool = True  # the command ends with it


def _everything(process: Started, rng: random.Random) -> bool:
    running = process.process.poll() is None
    process.end(signal.SIGKILL, 0)
    return running


def _driver(process: Started, rng: random.Random) -> bool:
    running = process.process.poll() is None
    process.send(signal.SIGKILL)
    process.process.wait()
    return running


def _worker(process: Started, rng: random.Random) -> bool:
    workers = sorted(pid for pid, line in below(process.pid).items() if line.startswith("ray::") and not NO_WORKER.search(line))
    with contextlib.suppress(ProcessLookupError):
        if workers and process.process.poll() is None:
            os.kill(rng.choice(workers), signal.SIGKILL)
            return True
    return False


KILLS = (
    Kill("all", _everything),
    Kill("all, after the last file", _everything, last=True),
    Kill("driver", _driver),
    Kill("worker", _worker, ends=False),
)


@dataclass(frozen=True)
class Side:
    """One that encodes: its command for an output folder, the rows in it, and the kills that it is tried with."""

    name: str
    command: Callable[[Path], list[object]]
    rows: Callable[[Path], Latents]
    kills: tuple[Kill, ...] = KILLS


@dataclass
class Counts:
    """Of one side and one kind of kills. `failed`: commands that ended with an error by themselves, or left files that cannot be read."""

    kills: int = 0
    starts: int = 0
    failed: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0


def main(words: list[str]) -> int:
    """Kill the jobs and print the counts; they are a comparison, so the status is 0 whatever they are."""
    options = {"kills": "12", "seed": "0", "kill": ""} | dict(word.partition("=")[::2] for word in words)
    base = Path(tempfile.mkdtemp(prefix="aecore-rd-"))  # short: sockets are below it
    try:
        (base / "data").mkdir()
        bench = Bench(base, Local(base / "data"))
        bench.environment |= {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(base)}
        bench.prepare(WORKS[:2])
        _write_data(bench)
        print(" ".join(["job".ljust(37), "kill".ljust(24), *(field.name.rjust(7) for field in fields(Counts))]), flush=True)
        for side in _sides(base):
            out = base / "undisturbed" / side.name
            with _begun(side, bench, out) as process:
                assert process.finish(HANG_S).returncode == 0, process.tail()
            expected, files = side.rows(out), _files(out)
            for number, kill in enumerate(kill for kill in side.kills if options["kill"] in ("", kill.name)):
                share = (
                    int(options["kills"]) if options["kill"] else (int(options["kills"]) + len(KILLS) - 1 - KILLS.index(kill)) // len(KILLS)
                )
                rng = random.Random(f"{options['seed']} {kill.name}")
                counts = _play(side, bench, base / f"{number}" / side.name, kill, share, rng, expected, files)
                print(
                    " ".join([side.name.ljust(37), kill.name.ljust(24), *(str(value).rjust(7) for value in vars(counts).values())]),
                    flush=True,
                )
        return 0
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _sides(base: Path) -> tuple[Side, ...]:
    run = base / "data/one/run"

    def ray_data(delete: bool) -> Callable[[Path], list[object]]:
        return lambda out: ["tests.chaos.ray_data", base / "images", out / "rows", out / "ids", run, delete]

    encode: list[object] = ["pipelines.cli", "encode", run, base / "data/small"]
    return (
        Side("aepipe", lambda out: [*encode, out / "table", "cluster.num_workers=2", f"encode.batch={ROWS_PER_FILE}"], _ours),
        Side("Ray Data", ray_data(True), _theirs),
        Side("Ray Data, checkpoint kept on success", ray_data(False), _theirs, (KILLS[1],)),
    )


def _write_data(bench: Bench) -> None:
    """Write the images in small shards, and as small Parquet files of keys and pixels."""
    from PIL import Image

    base, url = bench.base, bench.place.url("small")
    words = ["shard", bench.place.url("images-one"), url, "--recipe", str(bench.recipe), f"shards.max_samples={ROWS_PER_FILE}"]
    assert bench.run_here(words, bench.logs / "small.log") == 0
    dataset, rows = open_dataset(url), list[tuple[str, bytes]]()
    for shard in dataset.manifest.shards:
        reader = dataset.reader(shard)
        keys: list[Any] = reader.index["key"].to_pylist()  # any: pyarrow's type of a string column
        rows += zip(keys, (Image.open(io.BytesIO(data)).tobytes() for data in reader.read_rows(list(range(len(keys))))), strict=True)
    (base / "images").mkdir()
    for number, first in enumerate(range(0, len(rows), ROWS_PER_FILE)):
        some = rows[first : first + ROWS_PER_FILE]
        table = pa.table({"key": [key for key, _ in some], "pixels": [pixels for _, pixels in some]})
        pq.write_table(table, base / f"images/{number:03d}.parquet")


def _play(
    side: Side, bench: Bench, base: Path, kill: Kill, kills: int, rng: random.Random, expected: Latents, files: int
) -> Counts:  # 5 folders at most for a kill: a command may end before it
    counts = Counts()
    for number in range(5 * kills):
        if counts.kills >= kills:
            break
        out = base / str(number)
        with contextlib.ExitStack() as orphans:  # what a killed driver leaves goes on until the folder is complete
            ended, wanted = False, min(rng.randint(1, 2), kills - counts.kills)
            for start in range(wanted + 3):
                if ended:
                    break
                counts.starts += 1
                process = orphans.enter_context(_begun(side, bench, out))
                killed = start < wanted and _reach(
                    process, out, files if kill.last else rng.randint(min(_files(out), files - 1), files - 1), rng
                )
                killed = killed and kill.whom(process, rng)
                counts.kills += killed
                if not (killed and kill.ends):
                    ended = _finish(process)
                    counts.failed += not ended
        try:
            found = side.rows(out)
        except (OSError, pa.ArrowException) as error:
            counts.failed += 1
            print(f"{out}: {error}", file=sys.stderr)
            continue
        diff = compared(expected, found)
        counts.lost, counts.doubled, counts.wrong = counts.lost + diff.lost, counts.doubled + diff.doubled, counts.wrong + diff.wrong
    return counts


def compared(expected: Latents, found: Latents) -> Difference:
    """Compare latents by key, equal to 1e-5."""
    wanted = dict(expected)
    equal = [(key, str(key in wanted and np.allclose(mu, wanted[key], rtol=0, atol=1e-5))) for key, mu in found]
    return difference([(key, "True") for key in wanted], equal)


def _begun(side: Side, bench: Bench, out: Path) -> contextlib.AbstractContextManager[Started]:
    out.mkdir(parents=True, exist_ok=True)
    return started([sys.executable, "-P", "-m", *side.command(out)], env=bench.environment, cwd=bench.base, grace_s=0)


def _reach(process: Started, out: Path, moment: int, rng: random.Random) -> bool:
    """Wait until that many files are there; return whether the command still runs."""
    deadline = time.monotonic() + HANG_S
    while _files(out) < moment and process.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.2))
    return process.process.poll() is None


def _finish(process: Started) -> bool:
    """Wait for the end of a command; return whether it succeeded."""
    try:
        succeeded = process.finish(2 * HANG_S).returncode == 0
    except AssertionError:
        succeeded = False
    if not succeeded:
        print(f"exit status {process.process.returncode}: {process.tail()}", file=sys.stderr)
    return succeeded


def _files(out: Path) -> int:
    """Return the number of Parquet files in the output."""
    return sum(name.endswith(".parquet") for folder in ("table/data", "rows") for _, _, names in os.walk(out / folder) for name in names)


def _ours(out: Path) -> Latents:
    table = open_table(str(out / "table"))
    return list(zip(table.keys.to_pylist(), table.numpy("mu"), strict=True))


def _theirs(out: Path) -> Latents:
    rows: Latents = []
    for path in sorted((out / "rows").glob("*.parquet")):
        table = pq.read_table(path)
        rows += zip(table["key"].to_pylist(), (np.array(mu, np.float32) for mu in table["mu"].to_pylist()), strict=True)
    return rows


if __name__ == "__main__":
    job(*sys.argv[1:])
