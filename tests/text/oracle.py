"""Asks transformers. Run as a script, in another folder than the repository's (there it would find our ``kernels`` package).

Reads a job from stdin, and writes the answer to it to stdout, both in JSON.
"""

import json
import sys


def tokenize(job):
    from transformers import AutoTokenizer

    out = []
    for one in job:
        tokenizer = AutoTokenizer.from_pretrained(one["directory"], local_files_only=True)
        out.append(
            {
                "encoded": [tokenizer.encode(t) for t in one["texts"]],
                "bare": [tokenizer.encode(t, add_special_tokens=False) for t in one["texts"]],
                "decoded": [tokenizer.decode(ids) for ids in one["ids"]],
                "visible": [tokenizer.decode(ids, skip_special_tokens=True) for ids in one["ids"]],
                "bos": tokenizer.bos_token_id,
                "eos": tokenizer.eos_token_id,
                "size": len(tokenizer),
                "specials": sorted(i for i, t in tokenizer.added_tokens_decoder.items() if t.special),
                "named": tokenizer.special_tokens_map,
            }
        )
    return out


def render(job):
    from transformers.utils.chat_template_utils import render_jinja_template

    out = []
    for one in job:
        try:
            out.append(render_jinja_template([one["messages"]], chat_template=one["template"], **one["options"])[0][0])
        except Exception as error:  # the comparison wants to know that it failed, whatever the reason
            out.append({"error": f"{type(error).__name__}: {error}"})
    return out


if __name__ == "__main__":
    request = json.load(sys.stdin)
    print(json.dumps({"tokenize": tokenize, "render": render}[request["what"]](request["job"])))
