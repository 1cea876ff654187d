"""Train on external tars without an index: whole batches, equal steps on all ranks, the same again for the same seed."""

import dataclasses
import io
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from aecore._base.batch import Batch
from aecore.data.format.sample_format import SampleFormat
from aecore.data.format.transform import TransformSpec
from aecore.data.manifest import DatasetManifest
from aecore.data.read import stream
from aecore.data.read.loader import InputSpec
from aecore.data.read.order import TrainingOrder
from aecore.data.read.stream import StreamDataset, StreamLoader, open_stream
from aecore.data.sources._names import split_in_version_1
from aecore.data.sources._tar_file import TarFile
from aecore.data.sources._tar_samples import tar_samples
from aecore.data.sources.webdataset import WebdatasetSpec
from aecore.data.write.job import adopt_shards, shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.errors import ConfigError, DataError, Hint
from aecore.training.job import steps_per_epoch
from aecore.training.loop import fit
from aecore.variational import AdaGVAESpec
from tests.aecore.data.test_external_tars import samples, two_tars, write_tar
from tests.aecore.data.tiny import encoded, image
from tests.aecore.training import fit_on, losses, published_weights, small_job


def batches(url: Path | str, steps: int = 10, start: int = 0, rank: int = 0, world_size: int = 1, **options: Any) -> list[Batch]:
    spec = InputSpec(**{"reader": "webdataset", "shuffle": 8, "prefetch": 0, **options})
    order = TrainingOrder(global_batch=16, lanes=8, rank=rank, world_size=world_size)
    dataset = open_stream(str(url), "train")
    loader = StreamLoader(dataset, transform=TransformSpec(), order=order, steps_per_epoch=1, spec=spec)
    return list(loader.batches(start, start + steps))


