"""The environment that dev.py makes: what it reuses, what it refuses, and ComfyUI's archive."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest

from devtools import environment, host
from devtools.console import SetupError
from devtools.environment import (
    PYTHON_NEWEST,
    PYTHON_OLDEST,
    Setup,
    check_python,
    interpreter,
    uv_variables,
)


def _comfyui(folder: Path, requirements: str = "torch\n") -> Path:
    """A folder that looks like a ComfyUI."""
    for part in host.PARTS:
        path = folder / part
        path.mkdir(parents=True) if "." not in part else path.parent.mkdir(exist_ok=True)
    for part in host.PARTS:
        if "." in part:
            (folder / part).write_text("", encoding="utf-8")
    (folder / "requirements.txt").write_text(requirements, encoding="utf-8")
    return folder


@pytest.mark.parametrize("version", [(3, 9, 18), (3, PYTHON_NEWEST[1] + 1), (2, 7)])
def test_unsupported_python_is_refused(version):
    with pytest.raises(SetupError, match=r"run this with Python 3\.10 to 3\.14"):
        check_python(version)


@pytest.mark.parametrize("version", [PYTHON_OLDEST, (3, 11, 7), (*PYTHON_NEWEST, 1)])
def test_supported_python_is_accepted(version):
    check_python(version)


def test_a_python_is_named_by_version_or_path(monkeypatch):
    here = "{}.{}.{}".format(*sys.version_info[:3])
    assert interpreter(sys.executable) == (sys.executable, here)
    monkeypatch.setattr(environment.shutil, "which", {"python3.12": sys.executable}.get)
    assert interpreter("3.12") == (sys.executable, here)
    with pytest.raises(SetupError, match=r"--python 3\.13: no such Python runs here"):
        interpreter("3.13")
    monkeypatch.setattr(environment, "version_of", lambda program: "3.9.18")
    with pytest.raises(SetupError, match=r"Python 3\.9 is not supported"):
        interpreter("3.12")


def test_another_python_or_package_has_an_environment_of_its_own(tmp_path):
    comfyui = str(_comfyui(tmp_path / "comfyui"))
    (tmp_path / "requirements.txt").write_text("", encoding="utf-8")
    made = [
        Setup(tmp_path, comfyui, *more)
        for more in ((), (sys.executable,), (None, ["numpy<3"]), (None, ["numpy<4", "scipy"]))
    ]
    assert len({setup.venv for setup in made}) == len(made)
    assert made[0].venv == tmp_path / ".venv"
    assert all(setup.venv.parent == tmp_path / ".host" for setup in made[1:])
    lists = [setup.fingerprint()["requirements"] for setup in made]
    assert lists[0] == lists[1] and len(set(lists)) == 3


def test_other_packages_come_last_and_torch_stays(tmp_path, monkeypatch):
    setup = Setup(tmp_path, str(_comfyui(tmp_path / "comfyui")), None, ["comfy-kitchen==0.2.40"])
    setup.host.mkdir()
    asked = []
    monkeypatch.setattr(setup, "_stage", lambda title, command, **_: asked.append(command))
    setup._install_packages(["pip"])
    *_, lists, packages = asked
    assert str(tmp_path / "requirements.txt") in lists
    pins = str(setup.host / "constraints.txt")
    assert packages[-3:] == ["comfy-kitchen==0.2.40", "-c", pins]


def test_full_disk_is_said_before_the_download(tmp_path, monkeypatch):
    setup = Setup(tmp_path, str(_comfyui(tmp_path / "comfyui")))
    (tmp_path / "requirements.txt").write_text("", encoding="utf-8")
    monkeypatch.setattr(environment, "DISK_GB", 10**6)
    with pytest.raises(SetupError, match="free some space"):
        setup.prepare()
    assert not setup.venv.exists()


def test_no_network_is_one_line(tmp_path, monkeypatch):
    """A real virtual environment, and a package index that is not there."""
    for name, value in {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
        "PIP_NO_CACHE_DIR": "1",
        "UV_NO_CACHE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "requirements.txt").write_text("", encoding="utf-8")
    setup = Setup(tmp_path)
    with pytest.raises(SetupError, match=r"cannot be reached.*check the network"):
        setup.prepare()
    assert not setup.stamp.exists()
    assert not setup.comfyui.exists()
    assert setup._python_version()  # and the next run goes on from there


def test_environment_is_current_until_something_it_was_made_from_changes(tmp_path, monkeypatch):
    comfyui = _comfyui(tmp_path / "comfyui")
    (tmp_path / "requirements.txt").write_text("optuna\n", encoding="utf-8")
    setup = Setup(tmp_path, str(comfyui))
    version = ["3.11.7"]
    monkeypatch.setattr(setup, "_python_version", lambda: version[0])
    setup.venv.mkdir()

    def stamp():
        setup.stamp.write_text(json.dumps(setup.fingerprint()), encoding="utf-8")
        assert setup._is_current()

    assert not setup._is_current()
    stamp()
    (comfyui / "requirements.txt").write_text("torch\nnew\n", encoding="utf-8")
    assert not setup._is_current()
    stamp()
    (tmp_path / "requirements.txt").write_text("optuna\ncmaes\n", encoding="utf-8")
    assert not setup._is_current()
    stamp()
    version[0] = "3.12.1"
    assert not setup._is_current()
    stamp()
    other = Setup(tmp_path, str(_comfyui(tmp_path / "other")))
    assert not other._is_current()
    setup.stamp.write_text('{"requirements":', encoding="utf-8")
    assert not setup._is_current()


def test_interrupted_install_leaves_no_stamp(tmp_path, monkeypatch):
    setup = Setup(tmp_path, str(_comfyui(tmp_path / "comfyui")))
    (tmp_path / "requirements.txt").write_text("", encoding="utf-8")
    setup.venv.mkdir()
    setup.stamp.write_text("{}", encoding="utf-8")
    monkeypatch.setattr(setup, "_make_venv", lambda anew: None)
    monkeypatch.setattr(setup, "_pip", lambda: ["pip"])

    def interrupted(pip):
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, "_install_packages", interrupted)
    with pytest.raises(KeyboardInterrupt):
        setup.prepare()
    assert not setup.stamp.exists()


def test_damaged_environment_is_rebuilt_once(tmp_path, monkeypatch):
    setup = Setup(tmp_path, str(_comfyui(tmp_path / "comfyui")))
    (tmp_path / "requirements.txt").write_text("", encoding="utf-8")
    made = []

    def make(anew):
        setup.venv.mkdir(exist_ok=True)
        made.append(anew)

    monkeypatch.setattr(setup, "_make_venv", make)
    monkeypatch.setattr(setup, "_pip", lambda: ["pip"])
    monkeypatch.setattr(setup, "_install_packages", lambda pip: None)
    broken = "ModuleNotFoundError: No module named 'torch'"
    monkeypatch.setattr(
        setup, "_stage", lambda title, command, **_: None if len(made) == 2 else broken
    )
    setup.prepare()
    assert made == [False, True]
    assert setup._is_current()


def test_pips_settings_reach_uv():
    found = uv_variables(
        {
            "PIP_INDEX_URL": "https://mirror/simple",
            "PIP_FIND_LINKS": "/wheels /more",
            "PIP_EXTRA_INDEX_URL": "https://extra/simple",
            "PIP_CERT": "/ca.pem",
            "SSL_CERT_FILE": "/own.pem",
            "PATH": "/bin",
        }
    )
    assert found == {
        "UV_DEFAULT_INDEX": "https://mirror/simple",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_INDEX": "https://extra/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }


def test_code_is_compiled_once_where_nobody_may_leave_it_beside_the_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    try:
        python.symlink_to(sys.executable)
    except OSError as error:
        pytest.skip(f"no symbolic links here: {error}")
    (tmp_path / "compiled.py").write_text("", encoding="utf-8")
    made = environment.Environment(tmp_path, python, tmp_path, False)
    assert made.run("-c", "import compiled") == 0
    (found,) = tmp_path.rglob("compiled.*.pyc")
    assert found.is_relative_to(tmp_path / "venv" / "pycache")


def _archive(path: Path, *members: tuple[str, bytes | None]) -> Path:
    """A tar archive; None makes a symbolic link out of the tree."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_unpack_takes_comfyui_alone(tmp_path):
    archive = _archive(
        tmp_path / "a.tar.gz",
        ("pkg-1/setup.py", b"no"),
        ("pkg-1/vendor/Other/main.py", b"no"),
        ("pkg-1/vendor/ComfyUI/main.py", b"yes"),
        ("pkg-1/vendor/ComfyUI/comfy/a.py", b"yes"),
        ("pkg-1/vendor/ComfyUI/link", None),
    )
    host.unpack(archive, tmp_path / "out")
    files = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")}
    assert files == {"main.py", "comfy", "comfy/a.py"}


