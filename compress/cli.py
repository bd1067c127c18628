"""The command `compress`.

Exit codes: 0 done, 1 a target missed, 2 a user's mistake, 70 a crash, 130 interrupted. Only commands that need torch
import it, inside their functions.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.commands.outcome import Commands, fail, say
from compress.errors import RecipeError
from compress.ranks import first_decides, joined, local_ranks, ranks, tell_torchrun
from compress.recipe.read import read_recipe
from compress.recipe.schema import Recipe
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


def option(metavar: str, help: str, *names: str, least: int | None = None) -> Any:
    """Return an option with a value; without `names` it is called like its parameter."""
    return typer.Option(*names, metavar=metavar, help=help, min=least)


def switch(help: str, *names: str) -> Any:
    """Return an option without a value."""
    return typer.Option(*names, help=help)


def argument(metavar: str, help: str) -> Any:
    """Return a positional argument."""
    return typer.Argument(metavar=metavar, help=help)


RecipePath = Annotated[Path, argument("RECIPE", "The recipe's YAML file.")]
Set = Annotated[
    list[str] | None, option("PATH=VALUE", "Override a field, such as qat.fit.epochs=2; may be repeated.", "--set")
]
Images = Annotated[str | None, option("DIR", "The images: sets data.path, and data.dataset to imagefolder.")]
Weights = Annotated[str | None, option("FILE", "The teacher's weights: sets model.weights.")]
Out = Annotated[str | None, option("DIR", "The folder of all runs: sets out.")]
RunFolder = Annotated[Path, argument("RUN", "A run's folder, such as runs/quickstart.")]
NewFolder = Annotated[Path, argument("DIR", "The folder to make.")]
TrustCode = Annotated[bool, switch("Allow the recipe to run code: a model's file.py.", "--trust-code")]
Verbose = Annotated[bool, switch("Print every table, details and libraries' messages.", "-v", "--verbose")]
Tables = Annotated[bool, switch("Print every table, not only one screen.", "-v", "--verbose")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from compress.report.distribution import own_distribution

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
    data: Images = None,
    weights: Weights = None,
    out: Out = None,
    trust_code: TrustCode = False,
    until: Annotated[str | None, option("STAGE", "Stop after this stage.")] = None,
    stages: Annotated[
        Path | None, option("DIR", "A folder of stages that runs share; by default each run has its own.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Run the recipe's missing stages and report the result. Fail where a target is missed."""
    _quiet(verbose)
    settings: list[tuple[str, object]] = [("--set", override) for override in overrides or ()]
    settings += [("--data", data), ("--weights", weights), ("--out", out), ("--until", until), ("--stages", stages)]
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
    name: Annotated[str, argument("STAGE", "One of the recipe's stages.")],
    recipe: RecipePath,
    to: Annotated[Path, option("DIR", "The new stage folder.", "--out")],
    src: Annotated[Path | None, option("DIR", "The stage folder to start from; none for `source`.")] = None,
    overrides: Set = None,
    data: Images = None,
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
    files: Annotated[list[Path], argument("FILE...", "Recipes.")],
    overrides: Set = None,
    data: Images = None,
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
        for student, chain in recipe.chains().items() if not found else ():
            order = " → ".join(section.stage for section in chain.stages)
            _print(f"{file}: ok ({f'{student}: ' if student else ''}{order})")
    _print(checked())
    if wrong:
        fail("\n".join(wrong))


@app.command()
def plan(
    recipe: RecipePath, overrides: Set = None, data: Images = None, weights: Weights = None, out: Out = None
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
    markdown: Annotated[bool, switch("Print the reference page's tables instead.", "--markdown")] = False,
) -> None:
    """Print the recipe's JSON Schema, for editors."""
    if markdown:
        from compress.recipe.reference import reference

        sys.stdout.write(reference())
    else:
        _print(json.dumps(Recipe.model_json_schema(), indent=2, ensure_ascii=False))


@app.command()
def report(run_folder: RunFolder, verbose: Tables = False) -> None:
    """Write a finished run's page again and print its report."""
    _quiet(verbose=False)
    from compress.report.files import print_again

    print_again(run_folder, verbose=verbose)


@app.command()
def clean(
    run_folder: RunFolder,
    remove: Annotated[bool, switch("Remove them; otherwise they are only listed.", "--remove")] = False,
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
        str, option("FILE", "The trained network: a checkpoint, a .onnx or .pt2 file, or a folder of transformers.")
    ],
    data: Annotated[Path, option("DIR", "The images: class folders, or with masks, boxes or labels.csv.")],
    arch: Annotated[str | None, option("NAME", "The network, if it is not recognized from the checkpoint.")] = None,
    latency: Annotated[
        float | None, option("MS", "Prune to this latency on this machine, instead of to half the MACs.")
    ] = None,
    minutes: Annotated[
        float, option("N", "The time that a run may take on this machine; decides what it trains.", least=1)
    ] = 30,
    out: Annotated[Path, option("FILE", "The recipe to write.", "-o", "--out")] = Path("recipe.yaml"),
    trust_code: TrustCode = False,
) -> None:
    """Write a recipe for your checkpoint and your images that takes N minutes, and one for a night. It names the network."""
    _print(f"reads    {weights} and the images of {data}")
    sys.stdout.flush()  # before the libraries, whose import takes seconds
    _quiet(verbose=False)
    from rich.console import Console

    with Console(stderr=True).status("loads the libraries") as status:
        from compress.commands.init.write import write_draft

        for line in write_draft(
            weights,
            data,
            out,
            arch=arch,
            latency_ms=latency,
            minutes=minutes,
            trust_code=trust_code,
            tell=status.update,
        ):
            _print(line)
            sys.stdout.flush()


