# SPDX-License-Identifier: Apache-2.0
"""``iokeep OBJECT VERB``: dispatch and exit codes. Each object's module is imported only when it is named."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from iokeep import __version__
from iokeep.errors import IokeepError

#: object -> one line of help; the module is ``iokeep.cli.OBJECT`` with ``add_parser(subparsers)``
OBJECTS = {
    "table": "IO page tables: show, walk, extents, verify, diff, digest",
    "handover": "what lies in memory between two kernels: show, check",
    "host": "this machine: what it offers for a live update; would a process's files survive",
    "bench": "how fast the engine is here, next to memory's own speed, C and NumPy",
    "rehearse": "a whole live update on the software host, measured and broken on request",
}
EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130


class _Version(argparse.Action):
    """``--version``: one line with what matters in a bug report; the versions are looked up, not imported."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        from importlib.metadata import PackageNotFoundError, version

        parts = []
        for name in ("numpy", "numba"):
            try:
                parts.append(f"{name} {version(name)}")
            except PackageNotFoundError:
                parts.append(f"{name} absent")
        print(f"iokeep {__version__} (Python {sys.version.split()[0]}, {', '.join(parts)})")
        parser.exit()


def _chosen(argv: Sequence[str]) -> str | None:
    """The object named on the command line: the first word that is no option."""
    for word in argv:
        if not word.startswith("-"):
            return word
    return None


def build_parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The parser; only the object ``chosen`` is filled in with its verbs and options."""
    parser = argparse.ArgumentParser(
        prog="iokeep",
        description="Live update for iommufd: carry IO address spaces over a kexec, and prove them equal.",
        epilog="Exit codes: 0 fine or equal, 1 difference, violation or refused restore, 2 usage, "
        "3 bad input, 4 missing capability, 5 kernel refused and rolled back, "
        "6 not all rolled back, 70 a bug of ours.",
    )
    parser.add_argument("-V", "--version", action=_Version, nargs=0, help="show versions and exit")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    subparsers = parser.add_subparsers(dest="object", metavar="OBJECT", required=True)
    for name, text in OBJECTS.items():
        if name == chosen:
            importlib.import_module(f"iokeep.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=text, add_help=False)
    return parser


def _report(error: IokeepError, args: argparse.Namespace | None) -> None:
    """Text on stderr; and where JSON was asked for, a JSON document on stdout all the same."""
    if args is not None and getattr(args, "json", False):
        import json

        about: dict[str, object] = {"kind": error.kind, "message": error.what, "hint": error.hint}
        errno = getattr(error, "errno", None)
        about["errno"] = errno if isinstance(errno, int | str) else None
        document = {
            "schema": getattr(args, "schema", "iokeep.error-v1"),
            "tool_version": __version__,
            "error": about,
        }
        print(json.dumps(document, indent=1))
    print(f"error: {error.what}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    :param argv: the words after the program's name; None = sys.argv.
    :return: the exit code (see ``iokeep --help``).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    args: argparse.Namespace | None = None
    try:
        args = build_parser(_chosen(words)).parse_args(words)
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse: --help, --version, usage
        return stop.code if isinstance(stop.code, int) else 2
    except IokeepError as error:
        if debug:
            traceback.print_exc()
        _report(error, args)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader is gone; nothing may be written at interpreter exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:  # noqa: BLE001  the last line of defence
        if debug:
            traceback.print_exc()
        print(f"error: internal error: {type(error).__name__}: {error}", file=sys.stderr)
        print("hint: run again with --debug and report the traceback", file=sys.stderr)
        return EXIT_INTERNAL


if __name__ == "__main__":
    raise SystemExit(main())
