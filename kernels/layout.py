"""How many bytes a weight takes once it is packed, per device: pure arithmetic, for whoever plans before anything is loaded.

``tests/kernels/test_layout.py`` packs and compares, so that these numbers and the packers cannot drift apart.
"""

from __future__ import annotations

import math

ITEM_SIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
BLOCK_N = 64  # outputs are padded to whole blocks in the nibble layout of the CPU (kernels/cpu/nibbles.py)
UNITS = (256, 128, 64, 32)  # group sizes that torch's int4 kernel for few rows knows


def padded(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple


def scale_unit(K: int, group_size: int, dtype: str) -> int:
    """Inputs that share a stored scale on the CPU.

    In bfloat16 the groups are cut into the largest unit that the int4 kernel knows, where one divides them; else they stay.
    """
    if dtype == "bfloat16":
        for unit in UNITS:
            if group_size % unit == 0 and K % unit == 0:
                return unit
    return group_size


def weight_nbytes(
    *,
    device: str,
    dtype: str,
    kind: str,
    bits: int,
    N: int,
    K: int,
    group_size: int,
    asymmetric: bool,
    act_order: bool,
    scale_bytes: int = 2,
    activation: str | None = None,
) -> int:
    """Bytes of one packed weight [N, K] without its bias, exactly as ``Ops.pack(...).nbytes`` has them.

    kind: "int" (bits 4 or 8), "fp8" or "dense"; dtype: that of the activations; group_size: K for one scale an output;
    act_order: the weight carries a permutation of its inputs that could not be moved to the producer; scale_bytes: size of a
    published scale (kept only on devices that use the canonical form); activation: as in QuantTensor.
    """
    if kind == "dense":
        return N * K * ITEM_SIZE[dtype]
    groups = math.ceil(K / group_size)
    if device != "cpu":  # the canonical form
        codes = N * math.ceil(K / 2) if kind == "int" and bits == 4 else N * K
        return codes + groups * N * (scale_bytes + (1 if asymmetric else 0)) + (8 * K if act_order else 0)
    permutation = 4 * K if act_order else 0
    if kind == "fp8":
        return N * K + 4 * groups * N + permutation
    if int8_product(bits=bits, groups=groups, asymmetric=asymmetric, activation=activation):
        return N * K + 4 * N + permutation
    planes, unit, rows = bits // 4, scale_unit(K, group_size, dtype), padded(N, BLOCK_N)
    units = math.ceil(K / unit)
    pair = 4 if dtype == "bfloat16" else 8  # a scale and an offset
    return planes * units * rows * pair + planes * units * unit * rows // 2 + permutation


def int8_product(*, bits: int, groups: int, asymmetric: bool, activation: str | None) -> bool:
    """Whether a CPU multiplies this weight as integers with activations rounded to int8."""
    return bits == 8 and groups == 1 and not asymmetric and activation == "int8-token"
