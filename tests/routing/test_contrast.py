"""Negatives: they take off their own adapter's scores, where inputs are like them, and touch nobody else's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from adapter_hub.errors import CorruptIndex, InvalidInput
from adapter_hub.examples import Example
from adapter_hub.refs import AdapterRef
from adapter_hub.routing import contrast as contrast_module
from adapter_hub.routing.calibration import fit
from adapter_hub.routing.contrast import Contrast, left_out_penalties
from adapter_hub.routing.features import Features, extract
from adapter_hub.routing.router import Router
from adapter_hub.routing.statistics import Exemplars, RoutingState, build_state
from tests.routing.conftest import ENCODER

CARDS, FOOD = AdapterRef("cards", 1), AdapterRef("food", 1)
OWN = [f"{verb} my {thing} card" for verb in ("block", "replace", "order", "activate") for thing in ("bank", "debit", "credit")]
OTHERS = [f"{verb} a {dish} for {count}" for verb in ("cook", "order", "serve") for dish in ("pizza", "curry") for count in ("two", "four")]
NEGATIVES = ["draw a birthday card", "write a birthday card", "read my tarot card"]
ASKED = [*NEGATIVES, "send my birthday card", "block my debit card now", "cook a curry", "nothing like it"]


def examples(texts: list[str], label: str | None = None) -> list[Example]:
    return [Example(text, label) for text in texts]


PLAIN = build_state(ENCODER, examples(OWN, "card"))
WARY = build_state(ENCODER, examples(OWN, "card"), negatives=examples(NEGATIVES))
OTHER = build_state(ENCODER, examples(OTHERS, "dish"))
FITTED = fit({CARDS: PLAIN, FOOD: OTHER})


def scores(state: RoutingState) -> dict[str, dict[AdapterRef, float]]:
    router = Router.build({CARDS: state, FOOD: OTHER}, FITTED.calibration, FITTED.head)
    return {text: dict(d.candidates) for text, d in zip(ASKED, router.route(ENCODER, ASKED, k=2, max_false_reject=0), strict=True)}


def test_inputs_like_a_negative_score_less_for_its_adapter_and_the_same_for_others() -> None:
    before, after = scores(PLAIN), scores(WARY)
    for text in ASKED:
        assert after[text][FOOD] == before[text][FOOD]
    for text in (*NEGATIVES, "send my birthday card"):
        assert after[text][CARDS] < before[text][CARDS] - 0.2
    assert after["block my debit card now"][CARDS] == pytest.approx(before["block my debit card now"][CARDS], abs=0.1)


def test_an_exemplar_is_penalised_as_if_it_had_never_been_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against solving again without it, for those that were met; those beyond the limit are inputs as any other."""
    exemplars = Exemplars.of(WARY)
    rows = np.arange(len(exemplars))
    expected = []
    for row in rows:
        kept = np.setdiff1d(rows, [row])
        found = Features.concatenate([exemplars.features[kept], exemplars.negatives])
        gram = contrast_module.Kernel(found)(found).astype(np.float64)
        # The ridge is a share of the mean eigenvalue, which no row changes: each is as near as can be to itself.
        gram[np.diag_indices_from(gram)] += contrast_module.RIDGE * gram[0, 0]
        weights = np.linalg.solve(gram, np.arange(len(gram)) >= len(kept))
        expected.append(max(0.0, float((contrast_module.Kernel(found)(exemplars.features[[row]]) @ weights)[0])))
    np.testing.assert_allclose(left_out_penalties(exemplars, rows), expected, atol=1e-4)
    monkeypatch.setattr(contrast_module, "MET_MAX", 6)
    fewer = Contrast.of(exemplars)
    assert fewer is not None
    unmet = rows[1::2]
    np.testing.assert_allclose(left_out_penalties(exemplars, unmet), fewer.penalties(exemplars.features[unmet]), atol=1e-6)


def test_without_negatives_there_is_no_contrast_and_the_stored_bytes_are_as_before() -> None:
    assert Contrast.of(Exemplars.of(PLAIN)) is None and b"negatives" not in PLAIN.to_bytes()
    back = RoutingState.from_bytes(WARY.to_bytes())
    assert back.digest == WARY.digest != PLAIN.digest and len(back.negatives) == len(NEGATIVES)


def test_what_is_given_now_holds_against_what_was_given_before() -> None:
    taught = WARY.extended(ENCODER, examples([NEGATIVES[0]], "card"), examples([OWN[0], "shuffle the cards"]))
    assert len(taught.negatives) == len(NEGATIVES) - 1 + 2
    assert taught.count == len(OWN) - 1 + 1
    assert len(build_state(ENCODER, examples(OWN), negatives=examples([OWN[0], "else"])).negatives) == 1
    with pytest.raises(InvalidInput, match="every example of this version is among the negatives"):
        PLAIN.extended(ENCODER, [], examples(OWN))


def test_what_is_a_negative_measures_nothing() -> None:
    """An evaluation input among them is dropped, at once and when it is taught."""
    held_out = [*OTHERS[:3], *NEGATIVES]
    state = build_state(ENCODER, examples(OWN), evaluation=examples(held_out), negatives=examples(NEGATIVES))
    assert len(state.evaluation) == 3
    assert len(build_state(ENCODER, examples(OWN), evaluation=examples(held_out)).extended(ENCODER, [], examples(NEGATIVES)).evaluation) == 3


def test_negatives_are_met_evenly_where_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast_module, "MET_MAX", 2)
    many = [f"{text} {i}" for text in NEGATIVES for i in "abc"]
    contrast = Contrast.of(Exemplars.of(build_state(ENCODER, examples(OWN), negatives=examples(many))))
    assert contrast is not None and contrast.basis.width == 2 + 2


def test_a_description_stays_when_only_negatives_are_taught() -> None:
    """Also where it is one of them; a label's name goes."""
    text = "questions about bank cards"
    described = build_state(ENCODER, [], text, label_names=["lost", "found"]).extended(ENCODER, [], examples([*NEGATIVES, text, "found"]))
    assert described.from_description and described.class_names == ("lost", None) and len(described.negatives) == len(NEGATIVES) + 1
    assert build_state(ENCODER, [], text, label_names=["lost", "found"], negatives=examples(["found", text])).class_names == ("lost", None)
    with pytest.raises(InvalidInput, match="this version has no examples"):
        build_state(ENCODER, []).extended(ENCODER, [], examples(NEGATIVES))
    assert not described.extended(ENCODER, examples(OWN, "card")).from_description


def test_a_saved_contrast_answers_the_same_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    contrast = Contrast.of(Exemplars.of(WARY))
    assert contrast is not None
    data, asked = contrast.to_bytes(), extract(ENCODER, ASKED)
    np.testing.assert_array_equal(Contrast.from_bytes(data, tmp_path).penalties(asked), contrast.penalties(asked))
    with pytest.raises(CorruptIndex):
        Contrast.from_bytes(data[:-8], tmp_path)
