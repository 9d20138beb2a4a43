"""The network: loaded and warmed up before workers are forked, and run on batches whose results are always the same.

What makes them the same. Plans of convolutions depend on the sizes that a layer has met before, so a network meets all
the sizes that it is ever run with while it is loaded, always in the same order: images are filled up to one of these
sizes, and answers cut back. Then every worker has the same plans, and the kernels' spectra for them, which all workers
read in the same memory, as nothing writes there. Whether an image has the same bits in a batch as alone is looked at
for each size of images and of batches; only such batches are made.

One thread computes an image, whatever the number of threads of a worker: ONNX Runtime's threads do not survive a fork,
and threads that each have an image of their own are never waiting for each other.
"""

import gc
import hashlib
import io
import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime

import nbfftconv
from nbfftconv import config, memory
from nbfftconv.onnx import InferenceSession

from . import images
from .images import Refusal
from .make_model import make_model
from .settings import Settings

#: Bytes that kernels may take in all forms. The sizes bound them, and what would have to be made anew is not shared.
_MEMORY = 2**33
_ACTIVATIONS = "Relu", "LeakyRelu", "PRelu", "Sigmoid", "Tanh", "Clip", "Elu"


class ModelError(ValueError):
    """A model that this service cannot serve."""


class Network:
    """A network that takes one image, as a session, and what is made of its outputs.

    Parameters
    ----------
    settings : Settings

    Attributes
    ----------
    channels : int
        Of its input: 1 or 3.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        model = onnx.load(settings.model) if settings.model else make_model()
        features = _features(model)
        self._session = _session(model.SerializeToString(), settings.engine)
        self.channels, self._heights, self._widths, self._is_alone = self._input(features)
        self._shapes = sorted(itertools.product(self._heights, self._widths), key=math.prod)
        begin = time.perf_counter()
        self._batches = self._warm_up()
        self._digest = self.digest()
        self._seconds = time.perf_counter() - begin
        gc.collect()
        gc.freeze()  # a collection would write to what is shared

    def shape_for(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return height and width that an image is filled up to; raise `Refusal` if it is larger than all."""
        fitting = [
            next((each for each in sides if each >= side), None)
            for side, sides in zip(size, (self._heights, self._widths), strict=True)
        ]
        if fitting[0] is None or fitting[1] is None:
            most = f"{self._widths[-1]} × {self._heights[-1]}"
            raise Refusal(413, f"the image is {size[1]} × {size[0]} pixels; at most {most} are taken")
        return fitting[0], fitting[1]

    @property
    def has_features(self) -> bool:
        """Whether there are feature maps to be seen."""
        return len(self._names) > 1

    def most(self, shape: tuple[int, int]) -> int:
        """Return how many images of a shape are worth collecting."""
        return self._batches[shape][0]

    def run(self, arrays: Sequence[np.ndarray], with_features: bool) -> tuple[list[dict[str, np.ndarray]], list[int]]:
        """Return the outputs of images that are filled up to one shape, and the batches in which they were computed."""
        shape: tuple[int, int] = arrays[0].shape[1:]
        names = self._names if with_features else self._names[:1]
        found: list[dict[str, np.ndarray]] = []
        sizes = []
        while len(found) < len(arrays):
            left = len(arrays) - len(found)
            size = next(each for each in self._batches[shape] if each <= left)
            outputs = self._run(names, np.stack(arrays[len(found) : len(found) + size]))
            found += [dict(zip(("output", "features"), each, strict=False)) for each in zip(*outputs, strict=True)]
            sizes.append(size)
        return found, sizes

    def fill(self, image: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
        """Return what the network is given for an image of values from 0 to 1; and how these were moved and scaled."""
        mean, deviation = 0.0, 1.0
        if self._settings.values == "standard":
            mean, deviation = float(image.mean(dtype=np.float64)), float(image.std(dtype=np.float64)) or 1.0
            image = (image - np.float32(mean)) / np.float32(deviation)
        _, height, width = image.shape
        filled = self.shape_for((height, width))
        # the nearest pixels: an edge to black would be seen in the result
        return np.pad(image, ((0, 0), (0, filled[0] - height), (0, filled[1] - width)), mode="edge"), (mean, deviation)

    def cut(self, output: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Return the part of an output that is of the image, as it was before it was filled up."""
        filled = self.shape_for(size)
        height, width = (-(-n * made // all_) for n, made, all_ in zip(size, output.shape[1:], filled, strict=True))
        return output[:, :height, :width]

    def answer(self, kind: str, outputs: dict[str, np.ndarray], size: tuple[int, int], scale: Sequence[float]) -> bytes:
        """Return the bytes of an answer: "png", "npy" or "features"."""
        if kind == "features":
            return images.encode(images.sheet(self.cut(outputs["features"], size)))
        values = self.cut(outputs["output"], size)
        if self._settings.output == "map":
            values = values if kind == "npy" else images.stretched(values)
        else:
            values = values * np.float32(scale[1]) + np.float32(scale[0])
        if kind == "png":
            return images.encode(images.picture(values))
        return _npy(values)

    def answer_alone(self, body: bytes, kind: str = "png") -> bytes:
        """Return the answer to one request, computed by itself: what every answer of the service is equal to."""
        size = images.size_of(body)
        self.shape_for(size)
        array, scale = self.fill(images.decode(body, self.channels))
        (outputs,), _ = self.run([array], kind == "features")
        return self.answer(kind, outputs, size, scale)

    def check(self) -> None:
        """Raise RuntimeError if this process, maybe a forked one, computes other bits than the one that loaded it."""
        if self.digest() != self._digest:
            raise RuntimeError("the network's results are not those that it had when it was loaded")

    def digest(self) -> str:
        """Return a hash of the results for an image of the smallest shape."""
        return hashlib.sha256(self._run(self._names[:1], self._noise(1, self._shapes[0]))[0].tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return what it is, for people to read."""
        report = getattr(self._session, "report", None)
        choices = [] if report is None else list(report.choices.values())
        return {
            "model": self._settings.model.name if self._settings.model else "made up, like EDSR",
            "engine": self._settings.engine,
            "convolutions_here": sum(each.is_replaced for each in choices),
            "convolutions_seen": len(choices),
            "channels": self.channels,
            "heights": self._heights,
            "widths": self._widths,
            "batches": {f"{shape[1]}x{shape[0]}": sizes[0] for shape, sizes in self._batches.items()},
            "features": self.has_features,
            "kernel_bytes": sum(each.nbytes for each in memory.holders()),
            "warm_up_seconds": round(self._seconds, 2),
        }

    def _input(self, features: str) -> tuple[int, tuple[int, ...], tuple[int, ...], bool]:
        """Return channels, heights and widths of the input, and whether it takes no batches."""
        inputs = [each for each in self._session.get_inputs()]
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type != "tensor(float)":
            given = ", ".join(f"{each.name}: {each.type} {each.shape}" for each in inputs)
            raise ModelError(f"a model must take one batch of images, float32 (N, C, H, W); this one takes {given}")
        self._name = inputs[0].name
        self._names = [name for name in (self._session.get_outputs()[0].name, features) if name]
        batch, channels, height, width = inputs[0].shape
        if channels not in (1, 3):
            raise ModelError(f"a model must take images of 1 or 3 channels; this one takes {channels}")
        if isinstance(batch, int) and batch != 1:
            raise ModelError(f"a model must take batches of 1, or of any size; this one takes {batch}")
        heights, widths = ((side,) if isinstance(side, int) else self._settings.sides for side in (height, width))
        return channels, heights, widths, isinstance(batch, int)

    def _run(self, names: list[str], x: np.ndarray) -> list[np.ndarray]:
        found: list[np.ndarray] = self._session.run(names, {self._name: x})
        return found

    def _noise(self, count: int, shape: tuple[int, int]) -> np.ndarray:
        """Return images in which any difference of rounding shows; a part is black, which is computed otherwise."""
        x = np.random.default_rng(0).random((count, self.channels, *shape), np.float32)
        x[:, :, : shape[0] // 2, : shape[1] // 2] = 0
        return x

    def _warm_up(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """Run all shapes, and return the sizes of batches that give each image the bits that it has alone."""
        # the first run decides what is computed here, which pays most where images are large
        self._run(self._names, self._noise(1, self._shapes[-1]))
        found = {}
        for shape in self._shapes:
            most = 1 if self._is_alone else min(self._settings.batch, self._settings.batch_pixels // math.prod(shape))
            counts = [count for count in (1 << power for power in range(1, 12)) if count <= most]
            x = self._noise(max(counts, default=1), shape)
            alone = [self._run(self._names, each[None]) for each in x]
            if alone[0][0].ndim != 4:
                raise ModelError(f"a model's first output must be (N, C, H, W), got one of shape {alone[0][0].shape}")
            same = [count for count in counts if _are_equal(self._run(self._names, x[:count]), alone[:count])]
            found[shape] = (*reversed(same), 1)
        return found


def _session(model: bytes, engine: str) -> Any:
    """Return a session that has no threads of its own."""
    if engine == "nbfftconv":
        nbfftconv.set_num_threads(1)
        config.set_memory_limit(_MEMORY)
        return InferenceSession(model, threads=1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _features(model: onnx.ModelProto) -> str:
    """Return the output that has feature maps: the second one; else that of the first convolution is made one."""
    graph = model.graph
    if len(graph.output) > 1:
        return str(graph.output[1].name)
    first = next((node for node in graph.node if node.op_type == "Conv"), None)
    if first is None or first.output[0] == graph.output[0].name:
        return ""
    after = [node for node in graph.node if first.output[0] in node.input]
    name = after[0].output[0] if len(after) == 1 and after[0].op_type in _ACTIVATIONS else first.output[0]
    if name != graph.output[0].name:
        graph.output.append(onnx.ValueInfoProto(name=name))
        return str(name)
    return ""


def _are_equal(batch: list[np.ndarray], alone: Sequence[list[np.ndarray]]) -> bool:
    """Whether outputs of a batch have the bits that those of its images have."""
    of_images = (np.concatenate(each) for each in zip(*alone, strict=True))
    return all(together.tobytes() == each.tobytes() for together, each in zip(batch, of_images, strict=True))


def _npy(values: np.ndarray) -> bytes:
    """Return float32 of (height, width, channels), or without channels if there is one, as NumPy's file format."""
    array = values[0] if len(values) == 1 else values.transpose(1, 2, 0)
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(array, np.float32))
    return stream.getvalue()
