"""Defines the ``grass-dist`` command. What a subcommand needs is imported inside it, so that ``--help`` is quick."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from grass_dist.doctor.program import doctor
from grass_dist.errors import ConfigError, GrassError
from grass_dist.terminal import console, for_terminal, one_sentence_errors, parse_size, table, warn
from grass_dist.version import __version__

app = typer.Typer(
    name="grass-dist",
    help="Fine-tune a language model a few layers at a time, chosen by their gradients (GRASS).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"grass-dist {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options before the subcommand."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, see configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.field=value]...", help="Settings that replace the file's.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="auto|PATH", help="Go on from the run's newest good checkpoint, or this one.")
    ] = None,
    _local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,  # deepspeed passes it
) -> None:
    """Fine-tune, alone or on all ranks of a launcher.

    For example torchrun --nproc-per-node 8 --no-python grass-dist train configs/fsdp2_grass.yaml.
    """
    from grass_dist.finetune.main import train as run

    raise typer.Exit(run(config, overrides or (), resume))


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[--active-layers N | --config FILE] [--report] [-m] SCRIPT [ARGS]...")
    ] = None,
) -> None:
    """Run a training script, unchanged, with GRASS switched on, as python -m grass_dist.run does."""
    from grass_dist.run import main

    main(arguments or ())


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, e.g. runs/demo.")]) -> None:
    """Write RUN/report.html, one self-contained page, and its pictures under RUN/plots.

    RUN is the folder of a run of grass-dist train, or the output_dir of a Trainer that had a GrassReport.
    """
    with one_sentence_errors():
        from grass_dist.report import build_report

        typer.echo(build_report(run))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or of one of its checkpoints.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; new, or empty.")],
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; left out, the newest good one.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights, e.g. 4GB or 500MB.")] = "4GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is in OUT.")] = False,
) -> None:
    """Write the model of a checkpoint to OUT as an ordinary Hugging Face folder."""
    with one_sentence_errors():
        from grass_dist.checkpoint.export import export as write

        shard_bytes = parse_size("--max-shard-size", max_shard_size)
        done = write(run, out, step=step, max_shard_bytes=shard_bytes, overwrite=overwrite, tell=warn)
        files = "1 file" if done.shards == 1 else f"{done.shards} files"
        typer.echo(f"{done.folder}: the model after step {done.step}, {_size(done.nbytes)} in {files}")


@app.command()
def convert(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or of one of its checkpoints.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder of a run, for --resume; or for engine.load_checkpoint.")
    ],
    universal: Annotated[
        bool, typer.Option("--universal", help="Write DeepSpeed's universal form, for engine.load_checkpoint.")
    ] = False,
) -> None:
    """Carry a checkpoint from DeepSpeed's own format to the one of all other backends, or to the universal one.

    A fine-tune under DeepSpeed goes on from either with --resume. With --universal a loop of your own does, too, with
    any number of ranks and at any ZeRO stage.
    """
    with one_sentence_errors():
        from grass_dist.checkpoint.export import find_checkpoint

        with find_checkpoint(run, None, warn) as checkpoint:
            if universal:
                from grass_dist.checkpoint.universal_files import to_universal

                made = to_universal(checkpoint.folder, out)
                typer.echo(f'{made}: load it by engine.load_checkpoint("{out}") with "load_universal": true')
                return
            from grass_dist.checkpoint.convert import to_dcp

            made = to_dcp(checkpoint.folder, out / "checkpoints")
        typer.echo(f"{made}: go on with it by --resume {out}")


@app.command()
def inspect(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or of one of its checkpoints.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="Leave the checksums of the files out.")] = False,
) -> None:
    """Show the checkpoints of a run, and what the newest good one holds; of a Trainer's run, the newest.

    Of a folder that engine.save_checkpoint was given, it shows where the method is in the newest checkpoint.
    """
    with one_sentence_errors():
        from grass_dist.checkpoint.engine_folder import read_engine_checkpoint
        from grass_dist.checkpoint.inspect import inspect_run
        from grass_dist.checkpoint.marker import newest_marked, read_marker

        run = newest_marked(run)
        if (marked := read_marker(run) or read_engine_checkpoint(run)) is not None:
            folder = Path(marked.get("folder", run))
            typer.echo(json.dumps(marked, allow_nan=False)) if as_json else _show_marker(folder, marked)
            return
        found = inspect_run(run, fast=fast)
        typer.echo(json.dumps(found, allow_nan=False)) if as_json else _show_checkpoints(found)
        if found["newest_good"] is None:
            raise GrassError(f"{run}: none of its checkpoints is good.")


@app.command()
def show(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the training program.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[SECTION.FIELD=VALUE]...")] = None,
) -> None:
    """Show the first training example as the model sees it, and which of its tokens are learnt. Trains nothing."""
    with one_sentence_errors():
        from grass_dist.finetune.config_file import load_config
        from grass_dist.finetune.data.loading import first_example
        from grass_dist.finetune.setup import load_tokenizer
        from grass_dist.finetune.tasks.choose import task_of

        settings = load_config(config, overrides or [])
        task = task_of(settings, load_tokenizer(settings.model))
        try:
            example = first_example(settings.data, task.tokenizer, settings.train.seed, task)
        except ConfigError as error:
            raise error if error.field.startswith(("data.", "model.")) else error.under("data") from None
        _show_example(task.shown(example))


app.command()(doctor)


@app.command()
def plan(
    gpus: Annotated[int, typer.Option(help="GPUs of the run, on all hosts.")],
    seq_len: Annotated[int, typer.Option(help="Tokens of a sequence.")],
    model: Annotated[str | None, typer.Option(help="Hugging Face name, folder, or config.json.")] = None,
    params: Annotated[str | None, typer.Option(help="Parameters of a Llama, e.g. 70B, instead of --model.")] = None,
    layers: Annotated[int | None, typer.Option(help="With --params: layers.")] = None,
    hidden: Annotated[int | None, typer.Option(help="With --params: width.")] = None,
    intermediate: Annotated[int | None, typer.Option(help="With --params: width of the feed-forward.")] = None,
    heads: Annotated[int | None, typer.Option(help="With --params: attention heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="With --params: heads of keys and values.")] = None,
    vocab: Annotated[int, typer.Option(min=1, help="With --params: entries of the vocabulary.")] = 32000,
    gpu_memory: Annotated[str | None, typer.Option(help="Memory of a GPU, e.g. 24GB or 80GiB.")] = None,
    gpus_per_host: Annotated[int, typer.Option(help="GPUs of a host.")] = 8,
    host_memory: Annotated[str | None, typer.Option(help="Memory of a host that may be pinned, e.g. 200GB.")] = None,
    micro_batch: Annotated[int, typer.Option(help="Sequences that a GPU takes at a time.")] = 1,
    accumulation: Annotated[int, typer.Option(help="Micro-batches of a step.")] = 1,
    backend: Annotated[str | None, typer.Option(help="fsdp2, hsdp, ddp, zero1, zero2, zero3 or single.")] = None,
    replicate: Annotated[int | None, typer.Option(help="With hsdp: replicas; left out, one on each host.")] = None,
    offload: Annotated[str | None, typer.Option(help="interval, stream or none; left out, chosen.")] = None,
    weights: Annotated[
        str, typer.Option(help="resident, or host: layers that do not train now rest there (single, ddp, zero3).")
    ] = "resident",
    checkpointing: Annotated[bool | None, typer.Option(help="Activation checkpointing; left out, chosen.")] = None,
    logits: Annotated[
        str, typer.Option(help="whole, or chunked: those of a few tokens at a time (model.logits).")
    ] = "whole",
    dtype: Annotated[str, typer.Option(help="Dtype of the weights: bfloat16 or float32.")] = "bfloat16",
    always_active: Annotated[
        str, typer.Option(help="Roles that GRASS trains at every step, or none.")
    ] = "embeddings,final_norm,lm_head,others",
    sampling_interval: Annotated[int, typer.Option(help="Steps between two switches to other layers.")] = 50,
    doctor_json: Annotated[Path | None, typer.Option("--from", help="JSON of grass-dist doctor: its speeds.")] = None,
    tflops: Annotated[float | None, typer.Option(help="TFLOP/s of a GPU by its data sheet.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Only the closed form, no simulation.")] = False,
    write: Annotated[Path | None, typer.Option(help="Write the recommended settings, for grass-dist train.")] = None,
    scale: Annotated[str | None, typer.Option(help="Numbers of GPUs to compare, e.g. 8..4096.")] = None,
    plot: Annotated[Path | None, typer.Option(help="With --scale: the picture, .png or .svg.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all of it as JSON.")] = None,
) -> None:
    """Tell before a run whether a model fits, what a step costs, and which settings to use. Needs no GPU."""
    given = dict(locals())
    with one_sentence_errors():
        from grass_dist.plan.command import PlanOptions, plan_run

        sizes = {"gpu_bytes": ("--gpu-memory", "gpu_memory"), "host_bytes": ("--host-memory", "host_memory")}
        for name, (option, key) in sizes.items():
            text = given.pop(key)
            given[name] = None if text is None else parse_size(option, text)
        plan_run(PlanOptions(doctor=given.pop("doctor_json"), **given), warn)
        if write is not None:  # the settings are read once as the training program will read them
            from grass_dist.finetune.config_file import load_config

            load_config(write)


def _show_example(found: Mapping[str, Any]) -> None:
    """Prints an example; what is learnt is green on a terminal, and between >>> and <<< elsewhere."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    text, learns = Text(), False
    for piece in [*found["pieces"], {"text": "", "learnt": False, "special": False}]:
        if piece["learnt"] != learns and not console.is_terminal:
            text.append(">>>" if piece["learnt"] else "<<<")
        learns = piece["learnt"]
        style = ("bold green" if learns else "") + (" underline" if piece["special"] else "")
        text.append("".join(c if c in "\n\t" else for_terminal(c) for c in piece["text"]), style=style)
    console.print(text, soft_wrap=True)
    marks = "in green" if console.is_terminal else "between >>> and <<<"
    typer.echo(f"{found['tokens']} tokens; {found['learnt']} of them are learnt ({marks}).")


