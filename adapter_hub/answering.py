"""Answer: *route, then run*. Who answers each input, and with what; where several adapters come near, their answers contend.

`routing` decides and `engine` runs; the hub logs what came of it, and knows when to: nothing here is logged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from adapter_hub.arguments import Generation, Named, aligned
from adapter_hub.chat import Conversation, question_of
from adapter_hub.engine.mixtures import Mixture
from adapter_hub.errors import HubError, InvalidInput
from adapter_hub.prediction import Answering, Prediction, foremost
from adapter_hub.refs import AdapterRef
from adapter_hub.routing.contest import evidence, rivals
from adapter_hub.routing.decision import Decision

# What needs torch is imported by the functions that need it, as in `hub`, which imports this.
if TYPE_CHECKING:
    from adapter_hub.engine.engine import Output, Request
    from adapter_hub.hub import Hub
    from adapter_hub.routing.encoder import Encoder
    from adapter_hub.routing.router import Router


# ---- who answers ----------------------------------------------------------------------------------------------------


def router_at(hub: Hub, max_false_reject: float | None, *, settled: bool = False) -> Router:
    """The router over what is in production; where it turns nobody away, nothing is said of its thresholds. Raises InvalidInput."""
    return hub.live.snapshot(settled=settled, thresholds=checked_rate(hub, max_false_reject) > 0)


def route(
    hub: Hub, router: Router, texts: Sequence[str], k: int, max_false_reject: float | None, encoder: Encoder | None = None
) -> list[Decision]:
    """Where each text belongs, as this router sees it. Raises InvalidInput."""
    from adapter_hub.routing.features import extract

    rate = checked_rate(hub, max_false_reject)
    if not isinstance(k, int) or k < 1:
        raise InvalidInput(f"k={k!r} is not a positive count of candidates.")
    return router.route_features(extract(encoder or hub.encoder_of(router), texts), k=k, max_false_reject=rate) if texts else []


def choose(
    hub: Hub,
    texts: Sequence[str | Conversation],
    adapters: Sequence[Named] | Named,
    max_false_reject: float | None,
    mix: int,
    *,
    gathered: bool = False,
) -> tuple[list[Decision], list[Answering]]:
    """What answers each, and why."""
    if adapters is not None and max_false_reject is not None:
        raise InvalidInput("adapters and max_false_reject exclude each other.", hint="Where the adapters are named, nothing is routed.")
    if isinstance(mix, bool) or not isinstance(mix, int) or mix < 1:
        raise InvalidInput(f"mix={mix!r} is not a positive count of adapters.")
    if adapters is None:
        router, questions = router_at(hub, max_false_reject), [question_of(text) for text in texts]
        encoder = hub.encoder_of(router)
        decisions = route(hub, router, questions, mix, max_false_reject, hub.gathering if gathered else encoder)
        return decisions, [_mixed(hub, decision) if mix > 1 else decision.adapter for decision in decisions]
    if mix > 1:
        raise InvalidInput("adapters were named, and mix is for routed inputs.", hint='Name a mixture: {"legal": 0.7, "tax": 0.3}.')
    answering = [_resolved(hub, named) for named in aligned(adapters, len(texts))]
    return [Decision.named(foremost(adapter)) for adapter in answering], answering


def _mixed(hub: Hub, decision: Decision) -> Answering:
    """The candidates that mix with the one that was accepted, by their weights; None where none was."""
    if decision.adapter is None:
        return None
    weights = {ref: weight for (ref, _), weight in zip(decision.candidates, decision.weights, strict=True)}
    return Mixture.of((ref, weights[ref]) for ref in hub.engine.mixable(list(weights)))


def _resolved(hub: Hub, named: Named) -> Answering:
    if isinstance(named, Mapping):
        return Mixture.of([(hub.registry.resolve(ref), weight) for ref, weight in named.items()])
    return None if named is None else hub.registry.resolve(named)


# ---- what they answer -----------------------------------------------------------------------------------------------


def predict(
    hub: Hub,
    texts: Sequence[str | Conversation],
    adapters: Sequence[Named] | Named = None,
    max_false_reject: float | None = None,
    generation: Generation = None,
    mix: int = 1,
    truncate: bool = True,
    ask: int = 1,
) -> list[Prediction]:
    """`Hub.predict`, and nothing is logged: what the hub asks itself is not what it is asked."""
    if checked_ask(ask) > 1:
        if adapters is not None or mix != 1:
            raise InvalidInput(f"ask={ask} is for routed inputs, and without mix.", hint="Leave out `adapters` and `mix` (`--adapter`, `--mix`).")
        router, rate = router_at(hub, max_false_reject), checked_rate(hub, max_false_reject)
        return [or_raise(one) for one in contest(hub, router, hub.encoder_of(router), texts, generation, rate, truncate, ask)]
    decisions, answering = choose(hub, texts, adapters, max_false_reject, mix)
    outputs = hub.engine.predict(requests_of(hub, texts, answering, truncate), generation=generation)
    return [Prediction.of(*row) for row in zip(decisions, answering, outputs, strict=True)]


def answer_each(
    hub: Hub,
    router: Router,
    encoder: Encoder,
    texts: Sequence[str | Conversation],
    generation: Generation,
    rate: float,
    truncate: bool,
    ask: int,
) -> list[Prediction | HubError]:
    """Each input answered by this router, or its own fault. What is not a row's fault is raised."""
    found: Sequence[Prediction | Exception]
    if ask > 1:
        found = contest(hub, router, encoder, texts, generation, rate, truncate, ask)
    else:
        decisions = route(hub, router, [question_of(text) for text in texts], 1, rate, encoder)
        outputs = hub.engine.answers(requests_of(hub, texts, [decision.adapter for decision in decisions], truncate), generation=generation)
        found = [
            one if isinstance(one, Exception) else Prediction.of(decision, decision.adapter, one)
            for decision, one in zip(decisions, outputs, strict=True)
        ]
    known: list[Prediction | HubError] = []
    for one in found:
        if isinstance(one, Exception) and not isinstance(one, HubError):
            raise one    # the job that asks stops, and can be resumed
        known.append(one)
    return known


