"""What is written is what is read: by our own readers, by AutoAWQ's and compressed-tensors' own code, from the same numbers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quant.algorithms.grid import Grid, Quantized, round_to_nearest
from quant.checkpoint import Checkpoint
from quant.errors import InputError
from quant.publish import EMBEDDING, HEAD, check_shape, config_section, grid_for, pack_stream, tensors_of
from tests.quant.test_oracles import load, save
from tests.quant.writers import stream

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
           "mlp.down_proj")  # fmt: skip


def made(form: str, bits: int, group: int, symmetric: bool, N: int = 32, K: int = 128, *, act_order: bool = False) -> Quantized:
    torch.manual_seed(bits + group)
    weight = torch.randn(N, K) * torch.rand(N, 1)
    weight[3] = 0.0
    weight[5, :8] = weight[5, :8].abs()
    perm = torch.randperm(K) if act_order else None
    found = round_to_nearest(weight if perm is None else weight[:, perm], grid_for(form, bits, group, symmetric, torch.bfloat16))
    return found if perm is None else Quantized(found.codes, found.scales, found.zeros, found.grid, perm)


WIDTHS = [(4, 32, True, False), (4, 64, False, True), (8, -1, True, False), (3, 32, False, False), (4, -1, False, True)]
CASES = [
    ("awq", 4, 32, False, False),
    ("awq", 4, -1, True, False),
    *(("gptq", *one) for one in [*WIDTHS, (2, 32, True, False), (8, 32, False, True)]),
    *(("gptq_v2", *one) for one in [(4, 32, False, False), (3, 64, False, True), (8, -1, True, False)]),
    *(("compressed-tensors", *one) for one in [*WIDTHS, (4, -1, False, False), (8, 64, False, False)] if not one[-1]),
]


@pytest.mark.parametrize(("form", "bits", "group", "symmetric", "act_order"), CASES)
def test_our_own_readers(tmp_path: Path, form: str, bits: int, group: int, symmetric: bool, act_order: bool) -> None:
    weight = made(form, bits, group, symmetric, act_order=act_order)
    if form == "gptq_v2" and not symmetric:
        assert int(weight.zeros.min()) == 0  # which version 1 cannot say
    check_shape(form, "it", 32, 128, weight.grid)
    save(
        tmp_path, tensors_of(form, weight), config_section(form, weight.grid, {}, act_order=act_order, more={"made_by": "a test"})
    )
    assert torch.equal(load(tmp_path, (32, 128)).dequantize(), weight.dequantize())


def test_rounding_is_to_the_nearest() -> None:
    """No other code is nearer, and an error is at most half a step."""
    for symmetric in (True, False):
        weight = torch.randn(16, 96)
        found = round_to_nearest(weight, Grid(4, 32, symmetric))
        scales = found.scales.float().repeat_interleave(32, 0).t()
        assert bool(((found.dequantize() - weight).abs() <= scales * (0.5 if not symmetric else 0.501) + 1e-3).all())
        for step in (-1, 1):
            other = (found.codes.to(torch.int16) + step).clamp(0, 15)
            zeros = found.zeros.to(torch.int16).repeat_interleave(32, 0).t()
            assert bool((((other - zeros) * scales - weight).abs() >= (found.dequantize() - weight).abs() - 1e-6).all())


def test_autoawq_reads_it() -> None:
    packing = pytest.importorskip("awq.utils.packing_utils", exc_type=ImportError)
    weight = made("awq", 4, 32, False)
    tensors = tensors_of("awq", weight)
    expected = packing.dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"].float(), 4, 32)
    assert torch.equal(weight.dequantize(), expected.t())


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_reads_it(bits: int, symmetric: bool) -> None:
    library = pytest.importorskip("compressed_tensors.quantization", exc_type=ImportError)
    compressors = pytest.importorskip("compressed_tensors.compressors", exc_type=ImportError)
    if not hasattr(compressors.BaseCompressor, "decompress"):
        pytest.skip("this version of compressed-tensors has another interface")
    weight = made("compressed-tensors", bits, 32, symmetric)
    args = library.QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32)
    scheme = library.QuantizationScheme(targets=["Linear"], weights=args)
    packer = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    found = packer.decompress(tensors_of("compressed-tensors", weight), scheme)["weight"]
    assert torch.allclose(found.float(), weight.dequantize(), rtol=2**-7, atol=0)  # the library multiplies in bfloat16


@pytest.mark.parametrize("bits", range(2, 9))
def test_streams(bits: int) -> None:
    rng = np.random.default_rng(bits)
    values = rng.integers(0, 2**bits, (5, 37), dtype=np.uint8)
    assert np.array_equal(pack_stream(torch.from_numpy(values), bits).numpy(), stream(values, bits))


def test_refusals() -> None:
    for arguments, words in (
        (("marlin", 4, 32, True), "--format is 'marlin': one of awq, gptq, gptq_v2, compressed-tensors"),
        (("awq", 8, 32, True), "--bits is 8: the format awq has 4"),
        (("gptq", 5, 32, True), "the format gptq has 2, 3, 4, 8"),
        (("gptq", 4, 20, True), "--group-size is 20: a multiple of 8"),
        (("gptq", 4, 0, True), "--group-size is 0"),
    ):
        with pytest.raises(InputError, match=words):
            grid_for(*arguments, torch.float16)
    for form, bits, shape, words in (
        ("awq", 4, (12, 64), "12 outputs: the format awq needs a multiple of 8"),
        ("gptq", 3, (32, 48), "32 x 48: the format gptq needs multiples of 32 at 3 bits"),
        ("compressed-tensors", 4, (12, 72), "--group-size 16 does not divide the 72 inputs of it"),
    ):
        with pytest.raises(InputError, match=words):
            check_shape(form, "it", *shape, grid_for(form, bits, 16, True, torch.float16))


def mixed(form: str) -> tuple[Grid, dict[str, Grid | None]]:
    """4 bits; in layer 1 8 bits for what reads the first norm, in layer 11 smaller groups for down, and its gate and up kept."""
    grid = grid_for(form, 4, 32, True, torch.float16)
    others: dict[str, Grid | None] = {f"model.layers.1.self_attn.{name}_proj": replace(grid, bits=8) for name in "qkv"}
    others |= {f"model.layers.11.mlp.{name}_proj": None for name in ("gate", "up")}
    others["model.layers.11.mlp.down_proj"] = replace(grid, group_size=16)
    return grid, others


@pytest.mark.parametrize(("form", "head", "embedding"), [
    ("gptq", 8, None), ("gptq_v2", 4, None), ("compressed-tensors", 4, 8), ("compressed-tensors", 8, 4),
    ("compressed-tensors", None, 4), ("compressed-tensors", 4, None), ("gptq", None, None),
])  # fmt: skip
@pytest.mark.parametrize("vocab", [51, 64])
def test_heads_and_embeddings(tmp_path: Path, form: str, head: int | None, embedding: int | None, vocab: int) -> None:
    """What is written, and beside it what is not quantized, through our readers, in mixed widths; vocabularies of any size."""
    if form != "compressed-tensors" and vocab % 8:
        vocab = 72
    grid, others = mixed(form)
    if head is not None:
        others[HEAD] = replace(grid, bits=head)
    if embedding is not None:
        others[EMBEDDING] = replace(grid, bits=embedding, group_size=16)
    shapes = {HEAD: (vocab, 64), EMBEDDING: (vocab, 64)}
    shapes |= {f"model.layers.{n}.{name}": (32, 64) for n in (0, 1, 11) for name in MODULES}
    section = config_section(form, grid, others, act_order=False, more={})
    others = {HEAD: None, EMBEDDING: None, **others}
    tensors, expected = {}, {}
    for name, shape in shapes.items():
        own = others.get(name, grid)
        weight = torch.randn(*shape)
        if own is None:
            tensors[f"{name}.weight"] = expected[name] = weight
            continue
        found = round_to_nearest(weight, own)
        check_shape(form, name, *shape, own)
        tensors |= {f"{name}.{key}": tensor for key, tensor in tensors_of(form, found).items()}
        expected[name] = found.dequantize()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
    with Checkpoint.open(tmp_path) as checkpoint:
        for name, shape in shapes.items():
            weight = checkpoint.weight(name, expect=shape)
            assert isinstance(weight, Tensor) == (others.get(name, grid) is None)
            assert torch.equal(weight if isinstance(weight, Tensor) else weight.dequantize(), expected[name]), name
        assert not checkpoint.leftover()


class Parts(torch.nn.Module):
    """Modules by the names of a Llama, of 3 layers; ``fused`` as vLLM has them."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        names = (*MODULES, "self_attn.qkv_proj", "mlp.gate_up_proj") if fused else MODULES
        self.model, self.lm_head = torch.nn.Module(), torch.nn.Linear(64, 51, bias=False)
        self.model.embed_tokens, self.model.layers = torch.nn.Embedding(51, 64), torch.nn.Module()
        for number in (0, 1, 11):
            layer = torch.nn.Module()
            layer.self_attn, layer.mlp = torch.nn.Module(), torch.nn.Module()
            for name in names:
                setattr(getattr(layer, name.split(".")[0]), name.split(".")[1], torch.nn.Linear(64, 32, bias=False))
            setattr(self.model.layers, str(number), layer)


