"""Which projections an adapter's config adapts, with which rank and scaling: PEFT 0.21's rules, on module paths alone.

The rules stand in `peft/tuners/tuners_utils.py` (`check_target_module_exists`, `_maybe_include_all_linear_layers`) and
`peft/utils/other.py` (`get_pattern_key`); tests compare with both.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.adapters.pattern_table import PatternTable
from server.adapters.patterns import STEPS_PER_ADAPTER, STEPS_PER_NAME, Budget, Pattern, PatternBudgetError, suffixes
from server.adapters.peft_config import CONFIG_NAME, PeftConfig
from server.errors import RefusalReason

HEADS_AND_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "lm_head", "embed_out", "output")
"""What the output heads and token embeddings of causal language models are called."""


@dataclass(frozen=True)
class TargetSettings:
    """What the config says about one adapted projection."""

    rank: int
    scaling: float
    """Factor of B A: alpha / r, or alpha / sqrt(r) with rsLoRA."""


def match_targets(
    config: PeftConfig, projections: Sequence[str]
) -> tuple[dict[str, TargetSettings], list[RefusalReason]]:
    """Projection name -> settings for every projection that PEFT would adapt, and reasons to refuse the config."""
    matcher = _Matcher(config, Budget(min(STEPS_PER_NAME * len(projections), STEPS_PER_ADAPTER)))
    try:
        settings = {name: matcher.settings(name) for name in projections if matcher.is_target(name)}
    except PatternBudgetError as error:
        where = f"{CONFIG_NAME}: target_modules, exclude_modules, rank_pattern, alpha_pattern"
        return {}, [RefusalReason("pattern_too_complex", str(error), where)]
    reasons = _unknown_targets(config, projections, is_any_known=bool(settings))
    if not settings and not reasons:
        message = (
            "no projection of the base model is left after target_modules, exclude_modules and layers_to_transform"
        )
        reasons.append(RefusalReason("no_target_modules", message, f"{CONFIG_NAME}: target_modules"))
    return settings, reasons


class _Matcher:
    """The config with its lists made ready to be looked up in, and the pattern budget of this adapter."""

    def __init__(self, config: PeftConfig, budget: Budget) -> None:
        self._config = config
        self._budget = budget
        self._targets = _as_set(config.target_modules)
        self._excluded = _as_set(config.exclude_modules)
        self._ranks = PatternTable(config.rank_pattern)
        self._alphas = PatternTable(config.alpha_pattern)
        self._list_names = {name: place for place, name in reversed(list(enumerate(config.layers_pattern)))}

    def is_target(self, name: str) -> bool:
        """PEFT's `check_target_module_exists`: exclusion first; an exact name is not filtered by layer."""
        config = self._config
        if self._is_listed(config.exclude_modules, self._excluded, name):
            return False
        if config.targets_all_linear or name in self._targets:
            return True
        is_listed = self._is_listed(config.target_modules, self._targets, name)
        return is_listed and (isinstance(config.target_modules, Pattern) or self._is_in_layers(name))

    def settings(self, name: str) -> TargetSettings:
        """Rank and scaling; the first pattern that matches wins, as in PEFT's `get_pattern_key`."""
        rank = self._ranks.first(name, self._budget, self._config.rank)
        alpha = self._alphas.first(name, self._budget, self._config.alpha)
        divisor = math.sqrt(rank) if self._config.is_rank_stabilized else rank
        return TargetSettings(rank, alpha / divisor)

    def _is_listed(self, wanted: tuple[str, ...] | Pattern, names: frozenset[str], name: str) -> bool:
        if isinstance(wanted, Pattern):
            return wanted.fullmatch(name, self._budget)
        return not names.isdisjoint(suffixes(name))

    def _is_in_layers(self, name: str) -> bool:
        layers = self._config.layers_to_transform
        return layers is None or _layer_index(name, self._list_names) in layers


def _layer_index(name: str, list_names: Mapping[str, int]) -> int | None:
    r"""Index in the first numbered module list of a path, as PEFT reads it for `layers_to_transform`.

    Without list names it is PEFT's `.*?\.[^.]*\.(\d+)\.`: the first number that stands at least third and not last.
    With them it is the first number right after one of the names; those with a lower place win.
    """
    parts = name.split(".")
    if not list_names:
        return next((int(part) for part in parts[2:-1] if part.isdecimal()), None)
    numbered = [
        (list_names[parent], int(part))
        for parent, part in itertools.pairwise(parts[:-1])
        if parent in list_names and part.isdecimal()
    ]
    return min(numbered, key=lambda found: found[0])[1] if numbered else None


def _unknown_targets(config: PeftConfig, projections: Sequence[str], *, is_any_known: bool) -> list[RefusalReason]:
    """Listed names that are no projection here. PEFT skips them where another one is, and so do we: many lists are
    written for several architectures, and weights for such a name are refused where they are found. Heads and
    embeddings are not skipped: the base has them, under one name or another, and we do not adapt them."""
    if isinstance(config.target_modules, Pattern) or config.targets_all_linear:
        return []
    known = {suffix for name in projections for suffix in suffixes(name)}
    unknown = sorted(set(config.target_modules) - known)
    if is_any_known:
        unknown = [name for name in unknown if name.rpartition(".")[2] in HEADS_AND_EMBEDDINGS]
    if not unknown:
        return []
    leaves = ", ".join(sorted({name.rpartition(".")[2] for name in projections}))
    shown = ", ".join(repr(name[:100]) for name in unknown[:10]) + (" …" if len(unknown) > 10 else "")
    message = f"target_modules names {shown}, but the adaptable projections of the base model are {leaves}"
    return [RefusalReason("unknown_target_modules", message, f"{CONFIG_NAME}: target_modules")]


def _as_set(names: tuple[str, ...] | Pattern) -> frozenset[str]:
    return frozenset() if isinstance(names, Pattern) else frozenset(names)
