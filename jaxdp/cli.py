"""The command line: `python -m jaxdp train | epsilon | calibrate`. Parsing and printing only."""

import argparse
import contextlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax

from jaxdp import accounting, distributed, training
from jaxdp.recipes import classify, data, models, report
from jaxdp.recipes.configuration import CLIP_NAMES, SCHEDULE_NAMES

_EXAMPLES = """\
examples:
  python -m jaxdp train
  python -m jaxdp train --model char-lstm
  python -m jaxdp train --devices 8
  python -m jaxdp train --coordinator host0:1234 --num-processes 2 --process-id 0
  python -m jaxdp train --model lipschitz-mlp --clip none
  python -m jaxdp train --data /usr/share/datasets/fashion-mnist --epsilon 2.7 --epochs 40
  python -m jaxdp epsilon --noise-multiplier 1.1 --sampling-rate 0.04 --steps 250
  python -m jaxdp calibrate --epsilon 3 --sampling-rate 0.04 --steps 250
"""

# Clip norm and learning rate where none is given: gradients that are clipped are far shorter.
_CLIPPED, _CLIPLESS = (0.1, 8.0), (None, 0.2)

# What input, the machine or another process may be the cause of. All else is a mistake of jaxdp,
# whose traceback should be reported.
_EXPECTED = (
    ValueError,
    TypeError,
    ArithmeticError,
    ImportError,
    OSError,
    MemoryError,
    RuntimeError,  # the compiler's and the device's errors, and `distributed.ProcessLost`
)

