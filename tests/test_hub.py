"""A model's name that is not there, where the Hub cannot be reached."""

from __future__ import annotations

import socket
import time

import huggingface_hub
import pytest
from huggingface_hub import constants

from grass_dist.errors import ConfigError
from grass_dist.finetune import hub
from grass_dist.finetune.config import ModelConfig
from grass_dist.finetune.hub import hub_problem, loading_options
from grass_dist.finetune.setup import load_tokenizer


@pytest.fixture
def endpoint(monkeypatch):
    """Sets the Hub's address, and that it is to be asked."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    hub._connection_problem.cache_clear()
    yield lambda address: monkeypatch.setattr(constants, "ENDPOINT", address)
    hub._connection_problem.cache_clear()


@pytest.fixture
def closed():
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return port


def test_a_name_that_is_not_there_is_refused_at_once(endpoint, closed, tmp_path, monkeypatch):
    endpoint(f"http://127.0.0.1:{closed}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(ConfigError) as error:
        load_tokenizer(ModelConfig(name="nobody/nothing"))
    assert time.monotonic() - began < 5
    assert str(error.value) == (
        "model.name='nobody/nothing': it cannot be loaded (there is no such folder, it is not in the cache of the Hub, "
        f"and http://127.0.0.1:{closed} cannot be reached (Connection refused)); give a model's name or folder, or "
        "load it once where the Hub can be reached."
    )


def test_a_lookup_that_hangs_is_not_waited_for(endpoint, monkeypatch):
    endpoint("https://hub.invalid")
    monkeypatch.setattr(hub, "SECONDS", 0.2)

    def hang(*_args: object, **_more: object) -> None:
        time.sleep(2)
        raise socket.gaierror("no answer")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    began = time.monotonic()
    assert hub_problem("some/model") == "https://hub.invalid cannot be reached (no connection within 0.2 s)"
    assert time.monotonic() - began < 1


def test_the_hub_is_asked_where_it_answers(endpoint):
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint(f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_problem("some/model") is None and loading_options("some/model") == {}


def test_behind_a_proxy_the_proxy_is_asked(endpoint, closed, monkeypatch):
    endpoint("https://hub.invalid")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_problem("some/model") is None
    hub._connection_problem.cache_clear()
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{closed}")
    assert loading_options("some/model") == {"local_files_only": True}


def test_nobody_asks_for_a_folder(endpoint, closed, tmp_path, monkeypatch):
    endpoint(f"http://127.0.0.1:{closed}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert hub_problem("models/mine") is hub_problem(str(tmp_path)) is hub_problem("/nowhere/at/all") is None
    assert hub_problem("models/other") is not None
