"""The formats' calls as a grammar has models write them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

from appliance.text.tools.formats import Apertus, Granite, Hermes, Hunyuan, Llama3Json, Mistral, Phi4Mini
from appliance.text.tools.gemma import FunctionGemma, Gemma4
from appliance.text.tools.marked import DeepSeekV3, DeepSeekV31, KimiK2, Marked, SolarOpen
from appliance.text.tools.parser import ToolParser
from appliance.text.tools.pythonic import Lfm2, Olmo3
from appliance.text.tools.tags import Glm, MiniMaxM2, Qwen3Coder, SeedOss, Tagging, in_tags


@dataclass(frozen=True)
class Form:
    """How a format writes calls: ``between`` stands between two, ``before`` and ``after`` around all of them."""

    opening: str  # of one call, with %s for its name; between two NULs a pattern of what the model chooses, a call's number
    closing: str
    between: str = ""
    before: str = ""
    after: str = ""
    as_json: bool = True  # the name stands in a JSON string
    tagged: Tagging | None = None  # the tags in which arguments stand; None: they are JSON

    def write(self, calls: Sequence[tuple[str, str]]) -> str:
        """The text of calls, each a name and its arguments (JSON text)."""
        some = (self.begin(name) + (in_tags(one, self.tagged) if self.tagged else one) + self.closing for name, one in calls)
        return numbered(self.before + self.between.join(some) + self.after)

    def begin(self, name: str) -> str:
        return self.opening % (json.dumps(name, ensure_ascii=False) if self.as_json else name)


def numbered(calls: str) -> str:
    """The text of calls, those numbered that have a number."""
    numbers = count()
    return re.sub("\0.*?\0", lambda _: str(next(numbers)), calls)


_HERMES = Form('<tool_call>\n{"name": %s, "arguments": ', "}\n</tool_call>", between="\n")
_LLAMA = Form('{"name": %s, "parameters": ', "}", between="; ")
_MISTRAL_LIST = Form('{"name": %s, "arguments": ', "}", between=", ", before="[TOOL_CALLS][", after="]")
_MISTRAL = Form("[TOOL_CALLS]%s[ARGS]", "", as_json=False)
_GRANITE = replace(_MISTRAL_LIST, before="<|tool_call|>[")
_HUNYUAN = replace(_MISTRAL_LIST, before="<tool_calls>[", after="]</tool_calls>")
_PHI = replace(_MISTRAL_LIST, before="functools[")
_APERTUS = Form("{%s: ", "}", between=", ", before="<|tools_prefix|>[", after="]<|tools_suffix|>")
_SEED = Form(
    "<seed:tool_call>\n<function=%s>\n", "</function>\n</seed:tool_call>", between="\n", as_json=False, tagged=SeedOss.tags
)
_QWEN = replace(_SEED, opening="<tool_call>\n<function=%s>\n", closing="</function>\n</tool_call>")
_MINIMAX = Form(
    '<invoke name="%s">\n', "</invoke>\n", before="<minimax:tool_call>\n", after="</minimax:tool_call>", as_json=False,
    tagged=MiniMaxM2.tags,
)  # fmt: skip
_OLMO = Form("%s(", ")", between="\n", before="<function_calls>", after="</function_calls>", as_json=False, tagged=Olmo3.tags)
_LFM = replace(_OLMO, between=", ", before="<|tool_call_start|>[", after="]<|tool_call_end|>")
_GLM = Form("<tool_call>%s\n", "</tool_call>", between="\n", as_json=False, tagged=Glm.tags)
_GEMMA = Form("<|tool_call>call:%s", "<tool_call|>", as_json=False)  # with arguments as JSON, which its parser reads too
_FUNCTION_GEMMA = replace(_GEMMA, opening="<start_function_call>call:%s", closing="<end_function_call>")
# Of gpt-oss, of which a grammar of its own makes use. An answer ends with its call.
HARMONY = Form(
    "<|channel|>commentary to=functions.%s <|constrain|>json<|message|>", "", between="<|call|><|start|>assistant", as_json=False
)


def _marked(kind: type[Marked], name: str = "%s", between: str = "") -> Form:
    """The form of a format with markers of its own, which may count its calls."""
    opening = kind.head.replace("{id}", _NUMBER).replace("{name}", name)
    return Form(opening, kind.end, between, before=kind.section, after=kind.close, as_json=False)


_NUMBER = "\0[0-9]{1,4}\0"
FORMS: dict[type[ToolParser], tuple[Form, ...]] = {
    Hermes: (_HERMES,),
    Llama3Json: (_LLAMA,),
    Mistral: (_MISTRAL, _MISTRAL_LIST),
    Granite: (_GRANITE,),
    SeedOss: (_SEED,),
    Glm: (_GLM,),
    Gemma4: (_GEMMA,),
    FunctionGemma: (_FUNCTION_GEMMA,),
    Qwen3Coder: (_QWEN,),
    MiniMaxM2: (_MINIMAX,),
    DeepSeekV3: (_marked(DeepSeekV3, between="\n"),),
    DeepSeekV31: (_marked(DeepSeekV31),),
    KimiK2: (_marked(KimiK2, f"functions.%s:{_NUMBER}"),),
    SolarOpen: (_marked(SolarOpen),),
    Hunyuan: (_HUNYUAN,),
    Phi4Mini: (_PHI,),
    Apertus: (_APERTUS,),
    Olmo3: (_OLMO,),
    Lfm2: (_LFM,),
}