@pytest.mark.parametrize("name", ["../../x", "a/../../../x", "C:/x", "a\\..\\x"])
def test_unpack_refuses_paths_that_leave_the_folder(tmp_path, name):
    archive = _archive(tmp_path / "a.tar.gz", (f"pkg-1/vendor/ComfyUI/{name}", b"evil"))
    with pytest.raises(SetupError, match="unsafe path"):
        host.unpack(archive, tmp_path / "out" / "deep" / "er")
    assert {p.name for p in tmp_path.iterdir()} <= {"a.tar.gz", "out"}
    assert not [p for p in tmp_path.rglob("x") if p.is_file()]


def test_another_archive_than_the_tested_one_is_refused(tmp_path):
    archive = _archive(tmp_path / "a.tar.gz", ("pkg-1/vendor/ComfyUI/main.py", b"yes"))
    host.verify(archive, hashlib.sha256(archive.read_bytes()).hexdigest())
    with pytest.raises(SetupError, match="sha256"):
        host.verify(archive, host.SDIST_SHA256)


def test_comfyui_is_installed_whole_or_not_at_all(tmp_path, monkeypatch):
    def download(title, command, log, variables):
        folder = Path(command[command.index("--dest") + 1])
        _archive(folder / "a.tar.gz", ("pkg-1/vendor/ComfyUI/main.py", b"yes"))

    monkeypatch.setattr(host, "run_stage", download)
    target = tmp_path / "ComfyUI"
    with pytest.raises(SetupError):
        host.install_comfyui(target, ["pip"], tmp_path / "log")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(host, "verify", lambda archive, sha256: None)
    host.install_comfyui(target, ["pip"], tmp_path / "log")
    assert [p.name for p in tmp_path.iterdir()] == ["ComfyUI"]
    assert (target / "main.py").read_bytes() == b"yes"
