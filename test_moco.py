"""The specification of moco.py, section by section: every test's name is the sentence that it proves."""

import ast
import builtins
import contextlib
import copy
import dataclasses
import dis
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import types
import zipfile
from collections import deque
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from unittest.mock import Mock

import numpy
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as tvf
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader
from torchvision.models.resnet import BasicBlock, ResNet

import moco
from moco import Augment, Config, MoCo, ResNetEncoder, SplitBatchNorm, SplitTwoViews, UserError, info_nce, rng

CPU = torch.device("cpu")
SEEDS = st.integers(0, 2**31)
METHODS = ("moco", "end-to-end", "memory-bank", "simclr")
TEMPERATURES = st.floats(0.05, 2)
MOCO = str(Path(moco.__file__))


def close(actual, expected, atol=1e-5, rtol=None):
    rtol = min(atol, 1e-5) if rtol is None else rtol  # as strict as atol
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol, check_dtype=False)


def unit(n, dim, seed, dtype=torch.float64):
    return F.normalize(torch.randn(n, dim, generator=rng(seed), dtype=dtype), dim=1)


def images_of(n, height=32, width=32, seed=0):
    return torch.randint(0, 256, (n, 3, height, width), generator=rng(seed), dtype=torch.uint8)


def draws(generator, *shape):
    return torch.rand(shape, generator=generator)


def tiny_config(**options):
    base = dict(data="shapes", width=0.125, bn_splits=2, batch_size=8, moco_k=32, moco_dim=16, epochs=2)
    return Config.from_preset(**{**base, "device": "cpu", "precision": "fp32", "knn_k": 5, **options})


def training(folder, stop=lambda: False, **options):
    return moco.Run(tiny_config(out=str(folder / "c.pt"), **options)).train(stop)


def kolmogorov_smirnov(a, b):
    """Return the largest distance between two samples' distribution functions."""
    points = torch.cat([a, b]).sort()[0]
    below = [torch.searchsorted(x.sort()[0].contiguous(), points, right=True) / len(x) for x in (a, b)]
    return (below[0] - below[1]).abs().max()


def uncorrelated(rows):
    """Return whether no two rows of samples are correlated; false alarm: 1 in 1000 for six pairs."""
    return (rows.corrcoef() - torch.eye(len(rows))).abs().max() < 3.9 / math.sqrt(rows.shape[1])


def same(a, b):
    """Compare trees of dicts, lists and tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def small_sets():
    return {train: [x[:n] for x in moco.shapes(train)] for train, n in ((True, 40), (False, 20))}


@pytest.fixture
def few(small_sets, monkeypatch):
    """Shrink the built-in images to 40 to train on and 20 to test on."""
    monkeypatch.setattr(moco, "shapes", lambda train: small_sets[train])


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, small_sets):
    """Train for two epochs of five steps; return what was saved."""
    folder = tmp_path_factory.mktemp("checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moco, "shapes", lambda train: small_sets[train])
        list(training(folder))
    return moco.load_checkpoint(str(folder / "c.pt"))


def contiguous_only(collective):  # NCCL refuses other tensors, gloo does not
    def call(*tensors):
        assert all(x.is_contiguous() for x in tree_leaves(tensors))
        return collective(*tensors)

    return call


def on_ranks(size, function):
    """Return what a function returns on each of `size` ranks, which are forked processes."""
    with tempfile.TemporaryDirectory() as place:

        def work(rank):
            torch.set_num_threads(1)
            for name in ("all_gather", "all_reduce"):
                setattr(torch.distributed, name, contiguous_only(getattr(torch.distributed, name)))
            options = dict(rank=rank, world_size=size, timeout=torch.distributed.constants.default_pg_timeout / 15)
            torch.distributed.init_process_group("gloo", f"file://{place}/group", **options)
            torch.save(function(), f"{place}/{rank}")
            torch.distributed.barrier()  # a rank that leaves early may end the others
            torch.distributed.destroy_process_group()

        torch.multiprocessing.start_processes(work, nprocs=size, start_method="fork")
        return [torch.load(f"{place}/{rank}") for rank in range(size)]


def flag(name):
    return "--" + name.replace("_", "-")


def gradient(y, x):
    return torch.autograd.grad(y, x, retain_graph=True)[0]


class TestRandomNumbers:
    @given(st.integers(0, 10**6), st.integers(0, 10**6))
    def test_a_generator_is_a_function_of_its_key(self, a, b):
        expected = draws(rng("x", a), 8)
        assert torch.equal(draws(rng("x", a), 8), expected)
        assert torch.equal(draws(rng("x", b), 8), expected) == (a == b)
        assert not torch.equal(draws(rng("y", a), 8), expected)

    def test_every_part_of_a_key_counts_and_so_does_its_place(self):
        keys = itertools.product((1, 11, 111), repeat=6)
        seeds = {rng("crop", *key).initial_seed() for key in keys}
        assert len(seeds) == 3**6

    def test_a_key_has_the_same_generator_on_every_machine(self):
        assert rng("step", 1, 2).initial_seed() == 3900142208

    @pytest.mark.parametrize("place, waits", [("cuda:1", False), ("mps", True), ("cpu", True)])
    def test_only_a_copy_to_cuda_does_not_wait_since_mps_may_read_a_source_that_is_gone(self, place, waits):
        x = Mock()
        moco.copy_to(x, torch.device(place))
        x.to.assert_called_once_with(torch.device(place), non_blocking=not waits)

    @pytest.mark.parametrize("size", [2, 3])
    def test_ranks_hold_contiguous_rows_of_the_global_batch_and_of_its_random_numbers(self, size):
        x = torch.arange(2 * size)
        results = on_ranks(size, lambda: (moco.local_rows(x), moco.uniform(rng(0), 2, 5)))
        rows, numbers = zip(*results)
        assert [row.tolist() for row in rows] == x.view(size, 2).tolist()
        assert torch.equal(torch.cat(numbers), moco.uniform(rng(0), 2 * size, 5))

    def test_all_gather_returns_the_rows_of_all_ranks_in_their_order_with_gradients(self):
        x = torch.rand(6, 3, 4, 4, requires_grad=True).to(memory_format=torch.channels_last)

        def gather():
            gathered = moco.all_gather(moco.local_rows(x))
            return gathered.detach(), gathered.requires_grad

        for gathered, has_gradient in on_ranks(3, gather):
            assert torch.equal(gathered, x)
            assert has_gradient

    @pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.T.contiguous().T, lambda x: x[:1, :1].expand(6, 2)])
    def test_gradients_are_summed_over_ranks_in_a_copy_since_autograd_may_reuse_its_own(self, layout):
        total = layout(torch.rand(6, 2))

        def backward():  # called by hand: a forked process has no autograd if its parent used CUDA
            own = layout(total * (1 + moco.rank()))
            before = own.clone()
            return moco.AllGather.backward(None, own), torch.equal(own, before)

        sums, kept = zip(*on_ranks(3, backward))
        close(torch.cat(sums), total * (1 + 2 + 3))
        assert all(kept)

    def test_a_second_derivative_through_the_ranks_is_an_error_and_not_a_wrong_number(self, monkeypatch):
        monkeypatch.setattr(torch.distributed, "all_gather", lambda rows, x: rows[0].copy_(x))
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: None)
        x = torch.full((2, 3), 5.0, requires_grad=True)
        cubes = moco.AllGather.apply(x) ** 3
        (first,) = torch.autograd.grad(cubes.sum(), x, create_graph=True)
        close(first, 3 * x.detach() ** 2)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(first.sum(), x)


def linear_moco(seed=0, **options):
    torch.manual_seed(seed)
    return MoCo(nn.Linear(5, 4), **{"dim": 4, "K": 6, "m": 0.7, "T": 0.2, **options})


def parameters_of(model):
    """Return the pairs of parameters (θ_k, θ_q)."""
    return list(zip(model.encoder_k.parameters(), model.encoder_q.parameters(), strict=True))


class TestMomentum:
    @given(SEEDS, st.floats(0, 1))
    def test_an_update_moves_every_key_parameter_in_place_by_eq_2(self, seed, m):
        torch.manual_seed(seed)
        encoder = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5)).double()
        model = MoCo(encoder, dim=5, K=1, m=m)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        memory = [k.detach() for k in model.encoder_k.parameters()]
        before = copy.deepcopy(parameters_of(model))
        model.momentum_update()
        for (k, q), (old_k, old_q), seen in zip(parameters_of(model), before, memory, strict=True):
            close(k, m * old_k + (1 - m) * old_q, atol=1e-12)
            assert torch.equal(q, old_q)
            assert torch.equal(k, seen)

    def test_batch_norm_statistics_have_no_momentum_but_come_from_the_keys_own_views(self):
        model = MoCo(nn.BatchNorm1d(3), dim=3, K=2, m=0)
        im_q = torch.randn(9, 3)
        im_k = torch.randn(9, 3) + 5
        for _ in range(2):  # the second update would move them
            model(im_q, im_k)
        close(model.encoder_k.running_mean, (1 - 0.9**2) * im_k.mean(0))
        close(model.encoder_q.running_mean, (1 - 0.9**2) * im_q.mean(0))
        assert model.encoder_k.num_batches_tracked == model.encoder_q.num_batches_tracked == 2


def cross_entropy(q, k, negatives, t):
    """Compute cross-entropy over the K+1 logits [q·k₊, q·negatives]/t with label 0."""
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives], dim=1)
    return F.cross_entropy(logits / t, torch.zeros(len(q), dtype=torch.long))


class TestInfoNCE:
    @given(SEEDS, st.integers(1, 6), st.integers(1, 8), st.integers(0, 9), TEMPERATURES)
    def test_the_loss_and_its_gradients_are_those_of_k_plus_1_way_cross_entropy(self, seed, n, dim, K, t):
        q = unit(n, dim, seed).requires_grad_()
        k = unit(n, dim, seed + 1).requires_grad_()
        negatives = unit(K, dim, seed + 2).T.requires_grad_()
        actual = info_nce(q, k, negatives, t)
        expected = cross_entropy(q, k, negatives, t)
        close(actual, expected, atol=1e-9)
        for x in (q, k, negatives):
            close(gradient(actual, x), gradient(expected, x), atol=1e-8)

    @pytest.mark.parametrize("K", [0, 1, 4])
    def test_equal_embeddings_give_the_logarithm_of_k_plus_1_and_0_without_negatives(self, K):
        x = unit(1, 8, 0).expand(5, 8)
        close(info_nce(x, x, x[:K].T, 0.07), torch.tensor(math.log(K + 1)))

    @pytest.mark.parametrize("t, K", [(0.005, 9), (0.1, 70_000)])
    def test_the_loss_is_right_at_a_low_temperature_and_for_a_large_queue(self, t, K):
        q = unit(4, 8, 0)
        k = unit(4, 8, 1)
        negatives = unit(K, 8, 2).T
        actual = info_nce(q.float(), k.float(), negatives.float(), t)
        close(actual, cross_entropy(q, k, negatives, t), rtol=1e-4)

    @given(SEEDS, st.integers(1, 5), st.integers(2, 7))
    def test_an_ignored_negative_counts_neither_in_the_loss_nor_in_its_gradients(self, seed, n, K):
        q = unit(n, 4, seed)
        k = unit(n, 4, seed + 1)
        negatives = unit(K, 4, seed + 2).T.requires_grad_()
        ignore = torch.rand(n, K, generator=rng(seed)) < 0.5
        ignore[:, 0] = True
        loss = info_nce(q, k, negatives, 0.2, ignore)
        rows = [slice(i, i + 1) for i in range(n)]
        each = [cross_entropy(q[row], k[row], negatives[:, ~ignore[row][0]], 0.2) for row in rows]
        close(loss, torch.stack(each).mean(), atol=1e-9)
        assert (gradient(loss, negatives)[:, 0] == 0).all()

    @pytest.mark.parametrize("dtypes", list(itertools.product([torch.bfloat16, torch.float32], repeat=3)))
    @pytest.mark.parametrize("autocast", [False, True])
    def test_the_loss_is_computed_in_float32_also_under_autocast_and_beside_inputs_in_bf16(self, dtypes, autocast):
        rows = [unit(6, 16, seed).to(dtype) for seed, dtype in enumerate(dtypes)]
        q, k, negatives = (x.double() for x in rows)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = info_nce(rows[0], rows[1], rows[2].T, 0.1)
        assert loss.dtype == torch.float32
        close(loss, cross_entropy(q, k, negatives.T, 0.1))

    @pytest.mark.parametrize("q, k", [((3, 4), (1, 4)), ((1, 4), (3, 4)), ((3, 4), (2, 4)), ((3, 4), (3, 1))])
    def test_queries_and_keys_of_different_shapes_are_refused_and_not_broadcast(self, q, k):
        with pytest.raises(TypeError):
            info_nce(torch.rand(q), torch.rand(k), torch.rand(4, 5), 0.1)


class QueueAgainstDeque(RuleBasedStateMachine):
    """The queue is first in, first out: a deque of K keys, of which `queue_ptr` marks the oldest."""

    @initialize(K=st.integers(1, 9))
    def start(self, K):
        self.model = MoCo(nn.Linear(2, 3), dim=3, K=K)
        self.deque = deque(self.model.queue.T.tolist(), maxlen=K)

    @rule(n=st.integers(0, 20), seed=SEEDS)
    def enqueue(self, n, seed):
        keys = unit(n, 3, seed)  # float64, in a queue of float32
        self.model.dequeue_and_enqueue(keys)
        self.deque.extend(keys.float().tolist())

    @invariant()
    def equal(self):
        ring = self.model.queue.T.tolist()
        (oldest,) = self.model.queue_ptr.tolist()
        assert ring[oldest:] + ring[:oldest] == list(self.deque)
        assert 0 <= oldest < self.model.K
        assert self.model.queue_ptr.dtype == torch.int64


TestQueue = QueueAgainstDeque.TestCase


def directions(im_q, im_k, symmetric):
    """Return the pairs of views (query's, key's) that a loss compares."""
    both = [(im_q, im_k), (im_k, im_q)]
    return both if symmetric else both[:1]


class TestMoCo:
    def test_queue_and_memory_bank_start_as_unit_vectors_and_the_key_encoder_as_an_equal_copy(self):
        model = MoCo(nn.Linear(5, 16), dim=16, K=4000)
        assert model.queue_ptr.tolist() == [0]
        for keys in (model.queue, moco.MemoryBank(nn.Linear(5, 16), num_images=4000, dim=16).bank.T):
            close(keys.norm(dim=0), torch.ones(4000))
            assert keys.mean(1).norm() < 0.05  # in all directions
        for k, q in parameters_of(model):
            assert torch.equal(q, k)
            assert q.data_ptr() != k.data_ptr()
            assert q.requires_grad and not k.requires_grad

    @given(SEEDS, st.integers(1, 15), st.booleans())
    def test_a_forward_pass_is_algorithm_1(self, seed, n, symmetric):
        model = linear_moco(seed, symmetric=symmetric).double()
        nn.init.normal_(model.encoder_q.weight)  # else there is nothing for momentum to do
        weight = model.encoder_q.weight
        bias = model.encoder_q.bias
        key_weight = 0.7 * model.encoder_k.weight + 0.3 * weight.detach()
        queue = model.queue.clone()
        im_q, im_k = torch.randn(2, n, 5, dtype=torch.float64)
        expected = 0
        new = []
        for x_q, x_k in directions(im_q, im_k, symmetric):
            q = F.normalize(x_q @ weight.T + bias, dim=1)
            k = F.normalize(x_k @ key_weight.T + bias.detach(), dim=1)
            expected += cross_entropy(q, k, queue, 0.2)
            new.append(k)
        loss = model(im_q, im_k)
        close(loss, expected, atol=1e-9)
        close(gradient(loss, weight), gradient(expected, weight), atol=1e-8)
        keys = torch.cat([queue.T, *new])[-6:]  # the newest 6, the oldest first
        close(model.queue.roll(-model.queue_ptr.item(), 1), keys.T, atol=1e-9)

    @pytest.mark.parametrize("symmetric", [False, True])
    def test_in_eval_mode_the_loss_is_computed_and_nothing_moves(self, symmetric):
        model = MoCo(nn.Sequential(SplitBatchNorm(2, 4), nn.Flatten()), dim=2, K=8, m=0.5, symmetric=symmetric)
        im_q, im_k = torch.randn(2, 8, 2, 1, 1)
        model(im_q, im_k, rng(0))
        nn.init.constant_(model.encoder_q[0].weight, 2)
        model.eval()
        before = copy.deepcopy(model.state_dict())
        expected = 0
        for x_q, x_k in directions(im_q, im_k, symmetric):
            q = F.normalize(model.encoder_q(x_q), dim=1)
            k = F.normalize(model.encoder_k(x_k), dim=1)
            expected += cross_entropy(q, k, model.queue, 0.1)
        close(model(im_q, im_k, rng(1)), expected)
        assert same(model.state_dict(), before)

    def test_embeddings_are_unit_rows_in_float32_under_autocast(self):
        with torch.autocast("cpu", torch.bfloat16):
            z = moco.embed(nn.Linear(5, 4), torch.randn(9, 5))
        assert z.dtype == torch.float32
        close(z.norm(dim=1), torch.ones(9), atol=1e-6)

    def test_gradients_reach_the_query_encoder_only(self):
        model = linear_moco()
        im_q = torch.randn(3, 5, requires_grad=True)
        im_k = torch.randn(3, 5, requires_grad=True)
        model(im_q, im_k).backward()
        assert im_q.grad.abs().sum() > 0
        assert im_k.grad is None  # the keys are constants
        for k, q in parameters_of(model):
            assert q.grad.abs().sum() > 0
            assert k.grad is None
        model.dequeue_and_enqueue(unit(3, 4, 0).requires_grad_())
        assert not model.queue.requires_grad

    @pytest.mark.parametrize("symmetric", [False, True])
    def test_keys_of_both_directions_are_normalized_in_a_random_order_and_restored(self, symmetric):
        encoder = nn.Sequential(SplitBatchNorm(2, 4), nn.Flatten())
        model = MoCo(copy.deepcopy(encoder), dim=2, K=32, symmetric=symmetric)
        queue = model.queue.clone()
        im_q, im_k = torch.randn(2, 8, 2, 1, 1)
        generator = rng(5)
        expected = 0
        new = []
        for x_q, x_k in directions(im_q, im_k, symmetric):
            order = torch.randperm(8, generator=generator)
            q = F.normalize(encoder(x_q), dim=1)
            k = torch.empty(8, 2)
            k[order] = F.normalize(encoder(x_k[order]), dim=1)
            expected += cross_entropy(q, k, queue, 0.1)
            new.append(k)
        close(model(im_q, im_k, rng(5)), expected)
        keys = torch.cat(new)
        close(model.queue[:, : len(keys)], keys.T)

    def test_several_processes_do_not_shuffle_without_a_generator(self):
        def refuse():
            with pytest.raises(ValueError):
                moco.embed_shuffled(nn.Flatten(), torch.rand(2, 3), None)

        on_ranks(2, refuse)


def encoder_and_views(seed, n):
    torch.manual_seed(seed)
    im_q, im_k = torch.randn(2, n, 5, dtype=torch.float64)
    return nn.Linear(5, 4).double(), im_q, im_k


class TestMechanisms:
    @given(SEEDS, st.integers(1, 4), TEMPERATURES)
    def test_end_to_end_contrasts_with_the_other_shuffled_keys_of_the_batch_with_gradients_into_both(self, seed, n, t):
        torch.manual_seed(seed)
        encoder = nn.Sequential(SplitBatchNorm(2, n), nn.Flatten(), nn.Linear(8, 4)).double()
        im_q, im_k = torch.randn(2, 2 * n, 2, 2, 2, dtype=torch.float64)
        order = torch.randperm(2 * n, generator=rng(seed))
        q = F.normalize(encoder(im_q), dim=1)
        k = F.normalize(encoder(im_k[order])[order.argsort()], dim=1)
        expected = F.cross_entropy(q @ k.T / t, torch.arange(2 * n))
        actual = moco.EndToEnd(encoder, t)(im_q, im_k, rng(seed))
        close(actual, expected, atol=1e-9)
        weight = encoder[2].weight
        close(gradient(actual, weight), gradient(expected, weight), atol=1e-8)

    @given(SEEDS, st.integers(1, 6), st.integers(1, 20), st.floats(0, 1))
    def test_the_memory_bank_contrasts_with_drawn_rows_and_moves_its_own(self, seed, n, K, m):
        encoder, im_q, im_k = encoder_and_views(seed, n)
        model = moco.MemoryBank(encoder, num_images=9, dim=4, K=K, m=m, T=0.3).double()
        bank = model.bank.clone()
        indices = torch.randperm(9, generator=rng(seed))[:n]
        drawn = torch.randint(9, (K,), generator=rng(seed, 1))
        q = F.normalize(encoder(im_q), dim=1)
        losses = []
        for query, own in zip(q, indices, strict=True):
            negatives = bank[drawn[drawn != own]].T
            losses.append(cross_entropy(query[None], bank[own][None], negatives, 0.3))
        expected = torch.stack(losses).mean()
        actual = model(im_q, im_k, rng(seed, 1), indices)
        close(actual, expected, atol=1e-8)
        close(gradient(actual, encoder.weight), gradient(expected, encoder.weight), atol=1e-7)
        bank[indices] = F.normalize(m * bank[indices] + (1 - m) * q.detach(), dim=1)
        close(model.bank, bank, atol=1e-8)

    def test_the_memory_bank_sees_one_view_and_stays_in_eval_mode(self):
        encoder, im_q, im_k = encoder_and_views(0, 3)
        model = moco.MemoryBank(encoder, num_images=9, dim=4, K=5).double().eval()
        bank = model.bank.clone()
        indices = torch.arange(3)
        loss = model(im_q, im_k, rng(1), indices)
        assert torch.equal(model(im_q, im_k * math.nan, rng(1), indices), loss)
        assert torch.equal(model.bank, bank)
        assert torch.equal(model.train()(im_q, im_k, rng(1), indices), loss)
        assert not model.bank.requires_grad
        assert not torch.equal(model.bank, bank)

    @given(SEEDS, st.integers(2, 6), TEMPERATURES)
    def test_simclr_is_nt_xent_over_both_views_which_batch_norm_sees_apart(self, seed, n, t):
        linear, im_q, im_k = encoder_and_views(seed, n)
        encoder = nn.Sequential(linear, nn.BatchNorm1d(4)).double()
        z = F.normalize(torch.cat([encoder(im_q), encoder(im_k)]), dim=1)
        logits = (z @ z.T / t).fill_diagonal_(-math.inf)
        expected = F.cross_entropy(logits, torch.arange(2 * n).roll(n))
        actual = moco.SimCLR(encoder, t)(im_q, im_k)
        close(actual, expected, atol=1e-9)
        close(gradient(actual, linear.weight), gradient(expected, linear.weight), atol=1e-8)


def copy_of(bn):
    """Return torch's own BatchNorm2d with the options and the state of ours."""
    plain = nn.BatchNorm2d(bn.num_features, bn.eps, bn.momentum, bn.affine).to(bn.running_mean)
    plain.load_state_dict(bn.state_dict())
    return plain


