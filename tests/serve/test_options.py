"""The options of `tokendial serve` are the fields of `Settings`, and are made only when needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

import tokendial
from tokendial.cli import app, serving
from tokendial.serve import settings as settings_module
from tokendial.serve.settings import Settings

# The options, which scripts may use.
KNOWN = """
slo_ms host port allowed_hosts degree max_degree min_accuracy cascade compensator max_batch
max_wait_ms max_queue optimize compile runtime precision threads spare decoders max_decode_s
api_keys max_bytes max_pixels max_images max_memory max_connections timeout_s ray replicas
max_replicas home
"""
MADE_OTHERWISE = {"runtime", "api_keys"}


def parameters() -> dict:
    command = typer.main.get_command(app).commands["serve"]
    context = command.make_context("serve", ["runs/pets"], resilient_parsing=True)
    return {parameter.name: parameter for parameter in command.get_params(context)}


def test_every_setting_has_an_option_with_its_default_and_docstring():
    options = parameters()
    assert set(KNOWN.split()) | {"runs", "help"} == set(options)
    assert set(Settings.model_fields) - MADE_OTHERWISE <= set(options)
    for name, field in Settings.model_fields.items():
        if name not in MADE_OTHERWISE:
            default = field.default
            assert options[name].default == (list(default) if default == () else default)
            assert options[name].help.startswith(field.description)


def test_help_says_the_range():
    options = parameters()
    assert options["port"].help.endswith("Must be at least 0 and at most 65535.")
    assert options["slo_ms"].help.endswith("Must be above 0.")
    assert "Must be" not in options["host"].help


@pytest.fixture
def given(monkeypatch):
    """Ask for the settings that a command line gives, without serving."""
    seen = []
    monkeypatch.setattr(
        serving, "_serve", lambda folders, settings, listener: seen.append(settings)
    )

    def parse(*arguments: str) -> Settings:
        result = CliRunner().invoke(app, ["serve", "runs/pets", "--port", "0", *arguments])
        assert result.exit_code == 0, result.output
        return seen.pop()

    return parse


def test_options_become_settings_and_the_rest_keeps_its_default(given):
    found = given("--slo-ms", "50", "--allowed-hosts", "a", "--allowed-hosts", "b", "--no-spare")
    assert found.model_fields_set - MADE_OTHERWISE == {"port", "slo_ms", "allowed_hosts", "spare"}
    assert (found.slo_ms, found.allowed_hosts, found.spare) == (50.0, ("a", "b"), False)
    assert found.max_queue == Settings().max_queue
    runtime = given("--runtime", "openvino", "--precision", "bf16").runtime
    assert (runtime.name, runtime.precision) == ("openvino", "bf16")
    assert "slo_ms" not in given().model_fields_set  # so the server may choose it


def test_a_new_setting_is_an_option_without_further_code(given, monkeypatch):
    class More(Settings):
        patience: int = Field(default=3, ge=1, description="How patient the server is.")

    monkeypatch.setattr(settings_module, "Settings", More)
    assert parameters()["patience"].help == "How patient the server is. Must be at least 1."
    assert given("--patience", "7").patience == 7


def test_help_of_the_program_loads_neither_the_settings_nor_torch():
    code = """
import sys
from typer.testing import CliRunner
from tokendial.cli import app
result = CliRunner().invoke(app, ["--help"])
heavy = {"pydantic", "fastapi", "torch"}
print(result.exit_code, "serve" in result.stdout, heavy & set(sys.modules))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(tokendial.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "0 True set()\n"
