"""Hypothesis profiles, the devices to test on, and fixtures that several tests share."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from hypothesis import register_random, settings

import moco

settings.register_profile("dev", deadline=None, max_examples=25)
settings.register_profile("ci", parent=settings.get_profile("dev"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


torch.set_num_threads(1)  # tensors are small: on busy cores, threads would wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
os.environ |= {"_TYPER_FORCE_DISABLE_TERMINAL": "1", "TERMINAL_WIDTH": "80"}  # GitHub would color --help
# Autograd counts the GPUs once. If a fake one were there, no forked process could compute gradients.
torch.ones(1, requires_grad=True).backward()


class TorchRandom:
    """Hand torch's RNG to hypothesis, which then seeds it for every example."""

    seed, getstate, setstate = map(staticmethod, (torch.manual_seed, torch.get_rng_state, torch.set_rng_state))


torch_random = TorchRandom()  # hypothesis holds it by a weak reference
register_random(torch_random)

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    if signal.getsignal(number) == signal.SIG_IGN:  # as a job in the background inherits them
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def fork() -> None:
    pytest.skip("beside CUDA, a forked process has no autograd: run CUDA_VISIBLE_DEVICES= pytest, too")


if torch.cuda.is_available():
    os.fork = fork

SKIP_WITHOUT_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
CUDA = pytest.param("cuda", marks=[pytest.mark.cuda, SKIP_WITHOUT_CUDA])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", CUDA])


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name a case of options by them, so that the list of tests can be read."""
    return ",".join(f"{name}={x}" for name, x in val.items()) or "defaults" if isinstance(val, dict) else None


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def write_images(place: Path) -> Path:
    """Write PNG images of two classes and several sizes into train/ and val/, ten and four a class."""
    for split, count in (("train", 10), ("val", 4)):
        for label, name in enumerate(("dark", "light")):
            (place / split / name).mkdir(parents=True)
            for i in range(count):
                image = torch.randint(0, 100, (3, 20 + i, 30 - i), dtype=torch.uint8) + 150 * label
                tvf.to_pil_image(image).save(place / split / name / f"{i}.png")
    return place


@pytest.fixture
def folder(tmp_path):
    """Return a folder of images to change at will."""
    return write_images(tmp_path / "images")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Return a folder of images to leave as it is."""
    return write_images(tmp_path_factory.mktemp("images") / "images")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command line in an empty folder; return its exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        status = 0
        try:
            moco.main(list(arguments))
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call
