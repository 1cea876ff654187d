"""How fast an epoch from shards is, against the same loop on data in RAM, webdataset's loader and a folder of images; one torch thread.

"Decoded anew" reads and decodes every sample in every epoch; "RAM cache" is the default for a split that fits `input.cache_bytes`,
from its second epoch on. webdataset runs its WebLoader, the folder torch's DataLoader, both with Pillow and in this process
(their worker processes do not help on 2 cores). `reading` takes the bytes alone.
"""

import functools
import io
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from aecore.data.dataset import Dataset, open_dataset
from aecore.data.read.loader import InputSpec, Loader
from aecore.data.read.order import TrainingOrder
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from tests.benchmarks.pairs import HEADER, compare
from tests.realdata import unpack

MNIST_IMAGES, JPEG_IMAGES, BATCH, PAIRS = 10_000, 3_000, 256, 5
JPEG_STEPS = 12  # a 256x256 step takes long: the first steps of an epoch stand for it

Epoch = Callable[[], Iterable[Tensor]]  # uint8 batches [n, C, H, W] of one epoch


def make_folder(kind: str, images: int, root: Path) -> Path:
    """Real images as class folders below `root`: MNIST as it is, or CIFAR-10 enlarged to 256x256 and saved as JPEG."""
    if kind == "mnist":
        return unpack("mnist", root / "mnist", train_per_class=images // 10, test_per_class=1)
    small = unpack("cifar10", root / "cifar10", train_per_class=images // 10, test_per_class=1)
    for path in small.glob("train/*/*"):
        target = root / "jpeg256" / path.relative_to(small)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("RGB").resize((256, 256), Image.Resampling.BICUBIC).save(target, quality=90)
    return root / "jpeg256"


def in_ram(dataset: Dataset, batch: int) -> Epoch:
    with Loader(dataset, "train") as loader:
        everything = torch.cat([part.x for part in loader.range_batches(0, loader.num_samples, 1024)])
    return lambda: (everything[rows] for rows in torch.randperm(len(everything)).split(batch))


def ours(dataset: Dataset, batch: int, cache: str) -> Epoch:
    spec = InputSpec(cache=cache)  # type: ignore[arg-type]  # ram or none
    loader = Loader(dataset, "train", spec=spec, order=TrainingOrder(global_batch=batch))
    epochs = iter(range(10**6))

    def epoch() -> Iterator[Tensor]:
        number = next(epochs)
        return (part.x for part in loader.batches(number * loader.steps_per_epoch, (number + 1) * loader.steps_per_epoch))

    if cache == "ram":
        for _ in epoch():
            pass
    return epoch


def pixels(data: bytes) -> Tensor:
    array = np.asarray(Image.open(io.BytesIO(data)))
    return torch.from_numpy(array.copy()).reshape(*array.shape[:2], -1).permute(2, 0, 1)


def webdataset_loader(dataset: Dataset, batch: int, ext: str) -> Epoch:
    import webdataset as wds

    tars = [f"{dataset.url}/{shard.tar.name}" for shard in dataset.manifest.split("train")]

    def epoch() -> Iterator[Tensor]:
        source = (
            wds.WebDataset(tars, shardshuffle=len(tars)).shuffle(1000).to_tuple(ext).map_tuple(pixels).batched(batch, collation_fn=None)
        )
        return (torch.stack([sample[0] for sample in samples]) for samples in wds.WebLoader(source, batch_size=None, num_workers=0))

    return epoch


class Folder(torch.utils.data.Dataset[Tensor]):
    def __init__(self, root: Path) -> None:
        self.paths = sorted((root / "train").glob("*/*"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Tensor:
        return pixels(self.paths[row].read_bytes())


def folder_loader(root: Path, batch: int) -> Epoch:
    return lambda: torch.utils.data.DataLoader(Folder(root), batch_size=batch, shuffle=True)


def make_net(kind: str, shape: tuple[int, ...]) -> nn.Module:
    size = int(np.prod(shape))
    if kind == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(size, 256), nn.ReLU(), nn.Linear(256, 20), nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, size)
        )
    down = [nn.Conv2d(shape[0], 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()]
    up = [nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, shape[0], 4, 2, 1), nn.Flatten()]
    return nn.Sequential(*down, *up)


def train(epoch: Epoch, net: nn.Module | None, expected: int) -> None:
    """Train one epoch (only read it, without a net)."""
    optimizer, seen = torch.optim.Adam(net.parameters(), fused=True) if net else None, 0
    for stored in epoch():
        seen += len(stored)
        if net and optimizer:
            x = stored.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
            loss = (net(x) - x.flatten(1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert seen == expected


def first(epoch: Epoch, steps: int) -> Epoch:
    def shortened() -> Iterator[Tensor]:
        batches = iter(epoch())
        yield from itertools.islice(batches, steps)

    return shortened


def show(name: str, ours: Callable[[], None], theirs: Callable[[], None], units: int, asked: str = "") -> None:
    print(compare(name, ours, theirs, units=units, pairs=PAIRS).row(asked), flush=True)


def epochs(dataset: Dataset, folder: Path) -> None:
    """Loops with a net against the loop on data in RAM; reading alone against webdataset's and a folder's loader."""
    shape, samples = dataset.input_shape(), dataset.manifest.num_samples("train")
    large = shape[1] == 256
    batch, size = 16 if large else 128, f"{shape[1]}x{shape[2]}"
    ram, cold, warm = in_ram(dataset, batch), ours(dataset, batch, "none"), ours(dataset, batch, "ram")
    peers = {"webdataset": webdataset_loader(dataset, batch, "jpg" if large else "png"), "folder of images": folder_loader(folder, batch)}
    for kind, asked in (("conv", ">= 0.95"),) if large else (("mlp", ">= 0.90"), ("conv", ">= 0.95")):
        torch.manual_seed(0)
        net, units = make_net(kind, shape), JPEG_STEPS * batch if large else samples

        def side(epoch: Epoch, net: nn.Module = net, units: int = units) -> Callable[[], None]:
            return lambda: train(first(epoch, JPEG_STEPS) if large else epoch, net, units)

        show(f"epoch of {size} images, {kind} net: decoded anew, against data in RAM", side(cold), side(ram), units, asked)
        show(f"epoch of {size} images, {kind} net: RAM cache, against data in RAM", side(warm), side(ram), units, asked)
        for peer, epoch in () if large else peers.items():
            show(f"epoch of {size} images, {kind} net: decoded anew, against {peer}", side(cold), side(epoch), units)
    for peer, epoch in peers.items():
        other = functools.partial(train, epoch, None, samples)
        show(f"only reading {size} images: decoded anew, against {peer}", lambda: train(cold, None, samples), other, samples)


def reading(dataset: Dataset) -> None:
    """Bytes of all samples, decoded by nobody: our verified readers against webdataset's."""
    import webdataset as wds

    shards, samples = dataset.manifest.split("train"), dataset.manifest.num_samples("train")
    tars, size = [f"{dataset.url}/{shard.tar.name}" for shard in shards], "x".join(map(str, dataset.input_shape()[1:]))

    def peer() -> None:
        assert sum(1 for _ in wds.WebDataset(tars, shardshuffle=False)) == samples

    def by_offset() -> None:
        readers = [dataset.reader(shard) for shard in shards]
        batches = [(reader, range(len(reader))[start : start + BATCH]) for reader in readers for start in range(0, len(reader), BATCH)]
        assert sum(len(reader.read_rows(np.array(rows))) for reader, rows in batches) == samples

    show(f"read {size} images with checksums, by offset, against webdataset", by_offset, peer, samples, ">= 5")


def main() -> None:
    torch.set_num_threads(1)
    print(HEADER, flush=True)
    for kind, images in (("mnist", MNIST_IMAGES), ("jpeg256", JPEG_IMAGES)):
        with tempfile.TemporaryDirectory(prefix="bench-input-") as scratch:
            folder = make_folder(kind, images, Path(scratch))
            shard_dataset(FolderSpec(url=str(folder)), f"{scratch}/dataset")
            dataset = open_dataset(f"{scratch}/dataset")
            reading(dataset)
            epochs(dataset, folder)


if __name__ == "__main__":
    main()
