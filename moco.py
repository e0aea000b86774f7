# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "typer>=0.19"]
# ///
# SPDX-License-Identifier: MIT
"""Momentum Contrast (MoCo) in one file: the method first, then what trains and evaluates it.

MoCo v1: He et al., arXiv 1911.05722; v2: Chen et al., arXiv 2003.04297. One training step:

    images uint8 (N,3,H,W) ──SplitTwoViews──► x_q, x_k float (N,3,S,S)
    x_q ── encoder_q ──► q (N,C) ───────────────────────────┐
    x_k ── shuffle ── encoder_k ── unshuffle ──► k (N,C) ───┼─► info_nce(q, k, queue) ─► loss ─► SGD on θ_q
                                                            └─► dequeue_and_enqueue(k)
    every step begins with  θ_k ← m·θ_k + (1−m)·θ_q
    evaluation: encoder_q's pooled features (N,D) ──► kNN, linear classifier

Shapes: N images per batch and process, P processes, S pixels per side of a view, D features,
C embedding dimensions, K keys in the queue, M images in a data set.
test_moco.py is the specification.
"""

import contextlib
import copy
import csv
import ctypes
import hashlib
import inspect
import io
import itertools
import math
import os
import re
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from json import dumps
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, get_args, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as tvf
from PIL import Image, ImageMode
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

__version__ = "0.2.0"

# ────────────────────────────────── Random numbers and processes ──────────────────────────────────


def rng(*key: int | str) -> Generator:
    """Return a CPU generator seeded by the key alone, e.g. ("step", seed, step)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()  # the seed's bits that torch uses
    return Generator().manual_seed(int.from_bytes(digest, "little"))


def world_size() -> int:
    """Return the number P of processes that train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, from 0 to P−1."""
    return dist.get_rank() if world_size() > 1 else 0


def local_rows(x: Tensor) -> Tensor:
    """Return this rank's rows (N,…) of a tensor (P·N,…) of the global batch."""
    return x.chunk(world_size())[rank()]


def uniform(generator: Generator, n: int, *shape: int) -> Tensor:
    """Draw numbers in [0,1) for this rank's n images: (n,*shape). Each rank draws for the global batch
    and keeps its own rows, so results do not depend on the number of ranks."""
    return local_rows(torch.rand(world_size() * n, *shape, generator=generator))


class AllGather(torch.autograd.Function):
    """All-gather with gradient: backward sums the gradients of all ranks and keeps this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(rows, x)
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # all_reduce writes into it
        dist.all_reduce(gradient)
        return local_rows(gradient)


def all_gather(x: Tensor) -> Tensor:
    """Return the rows (P·N,…) of all ranks' x (N,…), in rank order, with gradient."""
    return AllGather.apply(x.contiguous()) if world_size() > 1 else x


# ──────────────────────────────────────────── Contrast ────────────────────────────────────────────


def info_nce(q: Tensor, k: Tensor, negatives: Tensor, T: float, ignore: Tensor | None = None) -> Tensor:
    """Return InfoNCE, MoCo eq. 1: −q·k₊/T + log( exp(q·k₊/T) + Σᵢ exp(q·kᵢ/T) ), the mean over N.
    q, k (N,C): unit rows; negatives (C,K): unit columns; ignore (N,K): True where one does not count.
    Equals cross-entropy over the K+1 logits [q·k₊, q·kᵢ]/T with label 0, in float32 or float64
    under any autocast. Raises ValueError if queries and negatives differ in dimension."""
    if q.shape[1] != len(negatives):
        raise ValueError(f"queries have {q.shape[1]} dimensions, but dim is {len(negatives)}")
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, negatives = q.to(dtype) / T, negatives.to(dtype)
        positive = (q * k).sum(1)  # (N,)
        logits = q @ negatives  # (N,K)
        if ignore is not None:
            logits = logits.masked_fill(ignore, -math.inf)
        return (torch.logaddexp(positive, logits.logsumexp(1)) - positive).mean()


def embed(encoder: nn.Module, x: Tensor) -> Tensor:
    """Return the embeddings of views x (N,3,S,S) as unit rows (N,C), in float32 or float64."""
    z = encoder(x)
    return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)


def shuffled_keys(encoder: nn.Module, im_k: Tensor, generator: Generator | None) -> Tensor:
    """Return all ranks' keys (P·N,C) of views im_k (N,3,S,S), embedded in a random order.
    ShuffleBN, 1911.05722, section 3.3: a query and its key are normalized with different images, so
    BatchNorm's statistics do not tell which key is whose. The keys are returned in the views' order.
    Raises ValueError if there are several ranks and no generator."""
    if generator is None and world_size() > 1:
        raise ValueError("several processes need a generator, with the same seed in each")
    im_k = all_gather(im_k)
    order = torch.randperm(len(im_k), generator=generator).to(im_k.device, non_blocking=True)
    return all_gather(embed(encoder, im_k[local_rows(order)]))[order.argsort()]


class MoCo(nn.Module):
    """Contrast queries with a queue of keys from a momentum encoder: MoCo, 1911.05722, algorithm 1.
    encoder: any module that maps a batch to (N,dim); it becomes encoder_q. encoder_k starts as an
    equal copy and gets no gradients. queue (dim,K): unit columns, random at first. queue_ptr (1,)
    int64: column of the oldest key. In eval mode the loss is computed and nothing moves."""

    def __init__(
        self, encoder: nn.Module, dim: int = 128, K: int = 4096, m: float = 0.99, T: float = 0.1,
        symmetric: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.K, self.m, self.T, self.symmetric = K, m, T, symmetric
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def momentum_update(self) -> None:
        """Move the key encoder, eq. 2: θ_k ← m·θ_k + (1−m)·θ_q, of parameters only."""
        for theta_k, theta_q in zip(self.encoder_k.parameters(), self.encoder_q.parameters()):
            theta_k.lerp_(theta_q, 1 - self.m)

    @torch.no_grad()
    def dequeue_and_enqueue(self, keys: Tensor) -> None:
        """Replace the queue's oldest keys by keys (N,C), for any N; if N > K, the newest K stay."""
        columns = (self.queue_ptr + torch.arange(len(keys), device=keys.device)) % self.K
        self.queue.index_copy_(1, columns[-self.K :], keys[-self.K :].T.to(self.queue))
        self.queue_ptr.add_(len(keys)).remainder_(self.K)

    def forward(self, im_q: Tensor, im_k: Tensor, generator: Generator | None = None, *_: Any) -> Tensor:
        """Return the loss of two views (N,3,S,S) of the same images, then enqueue the keys.
        symmetric: add the loss with the views exchanged and enqueue both batches of keys. generator:
        draws the shuffle. All mechanisms are called with (im_q, im_k, generator, indices)."""
        if self.training:
            self.momentum_update()
        q = embed(self.encoder_q, im_q)  # (N,C)
        k = shuffled_keys(self.encoder_k, im_k, generator).detach()  # (P·N,C): no gradient to keys
        queue = self.queue.clone()  # backward needs it as it was
        loss = info_nce(q, local_rows(k), queue, self.T)
        if self.symmetric:
            q = embed(self.encoder_q, im_k)
            other_k = shuffled_keys(self.encoder_k, im_q, generator).detach()
            loss = loss + info_nce(q, local_rows(other_k), queue, self.T)
            k = torch.cat([k, other_k])
        if self.training:
            self.dequeue_and_enqueue(k)
        return loss


def positive_mask(keys: Tensor) -> Tensor:
    """Mark each local query's own key among all ranks' keys (P·N,C): bool (N,P·N)."""
    return local_rows(torch.eye(len(keys), dtype=torch.bool, device=keys.device))


class EndToEnd(nn.Module):
    """Contrast queries with the batch's other keys, gradients into both: 1911.05722, figure 2a."""

    def __init__(self, encoder: nn.Module, T: float = 0.1) -> None:
        super().__init__()
        self.encoder_q, self.T = encoder, T

    def forward(self, im_q: Tensor, im_k: Tensor, generator: Generator | None = None, *_: Any) -> Tensor:
        """Return the loss of two views (N,3,S,S)."""
        q = embed(self.encoder_q, im_q)
        k = shuffled_keys(self.encoder_q, im_k, generator)
        return info_nce(q, local_rows(k), k.T, self.T, ignore=positive_mask(k))


class MemoryBank(nn.Module):
    """Contrast queries with stored embeddings: 1911.05722, figure 2b; InstDisc, 1805.01978.
    bank (num_images,dim): one unit row per image, random at first. The key of an image is its row,
    the negatives are K rows drawn with replacement. In training, row ← normalize(m·row + (1−m)·q)."""

    def __init__(
        self, encoder: nn.Module, num_images: int, dim: int = 128, K: int = 4096, m: float = 0.5, T: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder_q, self.K, self.m, self.T = encoder, K, m, T
        self.register_buffer("bank", F.normalize(torch.randn(num_images, dim), dim=1))

    def forward(self, im_q: Tensor, im_k: Tensor, generator: Generator | None, indices: Tensor) -> Tensor:
        """Return the loss of views im_q (N,3,S,S) of the images `indices` (N,); im_k is not used."""
        indices = indices.to(im_q.device, non_blocking=True)
        drawn = torch.randint(len(self.bank), (self.K,), generator=generator)
        drawn = drawn.to(im_q.device, non_blocking=True)
        q = embed(self.encoder_q, im_q)
        k = self.bank[indices]
        loss = info_nce(q, k, self.bank[drawn].T, self.T, ignore=drawn == indices[:, None])
        if self.training:
            rows = F.normalize(torch.lerp(q.detach().to(k), k, self.m), dim=1)
            self.bank[all_gather(indices)] = all_gather(rows)
        return loss


class SimCLR(EndToEnd):
    """Contrast both views with all other views of the batch: NT-Xent, 2002.05709, eq. 1."""

    def forward(self, im_q: Tensor, im_k: Tensor, *_: Any) -> Tensor:
        """Return the loss of two views (N,3,S,S): mean over 2N queries, 2·P·N−2 negatives each."""
        z_q, z_k = embed(self.encoder_q, im_q), embed(self.encoder_q, im_k)
        all_q, all_k = all_gather(z_q), all_gather(z_k)
        ignore = positive_mask(all_q).repeat(2, 2)  # the query itself and its positive
        queries, keys = torch.cat([z_q, z_k]), torch.cat([z_k, z_q])
        return info_nce(queries, keys, torch.cat([all_q, all_k]).T, self.T, ignore)


# ──────────────────────────────────────────── Encoder ─────────────────────────────────────────────


def choose(table: dict[str, Any], name: str, what: str) -> Any:
    """Return table[name]. Raises ValueError that lists the names there are."""
    if name not in table:
        raise ValueError(f"{what} {name!r}: choose from {', '.join(table)}")
    return table[name]


class SplitBatchNorm(nn.BatchNorm2d):
    """Normalize `num_splits` contiguous groups of the batch separately, as that many GPUs would.
    The running statistics move once per forward, by the mean of the groups' statistics. Eval mode,
    names and options are BatchNorm2d's. Raises ValueError if a training batch cannot be split evenly."""

    def __init__(self, num_features: int, num_splits: int = 8, **batchnorm_options: Any) -> None:
        super().__init__(num_features, **batchnorm_options)
        self.num_splits = num_splits

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        if len(x) % self.num_splits:
            raise ValueError(f"a batch of {len(x)} cannot be split into {self.num_splits} groups")
        groups = x.chunk(self.num_splits)
        means = variances = [None] * self.num_splits  # F.batch_norm then keeps no running statistics
        momentum = self.momentum or 0.0
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a cumulative average, as in BatchNorm2d
                momentum = 1 / float(self.num_batches_tracked)
            means = self.running_mean.repeat(self.num_splits, 1)  # F.batch_norm moves one row per group
            variances = self.running_var.repeat(self.num_splits, 1)
        normalized = [
            F.batch_norm(group, mean, variance, self.weight, self.bias, True, momentum, self.eps)
            for group, mean, variance in zip(groups, means, variances)
        ]
        if self.track_running_stats:
            self.running_mean.copy_(means.mean(0))
            self.running_var.copy_(variances.mean(0))
        return torch.cat(normalized)


ARCHS: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, int]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1), {}),
    "resnet18": (BasicBlock, (2, 2, 2, 2), {}),
    "resnet34": (BasicBlock, (3, 4, 6, 3), {}),
    "resnet50": (Bottleneck, (3, 4, 6, 3), {}),
    "resnet101": (Bottleneck, (3, 4, 23, 3), {}),
    "resnext50_32x8d": (Bottleneck, (3, 4, 6, 3), {"groups": 32, "base_width": 8}),
}
STEMS = {"cifar": (3, 1), "imagenet": (7, 2)}  # kernel and stride of the first convolution


