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
from functools import partial, partialmethod
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy
import PIL.Image
import pytest
import rich.console
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
from moco import (
    Augment,
    Config,
    InMemory,
    MoCo,
    ResNetEncoder,
    SplitBatchNorm,
    SplitTwoViews,
    UserError,
    info_nce,
    knn_predict,
    rng,
)

CPU = torch.device("cpu")
SHAPES_DIGEST = 39469851
SEEDS = st.integers(0, 2**31)
TEMPERATURES = st.floats(0.05, 2)
MOCO = str(Path(moco.__file__))


def close(actual, expected, atol=1e-5, rtol=1e-5):
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
            torch.set_num_threads(1)  # as in a DataLoader's workers
            for name in ("all_gather", "all_reduce"):
                setattr(torch.distributed, name, contiguous_only(getattr(torch.distributed, name)))
            torch.distributed.init_process_group("gloo", f"file://{place}/group", rank=rank, world_size=size)
            torch.save(function(), f"{place}/{rank}")
            torch.distributed.barrier()  # a rank that leaves early may end the others
            torch.distributed.destroy_process_group()

        torch.multiprocessing.start_processes(work, nprocs=size, start_method="fork")
        return [torch.load(f"{place}/{rank}") for rank in range(size)]


class TestRandomNumbers:
    @given(st.integers(0, 10**6), st.integers(0, 10**6))
    def test_a_generator_is_a_function_of_its_key(self, a, b):
        draw = partial(torch.rand, 8)
        assert torch.equal(draw(generator=rng("x", a)), draw(generator=rng("x", a)))
        assert torch.equal(draw(generator=rng("x", a)), draw(generator=rng("x", b))) == (a == b)
        assert not torch.equal(draw(generator=rng("x", a)), draw(generator=rng("y", a)))

    def test_every_part_of_a_key_counts_and_so_does_its_place(self):
        keys = itertools.product((1, 11, 111), repeat=6)
        assert len({rng("crop", *key).initial_seed() for key in keys}) == 3**6

    def test_generators_do_not_disturb_each_other_or_the_global_one(self):
        expected, state = draws(rng(1), 4), torch.get_rng_state()
        first, _ = rng(1), draws(rng(2), 4)
        assert torch.equal(draws(first, 4), expected) and torch.equal(torch.get_rng_state(), state)

    def test_a_key_has_the_same_generator_on_every_machine(self):
        assert rng("step", 1, 2).initial_seed() == 3900142208

    def test_one_process_is_rank_0_of_1_and_holds_all_rows(self):
        x = torch.rand(3, 2)
        assert (moco.rank(), moco.world_size()) == (0, 1)
        assert torch.equal(moco.local_rows(x), x) and torch.equal(moco.all_gather(x), x)
        assert torch.equal(moco.uniform(rng(0), 3, 2), draws(rng(0), 3, 2))

    def test_ranks_hold_contiguous_rows_of_the_global_batch_and_of_its_random_numbers(self, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "1")  # which counts on one machine only
        rows, numbers = zip(*on_ranks(3, lambda: (moco.local_rows(torch.arange(6)), moco.uniform(rng(0), 2, 5))))
        assert [x.tolist() for x in rows] == [[0, 1], [2, 3], [4, 5]]
        assert torch.equal(torch.cat(numbers), moco.uniform(rng(0), 6, 5))

    def test_all_gather_returns_the_rows_of_all_ranks_in_their_order_with_gradients(self):
        x = torch.rand(6, 3, 4, 4, requires_grad=True).to(memory_format=torch.channels_last)
        results = on_ranks(3, lambda: ((y := moco.all_gather(moco.local_rows(x))).detach(), y.requires_grad))
        assert all(torch.equal(y, x) and with_gradient for y, with_gradient in results)

    @pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.T.contiguous().T, lambda x: x[:1, :1].expand(6, 2)])
    def test_gradients_are_summed_over_ranks_in_a_copy_since_autograd_may_reuse_its_own(self, layout):
        gradient = layout(torch.rand(6, 2))

        def backward():  # called by hand: a forked process has no autograd if its parent used CUDA
            own = layout(gradient * (1 + moco.rank()))
            return moco.AllGather.backward(None, own), torch.equal(own, gradient * (1 + moco.rank()))

        sums, kept = zip(*on_ranks(3, backward))
        close(torch.cat(sums), gradient * (1 + 2 + 3))
        assert all(kept)

    def test_a_second_derivative_through_an_all_gather_is_an_error_and_no_wrong_number(self, monkeypatch):
        monkeypatch.setattr(moco, "world_size", lambda: 2)
        monkeypatch.setattr(moco, "rank", lambda: 0)
        monkeypatch.setattr(torch.distributed, "all_gather", lambda rows, x: [row.copy_(x) for row in rows])
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: None)
        x = torch.rand(3, 2, requires_grad=True)
        (gradient,) = torch.autograd.grad(moco.all_gather(x).pow(3).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def linear_moco(seed=0, **options):
    torch.manual_seed(seed)
    return MoCo(nn.Linear(5, 4), **{"dim": 4, "K": 6, "m": 0.7, "T": 0.2, **options})


def pairs_of_parameters(model):
    return zip(model.encoder_k.parameters(), model.encoder_q.parameters(), strict=True)


class TestMomentum:
    @given(SEEDS, st.floats(0, 1))
    def test_an_update_moves_every_key_parameter_in_place_by_eq_2(self, seed, m):
        torch.manual_seed(seed)
        encoder = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5)).double()
        model = MoCo(encoder, dim=5, K=1, m=m)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        before = [(k.detach(), k.clone(), q.clone()) for k, q in pairs_of_parameters(model)]
        model.momentum_update()
        for (memory, old_k, old_q), (k, q) in zip(before, pairs_of_parameters(model), strict=True):
            assert torch.equal(memory, k) and torch.equal(old_q, q)
            close(k, m * old_k + (1 - m) * old_q, atol=1e-12)

    def test_the_key_encoder_is_the_exponential_moving_average_of_the_query_encoders(self):
        model = linear_moco().double()
        average = start = model.encoder_q.weight.detach().clone()
        sgd = torch.optim.SGD(model.encoder_q.parameters(), lr=0.5)
        for _ in range(8):
            average = 0.7 * average + 0.3 * model.encoder_q.weight.detach()  # as it is before the step
            sgd.zero_grad()
            model(*torch.randn(2, 3, 5, dtype=torch.float64)).backward()
            sgd.step()
            close(model.encoder_k.weight, average, atol=1e-12)
        assert (average - start).abs().max() > 0.05

    def test_batch_norm_statistics_have_no_momentum_but_come_from_the_keys_own_views(self):
        model = MoCo(nn.BatchNorm1d(3), dim=3, K=2, m=0)
        im_q, im_k = torch.randn(9, 3), torch.randn(9, 3) + 5
        for _ in range(2):  # the second update would move them
            model(im_q, im_k)
        close(model.encoder_k.running_mean, (1 - 0.9**2) * im_k.mean(0))
        close(model.encoder_q.running_mean, (1 - 0.9**2) * im_q.mean(0))
        assert model.encoder_k.num_batches_tracked == model.encoder_q.num_batches_tracked == 2


class TestInfoNCE:
    @given(SEEDS, st.integers(1, 6), st.integers(1, 8), st.integers(0, 9), TEMPERATURES)
    def test_the_loss_and_its_gradients_are_those_of_k_plus_1_way_cross_entropy(self, seed, n, dim, K, t):
        q, k, negatives = inputs = unit(n, dim, seed), unit(n, dim, seed + 1), unit(K, dim, seed + 2).T
        list(map(torch.Tensor.requires_grad_, inputs))
        rows = [torch.stack([q[i] @ k[i], *(q[i] @ negatives[:, j] for j in range(K))]) / t for i in range(n)]
        expected = torch.stack([row.exp().sum().log() - row[0] for row in rows]).mean()
        actual = info_nce(q, k, negatives, t)
        close(actual, expected, atol=1e-9)
        gradients = partial(torch.autograd.grad, inputs=inputs, materialize_grads=True, allow_unused=True)
        for ours, theirs in zip(gradients(actual), gradients(expected), strict=True):
            close(ours, theirs, atol=1e-8)

    @pytest.mark.parametrize("K", [0, 1, 4])
    def test_equal_embeddings_give_the_logarithm_of_k_plus_1_and_0_without_negatives(self, K):
        x = unit(1, 8, 0).expand(5, 8)
        close(info_nce(x, x, x[:K].T, 0.07), torch.tensor(math.log(K + 1)))

    @pytest.mark.parametrize("t, K", [(0.005, 9), (0.1, 70_000)])
    def test_the_loss_is_right_at_a_low_temperature_and_for_a_large_queue(self, t, K):
        q, k, negatives = unit(4, 8, 0), unit(4, 8, 1), unit(K, 8, 2).T
        expected = F.cross_entropy(torch.cat([(q * k).sum(1, True), q @ negatives], 1) / t, torch.zeros(4).long())
        close(info_nce(q.float(), k.float(), negatives.float(), t), expected, rtol=1e-4)

    @given(SEEDS, st.integers(1, 5), st.integers(2, 7))
    def test_an_ignored_negative_counts_neither_in_the_loss_nor_in_its_gradients(self, seed, n, K):
        q, k, negatives = unit(n, 4, seed), unit(n, 4, seed + 1), unit(K, 4, seed + 2).T.requires_grad_()
        ignore = torch.rand(n, K, generator=rng(seed)) < 0.5
        ignore[:, 0], ignore[:, 1] = False, True
        loss = info_nce(q, k, negatives, 0.2, ignore)
        each = [info_nce(q[i : i + 1], k[i : i + 1], negatives[:, ~ignore[i]], 0.2) for i in range(n)]
        close(loss, torch.stack(each).mean(), atol=1e-9)
        assert (torch.autograd.grad(loss, negatives)[0][:, 1] == 0).all()

    @given(SEEDS, TEMPERATURES)
    def test_the_loss_is_computed_in_float32_under_autocast(self, seed, t):
        q, k, negatives = unit(4, 16, seed).float(), unit(4, 16, seed + 1).float(), unit(9, 16, seed + 2).float().T
        with torch.autocast("cpu", torch.bfloat16):
            loss, low = info_nce(q, k, negatives, t), info_nce(*(x.bfloat16() for x in (q, k, negatives)), t)
        assert loss.dtype == low.dtype == torch.float32
        assert torch.equal(loss, info_nce(q, k, negatives, t))
        close(loss, info_nce(q.double(), k.double(), negatives.double(), t), atol=1e-5)

    @given(SEEDS, TEMPERATURES)
    def test_bf16_queries_do_not_round_a_float32_queue(self, seed, t):
        q, k = unit(4, 16, seed).bfloat16(), unit(4, 16, seed + 1).bfloat16()
        queue = unit(9, 16, seed + 2).float().T
        close(info_nce(q, k, queue, t), info_nce(q.double(), k.double(), queue.double(), t))

    @pytest.mark.parametrize("q, k", [((4, 8), (1, 8)), ((1, 8), (4, 8)), ((4, 8), (3, 8)), ((4, 8), (8,))])
    def test_queries_and_keys_of_other_shapes_are_a_type_error_and_do_not_broadcast(self, q, k):
        with pytest.raises(TypeError, match=r"q \(.*\) and k \(.*\) must have the same shape"):
            info_nce(torch.ones(q), torch.ones(k), torch.ones(8, 5), 0.1)

    @given(SEEDS, TEMPERATURES)
    def test_bf16_inputs_are_computed_in_float32(self, seed, t):
        q, k, negatives = (unit(n, 16, seed + n).bfloat16() for n in (4, 4, 9))
        close(info_nce(q, k, negatives.T, t), info_nce(q.double(), k.double(), negatives.T.double(), t))


class QueueAgainstDeque(RuleBasedStateMachine):
    """The queue is first in, first out: a deque of K keys, of which `queue_ptr` marks the oldest."""

    @initialize(K=st.integers(1, 9))
    def start(self, K):
        self.model = MoCo(nn.Linear(2, 3), dim=3, K=K)
        self.deque = deque(self.model.queue.T.tolist(), maxlen=K)

    @rule(n=st.integers(0, 20), seed=SEEDS)
    def enqueue(self, n, seed):
        keys = unit(n, 3, seed, torch.float32)
        self.model.dequeue_and_enqueue(keys)
        self.deque.extend(keys.tolist())

    @invariant()
    def equal(self):
        ring, pointer = self.model.queue.T.tolist(), int(self.model.queue_ptr)
        assert ring[pointer:] + ring[:pointer] == list(self.deque)
        assert self.model.queue_ptr.shape == (1,) and self.model.queue_ptr.dtype == torch.int64


TestQueue = QueueAgainstDeque.TestCase


def oracle_nce(q, keys, own, left_out, t):
    """Compute InfoNCE query by query: `own[i]` is the key of query i, `left_out[i]` what it is not compared with."""
    losses = []
    for i in range(len(q)):
        logits = [q[i] @ keys[j] / t for j in range(len(keys)) if j == own[i] or j not in left_out[i]]
        losses.append(torch.stack(logits).exp().sum().log() - q[i] @ keys[own[i]] / t)
    return torch.stack(losses).mean()


class TestMoCo:
    def test_the_queue_starts_as_unit_columns_and_the_key_encoder_as_an_equal_copy(self):
        model = MoCo(nn.Linear(5, 16), dim=16, K=7)
        assert model.queue.shape == (16, 7) and model.queue_ptr.tolist() == [0]
        close(model.queue.norm(dim=0), torch.ones(7))
        assert MoCo(nn.Linear(5, 16), dim=16, K=4000).queue.mean(1).norm() < 0.05  # in all directions
        for k, q in pairs_of_parameters(model):
            assert torch.equal(q, k) and q.data_ptr() != k.data_ptr() and q.requires_grad and not k.requires_grad

    @given(SEEDS, st.integers(1, 15), st.booleans())
    def test_a_forward_pass_is_algorithm_1(self, seed, n, symmetric):
        model = linear_moco(seed, symmetric=symmetric).double()
        nn.init.normal_(model.encoder_q.weight)
        im_q, im_k = torch.randn(2, n, 5, dtype=torch.float64)
        weight, bias, queue = model.encoder_q.weight, model.encoder_q.bias, model.queue.clone()
        key_weight = 0.7 * model.encoder_k.weight + 0.3 * weight.detach()
        expected, new = 0, []
        for a, b in [(im_q, im_k), (im_k, im_q)][: 1 + symmetric]:
            q = F.normalize(F.linear(a, weight, bias), dim=1)
            new.append(F.normalize(F.linear(b, key_weight, bias.detach()), dim=1))
            logits = torch.cat([(q * new[-1]).sum(1, True), q @ queue], 1)
            expected += F.cross_entropy(logits / 0.2, torch.zeros(n).long())
        loss = model(im_q, im_k)
        close(loss, expected, atol=1e-9)
        close(*(torch.autograd.grad(x, weight)[0] for x in (loss, expected)), atol=1e-8)
        new = torch.cat(new)
        close(model.queue[:, (torch.arange(len(new)) % 6)[-6:]], new[-6:].T, atol=1e-9)
        assert int(model.queue_ptr) == len(new) % 6

    @pytest.mark.parametrize("symmetric", [False, True])
    def test_in_eval_mode_the_loss_is_computed_and_nothing_moves(self, symmetric):
        model = MoCo(nn.Sequential(SplitBatchNorm(2, 4), nn.Flatten()), dim=2, K=8, m=0.5, symmetric=symmetric)
        im_q, im_k = torch.randn(2, 8, 2, 1, 1)
        model(im_q, im_k, rng(0))
        nn.init.constant_(model.encoder_q[0].weight, 2)
        model.eval()
        before, expected = copy.deepcopy(model.state_dict()), 0
        for a, b in [(im_q, im_k), (im_k, im_q)][: 1 + symmetric]:
            q, k = moco.embed(model.encoder_q, a), moco.embed(model.encoder_k, b)
            expected += info_nce(q, k, model.queue, model.T)
        close(model(im_q, im_k, rng(1)), expected)
        assert same(model.state_dict(), before)

    def test_embeddings_are_unit_rows_in_float32_under_autocast(self):
        with torch.autocast("cpu", torch.bfloat16):
            z = moco.embed(nn.Linear(5, 4), torch.randn(9, 5))
        assert z.dtype == torch.float32
        close(z.norm(dim=1), torch.ones(9), atol=1e-6)

    def test_gradients_reach_the_query_encoder_only(self):
        model = linear_moco()
        model(torch.randn(3, 5), im_k := torch.randn(3, 5, requires_grad=True)).backward()
        assert im_k.grad is None  # the keys are constants
        assert all(p.grad.abs().sum() > 0 for p in model.encoder_q.parameters())
        assert all(p.grad is None for p in model.encoder_k.parameters())
        model.dequeue_and_enqueue(unit(3, 4, 0, torch.float32).requires_grad_())
        assert not model.queue.requires_grad

    @pytest.mark.parametrize("symmetric", [False, True])
    def test_keys_of_both_directions_are_normalized_in_a_random_order_and_restored(self, symmetric):
        encoder, (im_q, im_k) = nn.Sequential(SplitBatchNorm(2, 4), nn.Flatten()), torch.randn(2, 8, 2, 1, 1)
        model, generator, expected = MoCo(encoder, dim=2, K=32, symmetric=symmetric), rng(5), 0
        queue, new = model.queue.clone(), []
        for a, b in [(im_q, im_k), (im_k, im_q)][: 1 + symmetric]:
            order = torch.randperm(8, generator=generator)
            q, shuffled = (F.normalize(copy.deepcopy(encoder)(x), dim=1) for x in (a, b[order]))
            new.append(shuffled[order.argsort()])
            expected += info_nce(q, new[-1], queue, 0.1)
        close(model(im_q, im_k, rng(5)), expected)
        close(model.queue[:, : 8 * len(new)], torch.cat(new).T)

    def test_several_processes_do_not_shuffle_without_a_generator(self):
        def refuse():
            with pytest.raises(ValueError, match="need a generator"):
                moco.embed_shuffled(nn.Flatten(), torch.rand(2, 3), None)

        on_ranks(2, refuse)


