"""Files of arrays in folders: each one sample, or samples by row. numpy says what the values are."""

import contextlib
import gzip
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aecore.data.dataset import open_dataset
from aecore.data.format.bad_sample import BadSample
from aecore.data.format.record import array_header
from aecore.data.sources import _inflate, _npz
from aecore.data.sources._arrayshapes import Peek, hold_rows
from aecore.data.sources._detect import Detected, detect_source
from aecore.data.sources._npz import only_array
from aecore.data.sources.arrays import ArraysSource, ArraysSpec
from aecore.data.sources.folder import FolderSource, FolderSpec
from aecore.data.write.convert import prepare
from aecore.data.write.job import shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.errors import ConfigError, DataError
from pipelines.cli.main import main
from tests.aecore.data.tiny import encoded, image

RNG = np.random.default_rng(0)


def values(*shape: int, dtype: str = "float32") -> Any:  # any: its dtype
    return (RNG.normal(size=shape) * 50).astype(dtype)


def save(root: Path, arrays: dict[str, Any]) -> Path:  # any: arrays, or the arrays of an .npz by name
    for name, array in arrays.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(array, dict):
            np.savez(root / name, **array)
        else:
            np.save(root / name, array)
    return root


def stored(spec: Any) -> dict[str, Any]:  # any: every source kind has its own spec class; arrays
    """Return what a source gives, decoded by numpy."""
    from aecore.registry import SOURCES

    source = SOURCES.build(spec)
    return {name: np.load(io.BytesIO(source.read(name)[1])) for name in source.listing().sources}


ONE_EACH = {
    "multi-band tiles": {f"{place}/tile{number}.npy": (32, 32, 5) for place in ("forest", "water") for number in range(4)},
    "channels first": {f"a/{number}.npy": (4, 16, 16) for number in range(6)},
    "two shapes": {"a/0.npy": (16, 16, 4), "a/1.npy": (12, 16, 4)},
    "sequences": {f"visit{number}.npy": (5 + 7 * number, 3) for number in range(6)},
    "long sequences": {f"a/{number}.npy": (900, 12) for number in range(6)},
    "long sequences of many lengths": {f"{number}.npy": (2000 + 137 * number, 80) for number in range(5)},
    "in split folders": {f"{split}/{place}/0.npy": (9, 9, 4) for split in ("train", "test") for place in "ab"},
    "a single one in its class": {"forest/tile.npy": (32, 32, 5)},
    "vectors": {f"a/{number}.npy": (128,) for number in range(6)},
    "grey pictures": {f"a/{number}.npy": (64, 48) for number in range(6)},
    "volumes": {f"a/{number}.npy": (40, 48, 48) for number in range(3)},
    "volumes of channels": {f"a/{number}.npy": (2, 24, 24, 24) for number in range(3)},
    "clips": {f"a/{number:02d}.npy": (8, 16, 16, 3) for number in range(12)},
    "hyperspectral": {f"a/{number}.npy": (20, 20, 60) for number in range(3)},
    "one per class": {"a/x.npy": (16, 16, 4), "b/x.npy": (16, 16, 4)},
    "numbers": {f"a/{number}.npy": () for number in range(3)},
}
BY_ROW = {
    "one file": {"digits.npy": (50, 28, 28)},
    "one file of few": {"digits.npy": (5, 28, 28)},
    "one file in a folder": {"mnist/digits.npy": (500, 28, 28)},
    "splits": {"x_train.npy": (50, 8, 8), "x_test.npy": (20, 8, 8)},
    "with labels": {"part0-images.npy": (30, 8, 8), "part0-labels.npy": (30,), "part1-images.npy": (30, 8, 8), "part1-labels.npy": (30,)},
    "chunks of grey pictures": {f"chunk{number}.npy": (1000, 28, 28) for number in range(3)},
    "chunks of colour pictures": {f"batch_{number}.npy": (50, 32, 32, 3) for number in range(4)},
    "a file per class": {"cat.npy": (20_000, 784), "dog.npy": (21_000, 784)},
    "embeddings": {f"img_emb_{number}.npy": (30_000, 64) for number in range(3)},
}


