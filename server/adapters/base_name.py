"""Whether two names of a base model mean the same model. Knows names only: equal shapes prove nothing.

SmolLM-135M and SmolLM2-135M have the same shapes; an adapter of one on the other loads without complaint and answers
nonsense, so the name that an adapter states is the only evidence, and it has to agree.
"""

import re

_SNAPSHOT = re.compile(r"(?:^|/)models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/[^/]+$")
"""A model inside huggingface_hub's cache: many adapters were trained from such a path."""

_HUB_URL = re.compile(r"^https?://(?:www\.)?(?:huggingface\.co|hf\.co)/")


def is_same_base(stated: str, served: str) -> bool:
    """Whether an adapter trained on `stated` belongs on the base model `served`.

    Case, surrounding slashes, Hub URLs and cache paths are normalised. Two Hub ids must agree in full. A local path,
    or a name without its organisation, has only its last part to compare.
    """
    stated_name, served_name = _normalised(stated), _normalised(served)
    if not stated_name or not served_name:
        return False
    if _is_hub_id(stated_name) and _is_hub_id(served_name):
        return stated_name == served_name
    return stated_name.rpartition("/")[2] == served_name.rpartition("/")[2]


def _normalised(name: str) -> str:
    name = _HUB_URL.sub("", name.strip().replace("\\", "/").rstrip("/").lower()).removesuffix(".git")
    if snapshot := _SNAPSHOT.search(name):
        return f"{snapshot['org']}/{snapshot['name']}"
    return name


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None