def two_views(seed, n):
    torch.manual_seed(seed)
    return nn.Linear(5, 4).double(), *torch.randn(2, n, 5, dtype=torch.float64)


MECHANISMS = {  # of an encoder with 4 dimensions, for 9 images
    "moco": partial(MoCo, dim=4, K=5),
    "symmetric": partial(MoCo, dim=4, K=20, symmetric=True),
    "end-to-end": moco.EndToEnd,
    "memory-bank": partial(moco.MemoryBank, num_images=9, dim=4, K=5),
    "simclr": moco.SimCLR,
}


class TestMechanisms:
    @given(SEEDS, st.integers(1, 4), TEMPERATURES)
    def test_end_to_end_contrasts_with_the_other_shuffled_keys_of_the_batch_with_gradients_into_both(self, seed, n, t):
        torch.manual_seed(seed)
        encoder = nn.Sequential(SplitBatchNorm(2, n), nn.Flatten(), nn.Linear(8, 4)).double()
        im_q, im_k = torch.randn(2, 2 * n, 2, 2, 2, dtype=torch.float64)
        order = torch.randperm(2 * n, generator=rng(seed))
        q, shuffled = (F.normalize(encoder(x), dim=1) for x in (im_q, im_k[order]))
        expected = oracle_nce(q, shuffled[order.argsort()], range(2 * n), [()] * 2 * n, t)
        actual = moco.EndToEnd(encoder, t)(im_q, im_k, rng(seed))
        close(actual, expected, atol=1e-9)
        close(*(torch.autograd.grad(x, encoder[2].weight)[0] for x in (actual, expected)), atol=1e-8)

    @given(SEEDS, st.integers(1, 6), st.integers(1, 20), st.floats(0, 1))
    def test_the_memory_bank_contrasts_with_drawn_rows_and_moves_its_own(self, seed, n, K, m):
        encoder, im_q, im_k = two_views(seed, n)
        model = moco.MemoryBank(encoder, num_images=9, dim=4, K=K, m=m, T=0.3).double()
        indices, bank = torch.randperm(9, generator=rng(seed))[:n], model.bank.clone()
        drawn = torch.randint(9, (K,), generator=rng(seed, 1)).tolist()
        q, each = F.normalize(encoder(im_q), dim=1), []
        for query, own in zip(q, indices.tolist(), strict=True):
            keys = torch.stack([bank[own], *(bank[j] for j in drawn if j != own)])
            each.append(oracle_nce(query[None], keys, [0], [()], 0.3))
        actual, expected = model(im_q, im_k, rng(seed, 1), indices), torch.stack(each).mean()
        close(actual, expected, atol=1e-8)
        close(*(torch.autograd.grad(x, encoder.weight)[0] for x in (actual, expected)), atol=1e-7)
        for query, own in zip(q.detach(), indices.tolist(), strict=True):
            row = m * bank[own] + (1 - m) * query
            bank[own] = row / row.norm()
        close(model.bank, bank, atol=1e-8)

    def test_the_memory_bank_starts_as_unit_rows_in_all_directions(self):
        bank = moco.MemoryBank(nn.Linear(5, 16), num_images=4000, dim=16).bank
        close(bank.norm(dim=1), torch.ones(4000))
        assert bank.mean(0).norm() < 0.05 and not bank.requires_grad

    def test_the_memory_bank_sees_one_view_and_stays_in_eval_mode(self):
        encoder, im_q, im_k = two_views(0, 3)
        model = moco.MemoryBank(encoder, num_images=9, dim=4, K=5).double().eval()
        bank = model.bank.clone()
        losses = [model(im_q, x, rng(1), torch.arange(3)) for x in (im_k, im_k * math.nan)]
        assert torch.equal(model.bank, bank) and torch.equal(*losses)
        assert torch.equal(model.train()(im_q, im_k, rng(1), torch.arange(3)), losses[0])
        assert not torch.equal(model.bank, bank)

    @given(SEEDS, st.integers(1, 6), TEMPERATURES)
    def test_simclr_is_nt_xent_over_both_views(self, seed, n, t):
        encoder, im_q, im_k = two_views(seed, n)
        z = F.normalize(encoder(torch.cat([im_q, im_k])), dim=1)
        own = [(i + n) % (2 * n) for i in range(2 * n)]
        actual, expected = moco.SimCLR(encoder, t)(im_q, im_k), oracle_nce(z, z, own, [(i,) for i in range(2 * n)], t)
        close(actual, expected, atol=1e-9)
        if n > 1:
            close(*(torch.autograd.grad(x, encoder.weight)[0] for x in (actual, expected)), atol=1e-8)

    @pytest.mark.parametrize("name", MECHANISMS)
    def test_an_encoder_in_float64_goes_with_buffers_in_float32(self, name):
        model, x = MECHANISMS[name](nn.Linear(4, 4).double()), torch.rand(2, 4, 4, dtype=torch.float64)
        model(*x, rng(0), torch.arange(4)).backward()
        assert model.encoder_q.weight.grad.isfinite().all() and model.encoder_q.weight.grad.dtype == torch.float64
        assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in model.buffers())

    @pytest.mark.parametrize("name", ["moco", "symmetric", "memory-bank"])
    @pytest.mark.parametrize("width", [1, 6])
    def test_an_encoder_whose_width_is_not_dim_is_refused_with_both_numbers(self, name, width):
        model, x = MECHANISMS[name](nn.Linear(5, width)), torch.rand(2, 3, 5)
        buffers = [buffer.clone() for buffer in model.buffers()]
        with pytest.raises(ValueError, match=rf"\b{width} dimensions.*\b4\b"):
            model(*x, rng(0), torch.arange(3))
        assert same(list(model.buffers()), buffers)

    @pytest.mark.parametrize("name", MECHANISMS)
    def test_ranks_with_plain_batch_norm_compute_what_one_process_does_with_as_many_splits(self, name):
        views = torch.randn(2, 8, 2, 2, 2, dtype=torch.float64)
        indices = torch.tensor([8, 3, 1, 0, 4, 5, 7, 2])

        def step():
            torch.manual_seed(1)
            norm = SplitBatchNorm(2, 2 // moco.world_size())
            model = MECHANISMS[name](nn.Sequential(norm, nn.Flatten(), nn.Linear(8, 4))).double()
            loss = model(*map(moco.local_rows, views), rng(0), moco.local_rows(indices))
            return loss.detach(), {key: x for key, x in model.named_buffers() if "encoder" not in key}

        losses, buffers = zip(*on_ranks(2, step))
        loss, expected = step()
        close(sum(losses) / 2, loss, atol=1e-10)
        for name, other in itertools.product(expected, buffers):
            close(other[name], expected[name], atol=1e-10)

    @pytest.mark.parametrize("method", ["moco", "end-to-end", "memory-bank", "simclr"])
    def test_every_mechanism_trains_saves_and_is_evaluated(self, few, run, method):
        options = "--preset tiny --width 0.125 --batch-size 8 --epochs 1 --knn-k 5 --device cpu --method"
        assert run("train", *options.split(), method)[0] == 0
        names = {name.split(".")[1] for name in moco.load_checkpoint("ckpt.pt")["state_dict"]}
        extra = {"moco": {"encoder_k", "queue", "queue_ptr"}, "memory-bank": {"bank"}}
        assert names == {"encoder_q"} | extra.get(method, set())
        assert run("knn", "ckpt.pt")[0] == 0


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
        ours = SplitBatchNorm(channels, splits, affine=affine, momentum=0.3, eps=0.1).double()
        for p in ours.parameters():
            nn.init.normal_(p)
        plain = [copy_of(ours) for _ in range(splits)]
        expected = torch.cat([bn(group) for bn, group in zip(plain, x.split(size), strict=True)])
        actual, weight = ours(x), torch.randn_like(expected)
        close(actual, expected, atol=1e-10, rtol=0)
        close(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (actual, expected)), atol=1e-9)

    @pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
    @pytest.mark.parametrize("splits", [1, 2, 5])
    def test_the_running_statistics_move_once_by_the_mean_of_the_groups(self, splits, momentum):
        ours = SplitBatchNorm(3, splits, momentum=momentum).double()
        mean, var = torch.zeros(3).double(), torch.ones(3).double()
        f = momentum
        for step, batch in enumerate(torch.randn(3, 10, 3, 2, 2, dtype=torch.float64), 1):
            ours(batch)
            groups = [g.transpose(0, 1).flatten(1) for g in batch.chunk(splits)]
            mean = (1 - f) * mean + f * torch.stack([g.mean(1) for g in groups]).mean(0)
            var = (1 - f) * var + f * torch.stack([g.var(1) for g in groups]).mean(0)
            close([ours.running_mean, ours.running_var], [mean, var], atol=1e-12)
            assert ours.num_batches_tracked == step

    def test_in_eval_mode_split_batch_norm_is_batch_norm(self):
        ours, x = SplitBatchNorm(3, 4), torch.randn(8, 3, 2, 2)
        ours(x)
        before = copy.deepcopy(ours.eval().state_dict())
        assert torch.equal(ours(x[:3]), copy_of(ours).eval()(x[:3])) and same(ours.state_dict(), before)

    def test_a_batch_that_cannot_be_split_evenly_is_a_value_error(self):
        with pytest.raises(ValueError, match=r"batch of 7 .*\b2\b"):
            SplitBatchNorm(3, 2)(torch.randn(7, 3, 2, 2))

    def test_split_batch_norm_has_the_names_of_batch_norm(self):
        assert list(SplitBatchNorm(3).state_dict()) == list(nn.BatchNorm2d(3).state_dict())

    def test_split_batch_norm_keeps_channels_last(self):
        x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
        assert SplitBatchNorm(3, 2)(x).is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("arch, stem, size", [
        ("resnet18", "cifar", 16), *((arch, "imagenet", 64) for arch in moco.ARCHS),
    ])  # fmt: skip
    def test_it_is_torchvisions_resnet_but_for_a_cifar_stem_of_one_3x3_convolution(self, arch, stem, size):
        build = {  # one that torchvision has no name for
            "resnet10": partial(ResNet, BasicBlock, [1, 1, 1, 1]),
        }.get(arch, partial(torchvision.models.get_model, arch))
        theirs, ours = build(num_classes=7), ResNetEncoder(arch, dim=7, mlp=False, bn_splits=1, stem=stem).double()
        if stem == "cifar":
            theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        ours.load_state_dict(theirs.double().state_dict(), strict=True)
        for training in (True, False):  # the first moves the running statistics that the second uses
            x = torch.randn(2, 3, size, size, dtype=torch.float64)
            expected = theirs.train(training)(x)
            close(ours.train(training)(x), expected, atol=1e-9)
            assert expected.std(0).min() > 1e-4

    @pytest.mark.parametrize("mlp, layers", [(True, ["fc.0", "fc.2"]), (False, ["fc"])])
    def test_the_head_is_linear_or_has_two_layers_with_a_relu_under_the_official_names(self, mlp, layers):
        encoder, x = ResNetEncoder("resnet10", dim=9, mlp=mlp, width=0.125, bn_splits=2), torch.rand(4, 3, 8, 8)
        head = {name: x for name, x in encoder.state_dict().items() if name.startswith("fc.")}
        assert list(head) == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
        weight, bias, *last = head.values()
        hidden = F.linear(encoder.features(x), weight, bias)
        assert hidden.shape[1] == (64 if mlp else 9)
        close(encoder(x), F.linear(hidden.clamp(min=0), *last) if mlp else hidden)

    def test_convolutions_start_from_hes_normal_distribution_of_their_fan_out(self):
        for conv in (m for m in ResNetEncoder().modules() if isinstance(m, nn.Conv2d)):
            std = math.sqrt(2 / (conv.out_channels * conv.kernel_size[0] ** 2))
            assert abs(conv.weight.std() / std - 1) < 0.1 and conv.bias is None
            assert abs((conv.weight.abs() > 2 * std).float().mean() - 0.0455) < 0.02

    def test_the_layers_of_the_head_start_as_torchs_linear_layers_do(self):
        for layer in ResNetEncoder().fc[::2]:
            close(layer.weight.abs().max(), torch.tensor(512**-0.5), rtol=1e-3)
            close(layer.weight.std(), torch.tensor((3 * 512) ** -0.5), rtol=0.02)

    def test_width_multiplies_all_channels_and_the_fraction_is_cut_off(self):
        encoders = [ResNetEncoder("resnet10", width=width) for width in (0.125, 0.3, 0.7, 1.5)]
        assert [(e.conv1.out_channels, e.feature_dim) for e in encoders] == [(8, 64), (19, 152), (44, 352), (96, 768)]

    def test_every_batch_norm_of_the_encoder_is_split_and_starts_as_torchs_own(self):
        encoder, default = ResNetEncoder("resnet50", width=0.125, bn_splits=3), nn.BatchNorm2d(1)
        norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == 53 and all(isinstance(m, SplitBatchNorm) and m.num_splits == 3 for m in norms)
        assert all((m.eps, m.momentum) == (default.eps, default.momentum) for m in norms)
        assert all((m.weight == 1).all() and (m.bias == 0).all() for m in norms)


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


def flipped(x, generator):
    return tvf.horizontal_flip(x)


def gray(x, generator):
    return tvf.rgb_to_grayscale(x, 3)


