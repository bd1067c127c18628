"""The command `compress`.

Exit codes: 0 done, 1 a target missed, 2 a user's mistake, 70 a crash, 130 interrupted. Only commands that need torch
import it, inside their functions.
"""

import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from compress.commands.outcome import Commands, fail, say
from compress.errors import RecipeError
from compress.ranks import first_decides, joined, local_ranks, ranks, tell_torchrun
from compress.recipe.read import read_recipe
from compress.recipe.schema import Recipe
from compress.report.distribution import own_distribution
from export.command.main import end
from export.names import RECIPE_YAML

app = typer.Typer(
    cls=Commands,
    help="Turn a trained vision network into a small, fast, measured INT8 student.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich's tables cut off names on narrow terminals
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe's YAML file.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a field, such as qat.fit.epochs=2; may be repeated."),
]
DataPath = Annotated[
    str | None,
    typer.Option("--data", metavar="DIR", help="The images: sets data.path, and data.dataset to imagefolder."),
]
Weights = Annotated[
    str | None,
    typer.Option("--weights", metavar="FILE", help="The teacher's weights: sets model.weights."),
]
Out = Annotated[str | None, typer.Option("--out", metavar="DIR", help="The folder of all runs: sets out.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/quickstart.")]
TrustCode = Annotated[bool, typer.Option("--trust-code", help="Allow the recipe to run code: a model's file.py.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Print every table, details and libraries' messages.")]
Tables = Annotated[bool, typer.Option("-v", "--verbose", help="Print every table, not only one screen.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        _print(f"compress {own_distribution().version}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: RecipePath,
    overrides: Set = None,
    data: DataPath = None,
    weights: Weights = None,
    out: Out = None,
    trust_code: TrustCode = False,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    stages: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A folder of stages that runs share; by default each run has its own."),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Run the recipe's missing stages and report the result. Fail where a target is missed."""
    _quiet(verbose)
    settings: list[tuple[str, str | None]] = [("--set", override) for override in overrides or ()]
    settings += [("--data", data), ("--weights", weights), ("--out", out), ("--until", until)]
    settings.append(("--stages", None if stages is None else str(stages)))
    command = _command(recipe, settings, trust_code=trust_code)
    with joined():
        resolved = first_decides(partial(read_recipe, recipe, overrides or (), data=data, weights=weights, out=out))
        from compress.pipeline import run_recipe

        code = run_recipe(resolved, trust_code=trust_code, until=until, verbose=verbose, command=command, stages=stages)
        if code:
            tell_torchrun("a target is missed: see the report above")
    raise typer.Exit(code)


@app.command()
def stage(
    name: Annotated[str, typer.Argument(metavar="STAGE", help="One of the recipe's stages.")],
    recipe: RecipePath,
    to: Annotated[Path, typer.Option("--out", metavar="DIR", help="The new stage folder.")],
    src: Annotated[
        Path | None, typer.Option("--src", metavar="DIR", help="The stage folder to start from; none for `source`.")
    ] = None,
    overrides: Set = None,
    data: DataPath = None,
    weights: Weights = None,
    trust_code: TrustCode = False,
    verbose: Verbose = False,
) -> None:
    """Run one stage alone, from one stage folder to a new one."""
    _quiet(verbose)
    with joined():
        resolved = first_decides(partial(read_recipe, recipe, overrides or (), data=data, weights=weights))
        from compress.pipeline import run_stage

        run_stage(resolved, name, src=src, out=to, trust_code=trust_code, verbose=verbose)


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Recipes.")],
    overrides: Set = None,
    data: DataPath = None,
    weights: Weights = None,
) -> None:
    """List all mistakes in recipes, without running them."""
    from compress.commands.check import checked, mistakes

    wrong: list[str] = []
    for file in files:
        try:
            recipe = read_recipe(file, overrides or (), data=data, weights=weights)
        except RecipeError as error:
            wrong.append(str(error))
            continue
        found = mistakes(recipe)
        wrong += [f"{file}: {mistake}" for mistake in found]
        if not found:
            for student, chain in recipe.chains().items():
                order = " → ".join(section.stage for section in chain.stages)
                _print(f"{file}: ok ({f'{student}: ' if student else ''}{order})")
    _print(checked())
    if wrong:
        fail("\n".join(wrong))


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Set = None,
    data: DataPath = None,
    weights: Weights = None,
    out: Out = None,
) -> None:
    """List which stages are cached and which would run, and why."""
    resolved = read_recipe(recipe, overrides or (), data=data, weights=weights, out=out)
    from compress.data.named import to_download
    from compress.pipeline import plan_recipe

    lines = {line.directory: line for chain in resolved.chains().values() for line in plan_recipe(chain)}
    for line in lines.values():
        _print(f"{'cached' if line.cached else 'runs':6}  {line.stage:7}  {line.directory}  ({line.reason})")
    folder = to_download(resolved.data.dataset, None if (path := resolved.data.path) is None else Path(path))
    if folder is not None:
        say(f"{resolved.data.dataset}: is not in {folder}; a run downloads it, or give its folder: DATA=/path/to/it")


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference page's tables instead.")] = False,
) -> None:
    """Print the recipe's JSON Schema, for editors."""
    if markdown:
        from compress.recipe.reference import reference

        sys.stdout.write(reference())
    else:
        _print(json.dumps(Recipe.model_json_schema(), indent=2, ensure_ascii=False))


