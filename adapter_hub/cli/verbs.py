"""The command line: one verb a public method of Hub. Parses, prints, maps errors to exit codes; decides nothing.

Help and completion stay quick: torch, SQLAlchemy and the hub itself are imported inside the verbs that need them.
Exit codes: 0 done; 1 some rows failed, damage was found, or what was to be promoted was not; 2 bad use; 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from adapter_hub.cli.arguments import (
    AsJson,
    File,
    Generation,
    Name,
    Proposed,
    Rate,
    Reason,
    Ref,
    Registry,
    Texts,
    Truncate,
    complete_ref,
    json_object,
    label_names,
    read_inputs,
    read_utf8,
    shown_url,
)
from adapter_hub.cli.console import (
    accepted,
    alarmed,
    attended,
    calibrated,
    decisions,
    effects,
    emit,
    evaluated,
    events,
    explanations,
    facts,
    in_full,
    learned,
    line,
    observed,
    piece,
    predictions,
    progress_bar,
    proposed,
    reembedded,
    verified,
    versions,
)
from adapter_hub.errors import HubError, InvalidInput, counted

if TYPE_CHECKING:
    from adapter_hub.chat import Conversation
    from adapter_hub.continual.alerts import Sink
    from adapter_hub.hub import Hub
    from adapter_hub.training.config import TrainConfig

JSON = Any
# The libraries' own bars and notices would stand between a person and the answer.
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
# torch's threads sleep while they wait: on shared cores, spinning takes them from the very thread that is waited for.
SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE"}
OBSERVATIONS_SHOWN = 100
NEXT = 'Set observe = "text" and keep = "text" in hub.toml, and restart what serves: what is answered from then on is logged.'
NOTHING_LOGGED = f'nothing was logged: hub.toml says observe = "off". {NEXT}'
SOME_FAILED, BAD_USE, BROKEN_PIPE, INTERRUPTED = 1, 2, 141, 130


class _Verbs(TyperGroup):
    """The border: a HubError becomes one line on stderr and exit code 2; a closed pipe or Ctrl-C ends quietly."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except HubError as error:
            _fail(str(error))
        except BrokenPipeError:
            # `adapter-hub list | head`: point stdout at nothing, or the interpreter complains when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from None
        except OSError as error:
            _fail(f"{error.filename}: {error.strerror}." if error.filename else str(error))
        except KeyboardInterrupt:
            typer.echo("interrupted.", err=True)
            raise typer.Exit(INTERRUPTED) from None


def _fail(message: str) -> None:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(BAD_USE)


app = typer.Typer(
    cls=_Verbs, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A registry of LoRA adapters on one frozen base model, and the router that picks one for each input.",
)


def main() -> None:
    app(prog_name="adapter-hub")


