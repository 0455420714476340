"""What every HTML page of ours shares: templates that escape all they are given, files placed inline, and their hashes.

A page needs nothing but a browser. Its content security policy admits the scripts and styles of the page by their
hashes, and nothing else.
"""

import base64
import hashlib
from pathlib import Path
from typing import Final
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_REPORTS: Final[Path] = Path(__file__).parent
_FOLDERS: Final[tuple[Path, ...]] = (_REPORTS / "templates", _REPORTS / "page" / "templates")
# What `encodeURIComponent` leaves as it is, beside letters and digits.
_UNRESERVED: Final[str] = "-_.!~*'()"


def html_environment() -> Environment:
    """Return our templates, everything in them escaped."""
    return Environment(
        loader=FileSystemLoader(_FOLDERS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def inline(name: str) -> Markup:
    """Return a template file of ours to be placed in a page unescaped: there is no foreign text in it."""
    path = next(folder / name for folder in _FOLDERS if (folder / name).exists())
    return Markup(path.read_text(encoding="utf-8"))


def source_hash(text: str) -> str:
    """Return the source expression by which a content security policy admits an inline script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def fragment(site: str) -> str:
    """Return the fragment of the part of a page that is about a site: ASCII, without anything that HTML or a URL means.

    It is a valid `id` as well.
    """
    return f"site/{quote(site, safe=_UNRESERVED, errors='replace')}"
