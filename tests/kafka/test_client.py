"""What is passed through to librdkafka, what is refused, and that nothing secret is ever said."""

import json
from collections.abc import Callable

import pytest
from confluent_kafka import KafkaError

from streamgr.clock import ManualClock
from streamgr.config import Kafka, Telemetry
from streamgr.errors import BrokerUnreachable, ConfigError
from streamgr.kafka.client import KAFKA_ERRORS, OURS, Admin, Voice, librdkafka_settings, translate
from streamgr.kafka.consumer import Consumer
from streamgr.kafka.producer import Producer
from streamgr.telemetry import Log

PASSWORD = "correct horse battery staple"
SECURE: dict[str, str | int | float | bool] = {
    "security.protocol": "SASL_PLAINTEXT",
    "sasl.mechanism": "SCRAM-SHA-512",
    "sasl.username": "streamgr",
    "ssl.key.password": "another secret",
}


@pytest.mark.parametrize("name", sorted(OURS))
def test_what_exactness_rests_on_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"kafka.librdkafka: `{name}`: not for you to set; remedy: remove it"):
        Consumer(Kafka(librdkafka={name: "x"}), client_id="c")


def test_security_settings_pass_through_with_the_password_from_its_own_key() -> None:
    settings = Kafka(bootstrap="b:9", librdkafka=SECURE, sasl_password=PASSWORD)
    conf = librdkafka_settings(settings, "role", Voice("admin", settings, None))
    assert SECURE.items() <= conf.items()
    assert conf["sasl.password"] == PASSWORD and conf["bootstrap.servers"] == "b:9"
    assert conf["client.id"].startswith("role-") and conf["client.id"] != "role-"


Build = Callable[[Kafka], object]


@pytest.mark.parametrize(
    "build", [lambda s: Consumer(s, client_id="c"), lambda s: Producer(s, client_id="p"), Admin], ids=["c", "p", "a"]
)
def test_settings_librdkafka_refuses_are_a_configuration_error_without_secrets(build: Build) -> None:
    wrong = Kafka(librdkafka={**SECURE, "no.such.thing": "x"}, sasl_password=PASSWORD)
    with pytest.raises(
        ConfigError, match=r'kafka.librdkafka: No such configuration property: "no.such.thing"'
    ) as caught:
        build(wrong)
    assert PASSWORD not in str(caught.value) and "another secret" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"Invalid value.*security\.protocol") as caught:
        build(Kafka(librdkafka={"security.protocol": PASSWORD}, sasl_password=PASSWORD))
    assert PASSWORD not in str(caught.value)


def test_no_secret_leaves_in_an_error_or_a_log_line(capsys: pytest.CaptureFixture[str]) -> None:
    settings = Kafka(librdkafka=SECURE, sasl_password=PASSWORD)
    voice = Voice("consumer", settings, Log("scorer", Telemetry(), ManualClock()))
    error = KafkaError(KafkaError._AUTHENTICATION, f"SASL failed for streamgr:{PASSWORD} with another secret")
    problem = translate(error, voice, "here", settings)
    voice.complain(error)
    said = capsys.readouterr().err
    for text in (str(problem), said):
        assert "SASL failed for streamgr:*** with ***" in text
        assert PASSWORD not in text and "another secret" not in text
    assert isinstance(problem, BrokerUnreachable)


def test_a_complaint_is_always_counted_and_logged_once_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    clock = ManualClock()
    voice = Voice("producer", Kafka(), Log("trainer", Telemetry(), clock), clock)
    before = KAFKA_ERRORS.labels("producer")._value.get()
    for _ in range(5):
        voice.complain(KafkaError(KafkaError._TRANSPORT, "connection refused"))
    voice.complain(KafkaError(KafkaError._RESOLVE, "no such host"))
    clock.advance(61)
    voice.complain(KafkaError(KafkaError._TRANSPORT, "connection refused"))
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(x["event"], x["error"], x["more"]) for x in lines] == [
        ("kafka_error", "_TRANSPORT", 0),
        ("kafka_error", "_RESOLVE", 0),
        ("kafka_error", "_TRANSPORT", 4),
    ]
    assert KAFKA_ERRORS.labels("producer")._value.get() == before + 7


def test_librdkafkas_own_lines_do_not_reach_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    consumer = Consumer(Kafka(bootstrap="127.0.0.1:1"), client_id="c")
    consumer.assign({("t", 0): 0})
    consumer.poll(timeout=0.5)
    consumer.close()
    assert capfd.readouterr().err == ""
