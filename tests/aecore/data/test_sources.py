import contextlib
import io
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from aecore import native
from aecore.data.format.bad_sample import BadSample
from aecore.data.format.record import image_header
from aecore.data.sources import Listing, reader
from aecore.data.sources._detect import detect_source
from aecore.data.sources._labels import by_rules, with_class_names
from aecore.data.sources.folder import FolderSource, FolderSpec
from aecore.data.sources.sprites import SHAPES, SpritesSource, SpritesSpec
from aecore.errors import ConfigError, DataError, StoreError
from aecore.registry import SOURCES


def tree(root, *paths, data=b"x"):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def folder(root, **options):
    return FolderSource(FolderSpec(url=str(root), **options))


def test_sources_are_found_by_kind():
    assert {"folder", "sprites"} <= set(SOURCES.kinds())
    assert SOURCES.from_dict({"kind": "sprites", "size": 16}) == SpritesSpec(size=16)


def test_a_folder_is_listed_sorted_with_keys_labels_and_sizes(tmp_path):
    tree(tmp_path, "train/b/2.png", "train/a/10.PNG", "test/a/1.jpg", data=b"four")
    listing = folder(tmp_path).listing()
    assert listing.sources == ["test/a/1.jpg", "train/a/10.PNG", "train/b/2.png"]
    assert listing.keys == ["test/a/1", "train/a/10", "train/b/2"]
    assert listing.label_names == ["test/a", "train/a", "train/b"]
    assert listing.splits == ["test", "train", "train"]
    assert listing.sizes.tolist() == [4, 4, 4]


def test_reading_gives_the_lower_case_extension_and_the_bytes(tmp_path):
    tree(tmp_path, "a/10.PNG", data=b"four")
    assert folder(tmp_path).read("a/10.PNG") == ("png", b"four")
    with pytest.raises(FileNotFoundError):
        folder(tmp_path).read("a/11.png")


@pytest.mark.parametrize(
    ("found", "what"),
    [
        (b"data", "bytes without their extension"),
        (b"ab", "bytes without their extension"),
        (None, "a value of type NoneType"),
        (("png", b"data", 1), "a value of type tuple"),
        (["png", b"data"], "a value of type list"),
        ((".png", b"data"), "the extension '.png'"),
        (("PNG", b"data"), "the extension 'PNG'"),
        ((None, b"data"), "the extension None"),
        (("npy", np.zeros(3)), "the data as ndarray .bytes are those of an encoded file"),
        (("png", io.BytesIO(b"data")), "the data as BytesIO"),
        ((b"data", "png"), "the data as str"),
    ],
)
@pytest.mark.parametrize("ahead", [False, True])
def test_a_source_that_returns_no_sample_hears_what_was_expected(found, what, ahead):
    class Odd:
        def read(self, source):
            return found

    source = Odd()
    if ahead:
        source.prefetch = lambda names: source.read  # type: ignore[attr-defined]
    with pytest.raises(
        DataError, match=rf"^Odd.read\('a'\) returned {what}.*, expected the extension, lower case .*return \('png', data\)"
    ):
        reader(source, ["a"])("a")
    found = "seg.png", b"data"
    assert reader(source, ["a"])("a") == found


def test_hidden_files_and_other_extensions_are_skipped_and_counted(tmp_path):
    tree(tmp_path, "a/1.png", "a/.2.png", ".git/3.png", "a/notes.txt", "README", ".png")
    listing = folder(tmp_path).listing()
    assert listing.sources == ["a/1.png"]
    nameless, hidden, texts = listing.notes
    assert hidden == "skipped 3 hidden files or folders ('.git', '.png', 'a/.2.png')"
    assert nameless.startswith("skipped 1 file without an extension ('README'): give them the extension of what they are")
    assert texts.startswith("skipped 1 table or text, of which none is a sample ('a/notes.txt'): ")


def test_links_are_followed_to_files_of_the_tree_only(tmp_path):
    root = tree(tmp_path / "in", "a/1.png")
    tree(tmp_path / "out", "2.png")
    os.symlink(root / "a/1.png", root / "a/inside.png")
    os.symlink(tmp_path / "out/2.png", root / "a/outside.png")
    os.symlink(tmp_path / "nowhere.png", root / "a/broken.png")
    os.symlink(root, root / "a/loop")
    listing = folder(root).listing()
    assert listing.sources == ["a/1.png", "a/inside.png"]
    assert listing.notes == (
        "skipped 1 symbolic link out of the folder ('a/outside.png'): set source.follow_links=true to follow them",
        "skipped 1 symbolic link to folders ('a/loop'): set source.follow_links=true to list what is in them",
        "skipped 1 symbolic link to nothing ('a/broken.png'): fetch it (git annex get, dvc pull, or download it again), or remove the link",
    )


