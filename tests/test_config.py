"""Configuration: where values come from, what is refused, what is masked."""

import tomllib
from pathlib import Path

import pytest

from streamgr.config import Config, flatten, load
from streamgr.errors import ConfigError

ROOT = Path(__file__).parent.parent


def test_defaults_that_the_contract_promises() -> None:
    config, origin = load([], {})
    assert origin == {}
    assert config.sequence.attribution_window_seconds == 600
    assert config.sequence.lateness_seconds == 60
    assert config.sequence.commit_interval_seconds == 0.2
    assert config.sequence.actions == ("click", "like")
    assert config.trainer.publish_seconds == 2
    assert config.scorer.port == 8080
    assert config.telemetry.port == 9464


def test_flags_win_over_variables_and_variables_over_files(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text("[scorer]\nport = 1\nhost = 'h'\nthreads = 2\n")
    config, origin = load([file], {"STREAMGR_SCORER__PORT": "2", "STREAMGR_SCORER__THREADS": "3"}, {"scorer.port": "4"})
    assert (config.scorer.port, config.scorer.threads, config.scorer.host) == (4, 3, "h")
    assert origin == {
        "scorer.port": "--scorer.port",
        "scorer.threads": "$STREAMGR_SCORER__THREADS",
        "scorer.host": str(file),
    }


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[trainer]\nbatch_token = 1", ["batch_token", "$.trainer"]),
        ("[trainer]\nbatch_tokens = 'x'", ["$.trainer.batch_tokens", "int"]),
        ("[nonsense]\na = 1", ["nonsense"]),
        ("port = 1", ["port", "[sections]"]),
        ("[table]\nslots = 100", ["slots", "power of two"]),
        ("[sequence]\nactions = ['click', 'profile']", ["profile"]),
        ("not toml", ["TOML"]),
        ("[sequence]\nlateness_seconds = -1", ["$.sequence.lateness_seconds", ">= 0"]),
        ("[sequence]\nlateness_seconds = inf", ["$.sequence.lateness_seconds", "<="]),
        ("[trainer]\nfade_targets = 0", ["$.trainer.fade_targets", "> 0"]),
        ("[weights]\nchunk_bytes = 0", ["$.weights.chunk_bytes", ">= 1"]),
        ("[scorer]\nscore_sample = 1.5", ["$.scorer.score_sample", "<= 1"]),
        ("[telemetry]\nport = 65536", ["$.telemetry.port", "65535"]),
        ("[telemetry]\nlog_level = 'loud'", ["$.telemetry.log_level", "loud"]),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(tmp_path: Path, text: str, names: list[str]) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load([file], {})
    assert caught.value.exit_code == 78
    assert all(name in str(caught.value) for name in [*names, str(file)])


def test_variables_are_read_as_their_keys_type() -> None:
    config, _ = load(
        [],
        {
            "STREAMGR_SEQUENCE__LATENESS_SECONDS": "2",
            "STREAMGR_SEQUENCE__ACTIONS": '["click", "bookmark"]',
            "STREAMGR_STATE__DIRECTORY": "123",
            "STREAMGR_CONFIG": "not a key",
        },
    )
    assert config.sequence.lateness_seconds == 2.0
    assert config.sequence.actions == ("click", "bookmark")
    assert config.state.directory == "123"


def test_a_secret_comes_from_a_file_and_is_masked(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("swordfish\n")
    config, _ = load([], {"STREAMGR_KAFKA__SASL_PASSWORD_FILE": str(secret)})
    assert config.kafka.sasl_password == "swordfish"
    assert flatten(config)["kafka.sasl_password"] == "***"
    with pytest.raises(ConfigError, match="SASL_PASSWORD_FILE"):
        load([], {"STREAMGR_KAFKA__SASL_PASSWORD_FILE": str(tmp_path / "absent")})


def test_the_reference_file_lists_every_key_with_its_default() -> None:
    written = tomllib.loads((ROOT / "config" / "streamgr.toml").read_text())
    keys = {f"{section}.{key}" for section, table in written.items() for key in table}
    assert keys == set(flatten(Config()))
    assert load([ROOT / "config" / "streamgr.toml"], {})[0] == Config()


@pytest.mark.parametrize("profile", sorted((ROOT / "config").glob("*.toml")), ids=lambda p: p.name)
def test_every_profile_loads(profile: Path) -> None:
    config, _ = load([profile], {})
    assert isinstance(config, Config)