def empty_files(root: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """Write files with these headers; their values are a hole in the file."""
    for name, shape in shapes.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(root / name, mode="w+", dtype=np.float32, shape=shape).flush()
    return root


@pytest.mark.parametrize("what", ONE_EACH)
def test_files_that_are_samples_are_recognised(tmp_path: Path, what: str) -> None:
    assert detect_source(str(empty_files(tmp_path, ONE_EACH[what]))) == Detected("folder", ("npy",))


@pytest.mark.parametrize("what", BY_ROW)
def test_files_that_hold_rows_are_recognised(tmp_path: Path, what: str) -> None:
    assert detect_source(str(empty_files(tmp_path, BY_ROW[what]))) == Detected("arrays")


def test_names_in_capitals_are_samples_as_the_advice_says(tmp_path: Path) -> None:
    empty_files(tmp_path, {f"a/{number}.npy": (9, 9, 5) for number in range(3)})
    for path in list((tmp_path / "a").iterdir()):
        path.rename(path.with_suffix(".NPY"))
    assert detect_source(str(tmp_path)) == Detected("folder")
    with pytest.raises(DataError, match=r"source.extensions=\[npy\] takes each file as one sample; to take their rows rename"):
        FolderSource(FolderSpec(url=str(tmp_path))).listing()
    assert len(FolderSource(FolderSpec(url=str(tmp_path), extensions=("npy",))).listing()) == 3


@pytest.mark.parametrize("shape", [(5000, 12), (100, 28, 28)])
def test_what_may_be_both_is_asked_about_and_both_answers_are_taken(tmp_path: Path, shape, capsys) -> None:
    root = empty_files(tmp_path / "in", {f"a/{number}.npy": shape for number in range(2)})
    assert main(["shard", str(root), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"of shape {shape}" in said and "source.kind=folder source.extensions=[npy]" in said and "source.kind=arrays" in said
    for number, (answer, samples) in enumerate((("source.kind=folder source.extensions=[npy]", 2), ("source.kind=arrays", 2 * shape[0]))):
        assert main(["shard", str(root), str(tmp_path / f"{number}"), *answer.split(), "--dry-run", "--json"]) == 0
        assert f'"train": {samples}' in capsys.readouterr().out


def test_an_npz_says_by_its_labels_what_it_is(tmp_path: Path) -> None:
    single = save(tmp_path / "single", {f"a/{n}.npz": {"image": values(16, 16, 4), "label": np.array(n)} for n in range(3)})
    masked = save(tmp_path / "masked", {f"a/{n}.npz": {"image": values(16, 16, 4), "mask": values(16, 16)} for n in range(3)})
    rows = save(tmp_path / "rows", {f"{n}.npz": {"images": values(30, 8, 8, 3), "labels": np.arange(30)} for n in range(3)})
    splits = save(tmp_path / "splits", {f"{n}.npz": {"x_train": values(30, 8), "x_test": values(9, 8)} for n in range(3)})
    assert detect_source(str(single)) == detect_source(str(masked)) == Detected("folder", ("npz",))
    assert detect_source(str(rows)) == detect_source(str(splits)) == Detected("arrays")


def test_idx_files_hold_rows(tmp_path: Path) -> None:
    for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"\0\0\x08\x03" + np.array([2, 2, 2], ">u4").tobytes() + bytes(8)))
    assert detect_source(str(tmp_path)) == Detected("arrays")


def test_pointers_in_place_of_arrays_are_samples_that_the_quarantine_names(tmp_path: Path, capsys) -> None:
    for number in range(3):
        (tmp_path / f"{number}.npy").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    assert main(["shard", str(tmp_path), str(tmp_path / "../out"), "cluster.num_workers=0"]) == 3
    assert "lfs_pointer 3" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["multi-band tiles", "sequences", "two shapes", "vectors"])
def test_each_file_is_one_sample_with_its_values_and_its_folder_as_label(tmp_path: Path, what: str, capsys) -> None:
    arrays = {name: values(*shape) for name, shape in ONE_EACH[what].items()}
    root = save(tmp_path / "in", arrays)
    assert main(["shard", str(root), str(tmp_path / "out"), "cluster.num_workers=0"]) == 0
    assert f"one sample per file: {len(arrays)} .npy or .npz files (source.kind=arrays takes each row" in capsys.readouterr().err
    found = stored(FolderSpec(url=str(root), extensions=("npy",)))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    listing = FolderSource(FolderSpec(url=str(root), extensions=("npy",))).listing()
    assert listing.label_names == [name.rpartition("/")[0] for name in sorted(arrays)]


def test_the_log_says_that_rows_are_samples(tmp_path: Path) -> None:
    root = save(tmp_path, {"chunk0.npy": values(300, 4, 4), "chunk1.npy": values(200, 4, 4)})
    listing = ArraysSource(ArraysSpec(url=str(root))).listing()
    assert len(listing) == 500
    assert listing.notes[0] == "one sample per row: 500 rows of 2 arrays (source.kind=folder takes each file as one)"


