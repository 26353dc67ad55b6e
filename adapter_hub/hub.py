"""The hub: constructs the parts and connects them. No maths, no SQL and no tensors of its own.

`predict` is *route, then run*: `routing` decides from the text, `engine` executes on the frozen base, `registry` remembers. A method that
does more than connect calls a function that is given the hub, in a module beside this one: `answering`, `learning`, `evaluation`, …
"""

from __future__ import annotations

import itertools
import logging
import shlex
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from adapter_hub.adapters.config import TaskType
from adapter_hub.adapters.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFiles
from adapter_hub.answering import answer_each, checked_ask, checked_rate, choose, predict, requests_of, route, router_at
from adapter_hub.arguments import Generation, Input, Named, inputs_of, limits_of, task_type_of, wait_of
from adapter_hub.batch.job import BEGIN_AGAIN, CHUNK_ROWS, WRITING_CHUNK_ROWS, Progress, Summary, interrupted, run_job
from adapter_hub.chat import Conversation, question_of
from adapter_hub.engine.generation import check_generation
from adapter_hub.errors import AdapterNotFound, HubError, InvalidInput, InvalidName, ModelChanged, RegistryError, RegistryExists
from adapter_hub.examples import Example, as_examples, read_examples
from adapter_hub.feedback import feedback
from adapter_hub.learning import LearnReport, learn, teach
from adapter_hub.prediction import Prediction, PredictionStream
from adapter_hub.refs import PRODUCTION, AdapterRef, check_name
from adapter_hub.registering import by_name, effect_of, prepare, store
from adapter_hub.registry.config import RegistryConfig, check_policy, read_config
from adapter_hub.registry.layout import EXEMPLARS_FILE, NUMBER_MAX, Layout
from adapter_hub.registry.manifest import Manifest
from adapter_hub.registry.observations import Observation, ObservationLog, first_id, new_ids, sampled
from adapter_hub.registry.registry import Registry
from adapter_hub.registry.verify import Problem
from adapter_hub.routing.contest import NEAR, TEMPERATURE
from adapter_hub.routing.decision import Decision

# What needs torch is imported by the methods that need it: listing and promoting take no seconds and no memory for models.
if TYPE_CHECKING:
    from peft import PeftModel

    from adapter_hub.adapters.weights import Adapter
    from adapter_hub.base_model import FrozenBase
    from adapter_hub.continual.alerts import Sink
    from adapter_hub.continual.discovery import DiscoveryConfig
    from adapter_hub.continual.drift import Alarm
    from adapter_hub.continual.knowledge_map import KnowledgeMap, Limits
    from adapter_hub.continual.proposals import Accepted, Encoded, Proposal
    from adapter_hub.continual.space import Space
    from adapter_hub.engine.engine import Engine, Output
    from adapter_hub.engine.queue import RequestQueue
    from adapter_hub.lifelong import MaintenanceReport
    from adapter_hub.merging import MergeReport
    from adapter_hub.routing.calibration import Calibration
    from adapter_hub.routing.effect import Effect
    from adapter_hub.routing.encoder import Encoder
    from adapter_hub.routing.explain import Explanation
    from adapter_hub.routing.live import LiveRouter
    from adapter_hub.routing.reembed import Reembedded
    from adapter_hub.routing.router import Router
    from adapter_hub.routing.statistics import RoutingState
    from adapter_hub.training.config import TrainConfig

log = logging.getLogger("adapter_hub")

_Found = TypeVar("_Found", bound=Prediction | HubError)


