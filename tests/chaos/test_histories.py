"""Some histories, and that they notice what must not be: a green count of a harness that sees nothing is worth nothing."""

import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import histories
from tests.chaos.histories import EVENTS, TABLE_EVENTS, History, Session, Wrong
from tests.chaos.living import KINDS, Options
from tests.chaos.places import Local
from tests.chaos.rounds import ROOT
from tests.chaos.watch import Reader
from tests.processes import run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("store", "seconds"), [("local", 12), *(pytest.param(store, 120, marks=pytest.mark.long) for store in ("local", "s3"))]
)
def test_datasets_and_tables_equal_fresh_ones_whatever_happened_to_their_sources(store: str, seconds: int) -> None:
    words = [f"seconds={seconds}", "count=100000", "seed=0", f"store={store}"]
    done = run([sys.executable, "-m", "tests.chaos", "histories", *words], cwd=ROOT, timeout_s=840)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert " 0 wrong" in done.stdout.splitlines()[-1] and not done.stdout.splitlines()[-1].startswith("0 "), done.stdout


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    base = tmp_path_factory.mktemp("histories")
    (base / "data").mkdir()
    with histories._beside("0") as beside:
        yield Session(base, Local(base / "data"), beside)


@pytest.fixture
def one(session: Session, request: pytest.FixtureRequest) -> Iterator[History]:
    """A history of a tree of pictures, after its first night."""
    found = History(session, f"h-{request.node.name.replace('[', '-').rstrip(']')}", random.Random(1), Options("folder", max_samples=8))
    found.run(found.shard(found.sources[0]))
    found.made(found.sources[0])
    found.run(found.encode())
    found.check()
    found.check_table()
    yield found
    found.place.forget(found.name)


def folder(one: History, name: str) -> Path:
    return Path(one.url(name))


def lost(one: History) -> None:
    one.sources[0].remove(one.sources[0].any())


def changed(one: History) -> None:
    one.sources[0].change()


def moved(one: History) -> None:
    path = one.sources[0].any()
    one.sources[0].move(path, f"dog/{path.rpartition('/')[2]}")


def touched(one: History) -> None:
    next(folder(one, "dataset/shards").glob("*.tar")).touch()


def gone(one: History) -> None:
    next(folder(one, "dataset/records").glob("*.json")).unlink()


def flipped(one: History) -> None:
    path = next(folder(one, "dataset/shards").glob("*.tar"))
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("what", [lost, changed, moved, touched, gone, flipped])
def test_a_dataset_that_is_not_what_its_source_is_or_was_touched_is_noticed(one: History, what: Callable[[History], Any]) -> None:
    what(one)
    one.made(one.sources[0])  # as if a run had ended well
    with pytest.raises(Exception, match=r"."):
        one.check()


def test_a_table_that_did_not_follow_is_noticed(one: History) -> None:
    one.sources[0].change()
    one.run(one.shard(one.sources[0]))
    one.made(one.sources[0])
    one.check()
    with pytest.raises(Exception, match=r"the table lacks|verify"):
        one.check_table()


def test_a_reader_notices_a_file_that_is_missing_and_rows_of_two_generations(one: History) -> None:
    reader, rng = Reader(one.url("dataset"), one.url("table"), True), random.Random(0)
    for _ in range(8):
        reader.look(rng)
    assert not reader.problems and reader.looks and reader.scans
    reader.tables[1] = reader.tables[1] - {min(reader.tables[1])}
    reader.look(rng)
    assert any("other keys than before" in problem for problem in reader.problems)
    reader = Reader(one.url("dataset"), one.url("table"), True)
    shutil.rmtree(folder(one, "table/data"))
    reader.look(rng)
    assert any("FileNotFoundError" in problem or "missing" in problem for problem in reader.problems)


@pytest.mark.parametrize("kind", [*KINDS])
def test_the_seed_decides_what_happens_to_a_source_and_all_steps_of_its_kind_can_happen(tmp_path: Path, kind: str) -> None:
    def played(name: str, seed: int) -> list[str]:
        options = Options(kind, bags={"folder": "parent", "arrays": "array"}.get(kind, ""))
        source = KINDS[kind](Local(tmp_path), f"{name}/a", options, random.Random(seed))
        source.begin(20)
        steps, done = source.steps(), list[str]()
        for _ in range(100 * len(steps)):
            name = source.rng.choice(list(steps))
            if steps[name]():
                done.append(name)
            if {*done} == {*steps}:
                break
        assert {
            path.relative_to(tmp_path / source.name).as_posix(): path.read_bytes() for path in files(tmp_path / source.name)
        } == source.files
        assert {*done} == {*steps}
        return done

    assert played("one", 1) == played("two", 1) != played("three", 2)


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_every_kind_of_event_can_come() -> None:
    assert all(callable(event) and callable(fits) for event, fits in EVENTS.values()) and all(map(callable, TABLE_EVENTS.values()))
    assert issubclass(Wrong, AssertionError)
