"""Names of the hub's models stand for their snapshots, if they are on this machine."""

import builtins
import shutil
from pathlib import Path

import pytest

from minmacpo import UserError
from minmacpo.core.checkpoint import check_model_folder, read_config
from minmacpo.runtime.hub import local_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tmp_path, monkeypatch, model_folder) -> Path:
    """A cache with one snapshot of org/some-model, of links to blobs as the package keeps them."""
    constants = pytest.importorskip("huggingface_hub.constants")
    cache = tmp_path / "cache"
    home = cache / "models--org--some-model"
    folder = home / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "refs").mkdir()
    (home / "refs/main").write_text(COMMIT)
    for number, file in enumerate(model_folder.iterdir()):
        shutil.copy(file, home / f"blobs/{number}")
        (folder / file.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """Any connection fails the test."""

    def connect(*_):
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr("socket.socket.connect", connect)


def test_a_name_stands_for_its_snapshot(snapshot, no_network):
    folder = local_folder("org/some-model")
    assert folder.samefile(snapshot)
    assert check_model_folder(folder)[0] == read_config(snapshot)


def test_a_folder_of_that_name_comes_first(snapshot, no_network, tmp_path):
    (tmp_path / "org/some-model").mkdir(parents=True)
    assert local_folder("org/some-model") == Path("org/some-model")


@pytest.mark.parametrize("name", ["org/other", "org/bad..name", "-/-", "some-model", "a/b/c"])
def test_what_is_not_in_the_cache_stays_as_it_is(name, snapshot, no_network):
    assert local_folder(name) == Path(name)
    with pytest.raises(UserError, match="is no folder"):
        read_config(local_folder(name))


def test_without_the_package_a_name_is_answered_with_the_command(snapshot, monkeypatch):
    real_import = builtins.__import__

    def without_hub(name, *rest):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_hub)
    with pytest.raises(UserError, match="hf download org/some-model"):
        read_config(local_folder("org/some-model"))
