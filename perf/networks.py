"""Networks of bench_networks.py by their papers, with random weights; each function returns one and an input.

Weights are such that values keep their size from layer to layer, so that errors are comparable. PyTorch only.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn


class Made(NamedTuple):
    """A network, what it is called with, and what returns the things that it finds, if its outputs mean any.

    These are arrays, as long as there are things, which have to be the same whatever computes the network.
    """

    model: nn.Module
    inputs: tuple[torch.Tensor, ...]
    find: Callable[[nn.Module], tuple[np.ndarray, ...]] | None = None


def _convolution(
    channels: int, filters: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = True
) -> nn.Conv2d:
    return nn.Conv2d(channels, filters, kernel, stride, kernel // 2, groups=groups, bias=bias)


def _normed(channels: int, filters: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [_convolution(channels, filters, kernel, stride, groups, bias=False), nn.BatchNorm2d(filters)]


def srcnn() -> Made:
    """Dong et al. 2014: three layers of 9, 1 and 5 pixels a side."""
    layers = _convolution(1, 64, 9), nn.ReLU(), _convolution(64, 32, 1), nn.ReLU(), _convolution(32, 1, 5)
    return Made(nn.Sequential(*layers), (torch.randn(1, 1, 512, 512),))


def dncnn() -> Made:
    """Zhang et al. 2017: 17 layers of 64 channels."""
    layers: list[nn.Module] = [_convolution(1, 64, 3), nn.ReLU()]
    for _ in range(15):
        layers += [*_normed(64, 64, 3), nn.ReLU()]
    return Made(nn.Sequential(*layers, _convolution(64, 1, 3)), (torch.randn(1, 1, 256, 256),))


class _EdsrBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_convolution(channels, channels, 3), nn.ReLU(), _convolution(channels, channels, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * self.body(x)


class Edsr(nn.Module):
    """Lim et al. 2017: EDSR-baseline, twice as large images."""

    def __init__(self, blocks: int = 16) -> None:
        super().__init__()
        self.head, self.tail = _convolution(3, 64, 3), _convolution(64, 3, 3)
        self.body = nn.Sequential(*(_EdsrBlock(64) for _ in range(blocks)), _convolution(64, 64, 3))
        self.up = nn.Sequential(_convolution(64, 256, 3), nn.PixelShuffle(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the result."""
        x = self.head(x)
        return self.tail(self.up(x + self.body(x)))


def edsr() -> Made:
    """EDSR-baseline on a small picture."""
    return Made(Edsr(), (torch.randn(1, 3, 180, 320),))


