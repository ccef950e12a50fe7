"""The study's report in Markdown, made from its record alone. A part without data says so in one line."""

from collections.abc import Mapping, Sequence
from typing import Any

from router_training.report import markdown_table
from router_training.settings import BASE_NAME
from router_training.study_figures import Draw, figures
from router_training.study_results import Results, losses_to, over_seeds, single
from router_training.study_tables import (
    ablation_table,
    baselines_of,
    cost_table,
    curve_points,
    curve_table,
    main_table,
    metrics_table,
    settings_table,
    short_tasks,
    task_table,
    title,
    unmeasured,
    usage_table,
    verdicts,
)

NOT_YET = "Not measured yet."

HEAD = """# Routing study: what the router is worth

Made by `make routing-study-report` from `benchmarks/results/routing_study.json`; no number here is typed by hand.
`make routing-study DATA=FOLDER` runs what is missing of the plan (`examples/demo/study.yaml`) and collects that file.
What the file has measured under the plan's present settings, data, adapters and evaluation is not run again, even in a
fresh checkout, and keeps its entry; to measure a run again, delete its entry there and its folder below `runs/study`.
Several processes may write it at once.

NLL is nats per answer token through the server's own routed path. The oracle runs a chat under its task's own adapter
at weight 1 (a composite chat segment by segment), which nobody can know before reading the prompt. *Ratio of means*
divides the mean NLL over tasks by the oracle's; *mean of ratios* averages the tasks' ratios, so that tasks with short,
easy answers weigh as much as others. ± is the sample standard deviation over seeds; figures without it are one run."""

FIGURE_TEXTS = {
    "study-layers.svg": "Mean gate weight of every choice by layer, per task",
    "study-composite.svg": "Gate share over token position on chats that join two tasks",
    "study-opening.svg": "Own adapter's share over the first tokens of a chat",
    "study-training.svg": "Balance and entropy over training",
    "study-data-size.svg": "Ratio to the oracle over data size, with and without the entropy term",
    "study-cost.svg": "Quality over seconds of training and over k",
}


def studied_run(results: Results) -> str | None:
    """The run that the report is about: of section `main` the first that has been measured."""
    return next((name for name in results.names("main") if results.finished(name)), None)


def document(results: Results, figure_folder: str) -> str:
    """The whole report; `figure_folder` is relative to it."""
    main = studied_run(results)
    evaluations = results.evaluations(main) if main else []
    comparisons = results.comparisons(main) if main else []
    drawn = figures(results, main)
    parts = [HEAD, _aims(results, main), _what_was_run(results)]
    parts += [_policies(results, comparisons), _tasks(evaluations)]
    parts += [_metrics(results, main), _ablations(results), _usage(comparisons)]
    parts += [_data_size(results, drawn, figure_folder), _gates(results, main, drawn, figure_folder)]
    parts += [_training(drawn, figure_folder), _cost(results, drawn, figure_folder), _missing(results)]
    parts.append(_outdated(results))
    return "\n\n".join(filter(None, parts)) + "\n"


def section(heading: str, *paragraphs: str) -> str:
    """A part of the report; without a paragraph it says that there is nothing yet."""
    return "\n\n".join([f"## {heading}", *(paragraphs or [NOT_YET])])


def _aims(results: Results, main: str | None) -> str:
    if main is None or not (evaluations := results.evaluations(main)):
        return section("Aims")
    paragraphs = [verdicts(evaluations, comparisons := results.comparisons(main)), _best_other(comparisons)]
    if (titled := results.titled(main)) != main:
        paragraphs.insert(0, f"Of `{titled}`: measured before its training, data or evaluation changed, and not since.")
    return section("Aims", *paragraphs)


