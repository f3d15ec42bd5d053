"""What every test shares: the repo root on sys.path, what a quick run leaves out, two lanes.

A test marked ``full`` runs with ``--full`` alone.  With pytest-xdist (``-n 2 --dist loadscope``)
the tests of one file stay in one lane, as do all of tests/server, and all of tests/browser: each has
one server.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

if sys.dont_write_bytecode:
    # Without any, each server of these tests compiles torch anew, as this process does: see
    # devtools/environment.py, whose place it is.
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(Path(sys.prefix) / "pycache")
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": sys.pycache_prefix}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    # Last, so that ComfyUI's own `nodes` and `utils` win in tests that import it.
    sys.path.append(str(ROOT))

# In CI the examples are the same each time, as in hypothesis' own profile for it: what is new there
# is the change, not the dice.
settings.register_profile("qsched", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("qsched")


def _why_no_gpu() -> str | None:
    try:
        import torch
    except ImportError as error:
        return f"needs a CUDA device, and torch cannot be imported: {error}"
    return None if torch.cuda.is_available() else "needs a CUDA device; torch sees none"


LEFT_OUT = pytest.StashKey[Counter]()  # how many tests of each file


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the tests marked full too")


def pytest_configure(config):
    config.stash[LEFT_OUT] = Counter()


def pytest_collection_modifyitems(config, items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = _why_no_gpu() if marked else None
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))
    if not config.getoption("--full"):
        left = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left)
        config.stash[LEFT_OUT].update(item.path.name for item in left)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a lane: the terminal is another process's
        session.config.workeroutput["left_out"] = dict(session.config.stash[LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[LEFT_OUT] = Counter(getattr(node, "workeroutput", {}).get("left_out", {}))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = Path(nodeid.partition("::")[0])
            folder = path.parent.name
            return folder if folder in ("server", "browser") else path.name

    return Lanes(config, log)


def pytest_terminal_summary(terminalreporter, config):
    left = config.stash[LEFT_OUT]
    if left:
        terminalreporter.section("left out")
        for name, count in sorted(left.items()):
            terminalreporter.line(f"{count:5} of {name}")
        terminalreporter.line(f"{left.total():5} tests in all: --full runs them too")


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT
