"""What a browser would read in a page, without one: tags, names, scripts, and the data that travels in it."""

import base64
import html.parser
import json
import zlib


class Page(html.parser.HTMLParser):
    """Collect tags, attributes, the names of rows, and the contents of scripts by their id ("" for the program)."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.names, self.scripts, self.texts = [], [], [], {}, []
        self._script = self._name = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self._script = dict(attrs).get("id", "")
            self.scripts[self._script] = ""
        if tag in ("th", "td"):
            self._name = ("scope", "row") in attrs
            if self._name:
                self.names.append("")

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None

    def handle_data(self, data):
        if self._script is not None:
            self.scripts[self._script] += data
            return
        self.texts.append(data)
        if self._name:
            self.names[-1] += data

    def data(self, name):
        """Return a document that travels in the page."""
        (value,) = unpacked(json.loads(zlib.decompress(base64.b64decode(self.scripts[name]))))
        return value


def unpacked(column):
    """Undo the columns of the module `packing`, as the script of the page does."""
    kind, *rest = column
    if kind == "number":
        return rest[0]
    if kind == "null":
        return [None] * rest[0]
    if kind == "empty":
        return [{} for _ in range(rest[0])]
    if kind == "flag":
        return [one == "1" for one in rest[0]]
    if kind == "text":
        return [rest[0][index] for index in rest[1]]
    if kind == "list":
        items = iter(unpacked(rest[1]))
        return [[next(items) for _ in range(length)] for length in rest[0]]
    if kind == "mixed":
        parts = [iter(unpacked(part)) for part in rest[0]]
        return [next(parts[part]) for part in rest[1]]
    keys, *columns = rest
    return [dict(zip(keys, row, strict=True)) for row in zip(*map(unpacked, columns), strict=True)]
