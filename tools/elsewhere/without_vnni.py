"""Copy onnxruntime with every CPUID instruction replaced by one that faults, for `without_vnni.c` on machines that cannot make CPUID fault.

python tools/elsewhere/without_vnni.py FOLDER
cc -shared -fPIC -O2 -DPATCHED -o without_vnni.so tools/elsewhere/without_vnni.c
LD_PRELOAD=./without_vnni.so PYTHONPATH=FOLDER python …
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime

CPUID, UD2 = b"\x0f\xa2", b"\x0f\x0b"  # of the same length


def patch_(library: Path) -> int:
    """Replace the instructions in place; return how many there were."""
    headers = subprocess.run(["readelf", "-SW", library], check=True, capture_output=True, text=True).stdout
    found = re.search(r"\.text\s+PROGBITS\s+([0-9a-f]+)\s+([0-9a-f]+)", headers)
    assert found is not None
    address, offset = (int(number, 16) for number in found.groups())
    listing = subprocess.run(["objdump", "-d", "-j", ".text", library], check=True, capture_output=True, text=True)
    places = re.findall(r"^\s*([0-9a-f]+):.*\tcpuid", listing.stdout, re.MULTILINE)
    code = bytearray(library.read_bytes())
    for place in places:
        start = int(place, 16) - address + offset
        assert code[start : start + 2] == CPUID
        code[start : start + 2] = UD2
    library.write_bytes(code)
    return len(places)


def main() -> None:
    """Make the copy in the folder that the command line names."""
    folder = Path(sys.argv[1], "onnxruntime")
    shutil.copytree(Path(onnxruntime.__file__).parent, folder, dirs_exist_ok=True)
    (library,) = folder.glob("capi/onnxruntime_pybind11_state*.so")
    sys.stdout.write(f"{library}: {patch_(library)} CPUID instructions replaced\n")


if __name__ == "__main__":
    main()
