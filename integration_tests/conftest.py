"""Fixtures: model, data and configurations of a small run of launch/finetune.py, and what a scenario returned."""

import json

import pytest

from integration_tests.support.program import AUTO, make_config, make_data, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("program")


AS_OF_A_LARGE_MODEL = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 2000,
}
"""ZeRO-3 keeps no parameter gathered, and an evaluation leaves some in flight."""


@pytest.fixture(scope="module")
def config(folder):
    """The YAML file of the run; zero2.json and zero3.json lie beside it, for parallel.config."""
    for stage in (2, 3):
        zero = {"stage": stage, **AS_OF_A_LARGE_MODEL}
        (folder / f"zero{stage}.json").write_text(json.dumps({**AUTO, "zero_optimization": zero}))
    return make_config(folder, make_model(folder / "model"), make_data(folder / "data.jsonl"))


@pytest.fixture
def runs(request, tmp_path_factory):
    """What the ranks returned from the test's scenario, by rank."""
    scenario = request.param
    return scenario.spawn.returned(scenario, request.session.items, lambda: tmp_path_factory.mktemp("scenario"))
