"""``gkd``: parse, load the configuration, call; one clean line and an exit code for every error.

Exit codes: 0 done, 1 unexpected, 2 configuration, 3 data, 4 infrastructure (a launcher may try
again), 130 interrupted, 143 ended by SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gkd_dist import flow
from gkd_dist.config import Config
from gkd_dist.config_file import config_schema, dump_config, load_config
from gkd_dist.errors import ConfigError, GkdError, Terminated

_EPILOG = """\
exit codes: 0 done, 2 wrong configuration, 3 wrong data, 4 infrastructure (try again), 130 interrupted, 143 SIGTERM
overrides:  dotted.key=value, e.g. distill.num_workers=4 losses.1.weight=10
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``gkd`` command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parse(arguments)
    if args.command is None:
        build_parser().print_help()
        return 0
    return _guarded(lambda: int(args.act(args) or 0), args, arguments)


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Like ``parse_args``, with overrides also after options, which argparse does not know what to do with."""
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    late = [argument for argument in rest if "=" in argument and not argument.startswith("-")]
    if late != rest or (late and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if late:
        args.overrides = [*args.overrides, *late]
    return args


def _guarded(act: Callable[[], int], args: argparse.Namespace, arguments: list[str]) -> int:
    from gkd_dist.telemetry import setup_logging

    setup_logging(verbose=getattr(args, "verbose", False))
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        return act()
    except GkdError as error:
        if args.debug:
            raise
        print(f"gkd: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stopped:
        command = shlex.join(["gkd", *_without_redo(arguments)])
        print(f"\ngkd: interrupted; nothing is lost, go on with: {command}", file=sys.stderr)
        return 143 if isinstance(stopped, Terminated) else 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        if args.debug:
            raise
        logging.getLogger(__name__).debug("unexpected", exc_info=True)
        message = f"{type(error).__name__}: {error}"
        print(f"gkd: unexpected error: {message}; run again with --debug for the traceback", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _without_redo(arguments: list[str]) -> list[str]:
    """The command that goes on: doing a stage again would throw away what it has got so far."""
    kept: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_value = before == "--redo" and argument in flow.NAMES
        if not is_value and argument.partition("=")[0] != "--redo":
            kept.append(argument)
    return kept


def _terminated(signum: int, frame: object) -> None:
    """SIGTERM ends a run like Ctrl-C does: processes are ended, the run can go on. Training keeps a checkpoint."""
    raise Terminated


# --- the parser ------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """All verbs and options."""
    parser = argparse.ArgumentParser(
        prog="gkd",
        description="Distributed knowledge distillation for graph neural networks.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    verbs = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _add_flow_verbs(verbs)
    _add_predict(verbs)
    _add_verify(verbs)
    _add_inspect(verbs)
    _add_config(verbs)
    return parser


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"gkd_dist {version('gkd_dist')}"
    except PackageNotFoundError:
        return "gkd_dist (not installed)"


def _verb(
    verbs: Any, name: str, help_text: str, act: Callable[[argparse.Namespace], int | None]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=help_text,
        description=help_text,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("-v", "--verbose", action="store_true", help="more log lines")
    parser.set_defaults(act=act)
    return parser


def _add_flow_verbs(verbs: Any) -> None:
    run = _verb(verbs, "run", "run every stage that is not finished", _run)
    _add_config_arguments(run)
    run.add_argument(
        "--redo", action="append", default=[], metavar="STAGE", choices=flow.NAMES, help="do this stage again"
    )
    for stage in flow.STAGES:
        parser = _verb(verbs, stage.name, f"read {stage.reads}, write {stage.writes}", _stage)
        _add_config_arguments(parser)
        parser.add_argument("--redo", action="store_true", help="do it again although it is finished")


def _add_config_arguments(parser: argparse.ArgumentParser, dry_run: bool = True) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    if dry_run:
        parser.add_argument("--dry-run", action="store_true", help="say what would be done or skipped, and why")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--take-over", action="store_true", help="take the run from a driver that is known to be gone")


def _add_predict(verbs: Any) -> None:
    parser = _verb(verbs, "predict", "classes, logits and embeddings of every node, by a model of a run", _predict)
    _add_config_arguments(parser, dry_run=False)
    parser.add_argument(
        "--model",
        default="distilled",
        help="distilled, alone, teacher, or the name of one of several teachers (default: distilled)",
    )
    parser.add_argument("--out", required=True, metavar="URL", help="folder for the files")
    parser.add_argument("--format", default="parquet", choices=("parquet", "safetensors"))
    parser.add_argument("--embeddings", action="store_true", help="also the last hidden layer")
    parser.add_argument("--graph", metavar="CONFIG", help="YAML file whose graph and partition are predicted instead")


def _add_verify(verbs: Any) -> None:
    parser = _verb(verbs, "verify", "hash again what a run has stored", _verify)
    parser.add_argument("target", metavar="CONFIG|RUN", help="YAML file of the run, or the run's URL")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    parser.add_argument("--orphans", action="store_true", help="list objects that no manifest names")
    parser.add_argument("--prune", action="store_true", help="delete them")
    parser.add_argument("--recompute", type=int, metavar="N", help="compute N parts of the knowledge again and compare")
    parser.add_argument("--seed", type=int, default=0, help="which parts (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_inspect(verbs: Any) -> None:
    parser = _verb(verbs, "inspect", "what is in a store: sizes, bounds, cut, lost teacher mass, entropy", _inspect)
    parser.add_argument("target", metavar="CONFIG|RUN|STORE", help="YAML file, URL of a run or of one store")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    parser.add_argument("--parts", action="store_true", help="list every part")
    parser.add_argument("--part", type=int, metavar="N", help="only this part")
    parser.add_argument("--sample", type=int, metavar="N", help="read only N parts, chosen at random")
    parser.add_argument("--graph", metavar="URL", help="graph store of a knowledge store that is not inside a run")
    parser.add_argument("--to-parquet", metavar="URL", help="write nodes and edges as Parquet files into this folder")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_config(verbs: Any) -> None:
    parser = _verb(verbs, "config", "show the resolved configuration, or its JSON schema", _config)
    parser.add_argument("what", choices=("schema", "show"))
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file (for show)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


# --- the verbs -------------------------------------------------------------------------------


def _load(args: argparse.Namespace) -> Config:
    """The configuration, checked as far as possible before anything is started."""
    from gkd_dist.preflight import check_code, check_devices

    config = load_config(args.config, args.overrides)
    check_devices(config)
    check_code(config)
    return config


def _run(args: argparse.Namespace) -> int:
    from gkd_dist.driver import driving, plan_run
    from gkd_dist.preflight import check_launcher

    config = _load(args)
    if args.dry_run:
        _print_plan(config, plan_run(config, args.redo), args.json)
        return 0
    check_launcher(config)
    with driving(config, take_over=args.take_over) as session:
        flow.run_flow(session, args.redo)
        _print_result(session, args.json)
    return 0


def _stage(args: argparse.Namespace) -> int:
    from gkd_dist.driver import driving, is_follower, plan_run

    config, stage = _load(args), flow.stage(args.command)
    if args.dry_run:
        decisions = [d for d in plan_run(config, [stage.name] if args.redo else []) if d.stage == stage.name]
        _print_plan(config, decisions, args.json)
        return 0
    with driving(config, take_over=args.take_over, follow=is_follower(config, stage.name)) as session:
        flow.require_before(session, stage.name)
        if args.redo and not is_follower(config, stage.name):
            stage.discard(session)
        done = not args.redo and stage.is_done(session)
        if done:
            logging.getLogger("gkd_dist").info("%s: finished before, skipped (--redo does it again)", stage.name)
        elif is_follower(config, stage.name):
            stage.run(session)
        else:
            flow.run_stage(session, stage)
        if args.json and not is_follower(config, stage.name):
            print(json.dumps({"stage": stage.name, "skipped": done, **flow.stage_records(session).get(stage.name, {})}))
        elif stage.name == "evaluate":
            _print_result(session, args.json)
    return 0


def _print_plan(config: Config, decisions: list[flow.Decision], as_json: bool) -> None:
    from gkd_dist.driver import graph_meta
    from gkd_dist.plan import format_knowledge, knowledge_json
    from gkd_dist.preflight import describe_student

    infers, trains = (any(decision.stage == stage for decision in decisions) for stage in ("infer", "distill"))
    meta = graph_meta(config) if infers or trains else None
    if as_json:
        stored: dict[str, Any] = {"infer": {"knowledge": knowledge_json(config, meta)}} if infers else {}
        stored |= {"distill": {"student": describe_student(config, meta)}} if trains else {}
        print(json.dumps([vars(decision) | stored.get(decision.stage, {}) for decision in decisions], indent=1))
        return
    width = max(len(decision.stage) for decision in decisions)
    for decision in decisions:
        print(f"{decision.stage:<{width}}  {decision.action:<4}  {decision.reason}")
    if infers:
        print(format_knowledge(config, meta))
    if trains:
        print(describe_student(config, meta))


def _print_result(session: Any, as_json: bool) -> None:
    from gkd_dist import layout
    from gkd_dist.export import code_argument
    from gkd_dist.report import format_table

    metrics = session.run.read_json(layout.METRICS)
    if as_json:
        print(json.dumps(metrics, indent=1))
        return
    print(format_table(metrics))
    where = session.run.local_path() or session.run.url
    print(f"\nreport       {where}/{layout.REPORT}\ncurves       tensorboard --logdir {where}/{layout.TENSORBOARD}")
    print(f"student      gkd_dist.load_student({str(where)!r}{code_argument(session.config.student.model.kind)})")


def _predict(args: argparse.Namespace) -> int:
    from gkd_dist.driver import driving
    from gkd_dist.predictions import predict_run

    config = _load(args)
    with driving(config, take_over=args.take_over, save_config=False) as session:
        other = None if args.graph is None else load_config(args.graph)
        written = predict_run(session, args.model, args.out, args.format, args.embeddings, other)
    print(json.dumps(written, indent=1) if args.json else f"{written['num_nodes']:,} nodes in {written['url']}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from gkd_dist.driver import config_of
    from gkd_dist.verify_run import verify_run

    is_file = args.target.endswith((".yaml", ".yml")) and Path(args.target).is_file()
    config = load_config(args.target, args.overrides) if is_file else config_of(args.target, args.overrides)
    result = verify_run(
        config, orphans=args.orphans or args.prune, prune=args.prune, recompute=args.recompute, seed=args.seed
    )
    print(json.dumps(result.to_json(), indent=1) if args.json else result.to_text())
    return 3 if result.problems else 0


def _inspect(args: argparse.Namespace) -> int:
    from gkd_dist.inspect import inspect_stores, open_target, to_parquet
    from gkd_dist.inspect_text import report_text

    target = open_target(args.target, args.overrides, args.graph)
    if args.to_parquet is not None:
        written = to_parquet(target, args.to_parquet, part=args.part, sample=args.sample)
        print(json.dumps(written, indent=1) if args.json else f"{len(written['files'])} files in {written['url']}")
        return 0
    reports = inspect_stores(target, part=args.part, sample=args.sample, list_parts=args.parts)
    print(json.dumps(reports, indent=1) if args.json else "\n\n".join(report_text(report) for report in reports))
    return 0


def _config(args: argparse.Namespace) -> int:
    if args.what == "schema":
        print(json.dumps(config_schema(), indent=1))
        return 0
    if args.config is None:
        raise ConfigError("gkd config show needs a file; give it, as in `gkd config show configs/quickstart.yaml`")
    print(dump_config(load_config(args.config, args.overrides)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