def test_two_files_of_one_stem_keep_their_extensions_in_the_key(tmp_path):
    tree(tmp_path, "a/1.png", "a/1.jpg", "a/2.png", "a/v.1.png", "b/1.png")
    assert folder(tmp_path).listing().keys == ["a/1%2Ejpg", "a/1%2Epng", "a/2", "a/v%2E1", "b/1"]


def test_names_that_are_not_utf8_are_samples_but_no_classes(tmp_path):
    tree(tmp_path, "a/1.png")
    with open(os.fsencode(tmp_path) + b"/a/\xff.png", "wb"):
        pass
    listing = folder(tmp_path).listing()
    assert listing.keys == ["a/1", "a/%FF"]
    assert len(listing.sha256()) == 64
    os.mkdir(os.fsencode(tmp_path) + b"/\xfe")
    assert folder(tmp_path).listing().keys == listing.keys
    tree(tmp_path, os.fsdecode(b"\xfe/2.png"))
    found = by_rules(FolderSpec(url=str(tmp_path)), folder(tmp_path).listing())
    assert (found.keys[-1], found.label_names) == ("%FE/2", ["a", "a", ""])
    assert [why and why.reason for why in found.unusable] == [None, None, "label"]


def test_a_missing_folder_an_empty_one_and_an_archive_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        folder(tmp_path / "no").listing()
    tree(tmp_path / "empty", "a/1.txt")
    with pytest.raises(
        DataError, match=r"(?s)holds no file with one of the extensions .*skipped 1 table or text, of which none is a sample \('a/1.txt'\)"
    ):
        folder(tmp_path / "empty").listing()
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a/1.png", b"x")
    with pytest.raises(DataError, match=r"is a zip file: unpack it \(`unzip "):
        folder(tmp_path / "x.zip").listing()
    tree(tmp_path, "y.tar")
    with pytest.raises(DataError, match=r"one of the tars: shard tars of samples by source.kind=webdataset"):
        folder(tmp_path / "y.tar").listing()
    with pytest.raises(ConfigError, match=r"source\.url is empty"):
        folder("")


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    tree(tmp_path, "a/1.png")
    opened = os.open

    def failing(path, *args, **kwargs):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(StoreError, match=r"cannot read .*/a: Permission denied; make it readable"):
        folder(tmp_path).listing()


def test_an_extension_outside_the_allow_list_is_refused():
    with pytest.raises(ConfigError, match="'pickle', which is not read"):
        FolderSpec(url="x", extensions=("pickle",))


def test_sprites_are_the_whole_grid_with_its_factors():
    listing = SpritesSource(SpritesSpec()).listing()
    assert len(listing) == 3 * 4 * 16 * 16
    assert len(set(listing.keys)) == len(listing)
    assert set(listing.columns) == {"factor_shape", "factor_scale", "factor_x", "factor_y"}
    assert [int(listing.columns[f"factor_{name}"].max()) for name in ("shape", "scale", "x", "y")] == [2, 3, 15, 15]
    assert len(set(zip(*(column.tolist() for column in listing.columns.values()), strict=True))) == len(listing)
    names = list(SHAPES)
    assert listing.label_names == [names[shape] for shape in listing.columns["factor_shape"]]


def test_every_sprite_is_another_picture_and_reads_the_same_in_another_source():
    first, second = SpritesSource(SpritesSpec(scales=2, positions=5)), SpritesSource(SpritesSpec(scales=2, positions=5))
    listing = first.listing()
    images = [first.read(source)[1] for source in listing.sources]
    assert len(set(images)) == len(listing)
    assert [second.read(source)[1] for source in reversed(listing.sources)] == images[::-1]
    assert listing.sizes.tolist() == [len(image) for image in images]


@pytest.mark.parametrize("size", [8, 31, 32, 300])
def test_a_sprite_is_a_grey_png_of_what_was_drawn(size):
    source = SpritesSource(SpritesSpec(size=size, scales=1, positions=2, orientations=3))
    for name in source.listing().sources[:: 1 if size < 100 else 9]:
        ext, data = source.read(name)
        assert image_header(data, ext).format_text == f"{size}x{size}x1/L"
        shape, _, rest = name.partition("/")
        with Image.open(io.BytesIO(data)) as picture:
            np.testing.assert_array_equal(np.asarray(picture), source.draw(shape, *(int(part[1:]) for part in rest.split("-"))))


def test_factors_move_and_grow_the_sprite_as_their_names_say():
    source = SpritesSource(SpritesSpec(orientations=4))

    def centre(image):
        rows, columns = np.nonzero(image)
        return rows.mean(), columns.mean()

    for shape in SHAPES:
        base = source.draw(shape, 0, 0, 3, 3)
        assert centre(source.draw(shape, 0, 0, 9, 3))[1] > centre(base)[1] + 5
        assert centre(source.draw(shape, 0, 0, 3, 9))[0] > centre(base)[0] + 5
        assert source.draw(shape, 3, 0, 3, 3).sum() > 2 * base.sum()
    turned = [source.draw("heart", 3, quarter, 8, 8) for quarter in range(4)]
    assert len({image.tobytes() for image in turned}) == 4


