"""Saving to and loading from a model hub, against a small server that speaks the calls used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from server import TOKEN, Hub

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What the client found, and the hub it left behind."""
    folder = tmp_path_factory.mktemp("hub")
    hub = Hub()
    hub.commit("tester/half", {"adapter_config.json": b'{"peft_type": "LORA", "r": 3, "target_modules": ["q_proj"]}'})
    server, address = hub.serve()
    settings = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(folder / "cache"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    try:
        done = subprocess.run(
            [sys.executable, str(HERE / "client.py"), str(folder)],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), hub


@pytest.mark.parametrize("way", ["latest", "revision", "subfolder", "load_adapter", "auto", "auto task", "private", "along"])
def test_what_is_pushed_is_loaded_bit_for_bit(way, ran):
    assert ran[0][way] is True


def test_the_repository_holds_the_folder(ran):
    _, hub = ran
    names = {"adapter_config.json", "adapter_model.safetensors", "afina.json", "README.md"}
    assert names <= set(hub.at("tester/adapter", "main")[1])
    assert {"second/adapter_config.json", "second/adapter_model.safetensors"} <= set(hub.at("tester/several", "main")[1])
    config = json.loads(hub.at("tester/complete", "main")[1]["adapter_config.json"])
    assert config["base_model_name_or_path"] == "tester/base"
    assert "base_model: tester/base" in hub.at("tester/complete", "main")[1]["README.md"].decode()


def test_commits_branches_and_messages(ran):
    found, hub = ran
    assert len(hub.repos["tester/adapter"]["main"]) == 2
    assert "old" in hub.repos["tester/adapter"]
    assert "Better" in hub.messages
    assert "Upload adapter" in hub.messages
    assert "tester/secret" in hub.private
    assert "/tester/adapter" in found["url"]
    assert found["config"] == "LoraConfig"


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("no repository", ["CheckpointError", "tester/adaptre", "no folder here"]),
        ("no revision", ["CheckpointError", "tester/adapter", "nope"]),
        ("no adapter", ["CheckpointError", "tester/base", "adapter_config.json"]),
        ("no weights", ["CheckpointError", "tester/half", "adapter_model.safetensors", "adapter_model.bin"]),
        ("bad name", ["CheckpointError", "no such name!"]),
        ("private, no token", ["CheckpointError", "tester/secret"]),
        ("other base", ["BaseMismatchError", "tester/adapter", "another base"]),
        ("upload refused", ["401"]),
    ],
)
def test_what_goes_wrong_is_named(case, parts, ran):
    text = ran[0][case]
    for part in parts:
        assert part in text, text
    if case != "upload refused":
        assert "NOT AFINA'S" not in text
