"""`lora-mixer-train study` and `study-report`: flags, what they print, and exit statuses. The work is in `study`."""

import argparse
import os
import sys
from pathlib import Path

from router_training.flags import add_sources, config_from

RECORD = Path("benchmarks/results/routing_study.json")
DOCUMENT = Path("docs/routing-study.md")
FIGURES = Path("docs/figures")


def add_study(parser: argparse.ArgumentParser) -> None:
    """All flags of the command."""
    add_sources(parser)
    parser.add_argument("--plan", type=Path, required=True, metavar="FILE", help="YAML list of runs (study_plan.py)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results of every run")
    parser.add_argument(
        "--only", type=_names, default=(), metavar="NAME,...", help="runs to do (default: all of the plan)"
    )
    parser.add_argument("--list", action="store_true", help="show what is done and what is missing; run nothing")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="collect the results there, after every run; a run that it has measured under the same settings, data, "
        "adapters and evaluation is finished, whatever --out holds (default: nowhere)",
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep finished measurements here (default: cells below --out)"
    )
    parser.add_argument(
        "--reuse",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="take the rows of this artefact for a run that it was trained by; repeatable (default: none)",
    )
    parser.set_defaults(action=_study)


def add_study_report(parser: argparse.ArgumentParser) -> None:
    """All flags of the command."""
    parser.add_argument(
        "--json", type=Path, default=RECORD, metavar="FILE", help=f"the study's record (default {RECORD})"
    )
    parser.add_argument("--document", type=Path, default=DOCUMENT, metavar="FILE", help=f"(default {DOCUMENT})")
    parser.add_argument("--figures", type=Path, default=FIGURES, metavar="DIR", help=f"folder (default {FIGURES})")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit status 1 if the record says otherwise (default off)"
    )
    parser.set_defaults(action=_study_report)


def _study_report(options: argparse.Namespace) -> int:
    from router_training.study_document import document, studied_run
    from router_training.study_figures import draw, outdated
    from router_training.study_results import read_results

    results = read_results(options.json)
    main = studied_run(results)
    text = document(results, os.path.relpath(options.figures, options.document.parent))
    if options.check:
        wrong = outdated(results, main, options.figures)
        if not options.document.exists() or options.document.read_text(encoding="utf-8") != text:
            wrong.append(options.document)
        for path in wrong:
            print(f"{path} is not what {options.json} says; run `make routing-study-report`", file=sys.stderr)
        return int(bool(wrong))
    draw(results, main, options.figures)
    options.document.parent.mkdir(parents=True, exist_ok=True)
    options.document.write_text(text, encoding="utf-8")
    return 0


def _study(options: argparse.Namespace) -> int:
    from router_training.study import Study
    from router_training.study_entries import Entries
    from router_training.study_plan import choose, read_plan
    from router_training.study_record import write_record
    from router_training.study_state import StudyInputs

    runs = read_plan(options.plan)
    chosen = choose(runs, options.only)
    Entries.read(options.json)  # A file that is no record is refused before anything is done.
    inputs = StudyInputs(config_from(options), options.data, runs)
    # The record covers the whole plan, whichever part of it this process does.
    whole = Study(inputs, runs, options.out, record=options.json)
    failed = []
    if not options.list:
        study = Study(inputs, chosen, options.out, cache=options.cache, reuse=options.reuse, record=options.json)
        failed = study.run(lambda: write_record(whole, inputs, options.json) if options.json else None)
    # Before collecting, which marks what is outdated.
    lines = [f"{run.title}: {whole.described(run)}" for run in chosen]
    if options.json:
        write_record(whole, inputs, options.json)
    for line in lines:
        print(line)
    if failed:
        print(f"{len(failed)} runs failed; see above, and repeat the command to try them again", file=sys.stderr)
    return int(bool(failed))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
