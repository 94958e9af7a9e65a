"""The usual launches of every kernel, recorded by calling the operators on tensors without memory, as on a card.

    python -m tests.kernels.triton.launches 89 90        # those of an RTX 4090 and of an H200, as JSON

Tensors are on torch's "meta" device and say that they are a card's; a launch goes to ``Recorder`` instead of Triton's compiler,
which leaves what it was given as a Compilation. What would wait for a number from the card fails here, so that a recording also
proves that an operator does not.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from kernels.layout import SCALED_CACHES
from kernels.ops import MLP, KVCache, Mixture, Norm, PagedBatch
from kernels.states import DeltaRule, StateCache
from quant.tensor import QuantTensor
from tests import warm
from tests.kernels.triton.aot import Compilation, environment
from tests.kernels.triton.cards import CARDS

META = torch.device("meta")
ROOT = Path(__file__).parents[3]
POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64", torch.uint8: "*u8",
    torch.int8: "*i8", torch.int16: "*i16", torch.uint16: "*u16", torch.int32: "*i32", torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e5m2: "*fp8e5",
}  # fmt: skip
HEADS, KV_HEADS, SIZE, HIDDEN, INNER, VOCABULARY = 32, 8, 128, 4096, 14336, 128256  # of an 8B model
WIDE, WIDEST = 256, 512  # heads of Gemma
BLOCK_SIZE = 64


def recorded(*targets: int) -> list[Compilation]:
    """The launches of all cases for these architectures, each once; by a process in which kernels are not the interpreter's."""
    arguments = ("-m", "tests.kernels.triton.launches", *map(str, targets))
    done = warm.run(*arguments, env=environment(), cwd=ROOT, imported=warm.COMPILER)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return [Compilation.of(one) for one in json.loads(done.stdout.splitlines()[-1])]


