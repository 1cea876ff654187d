"""A store creates atomically, or nothing is written there: one winner of overlapping writes, tried once per bucket and remembered."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from aecore.errors import StoreError
from aecore.store import _race as race_module
from aecore.store import open_store, race
from tests.s3 import S3


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_one_of_the_overlapping_writes_wins_and_nothing_is_left(s3: S3, tmp_path, place: str) -> None:
    store = open_store(s3.url if place == "bucket" else tmp_path / "out")
    assert [race(store) for _ in range(3)] == [None] * 3
    assert s3.objects() == {} and not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.accept
@pytest.mark.timeout(1800)
def test_the_repaired_server_passes_200_races(s3: S3) -> None:
    store = open_store(s3.url)
    assert [race(store) for _ in range(200)] == [None] * 200


def test_nothing_is_written_where_several_of_the_overlapping_writes_win(bare_s3: S3) -> None:
    for _ in range(2):
        with pytest.raises(StoreError, match=r"does not create files atomically: [2-8] of 8 overlapping writes of one name"):
            open_store(f"{bare_s3.url}/ds").put("a", b"1", role="part")
    assert bare_s3.objects() == {}


def test_a_bucket_is_tried_before_the_first_write_and_that_it_passed_is_remembered(bad_s3: S3, s3_proxy, monkeypatch) -> None:
    cache = os.environ["AECORE_CACHE"]
    for name in os.listdir(cache):
        os.unlink(f"{cache}/{name}")

    def puts_of_a_new_process(name: str) -> int:
        monkeypatch.setattr(race_module, "_passed", set())
        before = s3_proxy.seen("^PUT")
        open_store(f"{bad_s3.url}/{name}").put("a", b"1", role="part")
        open_store(f"{bad_s3.url}/{name}").put("b", b"1", role="part")
        return s3_proxy.seen("^PUT") - before

    assert puts_of_a_new_process("one") == race_module.ROUNDS * race_module.RACERS + 2
    assert puts_of_a_new_process("two") == 2
    (note,) = (f"{cache}/{name}" for name in os.listdir(cache) if name.startswith("atomic-"))
    long_ago = time.time() - race_module.KEPT_S - 60
    os.utime(note, (long_ago, long_ago))
    assert puts_of_a_new_process("three") == race_module.ROUNDS * race_module.RACERS + 2
    assert sorted(bad_s3.objects()) == [f"{name}/{file}" for name in ("one", "three", "two") for file in "ab"]


def test_who_may_not_remove_what_was_raced_for_may_write(bad_s3: S3, s3_proxy, monkeypatch) -> None:
    monkeypatch.setattr(race_module, "_passed", set())
    os.unlink(os.path.join(os.environ["AECORE_CACHE"], os.listdir(os.environ["AECORE_CACHE"])[0]))
    s3_proxy.add("^DELETE", "status", status=403, code="AccessDenied", times=None)
    open_store(f"{bad_s3.url}/ds").put("a", b"1", role="part")
    assert bad_s3.objects()["ds/a"] == b"1"


def test_a_race_whose_racers_do_not_all_start_is_an_error_and_no_endless_wait(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(race_module, "START_S", 0.05)
    monkeypatch.setattr(race_module, "ThreadPoolExecutor", lambda num: ThreadPoolExecutor(num - 1))
    with pytest.raises(StoreError, match=r"8 threads did not start within 0.05 s"):
        race(open_store(tmp_path))