class TestEncoder:
    @given(SEEDS, st.integers(1, 4), st.integers(2, 4), st.integers(1, 3), st.booleans())
    def test_split_batch_norm_is_a_batch_norm_for_each_contiguous_group(self, seed, splits, size, channels, affine):
        torch.manual_seed(seed)
        x = torch.randn(splits * size, channels, 2, 3, dtype=torch.float64, requires_grad=True)
        ours = SplitBatchNorm(channels, splits, affine=affine, eps=0.1).double()
        for parameter in ours.parameters():
            nn.init.normal_(parameter)
        plain = copy_of(ours)
        expected = torch.cat([plain(group) for group in x.split(size)])
        actual = ours(x)
        close(actual, expected, atol=1e-10, rtol=0)
        factors = torch.randn_like(expected)
        for own, other in zip([x, *ours.parameters()], [x, *plain.parameters()], strict=True):
            close(gradient((actual * factors).sum(), own), gradient((expected * factors).sum(), other), atol=1e-9)

    @pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
    @pytest.mark.parametrize("splits", [1, 2, 5])
    def test_the_running_statistics_move_once_by_the_mean_of_the_groups(self, splits, momentum):
        ours = SplitBatchNorm(3, splits, momentum=momentum).double()
        mean = torch.zeros(3, dtype=torch.float64)
        var = torch.ones(3, dtype=torch.float64)
        for step, x in enumerate(torch.randn(3, 10, 3, 2, 2, dtype=torch.float64), 1):
            ours(x)
            values = x.transpose(0, 1).reshape(3, splits, -1)  # of a channel and group
            mean = (1 - momentum) * mean + momentum * values.mean(2).mean(1)
            var = (1 - momentum) * var + momentum * values.var(2).mean(1)
            close(ours.running_mean, mean, atol=1e-12)
            close(ours.running_var, var, atol=1e-12)
            assert ours.num_batches_tracked == step

    def test_bf16_images_have_statistics_in_float32(self):
        x = torch.randn(8, 3, 2, 2).bfloat16()
        low = SplitBatchNorm(3, 2)
        high = SplitBatchNorm(3, 2)
        assert low(x).dtype == torch.bfloat16
        high(x.float())
        close(list(low.buffers()), list(high.buffers()), atol=1e-6)

    def test_in_eval_mode_split_batch_norm_is_batch_norm(self):
        ours = SplitBatchNorm(3, 4)
        x = torch.randn(8, 3, 2, 2)
        ours(x)
        ours.eval()
        plain = copy_of(ours).eval()
        assert torch.equal(ours(x[:3]), plain(x[:3]))
        assert same(ours.state_dict(), plain.state_dict())

    def test_a_batch_that_cannot_be_split_evenly_is_a_value_error(self):
        with pytest.raises(ValueError):
            SplitBatchNorm(3, 2)(torch.randn(7, 3, 2, 2))

    @pytest.mark.parametrize("arch, stem, size", [
        ("resnet18", "cifar", 16), *((arch, "imagenet", 64) for arch in moco.ARCHS),
    ])  # fmt: skip
    def test_it_is_torchvisions_resnet_but_for_a_cifar_stem_of_one_3x3_convolution(self, arch, stem, size):
        if arch == "resnet10":  # which torchvision has no name for
            theirs = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7)
        else:
            theirs = torchvision.models.get_model(arch, num_classes=7)
        if stem == "cifar":
            theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            theirs.maxpool = nn.Identity()
        theirs.double()
        ours = ResNetEncoder(arch, dim=7, mlp=False, bn_splits=1, stem=stem).double()
        ours.load_state_dict(theirs.state_dict(), strict=True)
        for training in (True, False):  # the first moves the running statistics that the second uses
            x = torch.randn(2, 3, size, size, dtype=torch.float64)
            expected = theirs.train(training)(x)
            close(ours.train(training)(x), expected, atol=1e-9)
            assert expected.std(0).min() > 1e-4

    @pytest.mark.parametrize("mlp, layers", [(True, ["fc.0", "fc.2"]), (False, ["fc"])])
    def test_the_head_is_linear_or_has_two_layers_with_a_relu_under_the_official_names(self, mlp, layers):
        encoder = ResNetEncoder("resnet10", dim=9, mlp=mlp, width=0.125, bn_splits=2)
        names = [name for name in encoder.state_dict() if name.startswith("fc.")]
        assert names == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
        linear = [encoder.get_submodule(layer) for layer in layers]
        x = torch.rand(4, 3, 8, 8)
        features = encoder.features(x)
        assert features.shape == (4, encoder.feature_dim)
        assert linear[0].weight.shape == (64 if mlp else 9, 64)
        hidden = linear[0](features)
        close(encoder(x), linear[1](hidden.clamp(min=0)) if mlp else hidden)

    def test_convolutions_start_from_hes_normal_distribution_of_their_fan_out(self):
        for conv in (module for module in ResNetEncoder().modules() if isinstance(module, nn.Conv2d)):
            std = math.sqrt(2 / (conv.out_channels * conv.kernel_size[0] ** 2))
            assert abs(conv.weight.std() / std - 1) < 0.1
            assert abs((conv.weight.abs() > 2 * std).float().mean() - 0.0455) < 0.02

    @pytest.mark.parametrize("width, first, last", [(0.125, 8, 64), (0.3, 19, 152), (0.7, 44, 352), (1.5, 96, 768)])
    def test_width_multiplies_all_channels_and_the_fraction_is_cut_off(self, width, first, last):
        encoder = ResNetEncoder("resnet10", width=width)
        assert (encoder.conv1.out_channels, encoder.feature_dim) == (first, last)

    def test_every_batch_norm_of_the_encoder_is_split_and_starts_as_torchs_own(self):
        encoder = ResNetEncoder("resnet50", width=0.125, bn_splits=3)
        norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
        assert len(norms) == 53
        for norm in norms:
            plain = nn.BatchNorm2d(norm.num_features)
            assert isinstance(norm, SplitBatchNorm)
            assert (norm.num_splits, norm.eps, norm.momentum) == (3, plain.eps, plain.momentum)
            assert same(norm.state_dict(), plain.state_dict())


def of_each(function, x, *columns):
    """Apply a function of torchvision to each image, with its numbers of the columns."""
    rows = zip(x, *(column.tolist() for column in columns), strict=True)
    return torch.stack([function(*row) for row in rows])


ADJUSTMENTS = tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue


def jittered(x, generator, *strengths):
    for i in torch.randperm(4, generator=generator).tolist():
        offset = strengths[i] * (2 * draws(generator, len(x)) - 1)
        x = of_each(ADJUSTMENTS[i], x, offset if i == 3 else 1 + offset)
    return x


