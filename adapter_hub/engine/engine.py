"""Run requests on the frozen base: one forward for rows of many adapters, of several together, and of the base itself.

The engine is told which adapter; it never chooses one. plan -> hold adapters -> forward -> outputs, in the request's order.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from adapter_hub.adapters.config import HEADED, TaskType
from adapter_hub.adapters.weights import Adapter
from adapter_hub.base_model import BaseKind, Encoded, FrozenBase, tokens_least
from adapter_hub.engine.draws import Draws
from adapter_hub.engine.generation import check_generation, merged
from adapter_hub.engine.heads import Head, probabilities, summed
from adapter_hub.engine.lora_layers import MixedLayers, Part
from adapter_hub.engine.mixtures import Mixture, Shares, canonical, obstacle
from adapter_hub.engine.plan import Batch, BatchPlan, Row, forecast, halves, plan_batches
from adapter_hub.engine.slots import Facts, Mean, Resident, Slots
from adapter_hub.engine.table import Table
from adapter_hub.errors import HubError, InvalidInput
from adapter_hub.examples import text_fault
from adapter_hub.refs import AdapterRef

log = logging.getLogger("adapter_hub")

# n rows, t tokens, d hidden width, c labels, k adapters of a row, at most
SLOTS_MAX, BYTES_MAX = 64, 2**31
HIDDEN = "hidden"    # the kind of rows that need hidden states only
_BASE = Facts(None, None, None)


@dataclass(frozen=True, slots=True)
class Request:
    """One input and what answers it: a version, several together, or None for the base model."""

    text: str
    adapter: AdapterRef | Mixture | None    # resolved


@dataclass(frozen=True, slots=True)
class TokenLabel:
    """One token's label. `text[start:end]` is the token, in the request's text; a prompt template's own tokens have none."""

    start: int
    end: int
    label: str
    score: float    # probability

    def to_json(self) -> dict[str, Any]:
        return {"start": self.start, "end": self.end, "label": self.label, "score": round(self.score, 6)}


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """What one row got. Which fields are filled follows from the adapter's task type."""

    label: str | None = None                       # SEQ_CLS: the most probable label
    scores: Mapping[str, float] = field(default_factory=dict)    # SEQ_CLS: label -> probability
    tokens: tuple[TokenLabel, ...] | None = None   # TOKEN_CLS
    vector: NDArray[np.float32] | None = None      # embeddings, and the base's rows on an encoder: (d,)
    text: str | None = None                        # generation: what was added to the prompt
    truncated: bool = False                        # the input was longer than the base's max_tokens