def npy(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


def numbers(found: list[Batch]) -> list[int]:
    """Return which images a run of batches holds: `image(n)` begins with the digits of n."""
    return [int(x[0, 0, 0]) + 256 * int(x[0, 0, 1]) for batch in found for x in batch.x]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    return two_tars(tmp_path / "theirs")


class TestBatches:
    def test_hold_pixels_labels_and_places(self, tars: Path) -> None:
        for batch in batches(tars):
            assert (batch.x.shape, batch.num_global) == ((16, 1, 4, 4), 16)
            found = numbers([batch])
            assert all(torch.equal(x[0], torch.from_numpy(image(number))) for x, number in zip(batch.x, found, strict=True))
            assert batch.label is not None
            assert batch.label.tolist() == [number % 3 for number in found]
            assert batch.positions.tolist() == list(range(16))

    def test_a_pass_on_one_rank_holds_every_sample_once(self, tars: Path) -> None:
        found = numbers(batches(tars, 25, shuffle=0))  # 400 samples: 8 passes
        assert set(Counter(found).values()) == {8}
        assert len({tuple(found[at : at + 50]) for at in range(0, 400, 50)}) > 1, "each pass has its own order of tars"

    @pytest.mark.parametrize("resampled", [False, True])
    def test_are_the_same_for_the_same_seed_and_step(self, tars: Path, resampled: bool) -> None:
        first, again = (numbers(batches(tars, 12, start=5, resampled=resampled)) for _ in range(2))
        assert first == again
        assert first != numbers(batches(tars, 12, start=6, resampled=resampled))

    def test_ranks_share_a_batch_and_read_different_tars(self, tars: Path) -> None:
        parts = [batches(tars, 2, rank=rank, world_size=2, shuffle=0) for rank in range(2)]
        assert [part[0].positions.tolist() for part in parts] == [list(range(8)), list(range(8, 16))]
        assert not set(numbers(parts[0])) & set(numbers(parts[1]))

    def test_ranks_beyond_the_number_of_tars_share_their_samples(self, tars: Path) -> None:
        parts = [set(numbers(batches(tars, 100, rank=rank, world_size=4))) for rank in range(4)]
        assert set.union(*parts) == set(range(50))
        assert sum(map(len, parts)) == 50

    def test_resampled_draws_with_replacement(self, tmp_path: Path) -> None:
        for number in range(8):
            write_tar(tmp_path / f"{number}.tar", samples(number, 1))
        found = numbers(batches(tmp_path, 20, resampled=True, shuffle=0))
        assert set(found) == set(range(8))
        assert len(set(Counter(found).values())) > 1

    def test_tars_of_other_splits_are_left_out(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "train-0.tar", samples(0, 5))
        write_tar(tmp_path / "test-0.tar", samples(5, 5))
        assert set(numbers(batches(tmp_path))) == set(range(5))
        with pytest.raises(DataError, match=r"no tars of split 'val' .their names have test, train"):
            open_stream(str(tmp_path), "val")

    def test_a_pattern_is_data(self, tars: Path) -> None:
        assert set(numbers(batches(f"{tars}/{{00001..00001}}.tar"))) == set(range(30, 50))


class TestBadSamples:
    """`input.max_bad` is a share of the samples; a sample that is left out is logged, and the next one takes its place."""

    BAD: ClassVar[dict[str, bytes]] = {
        "cut.png": encoded(image(1))[:-30],
        "other.png": encoded(image(1, 9)),
        "rgb.jpg": encoded(np.zeros((4, 4, 3), np.uint8), "JPEG"),
        "none.cls": b"1",
        "text.png": b"<html>",
        "two.png": encoded(image(1)),
        "two.jpg": encoded(image(1), "JPEG"),
        "array.npy": b"\x93NUMPY",
        "objects.npz": b"PK",
    }

    def tars(self, root: Path, bad: dict[str, bytes] = BAD) -> Path:
        for tar, first in (("a", 0), ("b", 25)):
            files = samples(first, 25)
            for number, (name, data) in enumerate(bad.items()):
                files.insert(4 * number + 6, (f"{tar}-{name}", data))
            write_tar(root / f"{tar}.tar", files)
        return root

    @pytest.mark.parametrize("shuffle", [0, 8])
    def test_are_left_out_and_batches_stay_whole(self, tmp_path: Path, shuffle: int, caplog: pytest.LogCaptureFixture) -> None:
        found = batches(self.tars(tmp_path), 25, shuffle=shuffle, max_bad=0.5)
        assert {batch.x.shape for batch in found} == {(16, 1, 4, 4)}
        for batch in found:
            for x, number, label in zip(batch.x, numbers([batch]), batch.label, strict=True):
                assert torch.equal(x[0], torch.from_numpy(image(number)))
                assert label == number % 3
        if not shuffle:
            assert set(Counter(numbers(found)).values()) == {8}, "every good sample once a pass"
        lines = [line for line in caplog.text.splitlines() if "is left out" in line]
        assert 3 <= len(lines) <= 5, "over a hundred bad ones: the first three, the tenth, the hundredth"

    @pytest.mark.parametrize("ext", ["png", "npz"])
    def test_bad_ones_are_read_once_and_not_in_every_pass(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ext: str) -> None:
        files = [("good.png", encoded(image(7))), *((f"{n}.{ext}", b"no image") for n in range(30))]
        tars, seen = write_tar(tmp_path / "theirs/a.tar", files).parent, list[str]()
        read = TarFile.read
        monkeypatch.setattr(TarFile, "read", lambda tar, member: (seen.append(member.name), read(tar, member))[1])
        found = batches(tars, 2, shuffle=1, max_bad=1)
        assert numbers(found) == [7] * 32
        reads = Counter(seen)
        assert max(reads[f"{n}.{ext}"] for n in range(30)) <= 3 < reads["good.png"], "when it is opened, and in the first passes"

    @pytest.mark.parametrize("resampled", [False, True])
    def test_a_tar_is_listed_once_and_anew_when_it_is_written_again(self, tmp_path: Path, monkeypatch, resampled: bool) -> None:
        """One good sample among thousands takes a pass for each sample of a batch."""
        bad = [(f"{n}.png", b"no image") for n in range(3000)]
        tars, listed = write_tar(tmp_path / "in/a.tar", [("good.png", encoded(image(7))), *bad]).parent, list[str]()
        monkeypatch.setattr(stream, "tar_samples", lambda tar, *rest: (listed.append(tar.where), tar_samples(tar, *rest))[1])
        started = time.process_time()
        found = batches(tars, 40, shuffle=1, max_bad=1, resampled=resampled)
        assert numbers(found) == [7] * 640 and len(listed) == 2, "when it is opened, and in the first pass"
        assert time.process_time() - started < 10, "a fraction of it here; every pass listed all of it"
        opened = open_stream(str(tars), "train")
        spec, order = InputSpec(reader="webdataset", prefetch=0, max_bad=1, shuffle=0), TrainingOrder(global_batch=16, lanes=8)
        loader = StreamLoader(opened, transform=TransformSpec(), order=order, steps_per_epoch=1, spec=spec)
        steps = loader.batches()
        assert numbers([next(steps)]) == [7] * 16
        write_tar(tars / "a.tar", [("good.png", encoded(image(8))), *bad])
        assert numbers([next(steps), next(steps)])[-16:] == [8] * 16

    def test_more_samples_than_are_remembered_are_listed_again(self, tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = numbers(batches(tars, 20))
        for most in (0, 25, 40):
            monkeypatch.setattr(stream, "MOST_REMEMBERED", most)
            assert numbers(batches(tars, 20)) == expected

    def test_batches_are_the_same_again(self, tmp_path: Path) -> None:
        tars = self.tars(tmp_path)
        first, again = (numbers(batches(tars, 20, max_bad=0.5, resampled=True)) for _ in range(2))
        assert first == again

    def test_too_many_stop_the_run_and_the_advice_is_taken(self, tmp_path: Path) -> None:
        tars = self.tars(tmp_path / "in", {name: data for name, data in self.BAD.items() if not name.startswith("array")})
        with pytest.raises(DataError, match=r"sample '[\w-]+' cannot be trained on .* more than input.max_bad=0.01 allows") as refused:
            batches(tars, 100)
        advice = re.search(r"Set input.max_bad=([\d.]+) .*shards.check=decode and shards.max_bad=([\d.]+)", str(refused.value))
        assert advice is not None
        assert len(batches(tars, 100, max_bad=float(advice[1]))) == 100
        spec = ShardSpec(check="decode", max_bad=float(advice[2]), resize=4, mode="L")
        made = shard_dataset(WebdatasetSpec(url=str(tars)), str(tmp_path / "ds"), shards=spec)
        assert isinstance(made, DatasetManifest)
        assert SampleFormat.from_shapes(made.sample.shapes).shape == (4, 4, 1), "and can be trained on"

    @pytest.mark.parametrize(
        ("name", "data", "advice", "options"),
        [
            ("x.png", encoded(np.zeros((4, 4, 3), np.uint8)), "shard again with shards.mode=L or RGB", {"mode": "RGB"}),
            ("x.png", encoded(image(1, 9)), "shard again with shards.resize=<side>", {"resize": 4}),
            (
                "x.jpg",
                encoded(np.zeros((9, 9, 3), np.uint8), "JPEG"),
                "shard again with shards.resize=<side> and shards.mode=L or RGB",
                {"mode": "L", "resize": 4},
            ),
        ],
    )
    def test_samples_of_other_formats_get_the_advice_of_sharding(
        self, tmp_path: Path, name: str, data: bytes, advice: str, options: dict[str, Any]
    ) -> None:
        write_tar(tmp_path / "in/a.tar", [*samples(0, 20), (name, data)])
        with pytest.raises(DataError, match=r"its format is .* bad, more than input.max_bad=0.01 allows") as refused:
            batches(tmp_path / "in", 60)
        assert str(refused.value).endswith(f" to leave them out, or {advice}")
        assert refused.value.hint == Hint("shard-instead")
        made = shard_dataset(WebdatasetSpec(url=str(tmp_path / "in")), str(tmp_path / "ds"), shards=ShardSpec(**options))
        assert isinstance(made, DatasetManifest)
        assert SampleFormat.from_shapes(made.sample.shapes), "one format of all 21 samples"

    def test_damaged_samples_and_other_formats_together_get_both(self, tmp_path: Path) -> None:
        other = encoded(np.zeros((4, 4, 3), np.uint8))
        write_tar(tmp_path / "a.tar", [*(file for n in range(9) for file in ((f"x{n}.png", b""), (f"y{n}.png", other))), *samples(0, 30)])
        with pytest.raises(
            DataError, match=r"or shard the tars with shards.check=decode .*; and to have one format: shard again with"
        ) as refused:
            batches(tmp_path, 60)
        assert refused.value.hint is not None
        assert refused.value.hint.name == "bad-sample"

    def test_one_of_many_does_not_stop_a_run_and_one_of_few_does(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "many/a.tar", [*samples(0, 150), ("x.png", b"")])
        assert len(batches(tmp_path / "many", 60)) == 60
        write_tar(tmp_path / "few/a.tar", [*samples(0, 20), ("x.png", b"")])
        with pytest.raises(DataError, match=r"of \d+ samples are bad, more than input.max_bad=0.01 allows"):
            batches(tmp_path / "few", 60)

    def test_nothing_but_bad_samples_ends(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar", [("a.png", encoded(image(0)))] + [(f"{n}.png", b"x") for n in range(50)])
        opened = open_stream(str(tmp_path), "train")
        write_tar(tmp_path / "a.tar", [(f"{n}.png", b"x") for n in range(50)])
        order = TrainingOrder(global_batch=16, lanes=8)
        spec = InputSpec(reader="webdataset", prefetch=0, max_bad=1.0)
        loader = StreamLoader(opened, transform=TransformSpec(), order=order, steps_per_epoch=1, spec=spec)
        with pytest.raises(DataError, match=r"(\d{4}) of \1 samples are bad, none of a whole pass .*\)\. Shard the tars with") as raised:
            next(iter(loader.batches()))
        assert "set input.max_bad" not in str(raised.value).lower(), "it is set"

    @pytest.mark.parametrize("ext", ["png", "txt"])
    def test_few_good_samples_among_those_without_data_or_damaged_are_enough_where_all_may_be_bad(self, tmp_path: Path, ext: str) -> None:
        write_tar(tmp_path / "a.tar", [(f"{n}.{ext if n % 2 else 'png'}", b"x" if n % 2 else encoded(image(n))) for n in range(20)])
        found = batches(tmp_path, 3, max_bad=1.0, shuffle=1000)
        assert {*numbers(found)} <= {*range(0, 20, 2)} and len(numbers(found)) == 3 * 16

    def test_the_first_sample_does_not_decide_the_format(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar", [("0.png", encoded(image(0, 9))), ("1.png", b"x"), *samples(2, 30)])
        assert open_stream(str(tmp_path), "train").input_shape() == (1, 4, 4)
        assert open_stream(str(tmp_path), "train", rules=1).input_shape() == (1, 9, 9)
        with pytest.raises(
            DataError, match=r"none of the first 1 samples can be read; the first of them is 'a' of .*a.tar: empty: the file has no"
        ):
            open_stream(str(write_tar(tmp_path / "none/a.tar", [("a.png", b"")])), "train")

    def test_the_limit_of_pixels_is_a_setting_of_reading(self, tmp_path: Path) -> None:
        tars = write_tar(tmp_path / "a.tar", [("a.png", encoded(image(1), "PNG"))])
        side = image(1).shape[0]
        with pytest.raises(DataError, match=rf"{side}x{side} pixels, at most {side * side - 1} are read \(input.max_pixels\)"):
            open_stream(str(tars), "train", max_pixels=side * side - 1)
        opened = open_stream(str(tars), "train", max_pixels=side * side)
        assert opened.training_key("train") == open_stream(str(tars), "train").training_key("train")
        assert InputSpec(reader="webdataset", max_pixels=9).identity() == InputSpec(reader="webdataset").identity()
        with pytest.raises(ConfigError, match="input.max_pixels belong to input.reader=webdataset"):
            InputSpec(max_pixels=9)

    def test_arrays_in_npz(self, tmp_path: Path) -> None:
        def npz(number: int) -> bytes:
            out = io.BytesIO()
            np.savez_compressed(out, x=np.full((2, 3), number, np.float32))
            return out.getvalue()

        write_tar(tmp_path / "a.tar", [(f"{n}.npz", npz(n)) for n in range(20)])
        found = batches(tmp_path, 5, shuffle=0)
        assert sorted(float(x[0, 0]) for batch in found for x in batch.x) == sorted(4 * [float(n) for n in range(20)])


class TestOpened:
    def test_holds_what_is_known_before_the_samples_are_read(self, tars: Path) -> None:
        opened = open_stream(str(tars), "train")
        assert opened.tars == {name: (tars / name).stat().st_size for name in ("00000.tar", "00001.tar")}
        assert (opened.url, opened.number, opened.classes, opened.input_shape()) == (str(tars), 0, None, (1, 4, 4))
        assert (opened.num_samples("train"), opened.num_groups("train")) == (None, 0)

    def test_the_hash_is_that_of_the_claims_of_earlier_runs(self) -> None:
        opened = StreamDataset("/any", "train", {"00000.tar": 10240, "b/00001.tar": 20480}, SampleFormat.parse("4x4x1/L"))
        assert opened.training_key("train") == opened.dataset_sha256 == "2ae13cce27e384e5961835bf2b1d339755ce7eeb723d2c88dfdacc6121901f52"
        with pytest.raises(DataError, match=r"opened for split 'train', not 'val'"):
            opened.training_key("val")


class TestRefused:
    def test_a_sample_of_another_form_is_named(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar", [*samples(0, 3), ("odd.png", encoded(image(0, 9)))])
        with pytest.raises(DataError, match=r"sample 'odd' cannot be trained on .format: its format is 9x9x1/L.*input.max_bad=0.5"):
            batches(tmp_path)

    def test_tars_without_samples(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar", [("a.pyd", b"x")])
        with pytest.raises(DataError, match=r"none of the first 1 samples can be read; the first of them is 'a' of .*a.tar: no_data"):
            open_stream(str(tmp_path), "train")

    @pytest.mark.parametrize(
        ("name", "data", "message"),
        [
            ("png", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "lfs_pointer.*fetch it with `git lfs pull`"),
            ("jpg", b"<!doctype html><title>404</title>", "an HTML page.*download it again"),
            ("npy", npy(np.zeros((8, 8, 64), np.float32)), "layout: an array whose axes may be .* or shard the tars, where shards.layout"),
            (
                "png",
                encoded(np.zeros((8200, 8200), np.uint8)),
                "of 8200x8200 pixels, at most 67108864 are read .input.max_pixels.: raise that limit",
            ),
        ],
    )
    def test_what_cannot_be_read_is_named_with_advice_that_can_be_taken(self, tmp_path: Path, name: str, data: bytes, message: str) -> None:
        write_tar(tmp_path / "in/a.tar", [*samples(0, 20), (f"x.{name}", data)])
        with pytest.raises(DataError, match=message) as refused:
            batches(tmp_path / "in", 5)
        text = str(refused.value).replace(str(tmp_path), "")
        assert len(text) < 450
        assert "shard_dataset" not in text
        write_tar(tmp_path / "first/a.tar", [(f"x.{name}", data)])
        with pytest.raises(DataError, match=message):
            open_stream(str(tmp_path / "first"), "train")

    def test_a_rank_without_samples_ends_instead_of_reading_for_ever(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar", samples(0, 1))
        with pytest.raises(DataError, match=r"rank 1 found no sample in \d+ tars: use fewer workers"):
            batches(tmp_path, rank=1, world_size=2)

    def test_a_broken_tar_says_what_reads_the_others(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "in/a.tar", samples(0, 5))
        data = write_tar(tmp_path / "in/b.tar", samples(5, 5)).read_bytes()
        (tmp_path / "in/b.tar").write_bytes(data[: data.index(encoded(image(8))) + 20])
        with pytest.raises(DataError, match=r"b.tar is truncated.*shard_dataset or adopt_shards with source.bad_tars=skip"):
            batches(tmp_path / "in")
        for write in (shard_dataset, adopt_shards):
            made = write(
                WebdatasetSpec(url=str(tmp_path / "in"), bad_tars="skip"), str(tmp_path / write.__name__), shards=ShardSpec(max_bad=0.5)
            )
            assert made.num_samples() == 5

    @pytest.mark.parametrize(
        ("changes", "input", "message"),
        [
            ({}, {}, r"does not know how many samples.*set train.max_steps, or input.epoch_samples"),
            ({}, {"resampled": True, "epoch_samples": 9}, r"does not know how many samples there are: set train.max_steps$"),
            ({"max_steps": 3, "val_split": "val"}, {}, r"train.val_split=val needs an index.*adopt_shards"),
        ],
    )
    def test_what_only_an_index_gives(self, tars: Path, tmp_path: Path, changes: dict, input: dict, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            small_job(str(tars), tmp_path / "run", input=InputSpec(reader="webdataset", **input), **changes)

    def test_a_model_that_takes_pairs_before_the_run_is_claimed(self, tars: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"model.kind=adagvae trains on pairs, which input.reader=webdataset cannot draw"):
            fit(job(tars, tmp_path / "run", model=AdaGVAESpec(latent_dim=2)))
        assert not (tmp_path / "run").exists()

    def test_options_of_the_other_reader(self) -> None:
        with pytest.raises(ConfigError, match=r"belong to input.reader=webdataset"):
            InputSpec(resampled=True)


def job(tars: Path, out: Path, **changes: Any):
    options = {name: changes.pop(name) for name in ("resampled", "epoch_samples") if name in changes}
    return small_job(
        str(tars), out, input=InputSpec(reader="webdataset", shuffle=8, **options), **{"max_steps": 6, "global_batch": 16} | changes
    )


class TestTraining:
    def test_a_run_is_the_same_again(self, tars: Path, tmp_path: Path) -> None:
        results = [fit(job(tars, tmp_path / name, resampled=True)) for name in ("a", "b")]
        assert [result.step for result in results] == [6, 6]
        assert published_weights(tmp_path / "a") == published_weights(tmp_path / "b")

    def test_epochs_are_counted_in_samples(self, tars: Path, tmp_path: Path) -> None:
        made = job(tars, tmp_path / "run", max_steps=0, epochs=2, epoch_samples=50)
        assert steps_per_epoch(made, open_stream(str(tars), "train")) == 4
        assert fit(made).step == 8
        assert {row["epoch"] for row in losses(tmp_path / "run")} == {0, 1}

    def test_uneven_tars_do_not_hang_two_ranks(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "in/a.tar", samples(0, 40))
        write_tar(tmp_path / "in/b.tar", samples(40, 3))
        fit_on(job(tmp_path / "in", tmp_path / "run"), 2)
        assert [row["samples"] for row in losses(tmp_path / "run")] == [16] * 6

    def test_a_run_that_stopped_goes_on(self, tars: Path, tmp_path: Path) -> None:
        def stop(ref: object, _: object) -> None:
            raise KeyboardInterrupt

        made = job(tars, tmp_path / "run", every_steps=2)
        with pytest.raises(KeyboardInterrupt):
            fit(made, on_checkpoint=stop)
        assert fit(made).step == 6
        assert [row["step"] for row in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]

    def test_other_tars_are_another_run(self, tars: Path, tmp_path: Path) -> None:
        fit(job(tars, tmp_path / "run"))
        write_tar(tars / "00002.tar", samples(50, 3))
        with pytest.raises(ConfigError, match=r"data.train"):
            fit(job(tars, tmp_path / "run"))

    def test_a_run_of_version_1_keeps_the_tars_that_it_took(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_tar(tmp_path / "in/train-0.tar", samples(0, 20))
        write_tar(tmp_path / "in/dev-0.tar", samples(20, 20))

        def stop(ref: object, _: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as before, pytest.raises(KeyboardInterrupt):
            as_before = lambda url, split, member, *_, **__: open_stream(url, split, member, split_in_version_1, 1)  # noqa: E731
            before.setattr("aecore.training.session.open_stream", as_before)
            fit(job(tmp_path / "in", tmp_path / "run", every_steps=2), on_checkpoint=stop)
        assert fit(job(tmp_path / "in", tmp_path / "run", every_steps=2)).step == 6
        fit(job(tmp_path / "in", tmp_path / "new"))
        claims = [json.loads((tmp_path / name / "run.000001.json").read_text()) for name in ("run", "new")]
        assert claims[0]["identity"]["data"] != claims[1]["identity"]["data"]  # dev is validation data now

    def test_a_run_that_began_before_there_were_other_rules_keeps_its_samples(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_tar(tmp_path / "in/a.tar", [*samples(0, 20), *((f"x.{n}.png", encoded(image(n))) for n in range(20, 40))])

        def stop(ref: object, _: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as before, pytest.raises(KeyboardInterrupt):
            before.setattr("aecore.training.session.open_stream", lambda *asked, **_: open_stream(*asked[:3], rules=1))
            fit(job(tmp_path / "in", tmp_path / "run", every_steps=2), on_checkpoint=stop)
        with monkeypatch.context() as now:
            taken = list[set[int]]()
            loaded = StreamLoader.batches

            def recorded(loader: StreamLoader, *steps: int, **more: int) -> Iterator[Batch]:
                for batch in loaded(loader, *steps, **more):
                    taken.append(set(numbers([batch])))
                    yield batch

            now.setattr(StreamLoader, "batches", recorded)
            assert fit(job(tmp_path / "in", tmp_path / "run", every_steps=2)).step == 6
            assert set.union(*taken) <= set(range(20))
            fit(job(tmp_path / "in", tmp_path / "new"))
            assert set.union(*taken) & set(range(20, 40))

    def test_the_identity_of_other_runs_does_not_know_these_options(self, tars: Path, tmp_path: Path) -> None:
        plain = small_job(str(tars), tmp_path / "run")
        assert plain.input.identity() == {"reader": "lanes"}
        assert dataclasses.replace(plain.input, shuffle=3).identity() == {"reader": "lanes"}
