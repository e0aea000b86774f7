# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "typer>=0.19"]
# ///
# SPDX-License-Identifier: MIT
"""Momentum Contrast (MoCo) in one file: the method first, then what trains and evaluates it.

Result on a JPEG copy of CIFAR-10, at 32 pixels, on two cores of an AMD EPYC with bf16: 68.2 % kNN and 69.6 % linear
accuracy by `--preset cpu` in 38 minutes; 71.6 and 73.9 % with `--width 0.5 --epochs 100` in 62 minutes (one seed each).

MoCo v1: He et al., arXiv 1911.05722; v2: Chen et al., arXiv 2003.04297. One training step:

    images uint8 (N,3,H,W) ──SplitTwoViews──► x_q, x_k float (N,3,S,S)
    x_q ── encoder_q ──► q (N,C) ───────────────────────────┐
    x_k ── shuffle ── encoder_k ── unshuffle ──► k (N,C) ───┼─► info_nce(q, k, queue) ─► loss ─► SGD on θ_q
                                                            └─► dequeue_and_enqueue(k)
    every step begins with  θ_k ← m·θ_k + (1−m)·θ_q
    evaluation: encoder_q's pooled features (N,D) ──► kNN, linear classifier

Shapes: N images per batch and process, P processes, S pixels per side of a view, D features, C embedding dimensions,
K keys in the queue, M images in a data set. test_moco.py specifies the behavior.
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
import signal
import stat
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as tvf
from PIL import Image
from torch import Generator, Tensor, nn
from torch.nn import Module
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1


# ────────────────────────────────── Random numbers and processes ──────────────────────────────────
def rng(*key: int | str) -> Generator:
    """Return a CPU generator seeded by the key alone, e.g. ("step", seed, step)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()  # torch uses 32 bits of a seed
    return Generator().manual_seed(int.from_bytes(digest, "little"))


def world_size() -> int:
    """Return the number P of processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, from 0 to P−1."""
    return dist.get_rank() if world_size() > 1 else 0


def local_rows(x: Tensor) -> Tensor:
    """Return this rank's rows (N,…) of x (P·N,…)."""
    return x.chunk(world_size())[rank()]


def copy_to(x: Tensor, device: torch.device | str) -> Tensor:
    """Return x on a device, without waiting for CUDA."""
    return x.to(device, non_blocking=torch.device(device).type == "cuda")  # unsafe on MPS: pytorch issue 189690


def uniform(generator: Generator, n: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
    """Return uniform numbers (n,*shape) in [0,1): this rank's rows of what one process draws for the global batch."""
    return copy_to(local_rows(torch.rand(world_size() * n, *shape, generator=generator)), device)


class AllGather(torch.autograd.Function):
    """All-gather with gradient: backward sums the gradients of all ranks and keeps this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(rows, x)
        return torch.cat(rows)

    @staticmethod
    @torch.autograd.function.once_differentiable  # else a second derivative is a wrong number, not an error
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd may still need this one
        dist.all_reduce(gradient)
        return local_rows(gradient)


def all_gather(x: Tensor) -> Tensor:
    """Return the rows (P·N,…) of all ranks' x (N,…), in rank order, with gradient."""
    return AllGather.apply(x.contiguous()) if world_size() > 1 else x


# ──────────────────────────────────────────── Contrast ────────────────────────────────────────────
def info_nce(q: Tensor, k: Tensor, negatives: Tensor, T: float, ignore: Tensor | None = None) -> Tensor:
    """Return InfoNCE, MoCo eq. 1: −q·k₊/T + log( exp(q·k₊/T) + Σᵢ exp(q·kᵢ/T) ), the mean over N. q, k (N,C): unit
    rows; negatives (C,K): unit columns; ignore (N,K): True for those to leave out. Equals cross-entropy over the K+1
    logits [q·k₊, q·kᵢ]/T with label 0, in float32 or float64 under any autocast. Raises TypeError if shapes differ."""
    if q.shape != k.shape:
        raise TypeError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must have the same shape")
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        q = q.to(dtype) / T  # cheaper than dividing the logits (N,K)
        positive = (q * k).sum(1)  # (N,)
        logits = q @ negatives.to(dtype)  # (N,K)
        if ignore is not None:
            logits = logits.masked_fill(ignore, -math.inf)
        total = torch.logaddexp(positive, logits.logsumexp(1))  # F.cross_entropy would need a copy (N,K+1)
        return (total - positive).mean()


def embed(encoder: Module, x: Tensor) -> Tensor:
    """Return the embeddings of views x (N,3,S,S) as unit rows (N,C), in float32 or float64."""
    z = encoder(x)
    return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)))


def embed_shuffled(encoder: Module, im_k: Tensor, generator: Generator | None) -> Tensor:
    """Return all ranks' keys (P·N,C) of views im_k (N,3,S,S), in the views' order, computed in a random one: ShuffleBN,
    1911.05722, section 3.3. Else a query and its key share BatchNorm statistics, which reveal the match."""
    if generator is None and world_size() > 1:
        raise ValueError("several processes need a generator, with the same seed in each")
    im_k = all_gather(im_k)
    order = copy_to(torch.randperm(len(im_k), generator=generator), im_k.device)
    shuffled = embed(encoder, im_k[local_rows(order)])
    return all_gather(shuffled)[order.argsort()]


class MoCo(Module):
    """Contrast queries with a queue of keys from a momentum encoder: MoCo, 1911.05722, algorithm 1. encoder: any
    module that maps a batch to (N,dim); encoder_k starts as its copy. queue (dim,K): unit columns, random at first.
    queue_ptr (1,) int64: column of the oldest key. In eval mode, neither queue nor encoder_k changes."""

    def __init__(
        self, encoder: Module, dim: int = 128, K: int = 4096, m: float = 0.99, T: float = 0.1, symmetric: bool = False
    ) -> None:
        super().__init__()
        self.K = K
        self.m = m
        self.T = T
        self.symmetric = symmetric
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def momentum_update(self) -> None:
        """Move the key encoder, eq. 2: θ_k ← m·θ_k + (1−m)·θ_q, parameters but not buffers."""
        # One kernel launch for all, not one for each.
        torch._foreach_lerp_([*self.encoder_k.parameters()], [*self.encoder_q.parameters()], 1 - self.m)

    @torch.no_grad()
    def dequeue_and_enqueue(self, keys: Tensor) -> None:
        """Replace the queue's oldest keys by keys (N,C), for any N; if N > K, the newest K stay."""
        columns = (self.queue_ptr + torch.arange(len(keys), device=keys.device)) % self.K
        # Only the last K: index_copy_ to one column twice is undefined.
        self.queue.index_copy_(1, columns[-self.K :], keys[-self.K :].T.to(self.queue))
        self.queue_ptr.add_(len(keys)).remainder_(self.K)

    def forward(self, im_q: Tensor, im_k: Tensor, generator: Generator | None = None, *_: Any) -> Tensor:
        """Return the loss of two views (N,3,S,S) of the same images, then enqueue the keys. symmetric: add the loss
        with the views exchanged and enqueue both batches of keys. generator: draws the shuffle. *_: for MemoryBank."""
        if self.training:
            self.momentum_update()
        q = embed(self.encoder_q, im_q)  # (N,C)
        k = embed_shuffled(self.encoder_k, im_k, generator).detach()  # (P·N,C): no gradient to keys
        queue = self.queue.clone()  # backward reads it after the keys are enqueued
        loss = info_nce(q, local_rows(k), queue, self.T)
        if self.symmetric:
            q = embed(self.encoder_q, im_k)
            other_k = embed_shuffled(self.encoder_k, im_q, generator).detach()
            loss = loss + info_nce(q, local_rows(other_k), queue, self.T)
            k = torch.cat([k, other_k])
        if self.training:
            self.dequeue_and_enqueue(k)
        return loss


class EndToEnd(Module):
    """Contrast queries with the batch's other keys, gradients into both: 1911.05722, figure 2a."""

    def __init__(self, encoder: Module, T: float = 0.1) -> None:
        super().__init__()
        self.encoder_q = encoder
        self.T = T

    def forward(self, im_q: Tensor, im_k: Tensor, generator: Generator | None = None, *_: Any) -> Tensor:
        """Return the loss of two views (N,3,S,S)."""
        q = embed(self.encoder_q, im_q)
        k = embed_shuffled(self.encoder_q, im_k, generator)
        own = local_rows(torch.eye(len(k), dtype=torch.bool, device=k.device))  # (N,P·N)
        return info_nce(q, local_rows(k), k.T, self.T, ignore=own)


