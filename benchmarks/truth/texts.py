"""Real text of four domains, from installed packages and the standard library: code, maths, chat, prose.

Passages of a domain never overlap, so that early and later batches share none.
"""

import importlib
import json
import random
from collections.abc import Callable, Iterator
from typing import Any, Final

from benchmarks.truth.materials import package_folder
from loka.workloads.transformer import stdlib_text

# Characters of a passage: at least 256 tokens in every domain, at 8 characters a token or fewer.
PASSAGE: Final[int] = 2048
_CODE_BYTES: Final[int] = 4_000_000


def _code() -> str:
    return stdlib_text(_CODE_BYTES).decode("utf-8", errors="ignore")


def _maths() -> str:
    """Problems, concepts and hints of CHAMP, with the solutions that people wrote."""
    data = json.loads((package_folder("champ_dataset") / "dataset_files" / "v0.json").read_text(encoding="utf-8"))
    parts = []
    for problem in data["problems"].values():
        steps = [step["_text"] for step in problem["solution"]["steps"]]
        parts.append("\n".join([problem["_text"], *steps]))
    parts += [entry["_text"] for kind in ("concepts", "hints") for entry in data[kind].values()]
    return "\n\n".join(parts)


def _chat() -> str:
    """Conversations between people, one message per line."""
    data: dict[str, Any] = json.loads((package_folder("chitchat_dataset") / "dataset.json").read_text(encoding="utf-8"))
    talks = list(data.values())[:1500]
    return "\n\n".join("\n".join(message["text"] for turn in talk["messages"] for message in turn) for talk in talks)


def _prose() -> str:
    """The language reference as pydoc prints it."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics.values())


DOMAINS: Final[dict[str, Callable[[], str]]] = {"code": _code, "maths": _maths, "chat": _chat, "prose": _prose}


def passages(domain: str) -> Iterator[str]:
    """Yield passages of PASSAGE characters in random order, the same order every time."""
    text = DOMAINS[domain]()
    order = list(range(len(text) // PASSAGE))
    random.Random(0).shuffle(order)
    for index in order:
        yield text[index * PASSAGE : (index + 1) * PASSAGE]
