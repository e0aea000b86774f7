# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "typer>=0.19"]
# ///
# SPDX-License-Identifier: MIT
"""Momentum Contrast (MoCo) in one file, with a specification that runs: `pytest`.

MoCo v1: He et al., arXiv 1911.05722; v2: Chen et al., arXiv 2003.04297. A training step, and the sections it is in:

    images uint8 (N,3,H,W) ──SplitTwoViews──► x_q, x_k float (N,3,S,S)            Data, Views
    x_q ── encoder_q ──► q (N,C) ───────────────────────────┐                     Encoder
    x_k ── shuffle ── encoder_k ── unshuffle ──► k (N,C) ───┼─► info_nce ─► SGD   Contrast, Training
                                                            └─► queue (C,K)
    every step begins with  θ_k ← m·θ_k + (1−m)·θ_q
    encoder_q's pooled features (N,D) ──► knn_predict                             Evaluation

Shapes: N images a batch (in each of P processes), M images in all, S pixels a side of a view, D pooled features,
C = dim of the embedding, K keys in the queue.
"""

import contextlib
import copy
import csv
import ctypes
import dataclasses
import datetime
import hashlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import shlex
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, TextIO, get_args, get_origin, get_type_hints

if __name__ == "__main__":
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the seconds of torch's import: no traceback

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as tvf
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

__version__ = "0.1.0"


class UserError(ValueError):
    """Say in one line what a user can mend, and how: it names the flag or the file."""


# ───────────────────────────────────────────────── Config ─────────────────────────────────────────────────

# What must hold of an option, and what is said if it does not.
COUNT = (lambda value: value >= 1, "must be at least 1")
NATURAL = (lambda value: 0 <= value < math.inf, "must be at least 0 and finite")
POSITIVE = (lambda value: 0 < value < math.inf, "must be above 0 and finite")
PART = (lambda value: 0 <= value <= 1, "must lie in [0, 1]")
WIDTH = (lambda value: 1 / 8 <= value < 99, "must lie in [1/8, 99)")  # at 1/8 a group of a ResNeXt has one channel
SEED = (lambda value: 0 <= value < 2**64, "must lie in [0, 2^64)")


@dataclass(frozen=True)
class Config:
    """Hold the options of a run: type, help text, rule and default; `from_preset` has other presets' defaults.

    Raises UserError for values that cannot work.
    """

    preset: Annotated[Literal["cifar10", "v1", "v2", "tiny", "cpu"], "defaults to start from"] = "cifar10"
    data: Annotated[str, "cifar10, cifar100, shapes (built in) or a folder of images"] = "cifar10"
    root: Annotated[str, "folder to keep cifar10 and cifar100 in"] = "data"
    size: Annotated[int, "side of a view in pixels", COUNT] = 32
    eval_size: Annotated[int, "side of an image in evaluation; 0: as --size", NATURAL] = 0
    workers: Annotated[int, "processes that read a folder's images", NATURAL] = 2
    cache: Annotated[bool, "decode a folder's images, all of one size, once, into memory"] = False
    method: Annotated[Literal["moco", "end-to-end", "memory-bank", "simclr"], "mechanism of contrast"] = "moco"
    arch: Annotated[
        Literal["resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x8d"], "backbone"
    ] = "resnet18"
    stem: Annotated[Literal["cifar", "imagenet"], "first layers: 3x3, or 7x7 with stride 2 and max-pool"] = "cifar"
    width: Annotated[float, "factor on all channels", WIDTH] = 1.0
    bn_splits: Annotated[int, "groups of the batch that BatchNorm normalises apart", COUNT] = 8
    mlp: Annotated[bool, "2-layer head (v2), else a linear one (v1)"] = True
    mlp_dim: Annotated[int, "hidden units of that head; 0: as many as features", NATURAL] = 0
    mlp_bn: Annotated[bool, "BatchNorm between that head's layers, as in SimCLR and MoCo v3"] = False
    moco_dim: Annotated[int, "C, dimension of the embedding", COUNT] = 128
    moco_k: Annotated[int, "K, keys in the queue, or slots drawn from the memory bank", COUNT] = 4096
    moco_m: Annotated[float, "m, momentum of the key encoder", PART] = 0.99
    moco_t: Annotated[float, "T, temperature of the loss", POSITIVE] = 0.1
    symmetric: Annotated[bool, "query with both views and add the two losses"] = False
    batch_negatives: Annotated[bool, "contrast with the batch's other keys too, not the queue alone"] = False
    bank_m: Annotated[float, "momentum of the memory bank's slots", PART] = 0.5
    aug: Annotated[Literal["cifar", "v1", "v2"], "recipe of the views"] = "cifar"
    min_crop: Annotated[float, "smallest crop, as a part of the image; 0: the recipe's", PART] = 0.0
    epochs: Annotated[int, "passes over the images", COUNT] = 100
    batch_size: Annotated[int, "images a step", COUNT] = 512
    optimizer: Annotated[Literal["sgd", "muon"], "SGD, or orthogonal steps, which learn more in fewer"] = "sgd"
    lr: Annotated[float, "peak learning rate", POSITIVE] = 0.06
    wd: Annotated[float, "weight decay of SGD", NATURAL] = 5e-4
    warmup_epochs: Annotated[float, "epochs in which the learning rate rises linearly from 0", NATURAL] = 0.0
    cos: Annotated[bool, "cosine decay of the learning rate, else --schedule"] = True
    schedule: Annotated[tuple[int, ...], "under --no-cos, the epochs that divide the rate by 10"] = (120, 160)
    seed: Annotated[int, "of weights, order, views and shuffles", SEED] = 0
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "where to compute"] = "auto"
    precision: Annotated[Literal["auto", "bf16", "fp32"], "bf16 autocast; auto: if the hardware has it"] = "auto"
    compile: Annotated[bool, "torch.compile the encoders"] = False
    knn_every: Annotated[int, "epochs between kNN accuracies; 0: only at the end", NATURAL] = 10
    knn_k: Annotated[int, "neighbours that vote", COUNT] = 200
    knn_t: Annotated[float, "temperature of their votes", POSITIVE] = 0.1
    out: Annotated[str, "checkpoint to write, with a .csv of the epochs beside it"] = "ckpt.pt"
    overwrite: Annotated[bool, "replace a file that exists"] = False
    resume: Annotated[bool, "go on from where --out stopped, with its options"] = False
    save_every_steps: Annotated[int, "steps between saves, beside an epoch's end and five minutes", NATURAL] = 0
    tensorboard: Annotated[str, "folder for TensorBoard's files of the epochs, if that package is installed"] = ""

    @classmethod
    def from_preset(cls, preset: str = "cifar10", **explicit: Any) -> "Config":
        """Take a preset's defaults and, over them, the explicit options."""
        return cls(**{**PRESETS.get(preset, {}), "preset": preset, **explicit})

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(Config, include_extras=True).items():
            value, (kind, _, *rules) = getattr(self, name), get_args(hint)
            if get_origin(kind) is Literal:
                rules = [(get_args(kind).__contains__, f"choose from {', '.join(get_args(kind))}")]
            for holds, rule in rules:
                if not holds(value):
                    raise UserError(f"{flag(name)} {value}: {rule}")
        for name in ("symmetric", "batch_negatives"):
            if getattr(self, name) and self.method != "moco":
                raise UserError(f"{flag(name)}: --method {self.method} has no such form; give {flag('no_' + name)}")
        self.check_batch()

    def check_batch(self) -> None:
        """Raise UserError if the groups that BatchNorm normalises are not equal, or of one image."""
        groups = ranks()[1] * self.bn_splits
        if self.batch_size % groups or self.batch_size < 2 * groups:
            product = f"{ranks()[1]} processes times " * (ranks()[1] > 1) + f"--bn-splits {self.bn_splits}"
            raise UserError(f"--batch-size {self.batch_size}: must be a multiple of {product}, and at least twice that")


V1 = dict(
    data="data/imagenet", size=224, workers=16, arch="resnet50", stem="imagenet", bn_splits=1, mlp=False,
    moco_k=65536, moco_m=0.999, moco_t=0.07, aug="v1", epochs=200, batch_size=256, lr=0.03, wd=1e-4, cos=False,
)  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": {},
    "v1": V1,
    "v2": V1 | dict(mlp=True, moco_t=0.2, aug="v2", cos=True),
    "tiny": dict(
        data="shapes", width=0.25, bn_splits=2, moco_k=256, aug="v1", epochs=9, batch_size=64, knn_every=5, knn_k=20
    ),
    "cpu": dict(
        size=24, eval_size=32, cache=True, arch="resnet10", width=0.5, bn_splits=2, mlp_dim=1024, mlp_bn=True,
        moco_k=256, moco_m=0.9, batch_negatives=True, min_crop=0.2, epochs=44, batch_size=256, optimizer="muon",
        warmup_epochs=1.5, knn_every=0,
    ),
}  # fmt: skip


def flag(name: str) -> str:
    """Spell an option as on the command line."""
    return "--" + name.replace("_", "-")


def rng(*key: int | str) -> torch.Generator:
    """Make the CPU generator that belongs to a key such as ("step", seed, step), whatever was drawn before."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()  # torch's CPU engine takes 32 bits of a seed
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


# Under torchrun each of P processes holds its share of every batch, in the order of the ranks, and draws for the whole,
# so that P processes do what one does. With one process `share` and `gathered` give back what they are given.


def ranks() -> tuple[int, int]:
    """Return this process's rank and the number P of processes."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def share(x: Tensor) -> Tensor:
    """Return this process's rows of x (P·N,…): (N,…)."""
    rank, size = ranks()
    return x.chunk(size)[rank]


def uniform(generator: torch.Generator, n: int, *shape: int) -> Tensor:
    """Draw numbers in [0,1) for the n images that this process holds: (n,*shape)."""
    return share(torch.rand(ranks()[1] * n, *shape, generator=generator))


