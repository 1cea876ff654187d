"""A run is opened once: what is asked of the storage is counted, since in a bucket each call is a request."""

import dataclasses
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from aecore.store import Store, open_store
from aecore.training import session as session_module
from aecore.training.job import TrainJob
from aecore.training.loop import fit
from aecore.training.result import finished_run
from aecore.training.session import Session
from tests.aecore.training import small_job, sprites_dataset

Calls = Counter[tuple[str, str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sprites_dataset(tmp_path_factory.mktemp("session") / "sprites", val=0.1, max_samples=3000)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Give the calls of local stores by name and first argument; those that a call makes itself are not counted."""
    found: Calls = Counter()
    inside = threading.local()

    def counted(name: str, call: Any) -> Any:
        def count(self: Store, *args: Any, **kwargs: Any) -> Any:
            if getattr(inside, "call", False):
                return call(self, *args, **kwargs)
            found[name, str(args[0]) if args else ""] += 1
            inside.call = True
            try:
                return call(self, *args, **kwargs)
            finally:
                inside.call = False

        return count

    kind: Any = type(open_store(tmp_path))
    for name in ("put", "put_staged", "read", "check", "check_all", "local", "open", "prefetch", "size", "modified", "list", "remove"):
        monkeypatch.setattr(kind, name, counted(name, getattr(kind, name)))
    return found


def test_two_steps_of_training_make_few_calls_and_read_the_claim_once(data: str, tmp_path: Path, calls: Calls) -> None:
    fit(small_job(data, tmp_path / "run", max_steps=2))
    assert sum(calls.values()) < 40, calls
    assert calls["read", "run.000001.json"] == 1


def test_a_run_that_is_finished_is_recognised_by_a_few_more(data: str, tmp_path: Path, calls: Calls) -> None:
    job = small_job(data, tmp_path / "run", max_steps=2)
    first = fit(job)
    assert finished_run(open_store(job.out)) == first, "what training says is what is read from the folder"
    calls.clear()
    assert fit(job) == first
    assert calls["read", "run.000001.json"] == 1
    assert not [name for name, _ in calls if name in ("put", "put_staged", "remove")]


def test_a_plan_writes_nothing_and_leaves_no_run_behind(data: str, tmp_path: Path) -> None:
    with closing(Session(small_job(data, tmp_path / "run", max_steps=2))) as session:
        assert session.plan()["steps"] == 2
    assert not (tmp_path / "run").exists()


def test_who_loses_the_claim_to_an_older_version_trains_what_it_recorded(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, claim = small_job(data, tmp_path / "run", max_steps=2), session_module.claim_generation
    older = dataclasses.replace(job, train=dataclasses.replace(job.train, seed=7))  # stands for the old meaning of a later field

    def lost(store: Store, kind: str, identity: Mapping[str, Any], info: Mapping[str, Any]) -> int:
        claim(store, kind, older.identity(session.dataset, None), info)
        return claim(store, kind, identity, info)

    def as_recorded(self: TrainJob, identity: Mapping[str, Any]) -> TrainJob:
        return dataclasses.replace(self, train=dataclasses.replace(self.train, seed=identity["train"]["seed"]))

    monkeypatch.setattr(session_module, "claim_generation", lost)
    monkeypatch.setattr(TrainJob, "as_recorded", as_recorded)
    with closing(Session(job)) as session:
        built, loaders = session.model, session.loaders
        session.take()
        assert session.job == older and session.is_claimed()
        assert session.model is not built and session.loaders[0] is not loaders[0], "they were made of the other job"
    with closing(Session(job)) as again:
        assert again.job == session.job, "as whoever opens the run later"
