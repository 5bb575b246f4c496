"""Retention gates in NumPy, as the engine computes them."""

from __future__ import annotations

import math

import numpy as np

_erf = np.vectorize(math.erf)


def z(gates, layer, x):
    """The gates' output before the logistic function: [n, n_embd] -> [n, n_head_kv]."""
    act, gate = (_silu if gates.activation == "silu" else _gelu), gates.layers[layer]
    h = act(x @ gate.gate_in.T + gate.gate_in_bias)
    if gate.gate_mid is not None:
        h = act(h @ gate.gate_mid.T + gate.gate_mid_bias)
    return h @ gate.gate_out.T + gate.gate_out_bias


def log_beta(gates, layer, x):
    """log beta of a layer: [n, n_embd] -> [n, n_head_kv]."""
    return log_sigmoid(z(gates, layer, x))


def log_sigmoid(x):
    """log(1 / (1 + exp(-x))) without overflow, and exact for large x, where it is -exp(-x)."""
    return np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))


def _silu(x):
    return x / (1 + np.exp(-x))


def _gelu(x):
    return x.dtype.type(0.5) * x * (1 + _erf(x * x.dtype.type(0.5**0.5)).astype(x.dtype))
