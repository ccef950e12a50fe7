r"""Syntax of the regular expressions that adapter configs may use: the part of Python's that has no memory.

Understood: literals, `.`, classes, `\d \w \s \b` and their negations, anchors, groups, alternatives, greedy and lazy
repeats, lookahead. Refused by name: backreferences, lookbehind, flags, conditionals, atomic groups, possessive repeats.
Greedy and lazy are one here, for only whether a name matches is asked, never what a group captured.
"""

from dataclasses import dataclass

MAX_PATTERN_CHARACTERS = 4096
"""Longest pattern read; the longest one seen in public adapters has about 400."""

MAX_DEPTH = 40
"""Deepest nesting of groups."""


class PatternSyntaxError(ValueError):
    """The pattern is malformed or uses something not supported; the message says what and where."""


@dataclass(frozen=True, eq=False)
class Literal:
    """The very characters."""

    text: str


@dataclass(frozen=True, eq=False)
class CharacterClass:
    """One character out of a set; `kinds` are the letters of `\\d`, `\\W` and so on, `.` is everything."""

    characters: frozenset[str]
    ranges: tuple[tuple[str, str], ...]
    kinds: frozenset[str]
    is_negated: bool

    def matches(self, character: str) -> bool:
        """Whether `character` is in the set."""
        found = (
            character in self.characters
            or any(low <= character <= high for low, high in self.ranges)
            or any(_is_kind(kind, character) for kind in self.kinds)
        )
        return found is not self.is_negated


@dataclass(frozen=True, eq=False)
class Assertion:
    """A place rather than a character: `start`, `end`, `boundary` or `inside` (no boundary)."""

    kind: str


@dataclass(frozen=True, eq=False)
class Lookahead:
    """What must (or must not) follow, without taking it."""

    child: "Node"
    is_wanted: bool


@dataclass(frozen=True, eq=False)
class Alternatives:
    """Any one of the children."""

    children: tuple["Node", ...]


@dataclass(frozen=True, eq=False)
class Group:
    """All children, one after the other."""

    children: tuple["Node", ...]


@dataclass(frozen=True, eq=False)
class Repeat:
    """`child` from `minimum` to `maximum` times; None is without end."""

    child: "Node"
    minimum: int
    maximum: int | None


Node = Literal | CharacterClass | Assertion | Lookahead | Alternatives | Group | Repeat


def parse(text: str) -> Node:
    """Syntax tree of a pattern. Raises PatternSyntaxError."""
    if len(text) > MAX_PATTERN_CHARACTERS:
        raise PatternSyntaxError(f"it has {len(text)} characters, more than {MAX_PATTERN_CHARACTERS}")
    parser = _Parser(text)
    node = parser.alternatives(depth=0)
    if parser.rest:
        raise parser.error("unbalanced parenthesis")
    return node


def is_word(character: str) -> bool:
    r"""Whether `\w` matches it."""
    return character.isalnum() or character == "_"


def _is_kind(kind: str, character: str) -> bool:
    if kind == ".":
        return character != "\n"
    tests = {"d": str.isdecimal, "w": is_word, "s": str.isspace}
    return tests[kind.lower()](character) is kind.islower()


_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
_ASSERTIONS = {"b": "boundary", "B": "inside", "A": "start", "Z": "end"}


