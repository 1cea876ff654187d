"""Rows of metrics: what their means mean, and that two meanings are never averaged together."""

import json

from aecore.store import open_store
from aecore.training.metrics import EpochMean, epoch_means, last_epoch, version_of

OLD = {"step": 1, "epoch": 0, "samples": 2, "loss": 3.0, "elbo": -3.0, "iwae_x1": -2.5, "log_likelihood": -1.0}
NEW = {**OLD, "step": 2, "loss": 5.0, "elbo": -9.0, "metrics": 2}


def test_an_epoch_of_one_version_says_which():
    assert epoch_means([OLD])[0]["metrics"] == 1
    assert epoch_means([OLD])[0]["elbo"] == -3.0, "an old row keeps its meaning"
    assert epoch_means([NEW])[0]["metrics"] == 2


def test_an_epoch_that_was_continued_from_older_rows_has_no_mean_of_what_changed_its_meaning():
    mean = epoch_means([OLD, NEW])[0]
    assert not {"elbo", "iwae_x1"} & mean.keys()
    assert (mean["loss"], mean["log_likelihood"], mean["samples"]) == (4.0, -1.0, 4)


def test_the_epoch_after_it_has_one_again():
    assert epoch_means([OLD, NEW, {**NEW, "epoch": 1, "step": 3}])[1]["elbo"] == -9.0
    mean = EpochMean()
    for row in (OLD, NEW, {**NEW, "epoch": 1, "step": 3}):
        mean.add(row)
    assert mean.to_dict()["elbo"] == -9.0


def test_a_run_that_is_shown_while_it_goes_on_from_older_rows_does_not_mix_them(tmp_path):
    store = open_store(tmp_path)
    for row in (OLD, NEW):
        store.put(f"metrics/{row['step']:08d}-{row['step']:08d}-aaaa.jsonl", json.dumps(row).encode() + b"\n", role="metrics")
    found = last_epoch(store)
    assert found is not None
    assert version_of(found) == 2
    assert found["loss"] == 4.0
    assert "elbo" not in found
