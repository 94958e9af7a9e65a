"""What answers that follow a grammar take of the host's memory: reserved, for the first comes after "ready". No torch.

With it the engine reads the tokenizer and builds the grammar library's vocabulary (appliance/runtime/grammar.py): for 152,000
tokens that takes a second of processor time, for 2,000 none that shows. Measured with tokenizers 0.23 and llguidance 1.9 as what
the process grows by, up to the first mask: 14 MiB for 2,048 tokens, 36 for 32,000 (Llama 2), 51 for 49,152 (SmolLM2), 120 for
151,936 (Qwen2). Beside what all have in common that is 735 to 804 bytes a token: its text and its merges in the tokenizer, its
bytes, and its place in the library's tree. A step's masks are a bit a token and row.
"""

from __future__ import annotations

from appliance.memory.devices import MIB

LIBRARIES = 16 * MIB
TOKEN = 832
KEPT = 64
"""Compiled grammars that are kept: appliance/text/grammar.py's number."""
GRAMMAR = 64 << 10
"""Bytes of one that is kept: 37 KiB in the mean of 267 JSON schemas (tests/schemas.py)."""
PLACE = 128 << 10
"""Bytes of a sequence's place in its grammar: 75 KiB in the mean of them, after 60 tokens each. A grammar that is made for it may
take more, up to what its limits allow (appliance/text/grammar.py): that is not reserved."""


def mask_bytes(vocab: int) -> int:
    """Of one sequence's mask: a bit a token, in whole words of 32."""
    return 4 * -(-vocab // 32)


def grammar_parts(vocab: int, sequences: int) -> dict[str, int]:
    """Bytes by part, where so many sequences may follow grammars at once."""
    return {
        "vocabulary": LIBRARIES + TOKEN * vocab,
        "compiled": KEPT * GRAMMAR,
        "masks and places": sequences * (mask_bytes(vocab) + PLACE),
    }