def _verb(name: str, example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a verb; its help ends with the example."""
    return app.command(name, epilog=f"Example:\n\n\b\n  {example}")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(sys.modules["adapter_hub"].__version__)    # imported already: this module is in it
        raise typer.Exit()


@app.callback()
def _before_the_verb(
    ctx: typer.Context,
    registry: Annotated[str, typer.Option(help="Registry folder, or database URL.", envvar="ADAPTER_HUB_REGISTRY")] = "registry",
    artifacts: Annotated[str, typer.Option(help="Folder of the files, where --registry is a URL.", envvar="ADAPTER_HUB_ARTIFACTS")] = "",
    device: Annotated[str, typer.Option(help="Where models run: cpu, cuda, cuda:1.", envvar="ADAPTER_HUB_DEVICE")] = "cpu",
    precision: Annotated[
        str, typer.Option(help="How the base is held: float32, bfloat16, float16, int8, nf4.", envvar="ADAPTER_HUB_PRECISION")
    ] = "float32",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say on stderr what is being done.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    if verbose:
        logging.getLogger("adapter_hub").setLevel(logging.INFO)    # the libraries' own steps are not the verb's
    for variable, value in (QUIET | SLEEPING).items():
        os.environ.setdefault(variable, value)
    ctx.obj = {"artifacts": artifacts or None, "device": device, "precision": precision}
    # A --registry before the verb is the default of the one after it.
    ctx.default_map = {verb: {"registry": registry} for verb in ctx.command.list_commands(ctx)}  # type: ignore[attr-defined]


def _open(ctx: typer.Context, registry: str, slots_max: int | None = None) -> Hub:
    from adapter_hub.hub import Hub

    return Hub.open(registry, slots_max=slots_max, **ctx.find_root().obj)


# ---- verbs: make and fill a registry --------------------------------------------------------------------------------


@_verb("init", "adapter-hub init registry --base-model sentence-transformers/all-MiniLM-L6-v2")
def init(
    ctx: typer.Context,
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder to make; by default the registry named otherwise.")] = "",
    base_model: Annotated[str, typer.Option(help="Hub id or folder of the frozen base model; by default all-MiniLM-L6-v2.")] = "",
    encoder: Annotated[str, typer.Option(help='Hub id or folder of the text encoder, or "hash"; by default all-MiniLM-L6-v2.')] = "",
    max_tokens: Annotated[int | None, typer.Option(help="Longest input; by default the base model's.", min=1)] = None,
    keep: Annotated[Literal["vectors", "text"], typer.Option(help="What is stored of examples; text: learning on replays them.")] = "vectors",
    database: Annotated[str, typer.Option(help="PostgreSQL URL for the catalogue; by default it is a file in PATH.")] = "",
    registry: Registry = "registry", as_json: AsJson = False,
) -> None:
    """Make a registry for one base model and one encoder."""
    from adapter_hub.hub import Hub

    chosen: dict[str, Any] = {key: value for key, value in {"base_model": base_model, "encoder": encoder}.items() if value}
    chosen |= {key: ctx.find_root().obj[key] for key in ("device", "precision")}
    hub = Hub.create(path or registry, max_tokens=max_tokens, database=database or None, policy={"keep": keep}, **chosen)
    made = {"registry": path or registry, "base_model": hub.config.base_model, "base_fingerprint": hub.config.base_fingerprint}
    emit(made | {"encoder": hub.config.encoder, "max_tokens": hub.config.max_tokens, "keep": hub.config.keep}, as_json, facts)


@_verb("register", "adapter-hub register banking ./my-peft-folder --examples train.jsonl --labels labels.json")
def register(
    ctx: typer.Context,
    name: Name,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help='PEFT folder, or hub repository id "org/name@revision".')],
    examples: Annotated[str, typer.Option(help="Rows with `text` (and `label`) that tell the router what belongs to it.")] = "",
    description: Annotated[str, typer.Option(help="What the adapter is for; with the labels it routes where there are no examples.")] = "",
    evaluation: Annotated[str, typer.Option(help="Ten or more further rows that belong to it: thresholds are measured on them.")] = "",
    negatives: Annotated[str, typer.Option(help="Rows that do not belong to it: they take off its scores, and nobody else's.")] = "",
    labels: Annotated[str, typer.Option(help="The head's outputs in order: a,b,c, or a file (JSON list, or one a line).")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
    promote: Annotated[bool, typer.Option(help="Route to it at once, or keep it as a candidate.")] = True,
    assume_base: Annotated[bool, typer.Option("--assume-base", help="Its config names another base with the same weights.")] = False,
    license: Annotated[str | None, typer.Option(help="SPDX id or text.")] = None,
    prompt_template: Annotated[str | None, typer.Option(help='Text with {text} in it, put around each input.')] = None,
    generation: Generation = "",
    problem_type: Annotated[str | None, typer.Option(help="Of a text classifier's head: multi_label_classification, regression, …")] = None,
    routed: Annotated[bool, typer.Option("--routed/--by-name", help="Inputs are routed to it, or only its name reaches it.")] = True,
    registry: Registry = "registry", as_json: AsJson = False,
) -> None:
    """Check an adapter, then store it as the next version of NAME."""
    from adapter_hub.examples import read_examples

    known, held_out, refused = (read_examples(Path(rows)) if rows else [] for rows in (examples, evaluation, negatives))
    settings, hub = json_object("--generation", generation), _open(ctx, registry)
    ref = hub.register(
        name, source, known, description, labels=label_names(labels), tags=tag or (), promote=promote, assume_base=assume_base,
        evaluation=held_out, negatives=refused, license=license, prompt_template=prompt_template, generation=settings,
        problem_type=problem_type, routed=routed,
    )
    live = hub.registry.aliases(ref.name).get("production") == ref.version
    said = f"registered {ref}" + ("" if live == promote else f", not promoted: see `adapter-hub effect {ref}`")
    if routed and not known and not description.strip():
        said += "; only its name reaches it: `adapter-hub teach` shows the router what belongs to it"
    kept = len(hub.state(ref).evaluation) if routed else len(held_out)
    said += f"; {kept} of {counted(len(held_out), 'evaluation input is', 'evaluation inputs are')} kept" if held_out else ""
    emit({"ref": ref, "production": live, "examples": len(known), "evaluation": kept}, as_json, lambda _: line(said))


@_verb("learn", "adapter-hub learn travel train.jsonl --validation held_out.jsonl")
def learn(
    ctx: typer.Context,
    name: Name,
    train: Annotated[
        str,
        typer.Argument(metavar="TRAIN", help="Rows with `text` and `label`: JSONL, CSV or Parquet; or `labels`, `spans`, `messages`, not in CSV."),
    ],
    validation: Annotated[str, typer.Option(help="Rows to judge it on; by default some are held out of TRAIN.")] = "",
    evaluation: Annotated[str, typer.Option(help="Further rows that have no part in it: thresholds and `evaluate` are measured on them.")] = "",
    config: Annotated[str, typer.Option(help='fast, balanced or thorough; or settings: JSON, e.g. {"epochs": 5}, or a .json or .toml file.')] = "",
    promote: Annotated[Literal["auto", "always", "never"], typer.Option(help="auto: unless the gate sees harm in it.")] = "auto",
    start: Annotated[
        Literal["auto", "warm", "cold", "transfer"],
        typer.Option(help="NAME in production: warm, its weights; cold, without what it knew. A new one: transfer, from the nearest if it helps."),
    ] = "auto",
    checkpoints: Annotated[str, typer.Option(metavar="DIR", help="Keep each epoch there: the same command goes on after it was killed.")] = "",
    task_type: Annotated[
        str | None, typer.Option(help="SEQ_CLS, TOKEN_CLS, CAUSAL_LM or SEQ_2_SEQ_LM; by default NAME's in production, of a new one SEQ_CLS.")
    ] = None,
    problem_type: Annotated[str | None, typer.Option(help="Of SEQ_CLS: multi_label_classification, regression; by default one label.")] = None,
    prompt_template: Annotated[str | None, typer.Option(help='Text with {text} in it, put around each input.')] = None,
    generation: Generation = "",
    routed: Annotated[
        bool | None, typer.Option("--routed/--by-name", help="Inputs are routed to it, or only its name reaches it; by default as in production.")
    ] = None,
    registry: Registry = "registry", as_json: AsJson = False,
) -> None:
    """Train an adapter on rows with targets and register it.

    A NAME in production learns on: it keeps its labels, and its examples where their texts are kept. A gate compares the result with what is
    there and says why it promotes, holds or rejects it. Exit code 1 where it is not promoted and was to be.
    """
    settings = _train_config(config)
    kept: dict[str, Any] = {"generation": json_object("--generation", generation)} if generation else {}
    if evaluation:
        from adapter_hub.examples import read_examples

        kept["evaluation"] = read_examples(Path(evaluation))
    report = _open(ctx, registry).learn(
        name, train=train, validation=validation or None, config=settings, promote=promote, start=start, checkpoint_folder=checkpoints or None,
        task_type=task_type, problem_type=problem_type, prompt_template=prompt_template, routed=routed, **kept,
    )  # fmt: skip
    emit(report, as_json, learned)
    if not report.promoted and promote != "never":
        raise typer.Exit(SOME_FAILED)


def _train_config(text: str) -> TrainConfig | None:
    """A preset's name, settings as JSON on the command line, or a .json or .toml file of them. Raises InvalidInput."""
    if not text:
        return None
    from adapter_hub.training.config import PRESETS, TrainConfig

    if text in PRESETS:
        return TrainConfig.preset(text)
    file, presets = text.endswith((".json", ".toml")), f"There are the presets {', '.join(PRESETS)}."
    if file and not os.path.isfile(text):
        raise InvalidInput(f"there is no file {text[:200]!r}.", hint=presets)
    if not file and not text.lstrip().startswith("{"):
        raise InvalidInput(f"--config {text[:200]!r} is no preset, no JSON, and no .json or .toml file.", hint=presets)
    written = read_utf8(text) if file else text
    if not text.endswith(".toml"):
        return TrainConfig.from_dict(json_object("--config", written) or {})
    try:
        return TrainConfig.from_dict(tomllib.loads(written))
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{text} is not TOML: {error}.") from error


@_verb("teach", "adapter-hub teach banking more.jsonl --negatives wrong.jsonl")
def teach(
    ctx: typer.Context,
    ref: Ref,
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="Rows with `text` (and `label`) that belong to it.")] = "",
    negatives: Annotated[str, typer.Option(help="Rows that do not belong to it; an example among them is forgotten.")] = "",
    registry: Registry = "registry", as_json: AsJson = False,
) -> None:
    """Show the router more inputs that belong to REF, or do not.

    The result is a new version with the same weights, in production where REF is.
    """
    from adapter_hub.examples import read_examples

    known, refused = (read_examples(Path(rows)) if rows else [] for rows in (file, negatives))
    taught = _open(ctx, registry).teach(ref, known, negatives=refused)
    said = f"{taught} knows {counted(len(known), 'more input')}" + (f", and {len(refused)} that are none of its" if refused else "")
    emit({"ref": taught, "examples": len(known), "negatives": len(refused)}, as_json, lambda _: line(said))


