"""Files that are no samples: counted by what they are, with what to do with them."""

from aecore.data.format.record import DATA_EXTENSIONS
from aecore.data.sources._names import array_format
from aecore.data.sources._skipped import Skipped

_CONVERT = "convert them to PNG, TIFF or JPEG (for example `magick NAME NAME.png`)"
_RENDER = "render them to PNG (for example `magick NAME NAME.png`)"
_DEVELOP = "develop them to 16-bit TIFF or PNG (for example with rawpy or darktable-cli)"
_VOXELS = "save their voxels as .npy (numpy.save; read them with pydicom, nibabel or SimpleITK), or their slices as 16-bit PNG"
_TILES = "export their planes or tiles as TIFF or PNG (for example with bfconvert or openslide)"
_EXPORT = "save each sample as .npy, or many as the rows of one .npy or .npz (source.kind=arrays)"
_FRAMES = "extract their frames as PNG (for example `ffmpeg -i NAME %06d.png`), or save each clip as .npy"
_SEQUENCE = "save each as a sequence, a .npy of shape (steps, features)"
_TARS = "shard tars of samples by source.kind=webdataset, from a folder of their own; unpack others and give the folder"
_TABLE = (  # what they are, what to do, extensions
    ("archive(s)", "unpack them and give the folder", "zip 7z rar cab iso dmg jar"),
    ("tar(s)", _TARS, "tar tgz tar.gz tar.bz2 tbz2 tar.xz txz tar.zst"),
    ("compressed file(s)", "decompress them", "gz bz2 xz zst lz4 br z"),
    ("JPEG or PNG file(s) of another extension", "rename them to .jpg or .png", "jfif jif jpe pjpeg apng"),
    ("image(s) in formats that are not read", _CONVERT, "heic heif avif jp2 j2k jpf jpx jxl jxr wdp psd xcf tga pcx ppm pgm pbm pnm"),
    ("image(s) in formats that are not read", _CONVERT, "pfm hdr exr ico dds mng sgi ras qoi bpg flif btf"),
    ("camera raw file(s)", _DEVELOP, "dng cr2 cr3 nef arw orf rw2 raf pef srw raw"),
    ("vector graphic(s) or page(s)", _RENDER, "svg svgz pdf ps eps ai wmf emf"),
    ("medical image(s)", _VOXELS, "dcm dicom ima nii nii.gz mha mhd nrrd nhdr mnc img"),
    ("microscope or slide file(s)", _TILES, "czi nd2 lif lsm oib oif vsi svs ndpi mrxs scn bif stk zvi ims dv"),
    ("container(s) of arrays", _EXPORT, "h5 hdf5 hdf he5 mat nc nc4 cdf fits fit fts zarr rds rda root"),
    (
        "file(s) of records",
        "write their images as files in class folders, or their arrays as .npy",
        "parquet arrow feather avro orc tfrecord tfrecords rec lmdb mdb beton msgpack sqlite db duckdb",
    ),
    (
        "pickle(s) or checkpoint(s), never read, since reading runs what they hold",
        "save each sample as .npy (numpy.save)",
        "pkl pickle pck joblib dill pt pth ckpt bin safetensors onnx",
    ),
    ("video(s)", _FRAMES, "mp4 avi mov mkv webm mpg mpeg m4v wmv flv ogv"),
    ("audio file(s)", _SEQUENCE, "wav mp3 flac ogg oga opus m4a aac aiff aif au wma"),
    ("recording(s) or point cloud(s)", _SEQUENCE, "edf bdf gdf fif vhdr eeg vmrk dat hea mseed sac las laz ply pcd"),
    (
        "table(s) or text(s), of which none is a sample",
        "if they hold sequences or arrays, save each as .npy; of labels and metadata nothing is read",
        "csv tsv json jsonl ndjson txt xml yaml yml md rst html htm log toml ini cfg lst xls xlsx doc docx py ipynb sh",
    ),
)
_KINDS = {ext: (what, remedy) for what, remedy, extensions in _TABLE for ext in extensions.split()}
_IDX = ("file(s) of idx arrays", "shard them by source.kind=arrays")
_ARRAYS = ("array(s)", "source.extensions=EXTS takes each file as one sample, source.kind=arrays each row of its first axis")
_UPPER = ("array(s)", "source.extensions=EXTS takes each file as one sample; to take their rows rename them to .npy or .npz")
_PICTURES = "image(s)"
OF_SYSTEM, _OF_SYSTEM = "file(s) of the operating system", ("thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store")
_NAMELESS = ("file(s) without an extension", "give them the extension of what they are, if they are samples (.png, .jpg, .npy)")
_UNKNOWN = ("file(s) of unknown extensions", "convert them to PNG, TIFF or JPEG, or save each as .npy, if they are samples")


def is_of_system(name: str) -> bool:
    """Return whether a file or folder is metadata of Windows or macOS: `._0.jpg` holds attributes of `0.jpg`, no picture."""
    last = name[name.rfind("/") + 1 :]
    return last.startswith("._") or last.lower() in _OF_SYSTEM or ("__" in name and "__macosx" in name.lower().split("/"))


def kind_of_file(name: str) -> tuple[str, str]:
    """Return what a file that is no sample is, by its name (a plural), and what to do with it."""
    what, remedy = _kind(name)
    return what.replace("(s)", "s"), remedy


def _kind(name: str) -> tuple[str, str]:
    last = name.rpartition("/")[2].lower()
    if is_of_system(name):
        return OF_SYSTEM, ""
    if array_format(last) == "idx":
        return _IDX
    stem, dot, ext = last.rpartition(".")
    if not dot or not stem:
        return _NAMELESS
    double = f"{stem.rpartition('.')[2]}.{ext}"
    if double in _KINDS:
        return _KINDS[double]
    if ext in ("npy", "npz"):
        return _ARRAYS if name.endswith((".npy", ".npz")) else _UPPER
    if ext in DATA_EXTENSIONS:
        return _PICTURES, ""
    return _KINDS.get(ext, _UNKNOWN)


def unseen_part(path: str) -> str | None:
    """Return the file, or the first of its folders, that is hidden or of the operating system, so that nothing in it is a sample."""
    if "/." not in f"/{path}" and not is_of_system(path):  # nearly all
        return None
    parts = path.split("/")
    above = ("/".join(parts[: depth + 1]) for depth in range(len(parts)))
    return next(part for part in above if is_of_system(part) or part[part.rfind("/") + 1 :].startswith("."))


def skip_unseen(skipped: Skipped, part: str) -> None:
    """Count what `unseen_part` returned."""
    skipped.add(OF_SYSTEM if is_of_system(part) else "hidden file(s) or folder(s)", part)


def skip_file(skipped: Skipped, path: str, pictures: str = "add EXTS to source.extensions to take them too") -> None:
    """Count a file that is no sample here; `pictures` is what to do with images, which some sources read."""
    what, remedy = _kind(path)
    skipped.add(what, path, pictures if what == _PICTURES else remedy, ext=path.rpartition(".")[2].lower())
