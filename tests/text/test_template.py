"""Chat templates against transformers' renderer, and what wrong conversations are answered with."""

import json
import re
from functools import cache

import pytest

from appliance.core.params import RequestError
from appliance.text import template as module
from appliance.text.template import ChatTemplates
from appliance.text.tokenizer import Tokenizer
from quant.errors import InputError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER, ANSWER = {"role": "user", "content": "What is 2 < 3 & 'x'?"}, {"role": "assistant", "content": "Yes.\n  It is, größer."}
SYSTEM = {"role": "system", "content": "Be brief."}
PARTS = {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <now>",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "which"}},
            "required": ["city"],
        },
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}],
}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "sunny"}
CONVERSATIONS = {
    "one": ([USER], {}),
    "system": ([SYSTEM, USER, ANSWER, USER], {}),
    "system told by the user": ([{**USER, "content": f"Be brief.\n\n{USER['content']}"}, ANSWER, USER], {}),
    "thinking": ([USER, {**ANSWER, "reasoning_content": "Hm."}, USER], {"enable_thinking": False}),
    "tools": ([USER], {"tools": [WEATHER]}),
    "call": ([USER, CALL, RESULT], {"tools": [WEATHER]}),
    "call as text": (
        [USER, {**ANSWER, "content": '<|tool_call|>[{"name": "weather", "arguments": {"city": "Zürich"}}]'}, RESULT],
        {"tools": [WEATHER]},
    ),
    "call as Python": (
        [USER, {**ANSWER, "content": '<|tool_call_start|>[weather(city="Zürich")]<|tool_call_end|>'}, RESULT],
        {"tools": [WEATHER]},
    ),
    "no_prompt": ([USER, ANSWER], {"add_generation_prompt": False}),
    "continue": (
        [USER, {"role": "assistant", "content": "It is  "}],
        {"add_generation_prompt": False, "continue_final_message": True},
    ),
}


def chat(source, messages, /, **options):
    options = {"add_generation_prompt": True, "continue_final_message": False, "tools": None, "documents": None, **options}
    known = {k: options.pop(k) for k in ("add_generation_prompt", "continue_final_message", "tools", "documents")}
    templates = ChatTemplates(source, TOKENS) if isinstance(source, dict) else compiled(source)
    return templates.render(messages, extra=options, **known)


@cache
def compiled(source):
    """As a server has it: compiled once, for all its conversations."""
    return ChatTemplates({"default": source}, TOKENS)


@pytest.mark.realdata
def test_every_template_as_transformers(shared_data, ask):
    sources = {p.name: p.read_text() for p in sorted((shared_data / "tokenizers" / "chat_templates").glob("*.jinja"))}
    assert len(sources) >= 50
    cases = [(name, case) for name in sources for case in CONVERSATIONS]
    job = []
    for name, case in cases:
        messages, options = CONVERSATIONS[case]
        job.append(
            {"template": sources[name], "messages": messages, "options": {"add_generation_prompt": True, **TOKENS, **options}}
        )
    agreed, refused, wanted = 0, set(), dict(zip(cases, ask("render", job), strict=True))
    for (name, case), want in wanted.items():
        messages, options = CONVERSATIONS[case]
        if case == "system" and isinstance(want, dict) and "TemplateError" in want["error"]:
            refused.add(name)  # there is a way to tell it nevertheless
            want = wanted[name, "system told by the user"]
        if case == "call" and name.startswith("ibm-granite-granite-3"):  # which would leave it out
            want = wanted[name, "call as text"]
        if case == "call" and name.startswith("LFM2"):
            want = wanted[name, "call as Python"]
        try:
            got = chat(sources[name], messages, **options)
        except RequestError as error:
            assert isinstance(want, dict), (name, case, error)
            if "TemplateError" in want["error"]:  # the template's own refusal, word for word
                assert want["error"].split(": ", 1)[1] in str(error)
            continue
        if isinstance(want, dict) and "TypeError" in want["error"]:  # there is a way to tell it nevertheless
            assert case == "call" and 'weather\n{"city": "Zürich"}' in got, (name, case)
            continue
        assert got == want, (name, case)
        agreed += 1
    assert agreed > 0.8 * len(cases) and refused


def test_arguments_for_a_template_that_adds_them_to_its_text() -> None:
    """They are text there, as OpenAI sends them; what is wrong for another reason stays so."""
    call = "{{ c.function.name + '|' + c.function.arguments }}"
    source = "{% for m in messages %}{% for c in m.tool_calls %}" + call + "{% endfor %}{% endfor %}"
    assert chat(source, [USER, CALL, RESULT]) == 'weather|{"city": "Zürich"}'
    for messages in ([USER, CALL], [USER]):
        with pytest.raises(RequestError, match="can only concatenate str"):
            chat("{{ 'a' + messages }}", messages)


