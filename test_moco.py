"""The specification of moco.py, section by section: every test's name is the sentence that it proves."""

import ast
import builtins
import contextlib
import copy
import csv
import dataclasses
import dis
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import types
import zipfile
from collections import deque
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import rich.console
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as tvf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

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
SEEDS = st.integers(0, 2**31)
TEMPERATURES = st.floats(0.05, 2)


def close(actual, expected, atol=1e-5, rtol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol, check_dtype=False)


def unit(n, dim, seed, dtype=torch.float64):
    return F.normalize(torch.randn(n, dim, generator=rng(seed), dtype=dtype), dim=1)


def images_of(n, height=32, width=32, seed=0):
    return torch.randint(0, 256, (n, 3, height, width), generator=rng(seed), dtype=torch.uint8)


def tiny_config(**options):
    base = dict(data="shapes", width=0.125, bn_splits=2, batch_size=8, moco_k=32, moco_dim=16, epochs=2)
    return Config.from_preset(**{**base, "device": "cpu", "precision": "fp32", "knn_k": 5, **options})


def training(folder, stop=lambda: False, **options):
    return moco.Run(tiny_config(out=str(folder / "c.pt"), **options)).train(stop)


class TestConfig:
    @pytest.mark.parametrize(
        "preset, record",
        {
            "cifar10": dict(batch_size=512, lr=0.06, wd=5e-4, moco_k=4096, moco_m=0.99, moco_t=0.1, moco_dim=128,
                            mlp=True, cos=True, arch="resnet18", stem="cifar", bn_splits=8, aug="cifar", size=32,
                            epochs=100),
            "v1": dict(batch_size=256, lr=0.03, wd=1e-4, moco_k=65536, moco_m=0.999, moco_t=0.07, moco_dim=128,
                       mlp=False, cos=False, schedule=(120, 160), arch="resnet50", stem="imagenet", bn_splits=1,
                       aug="v1", size=224, epochs=200, data="data/imagenet", workers=16),
            "v2": dict(batch_size=256, lr=0.03, wd=1e-4, moco_k=65536, moco_m=0.999, moco_t=0.2, moco_dim=128,
                       mlp=True, cos=True, arch="resnet50", stem="imagenet", bn_splits=1, aug="v2", size=224,
                       epochs=200, data="data/imagenet", workers=16),
            "tiny": dict(data="shapes", width=0.25, bn_splits=2, moco_k=256, moco_m=0.99, moco_t=0.1, aug="v1",
                         epochs=9, batch_size=64, lr=0.06, wd=5e-4, knn_k=20, knn_every=5, arch="resnet18"),
            "cpu": dict(size=24, eval_size=32, cache=True, arch="resnet10", width=0.5, bn_splits=2, mlp_dim=1024,
                        mlp_bn=True, moco_k=256, moco_m=0.9, moco_t=0.1, batch_negatives=True, epochs=44, lr=0.06,
                        batch_size=256, optimizer="muon", warmup_epochs=1.5, knn_every=0, aug="cifar", min_crop=0.2),
        }.items(),
    )  # fmt: skip
    def test_a_preset_holds_the_hyper_parameters_of_record(self, preset, record):
        options = dataclasses.asdict(Config.from_preset(preset))
        assert options == {**dataclasses.asdict(Config()), **record, "preset": preset}

    def test_v2_differs_from_v1_by_head_temperature_views_and_schedule_alone(self):
        v1, v2 = (dataclasses.asdict(Config.from_preset(name)) for name in ("v1", "v2"))
        assert {k for k in v1 if v1[k] != v2[k]} == {"preset", "mlp", "moco_t", "aug", "cos"}

    def test_an_explicit_option_wins_over_the_preset(self):
        config = Config.from_preset("v1", lr=0.5, mlp=True)
        assert (config.lr, config.mlp, config.moco_k) == (0.5, True, 65536)

    @pytest.mark.parametrize(
        "option",
        [
            dict(preset="v3"), dict(arch="vgg"), dict(stem="x"), dict(aug="x"), dict(device="tpu"),
            dict(precision="fp8"),
            dict(moco_t=0), dict(moco_t=-1), dict(moco_t=math.nan), dict(moco_m=-0.1), dict(moco_m=1.1), dict(moco_k=0),
            dict(moco_dim=0), dict(epochs=0), dict(batch_size=0), dict(batch_size=12), dict(batch_size=8), dict(lr=0),
            dict(lr=math.inf), dict(wd=-1), dict(width=0.12), dict(bn_splits=0), dict(knn_k=0), dict(knn_t=0),
            dict(knn_every=-1), dict(workers=-1), dict(size=0), dict(seed=-1), dict(eval_size=-1),
            dict(optimizer="lbfgs"), dict(seed=2**64), dict(min_crop=1.1), dict(bank_m=1.1),
        ],
    )  # fmt: skip
    def test_an_impossible_value_is_refused_by_the_name_of_its_flag(self, option):
        (name,) = option
        with pytest.raises(UserError, match="^" + moco.flag(name)):
            Config.from_preset(**option)

    @pytest.mark.parametrize(
        "line, option",
        {
            "--epochs 0: must be at least 1": dict(epochs=0),
            "--wd inf: must be at least 0 and finite": dict(wd=math.inf),
            "--lr 0: must be above 0 and finite": dict(lr=0),
            "--moco-m 2: must lie in [0, 1]": dict(moco_m=2),
            "--width 99: must lie in [1/8, 99)": dict(width=99),
            "--seed -1: must lie in [0, 2^64)": dict(seed=-1),
            "--stem x: choose from cifar, imagenet": dict(stem="x"),
            "--batch-size 12: must be a multiple of --bn-splits 8, and at least twice that": dict(batch_size=12),
            "--symmetric: --method simclr has no such form; give --no-symmetric": dict(method="simclr", symmetric=True),
        }.items(),
    )
    def test_a_refusal_says_what_must_hold(self, line, option):
        with pytest.raises(UserError) as error:
            Config(**option)
        assert str(error.value) == line

    def test_options_stay_as_they_were_judged(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            Config().lr = -1

    def test_a_choice_is_judged_before_what_it_goes_with(self):
        with pytest.raises(UserError, match="^--method x: choose from"):
            Config(method="x", symmetric=True)

    @pytest.mark.parametrize(
        "option", [dict(seed=2**64 - 1), dict(moco_m=0), dict(moco_m=1), dict(wd=0), dict(width=1 / 8), dict(moco_k=1)]
    )
    def test_a_value_on_the_edge_is_accepted(self, option):
        assert dataclasses.asdict(Config(**option)).items() >= option.items()

    @given(st.integers(0, 10**6), st.integers(0, 10**6))
    def test_a_generator_is_a_function_of_its_key(self, a, b):
        draw = partial(torch.rand, 8)
        assert torch.equal(draw(generator=rng("x", a)), draw(generator=rng("x", a)))
        assert torch.equal(draw(generator=rng("x", a)), draw(generator=rng("x", b))) == (a == b)
        assert not torch.equal(draw(generator=rng("x", a)), draw(generator=rng("y", a)))

    def test_every_part_of_a_generators_key_counts_and_in_its_place(self):
        keys = [("crop", *key) for key in itertools.product((1, 11, 2**64 - 1), repeat=3)]
        assert len({torch.rand(1, generator=rng(*key), dtype=torch.float64).item() for key in keys}) == 27

    def test_a_process_is_known_by_its_rank_among_all_machines(self, monkeypatch):
        assert moco.ranks() == (0, 1)
        for name, value in (("is_initialized", True), ("get_rank", 5), ("get_world_size", 8)):
            monkeypatch.setattr(moco.dist, name, lambda value=value: value)
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, "1")
        assert moco.ranks() == (5, 8)

    def test_processes_agree_on_the_largest_number(self, monkeypatch):
        assert moco.agreed(3) == 3
        monkeypatch.setattr(moco, "gathered", lambda x: torch.cat([0 * x, x, 0 * x]))
        assert moco.agreed(2) == 2