def test_a_dataset_goes_on_as_it_began_whatever_shapes_say_today(tmp_path: Path, capsys) -> None:
    tiles = {f"a/{number}.npy": values(8, 8, 5) for number in range(2)}
    root, out = save(tmp_path / "in", tiles), str(tmp_path / "out")
    shard_dataset(ArraysSpec(url=str(root)), out)  # what the version before made of it
    assert detect_source(str(root)) == Detected("folder", ("npy",))
    assert main(["shard", str(root), out, "cluster.num_workers=0"]) == 0
    assert "nothing new in 16 samples" in capsys.readouterr().err
    (tmp_path / "out/dataset.000001.json").unlink()  # as if it had been killed before its last step
    assert main(["shard", str(root), out, "cluster.num_workers=0"]) == 0
    assert "generation 1, 16 new samples" in capsys.readouterr().err
    assert not (tmp_path / "out/run.000002.json").exists()
    other = str(tmp_path / "other")
    assert main(["shard", str(root), other, "cluster.num_workers=0"]) == 0
    save(tmp_path / "in", {"a/2.npy": values(8, 8, 5)})
    assert main(["shard", str(root), other, "cluster.num_workers=0"]) == 0
    assert "generation 2, 1 new sample," in capsys.readouterr().err


class TestNpz:
    def test_the_one_array_of_each_file_is_the_sample(self, tmp_path: Path) -> None:
        arrays = {f"{name}/{number}.npz": values(6, 6, 4) for name in "ab" for number in range(3)}
        root = save(tmp_path, {name: {"image": array, "label": np.array(1)} for name, array in arrays.items()})
        np.savez_compressed(root / "a/9.npz", image=values(6, 6, 4), mask=values(6, 6))
        arrays["a/9.npz"] = np.load(root / "a/9.npz")["image"]
        found = stored(FolderSpec(url=str(root), extensions=("npz",)))
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
        notes = FolderSource(FolderSpec(url=str(root), extensions=("npz",))).listing().notes
        assert notes[1] == "of an .npz one array is the sample: of a/0.npz that is 'image', not 'label'"
        made = shard_dataset(FolderSpec(url=str(root), extensions=("npz",)), str(tmp_path / "out"))
        assert (made.classes, made.sample.extensions) == (("a", "b"), {"npy": 7})

    @pytest.mark.parametrize(
        ("arrays", "chosen"),
        [
            ({"arr_0": values(3, 4)}, "arr_0"),
            ({"labels": values(3)}, "labels"),
            ({"signal": values(3, 4), "rate": np.array(100.0), "label": np.array(1)}, "signal"),
            ({"x": values(3, 4), "other": values(2)}, "x"),
            ({"one": values(3, 4), "two": values(3, 4)}, None),
            ({"labels": values(3), "rate": np.array(100.0)}, None),
        ],
    )
    def test_which_array_is_the_sample(self, arrays, chosen) -> None:
        file = io.BytesIO()
        np.savez(file, **arrays)
        if chosen is None:
            with pytest.raises(BadSample, match="ambiguous: .*name it image or data"):
                only_array(file.getvalue())
        else:
            np.testing.assert_array_equal(np.load(io.BytesIO(only_array(file.getvalue()))), arrays[chosen])

    @given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 255))
    @settings(max_examples=150)
    def test_bad_bytes_are_a_bad_sample_and_nothing_else(self, data: bytes, at: int, byte: int) -> None:
        file = io.BytesIO()
        np.savez_compressed(file, image=np.arange(12.0))
        spoilt = bytearray(file.getvalue())
        spoilt[at % len(spoilt)] = byte
        for each in (data, bytes(spoilt), bytes(spoilt[: at % len(spoilt)])):
            with contextlib.suppress(BadSample):
                only_array(each)

    def test_a_bomb_is_refused_before_it_is_inflated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_npz, "ALLOWED_BYTES", 1 << 20)
        monkeypatch.setattr(_inflate, "ALLOWED_BYTES", 1 << 20)
        file = io.BytesIO()
        np.savez_compressed(file, image=np.zeros(2 << 20, np.uint8))
        with pytest.raises(BadSample, match="too_large: image.npy in the .npz inflates to 2097280 bytes, more than 1048576 bytes"):
            only_array(file.getvalue())

    def test_pickles_are_never_read(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "0.npz", image=np.array([{"a": 1}], dtype=object))
        with pytest.raises(BadSample, match="dtype object"):
            prepare(only_array((tmp_path / "0.npz").read_bytes()), "npy", ShardSpec())


