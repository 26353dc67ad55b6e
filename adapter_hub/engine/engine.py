"""Run requests on the frozen base: one forward for rows of many adapters, of several together, and of the base itself.

The engine is told which adapter; it never chooses one. plan -> hold adapters -> forward -> outputs, in the request's order.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from adapter_hub.adapters.config import HEADED, ProblemType, TaskType
from adapter_hub.adapters.weights import Adapter
from adapter_hub.base_model import BaseKind, Encoded, FrozenBase, tokens_least
from adapter_hub.chat import Conversation, fitting, question_of, shortened
from adapter_hub.engine.draws import Draws
from adapter_hub.engine.generation import Settings, check_generation, for_model, kinds, merged
from adapter_hub.engine.heads import Head, probabilities, summed
from adapter_hub.engine.limits import Limits, Step
from adapter_hub.engine.lora_layers import MixedLayers, Part
from adapter_hub.engine.mixtures import Mixture, Shares, canonical, obstacle
from adapter_hub.engine.plan import BATCH_ROWS_MAX, Batch, BatchPlan, Row, forecast, halves, plan_batches
from adapter_hub.engine.slots import Facts, Mean, Resident, Slots
from adapter_hub.engine.stream import Stream, Tell
from adapter_hub.engine.table import Table
from adapter_hub.errors import InvalidInput, OutOfMemory
from adapter_hub.examples import text_fault
from adapter_hub.refs import AdapterRef

log = logging.getLogger("adapter_hub")

# n rows, t tokens, d hidden width, c labels, k adapters of a row, at most
SLOTS_MAX, BYTES_MAX = 64, 2**31
SCORED_ROWS_MAX = 8    # in a batch of `score`, where each token of each row has a number for every word of the vocabulary
HIDDEN = "hidden"    # the kind of rows that need hidden states only
LIKELY = 0.5         # from this probability on a label of several is given
_BASE = Facts(None, None, None)


@dataclass(frozen=True, slots=True)
class Request:
    """One input and what answers it: a version, several together, or None for the base model."""

    text: str | Conversation                # a conversation where the row generates
    adapter: AdapterRef | Mixture | None    # resolved
    truncate: bool = True                   # a text that is too long is cut; else refused


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
    scores: Mapping[str, float] = field(default_factory=dict)    # SEQ_CLS: label -> probability, of several labels each by itself
    labels: tuple[str, ...] | None = None          # SEQ_CLS of several labels: the likely ones, in the order of the head
    value: float | None = None                     # SEQ_CLS, regression
    tokens: tuple[TokenLabel, ...] | None = None   # TOKEN_CLS
    vector: NDArray[np.float32] | None = None      # embeddings, and the base's rows on an encoder: (d,)
    text: str | None = None                        # generation: what was added to the prompt
    truncated: bool = False                        # the input was longer than there was room for, and cut


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How surely a text is written. The perplexity of several is exp(Σ nats / Σ tokens)."""

    nats: float    # negative log likelihood, summed over its tokens
    tokens: int    # the one that ends it is among them


@dataclass(frozen=True, slots=True)
class _Asked:
    """The rows of a request, aligned."""

    shares: Sequence[Shares]
    facts: Sequence[Facts]
    settings: Sequence[Settings | None]    # None: hidden states are enough
    encoded: Sequence[Encoded]
    answers: Sequence[Sequence[int]] = ()    # of `score`: the tokens that would be written, which end `encoded` on a causal model


_Found = TypeVar("_Found")
_Run = Callable[[Batch, Sequence[Resident], _Asked], dict[int, _Found]]    # one batch, by position in the request


class _TooLong(InvalidInput):
    """Rows that are not to be cut, and would have to be: by position, each with its own error."""

    def __init__(self, faults: Mapping[int, InvalidInput], count: int) -> None:
        i, first = next(iter(faults.items()))
        super().__init__(_positioned(i, count) + first.fact, hint=first.hint)
        self.faults = faults


