"""How many bytes a weight takes once it is packed: pure arithmetic, for whoever plans before anything is loaded.

``tests/kernels/test_layout.py`` packs and compares, so that these numbers and the packers cannot drift apart. ``ops`` is the name
of an Ops record: "cpu" (torch's operators), "cpu-native", "triton", or "reference", which keeps the canonical form.
"""

from __future__ import annotations

import math

from kernels.cpu import backend
from quant.errors import InputError

ITEM_SIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
BLOCK_N = 64  # outputs are padded to whole blocks in the nibble layout of the CPU (kernels/cpu/nibbles.py), and to whole panels
UNITS = (256, 128, 64, 32)  # group sizes that torch's int4 kernel for few rows knows
SLAB_BYTES = 4 << 20  # of expanded weights at a time, of torch's operators
TRITON_SLAB_BYTES = 16 << 20  # the same of the Triton kernels (kernels/triton/slab.py): within half of a card's L2 cache
SEGMENT = 128  # inputs that share an activation scale in the native kernels, at most
ACTIVATED_AT_ONCE = 1 << 20  # values that go through an activation without a gate at a time, where that takes memory
CONV_ROWS = 256  # tokens at a time that go through a short convolution (kernels/conv.py)
ADAPTED_AT_ONCE = 256  # rows of a step, at most, to which an adapter adds something at a time
LATENT_ROWS = 64  # tokens at a time that go to the latents' space and back (kernels/latent.py)
ADDED_INPUTS = 1024  # of a row, that the native kernels multiply with an adapter's first matrix at a time
NATIVE_ROWS = 512  # rows that the native kernels prepare at a time
NATIVE_QUERIES = 48  # rows of a tile of queries, tokens by heads, where the heads allow it
HUGE_PAGE = 2 << 20
TILE = 128  # outputs, and inputs, of a tile of the Triton kernels
TRITON_SPLIT_ROWS = 8 * 32
"""Parts, times rows, of a product in Triton that is split over its inputs, at most."""
TRITON_SPLIT_OUTPUTS = 2 * 192 * TILE
"""Weights with so many outputs are not split: their tiles fill twice the multiprocessors that any card has (kernels/tune.py)."""
TRITON_ROUTE_PARTS = 4
"""Parts of a router's product in Triton, at most."""
TILE_QUERIES, WIDEN, GATHER, TOGETHER = 256, 512, 64, 8
"""Attention of torch's operators: queries at a time, quantized keys widened at a time, scattered blocks gathered at a time, and
partial results that exist at a time (kernels/cpu/paged_attention.py)."""
DELTA_ROWS = 256  # tokens at a time, of torch's operators (kernels/delta.py)
KEPT_BYTES = 4 << 20
"""Once a model is loaded, blocks on the host that are smaller may be kept for the next (models/heap.py): those of steps in which
tokens are decoded. The large ones of a prompt are given back. Kept, too (glibc keeps up to 32 MiB), they left holes that the next
ones did not fill: a process had up to 50 MiB more than its tensors. Processor time of long prompts was the same with 1, 4, 8 and
32 MiB."""
HEADS = {"int8": 8, "int4": 4, "model": None}  # what the head may be stored as, and its bits
ACTIVATIONS = ("auto", "int8", "bf16")
SCALED_CACHES = {"fp8_e4m3": 8, "fp8_e5m2": 8, "int8": 8, "int4": 4}
"""Quantized caches (kernels/kv_cache.py), and the bits of their codes."""
CACHE_SCALE_BYTES = 4  # of one token and head: float32, or step and least in float16
STREAM_ALIGN = 512  # bytes: where tensors of a layer that is streamed in begin, as torch's allocator has it (triton/stream.py)
PINNED_LEAST = 1 << 20  # of pinned memory, at a time


def ops_name(device: str, *, reference: bool = False) -> str:
    """The name of the Ops that ``get_ops`` gives for a device ("cpu", "cuda"). InputError as in kernels.cpu.backend.name."""
    if reference or device not in ("cpu", "cuda"):
        return "reference"
    if device == "cuda":
        return "triton"
    return "cpu" if backend.name() == backend.TORCH else "cpu-native"


def head_bits(choice: str, *, ops: str, dtype: str) -> int | None:
    """Bits in which an unquantized head is stored, for --lm-head-dtype ``choice``; None: as the activations' ``dtype``.

    auto is int8 with kernels of our own, which read it as fast as it is small, and the model's own type elsewhere and in float32.
    """
    if choice == "auto":
        return 8 if ops in ("cpu-native", "triton") and dtype != "float32" else None
    if choice not in HEADS:
        raise InputError(f"--lm-head-dtype is {choice!r}: one of auto, {', '.join(HEADS)} is needed")
    return HEADS[choice]


