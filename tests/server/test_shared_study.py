"""The same workflow posted to two real servers, one PostgreSQL: they share one search."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from device import nearly
from test_calibration import coefficients, graph, node, report_of

from devtools.server import ComfyServer, ServerError

sys.path.append(str(Path(__file__).resolve().parents[1]))
from postgres import PASSWORD, postgres, why_not

GRACE = "3"


@pytest.fixture(scope="module")
def storage():
    if why_not():
        pytest.skip(why_not())
    pytest.importorskip("psycopg", reason="needs psycopg[binary]")
    with postgres() as url:
        yield url


@pytest.fixture
def start(server_base, comfyui_path, server_args, tmp_path, storage):
    """Starts a server of its own whose QSCHED_STORAGE is the database."""
    environment = {"QSCHED_STORAGE": storage, "QSCHED_GRACE_SECONDS": GRACE, "OMP_NUM_THREADS": "1"}

    def started(name: str) -> ComfyServer:
        base = tmp_path / name
        if not base.exists():
            shutil.copytree(server_base / "models", base / "models", copy_function=os.link)
        return ComfyServer(
            comfyui_path, base, extra_args=server_args, environment=environment
        ).start()

    return started


def workflow(budget: int = 10, **more) -> dict:
    prompt = graph(budget=budget, search="gp")
    prompt["4"]["inputs"] |= {"storage": "env:QSCHED_STORAGE", "study": "two servers"} | more
    return prompt


def finished(storage: str) -> int:
    import psycopg

    with psycopg.connect(storage) as connection:
        query = "select count(*) from trials where state = 'COMPLETE'"
        return connection.execute(query).fetchone()[0]


@pytest.mark.full
def test_two_servers_share_a_search_and_one_may_be_killed(start, storage, server):
    one, other = start("one"), start("other")
    try:
        first, second = one.queue(workflow()), other.queue(workflow())
        deadline = time.monotonic() + 200
        while not (other.base / "user" / "qsched").exists() or finished(storage) < 5:
            assert time.monotonic() < deadline, f"{one.log_tail()}\n{other.log_tail()}"
            time.sleep(0.05)
        one.kill()
        report = report_of(other.wait(second, timeout=200))
        assert len(report["trials"]) == 11
        assert 0 < report["new_trials"] < 11  # the rest is the killed server's
        with pytest.raises((ServerError, OSError)):
            one.wait(first, timeout=5)
    finally:
        one.stop()
        other.stop()
    again = start("one")
    try:
        repeated = report_of(again.run(workflow()))
        with pytest.raises(ServerError, match=r"begun with something else: .*budget: 10, here 4"):
            again.run(workflow(budget=4))
        log = again.log.read_text(encoding="utf-8", errors="replace")
    finally:
        again.stop()
    assert repeated["new_trials"] == 0
    assert coefficients(repeated) == coefficients(report)
    assert repeated["heldout"] == report["heldout"]
    assert PASSWORD not in json.dumps(report) + log
    alone = report_of(server.run(graph(budget=10, search="gp")))
    assert report["trials"][0]["jaq"] == nearly(alone["trials"][0]["jaq"], 1e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"storage": "../nonsense", "study": "x"}, "no plain name"),
        ({"storage": "env:PATH", "study": "x"}, "begins with QSCHED_"),
        ({"storage": "sqlite:////tmp/x.db", "study": "x"}, "may not write out a database's URL"),
        ({"storage": "mine", "study": "x\x1b[2J"}, "control characters"),
        ({"storage": "env:QSCHED_UNKNOWN", "study": "x"}, "QSCHED_UNKNOWN is not set"),
        ({"storage": "mine", "study": ""}, "study is empty"),
        ({"storage": "postgresql://u:w@127.0.0.1:9/x", "study": "x"}, "QSCHED_ALLOW_STORAGE_URLS"),
        ({"fidelity": "low"}, "fidelity"),
        ({"high": 0.9}, "high=0.9 must be"),
    ],
)
def test_what_can_not_be_shared_is_named(server, change, says):
    prompt = graph()
    prompt["4"]["inputs"] |= change
    with pytest.raises(ServerError, match=says):
        server.run(prompt)


def test_a_wired_storage_is_judged_when_it_runs(server, tmp_path):
    prompt = graph()
    file = tmp_path / "evil.py"
    prompt["9"] = node("PrimitiveString", value=f"sqlite:///{file}")
    prompt["4"]["inputs"] |= {"storage": ["9", 0], "study": "x"}
    with pytest.raises(ServerError, match="may not write out a database's URL"):
        server.run(prompt)
    assert not file.exists()
