"""A network to serve when no other is given: super-resolution built like EDSR, with weights from a seed.

``python examples/service/make_model.py FILE`` writes it as ONNX; nothing but ``onnx`` is needed. Nobody has trained it:
the way through the network that is laid out by hand sharpens what bicubic interpolation gives, and the random weights
beside it do the work of trained ones, and add what cannot be seen.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

#: Channels that carry the fine detail of red, green and blue through the network.
_DETAIL = 3
#: How much of the detail is added.
_SHARPNESS = 0.5
#: Of random weights that reach the picture.
_FAINT = 0.002


def _noise(rng: np.random.Generator, filters: int, channels: int, kernel: int = 3) -> np.ndarray:
    """Return weights that keep the size of values, as He et al. 2015 have them."""
    deviation = np.sqrt(2 / (channels * kernel * kernel))
    return rng.normal(0, deviation, (filters, channels, kernel, kernel)).astype(np.float32)


def _head(rng: np.random.Generator, channels: int) -> np.ndarray:
    """Return filters of a picture: what differs from the pixels around, and edges of all directions."""
    weight = 0.1 * _noise(rng, channels, 3)
    weight[:_DETAIL] = 0
    blur = np.outer((1, 2, 1), (1, 2, 1)) / 16
    for colour in range(_DETAIL):
        weight[colour, colour] = -blur
        weight[colour, colour, 1, 1] += 1
    y, x = np.mgrid[-1:2, -1:2] / 2
    for index in range(_DETAIL, channels):
        angle = np.pi * index / (channels - _DETAIL)
        weight[index] += np.cos(angle) * x + np.sin(angle) * y
    return weight


def _up(rng: np.random.Generator, channels: int) -> np.ndarray:
    """Return what makes four channels of each: every pixel becomes four that are alike."""
    weight = _FAINT * _noise(rng, 4 * channels, channels)
    for index in range(channels):
        weight[4 * index : 4 * index + 4, index, 1, 1] += 1
    return weight


def _tail(rng: np.random.Generator, channels: int) -> np.ndarray:
    weight = _FAINT * _noise(rng, 3, channels)
    for colour in range(_DETAIL):
        weight[colour, colour] += _SHARPNESS / 9  # smooths what was copied to four pixels
    return weight


def make_model(blocks: int = 4, channels: int = 64, seed: int = 0, adds_picture: bool = True) -> onnx.ModelProto:
    """Return a network that doubles height and width of pictures, (N, 3, H, W) of values from 0 to 1.

    With 16 blocks it is EDSR-baseline (Lim et al. 2017), if it does not add the picture, enlarged, to what it makes.
    """
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def constant(name: str, value: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(value, name))
        return name

    def convolution(name: str, given: str, weight: np.ndarray) -> str:
        bias = constant(f"{name}.bias", np.zeros(len(weight), np.float32))
        inputs = [given, constant(f"{name}.weight", weight), bias]
        nodes.append(helper.make_node("Conv", inputs, [name], name, pads=[1, 1, 1, 1]))
        return name

    def node(operator: str, name: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, list(inputs), [name], name, **attributes))
        return name

    head = x = convolution("head", "image", _head(rng, channels))
    small = constant("small", np.array(0.05, np.float32))
    for block in range(blocks):
        first = convolution(f"block{block}.first", x, _noise(rng, channels, channels))
        bent = node("Relu", f"block{block}.relu", first)
        second = convolution(f"block{block}.second", bent, _noise(rng, channels, channels))
        second = node("Mul", f"block{block}.scaled", second, small)
        x = node("Add", f"block{block}", x, second)
    body = convolution("body", x, 0.05 * _noise(rng, channels, channels))
    wide = convolution("up", node("Add", "features", head, body), _up(rng, channels))
    large = node("DepthToSpace", "shuffled", wide, blocksize=2, mode="CRD")
    detail = convolution("tail", large, _tail(rng, channels))
    if adds_picture:
        scales = constant("scales", np.array([1, 1, 2, 2], np.float32))
        detail = node("Add", "sum", node("Resize", "cubic", "image", "", scales, mode="cubic"), detail)
    node("Identity", "enlarged", detail)
    graph = helper.make_graph(
        nodes,
        "EDSR",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [
            helper.make_tensor_value_info("enlarged", TensorProto.FLOAT, ["N", 3, "2*H", "2*W"]),
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", channels, "H", "W"]),
        ],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def main() -> None:
    """Write the network to a file."""
    parser = argparse.ArgumentParser(description="Write a network that doubles the size of pictures, as ONNX.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--blocks", type=int, default=4, help="16 in EDSR-baseline")
    parser.add_argument("--channels", type=int, default=64, help="64 in EDSR-baseline, too")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    onnx.save(make_model(given.blocks, given.channels, given.seed), given.file)


if __name__ == "__main__":
    main()
