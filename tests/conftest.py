"""What every test may rely on: a process environment without settings of ours."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_settings_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own ``AYDER_*``, ``RF_*`` or ``PORT`` must not decide a test."""
    for name in list(os.environ):
        if name == "PORT" or name.startswith(("AYDER_", "RF_", "RL_DEFAULT_", "BP_", "RAMFORGE_")):
            monkeypatch.delenv(name)
