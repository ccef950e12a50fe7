"""`lora-mixer-train train | joint | evaluate | ...`: the commands. The work is in `run`, `joint` and `report`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from router_training.answer_flags import add_answer
from router_training.flags import add_inputs, add_settings, add_sources, config_from, count, positive, settings_from
from router_training.joint_flags import add_joint
from router_training.report import comparison_table, evaluation_text, read_record, rendered
from router_training.settings import TrainingConfig
from router_training.study_flags import add_study, add_study_report
from server.errors import ConfigError, LoraMixerError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        status: int = options.action(options)
    except LoraMixerError as error:
        print(f"lora-mixer-train: {error.message}", file=sys.stderr)
        return 1
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"lora-mixer-train: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    return status


def build_parser() -> argparse.ArgumentParser:
    """All flags; each default is its settings' own."""
    parser = argparse.ArgumentParser(
        prog="lora-mixer-train", description="Train and evaluate the router over LoRA adapters (CPU)."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train a router and write its artefact folder")
    add_inputs(train)
    train.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for artefact, metrics, evaluation"
    )
    add_settings(train)
    train.set_defaults(action=_train)
    add_joint(commands.add_parser("joint", help="train adapters and router together; write PEFT adapters and artefact"))
    evaluate = commands.add_parser("evaluate", help="answer likelihood per task of base, own adapter, uniform, routed")
    add_inputs(evaluate)
    evaluate.add_argument("--router", type=Path, metavar="DIR", help="artefact folder (default: the config's router)")
    evaluate.add_argument("--out", type=Path, metavar="FILE", help="also write the record as JSON")
    evaluate.add_argument("--baselines", action="store_true", help="every baseline too (default off)")
    evaluate.add_argument(
        "--calibration-chats",
        type=int,
        default=16,
        metavar="N",
        help="training chats per task that --baselines fits those with something to fit on (default 16)",
    )
    evaluate.add_argument(
        "--phrasings",
        type=Path,
        metavar="FILE",
        help="the chats asked in other ways as a set of its own: YAML (phrasings.py) of phrasings that the router was "
        "not trained on (default: none)",
    )
    evaluate.add_argument(
        "--composites", type=count, default=0, metavar="N", help="chats that join two tasks (default 0: none)"
    )
    evaluate.add_argument(
        "--generate",
        type=count,
        default=0,
        metavar="N",
        help="chats per task with an answer generated and scored by the task's metric (default 0: none)",
    )
    evaluate.add_argument(
        "--max-new-tokens", type=positive, default=200, help="tokens of a generated answer (default 200)"
    )
    evaluate.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep finished measurements here and reuse them (default: none)"
    )
    evaluate.set_defaults(action=_evaluate)
    add_study(commands.add_parser("study", help="train and evaluate every run of a plan; go on where it was cut"))
    add_study_report(commands.add_parser("study-report", help="document and figures from a study's record"))
    background = commands.add_parser(
        "background", help="add the statistics that gate rows without retraining need to a router artefact"
    )
    add_sources(background)
    background.add_argument("--router", type=Path, metavar="DIR", help="artefact folder (default: the config's router)")
    background.set_defaults(action=_background)
    phrase = commands.add_parser("phrase", help="copy task folders with questions asked in other ways")
    phrase.add_argument("--phrasings", type=Path, required=True, metavar="FILE", help="YAML (phrasings.py)")
    phrase.add_argument(
        "--data", type=Path, action="append", required=True, metavar="DIR", help="one folder per task; repeatable"
    )
    phrase.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the copies")
    phrase.add_argument(
        "--split", choices=("train", "validation"), default="train", help="which chats to change (default train)"
    )
    phrase.add_argument(
        "--fraction", type=float, default=0.6, help="share of them that is asked anew, 0 to 1 (default 0.6)"
    )
    phrase.add_argument("--seed", type=int, default=0, help="of which ones and how (default 0)")
    phrase.set_defaults(action=_phrase)
    add_answer(commands.add_parser("answer", help="make off-domain chats: the base model's own answers to questions"))
    report = commands.add_parser("report", help="render evaluation records as Markdown")
    report.add_argument("records", type=Path, nargs="+", metavar="FILE", help="JSON written by train or evaluate")
    report.set_defaults(action=_report)
    return parser


def _train(options: argparse.Namespace) -> int:
    from router_training.run import EVALUATION_NAME, train

    settings = settings_from(options, TrainingConfig)
    train(config_from(options), options.data, options.out, settings, validation_rows=options.validation_rows)
    print(rendered(options.out / EVALUATION_NAME))
    print(f"The router artefact is in {options.out}.", file=sys.stderr)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from router_training.phrasings import read_phrasings
    from router_training.run import evaluate_folder, write_json
    from router_training.suite import SuiteOptions

    config = config_from(options)
    router = options.router or config.router_folder
    if router is None:
        raise ConfigError("the config names no router; pass --router DIR")
    suite = SuiteOptions(
        baselines=options.baselines,
        calibration_chats=options.calibration_chats,
        composites=options.composites,
        phrasings=None if options.phrasings is None else read_phrasings(options.phrasings),
        generated_rows=options.generate,
        max_new_tokens=options.max_new_tokens,
        cache=options.cache,
    )
    if options.calibration_chats < 1:
        raise ConfigError("--calibration-chats must be at least 1")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        if options.out.is_dir():
            raise ConfigError(f"--out {options.out} is a folder; name a file")
    record = evaluate_folder(config, options.data, router, suite, validation_rows=options.validation_rows)
    print(evaluation_text(record), flush=True)
    if options.out is not None:
        write_json(record, options.out)
    return 0


def _phrase(options: argparse.Namespace) -> int:
    from router_training.phrasings import phrase_data, read_phrasings

    if not 0 <= options.fraction <= 1:
        raise ConfigError("--fraction must be from 0 to 1")
    phrasings = read_phrasings(options.phrasings)
    counts = phrase_data(options.data, phrasings, options.out, {options.split}, options.fraction, options.seed)
    for task, (phrased, total) in counts.items():
        print(f"{task}: {phrased} of {total} {options.split} chats are asked anew")
    return 0


def _background(options: argparse.Namespace) -> int:
    from router_training.background import add_background
    from router_training.run import load_with_progress

    config = config_from(options)
    router = options.router or config.router_folder
    if router is None:
        raise ConfigError("the config names no router; pass --router DIR")
    add_background(config, options.data, router, load_with_progress)
    print(f"The router artefact in {router} has background statistics.", file=sys.stderr)
    return 0


def _report(options: argparse.Namespace) -> int:
    print("\n\n".join(rendered(path) for path in options.records))
    if len(options.records) > 1:
        print("\n" + comparison_table({str(path): read_record(path) for path in options.records}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
