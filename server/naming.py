"""What adapters may be called, so that nobody takes one for another, and how texts of strangers are shown."""

ADAPTER_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"
"""Names travel in URLs, metrics labels and `model` fields: ASCII word characters, dot, dash; 96 at most."""


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


def reserved_by(name: str, base_model_name: str) -> bool:
    """Whether an adapter's name could be taken for `auto`, `base` or the base model's, with or without organisation."""
    reserved = ("auto", "base", base_model_name, base_model_name.rpartition("/")[2])
    return any(are_confusable(name, other) for other in reserved)


def printable(text: str) -> str:
    """`text` with line breaks, terminal controls, direction marks and lone surrogates as escapes: names in a stranger's
    files end up in logs and on terminals."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
