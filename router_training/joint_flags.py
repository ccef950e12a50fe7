"""`lora-mixer-train joint`: its flags to settings. The work is in `joint`."""

import argparse
import sys
from pathlib import Path

from router_training.flags import add_inputs, add_settings, config_from, settings_from
from router_training.joint_settings import JointConfig
from router_training.report import rendered

DEFAULTS = JointConfig()


def add_joint(parser: argparse.ArgumentParser) -> None:
    """All flags of the command; those of the router are those of `train`."""
    add_inputs(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for adapters, router, adapters.yaml, metrics"
    )
    # Absent where not given, so that a shape given for existing adapters is seen and refused.
    joint = parser.add_argument_group("adapters", argument_default=argparse.SUPPRESS)
    joint.add_argument(
        "--tasks",
        type=_names,
        metavar="NAME,...",
        help="adapters to train (default: all data folders, or with --start existing all routed adapters)",
    )
    joint.add_argument(
        "--start", choices=("fresh", "existing"), help=f"new adapters or the config's (default {DEFAULTS.start})"
    )
    joint.add_argument("--rank", type=int, help=f"rank of fresh adapters (default {DEFAULTS.rank})")
    joint.add_argument("--lora-alpha", type=int, help=f"scaling times rank (default {DEFAULTS.lora_alpha})")
    joint.add_argument(
        "--targets", type=_names, metavar="NAME,...", help=f"adapted projections (default {','.join(DEFAULTS.targets)})"
    )
    joint.add_argument(
        "--hard-steps", type=int, help=f"steps per adapter by itself, before the router (default {DEFAULTS.hard_steps})"
    )
    joint.add_argument(
        "--hard-lr",
        dest="hard_learning_rate",
        type=float,
        help=f"peak learning rate of the hard stage (default {DEFAULTS.hard_learning_rate:g})",
    )
    joint.add_argument(
        "--adapter-lr",
        dest="adapter_learning_rate",
        type=float,
        help=f"peak learning rate of the adapters in the soft stage (default {DEFAULTS.adapter_learning_rate:g})",
    )
    joint.add_argument("--beta", type=float, help=f"weight of the preservation penalty (default {DEFAULTS.beta:g})")
    joint.add_argument(
        "--constrained", type=_names, metavar="NAME,...", help="adapters under the preservation penalty (default: all)"
    )
    add_settings(parser)
    parser.set_defaults(action=_joint)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _joint(options: argparse.Namespace) -> int:
    from router_training.joint import train_joint
    from router_training.run import EVALUATION_NAME

    settings = settings_from(options, JointConfig)
    config = config_from(options)
    train_joint(config, options.data, options.out, settings, validation_rows=options.validation_rows)
    print(rendered(options.out / EVALUATION_NAME))
    print(f"Serve them with: lora-mixer serve --config {options.out / 'adapters.yaml'}", file=sys.stderr)
    return 0
