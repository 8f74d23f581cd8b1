"""Valid files made invalid, a little or a lot: by bytes, and by values and keys of a tree."""

import copy
import json
import random
from typing import Any

DEEP: Any = []
for _ in range(150):
    DEEP = [DEEP]
EXTREMES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53, 2**62),
    *(2**63 - 1, 2**63, 2**64, 2**127, 10**100, -(2**31), -(2**63), -(10**30)),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")),
    *("", " ", "\0", "a\0b", "../../x", "/etc/passwd", ".", "..", "x" * 3000, "\ud800"),
    "\U0010ffff",
    *("1", "nan", "null", "{}", "1e400", "a\nb", "\x1b[31m", "<<", "*a", "!!int", "%s%n", "$HOME"),
    *([], {}, [[]], [None], {"a": {}}, [1, 2, 3], ["", 0], {"": 0}, DEEP),
]  # fmt: skip


def spoilt_bytes(rng: random.Random, content: bytes) -> bytes:
    """Some bits flipped, bytes put in, taken out or doubled, or the end cut off."""
    out = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        at = rng.randrange(len(out) + 1)
        end = min(len(out), at + rng.choice([1, 1, 2, 8, 64]))
        kind = rng.randrange(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = rng.choice([0, 0x0A, 0x20, 0x22, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif kind == 2:
            out[at:at] = rng.randbytes(rng.choice([1, 1, 3, 20]))
        elif kind == 3:
            del out[at:end]
        elif kind == 4:
            out[at:at] = out[at:end] * rng.choice([1, 2, 30])
        elif kind == 5:
            out[at:at] = json.dumps(rng.choice(EXTREMES)).encode()
        elif rng.random() < 0.2:
            del out[at:]
    return bytes(out)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (list or mapping, index or key) in a tree."""
    found, left = [], [tree]
    while left:
        node = left.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            found.append((node, key))
            if isinstance(node[key], dict | list):
                left.append(node[key])
    return found


def spoilt_tree(rng: random.Random, tree: Any) -> Any:
    """A copy with some values exchanged for others or extremes, keys renamed, dropped, added."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        places = _places(tree)
        if not places:
            return copy.deepcopy(rng.choice(EXTREMES))
        node, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind <= 2:
            node[key] = copy.deepcopy(rng.choice(EXTREMES))  # it may be spoilt in its turn
        elif kind == 3:
            del node[key]
        elif kind == 4:
            other, from_ = rng.choice(places)
            if from_ in other if isinstance(other, dict) else from_ < len(other):
                node[key] = json.loads(json.dumps(other[from_]))
        elif kind == 5 and isinstance(node, dict):
            node[rng.choice([key + "x", key[:-1], key.upper(), "", "\0", "__class__"])] = node.pop(
                key
            )
        elif kind == 6 and isinstance(node, list):
            node[key:key] = copy.deepcopy(node[: rng.choice([1, 3])])
        elif isinstance(node[key], int | float) and not isinstance(node[key], bool):
            node[key] = rng.choice([-node[key], node[key] + 1, node[key] * 2, node[key] * 10**9])
    return tree


def text_of(rng: random.Random, tree: Any) -> bytes:
    """A tree as JSON; now and then with a key given twice, or spoilt bytes on top."""
    text = json.dumps(tree).encode()
    if rng.random() < 0.05 and text.startswith(b"{") and len(text) > 2:
        end = text.find(b",")
        text = text[:-1] + b", " + text[1 : end if end > 0 else -1] + b"}"
    return spoilt_bytes(rng, text) if rng.random() < 0.05 else text