class _Parser:
    """Recursive descent over one pattern; the grammar stands in the order of the methods."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    @property
    def rest(self) -> str:
        return self._text[self._at :]

    def error(self, problem: str) -> PatternSyntaxError:
        return PatternSyntaxError(f"{problem} at character {self._at}")

    def alternatives(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise self.error(f"groups nested deeper than {MAX_DEPTH}")
        branches = [self._sequence(depth)]
        while self._take("|"):
            branches.append(self._sequence(depth))
        return branches[0] if len(branches) == 1 else Alternatives(tuple(branches))

    def _sequence(self, depth: int) -> Node:
        items: list[Node] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            item = self._repeated(self._atom(depth))
            last = items[-1] if items else None
            if isinstance(item, Literal) and isinstance(last, Literal):
                items[-1] = Literal(last.text + item.text)
            else:
                items.append(item)
        return items[0] if len(items) == 1 else Group(tuple(items))

    def _atom(self, depth: int) -> Node:
        character = self._next()
        match character:
            case "(":
                return self._group(depth)
            case "[":
                return self._class()
            case ".":
                return CharacterClass(frozenset(), (), frozenset("."), False)
            case "^":
                return Assertion("start")
            case "$":
                return Assertion("end")
            case "*" | "+" | "?" | "{":
                self._at -= 1
                if self._bounds() is not None:
                    raise self.error("nothing to repeat")
                self._at += 1
            case "\\":
                return self._escape()
        return Literal(character)

    def _group(self, depth: int) -> Node:
        lookahead: bool | None = None
        if self._take("?="):
            lookahead = True
        elif self._take("?!"):
            lookahead = False
        elif self._take("?P<"):
            name, closing, _ = self.rest.partition(">")
            if not closing or not name.isidentifier():
                raise self.error("bad group name")
            self._at += len(name) + 1
        elif not self._take("?:") and self.rest.startswith("?"):
            raise self.error(f"group of kind '({self.rest[:3]}' is not supported")
        node = self.alternatives(depth + 1)
        if not self._take(")"):
            raise self.error("missing closing parenthesis")
        if lookahead is not None:
            return Lookahead(node, lookahead)
        return Group((node,))

    def _repeated(self, node: Node) -> Node:
        bounds = self._bounds()
        if bounds is None:
            return node
        if isinstance(node, Assertion):
            raise self.error("repeating an anchor is not supported")
        if self._take("+"):
            raise self.error("possessive repeats are not supported")
        self._take("?")
        if self._bounds() is not None:
            raise self.error("multiple repeat")
        return Repeat(node, *bounds)

    def _bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return bounds
        if not self._text.startswith("{", self._at):
            return None
        inner, closing, _ = self.rest[1:].partition("}")
        low, comma, high = inner.partition(",")
        is_repeat = closing and (low or comma) and all(not part or _is_digits(part) for part in (low, high))
        if not is_repeat:
            return None
        self._at += len(inner) + 2
        if max(len(low), len(high)) > 4:  # no module name has ten thousand characters
            raise self.error("repeat count is too large")
        minimum = int(low or 0)
        maximum = (int(high) if high else None) if comma else minimum
        if maximum is not None and maximum < minimum:
            raise self.error("repeat with its minimum above its maximum")
        return minimum, maximum

    def _escape(self) -> Node:
        character = self._next()
        if character in _ASSERTIONS:
            return Assertion(_ASSERTIONS[character])
        if character in "dDwWsS":
            return CharacterClass(frozenset(), (), frozenset(character), False)
        return Literal(self._escaped_literal(character))

    def _escaped_literal(self, character: str) -> str:
        if character in _ESCAPED:
            return _ESCAPED[character]
        if character.isascii() and character.isalnum():
            raise self.error(f"escape '\\{character}' is not supported")
        return character

    def _class(self) -> Node:
        is_negated = self._take("^")
        characters: set[str] = set()
        ranges: list[tuple[str, str]] = []
        kinds: set[str] = set()
        is_first = True
        while is_first or not self._take("]"):
            is_first = False
            low = self._class_item()
            if len(low) == 2:
                if self.rest.startswith("-") and not self.rest.startswith("-]"):
                    raise self.error("bad character range")
                kinds.add(low[1])
            elif self.rest.startswith("-") and not self.rest.startswith("-]"):
                self._at += 1
                high = self._class_item()
                if len(high) == 2 or high < low:
                    raise self.error("bad character range")
                ranges.append((low, high))
            else:
                characters.add(low)
        return CharacterClass(frozenset(characters), tuple(ranges), frozenset(kinds), is_negated)

    def _class_item(self) -> str:
        """One character of a class, or two for a kind such as `\\d`."""
        character = self._next()
        if character != "\\":
            return character
        escaped = self._next()
        if escaped == "b":
            return "\b"
        return "\\" + escaped if escaped in "dDwWsS" else self._escaped_literal(escaped)

    def _next(self) -> str:
        if self._at >= len(self._text):
            raise self.error("unexpected end")
        self._at += 1
        return self._text[self._at - 1]

    def _take(self, expected: str) -> bool:
        found = self._text.startswith(expected, self._at)
        if found:
            self._at += len(expected)
        return found


def _is_digits(text: str) -> bool:
    return text.isascii() and text.isdecimal()