class Engine:
    """Runs adapters on one base. `load` gives the adapter of a resolved reference. Safe between threads."""

    def __init__(
        self,
        base: FrozenBase,
        load: Callable[[AdapterRef], Adapter],
        *,
        slots_max: int = SLOTS_MAX,
        bytes_max: int = BYTES_MAX,
        host_bytes_max: int = 0,
    ) -> None:
        """At most `slots_max` adapters of `bytes_max` together are resident.

        `host_bytes_max` of those that were read last are kept as they came, checked: to load one again then reads no file.
        """
        self.base = base
        self._layers = MixedLayers(base)
        self.slots = Slots(base, self._layers, load, slots_max, bytes_max, host_bytes_max)
        self.row_ms = Mean()    # of one row in a batch

    def evict(self, ref: AdapterRef) -> None:
        self.slots.evict(ref)

    def predict(
        self, requests: Sequence[Request], *, generation: Settings | Sequence[Settings | None] | None = None
    ) -> list[Output]:
        """One output for each request, in order. `generation` overrides the adapters' own settings, for all rows or one mapping a row.

        A row's result depends on its neighbours by no more than rounding: in float32 1e-5, in fewer bits what those are worth, and
        rarely another label or token wins there. The same request gives the same bytes. What is sampled depends on the row and its
        `seed` alone, so rows of one text and seed get one answer; without a seed each draws anew.
        Adapters may answer together where they agree in task, labels, prompt template and generation settings, and none is a DoRA.
        The order in which a mixture names them changes nothing, and a mixture of one is that adapter. All must be resident at once.
        A text that is too long is cut, which its output says, or refused: see `Request.truncate`.
        Raises InvalidInput for an empty text or one that its adapter cannot take (with its position), an unknown generation setting,
        settings that leave no token to draw, or adapters that do not mix, and what `load` raises. Where the adapters do not fit into the
        slots together, a warning says what loading them again costs.
        """
        return self._found(self._asked(requests, generation), self._answered)

    def score(self, requests: Sequence[Request], targets: Sequence[str]) -> list[Likelihood]:
        """How surely each row's model writes its target, by one forward of prompt and target; in order.

        Prompts are encoded as `predict` does; other generation settings change nothing. Too long a target is cut as in training
        (`FrozenBase.encode_answer`). Raises InvalidInput as `predict` does, and for a row that gets labels, a number or a vector.
        """
        answers = [self.base.encode_answer(target) for target in targets]
        asked = self._asked(requests, [{"max_new_tokens": max(1, len(answer))} for answer in answers])
        if None in asked.settings:
            self.slots.release(_refs(asked.shares))
            with _named(asked.settings.index(None), asked.shares):
                raise InvalidInput("this row gets labels, a number or a vector: there is no text to score.", hint="Use predict.")
        encoded = asked.encoded
        if self.base.kind is BaseKind.CAUSAL:
            whole = [[*prompt.ids["input_ids"], *answer] for prompt, answer in zip(encoded, answers, strict=True)]
            encoded = [Encoded({"input_ids": ids, "attention_mask": [1] * len(ids)}, ()) for ids in whole]
        asked = replace(asked, settings=[None] * len(encoded), encoded=encoded, answers=answers)
        return self._found(asked, self._scored, SCORED_ROWS_MAX)

    def _found(self, asked: _Asked, run: _Run[_Found], rows_max: int = BATCH_ROWS_MAX) -> list[_Found]:
        """What `run` finds of each row, in order."""
        found: dict[int, _Found] = {}
        batches = self._plan(asked, rows_max).batches
        try:
            for batch, after in zip_longest(batches, batches[1:]):
                found |= self._ran(batch, asked, after.adapters if after else (), run)
        finally:
            self.slots.release({ref for batch in batches for ref in batch.adapters})
        return [found[i] for i in range(len(asked.shares))]

    def stream(self, request: Request, *, generation: Settings | None = None) -> Stream:
        """The text that `predict` gives this request alone, piece by piece as it is written.

        Raises InvalidInput as `predict` does, and for what has no pieces: beams, labels, vectors. What comes up later, its iterator raises.
        """
        asked = self._asked([request], generation)
        settings = asked.settings[0]
        if settings is None:
            raise InvalidInput("this row gets labels, a number or a vector: there is no text to stream.", hint="Use predict.")
        if settings["num_beams"] > 1:
            raise InvalidInput(f"num_beams={settings['num_beams']} cannot be streamed: beams agree on a text at its end.", hint="Use predict.")
        [batch] = self._plan(asked).batches

        def run(tell: Tell) -> str:
            step = partial(self._generate, step=lambda ids: tell(self.base.settled(ids)))
            [output] = self._ran(batch, asked, (), step).values()
            return output.text or ""

        return Stream(run, truncated=asked.encoded[0].truncated)

    def _asked(self, requests: Sequence[Request], generation: Settings | Sequence[Settings | None] | None) -> _Asked:
        """Raises InvalidInput."""
        calls = _calls(generation, len(requests))
        for position, request in enumerate(requests, 1):
            if fault := text_fault(question_of(request.text)):
                raise InvalidInput(f"text {position} of {len(requests)} {fault}.", hint="Remove it or write its text.")
        shares = [canonical(request.adapter) for request in requests]
        refs = _refs(shares)
        try:
            return self._read(requests, shares, [self._facts(row, refs) for row in shares], calls)
        except BaseException:    # nothing runs that could use what was read
            self.slots.release(refs)
            raise

    def _read(self, requests: Sequence[Request], shares: Sequence[Shares], facts: Sequence[Facts], calls: Sequence[Settings]) -> _Asked:
        """Raises InvalidInput."""
        settings: list[Settings | None] = []
        for i, (fact, call) in enumerate(zip(facts, calls, strict=True)):
            with _named(i, shares):
                settings.append(self._settings(fact, call))
        encoded = self._encode([request.text for request in requests], facts, settings, shares)
        if faults := {i: self._too_long(encoded[i], settings[i], shares[i]) for i, one in enumerate(requests) if encoded[i].cut and not one.truncate}:
            raise _TooLong(faults, len(requests))
        return _Asked(shares, facts, settings, encoded)

    def _too_long(self, ids: Encoded, settings: Settings | None, shares: Shares) -> InvalidInput:
        """What is said of a row that is not to be cut."""
        more = "" if settings is None else ", ask for fewer new tokens"
        fact = f"{_who(shares)}: the input has {len(ids) + ids.cut} tokens, and there is room for {self._limit(settings)}."
        return InvalidInput(fact, hint=f"Shorten it{more}, or let it be cut: truncate=True (`--truncate`).")

    def answers(
        self, requests: Sequence[Request], *, generation: Settings | Sequence[Settings | None] | None = None
    ) -> list[Output | Exception]:
        """As `predict`, but a row that cannot be answered has what was raised in its place, and the others are answered.

        Adapters that cannot be loaded or mixed are found before anything runs, so the other rows stay one request; any other fault,
        and a file that goes while they run, by halving. Raises InvalidInput for an unknown generation setting.
        """
        calls = _calls(generation, len(requests))
        asked = [canonical(request.adapter) for request in requests]
        refs = _refs(asked)
        try:
            faults = {shares: self._fault(shares, refs) for shares in dict.fromkeys(asked)}
            sound = [i for i, shares in enumerate(asked) if not faults[shares]]
            found = iter(self._halved([requests[i] for i in sound], [calls[i] for i in sound]))
            return [faults[shares] or next(found) for shares in asked]
        finally:
            self.slots.release(refs)

    def _halved(self, requests: Sequence[Request], calls: Sequence[Settings]) -> list[Output | Exception]:
        try:
            return [*self.predict(requests, generation=calls)]
        except _TooLong as error:    # the others stay one request
            faults, kept = error.faults, [i for i in range(len(requests)) if i not in error.faults]
            found = iter(self._halved([requests[i] for i in kept], [calls[i] for i in kept]) if kept else ())
            return [faults.get(i) or next(found) for i in range(len(requests))]
        except Exception as error:    # whatever it is, the neighbours have no part in it
            if len(requests) == 1:
                return [error]
        middle = len(requests) // 2
        parts = (slice(middle), slice(middle, None))
        return [one for part in parts for one in self.answers(requests[part], generation=calls[part])]

    def _fault(self, shares: Shares, beside: Collection[AdapterRef]) -> Exception | None:
        try:
            self._facts(shares, beside)
        except Exception as error:
            return error
        return None

    def _ran(self, batch: Batch, asked: _Asked, then: Sequence[AdapterRef], run: _Run[_Found]) -> dict[int, _Found]:
        """What one batch gives, in halves where memory is short. The files of the adapters that come `then` are read meanwhile."""
        try:
            with self.slots.hold(batch.adapters) as held, torch.inference_mode():
                self.slots.read_ahead(then)
                started = time.perf_counter()
                outputs = run(batch, held, asked)
                self.row_ms.add(1000 * (time.perf_counter() - started), len(outputs))
                return outputs
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if len(batch.rows) == 1:
                hint = "Shorten it, ask for fewer new tokens, or hold the base in fewer bits (precision)."
                raise OutOfMemory(f"one row of {len(asked.encoded[batch.rows[0]])} tokens needs more memory than there is.", hint=hint) from error
            log.warning("a batch of %d rows needs more memory than there is: it is run in halves.", len(batch.rows))
        # After the exception and what its frames hold are gone.
        return {i: output for half in halves(batch) for i, output in self._ran(half, asked, (), run).items()}

    def _answered(self, batch: Batch, held: Sequence[Resident], asked: _Asked) -> dict[int, Output]:
        return self._hidden(batch, held, asked) if batch.kind == HIDDEN else self._generate(batch, held, asked)

    def _plan(self, asked: _Asked, rows_max: int = BATCH_ROWS_MAX) -> BatchPlan:
        tokens = list(map(len, asked.encoded))
        kind: list[Hashable] = [HIDDEN] * len(tokens)
        writing = [(i, settings) for i, settings in enumerate(asked.settings) if settings is not None]
        limit = self.base.tokens_limit if self.base.kind is BaseKind.CAUSAL else None
        found = kinds([settings for _, settings in writing], [tokens[i] for i, _ in writing], limit)
        for (i, settings), one in zip(writing, found, strict=True):
            kind[i], tokens[i] = one, tokens[i] + int(settings["max_new_tokens"])
        rows = [
            Row(tuple(ref for ref, _ in row), one, count, fact.form or () if len(row) == 1 else ())
            for row, fact, one, count in zip(asked.shares, asked.facts, kind, tokens, strict=True)
        ]
        known = {ref: self.slots.facts(ref) for ref in {ref for row in asked.shares for ref, _ in row}}
        sizes = {ref: fact.bytes for ref, fact in known.items()}
        mergeable = {ref: fact.merge_from for ref, fact in known.items() if fact.merge_from is not None}
        places = {"slots_max": self.slots.slots_max, "bytes_max": self.slots.bytes_max}
        plan = plan_batches(rows, rows_max=rows_max, sizes=sizes, mergeable=mergeable, **places)
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
        first, *others = [(ref, self.slots.facts(ref, refs)) for ref in refs]
        return [first[0], *(other[0] for other in others if obstacle(first, other) is None)]

    def _facts(self, shares: Shares, beside: Collection[AdapterRef] = ()) -> Facts:
        """Of a row's adapters, which agree. `beside` are all of the request. Raises InvalidInput where they do not."""
        if not shares:
            return _BASE
        if len(shares) > self.slots.slots_max:
            have = f"this engine holds {self.slots.slots_max}"
            raise InvalidInput(f"a mixture of {len(shares)} adapters needs them all at once, and {have}.", hint="Mix fewer, or raise slots_max.")
        first, *others = [(ref, self.slots.facts(ref, beside)) for ref, _ in shares]
        for other in others:
            if reason := obstacle(first, other):
                raise InvalidInput(f"{first[0]} and {other[0]} cannot answer together: {reason}.", hint="Ask each by itself.")
        return first[1]

    def check(self, adapter: Adapter) -> dict[str, Any]:
        """The adapter's generation settings, checked by name and type, and with its template by what the base can take.

        Raises InvalidInput, as every later request would.
        """
        settings = check_generation(adapter.generation)
        merged({}, settings)    # what could never matter is a mistake
        facts = Facts(adapter.task_type, adapter.labels, adapter.prompt_template, settings)
        self._encode(["text"], [facts], [self._settings(facts, {})])
        return settings

    def _settings(self, facts: Facts, call: Settings) -> Settings | None:
        """How this row generates; None where hidden states are enough."""
        generates = facts.task_type in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)
        if facts is _BASE:
            generates = self.base.kind is not BaseKind.ENCODER
        return dict(merged(facts.generation, call)) if generates else None

    def _encode(
        self,
        texts: Sequence[str | Conversation],
        facts: Sequence[Facts],
        settings: Sequence[Settings | None],
        shares: Sequence[Shares] = (),
    ) -> list[Encoded]:
        """Cut to what the model can take, with room for what a causal model will write. What is cut is the text, never its template.

        Raises InvalidInput, which names the text's position and by `shares` who answers it.
        """
        found: list[Encoded | None] = [None] * len(texts)
        plain: dict[int, list[tuple[int, str]]] = {}    # by limit: many texts are read at once
        for i, (text, row) in enumerate(zip(texts, settings, strict=True)):
            with _named(i, shares):
                limit = self._limit(row)
                if (conversation := _conversation(text, facts[i], row)) is not None:
                    found[i] = self._in_chat(conversation, facts[i], limit)
                else:
                    plain.setdefault(limit, []).append((i, question_of(text)))
        for limit, rows in plain.items():
            encoded = self.base.encode([_prompt(facts[i], text) for i, text in rows], max_tokens=limit)
            for (i, text), ids in zip(rows, encoded, strict=True):
                with _named(i, shares):
                    found[i] = ids if facts[i].prompt_template is None else self._in_template(facts[i], text, ids, limit)
        return cast(list[Encoded], found)

    def _in_template(self, facts: Facts, text: str, ids: Encoded, limit: int) -> Encoded:
        """With offsets that count in the text, not in the prompt made of it; where the prompt was cut, with less of the text instead."""
        if ids.truncated:

            def cut(characters: int) -> bool:
                return self.base.encode([_prompt(facts, text[:characters])], max_tokens=limit)[0].truncated

            text = text[: fitting(f"the prompt template {(facts.prompt_template or '')[:60]!r}", cut, len(text), limit)]
            kept = self.base.encode([_prompt(facts, text)], max_tokens=limit)[0]
            ids = replace(kept, cut=len(ids) + ids.cut - len(kept))
        return _of_text(facts, text, ids)

    def _in_chat(self, conversation: Conversation, facts: Facts, limit: int) -> Encoded:
        """What of it there is room for: see `shortened`."""

        def encoded(some: Conversation) -> Encoded:
            return self.base.encode_chat(some.asking(_prompt(facts, some.question)).messages)

        ids = encoded(conversation)
        if len(ids) <= limit:
            return ids
        kept = shortened(conversation, encoded, limit)
        return replace(kept, cut=len(ids) - len(kept))

    def _limit(self, settings: Settings | None) -> int:
        """Tokens that there is room for in the input of a row. Raises InvalidInput."""
        return self.base.max_tokens if settings is None else self._prompt_limit(int(settings["max_new_tokens"]))

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

    def _hidden(self, batch: Batch, held: Sequence[Resident], asked: _Asked) -> dict[int, Output]:
        inputs = self.base.pad([asked.encoded[i] for i in batch.rows])
        with self._adapted(batch, held, asked.shares) as model:
            body = self.base.body_of(model)(**inputs)
        residents = dict(zip(batch.adapters, held, strict=True))
        found: list[Tensor] = []
        start = 0
        for segment in batch.segments:
            places = slice(start, start + len(segment.rows))
            start += len(segment.rows)
            fact = asked.facts[segment.rows[0]]
            if fact.task_type in HEADED:
                heads = [cast(Head, residents[ref].head) for ref in segment.adapters]
                weights = [[weight for _, weight in asked.shares[i]] for i in segment.rows]
                logits = summed([head.logits(body, inputs, places) for head in heads], weights)
                found.append(probabilities(logits, fact.problem_type))
            else:
                found.append(self.base.pool(body.last_hidden_state[places], inputs["attention_mask"][places]).float())
        outputs: dict[int, Output] = {}
        # Read when all heads are under way: each one read waits for the device.
        for segment, tensor in zip(batch.segments, found, strict=True):
            numbers, fact = tensor.cpu().numpy(), asked.facts[segment.rows[0]]
            for i, row in zip(segment.rows, numbers, strict=True):
                one = asked.encoded[i]
                outputs[i] = _classified(fact, row, one) if fact.task_type in HEADED else Output(vector=row, truncated=one.truncated)
        return outputs

    # ---- likelihoods --------------------------------------------------------------------------------------------

    def _scored(self, batch: Batch, held: Sequence[Resident], asked: _Asked) -> dict[int, Likelihood]:
        causal = self.base.kind is BaseKind.CAUSAL
        answers = [torch.tensor(asked.answers[i]) for i in batch.rows]
        inputs = self.base.pad([asked.encoded[i] for i in batch.rows])
        inputs.pop("token_type_ids", None)
        # Only what is before a token decides it, so padding on the right changes nothing.
        more = {} if causal else {"labels": torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=-100).to(self.base.device)}
        with self._adapted(batch, held, asked.shares) as model:
            logits = cast(Any, model)(**inputs, **more, use_cache=False).logits    # (n, t, vocabulary)
        found = {}
        for row, (i, answer) in enumerate(zip(batch.rows, answers, strict=True)):
            first = len(asked.encoded[i]) - len(answer) - 1 if causal else 0    # a position's logits are for the next token
            own = logits[row, first : first + len(answer)].float()
            nats = torch.nn.functional.cross_entropy(own, answer.to(own.device), reduction="sum")
            found[i] = Likelihood(float(nats), len(answer))
        return found

    # ---- generation ---------------------------------------------------------------------------------------------

    def _generate(self, batch: Batch, held: Sequence[Resident], asked: _Asked, step: Step | None = None) -> dict[int, Output]:
        rows = [cast(Settings, asked.settings[i]) for i in batch.rows]
        encoded = [asked.encoded[i] for i in batch.rows]
        tokenizer = self.base.tokenizer
        inputs = self.base.pad(encoded, generation=True)
        inputs.pop("token_type_ids", None)
        settings = for_model(rows[0]) | {"max_new_tokens": max(row["max_new_tokens"] for row in rows)}
        seeds = [row.get("seed") for row in rows]
        limits, criteria = None, list[Any]()
        if settings["num_beams"] > 1:
            stop, _ = settings.pop("stop_strings", None), settings.pop("seed", None)
            criteria += [self.base.stopping(stop)] if stop else []
        else:
            limits = Limits(self.base, rows, step)
            criteria.append(limits)
        config = cast(Any, GenerationConfig)(**settings, pad_token_id=tokenizer.pad_token_id, eos_token_id=_stops(self.base.model, tokenizer))
        draws = Draws(seeds, self.base.device) if settings["do_sample"] else nullcontext()
        with self._adapted(batch, held, asked.shares, steps=True) as model, draws, _sampling(settings):
            written: Tensor = cast(Any, model).generate(**inputs, generation_config=config, stopping_criteria=criteria)
        if limits is not None:
            new: Tensor | list[Tensor] = limits.cut(written)
        else:
            new = written[:, inputs["input_ids"].shape[1] :] if self.base.kind is BaseKind.CAUSAL else written
        texts = self.base.decode(new)
        return {i: Output(text=text, truncated=one.truncated) for i, text, one in zip(batch.rows, texts, encoded, strict=True)}