_Help = argparse.ArgumentDefaultsHelpFormatter


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence and exit code 2, without the usage that argparse prints before it."""
        if len(message) > 300:  # of a value that nobody wants to read again
            message = f"{message[:150]} … {message[-100:]}"
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      arguments: without the program's name; default `sys.argv[1:]`.

    Returns:
      The exit code: 0; or, after a line on stderr, 2 for what cannot be done, 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    _quieten()
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison]
        return _end(options, "error: standard output is closed. Send it to a file or a terminal")
    try:
        options.command(options)
        sys.stdout.flush()  # where nobody reads, or the disk is full, is noticed here
    except SystemExit:  # by Rich, where a pipe is broken
        return _end(options, "error: nobody reads standard output. Send it to a file or a terminal")
    except KeyboardInterrupt as error:
        return _end(options, "interrupted", _executed(error, options), code=130)
    except _EXPECTED as error:
        return _end(options, f"error: {error or type(error).__name__}", _executed(error, options))
    return 0


def _end(options: argparse.Namespace, *said: str, code: int = 2) -> int:
    """Says why a command has ended, on one line."""
    line = " ".join("; ".join(filter(None, said)).split())
    print(f"jaxdp {options.name}: {line}", file=sys.stderr)
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison]
        return code
    try:
        sys.stdout.flush()
    except OSError:  # Python would try again when it exits, and show a traceback
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _executed(error: BaseException, options: argparse.Namespace) -> str:
    """What a run that an exception has ended leaves: nothing of it is taken back."""
    run = training.run_of(error)
    if run is None:
        return ""
    epsilon = run.ledger.epsilon(options.delta, accountant=options.accountant)
    spent = f"{run.ledger.steps:,} steps are executed and spent, ε {report.rounded_up(epsilon, 3)}"
    spent += f" at δ {options.delta:g}"
    if options.checkpoints is None:
        return f"{spent}; without --checkpoints they cannot be resumed"
    return f"{spent}; start it again to resume from the newest checkpoint in {options.checkpoints}"


def _quieten() -> None:
    """Keeps what is printed to what was asked for, on any terminal."""
    # dp-accounting warns of every Rényi order that does not converge, one line each; Orbax shows
    # the traceback of every thread that found the disk full.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("jaxdp").setLevel(logging.INFO)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # not every terminal can show ε


def _train(options: argparse.Namespace) -> None:
    distributed.join(
        options.coordinator,
        num_processes=options.num_processes,
        process_id=options.process_id,
        devices=options.devices,
    )
    devices = options.devices
    if devices is None:
        devices = 1 if options.coordinator is None else jax.local_device_count()
    default = "names" if options.model in models.TEXT_MODELS else "mnist-sample"
    dataset = data.load(default if options.data is None else options.data)
    threshold, learning_rate = _CLIPLESS if options.clip == "none" else _CLIPPED
    config = classify.Config(
        model=options.model,
        epsilon=options.epsilon,
        delta=options.delta,
        epochs=options.epochs,
        batch_size=options.batch_size,
        clip=options.clip,
        threshold=threshold if options.threshold is None else options.threshold,
        learning_rate=learning_rate if options.learning_rate is None else options.learning_rate,
        schedule=options.schedule,
        momentum=options.momentum,
        accountant=options.accountant,
        microbatch_size=options.microbatch_size,
        seed=options.seed,
    )
    metrics, plot = options.out / "metrics.json", options.out / "training.png"
    if options.checkpoints is not None and options.checkpoints.absolute() == options.out.absolute():
        raise ValueError(
            f"--checkpoints must be a directory of its own, got that of --out, {options.out}. "
            "Choose another one."
        )
    report.check_outputs(metrics, plot)
    result = classify.train(
        config,
        dataset,
        log_fn=options.log,
        checkpoints=options.checkpoints,
        progress=not options.quiet,
        devices=devices,
    )
    if jax.process_index() > 0:
        return  # the first process writes and prints for all
    rows = report.summary(config, dataset, result)
    try:
        report.write_metrics(metrics, config, dataset, result)
        report.write_plot(plot, config, dataset, result)
        rows["written"] = f"{metrics}, {plot}"
    finally:  # a disk that has filled up takes the files, and not the result
        report.print_table("Private training", rows)


def _epsilon(options: argparse.Namespace) -> None:
    spent = accounting.epsilon(
        options.noise_multiplier,
        steps=options.steps,
        delta=options.delta,
        sampling_rate=options.sampling_rate,
        accountant=options.accountant,
        neighboring_relation=options.neighboring_relation,
    )
    report.print_table("Privacy spent", {"ε": report.rounded_up(spent, 4), **_assumptions(options)})


def _calibrate(options: argparse.Namespace) -> None:
    noise_multiplier = accounting.calibrate_noise_multiplier(
        options.epsilon,
        steps=options.steps,
        delta=options.delta,
        sampling_rate=options.sampling_rate,
        accountant=options.accountant,
        neighboring_relation=options.neighboring_relation,
    )
    rows = {
        "noise multiplier": report.rounded_up(noise_multiplier, 4),
        "ε": f"at most {options.epsilon:g}",
        **_assumptions(options),
    }
    report.print_table("Calibrated noise", rows)


def _assumptions(options: argparse.Namespace) -> dict[str, str]:
    return {
        "δ": f"{options.delta:g}",
        "steps": f"{options.steps:,}",
        "sampling": f"Poisson, rate {options.sampling_rate:g} per step",
        "accountant": f"{options.accountant.upper()} (dp-accounting)",
        "neighbours": options.neighboring_relation.replace("_", " "),
    }


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="jaxdp",
        description="Train with differential privacy, and account for it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    _add_train(commands)

    spent = commands.add_parser("epsilon", help="ε of a run", formatter_class=_Help)
    spent.add_argument(
        "--noise-multiplier",
        type=float,
        nargs="+",
        required=True,
        default=argparse.SUPPRESS,
        metavar="σ",
        help="noise std relative to the clip norm; several for layers of one step",
    )
    _add_run(spent)
    spent.set_defaults(command=_epsilon)

    calibrate = commands.add_parser(
        "calibrate", help="the noise multiplier that a target ε needs", formatter_class=_Help
    )
    calibrate.add_argument(
        "--epsilon",
        type=float,
        required=True,
        default=argparse.SUPPRESS,
        metavar="ε",
        help="of the whole run",
    )
    _add_run(calibrate)
    calibrate.set_defaults(command=_calibrate)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sampling-rate",
        type=float,
        required=True,
        default=argparse.SUPPRESS,
        metavar="Q",
        help="expected batch size over number of examples (Poisson)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        required=True,
        default=argparse.SUPPRESS,
        metavar="T",
        help="logical steps",
    )
    _add_accounting(parser)
    parser.add_argument(
        "--neighboring-relation",
        default="add_or_remove_one",
        choices=("add_or_remove_one", "replace_one"),
        help="which data sets are neighbours",
    )


def _add_accounting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--delta", type=float, default=1e-5, metavar="δ", help="of (ε, δ)")
    parser.add_argument(
        "--accountant",
        default="pld",
        choices=("pld", "rdp"),
        help="loss distributions (tight) or Rényi (fast)",
    )


def _add_train(commands: "argparse._SubParsersAction[_Parser]") -> None:
    train = commands.add_parser(
        "train", help="train a classifier of images or names privately", formatter_class=_Help
    )
    train.add_argument(
        "--data",
        default=None,
        help="mnist-sample, digits or names (embedded), a directory of IDX files, or an .npz file; "
        "by default names for char-lstm and else mnist-sample",
    )
    train.add_argument(
        "--model",
        default="tanh-cnn",
        choices=models.MODEL_NAMES,
        help="tanh-cnn needs images of at least 16x16, char-lstm texts; lipschitz-mlp can do "
        "without a clip",
    )
    train.add_argument("--epsilon", type=float, default=8.0, help="of the whole run")
    _add_accounting(train)
    _add_hyperparameters(train)
    _add_outputs(train)
    _add_devices(train)
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    train.set_defaults(command=_train)


def _add_hyperparameters(train: "_Parser") -> None:
    train.add_argument(
        "--epochs", type=float, default=20.0, help="passes over the data, in expectation"
    )
    train.add_argument("--batch-size", type=float, default=512.0, help="expected, per step")
    train.add_argument(
        "--clip",
        default="flat",
        choices=CLIP_NAMES,
        help="how per-sample gradients are bounded; none leaves it to the model, lipschitz-mlp",
    )
    train.add_argument(
        "--threshold",
        type=float,
        default=None,
        help="clip norm; by default 0.1, or none with no clip",
    )
    train.add_argument(
        "--learning-rate",
        type=float,
        default=None,
        help="of SGD, for the mean over the expected batch; by default 8, or 0.2 with no clip",
    )
    train.add_argument(
        "--schedule", default="cosine", choices=SCHEDULE_NAMES, help="of the learning rate"
    )
    train.add_argument("--momentum", type=float, default=0.9, help="of SGD")
    train.add_argument(
        "--microbatch-size", type=int, default=None, help="per-sample gradients held at a time"
    )
    train.add_argument(
        "--seed",
        type=int,
        default=None,
        help="for experiments; without it, randomness is the operating system's",
    )


def _add_outputs(train: "_Parser") -> None:
    train.add_argument("--out", type=Path, default=Path("out"), help="for metrics and plot")
    train.add_argument(
        "--checkpoints",
        type=Path,
        default=None,
        help="save here after each epoch, and resume a run of the same options and data",
    )
    train.add_argument(
        "--log",
        default=None,
        choices=("logging", "wandb", "tensorboard", "all"),
        help="where each epoch is logged; what is not private is marked so",
    )


def _add_devices(train: "_Parser") -> None:
    train.add_argument(
        "--devices",
        type=int,
        default=None,
        help="of each process, over which batches are spread; by default one, with --coordinator "
        "all. A CPU can be told to be several",
    )
    train.add_argument(
        "--coordinator",
        default=None,
        metavar="HOST:PORT",
        help="of process 0, for several processes; auto finds the cluster as jax.distributed does",
    )
    train.add_argument("--num-processes", type=int, default=None, help="with --coordinator")
    train.add_argument("--process-id", type=int, default=None, help="with --coordinator")