def kernel_names() -> set[str]:
    """module:function of everything in kernels/triton that is launched on a grid."""
    launched, jitted = set(), set()
    for path in (ROOT / "kernels" / "triton").glob("*.py"):
        tree, home = ast.parse(path.read_text()), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("kernels.triton"):
                home |= {one.name: f"{node.module}.{one.name}" for one in node.names}
            elif isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(one) for one in node.decorator_list):
                jitted.add(f"kernels.triton.{path.stem}:{node.name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                module, _, name = ast.unparse(node.func.value).rpartition(".")
                where = home.get(module) or home.get(name, "").rpartition(".")[0] or f"kernels.triton.{path.stem}"
                launched.add(f"{where}:{name}")
    return launched & jitted


class Recorder:
    """Takes launches for a card of an architecture."""

    def __init__(self, target: int) -> None:
        self.target, self.case, self.made = target, "", dict[str, Compilation]()

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        """As Triton's JITFunction.run, whose rules for what is a constant and what a multiple of 16 are followed here."""
        warps, stages, most = given.pop("num_warps", 4), given.pop("num_stages", 3), given.pop("maxnreg", None)
        bound = inspect.signature(kernel.fn).bind(*args, **given)
        bound.apply_defaults()
        types, constants, odd = {}, {}, []
        for parameter in kernel.params:
            name, value = parameter.name, bound.arguments[parameter.name]
            special = isinstance(value, int) and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (special and value == 1):
                constants[name] = _plain(value)
            elif isinstance(value, Tensor):
                types[name] = POINTERS[value.dtype]
            elif isinstance(value, float):
                types[name] = "fp32"
            else:
                types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                odd += [] if special and value % 16 == 0 else [name]
        path = f"{kernel.fn.__module__}:{kernel.fn.__name__}"
        one = Compilation(path, types, constants, warps, stages, tuple(odd), (self.target,), maxnreg=most)
        self.made.setdefault(json.dumps(asdict(one), sort_keys=True), replace(one, case=self.case))


def _plain(value: Any) -> Any:
    """A constant as JSON has it; types by name, for aot.py."""
    if not isinstance(value, tl.dtype):
        return getattr(value, "value", value)
    return next(f"tl.{name}" for name in ("float16", "bfloat16", "float32") if getattr(tl, name) == value)


def empty(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def weight(N: int, K: int, bits: int, group: int) -> QuantTensor:
    packed = empty(N, K * bits // 8, dtype=torch.uint8)
    return QuantTensor(packed, empty(-(-K // group), N), None, None, bits, group, K, N)


def cache(kind: str, size: int = SIZE) -> KVCache:
    return KVCache.zeros(1024, BLOCK_SIZE, KV_HEADS, size, dtype=kind, device=META)


def step(sequences: int, rows: int, longest: int) -> PagedBatch:
    tokens, width = sequences * rows, -(-longest // BLOCK_SIZE)
    whole, short = {"dtype": torch.int64}, {"dtype": torch.int32}
    return PagedBatch(
        positions=empty(tokens, **whole), slots=empty(tokens, **whole), query_starts=empty(sequences + 1, **short),
        seq_lens=empty(sequences, **short), block_tables=empty(sequences, width, **short), max_query=rows, max_seq=longest,
    )  # fmt: skip


@dataclass(frozen=True)
class Cases:
    """Operators as the engine calls them; each yields a title, then makes launches."""

    dtype: torch.dtype
    card: Any  # kernels.triton.matmul.Card

    @property
    def name(self) -> str:
        return {torch.float16: "fp16", torch.bfloat16: "bf16"}[self.dtype]

    def cache(self, kind: str, size: int = SIZE) -> KVCache:
        return cache(str(self.dtype).removeprefix("torch.") if kind == "16 bits" else kind, size)

    def products(self) -> Iterator[str]:
        from kernels.triton import matmul, weights

        kinds = {  # N, K, bits, group; rows
            "layer, 4 bits, groups of 128": ((HIDDEN, HIDDEN, 4, 128), (1, 32, 64, 256, 2048)),
            "layer, 4 bits, groups of 32": ((HIDDEN, HIDDEN, 4, 32), (1, 64, 256)),
            "layer, 8 bits, groups of 128": ((HIDDEN, HIDDEN, 8, 128), (1,)),
            "head, 8 bits, one scale an output": ((VOCABULARY, HIDDEN, 8, HIDDEN), (1, 32, 64)),
        }
        for kind, (shape, sizes) in kinds.items():
            packed = weights.pack(weight(*shape), dtype=self.dtype)
            for rows in sizes:
                yield f"{kind}, {self.name}, {rows} row{'s' * (rows > 1)}"
                matmul.matmul(empty(rows, HIDDEN, dtype=self.dtype), packed, card=self.card)
        packed = weights.pack(weight(HIDDEN, HIDDEN, 4, 128), dtype=self.dtype)
        yield f"layer, 4 bits, groups of 128, {self.name}, 256 rows, sums in float16 where they are faster"
        matmul.matmul(empty(256, HIDDEN, dtype=self.dtype), packed, card=self.card._replace(half=True))
        gated = weights.pack(weight(2 * INNER, HIDDEN, 4, 128), dtype=self.dtype, gated=True)
        for rows in (1, 2048):
            yield f"SiLU and multiply, {self.name}, {rows} row{'s' * (rows > 1)}"
            matmul.matmul(empty(rows, HIDDEN, dtype=self.dtype), gated, card=self.card)

    def rounded(self) -> Iterator[str]:
        from kernels.triton import matmul, weights

        for bits, group in ((4, 128), (8, HIDDEN)):
            packed = weights.pack(weight(HIDDEN, HIDDEN, bits, group), dtype=self.dtype, activation="int8")
            for rows in (1, 64, 2048):
                yield f"{bits} bits, activations in int8, {rows} row{'s' * (rows > 1)}"
                matmul.matmul(empty(rows, HIDDEN, dtype=self.dtype), packed, card=self.card)
        asked = replace(weight(HIDDEN, HIDDEN, 8, HIDDEN), activation="int8-token")
        packed = weights.pack(asked, dtype=self.dtype)
        for rows in (1, 64, 2048):
            yield f"8 bits, a token's activations in int8, {rows} row{'s' * (rows > 1)}"
            matmul.matmul(empty(rows, HIDDEN, dtype=self.dtype), packed, card=self.card)

    def experts(self) -> Iterator[str]:
        """A layer of Qwen3-30B-A3B; Mixtral's, whose few experts are split for one token; and unquantized ones."""
        from kernels.triton import experts, weights

        def joined(N: int, K: int, bits: int, count: int, gated: bool) -> Any:
            one = weights.pack(weight(N, K, 4, 128) if bits == 4 else empty(N, K), dtype=self.dtype, gated=gated)
            words, params = (None if t is None else empty(count, *t.shape, dtype=t.dtype) for t in (one.words, one.params))
            return replace(one, words=words, params=params)

        for name, hidden, inner, count, active, bits, sizes in (
            ("128 experts, 4 bits", 2048, 768, 128, 8, 4, (1, 16, 256, 2048)),
            ("8 experts, 4 bits", 4096, 14336, 8, 2, 4, (1,)),
            ("128 experts, 16 bits", 2048, 768, 128, 8, 16, (1, 2048)),
        ):
            router = weights.pack(empty(count, hidden), dtype=self.dtype)
            mlp = MLP((joined(2 * inner, hidden, bits, count, True),), joined(hidden, inner, bits, count, False))
            for rows in sizes:
                yield f"{name}, {self.name}, {rows} row{'s' * (rows > 1)}"
                experts.mixed_parts(empty(rows, hidden, dtype=self.dtype), Mixture(router, (mlp,), active, True), card=self.card)

    def fp8(self) -> Iterator[str]:
        from kernels.triton import matmul, weights

        codes = empty(HIDDEN, HIDDEN, dtype=torch.uint8).view(torch.float8_e4m3fn)
        asked = replace(weight(HIDDEN, HIDDEN, 8, HIDDEN), packed=codes, activation="fp8-token")
        packed = weights.pack(asked, dtype=self.dtype)
        for rows in (1, 64, 2048):
            yield f"FP8, {self.name}, {rows} row{'s' * (rows > 1)}"
            matmul.matmul(empty(rows, HIDDEN, dtype=self.dtype), packed, card=self.card)

    def attention(self) -> Iterator[str]:
        from kernels.triton.attention import attention

        for kind in ("16 bits", *SCALED_CACHES):
            for rows in (1, 512):
                yield f"{self.name}, cache {kind}, {rows} row{'s' * (rows > 1)} a sequence"
                q, kept = empty(rows, HEADS, SIZE, dtype=self.dtype), self.cache(kind)
                attention(q, kept, step(1, rows, 8192), scale=0.1, multiprocessors=self.card.multiprocessors)

    def latents(self) -> Iterator[str]:
        """Of Kimi K2: many queries over one key of 576 numbers, which is the value, too."""
        from kernels.triton.attention import attention

        for kind in ("16 bits", "fp8_e4m3"):
            for rows in (1, 512):
                yield f"latents, {self.name}, cache {kind}, {rows} row{'s' * (rows > 1)} a sequence"
                dtype = {"16 bits": "bfloat16"}.get(kind, kind)
                kept = KVCache.zeros(1024, BLOCK_SIZE, 1, 576, dtype=dtype, device=META, values=False)
                q, batch = empty(rows, 64, 576, dtype=self.dtype), step(1, rows, 8192)
                attention(q, kept, batch, scale=0.1, multiprocessors=self.card.multiprocessors)

    def small(self) -> Iterator[str]:
        from kernels.triton import elementwise, embedding, norm, rope, weights

        x, gain, parts = (
            empty(8, HIDDEN, dtype=self.dtype),
            empty(HIDDEN, dtype=self.dtype),
            empty(4, 8, HIDDEN, dtype=torch.float32),
        )
        yield self.name
        norm.rms_norm(x, gain, eps=1e-5)
        elementwise.silu_mul(empty(8, 2 * INNER, dtype=self.dtype))
        embedding.embedding(empty(8, dtype=torch.int64), empty(VOCABULARY, HIDDEN, dtype=self.dtype), self.dtype)
        yield f"{self.name}, with a residual"
        norm.add_rms_norm(x, x, gain, eps=1e-5)
        yield f"{self.name}, with a residual, of 4 parts"
        norm.add_rms_norm(parts, x, gain, eps=1e-5)
        yield f"{self.name}, with a residual, to int8"
        norm.add_rms_norm_int8(x, x, gain, eps=1e-5)
        for bits, group in ((8, HIDDEN), (4, 128)):
            yield f"{self.name}, head of {bits} bits"
            table = weights.pack(weight(VOCABULARY, HIDDEN, bits, group), dtype=self.dtype)
            embedding.packed_rows(empty(8, dtype=torch.int64), table, self.dtype)
        width, angles, batch = (HEADS + 2 * KV_HEADS) * SIZE, empty(8192, SIZE, dtype=torch.float32), step(8, 1, 8192)
        for kind in ("16 bits", *SCALED_CACHES):
            yield f"{self.name}, cache {kind}"
            rope.rope_store(empty(8, width, dtype=self.dtype), HEADS, self.cache(kind), batch, angles)
        yield f"{self.name}, norms of heads, of 4 parts"
        heads, sums = Norm(empty(SIZE, dtype=self.dtype), 1e-6), empty(4, 8, width, dtype=torch.float32)
        kept = self.cache("16 bits")
        rope.rope_store_sums(sums, None, HEADS, kept, batch, angles, dtype=self.dtype, q_norm=heads, k_norm=heads)

    def gemma(self) -> Iterator[str]:
        """What only Gemma launches: wide heads, a cap, gelu, norms with an offset, norms of what is added."""
        from kernels.triton import matmul, norm, rope, weights
        from kernels.triton.attention import attention

        for kind in ("16 bits", *SCALED_CACHES):
            for rows in (1, 512):
                yield f"heads of {WIDE}, capped, {self.name}, cache {kind}, {rows} row{'s' * (rows > 1)} a sequence"
                q, given = empty(rows, 2 * KV_HEADS, WIDE, dtype=self.dtype), {"scale": 0.1, "window": 4096, "cap": 50.0}
                batch = step(1, rows, 8192)
                attention(q, self.cache(kind, WIDE), batch, **given, multiprocessors=self.card.multiprocessors)
        for kind in ("16 bits", "int8") if self.dtype == torch.bfloat16 else ():  # Gemma 4's; float32 elsewhere
            for rows in (1, 512):
                yield f"heads of {WIDEST}, {self.name}, cache {kind}, {rows} row{'s' * (rows > 1)} a sequence"
                q, batch = empty(rows, 8 * KV_HEADS, WIDEST, dtype=self.dtype), step(1, rows, 8192)
                attention(q, self.cache(kind, WIDEST), batch, scale=1.0, multiprocessors=self.card.multiprocessors)
        gated = weights.pack(weight(2 * INNER, HIDDEN, 4, 128), dtype=self.dtype, gated=True, gelu=True)
        for rows in (1, 2048):
            yield f"GELU and multiply, {self.name}, {rows} row{'s' * (rows > 1)}"
            matmul.matmul(empty(rows, HIDDEN, dtype=self.dtype), gated, card=self.card)
        x, gain, parts = (
            empty(8, HIDDEN, dtype=self.dtype),
            empty(HIDDEN, dtype=self.dtype),
            empty(4, 8, HIDDEN, dtype=torch.float32),
        )
        yield f"{self.name}, normalized before it is added"
        norm.rms_norm_add(x, x, gain, eps=1e-6, offset=1.0)
        yield f"{self.name}, normalized before it is added, of 4 parts"
        norm.add_rms_norm(parts, x, gain, eps=1e-6, offset=1.0, post=gain)
        yield f"{self.name}, norms of heads of {WIDE} with an offset, of 4 parts"
        heads, sums = Norm(empty(WIDE, dtype=self.dtype), 1e-6, 1.0), empty(4, 8, 4 * KV_HEADS * WIDE, dtype=torch.float32)
        angles, batch, kept = empty(8192, WIDE, dtype=torch.float32), step(8, 1, 8192), self.cache("16 bits", WIDE)
        rope.rope_store_sums(sums, None, 2 * KV_HEADS, kept, batch, angles, dtype=self.dtype, q_norm=heads, k_norm=heads)

    def hybrid(self) -> Iterator[str]:
        """A layer of Qwen3.5-27B that keeps a state."""
        from kernels.triton.delta import delta

        keys, heads, size, taps = 16, 48, 128, 4
        channels, full = (2 * keys + heads) * size, {"dtype": torch.float32}
        rule = DeltaRule(
            keys, empty(taps, channels, **full), empty(heads, **full), empty(heads, **full), empty(size, **full), 1e-6
        )
        kept = StateCache(empty(8, taps - 1, channels, **full), empty(8, heads, size, size, **full))
        yield f"16 and 48 heads of 128, {self.name}"
        x, gates = empty(8, channels + heads * size, dtype=self.dtype), empty(8, 2 * heads, dtype=self.dtype)
        delta(x, gates, rule, kept, replace(step(8, 1, 8192), states=empty(8, dtype=torch.int32)))

    def rest(self) -> Iterator[str]:
        from kernels.triton import copy, sampling

        yield "all cuts"
        floats = [empty(8, dtype=torch.float32) for _ in range(3)]
        logits, draws = empty(8, VOCABULARY, dtype=torch.float32), empty(8, dtype=torch.float64)
        sampling.sample(logits, floats[0], empty(8, dtype=torch.int64), floats[1], floats[2], draws)
        yield "no cut"
        sampling.sample(logits, floats[0], None, None, None, draws)
        yield "8 pairs"
        table = copy.CacheTable.of([self.cache("16 bits")])
        copy.copy_blocks(table, empty(8, dtype=torch.int64), empty(8, dtype=torch.int64))


def record(target: int) -> list[Compilation]:
    """The launches of all cases, in this process, which is of no other use afterwards: a card is imitated from here on."""
    from kernels.triton import attention, experts, matmul, routing

    recorder = Recorder(target)
    JITFunction.run = lambda kernel, *args, **given: recorder.run(kernel, *args, **given)
    torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment, misc]
    for module in (attention, matmul, experts, routing):
        module.capability = lambda device: target  # type: ignore[attr-defined]
    card = matmul.Card(CARDS[target].multiprocessors, target)
    half, brain = Cases(torch.float16, card), Cases(torch.bfloat16, card)
    some = [half.products, half.experts, half.fp8, half.attention, half.small, half.hybrid, half.rest]
    more = [half.rounded, brain.products, brain.experts, brain.fp8, brain.attention, brain.gemma, brain.hybrid, brain.latents]
    for cases in [*some, *([half.gemma] if target < 80 else more)]:
        for title in cases():
            recorder.case = title
    return list(recorder.made.values())


if __name__ == "__main__":
    print(json.dumps([asdict(one) for target in sys.argv[1:] for one in record(int(target))]))