def _refs(shares: Sequence[Shares]) -> set[AdapterRef]:
    return {ref for row in shares for ref, _ in row}


def _out_of_memory(error: Exception) -> bool:
    """torch says it of a device by its own class, of the CPU in words alone."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def _sampling(settings: Settings) -> Iterator[None]:
    """Raises InvalidInput where a step leaves no token that could be drawn."""
    try:
        yield
    except RuntimeError as error:
        if "probability" not in str(error):    # torch.multinomial's own words, and those of Draws
            raise
        named = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        hint = "Choose a higher temperature and looser limits; if that does not help, the adapter's weights are too large."
        raise InvalidInput(f"with {named} no token is left that could be drawn.", hint=hint) from error


def _calls(generation: Settings | Sequence[Settings | None] | None, count: int) -> list[Settings]:
    """The settings of each row of a call, checked. Raises InvalidInput."""
    if isinstance(generation, str) or not isinstance(generation, Sequence):
        return [check_generation({} if generation is None else generation)] * count
    if len(generation) != count:
        fact = f"{len(generation)} generation settings were given for {count} texts"
        raise InvalidInput(f"{fact}.", hint="Give one mapping for each text, or one for all.")
    return [check_generation(row or {}, f"generation {position}") for position, row in enumerate(generation, 1)]


@contextmanager
def _named(i: int, shares: Sequence[Shares]) -> Iterator[None]:
    """What is wrong with a row is said with its position, where there are several, and with who answers it."""
    try:
        yield
    except InvalidInput as error:
        if not shares:
            raise
        raise InvalidInput(f"{_positioned(i, len(shares))}{_who(shares[i])}: {error.fact}", hint=error.hint) from error


def _positioned(i: int, count: int) -> str:
    return f"text {i + 1} of {count}, " if count > 1 else ""


def _who(shares: Shares) -> str:
    return " and ".join(str(ref) for ref, _ in shares) or "the base model"


def _conversation(text: str | Conversation, facts: Facts, settings: Settings | None) -> Conversation | None:
    """What goes into the chat template; None for a text that goes without. Raises InvalidInput."""
    if isinstance(text, Conversation):
        if settings is None:
            raise InvalidInput("a conversation is for a model that writes; this row gets labels, a number or a vector.", hint="Give its text.")
        if facts.prompt_template is not None:
            shown = repr(facts.prompt_template[:60])
            raise InvalidInput(f"the adapter's prompt template {shown} takes a text, not a conversation.", hint="Give its text.")
        return text.under(settings.get("system"))
    if settings is None or not settings.get("chat"):
        if settings is not None and "system" in settings:
            raise InvalidInput("the setting `system` is for a chat.", hint='Give {"chat": true} as well, or ask with a conversation.')
        return None
    return Conversation((("user", text),)).under(settings.get("system"))


def _prompt(facts: Facts, text: str) -> str:
    return text if facts.prompt_template is None else facts.prompt_template.replace("{text}", text)


def _of_text(facts: Facts, text: str, ids: Encoded) -> Encoded:
    """The template's own tokens get the offsets (0, 0)."""
    shift = cast(str, facts.prompt_template).index("{text}")
    moved = ((max(start - shift, 0), min(end - shift, len(text))) for start, end in ids.offsets)
    return replace(ids, offsets=tuple((start, end) if start < end else (0, 0) for start, end in moved))


def _classified(facts: Facts, scores: NDArray[np.float32], ids: Encoded) -> Output:
    """Of a head's probabilities (c,), or (t, c) for tokens; of a regression its number (1,)."""
    if facts.problem_type is ProblemType.REGRESSION:
        return Output(value=float(scores[0]), truncated=ids.truncated)
    assert facts.labels is not None
    if facts.task_type is TaskType.TOKEN_CLS:
        return _token_labels(facts.labels, scores, ids)
    found = {label: float(score) for label, score in zip(facts.labels, scores, strict=True)}
    if facts.problem_type is ProblemType.MULTI:
        return Output(labels=tuple(label for label, score in found.items() if score >= LIKELY), scores=found, truncated=ids.truncated)
    return Output(label=facts.labels[int(scores.argmax())], scores=found, truncated=ids.truncated)


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
