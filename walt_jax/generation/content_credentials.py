"""C2PA manifests in sampled files, signed with the user's key: who says that a model made them, and how.

The specification is at c2pa.org; the extra `c2pa` has its reference library. Nothing is sent anywhere, so a manifest
has no timestamp of an authority: it is valid as long as the certificate is.
"""

import importlib.util
import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

import walt_jax
from walt_jax.errors import UserError
from walt_jax.generation.provenance import SOURCE_TYPE

# Signs a file in place; its record is that of `provenance.made`. Other ways of signing have the same form.
Sign = Callable[[pathlib.Path, Mapping[str, Any]], None]

SETTINGS = "walt_jax.settings"  # the label of the assertion that has a file's record
CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


def signer(key: pathlib.Path, certificate: pathlib.Path) -> Sign:
    """What signs files with a key.

    Args:
        key: a private key in PEM, of an elliptic curve (P-256, P-384, P-521), Ed25519 or RSA, without a password.
        certificate: in PEM, the key's, then those that vouch for it up to but without the root.

    Raises:
        UserError: if the extra `c2pa` is not installed, or the files can't be used: a picture is signed to see that.
    """
    missing = [name for name in ("c2pa", "cryptography") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--c2pa_key signs with {' and '.join(missing)}, which is not installed; install walt_jax with [c2pa]: "
            "pip install -e '.[c2pa]'."
        )
    private, chain = _read(key, "--c2pa_key"), _read(certificate, "--c2pa_certificate")
    algorithm = _algorithm(private, chain, key, certificate)

    def sign(path: pathlib.Path, record: Mapping[str, Any]) -> None:
        import c2pa

        signed = path.with_name(f"{path.stem}.signing{path.suffix}")
        try:
            info = c2pa.C2paSignerInfo(algorithm, chain.encode(), private.encode(), None)
            with c2pa.Signer.from_info(info) as own, c2pa.Builder(manifest(path.name, record)) as builder:
                builder.sign_file(path, signed, own)
            signed.replace(path)
        except c2pa.C2paError as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"{path.name} could not be signed with --c2pa_certificate={certificate} ({reason}); C2PA asks for a "
                "valid certificate for signing that another one has issued, see docs/generation.md."
            ) from error
        finally:
            signed.unlink(missing_ok=True)

    with tempfile.TemporaryDirectory() as folder:  # before hours of sampling
        trial = pathlib.Path(folder) / "trial.png"
        Image.new("RGB", (8, 8)).save(trial)
        sign(trial, {})
    return sign


def manifest(title: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """What a file's manifest says: that it was created by a trained model, and with which settings."""
    agent = {"name": "walt_jax", "version": walt_jax.__version__}
    action = {"action": "c2pa.created", "digitalSourceType": SOURCE_TYPE, "softwareAgent": agent}
    return {
        "claim_generator_info": [agent],
        "title": title,
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": [action]}},
            {"label": SETTINGS, "data": json.loads(json.dumps(dict(record)))},
        ],
    }


def _read(path: pathlib.Path, flag: str) -> str:
    try:
        text = path.read_text(encoding="ascii")
    except OSError as error:
        raise UserError(f"{flag}={path} can't be read ({error.strerror}); name a PEM file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{flag}={path} is no PEM file, which is text; such files begin with -----BEGIN.") from error
    if "-----BEGIN " not in text:
        raise UserError(f"{flag}={path} is no PEM file; such files begin with -----BEGIN.")
    return text


def _algorithm(private: str, chain: str, key: pathlib.Path, certificate: pathlib.Path) -> str:
    """C2PA's name of the key's algorithm.

    Raises:
        UserError: if the key is of another kind, has a password, or is not the certificate's.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    try:
        loaded = serialization.load_pem_private_key(private.encode(), None)
    except (ValueError, TypeError) as error:
        raise UserError(f"--c2pa_key={key} holds no private key without a password; name its PEM file.") from error
    try:
        first, *_ = x509.load_pem_x509_certificates(chain.encode())
    except ValueError as error:
        raise UserError(f"--c2pa_certificate={certificate} holds no certificate; name its PEM file.") from error
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    if loaded.public_key().public_bytes(*form) != first.public_key().public_bytes(*form):
        raise UserError(
            f"--c2pa_key={key} is not the key of the first certificate in --c2pa_certificate={certificate}; put that "
            "key's certificate first."
        )
    match loaded:
        case ec.EllipticCurvePrivateKey() if loaded.curve.name in CURVES:
            return CURVES[loaded.curve.name]
        case ed25519.Ed25519PrivateKey():
            return "ed25519"
        case rsa.RSAPrivateKey():
            return "ps256"
    raise UserError(f"--c2pa_key={key} is of a kind that C2PA does not use; make one of P-256, Ed25519 or RSA.")