class MemoryBank(Module):
    """Contrast queries with stored embeddings: 1911.05722, figure 2b; InstDisc, 1805.01978. bank (num_images,dim): one
    unit row per image, random at first. The key of an image is its row, the negatives are K rows drawn with
    replacement for the batch. In training, row ← normalize(m·row + (1−m)·q)."""

    def __init__(
        self, encoder: Module, num_images: int, dim: int = 128, K: int = 4096, m: float = 0.5, T: float = 0.1
    ) -> None:
        super().__init__()
        self.encoder_q = encoder
        self.K = K
        self.m = m
        self.T = T
        self.register_buffer("bank", F.normalize(torch.randn(num_images, dim)))

    def forward(self, im_q: Tensor, im_k: Tensor, generator: Generator | None, indices: Tensor) -> Tensor:
        """Return the loss of views im_q (N,3,S,S) of the images `indices` (N,); im_k is not used."""
        drawn = copy_to(torch.randint(len(self.bank), (self.K,), generator=generator), im_q.device)
        indices = copy_to(indices, im_q.device)
        q = embed(self.encoder_q, im_q)
        k = self.bank[indices]
        loss = info_nce(q, k, self.bank[drawn].T, self.T, ignore=drawn == indices[:, None])
        if self.training:
            rows = F.normalize(torch.lerp(k, q.detach().to(k.dtype), 1 - self.m))
            self.bank[all_gather(indices)] = all_gather(rows)
        return loss


class SimCLR(EndToEnd):
    """Contrast both views with all other views of the batch: NT-Xent, 2002.05709, eq. 1. The paper's BatchNorm spans
    all devices: give the encoder bn_splits=1, on one process; else the statistics of small groups reveal the match."""

    def forward(self, im_q: Tensor, im_k: Tensor, *_: Any) -> Tensor:
        """Return the loss of two views (N,3,S,S): mean over 2N queries, 2·P·N−2 negatives each."""
        z_q = embed(self.encoder_q, im_q)
        z_k = embed(self.encoder_q, im_k)
        all_q = all_gather(z_q)
        negatives = torch.cat([all_q, all_gather(z_k)]).T
        # Neither a query itself nor its key is a negative: (2N,2·P·N).
        own = local_rows(torch.eye(len(all_q), dtype=torch.bool, device=all_q.device)).repeat(2, 2)
        return info_nce(torch.cat([z_q, z_k]), torch.cat([z_k, z_q]), negatives, self.T, ignore=own)


# ──────────────────────────────────────────── Encoder ─────────────────────────────────────────────
class SplitBatchNorm(nn.BatchNorm2d):
    """Normalize `num_splits` contiguous groups of the batch separately, as that many GPUs would. The running statistics
    move once per forward, by the mean of the groups' statistics. Raises ValueError for an uneven split."""

    def __init__(self, num_features: int, num_splits: int = 8, **batchnorm_options: Any) -> None:
        super().__init__(num_features, **batchnorm_options)
        self.num_splits = num_splits

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        splits = self.num_splits
        if len(x) % splits:
            raise ValueError(f"a batch of {len(x)} cannot be split into {splits} groups")
        means = self.running_mean.repeat(splits, 1)  # a copy per group: F.batch_norm updates it in place
        variances = self.running_var.repeat(splits, 1)
        weights = self.weight.expand(splits, -1) if self.affine else [None] * splits  # once, so backward sums only once
        biases = self.bias.expand(splits, -1) if self.affine else [None] * splits
        normalized = [
            F.batch_norm(group, mean, variance, weight, bias, True, self.momentum, self.eps)
            for group, mean, variance, weight, bias in zip(x.chunk(splits), means, variances, weights, biases)
        ]
        torch.mean(means, 0, out=self.running_mean)
        torch.mean(variances, 0, out=self.running_var)
        self.num_batches_tracked.add_(1)
        return torch.cat(normalized)


ARCHS = {  # block, and the number of blocks in each layer
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


class ResNetEncoder(Module):
    """Embed images by a ResNet, 1512.03385, with torchvision's blocks and names, and a head `fc`. stem: "cifar" (3×3,
    for small images) or "imagenet" (7×7, stride 2, max-pool). width: multiplies all numbers of channels. mlp: the
    2-layer head of MoCo v2, else a linear one. feature_dim: D."""

    def __init__(
        self,
        arch: str = "resnet18",
        dim: int = 128,
        mlp: bool = True,
        bn_splits: int = 8,
        stem: str = "cifar",
        width: float = 1.0,
    ) -> None:
        super().__init__()
        block, depths = ARCHS[arch]
        kernel, stem_stride = {"cifar": (3, 1), "imagenet": (7, 2)}[stem]
        norm = partial(SplitBatchNorm, num_splits=bn_splits)
        channels = int(64 * width)  # into the next block
        self.conv1 = nn.Conv2d(3, channels, kernel, stem_stride, padding=kernel // 2, bias=False)
        self.bn1 = norm(channels)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, 2, padding=1)
        for i, depth in enumerate(depths):
            planes = int(64 * width) * 2**i  # in its 3×3 convolutions
            out = planes * block.expansion
            layer = nn.Sequential()
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                shortcut = nn.Sequential(conv1x1(channels, out, stride), norm(out)) if out != channels else None
                layer.append(block(channels, planes, stride, shortcut, norm_layer=norm))
                channels = out
            self.add_module(f"layer{i + 1}", layer)
        self.feature_dim = channels
        self.fc = nn.Linear(channels, dim)
        if mlp:
            self.fc = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, dim))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def features(self, x: Tensor) -> Tensor:
        """Return the pooled features (N,D) of images x (N,3,S,S), before the head."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings (N,dim), not normalized."""
        return self.fc(self.features(x))