def shape_of(n, i):
    """Draw image i of moco.shapes(n, "train"), pixel by pixel: float64 (3,32,32), in levels of 255."""
    generator, label = rng("shapes", "train"), i % 10
    for other in range(label + 1):
        sizes, count = (1, 1, 1, 1, 2, 1, 1, 3, 3, 3), len(range(other, n, 10))
        drawn = [draws(generator, count, size)[i // 10].tolist() for size in sizes]
        noise = torch.randn(count, 3, 32, 32, generator=generator)[i // 10].double()
    (angle,), (r,), (dy,), (dx,), phase, (pitch,), (light,), *tints = drawn
    angle, r, pitch, image = 2 * math.pi * angle, 0.7 + r / 4, 2 * math.pi * (0.9 + 0.2 * pitch), torch.empty(3, 32, 32)
    waves, texture = [
        (1, lambda u, v: 1), (1.5, lambda u, v: math.sin(u)), (2, lambda u, v: math.sin(u) * math.sin(v)),
        (1.6, lambda u, v: math.cos(u) + math.cos(v) - 0.5), (2.8, lambda u, v: max(math.sin(u), math.sin(v)) - 0.8),
    ][label % 5]  # fmt: skip
    for row, column in itertools.product(range(32), range(32)):
        y, x = (row + 0.5) / 16 - 1 - (dy - 0.5) / 2, (column + 0.5) / 16 - 1 - (dx - 0.5) / 2
        u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        a, b = abs(u) / r, abs(v) / r
        distance = math.hypot(a, b) - 0.9 if label < 5 else min(max(a - 0.35, b - 1), max(b - 0.35, a - 1))
        u, v = (waves * pitch * place + 2 * math.pi * offset for place, offset in zip((u, v), phase))
        inside, ink = (min(max(0.5 + x, 0), 1) for x in (-16 * r * distance, 2 * texture(u, v)))
        for c in range(3):
            ground, paper, pen = ((light + j / 3) % 1 + 0.04 * tints[j][c] - 0.02 for j in range(3))
            image[c, row, column] = (1 - inside) * ground + inside * ((1 - ink) * paper + ink * pen)
    return 255 * (image + 0.02 * noise).clamp(0, 1)


class TestData:
    def test_shapes_are_ten_balanced_classes_the_same_every_time(self):
        (images, labels), (again, _), (test, _) = (
            moco.shapes(50, "train"),
            moco.shapes(50, "train"),
            moco.shapes(50, "test"),
        )
        assert images.shape == (50, 3, 32, 32) and images.dtype == torch.uint8
        assert labels.bincount().tolist() == [5] * 10
        assert torch.equal(images, again) and not torch.equal(images, test)

    @pytest.mark.parametrize("label", range(10))
    def test_a_shape_is_a_disk_or_a_cross_in_one_of_five_textures(self, label):
        image = moco.shapes(20, "train")[0][10 + label].double()
        assert (image - shape_of(20, 10 + label).floor()).abs().max() <= 1

    def test_there_are_6000_shapes_to_train_on_and_2000_others_to_test_on(self, monkeypatch):
        monkeypatch.setattr(moco, "shapes", lambda n, split: (torch.tensor([n]), torch.tensor([split == "test"])))
        data = moco.load_data(tiny_config(), CPU)
        assert (data.train.images, data.test.images, data.test.labels) == (6000, 2000, True)

    @pytest.mark.parametrize("k", [1, 5, 20, 200])
    def test_shapes_are_hard_for_knn_on_raw_pixels(self, k):
        data = moco.load_data(tiny_config(), CPU)
        x, bank = (split.images.flatten(1).float() for split in (data.test, data.train))
        right = knn_predict(x, bank, data.train.labels, 10, k, 0.1) == data.test.labels
        assert right.float().mean() < 0.4

    @pytest.mark.parametrize("name, shape", [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
    def test_cifar_comes_from_torchvision_as_channels_first_uint8(self, monkeypatch, name, shape):
        class Stub:
            def __init__(self, root, train, download):
                assert (root, download) == ("elsewhere", True)
                self.data, self.targets = (
                    images_of(4).permute(0, 2, 3, 1).numpy()[: 4 if train else 2],
                    [0, 1, 2, 1][: 4 if train else 2],
                )

        monkeypatch.setattr(torchvision.datasets, shape, Stub)
        data = moco.load_data(Config(data=name, root="elsewhere"), CPU)
        assert torch.equal(data.train.images, images_of(4)) and data.train.labels.tolist() == [0, 1, 2, 1]
        assert torch.equal(data.test.images, images_of(4)[:2]) and data.test.labels.tolist() == [0, 1]
        assert data.classes == 3

    def test_a_failing_download_names_the_other_ways_on(self, monkeypatch):
        def fail(*_, **__):
            raise RuntimeError("Error downloading\nmore")

        monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
        with pytest.raises(UserError, match=r"^--data cifar10.*--data shapes.*folder") as error:
            moco.load_data(Config(), CPU)
        assert "\n" not in str(error.value)

    def test_a_labelled_folder_gives_every_file_the_number_of_its_class(self, folder):
        data = moco.load_data(Config(data=str(folder)), CPU)
        assert (len(data.train), len(data.test), data.classes) == (20, 8, 2)
        assert all((b"light" in path) == bool(label) for path, label in zip(data.train.paths, data.train.labels))
        assert all(b"val" in path for path in data.test.paths)

    def test_a_test_folder_serves_where_there_is_no_val(self, folder):
        (folder / "val").rename(folder / "test")
        assert len(moco.load_data(Config(data=str(folder)), CPU).test) == 8

    def test_val_goes_before_test_and_its_classes_bear_trains_numbers(self, folder):
        shutil.copytree(folder / "val", folder / "test")
        shutil.rmtree(folder / "val" / "dark")
        shutil.rmtree(folder / "test" / "light")
        data = moco.load_data(Config(data=str(folder)), CPU)
        assert data.test.labels.tolist() == [1] * 4 and all(b"/val/" in path for path in data.test.paths)
        shutil.rmtree(folder / "val")
        assert moco.load_data(Config(data=str(folder)), CPU).classes == 2  # though `test` has but the first

    def test_a_class_is_the_folder_below_train_a_link_or_one_with_folders_of_its_own(self, folder, tmp_path):
        (folder / "train" / "light").rename(tmp_path / "elsewhere")
        (folder / "train" / "light").symlink_to(tmp_path / "elsewhere")
        (folder / "train" / "dark" / "light").mkdir()
        (folder / "train" / "dark" / "0.png").rename(folder / "train" / "dark" / "light" / "0.png")
        assert moco.load_data(Config(data=str(folder)), CPU).train.labels.tolist() == [0] * 10 + [1] * 10

    def test_images_are_found_through_links_and_whatever_the_case_of_their_suffix(self, folder, tmp_path):
        (folder / "train" / "dark" / "0.png").rename(folder / "train" / "dark" / "0.PNG")
        (tmp_path / "linked").symlink_to(folder / "train")
        (tmp_path / "all").mkdir()
        (tmp_path / "linked").rename(tmp_path / "all" / "linked")
        assert len(moco.load_data(Config(data=str(tmp_path / "all")), CPU).train) == 20

    @pytest.mark.parametrize("name", ["Zürich.JPG", *(f"0{suffix}" for suffix in IMG_EXTENSIONS)])
    def test_a_file_is_decoded_as_torchvisions_image_folder_decodes_it(self, tmp_path, name):
        exif = PIL.Image.Exif()
        exif[0x0112] = 6  # to be turned, by those who heed it
        image = tvf.to_pil_image(images_of(1, 700, 1100)[0])
        image.convert("L" if name.endswith(".pgm") else "RGB").save(path := tmp_path / name, exif=exif)
        data = moco.load_data(Config(data=str(tmp_path), workers=0), CPU)
        (batch,) = data.train.batches([(0, torch.tensor([0]))], moco.whole)
        assert torch.equal(batch[0], tvf.pil_to_tensor(default_loader(path)))

    @pytest.mark.parametrize("kind", ["cpu", "cuda"])
    def test_workers_look_paths_up_in_an_array_which_they_do_not_write_to(self, folder, monkeypatch, kind):
        seen = {}
        monkeypatch.setattr(moco, "DataLoader", lambda dataset, *_, **o: seen.update(o, paths=dataset.paths) or [])
        data = moco.load_data(Config(data=str(folder), workers=3), torch.device(kind))
        assert list(data.train.batches([], moco.whole)) == []
        assert isinstance(seen["paths"], np.ndarray) and seen["paths"].dtype.kind == "S"
        assert (seen["num_workers"], seen["pin_memory"]) == (3, kind == "cuda")

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
    def test_grey_transparent_and_palette_images_are_read_as_rgb(self, tmp_path, mode):
        image = tvf.to_pil_image(images_of(1)[0]).convert(mode)
        image.save(tmp_path / "0.png")
        data = moco.load_data(Config(data=str(tmp_path), workers=0), CPU)
        (batch,) = data.train.batches([(0, torch.tensor([0]))], moco.whole)
        assert torch.equal(batch[0], tvf.pil_to_tensor(image.convert("RGB")))

    def test_any_other_tree_is_all_its_images_without_labels(self, folder):
        (folder / "train" / "notes.txt").write_text("no image")
        data = moco.load_data(Config(data=str(folder / "train")), CPU)
        assert len(data.train) == 20 and data.train.labels is None and data.test is None

    @pytest.mark.parametrize("paths", [["val/a/0.png"], ["train/0.png", "val/a/0.png"], ["train/a/0.png"]])
    def test_images_have_labels_if_there_are_classes_to_train_on_and_images_to_test_on(self, tmp_path, paths):
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True)
            tvf.to_pil_image(images_of(1)[0]).save(tmp_path / path)
        data = moco.load_data(Config(data=str(tmp_path)), CPU)
        assert len(data.train) == len(paths) and data.train.labels is None and data.test is None

    @pytest.mark.parametrize("kind", ["built in", "streamed", "cached"])
    def test_images_come_onto_the_device_and_labels_with_those_in_memory(self, few, tmp_path, kind):
        for path in (tmp_path / "train/a/0.png", tmp_path / "val/a/0.png"):
            path.parent.mkdir(parents=True)
            tvf.to_pil_image(images_of(1)[0]).save(path)
        place = "shapes" if kind == "built in" else str(tmp_path)
        data = moco.load_data(Config(data=place, cache=kind == "cached", workers=0), torch.device("meta"))
        for split in (data.train, data.test):
            (images,) = split.batches([(0, torch.tensor([0]))], Augment().centre)
            assert images.device.type == "meta" and images.dtype == torch.uint8
            assert split.labels.device.type == ("cpu" if kind == "streamed" else "meta")

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_streamed_batch_holds_the_two_crops_of_each_image(self, folder, workers):
        data = moco.load_data(Config(data=str(folder), workers=workers), CPU)
        views = SplitTwoViews(Augment(size=16), seed=3)
        keys = [(0, torch.tensor([1, 4])), (5, torch.tensor([4, 0, 2]))]
        for (epoch, indices), batch in zip(keys, data.train.batches(iter(keys), views.two_crops), strict=True):
            assert batch.shape == (2, len(indices), 3, 16, 16) and batch.dtype == torch.uint8
            for j, i in enumerate(indices.tolist()):
                image = tvf.pil_to_tensor(default_loader(os.fsdecode(data.train.paths[i])))
                boxes = moco.crop_boxes(draws(rng("crop", 3, epoch, i), 2, 4, 10), *image.shape[1:], (0.08, 1))
                for v in range(2):
                    assert torch.equal(
                        batch[v, j], tvf.resized_crop(image, *boxes[v].tolist(), [16, 16], antialias=True)
                    )

    @pytest.mark.parametrize("workers, content", [
        (0, b"no image"), (1, b"no image"), (0, b"P6 20000 20000 255\n"), (0, "a part"),
    ])  # fmt: skip
    def test_a_file_that_is_no_whole_image_or_far_too_large_is_named(self, folder, workers, content):
        bad = folder / "train" / "dark" / "0.png"
        bad.write_bytes(bad.read_bytes()[:900] if content == "a part" else content)
        data = moco.load_data(Config(data=str(folder), workers=workers), CPU)
        with pytest.raises(UserError) as error:
            list(data.train.batches([(0, torch.arange(20))], Augment().centre))
        assert str(error.value).startswith(str(bad)) and "\n" not in str(error.value)

    @pytest.mark.parametrize("mode", ["I;16", "I", "F"])
    def test_an_image_of_more_than_8_bits_is_refused_where_torchvision_would_cut_it_off(self, tmp_path, mode):
        PIL.Image.new(mode, (20, 20), 3000).save(path := tmp_path / "deep.tiff")
        assert tvf.pil_to_tensor(default_loader(path)).min() == 255
        data = moco.load_data(Config(data=str(tmp_path), workers=0), CPU)
        with pytest.raises(UserError, match=r"deep.tiff: more than 8 bits a channel"):
            list(data.train.batches([(0, torch.arange(1))], Augment().centre))

    def test_a_missing_or_empty_folder_or_a_stray_class_is_refused(self, folder, tmp_path):
        (tmp_path / "empty").mkdir()
        (folder / "val" / "dark").rename(folder / "val" / "stray")
        for place, words in (
            (tmp_path / "none", "no such folder"),
            (tmp_path / "empty", "no images"),
            (folder, "stray"),
        ):
            with pytest.raises(UserError, match=f"^--data .*{words}"):
                moco.load_data(Config(data=str(place)), CPU)
        (folder / "val" / "stray").rename(folder / "val" / "dark")
        (folder / "train" / "dark" / "0.png").rename(folder / "train" / "lost.png")
        with pytest.raises(UserError, match="^--data .*lost.png belongs to no class"):
            moco.load_data(Config(data=str(folder)), CPU)

    def test_a_cached_folder_is_held_in_memory_as_it_was_decoded(self, folder):
        with pytest.raises(UserError, match="^--cache: the images differ in size"):
            moco.load_data(Config(data=str(folder), cache=True, workers=0), CPU)
        (folder / "train" / "dark" / "0.png").unlink()
        for path in folder.rglob("*.png"):
            tvf.to_pil_image(images_of(1, seed=int(path.stem))[0]).save(path)
        data = moco.load_data(Config(data=str(folder), cache=True, workers=1), CPU)
        streamed = moco.load_data(Config(data=str(folder)), CPU)
        assert isinstance(data.train, InMemory) and torch.equal(data.train.labels, streamed.train.labels)
        for image, path in zip(data.train.images, streamed.train.paths, strict=True):
            assert torch.equal(image, tvf.pil_to_tensor(default_loader(os.fsdecode(path))))

    def test_a_large_cached_folder_keeps_its_order(self, tmp_path):
        for i in range(1040):
            PIL.Image.new("RGB", (1, 1), (i % 256, i // 256, 0)).save(tmp_path / f"{i:04}.ppm")
        images = moco.load_data(Config(data=str(tmp_path), cache=True, workers=0), CPU).train.images.long()
        assert torch.equal(images[:, 0, 0, 0] + 256 * images[:, 1, 0, 0], torch.arange(1040))

    def test_what_is_wrong_but_the_size_is_not_said_to_be_the_size(self, folder, monkeypatch):
        def fail(*_):
            raise RuntimeError("can't allocate memory")

        monkeypatch.setattr(moco.Folder, "batches", fail)
        with pytest.raises(RuntimeError, match="allocate"):
            moco.load_data(Config(data=str(folder / "train"), cache=True, workers=0), CPU)

    def test_images_in_memory_are_trained_on_whole(self):
        views = SplitTwoViews(Augment(size=16))
        batches = list(InMemory(images_of(5), torch.zeros(5)).batches([(0, torch.tensor([3, 1]))], views.two_crops))
        assert len(batches) == 1 and torch.equal(batches[0], images_of(5)[[3, 1]])


class TestViews:
    @given(SEEDS, st.integers(4, 40), st.integers(4, 40), st.integers(1, 40))
    def test_a_crop_is_torchvisions_resized_crop(self, seed, height, width, size):
        x, boxes = (
            torch.rand(3, 3, height, width),
            moco.crop_boxes(draws(rng(seed), 3, 4, 10), height, width, (0.08, 1)),
        )
        for image, box, actual in zip(x, boxes.tolist(), moco.crop(x, boxes, size), strict=True):
            close(actual, tvf.resized_crop(image, *box, [size, size], antialias=True))

    def test_a_crop_may_be_the_whole_image_and_the_first_try_that_fits_counts(self):
        u = torch.full((1, 4, 10), 0.5)
        u[0, 0] = torch.linspace(1, 0, 10)  # ever smaller areas
        assert moco.crop_boxes(u, 4, 4, (0.2, 1)).tolist() == [[0, 0, 4, 4]]
        assert moco.crop_boxes(u, 4, 4, (0.2, 2)).tolist() == [[0, 0, 4, 4]]  # the fifth

    def test_a_crop_may_be_one_pixel_wide_or_high(self):
        u = torch.full((1, 4, 10), 0.5)
        for ratio, (height, width), box in ((0, (4, 1), [1, 0, 2, 1]), (1, (1, 4), [0, 1, 1, 2])):
            u[0, 1] = ratio
            assert moco.crop_boxes(u, height, width, (0.5, 0.5)).tolist() == [box]

    @given(SEEDS, st.integers(1, 60), st.integers(1, 60))
    def test_a_crop_box_lies_within_the_image(self, seed, height, width):
        top, left, h, w = moco.crop_boxes(draws(rng(seed), 50, 4, 10), height, width, (0.08, 1)).T
        assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
        assert (top + h <= height).all() and (left + w <= width).all()

    @pytest.mark.parametrize("height, width, scale", [(32, 32, (0.08, 1)), (40, 90, (0.2, 1)), (10, 100, (0.5, 1))])
    def test_crop_boxes_have_torchvisions_distribution(self, height, width, scale):
        n, image = 4000, torch.empty(3, height, width)
        ours = moco.crop_boxes(draws(rng(1), n, 4, 10), height, width, scale).double()
        params = T.RandomResizedCrop.make_params if hasattr(T.RandomResizedCrop, "make_params") else None
        transform = T.RandomResizedCrop(8, scale=scale)
        draw = params or T.RandomResizedCrop._get_params
        theirs = [draw(transform, [image]) for _ in range(n)]
        theirs = torch.tensor([[p[k] for k in ("top", "left", "height", "width")] for p in theirs]).double()
        for a, b in zip(ours.T, theirs.T, strict=True):
            assert kolmogorov_smirnov(a, b) < 1.95 * math.sqrt(2 / n)  # false alarm: 1 in 1000 each, seeds are fixed

    def test_a_crops_place_area_and_ratio_are_independent(self):
        top, left, h, w = moco.crop_boxes(draws(rng(1), 4000, 4, 10), 200, 200, (0.08, 0.5)).double().T
        drawn = torch.stack([top / (200 - h), left / (200 - w), h * w, (h / w).log()])
        assert uncorrelated(drawn)

    def test_where_no_crop_fits_it_is_the_centre_of_ratio_4_to_3_either_way(self):
        lies, stands = (moco.crop_boxes(torch.full((1, 4, 10), 0.5), *hw, (1, 1)) for hw in ((10, 100), (100, 10)))
        assert lies.tolist() == [[0, 43, 10, 13]] and stands.tolist() == [[43, 0, 13, 10]]

    @pytest.mark.parametrize("operation, name", list(enumerate(("brightness", "contrast", "saturation"))))
    @given(seed=SEEDS, factors=st.lists(st.floats(0, 2), min_size=2, max_size=2))
    def test_a_blend_is_torchvisions_adjustment(self, operation, name, seed, factors):
        x = torch.rand(2, 3, 7, 5, generator=rng(seed))
        column = torch.tensor(factors)[:, None, None, None]
        actual = moco.blend(x, torch.full((2, 1, 1, 1), operation), column)
        for image, factor, result in zip(x, factors, actual, strict=True):
            close(result, getattr(tvf, f"adjust_{name}")(image, factor))

    @given(SEEDS, st.lists(st.floats(-0.5, 0.5), min_size=3, max_size=3), st.integers(2, 255))
    def test_a_hue_shift_is_torchvisions_in_turns_of_the_circle(self, seed, turns, levels):
        x = torch.randint(0, levels, (3, 3, 5, 4), generator=rng(seed)) / (levels - 1)  # few levels: ties and greys
        for image, turn, actual in zip(
            x, turns, moco.shift_hue(x, torch.tensor(turns)[:, None, None, None]), strict=True
        ):
            close(actual, tvf.adjust_hue(image, turn), atol=2e-5)

    @given(SEEDS)
    def test_colour_jitter_applies_the_four_operations_in_each_images_order(self, seed):
        g = rng(seed)
        x, order = torch.rand(6, 3, 4, 4, generator=g), torch.rand(6, 4, generator=g).argsort(1)
        factors = torch.cat([0.6 + 0.8 * torch.rand(6, 3, generator=g), torch.rand(6, 1, generator=g) - 0.5], 1)
        adjust = tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue
        for i, actual in enumerate(moco.colour_jitter(x, order, factors)):
            expected = x[i]
            for operation in order[i].tolist():
                expected = adjust[operation](expected, factors[i, operation].item())
            close(actual, expected, atol=1e-4)

    @given(SEEDS, st.lists(st.floats(0.1, 2), min_size=2, max_size=2), st.sampled_from([5, 20, 40, 112, 224]))
    def test_a_blur_is_torchvisions_with_a_kernel_of_a_tenth_of_the_side(self, seed, sigmas, size):
        x, kernel = torch.rand(2, 3, size, size, generator=rng(seed)), size // 20 * 2 + 1
        for image, sigma, actual in zip(x, sigmas, moco.gaussian_blur(x, torch.tensor(sigmas)[:, None]), strict=True):
            close(actual, tvf.gaussian_blur(image, [kernel, kernel], [sigma, sigma]))

    def test_grey_is_torchvisions_luma_and_flip_its_horizontal_flip(self):
        x = torch.rand(2, 3, 6, 5)
        close(moco.TRANSFORMS["grey"](x, None).expand_as(x), tvf.rgb_to_grayscale(x, 3))
        assert torch.equal(moco.TRANSFORMS["flip"](x, None), tvf.horizontal_flip(x))

    def test_jitter_draws_uniform_factors_and_every_order(self, monkeypatch):
        monkeypatch.setattr(moco, "colour_jitter", lambda x, order, factors: (order, factors))
        order, factors = moco.random_jitter(torch.empty(9600, 0), partial(draws, rng(2)), 0.4, 0.3, 0.2, 0.1)
        for column, low, high in zip(factors.T, (0.6, 0.7, 0.8, -0.1), (1.4, 1.3, 1.2, 0.1), strict=True):
            uniform = torch.linspace(low, high, 9600)
            assert kolmogorov_smirnov(column, uniform) < 1.95 / math.sqrt(9600)  # false alarm: 1 in 1000
        counts = (order * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)[1]
        assert len(counts) == 24 and ((counts - 400) ** 2 / 400).sum() < 49.7  # chi-squared, 23 degrees: 1 in 1000
        assert uncorrelated(factors.T)
        places = order.argsort(1).double().T
        assert torch.cat([places, factors.double().T]).corrcoef()[:4, 4:].abs().max() < 4.2 / math.sqrt(
            9600
        )  # 1 in 2000

    def test_blur_draws_sigma_uniformly_image_by_image(self, monkeypatch):
        monkeypatch.setattr(moco, "gaussian_blur", lambda x, sigma: sigma)
        sigma = moco.TRANSFORMS["blur"](torch.empty(9600, 0), partial(draws, rng(3)), 0.1, 2.0)
        assert sigma.shape == (9600, 1)
        assert kolmogorov_smirnov(sigma[:, 0], torch.linspace(0.1, 2, 9600)) < 1.95 / math.sqrt(9600)  # 1 in 1000

    @pytest.mark.parametrize("name, p", [("flip", 0.5), ("jitter", 0.8), ("grey", 0.2), ("blur", 0.5)])
    def test_a_step_is_taken_with_its_probability_image_by_image(self, monkeypatch, name, p):
        monkeypatch.setitem(moco.TRANSFORMS, name, lambda x, draw, *_: x + 5)
        for other in set(moco.TRANSFORMS) - {name}:
            monkeypatch.setitem(moco.TRANSFORMS, other, lambda x, draw, *_: x)
        augment = Augment("v2", 1)
        taken = (
            augment.finish(torch.zeros(4000, 3, 1, 1), rng(0)).flatten(1)[:, 0]
            > augment.normalise(torch.ones(1, 3, 1, 1)).max()
        )
        assert abs(taken.float().mean() - p) < 3.3 * math.sqrt(p * (1 - p) / 4000)  # false alarm: 1 in 1000

    def test_steps_are_chosen_independently(self, monkeypatch):
        for bit, name in enumerate(moco.TRANSFORMS):
            monkeypatch.setitem(moco.TRANSFORMS, name, lambda x, draw, *_, bit=bit: x + 2**bit)
        augment = Augment("v2", 1)
        x = augment.restore(augment.finish(torch.zeros(4000, 3, 1, 1), rng(0)))[:, 0, 0, 0].round().long()
        assert uncorrelated(torch.stack([(x >> bit & 1).double() for bit in range(4)]))

    @pytest.mark.parametrize(
        "aug, scale, steps",
        [
            ("cifar", (0.08, 1), "flip 0.5, jitter 0.8 0.4 0.4 0.4 0.1, grey 0.2"),
            ("v1", (0.2, 1), "grey 0.2, jitter 1 0.4 0.4 0.4 0.4, flip 0.5"),
            ("v2", (0.2, 1), "jitter 0.8 0.4 0.4 0.4 0.1, grey 0.2, blur 0.5 0.1 2.0, flip 0.5"),
        ],
    )
    def test_a_recipe_has_the_order_and_strengths_of_record(self, monkeypatch, aug, scale, steps):
        seen = []
        for name in moco.TRANSFORMS:
            monkeypatch.setitem(
                moco.TRANSFORMS, name, lambda x, draw, *s, name=name: seen.append(" ".join(map(str, (name, *s)))) or x
            )
        Augment(aug, 8)(images_of(2), rng(0))
        assert seen == [re.sub(r"^(\w+) [\d.]+", r"\1", step) for step in steps.split(", ")]
        assert moco.RECIPES[aug].scale == scale
        assert [" ".join(map(str, step)) for step in moco.RECIPES[aug].transforms] == steps.split(", ")

    @pytest.mark.parametrize("min_crop, smallest", [(0, 0.2), (0.6, 0.6), (1, 1)])
    def test_min_crop_takes_the_place_of_the_recipes_smallest_crop(self, monkeypatch, min_crop, smallest):
        monkeypatch.setitem(moco.RECIPES, "one", moco.Recipe((0.2, 1), ()))
        augment, images = Augment("one", 8, min_crop), images_of(4)
        boxes = moco.crop_boxes(draws(rng(0), 4, 4, 10), 32, 32, (smallest, 1))
        close(augment(images, rng(0)), augment.normalise(moco.crop(images / 255, boxes, 8)))
        boxes = moco.crop_boxes(draws(rng("crop", 3, 5, 7), 2, 4, 10), 32, 32, (smallest, 1)).tolist()
        streamed = [tvf.resized_crop(images[0], *box, [8, 8], antialias=True) for box in boxes]
        assert torch.equal(SplitTwoViews(augment, 3).two_crops(images[0], 5, 7), torch.stack(streamed))

    @pytest.mark.parametrize("aug", moco.RECIPES)
    def test_every_image_and_both_views_get_draws_of_their_own(self, aug, device):
        one = images_of(1).expand(6, -1, -1, -1).to(device)
        x_q, x_k = SplitTwoViews(Augment(aug, 24))(one, rng(0))
        views = torch.cat([x_q, x_k])
        assert views.shape == (12, 3, 24, 24) and views.dtype == torch.float32 and views.device.type == device
        assert (torch.cdist(views.flatten(1), views.flatten(1)) + 99 * torch.eye(12, device=device) > 0.1).all()

    @pytest.mark.parametrize("steps", [(), (("jitter", 1, 0.4, 0.4, 0.4, 0.1),), (("blur", 1, 0.1, 2.0),)])
    def test_crop_jitter_and_blur_draw_for_every_image_apart(self, monkeypatch, steps):
        monkeypatch.setitem(moco.RECIPES, "one", moco.Recipe((0.08, 1), steps))
        augment, one = Augment("one", 24), images_of(1, 24, 24).expand(6, -1, -1, -1)
        views = augment.finish(one / 255, rng(0)) if steps else augment(one, rng(0))
        assert len(views.flatten(1).unique(dim=0)) == 6

    @pytest.mark.parametrize("aug", moco.RECIPES)
    def test_processes_draw_for_their_share_what_one_draws_for_the_whole(self, monkeypatch, aug):
        views, images = SplitTwoViews(Augment(aug, 24)), images_of(8)
        whole = views(images, rng(0))
        for rank in (0, 1):
            monkeypatch.setattr(moco, "ranks", lambda rank=rank: (rank, 2))
            part = slice(4 * rank, 4 * rank + 4)
            for mine, all_of_them in zip(views(images[part], rng(0)), whole, strict=True):
                close(mine, all_of_them[part])

    def test_views_add_nothing_to_a_checkpoint(self):
        assert not Augment().state_dict()

    @given(SEEDS)
    def test_views_are_a_function_of_images_and_seed(self, seed):
        for images in (images_of(3), torch.stack([images_of(3), images_of(3, seed=1)])):
            pairs = [SplitTwoViews(Augment())(images, rng(seed)) for _ in range(2)]
            assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))

    def test_both_views_of_a_streamed_image_are_finished_by_draws_of_their_own(self):
        x_q, x_k = SplitTwoViews(Augment("cifar", 32))(images_of(4)[None].expand(2, -1, -1, -1, -1), rng(0))
        assert ((x_q - x_k).flatten(1).abs().amax(1) > 0.1).all()

    def test_of_streamed_crops_each_view_finishes_its_own(self):
        augment, pair = Augment("cifar", 8), torch.stack([images_of(2, 8, 8), images_of(2, 8, 8, seed=1)])
        augment.finish = lambda x, generator: x
        assert torch.equal(torch.stack(SplitTwoViews(augment)(pair, rng(0))), pair / 255)

    @pytest.mark.parametrize("streamed", [False, True])
    def test_views_are_the_same_under_autocast(self, streamed):
        views, images = SplitTwoViews(Augment("v2", 16)), images_of(4)
        images = images.expand(2, 4, 3, 32, 32)[..., :16, :16] if streamed else images
        with torch.autocast("cpu", torch.bfloat16):
            cast = views(images, rng(0))
        assert same(cast, views(images, rng(0))) and cast[0].dtype == torch.float32

    @pytest.mark.parametrize(
        "images", [torch.rand(4, 3, 8, 8), images_of(1)[0], images_of(4)[:, :1]], ids=["float", "one", "grey"]
    )
    def test_images_that_are_not_a_batch_of_bytes_in_rgb_are_a_type_error(self, images):
        with pytest.raises(TypeError, match=r"uint8 \(N,3,H,W\), not torch"):
            Augment(size=8)(images, rng(0))

    def test_views_are_normalised_by_the_recipes_mean_and_deviation(self):
        x = torch.rand(2, 3, 4, 4)
        recipe = moco.RECIPES["cifar"]
        close(Augment("cifar").normalise(x), tvf.normalize(x, list(recipe.mean), list(recipe.std)))
        assert all(moco.RECIPES[name].mean == (0.485, 0.456, 0.406) for name in ("v1", "v2"))
        assert all(moco.RECIPES[name].std == (0.229, 0.224, 0.225) for name in ("v1", "v2"))
        assert (recipe.mean, recipe.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))

    def test_evaluation_takes_the_whole_small_image_and_the_centre_of_a_large_one(self):
        images = images_of(2)
        assert torch.equal(Augment("cifar", 32).centre(images), images)
        large = images_of(1, 300, 400)
        for aug in ("v1", "v2"):
            expected = tvf.center_crop(tvf.resize(large, [256], antialias=True), [224, 224])
            assert torch.equal(Augment(aug, 224).centre(large), expected)

    @pytest.mark.parametrize("aug, side", [("cifar", 28), ("v1", 32), ("v2", 32)])
    def test_evaluation_enlarges_an_image_that_is_smaller(self, aug, side):
        for small in (images_of(1, 20, 20), images_of(1, 30, 30)):
            expected = tvf.center_crop(tvf.resize(small, [side], antialias=True), [28, 28])
            assert torch.equal(Augment(aug, 28).centre(small), expected)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
    @pytest.mark.parametrize("aug", moco.RECIPES)
    def test_views_on_cuda_are_those_on_the_cpu(self, aug):
        here, there = (SplitTwoViews(Augment(aug, 24))(images_of(8).to(d), rng(0)) for d in ("cpu", "cuda"))
        for a, b in zip(here, there, strict=True):
            close(b.cpu(), a, atol=1e-3)


def draws(generator, *shape):
    return torch.rand(shape, generator=generator)


def kolmogorov_smirnov(a, b):
    """Return the largest distance between two samples' distribution functions."""
    points = torch.cat([a, b]).sort()[0]
    below = [torch.searchsorted(x.sort()[0].contiguous(), points, right=True) / len(x) for x in (a, b)]
    return (below[0] - below[1]).abs().max()


def uncorrelated(rows):
    """Tell whether no two rows of samples are correlated; false alarm: 1 in 1000 for six pairs."""
    return (rows.corrcoef() - torch.eye(len(rows))).abs().max() < 3.9 / math.sqrt(rows.shape[1])


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
        weight = torch.randn_like(expected)
        gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours(x), expected)]
        close(ours(x), expected, atol=1e-10, rtol=0)
        close(*gradients, atol=1e-9)

    @pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, None])
    @pytest.mark.parametrize("splits", [1, 2, 5])
    def test_the_running_statistics_move_once_by_the_mean_of_the_groups(self, splits, momentum):
        ours, x = (
            SplitBatchNorm(3, splits, momentum=momentum).double(),
            torch.randn(3, 10, 3, 2, 2, dtype=torch.float64),
        )
        mean, var = torch.zeros(3).double(), torch.ones(3).double()
        for step, batch in enumerate(x, 1):
            ours(batch)
            f = 1 / step if momentum is None else momentum
            groups = [g.transpose(0, 1).flatten(1) for g in batch.chunk(splits)]
            mean = (1 - f) * mean + f * torch.stack([g.mean(1) for g in groups]).mean(0)
            var = (1 - f) * var + f * torch.stack([g.var(1) for g in groups]).mean(0)
            close(ours.running_mean, mean, atol=1e-12)
            close(ours.running_var, var, atol=1e-12)
            assert ours.num_batches_tracked == step

    def test_in_eval_mode_split_batch_norm_is_batch_norm(self):
        ours, x = SplitBatchNorm(3, 4), torch.randn(8, 3, 2, 2)
        ours(x)
        ours.eval()
        assert torch.equal(ours(x[:3]), copy_of(ours).eval()(x[:3])) and ours.num_batches_tracked == 1

    def test_split_batch_norm_bears_batch_norms_names_and_options(self):
        assert list(SplitBatchNorm(3).state_dict()) == list(nn.BatchNorm2d(3).state_dict())
        assert repr(SplitBatchNorm(3, 2, eps=0.5)).startswith("SplitBatchNorm(3, eps=0.5, ")
        assert repr(SplitBatchNorm(3, 2)).endswith(", num_splits=2)")
        untracked = SplitBatchNorm(3, 2, track_running_stats=False)
        close(untracked(x := torch.randn(4, 3, 2, 2)), SplitBatchNorm(3, 2)(x))
        close(untracked.eval()(x), nn.BatchNorm2d(3)(x))

    def test_a_batch_that_cannot_be_cut_evenly_is_a_value_error(self):
        with pytest.raises(ValueError, match="batch of 7 .* 2 equal"):
            SplitBatchNorm(3, 2)(torch.randn(7, 3, 2, 2))
        assert SplitBatchNorm(3, 2).eval()(torch.randn(7, 3, 2, 2)).shape == (7, 3, 2, 2)

    @pytest.mark.parametrize("training", [True, False])
    def test_features_are_normalised_as_maps_of_one_pixel_and_other_shapes_refused(self, training):
        x, norm = torch.randn(6, 3), SplitBatchNorm(3, 2).train(training)
        assert torch.equal(norm(x), norm(x[:, :, None, None])[:, :, 0, 0])
        with pytest.raises(ValueError, match="4D"):
            norm(x[:, :, None])

    def test_split_batch_norm_keeps_channels_last(self):
        x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
        assert SplitBatchNorm(3, 2)(x).is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize(
        "arch, stem", [("resnet18", "cifar"), *((arch, "imagenet") for arch in ("resnet18", "resnet34", "resnet50"))]
    )
    def test_it_is_torchvisions_resnet_but_for_a_cifar_stem_of_one_3x3_convolution(self, arch, stem):
        theirs = getattr(torchvision.models, arch)(weights=None, num_classes=7)
        if stem == "cifar":
            theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        theirs, ours = theirs.double(), ResNetEncoder(arch, dim=7, mlp=False, bn_splits=1, stem=stem).double()
        ours.load_state_dict(theirs.state_dict(), strict=True)
        for training in (True, False):  # the first moves the running statistics that the second uses
            x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
            expected = theirs.train(training)(x)
            close(ours.train(training)(x), expected, atol=1e-9)
            assert expected.std(0).min() > 1e-4

    @pytest.mark.parametrize("arch", moco.ARCHS)
    def test_every_architecture_has_torchvisions_layers(self, arch):
        build = {  # two that torchvision has no name for
            "resnet10": partial(ResNet, BasicBlock, [1, 1, 1, 1]),
            "resnext50_32x8d": partial(ResNet, Bottleneck, [3, 4, 6, 3], groups=32, width_per_group=8),
        }.get(arch, partial(torchvision.models.get_model, arch))
        with torch.device("meta"):
            ours, theirs = ResNetEncoder(arch, dim=1000, mlp=False, stem="imagenet"), build()
        a, b = ([(name, x.shape) for name, x in model.state_dict().items()] for model in (ours, theirs))
        assert a == b

    @pytest.mark.parametrize(
        "arch, width, millions",
        [
            ("resnet10", 1, 4.9),
            ("resnet18", 1, 11.2),
            ("resnet101", 1, 42.5),
            ("resnet50", 1, 23.5),
            ("resnext50_32x8d", 1, 46),
            ("resnet50", 2, 94),
            ("resnet50", 4, 375),
        ],
    )
    def test_a_backbone_has_the_papers_number_of_parameters(self, arch, width, millions):
        with torch.device("meta"):
            encoder = ResNetEncoder(arch, width=width, stem="imagenet", bn_splits=1)
        backbone = sum(p.numel() for name, p in encoder.named_parameters() if not name.startswith("fc."))
        assert abs(backbone / 1e6 - millions) < 0.6 * max(1, millions / 300)

    @pytest.mark.parametrize(
        "mlp, names",
        [(True, ["fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias"]), (False, ["fc.weight", "fc.bias"])],
    )
    def test_the_head_is_linear_or_of_two_layers_under_the_official_names(self, mlp, names):
        encoder = ResNetEncoder("resnet18", dim=9, mlp=mlp, width=0.125)
        assert [name for name in encoder.state_dict() if name.startswith("fc.")] == names
        assert encoder.state_dict()[names[-2]].shape == (9, encoder.feature_dim)

    def test_mlp_bn_puts_a_split_batch_norm_before_the_heads_relu(self):
        linear, norm, relu, last = ResNetEncoder(dim=9, width=0.125, bn_splits=3, mlp_dim=7, mlp_bn=True).fc
        assert (linear.in_features, linear.out_features, last.in_features, last.out_features) == (64, 7, 7, 9)
        assert isinstance(norm, SplitBatchNorm) and (norm.num_features, norm.num_splits) == (7, 3)
        assert isinstance(relu, nn.ReLU) and ResNetEncoder(width=0.125).fc[0].out_features == 64
        assert isinstance(ResNetEncoder(mlp=False, mlp_bn=True, width=0.125).fc, nn.Linear)

    @pytest.mark.parametrize("stem, size", [("cifar", 4), ("imagenet", 1)])
    def test_features_are_pooled_from_a_map_an_eighth_or_a_thirty_second_as_wide(self, stem, size):
        encoder, maps = ResNetEncoder(width=0.25, stem=stem, bn_splits=2), []
        encoder.layer4.register_forward_hook(lambda *args: maps.append(args[-1]))
        features = encoder.features(torch.randn(4, 3, 32, 32))
        assert maps[0].shape == (4, 128, size, size) and encoder.feature_dim == 128
        close(features, maps[0].mean((2, 3)))
        close(encoder(torch.zeros(4, 3, 32, 32)), encoder.fc(encoder.features(torch.zeros(4, 3, 32, 32))))

    def test_convolutions_start_from_hes_normal_distribution_of_their_fan_out(self):
        for conv in (m for m in ResNetEncoder().modules() if isinstance(m, nn.Conv2d)):
            deviation = math.sqrt(2 / (conv.out_channels * conv.kernel_size[0] ** 2))
            assert abs(conv.weight.std() / deviation - 1) < 0.1 and conv.bias is None
            assert abs((conv.weight.abs() > 2 * deviation).float().mean() - 0.0455) < 0.02

    def test_the_heads_layers_start_as_torchs_linear_layers_do(self):
        for layer in ResNetEncoder().fc[::2]:
            close(layer.weight.abs().max(), torch.tensor(512**-0.5), rtol=1e-3)
            close(layer.weight.std(), torch.tensor((3 * 512) ** -0.5), rtol=0.02)

    def test_width_multiplies_all_channels_and_the_rest_is_cut_off(self):
        encoders = [ResNetEncoder("resnet10", width=width) for width in (0.125, 0.3, 0.7, 1.5)]
        assert [(e.conv1.out_channels, e.feature_dim) for e in encoders] == [(8, 64), (19, 152), (44, 352), (96, 768)]

    def test_every_batch_norm_of_the_encoder_is_split_and_starts_as_torchs_own(self):
        encoder, default = ResNetEncoder("resnet50", width=0.125, bn_splits=3, mlp_bn=True), nn.BatchNorm2d(1)
        norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == 54 and all(isinstance(m, SplitBatchNorm) and m.num_splits == 3 for m in norms)
        assert all((m.eps, m.momentum) == (default.eps, default.momentum) for m in norms)
        assert all((m.weight == 1).all() and (m.bias == 0).all() for m in norms)


