import dataclasses
import errno
import io
import json
import os
import pickle
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from aecore.artifact.commit import PartRecord, read_record
from aecore.data.format.bad_sample import BadSample
from aecore.data.format.index import INDEX_SCHEMA, MEMBERS, QUARANTINE_SCHEMA, content_sha256
from aecore.data.manifest import ShardRef
from aecore.data.read.shard_reader import PARALLEL_BYTES, ShardReader
from aecore.data.write import pack as pack_module
from aecore.data.write.shard import pack_shard
from aecore.data.write.spec import ShardSpec, ShardTask
from aecore.errors import ConfigError, DataError, StoreError
from aecore.store import FileRef, LocalStore, open_store
from tests.aecore.data.tiny import MemorySource, encoded, image
from tests.processes import WARM, run


def task_of(names: list[str], labels: list[int] | None = None, **options: object) -> ShardTask:
    return ShardTask(
        split="train",
        stem="train-000000",
        source=None,
        keys=[name.rpartition(".")[0] for name in names],
        sources=names,
        sizes=np.zeros(len(names), np.int64),
        ordinals=np.arange(len(names)) + 7,
        labels=None if labels is None else np.array(labels, np.int32),
        **options,
    )


def ref_of(record: PartRecord) -> ShardRef:
    def file(folder: str, suffix: str) -> FileRef | None:
        return next((ref for ref in record.files if ref.name.startswith(folder) and ref.name.endswith(suffix)), None)

    tar, index, detail = file("shards/", ".tar"), file("shards/", ".parquet"), record.detail
    assert tar and index
    quarantine = file("quarantine/", "")
    return ShardRef(
        "train",
        record.part,
        record.rows,
        detail["planned"],
        detail["first_ordinal"],
        tar,
        index,
        detail["content_sha256"],
        quarantine,
        record.quarantined,
    )


def write_shard(store: LocalStore, task: ShardTask, source: MemorySource) -> PartRecord:
    return pack_shard(store, task, source)()


def pictures(count: int, ext: str = "png") -> dict[str, bytes]:
    return {f"k{number:03d}.{ext}": encoded(image(number)) for number in range(count)}


def shard_of(url: Path, files: dict[str, bytes], labels: list[int] | None = None, **options: object) -> ShardReader:
    store = open_store(url)
    record = write_shard(store, task_of(list(files), labels, **options), MemorySource(files))
    return ShardReader(store, ref_of(record))


def quarantine_of(url: Path) -> list[dict]:
    return pq.read_table(url / "quarantine/train-000000.parquet").to_pylist()