STRENGTH = st.floats(0, 1)
ALMOST_1 = 1 - 2**-24  # the largest number that torch.rand draws
CIFAR = T.Normalize([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
IMAGENET = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
JITTER = jittered, 0.4, 0.4, 0.4, 0.1
AUTHORS = {  # the authors' code: smallest crop, normalization, and transforms with their probabilities
    "cifar": (0.08, CIFAR, (0.5, flipped), (0.8, *JITTER), (0.2, gray)),
    "v1": (0.2, IMAGENET, (0.2, gray), (1, jittered, 0.4, 0.4, 0.4, 0.4), (0.5, flipped)),
    "v2": (0.2, IMAGENET, (0.8, *JITTER), (0.2, gray), (0.5, blurred, 0.1, 2), (0.5, flipped)),
}


def boxes_of(generator, n, height, width, scale):
    return moco.crop_boxes(draws(generator, n, 4, 10), height, width, scale)


def torchvisions_box(height, width, scale):
    box = T.RandomResizedCrop(8, scale=scale).make_params([torch.empty(3, height, width)])
    return [box[x] for x in ("top", "left", "height", "width")]


def augment_of(*transforms, scale=(1, 1), size=24):
    """Return an Augment of a recipe with these transforms, which does not normalize."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(moco.RECIPES, "own", moco.Recipe(scale, transforms, mean=(0, 0, 0), std=(1, 1, 1)))
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
    @given(seed=SEEDS, height=st.integers(1, 40), width=st.integers(1, 40), size=st.integers(1, 40))
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
        for a, b in zip(ours.T.double(), theirs.T.double(), strict=True):
            assert kolmogorov_smirnov(a, b) < 1.95 * math.sqrt(2 / n)  # false alarm: 1 in 1000 each, seeds are fixed

    def test_a_crops_position_area_and_aspect_ratio_are_independent(self):
        top, left, h, w = boxes_of(rng(1), 4000, 200, 200, (0.08, 0.5)).T.double()
        assert uncorrelated(torch.stack([top / (200 - h), left / (200 - w), h * w, (h / w).log()]))

    @pytest.mark.parametrize("u, size, area, box", [
        ((0, 0.5, 0.5), (4, 1), 0.5, [1, 0, 2, 1]),
        ((1, 0.5, 0.5), (1, 4), 0.5, [0, 1, 1, 2]),
        ((0.5, 0.5, 0.5), (4, 4), 1, [0, 0, 4, 4]),
        ((0.5, ALMOST_1, ALMOST_1), (30, 20), 1 / 6, [20, 10, 10, 10]),
    ])  # fmt: skip
    def test_a_crop_can_be_one_pixel_wide_or_high_or_the_full_image_and_lie_at_every_edge(self, u, size, area, box):
        u = torch.tensor([0.5, *u])[:, None].expand(1, 4, 10)
        assert moco.crop_boxes(u, *size, (area, area)).tolist() == [box]

    @pytest.mark.parametrize("size", [(11, 100), (100, 11), (10, 43), (43, 10)])
    def test_where_no_try_fits_the_crop_is_torchvisions_center_at_the_nearest_aspect_ratio(self, size):
        expected = torchvisions_box(*size, (1, 1))
        assert boxes_of(rng(0), 20, *size, (1, 1)).tolist() == 20 * [expected]

    @given(SEEDS, st.tuples(STRENGTH, STRENGTH, STRENGTH, st.floats(0, 0.5)), st.integers(2, 255))
    def test_color_jitter_applies_the_four_operations_in_the_drawn_order(self, seed, strengths, levels):
        # Of few levels, channels are equal and pixels gray.
        x = torch.randint(0, levels, (3, 3, 5, 4), generator=rng(seed)) / (levels - 1)
        expected = jittered(x, rng(seed), *strengths)
        close(moco.color_jitter(x, rng(seed), *strengths), expected, atol=1e-4)

    @pytest.mark.parametrize("low, high", [(0.1, 2), (0.7, 0.7), (6, 60)])  # 60 weights the kernel's ends, too
    @pytest.mark.parametrize("size", [5, 19, 20, 39, 40, 112])
    def test_a_blur_is_torchvisions_with_a_kernel_of_a_tenth_of_the_side(self, size, low, high):
        x = draws(rng(size), 3, 3, size, size)
        close(moco.gaussian_blur(x, rng(1), low, high), blurred(x, rng(1), low, high))

    @pytest.mark.parametrize("aug", AUTHORS)
    def test_views_are_made_as_in_the_authors_code_by_torchvisions_operations(self, aug):
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

    def test_transforms_are_chosen_independently_applied_in_order_and_change_nothing_else(self):
        def append(digit):
            return lambda x, generator: 10 * x + digit

        recipe = [(0.2, append(1)), (0.5, append(2)), (0.8, append(3))]
        numbers = augment_of(*recipe).augment_crops(torch.zeros(4000, 3, 1, 1), rng(0))[:, 0, 0, 0]
        expected = {0: 0.08, 1: 0.02, 2: 0.08, 3: 0.32, 12: 0.02, 13: 0.08, 23: 0.32, 123: 0.08}
        values, counts = numbers.unique(return_counts=True)
        assert values.tolist() == sorted(expected)
        wanted = 4000 * torch.tensor([expected[x] for x in values.tolist()])
        assert ((counts - wanted) ** 2 / wanted).sum() < 24.3  # chi-squared of 7: false alarm 1 in 1000

    @pytest.mark.parametrize("of_files", [False, True])
    @pytest.mark.parametrize("augment", [
        augment_of(scale=(0.1, 0.4)),
        augment_of((0.5, moco.flip)),
        augment_of((0.5, moco.grayscale)),
        augment_of((1, partial(moco.color_jitter, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4))),
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
        split_two_views = SplitTwoViews(Augment("v2", 16))
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
        images_of(8).unflatten(0, (2, 4)), images_of(8).unflatten(0, (4, 2)),
    ], ids=["floats", "an image", "grays", "two batches", "pairs"])  # fmt: skip
    def test_images_that_are_not_a_batch_of_bytes_in_rgb_are_a_type_error(self, images):
        with pytest.raises(TypeError, match=r"uint8 \(N,3,H,W\), not torch"):
            SplitTwoViews(Augment())(images, rng(0))

    @pytest.mark.parametrize("aug", ["v1", "v2"])
    def test_v1_and_v2_evaluate_images_as_torchvisions_imagenet_models_do(self, aug):
        augment = Augment(aug, 224)
        images = images_of(2, 300, 400)
        theirs = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms()
        close(augment.normalize(augment.evaluation_view(images) / 255), theirs(images), atol=0.02)  # one gray level

    def test_cifar_evaluates_an_image_of_its_size_as_it_is(self):
        assert torch.equal(Augment("cifar", 32).evaluation_view(images_of(2)), images_of(2))

    @pytest.mark.parametrize("aug", moco.RECIPES)
    @given(SEEDS, st.integers(30, 60), st.integers(30, 60), st.integers(2, 60))
    def test_evaluation_is_torchvisions_resize_and_center_crop(self, aug, seed, height, width, size):
        images = images_of(2, height, width, seed)
        augment = Augment(aug, size)
        resized = tvf.resize(images, [round(size * augment.recipe.margin)])
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
            logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue], 1) / 0.2
            expected = F.cross_entropy(logits, torch.zeros(3, dtype=torch.long))
            (gradient,) = torch.autograd.grad(expected, theta_q)
            theta_q = theta_q.detach() - 0.1 * gradient
            queue = torch.cat([queue[:, 3:], k.T], 1)
            loss = moco.train_step(model, optimizer, lambda images, _: images, (x_q, x_k), rng(seed))
            close(loss, expected.detach(), atol=1e-12)
            close(encoder.weight.detach(), theta_q, atol=1e-12)
            close(model.encoder_k.weight, theta_k, atol=1e-12)

    def test_the_model_gets_two_views_generator_and_indices_and_alone_computes_under_autocast(self):
        images, indices = images_of(2), torch.tensor([5, 3])
        weight = nn.Parameter(torch.ones(()))
        weight.grad = torch.tensor(9.0)  # of an earlier step
        generator = rng(0)
        casts = []

        def split_two_views(*arguments):
            assert arguments == (images, generator)
            casts.append(torch.is_autocast_enabled("cpu"))
            return "x_q", "x_k"

        def model(*arguments):
            assert arguments == ("x_q", "x_k", generator, indices)
            casts.append(torch.is_autocast_enabled("cpu"))
            return 3 * weight

        weight.register_hook(lambda _: casts.append(torch.is_autocast_enabled("cpu")))
        optimizer = torch.optim.SGD([weight], 1.0)
        bf16 = partial(torch.autocast, "cpu", torch.bfloat16)
        loss = moco.train_step(model, optimizer, split_two_views, images, generator, indices, bf16)
        assert casts == [False, True, False]
        assert (loss.item(), loss.requires_grad) == (3, False)
        assert weight.item() == 1 - 3


def slope(linear, x, y, decay=1e-4):
    """Return the largest gradient of cross-entropy + decay/2·‖W‖² at a linear classifier; 0 at the minimum."""
    weight = linear.weight.double().requires_grad_()
    bias = linear.bias.double().requires_grad_()
    loss = F.cross_entropy(x.double() @ weight.T + bias, y) + decay / 2 * (weight**2).sum()
    return max(gradient.abs().max() for gradient in torch.autograd.grad(loss, (weight, bias)))


class TestEvaluation:
    @given(SEEDS, st.integers(1, 12), st.integers(1, 15), st.floats(0.001, 1), st.sampled_from([1e-6, 1, 1e6]))
    def test_knn_is_the_vote_of_the_k_nearest_by_cosine_with_exponential_weights(self, seed, m, k, t, length):
        torch.manual_seed(seed)
        x = torch.randn(3, 4, dtype=torch.float64)
        bank = torch.randn(m, 4, dtype=torch.float64)
        labels = torch.randint(0, 3, (m,))
        expected = []
        for row in x:
            cosine = F.cosine_similarity(row, bank)
            nearest = cosine.argsort(descending=True)[:k]  # all of them if there are fewer than k
            votes = ((cosine[nearest] - cosine.max()) / t).exp() @ F.one_hot(labels[nearest], 3).double()
            expected.append(votes.argmax())
        assert torch.equal(knn_predict(x / length, bank * length, labels, 3, k, t), torch.stack(expected))

    def test_a_feature_vector_of_zeros_is_the_nearest_to_no_query(self):
        bank = torch.tensor([[0.0, 0.0], [0.6, 0.8]])
        assert knn_predict(torch.tensor([[1.0, 0.0]]), bank, torch.tensor([0, 1]), 2, 1, 0.1).item() == 1

    def test_a_query_gets_the_same_label_alone_and_among_many(self):
        x = torch.randn(40, 4)
        bank = torch.randn(2**21, 4)  # so chunks are of 16 queries
        labels = torch.randint(0, 5, (2**21,))
        alone = [knn_predict(row[None], bank, labels, 5, 20, 0.1) for row in x[::13]]
        together = knn_predict(x, bank, labels, 5, 20, 0.1)
        assert torch.equal(together[::13], torch.cat(alone))

    @pytest.mark.parametrize("queries, rows, nbytes", [(1000, 2**18, 2**27), (3, 2**25 + 1, 2**27 + 4)])
    def test_similarities_take_at_most_128_mib_or_one_row(self, queries, rows, nbytes):
        labels = torch.empty(rows, dtype=torch.long, device="meta")
        with LargestTensor() as largest, torch.device("meta"):
            knn_predict(torch.empty(queries, 1), torch.empty(rows, 1), labels, 5, 20, 0.1)
        assert largest.nbytes == nbytes

    def test_knn_does_not_copy_the_bank(self):
        bank = torch.randn(500, 64)
        with LargestTensor() as largest:
            knn_predict(torch.randn(2, 64), bank, torch.arange(500), 500, 5, 0.1)
        assert largest.nbytes < bank.nbytes

    @pytest.mark.parametrize("k, m", [(0, 3), (-1, 3), (1, 0)])
    def test_no_neighbor_to_vote_is_a_value_error(self, k, m):
        with pytest.raises(ValueError, match=f"k = {k} of {m}: at least one"):
            knn_predict(torch.randn(1, 2), torch.randn(m, 2), torch.zeros(m).long(), 1, k, 0.1)

    @pytest.mark.parametrize("scale", [1, 50])
    @pytest.mark.parametrize("decay", [1e-4, 1e-2])
    @pytest.mark.parametrize("classes", [2, 3, 4])
    def test_the_linear_classifier_minimizes_cross_entropy_and_decay(self, classes, decay, scale):
        x = scale * torch.randn(60, 3, dtype=torch.float64)
        y = torch.randint(classes, (60,))
        assert slope(moco.fit_linear(x, y, classes, decay), x, y, decay) < 1e-3 * scale

    def test_the_linear_classifier_converges_on_6000_correlated_features_of_256_dimensions(self):
        x = torch.randn(6000, 256, generator=rng(1)).cumsum(1)
        y = (x @ torch.randn(256, 10, generator=rng(2))).argmax(1)
        x = (x - x.mean(0)) / x.std(0)
        assert slope(moco.fit_linear(x, y, 10), x, y) < 1e-4  # 50 iterations leave 1e-3

    def test_the_linear_classifier_is_a_frozen_layer_that_the_same_features_make_again(self, device):
        x = torch.randn(40, 3, dtype=torch.float64).to(device)
        y = torch.arange(40).to(device) % 2
        one, other = (moco.fit_linear(x, y, 2) for _ in range(2))
        assert same(one.state_dict(), other.state_dict())
        assert one.weight.dtype == torch.float64
        assert not any(x.requires_grad for x in one.parameters())


def loss_of(x):
    q, k = F.normalize(x[:6, :, 0], dim=2).flatten(1).split(3)
    return info_nce(q, k, x[:5, :, 0].flatten(1).T, 0.3)


def labels_for(x):
    return torch.arange(len(x), device=x.device) % 2


def views_of(aug, x):
    return torch.cat(SplitTwoViews(Augment(aug, 16))((255 * x).byte(), rng(0)))


OPERATIONS = {  # of images x (8,3,24,24) in [0,1]
    "loss": loss_of,
    "split batch norm": lambda x: SplitBatchNorm(3, 4).to(x.device)(x),
    "views of cifar": partial(views_of, "cifar"),
    "views of v1": partial(views_of, "v1"),
    "views of v2": partial(views_of, "v2"),
    "kNN": lambda x: knn_predict(x[:3].flatten(1), x.flatten(1), labels_for(x), 2, 4, 0.1),
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


CUDA_BF16 = partial(torch.autocast, "cuda", torch.bfloat16)


@pytest.mark.filterwarnings("ignore:CUDA is not available")  # autocast says so
class TestCuda:
    @pytest.mark.parametrize("name", OPERATIONS)
    def test_an_operation_gives_on_every_device_and_in_channels_last_what_it_gives_on_the_cpu(self, device, name):
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        x = images_of(8, 24, 24) / 255
        here = OPERATIONS[name](x)
        there = OPERATIONS[name](x.to(device, memory_format=torch.channels_last))
        assert there.device.type == device
        close(there.cpu(), here, atol=1e-3, rtol=1e-3)

    @pytest.mark.parametrize("method", moco.METHODS)
    def test_a_step_on_every_device_and_in_channels_last_is_the_one_on_the_cpu(self, device, method):
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

    @pytest.mark.parametrize("options", [{"symmetric": True}, *({"method": name} for name in moco.METHODS[1:])])
    def test_a_training_step_leaves_no_tensor_on_the_cpu_and_never_waits(self, few, tmp_path, monkeypatch, options):
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
            data = InMemory(fake_bytes(40, 3, 32, 32), None)
            for images, indices in data.batches([(0, torch.arange(8))], run.crop):
                run.take_step(images, indices)
            run.split_two_views = run.split_two_views.from_crops
            run.take_step(fake_bytes(2, 8, 3, 32, 32), indices)
        state = [x["momentum_buffer"] for x in run.optimizer.state.values()]
        assert {x.device.type for x in (images, run.losses, *run.model.buffers(), *state)} == {"cuda"}
        assert run.losses.dtype == torch.float32
        assert watch.reads == 0

    @pytest.mark.parametrize("of_files", [False, True])
    def test_evaluation_and_pictures_leave_no_tensor_on_the_cpu(self, image_folder, monkeypatch, of_files):
        config = tiny_config(data=str(image_folder), workers=0, knn_k=3)
        data = moco.load_data(config, CPU)
        encoder = ResNetEncoder("resnet10", dim=4, width=0.125)
        loaded = encoder, data, config, CUDA_BF16, 0
        monkeypatch.setattr(moco, "load_for_evaluation", lambda *_: loaded)
        pictures = []
        monkeypatch.setattr(moco, "write_picture", lambda path, columns: pictures.extend(columns))
        with fake_cuda(may_wait=True) as watch:
            encoder.to_empty(device="cuda")
            data.train.device = torch.device("cuda")
            data.test.device = torch.device("cuda")
            if not of_files:
                data.train = InMemory(fake_bytes(20, 3, 32, 32), data.train.labels)
                data.test = InMemory(fake_bytes(8, 3, 32, 32), data.test.labels)
            features = moco.extract_features(encoder, data.test, config, CUDA_BF16)
            assert features.device.type == "cuda"
            assert features.dtype == torch.float32
            assert watch.reads == 0
            moco.accuracy(encoder, data, config, CUDA_BF16)
            assert watch.reads == 2  # the number of classes, and of right predictions
            data.test = None
            moco.neighbors("c.pt", "unused.png")
        assert {x.device.type for x in pictures} == {"cpu"}

    def test_a_linear_classifier_is_fitted_where_its_features_are(self):
        features = torch.empty(8, 5, device="meta")
        with Watch():  # the device "meta" computes nothing, but has a backward pass
            classifier = moco.fit_linear(features, torch.zeros(8, dtype=torch.long, device="meta"), 2)
        assert classifier.weight.device.type == "meta"
        assert classifier.bias.device.type == "meta"

    @pytest.mark.parametrize("bad", [
        lambda x: x[torch.tensor([0])], lambda x: x + torch.ones(3), lambda x: torch.ones(3).to(x.device),
        lambda x: torch.ones(3).copy_(x), lambda x: x[x > 0],
    ])  # fmt: skip
    def test_a_tensor_left_behind_and_a_copy_that_waits_and_a_number_that_is_read_are_noticed(self, bad):
        with fake_cuda() as watch:
            x = torch.ones(3, device="cuda")
            with pytest.raises(Exception, match="mixes devices|copy that waits|nonzero"):
                bad(x)
            assert x.sum().item() == 0
            assert watch.reads == 1


# ───────────────────────────────────────────────── Config ─────────────────────────────────────────────────

PUBLISHED = {  # 1911.05722, sections 3.3 and 4; 2003.04297, table 1; authors' CIFAR notebook, but for head and epochs
    "cifar10": "resnet18 cifar cifar 32 batch 512 lr 0.06 wd 0.0005 K 4096 m 0.99 T 0.1 C 128 mlp cos of 100",
    "v1": "resnet50 imagenet v1 224 batch 256 lr 0.03 wd 0.0001 K 65536 m 0.999 T 0.07 C 128 linear (120, 160) of 200",
    "v2": "resnet50 imagenet v2 224 batch 256 lr 0.03 wd 0.0001 K 65536 m 0.999 T 0.2 C 128 mlp cos of 200",
}


class TestConfig:
    @pytest.mark.parametrize("preset", PUBLISHED)
    def test_a_preset_has_the_published_hyperparameters(self, preset):
        c = Config.from_preset(preset)
        head, schedule = "mlp" if c.mlp else "linear", "cos" if c.cos else c.schedule
        shown = f"{c.arch} {c.stem} {c.aug} {c.size} batch {c.batch_size} lr {c.lr} wd {c.wd} K {c.moco_k} m {c.moco_m}"
        assert f"{shown} T {c.moco_t} C {c.moco_dim} {head} {schedule} of {c.epochs}" == PUBLISHED[preset]
        assert (c.method, c.symmetric, c.bn_splits) == ("moco", False, 8)
        assert (c.knn_k, c.knn_t, c.bank_m) == (200, 0.1, 0.5)  # 1805.01978

    @pytest.mark.parametrize("mechanism, m", [(MoCo, "moco_m"), (moco.MemoryBank, "bank_m")])
    def test_a_mechanism_has_the_defaults_of_the_options(self, mechanism, m):
        parameters, names = inspect.signature(mechanism).parameters, ("moco_dim", "moco_k", m, "moco_t")
        assert [parameters[x].default for x in ("dim", "K", "m", "T")] == [getattr(Config, name) for name in names]

    @pytest.mark.parametrize("preset", moco.PRESETS)
    def test_a_preset_is_recorded_and_an_explicit_option_wins_over_it(self, preset):
        explicit = dict(preset=preset, lr=0.5, mlp=False, cos=True, moco_k=7, aug="v2", epochs=3)
        assert dataclasses.asdict(Config.from_preset(**explicit)).items() >= explicit.items()

    @pytest.mark.parametrize("line, option", [
        ("--batch-size 20: must be a multiple of --bn-splits 8", dict(batch_size=20)),
        ("--symmetric: .*--method simclr.*--no-symmetric", dict(method="simclr", symmetric=True)),
        ("--batch-size 8: .*at least twice", dict(batch_size=8)),
        ("--size 32: .*imagenet.* at least 33", dict(stem="imagenet")), ("--size 8: .*at least 9", dict(size=8)),
        ("--lr nan: must be finite", dict(lr=math.nan)), ("--width inf: must be finite", dict(width=math.inf)),
    ])  # fmt: skip
    def test_a_refusal_says_what_must_hold(self, line, option):
        with pytest.raises(UserError, match=f"^{line}"):
            Config(**option)

    def test_options_become_plain_values_so_that_a_checkpoint_can_be_read(self):
        odd = dict(
            lr=numpy.float32(0.5), epochs=numpy.int64(3), cos=numpy.bool_(True), out=Path("x.pt"), schedule=[4, 5]
        )
        plain = Config(**odd, wd=1)
        assert (plain.lr, plain.epochs, plain.cos, plain.out, plain.schedule) == (0.5, 3, True, "x.pt", (4, 5))
        kinds = {name: type(value) for name, value in dataclasses.asdict(plain).items()}
        assert kinds == {name: type(value) for name, value in dataclasses.asdict(Config()).items()}

    def test_the_smallest_sizes_that_work_are_taken(self):
        assert Config(size=9, batch_size=16).size == 9 and Config(size=33, stem="imagenet").size == 33

    def test_the_groups_of_batchnorm_are_split_evenly_among_processes(self, monkeypatch):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
        assert Config(bn_splits=6, batch_size=12).bn_splits == 6
        with pytest.raises(UserError, match="^--bn-splits 8: must be a multiple of .*3 processes"):
            Config(bn_splits=8)


# ────────────────────────────────────────────────── Data ──────────────────────────────────────────────────


def place_images(top, files):
    """Write images to "folder/name"s, in a string, numbered by their first channel; "folder/" stays empty."""
    for i, name in enumerate(files.split()):
        path = top / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            PIL.Image.new("RGB", (12, 10), (i, 0, 0)).save(path)


def load_folder(top, stream=True, workers=0, device=CPU):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moco, "MEMORY", 0 if stream else moco.MEMORY)
        return moco.load_data(tiny_config(data=str(top), workers=workers), device)


def paths_of(split):
    return [os.fsdecode(path) for path in split.paths]


def batch_of(split, indices, crop=lambda image, *_: image, epoch=0):
    ((images, _),) = split.batches([(epoch, torch.tensor(indices))], crop)
    return images


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


class TestData:
    def test_built_in_images_lie_on_the_device(self, few):
        data = moco.load_data(tiny_config(), torch.device("meta"))
        assert {split.images.device.type for split in (data.train, data.test)} == {"meta"}

    def test_6000_shapes_to_train_on_and_2000_others_to_test_on_are_hard_for_knn_on_raw_pixels(self):
        data = moco.load_data(tiny_config(), CPU)
        assert (len(data.train), len(data.test), data.test.labels.max()) == (6000, 2000, 9)
        assert not torch.equal(data.test.images, data.train.images[:2000])
        x, bank = (split.images.flatten(1).float() for split in (data.test, data.train))
        right = knn_predict(x, bank, data.train.labels, 10, 20, 0.1) == data.test.labels
        assert 0.1 < right.float().mean() < 0.4

    @pytest.mark.parametrize("name", ["cifar10", "cifar100"])
    def test_cifar_comes_from_torchvision_as_channels_first_uint8(self, monkeypatch, name):
        class Stub:
            def __init__(self, root, train, download):
                assert (root, download) == ("elsewhere", True)
                self.data = images_of(4).permute(0, 2, 3, 1).numpy()[: 4 if train else 2]
                self.targets = [0, 1, 2, 1][: 4 if train else 2]

        monkeypatch.setattr(torchvision.datasets, name.upper(), Stub)
        data = moco.load_data(Config(data=name, root="elsewhere"), CPU)
        assert torch.equal(data.train.images, images_of(4)) and torch.equal(data.test.images, images_of(4)[:2])
        assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 1, 2, 1], [0, 1])

    @pytest.mark.parametrize("existed", [True, False])
    def test_a_failed_download_names_other_data(self, monkeypatch, tmp_path, existed):
        root = tmp_path if existed else tmp_path / "data"
        monkeypatch.setattr("urllib.request.urlopen", failing(OSError("no network")))
        with pytest.raises(UserError, match=r"^--data cifar10: .*no network.*\); .*--data shapes.*folder[^\n]*\Z"):
            moco.load_data(Config(root=str(root)), CPU)

    @pytest.mark.parametrize("files, train, labels", [
        ("train/a/1 train/b/2 val/a/3 val/b/4", "a/1 b/2", [0, 1]),
        ("Train/a/1 Train/b/2 TEST/b/3 other/a/4", "a/1 b/2", [1]),
        ("train/a/1 train/b/2 val/a/3 valid/b/4 validation/b/5 test/b/6", "a/1 b/2", [0]),
        ("Training/a/1 Training/b/2 Testing/b/5", "a/1 b/2", [1]),
        ("train/a/1 train/b/2 train_old/c/7 testset/b/5", "a/1 b/2", [1]),
        ("train/a/1 train/b/2 val/3 val/images/4", "a/1 b/2", None),
        ("train/a/1 train/b/2 validation/a/3 test/b/4", "a/1 b/2", [0]),
        ("train/a/b/1 train/b/a/c/2 val/b/a/3", "a/b/1 b/a/c/2", [1]),  # a class is a folder in train
        ("train/a/1 train/a/._1 train/.b/2 train/c/3 .train/d/4 val/c/5 val/.b/6 .val/a/7", "a/1 c/3", [1]),
        ("train/a/1 train/b/2 train/aardvark/ val/ test/b/3 test/zebra/", "a/1 b/2", [1]),
        ("train/1 val/a/2", "1", None),
        ("train/a/1 train/b/2 val/3", "a/1 b/2", None),
        ("train/a/1 train/2 other/b/3", "2 a/1", None),
        ("train/a/1 val/b/2", "a/1", None),
        ("1 a/2 b/c/3 val/d/4 .e/5", "1 a/2 b/c/3 val/d/4", None),
    ])  # fmt: skip
    def test_a_folder_has_labels_if_there_are_classes_to_train_and_to_test_on(self, tmp_path, files, train, labels):
        place_images(tmp_path, files)
        data, top = load_folder(tmp_path), tmp_path / files.split("/")[0] if "rain" in files else tmp_path
        assert paths_of(data.train) == [f"{top}/{name}.png" for name in train.split()]
        assert data.description.startswith(f"{len(data.train)} images to train on in {top},")
        no_knn = f"no kNN: that needs classes, {tmp_path}/train/CLASS/* and {tmp_path}/val/CLASS/*"
        assert (no_knn in data.description) == (data.test is None) == (data.train.labels is None) == (labels is None)
        if labels is not None:
            assert data.test.labels.tolist() == labels and data.train.labels.tolist() == [0, 1]
            test = Path(paths_of(data.test)[0]).relative_to(tmp_path).parts[0]
            assert f"{len(labels)} to test on in {tmp_path / test}" in data.description
            folders = {x.name for x in tmp_path.iterdir() if x.name[0] != "."} - {top.name, test}
            assert set(data.description.partition("not read: ")[2].split()) == folders

    @pytest.mark.parametrize("stream", [True, False])
    def test_every_image_has_the_number_of_its_class_in_train(self, tmp_path, stream):
        # By name, b.c/2.png comes before b/0.png, but the class b before b.c.
        place_images(tmp_path, "train/b/0 train/a/1 train/b.c/2 train/b/x/3 train/a/4 val/b/5 val/b.c/6")
        data = load_folder(tmp_path, stream)
        for split, names, labels in ((data.train, [1, 4, 0, 3, 2], [0, 0, 1, 1, 2]), (data.test, [5, 6], [1, 2])):
            images = batch_of(split, list(range(len(split))))
            assert images[:, 0, 0, 0].tolist() == names and split.labels.tolist() == labels
            assert stream or torch.equal(split.images, images)

    def test_links_are_followed_but_to_no_folder_twice(self, tmp_path):
        place_images(tmp_path, "data/train/a/0 elsewhere/1 data/val/b/2 more/3")
        (tmp_path / "data/train/b").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "data/train/a/linked.png").symlink_to(tmp_path / "more" / "3.png")
        for name in ("loop", "other"):
            (tmp_path / "data/train/a" / name).symlink_to(tmp_path / "data/train")
        assert load_folder(tmp_path / "data").train.labels.tolist() == [0, 0, 1]

    @pytest.mark.parametrize("files, words", [
        (None, "no such"), ("a/", "no images"), ("a/.x/1", "no images"),
        ("train/a/1 valid/a/2 validation/a/3", "valid and .*/validation fit equally well"),
        ("train/a/1 val/a/2 val/3", "3.png"), ("train/a/1 val/a/2 train/3", "3.png"),
    ])  # fmt: skip
    def test_a_folder_is_refused_if_missing_empty_or_without_a_class_for_an_image(self, tmp_path, files, words):
        place_images(tmp_path / "set", files or "")
        with pytest.raises(UserError, match=f"^--data {tmp_path / 'set'}: .*{words}"):
            load_folder(tmp_path / "set")

    @pytest.mark.parametrize("name", ["Zürich.JPG", *(f"0{suffix}" for suffix in IMG_EXTENSIONS)])
    def test_a_file_is_decoded_as_torchvisions_image_folder_decodes_it(self, tmp_path, name):
        exif = PIL.Image.Exif()
        exif[0x0112] = 6  # "rotate me", which neither heeds
        image = tvf.to_pil_image(images_of(1, 70, 110)[0])
        image.convert("L" if name.endswith(".pgm") else "RGB").save(path := tmp_path / name, exif=exif)
        expected = tvf.pil_to_tensor(default_loader(path))
        assert torch.equal(batch_of(load_folder(tmp_path).train, [0])[0], expected)

    @pytest.mark.parametrize("mode", PIL.Image.MODES)
    def test_an_image_is_clipped_to_8_bits_in_no_mode_of_pil(self, monkeypatch, mode):
        image, words, expected = PIL.Image.new(mode, (8, 8), 1), "conversion", None
        if len(image.tobytes()) > 64 * len(image.getbands()):
            words = "more than 8 bits per channel"
        else:
            with contextlib.suppress(ValueError):  # PIL cannot convert it
                expected = tvf.pil_to_tensor(image.convert("RGB"))
        monkeypatch.setattr(PIL.Image, "open", lambda path, formats: image.copy())  # no file format has all modes
        with contextlib.nullcontext() if expected is not None else pytest.raises(UserError, match=words):
            assert torch.equal(moco.read_image(b"0.tiff"), expected)

    @pytest.mark.parametrize("workers", [0, 1])
    @pytest.mark.parametrize("content, cause", [
        (b"no image", "cannot identify image file"), (b"P6 10000 10000 255\n", "exceeds limit"),
        ("half", "truncated"), (None, "No such file or directory"), (b"%!PS-Adobe-3.0 EPSF-3.0\n", "cannot identify"),
    ])  # fmt: skip
    def test_a_file_that_cannot_be_read_is_named_with_its_cause(self, folder, workers, content, cause):
        data, bad = load_folder(folder, workers=workers), folder / "train" / "dark" / "0.png"
        bad.write_bytes(bad.read_bytes()[:900] if content == "half" else content or b"")
        if content is None:
            bad.unlink()
        line = rf"\A{bad}: cannot be read \([^/]*{cause}[^/]*\);.*--resume needs the same images[^\n]*\Z"
        with pytest.raises(UserError, match=line):
            batch_of(data.train, list(range(20)), Augment().evaluation_view)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_too_little_memory_to_decode_is_not_blamed_on_the_image(self, folder, monkeypatch, workers):
        data = load_folder(folder, workers=workers)
        monkeypatch.setattr(PIL.Image, "open", failing(MemoryError()))
        with pytest.raises(MemoryError):
            batch_of(data.train, [0, 1])

    @pytest.mark.parametrize("odd", [0, 1, 2])
    def test_images_of_several_sizes_are_read_when_needed(self, tmp_path, odd):
        place_images(tmp_path, "0 1 2")
        PIL.Image.new("RGB", (10, 12)).save(tmp_path / f"{odd}.png")
        assert len(paths_of(load_folder(tmp_path, stream=False).train)) == 3

    @pytest.mark.parametrize("missing", [0, 1])
    def test_images_that_take_up_to_1_gib_are_held_in_memory(self, tmp_path, monkeypatch, missing):
        assert moco.MEMORY == 2**30
        place_images(tmp_path, "0 1")
        monkeypatch.setattr(moco, "MEMORY", 2 * 3 * 10 * 12 - missing)
        assert isinstance(load_folder(tmp_path, stream=False).train, InMemory) == (not missing)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_streamed_batch_has_the_two_crops_of_each_image(self, image_folder, workers):
        data, views = load_folder(image_folder, workers=workers), SplitTwoViews(Augment(size=16), seed=3)
        plan = [(0, torch.tensor([1, 4])), (5, torch.tensor([4, 0, 2])), (6, torch.arange(20))]
        batches = list(data.train.batches(iter(plan), views.crop_file))
        for (epoch, indices), (batch, numbers) in zip(plan, batches, strict=True):
            assert batch.dtype == torch.uint8 and torch.equal(numbers, indices)
            for i, crops in zip(indices.tolist(), batch.transpose(0, 1), strict=True):
                image = tvf.pil_to_tensor(default_loader(paths_of(data.train)[i]))
                boxes = moco.crop_boxes(draws(rng("crop", 3, epoch, i), 2, 4, 10), *image.shape[1:], (0.08, 1))
                expected = [tvf.resized_crop(image, *box, [16, 16], antialias=True) for box in boxes.tolist()]
                assert torch.equal(crops, torch.stack(expected))

    def test_a_batch_in_memory_has_the_images_in_the_order_of_their_indices(self):
        plan = [(0, torch.tensor([3, 1])), (1, torch.tensor([4, 0, 4]))]
        held = InMemory(images_of(5), None)
        crop, make_views = moco.training_crops(held, two_views := SplitTwoViews(Augment(size=16)))
        assert make_views is two_views
        for (_, indices), (images, numbers) in zip(plan, held.batches(plan, crop), strict=True):
            assert torch.equal(images, images_of(5)[indices]) and torch.equal(numbers, indices)

    def test_a_crop_in_memory_gets_the_epoch_and_the_indices(self):
        plan = [(3, torch.tensor([4, 0])), (5, torch.tensor([1]))]
        seen = [x for x, _ in InMemory(images_of(5), None).batches(plan, lambda x, *key: key)]
        assert same(seen, plan)

    def test_a_worker_outlives_the_first_signal_of_each_kind_which_the_run_acts_upon(self, image_folder):
        def signaled(*_):
            for number in moco.SIGNALS:
                os.kill(os.getpid(), number)
            return torch.tensor([signal.getsignal(number) == signal.SIG_DFL for number in moco.SIGNALS]).view(-1, 1, 1)

        assert batch_of(load_folder(image_folder, workers=1).train, [0], signaled).all()

    def test_a_link_to_a_folder_above_leads_to_no_image_of_the_other_split(self, tmp_path):
        place_images(tmp_path, "train/a/0 train/b/1 val/a/2")
        for name in ("here", "above"):
            (tmp_path / "train/a" / name).symlink_to(tmp_path if name == "here" else tmp_path.parent)
        assert paths_of(load_folder(tmp_path).train) == [f"{tmp_path}/train/a/0.png", f"{tmp_path}/train/b/1.png"]

    def test_a_folder_that_cannot_be_read_is_an_error_that_names_it(self, tmp_path, monkeypatch):
        place_images(tmp_path, "train/a/0 train/b/1 val/a/2")

        def scandir(path, scan=os.scandir):
            if str(path).endswith("train/b"):
                raise PermissionError(13, "Permission denied", str(path))
            return scan(path)

        monkeypatch.setattr(os, "scandir", scandir)
        with pytest.raises(PermissionError, match="Permission denied: '.*/train/b'"):
            load_folder(tmp_path)

    def test_a_link_to_nowhere_is_an_error_and_a_named_pipe_is_no_image(self, tmp_path):
        place_images(tmp_path, "0")
        os.mkfifo(tmp_path / "1.png")
        assert len(load_folder(tmp_path).train) == 1
        (tmp_path / "2.png").symlink_to(tmp_path / "gone.png")
        with pytest.raises(FileNotFoundError, match="2.png"):
            load_folder(tmp_path)

    @pytest.mark.parametrize("change, equal", [
        (lambda top: None, True), (lambda top: os.rename(top / "train/b/1.png", top / "train/b/9.png"), False),
        (lambda top: os.rename(top / "val/a/2.png", top / "val/b/2.png"), False),
        (lambda top: place_images(top, "train/a/7"), False), (lambda top: os.remove(top / "train/a/0.png"), False),
    ])  # fmt: skip
    def test_the_fingerprint_is_that_of_the_images_names_wherever_the_folder_lies(self, tmp_path, change, equal):
        for name in "xy":
            place_images(tmp_path / name, "train/a/0 train/b/1 val/a/2 val/b/3 train/a/4")
        before = load_folder(tmp_path / "x").fingerprint
        change(tmp_path / "y")
        assert (load_folder(tmp_path / "y").fingerprint == before) == equal

    def test_the_built_in_images_are_the_same_on_every_machine(self):
        digest = sum(int(x[:50].long().sum()) for x, _ in (moco.shapes(True), moco.shapes(False)))
        assert abs(digest - SHAPES_DIGEST) < 3000  # of 307,200 pixels; another CPU may round a few otherwise

    def test_an_evaluation_stops_between_two_batches(self):
        asked = iter([False, True])
        encoder = Encoder(pixel_sums)
        with pytest.raises(moco.Stopped):
            moco.extract_features(
                encoder,
                InMemory(images_of(1100, 12, 12), None),
                tiny_config(size=12),
                contextlib.nullcontext,
                lambda: next(asked),
            )

    def test_all_images_are_evaluated_512_at_a_time(self):
        sizes = []
        encoder = Encoder(lambda x: sizes.append(len(x)) or pixel_sums(x))
        moco.extract_features(
            encoder, InMemory(images_of(1100, 12, 12), None), tiny_config(size=12), contextlib.nullcontext
        )
        assert sizes == [512, 512, 76]

    def test_a_file_called_train_is_no_split(self, tmp_path):
        place_images(tmp_path, "1 a/2")
        (tmp_path / "train").write_text("a list of files")
        assert paths_of(load_folder(tmp_path).train) == [f"{tmp_path}/1.png", f"{tmp_path}/a/2.png"]

    def test_a_name_that_is_not_utf_8_is_read_or_named(self, tmp_path):
        place_images(tmp_path, "0")
        os.rename(tmp_path / "0.png", path := os.fsencode(tmp_path) + b"/\xff.png")
        assert batch_of(load_folder(tmp_path).train, [0]).shape == (1, 3, 10, 12)
        open(path, "wb").close()
        with pytest.raises(UserError, match="cannot be read"):
            moco.read_image(path)

    @pytest.mark.parametrize("stream", [True, False])
    def test_images_come_onto_the_device(self, tmp_path, stream):
        place_images(tmp_path, "train/a/0 val/a/1")
        data = load_folder(tmp_path, stream, device=torch.device("meta"))
        for split in (data.train, data.test):
            assert batch_of(split, [0], Augment().evaluation_view).device.type == "meta"
            assert stream or split.images.device.type == "meta"


class Encoder(nn.Module):
    """Embed images by a function; the head returns the sine of its first two features."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, x):
        return self.features(x)[:, :2].sin()


def pixel_sums(x):
    """Map images (N,3,12,12) to four features, two of them tiny."""
    return x.flatten(1) @ draws(rng("pixel sums"), 432, 4).sub(0.5) * torch.tensor([1, 1, 1e-3, 1e-3])


def measure(encoder, train, test, linear=False, autocast=contextlib.nullcontext, **options):
    data = moco.Data(InMemory(*train), InMemory(*test), "", "")
    return moco.accuracy(encoder, data, tiny_config(**{"size": 12, **options}), autocast, linear)


class TestFeatures:
    @pytest.mark.parametrize("linear", [False, True])
    def test_a_class_without_a_test_image_counts(self, linear):
        images, labels = images_of(6), torch.tensor([0, 1, 2, 0, 1, 2])
        train, test = (images, labels), (images[:2], labels[:2])
        assert measure(Encoder(pixel_sums), train, test, linear, knn_k=6, knn_t=1e-3) == 100

    @pytest.mark.parametrize("aug, margin", [("cifar", 1), ("v1", 256 / 224), ("v2", 256 / 224)])
    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("options, side", [(dict(size=24), 24), (dict(size=40), 40)])
    def test_an_image_is_resized_center_cropped_and_normalized(self, tmp_path, aug, margin, stream, options, side):
        for i in range(3):
            tvf.to_pil_image(image := images_of(1, 40, 48, seed=i)[0]).save(tmp_path / f"{i}.png")
        split, config = load_folder(tmp_path, stream).train, tiny_config(aug=aug, head=True, **options)
        features = moco.extract_features(nn.Flatten(), split, config, contextlib.nullcontext)
        image = tvf.center_crop(tvf.resize(image, [round(side * margin)]), [side, side])
        close(features[2], tvf.normalize(image / 255, moco.RECIPES[aug].mean, moco.RECIPES[aug].std).flatten())

    def test_features_are_in_the_order_of_the_images_and_float32(self):
        images, encoder = images_of(1100, 9, 9), Encoder(lambda x: x.flatten(1).bfloat16())
        features = moco.extract_features(encoder, InMemory(images, None), tiny_config(size=9), contextlib.nullcontext)
        assert features.dtype == torch.float32
        assert torch.equal(features, Augment(size=9).normalize(images / 255).flatten(1).bfloat16().float())

    @pytest.mark.parametrize("training", [True, False])
    def test_features_are_extracted_in_eval_mode_and_the_mode_is_restored(self, training):
        encoder = ResNetEncoder("resnet10", width=0.125, bn_splits=2).train(training)
        before, splits = copy.deepcopy(encoder.state_dict()), [InMemory(images_of(10)[:n], None) for n in (1, 10)]
        one, all_ = (moco.extract_features(encoder, x, tiny_config(), contextlib.nullcontext) for x in splits)
        close(one[0], all_[0])
        assert encoder.training == training and same(before, encoder.state_dict()) and not one.requires_grad

    @pytest.mark.parametrize("head", [False, True])
    @pytest.mark.parametrize("linear", [False, True])
    @pytest.mark.parametrize("seed", range(4))
    def test_accuracy_is_that_of_the_pipeline_written_by_hand(self, seed, head, linear):
        # A leak must change the answer: labels are random, the splits differ in size, brightness and contrast.
        images = [images_of(37, 24, 20, seed) // 16 + 100, images_of(91, 24, 20, seed + 9)]
        labels = [torch.randint(0, 3, (len(x),), generator=rng(seed, len(x))) for x in images]
        bank, queries = (tvf.center_crop(tvf.resize(x, [14]), [12, 12]) / 255 for x in images)  # 12·256/224
        bank, queries = (tvf.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) for x in (bank, queries))
        encoder = Encoder(pixel_sums)
        bank, queries = (encoder(x) if head else encoder.features(x) for x in (bank, queries))
        if linear:
            mean, std = bank.double().mean(0), bank.double().std(0)
            bank, queries = (((x - mean) / std).float() for x in (bank, queries))
            predicted = moco.fit_linear(bank, labels[0], 3)(queries).argmax(1).tolist()
        else:
            predicted = []
            for query in queries.double():
                cosine = F.cosine_similarity(query, bank.double()).tolist()
                nearest = sorted(zip(cosine, labels[0].tolist(), strict=True), reverse=True)[:9]
                votes = [sum(math.exp(s / 0.02) for s, y in nearest if y == label) for label in range(3)]
                predicted.append(votes.index(max(votes)))
        expected = 100 * sum(p == y for p, y in zip(predicted, labels[1].tolist(), strict=True)) / 91
        options = dict(aug="v2", size=12, head=head, knn_k=9, knn_t=0.02)
        top1 = measure(encoder, *zip(images, labels), linear, **options)
        assert top1 == pytest.approx(expected)

    def test_accuracy_is_the_percentage_of_test_images(self):
        train, test = (images_of(3), torch.tensor([0, 0, 0])), (images_of(8), torch.tensor([0, 0, 1, 0, 0, 0, 0, 1]))
        assert measure(Encoder(pixel_sums), train, test) == 75

    def test_a_feature_without_variance_does_not_spoil_the_linear_classifier(self):
        labels = torch.arange(20) % 2
        images = images_of(20) // 4 + 100 * labels[:, None, None, None].byte()
        encoder = Encoder(lambda x: torch.stack([x.mean((1, 2, 3)), 0 * x[:, 0, 0, 0]], 1))
        assert measure(encoder, (images, labels), (images[:7], labels[:7]), linear=True) == 100

    def test_features_are_computed_under_autocast_and_compared_without_it(self):
        def angles(x):  # on a circle, too near to one another for bf16 to tell apart
            assert torch.is_autocast_enabled("cpu")
            return torch.stack([x[:, 0, 0, 0].cos(), x[:, 0, 0, 0].sin()], 1)

        split = torch.arange(64, dtype=torch.uint8)[:, None, None, None].expand(64, 3, 12, 12), torch.arange(64)
        bf16 = partial(torch.autocast, "cpu", torch.bfloat16)
        assert measure(Encoder(angles), split, split, autocast=bf16, knn_k=1) == 100


# ────────────────────────────────────────────── Checkpoints ───────────────────────────────────────────────


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


def flipped(checkpoint, path):
    """Change the bytes of a tensor: torch compares no checksums."""
    torch.save(checkpoint, path)
    path.write_bytes(path.read_bytes().replace(old := checkpoint["losses"].numpy().tobytes(), old[::-1]))


def compressed(checkpoint, path):
    """Compress the records, which may then inflate to a thousand times the file."""
    torch.save(checkpoint, "stored.pt")
    with zipfile.ZipFile("stored.pt") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


CONV, STEM = "module.encoder_q.layer1.0.conv1.weight", "module.encoder_q.conv1.weight"
BROKEN = {  # how to write the file, or what to change in its content, and words of the refusal
    "empty": (lambda c, path: path.write_bytes(b""), "not a checkpoint (EOFError"),
    "folder": (marked_as_folder, "damaged at"),
    "compressed": (compressed, "damaged at"),
    "flipped": (flipped, "damaged at"),
    "pickle": (lambda c, path: path.write_bytes(pickle.dumps(Code(), 2)), "GLOBAL getattr"),
    "code": (dict(optimizer=Code()), "GLOBAL getattr"),
    "no epoch": (dict(epoch=...), "KeyError: 'epoch'"),
    "weights numbered": (dict(state_dict=lambda s: {5: torch.ones(1)}), "bad.pt"),
    "config": (dict(config=5), "not a checkpoint (TypeError"),
    "nan": (
        dict(state_dict={CONV: lambda x: torch.where(x == x.max(), math.nan, x)}),
        "conv1.weight is not torch.float32",
    ),
    "infinite": (dict(state_dict={CONV: lambda x: x / 0}), "layer1.0.conv1.weight is not torch.float32"),
    "stride 0": (
        dict(state_dict={STEM: torch.ones(1).expand(4096, 3, 3, 3)}),
        "conv1.weight is not torch.float32",
    ),
    "shape": (dict(state_dict={CONV: lambda x: x[:2].clone()}), "layer1.0.conv1.weight"),
    "dtype": (dict(state_dict={CONV: lambda x: x.half()}), "layer1.0.conv1.weight"),
    "strange weight": (dict(state_dict={"module.encoder_q.x": torch.ones(1)}), "missing or unexpected: x"),
    "missing weight": (dict(state_dict={CONV: ...}), "missing or unexpected: layer1.0.conv1.weight"),
    "no encoder": (dict(state_dict=lambda s: {"module.queue": torch.ones(1)}), "encoder_q is not one of resnet10"),
    "arch": (dict(arch="vgg"), "encoder_q is not one of resnet10"),
    "width": (
        dict(state_dict={STEM: lambda x: torch.zeros(384_000, 3, 3, 3)}),
        "is not torch.float32 (384000",
    ),  # with all, 20 TB
    "stem": (dict(state_dict={STEM: torch.ones(3)}), "encoder_q is not one of resnet10"),
}


class TestCheckpoints:
    def test_a_checkpoint_is_plain_values_and_tensors_under_the_official_names(self, checkpoint):
        assert checkpoint.keys() > {"epoch", "step", "arch", "state_dict", "optimizer", "config"}
        assert (checkpoint["epoch"], checkpoint["step"], checkpoint["arch"]) == (2, 10, "resnet18")
        names, prefix = set(checkpoint["state_dict"]), "module.encoder_q."
        resnet = {n for n in torchvision.models.resnet18().state_dict() if not n.startswith("fc.")}
        assert {n.removeprefix(prefix) for n in names if n.startswith(prefix) and ".fc." not in n} == resnet
        assert {"module.queue", "module.queue_ptr", prefix + "fc.0.weight", "module.encoder_k.fc.2.bias"} <= names

    @pytest.mark.parametrize("tag", ["cpu", "cuda:0"])
    def test_what_is_saved_on_any_device_is_loaded_onto_the_cpu(self, tmp_path, monkeypatch, checkpoint, tag):
        monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: tag)
        moco.save_checkpoint(str(tmp_path / "c.pt"), checkpoint)
        assert same(moco.load_checkpoint(str(tmp_path / "c.pt")), checkpoint)

    @pytest.mark.parametrize("change, words", BROKEN.values(), ids=BROKEN)
    @pytest.mark.usefixtures("run")  # in a folder of its own
    def test_a_broken_or_hostile_file_is_refused_in_a_line_and_not_executed(self, checkpoint, change, words):
        if callable(change):
            change(checkpoint, Path("bad.pt"))
        else:
            torch.save(edited(checkpoint, change), "bad.pt")
        with pytest.raises(UserError, match=r"\Abad\.pt: .+\Z") as error:
            moco.load_encoder(moco.load_checkpoint("bad.pt"), "bad.pt")
        assert words in str(error.value) and not Path("executed").exists()

    @given(st.data())
    def test_a_file_with_changed_or_missing_bytes_loads_to_equal_tensors_or_is_refused(self, checkpoint, data):
        kept = {k: checkpoint[k] for k in ("epoch", "arch", "config")}
        kept["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if v.numel() < 999}
        with tempfile.TemporaryDirectory() as folder:
            torch.save(kept, path := Path(folder) / "c.pt")
            content = bytearray(path.read_bytes())
            place = data.draw(st.integers(-len(content), len(content) - 1), label="place, from either end")
            if data.draw(st.booleans(), label="cut"):
                del content[place:]
            else:
                content[place] ^= data.draw(st.integers(1, 255), label="bits")
            path.write_bytes(content)
            try:
                assert same(moco.load_checkpoint(str(path)), kept)
            except UserError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)

    def test_a_checkpoint_with_options_and_a_head_of_another_version_is_evaluated(self, few, checkpoint, tmp_path):
        head = {"module.encoder_q.fc.1.running_mean": torch.zeros(3)}
        options = dict(optimizer="muon", tensorboard="", eval_size=24, mlp_dim=24, knn_k=3)
        changes = dict(config=options, state_dict=head, epoch=torch.tensor(7))
        torch.save(edited(checkpoint, changes), path := tmp_path / "old.pt")
        result = json.loads(json.dumps(moco.knn(str(path), device="cpu")))
        assert (result["queries"], result["knn_k"], result["epoch"], result["size"]) == (20, 3, 7, 24)
        assert moco.knn(str(path), device="cpu", size=32)["size"] == 32

    def test_all_is_on_the_disk_before_the_old_file_is_replaced(self, tmp_path, monkeypatch):
        (path := tmp_path / "m0.9").write_bytes(b"old")
        seen = []  # at each fsync: the bytes written, and what the path holds
        monkeypatch.setattr(os, "fsync", lambda number: seen.append((os.fstat(number).st_size, path.read_bytes())))
        with open(path, "rb") as reader:
            moco.write_file(str(path), b"newer")
            assert reader.read() == b"old"  # a reader keeps the old file
        assert seen == [(5, b"old")] and path.read_bytes() == b"newer" and list(tmp_path.iterdir()) == [path]

    def test_two_writers_of_one_path_do_not_share_a_temporary_file(self, tmp_path, monkeypatch):
        path = str(tmp_path / "c.pt")

        def write_another(number):
            monkeypatch.undo()
            moco.write_file(path, b"second")

        monkeypatch.setattr(os, "fsync", write_another)
        moco.write_file(path, b"the first")
        assert Path(path).read_bytes() == b"the first" and os.listdir(tmp_path) == ["c.pt"]

    def test_a_link_stays_and_its_target_is_replaced(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "target")
        for content in (b"one", b"two"):
            moco.write_file(str(tmp_path / "link"), content)
            assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == content

    @pytest.mark.parametrize("make, kind", [(lambda path: None, FileNotFoundError), (Path.mkdir, IsADirectoryError)])
    def test_a_checkpoint_that_is_no_file_is_the_systems_error(self, tmp_path, make, kind):
        make(tmp_path / "c.pt")
        with pytest.raises(kind):
            moco.load_checkpoint(str(tmp_path / "c.pt"))

    @pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
    def test_a_full_disk_is_a_user_error_and_the_old_checkpoint_is_kept(self, tmp_path, monkeypatch, moment):
        limits = (resource := pytest.importorskip("resource")).getrlimit(resource.RLIMIT_FSIZE)
        path, refusal = tmp_path / "c.pt", r"c\.pt: not written \(.*File too large.* kept$"
        moco.save_checkpoint(str(path), {"step": 1})
        with pytest.raises(UserError, match=refusal), contextlib.ExitStack() as stack:
            stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
            if moment == "write":  # after 10,000 bytes
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
            else:
                monkeypatch.setattr(os, moment, failing(OSError(27, "File too large")))
            moco.save_checkpoint(str(path), {"step": torch.zeros(10_000)})
        assert torch.load(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("arch, mlp", [("resnet50", False), ("resnet18", True)])
    def test_an_official_checkpoint_is_evaluated_from_its_weights_only(self, tmp_path, arch, mlp):
        theirs = getattr(torchvision.models, arch)(num_classes=128)
        if mlp:
            theirs.fc = nn.Sequential(nn.Linear(theirs.fc.in_features, theirs.fc.in_features), nn.ReLU(), theirs.fc)
        names = {f"module.encoder_{x}.{k}": v for x in "qk" for k, v in theirs.state_dict().items()}
        names["module.queue"] = torch.randn(128, 8)
        official = {"epoch": 200, "arch": arch, "state_dict": names, "optimizer": {"state": {}, "param_groups": []}}
        torch.save(official, path := str(tmp_path / "moco.pth.tar"), _use_new_zipfile_serialization=False)
        encoder, x = moco.load_encoder(moco.load_checkpoint(path), path, head=True), torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(encoder(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("prefix", ["module.", "", "_orig_mod.", "module._orig_mod."])
    @pytest.mark.parametrize("inner", [".", "._orig_mod."])
    def test_the_prefixes_of_ddp_and_compile_are_optional(self, checkpoint, prefix, inner):
        weights = checkpoint["state_dict"].items()
        renamed = {prefix + name.removeprefix("module.").replace(".", inner, 1): x for name, x in weights}
        encoder = moco.load_encoder({"arch": "resnet18", "state_dict": renamed}, "c.pt", head=True)
        assert same(dict(encoder.state_dict()), dict(moco.load_encoder(checkpoint, "c.pt", head=True).state_dict()))

    @pytest.mark.parametrize("head", [True, False])
    @pytest.mark.parametrize("options", [dict(mlp=False), dict(stem="cifar"), dict(width=1.5), dict(width=0.21)])
    def test_the_query_encoder_is_rebuilt_from_its_weights_only(self, options, head):
        encoder = ResNetEncoder("resnet10", 7, **{"stem": "imagenet", "width": 0.25, **options})
        model = MoCo(encoder, dim=7, K=8)
        nn.init.zeros_(model.encoder_k.conv1.weight)
        checkpoint = {"arch": "resnet10", "state_dict": {f"module.{k}": x for k, x in model.state_dict().items()}}
        loaded, x = moco.load_encoder(checkpoint, "c.pt", head), torch.randn(2, 3, 32, 32)
        assert torch.equal(loaded(x), encoder.eval()(x) if head else encoder.eval().features(x)) and not loaded.training

    def test_export_writes_the_query_encoder_without_its_head(self, run, checkpoint):
        torch.save(checkpoint, "c.pt")
        assert [run("export", "c.pt", "backbone.pt", *more)[0] for more in ([], [], ["--overwrite"])] == [0, 2, 0]
        prefix, weights = "module.encoder_q.", checkpoint["state_dict"]
        expected = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix) and ".fc." not in k}
        assert same(dict(torch.load("backbone.pt", weights_only=True)), expected)


FORK = multiprocessing.get_context("forkserver")  # its server imports torch once, for all processes to come
FORK.set_forkserver_preload(["torchvision", "torch.distributed", "torch.utils.data", "typer", "rich.progress"])
PROLOGUE = """
import multiprocessing, os, signal, sys
multiprocessing.set_start_method("fork", force=True)
os.setsid()
os.chdir(folder)
os.dup2(os.open("err", os.O_CREAT | os.O_WRONLY), 2)
import moco
"""
TRAIN = """
trainer = os.getpid()
def hook(event, arguments):  # before a file is opened or replaced
    global moment
    if event in ("open", "os.rename") and str(arguments[0]).strip("'").endswith(watched):
        moment -= 1
        if not moment:
            os.kill(os.getpid() if number == signal.SIGKILL else 0, number)  # 0: workers, too, as a terminal does
            if os.getpid() != trainer:
                os.kill(os.getpid(), signal.SIGSTOP)  # a worker that hangs for good
sys.addaudithook(hook)
moco.main(["train", *options])
"""


def statuses(code, *folders, **names):
    """Execute code in one process per folder, its stderr in err; return the exit statuses, None for no end."""
    started = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "__main__", types.ModuleType("main"))  # else each process would import it again
        for rank, folder in enumerate(folders):
            variables = {**names, "rank": rank, "folder": str(folder)}
            started.append(FORK.Process(target=exec, args=(PROLOGUE + code, variables)))
            started[-1].start()
    for process in started:
        process.join(60)
    ends = [process.exitcode for process in started]
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with workers that are left
    return ends


def train_and_signal(folder, options, number=0, moment=0, watched=(".tmp", ".csv")):
    """Train; send a signal just before a file of such a name is opened or replaced the moment-th time."""
    return statuses(TRAIN, folder, options=options, number=number, moment=moment, watched=watched)[0]


def options_of(images, **options):
    base = dict(data=str(images), width=0.125, arch="resnet10", size=16, batch_size=4, bn_splits=2, moco_k=16, epochs=2)
    return base | dict(knn_k=3, knn_every=1, workers=0, device="cpu", precision="fp32", out="c.pt") | options


def flags(images, **options):
    """Spell the options of a run on 20 images, five steps per epoch, that saves after each."""
    options = options_of(images, save_seconds=0, **options)
    return [word for name, value in options.items() for word in (moco.flag(name), str(value))]


def saved(folder, name="c.pt"):
    return moco.load_checkpoint(str(folder / name)) if (folder / name).exists() else {"step": None}


def lasting(folder, name="c.pt"):
    """Return a checkpoint without times and how it ran, which no two runs share."""
    checkpoint = saved(folder, name)
    rows = [{k: v for k, v in row.items() if k not in ("images_per_s", "seconds")} for row in checkpoint["rows"]]
    config = {k: v for k, v in checkpoint["config"].items() if k not in moco.RUNTIME.split()}
    return {**checkpoint, "config": config, "rows": rows, "seconds": None}


class TestOptimization:
    @pytest.mark.parametrize("options, epochs, expected", [
        (dict(epochs=8), (0, 2, 4, 8), (1, 0.5 + 0.25 * math.sqrt(2), 0.5, 0)),
        (dict(preset="v1"), (0, 119.99, 120, 159.99, 160, 200), (1, 1, 0.1, 0.1, 0.01, 0.01)),
        (dict(preset="v1", schedule=(5,)), (0, 4, 5), (1, 1, 0.1)),
    ])  # fmt: skip
    def test_the_learning_rate_decays_by_a_cosine_or_a_schedule(self, options, epochs, expected):
        config = Config.from_preset(**options, lr=0.4)
        close(torch.tensor([moco.learning_rate(config, e) for e in epochs]), 0.4 * torch.tensor(expected))

    @pytest.mark.parametrize("n", [8, 9, 39, 40])
    def test_an_epoch_shows_every_image_at_most_once_in_full_batches(self, n):
        plan = moco.batch_plan(n, tiny_config())
        for _, steps in itertools.groupby(plan, lambda step: step[0]):
            shown = torch.stack([indices for _, indices in steps])
            assert shown.shape == (n // 8, 8) and len(shown.unique()) == shown.numel() and shown.max() < n


class TestDevice:
    @pytest.mark.parametrize("cuda, mps, asked, expected", [
        (1, 1, "auto", "cuda:3"), (0, 1, "auto", "mps"), (0, 0, "auto", "cpu"), (1, 0, "mps", ""), (0, 1, "cuda", ""),
    ])  # fmt: skip
    def test_auto_is_cuda_else_mps_else_the_cpu_and_a_device_that_is_not_there_is_refused(
        self, monkeypatch, cuda, mps, asked, expected
    ):
        calls, chosen = [], []
        for variable, value in dict(LOCAL_RANK="3", RANK="7", WORLD_SIZE="8").items():  # as torchrun does
            monkeypatch.setenv(variable, value)
        monkeypatch.setattr(torch.distributed, "init_process_group", calls.append)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        refused = pytest.raises(UserError, match=f"^--device {asked}: .*; give --device auto$")
        with contextlib.nullcontext() if expected else refused:
            device, autocast = moco.pick_device(Config(device=asked))
            assert str(device) == expected and calls == ["cpu:gloo,cuda:nccl" if cuda else "gloo"]
            assert chosen == ([device] if cuda else [])
            assert expected == "cpu" or not autocast.keywords["enabled"]  # bf16 that is emulated is slow

    @pytest.mark.parametrize("precision, avx512, amx, bf16", [
        ("auto", 1, 0, 1), ("auto", 0, 1, 1), ("auto", 0, 0, 0), ("bf16", 0, 0, 1), ("fp32", 1, 1, 0),
    ])  # fmt: skip
    def test_precision_auto_is_bf16_where_the_cpu_has_it(self, monkeypatch, precision, avx512, amx, bf16):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512))
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
        with moco.pick_device(Config(device="cpu", precision=precision))[1]():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if bf16 else torch.float32)


