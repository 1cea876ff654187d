"""Some seconds of `make chaos`, and that it counts what goes wrong: a green table of a harness that sees nothing is worth nothing."""

import itertools
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aecore.store import open_store
from tests.chaos import flips, inputs
from tests.chaos.__main__ import choose, report
from tests.chaos.faults import FAULTS
from tests.chaos.places import Local
from tests.chaos.ray_data import compared
from tests.chaos.rounds import ROOT, Bench, Fault, Round, Tally, play
from tests.chaos.work import WORKS, Difference, difference
from tests.processes import run
from tests.s3 import S3
from tests.s3.proxy import FaultProxy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("store", "seconds"), [("local", 8), ("s3", 6), *(pytest.param(store, 60, marks=pytest.mark.long) for store in FAULTS)]
)
def test_under_random_faults_nothing_is_lost_doubled_wrong_or_hung(store: str, seconds: int) -> None:
    done = run([sys.executable, "-m", "tests.chaos", f"seconds={seconds}", "seed=0", f"store={store}"], cwd=ROOT, timeout_s=840)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    rounds, injected = map(int, done.stdout.splitlines()[-1].split()[1:3])
    assert rounds and injected, done.stdout


def test_lost_doubled_and_wrong_rows_are_counted() -> None:
    expected = [("a", "1"), ("b", "2"), ("c", "3")]
    assert not difference(expected, expected[::-1])
    assert difference(expected, [("a", "1"), ("a", "1"), ("b", "9"), ("d", "4")]) == Difference(lost=1, doubled=1, wrong=2)
    assert difference(expected, []) == Difference(lost=3)


def test_latents_beside_those_of_ray_data_are_compared_by_key_and_to_rounding() -> None:
    expected = [("a", np.float32([1, 2])), ("b", np.float32([3, 4]))]
    assert not compared(expected, [("b", np.float32([3, 4])), ("a", np.float32([1, 2 + 1e-6]))])
    assert compared(expected, [("a", np.float32([1, 2])), ("a", np.float32([1, 3]))]) == Difference(lost=1, doubled=1, wrong=1)


@pytest.mark.parametrize("store", FAULTS)
def test_the_seed_decides_the_rounds_and_every_class_comes_once_before_one_comes_again(store: str) -> None:
    def rounds(seed: str) -> list[tuple[str, str, float]]:
        chosen = [choose(seed, store, number, 40) for number in range(2 * len(FAULTS[store]))]
        return [(name, work.name, rng.random()) for name, work, rng in chosen]

    assert rounds("7") == rounds("7") != rounds("8")
    for cycle in (rounds("7")[: len(FAULTS[store])], rounds("7")[len(FAULTS[store]) :]):
        assert sorted(name for name, _, _ in cycle) == sorted(FAULTS[store])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    base = tmp_path_factory.mktemp("chaos")
    (base / "data").mkdir()
    made = Bench(base, Local(base / "data"))
    made.prepare(WORKS[:1])
    return made


numbers = itertools.count()


def shard_under(bench: Bench, disturb: Callable[[Round], None], codes: frozenset[int] = frozenset({0})) -> Round:
    """Play a round of `shard`, the first of the works."""
    name = f"round-{next(numbers)}"
    one = Round(bench, name, WORKS[0], random.Random(0), name)
    play(one, Fault(disturb, codes))
    return one


def test_damage_that_is_not_repaired_and_a_command_that_is_not_well_are_counted(bench: Bench) -> None:
    def damage(one: Round) -> None:
        one.finish()
        (name,) = [name for name in one.place.names(one.out) if name.endswith("shards/train-000001.tar")]
        one.place.flip(name, one.rng)

    def unknown_signal(one: Round) -> None:
        with one.begun(["shard", "--no-such-option"], wrap=["sh", "-c", 'echo "Traceback (most recent call last)"; exit 77']) as process:
            one.ended(process)

    assert not shard_under(bench, Round.finish).tally.bad
    damaged = shard_under(bench, damage)
    assert damaged.tally.wrong and any("train-000001.tar" in note for note in damaged.tally.notes), damaged.tally
    assert shard_under(bench, unknown_signal).tally.unexplained == 1