class TestWriting:
    @pytest.mark.parametrize("labels", [None, [number % 12 for number in range(30)]])
    @pytest.mark.parametrize("ext", ["png", "bmp"])
    def test_the_tar_is_what_webdataset_writes_for_the_same_samples(self, tmp_path, labels, ext):
        files = {f"k{n:02d}.{ext}": encoded(image(n, side=4 + 7 * n), ext.upper()) for n in range(30)}
        reader = shard_of(tmp_path, files, labels)
        expected = io.BytesIO()
        with webdataset.TarWriter(expected, mtime=0, encoder=False) as writer:
            for number, (name, data) in enumerate(files.items()):
                writer.write({"__key__": name[:3], ext: data} | ({} if labels is None else {"cls": b"%d" % labels[number]}))
        assert (tmp_path / "shards/train-000000.tar").read_bytes() == expected.getvalue()
        assert [sample.members[ext] for sample in reader.iterate()] == list(files.values())

    def test_many_chunks_make_the_same_tar_as_one(self, tmp_path, monkeypatch):
        files = pictures(40)
        shard_of(tmp_path / "a", files)
        monkeypatch.setattr(pack_module, "CHUNK_BYTES", 3000)
        shard_of(tmp_path / "b", files)
        assert (tmp_path / "a/shards/train-000000.tar").read_bytes() == (tmp_path / "b/shards/train-000000.tar").read_bytes()

    def test_the_index_says_where_every_member_is(self, tmp_path):
        files = pictures(20)
        reader = shard_of(tmp_path, files, [3] * 10 + [-1] * 10, label_names=["c"] * 10 + [""] * 10, columns={"factor_x": np.arange(20.0)})
        assert reader.index.column_names == [*INDEX_SCHEMA.names, "factor_x"]
        assert reader.index.schema.field("label") == INDEX_SCHEMA.field("label")
        tar = (tmp_path / "shards/train-000000.tar").read_bytes()
        for number, row in enumerate(reader.index.to_pylist()):
            members = {member["ext"]: tar[member["offset"] : member["offset"] + member["size"]] for member in row["members"]}
            assert members == {"png": files[row["source"]]} | ({"cls": b"3"} if number < 10 else {})
            assert (row["ordinal"], row["label"], row["width"], row["mode"]) == (number + 7, 3 if number < 10 else None, 4, "L")
            assert row["factor_x"] == number and row["group"] is None and row["length"] is None

    def test_the_record_counts_what_the_manifest_sums_up(self, tmp_path):
        files = pictures(3) | {"j.jpg": encoded(image(1, 8), "JPEG"), "bad.png": b""}
        record = write_shard(open_store(tmp_path), task_of(list(files), [0, 0, 1, 1, 1]), MemorySource(files))
        assert (record.rows, record.quarantined) == (4, 1)
        assert record.detail["shapes"] == {"4x4x1/L": 3, "8x8x1/L": 1}
        assert record.detail["extensions"] == {"png": 3, "jpg": 1}
        assert record.detail["classes"] == {"0": 2, "1": 2}
        assert (record.detail["planned"], record.detail["first_ordinal"], record.detail["reasons"]) == (5, 7, {"empty": 1})
        assert json.loads((tmp_path / "records/train-000000.json").read_text())["detail"] == record.detail

    def test_a_rerun_returns_the_record_and_reads_nothing(self, tmp_path):
        files = pictures(5)
        record = write_shard(open_store(tmp_path), task_of(list(files)), MemorySource(files))
        assert write_shard(open_store(tmp_path), task_of(list(files)), MemorySource({})) == record

    def test_a_record_of_other_samples_is_refused_with_both_values(self, tmp_path):
        files = pictures(5)
        write_shard(open_store(tmp_path), task_of(list(files)), MemorySource(files))
        task = task_of(list(files)[:4])
        with pytest.raises(
            ConfigError, match=r"train-000000 is of other samples .*recorded .*'planned': 5.*planned .*'planned': 4.*another URL"
        ):
            write_shard(open_store(tmp_path), task, MemorySource(files))
        for other in ({"split": "val"}, {"ordinals": np.arange(5)}):
            with pytest.raises(ConfigError, match="'first_ordinal': 7"):
                write_shard(open_store(tmp_path), dataclasses.replace(task_of(list(files)), **other), MemorySource(files))

    @pytest.mark.parametrize("dtype", [np.int32, np.float32])
    @pytest.mark.parametrize("shards", [{"mode": "L"}, {"mode": "RGB"}, {"resize": 2, "pixels": 1}])
    def test_images_without_a_range_are_kept_or_quarantined_never_changed(self, tmp_path, dtype, shards):
        files = {"a.tif": encoded(np.linspace(0, 1, 16).reshape(4, 4).astype(dtype), "TIFF"), "b.png": encoded(image(1, 2))}
        assert shard_of(tmp_path / "kept", files).read_rows([0]) == [files["a.tif"]]
        assert len(shard_of(tmp_path / "changed", files, shards=ShardSpec(**shards))) == 1
        (bad,) = quarantine_of(tmp_path / "changed")
        assert (bad["source"], bad["reason"]) == ("a.tif", "unsupported") and "shards.mode=keep" in bad["message"]

    def test_sixteen_bits_are_scaled_to_eight(self, tmp_path):
        values = np.linspace(0, 65535, 16).reshape(4, 4).astype(np.uint16)
        for number, format in enumerate(("PNG", "TIFF")):
            reader = shard_of(
                tmp_path / format, {f"a.{'png' if number == 0 else 'tif'}": encoded(values, format)}, shards=ShardSpec(mode="L")
            )
            found = np.asarray(Image.open(io.BytesIO(reader.read_rows([0])[0])))
            np.testing.assert_array_equal(found, np.rint(values / 257))

    def test_arrays_are_stored_with_their_values(self, tmp_path):
        file = io.BytesIO()
        np.save(file, np.arange(6, dtype=np.float32).reshape(2, 3))
        reader = shard_of(tmp_path, {"a.npy": file.getvalue()})
        assert reader.read_rows([0]) == [file.getvalue()]
        assert reader.index.column("width").to_pylist() == [None]

    def test_a_task_is_picklable(self):
        task = task_of(["a.png"], [1])
        assert pickle.loads(pickle.dumps(task)).keys == task.keys


