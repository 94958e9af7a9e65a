"""What requests say of tools, what must-call means for a format, and which format a model's template writes."""

import json
import random

import jsonschema
import pytest

from appliance.core.params import RequestError, StructuredOutputsParams
from appliance.text.grammar import compile_grammar
from appliance.text.schema import constraining
from appliance.text.template import ChatTemplates
from appliance.text.tools.choice import forced, parameters, schema, tool_choice
from appliance.text.tools.detect import detect
from appliance.text.tools.formats import PARSERS
from appliance.text.tools.forms import FORMS, numbered
from appliance.text.tools.tags import in_tags

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
NAMED = {"type": "function", "function": {"name": "clock"}}


def test_modes():
    assert tool_choice(None, None).mode == tool_choice([], "auto").mode == tool_choice(TOOLS, "none").mode == "none"
    assert tool_choice(TOOLS, None).mode == tool_choice(TOOLS, "auto").mode == "auto"
    assert tool_choice(TOOLS, "required").mode == "required"
    named = tool_choice(TOOLS, NAMED)
    assert (named.mode, named.name, [one["name"] for one in named.functions]) == ("named", "clock", ["clock"])
    weather, clock = named.tools
    assert weather["function"] == {**WEATHER["function"], "description": ""}
    assert clock["function"] == {"name": "clock", "description": "", "parameters": {"type": "object", "properties": {}}}
    nulls = {**CLOCK, "function": {**CLOCK["function"], "description": None, "parameters": None, "strict": None}}
    assert tool_choice([nulls], None).tools == (clock,)
    assert named.parses and not tool_choice(TOOLS, "none").parses


@pytest.mark.parametrize(
    ("tools", "choice", "param", "says"),
    [
        ("f", None, "tools", "must be a list, got str"),
        ([3], None, "tools[0]", "got 3"),
        ([{"type": "function"}], None, "tools[0]", "must be"),
        ([{**WEATHER, "type": "web"}], None, "tools[0]", "must be"),
        ([{"type": "function", "function": {}}], None, "tools[0].function.name", "got None"),
        ([CLOCK, WEATHER, CLOCK], None, "tools[2].function.name", "two tools"),
        ([{"function": {"name": "f", "parameters": []}}], None, "tools[0].function.parameters", "JSON schema"),
        (TOOLS, "always", "tool_choice", "got 'always'"),
        (TOOLS, {"type": "function", "function": {"name": "f"}}, "tool_choice", "names 'f', tools are: clock, weather"),
        (TOOLS, {"type": "function"}, "tool_choice", "tool_choice is"),
        (TOOLS, 7, "tool_choice", "got 7"),
        (None, "required", "tool_choice", "needs tools"),
        ([], NAMED, "tool_choice", "needs tools"),
    ],
)
def test_refusals(tools, choice, param, says):
    with pytest.raises(RequestError) as caught:
        tool_choice(tools, choice)
    assert caught.value.param == param and says in str(caught.value)


@pytest.mark.parametrize(("kind", "form"), [(kind, form) for kind, forms in FORMS.items() for form in forms])
def test_what_is_forced_is_what_the_parser_reads(kind, form):
    """Whatever keeps to the alternatives and their schemas comes back as those calls."""
    values = {"weather": {"city": "Köln"}, "clock": {}}
    for choice, parallel, most in [("required", True, None), ("required", False, 1), (NAMED, True, 1)]:
        rule = forced(tool_choice(TOOLS, choice), form, parallel=parallel)
        assert rule.most == most and len(rule.alternatives) == (1 if choice is NAMED else 2)
        rng = random.Random(0)
        for _ in range(5):
            picked = [rng.choice(rule.alternatives) for _ in range(most or rng.randint(1, 3))]
            written, names = [], []
            for one in picked:
                name = next(name for name in values if name in one.begin)
                jsonschema.validate(values[name], one.schema)
                given = json.dumps(values[name])
                written.append(one.begin + (in_tags(given, form.tagged) if form.tagged else given) + one.end)
                names.append(name)
            answer = kind().parse(numbered(rule.before + rule.between.join(written) + rule.after))
            assert [(c.name, json.loads(c.arguments)) for c in answer.calls] == [(name, values[name]) for name in names]
            assert answer.content == ""


def test_one_schema_for_all_calls():
    checker = jsonschema.Draft202012Validator(schema(tool_choice(TOOLS, "required")))
    good = [{"name": "weather", "parameters": {"city": "Rome"}}, {"name": "clock", "parameters": {}}]
    assert checker.is_valid(good) and not checker.is_valid([])
    assert not checker.is_valid([{"name": "weather", "parameters": {}}]) and not checker.is_valid(
        [{"name": "f", "parameters": {}}]
    )
    assert not checker.is_valid([{"name": "clock", "parameters": {"city": "Rome"}}])
    one = jsonschema.Draft202012Validator(schema(tool_choice(TOOLS, NAMED)))
    assert one.is_valid(good[1:]) and not one.is_valid(good[:1]) and not one.is_valid(good[1:] * 2)


