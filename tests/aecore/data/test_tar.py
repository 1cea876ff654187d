import io
import tarfile

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from aecore import native
from aecore.data.format.record import encode_key
from aecore.data.format.tar import PAGE, Samples, TarPacker, headers, split_name
from aecore.errors import DataError
from aecore.native.bytes_column import BytesColumn

SIZES = [0, 1, 511, 512, 513, 1000, 9 * 512, 10240, 65521, 100_000]


@pytest.fixture(params=["compiled", "python"], autouse=True)
def _loops(request, monkeypatch):
    """Every test runs with the compiled loops, where they are built, and without."""
    if request.param == "python":
        monkeypatch.setattr(native, "_library", lambda: None)
    elif not native.available():
        pytest.skip("the compiled loops are not built here")


def ours(samples: list[dict]) -> bytes:
    return packed(samples)


def chunk_of(samples: list[dict]) -> Samples:
    exts, contents, labels = list[str](), list[bytes](), list[int]()
    for sample in samples:
        (ext,) = sample.keys() - {"__key__", "cls"}
        exts.append(ext)
        contents.append(sample[ext])
        labels.append(int(sample.get("cls", -1)))
    exts = exts[:1] if len(set(exts)) == 1 else exts  # one may stand for all
    return Samples(
        [sample["__key__"] for sample in samples],
        exts,
        BytesColumn.from_bytes(contents),
        np.array(labels, np.int32),
    )


def packed(*chunks: list[dict]) -> bytes:
    """The tar of samples that are packed chunk by chunk."""
    packer, written = TarPacker(), list[bytes]()
    for samples in chunks:
        pages = packer(chunk_of(samples))
        assert len(pages) % PAGE == 0 and np.frombuffer(pages, np.uint8).ctypes.data % PAGE == 0  # what O_DIRECT asks for
        written.append(bytes(pages))
    return b"".join(written) + packer.end()


def theirs(samples: list[dict]) -> bytes:
    file = io.BytesIO()
    with webdataset.TarWriter(file, mtime=0, encoder=False) as writer:
        for sample in samples:
            writer.write(sample)
    return file.getvalue()


def random_samples(seed: int, count: int) -> list[dict]:
    random = np.random.default_rng(seed)
    names = ["".join(random.choice(list("abcXYZ019-%"), random.integers(1, 90))) for _ in range(count)]
    return [
        {
            "__key__": name,
            "cls": b"%d" % random.integers(1000),
            str(random.choice(["jpeg", "bmp"])): random.bytes(int(random.choice([*SIZES, random.integers(100_000)]))),
        }
        for name in names
    ]


@pytest.mark.parametrize("seed", range(8))
def test_the_bytes_are_those_of_webdatasets_own_writer(seed):
    samples = random_samples(seed, 40)
    assert ours(samples) == theirs(samples)


@pytest.mark.parametrize("size", [1, 2, 7, 30])
def test_chunks_that_reuse_the_buffers_make_the_same_tar_as_one(size):
    samples = [sample for seed in (8, 9, 10) for sample in random_samples(seed, 30)]
    assert packed(*(samples[at : at + size] for at in range(0, len(samples), size))) == packed(samples)


def test_a_page_is_given_as_soon_as_it_is_full():
    packer = TarPacker()
    half = chunk_of([{"__key__": "a", "png": bytes(PAGE // 2 - 512)}])  # a page with its header
    lengths = [len(packer(half)) for _ in range(4)]
    assert lengths == [0, PAGE, 0, PAGE]


@pytest.mark.parametrize("label", [0, 9, 10, 1234567890, 2**31 - 1])
def test_labels_are_written_in_digits(label):
    samples = [{"__key__": "a", "png": b"x", "cls": b"%d" % label}, {"__key__": "b", "png": b"y"}]
    assert ours(samples) == theirs(samples)


@pytest.mark.parametrize("key", ["ü" * 90, "あ" * 33, "a" * 101])
def test_names_of_too_many_bytes_are_refused(key):
    with pytest.raises(DataError, match="does not fit"):
        ours([{"__key__": key, "png": b"x", "cls": b"1"}])


@pytest.mark.parametrize("key", ["ü" * 45, "日本語/キー"])
def test_names_that_are_not_ascii_are_packed_in_utf8(key):
    samples = [{"__key__": key, "png": b"x", "cls": b"1"}, {"__key__": "a", "png": b"y"}]
    with tarfile.open(fileobj=io.BytesIO(ours(samples)), encoding="utf-8") as tar:
        assert tar.getnames() == [f"{key}.cls", f"{key}.png", "a.png"]


@pytest.mark.parametrize("length", [1, 90, 95, 96])
def test_names_up_to_100_bytes_are_those_of_webdataset_too(length):
    samples = [{"__key__": "k" * length, "png": b"x"}]
    assert ours(samples) == theirs(samples)


@pytest.mark.parametrize("total", range(8, 30))
def test_the_end_of_the_archive_is_filled_up_to_a_record(total):
    samples = [{"__key__": "a", "png": bytes(512 * total)}]
    assert ours(samples) == theirs(samples) and len(ours(samples)) % 10240 == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.sampled_from("abc_."), min_size=1, max_size=90), min_size=1, max_size=8).map("/".join))
def test_long_names_are_stored_as_tarfile_stores_them_in_ustar(path):
    name = f"{encode_key(path)}.jpeg"
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname, info.mtime = 3, 0o444, "bigdata", "bigdata", 0
    assert headers([b"a.cls", name.encode()], np.array([1, 3]))[1].tobytes() == info.tobuf(tarfile.USTAR_FORMAT)


def test_a_name_that_fits_no_header_is_an_error():
    with pytest.raises(DataError, match="does not fit"):
        split_name(b"a" * 101)
    with pytest.raises(DataError, match="does not fit"):
        headers([b"a/" * 128 + b"b"], np.array([0]))


def test_the_largest_size_fits_and_a_larger_one_is_an_error():
    info = tarfile.TarInfo("a.png")
    info.size, info.mode, info.uname, info.gname, info.mtime = 8**11 - 1, 0o444, "bigdata", "bigdata", 0
    assert headers([b"a.png"], np.array([8**11 - 1])).tobytes() == info.tobuf(tarfile.USTAR_FORMAT)
    with pytest.raises(DataError, match="8 GiB"):
        headers([b"a.png"], np.array([8**11]))