class Unet(nn.Module):
    """Ronneberger et al. 2015, with padding, of 32 to 512 channels."""

    def __init__(self) -> None:
        super().__init__()
        widths = 32, 64, 128, 256, 512
        self.down = nn.ModuleList(self._two(before, after) for before, after in itertools.pairwise((3, *widths)))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * width, width, 2, 2) for width in widths[-2::-1])
        self.merge = nn.ModuleList(self._two(2 * width, width) for width in widths[-2::-1])
        self.last, self.pool = nn.Conv2d(32, 2, 1), nn.MaxPool2d(2)

    @staticmethod
    def _two(before: int, after: int) -> nn.Sequential:
        return nn.Sequential(*_normed(before, after, 3), nn.ReLU(), *_normed(after, after, 3), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the result."""
        kept = []
        for index, block in enumerate(self.down):
            x = block(x if index == 0 else self.pool(x))
            kept.append(x)
        kept.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([kept.pop(), up(x)], 1))
        return self.last(x)


def unet() -> Made:
    """U-Net on 256 × 256 pixels."""
    return Made(Unet(), (torch.randn(1, 3, 256, 256),))


def _vgg(batch: int) -> Made:
    """Simonyan and Zisserman 2015: the 13 convolutions of VGG-16, and its classifier."""
    layers, channels = list[nn.Module](), 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [_convolution(channels, width, 3), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    head = nn.Flatten(), nn.Linear(25088, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)
    return Made(nn.Sequential(*layers, *head), (torch.randn(batch, 3, 224, 224),))


class _Residual(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.relu = body, shortcut, nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def _resnet(batch: int, counts: tuple[int, ...], is_bottleneck: bool) -> Made:
    """He et al. 2016."""
    layers, channels = [*_normed(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)], 64
    for index, count in enumerate(counts):
        width = 64 << index
        for block in range(count):
            stride = 2 if block == 0 and index > 0 else 1
            if is_bottleneck:
                after = 4 * width
                body = [
                    *_normed(channels, width, 1),
                    nn.ReLU(),
                    *_normed(width, width, 3, stride),
                    nn.ReLU(),
                    *_normed(width, after, 1),
                ]
            else:
                after = width
                body = [*_normed(channels, width, 3, stride), nn.ReLU(), *_normed(width, width, 3)]
            is_same = stride == 1 and channels == after
            shortcut = nn.Identity() if is_same else nn.Sequential(*_normed(channels, after, 1, stride))
            layers.append(_Residual(nn.Sequential(*body), shortcut))
            channels = after
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)
    return Made(nn.Sequential(*layers, *head), (torch.randn(batch, 3, 224, 224),))


class _ConvNextBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise, self.norm = _convolution(channels, channels, 7, groups=channels), nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def convnext() -> Made:
    """Liu et al. 2022: ConvNeXt-T."""
    layers, channels = list[nn.Module](), 3
    for width, count, size in ((96, 3, 4), (192, 3, 2), (384, 9, 2), (768, 3, 2)):
        layers += [nn.Conv2d(channels, width, size, size), *(_ConvNextBlock(width) for _ in range(count))]
        channels = width
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)
    return Made(nn.Sequential(*layers, *head), (torch.randn(1, 3, 224, 224),))


def replknet() -> Made:
    """Ding et al. 2022: RepLKNet's depthwise kernels of 31, 29, 27 and 13 pixels a side, a block of each."""
    layers, channels = list[nn.Module](), 3
    for width, kernel, size in ((128, 31, 4), (256, 29, 2), (512, 27, 2), (1024, 13, 2)):
        layers += [nn.Conv2d(channels, width, size, size), nn.BatchNorm2d(width), nn.ReLU()]
        for _ in range(2):
            body = [
                *_normed(width, width, 1), nn.ReLU(), *_normed(width, width, kernel, groups=width), nn.ReLU(),
                *_normed(width, width, 1),
            ]  # fmt: skip
            layers.append(_Residual(nn.Sequential(*body), nn.Identity()))
        channels = width
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)
    return Made(nn.Sequential(*layers, *head), (torch.randn(1, 3, 224, 224),))


NETWORKS: dict[str, Callable[[], Made]] = {
    "SRCNN": srcnn,
    "DnCNN": dncnn,
    "EDSR": edsr,
    "U-Net": unet,
    "VGG-16": lambda: _vgg(1),
    "VGG-16, batch 8": lambda: _vgg(8),
    "ResNet-18, batch 8": lambda: _resnet(8, (2, 2, 2, 2), is_bottleneck=False),
    "ResNet-50": lambda: _resnet(1, (3, 4, 6, 3), is_bottleneck=True),
    "ConvNeXt-T": convnext,
    "RepLKNet": replknet,
}


@torch.no_grad()
def make(name: str) -> Made:
    """Return a network in eval mode, and its input; the same in every process."""
    torch.manual_seed(0)
    made = NETWORKS[name]()
    for module in made.model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    made.model.eval()
    return made


# Training


