"""Mixed precision: what rounding costs is foretold, bits go where they help most, and what was chosen fits, loads and is kept."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from appliance import cli
from appliance.config import EngineConfig
from appliance.memory.answers import Answers
from appliance.memory.study import Study
from appliance.quantize import job as job_module
from appliance.quantize.allot import Front, allot
from appliance.quantize.calibration import calibration_ids
from appliance.quantize.fit import Place
from appliance.quantize.job import Job
from appliance.quantize.mixed import Mixer
from appliance.quantize.options import Options
from appliance.quantize.recipe import Recipe, units
from appliance.quantize.sensitivity import measure
from appliance.text.tokenizer import Tokenizer
from models.spec import ModelSpec
from quant.checkpoint import Checkpoint
from quant.errors import InputError
from quant.publish import config_section
from tests.quantizing import divergence, ids, logits, make


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random layers that add to what is there instead of drowning it, as those of trained models do; in float16."""
    directory = make(tmp_path_factory.mktemp("dense") / "model", dtype="float16")
    tensors = load_file(directory / "model.safetensors")
    for number, name in enumerate(name for name in sorted(tensors) if "o_proj" in name or "down_proj" in name):
        tensors[name] *= (0.02, 0.3, 0.1)[number % 3]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def options(**given: Any) -> Options:
    return Options(**{"method": "rtn", "group_size": 64, **given}).checked()


def made(source: Path, output: Path, choice: dict[str, str] | None = None, **given: Any) -> tuple[float, Job]:
    """(the divergence of a checkpoint made so, its job); ``choice``: instead of what would be chosen."""
    with torch.inference_mode():
        job = Job(source, output, options(**given), ids())
        if choice is not None:
            assert job.mixer is not None
            job.chosen, job.recipe = choice, job.mixer.recipe(choice)
        job.run()
    return divergence(output, source), job


@pytest.mark.parametrize("widths", [(4, 16), (4, 8, 16), (2, 3, 4, 8, 16)])
def test_no_other_choice_of_that_size_costs_less(widths: tuple[int, ...]) -> None:
    for seed in range(40):
        rng, units_ = random.Random(seed), [f"u{n}" for n in range(1 + seed % 5)]
        scale = {unit: rng.choice((7, 10, 33)) for unit in units_}
        sizes = {unit: {bits: bits * scale[unit] + rng.randint(0, 3) for bits in widths} for unit in units_}
        costs = {unit: {bits: 0.0 if bits == 16 else rng.random() * 4.0**-bits for bits in widths} for unit in units_}
        least = float("inf")
        for budget in sorted(rng.randint(0, 40 * 16 * len(units_)) for _ in range(5)):
            every = itertools.product(widths, repeat=len(units_))
            fits = [one for one in every if sum(sizes[unit][bits] for unit, bits in zip(units_, one, strict=True)) <= budget]
            found = allot(costs, sizes, budget)
            if not fits:
                assert found is None
                continue
            best = min(sum(costs[unit][bits] for unit, bits in zip(units_, one, strict=True)) for one in fits)
            assert found is not None and list(found) == units_
            cost = sum(costs[unit][bits] for unit, bits in found.items())
            assert sum(sizes[unit][bits] for unit, bits in found.items()) <= budget and cost == pytest.approx(best, abs=1e-12)
            assert cost <= least + 1e-12
            least = cost


