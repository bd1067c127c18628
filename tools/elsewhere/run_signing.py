"""Sign a bundle and verify it after each kind of tampering: BUNDLE OUT → OUT/facts.json, what export.signature said of each.

Runs in .elsewhere/signing, with this project's export/ on the path.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives import serialization  # type: ignore[import-not-found]
from cryptography.hazmat.primitives.asymmetric import ec, rsa  # type: ignore[import-not-found]

sys.path.append(str(Path(__file__).resolve().parents[2]))
from export.errors import BundleError
from export.signature import sign, verify

Tamper = Callable[[Path], object]


def write_keys(folder: Path) -> None:
    """Write two key pairs, one private key with a password, and one of a kind that is not taken."""
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    locked = serialization.BestAvailableEncryption(b"secret")
    keys = {"own": ec.generate_private_key(ec.SECP256R1()), "other": ec.generate_private_key(ec.SECP256R1())}
    private = {**keys, "rsa": rsa.generate_private_key(65537, 2048)}
    for name, key in private.items():
        pkcs8 = serialization.PrivateFormat.PKCS8
        (folder / f"{name}.pem").write_bytes(key.private_bytes(pem, pkcs8, plain))
        (folder / f"{name}.locked.pem").write_bytes(key.private_bytes(pem, pkcs8, locked))
        info = serialization.PublicFormat.SubjectPublicKeyInfo
        (folder / f"{name}.public.pem").write_bytes(key.public_key().public_bytes(pem, info))


def said(call: Callable[[Path, Path], None], bundle: Path, key: Path) -> str:
    """Return the error's sentence, or nothing."""
    try:
        call(bundle, key)
    except BundleError as error:
        return str(error)
    return ""


def flip(name: str) -> Tamper:
    """Return what changes one bit in a file."""

    def change(bundle: Path) -> None:
        data = bytearray((bundle / name).read_bytes())
        data[len(data) // 2] ^= 1
        (bundle / name).unlink()  # its other names are other files
        (bundle / name).write_bytes(data)

    return change


TAMPERED: dict[str, Tamper] = {
    "nothing": lambda _: None,
    "labels.txt": flip("labels.txt"),
    "serving/triton/small/1/model.onnx": flip("serving/triton/small/1/model.onnx"),
    "SHA256SUMS": flip("SHA256SUMS"),
    "golden/images.npy": lambda bundle: (bundle / "golden" / "images.npy").unlink(),
    "1/extra.py": lambda bundle: (bundle / "serving" / "triton-python" / "small" / "1" / "extra.py").write_text(""),
    ".gitignore": lambda bundle: (bundle / ".gitignore").write_text("*"),
    "link": lambda bundle: (bundle / "link").symlink_to("/etc/passwd"),
    "no signature": lambda bundle: (bundle / "model.sig").unlink(),
    "garbage": lambda bundle: (bundle / "model.sig").write_bytes(b"garbage"),
    "empty": lambda bundle: (bundle / "model.sig").write_text("{}"),
}


def main(bundle: Path, out: Path) -> None:
    """Try all."""
    out.mkdir()
    write_keys(out)
    public = out / "own.public.pem"
    facts = {}
    for key in ("own.locked", "rsa", "own.public", "none", "own"):
        facts[f"sign {key}"] = said(sign, bundle, out / f"{key}.pem")
    for name, tamper in TAMPERED.items():
        copy = out / "copy"
        shutil.copytree(bundle, copy)
        tamper(copy)
        facts[name] = said(verify, copy, public)
        shutil.rmtree(copy)
    for key in ("other.public", "rsa.public", "own", "none"):
        facts[f"verify {key}"] = said(verify, bundle, out / f"{key}.pem")
    (out / "facts.json").write_text(json.dumps(facts))


main(Path(sys.argv[1]), Path(sys.argv[2]))