class Engine:
    """Runs adapters on one base. `load` gives the adapter of a resolved reference. Safe between threads."""

    def __init__(self, base: FrozenBase, load: Callable[[AdapterRef], Adapter], *, slots_max: int = SLOTS_MAX, bytes_max: int = BYTES_MAX) -> None:
        """At most `slots_max` adapters of `bytes_max` together are resident."""
        self.base = base
        self._layers = MixedLayers(base)
        self.slots = Slots(base, self._layers, load, slots_max, bytes_max)
        self.row_ms = Mean()    # of one row in a batch

    def evict(self, ref: AdapterRef) -> None:
        self.slots.evict(ref)

    def predict(self, requests: Sequence[Request], *, generation: Mapping[str, Any] | None = None) -> list[Output]:
        """One output for each request, in order. `generation` overrides the adapters' own settings.

        A row's result depends on its neighbours by no more than rounding (1e-5); the same request gives the same bytes. What is
        sampled depends on the row and its `seed` alone, so rows of one text and seed get one answer; without a seed each draws anew.
        Adapters may answer together where they agree in task, labels, prompt template and generation settings, and none is a DoRA.
        The order in which a mixture names them changes nothing, and a mixture of one is that adapter. All must be resident at once.
        Raises InvalidInput for an empty text (with its position), an unknown generation setting or adapters that do not mix,
        and what `load` raises. Where the adapters do not fit into the slots together, a warning says what loading them again costs.
        """
        call = check_generation(generation or {})
        for position, request in enumerate(requests, 1):
            if fault := text_fault(request.text):
                raise InvalidInput(f"text {position} of {len(requests)} {fault}.", hint="Remove it or write its text.")
        shares = [canonical(request.adapter) for request in requests]
        facts = [self._facts(row) for row in shares]
        kinds = [self._kind(fact, call) for fact in facts]
        encoded = self._encode([request.text for request in requests], facts, kinds)
        outputs: dict[int, Output] = {}
        batches = self._plan(shares, facts, kinds, encoded).batches
        try:
            for batch, after in zip_longest(batches, batches[1:]):
                outputs |= self._ran(batch, shares, facts, encoded, after.adapters if after else ())
        finally:
            self.slots.release({ref for batch in batches for ref in batch.adapters})
        return [outputs[i] for i in range(len(requests))]

    def answers(self, requests: Sequence[Request], *, generation: Mapping[str, Any] | None = None) -> list[Output | HubError]:
        """As `predict`, but a row that cannot be answered has the reason in its place, and the others are answered.

        Adapters that cannot be loaded or mixed are found before anything runs, so the other rows stay one request; any other fault,
        and a file that goes while they run, by halving. Raises InvalidInput for an unknown generation setting.
        """
        check_generation(generation or {})
        asked = [canonical(request.adapter) for request in requests]
        faults = {shares: self._fault(shares) for shares in dict.fromkeys(asked)}
        found = iter(self._halved([request for request, shares in zip(requests, asked, strict=True) if not faults[shares]], generation))
        return [faults[shares] or next(found) for shares in asked]

    def _halved(self, requests: Sequence[Request], generation: Mapping[str, Any] | None) -> list[Output | HubError]:
        try:
            return [*self.predict(requests, generation=generation)]
        except HubError as error:
            if len(requests) == 1:
                return [error]
        middle = len(requests) // 2
        return [one for half in (requests[:middle], requests[middle:]) for one in self.answers(half, generation=generation)]

    def _fault(self, shares: Shares) -> HubError | None:
        try:
            self._facts(shares)
        except HubError as error:
            return error
        return None

    def _ran(
        self, batch: Batch, shares: Sequence[Shares], facts: Sequence[Facts], encoded: Sequence[Encoded], then: Sequence[AdapterRef]
    ) -> dict[int, Output]:
        """The outputs of one batch, in halves where memory is short. The files of the adapters that come `then` are read meanwhile."""
        run = self._hidden if batch.kind == HIDDEN else self._generate
        try:
            with self.slots.hold(batch.adapters) as held, torch.inference_mode():
                self.slots.read_ahead(then)
                started = time.perf_counter()
                outputs = run(batch, held, shares, facts, encoded)
                self.row_ms.add(1000 * (time.perf_counter() - started), len(outputs))
                return outputs
        except (MemoryError, RuntimeError) as error:
            if len(batch.rows) == 1 or not _out_of_memory(error):
                raise
            log.warning("a batch of %d rows needs more memory than there is: it is run in halves.", len(batch.rows))
        # After the exception and what its frames hold are gone.
        return {i: output for half in halves(batch) for i, output in self._ran(half, shares, facts, encoded, ()).items()}

    def _plan(self, shares: Sequence[Shares], facts: Sequence[Facts], kinds: Sequence[Hashable], encoded: Sequence[Encoded]) -> BatchPlan:
        rows = [
            Row(tuple(ref for ref, _ in row), kind, len(ids), fact.form or () if len(row) == 1 else ())
            for row, fact, kind, ids in zip(shares, facts, kinds, encoded, strict=True)
        ]
        known = {ref: self.slots.facts(ref) for ref in {ref for row in shares for ref, _ in row}}
        sizes, mergeable = {ref: fact.bytes for ref, fact in known.items()}, {ref for ref, fact in known.items() if fact.mergeable}
        places = {"slots_max": self.slots.slots_max, "bytes_max": self.slots.bytes_max}
        plan = plan_batches(rows, sizes=sizes, mergeable=mergeable, **places)
        coming = forecast(plan, sizes, **places)
        if not coming.fits:
            log.warning(
                "the %d adapters of this request (%.1f MB) take turns in %d places (%.1f MB): up to %d loads, %d of them repeated, "
                "about %.0f ms beside %.0f ms for the rows. A larger slots_max or bytes_max keeps them resident.",
                coming.adapters, coming.bytes / 1e6, self.slots.slots_max, self.slots.bytes_max / 1e6, coming.loads, coming.repeats,
                coming.extra_ms(self.slots.load_ms.value), len(rows) * self.row_ms.value,
            )    # fmt: skip
        return plan

    def mixable(self, refs: Sequence[AdapterRef]) -> list[AdapterRef]:
        """The first of these versions, and those of the others that can answer together with it."""
        first, *others = [(ref, self.slots.facts(ref)) for ref in refs]
        return [first[0], *(other[0] for other in others if obstacle(first, other) is None)]

    def _facts(self, shares: Shares) -> Facts:
        """Of a row's adapters, which agree. Raises InvalidInput where they do not."""
        if not shares:
            return _BASE
        if len(shares) > self.slots.slots_max:
            have = f"this engine holds {self.slots.slots_max}"
            raise InvalidInput(f"a mixture of {len(shares)} adapters needs them all at once, and {have}.", hint="Mix fewer, or raise slots_max.")
        first, *others = [(ref, self.slots.facts(ref)) for ref, _ in shares]
        for other in others:
            if reason := obstacle(first, other):
                raise InvalidInput(f"{first[0]} and {other[0]} cannot answer together: {reason}.", hint="Ask each by itself.")
        return first[1]

    def check(self, adapter: Adapter) -> dict[str, Any]:
        """The adapter's generation settings, checked by name and type, and with its template by what the base can take.

        Raises InvalidInput, as every later request would.
        """
        settings = check_generation(adapter.generation)
        facts = Facts(adapter.task_type, adapter.labels, adapter.prompt_template, settings)
        self._encode(["text"], [facts], [self._kind(facts, {})])
        return settings

    def _kind(self, facts: Facts, call: Mapping[str, Any]) -> Hashable:
        """HIDDEN, or the generation settings of this row."""
        generates = facts.task_type in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)
        if facts is _BASE:
            generates = self.base.kind is not BaseKind.ENCODER
        return merged(facts.generation, call) if generates else HIDDEN

    def _encode(self, texts: Sequence[str], facts: Sequence[Facts], kinds: Sequence[Hashable]) -> list[Encoded]:
        """Cut to what the model can take, with room for what a causal model will write. What is cut is the text, never its template."""
        found: list[Encoded | None] = [None] * len(texts)
        for kind in dict.fromkeys(kinds):
            rows = [i for i, other in enumerate(kinds) if other == kind]
            limit = self.base.max_tokens
            if kind != HIDDEN:
                limit = self._prompt_limit(int(dict(cast(Any, kind))["max_new_tokens"]))
            for i, ids in zip(rows, self.base.encode([_prompt(facts[i], texts[i]) for i in rows], max_tokens=limit), strict=True):
                found[i] = ids if facts[i].prompt_template is None else self._in_template(facts[i], texts[i], ids, limit)
        return cast(list[Encoded], found)

    def _in_template(self, facts: Facts, text: str, ids: Encoded, limit: int) -> Encoded:
        """With offsets that count in the text, not in the prompt made of it; where the prompt was cut, with less of the text instead."""
        if ids.truncated:
            kept = self._fitting(facts, text, limit)
            text = text[:kept]
            ids = replace(self.base.encode([_prompt(facts, text)], max_tokens=limit)[0], truncated=True)
        return _of_text(facts, text, ids)

    def _fitting(self, facts: Facts, text: str, limit: int) -> int:
        """How many characters of the text the template leaves room for. Raises InvalidInput for none."""

        def cut(characters: int) -> bool:
            return self.base.encode([_prompt(facts, text[:characters])], max_tokens=limit)[0].truncated

        most = limit    # doubled until it is too many: the search takes no longer for a longer text
        while most < len(text) and not cut(most):
            most *= 2
        kept = bisect.bisect_left(range(min(most, len(text))), True, key=cut) - 1
        if kept < 1:
            shown = repr((facts.prompt_template or "")[:60])
            raise InvalidInput(f"the prompt template {shown} leaves no room for a text in {limit} tokens.", hint="Shorten the template.")
        return kept

    def _prompt_limit(self, new: int) -> int:
        """Longest prompt when `new` tokens are to be written. Raises InvalidInput."""
        limit = self.base.max_tokens
        hint = "Ask for fewer new tokens."
        if self.base.kind is BaseKind.CAUSAL:
            limit = min(limit, self.base.tokens_limit - new)
            if limit < tokens_least(self.base.tokenizer):
                whole = f"the model takes {self.base.tokens_limit} tokens in all"
                raise InvalidInput(f"max_new_tokens={new} leaves no room for a prompt: {whole}.", hint=hint)
        # What a seq2seq model writes has positions of its own, where it counts them at all (T5 does not).
        positions = getattr(self.base.model.config, "max_position_embeddings", None)
        if self.base.kind is BaseKind.SEQ2SEQ and positions and new > positions:
            raise InvalidInput(f"max_new_tokens={new} is more than the model can write: it has {positions} positions.", hint=hint)
        return limit

    @contextmanager
    def _adapted(self, batch: Batch, held: Sequence[Resident], shares: Sequence[Shares], *, steps: bool = False) -> Iterator[PreTrainedModel]:
        """The model to run these rows on, adapted while the context is open."""
        if batch.merged:
            yield self.slots.merged(batch.adapters[0], held[0])
        else:
            with self._open(batch, held, shares, steps=steps):
                yield self.base.model

    def _open(self, batch: Batch, held: Sequence[Resident], shares: Sequence[Shares], *, steps: bool = False) -> Any:
        """The base adapted for these rows; with `steps` for several forwards of them."""
        residents = dict(zip(batch.adapters, held, strict=True))
        found: dict[tuple[int, bool, Table], list[tuple[int, int, float]]] = {}    # (row, place, weight) of each part
        for row, i in enumerate(batch.rows):
            for nth, (ref, weight) in enumerate(shares[i]):
                adapter = residents[ref]
                found.setdefault((nth, len(shares[i]) > 1, adapter.table), []).append((row, adapter.place, weight))
        parts = [self._part(rows, table, weighted, steps) for (_, weighted, table), rows in found.items()]
        return self._layers.open(len(batch.rows), parts)

    def _part(self, found: Sequence[tuple[int, int, float]], table: Table, weighted: bool, steps: bool) -> Part:
        rows, places, weights = zip(*found, strict=True)
        together = rows == tuple(range(rows[0], rows[0] + len(rows)))
        tensor = partial(torch.tensor, device=self.base.device)
        return Part(
            rows=slice(rows[0], rows[0] + len(rows)) if together else tensor(rows),
            places=tensor(places),
            stacks=table.stacks,
            weights=tensor(weights, dtype=torch.float32) if weighted else None,
            lone=places[0] if len(set(places)) == 1 else None,
            taken={} if steps else None,
        )

    # ---- classification and embeddings --------------------------------------------------------------------------

    def _hidden(
        self, batch: Batch, held: Sequence[Resident], shares: Sequence[Shares], facts: Sequence[Facts], encoded: Sequence[Encoded]
    ) -> dict[int, Output]:
        inputs = self.base.pad([encoded[i] for i in batch.rows])
        with self._adapted(batch, held, shares) as model:
            body = self.base.body_of(model)(**inputs)
        residents = dict(zip(batch.adapters, held, strict=True))
        outputs: dict[int, Output] = {}
        start = 0
        for segment in batch.segments:
            places = torch.arange(start, start + len(segment.rows), device=self.base.device)
            start += len(segment.rows)
            fact, ids = facts[segment.rows[0]], [encoded[i] for i in segment.rows]
            if fact.task_type in HEADED:
                assert fact.labels is not None
                heads = [cast(Head, residents[ref].head) for ref in segment.adapters]
                weights = [[weight for _, weight in shares[i]] for i in segment.rows]
                logits = summed([head.logits(body, inputs, places) for head in heads], weights)
                scores = probabilities(logits).cpu().numpy()
                classify = _token_labels if fact.task_type is TaskType.TOKEN_CLS else _label
                made = [classify(fact.labels, row, one) for row, one in zip(scores, ids, strict=True)]
            else:
                pooled = self.base.pool(body.last_hidden_state[places], inputs["attention_mask"][places]).float().cpu().numpy()
                made = [Output(vector=vector, truncated=one.truncated) for vector, one in zip(pooled, ids, strict=True)]
            outputs |= zip(segment.rows, made, strict=True)
        return outputs

    # ---- generation ---------------------------------------------------------------------------------------------

    def _generate(
        self, batch: Batch, held: Sequence[Resident], shares: Sequence[Shares], _: Sequence[Facts], encoded: Sequence[Encoded]
    ) -> dict[int, Output]:
        settings = dict(cast(Any, batch.kind))
        seed = settings.pop("seed", None)
        stop = settings.pop("stop_strings", None)
        tokenizer = self.base.tokenizer
        inputs = self.base.pad([encoded[i] for i in batch.rows], generation=True)
        inputs.pop("token_type_ids", None)
        config = cast(Any, GenerationConfig)(**settings, pad_token_id=tokenizer.pad_token_id, eos_token_id=_stops(self.base.model, tokenizer))
        if stop:
            config.stop_strings = [stop] if isinstance(stop, str) else list(stop)
        draws = Draws(len(batch.rows), seed, self.base.device) if settings["do_sample"] else nullcontext()
        with self._adapted(batch, held, shares, steps=True) as model, draws:
            written: Tensor = cast(Any, model).generate(**inputs, generation_config=config, tokenizer=tokenizer if stop else None)
        if self.base.kind is BaseKind.CAUSAL:
            written = written[:, inputs["input_ids"].shape[1] :]
        texts = self.base.decode(written)
        return {i: Output(text=text, truncated=encoded[i].truncated) for i, text in zip(batch.rows, texts, strict=True)}