class TestRun:
    def test_a_runs_seed_draws_the_crops_of_streamed_images(self, image_folder, tmp_path):
        run = moco.Run(tiny_config(data=str(image_folder), workers=0, seed=7, size=16, out=str(tmp_path / "c.pt")))
        (image,) = images_of(1, 40, 50)
        expected = SplitTwoViews(Augment(size=16), seed=7).crop_file(image, 2, 3)
        assert torch.equal(run.crop(image, 2, 3), expected)

    @pytest.mark.parametrize("precision", ["bf16", "fp32"])
    def test_training_and_its_knn_compute_in_the_precision_of_the_run(self, few, tmp_path, precision):
        run, seen = moco.Run(tiny_config(out=str(tmp_path / "c.pt"), precision=precision, epochs=1)), set()
        run.model.encoder_q.conv1.register_forward_hook(lambda conv, _, y: seen.add((conv.training, y.dtype)))
        list(run.train())
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        assert seen == {(True, dtype), (False, dtype)}

    def test_the_initial_weights_are_a_function_of_the_seed_alone(self):
        state = torch.get_rng_state()
        one, two, again = (moco.build_model(tiny_config(seed=seed), 8).state_dict() for seed in (1, 2, 1))
        assert same(one, again) and not same(one, two) and torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("options", [{}, dict(aug="v2", size=24, seed=7, method="memory-bank")])
    def test_a_run_is_sgd_on_the_loss_of_two_views(self, few, tmp_path, request, options):
        request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
        torch.set_default_dtype(torch.float64)  # in which two ways of one computation agree over ten steps
        run = moco.Run(config := tiny_config(out=str(tmp_path / "c.pt"), lr=0.03, wd=1.0, **options))
        losses = [run.losses[(run.step - 1) % 5].clone() for _ in run.train()]
        model, (images, _) = moco.build_model(config, 40), moco.shapes(True)
        parameters = list(model.encoder_q.parameters())
        momentum = [torch.zeros_like(p) for p in parameters]
        augment = Augment(config.aug, config.size)
        for step in range(10):
            order = torch.randperm(40, generator=rng("order", config.seed, step // 5))
            indices, generator = order[step % 5 * 8 :][:8], rng("step", config.seed, step)
            views = [augment(images[indices], generator) for _ in range(2)]
            loss = model(*views, generator, indices)
            close(losses[step], loss.detach(), atol=1e-8)
            lr = 0.015 * (1 + math.cos(math.pi * step / 10))
            for p, g, v in zip(parameters, torch.autograd.grad(loss, parameters), momentum, strict=True):
                v.mul_(0.9).add_(g + p.detach())
                p.data.sub_(lr * v)
        assert len(losses) == run.step == run.steps == 10 and not run.losses.requires_grad
        assert [row["loss"] for row in run.rows] == [pytest.approx(sum(losses[i : i + 5]).item() / 5) for i in (0, 5)]
        weights = {"module." + name: x for name, x in model.state_dict().items()}
        close(dict(saved(tmp_path)["state_dict"]), weights, atol=1e-8)

    def test_a_batch_may_hold_all_images_but_not_more(self, few, tmp_path):
        assert [row["epoch"] for row in training(tmp_path, batch_size=40)] == [1, 2]
        with pytest.raises(UserError, match="^--batch-size 42: more than the 40 images; give 40"):
            next(training(tmp_path, batch_size=42, overwrite=True))

    def test_the_csv_has_a_header_at_the_start_and_a_row_per_epoch_with_knn_when_it_is_due(self, few, tmp_path):
        rows, lines = [], ["epoch,loss,lr,knn,images_per_s,seconds"]
        for row in training(tmp_path, epochs=5, knn_every=2):
            rows += [row] if row else []
            lines += [",".join("" if x is None else str(x) for x in row.values())] if row else []
            assert (tmp_path / "c.csv").read_text().splitlines() == lines
        assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
        assert [row["knn"] is not None for row in rows] == [False, True, False, True, True]
        close(torch.tensor([row["lr"] for row in rows]), 0.03 * (1 + (math.pi * torch.arange(5) / 5).cos()))

    def test_a_row_has_its_epochs_seconds_and_its_speed_without_knn_also_once_resumed(self, few, tmp_path, monkeypatch):
        now = 0.0

        def work(conv1, *_):  # 2 s per step; kNN takes 3.5 s for each split
            nonlocal now
            now += 2 if conv1.training else 3.5

        monkeypatch.setattr(moco, "time", types.SimpleNamespace(perf_counter=lambda: now, monotonic=lambda: 0))
        for stop in (8, None):  # 6 of 40 images in each of 6 steps
            options = dict(batch_size=6, knn_every=2, epochs=3, resume=now > 0)
            run = moco.Run(tiny_config(out=str(tmp_path / "c.pt"), **options))
            run.model.encoder_q.conv1.register_forward_hook(work)
            list(run.train(lambda run=run, stop=stop: run.step == stop))
            now += 1000
        assert [(row["images_per_s"], row["seconds"]) for row in run.rows] == [(3, 12), (3, 19), (3, 19)]


class TestNeverLosingARun:
    @pytest.mark.parametrize("images, workers", [("shapes", 0), ("folder", 0), ("folder", 2)])
    def test_a_run_resumed_after_every_step_ends_bit_for_bit_as_one_never_stopped(
        self, few, image_folder, tmp_path, images, workers
    ):
        options = dict(workers=workers, knn_every=1, arch="resnet10", size=16)
        options |= dict(data=str(image_folder), batch_size=4) if images == "folder" else {}
        list(moco.Run(tiny_config(out=str(tmp_path / "never.pt"), **{**options, "workers": 0})).train())
        for step in range(11):
            run = moco.Run(tiny_config(out=str(tmp_path / "c.pt"), resume=step > 0, **options))
            rows = list(run.train(lambda run=run, step=step: run.step == step))
            assert rows == run.rows[-1:] * (step == 6) + [None] * (step % 5 > 0)  # kNN is stopped, and made on resume
            assert (saved(tmp_path)["step"], saved(tmp_path)["epoch"]) == (step, step // 5)
        assert [row["epoch"] for row in training(tmp_path, resume=True, **options)] == [2]
        assert same(lasting(tmp_path), lasting(tmp_path, "never.pt"))

    @pytest.mark.parametrize("number, moment, step", [  # a save writes and replaces c.pt, then c.csv
        (signal.SIGKILL, 2, None), (signal.SIGKILL, 3, 0), (signal.SIGKILL, 18, 3), (signal.SIGKILL, 23, 5),
        (signal.SIGINT, 21, 5), (signal.SIGTERM, 26, 6),
    ])  # fmt: skip
    def test_a_run_killed_or_signaled_at_any_moment_of_a_save_ends_once_resumed_as_one_never_stopped(
        self, image_folder, tmp_path, run, number, moment, step
    ):
        status = train_and_signal(tmp_path, flags(image_folder, workers=1), number, moment)
        assert status == (-number if number == signal.SIGKILL else 128 + number)
        assert saved(tmp_path)["step"] == step
        if (tmp_path / "c.csv").exists():
            assert len((tmp_path / "c.csv").read_text().splitlines()) <= 1 + len(saved(tmp_path)["rows"])
        assert (tmp_path / "err").read_text() == ""
        assert run("train", *flags(image_folder), "--resume" if step else "--overwrite")[0] == 0
        assert run("train", *flags(image_folder, out="never.pt"))[0] == 0
        assert same(lasting(tmp_path), lasting(tmp_path, "never.pt"))

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
    def test_the_first_signal_is_noted_and_a_second_one_acts_as_it_would_without_us(self, number):
        before = [signal.getsignal(x) for x in moco.SIGNALS]
        with moco.catch_signals() as received:
            assert signal.getsignal(number) not in before
            signal.raise_signal(number)
            assert received == [number] and signal.getsignal(number) in before
        assert [signal.getsignal(x) for x in moco.SIGNALS] == before

    def test_a_signal_that_was_ignored_stays_ignored(self):
        old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with moco.catch_signals() as received:
            signal.raise_signal(signal.SIGHUP)
            assert received == [] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, old)

    def test_several_processes_note_a_signal_that_torchrun_repeats(self, monkeypatch):
        monkeypatch.setattr(moco, "world_size", lambda: 2)
        with moco.catch_signals() as received:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM] * 2

    @pytest.mark.parametrize("batch", [1, 2, 3])
    def test_a_run_stopped_between_two_batches_of_evaluation_ends_once_resumed_as_one_never_stopped(
        self, few, tmp_path, monkeypatch, batch
    ):
        list(training(tmp_path, knn_every=1))
        (tmp_path / "c.pt").rename(tmp_path / "never.pt")
        run = moco.Run(tiny_config(out=str(tmp_path / "c.pt"), overwrite=True, knn_every=1))
        evaluated = []
        run.model.encoder_q.conv1.register_forward_pre_hook(
            lambda conv, _: evaluated.append(1) if not conv.training else None
        )
        rows = list(run.train(lambda: len(evaluated) >= batch))
        assert [row["epoch"] for row in rows if row] == [1] * (batch > 1)
        assert saved(tmp_path)["step"] == (5 if batch < 3 else 10)
        list(training(tmp_path, knn_every=1, resume=True))
        assert same(lasting(tmp_path), lasting(tmp_path, "never.pt"))

    def test_a_complete_run_is_left_as_it_is(self, few, tmp_path):
        list(training(tmp_path))
        files = {path: path.read_bytes() for path in tmp_path.iterdir()}
        assert list(training(tmp_path, resume=True, lr=0.5)) == []
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files

    def test_resume_begins_where_there_is_no_file(self, few, tmp_path):
        assert len(list(training(tmp_path, resume=True))) == 10

    @pytest.mark.parametrize(
        "change",
        [
            lambda top: place_images(top, "train/dark/new"),
            lambda top: os.rename(top / "train/dark/0.png", top / "train/dark/x.png"),
            lambda top: os.remove(top / "val/dark/0.png"),
        ],
    )
    def test_resume_refuses_a_folder_with_other_images(self, folder, tmp_path, change):
        options = dict(data=str(folder), workers=0, size=16)
        next(training(tmp_path, **options))
        change(folder)
        with pytest.raises(UserError, match="does not fit this run .*other images"):
            next(training(tmp_path, resume=True, **options))

    def test_train_from_python_returns_its_rows_also_in_a_thread_and_with_numpys_numbers_and_an_own_recipe(
        self, few, tmp_path, monkeypatch
    ):
        monkeypatch.setitem(moco.RECIPES, "own", moco.Recipe((0.5, 1), ((0.5, moco.flip),)))
        options = dataclasses.asdict(tiny_config(aug="own", out=str(tmp_path / "c.pt"), epochs=1))
        options |= dict(lr=numpy.float32(0.05), moco_k=numpy.int64(16))
        results = []

        def work():
            results.extend(moco.train(**options))
            results.append(moco.knn(str(tmp_path / "c.pt"), device="cpu"))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        row, result = results
        assert (row["epoch"], result["aug"]) == (1, "own") and row["knn"] == result["top1"]

    @pytest.mark.parametrize("out, rows", [("c.pt", "c.csv"), ("a.pt.b", "a.pt.b.csv"), ("c.csv", "c.csv.csv")])
    def test_a_run_replaces_no_file_unless_it_may(self, few, tmp_path, out, rows):
        for name in (out, rows):
            (tmp_path / name).write_text("of another run")
            with pytest.raises(UserError, match=f"{name}: exists already; give --resume"):
                moco.Run(tiny_config(out=str(tmp_path / out)))
            assert [path.read_text() for path in tmp_path.iterdir()] == ["of another run"]
            (tmp_path / name).rename(tmp_path / rows)
        next(moco.Run(tiny_config(out=str(tmp_path / out), overwrite=True)).train())
        assert (tmp_path / rows).read_text() == "epoch,loss,lr,knn,images_per_s,seconds\n"

    def test_another_rank_refuses_no_file_that_it_will_not_write(self, few, tmp_path, monkeypatch):
        (tmp_path / "c.pt").touch()
        monkeypatch.setattr(moco, "rank", lambda: 1)
        moco.Run(tiny_config(out=str(tmp_path / "c.pt")))

    def test_a_run_saves_every_epoch_and_within_it_every_so_many_seconds(self, few, tmp_path):
        run, saves = moco.Run(tiny_config(out=str(tmp_path / "c.pt"))), []
        for _ in run.train():
            saves.append(saved(tmp_path)["step"])
            run.saved_at -= {1: 290, 2: 11}.get(run.step, 0)  # so many seconds go by
        assert saves == [0, 0, 3, 3, 5, 5, 5, 5, 5, 10]

    @pytest.mark.parametrize("what, bad, every, kept, at", [
        ("loss", 7, 0, 6, 1.4), ("loss", 8, 300, 5, 2), ("loss", 1, 0, 0, 0.2), ("queue", 7, 0, 6, 1.4),
    ])  # fmt: skip
    def test_a_number_that_is_not_finite_ends_the_run_and_is_not_saved(self, few, tmp_path, what, bad, every, kept, at):
        def spoil(model, _, loss):
            if what == "queue" and run.step == bad - 1:
                model.queue.fill_(math.inf)
            return loss + math.nan if what == "loss" and run.step >= bad - 1 else loss

        run = moco.Run(tiny_config(out=str(tmp_path / "c.pt"), save_seconds=every))
        run.model.register_forward_hook(spoil)
        with pytest.raises(UserError, match=f"^.*{what}.*: not finite in epoch {at:.2f}; use a lower --lr"):
            list(run.train())
        assert saved(tmp_path)["step"] == kept

    def test_a_disk_that_is_full_costs_a_line(self, few, tmp_path, monkeypatch):
        def full(number, written=[]):  # noqa: B006
            written.append(number)
            if len(written) == 2:
                raise OSError(28, "No space left on device")

        next(steps := training(tmp_path))
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"^.*/c\.csv: not written \(No space left on device\)"):
            list(steps)

    @pytest.mark.parametrize("bad", ["val/dark/3.png", "train/light/9.png"])
    def test_a_run_stopped_by_an_unreadable_image_goes_on_once_it_is_replaced(self, folder, tmp_path, bad):
        options = dict(data=str(folder), workers=1, size=16, knn_every=1)
        list(moco.Run(tiny_config(out=str(tmp_path / "never.pt"), **options)).train())
        image = (folder / bad).read_bytes()
        (folder / bad).write_text("no image")
        with pytest.raises(UserError, match="[39].png: cannot be read") as _error:  # its traceback holds the loader
            list(training(tmp_path, **options))
        (folder / bad).write_bytes(image)
        list(training(tmp_path, resume=True, **options))
        assert same(lasting(tmp_path), lasting(tmp_path, "never.pt"))

    def test_resume_takes_options_that_may_change(self, few, tmp_path, checkpoint):
        moco.save_checkpoint(str(tmp_path / "c.pt"), checkpoint)
        options = dict(epochs=3, knn_k=3, lr=0.01, wd=0.1, cos=False, precision="bf16", workers=1)
        run = moco.Run(tiny_config(out=str(tmp_path / "c.pt"), resume=True, **options))
        assert len(list(run.train())) == 5 and run.rows[2]["lr"] == 0.01
        assert run.optimizer.param_groups[0]["weight_decay"] == 0.1

    @pytest.mark.parametrize("name, value", dict(
        arch="resnet34", moco_dim=8, moco_k=64, seed=1, batch_size=4, width=0.25, moco_m=0.9, size=24, aug="v2",
        bn_splits=4, mlp=False, moco_t=0.3, symmetric=True, bank_m=0.9, method="simclr", epochs=1,
    ).items())  # fmt: skip
    def test_resume_refuses_by_name_what_may_not_change(self, few, tmp_path, checkpoint, name, value):
        moco.save_checkpoint(str(tmp_path / "c.pt"), checkpoint)
        with pytest.raises(UserError, match=f"^{moco.flag(name)} {value}: .* with {checkpoint['config'][name]}$"):
            next(training(tmp_path, resume=True, **{name: value}))


