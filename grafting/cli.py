"""The `graft` command.

A mistake of the user's is one line on standard error and exit status 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from grafting.errors import UserError

if TYPE_CHECKING:
    from grafting.hosts.base import Host

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Graft pretrained diffusion transformers: replace layers, distil, finetune, score.",
)
console = Console()

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override keys of the config.")]
OperatorFiles = Annotated[
    list[Path] | None,
    typer.Option("--operators", help="Python file that registers custom operators; may repeat."),
]
HostArgument = Annotated[str, typer.Argument(help="embedded:digits-dit, a saved hybrid, a checkpoint, or a hub id.")]
Vae = Annotated[str | None, typer.Option(help="Codec of a bare checkpoint: a folder or hub id.")]
Heads = Annotated[int | None, typer.Option("--num-heads", help="Attention heads, where the sizes do not tell.")]


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    """`--debug` itself is read by `main`."""


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="The experiment's YAML file.")], overrides: Overrides = None
) -> None:
    """Do or continue an experiment.

    Example: graft run configs/quickstart.yaml distill.steps=100
    """
    from grafting.experiment import run as run_experiment
    from grafting.report import summary_table

    done = run_experiment(config, overrides or [])
    console.print(summary_table(done.metrics))
    console.print(f"{done.folder / 'report.html'}", highlight=False, soft_wrap=True)


@app.command()
def inspect(
    host: HostArgument,
    batch_size: Annotated[int, typer.Option(help="Samples per latency measurement.")] = 8,
    operators_files: OperatorFiles = None,
    vae: Vae = None,
    num_heads: Heads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a host's slots with what stands in them, parameters, FLOPs and latency.

    Example: graft inspect embedded:digits-dit
    """
    from grafting.eval import speed

    loaded = _load(host, operators_files, vae, num_heads)
    slots = speed.per_slot(loaded, batch_size=batch_size)
    rows: dict[str, dict[str, Any]] = {
        slot: {"operator": loaded.operator(slot).name, **values.model_dump()} for slot, values in slots.items()
    }
    whole = {"parameters": sum(p.numel() for p in loaded.model.parameters()), "flops": speed.flops(loaded)}
    if as_json:
        print(json.dumps({"host": loaded.card.name, **whole, "slots": rows}, indent=2))
        return
    table = Table(title=f"{loaded.card.name}: {whole['parameters']:,} parameters, {whole['flops']:,} FLOPs per sample")
    for column in ("slot", "operator", "parameters", "FLOPs", f"latency, batch {batch_size}"):
        table.add_column(column, justify="left" if column in ("slot", "operator") else "right")
    for slot, row in rows.items():
        table.add_row(
            slot,
            row["operator"],
            f"{row['parameters']:,}",
            f"{row['flops']:,}",
            f"{row['latency_ms']:.3f} ms",
        )
    console.print(table)


@app.command("operators")
def list_operators(
    operators_files: OperatorFiles = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each config's JSON schema.")] = False,
) -> None:
    """List the operators that can fill a slot, with their configs.

    Example: graft operators --operators my_operators.py
    """
    from grafting import operators

    for file in operators_files or []:
        operators.load_file(file)
    known = {name: operators.get(name) for name in operators.names()}
    if as_json:
        print(
            json.dumps(
                {n: {"kind": c.kind, "config": c.Config.model_json_schema()} for n, c in known.items()},
                indent=2,
            )
        )
        return
    table = Table()
    for column in ("operator", "kind", "config", "what it is"):
        table.add_column(column)
    for name, cls in known.items():
        keys = "\n".join(f"{key}: {field.default!r}" for key, field in cls.Config.model_fields.items())
        table.add_row(name, cls.kind, keys or "–", (cls.__doc__ or "").strip().split("\n\n")[0].replace("\n    ", " "))
    console.print(table)