def test_many_units_come_near_the_bound() -> None:
    """320 units of a model of 80 layers: within 1 % of what no choice can be below (Lagrange's bound)."""
    rng = random.Random(0)
    weights = {f"{n}{kind}": its for n in range(80) for kind, its in (("a", 25), ("h", 16), ("m", 117), ("i", 58))}
    sizes = {unit: {bits: its * bits + (its // 8 if bits < 16 else 0) for bits in (4, 8, 16)} for unit, its in weights.items()}
    costs = {unit: {4: (cost := rng.random() ** 2), 8: cost / 289, 16: 0.0} for unit in weights}
    budget = 5 * sum(weights.values())
    front = Front.of(costs, sizes)
    number = front.within(budget)
    assert number is not None

    def bound(price: float) -> float:
        return sum(min(costs[unit][bits] + price * sizes[unit][bits] for bits in (4, 8, 16)) for unit in weights) - price * budget

    assert front.costs[number] <= 1.01 * max(bound(10 ** (-n / 20)) for n in range(20, 140))


def foretold(
    source: Path, output: Path, tokens: torch.Tensor, held_out: torch.Tensor, bits: int
) -> tuple[list[float], list[float]]:
    """(costs, divergences) of every unit rounded alone."""
    with Checkpoint.open(source) as checkpoint:
        spec = ModelSpec.from_config(checkpoint.config)
    given = Options(method="rtn", bits=bits, group_size=32, sym=False, format="compressed-tensors").checked()
    grid, told = given.grid(torch.float16), list[float]()
    with torch.inference_mode():
        costs = measure(source, spec, tokens, {0: grid}, progress=told.append)
    assert told[0] == 0 and told[-1] == 1 and told == sorted(told)
    assert list(costs) == list(units(spec))
    expected, found = logits(source, held_out), []
    every = [module for modules in units(spec).values() for module in modules]
    for n, modules in enumerate(units(spec).values()):
        with torch.inference_mode():
            job = Job(source, output / str(n), given, None)
            job.recipe = Recipe(grid, {module: None for module in every if module not in modules})
            job.run()
        found.append(float((expected.exp() * (expected - logits(output / str(n), held_out))).sum(-1).mean()))
    return [cost[0] for cost in costs.values()], found


def ranks(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).argsort().argsort().float()


def test_costs_foretell_the_divergence(model: Path, tmp_path: Path) -> None:
    """Few inputs are large here, so that few errors decide: the order is right, and the whole."""
    costs, found = foretold(model, tmp_path, ids(samples=64), ids(seed=99, samples=24), bits=8)
    assert float(torch.corrcoef(torch.stack([ranks(costs), ranks(found)]))[0, 1]) > 0.9, (costs, found)
    ratios = sorted(cost / kl for cost, kl in zip(costs, found, strict=True))
    assert 0.6 < ratios[len(ratios) // 2] < 1.8, ratios


@pytest.mark.realdata
def test_costs_are_the_divergence_of_a_real_model(shared_data: Path, tmp_path: Path) -> None:
    source, text = shared_data / "models/TinyStories-656K", str(shared_data / "text/tinystories.txt")
    tokens, held_out = (
        calibration_ids(text, Tokenizer.load(source), samples=24, length=128, vocab=2048, seed=seed) for seed in (0, 77)
    )
    for cost, kl in zip(*foretold(source, tmp_path, tokens, held_out, bits=4), strict=True):
        assert cost == pytest.approx(kl, rel=0.2)


def test_bits_where_they_help_most(model: Path, tmp_path: Path) -> None:
    """Better than as many bits elsewhere, or everywhere; and more bits are better."""
    given: dict[str, Any] = {"format": "compressed-tensors", "sym": False}
    found = []
    for target in (4.4, 4.7, 5.5, 7.0):
        kl, job = made(model, tmp_path / f"{target}", target_bits=target, **given)
        assert job.mixer is not None and job.chosen is not None
        size = sum(job.mixer._stored(unit, job.mixer.names[name]) for unit, name in job.chosen.items())
        assert target - 0.35 < 8 * size / job.mixer.weights <= target
        found.append(kl)
    assert found == sorted(found, reverse=True), found
    uniform, _ = made(model, tmp_path / "uniform", group_size=32, **given)  # 4.625 bits
    assert found[1] < uniform
    assert job.mixer is not None
    names, units_ = list(job.mixer.names), list(job.mixer.units)
    rng, elsewhere = random.Random(0), []
    for n in range(3):  # of 5.5 bits, to which the target of 5.5 comes near
        choice = dict.fromkeys(units_, "4")
        for unit in rng.sample(units_, len(units_)):
            more = {**choice, unit: "8"}
            if 8 * sum(job.mixer._stored(one, job.mixer.names[name]) for one, name in more.items()) <= 5.5 * job.mixer.weights:
                choice = more
        elsewhere.append(made(model, tmp_path / f"else{n}", choice, target_bits=5.5, **given)[0])
    assert names == ["4", "4 g32", "8", "16"] and found[2] < min(elsewhere), (found, elsewhere)


@pytest.mark.parametrize("given", [{"method": "gptq"}, {"method": "awq"}, {"method": "awq", "format": "awq"}])
def test_what_was_made_is_served_and_gone_on_with(
    model: Path, tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Widths, groups and what stays as it is, through the engine; and an interrupted job measures nothing anew."""
    from appliance import LLM, SamplingParams

    class Stopped(Exception):
        pass

    def stop(done: float) -> None:
        if done >= 1:
            raise Stopped

    given = {"target_bits": 6.5 if given.get("format") == "awq" else 8.2, **given}
    _, job = made(model, tmp_path / "made", **given)
    assert job.chosen is not None and len(set(job.chosen.values())) > 1
    with torch.inference_mode():
        with pytest.raises(Stopped):
            Job(model, tmp_path / "parts", options(**given), ids()).run(stop)
        monkeypatch.setattr(job_module, "measure", None)
        Job(model, tmp_path / "parts", options(**given), ids()).run()
    names = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "parts").iterdir()) and "chosen.json" not in names
    for name in names:
        assert (tmp_path / "made" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    tokens = ids(seed=5, samples=1)
    llm = LLM(
        str(tmp_path / "made"),
        dtype="float32",
        reference_ops=True,
        kv_cache_memory_bytes=1 << 20,
        lm_head_dtype="model",
        threads=1,
    )
    (output,) = llm.generate([{"prompt_token_ids": tokens[0].tolist()}], SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert output.prompt_logprobs is not None
    found = [entry[token].logprob for token, entry in zip(tokens[0].tolist(), output.prompt_logprobs, strict=True) if entry]
    expected = logits(tmp_path / "made", tokens)[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]
    assert float((torch.tensor(found) - expected).abs().max()) < 0.1


def test_in_transformers(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", exc_type=ImportError)
    from transformers import AutoModelForCausalLM

    _, job = made(model, tmp_path / "made", method="gptq", format="compressed-tensors", target_bits=8.2)
    assert job.chosen is not None and len(set(job.chosen.values())) > 2
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)(ids()).logits.log_softmax(-1)
    assert torch.allclose(logits(tmp_path / "made", ids()), theirs, atol=0.05)


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 6, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize("given", [{"fit": "5.6GB"}, {"fit": "5.9GB", "sequences": 3, "kv_cache_dtype": "fp8", "method": "gptq"}])
def test_a_card_is_filled_and_no_more(given: dict[str, Any]) -> None:
    asked = options(**{"context": "16k", "group_size": 128, **given})
    spec = ModelSpec.from_config(LLAMA)

    def config(recipe: Recipe | None) -> dict[str, Any]:
        if recipe is None:
            return LLAMA
        section = config_section(str(asked.format), recipe.default, recipe.others, act_order=False, more=asked.told())
        return {**LLAMA, "quantization_config": section}

    mixer = Mixer(asked, spec, asked.grid(torch.bfloat16), config)
    assert list(mixer.names) == ["4", "4 g64", "4 g32", "8", "16"] and mixer.place is not None
    rng = random.Random(0)
    costs = {unit: {n: rng.random() * 4.0**-grid.bits for n, grid in mixer.grids.items()} for unit in mixer.units}
    choice = mixer.choose(costs)
    assert len(set(choice.values())) >= 3
    study = mixer.place.study(config(mixer.recipe(choice)))
    plan = mixer.place.plan(study)
    assert plan is not None and plan.total <= plan.budget and plan.sequences(16_000) >= asked.sequences
    assert Answers.of(study, [study.device], asked.sequences, 16_000).fits  # what `appliance plan` says
    weights = sum(size for name, size in plan.weights.items() if name in ("attention", "mlp"))
    assert weights == pytest.approx(
        sum(mixer.sizes[unit][list(mixer.names).index(name)] for unit, name in choice.items()), rel=1e-6
    )
    front = Front.of({unit: {**own, len(mixer.names) - 1: 0.0} for unit, own in costs.items()}, mixer.sizes)
    sizes = {name: n for n, name in enumerate(mixer.names)}
    number = front.within(sum(mixer.sizes[unit][sizes[name]] for unit, name in choice.items()))
    assert number is not None and mixer._choice(front, number) == choice
    assert mixer.place.plan(mixer.place.study(config(mixer.recipe(mixer._choice(front, number + 1))))) is None


def test_fit_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A card that is a little too small for the model: what is made for it fits by the plan command."""

    model = make(tmp_path / "model", hidden_size=256, intermediate_size=1024, num_hidden_layers=2)

    def fits(size: int) -> bool:
        place = Place.read(f"{size // 1024}K", "256", 1, "auto", 256)
        return place.plan(place.study(json.loads((model / "config.json").read_text()) | {"torch_dtype": "float16"})) is not None

    low, high = 1 << 29, 1 << 32
    while high - low > 4096:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    size = f"{(low - (1 << 20)) // 1024}K"
    text = tmp_path / "text.txt"
    text.write_text("it was a dark and stormy night " * 60)
    flags = ["--method", "rtn", "--group-size", "32", "--context", "256", "--calibration", str(text)]
    flags += ["--calibration-samples", "4", "--calibration-length", "64", "--threads", "1"]
    assert cli.run(["quantize", str(model), "--output", str(tmp_path / "made"), "--fit", size, *flags]) == 0
    out, _ = capsys.readouterr()
    assert "--fit:" in out and "bits a weight with scales" in out and "gate, up" in out and "mixed bits by rtn" in out
    wanted = Place.read(size, "256", 1, "auto", 256)
    study = Study.read(tmp_path / "made", replace(wanted.engine, model=str(tmp_path / "made")), wanted.device)
    assert Answers.of(study, [wanted.device], 1, 256).fits
    asked = ["--memory", size, "--device", "cuda", "--context", "256"]
    assert cli.run(["plan", str(tmp_path / "made"), *asked]) == 0
    assert cli.run(["plan", str(model), *asked]) == 1
    capsys.readouterr()
    assert cli.run(["quantize", str(model), "--output", str(tmp_path / "b"), "--fit", "24GB", *flags]) == 2
    assert "--fit '24GB': the model fits as it is" in capsys.readouterr().err
    assert cli.run(["quantize", str(model), "--output", str(tmp_path / "b"), "--fit", "700MB", *flags]) == 2
    assert "--fit '700MB': even at 4 bits the model does not fit" in capsys.readouterr().err
    assert not list(tmp_path.glob("b*"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"target_bits": 1.9}, "--target-bits is 1.9: at least 2, with scales, and less than 16"),
        ({"target_bits": 2.1}, r"--target-bits is 2.1: with --format compressed-tensors and --group-size 64 at least 2.25"),
        ({"target_bits": 16.0}, "less than 16 are needed"),
        ({"target_bits": 4.1, "format": "awq"}, r"at least 4.312 \(all at 4 bits, with scales\)"),
        ({"target_bits": float("nan")}, "--target-bits is nan"),
        ({"target_bits": 5.0, "bits": 8}, "--bits 8 is one width for all"),
        ({"target_bits": 5.0, "fit": "RTX 4090"}, "leave out one of the two"),
        ({"context": "8k"}, "--context says what has to fit"),
        ({"fit": "RTX 4900"}, r"--fit 'RTX 4900' is not in the table .*a size, as in 24GB"),
        ({"fit": "2x RTX 3090"}, "2 cards; models are served on one"),
        ({"fit": "RTX 4090", "context": "much"}, "--context is 'much'"),
        ({"fit": "RTX 4090", "context": "32k"}, "--context is 32000, but the model was made for at most 256"),
        ({"fit": "RTX 4090", "sequences": 0}, "--sequences is 0"),
        ({"fit": "RTX 4090", "kv_cache_dtype": "fp7"}, "--kv-cache-dtype is 'fp7'"),
    ],
)
def test_refusals(model: Path, tmp_path: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Job(model, tmp_path / "made", options(**given), ids())
    assert not list(tmp_path.iterdir())


def test_the_engine_of_a_place_has_the_defaults_of_serve() -> None:
    place = Place.read("RTX 4090", None, 1, "auto", 32768)
    assert place.context == 8192 and place.engine == EngineConfig(device="cuda")