# ---- verbs: look ----------------------------------------------------------------------------------------------------


@_verb("list", "adapter-hub list --tag clinc150 --json")
def list_versions(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Only versions of this name.", autocompletion=complete_ref)] = None,
    base: Annotated[str | None, typer.Option(help="Only adapters of this base model.")] = None,
    tag: Annotated[str | None, typer.Option(help="Only adapters with this tag.")] = None,
    task_type: Annotated[str | None, typer.Option(help="SEQ_CLS, TOKEN_CLS, CAUSAL_LM, SEQ_2_SEQ_LM or FEATURE_EXTRACTION.")] = None,
    registry: Registry = "registry", as_json: AsJson = False,
) -> None:
    """List the versions, newest of each name last."""
    found = _open(ctx, registry).list(name, base=base, tag=tag, task_type=task_type)
    filtered = any(value is not None for value in (base, tag, task_type))
    emit(found, as_json, versions if found or not filtered else lambda _: line("no version matches; without a filter `adapter-hub list` shows all."))


@_verb("show", "adapter-hub show banking@2")
def show(ctx: typer.Context, ref: Ref, registry: Registry = "registry", as_json: AsJson = False) -> None:
    """Show the facts of one version."""
    emit(_open(ctx, registry).show(ref), as_json, facts)