def embedding_bits(choice: str) -> int | None:
    """The same of an unquantized embedding that is not one with the head, for --embedding-dtype; auto is the model's own type.

    A step reads a few rows of it, so that fewer bits save memory, but no time.
    """
    if choice == "auto":
        return None
    if choice not in HEADS:
        raise InputError(f"--embedding-dtype is {choice!r}: one of auto, {', '.join(HEADS)} is needed")
    return HEADS[choice]


def kv_nbytes(dtype: str, head_dim: int) -> int:
    """Bytes of one head's key, or value, of one token in a cache of that type, with its scale."""
    if dtype in SCALED_CACHES:
        return head_dim * SCALED_CACHES[dtype] // 8 + CACHE_SCALE_BYTES
    return head_dim * ITEM_SIZE[dtype]


def shares_table(ops: str, bits: int | None) -> bool:
    """Whether a head stored in ``bits`` (None: in the activations' dtype) is also the embedding that it is tied to.

    Kernels of our own look rows up in a head of codes; of a dense one the CPU's panels are a copy. Elsewhere, and on a card, a
    dense table serves both.
    """
    return ops == "triton" or (ops == "cpu-native") == (bits is not None)


def table_ops(ops: str) -> str:
    """The operators in whose layout rows of a quantized embedding are looked up: torch's own cannot do that in theirs."""
    return "reference" if ops == "cpu" else ops