@app.command()
def report(
    run_folder: RunFolder,
    verbose: Tables = False,
) -> None:
    """Write a finished run's page again and print its report."""
    _quiet(verbose=False)
    from compress.report.files import print_again

    print_again(run_folder, verbose=verbose)


@app.command()
def clean(
    run_folder: RunFolder,
    remove: Annotated[bool, typer.Option("--remove", help="Remove them; otherwise they are only listed.")] = False,
) -> None:
    """List a run's unused stages and leftovers, or remove them. No report uses these stages; killed runs left the rest."""
    from compress.commands import clean

    found = clean.remove(run_folder) if remove else clean.leftovers(run_folder)
    for path, reason, size in found:
        _print(f"{size / 1e6:8,.1f} MB  {path}  ({reason})")
    total = f"{sum(size for _, _, size in found) / 1e6:,.1f} MB"
    done = f"removed {total}" if remove else f"{total} in all; nothing was removed: add --remove"
    _print(done if found else "nothing to remove")


@app.command()
def init(
    weights: Annotated[
        str,
        typer.Option(
            "--weights",
            metavar="FILE",
            help="The trained network: a checkpoint, a .onnx or .pt2 file, or a folder of transformers.",
        ),
    ],
    data: Annotated[
        Path, typer.Option("--data", metavar="DIR", help="The images: train/CLASS/*, val/CLASS/*, or CLASS/*.")
    ],
    arch: Annotated[
        str | None, typer.Option(metavar="NAME", help="The network, if it is not recognized from the checkpoint.")
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(metavar="MS", help="Prune to this latency on this machine, instead of to half the MACs."),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The recipe to write.")] = Path(
        "recipe.yaml"
    ),
    trust_code: TrustCode = False,
) -> None:
    """Write a recipe for your checkpoint and your images. It names the network and estimates a run's time."""
    _quiet(verbose=False)
    from compress.commands.init.write import write_draft

    for line in write_draft(weights, data, out, arch=arch, latency_ms=latency, trust_code=trust_code):
        _print(line)


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="The recipe to copy, such as resnet50_int8.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="The new file; by default NAME.yaml here.")
    ] = None,
) -> None:
    """List this package's recipes, or copy one."""
    from compress.recipe import shipped

    if name is None:
        for line in shipped.listing():
            _print(line)
    else:
        _print(shipped.copy(name, to))


@app.command(name="export-data")
def export_data(
    run_folder: RunFolder,
    to: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")],
) -> None:
    """Write a run's validation images as a folder, for the gate."""
    from compress.run import open_run

    run = open_run(read_recipe(run_folder / RECIPE_YAML), trust_code=False, verbose=False)
    _print(f"{to}: {run.task.write(run.dataset, to):,} validation images of {run.dataset.name}")