def test_images_decide_and_the_arrays_next_to_them_are_named(tmp_path: Path) -> None:
    save(tmp_path, {"a/1.npy": values(4, 4)})
    (tmp_path / "a/1.png").write_bytes(encoded(image(1)))
    assert detect_source(str(tmp_path)) == Detected("folder")
    (note,) = FolderSource(FolderSpec(url=str(tmp_path))).listing().notes
    assert note.startswith("skipped 1 array ('a/1.npy'): source.extensions=[npy] takes each file as one sample, source.kind=arrays")


def test_headers_that_disagree_are_asked_about() -> None:
    names = ["a/0.npy", "a/1.npy"]
    assert hold_rows(names, [Peek(names[0], (8, 8, 5)), Peek(names[1], (50_000, 64))]) is None
    with pytest.raises(ConfigError):
        FolderSpec(url="x", extensions=("idx",))


def test_settings_that_do_not_fit_a_sample_end_the_run_with_its_name_and_without_another_try(tmp_path: Path) -> None:
    save(tmp_path / "in", {f"a/{number}.npy": values(6, 6) for number in range(3)})
    source = FolderSpec(url=str(tmp_path / "in"), extensions=("npy",))
    with pytest.raises(ConfigError, match=r"'a/\d.npy': shards.resize, .* work on images") as refused:
        shard_dataset(source, str(tmp_path / "out"), shards=ShardSpec(resize=16))
    assert "same command again" not in str(refused.value)
    assert "change the settings that are named" in str(refused.value)


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (
            np.array([np.zeros(3), None], dtype=object),
            "Python objects need a pickle, which is never read: save an array of numbers",
        ),
        (np.array(["cat", "dog"]), "save numbers instead of texts"),
        (np.array([b"cat"]), "save numbers instead of texts"),
        (np.zeros(3, [("x", "f4"), ("y", "f4")]), "save its fields as channels"),
        (np.zeros(3, "M8[s]"), "save dates as numbers"),
        (np.zeros(3, "m8[s]"), "save time differences as numbers"),
        (np.zeros(3, "c8"), "save the real and the imaginary part"),
    ],
)
def test_an_array_of_something_else_than_numbers_says_what_to_save(value, remedy: str) -> None:
    out = io.BytesIO()
    np.save(out, value)
    with pytest.raises(BadSample, match="only booleans and numbers are read") as caught:
        array_header(out.getvalue())
    assert remedy in caught.value.message


def test_arrays_that_may_be_images_or_sequences_get_one_advice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def said(*shapes: tuple[int, ...]) -> str:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        save(root / "in", {f"{number}.npy": np.zeros(shape, np.float32) for number, shape in enumerate(shapes)})
        caplog.clear()
        with caplog.at_level(logging.INFO):
            shard_dataset(FolderSpec(url=str(root / "in"), extensions=("npy",)), str(root / "out"))
        return caplog.text

    text = said((20, 16, 3), (21, 16, 3), (25, 16, 3))
    assert "3 are images" not in text and "is an image" not in text and text.count("rvae") == 1
    assert "arrays [T, 16, 3] whose first axes differ, as of sequences of up to 25 steps (3 lengths)" in text
    assert "if they are images [H, W, C], save them with one shape" in text
    text = said((20, 16, 3), (21, 17, 3))
    assert "2 arrays of 2 shapes such as 20x16x3 are images [H, W, C] of 3 channels" in text and "rvae" not in text
    assert "save the arrays with one shape (numpy.pad, or cut them)" in text
    text = said((20, 16, 3))
    assert "1 array of 20x16x3 is an image [H, W, C]" in text and "rvae" not in text
    text = said((20, 40), (21, 40))
    assert "sequences of up to 21 steps (2 lengths)" in text and "H, W, C" not in text


def test_a_knob_about_rows_says_that_a_folder_of_arrays_holds_rows(tmp_path: Path, capsys) -> None:
    labels = np.arange(40) % 3
    save(tmp_path / "in", {"x.npy": values(40, 9, 9), "classes_of_x.npy": labels})
    argv = ["shard", str(tmp_path / "in"), str(tmp_path / "out"), "source.labels=classes_of_x", "cluster.num_workers=0", "--json"]
    assert main(argv) == 0
    made = open_dataset(str(tmp_path / "out")).manifest
    assert dict(made.statistics["train"].classes) == {str(label): int(count) for label, count in enumerate(np.bincount(labels))}
    assert detect_source(str(tmp_path / "in"), options={"url"}).kind == "folder"
