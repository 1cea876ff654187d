"""Small files that would take gigabytes or minutes are refused by name, in bounded memory and time, before they are expanded."""

import gzip
import hashlib
import json
import os
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aecore.data.format.index import MEMBERS
from aecore.data.format.parquet import footer_sha256, open_parquet
from aecore.store import sha256_json
from tests.aecore.data.tiny import encoded, image
from tests.aecore.encoding import encode, saved_run, sprites_dataset
from tests.documents import content, rewrite
from tests.processes import WARM, run

MOST_BYTES, MOST_S = 2 << 30, 20.0
ROWS = 30_000_000
CHILD = """
import json, resource, sys, time
from pathlib import Path
from aecore.data.format.bad_sample import BadSample

from aecore.errors import AecoreError
{imports}
path = sys.argv[1]
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + {most}, resource.RLIM_INFINITY))
began, said = time.process_time(), "nothing was refused"
try:
    {call}
except (AecoreError, BadSample) as error:
    said = type(error).__name__ + ": " + str(error)
seconds = time.process_time() - began
kilobytes = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])  # ru_maxrss counts the parent before exec, too
print(json.dumps([said, seconds, kilobytes << 10]))
"""


def refused(imports: str, call: str, path: Path | str) -> str:
    """Return class and message of the error of `call` in a process that may take 2 GB and 20 s of processor time."""
    code = CHILD.format(imports=imports, call=call, most=MOST_BYTES)
    done = run([*WARM, "-c", code, path], check=True, timeout_s=240)
    said, seconds, num_bytes = json.loads(done.stdout.splitlines()[-1])
    assert seconds < MOST_S and num_bytes < MOST_BYTES, (said, seconds, num_bytes)
    return str(said)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset, model and table; read only."""
    root = tmp_path_factory.mktemp("bombs")
    dataset, model = sprites_dataset(root / "dataset", 40), saved_run(root / "run")
    encode(model, dataset, root / "table")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy of `made` that may be changed; its table names the dataset of `made`."""
    return Path(shutil.copytree(made, tmp_path / "root"))


def zeros(size: int) -> bytes:
    """Return `size` zero bytes as a raw deflate stream, a thousandth of them: 64 MiB of them, again and again."""
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = pack.compress(bytes(64 << 20)) + pack.flush(zlib.Z_FULL_FLUSH)
    return piece * (size >> 26) + pack.flush()


class TestArrays:
    LISTING = "from aecore.data.sources.arrays import ArraysSource, ArraysSpec", "ArraysSource(ArraysSpec(url=path)).listing()"

    @pytest.mark.parametrize("version", [1, 2, 3])
    @pytest.mark.parametrize(
        "header",
        [
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (4, 2, 2" + b", 1" * 7_000_000 + b"), }",
            b"(" * 60_000,
            b"-" * 9_000 + b"1",
            b"[" * 100 + b"]" * 100,
            b"{'descr': [" + b"('a', [" * 30 + b"('a', '|u1')" + b"])" * 30 + b"], 'fortran_order': False, 'shape': (4,), }",
        ],
        ids=["20 MB", "brackets", "signs", "deep", "deep fields"],
    )
    def test_a_header_of_an_npy_that_is_long_or_deep(self, tmp_path: Path, version: int, header: bytes) -> None:
        size = struct.pack("<H", min(len(header), 65535)) if version == 1 else struct.pack("<I", len(header))
        (tmp_path / "a.npy").write_bytes(b"\x93NUMPY" + bytes([version, 0]) + size + header)
        assert "a.npy has a damaged .npy header" in refused(*self.LISTING, tmp_path)

    def test_a_member_of_an_npz_that_inflates_to_gigabytes(self, tmp_path: Path, made: Path) -> None:
        npz_of_zeros(tmp_path / "z.npz", 3 << 30)
        message = r"z.npz (array 'z') inflates to 3221225472 bytes, more than 1073741824 bytes, expected from "
        assert message in refused(*self.LISTING, tmp_path)
        latents = "from aecore.sampling import DecodeSpec, decode_run"
        assert message in refused(latents, f"decode_run({str(made / 'run')!r}, path, path + '.out', DecodeSpec())", tmp_path / "z.npz")

    def test_an_idx_file_that_inflates_to_gigabytes(self, tmp_path: Path) -> None:
        header = b"\0\0\x08\x03" + struct.pack(">III", 3, 1 << 15, 1 << 15)
        stream = zlib.compressobj(9, zlib.DEFLATED, 31)
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(stream.compress(header + bytes(1 << 20)) + stream.flush())
        assert "inflates to 3221225488 bytes, more than" in refused(*self.LISTING, tmp_path)

    def test_what_does_not_fit_the_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from aecore.data.sources._inflate import InflateLimit
        from aecore.errors import StoreError

        limit = InflateLimit.of(1, 1 << 60, "source.max_inflated_bytes")
        with pytest.raises(StoreError, match=r"a.npz inflates to \d+ bytes, more than the \d+ bytes that are free in .* \(TMPDIR\)"):
            limit.require(1 << 60, f"a.npz inflates to {1 << 60} bytes,")


