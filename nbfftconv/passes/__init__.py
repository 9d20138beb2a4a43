"""The three passes by FFT. Each file reads top to bottom; `spectra` holds the transforms that passes share."""