def test_a_system_for_a_template_that_takes_none() -> None:
    """Texts, parts, and what is refused for another reason: that is told as it is."""
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    texts, parts = (
        "{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}",
        "{% for m in messages %}{% for p in m.content %}",
    )
    found = chat(no_system + texts, [SYSTEM, {"role": "user", "content": "Hi"}])
    assert found == "[user: Be brief.\n\nHi]"
    found = chat(no_system + parts + "<{{ p.text }}>{% endfor %}{% endfor %}", [SYSTEM, PARTS])
    assert found == "<Be brief.><one><two>"
    for messages in ([SYSTEM], [SYSTEM, ANSWER]):
        with pytest.raises(RequestError, match="no system"):
            chat(no_system + texts, messages)
    with pytest.raises(RequestError, match="no system"):
        chat(no_system + "{{ raise_exception('nobody') }}", [SYSTEM, USER])


def test_turns_for_templates_that_want_one_of_each():
    """Neighbours of one role, and what the system says later: told otherwise where the template refuses them, and only there."""
    strict = (
        "{% for m in messages %}{% if not loop.first and m.role in ('system', loop.previtem.role) %}"
        "{{ raise_exception('one of each') }}{% endif %}[{{ m.role }}: {{ m.content }}]{% endfor %}"
    )
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    roles = ("system", "system", "user", "user", "assistant", "system", "user")
    turns = [{"role": role, "content": text} for role, text in zip(roles, "ABCDEFG")]
    rest = "[assistant: E][user: F\n\nG]"
    assert chat(strict, turns) == f"[system: A\n\nB][user: C\n\nD]{rest}"
    assert chat(no_system + strict, turns) == f"[user: A\n\nB\n\nC\n\nD]{rest}"
    free = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert chat(free, turns) == "ABCDEFG"
    first = "{% for m in messages %}{% if loop.first or m.role != 'system' %}{{ m.content }}|{% endif %}{% endfor %}"
    assert chat(first, turns) == "A\n\nB|C\n\nD|E|F\n\nG|"  # what it would leave out
    assert chat(first, turns[1:5]) == "B|C|D|E|"
    changed = "{% for m in messages %}{{ m.content | lower }}{% endfor %}"
    assert chat(changed, turns) == "abcdefg"
    parts = [{"role": "user", "content": [{"type": "text", "text": text}]} for text in "AB"]
    each = strict.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
    assert chat(each, parts) == "[user: AB]"
    with pytest.raises(RequestError, match="one of each"):
        chat(strict, [USER, ANSWER, ANSWER])


@pytest.mark.realdata
@pytest.mark.parametrize(
    "name",
    [
        "Mistral-Small-3.2-24B-Instruct-2506",
        "Qwen3.5-4B",
        "google-gemma-2-2b-it",
        "openai-gpt-oss-120b",
        "HuggingFaceTB-SmolLM3-3B",
    ],
)
def test_a_system_that_speaks_later_for_real_templates(shared_data, name):
    source = (shared_data / "tokenizers" / "chat_templates" / f"{name}.jinja").read_text()
    turns = [SYSTEM, {"role": "user", "content": "where I am"}, {"role": "system", "content": "Be kind."}, USER]
    found = chat(source, turns)
    places = [found.index(turn["content"]) for turn in turns]
    assert places == sorted(places)


def test_parts_become_what_the_template_knows():
    text = "{% for m in messages %}{{ m.content }};{% endfor %}"
    parts = "{% for m in messages %}{% for p in m['content'] %}[{{ p.text }}]{% endfor %};{% endfor %}"
    both = (
        "{% for m in messages %}{% set c = m.content %}{% if c is string %}{{ c }}{% else %}"
        "{% for p in c %}[{{ p.text }}]{% endfor %}{% endif %};{% endfor %}"
    )
    hello = {"role": "user", "content": "hello"}
    assert chat(text, [PARTS, hello]) == "one\ntwo;hello;"
    assert chat(parts, [PARTS, hello]) == "[one][two];[hello];"
    assert chat(both, [PARTS, hello]) == "[one][two];hello;"
    assert chat(text, [{"role": "user", "content": ["plain"]}, {"role": "user", "content": []}]) == "plain;;"


def test_tool_arguments_arrive_as_an_object():
    source = (
        "{% for c in messages[0].tool_calls %}{{ c.function.arguments.city }} {{ c.function.arguments | tojson }}{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": '{"city": "Zürich <1>"}'}}
    assert chat(source, [{"role": "assistant", "content": None, "tool_calls": [call]}]) == 'Zürich <1> {"city": "Zürich <1>"}'
    call = {"type": "function", "function": {"name": "f", "arguments": "{city}"}}
    with pytest.raises(RequestError, match=r"messages\[0\].tool_calls\[0\].function.arguments is not JSON"):
        chat(source, [{"role": "assistant", "tool_calls": [call]}])
    with pytest.raises(RequestError, match=r"messages\[0\].tool_calls must be a list, got str"):
        chat(source, [{"role": "assistant", "tool_calls": "f"}])