def blurred(x, generator, low, high):
    kernel = 2 * [x.shape[-1] // 20 * 2 + 1]  # a tenth of the side
    sigma = low + (high - low) * draws(generator, len(x))
    return of_each(lambda image, sigma: tvf.gaussian_blur(image, kernel, [sigma, sigma]), x, sigma)


def cropped(x, boxes, size):
    return of_each(lambda image, box: tvf.resized_crop(image, *box, [size, size]), x, boxes)


mirrored, grayed = (lambda x, _: tvf.horizontal_flip(x)), (lambda x, _: tvf.rgb_to_grayscale(x, 3))
STRENGTH = st.floats(0, 1)
SIDE = st.integers(1, 40)
ALMOST_1 = 1 - 2**-24  # the largest number that torch.rand draws
CIFAR = T.Normalize([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
IMAGENET = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
JITTER = jittered, 0.4, 0.4, 0.4, 0.1
AUTHORS = {  # but for the blur's kernel: smallest crop, normalization, transforms with their probabilities
    "cifar": (0.08, CIFAR, (0.5, mirrored), (0.8, *JITTER), (0.2, grayed)),
    "v1": (0.2, IMAGENET, (0.2, grayed), (1, jittered, 0.4, 0.4, 0.4, 0.4), (0.5, mirrored)),
    "v2": (0.2, IMAGENET, (0.8, *JITTER), (0.2, grayed), (0.5, blurred, 0.1, 2), (0.5, mirrored)),
}


def boxes_of(generator, n, height, width, scale):
    return moco.crop_boxes(draws(generator, n, 4, 10), height, width, scale)


def torchvisions_box(height, width, scale):
    box = T.RandomResizedCrop(8, scale=scale).make_params([torch.empty(3, height, width)])
    return [box[x] for x in ("top", "left", "height", "width")]


def augment_of(*transforms, scale=(1, 1), size=24):
    """Return an Augment of a recipe with these transforms, which does not normalize."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(moco.RECIPES, "own", (scale, 1, ((0, 0, 0), (1, 1, 1)), transforms))
        return Augment("own", size)


def two_views_of(augment, image, n, of_files):
    """Return both views (2,n,3,S,S) of n copies of an image, held in memory or read from files."""
    split_two_views = SplitTwoViews(augment)
    if not of_files:
        return torch.stack(split_two_views(image.expand(n, -1, -1, -1), rng(5)))
    crops = [split_two_views.crop_file(image, 0, index) for index in range(n)]
    return torch.stack(split_two_views.from_crops(torch.stack(crops, 1), rng(5)))


class LargestTensor(TorchDispatchMode):
    """Measure the largest tensor, in bytes, that an operation computes; views of another take no memory."""

    nbytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if not operation.is_view:
            sizes = [x.nbytes for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            self.nbytes = max([self.nbytes, *sizes])
        return result


class TestViews:
    @pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-5), (torch.bfloat16, 0.03)])
    @given(seed=SEEDS, height=SIDE, width=SIDE, size=SIDE)
    def test_a_crop_is_torchvisions_resized_crop(self, dtype, atol, seed, height, width, size):
        x = torch.rand(3, 3, height, width, generator=rng(seed)).to(dtype)
        boxes = boxes_of(rng(seed), 3, height, width, (0.08, 1))
        actual = moco.crop(x, boxes, size)
        assert actual.dtype == dtype
        close(actual.float(), cropped(x.float(), boxes, size), atol)

    @pytest.mark.parametrize("height, width, scale", [(32, 32, (0.08, 1)), (9, 14, (0.2, 1)), (10, 100, (0.5, 1))])
    def test_crop_boxes_have_torchvisions_distribution(self, height, width, scale):
        n = 4000
        theirs = torch.tensor([torchvisions_box(height, width, scale) for _ in range(n)])
        ours = boxes_of(rng(1), n, height, width, scale)
        for a, b in zip(ours.T.double(), theirs.T.double()):
            assert kolmogorov_smirnov(a, b) < 1.95 * math.sqrt(2 / n)  # false alarm: 1 in 1000 each, seeds are fixed

    def test_a_crops_position_area_and_aspect_ratio_are_independent(self):
        top, left, h, w = boxes_of(rng(1), 4000, 200, 200, (0.08, 0.5)).T.double()
        y = top / (200 - h)
        x = left / (200 - w)
        assert uncorrelated(torch.stack([y, x, h * w, (h / w).log()]))

    @pytest.mark.parametrize("u, size, area, box", [
        (0.5, (4, 2), 1 / 8, [2, 1, 1, 1]),
        (0.5, (4, 4), 1, [0, 0, 4, 4]),
        (0.5, (12, 8), 2 / 3, [2, 0, 8, 8]),
        (0.5, (8, 12), 2 / 3, [0, 2, 8, 8]),
        (ALMOST_1, (30, 20), 1 / 6, [20, 10, 10, 10]),
    ])  # fmt: skip
    def test_a_crop_can_be_one_pixel_or_the_full_image_and_lie_at_every_edge(self, u, size, area, box):
        u = torch.tensor([0.5, 0.5, u, u])[:, None].expand(1, 4, 10)
        assert moco.crop_boxes(u, *size, (area, area)).tolist() == [box]

    @pytest.mark.parametrize("size", [(11, 100), (100, 11)])
    def test_where_no_try_fits_the_crop_is_torchvisions_center_at_the_nearest_aspect_ratio(self, size):
        expected = torchvisions_box(*size, (1, 1))
        assert boxes_of(rng(0), 20, *size, (1, 1)).tolist() == 20 * [expected]

    @given(SEEDS, st.tuples(STRENGTH, STRENGTH, STRENGTH, st.floats(0, 0.5)), st.integers(2, 255))
    def test_color_jitter_applies_the_four_operations_in_the_drawn_order(self, seed, strengths, levels):
        x = torch.randint(0, levels, (3, 3, 5, 4), generator=rng(seed)) / (levels - 1)  # of few, some are gray
        expected = jittered(x, rng(seed), *strengths)
        close(moco.color_jitter(x, rng(seed), strengths), expected, atol=1e-4)

    @pytest.mark.parametrize("low, high", [(0.1, 2), (0.7, 0.7), (6, 60)])  # 60 weights the kernel's ends, too
    @pytest.mark.parametrize("size", [5, 19, 20, 39, 40, 112])
    def test_a_blur_is_torchvisions_with_a_kernel_of_a_tenth_of_the_side(self, size, low, high):
        x = draws(rng(size), 3, 3, size, size)
        close(moco.gaussian_blur(x, rng(1), low, high), blurred(x, rng(1), low, high))

    @pytest.mark.parametrize("aug", AUTHORS)
    def test_views_are_made_as_in_the_authors_code_but_for_the_size_of_the_blurs_kernel(self, aug):
        smallest, normalize, *transforms = AUTHORS[aug]
        images = images_of(40, 30, 50)
        generator = rng(1)
        for view in SplitTwoViews(Augment(aug, 24))(images, rng(1)):
            boxes = boxes_of(generator, 40, 30, 50, (smallest, 1))
            x = cropped(images / 255, boxes, 24)
            for probability, transform, *strengths in transforms:
                chosen = draws(generator, 40, 1, 1, 1) < probability
                x = torch.where(chosen, transform(x, generator, *strengths), x)
            close(view, normalize(x), atol=1e-3)

    @pytest.mark.parametrize("of_files", [False, True])
    @pytest.mark.parametrize("augment", [
        augment_of(scale=(0.1, 0.4)),
        augment_of(moco.FLIP),
        augment_of((0.5, moco.GRAY[1])),
        augment_of(moco.JITTER_V1),
        augment_of((1, partial(moco.gaussian_blur, low=0.1, high=2))),
    ], ids=["crop", "flip", "grayscale", "color jitter", "blur"])  # fmt: skip
    def test_a_transform_is_drawn_for_each_image_and_view_apart(self, augment, of_files):
        (image,) = images_of(1, 24, 24)
        changes = two_views_of(augment, image, 600, of_files).sub(image / 255).abs().mean((2, 3, 4))
        neighbors = changes.roll(1, 1)
        assert uncorrelated(torch.cat([changes, neighbors]))

    @pytest.mark.parametrize("aug", moco.RECIPES)
    @pytest.mark.parametrize("of_files", [False, True])
    def test_each_rank_draws_for_its_rows_what_one_process_draws_for_them(self, monkeypatch, aug, of_files):
        split_two_views = SplitTwoViews(Augment(aug, 24))
        images = images_of(16, 24, 24).unflatten(0, (2, 8))
        call = split_two_views.from_crops
        if not of_files:
            images = images[0]
            call = split_two_views
        expected = torch.stack(call(images, rng(0)))
        monkeypatch.setattr(moco, "world_size", lambda: 2)
        for rank, rows in enumerate((slice(0, 4), slice(4, 8))):
            monkeypatch.setattr(moco, "rank", lambda rank=rank: rank)
            mine = call(images[..., rows, :, :, :], rng(0))
            close(torch.stack(mine), expected[:, rows])

    @given(SEEDS, st.integers(0, 9), st.integers(0, 9))
    def test_a_files_two_crops_are_drawn_by_seed_epoch_and_index(self, seed, epoch, index):
        image = images_of(1, 40, 50)
        augment = augment_of(scale=(0.2, 0.9), size=8)
        actual = SplitTwoViews(augment, seed).crop_file(image[0], epoch, index)
        boxes = boxes_of(rng("crop", seed, epoch, index), 2, 40, 50, (0.2, 0.9))
        assert torch.equal(actual, cropped(image.repeat(2, 1, 1, 1), boxes, 8))

    def test_each_view_is_made_of_its_own_crop_of_a_file(self):
        pair = images_of(4, 8, 8).unflatten(0, (2, 2))
        close(torch.stack(SplitTwoViews(augment_of(size=8)).from_crops(pair, rng(0))), pair / 255)

    def test_views_are_the_same_under_autocast(self):
        images = images_of(4, 16, 16)
        split_two_views = SplitTwoViews(Augment("v2", 40))  # under 20 pixels, a blur changes nothing
        with torch.autocast("cpu", torch.bfloat16):
            cast = split_two_views(images, rng(0))
        assert same(cast, split_two_views(images, rng(0)))
        assert cast[0].dtype == torch.float32

    @pytest.mark.parametrize("aug", moco.RECIPES)
    def test_of_no_images_there_are_no_views(self, aug):
        split_two_views = SplitTwoViews(Augment(aug, 24))
        none = torch.empty(2, 0, 3, 24, 24, dtype=torch.uint8)
        for views in (split_two_views(none[0], rng(0)), split_two_views.from_crops(none, rng(0))):
            assert [x.shape for x in views] == 2 * [(0, 3, 24, 24)]

    @pytest.mark.parametrize("images", [
        torch.rand(4, 3, 8, 8), images_of(1)[0], images_of(4)[:, :1],
        images_of(8).unflatten(0, (4, 2)),
    ], ids=["floats", "an image", "grays", "pairs"])  # fmt: skip
    def test_images_that_are_not_a_batch_of_bytes_in_rgb_are_a_type_error(self, images):
        with pytest.raises(TypeError, match=r"uint8 \(N,3,H,W\), not torch"):
            SplitTwoViews(Augment())(images, rng(0))

    @pytest.mark.parametrize("aug", moco.RECIPES)
    @given(SEEDS, st.integers(20, 40), st.integers(20, 40), st.integers(2, 40))
    def test_evaluation_is_torchvisions_resize_and_center_crop(self, aug, seed, height, width, size):
        images = images_of(2, height, width, seed)
        augment = Augment(aug, size)
        resized = tvf.resize(images, [size if aug == "cifar" else round(size * 256 / 224)])
        expected = tvf.center_crop(resized, [size, size])
        assert torch.equal(augment.evaluation_view(images), expected)
        assert torch.equal(augment.evaluation_view(images[0]), expected[0])

    @pytest.mark.parametrize("shape", [(3, 1, 20_000), (3, 20_000, 1)])
    def test_evaluation_takes_little_memory_for_a_panorama(self, shape):
        image = torch.randint(0, 256, shape, dtype=torch.uint8)
        augment = Augment("v2", 28)
        with LargestTensor() as largest:
            view = augment.evaluation_view(image)
        center = tvf.center_crop(image, [min(2, side) for side in shape[1:]])
        assert torch.equal(view, augment.evaluation_view(center))
        assert largest.nbytes <= 3 * 32 * 64 * 4  # at most twice as long as high; resized as it is, 60 MB or more


class TestStep:
    @given(SEEDS)
    def test_a_step_is_algorithm_1_with_sgd(self, seed):
        torch.manual_seed(seed)
        encoder = nn.Linear(5, 4, bias=False).double()
        model = MoCo(encoder, dim=4, K=6, m=0.9, T=0.2).double()
        optimizer = torch.optim.SGD(encoder.parameters(), 0.1)
        queue = model.queue.clone()
        theta_q = encoder.weight.detach().clone()
        theta_k = theta_q.clone()
        for _ in range(3):
            x_q, x_k = torch.randn(2, 3, 5, dtype=torch.float64)
            theta_q.requires_grad_()
            theta_k = 0.9 * theta_k + 0.1 * theta_q.detach()
            q = F.normalize(x_q @ theta_q.T, dim=1)
            k = F.normalize(x_k @ theta_k.T, dim=1)
            expected = cross_entropy(q, k, queue, 0.2)
            theta_q = theta_q.detach() - 0.1 * gradient(expected, theta_q)
            queue = torch.cat([queue[:, 3:], k.T], 1)
            loss = moco.train_step(model, optimizer, lambda images, _: images, (x_q, x_k), rng(seed))
            close(loss, expected.detach(), atol=1e-12)
            close(encoder.weight.detach(), theta_q, atol=1e-12)
            close(model.encoder_k.weight, theta_k, atol=1e-12)


def slope(linear, x, y, decay=1e-4):
    """Return the largest gradient of cross-entropy + decay/2·‖W‖² at a linear classifier; 0 at the minimum."""
    weight = linear.weight.double().requires_grad_()
    bias = linear.bias.double().requires_grad_()
    loss = F.cross_entropy(x.double() @ weight.T + bias, y) + decay / 2 * (weight**2).sum()
    return max(x.abs().max() for x in torch.autograd.grad(loss, (weight, bias)))


class TestEvaluation:
    @given(SEEDS, st.integers(1, 12), st.integers(1, 15), st.floats(0.01, 1), st.sampled_from([1e-6, 1, 1e6]))
    def test_knn_is_the_vote_of_the_k_nearest_by_cosine_with_exponential_weights(self, seed, m, k, t, length):
        torch.manual_seed(seed)
        x = torch.randn(3, 4, dtype=torch.float64)
        bank = torch.randn(m, 4, dtype=torch.float64)
        labels = torch.randint(0, 3, (m,))
        expected = []
        for row in x:
            cosine = F.cosine_similarity(row, bank)
            nearest = cosine.argsort(descending=True)[:k]  # all of them if there are fewer than k
            votes = (cosine[nearest] / t).exp() @ F.one_hot(labels[nearest], 3).double()
            expected.append(votes.argmax())
        assert torch.equal(moco.knn_predict(x / length, bank * length, labels, 3, k, t), torch.stack(expected))

    @pytest.mark.parametrize("other, k, t", [((0.0, 0.0), 1, 0.1), ((0.6, 0.8), 2, 1e-3)])
    def test_the_nearest_wins_over_a_vector_of_zeros_and_where_exponentials_would_overflow(self, other, k, t):
        query = torch.tensor([[1.0, 0.0]])
        bank = torch.tensor([other, (0.8, 0.6)])
        assert moco.knn_predict(query, bank, torch.arange(2), 2, k, t).item() == 1

    def test_predictions_of_several_chunks_are_in_the_order_of_the_features(self):
        angles = torch.arange(9.0)
        queries = torch.stack([angles.cos(), angles.sin()], 1)
        bank = F.pad(queries, (0, 0, 0, 2**22 - 9))  # of so many rows, a chunk compares eight queries
        labels = torch.arange(2**22).clamp(max=8)
        assert moco.knn_predict(queries, bank, labels, 9, 1, 0.1).tolist() == list(range(9))

    @pytest.mark.parametrize("queries, rows, nbytes", [(1000, 2**18, 2**27), (3, 2**25 + 1, 2**27 + 4)])
    def test_similarities_take_at_most_128_mib_or_one_row(self, queries, rows, nbytes):
        labels = torch.empty(rows, dtype=torch.long, device="meta")
        with LargestTensor() as largest, torch.device("meta"):
            moco.knn_predict(torch.empty(queries, 1), torch.empty(rows, 1), labels, 5, 20, 0.1)
        assert largest.nbytes == nbytes

    def test_knn_does_not_copy_the_bank(self):
        bank = torch.randn(500, 64)
        with LargestTensor() as largest:
            moco.knn_predict(torch.randn(2, 64), bank, torch.arange(500), 500, 5, 0.1)
        assert largest.nbytes < bank.nbytes

    @pytest.mark.parametrize("k, m", [(0, 3), (1, 0)])
    def test_no_neighbor_to_vote_is_a_value_error(self, k, m):
        with pytest.raises(ValueError, match=f"k = {k} of {m}: at least one"):
            moco.knn_predict(torch.randn(1, 2), torch.randn(m, 2), torch.arange(m), 3, k, 0.1)

    @pytest.mark.parametrize("scale", [1, 50])
    @pytest.mark.parametrize("decay", [1e-4, 1e-2])
    @pytest.mark.parametrize("classes", [2, 4])
    def test_the_linear_classifier_is_frozen_and_minimizes_cross_entropy_and_decay(self, classes, decay, scale):
        x = scale * torch.randn(60, 3, dtype=torch.float64)
        y = torch.randint(classes, (60,))
        linear = moco.fit_linear(x, y, classes, decay)
        assert not linear.weight.requires_grad
        assert slope(linear, x, y, decay) < 1e-3 * scale

    def test_the_linear_classifier_converges_on_6000_correlated_features_of_256_dimensions(self):
        x = torch.randn(6000, 256, generator=rng(1)).cumsum(1)
        y = (x @ torch.randn(256, 10, generator=rng(2))).argmax(1)
        x = (x - x.mean(0)) / x.std(0)
        assert slope(moco.fit_linear(x, y, 10), x, y) < 1e-4  # 50 iterations leave 1e-3


def loss_of(x):
    q, k = F.normalize(x[:6, :, 0], dim=2).flatten(1).split(3)
    return info_nce(q, k, x[:5, :, 0].flatten(1).T, 0.3)


def labels_for(x):
    return torch.arange(len(x), device=x.device) % 2


def views_of(aug, x):
    return torch.cat(SplitTwoViews(Augment(aug, 40))((255 * x).byte(), rng(0)))


OPERATIONS = {  # of images x (8,3,24,24) in [0,1]
    "loss": loss_of,
    "split batch norm": lambda x: SplitBatchNorm(3, 4).to(x.device)(x),
    "views of cifar": partial(views_of, "cifar"),
    "views of v1": partial(views_of, "v1"),
    "views of v2": partial(views_of, "v2"),
    "kNN": lambda x: moco.knn_predict(x[:3].flatten(1), x.flatten(1), labels_for(x), 2, 4, 0.1),
    "linear": lambda x: moco.fit_linear(x[:, 0, 0], labels_for(x), 2, decay=0.1).weight,
}


class Watch(TorchDispatchMode):
    """Count the numbers read from the device, and refuse operations on tensors of several devices.
    Unless `may_wait`, refuse what waits for the device, too: blocking copies, and indices on the CPU."""

    def __init__(self, may_wait=False):
        super().__init__()
        self.may_wait = may_wait
        self.reads = 0
        self.numbers = itertools.cycle(range(4))

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if operation is torch.ops.aten._local_scalar_dense.default:
            return self.read(inputs[0].device.type)
        devices = {x.device.type for x in inputs if x.dim()}
        mixable = self.may_wait and inputs and inputs[0].device.type != "cpu"  # by indices on the CPU
        assert mixable or len(devices) < 2, f"{operation} mixes devices"
        out = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten._to_copy.default and out.device != inputs[0].device:
            assert self.may_wait or kwargs.get("non_blocking"), "a copy that waits"
        return out

    def read(self, device):
        if device == "cpu":
            return next(self.numbers)  # four in a row are an order of color jitter
        self.reads += 1
        return int(self.reads > 99)  # in the end 1, so that a loop until convergence ends


@contextlib.contextmanager
def fake_cuda(may_wait=False):
    """Pretend that there is a GPU: tensors on it are fake. Yield the watch over them."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            torch.empty(1, device="cuda")[:, None]
        except RuntimeError:
            pytest.skip("torch 2.6 needs a driver even for fake tensors")
        with Watch(may_wait) as watch:
            yield watch


def fake_bytes(*shape):
    return torch.empty(shape, dtype=torch.uint8, device="cuda")


def no_threads(*_, **__):  # for other threads do not know the fake tensors of this one
    pool = types.SimpleNamespace(submit=lambda *call: types.SimpleNamespace(result=partial(*call)))
    return contextlib.nullcontext(pool)


@pytest.fixture
def pinned(monkeypatch):
    monkeypatch.setattr(moco, "ThreadPoolExecutor", no_threads)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: tensors.append(x) or x)
    return (tensors := [])


CUDA_BF16 = partial(torch.autocast, "cuda", torch.bfloat16, enabled=True)


@pytest.mark.filterwarnings("ignore:CUDA is not available")  # autocast says so
class TestCuda:
    @pytest.mark.parametrize("name", OPERATIONS)
    def test_an_operation_gives_on_cuda_and_in_channels_last_what_it_gives_on_the_cpu(self, device, name):
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        x = images_of(8, 24, 24) / 255
        here = OPERATIONS[name](x)
        there = OPERATIONS[name](x.to(device, memory_format=torch.channels_last))
        assert there.device.type == device
        close(there.cpu(), here, atol=1e-3, rtol=1e-3)

    @pytest.mark.parametrize("method", METHODS)
    def test_a_step_on_cuda_and_in_channels_last_is_the_one_on_the_cpu(self, device, method):
        x_q, x_k = (x.double() for x in SplitTwoViews(Augment())(images_of(8), rng(1)))
        results = []  # in float64, since BatchNorm and the kinks of ReLU enlarge rounding
        for place, layout in (("cpu", torch.contiguous_format), (device, torch.channels_last)):
            model = moco.build_model(tiny_config(method=method, moco_m=0.7), 8)
            torch.manual_seed(0)
            nn.init.normal_(model.encoder_q.conv1.weight)  # else there is nothing for momentum to do
            model.to(place, torch.float64, memory_format=layout)
            loss = model(x_q.to(place), x_k.to(place), rng(2), torch.arange(8))
            loss.backward()
            gradients = [weight.grad for weight in model.encoder_q.parameters()]
            results.append([loss, *model.state_dict().values(), *gradients])
        for here, there in zip(*results, strict=True):
            assert there.device.type == device
            close(there.cpu(), here, atol=1e-8, rtol=1e-6)

    @pytest.mark.parametrize("options", [{"symmetric": True}, *({"method": name} for name in METHODS[1:])])
    def test_a_training_step_leaves_no_tensor_on_the_cpu_and_never_waits(
        self, few, tmp_path, monkeypatch, pinned, options
    ):
        run = moco.Run(tiny_config(out=str(tmp_path / "c.pt"), arch="resnet10", aug="v2", **options))
        group = run.optimizer.param_groups[0]

        def backward(loss):  # autograd itself has no fake CUDA
            assert loss.device.type == "cuda"
            assert loss.requires_grad
            for weight in group["params"]:
                weight.grad = torch.empty_like(weight)

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        with fake_cuda() as watch:
            run.model.to_empty(device="cuda")
            group.update(params=list(run.model.encoder_q.parameters()), fused=False)  # fused SGD wants a driver
            run.optimizer.state = {x: {"momentum_buffer": torch.empty_like(x)} for x in group["params"]}
            run.autocast = CUDA_BF16
            run.losses = torch.empty(run.losses.shape, device="cuda")
            data = moco.InMemory(fake_bytes(40, 3, 32, 32), None)
            for images, indices in data.batches([(0, torch.arange(8))], run.crop):
                run.take_step(images, indices)
            run.two_views = run.two_views.from_crops
            files = moco.Files(8 * ["0.png"], None, torch.device("cuda"), workers=1)
            monkeypatch.setattr(moco, "read_image", lambda path: torch.empty(2, 3, 32, 32, dtype=torch.uint8))
            for pairs, indices in files.batches([(0, torch.arange(8))], lambda image, *_: image):
                run.take_step(pairs, indices)
        state = [x["momentum_buffer"] for x in run.optimizer.state.values()]
        assert {x.device.type for x in (images, run.losses, *run.model.buffers(), *state)} == {"cuda"}
        assert (run.losses.dtype, watch.reads) == (torch.float32, 0)
        assert len(pinned) == 1  # else the copy of a file's images waits

    @pytest.mark.usefixtures("pinned")
    @pytest.mark.parametrize("of_files", [False, True])
    def test_evaluation_and_pictures_mix_no_devices(self, image_folder, monkeypatch, of_files):
        config = tiny_config(data=str(image_folder), workers=1, knn_k=3)
        data = moco.load_data(config, CPU)
        encoder = ResNetEncoder("resnet10", dim=4, width=0.125)
        loaded = encoder, data, config, CUDA_BF16, 0
        monkeypatch.setattr(moco, "load_for_evaluation", lambda *_: loaded)
        pictures = []
        monkeypatch.setattr(torchvision.utils, "save_image", lambda picture, *_, **options: pictures.append(picture))
        with fake_cuda(may_wait=True) as watch:
            encoder.to_empty(device="cuda")
            for split in (data.train, data.test):
                split.device = torch.device("cuda")
                split.labels = split.labels.to("cuda")
            if not of_files:
                data.train = moco.InMemory(fake_bytes(20, 3, 32, 32), data.train.labels)
                data.test = moco.InMemory(fake_bytes(8, 3, 32, 32), data.test.labels)
            features = moco.extract_features(encoder, data.test, config, CUDA_BF16)
            assert features.device.type == "cuda"
            assert features.dtype == torch.float32
            assert watch.reads == 0
            moco.accuracy(encoder, data, config, CUDA_BF16)
            assert watch.reads == 2  # the number of classes, and of right predictions
            data.test = None
            moco.neighbors("c.pt", "unused.png")
        assert len(pictures) == 1

    def test_a_linear_classifier_is_fitted_where_its_features_are(self):
        features = torch.empty(8, 5, device="meta")
        with Watch():  # the device "meta" computes nothing, but has a backward pass
            classifier = moco.fit_linear(features, torch.zeros(8, dtype=torch.long, device="meta"), 2)
        assert classifier.weight.device.type == classifier.bias.device.type == "meta"


class TestConfig:
    def test_options_become_plain_values_so_that_a_checkpoint_can_be_read(self, tmp_path):
        odd = dict(lr=numpy.float32(0.5), epochs=numpy.int64(3), cos=numpy.bool_(False), wd=1, schedule=[4, 5])
        options = dataclasses.asdict(Config(**odd, out=tmp_path))
        defaults = dataclasses.asdict(Config())
        plain = dict(lr=0.5, epochs=3, cos=False, wd=1.0, schedule=(4, 5), out=str(tmp_path))
        assert options == defaults | plain
        assert [type(x) for x in options.values()] == [type(x) for x in defaults.values()]

    @pytest.mark.parametrize("options, words", [
        (dict(batch_size=20), "--batch-size 20: must be 2, 3, 4 … times --bn-splits 8"),
        (dict(batch_size=8), "--batch-size 8: must be 2, 3, 4 … times --bn-splits 8"),
        (dict(size=8), "--size 8: --stem cifar needs at least 9"),
        (dict(size=32, stem="imagenet"), "--size 32: --stem imagenet needs at least 33"),
        (dict(size=9), ""), (dict(size=33, stem="imagenet"), ""), (dict(batch_size=16), ""),
    ])  # fmt: skip
    def test_values_go_together_or_a_refusal_names_the_option_and_says_what_must_hold(self, options, words):
        with pytest.raises(UserError, match=f"^{words}") if words else contextlib.nullcontext():
            Config(**options)

    def test_the_defaults_are_those_of_record_also_in_the_library(self):
        ours = dataclasses.asdict(Config())
        record = dict(moco_dim=128, moco_k=4096, moco_m=0.99, moco_t=0.1, bn_splits=8, batch_size=512, lr=0.06, wd=5e-4)
        assert ours.items() >= dict(record, epochs=100, knn_k=200, knn_t=0.1, precision="auto", workers=2).items()
        names = dict(dim="moco_dim", K="moco_k", m="moco_m", T="moco_t", num_splits="bn_splits", recipe="aug")
        for part in (MoCo, moco.EndToEnd, moco.SimCLR, moco.MemoryBank, ResNetEncoder, SplitBatchNorm, Augment):
            for name, parameter in inspect.signature(part).parameters.items():
                expected = 0.5 if (part, name) == (moco.MemoryBank, "m") else ours.get(names.get(name, name))
                assert parameter.default in (expected, inspect.Parameter.empty)


# Of a built-in image of each class: the sum of its levels, each weighted by a random number in [0,1).
SHAPES = [180663, 206671, 217532, 321840, 337715, 308188, 308683, 164136, 171116, 202699]


def place_images(top, files):
    """Write images to "folder/name"s, in a string, numbered by their first channel; "folder/" stays empty."""
    for i, name in enumerate(files.split()):
        path = top / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            PIL.Image.new("RGB", (12, 10), (i, 0, 0)).save(path)


def load_folder(top, in_memory=False, workers=1, device=CPU):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moco, "MEMORY", moco.MEMORY if in_memory else 0)
        return moco.load_data(tiny_config(data=str(top), workers=workers), device)


def names_of(split, top):
    """Return the names of a split's files below a folder, without .png, in a string."""
    return " ".join(os.path.relpath(path, top).removesuffix(".png") for path in split.paths)


def batch_of(split, indices, crop=lambda image, epoch, index: image):
    ((images, _),) = split.batches([(0, torch.tensor(indices))], crop)
    return images


class TestData:
    def test_built_in_images_are_the_same_on_every_machine_and_hard_for_knn_on_raw_pixels(self):
        data = moco.load_data(tiny_config(), CPU)
        train, test = (split.images.flatten(1).float() for split in (data.train, data.test))
        sums = torch.cat([train[:5], test[5:10]]) @ draws(rng("weights"), 3 * 32 * 32)
        assert data.fingerprint == "shapes"
        assert moco.load_data(tiny_config(), torch.device("meta")).test.images.is_meta
        assert sums.tolist() == pytest.approx(SHAPES, rel=0, abs=20)  # another CPU may round a level otherwise
        assert torch.equal(data.train.labels, torch.arange(6000) % 10)
        assert torch.equal(data.test.labels, torch.arange(2000) % 10)
        right = moco.knn_predict(test[:500], train, data.train.labels, 10, 20, 0.1) == data.test.labels[:500]
        assert 0.1 < right.float().mean() < 0.4

    @pytest.mark.parametrize("name", ["cifar10", "cifar100"])
    def test_cifar_comes_from_torchvision_as_channels_first_uint8(self, monkeypatch, name):
        def stub(root, train, download):
            assert (root, download) == ("elsewhere", True)
            n = 4 if train else 2
            return types.SimpleNamespace(data=images_of(n).permute(0, 2, 3, 1).numpy(), targets=[0, 1, 2, 1][:n])

        monkeypatch.setattr(torchvision.datasets, name.upper(), stub)
        data = moco.load_data(Config(data=name, root="elsewhere"), CPU)
        for split, labels in ((data.train, [0, 1, 2, 1]), (data.test, [0, 1])):
            assert torch.equal(split.images, images_of(len(labels)))
            assert split.labels.tolist() == labels

    @pytest.mark.parametrize("files, train, test, labels, unread", [
        ("train/a/1 train/b/2 val/a/3 val/b/4", "train/a/1 train/b/2", "val/a/3 val/b/4", [0, 1], ""),
        ("Train/a/1 Train/b/2 TEST/b/3 other/a/4 5", "Train/a/1 Train/b/2", "TEST/b/3", [1], "; not read: other/"),
        ("Training/a/1 Training/b/2 Testing/b/3", "Training/a/1 Training/b/2", "Testing/b/3", [1], ""),
        ("train/a/1 train/b/2 valid/b/3 test/a/4", "train/a/1 train/b/2", "valid/b/3", [1], "; not read: test/"),
        ("train/a/1 train2/b/2 VAL/a/3 val2/4 x/5", "train/a/1", "VAL/a/3", [0], "; not read: train2/ val2/ x/"),
        ("train/a/1 train/b/ val/ test/a/2 test/c/", "train/a/1", "test/a/2", [0], ""),
        ("train/a/b/1 train/b/a/c/2 val/b/a/3", "train/a/b/1 train/b/a/c/2", "val/b/a/3", [1], ""),
        ("train/a/1 train/a/.x train/.b/2 .train/b/3 .x/4 val/a/5 val/.b/6 .val/a/7", "train/a/1", "val/a/5", [0], ""),
    ])  # fmt: skip
    def test_a_folder_with_classes_to_train_and_test_on_has_labels(self, tmp_path, files, train, test, labels, unread):
        place_images(tmp_path, files)
        data = load_folder(tmp_path)
        assert (names_of(data.train, tmp_path), names_of(data.test, tmp_path)) == (train, test)
        assert data.test.labels.tolist() == labels
        tops = [names.partition("/")[0] + "/" for names in (train, test)]
        found = f"{len(data.train)} images to train on in {tops[0]}, {len(data.test)} to test on in {tops[1]}{unread}"
        assert data.description == found

    @pytest.mark.parametrize("files, train, unread", [
        ("1 a/2 b/c/3 val/d/4 .e/5", "1 a/2 b/c/3 val/d/4", ""), ("a/1 val/a/2 train/", "a/1 val/a/2", ""),
        ("train/1 val/a/2", "train/1", "; not read: val/"),
        ("train/a/1 train/b/2 val/3 val/images/4", "train/a/1 train/b/2", "; not read: val/"),
        ("train/a/1 val/b/2", "train/a/1", "; not read: val/"),
        ("train/a/1 mytest/a/2", "train/a/1", "; not read: mytest/"),
        ("train/a/1 train/2 old/b/3", "train/2 train/a/1", "; not read: old/"),
    ])  # fmt: skip
    def test_another_tree_has_no_labels_and_trains_on_its_train_split_or_on_all(self, tmp_path, files, train, unread):
        place_images(tmp_path, files)
        data = load_folder(tmp_path)
        assert names_of(data.train, tmp_path) == train
        assert data.train.labels is data.test is None
        no_knn = "no kNN: that needs train/CLASS/* and val/CLASS/*"
        assert data.description.endswith(no_knn + unread)

    @pytest.mark.parametrize("files, words", [
        ("", "--data {0}: not cifar10, cifar100, shapes or a folder with images (."),
        ("a/", "--data {0}: not cifar10, cifar100, shapes or a folder with images"),
        ("a/.x/1", "--data {0}: not cifar10, cifar100, shapes or a folder with images"),
        ("train/a/1 valid/a/2 validation/a/3", "--data: valid/ and validation/ fit equally well"),
        ("train/a/1 Train/a/2 val/a/3", "--data: Train/ and train/ fit equally well"),
        ("train/a/1 val/a/2 val/3", "--data: val/3.png is in none of the class folders to train on"),
        ("train/a/1 val/a/2 val/b/3", "--data: val/b/3.png is in none of the class folders to train on"),
        ("train/a/1 val/a/2 train/3", "--data: train/3.png is in none of the class folders to train on"),
    ])  # fmt: skip
    def test_a_folder_is_refused_if_missing_empty_ambiguous_or_partly_in_classes(self, tmp_path, files, words):
        top = tmp_path / "set"
        place_images(top, files)
        with pytest.raises(UserError, match=re.escape(words.format(top))):
            load_folder(top)

    @pytest.mark.parametrize("in_memory", [False, True])
    def test_every_image_has_the_number_of_its_class_in_train(self, tmp_path, in_memory):
        # By name, b.c/2.png comes before b/0.png, but the class b before b.c.
        place_images(tmp_path, "train/b/0 train/a/1 train/b.c/2 train/b/x/3 train/a/4 val/b/5 val/b.c/6")
        data = load_folder(tmp_path, in_memory)
        for split, names, labels in ((data.train, [1, 4, 2, 0, 3], [0, 0, 2, 1, 1]), (data.test, [6, 5], [2, 1])):
            assert batch_of(split, list(range(len(split))))[:, 0, 0, 0].tolist() == names
            assert split.labels.tolist() == labels

    def test_links_are_followed_but_to_no_folder_twice_or_above(self, tmp_path):
        place_images(tmp_path, "in/set/train/a/0 in/set/val/a/1 elsewhere/2 more/3 4 in/5")
        train = tmp_path / "in" / "set" / "train"
        links = {"b": "elsewhere", "c": "elsewhere", "x": "in/set/train", "a/x": "in/set/train", "a/v": "in/set/val"}
        links |= {"a/y": "in/set", "a/z": "in", "a/w": ".", "../latest": "in/set/train", "../first": "in/set/train/a"}
        for name, target in (links | {"a/linked.png": "more/3.png"}).items():
            (train / name).symlink_to(tmp_path / target)
        assert names_of(load_folder(tmp_path / "in" / "set").train, train) == "a/0 a/linked b/2"

    @pytest.mark.parametrize("place", ["", "train", "train/b", "val", "val/a"])
    def test_a_folder_that_cannot_be_read_is_an_error_that_names_it(self, tmp_path, monkeypatch, place):
        def scandir(path, scan=os.scandir):
            if Path(path) == tmp_path / place:
                raise PermissionError(13, "Permission denied", path)
            return scan(path)

        place_images(tmp_path, "train/a/0 train/b/1 val/a/2")
        monkeypatch.setattr(os, "scandir", scandir)
        with pytest.raises(PermissionError, match=f"Permission denied: '{tmp_path / place}/?'"):
            load_folder(tmp_path)

    def test_only_regular_files_that_pillow_decodes_by_itself_are_images(self, tmp_path):
        place_images(tmp_path, "0")
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / "0.eps")  # to read it starts Ghostscript
        os.mkfifo(tmp_path / "1.png")  # to read it is to wait for ever
        (tmp_path / "train").write_text("a list of files")
        assert names_of(load_folder(tmp_path).train, tmp_path) == "0"
        (tmp_path / "2.png").symlink_to(tmp_path / "gone.png")
        with pytest.raises(FileNotFoundError, match="2.png"):
            load_folder(tmp_path)

    @pytest.mark.parametrize("change, equal", [
        (lambda top: None, True), (lambda top: top.rename(top.parent / "moved"), True),
        (lambda top: place_images(top, "train/a/5"), False), (lambda top: os.remove(top / "train/a/0.png"), False),
        (lambda top: os.rename(top / "train/b/1.png", top / "train/b/9.png"), False),
        (lambda top: os.rename(top / "train/a/0.png", top / "train/b/0.png"), False),
        (lambda top: os.rename(top / "val/a/2.png", top / "val/a/9.png"), False),
    ])  # fmt: skip
    def test_the_fingerprint_is_that_of_the_images_names_below_the_folder(self, tmp_path, change, equal):
        place_images(tmp_path / "set", "train/a/0 train/b/1 val/a/2 val/b/3 train/a/4")
        change(tmp_path / "set")
        (top,) = tmp_path.iterdir()
        assert (load_folder(top).fingerprint == 2671392092) == equal  # in every process

    @pytest.mark.parametrize("suffix", [*IMG_EXTENSIONS, ".jfif", ".jpe", ".gif", ".avif", ".JPG"])
    def test_a_file_is_decoded_as_torchvisions_image_folder_decodes_it(self, tmp_path, suffix):
        exif = PIL.Image.Exif()
        exif[0x0112] = 6  # "rotate me", which neither heeds
        image = tvf.to_pil_image(images_of(1, 70, 110)[0])
        path = tmp_path / f"Z\udcfcrich{suffix}"  # in Latin-1
        image.convert("L" if suffix == ".pgm" else "RGB").save(path, exif=exif)
        expected = tvf.pil_to_tensor(default_loader(path))
        assert torch.equal(batch_of(load_folder(tmp_path).train, [0])[0], expected)

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
    def test_an_image_of_any_mode_becomes_rgb_unless_it_has_more_than_8_bits(self, tmp_path, mode):
        path = tmp_path / "0.tif"
        PIL.Image.linear_gradient("L").convert(mode).save(path)
        is_deep = mode in ("I;16", "I", "F")
        with pytest.raises(UserError, match="more than 8 bits") if is_deep else contextlib.nullcontext():
            assert torch.equal(moco.read_image(str(path)), tvf.pil_to_tensor(default_loader(path)))

    @pytest.mark.filterwarnings("ignore:Palette images with Transparency")
    def test_odd_metadata_and_the_suffix_of_another_format_do_no_harm(self, tmp_path):
        path = tmp_path / "0.jpg"
        PIL.Image.new("P", (8, 6)).save(path, "png", transparency=b"\1")  # of which Pillow warns
        assert moco.read_image(str(path)).shape == (3, 6, 8)

    @pytest.mark.filterwarnings("ignore:Image size")  # a user does not make warnings errors
    @pytest.mark.parametrize("change, cause", [
        (lambda path: path.write_bytes(b"no image"), "cannot identify image file"),
        (lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"), "cannot identify"),
        (lambda path: path.write_bytes(b"P6 10000 10000 255\n"), "90 million pixels"),
        (lambda path: os.truncate(path, 900), "image file is truncated"), (os.remove, "No such file or directory"),
    ])  # fmt: skip
    def test_a_file_that_cannot_be_read_is_named_once_with_its_cause(self, folder, change, cause):
        data = load_folder(folder)
        bad = folder / "train" / "dark" / "0.png"
        change(bad)
        advice = "replace it, or remove it and begin anew"
        with pytest.raises(UserError, match=rf"\A{bad}: cannot be read \([^/\n]*{cause}[^/\n]*\); {advice}\Z"):
            batch_of(data.train, list(range(20)), Augment().evaluation_view)

    @pytest.mark.parametrize("place", [0, 1, 2])
    @pytest.mark.parametrize("size", [(12, 10), (12, 9), (11, 10), (10, 12)])
    @pytest.mark.parametrize("missing", [0, 1])
    def test_images_of_one_size_that_take_up_to_1_gib_are_held(self, tmp_path, monkeypatch, place, size, missing):
        assert moco.MEMORY == 2**30
        monkeypatch.setattr(moco, "MEMORY", 3 * 3 * 12 * 10 - missing)
        place_images(tmp_path, "0 1 2")
        PIL.Image.new("RGB", size).save(tmp_path / f"{place}.png")
        held = load_folder(tmp_path, in_memory=True, device=torch.device("meta")).train
        assert isinstance(held, moco.InMemory) == (size == (12, 10) and not missing)
        assert not isinstance(held, moco.InMemory) or held.images.is_meta

    @pytest.mark.parametrize("workers", [1, 3])
    def test_as_many_threads_as_workers_read_at_once_a_few_batches_ahead(self, image_folder, monkeypatch, workers):
        monkeypatch.setattr(torch, "set_num_threads", set_by := Mock())
        files = load_folder(image_folder, workers=workers).train
        planned = [(0, torch.tensor([i, i + 1])) for i in range(12)]
        meeting = threading.Barrier(workers, timeout=60)  # of as many threads at once
        begun = []

        def crop(image, epoch, index):
            meeting.wait()
            return torch.full((1, 1, 1), index)

        loaded = []
        for images, indices in files.batches((begun.append(1) or batch for batch in planned), crop):
            loaded.append((images.flatten().tolist(), indices.tolist()))
            assert len(begun) == min(12, len(loaded) + 1 + workers)
        assert loaded == [([i, i + 1], [i, i + 1]) for i in range(12)]
        assert set_by.call_args_list == workers * [((1,),)]  # in each: torch has threads of its own
        assert not [x for x in threading.enumerate() if x.name.startswith("ThreadPool")]


class Embedding(nn.Module):
    """Embed images by a function; the head returns the sine of its first two features."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, x):
        return self.features(x)[:, :2].sin()


def pixel_sums(x):
    """Map images (N,3,12,12) to five features, two of them tiny and one always 0."""
    return x.flatten(1) @ draws(rng("pixel sums"), 432, 5).sub(0.5) * torch.tensor([1, 1, 1e-3, 1e-3, 0])


def extract(encoder, images, **options):
    return moco.extract_features(encoder, moco.InMemory(images, None), tiny_config(**options), contextlib.nullcontext)


def measure(encoder, train, test, autocast=contextlib.nullcontext, linear=False, stop=bool, **options):
    """Return the accuracy of an encoder on images and labels."""
    data = moco.Data(moco.InMemory(*train), moco.InMemory(*test), "", "")
    return moco.accuracy(encoder, data, tiny_config(**{"size": 12, **options}), autocast, linear, stop)


class TestFeatures:
    def test_features_are_in_the_order_of_the_images_in_float32_and_computed_few_at_a_time(self):
        sizes = []
        images = images_of(1100, 9, 9)
        encoder = Embedding(lambda x: sizes.append(len(x)) or x.flatten(1).bfloat16())
        features = extract(encoder, images, size=9)
        assert features.dtype == torch.float32
        assert torch.equal(features, Augment(size=9).normalize(images / 255).flatten(1).bfloat16().float())
        assert max(sizes) <= 512

    def test_features_are_extracted_in_eval_mode(self):
        encoder = ResNetEncoder("resnet10", width=0.125, bn_splits=2)
        before = copy.deepcopy(encoder.state_dict())
        features = extract(encoder, images_of(10))
        close(features[:1], extract(encoder, images_of(1)))
        assert (features.requires_grad, encoder.training) == (False, False)
        assert same(encoder.state_dict(), before)

    @pytest.mark.parametrize("batches", range(5))
    def test_an_evaluation_stops_before_any_batch(self, batches):
        seen = []
        encoder = Embedding(lambda x: seen.append(len(x)) or pixel_sums(x))
        train, test = ((images_of(n, 12, 12), torch.arange(n)) for n in (1100, 600))  # three batches, and two
        with pytest.raises(InterruptedError):
            measure(encoder, train, test, stop=lambda: len(seen) >= batches)
        assert len(seen) == batches

    @pytest.mark.parametrize("head", [False, True])
    @pytest.mark.parametrize("linear", [False, True])
    @pytest.mark.parametrize("seed", range(3))
    def test_accuracy_is_that_of_the_pipeline_written_by_hand(self, seed, head, linear):
        # A leak must change the answer: labels are random, the splits differ in size, contrast and number of classes.
        sets = images_of(37, 24, 20, seed) // 16 + 100, images_of(91, 24, 20, seed + 9)
        labels, answers = (torch.randint(n, (len(x),), generator=rng(seed, n)) for x, n in zip(sets, (3, 2)))
        encoder = Embedding(pixel_sums)
        features = []
        for images in sets:
            views = tvf.center_crop(tvf.resize(images, [14]), [12, 12]) / 255  # 12·256/224
            views = tvf.normalize(views, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
            features.append(encoder(views) if head else encoder.features(views))
        bank, queries = features
        if linear:
            std, mean = torch.std_mean(bank, 0)
            std[4:] = 1  # of the feature that is always 0
            predicted = moco.fit_linear((bank - mean) / std, labels, 3)((queries - mean) / std).argmax(1)
        else:
            predicted = moco.knn_predict(queries, bank, labels, 3, 9, 0.02)
        options = dict(linear=linear, aug="v2", head=head, knn_k=9, knn_t=0.02)
        top1 = measure(encoder, (sets[0], labels), (sets[1], answers), **options)
        assert top1 == pytest.approx(100 * (predicted == answers).sum().item() / 91)

    def test_features_are_computed_under_autocast_and_compared_without_it(self):
        def angles(x):  # on a circle, too near to one another for bf16 to tell apart
            assert torch.is_autocast_enabled("cpu")
            return torch.stack([x[:, 0, 0, 0].cos(), x[:, 0, 0, 0].sin()], 1)

        split = torch.arange(64, dtype=torch.uint8)[:, None, None, None].expand(64, 3, 12, 12), torch.arange(64)
        bf16 = partial(torch.autocast, "cpu", torch.bfloat16)
        assert measure(Embedding(angles), split, split, bf16, knn_k=1) == 100


class Code:
    """Create a file when unpickled without restrictions."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def edited(old, changes):
    """Replace values in nested dicts: by others, by functions of the old ones, or, for `...`, by nothing."""
    new = dict(old)
    for key, change in changes.items():
        apply = partial(edited, changes=change) if isinstance(change, dict) else change
        new[key] = apply(old[key]) if callable(apply) else change
    return {key: x for key, x in new.items() if x is not ...}


def marked_as_folder(checkpoint, path):
    """Change a record's attributes in the zip file's directory: torch would read zeros."""
    torch.save(checkpoint, path)
    content = bytearray(path.read_bytes())
    content[content.rfind(b"PK\1\2", 0, content.rfind(b"/data/0")) + 38] ^= 16
    path.write_bytes(content)


def compressed(checkpoint, path):
    """Compress the records, which may then inflate to a thousand times the file."""
    torch.save(checkpoint, "stored.pt")
    with zipfile.ZipFile("stored.pt") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


CONV = "module.encoder_q.layer1.0.conv1.weight"
STEM = "module.encoder_q.conv1.weight"
BROKEN = {  # how to write the file, or what to change in its content, and words of the refusal
    "empty": (lambda checkpoint, path: path.touch(), "not a checkpoint (EOFError"),
    "a record marked as a folder": (marked_as_folder, "damaged, compressed or a folder"),
    "compressed": (compressed, "damaged, compressed or a folder"),
    "a pickle": (lambda checkpoint, path: path.write_bytes(pickle.dumps(Code())), "UnpicklingError"),
    "a class": (dict(optimizer=Code()), "getattr"),
    "no epoch": (dict(epoch=...), "not a checkpoint (KeyError: 'epoch')"),
    "an option of another kind": (dict(config=dict(lr="fast")), "not a checkpoint (ValueError"),
    "unknown views": (dict(config=dict(aug="v9")), "not a checkpoint (KeyError: 'v9')"),
    "another arch": (dict(arch="vgg"), "encoder_q is not one of resnet10"),
    "weights that are numbered": (dict(state_dict=lambda weights: {5: torch.ones(1)}), "(TypeError: argument of type"),
    "a stem of one dimension": (dict(state_dict={STEM: torch.ones(3)}), "encoder_q is not one of resnet10"),
    "nan": (dict(state_dict={CONV: lambda x: x * math.nan}), "layer1.0.conv1.weight is not torch.float32"),
    "a width, with all 20 TB": (dict(state_dict={STEM: torch.zeros(384_000, 3, 3, 3)}), "is not torch.float32 (384000"),
    "a width of stride 0": (dict(state_dict={STEM: torch.ones(1).expand(4096, 3, 3, 3)}), "is not torch.float32 (4096"),
}  # fmt: skip


class TestCheckpoints:
    def test_a_checkpoint_is_plain_values_and_tensors_under_the_official_names(self, checkpoint):
        assert checkpoint.keys() > {"epoch", "step", "arch", "state_dict", "optimizer", "config"}
        assert (checkpoint["epoch"], checkpoint["step"], checkpoint["arch"]) == (2, 10, "resnet18")
        names = [x for x in torchvision.models.resnet18().state_dict() if not x.startswith("fc.")]
        names += ["fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias"]
        encoders = {f"module.encoder_{x}.{name}" for x in "qk" for name in names}
        assert checkpoint["state_dict"].keys() == encoders | {"module.queue", "module.queue_ptr"}

    @pytest.mark.parametrize("tag", ["cpu", "cuda:0"])
    def test_what_is_saved_on_any_device_is_loaded_onto_the_cpu(self, tmp_path, monkeypatch, checkpoint, tag):
        monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: tag)
        moco.save_checkpoint(str(tmp_path / "c.pt"), checkpoint)
        assert same(moco.load_checkpoint(str(tmp_path / "c.pt")), checkpoint)

    @pytest.mark.parametrize("change, words", BROKEN.values(), ids=BROKEN)
    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    @pytest.mark.usefixtures("run")  # in a folder of its own
    def test_a_broken_or_hostile_file_is_refused_in_a_line_and_not_executed(self, checkpoint, change, words):
        if callable(change):
            change(checkpoint, Path("bad.pt"))
        else:
            torch.save(edited(checkpoint, change), "bad.pt")
        try:
            raise OSError("of the caller, who handles it")
        except OSError:  # is no cause of what follows
            with pytest.raises(UserError, match=rf"\Abad\.pt: .*{re.escape(words)}.*\Z") as error:
                moco.load_encoder(moco.load_checkpoint("bad.pt"), "bad.pt")
        assert "Please use" not in str(error.value)  # torch's advice
        assert not Path("executed").exists()

    @given(place=st.integers(0, 2**20), bits=st.integers(1, 255), cut=st.booleans())
    def test_a_file_with_changed_or_missing_bytes_loads_to_equal_tensors_or_is_refused(self, place, bits, cut):
        weights = {str(i): torch.arange(300) + i for i in range(20)}
        kept = {"epoch": 3, "arch": "resnet10", "state_dict": weights, "config": {"preset": "v2", "lr": 0.5}}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "c.pt"
            torch.save(kept, path)
            content = bytearray(path.read_bytes())
            place %= len(content)
            content[place:] = b"" if cut else bytes([content[place] ^ bits]) + content[place + 1 :]
            path.write_bytes(content)
            try:
                assert same(moco.load_checkpoint(str(path)), kept)
            except UserError as error:
                assert re.fullmatch(f"{path}: .*", str(error))  # a line

    @pytest.mark.parametrize("change, words", [
        ({}, None), (dict(x=...), "missing or unexpected: x"), (dict(z=torch.ones(1)), "missing or unexpected: z"),
        (dict(x=torch.ones(4, 3)), "x is not torch.float32 (3, 4), complete and finite"), (dict(y=5), "y is not"),
        (dict(x=torch.ones(3, 4).double()), "x is not"), (dict(x=torch.tensor([[1, 1, 1, math.inf]] * 3)), "x is not"),
        (dict(x=torch.ones(3, 1).expand(3, 4)), "x is not"),  # claims four times what it holds
    ])  # fmt: skip
    def test_tensors_have_the_names_shapes_and_dtypes_expected_and_are_finite_or_refused(self, change, words):
        expected = dict(x=torch.zeros(3, 4), y=torch.tensor(7))
        with pytest.raises(ValueError, match=re.escape(words)) if words else contextlib.nullcontext():
            moco.check_tensors(edited(expected, change), expected)

    def test_two_writers_of_one_path_do_not_share_a_temporary_file(self, tmp_path, monkeypatch):
        def write_another(number):
            monkeypatch.undo()
            moco.write_file(str(tmp_path / "c.pt"), b"the second")

        monkeypatch.setattr(os, "fsync", write_another)
        moco.write_file(str(tmp_path / "c.pt"), b"the first")
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"the first"]

    def test_a_link_stays_and_its_target_is_replaced(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "target")
        moco.write_file(str(tmp_path / "link"), b"new")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "target").read_bytes() == b"new"

    @pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
    def test_a_full_disk_is_a_user_error_and_the_old_file_is_kept(self, tmp_path, monkeypatch, request, moment):
        resource = pytest.importorskip("resource")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        request.addfinalizer(partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits))
        path = tmp_path / "c.pt"
        moco.save_checkpoint(str(path), {"step": 1})
        if moment == "write":  # after 10,000 bytes
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        else:
            monkeypatch.setattr(os, moment, Mock(side_effect=OSError(27, "File too large")))
        with pytest.raises(UserError, match=f"^{path}: not written; the old file, if any, is kept .*File too large.$"):
            moco.save_checkpoint(str(path), {"step": torch.zeros(10_000)})
        monkeypatch.setattr(os, "fsync", Mock(side_effect=KeyError))  # as a signal handler may raise
        with pytest.raises(KeyError):
            moco.save_checkpoint(str(path), {})
        assert torch.load(path) == {"step": 1}
        assert os.listdir(tmp_path) == ["c.pt"]

    @pytest.mark.parametrize("arch, mlp", [("resnet50", False), ("resnet18", True)])
    def test_an_official_checkpoint_is_evaluated_from_its_weights_only(self, tmp_path, arch, mlp):
        theirs = getattr(torchvision.models, arch)(num_classes=128).eval()
        if mlp:
            width = theirs.fc.in_features
            theirs.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), theirs.fc)
        path = str(tmp_path / "moco.pth.tar")
        weights = {f"module.{name}": x for name, x in MoCo(theirs, K=8).state_dict().items()}
        official = {"epoch": 200, "arch": arch, "state_dict": weights, "optimizer": {"state": {}, "param_groups": []}}
        torch.save(official, path, _use_new_zipfile_serialization=False)
        encoder = moco.load_encoder(moco.load_checkpoint(path), path)
        x = torch.randn(2, 3, 64, 64)
        close(encoder(x), theirs(x), 1e-4, 1e-4)

    def test_the_prefix_of_ddp_is_optional(self, checkpoint):
        renamed = {name.removeprefix("module."): x for name, x in checkpoint["state_dict"].items()}
        encoder = moco.load_encoder(checkpoint | {"state_dict": renamed}, "c.pt")
        assert same(encoder.state_dict(), moco.load_encoder(checkpoint, "c.pt").state_dict())

    @pytest.mark.parametrize("options", [dict(mlp=False), dict(stem="cifar"), dict(width=1.5), dict(width=0.21)])
    def test_the_query_encoder_is_rebuilt_from_its_weights_only(self, options):
        encoder = ResNetEncoder("resnet10", 7, **{"stem": "imagenet", "width": 0.25, **options})
        model = MoCo(encoder, dim=7, K=8).eval()
        nn.init.zeros_(model.encoder_k.conv1.weight)
        weights = {f"module.{name}": x for name, x in model.state_dict().items()}
        loaded = moco.load_encoder({"arch": "resnet10", "state_dict": weights}, "c.pt")
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(loaded(x), encoder(x))
        assert not loaded.training

    def test_export_writes_the_query_encoder_without_its_head(self, run, checkpoint):
        torch.save(checkpoint, "c.pt")
        assert [run("export", "c.pt", "b.pt")[0] for _ in range(2)] == [0, 2]  # no file is replaced
        names = [x for x in torchvision.models.resnet18().state_dict() if not x.startswith("fc.")]
        expected = {name: checkpoint["state_dict"][f"module.encoder_q.{name}"] for name in names}
        assert same(dict(torch.load("b.pt", weights_only=True)), expected)


