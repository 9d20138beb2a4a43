"""The 18 layers of the benchmarks and other sets, with kinds of layers and the ratios aimed at for them."""

import math
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
    "sequences": 4.0,
    "volumes": 2.0,
    "transposed": 2.0,
}


Sizes = int | tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """A layer without a bias. Sizes are those of square images, or a tuple of all spatial axes.

    `kernel`, `padding`, `stride` and `dilation` are a number for all axes or one for each; padding may be a pair.
    """

    name: str
    kind: str
    batch: int
    channels: int
    filters: int
    size: Sizes
    kernel: Sizes
    padding: int | tuple
    groups: int = 1
    stride: Sizes = 1
    dilation: Sizes = 1
    is_transposed: bool = False

    @property
    def space(self) -> tuple[int, ...]:
        """The input's spatial axes."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def along(self, value: Sizes) -> tuple[int, ...]:
        """Return a number for each spatial axis."""
        return (value,) * len(self.space) if isinstance(value, int) else value

    @property
    def pads(self) -> tuple[tuple[int, int], ...]:
        """Padding before and after each spatial axis."""
        return tuple((each, each) if isinstance(each, int) else each for each in self.along(self.padding))

    @property
    def operator(self) -> str:
        """The name of its function, such as "conv2d" or "conv_transpose1d"."""
        return f"conv{'_transpose' * self.is_transposed}{len(self.space)}d"

    @property
    def input_size(self) -> tuple[int, ...]:
        """(batch, channels, height, width), or other spatial axes."""
        return self.batch, self.channels, *self.space

    @property
    def weight_size(self) -> tuple[int, ...]:
        """(out channels, channels / groups, kernel height, kernel width); of a transposed one, channels come first."""
        kernel = self.along(self.kernel)
        if self.is_transposed:
            return self.channels, self.filters // self.groups, *kernel
        return self.filters, self.channels // self.groups, *kernel

    @property
    def flops(self) -> int:
        """Operations of direct convolution, padding included."""
        numbers = zip(self.space, self.pads, *map(self.along, (self.kernel, self.stride, self.dilation)), strict=True)
        outputs = [(size + sum(pads) - d * (k - 1) - 1) // s + 1 for size, pads, k, s, d in numbers]
        places = self.space if self.is_transposed else outputs
        return 2 * self.batch * math.prod(places) * math.prod(self.weight_size)

    def arrays(self, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        """Return input and weight, the same for all engines, so that outputs are about 1."""
        rng = np.random.default_rng(3)
        x = rng.standard_normal(self.input_size, dtype=np.float32).astype(dtype)
        weight = rng.standard_normal(self.weight_size) / np.sqrt(np.prod(self.weight_size[1:]))
        return aligned(x), weight.astype(dtype)

    def __str__(self) -> str:
        depthwise = self.groups > 1
        channels = f"{self.channels} depthwise" if depthwise else f"{self.channels}→{self.filters}"
        space, kernel = ("×".join(map(str, each)) for each in (self.space, self.along(self.kernel)))
        pads = {str(before) if before == after else f"({before}, {after})" for before, after in self.pads}
        around = pads.pop() if len(pads) == 1 else str(self.padding)
        rest = "".join(
            f", {name} {value if isinstance(value, int) else '×'.join(map(str, value))}"
            for name, value in (("stride", self.stride), ("dilation", self.dilation))
            if value != 1
        )
        return f"{self.batch}, {channels}, {space}, {kernel}, {around}{rest}{', transposed' * self.is_transposed}"


def aligned(array: np.ndarray) -> np.ndarray:
    """Return a copy that begins with a cache line, as the results of engines do."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    copy = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


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

# Of audio (a reverb, a filter, CREPE's pitch), language and genomics; dilated and depthwise ones.
SEQUENCES = [
    Layer("reverb", "sequences", 2, 1, 1, (480_000,), 48_000, ((47_999, 0),)),
    Layer("fir", "sequences", 1, 1, 1, (1_000_000,), 255, 127),
    Layer("seq-k31", "sequences", 8, 64, 64, (16_384,), 31, 15),
    Layer("seq-k3", "sequences", 4, 128, 128, (16_000,), 3, 1),
    Layer("crepe1", "sequences", 32, 1, 1024, (1024,), 512, 254, stride=4),
    Layer("crepe2", "sequences", 32, 1024, 128, (128,), 64, ((31, 32),)),
    Layer("dw-long", "sequences", 4, 256, 256, (8192,), 8192, ((8191, 0),), 256),
    Layer("dw-k31", "sequences", 16, 256, 256, (1024,), 31, 15, 256),
    Layer("seq-k5", "sequences", 16, 256, 256, (512,), 5, 2),
    Layer("dna-k11", "sequences", 1, 32, 32, (12_000,), 11, 5),
    Layer("dna-k35", "sequences", 1, 32, 32, (12_000,), 35, 340, dilation=20),
]

VOLUMES = [
    Layer("vol64", "volumes", 1, 32, 32, (64, 64, 64), 3, 1),
    Layer("vol32", "volumes", 1, 48, 96, (32, 32, 32), 3, 1),
    Layer("vol-k7", "volumes", 1, 1, 48, (64, 64, 64), 7, 3),
    Layer("vol-k5", "volumes", 2, 16, 16, (96, 96, 96), 5, 2),
    Layer("video-133", "volumes", 1, 64, 64, (16, 56, 56), (1, 3, 3), (0, 1, 1)),
    Layer("video-311", "volumes", 1, 64, 64, (16, 56, 56), (3, 1, 1), (4, 0, 0), dilation=(4, 1, 1)),
]

# Of decoders; istft is an inverse short-time transform, of 782 frames, from one of its channels.
TRANSPOSED = [
    Layer("up28", "transposed", 8, 256, 128, 28, 2, 0, stride=2, is_transposed=True),
    Layer("up256", "transposed", 1, 64, 32, 256, 2, 0, stride=2, is_transposed=True),
    Layer("up-k4", "transposed", 1, 256, 3, 64, 4, 3, stride=2, is_transposed=True),
    Layer("istft", "transposed", 1, 1, 1, (782,), 4096, 2048, stride=256, is_transposed=True),
    Layer("up-vol", "transposed", 1, 32, 16, (32, 32, 32), 3, 0, stride=2, is_transposed=True),
]

SETS = {
    "layers": LAYERS,
    "networks": NETWORKS,
    "small": SMALL,
    "sequences": SEQUENCES,
    "volumes": VOLUMES,
    "transposed": TRANSPOSED,
}
BY_NAME = {layer.name: layer for layers in SETS.values() for layer in layers}