class ResNetEncoder(nn.Module):
    """Embed images by a ResNet, 1512.03385, with torchvision's blocks and names, and a head `fc`.
    stem: "cifar" (3×3, for small images) or "imagenet" (7×7, stride 2, max-pool). width: factor on
    all channels. mlp: the 2-layer head of MoCo v2, else a linear one. feature_dim: D.
    Raises ValueError for an unknown arch or stem."""

    def __init__(
        self, arch: str = "resnet18", dim: int = 128, mlp: bool = True, bn_splits: int = 8,
        stem: str = "cifar", width: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        block, depths, options = choose(ARCHS, arch, "arch")
        kernel, stride = choose(STEMS, stem, "stem")
        norm = partial(SplitBatchNorm, num_splits=bn_splits)
        planes = channels = int(64 * width)  # of a block's 3×3 convolutions, and of its input
        self.conv1 = nn.Conv2d(3, channels, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = norm(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, 2, padding=1)
        for i, depth in enumerate(depths):
            layer = nn.Sequential()
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                out = planes * block.expansion
                shortcut = None
                if out != channels:
                    shortcut = nn.Sequential(conv1x1(channels, out, stride), norm(out))
                layer.append(block(channels, planes, stride, shortcut, norm_layer=norm, **options))
                channels = out
            self.add_module(f"layer{i + 1}", layer)
            planes *= 2
        self.feature_dim = channels
        self.fc: nn.Module = nn.Linear(channels, dim)
        if mlp:
            self.fc = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, dim))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """Return the pooled features (N,D) of images x (N,3,S,S), before the head."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings (N,dim), not normalized."""
        return self.fc(self.features(x))


# ───────────────────────────────────────────── Views ──────────────────────────────────────────────
#
# Images x are float (N,3,H,W) in [0,1]; parameters have one row per image. To choose between images,
# torch.lerp with weights 0 and 1 takes a twentieth of torch.where's time on a CPU.