def test_compressed_tensors_matches_the_same_modules() -> None:
    """Its own matching of targets and its own decompression of every module, with a head and an embedding in codes."""
    library = pytest.importorskip("compressed_tensors.quantization", exc_type=ImportError)
    compressors = pytest.importorskip("compressed_tensors.compressors", exc_type=ImportError)
    if not hasattr(compressors.BaseCompressor, "decompress"):
        pytest.skip("this version of compressed-tensors has another interface")
    grid, others = mixed("compressed-tensors")
    others |= {HEAD: replace(grid, bits=8), EMBEDDING: replace(grid, bits=4, group_size=16)}
    section = config_section("compressed-tensors", grid, others, act_order=True, static_groups=True, kv_scales=True, more={})
    config = library.QuantizationConfig(**{key: value for key, value in section.items() if key != "quant_method"})
    kv = config.kv_cache_scheme
    assert (kv.num_bits, kv.type, kv.strategy, kv.symmetric, kv.dynamic) == (8, "float", "tensor", True, False)
    parts = Parts()
    library.apply_quantization_config(parts, config.model_copy(update={"kv_cache_scheme": None}), show_progress=False)
    packer = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    for name, module in parts.named_modules():
        if not isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            continue
        own, scheme = others.get(name, grid), getattr(module, "quantization_scheme", None)
        assert (scheme is None) == (own is None), name
        if own is not None:
            weights = scheme.weights
            assert (weights.num_bits, weights.group_size) == (own.bits, own.group_size), name
            assert (weights.actorder is not None) == (name != EMBEDDING)
            made = round_to_nearest(torch.randn(module.weight.shape), own)
            found = packer.decompress(tensors_of("compressed-tensors", made), scheme)["weight"]
            assert torch.allclose(found.float(), made.dequantize(), rtol=2**-10, atol=0)


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_fused_names_are_those_of_their_parts(form: str) -> None:
    """vLLM asks by the name of the fused module, with re.match, in the order of the file; GPTQModel by those of the parts."""
    grid, others = mixed(form)
    others[HEAD] = replace(grid, bits=8)
    section = config_section(form, grid, others, act_order=False, more={})
    rules: dict[str, tuple[int, int] | None]
    if form == "gptq":
        rules = {
            key[2:]: None if key[0] == "-" else (one.get("bits", 4), one.get("group_size", 32))
            for key, one in section["dynamic"].items()
        }
        assert section["lm_head"] is True and all(key[:2] in ("+:", "-:") for key in section["dynamic"])
    else:
        groups = list(section["config_groups"].values())
        rules = {
            target.removeprefix("re:"): (one["weights"]["num_bits"], one["weights"]["group_size"])
            for one in groups
            for target in one["targets"]
        }
        assert section["ignore"] == [f"model.layers.11.mlp.{name}_proj" for name in ("gate", "up")]  # parts are looked up there
    for name, module in Parts(fused=True).named_modules():
        if isinstance(module, torch.nn.Linear):
            part = name.replace("qkv_proj", "q_proj").replace("gate_up_proj", "up_proj")
            own = others.get(part, grid)
            hits = [rule for pattern, rule in rules.items() if re.match(pattern, name)]
            if own is None and form == "compressed-tensors":
                assert not hits
            else:
                expected = None if own is None else (own.bits, own.group_size)
                assert hits[:1] == ([expected] if expected != (4, 32) else []), name


