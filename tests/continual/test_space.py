"""The router's space on a plane: what lies where, and what the field says. Pure."""

from __future__ import annotations

import numpy as np
import pytest

from adapter_hub.continual.space import space_of
from adapter_hub.refs import AdapterRef

REFS = [AdapterRef(f"n{number}", 1) for number in range(4)]
RNG = np.random.default_rng(5)
CENTRES = np.linalg.qr(RNG.normal(size=(16, 16)))[0][:4]


def around(centre: np.ndarray, count: int) -> np.ndarray:
    vectors = centre + 0.05 * RNG.normal(size=(count, 16))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


EXEMPLARS = {ref: (around(centre, 12), [f"class {i % 3}" for i in range(12)]) for ref, centre in zip(REFS, CENTRES, strict=True)}
NOBODY = np.empty((0, 16))


def test_points_are_projections_on_the_plane_of_the_means() -> None:
    found = space_of(EXEMPLARS, {}, {}, EXEMPLARS[REFS[1]][0][:2], [(REFS[1], True), (None, False)], 0.05)
    means = np.array([EXEMPLARS[ref][0].mean(axis=0) for ref in REFS])
    _, values, axes = np.linalg.svd(means - means.mean(axis=0))
    assert found.held == pytest.approx((values[:2] ** 2).sum() / (values**2).sum())
    for land, ref in zip(found.lands, REFS, strict=True):
        expected = (EXEMPLARS[ref][0] - means.mean(axis=0)) @ axes[:2].T
        assert np.allclose(np.abs(land.exemplars), np.abs(expected)) and len(land.prototypes) == 3
    assert [(one.adapter, one.accepted) for one in found.asked] == [(REFS[1], True), (None, False)]
    assert np.allclose([(one.x, one.y) for one in found.asked], found.lands[1].exemplars[:2])


def test_the_plane_is_the_same_in_whatever_order_adapters_come() -> None:
    one, other = (space_of(dict(items), {}, {}, NOBODY, [], 0.05) for items in (EXEMPLARS.items(), reversed(EXEMPLARS.items())))
    assert all(a.ref == b.ref and np.allclose(a.exemplars, b.exemplars) for a, b in zip(one.lands, other.lands, strict=True))


def test_the_field_is_the_share_of_the_inputs_near_a_place_that_are_turned_away_and_says_nothing_where_there_are_none() -> None:
    inputs = {ref: around(centre, 60) for ref, centre in zip(REFS, CENTRES, strict=True)}
    margins = {ref: [-1.0 if ref == REFS[2] else 1.0] * 60 for ref in REFS}
    found = space_of(EXEMPLARS, inputs, margins, NOBODY, [], 0.05)
    field = found.field()
    assert field is not None
    x, y, share = field
    for land in found.lands:
        middle = land.inputs.mean(axis=0)
        here = share[np.abs(y - middle[1]).argmin(), np.abs(x - middle[0]).argmin()]
        others = [other for other in found.lands if other.ref != land.ref and np.linalg.norm(other.inputs.mean(axis=0) - middle) < 0.4]
        if not others:    # two that the plane lays on each other share a place
            assert here == pytest.approx(float(land.ref == REFS[2]), abs=0.05)
    assert np.isnan(share).any() and np.nanmin(share) >= 0 and np.nanmax(share) <= 1


@pytest.mark.parametrize("count", [0, 1, 2])
def test_of_few_adapters_there_is_a_plane_too(count: int) -> None:
    found = space_of({ref: EXEMPLARS[ref] for ref in REFS[:count]}, {}, {}, NOBODY, [], 0.05)
    assert len(found.lands) == count and found.field() is None and 0 <= found.held <= 1
    assert all(np.isfinite(land.exemplars).all() for land in found.lands)


def test_one_exemplar_is_a_plane() -> None:
    found = space_of({REFS[0]: (EXEMPLARS[REFS[0]][0][:1], ["x"])}, {}, {}, NOBODY, [], 0.05)
    assert np.array_equal(found.lands[0].exemplars, np.zeros((1, 2)))
