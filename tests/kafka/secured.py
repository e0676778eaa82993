"""A real Kafka that lets nobody in without TLS, a name and a password, and lets no one do more than his ACLs say.

Beside the secured listener there is a plain one, by which the tests themselves make users and ACLs, as the super user
that an operator's own tools would be.
"""

from pathlib import Path

from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from streamgr.kafka.embedded import EmbeddedBroker, free_ports
from tests.ops.certificates import Authority

# The first line is where `EmbeddedBroker` reads the address that it waits for.
PROPERTIES = """\
#advertised.listeners=PLAINTEXT://127.0.0.1:{plain}
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers=127.0.0.1:{controller}
listeners=SECURE://127.0.0.1:{secure},PLAINTEXT://127.0.0.1:{plain},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=SECURE://127.0.0.1:{secure},PLAINTEXT://127.0.0.1:{plain}
listener.security.protocol.map=SECURE:SASL_SSL,PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
listener.name.secure.ssl.keystore.type=PEM
listener.name.secure.ssl.keystore.location={keystore}
listener.name.secure.sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.secure.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
log.dirs={data}
auto.create.topics.enable=false
offsets.topic.num.partitions=4
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
"""


class Secured:
    """`bootstrap` is the secured listener, `ca` what its certificate is trusted by."""

    def __init__(self, home: Path, directory: Path) -> None:
        authority = Authority.made(directory, "kafka-ca")
        certificate, key = authority.certify("broker")
        keystore = directory / "broker-keystore.pem"
        keystore.write_text(key.read_text() + certificate.read_text() + authority.ca.read_text())
        secure, plain, controller = free_ports(3)
        (directory / "server.properties").write_text(
            PROPERTIES.format(
                secure=secure, plain=plain, controller=controller, keystore=keystore, data=directory / "data"
            )
        )
        self.broker = EmbeddedBroker.start_kafka(directory, home)
        self.bootstrap, self.ca = f"127.0.0.1:{secure}", authority.ca
        self.admin = AdminClient({"bootstrap.servers": self.broker.bootstrap})

    def add_user(self, name: str, password: str) -> None:
        info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        added = self.admin.alter_user_scram_credentials([UserScramCredentialUpsertion(name, info, password.encode())])
        for future in added.values():
            future.result(20)

    def allow(self, user: str, resource: str, name: str, *operations: str) -> None:
        """`resource`: TOPIC | GROUP | BROKER (the cluster); `name` may end with * (a prefix)."""
        prefixed = name.endswith("*") and name != "*"
        pattern = ResourcePatternType.PREFIXED if prefixed else ResourcePatternType.LITERAL
        bindings = [
            AclBinding(
                ResourceType[resource], name[:-1] if prefixed else name, pattern, f"User:{user}", "*",
                AclOperation[operation], AclPermissionType.ALLOW,
            )
            for operation in operations
        ]  # fmt: skip
        for future in self.admin.create_acls(bindings).values():
            future.result(20)

    def close(self) -> None:
        self.broker.close()
