"""JSON of long answers, encoded a piece at a time: the encoder keeps the interpreter for as long as one call takes,
0.1 s for 4 MB, and meanwhile no step begins and no other answer goes on.
"""

from collections.abc import Iterator

from server.api.errors import encode_json

MAX_ENTRIES = 64
"""Of a list that are encoded at once: tokens with twenty alternatives each are 100 KB then, some milliseconds."""


def encode_long(content: object) -> bytes:
    """What `encode_json` makes of it. Objects are walked through, and so are the entries of an iterator, each made when
    its turn comes; a list's entries are encoded some at a time, and are short.
    """
    return b"".join(_pieces(content))


def _pieces(content: object) -> Iterator[bytes]:
    if isinstance(content, dict):
        for index, (name, value) in enumerate(content.items()):
            yield (b"," if index else b"{") + encode_json(name) + b":"
            yield from _pieces(value)
        yield b"}" if content else b"{}"
    elif isinstance(content, Iterator):
        yield b"["
        for index, entry in enumerate(content):
            yield b"," if index else b""
            yield from _pieces(entry)
        yield b"]"
    elif isinstance(content, list) and len(content) > MAX_ENTRIES:
        for start in range(0, len(content), MAX_ENTRIES):
            yield (b"," if start else b"[") + encode_json(content[start : start + MAX_ENTRIES])[1:-1]
        yield b"]"
    else:
        yield encode_json(content)