def contest(
    hub: Hub,
    router: Router,
    encoder: Encoder,
    texts: Sequence[str | Conversation],
    generation: Generation,
    rate: float,
    truncate: bool,
    ask: int,
) -> list[Prediction | Exception]:
    """Each input answered with the label that wins among router and asked adapters (see `routing.contest`), or why not.

    There is nothing to judge where the chosen one gives no answer that can be weighed.
    """
    from adapter_hub.routing.features import extract
    from adapter_hub.routing.router import SCORE_DECIMALS

    if not texts:
        return []
    features = extract(encoder, [question_of(text) for text in texts])
    decisions = router.route_features(features, k=ask, max_false_reject=rate)
    chosen = [decision.adapter for decision in decisions]
    near = [(row, ref) for row, one in enumerate(decisions) if (them := rivals(one, ask)) and hub.routed_labels(chosen[row]) for ref in them]
    pairs = [*enumerate(chosen), *near]    # the chosen one's answer comes first
    calls = [*generation, *[None] * len(near)] if isinstance(generation, Sequence) else generation
    outputs = hub.engine.answers(requests_of(hub, [texts[row] for row, _ in pairs], [ref for _, ref in pairs], truncate), generation=calls)
    said: dict[int, list[tuple[AdapterRef, Output]]] = {}
    for (row, ref), output in zip(pairs, outputs, strict=True):
        if ref and not isinstance(output, Exception) and output.label in hub.routed_labels(ref) and (row in said or ref == chosen[row]):
            said.setdefault(row, []).append((ref, output))
    flat = [(row, ref, output) for row, answers in said.items() for ref, output in answers]
    answered: dict[int, list[tuple[float, AdapterRef, Output]]] = {}
    all_responses = router.label_responses(features[[row for row, _, _ in flat]], [ref for _, ref, _ in flat]) if flat else []
    for (row, ref, output), responses in zip(flat, all_responses, strict=True):
        labels = zip(hub.routed_labels(ref), responses.tolist(), strict=True)
        known = ((evidence(response, output.scores[label]), response, label) for label, response in labels if label in output.scores)
        _, response, label = max(known, key=lambda one: one[0])
        answered.setdefault(row, []).append((round(response, SCORE_DECIMALS), ref, replace(output, label=label)))
    found: list[Prediction | Exception] = []
    for row, decision in enumerate(decisions):
        ranked = sorted(answered.get(row, ()), key=lambda one: -one[0])    # of equal ones the router's order
        best = ranked[0][2] if ranked else outputs[row]
        asked = tuple((ref, response) for response, ref, _ in ranked) if len(ranked) > 1 else ()
        found.append(best if isinstance(best, Exception) else Prediction.of(decision, decision.adapter, best, asked))
    return found


def requests_of(hub: Hub, texts: Sequence[str | Conversation], answering: Sequence[Answering], truncate: bool) -> list[Request]:
    """Raises InvalidInput."""
    if not isinstance(truncate, bool):
        raise InvalidInput(f"truncate={truncate!r} is neither True nor False.", hint="False refuses what is too long.")
    with hub.importing:
        from adapter_hub.engine.engine import Request

    return [Request(text, adapter, truncate) for text, adapter in zip(texts, answering, strict=True)]


def or_raise(found: Prediction | Exception) -> Prediction:
    if isinstance(found, Exception):
        raise found
    return found


# ---- what may be asked for ------------------------------------------------------------------------------------------


def checked_ask(ask: int) -> int:
    """Raises InvalidInput."""
    if isinstance(ask, bool) or not isinstance(ask, int) or ask < 1:
        raise InvalidInput(f"ask={ask!r} is not a positive count of adapters.")
    return ask


def checked_rate(hub: Hub, max_false_reject: float | None) -> float:
    """The rate that is meant. Raises InvalidInput."""
    from adapter_hub.routing.calibration import check_rate

    return check_rate(hub.config.max_false_reject if max_false_reject is None else max_false_reject)