def crop_boxes(u: Tensor, height: int, width: int, scale: tuple[float, float]) -> Tensor:
    """Turn uniform u (N,4,10) into torchvision's RandomResizedCrop: boxes (N,4) of top, left, h, w.
    The area is uniform in `scale`, a fraction of the image; log(aspect ratio) in ±log(4/3). The first
    of ten tries that fits into the image counts, else the center, at the nearest ratio to its own."""
    u = u.transpose(0, 1)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[0])
    ratio = (math.log(4 / 3) * (2 * u[1] - 1)).exp()
    h = (area / ratio).sqrt().round()
    w = (area * ratio).sqrt().round()
    top = u[2] * (height - h + 1)  # floored by boxes.long()
    left = u[3] * (width - w + 1)
    fits = (h >= 1) & (w >= 1) & (h <= height) & (w <= width)
    first = fits.int().argmax(1, keepdim=True)
    boxes = torch.cat([x.gather(1, first) for x in (top, left, h, w)], 1)
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    center = torch.tensor([(height - h) // 2, (width - w) // 2, h, w])
    return torch.where(fits.any(1, keepdim=True), boxes.long(), center)


def resize_matrix(start: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """Return matrices (N,size,pixels) that resize [start, start+length) of a line of pixels.
    start, length (N,). Bilinear with antialiasing: triangular weights, 0 at a distance of one pixel
    of the input or of the output, whichever is larger."""
    pixel = torch.arange(pixels, device=start.device) + 0.5
    start, length = start[:, None, None], length[:, None, None]
    pitch = length / size
    center = start + pitch * (torch.arange(size, device=start.device)[:, None] + 0.5)
    weights = (1 - (pixel - center).abs() / pitch.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixel > start) & (pixel < start + length))
    return weights / weights.sum(2, keepdim=True)


def separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return rows (N,S,H) · x · columnsᵀ (N,W,S) per channel: (N,3,S,S)."""
    n, channels, height, width = x.shape
    x = x.transpose(1, 2).reshape(n, height * channels, width) @ columns.mT
    x = rows @ x.reshape(n, height, -1)
    return x.view(n, rows.shape[1], channels, columns.shape[1]).transpose(1, 2)


def crop(x: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut each image to its box (N,4) and resize it bilinearly to (N,3,size,size)."""
    top, left, h, w = boxes.unbind(1)
    rows = resize_matrix(top, h, x.shape[2], size)
    return separable(x, rows, resize_matrix(left, w, x.shape[3], size))


def blend(x: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """Adjust brightness (operation 0), contrast (1) or saturation (2) by a factor; both (N,1,1,1).
    factor·x + (1−factor)·reference, clamped to [0,1]; reference: black, the mean luma, or the luma."""
    luma = tvf.rgb_to_grayscale(x)  # (N,1,H,W)
    mean = luma.mean((1, 2, 3), keepdim=True)
    reference = torch.addcmul(mean * (operation == 1), luma, operation == 2)
    return torch.lerp(reference, x, factor).clamp_(0, 1)


def shift_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Add `turn` (N,1,1,1), in turns of the color circle, to HSV's hue. A channel is then value −
    chroma·clamp(2 − |6·frac(hue + offset) − 2|, 0, 1), its offset 5/6 for red, 3/6 green, 1/6 blue."""
    r, g, b = x.split(1, 1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    is_r = (r - value).sign_().add_(1)  # 1 where red is the largest channel, else 0
    is_g = (g - value).sign_().add_(1)
    sixths = (r - g).add_(chroma, alpha=4)
    sixths = sixths.lerp_((b - r).add_(chroma, alpha=2), is_g).lerp_(g - b, is_r)
    hue = sixths.div_(chroma.clamp(min=1e-9)).div_(6).add_(turn + 2)  # + 2: positive, for frac
    offsets = torch.arange(5, 0, -2, device=x.device)[:, None, None] / 6  # of red, green and blue
    phase = (hue + offsets).frac_()
    return value - phase.mul_(6).sub_(2).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma)


def color_jitter(x: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Apply brightness, contrast, saturation and hue (0 to 3) by factors (N,4), in orders (N,4).
    Hue costs most, so it is shifted once for the batch: up to three blends precede it, and up to three
    follow; a blend by a factor of 1 changes nothing."""
    hue = (order == 3).int().argmax(1)[:, None, None, None]  # where hue stands in each image's order
    factor = factors.gather(1, order)[:, :, None, None, None]
    order = order[:, :, None, None, None]
    for i in (0, 1, 2):
        x = blend(x, order[:, i], torch.where(i < hue, factor[:, i], 1))
    x = shift_hue(x, factors[:, 3, None, None, None])
    for i in (1, 2, 3):
        x = blend(x, order[:, i], torch.where(i > hue, factor[:, i], 1))
    return x


def random_color_jitter(x: Tensor, draw: Callable, *strengths: float) -> Tensor:
    """Draw an order and factors per image: 1 ± strength, but for hue 0 ± strength."""
    offsets = torch.stack([strength * (2 * draw(len(x)) - 1) for strength in strengths], 1)
    order = draw(len(x), 4).argsort(1)
    multiplies = torch.arange(4, device=x.device) < 3  # hue is added
    return color_jitter(x, order, multiplies + offsets)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur square images (N,3,S,S) by sigma (N,1) pixels, with reflected borders.
    The kernel has 2·⌊S/20⌋ + 1 pixels, a tenth of the side: SimCLR, 2002.05709, appendix A."""
    size = x.shape[-1]
    offsets = torch.arange(-(size // 20), size // 20 + 1, device=x.device)
    weights = (-0.5 * (offsets / sigma) ** 2).softmax(1)
    pixel = (torch.arange(size, device=x.device)[:, None] + offsets).abs()
    pixel = (size - 1 - (size - 1 - pixel).abs()).expand(len(x), -1, -1)  # reflected at both ends
    weights = weights[:, None].expand(pixel.shape)
    matrix = x.new_zeros(len(x), size, size).scatter_add_(2, pixel, weights)
    return separable(x, matrix, matrix)


TRANSFORMS: dict[str, Callable] = {  # (x, draw, *strengths) -> x; draw(*shape) is uniform in [0,1)
    "flip": lambda x, draw: x.flip(-1),
    "grayscale": lambda x, draw: tvf.rgb_to_grayscale(x),
    "jitter": random_color_jitter,
    "blur": lambda x, draw, low, high: gaussian_blur(x, low + (high - low) * draw(len(x), 1)),
}


@dataclass(frozen=True)
class Recipe:
    """Describe views: crop area, transforms (name, probability, *strengths), normalization."""

    scale: tuple[float, float]
    transforms: tuple[tuple, ...]
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    margin: float = 256 / 224  # evaluation: resize the shorter side to margin·S, center crop S×S


FLIP, GRAYSCALE, BLUR = ("flip", 0.5), ("grayscale", 0.2), ("blur", 0.5, 0.1, 2.0)
JITTER, JITTER_V1 = ("jitter", 0.8, 0.4, 0.4, 0.4, 0.1), ("jitter", 1, 0.4, 0.4, 0.4, 0.4)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
RECIPES = {
    "cifar": Recipe((0.08, 1), (FLIP, JITTER, GRAYSCALE), CIFAR_MEAN, CIFAR_STD, margin=1),
    "v1": Recipe((0.2, 1), (GRAYSCALE, JITTER_V1, FLIP)),
    "v2": Recipe((0.2, 1), (JITTER, GRAYSCALE, BLUR, FLIP)),
}


class Augment:
    """Turn images into random views by a recipe, on their device, with separate draws per image.
    The draws come from a CPU generator, so a seed gives the same views on every device.
    Raises ValueError for an unknown recipe."""

    def __init__(self, recipe: str = "cifar", size: int = 32) -> None:
        self.recipe = choose(RECIPES, recipe, "recipe")
        self.size = size
        self.mean = torch.tensor(self.recipe.mean)[:, None, None]
        self.std = torch.tensor(self.recipe.std)[:, None, None]

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Return views float (N,3,S,S) of images uint8 (N,3,H,W). Raises TypeError for others."""
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise TypeError(f"images are uint8 (N,3,H,W), not {images.dtype} {tuple(images.shape)}")
        u = uniform(generator, len(images), 4, 10)
        boxes = crop_boxes(u, *images.shape[2:], self.recipe.scale)
        crops = crop(images / 255, boxes.to(images.device, non_blocking=True), self.size)
        return self.augment_crops(crops, generator)

    def augment_crops(self, x: Tensor, generator: Generator) -> Tensor:
        """Apply the recipe's transforms at random to crops (N,3,S,S) in [0,1], and normalize."""

        def draw(*shape: int) -> Tensor:
            return uniform(generator, *shape).to(x.device, non_blocking=True)

        for name, probability, *strengths in self.recipe.transforms:
            chosen = (draw(len(x), 1, 1, 1) < probability).to(x)
            x = torch.lerp(x, TRANSFORMS[name](x, draw, *strengths), chosen)
        return self.normalize(x)

    def normalize(self, x: Tensor) -> Tensor:
        """Subtract the recipe's mean and divide by its std."""
        mean = self.mean.to(x.device, non_blocking=True)
        return (x - mean) / self.std.to(x.device, non_blocking=True)

    def center_crop(self, images: Tensor, *_: Any) -> Tensor:
        """Return what evaluation sees of uint8 (…,3,H,W), by the recipe's margin: (…,3,S,S)."""
        longest = 2 * min(images.shape[-2:])  # a panorama is cut first: resizing all of it takes gigabytes
        images = tvf.center_crop(images, [min(side, longest) for side in images.shape[-2:]])
        images = tvf.resize(images, [round(self.size * self.recipe.margin)])
        return tvf.center_crop(images, [self.size, self.size])


@dataclass
class SplitTwoViews:
    """Make two views of every image, with separate draws for each view."""

    augment: Augment
    seed: int = 0

    def __call__(self, images: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return x_q, x_k (N,3,S,S) of images uint8 (N,3,H,W), or `two_crops` (2,N,3,S,S)."""
        with torch.autocast(images.device.type, enabled=False):
            if images.dim() == 5:
                return tuple(self.augment.augment_crops(x / 255, generator) for x in images)
            return self.augment(images, generator), self.augment(images, generator)

    def two_crops(self, image: Tensor, epoch: int, index: int) -> Tensor:
        """Return both views' crops uint8 (2,3,S,S) of an image (3,H,W), at its own resolution.
        Images in memory, a batch (N,3,H,W), are returned uncropped: `__call__` crops on the device."""
        if image.dim() == 4:
            return image
        u = torch.rand(2, 4, 10, generator=rng("crop", self.seed, epoch, index))
        boxes = crop_boxes(u, *image.shape[1:], self.augment.recipe.scale)
        size = [self.augment.size, self.augment.size]
        return torch.stack([tvf.resized_crop(image, *box, size) for box in boxes.tolist()])


# ─────────────────────────────────────────── Evaluation ───────────────────────────────────────────


def knn_predict(features: Tensor, bank: Tensor, bank_labels: Tensor, classes: int, k: int, T: float) -> Tensor:
    """Return labels (N,) int64 by weighted kNN: the k nearest of bank (M,D) vote, 1805.01978.
    A neighbor at cosine similarity s has exp(s/T) votes; if the bank has fewer than k, all vote.
    Similarities are computed in chunks of at most 128 MiB. Raises ValueError for k < 1."""
    if k < 1:
        raise ValueError(f"k = {k}: at least one neighbor must vote")
    scale = 1 / bank.norm(dim=1).clamp(min=1e-12)  # scales the similarities: to normalize the bank would copy it
    predictions = []
    for chunk in F.normalize(features, dim=1).split(max(1, 2**25 // len(bank))):
        similarity, neighbors = (chunk @ bank.T).mul_(scale).topk(min(k, len(bank)))  # (n,k)
        weights = (similarity / T).softmax(1)  # exp(s/T) but for a factor per query: none overflows
        votes = weights.new_zeros(len(chunk), classes)
        votes.scatter_add_(1, bank_labels[neighbors], weights)
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def fit_linear(features: Tensor, labels: Tensor, classes: int, decay: float = 1e-4) -> nn.Linear:
    """Minimize cross-entropy + decay/2·‖W‖² of features (M,D), labels (M,): logistic regression.
    The loss is convex, and L-BFGS runs close to its minimum, so there is no learning rate to tune; the
    papers train by SGD at a learning rate of 30, 1911.05722, section 4.1. Returns a frozen layer."""
    linear = nn.Linear(features.shape[1], classes, device=features.device, dtype=features.dtype)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    search = dict(max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-7)
    optimizer = torch.optim.LBFGS(linear.parameters(), **search)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(features), labels) + decay / 2 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return linear.requires_grad_(False)


# ───────────────────────────────────────────── Config ─────────────────────────────────────────────


class UserError(ValueError):
    """A mistake that a user can correct; the message names the flag or the file and what to do."""


FROM_0, FROM_1 = (0, 10**6), (1, 10**6)  # bounds, both included


@dataclass(frozen=True)
class Config:
    """Hold the options of a run: type, help text, bounds or choices, and default, in the order of PANELS.
    Raises UserError for values that cannot work."""

    preset: Annotated[str, "defaults to start from", ("cifar10", "v1", "v2", "tiny", "cpu")] = "cifar10"
    method: Annotated[str, "what is contrasted", ("moco", "end-to-end", "memory-bank", "simclr")] = "moco"
    moco_dim: Annotated[int, "C, dimension of the embedding", (1, 2**16)] = 128
    moco_k: Annotated[int, "K, keys in the queue, or rows drawn from the bank", (1, 2**24)] = 4096
    moco_m: Annotated[float, "m, momentum of the key encoder", (0, 1)] = 0.99
    moco_t: Annotated[float, "T, temperature of the loss", (1e-3, 100)] = 0.1
    symmetric: Annotated[bool, "query with both views and add the two losses"] = False
    bank_m: Annotated[float, "momentum of the memory bank's rows", (0, 1)] = 0.5
    seed: Annotated[int, "seed of weights, order, views and shuffles", (0, 2**64 - 1)] = 0
    arch: Annotated[str, "backbone", tuple(ARCHS)] = "resnet18"
    stem: Annotated[str, "3x3, or 7x7 with stride 2 and max-pool", tuple(STEMS)] = "cifar"
    width: Annotated[float, "factor on all channels", (1 / 8, 16)] = 1.0
    mlp: Annotated[bool, "2-layer head (v2), else a linear one (v1)"] = True
    bn_splits: Annotated[int, "groups of the batch that BatchNorm normalizes separately", FROM_1] = 8
    aug: Annotated[str, "recipe of the views", tuple(RECIPES)] = "cifar"
    size: Annotated[int, "side of a view in pixels", (1, 4096)] = 32
    batch_size: Annotated[int, "images per step, of all processes", (2, 10**6)] = 512
    optimizer: Annotated[str, "muon: orthogonalized momentum, for short runs", ("sgd", "muon")] = "sgd"
    data: Annotated[str, "cifar10, cifar100, shapes (built in) or a folder of images"] = "cifar10"
    epochs: Annotated[int, "passes over the images", FROM_1] = 100
    lr: Annotated[float, "peak learning rate", (1e-6, 100)] = 0.06
    wd: Annotated[float, "weight decay of SGD", (0, 10)] = 5e-4
    cos: Annotated[bool, "cosine decay of the learning rate, else --schedule"] = True
    schedule: Annotated[tuple, "with --no-cos, epochs at which lr is divided by 10", FROM_0] = (120, 160)
    precision: Annotated[str, "auto: bf16 if the hardware has it", ("auto", "bf16", "fp32")] = "auto"
    eval_size: Annotated[int, "side of an image in evaluation; 0: same as --size", (0, 4096)] = 0
    knn_every: Annotated[int, "epochs between kNN evaluations; 0: only at the end", FROM_0] = 10
    knn_k: Annotated[int, "neighbors that vote", FROM_1] = 200
    knn_t: Annotated[float, "temperature of their votes", (1e-3, 100)] = 0.1
    head: Annotated[bool, "evaluate the output of the head, not the pooled features"] = False
    out: Annotated[str, "checkpoint to write, with a .csv of the epochs beside it"] = "ckpt.pt"
    resume: Annotated[bool, "continue the run that wrote --out, with its options"] = False
    overwrite: Annotated[bool, "replace files that exist"] = False
    save_seconds: Annotated[float, "seconds between saves within an epoch", FROM_0] = 300.0
    root: Annotated[str, "folder for the downloads of cifar10 and cifar100"] = "data"
    workers: Annotated[int, "processes that read a folder's images", FROM_0] = 2
    device: Annotated[str, "where to compute", ("auto", "cpu", "cuda", "mps")] = "auto"
    compile: Annotated[bool, "torch.compile the encoders"] = False
    json: Annotated[bool, "print JSON objects"] = False
    tensorboard: Annotated[str, "folder for TensorBoard's files, if that package is installed"] = ""

    @classmethod
    def from_preset(cls, preset: str = "cifar10", **explicit: Any) -> "Config":
        """Return a preset's options, replaced by the explicit ones."""
        return cls(**{**PRESETS.get(preset, {}), "preset": preset, **explicit})

    def __post_init__(self) -> None:
        for name in OPTIONS:
            check_option(name, getattr(self, name))
        splits = self.bn_splits
        if self.symmetric and self.method != "moco":
            raise UserError(f"--symmetric: not with --method {self.method}; give --no-symmetric")
        if splits % world_size():
            raise UserError(f"--bn-splits {splits}: must be a multiple of the {world_size()} processes")
        if self.batch_size % splits or self.batch_size < 2 * splits:
            rule = f"must be a multiple of --bn-splits {splits}, and at least twice that"
            raise UserError(f"--batch-size {self.batch_size}: {rule}")
        smallest = 9 if self.stem == "cifar" else 33  # below, layer4 has 1×1 maps: oneDNN's bf16 fails
        for name in ("size", "eval_size"):
            if (size := getattr(self, name) or self.size) < smallest:
                raise UserError(f"{flag(name)} {size}: --stem {self.stem} needs at least {smallest}")


OPTIONS = get_type_hints(Config, include_extras=True)
FIXED, HARDWARE = " (fixed on --resume)", "Files and hardware"
PANELS = {  # of --help: first option → title; --resume takes all options but HARDWARE's from the checkpoint
    "preset": "Method" + FIXED,
    "arch": "Encoder" + FIXED,
    "aug": "Views and batches" + FIXED,
    "data": "Training",
    "eval_size": "Evaluation",
    "out": HARDWARE,
}
IMAGENET = dict(arch="resnet50", stem="imagenet", size=224, data="data/imagenet", workers=16)
IMAGENET |= dict(batch_size=256, lr=0.03, wd=1e-4, epochs=200, moco_k=65536, moco_m=0.999)
TINY = dict(data="shapes", aug="v1", width=0.25, bn_splits=2, batch_size=64, moco_k=256, epochs=9)
CPU = dict(arch="resnet10", width=0.5, size=24, eval_size=32, bn_splits=2, batch_size=256, epochs=44)
CPU |= dict(moco_k=256, moco_m=0.9, optimizer="muon", knn_every=0)
PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": {},
    "v1": dict(IMAGENET, aug="v1", mlp=False, moco_t=0.07, cos=False),
    "v2": dict(IMAGENET, aug="v2", moco_t=0.2),
    "tiny": dict(TINY, knn_every=5, knn_k=20),
    "cpu": CPU,
}


def flag(name: str) -> str:
    """Spell an option as on the command line."""
    return "--" + name.replace("_", "-")


def panel_of(name: str) -> str:
    """Return the panel of --help that an option belongs to."""
    names = list(OPTIONS)
    return next(PANELS[first] for first in names[names.index(name) :: -1] if first in PANELS)


def check_option(name: str, value: Any) -> None:
    """Raise UserError unless a value has its option's type and is in its bounds or choices."""
    kind, _, *rest = get_args(OPTIONS[name])
    items = (value,)
    if kind is tuple and type(value) is tuple:
        items, kind = value, int
    valid = all(type(x) is kind or (kind is float and type(x) is int) for x in items)
    wanted = f"of type {kind.__name__}"
    if rest and kind is str:
        valid = valid and value in rest[0]
        wanted = f"one of {', '.join(rest[0])}"
    elif rest:
        low, high = rest[0]
        valid = valid and all(low <= x <= high for x in items)
        wanted += f" and from {low} to {high}"
    if not valid:
        raise UserError(f"{flag(name)} {value}: must be {wanted}")


# ────────────────────────────────────────────── Data ──────────────────────────────────────────────


@dataclass
class Split(Dataset):
    """Hold a split's images and labels (M,) int64, if any; a sampler yields its batches.
    images: uint8 (M,3,H,W) on the device, or paths of files that `workers` processes read."""

    images: Tensor | np.ndarray  # paths as bytes in an array: workers share its memory
    labels: Tensor | None
    device: torch.device
    workers: int = 0
    crop: Callable | None = None  # crop(images, epoch, indices) in memory, crop(image, epoch, index) per file

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, batch: tuple[int, Tensor]) -> tuple[Tensor, Tensor] | Exception:
        """Return a batch's cropped images uint8 (…,N,3,S,S) and indices, or a worker's error."""
        epoch, indices = batch
        if isinstance(self.images, Tensor):
            images = self.images[indices.to(self.device, non_blocking=True)]
            return self.crop(images, epoch, indices), indices
        try:
            crops = [self.crop(read_image(self.images[i]), epoch, i) for i in indices.tolist()]
            images = torch.stack(crops, dim=-4)
            # If sharing failed after the return, the DataLoader would wait for ever.
            return images.share_memory_() if get_worker_info() else images, indices
        except Exception as error:  # raised by `receive`, without a worker's traceback
            return error


def read_image(path: bytes) -> Tensor:
    """Decode an image file to RGB uint8 (3,H,W). Raises UserError if that fails or loses bits."""
    try:
        with Image.open(path) as image:
            if np.dtype(ImageMode.getmode(image.mode).typestr).itemsize > 1:
                raise ValueError("more than 8 bits per channel")
            return tvf.pil_to_tensor(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes can cause any
        cause = getattr(error, "strerror", None) or str(error).split("\n")[0]
        advice = "replace the image, or remove it and start again: --resume needs the same images"
        raise UserError(f"{os.fsdecode(path)}: cannot be read ({cause}); {advice}") from error


def ignore_signals(_: int) -> None:
    """Ignore Ctrl-C and the first SIGTERM in a worker: the process that trains acts on them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


@contextlib.contextmanager
def load_batches(split: Split, batches: Iterable, crop: Callable) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """Open an iterator over the images, cropped by `crop`, and indices of each batch (epoch, indices (N,)).
    The iterator raises UserError for an image that cannot be read."""
    options = dict(num_workers=split.workers, worker_init_fn=ignore_signals)
    if split.workers:
        options |= dict(timeout=300, pin_memory=split.device.type == "cuda")
    iterator = iter(DataLoader(replace(split, crop=crop), None, sampler=batches, **options))

    def receive(batch: tuple[Tensor, Tensor] | Exception) -> tuple[Tensor, Tensor]:
        if isinstance(batch, Exception):
            raise batch
        return batch[0].to(split.device, non_blocking=True), batch[1]

    try:
        yield map(receive, iterator)
    finally:
        for worker in getattr(iterator, "_workers", []):
            with contextlib.suppress(RuntimeError):  # torch's, about a worker that was killed
                worker.kill()  # it may be blocked: torch would wait for it
                worker.join()


@dataclass
class Data:
    """Hold the split to train on, also kNN's bank, and the one to test on, if it has labels."""

    train: Split
    test: Split | None
    found: str  # which images were found where


def load_data(config: Config, device: torch.device) -> Data:
    """Load the data set that --data names. Raises UserError where there are no images."""
    if config.data == "shapes":
        splits = [shapes(6_000, "train"), shapes(2_000, "test")]
    elif config.data in ("cifar10", "cifar100"):
        splits = [cifar(config, True), cifar(config, False)]
    else:
        return load_folder(config, device)
    train, test = (Split(x.to(device), y, device) for x, y in splits)
    return Data(train, test, f"{len(train)} images to train on, {len(test)} to test on")


def cifar(config: Config, train: bool) -> tuple[Tensor, Tensor]:
    """Return CIFAR's images uint8 (M,3,32,32) and labels (M,); rank 0 downloads them first."""
    is_new = not os.path.exists(config.root)
    if rank() > 0:
        dist.barrier()
    try:
        split = getattr(torchvision.datasets, config.data.upper())(config.root, train, download=True)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):  # there may be half a download, or no folder
            if is_new:
                os.rmdir(config.root)
        why = f"not in --root {config.root}, and the download failed ({str(error).splitlines()[0]})"
        raise UserError(f"--data {config.data}: {why}; give --data shapes, or a folder of images") from error
    if rank() == 0 and world_size() > 1:
        dist.barrier()
    return torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets)


def find_images(top: str) -> dict[str, str]:
    """Return the images below a folder, sorted, each with its subfolder of `top`; none hidden."""
    visited, found = set(), {}
    for folder, subfolders, files in os.walk(top, followlinks=True):
        place = os.path.realpath(folder)
        if place in visited:  # links can form loops
            subfolders.clear()
            continue
        visited.add(place)
        label = os.path.relpath(folder, top).split(os.sep)[0]
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        for name in files:
            if name[0] != "." and name.lower().endswith(IMG_EXTENSIONS):
                found[os.path.join(folder, name)] = label
    return dict(sorted(found.items()))


def load_folder(config: Config, device: torch.device) -> Data:
    """Find train/CLASS/* and a test split beside it; any other tree of images has no labels.
    Raises UserError for a folder without images, or images in no class."""
    root = config.data
    if not os.path.isdir(root):
        raise UserError(f"--data {root}: no such folder, and none of cifar10, cifar100, shapes")
    folders = {path.name.lower(): str(path) for path in sorted(Path(root).iterdir()) if path.is_dir()}
    top, test_top = folders.get("train", root), os.path.join(root, "val")
    train, test = find_images(top), {}
    if not train:
        raise UserError(f"--data {root}: no images in {top}; looked for {' '.join(IMG_EXTENSIONS)}")
    for name in ("test", "validation", "valid", "val"):  # the last one found counts
        if "train" in folders and name in folders and (images := find_images(folders[name])):
            test, test_top = images, folders[name]
    classes = {label: i for i, label in enumerate(sorted(set(train.values())))}
    labeled = all(set(files.values()) - {"."} for files in (train, test))
    for path, label in (train | test).items():
        if labeled and (label == "." or label not in classes):
            raise UserError(f"--data {root}: {path} is in none of the class folders {top}/*")

    def split(files: dict[str, str]) -> Split:
        labels = torch.tensor([classes[x] for x in files.values()]) if labeled else None
        return read_small(Split(np.array([os.fsencode(x) for x in files]), labels, device, workers))

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(config.workers, cores)
    found = f"{len(train)} images to train on in {top}, "
    if labeled:
        return Data(split(train), split(test), f"{found}{len(test)} to test on in {test_top}")
    train_top = folders.get("train", os.path.join(root, "train"))
    found += f"no kNN: that needs classes, {train_top}/CLASS/* and {test_top}/CLASS/*"
    return Data(split(train), None, found)


MEMORY = 2**30  # bytes


def read_small(split: Split) -> Split:
    """Read a split of files into memory if its images have one size and take up to MEMORY."""
    images: list[Tensor] = []
    for path in split.images:
        images.append(read_image(path))
        if images[-1].shape != images[0].shape or len(split) * images[0].numel() > MEMORY:
            return split
    return Split(torch.stack(images).to(split.device), split.labels, split.device)


FORMS: tuple[Callable, ...] = (  # signed distance of (|u|, |v|) from the edge of a disk, a cross
    lambda a, b: torch.hypot(a, b) - 0.9,
    lambda a, b: torch.minimum(torch.maximum(a - 0.35, b - 1), torch.maximum(b - 0.35, a - 1)),
)
TEXTURES: tuple[tuple[float, Callable], ...] = (  # waves per unit; positive where there is ink
    (1.0, lambda u, v: torch.ones_like(u)),
    (1.5, lambda u, v: u.sin()),
    (2.0, lambda u, v: u.sin() * v.sin()),
    (1.6, lambda u, v: u.cos() + v.cos() - 0.5),
    (2.8, lambda u, v: torch.maximum(u.sin(), v.sin()) - 0.8),
)


def shapes(n: int, split: str) -> tuple[Tensor, Tensor]:
    """Draw n images uint8 (n,3,32,32) and labels (n,): two forms in five textures, seeded by the split."""
    generator = rng("shapes", split)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    each = torch.arange(n)
    labels = each % 10
    angle = between(0, 2 * math.pi, 1, 1)
    radius = between(0.7, 0.95, 1, 1)
    axis = (torch.arange(32) + 0.5) / 16 - 1
    x = axis - between(-0.25, 0.25, 1, 1)
    y = axis[:, None] - between(-0.25, 0.25, 1, 1)
    u = x * angle.cos() + y * angle.sin()
    v = y * angle.cos() - x * angle.sin()
    forms = torch.stack([form((u / radius).abs(), (v / radius).abs()) for form in FORMS])
    inside = (0.5 - 16 * radius * forms[labels // 5, each]).clamp(0, 1)
    pitch = 2 * math.pi * between(0.9, 1.1, 1, 1)
    a, b = between(0, 2 * math.pi, 2, 1, 1).unbind(1)
    textures = torch.stack([f(waves * pitch * u + a, waves * pitch * v + b) for waves, f in TEXTURES])
    ink = (0.5 + 2 * textures[labels % 5, each]).clamp(0, 1)
    light = between(0, 1, 1, 1, 1)
    grays = [(light + i / 3) % 1 + between(-0.02, 0.02, 3, 1, 1) for i in range(3)]
    images = torch.lerp(grays[0], torch.lerp(grays[1], grays[2], ink[:, None]), inside[:, None])
    images += 0.02 * torch.randn(n, 3, 32, 32, generator=generator)
    return (images.clamp(0, 1) * 255).byte(), labels


@torch.no_grad()
def extract_features(encoder: nn.Module, split: Split, config: Config, autocast: Callable) -> Tensor:
    """Return a split's pooled features float32 (M,D), or embeddings with --head, in eval mode."""
    augment = Augment(config.aug, config.eval_size or config.size)
    per_rank = -(-len(split) // world_size())
    indices = local_rows(torch.arange(world_size() * per_rank).clamp(max=len(split) - 1))
    batches = ((0, batch) for batch in indices.split(512))
    embed_batch = encoder if config.head else encoder.features
    was_training = encoder.training
    encoder.eval()
    with autocast(), load_batches(split, batches, augment.center_crop) as loaded:
        features = [embed_batch(augment.normalize(images / 255)).float() for images, _ in loaded]
    encoder.train(was_training)
    return all_gather(torch.cat(features))[: len(split)]


def accuracy(encoder: nn.Module, data: Data, config: Config, autocast: Callable, linear: bool = False) -> float:
    """Return the percentage of test images that kNN (or a linear classifier) gets right."""
    bank = extract_features(encoder, data.train, config, autocast)
    features = extract_features(encoder, data.test, config, autocast)
    bank_labels, labels = data.train.labels.to(bank.device), data.test.labels.to(bank.device)
    classes = int(bank_labels.max()) + 1
    if linear:
        std, mean = torch.std_mean(bank, 0)  # of the training split, for both splits
        std = std.clamp(min=1e-6)
        classifier = fit_linear((bank - mean) / std, bank_labels, classes)
        predicted = classifier((features - mean) / std).argmax(1)
    else:
        predicted = knn_predict(features, bank, bank_labels, classes, config.knn_k, config.knn_t)
    return 100 * (predicted == labels).sum().item() / len(labels)


# ────────────────────────────────────────── Checkpoints ───────────────────────────────────────────


def write_file(path: str, write: Callable[[BinaryIO], Any]) -> None:
    """Write atomically: readers see the old file or the new one. Raises UserError if it fails."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch.save's
        raise UserError(f"{path}: not written ({str(cause).splitlines()[0]}); the old file, if any, is kept") from error


def save_checkpoint(path: str, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint atomically. Raises UserError."""
    write_file(path, partial(torch.save, checkpoint))


def check_tensors(tensors: dict[str, Any], expected: dict[str, Tensor]) -> None:
    """Raise ValueError unless tensors are finite and of the names, shapes and dtypes expected."""
    if tensors.keys() != expected.keys():
        raise ValueError(f"missing or unexpected: {min(map(str, tensors.keys() ^ expected.keys()))}")
    for name, x in tensors.items():
        # of stride 0, a tensor claims more than it holds, and an optimizer writes past its end
        if not isinstance(x, Tensor) or x.numel() * x.element_size() > x.untyped_storage().nbytes():
            raise ValueError(f"{name} is not a tensor that holds what it claims")
        right = expected[name]
        if (x.shape, x.dtype) != (right.shape, right.dtype):
            raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}, not {right.dtype} {tuple(right.shape)}")
        if not x.isfinite().all():
            raise ValueError(f"{name} is not finite")


def load_checkpoint(path: str) -> dict[str, Any]:
    """Read a checkpoint, ours or an official one, onto the CPU; nothing in it is executed.
    Raises UserError for a file that is damaged, is no checkpoint, or has values that cannot be."""
    try:
        if zipfile.is_zipfile(path):  # torch compares no checksums, and inflates or skips records
            archive = zipfile.ZipFile(path)
            odd = [x.filename for x in archive.infolist() if x.external_attr & 16 or x.compress_type]  # 16: a folder
            if damaged := odd[:1] or archive.testzip():
                raise ValueError(f"the file is damaged at {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["epoch"] = int(checkpoint["epoch"])
        checkpoint["arch"] = str(checkpoint["arch"])
        checkpoint["state_dict"] = {str(name): x for name, x in checkpoint["state_dict"].items()}
        for name, value in checkpoint.get("config", {}).items():
            if name in OPTIONS:  # others are of other versions
                check_option(name, value)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except Exception as error:  # damaged bytes can cause any
        cause = f"it is damaged, holds more than tensors and plain values, or lacks some ({type(error).__name__})"
        if isinstance(error, ValueError):
            cause = str(error).split("\n")[0]
        raise UserError(f"{path}: not a checkpoint: {cause}") from error
    return checkpoint


def load_encoder(checkpoint: dict[str, Any], path: str, head: bool = False) -> ResNetEncoder:
    """Rebuild a checkpoint's query encoder for evaluation; without `head`, fc is the identity.
    Stem, width and head are read off the weights, whose prefixes `module.` and `_orig_mod.` (of
    torch.compile) are optional. Raises UserError if they are not those of a ResNetEncoder."""
    weights = {}
    for name, x in checkpoint["state_dict"].items():
        name = name.replace("_orig_mod.", "").partition("encoder_q.")[2]
        if name and (head or not name.startswith("fc.")):
            weights[name] = x
    try:
        channels, _, kernel, _ = weights["conv1.weight"].shape
        stem, mlp = "cifar" if kernel == 3 else "imagenet", "fc.0.weight" in weights
        dim = len(weights["fc.2.bias" if mlp else "fc.bias"]) if head else 1
        with torch.device("meta"):  # nothing is allocated before all is known to fit
            encoder = ResNetEncoder(checkpoint["arch"], dim, mlp, 1, stem, channels / 64)
        if not head:
            encoder.fc = nn.Identity()
        check_tensors(weights, encoder.state_dict())
        encoder.load_state_dict(weights, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        cause = str(error).splitlines()[0]
        raise UserError(f"{path}: encoder_q is not one of {', '.join(ARCHS)} ({cause})") from error
    return encoder.eval()


# ──────────────────────────────────────────── Training ────────────────────────────────────────────


def pick_device(config: Config) -> tuple[torch.device, Callable[[], torch.autocast]]:
    """Return the device and its autocast, to bf16 where --precision asks for it or it is fast.
    Joins the processes that torchrun started. Raises UserError if there is no such device."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(x for x in found if found[x]) if config.device == "auto" else config.device
    if not found[name]:
        raise UserError(f"--device {name}: torch finds none here; give --device auto")
    device = torch.device(name)
    fast = False
    if name == "cuda":
        device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif name == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        with contextlib.suppress(OSError, TypeError, AttributeError):  # not every system has mallopt
            libc = ctypes.CDLL(None)  # let it keep freed memory: to get it again costs 1/6 of a step
            libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
    if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo")
    bf16 = config.precision == "bf16" or (config.precision == "auto" and fast)
    return device, partial(torch.autocast, name, torch.bfloat16, enabled=bf16)


def build_model(config: Config, num_images: int) -> nn.Module:
    """Return the model of a configuration, with weights from its seed."""
    dim, K, T = config.moco_dim, config.moco_k, config.moco_t
    splits = config.bn_splits // world_size()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = ResNetEncoder(config.arch, dim, config.mlp, splits, config.stem, config.width)
        if config.method == "end-to-end":
            return EndToEnd(encoder, T)
        if config.method == "simclr":
            return SimCLR(encoder, T)
        if config.method == "memory-bank":
            return MemoryBank(encoder, num_images, dim, K, config.bank_m, T)
        return MoCo(encoder, dim, K, config.moco_m, T, config.symmetric)


def newton_schulz(x: Tensor) -> Tensor:
    """Bring the singular values of x (m,n) near 1, unless they are near 0, in five iterations.
    Each maps a singular value s to 3.4445·s − 4.775·s³ + 2.0315·s⁵, Jordan's polynomial."""
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.mT).mT
    x = x / x.norm().clamp(min=1e-12)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Step along orthogonalized momentum, after Jordan et al., kellerjordan.github.io/posts/muon.
    W ← ‖W‖·unit(W − lr·‖W‖·unit(O)), O = newton_schulz(gradient + momentum·buffer): the norm
    stays, since normalization cancels it. Vectors: SGD with Nesterov momentum."""

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        for weight in group["params"]:
            buffer = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
            buffer.mul_(group["momentum"]).add_(weight.grad)
            update = weight.grad.add(buffer, alpha=group["momentum"])
            if weight.dim() < 2:
                weight.sub_(update, alpha=group["lr"])
                continue
            norm = weight.norm()
            update = newton_schulz(update.flatten(1)).view_as(weight)
            weight.sub_(group["lr"] * norm / update.norm().clamp(min=1e-12) * update)
            weight.mul_(norm / weight.norm().clamp(min=1e-12))


def build_optimizer(config: Config, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer, whose momentum is zero, not absent, before the first step."""
    options = dict(lr=config.lr, momentum=0.9)
    if config.optimizer == "muon":
        optimizer = Muon(parameters, options)
    else:
        optimizer = torch.optim.SGD(parameters, weight_decay=config.wd, fused=True, **options)
    for weight in optimizer.param_groups[0]["params"]:
        optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def learning_rate(config: Config, epoch: float) -> float:
    """Return the rate after `epoch` epochs: cosine decay, or ×0.1 at each of --schedule."""
    if config.cos:
        return config.lr * 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
    return config.lr * 0.1 ** sum(epoch >= milestone for milestone in config.schedule)


def batch_plan(n: int, config: Config) -> Iterator[tuple[int, Tensor]]:
    """Yield each step's epoch and this rank's indices (N,): every epoch permutes all n."""
    for epoch in range(config.epochs):
        order = torch.randperm(n, generator=rng("order", config.seed, epoch))
        for indices in order[: n - n % config.batch_size].split(config.batch_size):
            yield epoch, local_rows(indices)


def check_out(out: str, may_exist: bool, advice: str = "give --overwrite to replace it") -> None:
    """Raise UserError if a file cannot be written to a path, or would replace one."""
    path = Path(out)
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        raise UserError(f"{path}: must be a file in a folder that exists")
    if path.exists() and not may_exist:
        raise UserError(f"{path}: exists already; {advice}")


Rows = Iterator[dict[str, Any] | None]  # after each step: None, or an epoch's row of the .csv
EXISTS = "give --resume to continue its run, --overwrite to replace it, or another --out"
COLUMNS = ("epoch", "loss", "lr", "knn", "images_per_s", "seconds")  # of the .csv
AGREE_STEPS = 8  # between steps at which ranks compare flags, since each waits for all


def tensors_of(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint that training changes, by name."""
    state = checkpoint["optimizer"]["state"]
    momentum = {f"momentum of parameter {i}": x["momentum_buffer"] for i, x in state.items()}
    return checkpoint["state_dict"] | momentum | {"losses": checkpoint["losses"]}


class Run:
    """Train as a configuration says, from the start or, with `resume`, from where `out` stopped.
    A checkpoint holds what a run accumulates; all else is a function of configuration and step.
    Raises UserError, before anything is written, if options, files, data or device do not fit."""

    def __init__(self, config: Config) -> None:
        self.device, self.autocast = pick_device(config)
        self.config = replace(config)  # checked again: world_size() is known now
        self.csv_path = config.out.removesuffix(".pt") + ".csv"
        for path in (config.out, self.csv_path):
            check_out(path, config.overwrite or config.resume or rank() > 0, EXISTS)
        checkpoint = self.load() if config.resume else {}
        self.data = load_data(config, self.device)
        num_images = len(self.data.train)
        if config.batch_size > num_images:
            raise UserError(f"--batch-size {config.batch_size}: more than the {num_images} images")
        self.model = build_model(config, num_images).to(self.device, memory_format=torch.channels_last)
        if config.compile:
            for encoder in self.model.children():
                encoder.compile()
        self.optimizer = build_optimizer(config, self.model.encoder_q.parameters())
        self.split_two_views = SplitTwoViews(Augment(config.aug, config.size), config.seed)
        self.steps_per_epoch = num_images // config.batch_size
        self.steps = config.epochs * self.steps_per_epoch
        self.step, self.rows, self.loss = 0, [], None
        self.losses = torch.zeros(self.steps_per_epoch, device=self.device)  # of the epoch
        self.began = time.perf_counter()  # of the epoch; on resume, earlier by the seconds it has taken
        if config.resume:
            self.restore(checkpoint)
        self.saved_step, self.saved_at = None, time.monotonic()
        self.waiting = False  # for a batch: see `next_batch`
        self.ddp_model = DistributedDataParallel(self.model) if world_size() > 1 else self.model
        self.ddp_model.broadcast_buffers = False  # after DDP's first broadcast, statistics stay apart

    def checkpoint(self) -> dict[str, Any]:
        """Return what `out` holds: weights, momentum, and the numbers of the epochs."""
        return {
            "epoch": self.step // self.steps_per_epoch, "step": self.step, "arch": self.config.arch,
            "state_dict": {f"module.{name}": x for name, x in self.model.state_dict().items()},
            "optimizer": self.optimizer.state_dict(), "config": asdict(self.config),
            "num_images": len(self.data.train), "losses": self.losses, "rows": self.rows,
            "seconds": time.perf_counter() - self.began,
        }  # fmt: skip

    def load(self) -> dict[str, Any]:
        """Read the checkpoint to continue. Raises UserError if its options differ where they may not."""
        checkpoint = load_checkpoint(self.config.out)
        for name, value in asdict(self.config).items():
            old = checkpoint.get("config", {}).get(name, value)
            if (value != old and panel_of(name).endswith(FIXED)) or (name == "epochs" and value < old):
                raise UserError(f"{flag(name)} {value}: --resume continues a run with {old}")
        return checkpoint

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Return to where a checkpoint was saved. Raises UserError if it is of another run."""
        own = self.checkpoint()
        try:
            step, rows, seconds = (checkpoint[x] for x in ("step", "rows", "seconds"))
            if not 0 <= step <= self.steps or not 0 <= seconds < 1e9:
                raise ValueError("its step or seconds cannot be")
            epochs = [row["epoch"] for row in rows if tuple(row) == COLUMNS]
            if epochs != list(range(1, 1 + step // self.steps_per_epoch)):
                raise ValueError("its rows cannot be")
            if checkpoint["num_images"] != own["num_images"]:
                raise ValueError(f"{own['num_images']} images, not {checkpoint['num_images']}")
            saved, tensors = tensors_of(checkpoint), tensors_of(own)
            check_tensors(saved, tensors)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            cause = error if type(error) is ValueError else "a value is missing or has the wrong type"
            raise UserError(f"--resume: {self.config.out} does not fit this run ({cause})") from error
        for name, x in tensors.items():
            x.copy_(saved[name])
        self.step, self.rows = step, rows
        self.began -= seconds

    def train(self, stop: Callable[[], Any] = lambda: False) -> Rows:
        """Yield after every step: None, or the epoch's row; save now and then, and once `stop()`.
        Raises UserError for an unreadable image, a loss that is not finite, a full disk."""
        if rank() == 0:  # FileExistsError if another run began after this one was checked
            Path(self.csv_path).touch(exist_ok=self.config.resume or self.config.overwrite)
        self.save()
        plan = itertools.islice(batch_plan(len(self.data.train), self.config), self.step, None)
        with load_batches(self.data.train, plan, self.split_two_views.two_crops) as batches:
            while batch := self.next_batch(batches, stop):
                self.take_step(*batch)
                row = self.end_epoch() if self.step % self.steps_per_epoch == 0 else None
                late = self.agree(time.monotonic() - self.saved_at >= self.config.save_seconds)
                if row or late:
                    self.save()
                yield row
        if self.saved_step != self.step:
            self.save()

    def next_batch(self, batches: Iterator, stop: Callable[[], Any]) -> tuple[Tensor, Tensor] | None:
        """Return images and indices of the next step; None at the end, and once `stop()`.
        While `waiting`, nothing is half done; a signal may end the wait: see `catch_signals`."""
        self.waiting = world_size() == 1
        try:
            return None if self.agree(stop()) else next(batches, None)
        except KeyboardInterrupt:
            return None
        finally:
            self.waiting = False

    def take_step(self, images: Tensor, indices: Tensor) -> None:
        """Train on a batch. Nothing in here waits for the device."""
        generator = rng("step", self.config.seed, self.step)
        x_q, x_k = self.split_two_views(images, generator)
        with self.autocast():
            loss = self.ddp_model(x_q, x_k, generator, indices)
        lr = learning_rate(self.config, self.step / self.steps_per_epoch)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        with self.autocast():  # of Muon's matrix products
            self.optimizer.step()
        self.loss = all_gather(loss.detach()[None]).mean()
        self.losses[self.step % self.steps_per_epoch] = self.loss
        self.step += 1

    def end_epoch(self) -> dict[str, Any]:
        """Return the epoch's row, which `rows` gets, too, with kNN if it is due."""
        config, epoch = self.config, self.step // self.steps_per_epoch
        seconds = time.perf_counter() - self.began
        speed = self.steps_per_epoch * config.batch_size / seconds
        loss, lr = self.losses.mean().item(), learning_rate(config, epoch - 1)
        row = dict(epoch=epoch, loss=loss, lr=lr, knn=None, images_per_s=speed, seconds=seconds)
        due = epoch == config.epochs or (config.knn_every and epoch % config.knn_every == 0)
        if due and self.data.test:
            self.average_statistics()
            row["knn"] = accuracy(self.model.encoder_q, self.data, config, self.autocast)
            row["seconds"] = time.perf_counter() - self.began
        self.rows.append(row)
        self.began = time.perf_counter()
        return row

    def agree(self, wish: Any) -> bool:
        """Return on all ranks whether `wish` is true on any; several ranks ask every AGREE_STEPS steps."""
        if world_size() > 1 and self.step % AGREE_STEPS:
            return False
        return bool(all_gather(torch.tensor([bool(wish)])).any())

    def average_statistics(self) -> None:
        """Give all ranks the mean of their BatchNorm statistics, which one process would have."""
        for name, statistic in self.model.named_buffers():
            if "running_" in name:
                statistic.copy_(all_gather(statistic[None]).mean(0))

    def save(self) -> None:
        """Write checkpoint and .csv, on rank 0. Raises UserError if a number is not finite."""
        self.average_statistics()
        checkpoint = self.checkpoint()
        epoch = self.step / self.steps_per_epoch
        for what, x in {"the loss": self.losses, **checkpoint["state_dict"]}.items():
            if not x.isfinite().all():
                lr = learning_rate(self.config, epoch)
                advice = "use a lower --lr or --precision fp32, from the start or with --resume"
                raise UserError(f"{what} is not finite in epoch {epoch:.2f}, at learning rate {lr:.3g}; {advice}")
        if rank() == 0:
            save_checkpoint(self.config.out, checkpoint)
            table = io.StringIO()
            csv.DictWriter(table, COLUMNS).writerows([dict(zip(COLUMNS, COLUMNS)), *self.rows])
            write_file(self.csv_path, lambda file: file.write(table.getvalue().encode()))
        self.saved_step, self.saved_at = self.step, time.monotonic()


# ────────────────────────────────────────── Command line ──────────────────────────────────────────


@contextlib.contextmanager
def catch_signals(run: Run) -> Iterator[list[int]]:
    """Yield a list for signals to come: Ctrl-C or SIGTERM ends a run after its step, a wait at once.
    A second signal ends the process, but not under torchrun, which repeats the first."""
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        received.append(number)
        if world_size() == 1:
            handlers.close()
        if run.waiting:
            raise KeyboardInterrupt

    with contextlib.ExitStack() as handlers:  # to put back
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers.callback(signal.signal, number, signal.signal(number, note))
        yield received


def show_progress(run: Run, rows: Rows) -> None:
    """Draw a progress bar on a terminal, and print a line per epoch anywhere."""
    from rich.progress import Progress

    epochs = run.config.epochs
    bar = Progress()
    bar.disable = not bar.console.is_terminal
    with bar:
        task = bar.add_task("", total=run.steps)
        for row in rows:
            if row or run.step % 10 == 1:  # not always: reading the loss waits for the device
                bar.update(task, completed=run.step, description=f"loss {run.loss:.3f}")
            if row:
                left = row["seconds"] * (epochs - row["epoch"]) / 60
                line = "epoch {epoch}/{0}  loss {loss:.4f}  lr {lr:.4g}  {images_per_s:.0f} images/s  ETA {1:.0f} min"
                line = line.format(epochs, left, **row)
                line += "" if row["knn"] is None else f"  kNN {row['knn']:.2f} %"
                bar.console.out(dumps(row) if run.config.json else line, highlight=False)


def log_tensorboard(rows: Rows, folder: str) -> Rows:
    """Write each epoch's row to TensorBoard, too."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder) as writer:
        for row in rows:
            for name in COLUMNS[1:]:
                if row and row[name] is not None:
                    writer.add_scalar(name, row[name], row["epoch"])
            yield row


def write_picture(path: str, images: Tensor) -> None:
    """Write images (R,C,3,S,S) in [0,1] as a PNG of R rows, each image at least 96 pixels wide."""
    scale = -(-96 // images.shape[-1])
    images = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    picture = torchvision.utils.make_grid(images.flatten(0, 1), images.shape[1], padding=4, pad_value=1)
    write_file(path, partial(torchvision.utils.save_image, picture, format="png"))


def draw_views(data: Data, config: Config) -> Tensor:
    """Return eight images and, beside each, its two views in four steps: (8,9,3,S,S) in [0,1]."""
    split_two_views = SplitTwoViews(Augment(config.aug, config.size), config.seed)
    augment = split_two_views.augment
    chosen = torch.randperm(len(data.train), generator=rng("picture", config.seed))[:8]
    with load_batches(data.train, [(0, chosen)], augment.center_crop) as batches:
        columns = [images / 255 for images, _ in batches]
    plan = [(step, chosen) for step in range(4)]
    with load_batches(data.train, plan, split_two_views.two_crops) as batches:
        for step, (images, _) in enumerate(batches):
            views = split_two_views(images, rng("step", config.seed, step))
            columns += [view * augment.std + augment.mean for view in views]
    return torch.stack(columns, 1)


def draw_neighbors(encoder: nn.Module, data: Data, config: Config, autocast: Callable) -> Tensor:
    """Return ten test images, each beside its ten nearest training images: (10,11,3,S,S) in [0,1].
    Without a test split, training images are compared."""
    queries = data.test or data.train
    bank = extract_features(encoder, data.train, config, autocast)
    features = extract_features(encoder, queries, config, autocast)
    chosen = torch.randperm(len(queries), generator=rng("picture", config.seed))[:10]
    similarity = F.normalize(features[chosen], dim=1) @ F.normalize(bank, dim=1).T
    if data.test is None:
        similarity[torch.arange(len(chosen)), chosen] = -math.inf  # not its own neighbor
    neighbors = similarity.topk(min(10, len(bank) - (data.test is None))).indices.cpu()
    crop = Augment(config.aug, config.eval_size or config.size).center_crop
    plan = [(0, column) for column in neighbors.T]
    with load_batches(queries, [(0, chosen)], crop) as first, load_batches(data.train, plan, crop) as others:
        images = [x for x, _ in (*first, *others)]
    return torch.stack(images, 1).cpu() / 255


def load_for_evaluation(path: str, options: dict[str, Any]) -> tuple[nn.Module, Data, Config, Callable, int]:
    """Return a checkpoint's encoder, data, config with the options given, autocast and epoch."""
    checkpoint = load_checkpoint(path)
    head = (checkpoint.get("config", {}) | options).get("head", False)
    encoder = load_encoder(checkpoint, path, head)
    preset = "v2" if encoder.conv1.stride == (2, 2) else "cifar10"  # official ones have no config
    saved = checkpoint.get("config", PRESETS[preset])
    saved = {x: saved[x] for x in COMMANDS[knn] if x in saved and panel_of(x) != HARDWARE}
    if "size" in options:
        saved["eval_size"] = 0  # what is given wins over what was saved
    config = Config(**(saved | options))
    device, autocast = pick_device(config)
    encoder.to(device, memory_format=torch.channels_last)
    return encoder, load_data(config, device), config, autocast, checkpoint["epoch"]


def evaluate(command: Callable, path: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's accuracy, `top1` in percent, and the settings that made it."""
    encoder, data, config, autocast, epoch = load_for_evaluation(path, options)
    if data.test is None:
        raise UserError(f"--data {config.data}: {data.found}")
    top1 = accuracy(encoder, data, config, autocast, command is linear)
    settings = {name: getattr(config, name) for name in COMMANDS[command] if name in OPTIONS}
    settings |= dict(device=next(encoder.parameters()).device.type, bank=len(data.train), queries=len(data.test))
    return dict(top1=top1, checkpoint=path, epoch=epoch, **settings)


def train(**options: Any) -> None:
    """Train an encoder without labels."""
    if options.get("resume"):
        saved = load_checkpoint(options.get("out", Config.out)).get("config", {})
        options = {x: saved[x] for x in OPTIONS if x in saved and panel_of(x) != HARDWARE} | options
    config = Config.from_preset(**options)
    run = Run(config)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    with run.autocast():
        precision = "bf16" if torch.is_autocast_enabled(run.device.type) else "fp32"
    print(f"{config.data}: {run.data.found}; {run.device}, {precision}", flush=True)
    with catch_signals(run) as received:
        rows = run.train(lambda: received)
        if config.tensorboard and rank() == 0:
            rows = log_tensorboard(rows, config.tensorboard)
        show_progress(run, rows)
    if run.step < run.steps:
        print(f"{config.out}: stopped after step {run.step}; to go on, give the same command with --resume")
        sys.exit(128 + (received or [signal.SIGTERM])[0])  # another rank may have got the signal
    print(f"{config.out} is complete; the commands knn, linear, export and neighbors read it")


def knn(checkpoint: str, **options: Any) -> None:
    """Measure the accuracy of weighted kNN on a checkpoint's features."""
    result = evaluate(knn, checkpoint, options)
    print(dumps(result) if result["json"] else "kNN top-1 {top1:.2f} % (k {knn_k}, T {knn_t})".format(**result))


def linear(checkpoint: str, **options: Any) -> None:
    """Measure the accuracy of a linear classifier on a checkpoint's features."""
    result = evaluate(linear, checkpoint, options)
    print(dumps(result) if result["json"] else "linear top-1 {top1:.2f} %".format(**result))


def export(checkpoint: str, output: str, **options: Any) -> None:
    """Write a checkpoint's backbone, without its head, under torchvision's names."""
    check_out(output, options.get("overwrite", False))
    save_checkpoint(output, load_encoder(load_checkpoint(checkpoint), checkpoint).state_dict())
    print(f"wrote {output}")


def views(output: str, **options: Any) -> None:
    """Draw images and the views that training makes of them, as a PNG."""
    check_out(output, options.get("overwrite", False))
    config = Config.from_preset(**options, workers=0)
    write_picture(output, draw_views(load_data(config, torch.device("cpu")), config))
    print(f"wrote {output}")


def neighbors(checkpoint: str, output: str, **options: Any) -> None:
    """Draw test images and their nearest training images in a checkpoint's features, as a PNG."""
    check_out(output, options.get("overwrite", False))
    encoder, data, config, autocast, _ = load_for_evaluation(checkpoint, options)
    write_picture(output, draw_neighbors(encoder, data, config, autocast))
    print(f"wrote {output}")


ARGUMENTS = {"checkpoint": "file that train wrote, or an official one", "output": "file to write"}
EVALUATION = ("data", "root", "size", "eval_size", "workers", "aug", "device", "precision")
COMMANDS: dict[Callable, tuple[str, ...]] = {  # each with its arguments and options
    train: tuple(OPTIONS),
    knn: ("checkpoint", "json", *EVALUATION, "head", "knn_k", "knn_t"),
    linear: ("checkpoint", "json", *EVALUATION, "head"),
    export: ("checkpoint", "output", "overwrite"),
    views: ("output", "preset", "data", "root", "size", "aug", "seed", "overwrite"),
    neighbors: ("checkpoint", "output", *EVALUATION, "head", "seed", "overwrite"),
}


def command_line() -> Any:
    """Return the Typer application, made of COMMANDS."""
    import typer

    app = typer.Typer(help=__doc__.splitlines()[0], no_args_is_help=True, pretty_exceptions_enable=False)

    def parameter(name: str) -> inspect.Parameter:
        if name in ARGUMENTS:
            hint = Annotated[str, typer.Argument(help=ARGUMENTS[name])]
            return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=hint)
        kind, text, *rest = get_args(OPTIONS[name])
        default = str(getattr(Config, name)).strip("()").replace(",", "")
        extra = dict(rich_help_panel=panel_of(name), show_default=default or False)
        if rest and kind is str:
            kind, text = Literal[rest[0]], f"{text}: {', '.join(rest[0])}"
            extra["metavar"] = "NAME"
        elif rest:
            extra |= dict(min=rest[0][0], max=rest[0][1])
        hint = Annotated[(list[int] if kind is tuple else kind) | None, typer.Option(help=text, **extra)]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)

    for command, names in COMMANDS.items():

        def call(command: Callable = command, **arguments: Any) -> None:
            given = {name: x for name, x in arguments.items() if x not in (None, [])}  # presets differ
            command(**{name: tuple(x) if isinstance(x, list) else x for name, x in given.items()})

        call.__signature__ = inspect.Signature(map(parameter, names))
        app.command(command.__name__, help=command.__doc__)(call)
    return app


def explain(error: Exception, arguments: list[str]) -> str | None:
    """Return the line that tells a user what to do about an error; None for a bug."""
    text = str(error)
    first = text.split("\n")[0]
    if isinstance(error, UserError):
        return text
    if isinstance(error, ImportError):  # of what is imported late: typer, tensorboard
        return f"{error}; try `pip install {error.name}`"
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(x) for x in (error.filename, error.strerror) if x)
    amount = re.search(r"ried to allocate ([\d.]+ \w+)", text)
    if isinstance(error, MemoryError) or amount:
        asked = f" for the {amount[1]} that were asked for" if amount else ""
        options = next((x for command, x in COMMANDS.items() if command.__name__ in arguments), ())
        names = [flag(x) for x in ("size", "batch_size", "width", "moco_k", "moco_dim", "workers") if x in options]
        advice = f"; give a smaller {' or '.join(names)}" if names else ""
        return f"too little memory{asked}{advice}"
    if re.search("DataLoader|shared memory|/torch_", text):
        return f"a process that reads images died, hangs or lacks shared memory ({first}); try --workers 0"
    if world_size() > 1 and re.search("gloo|nccl|connection", text, re.IGNORECASE):
        return f"rank {rank()} lost another process ({first}); continue with --resume"
    return None


def main(argv: list[str] | None = None) -> None:
    """Run a command; what a user can correct costs a line on stderr and exit status 2."""
    arguments: list[str] = []
    for argument in sys.argv[1:] if argv is None else argv:
        if argument.isdigit() and arguments[-2:-1] == ["--schedule"]:  # the official `120 160`
            arguments.append("--schedule")
        arguments.append(argument)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a notebook's stream
            stream.reconfigure(errors="backslashreplace")  # print \u03b8 where θ cannot be
    try:
        command_line()(args=arguments)
    except (ImportError, MemoryError, OSError, RuntimeError, UserError) as error:
        if (line := explain(error, arguments)) is None:
            raise
        print(f"moco: {line}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
