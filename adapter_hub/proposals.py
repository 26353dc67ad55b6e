"""Proposals of new tasks: look for them in the log of what was turned away, and let a person accept or dismiss them.

`continual.proposals` finds and notes them; here the hub routes and answers for it, and what is accepted is learned or taught.
This module loads torch: `hub` imports it inside the methods that need it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_hub.adapters.config import ProblemType, TaskType
from adapter_hub.answering import checked_rate, predict
from adapter_hub.arguments import rows_of
from adapter_hub.continual.discovery import DiscoveryConfig
from adapter_hub.continual.proposals import Accepted, Proposal, Proposals, State, labelled
from adapter_hub.errors import AdapterNotFound, InvalidInput, NotRoutable
from adapter_hub.examples import Example, targets_of
from adapter_hub.refs import check_name

if TYPE_CHECKING:
    from adapter_hub.hub import Hub


def proposals_of(hub: Hub, config: DiscoveryConfig | None = None) -> Proposals:
    """What the notes of the registry say of them."""
    return Proposals(hub.log, hub.registry.notes, config)


# ---- look -----------------------------------------------------------------------------------------------------------


def look(hub: Hub, config: DiscoveryConfig | None = None) -> list[Proposal]:
    """See `Hub.proposals`: those that are open after a look."""
    if hub.config.observe != "text":
        hint = 'Set observe = "text" and keep = "text" in hub.toml, and restart what serves: what is logged from then on is looked through.'
        raise InvalidInput(f'the log of answers keeps no texts: hub.toml says observe = "{hub.config.observe}".', hint=hint)
    router, rate = hub.live.snapshot(), checked_rate(hub, None)
    with hub.looking(hub.encoder_of(router)) as encoded:
        route = partial(router.route_features, max_false_reject=rate)
        return proposals_of(hub, config).look(encoded, route, rate, hub.names(), partial(_sureness, hub), partial(_knows, hub))


def _knows(hub: Hub, name: str, label: str | None) -> bool:
    with suppress(AdapterNotFound, NotRoutable):
        return label is None or label in (hub.registry.manifest(name).labels or ())
    return False


def _sureness(hub: Hub, name: str, texts: Sequence[str]) -> Sequence[float]:
    """The probability that an adapter gives its likeliest label on each text; nothing where it is no classifier of one label."""
    manifest = hub.registry.manifest(name)
    if manifest.task_type != TaskType.SEQ_CLS or manifest.problem_type not in (None, ProblemType.SINGLE) or not manifest.labels or not texts:
        return ()
    return [max(one.scores.values()) for one in predict(hub, texts, adapters=str(manifest.ref))]


# ---- decide ---------------------------------------------------------------------------------------------------------


def accept(
    hub: Hub,
    ids: Sequence[str],
    name: str | None,
    labels: Mapping[str, str | None] | None,
    train: str | Path | Iterable[Mapping[str, Any] | Example] | None,
    reason: str,
    learning: Mapping[str, Any],
) -> Accepted:
    """See `Hub.accept`."""
    with hub.registry.deciding():
        proposals = proposals_of(hub)
        rows, proposed = proposals.rows(ids), proposals.teach(ids)
        if name is None:
            hint = f"It is proposed to teach {proposed}: name it (`--name {proposed}`)." if proposed else "Name the skill (`--name`)."
            raise InvalidInput("these proposals have no name.", hint=f"{hint} A registered adapter is taught them, or with labels learns on.")
        check_name(name)
        if not rows and train is None:
            raise InvalidInput("the log has nothing left of these inputs.", hint="Look again: `adapter-hub proposals`.")
        report = None
        if labels is not None or train is not None:
            given = labelled(rows, labels or {}) if train is None else [row for row in rows_of(train) if row.label or targets_of(row)]
            if not given:
                raise InvalidInput("none of the rows has a label.", hint="Write one to each (`label`); rows that are left without are left out.")
            report = hub.learn(name, given, **learning)
            ref = report.ref
        elif name in hub:
            ref = hub.teach(name, [row.text for row in rows])
        else:
            return Accepted(tuple(ids), name, rows=tuple(rows))
        proposals.decide(ids, State.ACCEPTED, reason, str(ref))
        return Accepted(tuple(ids), name, ref, report)


def dismiss(hub: Hub, ids: Sequence[str], reason: str) -> None:
    """See `Hub.dismiss`."""
    with hub.registry.deciding():
        proposals_of(hub).decide(ids, State.DISMISSED, reason)