@app.command()
def shards(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A folder of images or shards, or a URL of .tar files.")],
    to: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")],
    size_mb: Annotated[int, typer.Option("--size", min=1, metavar="MB", help="The size of a shard.")] = 500,
) -> None:
    """Pack images into shards (tars) with an index. For a URL's shards, write only the index."""
    from compress.commands.shards import write_shards

    _print(write_shards(data, to, size_mb=size_mb))


@app.command()
def publish(
    run_folder: RunFolder,
    to: Annotated[
        str,
        typer.Option("--to", metavar="DIR", help="A new folder, an older bundle to replace, or hf://USER/NAME."),
    ],
    key: Annotated[
        Path | None, typer.Option("--sign", metavar="KEY", help="Sign it with this private key (PEM, elliptic curve).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="For hf://: list what would be sent.")] = False,
) -> None:
    """Check a run's bundle and copy it to a folder or a hub. It is copied completely or not at all."""
    from compress.report.bundling import publish
    from compress.report.hub import HUB, publish_to_hub

    if to.startswith(HUB):
        for line in publish_to_hub(run_folder, to, key=key, dry_run=dry_run):
            _print(line)
    elif dry_run:
        fail(f"--dry-run: works with {HUB}USER/NAME only, got --to {to}; leave it out")
    else:
        publish(run_folder, Path(to), key=key)
        _print(to)


@app.command()
def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="A B...", help="Two or more runs' folders, such as runs/quickstart, or bundles."),
    ],
    page: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write a page.")] = None,
    document: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the numbers.")] = None,
    verbose: Tables = False,
) -> None:
    """Compare the results and recipes of runs or bundles."""
    from compress.report.comparison.files import compare_folders

    compare_folders(folders, page=page, document=document, verbose=verbose)


@app.command()
def search(
    file: Annotated[Path, typer.Argument(metavar="SEARCH", help="The search's YAML file.")],
    data: DataPath = None,
    weights: Weights = None,
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="The folder for the search's own folder.")] = "runs",
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="A database that workers share, such as postgresql://HOST/NAME.")
    ] = None,
    pick: Annotated[
        str | None, typer.Option(metavar="LIMITS", help='Publish the best trial within limits, as "latency < 5".')
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", metavar="DIR", help="The folder to publish it to.")] = None,
    trust_code: TrustCode = False,
    verbose: Verbose = False,
) -> None:
    """Try variants of a recipe and show the best trade-offs. The same command, elsewhere, adds a worker."""
    from compress.commands.search.trial import open_setup

    setup = open_setup(file, data=data, weights=weights, out=out, trust_code=trust_code)
    _quiet(verbose)
    from compress.commands.search import run

    done = run.search(setup, storage=storage, picked=pick, to=to, verbose=verbose)
    if isinstance(done, int):
        raise typer.Exit(done)
    _print(done)


@app.command()
def doctor(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder of all runs.")] = Path("runs"),
) -> None:
    """Check this machine: its packages, and what INT8 can gain. Say how to install what is missing."""
    from compress.commands.doctor import examine

    raise typer.Exit(examine(out))


def main() -> None:
    """Run the command line."""
    sys.exit(end(lambda: app(prog_name="compress"), repairs={}))  # `Commands` has the repairs


def _quiet(verbose: bool) -> None:
    from compress.logs.stage_log import quiet_libraries

    quiet_libraries(verbose)


def _command(recipe: Path, settings: list[tuple[str, str | None]], *, trust_code: bool) -> str:
    """Return the command line that repeats this run on the same number of processes."""
    words = ["compress", "run", str(recipe)]
    for option, value in settings:
        words += [option, value] if value is not None else []
    words += ["--trust-code"] if trust_code else []
    if ranks() > 1:
        machines = f"--nnodes={ranks() // local_ranks()}"
        words = ["torchrun", machines, f"--nproc-per-node={local_ranks()}", "--no-python", *words]
    return shlex.join(words)


def _print(text: object) -> None:
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    main()