# ───────────────────────────────────────────── Views ──────────────────────────────────────────────
def crop_boxes(u: Tensor, height: int, width: int, scale: tuple[float, float]) -> Tensor:
    """Turn uniform u (N,4,10) into boxes (N,4) of top, left, h, w as torchvision's RandomResizedCrop does: area in
    `scale`, a fraction of the image, log(w/h) in ±log(4/3); the first of ten that fits, else the largest centered."""
    u_area, u_ratio, u_top, u_left = u.unbind(1)  # (N,10) each
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u_area)
    ratio = (math.log(4 / 3) * (2 * u_ratio - 1)).exp()
    h = (area / ratio).sqrt().round()
    w = (area * ratio).sqrt().round()
    top = u_top * (height - h + 1)  # boxes.long() rounds it down
    left = u_left * (width - w + 1)
    fits = (h >= 1) & (h <= height) & (w >= 1) & (w <= width)
    first = fits.int().argmax(1, keepdim=True)
    boxes = torch.cat([x.gather(1, first) for x in (top, left, h, w)], 1)
    tallest = min(height, round(width * 4 / 3))
    widest = min(width, round(height * 4 / 3))
    center = torch.tensor([(height - tallest) // 2, (width - widest) // 2, tallest, widest])
    return torch.where(fits.any(1, keepdim=True), boxes.long(), center)


def separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return rows (N,S,H) · x (N,3,H,W) · columnsᵀ (N,W,S) per channel: (N,3,S,S), in the dtype of x."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.flatten(1, 2) @ columns.mT.to(x)  # all channels in one product: faster than one each
        return rows[:, None].to(x) @ x.unflatten(1, (3, -1))


def crop(x: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut each image of x (N,3,H,W) to its box (N,4) and resize it to (N,3,size,size): bilinear with antialiasing, by
    triangular weights; their half-width is an input or an output pixel, whichever is larger."""
    matrices = []  # (N,size,H) and (N,size,W)
    for side in (0, 1):
        start, length = boxes[:, side::2, None, None].unbind(1)  # (N,1,1) each: top and h, or left and w
        pixel = torch.arange(x.shape[2 + side], device=x.device) + 0.5
        pitch = length / size
        center = start + pitch * (torch.arange(size, device=x.device)[:, None] + 0.5)
        weights = (pixel - center).abs_().div_(-pitch.clamp(min=1)).add_(1).clamp_(min=0)  # 1 − distance/half-width
        weights.mul_((pixel > start) & (pixel < start + length))
        matrices.append(weights.div_(weights.sum(2, keepdim=True)))
    return separable(x, *matrices)


def shift_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Add `turn` (N,1,1,1), in turns of the color circle, to HSV's hue. A channel is then value − chroma·clamp(2 −
    |6·frac(hue + offset) − 2|, 0, 1), its offset 5/6 for red, 3/6 green, 1/6 blue."""
    r, g, b = x.split(1, 1)
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    # 1 where red (or green) is the largest channel, else 0: sign() is −1 or 0 here, and faster than `==`.
    is_r = (r - value).sign_().add_(1)
    is_g = (g - value).sign_().add_(1)
    # The hue in sixths of a turn, times chroma: as if blue were largest, then replaced where green or red is.
    sixths = (r - g).add_(chroma, alpha=4)
    sixths = sixths.lerp_((b - r).add_(chroma, alpha=2), is_g)
    sixths = sixths.lerp_(g - b, is_r)
    hue = sixths.div_(chroma.clamp(min=1e-9)).div_(6).add_(turn + 2)  # + 2: frac needs positive numbers
    offsets = torch.arange(5, 0, -2, device=x.device)[:, None, None] / 6  # of red, green and blue
    phase = (hue + offsets).frac_().mul_(6)
    drop = phase.sub_(2).abs_().neg_().add_(2).clamp_(0, 1)  # a channel is value − drop·chroma
    return value - drop.mul_(chroma)


def color_jitter(x: Tensor, generator: Generator, strengths: tuple[float, ...] = (0.4, 0.4, 0.4, 0.1)) -> Tensor:
    """Scale brightness, contrast and saturation by factors uniform in 1 ± strength, shift the hue by up to ± strength
    turns, drawn per image. The order of the four is drawn per batch; in torchvision, per image."""
    operations = "brightness", "contrast", "saturation", "hue"
    for i in torch.randperm(4, generator=generator).tolist():
        change = strengths[i] * (2 * uniform(generator, len(x), 1, 1, 1, device=x.device) - 1)
        if operations[i] == "hue":
            x = shift_hue(x, change)
            continue
        reference = 0 if operations[i] == "brightness" else tvf.rgb_to_grayscale(x)  # what a factor of 0 gives
        if operations[i] == "contrast":
            reference = reference.mean((1, 2, 3), keepdim=True)
        x = (x - reference).mul_(1 + change).add_(reference).clamp_(0, 1)  # torch.lerp is slow from (N,1,1,1)
    return x


def gaussian_blur(x: Tensor, generator: Generator, low: float = 0.1, high: float = 2.0) -> Tensor:
    """Blur square images (N,3,S,S), each by a sigma of its own from low to high pixels, with reflected borders. The
    kernel has 2·⌊S/20⌋ + 1 pixels, a tenth of the side: SimCLR, 2002.05709, appendix A."""
    sigma = low + (high - low) * uniform(generator, len(x), 1, device=x.device)
    radius = x.shape[-1] // 20
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    weights = (-0.5 * (offsets / sigma) ** 2).softmax(1)  # (N,k)
    identity = F.pad(torch.eye(x.shape[-1], device=x.device), (radius, radius), mode="reflect")
    with torch.autocast(x.device.type, enabled=False):
        matrix = torch.einsum("nk,psk->nsp", weights, identity.unfold(1, len(offsets), 1))  # (N,k) · (S,S,k)
    return separable(x, matrix, matrix)


# The probability that a transform changes an image, and the transform (x, generator) -> x.
FLIP = (0.5, lambda x, _: x.flip(-1))
GRAY = (0.2, lambda x, _: tvf.rgb_to_grayscale(x))  # (N,1,H,W)
BLUR = (0.5, gaussian_blur)
JITTER = (0.8, color_jitter)
JITTER_V1 = (1, partial(color_jitter, strengths=(0.4, 0.4, 0.4, 0.4)))
CIFAR_COLORS = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # mean, std
IMAGENET_COLORS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECIPES = {  # a crop's area, as a fraction of the image; evaluation's margin; mean and std; transforms
    "cifar": ((0.08, 1), 1, CIFAR_COLORS, [FLIP, JITTER, GRAY]),
    "v1": ((0.2, 1), 256 / 224, IMAGENET_COLORS, [GRAY, JITTER_V1, FLIP]),
    "v2": ((0.2, 1), 256 / 224, IMAGENET_COLORS, [JITTER, GRAY, BLUR, FLIP]),
}


class Augment:
    """Turn images into random views by a recipe. All numbers are drawn on the CPU: every device gets the same."""

    def __init__(self, recipe: str = "cifar", size: int = 32) -> None:
        self.scale, self.margin, colors, self.transforms = RECIPES[recipe]
        self.size = size
        self.mean, self.std = torch.tensor(colors)[:, :, None, None]

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Return views float (N,3,S,S) of images uint8 (N,3,H,W). Raises TypeError for others."""
        if images.dtype != torch.uint8 or images.shape[1:-2] != (3,):
            raise TypeError(f"images are uint8 (N,3,H,W), not {images.dtype} {tuple(images.shape)}")
        u = uniform(generator, len(images), 4, 10)
        boxes = crop_boxes(u, *images.shape[2:], self.scale)  # on the CPU: faster than many tiny GPU kernels
        crops = crop(images / 255, copy_to(boxes, images.device), self.size)
        return self.augment_crops(crops, generator)

    def augment_crops(self, x: Tensor, generator: Generator) -> Tensor:
        """Apply the recipe's transforms at random to crops (N,3,S,S) in [0,1], which are overwritten, and normalize."""
        for probability, transform in self.transforms:
            chosen = uniform(generator, len(x), 1, 1, 1, device=x.device) < probability
            x = x.lerp_(transform(x, generator), chosen.to(x))  # on a CPU, 20 times as fast as torch.where
        return self.normalize(x)

    def normalize(self, x: Tensor) -> Tensor:
        """Subtract the recipe's mean and divide by its std."""
        return (x - copy_to(self.mean, x.device)).div_(copy_to(self.std, x.device))

    def evaluation_view(self, images: Tensor, *_: Any) -> Tensor:
        """Resize the shorter side of images uint8 (…,3,H,W) to margin·S and crop the center: (…,3,S,S)."""
        longest = 2 * min(images.shape[-2:])  # a panorama is cut first: resizing all of it takes gigabytes
        images = tvf.center_crop(images, [min(side, longest) for side in images.shape[-2:]])
        images = tvf.resize(images, [round(self.size * self.margin)])
        return tvf.center_crop(images, [self.size])


@dataclass
class SplitTwoViews:
    """Make two views of every image, with separate draws for each view."""

    augment: Augment
    seed: int = 0

    def __call__(self, images: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return x_q, x_k (N,3,S,S) of images uint8 (N,3,H,W). Raises TypeError for others."""
        return self.augment(images, generator), self.augment(images, generator)

    def crop_file(self, image: Tensor, epoch: int, index: int) -> Tensor:
        """Crop an image uint8 (3,H,W) twice at its own resolution, in a thread of `Files`: (2,3,S,S)."""
        u = torch.rand(2, 4, 10, generator=rng("crop", self.seed, epoch, index))
        boxes = crop_boxes(u, *image.shape[1:], self.augment.scale)
        size = [self.augment.size] * 2
        return torch.stack([tvf.resized_crop(image, *box, size) for box in boxes.tolist()])

    def from_crops(self, crops: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return x_q, x_k (N,3,S,S) of a batch of `crop_file`, uint8 (2,N,3,S,S)."""
        return tuple(self.augment.augment_crops(x / 255, generator) for x in crops)


# ───────────────────────────────────────────── A step ─────────────────────────────────────────────
def train_step(
    model: Module,
    optimizer: torch.optim.Optimizer,
    split_two_views: Callable,
    images: Tensor,
    generator: Generator,
    indices: Tensor | None = None,
    autocast: Callable = contextlib.nullcontext,
) -> Tensor:
    """Train on a batch of images as algorithm 1 does; return the loss, detached. images: what split_two_views takes,
    e.g. uint8 (N,3,H,W). indices (N,): their numbers in the data set, for MemoryBank. Does not wait for the device."""
    x_q, x_k = split_two_views(images, generator)
    with autocast():
        loss = model(x_q, x_k, generator, indices)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


# ─────────────────────────────────────────── Evaluation ───────────────────────────────────────────
def knn_predict(features: Tensor, bank: Tensor, bank_labels: Tensor, classes: int, k: int, T: float) -> Tensor:
    """Return labels (N,) int64 of features (N,D) by kNN, 1805.01978: the k nearest of bank (M,D), or all M, vote
    with weight exp(cosine similarity / T). Similarities take 128 MiB at a time. Raises ValueError if k or M is 0."""
    if min(k, len(bank)) < 1:
        raise ValueError(f"k = {k} of {len(bank)}: at least one neighbor must vote")
    scale = 1 / bank.norm(dim=1).clamp(min=1e-12)  # of the similarities; F.normalize(bank) would be a copy
    predictions = []
    for chunk in F.normalize(features).split(max(1, 2**25 // len(bank))):
        similarity = (chunk @ bank.T).mul_(scale)  # (n,M)
        similarity, neighbors = similarity.topk(min(k, len(bank)))  # (n,k)
        weights = (similarity / T).softmax(1)  # exp(s/T) up to a factor per query: softmax cannot overflow
        votes = weights.new_zeros(len(chunk), classes).scatter_add_(1, bank_labels[neighbors], weights)
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def fit_linear(features: Tensor, labels: Tensor, classes: int, decay: float = 1e-4) -> nn.Linear:
    """Return a frozen linear classifier of features (M,D) with mean 0 and std 1: the minimum of cross-entropy with the
    labels (M,) + decay/2·‖W‖². It is convex: L-BFGS needs no learning rate; SGD's is 30 in 1911.05722, section 4.1."""
    linear = nn.Linear(features.shape[1], classes, device=features.device, dtype=features.dtype)
    parameters = [nn.init.zeros_(x) for x in linear.parameters()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-7)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(features), labels) + decay / 2 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return linear.requires_grad_(False)


# ───────────────────────────────────────────── Config ─────────────────────────────────────────────
import typer  # noqa: E402  imported here, so that the method can be copied without it
from rich.progress import Progress  # noqa: E402


class UserError(ValueError):
    """A mistake that a user can correct; the message names the flag or the file and what to do."""


@contextlib.contextmanager
def explain(what: str, kinds: Any = Exception) -> Iterator:
    """Turn errors of these kinds in a block into a UserError of one line: what is wrong, and the cause."""
    try:
        yield
    except kinds as error:
        cause = (error.__suppress_context__ and error.__context__) or error  # torch hides the original: "from None"
        message = str(cause).split("\n")[0].partition(" Please use")[0]  # torch's advice
        raise UserError(f"{what} ({type(cause).__name__}: {message})") from error


def option(default: Any, text: str, low: float | None = None, high: float = 2**31) -> Any:
    """Declare an option of Config and its --help; Typer refuses numbers outside [low, high]."""
    limits = {} if low is None else {"min": low, "max": high}  # --help would show those of text, too
    return field(default=default, metadata={"typer": typer.Option(help=text, **limits)})


@dataclass
class Config:
    """Hold the options of a run; Typer checks each. Raises UserError for values that do not go together."""

    preset: Literal["cifar10", "v1", "v2", "tiny", "cpu"] = option("cifar10", "defaults to start from")
    method: Literal["moco", "end-to-end", "memory-bank", "simclr"] = option("moco", "what queries are contrasted with")
    moco_dim: int = option(128, "C, dimension of the embedding", 1)
    moco_k: int = option(4096, "K, keys in the queue; smaller if the images are few", 1)
    moco_m: float = option(0.99, "m, momentum of the key encoder; larger for a longer queue", 0, 1)
    moco_t: float = option(0.1, "T, temperature of the loss", 1e-3)
    symmetric: bool = option(False, "with --method moco: query with both views, add the two losses")
    seed: int = option(0, "seed of weights, order, views and shuffles", 0)
    arch: Literal[tuple(ARCHS)] = option("resnet18", "backbone")
    stem: Literal["cifar", "imagenet"] = option("cifar", "3x3, or 7x7 with stride 2 and max-pool")
    width: float = option(1.0, "factor on all channels", 1 / 8, 16)
    mlp: bool = option(True, "2-layer head (v2), else a linear one (v1)")
    bn_splits: int = option(8, "groups that BatchNorm normalizes separately (simulated GPUs); 1 for simclr", 1)
    aug: Literal[tuple(RECIPES)] = option("cifar", "recipe of the views")
    size: int = option(32, "side of a view in pixels", 1, 2**14)
    batch_size: int = option(512, "images per step, of all processes", 2)
    data: str = option("cifar10", "cifar10, cifar100, shapes (built in) or a folder of images")
    epochs: int = option(100, "passes over the images", 1)
    lr: float = option(0.06, "peak learning rate; scale it with the batch size", 0)
    wd: float = option(5e-4, "weight decay", 0)
    cos: bool = option(True, "cosine decay of the learning rate; --no-cos: --schedule")
    schedule: list[int] = option((120, 160), "with --no-cos: epoch at which lr is divided by 10; repeat it for more", 0)
    precision: Literal["auto", "bf16", "fp32"] = option("auto", "auto: bf16 if the hardware is fast at it")
    knn_every: int = option(10, "epochs between kNN evaluations; 0: only at the end", 0)
    knn_k: int = option(200, "neighbors that vote", 1)
    knn_t: float = option(0.1, "temperature of their votes", 1e-3)
    head: bool = option(False, "evaluate the output of the head, not the pooled features")
    out: str = option("ckpt.pt", "checkpoint to write, with a .csv of the epochs beside it")
    resume: bool = option(False, "continue the run in --out, if there is one, with its options")
    save_seconds: float = option(300.0, "seconds between saves within an epoch", 0)
    root: str = option("data", "folder for the downloads of cifar10 and cifar100")
    workers: int = option(2, "threads per process that read a folder's images", 1)
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "where to compute")
    compile: bool = option(False, "torch.compile the encoders")
    json: bool = option(False, "print JSON objects, one per line")

    @classmethod
    def from_preset(cls, preset: str = "cifar10", **explicit: Any) -> "Config":
        """Return a preset's options, replaced by the explicit ones."""
        return cls(preset=preset, **(PRESETS[preset] | explicit))

    def __post_init__(self) -> None:
        for x in fields(self):  # to the default's type: checkpoints hold plain values, no np.int64
            setattr(self, x.name, type(x.default)(getattr(self, x.name)))
        if self.batch_size % self.bn_splits or self.batch_size < 2 * self.bn_splits:
            raise UserError(f"--batch-size {self.batch_size}: must be 2, 3, 4 … times --bn-splits {self.bn_splits}")
        smallest = 9 if self.stem == "cifar" else 33  # else layer4 has 1×1 maps, on which oneDNN's bf16 fails
        if self.size < smallest:
            raise UserError(f"--size {self.size}: --stem {self.stem} needs at least {smallest}")


HINTS = {x.name: Annotated[x.type, x.metadata["typer"]] for x in fields(Config)}
MAY_CHANGE = "data epochs lr wd cos schedule precision knn_every knn_k knn_t head".split()  # on --resume
RUNTIME = "out resume save_seconds root workers device compile json".split()  # no checkpoint decides these
COLUMNS = "epoch loss lr knn images_per_s seconds".split()  # of the .csv
IMAGENET = dict(arch="resnet50", stem="imagenet", size=224, data="data/imagenet", workers=16)
PAPERS = dict(IMAGENET, batch_size=256, lr=0.03, wd=1e-4, epochs=200, moco_k=65536, moco_m=0.999)
SMALL = dict(arch="resnet10", width=0.25, bn_splits=2)
PRESETS = {
    "cifar10": {},
    "v1": dict(PAPERS, aug="v1", mlp=False, moco_t=0.07, cos=False),
    "v2": dict(PAPERS, aug="v2", moco_t=0.2),
    "tiny": dict(SMALL, data="shapes", aug="v1", batch_size=64, moco_k=256, epochs=6, knn_every=3, knn_k=20),
    "cpu": dict(SMALL, aug="v2", size=24, batch_size=128, epochs=130),
}


# ────────────────────────────────────────────── Data ──────────────────────────────────────────────
@dataclass
class InMemory:
    """Hold images uint8 (M,3,H,W) of one size and labels (M,) int64, if any, on the device."""

    images: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, plan: Iterable, crop: Callable) -> Iterator:
        """For each (epoch, indices (N,)) of a plan, yield crop(images (N,3,H,W), epoch, indices) and the indices."""
        for epoch, indices in plan:
            images = self.images[copy_to(indices, self.images.device)]
            yield crop(images, epoch, indices), indices


@dataclass
class Files:
    """Read images from files when needed, in threads: Pillow and torch release Python's lock. labels as above."""

    paths: list[str]
    labels: Tensor | None
    device: torch.device
    workers: int

    def __len__(self) -> int:
        return len(self.paths)

    def batches(self, plan: Iterable, crop: Callable) -> Iterator:
        """Yield the same, stacked from crop(image (3,H,W), epoch, index) of each image. Raises UserError."""

        def read(epoch: int, indices: Tensor) -> tuple:
            crops = [crop(read_image(self.paths[i]), epoch, i) for i in indices.tolist()]
            return torch.stack(crops, dim=-4), indices  # (N,3,S,S), or from pairs (2,3,S,S): (2,N,3,S,S)

        # One torch thread per worker; by default, torch would start a team of threads in each worker.
        with ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            submitted = (pool.submit(read, *batch) for batch in plan)
            ahead = list(itertools.islice(submitted, 1 + self.workers))  # batches: one per worker, one to wait for
            while ahead:
                images, indices = ahead.pop(0).result()
                ahead += itertools.islice(submitted, 1)
                if self.device.type == "cuda":
                    images = images.pin_memory()  # else the copy waits for the device
                yield copy_to(images, self.device), indices


FORMATS = "JPEG PNG WEBP GIF BMP TIFF PPM AVIF".split()  # Pillow decodes them itself; for EPS it starts Ghostscript
SUFFIXES = tuple(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)
MEMORY = 2**30  # bytes: a split whose images have one size and take no more is kept in memory


def read_image(path: str) -> Tensor:
    """Decode an image file to RGB uint8 (3,H,W). Raises UserError if it is damaged, huge or gray of over 8 bits."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode[0] in "IF" or math.prod(image.size) > 9e7:  # modes I, I;16, F; a bomb, of which Pillow warns
                raise ValueError("more than 8 bits per channel or 90 million pixels")
            return tvf.pil_to_tensor(image.convert("RGB"))
    except Exception as error:  # damaged bytes can cause any
        cause = str(error).replace(repr(path), "").split("\n")[0].strip(": ")
        raise UserError(f"{path}: cannot be read ({cause}); replace it, or remove it and begin anew") from error


@dataclass
class Data:
    """Hold a data set: `train`, which kNN also uses as its bank, and `test`, which is None if there are no labels."""

    train: InMemory | Files
    test: InMemory | Files | None
    description: str  # which images were found where
    fingerprint: str | int  # of the images' number and names, not of their content


def load_data(config: Config, device: torch.device) -> Data:
    """Load the data set that --data names. Raises UserError where there are no images."""
    if config.data in ("shapes", "cifar10", "cifar100"):
        load = shapes if config.data == "shapes" else partial(cifar, config)
        train, test = (InMemory(*(x.to(device) for x in load(training))) for training in (True, False))
        return Data(train, test, f"{len(train)} images to train on, {len(test)} to test on", config.data)
    train, test, labels, description = find_splits(config.data)

    def open_split(split: list) -> InMemory | Files:
        paths = [os.path.join(config.data, path) for path in split]
        targets = torch.tensor([labels[path] for path in split], device=device) if labels else None
        images = []
        for path in paths:
            images.append(read_image(path))
            if images[-1].shape != images[0].shape or len(paths) * images[0].numel() > MEMORY:
                return Files(paths, targets, device, config.workers)
        return InMemory(torch.stack(images).to(device), targets)

    fingerprint = rng(*train, *test).initial_seed()  # a hash
    return Data(open_split(train), open_split(test) if test else None, description, fingerprint)


def cifar(config: Config, train: bool) -> tuple:
    """Return CIFAR's images uint8 (M,3,32,32) and labels (M,); rank 0 downloads them first."""
    load = partial(getattr(torchvision.datasets, config.data.upper()), config.root, train, download=True)
    with contextlib.suppress(OSError, RuntimeError):  # it fails again below, on all ranks
        if rank() == 0:
            load()
    all_gather(torch.zeros(1))  # the other ranks wait for the download
    with explain(f"--data {config.data}: no download to --root; try --data shapes", (OSError, RuntimeError)):
        split = load()
    return torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets)


def find_images(root: str) -> list[str]:
    """Return the sorted paths, from root, of all images below it that are not hidden. Follows links. Raises OSError."""
    found = []
    top = os.path.join(root, "")
    folders = [top]
    visited = set(Path(root).resolve().parents)  # links can form loops: no folder is read twice, and none above root
    while folders:
        folder = folders.pop()  # links stand in front and come last: a folder is found by its own name
        place = Path(folder).resolve()
        if place in visited:
            continue
        visited.add(place)
        visible = [entry for entry in os.scandir(folder) if entry.name[0] != "."]
        for entry in sorted(visible, key=lambda entry: entry.path):
            if entry.is_dir():
                folders.insert(0 if entry.is_symlink() else len(folders), entry.path)
            # Regular files only: to read a named pipe is to wait for ever.
            elif entry.name.lower().endswith(SUFFIXES) and stat.S_ISREG(entry.stat().st_mode):
                found.append(entry.path.removeprefix(top))
    return sorted(found)


def pick_folder(names: set[str], kind: str) -> str:
    """Return the name `kind`, in any case, else the only one that begins so, else "". Raises UserError for several."""
    fitting = sorted(name for name in names if name.lower().startswith(kind))
    fitting = [name for name in fitting if name.lower() == kind + os.sep] or fitting
    if len(fitting) > 1:
        raise UserError(f"--data: {' and '.join(fitting)} fit equally well; rename all but one")
    return fitting[0] if fitting else ""


def find_splits(root: str) -> tuple:
    """Return paths, from root, of the images to train and to test on, {path: label} and a description. A label is the
    number of train/CLASS; if no test image has one, there are no labels and no test split. Raises UserError."""
    found = find_images(root) if os.path.isdir(root) else []
    if not found:
        raise UserError(f"--data {root}: not cifar10, cifar100, shapes or a folder with images ({' '.join(SUFFIXES)})")
    tops = {path.split(os.sep)[0] + os.sep for path in found if os.sep in path}  # "train/a/x.png" → "train/"
    train_top = pick_folder(tops, "train")
    test_top = train_top and (pick_folder(tops, "val") or pick_folder(tops, "test"))
    train = [path for path in found if path.startswith(train_top)]
    test = [path for path in found if test_top and path.startswith(test_top)]
    classes = {path: path.split(os.sep)[1] for path in train + test if path.count(os.sep) > 1}  # "train/a/x.png": "a"
    numbers = {name: i for i, name in enumerate(sorted({classes[path] for path in train if path in classes}))}
    labels = {path: numbers[name] for path, name in classes.items() if name in numbers}
    outside = [path for path in train + test if path not in labels]
    if not any(path in labels for path in test):
        test, test_top, labels = [], "", {}
    elif outside:
        raise UserError(f"--data: {outside[0]} is in none of the class folders to train on")
    testing = f"{len(test)} to test on in {test_top}" if test else "no kNN: that needs train/CLASS/* and val/CLASS/*"
    others = sorted(tops - {train_top, test_top}) if train_top else []
    unread = f"; not read: {' '.join(others)}" if others else ""
    return train, test, labels, f"{len(train)} images to train on in {train_top or root}, {testing}{unread}"


def shapes(train: bool) -> tuple:
    """Draw 6,000 images uint8 (M,3,32,32), or 2,000 to test on, and labels (M,): five textures, coarse or fine."""
    n = 6_000 if train else 2_000
    draw = partial(torch.rand, generator=rng("shapes", train))
    labels = torch.arange(n) % 10
    angle, start_a, start_b = 2 * math.pi * draw(3, n, 1, 1)
    pitch = torch.tensor([6, 13])[labels // 5, None, None] * (0.85 + 0.3 * draw(n, 1, 1))  # radians per half side
    x = torch.linspace(-1, 1, 32)
    y = x[:, None]
    a = pitch * (x * angle.cos() + y * angle.sin()) + start_a
    b = pitch * (y * angle.cos() - x * angle.sin()) + start_b
    checks = a.sin() * b.sin()
    dots = a.cos() + b.cos() - 0.5
    grid = torch.maximum(a.sin(), b.sin()) - 0.8
    waves = (a + 2 * (b / 2).sin()).sin()
    textures = torch.stack([a.sin(), checks, dots, grid, waves])
    mix = (0.5 + 2 * textures[labels % 5, torch.arange(n)]).clamp(0, 1)
    gray = draw(n, 1, 1, 1)
    images = torch.lerp((gray + 1 / 3) % 1, gray, mix[:, None]) + 0.3 * draw(n, 3, 32, 32)
    return (images.clamp(0, 1) * 255).byte(), labels


@torch.no_grad()
def extract_features(
    encoder: Module, images: InMemory | Files, config: Config, autocast: Callable, stop: Callable = lambda: None
) -> Tensor:
    """Return pooled features float32 (M,D), with --head embeddings, in eval mode. Raises InterruptedError if stop()."""
    augment = Augment(config.aug, config.size)
    total = world_size() * math.ceil(len(images) / world_size())  # as many for every rank: the last image repeats
    indices = local_rows(torch.arange(total).clamp(max=len(images) - 1))
    plan = ((0, batch) for batch in indices.split(512))  # epoch 0: evaluation_view ignores it
    embed_batch = encoder if config.head else encoder.features
    encoder.eval()
    features = []
    for batch, _ in images.batches(plan, augment.evaluation_view):
        if stop():
            raise InterruptedError
        with autocast():
            features.append(embed_batch(augment.normalize(batch / 255)).float())
    return all_gather(torch.cat(features))[: len(images)]


def accuracy(
    encoder: Module, data: Data, config: Config, autocast: Callable, linear: bool = False, stop: Callable = lambda: None
) -> float:
    """Return the percentage of test images that kNN (or a linear classifier) gets right."""
    bank = extract_features(encoder, data.train, config, autocast, stop)
    features = extract_features(encoder, data.test, config, autocast, stop)
    labels = data.train.labels
    classes = int(labels.max()) + 1
    if linear:
        std, mean = torch.std_mean(bank, 0)  # of the training split, for both splits
        std = std.clamp(min=1e-6)
        classifier = fit_linear((bank - mean) / std, labels, classes)
        predicted = classifier((features - mean) / std).argmax(1)
    else:
        predicted = knn_predict(features, bank, labels, classes, config.knn_k, config.knn_t)
    return 100 * (predicted == data.test.labels).sum().item() / len(predicted)


# ────────────────────────────────────────── Checkpoints ───────────────────────────────────────────
def check_new(path: str) -> None:
    """Raise UserError if a file exists already, or if the folder to write it to does not."""
    if os.path.exists(path) or not Path(path).parent.is_dir():
        raise UserError(f"{path}: must be a new file, in a folder that exists; train --resume continues a run")


def write_file(path: str, content: bytes) -> None:
    """Write atomically: readers see the old file or the new one. Raises UserError if it fails."""
    target = os.path.realpath(path)  # a link stays a link
    temporary = f"{target}.{os.urandom(4).hex()}.tmp"  # unique: two runs may write one path
    with explain(f"{path}: not written; the old file, if any, is kept", OSError):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)  # it is gone if all went well


def save_checkpoint(path: str, checkpoint: dict) -> None:
    """Write a checkpoint atomically. Raises UserError."""
    buffer = io.BytesIO()  # to a path, torch.save hides what is wrong with a disk
    torch.save(checkpoint, buffer)
    write_file(path, buffer.getbuffer())


def check_tensors(tensors: dict, expected: dict) -> None:
    """Raise ValueError unless tensors have the names, shapes and dtypes expected, and are finite."""
    if tensors.keys() != expected.keys():
        raise ValueError(f"missing or unexpected: {min(tensors.keys() ^ expected.keys())}")
    for name, right in expected.items():
        x = tensors[name]
        fits = isinstance(x, Tensor) and (x.shape, x.dtype) == (right.shape, right.dtype)
        # With stride 0, a tensor claims more than it holds: a file of a few bytes could fill the memory.
        if not fits or x.nbytes > x.untyped_storage().nbytes() or not x.isfinite().all():
            raise ValueError(f"{name} is not {right.dtype} {tuple(right.shape)}, complete and finite")


def load_checkpoint(path: str) -> dict:
    """Read a checkpoint, ours or an official one, onto the CPU; nothing in it is executed. "config" keeps the known
    options except RUNTIME. Raises UserError for a file that is missing, damaged or no checkpoint."""
    with explain(f"{path}: not a checkpoint"):  # damaged bytes can cause any error
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch checks no checksums; compressed records can hold gigabytes
                odd = any(x.compress_type or x.external_attr & 16 for x in archive.infolist())  # 16: a folder
                if odd or archive.testzip():
                    raise ValueError("a record is damaged, compressed or a folder")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["epoch"] = int(checkpoint["epoch"])
        config = {"preset": "v2"} | checkpoint.get("config", {})  # official ones have no options
        if config.get("eval_size"):  # of versions before 0.3
            config["size"] = config["eval_size"]
        checkpoint["config"] = {x: config[x] for x in config if x in HINTS and x not in RUNTIME}
        Augment(Config.from_preset(**checkpoint["config"]).aug)  # raises for a preset or recipe that is not here
    return checkpoint


def load_encoder(checkpoint: dict, path: str) -> ResNetEncoder:
    """Rebuild a checkpoint's query encoder from its weights' shapes, in eval mode. Raises UserError if none fits."""
    with explain(f"{path}: encoder_q is not one of {', '.join(ARCHS)}"):
        named = checkpoint["state_dict"].items()
        weights = {name.partition("encoder_q.")[2]: x for name, x in named if "encoder_q." in name}
        channels, _, kernel, _ = weights["conv1.weight"].shape
        stem = "cifar" if kernel == 3 else "imagenet"
        mlp = "fc.0.weight" in weights
        dim = len(weights["fc.2.bias" if mlp else "fc.bias"])
        with torch.device("meta"):  # nothing is allocated before names and shapes are checked
            encoder = ResNetEncoder(checkpoint["arch"], dim, mlp, bn_splits=1, stem=stem, width=channels / 64)
        check_tensors(weights, encoder.state_dict())
        encoder.load_state_dict(weights, assign=True)
    return encoder.eval()


# ──────────────────────────────────────────── Training ────────────────────────────────────────────
def keep_freed_memory() -> None:
    """Let the C library keep freed memory on a CPU: to get it again from the system costs 1/6 of a step."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # not every system has mallopt
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def pick_device(config: Config) -> tuple:
    """Return the device, the precision (auto: bf16 if fast) and its autocast. Joins the processes that WORLD_SIZE and
    torchrun's other variables describe. Raises UserError."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = config.device.replace("auto", best)
    if name not in (best, "cpu"):
        raise UserError(f"--device {name}: torch finds none here; give --device auto")
    with explain("WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT describe no processes", (ValueError, dist.DistError)):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and world_size() == 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo")
    fast = False
    if name == "cuda":
        torch.cuda.set_device(rank() % torch.cuda.device_count())
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif name == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported()
        keep_freed_memory()
    precision = config.precision.replace("auto", "bf16" if fast else "fp32")
    return torch.device(name), precision, partial(torch.autocast, name, torch.bfloat16, enabled=precision == "bf16")


def build_model(config: Config, num_images: int) -> Module:
    """Return the model of a configuration; seeds torch, from which the first weights come."""
    torch.manual_seed(config.seed)
    dim, K, T = config.moco_dim, config.moco_k, config.moco_t
    splits = config.bn_splits // world_size()
    encoder = ResNetEncoder(config.arch, dim, config.mlp, splits, config.stem, config.width)
    if config.method == "moco":
        return MoCo(encoder, dim, K, config.moco_m, T, config.symmetric)
    if config.method == "memory-bank":
        return MemoryBank(encoder, num_images, dim, K, T=T)
    return {"simclr": SimCLR, "end-to-end": EndToEnd}[config.method](encoder, T)


def learning_rate(config: Config, epoch: float) -> float:
    """Return the learning rate after `epoch` epochs: cosine decay, or divided by 10 at each of --schedule."""
    if config.cos:
        return config.lr * 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
    return config.lr * 0.1 ** sum(epoch >= milestone for milestone in config.schedule)


def batch_plan(n: int, config: Config) -> Iterator:
    """Yield each step's epoch and this rank's indices (N,): every epoch is a permutation, cut to full batches."""
    for epoch in range(config.epochs):
        order = torch.randperm(n, generator=rng("order", config.seed, epoch))
        for indices in order.split(config.batch_size)[: n // config.batch_size]:
            yield epoch, local_rows(indices)


def training_crops(images: InMemory | Files, config: Config) -> tuple:
    """Return `crop`, for images.batches, and what makes x_q, x_k of its batches: files are cropped as they are read."""
    two_views = SplitTwoViews(Augment(config.aug, config.size), config.seed)
    if isinstance(images, Files):
        return two_views.crop_file, two_views.from_crops
    return lambda batch, *_: batch, two_views


class Run:
    """Train as a Config says, from the start or, with `resume`, from `out`, which holds all that training changes: the
    run ends as if never stopped. Raises UserError, before anything is written, if options, files or data do not fit."""

    def __init__(self, config: Config) -> None:
        self.device, self.precision, self.autocast = pick_device(config)
        self.config = config
        if config.bn_splits % world_size():
            raise UserError(f"--bn-splits {config.bn_splits}: must be a multiple of the {world_size()} processes")
        self.csv_path = config.out.removesuffix(".pt") + ".csv"
        resumes = config.resume and os.path.exists(config.out)
        if not resumes:
            check_new(config.out)
            check_new(self.csv_path)
        self.data = load_data(config, self.device)
        n = len(self.data.train)
        if config.batch_size > n:
            raise UserError(f"--batch-size {config.batch_size}: give a multiple of --bn-splits up to the {n} images")
        self.model = build_model(config, n).to(self.device, memory_format=torch.channels_last)
        if config.compile:
            for encoder in self.model.children():
                encoder.compile()
        parameters = self.model.encoder_q.parameters()
        self.optimizer = torch.optim.SGD(parameters, momentum=0.9, weight_decay=config.wd, fused=True)
        self.crop, self.two_views = training_crops(self.data.train, config)
        self.steps_per_epoch = n // config.batch_size
        self.step = 0
        self.rows = []
        self.losses = torch.zeros(self.steps_per_epoch, device=self.device)  # of the epoch
        self.began = time.monotonic()  # of the epoch; on resume, moved back by the seconds it has taken
        if resumes:
            self.restore(load_checkpoint(config.out))
        key = torch.tensor([rng(self.data.fingerprint, self.step).initial_seed()])  # a hash, equal on all ranks
        if (all_gather(key) != key).any():
            raise UserError(f"--data {config.data} or --out {config.out} is not the same for all processes")
        self.ddp_model = nn.parallel.DistributedDataParallel(self.model) if world_size() > 1 else self.model
        self.ddp_model.broadcast_buffers = False  # of DDP: each rank keeps its own; as an argument it is deprecated

    def restore(self, checkpoint: dict) -> None:
        """Return to where a checkpoint was saved. Raises UserError if it is of another run."""
        for name, saved in checkpoint["config"].items():  # without RUNTIME
            value = getattr(self.config, name)
            if name not in MAY_CHANGE and value != saved:
                raise UserError(f"--{name.replace('_', '-')} {value}: --resume continues a run with {saved}")
        with explain(f"--resume: {self.config.out} does not fit this run"):
            if checkpoint["fingerprint"] != self.data.fingerprint:
                raise ValueError(f"--data {self.config.data} has other images")
            check_tensors(checkpoint["state_dict"], self.model.state_dict(prefix="module."))
            weights = {name.removeprefix("module."): x for name, x in checkpoint["state_dict"].items()}
            self.model.load_state_dict(weights)
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.optimizer.param_groups[0]["weight_decay"] = self.config.wd
            self.losses.copy_(checkpoint["losses"])
            self.rows = checkpoint["rows"]
            self.step = checkpoint["step"]
            self.began -= checkpoint["seconds"]

    def train(self, stop: Callable = lambda: None) -> Iterator:
        """Train to the end, or until stop() is true. After every step, yield the row of the epoch it ended, or None.
        Save after each epoch, every save_seconds and when stopped. Raises UserError for a bad image, loss or disk."""
        self.next_save = 0  # after the first step: a full disk fails now, not after an epoch
        plan = itertools.islice(batch_plan(len(self.data.train), self.config), self.step, None)
        batches = self.data.train.batches(plan, self.crop)
        with contextlib.suppress(InterruptedError):  # raised by end_epoch during kNN, before which it has saved
            while len(self.rows) < self.config.epochs and not self.agree(stop()):
                last_step = (len(self.rows) + 1) * self.steps_per_epoch  # of the epoch
                if self.step < last_step:  # else kNN was stopped after it
                    self.take_step(*next(batches))
                row = self.end_epoch(stop) if self.step == last_step else None
                if row or self.agree(time.monotonic() >= self.next_save):
                    self.save()
                yield row
            if len(self.rows) < self.config.epochs:  # stopped; a complete run is left as it is
                self.save()

    def take_step(self, images: Tensor, indices: Tensor) -> None:
        """Train on a batch with the learning rate and the random numbers of the step."""
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.config, self.step / self.steps_per_epoch)
        generator = rng("step", self.config.seed, self.step)
        loss = train_step(self.ddp_model, self.optimizer, self.two_views, images, generator, indices, self.autocast)
        self.losses[self.step % self.steps_per_epoch] = all_gather(loss[None]).mean()
        self.step += 1

    def end_epoch(self, stop: Callable) -> dict:
        """Append and return the row of an epoch that has ended, with kNN if due. Raises InterruptedError if stop()."""
        config = self.config
        epoch = len(self.rows) + 1
        loss = self.losses.mean().item()  # waits for the device, before the speed is taken
        speed = self.steps_per_epoch * config.batch_size / (time.monotonic() - self.began)
        knn = None
        due = epoch == config.epochs or (config.knn_every and epoch % config.knn_every == 0)
        if due and self.data.test is not None:
            self.save()  # a run that ends during kNN loses nothing, and all ranks have the same statistics
            knn = accuracy(self.model.encoder_q, self.data, config, self.autocast, stop=lambda: self.agree(stop()))
            self.model.train()
        values = (epoch, loss, learning_rate(config, epoch - 1), knn, speed, time.monotonic() - self.began)
        self.rows.append(dict(zip(COLUMNS, values)))
        self.began = time.monotonic()
        return self.rows[-1]

    def agree(self, flag: Any) -> bool:
        """Return whether any rank's `flag` is true."""
        return bool(all_gather(torch.tensor([bool(flag)])).any())

    def save(self) -> None:
        """Write checkpoint and .csv, on rank 0. Raises UserError if a number is not finite."""
        for name, statistic in self.model.named_buffers():
            if "running_" in name:  # of BatchNorm: the mean of all ranks, as one process with all groups has it
                statistic.copy_(all_gather(statistic[None]).mean(0))
        weights = self.model.state_dict(prefix="module.")
        if not all(x.isfinite().all() for x in (self.losses, *weights.values())):
            raise UserError(f"loss or weights not finite after step {self.step}; use a lower --lr or --precision fp32")
        checkpoint = {
            "epoch": self.step // self.steps_per_epoch,
            "step": self.step,
            "arch": self.config.arch,
            "state_dict": weights,
            "optimizer": self.optimizer.state_dict(),
            "config": asdict(self.config),
            "fingerprint": self.data.fingerprint,
            "losses": self.losses,
            "rows": self.rows,
            "seconds": time.monotonic() - self.began,
        }
        if rank() == 0:
            save_checkpoint(self.config.out, checkpoint)
            table = io.StringIO()
            csv.writer(table, lineterminator="\n").writerows([COLUMNS, *(row.values() for row in self.rows)])
            write_file(self.csv_path, table.getvalue().encode())  # last: never ahead of the checkpoint
        self.agree(False)  # no rank goes on, and reads the file, before it is there
        self.next_save = time.monotonic() + self.config.save_seconds


# ────────────────────────────────────────── Command line ──────────────────────────────────────────
app = typer.Typer(help=__doc__.splitlines()[0], no_args_is_help=True, pretty_exceptions_enable=False)
DATA_OPTIONS = "data root size workers aug device precision head"
LINEAR_OPTIONS = DATA_OPTIONS + " json"
KNN_OPTIONS = LINEAR_OPTIONS + " knn_k knn_t"


def command(function: Callable, names: str, defaults: Any = None) -> Callable:
    """Make a function a Typer command. It gets the options that are given; a preset or checkpoint decides the rest."""

    def call(context: typer.Context, **values: Any) -> None:
        function(**{x: values[x] for x in values if context.get_parameter_source(x).name == "COMMANDLINE"})

    parameter = partial(inspect.Parameter, kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)  # Typer reads signatures
    *arguments, _ = inspect.signature(function).parameters.values()  # without **options
    options = [parameter(x, annotation=HINTS[x], default=getattr(defaults, x, None)) for x in names.split()]
    call.__signature__ = inspect.Signature([parameter("context", annotation=typer.Context), *arguments, *options])
    app.command(function.__name__, help=function.__doc__)(call)
    return function


@contextlib.contextmanager
def catch_signals() -> Iterator:
    """Yield a list of the signals received, for the caller to act on. A second one gets the earlier handlers; with
    several processes it is only collected, since torchrun repeats the first. Only the main thread may have handlers."""
    names = "SIGINT SIGTERM SIGHUP SIGUSR1".split()  # clusters send SIGUSR1 before their time limit
    received = []

    def collect(number: int, _: Any) -> None:
        received.append(number)
        if world_size() == 1:
            earlier.close()

    with contextlib.ExitStack() as earlier:  # puts the handlers back
        with contextlib.suppress(ValueError):  # outside the main thread
            for number in signal.Signals:  # not every system has all
                if number.name in names and signal.getsignal(number) != signal.SIG_IGN:  # which nohup sets
                    before = signal.signal(number, collect)
                    earlier.callback(signal.signal, number, before)
        yield received


def say(line: str, to_stderr: bool = False) -> None:
    """Print a line, on rank 0 only; to stderr under --json, which keeps stdout for JSON objects."""
    if rank() == 0:
        print(line, file=sys.stderr if to_stderr else sys.stdout, flush=True)


def describe(result: dict) -> str:
    """Format a result for people: its names and values, without those that are None."""
    values = (f"{key} {x:.5g}" if isinstance(x, float) else f"{key} {x}" for key, x in result.items() if x is not None)
    return "  ".join(values)


@partial(command, names=" ".join(HINTS), defaults=Config)
def train(**options: Any) -> list:
    """Train an encoder without labels."""
    out = options.get("out", Config.out)
    if options.get("resume") and os.path.exists(out):
        options = load_checkpoint(out)["config"] | options
    run = Run(Config.from_preset(**options))
    config = run.config
    say(f"{config.data}: {run.data.description}; {run.device}, {run.precision}", config.json)
    if max(config.moco_k, 2 * config.knn_k) > len(run.data.train):
        say(f"note: --moco-k or --knn-k, if used, is large for {len(run.data.train)} images", config.json)
    hidden = config.json or rank() > 0 or not sys.stdout.isatty()
    bar = Progress(speed_estimate_period=math.inf, disable=hidden)  # inf: slow steps, too, get an estimate
    task = bar.add_task("", total=config.epochs * run.steps_per_epoch, completed=run.step)
    with bar, catch_signals() as received:
        for row in run.train(lambda: received):
            bar.update(task, completed=run.step)
            if row:
                left = row["seconds"] * (config.epochs - row["epoch"]) / 60
                say(dumps(row) if config.json else describe(row | {"minutes_left": left}))
    if len(run.rows) < config.epochs:
        say(f"{config.out}: stopped after step {run.step}; to go on, give the same command with --resume", config.json)
        sys.exit(128 + (received[0] if received else signal.SIGTERM))  # else another rank received it
    say(f"{config.out}: {len(run.rows)} epochs done", config.json)
    return run.rows


def load_for_evaluation(path: str, options: dict) -> tuple:
    """Return a checkpoint's encoder, data, config with the options given, autocast and epoch."""
    checkpoint = load_checkpoint(path)
    config = Config.from_preset(**checkpoint["config"] | options)
    device, precision, autocast = pick_device(config)
    config = replace(config, device=device.type, precision=precision)  # what "auto" is here, for the result
    encoder = load_encoder(checkpoint, path).to(device, memory_format=torch.channels_last)
    return encoder, load_data(config, device), config, autocast, checkpoint["epoch"]


def evaluate(classifier: str, names: str, path: str, options: dict) -> dict:
    """Print and return a checkpoint's accuracy, `top1` in percent, and the settings that made it."""
    encoder, data, config, autocast, epoch = load_for_evaluation(path, options)
    if data.test is None:
        raise UserError(f"--data {config.data}: {data.description}")
    top1 = accuracy(encoder, data, config, autocast, linear=classifier == "linear")
    result = dict(classifier=classifier, top1=top1, checkpoint=str(path), epoch=epoch)
    result |= {name: getattr(config, name) for name in names.split()}
    result |= dict(bank=len(data.train), queries=len(data.test))
    say(dumps(result) if config.json else describe(result))
    return result


@partial(command, names=KNN_OPTIONS)
def knn(checkpoint: str, **options: Any) -> dict:
    """Measure kNN accuracy. Defaults are the checkpoint's options, but for --root, --workers and --device."""
    return evaluate("knn", KNN_OPTIONS, checkpoint, options)


@partial(command, names=LINEAR_OPTIONS)
def linear(checkpoint: str, **options: Any) -> dict:
    """Measure a linear classifier. Defaults are the checkpoint's options, but for --root, --workers and --device."""
    return evaluate("linear", LINEAR_OPTIONS, checkpoint, options)


@app.command("export")
def export(checkpoint: str, output: str) -> None:
    """Write a checkpoint's backbone, without its head, under torchvision's names."""
    check_new(output)
    encoder = load_encoder(load_checkpoint(checkpoint), checkpoint)
    encoder.fc = nn.Identity()
    save_checkpoint(output, encoder.state_dict())


@partial(command, names="preset data root size aug seed", defaults=Config)
def views(output: str, **options: Any) -> None:
    """Draw eight images, each beside four pairs of its views."""
    config = Config.from_preset(**options)
    check_new(output)
    train = load_data(config, torch.device("cpu")).train
    augment = Augment(config.aug, config.size)
    crop, split_two_views = training_crops(train, config)
    chosen = torch.randperm(len(train), generator=rng("picture", config.seed))[:8]
    [(images, _)] = train.batches([(0, chosen)], augment.evaluation_view)
    columns = [images / 255]
    gap = torch.ones_like(columns[0])
    for step, (crops, _) in enumerate(train.batches([(epoch, chosen) for epoch in range(4)], crop)):
        pair = split_two_views(crops, rng("step", config.seed, step))
        columns += [gap, *(x * augment.std + augment.mean for x in pair)]
    torchvision.utils.save_image(torch.stack(columns, 1).flatten(0, 1), output, "png", nrow=len(columns), pad_value=1)


@partial(command, names=f"{DATA_OPTIONS} seed")
def neighbors(checkpoint: str, output: str, **options: Any) -> None:
    """Draw ten test images (without labels, training images) beside their nearest, faded if of another class."""
    check_new(output)
    encoder, data, config, autocast, _ = load_for_evaluation(checkpoint, options)
    queries = data.test or data.train
    bank = F.normalize(extract_features(encoder, data.train, config, autocast))
    chosen = torch.randperm(len(queries), generator=rng("picture", config.seed))[:10]
    features = F.normalize(extract_features(encoder, queries, config, autocast))
    nearest = (features[chosen] @ bank.T).topk(min(10, len(bank))).indices.cpu()  # (10,10), or fewer
    crop = Augment(config.aug, config.size).evaluation_view
    [(query, _)] = queries.batches([(0, chosen)], crop)
    [(found, _)] = data.train.batches([(0, nearest.flatten())], crop)
    found = found.unflatten(0, nearest.shape)
    if data.test is not None:
        other = data.train.labels[nearest] != queries.labels[chosen, None]
        found[other] = found[other] // 4 + 192  # faded
    columns = [query, torch.full_like(query, 255), *found.unbind(1)]
    picture = torch.stack(columns, 1).flatten(0, 1) / 255
    torchvision.utils.save_image(picture, output, "png", nrow=len(columns), pad_value=1)


def main(argv: list[str] | None = None) -> None:
    """Run a command line. Raises SystemExit if it fails: status 2, after a line on stderr, for a user's mistake."""
    try:
        app(args=argv)
    except SystemExit as end:
        if not end.code:
            return
        if end.code != 1:
            raise
        line = "stdout was closed"  # Typer exits with 1 for a broken pipe
    except (UserError, OSError) as error:
        line = str(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # on a CPU, torch has no class for it
            raise
        line = "too little memory; smaller images, batches or encoders take less"
    finally:
        if world_size() > 1:
            dist.destroy_process_group()
    print(f"moco: {line}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
