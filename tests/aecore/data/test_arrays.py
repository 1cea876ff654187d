"""Rows of arrays as samples: formats as they are in the world, errors that name the array, pixels that stay what they are."""

import contextlib
import gzip
import io
import re
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aecore.data.dataset import open_dataset
from aecore.data.format.bad_sample import BadSample
from aecore.data.format.record import array_header, image_header
from aecore.data.read.loader import InputSpec, Loader
from aecore.data.sources import Listing
from aecore.data.sources._names import stem_of
from aecore.data.sources._npz import left_out, only_array
from aecore.data.sources.arrays import ArraysSource, ArraysSpec
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.errors import ConfigError, DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 5, 7), dtype=np.uint8)
LABELS = np.arange(12) % 11


def source(url: Path, **options: object) -> ArraysSource:
    return ArraysSource(ArraysSpec(url=str(url), **options))


def listing(url: Path, **options: object) -> Listing:
    return source(url, **options).listing()


def idx(array: np.ndarray) -> bytes:
    """Write idx by its definition: two zeros, type, number of sides, sides, values, all big-endian."""
    kinds = {"u1": 8, "i1": 9, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, kinds[array.dtype.str[1:]], array.ndim, *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def mnist_as_idx(images: Path, out: Path, *, packed: bool) -> Path:
    """Write PNGs of `<split>/<digit>/` as the four files that MNIST is shipped in, in a shuffled order."""
    out.mkdir()
    for split, name in (("train", "train"), ("test", "t10k")):
        paths = sorted((images / split).glob("*/*.png"), key=lambda path: path.name[::-1])
        pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
        labels = np.array([int(path.parent.name) for path in paths], np.uint8)
        for kind, data in (("images-idx3-ubyte", idx(pixels)), ("labels-idx1-ubyte", idx(labels))):
            (out / f"{name}-{kind}{'.gz' if packed else ''}").write_bytes(gzip.compress(data, 1) if packed else data)
    return out


class TestFormats:
    def test_npy_rows_are_samples_with_nine_digit_keys(self, tmp_path: Path) -> None:
        np.save(tmp_path / "digits.npy", PIXELS)
        found = listing(tmp_path)
        assert found.keys[:2] == ["digits/000000000", "digits/000000001"]
        assert (len(found), found.splits, found.label_names) == (12, None, None)
        ext, data = source(tmp_path).read(found.sources[3])
        assert (ext, len(data)) == ("png", found.sizes[3])
        assert image_header(data, "png").format_text == "5x7x1/L"
        assert np.array_equal(pixels_of(data), PIXELS[3])

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_npz_gives_labels_and_factor_columns(self, tmp_path: Path, save) -> None:
        scale = np.linspace(0, 1, 12)
        save(tmp_path / "a.npz", images=PIXELS, labels=LABELS, factor_scale=scale, factor_place=np.arange(24).reshape(12, 2))
        found = listing(tmp_path / "a.npz")
        assert found.label_names == [str(label) for label in LABELS]
        assert found.columns["factor_scale"].tolist() == scale.tolist()
        assert found.columns["factor_place_1"].tolist() == list(range(1, 24, 2))
        reader = source(tmp_path / "a.npz")
        assert all(np.array_equal(pixels_of(reader.read(name)[1]), PIXELS[row]) for row, name in enumerate(found.sources))

    def test_an_npz_with_an_array_for_each_split(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "mnist.npz", x_train=PIXELS[:8], y_train=LABELS[:8], x_test=PIXELS[8:], y_test=LABELS[8:])
        found = listing(tmp_path / "mnist.npz")
        assert found.splits == ["train"] * 8 + ["test"] * 4
        assert found.label_names == [str(label) for label in LABELS]
        assert len(set(found.keys)) == 12

    def test_arrays_of_dev_and_testing_are_splits_and_no_key_of_version_1_changes(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x_train=PIXELS[:6], y_train=LABELS[:6], x_dev=PIXELS[6:], y_dev=LABELS[6:])
        found = listing(tmp_path / "a.npz", labels="y")
        assert found.splits == ["train"] * 6 + ["val"] * 6
        assert found.label_names == [str(label) for label in LABELS]
        assert (found.keys[0], found.keys[6]) == ("a/x_train/000000000", "a/000000000")  # as that version wrote them
        np.savez(tmp_path / "b.npz", x_val=PIXELS[:2], y_val=LABELS[:2], x_dev=PIXELS[2:5], y_dev=LABELS[2:5], x_testing=PIXELS[5:])
        found = listing(tmp_path / "b.npz")
        assert found.splits == ["val"] * 5 + ["test"] * 7
        assert found.label_names[:5] == [str(label) for label in LABELS[:5]]
        assert len(set(found.keys)) == 12

    def test_the_only_labels_belong_to_the_only_array(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", pictures=PIXELS, labels=LABELS)
        assert listing(tmp_path / "a.npz").label_names == [str(label) for label in LABELS]
        (tmp_path / "b").mkdir()
        np.save(tmp_path / "b/digits.npy", PIXELS)
        np.save(tmp_path / "b/y.npy", np.array([f"class {label}" for label in LABELS]))
        assert listing(tmp_path / "b").label_names == [f"class {label}" for label in LABELS]

    def test_further_arrays_become_columns_when_asked(self, tmp_path: Path) -> None:
        metadata = np.array({"a": 1}, dtype=object)  # as dSprites has it: never opened
        np.savez(tmp_path / "d.npz", imgs=PIXELS, latents_classes=np.arange(24).reshape(12, 2), metadata=metadata)
        found = listing(tmp_path / "d.npz", factors=("latents_classes",))
        assert sorted(found.columns) == ["factor_latents_classes_0", "factor_latents_classes_1"]

    @pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4", "f8"])
    def test_idx_values_are_read_in_their_byte_order(self, tmp_path: Path, dtype: str) -> None:
        values = np.arange(24).reshape(2, 3, 4).astype(dtype)
        (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(values))
        ext, data = source(tmp_path, store_as="npy").read(listing(tmp_path, store_as="npy").sources[1])
        assert ext == "npy"
        assert np.array_equal(np.load(io.BytesIO(data)), values[1])
        assert array_header(data).shape == (3, 4)

    @pytest.mark.parametrize("packed", [True, False])
    def test_mnist_as_it_is_shipped(self, tmp_path: Path, real_mnist_small: Path, packed: bool) -> None:
        folder = mnist_as_idx(real_mnist_small, tmp_path / "raw", packed=packed)
        found = listing(folder)
        assert found.keys[0] == "t10k-images/000000000"
        assert (found.splits or []).count("test") == 500
        assert sorted(set(found.label_names or [])) == list("0123456789")
        ending = ".gz" if packed else ""
        one = listing(folder / f"train-images-idx3-ubyte{ending}")
        assert (len(one), one.label_names) == (3000, (found.label_names or [])[500:])

    def test_names_of_idx_files(self) -> None:
        names = ["train-images-idx3-ubyte.gz", "a/train-images.idx3-ubyte", "b.idx", "c.npy"]
        assert [stem_of(name) for name in names] == ["train-images", "a/train-images", "b", "c"]

    @pytest.mark.parametrize("array", [np.asfortranarray(PIXELS), PIXELS.astype(">u2"), PIXELS.astype(np.float64), PIXELS > 7])
    def test_values_survive_whatever_the_layout(self, tmp_path: Path, array: np.ndarray) -> None:
        np.save(tmp_path / "a.npy", array)
        _, data = source(tmp_path, store_as="npy").read("a.npy#4")
        assert np.array_equal(np.load(io.BytesIO(data)), array[4])
        array_header(data)  # a form that the decoder reads

    @pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
    def test_channels_last_images_become_png(self, tmp_path: Path, channels: int, mode: str) -> None:
        images = np.random.default_rng(1).integers(0, 256, (2, 200, 120, channels), dtype=np.uint8)  # over one stored block
        np.save(tmp_path / "a.npy", images)
        _, data = source(tmp_path).read("a.npy#1")
        assert image_header(data, "png").mode == mode
        assert np.array_equal(pixels_of(data).reshape(images[1].shape), images[1])

    def test_channels_first_images_stay_arrays(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.zeros((2, 3, 8, 8), np.uint8))
        assert source(tmp_path).read("a.npy#0")[0] == "npy"


class TestLengths:
    @pytest.mark.parametrize("values", [PIXELS, PIXELS.astype(np.float32), PIXELS[:, :, 0].astype(np.int64)], ids=["u1", "f4", "ids"])
    def test_rows_are_stored_up_to_their_lengths(self, tmp_path: Path, values: np.ndarray) -> None:
        np.savez(tmp_path / "a.npz", series=values, steps=1 + LABELS % 5, labels=LABELS)
        found = listing(tmp_path / "a.npz", lengths="steps")
        assert found.label_names == [str(label) for label in LABELS]
        read = source(tmp_path / "a.npz", lengths="steps").read
        for row, length in enumerate((1 + LABELS % 5).tolist()):
            ext, data = read(found.sources[row])
            assert (ext, len(data)) == ("npy", found.sizes[row])
            assert np.array_equal(np.load(io.BytesIO(data)), values[row, :length])

    def test_each_split_has_lengths_of_its_own(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x_train=PIXELS, lengths_train=1 + LABELS % 5, x_test=PIXELS[:3], lengths_test=np.array([5, 4, 3]))
        found = listing(tmp_path / "a.npz", lengths="lengths")
        shapes = [array_header(source(tmp_path / "a.npz", lengths="lengths").read(name)[1]).shape for name in found.sources]
        assert [shape[0] for shape in shapes] == [*(1 + LABELS % 5).tolist(), 5, 4, 3]

    def test_only_an_npz_has_them_and_they_are_no_images(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=PIXELS, steps=1 + LABELS % 5)
        with pytest.raises(ConfigError, match="store_as=png stores images"):
            listing(tmp_path / "a.npz", lengths="steps", store_as="png")
        np.save(tmp_path / "b.npy", PIXELS)
        with pytest.raises(DataError, match="source.lengths=steps names an array of an .npz"):
            listing(tmp_path / "b.npy", lengths="steps")


class TestRefused:
    def test_pickled_objects_are_never_loaded(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return open, (str(tmp_path / "executed"), "w")

        np.save(tmp_path / "a.npy", np.array([Evil()] * 3, dtype=object), allow_pickle=True)
        with pytest.raises(DataError, match="a.npy holds Python objects"):
            listing(tmp_path)
        np.savez(tmp_path / "a.npz", images=np.array([Evil()] * 3, dtype=object))
        with pytest.raises(DataError, match=r"a.npz \(array 'images'\) holds Python objects"):
            listing(tmp_path / "a.npz")
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize(
        ("arrays", "options", "message"),
        [
            ({"images": PIXELS, "labels": LABELS[:5]}, {}, r"'labels'\) has 5 rows, images has 12"),
            ({"images": PIXELS, "factor_a": LABELS[:5]}, {}, r"'factor_a'\) has 5 rows, images has 12"),
            ({"images": PIXELS[:0]}, {}, r"shape \(0, 5, 7\): expected \[N, ...\] with at least one row"),
            (
                {"a": PIXELS, "b": PIXELS},
                {},
                "the arrays a, b, none named images: choose the one that holds the samples with source.images",
            ),
            ({"pictures": PIXELS}, {"images": "picture"}, "no array 'picture' .did you mean 'pictures'"),
            ({"images": PIXELS, "digits": LABELS}, {"labels": "digit"}, "no array 'digit' .did you mean 'digits'"),
            ({"images": PIXELS, "data": PIXELS}, {}, r"several arrays that may hold the samples \(images, data\)"),
            ({"images": PIXELS, "labels": np.eye(12)}, {}, r"shape \(12, 12\): labels are one number or name.*argmax"),
            ({"images": PIXELS, "labels": LABELS + 0.5}, {}, r"holds \d.5 in row 0, which is no whole number"),
            ({"images": PIXELS, "labels": np.where(np.arange(len(LABELS)) == 1, np.nan, LABELS)}, {}, "holds nan in row 1"),
            ({"x": PIXELS, "n": LABELS[:5]}, {"lengths": "n"}, r"'n'\) has 5 rows, x has 12"),
            ({"x": PIXELS, "n": LABELS % 5}, {"lengths": "n"}, "gives 0 steps for row 0, the rows of x have 1 to 5: leave empty rows out"),
            ({"x": PIXELS, "n": LABELS * 0 + 6}, {"lengths": "n"}, "gives 6 steps for row 0, the rows of x have 1 to 5"),
            ({"x": PIXELS, "n": LABELS / 2}, {"lengths": "n"}, "lengths are one whole number for each row"),
            ({"x": PIXELS, "steps": LABELS}, {"lengths": "step"}, "no array 'step' .did you mean 'steps'.*source.lengths"),
        ],
    )
    def test_what_does_not_fit_is_named(self, tmp_path: Path, arrays: dict, options: dict, message: str) -> None:
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(DataError, match=message):
            listing(tmp_path / "a.npz", **options)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda data: data[:-1], "a.npy is truncated"),
            (lambda data: data + b"x", "a.npy is damaged"),
            (lambda data: b"GARBAGE!" + data[8:], "is not a .npy file"),
            (lambda data: data[:20] + b"\xff" + data[21:], "has a damaged .npy header"),
            (lambda data: data.replace(b"(12, 5, 7)", b"(-1, 5, 7)"), "a.npy is"),
            (lambda data: data[:9], "is not a .npy file"),
        ],
    )
    def test_damaged_npy(self, tmp_path: Path, change, message: str) -> None:
        file = io.BytesIO()
        np.save(file, PIXELS)
        (tmp_path / "a.npy").write_bytes(change(file.getvalue()))
        with pytest.raises(DataError, match=message):
            listing(tmp_path)

    @pytest.mark.parametrize(
        ("descr", "shape", "num_bytes"),
        [("<U0", (10**18,), 0), ("|u1", (10**21, 0), 0), ("|u1", (True, 2, 2), 4), ("|u1", (2,) + (1,) * 70, 2)],
    )
    def test_headers_that_lie(self, tmp_path: Path, descr: str, shape: tuple[int, ...], num_bytes: int) -> None:
        text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
        (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + bytes(num_bytes))
        with pytest.raises(DataError, match=r"a.npy (is damaged: its header promises|has a damaged .npy header)"):
            listing(tmp_path)

    def test_a_member_that_goes_beyond_the_end_of_its_npz(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", images=np.zeros((1000, 4, 4), np.uint8))
        data = (tmp_path / "a.npz").read_bytes()
        start, directory = data.index(b"\x93NUMPY"), data.rindex(b"PK\1\2")
        shorter = bytearray(data[: start + 200] + data[directory:])  # the rest of the values is missing, the directory says nothing of it
        at = start + 200
        shorter[at + 20 : at + 24] = struct.pack("<I", 200)
        shorter[at + 16 : at + 20] = struct.pack("<I", zlib.crc32(data[start : start + 200]))
        shorter[-6:-2] = struct.pack("<I", at)
        (tmp_path / "a.npz").write_bytes(shorter)
        with pytest.raises(DataError, match=r"a.npz .*damaged"):
            listing(tmp_path)

    @pytest.mark.parametrize("cut", [2, 7, 100])
    @pytest.mark.parametrize("packed", [True, False])
    def test_damaged_idx(self, tmp_path: Path, cut: int, packed: bool) -> None:
        data = idx(PIXELS)[:cut]
        name = "train-images-idx3-ubyte"
        (tmp_path / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)
        with pytest.raises(DataError, match=r"(not an idx file|ends inside its idx header|truncated|damaged)"):
            listing(tmp_path)

    def test_a_gzip_file_that_is_cut_or_inflates_to_more_than_it_says(self, tmp_path: Path) -> None:
        name = tmp_path / "train-images-idx3-ubyte.gz"
        name.write_bytes(gzip.compress(idx(PIXELS))[:-9])
        with pytest.raises(DataError, match="damaged"):
            listing(tmp_path)
        name.write_bytes(gzip.compress(idx(PIXELS) + bytes(50_000_000)))
        with pytest.raises(DataError, match="promises 436 bytes, it holds more"):
            listing(tmp_path)
        name.write_bytes(gzip.compress(idx(PIXELS)))
        with pytest.raises(DataError, match=r"inflates to 436 bytes, more than source.max_inflated_bytes=400"):
            listing(tmp_path, max_inflated_bytes=400)

    def test_a_flipped_bit_in_an_npz_is_found(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", images=PIXELS)
        data = bytearray((tmp_path / "a.npz").read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / "a.npz").write_bytes(data)
        with pytest.raises(DataError, match="a.npz is damaged.*CRC"):
            listing(tmp_path)
        (tmp_path / "a.npz").write_bytes(data[:100])
        with pytest.raises(DataError, match="a.npz is damaged"):
            listing(tmp_path)

    @pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_a_damaged_npz_of_any_compression_is_found_by_every_reader(self, tmp_path: Path, method: int) -> None:
        packed, random = io.BytesIO(), np.random.default_rng(0)
        with zipfile.ZipFile(packed, "w", method) as archive:
            member = io.BytesIO()
            np.save(member, random.integers(0, 99, (4, 8, 8)).astype(np.uint8))
            archive.writestr("images.npy", member.getvalue())
        whole = packed.getvalue()
        assert only_array(whole) == member.getvalue()
        for place in range(0, len(whole), 3):
            for value in (0, 0xFF, 0x5D):
                data = whole[:place] + bytes([value]) + whole[place + 1 :]
                (tmp_path / "a.npz").write_bytes(data)
                with contextlib.suppress(BadSample):  # and nothing else
                    only_array(data)
                left_out(str(tmp_path / "a.npz"))
                with contextlib.suppress(DataError):
                    listing(tmp_path)

    def test_a_zip_bomb_is_not_inflated(self, tmp_path: Path) -> None:
        file = io.BytesIO()
        np.save(file, np.zeros((4, 1000, 1000), np.uint8))
        with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("images.npy", file.getvalue())
        with pytest.raises(DataError, match="max_inflated_bytes"):
            listing(tmp_path, max_inflated_bytes=1_000_000)

    def test_missing_and_empty_places(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="a.npz cannot be read.*check the address"):
            listing(tmp_path / "a.npz")
        (tmp_path / "notes.txt").write_text("x")
        with pytest.raises(DataError, match=r"holds no .npy, .npz or idx file"):
            listing(tmp_path)
        np.save(tmp_path / "floats.npy", PIXELS / 255)
        with pytest.raises(ConfigError, match=r"store_as=png needs uint8 images"):
            listing(tmp_path, store_as="png")


class TestDatasets:
    def test_not_finite_rows_go_to_quarantine_under_the_full_check(self, tmp_path: Path) -> None:
        values = np.ones((200, 4), np.float32)
        values[7, 2] = np.nan
        np.save(tmp_path / "a.npy", values)
        spec = ArraysSpec(url=str(tmp_path / "a.npy"))
        made = shard_dataset(spec, str(tmp_path / "ds"), shards=ShardSpec(check="decode"))
        assert (made.num_samples(), dict(made.reasons)) == (199, {"not_finite": 1})

    def test_class_ids_are_the_numbers_that_were_labels(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", images=PIXELS, labels=np.arange(12))
        made = shard_dataset(ArraysSpec(url=str(tmp_path / "a.npz")), str(tmp_path / "ds"))
        assert made.classes == tuple(map(str, range(12)))

    def test_the_same_mnist_from_pngs_and_from_idx_gives_the_same_training_batches(self, tmp_path: Path, real_mnist_small: Path) -> None:
        """Same pixels and labels in the same order: the folder's order is that of its names, so arrays are written in that order."""
        raw = tmp_path / "raw"
        raw.mkdir()
        for split, name in (("train", "train"), ("test", "t10k")):
            paths = sorted((real_mnist_small / split).glob("*/*.png"))
            (raw / f"{name}-images-idx3-ubyte").write_bytes(idx(np.stack([np.asarray(Image.open(path)) for path in paths])))
            (raw / f"{name}-labels-idx1-ubyte").write_bytes(idx(np.array([int(path.parent.name) for path in paths], np.uint8)))
        specs = {"png": FolderSpec(url=str(real_mnist_small)), "idx": ArraysSpec(url=str(raw))}
        batches = {}
        for name, spec in specs.items():
            url = str(tmp_path / name)
            made = shard_dataset(spec, url, SplitSpec(by="folders"), ShardSpec(shuffle=False, max_samples=1000))
            assert {split: made.num_samples(split) for split in made.splits} == {"train": 3000, "test": 500}
            assert made.classes == tuple("0123456789")
            with Loader(open_dataset(url), "train", spec=InputSpec(prefetch=0)) as loader:
                batches[name] = list(loader.range_batches(0, 3000, 512))
        for left, right in zip(batches["png"], batches["idx"], strict=True):
            assert left.x.shape[1:] == (1, 28, 28)
            assert bool((left.x == right.x).all())
            assert bool((left.label == right.label).all())


class TestWhatIsNotUsed:
    def notes(self, url: Path, **options: object) -> str:
        return "\n".join(listing(url, **options).notes)

    def test_arrays_of_an_npz_that_nothing_takes_are_named(self, tmp_path: Path) -> None:
        fine = {"x_train": PIXELS, "y_train_fine": LABELS, "y_train_coarse": LABELS // 2, "more": PIXELS, "masks": PIXELS}
        np.savez(tmp_path / "c.npz", **fine)
        found = self.notes(tmp_path / "c.npz")
        assert re.search(r"skipped 2 arrays of labels .* \('c.npz/y_train_fine', 'c.npz/y_train_coarse'\): source.labels takes one", found)
        assert "skipped 2 arrays that nothing takes ('c.npz/more', 'c.npz/masks'): source.images takes" in found
        chosen = listing(tmp_path / "c.npz", labels="y_train_fine", factors=("y_train_coarse",))
        assert chosen.label_names == [str(label) for label in LABELS] and "arrays of labels" not in "\n".join(chosen.notes)
        np.savez(tmp_path / "d.npz", x=PIXELS, y=LABELS, factor_a=LABELS, bags=LABELS)
        assert "skipped" not in self.notes(tmp_path / "d.npz", group="bags")

    def test_files_of_labels_that_nothing_takes_or_of_another_name_are_named(self, tmp_path: Path) -> None:
        for name, array in (("train_images", PIXELS), ("test_images", PIXELS), ("labels", LABELS)):
            np.save(tmp_path / f"{name}.npy", array)
        assert "skipped 1 file of labels that fit no array, or several ('labels.npy'): name each like" in self.notes(tmp_path)
        (tmp_path / "pets").mkdir()
        np.save(tmp_path / "pets/cats.npy", PIXELS)
        np.save(tmp_path / "pets/dogs_labels.npy", LABELS)
        assert "('labels.npy', 'pets/dogs_labels.npy')" in self.notes(tmp_path)
        assert "('dogs_labels.npy'): name each like its array (cats.npy and cats_labels.npy" in self.notes(tmp_path / "pets")
        assert listing(tmp_path / "pets").label_names is None

    def test_thousands_of_arrays_are_a_count_and_examples(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            for number in range(400):
                archive.writestr(f"array_{number}.npy", b"")
        for options in ({}, {"images": "pictures"}):
            with pytest.raises(DataError, match="array_1, .* and 3[0-9]+ more") as caught:
                listing(tmp_path / "a.npz", **options)
            assert len(str(caught.value)) < 1000

    def test_two_arrays_of_one_name_are_refused_with_what_to_do(self, tmp_path: Path) -> None:
        data = io.BytesIO()
        np.save(data, PIXELS)
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("images.npy", data.getvalue())
            with pytest.warns(UserWarning, match="Duplicate name"):
                archive.writestr("images.npy", data.getvalue())
        for options in ({}, {"images": "images"}):
            with pytest.raises(DataError, match=r"a.npz holds arrays of one name \(images\): save it again"):
                listing(tmp_path / "a.npz", **options)
        with pytest.raises(BadSample, match=r"arrays of one name \(images\): save it again"):
            only_array((tmp_path / "a.npz").read_bytes())


# names of arrays and of labels, and which labels each array takes
PARTNERS = [
    ("cats", "dogs_labels", {}),
    ("x_train", "y_test", {}),
    ("train_images", "test_labels", {}),
    ("cats_images", "cats_dogs_labels", {}),
    ("images", "dogs_labels", {}),
    ("x", "y_train", {}),
    ("cats", "labels", {"cats": "labels"}),
    ("x_train", "y", {"x_train": "y"}),
    ("images", "labels", {"images": "labels"}),
    ("images", "class_labels", {"images": "class_labels"}),
    ("x_train", "y_train_fine", {"x_train": "y_train_fine"}),
    ("cats", "cats_labels", {"cats": "cats_labels"}),
    ("cats dogs", "dogs_labels", {"dogs": "dogs_labels"}),
    ("x_train x_test", "y", {}),
    ("x_train x_test", "y_test y_train", {"x_train": "y_train", "x_test": "y_test"}),
    ("x_train x_val", "y_train y_test", {"x_train": "y_train"}),
    ("images", "labels cats_labels", {"images": "labels"}),
    ("cats", "dogs_labels birds_labels", {}),
    ("x", "y labels", {}),
]


@pytest.mark.parametrize(("arrays", "labels", "taken"), PARTNERS)
def test_labels_belong_to_the_array_that_their_name_says(tmp_path: Path, arrays: str, labels: str, taken: dict[str, str]) -> None:
    """The labels of an array are those of its name, in an `.npz` (which finds its samples by name) as among the files of a folder."""
    numbers = {name: np.full(len(PIXELS), number) for number, name in enumerate(labels.split())}
    held = {**dict.fromkeys(arrays.split(), PIXELS), **numbers}
    expected = {name: str(numbers[taken[name]][0]) if name in taken else "" for name in arrays.split()}
    (tmp_path / "files").mkdir()
    for name, values in held.items():
        np.save(tmp_path / f"files/{name}.npy", values)
    np.savez(tmp_path / "all.npz", **held)
    found = {"files": listing(tmp_path / "files")} | ({} if arrays == "cats dogs" else {"all.npz": listing(tmp_path / "all.npz")})
    for where, of in found.items():
        names = of.label_names or [""] * len(of)
        arrays_of = [source.rpartition("#")[0].rpartition("/")[2].removesuffix(".npy") for source in of.sources]
        given = dict(zip(arrays_of, names, strict=True))
        assert given == expected, where
        unused = set(labels.split()) - set(taken.values())
        assert all(any(name in note for note in of.notes) for name in unused), "labels that are not taken are named"
        assert ("without labels, as others have" in "\n".join(of.notes)) == (0 < len(taken) < len(expected))


def test_two_files_of_labels_of_one_stem_are_not_guessed_between(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", PIXELS)
    np.save(tmp_path / "y.npy", LABELS)
    (tmp_path / "y-idx1-ubyte").write_bytes(idx(LABELS[::-1].astype(np.uint8)))
    assert listing(tmp_path).label_names is None
    assert "skipped 2 files of labels that fit no array, or several" in "\n".join(listing(tmp_path).notes)


def test_another_array_of_images_is_no_file_of_labels(tmp_path: Path) -> None:
    for name in ("x_images", "y_images"):
        np.save(tmp_path / f"{name}.npy", PIXELS)
    assert len(listing(tmp_path / "x_images.npy")) == len(PIXELS)


def test_labels_for_several_arrays_are_refused_and_so_is_another_number_of_rows(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=PIXELS, x_test=PIXELS, y_train=LABELS)
    with pytest.raises(DataError, match=r"a.npz has one array 'y_train' for several arrays of samples.*save one for each"):
        listing(tmp_path / "a.npz", labels="y_train")
    np.save(tmp_path / "cats.npy", PIXELS)
    np.save(tmp_path / "labels.npy", LABELS[:-1])
    (tmp_path / "a.npz").unlink()
    with pytest.raises(DataError, match=r"labels.npy has \d+ rows, cats.npy has \d+: they must belong to each other, row by row"):
        listing(tmp_path)


@pytest.mark.parametrize("dtype", ["S", "U"])
def test_labels_that_are_no_text_are_quarantined(tmp_path: Path, dtype: str) -> None:
    names = [b"caf\xe9", b"caf\xe8", "café".encode(), b"x\0y", b"xy"]
    labels = np.array(names if dtype == "S" else [name.decode("utf-8", "surrogateescape") for name in names])
    np.savez(tmp_path / "a.npz", images=PIXELS[:5], labels=labels)
    made = shard_dataset(ArraysSpec(url=str(tmp_path / "a.npz")), str(tmp_path / "out"), shards=ShardSpec(max_bad=0.7))
    assert (made.classes, made.reasons, made.num_samples()) == (("café", "xy"), {"label": 3}, 2)
    with pytest.raises(DataError, match=r"3 of 5 samples cannot be used.*\n.*label: its label b'caf\\xe9' is not UTF-8: rename"):
        shard_dataset(ArraysSpec(url=str(tmp_path / "a.npz")), str(tmp_path / "strict"))


def test_bags_whose_names_are_no_text_are_escaped_or_refused(tmp_path: Path) -> None:
    """Bytes are escaped as in every dataset that has such bags."""
    spec = ArraysSpec(url=str(tmp_path / "a.npz"), group="bags")
    np.savez(tmp_path / "a.npz", images=PIXELS[:4], bags=np.array([b"a\xe9", b"a\xe8", b"a\xe9", b"b"]))
    assert ArraysSource(spec).listing().groups == [r"a/a\xe9", r"a/a\xe8", r"a/a\xe9", "a/b"]
    assert shard_dataset(spec, str(tmp_path / "out")).num_samples() == 4
    for name in ("a\ud800", "a\0b"):
        np.savez(tmp_path / "a.npz", images=PIXELS[:2], bags=np.array([name, "b"]))
        with pytest.raises(DataError, match=r"a.npz names the bag 'a.*', which has NUL or half a surrogate pair in it: write it without"):
            ArraysSource(spec).listing()


@pytest.mark.parametrize("labels", [[1e300, 1e19, 2e19, 5.0], [2.0**63, 0, 1, 2], [-1e19, 0, 1, 2]])
def test_labels_that_would_merge_are_refused(tmp_path: Path, labels: list) -> None:
    np.savez(tmp_path / "a.npz", images=PIXELS[:4], labels=np.array(labels))
    with pytest.raises(DataError, match=r"a.npz .*'labels'.* holds .* in row 0"):
        listing(tmp_path / "a.npz")


def test_a_byte_order_mark_is_no_part_of_a_class(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=PIXELS[:4], labels=np.array(["\ufeffcat", "cat", "dog", "a\ufeff"]))
    made = shard_dataset(ArraysSpec(url=str(tmp_path / "a.npz"), classes=("\ufeffcat", "dog", "a\ufeff")), str(tmp_path / "out"))
    assert made.classes == ("cat", "dog", "a\ufeff") and made.statistics["train"].classes["cat"] == 2
    with pytest.raises(ConfigError, match="no NUL"):
        shard_dataset(ArraysSpec(url=str(tmp_path / "a.npz"), classes=("c\0at",)), str(tmp_path / "nul"))


def test_a_shape_below_zero_is_named(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (-1, 5)})
    (tmp_path / "a.npy").write_bytes(header.getvalue())
    with pytest.raises(DataError, match=r"header promises the shape \(-1, 5\): restore it"):
        listing(tmp_path / "a.npy")
    with pytest.raises(BadSample, match=r"header promises the shape \(-1, 5\)"):
        array_header(header.getvalue())


def test_folders_and_arrays_may_have_names_of_npz_files(tmp_path: Path) -> None:
    (tmp_path / "in/a.npz").mkdir(parents=True)
    np.save(tmp_path / "in/a.npz/images.npy", PIXELS[:2])
    np.savez(tmp_path / "in/a.npz/b.npz", **{"x.npz/y": PIXELS[2:4]})
    np.savez(tmp_path / "in/c.npz", **{"x.npy": PIXELS[4:6]})
    source = ArraysSource(ArraysSpec(url=str(tmp_path / "in")))
    found = source.listing()
    assert len(found) == 6
    values = [np.asarray(Image.open(io.BytesIO(source.read(name)[1]))) for name in found.sources]
    assert np.array_equal(sorted(map(np.ndarray.tobytes, values)), sorted(map(np.ndarray.tobytes, PIXELS[:6])))


@pytest.mark.parametrize("code", [0xD800, 0xDFFF, 0x110000, 0xFFFFFFFF])
@pytest.mark.parametrize("order", "<>")
def test_texts_with_what_is_no_character_are_refused(tmp_path: Path, code: int, order: str) -> None:
    texts = np.array([[97, 98], [99, code], [97, 98], [97, 98]], f"{order}u4").view(f"{order}U2")[:, 0]
    for name in ("factor_a", "labels"):
        np.savez(tmp_path / "a.npz", **{"images": PIXELS[:4], name: texts})
        if name == "labels" and code <= 0xDFFF:  # the label alone cannot be used, as any other that is no text
            spec = ArraysSpec(url=str(tmp_path / "a.npz"))
            assert shard_dataset(spec, str(tmp_path / "out"), shards=ShardSpec(max_bad=0.5)).reasons == {"label": 1}
            break
        with pytest.raises(DataError, match=f"a.npz .*'{name}'.* has {code:#x} in row 1, which is no character: save"):
            listing(tmp_path / "a.npz")


def test_labels_have_an_end_and_those_of_half_precision_are_numbers(tmp_path: Path) -> None:
    for long in ("z" * 1025, "é" * 513):
        np.savez(tmp_path / "a.npz", images=PIXELS[:2], labels=np.array(["a", long]))
        with pytest.raises(DataError, match=r"1 of 2 samples .*\n.*has more than 1024 bytes: give the name of a class"):
            shard_dataset(ArraysSpec(url=str(tmp_path / "a.npz")), str(tmp_path / "out"))
    np.savez(tmp_path / "a.npz", images=PIXELS[:2], labels=np.array(["\U0001f600" * 256, "é" * 512]))
    assert len(listing(tmp_path / "a.npz")) == 2
    np.savez(tmp_path / "a.npz", images=PIXELS[:2], labels=np.array([3, 1], np.float16))
    assert listing(tmp_path / "a.npz").label_names == ["3", "1"]


@pytest.mark.parametrize(
    "others", [{"factor_m": np.ones((2, 2)), "factor_m_0": np.ones(2)}, {"factor_a": np.ones(2), "factor_a_train": np.ones(2)}]
)
def test_factors_of_one_column_are_refused(tmp_path: Path, others: dict) -> None:
    np.savez(tmp_path / "a.npz", x_train=PIXELS[:2], **others)
    with pytest.raises(DataError, match=r"gives the column 'factor_(m_0|a)', as another array does: rename one"):
        listing(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("first", "second", "joined"),
    [
        (np.array([2**53 + 1, 1]), np.array([0.5, 1]), None),
        (np.array([-(2**63), 1]), np.array([1, 2], np.uint64), None),
        (np.array([1, 2]), np.array(["a", "b"]), None),
        (np.array([2**53, 1]), np.array([0.5, 1]), [2.0**53, 1.0, 0.5, 1.0]),
        (np.array([2**53 + 1, 1]), np.array([1, 2], np.int8), [2**53 + 1, 1, 1, 2]),
        (np.array([True, False]), np.array([1, 2]), [1, 0, 1, 2]),
    ],
)
def test_factors_of_several_files_stay_what_they_are(tmp_path: Path, first: np.ndarray, second: np.ndarray, joined: list | None) -> None:
    np.savez(tmp_path / "a.npz", images=PIXELS[:2], factor_a=first)
    np.savez(tmp_path / "b.npz", images=PIXELS[:2], factor_a=second)
    if joined is None:
        with pytest.raises(DataError, match="the arrays 'factor_a' are .* b.npz/images .*: save them with one type"):
            listing(tmp_path)
    else:
        assert listing(tmp_path).columns["factor_a"].tolist() == joined


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_large_npz_is_in_memory_once(tmp_path: Path, compression: int) -> None:
    data, packed = io.BytesIO(), io.BytesIO()
    np.save(data, np.zeros((1000, 1000, 10), np.uint8))
    with zipfile.ZipFile(packed, "w", compression) as archive:
        archive.writestr("a.npy", data.getvalue())
    tracemalloc.start()
    found, (_, peak) = only_array(packed.getvalue()), tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == data.getvalue() and peak - len(packed.getvalue()) < 1.5 * len(found)


def as_files(root: Path, arrays: dict[str, np.ndarray]) -> Path:
    for name, values in arrays.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".npy"):
            np.save(root / name, values)
        else:
            (root / name).write_bytes(gzip.compress(idx(values)) if name.endswith(".gz") else idx(values))
    return root


OTHER = (LABELS + 3).astype(np.uint8)
ASKED = [  # the files, source.url, source.labels
    (["x.npy", "classes_of_x.npy"], "", "classes_of_x"),
    (["x.npy", "classes_of_x.npy"], "", "classes_of_x.npy"),
    (["x.npy", "classes_of_x.npy"], "x.npy", "classes_of_x"),
    (["x.npy", "kinds/of_x.npy"], "", "kinds/of_x.npy"),
    (["x.npy", "kinds/of_x.npy"], "x.npy", "kinds/of_x"),
    (["train-images-idx3-ubyte", "kinds-idx1-ubyte"], "", "kinds"),
    (["train-images-idx3-ubyte", "kinds-idx1-ubyte.gz"], "train-images-idx3-ubyte", "kinds"),
    (["x_train.npy", "x_test.npy", "kinds_train.npy", "kinds_test.npy"], "", "kinds"),
    (["a/x.npy", "a/kinds.npy", "b/x.npy", "b/kinds.npy"], "", "kinds"),
]


@pytest.mark.parametrize("decoy", [False, True])
@pytest.mark.parametrize(("names", "url", "asked"), ASKED)
def test_labels_are_those_of_the_file_that_the_knob_names(tmp_path: Path, names: list[str], url: str, asked: str, decoy: bool) -> None:
    held = {name: PIXELS if re.search(r"(^|/)x|images", name) else OTHER for name in names}
    as_files(tmp_path, held | ({"y.npy": LABELS} if decoy else {}))
    found = listing(tmp_path / url if url else tmp_path, labels=asked)
    arrays = sum(values is PIXELS for values in held.values())
    assert found.label_names == [str(label) for label in OTHER] * arrays
    assert len(found) == len(PIXELS) * arrays
    assert ("y.npy" in "\n".join(found.notes)) == (decoy and not url)


@pytest.mark.parametrize("url", ["", "x.npy"])
def test_a_file_of_labels_that_is_not_there_is_refused_with_the_known_ones(tmp_path: Path, url: str) -> None:
    as_files(tmp_path, {"x.npy": PIXELS, "classes.npy": OTHER, "y.npy": LABELS})
    with pytest.raises(DataError, match=r"source.labels=clases names no file for x.npy \(did you mean 'classes'\? known: .*y\)"):
        listing(tmp_path / url if url else tmp_path, labels="clases", **({} if url else {"include": ["x.npy"]}))


def test_one_file_of_labels_for_several_arrays_is_refused(tmp_path: Path) -> None:
    as_files(tmp_path, {"cats.npy": PIXELS, "dogs.npy": PIXELS, "kinds.npy": OTHER})
    with pytest.raises(DataError, match=r"source.labels=kinds names one file for several arrays \(cats.npy, dogs.npy\)"):
        listing(tmp_path, labels="kinds")


@pytest.mark.parametrize("options", [{"images": "x"}, {"factors": ("shape",)}, {"group": "bags"}, {"lengths": "n"}])
def test_names_of_arrays_of_an_npz_are_refused_for_files_of_one_array(tmp_path: Path, options: dict) -> None:
    as_files(tmp_path, {"x.npy": PIXELS})
    with pytest.raises(DataError, match=rf"source.{next(iter(options))}=\w+ names an array of an .npz, x.npy is none"):
        listing(tmp_path, **options)


def test_the_log_says_that_no_sample_has_a_label(tmp_path: Path) -> None:
    as_files(tmp_path, {"x.npy": PIXELS})
    for url in (tmp_path, tmp_path / "x.npy"):
        assert sum("no sample has a label" in note for note in listing(url).notes) == 1
    assert "no sample has a label" not in "\n".join(listing(tmp_path, labels="regex:^(x)").notes)
    as_files(tmp_path, {"y.npy": LABELS})
    assert "no sample has a label" not in "\n".join(listing(tmp_path).notes)