def copy_of(bn):
    """Return torch's own BatchNorm2d with the options and the state of ours."""
    plain = nn.BatchNorm2d(bn.num_features, bn.eps, bn.momentum, bn.affine).to(bn.running_mean)
    plain.load_state_dict(bn.state_dict())
    return plain


class TestInfoNCE:
    @given(SEEDS, st.integers(1, 6), st.integers(1, 8), st.integers(0, 9), TEMPERATURES)
    def test_the_loss_and_its_gradients_are_cross_entropys_over_k_plus_1_logits(self, seed, n, dim, K, t):
        q, k, negatives = unit(n, dim, seed), unit(n, dim, seed + 1), unit(K, dim, seed + 2).T
        inputs = [x.requires_grad_() for x in (q, k, negatives)]
        rows = [torch.stack([q[i] @ k[i], *(q[i] @ negatives[:, j] for j in range(K))]) / t for i in range(n)]
        expected = torch.stack([row.exp().sum().log() - row[0] for row in rows]).mean()
        actual = info_nce(q, k, negatives, t)
        close(actual, expected, atol=1e-9)
        gradients = [
            torch.autograd.grad(x, inputs, materialize_grads=True, allow_unused=True) for x in (actual, expected)
        ]
        for a, b in zip(*gradients, strict=True):
            close(a, b, atol=1e-8)

    def test_without_negatives_the_loss_is_zero(self):
        assert info_nce(unit(3, 4, 0), unit(3, 4, 1), torch.empty(4, 0).double(), 0.1).abs() < 1e-12

    def test_equal_embeddings_give_the_logarithm_of_k_plus_1(self):
        x = unit(1, 8, 0).expand(5, 8)
        close(info_nce(x, x, x[:4].T, 0.07), torch.tensor(math.log(5)))

    @pytest.mark.parametrize("t, K", [(0.005, 9), (0.1, 70_000)])
    def test_the_loss_is_right_at_a_low_temperature_and_for_a_large_dictionary(self, t, K):
        q, k, negatives = unit(4, 8, 0), unit(4, 8, 1), unit(K, 8, 2).T
        expected = F.cross_entropy(torch.cat([(q * k).sum(1, True), q @ negatives], 1) / t, torch.zeros(4).long())
        close(info_nce(q.float(), k.float(), negatives.float(), t), expected, rtol=1e-4)

    @given(SEEDS, st.integers(1, 5), st.integers(2, 7))
    def test_an_excluded_negative_counts_neither_in_the_loss_nor_in_its_gradients(self, seed, n, K):
        q, k, negatives = unit(n, 4, seed), unit(n, 4, seed + 1), unit(K, 4, seed + 2).T.requires_grad_()
        excluded = torch.rand(n, K, generator=rng(seed)) < 0.5
        excluded[:, 0], excluded[:, 1] = False, True
        loss = info_nce(q, k, negatives, 0.2, excluded)
        each = [info_nce(q[i : i + 1], k[i : i + 1], negatives[:, ~excluded[i]], 0.2) for i in range(n)]
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


class QueueAgainstDeque(RuleBasedStateMachine):
    """The queue is a deque of at most K keys, of which `queue_ptr` marks the oldest."""

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


def linear_moco(seed=0, **options):
    torch.manual_seed(seed)
    return MoCo(nn.Linear(5, 4), **{"dim": 4, "K": 6, "m": 0.7, "T": 0.2, **options})


def placed(module, x):
    """Fill a module alike every time, on the device of x."""
    torch.manual_seed(0)
    for tensor in filter(torch.is_floating_point, module.state_dict().values()):
        nn.init.normal_(tensor, std=0.1)
    return module.to(x.device)


def after(update, module):
    update()
    return torch.cat([tensor.flatten().float() for tensor in module.state_dict().values()])


def moco_of(x, **options):
    return placed(MoCo(nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 4)), dim=4, K=12, m=0.7, **options), x)


def muon_step(x):
    weight = nn.Parameter(x.flatten(1))
    weight.grad = x.flatten(1).flip(0)
    moco.Muon([weight], 0.1, 0.9).step()
    return weight.detach()


OPERATIONS = {  # of images x (8,3,24,24) in [0,1]
    "crop": lambda x: moco.crop(x, moco.crop_boxes(draws(rng(0), 8, 4, 10), 24, 24, (0.08, 1)).to(x.device), 16),
    "jitter": lambda x: moco.random_jitter(x, lambda *shape: draws(rng(*shape), *shape).to(x), 0.4, 0.4, 0.4, 0.1),
    "blur": lambda x: moco.gaussian_blur(x, torch.linspace(0.1, 2, 8)[:, None].to(x)),
    "grey": lambda x: moco.grey(x),
    "views": lambda x: torch.cat(SplitTwoViews(Augment("v2", 16))((255 * x).byte(), rng(0))),
    "restored": lambda x: Augment("v2", 24).restore(x),
    "split batch norm": lambda x: SplitBatchNorm(3, 4).to(x)(x),
    "encoder": lambda x: placed(ResNetEncoder("resnet10", width=0.125, bn_splits=2), x)(x),
    "loss": lambda x: info_nce(*F.normalize(x[:6, :, 0], dim=2).flatten(1).split(3), x[:5, :, 0].flatten(1).T, 0.3),
    "momentum": lambda x: after((model := moco_of(x)).momentum_update, model),
    "queue": lambda x: after(partial((model := moco_of(x)).dequeue_and_enqueue, x[:7, 0, 0, :4]), model),
    "a step": lambda x: moco_of(x, batch_negatives=True)(x, x.flip(3), rng(0)).detach(),
    "muon": muon_step,
    "kNN": lambda x: knn_predict(x[:3].flatten(1), x.flatten(1), torch.arange(8, device=x.device) % 3, 3, 4, 0.1),
    "linear": lambda x: moco.fit_linear(x[:, 0, 0], torch.arange(8, device=x.device) % 2, 2, decay=0.1).weight,
}


def cuda_can_be_pretended():
    """Tell whether fake CUDA tensors can be indexed without a driver, which torch 2.6 does not allow."""
    try:
        with FakeTensorMode():
            torch.empty(1, device="cuda")[:, None]
    except RuntimeError:
        return False
    return True


pretended_cuda = pytest.mark.skipif(not cuda_can_be_pretended(), reason="this torch wants CUDA even of fake tensors")