class Hub:
    """An adapter registry with its router and its engine. Open one with `Hub.open`, make one with `Hub.create`.

    Models are loaded when first needed: opening, listing and promoting cost no forward. Safe to share between threads.
    The modules of its work also use `importing`, `live`, `adapter`, `candidate`, `gathering`, `encoder_of`, `routed_labels` and `looking`:
    they are no public surface.
    """

    importing = threading.RLock()    # transformers cannot be imported by two threads at once: its modules fill themselves when they are asked

    def __init__(
        self,
        registry: Registry,
        *,
        device: str = "cpu",
        precision: str = "float32",
        slots_max: int | None = None,
        bytes_max: int | None = None,
        requests_max: int | None = None,
        rows_max: int | None = None,
        wait_ms: float | None = None,
    ) -> None:
        self._limits = limits_of(slots_max=slots_max, bytes_max=bytes_max)
        self._queueing: dict[str, Any] = limits_of(requests_max=requests_max, rows_max=rows_max) | wait_of(wait_ms)
        self._registry = registry
        self._closed = False
        self.device = device
        self.precision = precision    # of the base model
        self._lock = threading.RLock()
        self._base: FrozenBase | None = None
        self._encoder: Encoder | None = None
        self._gathering: Encoder | None = None
        self._engine: Engine | None = None
        self._queue: RequestQueue | None = None
        self._router: LiveRouter | None = None
        self._looking = threading.Lock()       # a look takes seconds, in which others ask on
        self._looked: Encoded | None = None    # the inputs of the last one
        self._candidates: dict[AdapterRef, Adapter] = {}    # that are asked before they are stored
        self._numbers = itertools.count(NUMBER_MAX + 1)
        self._label_names: dict[AdapterRef, tuple[str, ...]] = {}    # of versions, which do not change
        self._log = registry.observation_log()
        self._observes = registry.config.observe != "off" and self._log.writable
        if registry.config.observe != "off" and not self._observes:
            log.warning("%s is open for reading only: what is answered is not logged.", registry.layout.root)
        self._settings: object = None    # what hub.toml looked like when it last named the encoder that this hub was opened with

    # ---- open and close -----------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        base_model: str | Path | None = None,
        encoder: str | Path | None = None,
        max_tokens: int | None = None,
        database: str | None = None,
        device: str = "cpu",
        precision: str = "float32",
        slots_max: int | None = None,
        bytes_max: int | None = None,
        policy: Mapping[str, Any] | None = None,
    ) -> Self:
        """Make a registry folder for one base model and one encoder.

        `base_model` is a hub id or a folder; `encoder` too, or "hash" for one without a model; by default both are `DEFAULT_MODEL`.
        `database` is a PostgreSQL URL for the catalogue, which is in the folder otherwise. `precision`, `slots_max` and `bytes_max` are
        this hub's, as in `open`: the registry is the same at each. `policy` is what hub.toml's [policy] is to say otherwise than by
        default: {"keep": "text", "observe": "text"}. Raises RegistryExists, ModelNotFound, InvalidInput, InvalidConfig.
        """
        limits_of(slots_max=slots_max, bytes_max=bytes_max)    # before anything is written
        check_policy(policy or {})
        if Layout(Path(path).expanduser()).config.exists():    # before the models are loaded, which takes a while
            raise RegistryExists(f"{path} is a registry already.", hint="Open it, or name another folder.")
        from adapter_hub.base_model import DEFAULT_MODEL, FrozenBase
        from adapter_hub.routing.encoder import load_encoder

        base = FrozenBase.load(_absolute(base_model or DEFAULT_MODEL), max_tokens=max_tokens, device=device, precision=precision)
        router_encoder = load_encoder(_absolute(encoder or DEFAULT_MODEL), device)
        config = RegistryConfig(
            base_model=base.id,
            base_fingerprint=base.fingerprint,
            encoder=router_encoder.id,
            encoder_fingerprint=router_encoder.fingerprint,
            max_tokens=base.max_tokens,
            **(policy or {}),
        )
        registry = Registry.create(path, config=config, database=database)
        hub = cls(registry, device=device, precision=precision, slots_max=slots_max, bytes_max=bytes_max)
        hub._base, hub._encoder = base, router_encoder
        return hub

    @classmethod
    def open(
        cls,
        path: str | Path = "registry",
        *,
        artifacts: str | Path | None = None,
        device: str = "cpu",
        precision: str = "float32",
        slots_max: int | None = None,
        bytes_max: int | None = None,
        requests_max: int | None = None,
        rows_max: int | None = None,
        wait_ms: float | None = None,
    ) -> Self:
        """Open a registry folder, or a database URL whose files lie under `artifacts`.

        `precision` is how the base model's weights are held: float32, bfloat16, float16 (CUDA), int8, or nf4 (CUDA, by bitsandbytes). The
        router's encoder stays float32, so that the same adapters are chosen.
        At most `slots_max` adapters (64 by default) of `bytes_max` bytes together (2 GiB) stay loaded; of more, the least recently
        used are loaded again when they are asked for. Of `submit`, at most `requests_max` requests wait (1,024), and at most `rows_max`
        (64) share a batch, which the oldest of them waits `wait_ms` (3) for. Raises RegistryNotFound, InvalidInput; the base, when it
        is first needed, InvalidInput where this machine has no such precision.
        """
        limits: dict[str, Any] = limits_of(slots_max=slots_max, bytes_max=bytes_max, requests_max=requests_max, rows_max=rows_max)
        limits |= wait_of(wait_ms)    # before anything is opened
        return cls(Registry.open(path, artifacts=artifacts), device=device, precision=precision, **limits)

    def close(self) -> None:
        """Answer what was submitted, and let go of the registry; whatever is asked of this hub afterwards raises HubError."""
        if self._queue is not None:
            self._queue.close()
        if not self._closed:
            self._log.close()
        self._closed = True
        self._registry.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Hub({str(self._registry.layout.root)!r}{', closed' if self._closed else ''})"

    @property
    def registry(self) -> Registry:
        self._check_open()
        return self._registry

    def _check_open(self) -> None:
        if self._closed:
            raise HubError("this hub is closed.", hint="Open another: Hub.open.")

    # ---- a collection of names ----------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Every name that is registered, in production or not, in alphabetical order."""
        return self.registry.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __bool__(self) -> bool:
        return True    # a hub without adapters is a hub: its base model answers

    def __contains__(self, ref: object) -> bool:
        """Whether a name is registered; of `name@3` and `name@alias`, whether that version is."""
        if not isinstance(ref, str | AdapterRef):
            return False
        try:
            if isinstance(ref, str) and "@" not in ref:
                self.registry.aliases(ref)
            else:
                self.registry.manifest(ref)
        except (AdapterNotFound, InvalidName):
            return False
        return True

    # ---- the models, loaded when first needed -------------------------------------------------------------------

    @property
    def config(self) -> RegistryConfig:
        return self.registry.config

    @property
    def base(self) -> FrozenBase:
        """The frozen base model. Raises ModelNotFound, InvalidInput, ModelChanged if it is not the one this registry was made for."""
        with self._lock, self.importing:
            if self._base is None:
                from adapter_hub.base_model import FrozenBase

                base = FrozenBase.load(
                    self.config.base_model, max_tokens=self.config.max_tokens, device=self.device, precision=self.precision
                )
                _check_same("base model", base.id, base.fingerprint, self.config.base_fingerprint)
                self._base = base
            return self._base

    @property
    def encoder(self) -> Encoder:
        """The router's text encoder. Raises ModelNotFound, ModelChanged; that too where hub.toml has come to name another one."""
        self._check_settings()
        with self._lock, self.importing:
            if self._encoder is None or self._encoder.fingerprint != (self.config.encoder_fingerprint or self._encoder.fingerprint):
                from adapter_hub.routing.encoder import load_encoder

                encoder = load_encoder(self.config.encoder, self.device)
                again = f"`adapter-hub reembed {shlex.quote(encoder.id)}` to go over to this one" if self.config.keep == "text" else ""
                _check_same("encoder", encoder.id, encoder.fingerprint, self.config.encoder_fingerprint, again)
                self._encoder = encoder
            return self._encoder

    def _check_settings(self) -> None:
        """Raises ModelChanged where hub.toml has come to name another encoder since this hub was opened."""
        path, opened = self._registry.layout.config, self.config
        with suppress(OSError, RegistryError):    # what is wrong with hub.toml is said to who opens it
            found = path.stat()
            seen = (found.st_ino, found.st_mtime_ns, found.st_size)
            if seen == self._settings:
                return
            named = read_config(path)
            if named.encoder_fingerprint != opened.encoder_fingerprint:
                fact = f"hub.toml names the encoder {named.encoder!r} now, this hub was opened with {opened.encoder!r}."
                raise ModelChanged(fact, hint="Open the registry again: Hub.open.")
            self._settings = seen

    @property
    def gathering(self) -> Encoder:
        """The same encoder, for `submit`: what threads ask at once is encoded together."""
        with self._lock, self.importing:
            if self._gathering is None:
                from adapter_hub.routing.encoder import GatheringEncoder

                self._gathering = GatheringEncoder(self.encoder)
            return self._gathering

    @property
    def engine(self) -> Engine:
        self._check_open()
        with self._lock, self.importing:
            if self._engine is None:
                from adapter_hub.engine.engine import Engine

                self._engine = Engine(self.base, self.adapter, **self._limits)
            return self._engine

    def pin(self, *refs: str | AdapterRef) -> None:
        """Keep these versions loaded until `unpin`, or until they are purged. Raises InvalidInput where no place were left for others."""
        self.engine.slots.pin([self.registry.resolve(ref) for ref in refs])

    def unpin(self, *refs: str | AdapterRef) -> None:
        """From now on they go as any other does when places are needed. Those that are not pinned change nothing."""
        self.engine.slots.unpin([self.registry.resolve(ref) for ref in refs])

    @property
    def queue(self) -> RequestQueue:
        """Of `submit`, made when it is first needed."""
        self._check_open()
        with self._lock, self.importing:
            if self._queue is None:
                from adapter_hub.engine.queue import RequestQueue

                self._queue = RequestQueue(self.engine, **self._queueing)
            return self._queue

    @property
    def live(self) -> LiveRouter:
        """The router as it follows the registry."""
        self._check_open()
        with self._lock, self.importing:
            if self._router is None:
                from adapter_hub.routing.live import LiveRouter

                self._router = LiveRouter(self._registry, self._check_state)
            return self._router

    def adapter(self, ref: AdapterRef) -> Adapter:
        """The adapter of a version, from the bytes that were checked against their digests; or of a candidate, which is not stored yet."""
        if candidate := self._candidates.get(ref):
            return candidate
        with self.importing:
            from adapter_hub.adapters.weights import adapter_of

        manifest = self.registry.manifest(ref)
        _check_same("base model", self.base.id, self.base.fingerprint, manifest.base_fingerprint)
        config, weights = (self.registry.read(ref, file) for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
        return adapter_of(
            AdapterFiles(config, weights, str(ref)),
            labels=manifest.labels,
            prompt_template=manifest.prompt_template,
            generation=manifest.generation,
            problem_type=manifest.problem_type,
        )

    @contextmanager
    def candidate(self, name: str, adapter: Adapter) -> Iterator[AdapterRef]:
        """A reference that the engine knows an adapter by which is not stored: of a number that no version has."""
        ref = AdapterRef(name, next(self._numbers))
        self._candidates[ref] = adapter
        try:
            yield ref
        finally:
            del self._candidates[ref]
            self.engine.evict(ref)

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
        evaluation: Iterable[str | Mapping[str, Any] | Example] = (),
        negatives: Iterable[str | Mapping[str, Any] | Example] = (),
        license: str | None = None,
        prompt_template: str | None = None,
        generation: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        parent: AdapterRef | None = None,
        training_data_digest: str | None = None,
        problem_type: str | None = None,
        routed: bool = True,
    ) -> AdapterRef:
        """Check an adapter against the base, then store it as the next version of `name` in one atomic act.

        `source` is a PEFT folder, a hub id "org/name@revision" or a PeftModel. `examples` (texts, or rows with text and
        label) tell the router what belongs to it; without any, the description does, and beside it the labels of a text
        classifier. `labels` name the head's outputs; a PeftModel whose config names them needs none. `problem_type` says what the
        outputs of a SEQ_CLS head mean, in transformers' words: "single_label_classification", "multi_label_classification" or
        "regression"; by default what a PeftModel's config says, else a regression for one output and a single label for several.
        `evaluation` are further inputs that belong to it: thresholds are measured on them and, where they have targets and texts are
        kept, `evaluate` measures the adapter; the manifest has their digest. `negatives` are inputs that do not, whoever
        else they may belong to: they take off this adapter's scores alone; of more than 512 an even share is met. Those of both among
        the examples are dropped. With `max_taken` in hub.toml, a newcomer that takes more from another adapter is registered and not
        promoted (see `effect`). With `routed=False` only its name reaches it, and it takes nothing: its examples are kept, for those who
        learn on.
        Raises InvalidName, InvalidInput, AdapterRejected (its children say why), RegistryError. Nothing is stored then.
        """
        check_name(name)
        rows, held_out, refused = as_examples(examples), as_examples(evaluation), as_examples(negatives)
        prepared = prepare(
            self, name, source, rows, held_out, refused, description=description, labels=labels, tags=tags, assume_base=assume_base,
            license=license, prompt_template=prompt_template, generation=generation, metrics=metrics, parent=parent,
            training_data_digest=training_data_digest, problem_type=problem_type,
        )  # fmt: skip
        prepared = prepared if routed else by_name(self, prepared)
        return store(self, name, prepared.facts, prepared.files, prepared.state, promote=promote)

    def learn(
        self,
        name: str,
        train: str | Path | Iterable[Mapping[str, Any] | Example],
        validation: str | Path | Iterable[Mapping[str, Any] | Example] | None = None,
        config: TrainConfig | Mapping[str, Any] | str | None = None,
        promote: str = "auto",
        start: str = "auto",
        checkpoint_folder: str | Path | None = None,
        task_type: str | None = None,
        problem_type: str | None = None,
        prompt_template: str | None = None,
        instead_of: Iterable[str | AdapterRef] = (),
        routed: bool | None = None,
        **facts: Any,
    ) -> LearnReport:
        """Train an adapter on rows with text and target, let the gate judge it, register it, and promote it by the rule named.

        `task_type`, `problem_type` and `prompt_template` are as in `register`. By default they are those of the version in production, of a
        new name (and with `task_type="SEQ_CLS"` alone) one label among several, without a template ("{text}" says so too). A row's target is
        its `label` (a label, a number, a text to write), its list `labels` (several) or `spans`, or `messages` that end with what an
        assistant should write: see `training.tasks`.
        `promote` is "auto" (the gate's verdict, see `continual.gate`), "always" or "never"; "always" does not override `max_taken` in
        hub.toml. What is held or rejected is stored too, and not promoted; each version keeps its verdict as gate.json. It is judged on
        rows that had no part in training: half of the validation rows, the other half having chosen the epoch, or as many held out of
        `train`.
        A name that is in production already is learned on: new rows and new labels are added to what it knows, from its weights and with the
        examples whose texts are kept (see `plan_lesson`); description, tags, license and generation stay. `start="warm"` insists on its weights,
        "cold" forgets it: the new rows replace the old ones. A new name starts cold; with `start="transfer"` from the weights of the nearest
        adapters in production, where short trials on a part of the rows say that this helps (see `training.transfer`).
        With `routed=False` only its name reaches it, and the gate looks at nobody else's inputs; by default as the version in production.
        `instead_of` are versions of other names that give way to it, whose examples are among the rows: its lineage names them, so that
        `purge` finds what they know, and what it takes from them is no harm. To take them out of production is the caller's.
        With `checkpoint_folder` each epoch of the training is kept there until it is done: the same call, after it was killed, goes on, to
        the weights that it would have had.
        `config` may be a mapping of its settings, or a preset's name. `facts` go to `register` (tags, license, generation, …).
        `LearnReport.data` tells of rows that contradict each other, or what the version in production was taught (of several labels,
        numbers and spans where its texts are kept), stand in training and validation, leave a label rare, or are too few to measure by; it
        is warned of.
        The base stays frozen: training happens on a copy. Raises InvalidInput, also for another kind of task than the version in production
        has, which only "cold" replaces, and what `register` raises; nothing is stored then.
        """
        return learn(
            self, name, train, validation=validation, config=config, promote=promote, start=start, checkpoint_folder=checkpoint_folder,
            task_type=task_type, problem_type=problem_type, prompt_template=prompt_template, instead_of=instead_of, routed=routed, facts=facts,
        )  # fmt: skip

    def teach(
        self,
        ref: str | AdapterRef,
        texts: Iterable[str | Mapping[str, Any] | Example] = (),
        *,
        negatives: Iterable[str | Mapping[str, Any] | Example] = (),
        promote: bool | None = None,
    ) -> AdapterRef:
        """A new version with the same weights (stored once) whose routing state also knows `texts`, and what does not belong to it.

        What is given now holds against what was given before: an example among the `negatives` is one no more, and the other way round.
        By default it takes over `production` where the version that was taught has it, and nowhere else. Raises InvalidInput.
        """
        return teach(self, ref, texts, negatives, promote)

    # ---- route and run ------------------------------------------------------------------------------------------

    def route(self, texts: Sequence[Input], k: int = 1, max_false_reject: float | None = None) -> list[Decision]:
        """Where each text belongs: an adapter's production version, or abstention. Aligned with `texts`.

        A conversation (messages of "role" and "content") is routed by its last message.
        `max_false_reject` is the share of belonging inputs that may be turned away, 0-1; 0 never abstains; the default is
        hub.toml's. Raises InvalidInput.
        """
        return route(self, router_at(self, max_false_reject), [question_of(text) for text in inputs_of(texts)], k, max_false_reject)

    def predict(
        self,
        texts: Sequence[Input],
        adapters: Sequence[Named] | Named = None,
        max_false_reject: float | None = None,
        generation: Generation = None,
        mix: int = 1,
        truncate: bool = True,
        ask: int = 1,
    ) -> list[Prediction]:
        """Answer each text by the adapter it belongs to, in one mixed batch. Aligned with `texts`.

        Where the base writes, a text may be a conversation, [{"role": "user", "content": "…"}, …], which goes through the tokenizer's
        own chat template and is routed by its last message. `generation` is one mapping for all or one for each: the names of
        transformers, and `seed`, and `chat`: True, by which a text is one message of such a conversation, after a `system` text if
        there is one. What is too long is cut and `truncated`: first the oldest questions with their answers, then the text's end.
        With `truncate=False` it is refused instead, by InvalidInput with its position, its length in tokens and what there is room for.

        `adapters` names them instead of routing: one for all, or one each, where None is the base model and a mapping to weights,
        {"legal": 0.7, "tax": 0.3}, a mixture: the adapters answer together, each as much as its share of the weights.
        With `mix=k` a routed input that is accepted is answered by its k best candidates together, by `Decision.weights`. Those
        that cannot be mixed with the best one (a head with other labels, a DoRA, …) are left out, and the others' shares grow in
        proportion; a DoRA that is best answers alone. An abstained row is the base model's. `Prediction.mixture` says who answered.
        With `ask=k` an accepted input is answered by each of its k best candidates that come near the best (see `routing.contest`), and
        of their labels one is given: within an adapter the likeliest by router and adapter, among adapters that to which the router
        responds most. Classifiers of one label are judged so, others are not. The label need not be the adapter's own first choice; `scores`
        are the adapter's own. Then `Prediction.adapter` is who knows it, and `asked` has the router's response to the label of each.
        Where hub.toml says that answers are logged (`observe`), `Prediction.id` is what `feedback` knows one by.
        Raises InvalidInput, also for named adapters that do not mix (it is said why), AdapterNotFound, NotRoutable.
        """
        started, found = time.perf_counter(), inputs_of(texts)
        return self._observed(found, predict(self, found, adapters, max_false_reject, generation, mix, truncate, ask), started)

    def stream(
        self,
        text: Input,
        adapters: Sequence[Named] | Named = None,
        max_false_reject: float | None = None,
        generation: Mapping[str, Any] | None = None,
        mix: int = 1,
        truncate: bool = True,
    ) -> PredictionStream:
        """The text that `predict` gives this one input, piece by piece as it is written; who writes it, and why, is said at once.

        The arguments are `predict`'s. To close it, or to let go of it, ends the generation.
        Raises what `predict` raises, and InvalidInput for what has no pieces: beams, labels, vectors.
        """
        found = inputs_of([text])
        [decision], [answering] = choose(self, found, adapters, max_false_reject, mix)
        [request] = requests_of(self, found, [answering], truncate)
        pieces = self.engine.stream(request, generation=generation)
        [seen] = self._observed(found, [Prediction(decision.adapter, decision)], None)
        return PredictionStream(decision, answering, pieces, seen.id)

    def submit(
        self,
        text: Input,
        adapter: Named = None,
        max_false_reject: float | None = None,
        generation: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        mix: int = 1,
        truncate: bool = True,
    ) -> Future[Prediction]:
        """The future of what `predict([text], …)` answers: for many small requests from many threads, which share batches.

        It is routed at once, together with what other threads submit meanwhile, unless `adapter` is named. Then it waits some
        milliseconds for others in this hub's queue (see `RequestQueue`; its limits are `Hub.open`'s); where that is full, at most
        `timeout` seconds for room. Who shares the batch depends on timing, so numbers agree with those of `predict` within 1e-5 in
        float32 (in fewer bits as far as those reach: rarely another label wins), not byte for byte. An adapter that is damaged or purged
        by the time its request runs is told by that future alone, e.g. as CorruptVersion or NotRoutable; so is a text that is too long,
        with `truncate=False`.
        Raises QueueFull, and as `predict`.
        """
        started, texts = time.perf_counter(), inputs_of([text])
        [decision], [answering] = choose(self, texts, adapter, max_false_reject, mix, gathered=True)
        [request] = requests_of(self, texts, [answering], truncate)

        def answered(output: Output) -> Prediction:
            return self._observed(texts, [Prediction.of(decision, answering, output)], started)[0]

        return self.queue.submit(request, generation, timeout=timeout, then=answered)

    def routed_labels(self, ref: AdapterRef | None) -> tuple[str, ...]:
        """Of a classifier of one label those that the router has examples of, in the order of `Router.label_responses`; none of others."""
        if ref is None:
            return ()
        if ref not in self._label_names:
            manifest = self.registry.manifest(ref)
            single = manifest.task_type == TaskType.SEQ_CLS and manifest.problem_type is None and manifest.labels
            try:
                names = self.live.state(ref).class_names if single else ()
            except HubError:    # its routing file was damaged since it was indexed: whoever asks for it is told, and it is no rival
                return ()
            self._label_names[ref] = tuple(name for name in names if name is not None)
        return self._label_names[ref]

    def encoder_of(self, router: Router) -> Encoder:
        """The registry's encoder. Raises ModelChanged where hub.toml has come to name another than this router's exemplars had."""
        if router.calibration is not None:
            self._check_encoded(router.calibration.encoder_fingerprint)
        return self.encoder

    def run(
        self,
        input: str | Path,
        output: str | Path,
        resume: bool = False,
        max_false_reject: float | None = None,
        *,
        overwrite: bool = False,
        generation: Mapping[str, Any] | None = None,
        truncate: bool = True,
        ask: int = 1,
        progress: Callable[[Progress], None] | None = None,
    ) -> Summary:
        """The batch job: every row of `input` answered into `output`, in order; bad rows to OUTPUT.errors.jsonl.

        Where hub.toml says that answers are logged (`observe`), each row has its id as `observation`, null where it is not logged.
        A row has `text`, or where it has none `messages`: a conversation, as `predict` takes them (in CSV as JSON).
        An answer to an input that was cut says `truncated`; with `truncate=False` a row that is too long is a bad one. `ask` is `predict`'s.

        The router is held as it is at the start, also by a job that is resumed after the registry has changed: the same versions
        and calibration answer to the end. It is refused where they cannot, or an option is another one.
        """
        started = interrupted(output) if resume else None
        options = {"precision": str(self.precision), "device": self.device.partition(":")[0]}
        _check_options(started or {}, options)
        held = self._router_of(started.get("versions", ()), started.get("calibration")) if started else None
        router = router_at(self, max_false_reject, settled=True) if held is None else held
        encoder, rate = self.encoder_of(router), checked_rate(self, max_false_reject)
        settings = {
            "base": self.config.base_fingerprint,
            "encoder": self.config.encoder_fingerprint,
            "max_tokens": self.config.max_tokens,
            **options,
            "router": router.digest,
            "max_false_reject": rate,
            "generation": check_generation(generation or {}),    # a wrong setting would fail every row by itself
            "truncate": truncate,
            **({"observation": True} if self._observes else {}),    # a column more
            **({"ask": [ask, NEAR, TEMPERATURE]} if checked_ask(ask) > 1 else {}),
        }
        calibration = router.calibration.id if router.calibration else None
        facts = {"versions": [str(ref) for ref in router.versions], "calibration": calibration, **options}

        def answer(texts: Sequence[str | Conversation]) -> list[dict[str, Any] | HubError]:
            started = time.perf_counter()
            found = answer_each(self, router, encoder, texts, generation, rate, truncate, ask)
            answered = self._observed(texts, found, started)
            return [one if isinstance(one, HubError) else one.row() | ({"observation": one.id} if self._observes else {}) for one in answered]

        how: dict[str, Any] = {"settings": settings, "facts": facts, "resume": resume, "overwrite": overwrite, "progress": progress}
        return run_job(input, output, answer, chunk_rows=CHUNK_ROWS if self.base.kind == "encoder" else WRITING_CHUNK_ROWS, **how)

    def _router_of(self, versions: Iterable[str | AdapterRef], calibration: int | None) -> Router:
        """The router over these versions under a stored calibration: what it was when they were in production."""
        return self.live.of(map(self.registry.resolve, versions), calibration)

    def answered(self, rows: Sequence[Example], homes: Sequence[AdapterRef], versions: Iterable[AdapterRef] | None = None) -> list[bool]:
        """Whether each row's home gives it its label, and were `versions` in production and calibrated, the row would reach it.

        Nothing of it is logged.
        """
        reached: Sequence[int] = range(len(rows))
        if versions is not None:
            reached = [number for number, reaches in enumerate(self.reached(rows, homes, versions)) if reaches]
        outputs = self.engine.predict(requests_of(self, [rows[number].text for number in reached], [homes[number] for number in reached], True))
        right = {number for number, output in zip(reached, outputs, strict=True) if output.label == rows[number].label}
        return [number in right for number in range(len(rows))]

    def reached(self, rows: Sequence[Example], homes: Sequence[AdapterRef], versions: Iterable[AdapterRef]) -> list[bool]:
        """Whether each row would reach its home, were `versions` in production and calibrated."""
        if not rows:
            return []
        decisions = route(self, self.live.calibrated(versions), [row.text for row in rows], 1, None)
        return [decision.adapter == home for decision, home in zip(decisions, homes, strict=True)]

    # ---- the log of what was answered ---------------------------------------------------------------------------

    def _observed(self, texts: Sequence[str | Conversation], found: Sequence[_Found], started: float | None) -> list[_Found]:
        """Each answer with the id that it is logged under; those that are not logged, and errors, as they are.

        `started` is when they were asked, in seconds of `time.perf_counter`; None for a stream.
        """
        if not self._observes:
            return list(found)
        latency_ms, share = None if started is None else 1e3 * (time.perf_counter() - started), self.config.observe_share
        ids = [id if sampled(id, share) else None for id in new_ids(len(found))]
        known: list[Any] = [replace(one, id=id) if id and isinstance(one, Prediction) else one for one, id in zip(found, ids, strict=True)]
        pairs = zip(known, texts, strict=True)
        self._log.add([one.observed(one.id, question_of(text), latency_ms) for one, text in pairs if isinstance(one, Prediction) and one.id])
        return known

    def feedback(
        self, id: str, correct_label: str | None = None, correct_adapter: str | None = None, *, new_label: bool = False
    ) -> Observation:
        """Say what an answer should have been; returns the observation with it. What is said last of an observation holds.

        `id` is `Prediction.id`, or the column `observation` of a job's row. `correct_label` is one of `correct_adapter`'s, or where
        that is not given of the adapter's that answered, as it was then or is in production now; with `new_label` it may be one that the adapter
        has yet to learn. Of `correct_adapter` the name counts.
        Raises InvalidInput for an id that is not in the log and a label that there is not, AdapterNotFound, NotRoutable.
        """
        return feedback(self, id, correct_label, correct_adapter, new_label)

    def observations(
        self,
        since: str | datetime | None = None,
        adapter: str | AdapterRef | None = None,
        limit: int | None = None,
        *,
        before: str | datetime | None = None,
    ) -> Iterator[Observation]:
        """What was answered and logged, newest first, each with the feedback to it. What other processes log comes some seconds later.

        `since` and `before` are moments (ISO 8601; UTC where no zone is named), `adapter` a name, name@3 or name@alias.
        Raises InvalidInput, AdapterNotFound, RegistryError.
        """
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise InvalidInput(f"limit={limit!r} is not a positive count of observations.")
        chosen = self._chosen_observations(before, adapter)
        return self._log.read(since=None if since is None else first_id(since), rows_max=limit, **chosen)

    def forget_observations(self, before: str | datetime | None = None, adapter: str | AdapterRef | None = None) -> int:
        """Erase what was logged, all of it or what is chosen as in `observations`, with the feedback to it; returns how many rows that was.

        It leaves the pages of a SQLite file too; in PostgreSQL they are free for others, until its own VACUUM. Another process may write
        later what it answered before. The drift detectors, which hold vectors, begin anew, and suggested names go that no text bears out any
        more. What a version learned from the log stays its own: `purge` erases that.
        Raises InvalidInput, AdapterNotFound, ReadOnlyRegistry, RegistryError, also while another process maintains the registry.
        """
        from adapter_hub.lifelong import forget

        chosen = self._chosen_observations(before, adapter)
        with self.registry.maintaining(), self.registry.deciding():    # a pass, and a look, hold what they have read
            forget(self)    # first: the log's own erasure clears the pages of all
            if "name" not in chosen:    # what is proposed was answered by no adapter
                with self.importing:
                    from adapter_hub.proposals import proposals_of

                proposals_of(self).forget(chosen.get("before"))
            self._looked = None    # their vectors
            return self._log.forget(**chosen)

    def _chosen_observations(self, before: str | datetime | None, adapter: str | AdapterRef | None) -> dict[str, Any]:
        self._check_open()
        chosen: dict[str, Any] = {} if before is None else {"before": first_id(before)}
        if adapter is None:
            return chosen
        asked = AdapterRef.parse(adapter)
        if "@" not in str(adapter):
            self.registry.aliases(asked.name)
            return chosen | {"name": asked.name}
        found = self.registry.manifest(asked).ref    # of a purged version too
        return chosen | {"name": found.name, "version": found.version}

    def flush_observations(self) -> None:
        """Returns when what was answered so far is in the log. Raises RegistryError where it cannot be written, and is lost."""
        self._check_open()
        self._log.flush()

    @property
    def log(self) -> ObservationLog:
        """The log itself, as passes over it read it."""
        self._check_open()
        return self._log

    @property
    def observations_dropped(self) -> int:
        """How many this hub could not log: they came faster than the database takes them, or it could not be written."""
        return self._log.dropped

    # ---- look after it ------------------------------------------------------------------------------------------

    def watch(self, sinks: Iterable[Sink] = ()) -> list[Alarm]:
        """Give what was logged since the last look to the drift detectors; the alarms and warnings that they gave.

        They go to the logger "adapter_hub" and to `sinks` (`continual.alerts`), with back-off. An adapter's first alarm is open until a
        maintenance pass has seen to it, one over all inputs until a pass over all adapters has. What was logged in the last 5 s waits for the
        next look; what another host writes later than that, or by a clock that is late, is not watched (its feedback is). Texts that are
        kept are encoded once more.
        The log is read in blocks and what was found is saved as it goes: a watch that is killed goes on there, and tells the last of it twice.
        Raises RegistryError where another process maintains this registry, ReadOnlyRegistry.
        """
        from adapter_hub.lifelong import watch

        with self.registry.maintaining():
            return watch(self, sinks)[0]

    def maintain(
        self,
        names: Iterable[str] | None = None,
        *,
        dry_run: bool = False,
        sinks: Iterable[Sink] = (),
        config: TrainConfig | str | None = None,
        now: datetime | None = None,
    ) -> MaintenanceReport:
        """One pass over the adapters in production, or of these names: `watch`, evaluate, then update or go back where people's feedback asks for it.

        Each version is measured on the evaluation set that is kept with it, when it is new, the router changed or an alarm came. An input that
        belongs to an adapter, as people say, and did not reach it was not answered right. What is
        done follows from the feedback to its answers (`continual.maintenance` has the rules, hub.toml the floor, cool-down, rows and level):
        it learns from the rows that people corrected, also where nothing is wrong and they are many, with the text that the log keeps
        (`observe = "text"`), and the new version goes live where the gate promotes it and it is better on new rows, or, where nothing was
        wrong, no worse; or production goes back to the version before, where that one answers better. What a person puts into production
        meanwhile stays there. Alarms lead to an evaluation, never to a training by themselves. Each step is an event (`history`).
        With `dry_run` nothing is written, in `index/` neither, and what would be done is returned; where a pass would calibrate first, it
        measures by the thresholds that there are. `config` is of the trainings, as in `learn`;
        `now` is the time that cool-down and back-off go by. One pass at a time: raises RegistryError where another process is at it,
        ReadOnlyRegistry. A fault with one adapter stands in the report and does not keep the pass from the others.
        """
        from adapter_hub.lifelong import maintain

        with self.live.rehearsing() if dry_run else nullcontext():
            return maintain(self, names=names, dry_run=dry_run, sinks=sinks, config=config, now=now)

    def merge(self, names: Iterable[str], into: str, config: TrainConfig | str | None = None, reason: str = "") -> MergeReport:
        """One adapter that knows what these know, learned from their kept examples; the other names leave production where it goes live.

        `into` is a new name, or one of `names`: it is learned on then. It goes live where the gate promotes it and, on the evaluation set
        that is kept with each of them, it is not told to be worse than that one (`continual.gate`, one level for all together). Else it
        is stored and not promoted, and nothing changes for the others. Nothing is overwritten, retired or purged: `promote` brings each back.
        Raises InvalidInput for adapters of different kinds and where no texts are kept (`keep = "text"` in hub.toml), AdapterNotFound,
        NotRoutable, RegistryError where another process maintains this registry.
        """
        from adapter_hub.merging import merge

        return merge(self, names, into, config=config, reason=reason)

    # ---- new tasks among what was turned away -------------------------------------------------------------------

    def proposals(self, *, decided: bool = False, config: DiscoveryConfig | None = None) -> list[Proposal]:
        """Tasks that nobody taught, as far as the log of rejected inputs tells: those that are open after a look, largest first.

        The newest 2,000 texts that the base model got are routed as they would be today; what is still turned away, more often than the
        false reject rate explains, is clustered (see `continual.discovery`). `accept` and `dismiss` take the ids, also of a proposal's groups,
        each likely one label. Ids and suggested names stay from look to look. `decided` gives those that were accepted or dismissed
        instead, without a look.
        Raises InvalidInput where the log keeps no texts, ReadOnlyRegistry.
        """
        with self.importing:
            from adapter_hub.proposals import look, proposals_of

        return proposals_of(self).decided() if decided else look(self, config)

    def accept(
        self,
        ids: str | Iterable[str],
        name: str | None = None,
        labels: Mapping[str, str | None] | None = None,
        *,
        train: str | Path | Iterable[Mapping[str, Any] | Example] | None = None,
        reason: str = "",
        **learning: Any,
    ) -> Accepted:
        """Make open proposals, or groups of them ("3", "3.2"), one skill: learn it, teach it to an adapter, or give the rows to be labelled.

        With `labels`, by observation, text, group or proposal, the most particular first, or with `train`, rows as `learn` takes them, it is
        `learn(name, rows, **learning)`; those without a label are left out. With neither, an adapter that is registered under the name is
        taught the texts, and for a new name `Accepted.rows` come back to be labelled: nothing is decided then.
        Raises InvalidInput, and what `learn` and `teach` raise; the proposals are open then as before.
        """
        with self.importing:
            from adapter_hub.proposals import accept

        return accept(self, [ids] if isinstance(ids, str) else [*ids], name, labels, train, reason, learning)

    def dismiss(self, ids: str | Iterable[str], reason: str = "") -> None:
        """Note that these proposals, or groups of them, are no task: inputs like theirs are proposed no more, while the log has theirs."""
        with self.importing:
            from adapter_hub.proposals import dismiss

        dismiss(self, [ids] if isinstance(ids, str) else [*ids], reason)

    @contextmanager
    def looking(self, encoder: Encoder) -> Iterator[Encoded]:
        """One look at a time, with the inputs of the last one; meanwhile nothing is decided."""
        with self.importing:
            from adapter_hub.continual.proposals import Encoded

        with self._looking, self.registry.deciding():
            if self._looked is None or self._looked.encoder is not encoder:
                self._looked = Encoded(encoder)
            yield self._looked

    # ---- ask about it -------------------------------------------------------------------------------------------

    def map(self, limits: Limits | None = None) -> KnowledgeMap:
        """The adapters in production as a graph: lineage, closeness in routing and in weights, confusion, what people corrected, traffic.

        `continual.knowledge_map` says what each edge is. Near-duplicates are pointed out, with the merge to try. Confusion is that of
        evaluation inputs, or of exemplars that are left out, and needs no texts. What is damaged is left out with a note.
        """
        from adapter_hub.survey import survey

        return survey(self, limits)

    def space(self) -> Space:
        """The router's space on a plane: exemplars, prototypes, held-out inputs against their threshold, and of the log's newest rows with
        text where they lie. See `continual.space`."""
        from adapter_hub.survey import space

        return space(self)

    def report(self, path: str | Path = "report.html") -> Path:
        """One HTML page on what was learned when, accuracy over time, routing, drift, proposals, and what was held or rolled back.

        It needs no network and runs no script. Texts that people asked are not in it. Returns the path; raises OSError.
        """
        from adapter_hub.survey import report

        path = Path(path).expanduser()
        path.write_text(report(self), encoding="utf-8")
        return path

    def explain(self, text: Input, k: int = 3, max_false_reject: float | None = None) -> Explanation:
        """Where a text goes and why: the `k` best candidates, their closest exemplars, the reason in words. Raises InvalidInput.

        The exemplars' texts are shown where the registry keeps them (`keep = "text"` in hub.toml).
        """
        from adapter_hub.routing.explain import explain
        from adapter_hub.routing.features import extract

        rate = checked_rate(self, max_false_reject)
        router = self.live.snapshot()
        features = extract(self.encoder_of(router), [question_of(one) for one in inputs_of([text])])
        decision = router.route_features(features, k=k, max_false_reject=rate)[0]
        refs = [ref for ref, _ in decision.candidates]
        states = {ref: self.live.state(ref) for ref in refs}
        texts = {ref: [row.text for row in kept] for ref in refs if (kept := self.kept(ref, EXEMPLARS_FILE))}
        texts |= {ref: [self.registry.manifest(ref).description] for ref in refs if states[ref].from_description}    # it is the first
        return explain(decision, features, states, texts, rate)

    def kept(self, ref: AdapterRef, file: str) -> list[Example]:
        """The rows of one of a version's text files (`registry.layout`); none where it has no such file."""
        return read_examples(self.registry.open_version(ref) / file) if file in self.registry.manifest(ref).files else []

    def state(self, ref: str | AdapterRef) -> RoutingState:
        """What a version brings to the router: exemplars and evaluation inputs as vectors. Raises AdapterNotFound, ModelChanged, CorruptVersion."""
        return self.live.state(self.registry.resolve(ref))

    def effect(self, ref: str | AdapterRef) -> Effect:
        """What a version takes, or would take, from each adapter in production, on their evaluation inputs or exemplars.

        Where another version of its name is in production, it stands in its place: what it takes beyond what that one took.
        An exemplar is scored as if its adapter had never been given it; an adapter none of whose exemplars can be left out shows
        0 inputs. Both sides, without the version and with it, are solved in full: some seconds for thousands of exemplars.
        Raises AdapterNotFound, NotRoutable, InvalidInput.
        """
        return effect_of(self, ref)

    def settle(self) -> Router:
        """Wait until the router's head knows every version in production; returns that router, an immutable snapshot."""
        return self.live.snapshot(settled=True)

    def evaluate(
        self,
        data: str | Path | Iterable[Mapping[str, Any] | Example] | None = None,
        names: Iterable[str] | None = None,
        max_false_reject: float | None = 0.0,
        ask: int = 1,
    ) -> dict[str, Any]:
        """How good the answers to labelled rows are: over all, and of each adapter that rows name, oracle (named) and routed.

        Without `data` each adapter in production, or of the `names`, is measured on the evaluation set that is kept with it. Else a row
        may name its adapter in the field `adapter`, and `names` restricts to rows of those; where no row does, and one adapter (or several
        versions of one) is named, all rows are its. A name with a version ("banking@2") measures that one.

        Always there: `rows`. Of the rows: `abstained`, and `accuracy`, the share whose whole answer is right as routed (no question of
        numbers). Where every row names its adapter: `routing_accuracy`, `accuracy_named`, the share right when that one is asked, and the `gap`
        of the two on the rows that both count. Where any does: `adapters`, for each version its `task`, `rows`, `oracle`, `routed`, their `gap`,
        `routing_accuracy`, `abstained`, and the `digest` of its rows, which a manifest's `evaluation_digest` compares with; and
        `mean_of_adapters`, `oracle` and `routed`: each metric's mean over the adapters that have it, however many rows each has.
        Adapters that only their name reaches (`routed=False`, neither examples nor a description, or not in production: retired, a candidate,
        an old version) have `oracle` alone, and their rows, counted as `by_name`, are in `accuracy_named` and in no figure of routing: nobody
        who does not name them is meant to reach them. Rows that ask for a label which their adapter does not have count as wrong, and are
        told: `unknown_labels` of the adapter, the number of these `rows` and the first of the `labels`.
        One label: accuracy, macro_f1. Several: accuracy (all right), macro_f1. A number: rmse, mae, correlation. Spans: span_precision,
        span_recall, span_f1, token_accuracy. Texts: exact_match, rouge_l, chrf (the extra `evaluation`) and, oracle only, perplexity a token.
        Vectors: only their routing. Without `data` also `without`, the adapters of which no set is kept, and of an adapter `unlabelled`, the
        rows that have no target and count for routing alone, and `known`, those that are its examples too where their texts are kept: to
        learn without validation rows holds some out of training, not of the router. Numbers that are not `answered` by one have no `gap`.
        Rates are 0-1; keys that do not apply are absent. The rows of one adapter after the other are asked and let go.
        With `ask=k` routed rows are answered as `predict` does. Else a row that was routed to its own version has the answer of that one: it
        is asked once.
        Raises InvalidInput for rows without the target that their adapter gives, rows that name none and go to an adapter that gives neither
        a label nor a text, no `names`, or where no set is kept; AdapterNotFound, NotRoutable.
        """
        with self.importing:
            from adapter_hub.evaluation import evaluate

        return evaluate(self, data, names, max_false_reject, ask)

    def calibrate(self, reason: str = "asked for") -> Calibration:
        """Fit scores and thresholds anew on the versions in production; the record gets the next number. Raises InvalidInput."""
        return self.live.calibrate(reason)

    def reembed(self, encoder: str | Path, reason: str = "") -> Reembedded:
        """Go over to another encoder: each version in production becomes a new one, with the same weights (stored once), encoded by it.

        All are made before hub.toml names it and they are promoted, then scores and thresholds are fitted anew. A crash is made good
        by the same call. Needs the texts of all examples (`keep = "text"` in hub.toml), or descriptions that stand for them; with
        another policy the new versions keep no texts. The way back is the same: to the old encoder. Other open hubs raise ModelChanged.
        Raises ModelNotFound, RegistryError with the names of the versions whose texts are not kept: nothing has changed then.
        """
        with self.importing:
            from adapter_hub.routing.encoder import load_encoder
            from adapter_hub.routing.reembed import Reembedded, reembed

        wanted = load_encoder(_absolute(encoder), self.device)
        reason = reason or f"encoded anew by {wanted.id}"
        versions = reembed(self.registry, wanted, reason)
        with self._lock:
            self._encoder, self._router, self._settings = wanted, None, None
        calibration = self.live.latest()
        if calibration is None:
            with suppress(InvalidInput):    # nothing to calibrate on
                calibration = self.live.calibrate(reason)
        return Reembedded(wanted.id, wanted.fingerprint, tuple(versions), calibration.id if calibration else None)

    def _check_state(self, state: RoutingState) -> None:
        self._check_encoded(state.encoder_fingerprint)

    def _check_encoded(self, fingerprint: str, what: str = "the exemplars were") -> None:
        """Raises ModelChanged where exemplars were encoded by another encoder than the one that hub.toml names."""
        if fingerprint != self.config.encoder_fingerprint:
            self._check_settings()
            wanted = f"hub.toml names {self.config.encoder!r} with {self.config.encoder_fingerprint[:19]}…"
            again = f"`adapter-hub reembed {shlex.quote(self.config.encoder)}` encodes what is in production anew"
            if self.config.keep != "text":
                again = "make a new registry with this one and register the adapters again with their examples"
            raise ModelChanged(
                f"{what} encoded by an encoder with fingerprint {fingerprint[:19]}…, and {wanted}.", hint=f"Name that encoder again, or {again}."
            )

    def _check_routable(self, manifest: Manifest) -> None:
        """Raises ModelChanged for a version that would stop routing in production: another encoder encoded it."""
        recorded = self.config.encoder_fingerprint
        if recorded and manifest.encoder_fingerprint is not None:
            self._check_encoded(manifest.encoder_fingerprint, f"{manifest.ref} was")

    # ---- the registry's own verbs -------------------------------------------------------------------------------

    def promote(self, ref: str | AdapterRef, reason: str = "", *, expected: int | None = None) -> AdapterRef:
        """Move `production` to this version; returns the version it now names. Raises ModelChanged for one that another encoder encoded.

        With `expected`, ProductionMoved where it names another version than that one now.
        """
        manifest = self.registry.manifest(ref)
        self._check_routable(manifest)
        return self.registry.promote(manifest.ref, reason, expected=expected)

    def rollback(self, name: str, reason: str = "", *, expected: int | None = None) -> AdapterRef:
        """Move `production` back to the version it named before; returns that. Raises ModelChanged where another encoder encoded it.

        `expected` is as in `promote`.
        """
        return self.registry.rollback(name, reason, check=self._check_routable, expected=expected)

    def set_alias(self, name: str, alias: str, version: int, reason: str = "") -> AdapterRef:
        """Let an alias name a version; returns that. Raises as `promote` where the alias is `production`."""
        if alias == PRODUCTION and type(version) is int:    # else it is said what is wrong with it
            self._check_routable(self.registry.manifest(AdapterRef(check_name(name), version)))
        return self.registry.set_alias(name, alias, version, reason)

    def retire(self, ref: str | AdapterRef, reason: str = "") -> AdapterRef:
        """Keep the version, never route to it again."""
        return self.registry.retire(ref, reason)

    def purge(self, ref: str | AdapterRef, reason: str = "", *, descendants: bool = False) -> AdapterRef:
        """Erase the version's weights, vectors and text, and all that was derived from them; tombstones stay.

        Versions that hold the same data, e.g. those taught from it, are purged with it where `descendants` says so.
        Raises AdapterNotFound, DataRemains where there are such versions and `descendants` is False.
        """
        gone = self.registry.purge(ref, reason, descendants=descendants)
        self.live.forget()
        for each in gone:
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
        return replace(report, problems=(*damaged, *report.problems, *self._unrouted(), *(() if damaged else self._unrunnable())))

    def _unrouted(self) -> Iterator[Problem]:
        """Versions that `Registry.add` put into production without what the router needs."""
        from adapter_hub.routing.live import ROUTING_FILE

        for ref in self.registry.production():
            with suppress(HubError):    # said already
                manifest = self.registry.manifest(ref)
                if ROUTING_FILE not in manifest.files:
                    yield Problem(str(ref), f"it is in production without {ROUTING_FILE}: only its name reaches it.")
                elif error := _fault(lambda manifest=manifest: self._check_routable(manifest)):    # type: ignore[misc]
                    yield Problem(str(ref), str(error))

    def _unrunnable(self) -> Iterator[Problem]:
        """Versions in production that were registered before their heads were asked whether they answer in a batch as alone."""
        from adapter_hub.adapters.checks import check_head_runs

        faults: dict[str | None, HubError | None] = {}    # by the kind of head: it is the base's and the task's, not the adapter's
        for ref in self.registry.production():
            with suppress(HubError):    # said already
                kind = self.registry.manifest(ref).task_type
                if kind not in faults:
                    adapter = self.adapter(ref)
                    faults[kind] = _fault(lambda adapter=adapter: check_head_runs(adapter, self.base))    # type: ignore[misc]
                if error := faults[kind]:
                    yield Problem(str(ref), f"its answers depend on what stands beside a text in a batch: {error.fact}")

    def _models(self) -> Iterator[tuple[str, Callable[[], None]]]:
        from adapter_hub.routing.encoder import load_encoder

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
        from adapter_hub.adapters.checks import check_acts, check_fits
        from adapter_hub.routing.live import ROUTING_FILE
        from adapter_hub.routing.statistics import RoutingState

        adapter = _read_version(folder, manifest)
        check_fits(adapter, self.base)
        check_acts(adapter, self.base)
        state = RoutingState.from_bytes((folder / ROUTING_FILE).read_bytes(), source=folder / ROUTING_FILE)
        self._check_encoded(state.encoder_fingerprint)

    def list(self, name: str | None = None, *, base: str | None = None, tag: str | None = None, task_type: str | None = None) -> Any:
        """The versions, by name and number. `base` is an id, a fingerprint or a folder. Raises AdapterNotFound, InvalidInput, ModelNotFound."""
        if task_type is not None:
            task_type = task_type_of(task_type)
        rows = self.registry.versions(name, base=base, tag=tag, task_type=task_type)
        if base is not None and not rows and Path(base).expanduser().is_dir():    # another place of a model is known by its content
            from adapter_hub.base_model import FrozenBase

            rows = self.registry.versions(name, base=FrozenBase.load(base, local=True).fingerprint, tag=tag, task_type=task_type)
        return rows

    def show(self, ref: str | AdapterRef) -> Manifest:
        return self.registry.manifest(ref)

    def history(self, name: str) -> Any:
        return self.registry.history(name)


