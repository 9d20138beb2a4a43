"""ONNX models of bench_networks.py: those of PyPI packages that read text, and networks of its other files, exported.

The packages are fetched as those of `trained_networks.py` are. They read pictures that are drawn here, with a font of
matplotlib's, and what their nets are called with is what they then get. Exported networks get what they get in PyTorch.
"""

import functools
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from trained_networks import CREPE, TOPAZ, Package

OCR = Package(
    "rapidocr-onnxruntime==1.4.4", ("PIL", "cv2", "matplotlib", "pyclipper", "shapely", "six", "tqdm", "yaml")
)
CAPTCHAS = Package("ddddocr==1.6.1", ("PIL", "cv2", "matplotlib"))
_LINES = "Fast convolutions on processors", "Order 2718-2845: 90 parcels", "What is read has to be the same"
_WORD = "k7wm"

NewSession = Callable[[Any], Any]  # of a path or of bytes


class Given(NamedTuple):
    """A model, its inputs, and what makes a whole program find something by such sessions, as arrays."""

    model: str | bytes
    feeds: dict[str, np.ndarray]
    find: Callable[[NewSession], tuple[np.ndarray, ...]] | None = None


class Model(NamedTuple):
    """The package that a model, or the network that it is exported from, is in, if any; its maker; what is found."""

    package: Package | None
    make: Callable[[], Given]
    what: str = ""


# Programs that read text


def _picture(lines: tuple[str, ...], size: tuple[int, int], height: int) -> Any:
    """Return a picture (width, height) of lines of text of so many pixels' height."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", size, "white")
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), height)
    for number, line in enumerate(lines):
        ImageDraw.Draw(picture).text((height, height * (0.5 + 2 * number)), line, "black", font)
    return picture


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def read_page(new_session: NewSession) -> tuple[np.ndarray, ...]:
    """Return the characters that PP-OCRv4 reads on a page."""
    engine = OCR.load("rapidocr_onnxruntime.utils.infer_engine")
    with mock.patch.object(engine, "InferenceSession", lambda path, **_: new_session(path)):
        reader = OCR.load("rapidocr_onnxruntime").RapidOCR()
    found, _ = reader(np.asarray(_picture(_LINES, (736, 320), 32)))
    return (_codes("\n".join(text for _, text, _ in found)),)


def _captcha_reader(new_session: NewSession, **options: bool) -> Any:
    import onnxruntime

    runtime = mock.MagicMock(wraps=onnxruntime)  # which sessions of this package need as it is
    runtime.InferenceSession = lambda path, **_: new_session(path)
    with mock.patch.object(CAPTCHAS.load("ddddocr.models.model_loader"), "onnxruntime", runtime):
        return CAPTCHAS.load("ddddocr").DdddOcr(show_ad=False, **options)


def read_word(new_session: NewSession) -> tuple[np.ndarray, ...]:
    """Return the characters that ddddocr reads in a word."""
    return (_codes(_captcha_reader(new_session).classification(_png(_picture((_WORD,), (160, 64), 32)))),)


def find_words(new_session: NewSession) -> tuple[np.ndarray, ...]:
    """Return the corners of what ddddocr takes for something to read."""
    reader = _captcha_reader(new_session, det=True, ocr=False)
    return (np.array(sorted(reader.detection(_png(_picture(_LINES, (736, 320), 32))))),)


def _codes(text: str) -> np.ndarray:
    return np.array(list(map(ord, text)))


class _Listening:
    """A session that keeps the first inputs that it gets."""

    def __init__(self, session: Any) -> None:
        self._session, self.feeds = session, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, names: Any, feeds: dict[str, np.ndarray], *rest: Any) -> Any:
        self.feeds = self.feeds or feeds
        return self._session.run(names, feeds, *rest)


def _of_program(find: Callable[[NewSession], tuple[np.ndarray, ...]], name: str) -> Given:
    """Return one of the models of a program, by the name of its file, and what the program calls it with."""
    import onnxruntime

    new_session, heard = onnxruntime.InferenceSession, {}

    def listen(path: Any) -> _Listening:
        session = heard[str(path)] = _Listening(new_session(path, providers=["CPUExecutionProvider"]))
        return session

    find(listen)
    path = next(path for path in heard if Path(path).name == name)
    return Given(path, heard[path].feeds, find)


# Networks of PyTorch


def _exported(name: str) -> Given:
    """Return a network of the other files as PyTorch exports it."""
    import networks
    import torch
    import trained_networks

    made = (networks if name in networks.NETWORKS else trained_networks).make(name)
    names = [f"input{place}" for place in range(len(made.inputs))]
    file = io.BytesIO()
    with warnings.catch_warnings():  # about the exporter, which will go, and constants of networks
        warnings.simplefilter("ignore")
        torch.onnx.export(made.model, made.inputs, file, input_names=names, dynamo=False)
    return Given(file.getvalue(), {name: x.numpy() for name, x in zip(names, made.inputs, strict=True)})


def _export_of(name: str, package: Package | None = None) -> Model:
    return Model(package, functools.partial(_exported, name))


def _file_of(package: Package, find: Any, name: str, what: str) -> Model:
    return Model(package, functools.partial(_of_program, find, name), what)


MODELS = {
    "PP-OCRv4 det": _file_of(OCR, read_page, "ch_PP-OCRv4_det_infer.onnx", "characters"),
    "PP-OCRv4 rec": _file_of(OCR, read_page, "ch_PP-OCRv4_rec_infer.onnx", "characters"),
    "PP-OCR cls": _file_of(OCR, read_page, "ch_ppocr_mobile_v2.0_cls_infer.onnx", "characters"),
    "ddddocr": _file_of(CAPTCHAS, read_word, "common_old.onnx", "characters"),
    "ddddocr det": _file_of(CAPTCHAS, find_words, "common_det.onnx", "words"),
    "topaz fcnn": _export_of("topaz fcnn", TOPAZ),
    "topaz unet": _export_of("topaz unet", TOPAZ),
    "CREPE full": _export_of("CREPE full", CREPE),
    "VGG-16": _export_of("VGG-16"),
    "EDSR": _export_of("EDSR"),
    "U-Net": _export_of("U-Net"),
    "ResNet-50": _export_of("ResNet-50"),
}
