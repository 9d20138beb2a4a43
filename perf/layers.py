"""The 18 layers of the benchmarks and two more sets, with kinds of layers and the ratios aimed at for them."""

from dataclasses import dataclass

import numpy as np

#: Kind of layers to the mean ratio aimed at, in float32 on 1 and on 2 threads; None where being no slower will do.
KINDS: dict[str, float | None] = {
    "3x3 dense": 2.2,
    "5x5 dense": 2.5,
    "7x7 and 9x9 dense": 4.5,
    "11x11 to 31x31 dense": 6.0,
    "31x31 depthwise": 6.0,
    "63x63 of one image": 6.0,
    "small batch or kernel": None,
    "3x3 of small images": None,
    "1x1": None,
    "small depthwise": None,
    "strided": None,
}


@dataclass(frozen=True)
class Layer:
    """A layer with square kernels and no bias; `size` is the side of square images, or their height and width."""

    name: str
    kind: str
    batch: int
    channels: int
    filters: int
    size: int | tuple[int, int]
    kernel: int
    padding: int
    groups: int = 1
    stride: int = 1

    @property
    def image(self) -> tuple[int, int]:
        """(height, width)."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def input_size(self) -> tuple[int, int, int, int]:
        """(batch, channels, height, width)."""
        return self.batch, self.channels, *self.image

    @property
    def weight_size(self) -> tuple[int, int, int, int]:
        """(out channels, channels / groups, kernel height, kernel width)."""
        return self.filters, self.channels // self.groups, self.kernel, self.kernel

    @property
    def flops(self) -> int:
        """Operations of direct convolution, padding included."""
        height, width = ((side + 2 * self.padding - self.kernel) // self.stride + 1 for side in self.image)
        return 2 * self.batch * height * width * int(np.prod(self.weight_size))

    def arrays(self, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        """Return input and weight, the same for all engines, so that outputs are about 1."""
        rng = np.random.default_rng(3)
        x = rng.standard_normal(self.input_size, dtype=np.float32).astype(dtype)
        weight = rng.standard_normal(self.weight_size) / np.sqrt(np.prod(self.weight_size[1:]))
        return x, weight.astype(dtype)

    def __str__(self) -> str:
        channels = f"{self.channels} depthwise" if self.groups > 1 else f"{self.channels}→{self.filters}"
        image, kernel = "×".join(map(str, self.image)), f"{self.kernel}×{self.kernel}"
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{self.batch}, {channels}, {image}, {kernel}, {self.padding}{stride}"


DW7 = Layer("dw7", "small batch or kernel", 8, 96, 96, 56, 7, 3, 96)
S256 = Layer("s256", "3x3 of small images", 1, 256, 256, 14, 3, 1)

LAYERS = [
    Layer("cb-L1", "11x11 to 31x31 dense", 16, 3, 96, 128, 11, 0),  # cb: convnet-benchmarks
    Layer("cb-L2", "7x7 and 9x9 dense", 16, 64, 128, 64, 9, 0),
    Layer("cb-L3", "7x7 and 9x9 dense", 16, 128, 128, 32, 9, 0),
    Layer("cb-L4", "7x7 and 9x9 dense", 16, 128, 128, 16, 7, 0),
    Layer("cb-L5", "3x3 dense", 16, 384, 384, 13, 3, 0),
    Layer("vgg1.2", "3x3 dense", 1, 64, 64, 224, 3, 1),
    Layer("vgg2.2", "3x3 dense", 8, 128, 128, 112, 3, 1),
    Layer("vgg3.2", "3x3 dense", 8, 256, 256, 56, 3, 1),
    Layer("vgg4.2", "3x3 dense", 8, 512, 512, 28, 3, 1),
    Layer("vgg4.2-b1", "small batch or kernel", 1, 512, 512, 28, 3, 1),
    Layer("alex2", "5x5 dense", 16, 64, 192, 27, 5, 2),
    Layer("unet", "3x3 dense", 1, 64, 64, 512, 3, 1),
    Layer("res7", "7x7 and 9x9 dense", 8, 64, 64, 112, 7, 3),
    Layer("k15", "11x11 to 31x31 dense", 2, 32, 32, 128, 15, 7),
    Layer("k31", "11x11 to 31x31 dense", 1, 16, 16, 128, 31, 15),
    DW7,
    Layer("dw31", "31x31 depthwise", 8, 128, 128, 56, 31, 15, 128),
    Layer("img63", "63x63 of one image", 1, 1, 1, 2048, 63, 31),
]

# 3x3 layers of other networks; edsr is of one for super-resolution.
NETWORKS = [
    Layer("edsr", "3x3 dense", 1, 64, 64, (180, 320), 3, 1),
    Layer("s32", "3x3 dense", 1, 32, 32, 256, 3, 1),
    S256,
]

SMALL = [
    Layer("s16", "3x3 of small images", 1, 16, 16, 28, 3, 1),
    Layer("pw64", "1x1", 1, 64, 64, 14, 1, 0),
    Layer("pw96", "1x1", 1, 96, 24, 56, 1, 0),
    S256,
    Layer("s512-b4", "3x3 of small images", 4, 512, 512, 7, 3, 1),
    Layer("s512-b8", "3x3 of small images", 8, 512, 512, 7, 3, 1),
    Layer("dw7-b1", "small depthwise", 1, 96, 96, 56, 7, 3, 96),
    DW7,
    Layer("patch2", "strided", 1, 64, 64, 56, 2, 0, stride=2),
    Layer("stem224", "strided", 1, 3, 32, 224, 3, 1, stride=2),
    Layer("down512", "strided", 8, 256, 512, 14, 3, 1, stride=2),
    Layer("mb-16-96", "1x1", 1, 16, 96, (224, 320), 1, 0),  # mb: MobileNetV2 on images of 448×640
    Layer("mb-96-24", "1x1", 1, 96, 24, (112, 160), 1, 0),
    Layer("mb-24-144", "1x1", 1, 24, 144, (112, 160), 1, 0),
    Layer("mb-dw32", "small depthwise", 1, 32, 32, (224, 320), 3, 1, 32),
    Layer("mb-dw96", "strided", 1, 96, 96, (224, 320), 3, 1, 96, stride=2),
    Layer("mb-stem", "strided", 1, 3, 32, (448, 640), 3, 1, stride=2),
]

SETS = {"layers": LAYERS, "networks": NETWORKS, "small": SMALL}
BY_NAME = {layer.name: layer for layers in SETS.values() for layer in layers}