def npz_of_zeros(path: Path, size: int) -> None:
    """Write an archive of one array `z.npy` of `size` bytes, of which only the header is not zero."""
    name, packed = b"z.npy", zeros(size)
    common = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0x21, 0, len(packed), size, len(name), 0)
    local = b"PK\3\4" + common + name + packed
    entry = b"PK\1\2" + b"\x14\0" + common + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name
    path.write_bytes(local + entry + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), len(local), 0))
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("z.npy").file_size == size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tar of 1.3 MB that inflates to 1.25 GiB."""
    folder = tmp_path_factory.mktemp("tars")
    (folder / "a.tar.gz").write_bytes(gzip.compress(bytes(64 << 20)) * 20)
    return folder


class TestTars:
    def test_a_source(self, folder: Path) -> None:
        imports = "from aecore.data.sources.webdataset import WebdatasetSource, WebdatasetSpec"
        said = refused(imports, "WebdatasetSource(WebdatasetSpec(url=path)).listing()", folder)
        assert said.startswith("DataError") and re.search(r"a\.tar\.gz inflates to more than \d+ bytes", said)
        assert "set source.max_inflated_bytes, or unpack it first, if that is right" in said

    def test_a_run_that_trains_on_them(self, folder: Path) -> None:
        smaller = "import aecore.data.sources._inflate as limits; limits.ALLOWED_BYTES = 1 << 26"  # what all may inflate to is above
        said = refused(f"from aecore.data.read.stream import open_stream; {smaller}", "open_stream(path, 'train')", folder)
        assert said.startswith("DataError") and said.endswith("compressed ones: unpack it first if that is right")
        assert re.search(r"a\.tar\.gz inflates to more than \d+ bytes", said)


def rows_of_one_value(path: Path, **columns: pa.DataType) -> None:
    """Write 30 million equal rows: a few bytes for each million."""
    million = ROWS // 30
    table = pa.table({name: pa.array(np.zeros(million, np.int8)).cast(kind) for name, kind in columns.items()})
    with pq.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=True) as file:
        for _ in range(30):
            file.write_table(table)


def one_long_text(path: Path) -> None:
    """Write 10,000 rows of one text of 32 MiB: once in the dictionary."""
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10_000, np.int32)), pa.array(["x" * (32 << 20)]))
    table = pa.table({"key": [str(row) for row in range(10_000)], "group": text})
    pq.write_table(table, path, compression="zstd", use_dictionary=["group"], dictionary_pagesize_limit=1 << 30, write_statistics=False)


def long_texts(path: Path) -> None:
    """Write 20 rows, each with a text of 16 MiB of one letter."""
    pq.write_table(pa.table({"key": ["x" * (16 << 20)] * 20}), path, compression="zstd", use_dictionary=False, write_statistics=False)


def one_long_list(path: Path) -> None:
    """Write one row of four million members."""
    count = 4_000_000
    fields = [pa.array(np.zeros(count, np.int8)).cast(field.type) for field in MEMBERS.value_type]
    lists = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.StructArray.from_arrays(fields, fields=list(MEMBERS.value_type)))
    pq.write_table(pa.table({"key": ["a"], "members": lists}), path, compression="zstd")


def wide_vectors(path: Path) -> None:
    """Write 1,000 rows of 100,000 zeros each."""
    values = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(100_000_000, np.float32)), 100_000)
    pq.write_table(pa.table({"key": [str(row) for row in range(1000)], "mu": values}), path, compression="zstd", use_dictionary=True)


class TestParquet:
    @pytest.mark.parametrize(
        ("write", "rows", "message"),
        [
            (lambda path: rows_of_one_value(path, key=pa.string()), ROWS, "states 30000000 rows in .* expected at most 8 in a byte"),
            (lambda path: rows_of_one_value(path, key=pa.string()), 20, "has 30000000 rows, the manifest says 20"),
            (one_long_text, 10_000, "its texts would take 335544\\d+ bytes, expected at most"),
            (long_texts, 20, "its texts would take 335544\\d+ bytes, expected at most"),
            (one_long_list, 1, "its column members.* states 4000000 values, expected at most 64 in 1 rows"),
            (wide_vectors, 1000, "its numbers would take 400000000 bytes, expected at most"),
        ],
        ids=["rows", "other rows", "a text", "texts", "a list", "vectors"],
    )
    def test_a_file_that_would_take_far_more_than_its_size(
        self, tmp_path: Path, write: Callable[[Path], None], rows: int, message: str
    ) -> None:
        write(tmp_path / "a.parquet")
        assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
        for source in (tmp_path / "a.parquet", pa.py_buffer((tmp_path / "a.parquet").read_bytes())):
            with pytest.raises(ValueError, match=message):
                open_parquet(source, rows)

    def test_large_dictionaries_of_real_data_are_read(self, tmp_path: Path) -> None:
        """A column of groups, of which the pages alone would let it be as large as the product of rows and dictionary."""
        groups = [f"group-{hashlib.sha256(b'%d' % (row // 5)).hexdigest()}" for row in range(60_000)]
        pq.write_table(pa.table({"group": groups}), tmp_path / "a.parquet", dictionary_pagesize_limit=1 << 30)
        assert open_parquet(tmp_path / "a.parquet", 60_000).read()["group"].to_pylist() == groups

    @pytest.mark.parametrize("agrees", [True, False])
    def test_the_index_of_a_shard(self, root: Path, agrees: bool) -> None:
        manifest, data = root / "dataset/dataset.000001.json", content(root / "dataset/dataset.000001.json")
        shards = data["shards"]
        path = root / "dataset" / shards[0]["index"]["name"]
        rows_of_one_value(path, key=pa.string(), ordinal=pa.int64())
        shards[0]["index"] |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        if agrees:
            more, split = ROWS - shards[0]["samples"], shards[0]["split"]
            shards[0] |= {"samples": ROWS, "planned": ROWS}
            for shard in shards[1:]:
                shard["first_ordinal"] += more if shard["split"] == split else 0
            data["statistics"][split]["samples"] += more
            data["sample"] = {name: {text: count + more for text, count in counts.items()} for name, counts in data["sample"].items()}
        rewrite(manifest, **data)
        imports = "from aecore.data.dataset import open_dataset; from aecore.data.read.verify import verify_dataset"
        said = refused(imports, "said = str(verify_dataset(open_dataset(path), read_data=True).problems)", root / "dataset")
        assert ("expected at most 8 in a byte" if agrees else "it has 30000000 rows, the manifest says") in said
        call = "data = open_dataset(path); data.reader(data.manifest.shards[0]).read_rows([0])"
        assert refused(imports, call, root / "dataset").startswith("DataError")

    @pytest.mark.parametrize("agrees", [True, False])
    def test_a_part_of_a_table(self, root: Path, agrees: bool) -> None:
        parts = content(root / "table/table.000001.json")["parts"]
        path = root / "table" / parts[0]["file"]["name"]
        metadata = pq.read_schema(path).metadata
        million = pa.table({name: pa.array(np.zeros(1_000_000, np.int8)).cast(pa.string()) for name in ("key", "shard")})
        million = million.append_column("ordinal", pa.array(np.zeros(1_000_000, np.int64))).replace_schema_metadata(metadata)
        with pq.ParquetWriter(path, million.schema, compression="zstd") as file:
            for _ in range(30):
                file.write_table(million)
        parts[0]["file"] |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        with path.open("rb") as file:
            parts[0]["footer_sha256"] = footer_sha256(file)
        if agrees:
            parts[0] |= {"rows": ROWS, "row_stop": ROWS}
        rewrite(root / "table/table.000001.json", parts=parts, num_rows=sum(part["rows"] for part in parts))
        imports = "from aecore.table.table import open_table; from aecore.table.verify import verify_table"
        said = refused(imports, "verify_table(open_table(path), read_data=True)", root / "table")
        assert said.startswith("DataError")
        assert ("expected at most 8 in a byte" if agrees else "it has 30000000 rows, the manifest says") in said
        assert refused(imports, "open_table(path).keys", root / "table").startswith("DataError")

    def test_vectors_of_another_length_than_the_manifest_says(self, root: Path) -> None:
        path, imports = root / "table/table.000001.json", "from aecore.table.table import open_table"
        for dim, message in ((1 << 30, "a dim up to 16,777,216 or null"), (1 << 24, "column 'mu' is of type fixed_size_list")):
            data = content(path)
            data["columns"]["mu"]["dim"] = data["identity"]["columns"]["mu"]["dim"] = dim
            claim = {"table": data["identity"], "dataset_sha256": data["lineage"]["dataset"]["sha256"]}
            rewrite(path, **{**data, "claim_sha256": sha256_json(claim)})
            assert message in refused(imports, "open_table(path).numpy('mu')", root / "table")


class TestImages:
    HEADER = "from aecore.data.format.image import image_header"

    @pytest.mark.parametrize("ext", ["webp", "png", "tiff", "bmp", "gif"])
    def test_a_size_of_gigapixels_is_refused_by_the_header(self, tmp_path: Path, ext: str) -> None:
        (tmp_path / f"a.{ext}").write_bytes(dict(gigapixels())[ext])
        said = refused(self.HEADER, f"image_header(Path(path).read_bytes(), {ext!r})", tmp_path / f"a.{ext}")
        assert said.startswith("BadSample: too_large: image of ") or said.endswith("(DecompressionBombError)")
        decoding = "from aecore.data.format.decode import Decoder, Reading; from aecore.data.format.sample_format import SampleFormat"
        call = "Decoder(Reading('imagecodecs'), SampleFormat.parse('4x4x3/RGB')).batch([Path(path).read_bytes()])"
        assert refused(decoding, call, tmp_path / f"a.{ext}").startswith("DecodeError")

    def test_a_format_that_pillow_gives_to_another_program_is_not_decoded(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n")
        decoding = "from aecore.data.format.decode import Decoder, Reading; from aecore.data.format.sample_format import SampleFormat"
        call = "Decoder(Reading('pillow'), SampleFormat.parse('4x4x3/RGB')).batch([Path(path).read_bytes()])"
        assert "UnidentifiedImageError" in refused(decoding, call, tmp_path / "a.png")


def gigapixels() -> Iterator[tuple[str, bytes]]:
    """Yield extension and bytes of small files whose headers state 50,000 x 50,000 pixels."""
    side = 50_000
    chunk = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (side - 1).to_bytes(3, "little") * 2
    chunk += b"ALPH" + struct.pack("<I", 2) + b"\0\0" + b"VP8L" + struct.pack("<I", 6) + b"\x2f" + bytes(5)
    yield "webp", b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk
    parts = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(1 << 20))), (b"IEND", b"")]
    yield (
        "png",
        b"\x89PNG\r\n\x1a\n"
        + b"".join(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts),
    )
    tags = [(256, 4, side), (257, 4, side), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 4, side), (279, 4, 9)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    yield "tiff", b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)
    yield "bmp", b"BM" + struct.pack("<IIIIiiHHIIiiII", 60, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(6)
    yield "gif", b"GIF89a" + struct.pack("<HHBBB", side, side, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x00;"


class TestYaml:
    PARSE = "from pipelines.recipe.yaml import read_recipe", "read_recipe(path)"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "a: &a [x, x]\n"
                + "".join(f"{c}: &{c} [{', '.join([f'*{b}'] * 9)}]\n" for b, c in zip("abcdefgh", "bcdefghi", strict=True)),
                "anchor or alias 'a'",
            ),
            ("[" * 100_000, "nested more than 32 levels"),
            ("- " * 100_000, "nested more than 32 levels"),
            ("{a: " * 60_000, "nested more than 32 levels"),
            ("a: [" + "1," * 100_000 + "]", "more than 10000 values"),
            ("a: 1\n" * 10 + "".join(f"k{n}: 1\n" for n in range(20_000)), "more than 10000 values"),
            ("a: " + "x" * 100_000_000, "has more than 262144 bytes"),
            ("a: " + "9" * 200_000, "is YAML, but not plain data"),
        ],
        ids=["aliases", "brackets", "dashes", "braces", "list", "keys", "size", "digits"],
    )
    def test_a_recipe(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "a.yaml").write_text(text)
        said = refused(*self.PARSE, tmp_path / "a.yaml")
        assert said.startswith("ConfigError") and message in said

    def test_an_override(self) -> None:
        imports = "from pipelines.recipe.recipe import load_recipe"
        said = refused(imports, "load_recipe(None, ['backbone.hidden=[' + '1,' * 100_000 + ']'])", "")
        assert said.startswith("ConfigError: the value of backbone.hidden is not valid YAML: it has more than 10000 values")


class TestDocuments:
    @pytest.mark.parametrize(("name", "size"), [("run.000001.json", 1 << 25), ("dataset.000001.json", 1 << 33)])
    def test_a_file_of_gigabytes_is_not_read(self, root: Path, name: str, size: int) -> None:
        os.truncate(root / "dataset" / name, size)  # a hole takes no room
        imports = "from aecore.artifact.documents import read_json; from aecore.store import open_store"
        said = refused(imports, f"read_json(open_store(path), {name!r})", root / "dataset")
        assert said.startswith("DataError") and f"{name} has {size} bytes, expected at most" in said

    @pytest.mark.parametrize("depth", [60, 70, 900, 1_000_000])
    def test_a_file_that_is_nested_deep(self, tmp_path: Path, depth: int) -> None:
        (tmp_path / "run.000001.json").write_bytes(b'{"a":' + b"[" * depth + b"]" * depth + b"}")
        imports = "from aecore.artifact.documents import read_json; from aecore.store import open_store"
        said = refused(imports, "read_json(open_store(path), 'run.000001.json')", tmp_path)
        assert said.startswith("DataError") and ("levels deep" in said or "nested too deep" in said) == (depth > 60)

    def test_a_device_has_no_end(self, tmp_path: Path) -> None:
        (tmp_path / "run.000001.json").symlink_to("/dev/zero")
        imports = "from aecore.artifact.documents import read_json; from aecore.store import open_store"
        assert "is a pipe, a device or a folder" in refused(imports, "read_json(open_store(path), 'run.000001.json')", tmp_path)

    def test_nested_json_in_a_sample(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"[" * 1_000_000)
        call = "decode_members({'__key__': 'a', 'json': Path(path).read_bytes()})"
        assert "the json member of sample 'a' cannot be decoded" in refused(
            "from aecore.data.read.webdataset import decode_members", call, tmp_path / "a"
        )


class TestHugeSamples:
    SHARD = (
        "import os, pyarrow.parquet as pq\n"
        "from aecore.data.write.job import shard_dataset, adopt_shards\n"
        "from aecore.data.write.spec import ShardSpec\n"
        "from aecore.data.sources.folder import FolderSpec\n"
        "from aecore.data.sources.webdataset import WebdatasetSpec\n"
        "from aecore.errors import DataError\n"
        "def report(make, source, out):\n"
        "    made = make(source, out, shards=ShardSpec(max_bad=0.5))\n"
        "    rows = [row for name in os.listdir(out + '/quarantine') for row in pq.read_table(f'{out}/quarantine/{name}').to_pylist()]\n"
        '    raise DataError(f\'{made.num_samples()} good; {[(row[k]) for row in rows for k in ("source", "reason", "sha256")]}\')'
    )

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Three images and 50 GB of nothing."""
        folder = tmp_path / "in"
        folder.mkdir()
        for number in range(3):
            (folder / f"{number}.png").write_bytes(encoded(image(number)))
        (folder / "huge.png").touch()
        os.truncate(folder / "huge.png", 50 << 30)
        return folder

    def test_a_huge_file_is_quarantined_by_name_and_never_read(self, folder: Path) -> None:
        said = refused(self.SHARD, "report(shard_dataset, FolderSpec(url=path), path + '-out')", folder)
        assert said == "DataError: 3 good; ['huge.png', 'too_large', None]"

    @pytest.mark.parametrize(
        ("make", "size"),
        [("shard_dataset", 9 << 30), ("adopt_shards", 64 << 20), pytest.param("adopt_shards", 9 << 30, marks=pytest.mark.long)],
    )
    def test_so_is_a_huge_member_of_a_tar(self, folder: Path, tmp_path: Path, make: str, size: int) -> None:
        limit = f"\nimport aecore.data.write.pack as pack; pack.MAX_MEMBER_BYTES = min(pack.MAX_MEMBER_BYTES, {size - 1})"
        tars = tmp_path / "tars"
        tars.mkdir()
        with tarfile.open(tars / "a.tar", "w") as tar:
            for number in range(3):
                tar.add(folder / f"{number}.png", f"{number}.png")
            header = tarfile.TarInfo("huge.png")
            header.size = size  # adopting hashes all of it
            assert tar.fileobj is not None
            tar.fileobj.write(header.tobuf(tarfile.GNU_FORMAT))
            end = tar.fileobj.tell() + header.size
        os.truncate(tars / "a.tar", end + 1024)
        said = refused(self.SHARD + limit, f"report({make}, WebdatasetSpec(url=path), path + '-out')", tars)
        assert said == f"DataError: 3 good; ['a.tar#{end - header.size}+{header.size}#huge.png', 'too_large', None]"

    def test_a_file_that_grew_to_be_huge_is_an_error_that_names_it(self, folder: Path) -> None:
        call = "FolderSource(FolderSpec(url=path)).read('huge.png')"
        said = refused("from aecore.data.sources.folder import FolderSource, FolderSpec", call, folder)
        assert said.startswith(f"DataError: {folder}/huge.png has grown to {50 << 30} bytes")

    def test_a_tar_of_nothing_but_a_hole_takes_no_time(self, tmp_path: Path) -> None:
        (tmp_path / "a.tar").touch()
        os.truncate(tmp_path / "a.tar", 50 << 30)
        said = refused(
            "from aecore.data.sources.webdataset import WebdatasetSource, WebdatasetSpec",
            "WebdatasetSource(WebdatasetSpec(url=path)).listing()",
            tmp_path,
        )
        assert "holds no sample in 1 tar (they are empty)" in said

    def test_a_sample_for_which_there_is_no_memory_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in/large.png").touch()
        os.truncate(tmp_path / "in/large.png", 1 << 30)  # of the 2 GB that there are, three times that are needed
        said = refused(self.SHARD, "report(shard_dataset, FolderSpec(url=path), path + '-out')", tmp_path / "in")
        assert "not enough memory here (for 'large.png' of 1073741824 bytes)" in said