def config_of(images, out, **options):
    """Configure a run on 20 images for two epochs of five steps, which saves after each."""
    base = dict(arch="resnet10", size=16, batch_size=4, workers=1, knn_every=1, save_seconds=0)
    return tiny_config(**{**base, "data": str(images), "out": str(out), **options})


def finish(config, **options):
    """Train to the end; return what is yielded."""
    return list(moco.Run(dataclasses.replace(config, **options)).train())


def saved(folder, name="c.pt"):
    return moco.load_checkpoint(str(folder / name)) if (folder / name).exists() else {"step": None}


def lasting(folder, name="c.pt"):
    """Return a checkpoint without times and how it ran, which no two runs share."""
    checkpoint = saved(folder, name)
    rows = [{**row, "seconds": None, "images_per_s": None} for row in checkpoint["rows"]]
    return {**checkpoint, "rows": rows, "seconds": None}


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory, image_folder):
    """Return what lasts of a run on images of several sizes."""
    folder = tmp_path_factory.mktemp("never")
    finish(config_of(image_folder, folder / "c.pt"))
    return lasting(folder)


@contextlib.contextmanager
def double():
    """Compute in float64, in which two ways of one computation agree over many steps."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


class TestOptimization:
    @pytest.mark.parametrize("options, epochs, expected", [
        (dict(epochs=8), (0, 2, 4, 8), (1, 0.5 + 0.25 * math.sqrt(2), 0.5, 0)),
        (dict(preset="v1"), (0, 119.99, 120, 159.99, 160, 200), (1, 1, 0.1, 0.1, 0.01, 0.01)),
        (dict(preset="v1", schedule=(5,)), (0, 4, 5), (1, 1, 0.1)),
    ])  # fmt: skip
    def test_the_learning_rate_decays_by_a_cosine_or_a_schedule(self, options, epochs, expected):
        config = Config.from_preset(**options, lr=0.4)
        close([moco.learning_rate(config, epoch) for epoch in epochs], [0.4 * x for x in expected])


class TestDevice:
    @pytest.mark.parametrize("cuda, mps, asked, environment, expected", [
        (1, 1, "auto", {}, ("cuda", 0)), (0, 1, "auto", {}, ("mps",)), (0, 0, "auto", {}, ("cpu",)),
        (1, 1, "cpu", {}, ("cpu",)), (1, 0, "mps", {}, None), (0, 1, "cuda", {}, None),
        (1, 0, "auto", dict(WORLD_SIZE="1"), ("cuda", 0)), (1, 0, "cpu", dict(WORLD_SIZE="8"), ("cpu",)),
        (1, 0, "auto", dict(WORLD_SIZE="8"), ("cuda", 2)),
    ])  # fmt: skip
    def test_auto_is_cuda_else_mps_else_the_cpu_and_processes_are_found_by_world_size(
        self, monkeypatch, cuda, mps, asked, environment, expected
    ):
        joined = []
        chosen = []
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.distributed, "init_process_group", joined.append)
        monkeypatch.setattr(moco, "rank", lambda: 6 if joined else 0)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
        refused = pytest.raises(UserError, match=f"^--device {asked}: .*; give --device auto$")
        with contextlib.nullcontext() if expected else refused:
            device, precision, _ = moco.pick_device(Config(device=asked))
            on_cuda = device.type == "cuda"
            assert (device.type, *chosen) == expected
            assert joined == ["cpu:gloo,cuda:nccl" if on_cuda else "gloo"] * (environment.get("WORLD_SIZE") == "8")
            assert device.type == "cpu" or precision == "fp32"  # bf16 that is emulated is slow

    @pytest.mark.parametrize("number", ["2", "two"])
    def test_processes_that_cannot_join_are_an_error_that_names_the_variables(self, monkeypatch, number):
        monkeypatch.setenv("WORLD_SIZE", number)
        for name in ("RANK", "MASTER_ADDR"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(UserError, match="^WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT "):
            moco.pick_device(Config(device="cpu"))

    @pytest.mark.parametrize("precision, fast, bf16", [("auto", 1, 1), ("auto", 0, 0), ("bf16", 0, 1), ("fp32", 1, 0)])
    def test_precision_auto_is_bf16_where_the_cpu_has_it(self, monkeypatch, precision, fast, bf16):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(fast))
        _, chosen, autocast = moco.pick_device(Config(device="cpu", precision=precision))
        assert chosen == ("bf16" if bf16 else "fp32")
        with autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if bf16 else torch.float32)


MODELS = {  # of an encoder with 12 dimensions, for n images
    "moco": lambda encoder, n: MoCo(encoder, 12, K=48, m=0.625, T=0.37, symmetric=True),
    "end-to-end": lambda encoder, n: moco.EndToEnd(encoder, T=0.37),
    "memory-bank": lambda encoder, n: moco.MemoryBank(encoder, n, 12, K=48, T=0.37),
    "simclr": lambda encoder, n: moco.SimCLR(encoder, T=0.37),
}


class TestRun:
    @pytest.mark.parametrize("method, streamed", [
        ("moco", False), ("moco", True), ("end-to-end", False), ("memory-bank", True), ("simclr", False),
    ])  # fmt: skip
    def test_a_run_is_sgd_on_the_loss_of_two_views(self, few, image_folder, tmp_path, method, streamed):
        images = moco.shapes(True)[0]
        options = dict(method=method, symmetric=method == "moco", moco_t=0.37, moco_k=48, moco_m=0.625)
        options |= dict(moco_dim=12, mlp=False, arch="resnet10", stem="imagenet", size=40, bn_splits=4, aug="v2")
        if streamed:
            options |= dict(data=str(image_folder), workers=1)
            images = [tvf.pil_to_tensor(image) for image, _ in torchvision.datasets.ImageFolder(image_folder / "train")]
        n = len(images)
        steps = n // 8
        with double():
            run = moco.Run(tiny_config(out=str(tmp_path / "c.pt"), seed=7, lr=0.03, wd=1.0, **options))
            losses = [run.losses[(run.step - 1) % steps].clone() for _ in run.train()]
            torch.manual_seed(7)
            model = MODELS[method](ResNetEncoder("resnet10", 12, False, 4, "imagenet", 0.125), n)
            optimizer = torch.optim.SGD(model.encoder_q.parameters(), momentum=0.9, weight_decay=1)
            two_views = SplitTwoViews(Augment("v2", 40), seed=7)
            for step, loss in enumerate(losses):
                epoch = step // steps
                indices = torch.randperm(n, generator=rng("order", 7, epoch))[step % steps * 8 :][:8]
                generator = rng("step", 7, step)
                if streamed:
                    crops = [two_views.crop_file(images[i], epoch, i) for i in indices.tolist()]
                    views = two_views.from_crops(torch.stack(crops, 1), generator)
                else:
                    views = two_views(images[indices], generator)
                expected = model(*views, generator, indices)
                close(loss, expected.detach(), atol=1e-8)
                optimizer.param_groups[0]["lr"] = 0.015 * (1 + math.cos(math.pi * step / len(losses)))
                optimizer.zero_grad()
                expected.backward()
                optimizer.step()
        close(saved(tmp_path)["state_dict"], {f"module.{name}": x for name, x in model.state_dict().items()}, atol=1e-8)
        assert (len(losses), run.step, run.losses.requires_grad) == (2 * steps, 2 * steps, False)

    @pytest.mark.parametrize("precision", ["bf16", "fp32"])
    def test_training_and_its_knn_compute_in_the_precision_of_the_run(self, few, tmp_path, precision):
        seen = set()
        run = moco.Run(tiny_config(out=str(tmp_path / "c.pt"), precision=precision, epochs=1))
        run.model.encoder_q.conv1.register_forward_hook(lambda conv, _, y: seen.add((conv.training, y.dtype)))
        list(run.train())
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        assert seen == {(True, dtype), (False, dtype)}
        assert run.model.encoder_q.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)

    def test_the_csv_has_a_header_at_the_start_and_a_row_per_epoch_with_knn_when_it_is_due(self, few, tmp_path):
        lines = ["epoch,loss,lr,knn,images_per_s,seconds"]
        run = moco.Run(tiny_config(out=str(tmp_path / "c.pt"), epochs=5, knn_every=2))
        for row in run.train():
            assert (row is None) == (run.step % 5 > 0)
            if row:
                close(row["loss"], run.losses.mean().item())
                lines.append(",".join("" if x is None else str(x) for x in row.values()))
            assert (tmp_path / "c.csv").read_bytes().decode().split("\n") == [*lines, ""]
        assert [row["epoch"] for row in run.rows] == [1, 2, 3, 4, 5]
        assert [row["knn"] is not None for row in run.rows] == [False, True, False, True, True]
        close([row["lr"] for row in run.rows], [0.03 * (1 + math.cos(math.pi * i / 5)) for i in range(5)])

    def test_a_row_has_its_epochs_seconds_and_its_speed_without_knn_also_once_resumed(self, few, tmp_path, monkeypatch):
        now = 0.0

        def work(conv1, *_):  # 2 s per step; kNN takes 3.5 s for each split
            nonlocal now
            now += 2 if conv1.training else 3.5

        monkeypatch.setattr(moco, "time", types.SimpleNamespace(monotonic=lambda: now))
        options = dict(out=str(tmp_path / "c.pt"), batch_size=6, knn_every=2, epochs=3)
        for stop in (16, 1025, math.inf):  # in epoch 2, in its kNN; 6 of 40 images in each of 6 steps
            run = moco.Run(tiny_config(**options, resume=True))
            run.model.encoder_q.conv1.register_forward_hook(work)
            list(run.train(lambda stop=stop: moco.time.monotonic() >= stop))
            now += 1000
        assert [(row["images_per_s"], row["seconds"]) for row in run.rows] == [(3, 12), (3, 19), (3, 19)]

    def test_train_from_python_takes_numpys_numbers_and_an_own_recipe_in_any_thread_and_returns_its_rows(
        self, few, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.setitem(moco.RECIPES, "own", ((0.5, 1), 1, moco.CIFAR_COLORS, [moco.FLIP]))
        options = dataclasses.asdict(tiny_config(aug="own", out=str(tmp_path / "c.pt"), json=True))
        options |= dict(lr=numpy.float32(0.5), moco_k=numpy.int64(41), cos=numpy.bool_(False))
        with ThreadPool(1) as pool:
            rows = pool.apply(moco.train, kwds=options)
        assert [(row["epoch"], row["lr"]) for row in rows] == [(1, 0.5), (2, 0.5)]
        out, err = capsys.readouterr()
        assert rows == saved(tmp_path)["rows"] == [json.loads(line) for line in out.splitlines()]
        assert err.startswith("shapes: 40 images to train on, 20 to test on; cpu, fp32\nnote: --moco-k")


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
MOMENTS = ["open c.pt", "replace c.pt", "open c.csv", "replace c.csv"]  # of save 0, 1, 2, …
OTHER_IMAGES = {
    "one more": lambda top: shutil.copy(top / "train/dark/0.png", top / "train/dark/new.png"),
    "another name": lambda top: os.rename(top / "train/dark/0.png", top / "train/dark/x.png"),
    "one less": lambda top: os.remove(top / "val/dark/0.png"),
}


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


def train_and_signal(folder, config, number, count):
    """Train in another process, signal it just before the count-th of the MOMENTS; return its exit status."""
    moments = []

    def hook(event, arguments):
        if event in ("open", "os.rename") and str(arguments[0]).endswith(".tmp"):
            moments.append(event)
            if len(moments) == count:
                os.kill(os.getpid(), number)

    def work():
        torch.set_num_threads(1)
        os.setsid()
        sys.stderr = open(folder / "err", "w")
        sys.addaudithook(hook)
        moco.train(**dataclasses.asdict(config))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode


class TestNeverLosingARun:
    @pytest.mark.parametrize("streamed", [False, True])
    def test_a_run_resumed_after_every_step_ends_bit_for_bit_as_one_never_stopped(
        self, few, image_folder, never_stopped, tmp_path, streamed
    ):
        config = config_of(image_folder, tmp_path / "c.pt")
        if not streamed:
            config = dataclasses.replace(config, data="shapes", batch_size=8)
            finish(config, out=str(tmp_path / "never.pt"))
        config.resume = True  # it begins where there is no file
        for step in range(11):
            run = moco.Run(config)
            yielded = list(run.train(lambda run=run, step=step: run.step == step))
            # At 5 and 10, kNN is stopped; the next run makes the row first.
            assert yielded == run.rows[-1:] * (step == 6) + [None] * (step % 5 > 0)
            assert (saved(tmp_path)["step"], saved(tmp_path)["epoch"]) == (step, step // 5)
        assert [row["epoch"] for row in finish(config)] == [2]
        assert same(lasting(tmp_path), never_stopped if streamed else lasting(tmp_path, "never.pt"))

    @pytest.mark.parametrize("number, save, moment, step", [
        (signal.SIGKILL, 0, "replace c.pt", None), (signal.SIGKILL, 0, "open c.csv", 1),
        (signal.SIGKILL, 3, "replace c.pt", 3), (signal.SIGKILL, 4, "open c.csv", 5),
        (signal.SIGINT, 5, "open c.pt", 5), (signal.SIGTERM, 6, "replace c.pt", 6),
    ])  # fmt: skip
    def test_a_run_killed_or_signaled_at_any_moment_of_a_save_ends_once_resumed_as_one_never_stopped(
        self, image_folder, never_stopped, tmp_path, number, save, moment, step
    ):
        killed = number == signal.SIGKILL
        config = config_of(image_folder, tmp_path / "c.pt", workers=2 if killed else 1)
        status = train_and_signal(tmp_path, config, number, 4 * save + MOMENTS.index(moment) + 1)
        assert status == (-number if killed else 128 + number)
        assert (tmp_path / "err").read_text() == ""
        assert saved(tmp_path)["step"] == step
        if save:
            assert len((tmp_path / "c.csv").read_text().splitlines()) == (1 if killed else 2)
        finish(config, resume=True)
        assert same(lasting(tmp_path), never_stopped)
        assert len((tmp_path / "c.csv").read_text().splitlines()) == 3

    @pytest.mark.parametrize("asked, step", [(5, 5), (6, 5), (12, 10), (13, 10)])  # in the kNN of epochs 1 and 2
    def test_a_run_stopped_between_two_batches_of_evaluation_makes_the_epochs_row_on_resume(
        self, image_folder, never_stopped, tmp_path, asked, step
    ):
        config = config_of(image_folder, tmp_path / "c.pt", resume=True)
        for stops in ([False] * asked + [True], [True]):  # the evaluation of a resumed run can be stopped, too
            list(moco.Run(config).train(partial(next, iter(stops))))
            assert (saved(tmp_path)["step"], len(saved(tmp_path)["rows"])) == (step, step // 5 - 1)
        finish(config)
        assert same(lasting(tmp_path), never_stopped)

    @pytest.mark.parametrize("number", SIGNALS)
    def test_the_first_signal_is_noted_and_a_second_one_acts_as_it_would_without_us(self, number):
        before = handlers()
        with moco.catch_signals() as received:
            assert not set(handlers()) & set(before)
            signal.raise_signal(number)
            assert (received, handlers()) == ([number], before)

    def test_signals_have_the_handlers_of_before_after_an_error_and_in_another_thread(self):
        def in_thread():
            with moco.catch_signals():
                return handlers()

        before = handlers()
        with pytest.raises(KeyError), moco.catch_signals():
            raise KeyError
        assert handlers() == before
        with ThreadPool(1) as pool:
            assert pool.apply(in_thread) == before

    def test_a_signal_that_the_shell_ignores_stays_ignored(self):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with moco.catch_signals() as received:
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
                signal.raise_signal(number)
        assert (received, signal.signal(signal.SIGHUP, before)) == ([signal.SIGTERM], signal.SIG_IGN)

    def test_a_complete_run_is_left_as_it_is(self, few, tmp_path):
        list(training(tmp_path))
        files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
        for options in (dict(lr=0.5), dict(epochs=1)):
            assert list(training(tmp_path, resume=True, **options)) == []
        assert files == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}

    @pytest.mark.parametrize("out, rows", [("c.pt", "c.csv"), ("a.pt.b", "a.pt.b.csv"), ("c.csv", "c.csv.csv")])
    def test_a_run_replaces_no_file(self, few, tmp_path, out, rows):
        options = dict(out=str(tmp_path / out))
        for name in (out, rows):
            (tmp_path / name).write_text("of another run")
            with pytest.raises(UserError, match=f"{name}: must be a new file, .* train --resume continues a run$"):
                moco.Run(tiny_config(**options))
            assert [path.read_text() for path in tmp_path.iterdir()] == ["of another run"]
            (tmp_path / name).unlink()
        next(moco.Run(tiny_config(**options)).train())
        assert (tmp_path / rows).read_text() == "epoch,loss,lr,knn,images_per_s,seconds\n"

    def test_a_run_saves_after_a_step_then_every_epoch_and_within_it_every_so_many_seconds(self, few, tmp_path):
        with pytest.raises(UserError, match="not finite after step 1;"):
            list(training(tmp_path, lr=1e40))
        assert os.listdir(tmp_path) == []
        saves = []
        run = moco.Run(tiny_config(out=str(tmp_path / "c.pt")))
        for _ in run.train():
            saves.append(saved(tmp_path)["step"])
            run.next_save -= {1: 290, 2: 11}.get(run.step, 0)  # so many seconds go by
        assert saves == [1, 1, 3, 3, 5, 5, 5, 5, 5, 10]

    @pytest.mark.parametrize("save_seconds, kept, step", [(0, 6, 7), (300, 5, 10)])
    @pytest.mark.parametrize("name", ["losses", "running_var", "momentum_buffer"])
    def test_a_number_that_is_not_finite_ends_the_run_and_is_not_saved(
        self, few, tmp_path, name, save_seconds, kept, step
    ):
        run = moco.Run(tiny_config(out=str(tmp_path / "c.pt"), save_seconds=save_seconds))
        tensors = dict(losses=run.losses, running_var=run.model.encoder_k.bn1.running_var)
        with pytest.raises(UserError, match=f"not finite after step {step}; use a lower --lr or --precision fp32$"):
            for _ in run.train():
                if run.step == 6:
                    tensors |= run.optimizer.state[run.model.encoder_q.conv1.weight]
                    tensors[name].fill_(math.inf)
        assert saved(tmp_path)["step"] == kept

    @pytest.mark.parametrize("bad, step", [("val/dark/3.png", 4), ("train/light/9.png", 3)])
    def test_a_run_stopped_by_an_unreadable_image_goes_on_once_it_is_replaced(self, folder, tmp_path, bad, step):
        image = (folder / bad).read_bytes()
        (folder / bad).write_text("no image")
        config = config_of(folder, tmp_path / "c.pt", workers=1, resume=True)
        with pytest.raises(UserError, match="[39].png: cannot be read"):
            finish(config)
        (folder / bad).write_bytes(image)
        assert len(finish(config)) == 10 - step

    @pytest.mark.parametrize("change", OTHER_IMAGES)
    def test_resume_refuses_a_folder_with_other_images(self, folder, tmp_path, change):
        config = config_of(folder, tmp_path / "c.pt", resume=True)
        next(moco.Run(config).train())
        OTHER_IMAGES[change](folder)
        with pytest.raises(UserError, match="c.pt does not fit this run .*other images"):
            moco.Run(config)

    def test_resume_takes_options_that_may_change_also_from_a_file_that_lacks_one(self, few, tmp_path, checkpoint):
        options = {name: x for name, x in checkpoint["config"].items() if name != "head"}
        torch.save({**checkpoint, "config": options}, tmp_path / "c.pt")
        options = dict(epochs=3, knn_every=2, knn_k=3, knn_t=0.3, lr=0.01, wd=0.1, cos=False, schedule=[9])
        options |= dict(precision="bf16", workers=1)
        assert [row["lr"] for row in training(tmp_path, resume=True, **options) if row] == [0.01]
        group = saved(tmp_path)["optimizer"]["param_groups"][0]
        assert (group["lr"], group["weight_decay"]) == (0.01, 0.1)

    @pytest.mark.parametrize("change", [dict(stem="imagenet", size=33), *({name: value} for name, value in dict(
        arch="resnet34", moco_dim=8, moco_k=64, seed=1, batch_size=4, width=0.25, moco_m=0.9, size=24, aug="v2",
        bn_splits=4, mlp=False, moco_t=0.3, symmetric=True, method="simclr", preset="v2",
    ).items())])  # fmt: skip
    def test_resume_refuses_by_name_what_may_not_change(self, few, tmp_path, checkpoint, change):
        torch.save(checkpoint, tmp_path / "c.pt")
        name, value = next(iter(change.items()))
        with pytest.raises(UserError, match=f"^{flag(name)} {value}: .* with {checkpoint['config'][name]}$"):
            training(tmp_path, resume=True, **change)

    @pytest.mark.parametrize("change", [
        lambda saved: saved.pop("fingerprint"), lambda saved: saved.update(losses=torch.zeros(4)),
        lambda saved: saved["state_dict"]["module.queue"].fill_(math.nan),
    ], ids=["no fingerprint", "another shape", "NaN"])  # fmt: skip
    def test_resume_refuses_in_a_line_what_does_not_fit(self, few, tmp_path, checkpoint, change):
        other = copy.deepcopy(checkpoint)
        change(other)
        torch.save(other, tmp_path / "c.pt")
        with pytest.raises(UserError, match="^--resume: .*c.pt does not fit this run"):
            training(tmp_path, resume=True, epochs=3)


KINDS = {"moco": {}, "files": dict(data="files"), "symmetric": dict(symmetric=True)}
KINDS |= {method: dict(method=method) for method in ("end-to-end", "memory-bank", "simclr")}
EVENTS = {"signal": 7, "evaluation": 6, "late": 6}  # what comes to rank 1, and at which step


def train_jobs(jobs, folders):
    """Train in a folder for each rank; return the names of the files that are then there."""
    os.chdir(folders[moco.rank()])
    for name, config in jobs:
        run = moco.Run(config)

        def stop(name=name, run=run):
            if moco.rank() == 1 and run.step == EVENTS.get(name):
                if name == "late":
                    run.next_save -= 301
                elif not received:
                    signal.raise_signal(signal.SIGTERM)
                    signal.raise_signal(signal.SIGTERM)  # torchrun repeats it
            return received

        with moco.catch_signals() as received:
            for _ in run.train(stop):
                if name == "late" and run.step == 8:
                    break
    return os.listdir()


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Train with the same options on one process, on two and on three, three steps per epoch; return what they saved.
    In float64: BatchNorm over few numbers and ReLU's kinks enlarge float32's rounding a thousandfold."""
    place = tmp_path_factory.mktemp("several")
    for data, growth in (("memory", 0), ("files", 2)):
        for split, n in (("train", 40), ("val", 100)):
            for i, (image, label) in enumerate(zip(*[x[:n] for x in moco.shapes(split == "train")])):
                path = place / "images" / data / split / str(label.item()) / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                tvf.to_pil_image(image[:, growth * (i % 3) :]).save(path)

    def config(out, data="memory", **options):
        base = dict(batch_size=12, bn_splits=6, epochs=1, lr=0.01)
        return config_of(place / "images" / data, out, **{**base, **options})

    def alone(name, **options):
        return [saved(place, name) for _ in moco.Run(config(place / name, **options)).train()]

    more = dict(epochs=3, knn_every=2)
    with double():
        results = {(kind, 1): alone(kind, **options)[-1] for kind, options in KINDS.items()}
        results["alone"] = alone("alone", **more)
        torch.save(results["alone"][3], place / "resumed")
        jobs = [(kind, config(kind, **options)) for kind, options in KINDS.items()]
        others = [(event, config(event, save_seconds=300, **more)) for event in EVENTS]
        others.append(("resumed", config(place / "resumed", resume=True, **more)))
        for size, todo in ((2, jobs[:2] + others), (3, jobs)):
            folders = [tmp_path_factory.mktemp(f"rank{rank}") for rank in range(size)]
            files = on_ranks(size, partial(train_jobs, todo, folders))
            assert files[1:] == [[]] * (size - 1)  # only rank 0 writes
            results |= {(name, size): saved(folders[0], name) for name, _ in todo}
        torch.save(results["evaluation", 2], place / "continued")
        results["continued"] = alone("continued", resume=True, **more)[-1]
    return {**results, "resumed": saved(place, "resumed")}


