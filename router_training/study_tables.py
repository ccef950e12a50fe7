"""Tables of the study's report, as pure functions of its record. Every number is computed, none is typed."""

from collections.abc import Mapping, Sequence
from typing import Any

from router_training.report import markdown_table
from router_training.settings import BASE_NAME
from router_training.study_results import (
    NLL,
    ORACLE,
    OWN_SHARE,
    Results,
    Spread,
    composite,
    off,
    over_seeds,
    own_share,
    phrased,
    ratios,
    single,
)

TARGETS = {"single": 1.02, "phrased": 1.02, "composite": 1.03, "off_domain": 1.01}
"""Aims: ratio of mean NLLs to the oracle on single-task, phrased and composite chats, to the base model on off-domain
ones."""

TITLES = {
    "routed": "**the router**",
    "own_adapter": "own adapter (oracle)",
    "base": "base model",
    "uniform": "uniform mix",
    "arrow": "Arrow",
    "spectr": "SpectR",
    "seqr_norm": "SEQR norm",
    "lag": "LAG",
    "mean_activation": "mean activation",
    "ridge": "ridge regression",
    "lda": "LDA",
    "lora_soups": "LoRA Soups",
    "lorahub": "LoRAHub",
    "phatgoose": "PHATGOOSE",
    "per_request": "router, one adapter per request",
    "per_request_opening": "router, one adapter for the opening",
}
"""Policies and their names in the tables; further k of the router and single adapters are named by rule."""

ABSENT = "–"
Evaluations = Sequence[Mapping[str, Any]]


def title(policy: str) -> str:
    """Name of a policy for people."""
    if policy.startswith("routed_k"):
        return f"router served at k = {policy.removeprefix('routed_k')}"
    return TITLES.get(policy, f"{policy.removeprefix('only_')} alone" if policy.startswith("only_") else policy)


def policies_of(evaluations: Evaluations) -> list[str]:
    """Every policy that some seed has, best on single-task chats first."""
    found = {policy for evaluation in evaluations for policy in evaluation["policies"]}

    def mean(policy: str) -> float:
        value = over_seeds(evaluations, policy, single(policy, "mean_nll"))
        assert value is not None
        return value.mean

    return sorted(found, key=lambda policy: (mean(policy), policy))


def unmeasured(evaluations: Evaluations, adapters: Sequence[str]) -> list[str]:
    """Policies that the main table should have and does not."""
    wanted = [*TITLES, "routed_k1", "routed_k3", f"routed_k{len(adapters) + 1}"]
    wanted += [f"only_{name}" for name in adapters]
    found = policies_of(evaluations)
    return [policy for policy in wanted if policy not in found]


def main_table(evaluations: Evaluations) -> str:
    """Every policy on every set, best first, with its spread over seeds; unseen phrasings where they were measured."""
    header = ["policy", "mean NLL", "single: ratio of means", "mean of ratios"]
    header += ["unseen phrasings: ratio of means"] if has_phrased(evaluations) else []
    header += ["composite: ratio of means", "mean of ratios", "off-domain / base"]
    rows = []
    for policy in policies_of(evaluations):
        measures = [single(policy, part) for part in ("mean_nll", "of_means", "mean_of")]
        measures += [phrased(policy, "of_means")] if has_phrased(evaluations) else []
        measures += [composite(policy, part) for part in ("of_means", "mean_of")]
        rows.append(
            [
                title(policy),
                *(cell(over_seeds(evaluations, policy, measure)) for measure in [*measures, off(policy)]),
            ]
        )
    return markdown_table(header, rows)


def verdicts(evaluations: Evaluations, comparisons: Evaluations) -> str:
    """Each aim, what was measured, and whether it is met; whose NLL is lower is seen on the set for comparisons."""
    measured = {
        "single": over_seeds(evaluations, "routed", single("routed", "of_means")),
        "phrased": over_seeds(evaluations, "routed", phrased("routed", "of_means")),
        "composite": over_seeds(evaluations, "routed", composite("routed", "of_means")),
        "off_domain": over_seeds(evaluations, "routed", off("routed")),
    }
    texts = {
        "single": "single tasks: mean NLL over the oracle's",
        "phrased": "single tasks in unseen phrasings: mean NLL over the oracle's",
        "composite": "composite chats: mean NLL over the per-segment oracle's",
        "off_domain": "off-domain chats: NLL over the base model's",
    }
    rows = []
    for name, target in TARGETS.items():
        found = measured[name]
        if name == "phrased" and not has_phrased(evaluations):
            continue
        rows.append([texts[name], f"≤ {target}", cell(found), met(None if found is None else found.mean <= target)])
    rows += [_below("single tasks: below every baseline", comparisons, in_composites=False)]
    rows += [_below("composite chats: below every single adapter", comparisons, in_composites=True)]
    return markdown_table(["aim", "target", "measured", "met"], rows)