class TestMoCo:
    def test_the_queue_starts_as_unit_columns_and_the_key_encoder_as_an_equal_copy(self):
        model = MoCo(nn.Linear(5, 16), dim=16, K=7)
        assert model.queue.shape == (16, 7) and model.queue_ptr.tolist() == [0]
        close(model.queue.norm(dim=0), torch.ones(7))
        assert MoCo(nn.Linear(5, 16), dim=16, K=4000).queue.mean(1).norm() < 0.05  # in all directions alike
        for q, k in zip(model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True):
            assert torch.equal(q, k) and q.data_ptr() != k.data_ptr() and q.requires_grad and not k.requires_grad

    @given(SEEDS, st.floats(0, 1))
    def test_momentum_moves_the_keys_parameters_by_eq_2_in_place(self, seed, m):
        model = linear_moco(seed, m=m).double()
        nn.init.normal_(model.encoder_q.weight)
        before = [(k, k.clone(), q.clone()) for k, q in zip(model.encoder_k.parameters(), model.encoder_q.parameters())]
        model.momentum_update()
        for (k, old_k, old_q), now_k, now_q in zip(
            before, model.encoder_k.parameters(), model.encoder_q.parameters(), strict=True
        ):
            assert now_k is k and torch.equal(now_q, old_q)
            close(now_k, m * old_k + (1 - m) * old_q, atol=1e-12)

    def test_momentum_moves_every_parameter_of_a_resnet(self):
        model = MoCo(ResNetEncoder("resnet10", width=0.125, mlp_bn=True), K=8, m=0.7)
        for p in model.encoder_q.parameters():
            nn.init.normal_(p)
        old = [k.clone() for k in model.encoder_k.parameters()]
        model.momentum_update()
        for k, q, now in zip(old, model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True):
            close(now, 0.7 * k + 0.3 * q)

    @pytest.mark.parametrize("m, source", [(0.0, "encoder_q"), (1.0, "encoder_k")])
    def test_with_m_0_the_keys_parameters_are_the_queries_and_with_1_they_stay(self, m, source):
        model = linear_moco(m=m)
        nn.init.normal_(model.encoder_q.weight)
        expected = getattr(model, source).weight.clone()
        model.momentum_update()
        assert torch.equal(model.encoder_k.weight, expected)

    def test_momentum_leaves_the_batch_norm_statistics_alone(self):
        model = MoCo(nn.BatchNorm1d(3), dim=3, K=2, m=0)
        model.encoder_q(torch.randn(9, 3))
        model.momentum_update()
        assert model.encoder_k.running_mean.tolist() == [0, 0, 0] and model.encoder_k.num_batches_tracked == 0

    @given(SEEDS, st.integers(1, 15), st.booleans())
    def test_a_forward_pass_is_algorithm_1(self, seed, n, symmetric):
        model = linear_moco(seed, symmetric=symmetric).double()
        nn.init.normal_(model.encoder_q.weight)
        im_q, im_k = torch.randn(2, n, 5, dtype=torch.float64)
        queue, key_weight = model.queue.clone(), 0.7 * model.encoder_k.weight + 0.3 * model.encoder_q.weight
        f_q = lambda x: F.normalize(F.linear(x, model.encoder_q.weight, model.encoder_q.bias), dim=1)  # noqa: E731
        f_k = lambda x: F.normalize(F.linear(x, key_weight, model.encoder_q.bias), dim=1).detach()  # noqa: E731
        pairs = [(im_q, im_k), (im_k, im_q)] if symmetric else [(im_q, im_k)]
        expected = sum(
            F.cross_entropy(torch.cat([(f_q(a) * f_k(b)).sum(1, True), f_q(a) @ queue], 1) / 0.2, torch.zeros(n).long())
            for a, b in pairs
        )
        new = torch.cat([f_k(b) for _, b in pairs])
        loss = model(im_q, im_k)
        gradients = [torch.autograd.grad(x, model.encoder_q.weight)[0] for x in (loss, expected)]
        close(loss, expected, atol=1e-6)
        close(*gradients, atol=1e-5)
        close(model.queue[:, (torch.arange(len(new)) % 6)[-6:]], new[-6:].T, atol=1e-6)
        assert int(model.queue_ptr) == len(new) % 6

    @given(SEEDS, st.integers(1, 9), st.booleans())
    def test_with_batch_negatives_the_batchs_other_keys_join_the_queues(self, seed, n, symmetric):
        model = linear_moco(seed, symmetric=symmetric, batch_negatives=True).double()
        im_q, im_k = torch.randn(2, n, 5, dtype=torch.float64)
        queue, expected = model.queue.T.clone(), 0
        for a, b in [(im_q, im_k), (im_k, im_q)][: 2 if symmetric else 1]:
            q, k = F.normalize(model.encoder_q(a), dim=1), F.normalize(model.encoder_k(b), dim=1).detach()
            expected += oracle_nce(q, torch.cat([k, queue]), range(n), [()] * n, model.T)
        actual = model(im_q, im_k)
        gradients = [torch.autograd.grad(x, model.encoder_q.weight)[0] for x in (actual, expected)]
        close(actual, expected, atol=1e-9)
        close(*gradients, atol=1e-8)

    def test_embeddings_are_unit_rows_in_float32_under_autocast(self):
        with torch.autocast("cpu", torch.bfloat16):
            z = moco.embed(nn.Linear(5, 4), torch.randn(9, 5))
        assert z.dtype == torch.float32
        close(z.norm(dim=1), torch.ones(9), atol=1e-6)

    def test_gradients_reach_the_query_encoder_alone(self):
        model = linear_moco()
        model(torch.randn(3, 5), im_k := torch.randn(3, 5, requires_grad=True)).backward()
        assert im_k.grad is None  # the keys are constants
        assert all(p.grad.abs().sum() > 0 for p in model.encoder_q.parameters())
        assert all(p.grad is None for p in model.encoder_k.parameters()) and not model.queue.requires_grad

    def test_the_queue_takes_keys_as_constants(self):
        model = linear_moco()
        model.dequeue_and_enqueue(unit(3, 4, 0, torch.float32).requires_grad_())
        assert not model.queue.requires_grad

    def test_keys_are_computed_in_a_shuffled_order_and_restored(self):
        seen = []

        class Spy(nn.Linear):
            def forward(self, x):
                seen.append(x)
                return super().forward(x)

        model, x = MoCo(Spy(5, 4), dim=4, K=8), torch.randn(16, 5)
        keys = moco.shuffled_keys(model.encoder_k, x, rng(1))
        order = torch.randperm(16, generator=rng(1))
        assert torch.equal(seen[0], x[order]) and not torch.equal(order, torch.arange(16))
        close(keys, F.normalize(model.encoder_k(x), dim=1))
        assert torch.equal(keys, moco.shuffled_keys(model.encoder_k, x, rng(1)))

    def test_a_query_and_its_key_are_not_normalised_with_the_same_images(self):
        encoder = nn.Sequential(SplitBatchNorm(2, 4), nn.Flatten())
        model, x = MoCo(encoder, dim=2, K=8), torch.randn(8, 2, 1, 1)
        order = torch.randperm(8, generator=rng(5))
        expected = F.normalize(copy.deepcopy(encoder)(x[order]), dim=1)
        keys = moco.shuffled_keys(model.encoder_k, x, rng(5))
        close(keys[order], expected)
        assert not torch.allclose(keys, F.normalize(encoder(x), dim=1))

    @pytest.mark.parametrize("symmetric", [False, True])
    def test_the_keys_of_every_direction_are_shuffled(self, symmetric):
        encoder, (im_q, im_k) = nn.Sequential(SplitBatchNorm(2, 4), nn.Flatten()), torch.randn(2, 8, 2, 1, 1)
        model, generator, expected = MoCo(encoder, dim=2, K=8, T=0.2, symmetric=symmetric), rng(5), 0
        for a, b in [(im_q, im_k), (im_k, im_q)][: 1 + symmetric]:
            order = torch.randperm(8, generator=generator)
            q, shuffled = (F.normalize(copy.deepcopy(encoder)(x), dim=1) for x in (a, b[order]))
            expected += info_nce(q, shuffled[order.argsort()], model.queue.clone(), 0.2)
        close(model(im_q, im_k, rng(5)), expected)

    def test_several_processes_do_not_draw_an_order_without_a_generator(self, monkeypatch):
        monkeypatch.setattr(moco, "ranks", lambda: (0, 2))
        with pytest.raises(ValueError, match="need a generator"):
            moco.shuffled_keys(nn.Flatten(), torch.rand(2, 3), None)

    @pretended_cuda
    @pytest.mark.filterwarnings("ignore:CUDA is not available")  # autocast says so
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"symmetric": True, "batch_negatives": True},
            *({"method": name} for name in ("end-to-end", "memory-bank", "simclr")),
        ],
    )
    def test_a_step_on_cuda_leaves_no_tensor_behind_and_waits_for_nothing(self, options):
        model, augment = moco.build_model(tiny_config(**options), 8), Augment("v2", 32)
        with FakeTensorMode(allow_non_fake_inputs=True), NothingWaits():
            for module in model.modules():
                for store in (module._parameters, module._buffers):
                    for name, tensor in store.items():
                        if tensor is not None:
                            new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                            store[name] = nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new
            images = torch.empty(8, 3, 32, 32, dtype=torch.uint8, device="cuda")
            x_q, x_k = SplitTwoViews(augment)(images, torch.Generator())
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(x_q, x_k, torch.Generator(), torch.arange(8))
            model.eval()
            features = moco.extract_features(model.encoder_q.features, InMemory(images, None), augment)
            labels = torch.zeros(8, dtype=torch.long, device="cuda")
            predictions = knn_predict(features, features, labels, 3, 2, 0.1)
        assert {x.device.type for x in (x_q, x_k, loss, features, predictions, *model.buffers())} == {"cuda"}
        assert loss.dtype == features.dtype == torch.float32

    @pretended_cuda
    @pytest.mark.filterwarnings("ignore:CUDA is not available")
    @pytest.mark.parametrize("name", ["crop", "jitter", "blur", "grey", "views", "restored", "loss", "muon", "kNN"])
    def test_an_operation_on_cuda_takes_no_tensor_from_elsewhere(self, name):
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert OPERATIONS[name](torch.empty(8, 3, 24, 24, device="cuda")).device.type == "cuda"

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
    def test_a_training_step_on_cuda_is_the_one_on_the_cpu(self):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        results = []
        for device in ("cpu", "cuda"):
            model = moco.build_model(tiny_config(), 8).to(device)
            x_q, x_k = SplitTwoViews(Augment())(images_of(8).to(device), rng(1))
            model(x_q, x_k, rng(2)).backward()
            results.append([model.queue.cpu(), *(p.grad.cpu() for p in model.encoder_q.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-2)

    @pytest.mark.parametrize("name", OPERATIONS)
    def test_an_operation_gives_on_every_device_what_it_gives_on_the_cpu(self, device, name):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        here, there = (OPERATIONS[name](images_of(8, 24, 24).to(d) / 255) for d in ("cpu", device))
        assert there.device.type == device
        close(there.cpu(), here, atol=1e-3, rtol=1e-3)

    def test_bf16_and_channels_last_change_the_loss_little(self):
        x = torch.randn(2, 8, 3, 32, 32)
        model = moco.build_model(tiny_config(), 8)
        other = copy.deepcopy(model).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            low = other(*x, rng(0))
        assert low.dtype == torch.float32 and abs(low - model(*x, rng(0))) < 0.05


class NothingWaits(TorchDispatchMode):
    """Refuse an operation on tensors of several devices, and a copy between devices that waits."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim()]
        assert len({x.device.type for x in inputs}) < 2, f"{operation} mixes devices"
        out = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten._to_copy.default and out.device != inputs[0].device:
            assert kwargs.get("non_blocking"), "a copy that waits"
        return out


def oracle_nce(q, keys, own, left_out, t):
    """Compute InfoNCE query by query: `own[i]` is the key of query i, `left_out[i]` what it is not compared with."""
    losses = []
    for i in range(len(q)):
        logits = [q[i] @ keys[j] / t for j in range(len(keys)) if j == own[i] or j not in left_out[i]]
        losses.append(torch.stack(logits).exp().sum().log() - q[i] @ keys[own[i]] / t)
    return torch.stack(losses).mean()


def two_views(seed, n):
    torch.manual_seed(seed)
    return nn.Linear(5, 4).double(), *torch.randn(2, n, 5, dtype=torch.float64)


class TestMechanisms:
    @given(SEEDS, st.integers(2, 7), TEMPERATURES)
    def test_end_to_end_contrasts_with_the_batchs_other_keys_and_gradients_flow_into_both(self, seed, n, t):
        encoder, im_q, im_k = two_views(seed, n)
        q, k = (F.normalize(encoder(x), dim=1) for x in (im_q, im_k))
        actual, expected = moco.EndToEnd(encoder, t)(im_q, im_k), oracle_nce(q, k, range(n), [()] * n, t)
        close(actual, expected, atol=1e-9)
        close(*(torch.autograd.grad(x, encoder.weight)[0] for x in (actual, expected)), atol=1e-8)

    @given(SEEDS, st.integers(2, 7))
    def test_end_to_end_is_moco_with_m_0_and_the_batchs_other_keys_for_a_queue(self, seed, n):
        encoder, im_q, im_k = two_views(seed, n)
        loss, model = moco.EndToEnd(copy.deepcopy(encoder), 0.2)(im_q, im_k), MoCo(encoder, 4, n - 1, m=0, T=0.2)
        keys, each = F.normalize(encoder(im_k), dim=1).detach(), []
        for i in range(n):
            model.queue = torch.cat([keys[:i], keys[i + 1 :]]).T
            each.append(model(im_q[i : i + 1], im_k[i : i + 1]))
        close(loss, torch.stack(each).mean(), atol=1e-8)

    def test_end_to_end_shuffles_its_keys(self):
        encoder = nn.Sequential(SplitBatchNorm(2, 4), nn.Flatten())
        x = torch.randn(8, 2, 1, 1)
        order = torch.randperm(8, generator=rng(5))
        q = F.normalize(copy.deepcopy(encoder)(x), dim=1)
        k = F.normalize(copy.deepcopy(encoder)(x[order]), dim=1)[order.argsort()]
        close(moco.EndToEnd(encoder, 0.2)(x, x, rng(5)), oracle_nce(q, k, range(8), [()] * 8, 0.2))

    @given(SEEDS, st.integers(1, 6), st.integers(1, 9), st.floats(0, 1))
    def test_the_memory_bank_contrasts_with_drawn_slots_and_moves_its_own(self, seed, n, K, m):
        encoder, im_q, im_k = two_views(seed, n)
        model = moco.MemoryBank(encoder, images=9, dim=4, K=K, m=m, T=0.3).double()
        indices, bank = torch.randperm(9, generator=rng(seed))[:n], model.bank.clone()
        drawn = torch.randint(9, (K,), generator=rng(seed, 1)).tolist()
        q = F.normalize(encoder(im_q), dim=1)
        each = [
            oracle_nce(q[i : i + 1], torch.stack([bank[own], *(bank[j] for j in drawn if j != own)]), [0], [()], 0.3)
            for i, own in enumerate(indices.tolist())
        ]
        actual, expected = model(im_q, im_k, rng(seed, 1), indices), torch.stack(each).mean()
        gradients = [torch.autograd.grad(x, encoder.weight)[0] for x in (actual, expected)]
        close(actual, expected, atol=1e-8)
        close(*gradients, atol=1e-7)
        for i, own in enumerate(indices.tolist()):
            bank[own] = (m * bank[own] + (1 - m) * q[i].detach()) / (m * bank[own] + (1 - m) * q[i].detach()).norm()
        close(model.bank, bank, atol=1e-8)

    def test_the_memory_bank_starts_as_unit_rows_without_gradients_and_sees_one_view(self):
        encoder, im_q, im_k = two_views(0, 3)
        model = moco.MemoryBank(encoder, images=9, dim=4, K=5).double()
        close(model.bank.norm(dim=1), torch.ones(9))
        assert moco.MemoryBank(encoder, images=4000, dim=16).bank.mean(0).norm() < 0.05  # in all directions alike
        losses = [copy.deepcopy(model)(im_q, x, rng(1), torch.arange(3)) for x in (im_k, im_k * math.nan)]
        assert torch.equal(*losses) and not model.bank.requires_grad

    @pytest.mark.parametrize("build", [
        partial(MoCo, dim=3, K=5), partial(MoCo, dim=3, K=5, batch_negatives=True), moco.EndToEnd, moco.SimCLR,
        partial(moco.MemoryBank, images=9, dim=3, K=5),
    ])  # fmt: skip
    def test_an_encoder_in_float64_goes_with_buffers_in_float32(self, build):
        model, x = build(nn.Linear(4, 3).double()), torch.rand(2, 4, 4, dtype=torch.float64)
        model(*x, rng(0), torch.arange(4)).backward()
        assert model.encoder_q.weight.grad.isfinite().all() and model.encoder_q.weight.grad.dtype == torch.float64
        assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in model.buffers())

    @given(SEEDS, st.integers(1, 6), TEMPERATURES)
    def test_simclr_is_nt_xent_over_both_views(self, seed, n, t):
        encoder, im_q, im_k = two_views(seed, n)
        z = F.normalize(encoder(torch.cat([im_q, im_k])), dim=1)
        own = [(i + n) % (2 * n) for i in range(2 * n)]
        actual, expected = moco.SimCLR(encoder, t)(im_q, im_k), oracle_nce(z, z, own, [(i,) for i in range(2 * n)], t)
        close(actual, expected, atol=1e-9)
        if n > 1:
            close(*(torch.autograd.grad(x, encoder.weight)[0] for x in (actual, expected)), atol=1e-8)
            close(moco.SimCLR(encoder, t)(im_k, im_q), actual, atol=1e-9)

    @pytest.mark.parametrize("method", ["moco", "end-to-end", "memory-bank", "simclr"])
    def test_every_mechanism_trains_saves_and_is_evaluated(self, few, run, method):
        options = "--preset tiny --width 0.125 --batch-size 8 --epochs 1 --knn-k 5 --device cpu --method"
        assert run("train", *options.split(), method)[0] == 0
        names = {name.split(".")[1] for name in moco.load_checkpoint("ckpt.pt")["state_dict"]}
        extra = {"moco": {"encoder_k", "queue", "queue_ptr"}, "memory-bank": {"bank"}}
        assert names == {"encoder_q"} | extra.get(method, set())
        assert run("knn", "ckpt.pt")[0] == 0

    @pytest.mark.parametrize("method", ["end-to-end", "memory-bank", "simclr"])
    @pytest.mark.parametrize("name", ["symmetric", "batch_negatives"])
    def test_the_symmetric_loss_and_batch_negatives_are_mocos_alone(self, name, method):
        with pytest.raises(UserError, match=f"^{moco.flag(name)}: --method {method}"):
            Config(method=method, **{name: True})


def pixels(encoder, split, config, autocast, head):
    """Stand in for `frozen_features`, of the backbone."""
    assert not head
    return split.images.flatten(1).double()


class TestEvaluation:
    @given(SEEDS, st.integers(1, 5), st.integers(1, 12), st.data(), st.floats(0.01, 1))
    def test_knn_is_the_vote_of_the_k_nearest_by_cosine_with_exponential_weights(self, seed, n, m, data, t):
        g = rng(seed)
        x, bank = (
            torch.randn(n, 4, generator=g, dtype=torch.float64),
            torch.randn(m, 4, generator=g, dtype=torch.float64),
        )
        labels, k = torch.randint(0, 3, (m,), generator=g), data.draw(st.integers(1, m), label="k")
        expected = []
        for row in x:
            cosine = [(float(row @ b / row.norm() / b.norm()), int(y)) for b, y in zip(bank, labels, strict=True)]
            votes = [0.0, 0.0, 0.0]
            for s, y in sorted(cosine, reverse=True)[:k]:
                votes[y] += math.exp(s / t)
            expected.append(votes.index(max(votes)))
        actual = knn_predict(x, bank, labels, 3, k, t)
        assert actual.dtype == torch.int64 and actual.tolist() == expected

    def test_neighbours_vote_with_the_exponential_of_their_similarity(self):
        bank, labels = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]]), torch.tensor([0, 1, 1])
        query = torch.tensor([[1.0, 0.0]])
        assert [knn_predict(query, bank, labels, 2, 3, t).item() for t in (0.1, 0.5, 1.0)] == [0, 0, 1]

    def test_an_image_without_features_is_near_to_none(self):
        bank, labels = torch.tensor([[0.0, 0.0], [0.6, 0.8]]), torch.tensor([0, 1])
        assert knn_predict(torch.tensor([[1.0, 0.0]]), bank, labels, 2, 1, 0.1).item() == 1

    @pytest.mark.parametrize("scale", [1e-6, 1e6])
    def test_the_length_of_features_does_not_count(self, scale):
        x, bank, labels = torch.randn(50, 4), torch.randn(90, 4), torch.randint(0, 5, (90,))
        expected = knn_predict(x, bank, labels, 5, 10, 0.1)
        assert torch.equal(knn_predict(scale * x, bank, labels, 5, 10, 0.1), expected)
        assert torch.equal(knn_predict(x, scale * bank, labels, 5, 10, 0.1), expected)

    def test_a_query_is_answered_alike_alone_and_among_many_in_chunks_of_128_mib(self, monkeypatch):
        x, bank, labels = torch.randn(300, 8), torch.randn(2**18, 8), torch.randint(0, 5, (2**18,))
        alone = torch.cat([knn_predict(row[None], bank, labels, 5, 20, 0.1) for row in x[::60]])
        chunks, topk = [], torch.Tensor.topk
        monkeypatch.setattr(torch.Tensor, "topk", lambda s, k: chunks.append(s.nbytes / 2**20) or topk(s, k))
        assert torch.equal(knn_predict(x, bank, labels, 5, 20, 0.1)[::60], alone)
        assert chunks == [128, 128, 44]

    @pytest.mark.parametrize("k", [0, 4])
    def test_more_neighbours_than_the_bank_holds_are_a_value_error(self, k):
        with pytest.raises(ValueError, match="bank of 3"):
            knn_predict(torch.randn(1, 2), torch.randn(3, 2), torch.zeros(3).long(), 1, k, 0.1)

    def test_features_come_in_order_whatever_the_batch_size(self):
        source, augment = InMemory(images_of(7), None), Augment()
        encode = lambda x: x.flatten(1).bfloat16()  # noqa: E731
        features = moco.extract_features(encode, source, augment, batch_size=3)
        assert features.dtype == torch.float32
        assert torch.equal(features, encode(augment.normalise(images_of(7) / 255)).float())

    @pytest.mark.parametrize("aug", moco.RECIPES)
    def test_streamed_images_are_cut_once_as_those_in_memory_are(self, folder, aug):
        for path in folder.rglob("*.png"):
            tvf.to_pil_image(images_of(1, 40, 48, seed=int(path.stem))[0]).save(path)
        augment, seen = Augment(aug, 24), []
        for cache in (False, True):
            data = moco.load_data(Config(data=str(folder), cache=cache, workers=0), CPU)
            seen.append(moco.extract_features(lambda x: x.flatten(1), data.train, augment))
        images = images_of(1, 40, 48, seed=3)
        expected = tvf.center_crop(tvf.resize(images, [round(24 * augment.recipe.margin)], antialias=True), [24, 24])
        assert torch.equal(*seen) and torch.equal(seen[0][3], augment.normalise(expected / 255).flatten())

    @pytest.mark.parametrize("training", [True, False])
    def test_accuracy_is_measured_in_eval_mode_and_the_mode_restored(self, training):
        encoder = ResNetEncoder(width=0.125, bn_splits=2).train(training)
        split = InMemory(images_of(10), torch.arange(10) % 3)
        state = copy.deepcopy(encoder.state_dict())
        top1 = moco.accuracy(encoder, moco.Data(split, split, 3), tiny_config(knn_k=1), torch.no_grad)
        assert top1 == 100 and encoder.training == training
        assert all(torch.equal(a, b) for a, b in zip(state.values(), encoder.state_dict().values(), strict=True))

    @pytest.mark.parametrize("eval_size, side", [(0, 24), (32, 32), (16, 16)])
    def test_images_are_evaluated_at_their_views_size_or_at_one_of_their_own(self, monkeypatch, eval_size, side):
        sides = []
        monkeypatch.setattr(
            moco, "extract_features", lambda encode, split, augment: sides.append(augment.size) or torch.ones(10, 3)
        )
        split = InMemory(images_of(10), torch.zeros(10).long())
        config = tiny_config(size=24, eval_size=eval_size)
        moco.accuracy(ResNetEncoder(width=0.125), moco.Data(split, split, 1), config, torch.no_grad)
        assert sides == [side, side]

    def test_images_are_evaluated_by_the_runs_recipe(self):
        split, augment = InMemory(images_of(3, 40, 48), None), Augment("v2", 24)
        config = tiny_config(aug="v2", size=24)
        features = moco.frozen_features(nn.Flatten(), split, config, torch.no_grad, head=True)
        close(features, augment.normalise(augment.centre(split.images) / 255).flatten(1))

    def test_knn_votes_by_the_options_given(self, monkeypatch):
        seen, split = [], InMemory(images_of(10), torch.zeros(10).long())
        monkeypatch.setattr(moco, "knn_predict", lambda *a: seen.append(a[3:]) or torch.zeros(10))
        config = tiny_config(knn_k=3, knn_t=0.37)
        moco.accuracy(ResNetEncoder(width=0.125), moco.Data(split, split, 1), config, torch.no_grad)
        assert seen == [(1, 3, 0.37)]

    def test_the_backbones_features_are_compared_or_the_heads_output(self, monkeypatch):
        encoder, seen = ResNetEncoder(width=0.125, dim=5), []
        split = InMemory(images_of(10), torch.zeros(10).long())
        monkeypatch.setattr(moco, "knn_predict", lambda f, *_: seen.append(f.shape[1]) or torch.zeros(10))
        for head in (False, True):
            moco.accuracy(encoder, moco.Data(split, split, 1), tiny_config(), torch.no_grad, head)
        moco.accuracy(encoder, moco.Data(split, split, 1), tiny_config(), torch.no_grad)
        assert seen == [64, 5, 64]

    def test_a_linear_classifier_too_sees_the_backbones_features_or_the_heads_output(self, monkeypatch):
        encoder, seen = ResNetEncoder(width=0.125, dim=5), []
        split = InMemory(images_of(10), torch.zeros(10).long())
        monkeypatch.setattr(moco, "fit_linear", lambda f, *_: seen.append(f.shape[1]) or (lambda x: x))
        for head in (False, True):
            moco.accuracy(encoder, moco.Data(split, split, 1), tiny_config(), torch.no_grad, head, linear=True)
        assert seen == [64, 5]

    @pytest.mark.parametrize("linear", [False, True])
    def test_features_are_computed_under_autocast_and_judged_without_it(self, monkeypatch, linear):
        seen, split = [], InMemory(images_of(10), torch.arange(10) % 2)
        for name in ("extract_features", "knn_predict", "fit_linear"):
            real = getattr(moco, name)
            monkeypatch.setattr(
                moco, name, lambda *a, real=real: seen.append(torch.is_autocast_enabled("cpu")) or real(*a)
            )
        bf16 = partial(torch.autocast, "cpu", torch.bfloat16)
        data = moco.Data(split, split, 2)
        moco.accuracy(ResNetEncoder(width=0.125), data, tiny_config(knn_k=1), bf16, linear=linear)
        assert seen == [True, True, False]

    def test_accuracy_is_the_percentage_of_right_predictions(self, monkeypatch):
        split = InMemory(images_of(8), torch.arange(8))
        monkeypatch.setattr(moco, "knn_predict", lambda *_: torch.tensor([0, 1, 2, 3, 4, 5, 0, 0]))
        data = moco.Data(split, split, 8)
        assert moco.accuracy(ResNetEncoder(width=0.125), data, tiny_config(), torch.no_grad) == 75

    @given(SEEDS, st.integers(2, 4))
    def test_the_linear_classifier_is_at_the_minimum_of_its_convex_loss(self, seed, classes):
        x = torch.randn(60, 3, generator=rng(seed), dtype=torch.float64)
        y = (x[:, 0] + x[:, 1].sin()).clamp(0, classes - 1).round().long()
        linear = moco.fit_linear(x, y, classes, decay=0.01)
        assert not linear.weight.requires_grad and not linear.bias.requires_grad
        weight, bias = (p.clone().requires_grad_() for p in (linear.weight, linear.bias))
        probability = (x @ weight.T + bias).exp()
        likelihood = probability[torch.arange(60), y] / probability.sum(1)
        loss = -likelihood.log().mean() + 0.005 * (weight**2).sum()
        assert all(gradient.abs().max() < 5e-4 for gradient in torch.autograd.grad(loss, (weight, bias)))
        assert torch.equal(linear.weight, moco.fit_linear(x, y, classes, decay=0.01).weight)
        assert torch.equal(moco.fit_linear(x, y, classes).weight, moco.fit_linear(x, y, classes, decay=1e-4).weight)

    @given(SEEDS)
    def test_the_linear_classifier_reaches_its_minimum_whatever_the_scale_of_the_features(self, seed):
        x = 50 * torch.randn(20, 2, generator=rng(seed), dtype=torch.float64)
        y = torch.randint(2, (20,), generator=rng(seed, "labels"))
        linear = moco.fit_linear(x, y, 2).requires_grad_()
        (F.cross_entropy(linear(x), y) + 5e-5 * linear.weight.square().sum()).backward()
        assert linear.weight.grad.abs().max() < 0.05

    def test_the_linear_classifier_sees_standardised_features(self, monkeypatch):
        seen = []
        bank, queries = 100 + 7 * torch.randn(50, 4), 100 + 7 * torch.randn(20, 4)
        bank[:, 2] *= 1e-3
        bank[:, 3] = queries[:, 3] = 5  # of no deviation
        features = iter([bank, queries])
        monkeypatch.setattr(moco, "extract_features", lambda *_: next(features))
        monkeypatch.setattr(moco, "fit_linear", lambda x, *_: seen.append(x) or (lambda z: seen.append(z) or z))
        data = moco.Data(InMemory(None, torch.zeros(50)), InMemory(None, torch.zeros(20)), 3)
        moco.accuracy(ResNetEncoder(width=0.125), data, tiny_config(), torch.no_grad, linear=True)
        close(seen[0].mean(0), torch.zeros(4), atol=1e-4)
        close(seen[0].std(0), torch.tensor([1.0, 1.0, 1.0, 0.0]), atol=1e-4)
        close(seen[1][:, :3], ((queries - bank.mean(0)) / bank.std(0))[:, :3], atol=1e-3)

    def test_classes_on_two_sides_of_a_plane_are_told_apart(self):
        x = torch.randn(200, 5, generator=rng(0))
        assert torch.equal(moco.fit_linear(x, (x[:, 0] > 0).long(), 2)(x).argmax(1), (x[:, 0] > 0).long())

    @pytest.mark.parametrize("side, shown", [(20, 100), (32, 96), (64, 128), (96, 96), (224, 224)])
    def test_a_mosaic_enlarges_small_images_to_96_pixels_at_least(self, side, shown):
        assert moco.mosaic(torch.rand(1, 2, 3, side, side)).shape == (3, 4 + shown + 12, 4 + 2 * (shown + 12))

    @pytest.mark.parametrize("coloured", [True, False])
    def test_a_mosaic_has_enlarged_images_in_rows_the_first_framed_black_the_others_in_their_colour(self, coloured):
        images, colours = torch.rand(2, 3, 3, 48, 48), torch.rand(2, 2, 3)
        picture = moco.mosaic(images, colours if coloured else None)
        frames = torch.cat([torch.zeros(2, 1, 3), colours if coloured else torch.full((2, 2, 3), 0.85)], 1)
        assert picture.shape == (3, 4 + 2 * 108, 4 + 3 * 108) and (picture[:, :4] == 0.85).all()
        for row in range(2):
            for column in range(3):
                cell = picture[:, 4 + 108 * row :, 4 + 108 * column :][:, :104, :104]
                assert torch.equal(cell[:, 5:-4:2, 5:-4:2], images[row, column])
                assert torch.equal(cell[:, 4:-4:2, 4:-4:2], images[row, column])
                assert (cell[:, :4] == frames[row, column, :, None, None]).all() and (
                    cell[:, 50, -1] == cell[:, 0, 0]
                ).all()

    @pytest.mark.parametrize("streamed", [False, True])
    def test_views_are_drawn_as_training_makes_them_beside_their_image(self, few, folder, monkeypatch, streamed):
        monkeypatch.setattr(moco, "mosaic", lambda images: images)
        options = dict(data=str(folder), workers=0) if streamed else {}
        config = tiny_config(**options, size=24, seed=3, min_crop=0.5)
        data, augment = moco.load_data(config, CPU), Augment("cifar", 24, 0.5)
        split_two_views, chosen = (
            SplitTwoViews(augment, 3),
            torch.randperm(len(data.train), generator=rng("picture", 3))[:8],
        )
        picture = moco.draw_views(data, config)
        assert picture.shape == (8, 9, 3, 24, 24)
        (whole,) = data.train.batches([(0, chosen)], augment.centre)
        close(picture[:, 0], whole / 255)
        for step in range(4):
            (images,) = data.train.batches([(step, chosen)], split_two_views.two_crops)
            pair = torch.stack(split_two_views(images, rng("step", 3, step)), 1)
            close(augment.normalise(picture[:, 2 * step + 1 : 2 * step + 3]), pair, atol=1e-4)

    @pytest.mark.parametrize("labelled, width", [(True, 7), (False, 6)])
    def test_a_small_bank_has_no_more_neighbours_than_images(self, few, monkeypatch, labelled, width):
        monkeypatch.setattr(moco, "mosaic", lambda images, colours: images.shape[1])
        monkeypatch.setattr(moco, "frozen_features", pixels)
        data = moco.load_data(tiny_config(), CPU)
        data.train = InMemory(data.train.images[:6], data.train.labels[:6])
        data.test = data.test if labelled else None
        assert moco.draw_neighbours(None, data, tiny_config(), None) == width

    @pytest.mark.parametrize("labelled", [True, False])
    def test_neighbours_are_the_nearest_others_framed_by_whether_the_labels_agree(self, few, monkeypatch, labelled):
        monkeypatch.setattr(moco, "mosaic", lambda images, colours: (images, colours))
        monkeypatch.setattr(moco, "frozen_features", pixels)
        data = moco.load_data(tiny_config(), CPU)
        data.test = data.test if labelled else None
        queries = data.test or data.train
        x, bank = (F.normalize(split.images.flatten(1).double(), dim=1) for split in (queries, data.train))
        images, colours = moco.draw_neighbours(None, data, tiny_config(seed=4, size=24, eval_size=32), None)
        assert images.shape == (10, 11, 3, 32, 32) and (colours is not None) == labelled
        for row, i in enumerate(torch.randperm(len(queries), generator=rng("picture", 4))[:10].tolist()):
            nearest = sorted(set(range(40)) - (set() if labelled else {i}), key=lambda j: -(x[i] @ bank[j]).item())[:10]
            close(images[row] * 255, torch.cat([queries.images[[i]], data.train.images[nearest]]))
            for j, neighbour in enumerate(nearest if labelled else ()):
                red, green, _ = colours[row, j]
                assert (green > red) == (data.train.labels[neighbour] == data.test.labels[i])


@pytest.fixture(scope="module")
def small_sets():
    return {n: moco.shapes(n, split) for n, split in ((40, "train"), (20, "test"))}


@pytest.fixture
def few(small_sets, monkeypatch):
    """Shrink the built-in images to 40 to train on and 20 to test on."""
    monkeypatch.setattr(moco, "shapes", lambda n, split: small_sets[40 if split == "train" else 20])


@pytest.fixture
def no_gpu(monkeypatch):
    """Leave `--device auto` the CPU alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, small_sets):
    """Train for two epochs of five steps; return what was saved."""
    folder = tmp_path_factory.mktemp("checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moco, "shapes", lambda n, split: small_sets[40 if split == "train" else 20])
        list(training(folder))
    return moco.load_checkpoint(str(folder / "c.pt"))


def same(a, b):
    """Compare trees of dicts, lists and tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def lasting(checkpoint):
    """Leave out of a checkpoint what no two runs share: seconds, and options that may change."""
    rows = [{k: v for k, v in row.items() if k not in ("images_per_s", "seconds")} for row in checkpoint["rows"]]
    config = {k: v for k, v in checkpoint["config"].items() if k not in moco.RESUMABLE}
    return {**checkpoint, "rows": rows, "config": config, "seconds": None}


class Code:
    """Run a command when unpickled by anything less careful than we are."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def edited(**changes):
    return lambda checkpoint, path: torch.save({**checkpoint, **changes}, path)


def reweighted(name, change):
    return lambda c, path: torch.save({**c, "state_dict": {**c["state_dict"], name: change(c["state_dict"])}}, path)


def without(key):
    return lambda c, path: torch.save({k: v for k, v in c.items() if k != key}, path)


def cut_to(share, legacy=False):
    def write(checkpoint, path):
        torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return write


def flipped(checkpoint, path):
    torch.save(checkpoint, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def filed_as_folder(checkpoint, path):
    torch.save(checkpoint, path)
    content = bytearray(path.read_bytes())
    content[content.rfind(b"PK\1\2", 0, content.rfind(b"/data/0")) + 38] ^= 16  # its entry's attribute, in the list
    path.write_bytes(content)


CONV = "module.encoder_q.layer1.0.conv1.weight"
BROKEN = {
    "empty": (lambda c, path: path.write_bytes(b""), ": the file is empty\n"),
    "text": (lambda c, path: path.write_text("text"), "no archive of torch.save"),
    "picture": (lambda c, path: tvf.to_pil_image(images_of(1)[0]).save(path, "PNG"), "no archive of torch.save"),
    "zip": (lambda c, path: zipfile.ZipFile(path, "w").writestr("a", "b"), "no archive of torch.save"),
    "half": (cut_to(0.5), "cut short"),
    "almost": (cut_to(0.999), "cut short"),
    "old half": (cut_to(0.5, legacy=True), "cut short"),
    "flip": (flipped, "damaged at"),
    "folder": (filed_as_folder, "damaged at"),
    "pickle": (lambda c, path: path.write_bytes(pickle.dumps(Code(), 2)), "nothing of it was run"),
    "new pickle": (lambda c, path: path.write_bytes(pickle.dumps(Code(), 5)), "no archive of torch.save"),
    "code": (edited(optimizer=Code()), "nothing of it was run"),
    "old code": (lambda c, path: torch.save(Code(), path, _use_new_zipfile_serialization=False), "nothing of it"),
    "module": (lambda c, path: torch.save(nn.Linear(2, 2), path), "nothing of it was run"),
    "tensor": (lambda c, path: torch.save(torch.ones(3), path), "lacks one of epoch"),
    "list": (lambda c, path: torch.save([1], path), "lacks one of epoch"),
    "no epoch": (without("epoch"), "lacks one of epoch"),
    "no arch": (without("arch"), "lacks one of epoch"),
    "no weights": (without("state_dict"), "lacks one of epoch"),
    "weights listed": (edited(state_dict=[1]), "lacks one of epoch"),
    "config": (edited(config={"depth": 3}), "config is not one of this version"),
    "options": (edited(config={"moco_t": -1}), "config is not one of this version"),
    "strange value": (reweighted(CONV, lambda s: "x"), CONV),
    "nan": (reweighted(CONV, lambda s: s[CONV] * math.nan), CONV),
    "infinite": (reweighted("module.queue", lambda s: s["module.queue"] / 0), "module.queue"),
    "shape": (reweighted(CONV, lambda s: s[CONV][:2]), "size mismatch for layer1.0.conv1.weight"),
    "strange weight": (reweighted("module.encoder_q.x", lambda s: torch.ones(1)), "Unexpected key(s)"),
    "no encoder": (edited(state_dict={"module.queue": torch.ones(1)}), "is no encoder among"),
    "arch": (edited(arch="vgg"), "is no encoder among"),
    "stem": (reweighted("module.encoder_q.conv1.weight", lambda s: torch.ones(3)), "is no encoder among"),
}


class TestCheckpoints:
    def test_a_checkpoint_is_plain_values_and_tensors_under_the_official_names(self, checkpoint):
        assert checkpoint.keys() > {"epoch", "step", "arch", "state_dict", "optimizer", "config"}
        assert (checkpoint["epoch"], checkpoint["step"], checkpoint["arch"]) == (2, 10, "resnet18")
        names, prefix = set(checkpoint["state_dict"]), "module.encoder_q."
        resnet = {n for n in torchvision.models.resnet18().state_dict() if not n.startswith("fc.")}
        assert {n.removeprefix(prefix) for n in names if n.startswith(prefix) and ".fc." not in n} == resnet
        assert {"module.queue", "module.queue_ptr", prefix + "fc.0.weight", "module.encoder_k.fc.2.bias"} <= names

    def test_what_is_saved_is_loaded(self, checkpoint, tmp_path):
        moco.save_checkpoint(str(tmp_path / "c.pt"), checkpoint)
        assert same(moco.load_checkpoint(str(tmp_path / "c.pt")), checkpoint)
        assert list(tmp_path.iterdir()) == [tmp_path / "c.pt"]

    @pytest.mark.parametrize("write, words", BROKEN.values(), ids=BROKEN)
    def test_a_broken_or_hostile_file_is_refused_in_a_line_and_not_executed(self, checkpoint, run, write, words):
        write(checkpoint, Path("bad.pt"))
        status, out, err = run("knn", "bad.pt", "--data", "shapes")
        assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("moco: bad.pt: ") and words in err
        assert not Path("executed").exists()

    def test_a_missing_weight_a_missing_file_and_a_folder_are_named(self, checkpoint, run):
        edited(state_dict={k: v for k, v in checkpoint["state_dict"].items() if k != CONV})(checkpoint, Path("bad.pt"))
        assert 'Missing key(s) in state_dict: "layer1.0.conv1.weight"' in run("knn", "bad.pt")[2]
        assert run("knn", "none.pt")[2] == "moco: none.pt: No such file or directory\n"
        assert run("knn", ".")[2] == "moco: .: Is a directory\n"

    @given(st.data())
    def test_a_file_with_changed_or_missing_bytes_loads_to_equal_tensors_or_is_refused(self, checkpoint, data):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "c.pt"
            torch.save(
                kept := {k: checkpoint[k] for k in ("epoch", "arch", "config")}
                | {"state_dict": {k: v for k, v in checkpoint["state_dict"].items() if v.numel() < 999}},
                path,
            )
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

    def test_all_is_on_the_disk_before_the_earlier_file_gives_way(self, tmp_path, monkeypatch):
        (path := tmp_path / "file").write_bytes(b"old")
        seen = []
        monkeypatch.setattr(os, "fsync", lambda number: seen.append((os.fstat(number).st_size, path.read_bytes())))
        moco.write_file(str(path), lambda file: file.write(b"newer"))
        assert seen == [(5, b"old")] and path.read_bytes() == b"newer"

    def test_a_file_is_written_beside_under_its_whole_name_and_as_readable_as_any(self, tmp_path):
        def write(file):
            assert [path.name for path in tmp_path.iterdir()] == ["m0.9.tmp"]

        moco.write_file(str(tmp_path / "m0.9"), write)
        (tmp_path / "any").touch()
        assert (tmp_path / "m0.9").stat().st_mode == (tmp_path / "any").stat().st_mode

    def test_a_disk_that_is_full_is_a_line_and_leaves_the_earlier_checkpoint_whole(self, tmp_path):
        resource, path = pytest.importorskip("resource"), str(tmp_path / "c.pt")
        moco.save_checkpoint(path, {"step": 1})
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            with pytest.raises(UserError, match=r"c.pt: not written \(.*File too large.* whole$"):
                moco.save_checkpoint(path, {"step": torch.zeros(10**6)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert torch.load(path) == {"step": 1} and list(tmp_path.iterdir()) == [tmp_path / "c.pt"]

    def test_what_was_saved_on_cuda_is_read_onto_the_cpu(self, tmp_path, monkeypatch, checkpoint):
        with monkeypatch.context() as patch:
            patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
            torch.save(checkpoint, tmp_path / "c.pt")
        assert same(moco.load_checkpoint(str(tmp_path / "c.pt")), checkpoint)

    @pytest.mark.parametrize("moment", ["save", "fsync", "replace"])
    def test_a_save_that_fails_is_a_line_and_leaves_the_earlier_checkpoint_whole(self, tmp_path, monkeypatch, moment):
        path = str(tmp_path / "c.pt")
        moco.save_checkpoint(path, {"step": 1})

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch if moment == "save" else moco.os, moment, fail)
        with pytest.raises(UserError, match=r"^.*c.pt: not written .*No space left on device.* whole$"):
            moco.save_checkpoint(path, {"step": 2})
        assert torch.load(path) == {"step": 1} and list(tmp_path.iterdir()) == [tmp_path / "c.pt"]

    @pytest.mark.parametrize("arch, mlp", [("resnet50", False), ("resnet50", True), ("resnet18", True)])
    def test_an_official_checkpoint_is_evaluated_from_its_weights_alone(self, tmp_path, arch, mlp):
        theirs = getattr(torchvision.models, arch)(num_classes=128)
        if mlp:
            theirs.fc = nn.Sequential(nn.Linear(theirs.fc.in_features, theirs.fc.in_features), nn.ReLU(), theirs.fc)
        names = {f"module.encoder_{x}.{k}": v for x in "qk" for k, v in theirs.state_dict().items()}
        names |= {"module.queue": torch.randn(128, 8), "module.queue_ptr": torch.zeros(1).long()}
        official = {"epoch": 200, "arch": arch, "state_dict": names, "optimizer": {"state": {}, "param_groups": []}}
        torch.save(official, tmp_path / "moco.pth.tar", _use_new_zipfile_serialization=False)
        encoder = moco.load_encoder(moco.load_checkpoint(str(tmp_path / "moco.pth.tar")), "moco.pth.tar")
        x = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(encoder(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        "shape",
        [
            dict(mlp=False),
            dict(mlp_bn=True),
            dict(mlp_dim=24),
            dict(mlp_dim=24, mlp_bn=True, arch="resnet10"),
            dict(width=1.5, arch="resnet10"),
        ],
    )
    def test_an_encoder_of_any_head_is_rebuilt_from_its_weights_alone(self, shape):
        config = tiny_config(**{"stem": "imagenet", "width": 0.25, **shape})
        model = moco.build_model(config, 8)
        names = {f"module.{name}": x for name, x in model.state_dict().items()}
        encoder = moco.load_encoder({"arch": config.arch, "state_dict": names}, "c.pt")
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(encoder(x), model.encoder_q.eval()(x))

    def test_knn_takes_an_official_checkpoint(self, folder, run):
        theirs = torchvision.models.resnet18(num_classes=128).state_dict()
        names = {f"module.encoder_q.{k}": v for k, v in theirs.items()}
        torch.save({"epoch": 1, "arch": "resnet18", "state_dict": names, "optimizer": {}}, "moco.pth.tar")
        status, out, _ = run("knn", "moco.pth.tar", *f"--data {folder} --knn-k 3 --workers 0 --size 32 --json".split())
        assert status == 0 and json.loads(out)["queries"] == 8

    @pytest.mark.parametrize("stem, shown", [("imagenet", (224, "v2")), ("cifar", (32, "cifar"))])
    def test_an_official_checkpoint_is_evaluated_as_its_stem_was_trained(self, image_folder, run, stem, shown):
        weights = ResNetEncoder(width=0.125, stem=stem).state_dict()
        names = {f"module.encoder_q.{k}": v for k, v in weights.items()}
        torch.save({"epoch": 1, "arch": "resnet18", "state_dict": names}, "official.pt")
        config = moco.reopen("official.pt", {"data": str(image_folder)})[2]
        assert (config.size, config.aug) == shown

    def test_a_resnet50_of_ours_satisfies_the_official_linear_classifiers_loader(self):
        model = moco.build_model(tiny_config(arch="resnet50", stem="imagenet", width=1.0), 8)
        prefix = "module.encoder_q."
        kept = {f"module.{k}": v for k, v in model.state_dict().items()}
        kept = {
            k[len(prefix) :]: v for k, v in kept.items() if k.startswith(prefix) and not k.startswith(prefix + "fc")
        }
        classifier = torchvision.models.resnet50()
        result = classifier.load_state_dict(kept, strict=False)
        assert set(result.missing_keys) == {"fc.weight", "fc.bias"} and not result.unexpected_keys
        detectron2 = {re.sub(r"layer(\d)", lambda m: f"res{int(m[1]) + 1}", k) for k in kept}
        assert {k.split(".")[0] for k in detectron2} == {"conv1", "bn1", "res2", "res3", "res4", "res5"}


@pytest.fixture
def float64():
    """Make floating point fine enough for two ways of one computation to agree over several steps."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def orthogonalised(x):
    """Put five steps of Jordan's polynomial in the place of the singular values of x; return them too."""
    u, values, v = torch.linalg.svd(x, full_matrices=False)
    values = values / x.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    return u @ torch.diag(values) @ v, values


class TestTraining:
    def test_the_cosine_falls_from_the_peak_to_zero(self):
        rate = partial(moco.learning_rate, Config(lr=0.4, epochs=8))
        close(torch.tensor([rate(e) for e in (0, 2, 4, 8)]), torch.tensor([0.4, 0.2 + 0.1 * math.sqrt(2), 0.2, 0.0]))

    def test_the_warm_up_rises_linearly_from_zero_to_the_peak_and_the_cosine_spans_the_rest(self):
        rate = partial(moco.learning_rate, Config(lr=0.4, epochs=10, warmup_epochs=2))
        close(torch.tensor([rate(e) for e in (0, 0.5, 2, 6, 10)]), torch.tensor([0, 0.1, 0.4, 0.2, 0]))
        stepped = partial(moco.learning_rate, Config(lr=0.4, warmup_epochs=2, cos=False, schedule=(5,)))
        close(torch.tensor([stepped(e) for e in (1, 2, 4, 5)]), torch.tensor([0.2, 0.4, 0.4, 0.04]))

    def test_the_steps_fall_tenfold_at_the_epochs_of_the_schedule(self):
        rate = partial(moco.learning_rate, Config.from_preset("v1", lr=1))
        close(
            torch.tensor([rate(e) for e in (0, 119.99, 120, 159.99, 160, 200)]),
            torch.tensor([1, 1, 0.1, 0.1, 0.01, 0.01]),
        )

    @given(SEEDS, st.integers(1, 9), st.integers(1, 9), st.sampled_from([1e-9, 1, 1e9]))
    def test_orthogonalising_keeps_the_singular_vectors_and_brings_the_values_near_1(self, seed, m, n, scale):
        x = torch.randn(m, n, generator=rng(seed), dtype=torch.float64)
        expected, values = orthogonalised(x)
        close(moco.orthogonal(scale * x), expected, atol=1e-9)
        assert ((values > 0.65) & (values < 1.25) | (torch.linalg.svdvals(x) < 0.01 * x.norm())).all()

    def test_a_large_weight_is_orthogonalised_in_its_own_precision(self):
        x = torch.randn(300, 300, generator=rng(0))
        close(moco.orthogonal(x), orthogonalised(x.double())[0], atol=1e-4)

    def test_orthogonalising_nothing_gives_nothing(self):
        assert torch.equal(moco.orthogonal(torch.zeros(2, 3)), torch.zeros(2, 3))

    @given(SEEDS, st.floats(0.001, 0.5), st.floats(0, 0.99), st.sampled_from([1e-6, 1]))
    def test_muon_turns_a_weight_along_its_orthogonalised_nesterov_momentum_and_keeps_its_norm(
        self, seed, lr, momentum, scale
    ):
        weight, *gradients = scale * torch.randn(4, 5, 2, 3, 3, generator=rng(seed), dtype=torch.float64)
        ours, buffer = nn.Parameter(weight.clone().to(memory_format=torch.channels_last)), 0
        optimizer = moco.Muon([ours], lr, momentum)
        for gradient in gradients:
            ours.grad = gradient.clone()
            optimizer.step()
            buffer = momentum * buffer + gradient
            step = moco.orthogonal((gradient + momentum * buffer).reshape(5, 18)).reshape(weight.shape)
            moved = weight / weight.norm() - lr * step / step.norm()
            weight = weight.norm() * moved / moved.norm()
            close(ours.detach(), weight, atol=1e-9 * scale)

    @pytest.mark.parametrize("weight, gradient", [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
    def test_muon_leaves_a_weight_without_norm_or_gradient_as_it_is(self, weight, gradient):
        ours = nn.Parameter(torch.full((2, 3), weight))
        ours.grad = torch.full((2, 3), gradient)
        moco.Muon([ours], 0.1, 0.9).step()
        assert torch.equal(ours, torch.full((2, 3), weight))

    def test_muon_moves_vectors_as_nesterovs_sgd_and_leaves_alone_what_has_no_gradient(self):
        ours, theirs, idle = (nn.Parameter(torch.ones(4)) for _ in range(3))
        optimizers = moco.Muon([ours, idle], 0.1, 0.8), torch.optim.SGD([theirs], 0.1, momentum=0.8, nesterov=True)
        for gradient in torch.randn(3, 4):
            ours.grad, theirs.grad = gradient.clone(), gradient.clone()
            for optimizer in optimizers:
                optimizer.step()
        close(ours.detach(), theirs.detach())
        assert torch.equal(idle, torch.ones(4))

    @given(SEEDS, st.integers(8, 40))
    def test_an_epoch_shows_every_image_at_most_once_in_an_order_of_its_own(self, seed, n):
        keys = list(moco.batch_plan(n, tiny_config(seed=seed)))
        assert [epoch for epoch, _ in keys] == [0] * (n // 8) + [1] * (n // 8)
        first, second = (torch.cat([i for e, i in keys if e == epoch]) for epoch in (0, 1))
        assert len(first.unique()) == len(first) == n // 8 * 8 and first.max() < n
        assert not torch.equal(first, second)

    def test_the_order_is_a_function_of_the_seed(self):
        one, two, again = ([i.tolist() for _, i in moco.batch_plan(40, tiny_config(seed=seed))] for seed in (1, 2, 1))
        assert one != two and one == again
        assert sum(one[:5], []) == torch.randperm(40, generator=rng("order", 1, 0)).tolist()

    def test_every_epoch_of_every_seed_has_an_order_of_its_own(self):
        plans = [moco.batch_plan(16, tiny_config(seed=seed, batch_size=16, epochs=4)) for seed in range(4)]
        assert len({tuple(indices.tolist()) for plan in plans for _, indices in plan}) == 16

    def test_no_image_is_left_out_of_every_epoch(self):
        plan = moco.batch_plan(11, tiny_config(epochs=20))
        assert torch.cat([indices for _, indices in plan]).unique().tolist() == list(range(11))

    def test_a_run_draws_an_order_when_its_epoch_begins(self, few, tmp_path, monkeypatch):
        drawn, plan = [], moco.batch_plan
        monkeypatch.setattr(moco, "batch_plan", lambda *a: (drawn.append(key) or key for key in plan(*a)))
        next(training(tmp_path))
        assert len(drawn) == 1

    def test_a_run_keeps_no_graph(self, few, tmp_path):
        run = moco.Run(tiny_config(out=str(tmp_path / "c.pt")))
        assert not any(x.requires_grad for p in run.train() for x in (p.loss, run.losses))

    @pytest.mark.parametrize("method", ["moco", "end-to-end", "memory-bank", "simclr"])
    def test_a_model_is_built_as_configured_and_no_global_generator_moves(self, method):
        options = dict(moco_t=0.37, moco_k=48, moco_m=0.625, bank_m=0.375, mlp_dim=24, moco_dim=12)
        state = torch.get_rng_state()
        model = moco.build_model(tiny_config(method=method, **options), 8)
        expected = {"T": 0.37, "K": 48, "m": 0.375 if method == "memory-bank" else 0.625}
        assert type(model).__name__.lower() == method.replace("-", "")
        assert all(getattr(model, name, value) == value for name, value in expected.items())
        assert [layer.out_features for layer in model.encoder_q.fc[::2]] == [24, 12]
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_weights_are_a_function_of_the_seed_alone(self):
        one = moco.build_model(tiny_config(seed=1), 8).state_dict()
        torch.rand(1)
        assert same(one, moco.build_model(tiny_config(seed=1), 8).state_dict())
        assert not same(one, moco.build_model(tiny_config(seed=2), 8).state_dict())

    def test_a_run_makes_its_views_as_configured(self, few, tmp_path):
        config = tiny_config(out=str(tmp_path / "c.pt"), aug="v2", size=24, min_crop=0.5, seed=7)
        augment = (views := moco.Run(config).split_two_views).augment
        assert (views.seed, augment.size, augment.scale) == (7, 24, (0.5, 1))
        assert augment.recipe is moco.RECIPES["v2"]

    def test_a_run_is_sgd_on_the_loss_of_two_views(self, few, float64, tmp_path):
        config = tiny_config(out=str(tmp_path / "c.pt"), lr=0.03, wd=1.0, batch_size=8, epochs=1)
        steps = list(moco.Run(config).train())
        model, (images, _) = moco.build_model(config, 40), moco.shapes(40, "train")
        momentum = [torch.zeros_like(p) for p in model.encoder_q.parameters()]
        for step, (_, indices) in enumerate(moco.batch_plan(40, config)):
            generator = rng("step", config.seed, step)
            augment = Augment("cifar", 32)
            loss = model(augment(images[indices], generator), augment(images[indices], generator), generator)
            close(steps[step].loss, loss.detach(), atol=1e-8)
            gradients = torch.autograd.grad(loss, list(model.encoder_q.parameters()))
            lr = 0.015 * (1 + math.cos(math.pi * step / 5))
            for p, g, v in zip(model.encoder_q.parameters(), gradients, momentum, strict=True):
                v.mul_(0.9).add_(g + p.detach())
                p.data.sub_(lr * v)
            assert steps[step].lr == pytest.approx(lr) and (steps[step].step, steps[step].steps) == (step + 1, 5)
        assert len(steps) == 5
        saved = moco.load_checkpoint(str(tmp_path / "c.pt"))["state_dict"]
        for name, p in model.encoder_q.named_parameters():
            close(saved["module.encoder_q." + name], p.detach(), atol=1e-8)

    @pytest.mark.parametrize("precision", ["bf16", "fp32"])
    def test_the_optimizer_steps_in_the_runs_precision(self, few, tmp_path, monkeypatch, precision):
        run, seen = moco.Run(tiny_config(out=str(tmp_path / "c.pt"), optimizer="muon", precision=precision)), []
        monkeypatch.setattr(moco, "orthogonal", lambda x: seen.append((x @ x.mT).dtype) or x)
        next(run.train())
        assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}

    def test_the_same_seed_gives_the_same_weights_and_another_seed_others(self, few, tmp_path):
        weights = []
        for seed in (1, 1, 2):
            list(training(tmp_path, overwrite=True, seed=seed, epochs=1))
            weights.append(moco.load_checkpoint(str(tmp_path / "c.pt"))["state_dict"]["module.encoder_q.conv1.weight"])
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])

    def test_the_csv_has_a_row_an_epoch_with_knn_when_it_is_due(self, few, tmp_path):
        rows = [p.row for p in training(tmp_path, epochs=5, knn_every=2) if p.row]
        with open(tmp_path / "c.csv", newline="") as file:
            table = list(csv.DictReader(file))
        assert list(table[0]) == ["epoch", "loss", "lr", "knn", "images_per_s", "seconds"]
        assert [row["epoch"] for row in table] == list("12345")
        assert [bool(row["knn"]) for row in table] == [False, True, False, True, True]
        assert (
            [float(row["lr"]) for row in table]
            == [row["lr"] for row in rows]
            == sorted((r["lr"] for r in rows), reverse=True)
        )
        assert float(table[0]["lr"]) == 0.06 and not list(tmp_path.glob("*.tmp"))
        assert (loaded := moco.load_checkpoint(str(tmp_path / "c.pt")))["epoch"] == 5 and loaded["step"] == 25

    def test_a_row_tells_the_epochs_seconds_and_images_a_second_also_of_a_resumed_run(self, few, tmp_path, monkeypatch):
        now, step = [0.0], moco.Run.take_step
        wait = lambda seconds, result: now.append(now[-1] + seconds) or result  # noqa: E731
        monkeypatch.setattr(moco, "time", types.SimpleNamespace(perf_counter=lambda: now[-1], monotonic=lambda: 0))
        monkeypatch.setattr(moco.Run, "take_step", lambda *a: wait(2, step(*a)))
        monkeypatch.setattr(moco, "accuracy", lambda *_: wait(7, 50.0))
        run = moco.Run(tiny_config(out=str(tmp_path / "c.pt"), knn_every=2, epochs=3))
        list(run.train(lambda: run.step == 8))
        now.append(1000.0)
        *_, last = training(tmp_path, knn_every=2, epochs=3, resume=True)
        with open(tmp_path / "c.csv", newline="") as file:
            table = [[float(row[name]) for name in ("images_per_s", "seconds")] for row in csv.DictReader(file)]
        assert table == [[4, 10], [4, 17], [4, 17]] and "ETA 0:00:34" in moco.describe(last.row, Config(epochs=5))

    def test_a_rows_loss_is_the_mean_of_its_epoch(self, few, tmp_path):
        steps = list(training(tmp_path))
        for first in (0, 5):
            assert steps[first + 4].row["loss"] == pytest.approx(
                sum(p.loss.item() for p in steps[first : first + 5]) / 5
            )

    @pytest.mark.parametrize(
        "options",
        [
            dict(symmetric=True),
            dict(mlp=False, cos=False),
            dict(precision="bf16"),
            dict(aug="v2", size=24),
            dict(stem="imagenet"),
            dict(arch="resnet10", mlp_bn=True, batch_negatives=True, warmup_epochs=0.5, min_crop=0.2),
            dict(optimizer="muon", precision="bf16", size=24, eval_size=32),
        ],
    )
    def test_every_option_trains(self, few, tmp_path, options):
        *_, last = training(tmp_path, epochs=1, **options)
        assert math.isfinite(last.row["loss"])

    @pytest.mark.parametrize(
        "option",
        [
            dict(mlp_bn=True), dict(symmetric=True), dict(batch_negatives=True), dict(min_crop=0.9),
            dict(moco_t=0.3), dict(arch="resnet10"), dict(seed=1), dict(aug="v1"),
        ],
    )  # fmt: skip
    def test_an_option_of_the_model_and_its_views_changes_the_first_loss(self, few, tmp_path, option):
        first, other = (next(training(tmp_path, **options, overwrite=True)).loss for options in ({}, option))
        assert abs(first - other) > 1e-4

    @pytest.mark.parametrize("preset", ["v1", "v2"])
    def test_the_papers_presets_train_on_large_jpegs(self, tmp_path, preset):
        for i in range(8):
            tvf.to_pil_image(images_of(1, 375, 500, seed=i)[0]).save(tmp_path / f"{i}.jpg")
        shrunk = dict(size=64, width=0.125, batch_size=4, moco_k=16, epochs=1, workers=2, device="cpu")
        config = Config.from_preset(preset, data=str(tmp_path), out=str(tmp_path / "c.pt"), **shrunk)
        *_, last = moco.Run(config).train()
        assert last.step == 2 and math.isfinite(last.row["loss"]) and last.row["knn"] is None

    def test_compile_trains_to_the_same_loss(self, few, tmp_path, monkeypatch):
        compiled, real = [], torch.compile
        monkeypatch.setattr(torch, "compile", lambda f, **_: compiled.append(f) or real(f, backend="eager"))
        losses = [
            [p.loss for p in moco.Run(tiny_config(out=str(tmp_path / f"{c}.pt"), epochs=1, compile=c)).train()]
            for c in (False, True)
        ]
        assert len(compiled) == 2
        close(torch.stack(losses[0]), torch.stack(losses[1]), atol=1e-4)

    def test_a_folder_trains_alike_with_any_number_of_workers(self, folder, tmp_path):
        losses = []
        for workers in (0, 2):
            config = tiny_config(data=str(folder), workers=workers, out=str(tmp_path / f"{workers}.pt"), size=16)
            losses.append([p.loss for p in moco.Run(config).train()])
        assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))

    def test_unlabelled_images_train_without_knn(self, folder, tmp_path):
        *_, last = training(tmp_path, data=str(folder / "train"), size=16)
        assert last.row["knn"] is None

    def test_by_itself_it_takes_cuda_then_mps_then_the_cpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
        for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
            monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
            monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
            assert moco.pick_device(Config())[0].type == expected

    def test_the_device_and_its_precision_are_those_asked_for(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        assert moco.pick_device(Config(device="auto"))[0] == CPU
        with pytest.raises(UserError, match="^--device cuda"):
            moco.pick_device(Config(device="cuda"))
        for hardware in (True, False):
            monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda hardware=hardware: hardware)
            monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
            for precision, bf16 in (("auto", hardware), ("bf16", True), ("fp32", False)):
                with moco.pick_device(Config(precision=precision))[1]():
                    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if bf16 else torch.float32)

    @pytest.mark.parametrize("hardware", [True, False])
    def test_on_cuda_auto_takes_bf16_if_it_is_no_emulation(self, monkeypatch, hardware):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or hardware
        )
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        device, autocast = moco.pick_device(Config(device="cuda"))
        assert device == torch.device("cuda", 0) and autocast.keywords == {"enabled": hardware}

    def test_under_torchrun_a_process_joins_the_others_once_and_takes_the_gpu_of_its_rank(self, monkeypatch):
        calls = []
        monkeypatch.setenv("LOCAL_RANK", "3")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
        monkeypatch.setattr(torch.cuda, "set_device", calls.append)
        monkeypatch.setattr(moco.dist, "init_process_group", calls.append)
        cuda, _ = moco.pick_device(Config(device="cuda"))
        for launched, joined in ((False, False), (True, False), (True, True)):
            monkeypatch.setattr(moco.dist, "is_torchelastic_launched", lambda launched=launched: launched)
            monkeypatch.setattr(moco.dist, "is_initialized", lambda joined=joined: joined)
            moco.join_processes(cuda)
            moco.join_processes(CPU)
        assert cuda == torch.device("cuda", 3) and calls == [cuda, "cpu:gloo,cuda:nccl", cuda, "gloo", cuda]

    @pytest.mark.parametrize("joined", [True, False])
    def test_a_process_leaves_the_others_when_its_command_ends(self, run, monkeypatch, joined):
        left = []
        monkeypatch.setattr(moco.dist, "is_initialized", lambda: joined)
        monkeypatch.setattr(moco.dist, "destroy_process_group", lambda: left.append(True))
        assert run("--version")[0] == 0 and left == [True] * joined

    def test_on_a_cpu_glibc_keeps_freed_memory_and_another_library_is_let_be(self, few, tmp_path, monkeypatch):
        calls = []
        for library in (types.SimpleNamespace(mallopt=lambda *x: calls.append(x)), None):
            monkeypatch.setattr(moco, "ctypes", types.SimpleNamespace(CDLL=lambda name, library=library: library))
            moco.Run(tiny_config(out=str(tmp_path / "c.pt"), device="cpu"))
        assert calls == [(-4, 0), (-1, -1)]

    def test_all_of_a_run_lies_on_its_device_and_weights_channels_last(self, few, tmp_path, monkeypatch):
        monkeypatch.setattr(moco, "pick_device", lambda _: (torch.device("meta"), contextlib.nullcontext))
        run = moco.Run(tiny_config(out=str(tmp_path / "c.pt")))
        assert {x.device.type for x in (*run.model.state_dict().values(), run.losses)} == {"meta"}
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in run.model.parameters() if x.dim() == 4)

    @pytest.mark.parametrize("rank, expected", [(0, ["load", "wait", "wait"]), (1, ["wait", "load", "wait"])])
    def test_the_first_process_downloads_before_the_others(self, monkeypatch, rank, expected):
        calls = []
        monkeypatch.setattr(moco, "ranks", lambda: (rank, 2))
        monkeypatch.setattr(moco, "agreed", lambda _: calls.append("wait"))
        monkeypatch.setattr(moco, "load_data", lambda *_: calls.append("load"))
        monkeypatch.setattr(moco, "check_run", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            moco.Run(Config())
        assert calls == expected

    def test_several_processes_keep_buffers_of_their_own_by_the_option_that_torch_has_for_it(self):
        known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        assert moco.OWN_BUFFERS == next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in known)