@pytest.mark.parametrize("here", [True, False])
def test_an_exit_code_that_its_class_of_faults_does_not_explain_is_counted(bench: Bench, here: bool) -> None:
    def misspelt(one: Round) -> None:
        command = ["shard", "--no-such-option"]
        if here:
            one.status_here(command)
        else:
            with one.begun(command) as process:
                one.ended(process)

    assert shard_under(bench, misspelt, frozenset({0, 3, 4})).tally.unexplained == 1
    assert not shard_under(bench, misspelt, frozenset({0, 2})).tally.bad


def test_a_refusal_of_a_well_storage_counts_and_is_printed_unless_it_names_the_changed_file(bench: Bench) -> None:
    one = Round(bench, "named", WORKS[0], random.Random(0), "named")
    one.said = "aepipe: /data/named/dataset/shards/train-000000.tar exists with other content"
    one.require_named(4, "named/dataset/shards/train-000000.tar")
    one.require_named(3, "named/dataset/shards/train-000001.tar")
    assert not one.tally.bad
    one.require_named(4, "named/dataset/shards/train-000001.tar")
    assert one.tally.unexplained == 1 and one.said in one.tally.notes[0] and "train-000001.tar" in one.tally.notes[0]


def test_every_class_says_its_exit_codes_and_a_fault_that_loses_nothing_has_none_but_0() -> None:
    codes = {name: fault.codes for store in FAULTS.values() for name, fault in store.items()}
    assert all(0 in allowed and allowed < {0, 1, 2, 3, 4, 5, 130} for allowed in codes.values())
    for name in ("slow", "lost acknowledgement", "sent twice", "ETag that is no MD5", "SIGKILL"):
        assert codes[name] == {0}, name
    assert FAULTS["local"]["clock two days ahead"].codes == {0}, "a bucket refuses such requests"
    assert codes["I/O error"] == codes["disk full"] == {0, 4}


def test_a_class_that_was_played_and_injected_nothing_fails_the_session(capsys: pytest.CaptureFixture[str]) -> None:
    assert report({"SIGKILL": Tally(rounds=1, injected=2), "reset": Tally()}) == 0
    assert report({"SIGKILL": Tally(rounds=1, injected=2), "reset": Tally(rounds=3)}) == 1
    assert "reset: 3 rounds, and nothing was injected" in capsys.readouterr().out


READS = """
import sys, time
for path in sys.argv[1:]:
    try:
        print(len(open(path, "rb", buffering=0).read(1)), end=" ")
    except OSError as error:
        print(error.errno, end=" ")
print(time.time())
"""


def test_the_library_fails_the_nth_call_below_the_root_and_moves_the_clock(bench: Bench, tmp_path: Path) -> None:
    inside, outside = tmp_path / "in/file", tmp_path / "file"
    inside.parent.mkdir()
    for path in (inside, outside):
        path.write_bytes(b"x")
    faults = {"CHAOS_ROOT": f"{tmp_path}/in", "CHAOS_CALL": "read", "CHAOS_NTH": "2", "CHAOS_TIMES": "1", "CHAOS_ERRNO": "116"}
    env = {**os.environ, "LD_PRELOAD": str(bench.library), **faults, "CHAOS_COUNT": f"{tmp_path}/count", "CHAOS_CLOCK_S": "172800"}
    done = run([sys.executable, "-c", READS, inside, outside, inside, outside, inside], env=env, check=True)
    *found, now = done.stdout.split()
    assert found == ["1", "1", "116", "1", "1"]
    assert (tmp_path / "count").read_bytes() == b"x"
    assert 172000 < float(now) - time.time() < 173000


@pytest.mark.parametrize("do", ["flip_sent", "twice"])
def test_a_request_that_arrives_changed_or_twice_writes_the_object_once(bad_s3: S3, s3_proxy: FaultProxy, do: str) -> None:
    s3_proxy.add("^PUT .*part", do)
    open_store(bad_s3.url).put("part", b"content", role="part")
    assert bad_s3.objects() == {"part": b"content"}
    assert [done for line, done in s3_proxy.log if line.startswith("PUT")] == ([do, ""] if do == "flip_sent" else [do])


@pytest.mark.parametrize("count", [24, pytest.param(240, marks=pytest.mark.long)])
def test_one_changed_bit_of_any_file_is_noticed_or_changes_nothing(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert flips.main([f"count={count}", "seed=0"]) == 0, capsys.readouterr().out


def test_damaged_and_hostile_inputs_are_refused_in_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    assert inputs.main(["count=24", "seed=0"]) == 0, capsys.readouterr().out