def baselines_of(evaluations: Evaluations) -> list[str]:
    """Policies that the router has to be better than, best first: all but the oracle and variants of the router that
    decide per token too. One adapter per request is a baseline, though it is the router that reads the prompt."""
    policies = policies_of(evaluations)
    return [p for p in policies if p not in (ORACLE, "per_request_opening") and not p.startswith("routed")]


def _below(text: str, evaluations: Evaluations, *, in_composites: bool) -> list[str]:
    """Whether the router's mean is below every baseline's, or on composites every single adapter's; who is lower."""
    measure = composite if in_composites else single
    router = over_seeds(evaluations, "routed", measure("routed", "mean_nll"))
    others = baselines_of(evaluations)
    if in_composites:
        others = [policy for policy in others if policy.startswith("only_")]
    found = {policy: over_seeds(evaluations, policy, measure(policy, "mean_nll")) for policy in others}
    present = {policy: value.mean for policy, value in found.items() if value is not None}
    if router is None or not present:
        return [text, "all", ABSENT, ABSENT]
    lower = [policy for policy, value in present.items() if value <= router.mean]
    named = f"not {', '.join(map(title, lower))}" if lower else f"{len(present)} of {len(present)}"
    return [text, "all", named, met(not lower)]


def task_table(evaluations: Evaluations) -> str:
    """NLL of the policies that matter and the router's ratio, by task; in unseen phrasings too where measured."""
    policies = [name for name in ("base", "uniform", ORACLE) if name in evaluations[0]["policies"]]
    header = ["task", "chats", *map(title, policies), "the router", "router / oracle"]
    header += [*(["in unseen phrasings"] if has_phrased(evaluations) else []), "own adapter's share"]
    rows = []
    for task, count in evaluations[0]["chats"].items():
        fixed = [f"{evaluations[0]['policies'][policy][task][NLL]:.3f}" for policy in policies]
        router = over_seeds(evaluations, "routed", lambda found, task=task: found["policies"]["routed"][task][NLL])  # type: ignore[misc]
        ratio = over_seeds(evaluations, "routed", lambda found, task=task: _ratio(found, task))  # type: ignore[misc]
        share = over_seeds(
            evaluations,
            "routed",
            lambda found, task=task: found["policies"]["routed"][task][OWN_SHARE],  # type: ignore[misc]
        )
        anew = over_seeds(evaluations, "routed", lambda found, task=task: _ratio(found.get("phrased"), task))  # type: ignore[misc]
        router_over_oracle = [cell(ratio), *([cell(anew)] if has_phrased(evaluations) else [])]
        rows.append([task, str(count), *fixed, cell(router), *router_over_oracle, cell(share)])
    return markdown_table(header, rows)


def has_phrased(evaluations: Evaluations) -> bool:
    """Whether unseen phrasings, which a plan may leave out, were measured."""
    return any("phrased" in evaluation for evaluation in evaluations)


def _ratio(found: Mapping[str, Any] | None, task: str) -> float | None:
    """The router's NLL over the oracle's on a set of chats; None where the task was not measured."""
    if found is None or task not in found["policies"][ORACLE]:
        return None
    policies = found["policies"]
    return float(policies["routed"][task][NLL] / policies[ORACLE][task][NLL])