@app.command()
def recipes(
    name: Annotated[str | None, argument("[NAME]", "The recipe to copy, such as resnet50_int8.")] = None,
    to: Annotated[Path | None, option("FILE", "The new file; by default NAME.yaml here.", "-o", "--out")] = None,
) -> None:
    """List this package's recipes, or copy one."""
    from compress.recipe import shipped

    for line in shipped.listing() if name is None else (shipped.copy(name, to),):
        _print(line)


@app.command()
def export_data(run_folder: RunFolder, to: NewFolder) -> None:
    """Write a run's validation images as a folder, for the gate."""
    from compress.run import open_run

    run = open_run(read_recipe(run_folder / RECIPE_YAML), trust_code=False, verbose=False)
    _print(f"{to}: {run.task.write(run.dataset, to):,} validation images of {run.dataset.name}")


@app.command()
def shards(
    data: Annotated[str, argument("DATA", "A folder of images or shards, or a URL of .tar files.")],
    to: NewFolder,
    size_mb: Annotated[int, option("MB", "The size of a shard.", "--size", least=1)] = 500,
) -> None:
    """Pack images into shards (tars) with an index. For a URL's shards, write only the index."""
    from compress.commands.shards import write_shards

    _print(write_shards(data, to, size_mb=size_mb))


@app.command()
def publish(
    run_folder: RunFolder,
    to: Annotated[str, option("DIR", "A new folder, an older bundle to replace, or hf://USER/NAME.")],
    key: Annotated[Path | None, option("KEY", "Sign it with this private key (PEM, elliptic curve).", "--sign")] = None,
    dry_run: Annotated[bool, switch("For hf://: list what would be sent.", "--dry-run")] = False,
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
        list[Path], argument("A B...", "Two or more runs' folders, such as runs/quickstart, or bundles.")
    ],
    page: Annotated[Path | None, option("FILE", "Also write a page.", "--html")] = None,
    document: Annotated[Path | None, option("FILE", "Also write the numbers.", "--json")] = None,
    verbose: Tables = False,
) -> None:
    """Compare the results and recipes of runs or bundles."""
    from compress.report.comparison.show import compare_folders

    compare_folders(folders, page=page, document=document, verbose=verbose)


@app.command()
def search(
    file: Annotated[Path, argument("SEARCH", "The search's YAML file.")],
    data: Images = None,
    weights: Weights = None,
    out: Annotated[str, option("DIR", "The folder for the search's own folder.")] = "runs",
    storage: Annotated[
        str | None, option("URL", "A database that workers share, such as postgresql://HOST/NAME.")
    ] = None,
    pick: Annotated[str | None, option("LIMITS", 'Publish the best trial within limits, as "latency < 5".')] = None,
    to: Annotated[Path | None, option("DIR", "The folder to publish it to.")] = None,
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
    out: Annotated[Path, option("DIR", "The folder of all runs.")] = Path("runs"),
    speed: Annotated[
        bool, typer.Option("--speed", help="Also time three blocks in every provider, in a minute.")
    ] = False,
) -> None:
    """Check this machine: its packages, and what INT8 can gain. Say how to install what is missing."""
    from compress.commands.doctor import examine

    code = examine(out)
    if speed and code == 0:
        from compress.commands.kernels import as_text, measure

        sys.stdout.write(f"\n{as_text(measure())}\n")
    raise typer.Exit(code)


def main() -> None:
    """Run the command line."""
    sys.exit(end(lambda: app(prog_name="compress"), repairs={}))  # `Commands` has the repairs


def _quiet(verbose: bool) -> None:
    from compress.logs.stage_log import quiet_libraries

    quiet_libraries(verbose)


def _command(recipe: Path, settings: Sequence[tuple[str, object]], *, trust_code: bool) -> str:
    """Return the command line that repeats this run on the same number of processes."""
    words = ["compress", "run", str(recipe)]
    for name, value in settings:
        words += [name, str(value)] if value is not None else []
    words += ["--trust-code"] if trust_code else []
    if ranks() > 1:
        machines = f"--nnodes={ranks() // local_ranks()}"
        words = ["torchrun", machines, f"--nproc-per-node={local_ranks()}", "--no-python", *words]
    return shlex.join(words)


def _print(text: object) -> None:
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    main()