def padded(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple


def pinned_pieces(nbytes: int) -> list[int]:
    """The requests for pinned memory that together hold so many bytes, and less than PINNED_LEAST more.

    Powers of two: torch's allocator of pinned memory rounds every request up to one, for a whole layer to up to twice its size.
    """
    pieces = []
    while nbytes > 0:
        pieces.append(max(PINNED_LEAST, 1 << nbytes.bit_length() - 1))
        nbytes -= pieces[-1]
    return pieces


def pinned_slots(slots: int, size: int) -> list[int]:
    """How many of ``slots`` slots of ``size`` bytes lie in each request for pinned memory: such that little is rounded up."""
    pieces = []
    while slots > 0:
        pieces.append(max(1, min(slots, (1 << (slots * size).bit_length() - 1) // size)))
        slots -= pieces[-1]
    return pieces


def pinned(nbytes: int) -> int:
    """What torch's allocator takes for a request of pinned memory: the next power of two."""
    return 1 << max(0, nbytes - 1).bit_length() if nbytes else 0


def slab_rows(columns: int, item_size: int) -> int:
    """Outputs in one slab of expanded weights of torch's operators."""
    return max(BLOCK_N, SLAB_BYTES // (columns * item_size) // BLOCK_N * BLOCK_N)


def triton_slab(outputs: int, inputs: int) -> tuple[int, int]:
    """(outputs, inputs) of the workspace in which a weight of so many is expanded for many rows, in 16 bits: whole tiles.

    No larger than TRITON_SLAB_BYTES where a tile's outputs fit that at all. Outputs are even: halves of [gate; up] fit too.
    """
    across = padded(inputs, TILE)
    return min(padded(outputs, TILE), max(TILE, TRITON_SLAB_BYTES // (2 * across) // TILE * TILE)), across


def triton_slab_nbytes(inputs: int) -> int:
    """Bytes of that workspace, at most, for weights of so many inputs."""
    outputs, across = triton_slab(1 << 40, inputs)
    return 2 * outputs * across


def triton_expert_blocks(tokens: int, experts: int, active: int, rows: int) -> int:
    """How many blocks of at most ``rows`` pairs, each of one expert, are enough for any choice (kernels/triton/routing.py)."""
    pairs = tokens * active
    return min(pairs, experts) + (0 if tokens <= rows else pairs // rows)


def triton_mixture_nbytes(hidden: int, inner: int, item_size: int, *, experts: int, active: int, shared: int = 0) -> int:
    """Bytes of a token in a mixture of experts of the Triton kernels, beside its input: at most, all counted together.

    The router's logits; for each expert it goes to its share, its places and its blocks (12 bytes for each of three numbers, and
    one for 16 rows), what comes out of gate and up, and its part of the sum. Parts of products that are split are not among them.
    ``shared``: features of an MLP that every token goes through, too: gate and up in float32, their product, its share, its part.
    """
    beside = 4 * hidden + 16 + shared * (8 + 3 * item_size) if shared else 0
    return 4 * TRITON_ROUTE_PARTS * experts + active * (25 + inner * item_size + 4 * hidden) + beside


def scale_unit(K: int, group_size: int, dtype: str) -> int:
    """Inputs that share a stored scale with torch's operators.

    In bfloat16 the groups are cut into the largest unit that the int4 kernel knows, where one divides them; else they stay.
    """
    if dtype == "bfloat16":
        for unit in UNITS:
            if group_size % unit == 0 and K % unit == 0:
                return unit
    return group_size


def weight_nbytes(
    *,
    ops: str,
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
    gated: bool = False,
    factors: bool = False,
) -> int:
    """Bytes of one packed weight [N, K] without its bias, exactly as ``Ops.pack(...).nbytes`` has them.

    kind: "int" (bits 4 or 8), "fp8", "fp4" or "dense"; dtype: that of the activations; group_size: K for one scale an output;
    act_order: the weight carries a permutation of its inputs that could not be moved to the producer; scale_bytes: size of a
    published scale; activation and factors: as in QuantTensor; gated: as for Ops.pack.
    """
    if ops == "cpu-native":
        outputs = native_outputs(N, gated=gated)
        if kind == "dense":
            return outputs * (padded(K, 2) if dtype == "bfloat16" else K) * ITEM_SIZE[dtype]
        groups, permutation = math.ceil(K / group_size), 4 * K if act_order else 0
        if kind == "fp8":
            return outputs * (K + 4 * groups) + permutation
        segments, unit = native_segments(K, group_size)
        each = segments * unit * bits // 8 + groups * (scale_bytes + (1 if asymmetric else 0)) + (4 if factors else 0)
        return outputs * each + permutation
    if kind == "dense":
        return N * K * ITEM_SIZE[dtype]
    groups = math.ceil(K / group_size)
    if ops == "triton":
        whole = groups == 1 or group_size % TILE == 0
        rounded = kind == "int" and dtype != "float32" and whole and activation == "int8-token"
        fits = dtype != "float32" and (whole or group_size in (32, 64))
        if not rounded and not fits:
            return N * K * ITEM_SIZE[dtype]  # kept dequantized, see kernels/triton/weights.py
        rows, columns = padded(N, TILE), padded(K, TILE)
        scales = 1 if groups == 1 else columns // min(group_size, TILE)
        pair = 8 if scale_bytes == 4 and kind == "int" else 4  # a scale and an addend; FP8: a scale
        return rows * columns * bits // 8 + scales * rows * pair + (8 * K if act_order else 0)
    if ops != "cpu" or kind == "fp4":  # the canonical form
        codes = N * math.ceil(K / 2) if kind != "fp8" and bits == 4 else N * K
        each = groups * (scale_bytes + (1 if asymmetric else 0)) + (4 if factors else 0)
        return codes + N * each + (8 * K if act_order else 0)
    permutation = 4 * K if act_order else 0
    if kind == "fp8":
        return N * K + 4 * groups * N + permutation
    if int8_product(bits=bits, groups=groups, asymmetric=asymmetric, activation=activation):
        return N * K + 4 * N + permutation
    planes, unit, rows = bits // 4, scale_unit(K, group_size, dtype), padded(N, BLOCK_N)
    units = math.ceil(K / unit)
    pair = 4 if dtype == "bfloat16" else 8  # a scale and an offset
    return planes * units * rows * pair + planes * units * unit * rows // 2 + permutation


def paged_attention_nbytes(
    *, heads: int, kv_heads: int, head_dim: int, item_size: int, block_size: int, capped: bool = False
) -> int:
    """Bytes that attention of torch's operators needs beside queries and result, at most.

    Partial results of a tile of queries, with the logarithm of a sum each, and float32 while they are merged; keys and values
    that are widened (by way of float32), and those of scattered blocks. With a cap float32 throughout: results, scores (twice),
    queries, and keys or values for each head.
    """
    rows = TILE_QUERIES * heads
    partial = TOGETHER * rows * (head_dim * (4 if capped else item_size) + 4) + 3 * rows * 4 * (head_dim + TOGETHER)
    widened = WIDEN * kv_heads * head_dim * (8 + 2 * item_size)
    scores = WIDEN * (8 * rows + 4 * heads * head_dim) + 4 * rows * head_dim if capped else 0
    return partial + widened + scores + 2 * GATHER * block_size * kv_heads * head_dim * item_size


def latent_nbytes(*, heads: int, rank: int, other: int, item_size: int) -> int:
    """Bytes of the copies that are made of some tokens on their way to the latents' space and back; ``other``: the wider end."""
    return LATENT_ROWS * heads * (rank + other) * item_size


def delta_nbytes(*, ops: str, channels: int, value_heads: int, key_dim: int, value_dim: int) -> int:
    """Bytes that the gated delta rule needs beside what it reads, its states and its result, at most; names as in models.delta.

    Of torch's operators, in float32: its input, what the convolution sees and makes of it, queries and keys for each value head,
    and the result on its way through norm and gate. Native kernels need no memory of their own; a card's have what the
    convolution makes in the place of one of the parts that were joined to the input.
    """
    if ops in ("cpu-native", "triton"):
        return 0
    return 4 * DELTA_ROWS * (6 * channels + value_heads * (4 * key_dim + 6 * value_dim + 8))


def conv_nbytes(channels: int, kernel: int) -> int:
    """Bytes that a short convolution needs beside its input, its states and its result, at most.

    Of some tokens, of a sequence each: a copy of the input, as it is and in float32; in float32 also the product of two parts,
    what the convolution sees and what was kept; and the result as it is. And their numbers, rows and places.
    """
    return CONV_ROWS * (channels * (3 * 2 + 3 * 4 + 4 * 2 * kernel + 2) + 96)


def bias_nbytes(*, ops: str, dtype: str, N: int, gated: bool = False) -> int:
    """Bytes of a packed weight's bias [N]: kernels of our own keep float32, the CPU's in whole panels."""
    if ops == "triton":
        return 4 * N
    return 4 * native_outputs(N, gated=gated) if ops == "cpu-native" else N * ITEM_SIZE[dtype]


def int8_product(*, bits: int, groups: int, asymmetric: bool, activation: str | None) -> bool:
    """Whether a CPU multiplies this weight as integers with activations rounded to int8, since the checkpoint asks for that."""
    return bits == 8 and groups == 1 and not asymmetric and activation == "int8-token"


def native_outputs(N: int, *, gated: bool) -> int:
    """Outputs in whole panels, of each half where they are [gate; up]."""
    return 2 * padded(N // 2, BLOCK_N) if gated else padded(N, BLOCK_N)


def native_segments(K: int, group_size: int) -> tuple[int, int]:
    """(segments, inputs in a segment): groups are cut into segments, which are padded to equal lengths (native/pack.h)."""
    group = min(group_size, K)
    groups = math.ceil(K / group)
    segments = (groups - 1) * math.ceil(group / SEGMENT) + math.ceil((K - (groups - 1) * group) / SEGMENT)
    return segments, SEGMENT if group >= SEGMENT else padded(group, 8)


def native_workspace_bytes(tokens: int, K: int, group_size: int, *, rounded: bool) -> tuple[int, int]:
    """(shared, a thread's): at most these bytes does a native product need for ``tokens`` rows beside its input and output.

    Shared are the prepared rows: a byte an input where they are ``rounded`` to int8, at most four elsewhere, and 12 a segment for
    scale and sum. A thread has a row in float32, sums of two panels, and an unpacked piece of the weight. Memory is kept for the
    next product, large parts in whole huge pages.
    """
    rows, row = min(padded(tokens, 16), NATIVE_ROWS), _native_row(K, group_size, rounded)
    return _in_pages(rows * row + 64), _in_pages(8 * (K + 40) + 2 * rows * BLOCK_N * 4 + (32 << 10))


def native_attention_bytes(threads: int, *, heads: int, kv_heads: int, head_dim: int) -> tuple[int, int]:
    """The same of attention over a paged cache: parts of long sequences are shared, with where 2,048 tiles of queries stand.

    A thread has a tile of queries, a chunk of keys and values, and what it makes of them (native/chunks.h). Of one thread nothing
    is cut, of several each may have five parts.
    """
    rows, width = max(NATIVE_QUERIES, heads // kv_heads), padded(head_dim, BLOCK_N)
    floats = (rows + BLOCK_N) * (head_dim + 16 + width) + rows * 3 * BLOCK_N + 8 * BLOCK_N
    parts = 5 * threads * rows * (2 + width) if threads > 1 else 0
    return _in_pages(4 * parts + 80 * 2048), _in_pages(4 * floats)


def native_mixture_bytes(tokens: int, K: int, group_size: int, *, rounded: bool, experts: int, active: int) -> int:
    """What is shared, as above, of the products of a mixture's experts: each token's row is there for each of ``active`` experts.

    The rows of each expert are filled up to whole tiles of 16. A thread needs no more than for another product.
    """
    pairs = min(tokens, NATIVE_ROWS) * active
    groups = min(experts, pairs)
    return _in_pages((pairs + 15 * groups) * _native_row(K, group_size, rounded) + 128 * groups)


def native_routes_bytes(tokens: int, inner: int, item_size: int, *, experts: int, active: int, shared: int = 0) -> int:
    """Beside that: logits of the router, who goes where, and what comes out of gate and up (native/mixture.h).

    ``shared``: features of an MLP that every token goes through, too.
    """
    rows, own = min(tokens, NATIVE_ROWS), 4 + shared * item_size if shared else 0
    return _in_pages(rows * (active * (16 + inner * item_size) + own) + rows * experts * 4 + experts * 36 + 128)


def _native_row(K: int, group_size: int, rounded: bool) -> int:
    """Bytes of a prepared row."""
    segments, unit = native_segments(K, group_size)
    return padded(segments * unit, 2 * SEGMENT) * (1 if rounded else 4) + 12 * segments


def _in_pages(size: int) -> int:
    return padded(size, HUGE_PAGE if size >= HUGE_PAGE else 64)
