"""What tests of routing share."""

from __future__ import annotations

from typing import Any

import pytest

from tests.probes.routing.framework_cases import installed_frameworks


@pytest.fixture(scope="session")
def frameworks() -> dict[str, dict[str, Any]]:
    """Case -> what was found, of all frameworks that are installed; made once, as it takes a minute."""
    return installed_frameworks()