def test_what_a_format_cannot_say() -> None:
    grid = grid_for("gptq", 4, 32, True, torch.float16)
    with pytest.raises(InputError, match="--embedding-bits: the format gptq has no quantized embeddings"):
        config_section("gptq", grid, {EMBEDDING: grid}, act_order=False, more={})
    for name, words in ((HEAD, "no quantized head"), ("model.layers.0.mlp.up_proj", "one width for all")):
        with pytest.raises(InputError, match=f"{name} has 8 bits: the format awq has {words}"):
            config_section("awq", grid, {name: replace(grid, bits=8)}, act_order=False, more={})


def test_order_of_activation() -> None:
    """Groups of neighbours are no desc_act; what has no groups needs no word of it."""
    grid = grid_for("gptq", 4, 32, True, torch.float16)
    for static, words in ((True, (False, True)), (False, (True, False))):
        section = config_section("gptq", grid, {}, act_order=True, static_groups=static, more={})
        assert (section["desc_act"], section["static_groups"]) == words
    whole = replace(grid, group_size=-1)
    for one, expected in ((grid, "static"), (whole, None)):
        section = config_section("compressed-tensors", one, {}, act_order=True, static_groups=True, more={})
        assert section["config_groups"]["group_0"]["weights"].get("actorder") == expected