def _out_of_memory(error: Exception) -> bool:
    """torch says it of a device by its own class, of the CPU in words alone."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _prompt(facts: Facts, text: str) -> str:
    return text if facts.prompt_template is None else facts.prompt_template.replace("{text}", text)


def _of_text(facts: Facts, text: str, ids: Encoded) -> Encoded:
    """The template's own tokens get the offsets (0, 0)."""
    shift = cast(str, facts.prompt_template).index("{text}")
    moved = ((max(start - shift, 0), min(end - shift, len(text))) for start, end in ids.offsets)
    return replace(ids, offsets=tuple((start, end) if start < end else (0, 0) for start, end in moved))


def _label(labels: tuple[str, ...], scores: NDArray[np.float32], ids: Encoded) -> Output:
    found = {label: float(score) for label, score in zip(labels, scores, strict=True)}
    return Output(label=labels[int(scores.argmax())], scores=found, truncated=ids.truncated)


def _token_labels(labels: tuple[str, ...], scores: NDArray[np.float32], ids: Encoded) -> Output:
    """`scores` (t, c) of a padded row; special tokens and padding have no characters and no label."""
    best = scores.argmax(axis=1)
    tokens = tuple(
        TokenLabel(start, end, labels[int(best[t])], float(scores[t, best[t]])) for t, (start, end) in enumerate(ids.offsets) if end > start
    )
    return Output(tokens=tokens, truncated=ids.truncated)


def _stops(model: Any, tokenizer: Any) -> Any:
    """The model's own end tokens; the tokenizer's where the model names none."""
    own = model.generation_config.eos_token_id
    return tokenizer.eos_token_id if own is None else own