def assert_agree(many, one):
    """Compare what several processes saved with what one process did."""
    close({**many["state_dict"], "losses": many["losses"]}, {**one["state_dict"], "losses": one["losses"]}, 1e-9, 0)
    close(many["optimizer"]["state"], one["optimizer"]["state"], 1e-8, 0)
    for name in ("epoch", "loss", "lr"):
        close([row[name] for row in many["rows"]], [row[name] for row in one["rows"]])
    assert [row["knn"] for row in many["rows"]] == [row["knn"] for row in one["rows"]]
    assert many["step"] == one["step"]


def refusals(*configs):
    """Return what each rank's run says against its configuration."""

    def refusal():
        try:
            next(moco.Run(configs[moco.rank()]).train())
        except UserError as error:
            return str(error)

    return on_ranks(len(configs), refusal)


class TestSeveralProcesses:
    @pytest.mark.parametrize("kind, size", [("moco", 2), ("files", 2), *((kind, 3) for kind in KINDS)])
    def test_the_same_options_compute_the_same_on_one_and_on_several_processes(self, several, kind, size):
        assert_agree(several[kind, size], several[kind, 1])

    @pytest.mark.parametrize("event", ["signal", "late"])
    def test_a_signal_to_one_process_and_its_clock_make_all_save_at_one_step(self, several, event):
        assert several[event, 2]["step"] == 7
        assert_agree(several[event, 2], several["alone"][6])

    def test_a_signal_to_one_process_stops_the_evaluation_of_all(self, several):
        assert several["evaluation", 2]["step"] == 6
        assert [row["epoch"] for row in several["evaluation", 2]["rows"]] == [1]

    @pytest.mark.parametrize("name", ["continued", "resumed"])
    def test_a_run_goes_on_with_fewer_processes_or_more(self, several, name):
        assert_agree(several[name], several["alone"][-1])

    def test_knn_on_three_processes_is_that_of_one_though_training_split_its_batches_in_two(self, few, run, checkpoint):
        torch.save(checkpoint, "c.pt")
        result = moco.knn("c.pt", device="cpu")
        assert on_ranks(3, partial(moco.knn, "c.pt", device="cpu")) == [result] * 3

    @pytest.mark.parametrize("change", OTHER_IMAGES)
    def test_processes_with_other_images_are_refused(self, image_folder, folder, tmp_path, change):
        OTHER_IMAGES[change](folder)
        configs = [config_of(images, tmp_path / "c.pt") for images in (image_folder, folder)]
        assert all("not the same for all processes" in line for line in refusals(*configs))
        assert os.listdir(tmp_path) == ["images"]

    def test_processes_at_other_steps_are_refused(self, few, tmp_path):
        configs = [tiny_config(out=str(tmp_path / name), resume=True) for name in ("rank0.pt", "rank1.pt")]
        assert refusals(*configs) == [None, None]  # both begin, and rank 0 saves
        assert all("not the same for all processes" in line for line in refusals(*configs))

    @pytest.mark.parametrize("size, options, words", [
        (2, dict(data="cifar10"), "no download"), (2, dict(out=MOCO), "moco.py: must be a new file"),
        (3, {}, "--bn-splits 2: must be a multiple of the 3 processes"),
    ])  # fmt: skip
    def test_every_process_says_what_is_wrong(self, few, tmp_path, monkeypatch, size, options, words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "file:///no/such/file")
        config = tiny_config(**{"root": ".", "out": "c.pt", **options})
        assert all(words in line for line in refusals(*[config] * size))