KINDS = {"moco": {}, "symmetric": dict(symmetric=True)}
KINDS |= {method: dict(method=method) for method in ("end-to-end", "memory-bank", "simclr")}
JOBS = """
import datetime, torch
torch.set_default_dtype(torch.float64)
torch.distributed.init_process_group("gloo", "file://" + store, datetime.timedelta(seconds=50), n, rank)
for event, options in jobs:
    run = moco.Run(moco.Config(**options))
    def stop():  # which is asked while the next batch is waited for
        if rank == 1 and event == "signal" and run.step == 7 and not received:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # torchrun repeats it
        if rank == 1 and event == "late" and run.step == 6:
            run.saved_at -= 301
        return received
    with moco.catch_signals() as received:
        for _ in run.train(stop):
            if event == "late" and run.saved_step and run.saved_step % run.steps_per_epoch:
                break
torch.distributed.destroy_process_group()  # else gloo's threads may abort the exit
"""


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Train with the same options on one process, on two and on three, three steps per epoch; return what they saved.
    In float64: BatchNorm over few numbers and ReLU's kinks enlarge float32's rounding a thousandfold."""
    place = tmp_path_factory.mktemp("several")
    for split, count in (("train", 40), ("val", 150)):
        images, labels = moco.shapes(split == "train")
        for i, (image, label) in enumerate(zip(images[:count], labels)):
            (place / split / str(int(label))).mkdir(parents=True, exist_ok=True)
            tvf.to_pil_image(image).save(place / split / str(int(label)) / f"{i}.png")

    def job(out, event=None, **options):
        return event, options_of(place, **{**dict(batch_size=12, bn_splits=6, epochs=1, lr=0.01, out=out), **options})

    def alone(name, **options):
        run = moco.Run(Config(**job(str(place / name), save_seconds=0, **options)[1]))
        return [saved(place, name) for _ in run.train()]

    torch.set_default_dtype(torch.float64)
    results = {(kind, 1): alone(f"{kind}.pt", **options)[-1] for kind, options in KINDS.items()}
    results["alone"] = alone("alone.pt", epochs=5)
    torch.save(results["alone"][3], place / "resumed.pt")
    jobs = [job(f"{kind}.pt", **options) for kind, options in KINDS.items()]
    more = [job(f"{event}.pt", event, epochs=5) for event in ("signal", "late")]
    more += [job(str(place / "resumed.pt"), epochs=5, resume=True)]
    for n, todo in ((2, jobs + more), (3, jobs)):
        ranks = [place / f"{n}-{rank}" for rank in range(n)]
        [folder.mkdir() for folder in ranks]
        assert statuses(JOBS, *ranks, n=n, jobs=todo, store=str(place / f"store{n}")) == [0] * n
        assert all(sorted(os.listdir(folder)) == ["err"] for folder in ranks[1:])  # only rank 0 writes
        results |= {(kind, n): saved(ranks[0], f"{kind}.pt") for kind in KINDS}
    results |= {name: saved(place / "2-0", f"{name}.pt") for name in ("signal", "late")}
    shutil.copy(place / "2-0" / "signal.pt", place / "continued.pt")
    results["continued"] = alone("continued.pt", epochs=5, resume=True)[-1]
    torch.set_default_dtype(torch.float32)
    return results | {"resumed": saved(place, "resumed.pt")}


def agrees(many, one):
    """Compare what several processes saved with what one process did."""
    close(dict(many["state_dict"], losses=many["losses"]), dict(one["state_dict"], losses=one["losses"]), 1e-9, 0)
    close(many["optimizer"]["state"], one["optimizer"]["state"], 1e-8, 0)
    assert [row["knn"] for row in many["rows"]] == [row["knn"] for row in one["rows"]]
    close([row["loss"] for row in many["rows"]], [row["loss"] for row in one["rows"]])
    return many["step"] == one["step"]


class TestSeveralProcesses:
    def test_torchrun_starts_the_processes_of_a_run(self, image_folder, tmp_path):
        command = f"-m torch.distributed.run --standalone --nproc-per-node=2 {MOCO} train --preset tiny --device cpu"
        command += f" --width 0.125 --size 16 --batch-size 8 --knn-k 3 --epochs 1 --data {image_folder}"
        done = subprocess.run([sys.executable, *command.split()], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count("epoch 1/1") == 1, done.stderr

    @pytest.mark.parametrize("n", [2, 3])
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_same_options_compute_the_same_on_one_and_on_several_processes(self, several, kind, n):
        assert agrees(several[kind, n], several[kind, 1])

    @pytest.mark.parametrize("event", ["signal", "late"])
    def test_a_signal_to_one_process_and_its_clock_make_all_save_at_one_step(self, several, event):
        step = several[event]["step"]
        assert 7 < step < 15 and step % 3 and agrees(several[event], several["alone"][step - 1])

    @pytest.mark.parametrize("name", ["continued", "resumed"])
    def test_a_run_goes_on_with_fewer_processes_or_more(self, several, name):
        assert agrees(several[name], several["alone"][-1])


QUICK = "--preset tiny --width 0.125 --batch-size 8 --knn-k 5 --device cpu --precision fp32 --workers 0".split()
README = Path(__file__).parent / "README.md"
UNUSUAL = dict(preset="tiny", moco_dim=16, moco_k=32, moco_m=0.9, moco_t=0.2, symmetric=True, bank_m=0.9, seed=7)
UNUSUAL |= dict(arch="resnet10", stem="imagenet", width=0.125, mlp=False, bn_splits=2, aug="v1", size=40, batch_size=8)
UNUSUAL |= dict(data="shapes", epochs=2, lr=0.01, wd=0.0, cos=False, schedule=(1,), precision="fp32", knn_every=1)
UNUSUAL |= dict(knn_k=3, knn_t=0.5, head=True)
ELSEWHERE = dict(out="/", resume=True, overwrite=True, save_seconds=0.0, root="/", workers=10**6, device="mps")
ELSEWHERE |= dict(compile=True, json=True)


@pytest.fixture(scope="module")
def unusual(tmp_path_factory, small_sets):
    """Return a checkpoint that differs from the defaults in every option, as if it came from another machine."""
    folder = tmp_path_factory.mktemp("unusual")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moco, "shapes", lambda train: small_sets[train])
        list(training(folder, **UNUSUAL))
    checkpoint = moco.load_checkpoint(str(folder / "c.pt"))
    checkpoint["config"] |= ELSEWHERE
    assert [x for x in moco.HINTS if checkpoint["config"][x] == getattr(Config, x)] == [
        "method"
    ]  # only it is symmetric
    return checkpoint


def spelled(**options):
    """Spell options as on the command line."""
    words = [f"{moco.flag(name)}={value}" for name, value in options.items()]
    return [re.sub("^--(.*)=False$", r"--no-\1", word).removesuffix("=True") for word in words]


def tiles(path, size):
    """Cut a picture into its images uint8 (rows, columns, 3, side, side), enlarged as they are."""
    side = math.ceil(96 / size) * size
    rows = tvf.pil_to_tensor(default_loader(path))[:, 2:, 2:].unfold(1, side, side + 2)
    return rows.unfold(2, side, side + 2).movedim(0, 2)


def draw_gray(folder, levels, widths):
    """Write an image for each gray level; their widths take turns."""
    folder.mkdir(parents=True)
    for level, width in zip(levels, itertools.cycle(widths)):
        PIL.Image.new("RGB", (width, 30), (level, level, level)).save(folder / f"{level}.png")


class TestPictures:
    @pytest.mark.parametrize("side, scale", [(20, 5), (32, 3), (48, 2), (96, 1), (112, 1)])
    def test_a_picture_has_rows_of_images_enlarged_to_96_pixels_and_a_gap_after_the_first(self, tmp_path, side, scale):
        columns = images_of(6, side, side).unflatten(0, (3, 2))
        moco.write_picture(str(tmp_path / "x.png"), list(columns / 255))
        drawn = tiles(tmp_path / "x.png", side)
        assert drawn.shape == (2, 4, 3, scale * side, scale * side)
        assert (drawn[:, 1] == 255).all()
        enlarged = columns.transpose(0, 1).repeat_interleave(scale, 3).repeat_interleave(scale, 4)
        assert torch.equal(drawn[:, [0, 2, 3]], enlarged)

    @pytest.mark.parametrize("widths", [(30,), (20, 30)], ids=["in memory", "files"])
    def test_views_draws_images_and_after_a_gap_each_their_pairs_of_views(self, run, tmp_path, widths):
        draw_gray(tmp_path / "gray", [4, 12, 36, 100, 240], widths)
        for seed in range(2):
            command = f"views {seed} --preset v1 --data gray --size 40 --seed {seed}"
            assert run(*command.split()) == (0, f"wrote {seed}\n", "")
        assert not torch.equal(tiles("1", 40), tiles("0", 40))
        gray = tiles("0", 40).double().mean((2, 3, 4))
        assert (gray[:, [1, 4, 7, 10]] == 255).all()
        image, *views = gray[:, [0, 2, 3, 5, 6, 8, 9, 11, 12]].T
        assert sorted(image.tolist()) == [4, 12, 36, 100, 240]
        brightness = torch.stack(views) / image  # 0.6 to 1.4, so no view may be of another image
        assert 0.4 < brightness.min() and brightness.max() < 1.6
        assert len(brightness[:, image == 100].unique()) == 8  # each view has its own

    @pytest.mark.parametrize("widths", [(30,), (20, 30)], ids=["in memory", "files"])
    @pytest.mark.parametrize("labeled", [True, False])
    def test_neighbors_draws_the_nearest_other_images_faded_if_of_another_class(
        self, run, unusual, tmp_path, widths, labeled
    ):
        torch.save(unusual, "c.pt")
        levels = [0, 20, 40, 60, 80, 120, 150, 180, 210, 240]
        for split in ("train", "val"):
            draw_gray(tmp_path / "gray" / split / "dark", levels[:5], widths)
            draw_gray(tmp_path / "gray" / split / "light", levels[5:], widths)
        data = "gray" if labeled else "gray/train"
        for name, seed in (("saved", []), ("given", ["--seed=7"]), ("other", ["--seed=0"])):
            assert run("neighbors", "c.pt", name, f"--data={data}", "--device=cpu", *seed)[0] == 0
        assert Path("saved").read_bytes() == Path("given").read_bytes() != Path("other").read_bytes()
        drawn = tiles("saved", 40).double().mean((2, 3, 4))
        assert sorted(drawn[:, 0].tolist()) == levels
        for query, gap, *neighbors in drawn.tolist():
            expected = [x for x in levels if labeled or x != query]
            if labeled:  # 1/4 of the distance to white is left
                expected = [x if (x < 100) == (query < 100) else 255 - (255 - x) / 4 for x in levels]
            close(sorted(neighbors), sorted(expected), atol=1)
            assert (gap, neighbors[0] == query) == (255, labeled)


class TestCommandLine:
    def test_options_that_are_given_win_over_the_presets(self, few, run):
        chosen = dict(overwrite=True, mlp=False, knn_every=0, wd=0.0, cos=False, epochs=3, width=0.125, batch_size=8)
        chosen |= dict(device="cpu", precision="fp32", seed=0)
        assert run("train", "--preset=tiny", *spelled(**chosen), "--schedule=1", "--schedule=2")[0] == 0
        checkpoint = moco.load_checkpoint("ckpt.pt")
        assert checkpoint["config"] == dataclasses.asdict(Config.from_preset("tiny", **chosen, schedule=(1, 2)))
        close([row["lr"] for row in checkpoint["rows"]], [0.06, 0.006, 0.0006])

    def test_resume_has_the_options_given_else_the_saved_ones_but_for_how_to_run(self, few, run, unusual):
        torch.save(unusual, "c.pt")
        given = dict(epochs=3, lr=0.5, out="c.pt", resume=True, device="cpu")
        assert run("train", *spelled(**given))[0] == 0
        checkpoint = moco.load_checkpoint("c.pt")
        assert checkpoint["config"] == dataclasses.asdict(Config(**UNUSUAL | given))
        assert checkpoint["epoch"] == 3

    @pytest.mark.parametrize("labeled", [True, False])
    def test_train_says_what_it_found_and_knn_measures_the_same(self, folder, run, labeled):
        place = folder if labeled else folder / "train"
        said = f"{folder}/train, 8 to test on in {folder}/val" if labeled else f"{folder}/train, no kNN: "
        first, *_, epoch, last = run("train", *QUICK, f"--data={place}", "--epochs=1", "--out=c c.pt")[1].splitlines()
        assert first.startswith(f"{place}: 20 images to train on in {said}") and first.endswith("; cpu, fp32")
        top1 = re.fullmatch(r"epoch 1/1  loss \d+\.\d{4}  lr 0\.06  \d+ images/s  ETA 0 min(  kNN (.+) %)?", epoch)[2]
        assert last.startswith("c c.pt is complete; ")
        status, out, err = run("knn", "c c.pt", "--device=cpu")
        if labeled:
            assert (status, out.split("  ")[:3]) == (0, [f"kNN top-1 {top1} %", "checkpoint c c.pt", "epoch 1"])
        else:
            assert (status, top1, out) == (2, None, "") and err.startswith(f"moco: --data {place}: 20 images")

    def test_commands_return_to_python_in_any_thread_what_json_prints_and_stdout_has_nothing_else(
        self, few, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.setitem(moco.RECIPES, "own", moco.RECIPES["v1"])
        out = str(tmp_path / "c.pt")
        options = dataclasses.asdict(tiny_config(aug="own", out=out, json=True, moco_k=64))
        with ThreadPool(1) as pool:
            rows = pool.apply(moco.train, kwds=options)
            result = pool.apply(moco.knn, [out], dict(device="cpu", json=True))
        printed, said = capsys.readouterr()
        assert [json.loads(line) for line in printed.splitlines()] == [*rows, result]
        assert rows == moco.load_checkpoint(out)["rows"] and result["top1"] == rows[1]["knn"]
        assert said.startswith("shapes: 40 images to train on, 20 to test on; cpu, fp32\nnote: --moco-k 64: ")

    @pytest.mark.parametrize("options, notices", [
        ("--moco-k=20", 0), ("--moco-k=21", 1), ("--method=simclr --moco-k=21", 0),
        ("--moco-k=8 --knn-k=10", 0), ("--moco-k=8 --knn-k=11", 1), ("--data=flat --moco-k=8 --knn-k=11", 0),
    ])  # fmt: skip
    def test_a_long_queue_and_many_neighbors_of_few_images_cost_a_notice(self, run, image_folder, options, notices):
        os.symlink(image_folder / "train", "flat")
        out = run("train", *QUICK, f"--data={image_folder}", "--epochs=1", "--size=9", *options.split())[1]
        *_, name, value = re.split("[ =]", options)
        assert out.count("note: ") == out.count(f"note: {name} {value}: ") == notices

    @pytest.mark.parametrize("splits, works", [(2, 40), (6, 36)])
    def test_a_batch_of_more_images_than_there_are_names_a_number_that_works(self, few, run, splits, works):
        command = ["train", *QUICK, "--epochs=1", f"--bn-splits={splits}", "--batch-size"]
        assert run(*command, "60")[2].endswith(f"; give {works}\n")
        assert run(*command, f"{works}")[0] == 0

    @pytest.mark.parametrize("given", [
        {}, dict(size=33, aug="cifar", data="cifar10", head=False), dict(precision="bf16"), dict(knn_k=1, knn_t=2.0)
    ])  # fmt: skip
    @pytest.mark.parametrize("command", ["knn", "linear"])
    def test_an_evaluation_has_the_options_given_else_the_saved_ones_but_for_how_to_run(
        self, few, run, unusual, small_sets, monkeypatch, command, given
    ):
        monkeypatch.setattr(moco, "cifar", lambda config, train: small_sets[not train])
        torch.save(unusual, "c.pt")
        names = "data size aug precision head" + " knn_k knn_t" * (command == "knn")
        given = {name: x for name, x in given.items() if name in names}
        expected = {name: UNUSUAL[name] for name in names.split()} | given
        config = Config(**expected)
        data = moco.load_data(config, CPU)
        autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=config.precision == "bf16")
        encoder = moco.load_encoder(unusual, "", config.head)
        expected["top1"] = moco.accuracy(encoder, data, config, autocast, linear=command == "linear")
        expected |= dict(json=True, root="data", workers=2, device="cpu", checkpoint="c.pt", epoch=2)
        expected |= dict(bank=len(data.train), queries=len(data.test))
        status, out, err = run(command, "c.pt", "--json", "--device=cpu", *spelled(**given))
        assert (status, json.loads(out), err) == (0, expected, "")
        assert getattr(moco, command)("c.pt", json=True, device="cpu", **given) == expected

    @pytest.mark.parametrize("stem, saved, given, size", [
        ("imagenet", {}, {}, 224), ("cifar", {}, {}, 32), ("cifar", dict(size=16, eval_size=0), {}, 16),
        ("cifar", dict(size=16, eval_size=24, optimizer="muon", tensorboard="x"), {}, 24),
        ("cifar", dict(size=16, eval_size=24), dict(size=40), 40),
    ])  # fmt: skip
    def test_official_and_older_checkpoints_are_evaluated_at_the_size_they_were_made_for(
        self, image_folder, tmp_path, monkeypatch, stem, saved, given, size
    ):
        monkeypatch.setattr(moco, "pick_device", lambda _: (torch.device("meta"), contextlib.nullcontext))
        weights = ResNetEncoder("resnet10", stem=stem, width=0.125).state_dict()
        weights = {f"module.encoder_q.{name}": x for name, x in weights.items()}
        checkpoint = {"epoch": 200, "arch": "resnet10", "state_dict": weights, "config": saved}
        torch.save(checkpoint, tmp_path / "c.pt")
        options = dict(given, data=str(image_folder))
        encoder, _, config, *_ = moco.load_for_evaluation(str(tmp_path / "c.pt"), options)
        assert config.size == size
        assert {x.device.type for x in encoder.state_dict().values()} == {"meta"}

    @pytest.mark.parametrize("number", moco.SIGNALS, ids=lambda number: number.name)
    def test_a_signal_stops_a_run_that_is_not_complete_and_says_how_to_go_on(self, folder, run, monkeypatch, number):
        def take_step(run, *batch, original=moco.Run.take_step):
            original(run, *batch)
            signal.raise_signal(number)

        monkeypatch.setattr(moco.Run, "take_step", take_step)
        before = signal.getsignal(number)
        command = ["train", *QUICK, f"--data={folder}/train", "--epochs=1", "--resume"]
        first, last = run(*command), run(*command)  # of two steps
        assert first[0] == 128 + number and last[0] == 0 and "is complete" in last[1]
        assert "ckpt.pt: stopped after step 1; to go on, give the same command with --resume\n" in first[1]
        assert signal.getsignal(number) is before

    def test_a_process_that_another_ones_signal_stops_ends_as_if_it_had_got_it(self, few, run, monkeypatch):
        monkeypatch.setattr(moco.Run, "train", lambda run, stop: iter(()))
        assert run("train", *QUICK)[0] == 143

    @pytest.mark.parametrize("arguments", [
        "trian", "train --colour", "train --preset v3", "train --moco-m 2", "train --epochs many", "train --lr nan",
        "train --schedule 120 160", "train --size 8", "train --method simclr --symmetric", "train --device cuda",
        "train --batch-size 12 --bn-splits 8", "train --batch-size 64", "train --data nowhere", "train --data empty",
        "train --data bad", "train --data cifar10 --root .",
        "train --out old.pt", "train --out no/c.pt", "train --out device",
        "train --overwrite --out empty", f"train --out {'a' * 300}", "train --resume --out ckpt.pt",
        "train --resume --out c.pt --moco-k 64", "train --resume --out c.pt --data flat", "views empty", "knn",
        "views ckpt.pt", "knn no.pt", "linear ckpt.pt", "linear c.pt --knn-k 3", "knn c.pt --data flat",
        "export c.pt ckpt.pt", "neighbors c.pt ckpt.pt", "neighbors c.pt c.pt/x",
    ])  # fmt: skip
    def test_a_mistake_costs_a_line_on_stderr_and_status_2_and_writes_nothing(
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
        *_, value = arguments.removesuffix(".pt").split()
        assert (status, "epoch" in out) == (2, False)
        assert value in err or re.findall(r"--\S+", arguments)[-1] in err
        assert (err.startswith("moco: ") and err.count("\n") == 1) or err.count("╭") == err.count("╰") == 1
        assert before == {path: path.stat().st_mtime_ns for path in Path().rglob("*")}

    @pytest.mark.parametrize("fail, words", [
        (lambda: open("no.csv"), "moco: no.csv: No such file or directory"), (lambda: os.close(999), "descriptor"),
        (lambda: bytes(2**62), "moco: too little memory"), (lambda: torch.empty(2**60), "moco: too little memory"),
    ], ids=["a file", "the system", "Python's memory", "torch's memory"])  # fmt: skip
    def test_what_the_system_refuses_costs_a_line_and_a_bug_pythons_traceback(self, run, monkeypatch, fail, words):
        monkeypatch.setattr(moco, "load_data", lambda *_: fail())
        status, out, err = run("views", "x.png")
        assert (status, out, err.count("\n")) == (2, "", 1) and words in err
        monkeypatch.setattr(moco, "load_data", lambda *_: torch.ones(2) @ torch.ones(3))
        with pytest.raises(RuntimeError, match="size"):
            run("views", "x.png")

    def test_help_says_what_each_command_does_and_what_each_option_is(self, run, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        out = " ".join("".join(run()[1:]).split())
        assert moco.__doc__.splitlines()[0] in out
        assert all(f"{command.name} {command.help[:40]}" in out for command in moco.app.registered_commands)
        helps = {command: run(command, "--help")[1] for command in ("train", "knn", "linear", "neighbors")}
        assert ["default:" in text for text in helps.values()] == [True, False, False, False]  # the checkpoint's count
        for name, hint in moco.HINTS.items():
            words = re.findall(r"[\w.-]+", f"{moco.flag(name)} {hint.__metadata__[0].help}")
            assert set(words) <= set(re.findall(r"[\w.-]+", helps["train"]))  # none is cut

    def test_processes_that_know_their_ranks_train_together_and_rank_0_prints_and_writes(self, image_folder, tmp_path):
        code = """
