"""Share of a training loop's speed that each way of reading the data keeps: the same net, batch size and samples, an epoch at a time.

    python -m tests.benchmarks.bench_input [--data mnist|jpeg256] [--nets mlp,conv,none] [--images 10000] [--pairs 5]

Sides: ram (decoded samples indexed in RAM: 1.0 by definition), ours from shards (cold: decoded anew), ours from the RAM cache (warm),
webdataset's own WebLoader, a folder of images with Pillow behind a DataLoader. Rounds are interleaved; a ratio is taken inside a round,
the median over rounds is shown with the lowest and highest. `read` compares raw reading with checksums with webdataset's reading.
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from aecore.data.job import shard_dataset
from aecore.data.loader import InputSpec, Loader
from aecore.data.manifest import Dataset, open_dataset
from aecore.data.sources.folder import FolderSpec
from tests.realdata import unpack

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
    loader = Loader(dataset, "train", spec=spec, global_batch=batch)
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
        source = wds.WebDataset(tars, shardshuffle=len(tars)).shuffle(1000).to_tuple(ext).map_tuple(pixels).batched(batch, collation_fn=None)
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
        return nn.Sequential(nn.Flatten(), nn.Linear(size, 256), nn.ReLU(), nn.Linear(256, 20), nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, size))
    down = [nn.Conv2d(shape[0], 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()]
    up = [nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, shape[0], 4, 2, 1), nn.Flatten()]
    return nn.Sequential(*down, *up)


def seconds(epoch: Epoch, net: nn.Module | None, expected: int) -> float:
    """Train one epoch (only read, without a net) and return how long it took."""
    optimizer = torch.optim.Adam(net.parameters(), fused=True) if net else None
    began, seen = time.perf_counter(), 0
    for stored in epoch():
        seen += len(stored)
        if net and optimizer:
            x = stored.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
            loss = (net(x) - x.flatten(1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert seen == expected
    return time.perf_counter() - began


def peak_mib(work: Callable[[], object]) -> float:
    """Return by how many MiB the process grew at most while `work` ran (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))


def compare(sides: dict[str, Epoch], kind: str, shape: tuple[int, ...], pairs: int, samples: int) -> None:
    torch.manual_seed(0)
    net = None if kind == "none" else make_net(kind, shape)
    peaks = {name: peak_mib(lambda epoch=epoch: seconds(epoch, net, samples)) for name, epoch in sides.items()}  # also the warm-up
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(pairs):
        for name, epoch in sides.items():
            times[name].append(seconds(epoch, net, samples))
    for name, taken in times.items():
        ratios = sorted(ram / own for ram, own in zip(times["ram"], taken, strict=True))
        speed = samples / statistics.median(taken)
        shown = f"{statistics.median(ratios):5.2f} of ram ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        print(f"| {kind:4} | {name:10} | {speed:9,.0f} samples/s | {shown} | +{peaks[name]:.0f} MiB |", flush=True)


def compare_reading(dataset: Dataset, pairs: int) -> None:
    import webdataset as wds

    shards = dataset.manifest.split("train")
    tars = [f"{dataset.url}/{shard.tar.name}" for shard in shards]
    sides: dict[str, Callable[[], int]] = {
        "webdataset": lambda: sum(1 for _ in wds.WebDataset(tars, shardshuffle=False)),
        "ours, all verified": lambda: sum(1 for shard in shards for _ in dataset.reader(shard).iterate()),
        "ours by offset": lambda: sum(len(dataset.reader(shard).read_rows(np.arange(shard.samples))) for shard in shards),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(pairs + 1):
        for name, read in sides.items():
            began = time.perf_counter()
            assert read() == dataset.manifest.num_samples("train")
            times[name].append(time.perf_counter() - began)
    for name, taken in times.items():
        ratios = sorted(peer / own for peer, own in zip(times["webdataset"][1:], taken[1:], strict=True))
        speed = dataset.manifest.num_samples("train") / statistics.median(taken[1:])
        print(f"| read | {name:18} | {speed:9,.0f} samples/s | {statistics.median(ratios):.1f} x webdataset ({ratios[0]:.1f}-{ratios[-1]:.1f}) |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["mnist", "jpeg256"], default="mnist")
    parser.add_argument("--nets", default="mlp,conv,none")
    parser.add_argument("--images", type=int, default=0, help="default: 10000 of mnist, 200 of jpeg256")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--sides", default="ram,cold,warm,webdataset,folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    images, batch = args.images or {"mnist": 10_000, "jpeg256": 200}[args.data], {"mnist": 128, "jpeg256": 16}[args.data]
    with tempfile.TemporaryDirectory(prefix="bench-input-") as scratch:
        folder = make_folder(args.data, images, Path(scratch))
        shard_dataset(FolderSpec(url=str(folder)), f"{scratch}/dataset")
        dataset = open_dataset(f"{scratch}/dataset")
        samples = dataset.manifest.num_samples("train")
        print(f"{args.data}: {samples} images {dataset.manifest.input_shape()}, batch {batch}, {os.cpu_count()} cores, 1 torch thread", flush=True)
        makers: dict[str, Callable[[], Epoch]] = {
            "ram": lambda: in_ram(dataset, batch),
            "cold": lambda: ours(dataset, batch, "none"),
            "warm": lambda: ours(dataset, batch, "ram"),
            "webdataset": lambda: webdataset_loader(dataset, batch, "png" if args.data == "mnist" else "jpg"),
            "folder": lambda: folder_loader(folder, batch),
        }
        sides = {name: makers[name]() for name in args.sides.split(",")}
        for kind in args.nets.split(","):
            compare(sides, kind, dataset.manifest.input_shape(), args.pairs, samples)
        compare_reading(dataset, args.pairs)


if __name__ == "__main__":
    main()
