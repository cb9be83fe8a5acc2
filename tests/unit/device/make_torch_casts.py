"""Writes tests/data/casts/torch_casts.txt: what torch's casts give, as digests.

    python tests/unit/device/make_torch_casts.py > tests/data/casts/torch_casts.txt

For each cast one line `from to count word`. `word` is the sum over all inputs i of
(output bits) * Mix64(i) modulo 2^64, Mix64 as in daemon/layout/digest.h, where every NaN that torch
gives is replaced by the canonical quiet NaN. 16-bit inputs are all 65,536 patterns in order;
float32 inputs are those of `float32_inputs`, which tests/unit/device/cast_test.cc builds alike.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BITS = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}
CANONICAL_NAN = {"float32": 0x7FC00000, "float16": 0x7E00, "bfloat16": 0x7FC0}
RANDOM_INPUTS = 1 << 20


def mix64(x: np.ndarray) -> np.ndarray:
    """Returns Mix64 of every element of an array of uint64, any shape."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def float32_inputs() -> np.ndarray:
    """Returns float32 bit patterns, uint32 [n].

    For every sign and exponent the mantissas 2^k - 1, 2^k, 2^k + 1 and their complements (ties,
    just below, just above, denormals, overflow, NaNs), then the upper halves of Mix64(0), ...
    """
    mantissas = []
    for k in range(23):
        for low in ((1 << k) - 1, 1 << k, (1 << k) + 1):
            mantissas += [low & 0x7FFFFF, ~low & 0x7FFFFF]
    heads = np.arange(512, dtype=np.uint32)[:, None] << np.uint32(23)
    structured = (heads | np.array(mantissas, dtype=np.uint32)[None, :]).reshape(-1)
    random = (mix64(np.arange(RANDOM_INPUTS, dtype=np.uint64)) >> np.uint64(32)).astype(np.uint32)
    return np.concatenate([structured, random])


def cast_bits(bits: np.ndarray, source: str, target: str) -> np.ndarray:
    """Returns torch's cast of bit patterns [n] as bit patterns [n], NaNs canonical."""
    signed = np.int32 if source == "float32" else np.int16
    tensor = torch.from_numpy(bits.view(signed).copy()).view(DTYPES[source])
    cast = tensor.to(DTYPES[target])
    as_int = torch.int32 if target == "float32" else torch.int16
    result = cast.view(as_int).numpy().view(BITS[target]).copy()
    result[torch.isnan(cast).numpy()] = CANONICAL_NAN[target]
    return result


def main() -> None:
    """Prints one line per cast."""
    half = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    sys.stdout.write(f"# torch {torch.__version__}; see tests/unit/device/make_torch_casts.py\n")
    for source in DTYPES:
        inputs = float32_inputs() if source == "float32" else half
        for target in DTYPES:
            if source == target:
                continue
            outputs = cast_bits(inputs, source, target).astype(np.uint64)
            with np.errstate(over="ignore"):
                word = np.sum(outputs * mix64(np.arange(len(inputs), dtype=np.uint64)))
            sys.stdout.write(f"{source} {target} {len(inputs)} {int(word)}\n")


if __name__ == "__main__":
    main()
