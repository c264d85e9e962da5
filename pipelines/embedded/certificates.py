"""The certificate by which the parts of the object store know each other, and refuse everybody else."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from pipelines.embedded.private_files import write_private

AUTHORITY, CERTIFICATE, KEY = "authority.crt", "node.crt", "node.key"
# Fixed dates, not "from now": a machine whose clock jumps (a virtual machine that was suspended, a
# wrong BIOS clock) must still be able to start its own store.
VALID_FROM = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
VALID_UNTIL = datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC)


def ensure_certificates(folder: Path) -> None:
    """Write an authority, and a certificate with its key signed by it, unless all three are there.

    The authority's own key is thrown away after its single signature, so nobody can ever issue a second
    certificate that the store would accept.
    """
    if all((folder / name).is_file() for name in (AUTHORITY, CERTIFICATE, KEY)):
        return
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def begin(common_name: str, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tuneyard authority")])
        unsigned = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public_key)
        unsigned = unsigned.serial_number(x509.random_serial_number())
        return unsigned.not_valid_before(VALID_FROM).not_valid_after(VALID_UNTIL)

    authority_key, node_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = begin("tuneyard authority", authority_key.public_key()).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    # Every part is both server and client of the others, in one process: one certificate with both uses.
    uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    node = (
        begin("tuneyard node", node_key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    )
    for name, unsigned in ((AUTHORITY, authority), (CERTIFICATE, node)):
        signed = unsigned.sign(authority_key, hashes.SHA256())
        write_private(folder / name, signed.public_bytes(Encoding.PEM))
    write_private(folder / KEY, node_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
