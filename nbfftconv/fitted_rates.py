"""Rates of the cost model, read by `rates`. Written by perf/fit_costs.py."""

RATES = {
    64: {
        "fft": {
            "bandwidth": {
                "read": 0.24,
                "write": 0.4,
                "kernels": 0.76,
                "sums": 0.6,
                "transposed": 0.44,
            },
            "seconds": {
                "call": 4e-05,
                "block": 1e-05,
                "group_product": 1e-07,
                "square": 8e-08,
                "transform_call": 1e-07,
            },
        },
        "direct": {
            "flops": {
                "dense": 0.8787878787878788,
                "window": 0.696969696969697,
                "gradient": 0.05454545454545454,
                "grad_weight": 0.9212121212121213,
                "gather": 0.12,
                "grad_weight_gather": 0.022424242424242426,
                "pack": 0.004242424242424242,
            },
            "bandwidth": {
                "dense_move": 0.4,
                "window_move": 0.25,
                "write": 0.4,
            },
            "seconds": {
                "call": 2e-05,
                "gradient_row": 8e-09,
            },
        },
        "fftw": {
            "flops": {
                "transform": 0.12121212121212122,
                "product": 0.7575757575757576,
            },
            "bandwidth": {
                "spectra": 0.32,
                "stream": 0.52,
            },
            "seconds": {
                "row": 3e-09,
            },
        },
        "codelet": {
            "flops": {
                "product": 1.0,
                "length_8": 0.5818181818181818,
                "length_9": 0.5515151515151515,
                "length_10": 0.593939393939394,
                "length_12": 0.5818181818181818,
                "length_13": 0.3515151515151515,
                "length_14": 0.45454545454545453,
                "length_15": 0.4666666666666667,
                "length_16": 0.5575757575757576,
                "length_18": 0.36363636363636365,
                "length_20": 0.3696969696969697,
                "length_24": 0.36363636363636365,
                "length_28": 0.3090909090909091,
                "length_30": 0.28484848484848485,
                "length_32": 0.38181818181818183,
            },
            "bandwidth": {
                "spectra": 1.4,
                "stream": 1.32,
            },
            "seconds": {
                "row": 1.3e-09,
            },
        },
        "winograd": {
            "flops": {
                "transform": 0.929,
                "product": 0.976,
            },
            "bandwidth": {
                "spectra": 0.33,
                "stream": 0.9,
                "read": 0.903,
                "write": 0.865,
            },
            "seconds": {
                "gathered": 1.9e-09,
                "kernel": 4.73e-09,
            },
        },
        "row_codelet": {
            "flops": {
                "transform": 0.15,
                "product": 1.0,
            },
            "bandwidth": {
                "spectra": 1.4,
                "stream": 1.32,
            },
            "seconds": {
                "row": 3e-09,
                "gathered": 1.9e-09,
            },
        },
        "row_four_step": {
            "flops": {
                "transform": 0.25,
                "product": 0.7575757575757576,
            },
            "bandwidth": {
                "spectra": 0.32,
                "stream": 0.52,
            },
            "seconds": {
                "row": 3e-09,
            },
        },
        "four_step": {
            "flops": {
                "transform": 0.32727272727272727,
                "tall": 0.2727272727272727,
                "product": 0.7575757575757576,
            },
            "bandwidth": {
                "spectra": 0.32,
                "stream": 0.52,
            },
            "seconds": {
                "row": 3e-09,
            },
        },
    },
    32: {
        "fft": {
            "bandwidth": {
                "read": 0.284,
                "write": 0.22,
                "kernels": 0.478,
                "sums": 0.404,
                "transposed": 0.427,
            },
            "seconds": {
                "call": 3.86e-05,
                "block": 1e-05,
                "group_product": 3.28e-08,
                "square": 3.33e-08,
                "transform_call": 7.05e-08,
            },
        },
        "direct": {
            "flops": {
                "dense": 0.956,
                "window": 0.828,
                "gradient": 0.111,
                "grad_weight": 1.29,
                "gather": 0.138,
                "grad_weight_gather": 0.0231,
                "pack": 0.00444,
            },
            "bandwidth": {
                "dense_move": 0.394,
                "window_move": 0.25,
                "write": 0.402,
            },
            "seconds": {
                "call": 2e-05,
                "gradient_row": 6.9e-09,
            },
        },
        "fftw": {
            "flops": {
                "transform": 0.163,
                "product": 0.893,
            },
            "bandwidth": {
                "spectra": 0.256,
                "stream": 0.52,
            },
            "seconds": {
                "row": 3e-09,
            },
        },
        "codelet": {
            "flops": {
                "product": 1.25,
                "length_8": 1.28,
                "length_9": 1.21,
                "length_10": 1.3,
                "length_12": 1.28,
                "length_13": 0.772,
                "length_14": 0.998,
                "length_15": 1.02,
                "length_16": 1.22,
                "length_18": 0.798,
                "length_20": 0.812,
                "length_24": 0.798,
                "length_28": 0.679,
                "length_30": 0.625,
                "length_32": 0.838,
            },
            "bandwidth": {
                "spectra": 1.4,
                "stream": 1.32,
            },
            "seconds": {
                "row": 1.82e-09,
            },
        },
        "winograd": {
            "flops": {
                "transform": 1.1,
                "product": 1.08,
            },
            "bandwidth": {
                "spectra": 0.539,
                "stream": 2.28,
                "read": 0.896,
                "write": 1.01,
            },
            "seconds": {
                "gathered": 1.9e-09,
                "kernel": 5.65e-09,
            },
        },
        "row_codelet": {
            "flops": {
                "transform": 0.225,
                "product": 1.25,
            },
            "bandwidth": {
                "spectra": 1.4,
                "stream": 1.32,
            },
            "seconds": {
                "row": 3e-09,
                "gathered": 1.9e-09,
            },
        },
        "row_four_step": {
            "flops": {
                "transform": 0.373,
                "product": 0.854,
            },
            "bandwidth": {
                "spectra": 0.845,
                "stream": 1.39,
            },
            "seconds": {
                "row": 3e-09,
            },
        },
        "four_step": {
            "flops": {
                "transform": 0.488,
                "tall": 0.36,
                "product": 0.854,
            },
            "bandwidth": {
                "spectra": 0.845,
                "stream": 1.39,
            },
            "seconds": {
                "row": 3e-09,
            },
        },
    },
}