class Gather(torch.autograd.Function):
    """Concatenate all processes' rows; backwards, add up all processes' gradients and keep this process's rows.

    A loss is the mean over a process's rows, and DistributedDataParallel divides the sum by P.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x) for _ in range(ranks()[1])]
        dist.all_gather(rows, x)
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd's own is not ours to overwrite
        dist.all_reduce(gradient)
        return share(gradient)


def gathered(x: Tensor) -> Tensor:
    """Return the rows (P·N,…) of all processes' x (N,…), in the order of the ranks."""
    return Gather.apply(x.contiguous()) if ranks()[1] > 1 else x


def agreed(number: int) -> int:
    """Return the largest of all processes' numbers, once all have come to this line."""
    return int(gathered(torch.tensor([number])).max())


# ────────────────────────────────────────────────── Data ──────────────────────────────────────────────────


@dataclass
class InMemory:
    """Hold a split's images uint8 (M,3,H,W) and labels (M,) int64, if there are any, on the device."""

    images: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, plan: Iterable[tuple[int, Tensor]], cut: Callable) -> Iterator[Tensor]:
        """Yield, for each (epoch, indices) of a plan, its images cut at once by `cut(images, epoch, indices)`."""
        for epoch, indices in plan:
            yield cut(self.images[indices.to(self.images.device, non_blocking=True)], epoch, indices)


@dataclass
class Folder:
    """Hold a split's M paths, which worker processes decode, and labels (M,) int64 if there are any."""

    paths: np.ndarray  # of bytes: to look one up in a worker writes to no page, so that forked memory stays shared
    labels: Tensor | None
    workers: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.paths)

    def batches(self, plan: Iterable[tuple[int, Tensor]], cut: Callable) -> Iterator[Tensor]:
        """Yield, for each (epoch, indices) of a plan, its images cut by `cut(image, epoch, index)`: uint8 (…,N,3,S,S).

        Raises UserError for a file that is no image.
        """
        loader = DataLoader(
            Decoder(self.paths, cut), None, sampler=plan, num_workers=self.workers, worker_init_fn=leave_signals,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch.to(self.device, non_blocking=True)


def leave_signals(_: int) -> None:
    """Have a worker leave Ctrl-C and SIGTERM, which reach the whole group of processes, to the process it serves."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """Kill the workers that an error has left: for the SIGTERM that they ignore, Python would wait at its exit."""
    for worker in multiprocessing.active_children():
        if os.name == "posix":
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler reports a killed worker
        worker.kill()


@dataclass
class Decoder(Dataset):
    """Decode and cut a batch (epoch, indices), in a worker; return, not raise, the UserError of a file that is none."""

    paths: np.ndarray
    cut: Callable

    def __getitem__(self, batch: tuple[int, Tensor]) -> Tensor | UserError:
        epoch, indices = batch
        cuts = []
        for i in indices.tolist():
            path = os.fsdecode(self.paths[i])
            try:
                with Image.open(path) as image:
                    if image.mode.startswith(("I", "F")):  # convert would cut these off at 255
                        return UserError(f"{path}: more than 8 bits a channel; convert it to 8")
                    image = tvf.pil_to_tensor(image.convert("RGB"))
            except Exception:  # whatever damaged bytes bring; a DataLoader would wrap what is raised in a traceback
                return UserError(f"{path}: no image that can be decoded; mend or remove it")
            cuts.append(self.cut(image, epoch, i))
        return torch.stack(cuts, dim=-4)  # (N,3,S,S), or (2,N,3,S,S) of two crops


@dataclass
class Data:
    """Hold the images to train on, which are kNN's bank too, those to test on, and how many classes they have.

    Without labels there are none to test on.
    """

    train: InMemory | Folder
    test: InMemory | Folder | None
    classes: int


def load_data(config: Config, device: torch.device) -> Data:
    """Load the images that --data names. Raises UserError where there are none."""
    if config.data == "shapes":
        splits = [shapes(6_000, "train"), shapes(2_000, "test")]
    elif config.data in ("cifar10", "cifar100"):
        splits = [cifar(config, train) for train in (True, False)]
    else:
        return scan(config, device)
    train, test = (InMemory(images.to(device), labels.to(device)) for images, labels in splits)
    return Data(train, test, int(splits[0][1].max()) + 1)


def cifar(config: Config, train: bool) -> tuple[Tensor, Tensor]:
    """Return a split's images uint8 (M,3,32,32) and labels (M,), downloaded on first use."""
    try:
        split = getattr(torchvision.datasets, config.data.upper())(config.root, train, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--data {config.data}: not in --root {config.root} nor to be downloaded ({str(error).splitlines()[0]}); "
            "try --data shapes, which is built in, or a folder of images"
        ) from error
    return torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets)


def scan(config: Config, device: torch.device) -> Data:
    """List a folder: train/CLASS/* with val/CLASS/* or test/CLASS/*, or else every image in it, without labels."""
    root, train = config.data, os.path.join(config.data, "train")
    if not os.path.isdir(root):
        raise UserError(f"--data {root}: no such folder, and none of cifar10, cifar100, shapes")
    test = next((path for name in ("val", "test") if os.path.isdir(path := os.path.join(root, name))), None)
    classes = sorted(entry.name for entry in os.scandir(train) if entry.is_dir()) if os.path.isdir(train) else []
    labelled, numbers = bool(classes and test), {name: i for i, name in enumerate(classes)}
    folders = []
    for top in (train, test) if labelled else (root,):
        walk = os.walk(top, followlinks=True)
        paths = sorted(os.path.join(d, f) for d, _, files in walk for f in files if f.lower().endswith(IMG_EXTENSIONS))
        if not paths:
            raise UserError(f"--data {root}: no images in {top}, looked for {' '.join(IMG_EXTENSIONS)}")
        names = [os.path.relpath(path, top).split(os.sep)[0] for path in paths]
        if labelled and (strays := set(names) - set(classes)):
            raise UserError(f"--data {root}: {os.path.join(top, min(strays))} belongs to no class folder of {train}")
        labels = torch.tensor([numbers[name] for name in names]) if labelled else None
        folder = Folder(np.array([os.fsencode(path) for path in paths]), labels, config.workers, device)
        folders.append(in_memory(folder) if config.cache else folder)
    return Data(folders[0], folders[1] if labelled else None, len(classes))


def whole(image: Tensor, epoch: int, index: int) -> Tensor:
    """Leave an image as it is: a function with a name, for workers that are spawned."""
    return image


def in_memory(folder: Folder) -> InMemory:
    """Decode a folder's images. Raises UserError if they differ in size."""
    plan = ((0, indices) for indices in torch.arange(len(folder)).split(512))
    try:
        images = torch.cat(list(folder.batches(plan, whole)))
    except RuntimeError as error:  # torch's, of stacking, speaks of sizes
        if "size" not in str(error).lower():
            raise
        raise UserError("--cache: the images differ in size; stream them without it") from error
    return InMemory(images, None if folder.labels is None else folder.labels.to(folder.device))


FORMS: tuple[Callable, ...] = (  # the signed distance of (|u|, |v|), in radii, from the edge: a disk, a cross
    lambda a, b: torch.hypot(a, b) - 0.9,
    lambda a, b: torch.minimum(torch.maximum(a - 0.35, b - 1), torch.maximum(b - 0.35, a - 1)),
)
TEXTURES: tuple[tuple[float, Callable], ...] = (  # waves a unit; a function of two phases, above 0 where there is ink
    (1.0, lambda u, v: torch.ones_like(u)),
    (1.5, lambda u, v: u.sin()),
    (2.0, lambda u, v: u.sin() * v.sin()),
    (1.6, lambda u, v: u.cos() + v.cos() - 0.5),
    (2.8, lambda u, v: torch.maximum(u.sin(), v.sin()) - 0.8),
)


