"""Plans: defaults and order of runs, and every mistake named at once."""

import json
import re
from pathlib import Path

import pytest

from router_training.phrasings import Phrasing, read_phrasings
from router_training.study_plan import choose, read_plan
from router_training.study_state import same_settings
from server.errors import ConfigError

ROOT = Path(__file__).parents[2]

PLAN = """
defaults: {settings: {steps: 50, distil: 0.5}, evaluation: {rows: 20, gates: first seed}}
runs:
  - {name: long, section: main, settings: {steps: 200}, seeds: [3, 1], evaluation: {rows: 60, generate: 4}}
  - {name: short, section: ablation, note: why}
"""


def plan_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_first_seeds_of_all_runs_come_before_second_ones(tmp_path: Path) -> None:
    runs = read_plan(plan_file(tmp_path, PLAN))
    assert [(run.name, run.seed) for run in runs] == [("long", 3), ("short", 0), ("long", 1)]
    assert [run.is_first_seed for run in runs] == [True, True, False]


def test_a_runs_values_stand_over_the_defaults(tmp_path: Path) -> None:
    long, short, again = read_plan(plan_file(tmp_path, PLAN))
    assert (long.settings.steps, long.settings.distil, short.settings.steps) == (200, 0.5, 50)
    assert (long.evaluation.rows, short.evaluation.rows) == (60, 20)
    assert short.note == "why"
    assert again.settings == long.settings.model_copy(update={"seed": 1})


def test_what_is_for_the_first_seed_is_left_out_of_the_others(tmp_path: Path) -> None:
    long, _, again = read_plan(plan_file(tmp_path, PLAN))
    first, second = long.suite_options(tmp_path), again.suite_options(tmp_path)
    assert (first.gates, first.generated_rows, first.baselines) == (True, 4, False)
    assert (second.gates, second.generated_rows, second.baselines) == (False, 0, False)


def test_baselines_are_measured_on_a_set_of_their_own(tmp_path: Path) -> None:
    text = PLAN.replace("rows: 60,", "rows: 60, composites: 8, baselines: first seed, comparison_rows: 5,")
    long, short, again = read_plan(plan_file(tmp_path, text))
    assert (long.has_comparison, short.has_comparison, again.has_comparison) == (True, False, True)
    first, second = long.comparison_options(), again.comparison_options()
    assert (first.baselines, first.composites, long.comparison_rows) == (True, 8, 5)
    # The same chats for every seed, all policies for the first.
    assert (second.baselines, second.composites, again.comparison_rows) == (False, 8, 5)
    assert not long.suite_options().baselines


def test_a_file_of_phrasings_stands_beside_the_plan_and_is_read_with_it(tmp_path: Path) -> None:
    text = PLAN.replace("rows: 60,", "rows: 60, phrasings: more.yaml, baselines: first seed,")
    with pytest.raises(ConfigError, match=r"run 'long': .*more\.yaml: cannot be read"):
        read_plan(plan_file(tmp_path, text))
    (tmp_path / "more.yaml").write_text("sums: {read: ['(?P<text>.*)'], write: ['Add {text}']}", encoding="utf-8")
    long, short, again = read_plan(plan_file(tmp_path, text))
    for run in (long, again):
        for options in (run.suite_options(), run.comparison_options()):
            assert options.phrasings == {"sums": Phrasing((re.compile("(?P<text>.*)", re.DOTALL),), ("Add {text}",))}
    assert short.suite_options().phrasings is None


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("run: []", ["unknown key 'run'; did you mean 'runs'?", "runs: Field required"]),
        ("runs: []", ["runs: "]),
        ("runs: [{name: a, section: main, note: x, seed: 1}]", ["unknown key 'runs.0.seed'; did you mean 'seeds'?"]),
        ("defaults: {rows: 3}\nruns: [{name: a, section: main}]", ["unknown key 'defaults.rows'; there are"]),
        ("runs: [{name: A b, section: main}]", ["runs.0.name: "]),
        ("runs: [{name: a, section: mane}]", ["runs.0.section: "]),
        ("runs: [{name: a, section: main, seeds: []}]", ["runs.0.seeds: "]),
        (
            "runs: [{name: a, section: main, settings: {lambda: 0, step: 1, top_k: 0}, evaluation: {row: 1}}]",
            ["run 'a': unknown key 'row'; did you mean 'rows'?"],
        ),
        (
            "runs: [{name: a, section: main, settings: {lambda: 0, stps: 1, top_k: 0}}]",
            ["'lambda'; did you mean 'lambda_'?", "'stps'; did you mean 'steps'?", "run 'a': top_k: "],
        ),
        ("runs: [{name: a, section: main, settings: {seed: 1}}]", ["run 'a': give seeds as `seeds: [0, 1]`"]),
        ("runs: [{name: a, section: main, seeds: [1, 1]}]", ["run 'a': a seed is listed twice"]),
        ("runs: [{name: a, section: main}, {name: a, section: main}]", ["two runs are called 'a'"]),
        ("runs: [{name: a, name: b, section: main}]", ["the key 'name' appears twice"]),
        ("runs: [", ["is not valid YAML"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, problems: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_plan(plan_file(tmp_path, text))
    for problem in problems:
        assert problem in caught.value.message


def test_problems_of_several_runs_come_together(tmp_path: Path) -> None:
    text = "runs: [{name: a, section: main, settings: {sttps: 1}}, {name: b, section: main, settings: {steps: -1}}]"
    with pytest.raises(ConfigError, match=r"(?s)run 'a'.*run 'b': steps"):
        read_plan(plan_file(tmp_path, text))


def test_runs_are_chosen_by_name_and_a_typo_is_answered(tmp_path: Path) -> None:
    runs = read_plan(plan_file(tmp_path, PLAN))
    assert [run.title for run in choose(runs, ["long"])] == ["long, seed 3", "long, seed 1"]
    assert choose(runs, []) == runs
    with pytest.raises(ConfigError, match=r"no run 'lnog' in the plan; did you mean 'long'\?"):
        choose(runs, ["lnog"])


def test_the_demos_plan_is_valid_and_covers_the_study() -> None:
    runs = read_plan(ROOT / "examples/demo/study.yaml")
    assert [run.seed for run in runs if run.name == "winner"] == [0, 1, 2]
    demo = json.loads((ROOT / "examples/demo/router/router.json").read_text(encoding="utf-8"))["training"]
    assert same_settings(demo["settings"], runs[0].settings), "the first run is not the demo's router"
    assert runs[0].phrasings == read_phrasings(ROOT / "examples/demo/test_phrasings.yaml")
    curve = {(run.settings.samples, run.settings.lambda_ > 0) for run in runs if run.section == "curve"}
    assert curve == {(size, entropy) for size in (125, 250, 500, 1000, 2000, 4000) for entropy in (True, False)}
    for run in runs:
        if run.section == "curve":
            # One epoch: what the axis says is what was seen.
            assert run.settings.samples <= run.settings.steps * run.settings.batch_size < run.settings.samples + 8
