"""Verbs on many runs, and on the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybridlm.cli.app import OVERRIDES, app
from hybridlm.cli.arguments import overrides_of
from hybridlm.cli.user_error import reported
from hybridlm.errors import UserError


@app.command(context_settings=OVERRIDES)
def sweep(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[GROUP=OPTION,OPTION | FIELD=VALUE,VALUE]...", help="as with train.py -m: optim.lr=1e-3,3e-3"
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="parallel jobs; default: one per GPU, or one")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="runs per point, with seed, seed + 1, ...")] = 1,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="FOLDER", help="resume a sweep; `last`: the newest")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the jobs without starting any")] = False,
) -> None:
    """Run every point of a grid on this machine, each in its own process.

    Exit code 0: all jobs finished; 1: some failed; 2: invalid input, nothing was started; 143: stopped after the jobs
    saved.
    """
    with reported("continues"):
        given = overrides_of("sweep", overrides)
        if resume is not None and (given or seeds > 1 or dry_run):
            raise UserError("sweep --resume FOLDER accepts only --jobs; its jobs are those in the folder")
        from hybridlm.cli.compose import compose_config, sweep_axes
        from hybridlm.sweep.command import new_sweep, resume_sweep

        if resume is None:
            code = new_sweep(given, seeds=seeds, jobs=jobs, dry_run=dry_run, axes=sweep_axes, compose=compose_config)
        else:
            code = resume_sweep(resume, jobs=jobs, compose=compose_config)
    if code:
        raise typer.Exit(code)


@app.command()
def report(
    folders: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|FOLDER...", help="`last` (the newest run), run folders, or folders that contain runs"
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="output folder (default: the first folder)")
    ] = None,
    best_of: Annotated[
        list[str] | None,
        typer.Option(
            "--best-of", metavar="FIELD", help="show each model at its best value of FIELD (optim.lr); may be repeated"
        ),
    ] = None,
) -> None:
    """Report on a run, or compare several: an HTML page (report.html), the same as Markdown (report.md), and a CSV row
    per run (report.csv)."""
    with reported():
        from hybridlm.report.page import run_report

        run_report(folders, out, best_of)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False) -> None:
    """Show what this machine has, which compiled kernels work on it, and what to install for the others. Always exits
    with 0."""
    with reported():
        from hybridlm.machine.doctor import run_doctor

        run_doctor(as_json=as_json)