class Lesson(NamedTuple):
    """A network in training mode, a batch, the loss of its outputs, and the rate of its steps.

    Where normalization of small batches makes gradients of deep networks differ by a hundredth between PyTorch's own
    two layouts, the rate is low enough for their losses to stay together.
    """

    model: nn.Module
    x: torch.Tensor
    loss: Callable[[torch.Tensor], torch.Tensor]
    rate: float


def _imitation(model: nn.Module, x: torch.Tensor, target: torch.Tensor, rate: float) -> Lesson:
    return Lesson(model, x, lambda y: nn.functional.mse_loss(y, target), rate)


def _naming(model: nn.Module, x: torch.Tensor, labels: torch.Tensor, rate: float) -> Lesson:
    return Lesson(model, x, lambda y: nn.functional.cross_entropy(y, labels), rate)


def _smooth(*size: int) -> torch.Tensor:
    """Return noise without high frequencies, whose values are about 1."""
    noise = torch.randn(*size)
    for _ in range(4):
        noise = nn.functional.avg_pool2d(noise, 5, 1, 2)
    return noise / noise.std()


def edsr_lesson() -> Lesson:
    """EDSR with half of its blocks, on two patches of 96 × 96."""
    target = _smooth(2, 3, 192, 192)
    return _imitation(Edsr(8), nn.functional.avg_pool2d(target, 2), target, 1e-2)


def dncnn_lesson() -> Lesson:
    """DnCNN on patches of 40 × 40, as in its paper, an eighth of the batch; it learns the noise."""
    noise = 0.3 * torch.randn(16, 1, 40, 40)
    return _imitation(dncnn().model, _smooth(16, 1, 40, 40) + noise, noise, 3e-5)


def unet_lesson() -> Lesson:
    """U-Net on two images of 128 × 128, parted by their sign."""
    x = _smooth(2, 3, 128, 128)
    return _naming(Unet(), x + 0.3 * torch.randn_like(x), (x.sum(1) > 0).long(), 1e-2)


def resnet_lesson() -> Lesson:
    """ResNet-18 on a batch of 8."""
    return _naming(_resnet(8, (2, 2, 2, 2), is_bottleneck=False).model, _smooth(8, 3, 224, 224), torch.arange(8), 1e-4)


def replknet_lesson() -> Lesson:
    """RepLKNet on a batch of 2."""
    return _naming(replknet().model, _smooth(2, 3, 224, 224), torch.arange(2), 4e-6)


class _LongBlock(nn.Module):
    """A causal depthwise convolution as long as the sequence, and layers for each sample."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.long = nn.Conv1d(channels, channels, length, padding=length - 1, groups=channels)
        self.norm = nn.BatchNorm1d(channels)
        self.mix = nn.Sequential(nn.Conv1d(channels, 2 * channels, 1), nn.GELU(), nn.Conv1d(2 * channels, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mix(self.norm(self.long(x)[..., : x.shape[-1]]))


def long_lesson() -> Lesson:
    """Four blocks of long convolutions on two sequences of 1,024 samples, as of Li et al. 2022 (SGConv)."""
    channels, length = 64, 1024
    blocks = (_LongBlock(channels, length) for _ in range(4))
    model = nn.Sequential(nn.Conv1d(1, channels, 1), *blocks, nn.Conv1d(channels, 1, 1))
    x = torch.randn(2, 1, length)
    return _imitation(model, x, x.cumsum(-1) / length**0.5, 1e-2)


LESSONS: dict[str, Callable[[], Lesson]] = {
    "EDSR, 8 blocks, 2×96²": edsr_lesson,
    "DnCNN, 16×40²": dncnn_lesson,
    "U-Net, 2×128²": unet_lesson,
    "ResNet-18, batch 8": resnet_lesson,
    "RepLKNet, batch 2": replknet_lesson,
    "long convolutions, 2×1024": long_lesson,
}


def make_lesson(name: str) -> Lesson:
    """Return a network and what it is trained on, with PyTorch's initial weights; the same in every process."""
    torch.manual_seed(0)
    return LESSONS[name]()