README = (Path(__file__).parent / "README.md").read_text()
SECTIONS = re.split(r"(?m)^(?=# ─)", Path(MOCO).read_text())
QUICK = "--preset tiny --width 0.125 --batch-size 8 --knn-k 5 --device cpu --precision fp32 --workers 1".split()
UNUSUAL = """--preset=tiny --moco-dim=16 --moco-k=32 --moco-m=0.9 --moco-t=0.2 --symmetric --seed=7
--arch=resnet10 --stem=imagenet --width=0.125 --no-mlp --bn-splits=2 --aug=v1 --size=40 --batch-size=8 --data=shapes
--epochs=2 --lr=0.01 --wd=0 --no-cos --schedule=1 --precision=fp32 --knn-every=1 --knn-k=3 --knn-t=0.5 --head --root=/
--json --resume --save-seconds=0 --device=cpu"""


@pytest.fixture(scope="module")
def unusual(tmp_path_factory, small_sets):
    """Return a checkpoint that differs from the defaults in every option, as if it came from another machine."""
    path = str(tmp_path_factory.mktemp("unusual") / "c.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moco, "shapes", lambda train: small_sets[train])
        moco.main(["train", f"--out={path}", *UNUSUAL.split()])
    checkpoint = torch.load(path)
    config = checkpoint["config"]
    config |= dict(out="/", workers=10**6, device="mps", compile=True)
    defaults = [name for name in moco.HINTS if config[name] == getattr(Config, name)]
    assert defaults == ["method"]  # the only one that can be symmetric
    return checkpoint


def tiles(path, size):
    """Cut a picture into its images (rows, columns, 3, size, size)."""
    picture = tvf.pil_to_tensor(default_loader(path))[:, 2:, 2:].double()
    return picture.unfold(1, size, size + 2).unfold(2, size, size + 2).movedim(0, 2)


def draw_gray(folder, levels, growth, offset=0):
    """Write an image for each gray level, each wider than the one before."""
    folder.mkdir(parents=True)
    for i, level in enumerate(levels):
        PIL.Image.new("RGB", (30 + growth * i, 30), (level,) * 3).save(folder / f"{abs(offset - level)}.png")


class TestPictures:
    @pytest.mark.parametrize("size, growth", [(40, 0), (112, 1)], ids=["in memory", "files"])
    def test_views_draws_images_and_after_a_gap_each_their_pairs_of_views(self, run, tmp_path, size, growth):
        levels = [4, 12, 36, 100, 240]
        draw_gray(tmp_path / "gray", levels, growth)
        assert run("views", "x.png", "--preset=v1", "--data=gray", f"--size={size}")[0] == 0
        image, *others = tiles("x.png", size).mean((2, 3, 4)).T
        assert sorted(image.tolist()) == levels
        gap, *views = torch.stack(others).unflatten(0, (4, 3)).unbind(1)
        assert (gap == 255).all()
        brightness = torch.stack(views) / image  # 0.6 to 1.4, so no view may be of another image
        assert 0.4 < brightness.min() and brightness.max() < 1.6
        assert len(brightness[..., image == 100].unique()) == 8  # each view has its own

    @pytest.mark.parametrize("data, labeled", [("gray", True), ("gray/train", False)])
    def test_neighbors_draws_the_nearest_images_faded_if_of_another_class(self, run, unusual, tmp_path, data, labeled):
        torch.save(unusual, "c.pt")
        levels = list(range(10, 250, 24))
        for split, offset in (("train", 0), ("val", 999)):  # so that equal images have other numbers
            draw_gray(tmp_path / "gray" / split / "dark", levels[:5], 1, offset)
            draw_gray(tmp_path / "gray" / split / "light", levels[5:], 1, offset)
        drawn = []
        for seed in ("", "--seed=7", "--seed=0"):
            assert run(*f"neighbors c.pt x{seed} --data={data} --device=cpu --workers=1 {seed}".split())[0] == 0
            drawn.append(tiles(f"x{seed}", 40).mean((2, 3, 4)).tolist())
        assert drawn[0] == drawn[1] != drawn[2]
        assert sorted(row[0] for row in drawn[0]) == levels
        for query, gap, *neighbors in drawn[0]:
            expected = levels
            if labeled:  # 1/4 of the distance to white is left
                expected = [x if (x < 120) == (query < 120) else 255 - (255 - x) / 4 for x in levels]
            close(sorted(neighbors), sorted(expected), atol=1)
            assert (gap, neighbors[0]) == (255, query)


class TestCommandLine:
    def test_options_that_are_given_win_over_the_presets(self, few, run):
        flags = "--no-mlp --knn-every=0 --wd=0 --no-cos --epochs=3 --schedule=1 --schedule=2"
        given = dict(mlp=False, knn_every=0, wd=0.0, cos=False, epochs=3, schedule=(1, 2))
        assert run("train", *QUICK, *flags.split())[0] == 0
        saved = torch.load("ckpt.pt")
        assert saved["config"].items() >= dict(given, preset="tiny", moco_k=256).items()
        close([row["lr"] for row in saved["rows"]], [0.06, 0.006, 0.0006])

    def test_resume_has_the_options_given_else_the_saved_ones_but_for_how_to_run(self, few, run, unusual):
        torch.save(unusual, "c.pt")
        assert run("train", "--resume", "--out=c.pt", "--device=cpu", "--epochs=3", "--lr=0.5")[0] == 0
        how_to_run = dict(save_seconds=300, root="data", workers=2, compile=False, json=False)
        expected = unusual["config"] | how_to_run | dict(resume=True, out="c.pt", device="cpu", epochs=3, lr=0.5)
        assert torch.load("c.pt")["config"] == expected

    def test_train_says_what_it_found_and_knn_measures_the_same(self, folder, run):
        _, out, _ = run("train", *QUICK, f"--data={folder}", "--epochs=1", "--moco-k=8", "--out=c c.pt")
        first, epoch, last = out.splitlines()
        assert first == f"{folder}: 20 images to train on in train/, 8 to test on in val/; cpu, fp32"
        assert last == "c c.pt: 1 epochs done"
        numbers = r"epoch 1  loss ([\d.]+)  lr 0\.06  (knn .+)  images_per_s [\d.]+  seconds [\d.]+  minutes_left 0"
        loss, top1 = re.fullmatch(numbers, epoch).groups()
        close(float(loss), moco.load_checkpoint("c c.pt")["rows"][0]["loss"], rtol=1e-4)
        assert moco.describe(dict(loss=1.234567, knn=None)) == "loss 1.2346"  # a value that there is not, is not shown
        assert run("knn", "c c.pt", "--device=cpu")[1].startswith(
            f"classifier knn  top1 {top1.removeprefix('knn ')}  checkpoint c c.pt  epoch 1  "
        )

    @pytest.mark.parametrize("k, neighbors, noticed", [(40, 20, False), (41, 20, True), (40, 21, True)])
    def test_a_long_queue_or_many_neighbors_of_few_images_cost_a_notice(self, few, run, k, neighbors, noticed):
        out = run("train", *QUICK, "--epochs=1", f"--moco-k={k}", f"--knn-k={neighbors}")[1]
        assert ("note: --moco-k or --knn-k, if used, is large for 40 images\n" in out) == noticed

    def test_a_batch_of_more_images_than_there_are_names_numbers_that_work(self, few, run):
        command = ["train", *QUICK, "--epochs=1", "--bn-splits=5", "--batch-size"]
        assert run(*command, "45")[2].endswith(": give a multiple of --bn-splits up to the 40 images\n")
        assert run(*command, "40")[0] == 0

    @pytest.mark.parametrize("stored, given", [
        (dict(eval_size=33, optimizer="muon", tensorboard="x"), {}), (dict(eval_size=33), dict(size=48)),
        (dict(eval_size=0), {}), ({}, dict(precision="bf16", size=33, aug="cifar")),
    ])  # fmt: skip
    @pytest.mark.parametrize("command", ["knn", "linear"])
    def test_evaluation_has_the_options_given_else_those_saved(self, few, no_gpu, run, unusual, command, stored, given):
        torch.save({**unusual, "config": unusual["config"] | stored}, "c.pt")
        names = "data size aug precision head" + " knn_k knn_t" * (command == "knn")
        options = {name: unusual["config"][name] for name in names.split()}
        options |= dict(size=stored.get("eval_size") or 40) | given
        config = Config(**options)
        data = moco.load_data(config, CPU)
        autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=config.precision == "bf16")
        top1 = moco.accuracy(moco.load_encoder(unusual, ""), data, config, autocast, command == "linear")
        expected = dict(options, classifier=command, top1=top1, bank=40, queries=20, checkpoint="c.pt", epoch=2)
        expected |= dict(json=True, root="data", workers=2, device="cpu")  # no checkpoint decides these
        flags = [f"{flag(name)}={x}" for name, x in given.items()]
        assert json.loads(run(command, "c.pt", "--json", *flags)[1]) == expected
        assert getattr(moco, command)("c.pt", json=True, **given) == expected

    def test_an_official_checkpoint_is_evaluated_as_v2(self, run, image_folder, monkeypatch):
        monkeypatch.setattr(moco, "pick_device", lambda _: (torch.device("meta"), "bf16", CUDA_BF16))
        weights = MoCo(ResNetEncoder("resnet10", stem="imagenet", width=0.125), K=1).state_dict()
        torch.save({"epoch": 200, "arch": "resnet10", "state_dict": weights}, "c.pt")
        encoder, _, config, autocast, _ = moco.load_for_evaluation("c.pt", {"data": str(image_folder)})
        assert (config.aug, config.size, config.precision, autocast) == ("v2", 224, "bf16", CUDA_BF16)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1], ids=repr)
    def test_a_signal_stops_a_run_that_is_not_complete_and_says_how_to_go_on(self, folder, run, monkeypatch, number):
        def take_step(run, *batch, original=moco.Run.take_step):
            original(run, *batch)
            signal.raise_signal(number)

        monkeypatch.setattr(moco.Run, "take_step", take_step)
        before = signal.signal(number, signal.default_int_handler)  # it may be ignored where the tests run
        first, last = [run("train", *QUICK, f"--data={folder}/train", "--epochs=1", "--resume") for _ in range(2)]
        assert (first[0], last[0]) == (128 + number, 0)
        assert "ckpt.pt: stopped after step 1; to go on, give the same command with --resume\n" in first[1]
        monkeypatch.setattr(moco.Run, "train", lambda run, stop: iter(()))  # as when another process got the signal
        assert run("train", *QUICK, f"--data={folder}", "--out=d.pt")[0] == 128 + signal.SIGTERM
        assert signal.signal(number, before) == signal.default_int_handler

    MISTAKES = """train --resume --out c.pt --moco-k 64; train --resume --out c.pt --data flat; neighbors c.pt ckpt.pt;
    train --moco-m 2; train --batch-size 12 --bn-splits 8; train --root . --data cifar10; train --resume --out ckpt.pt;
    train --schedule 120 160; train --batch-size 64; train --data nowhere; linear c.pt --knn-k 3; neighbors c.pt c.pt/x;
    trian; train --device cuda; train --out no/c.pt; knn c.pt --data flat; export c.pt ckpt.pt; knn c.pt --size 99999;
    train --colour; train --data bad; train --out old.pt; train --out device; knn c.pt --knn-k 0; train --epochs 0;
    train --lr nan; train --size 8; views empty; linear ckpt.pt; knn no.pt; views ckpt.pt; knn c.pt --knn-t 0"""

    @pytest.mark.parametrize("arguments", re.split(r";\s+", MISTAKES))
    def test_a_mistake_costs_a_line_or_typers_box_that_names_it_and_status_2_and_writes_nothing(
        self, few, no_gpu, run, checkpoint, image_folder, monkeypatch, arguments
    ):
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "file:///no/such/file")
        for name in ("bad/0.png", "bad/1.png", "empty/x.txt", "ckpt.pt", "old.csv"):
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).write_text("precious")
        os.symlink(image_folder / "train" / "dark", "flat")
        os.mkfifo("device")
        torch.save(checkpoint, "c.pt")
        before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
        command, *options = arguments.split()
        if command == "train" and "--resume" not in options:
            options = [*"--data shapes --batch-size 16 --out new.pt --width 0.125".split(), *options]
        status, out, err = run(command, *options)
        assert (status, out) == (2, "")
        named = [arguments.split()[-1].removesuffix(".pt"), *re.findall(r"--\S+", arguments)[-1:]]
        assert any(re.search(rf"(?<![\w-]){x}(?![\w-])", err.partition("╭")[2] or err) for x in named)
        assert (err.startswith("moco: ") and err.count("\n") == 1) or err.count("╭") == err.count("╰") == 1
        assert before == {path: path.stat().st_mtime_ns for path in Path().rglob("*")}

    @pytest.mark.parametrize("code, line", [
        ("open('no.csv')", "moco: [Errno 2] No such file or directory: 'no.csv'\n"),
        ("os.close(999)", "moco: [Errno 9] Bad file"),
        ("bytes(2**62)", "moco: too little memory"), ("torch.empty(2**60)", "moco: too little memory"),
        ("(x for x in ()).throw(torch.OutOfMemoryError('Tried to allocate 2.00 GiB'))", "moco: too little memory"),
    ])  # fmt: skip
    def test_what_the_system_refuses_costs_a_line_but_a_bug_a_traceback(self, run, monkeypatch, code, line):
        monkeypatch.setattr(moco, "load_data", lambda *_: eval(code))
        status, out, err = run("views", "x.png")
        assert (status, out, err[: len(line)], err.count("\n")) == (2, "", line, 1)
        monkeypatch.setattr(moco, "load_data", lambda *_: torch.ones(2) @ torch.ones(3))
        with pytest.raises(RuntimeError, match="size"):
            run("views", "x.png")

    def test_help_has_every_command_and_option(self, run):
        out = " ".join("".join(run()[1:]).split())
        assert moco.__doc__.splitlines()[0] in out
        for command in moco.app.registered_commands:
            assert f"{command.name} {(command.help or command.callback.__doc__)[:40]}" in out
        helps = [run(command, "--help")[1] for command in ("train", "knn", "linear", "neighbors")]
        assert ["default:" in text for text in helps] == [True, False, False, False]  # those of the checkpoint count
        assert {flag(name) for name in moco.HINTS} <= set(helps[0].split())
        assert not re.search(r"--(data|out|root) .*<=", "".join(helps))  # a path has no upper limit

    def test_processes_that_know_their_ranks_train_together_and_rank_0_prints_and_writes(self, few, tmp_path):
        def work(rank):
            torch.set_num_threads(1)
            os.chdir(tmp_path)
            os.environ.update(WORLD_SIZE="2", RANK=str(rank), MASTER_ADDR="localhost", MASTER_PORT=port)
            with open(f"out{rank}", "w") as sys.stdout:
                moco.main(["train", *QUICK, "--epochs=1"])
            assert not torch.distributed.is_initialized()

        port = str(torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False).port)
        torch.multiprocessing.start_processes(work, nprocs=2, start_method="fork")
        assert [len((tmp_path / name).read_text().splitlines()) for name in ("out0", "out1")] == [4, 0]
        assert sorted(os.listdir(tmp_path)) == ["ckpt.csv", "ckpt.pt", "out0", "out1"]

    def test_a_run_whose_reader_leaves_costs_at_most_a_line(self, image_folder, tmp_path):
        command = [sys.executable, MOCO, "train", *QUICK, f"--data={image_folder}", "--epochs=50"]
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            process.stdout.readline()
            process.stdout.close()
            err = process.stderr.read()
        assert (process.returncode, err) in ((0, b""), (2, b"moco: stdout was closed\n"))


