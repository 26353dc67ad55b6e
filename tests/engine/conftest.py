"""Where models run: each test that asks for a base by this fixture runs on the processor, and on a CUDA device where there is one."""

from __future__ import annotations

import pytest

from tests.engine.reference import DEVICES


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)