@_verb("history", "adapter-hub history banking")
def history(ctx: typer.Context, name: Name, registry: Registry = "registry", as_json: AsJson = False) -> None:
    """Show what happened to NAME: alias moves, retirements, purges."""
    emit(_open(ctx, registry).history(name), as_json, events)


# ---- verbs: aliases and lifetimes -----------------------------------------------------------------------------------


@_verb("promote", "adapter-hub promote banking@3 --reason 'better on the June rows'")
def promote(ctx: typer.Context, ref: Ref, reason: Reason = "", registry: Registry = "registry", as_json: AsJson = False) -> None:
    """Make REF the version of its name that is routed."""
    _moved("production", _open(ctx, registry).promote(ref, reason=reason), as_json)


@_verb("rollback", "adapter-hub rollback banking --reason 'complaints since noon'")
def rollback(ctx: typer.Context, name: Name, reason: Reason = "", registry: Registry = "registry", as_json: AsJson = False) -> None:
    """Move production back to the version before."""
    _moved("production", _open(ctx, registry).rollback(name, reason=reason), as_json)


@_verb("alias", "adapter-hub alias banking staging 4")
def alias(
    ctx: typer.Context,
    name: Name,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="E.g. staging; name@staging then means that version.")],
    version: Annotated[int, typer.Argument(metavar="VERSION", help="The version number.", min=1)],
    reason: Reason = "",
    registry: Registry = "registry", as_json: AsJson = False,
) -> None:
    """Let ALIAS name one version."""
    _moved(alias, _open(ctx, registry).set_alias(name, alias, version, reason=reason), as_json)


def _moved(alias: str, ref: object, as_json: bool) -> None:
    emit({"alias": alias, "ref": ref}, as_json, lambda _: line(f"{alias} is now {ref}"))


@_verb("retire", "adapter-hub retire banking@1 --reason 'superseded'")
def retire(ctx: typer.Context, ref: Ref, reason: Reason = "", registry: Registry = "registry", as_json: AsJson = False) -> None:
    """Keep REF, but never route to it again."""
    retired = _open(ctx, registry).retire(ref, reason=reason)
    emit({"retired": retired}, as_json, lambda _: line(f"retired {retired}"))


@_verb("purge", "adapter-hub purge banking@1 --yes --reason 'erasure request'")
def purge(
    ctx: typer.Context,
    ref: Ref,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    descendants: Annotated[bool, typer.Option("--descendants", help="Also the versions that hold its data.")] = False,
    reason: Reason = "",
    registry: Registry = "registry", as_json: AsJson = False,
) -> None:
    """Erase REF's weights, vectors and text; a tombstone stays."""
    what = f"{ref} and of every version that holds its data" if descendants else ref
    _confirm(yes, f"Erase the weights, vectors and text of {what}?", f"purging {ref}", "purged")
    purged = _open(ctx, registry).purge(ref, reason=reason, descendants=descendants)
    emit({"purged": purged}, as_json, lambda _: line(f"purged {purged}"))


