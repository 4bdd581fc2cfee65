"""The command `gubbins ce import-dirac`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml
from diracx.tasks.cli.errors import CliError, UsageProblem
from diracx.tasks.cli.options import JsonOption
from diracx.tasks.cli.output import echo, print_json

from gubbins.domain.exceptions import DiracConfigurationError
from gubbins.logic import my_pilots as logic

from .session import read_input

HELP = """Translate a DIRAC configuration for `gubbins ce load`.

Reads the compute elements of SiteDirector, `Resources/Sites`, with their queues, back ends, VOs, tags and limits,
from a FILE in DIRAC's format (- reads standard input). The result goes to standard output, or to --output; options
without a counterpart are listed on standard error with their path. Nothing is loaded: check both, then

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
        typer.Option("--share", min=0, max=1, help="Fraction of the slots, while SiteDirector uses the others."),
    ] = 1.0,
    as_json: JsonOption = False,
) -> None:
    name, text = read_input(file)
    try:
        found = logic.import_dirac(text, share=share)
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
        raise CliError(f"{name} has no compute elements that can be translated, in Resources/Sites/GRID/SITE/CEs")
    if as_json:
        print_json(document | {"remarks": [remark._asdict() for remark in found.remarks]})
    elif output is None:
        typer.echo(written, nl=False)
    else:
        echo(f"{output}: {len(found.compute_elements)} compute elements, {len(found.remarks)} remarks")
