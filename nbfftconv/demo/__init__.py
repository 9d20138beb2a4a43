"""The main job, with the `demo` extra: train a CNN by FFT convolutions, substitute, compare, draw."""