def test_part_of_the_grid_is_spread_over_all_shapes():
    listing = SpritesSource(SpritesSpec(num_samples=30)).listing()
    assert len(listing) == 30
    assert set(listing.label_names) == set(SHAPES)


@pytest.mark.parametrize("name", ["cube/s00-o000-x000-y000", "heart/s09-o000-x000-y000", "heart/s00", "heart", "heart/sxx-o000-x000-y000"])
def test_a_name_outside_the_grid_is_refused(name):
    with pytest.raises(DataError, match="no sprite of this grid"):
        SpritesSource(SpritesSpec()).read(name)


def test_listing_hash_sees_every_column():
    listing = SpritesSource(SpritesSpec(positions=2)).listing()
    rows = np.arange(len(listing))
    assert listing.take(rows).sha256() == listing.sha256()
    assert listing.take(rows[::-1]).sha256() != listing.sha256()
    other = SpritesSource(SpritesSpec(positions=2)).listing()
    other.columns["factor_x"][0] += 1
    assert other.sha256() != listing.sha256()


@pytest.mark.parametrize("column", ["keys", "sources", "label_names", "splits", "groups"])
def test_a_source_that_lists_numbers_where_texts_belong_is_told_so(column):
    texts = {name: ["1", "2"] for name in ("keys", "sources", column)}
    with pytest.raises(DataError, match=rf"lists {column} with 1 \(int\), expected text"):
        Listing(sizes=np.ones(2, np.int64), **{**texts, column: [1, np.int64(2)]}).sha256()


@pytest.mark.parametrize("column", ["sources", "sizes", "groups", "width"])
def test_columns_of_another_length_than_the_keys_are_named(column):
    columns = {"sources": ["1", "2"], "sizes": np.ones(2, np.int64), "groups": ["a", "b"], "width": np.ones(2)}
    columns[column] = columns[column][:1]
    with pytest.raises(DataError, match=f"lists 2 keys and 1 values of {column}"):
        Listing(["1", "2"], columns.pop("sources"), columns.pop("sizes"), groups=columns.pop("groups"), columns=columns)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_folder_is_listed_the_same_with_and_without_the_compiled_loops(tmp_path, monkeypatch, compiled):
    if not compiled:
        monkeypatch.setattr(native, "_library", lambda: None)
    elif not native.available():
        pytest.skip("the compiled loops are not built here")
    tree(tmp_path, *(f"train/a/{number:05d}.png" for number in range(20_000)))  # more than a first guess at their number
    others = ("train/b/x.JPEG", "train/b/.hidden.png", "train/b/notes.txt", "train/b/!.png", "train/folder.png/1.png", "top.webp")
    tree(tmp_path, *others, data=b"12")
    (tmp_path / "train/b/inside.png").symlink_to("../a/00000.png")
    (tmp_path / "train/b/outside.png").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "train/b/pipe.png")
    listing = folder(tmp_path).listing()
    expected = {f"train/a/{number:05d}.png": 1 for number in range(20_000)} | {"train/b/x.JPEG": 2, "train/b/!.png": 2, "top.webp": 2}
    expected |= {"train/folder.png/1.png": 2, "train/b/inside.png": 1, "train/b/pipe.png": 0}
    assert dict(zip(listing.sources, listing.sizes.tolist(), strict=True)) == expected
    assert listing.sources == sorted(listing.sources)
    assert len(listing.notes) == 3


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a-idx1-ubyte.gz", "a.tar", "a.tar.gz", "pictures"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_source_that_is_a_pipe_or_a_device_is_refused_and_not_waited_for(tmp_path, name, kind):
    path = tmp_path / name
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    source = SOURCES.build(SOURCES.spec_type_of({"kind": detect_source(str(path)).kind})(url=str(path)))
    with pytest.raises(DataError, match="is a pipe(, a device)? or a (device|folder)"):
        source.listing()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_in_a_folder_are_not_waited_for(tmp_path, kind):
    tree(tmp_path / "in", "a/1.png")
    for name in ("a/0.npy", "a/0.npz", "a/0.png"):
        path = tmp_path / "in" / name
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    assert detect_source(str(tmp_path / "in")).kind == "folder"
    source = FolderSource(FolderSpec(url=str(tmp_path / "in"), follow_links=True, extensions=("png", "npy", "npz")))
    for name in source.listing().sources:
        with contextlib.suppress(BadSample):
            assert len(source.read(name)[1]) < 1 << 20
    place = tmp_path / "classes"
    os.mkfifo(place) if kind == "pipe" else place.symlink_to("/dev/zero")
    with pytest.raises(DataError, match="is a pipe, a device or a folder"):
        with_class_names(FolderSpec(url=str(tmp_path / "in"), classes=str(place)))
