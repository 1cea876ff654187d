import io
import pickle

import numpy as np
import pytest
import webdataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from aecore.artifact.commit import commit_manifest
from aecore.data import as_webdataset
from aecore.data.dataset import Dataset, open_dataset
from aecore.data.manifest import STEM
from aecore.data.read.webdataset import decode_members
from aecore.data.sources.sprites import SpritesSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.plan import SplitSpec
from aecore.data.write.spec import ShardSpec
from aecore.errors import ConfigError, DataError
from tests.aecore.data.tiny import encoded, image, write, write_images


class Exploding:
    """Unpickling this writes a file: the proof that something executed."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def published(dataset: Dataset) -> str:
    commit_manifest(dataset.store, STEM, 0, dataset.manifest.to_json())
    return dataset.url


@pytest.fixture
def url(tmp_path):
    return published(write_images(tmp_path / "data", [5, 3, 4]))


def test_samples_are_decoded_and_come_in_shard_order(url):
    found = list(as_webdataset(url))
    assert [sample["__key__"] for sample in found] == [f"k{number}" for number in range(12)]
    for number, sample in enumerate(found):
        assert np.array_equal(sample["png"], image(number)[:, :, None]) and sample["png"].dtype == np.uint8
        assert sample["cls"] == number % 3


def test_without_decoding_it_gives_what_webdatasets_own_reader_gives(url):
    def theirs(path):
        with open(path, "rb") as stream:
            return list(group_by_keys(tar_file_expander([{"url": path, "stream": stream}])))

    shards = [f"{url}/shards/train-{number:06d}.tar" for number in range(3)]
    assert list(as_webdataset(url, decode=False)) == [sample for path in shards for sample in theirs(path)]


def test_webdatasets_own_stages_and_loader_work_on_it(url):
    batches = list(as_webdataset(url).shuffle(4, seed=1).to_tuple("png", "cls").batched(5))
    assert [batch[0].shape for batch in batches] == [(5, 4, 4, 1), (5, 4, 4, 1), (2, 4, 4, 1)]
    loader = webdataset.WebLoader(as_webdataset(url).to_tuple("cls"), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert sorted(label for (label,) in loader) == sorted(number % 3 for number in range(12))


def test_the_pipeline_travels_to_workers(url):
    assert len(list(pickle.loads(pickle.dumps(as_webdataset(url))))) == 12


def test_a_damaged_shard_gives_none_of_its_samples(url):
    path = f"{url}/shards/train-000001.tar"
    with open(path, "r+b") as file:
        file.seek(700)
        byte = file.read(1)[0]
        file.seek(700)
        file.write(bytes([byte ^ 4]))
    found = []
    with pytest.raises(DataError, match=r"train-000001\.tar is damaged"):
        found.extend(as_webdataset(url))
    assert all(sample["__key__"] in {f"k{number}" for number in range(5)} for sample in found)


@pytest.mark.parametrize("ext", ["pkl", "pickle", "pyd", "pth", "png.pkl"])
def test_pickled_members_are_refused_and_never_executed(tmp_path, ext):
    target = tmp_path / "executed"
    with pytest.raises(DataError, match="allowed: "):
        decode_members({"__key__": "a", "png": encoded(image(1)), ext: pickle.dumps(Exploding(str(target)))})
    assert not target.exists()


def test_object_arrays_are_refused(tmp_path):
    file, target = io.BytesIO(), tmp_path / "executed"
    np.save(file, np.array([Exploding(str(target))]), allow_pickle=True)
    with pytest.raises(DataError, match="numbers"):
        decode_members({"__key__": "a", "npy": file.getvalue()})
    assert not target.exists()


def test_text_and_numbers_are_decoded_by_extension():
    found = decode_members({"__key__": "a", "txt": "é".encode(), "json": b'{"a": 1}', "cls": b"7"})
    assert found == {"__key__": "a", "txt": "é", "json": {"a": 1}, "cls": 7}
    with pytest.raises(DataError, match="cls member of sample 'a'"):
        decode_members({"__key__": "a", "cls": b"cat"})


def test_arrays_keep_their_values(tmp_path):
    file = io.BytesIO()
    np.save(file, np.arange(6, dtype=np.float32).reshape(2, 3))
    (sample,) = as_webdataset(published(write(tmp_path, [[file.getvalue()]], ext="npy")))
    assert np.array_equal(sample["npy"], np.arange(6.0).reshape(2, 3)) and sample["npy"].dtype == np.float32


def test_commands_and_unknown_splits_are_refused(url):
    with pytest.raises(ConfigError, match="would run a command"):
        as_webdataset("pipe:cat /etc/passwd")
    with pytest.raises(DataError, match="'test'"):
        as_webdataset(url, split="test")


def test_hf_datasets_reads_the_shards_as_they_are(tmp_path):
    from datasets import load_dataset

    shard_dataset(SpritesSpec(num_samples=60), str(tmp_path / "out"), SplitSpec(), ShardSpec(max_samples=25))
    files = str(tmp_path / "out/shards/train-*.tar")
    rows = load_dataset("webdataset", data_files={"train": files}, split="train", cache_dir=str(tmp_path / "cache"))
    manifest = open_dataset(str(tmp_path / "out")).manifest
    assert len(rows) == manifest.num_samples("train") == 60
    assert rows[0]["png"].size == (32, 32)
    classes = sorted({int(row["cls"]) for row in rows.select_columns(["cls"])})
    assert classes == list(range(len(manifest.classes)))
