"""Kinds of files that are no samples: how they are named, how they begin, what to do with them. ONE table; nothing is read or parsed."""

from typing import NamedTuple

Start = tuple[int, bytes, str]  # offset and bytes by which a file is known, and what it then is
GZIP, BZIP2, XZ, ZSTD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"  # how compressed files begin
PNG, JPEG, NPY = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\x93NUMPY"


class FileKind(NamedTuple):
    """A kind of files: what several of them are, what to do, their extensions (with blanks between them), how they begin.

    `{them}` and `{their}` in a remedy stand for one file or several (`remedy_for`).
    """

    what: str
    remedy: str
    extensions: str
    starts: tuple[Start, ...] = ()


IMAGES = FileKind(
    "image(s) in formats that are not read",
    "convert {them} to PNG, TIFF or JPEG (for example `magick NAME NAME.png`)",
    "heic heif avif jp2 j2k jpf jpx jxl jxr wdp psd xcf tga pcx ppm pgm pbm pnm pfm hdr exr ico dds mng sgi ras qoi bpg flif btf",
    (
        (0, b"8BPS", "a Photoshop file"),
        (0, b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 image"),
        (0, b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
        (0, b"\xff\x0a", "a JPEG XL image"),
        (0, b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image"),
        (0, b"v/1\x01", "an OpenEXR image"),
        (0, b"#?RADIANCE", "a Radiance HDR image"),
        (0, b"\0\0\x01\0", "an icon (ICO)"),
        (0, b"DDS ", "a DDS texture"),
        (0, b"qoif", "a QOI image"),
    ),
)
DRAWINGS = FileKind(
    "vector graphic(s) or page(s)",
    "render {them} to PNG (for example `magick NAME NAME.png`)",
    "svg svgz pdf ps eps ai wmf emf",
    ((0, b"%PDF", "a PDF document"), (0, b"%!PS", "a PostScript document")),
)
VIDEOS = FileKind(
    "video(s)",
    "extract {their} frames as PNG (for example `ffmpeg -i NAME %06d.png`), or save each clip as .npy",
    "mp4 avi mov mkv webm mpg mpeg m4v wmv flv ogv",
    ((8, b"AVI ", "an AVI video"), (0, b"\x1a\x45\xdf\xa3", "a Matroska or WebM video")),
)
_SEQUENCE = "save each as a sequence, a .npy of shape (steps, features)"
TABLE = (
    FileKind(
        "archive(s)",
        "unpack {them} and give the folder",
        "zip 7z rar cab iso dmg jar",
        (
            (0, b"PK\x03\x04", "a zip archive (or a document that is one)"),
            (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
            (0, b"Rar!", "a rar archive"),
        ),
    ),
    FileKind(
        "tar(s)",
        "shard tars of samples by source.kind=webdataset, from a folder of their own; unpack others and give the folder",
        "tar tgz tar.gz tar.bz2 tbz2 tar.xz txz tar.zst",
        ((257, b"ustar", "a tar"),),
    ),
    FileKind(
        "compressed file(s)",
        "decompress {them}",
        "gz bz2 xz zst lz4 br z",
        ((0, GZIP, "gzip'ed"), (0, BZIP2, "bzip2'ed"), (0, XZ, "xz'ed"), (0, ZSTD, "compressed by zstd")),
    ),
    FileKind("JPEG or PNG file(s) of another extension", "rename {them} to .jpg or .png", "jfif jif jpe pjpeg apng"),
    FileKind("", "name {them} .png", "", ((0, PNG, "a PNG image"),)),  # these are read: only another name is in the way
    FileKind("", "name {them} .jpg", "", ((0, JPEG, "a JPEG image"),)),
    FileKind("", "name {them} .npy and set source.extensions=[npy]", "", ((0, NPY, "a .npy array"),)),
    IMAGES,
    FileKind(
        "camera raw file(s)",
        "develop {them} to 16-bit TIFF or PNG (for example with rawpy or darktable-cli)",
        "dng cr2 cr3 nef arw orf rw2 raf pef srw raw",
        ((0, b"FUJIFILM", "a camera raw file"),),
    ),
    DRAWINGS,
    FileKind(
        "medical image(s)",
        "save {their} voxels as .npy (numpy.save; read {them} with pydicom, nibabel or SimpleITK), or {their} slices as 16-bit PNG",
        "dcm dicom ima nii nii.gz mha mhd nrrd nhdr mnc img",
        ((128, b"DICM", "a DICOM file"), (344, b"n+1\0", "a NIfTI volume"), (344, b"ni1\0", "a NIfTI volume")),
    ),
    FileKind(
        "microscope or slide file(s)",
        "export {their} planes or tiles as TIFF or PNG (for example with bfconvert or openslide)",
        "czi nd2 lif lsm oib oif vsi svs ndpi mrxs scn bif stk zvi ims dv",
    ),
    FileKind(
        "container(s) of arrays",
        "save each sample as .npy, or many as the rows of one .npy or .npz (source.kind=arrays)",
        "h5 hdf5 hdf he5 mat nc nc4 cdf fits fit fts zarr rds rda root",
        (
            (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
            (0, b"CDF\x01", "a NetCDF file"),
            (0, b"MATLAB 5.0 MAT-file", "a MATLAB file"),
            (0, b"SIMPLE  =", "a FITS file"),
        ),
    ),
    FileKind(
        "file(s) of records",
        "write {their} images as files in class folders, or {their} arrays as .npy",
        "parquet arrow feather avro orc tfrecord tfrecords rec lmdb mdb beton msgpack sqlite db duckdb",
        ((0, b"PAR1", "a Parquet file"), (0, b"ARROW1", "an Arrow file"), (0, b"SQLite format 3\0", "an SQLite database")),
    ),
    FileKind(
        "pickle(s) or checkpoint(s), never read, since reading runs what they hold",
        "save each sample as .npy (numpy.save)",
        "pkl pickle pck joblib dill pt pth ckpt bin safetensors onnx",
        ((0, b"\x80\x04\x95", "a pickle, which is never read, since reading runs what it holds"),),
    ),
    VIDEOS,
    FileKind(
        "audio file(s)",
        _SEQUENCE,
        "wav mp3 flac ogg oga opus m4a aac aiff aif au wma",
        (
            (8, b"WAVE", "a WAV recording"),
            (0, b"OggS", "audio or video (Ogg)"),
            (0, b"ID3", "an MP3"),
            (0, b"fLaC", "a FLAC recording"),
        ),
    ),
    FileKind("recording(s) or point cloud(s)", _SEQUENCE, "edf bdf gdf fif vhdr eeg vmrk dat hea mseed sac las laz ply pcd"),
    FileKind(
        "table(s) or text(s), of which none is a sample",
        "if they hold sequences or arrays, save each as .npy; of labels and metadata nothing is read",
        "csv tsv json jsonl ndjson txt xml yaml yml md rst html htm log toml ini cfg lst xls xlsx doc docx py ipynb sh",
    ),
)


def remedy_for(kind: FileKind, *, one: bool) -> str:
    """Return what to do with one file of a kind, or with several."""
    return kind.remedy.format(them="it" if one else "them", their="its" if one else "their")
