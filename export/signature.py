"""Sign a bundle with a private key, and verify it offline with the public key, by OpenSSF Model Signing.

`python -m export.signature BUNDLE --key PUBLIC.pem` verifies; `compress publish --sign PRIVATE.pem` signs. Keys are PEM files of an
elliptic curve: `openssl ecparam -name prime256v1 -genkey -noout -out private.pem`, `openssl ec -in private.pem -pubout -out public.pem`.
"""

import argparse
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from export.bundle.read import read_bundle
from export.command.main import run
from export.errors import BundleError
from export.names import SIGNATURE


def sign(folder: Path, key: Path) -> None:
    """Sign every file in `folder`, and write the signature into it.

    Raises BundleError if the key cannot sign or model-signing is not installed.
    """
    model_signing, _ = library()
    try:
        signer = model_signing.signing.Config().use_elliptic_key_signer(private_key=key)
        signer.set_hashing_config(hashing(model_signing)).sign(folder, folder / SIGNATURE)
    except (OSError, TypeError, ValueError, AttributeError) as error:  # a key with a password, or of another kind
        raise BundleError(
            f"{key}: cannot sign ({error}): give the PEM file of an elliptic curve's private key without a password"
        ) from error


def verify(folder: Path, key: Path) -> None:
    """Check every file in `folder` against the signature.

    Raises BundleError, naming the files, if any was changed, added or removed; also if another key signed, or model-signing is
    not installed.
    """
    model_signing, invalid_signature = library()
    try:
        verifier = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=key)
    except (OSError, ValueError, AttributeError) as error:
        raise BundleError(
            f"{key}: is not a PEM file of an elliptic curve's public key ({error}): give another"
        ) from error
    if (folder / SIGNATURE).is_symlink() or not (folder / SIGNATURE).is_file():
        raise BundleError(f"{SIGNATURE}: is missing: the bundle is not signed; publish it with --sign")
    try:
        verifier.set_hashing_config(hashing(model_signing)).verify(folder, folder / SIGNATURE)
    except invalid_signature as error:
        raise BundleError(f"{SIGNATURE}: was not made with the key of {key}: get the bundle again") from error
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        digests = r": Expected \\*'Digest\(.*?\)\\*', Actual \\*'Digest\(.*?\)\\*'"
        said = re.sub(digests, "", str(error)).replace("\\'", "'")  # keep only the names
        raise BundleError(f"{SIGNATURE}: does not fit this bundle ({said}): get the bundle again") from error


def hashing(model_signing: Any) -> Any:
    """Return the setting of what to sign: all files but the signature, including those that git would ignore."""
    return model_signing.hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def library() -> tuple[Any, type[Exception]]:
    """Return model-signing and its exception for an invalid signature."""
    try:
        return import_module("model_signing"), import_module("cryptography.exceptions").InvalidSignature
    except ImportError as error:
        raise BundleError(
            f"signatures need model-signing ({error}): pip install -e '.[sign]' in the clone, or pip install model-signing"
        ) from error


def print_signed(arguments: argparse.Namespace) -> int:
    """Verify the bundle, and print that it is the signed one."""
    verify(arguments.bundle, arguments.key)  # first, so that no file is parsed before it is verified
    bundle = read_bundle(arguments.bundle)
    sys.stdout.write(f"{arguments.bundle}: {bundle.name}, every file is the signed one\n")
    return 0


def main() -> int:
    """Verify a bundle's digests and its signature; exit with 2 if a file is not the signed one."""
    parser = argparse.ArgumentParser(prog="python -m export.signature", description=main.__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--key", type=Path, required=True, metavar="PUBLIC.pem", help="the signer's public key")
    return run(parser, print_signed)


if __name__ == "__main__":
    sys.exit(main())
