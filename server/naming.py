"""What adapters may be called, so that nobody takes one for another; how sources on the Hub are spelled; and how texts
of strangers are shown."""

import re
from collections.abc import Iterator

ADAPTER_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"
"""Names travel in URLs, metrics labels and `model` fields: ASCII word characters, dot, dash; 96 at most."""

HUB_ID_PATTERN = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
"""`org/name`. The Hub's own rules are narrower; its client checks the rest."""


def revision_apart(source: str, revision: str | None, pattern: str = HUB_ID_PATTERN) -> tuple[str, str | None]:
    """Source and revision, of which the source may name the second: `org/name@revision`.

    What does not begin with a Hub id and an `@` stays as it is. Raises ValueError for a revision that is empty, or not
    the one given apart.
    """
    name, at, named = source.partition("@")
    if not at or not re.fullmatch(pattern, name):
        return source, revision
    if not named:
        raise ValueError(f"the source {source[:200]!r} names no revision after its @")
    if revision not in (None, named):
        raise ValueError(f"the source names revision {named[:100]!r}, `revision` is {revision!r}; give one of them")
    return name, named


def are_confusable(name: str, other: str) -> bool:
    """Whether people, or tools that ignore case, could take one name for the other."""
    return any(mine == theirs for mine, theirs in zip(looks(name), looks(other), strict=True))


def looks(name: str) -> tuple[str, str]:
    """What tools that ignore case, and people, see of a name: names with either in common are confusable."""
    return _folded(name), _appearance(name)


def _folded(name: str) -> str:
    return name.lower().replace("_", "-")


def _appearance(name: str) -> str:
    """Equal for names that look alike in common fonts: capital I, l and 1; O and 0; underscore and dash."""
    return _folded(name.translate(str.maketrans("I10", "llo")))


def confusable_pairs(names: list[str]) -> Iterator[tuple[str, str]]:
    """Each name with the earlier ones that it could be taken for: one pair per name and kind of likeness."""
    seen: dict[tuple[int, str], str] = {}
    for name in names:
        earlier = {seen.setdefault((kind, look), name) for kind, look in enumerate(looks(name))}
        yield from ((other, name) for other in sorted(earlier - {name}))


def reserved_by(name: str, base_model_name: str) -> bool:
    """Whether an adapter's name could be taken for `auto`, `base` or the base model's, with or without organisation."""
    reserved = ("auto", "base", base_model_name, base_model_name.rpartition("/")[2])
    return any(are_confusable(name, other) for other in reserved)


def printable(text: str) -> str:
    """`text` with line breaks, terminal controls, direction marks and lone surrogates as escapes: names in a stranger's
    files end up in logs and on terminals."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