WRITES = {
    "hermes": (
        "Bielik-11B",
        "MiMo-VL",
        "NousResearch",
        "Qwen-QwQ",
        "Qwen-Qwen2.5",
        "Qwen-Qwen3-0.6B",
        "Reka-Edge",
        "ibm-granite-granite-4",
    ),
    "llama3_json": ("meta-llama",),
    "mistral": ("Mistral-Small", "mistralai", "unsloth-mistral"),
    "openai": ("openai-gpt-oss",),
    "granite": ("ibm-granite-granite-3",),
    "seed_oss": ("ByteDance-Seed-OSS",),
    "glm45": ("GLM-4",),
    "gemma4": ("google-gemma-4",),
    "qwen3_coder": ("Qwen3-Coder", "Qwen3.5", "NVIDIA-Nemotron-3", "StepFun3.5", "stepfun-ai-Step-3.5"),
    "minimax_m2": ("MiniMax-M2",),
    "kimi_k2": ("moonshotai-Kimi-K2",),
    "solar_open": ("upstage-Solar-Open",),
    "hunyuan_a13b": ("Apriel", "unsloth-Apriel"),
    "apertus": ("Apertus",),
    "lfm2": ("LFM2",),
}


@pytest.mark.realdata
def test_what_generators_write_into_schemas_and_rules_nothing_out():
    """As of zod, and of OpenAPI: left out, where a property is not only called so."""
    idle = {"propertyNames": {"type": "string"}, "uniqueItems": False, "unevaluatedProperties": True, "format": "binary"}
    given = {"properties": {"format": {"type": "string", "format": "email"}, "file": {"type": "string", **idle}}, **idle}
    kept = {"type": "object", "properties": {"format": {"type": "string", "format": "email"}, "file": {"type": "string"}}}
    assert parameters({"parameters": given}) == kept
    compile_grammar(StructuredOutputsParams(json=parameters({"parameters": given})))
    said = {"propertyNames": {"maxLength": 3}, "uniqueItems": True}
    assert parameters({"parameters": said}) == {"type": "object", **said}
    assert parameters({"parameters": {"format": ["odd"]}}) == {"type": "object"}


@pytest.mark.realdata
def test_what_rules_nothing_out_is_left_out_of_the_forms_of_answers_too():
    """As of zod, again, whose records have names of properties. Formats that nobody follows do say something."""
    idle = {"propertyNames": {"type": "string"}, "uniqueItems": False, "unevaluatedProperties": True}
    given = {"properties": {"uniqueItems": {"type": "integer", **idle}}, "required": ["uniqueItems"], **idle}
    plain = {"properties": {"uniqueItems": {"type": "integer"}}, "required": ["uniqueItems"]}
    assert constraining(given, formats=True) == plain
    assert compile_grammar(StructuredOutputsParams(json=given)) == compile_grammar(StructuredOutputsParams(json=plain))
    for said in ({"propertyNames": {"maxLength": 3}}, {"uniqueItems": True}, {"type": "string", "format": "binary"}):
        with pytest.raises(RequestError):
            compile_grammar(StructuredOutputsParams(json=said))


def test_the_format_of_real_templates(shared_data):
    """Those with another format are not taken for one of these (Qwen3-Coder's has the marker of Hermes), nor are those that
    write calls, and never tell of the tools (DeepSeek's own)."""
    seen = set()
    for path in sorted((shared_data / "tokenizers" / "chat_templates").glob("*.jinja")):
        expected = next((name for name, starts in WRITES.items() if path.name.startswith(starts)), None)
        chat = chat_of(path.read_text())
        assert detect(chat) == expected, path.name
        if expected:  # and it can be told of tools that say little
            chat([{"role": "user", "content": "Hi"}], add_generation_prompt=True, tools=list(tool_choice([CLOCK], None).tools))
        seen.add(expected)
    assert seen == {None, *WRITES} and set(WRITES) <= set(PARSERS)


def chat_of(source):
    templates = ChatTemplates({"default": source}, {"bos_token": "<s>", "eos_token": "</s>"})
    return lambda messages, **options: templates.render(
        messages, **{"continue_final_message": False, "documents": None, "extra": {}, **options}
    )


@pytest.mark.parametrize(("kind", "form"), [(kind, form) for kind, forms in FORMS.items() for form in forms])
@pytest.mark.parametrize("told", [True, False])
def test_a_format_is_known_by_what_a_template_writes(kind, form, told):
    def chat(messages, *, add_generation_prompt, tools):
        text = f"[system]{json.dumps(tools)}" if told else ""
        for one in messages:
            calls = [(call["function"]["name"], json.dumps(call["function"]["arguments"])) for call in one.get("tool_calls", ())]
            text += f"[{one['role']}]{one['content']}{form.write(calls) if calls else ''}[end]"
        return text + "[assistant]" * add_generation_prompt

    assert detect(chat) == (next(name for name, one in PARSERS.items() if one is kind) if told else None)


def test_templates_without_tools():
    assert detect(chat_of("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")) is None
    assert detect(chat_of("{{ raise_exception('no') }}")) is None