@app.command()
def sample(
    host: HostArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNG files; replaced when it exists.")],
    n: Annotated[int, typer.Option("-n", min=1, help="Number of images.")] = 16,
    condition: Annotated[int | None, typer.Option(help="One class for all; all classes in turn unless given.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    guidance_channels: Annotated[str | None, typer.Option(help="Latent channels that are guided, or 'all'.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ancestral, ddim or dpm_solver.")] = None,
    seed: Annotated[int, typer.Option(help="Image i depends on the seed and i alone.")] = 0,
    operators_files: OperatorFiles = None,
    vae: Vae = None,
    num_heads: Heads = None,
) -> None:
    """Draw images from a host or hybrid into a folder of PNG files.

    Example: graft sample runs/quickstart/hybrid -n 64 -o pictures
    """
    from grafting.eval import images
    from grafting.sample import balanced_labels
    from grafting.sample import sample as draw

    if guidance_channels not in (None, "all") and not guidance_channels.isdecimal():
        raise UserError(f"--guidance-channels {guidance_channels!r} is neither a number nor 'all'")
    if out.is_dir() and any(out.iterdir()) and not (out / "labels.json").is_file():
        raise UserError(f"{out} is not empty and holds no samples of ours; name another folder")
    loaded = _load(host, operators_files, vae, num_heads)
    pictures = draw(
        loaded,
        n,
        condition=condition,
        steps=steps,
        guidance=guidance,
        guidance_channels=guidance_channels,
        sampler=sampler,
        seed=seed,
    )
    labels = balanced_labels(n, loaded.num_classes)
    images.write_images(pictures, out, labels if condition is None else labels.new_full((n,), condition))
    console.print(f"{n} images in {out}", highlight=False)


@app.command()
def evaluate(
    images_folder: Annotated[str, typer.Argument(metavar="IMAGES", help="Folder of images, or .npz.")],
    reference: Annotated[str, typer.Option(help="Folder of real images, .npz, or embedded:digits.")],
    extractor: Annotated[str, typer.Option(help="Feature extractor: inception, or digits.")] = "inception",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a folder of images against real ones: FID, and class agreement where the digits classifier applies.

    Example: graft evaluate pictures --reference embedded:digits --extractor digits
    """
    from grafting.data import cache_folder, embedded_images
    from grafting.eval import agreement, fid
    from grafting.eval import images as image_files

    pictures = image_files.read_images(images_folder)
    labels = image_files.read_labels(images_folder, len(pictures))
    fid.check_sample_count(len(pictures), extractor)
    real = (
        embedded_images(reference)["train"][0]
        if reference.startswith("embedded:")
        else image_files.read_images(reference)
    )
    score = fid.fid(pictures, fid.reference_statistics(real, extractor, cache_folder() / "fid"), extractor)
    values: dict[str, Any] = {
        "fid": score.value,
        "fid_interval": score.interval,
        "n": score.n,
        "n_reference": score.n_reference,
        "extractor": score.extractor,
        "reference_hash": score.reference_hash,
    }
    if labels is not None and extractor == "digits":
        values["class_agreement"] = agreement.class_agreement(pictures, labels)
    if as_json:
        print(json.dumps(values, indent=2))
        return
    table = Table(show_header=False)
    for key, value in values.items():
        shown = ", ".join(f"{part:.3f}" for part in value) if isinstance(value, tuple) else value
        table.add_row(key.replace("_", " "), f"{shown:.4f}" if isinstance(shown, float) else str(shown))
    console.print(table)


def _load(spec: str, operator_files: list[Path] | None, vae: str | None, num_heads: int | None) -> Host:
    from grafting import operators
    from grafting.hosts.loading import load_host

    for file in operator_files or []:
        operators.load_file(file)
    return load_host(spec, vae=vae, num_heads=num_heads)


def main() -> NoReturn:
    """Run the command and turn what went wrong into a line and an exit status."""
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments, standalone_mode=True)
    except UserError as error:
        if debug:
            raise
        print(f"graft: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("graft: interrupted; the same command continues after the last finished stage", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if debug:
            raise
        print(f"graft: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