class TestQuarantine:
    def test_bad_samples_leave_holes_and_are_listed_with_a_reason(self, tmp_path):
        good = pictures(4)
        files = {**good, "empty.png": b"", "cut.png": encoded(image(9))[:-5], "text.png": b"hello"}
        names = ["empty.png", "k000.png", "k001.png", "cut.png", "k002.png", "text.png", "k003.png"]
        reader = shard_of(tmp_path, {name: files[name] for name in names})
        assert reader.index.column("ordinal").to_pylist() == [8, 9, 11, 13]
        rows = quarantine_of(tmp_path)
        assert [(row["key"], row["ordinal"], row["stage"], row["reason"]) for row in rows] == [
            ("empty", 7, "check", "empty"),
            ("cut", 10, "check", "truncated"),
            ("text", 12, "check", "decode"),
        ]
        assert list(rows[0]) == QUARANTINE_SCHEMA.names
        assert Counter(row["split"] for row in rows) == {"train": 3} and len(rows[1]["sha256"]) == 64
        reader.verify()

    def test_a_shard_of_bad_samples_alone_has_a_record_and_a_quarantine_and_no_tar(self, tmp_path):
        record = write_shard(open_store(tmp_path), task_of(["a.png", "b.png"]), MemorySource({"a.png": b"", "b.png": b"x"}))
        assert (record.rows, record.quarantined) == (0, 2)
        assert [ref.name for ref in record.files] == ["quarantine/train-000000.parquet"]
        assert not (tmp_path / "shards").exists()
        assert read_record(open_store(tmp_path), "train-000000") == record

    def test_an_error_of_the_output_is_no_bad_sample(self, tmp_path):
        class Full(LocalStore):
            def stage(self):
                raise StoreError("no space left")

        with pytest.raises(StoreError):
            write_shard(Full(tmp_path), task_of(["k000.png"]), MemorySource(pictures(1)))

    def test_a_tar_that_could_not_be_committed_does_not_bind_the_next_attempt(self, tmp_path):
        class Full(LocalStore):
            def put_staged(self, name: str, staged: Path, **options: str) -> FileRef:
                if name.endswith(".tar"):
                    raise StoreError("no space left")
                return super().put_staged(name, staged, **options)

        files = pictures(3)
        with pytest.raises(StoreError):
            write_shard(Full(tmp_path), task_of(list(files)), MemorySource({**files, "k001.png": b""}))
        assert write_shard(open_store(tmp_path), task_of(list(files)), MemorySource(files)).rows == 3

    @pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ENOENT, errno.ESTALE, errno.EMFILE, errno.ENOSPC, errno.ENOTCONN])
    def test_a_sample_that_cannot_be_read_is_no_bad_sample(self, tmp_path, code, monkeypatch):
        monkeypatch.setattr("aecore.store._again.FIRST_PAUSE_S", 0.001)

        class Away(MemorySource):
            def read(self, source: str) -> tuple[str, bytes]:
                if source == "k001.png":
                    raise OSError(code, os.strerror(code))
                return super().read(source)

        files = pictures(3)
        with pytest.raises(StoreError, match=rf"cannot read k001.png: {os.strerror(code)} \(tried 3 times\)"):
            write_shard(open_store(tmp_path), task_of(list(files)), Away(files))
        assert write_shard(open_store(tmp_path), task_of(list(files)), MemorySource(files)).rows == 3, "nothing was recorded"

    def test_a_mode_that_a_format_does_not_have_is_a_bad_sample_in_version_1(self, tmp_path):
        file = io.BytesIO()
        Image.fromarray(np.zeros((8, 8, 4), np.uint8), "CMYK").save(file, "TIFF")
        assert shard_of(tmp_path, {"a.tiff": file.getvalue(), **pictures(1)}, shards=ShardSpec(resize=4, pixels=1)).shard.samples == 1
        (row,) = quarantine_of(tmp_path)
        assert (row["stage"], row["reason"], len(row["sha256"])) == ("check", "unsupported", 64)

    def test_decode_finds_what_a_header_does_not_show(self, tmp_path):
        whole = encoded(np.zeros((64, 64), np.uint8), "BMP")
        files = {"a.bmp": whole, "b.bmp": whole[:200]}
        assert len(shard_of(tmp_path / "header", files)) == 2
        assert len(shard_of(tmp_path / "decode", files, shards=ShardSpec(check="decode"))) == 1
        assert quarantine_of(tmp_path / "decode")[0]["reason"] == "decode"

    def test_an_extension_that_is_not_allowed_is_never_stored(self, tmp_path):
        record = write_shard(open_store(tmp_path), task_of(["a.pkl"]), MemorySource({"a.pkl": b"x"}))
        assert record.rows == 0 and quarantine_of(tmp_path)[0]["reason"] == "extension"

    def test_a_misnamed_image_is_stored_under_the_extension_of_its_content(self, tmp_path):
        data = encoded(image(1, 8), "JPEG")
        reader = shard_of(tmp_path, {"a.png": data})
        assert [sample.members for sample in reader.iterate()] == [{"jpg": data}]
        assert reader.index.column("source").to_pylist() == ["a.png"]


