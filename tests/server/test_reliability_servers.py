"""The attacks of ``bench reliability`` on real servers, in small."""

from __future__ import annotations

import pytest

from benchmarks._reliability import servers, soak, workflows
from benchmarks._reliability.cases import Setting

SIZES = {servers: 1, soak: 6, workflows: 15}


@pytest.mark.full
@pytest.mark.parametrize("attack", SIZES, ids=lambda attack: attack.ATTACK)
def test_a_small_run_finds_nothing(attack, tmp_path, comfyui_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui_path))
    found = attack.run(Setting(SIZES[attack], 7, tmp_path, lambda line: None))
    assert [failure.problem for failure in found.failures] == []
    assert found.cases >= SIZES[attack]