class TestExport:
    def exported(self, run, tmp_path, **options):
        config = tiny_config(**options)
        names = {f"module.{k}": v for k, v in moco.build_model(config, 8).state_dict().items()}
        base = {"epoch": 1, "arch": config.arch, "config": dataclasses.asdict(config)}
        torch.save(base | {"state_dict": names}, tmp_path / "ckpt.pt")
        assert run("export", "ckpt.pt", "backbone.pt") == (0, "wrote backbone.pt\n", "")
        return names, torch.load(tmp_path / "backbone.pt", weights_only=True)

    def test_the_backbone_is_the_query_encoder_without_its_head(self, run, tmp_path):
        names, backbone = self.exported(run, tmp_path)
        prefix = "module.encoder_q."
        expected = {k[len(prefix) :]: v for k, v in names.items() if k.startswith(prefix) and ".fc." not in k}
        assert same(dict(backbone), expected)

    @pytest.mark.parametrize("detector", ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"])
    def test_a_resnet50_is_the_body_of_a_detector_that_takes_a_training_step(self, run, tmp_path, detector):
        _, backbone = self.exported(run, tmp_path, arch="resnet50", stem="imagenet", width=1.0)
        result = torchvision.models.resnet50().load_state_dict(backbone, strict=False)
        assert result.missing_keys == ["fc.weight", "fc.bias"] and not result.unexpected_keys
        make = getattr(torchvision.models.detection, detector)
        model = make(weights=None, weights_backbone=None, num_classes=2, min_size=64, max_size=64)
        model.backbone.body.load_state_dict(backbone)
        before = model.backbone.body.layer4[0].conv1.weight.clone()
        target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
        target["masks"] = torch.ones(1, 64, 64, dtype=torch.uint8)
        sum(model([torch.rand(3, 64, 64)], [target]).values()).backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        assert not torch.equal(model.backbone.body.layer4[0].conv1.weight, before)

    def test_an_existing_file_is_kept_unless_asked(self, run, tmp_path):
        self.exported(run, tmp_path)
        assert run("export", "ckpt.pt", "backbone.pt")[::2] == (
            2,
            "moco: backbone.pt: exists already; give --overwrite to replace it\n",
        )
        assert run("export", "ckpt.pt", "backbone.pt", "--overwrite")[0] == 0

    def test_linear_needs_no_neighbours(self, few, run, checkpoint):
        torch.save({**checkpoint, "config": {**checkpoint["config"], "knn_k": 41}}, "ckpt.pt")
        assert run("linear", "ckpt.pt")[0] == 0 and run("knn", "ckpt.pt")[0] == 2

    def test_linear_prints_an_accuracy_and_the_settings_that_made_it(self, few, run, checkpoint):
        torch.save(checkpoint, "ckpt.pt")
        first, again = (json.loads(run("linear", "ckpt.pt", "--json")[1]) for _ in "12")
        assert first == again and 0 <= first["top1"] <= 100 and (first["bank"], first["queries"]) == (40, 20)
        assert run("linear", "ckpt.pt", "--head")[1].startswith("linear top-1 ")


class TestNeverLosingARun:
    @pytest.mark.parametrize(
        "source, workers, optimizer",
        [("shapes", 0, "sgd"), ("shapes", 0, "muon"), ("folder", 0, "sgd"), ("folder", 2, "sgd")],
    )
    @given(data=st.data())
    @settings(max_examples=4)
    def test_a_run_resumed_at_any_step_ends_bit_for_bit_as_one_never_stopped(
        self, small_sets, image_folder, checkpoints, source, workers, optimizer, data
    ):
        stops = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=2, unique=True).map(sorted), label="stops")
        options = dict(workers=workers, optimizer=optimizer, batch_size=8 if source == "shapes" else 4, knn_every=1)
        if source == "folder":
            options |= dict(data=str(image_folder), size=16)
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.setattr(moco, "shapes", lambda n, split: small_sets[40 if split == "train" else 20])
            path = Path(folder)
            if (source, optimizer) not in checkpoints:
                list(training(path, **options))
                checkpoints[source, optimizer] = moco.load_checkpoint(str(path / "c.pt"))
            for i, last in enumerate([*stops, 99]):
                run = moco.Run(tiny_config(out=str(path / "c.pt"), resume=i > 0, overwrite=i == 0, **options))
                list(run.train(lambda run=run, last=last: run.step == last))
            assert same(lasting(moco.load_checkpoint(str(path / "c.pt"))), lasting(checkpoints[source, optimizer]))
            assert len((path / "c.csv").read_text().splitlines()) == 3

    @pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_signal_ends_the_step_saves_and_prints_the_command_that_resumes(
        self, image_folder, undisturbed, tmp_path, number, status
    ):
        begun = start(arguments(image_folder, "--out", "cut run.pt", "--workers", "1"), tmp_path)
        await_epoch(begun)
        os.killpg(begun.pid, number)  # as a terminal does, workers included
        out, err = begun.communicate()
        match = re.search(r"^stopped after step (\d+); to go on: python moco.py (.*)$", out, re.M)
        assert begun.returncode == status and err == "" and int(match[1]) < 30
        assert moco.load_checkpoint(str(tmp_path / "cut run.pt"))["step"] == int(match[1])
        again = subprocess.run([sys.executable, MOCO, *shlex.split(match[2])], cwd=tmp_path, capture_output=True)
        assert again.returncode == 0
        assert same(lasting(moco.load_checkpoint(str(tmp_path / "cut run.pt"))), lasting(undisturbed))

    def test_an_error_does_not_leave_the_process_waiting_for_its_workers(self, folder, tmp_path):
        options = "--cache --batch-size 8 --bn-splits 2 --knn-k 3 --workers 1"  # the images differ in size
        done = subprocess.run(
            [sys.executable, MOCO, "train", "--data", folder, *options.split()],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith("moco: --cache: the images differ in size")

    def test_a_test_image_that_cannot_be_read_costs_a_line_and_no_epoch(self, folder, run):
        (folder / "val" / "dark" / "0.png").write_text("no image")
        options = "--size 16 --width 0.125 --batch-size 8 --bn-splits 2 --epochs 1 --knn-k 3 --workers 0 --device cpu"
        status, _, err = run("train", "--data", str(folder), *options.split())
        assert status == 2 and err.endswith("0.png: no image that can be decoded; mend or remove it\n")
        (row,) = moco.load_checkpoint("ckpt.pt")["rows"]
        assert row["epoch"] == 1 and row["knn"] is None and Path("ckpt.csv").read_text().count("\n") == 2

    def test_the_second_signal_acts_at_once(self):
        inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        try:
            with moco.held_signals() as received:
                os.kill(os.getpid(), signal.SIGINT)
                assert received == [signal.SIGINT]
                with pytest.raises(KeyboardInterrupt):
                    os.kill(os.getpid(), signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, inherited)

    @pytest.mark.parametrize("rank", [0, 1])
    def test_of_several_processes_each_holds_every_signal_for_torchrun_repeats_it(self, monkeypatch, rank):
        monkeypatch.setattr(moco, "ranks", lambda: (rank, 2))
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        with moco.held_signals() as received:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGTERM, signal.SIGINT, signal.SIGINT]
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers

    def test_a_run_killed_again_and_again_ends_as_one_never_killed(self, image_folder, undisturbed, tmp_path):
        resume = []
        for _ in range(3):
            begun = start(arguments(image_folder, "--out", "cut.pt", "--save-every-steps", "1", *resume), tmp_path)
            await_epoch(begun)  # the next save may be half done
            begun.kill()
            begun.communicate()
            assert moco.load_checkpoint(str(tmp_path / "cut.pt"))["step"] >= 5
            resume = ["--resume"]
        last = subprocess.run(
            arguments(image_folder, "--out", "cut.pt", "--save-every-steps", "1", *resume),
            cwd=tmp_path,
            capture_output=True,
        )
        assert last.returncode == 0 and not list(tmp_path.glob("*.tmp"))
        assert same(lasting(moco.load_checkpoint(str(tmp_path / "cut.pt"))), lasting(undisturbed))

    def test_two_runs_do_not_write_to_one_checkpoint(self, image_folder, tmp_path):
        first = start(arguments(image_folder, "--out", "c.pt", "--epochs", "999"), tmp_path)
        await_epoch(first)
        options = tiny_config(data=str(image_folder), size=16, out=str(tmp_path / "c.pt"), workers=0, overwrite=True)
        with pytest.raises(UserError, match="^--out: another run writes to .*c.csv"):
            next(moco.Run(options).train())
        first.kill()
        first.communicate()
        assert next(moco.Run(options).train()).step == 1

    def test_saves_come_every_so_many_steps_and_every_five_minutes(self, few, tmp_path, monkeypatch):
        saves = []
        monkeypatch.setattr(moco.Run, "save", lambda run, log: saves.append(run.step))
        list(training(tmp_path, save_every_steps=3))
        assert saves == [3, 5, 6, 9, 10]
        saves.clear()
        minutes = iter([0, 2, 4, 6, 8, 10, 10, 12, 14, 16, 18, 20, 20, *range(22, 99, 2)])
        clock = types.SimpleNamespace(perf_counter=iter(range(999)).__next__, monotonic=lambda: 60 * next(minutes))
        monkeypatch.setattr(moco, "time", clock)  # and not the module's own, which others would import
        list(training(tmp_path))
        assert saves == [3, 5, 8, 10] and moco.SAVE_SECONDS == 5 * 60

    def test_every_save_has_all_processes_statistics(self, few, tmp_path, monkeypatch):
        calls = []
        monkeypatch.setattr(moco.Run, "average_statistics", lambda run: calls.append("average"))
        monkeypatch.setattr(moco.Run, "save", lambda run, log: calls.append("save"))
        list(training(tmp_path, save_every_steps=3))
        assert calls == ["average", "save"] * 5

    def test_a_checkpoint_counts_the_epochs_that_are_complete(self, few, tmp_path):
        for progress in training(tmp_path, save_every_steps=1):
            saved = moco.load_checkpoint(str(tmp_path / "c.pt"))
            assert (saved["step"], saved["epoch"]) == (progress.step, progress.step // 5)

    def test_a_run_that_is_refused_leaves_the_others_files_alone(self, few, tmp_path, monkeypatch):
        def fail(*_):
            raise OSError(11, "Resource temporarily unavailable")

        for name in ("c.csv", "c.pt.tmp"):  # as they are in a first epoch, amid a save
            (tmp_path / name).touch()
        monkeypatch.setattr(pytest.importorskip("fcntl"), "lockf", fail)
        with pytest.raises(UserError, match="another run writes to"):
            next(training(tmp_path))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["c.csv", "c.pt.tmp"]

    @pytest.mark.parametrize("out, log", [("c.pt", "c.csv"), ("m0.99", "m0.99.csv"), ("c.csv", "c.csv.csv")])
    def test_the_csv_lies_beside_the_checkpoint_under_a_name_of_its_own(self, few, tmp_path, out, log):
        list(moco.Run(config := tiny_config(out=str(tmp_path / out), epochs=1)).train())
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([out, log])
        (tmp_path / out).unlink()
        with pytest.raises(UserError, match=f"^--out .*{log}: exists already"):
            moco.Run(config)

    def test_groups_of_one_image_a_process_are_refused(self, few, tmp_path, monkeypatch):
        config = tiny_config(out=str(tmp_path / "c.pt"), batch_size=4)
        data = moco.load_data(config, CPU)
        moco.check_run(config, data)
        monkeypatch.setattr(moco, "ranks", lambda: (0, 2))
        with pytest.raises(UserError, match="^--batch-size 4: .* 2 processes .* twice that"):
            moco.check_run(config, data)

    @pytest.mark.parametrize("where", ["loss", "weights", "statistics"])
    def test_a_number_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(
        self, few, tmp_path, monkeypatch, where
    ):
        run = moco.Run(tiny_config(out=str(tmp_path / "c.pt"), save_every_steps=1))

        def poison(*_, real=run.model.forward):
            loss = real(*_)
            if run.step == 6 and where == "weights":
                loss.register_hook(lambda gradient: gradient * math.nan)
            elif run.step == 6 and where == "statistics":
                run.model.encoder_k.bn1.running_var.fill_(math.inf)
            elif run.step == 6:
                loss = loss * math.nan
            return loss

        monkeypatch.setattr(run.model, "forward", poison)
        with pytest.raises(UserError, match=r"^step 7: .*not finite.*learning rate 0.0207.*--lr.*--precision fp32"):
            list(run.train())
        assert moco.load_checkpoint(str(tmp_path / "c.pt"))["step"] == 6

    @pytest.mark.parametrize("bad, every, kept", [(8, 0, 5), (6, 1, 5), (10, 0, 5), (1, 2, None)])
    def test_a_bad_step_is_named_though_it_is_found_later(self, few, tmp_path, monkeypatch, bad, every, kept):
        run = moco.Run(tiny_config(out=str(tmp_path / "c.pt"), save_every_steps=every))
        real = run.model.forward
        monkeypatch.setattr(run.model, "forward", lambda *x: real(*x) * (math.nan if run.step >= bad - 1 else 1))
        with pytest.raises(UserError, match=f"^step {bad}: "):
            list(run.train())
        path = tmp_path / "c.pt"
        assert (moco.load_checkpoint(str(path))["step"] if path.exists() else None) == kept

    @pytest.mark.parametrize("options", [
        dict(epochs=3), dict(eval_size=24), dict(knn_k=3), dict(knn_t=0.2), dict(workers=1), dict(device="auto"),
        dict(lr=0.01), dict(save_every_steps=2), dict(precision="bf16"),
    ])  # fmt: skip
    def test_resume_takes_options_that_may_change(self, few, tmp_path, checkpoint, options):
        moco.save_checkpoint(str(tmp_path / "c.pt"), checkpoint)
        steps = list(training(tmp_path, resume=True, **options))
        assert [p.step for p in steps] == ([11, 12, 13, 14, 15] if "epochs" in options else [])

    def test_resume_may_change_these_alone(self):
        free = "data root eval_size workers epochs lr wd cos schedule device precision compile knn_every knn_k knn_t"
        assert set(moco.RESUMABLE) == {*free.split(), "out", "overwrite", "resume", "save_every_steps", "tensorboard"}

    @pytest.mark.parametrize("name, value, old", [
        ("arch", "resnet34", "resnet18"), ("moco_dim", 8, 16), ("moco_k", 64, 32), ("seed", 1, 0), ("batch_size", 4, 8),
        ("epochs", 1, 2), ("moco_m", 0.9, 0.99), ("size", 24, 32), ("aug", "v2", "cifar"), ("width", 0.25, 0.125),
        ("bn_splits", 4, 2), ("mlp", False, True), ("moco_t", 0.3, 0.1), ("symmetric", True, False),
        ("optimizer", "muon", "sgd"),
    ])  # fmt: skip
    def test_resume_refuses_by_name_what_may_not_change(self, few, tmp_path, checkpoint, run, name, value, old):
        moco.save_checkpoint("ckpt.pt", checkpoint)
        flag = moco.flag(name)
        given = [flag, str(value)] if value not in (True, False) or value == 1 and name != "symmetric" else [flag]
        status, _, err = run("train", "--resume", *(["--no-mlp"] if name == "mlp" else given))
        assert status == 2 and err.startswith(f"moco: {flag} {value}: ") and f" {old} " in err and err.count("\n") == 1

    @pytest.mark.parametrize("optimizer, options", [("sgd", {"weight_decay": 0.5, "lr": 0.03}), ("muon", {"lr": 0.03})])
    def test_a_resumed_optimizer_takes_the_options_given_now(self, few, tmp_path, optimizer, options):
        next(training(tmp_path, optimizer=optimizer, save_every_steps=1))
        run = moco.Run(tiny_config(out=str(tmp_path / "c.pt"), optimizer=optimizer, resume=True, wd=0.5, lr=0.03))
        (group,) = run.optimizer.param_groups
        assert group.items() >= {**options, "momentum": 0.9}.items() and ("weight_decay" in group) == (
            optimizer == "sgd"
        )

    def test_an_option_younger_than_the_checkpoint_was_at_its_default(self, few, checkpoint, run):
        config = {k: v for k, v in checkpoint["config"].items() if k != "batch_negatives"}
        torch.save({**checkpoint, "config": config}, "ckpt.pt")
        assert run("train", "--resume", "--batch-negatives")[2].startswith("moco: --batch-negatives True: ")
        assert run("train", "--resume")[0] == 0

    def test_resume_goes_on_with_the_checkpoints_options_and_those_given(self, checkpoint, run, monkeypatch):
        config = {**checkpoint["config"], "save_every_steps": 3, "knn_t": 0.3, "overwrite": True}
        torch.save({**checkpoint, "config": config}, "a.pt")
        seen = []
        monkeypatch.setattr(moco, "Run", lambda config: seen.append(dataclasses.asdict(config)) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("train", "--resume", "--out", "a.pt", "--lr", "0.5")
        assert seen == [{**config, "resume": True, "out": "a.pt", "lr": 0.5}]

    def test_resume_refuses_other_images_a_foreign_file_and_no_file(self, few, tmp_path, checkpoint, run, monkeypatch):
        assert run("train", "--resume")[2] == "moco: ckpt.pt: No such file or directory\n"
        torch.save({k: checkpoint[k] for k in ("epoch", "arch", "state_dict")}, "ckpt.pt")
        assert "was not written by moco.py train" in run("train", "--resume")[2]
        torch.save({**checkpoint, "optimizer": {}}, "ckpt.pt")
        assert "its optimizer is of another model" in run("train", "--resume")[2]
        torch.save({**checkpoint, "images": 41}, "ckpt.pt")
        assert run("train", "--resume")[2] == "moco: --data shapes: 40 images; ckpt.pt was trained on 41\n"

    def test_a_folder_that_takes_no_file_is_refused_in_a_line(self, few, tmp_path, run, monkeypatch):
        def refuse(*arguments, **_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(moco, "open", refuse, raising=False)
        status, _, err = run("train", *"--preset tiny --batch-size 8 --width 0.125 --knn-k 5".split())
        assert status == 2 and err == "moco: --out: ckpt.csv cannot be written to (Permission denied)\n"

    def test_a_csv_that_takes_no_row_costs_a_line(self):
        with (
            open(os.devnull) as log,
            pytest.raises(UserError, match=r"^--out: /dev/null not written \(.+\)$"),
        ):
            moco.write_rows(log, [{"epoch": 1}])

    def test_a_folder_that_vanishes_costs_a_line(self, few, tmp_path):
        (home := tmp_path / "home").mkdir()
        steps = training(home)
        next(steps)
        shutil.rmtree(home)
        with pytest.raises(UserError, match="^.*c.pt: not written .*No such file"):
            list(steps)

    def test_a_run_that_overwrites_removes_old_rows_and_the_litter_of_a_killed_save_at_its_start(self, few, tmp_path):
        (tmp_path / "c.pt.tmp").write_text("half a checkpoint")
        (tmp_path / "c.csv").write_text("old")
        next(steps := training(tmp_path, overwrite=True))
        assert not (tmp_path / "c.pt.tmp").exists() and (tmp_path / "c.csv").read_text() == ""
        steps.close()


MOCO = str(Path(__file__).parent / "moco.py")


def arguments(folder, *options):
    base = "--preset tiny --width 0.125 --size 16 --batch-size 4 --workers 0 --knn-k 3 --device cpu --precision fp32"
    base += " --epochs 6"
    return [sys.executable, MOCO, "train", "--data", str(folder), *base.split(), *options]


def start(command, place):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=place, start_new_session=True, **pipes)


def await_epoch(begun):
    assert begun.stdout.readline().endswith(": 20 images of 2 classes, 8 to test on; cpu, fp32\n")
    assert begun.stdout.readline().startswith("epoch ")


@pytest.fixture(scope="module")
def undisturbed(image_folder, tmp_path_factory):
    """Run in this process what `arguments` describes, to the end."""
    options = dict(width=0.125, size=16, batch_size=4, workers=0, knn_k=3, device="cpu", precision="fp32", epochs=6)
    out = str(tmp_path_factory.mktemp("whole") / "c.pt")
    list(moco.Run(Config.from_preset("tiny", data=str(image_folder), out=out, **options)).train())
    return moco.load_checkpoint(out)


@pytest.fixture(scope="module")
def checkpoints():
    return {}


def torchrun(processes, command, place):
    """Return the command's exit status and output under torchrun, with a thread for each process."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *command[1:]], cwd=place, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout, done.stderr


@contextlib.contextmanager
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


METHODS = ["moco", "symmetric", "batch-negatives", "end-to-end", "memory-bank", "simclr"]


@pytest.fixture(scope="module")
def several(image_folder, tmp_path_factory):
    """Train three steps of every method with 2 and 3 processes, one group each, and with 1 process, as many groups.

    In float64: BatchNorm over few numbers and ReLU's kinks enlarge float32's rounding a thousandfold in three steps.
    """
    place = tmp_path_factory.mktemp("several")

    def options(method, processes, out, **more):
        base = dict(data=str(image_folder), size=16, batch_size=6, epochs=1, lr=0.01, workers=0, moco_k=16, knn_k=3)
        forms = {"symmetric": dict(symmetric=True), "batch-negatives": dict(batch_negatives=True)}
        kind = forms.get(method, dict(method=method))
        return dict(base, **kind, width=0.125, device="cpu", precision="fp32", out=str(place / out), **more)

    code = """
import json, torch, moco
torch.set_default_dtype(torch.float64)
for options in json.loads(sys.argv[1]):
    list(moco.Run(moco.Config(**options)).train())
torch.distributed.destroy_process_group()  # else gloo's threads may abort the exit
"""
    (place / "several.py").write_text(f"import sys\nsys.path.insert(0, {str(Path(MOCO).parent)!r})\n{code}")
    results = {}
    for processes in (2, 3):
        runs = [options(method, processes, f"{processes}-{method}.pt", bn_splits=1) for method in METHODS]
        status, _, err = torchrun(processes, ["", "several.py", json.dumps(runs)], place)
        assert status == 0, err
        for method, run in zip(METHODS, runs):
            alone = options(method, processes, f"1-{processes}-{method}.pt", bn_splits=processes)
            with float64_by_default():
                list(moco.Run(Config(**alone)).train())
            results[processes, method] = (*map(moco.load_checkpoint, (alone["out"], run["out"])), run)
    return results


class TestSeveralProcesses:
    @pytest.mark.parametrize("processes", [2, 3])
    @pytest.mark.parametrize("method", METHODS)
    def test_n_processes_with_plain_batch_norm_are_one_with_n_splits(self, several, processes, method):
        one, many, _ = several[processes, method]
        close(many["losses"], one["losses"], atol=1e-10, rtol=0)
        assert many["state_dict"].keys() == one["state_dict"].keys() and many["step"] == 3
        for name, x in one["state_dict"].items():
            close(many["state_dict"][name], x, atol=1e-10, rtol=0)
        assert many["rows"][0]["knn"] == one["rows"][0]["knn"]

    @pytest.mark.parametrize(
        "gradient",
        [torch.ones(4, 2), torch.ones(2, 4).T, torch.ones(1).expand(4, 2)],
        ids=["plain", "turned", "expanded"],
    )
    def test_gradients_are_added_up_in_a_dense_copy_for_autograd_may_use_its_own_again(self, monkeypatch, gradient):
        monkeypatch.setattr(moco.dist, "all_reduce", lambda x: x.view(-1).mul_(3))
        assert (moco.Gather.backward(None, gradient) == 3).all() and (gradient == 1).all()

    def test_rows_are_exchanged_in_a_plain_layout(self, monkeypatch):
        monkeypatch.setattr(moco, "ranks", lambda: (0, 2))
        monkeypatch.setattr(moco.Gather, "apply", lambda x: x)
        x = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
        assert moco.gathered(x).is_contiguous() and torch.equal(moco.gathered(x), x)

    def test_a_checkpoint_of_two_processes_resumes_on_one(self, several):
        *_, options = several[2, "moco"]
        assert [p.step for p in moco.Run(Config(**{**options, "epochs": 2, "resume": True})).train()] == [4, 5, 6]

    def test_a_process_that_dies_ends_the_run_with_a_line_that_says_which(self, image_folder, tmp_path):
        code = f"""
import os, sys
sys.path.insert(0, {str(Path(MOCO).parent)!r})
import moco
step = moco.Run.take_step
def die(run, *batch):
    if run.step == 7 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)
    return step(run, *batch)
moco.Run.take_step = die
moco.main()
"""
        (tmp_path / "mortal.py").write_text(code)
        command = arguments(image_folder, "--out", "c.pt", "--bn-splits", "1", "--epochs", "3")
        status, out, err = torchrun(2, ["", "mortal.py", *command[2:]], tmp_path)
        assert out.count("epoch 1/3") == out.count(": 20 images") == 1  # rank 0 alone prints
        assert status != 0 and re.search(r"rank *: 1 ", err) and "SIGKILL" in err
        assert moco.load_checkpoint(str(tmp_path / "c.pt"))["step"] == 5

    def test_a_batch_that_the_processes_cannot_share_is_refused(self, image_folder, tmp_path):
        command = arguments(image_folder, "--bn-splits", "1", "--batch-size", "5")
        status, _, err = torchrun(2, command, tmp_path)
        assert status != 0 and "--batch-size 5: must be a multiple of 2 processes" in err


class TestCommandLine:
    def test_train_writes_a_checkpoint_that_knn_evaluates_to_the_same_accuracy(self, few, run, no_gpu):
        options = "--preset tiny --width 0.125 --batch-size 8 --epochs 1 --knn-k 5 --knn-t 0.3"
        status, out, _ = run("train", *options.split())
        assert status == 0 and re.search(r"(?m)^epoch 1/1  loss \d", out)
        status, out, _ = run("knn", "ckpt.pt", "--json")
        result = json.loads(out.splitlines()[-1])
        with open("ckpt.csv", newline="") as file:
            (row,) = csv.DictReader(file)
        assert status == 0
        assert result.pop("top1") == pytest.approx(float(row["knn"]))
        common = dict(data="shapes", bank=40, queries=20, checkpoint="ckpt.pt", epoch=1, device="cpu")
        assert result == dict(features="backbone", k=5, T=0.3, **common)
        linear = json.loads(run("linear", "ckpt.pt", "--json", "--head")[1])
        assert 0 <= linear.pop("top1") <= 100 and linear == dict(features="head", **common)
        assert run("knn", "ckpt.pt", "--head", "--knn-k", "3")[1].startswith("kNN top-1 ")

    @pytest.mark.parametrize("options, side", [("", 32), ("--size 16", 16), ("--size 16 --eval-size 40", 40)])
    def test_a_size_given_to_knn_wins_over_what_training_evaluated_at(
        self, run, checkpoint, monkeypatch, options, side
    ):
        edited(config={**checkpoint["config"], "size": 24, "eval_size": 32})(checkpoint, Path("ckpt.pt"))
        seen = []
        monkeypatch.setattr(
            moco, "accuracy", lambda e, d, config, *_: seen.append(config.eval_size or config.size) or 0.0
        )
        assert run("knn", "ckpt.pt", *options.split())[0] == 0 and seen == [side]

    @pytest.mark.parametrize(
        "arguments, words",
        [
            ("--preset v3", "--preset"), ("--arch vgg", "--arch"), ("--data nowhere", "--data nowhere"),
            ("--data empty", "no images"), ("--data bad", ".png: no image"), ("--batch-size 12", "--bn-splits 8"),
            ("--batch-size 64 --out c.pt", "--batch-size 64: more than the 40"), ("--moco-t 0", "--moco-t"),
            ("--moco-m 2", "--moco-m"),
            ("--batch-size 16", "--out ckpt.pt: exists"), ("--batch-size 16 --out no/c.pt", "--out no/c.pt"),
            ("--batch-size 16 --out c.pt --knn-k 41", "--knn-k 41"), ("--device cuda", "--device cuda"),
            ("--batch-size 16 --out empty --overwrite", "--out empty: must be a file"),
            ("--batch-size 16 --out device --overwrite", "--out device: must be a file"),
        ],
    )  # fmt: skip
    def test_a_mistake_costs_a_line_on_stderr_and_status_2_and_writes_nothing(
        self, few, run, monkeypatch, tmp_path, arguments, words
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        (tmp_path / "empty").mkdir()
        (tmp_path / "bad").mkdir()
        for i in range(16):
            (tmp_path / "bad" / f"{i}.png").write_text("no image")
        (tmp_path / "ckpt.pt").write_text("precious")
        os.mkfifo(tmp_path / "device")  # as /dev/null, which root could replace
        files = sorted(tmp_path.rglob("*"))
        extra = ["--batch-size", "16", "--out", "x.pt", "--workers", "0"] if "bad" in arguments else []
        data = [] if "--data" in arguments else ["--data", "shapes"]
        status, out, err = run("train", *data, "--width", "0.125", *arguments.split(), *extra)
        assert status == 2 and words in err and "Traceback" not in err
        assert out.count("\n") == ("bad" in arguments)  # what was found, before an image is read
        assert err.count("\n") == 1 or "─" in err
        assert sorted(tmp_path.rglob("*")) == files and (tmp_path / "ckpt.pt").read_text() == "precious"

    def test_too_little_memory_costs_a_line_and_a_bug_a_plain_traceback(self, run, monkeypatch, capsys):
        line = "moco: not enough memory; take a smaller --size, --batch-size or --width, or another --device\n"
        assert run("views", "x.png", "--preset", "tiny", "--size", "5000000") == (2, "", line)
        errors = iter([torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"), RuntimeError("a bug")])

        def fail(*_):
            raise next(errors)

        monkeypatch.setattr(moco, "load_data", fail)
        assert run("views", "x.png") == (2, "", line)
        monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
        with pytest.raises(RuntimeError, match="a bug") as caught:
            run("views", "x.png")
        sys.excepthook(caught.type, caught.value, caught.tb)
        assert capsys.readouterr().err.startswith("Traceback (most recent call last):\n")

    def test_knn_refuses_unlabelled_images_and_too_large_a_k(self, few, run, folder):
        run("train", *"--preset tiny --width 0.125 --batch-size 8 --epochs 1 --knn-k 5 --device cpu".split())
        for arguments, words in (
            (["--data", str(folder / "train")], "no labels to evaluate by"),
            (["--knn-k", "41"], "--knn-k 41"),
        ):
            status, out, err = run("knn", "ckpt.pt", *arguments)
            assert status == 2 and out == "" and words in err and err.count("\n") == 1
        assert run("knn", "ckpt.pt", "--knn-k", "40")[0] == 0
        assert run("knn", "none.pt")[2] == "moco: none.pt: No such file or directory\n"

    def test_a_process_that_another_ones_signal_stops_ends_as_if_it_had_got_it(self, few, run, monkeypatch):
        monkeypatch.setattr(moco.Run, "train", lambda run, stop: iter(()))
        assert run("train", *"--preset tiny --batch-size 8 --knn-k 5 --device cpu".split())[0] == 143

    def test_a_place_that_takes_no_file_costs_a_line(self, run, checkpoint):
        torch.save(checkpoint, "ckpt.pt")
        os.mkfifo("device")
        for place in ("ckpt.pt/x.pt", "no/x.pt", ".", "device"):
            expected = f"moco: {place}: must be a file in a folder that exists\n"
            assert run("export", "ckpt.pt", place)[::2] == run("neighbors", "ckpt.pt", place)[::2] == (2, expected)
        with pytest.raises(UserError, match=r"^ckpt.pt/x.pt: not written \("):
            moco.write_file("ckpt.pt/x.pt", None)

    def test_without_a_command_it_says_what_it_is_and_what_it_can_do(self, run, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        out = "".join(run()[1:])
        assert moco.__doc__.splitlines()[0] in out and all(command.__name__ in out for command in moco.COMMANDS)

    def test_views_are_drawn_without_decoding_all_images_or_starting_workers(self, run, monkeypatch):
        seen = []
        monkeypatch.setattr(moco, "load_data", lambda config, device: seen.append((config, device)) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("views", "x.png", "--preset", "cpu")
        assert seen == [(Config.from_preset("cpu", cache=False, workers=0), CPU)]

    def test_an_accuracy_is_said_to_a_hundredth_and_whole_in_json(self, few, run, checkpoint, monkeypatch):
        torch.save(checkpoint, "ckpt.pt")
        monkeypatch.setattr(moco, "accuracy", lambda *_: 67.8849)
        for command in ("knn", "linear"):
            assert f"{command} top-1 67.88 % (" in run(command, "ckpt.pt")[1].replace("kNN", "knn")
            assert json.loads(run(command, "ckpt.pt", "--json")[1])["top1"] == 67.8849

    def test_an_argument_has_its_own_help(self, run):
        assert "file to write; -: stdout" in run("export", "--help")[1]

    def test_an_existing_checkpoint_is_replaced_when_asked(self, few, run):
        Path("ckpt.pt").write_text("old")
        status, *_ = run(
            "train", *"--preset tiny --overwrite --width 0.125 --batch-size 8 --epochs 1 --knn-k 5".split()
        )
        assert status == 0 and moco.load_checkpoint("ckpt.pt")["epoch"] == 1

    def test_a_checkpoints_encoder_is_put_on_the_device_with_weights_channels_last(
        self, few, checkpoint, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(moco, "pick_device", lambda _: (torch.device("meta"), contextlib.nullcontext))
        torch.save(checkpoint, tmp_path / "c.pt")
        encoder, data, *_ = moco.reopen(str(tmp_path / "c.pt"), {})
        assert {x.device.type for x in (*encoder.state_dict().values(), data.test.images)} == {"meta"}
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in encoder.parameters() if x.dim() == 4)

    @pytest.mark.parametrize(
        "command, expected",
        [
            ("knn", (False, False)),
            ("knn --head", (True, False)),
            ("linear", (False, True)),
            ("linear --head", (True, True)),
        ],
    )
    def test_a_command_measures_what_it_says(self, few, run, checkpoint, monkeypatch, command, expected):
        torch.save(checkpoint, "ckpt.pt")
        monkeypatch.setattr(moco, "accuracy", lambda e, d, c, a, head, linear: 100.0 * ((head, linear) == expected))
        assert " 100.00 % (" in run(*command.split(), "ckpt.pt")[1]

    @pytest.mark.parametrize("command, names", [
        ("knn", "data root size eval-size workers cache aug device precision knn-k knn-t head json"),
        ("linear", "data root size eval-size workers cache aug device precision head json"),
        ("export", "overwrite"),
        ("views", "preset data root size aug min-crop seed overwrite"),
        ("neighbors", "data root size eval-size workers cache aug device precision seed overwrite"),
    ])  # fmt: skip
    def test_a_command_has_these_options(self, run, monkeypatch, command, names):
        monkeypatch.setenv("COLUMNS", "200")
        assert set(re.findall(r"--([a-z-]+)", run(command, "--help")[1])) - {"help"} >= set(names.split())

    def test_a_terminal_sees_where_the_run_stands(self, monkeypatch, capsys):
        now = [100.0]
        monkeypatch.setattr(moco, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
        console = rich.console.Console(force_terminal=True, width=120, get_time=lambda: now[0])
        monkeypatch.setattr(rich, "_console", console)

        def steps(last):
            for i in range(1, last + 1):
                now[0] += 2
                row = dict(epoch=i // 2, loss=0.25, lr=0.1, knn=12.5, images_per_s=88.0, seconds=3.0)
                yield moco.Progress(i, 6, torch.tensor(1 / i), 0.5 / i, None if i % 2 else row)

        for last, expected in (
            (0, "epoch 1 loss … lr … images/s … ETA -:--:--"),
            (3, "epoch 2 loss 0.333 lr 0.1667 images/s 256 ETA 0:00:06"),
            (6, "epoch 3 loss 0.167 lr 0.0833 images/s 256 ETA 0:00:00"),
        ):
            moco.show(steps(last), Config(epochs=3))
            text = capsys.readouterr().out
            for epoch in range(1, 1 + last // 2):
                left = f"0:00:0{9 - 3 * epoch}"
                assert f"epoch {epoch}/3  loss 0.2500  lr 0.1  88 images/s  ETA {left}  kNN 12.50 %\n" in text
            assert re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text).rstrip().endswith(expected)

    @pytest.mark.parametrize("terminal, reads", [(True, [0, 3, 4]), (False, [])])
    def test_a_loss_is_waited_for_on_a_terminal_alone_and_every_half_second(self, monkeypatch, capsys, terminal, reads):
        times, seen = [100, 100.25, 100.5, 100.75, 101], []
        monkeypatch.setattr(rich, "_console", rich.console.Console(force_terminal=terminal, width=20))
        monkeypatch.setattr(moco, "time", types.SimpleNamespace(monotonic=iter(times).__next__))

        class Loss:
            def __format__(self, _):
                return seen.append(len(fed) - 1) or ""

        row = dict(epoch=2, loss=0.25, lr=0.1, knn=None, images_per_s=88.0, seconds=3.0)
        fed = []
        moco.show(
            (fed.append(i) or moco.Progress(i, 5, Loss(), 0.5, row if i == 5 else None) for i in range(1, 6)), Config()
        )
        assert seen == reads
        assert "epoch 2/100  loss 0.2500  lr 0.1  88 images/s  ETA 0:04:54\n" in capsys.readouterr().out

    def test_every_option_of_config_is_a_flag_with_its_help(self, run, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        status, out, _ = run("train", "--help")
        text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", re.sub(r"\x1b\[[\d;]*m", "", out)).split())
        assert status == 0
        for field in dataclasses.fields(Config):
            assert moco.flag(field.name) + " " in text and moco.get_args(field.type)[1][:40] in text
            assert field.default == "" or f" [default: ({field.default})]" in text
        assert "()" not in text

    def test_schedule_may_be_given_several_times(self, monkeypatch, run):
        seen = []
        monkeypatch.setattr(moco, "Run", lambda config: seen.append(config) or 1 / 0)
        run = partial(pytest.raises, ZeroDivisionError, run)
        run("train", "--schedule", "3", "--schedule", "5", "--no-cos")
        run("train")
        assert (seen[0].schedule, seen[0].cos) == ((3, 5), False) and seen[1] == Config()

    @pytest.mark.parametrize(
        "command, columns", [("views out.png --data shapes", 9), ("neighbors ckpt.pt out.png", 11)]
    )
    def test_a_picture_is_a_png_that_replaces_no_file_unasked(self, few, run, checkpoint, command, columns):
        torch.save(checkpoint, "ckpt.pt")
        assert run(*command.split()) == (0, "wrote out.png\n", "")
        assert default_loader("out.png").width == 4 + columns * 108
        assert run(*command.split())[::2] == (2, "moco: out.png: exists already; give --overwrite to replace it\n")
        assert run(*command.split(), "--overwrite")[0] == 0

    def test_a_dash_writes_to_standard_output(self, monkeypatch):
        written = io.TextIOWrapper(io.BytesIO())
        monkeypatch.setattr(sys, "stdout", written)
        moco.write_new("-", lambda file: file.write(b"picture"))
        assert written.buffer.getvalue() == b"picture"

    @pytest.mark.parametrize("labelled", [True, False])
    def test_train_says_what_it_found_and_what_to_do_next(self, folder, run, no_gpu, labelled):
        place = folder if labelled else folder / "train"
        options = "--size 16 --width 0.125 --batch-size 8 --bn-splits 2 --epochs 1 --knn-k 3 --workers 0"
        command = ["train", "--data", str(place), *options.split(), "--precision", "bf16", "--out", "a b.pt"]
        first, epoch, last = run(*command)[1].splitlines()
        assert re.search(r"ETA 0:00:00" + r"  kNN \d+\.\d\d %" * labelled + "$", epoch)
        labels = "of 2 classes, 8 to test on" if labelled else "without labels"
        assert first == f"{place}: 20 images {labels}; cpu, bf16"
        following = shlex.split(last.split("python moco.py ")[1])
        assert last.startswith("a b.pt holds all 1 epochs; its ") and run(*following)[0] == 0
        assert following[0] == ("knn" if labelled else "neighbors")
        assert run("train", "--resume", "--out", "a b.pt")[1].splitlines() == [first, last]

    def test_version_is_that_of_the_package(self, run):
        text = (Path(__file__).parent / "pyproject.toml").read_text()
        assert (
            run("--version") == run("--version", "train") == (0, f"moco.py {moco.__version__}\n", "")
            and 'attr = "moco.__version__"' in text
        )

    def test_tensorboard_gets_what_the_csv_gets(self, few, run, monkeypatch):
        written = []

        class SummaryWriter:
            def __init__(self, folder):
                assert folder == "events"

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def add_scalar(self, name, value, epoch):
                written.append((str(epoch), name, str(value)))

        options = (
            "--preset tiny --width 0.125 --batch-size 8 --epochs 2 --warmup-epochs 1 --knn-k 5 --tensorboard events"
        )
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        assert run("train", *options.split())[::2] == (
            2,
            "moco: --tensorboard: needs a package of that name: pip install tensorboard\n",
        )
        assert not list(Path().iterdir())
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=os.mkdir))
        Path("events").touch()
        assert run("train", *options.split())[::2] == (
            2,
            "moco: --tensorboard events: cannot be written to (File exists)\n",
        )
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
        assert run("train", *options.split())[0] == 0
        with open("ckpt.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert written == [(row["epoch"], k, v) for row in rows for k, v in row.items() if v and k != "epoch"]

    def test_what_takes_long_is_said_on_a_terminal_alone(self, monkeypatch, capsys):
        with moco.working("reading"):
            pass
        assert capsys.readouterr() == ("", "")
        monkeypatch.setenv("FORCE_COLOR", "1")
        with moco.working("reading"):
            pass
        out, err = capsys.readouterr()
        assert out == "" and "reading" in err

    def test_a_class_defaults_to_what_the_command_line_defaults_to(self):
        named = dict(recipe="aug", dim="moco_dim", K="moco_k", m="moco_m", T="moco_t", num_splits="bn_splits")
        defaults = {}
        for cls in (
            Augment,
            SplitTwoViews,
            SplitBatchNorm,
            ResNetEncoder,
            MoCo,
            moco.EndToEnd,
            moco.MemoryBank,
            moco.SimCLR,
        ):
            for name, parameter in inspect.signature(cls).parameters.items():
                if parameter.default is not parameter.empty:
                    option = "bank_m" if (cls, name) == (moco.MemoryBank, "m") else named.get(name, name)
                    defaults[cls.__name__, option] = parameter.default
        assert defaults == {(cls, option): getattr(Config, option) for cls, option in defaults}
        assert len(defaults) == 25

    def test_importing_moco_needs_torch_and_torchvision_alone_and_says_nothing(self):
        code = "import sys; sys.modules['typer'] = sys.modules['rich'] = None; import moco"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_ctrl_c_during_the_imports_ends_without_a_traceback(self, tmp_path):
        shutil.copy(MOCO, tmp_path)
        (tmp_path / "numpy.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
        done = subprocess.run([sys.executable, tmp_path / "moco.py"], capture_output=True)
        assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")

    def test_ctrl_c_in_the_midst_of_a_command_ends_it_with_status_130_and_without_a_traceback(self, tmp_path):
        os.mkfifo(image := tmp_path / "0.png")
        begun = start([sys.executable, MOCO, "views", "-", "--data", str(tmp_path)], tmp_path)
        while begun.poll() is None:
            with contextlib.suppress(OSError), open(os.open(image, os.O_WRONLY | os.O_NONBLOCK), "wb"):  # till it reads
                os.killpg(begun.pid, signal.SIGINT)
                break
        assert (*begun.communicate(), begun.returncode) == ("", "", 130)

    @pytest.mark.parametrize("section", range(1, 10))
    def test_every_section_can_be_cut_out_with_those_above_it(self, section):
        text = "".join(re.split(r"(?m)^(?=# ─)", Path(moco.__file__).read_text())[: section + 1])
        scope = {"__name__": "part"}
        exec(code := compile(text, "part", "exec"), scope)
        todo, used = [code], set()
        while todo:
            part = todo.pop()
            todo += [constant for constant in part.co_consts if hasattr(constant, "co_code")]
            used |= {i.argval for i in dis.get_instructions(part) if i.opname == "LOAD_GLOBAL"}
        assert len(used) > 15 and used <= scope.keys() | set(dir(builtins)), used - scope.keys() - set(dir(builtins))


class TestTheTests:
    def test_values_that_differ_are_not_close(self):
        for actual, expected in ((torch.ones(2), torch.tensor([1, 1.001])), (torch.ones(2), torch.ones(3))):
            with pytest.raises(AssertionError):
                close(actual, expected)

    @pytest.mark.parametrize(
        "other", [{"a": [torch.zeros(2), 2]}, {"a": [torch.ones(2), 1]}, {"a": [torch.ones(2)]}, {"b": 1}, {}]
    )
    def test_trees_that_differ_anywhere_are_not_the_same(self, other):
        assert same({"a": [torch.ones(2), 2]}, {"a": (torch.ones(2), 2)}) and not same({"a": [torch.ones(2), 2]}, other)

    def test_samples_of_two_distributions_are_told_apart(self):
        n = 4000
        a, b = draws(rng(0), n), draws(rng(1), n)
        assert kolmogorov_smirnov(a, b) < 1.95 * math.sqrt(2 / n) < kolmogorov_smirnov(a, b**1.2)
        assert kolmogorov_smirnov(a, a) == 0 and kolmogorov_smirnov(a, a + 2) == 1

    @pretended_cuda
    @pytest.mark.filterwarnings("ignore:CUDA is not available")
    @pytest.mark.parametrize(
        "bad",
        [
            lambda x: x[torch.tensor([0])],
            lambda x: x + torch.ones(3),
            lambda x: torch.ones(3).to(x.device),
            lambda x: x.sum().item(),
        ],
    )
    def test_a_tensor_left_behind_and_a_copy_that_waits_are_noticed(self, bad):
        with (
            FakeTensorMode(),
            NothingWaits(),
            pytest.raises(Exception, match="mixes devices|copy that waits|_local_scalar_dense"),
        ):
            bad(torch.ones(3, device="cuda"))

    def test_the_loss_oracle_minds_its_keys_temperature_and_exceptions(self):
        q, k = unit(3, 4, 0), unit(3, 4, 1)
        right = oracle_nce(q, k, range(3), [()] * 3, 0.2)
        close(right, F.cross_entropy(q @ k.T / 0.2, torch.arange(3)))
        wrong = [(range(3), [()] * 3, 0.3), ([1, 2, 0], [()] * 3, 0.2), (range(3), [(1,), (2,), (0,)], 0.2)]
        assert all(abs(oracle_nce(q, k, *arguments) - right) > 1e-2 for arguments in wrong)


class TestReadme:
    text = (Path(__file__).parent / "README.md").read_text()

    def test_its_python_runs_as_printed(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        names = ResNetEncoder("resnet50", stem="imagenet").state_dict()
        torch.save({k: v for k, v in names.items() if not k.startswith("fc.")}, "backbone.pt")
        scope = {}
        for block in re.findall(r"```python\n(.*?)```", self.text, re.S):
            exec(block, scope)
        assert math.isfinite(scope["loss"].item()) and "detector" in scope

    @pytest.mark.parametrize(
        "line, code",
        [
            ("`info_nce`, ", "y = info_nce(unit, unit, unit.T, 0.1), SplitBatchNorm(3, 2)(torch.rand(4, 3, 2, 2))"),
            ("`info_nce`, ", "y = knn_predict(unit, unit, torch.arange(4), 4, k=1, T=0.1)"),
            ("`MoCo` ", "y = MoCo(nn.Linear(3, 4), dim=4, K=8)(unit, unit, torch.Generator()).backward()"),
            ("`Augment` ", "y = SplitTwoViews(Augment(size=8))(torch.zeros(4, 3, 9, 9).byte(), rng(0))"),
        ],
    )
    def test_what_it_says_to_copy_is_enough(self, line, code):
        (text,) = re.findall(rf"^- {line}.*?(?=^[-\n])", self.text, re.M | re.S)
        wanted, source = set(re.findall(r"`(\w+)`", text)), Path(moco.__file__).read_text()
        body = ast.parse(source).body
        span = next((range(*map(int, row)) for row in re.findall(r"Views \| (\d+)-(\d+)", self.text)), ())
        names = [getattr(node, "name", None) or getattr(getattr(node, "targets", [0])[0], "id", None) for node in body]
        a, b = (names.index(name) for name in ("ranks", "gathered"))
        kept = [
            node
            for i, (node, name) in enumerate(zip(body, names, strict=True))
            if isinstance(node, ast.Import | ast.ImportFrom)
            or name in wanted
            or ("from `ranks` to" in text and a <= i <= b)
            or ("the Views section" in text and node.lineno in span)
        ]
        scope = {"__name__": "pasted"}
        exec(compile(ast.Module(kept, []), "pasted", "exec"), scope)
        exec(f"unit = F.normalize(torch.rand(4, 3), dim=1); {code}", scope)
        assert "y" in scope

    def test_its_specification_names_tests_that_exist_in_every_section(self):
        rows = re.findall(r"^\| ([A-Z][\w ]+) \| [^|]+ \| ([^|]+) \|$", self.text, re.M)
        named = [name for _, tests in rows for name in re.findall(r"`(\w+)`", tests)]
        source = (Path(__file__)).read_text()
        assert len(named) > 20 and all(re.search(rf"(def|class) {name}\(", source) for name in named)
        sections = re.findall(r"^# ─+ ([\w ]+) ─+$", Path(moco.__file__).read_text(), re.M)
        assert list(dict.fromkeys(section for section, _ in rows)) == sections

    @pytest.mark.parametrize("field", dataclasses.fields(Config), ids=lambda field: field.name)
    def test_it_lists_every_option_with_its_default_and_choices(self, field):
        kind, text, *_ = moco.get_args(field.type)
        choices = f": {', '.join(moco.get_args(kind))}" if moco.get_origin(kind) is moco.Literal else ""
        default = f"`{field.default}`" if field.default != "" else ""
        assert f"\n| `{moco.flag(field.name)}` | {default} | {text}{choices} |\n" in self.text

    def test_its_tour_names_every_section_with_its_lines_and_what_stands_there(self):
        lines = Path(moco.__file__).read_text().splitlines()
        banners = [(i, line.strip("# ─")) for i, line in enumerate(lines, 1) if re.match("# ─+ ", line)]
        ends = [start - 1 for start, _ in banners[1:]] + [len(lines)]
        rows = re.findall(r"^\| ([\w ]+) \| (\d+)-(\d+) \| (.*?) \|", self.text, re.M)
        assert [row[:3] for row in rows] == [(name, str(a), str(b)) for (a, name), b in zip(banners, ends, strict=True)]
        for _, start, end, names in rows:
            for name in re.findall(r"`(?:\w+\.)?(\w+)`", names):
                assert re.search(rf"^ *(def |class |){name}\b[(: ]", "\n".join(lines[int(start) : int(end)]), re.M), (
                    name
                )

    def test_its_commands_and_flags_exist_and_its_test_command_is_that_of_ci(self, run, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        commands = set(re.findall(r"(?<!-)moco\.py (\w+)", self.text))
        assert commands == {command.__name__ for command in moco.COMMANDS}
        known = "".join(run(*command, "--help")[1] for command in ([], *([name] for name in commands)))
        torchruns = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--help", "--collect-only"}
        flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", self.text)) - torchruns
        assert len(flags) > 8 and all(flag + " " in known for flag in flags)
        ci = (Path(__file__).parent / ".ci" / "run").read_text().splitlines()
        assert re.search(r"&& (pytest.*?) +#", self.text).group(1) == ci[-1]

    def test_a_run_as_in_the_quick_start_learns(self, tmp_path):
        *_, last = moco.Run(Config.from_preset("tiny", epochs=2, out=str(tmp_path / "c.pt"), device="cpu")).train()
        assert last.row["knn"] > 45  # raw pixels: under 40
