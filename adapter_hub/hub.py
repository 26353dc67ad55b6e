"""The hub: constructs the parts and connects them. No maths, no SQL and no tensors of its own.

`predict` is *route, then run*: `routing` decides from the text, `engine` executes on the frozen base, `registry` remembers.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from adapter_hub.adapters.checks import check_acts, check_fits
from adapter_hub.adapters.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_folder
from adapter_hub.adapters.weights import Adapter, read_adapter
from adapter_hub.base_model import DEFAULT_MODEL, FrozenBase
from adapter_hub.batch.job import Progress, Summary, run_job
from adapter_hub.engine.engine import Engine, Output, Request
from adapter_hub.engine.generation import check_generation
from adapter_hub.errors import HubError, InvalidInput, ModelChanged, ModelNotFound, ReadOnlyRegistry, WrongBase
from adapter_hub.examples import Example, as_examples, digest_of, read_examples
from adapter_hub.refs import AdapterRef, check_name
from adapter_hub.registry.config import RegistryConfig
from adapter_hub.registry.manifest import Manifest, VersionFacts
from adapter_hub.registry.registry import Registry
from adapter_hub.registry.verify import Problem
from adapter_hub.routing.calibration import Calibration, calibrate
from adapter_hub.routing.decision import Decision
from adapter_hub.routing.encoder import Encoder, load_encoder
from adapter_hub.routing.router import Router
from adapter_hub.routing.statistics import RoutingState, build_state
from adapter_hub.training.config import TrainConfig
from adapter_hub.training.train import train_classifier

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger("adapter_hub")

ROUTING_FILE = "routing.safetensors"
EXEMPLARS_FILE = "exemplars.jsonl"


@dataclass(frozen=True, slots=True)
class Prediction:
    """One output and the decision behind it. Exactly one of label, text, vector, tokens says the answer.

    An abstained row on an encoder has `label` None and the base's `.vector`.
    """

    adapter: AdapterRef | None                  # the version that answered; None is the base model
    decision: Decision
    label: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)   # label -> probability
    text: str | None = None                     # generated text, without the prompt
    vector: Any = None                          # float32 (d,), the base's own pooling
    tokens: tuple[Any, ...] | None = None       # token classification: spans with label, score, start, end
    truncated: bool = False                     # the input was longer than the hub's max_tokens

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"adapter": str(self.adapter) if self.adapter else None, "reason": str(self.decision.reason)}
        row |= {"score": rounded(self.decision.score), "margin": rounded(self.decision.margin)}
        return row | self.answer() | ({"truncated": True} if self.truncated else {})

    def answer(self) -> dict[str, Any]:
        """The prediction alone: `label` for a classifier and for abstention on an encoder, else `output`."""
        if self.text is not None:
            return {"output": self.text}
        if self.tokens is not None:
            return {"output": [span.to_json() for span in self.tokens]}
        if self.adapter is not None and self.label is None and self.vector is not None:
            return {"output": [rounded(float(x)) for x in self.vector]}
        return {"label": self.label}


@dataclass(frozen=True, slots=True)
class LearnReport:
    """What `learn` made, and why it was or was not promoted."""

    ref: AdapterRef
    promoted: bool
    reason: str
    metrics: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        return {"ref": str(self.ref), "promoted": self.promoted, "reason": self.reason, "metrics": dict(self.metrics)}


class Hub:
    """An adapter registry with its router and its engine. Open one with `Hub.open`, make one with `Hub.create`.

    Models are loaded when first needed: opening, listing and promoting cost no forward. Safe to share between threads.
    """

    def __init__(self, registry: Registry, *, device: str = "cpu") -> None:
        self.registry = registry
        self.device = device
        self._lock = threading.RLock()
        self._base: FrozenBase | None = None
        self._encoder: Encoder | None = None
        self._engine: Engine | None = None
        self._router: Router | None = None
        self._router_event = -1
        self._states: dict[AdapterRef, RoutingState] = {}
        self._unsaved_calibration: Calibration | None = None

    # ---- open and close -----------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        base_model: str | Path = DEFAULT_MODEL,
        encoder: str | Path | None = None,
        max_tokens: int | None = None,
        database: str | None = None,
        device: str = "cpu",
    ) -> Self:
        """Make a registry folder for one base model and one encoder.

        `encoder` is a sentence-transformers id or folder, or "hash" for one without a model; by default the default model.
        `database` is a PostgreSQL URL for the catalogue, which is in the folder otherwise.
        Raises RegistryExists, ModelNotFound.
        """
        base = FrozenBase.load(_absolute(base_model), max_tokens=max_tokens, device=device)
        router_encoder = load_encoder(_absolute(encoder or DEFAULT_MODEL))
        config = RegistryConfig(
            base_model=base.id,
            base_fingerprint=base.fingerprint,
            encoder=router_encoder.id,
            encoder_fingerprint=router_encoder.fingerprint,
            max_tokens=base.max_tokens,
        )
        hub = cls(Registry.create(path, config=config, database=database), device=device)
        hub._base, hub._encoder = base, router_encoder
        return hub

    @classmethod
    def open(cls, path: str | Path = "registry", *, artifacts: str | Path | None = None, device: str = "cpu") -> Self:
        """Open a registry folder, or a database URL whose files lie under `artifacts`. Raises RegistryNotFound."""
        return cls(Registry.open(path, artifacts=artifacts), device=device)

    def close(self) -> None:
        self.registry.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the models, loaded when first needed -------------------------------------------------------------------

    @property
    def config(self) -> RegistryConfig:
        return self.registry.config

    @property
    def base(self) -> FrozenBase:
        """The frozen base model. Raises ModelNotFound, ModelChanged if it is not the one this registry was made for."""
        with self._lock:
            if self._base is None:
                base = FrozenBase.load(self.config.base_model, max_tokens=self.config.max_tokens, device=self.device)
                _check_same("base model", base.id, base.fingerprint, self.config.base_fingerprint)
                self._base = base
            return self._base

    @property
    def encoder(self) -> Encoder:
        """The router's text encoder. Raises ModelNotFound, ModelChanged."""
        with self._lock:
            if self._encoder is None:
                encoder = load_encoder(self.config.encoder)
                _check_same("encoder", encoder.id, encoder.fingerprint, self.config.encoder_fingerprint)
                self._encoder = encoder
            return self._encoder

    @property
    def engine(self) -> Engine:
        with self._lock:
            if self._engine is None:
                self._engine = Engine(self.base, self._load)
            return self._engine

    def _load(self, ref: AdapterRef) -> Adapter:
        """The adapter of a version, its files checked against their digests."""
        manifest = self.registry.manifest(ref)
        _check_same("base model", self.base.id, self.base.fingerprint, manifest.base_fingerprint)
        return _read_version(self.registry.open_version(ref), manifest)

    # ---- add ----------------------------------------------------------------------------------------------------

    def register(
        self,
        name: str,
        source: str | Path | PeftModel,
        examples: Iterable[str | Mapping[str, Any] | Example] = (),
        description: str = "",
        *,
        labels: Sequence[str] | None = None,
        tags: Iterable[str] = (),
        promote: bool = True,
        assume_base: bool = False,
        license: str | None = None,
        prompt_template: str | None = None,
        generation: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        parent: AdapterRef | None = None,
        training_data_digest: str | None = None,
    ) -> AdapterRef:
        """Check an adapter against the base, then store it as the next version of `name` in one atomic act.

        `source` is a PEFT folder, a hub id "org/name@revision" or a PeftModel. `examples` (texts, or rows with text and
        label) tell the router what belongs to it; without any, the description does. `labels` name the head's outputs.
        Raises InvalidName, InvalidInput, AdapterRejected (its children say why), RegistryError. Nothing is stored then.
        """
        check_name(name)
        rows = as_examples(examples)
        tags = _texts("tags", tags)
        with adapter_folder(source) as folder:
            adapter = read_adapter(folder, labels=tuple(labels) if labels else None, prompt_template=prompt_template, generation=generation)
            self._check_named_base(adapter, assume_base)
            check_fits(adapter, self.base)
            check_acts(adapter, self.base)
            files: dict[str, Path | bytes] = {file: (folder / file).read_bytes() for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
            state = build_state(self.encoder, rows, description)
            files |= self._routing_files(state, rows)
            facts = VersionFacts(
                base_model=self.base.id,
                base_fingerprint=self.base.fingerprint,
                encoder_fingerprint=self.encoder.fingerprint,
                peft=json.loads(bytes(files[ADAPTER_CONFIG])),
                task_type=str(adapter.settings.task_type) if adapter.settings.task_type else None,
                labels=adapter.labels,
                prompt_template=prompt_template,
                generation=dict(generation or {}),
                metrics=dict(metrics or {}),
                training_data_digest=training_data_digest,
                parent=str(parent) if parent else None,
                license=license,
                description=description,
                tags=tags,
            )
            return self.registry.add(name, facts, files, promote=promote)

    def _routing_files(self, state: RoutingState, rows: Sequence[Example]) -> dict[str, Path | bytes]:
        files: dict[str, Path | bytes] = {ROUTING_FILE: state.to_bytes()}
        if self.config.keep == "text" and rows:
            lines = ({"text": row.text} | ({"label": row.label} if row.label is not None else {}) for row in rows)
            files[EXEMPLARS_FILE] = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        return files

    def _check_named_base(self, adapter: Adapter, assume_base: bool) -> None:
        """The base that adapter_config.json names must have this base's content. Raises WrongBase."""
        named = adapter.settings.base_model_name_or_path
        if assume_base or named == self.base.id:
            return
        hint = "If it was trained on the same weights, pass assume_base=True (`--assume-base`)."
        if not named:
            raise WrongBase("adapter_config.json does not name its base model.", hint=hint)
        try:
            other = FrozenBase.load(named, max_tokens=self.base.max_tokens).fingerprint
        except ModelNotFound:
            raise WrongBase(f"the adapter was made for {named!r}, this registry serves {self.base.id!r}.", hint=hint) from None
        if other != self.base.fingerprint:
            raise WrongBase(f"the adapter was made for {named!r}, whose weights differ from {self.base.id!r}.", hint="Open its registry.")

    def learn(
        self,
        name: str,
        train: str | Path | Iterable[Mapping[str, Any] | Example],
        validation: str | Path | Iterable[Mapping[str, Any] | Example] | None = None,
        config: TrainConfig | None = None,
        promote: str = "auto",
        **facts: Any,
    ) -> LearnReport:
        """Train a classifier adapter on rows with text and label, register it, and promote it by the rule named.

        `promote` is "auto" (better than always answering the commonest label, and not worse than the version in
        production on the same validation rows), "always" or "never". `facts` go to `register` (tags, license, …).
        The base stays frozen: training happens on a copy. Raises InvalidInput, and what `register` raises.
        """
        if promote not in ("auto", "always", "never"):
            raise InvalidInput(f"promote={promote!r} is not a rule.", hint="Use 'auto', 'always' or 'never'.")
        check_name(name)
        rows = _rows(train)
        held_out = _rows(validation) if validation is not None else None
        with tempfile.TemporaryDirectory(prefix="learn-") as folder:
            result = train_classifier(self.base, rows, task=name, validation=held_out, config=config or TrainConfig(), folder=Path(folder))
            facts |= {"metrics": result.metrics, "training_data_digest": digest_of(rows)}
            ref = self.register(name, result.folder, rows, labels=result.labels, promote=False, assume_base=True, **facts)
        good, reason = self._better(name, result.validation, result.metrics["accuracy"]) if promote == "auto" else (promote == "always", promote)
        if good:
            self.promote(ref, reason=reason)
        return LearnReport(ref, good, reason, result.metrics)

    def _better(self, name: str, validation: Sequence[Example], accuracy: float) -> tuple[bool, str]:
        targets = [row.label for row in validation]
        commonest = max(targets.count(label) for label in set(targets)) / len(targets)
        if accuracy <= commonest:
            return False, f"validation accuracy {accuracy:.3f} is not above always answering the commonest label ({commonest:.3f})"
        if "production" not in self.registry.aliases(name):
            return True, f"first version; validation accuracy {accuracy:.3f}, commonest label {commonest:.3f}"
        answers = self.predict([row.text for row in validation], adapters=name)
        current = sum(a.label == target for a, target in zip(answers, targets, strict=True)) / len(targets)
        return accuracy >= current, f"validation accuracy {accuracy:.3f}, version in production {current:.3f}"

    def teach(self, ref: str | AdapterRef, texts: Iterable[str | Mapping[str, Any] | Example], *, promote: bool = True) -> AdapterRef:
        """A new version with the same weights (stored once) whose routing state also knows `texts`."""
        old = self.registry.resolve(ref)
        manifest, rows = self.registry.manifest(old), as_examples(texts)
        if not rows:
            raise InvalidInput("there is nothing to teach: no texts were given.")
        state = self._state(old).extended(self.encoder, rows)
        folder = self.registry.open_version(old)
        files: dict[str, Path | bytes] = {file: folder / file for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
        kept = read_examples(folder / EXEMPLARS_FILE) if EXEMPLARS_FILE in manifest.files else []
        files |= self._routing_files(state, [*kept, *rows])
        return self.registry.add(old.name, manifest.facts(parent=str(old)), files, promote=promote, reason=f"taught {len(rows)} texts")

    # ---- route and run ------------------------------------------------------------------------------------------

    def route(self, texts: Sequence[str], k: int = 1, max_false_reject: float | None = None) -> list[Decision]:
        """Where each text belongs: an adapter's production version, or abstention. Aligned with `texts`.

        `max_false_reject` is the share of belonging inputs that may be turned away, 0-1; 0 never abstains; the default is
        hub.toml's. Raises InvalidInput.
        """
        return self._route(self._snapshot(), _texts("texts", texts), k, max_false_reject)

    def predict(
        self,
        texts: Sequence[str],
        adapters: Sequence[str | AdapterRef | None] | str | AdapterRef | None = None,
        max_false_reject: float | None = None,
        generation: Mapping[str, Any] | None = None,
    ) -> list[Prediction]:
        """Answer each text by the adapter it belongs to, in one mixed batch. Aligned with `texts`.

        `adapters` names them instead of routing: one for all, or one each, where None is the base model.
        Raises InvalidInput, AdapterNotFound, NotRoutable.
        """
        texts = _texts("texts", texts)
        if adapters is None:
            decisions = self._route(self._snapshot(), texts, 1, max_false_reject)
        else:
            decisions = [self._named(ref) for ref in _aligned(adapters, len(texts))]
        return self._run(texts, decisions, generation)

    def _route(self, router: Router, texts: Sequence[str], k: int, max_false_reject: float | None) -> list[Decision]:
        rate = _rate(self.config.max_false_reject if max_false_reject is None else max_false_reject)
        if not isinstance(k, int) or k < 1:
            raise InvalidInput(f"k={k!r} is not a positive count of candidates.")
        return router.route_vectors(self.encoder.encode(texts), k=k, max_false_reject=rate) if texts else []

    def _named(self, ref: str | AdapterRef | None) -> Decision:
        return Decision.named(None if ref is None else self.registry.resolve(ref))

    def _run(self, texts: Sequence[str], decisions: Sequence[Decision], generation: Mapping[str, Any] | None) -> list[Prediction]:
        requests = [Request(text, decision.adapter) for text, decision in zip(texts, decisions, strict=True)]
        outputs = self.engine.predict(requests, generation=generation)
        return [_prediction(decision, output) for decision, output in zip(decisions, outputs, strict=True)]

    def run(
        self,
        input: str | Path,
        output: str | Path,
        resume: bool = False,
        max_false_reject: float | None = None,
        *,
        overwrite: bool = False,
        generation: Mapping[str, Any] | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Summary:
        """The batch job: every row of `input` answered into `output`, in order; bad rows to OUTPUT.errors.jsonl.

        The router is held as it is at the start; a resumed job is refused where the registry has changed since.
        """
        router = self._snapshot()
        rate = _rate(self.config.max_false_reject if max_false_reject is None else max_false_reject)
        settings = {
            "base": self.config.base_fingerprint,
            "encoder": self.config.encoder_fingerprint,
            "router": router.digest,
            "max_false_reject": rate,
            "generation": check_generation(generation or {}),    # a wrong setting would fail every row by itself
        }

        def answer(texts: Sequence[str]) -> list[dict[str, Any]]:
            return [p.to_json() for p in self._run(texts, self._route(router, texts, 1, rate), generation)]

        return run_job(input, output, answer, resume=resume, overwrite=overwrite, settings=settings, progress=progress)

    def evaluate(
        self, data: str | Path | Iterable[Mapping[str, Any] | Example], names: Iterable[str] | None = None, max_false_reject: float | None = 0.0
    ) -> dict[str, Any]:
        """Accuracy on labelled rows: routed, and for rows with an `adapter` field also routing and with it named.

        `names` restricts to rows of those adapters. Rates are 0-1; keys that do not apply are absent.
        """
        rows = [row for row in _rows(data) if names is None or row.extra.get("adapter") in set(names)]
        if not rows or any(row.label is None for row in rows):
            raise InvalidInput("evaluation needs rows, each with a label.", hint='Rows look like {"text": …, "label": …, "adapter": …}.')
        texts, targets = [row.text for row in rows], [row.label for row in rows]
        routed = self.predict(texts, max_false_reject=max_false_reject)
        facts: dict[str, Any] = {"rows": len(rows), "accuracy": _share(p.label == t for p, t in zip(routed, targets, strict=True))}
        facts["abstained"] = _share(p.adapter is None for p in routed)
        homes = [row.extra.get("adapter") for row in rows]
        if all(isinstance(home, str) for home in homes):
            named = self.predict(texts, adapters=[str(home) for home in homes])
            pairs = zip(routed, named, strict=True)
            facts["routing_accuracy"] = _share(p.adapter and n.adapter and p.adapter.name == n.adapter.name for p, n in pairs)
            facts["accuracy_named"] = _share(p.label == t for p, t in zip(named, targets, strict=True))
        return facts

    # ---- the router's snapshot ----------------------------------------------------------------------------------

    def _snapshot(self) -> Router:
        """The router over the versions in production now; rebuilt only when the registry's events say so."""
        with self._lock:
            event = self.registry.last_event()
            if self._router is None or event != self._router_event:
                refs = self.registry.production()
                states = {ref: self._state(ref) for ref in refs}
                self._states = dict(states)
                self._router = Router.build(states, self._calibration(states))
                self._router_event = self.registry.last_event()
            return self._router

    def _state(self, ref: AdapterRef) -> RoutingState:
        if ref not in self._states:
            path = self.registry.open_version(ref) / ROUTING_FILE
            state = RoutingState.from_bytes(path.read_bytes(), source=path)
            _check_same("encoder", self.config.encoder, state.encoder_fingerprint, self.config.encoder_fingerprint)
            self._states[ref] = state
        return self._states[ref]

    def _calibration(self, states: Mapping[AdapterRef, RoutingState]) -> Calibration | None:
        latest = self.registry.latest_calibration()
        if latest is not None:
            return Calibration.from_bytes(self.registry.calibration(latest), id=latest)
        return self._calibrate(states, "the first inputs are about to be routed") if any(s.count for s in states.values()) else None

    def _calibrate(self, states: Mapping[AdapterRef, RoutingState], reason: str) -> Calibration:
        calibration = calibrate(states)
        try:
            number = self.registry.add_calibration(calibration.to_bytes(), sorted(states), reason)
        except ReadOnlyRegistry:
            log.warning("the registry is read-only: calibrated for this process alone")
            return calibration
        return Calibration.from_bytes(calibration.to_bytes(), id=number)

    def calibrate(self, reason: str = "asked for") -> Calibration:
        """Fit the shared metric and the thresholds anew on the versions in production; the record gets the next number."""
        with self._lock:
            states = {ref: self._state(ref) for ref in self.registry.production()}
            if not any(state.count for state in states.values()):
                raise InvalidInput("no version in production has examples to calibrate on.", hint="Register one with examples.")
            calibration = self._calibrate(states, reason)
            self._router = None
            return calibration

    # ---- the registry's own verbs -------------------------------------------------------------------------------

    def promote(self, ref: str | AdapterRef, reason: str = "") -> AdapterRef:
        """Move `production` to this version; returns the version it now names."""
        return self.registry.promote(ref, reason)

    def rollback(self, name: str, reason: str = "") -> AdapterRef:
        """Move `production` back to the version it named before; returns that."""
        return self.registry.rollback(name, reason)

    def set_alias(self, name: str, alias: str, version: int, reason: str = "") -> AdapterRef:
        return self.registry.set_alias(name, alias, version, reason)

    def retire(self, ref: str | AdapterRef, reason: str = "") -> AdapterRef:
        """Keep the version, never route to it again."""
        return self.registry.retire(ref, reason)

    def purge(self, ref: str | AdapterRef, reason: str = "", *, descendants: bool = False) -> AdapterRef:
        """Erase the version's weights, vectors and text, and the calibrations computed from them; tombstones stay.

        Versions that hold the same data, e.g. those taught from it, are purged with it where `descendants` says so.
        Raises AdapterNotFound, DataRemains where there are such versions and `descendants` is False.
        """
        gone = self.registry.purge(ref, reason, descendants=descendants)
        for each in gone:
            for number in self.registry.calibrations_of(each):
                self.registry.erase_calibration(number, f"{each} was purged")
            self._states.pop(each, None)
            if self._engine is not None:
                self._engine.evict(each)
        return gone[0]

    def export(self, ref: str | AdapterRef, folder: str | Path) -> Path:
        """Copy the version to `folder` as a plain PEFT adapter."""
        return self.registry.export(ref, folder)

    def verify(self) -> Any:
        """Hash every stored file, the base model and the encoder in full; the report lists what is damaged, and never raises for it."""
        report = self.registry.verify()
        damaged = [Problem(where, error.fact) for where, check in self._models() if (error := _fault(check))]
        return replace(report, problems=(*damaged, *report.problems))

    def _models(self) -> Iterator[tuple[str, Callable[[], None]]]:
        config = self.config
        yield "base model", lambda: _check_same("base model", config.base_model, self.base.compute_fingerprint(), config.base_fingerprint)
        yield "encoder", lambda: _check_same("encoder", config.encoder, load_encoder(config.encoder).fingerprint, config.encoder_fingerprint)

    def gc(self) -> Any:
        return self.registry.gc()

    def adopt(self) -> Any:
        """Take in version folders that came by git or copy, each checked against the base as `register` does; faults are reported."""
        return self.registry.adopt(self._check_usable)

    def _check_usable(self, folder: Path, manifest: Manifest) -> None:
        """Raises HubError where a version could not be run or routed here."""
        adapter = _read_version(folder, manifest)
        check_fits(adapter, self.base)
        check_acts(adapter, self.base)
        state = RoutingState.from_bytes((folder / ROUTING_FILE).read_bytes(), source=folder / ROUTING_FILE)
        _check_same("encoder", self.config.encoder, state.encoder_fingerprint, self.config.encoder_fingerprint)

    def list(self, name: str | None = None, *, base: str | None = None, tag: str | None = None, task_type: str | None = None) -> Any:
        return self.registry.versions(name, base=base, tag=tag, task_type=task_type)

    def show(self, ref: str | AdapterRef) -> Manifest:
        return self.registry.manifest(ref)

    def history(self, name: str) -> Any:
        return self.registry.history(name)


def _prediction(decision: Decision, output: Output) -> Prediction:
    return Prediction(
        adapter=decision.adapter,
        decision=decision,
        label=output.label,
        scores=output.scores or {},
        text=output.text,
        vector=output.vector,
        tokens=output.tokens,
        truncated=output.truncated,
    )


def rounded(value: float | None) -> float | None:
    """Six decimals: what two runs of the same request on other batches agree on. None where there is no number."""
    return None if value is None or not math.isfinite(value) else round(value, 6)


def _share(hits: Iterable[object]) -> float:
    found = [bool(hit) for hit in hits]
    return sum(found) / len(found) if found else 0.0


def _absolute(source: str | Path) -> str:
    path = Path(source).expanduser()
    return str(path.resolve()) if path.is_dir() else str(source)


def _check_same(what: str, name: str, found: str, recorded: str | None) -> None:
    if recorded and found != recorded:
        raise ModelChanged(
            f"the {what} {name!r} has fingerprint {found[:19]}…, the registry was made with {recorded[:19]}….",
            hint=f"Restore that {what}, or make a new registry and register the adapters again.",
        )


def _read_version(folder: Path, manifest: Manifest) -> Adapter:
    return read_adapter(folder, labels=manifest.labels, prompt_template=manifest.prompt_template, generation=manifest.generation)


def _fault(check: Callable[[], None]) -> HubError | None:
    try:
        check()
    except HubError as error:
        return error
    return None


def _rows(source: str | Path | Iterable[Mapping[str, Any] | Example]) -> list[Example]:
    return read_examples(source) if isinstance(source, str | Path) else as_examples(source)


def _texts(what: str, texts: Iterable[str]) -> tuple[str, ...]:
    if isinstance(texts, str):
        raise InvalidInput(f"{what} is one string.", hint=f"Give a list: [{texts[:20]!r}].")
    return tuple(texts)


def _rate(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InvalidInput(f"max_false_reject={value!r} is not a rate between 0 and 1.", hint="0 never abstains; 0.05 is the default.")
    return float(value)


def _aligned(
    adapters: Sequence[str | AdapterRef | None] | str | AdapterRef, count: int
) -> Sequence[str | AdapterRef | None]:
    if isinstance(adapters, str | AdapterRef):
        return [adapters] * count
    if len(adapters) != count:
        raise InvalidInput(f"{len(adapters)} adapters were named for {count} texts.", hint="Name one for each text, or one for all.")
    return adapters
