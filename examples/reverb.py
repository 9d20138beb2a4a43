"""A room's reverb in one dimension: a melody convolved with an impulse response of a second, drawn as spectrograms.

``python examples/reverb.py [FILE]`` writes the picture, reverb.png if no other is named. It needs matplotlib, as
``pip install nbfftconv[demo]`` installs it. Melody and response are made up, from a seed.
"""

import sys
import time

import numpy as np
from matplotlib import pyplot as plt

import nbfftconv

RATE = 24_000  # samples a second
NOTES = 262, 330, 392, 523, 392, 330  # Hz


def melody() -> np.ndarray:
    """Return plucked notes, as faint a hiss as of a tape, and silence, (1, 1, samples)."""
    t = np.arange(RATE // 3) / RATE
    notes = [sum(np.sin(2 * np.pi * k * note * t) / k**1.5 for k in range(1, 6)) * np.exp(-7 * t) for note in NOTES]
    sound = np.concatenate([*notes, np.zeros(RATE)])
    return (sound + np.random.default_rng(1).normal(0, 1e-4, sound.size)).astype(np.float32)[None, None]


def response() -> np.ndarray:
    """Return the decaying noise that a hall answers a clap with, (1, 1, samples); the latest sample comes first."""
    rng, t = np.random.default_rng(0), np.arange(RATE) / RATE
    echo = rng.standard_normal(RATE) * np.exp(-5 * t) * 0.03
    echo[0] = 1  # the sound itself
    return echo[::-1].astype(np.float32)[None, None]  # as a convolution of deep learning does not flip it


def main(file: str = "reverb.png") -> None:
    """Convolve, tell how long that took, and draw both sounds."""
    dry, room = melody(), response()
    hall = nbfftconv.Conv1d(room, padding=(room.shape[-1] - 1, 0), training=False)
    hall(dry)  # compiles, and transforms the response
    start = time.perf_counter()
    wet = hall(dry)
    print(f"{dry.shape[-1]} samples, a response of {room.shape[-1]}: {(time.perf_counter() - start) * 1e3:.1f} ms")

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for axis, sound, name in zip(axes, (dry, wet), ("dry", "in a hall"), strict=True):
        axis.specgram(sound[0, 0], NFFT=1024, Fs=RATE, noverlap=768, vmin=-120, vmax=-30)
        axis.set(title=name, xlabel="seconds", ylim=(0, 3000))
    axes[0].set_ylabel("Hz")
    figure.savefig(file, dpi=90)


if __name__ == "__main__":
    main(*sys.argv[1:])
