"""`trl-ray`: runs pipelines, resumes runs, draws reports.

    trl-ray PIPELINE [--config FILE] [OPTIONS] [--dry-run]      trl-ray resume RUN_DIR [--from-checkpoint STEP]
                                                                               [--new-journal] [OPTIONS]
    trl-ray teacher-serve [--config FILE] [OPTIONS] [--dry-run] trl-ray report RUN_DIR
    trl-ray PIPELINE --help                                     trl-ray env
    PIPELINE: sft dpo kto cpo orpo reward prm grpo async-grpo rloo sdpo distill
              package.module:Class, file.py:Class
    OPTIONS:  a.b=c, --a.b c, --a.b=c, --list x y z, --switch, --no_switch

Exit codes: 0 done and the ledger balances; 2 the input was wrong; 3 the run failed; 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import enum
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from trl_ray.cli.leaving import leave
from trl_ray.cli.option_arguments import read_options
from trl_ray.cli.option_help import describe_options
from trl_ray.config.base import Section
from trl_ray.config.load import apply_overrides, build, read_options_of, read_yaml
from trl_ray.config.messages import nearest
from trl_ray.config.object_paths import entry_point_paths, real_path
from trl_ray.config.runs.config_registry import CONFIGS
from trl_ray.config.runs.run_environment import set_environment
from trl_ray.config.teacher_options import TeacherServeConfig
from trl_ray.errors import ConfigError, InputError, InterruptedRun, RunError, TrlRayError
from trl_ray.observe.run_directory import RunDirectory
from trl_ray.pipelines.pipeline_registry import ENTRY_POINTS, find_pipeline
from trl_ray.pipelines.run.signals import interrupt_at_once, own_process

if TYPE_CHECKING:
    from trl_ray.pipelines.run.pipeline import Pipeline
    from trl_ray.pipelines.run.session import TrainOutput


class ExitCode(enum.IntEnum):
    """What the shell learns."""

    DONE = 0
    WRONG_INPUT = 2
    FAILED = 3
    INTERRUPTED = 130


_SERVE = "teacher-serve"
_SERVES = "answer for a teacher over HTTP"
_GO_ON = "Its last checkpoint, journal and events are kept; go on with: trl-ray resume RUN_DIR"
_RESUMES = "go on with a run from its last checkpoint; what env set is not kept: set it in the shell before"
_BUILT_IN = frozenset({*CONFIGS, _SERVE, "resume", "report", "env"})


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing its usage twice."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See: trl-ray --help")


def build_parser(*, outside: str | None = None) -> argparse.ArgumentParser:
    """All commands; `outside` is a pipeline that is none of the package's."""
    parser = _Parser(prog="trl-ray", description=(__doc__ or "").split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for name in (*CONFIGS, *([] if outside is None else [outside])):
        _add_options(commands.add_parser(name, help=_summary(name), add_help=False))
    resume = commands.add_parser("resume", help=_RESUMES)
    resume.add_argument("run_dir", metavar="RUN_DIR [OPTIONS]")
    back = "step of the checkpoint to go back to, 0 for the beginning; the newest that can be used without it"
    resume.add_argument("--from-checkpoint", "--from_checkpoint", dest="step", type=int, metavar="STEP", help=back)
    anew = "the journal is lost or damaged: go on with the checkpoint's own copy of the ledger"
    resume.add_argument("--new-journal", "--new_journal", dest="new_journal", action="store_true", help=anew)
    report = commands.add_parser("report", help="draw RUN_DIR/report.html again")
    report.add_argument("run_dir")
    _add_options(commands.add_parser(_SERVE, help=_SERVES, add_help=False))
    commands.add_parser("env", help="print versions and hardware, for bug reports")
    return parser


def _add_options(command: argparse.ArgumentParser) -> None:
    # What the command itself reads; the rest is read by `read_options`, which knows the configuration.
    command.add_argument("--config", metavar="FILE")
    command.add_argument("--dry-run", "--dry_run", dest="dry_run", action="store_true")
    command.add_argument("-h", "--help", dest="help", action="store_true")


def _summary(command: str) -> str:
    """What a command does; of what is built in, no pipeline is imported for it, because that takes seconds."""
    if command == _SERVE:
        return _SERVES
    described: Any = CONFIGS[command] if command in CONFIGS else find_pipeline(command)
    return (described.__doc__ or "").partition("\n\n")[0].partition("; names and defaults")[0].replace("\n    ", " ")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; without `argv` it is the process's own, and may be left at once."""
    if argv is None:
        interrupt_at_once()
        own_process()
    try:
        code = _run(argv)
    finally:
        # What the console left unwritten would otherwise end Python with an error of its own.
        for stream in (sys.stdout, sys.stderr):
            _write("", stream)
    if argv is None:
        leave(code, at_once=code == ExitCode.INTERRUPTED)
    return code


def _write(text: str, stream: TextIO) -> None:
    """Write all at once, and nothing any more where who reads has seen enough, as `head` has."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _print(text: object) -> None:
    _write(f"{text}\n", sys.stdout)


def _run(argv: Sequence[str] | None) -> int:
    # A console script begins without it, `python -m` with it: reward functions and callbacks are named by module.
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return _dispatch(_parse(sys.argv[1:] if argv is None else list(argv)))
    except InputError as error:
        return _say(ExitCode.WRONG_INPUT, f"trl-ray: {error}")
    except InterruptedRun as error:
        return _say(ExitCode.INTERRUPTED, f"trl-ray: {error}")
    except (KeyboardInterrupt, asyncio.CancelledError):
        return _say(ExitCode.INTERRUPTED, "trl-ray: interrupted at once; checkpoints and the journal are kept")
    except TrlRayError as error:
        return _say(
            ExitCode.FAILED,
            f"trl-ray: the run failed: {type(error).__name__}: {error}\n"
            # An error that says so has said what to do as well.
            + ("" if "Nothing was changed" in str(error) else _GO_ON),
        )


def _parse(argv: list[str]) -> argparse.Namespace:
    known = [*CONFIGS, *entry_point_paths(ENTRY_POINTS), _SERVE, "resume", "report", "env"]
    is_outside = bool(argv) and (":" in argv[0] or (argv[0] in known and argv[0] not in _BUILT_IN))
    parser = build_parser(outside=argv[0] if is_outside else None)
    if argv and not argv[0].startswith("-") and argv[0] not in known and not is_outside:
        guess = nearest(argv[0], known)
        raise ConfigError(
            f"{argv[0]!r} is not a command. "
            + (f"Did you mean {guess!r}?" if guess else f"Commands: {', '.join(known)}.")
        )
    takes_options = is_outside or (argv and argv[0] in {*CONFIGS, _SERVE, "resume"})
    return _parse_options(parser, argv) if takes_options else parser.parse_args(argv)


def _parse_options(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    args, rest = parser.parse_known_args(argv)
    if args.command == "resume":
        args.overrides = read_options(rest, _pipeline_of(args.run_dir).config_class) if rest else []
        return args
    args.overrides = [] if args.help else read_options(rest, _config_class(args.command))
    return args


def _config_class(command: str) -> type[Section]:
    if command == _SERVE:
        return TeacherServeConfig
    if command in CONFIGS:
        return CONFIGS[command]
    found: type[Section] = find_pipeline(command).config_class
    return found


def _dispatch(args: argparse.Namespace) -> int:
    if getattr(args, "help", False):
        _print(describe_options(args.command, _config_class(args.command), what=_summary(args.command)))
        return ExitCode.DONE
    if args.command == "env":
        from trl_ray.observe.environment import describe_environment, format_environment

        _print(format_environment(describe_environment()))
        return ExitCode.DONE
    if args.command == "report":
        from trl_ray.observe.report.report_page import build_report

        _print(build_report(RunDirectory.open_existing(args.run_dir).path))
        return ExitCode.DONE
    if args.command == _SERVE:
        return _serve(args)
    if args.command == "resume":
        resumed = _pipeline_of(args.run_dir).from_run(
            args.run_dir, changes=args.overrides, from_checkpoint=args.step, new_journal=args.new_journal
        )
        return _finish(resumed.train())
    given = args.overrides
    values = apply_overrides({}, given) if args.config is None else read_options_of(args.config, given)
    # Not kept, as it may hold secrets; before the pipeline is imported, because libraries read it then.
    set_environment(values.pop("env", None))
    pipeline_class: Any = find_pipeline(args.command)
    config = build(pipeline_class.config_class, values)
    if config.pipeline != real_path(args.command):
        # A file's path is relative to this folder, and the run may be resumed from any.
        config = config.replace(pipeline=real_path(args.command))
    pipeline = pipeline_class(args=config)
    if args.dry_run:
        from trl_ray.cli.dry_run import describe_run

        _print(describe_run(pipeline))
        return ExitCode.DONE
    return _finish(pipeline.train())


def _serve(args: argparse.Namespace) -> int:
    from trl_ray.cli.teacher_serve import describe_server, load_serve_config, serve_teacher

    config = load_serve_config(args.config, args.overrides)
    if args.dry_run:
        _print(describe_server(config))
        return ExitCode.DONE
    try:
        serve_teacher(config)
    except RunError as error:
        _say(ExitCode.FAILED, f"trl-ray: the server failed: {type(error).__name__}: {error}")
        sys.stdout.flush()
        # A thread that hangs in the model would keep the process for ever.
        os._exit(ExitCode.FAILED)
    return ExitCode.DONE


def _pipeline_of(run_dir: str | Path) -> type[Pipeline[Any, Any]]:
    path = RunDirectory.open_existing(run_dir).config
    try:
        return find_pipeline(str(read_yaml(path).get("pipeline")))
    except ConfigError as error:
        raise ConfigError(f"{path} must say which pipeline it is for: {error}") from error


def _finish(output: TrainOutput) -> int:
    ledger = output.ledger
    balance = (
        f"issued {ledger.issued} = trained {ledger.trained} + dropped {ledger.dropped_total} + live {ledger.live_total}"
    )
    age = "" if output.worst_age is None else f"; oldest token trained on: {output.worst_age} steps"
    _print(f"{output.steps} steps; ledger: {balance}{age}")
    if (report := output.run_dir / "report.html").is_file():
        _print(f"report: {report}")
    if not ledger.balanced or ledger.live_total:
        return _say(ExitCode.FAILED, f"trl-ray: the run ended with work unaccounted for: {balance}")
    return ExitCode.DONE


def _say(code: ExitCode, message: str) -> int:
    _write(f"{message}\n", sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
