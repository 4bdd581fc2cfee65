"""The command `gubbins ce import-dirac`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml
from diracx.tasks.cli.errors import CliError, UsageProblem
from diracx.tasks.cli.options import JsonOption
from diracx.tasks.cli.output import echo

from gubbins.domain.exceptions import DiracConfigurationError
from gubbins.logic import my_pilots as logic

from .session import emit

HELP = """Translate a configuration of DIRAC into a file for `gubbins ce load`.

Reads the compute elements to which SiteDirector submits, `Resources/Sites`, with their queues, back ends, VOs,
tags and limits, from a FILE in DIRAC's format (- reads standard input). The result goes to standard output, or to
--output; whatever has no counterpart goes to standard error, one line each with its path in the configuration.
Nothing is loaded: read both, then

\b
    gubbins ce import-dirac dirac.cfg --output ces.yaml
    gubbins ce load ces.yaml

Types of compute elements: SLURM, SSH and Local (with the batch systems Host, SLURM, GE, Torque, PBS and LSF),
AREX and ARC, HTCondorCE."""


def import_dirac(
    file: Annotated[Path, typer.Argument(metavar="FILE")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the result there; it must not exist.")
    ] = None,
    share: Annotated[
        float,
        typer.Option(
            "--share", min=0, max=1, help="Part of the slots, beside a SiteDirector that has the others."
        ),
    ] = 1.0,
    as_json: JsonOption = False,
) -> None:
    name = "standard input" if str(file) == "-" else str(file)
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        found = logic.import_dirac(text, share=share)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageProblem(f"cannot read {name}: {reason}") from error
    except DiracConfigurationError as error:
        raise UsageProblem(f"{name}: {error}") from error
    document = {"compute_elements": found.compute_elements}
    written = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    if output is not None and found.compute_elements:
        try:
            with output.open("x", encoding="utf-8") as target:
                target.write(written)
        except OSError as error:
            raise UsageProblem(f"cannot write {output}: {error.strerror}") from error
    if not as_json:
        for remark in found.remarks:
            echo(f"{remark.path}: {remark.why}", err=True)
    if not found.compute_elements:
        raise CliError(f"{name} has no compute elements that can be taken over, in Resources/Sites/GRID/SITE/CEs")
    if as_json:
        emit(document | {"remarks": [remark._asdict() for remark in found.remarks]})
    elif output is None:
        typer.echo(written, nl=False)
    else:
        echo(f"{output}: {len(found.compute_elements)} compute elements, {len(found.remarks)} remarks")