def _best_other(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """One sentence: the best baseline beside the router."""
    others = baselines_of(evaluations)
    best = over_seeds(evaluations, others[0], single(others[0], "of_means"))
    router = over_seeds(evaluations, "routed", single("routed", "of_means"))
    return (
        f"On single tasks the best of the {len(others)} other policies measured is '{title(others[0])}', "
        f"{best} times the oracle's mean NLL; the router's is {router}."
    )


def _what_was_run(results: Results) -> str:
    record = results.record
    base, runs = record["base_model"], results.runs
    before = len(results.outdated())
    finished = sum("evaluation" in run for run in runs) - before
    counts = [f"{counts['train']} / {counts['validation']} {task}" for task, counts in record["data"].items()]
    lines = [
        f"{finished} of {len(runs)} runs (a run under one seed each) of the plan are measured"
        + (f", {before} more (†) on other data or by another evaluation than the plan's now." if before else "."),
        f"Base model {base['name']} in {base['dtype']}; adapters {', '.join(results.adapters)}; both frozen.",
        f"Chats, training / validation: {', '.join(counts)}.",
        *_machines(results),
    ]
    leading = [names[0] for part in ("main", "ablation", "curve") if (names := results.names(part))]
    seeds = [f"{name}: {', '.join(str(run['seed']) for run in results.seeds(name))}" for name in leading]
    text = f"Settings that differ from the defaults, of the first run of each part (seeds {'; '.join(seeds)}):"
    return section("What was run", "\n".join(f"- {line}" for line in lines), text, settings_table(results, leading))


def _machines(results: Results) -> list[str]:
    """One sentence per distinct machine and set of versions."""
    found: dict[str, None] = {}
    for run in results.runs:
        if "facts" in run:
            machine, versions = run["facts"]["machine"], run["facts"]["versions"]
            listed = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
            found[
                f"Trained on {machine['cpu_model']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
                f"{machine['system']}, threads in use: {run['facts']['threads']}; {listed}."
            ] = None
    return list(found)


def _policies(results: Results, evaluations: Sequence[Mapping[str, Any]]) -> str:
    if not evaluations:
        return section("Every policy")
    text = f"{_sizes(evaluations)}; ratios are to the oracle. Best on single tasks first."
    if "calibration" in evaluations[0]:
        count = evaluations[0]["calibration"]["chats_per_task"]
        text += f" Baselines with something to fit saw {count} training chats per task."
    absent = [title(policy) for policy in unmeasured(evaluations, results.adapters)]
    paragraphs = [text, main_table(evaluations)]
    if absent:
        paragraphs.append(f"Not measured yet: {', '.join(absent)}.")
    paragraphs.append("Which published system each row is: [routing-systems.md](routing-systems.md).")
    return section("Every policy", *paragraphs)


def _sizes(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Of the sets of chats."""
    chats = evaluations[0]["chats"]
    adapted = [count for task, count in chats.items() if task != BASE_NAME]
    sizes = f"{sum(adapted)} single-task chats of {len(adapted)} tasks"
    if "phrased" in evaluations[0]:
        count = sum(evaluations[0]["phrased"]["chats"].values())
        sizes += f", {count} of them also in unseen phrasings (templates of a file that no run was trained on)"
    if "composite" in evaluations[0]:
        sizes += f", {evaluations[0]['composite']['chats']} composite chats (two tasks in one conversation or answer)"
    if BASE_NAME in chats:
        sizes += f", {chats[BASE_NAME]} off-domain chats"
    return sizes


def _tasks(evaluations: Sequence[Mapping[str, Any]]) -> str:
    return section("By task", f"{_sizes(evaluations)}.", task_table(evaluations)) if evaluations else section("By task")


def _metrics(results: Results, main: str | None) -> str:
    metrics = results.first_with(main, "metrics") if main else None
    if metrics is None:
        return section("Task metrics of generated answers")
    text = "Greedy answers of the first seed's router; higher is better."
    return section("Task metrics of generated answers", text, metrics_table(metrics))


def _ablations(results: Results) -> str:
    names = results.names("ablation")
    if not any(results.finished(name) for name in names):
        return section("Ablations")
    notes = [[name, note] for name in names if (note := results.seeds(name)[0]["note"])]
    text = (
        f"All with the settings of `{names[0]}` above but for what is named. They compare with one another, not with "
        "the studied router, whose recipe is another."
    )
    if any(results.titled(name) != name for name in names):
        text += " † Measured before data or evaluation changed: compare them with one another only."
    paragraphs = [text, ablation_table(results, names)]
    if changes := _changes(results, names):
        paragraphs.append(changes)
    main = studied_run(results)
    found = over_seeds(results.evaluations(main), "routed", single("routed", "of_means")) if main else None
    if found is not None and found.count > 1:
        paragraphs.append(
            f"How much of a difference is chance: the studied router's ratio of means varies by {found.deviation:.3f} "
            f"over {found.count} seeds."
        )
    if notes:
        paragraphs.append(markdown_table(["run", "what it is"], notes, text_columns=2))
    return section("Ablations", *paragraphs)


def _changes(results: Results, names: Sequence[str]) -> str:
    """Which changes made single tasks better or worse than the reference, from the largest loss."""
    if not results.finished(names[0]):
        return f"`{names[0]}`, which the others are compared with, is not measured yet."
    found = losses_to(results, names[0], names[1:])
    listed = [f"`{name}` {found[name]:+.3f}" for name in sorted(found, key=lambda name: -found[name])]
    return f"Ratio of means less that of `{names[0]}`, worst first: {', '.join(listed)}." if listed else ""


def _usage(evaluations: Sequence[Mapping[str, Any]]) -> str:
    heading = "One router, other uses: k, and per request instead of per token"
    if not any(policy.startswith("per_request") for found in evaluations for policy in found["policies"]):
        return section(heading)
    text = (
        "The studied router's rows without further training. *Per request*: a first pass reads the prompt, and the "
        "adapter with the most gate weight takes the whole request, or only the tokens before the first user's words."
    )
    return section(heading, text, usage_table(evaluations))


def _data_size(results: Results, drawn: Mapping[str, Draw], folder: str) -> str:
    heading = "Data size, with and without the entropy term"
    if "study-data-size.svg" not in drawn:
        return section(heading)
    sizes = list(curve_points(results))
    settings = results.settings(results.names("curve")[0])
    text = (
        f"As the paper's Table 9: LM loss and RSL alone (η {settings['eta']:g}), warm start: {settings['warm_start']}, "
        f"chats cut to {settings['max_length']} tokens. Without the entropy term: λ = 0."
    )
    if repeated := short_tasks(results, sizes[-1]):
        text += (
            f" Tasks with fewer chats than their share of the largest mix, which repeats some: {', '.join(repeated)}."
        )
    return section(heading, text, curve_table(results), figure("study-data-size.svg", folder))


def _gates(results: Results, main: str | None, drawn: Mapping[str, Draw], folder: str) -> str:
    heading = "Where tokens go"
    if main is None or "study-layers.svg" not in drawn:
        return section(heading)
    gates = results.first_with(main, "gates")
    late = {task: shares[-1] for task, shares in gates["opening"].items() if task != BASE_NAME}
    first = {task: shares[0] for task, shares in gates["opening"].items() if task != BASE_NAME}
    last = min(len(shares) for shares in gates["opening"].values())
    mean_first, mean_late = (sum(shares.values()) / len(shares) for shares in (first, late))
    return section(
        heading,
        "Mean gate weight at answer positions by layer; a dark row has no gate or sends nothing there.",
        figure("study-layers.svg", folder),
        "Along two chats that join two tasks. The strip on top has the colour of the adapter that each token belongs "
        "to; black marks positions that predict an answer token.",
        figure("study-composite.svg", folder),
        f"From the first token on: the own adapter's share is {mean_first:.2f} at position 0 and {mean_late:.2f} where "
        f"the curves end (position {last - 1} or later), means over tasks. Before the prompt has said anything no "
        "router can know the task.",
        figure("study-opening.svg", folder),
    )


def _training(drawn: Mapping[str, Draw], folder: str) -> str:
    heading = "Balance and entropy over training"
    if "study-training.svg" not in drawn:
        return section(heading)
    text = "RSL's terms over the steps, whatever their weight in the loss; each point is a mean over some steps."
    return section(heading, text, figure("study-training.svg", folder))


def _cost(results: Results, drawn: Mapping[str, Draw], folder: str) -> str:
    heading = "Cost against quality"
    if "study-cost.svg" not in drawn:
        return section(heading)
    names = [*results.names("main"), *results.names("ablation")]
    text = (
        "Wall time, so it includes what else the machine did meanwhile; a warm start that several runs share is "
        "counted with each."
    )
    return section(heading, text, cost_table(results, names), figure("study-cost.svg", folder))


def _missing(results: Results) -> str:
    heading = "Not measured yet"
    missing = results.missing()
    if not missing:
        return section(heading, "Nothing: every run of the plan is measured.")
    rows = [[run["name"], str(run["seed"]), run["stage"], run.get("error", "").split("\n")[0]] for run in missing]
    return section(heading, markdown_table(["run", "seed", "stage", "error"], rows, text_columns=4))


def _outdated(results: Results) -> str:
    """Which measurements are not the plan's; nothing where all are."""
    if not (found := results.outdated()):
        return ""
    listed = ", ".join(f"{run['name']} (seed {run['seed']})" for run in found)
    text = (
        "Their training data, adapters or evaluation differ from the plan's now, and `make routing-study` measures "
        f"them again. Shown with † where there is nothing newer: {listed}."
    )
    return section("Measured before", text)


def figure(name: str, folder: str) -> str:
    return f"![{FIGURE_TEXTS[name]}]({folder}/{name})"
