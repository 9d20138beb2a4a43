"""The engines that bench_layers.py times: this one, and its peers, each at the fastest of its settings that was found.

Each function takes a layer, its arrays and a number of threads, and returns what is timed: arrays in NCHW order in, the
same out, weights packed beforehand where the engine can, the result left in its own memory. Each is called in a process
of its own, and imports its package there.
"""

import atexit
import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from layers import Layer, aligned
from rounds import seconds_of

OURS, OURS_LAST = "nbfftconv", "nbfftconv-nhwc"
Convolution = Callable[[], Any]


def this_engine(
    layer: Layer, x: np.ndarray, weight: np.ndarray, threads: int, channels_last: bool = False
) -> Convolution:
    """A layer in inference, its kernels transformed; with `channels_last` its arrays are in that order in memory."""
    import nbfftconv

    nbfftconv.set_num_threads(threads)
    kind = getattr(nbfftconv, f"Conv{'Transpose' * layer.is_transposed}{len(layer.space)}d")
    options = {"stride": layer.stride, "padding": layer.pads, "dilation": layer.dilation, "groups": layer.groups}
    order = {"channels_last": True} if channels_last else {}  # which earlier versions do not know
    convolution = kind(weight, **options, **order, training=False)
    input = aligned(np.moveaxis(x, 1, -1)) if channels_last else x
    convolution(input)
    return lambda: np.moveaxis(convolution(input), -1, 1) if channels_last else convolution(input)


def pytorch(layer: Layer, x: np.ndarray, weight: np.ndarray, threads: int, channels_last: bool = False) -> Convolution:
    """PyTorch in inference mode; with `channels_last` its arrays, the result among them, are in that order."""
    import torch

    torch.set_num_threads(threads)
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    order = formats[len(layer.space)] if channels_last else torch.contiguous_format
    tensors = [torch.from_numpy(each).to(memory_format=order) for each in (x, weight)]
    convolution = getattr(torch.nn.functional, layer.operator)
    options = {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.groups}
    around = [amount for pads in reversed(layer.pads) for amount in pads]

    @torch.inference_mode()
    def pads_first() -> Any:
        return convolution(torch.nn.functional.pad(tensors[0], around), tensors[1], **options)

    @torch.inference_mode()
    def convolve() -> Any:
        return convolution(*tensors, padding=tuple(before for before, _ in layer.pads), **options)

    if any(before != after for before, after in layer.pads):  # it knows no other way
        return pads_first
    if len(layer.space) == 1 and layer.groups > 1:  # it is slow at padding of its own there
        return min(pads_first, convolve, key=lambda run: min(seconds_of(run) for _ in range(3)))
    return convolve


def torch_fft(layer: Layer, x: np.ndarray, weight: np.ndarray, threads: int) -> Convolution:
    """Transforms of whole sequences by PyTorch, with the kernels' spectra kept, and their products."""
    import torch
    from scipy import fft

    torch.set_num_threads(threads)
    (length,), (kernel,) = layer.space, layer.along(layer.kernel)
    (before, after), (stride,), (dilation,) = layer.pads[0], layer.along(layer.stride), layer.along(layer.dilation)
    reach = dilation * (kernel - 1)
    size = fft.next_fast_len(length + before + after, real=True)
    dilated = np.zeros((*weight.shape[:2], reach + 1), weight.dtype)
    dilated[..., ::dilation] = weight
    outputs = length + before + after - reach
    input, spectra = torch.from_numpy(x), torch.fft.rfft(torch.from_numpy(dilated), size).conj()

    @torch.inference_mode()
    def convolve() -> Any:
        of_input = torch.fft.rfft(torch.nn.functional.pad(input, (before, after)), size)
        if layer.groups > 1 or layer.channels == 1:
            product = of_input * spectra[:, 0]
        else:
            product = torch.einsum("ncf,kcf->nkf", of_input, spectra)
        return torch.fft.irfft(product, size)[..., :outputs:stride].contiguous()

    return convolve


