import json
import threading

import pytest

from aecore.artifact.commit import (
    PartRecord,
    claim_generation,
    commit_manifest,
    newest_number,
    part_stem,
    put_or_adopt,
    read_record,
    require_same,
    write_record,
)
from aecore.artifact.documents import read_json
from aecore.errors import ConfigError, DataError, RunFailed
from aecore.store import AlreadyExists, open_store
from tests.documents import content


def test_the_same_identity_continues_its_claim_and_another_takes_the_next_number(tmp_path):
    store = open_store(tmp_path)
    assert claim_generation(store, "dataset", {"a": 1}, {"when": "first"}) == 1
    assert claim_generation(store, "dataset", {"a": 2}, {}) == 2
    assert claim_generation(store, "dataset", {"a": 1}, {"when": "later"}) == 1
    assert json.loads((tmp_path / "run.000001.json").read_text())["info"] == {"when": "first"}


def test_claims_survive_a_gap_in_the_numbers(tmp_path):
    store = open_store(tmp_path)
    for number in range(3):
        claim_generation(store, "dataset", {"a": number}, {})
    (tmp_path / "run.000002.json").unlink()
    assert claim_generation(store, "dataset", {"a": 0}, {}) == 1
    assert claim_generation(store, "dataset", {"a": 9}, {}) == 4


def test_concurrent_claims_of_different_work_get_different_numbers(tmp_path):
    numbers = []
    threads = [
        threading.Thread(target=lambda i=i: numbers.append(claim_generation(open_store(tmp_path), "dataset", {"a": i}, {})))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 9))


def test_of_concurrent_appends_exactly_one_is_committed(tmp_path):
    outcomes = []

    def append(i: int) -> None:
        try:
            outcomes.append(commit_manifest(open_store(tmp_path), "dataset", 0, {"parts": [i]}))
        except RunFailed as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=append, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(1) == 1
    assert sum("another command committed the same place" in str(outcome) for outcome in outcomes) == 7


def test_readers_take_the_highest_manifest(tmp_path):
    store = open_store(tmp_path)
    assert newest_number(store, "dataset") is None
    commit_manifest(store, "dataset", 0, {"classes": ["x"]})
    commit_manifest(store, "dataset", 1, {"classes": ["y"]})
    (tmp_path / "dataset.000009.json.part").write_text("{")
    assert newest_number(store, "dataset") == 2
    assert content(tmp_path / "dataset.000002.json")["classes"] == ["y"]


def test_a_record_comes_back_as_written_and_another_attempts_record_wins(tmp_path):
    store = open_store(tmp_path)
    file = store.put("data/p.bin", b"abc", role="part")
    record = PartRecord("p", (file,), 3, 1, {"split": "train"}, {"write_s": 0.5})
    assert read_record(store, "p") is None
    assert write_record(store, record) == record
    assert read_record(store, "p") == record
    late = PartRecord("p", (file,), 3, 1, {"split": "train"}, {"write_s": 9.0})
    assert write_record(store, late) == record


@pytest.mark.parametrize("staged", [False, True])
def test_bytes_of_another_attempt_are_adopted_where_they_are_accepted_and_never_overwritten(tmp_path, staged):
    store, path = open_store(tmp_path), tmp_path / "data/p.bin"

    def put(content, accepts):
        if not staged:
            return put_or_adopt(store, "data/p.bin", content, role="part", accepts=accepts)
        with store.stage() as file:
            file.write_bytes(content)
            return put_or_adopt(store, "data/p.bin", file, role="part", accepts=accepts)

    first, adopted = put(b"abc", lambda there, data: pytest.fail("nothing is there yet"))
    assert adopted is None and path.read_bytes() == b"abc"
    assert put(b"abc", lambda there, data: pytest.fail("equal bytes are ours")) == (first, None)
    assert put(b"xyz", lambda there, data: (there, data) == (first, b"abc")) == (first, b"abc")
    with pytest.raises(AlreadyExists, match="exists with other content"):
        put(b"xyz", lambda there, data: False)
    assert path.read_bytes() == b"abc"


def test_a_record_whose_file_is_gone_is_an_error_not_a_silent_rewrite(tmp_path):
    store = open_store(tmp_path)
    write_record(store, PartRecord("p", (store.put("data/p.bin", b"abc", role="part"),), 3))
    (tmp_path / "data/p.bin").unlink()
    with pytest.raises(DataError, match="is missing"):
        read_record(store, "p")


def test_stems_carry_the_claim_from_the_second_on():
    assert part_stem("train", 1, 0) == "train-000000"
    assert part_stem("train", 2, 7) == "train-g000002-000007"


def test_differing_fields_are_shown_with_both_values():
    with pytest.raises(ConfigError) as error:
        require_same("out", "dataset", {"shards": {"seed": 1, "max": [1, 2]}}, {"shards": {"seed": 0, "max": (1, 2)}})
    assert "shards.seed: there 0, asked 1" in str(error.value)
    assert "max" not in str(error.value)


def test_a_differing_hash_is_shown_short_after_the_address_that_it_is_of():
    with pytest.raises(ConfigError) as error:
        require_same(
            "out",
            "run",
            {"data": {"train": "a" * 64, "val": "c" * 64}, "database": 1, "train": {"epochs": 5}},
            {"data": {"train": "b" * 64, "val": None}, "database": 2, "train": {"epochs": 4}},
            urls={"data": ("/x/ds", "/x/ds2")},
            hints={"train.epochs": "to train longer do this", "optim.lr": "not asked"},
        )
    message = str(error.value)
    assert f"data.train: there /x/ds ({'b' * 12}), asked /x/ds2 ({'a' * 12})\n" in message
    assert f"data.val: there None, asked /x/ds2 ({'c' * 12})\n" in message
    assert "database: there 2, asked 1\n" in message
    assert message.endswith("use the values that are there; to train longer do this")


def test_a_manifest_of_a_newer_format_asks_for_an_upgrade(tmp_path):
    (tmp_path / "dataset.000001.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match="upgrade aecore"):
        read_json(open_store(tmp_path), "dataset.000001.json")


def test_a_damaged_manifest_is_named(tmp_path):
    (tmp_path / "dataset.000001.json").write_text('{"format": 1, ')
    with pytest.raises(DataError, match=r"dataset\.000001\.json is damaged"):
        read_json(open_store(tmp_path), "dataset.000001.json")


def test_another_kind_of_artefact_is_refused(tmp_path):
    store = open_store(tmp_path)
    claim_generation(store, "run", {"a": 1}, {})
    with pytest.raises(ConfigError, match="holds a run, not a dataset"):
        claim_generation(store, "dataset", {"a": 1}, {})