def test_calls_for_a_template_that_only_tells_how_they_are_written():
    """Granite 3's leaves those of earlier messages out: they are text there, as the model wrote them."""
    says = "{% if tools %}Answer with <|tool_call|> and a JSON list. {% endif %}"
    source = says + "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    functions = [{"name": "f", "arguments": '{"a": "ü"}'}, {"name": "g", "arguments": ""}]
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": f} for f in functions]},
        {"role": "tool", "content": "sunny"},
    ]
    wrote = '<|tool_call|>[{"name": "f", "arguments": {"a": "ü"}}, {"name": "g", "arguments": {}}]'
    assert chat(source, messages, add_generation_prompt=False, tools=[{}]).endswith(
        f"list. user: Hi\nassistant: {wrote}\ntool: sunny\n"
    )
    knows = source + "{# tool_calls #}"
    assert chat(knows, messages, add_generation_prompt=False, tools=[{}]).endswith("assistant: \ntool: sunny\n")


def test_the_callers_messages_stay_as_they_are():
    messages = [{"role": "user", "content": [{"type": "text", "text": "a "}]}]
    before = json.dumps(messages)
    source = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    assert chat(source, messages, add_generation_prompt=False, continue_final_message=True) == "a "
    assert json.dumps(messages) == before


def test_tool_use_template_is_chosen_for_tools():
    sources = {"default": "plain", "tool_use": "tools"}
    assert chat(sources, [USER]) == "plain" and chat(sources, [USER], tools=[WEATHER]) == "tools"
    assert chat({"other": "only"}, [USER]) == "only"
    with pytest.raises(RequestError, match=r"several chat templates \(a, b\) and none is the default"):
        chat({"a": "", "b": ""}, [USER])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a list of at least one message"),
        ("hi", "messages must be a list of at least one message"),
        ([{"content": "x"}], r"messages\[0\] must be an object with a 'role'"),
        ([USER, "hi"], r"messages\[1\] must be an object with a 'role'"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content must be text or a list of text parts, got int"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            r"messages\[0\].content\[0\] is of type 'image_url'",
        ),
        ([{"role": "user", "content": [7]}], r"messages\[0\].content\[0\] is of type 'int'"),
    ],
)
def test_wrong_messages_are_named(messages, message):
    with pytest.raises(RequestError, match=message):
        chat("{{ messages[0].content }}", messages)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "did not accept this conversation: Roles must alternate"),
        ("{{ messages[5].content.x }}", "did not accept this conversation: .*no element 5"),
        ("{{ 1 + 'a' }}", "did not accept this conversation: unsupported operand"),
        ("{{ messages.append(1) }}", "did not accept this conversation: .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "did not accept this conversation: .*unsafe"),
        ("{% if %}", r"the model's chat template is damaged \(line 1: .*give another one with --chat-template"),
    ],
)
def test_what_a_template_refuses_is_told(source, message):
    with pytest.raises(RequestError, match=message) as caught:
        chat(source, [USER])
    assert caught.value.status == 400 and caught.value.param == "messages"


def test_a_template_cannot_write_for_ever(monkeypatch):
    monkeypatch.setattr(module, "MAX_CHARACTERS", 1000)
    with pytest.raises(RequestError, match="it wrote more than 1000 characters"):
        chat("{% for i in range(99999) %}xxxxxxxxxx{% endfor %}", [USER])


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (
            "{{ 3 * 4 }} {{ 2 * 'ab' }} {{ [1] * 2 }} {{ 2 ** 10 }} {{ 4 ** 0.5 }} {{ 2 ** -99999999 }}",
            "12 abab [1, 1] 1024 2.0 0.0",
        ),
        ("{{ 2 ** (10 ** 9) }}", "a number of more than 65536 bits"),
        (
            "{% set n = namespace(x=9) %}{% for _ in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
            "a number of more than 65536 bits",
        ),
        ("{{ 'x' * 10 ** 10 }}", "a product of more than 33554432 characters"),
        ("{% set x = 99999 * range(99999) | list %}", "a product of more than 33554432 characters or elements"),
    ],
)
def test_no_product_takes_long(source: str, found: str) -> None:
    """Before the template is run as well: Jinja computes what has no variables when it compiles."""
    try:
        assert chat(source, [USER]) == found
    except RequestError as error:
        assert found in str(error)


