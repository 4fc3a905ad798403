"""The command `pyvolconv`. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    name="pyvolconv",
    help="3-D convolution for PyTorch: compare it with an LSTM, see where its time goes, tune a model, see what runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

USAGE_ERROR = 2
INTERRUPTED = 130


class Device(str, Enum):
    """Where the networks run."""

    cpu = "cpu"
    cuda = "cuda"


class BuiltIn(str, Enum):
    """The networks that `profile` knows."""

    cnn = "cnn"
    lstm = "lstm"


class LayoutOption(str, Enum):
    """Memory order of activations and weights."""

    ncdhw = "ncdhw"
    ndhwc = "ndhwc"


def _show_version(asked: bool) -> None:
    if asked:
        from .host import version

        typer.echo(f"pyvolconv {version('pyvolconv')}")
        raise typer.Exit


Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's own number by default.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of data, weights and order of samples.")]


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def compare(
    quick: Annotated[bool, typer.Option("--quick", help="At most a minute instead of five.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of report.html, PNGs and results.json.")] = Path("pyvolconv-report"),
    data: Annotated[Path | None, typer.Option(help="Your own volumes: an .npz of x (N, D, H, W) and y (N).")] = None,
    seed: Seed = 1,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Train for at most this many epochs, but without a time limit.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples per step; 32, or 8 with --quick on the CPU.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of Adam; 2.2e-5, which the digits were set for, or 1e-3 with --data.")
    ] = None,
    bidirectional: Annotated[bool, typer.Option("--bidirectional", help="Take the bidirectional LSTM.")] = False,
    threads: Threads = None,
    device: Annotated[Device, typer.Option(help="Where the networks run.")] = Device.cpu,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoints in the folder OUT.")] = False,
    backends: Annotated[
        str | None, typer.Option(help="Hand-written paths to time, comma-separated; all that can run by default.")
    ] = None,
) -> None:
    """Train a small 3-D CNN and an LSTM on the same volumes and say why one takes longer."""
    from rich.console import Console

    from .cost.report import write_report
    from .cost.terminal import print_result
    from .train.compare import compare as run
    from .train.plan import Settings

    console = Console()
    _writable(out)
    settings = Settings(
        quick=quick,
        out=out,
        data=data,
        seed=seed,
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size or (8 if quick and device is Device.cpu else 32),
        bidirectional=bidirectional,
        device=device.value,
        resume=resume,
        backends=tuple(name.strip() for name in backends.split(",") if name.strip()) if backends else None,
    )
    _prepare(threads, device)
    try:
        result = run(settings, console)
        page = write_report(result, out)
    except (ValueError, OSError) as error:
        _fail(str(error))
    print_result(console, result)
    console.print(f"Report: {page}", soft_wrap=True)
    if result.error:
        _fail(result.error)
    if result.interrupted:
        further = "--resume goes on with the training" if result.training else "the training had not begun"
        console.print(f"Interrupted: the report holds what was measured until then; {further}.")
        raise typer.Exit(INTERRUPTED)


@app.command()
def info() -> None:
    """Say what is installed, what this machine can run, and why the rest cannot."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from .info import backend_infos, installation

    console = Console()
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for label, value in installation().items():
        facts.add_row(label, Text(value))
    console.print(facts)
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("backend", "device", "chosen", "can run here"):
        table.add_column(column, no_wrap=column != "can run here", overflow="fold")
    for backend in backend_infos():
        yes = "yes" + (f", {backend.scope}" if backend.scope else "")
        able = Text(yes, style="green") if not backend.reason else Text(f"no: {backend.reason}", style="yellow")
        table.add_row(backend.name, backend.device, backend.role, able)
    console.print()
    console.print(table)


@app.command()
def profile(
    network: Annotated[BuiltIn, typer.Argument(help="The network to take apart.")],
    backend: Annotated[str | None, typer.Option(help="Force this path; torch itself when left out.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per training step.")] = 32,
    layout: Annotated[LayoutOption, typer.Option(help="Memory order of activations and weights.")] = LayoutOption.ncdhw,
    keep_pages: Annotated[
        bool, typer.Option(help="Let the C allocator keep freed pages between steps; on a GPU, torch's always does.")
    ] = False,
    threads: Threads = None,
    device: Annotated[Device, typer.Option(help="Where the network runs.")] = Device.cpu,
    seed: Seed = 0,
) -> None:
    """Take one training step apart: time, work, bytes, roofline and page faults per layer and pass."""
    from rich.console import Console

    from .cost.terminal import layer_table
    from .errors import UnsupportedProblemError
    from .train.steps import profile_built_in

    _prepare(threads, device)
    try:
        found = profile_built_in(network.value, backend, layout.value, batch_size, keep_pages, device.value, seed)
    except (ValueError, UnsupportedProblemError) as error:
        _fail(str(error))
    console = Console()
    console.print(layer_table(found, console.width))


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help="cnn, or package.module:callable that returns a torch.nn.Module.")],
    shapes: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="N,C,D,H,W", help="Shape of the input; once per argument of the model."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float64, float16 or bfloat16.")] = "float32",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Use channels_last_3d.")] = False,
    inference: Annotated[bool, typer.Option("--inference", help="Forward only, in eval mode.")] = False,
    high: Annotated[bool, typer.Option("--high", help='Tune for set_precision("high").')] = False,
    seconds: Annotated[float, typer.Option(min=0, help="Longest time that is spent on timing.")] = 60.0,
    again: Annotated[bool, typer.Option("--again", help="Also time what was timed before.")] = False,
    even_if_busy: Annotated[
        bool, typer.Option("--even-if-busy", help="Keep times also if other processes kept cores busy meanwhile.")
    ] = False,
    device: Annotated[Device, typer.Option(help="Where the model runs.")] = Device.cpu,
    threads: Threads = None,
) -> None:
    """Time every convolution of a model in every backend, torch included, and keep the fastest for later runs."""
    from rich.console import Console

    from .dispatch import set_precision
    from .tune_model import find_model, parse_inputs, print_tuned, tune_model

    _prepare(threads, device)
    console = Console()
    if high:
        set_precision("high")
    try:
        sizes = parse_inputs(model, shapes or [])
        found = tune_model(
            find_model(model, sizes),
            sizes,
            dtype=dtype,
            channels_last=channels_last,
            inference=inference,
            device=device.value,
            seconds=seconds,
            again=again,
            even_if_busy=even_if_busy,
            console=console,
        )
    except (ValueError, RuntimeError) as error:
        _fail(str(error))
    print_tuned(console, found)


def _prepare(threads: int | None, device: Device) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if device is Device.cuda and not torch.cuda.is_available():
        _fail("--device cuda: torch finds no CUDA device here; use --device cpu")


def _writable(folder: Path) -> None:
    """Find out before minutes of measuring whether the report can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".pyvolconv-write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        _fail(f"--out {folder}: cannot write there ({error.strerror or error}); give another folder")


def _fail(message: str) -> NoReturn:
    """One line on stderr, exit status 2."""
    typer.echo("pyvolconv: " + " ".join(message.split()), err=True)
    raise typer.Exit(USAGE_ERROR)


def main() -> None:
    """Entry point; Ctrl-C outside of a measurement ends with status 130 and no traceback."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