def _confirm(yes: bool, question: str, doing: str, done: str) -> None:
    """Raises InvalidInput where it may not be done."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise InvalidInput(f"{doing} cannot be undone, and there is no terminal to ask on.", hint="Pass --yes.")
    if not typer.confirm(f"{question} This cannot be undone.", err=True):
        raise InvalidInput(f"nothing was {done}.")


@_verb("calibrate", "adapter-hub calibrate")
def calibrate(ctx: typer.Context, registry: Registry = "registry", as_json: AsJson = False) -> None:
    """Fit scores and thresholds anew, and show what that moves.

    They are fitted on the versions in production; the record gets the next number. Shown are the thresholds before and after, and
    the adapters (at most 5) whose inputs are let in more or less often.
    """
    emit(_open(ctx, registry).calibrate(), as_json, calibrated)


@_verb("effect", "adapter-hub effect travel@2")
def effect(ctx: typer.Context, ref: Ref, registry: Registry = "registry", as_json: AsJson = False) -> None:
    """Show what REF takes, or would take, from each adapter in production.

    Of each adapter's inputs: the share that REF takes, that goes to the adapter before, and after; contradictions are examples that both
    have. Where another version of its name is in production, REF stands in its place, and what that one took is not counted again.
    """
    emit(_open(ctx, registry).effect(ref), as_json, effects)


@_verb("reembed", "adapter-hub reembed ./my-encoder --reason 'the old one knows no French'")
def reembed(
    ctx: typer.Context,
    encoder: Annotated[str, typer.Argument(metavar="ENCODER", help='Hub id or folder of the text encoder, or "hash".')],
    reason: Reason = "",
    registry: Registry = "registry", as_json: AsJson = False,
) -> None:
    """Go over to another text encoder: what is in production is encoded anew.

    It needs the texts of all examples (keep = "text" in hub.toml), or descriptions in their place, and makes new versions with the
    same weights. Interrupted, it goes on when it is called again; called with the old encoder, it goes back.
    """
    emit(_open(ctx, registry).reembed(encoder, reason=reason), as_json, reembedded)


@_verb("export", "adapter-hub export banking@2 ./banking-peft")
def export(
    ctx: typer.Context,
    ref: Ref,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder to write: a plain PEFT adapter.")],
    registry: Registry = "registry", as_json: AsJson = False,
) -> None:
    """Copy REF to a folder that PEFT reads."""
    hub = _open(ctx, registry)
    found = hub.registry.resolve(ref)
    written = hub.export(found, folder)
    emit({"ref": found, "folder": written}, as_json, lambda _: line(f"exported {found} to {written}"))


# ---- verbs: the daily work ------------------------------------------------------------------------------------------


@_verb("route", "adapter-hub route --explain 'my card was declined abroad'")
def route(
    ctx: typer.Context,
    texts: Texts = None,
    file: File = "",
    k: Annotated[int | None, typer.Option("--k", help="How many candidates to show; by default 1, with --explain 3.", min=1)] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say why: in words, with the candidates and their closest exemplars.")] = False,
    max_false_reject: Rate = None,
    registry: Registry = "registry", as_json: AsJson = False,
) -> None:
    """Say which adapter each input belongs to, if any."""
    inputs, hub = read_inputs(texts, file), _open(ctx, registry)
    found: Sequence[Any] = (
        [hub.explain(text, k=k or 3, max_false_reject=max_false_reject) for text in inputs]
        if explain
        else hub.route(inputs, k=k or 1, max_false_reject=max_false_reject)
    )
    emit(_beside(inputs, found), as_json, explanations if explain or (k or 1) > 1 else decisions)


Ask = Annotated[int, typer.Option(metavar="K", help="Let up to K candidates that come near answer, and judge their labels with the router.", min=1)]


@_verb("predict", "adapter-hub predict 'my card was declined abroad' --json")
def predict(
    ctx: typer.Context,
    texts: Texts = None,
    file: File = "",
    adapter: Annotated[str, typer.Option(metavar="REF", help="Answer with this one; do not route.", autocompletion=complete_ref)] = "",
    mix: Annotated[int, typer.Option("--mix", metavar="K", help="Let the K best candidates answer together, where they can.", min=1)] = 1,
    ask: Ask = 1,
    generation: Generation = "",
    truncate: Truncate = True,
    stream: Annotated[bool, typer.Option("--stream", help="Write the text of one input as it comes, and nothing else.")] = False,
    max_false_reject: Rate = None,
    registry: Registry = "registry", as_json: AsJson = False,
) -> None:
    """Answer each input with the adapter it belongs to."""
    inputs, settings = read_inputs(texts, file), json_object("--generation", generation)
    if stream and (as_json or len(inputs) != 1 or ask > 1):
        raise InvalidInput("--stream writes the text of one input as it comes.", hint="Give one input, and neither --json nor --ask.")
    hub = _open(ctx, registry)
    asked: dict[str, Any] = {"adapters": adapter or None, "max_false_reject": max_false_reject, "generation": settings, "mix": mix}
    asked["truncate"] = truncate
    if stream:
        for text in hub.stream(inputs[0], **asked):
            piece(text)
        piece("\n")
        return
    found = hub.predict(inputs, **asked, ask=ask)
    emit(_beside(inputs, found), as_json, predictions)


def _beside(inputs: Sequence[str | Conversation], found: Iterable[Any]) -> list[dict[str, JSON]]:
    given = ({"text": one} if isinstance(one, str) else {"messages": one.to_json()} for one in inputs)
    return [one | item.to_json() for one, item in zip(given, found, strict=True)]


@_verb("run", "adapter-hub run inbox.jsonl answers.jsonl --max-false-reject 0.05")
def run(
    ctx: typer.Context,
    input: Annotated[str, typer.Argument(metavar="INPUT", help="Rows with `text`, or a conversation's `messages`: .jsonl, .csv or .parquet.")],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Where the answered rows go; its suffix says the format.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an OUTPUT that exists.")] = False,
    ask: Ask = 1,
    generation: Generation = "",
    truncate: Truncate = True,
    max_false_reject: Rate = None,
    slots_max: Annotated[int | None, typer.Option(min=1, help="Adapters that stay loaded at once, 64 by default.")] = None,
    registry: Registry = "registry", as_json: AsJson = False,
) -> None:
    """Answer every row of a file. Bad rows go to OUTPUT.errors.jsonl; exit code 1 where there are some."""
    settings = json_object("--generation", generation)
    hub = _open(ctx, registry, slots_max)
    with progress_bar("rows", visible=sys.stderr.isatty()) as show:
        try:
            summary = hub.run(
                input, output, resume=resume, overwrite=overwrite, max_false_reject=max_false_reject, generation=settings,
                truncate=truncate, ask=ask, progress=lambda at: show(at.rows, at.share),
            )
        except KeyboardInterrupt:
            again = _resuming(ctx, registry, input, output, max_false_reject, generation, slots_max, truncate, ask)
            typer.echo(f"interrupted; what is done is kept. Go on with: {again}", err=True)
            raise typer.Exit(INTERRUPTED) from None
    emit(summary, as_json, facts)
    if summary.failed:
        raise typer.Exit(SOME_FAILED)


def _resuming(
    ctx: typer.Context, registry: str, input: str, output: str, max_false_reject: float | None, generation: str, slots_max: int | None,
    truncate: bool, ask: int,
) -> str:
    """The command that goes on with this job, each option that it depends on included."""
    before = {"--registry": shown_url(registry)} | {f"--{key}": value for key, value in ctx.find_root().obj.items()}
    after = {"--max-false-reject": max_false_reject, "--generation": generation or None, "--slots-max": slots_max, "--ask": ask if ask > 1 else None}
    words: list[Any] = ["adapter-hub", *_options(before), "run", input, output, "--resume", *_options(after)]
    words += [] if truncate else ["--no-truncate"]
    return shlex.join(map(str, words))


def _options(values: dict[str, Any]) -> list[Any]:
    return [word for option, value in values.items() if value is not None for word in (option, value)]


@_verb("evaluate", "adapter-hub evaluate banking --data held_out.jsonl")
def evaluate(
    ctx: typer.Context,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[REF]...", help="Only these: name, or name@3; by default all.", autocompletion=complete_ref)
    ] = None,
    data: Annotated[
        str,
        typer.Option(metavar="FILE", help="Rows with `text`, `label` and, unless all are the named one's, `adapter`; by default the sets kept."),
    ] = "",
    max_false_reject: Rate = 0.0, ask: Ask = 1,
    registry: Registry = "registry", as_json: AsJson = False,
) -> None:
    """Measure the adapters on labelled rows, each when it is named (oracle) and as routed.

    Without --data on the evaluation sets that are kept with them.
    """
    found = _open(ctx, registry).evaluate(data or None, names=names or None, max_false_reject=max_false_reject, ask=ask)
    emit(found, as_json, evaluated)


# ---- verbs: what was answered ---------------------------------------------------------------------------------------


@_verb("observations", "adapter-hub observations --adapter banking --since 2026-03-01 --json")
def observations(
    ctx: typer.Context,
    adapter: Annotated[str, typer.Option(metavar="REF", help="Only what it answered: name, or name@3.", autocompletion=complete_ref)] = "",
    since: Annotated[str, typer.Option(metavar="WHEN", help="Only from then on: 2026-03-01, or 2026-03-01T12:00 (UTC).")] = "",
    before: Annotated[str, typer.Option(metavar="WHEN", help="Only earlier ones.")] = "",
    limit: Annotated[int | None, typer.Option(metavar="N", help="At most so many, by default 100.", min=1)] = None,
    forget: Annotated[bool, typer.Option("--forget", help="Erase them, with their texts and the feedback, instead of showing them.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    registry: Registry = "registry", as_json: AsJson = False,
) -> None:
    """Show what was answered and why, newest first, with the feedback to it.

    It is logged where hub.toml says so: observe = "decisions", "hash" or "text".
    """
    if forget and (since or limit is not None):
        raise InvalidInput("--forget goes with --before and --adapter.", hint="Leave out --since and --limit.")
    if forget:
        _confirm(yes, "Erase what was logged, with its texts and the feedback to it?", "erasing what was logged", "erased")
    hub = _open(ctx, registry)
    if forget:
        gone = hub.forget_observations(before or None, adapter or None)
        emit({"forgotten": gone}, as_json, lambda _: line(f"forgotten: {gone}"))
        return
    found = list(hub.observations(since or None, adapter or None, limit or OBSERVATIONS_SHOWN, before=before or None))
    observing = hub.config.observe != "off"
    emit(found, as_json, observed if found or observing else lambda _: line(NOTHING_LOGGED))


@_verb("feedback", "adapter-hub feedback 1a21d02c0c6000007f74e135 --label card_lost")
def feedback(
    ctx: typer.Context,
    id: Annotated[str, typer.Argument(metavar="ID", help="Of the observation: `observation` in the answers of predict and run.")],
    label: Annotated[str, typer.Option(help="What the answer should have been.")] = "",
    adapter: Annotated[str, typer.Option(metavar="NAME", help="Who should have answered.", autocompletion=complete_ref)] = "",
    new_label: Annotated[bool, typer.Option("--new-label", help="The label is one that the adapter has yet to learn.")] = False,
    registry: Registry = "registry", as_json: AsJson = False,
) -> None:
    """Say what an answer should have been. The last word counts."""
    seen = _open(ctx, registry).feedback(id, label or None, adapter or None, new_label=new_label)
    said = " ".join(filter(None, (label, f"by {adapter}" if adapter else "")))
    emit(seen, as_json, lambda _: line(f"{id} should have been answered {said}"))


# ---- verbs: look after it -------------------------------------------------------------------------------------------

Webhook = Annotated[str, typer.Option(metavar="URL", help="POST each alert there as JSON.")]
AlertCommand = Annotated[str, typer.Option(metavar="COMMAND", help="Run it for each alert, with the alert as JSON on stdin; no shell.")]


@_verb("watch", "adapter-hub watch --webhook https://example.org/alerts")
def watch(
    ctx: typer.Context, webhook: Webhook = "", alert_command: AlertCommand = "", registry: Registry = "registry", as_json: AsJson = False
) -> None:
    """Look through what was logged since the last look, and tell where traffic changed for the worse."""
    hub = _open(ctx, registry)
    found = hub.watch(_sinks(webhook, alert_command))
    emit(found, as_json, alarmed if found or hub.config.observe != "off" else lambda _: line(NOTHING_LOGGED))


@_verb("maintain", "adapter-hub maintain --dry-run")
def maintain(
    ctx: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these; by default all.", autocompletion=complete_ref)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")] = False,
    config: Annotated[str, typer.Option(help="Of the trainings, as of `learn`: fast, balanced or thorough, or settings.")] = "",
    webhook: Webhook = "", alert_command: AlertCommand = "", registry: Registry = "registry", as_json: AsJson = False,
) -> None:
    """One pass: watch, evaluate, and update or roll back where people's feedback asks for it. For cron; one at a time.

    An adapter below accuracy_floor in hub.toml, or worse since an alarm, learns from the rows that people corrected; from refresh_rows of them
    on also where nothing is wrong. The new version goes live where the gate promotes it and it is better on new rows, in the second case no
    worse. Exit code 1 where an adapter could not be maintained.
    """
    settings = _train_config(config)
    hub = _open(ctx, registry)
    report = hub.maintain(names or None, dry_run=dry_run, sinks=_sinks(webhook, alert_command), config=settings)
    emit(report, as_json, attended)
    if not as_json and hub.config.observe == "off":
        line(NOTHING_LOGGED)
    if report.failed:
        raise typer.Exit(SOME_FAILED)


def _sinks(url: str, arguments: str) -> list[Sink]:
    from adapter_hub.continual import alerts

    return [*([alerts.webhook(url)] if url else []), *([alerts.command(shlex.split(arguments))] if arguments else [])]


@_verb("proposals", "adapter-hub proposals")
def proposals(
    ctx: typer.Context,
    decided: Annotated[bool, typer.Option("--decided", help="Those that were accepted or dismissed, and why.")] = False,
    registry: Registry = "registry", as_json: AsJson = False,
) -> None:
    """Look for new tasks among the logged inputs that no adapter took, and show what is proposed.

    Needs the texts: observe = "text" in hub.toml. `accept` makes a proposal a skill, `dismiss` ends it.
    """
    emit(_open(ctx, registry).proposals(decided=decided), as_json, proposed)


@_verb("accept", "adapter-hub accept 3 --name travel --label 3.1=book_flight --label 3.2=visa")
def accept(
    ctx: typer.Context,
    ids: Proposed,
    name: Annotated[str, typer.Option(metavar="NAME", help="The skill's: a new one, or a registered adapter's.")] = "",
    label: Annotated[list[str] | None, typer.Option(metavar="ID=LABEL", help="Of a group, a proposal or an observation. May be repeated.")] = None,
    train: Annotated[str, typer.Option(metavar="FILE", help="Labelled rows to learn it from: JSONL, CSV or Parquet.")] = "",
    output: Annotated[str, typer.Option(metavar="FILE", help="Where the rows go that are to be labelled: JSONL.")] = "",
    config: Annotated[str, typer.Option(help="As of `learn`: fast, balanced or thorough, or settings.")] = "",
    promote: Annotated[Literal["auto", "always", "never"], typer.Option(help="auto: unless the gate sees harm in it.")] = "auto",
    reason: Reason = "", registry: Registry = "registry", as_json: AsJson = False,
) -> None:
    """Make proposals, or groups of them (3.2), a skill.

    With labels it is learned. With the name of a registered adapter alone, that one's router is taught the texts. A new name without labels
    writes the rows to be labelled to --output; `accept` with --train learns from them then. Exit code 1 where it is not promoted and was to be.
    """
    given = _labels_of(label or [])
    if output and (given or train):
        raise InvalidInput("--output is for rows that are to be labelled.", hint="Leave it out, or --label and --train.")
    learning: dict[str, Any] = {"config": _train_config(config), "promote": promote} if given or train else {}
    done = _open(ctx, registry).accept(ids, name or None, given or None, train=train or None, reason=reason, **learning)
    if done.rows and output:
        Path(output).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in done.to_json()["rows"]), encoding="utf-8")
    emit(done, as_json, lambda document: accepted(document, output))
    if done.report and not done.report.promoted and promote != "never":
        raise typer.Exit(SOME_FAILED)


def _labels_of(pairs: Sequence[str]) -> dict[str, str]:
    """Raises InvalidInput."""
    found = dict(pair.partition("=")[::2] for pair in pairs)
    if bad := [pair for pair in pairs if not all(pair.partition("=")[::2])]:
        raise InvalidInput(f"--label {bad[0]!r} is not ID=LABEL.", hint="For example --label 3.1=book_flight.")
    return found


@_verb("dismiss", "adapter-hub dismiss 3 --reason 'small talk, no task of ours'")
def dismiss(ctx: typer.Context, ids: Proposed, reason: Reason = "", registry: Registry = "registry", as_json: AsJson = False) -> None:
    """End proposals, or groups of them: inputs like theirs are proposed no more."""
    _open(ctx, registry).dismiss(ids, reason)
    emit({"dismissed": ids, "reason": reason}, as_json, lambda _: line(f"dismissed: {', '.join(ids)}"))


# ---- verbs: keep it sound -------------------------------------------------------------------------------------------


@_verb("verify", "adapter-hub verify --registry registry")
def verify(ctx: typer.Context, registry: Registry = "registry", as_json: AsJson = False) -> None:
    """Hash every stored file and the base model. Exit code 1 where something is damaged."""
    report = _open(ctx, registry).verify()
    emit(report, as_json, verified)
    if not report.ok:
        raise typer.Exit(SOME_FAILED)


@_verb("gc", "adapter-hub gc")
def gc(ctx: typer.Context, registry: Registry = "registry", as_json: AsJson = False) -> None:
    """Remove what interrupted registrations left behind."""
    emit(_open(ctx, registry).gc(), as_json, facts)


@_verb("adopt", "adapter-hub adopt")
def adopt(ctx: typer.Context, registry: Registry = "registry", as_json: AsJson = False) -> None:
    """Take in version folders that came by git or copy.

    Exit code 1 where one was refused, or two different folders claim one number.
    """
    report = _open(ctx, registry).adopt()
    emit(report, as_json, in_full)
    if report.conflicts or report.refused:
        raise typer.Exit(SOME_FAILED)