class TestConversion:
    def stored(self, url: Path, files: dict[str, bytes], **shards: object) -> list[Image.Image]:
        reader = shard_of(url, files, shards=ShardSpec(**shards))
        return [Image.open(io.BytesIO(sample.data[1])) for sample in reader.iterate()]

    def test_bytes_are_kept_where_size_and_mode_are_right_already(self, tmp_path):
        files = {"a.png": encoded(image(1, 8)), "b.png": encoded(image(1, 6))}
        reader = shard_of(tmp_path, files, shards=ShardSpec(resize=8, mode="L"))
        assert reader.read_rows([0]) == [files["a.png"]]
        assert reader.index.column("width").to_pylist() == [8, 8]

    def test_formats_stay_and_other_ones_become_png(self, tmp_path):
        pixels = np.zeros((6, 9, 3), np.uint8)
        files = {
            f"{ext}.{ext}": encoded(pixels, format) for ext, format in [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP"), ("bmp", "BMP")]
        }
        found = self.stored(tmp_path, files, resize=4, mode="L")
        assert [(picture.format, picture.size, picture.mode) for picture in found] == [
            ("PNG", (4, 4), "L"),
            ("JPEG", (4, 4), "L"),
            ("PNG", (4, 4), "L"),
            ("PNG", (4, 4), "L"),
        ]

    def test_sixteen_bit_grey_is_scaled_and_not_clipped(self, tmp_path):
        ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
        (found,) = self.stored(tmp_path / "mode", {"a.png": encoded(ramp)}, mode="L")
        assert np.array_equal(np.asarray(found), np.rint(ramp / 257).astype(np.uint8))
        (found,) = self.stored(tmp_path / "size", {"a.png": encoded(ramp)}, resize=4)
        assert found.mode == "I;16" and np.ptp(np.asarray(found).astype(int)) > 40_000

    def test_two_runs_write_the_same_bytes(self, tmp_path):
        files = {"a.png": encoded(image(1, 9)), "b.jpg": encoded(image(2, 9), "JPEG")}
        first, second = (shard_of(tmp_path / name, files, shards=ShardSpec(resize=5, mode="RGB")) for name in "ab")
        assert first.shard == second.shard

    def test_arrays_cannot_be_resized(self, tmp_path):
        file = io.BytesIO()
        np.save(file, np.zeros(3))
        with pytest.raises(ConfigError, match=r"shards\.resize"):
            shard_of(tmp_path, {"a.npy": file.getvalue()}, shards=ShardSpec(resize=5))


class TestStrictReading:
    @pytest.fixture
    def reader(self, tmp_path):
        files = {**pictures(12), "bad.png": b""}
        return shard_of(tmp_path, files, [number % 3 for number in range(13)])

    def fresh(self, reader: ShardReader) -> ShardReader:
        return ShardReader(reader._store, reader.shard)

    @pytest.mark.parametrize("kind", ["tar", "index", "quarantine"])
    def test_every_flipped_bit_is_found(self, reader, tmp_path, kind):
        path = tmp_path / getattr(reader.shard, kind).name
        whole = path.read_bytes()
        random = np.random.default_rng(0)
        for bit in random.choice(8 * len(whole), 200, replace=False).tolist():
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(DataError, match="damaged"):
                self.fresh(reader).verify()
            if kind == "tar":  # without the hash of the whole file, too
                with pytest.raises(DataError, match="damaged"):
                    list(self.fresh(reader).iterate())
        path.write_bytes(whole)
        self.fresh(reader).verify()

    @pytest.mark.parametrize("kind", ["tar", "index", "quarantine"])
    def test_every_truncation_is_found(self, reader, tmp_path, kind):
        path = tmp_path / getattr(reader.shard, kind).name
        whole = path.read_bytes()
        for end in np.random.default_rng(1).choice(len(whole), 50, replace=False).tolist():
            path.write_bytes(whole[:end])
            with pytest.raises(DataError, match="truncated"):
                self.fresh(reader).verify()

    def test_a_file_cut_while_it_is_open_is_found(self, reader, tmp_path):
        path = tmp_path / reader.shard.tar.name
        reader.read_rows([0])
        os.truncate(path, 2000)
        with pytest.raises(DataError, match="'k011'"):
            reader.read_rows([11])
        with pytest.raises(DataError, match="damaged"):
            list(reader.iterate())

    def test_the_error_names_shard_and_key(self, reader, tmp_path):
        path = tmp_path / reader.shard.tar.name
        data = bytearray(path.read_bytes())
        offset = reader.index.column("members").to_pylist()[5][1]["offset"]
        data[offset] ^= 1
        path.write_bytes(data)
        for read in (lambda: list(self.fresh(reader).iterate()), lambda: self.fresh(reader).read_rows([4, 5])):
            with pytest.raises(DataError, match=r"train-000000\.tar is damaged at sample 'k005' \(row 5\)"):
                read()
        assert len(self.fresh(reader).read_rows([4, 6])) == 2

    def test_rows_come_in_the_order_asked(self, reader):
        files = list(pictures(12).values())
        assert reader.read_rows(np.array([7, 0, 7])) == [files[7], files[0], files[7]]
        assert reader.read_rows(np.array([], np.int64)) == []

    def test_large_samples_are_read_in_two_threads_and_damage_in_either_half_is_named(self, tmp_path):
        noise = np.random.default_rng(0).integers(0, 256, (300, 72, 72), np.uint8)
        reader = shard_of(tmp_path, {f"{number:03d}.png": encoded(pixels) for number, pixels in enumerate(noise)})
        rows = np.random.default_rng(1).permutation(300)
        assert sum(map(len, reader.read_rows(rows))) > PARALLEL_BYTES
        assert [np.asarray(Image.open(io.BytesIO(data))).tolist() for data in reader.read_rows(rows)] == noise[rows].tolist()
        tar = tmp_path / reader.shard.tar.name
        good = tar.read_bytes()
        for row in rows[10], rows[290]:
            member = reader.index["members"][int(row)].as_py()[0]
            at = member["offset"] + member["size"] // 2
            tar.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            with pytest.raises(DataError, match=f"damaged at sample '{row:03d}'"):
                self.fresh(reader).read_rows(rows)

    def test_windows_do_not_change_what_is_read(self, reader, monkeypatch):
        whole = list(reader.iterate())
        monkeypatch.setattr("aecore.data.read.shard_reader.WINDOW_BYTES", 3000)
        assert list(self.fresh(reader).iterate()) == whole == list(self.fresh(reader).iterate(verify=False))
        assert [sample.label for sample in whole] == [number % 3 for number in range(12)]

    def test_a_closed_reader_opens_again(self, reader):
        first = reader.read_rows([3])
        reader.close()
        reader.close()
        assert reader.read_rows([3]) == first

    def test_another_shards_index_is_refused(self, tmp_path):
        one, other = shard_of(tmp_path / "a", pictures(3)), shard_of(tmp_path / "b", pictures(4))
        mixed = ShardReader(other._store, ShardRef(**{**as_dict(other.shard), "index_content_sha256": one.shard.index_content_sha256}))
        with pytest.raises(DataError, match="does not hold the rows"):
            _ = mixed.index

    @pytest.mark.parametrize(
        ("column", "values", "message"),
        [
            ("sha256", pa.array(["a" * 128, "", "b" * 64]), "sha256 for every sample"),
            ("sha256", pa.array(["A" * 64] * 3), "sha256 for every sample"),
            ("key", pa.array(["a", None, "c"]), "rows without key"),
            ("ordinal", pa.array([0, None, 2]), "rows without ordinal"),
            ("members", pa.array([None] * 3, MEMBERS), "rows without members"),
            ("members", pa.array([[{"ext": "png", "offset": None, "size": 5}]] * 3, MEMBERS), "without extension, offset or size"),
            ("members", pa.array([1, 2, 3]), "'members' of type int64"),
            ("members", pa.array([[{"ext": "png", "offset": 512, "size": 1 << 40}], [], []], MEMBERS), "one data member per sample"),
            ("label", pa.array(["a", "b", "c"]), "'label' of type string"),
        ],
    )
    def test_an_index_that_cannot_be_right_is_refused_although_its_hashes_fit(self, tmp_path, column, values, message):
        reader = shard_of(tmp_path, pictures(3))
        wrong = reader.index.set_column(reader.index.column_names.index(column), column, values)
        reader.__dict__["index"] = wrong  # as if the manifest had named it
        with pytest.raises(DataError, match=message):
            list(reader.iterate())

    def test_an_index_of_a_longer_tar_is_refused(self, tmp_path):
        reader = shard_of(tmp_path, pictures(3))
        reader.__dict__["index"] = shard_of(tmp_path / "other", pictures(20)).index
        with pytest.raises(DataError, match="another size than the manifest"):
            reader.read_rows([0])

    def test_webdataset_reads_the_shard(self, reader, tmp_path):
        stream = io.BytesIO((tmp_path / reader.shard.tar.name).read_bytes())
        found = list(group_by_keys(tar_file_expander([{"url": "x.tar", "stream": stream}])))
        assert [(sample["__key__"], sample["png"]) for sample in found] == [
            (f"k{n:03d}", data) for n, data in enumerate(pictures(12).values())
        ]


def as_dict(shard: ShardRef) -> dict:
    return {name: getattr(shard, name) for name in ShardRef.__slots__}


class TestIndexContent:
    def test_the_content_hash_does_not_depend_on_how_parquet_or_arrow_hold_the_rows(self, tmp_path):
        reader = shard_of(tmp_path, pictures(10), [1] * 10, columns={"flag": np.arange(10) > 4})
        table, path = reader.index, tmp_path / "again.parquet"
        pq.write_table(table, path, compression="none", row_group_size=3, use_dictionary=True, version="1.0")
        sliced = pq.read_table(path).slice(0, 10).select(table.column_names[::-1])
        assert content_sha256(sliced) == content_sha256(table) == reader.shard.index_content_sha256

    def test_the_content_hash_sees_every_value(self, tmp_path):
        table = shard_of(tmp_path, pictures(4), [1, 2, -1, 0]).index
        hashes = {content_sha256(table), content_sha256(table.slice(1)), content_sha256(table.drop(["mode"]))}
        for name in ("key", "label", "members", "ordinal", "sha256", "width"):
            column = table.column(name)
            swapped = table.set_column(
                table.column_names.index(name), name, column.take([1, 0, 2, 3]) if name != "width" else column.take([0, 0, 0, None])
            )
            hashes.add(content_sha256(swapped))
        assert len(hashes) == 9

    def test_an_index_of_another_parquet_version_with_the_same_rows_is_taken_as_it_is(self, tmp_path):
        files = pictures(4)
        first = shard_of(tmp_path / "a", files)
        again = tmp_path / "b/shards/train-000000.parquet"
        again.parent.mkdir(parents=True)
        pq.write_table(
            first.index, again, compression="zstd", compression_level=9, write_statistics=["key", "ordinal"], write_page_checksum=True
        )
        version = pa.__version__.encode()
        again.write_bytes(again.read_bytes().replace(b"arrow version " + version, b"arrow version " + version.translate(SMALLER)))
        assert shard_of(tmp_path / "b", files).shard.index.bytes == again.stat().st_size
        pq.write_table(first.index.slice(1), again)
        (tmp_path / "b/records/train-000000.json").unlink()
        with pytest.raises(StoreError, match="other content"):
            shard_of(tmp_path / "b", files)


SMALLER = bytes.maketrans(b"123456789", b"012345678")
KILLED = """
import sys
from aecore.data.write.shard import pack_shard
from aecore.store import open_store
from tests.aecore.data.test_shard import MemorySource, pictures, task_of
files = {**pictures(20), "bad.png": b""}
pack_shard(open_store(sys.argv[1]), task_of(list(files)), MemorySource(files))()
"""


@pytest.mark.parametrize("fault", ["tar.linked", "quarantine.linked", "record.synced"])
def test_a_killed_writer_leaves_nothing_that_stops_the_next_one(tmp_path, fault):
    killed = run([*WARM, "-c", KILLED, tmp_path / "killed"], env={**os.environ, "AECORE_FAULT": fault})
    assert killed.returncode == -signal.SIGKILL
    files = {**pictures(20), "bad.png": b""}
    again, whole = shard_of(tmp_path / "killed", files), shard_of(tmp_path / "whole", files)
    assert again.shard == whole.shard
    again.verify()


def test_a_bad_sample_says_reason_and_message():
    assert str(BadSample("empty", "no bytes")) == "empty: no bytes"
