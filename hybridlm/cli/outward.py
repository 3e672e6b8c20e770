"""Verbs that take models out to other programs, and in from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from hybridlm.cli.app import EMA, Run, app
from hybridlm.cli.user_error import reported
from hybridlm.errors import UserError


@app.command()
def export(
    run: Run,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="the folder, or .gguf file, to write; it must not exist")
    ],
    to: Annotated[
        Literal["hf", "hf-code", "gguf", "safetensors"],
        typer.Option(
            "--to",
            help="hf: an architecture of transformers; hf-code: any model, with its code; gguf: a file for llama.cpp;"
            " safetensors: weights and config.yaml",
        ),
    ] = "hf",
    arch: Annotated[
        str | None, typer.Option("--arch", help="this architecture, by its model_type: llama, granitemoehybrid, ...")
    ] = None,
    dtype: Annotated[
        Literal["f32", "bf16", "f16", "q8_0"] | None,
        typer.Option("--dtype", help="round the weights (default: as trained); q8_0, of gguf: to eight bits"),
    ] = None,
    ema: EMA = False,
) -> None:
    """Write a trained model for other programs, and check that it computes the same there.

    A model that no architecture represents exactly is refused, with what stands in the way.
    """
    with reported():
        import torch

        from hybridlm.config.hardware import CPU
        from hybridlm.interop.export import export_code, export_hf, export_safetensors
        from hybridlm.interop.gguf.export import export_gguf
        from hybridlm.interop.writing import refuse_inside
        from hybridlm.runs.checkpoint import load_run, refuse_unfinite

        if arch is not None and to not in ("hf", "gguf"):
            raise UserError(f"--arch {arch}: only with --to hf and --to gguf")
        if dtype == "q8_0" and to != "gguf":
            raise UserError("--dtype q8_0: only with --to gguf")
        loaded = load_run(run, torch.device(CPU), ema=ema)
        refuse_inside(folder, loaded.folder.path)
        refuse_unfinite(loaded.model.state_dict(), loaded.checkpoint)
        if to == "hf":
            done = export_hf(loaded, folder, arch=arch, dtype=dtype)
        elif to == "hf-code":
            done = export_code(loaded, folder, dtype=dtype)
        elif to == "gguf":
            done = export_gguf(loaded, folder, arch=arch, dtype=dtype)
        else:
            done = export_safetensors(loaded, folder, dtype=dtype)
        typer.echo(f"{folder}: {done.name}, for {', '.join(done.readers)}")
        if done.agreement is not None:
            typer.echo(f"checked with {done.readers[0]}: {done.agreement}")
        for line in done.notes:
            typer.echo(line)


@app.command("import-config")
def import_config(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a model file of oxidizr, such as models/nano.yaml")],
    out: Annotated[
        Path | None, typer.Option("--out", help="write here, such as experiments/nano.yaml (default: standard output)")
    ] = None,
) -> None:
    """Turn a model file of oxidizr into an experiment (experiments=NAME), and list what has no counterpart here."""
    with reported():
        from hybridlm.interop.oxidizr import read_oxidizr

        found = read_oxidizr(file)
        if out is None:
            typer.echo(found.text, nl=False)
        elif out.exists():
            raise UserError(f"{out}: exists already; choose another file")
        else:
            out.write_text(found.text, encoding="utf-8")
        for line in found.left_out:
            typer.echo(line, err=True)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="a model of transformers, mamba_ssm or nanochat")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="the run folder to write; it must not exist")],
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="a tokenizer.json, or a folder with one, where FOLDER has none")
    ] = None,
    rope_theta: Annotated[
        float | None, typer.Option("--rope-theta", min=1, help="of nanochat: the base of its rotary positions")
    ] = None,
    a_activation: Annotated[
        Literal["softplus", "heavy_tail"] | None,
        typer.Option("--a-activation", help="of Mamba-3: softplus, as in the released code, or heavy_tail"),
    ] = None,
) -> None:
    """Turn a model of another program into a run folder, which generates, chats, evaluates, trains on and exports."""
    with reported():
        from hybridlm.interop.importing import import_folder
        from hybridlm.interop.incoming import Told

        done = import_folder(source, folder, Told(tokenizer, rope_theta, a_activation))
        typer.echo(f"{folder}: {done.name}, {done.parameters:,} parameters")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="what `hybridlm export` wrote")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hugging Face hub")],
    yes: Annotated[bool, typer.Option("--yes", help="upload (default: only print what would be uploaded)")] = False,
    private: Annotated[bool, typer.Option("--private", help="a repository that is made is private")] = False,
) -> None:
    """Upload an exported model to the Hugging Face hub. Without --yes nothing is sent, only listed."""
    with reported():
        from hybridlm.interop.push import exported_files, listing, refuse_name
        from hybridlm.interop.push import push as upload

        refuse_name(repo)
        files = exported_files(folder)
        for line in listing(files, repo, private=private):
            typer.echo(line)
        typer.echo(upload(files, repo, private=private) if yes else "nothing was sent; add --yes to upload")
