"""A study's record as the report reads it: runs by section, ratios to the oracle, means and spreads over seeds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router_training.settings import BASE_NAME
from router_training.study_entries import OUTDATED, read_record

ORACLE = "own_adapter"
NLL, OWN_SHARE = 0, 1
"""Places in a measurement of the record."""

Policies = Mapping[str, Mapping[str, Sequence[float]]]
"""policy -> task -> [nats per answer token, own adapter's share, ...]."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds."""

    mean: float
    deviation: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.deviation:.3f}" if self.count > 1 else "")


@dataclass(frozen=True)
class Ratios:
    """One policy against another, over the tasks that have an adapter."""

    mean_nll: float
    of_means: float
    """Mean NLL over the other's: what the targets are set on. Tasks with long losses weigh more."""
    mean_of: float
    """Mean over tasks of the ratio: every task weighs the same."""


class Results:
    """The content of a record."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        self.runs: Sequence[Mapping[str, Any]] = record["runs"]
        self.adapters: Sequence[str] = record["adapters"]

    def names(self, section: str) -> list[str]:
        """Names of the section's runs in the plan's order."""
        return list(dict.fromkeys(run["name"] for run in self.runs if run["section"] == section))

    def seeds(self, name: str) -> list[Mapping[str, Any]]:
        """Every seed of a run."""
        return [run for run in self.runs if run["name"] == name]

    def finished(self, name: str) -> list[Mapping[str, Any]]:
        """The seeds of a run that have been measured: as planned now, or where none has, before."""
        found = [run for run in self.seeds(name) if "evaluation" in run]
        return [run for run in found if not is_outdated(run)] or found

    def titled(self, name: str) -> str:
        """The name of a run, marked where its measurements are outdated."""
        return f"{name} †" if any(map(is_outdated, self.finished(name))) else name

    def outdated(self) -> list[Mapping[str, Any]]:
        """Runs whose measurement is of other data, adapters or evaluation than the plan's."""
        return [run for run in self.runs if "evaluation" in run and is_outdated(run)]

    def evaluations(self, name: str) -> list[Mapping[str, Any]]:
        """Of the finished seeds."""
        return [run["evaluation"] for run in self.finished(name)]

    def comparisons(self, name: str) -> list[Mapping[str, Any]]:
        """What the finished seeds say about the baselines; the evaluations themselves where there is no such set."""
        found = [evaluation["comparison"] for evaluation in self.evaluations(name) if "comparison" in evaluation]
        return found or self.evaluations(name)

    def first_with(self, name: str, key: str) -> Any:
        """What the first finished seed that has it says under `key`; None if none has."""
        return next((found[key] for found in self.evaluations(name) if found.get(key)), None)

    def settings(self, name: str) -> dict[str, Any]:
        """Every setting of a run but the seed; the defaults as they were when the record was made."""
        settings = {**self.record["defaults"], **self.seeds(name)[0]["settings"]}
        del settings["seed"]
        return settings

    def changed(self, name: str, reference: str) -> dict[str, Any]:
        """Settings in which a run differs from another."""
        others = self.settings(reference)
        return {key: value for key, value in self.settings(name).items() if value != others[key]}

    def missing(self) -> list[Mapping[str, Any]]:
        """Runs that have not been measured."""
        return [run for run in self.runs if "evaluation" not in run]


def is_outdated(run: Mapping[str, Any]) -> bool:
    """Whether an entry's measurement is not of the plan any more."""
    return bool(run["stage"] == OUTDATED)


def read_results(path: Path) -> Results:
    """A file that `study --json` wrote. Raises ConfigError for anything else."""
    return Results(read_record(path))


def ratios(policies: Policies, policy: str, other: str = ORACLE) -> Ratios:
    """`policy` against `other` on one set of chats."""
    tasks = [task for task in policies[other] if task != BASE_NAME]
    pairs = [(policies[policy][task][NLL], policies[other][task][NLL]) for task in tasks]
    mean, others = (sum(values) / len(tasks) for values in zip(*pairs, strict=True))
    return Ratios(mean, mean / others, sum(nll / reference for nll, reference in pairs) / len(pairs))


def off_domain(policies: Policies, policy: str) -> float | None:
    """NLL on chats of no adapter over the base model's; None where there are none."""
    if BASE_NAME not in policies["base"]:
        return None
    return policies[policy][BASE_NAME][NLL] / policies["base"][BASE_NAME][NLL]


def own_share(policies: Policies, policy: str = "routed") -> float:
    """Mean gate weight of the own adapter at answer positions, over the tasks that have one."""
    shares = [found[OWN_SHARE] for task, found in policies[policy].items() if task != BASE_NAME]
    return sum(shares) / len(shares)


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1) if len(values) > 1 else 0.0
    return Spread(mean, math.sqrt(variance), len(values))


def over_seeds(
    evaluations: Sequence[Mapping[str, Any]], policy: str, measure: Callable[[Mapping[str, Any]], float | None]
) -> Spread | None:
    """`measure` of every evaluation that has the policy; None where none has, or none has the measure."""
    values = [measure(found) for found in evaluations if policy in found["policies"]]
    present = [value for value in values if value is not None]
    if not present:
        return None
    # What does not depend on the router is the same in every seed.
    return spread(present if depends_on_router(policy) else present[:1])


def depends_on_router(policy: str) -> bool:
    """Whether training decides a policy."""
    return policy.startswith(("routed", "per_request"))


def single(policy: str, part: str) -> Callable[[Mapping[str, Any]], float | None]:
    """Measure on single-task chats: `part` is a field of `Ratios`."""
    return lambda evaluation: getattr(ratios(evaluation["policies"], policy), part)


def composite(policy: str, part: str) -> Callable[[Mapping[str, Any]], float | None]:
    """As `single`, on chats that join two tasks."""
    return _of_set("composite", policy, part)


def phrased(policy: str, part: str) -> Callable[[Mapping[str, Any]], float | None]:
    """As `single`, on chats asked in phrasings that nothing was trained on."""
    return _of_set("phrased", policy, part)


def _of_set(name: str, policy: str, part: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda evaluation: (
        getattr(ratios(evaluation[name]["policies"], policy), part) if name in evaluation else None
    )


def off(policy: str) -> Callable[[Mapping[str, Any]], float | None]:
    """Measure on off-domain chats."""
    return lambda evaluation: off_domain(evaluation["policies"], policy)


def losses_to(results: Results, reference: str, names: Sequence[str]) -> dict[str, float]:
    """Ratio of means on single tasks less the reference's, of the runs that were measured on the same data as it."""
    means = {
        name: found.mean
        for name in [reference, *names]
        if (results.titled(name) != name) == (results.titled(reference) != reference)
        and (found := over_seeds(results.evaluations(name), "routed", single("routed", "of_means"))) is not None
    }
    return {name: value - means[reference] for name, value in means.items() if name != reference}
