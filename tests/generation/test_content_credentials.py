"""Files are signed with the user's key: the library finds the manifest valid, and mistakes are sentences."""

import datetime
import hashlib
import json
import sys

import numpy as np
import pytest

from walt_jax.data.video import read_clip
from walt_jax.errors import UserError
from walt_jax.generation import provenance
from walt_jax.generation.content_credentials import signer
from walt_jax.generation.sample import Samples
from walt_jax.main import main

c2pa = pytest.importorskip("c2pa")
x509 = pytest.importorskip("cryptography.x509")

from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa  # noqa: E402
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID  # noqa: E402


def certificate(name, key, issuer, issuer_key, authority):
    """As C2PA asks for: an authority's, or one for signing that the authority has issued."""
    names = [x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, text)]) for text in (name, issuer)]
    now = datetime.datetime.now(datetime.UTC)
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign", "encipher_only",
         "decipher_only"), False,
    )  # fmt: skip
    usage = x509.KeyUsage(digital_signature=not authority, key_cert_sign=authority, **usage)
    builder = (
        x509.CertificateBuilder().subject_name(names[0]).issuer_name(names[1]).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )  # fmt: skip
    if not authority:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def written(folder, key):
    """(path of the key, path of its chain)"""
    root = ec.generate_private_key(ec.SECP256R1())
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *form))
    chain = certificate("signer", key, "root", root, False) + certificate("root", root, "root", root, True)
    (folder / "chain.pem").write_bytes(chain)
    return folder / "key.pem", folder / "chain.pem"


KEYS = {
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
    "RSA": lambda: rsa.generate_private_key(65537, 2048),
}
CLIP = np.random.default_rng(0).integers(0, 255, (5, 16, 16, 3), np.uint8)


@pytest.mark.parametrize("kind", KEYS)
def test_a_video_says_who_made_it(tmp_path, kind):
    sign = signer(*written(tmp_path, KEYS[kind]()))
    samples = Samples(tmp_path / "out", 8.0, (".mp4", ".gif"), {"steps": 3}, made_by={"model": "demo"}, sign=sign)
    samples.add(CLIP, "a ball", 4)
    plain = Samples(tmp_path / "plain", 8.0)
    plain.add(CLIP, "a ball", 4)
    for suffix in (".mp4", ".gif"):
        video = (tmp_path / "out" / samples.rows[0]["file"]).with_suffix(suffix)
        with c2pa.Reader(video) as reader:
            found = json.loads(reader.json())
        # Untrusted, for its root is on no list; nothing else may be wrong.
        wrong = {status["code"] for status in found.get("validation_status", [])}
        assert wrong <= {"signingCredential.untrusted"}, wrong
        manifest = found["manifests"][found["active_manifest"]]
        data = {assertion["label"]: assertion["data"] for assertion in manifest["assertions"]}
        [action] = data["c2pa.actions.v2"]["actions"]
        assert action["action"] == "c2pa.created" and action["digitalSourceType"] == provenance.SOURCE_TYPE
        assert data["walt_jax.settings"]["seed"] == 4 and data["walt_jax.settings"]["prompt"] == "a ball"
    video = tmp_path / "out" / samples.rows[0]["file"]
    sidecar = json.loads(video.with_suffix(".json").read_text())
    assert sidecar["sha256"] == hashlib.sha256(video.read_bytes()).hexdigest()
    np.testing.assert_array_equal(read_clip(video), read_clip(tmp_path / "plain" / plain.rows[0]["file"]))
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".gif", ".json", ".json", ".mp4"]
    changed = bytearray(video.read_bytes())
    changed[-20] ^= 1
    video.write_bytes(changed)
    with c2pa.Reader(video) as reader:
        codes = {status["code"] for status in json.loads(reader.json())["validation_status"]}
    assert codes - {"signingCredential.untrusted"}


def test_mistakes_are_sentences(tmp_path, monkeypatch, capsys):
    key, chain = written(tmp_path, KEYS["P-256"]())
    (tmp_path / "other").mkdir()
    other, _ = written(tmp_path / "other", KEYS["P-256"]())
    (tmp_path / "text.pem").write_text("hello")
    (tmp_path / "cut.pem").write_text(chain.read_text()[:100])
    for pair, says in (
        ((tmp_path / "no.pem", chain), "can't be read"),
        ((tmp_path / "text.pem", chain), "no PEM"),
        ((chain, chain), "no private key"),
        ((key, tmp_path / "cut.pem"), "no certificate"),
        ((other, chain), "not the key"),
    ):
        with pytest.raises(UserError, match=says):
            signer(*pair)
    own = ec.generate_private_key(ec.SECP256R1())
    written(tmp_path / "other", own)
    (tmp_path / "own.pem").write_bytes(certificate("one", own, "one", own, True))
    with pytest.raises(UserError, match="could not be signed"):  # an authority's own
        signer(other, tmp_path / "own.pem")
    for flags, says in (
        (["--mode=sample", "--prompt=a", f"--c2pa_key={key}"], "name both"),
        (["--mode=train", f"--c2pa_key={key}"], "signs nothing"),
        (["--mode=serve", f"--c2pa_key={key}", f"--c2pa_certificate={chain}", "--no_metadata"], "leave one"),
    ):
        assert main([f"--workdir={tmp_path}", *flags]) == 1
        assert says in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(UserError, match="install walt_jax with"):
        signer(key, chain)