def metrics_table(metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Accuracy and its kin of generated answers, by task and policy."""
    policies = list(metrics)
    rows = []
    for task, found in metrics[policies[0]].items():
        values = [f"{metrics[policy][task]['value']:.3f}" for policy in policies]
        rows.append([task, found["metric"], str(found["chats"]), *values])
    return markdown_table(["task", "metric", "chats", *map(title, policies)], rows, text_columns=2)


def settings_table(results: Results, names: Sequence[str]) -> str:
    """Settings that differ from the defaults in one of the runs."""
    by_name = {name: results.settings(name) for name in names}
    changed = {key for name in names for run in results.seeds(name) for key in run["settings"]}
    rows = [[f"`{key}`", *(shown(by_name[name][key]) for name in names)] for key in by_name[names[0]] if key in changed]
    return markdown_table(["setting", *names], rows)


def ablation_table(results: Results, names: Sequence[str]) -> str:
    """Every run beside the first, with what its settings change."""
    header = ["run", "changed", "single: ratio of means", "mean of ratios", "composite: ratio of means"]
    header += ["off-domain / base", "own adapter's share"]
    rows = []
    for name in names:
        evaluations = results.evaluations(name)
        measures = [single("routed", "of_means"), single("routed", "mean_of"), composite("routed", "of_means")]
        measures += [off("routed"), lambda found: own_share(found["policies"])]
        values = [cell(over_seeds(evaluations, "routed", measure)) for measure in measures]
        if not evaluations:
            values = [results.seeds(name)[0]["stage"], *([ABSENT] * 4)]
        rows.append([results.titled(name), difference(results, name, names[0]), *values])
    return markdown_table(header, rows, text_columns=2)


def difference(results: Results, name: str, reference: str) -> str:
    """Settings in which a run differs from the reference."""
    changed = [f"`{key}` {shown(value)}" for key, value in results.changed(name, reference).items()]
    return ", ".join(changed) or "(the reference)"


def usage_table(evaluations: Evaluations) -> str:
    """The same rows, used in other ways."""
    policies = [policy for policy in policies_of(evaluations) if policy.startswith(("routed", "per_request"))]
    rows = []
    for policy in policies:
        measures = [single(policy, "of_means"), single(policy, "mean_of"), composite(policy, "of_means"), off(policy)]
        rows.append([title(policy), *(cell(over_seeds(evaluations, policy, measure)) for measure in measures)])
    header = ["use", "single: ratio of means", "mean of ratios", "composite: ratio of means", "off-domain / base"]
    return markdown_table(header, rows)


def curve_points(results: Results) -> dict[int, dict[bool, str]]:
    """Samples -> with the entropy term or without -> name of the run."""
    points: dict[int, dict[bool, str]] = {}
    for name in results.names("curve"):
        settings = results.settings(name)
        points.setdefault(settings["samples"], {})[settings["lambda_"] > 0] = name
    return dict(sorted(points.items()))


def curve_table(results: Results) -> str:
    """Ratio to the oracle by data size, with and without the entropy term."""
    rows = []
    for samples, names in curve_points(results).items():
        settings = results.settings(next(iter(names.values())))
        cells = [str(samples), str(settings["steps"]), str(min(samples, settings["steps"] * settings["batch_size"]))]
        for part in ("of_means", "mean_of"):
            for has_entropy in (True, False):
                name = names.get(has_entropy)
                evaluations = results.evaluations(name) if name else []
                value = over_seeds(evaluations, "routed", single("routed", part))
                cells.append("not run" if value is None else str(value))
        rows.append(cells)
    header = ["samples", "steps", "chats seen", "ratio of means, with", "without", "mean of ratios, with", "without"]
    return markdown_table(header, rows)


def cost_table(results: Results, names: Sequence[str]) -> str:
    """Seconds of training beside quality."""
    rows = []
    for name in names:
        for run in results.finished(name):
            facts, training = run["facts"], run["training"]
            start = facts.get("start_s")
            steps = training.get("steps_s")
            found = ratios(run["evaluation"]["policies"], "routed")
            rows.append(
                [
                    f"{results.titled(name)}, seed {run['seed']}",
                    ABSENT if start is None else f"{start:.0f}",
                    ABSENT if steps is None else f"{steps:.0f}",
                    shown(results.settings(name)["top_k"]),
                    f"{found.of_means:.3f}",
                ]
            )
    return markdown_table(["run", "warm start, s", "steps, s", "adapters kept", "ratio of means"], rows)


def cell(value: Spread | None) -> str:
    return ABSENT if value is None else str(value)


def met(is_met: bool | None) -> str:
    return ABSENT if is_met is None else "met" if is_met else "**missed**"


def shown(value: Any) -> str:
    """A setting's value as in a plan."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def short_tasks(results: Results, samples: int) -> list[str]:
    """Tasks with fewer training chats than their share of a mix of `samples`, so that the mix repeats some."""
    share = samples / len(results.adapters)
    data = results.record["data"]
    return [task for task in results.adapters if task != BASE_NAME and data[task]["train"] < share]