def shapes(n: int, split: str) -> tuple[Tensor, Tensor]:
    """Draw n images uint8 (n,3,32,32) and labels (n,): two forms in five textures, all else at random.

    Shades of grey, hardly tinted, place, size and rotation vary; `split` seeds them.
    """
    generator, images = rng("shapes", split), torch.empty(n, 3, 32, 32, dtype=torch.uint8)
    axis = (torch.arange(32) + 0.5) / 16 - 1
    for label in range(10):
        count = len(images[label::10])

        def between(low: float, high: float, *shape: int, count: int = count) -> Tensor:
            return low + (high - low) * torch.rand(count, *shape, generator=generator)

        angle, radius = between(0, 2 * math.pi, 1, 1), between(0.7, 0.95, 1, 1)
        y, x = axis[:, None] - between(-0.25, 0.25, 1, 1), axis - between(-0.25, 0.25, 1, 1)
        u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
        inside = (0.5 - 16 * radius * FORMS[label // 5]((u / radius).abs(), (v / radius).abs())).clamp(0, 1)
        phase = between(0, 2 * math.pi, 2, 1, 1)
        waves, texture = TEXTURES[label % 5]
        waves = 2 * math.pi * waves * between(0.9, 1.1, 1, 1)
        ink = (0.5 + 2 * texture(waves * u + phase[:, 0], waves * v + phase[:, 1])).clamp(0, 1)
        light = between(0, 1, 1, 1, 1)
        ground, paper, pen = ((light + i / 3) % 1 + between(-0.02, 0.02, 3, 1, 1) for i in range(3))
        image = torch.lerp(ground, torch.lerp(paper, pen, ink[:, None]), inside[:, None])
        image = image + 0.02 * torch.randn(count, 3, 32, 32, generator=generator)
        images[label::10] = (image.clamp(0, 1) * 255).byte()
    return images, torch.arange(n) % 10


# ────────────────────────────────────────────────── Views ─────────────────────────────────────────────────
#
# Images x are float (N,3,H,W) in [0,1], parameters have a row for each. To choose between two images, torch.lerp with a
# weight of 0 or 1 takes a CPU a twentieth of torch.where's time; in-place operations spare it much memory traffic.


def crop_boxes(u: Tensor, height: int, width: int, scale: tuple[float, float]) -> Tensor:
    """Turn u (N,4,10), uniform in [0,1), into torchvision's RandomResizedCrop: boxes (N,4) of top, left, height, width.

    The area is uniform in `scale`, the logarithm of the ratio in ±log 4/3; the first of ten tries that fits
    counts, else the centre.
    """
    u = u.transpose(0, 1)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[0])
    ratio = (math.log(4 / 3) * (2 * u[1] - 1)).exp()
    h, w = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    top, left = u[2] * (height - h + 1), u[3] * (width - w + 1)  # rounded down below
    fits = (h >= 1) & (w >= 1) & (h <= height) & (w <= width)
    first = fits.int().argmax(1, keepdim=True)
    boxes = torch.cat([x.gather(1, first) for x in (top, left, h, w)], 1)
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    centre = torch.tensor([(height - h) // 2, (width - w) // 2, h, w])
    return torch.where(fits.any(1, keepdim=True), boxes.long(), centre)


def resampling(start: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """Write "cut [start, start+length) out of a line of pixels and resize it" as matrices (N,size,pixels).

    The weights are those of bilinear interpolation with antialiasing: a triangle that falls to 0 at a distance of one
    pixel, old or new, whichever is larger. Start and length are (N,).
    """
    pixel = torch.arange(pixels, device=start.device) + 0.5
    start, length = start[:, None, None], length[:, None, None]
    pitch = length / size
    centre = start + pitch * (torch.arange(size, device=start.device)[:, None] + 0.5)
    weights = (1 - (pixel - centre).abs() / pitch.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixel > start) & (pixel < start + length))
    return weights / weights.sum(2, keepdim=True)


def separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Compute rows (N,S,H) · x · columnsᵀ (N,W,S) for each channel: (N,3,S,S)."""
    n, channels, height, width = x.shape
    x = x.transpose(1, 2).reshape(n, height * channels, width) @ columns.mT
    x = rows @ x.reshape(n, height, -1)
    return x.view(n, rows.shape[1], channels, columns.shape[1]).transpose(1, 2)


def crop(x: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut each image to its box (N,4) and resize that to (N,3,size,size), bilinearly."""
    top, left, h, w = boxes.unbind(1)
    return separable(x, resampling(top, h, x.shape[2], size), resampling(left, w, x.shape[3], size))


def grey(x: Tensor) -> Tensor:
    """Return the luma (N,1,H,W), ITU-R 601."""
    r, g, b = x.split(1, 1)
    return (0.2989 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)


def blend(x: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """Adjust brightness (operation 0), contrast (1) or saturation (2) by a factor; both parameters are (N,1,1,1).

    Each is factor·x + (1−factor)·reference, clamped; the reference is black, the mean luma or the luma.
    """
    luma = grey(x)
    mean = luma.mean((1, 2, 3), keepdim=True)
    reference = torch.addcmul(mean * (operation == 1), luma, operation == 2)
    return torch.lerp(reference, x, factor).clamp_(0, 1)


def shift_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Add `turn` (N,1,1,1), in turns of the colour circle, to the hue; HSV's saturation and value stay."""
    r, g, b = x.split(1, 1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    is_r, is_g = (r - value).sign_().add_(1), (g - value).sign_().add_(1)
    sixths = (r - g).add_(chroma, alpha=4).lerp_((b - r).add_(chroma, alpha=2), is_g).lerp_(g - b, is_r)
    hue = sixths.div_(chroma.clamp(min=1e-9)).div_(6).add_(turn + 2)  # + 2 makes it positive, for frac
    phase = (hue + torch.arange(5, 0, -2, device=x.device)[:, None, None] / 6).frac_()  # of red, green and blue
    return value - phase.mul_(6).sub_(2).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma)


def colour_jitter(x: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Apply torchvision's brightness, contrast, saturation and hue (0 to 3) by factors (N,4), in orders (N,4).

    Hue costs most, so it is computed once, for all images, between the up to three blends before it and after it.
    """
    hue = (order == 3).int().argmax(1)[:, None, None, None]
    factor = factors.gather(1, order)[:, :, None, None, None]
    order, turn = order[:, :, None, None, None], factors[:, 3, None, None, None]
    for slot in (0, 1, 2):
        x = blend(x, order[:, slot], torch.where(slot < hue, factor[:, slot], 1))
    x = shift_hue(x, turn)
    for slot in (1, 2, 3):
        x = blend(x, order[:, slot], torch.where(slot > hue, factor[:, slot], 1))
    return x


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur square images by sigma (N,1) pixels, borders reflected; the kernel has 2·⌊S/20⌋ + 1 taps.

    That is a tenth of the side, SimCLR, 2002.05709, appendix A; MoCo v2 takes over its blur and sigma.
    """
    size = x.shape[-1]
    taps = torch.arange(-(size // 20), size // 20 + 1, device=x.device)
    weights = (-0.5 * (taps / sigma) ** 2).softmax(1)
    pixel = (torch.arange(size, device=x.device)[:, None] + taps).abs()
    pixel = (size - 1 - (size - 1 - pixel).abs()).expand(len(x), -1, -1)
    lines = x.new_zeros(len(x), size, size).scatter_add_(2, pixel, weights[:, None].expand(pixel.shape))
    return separable(x, lines, lines)


def random_jitter(x: Tensor, draw: Callable, *strengths: float) -> Tensor:
    """Draw an order, factors in 1 ± strength for brightness, contrast and saturation, and hue's in 0 ± strength."""
    spread = torch.stack([strength * (2 * draw(len(x)) - 1) for strength in strengths], 1)
    return colour_jitter(x, draw(len(x), 4).argsort(1), spread + (torch.arange(4, device=x.device) < 3))


TRANSFORMS: dict[str, Callable] = {  # (x, draw, *strengths) -> x; draw(*shape) is uniform in [0,1)
    "flip": lambda x, draw: x.flip(-1),
    "grey": lambda x, draw: grey(x),
    "jitter": random_jitter,
    "blur": lambda x, draw, low, high: gaussian_blur(x, low + (high - low) * draw(len(x), 1)),
}


@dataclass(frozen=True)
class Recipe:
    """Describe views: area of the crop, transforms of name, probability and strengths, then normalisation."""

    scale: tuple[float, float]
    transforms: tuple[tuple, ...]
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    margin: float = 256 / 224  # to evaluate, the shorter side becomes margin·S, and the centre S×S is cut out


JITTER, GREY, BLUR, FLIP = ("jitter", 0.8, 0.4, 0.4, 0.4, 0.1), ("grey", 0.2), ("blur", 0.5, 0.1, 2.0), ("flip", 0.5)
RECIPES = {
    "cifar": Recipe((0.08, 1), (FLIP, JITTER, GREY), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), margin=1),
    "v1": Recipe((0.2, 1), (GREY, ("jitter", 1, 0.4, 0.4, 0.4, 0.4), FLIP)),
    "v2": Recipe((0.2, 1), (JITTER, GREY, BLUR, FLIP)),
}


class Augment(nn.Module):
    """Turn images into random views by a recipe, on the images' device, with an independent draw for every image.

    The draws come from a CPU generator, so that a seed gives the same views on every device. `min_crop` above 0 takes
    the place of the recipe's smallest crop.
    """

    def __init__(self, recipe: str = "cifar", size: int = 32, min_crop: float = 0.0) -> None:
        super().__init__()
        self.recipe, self.size = RECIPES[recipe], size
        self.scale = (min_crop or self.recipe.scale[0], self.recipe.scale[1])
        self.register_buffer("mean", torch.tensor(self.recipe.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(self.recipe.std)[:, None, None], persistent=False)

    def forward(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Crop images uint8 (N,3,H,W) and `finish` them: float (N,3,S,S), normalised. Raises TypeError for others."""
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise TypeError(f"views are made of images uint8 (N,3,H,W), not {images.dtype} {tuple(images.shape)}")
        boxes = crop_boxes(uniform(generator, len(images), 4, 10), *images.shape[2:], self.scale)
        return self.finish(crop(images / 255, boxes.to(images.device, non_blocking=True), self.size), generator)

    def finish(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Take crops (N,3,S,S) in [0,1] through the recipe's transforms and normalise them."""

        def draw(*shape: int) -> Tensor:
            return uniform(generator, *shape).to(x.device, non_blocking=True)

        for name, probability, *strengths in self.recipe.transforms:
            chosen = (draw(len(x), 1, 1, 1) < probability).to(x)
            x = torch.lerp(x, TRANSFORMS[name](x, draw, *strengths), chosen)
        return self.normalise(x)

    def normalise(self, x: Tensor) -> Tensor:
        """Subtract the recipe's mean, divide by its standard deviation."""
        mean, std = (c.to(x.device, non_blocking=True) for c in (self.mean, self.std))
        return (x - mean) / std

    def restore(self, x: Tensor) -> Tensor:
        """Undo `normalise`."""
        return x * self.std.to(x.device) + self.mean.to(x.device)

    def centre(self, images: Tensor, *_: Any) -> Tensor:
        """Cut for evaluation: resize uint8 (…,3,H,W) to a shorter side of margin·S, take the centre (…,3,S,S)."""
        side = round(self.size * self.recipe.margin)
        return tvf.center_crop(tvf.resize(images, [side]), [self.size, self.size])


@dataclass
class SplitTwoViews:
    """Make two views of every image, each with draws of its own."""

    augment: Augment
    seed: int = 0

    def __call__(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return x_q, x_k float (N,3,S,S) of images uint8 (N,3,H,W), or of their `two_crops` (2,N,3,S,S)."""
        with torch.autocast(images.device.type, enabled=False):
            if images.dim() == 5:
                return tuple(self.augment.finish(crops / 255, generator) for crops in images)
            return self.augment(images, generator), self.augment(images, generator)

    def two_crops(self, image: Tensor, epoch: int, index: int) -> Tensor:
        """Cut both views' crops uint8 (2,3,S,S) out of an image (3,H,W) at its own resolution, as a worker does.

        A batch (N,3,H,W) from memory is left whole: the device cuts it.
        """
        if image.dim() == 4:
            return image
        size, scale = self.augment.size, self.augment.scale
        u = torch.rand(2, 4, 10, generator=rng("crop", self.seed, epoch, index))
        boxes = crop_boxes(u, *image.shape[1:], scale)
        return torch.stack([tvf.resized_crop(image, *box, [size, size]) for box in boxes.tolist()])


# ───────────────────────────────────────────────── Encoder ────────────────────────────────────────────────


class SplitBatchNorm(nn.BatchNorm2d):
    """Normalise each of `num_splits` contiguous groups of the batch by its own statistics, as so many ranks would.

    The running statistics move once a forward pass, by the mean of the groups' statistics. In eval mode it is
    BatchNorm2d, whose options and names it has, and takes features (N,C) beside maps (N,C,H,W).
    Raises ValueError if a training batch cannot be cut evenly.
    """

    def __init__(self, num_features: int, num_splits: int = 8, **batchnorm_options: Any) -> None:
        super().__init__(num_features, **batchnorm_options)
        self.num_splits = num_splits

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_splits={self.num_splits}"

    def _check_input_dim(self, x: Tensor) -> None:
        super()._check_input_dim(x if x.dim() != 2 else x[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        if len(x) % self.num_splits:
            raise ValueError(f"a batch of {len(x)} cannot be cut into {self.num_splits} equal groups")
        f = self.momentum or 0.0
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                f = 1 / float(self.num_batches_tracked)
        groups = []
        for remaining, group in zip(reversed(range(self.num_splits)), x.chunk(self.num_splits)):
            # moving by f/(G − remaining·f), group by group, a statistic r ends at (1−f)·r + f·(mean over the G groups)
            momentum = f / (self.num_splits - remaining * f)
            stats = self.running_mean, self.running_var
            groups.append(F.batch_norm(group, *stats, self.weight, self.bias, True, momentum, self.eps))
        return torch.cat(groups)


ARCHS: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, int]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1), {}),
    "resnet18": (BasicBlock, (2, 2, 2, 2), {}),
    "resnet34": (BasicBlock, (3, 4, 6, 3), {}),
    "resnet50": (Bottleneck, (3, 4, 6, 3), {}),
    "resnet101": (Bottleneck, (3, 4, 23, 3), {}),
    "resnext50_32x8d": (Bottleneck, (3, 4, 6, 3), {"groups": 32, "base_width": 8}),
}


class ResNetEncoder(nn.Module):
    """Embed images with a ResNet, 1512.03385, made of torchvision's blocks under its names, and a head `fc`.

    stem: "cifar" (3×3, for small images) or "imagenet"; width: factor on all channels; mlp: MoCo v2's 2-layer head,
    mlp_dim: of so many hidden units, if not of as many as features, mlp_bn: with BatchNorm between its layers.
    """

    def __init__(
        self, arch: str = "resnet18", dim: int = 128, mlp: bool = True, bn_splits: int = 8, stem: str = "cifar",
        width: float = 1.0, mlp_dim: int = 0, mlp_bn: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        block, depths, options = ARCHS[arch]
        norm = partial(SplitBatchNorm, num_splits=bn_splits)
        planes = channels = int(64 * width)
        kernel, stride = {"cifar": (3, 1), "imagenet": (7, 2)}[stem]
        self.conv1 = nn.Conv2d(3, channels, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1, self.relu = norm(channels), nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, 2, padding=1)
        for i, depth in enumerate(depths):
            layer = nn.Sequential()
            for j in range(depth):
                stride, out, shortcut = 2 if i and not j else 1, planes * block.expansion, None
                if out != channels:
                    shortcut = nn.Sequential(conv1x1(channels, out, stride), norm(out))
                layer.append(block(channels, planes, stride, shortcut, norm_layer=norm, **options))
                channels = out
            self.add_module(f"layer{i + 1}", layer)
            planes *= 2
        self.feature_dim = channels
        self.fc: nn.Module = nn.Linear(channels, dim)
        if mlp:
            hidden = mlp_dim or channels
            between = [norm(hidden), nn.ReLU()] if mlp_bn else [nn.ReLU()]
            self.fc = nn.Sequential(nn.Linear(channels, hidden), *between, nn.Linear(hidden, dim))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """Return the pooled features (N,D) of images float (N,3,S,S), before the head."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the embedding (N,dim), not normalised."""
        return self.fc(self.features(x))


# ──────────────────────────────────────────────── Contrast ────────────────────────────────────────────────


Rng = torch.Generator | None  # to draw with; None: torch's own, which does for one process alone


def info_nce(q: Tensor, k: Tensor, negatives: Tensor, T: float, excluded: Tensor | None = None) -> Tensor:
    """Ask each query for its key: L = −q·k₊/T + log(exp(q·k₊/T) + Σᵢ exp(q·kᵢ/T)), MoCo eq. 1, mean over N.

    q, k (N,C) hold unit rows and negatives (C,K) unit columns, of which each query leaves out those `excluded` (N,K).
    It is cross-entropy over the K+1 logits [q·k₊, q·kᵢ]/T with label 0, in float32 or finer whatever the autocast.
    """
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, negatives = q.to(dtype) / T, negatives.to(dtype)
        positive, logits = (q * k).sum(1), q @ negatives
        if excluded is not None:
            logits = logits.masked_fill(excluded, -math.inf)
        return (torch.logaddexp(positive, logits.logsumexp(1)) - positive).mean()


def embed(encoder: nn.Module, x: Tensor) -> Tensor:
    """Return the embeddings (N,C) of views (N,3,S,S) as unit rows, in float32 or finer."""
    z = encoder(x)
    return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)


def shuffled_keys(encoder: nn.Module, im_k: Tensor, generator: Rng) -> Tensor:
    """Return the keys (P·N,C) of all processes' views (N,3,S,S), in the order of the views.

    They are embedded in a random order over processes and BatchNorm groups, so that a query and its key are not
    normalised with the same images: ShuffleBN, 1911.05722, section 3.3. Raises ValueError if several processes are to
    draw one order without a generator.
    """
    if generator is None and ranks()[1] > 1:
        raise ValueError("several processes need a generator, of one seed in all of them")
    im_k = gathered(im_k)
    order = torch.randperm(len(im_k), generator=generator).to(im_k.device, non_blocking=True)
    return gathered(embed(encoder, im_k[share(order)]))[order.argsort()]


def own_keys(keys: Tensor) -> Tensor:
    """Mark, among all processes' keys (P·N,C), that of each of this process's queries: bool (N,P·N)."""
    return share(torch.eye(len(keys), dtype=torch.bool, device=keys.device))


class MoCo(nn.Module):
    """Contrast queries with a queue of keys from a momentum encoder, 1911.05722, algorithm 1.

    `encoder` is any module that maps a batch to (N,dim): it becomes `encoder_q`. `encoder_k` starts as an equal copy
    and never receives gradients. `queue` (dim,K) holds unit columns, `queue_ptr` (1,) int64 the place of the oldest.
    """

    def __init__(
        self, encoder: nn.Module, dim: int = 128, K: int = 4096, m: float = 0.99, T: float = 0.1,
        symmetric: bool = False, batch_negatives: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.K, self.m, self.T, self.symmetric, self.batch_negatives = K, m, T, symmetric, batch_negatives
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def momentum_update(self) -> None:
        """Move the key encoder, θ_k ← m·θ_k + (1−m)·θ_q, eq. 2: its parameters, not BatchNorm's statistics."""
        for theta_k, theta_q in zip(self.encoder_k.parameters(), self.encoder_q.parameters()):
            theta_k.lerp_(theta_q, 1 - self.m)

    @torch.no_grad()
    def dequeue_and_enqueue(self, keys: Tensor) -> None:
        """Replace the oldest of the queue by keys (N,C), for any N; of more than K the newest K stay."""
        places = self.queue_ptr + torch.arange(len(keys), device=keys.device)
        self.queue.index_copy_(1, places[-self.K :] % self.K, keys[-self.K :].T.to(self.queue))
        self.queue_ptr.add_(len(keys)).remainder_(self.K)

    def forward(self, im_q: Tensor, im_k: Tensor, generator: Rng = None, indices: Tensor | None = None) -> Tensor:
        """Return the loss of two views (N,3,S,S), the sum of both directions if symmetric; then enqueue the keys.

        The mechanisms below are called alike; `indices` (N,), the images' places in the data, serve MemoryBank alone.
        """
        self.momentum_update()
        queue = self.queue.clone()  # backward needs it as it was
        losses, keys = [], []
        for x_q, x_k in [(im_q, im_k), (im_k, im_q)][: 2 if self.symmetric else 1]:
            q = embed(self.encoder_q, x_q)
            with torch.no_grad():
                keys.append(shuffled_keys(self.encoder_k, x_k, generator))
            negatives, excluded = queue, None
            if self.batch_negatives:
                negatives = torch.cat([queue, keys[-1].T], 1)
                excluded = F.pad(own_keys(keys[-1]), (self.K, 0))
            losses.append(info_nce(q, share(keys[-1]), negatives, self.T, excluded))
        self.dequeue_and_enqueue(torch.cat(keys))
        return torch.stack(losses).sum()


class EndToEnd(nn.Module):
    """Contrast queries with the other keys of the batch, 1911.05722, figure 2a: gradients flow into both."""

    def __init__(self, encoder: nn.Module, T: float = 0.1) -> None:
        super().__init__()
        self.encoder_q, self.T = encoder, T

    def forward(self, im_q: Tensor, im_k: Tensor, generator: Rng = None, indices: Tensor | None = None) -> Tensor:
        """Return the loss of two views (N,3,S,S)."""
        q, k = embed(self.encoder_q, im_q), shuffled_keys(self.encoder_q, im_k, generator)
        return info_nce(q, share(k), k.T, self.T, own_keys(k))


class MemoryBank(nn.Module):
    """Contrast queries with past queries of other images, 1911.05722, figure 2b, after InstDisc, 1805.01978.

    `bank` (M,dim) has a unit row, a slot, for each of M images; a query's slot is its key, and K slots, drawn with
    replacement for the whole batch, are the negatives. Then slot ← normalised m·slot + (1−m)·q.
    """

    def __init__(
        self, encoder: nn.Module, images: int, dim: int = 128, K: int = 4096, m: float = 0.5, T: float = 0.1
    ) -> None:
        super().__init__()
        self.encoder_q, self.K, self.m, self.T = encoder, K, m, T
        self.register_buffer("bank", F.normalize(torch.randn(images, dim), dim=1))

    def forward(self, im_q: Tensor, im_k: Tensor, generator: Rng, indices: Tensor) -> Tensor:
        """Return the loss of a view (N,3,S,S) of the images `indices` (N,); then move their slots; `im_k` is unused."""
        indices = indices.to(im_q.device, non_blocking=True)
        drawn = torch.randint(len(self.bank), (self.K,), generator=generator).to(im_q.device, non_blocking=True)
        q, k = embed(self.encoder_q, im_q), self.bank[indices]
        loss = info_nce(q, k, self.bank[drawn].T, self.T, drawn == indices[:, None])
        slots = F.normalize(torch.lerp(q.detach().to(k), k, self.m), dim=1)
        self.bank[gathered(indices)] = gathered(slots)
        return loss


class SimCLR(nn.Module):
    """Contrast both views as queries with all other views of the batch, 2002.05709: NT-Xent, 2N−2 negatives each."""

    def __init__(self, encoder: nn.Module, T: float = 0.1) -> None:
        super().__init__()
        self.encoder_q, self.T = encoder, T

    def forward(self, im_q: Tensor, im_k: Tensor, generator: Rng = None, indices: Tensor | None = None) -> Tensor:
        """Return the loss of two views (N,3,S,S), mean over the 2N queries."""
        z_q, z_k = embed(self.encoder_q, im_q), embed(self.encoder_q, im_k)
        all_q, all_k = gathered(z_q), gathered(z_k)
        excluded = own_keys(all_q).repeat(2, 2)  # itself and its key
        return info_nce(torch.cat([z_q, z_k]), torch.cat([z_k, z_q]), torch.cat([all_q, all_k]).T, self.T, excluded)


# ─────────────────────────────────────────────── Evaluation ───────────────────────────────────────────────


@torch.no_grad()
def extract_features(encode: Callable, source: InMemory | Folder, augment: Augment, batch_size: int = 512) -> Tensor:
    """Return `encode` of all M images of a split, in order: float32 (M,D); each process does its share."""
    each = -(-len(source) // ranks()[1])
    mine = share(torch.arange(ranks()[1] * each).clamp(max=len(source) - 1))
    batches = source.batches(((0, indices) for indices in mine.split(batch_size)), augment.centre)
    return gathered(torch.cat([encode(augment.normalise(images / 255)).float() for images in batches]))[: len(source)]


def knn_predict(features: Tensor, bank: Tensor, bank_labels: Tensor, classes: int, k: int, T: float) -> Tensor:
    """Let the k nearest of bank (M,D) vote on the class of features (N,D): labels (N,) int64; InstDisc, 1805.01978.

    A neighbour at cosine similarity s has exp(s/T) votes. Similarities are computed in chunks of 128 MiB at most.
    Raises ValueError if k is not in [1, M].
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k = {k} neighbours of a bank of {len(bank)}")
    scale = 1 / bank.norm(dim=1).clamp(min=1e-12)  # of similarities: a normalised copy of the bank may be gigabytes
    predictions = []
    for chunk in F.normalize(features, dim=1).split(max(1, 2**25 // len(bank))):
        similarity, neighbours = (chunk @ bank.T).mul_(scale).topk(k)
        weights = (similarity / T).softmax(1)  # exp(s/T) over its sum: no T overflows it
        votes = weights.new_zeros(len(chunk), classes).scatter_add_(1, bank_labels[neighbours], weights)
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def fit_linear(features: Tensor, labels: Tensor, classes: int, decay: float = 1e-4) -> nn.Linear:
    """Fit logistic regression to features (M,D) and labels (M,): the minimum of cross-entropy + decay/2·‖W‖².

    It is convex, and up to 500 iterations of L-BFGS go to its minimum: there is no learning rate to tune. The papers
    run SGD with a rate of 30 on augmented images instead, 1911.05722, section 4.1. Called, it gives logits (N,classes).
    """
    linear = nn.Linear(features.shape[1], classes, device=features.device, dtype=features.dtype)
    nn.init.zeros_(linear.weight), nn.init.zeros_(linear.bias)
    search = dict(line_search_fn="strong_wolfe", tolerance_change=1e-7)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=500, **search)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(features), labels) + decay / 2 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return linear.requires_grad_(False)


def check_data(config: Config, data: Data, linear: bool = False) -> None:
    """Raise UserError if these images have no labels to evaluate by, or are too few for kNN."""
    if data.test is None:
        raise UserError(f"--data {config.data}: no labels to evaluate by; needs train/CLASS/* and val/ or test/CLASS/*")
    if config.knn_k > len(data.train) and not linear:
        raise UserError(f"--knn-k {config.knn_k}: must be at most {len(data.train)}, the images to choose from")


def frozen_features(
    encoder: nn.Module, split: InMemory | Folder, config: Config, autocast: Callable, head: bool
) -> Tensor:
    """Return a split's features (M,D) in eval mode: pooled, or the head's output; the encoder's mode is restored."""
    encode = encoder if head else encoder.features
    training = encoder.training
    encoder.eval()
    with autocast():
        features = extract_features(encode, split, Augment(config.aug, config.eval_size or config.size))
    encoder.train(training)
    return features


def accuracy(
    encoder: nn.Module, data: Data, config: Config, autocast: Callable, head: bool = False, linear: bool = False
) -> float:
    """Return the top-1 in percent of kNN, or of a linear classifier, on frozen features: pooled, or of the head.

    The linear classifier sees features less their mean over the training images, divided by their deviation.
    """
    bank, features = (frozen_features(encoder, split, config, autocast, head) for split in (data.train, data.test))
    bank_labels, labels = (split.labels.to(bank.device) for split in (data.train, data.test))
    if linear:
        deviation, mean = torch.std_mean(bank, 0)
        bank, features = ((x - mean) / deviation.clamp(min=1e-6) for x in (bank, features))
        predicted = fit_linear(bank, bank_labels, data.classes)(features).argmax(1)
    else:
        predicted = knn_predict(features, bank, bank_labels, data.classes, config.knn_k, config.knn_t)
    return 100 * (predicted == labels).sum().item() / len(labels)


def mosaic(images: Tensor, colours: Tensor | None = None) -> Tensor:
    """Lay images (R,C,3,S,S) in [0,1] out in R rows of C, small ones enlarged to some 96 pixels: a picture (3,H,W).

    The first of a row is framed black, the others in their colours (R,C−1,3), or not at all.
    """
    scale, ground = -(-96 // images.shape[-1]), 0.85
    images = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    frames = F.pad(images, (4, 4, 4, 4))
    frames[:, 1:] = ground if colours is None else colours[..., None, None]
    frames[..., 4:-4, 4:-4] = images
    return torchvision.utils.make_grid(frames.flatten(0, 1), nrow=images.shape[1], padding=4, pad_value=ground)


def draw_views(data: Data, config: Config, rows: int = 8, pairs: int = 4) -> Tensor:
    """Draw images, each whole or its centre, and beside it the two views that each of several steps makes: (3,H,W)."""
    augment = Augment(config.aug, config.size, config.min_crop)
    split_two_views = SplitTwoViews(augment, config.seed)
    chosen = torch.randperm(len(data.train), generator=rng("picture", config.seed))[:rows]
    columns = [images / 255 for images in data.train.batches([(0, chosen)], augment.centre)]
    plan = [(epoch, chosen) for epoch in range(pairs)]
    for step, images in enumerate(data.train.batches(plan, split_two_views.two_crops)):
        columns += map(augment.restore, split_two_views(images, rng("step", config.seed, step)))
    return mosaic(torch.stack(columns, 1))


def draw_neighbours(
    encoder: nn.Module, data: Data, config: Config, autocast: Callable, rows: int = 10, columns: int = 10
) -> Tensor:
    """Draw images and beside each its nearest others among those trained on, nearest first: (3,H,W).

    Test images are taken if there are any, and frames are green or red as the labels are equal or not.
    """
    queries, cut = data.test or data.train, Augment(config.aug, config.eval_size or config.size).centre
    bank = frozen_features(encoder, data.train, config, autocast, head=False)
    features = frozen_features(encoder, data.test, config, autocast, head=False) if data.test else bank
    chosen = torch.randperm(len(queries), generator=rng("picture", config.seed))[:rows]
    similarity = F.normalize(features[chosen], dim=1) @ F.normalize(bank, dim=1).T
    alone = queries is data.train
    if alone:
        similarity[torch.arange(len(chosen)), chosen] = -math.inf
    neighbours, colours = similarity.topk(min(columns, len(bank) - alone)).indices.cpu(), None
    shown = [*queries.batches([(0, chosen)], cut), *data.train.batches([(0, column) for column in neighbours.T], cut)]
    if data.test:
        right = data.train.labels.cpu()[neighbours] == data.test.labels.cpu()[chosen, None]
        colours = torch.where(right[..., None], torch.tensor([0.2, 0.7, 0.3]), torch.tensor([0.9, 0.2, 0.2]))
    return mosaic(torch.stack(shown, 1).cpu() / 255, colours)


# ────────────────────────────────────────────── Checkpoints ───────────────────────────────────────────────


def write_file(path: str, write: Callable[[BinaryIO], Any]) -> None:
    """Have `write` fill a file so that `path` holds, at any moment, what it held or the new content, whole.

    Raises UserError, and keeps what it held, where the disk does not take it.
    """
    try:
        with open(f"{path}.tmp", "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")
        why = error.__context__ if isinstance(error.__context__, OSError) else error  # under torch.save's own
        raise UserError(f"{path}: not written ({str(why).splitlines()[0]}); what it held before is whole") from error


def save_checkpoint(path: str, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint, all of it or nothing. Raises UserError."""
    write_file(path, partial(torch.save, checkpoint))


def load_checkpoint(path: str) -> dict[str, Any]:
    """Read a checkpoint, ours or an official one, onto the CPU, executing nothing of it.

    Raises UserError if the file is none, is damaged, or holds weights that are not finite.
    """
    why = "the file is no archive of torch.save, or is cut short"  # what to say if one of the next lines fails
    try:
        if not os.path.getsize(path):
            why = "the file is empty"
        elif zipfile.is_zipfile(path):
            archive = zipfile.ZipFile(path)
            folders = (part.filename for part in archive.infolist() if part.external_attr & 16)
            if part := archive.testzip() or next(folders, None):  # torch compares no checksums, and reads a folder as 0
                why = f"the file is damaged at {part}"
                raise EOFError
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        why = "it lacks one of epoch, arch and state_dict"
        _, _, weights = int(checkpoint.get("epoch")), str(checkpoint["arch"]), checkpoint["state_dict"].items()
        for name, x in weights:
            why = f"{name} is no tensor of finite numbers"
            if not x.isfinite().all():
                raise ValueError
        why = "its config is not one of this version"
        Config(**checkpoint.get("config", {}))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except Exception as error:  # of damaged bytes anything can come
        if "GLOBAL" in str(error):
            why = "it asks for more than tensors and plain values; nothing of it was run"
        raise UserError(f"{path}: no checkpoint: {why}") from error
    return checkpoint


def load_weights(module: nn.Module, weights: dict[str, Tensor], path: str) -> None:
    """Copy weights into a module, strictly. Raises UserError, naming one, if any is missing, strange or misshapen."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path}: {str(error).splitlines()[1].strip()}") from error


def load_encoder(checkpoint: dict[str, Any], path: str) -> ResNetEncoder:
    """Rebuild the query encoder to evaluate it; its stem, width and head are read off the weights. Raises UserError."""
    prefix = "module.encoder_q."
    weights = {k.removeprefix(prefix): x for k, x in checkpoint["state_dict"].items() if k.startswith(prefix)}
    try:
        channels, _, kernel, _ = weights["conv1.weight"].shape
        head = [x for name, x in weights.items() if name.startswith("fc.")]
        mlp, mlp_dim, mlp_bn = "fc.0.weight" in weights, len(head[0]), "fc.1.weight" in weights
        stem, width = "cifar" if kernel == 3 else "imagenet", channels / 64
        encoder = ResNetEncoder(checkpoint["arch"], len(head[-1]), mlp, 1, stem, width, mlp_dim, mlp_bn)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: {prefix}* is no encoder among {', '.join(ARCHS)}") from error
    load_weights(encoder, weights, path)
    return encoder.eval()


# ──────────────────────────────────────────────── Training ────────────────────────────────────────────────


def pick_device(config: Config) -> tuple[torch.device, Callable[[], torch.autocast]]:
    """Choose the device, and bf16 autocast if it has bf16 in hardware or --precision wants it."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(name for name in available if available[name]) if config.device == "auto" else config.device
    if not available[name]:
        raise UserError(f"--device {name}: torch {torch.__version__} finds none here; use --device auto")
    if name == "cuda":
        hardware = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        hardware = name == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    bf16 = config.precision == "bf16" or (config.precision == "auto" and hardware)
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
    return device, partial(torch.autocast, name, torch.bfloat16, enabled=bf16)


def join_processes(device: torch.device) -> None:
    """Join the processes that torchrun started, if it did."""
    if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next: to fetch and clear the pages anew takes a sixth of a CPU step."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # Windows and macOS have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks lie in the heap too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


# DistributedDataParallel would give all processes rank 0's buffers at each step; this option forbids it.
OWN_BUFFERS = "forward_sync_buffers"
if OWN_BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    OWN_BUFFERS = "broadcast_buffers"  # its name in older versions of torch


def build_model(config: Config, images: int) -> nn.Module:
    """Make the model that a configuration describes for so many images, always the same for a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        dim, K, T = config.moco_dim, config.moco_k, config.moco_t
        shape = config.bn_splits, config.stem, config.width, config.mlp_dim, config.mlp_bn
        encoder = ResNetEncoder(config.arch, dim, config.mlp, *shape)
        if config.method == "moco":
            return MoCo(encoder, dim, K, config.moco_m, T, config.symmetric, config.batch_negatives)
        if config.method == "memory-bank":
            return MemoryBank(encoder, images, dim, K, config.bank_m, T)
        return EndToEnd(encoder, T) if config.method == "end-to-end" else SimCLR(encoder, T)


def orthogonal(x: Tensor) -> Tensor:
    """Bring all singular values of x (m,n) near 1, where they are not near 0: five steps of Newton and Schulz.

    Each maps a singular value s in (0,1] to 3.4445·s − 4.775·s³ + 2.0315·s⁵, Jordan's polynomial, steep at 0.
    """
    wide = x if x.shape[0] <= x.shape[1] else x.mT
    wide = wide / wide.norm().clamp(min=1e-12)
    for _ in range(5):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (2.0315 * gram @ gram - 4.775 * gram) @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.mT


class Muon(torch.optim.Optimizer):
    """Step every weight along its orthogonalised momentum, by `lr` of the weight's own norm, which it keeps.

    W ← ‖W‖·unit(W − lr·‖W‖·unit(O)), O = orthogonal(gradient + momentum·buffer), after Jordan et al., 2024,
    kellerjordan.github.io/posts/muon: a step has a part in all directions, not in the few that rule the gradient.
    Before BatchNorm or a normalised embedding a weight's norm means nothing, and so takes no decay. Vectors take
    Nesterov's SGD.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for weight in (p for p in group["params"] if p.grad is not None):
                buffer = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                buffer.mul_(momentum).add_(weight.grad)
                step = weight.grad.add(buffer, alpha=momentum)
                if weight.dim() < 2:
                    weight.sub_(step, alpha=lr)
                    continue
                norm, step = weight.norm(), orthogonal(step.flatten(1)).view_as(weight)
                weight.sub_(lr * norm / step.norm().clamp(min=1e-12) * step)
                weight.mul_(norm / weight.norm().clamp(min=1e-12))


def learning_rate(config: Config, epoch: float) -> float:
    """Return the learning rate after `epoch` epochs, fractions included: cosine, or x0.1 at each of --schedule.

    It rises linearly in the first --warmup-epochs; the cosine spans the rest.
    """
    warmup = config.warmup_epochs
    if epoch < warmup:
        return config.lr * epoch / warmup
    if config.cos:
        return config.lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (config.epochs - warmup)))
    return config.lr * 0.1 ** sum(epoch >= milestone for milestone in config.schedule)


def batch_plan(n: int, config: Config) -> Iterator[tuple[int, Tensor]]:
    """Yield each step's epoch and this process's indices (N,); an epoch permutes the images, less a short batch."""
    for epoch in range(config.epochs):
        order = torch.randperm(n, generator=rng("order", config.seed, epoch))
        for indices in order[: n - n % config.batch_size].split(config.batch_size):
            yield epoch, share(indices)


def log_of(out: str) -> Path:
    """Name the .csv of a checkpoint."""
    return Path(out.removesuffix(".pt") + ".csv")


def has_place(path: Path) -> bool:
    """Tell whether a file can be put at a path: its folder exists, and no folder or device stands there."""
    return path.parent.is_dir() and (path.is_file() or not path.exists())


def check_run(config: Config, data: Data) -> None:
    """Raise UserError for what would fail later: a file in the way, too large a batch, impossible kNN."""
    out = Path(config.out)
    if not has_place(out):
        raise UserError(f"--out {out}: must be a file in a folder that exists")
    for path in (out, log_of(config.out)) if ranks()[0] == 0 and not (config.overwrite or config.resume) else ():
        if path.exists() and path.stat().st_size:
            raise UserError(f"--out {path}: exists already; give --resume to go on, --overwrite, or another --out")
    config.check_batch()  # once more, now that there may be other processes
    if config.batch_size > len(data.train):
        raise UserError(f"--batch-size {config.batch_size}: more than the {len(data.train)} images of {config.data}")
    if data.test is not None:
        check_data(config, data)


SAVE_SECONDS = 300.0  # between saves within an epoch
RESUMABLE = (  # what --resume may change; epochs only upward
    "data", "root", "eval_size", "workers", "epochs", "lr", "wd", "cos", "schedule", "device", "precision", "compile",
    "knn_every", "knn_k", "knn_t", "out", "overwrite", "resume", "save_every_steps", "tensorboard",
)  # fmt: skip


def load_run(path: str) -> dict[str, Any]:
    """Read a checkpoint that --resume can go on from. Raises UserError."""
    checkpoint = load_checkpoint(path)
    if not checkpoint.keys() >= {"step", "optimizer", "config", "images", "losses", "rows", "seconds"}:
        raise UserError(f"--resume: {path} was not written by moco.py train")
    return checkpoint


def check_resume(config: Config, checkpoint: dict[str, Any], images: int) -> None:
    """Raise UserError if a run cannot go on from a checkpoint under these options and with so many images."""
    for name, value in dataclasses.asdict(config).items():
        old = checkpoint["config"].get(name, getattr(Config, name))
        if (value != old and name not in RESUMABLE) or (name == "epochs" and value < old):
            raise UserError(f"{flag(name)} {value}: --resume goes on with the {old} of {config.out}")
    if images != checkpoint["images"]:
        raise UserError(f"--data {config.data}: {images} images; {config.out} was trained on {checkpoint['images']}")


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[TextIO]:
    """Open a file while no other process has it open so; remove it if it is empty in the end. Raises UserError."""
    try:
        file = open(path, "a+", newline="")
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written to ({error.strerror})") from error
    with file:
        if os.name == "posix":  # a lock that ends with the process, however that ends; Windows has none
            import fcntl

            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                why = f"another run writes to {path}, or it cannot be locked ({error.strerror})"
                raise UserError(f"--out: {why}; let that run end, or give another --out") from error
        try:
            yield file
        finally:
            if path.exists() and not path.stat().st_size:
                with contextlib.suppress(PermissionError):  # Windows keeps what is open
                    path.unlink()


def write_rows(file: TextIO, rows: list[dict[str, Any]]) -> None:
    """Replace what a .csv file holds by rows, under a line of their names if there are any. Raises UserError."""
    try:
        file.truncate(0)
        csv.writer(file).writerows([*rows[:1], *(row.values() for row in rows)])  # a row itself yields its names
        file.flush()
    except OSError as error:
        raise UserError(f"--out: {file.name} not written ({error.strerror})") from error


@dataclass
class Progress:
    """Tell where a run stands after a step, and, after an epoch's last, that epoch's row of the .csv."""

    step: int
    steps: int
    loss: Tensor
    lr: float
    row: dict[str, Any] | None = None


class Run:
    """Train a model as a configuration says, from the start or, with `resume`, from where `out` stopped.

    All that a run accumulates is in its checkpoint: model, optimizer, step, this epoch's losses (steps an epoch,) and
    seconds, and the past epochs' rows. The rest is a function of the configuration and the step. Raises UserError for
    what options, data, device and checkpoint cannot do together, before anything is written.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device, self.autocast = pick_device(config)
        join_processes(self.device)
        for first in (True, False):  # the process of rank 0 downloads for the others
            if first == (ranks()[0] == 0):
                self.data = load_data(config, self.device)
            agreed(0)  # wait for it
        check_run(config, self.data)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.model = build_model(config, len(self.data.train)).to(self.device, memory_format=torch.channels_last)
        for encoder in self.model.children() if config.compile else ():
            encoder.compile()
        kind = Muon if config.optimizer == "muon" else partial(torch.optim.SGD, weight_decay=config.wd, fused=True)
        self.optimizer: torch.optim.Optimizer = kind(self.model.encoder_q.parameters(), config.lr, momentum=0.9)
        self.split_two_views = SplitTwoViews(Augment(config.aug, config.size, config.min_crop), config.seed)
        self.per_epoch = len(self.data.train) // config.batch_size
        self.losses = torch.zeros(self.per_epoch, device=self.device)
        self.step, self.seconds, self.rows = 0, 0.0, []
        if config.resume:
            self.restore(load_run(config.out))
        self.forward = self.model if ranks()[1] == 1 else DistributedDataParallel(self.model, **{OWN_BUFFERS: False})

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Go back to where a checkpoint was saved."""
        check_resume(self.config, checkpoint, len(self.data.train))
        weights = {name.removeprefix("module."): x for name, x in checkpoint["state_dict"].items()}
        load_weights(self.model, weights, self.config.out)
        options = self.optimizer.param_groups[0]
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.optimizer.param_groups[0].update(options)
            self.losses.copy_(checkpoint["losses"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"--resume: {self.config.out}: its optimizer is of another model") from error
        self.step, self.seconds, self.rows = (checkpoint[name] for name in ("step", "seconds", "rows"))

    def save(self, log: TextIO | None) -> None:
        """Write checkpoint and .csv, in the process that holds the latter.

        Raises UserError, and keeps those of before, once a number is not finite.
        """
        weights = self.model.state_dict()
        bad = (~self.losses.isfinite()).nonzero().flatten().tolist()
        if bad or not all(x.isfinite().all() for x in weights.values()):
            first = (self.step - 1) // self.per_epoch * self.per_epoch + 1  # step of this epoch
            step = first + bad[0] if bad else self.step
            rate = learning_rate(self.config, (step - 1) / self.per_epoch)
            raise UserError(
                f"step {step}: loss or weights are not finite, at learning rate {rate:.3g}; use a lower --lr or "
                f"--precision fp32, from the start or, if {self.config.out} was saved before, with --resume"
            )
        checkpoint = {
            "epoch": self.step // self.per_epoch, "step": self.step, "arch": self.config.arch,
            "state_dict": {f"module.{name}": x for name, x in weights.items()},
            "optimizer": self.optimizer.state_dict(), "config": dataclasses.asdict(self.config),
            "images": len(self.data.train), "losses": self.losses, "rows": self.rows,
            "seconds": time.perf_counter() - self.began,
        }  # fmt: skip
        if log:
            save_checkpoint(self.config.out, checkpoint)
            write_rows(log, self.rows)

    def train(self, stop: Callable[[], Any] = lambda: False) -> Iterator[Progress]:
        """Yield after every step; save after every epoch, now and then in between, and at the end or once `stop()`.

        Raises UserError for a file that is no image, a number that is not finite, a disk that takes no checkpoint.
        """
        config, saved = self.config, time.monotonic()
        with exclusive(log_of(config.out)) if ranks()[0] == 0 else contextlib.nullcontext() as log:
            if log:
                Path(f"{config.out}.tmp").unlink(missing_ok=True)
                write_rows(log, self.rows)
            self.began = time.perf_counter() - self.seconds
            plan, again = itertools.tee(itertools.islice(batch_plan(len(self.data.train), config), self.step, None))
            batches = self.data.train.batches(plan, self.split_two_views.two_crops)
            for images, (_, indices) in zip(batches, again):
                progress = self.take_step(images, indices)
                ended = self.step % self.per_epoch == 0
                due = ended or config.save_every_steps and self.step % config.save_every_steps == 0
                due = agreed(2 if stop() else int(due or time.monotonic() - saved > SAVE_SECONDS))
                if due:
                    self.average_statistics()
                    try:
                        progress.row = self.end_epoch() if ended else None
                    finally:  # an image that kNN cannot read costs no epoch
                        self.save(log)
                    saved = time.monotonic()
                yield progress
                if due == 2:
                    return

    def average_statistics(self) -> None:
        """Give all processes the mean of their BatchNorm statistics, which are those of one process with P splits."""
        for name, statistic in self.model.named_buffers():
            if "running_" in name and ranks()[1] > 1:
                statistic.copy_(gathered(statistic[None]).mean(0))

    def take_step(self, images: Tensor, indices: Tensor) -> Progress:
        """Train on a batch. Nothing in here waits for the device."""
        generator = rng("step", self.config.seed, self.step)
        x_q, x_k = self.split_two_views(images, generator)
        with self.autocast():
            loss = self.forward(x_q, x_k, generator, indices)
        lr = self.optimizer.param_groups[0]["lr"] = learning_rate(self.config, self.step / self.per_epoch)
        self.optimizer.zero_grad()
        loss.backward()
        with self.autocast():  # of Muon's matrix products
            self.optimizer.step()
        self.losses[self.step % self.per_epoch] = gathered(loss.detach()[None]).mean()
        self.step += 1
        return Progress(self.step, self.config.epochs * self.per_epoch, loss.detach(), lr)

    def end_epoch(self) -> dict[str, Any]:
        """Measure kNN if it is due, and return the epoch's row, which is added to `rows`."""
        config, epoch = self.config, self.step // self.per_epoch
        row = {"epoch": epoch, "loss": self.losses.mean().item(), "lr": learning_rate(config, epoch - 1), "knn": None}
        row["images_per_s"] = self.per_epoch * config.batch_size / (time.perf_counter() - self.began)
        due = epoch == config.epochs or (config.knn_every and epoch % config.knn_every == 0)
        try:
            if due and self.data.test is not None:
                row["knn"] = accuracy(self.model.encoder_q, self.data, config, self.autocast)
        finally:
            row["seconds"] = time.perf_counter() - self.began
            self.began = time.perf_counter()
            self.rows.append(row)
        return row


# ────────────────────────────────────────────── Command line ──────────────────────────────────────────────


def as_typer(command: Callable, *options: str) -> Callable:
    """Make a function's annotations Typer's: arguments, flags and, in place of its **options, those fields of Config.

    The latter are None unless given, so that what was given can be told from a preset's defaults.
    """
    import typer

    hints = get_type_hints(Config, include_extras=True) | get_type_hints(command, include_extras=True)
    parameters = list(inspect.signature(command).parameters.values())[:-1]
    for i, parameter in enumerate(parameters):
        kind, text, *_ = get_args(hints[parameter.name])
        make = typer.Argument if parameter.default is parameter.empty else partial(typer.Option, flag(parameter.name))
        parameters[i] = parameter.replace(annotation=Annotated[kind, make(help=text)])
    for name in options:
        (kind, text, *_), default = get_args(hints[name]), getattr(Config, name)
        kind = list[int] if isinstance(default, tuple) else kind
        hint = Annotated[kind | None, typer.Option(help=text, show_default=str(default) or False)]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint))

    def call(**arguments: Any) -> None:
        command(**arguments)

    call.__name__, call.__doc__, call.__signature__ = command.__name__, command.__doc__, inspect.Signature(parameters)
    return call


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Keep the options that stood on the command line."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items() if v is not None and v != []}


def check_new(out: str, options: dict[str, Any]) -> None:
    """Raise UserError if a command's output has no place, or a file in its way, before any work is done."""
    if not has_place(Path(out)):
        raise UserError(f"{out}: must be a file in a folder that exists")
    if Path(out).exists() and not options["overwrite"]:
        raise UserError(f"{out}: exists already; give --overwrite to replace it")


def write_new(out: str, write: Callable[[BinaryIO], Any]) -> None:
    """Have `write` fill a command's output, a file or, for -, stdout."""
    if out == "-":
        write(sys.stdout.buffer)
    else:
        write_file(out, write)
        print(f"wrote {out}")


def print_result(text: str, result: dict[str, Any], as_json: bool) -> None:
    """Print a result as one line of text or as one JSON object."""
    print(json.dumps(result) if as_json else text.format(**result))


def describe(row: dict[str, Any], config: Config) -> str:
    """Sum an epoch up in a line."""
    left = datetime.timedelta(seconds=round(row["seconds"] * (config.epochs - row["epoch"])))
    line = f"epoch {row['epoch']}/{config.epochs}  loss {row['loss']:.4f}  lr {row['lr']:.4g}"
    knn = "" if row["knn"] is None else f"  kNN {row['knn']:.2f} %"
    return f"{line}  {row['images_per_s']:.0f} images/s  ETA {left}{knn}"


def survey(run: Run) -> str:
    """Say what a run found: images, labels and where it computes."""
    train, test, classes = run.data.train, run.data.test, run.data.classes
    labels = "without labels" if test is None else f"of {classes} classes, {len(test)} to test on"
    with run.autocast():
        precision = "bf16" if torch.is_autocast_enabled(run.device.type) else "fp32"
    return f"{run.config.data}: {len(train)} images {labels}; {run.device}, {precision}"


def show(run: Iterable[Progress], config: Config) -> None:
    """Draw a run's progress on a terminal, and print a line an epoch anywhere."""
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    texts = (TextColumn(f"{name} {{task.fields[{name}]}}") for name in ("epoch", "loss", "lr", "images/s"))
    bar = Bar(BarColumn(), *texts, TextColumn("ETA"), TimeRemainingColumn())
    bar.disable = not bar.console.is_terminal
    with bar:
        task, shown = bar.add_task("", **{"epoch": 1, "loss": "…", "lr": "…", "images/s": "…"}), 0.0
        for progress in run:
            now = time.monotonic()
            if bar.console.is_terminal and (progress.row or now - shown > 0.5):  # a loss that is read is waited for
                speed = f"{(bar.tasks[task].speed or 0) * config.batch_size:.0f}"
                fields = {"epoch": 1 + (progress.step - 1) * config.epochs // progress.steps, "images/s": speed}
                fields |= {"loss": f"{progress.loss:.3f}", "lr": f"{progress.lr:.4f}"}
                bar.update(task, completed=progress.step, total=progress.steps, **fields)
                shown = now
            if progress.row:
                bar.console.print(describe(progress.row, config), highlight=False, soft_wrap=True)


@contextlib.contextmanager
def held_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM, so that a run can end in order. Where one process runs, a second one acts at once."""
    received: list[int] = []

    def hold(number: int, _: Any) -> None:
        received.append(number)
        if ranks()[1] == 1:  # since torchrun repeats a signal that the terminal has sent already
            restore()

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    handlers = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        restore()


def working(text: str) -> contextlib.AbstractContextManager:
    """Say on a terminal, while it lasts, what takes so long."""
    from rich.console import Console

    return Console(stderr=True).status(text)


def recorded(run: Iterable[Progress], folder: str) -> Iterator[Progress]:
    """Write each epoch's row into TensorBoard's files, too. Raises UserError without that package or a folder."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder)
    except OSError as error:
        raise UserError(f"--tensorboard {folder}: cannot be written to ({error.strerror})") from error
    except ImportError as error:
        raise UserError("--tensorboard: needs a package of that name: pip install tensorboard") from error
    with writer:
        for progress in run:
            for name, value in (progress.row or {}).items():
                if name != "epoch" and value is not None:
                    writer.add_scalar(name, value, progress.row["epoch"])
            yield progress


def reopen(path: str, explicit: dict[str, Any]) -> tuple[ResNetEncoder, Data, Config, Callable, int]:
    """Load a checkpoint: its encoder, images, configuration with the explicit options in it, autocast and epoch."""
    checkpoint = load_checkpoint(path)
    encoder = load_encoder(checkpoint, path)
    official = PRESETS["v2" if encoder.conv1.stride == (2, 2) else "cifar10"]
    if "size" in explicit:  # it outranks the checkpoint's --eval-size
        explicit = {"eval_size": 0, **explicit}
    config = Config(**{**checkpoint.get("config", official), **explicit})
    device, autocast = pick_device(config)
    encoder.to(device, memory_format=torch.channels_last)
    with working(f"reading {config.data}"):
        return encoder, load_data(config, device), config, autocast, checkpoint["epoch"]


def evaluate(path: str, head: bool, linear: bool, explicit: dict[str, Any]) -> dict[str, Any]:
    """Measure a checkpoint's accuracy, and return it with the settings that led to it."""
    encoder, data, config, autocast, epoch = reopen(path, explicit)
    check_data(config, data, linear)
    with working(f"evaluating on {len(data.train)} and {len(data.test)} images"):
        top1 = accuracy(encoder, data, config, autocast, head, linear)
    result = {"top1": top1, "features": "head" if head else "backbone"}
    result |= {} if linear else {"k": config.knn_k, "T": config.knn_t}
    result |= {"data": config.data, "bank": len(data.train), "queries": len(data.test)}
    return result | {"checkpoint": path, "epoch": epoch, "device": next(encoder.parameters()).device.type}


CHECKPOINT = Annotated[str, "file that train wrote, or an official one"]
OUT = Annotated[str, "file to write; -: stdout"]
HEAD = Annotated[bool, "take the head's output, not pooled features"]
JSON = Annotated[bool, "print one JSON object"]


def train(**options: Any) -> None:
    """Train an encoder without labels."""
    explicit = given(options)
    if explicit.get("resume"):
        out = explicit.get("out", Config.out)
        config = Config(**load_run(out)["config"] | {"out": out} | explicit)
    else:
        config = Config.from_preset(**explicit)
    with working(f"reading {config.data}"):
        run = Run(config)
    if ranks()[0]:
        sys.stdout = open(os.devnull, "w")
    print(survey(run))
    with held_signals() as received:
        steps = run.train(lambda: received)
        show(recorded(steps, config.tensorboard) if config.tensorboard and not ranks()[0] else steps, config)
    if run.step < config.epochs * run.per_epoch:
        place = shlex.quote(config.out)
        print(f"stopped after step {run.step}; to go on: python moco.py train --resume --out {place}")
        sys.exit(128 + (received or [signal.SIGTERM])[0])  # another process may have been the one that got it
    what = "accuracy: python moco.py knn {}" if run.data.test else "neighbours: python moco.py neighbors {} near.png"
    print(f"{config.out} holds all {config.epochs} epochs; its {what.format(shlex.quote(config.out))}")


def knn(checkpoint: CHECKPOINT, head: HEAD = False, json: JSON = False, **options: Any) -> None:
    """Classify the test images by their nearest training images in a checkpoint's features."""
    result = evaluate(checkpoint, head, False, given(options))
    print_result("kNN top-1 {top1:.2f} % (k {k}, T {T}, {features})", result, json)


def linear(checkpoint: CHECKPOINT, head: HEAD = False, json: JSON = False, **options: Any) -> None:
    """Classify the test images by a linear classifier fitted to the training images' features."""
    print_result("linear top-1 {top1:.2f} % ({features})", evaluate(checkpoint, head, True, given(options)), json)


def export(checkpoint: CHECKPOINT, out: OUT, **options: Any) -> None:
    """Write a checkpoint's backbone, less the head, under torchvision's names."""
    check_new(out, options)
    weights = load_encoder(load_checkpoint(checkpoint), checkpoint).state_dict()
    write_new(out, partial(torch.save, {name: x for name, x in weights.items() if not name.startswith("fc.")}))


def views(out: OUT, **options: Any) -> None:
    """Draw a picture (PNG) of images and the views that training makes of them."""
    check_new(out, options)
    config = dataclasses.replace(Config.from_preset(**given(options)), cache=False, workers=0)  # for a few images
    with working(f"reading {config.data}"):
        picture = draw_views(load_data(config, torch.device("cpu")), config)
    write_new(out, partial(torchvision.utils.save_image, picture, format="png"))


def neighbors(checkpoint: CHECKPOINT, out: OUT, **options: Any) -> None:
    """Draw a picture (PNG) of test images and their nearest training images in a checkpoint's features."""
    check_new(out, options)
    encoder, data, config, autocast, _ = reopen(checkpoint, given(options))
    with working(f"embedding {len(data.train)} images"):
        picture = draw_neighbours(encoder, data, config, autocast)
    write_new(out, partial(torchvision.utils.save_image, picture, format="png"))


EVALUATION = ("data", "root", "size", "eval_size", "workers", "cache", "aug", "device", "precision")
COMMANDS: dict[Callable, tuple[str, ...]] = {  # each with the fields of Config that are its options
    train: tuple(field.name for field in dataclasses.fields(Config)),
    knn: (*EVALUATION, "knn_k", "knn_t"),
    linear: EVALUATION,
    export: ("overwrite",),
    views: ("preset", "data", "root", "size", "aug", "min_crop", "seed", "overwrite"),
    neighbors: (*EVALUATION, "seed", "overwrite"),
}


def command_line() -> Any:
    """Make the Typer application."""
    import typer

    app = typer.Typer(help=__doc__.splitlines()[0], no_args_is_help=True, pretty_exceptions_enable=False)

    @app.callback(invoke_without_command=True)
    def say_version(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
        if version:
            print(f"moco.py {__version__}")
            raise typer.Exit

    for command, options in COMMANDS.items():
        app.command()(as_typer(command, *options))
    return app


def main(argv: list[str] | None = None) -> None:
    """Run a command; a user's mistake, or too little memory, costs one line on stderr and exit status 2."""
    try:
        command_line()(args=argv)
    except (UserError, RuntimeError) as error:
        if "tried to allocate" in str(error).lower():  # as torch says of every device
            error = "not enough memory; take a smaller --size, --batch-size or --width, or another --device"
        elif not isinstance(error, UserError):
            raise
        print(f"moco: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        end_workers()
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    main()