def _check_options(started: Mapping[str, Any], options: Mapping[str, str]) -> None:
    """Raises InvalidInput where a job was begun by a hub that was opened with other options."""
    for name, ours in options.items():
        if (theirs := started.get(name, ours)) != ours:
            hint = f"Go on with Hub.open(…, {name}={theirs!r}) (`adapter-hub --{name} {theirs}`). {BEGIN_AGAIN}"
            raise InvalidInput(f"the interrupted job was begun with {name}={theirs!r}, and this hub has {name}={ours!r}.", hint=hint)


def _absolute(source: str | Path) -> str:
    path = Path(source).expanduser()
    return str(path.resolve()) if path.is_dir() else str(source)


def _check_same(what: str, name: str, found: str, recorded: str | None, otherwise: str = "") -> None:
    if recorded and found != recorded:
        raise ModelChanged(
            f"the {what} {name!r} has fingerprint {found[:19]}…, the registry was made with {recorded[:19]}….",
            hint=f"Restore that {what}, or {otherwise or 'make a new registry and register the adapters again'}.",
        )


def _read_version(folder: Path, manifest: Manifest) -> Adapter:
    from adapter_hub.adapters.weights import read_adapter

    return read_adapter(
        folder,
        labels=manifest.labels,
        prompt_template=manifest.prompt_template,
        generation=manifest.generation,
        problem_type=manifest.problem_type,
    )


def _fault(check: Callable[[], None]) -> HubError | None:
    try:
        check()
    except HubError as error:
        return error
    return None