class TestReadme:
    def test_its_python_runs_as_printed(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(moco, "shapes", lambda train, draw=moco.shapes: [x[:200] for x in draw(train)])
        weights = MoCo(ResNetEncoder("resnet50", stem="imagenet"), K=1).state_dict()
        torch.save(dict(epoch=0, arch="resnet50", state_dict=weights), "c.pt")
        assert moco.main(["export", "c.pt", "backbone.pt"]) is None  # a script goes on after it
        scope = {}
        for block in re.findall(r"```python\n(.*?)```", README, re.S):
            exec(block, scope)
        assert math.isfinite(scope["loss"].item()) and "detector" in scope

    @pytest.mark.parametrize("section", range(7))
    def test_each_section_up_to_evaluation_runs_with_those_above_it_and_without_typer(self, section, monkeypatch):
        monkeypatch.setitem(sys.modules, "typer", None)
        parts = [compile("".join(SECTIONS[: section + 1]), "part", "exec")]
        scope = {"__name__": "part"}
        exec(parts[0], scope)
        for part in parts:
            parts += [constant for constant in part.co_consts if hasattr(constant, "co_code")]
            used = {step.argval for step in dis.get_instructions(part) if step.opname == "LOAD_GLOBAL"}
            assert used <= {*scope, *dir(builtins)}

    @pytest.mark.parametrize("first, code", [
        ("info_nce", "info_nce(x, x, x.T, 1), knn_predict(x, x, torch.arange(4), 4, 1, 1), SplitBatchNorm, train_step"),
        ("MoCo", "MoCo(nn.Linear(3, 4), dim=4, K=8)(x, x, torch.Generator()).backward()"),
        ("Augment", "SplitTwoViews(Augment(size=8))(torch.zeros(4, 3, 9, 9).byte(), rng(0))"),
    ])  # fmt: skip
    def test_what_it_says_to_copy_is_enough(self, first, code):
        (text,) = re.findall(rf"^- `{first}`.*?(?=^[-\n])", README, re.M | re.S)
        text = " ".join(text.replace("first section", "Random section").split())  # which is copied as a whole
        copied, *parts = SECTIONS
        for part in parts:
            nodes = ast.parse(part).body
            if f"{part.split()[2]} section" not in text:
                nodes = [node for node in nodes if f"`{getattr(node, 'name', None)}`" in text]
            copied += ast.unparse(nodes) + "\n"
        exec(f"{copied}x = F.normalize(torch.rand(4, 3))\n{code}", {"__name__": "pasted"})

    def test_its_claims_are_proved_by_tests_that_exist(self):
        (table,) = re.findall(r"\| claim \| test \|\n\|[-|]+\|\n((?:\|.*\n)+)", README)
        rows = [re.findall(r"`(\w+)`", row) for row in table.splitlines()]
        assert 10 <= len(rows) <= 16 and all(rows)
        assert set(itertools.chain(*rows)) <= set(re.findall(r"(?:def|class) (\w+)", Path(__file__).read_text()))

    def test_its_table_of_presets_is_that_of_the_file(self, run, monkeypatch):
        configs = []
        monkeypatch.setattr(moco, "Run", lambda config: configs.append(config) or sys.exit())
        shown = dict(re.findall(r"(?m)^\| `(\w+)` \| `(--.*)` \|$", README))
        assert {"cifar10", *shown} == set(moco.PRESETS)
        for preset, flags in shown.items():
            run("train", "--preset", preset)
            run("train", *flags.split())
            given, pasted = configs[-2:]
            assert dataclasses.replace(pasted, preset=preset) == given

    def test_its_commands_and_flags_exist_and_its_test_command_is_that_of_ci(self, run):
        commands = {command.name for command in moco.app.registered_commands}
        assert set(re.findall(r"(?<!-)moco\.py (\w+)", README)) == commands
        known = "".join(run(name, "--help")[1] for name in commands) + "--nproc-per-node --collect-only"
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) <= set(re.findall(r"--[a-z-]+", known))
        *_, last = (Path(__file__).parent / ".ci" / "run").read_text().splitlines()
        assert re.search(r"&& (pytest.*?) +#", README)[1] == last