os.environ.update(WORLD_SIZE="2", RANK=str(rank), MASTER_ADDR="localhost", MASTER_PORT=port)
sys.stdout = open("out", "w")
moco.main(["train", *options])
assert not moco.dist.is_initialized()
"""
        folders = [tmp_path / "rank 0", tmp_path / "rank 1"]
        for place in folders:
            place.mkdir()
        port = str(torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False).port)
        options = [*QUICK, "--epochs=1", f"--data={image_folder}"]
        assert statuses(code, *folders, port=port, options=options) == [0, 0]
        assert sorted(os.listdir(folders[0])) == ["ckpt.csv", "ckpt.pt", "err", "out"]
        assert sorted(os.listdir(folders[1])) == ["err", "out"]
        assert (folders[0] / "out").read_text().count("\n") == 4
        assert (folders[1] / "out").read_text() == ""

    def test_a_run_whose_reader_leaves_costs_at_most_a_line(self, image_folder, tmp_path):
        command = [sys.executable, MOCO, "train", *QUICK, f"--data={image_folder}", "--epochs=50"]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        with subprocess.Popen(command, cwd=tmp_path, **pipes) as process:
            process.stdout.readline()
            process.stdout.close()
            assert process.stderr.read() in ("", "moco: stdout was closed\n")
        assert process.returncode in (0, 2)

    @pytest.mark.parametrize("is_terminal", [True, False])
    @pytest.mark.parametrize("as_json", [True, False])
    def test_a_terminal_shows_where_a_run_stands_and_any_output_its_rows(
        self, monkeypatch, capsys, is_terminal, as_json
    ):
        seconds = []
        console = rich.console.Console(force_terminal=is_terminal, width=120, get_time=lambda: sum(seconds))
        monkeypatch.setattr(rich, "_console", console)
        update = partial(partialmethod, moco.Progress.update)  # drawn at once, not ten times a second
        monkeypatch.setattr(moco.Progress, "update", update(refresh=True))
        run = types.SimpleNamespace(config=Config(epochs=3, json=as_json), steps=30, steps_per_epoch=10, step=18)
        run.losses = torch.arange(10) / 10
        row = dict(epoch=2, loss=0.5, lr=0.1, knn=None, images_per_s=88.4, seconds=70.0)
        rows = {20: row, 30: {**row, "epoch": 3, "knn": 12.5}}

        def steps():
            for run.step in range(19, 31):
                seconds.append(100)
                yield rows.get(run.step)

        moco.show_progress(run, steps())
        out = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", capsys.readouterr().out)
        lines = ["epoch 2/3  loss 0.5000  lr 0.1  88 images/s  ETA 1 min"]
        lines += ["epoch 3/3  loss 0.5000  lr 0.1  88 images/s  ETA 0 min  kNN 12.50 %"]
        lines = list(map(json.dumps, rows.values())) if as_json else lines
        printed = [line.strip() for line in out.splitlines()]
        assert [line for line in printed if line in lines] == lines
        has_bar = printed != lines
        assert has_bar == (is_terminal and not as_json)
        assert ("0:16:40" in out) == ("loss 0.000" in out) == has_bar  # 1000 seconds are left after two steps


class TestTheTests:
    @pytest.mark.parametrize("other", [[1, 1.001], [1, 1, 1], [1, math.nan]])
    def test_values_that_differ_are_not_close(self, other):
        with pytest.raises(AssertionError):
            close(torch.ones(2), torch.tensor(other))

    @pytest.mark.parametrize("other", [[torch.zeros(2), 2], [torch.ones(2), 1], [torch.ones(2)], []])
    def test_trees_that_differ_anywhere_are_not_the_same(self, other):
        tree = {"a": [torch.ones(2), 2]}
        assert same(tree, {"a": (torch.ones(2), 2)})
        assert not same(tree, {"a": other}) and not same(tree, {})

    def test_samples_of_two_distributions_and_correlated_samples_are_told_apart(self):
        a, b = draws(rng(0), 2, 4000)
        assert kolmogorov_smirnov(a, b) < 1.95 * math.sqrt(2 / 4000) < kolmogorov_smirnov(a, b**1.2)
        assert uncorrelated(torch.stack([a, b]))
        assert not uncorrelated(torch.stack([a, b + 0.1 * a]))


def sections():
    """Return the source of moco.py in parts: the header and each section."""
    return re.split(r"(?m)^(?=# ─)", Path(MOCO).read_text())


class TestReadme:
    def test_its_python_runs_as_printed(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(moco, "shapes", lambda train, draw=moco.shapes: [x[:200] for x in draw(train)])
        weights = MoCo(ResNetEncoder("resnet50", stem="imagenet"), K=1).state_dict()
        torch.save(dict(epoch=0, arch="resnet50", state_dict=weights), "c.pt")
        assert moco.main(["export", "c.pt", "backbone.pt"]) is None  # a script goes on after it
        scope = {}
        for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S):
            exec(block, scope)
        assert math.isfinite(scope["loss"].item()) and "detector" in scope

    @pytest.mark.parametrize("section", range(7))
    def test_each_section_up_to_evaluation_runs_with_those_above_it_and_without_typer(self, section, monkeypatch):
        for name in ("typer", "rich"):
            monkeypatch.setitem(sys.modules, name, None)
        code = compile("".join(sections()[: section + 1]), "part", "exec")
        scope = {"__name__": "part"}
        exec(code, scope)
        used = set()
        parts = [code]
        for part in parts:
            parts += [constant for constant in part.co_consts if hasattr(constant, "co_code")]
            used |= {step.argval for step in dis.get_instructions(part) if step.opname == "LOAD_GLOBAL"}
        assert used <= {*scope, *dir(builtins)}

    @pytest.mark.parametrize("first, code", [
        ("info_nce", "info_nce(x, x, x.T, 1), knn_predict(x, x, torch.arange(4), 4, 1, 1), SplitBatchNorm(3, 2)"),
        ("MoCo", "MoCo(nn.Linear(3, 4), dim=4, K=8)(x, x, torch.Generator()).backward()"),
        ("Augment", "SplitTwoViews(Augment(size=8))(torch.zeros(4, 3, 9, 9).byte(), rng(0))"),
    ])  # fmt: skip
    def test_what_it_says_to_copy_is_enough(self, first, code):
        (text,) = re.findall(rf"^- `{first}`.*?(?=^[-\n])", README.read_text(), re.M | re.S)
        header, *others = sections()
        parts = {re.search(r"─ ([\w ]+) ─", part)[1]: ast.parse(part).body for part in others}
        nodes = {getattr(node, "name", node): node for part in parts.values() for node in part}
        wanted = set(re.findall(r"`(\w+)`", text))
        for start, end in re.findall(r"from\s+`(\w+)`\s+to\s+`(\w+)`", text):
            wanted.update([*nodes][[*nodes].index(start) : [*nodes].index(end)])
        copied = [node for name, node in nodes.items() if name in wanted]
        for title in re.findall(r"the\s+(?!first)(\w+)\s+section", text):
            copied += parts[title]
        exec(
            "\n".join([header, ast.unparse(copied), "x = F.normalize(torch.rand(4, 3))", code]), {"__name__": "pasted"}
        )

    def test_its_claims_are_proved_by_tests_that_exist(self):
        (table,) = re.findall(r"\| claim \| test \|\n\|[-|]+\|\n((?:\|.*\n)+)", README.read_text())
        rows = [re.findall(r"`(\w+)`", row) for row in table.splitlines()]
        assert 10 <= len(rows) <= 16 and all(rows)
        named = {name for row in rows for name in row}
        assert named <= set(re.findall(r"(?:def|class) (\w+)", Path(__file__).read_text()))

    def test_its_table_of_presets_is_that_of_the_file(self):
        (table,) = re.findall(r"(?m)^\| preset \|.*\n(?:\|.*\n)+", README.read_text())
        (_, *presets), _, *rows = [re.findall(r"[^|`\s]+", row) for row in table.splitlines()]
        configs = {preset: dataclasses.asdict(Config.from_preset(preset)) for preset in moco.PRESETS}
        expected = {name: [str(config[name]) for config in configs.values()] for name in moco.HINTS}
        shown = {option.strip("-").replace("-", "_"): values for option, *values in rows}
        assert presets == list(configs)
        assert shown == {name: expected[name] for name in shown}
        assert {name for name, values in expected.items() if len(set(values)) > 1} <= {"preset", *shown}

    def test_its_commands_and_flags_exist_and_its_test_command_is_that_of_ci(self, run):
        text = README.read_text()
        commands = {command.name for command in moco.app.registered_commands}
        assert set(re.findall(r"(?<!-)moco\.py (\w+)", text)) == commands
        known = "".join(run(name, "--help")[1] for name in commands)
        others = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--collect-only"}
        flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) - others
        assert len(flags) > 8 and flags <= set(re.findall(r"--[a-z-]+", known))
        ci = (README.parent / ".ci" / "run").read_text()
        assert re.search(r"&& (pytest.*?) +#", text)[1] == ci.splitlines()[-1]

    def test_a_run_as_in_the_quick_start_learns(self, tmp_path):
        options = dict(arch="resnet10", width=0.125, epochs=1, batch_size=32, device="cpu", precision="fp32")
        *_, row = moco.Run(Config.from_preset("tiny", **options, out=str(tmp_path / "c.pt"))).train()
        assert row["knn"] > 42  # without training: 33