def onnx_model(layer: Layer, x: np.ndarray, weight: np.ndarray) -> bytes:
    """Return a model of one node."""
    from onnx import TensorProto, helper, numpy_helper

    attributes = {
        "strides": layer.along(layer.stride),
        "dilations": layer.along(layer.dilation),
        "pads": [amount for end in zip(*layer.pads, strict=True) for amount in end],
        "group": layer.groups,
    }
    graph = helper.make_graph(
        [helper.make_node("ConvTranspose" if layer.is_transposed else "Conv", ["x", "weight"], ["y"], **attributes)],
        layer.name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def onnx_runtime(layer: Layer, x: np.ndarray, weight: np.ndarray, threads: int) -> Convolution:
    """ONNX Runtime; its output is not copied to NumPy."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(onnx_model(layer, x, weight), options, ["CPUExecutionProvider"])
    value = onnxruntime.OrtValue.ortvalue_from_numpy(x)
    return lambda: session.run_with_ort_values(["y"], {"x": value})[0]


def openvino(layer: Layer, x: np.ndarray, weight: np.ndarray, threads: int) -> Convolution:
    """OpenVINO in float32, which it would not compute in by itself where there is bfloat16."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_HYPER_THREADING": True,  # else fewer threads, where two share a core
    }
    core = openvino.Core()
    request = core.compile_model(core.read_model(onnx_model(layer, x, weight)), "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x))
    return lambda: request.infer(share_outputs=True)[0]


def ncnn(layer: Layer, x: np.ndarray, weight: np.ndarray, threads: int) -> Convolution:
    """A net of ncnn, which takes one image at a time."""
    import ncnn

    net, (height, width) = ncnn.Net(), layer.space
    net.opt.num_threads = threads
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    allocators = ncnn.PoolAllocator(), ncnn.PoolAllocator()  # with the net's own, each result would be copied
    net.opt.blob_allocator, net.opt.workspace_allocator = allocators
    atexit.register(lambda _: net.clear(), allocators)  # they are to go last
    numbers = {0: layer.filters, 1: layer.kernel, 3: layer.stride, 4: layer.padding, 6: weight.size, 7: layer.groups}
    param = [
        "7767517",  # of all files of this format
        "2 2",  # layers and blobs
        f"Input x 0 1 x 0={width} 1={height} 2={layer.channels}",
        f"Convolution{'DepthWise' if layer.groups > 1 else ''} y 1 1 x y "
        + " ".join(f"{number}={value}" for number, value in numbers.items()),
    ]
    with tempfile.NamedTemporaryFile() as model:  # in memory, the net would point to what is gone after the call
        model.write(bytes(4) + weight.tobytes())  # zeros: float32
        model.flush()
        if net.load_param_mem("\n".join([*param, ""])) or net.load_model(model.name):
            raise RuntimeError("ncnn could not load the layer")
    images = [ncnn.Mat(image).clone() for image in x]

    def convolve() -> list[Any]:
        results = []
        for image in images:
            extractor = net.create_extractor()
            extractor.input("x", image)
            results.append(extractor.extract("y")[1])
        return results

    return convolve


def mnn(layer: Layer, x: np.ndarray, weight: np.ndarray, threads: int) -> Convolution:
    """A module of MNN, made from the ONNX model by its converter, for inputs of one size."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # it prints what it does
    import _tools  # not MNN.tools, which installs and uses a package that reports to MNN's makers
    from MNN import expr, nn

    with tempfile.TemporaryDirectory() as folder:
        source, model = Path(folder, "layer.onnx"), Path(folder, "layer.mnn")
        source.write_bytes(onnx_model(layer, x, weight))
        files = ["--modelFile", str(source), "--MNNModel", str(model)]
        _tools.mnnconvert(["mnnconvert", "-f", "ONNX", *files, "--bizCode", layer.name])
        # Not rearranged as it is loaded, since it is then that it does without Winograd's algorithm.
        runtime = nn.create_runtime_manager(({"backend": "CPU", "precision": "high", "numThread": threads},))
        net = nn.load_module_from_file(str(model), ["x"], ["y"], runtime_manager=runtime, shape_mutable=False)
    value = expr.placeholder(x.shape, expr.NCHW)
    value.write(x)
    return lambda: net.forward(value)


def scipy_oaconvolve(layer: Layer, x: np.ndarray, weight: np.ndarray, threads: int) -> Convolution:
    """SciPy's overlap-add convolution, of one channel."""
    from scipy import fft, signal

    axes = tuple(range(1, 1 + len(layer.space)))
    arrays, kernel = x[:, 0], np.flip(weight[:, 0], axes).copy()
    kept = []
    for size, (before, after), taps in zip(layer.space, layer.pads, kernel.shape[1:], strict=True):
        kept.append(slice(taps - 1 - before, size + after))

    def convolve() -> np.ndarray:
        with fft.set_workers(threads):
            return signal.oaconvolve(arrays, kernel, axes=axes)[(slice(None), *kept)][:, None]

    return convolve


ENGINES: dict[str, Callable[[Layer, np.ndarray, np.ndarray, int], Convolution]] = {
    OURS: this_engine,
    OURS_LAST: functools.partial(this_engine, channels_last=True),
    "torch": pytorch,
    "onnxruntime": onnx_runtime,
    "scipy": scipy_oaconvolve,
    "torch-nhwc": functools.partial(pytorch, channels_last=True),
    "torch-fft": torch_fft,
    "openvino": openvino,
    "ncnn": ncnn,
    "mnn": mnn,
}
#: What is imported for each peer; the first is the name of the package whose version counts, too.
REQUIRES = {
    "torch": ["torch"],
    "onnxruntime": ["onnxruntime", "onnx"],
    "scipy": ["scipy"],
    "torch-nhwc": ["torch"],
    "torch-fft": ["torch", "scipy"],
    "openvino": ["openvino", "onnx"],
    "ncnn": ["ncnn"],
    "mnn": ["MNN", "onnx"],
}