def _show_checkpoints(found: Mapping[str, Any]) -> None:
    out = console(160)
    keys = ("step", "saved", "ranks", "backend", "format")
    health = "health" if found["checksums"] else "health (without checksums)"
    rows = [[*(row[key] for key in keys), _size(row["bytes"]), row["health"]] for row in found["checkpoints"]]
    out.print(table(f"Checkpoints of {found['run']}", (*keys, "size", health), rows))
    if (good := found["newest_good"]) is None:
        return
    for line in _about(good):
        out.print(for_terminal(line), markup=False, soft_wrap=True)
    rows = [[layer["layer"], *_cells(layer), layer["name"]] for layer in good["layers"]]
    rows += [
        ["", role["times_trained"], "", "", "", _size(role["state_bytes"]), role["name"]] for role in good["roles"]
    ]
    columns = ("layer", "times trained", "importance", "probability", "trains", "state", "name")
    out.print(table(f"Layers after step {good['step']}", columns, rows))


def _show_marker(folder: Path, marked: Mapping[str, Any]) -> None:
    """Shows a checkpoint that Trainer, Accelerate or DeepSpeed has written."""
    out = console(160)
    layers = ", ".join(map(str, marked["active_layers"])) or "none"
    told = f"{folder}: a checkpoint of a GRASS run, {marked['step']} steps done, phase {marked['phase']}, "
    for line in (f"{told}round {marked['round']}, layers that train: {layers}.", "Go on with these settings:"):
        out.print(for_terminal(line), markup=False, soft_wrap=True)
    for name, value in marked["config"].items():
        out.print(for_terminal(f"  {name}: {json.dumps(value)}"), markup=False, soft_wrap=True)


def _about(good: Mapping[str, Any]) -> Iterator[str]:
    phase = f", phase {good['phase']}" if good["phase"] else ""
    round = f", round {good['round']}" if good["round"] is not None else ""
    yield (
        f"The newest good one, {good['folder']}: {good['step']} steps done{phase}{round}, {good['skipped']} skipped, "
        f"{good['dropped']} measurements dropped, {_size(good['state_bytes'])} of optimizer state."
    )
    if good["next"]:
        yield f"Next, layers {good['next']['layers']} train, from step {good['next']['from_step']} of the method on."
    yield from good["notes"]


def _cells(layer: Mapping[str, Any]) -> list[Any]:
    importance, p = layer["importance"], layer["probability"]
    trains = ", ".join(word for word in ("now", "next") if layer[word])
    numbers = [None if importance is None else f"{importance:.3g}", None if p is None else f"{p:.2%}"]
    return [layer["times_trained"], *numbers, trains, _size(layer["state_bytes"])]


def _size(nbytes: int | None) -> str | None:
    if nbytes is None:
        return None
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


if __name__ == "__main__":
    app()