def test_options_that_contradict():
    with pytest.raises(RequestError, match="set one to false"):
        chat("x", [USER], continue_final_message=True)
    with pytest.raises(RequestError, match="may not hold 'messages'"):
        chat("x", [USER], messages=[])
    options = {"add_generation_prompt": False, "continue_final_message": True}
    with pytest.raises(RequestError, match="leaves out the end of the last message"):
        chat("x", [USER], **options)
    with pytest.raises(RequestError, match="needs a last message with text"):
        chat("x", [{"role": "assistant", "content": ""}], **options)
    with pytest.raises(RequestError, match="needs a last message with text"):
        chat("x", [{"role": "assistant", "content": None}], **options)
    with pytest.raises(RequestError, match=r"messages\[0\].content must be text or a list of text parts, got nothing"):
        chat("x", [{"role": "user", "content": None}], **options)


def test_messages_as_clients_send_them_back():
    source = "{% for m in messages %}{{ m.role }}{{ m.keys() | sort | list }}{{ m.content }};{% endfor %}"
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    refused = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}], "tool_calls": None, "refusal": None}
    called = {"role": "assistant", "content": None, "tool_calls": [call], "audio": None}
    text = chat(source, [{"role": "developer", "content": "Hi"}, refused, {**ANSWER, "tool_calls": []}, called])
    first, second, third, fourth, _ = text.split(";")
    assert first == "system['content', 'role']Hi" and second == "assistant['content', 'role']No."
    assert third.startswith("assistant['content', 'role']Yes.") and fourth == "assistant['content', 'role', 'tool_calls']"


def test_jinja_extras():
    assert re.fullmatch(r"20\d\d", chat("{{ strftime_now('%Y') }}", [USER]))
    assert chat("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", [USER]) == "01"
    assert chat("{% generation %}{% set x = 1 %}a{% endgeneration %}{{ x }}", [USER]) == "a"
    assert chat("{{ bos_token }}{{ style }}{{ documents[0].text }}", [USER], style="!", documents=[{"text": "d"}]) == "<s>!d"


def test_where_templates_come_from(byte_level_dir, tmp_path):
    own = Tokenizer.load(byte_level_dir)
    assert own.has_chat_template
    assert own.chat([{"role": "user", "content": "Hi"}]) == "<|user|>Hi<|end|><|assistant|>"
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_text((byte_level_dir / name).read_text())
    bare = Tokenizer.load(tmp_path)
    assert not bare.has_chat_template
    with pytest.raises(RequestError, match=r"the model has no chat template: it needs one \(--chat-template FILE of the server"):
        bare.chat([USER])
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "beside pictures"}))
    assert Tokenizer.load(tmp_path).chat([USER]) == "beside pictures"
    entries = [{"name": "default", "template": "listed"}, {"name": "tool_use", "template": "listed tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entries}))
    assert Tokenizer.load(tmp_path).chat([USER], tools=[WEATHER]) == "listed tools"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.load(tmp_path).chat([USER], tools=[WEATHER]) == "from the file"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("file for tools")
    assert Tokenizer.load(tmp_path).chat([USER], tools=[WEATHER]) == "file for tools"
    assert Tokenizer.load(tmp_path).chat([USER]) == "from the file"


def test_what_templates_are_told_by_default(byte_level_dir):
    tokenizer = Tokenizer.load(byte_level_dir, "{{ mood }} {{ bos_token }}{{ messages[0].content }}", '{"mood": "high"}')
    usual, asked = tokenizer.chat([USER]), tokenizer.chat([USER], mood="low")
    assert usual.startswith("high ") and usual.endswith(USER["content"]) and asked == usual.replace("high", "low", 1)
    for given, message in (
        ("[1]", r"is '\[1\]': an object of the template's variables is needed"),
        ("{mood", "is '{mood': JSON is needed, as"),
        ('{"messages": []}', "may not hold 'messages': that is said by each request"),
    ):
        with pytest.raises(InputError, match=message):
            Tokenizer.load(byte_level_dir, None, given)


def test_a_template_of_ones_own(byte_level_dir, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("mine: {{ messages[0].content }}")
    assert Tokenizer.load(byte_level_dir, str(path)).chat([USER]) == "mine: " + USER["content"]
    assert Tokenizer.load(byte_level_dir, "{{ 'spelled out' }}").chat([USER]) == "spelled out"
    with pytest.raises(InputError, match=r"--chat-template .*none.jinja: cannot read this file"):
        Tokenizer.load(byte_level_dir, str(tmp_path / "none.jinja"))
    path.write_text("\n{% for %}")
    with pytest.raises(InputError, match=r"mine.jinja: line 2: not a Jinja template"):
        Tokenizer.load(byte_level_dir, str(path))
