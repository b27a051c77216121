"""The command line: `--help` and `list` start without torch."""

from __future__ import annotations

import logging
import sys

import typer

from fastgen.commands import latents, look, measure, pictures, runs, signals
from fastgen.errors import RunFailed, Stopped, UserError

logger = logging.getLogger("fastgen")
app = typer.Typer(
    help="Distil a slow diffusion or flow teacher into a 1-4 step student, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (
    *(runs.quickstart, runs.distill, runs.pairs),
    *(pictures.generate, pictures.export),
    latents.latents,
    *(measure.evaluate, measure.bench),
    *(look.inspect, look.list_, look.doctor),
):
    app.command(name=command.__name__.rstrip("_"))(command)


def main() -> None:
    """Run the CLI and turn every ending into its exit code: 0, 1 (run failed), 2 (input), 130 / 143 (signals)."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    signals.end_at_once()
    try:
        # Without any word typer prints the help; its own way to report a mistake takes three lines.
        sys.exit(app(prog_name="fastgen", standalone_mode=not sys.argv[1:]) or 0)
    except UserError as error:
        message, code = str(error), 2
    except RunFailed as error:
        message, code = str(error), 1
    except Stopped as ending:
        message, code = f"{ending}; continue with --resume", 128 + (signals.received() or 0)
    except OSError as error:  # of the machine, not of the input: a failing disk, too many open files
        message, code = f"{error.filename or 'input or output'}: {error.strerror or error}", 1
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's or typer's usage errors, whose home depends on the version
            raise
        where = getattr(getattr(error, "ctx", None), "command_path", "fastgen")
        message, code = f"{error.format_message()} (see `{where} --help`)", 2
    print(f"fastgen: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
